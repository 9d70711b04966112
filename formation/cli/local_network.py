"""A whole network on this machine: real node processes on loopback under one fresh manifest, in one directory.

`formation demo` and the end-to-end tests stand on it. All that it makes lies below one directory or is a process whose
command line names that directory; so `close` can leave nothing behind, whatever was killed before.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from formation.cli.client import Client
from formation.core.errors import HostError, UnavailableError
from formation.core.keys import KeyPair, write_key_file
from formation.core.manifest import Draft, Manifest, found_network

# A node imports libp2p in a second or two; on a busy machine with two cores, four do so at once.
START_TIMEOUT_S = 60.0
# A node's own drain deadline is 8 s; after that it is killed.
STOP_TIMEOUT_S = 12.0
_POLL_S = 0.1
_LOG_TAIL_LINES = 12


@dataclass(slots=True)
class LocalNode:
    """One node of the network: its directory, and its process while it runs."""

    name: str
    folder: Path
    key: KeyPair
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """The API's unix socket."""
        return self.folder / "node.sock"

    @property
    def client(self) -> Client:
        """The node's API."""
        return Client(str(self.socket))

    @property
    def is_running(self) -> bool:
        """Whether its process is alive."""
        return self.process is not None and self.process.poll() is None

    def log_tail(self) -> str:
        """The last lines of its log."""
        try:
            lines = (self.folder / "node.log").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def last_words(self) -> str:
        """Why it ended, as it told people; else its last line."""
        lines = self.log_tail().splitlines()
        errors = [line for line in lines if line.startswith("Error: ")]
        return (errors or lines or ["without a word"])[-1].removeprefix("Error: ")


@dataclass(slots=True)
class LocalNetwork:
    """The nodes, their manifest, and an account to use them with."""

    folder: Path
    manifest: Manifest
    nodes: list[LocalNode]
    env: dict[str, str] = field(default_factory=dict)
    """Environment in which `formation` talks to the first node with the network's account."""

    @classmethod
    def found(cls, draft: Draft, *, folder: Path | None = None, node_settings: Sequence[str] = ()) -> LocalNetwork:
        """Make keys, manifest and configuration of a new network; no process runs yet.

        Args:
          draft: names and addresses; port 0 means any free port.
          folder: an empty directory; None makes a temporary one.
          node_settings: further lines for each node's `[node]` section.
        """
        # Resolved: `end_processes_of` looks for this very text in command lines.
        folder = (folder or Path(tempfile.mkdtemp(prefix="formation-"))).resolve()
        nodes = [LocalNode(name, folder / name, KeyPair.generate()) for name, _ in draft.voters]
        with ExitStack() as stack:
            addresses = [tuple(_with_free_port(a, stack) for a in addresses) for _, addresses in draft.voters]
        voters = [(node.name, node.key, listen) for node, listen in zip(nodes, addresses, strict=True)]
        manifest = found_network(draft.name, voters=voters, founded_ms=time.time_ns() // 1_000_000)
        (folder / "network.toml").write_text(manifest.to_toml())
        write_key_file(folder / "account.key", KeyPair.generate())
        for node, listen in zip(nodes, addresses, strict=True):
            node.folder.mkdir(mode=0o700)
            write_key_file(node.folder / "node.key", node.key)
            # The first builds from this user's cache; the others have none, so they really pull what they boot.
            cache = () if node is nodes[0] else (f'cache_dir = "{node.folder / "cache"}"',)
            (node.folder / "config.toml").write_text(_node_config(folder, node, listen, (*cache, *node_settings)))
        config = f'[client]\nhost = "{nodes[0].socket}"\naccount_key = "{folder / "account.key"}"\n'
        (folder / "config.toml").write_text(config)
        env = {**os.environ, "FORMATION_CONFIG": str(folder / "config.toml")}
        for name in ("FORMATION_HOST", "FORMATION_DATA", "FORMATION_NETWORK", "FORMATION_ACCOUNT_KEY", "FORMATION_TOKEN_FILE"):
            env.pop(name, None)
        return cls(folder, manifest, nodes, env)

    def start(self, node: LocalNode) -> None:
        """Start the process of a node that does not run, in a session of its own: Ctrl-C is for the one who started us."""
        assert not node.is_running
        with (node.folder / "node.log").open("ab") as log:
            node.process = subprocess.Popen(
                [sys.executable, "-m", "formation", "node", "--config", str(node.folder / "config.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                start_new_session=True,
            )

    def wait_until_meshed(self, nodes: Sequence[LocalNode] | None = None, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until these nodes (default: all) answer, are connected to each other, and have a quorum.

        Raises:
          HostError: one ended, with its last words; or the time is over.
        """
        wanted = list(nodes or self.nodes)
        deadline = time.monotonic() + timeout_s
        for node in wanted:
            others = {other.key.node_id for other in wanted if other is not node}
            while not self._sees(node, others):
                for ended in (other for other in wanted if not other.is_running):
                    raise HostError(
                        f"node {ended.name} ended: {ended.last_words()}", hint=f"its log: {ended.folder / 'node.log'}"
                    )
                if time.monotonic() > deadline:
                    raise HostError(
                        f"node {node.name} did not find the others in {timeout_s:.0f} s", hint="is the machine overloaded?"
                    )
                time.sleep(_POLL_S)

    @staticmethod
    def _sees(node: LocalNode, others: set[Any]) -> bool:
        try:
            status = node.client.get("/v1/status")
        except UnavailableError:
            return False
        linked = {peer["node_id"] for peer in status["peers"] if peer["connected"] and peer["linked"]}
        return others <= linked and bool(status["state"]["has_quorum"])

    def kill(self, node: LocalNode) -> None:
        """SIGKILL a node: no drain, no goodbye."""
        assert node.process is not None
        node.process.kill()
        node.process.wait()

    def stop(self, nodes: Sequence[LocalNode] | None = None) -> None:
        """SIGTERM these nodes (default: all) and wait; what overstays its drain is killed."""
        running = [node for node in nodes or self.nodes if node.is_running]
        for node in running:
            assert node.process is not None
            node.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for node in running:
            assert node.process is not None
            try:
                node.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill(node)

    def close(self) -> None:
        """Leave nothing: no node, no guest, no file."""
        self.stop()
        end_processes_of(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def local_network(draft: Draft, *, node_settings: Sequence[str] = ()) -> Iterator[LocalNetwork]:
    """A running network for the length of a `with` block."""
    network = LocalNetwork.found(draft, node_settings=node_settings)
    try:
        for node in network.nodes:
            network.start(node)
        network.wait_until_meshed()
        yield network
    finally:
        network.close()


def end_processes_of(folder: Path) -> int:
    """SIGKILL every node and guest of ours that runs below this directory; how many there were.

    Guests outlive their node by design, so the end of all nodes is not the end of all guests.
    """
    found = _processes_of(folder)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            # It ended by itself, or belongs to somebody else.
            continue
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _processes_of(folder) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return len(found)


def _processes_of(folder: Path) -> list[int]:
    """Nodes and hypervisors whose command line names something below this directory.

    Their kind is checked too: an editor or a shell that merely names the directory is none of ours.
    """
    needle = os.fsencode(folder) + b"/"
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        is_ours = b"\0formation\0node\0" in arguments or b"qemu-system" in arguments.partition(b"\0")[0]
        if is_ours and needle in arguments:
            found.append(int(entry.name))
    return found


def _node_config(folder: Path, node: LocalNode, listen: Sequence[str], further: Sequence[str]) -> str:
    addresses = ", ".join(f'"{address}"' for address in listen)
    lines = [
        "[node]",
        f'name = "{node.name}"',
        f'data_dir = "{node.folder}"',
        f'manifest = "{folder / "network.toml"}"',
        f'api_socket = "{node.socket}"',
        f"listen = [{addresses}]",
        *further,
    ]
    return "\n".join(lines) + "\n"


def _with_free_port(address: str, stack: ExitStack) -> str:
    """The multiaddr with `/tcp/0` replaced by a port that is free now (held until the stack closes, so none comes twice)."""
    if not address.endswith("/tcp/0"):
        return address
    probe = stack.enter_context(socket.socket())
    probe.bind((address.split("/")[2], 0))
    return f"{address.removesuffix('0')}{probe.getsockname()[1]}"
