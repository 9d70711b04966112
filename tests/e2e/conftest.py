"""A real network for the end-to-end tests: node processes on loopback, guests in QEMU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from formation.cli.local_network import LocalNetwork, LocalNode, local_network
from formation.core.manifest import read_draft

ROOT = Path(__file__).parents[2]
# A create under emulation takes 5 s on an idle machine; CI shares its two cores with others.
CREATE_TIMEOUT_S = 180


def missing_tools() -> list[str]:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [tool for tool in ("qemu-system-x86_64", "mke2fs", "dpkg-deb", "apt-get") if shutil.which(tool, path=path) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a hypervisor these tests skip by name; in CI they must not."""
    missing = missing_tools()
    if not missing or os.environ.get("CI"):
        return
    for item in items:
        if item.get_closest_marker("vm"):
            item.add_marker(
                pytest.mark.skip(reason=f"this machine lacks {', '.join(missing)}: ./bootstrap setup says how to get it")
            )


class Commands:
    """`formation …` against one network, as a person types it."""

    def __init__(self, network: LocalNetwork) -> None:
        self.network = network

    def start(self, *arguments: str, node: LocalNode | None = None) -> subprocess.Popen[str]:
        env = dict(self.network.env)
        if node is not None:
            env["FORMATION_HOST"] = str(node.socket)
        command = [sys.executable, "-m", "formation", *arguments]
        return subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __call__(
        self, *arguments: str, node: LocalNode | None = None, status: int | None = 0, timeout_s: float = CREATE_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, node=node)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"formation {arguments} did not end in {timeout_s} s\n{out}\n{err}\n{self.logs()}") from None
        result = subprocess.CompletedProcess(arguments, process.returncode, out, err)
        if status is not None:
            assert result.returncode == status, f"{arguments}\n{out}\n{err}\n{self.logs()}"
        assert "Traceback" not in err, err
        return result

    def json(self, *arguments: str, node: LocalNode | None = None) -> Any:
        return json.loads(self(*arguments, "-o", "json", node=node).stdout)

    def logs(self) -> str:
        return "\n".join(f"--- {node.name}\n{node.log_tail()}" for node in self.network.nodes)


def wait_for(condition: Callable[[], bool], *, what: str, timeout_s: float = 60.0) -> None:
    """Poll a condition of other processes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {timeout_s} s: {what}")
        time.sleep(0.2)


def hypervisors_of(vm_id: str) -> set[int]:
    """Processes that run a VM, of whichever node: by their arguments."""
    found = set()
    for entry in os.scandir("/proc"):
        try:
            arguments = Path(f"/proc/{entry.name}/cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if arguments and arguments[0].rpartition(b"/")[2].startswith(b"qemu") and vm_id.encode() in arguments:
            found.add(int(entry.name))
    return found


@pytest.fixture
def formation() -> Iterator[Commands]:
    """A network of four with the hello image built at the first node."""
    with local_network(read_draft(ROOT / "peers" / "demo.toml")) as network:
        commands = Commands(network)
        commands("image", "build", str(ROOT / "examples" / "hello"))
        yield commands
