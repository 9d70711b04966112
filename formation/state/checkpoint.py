"""Checkpoints: one hash of the whole final state, proofs of single items, and snapshots that many peers can serve.

The final state is a set of items (section, id) → value, a value being canonical CBOR bytes. Every replica hashes it alike:

    item    CBOR array [section, id, value]
    bucket  items of one number: the first 12 bits of SHA-256(CBOR [section, id]); ordered by the bytes of CBOR [section, id]
    content CBOR array of a bucket's items; no bytes at all for an empty bucket. What the store keeps.
    piece   a run of a bucket's items as a CBOR array of its own: as many as fit into 32 KiB, at least one. An ordinary
            bucket is one piece, and then piece and content are the same bytes.
    leaf    SHA-256(0x00 ‖ number, 2 bytes ‖ SHA-256(0x02 ‖ piece) of each piece)
    node    SHA-256(0x01 ‖ its 16 children); three levels of nodes over 4,096 leaves, the last is the root

Rules: (1) the root depends on the items alone, never on the order or grouping of updates; (2) `update` only notes what
changed, the work is done once for each dirty bucket when somebody asks; (3) an item's key comes first in its encoding and
no key is the prefix of another, so items sort and are found by their own bytes, and no second index is kept: memory is
the content and about 50 bytes an item.

Crowding. Keys are placed by hash, but 4,096 tries find a key for any bucket, and no salt helps where liars know every
salt that voters know. So a crowded bucket must do no harm beyond the bytes in it, which quotas bound (`quota`: 16 MiB an
account):
- Work: a dirty bucket is encoded and hashed once a checkpoint however many of its items changed, so a checkpoint never
  costs more than hashing the whole state once, crowded or not; one change costs a binary search.
- Transfer: peers are asked for pieces, each checked by itself. The largest is 32 KiB, or one item where that is larger.
- Proofs: one or two pieces and 32 bytes for each other piece of the bucket: 0.1 % of what was crowded into it.

Snapshots. Who trusts a root (it stands in a final proposal, signed by a quorum) asks one peer for the head, which lists
the hashes of all pieces and is refused unless they give that root; then pieces from many peers at once, each refused
unless it has its hash. So a lying peer can delay, is known by its first wrong piece, and never misleads.

Sources: Merkle, "A Digital Signature Based on a Conventional Encryption Function" (CRYPTO 1987); the tags that keep items,
leaves and nodes apart are those of RFC 6962 section 2.1; Castro & Liskov, "Practical Byzantine Fault Tolerance" (OSDI 1999,
section 6.2: partition trees and fetching what differs); design/state section 7.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import msgspec

from formation.core.codec import ARRAY, BYTES, HASH_SIZE_BYTES, TEXT, Hash, decode, item_head
from formation.core.errors import DecodeError

BUCKET_COUNT = 4096
"""200,000 objects make 49 to a bucket: small enough to rewrite for one change, few enough to list (128 KiB of hashes)."""
FANOUT = 16
LEVEL_COUNT = 3
assert FANOUT**LEVEL_COUNT == BUCKET_COUNT

# An ordinary bucket (200,000 objects of 300 bytes: 15 KB) is one. A proof of one small item must fit into an operation of
# 64 KiB with its certificate (`root_link`), however crowded the bucket is.
PIECE_SIZE_BYTES = 32 * 1024
# A piece has at least one item, and a chunk at least one piece. The fold bounds what an object may become below this.
ITEM_SIZE_MAX_BYTES = 960 * 1024
# design/state section 7. A gigabit link carries one in 8 ms, and a peer that answers wrongly wastes no more than this.
CHUNK_SIZE_MAX_BYTES = 1024 * 1024
# Asked for at once: pieces are mostly smaller than 32 KiB, and the server stops at the size.
CHUNK_PIECE_COUNT_MAX = 128
# 32,000 pieces: no two neighbours fit into one, so that is a state of 512 MB at least, above every memory ceiling of ours.
SNAPSHOT_HEAD_SIZE_MAX_BYTES = 1024 * 1024

# design/state section 7: what a joiner replays after the snapshot, and how long an active network goes without one.
CHECKPOINT_OP_COUNT = 50_000
CHECKPOINT_INTERVAL_MS = 60_000
# What voters' operators ask for beside that: storing one takes a node some tenths of a second in which it commits nothing.
CHECKPOINT_WANTED_INTERVAL_MS = 5_000

# Items of which the beginning and the bucket are kept at hand, 300 bytes each: what is written again between two checkpoints.
PLACE_CACHE_COUNT_MAX = 16_384

_LEAF, _NODE, _PIECE = b"\x00", b"\x01", b"\x02"

Key = tuple[str, str]
"""(section, id)."""


class Item(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Array of three."""

    section: str
    id: str
    value: bytes
    """Canonical CBOR."""


class ItemProof(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """What shows an item, or that there is none, to somebody who trusts a root: array of four."""

    first: int
    """Number of the first of `pieces` inside its bucket."""
    pieces: tuple[bytes, ...]
    """The piece where the item is or would be; both neighbours if it would stand between two; none of an empty bucket."""
    piece_hashes: bytes
    """32 bytes for each piece of the bucket."""
    nodes: tuple[bytes, ...]
    """The children of the three nodes above the leaf, lowest first: 16 hashes of 32 bytes each."""


class SnapshotHead(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """The hashes of all pieces of one state: array of two."""

    height: int
    """The height of the spine whose state this is."""
    piece_hashes: tuple[bytes, ...]
    """For each of the 4,096 buckets 32 bytes for each of its pieces."""


class SnapshotRange(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Pieces asked for: array of three. Pieces are numbered from 0 through all buckets."""

    height: int
    first: int
    count: int


class SnapshotChunk(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """The answer: as many of the pieces asked for as fit into 1 MiB, from the first one on; array of three."""

    height: int
    first: int
    pieces: tuple[bytes, ...]


def is_checkpoint_due(op_count: int, *, spine_ms: int, checkpoint_ms: int) -> bool:
    """Whether the state at this height becomes a checkpoint; the same on every replica.

    Args:
      op_count: operations made final since the last checkpoint.
      spine_ms: the spine's time at this height.
      checkpoint_ms: the spine's time at the last checkpoint (or of the genesis).
    """
    return op_count >= CHECKPOINT_OP_COUNT or (op_count > 0 and spine_ms - checkpoint_ms >= CHECKPOINT_INTERVAL_MS)


def bucket_number(section: str, object_id: str) -> int:
    """The bucket that a key belongs to: 0 to 4,095."""
    return _number_of(_key_bytes(section, object_id))


class LazyBuckets(Mapping[int, bytes]):
    """Number → content of buckets, each made of its items when it is asked for: in the thread that writes them."""

    __slots__ = ("_items",)

    def __init__(self, items: dict[int, tuple[bytes, ...]]) -> None:
        self._items = items

    def __getitem__(self, number: int) -> bytes:
        return _array(self._items[number])

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def over(self, older: LazyBuckets) -> LazyBuckets:
        """These, and those of `older` that are not among them."""
        return LazyBuckets({**older._items, **self._items})


class StateTree:
    """The final state as bytes, under one hash."""

    __slots__ = ("_buckets", "_changed", "_item_count", "_levels", "_pending", "_piece_hashes", "_size_bytes", "_stale")

    def __init__(self) -> None:
        self._buckets: list[list[bytes]] = [[] for _ in range(BUCKET_COUNT)]
        self._piece_hashes: list[bytes] = [b""] * BUCKET_COUNT
        self._levels = _levels(self._piece_hashes)
        self._pending: dict[int, dict[bytes, bytes]] = {}
        """Bucket → key → encoded item, or nothing where it goes: not merged yet."""
        self._stale: set[int] = set()
        """Buckets that differ from their hash."""
        self._changed: set[int] = set()
        self._item_count = 0
        self._size_bytes = 0

    @property
    def item_count(self) -> int:
        """How many items there are."""
        self._merge()
        return self._item_count

    @property
    def size_bytes(self) -> int:
        """Encoded size of all items."""
        self._merge()
        return self._size_bytes

    def update(self, changed: Mapping[Key, bytes | None]) -> None:
        """Put these values (canonical CBOR) in place; None removes.

        A value above ITEM_SIZE_MAX_BYTES could not be served to a joiner: keeping objects below it is the fold's duty.
        """
        pending = self._pending
        for (section, object_id), value in changed.items():
            key, number = _place_of(section, object_id)
            item = b"" if value is None else key + item_head(BYTES, len(value)) + value
            bucket = pending.get(number)
            if bucket is None:
                pending[number] = {key: item}
            else:
                bucket[key] = item

    def load_bucket(self, number: int, content: bytes) -> None:
        """Replace a bucket by its content as kept by the store or taken from a snapshot; it does not count as dirty.

        Raises:
          DecodeError: not a bucket's content.
        """
        values = decode(content, tuple[Item, ...], what="bucket") if content else ()
        keys = [_key_bytes(item.section, item.id) for item in values]
        is_placed = all(_number_of(key) == number for key in keys) and (keys or not content)
        if not is_placed or any(one >= other for one, other in pairwise(keys)):
            raise DecodeError(f"bucket {number}: an item out of its place")
        items = [key + item_head(BYTES, len(item.value)) + item.value for key, item in zip(keys, values, strict=True)]
        self._merge()
        self._replace(number, items)

    def root(self) -> Hash:
        """32 bytes: the hash of everything."""
        self._rehash()
        return Hash(self._levels[LEVEL_COUNT][0])

    def bucket(self, number: int) -> bytes:
        """A bucket's content; no bytes if it is empty."""
        self._merge()
        return _array(self._buckets[number])

    def take_dirty(self) -> LazyBuckets:
        """The buckets that `update` changed since the last call, as they are now; joined when they are read."""
        self._merge()
        taken = LazyBuckets({number: tuple(self._buckets[number]) for number in sorted(self._changed)})
        self._changed.clear()
        return taken

    def settle(self) -> None:
        """Do now what `root` would have to do first: a little work often instead of much at once."""
        self._merge()

    def get(self, section: str, object_id: str) -> bytes | None:
        """The value of an item, if there is one."""
        self._merge()
        key = _key_bytes(section, object_id)
        items = self._buckets[_number_of(key)]
        at = bisect_left(items, key)
        if at == len(items) or not items[at].startswith(key):
            return None
        # Written by us a moment or a checkpoint ago, under a hash: it is read without asking what else it might be.
        return _bytes_of(items[at][len(key) :])

    def items(self) -> Iterator[Item]:
        """All items, by bucket and key. Do not change the tree meanwhile."""
        self._merge()
        for items in self._buckets:
            for item in items:
                yield decode(item, Item)

    def head(self, height: int) -> SnapshotHead:
        """What a joiner is given first; `height` is that of the state."""
        self._rehash()
        return SnapshotHead(height, tuple(self._piece_hashes))

    def _merge(self) -> None:
        """Bring what `update` noted into the buckets: linear in a bucket's items, however many of them changed."""
        for number, pending in self._pending.items():
            items = self._buckets[number]
            fresh, gone, is_changed = [], set(), False
            for key, item in pending.items():
                at = bisect_left(items, key)
                if at == len(items) or not items[at].startswith(key):
                    if item:
                        fresh.append(item)
                elif not item:
                    gone.add(at)
                elif item != items[at]:
                    self._size_bytes += len(item) - len(items[at])
                    items[at] = item
                    is_changed = True
            if fresh or gone:
                # Both runs are sorted, nearly: list.sort merges them in linear time.
                self._replace(number, sorted([item for at, item in enumerate(items) if at not in gone] + sorted(fresh)))
            if is_changed or fresh or gone:
                self._stale.add(number)
                self._changed.add(number)
        self._pending = {}

    def _replace(self, number: int, items: list[bytes]) -> None:
        old = self._buckets[number]
        self._item_count += len(items) - len(old)
        self._size_bytes += sum(map(len, items)) - sum(map(len, old))
        self._buckets[number] = items
        self._stale.add(number)

    def _rehash(self) -> None:
        self._merge()
        stale = self._stale
        for number in stale:
            hashes = b"".join(_piece_hash(_array(piece)) for piece in _cut(self._buckets[number]))
            self._piece_hashes[number] = hashes
            self._levels[0][number] = _leaf_hash(number, hashes)
        for level in range(LEVEL_COUNT):
            stale = {number // FANOUT for number in stale}
            for number in stale:
                self._levels[level + 1][number] = _node_hash(_children(self._levels[level], number))
        self._stale = set()


def verify_item(root: bytes, section: str, object_id: str, proof: ItemProof) -> bytes | None:
    """The value that the state under a trusted root has for this key; None if it has none.

    Raises:
      DecodeError: the proof is wrong or shows nothing of this key.
    """
    key = _key_bytes(section, object_id)
    number = _number_of(key)
    _check_hashes(proof.piece_hashes)
    if len(proof.nodes) != LEVEL_COUNT or any(len(node) != FANOUT * HASH_SIZE_BYTES for node in proof.nodes):
        raise DecodeError("proof: not three nodes of 16 hashes")
    below, place = _leaf_hash(number, proof.piece_hashes), number
    for node in proof.nodes:
        place, child = divmod(place, FANOUT)
        if _hash_at(node, child) != below:
            raise DecodeError("proof: a node does not hold what is below it")
        below = _node_hash(node)
    if below != root:
        raise DecodeError("proof: of another root")
    return _find_shown(key, proof)


def _find_shown(key: bytes, proof: ItemProof) -> bytes | None:
    """The value in pieces whose hashes are trusted but not compared yet."""
    piece_count = len(proof.piece_hashes) // HASH_SIZE_BYTES
    end = proof.first + len(proof.pieces)
    if proof.first not in range(piece_count + 1) or end > piece_count or (piece_count and not proof.pieces):
        raise DecodeError("proof: pieces that the bucket does not have")
    items: list[Item] = []
    for at, piece in enumerate(proof.pieces, start=proof.first):
        if _piece_hash(piece) != _hash_at(proof.piece_hashes, at):
            raise DecodeError("proof: a piece has another hash")
        items += decode(piece, tuple[Item, ...], what="piece")
    keys = [_key_bytes(item.section, item.id) for item in items]
    if key in keys:
        return items[keys.index(key)].value
    # Absent, if what is shown leaves no room where it could stand unseen.
    if (proof.first > 0 and keys[0] > key) or (end < piece_count and keys[-1] < key):
        raise DecodeError("proof: shows another part of the bucket")
    return None


# ── snapshots ───────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_snapshot_head(raw: bytes, *, root: bytes) -> SnapshotHead:
    """A head from a peer, checked against a trusted root.

    Raises:
      DecodeError: not a head, or of another state: the peer's fault.
    """
    if len(raw) > SNAPSHOT_HEAD_SIZE_MAX_BYTES:
        raise DecodeError(f"snapshot head of {len(raw)} bytes, the limit is {SNAPSHOT_HEAD_SIZE_MAX_BYTES}")
    head = decode(raw, SnapshotHead)
    if head.height < 0 or len(head.piece_hashes) != BUCKET_COUNT:
        raise DecodeError(f"snapshot head: not {BUCKET_COUNT} buckets of a height")
    for hashes in head.piece_hashes:
        _check_hashes(hashes)
    if _levels(head.piece_hashes)[LEVEL_COUNT][0] != root:
        raise DecodeError("snapshot head: its hashes do not give the root")
    return head


def parse_snapshot_chunk(raw: bytes) -> SnapshotChunk:
    """A peer's answer; its pieces are checked by `SnapshotAssembly.take`.

    Raises:
      DecodeError: not a chunk, or too large.
    """
    # Nine bytes at most before each piece and number.
    if len(raw) > CHUNK_SIZE_MAX_BYTES + 9 * (CHUNK_PIECE_COUNT_MAX + 3):
        raise DecodeError(f"snapshot chunk of {len(raw)} bytes, the limit is {CHUNK_SIZE_MAX_BYTES}")
    return decode(raw, SnapshotChunk)


class SnapshotSource:
    """Serves one checkpoint, and proofs under its root, from the buckets that the store keeps of it."""

    __slots__ = ("_first_of", "_levels", "_read_bucket", "head")

    def __init__(self, head: SnapshotHead, read_bucket: Callable[[int], bytes]) -> None:
        self.head = head
        self._read_bucket = read_bucket
        self._first_of = _first_pieces(head)
        self._levels: list[list[bytes]] = []
        """Made when the first proof is asked for: chunks need none, and it takes 5 ms."""

    def chunk(self, wanted: SnapshotRange) -> SnapshotChunk | None:
        """The answer; None if that height is not served here (any more) or has no such piece."""
        if wanted.height != self.head.height or wanted.first not in range(self._first_of[-1]):
            return None
        shown: list[bytes] = []
        size_bytes = 0
        number = bisect_right(self._first_of, wanted.first) - 1
        skipped = wanted.first - self._first_of[number]
        while number < BUCKET_COUNT and len(shown) < wanted.count:
            pieces = self._pieces(number)
            if pieces is None:
                return None
            for piece in pieces[skipped : skipped + wanted.count - len(shown)]:
                size_bytes += len(piece)
                if shown and size_bytes > CHUNK_SIZE_MAX_BYTES:
                    return SnapshotChunk(wanted.height, wanted.first, tuple(shown))
                shown.append(piece)
            number, skipped = number + 1, 0
        return SnapshotChunk(wanted.height, wanted.first, tuple(shown))

    def prove(self, section: str, object_id: str) -> ItemProof | None:
        """Evidence of the item's value, or of its absence; None if the store has moved on to another checkpoint."""
        key = _key_bytes(section, object_id)
        number = _number_of(key)
        pieces = self._pieces(number)
        if pieces is None:
            return None
        self._levels = self._levels or _levels(self.head.piece_hashes)
        nodes = tuple(_children(self._levels[level], number // FANOUT ** (level + 1)) for level in range(LEVEL_COUNT))
        # The last piece that begins at or before the key, and the next one if the key is behind all that this one has.
        first = max(bisect_right(pieces, key, key=lambda piece: _piece_keys(piece)[0]) - 1, 0)
        end = first + (2 if pieces and _piece_keys(pieces[first])[-1] < key else 1)
        return ItemProof(first, pieces[first:end], self.head.piece_hashes[number], nodes)

    def _pieces(self, number: int) -> tuple[bytes, ...] | None:
        """Of a bucket; None if the store has another one than the head says: nobody shall blame us for it."""
        pieces = split_bucket(self._read_bucket(number))
        return pieces if b"".join(map(_piece_hash, pieces)) == self.head.piece_hashes[number] else None


class SnapshotAssembly:
    """Puts a snapshot together from many peers.

    The owner keeps as many ranges under way as it has peers, gives each answer to `take`, writes the buckets that come out
    to its store at once, and after a restart, or when the peers have moved on to a newer checkpoint, begins a new assembly
    with what the store holds: only what is missing or differs is fetched.
    """

    __slots__ = ("_first_of", "_gathered", "_gathered_count", "_state", "head", "kept")

    _MISSING, _ASKED, _HELD = 0, 1, 2

    def __init__(self, head: SnapshotHead, *, held: Iterable[tuple[int, bytes]] = ()) -> None:
        """Begin with a head that `parse_snapshot_head` accepted.

        Args:
          head: what is to be fetched.
          held: (number, content) of buckets that are here already, of whatever state.
        """
        self.head = head
        self._first_of = _first_pieces(head)
        self._state = bytearray(self._first_of[-1])
        self._gathered: dict[int, bytes] = {}
        """Pieces of buckets that are not complete yet."""
        self._gathered_count: dict[int, int] = {}
        kept = set()
        for number, content in held:
            if b"".join(map(_piece_hash, split_bucket(content))) == head.piece_hashes[number]:
                kept.add(number)
                first, end = self._first_of[number], self._first_of[number + 1]
                self._state[first:end] = bytes([self._HELD]) * (end - first)
        self.kept = frozenset(kept)
        """Buckets among those held that are right. All others are replaced by what `take` returns, or else are empty."""

    @property
    def is_complete(self) -> bool:
        """Whether every bucket was kept or has come out of `take`."""
        return self._state.count(self._HELD) == len(self._state)

    def wanted(self, count: int) -> tuple[SnapshotRange, ...]:
        """Up to so many ranges to ask peers for; each is then under way until `take` or `give_back`."""
        ranges: list[SnapshotRange] = []
        at = self._state.find(self._MISSING)
        while at >= 0 and len(ranges) < count:
            end = at
            while end < min(at + CHUNK_PIECE_COUNT_MAX, len(self._state)) and self._state[end] == self._MISSING:
                self._state[end] = self._ASKED
                end += 1
            ranges.append(SnapshotRange(self.head.height, at, end - at))
            at = self._state.find(self._MISSING, end)
        return tuple(ranges)

    def give_back(self, asked: SnapshotRange) -> None:
        """No answer came: the range is wanted again."""
        for at in range(asked.first, asked.first + asked.count):
            if self._state[at] == self._ASKED:
                self._state[at] = self._MISSING

    def take(self, asked: SnapshotRange, chunk: SnapshotChunk) -> tuple[tuple[int, bytes], ...]:
        """Check and keep an answer; what it leaves open is wanted again, from whomever.

        Returns:
          (number, content) of the buckets that are now complete.

        Raises:
          DecodeError: the answer is not to this question or a piece is wrong, by the fault of the peer that sent it.
            Nothing of it is kept.
        """
        try:
            return self._take(asked, chunk)
        finally:
            self.give_back(asked)

    def _take(self, asked: SnapshotRange, chunk: SnapshotChunk) -> tuple[tuple[int, bytes], ...]:
        if (chunk.height, chunk.first) != (asked.height, asked.first) or len(chunk.pieces) not in range(1, asked.count + 1):
            raise DecodeError("snapshot chunk: not what was asked for")
        # All before any: so no bucket is completed by a chunk that is refused.
        for at, piece in enumerate(chunk.pieces, start=chunk.first):
            number = bisect_right(self._first_of, at) - 1
            if _piece_hash(piece) != _hash_at(self.head.piece_hashes[number], at - self._first_of[number]):
                raise DecodeError(f"snapshot chunk: piece {at} has another hash")
        complete = []
        for at, piece in enumerate(chunk.pieces, start=chunk.first):
            if self._state[at] == self._HELD:
                continue
            self._state[at], self._gathered[at] = self._HELD, piece
            number = bisect_right(self._first_of, at) - 1
            self._gathered_count[number] = self._gathered_count.get(number, 0) + 1
            first, end = self._first_of[number], self._first_of[number + 1]
            if self._gathered_count[number] == end - first:
                complete.append((number, _join([self._gathered.pop(n) for n in range(first, end)])))
        return tuple(complete)


def split_bucket(content: bytes) -> tuple[bytes, ...]:
    """The pieces of a bucket.

    Raises:
      DecodeError: not a bucket's content.
    """
    if not content:
        return ()
    if len(content) <= PIECE_SIZE_BYTES:
        return (content,)
    return tuple(map(_array, _cut([_item_bytes(item) for item in decode(content, tuple[Item, ...], what="bucket")])))


def _join(pieces: Sequence[bytes]) -> bytes:
    """The content of a bucket from all its pieces."""
    if len(pieces) == 1:
        return pieces[0]
    return _array([_item_bytes(item) for piece in pieces for item in decode(piece, tuple[Item, ...], what="piece")])


def _first_pieces(head: SnapshotHead) -> list[int]:
    """The number of each bucket's first piece, and behind the last bucket the count of all pieces."""
    return [0, *accumulate(len(hashes) // HASH_SIZE_BYTES for hashes in head.piece_hashes)]


def _cut(items: Sequence[bytes]) -> list[list[bytes]]:
    """Runs of items: a new one begins with the item that would make the old one larger than 32 KiB."""
    runs: list[list[bytes]] = []
    room = 0
    for item in items:
        if len(item) > room or not runs:
            runs.append([])
            room = PIECE_SIZE_BYTES
        runs[-1].append(item)
        room -= len(item)
    return runs


# ── encoding: by hand where it is done for every item ───────────────────────────────────────────────────────────────


def _bytes_of(encoded: bytes) -> bytes:
    """What an encoded byte string of ours holds: the inverse of `item_head(BYTES, …)` and content."""
    width = {24: 2, 25: 3, 26: 5}.get(encoded[0] & 0x1F, 1)
    return encoded[width:]


@lru_cache(maxsize=PLACE_CACHE_COUNT_MAX)
def _place_of(section: str, object_id: str) -> tuple[bytes, int]:
    """How the item's encoding begins, and its bucket."""
    key = _key_bytes(section, object_id)
    return key, _number_of(key)


def _key_bytes(section: str, object_id: str) -> bytes:
    """How the encoding of an item with this key begins."""
    one, other = section.encode(), object_id.encode()
    return b"".join((item_head(ARRAY, 3), item_head(TEXT, len(one)), one, item_head(TEXT, len(other)), other))


def _piece_keys(piece: bytes) -> list[bytes]:
    return [_key_bytes(item.section, item.id) for item in decode(piece, tuple[Item, ...], what="piece")]


def _item_bytes(item: Item) -> bytes:
    return _key_bytes(item.section, item.id) + item_head(BYTES, len(item.value)) + item.value


def _number_of(key: bytes) -> int:
    digest = hashlib.sha256(item_head(ARRAY, 2) + key[1:]).digest()
    return digest[0] << 4 | digest[1] >> 4


def _array(items: Sequence[bytes]) -> bytes:
    """A CBOR array of encoded items; no bytes for none."""
    return b"".join((item_head(ARRAY, len(items)), *items)) if items else b""


def _piece_hash(piece: bytes) -> bytes:
    return hashlib.sha256(_PIECE + piece).digest()


def _leaf_hash(number: int, piece_hashes: bytes) -> bytes:
    return hashlib.sha256(_LEAF + number.to_bytes(2, "big") + piece_hashes).digest()


def _node_hash(children: bytes) -> bytes:
    return hashlib.sha256(_NODE + children).digest()


def _children(level: Sequence[bytes], parent: int) -> bytes:
    return b"".join(level[parent * FANOUT : (parent + 1) * FANOUT])


def _levels(piece_hashes: Sequence[bytes]) -> list[list[bytes]]:
    """The hashes of a tree: leaves, two levels of nodes, the root."""
    levels = [[_leaf_hash(number, hashes) for number, hashes in enumerate(piece_hashes)]]
    while len(levels[-1]) > 1:
        levels.append([_node_hash(_children(levels[-1], parent)) for parent in range(len(levels[-1]) // FANOUT)])
    return levels


def _hash_at(hashes: bytes, at: int) -> bytes:
    return hashes[at * HASH_SIZE_BYTES : (at + 1) * HASH_SIZE_BYTES]


def _check_hashes(hashes: bytes) -> None:
    if len(hashes) % HASH_SIZE_BYTES:
        raise DecodeError("piece hashes: not a multiple of 32 bytes")
