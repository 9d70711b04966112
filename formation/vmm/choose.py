"""What this machine's hypervisor really can: the program, its version, and whether KVM is of any use.

`/dev/kvm` may exist and be useless: on a paravirtual host it emulates each instruction, and a kernel boots for minutes or
never. So KVM is chosen only when a tiny guest ends in time on it. The result is kept until the machine or QEMU changes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import msgspec
import structlog
import trio

from formation.core.clock import SystemClock
from formation.core.errors import HostError
from formation.vmm.devices import accelerator_arguments, confinement_arguments
from formation.vmm.files import write_durably
from formation.vmm.hypervisor import Capabilities, Hypervisor, MissingHypervisor
from formation.vmm.process import boot_id
from formation.vmm.pvh import PROBE_TEXT, probe_payload
from formation.vmm.qemu import QemuHypervisor

log = structlog.get_logger(__name__)

PROGRAM = "qemu-system-x86_64"
INSTALL_HINT = "apt install qemu-system-x86"
# QEMU starts in 0.2-0.5 s, the payload takes 2 ms on a processor and 7 s when emulated by KVM.
PROBE_DEADLINE_S = 2.5
VERSION_DEADLINE_S = 10.0
READY_DEADLINE_S = {"kvm": 60.0, "tcg": 120.0}
"""How long a guest may take: a Linux boots in 1 s under KVM and in 5 to 20 s under TCG, more on a busy machine."""

_CACHE_FILE = "accelerator.json"


class _Cached(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    boot_id: str
    version: str
    accelerator: str
    why: str


async def choose_hypervisor(kind: str, *, accelerator: str, data_dir: Path) -> Hypervisor:
    """This node's hypervisor; one that runs nothing and says why, where the machine has none.

    Args:
      kind: `auto`, `qemu` or `none`.
      accelerator: `auto`, `kvm` or `tcg`: which one to use; KVM is used only where it works.
      data_dir: the node's data; VMs live in `vms` below it.

    Raises:
      HostError: QEMU or KVM is asked for by name, and this machine has it not.
    """
    if kind == "none":
        return MissingHypervisor("its settings say so", hint="formation node --hypervisor auto")
    folder = data_dir / "vms"
    try:
        path = await trio.to_thread.run_sync(_find_program, folder)
        version = await trio.to_thread.run_sync(_version, path)
        chosen, why = await _accelerator(accelerator, path, version, folder / _CACHE_FILE)
    except HostError as exc:
        if kind == "qemu":
            raise
        return MissingHypervisor(exc.message, hint=exc.hint)
    log.info("hypervisor.found", version=version, accelerator=chosen, why=why)
    capabilities = Capabilities(
        name=f"qemu/{chosen}",
        version=version,
        accelerator=chosen,
        why=why,
        has_agent=True,
        has_console=True,
        ready_deadline_s=READY_DEADLINE_S[chosen],
    )
    return QemuHypervisor(root=folder, qemu_path=path, capabilities=capabilities, clock=SystemClock())


async def probe_accelerator(qemu_path: Path) -> tuple[str, str]:
    """(`kvm` or `tcg`, why): KVM if a guest really runs on it."""
    return await trio.to_thread.run_sync(_probe_kvm, qemu_path)


async def _accelerator(wanted: str, qemu_path: Path, version: str, cache_path: Path) -> tuple[str, str]:
    if wanted == "tcg":
        return "tcg", "its settings say so"
    this_boot = boot_id()
    cached = await trio.to_thread.run_sync(_read_cache, cache_path)
    if cached is not None and (cached.boot_id, cached.version) == (this_boot, version):
        found, why = cached.accelerator, cached.why
    else:
        found, why = await probe_accelerator(qemu_path)
        result = _Cached(boot_id=this_boot, version=version, accelerator=found, why=why)
        await trio.to_thread.run_sync(write_durably, cache_path, msgspec.json.encode(result))
    if wanted == "kvm" and found != "kvm":
        raise HostError(why, hint="formation node --accelerator auto")
    return found, why


def _find_program(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = shutil.which(PROGRAM)
    if found is None:
        raise HostError("QEMU is not installed", hint=INSTALL_HINT)
    if shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        raise HostError("mke2fs is not installed", hint="apt install e2fsprogs")
    return Path(found)


def _read_cache(path: Path) -> _Cached | None:
    try:
        cached = msgspec.json.decode(path.read_bytes(), type=_Cached)
    except (OSError, msgspec.MsgspecError):
        return None  # Never probed, or damaged: probe again.
    return cached if cached.accelerator in READY_DEADLINE_S else None


def _version(qemu_path: Path) -> str:
    try:
        done = subprocess.run(
            [qemu_path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=VERSION_DEADLINE_S, check=False
        )
    except OSError as exc:
        raise HostError(f"{qemu_path.name} cannot be started: {exc.strerror}", hint=INSTALL_HINT) from exc
    except subprocess.TimeoutExpired as exc:
        raise HostError(f"{qemu_path.name} --version does not end", hint=INSTALL_HINT) from exc
    match = re.search(rb"version (\d+\.\d+(?:\.\d+)?)", done.stdout)
    if match is None:
        raise HostError(f"{qemu_path.name} does not say its version", hint=INSTALL_HINT)
    return match[1].decode()


def _probe_kvm(qemu_path: Path) -> tuple[str, str]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg", "this user may not open /dev/kvm" if Path("/dev/kvm").exists() else "this machine has no /dev/kvm"
    with tempfile.TemporaryDirectory(prefix="formation-probe-") as folder:
        kernel = Path(folder) / "probe.elf"
        kernel.write_bytes(probe_payload())
        argv = [
            *(str(qemu_path), "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35"),
            *accelerator_arguments("kvm"),
            *("-m", "64", "-kernel", str(kernel), "-no-reboot"),
            *("-chardev", "stdio,id=serial0,signal=off", "-serial", "chardev:serial0"),
            *confinement_arguments(),
        ]
        with subprocess.Popen(
            argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        ) as child:
            try:
                output, errors = child.communicate(timeout=PROBE_DEADLINE_S)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                child.communicate()
                return "tcg", f"KVM did not run a tiny guest within {PROBE_DEADLINE_S} s"
    if PROBE_TEXT in output:
        return "kvm", "a tiny guest ran on KVM"
    said = errors.decode(errors="replace").strip().splitlines()
    return "tcg", f"KVM did not run a tiny guest: {said[-1][:120] if said else 'it said nothing'}"
