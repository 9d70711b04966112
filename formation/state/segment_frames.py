"""Frames of the journal: what a commit looks like in a segment file, and how its end is judged after a crash. Pure.

    segment   header sector (512 bytes), frames, zeros up to the end of the file (it is preallocated)
    frame     mark, payload length, LSN, count of records, CRC-32 of the payload, CRC-32 of this header | records | 0xA5
    record    kind, length of the lane, mask, length of the body, seq, CRC-32 of all this | lane | body

One commit is one frame, and the next is written only when the one before was synced. So a crash leaves at most one frame
that is not whole, and its 512-byte sectors are each as written or as they were: zero. That tells a torn write from a
damaged one, if no written sector is ever all zero:
(1) A frame begins with its segment's mark, whose sector holds the whole frame header, and ends with 0xA5; a record begins
    with its kind, which is not 0. A body with a long run of zeros is stored XOR a mask byte that leaves none. (Only a body
    with a run of each of the 256 bytes can't be mended so; it could hide a flipped bit in the last commit before a crash.)
(2) A frame that fails its CRC is *torn* if one of its sectors is zero and no whole frame stands behind it. Otherwise it
    is *damaged*: it had been acknowledged, and somebody must be told.
The mark is 8 random bytes, and CRCs are seeded with 8 more, both from the segment's header: nobody who gets a block into the
journal can make its bytes look like a frame, and frames of a file that lay in the same place on disk before don't count.

What a disk that lies about syncs can do unseen: lose the newest frames, all of them to the end. A lost frame before a whole
one is seen, and so is a frame cut inside, unless it is the last.
Sources: Mohan et al. 1992, "ARIES" (LSNs); Pillai et al. 2014, "All File Systems Are Not Created Equal" (what survives);
Alagappan et al. 2018, "Protocol-Aware Recovery" (damage must not pass for a torn tail).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from struct import Struct
from zlib import crc32

from formation.state.store import Record, check_record

# What disks write whole. Larger physical sectors tear at this grain at worst.
SECTOR_SIZE_BYTES = 512
SEGMENT_VERSION = 1
_SEGMENT_MAGIC = b"FORMJRNL"
# magic, version, network id, generation, number, first LSN, size of the file, salt; zeros and a CRC fill the sector.
_SEGMENT = Struct("<8sI32sQQQQ16s")
SALT_SIZE_BYTES = 16
MARK_SIZE_BYTES = 8

# mark, payload length, LSN, count of records, CRC of the payload with its end byte, CRC of the header.
_FRAME = Struct("<8sIQIII")
_FRAME_END = b"\xa5"
# kind, length of the lane, mask, 0, length of the body, seq, CRC.
_RECORD = Struct("<BBBxIQI")
_RECORD_CRC_OFFSET = 16
# A frame is built in memory, and lengths have 32 bits. Callers stay far below: a voter commits some MiB at once.
FRAME_SIZE_MAX_BYTES = 1 << 30
# Shorter than a sector by more than all of a record that can be zero besides its body (18 bytes of header, a lane).
_RUN_SIZE_BYTES = SECTOR_SIZE_BYTES - 72
_ZERO_RUN = bytes(_RUN_SIZE_BYTES)
# Read at once when looking for the end of a segment.
_WINDOW_SIZE_BYTES = 1 << 20
_ZERO_WINDOW = bytes(_WINDOW_SIZE_BYTES)

Read = Callable[[int, int], bytes]
"""(offset, size) -> bytes of one segment file; fewer at its end."""


class FrameError(Exception):
    """Bytes that are not what was written; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What only frames of one segment have."""

    start: bytes
    """Their first 8 bytes."""
    seed: int
    """Of their CRCs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """First sector of a segment file."""

    network_id: bytes
    generation: int
    """Of the checkpoint that it begins after."""
    number: int
    first_lsn: int
    size_bytes: int
    salt: bytes

    def encode(self) -> bytes:
        """One sector."""
        head = _SEGMENT.pack(
            _SEGMENT_MAGIC,
            SEGMENT_VERSION,
            self.network_id,
            self.generation,
            self.number,
            self.first_lsn,
            self.size_bytes,
            self.salt,
        ).ljust(SECTOR_SIZE_BYTES - 4, b"\0")
        return head + crc32(head).to_bytes(4, "little")

    @property
    def mark(self) -> Mark:
        """Of all its frames."""
        return Mark(self.salt[:MARK_SIZE_BYTES], crc32(self.salt[MARK_SIZE_BYTES:]))


def decode_segment_header(sector: bytes) -> SegmentHeader:
    """The header in a file's first sector.

    Raises:
      FrameError: it is none, or of another version.
    """
    head, checksum = sector[:-4], sector[-4:]
    if len(sector) != SECTOR_SIZE_BYTES or crc32(head).to_bytes(4, "little") != checksum:
        raise FrameError("its header is damaged")
    magic, version, network_id, generation, number, first_lsn, size_bytes, salt = _SEGMENT.unpack_from(head)
    if magic != _SEGMENT_MAGIC or version != SEGMENT_VERSION:
        raise FrameError(f"it is no segment of version {SEGMENT_VERSION}")
    return SegmentHeader(
        network_id=network_id, generation=generation, number=number, first_lsn=first_lsn, size_bytes=size_bytes, salt=salt
    )


# ── records ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode_record(record: Record) -> bytes:
    """A record as it stands in a frame, without a run of zeros that could fill a sector."""
    lane, body = record.lane, record.body
    check_record(record)
    mask = _mask_of(body)
    if mask:
        body = body.translate(_XOR[mask])
    head = _RECORD.pack(record.kind, len(lane), mask, len(body), record.seq, 0)[:_RECORD_CRC_OFFSET]
    return b"".join((head, crc32(body, crc32(lane, crc32(head))).to_bytes(4, "little"), lane, body))


def decode_record(raw: bytes, offset: int = 0) -> tuple[Record, int]:
    """The record at an offset, and where the next begins.

    Raises:
      FrameError: it is not what was written.
    """
    start = offset + _RECORD.size
    if start > len(raw):
        raise FrameError("a record is cut off")
    kind, lane_size_bytes, mask, size_bytes, seq, checksum = _RECORD.unpack_from(raw, offset)
    at = start + lane_size_bytes
    lane, body = raw[start:at], raw[at : at + size_bytes]
    if checksum != crc32(body, crc32(lane, crc32(raw[offset : offset + _RECORD_CRC_OFFSET]))) or len(body) != size_bytes:
        raise FrameError("a record is not what was written")
    if mask:
        body = body.translate(_XOR[mask])
    return Record(kind, body, lane, seq), at + size_bytes


def _mask_of(body: bytes) -> int:
    """0 if the body has no long run of zeros; else a byte of which it has none."""
    if _ZERO_RUN not in body:
        return 0
    return next((mask for mask in range(1, 256) if bytes([mask]) * _RUN_SIZE_BYTES not in body), 0)


_XOR = tuple(bytes(value ^ mask for value in range(256)) for mask in range(256))


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame."""

    offset: int
    lsn: int
    count: int
    payload: bytes
    """Encoded records."""

    @property
    def next_offset(self) -> int:
        """Where the next frame begins."""
        return next_offset(self.offset, len(self.payload))

    def records(self) -> Iterator[tuple[int, int, Record]]:
        """(offset in the file, size, record).

        Raises:
          FrameError: a record is not what was written.
        """
        at, start = 0, records_offset(self.offset)
        for _ in range(self.count):
            record, end = decode_record(self.payload, at)
            yield start + at, end - at, record
            at = end


def records_offset(offset: int) -> int:
    """Where the first record of the frame at an offset begins."""
    return offset + _FRAME.size


def next_offset(offset: int, payload_size_bytes: int) -> int:
    """Where the frame after this one begins: right behind it, or where its whole header is in one sector."""
    end = offset + _FRAME.size + payload_size_bytes + len(_FRAME_END)
    left = -end % SECTOR_SIZE_BYTES
    return end + left if left < _FRAME.size else end


def frame_size_bytes(records: Sequence[bytes]) -> int:
    """Of a frame of encoded records."""
    return _FRAME.size + sum(map(len, records)) + len(_FRAME_END)


def encode_frame(records: Sequence[bytes], *, lsn: int, mark: Mark) -> bytes:
    """A frame of encoded records."""
    size_bytes = sum(map(len, records))
    assert size_bytes <= FRAME_SIZE_MAX_BYTES
    checksum = mark.seed
    for record in (*records, _FRAME_END):
        checksum = crc32(record, checksum)
    head = _FRAME.pack(mark.start, size_bytes, lsn, len(records), checksum, 0)[:-4]
    return b"".join((head, crc32(head, mark.seed).to_bytes(4, "little"), *records, _FRAME_END))


def read_frame(read: Read, offset: int, *, mark: Mark) -> Frame | None:
    """The frame at an offset if it is whole."""
    header = _read_frame_header(read, offset, mark=mark)
    if header is None:
        return None
    size_bytes, lsn, count, checksum = header
    raw = read(offset + _FRAME.size, size_bytes + len(_FRAME_END))
    if len(raw) != size_bytes + len(_FRAME_END) or crc32(raw, mark.seed) != checksum:
        return None
    return Frame(offset, lsn, count, raw[:size_bytes])


def _read_frame_header(read: Read, offset: int, *, mark: Mark) -> tuple[int, int, int, int] | None:
    """(payload length, LSN, count, CRC of the payload) if there is a header."""
    head = read(offset, _FRAME.size)
    if len(head) != _FRAME.size or not head.startswith(mark.start):
        return None
    _, size_bytes, lsn, count, checksum, head_checksum = _FRAME.unpack(head)
    return (size_bytes, lsn, count, checksum) if crc32(head[:-4], mark.seed) == head_checksum else None


# ── the end of a segment ────────────────────────────────────────────────────────────────────────────────────────────


class End(Enum):
    """What stands where no whole frame is."""

    CLEAN = "zeros"
    TORN = "a write that a crash cut off"
    DAMAGED = "something that was written whole and is not any more"


@dataclass(frozen=True, slots=True)
class Tail:
    """Verdict on the rest of a segment."""

    end: End
    dirty_end: int
    """Behind the last byte that is not zero."""
    why: str = ""


def judge_tail(read: Read, offset: int, size_bytes: int, *, mark: Mark) -> Tail:
    """What the part of a segment is in which no whole frame stands at `offset`."""
    dirty_end = _dirty_end(read, offset, size_bytes)
    if dirty_end == offset:
        return Tail(End.CLEAN, offset)
    behind = _frame_behind(read, offset, dirty_end, mark=mark)
    if behind is not None:
        return Tail(End.DAMAGED, dirty_end, f"a later commit stands whole at offset {behind}")
    sector_end = offset + (-offset % SECTOR_SIZE_BYTES or SECTOR_SIZE_BYTES)
    if not any(read(offset, sector_end - offset)):
        return Tail(End.TORN, dirty_end)
    header = _read_frame_header(read, offset, mark=mark)
    if header is None:
        return Tail(End.DAMAGED, dirty_end, "its header was written, and is not what was written")
    frame_end = offset + _FRAME.size + header[0] + len(_FRAME_END)
    if frame_end > size_bytes or dirty_end > frame_end:
        return Tail(End.DAMAGED, dirty_end, "it is not followed by unused space")
    for at in range(sector_end, frame_end, SECTOR_SIZE_BYTES):
        if not any(read(at, min(SECTOR_SIZE_BYTES, frame_end - at))):
            return Tail(End.TORN, dirty_end)
    return Tail(End.DAMAGED, dirty_end, "it was written to the end, and is not what was written")


def _dirty_end(read: Read, offset: int, size_bytes: int) -> int:
    end = offset
    for at in range(offset, size_bytes, _WINDOW_SIZE_BYTES):
        window = read(at, min(_WINDOW_SIZE_BYTES, size_bytes - at))
        if window != _ZERO_WINDOW[: len(window)]:
            end = at + len(window.rstrip(b"\0"))
    return end


def _frame_behind(read: Read, offset: int, dirty_end: int, *, mark: Mark) -> int | None:
    """Offset of the first whole frame behind an offset."""
    for start in range(offset, dirty_end, _WINDOW_SIZE_BYTES):
        # One mark longer, so that none is missed between two windows.
        window = read(start, _WINDOW_SIZE_BYTES + MARK_SIZE_BYTES - 1)
        at = window.find(mark.start)
        while at >= 0:
            if start + at > offset and read_frame(read, start + at, mark=mark) is not None:
                return start + at
            at = window.find(mark.start, at + 1)
    return None
