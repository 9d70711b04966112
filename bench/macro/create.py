"""From command to ready, split by step, beside the same guest started by hand with the same QEMU arguments.

Rounds are interleaved: one VM by `formation vm create`, then its very arguments, kernel and initrd once more by hand,
from exec to the guest's own word `ready`. The ratio says what Formation adds to the hypervisor and the guest.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.report import header, row
from formation.cli.local_network import LocalNetwork, local_network
from formation.core.ids import Digest
from formation.core.manifest import read_draft
from formation.pack.blobs import BlobStore
from formation.pack.guest import VmGuestConfig, vm_config_cpio
from formation.pack.manifest import parse_manifest

ROUNDS = 5
ROOT = Path(__file__).parents[2]
READY_TIMEOUT_S = 120.0
DISK_GIB = 1
# Consecutive events of one create, as `formation events` shows them.
STEPS = ("vm.requested", "vm.claimed", "vm.scheduled", "image.ready", "net.leased", "vm.created", "vm.booted", "vm.ready")


def main(*, small: bool) -> None:
    """Print the figures."""
    whole: list[float] = []
    by_hand: list[float] = []
    steps: dict[str, list[float]] = {step: [] for step in STEPS[1:]}
    with local_network(read_draft(ROOT / "peers" / "demo.toml")) as network, tempfile.TemporaryDirectory() as folder:
        _formation(network, "image", "build", str(ROOT / "examples" / "hello"))
        for number in range(1 if small else ROUNDS):
            name = f"bench{number}"
            started = time.monotonic()
            _formation(network, "vm", "create", "hello", name)
            whole.append(time.monotonic() - started)
            vm = network.nodes[0].client.get(f"/v1/vms/{name}")
            for step, took_s in _split(network, vm["trace_id"]).items():
                steps[step].append(took_s)
            command, kept = _copy_of(vm, Path(folder) / name)
            _formation(network, "vm", "delete", name, "--yes")
            by_hand.append(_time_by_hand(command, kept))
    print(header("From command to ready"))
    print(row("formation vm create, the whole command", whole, "s"))
    for step, values in steps.items():
        if values:
            print(row(f"  … until {step}", values, "s"))
    print(row("the same guest by hand, exec to ready", by_hand, "s"))
    print(row("ratio", [a / b for a, b in zip(whole, by_hand, strict=True)], ""))


def _formation(network: LocalNetwork, *arguments: str) -> None:
    command = [sys.executable, "-m", "formation", *arguments]
    subprocess.run(command, env=network.env, check=True, capture_output=True, timeout=READY_TIMEOUT_S * 2)


def _split(network: LocalNetwork, trace_id: str) -> dict[str, float]:
    """Seconds from each step to the next, by the timestamps of the blocks that tell of them."""
    at_ms: dict[str, int] = {}
    for event in network.nodes[0].client.events({"since": "0", "trace": trace_id, "follow": "0"}):
        if event is not None and event.data.get("level") == "certified":
            at_ms.setdefault(event.kind, event.data["at_ms"])
    seen = [step for step in STEPS if step in at_ms]
    return {later: (at_ms[later] - at_ms[earlier]) / 1000 for earlier, later in pairwise(seen)}


def _copy_of(vm: dict[str, Any], folder: Path) -> tuple[list[str], Path]:
    """The running guest's own command line, and a folder with the initrd that it was given."""
    vm_id = vm["vm_id"]
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")[:-1] if entry.name.isdigit() else []
        except OSError:
            continue
        if arguments and b"qemu-system" in arguments[0] and vm_id.encode() in arguments:
            command = [argument.decode() for argument in arguments]
            store = BlobStore(Path(command[command.index("-kernel") + 1]).parents[2])
            manifest = parse_manifest(store.path_of(Digest(vm["spec"]["image"])).read_bytes())
            parts = [store.path_of(Digest(blob.digest)).read_bytes() for blob in manifest.initrds]
            folder.mkdir()
            config = vm_config_cpio(VmGuestConfig(vm_id=vm_id, hostname=vm["spec"]["name"], env={}))
            (folder / "initrd.cpio").write_bytes(b"".join(parts) + config)
            return command, folder
    raise RuntimeError(f"no hypervisor process of {vm_id}")


def _time_by_hand(command: list[str], folder: Path) -> float:
    disk = folder / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(DISK_GIB << 30)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", str(disk)], check=True)
    arguments = [_with_free_port(argument) for argument in command if argument != "-S"]
    started = time.monotonic()
    process = subprocess.Popen(arguments, cwd=folder, stdin=subprocess.DEVNULL)
    try:
        _await_ready(folder / "agent.sock")
        return time.monotonic() - started
    finally:
        process.kill()
        process.wait()


def _with_free_port(argument: str) -> str:
    """Port forwards with ports of our own: the VM's were freed when it was deleted, and may be taken again."""
    if "hostfwd=" not in argument:
        return argument
    parts = []
    for part in argument.split(","):
        if part.startswith("hostfwd="):
            left, right = part.split("-", 1)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                part = f"{left.rpartition(':')[0]}:{probe.getsockname()[1]}-{right}"
        parts.append(part)
    return ",".join(parts)


def _await_ready(path: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with socket.socket(socket.AF_UNIX) as agent:
        while True:
            try:
                agent.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        heard: Any = b""
        agent.settimeout(READY_TIMEOUT_S)
        while b"ready" not in heard:
            chunk = agent.recv(4096)
            if not chunk:
                raise RuntimeError(f"the guest ended before it was ready: {heard!r}")
            heard += chunk
