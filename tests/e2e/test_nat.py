"""Nodes behind real NATs (nftables in network namespaces) find out that they are, use relays, and punch holes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from formation.cli.local_network import LocalNetwork, LocalNode
from formation.core.errors import UnavailableError
from formation.core.keys import KeyPair, write_key_file
from formation.core.manifest import Draft
from tests.e2e.nat_lab import EASY, HARD, PORT, NatLab, public_ip, why_not

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(reason := why_not()), reason=reason or "namespaces work"),
]
# A test of reachability comes 2 s after the first connection, and a dial that nobody answers takes 5 s; the machine is shared.
SETTLE_TIMEOUT_S = 60.0
REFUSED = "the relay keeps no place for us: reservation refused: its places are taken"


def node_id(seed: int) -> str:
    return KeyPair(bytes((seed,)) * 32).node_id


class Node:
    """One process in a namespace."""

    def __init__(self, netns: str, seed: int, folder: Path, **config: Any) -> None:
        self.id, self.log = node_id(seed), folder / f"node{seed}.log"
        program = str(Path(__file__).with_name("reach_node.py"))
        argv = ["ip", "netns", "exec", netns, sys.executable, program, json.dumps({"seed": seed, **config})]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self._is_up = False

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the node ended\n{self.log.read_text()[-4000:]}"
        return json.loads(line)

    def __call__(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        if not self._is_up:  # they start side by side
            self._is_up = bool(self.read())
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        answer = self.read()
        if "error" in answer:
            raise AssertionError(f"{do} {arguments}: {answer['error']}\n{self.log.read_text()[-4000:]}")
        return answer["ok"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def wait(self, condition: Callable[[Any], bool], what: str, timeout_s: float = SETTLE_TIMEOUT_S) -> Any:
        deadline = time.monotonic() + timeout_s
        while not condition(state := self("state")):
            assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}\n{state}\n{self.log.read_text()[-6000:]}"
            time.sleep(0.3)
        return state


class World:
    """A lab with nodes in it; public ones have the seeds 1, 2, 3, the one of site i has 10+i."""

    def __init__(self, lab: NatLab, folder: Path) -> None:
        self.lab, self.folder, self.nodes = lab, folder, list[Node]()
        self.config: dict[str, Any] = {}
        """Of all nodes."""

    def public(self, number: int, **config: Any) -> Node:
        known = {node_id(n): [f"/ip4/{public_ip(n)}/tcp/{PORT}"] for n in range(1, number)}
        return self._start(self.lab.public(number), number, {"known": known, **config})

    def private(self, number: int, nat: str, relays: tuple[int, ...], **config: Any) -> Node:
        known = {node_id(n): [f"/ip4/{public_ip(n)}/tcp/{PORT}"] for n in relays}
        return self._start(self.lab.site(number, nat), 10 + number, {"known": known, **config})

    def _start(self, netns: str, seed: int, config: dict[str, Any]) -> Node:
        self.nodes.append(Node(netns, seed, self.folder, **self.config, **config))
        return self.nodes[-1]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with NatLab() as lab:
        world = World(lab, tmp_path)
        try:
            yield world
        finally:
            for node in world.nodes:
                node.kill()


def is_relayed(node: Node, peer: Node) -> bool:
    routes = node("routes", peer=peer.id)
    return bool(routes) and all(route["is_relayed"] for route in routes)


def is_direct(node: Node, peer: Node) -> bool:
    routes = node("routes", peer=peer.id)
    return bool(routes) and not any(route["is_relayed"] for route in routes)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        time.sleep(0.3)


def has_relays(count: int) -> Callable[[Any], bool]:
    return lambda state: state["verdict"] == "private" and len(state["relays"]) == count


def test_holes_are_punched_and_a_forwarded_port_makes_a_node_public(world: World) -> None:
    """Public nodes are told so; private ones get relays, talk through them, then directly: the relays' counters stand still."""
    one, two = world.public(1), world.public(2)
    a, b = world.private(1, EASY, (1, 2)), world.private(2, EASY, (1, 2))
    for node in (one, two):
        state = node.wait(lambda s: s["verdict"] == "public" and s["serves_as_relay"], "told to be public")
        assert state["families"][0]["nat"] == "none"
        assert state["is_kad_server"]
    for node in (a, b):
        state = node.wait(has_relays(2), "two relays")
        assert state["families"][0]["nat"] == "endpoint-independent"
        assert state["families"][0]["addresses"][0]["why"] == "no answer in time"
        assert not state["is_kad_server"]
    circuits = [address for relay in b("state")["relays"] for address in relay["addresses"]]
    assert a("ask", peer=b.id, text="hello", addresses=circuits) == "hello"
    wait_for(lambda: is_direct(a, b) and is_direct(b, a), "a direct connection")
    assert a("routes", peer=b.id)[0]["host"] == "203.0.113.12"
    before = [node("state")["relayed_bytes"] for node in (one, two)]
    a("pour", peer=b.id, size_bytes=10_000_000)
    assert [node("state")["relayed_bytes"] for node in (one, two)] == before
    wait_for(lambda: (a("publish", text="to all"), "to all" in b("heard"))[1], "gossip on the direct connection")
    # The router's owner forwards the port: without a restart, at the next look.
    world.lab.forward_port(1)
    state = a("check")
    assert state["verdict"] == "public", state
    assert state["reachable"] == ["/ip4/203.0.113.11/tcp/4700"]
    assert not state["relays"]
    assert state["serves_as_relay"]
    assert state["is_kad_server"]


def test_hard_nats_stay_relayed_and_another_relay_takes_over(world: World) -> None:
    """A NAT with a new port for each peer is told apart; talk goes on through another relay when one is killed.

    All under a network key: relays and dial-backs work in a private network, too.
    """
    world.config["network_key"] = "6b" * 32
    relays = {node.id: node for node in (world.public(1), world.public(2), world.public(3))}
    a, b = world.private(1, HARD, (1, 2, 3)), world.private(2, HARD, (1, 2, 3))
    for node in (a, b):
        state = node.wait(has_relays(2), "two relays")
        assert state["families"][0]["nat"] == "address-dependent"
    # Found by its key alone: the relays tell its circuits, as soon as they have heard of them.
    wait_for(lambda: _asks(a, b), "found by its key")
    assert is_relayed(a, b)
    state = b.wait(lambda s: bool(s["relayed"]) and "another port" in s["relayed"][0][1], "why it stays relayed")
    assert a("pour", peer=b.id, size_bytes=1_000_000) > 0
    assert sum(node("state")["relayed_bytes"] for node in relays.values()) > 1_000_000
    used = next(node for node in relays.values() if node("state")["circuit_count"])
    used.kill()
    wait_for(lambda: _asks(a, b), "talk through another relay")
    assert is_relayed(a, b)
    b.wait(has_relays(2), "a relay in place of the one that was killed")
    wait_for(lambda: (a("publish", text="again"), "again" in b("heard"))[1], "gossip through the other relay")


def test_a_relay_keeps_its_limits(world: World) -> None:
    """One place: the second asker is refused and says so; a circuit is cut at its bytes."""
    limits = {"reservation_count_max": 1, "circuit": {"duration_s": 60, "size_bytes": 2_000_000}}
    one = world.public(1, limits=limits, relay="on")
    a, b = world.private(1, HARD, (1,)), world.private(2, HARD, (1,))
    one.wait(lambda s: s["reservation_count"] == 1 and s["reservation_refused_count"] >= 1, "one place, one refused")
    wait_for(lambda: bool(a("state")["relays"]) or bool(b("state")["relays"]), "who has it")
    inner, outer = (a, b) if a("state")["relays"] else (b, a)
    assert not outer("state")["relays"]
    assert outer("state")["refusals"] == [[one.id, REFUSED]]
    assert outer("ask", peer=inner.id, text="hello", addresses=inner("state")["relays"][0]["addresses"]) == "hello"
    with pytest.raises(AssertionError, match="broke"):
        outer("pour", peer=inner.id, size_bytes=4_000_000)
    assert one("state")["cut_bytes_count"] >= 1


def test_net_check_tells_people(tmp_path: Path) -> None:
    """Real nodes: a voter alone, then a follower behind NAT: what they say, their exit status, and the way to mend it."""
    with NatLab() as lab:
        draft = Draft("natted", (("v1", (f"/ip4/{public_ip(1)}/tcp/{PORT}",)),))
        local = LocalNetwork.found(draft, folder=tmp_path, node_settings=('hypervisor = "none"',))
        follower = LocalNode("f1", tmp_path / "f1", KeyPair.generate())
        follower.folder.mkdir(mode=0o700)
        write_key_file(follower.folder / "node.key", follower.key)
        voter = local.nodes[0]
        text = (voter.folder / "config.toml").read_text().replace(str(voter.folder), str(follower.folder))
        text = text.replace('name = "v1"', 'name = "f1"').replace(public_ip(1), "0.0.0.0")
        (follower.folder / "config.toml").write_text(text)
        local.nodes.append(follower)
        try:
            netns = lab.public(1)
            start(local, voter, netns)
            wait_for(voter.socket.exists, "the voter's API")
            alone = net_check(local, voter)
            assert "UNKNOWN, nobody to ask" in alone.stdout, alone
            assert alone.returncode == 9
            start(local, follower, lab.site(1, EASY))
            wait_for(lambda: relay_count(follower) == 1, "a relay")
            relayed = net_check(local, follower)
            assert relayed.returncode == 0
            assert "yes, through a relay, not directly" in relayed.stdout
            assert "/ip4/203.0.113.11/tcp/4700: reached by 0 of 1 peer (no answer in time)" in relayed.stdout
            assert "only asks (client)" in relayed.stdout
            assert f"forward TCP port {PORT} to this machine" in relayed.stderr
            assert "yes, directly" in net_check(local, voter).stdout
            told = json.loads(net_check(local, follower, "-o", "json", "--last").stdout)
            assert told["relays"][0]["name"] == "v1"
            assert voter.process is not None
            voter.process.kill()
            voter.process.wait()
            wait_for(lambda: relay_count(follower) == 0, "the only relay is missed")
            lonely = net_check(local, follower, "--last")
            assert "NO, nobody can connect to this node" in lonely.stdout
            assert lonely.returncode == 9
            assert "it found no relay" in follower.log_tail()
            assert "nobody can connect to this node" in str(follower.client.get("/v1/status")["warnings"])
            start(local, voter, netns)
            wait_for(lambda: relay_count(follower) == 1, "the relay is back")
        finally:
            local.close()


def relay_count(node: LocalNode) -> int | None:
    """None while its API is not there."""
    try:
        return len(node.client.get("/v1/net")["relays"])
    except UnavailableError:
        return None


def start(local: LocalNetwork, node: LocalNode, netns: str) -> None:
    with (node.folder / "node.log").open("ab") as log:
        node.process = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                netns,
                sys.executable,
                "-m",
                "formation",
                "node",
                "--config",
                str(node.folder / "config.toml"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=local.env,
        )


def net_check(local: LocalNetwork, node: LocalNode, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "formation", "net", "check", "--host", str(node.socket), *options]
    return subprocess.run(command, env=local.env, text=True, capture_output=True, check=False)


def _asks(node: Node, peer: Node) -> bool:
    try:
        return bool(node("ask", peer=peer.id, text="still there") == "still there")
    except AssertionError:
        return False
