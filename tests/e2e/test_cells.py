"""Three networks of real processes on loopback: a root that names two cells, which read each other with proofs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from formation.cli.local_network import LocalNetwork, LocalNode, local_network
from formation.core.errors import ConflictError
from formation.core.keys import KeyPair, read_key_file, write_key_file
from formation.core.manifest import Draft
from tests.e2e.conftest import Commands, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass
class Cells:
    root: Commands
    berlin: Commands
    paris: Commands


def manifest_of(network: LocalNetwork) -> str:
    return str(network.folder / "network.toml")


@pytest.fixture
def cells() -> Iterator[Cells]:
    with ExitStack() as stack:
        made = []
        for name in ("root", "berlin", "paris"):
            draft = Draft(name, ((f"{name}-a", ("/ip4/127.0.0.1/tcp/0",)),))
            made.append(stack.enter_context(local_network(draft, node_settings=('hypervisor = "none"',))))
        # One person with one key in all of them.
        key = (made[0].folder / "account.key").read_bytes()
        for network in made[1:]:
            (network.folder / "account.key").write_bytes(key)
        yield Cells(*map(Commands, made))


def checkpoint(commands: Commands) -> None:
    """As soon as one may be made: some seconds after the last one, or after the beginning."""
    client = commands.network.nodes[0].client

    def is_made() -> bool:
        try:
            client.post_json("/v1/state/checkpoint", {})
        except ConflictError:
            return False
        return True

    wait_for(is_made, what="a checkpoint", timeout_s=20)


def observer_of(commands: Commands, name: str) -> LocalNode:
    """A node that is to vote soon."""
    network = commands.network
    node = LocalNode(name, network.folder / name, KeyPair.generate())
    node.folder.mkdir()
    write_key_file(node.folder / "node.key", node.key)
    (node.folder / "config.toml").write_text(
        f'[node]\nname = "{name}"\ndata_dir = "{node.folder}"\nmanifest = "{network.folder / "network.toml"}"\n'
        f'api_socket = "{node.socket}"\nlisten = ["/ip4/127.0.0.1/tcp/0"]\nhypervisor = "none"\n'
    )
    network.nodes.append(node)
    network.start(node)
    return node


def test_cells_read_each_other_by_way_of_their_root(cells: Cells, tmp_path: Path) -> None:
    """Names, proven reads and absences, an account's new key, a cell whose whole committee is another one by now."""
    root, berlin, paris = cells.root, cells.berlin, cells.paris
    account = str(read_key_file(root.network.folder / "account.key").account_id)

    # A wish that is in no cell at first: errors say what to do.
    missing = paris("cell", "read", "berlin", "value", f"{account}/color", status=5)
    assert "named no root cell" in missing.stderr
    assert root("cell", "list").stdout == ""

    # The root names two cells; a second owner of a name is refused.
    root("cell", "add", "berlin", manifest_of(berlin.network))
    listed = root.json("cell", "list")
    assert [(cell["name"], cell["network"], cell["owner"]) for cell in listed] == [("berlin", "berlin", account)]
    refused = root("cell", "add", "berlin", manifest_of(paris.network), status=6)
    assert "another network's" in refused.stderr

    # Paris says who its root is, and reads what berlin holds.
    assert "root" in paris("cell", "root", manifest_of(root.network)).stdout
    berlin("value", "put", "color", "blue")
    checkpoint(root)
    checkpoint(berlin)
    assert "ms old" in berlin("state", "checkpoint", status=6).stderr
    found = paris.json("cell", "read", "berlin", "value", f"{account}/color")
    assert found["value"]["text"] == "blue"
    assert found["network_id"] == berlin.network.manifest.network_id.hex()
    assert found["proof"]["signers"] == [str(berlin.network.nodes[0].key.node_id)]
    assert found["record_proof"]["signers"] == [str(root.network.nodes[0].key.node_id)]
    absent = paris("cell", "read", "berlin", "value", f"{account}/nothing", status=5)
    assert "proven for height" in absent.stderr
    time.sleep(1)
    old = paris("cell", "read", "berlin", "value", f"{account}/color", "--max-age", "1s", status=3)
    assert "age: a checkpoint" in old.stderr
    assert "--max-age" in old.stderr
    assert "proven for height" in paris("cell", "read", "@root", "cell", "rome", status=5).stderr

    # The account's key is changed in the root, and signs in paris after an import.
    refused = paris("account", "rotate", status=6)
    assert "keys are changed in the root cell" in refused.stderr
    for leftover in paris.network.folder.glob("account.key?*"):
        leftover.unlink()
    root("account", "rotate")
    (paris.network.folder / "account.key").write_bytes((root.network.folder / "account.key").read_bytes())
    for known in root.network.folder.glob("account.key.id*"):
        (paris.network.folder / known.name).write_bytes(known.read_bytes())
    assert "not in force" in paris("value", "put", "k", "v", status=4).stderr
    checkpoint(root)
    assert paris.json("account", "import")["key"] == root.json("account", "show")["key"]
    paris("value", "put", "k", "v")

    # Berlin's committee becomes another one, and its founder goes for good.
    late = observer_of(berlin, "late")
    wait_for(
        lambda: late.socket.exists() and late.client.get("/v1/status")["state"]["height"] > 0,
        what="the late node has joined",
    )
    berlin("voter", "replace", "berlin-a", f"late={late.key.node_id}@{listen_address(late)}")
    wait_for(lambda: int(late.client.get("/v1/status")["state"]["epoch"]) == 1, what="the handover")
    wait_for(lambda: (late.client.get("/v1/state")["checkpoint"] or {}).get("height", 0) > 0, what="its checkpoint")
    server = f"late={late.key.node_id}@{listen_address(late)}"
    root("cell", "add", "berlin", manifest_of(berlin.network), "--server", server)
    assert root.json("cell", "show", "berlin")["epoch"] == 1
    berlin.network.stop([berlin.network.nodes[0]])
    found = root.json("cell", "read", "berlin", "value", f"{account}/color")
    assert (found["value"]["text"], found["proof"]["epoch"]) == ("blue", 1)
    checkpoint(root)
    found = paris.json("cell", "read", "berlin", "value", f"{account}/color")
    assert found["proof"]["signers"] == [str(late.key.node_id)]


def listen_address(node: LocalNode) -> str:
    """Where it listens, as its log says."""
    text = (node.folder / "node.log").read_text()
    start = text.index("/ip4/127.0.0.1/tcp/")
    end = start
    while text[end].isalnum() or text[end] in "/.":
        end += 1
    return text[start:end]
