"""Journal of the real store: preallocated segment files, one generation of them after each checkpoint.

    journal/0000000007.log      64 MiB, or as long as the one commit that is longer; see segment_frames.py for what is inside

A commit is one write and one fdatasync into space that is allocated already, so no sync changes a file's size, and a full
disk shows before a commit is begun. (Writing zeros first would spare the file system the marking of extents as written: a
commit of 100 kB took 0.12 instead of 0.20 ms, but each segment 30 to 60 ms, and every byte is written twice.)

A segment is made under another name, allocated, headed, synced, renamed, and its folder synced, before the first frame goes
in: what has the name is whole. A checkpoint writes the records that it keeps into segments of the next *generation*; the
database says which generation counts (disk.py), and at opening every other one is removed. So there is no moment at which
half a checkpoint is in force.

After a failed sync the kernel may have dropped the data and call the pages clean (Rebello et al. 2020, "Can Applications
Recover from fsync Failures?"), so nothing is tried again: the journal is broken until it is opened anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from formation.core.errors import HostError
from formation.state.disk_files import Files, host_error
from formation.state.lane_index import LaneIndex
from formation.state.segment_frames import (
    SALT_SIZE_BYTES,
    SECTOR_SIZE_BYTES,
    End,
    Frame,
    FrameError,
    Mark,
    SegmentHeader,
    decode_record,
    decode_segment_header,
    encode_frame,
    encode_record,
    frame_size_bytes,
    judge_tail,
    next_offset,
    read_frame,
    records_offset,
)
from formation.state.store import Record

# As etcd's: some minutes of a busy voter, and a small node can spare two of them during a checkpoint.
SEGMENT_SIZE_BYTES = 64 * 1024 * 1024
# A checkpoint's records go out in frames of about this size, so that no second copy of them all stands in memory.
CHECKPOINT_FRAME_SIZE_BYTES = 1024 * 1024
FIRST_GENERATION = 1
HINT_DAMAGED = "move {folder} away and start again: the node gets everything certified back from its peers"


@dataclass(slots=True)
class _Segment:
    path: Path
    fd: int
    header: SegmentHeader
    mark: Mark
    end: int = SECTOR_SIZE_BYTES
    """Where the next frame begins."""

    def read(self, offset: int, size: int) -> bytes:
        """Fewer at the end of the file."""
        data = os.pread(self.fd, size, offset)
        while 0 < len(data) < size and (more := os.pread(self.fd, size - len(data), offset + len(data))):
            data += more
        return data

    def has_room(self, size_bytes: int) -> bool:
        """For a frame of that size."""
        return self.end + size_bytes <= self.header.size_bytes


Placed = tuple[bytes, int, int, int, int]
"""(lane, seq, number of the segment, offset, size) of a record."""


class Generation:
    """What was journalled since one checkpoint: the records that it kept, then every commit."""

    def __init__(self, folder: Path, files: Files, number: int, network_id: bytes, segment_size_bytes: int) -> None:
        self.number = number
        self.segments: dict[int, _Segment] = {}
        self.index = LaneIndex()
        self.lsn = 1
        self._folder = folder
        self._files = files
        self._network_id = network_id
        self._segment_size_bytes = segment_size_bytes
        self._broken = False

    @property
    def frame_count(self) -> int:
        """Of all that is in it."""
        return self.lsn - 1

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, records: Sequence[Record]) -> list[Placed]:
        """One frame of records, not yet synced. Returns what to put in the index once it is.

        Raises:
          HostError: nothing was kept; or the journal is broken.
        """
        self.refuse_if_broken()
        encoded = [encode_record(record) for record in records]
        segment = self._segment_for(frame_size_bytes(encoded))
        frame = encode_frame(encoded, lsn=self.lsn, mark=segment.mark)
        try:
            self._files.write(segment.fd, frame, segment.end)
        except OSError as exc:
            self._undo(segment, len(frame))
            raise host_error(segment.path, exc) from exc
        placed: list[Placed] = []
        at = records_offset(segment.end)
        for record, raw in zip(records, encoded, strict=True):
            if record.lane:
                placed.append((record.lane, record.seq, segment.header.number, at, len(raw)))
            at += len(raw)
        segment.end, self.lsn = next_offset(segment.end, at - records_offset(segment.end)), self.lsn + 1
        return placed

    def sync(self) -> None:
        """Have the newest segment on disk.

        Raises:
          HostError: nobody knows what is; the journal is broken.
        """
        self.refuse_if_broken()
        segment = self._newest()
        try:
            self._files.sync(segment.fd)
        except OSError as exc:
            self.break_off()
            raise HostError(
                f"state store {segment.path} cannot be synced: {exc.strerror}; what it holds is not known",
                hint="look at the disk (dmesg), then start the node again",
            ) from exc

    def add_to_index(self, placed: Iterable[Placed]) -> None:
        """Make records findable."""
        for lane, seq, segment, offset, size_bytes in placed:
            self.index.put(lane, seq, segment=segment, offset=offset, size_bytes=size_bytes)

    def break_off(self) -> None:
        """Refuse everything from now on: what is on disk is not known."""
        self._broken = True

    def add_segment(self, first_number: int, size_bytes: int = 0) -> _Segment:
        """A new, empty segment; whole and durable before it has its name.

        Args:
          first_number: for the first segment of a generation.
          size_bytes: of the frame that must fit.

        Raises:
          HostError: there is none; nothing else changed.
        """
        number = max(self.segments) + 1 if self.segments else first_number
        path = self._folder / f"{number:010}.log"
        size_bytes = max(self._segment_size_bytes, SECTOR_SIZE_BYTES + size_bytes)
        header = SegmentHeader(
            network_id=self._network_id,
            generation=self.number,
            number=number,
            first_lsn=self.lsn,
            size_bytes=size_bytes,
            salt=os.urandom(SALT_SIZE_BYTES),
        )
        unfinished = path.with_suffix(".new")
        fd = -1
        try:
            fd = self._files.create(unfinished, size_bytes)
            self._files.write(fd, header.encode(), 0)
            self._files.sync(fd)
            self._files.rename(unfinished, path)
        except OSError as exc:
            self._forget(unfinished, fd)
            raise host_error(path, exc) from exc
        try:
            self._files.sync_folder(self._folder)
        except OSError as exc:
            # It may be there after a crash, and then its first LSN must still be the next.
            self.break_off()
            os.close(fd)
            raise host_error(path, exc) from exc
        segment = self.segments[number] = _Segment(path, fd, header, header.mark)
        return segment

    def _forget(self, unfinished: Path, fd: int) -> None:
        if fd >= 0:
            os.close(fd)
        try:
            self._files.remove(unfinished)
        except OSError:
            # The next attempt takes its place, the next opening removes it.
            return

    def _segment_for(self, size_bytes: int) -> _Segment:
        segment = self._newest()
        if segment.has_room(size_bytes):
            return segment
        # What stands in the old one must be safe before a later frame can be: commits are, a checkpoint's frames are not.
        self.sync()
        return self.add_segment(0, size_bytes)

    def _newest(self) -> _Segment:
        return self.segments[max(self.segments)]

    def _in_order(self) -> list[_Segment]:
        return [self.segments[number] for number in sorted(self.segments)]

    def _undo(self, segment: _Segment, size_bytes: int) -> None:
        """Wipe what a refused write may have left, so that it can't be mixed with the next."""
        try:
            self._files.write(segment.fd, bytes(size_bytes), segment.end)
            self._files.sync(segment.fd)
        except OSError:
            self._broken = True

    def refuse_if_broken(self) -> None:
        """Raise a HostError if an earlier failure left it unknown what is on disk."""
        if self._broken:
            raise HostError(
                f"state store {self._folder} failed before, and what it holds is not known",
                hint="look at the disk (dmesg), then start the node again",
            )

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _frames(self, segment: _Segment, lsn: int) -> Iterator[Frame]:
        """The whole frames of a segment, checked; the first has this LSN."""
        offset = SECTOR_SIZE_BYTES
        if segment.header.first_lsn != lsn:
            raise self._damage(segment, offset, f"it begins with commit {segment.header.first_lsn}, not {lsn}")
        while (frame := self._read_frame(segment, offset)) is not None:
            if frame.lsn != lsn:
                raise self._damage(segment, offset, f"it has commit {frame.lsn}, not {lsn}")
            yield frame
            offset, lsn = frame.next_offset, lsn + 1

    def _read_frame(self, segment: _Segment, offset: int) -> Frame | None:
        try:
            return read_frame(segment.read, offset, mark=segment.mark)
        except OSError as exc:
            raise host_error(segment.path, exc) from exc

    def records(self) -> Iterator[Record]:
        """Every record in order.

        Raises:
          HostError: damaged, with file and offset.
        """
        count = 0
        for segment in self._in_order():
            for frame in self._frames(segment, count + 1):
                count += 1
                for _, _, record in self._records_of(segment, frame):
                    yield record
        if count != self.frame_count:
            raise self._damage(self._newest(), 0, f"{self.frame_count - count} commits are gone since it was opened")

    def _records_of(self, segment: _Segment, frame: Frame) -> Iterator[tuple[int, int, Record]]:
        """See Frame.records; damage is a HostError."""
        try:
            yield from frame.records()
        except FrameError as exc:
            raise self._damage(segment, frame.offset, str(exc)) from exc

    def read_record(self, number: int, offset: int, size_bytes: int) -> Record:
        """The record at a place.

        Raises:
          HostError: damaged, with file and offset.
        """
        segment = self.segments[number]
        try:
            return decode_record(segment.read(offset, size_bytes))[0]
        except FrameError as exc:
            raise self._damage(segment, offset, str(exc)) from exc
        except OSError as exc:
            raise host_error(segment.path, exc) from exc

    def recover(self) -> list[str]:
        """Check every frame, build the index, wipe a torn tail, and have all of it on disk. Returns notes.

        The last frame may be there in the kernel's memory only, if a process was killed before its sync; who reads it takes
        it for stored.

        Raises:
          HostError: damaged, with file and offset.
        """
        notes: list[str] = []
        for segment in self._in_order():
            number = segment.header.number
            for frame in self._frames(segment, self.lsn):
                for offset, size_bytes, record in self._records_of(segment, frame):
                    if record.lane:
                        self.index.put(record.lane, record.seq, segment=number, offset=offset, size_bytes=size_bytes)
                segment.end, self.lsn = frame.next_offset, frame.lsn + 1
            notes += self._recover_tail(segment, is_newest=segment is self._newest())
        self.sync()
        return notes

    def is_unused(self, segment: _Segment) -> bool:
        """No frame was ever written to it.

        Raises:
          HostError: the disk refused.
        """
        try:
            tail = judge_tail(segment.read, SECTOR_SIZE_BYTES, segment.header.size_bytes, mark=segment.mark)
        except OSError as exc:
            raise host_error(segment.path, exc) from exc
        return tail.end is End.CLEAN

    def _recover_tail(self, segment: _Segment, *, is_newest: bool) -> list[str]:
        try:
            tail = judge_tail(segment.read, segment.end, segment.header.size_bytes, mark=segment.mark)
            if tail.end is End.CLEAN:
                return []
            if tail.end is End.DAMAGED or not is_newest:
                raise self._damage(segment, segment.end, tail.why or "commits follow in the next segment")
            for at in range(segment.end, tail.dirty_end, CHECKPOINT_FRAME_SIZE_BYTES):
                self._files.write(segment.fd, bytes(min(CHECKPOINT_FRAME_SIZE_BYTES, tail.dirty_end - at)), at)
        except OSError as exc:
            raise host_error(segment.path, exc) from exc
        size_bytes = tail.dirty_end - segment.end
        return [f"{segment.path}: {size_bytes} bytes at offset {segment.end} were cut off by a crash and are wiped"]

    def _damage(self, segment: _Segment, offset: int, why: str) -> HostError:
        return damage(segment.path, f"at offset {offset}: {why}")

    def close(self) -> None:
        """Give the files free."""
        for segment in self.segments.values():
            os.close(segment.fd)
        self.segments = {}


def damage(path: Path, why: str) -> HostError:
    """For files inside the store's folder or its journal."""
    folder = path.parent.parent if path.suffix == ".log" else path.parent
    return HostError(f"state store {path} is damaged: {why}", hint=HINT_DAMAGED.format(folder=folder))


class SegmentLog:
    """The journal: the generation in force, and for a moment the next one.

    Args:
      folder: exists.
      files: where writes go.
      segment_size_bytes: of new segments; below 4 GiB.
    """

    def __init__(self, folder: Path, files: Files, *, segment_size_bytes: int = SEGMENT_SIZE_BYTES) -> None:
        assert SECTOR_SIZE_BYTES < segment_size_bytes < 1 << 32
        self._folder = folder
        self._files = files
        self._segment_size_bytes = segment_size_bytes
        self._network_id = b""
        self._current: Generation | None = None
        self._next_number = 1

    @property
    def current(self) -> Generation:
        """The generation in force."""
        assert self._current is not None
        return self._current

    @property
    def size_bytes(self) -> int:
        """Taken on disk."""
        with os.scandir(self._folder) as entries:
            return sum(entry.stat().st_blocks * 512 for entry in entries)

    def create(self, network_id: bytes) -> Generation:
        """The first generation, empty; takes the place of one that was never used.

        Raises:
          HostError: there is a used one already, or the disk refused.
        """
        self._network_id = network_id
        unused = self._new_generation(FIRST_GENERATION)
        unused.segments = self._opened()
        try:
            for segment in unused.segments.values():
                if segment.header.generation != FIRST_GENERATION or not unused.is_unused(segment):
                    raise damage(
                        segment.path, "it is in use, and the database that says where the journal begins is new or lost"
                    )
                self._remove(segment.path)
        finally:
            unused.close()
        self._current = self._new_generation(FIRST_GENERATION)
        self._current.add_segment(self._next_number)
        return self._current

    def open(self, network_id: bytes, generation: int, frame_count: int) -> list[str]:
        """Take the generation in force, remove all others, repair a torn tail. Returns notes.

        Args:
          network_id: 32 bytes.
          generation: in force.
          frame_count: that it began with.

        Raises:
          HostError: damaged, or the disk refused.
        """
        self._network_id = network_id
        notes: list[str] = []
        current = self._current = self._new_generation(generation)
        others = []
        for number, segment in sorted(self._opened().items()):
            self._next_number = number + 1
            if segment.header.generation == generation:
                current.segments[number] = segment
            else:
                os.close(segment.fd)
                others.append(segment)
        numbers = list(current.segments)
        if not numbers:
            raise damage(
                self._folder / "*.log", f"no segment of generation {generation} is there, which the database counts on"
            )
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise damage(self._folder / "*.log", f"a segment between {numbers[0]} and {numbers[-1]} is missing")
        for segment in others:
            self._remove(segment.path)
            if segment.header.generation > generation:
                notes.append(f"{segment.path}: removed, of a checkpoint that a crash cut off")
        # A segment's name may be as unsafe as its last frame.
        self._sync_folder()
        notes += current.recover()
        if current.frame_count < frame_count:
            lost = frame_count - current.frame_count
            raise damage(self._folder / "*.log", f"{lost} frames of its checkpoint are gone: the disk lost what it had synced")
        return notes

    def begin(self, records: Iterable[Record]) -> Generation:
        """The next generation, beginning with these records: durable, and not yet in force.

        Raises:
          HostError: there is none; nothing else changed.
        """
        following = self._new_generation(self.current.number + 1)
        try:
            following.add_segment(self._next_number_after(self.current))
            chunk: list[Record] = []
            size_bytes = 0
            for record in records:
                chunk.append(record)
                size_bytes += len(record.body)
                if size_bytes >= CHECKPOINT_FRAME_SIZE_BYTES:
                    following.add_to_index(following.write(chunk))
                    chunk, size_bytes = [], 0
            if chunk:
                following.add_to_index(following.write(chunk))
            following.sync()
        except HostError:
            self.abandon(following)
            raise
        return following

    def switch(self, following: Generation) -> None:
        """Put the next generation in force and remove the one before.

        Must be durable before anything is committed: what is acknowledged from now on may not depend on the database
        remembering the switch while the old generation could pass for the one in force.

        Raises:
          HostError: the disk refused; the journal is broken.
        """
        old, self._current = self.current, following
        paths = [segment.path for segment in old.segments.values()]
        old.close()
        try:
            for path in paths:
                self._remove(path)
            self._sync_folder()
        except HostError:
            following.break_off()
            raise

    def abandon(self, following: Generation) -> None:
        """Forget a generation that never was in force; what can't be removed now goes at the next opening."""
        paths = [segment.path for segment in following.segments.values()]
        following.close()
        for path in paths:
            try:
                self._files.remove(path)
            except OSError:
                return

    def close(self) -> None:
        """Give the files free."""
        if self._current is not None:
            self._current.close()
            self._current = None

    def _new_generation(self, number: int) -> Generation:
        return Generation(self._folder, self._files, number, self._network_id, self._segment_size_bytes)

    def _next_number_after(self, generation: Generation) -> int:
        self._next_number = max(self._next_number, max(generation.segments) + 1)
        return self._next_number

    def _opened(self) -> dict[int, _Segment]:
        """Every segment in the folder by number; what never got its name is removed."""
        found: dict[int, _Segment] = {}
        try:
            for path in sorted(self._folder.glob("*.new")):
                self._files.remove(path)
            for path in sorted(self._folder.glob("*.log")):
                segment = self._open_segment(path)
                found[segment.header.number] = segment
        except BaseException as exc:
            for segment in found.values():
                os.close(segment.fd)
            if isinstance(exc, OSError):
                raise host_error(self._folder, exc) from exc
            raise
        return found

    def _open_segment(self, path: Path) -> _Segment:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            header = decode_segment_header(os.pread(fd, SECTOR_SIZE_BYTES, 0))
            if header.network_id != self._network_id:
                raise FrameError("it belongs to another network")
            if path.name != f"{header.number:010}.log":
                raise FrameError(f"it is segment {header.number}")
            if os.fstat(fd).st_size != header.size_bytes:
                raise FrameError(f"it has {os.fstat(fd).st_size} bytes, not {header.size_bytes}")
        except FrameError as exc:
            os.close(fd)
            raise damage(path, f"at offset 0: {exc}") from exc
        except BaseException:
            os.close(fd)
            raise
        return _Segment(path, fd, header, header.mark)

    def _remove(self, path: Path) -> None:
        try:
            self._files.remove(path)
        except OSError as exc:
            raise host_error(path, exc) from exc

    def _sync_folder(self) -> None:
        try:
            self._files.sync_folder(self._folder)
        except OSError as exc:
            raise host_error(self._folder, exc) from exc
