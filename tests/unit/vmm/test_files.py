from __future__ import annotations

import stat
from pathlib import Path

import pytest

from formation.core.errors import HostError
from formation.vmm.devices import DISK_FILE, INITRD_FILE
from formation.vmm.files import VmFolder, VmState, vm_ids_in
from formation.vmm.ledger import Held, Ledger
from formation.vmm.process import ProcessIdentity

VM = "vm-abcdefghabcdefgh"
STATE = VmState(process=ProcessIdentity(boot_id="b", pid=1, start_time=2), generation=3, started_ms=4)


@pytest.fixture
def folder(tmp_path: Path) -> VmFolder:
    made = VmFolder(tmp_path / "vms", VM)
    made.make()
    return made


def fake_mke2fs(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "mke2fs"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_folder_is_ours_alone(folder: VmFolder, tmp_path: Path) -> None:
    """A VM's folder may be read by its node only, and is found by its id; other folders are none of ours."""
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    (tmp_path / "vms" / "lost+found").mkdir()
    assert vm_ids_in(tmp_path / "vms") == (VM,)
    assert vm_ids_in(tmp_path / "nowhere") == ()
    folder.drop()
    folder.drop()
    assert vm_ids_in(tmp_path / "vms") == ()


def test_disk_is_made_once_and_sparse(folder: VmFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first boot makes the disk, the next ones keep it; it takes no room for what is not written."""
    fake_mke2fs(tmp_path, monkeypatch, "exit 0")
    assert folder.make_disk(3)
    assert not folder.make_disk(3)
    disk = (folder.path / DISK_FILE).stat()
    assert disk.st_size == 3 << 30
    assert disk.st_blocks == 0


def test_disk_that_cannot_be_made_leaves_nothing(folder: VmFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing mke2fs is an error with its words, and no half-made disk stays."""
    fake_mke2fs(tmp_path, monkeypatch, "echo no room >&2; exit 1")
    with pytest.raises(HostError, match="no room"):
        folder.make_disk(1)
    assert list(folder.path.iterdir()) == []


def test_initrd_is_padded_and_private(folder: VmFolder, tmp_path: Path) -> None:
    """Archives are concatenated at multiples of 4 bytes, the VM's own last; others may not read it."""
    part = tmp_path / "part"
    part.write_bytes(b"12345")
    folder.write_initrd([part, part], b"own")
    initrd = folder.path / INITRD_FILE
    assert initrd.read_bytes() == b"12345\0\0\0" * 2 + b"own"
    assert stat.S_IMODE(initrd.stat().st_mode) == 0o600
    with pytest.raises(HostError):
        folder.write_initrd([tmp_path / "missing"], b"")


def test_state_is_read_back_or_nothing(folder: VmFolder) -> None:
    """The record of a process comes back whole; a damaged one counts as none."""
    assert folder.read_state() is None
    folder.write_state(STATE)
    folder.write_spec(("qemu", "-S"))
    assert folder.read_state() == STATE
    (folder.path / "state.json").write_bytes(b"{}")
    assert folder.read_state() is None
    folder.drop_runtime()
    assert list(folder.path.iterdir()) == []


async def test_ledger_is_durable(tmp_path: Path) -> None:
    """What is held is known to the next life of the node; a damaged file does not keep it from starting."""
    ledger = Ledger(tmp_path)
    await ledger.add(VM, Held(name="web", trace_id="t"))
    assert Ledger(tmp_path).get(VM) == Held(name="web", trace_id="t")
    assert VM in ledger
    await ledger.remove(VM)
    await ledger.remove(VM)
    assert Ledger(tmp_path).vm_ids() == ()
    (tmp_path / "held.json").write_bytes(b"[")
    assert Ledger(tmp_path).vm_ids() == ()
