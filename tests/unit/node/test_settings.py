from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from formation.core.config import Value, default_values
from formation.core.errors import HostError, UsageError
from formation.core.ids import check_label
from formation.core.keys import KeyPair
from formation.core.units import GIB
from formation.node.settings import NodeSettings, node_settings, offered_capacity, split_host_port

ENV = {"HOME": "/home/ada"}


def settings(**changes: Any) -> NodeSettings:
    values = default_values(ENV, is_root=False) | {"node.name": "n1"}
    values |= {f"node.{key}": value for key, value in changes.items()}
    return node_settings({name: Value(value, "default") for name, value in values.items()})


def test_the_nodes_part_of_the_configuration_is_typed() -> None:
    """Paths are paths, lists are tuples, numbers are numbers."""
    found = settings(vcpus=3, listen=["/ip4/127.0.0.1/tcp/0"], api_tcp="127.0.0.1:4701")
    assert found.data_dir == Path("/home/ada/.local/share/formation")
    assert found.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert (found.vcpus, found.memory_mib, found.disk_gib) == (3, 0, 0)
    assert (found.name, found.api_tcp, found.log_level, found.hypervisor) == ("n1", "127.0.0.1:4701", "info", "auto")


def test_lists_of_peers() -> None:
    """Ids of nodes; none by default."""
    node_id = KeyPair(b"\x01" * 32).node_id
    assert settings().allow_peers == settings().deny_peers == frozenset()
    found = settings(allow_peers=[node_id], deny_peers=[node_id, node_id])
    assert found.allow_peers == found.deny_peers == frozenset((node_id,))


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A path is taken from where the node was started, and ~ is the home directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/bob")
    found = settings(data_dir="data", cache_dir="~/cache", api_socket="./x/../node.sock")
    assert found.data_dir == tmp_path / "data"
    assert found.cache_dir == Path("/home/bob/cache")
    assert found.api_socket == tmp_path / "node.sock"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "No Name"}, "^node.name: 'No Name'"),
        ({"allow_peers": ["n2"]}, "node.allow_peers: 'n2' is not a node id"),
        ({"deny_peers": ["12D3KooW", ""]}, "node.deny_peers: '12D3KooW' is not a node id"),
        ({"api_tcp": "4701"}, "node.api_tcp: '4701' is not HOST:PORT"),
        ({"api_socket": "/" + "a" * 108}, "socket path .* is longer"),
    ],
)
def test_what_no_node_can_run_with_is_refused(changes: dict[str, Any], message: str) -> None:
    """The error names the setting."""
    with pytest.raises(UsageError, match=message) as caught:
        settings(**changes)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("hostname", "name"),
    [
        ("Ada", "ada"),
        ("ada.example.org", "ada"),
        ("ada_2", "ada-2"),
        ("-ada-", "ada"),
        ("bücher", "b-cher"),
        ("..", "node"),
        ("٣", "node"),
        ("a" * 62 + "_b", "a" * 62),
    ],
)
def test_a_node_without_a_name_is_called_as_its_host(monkeypatch: pytest.MonkeyPatch, hostname: str, name: str) -> None:
    """Whatever the host is called, the node gets a valid name."""
    monkeypatch.setattr(socket, "gethostname", lambda: hostname)
    assert settings(name="").name == name
    check_label(name, what="name")


@pytest.mark.parametrize(
    ("text", "pair"),
    [("127.0.0.1:4701", ("127.0.0.1", 4701)), ("[::1]:0", ("::1", 0)), ("ada:65535", ("ada", 65535))],
)
def test_host_and_port(text: str, pair: tuple[str, int]) -> None:
    """An IPv6 address stands in brackets."""
    assert split_host_port(text) == pair


@pytest.mark.parametrize("text", ["", ":", ":1", "a:", "a", "a:b", "a:-1", "a:65536", "a:²", "a:" + "1" * 5000, "a:1 "])
def test_what_is_not_host_and_port_is_refused(text: str) -> None:
    """Anything else is a usage error, never another one."""
    with pytest.raises(UsageError, match="is not HOST:PORT"):
        split_host_port(text)


def test_the_offer_is_as_set(tmp_path: Path) -> None:
    """Numbers that were given are taken."""
    offered = offered_capacity(settings(data_dir=str(tmp_path), vcpus=3, memory_mib=777, disk_gib=5))
    assert (offered.vcpus, offered.memory_mib, offered.disk_gib) == (3, 777, 5)


def test_the_offer_follows_from_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the cores; memory less 1 GiB or a quarter; nine tenths of the free disk."""
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 8 * GIB // 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100 * GIB}))
    offered = offered_capacity(settings(data_dir=str(tmp_path)))
    assert (offered.vcpus, offered.memory_mib, offered.disk_gib) == (6, 7 * 1024, 90)
    pages["SC_PHYS_PAGES"] = 2 * GIB // 4096
    monkeypatch.setattr("os.cpu_count", lambda: None)
    offered = offered_capacity(settings(data_dir=str(tmp_path)))
    assert (offered.vcpus, offered.memory_mib) == (2, 1536)


def test_a_missing_data_directory_cannot_be_measured(tmp_path: Path) -> None:
    """The hint names it."""
    with pytest.raises(HostError, match="cannot measure this host") as caught:
        offered_capacity(settings(data_dir=str(tmp_path / "none")))
    assert str(tmp_path / "none") in caught.value.hint


def test_a_private_network() -> None:
    """Nobody is kept out and Noise is used unless somebody says so."""
    assert (settings().network_key, settings().security) == (None, "noise")
    found = settings(network_key="/k/network.key", security="both")
    assert (found.network_key, found.security) == (Path("/k/network.key"), "both")


def test_roles_mdns_and_kademlia() -> None:
    """None, off and auto by default; a role is a label, and there are few."""
    assert (settings().roles, settings().mdns, settings().kademlia) == ((), False, "auto")
    found = settings(roles=["gpu", "ingress", "gpu"], mdns="on", kademlia="client")
    assert (found.roles, found.mdns, found.kademlia) == (("gpu", "ingress"), True, "client")
    for roles in (["No Role"], [f"r{n}" for n in range(17)]):
        with pytest.raises(UsageError, match=r"node\.roles"):
            settings(roles=roles)
