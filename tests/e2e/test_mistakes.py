"""Mistakes that people make, typed against a real node: one clear error each, with place, hint and exit status."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from formation.cli.local_network import local_network
from formation.core.manifest import Draft
from tests.e2e.conftest import ROOT, Commands

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]

GOOD = "NAME hello\nFROM busybox\nEXPOSE 80\n"
# Formfile -> (what the error names, exit status); each also gets a hint.
FORMFILES = {
    "no name": ("FROM busybox\n", "NAME"),
    "no base": ("NAME a\n", "FROM"),
    "unknown directive": ("NAME a\nFORM busybox\n", "Formfile:2:1"),
    "two names": ("NAME a\nNAME b\nFROM busybox\n", "Formfile:2"),
    "bad name": ("NAME Not_A_Label\nFROM busybox\n", "Formfile:1:6"),
    "cpus out of range": ("NAME a\nFROM busybox\nVCPU 0\n", "Formfile:3:6"),
    "memory is no number": ("NAME a\nFROM busybox\nMEMORY lots\n", "Formfile:3:8"),
    "memory too small": ("NAME a\nFROM busybox\nMEMORY 1\n", "Formfile:3:8"),
    "bad port": ("NAME a\nFROM busybox\nEXPOSE 99999\n", "Formfile:3:8"),
    "bad transport": ("NAME a\nFROM busybox\nEXPOSE 80/icmp\n", "Formfile:3"),
    "relative workdir": ("NAME a\nFROM busybox\nWORKDIR srv\n", "Formfile:3:9"),
    "copy of nothing": ("NAME a\nFROM busybox\nCOPY nothing /srv\n", "nothing"),
    "copy from outside": ("NAME a\nFROM busybox\nCOPY ../../etc/passwd /srv\n", "Formfile:3"),
    "open quote": ('NAME a\nFROM busybox\nENTRYPOINT ["httpd\n', "Formfile:3"),
    "bad user": ("NAME a\nFROM busybox\nUSER username:Root!\n", "Formfile:3"),
    "bad env": ("NAME a\nFROM busybox\nENV =x\n", "Formfile:3"),
    "not yet: RUN": ("NAME a\nFROM busybox\nRUN true\n", "Formfile:3"),
    "not yet: another base": ("NAME a\nFROM debian:bookworm\n", "Formfile:2"),
    "not text": ("NAME a\xff\n", "Formfile"),
    "empty": ("", "Formfile"),
}
FLAGS: dict[str, tuple[list[str], int, str]] = {
    "no such command": (["vm", "crate", "hello"], 2, "crate"),
    "no such option": (["vm", "list", "--al"], 2, "--al"),
    "memory without unit": (["vm", "create", "hello", "x", "--memory", "512"], 2, "512"),
    "no such image": (["vm", "create", "nothing", "x"], 5, "nothing"),
    "bad vm name": (["vm", "create", "hello", "No_Good"], 2, "No_Good"),
    "bad port map": (["vm", "create", "hello", "x", "--publish", "80:80:80:80"], 2, "80:80"),
    "one guest port twice": (["vm", "create", "hello", "x", "-p", "8080:80", "-p", "8081:80"], 2, "guest port twice"),
    "too little memory": (["vm", "create", "hello", "x", "--memory", "1MiB"], 2, "memory"),
    "bad env": (["vm", "create", "hello", "x", "--env", "=x"], 2, "env"),
    "bad timeout": (["vm", "create", "hello", "x", "--timeout", "soon"], 2, "soon"),
    "no such vm": (["vm", "show", "nothing"], 5, "nothing"),
    "delete no such vm": (["vm", "delete", "nothing", "--yes"], 5, "nothing"),
    "no node there": (["ps", "--host", "/nowhere/node.sock"], 3, "/nowhere/node.sock"),
    "host is nonsense": (["ps", "--host", "ftp://x"], 2, "ftp://x"),
    "no such context directory": (["image", "build", "/nowhere"], 2, "/nowhere"),
    "no such config": (["ps", "--config", "/nowhere.toml"], 2, "/nowhere.toml"),
}
NODE: dict[str, tuple[str, int, str]] = {
    "not TOML": ("name = \n", 2, "not TOML"),
    "other format": ("format = 7\n", 2, "format"),
    "no voters": ('format = 1\nname = "a"\nfounded_ms = 1\n', 2, "[[voter]]"),
    "a draft": ((ROOT / "peers" / "demo.toml").read_text(), 2, "draft"),
    "unknown key": ("format = 1\nvotes = 4\n", 2, "votes"),
}


@pytest.fixture(scope="module")
def one() -> Iterator[Commands]:
    """A network of one node, with the hello image where the machine can build it."""
    draft = Draft("one", (("n1", ("/ip4/127.0.0.1/tcp/0",)),))
    with local_network(draft, node_settings=('hypervisor = "none"',)) as network:
        commands = Commands(network)
        commands("image", "build", str(ROOT / "examples" / "hello"))
        yield commands


def check_told(stderr: str, status: int, *, wanted_status: int, names: str) -> None:
    assert status == wanted_status, stderr
    lines = stderr.splitlines()
    assert sum(line.startswith("Error:") for line in lines) == 1, stderr
    assert any(line.startswith("Hint:") for line in lines), stderr
    assert names in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("name", FORMFILES)
def test_a_broken_formfile_is_told_with_its_place(one: Commands, name: str, tmp_path: Path) -> None:
    """One error, its place, a hint, exit status 2; and no image."""
    text, names = FORMFILES[name]
    (tmp_path / "Formfile").write_bytes(text.encode("latin-1"))
    before = one.json("image", "list")
    result = one("image", "build", str(tmp_path), status=None)
    check_told(result.stderr, result.returncode, wanted_status=2, names=names)
    assert one.json("image", "list") == before


@pytest.mark.parametrize("name", FLAGS)
def test_a_wrong_command_line_is_told(one: Commands, name: str) -> None:
    """One error that names what is wrong, a hint, and the exit status of its kind."""
    arguments, status, names = FLAGS[name]
    result = one(*arguments, status=None)
    check_told(result.stderr, result.returncode, wanted_status=status, names=names)


@pytest.mark.parametrize("name", NODE)
def test_a_broken_manifest_is_told(one: Commands, name: str, tmp_path: Path) -> None:
    """A node that cannot start says why, in one error."""
    text, status, names = NODE[name]
    manifest = tmp_path / "network.toml"
    manifest.write_text(text)
    (tmp_path / "config.toml").write_text(f'[node]\nmanifest = "{manifest}"\ndata_dir = "{tmp_path / "data"}"\n')
    result = one("node", "--config", str(tmp_path / "config.toml"), status=None)
    check_told(result.stderr, result.returncode, wanted_status=status, names=names)
    assert os.fspath(manifest) in result.stderr


def test_a_second_node_in_one_directory_is_refused(one: Commands) -> None:
    """Two processes never share a node's directory."""
    node = one.network.nodes[0]
    result = one("node", "--config", str(node.folder / "config.toml"), status=None)
    check_told(result.stderr, result.returncode, wanted_status=6, names=str(node.folder))


def test_a_key_that_others_can_read_is_refused(one: Commands, tmp_path: Path) -> None:
    """A node does not start with a key that is no secret."""
    data = tmp_path / "data"
    data.mkdir()
    key = data / "node.key"
    key.write_bytes((one.network.nodes[0].folder / "node.key").read_bytes())
    key.chmod(0o644)
    (tmp_path / "config.toml").write_text(
        f'[node]\nmanifest = "{one.network.folder / "network.toml"}"\ndata_dir = "{data}"\nlisten = ["/ip4/127.0.0.1/tcp/0"]\n'
    )
    result = one("node", "--config", str(tmp_path / "config.toml"), status=None)
    check_told(result.stderr, result.returncode, wanted_status=2, names="node.key")
    assert "chmod 600" in result.stderr
