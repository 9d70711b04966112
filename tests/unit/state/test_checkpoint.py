"""Checkpoints: the root is a function of the items alone, proofs hold and lie not, snapshots come whole or not at all."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import msgspec
import pytest

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError
from formation.state import checkpoint
from formation.state.checkpoint import (
    BUCKET_COUNT,
    CHUNK_PIECE_COUNT_MAX,
    CHUNK_SIZE_MAX_BYTES,
    PIECE_SIZE_BYTES,
    SNAPSHOT_HEAD_SIZE_MAX_BYTES,
    Item,
    ItemProof,
    SnapshotAssembly,
    SnapshotChunk,
    SnapshotHead,
    SnapshotRange,
    SnapshotSource,
    StateTree,
    is_checkpoint_due,
    parse_snapshot_chunk,
    parse_snapshot_head,
    split_bucket,
    verify_item,
)
from formation.state.sync import PiecePull, decode_request


def tree_of(items: dict[tuple[str, str], bytes]) -> StateTree:
    tree = StateTree()
    tree.update(items)
    return tree


def values(count: int, *, size: int = 40) -> dict[tuple[str, str], bytes]:
    rng = random.Random(count)
    return {("vm", f"vm-{i}"): encode(rng.randbytes(size)) for i in range(count)}


def crowd(monkeypatch: pytest.MonkeyPatch, number: int = 5) -> None:
    """As if somebody had ground all keys for one bucket."""
    monkeypatch.setattr(checkpoint, "_number_of", lambda _: number)


def source_of(tree: StateTree, height: int = 7) -> SnapshotSource:
    return SnapshotSource(tree.head(height), tree.bucket)


def bucket_of(section: str, object_id: str) -> int:
    """The rule as README.md has it: the first 12 bits of SHA-256 over CBOR [section, id]."""
    return int.from_bytes(hashlib.sha256(encode([section, object_id])).digest()[:2], "big") >> 4


def missing_count(assembly: SnapshotAssembly) -> int:
    """Pieces that are still to be asked for."""
    ranges = assembly.wanted(BUCKET_COUNT * 2)
    for each in ranges:
        assembly.give_back(each)
    return sum(each.count for each in ranges)


def fetch(assembly: SnapshotAssembly, source: SnapshotSource, tree: StateTree) -> int:
    """All that is missing, from one honest peer, over the wire; how many chunks that took."""
    count = 0
    while not assembly.is_complete:
        for wanted in assembly.wanted(3):
            chunk = source.chunk(wanted)
            assert chunk is not None
            for number, content in assembly.take(wanted, parse_snapshot_chunk(encode(chunk))):
                tree.load_bucket(number, content)
            count += 1
    return count


# ── the tree ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_root_is_as_written_down() -> None:
    """Somebody without our code comes to the same root from the text of the module."""
    items = values(500)
    by_bucket: dict[int, list[tuple[bytes, bytes]]] = {}
    for (section, object_id), value in items.items():
        key = encode([section, object_id])
        number = int.from_bytes(hashlib.sha256(key).digest()[:2], "big") >> 4
        by_bucket.setdefault(number, []).append((key, encode([section, object_id, value])))
    level = []
    for number in range(BUCKET_COUNT):
        bucket = [decode(item, Item) for _, item in sorted(by_bucket.get(number, []))]
        piece = hashlib.sha256(b"\x02" + encode(bucket)).digest() if bucket else b""
        level.append(hashlib.sha256(b"\x00" + number.to_bytes(2, "big") + piece).digest())
    for _ in range(3):
        level = [hashlib.sha256(b"\x01" + b"".join(level[i : i + 16])).digest() for i in range(0, len(level), 16)]
    assert level == [tree_of(items).root()]


def test_empty_root_is_golden() -> None:
    """The root of nothing never changes: it stands in every network's beginnings."""
    assert StateTree().root().hex() == EMPTY_ROOT
    assert tree_of({("vm", "web"): b"\x01"}).root().hex() != EMPTY_ROOT


def test_history_leaves_no_trace() -> None:
    """What was added and removed, or written twice, or written in another order, gives the same root."""
    items = values(300)
    tree = StateTree()
    tree.update(dict.fromkeys(items, b"\x00"))
    tree.root()
    tree.update({("vm", "ghost"): b"\x01"})
    tree.update(dict(reversed(items.items())))
    tree.update({("vm", "ghost"): None, ("vm", "never"): None})
    assert tree.root() == tree_of(items).root()
    tree.update(dict.fromkeys(items, None))
    assert tree.root() == StateTree().root()
    assert (tree.item_count, tree.size_bytes) == (0, 0)


def test_every_part_of_an_item_counts() -> None:
    """Another section, id or value, or a byte moved from one to the next, is another root."""
    roots = {
        tree_of({key: value}).root()
        for key, value in [
            (("a", "bc"), b"\x01"),
            (("ab", "c"), b"\x01"),
            (("a", "bd"), b"\x01"),
            (("a", "bc"), b"\x02"),
            (("a", "bc"), b"\x01\x01"),
        ]
    }
    assert len(roots) == 5


def test_only_changed_buckets_are_dirty() -> None:
    """The store is told what changed since the mark: not what was written again as it was, nor what came from it."""
    tree = tree_of(values(1000))
    tree.take_dirty()
    assert not tree.take_dirty()
    tree.update({("vm", "vm-7"): values(1000)["vm", "vm-7"], ("vm", "none"): None})
    assert not tree.take_dirty()
    tree.update({("vm", "vm-7"): b"\x01", ("vm", "new"): b"\x02", ("vm", "vm-8"): None})
    tree.root()
    assert set(tree.take_dirty()) == {bucket_of("vm", name) for name in ("vm-7", "new", "vm-8")}
    tree.load_bucket(bucket_of("vm", "new"), b"")
    assert not tree.take_dirty()


def test_items_are_found() -> None:
    """get, items, counts: what was put and nothing else."""
    items = values(200)
    tree = tree_of(items)
    assert tree.get("vm", "vm-3") == items["vm", "vm-3"]
    assert tree.get("vm", "vm-") is None
    assert {(item.section, item.id): item.value for item in tree.items()} == items
    assert tree.item_count == 200
    assert tree.size_bytes == sum(len(encode(item)) for item in tree.items())


@pytest.mark.parametrize("count", [1, 23, 24, 255, 256, 65_535, 65_536, 70_000])
def test_lengths_are_in_shortest_form(count: int) -> None:
    """An item's bytes are what the codec writes, at each length where the form changes."""
    tree = tree_of({("s" * min(count, 300), "i" * min(count, 300)): b"x" * count})
    assert [encode(item) for item in tree.items()] == [content[1:] for content in tree.take_dirty().values()]


def test_buckets_rebuild_the_tree() -> None:
    """What the store kept gives the same root, counts and content."""
    tree = tree_of(values(500))
    twin = StateTree()
    for number in range(BUCKET_COUNT):
        twin.load_bucket(number, tree.bucket(number))
    assert twin.root() == tree.root()
    assert (twin.item_count, twin.size_bytes) == (tree.item_count, tree.size_bytes)


def test_bad_buckets_are_refused() -> None:
    """Content that is not CBOR, not sorted, doubled, or in another bucket's place."""
    tree = tree_of({("vm", "a"): b"\x01"})
    (number,) = tree.take_dirty()
    content = tree.bucket(number)
    item = content[1:]
    for bad in (b"\x00", content[:-1], content + b"\x00", b"\x82" + item + item, encode([["vm", "a"]])):
        with pytest.raises(DecodeError):
            StateTree().load_bucket(number, bad)
    with pytest.raises(DecodeError, match="out of its place"):
        StateTree().load_bucket(number + 1, content)
    StateTree().load_bucket(number, content)


# ── proofs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_proofs_show_values_and_absence() -> None:
    """Of each item its value, of anything else that it is not there; also in an empty state."""
    items = values(300)
    tree = tree_of(items)
    source = source_of(tree)
    for key in [("vm", "vm-0"), ("vm", "vm-299"), ("vm", "none"), ("", ""), ("zz", "z")]:
        proof = source.prove(*key)
        assert proof is not None
        assert verify_item(tree.root(), *key, decode(encode(proof), ItemProof)) == items.get(key)
    proof = source_of(StateTree()).prove("vm", "a")
    assert proof is not None
    assert verify_item(StateTree().root(), "vm", "a", proof) is None


def test_proofs_in_a_crowded_bucket_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 MiB of items ground into one bucket: a proof holds one piece or two, and hashes."""
    crowd(monkeypatch)
    items = {("v", f"{i:04}"): encode(bytes([i % 256]) * 4000) for i in range(0, 1000, 2)}
    tree = tree_of(items)
    source = source_of(tree)
    for name in ("", "0000", "0031", "0032", "0033", "0501", "0998", "0999", "zz"):
        proof = source.prove("v", name)
        assert proof is not None
        assert verify_item(tree.root(), "v", name, proof) == items.get(("v", name))
        assert len(encode(proof)) < 2 * PIECE_SIZE_BYTES + 8192


def test_absence_between_two_pieces_needs_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that would stand between the last item of one piece and the first of the next: one piece shows nothing."""
    crowd(monkeypatch)
    tree = tree_of({("v", f"{i:03}"): b"x" * 40_000 for i in range(0, 6, 2)})
    source = source_of(tree)
    proof = source.prove("v", "001")
    assert proof is not None
    assert len(proof.pieces) == 2
    assert verify_item(tree.root(), "v", "001", proof) is None
    for first, pieces in ((0, proof.pieces[:1]), (1, proof.pieces[1:])):
        with pytest.raises(DecodeError, match="another part"):
            verify_item(tree.root(), "v", "001", msgspec.structs.replace(proof, first=first, pieces=pieces))


def test_forged_proofs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any byte changed; another root, key or piece; a piece withheld."""
    tree = tree_of(values(300))
    root = tree.root()
    proof = source_of(tree).prove("vm", "vm-7")
    assert proof is not None
    raw = encode(proof)
    rng = random.Random(1)
    for at in [*range(60), *rng.sample(range(len(raw)), 200)]:
        forged = bytearray(raw)
        forged[at] ^= 1 << rng.randrange(8)
        with pytest.raises(DecodeError):
            verify_item(root, "vm", "vm-7", decode(bytes(forged), ItemProof))
    for bad in (
        msgspec.structs.replace(proof, pieces=()),
        msgspec.structs.replace(proof, pieces=(), piece_hashes=b""),
        msgspec.structs.replace(proof, first=-1),
        msgspec.structs.replace(proof, first=1),
        msgspec.structs.replace(proof, first=1, pieces=()),
        msgspec.structs.replace(proof, nodes=proof.nodes[:2]),
        msgspec.structs.replace(proof, pieces=proof.pieces * 2),
    ):
        with pytest.raises(DecodeError):
            verify_item(root, "vm", "vm-7", bad)
    with pytest.raises(DecodeError, match="node"):
        verify_item(root, "vm", "vm-8", proof)
    with pytest.raises(DecodeError, match="another root"):
        verify_item(bytes(32), "vm", "vm-7", proof)


def test_store_that_moved_on_serves_nothing_wrong() -> None:
    """Buckets of a newer state under an older head: neither proof nor chunk, so nobody is blamed."""
    tree = tree_of(values(300))
    source = source_of(tree)
    tree.update({("vm", "vm-7"): b"\x01"})
    assert source.prove("vm", "vm-7") is None
    piece_count = sum(len(hashes) // 32 for hashes in source.head.piece_hashes)
    answers = [source.chunk(SnapshotRange(7, first, 1)) for first in range(piece_count)]
    assert answers.count(None) == 1


# ── snapshots ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_snapshot_arrives() -> None:
    """Head, ranges, chunks over the wire: the joiner's root is the trusted one."""
    tree = tree_of(values(2000))
    source, twin = source_of(tree), StateTree()
    head = parse_snapshot_head(encode(source.head), root=tree.root())
    assert fetch(SnapshotAssembly(head), source, twin) > 3
    assert twin.root() == tree.root()


def test_empty_snapshot_is_complete_at_once() -> None:
    """Of an empty state there is nothing to ask for."""
    assembly = SnapshotAssembly(StateTree().head(1))
    assert assembly.is_complete
    assert assembly.wanted(5) == ()


def test_wrong_heads_are_refused() -> None:
    """Other hashes than give the root, too few, cut ones, too many bytes."""
    tree = tree_of(values(100))
    head, root = tree.head(7), tree.root()
    hashes = list(head.piece_hashes)
    at = next(i for i, h in enumerate(hashes) if h)
    for bad in (
        [*hashes[:at], bytes(32), *hashes[at + 1 :]],
        [*hashes[:at], b"", *hashes[at + 1 :]],
        [*hashes[:at], hashes[at] + b"\x00", *hashes[at + 1 :]],
        hashes[:-1],
        [*hashes, b""],
    ):
        with pytest.raises(DecodeError):
            parse_snapshot_head(encode(SnapshotHead(7, tuple(bad))), root=root)
    with pytest.raises(DecodeError, match="limit"):
        parse_snapshot_head(bytes(SNAPSHOT_HEAD_SIZE_MAX_BYTES + 1), root=root)
    with pytest.raises(DecodeError):
        parse_snapshot_head(encode(SnapshotHead(-1, head.piece_hashes)), root=root)
    assert parse_snapshot_head(encode(head), root=root) == head


def test_lying_peer_is_named_and_the_rest_is_asked_elsewhere() -> None:
    """A wrong piece, too many, none, or those of another place: refused whole; then another peer completes it."""
    tree = tree_of(values(2000))
    source, twin = source_of(tree), StateTree()
    assembly = SnapshotAssembly(source.head)
    before = missing_count(assembly)
    for lie in range(6):
        (wanted,) = assembly.wanted(1)
        assert wanted.first == 0
        chunk = source.chunk(wanted)
        assert chunk is not None
        last = chunk.pieces[-1]
        bad = (
            msgspec.structs.replace(chunk, pieces=(*chunk.pieces[:-1], last[:-1] + bytes([last[-1] ^ 1]))),
            msgspec.structs.replace(chunk, pieces=()),
            msgspec.structs.replace(chunk, pieces=chunk.pieces * 2),
            msgspec.structs.replace(chunk, first=1, pieces=chunk.pieces[1:]),
            msgspec.structs.replace(chunk, height=8),
            msgspec.structs.replace(chunk, pieces=chunk.pieces[1:]),
        )[lie]
        with pytest.raises(DecodeError):
            assembly.take(wanted, bad)
        assert missing_count(assembly) == before
    fetch(assembly, source, twin)
    assert twin.root() == tree.root()


def test_silent_peer_holds_nothing_up() -> None:
    """A range is asked for once, again when it is given back, and a late answer is welcome but counted once."""
    source = source_of(tree_of(values(2000)))
    assembly = SnapshotAssembly(source.head)
    (one,) = assembly.wanted(1)
    (other,) = assembly.wanted(1)
    assert other.first == one.first + one.count
    assembly.give_back(one)
    assert assembly.wanted(1) == (one,)
    chunk = source.chunk(one)
    assert chunk is not None
    assert len(assembly.take(one, chunk)) == len(chunk.pieces)
    assert assembly.take(one, chunk) == ()
    assembly.give_back(one)
    assert assembly.wanted(1)[0].first == other.first + other.count


def test_assembly_resumes_with_what_the_store_holds() -> None:
    """After a restart, or when a newer checkpoint is served, only what differs is fetched."""
    items = values(3000)
    tree = tree_of(items)
    old = {number: tree.bucket(number) for number in range(BUCKET_COUNT)}
    gone = ("vm", "vm-5")
    tree.update({("vm", "vm-1"): b"\x01", ("vm", "new"): b"\x02", gone: None})
    changed = {bucket_of("vm", name) for name in ("vm-1", "new", "vm-5")}
    source = source_of(tree, 8)
    assembly = SnapshotAssembly(source.head, held=old.items())
    assert assembly.kept == set(range(BUCKET_COUNT)) - changed
    twin = StateTree()
    for number in assembly.kept:
        twin.load_bucket(number, old[number])
    assert missing_count(assembly) <= 3
    fetch(assembly, source, twin)
    assert twin.root() == tree.root()


def test_crowded_bucket_travels_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 MiB in one bucket: chunks stay below 1 MiB, each is checked by itself, and the bucket comes out whole."""
    crowd(monkeypatch)
    tree = tree_of({("v", f"{i:04}"): random.Random(i).randbytes(3000) for i in range(1000)} | {("v", "big"): b"x" * 900_000})
    source, twin = source_of(tree), StateTree()
    content = tree.bucket(5)
    pieces = split_bucket(content)
    assert len(pieces) > 40
    assert max(map(len, pieces)) > 900_000
    assert sorted(map(len, pieces))[-2] <= PIECE_SIZE_BYTES + 3
    assembly = SnapshotAssembly(source.head)
    (wanted,) = assembly.wanted(9)
    sizes = []
    while not assembly.is_complete:
        chunk = source.chunk(wanted)
        assert chunk is not None
        sizes.append(sum(map(len, chunk.pieces)))
        for number, whole in assembly.take(wanted, chunk):
            assert (number, whole) == (5, content)
            twin.load_bucket(number, whole)
        wanted = next(iter(assembly.wanted(1)), wanted)
    assert len(sizes) > 3
    assert max(sizes) <= CHUNK_SIZE_MAX_BYTES
    assert twin.root() == tree.root()


def test_requests_out_of_bounds_are_refused() -> None:
    """A range of nothing, of too much, before the first piece; behind the last; of another height."""
    for bad in (PiecePull(7, 0, 0), PiecePull(7, 0, CHUNK_PIECE_COUNT_MAX + 1), PiecePull(7, -1, 1), PiecePull(-1, 0, 1)):
        with pytest.raises(DecodeError):
            decode_request(encode(bad))
    source = source_of(tree_of(values(10)))
    assert source.chunk(SnapshotRange(6, 0, 1)) is None
    assert source.chunk(SnapshotRange(7, 10, 1)) is None
    assert source.chunk(SnapshotRange(7, 9, 5)) is not None
    with pytest.raises(DecodeError, match="limit"):
        parse_snapshot_chunk(encode(SnapshotChunk(7, 0, (bytes(CHUNK_SIZE_MAX_BYTES + 2000),))))


def test_checkpoint_is_due_by_operations_or_time() -> None:
    """50,000 operations, or 60 s of spine time with at least one."""
    assert not is_checkpoint_due(49_999, spine_ms=60_000, checkpoint_ms=1)
    assert is_checkpoint_due(50_000, spine_ms=0, checkpoint_ms=0)
    assert is_checkpoint_due(1, spine_ms=60_000, checkpoint_ms=0)
    assert not is_checkpoint_due(0, spine_ms=10**9, checkpoint_ms=0)


def test_update_costs_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed item hashes one piece, one leaf and three nodes, however many items there are."""
    tree = tree_of(values(3000))
    tree.root()
    calls: list[str] = []

    def count(name: str, real: Callable[..., bytes]) -> Callable[..., bytes]:
        def counted(*args: object) -> bytes:
            calls.append(name)
            return real(*args)

        return counted

    for name in ("_piece_hash", "_leaf_hash", "_node_hash"):
        monkeypatch.setattr(checkpoint, name, count(name, getattr(checkpoint, name)))
    tree.update({("vm", "vm-1"): b"\x01"})
    tree.root()
    assert sorted(calls) == ["_leaf_hash", "_node_hash", "_node_hash", "_node_hash", "_piece_hash"]
    tree.root()
    assert len(calls) == 5


EMPTY_ROOT = "b87659ec32f6fa2c276fac86dd278826689fc46c2e9668fb4def210c90c977e7"
