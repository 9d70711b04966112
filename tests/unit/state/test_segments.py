"""The journal: a torn end is told from damage, no flipped byte gives other records, and no file is missed."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from zlib import crc32

import pytest

from formation.core.errors import HostError
from formation.state import segment_frames, segments
from formation.state.disk import DiskStore
from formation.state.disk_files import Files
from formation.state.lane_index import LaneIndex
from formation.state.segment_frames import (
    SECTOR_SIZE_BYTES,
    End,
    FrameError,
    SegmentHeader,
    Tail,
    decode_record,
    decode_segment_header,
    encode_frame,
    encode_record,
    judge_tail,
    next_offset,
    read_frame,
    records_offset,
)
from formation.state.segments import Generation, SegmentLog
from formation.state.store import Record

NETWORK = b"n" * 32
LANE = b"l" * 42
SIZE_BYTES = 8192
HEADER = SegmentHeader(network_id=NETWORK, generation=3, number=7, first_lsn=1, size_bytes=SIZE_BYTES, salt=b"s" * 8 + b"t" * 8)
MARK = HEADER.mark
EVERY_RUN = b"".join(bytes([value]) * 1100 for value in range(256))


def reader(image: bytes | bytearray) -> Callable[[int, int], bytes]:
    return lambda offset, size: bytes(image[offset : offset + size])


def build(commits: list[list[Record]], size_bytes: int = SIZE_BYTES) -> tuple[bytes, list[int]]:
    """A segment's bytes, and where each frame begins; the last offset is the end."""
    image = bytearray(size_bytes)
    image[:SECTOR_SIZE_BYTES] = HEADER.encode()
    offsets = [SECTOR_SIZE_BYTES]
    for lsn, records in enumerate(commits, 1):
        encoded = [encode_record(record) for record in records]
        frame = encode_frame(encoded, lsn=lsn, mark=MARK)
        image[offsets[-1] : offsets[-1] + len(frame)] = frame
        offsets.append(next_offset(offsets[-1], sum(map(len, encoded))))
    assert len(image) == size_bytes
    return bytes(image), offsets


def scan(image: bytes | bytearray) -> tuple[list[list[Record]], Tail]:
    """What a segment holds, and the verdict on its end."""
    read, offset = reader(image), SECTOR_SIZE_BYTES
    commits: list[list[Record]] = []
    while (frame := read_frame(read, offset, mark=MARK)) is not None:
        assert frame.lsn == len(commits) + 1
        commits.append([record for _, _, record in frame.records()])
        offset = frame.next_offset
    return commits, judge_tail(read, offset, len(image), mark=MARK)


def some_commits(rng: Random, count: int) -> list[list[Record]]:
    bodies = (
        lambda: rng.randbytes(rng.randint(0, 900)),
        lambda: bytes(rng.randint(0, 1800)),
        lambda: bytes(rng.randint(300, 700)) + b"\1" * rng.randint(300, 700),
    )
    return [
        [
            Record(rng.randint(1, 255), rng.choice(bodies)(), rng.choice((b"", LANE, bytes(42))), i)
            for _ in range(rng.randint(1, 2))
        ]
        for i in range(count)
    ]


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_frames_give_back_what_was_written() -> None:
    """Any records, any sizes, with runs of zeros in them."""
    for seed in range(200):
        commits = some_commits(Random(seed), 3)
        image, _ = build(commits, 16384)
        assert scan(image) == (commits, Tail(End.CLEAN, scan(image)[1].dirty_end))


def test_a_header_never_lies_in_two_sectors() -> None:
    """So it is there as a whole or not at all."""
    for size_bytes in range(2000):
        offset = next_offset(SECTOR_SIZE_BYTES, size_bytes)
        assert offset % SECTOR_SIZE_BYTES <= SECTOR_SIZE_BYTES - 32
        assert 0 <= offset - (records_offset(SECTOR_SIZE_BYTES) + size_bytes + 1) < 32


def test_no_written_sector_is_all_zero() -> None:
    """That is how one that was not written is known."""
    for seed in range(300):
        image, offsets = build(some_commits(Random(seed), 3), 16384)
        last_byte = len(image.rstrip(b"\0"))
        for start, end in pairwise(offsets):
            frame_end = min(end, last_byte)
            cuts = [
                start,
                *range(start + SECTOR_SIZE_BYTES - start % SECTOR_SIZE_BYTES, frame_end, SECTOR_SIZE_BYTES),
                frame_end,
            ]
            for low, high in pairwise(cuts):
                # Between two frames there may be up to 31 unused bytes, less than what the first of them shares a sector with.
                assert any(image[low:high]) or high - low < 32


def test_the_zeros_check_can_fail() -> None:
    """Without the mask, a body of zeros is a sector of zeros; only a body with a run of every byte gets none."""
    assert segment_frames._mask_of(bytes(2000)) == 1
    assert segment_frames._mask_of(bytes(2000) + b"\1" * 2000) == 2
    assert segment_frames._mask_of(os.urandom(2000)) == 0
    assert segment_frames._mask_of(EVERY_RUN) == 0
    image, _ = build([[Record(1, EVERY_RUN)]], 1 << 19)
    assert any(not any(image[at : at + SECTOR_SIZE_BYTES]) for at in range(1024, 3072, SECTOR_SIZE_BYTES))


def test_every_torn_write_is_taken_for_one() -> None:
    """Whichever sectors of the last frame were not written: the frames before are there, and it is not."""
    for seed in range(400):
        rng = Random(seed)
        commits = some_commits(rng, rng.randint(1, 4))
        image, offsets = build(commits, 16384)
        before, _ = build(commits[:-1], 16384)
        first, end = offsets[-2] // SECTOR_SIZE_BYTES, -(-offsets[-1] // SECTOR_SIZE_BYTES)
        torn = bytearray(image)
        lost = [sector for sector in range(first, end) if rng.random() < 0.5] or [rng.randrange(first, end)]
        for sector in lost:
            at = slice(sector * SECTOR_SIZE_BYTES, (sector + 1) * SECTOR_SIZE_BYTES)
            torn[at] = before[at]
        found, tail = scan(torn)
        if torn == image:
            continue
        assert found == commits[:-1]
        assert tail.end is (End.CLEAN if torn == before else End.TORN)


@pytest.mark.parametrize("damage", ["bit", "invert", "zero"])
def test_every_flipped_byte_is_seen_or_harmless(damage: str) -> None:
    """At each offset of a segment: the same records, or damage. Never other records, and never fewer as if torn."""
    commits = [[Record(1, b"one" * 40, LANE, 1)], [Record(2, bytes(900))], [Record(3, os.urandom(300)), Record(4, b"last")]]
    image, offsets = build(commits, 4096)
    seen = 0
    for at in range(SECTOR_SIZE_BYTES, len(image)):
        flipped = bytearray(image)
        flipped[at] ^= {"bit": 1 << at % 8, "invert": 0xFF, "zero": image[at]}[damage]
        if flipped == image:
            continue
        found, tail = scan(flipped)
        if tail.end is End.DAMAGED:
            seen += 1
            continue
        assert found == commits, at
        assert at >= offsets[-1] or at + 32 > offsets[1]
    assert seen > 1300


def test_a_flip_in_the_last_frame_can_hide_in_a_sector_of_zeros() -> None:
    """The limit of rule 1: a body with long runs of every byte; so the test above can fail."""
    image, offsets = build([[Record(1, EVERY_RUN)]], 1 << 19)
    flipped = bytearray(image)
    flipped[offsets[-1] - 100] ^= 1
    assert scan(flipped)[1].end is End.TORN


def test_a_hole_before_a_whole_frame_is_damage() -> None:
    """Somebody acknowledged it: a disk that lied about an earlier sync, or lost a sector later."""
    commits = [[Record(1, os.urandom(2000))], [Record(2, os.urandom(2000))], [Record(3, b"x")]]
    image, offsets = build(commits)
    for start, end in ((offsets[0], offsets[1]), (offsets[1], offsets[1] + 700), (offsets[0] + 700, offsets[0] + 1500)):
        holed = image[:start] + bytes(end - start) + image[end:]
        found, tail = scan(holed)
        assert found == commits[: offsets.index(start) if start in offsets else 0]
        assert tail.end is End.DAMAGED
        assert "later commit" in tail.why


def test_bytes_of_a_body_do_not_pass_for_a_frame() -> None:
    """Whoever gets a block into the journal does not know the salt, so a torn write stays a torn write."""
    other = SegmentHeader(
        network_id=NETWORK, generation=3, number=7, first_lsn=1, size_bytes=SIZE_BYTES, salt=b"guessed salt ..."
    )
    forged = encode_frame([encode_record(Record(1, b"forged"))], lsn=2, mark=other.mark)
    image, offsets = build([[Record(1, b"x" * 700 + forged + b"y" * 1000)]])
    torn = image[: offsets[0]] + bytes(SECTOR_SIZE_BYTES) + image[offsets[0] + SECTOR_SIZE_BYTES :]
    assert forged in torn
    assert scan(torn)[1].end is End.TORN
    real = encode_frame([encode_record(Record(1, b"forged"))], lsn=2, mark=MARK)
    image, offsets = build([[Record(1, b"x" * 700 + real + b"y" * 1000)]])
    torn = image[: offsets[0]] + bytes(SECTOR_SIZE_BYTES) + image[offsets[0] + SECTOR_SIZE_BYTES :]
    assert scan(torn)[1].end is End.DAMAGED


def test_what_stands_behind_the_last_frame_is_judged() -> None:
    """Bytes in unused space were nobody's; if they join the frame's end, they are told."""
    image, offsets = build([[Record(1, b"x" * 100)]])
    far = bytearray(image)
    far[5000] = 1
    assert scan(far)[1] == Tail(End.TORN, 5001)
    near = bytearray(image)
    near[offsets[-1] + 5] = 1
    assert scan(near)[1].end is End.DAMAGED
    # A frame whose end does not fit into the file, or has something behind it.
    head = bytearray(image)
    head[records_offset(offsets[0]) + 30] ^= 1
    assert scan(head)[1].why.startswith("it was written to the end")
    head[3000] = 1
    assert scan(head)[1].why.startswith("it is not followed")


def test_a_damaged_segment_header_is_refused() -> None:
    """Every bit of the sector counts, and the version."""
    sector = HEADER.encode()
    assert decode_segment_header(sector) == HEADER
    for at in range(SECTOR_SIZE_BYTES):
        flipped = bytearray(sector)
        flipped[at] ^= 4
        with pytest.raises(FrameError):
            decode_segment_header(bytes(flipped))
    newer = bytearray(sector[:-4])
    newer[8] = 9
    with pytest.raises(FrameError, match="version"):
        decode_segment_header(bytes(newer) + crc32(newer).to_bytes(4, "little"))
    with pytest.raises(FrameError):
        decode_segment_header(sector[:100])


def test_a_record_that_is_not_what_was_written_is_refused() -> None:
    """Each byte of it counts, and its length."""
    raw = encode_record(Record(1, b"body" * 10, LANE, 5))
    assert decode_record(raw) == (Record(1, b"body" * 10, LANE, 5), len(raw))
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1
        # Byte 3 is unused and covered all the same.
        with pytest.raises(FrameError):
            decode_record(bytes(flipped))
        with pytest.raises(FrameError):
            decode_record(raw[:at])


# ── the index ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_index_is_a_map() -> None:
    """Against a dict: any order, gaps, repeats."""
    for seed in range(50):
        rng = Random(seed)
        index, oracle = LaneIndex(), {}
        span = rng.choice((10, 100, 1 << 63))
        for turn in range(300):
            lane, seq = bytes([rng.randrange(3)]) * 42, rng.randrange(span)
            for step in range(rng.randrange(4)):
                place = (turn, rng.randrange(1 << 32), rng.randrange(1 << 32))
                index.put(lane, min(seq + step, span - 1), segment=place[0], offset=place[1], size_bytes=place[2])
                oracle[lane, min(seq + step, span - 1)] = place
        for lane in (bytes([i]) * 42 for i in range(4)):
            seqs = [*range(10), *(seq for _, seq in oracle)]
            assert all(index.get(lane, seq) == oracle.get((lane, seq)) for seq in seqs)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with some segments, closed: commits 0 to 9 in three files."""
    store = DiskStore(tmp_path / "state", segment_size_bytes=SIZE_BYTES)
    store.open(NETWORK)
    for i in range(10):
        store.commit([Record(1, bytes([65 + i]) * 1800, LANE, i)])
    store.close()
    return tmp_path / "state"


def reopened(folder: Path) -> list[Record]:
    store = DiskStore(folder, segment_size_bytes=SIZE_BYTES)
    store.open(NETWORK)
    try:
        return list(store.load().records)
    finally:
        store.close()


def test_the_fixture_spans_files(folder: Path) -> None:
    """Or the tests below show nothing."""
    assert sorted(path.name for path in (folder / "journal").iterdir()) == [f"{i:010}.log" for i in (1, 2, 3)]
    assert [record.seq for record in reopened(folder)] == list(range(10))


def damage_of(folder: Path) -> str:
    with pytest.raises(HostError, match="damaged") as caught:
        reopened(folder)
    assert f"move {folder} away" in caught.value.hint
    assert "peers" in caught.value.hint
    return str(caught.value)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_damage_names_file_and_offset(folder: Path) -> None:
    """In any file, the last frame of one that is not the newest included."""
    path = folder / "journal" / "0000000001.log"
    original = path.read_bytes()
    overwrite(path, 600, b"!")
    assert f"{path} is damaged: at offset 512: a later commit" in damage_of(folder)
    # The last frame of the first file, to its end: nothing stands behind it there, but in the next file.
    path.write_bytes(original)
    fourth = original.index(b"D" * 1800) - 32 - 62
    overwrite(path, fourth, bytes(SIZE_BYTES - fourth))
    assert f"at offset {SECTOR_SIZE_BYTES}: it begins with commit 5, not 4" in damage_of(folder)
    overwrite(path, fourth + 700, b"!")
    assert "commits follow in the next segment" in damage_of(folder)


def test_a_torn_end_is_wiped_and_noted(folder: Path) -> None:
    """The note says where; the next opening finds nothing any more, and commits go on there."""
    path = folder / "journal" / "0000000003.log"
    image = path.read_bytes()
    end = len(image.rstrip(b"\0"))
    overwrite(path, end - 900, bytes(SECTOR_SIZE_BYTES * 2 - (end - 900) % SECTOR_SIZE_BYTES))
    store = DiskStore(folder, segment_size_bytes=SIZE_BYTES)
    store.open(NETWORK)
    (note,) = store.load().notes
    assert str(path) in note
    assert "cut off by a crash" in note
    assert [record.seq for record in store.load().records] == list(range(9))
    store.commit([Record(1, b"again", LANE, 9)])
    store.close()
    store.open(NETWORK)
    assert store.load().notes == ()
    assert store.read_blocks(LANE, first_seq=8, last_seq=99, size_max_bytes=10**6) == (b"I" * 1800, b"again")
    store.close()


def test_missing_and_foreign_files_are_seen(folder: Path) -> None:
    """A gap, a file cut short, renamed, of another network, or no header."""
    journal = folder / "journal"
    first, second = journal / "0000000001.log", journal / "0000000002.log"
    aside = folder / "aside"
    second.rename(aside)
    assert "a segment between 1 and 3 is missing" in damage_of(folder)
    image = aside.read_bytes()
    second.write_bytes(image[:-1])
    assert f"it has {SIZE_BYTES - 1} bytes, not {SIZE_BYTES}" in damage_of(folder)
    second.write_bytes(first.read_bytes())
    assert "it is segment 1" in damage_of(folder)
    second.write_bytes(image)
    first.rename(aside)
    assert "it begins with commit 5, not 1" in damage_of(folder)
    other = SegmentHeader(network_id=b"o" * 32, generation=1, number=1, first_lsn=1, size_bytes=SIZE_BYTES, salt=b"s" * 16)
    first.write_bytes(other.encode().ljust(SIZE_BYTES, b"\0"))
    assert "another network" in damage_of(folder)
    first.write_bytes(b"")
    assert "header is damaged" in damage_of(folder)
    for path in journal.iterdir():
        path.unlink()
    assert "no segment of generation 1" in damage_of(folder)


def test_a_flip_after_opening_is_not_served(folder: Path) -> None:
    """What a peer asks for is checked again when it is read, and so is what is loaded."""
    store = DiskStore(folder, segment_size_bytes=SIZE_BYTES)
    store.open(NETWORK)
    path = folder / "journal" / "0000000001.log"
    overwrite(path, path.read_bytes().index(b"BBB") + 5, b"!")
    assert len(store.read_blocks(LANE, first_seq=0, last_seq=0, size_max_bytes=1)) == 1
    with pytest.raises(HostError, match=r"damaged: at offset"):
        store.read_blocks(LANE, first_seq=0, last_seq=1, size_max_bytes=10**6)
    with pytest.raises(HostError, match=r"damaged: at offset"):
        list(store.load().records)
    overwrite(path, 512, bytes(SIZE_BYTES - 512))
    with pytest.raises(HostError, match="damaged"):
        list(store.load().records)
    store.close()


def test_commits_that_vanish_after_opening_are_missed(folder: Path) -> None:
    """Loading counts what opening counted."""
    store = DiskStore(folder, segment_size_bytes=SIZE_BYTES)
    store.open(NETWORK)
    path = folder / "journal" / "0000000003.log"
    overwrite(path, 512, bytes(SIZE_BYTES - 512))
    with pytest.raises(HostError, match="2 commits are gone"):
        list(store.load().records)
    store.close()


def test_generations_that_do_not_count_are_removed(folder: Path) -> None:
    """An unfinished checkpoint's files are noted; the files before a finished one are not worth a word."""
    files = Files()
    log = SegmentLog(folder / "journal", files, segment_size_bytes=SIZE_BYTES)
    assert log.open(NETWORK, 1, 0) == []
    following = log.begin([Record(9, b"kept")])
    following.close()
    log.close()
    assert [record.seq for record in reopened(folder)] == list(range(10))
    assert len(list((folder / "journal").iterdir())) == 3

    log.open(NETWORK, 1, 0)
    log.begin([Record(9, b"kept")]).close()
    log.close()
    assert log.open(NETWORK, 2, 0) == []
    assert list(log.current.records()) == [Record(9, b"kept")]
    assert len(list((folder / "journal").iterdir())) == 1
    log.close()
    log = SegmentLog(folder / "journal", files, segment_size_bytes=SIZE_BYTES)
    log.open(NETWORK, 2, 0)
    log.begin([]).close()
    log.close()
    (note,) = log.open(NETWORK, 2, 0)
    assert "a checkpoint that a crash cut off" in note
    log.close()


def test_a_checkpoint_that_lost_its_records_is_missed(folder: Path) -> None:
    """A disk that lied about the sync of a new generation: the database knows how much it began with."""
    store = DiskStore(folder, segment_size_bytes=SIZE_BYTES)
    store.open(NETWORK)
    store.checkpoint(b"", {}, [Record(1, b"x" * 5000, LANE, 9), Record(2, b"y")])
    store.close()
    (path,) = (folder / "journal").iterdir()
    image = path.read_bytes()
    overwrite(path, 512, bytes(SIZE_BYTES - 512))
    assert "1 frames of its checkpoint are gone" in damage_of(folder)
    path.write_bytes(image)
    assert len(reopened(folder)) == 2


def test_a_frame_in_the_place_of_another_is_damage(folder: Path) -> None:
    """A disk that writes a sector twice, or where it should not: the LSN says so."""
    path = folder / "journal" / "0000000003.log"
    mark = decode_segment_header(path.read_bytes()[:SECTOR_SIZE_BYTES]).mark
    frame = encode_frame([encode_record(Record(1, b"E" * 1800, LANE, 8))], lsn=10, mark=mark)
    overwrite(path, SECTOR_SIZE_BYTES, frame)
    assert "at offset 512: it has commit 10, not 9" in damage_of(folder)


def test_no_descriptor_is_left_open(folder: Path) -> None:
    """After errors as well, or a node that tries again and again runs out of them."""
    path = folder / "journal" / "0000000003.log"
    overwrite(path, 100, b"!")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        damage_of(folder)
    assert len(os.listdir("/proc/self/fd")) == before


class Unreadable(segments._Segment):
    """A file whose sectors can't be read."""

    def read(self, offset: int, size: int) -> bytes:
        raise OSError(5, "Input/output error")


def test_what_cannot_be_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error is a HostError with the file's name, wherever it happens."""
    monkeypatch.setattr(segments, "_Segment", Unreadable)
    with pytest.raises(HostError, match=r"0000000001\.log failed: Input/output") as caught:
        reopened(folder)
    assert "dmesg" in caught.value.hint
    generation = Generation(folder, Files(), 1, NETWORK, SIZE_BYTES)
    segment = Unreadable(folder / "x.log", -1, HEADER, MARK)
    generation.segments[7] = segment
    with pytest.raises(HostError, match="Input/output"):
        generation.read_record(7, 512, 100)
    with pytest.raises(HostError, match="Input/output"):
        generation.is_unused(segment)
    with pytest.raises(HostError, match="Input/output"):
        generation._recover_tail(segment, is_newest=True)
