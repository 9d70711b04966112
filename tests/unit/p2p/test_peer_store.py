from __future__ import annotations

import os
from pathlib import Path

import pytest

from formation.p2p.peer_store import FILE_SIZE_MAX_BYTES, FilePeerStore, MemoryPeerStore, PeerStore


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PeerStore:
    return FilePeerStore(tmp_path / "peers.cbor") if request.param == "file" else MemoryPeerStore()


async def test_what_was_saved_last_is_loaded(store: PeerStore) -> None:
    """Nothing before that."""
    assert await store.load() == b""
    await store.save(b"one")
    await store.save(b"two")
    assert await store.load() == b"two"


async def test_what_was_put_aside_is_not_loaded_again(store: PeerStore) -> None:
    """And something else can be saved."""
    await store.save(b"rubbish")
    await store.put_aside("it is rubbish")
    assert await store.load() == b""
    await store.save(b"one")
    assert await store.load() == b"one"


async def test_a_damaged_file_is_kept_for_people(tmp_path: Path) -> None:
    """Under another name."""
    path = tmp_path / "peers.cbor"
    path.write_bytes(b"rubbish")
    await FilePeerStore(path).put_aside("it is rubbish")
    assert not path.exists()
    assert (tmp_path / "peers.damaged").read_bytes() == b"rubbish"
    await FilePeerStore(path).put_aside("it is gone")


async def test_a_file_that_is_too_large_is_put_aside(tmp_path: Path) -> None:
    """Unread."""
    path = tmp_path / "peers.cbor"
    with path.open("wb") as file:
        file.truncate(FILE_SIZE_MAX_BYTES + 1)
    assert await FilePeerStore(path).load() == b""
    assert (tmp_path / "peers.damaged").stat().st_size == FILE_SIZE_MAX_BYTES + 1


async def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    """Who a node's peers are is nobody else's business."""
    path = tmp_path / "peers.cbor"
    await FilePeerStore(path).save(b"x")
    assert path.stat().st_mode & 0o077 == 0


async def test_a_disk_that_refuses_is_survived(tmp_path: Path) -> None:
    """Reading and writing, both."""
    await FilePeerStore(tmp_path / "none" / "peers.cbor").save(b"x")
    folder = tmp_path / "peers.cbor"
    folder.mkdir()
    (folder / "file").touch()
    store = FilePeerStore(folder)
    assert await store.load() == b""
    await store.save(b"x")
    assert os.listdir(tmp_path) == ["peers.cbor"]
