"""A VM's serial console: a bounded log on disk, and live streams of it for people.

Rules: (1) this process is the console's only client, people share it; (2) a guest may print without end: the log is two
segments that take turns, a slow reader loses what it did not take and is told, and reading is paced, which QEMU passes
on to the guest as a slow serial line; (3) bytes are the guest's and are never interpreted here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Protocol

import structlog
import trio

from formation.core.errors import UnavailableError
from formation.core.units import KIB, MIB

_logger = structlog.get_logger(__name__)

# Two of these are kept: at least the last 1 MiB, at most 2 MiB of each VM.
LOG_SEGMENT_SIZE_MAX_BYTES = 1 * MIB
CHUNK_SIZE_MAX_BYTES = 16 * KIB
# With a pause of this length after each chunk, one VM makes the node handle at most 800 KiB/s.
CHUNK_PAUSE_S = 0.02
# 64 chunks of 16 KiB: 1 MiB a reader, more than a second's worth.
FOLLOWER_QUEUE_COUNT_MAX = 64
FOLLOWER_COUNT_MAX = 32


class SerialLog(Protocol):
    """Where a console's output is kept. Its methods block; they are called in a thread."""

    def append(self, data: bytes) -> None:
        """Add bytes, dropping the oldest beyond the limit."""
        ...

    def read_tail(self, line_count: int) -> bytes:
        """The last lines."""
        ...


class FileLog:
    """Two files in a VM's folder, `serial.log` and the older `serial.log.1`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "serial.log"
        self._older = folder / "serial.log.1"

    def append(self, data: bytes) -> None:
        """Add bytes; begins a new segment when this one is full."""
        try:
            size_bytes = self._path.stat().st_size
        except FileNotFoundError:
            size_bytes = 0
        if size_bytes + len(data) > LOG_SEGMENT_SIZE_MAX_BYTES:
            self._path.replace(self._older)
        with self._path.open("ab") as file:
            file.write(data)

    def read_tail(self, line_count: int) -> bytes:
        """The last lines of both segments."""
        data = b""
        for path in (self._older, self._path):
            try:
                data += path.read_bytes()
            except FileNotFoundError:
                continue
        return last_lines(data, line_count)


class MemoryLog:
    """The same in memory, for the twin."""

    def __init__(self) -> None:
        self._data = b""

    def append(self, data: bytes) -> None:
        """Add bytes."""
        self._data = (self._data + data)[-2 * LOG_SEGMENT_SIZE_MAX_BYTES :]

    def read_tail(self, line_count: int) -> bytes:
        """The last lines."""
        return last_lines(self._data, line_count)


def last_lines(data: bytes, line_count: int) -> bytes:
    """The last `line_count` lines; an unfinished one at the end counts."""
    if line_count <= 0:
        return b""
    end = len(data) - 1 if data.endswith(b"\n") else len(data)
    start = end
    for _ in range(line_count):
        start = data.rfind(b"\n", 0, start)
        if start < 0:
            return data
    return data[start + 1 :]


class ConsoleStream:
    """One person's view of a console: the guest's output, and a way to type. Close it with `aclose`."""

    def __init__(self, console: Console, backlog: bytes) -> None:
        self._console = console
        self._sender, self._receiver = trio.open_memory_channel[bytes](FOLLOWER_QUEUE_COUNT_MAX)
        self._rest = backlog
        self._missed_bytes = 0

    def push_nowait(self, data: bytes) -> None:
        """Give the reader more; what a full queue does not take is lost, and said with the next that fits."""
        notice = b"\r\n[%d bytes of console output skipped]\r\n" % self._missed_bytes if self._missed_bytes else b""
        try:
            self._sender.send_nowait(notice + data)
            self._missed_bytes = 0
        except trio.WouldBlock:
            self._missed_bytes += len(data)

    def end(self) -> None:
        """No more output will come."""
        self._sender.close()

    async def receive_some(self, size_max_bytes: int = CHUNK_SIZE_MAX_BYTES) -> bytes:
        """1 to `size_max_bytes` bytes of output; b"" when the VM's process has ended or the stream is closed."""
        if not self._rest:
            try:
                self._rest = await self._receiver.receive()
            except (trio.EndOfChannel, trio.ClosedResourceError):
                return b""
        data, self._rest = self._rest[:size_max_bytes], self._rest[size_max_bytes:]
        return data

    async def send_all(self, data: bytes) -> None:
        """Type into the console.

        Raises:
          UnavailableError: the VM's process has ended.
        """
        await self._console.type(data)

    async def send_eof(self) -> None:
        """Nothing: a serial line has no end."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Leave the console. Never raises."""
        self._console.leave(self)
        self._receiver.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The output, chunk by chunk, until the VM's process ends."""
        try:
            while data := await self.receive_some():
                yield data
        finally:
            self._console.leave(self)


class Console:
    """A running VM's console.

    Args:
      log: where output is kept.
      send: writes input to the guest.
    """

    def __init__(self, log: SerialLog, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._log = log
        self._send = send
        self._followers: list[ConsoleStream] = []
        # Output is logged and handed out as one act, so that a follower's backlog and stream neither overlap nor gap.
        self._lock = trio.Lock()
        self._is_closed = False
        self._unkept_bytes = 0

    async def feed(self, data: bytes) -> None:
        """The guest printed this. A full disk costs the log, not the console, nor the guest that waits for its line."""
        async with self._lock:
            await self._keep(data)
            for follower in self._followers:
                follower.push_nowait(data)

    async def _keep(self, data: bytes) -> None:
        notice = b"\r\n[%d bytes of console output were not kept]\r\n" % self._unkept_bytes if self._unkept_bytes else b""
        try:
            await trio.to_thread.run_sync(self._log.append, notice + data)
            self._unkept_bytes = 0
        except OSError as exc:
            if not self._unkept_bytes:
                _logger.warning("vm.console_not_kept", error=exc.strerror)
            self._unkept_bytes += len(data)

    async def follow(self, *, tail_lines: int) -> ConsoleStream:
        """A stream that begins with the last lines of the log.

        Raises:
          UnavailableError: too many people look at it already.
        """
        async with self._lock:
            if len(self._followers) >= FOLLOWER_COUNT_MAX:
                raise UnavailableError(f"{FOLLOWER_COUNT_MAX} consoles of this VM are open", hint="close one of them")
            stream = ConsoleStream(self, await trio.to_thread.run_sync(self._log.read_tail, tail_lines))
            if self._is_closed:
                stream.end()
            else:
                self._followers.append(stream)
            return stream

    async def type(self, data: bytes) -> None:
        """Send input to the guest.

        Raises:
          UnavailableError: the VM's process has ended.
        """
        if self._is_closed:
            raise UnavailableError("the VM does not run", hint="formation vm start starts it")
        await self._send(data)

    def leave(self, stream: ConsoleStream) -> None:
        """Forget a stream. Idempotent."""
        if stream in self._followers:
            self._followers.remove(stream)
            stream.end()

    def close(self) -> None:
        """The VM's process ended: readers get what is queued, then the end."""
        self._is_closed = True
        for follower in self._followers:
            follower.end()
        self._followers.clear()
