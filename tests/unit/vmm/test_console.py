from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio

from formation.core.errors import UnavailableError
from formation.vmm.console import (
    FOLLOWER_COUNT_MAX,
    FOLLOWER_QUEUE_COUNT_MAX,
    LOG_SEGMENT_SIZE_MAX_BYTES,
    Console,
    FileLog,
    MemoryLog,
    last_lines,
)


async def nowhere(_: bytes) -> None:
    await trio.lowlevel.checkpoint()


def test_log_is_bounded_and_keeps_the_last(tmp_path: Path) -> None:
    """A guest that prints without end fills two segments, no more, and the last words stay."""
    log = FileLog(tmp_path)
    for index in range(80):
        log.append(b"%d" % (index % 10) * 65536)
    log.append(b"\nlast\n")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * LOG_SEGMENT_SIZE_MAX_BYTES
    assert log.read_tail(1) == b"last\n"


def test_last_lines() -> None:
    """Lines are counted from the end; an unfinished one counts."""
    assert last_lines(b"a\nb\nc", 2) == b"b\nc"
    assert last_lines(b"a\nb\nc\n", 2) == b"b\nc\n"
    assert last_lines(b"a\nb\n", 9) == b"a\nb\n"
    assert last_lines(b"a\n", 0) == b""
    assert last_lines(b"", 3) == b""


async def test_slow_reader_is_told_what_it_missed() -> None:
    """A reader that does not take its output loses some, is told how much, and holds up nobody."""
    console = Console(MemoryLog(), nowhere)
    stream = await console.follow(tail_lines=0)
    for _ in range(FOLLOWER_QUEUE_COUNT_MAX + 3):
        await console.feed(b"0123456789")
    for _ in range(FOLLOWER_QUEUE_COUNT_MAX):
        assert await stream.receive_some() == b"0123456789"
    await console.feed(b"new")
    assert await stream.receive_some() == b"\r\n[30 bytes of console output skipped]\r\nnew"


async def test_streams_are_limited_and_end() -> None:
    """Too many readers are refused; one that leaves makes room; all end with the process."""
    console = Console(MemoryLog(), nowhere)
    streams = [await console.follow(tail_lines=0) for _ in range(FOLLOWER_COUNT_MAX)]
    with pytest.raises(UnavailableError):
        await console.follow(tail_lines=0)
    await streams[0].aclose()
    assert await streams[0].receive_some() == b""
    await console.feed(b"x")
    late = await console.follow(tail_lines=1)
    console.close()
    assert [chunk async for chunk in late] == [b"x"]
    assert [chunk async for chunk in streams[1]] == [b"x"]
    with pytest.raises(UnavailableError):
        await late.send_all(b"ls\n")
    assert await (await console.follow(tail_lines=1)).receive_some() == b"x"
    await late.send_eof()


class FullLog(MemoryLog):
    """A log on a disk that is full for a while."""

    is_full = True

    def append(self, data: bytes) -> None:
        """Refuse while the disk is full."""
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().append(data)


async def test_a_full_disk_costs_the_log_and_not_the_console() -> None:
    """Readers go on, the guest is not held up, and when there is space again the log says what it lacks."""
    log = FullLog()
    console = Console(log, nowhere)
    stream = await console.follow(tail_lines=0)
    await console.feed(b"lost\n")
    await console.feed(b"too\n")
    assert await stream.receive_some() == b"lost\n"
    assert await stream.receive_some() == b"too\n"
    log.is_full = False
    await console.feed(b"kept\n")
    assert await stream.receive_some() == b"kept\n"
    assert log.read_tail(10) == b"\r\n[9 bytes of console output were not kept]\r\nkept\n"
