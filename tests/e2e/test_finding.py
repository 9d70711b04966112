"""Real processes that find one another, images and roles: over provider records, and on a LAN without any address."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from formation.p2p.kad import kad_protocol
from formation.p2p.mdns import ANSWER_INTERVAL_S, FOUND_PER_SOURCE_MAX
from tests.e2e.conftest import ROOT
from tests.e2e.line_node import NETWORK_ID

pytestmark = [pytest.mark.net, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]

PROGRAM = Path(__file__).with_name("line_node.py")
NAMESPACE_COUNT = 3


class Process:
    """One node."""

    def __init__(self, seed: int, folder: Path, *, inside: str = "", **options: Any) -> None:
        known = options.pop("known", {})
        listen = options.pop("listen", "/ip4/127.0.0.1/tcp/0")
        wanted = {"seed": seed, "folder": str(folder / str(seed)), "known": known, "listen": listen} | options
        prefix = ["ip", "netns", "exec", inside] if inside else []
        self._log = (folder / f"{seed}.log").open("wb")
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.e2e.line_node", json.dumps(wanted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        started = self._read()
        self.node_id: str = started["node_id"]
        self.where: dict[str, list[str]] = {self.node_id: started["addresses"]}

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the node ended: see its log"
        return json.loads(line)

    def __call__(self, do: str, **options: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **options}).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def start(seed: int, **options: Any) -> Process:
        running.append(Process(seed, tmp_path, **options))
        return running[-1]

    yield start
    for process in running:
        process.end()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not in {timeout_s:.0f} s: {what}"
        time.sleep(0.2)
    return found


def test_an_image_is_found_at_the_far_end_of_a_line(start: Callable[..., Process], tmp_path: Path) -> None:
    """Near knows the middle only, the far end knows the middle only, nobody says who holds the image; and roles, too."""
    middle = start(2)
    far, near = start(3, known=middle.where), start(1, known=middle.where)
    until(lambda: {near.node_id, far.node_id} <= set(middle("look")["table"]), "both are in the table of the middle")
    digest = far("hold", context=str(tmp_path / "context"))
    far("role", role="gpu")
    assert until(lambda: near("who", role="gpu"), "the role is found") == [far.node_id]
    assert near("who", role="ingress") == []

    def pull() -> Any:
        answer = near("pull", digest=digest)
        return None if "error" in answer else answer

    pulled = until(pull, "the image is pulled")
    assert pulled["from"] == far.node_id
    assert pulled["bytes"] > 1_000_000
    assert "no node" in near("pull", digest="sha256:" + "1" * 64)["error"]


def test_networks_do_not_mix(start: Callable[..., Process]) -> None:
    """Connected, and in nobody's table; what one provides the other does not find."""
    one = start(4)
    other = start(5, known=one.where, network="ff" * 32)
    third = start(6, known=one.where)
    until(lambda: third.node_id in one("look")["table"], "one of the same network is in the table")
    until(lambda: other.node_id in one("look")["connected"], "the stranger is connected")
    other("role", role="gpu")
    time.sleep(3)
    assert other.node_id not in one("look")["table"]
    assert other("look")["table"] == []
    assert one("who", role="gpu") == []


def lan_reason() -> str | None:
    """Why there can be no LAN of namespaces here; None: there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if shutil.which("ip") is None:
        return "this machine lacks ip (iproute2)"
    made = subprocess.run(["ip", "netns", "add", "fmdns-probe"], capture_output=True, check=False)
    if made.returncode != 0:
        return "this kernel lets nobody make network namespaces"
    subprocess.run(["ip", "netns", "del", "fmdns-probe"], check=True)
    return None


@pytest.fixture
def lan() -> Iterator[list[str]]:
    """Namespaces on one bridge, without a route anywhere."""
    if (reason := lan_reason()) is not None:
        pytest.skip(reason)
    tag = f"fm{os.getpid() % 10000}"
    hub, names = f"{tag}hub", [f"{tag}n{n}" for n in range(1, NAMESPACE_COUNT + 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    try:
        for name in (hub, *names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", hub, "link", "add", "br0", "type", "bridge")
        ip("-n", hub, "link", "set", "br0", "up")
        for n, name in enumerate(names, 1):
            ip("-n", hub, "link", "add", f"p{n}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", hub, "link", "set", f"p{n}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{n}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in (*names, hub):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=20)


def test_a_lan_without_any_address(start: Callable[..., Process], lan: list[str]) -> None:
    """Three nodes that know nobody find one another by mDNS; without it they do not; one of another network stays out."""
    alone = start(9, inside=lan[0], listen="/ip4/0.0.0.0/tcp/4709")
    stranger = start(8, inside=lan[1], listen="/ip4/0.0.0.0/tcp/4708", mdns=True, network="ee" * 32)
    nodes = [start(n, inside=name, listen="/ip4/0.0.0.0/tcp/4700", mdns=True) for n, name in enumerate(lan, 1)]
    ids = {node.node_id for node in nodes}

    def sees_all(node: Process, where: str) -> bool:
        return set(node("look")[where]) == ids - {node.node_id}

    for node in nodes:
        until(partial(sees_all, node, "connected"), "all are connected", 40)
        until(partial(sees_all, node, "table"), "all are in the table", 40)
    assert alone("look")["connected"] == stranger("look")["connected"] == []


def test_a_liar_on_the_lan(start: Callable[..., Process], lan: list[str]) -> None:
    """Floods, packets that take long to read, lies about itself and others, and what goes past the group: two nodes that
    know nobody find one another, take few of the lies, and speak no oftener than they would."""
    own, victims = "10.77.0.3", ["10.77.0.1", "10.77.0.2"]
    options = json.dumps({"network": "ab" * 32, "own": own, "victims": victims})
    attacker = subprocess.Popen(
        ["ip", "netns", "exec", lan[2], sys.executable, "-m", "tests.e2e.mdns_liar", options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert attacker.stdout is not None
        assert json.loads(attacker.stdout.readline()) == "ready"
        a, b = (
            start(n, inside=name, listen="/ip4/0.0.0.0/tcp/4700", mdns=True, network="ab" * 32)
            for n, name in enumerate(lan[:2], 1)
        )
        until(lambda: b.node_id in a("look")["table"] and a.node_id in b("look")["table"], "both are found", 60)
        said, _ = attacker.communicate(b"end", timeout=20)
    finally:
        attacker.kill()
        attacker.wait()
    heard = json.loads(said)
    assert heard["asked_count"] > 50
    for node in (a, b):
        hearsay = set(node("look")["hearsay"])
        assert not hearsay & set(heard["ghosts"]["theirs"] + heard["ghosts"]["alone"])
        assert len(hearsay) <= FOUND_PER_SOURCE_MAX * (2 + heard["lasted_s"] / 60)
        assert hearsay <= set(heard["ghosts"]["mine"])
    for count in heard["answers"].values():
        assert 1 <= count <= 2 + heard["lasted_s"] / ANSWER_INTERVAL_S


def test_who_serves_is_told_to_those_who_are_connected(start: Callable[..., Process]) -> None:
    """A node that learns that nobody can dial it answers no more in Kademlia, and pushes that by identify; and back again."""
    one = start(1)
    other = start(2, known=one.where)
    protocol = kad_protocol(NETWORK_ID)
    until(lambda: other.node_id in one("look")["table"], "it is in the table")
    until(lambda: protocol in one("protocols", peer=other.node_id), "it is told at first")
    other("reachable", **{"is": False})
    until(lambda: protocol not in one("protocols", peer=other.node_id), "it is told that it serves no more", 20)
    other("reachable", **{"is": True})
    until(lambda: protocol in one("protocols", peer=other.node_id), "it is told that it serves again", 20)
