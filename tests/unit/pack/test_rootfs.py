from __future__ import annotations

import os
import struct
from pathlib import Path

import lz4.block
import pytest

from formation.core.errors import HostError
from formation.pack.cpio import read_cpio
from formation.pack.rootfs import module_depends, prepare_base
from formation.pack.vmlinux import extract_vmlinux


def make_vmlinux(*, note_type: int = 18) -> bytes:
    """A 64-bit ELF file whose only segment is a Xen note."""
    note = struct.pack("<III4sQ", 4, 8, note_type, b"Xen\0", 0x1000)
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 1)
    return bytes(header) + struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4) + note


def make_bzimage(vmlinux: bytes) -> bytes:
    """A kernel image with one setup sector, packed as Debian does it."""
    block: bytes = lz4.block.compress(vmlinux, store_size=False)
    payload: bytes = b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block + struct.pack("<I", len(vmlinux))
    image = bytearray(1024 + 16)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + payload


def test_the_kernel_inside_is_found() -> None:
    """A bzImage gives the ELF kernel that it carries."""
    vmlinux = make_vmlinux()
    assert extract_vmlinux(make_bzimage(vmlinux)) == vmlinux


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "not a bzImage"),
        (make_bzimage(b"not ELF at all" * 20), "not an ELF file"),
        (make_bzimage(make_vmlinux(note_type=1)), "no PVH entry"),
        (make_bzimage(make_vmlinux())[: 1024 + 16 + 8] + b"\xff" * 80, "damaged"),
        (make_bzimage(make_vmlinux()).replace(b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd"), "packed in an unknown way"),
    ],
)
def test_what_is_no_bootable_kernel_is_refused(image: bytes, message: str) -> None:
    """A wrong or damaged kernel is told when it is unpacked, not when it does not boot."""
    with pytest.raises(HostError, match=message):
        extract_vmlinux(image)


def test_dependencies_of_a_module_are_read_from_it() -> None:
    """The .modinfo strings of a module name what it needs, in the kernel's spelling."""
    assert module_depends(b"ELF\0license=GPL\0depends=virtio-ring,virtio\0name=x\0") == ("virtio_ring", "virtio")
    assert module_depends(b"\0depends=\0") == ()
    assert module_depends(b"ELF") == ()


TOOLS = {
    "apt-cache": 'echo "Depends: linux-image-6.1.0-1-cloud-amd64 (= 1)"',
    "apt-get": """
echo run >>"$HOME/downloads"
for name in linux-image-6.1.0-1-cloud-amd64 busybox-static; do echo $name >${name}_1_amd64.deb; done""",
    "dpkg-deb": """
case $2 in
*linux*)
    mkdir -p $3/boot $3/lib/modules/6.1/k
    cp "$HOME/vmlinuz" $3/boot/vmlinuz-6.1
    printf '\\0depends=failover\\0' >$3/lib/modules/6.1/k/virtio_net.ko
    printf '\\0depends=\\0' >$3/lib/modules/6.1/k/failover.ko
    ;;
*)
    mkdir -p $3/bin
    printf '#!/bin/sh\\necho bin/busybox; echo bin/ls; echo usr/bin/env\\n' >$3/bin/busybox
    chmod 755 $3/bin/busybox
    ;;
esac""",
}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small stand-ins for Debian's tools, first in PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, script in TOOLS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "vmlinuz").write_bytes(make_bzimage(make_vmlinux()))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def test_packages_are_downloaded_once(tmp_path: Path, tools: Path) -> None:
    """The second build of the base finds everything; modules stand with their dependencies, applets as links."""
    said: list[str] = []
    first = prepare_base(tmp_path / "cache", report=said.append)
    second = prepare_base(tmp_path / "cache", report=said.append)
    assert (first.cached, second.cached) == (False, True)
    assert (tmp_path / "downloads").read_text() == "run\n"
    assert len(said) == 2
    entries = {e.name: e for e in read_cpio(first.initramfs_path.read_bytes())}
    assert entries["lib/modules/6.1/modules.dep"].data == b"failover.ko:\nvirtio_net.ko: failover.ko\n"
    assert entries["lib/modules/first"].data == b"virtio_net\n"
    assert entries["base/usr/bin/env"].data == b"../../bin/busybox"
    assert entries["init"].data.startswith(b"#!/base/bin/busybox sh\n")


@pytest.mark.parametrize("name", ["vmlinux", "initramfs.cpio", "sums.json"])
@pytest.mark.parametrize("data", [None, b"", b"\xff[1]"])
def test_a_damaged_base_is_made_anew(tmp_path: Path, tools: Path, name: str, data: bytes | None) -> None:
    """A byte that flipped in the cache must not be carried on by every image that is built from then on."""
    first = prepare_base(tmp_path / "cache", report=lambda _: None)
    kernel, initramfs = first.kernel_path.read_bytes(), first.initramfs_path.read_bytes()
    path = first.kernel_path.parent / name
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    again = prepare_base(tmp_path / "cache", report=lambda _: None)
    assert not again.cached
    assert (again.kernel_path.read_bytes(), again.initramfs_path.read_bytes()) == (kernel, initramfs)
    assert prepare_base(tmp_path / "cache", report=lambda _: None).cached


def test_another_folder_gives_the_same_bytes(tmp_path: Path, tools: Path) -> None:
    """The base depends on the packages only."""
    one, two = (prepare_base(tmp_path / name, report=lambda _: None) for name in ("a", "b"))
    assert one.initramfs_path.read_bytes() == two.initramfs_path.read_bytes()
    assert one.kernel_path.read_bytes() == two.kernel_path.read_bytes()


def test_a_machine_without_apt_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Debian's tools the error says which is missing and what else would do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get is missing") as caught:
        prepare_base(tmp_path / "cache", report=lambda _: None)
    assert "copy" in caught.value.hint


def test_a_refusing_apt_is_told_with_its_words(tmp_path: Path, tools: Path) -> None:
    """What apt says last is in the error; nothing half done is left."""
    (tools / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2; exit 100\n")
    with pytest.raises(HostError, match="apt-get download failed: E: Unable to locate package") as caught:
        prepare_base(tmp_path / "cache", report=lambda _: None)
    assert "apt-get update" in caught.value.hint
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["base.lock"]
