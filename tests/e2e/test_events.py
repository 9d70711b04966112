"""Events and reads of other nodes, with real processes: killed nodes, cut-off writers, followers that read nothing."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.macro.state_network import rss_mib
from formation.cli.local_network import LocalNode, local_network
from formation.core.errors import UnavailableError
from formation.core.keys import read_key_file
from formation.core.manifest import read_draft
from tests.e2e.conftest import ROOT, Commands, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def formation() -> Iterator[Commands]:
    with local_network(read_draft(ROOT / "peers" / "demo.toml"), node_settings=('hypervisor = "none"',)) as network:
        yield Commands(network)


def put(formation: Commands, key: str, value: str, *, node: LocalNode | None = None, status: int | None = 0) -> None:
    formation("value", "put", key, value, node=node, status=status)


def told(formation: Commands, *arguments: str, node: LocalNode | None = None) -> list[dict[str, object]]:
    out = formation("events", "-o", "jsonl", *arguments, node=node).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_a_follower_misses_nothing_when_its_node_is_killed(formation: Commands, tmp_path: Path) -> None:
    """Killed with -9 while somebody follows: after its restart each position comes once, and none is left out."""
    first = formation.network.nodes[0]
    before = told(formation)
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        follower = subprocess.Popen(
            [*_formation(), "events", "-f", "-o", "jsonl", "--since", str(before[-1]["cursor"])],
            env=formation.network.env,
            stdout=out,
            stderr=err,
        )
    try:
        for index in range(3):
            put(formation, f"a{index}", "1")
        formation.network.kill(first)
        put(formation, "while-away", "1", node=formation.network.nodes[1])
        formation.network.start(first)
        formation.network.wait_until_meshed()
        for index in range(3):
            put(formation, f"b{index}", "1")
        newest = int(str(told(formation)[-1]["position"]))
        wait_for(lambda: f'"position":{newest},' in (tmp_path / "out").read_text().replace(" ", ""), what="all is told")
    finally:
        follower.send_signal(signal.SIGINT)
        assert follower.wait(timeout=20) == 130
    seen = [json.loads(line)["position"] for line in (tmp_path / "out").read_text().splitlines()]
    first_position = int(str(before[-1]["position"])) + 1
    assert seen == list(range(first_position, first_position + len(seen)))
    assert seen[-1] >= newest
    # Ctrl-C says how to go on.
    cursor = re.search(r"--since ([0-9a-f]{8}-[0-9]+)", (tmp_path / "err").read_text())
    assert cursor is not None
    assert all(int(str(event["position"])) > seen[-1] for event in told(formation, "--since", cursor[1]))


def test_positions_of_another_node_or_life_are_refused(formation: Commands) -> None:
    """With another feed's id, and after the state folder was remade; a time is understood everywhere."""
    first, second = formation.network.nodes[:2]
    cursor = str(told(formation)[-1]["cursor"])
    refused = formation("events", "--since", cursor, node=second, status=6)
    assert "not this node's" in refused.stderr
    assert "--since 10m" in refused.stderr
    assert told(formation, "--since", "10m", node=second)
    formation.network.stop([first])
    (first.folder / "state").rename(first.folder / "state.old")
    formation.network.start(first)
    formation.network.wait_until_meshed()
    formation("events", "-f", "--since", cursor, status=6)


def test_filters_and_what_they_refuse(formation: Commands) -> None:
    """In the node, several values of one name, and a wrong one with what comes near."""
    put(formation, "a", "1")
    put(formation, "b", "2", node=formation.network.nodes[1])
    assert {event["topic"] for event in told(formation, "--topic", "value", "--topic", "node")} == {"value", "node"}
    assert {event["record"] for event in told(formation, "--record", "value")} == {"value"}
    account = read_key_file(formation.network.folder / "account.key")
    by_account = told(formation, "--account", _account_id(account.public_key))
    assert {event["verb"] for event in by_account} == {"value.put"}
    second = formation.network.nodes[1]
    by_node = told(formation, "--node", second.name, "--record", "value")
    assert {event["node_id"] for event in by_node} == {second.key.node_id}
    assert {event["level"] for event in told(formation, "--level", "final")} <= {"final"}
    assert "did you mean vm?" in formation("events", "--topic", "vmm", status=2).stderr


def test_what_a_node_accepted_while_cut_off_is_sent_on_after_kill_9(formation: Commands) -> None:
    """Three of four voters are away; what the fourth took is on its disk, survives, and is certified everywhere in order."""
    first, *others = formation.network.nodes
    for node in others:
        formation.network.kill(node)
    # The node says that it is written and not acknowledged (7).
    for index in range(3):
        put(formation, f"cut-off-{index}", str(index), status=7)
    formation.network.kill(first)
    for node in formation.network.nodes:
        formation.network.start(node)
    formation.network.wait_until_meshed()
    account = _account_id(read_key_file(formation.network.folder / "account.key").public_key)
    for node in formation.network.nodes:

        def keys(node: LocalNode = node) -> list[str]:
            try:
                certified = told(formation, "--account", account, "--level", "certified", node=node)
            except UnavailableError:
                return []
            return [str(event["object_id"]).partition("/")[2] for event in certified]

        wanted = [f"cut-off-{index}" for index in range(3)]
        wait_for(partial(lambda keys, wanted: keys() == wanted, keys, wanted), what=f"in order at {node.name}")


def test_a_follower_that_reads_nothing_harms_nobody(formation: Commands) -> None:
    """It holds a bounded piece of the node's memory, other requests are answered as before, and its place comes back."""
    first = formation.network.nodes[0]
    assert first.process is not None
    put(formation, "a", "x" * 20_000)
    before_mib = rss_mib(first.process.pid)
    silent = []
    for _ in range(20):
        one = socket.socket(socket.AF_UNIX)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(str(first.socket))
        one.sendall(b"GET /v1/events?since=0 HTTP/1.1\r\nHost: x\r\n\r\n")
        silent.append(one)
    for index in range(40):
        put(formation, f"k{index % 4}", "x" * 20_000)
    began = time.monotonic()
    first.client.get("/v1/status")
    assert time.monotonic() - began < 5
    grown_mib = rss_mib(first.process.pid) - before_mib
    print(f"20 silent followers, 40 writes of 20 kB: {before_mib:.0f} MiB and {grown_mib:.0f} MiB more")
    assert grown_mib < 100
    tasks = first.client.get("/v1/status")["node"]["task_count"]
    # A minute without reading, then they are let go, whether they close or not.
    wait_for(
        lambda: first.client.get("/v1/status")["node"]["task_count"] <= tasks - 2 * len(silent), what="let go", timeout_s=100
    )
    for one in silent:
        one.close()


def test_another_nodes_status_through_this_one(formation: Commands) -> None:
    """Its operators may, by their account's signature; who is away, unknown, or does not let one in is told apart."""
    _, second, third, _ = formation.network.nodes
    account = _account_id(read_key_file(formation.network.folder / "account.key").public_key)
    formation.network.stop([second])
    config = second.folder / "config.toml"
    config.write_text(config.read_text() + f'operators = ["{account}"]\n')
    formation.network.start(second)
    formation.network.wait_until_meshed()
    assert formation("status", "--on", second.name, "-q").stdout.strip() == second.key.node_id
    assert "4 of 4 voters" in formation("status", "--on", second.name).stdout
    peers = formation.json("peer", "list", "--on", second.name)
    assert second.key.node_id not in {peer["node_id"] for peer in peers}
    assert " ms" in formation("peer", "ping", third.name, "--on", second.name, "-n", "1").stdout
    assert f"{second.name}, votes" in formation("state", "status", "--on", second.name).stdout
    _leave_in_the_middle(formation, second, third)
    refused = formation("status", "--on", third.name, status=4)
    assert f"node {third.name}" in refused.stderr
    assert "node.operators" in refused.stderr
    assert "nobody" in formation("status", "--on", "nobody", status=5).stderr
    formation.network.kill(second)
    assert "cannot be reached" in formation("status", "--on", second.name, status=3).stderr


def _leave_in_the_middle(formation: Commands, asked: LocalNode, silent: LocalNode) -> None:
    """Ctrl-C at the client ends the work at the far process, which waits for a node that stands still."""
    assert silent.process is not None
    silent.process.send_signal(signal.SIGSTOP)
    try:
        client = formation.start("peer", "ping", silent.name, "--on", asked.name, "-n", "1")
        time.sleep(2.5)
        assert client.poll() is None
        client.send_signal(signal.SIGINT)
        left_at = time.monotonic()
        assert client.wait(timeout=10) == 130
        wait_for(lambda: "the asker went" in (asked.folder / "node.log").read_text(), what="it hears of it", timeout_s=5)
        print(f"the far node stopped {time.monotonic() - left_at:.1f} s after Ctrl-C")
        client.communicate()
    finally:
        silent.process.send_signal(signal.SIGCONT)
    formation.network.wait_until_meshed()


def _account_id(public_key: bytes) -> str:
    from formation.core.ids import account_id_of

    return account_id_of(public_key)


def _formation() -> list[str]:
    import sys

    return [sys.executable, "-m", "formation"]
