"""Nodes find one another again when every address that they were given is wrong."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from formation.cli.local_network import LocalNetwork, LocalNode
from formation.core.errors import UnavailableError
from formation.core.keys import KeyPair, write_key_file
from formation.core.manifest import Draft

# Six processes on two cores that are shared: start, identify, book on disk.
SETTLE_TIMEOUT_S = 90.0
# Followers see it after 10 s; voters are found by dials every few seconds, each of which may fail once.
FOUND_TIMEOUT_S = 120.0


@contextmanager
def network(follower_count: int) -> Iterator[tuple[LocalNetwork, list[LocalNode]]]:
    """Four voters and some followers, which know the voters' first addresses; all run."""
    draft = Draft("moving", tuple((f"v{number}", ("/ip4/127.0.0.1/tcp/0",)) for number in range(1, 5)))
    local = LocalNetwork.found(draft, node_settings=('hypervisor = "none"', 'log_level = "debug"', 'log_format = "json"'))
    try:
        voters = list(local.nodes)
        for number in range(1, follower_count + 1):
            follower = LocalNode(f"f{number}", local.folder / f"f{number}", KeyPair.generate())
            follower.folder.mkdir(mode=0o700)
            write_key_file(follower.folder / "node.key", follower.key)
            text = (voters[0].folder / "config.toml").read_text().replace(str(voters[0].folder), str(follower.folder))
            (follower.folder / "config.toml").write_text(text.replace('name = "v1"', f'name = "{follower.name}"'))
            move(follower)
            local.nodes.append(follower)
        for node in voters:
            local.start(node)
        local.wait_until_meshed(voters)
        for node in local.nodes[4:]:
            local.start(node)
        yield local, local.nodes[4:]
    finally:
        local.close()


def move(node: LocalNode) -> None:
    """Listen at another port from its next start on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = node.folder / "config.toml"
    path.write_text(re.sub(r"(?m)^listen = .*$", f'listen = ["/ip4/127.0.0.1/tcp/{port}"]', path.read_text()))


def seen_voters(node: LocalNode) -> int:
    try:
        return int(node.client.get("/v1/status")["network"]["sight"]["seen_count"])
    except UnavailableError:
        return -1


def wait_for(what: str, check: Callable[[], bool], timeout_s: float) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < timeout_s, what
        time.sleep(0.2)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_voters_that_all_moved_are_found_again() -> None:
    """All four killed and started at other ports, which no manifest names; a follower restarted meanwhile finds them, too."""
    with network(2) as (local, followers):
        voters = local.nodes[:4]
        wait_for("all see all", lambda: all(seen_voters(node) == 4 for node in local.nodes), SETTLE_TIMEOUT_S)
        wait_for("books", lambda: all((node.folder / "peers.cbor").exists() for node in local.nodes), SETTLE_TIMEOUT_S)
        # Followers know each other from what others told, and voters know where followers are.
        ids = {follower.key.node_id.encode() for follower in followers}
        wait_for(
            "followers are remembered",
            lambda: all(
                all(wanted in (node.folder / "peers.cbor").read_bytes() for wanted in ids - {node.key.node_id.encode()})
                for node in local.nodes
            ),
            SETTLE_TIMEOUT_S,
        )
        for voter in voters:
            local.kill(voter)
        local.kill(followers[1])
        cut_s = wait_for(
            "the follower says that it is cut off",
            lambda: followers[0].client.get("/v1/status")["network"]["sight"]["partitioned_s"] is not None,
            60,
        )
        for voter in voters:
            move(voter)
            local.start(voter)
        local.start(followers[1])
        found_s = wait_for("voters are found", lambda: all(seen_voters(node) == 4 for node in local.nodes), FOUND_TIMEOUT_S)
        wait_for("a quorum", lambda: voters[0].client.get("/v1/status")["state"]["has_quorum"], FOUND_TIMEOUT_S)
        scores = {node.name: [p["score"] for p in node.client.get("/v1/peers")] for node in local.nodes}
        print(f"cut off seen after {cut_s:.1f} s; all found {found_s:.1f} s after the voters' start; scores {scores}")
        assert not any(any(each) for each in scores.values())
