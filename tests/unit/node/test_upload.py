from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from formation.core.errors import FormationError, HostError, UsageError
from formation.node import upload
from formation.node.upload import inside, receive_context

FILE, HARD, SYM, CHARACTER, BLOCK, FOLDER, FIFO = (bytes([c]) for c in b"0123456")
Member = tuple[str, dict[str, Any], bytes]


def tar(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, fields, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = SYM) -> Member:
    return (name, {"type": kind, "linkname": target}, b"")


def header(name: str, size: bytes, kind: bytes = FILE) -> bytes:
    """A header with any size field, and the right checksum."""
    raw = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    raw[124:136], raw[156:157], raw[148:156] = size, kind, b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


async def chunks_of(data: bytes, size_bytes: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size_bytes):
        yield data[start : start + size_bytes]


async def unpack(data: bytes, tmp_path: Path) -> Path:
    """Unpack into a folder that has a neighbour, and see that all around it stays as it is."""
    folder = tmp_path / "around" / "context"
    folder.mkdir(parents=True)
    (tmp_path / "around" / "secret").write_text("secret")
    try:
        await receive_context(chunks_of(data), folder)
    finally:
        assert sorted(os.listdir(tmp_path)) == ["around"]
        assert sorted(os.listdir(tmp_path / "around")) == ["context", "secret"]
        assert (tmp_path / "around" / "secret").read_text() == "secret"
        assert (tmp_path / "around" / "secret").stat().st_nlink == 1
        for path in folder.rglob("*"):
            assert path.resolve().is_relative_to(folder.resolve()), path
            assert path.is_symlink() or path.is_file() or path.is_dir()
    return folder


async def refusal(data: bytes, tmp_path: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        await unpack(data, tmp_path)
    assert caught.value.hint
    assert len(caught.value.message) < 700
    return caught.value


async def test_a_context_is_unpacked(tmp_path: Path) -> None:
    """Files, folders and links inside arrive, whatever the sizes of the chunks."""
    data = tar(
        ("./", {"type": FOLDER}, b""),
        ("./Formfile", {}, b"FROM base\n" * 300),
        ("./a/b/c", {"mode": 0o755}, b"c"),
        link("./a/b/up", "../../Formfile"),
        link("./again", "a/b/c", SYM),
        ("./hard", {"type": HARD, "linkname": "./a/b/c", "mode": 0o755}, b""),
        ("./empty", {}, b""),
        ("./sub", {"type": FOLDER}, b""),
        link("./loop", "loop2"),
    )
    folder = await unpack(data, tmp_path)
    assert (folder / "Formfile").read_bytes() == b"FROM base\n" * 300
    assert (folder / "a/b/up").read_bytes() == (folder / "Formfile").read_bytes()
    assert (folder / "again").read_bytes() == (folder / "hard").read_bytes() == b"c"
    assert (folder / "sub").is_dir()
    assert os.access(folder / "a/b/c", os.X_OK)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
async def test_any_form_of_tar_will_do(tmp_path: Path, form: int) -> None:
    """ustar, GNU and pax, with long names."""
    name = "/".join(["d" * 90, "f" * 90])
    assert (await unpack(tar((name, {}, b"x"), form=form), tmp_path) / name).read_bytes() == b"x"


async def test_an_empty_tar_is_an_empty_context(tmp_path: Path) -> None:
    """Two blocks of zeros."""
    assert list((await unpack(bytes(1024), tmp_path)).iterdir()) == []


async def test_sets_of_rights_are_not_taken_over(tmp_path: Path) -> None:
    """Set-user-id bits and owners of the sender mean nothing here."""
    folder = await unpack(tar(("a", {"mode": 0o6777, "uid": 12345}, b"")), tmp_path)
    assert (folder / "a").stat().st_mode & 0o7022 == 0
    assert (folder / "a").stat().st_uid == os.geteuid()


OUTSIDE: dict[str, tuple[Member, ...]] = {
    "parent": (("../secret", {}, b"x"),),
    "parent in the middle": (("a/../../secret", {}, b"x"),),
    "parent that stays inside": (("a", {"type": FOLDER}, b""), ("a/../b", {}, b"x")),
    "absolute": (("/etc/formation-test", {}, b"x"),),
    "absolute folder": (("/tmp", {"type": FOLDER}, b""),),
    "link to an absolute path": (link("l", "/etc/passwd"),),
    "link to the parent": (link("l", ".."),),
    "link beside": (link("l", "../secret"),),
    "link above from below": (("a", {"type": FOLDER}, b""), link("a/l", "../../secret")),
    "link down and up": (link("here", "."), link("l", "here/../secret")),
    "file through a link": (("a", {"type": FOLDER}, b""), link("l", "a"), ("l/x", {}, b"x")),
    "file over a link": (("a", {}, b"1"), link("l", "a"), ("l", {}, b"2")),
    "link over a link": (("a", {}, b"1"), link("l", "a"), link("l", "b")),
    "hard link to the outside": (link("h", "../secret", HARD),),
    "hard link to an absolute path": (link("h", "/etc/passwd", HARD),),
    "hard link to a link": (
        ("d/e", {"type": FOLDER}, b""),
        link("d/e/l", "../../x"),
        link("h", "d/e/l", HARD),
        ("h", {}, b"x"),
    ),
    "hard link through a link": (("a/f", {}, b"x"), link("l", "a"), link("h", "l/f", HARD)),
    "hard link to nothing": (link("h", "nothing", HARD),),
    "hard link to a folder": (("a", {"type": FOLDER}, b""), link("h", "a", HARD)),
    "character device": (("d", {"type": CHARACTER, "devmajor": 1, "devminor": 5}, b""),),
    "block device": (("d", {"type": BLOCK, "devmajor": 8}, b""),),
    "pipe": (("d", {"type": FIFO}, b""),),
    "file named as the folder": ((".", {}, b"x"),),
    "link named as the folder": (link(".", "a"),),
    "file below a file": (("a", {}, b"x"), ("a/b", {}, b"x")),
    "file over a folder": (("a", {"type": FOLDER}, b""), ("a", {}, b"x")),
    "name too long": (("a" * 256, {}, b"x"),),
    "way too deep": (("a/" * 2500 + "a", {}, b"x"),),
    "link to nothing at all": (link("l", ""),),
}


@pytest.mark.parametrize("name", OUTSIDE)
async def test_nothing_leaves_the_folder(tmp_path: Path, name: str) -> None:
    """A member that would be outside, or lead there, is refused by name, and nothing around the folder changes."""
    error = await refusal(tar(*OUTSIDE[name]), tmp_path)
    assert error.message.startswith(f"build context: '{OUTSIDE[name][-1][0][:9]}" if name != "hard link to a link" else "build")
    assert " is not allowed: " in error.message


def overlong_links(*last: Member) -> bytes:
    """CVE-2025-4517: links nested until `realpath` gives up beyond PATH_MAX, while the kernel follows them."""
    members: list[Member] = []
    inner, steps = "", "abcdefghijklmnop"
    for step in steps:
        members.append((os.path.join(inner, "d" * 247), {"type": FOLDER}, b""))
        members.append(link(os.path.join(inner, step), "d" * 247))
        inner = os.path.join(inner, "d" * 247)
    chain = "/".join(steps) + "/" + "l" * 254
    members.append(link(chain, "../" * len(steps)))
    members.append(link("escape", f"{chain}/../secret"))
    return tar(*members, *last)


@pytest.mark.parametrize("last", [(), (("escape", {}, b"x"),), (link("h", "escape", HARD), ("h", {}, b"x"))])
async def test_overlong_links_do_not_deceive(tmp_path: Path, last: tuple[Member, ...]) -> None:
    """The escape from Python's own filter is refused at its first link."""
    assert "is a link" in (await refusal(overlong_links(*last), tmp_path)).message


NOT_A_TAR: dict[str, bytes] = {
    "nothing": b"",
    "text": b"FROM base\n" * 200,
    "gzip": b"\x1f\x8b\x08" + bytes(600),
    "cut in the data": tar(("a", {}, b"x" * 2000))[:1024],
    "cut in a header": tar(("a", {}, b"x"), ("b", {}, b"x"))[:1300],
    "cut between members": tar(("a", {}, b"x"), ("b", {}, b"x"))[:1024],
    "damaged second header": tar(("a", {}, b"x"))[:1024] + b"\xff" * 1024,
    "negative size": header("a", b"\xff" * 11 + b"\x00") + bytes(1024),
    "negative size of a long name": header("a", b"\xff" * 10 + b"\xfe\x00", b"L") + bytes(1024),
    "negative size of pax fields": header("a", b"\xff" * 10 + b"\xfe\x00", b"x") + bytes(1024),
    "chain of long names": header("a", b"0" * 11 + b"\0", b"L") * 1200 + bytes(1024),
    "NUL in a name": tar(("a", {"pax_headers": {"path": "x\0y"}}, b"x")),
    "sparse map of letters": tar(("a", {"pax_headers": {"GNU.sparse.map": "a,b", "GNU.sparse.size": "9"}}, b"x")),
    "sparse map without digits": tar(("a", {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}}, b"zz\n")),
}


@pytest.mark.parametrize("name", NOT_A_TAR)
async def test_what_is_not_a_whole_tar_is_refused(tmp_path: Path, name: str) -> None:
    """Cut, damaged and crafted streams are told as such, not taken for short ones and not raised as traces."""
    error = await refusal(NOT_A_TAR[name], tmp_path)
    assert error.message.startswith("the build context is not a tar stream: ")


async def test_a_stream_that_is_too_large_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused at its first chunk too many, not after the last."""
    monkeypatch.setattr(upload, "CONTEXT_SIZE_MAX_BYTES", 4096)
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1024)

    with pytest.raises(UsageError, match=r"larger than 4KiB") as caught:
        await receive_context(endless(), tmp_path)
    assert taken == 5
    assert ".formignore" in caught.value.hint


async def test_a_sparse_bomb_is_refused_before_it_is_written(tmp_path: Path) -> None:
    """A file of a terabyte of holes counts as a terabyte."""
    bomb = tar(("a", {"pax_headers": {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}}, b"x"))
    assert "unpacks to too much" in (await refusal(bomb, tmp_path)).message
    assert not (tmp_path / "around" / "context" / "a").exists()


async def test_a_negative_size_does_not_pay_for_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are summed up from zero, so a crafted header cannot buy room."""
    monkeypatch.setattr(upload, "CONTEXT_SIZE_MAX_BYTES", 4000)
    data = header("a", b"\xff" * 10 + b"\x00\x00", FOLDER) + tar(("b", {}, b"x" * 4001))[:-9000]
    with pytest.raises(UsageError):
        await receive_context(chunks_of(data), tmp_path)
    assert not (tmp_path / "b").exists()


async def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty files cost inodes."""
    monkeypatch.setattr(upload, "CONTEXT_FILE_COUNT_MAX", 3)
    assert "unpacks to too much" in (await refusal(tar(*[(f"f{n}", {}, b"") for n in range(4)]), tmp_path)).message


async def test_a_large_context_goes_through_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the spool's size the stream is kept on disk, and nothing of it stays."""
    monkeypatch.setattr(upload, "SPOOL_SIZE_BYTES", 100)
    folder = await unpack(tar(("a", {}, b"x" * 5000)), tmp_path)
    assert (folder / "a").stat().st_size == 5000


async def test_a_full_disk_while_receiving_is_the_hosts_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender is not told that its tar is bad."""

    class FullSpool(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda **_: FullSpool())
    with pytest.raises(HostError, match="cannot keep the build context: No space left on device"):
        await receive_context(chunks_of(b"x"), tmp_path)


async def test_a_full_disk_while_unpacking_is_the_hosts_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender is not told that its tar is bad."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(HostError, match="cannot unpack the build context: No space left on device") as caught:
        await receive_context(chunks_of(tar(("a", {}, b"x"))), tmp_path)
    assert isinstance(caught.value, FormationError)
    assert "disk full" in caught.value.hint


@pytest.mark.parametrize("name", ["Formfile", "a/Formfile", ".", "a/../Formfile", "up/Formfile"])
def test_a_name_within_the_context_is_found(tmp_path: Path, name: str) -> None:
    """Links and parents that stay inside are fine; the path may be of nothing."""
    (tmp_path / "a").mkdir()
    (tmp_path / "up").symlink_to("a")
    assert inside(tmp_path, name).is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", "a/../../x", "out/x", "round", "round/x", "x\0"])
def test_a_name_that_leads_out_of_the_context_is_refused(tmp_path: Path, name: str) -> None:
    """Parents, absolute paths, links to the outside, links that go round, and NUL."""
    (tmp_path / "out").symlink_to("/etc")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UsageError, match="lies outside the build context") as caught:
        inside(tmp_path, name)
    assert caught.value.hint
