"""A fifth node that is not in the manifest: it follows by gossip and sync, and hands its users' wishes to voters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from formation.cli.local_network import LocalNode, local_network
from formation.core.errors import UnavailableError
from formation.core.keys import KeyPair, write_key_file
from formation.core.manifest import read_draft
from tests.e2e.conftest import ROOT, Commands, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def formation() -> Iterator[Commands]:
    with local_network(read_draft(ROOT / "peers" / "demo.toml"), node_settings=('hypervisor = "none"',)) as network:
        yield Commands(network)


def join(formation: Commands) -> LocalNode:
    """Start a node with the manifest's file and a key of its own."""
    network = formation.network
    observer = LocalNode("observer", network.folder / "observer", KeyPair.generate())
    observer.folder.mkdir()
    write_key_file(observer.folder / "node.key", observer.key)
    (observer.folder / "config.toml").write_text(
        f'[node]\nname = "observer"\ndata_dir = "{observer.folder}"\nmanifest = "{network.folder / "network.toml"}"\n'
        f'api_socket = "{observer.socket}"\nlisten = ["/ip4/127.0.0.1/tcp/0"]\nhypervisor = "none"\n'
    )
    network.nodes.append(observer)
    network.start(observer)
    return observer


def certified_count(node: LocalNode) -> int:
    try:
        return int(node.client.get("/v1/status")["state"]["certified_count"])
    except UnavailableError:
        return -1


def test_an_observer_catches_up_and_follows(formation: Commands) -> None:
    """What was certified before it came, and what is certified afterwards, reach a node that does not vote."""
    first = formation.network.nodes[0]
    observer = join(formation)
    wait_for(lambda: certified_count(observer) == certified_count(first) > 0, what="the observer has caught up")
    formation("image", "build", str(ROOT / "examples" / "hello"))
    wait_for(lambda: len(formation.json("image", "list", node=observer)) == 1, what="the observer sees the new image")
    wait_for(lambda: certified_count(observer) == certified_count(first), what="the observer follows")
    wait_for(
        lambda: "4 of 4 voters" in formation("status", node=observer).stdout, what="the observer is connected to every voter"
    )


def test_a_user_may_ask_an_observer(formation: Commands) -> None:
    """A VM asked for at a node that does not vote is known to all, and so is its end."""
    formation("image", "build", str(ROOT / "examples" / "hello"))
    observer = join(formation)
    wait_for(
        lambda: certified_count(observer) == certified_count(formation.network.nodes[0]) > 0, what="the observer has caught up"
    )
    # No node of this network runs VMs: it waits for a place, and says so.
    formation("vm", "create", "hello", "web", "--no-wait", node=observer, status=8)
    assert [vm["spec"]["name"] for vm in formation.json("vm", "list")] == ["web"]
    formation("vm", "delete", "web", "--yes", "--no-wait", node=observer, status=None)
    wait_for(lambda: formation.json("vm", "list", node=observer) == [], what="the observer sees it gone")
    assert formation.json("vm", "list") == []
