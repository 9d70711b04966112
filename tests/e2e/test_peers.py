"""Nodes find one another again when every address that they were given is wrong."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

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
def network(follower_count: int, *settings: str) -> Iterator[tuple[LocalNetwork, list[LocalNode]]]:
    """Four voters and some followers, which know the voters' first addresses; all run."""
    draft = Draft("moving", tuple((f"v{number}", ("/ip4/127.0.0.1/tcp/0",)) for number in range(1, 5)))
    own = ('hypervisor = "none"', 'log_level = "debug"', 'log_format = "json"', *settings)
    local = LocalNetwork.found(draft, node_settings=own)
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


def is_cut_off(node: LocalNode) -> bool:
    try:
        return node.client.get("/v1/status")["network"]["sight"]["partitioned_s"] is not None
    except UnavailableError:
        return False


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


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("security", ["noise", "tls"])
def test_a_private_network_works_and_nobody_else_gets_in(tmp_path: Path, security: str) -> None:
    """Voters reach a quorum and a member follows; one without the key, and one with another, see nobody and are told why."""
    keys = {name: tmp_path / f"{name}.key" for name in ("own", "other")}
    for name, path in keys.items():
        path.write_text("/key/swarm/psk/1.0.0/\n/base16/\n" + name.encode().hex().ljust(64, "0") + "\n")
        path.chmod(0o600)
    own = f'network_key = "{keys["own"]}"'
    with network(3, own, f'security = "{security}"') as (local, (member, without, foreign)):
        for stranger, line in ((without, ""), (foreign, f'network_key = "{keys["other"]}"')):
            local.kill(stranger)
            config = stranger.folder / "config.toml"
            assert own in config.read_text()
            config.write_text(config.read_text().replace(own, line))
            # What it heard as a member is not what is tested.
            (stranger.folder / "peers.cbor").unlink(missing_ok=True)
            local.start(stranger)
        wait_for("a quorum", lambda: local.nodes[0].client.get("/v1/status")["state"]["has_quorum"], SETTLE_TIMEOUT_S)
        wait_for("the member sees all", lambda: seen_voters(member) == 4, SETTLE_TIMEOUT_S)
        for stranger in (without, foreign):
            wait_for("the stranger says that it is cut off", partial(is_cut_off, stranger), SETTLE_TIMEOUT_S)
            assert seen_voters(stranger) == 0
        connected = {peer["node_id"] for peer in local.nodes[0].client.get("/v1/peers") if peer["connected"]}
        assert member.key.node_id in connected
        assert not connected & {without.key.node_id, foreign.key.node_id}
        assert not any(peer["score"] for peer in local.nodes[0].client.get("/v1/peers"))
        assert "network key the same as ours" in (foreign.folder / "node.log").read_text()
