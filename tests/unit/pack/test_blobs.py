from __future__ import annotations

import os
from pathlib import Path

import pytest

from formation.core.errors import HostError, RemoteFault
from formation.core.ids import Digest, digest_of
from formation.pack import blobs
from formation.pack.blobs import BlobStore


def make_store(folder: Path) -> BlobStore:
    store = BlobStore(folder)
    store.prepare()
    return store


def test_bytes_are_kept_under_their_digest(tmp_path: Path) -> None:
    """What was added is found by its digest, also by the next process."""
    digest = make_store(tmp_path).add_bytes(b"hello")
    store = make_store(tmp_path)
    assert digest == digest_of(b"hello")
    assert store.path_of(digest).read_bytes() == b"hello"
    assert store.check_blob(digest, size_bytes=5)
    assert not list((tmp_path / "new").iterdir())


def test_a_damaged_blob_is_removed(tmp_path: Path) -> None:
    """A blob whose bytes changed does not pass, and is gone."""
    store = make_store(tmp_path)
    digest = store.add_bytes(b"hello")
    store.path_of(digest).write_bytes(b"jello")
    assert not make_store(tmp_path).check_blob(digest, size_bytes=5)
    assert not store.has_blob(digest)


def test_a_file_enters_only_under_its_own_digest(tmp_path: Path) -> None:
    """add_file refuses other bytes than the digest names."""
    store = make_store(tmp_path / "store")
    source = tmp_path / "file"
    source.write_bytes(b"abc")
    assert not store.add_file(source, digest=digest_of(b"other"))
    assert store.add_file(source, digest=digest_of(b"abc"))
    assert store.path_of(digest_of(b"abc")).read_bytes() == b"abc"
    assert source.exists()


def test_a_download_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Bytes of an interrupted download stay, and count only once the whole hash holds."""
    digest = digest_of(b"0123456789")
    with make_store(tmp_path).open_partial(digest, size_bytes=10) as partial:
        partial.append(b"01234")
    store = make_store(tmp_path)
    assert not store.has_blob(digest)
    with store.open_partial(digest, size_bytes=10) as partial:
        assert partial.offset == 5
        partial.append(b"56789")
        partial.finish()
    assert store.path_of(digest).read_bytes() == b"0123456789"
    assert not list((tmp_path / "partial").iterdir())


def test_wrong_bytes_are_forgotten(tmp_path: Path) -> None:
    """A download with other bytes is the peer's fault, and starts from nothing."""
    store = make_store(tmp_path)
    with store.open_partial(digest_of(b"right"), size_bytes=5) as partial:
        partial.append(b"wrong")
        with pytest.raises(RemoteFault):
            partial.finish()
        assert partial.offset == 0
        partial.append(b"right")
        partial.finish()
    assert store.check_blob(digest_of(b"right"), size_bytes=5)


def test_a_partial_longer_than_the_blob_is_dropped(tmp_path: Path) -> None:
    """A kept part can not be longer than the whole."""
    store = make_store(tmp_path)
    with store.open_partial(digest_of(b"x"), size_bytes=9) as partial:
        partial.append(b"123456789")
    with store.open_partial(digest_of(b"x"), size_bytes=1) as partial:
        assert partial.offset == 0


def test_a_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for the blob and the reserve nothing is written."""
    store = make_store(tmp_path)
    monkeypatch.setattr(blobs, "DISK_RESERVE_BYTES", 1 << 60)
    with pytest.raises(HostError, match="free"):
        store.add_bytes(b"x")
    with pytest.raises(HostError, match="free"):
        store.open_partial(Digest("sha256:" + "0" * 64), size_bytes=1)


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    """Half-written files are gone after a start; partial downloads stay."""
    make_store(tmp_path)
    (tmp_path / "new" / "half").write_bytes(b"x")
    (tmp_path / "partial" / "aa").write_bytes(b"x")
    make_store(tmp_path)
    assert not (tmp_path / "new" / "half").exists()
    assert (tmp_path / "partial" / "aa").exists()


def test_a_download_on_a_full_disk_tells_so_and_closes(tmp_path: Path) -> None:
    """The disk's error is the one that is told: closing, which tries to write the rest again, adds none."""
    store = make_store(tmp_path)
    data = b"x" * 100_000
    with store.open_partial(digest_of(data), size_bytes=len(data)) as partial:
        # From now on this file's writes fail as on a full disk (full(4)).
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, partial._file.fileno())
        os.close(full)
        partial.append(data[:10])
        with pytest.raises(HostError, match="No space left"):
            partial.append(data[10:])
    with store.open_partial(digest_of(data), size_bytes=len(data)) as partial:
        assert partial.offset == 0
