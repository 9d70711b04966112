from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from formation.core.errors import HostError
from formation.vmm.choose import PROBE_DEADLINE_S, PROGRAM, choose_hypervisor, probe_accelerator
from formation.vmm.devices import accelerator_arguments
from formation.vmm.pvh import PROBE_TEXT, probe_payload

needs_qemu = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="QEMU is not installed: apt install qemu-system-x86")


async def test_node_without_qemu_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without QEMU there is a hypervisor that runs nothing and names the package; asked for by name it is an error."""
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = await choose_hypervisor("auto", accelerator="auto", data_dir=tmp_path)
    assert missing.capabilities.name == ""
    assert "qemu-system-x86" in missing.capabilities.hint
    with pytest.raises(HostError, match="not installed"):
        await choose_hypervisor("qemu", accelerator="auto", data_dir=tmp_path)


async def test_none_is_obeyed(tmp_path: Path) -> None:
    """A node may be told to run no VMs."""
    assert (await choose_hypervisor("none", accelerator="auto", data_dir=tmp_path)).capabilities.name == ""


async def test_program_that_is_no_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken program is the same as none."""
    program = tmp_path / PROGRAM
    program.write_text("#!/bin/sh\necho hello\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin")
    found = await choose_hypervisor("auto", accelerator="tcg", data_dir=tmp_path / "data")
    assert found.capabilities.name == ""
    assert "version" in found.capabilities.why


@pytest.mark.vm
@pytest.mark.slow
@needs_qemu
async def test_accelerator_is_probed_once_and_is_true(tmp_path: Path) -> None:
    """Whatever the probe says comes quickly, with its reason; the second node start does not probe again."""
    first = await choose_hypervisor("auto", accelerator="auto", data_dir=tmp_path)
    assert first.capabilities.name in ("qemu/kvm", "qemu/tcg")
    assert first.capabilities.why
    started = time.monotonic()
    again = await choose_hypervisor("auto", accelerator="auto", data_dir=tmp_path)
    assert time.monotonic() - started < 1
    assert again.capabilities == first.capabilities
    if first.capabilities.accelerator != "kvm":
        with pytest.raises(HostError):
            await choose_hypervisor("qemu", accelerator="kvm", data_dir=tmp_path)


@pytest.mark.vm
@pytest.mark.slow
@needs_qemu
async def test_program_that_does_not_run_guests_is_no_kvm(tmp_path: Path) -> None:
    """A hypervisor that ends at once without the guest's text gives TCG and its own words."""
    program = tmp_path / "fake"
    program.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    program.chmod(0o755)
    accelerator, why = await probe_accelerator(program)
    assert accelerator == "tcg"
    assert why


@pytest.mark.vm
@needs_qemu
def test_probe_payload_is_a_guest(tmp_path: Path) -> None:
    """The probe's guest prints its text and ends, in time even without hardware help."""
    kernel = tmp_path / "probe.elf"
    kernel.write_bytes(probe_payload())
    argv = [PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", *accelerator_arguments("tcg")]
    argv += ["-m", "64", "-kernel", str(kernel), "-no-reboot", "-chardev", "stdio,id=s0,signal=off", "-serial", "chardev:s0"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10 * PROBE_DEADLINE_S, check=True)
    assert done.stdout == PROBE_TEXT
