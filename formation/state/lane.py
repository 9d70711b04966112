"""Blocks: what a node signs, and what any replica checks of one block by itself.

Every node incarnation appends signed blocks to its own hash chain, its lane. A lane id is the node's 32-byte key and a
10-byte incarnation (8 bytes HLC at process start, 2 random bytes), so an unclean restart or a cloned disk opens another
lane instead of signing two blocks with one number. A block's hash is SHA-256 of the COSE_Sign1 bytes as received.
How blocks join a chain is `chain.py`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NewType

import msgspec

from formation.core.codec import (
    HASH_SIZE_BYTES,
    Context,
    Hash,
    Sign,
    Signed,
    Verify,
    convert,
    decode,
    decode_arrays,
    decode_own,
    encode,
    encode_arrays,
    encode_plain,
    parse_signed,
    sha256,
    sign_value,
    signature_holds,
)
from formation.core.errors import DecodeError
from formation.core.event import Topic
from formation.core.ids import PUBLIC_KEY_SIZE_BYTES, NetworkId
from formation.state.op import OP_SIZE_MAX_BYTES, has_no_order

if TYPE_CHECKING:
    from formation.state.judge import Judged

LaneId = NewType("LaneId", bytes)

INCARNATION_SIZE_BYTES = 10
LANE_ID_SIZE_BYTES = PUBLIC_KEY_SIZE_BYTES + INCARNATION_SIZE_BYTES
# design/state section 2; with the acknowledgement that may share its frame it stays under p2p's 320 KiB.
BLOCK_SIZE_MAX_BYTES = 256 * 1024
BLOCK_OP_COUNT_MAX = 1024
# Heads named by one block: twice a committee of 31; what does not fit is named by the next block.
DEPS_COUNT_MAX = 64
SEQ_MAX = (1 << 63) - 1
"""SQLite's integers end here; at 1,000 blocks a second a lane lasts 290 million years."""
NO_HASH = Hash(bytes(HASH_SIZE_BYTES))
"""`prev` of a lane's first block."""


class Head(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """One block named: array of three."""

    lane: bytes
    seq: int
    hash: bytes


class SpineRef(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A final height of the spine and its proposal's hash: array of two. The genesis is (0, network id)."""

    height: int
    hash: bytes


class Block(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What an author signs (context `block`): CBOR array of eight."""

    lane: bytes
    seq: int
    """From 1, without gaps."""
    prev: bytes
    """Hash of the block before; 32 zero bytes in the first."""
    hlc: int
    spine_ref: SpineRef
    deps: tuple[Head, ...]
    """Certified heads of other lanes that advanced since the author's last block."""
    kind: str
    """Topic: the one kind of event in this block, and its gossip topic."""
    ops: tuple[Any, ...]
    """Plain operations (see `op`)."""


@dataclass(slots=True, eq=False)
class Entry:
    """A block that decoded, with the bytes that carried it."""

    block: Block
    signed: Signed
    hash: Hash
    judged: tuple[Judged, ...] | None = field(default=None)
    """Its operations, decoded and judged by themselves, once, when somebody first looks."""

    @property
    def raw(self) -> bytes:
        """COSE_Sign1 bytes as received."""
        return self.signed.raw


class Evidence(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Two blocks of one lane and number, both signed by its key: array of two COSE_Sign1 byte strings."""

    one: bytes
    other: bytes


def lane_id(public_key: bytes, incarnation: bytes) -> LaneId:
    """The lane of one incarnation of a node."""
    assert len(public_key) == PUBLIC_KEY_SIZE_BYTES
    assert len(incarnation) == INCARNATION_SIZE_BYTES
    return LaneId(public_key + incarnation)


def make_incarnation(hlc: int, random_bits: int) -> bytes:
    """10 bytes: big-endian HLC at process start, then 16 random bits."""
    return hlc.to_bytes(8, "big") + random_bits.to_bytes(2, "big")


def lane_key(lane: bytes) -> bytes:
    """The 32-byte key of the lane's author."""
    return lane[:PUBLIC_KEY_SIZE_BYTES]


def lane_incarnation(lane: bytes) -> bytes:
    """The 10-byte incarnation; newer ones compare higher."""
    return lane[PUBLIC_KEY_SIZE_BYTES:]


def sign_block(sign: Sign, block: Block, *, network_id: NetworkId) -> Entry:
    """A block of our own, read back from its bytes: what we fold must be what everybody else reads there."""
    payload = encode_arrays(block) if all(map(has_no_order, block.ops)) else encode(block)
    signed = sign_value(sign, Context.BLOCK, network_id=network_id, payload=payload)
    # We have just written it in the one form that there is.
    return Entry(convert(decode_own(signed.payload), Block, what="block"), signed, sha256(signed.raw))


def parse_block(raw: bytes, *, network_id: NetworkId) -> Entry:
    """A block from a peer, checked for everything but its signature and its place in the chain.

    Raises:
      DecodeError: too large, not a block, or a field out of its bounds.
    """
    if len(raw) > BLOCK_SIZE_MAX_BYTES:
        raise DecodeError(f"block of {len(raw)} bytes, the limit is {BLOCK_SIZE_MAX_BYTES}")
    signed = parse_signed(raw)
    block = decode_arrays(signed.payload, Block)
    check_head(block.lane, block.seq, block.prev)
    if not 0 <= block.hlc < 1 << 64:
        raise DecodeError("block: hlc out of range")
    if block.hlc < int.from_bytes(lane_incarnation(block.lane)[:8], "big"):
        raise DecodeError("block: older than its lane")
    ref = block.spine_ref
    if ref.height not in range(SEQ_MAX + 1) or len(ref.hash) != HASH_SIZE_BYTES:
        raise DecodeError("block: spine_ref out of bounds")
    if ref.height == 0 and ref.hash != network_id:
        raise DecodeError("block: spine_ref is not the genesis of this network")
    if block.kind not in _KINDS:
        raise DecodeError("block: unknown kind")
    if len(block.deps) > DEPS_COUNT_MAX:
        raise DecodeError(f"block: {len(block.deps)} deps, the limit is {DEPS_COUNT_MAX}")
    for dep in block.deps:
        check_head(dep.lane, dep.seq, dep.hash)
        if dep.lane == block.lane:
            raise DecodeError("block: depends on its own lane")
    if len(block.ops) not in range(1, BLOCK_OP_COUNT_MAX + 1):
        raise DecodeError(f"block: {len(block.ops)} operations, allowed are 1 to {BLOCK_OP_COUNT_MAX}")
    if len(raw) > OP_SIZE_MAX_BYTES and max(len(encode_plain(op)) for op in block.ops) > OP_SIZE_MAX_BYTES:
        raise DecodeError(f"block: an operation above {OP_SIZE_MAX_BYTES} bytes")
    return Entry(block, signed, sha256(raw))


def check_head(lane: bytes, seq: int, hash_: bytes) -> None:
    """Refuse names that cannot be of a block.

    Raises:
      DecodeError: a length or number out of bounds.
    """
    if len(lane) != LANE_ID_SIZE_BYTES or not 0 < seq <= SEQ_MAX or len(hash_) != HASH_SIZE_BYTES:
        raise DecodeError("head: lane, number or hash out of bounds")


def block_signature_holds(verify: Verify, entry: Entry, *, network_id: NetworkId) -> bool:
    """Whether the lane's key signed this block for this network."""
    return signature_holds(verify, lane_key(entry.block.lane), entry.signed, Context.BLOCK, network_id=network_id)


def parse_evidence(verify: Verify, raw: bytes, *, network_id: NetworkId) -> tuple[Entry, Entry]:
    """Evidence of equivocation, fully checked.

    Raises:
      DecodeError: not evidence, or it proves nothing.
    """
    if len(raw) > 2 * BLOCK_SIZE_MAX_BYTES + 64:
        raise DecodeError("evidence: too large")
    value = decode(raw, Evidence)
    one, other = parse_block(value.one, network_id=network_id), parse_block(value.other, network_id=network_id)
    if (one.block.lane, one.block.seq) != (other.block.lane, other.block.seq) or one.hash == other.hash:
        raise DecodeError("evidence: not two blocks of one number")
    for entry in (one, other):
        if not block_signature_holds(verify, entry, network_id=network_id):
            raise DecodeError("evidence: a signature does not hold")
    return one, other


_KINDS = frozenset(topic.value for topic in Topic)
