"""Corrections to the stream multiplexer of libp2p 0.8.1; applied by `libp2p_patches`, which see."""

from __future__ import annotations

import logging
import struct
from typing import Any

import trio
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError
from libp2p.stream_muxer.exceptions import MuxedStreamError, MuxedStreamReset
from libp2p.stream_muxer.yamux import yamux

# A ping every 2.5 s and three silent rounds: a peer that vanished is noticed in 7.5 to 10 s, a stall of ours counts once.
PING_INTERVAL_S = 2.5
PING_SILENT_ROUNDS_MAX = 3
# A frame that TCP does not take for this long: the peer is gone or stuck. Longer than the pings take to find out.
WRITE_TIMEOUT_S = 15.0
# How long a stream may wait for its reader's window: a slow disk may take its time, a forgotten stream must end.
WINDOW_WAIT_MAX_S = 60.0
# One stream's receive window: 1 MiB fills 100 Mbit/s at 80 ms; the library lets it grow to 16 MiB.
WINDOW_SIZE_MAX_BYTES = 1 << 20
# A peer that ignores its window by more than a frame is hostile: what it sends beyond is kept in our memory.
WINDOW_EXCESS_MAX_BYTES = 64 * 1024
# A yamux frame (12 bytes of header) must fit one noise message, 65,519 bytes: the library's 65,536 was cut in two.
YAMUX_FRAME_SIZE_MAX_BYTES = 65_519

_logger = logging.getLogger(__name__)


def patch_yamux() -> None:
    """Replace the private methods named below."""
    yamux.MAX_MESSAGE_SIZE = YAMUX_FRAME_SIZE_MAX_BYTES
    yamux.read_exactly = _read_exactly
    yamux.Yamux._write_frame = _write_frame
    yamux.Yamux._measure_rtt_loop = _keep_alive
    yamux.Yamux.open_stream = _open_stream
    yamux.YamuxStream.write = _write_stream
    yamux.YamuxStream._auto_tune_and_send_window_update = _release_window
    yamux.YamuxStream.send_window = property(lambda self: self.__dict__["_send_window"], _set_send_window)
    yamux.YamuxStream.recv_window = property(lambda self: self.__dict__["_recv_window"], _set_recv_window)


async def _read_exactly(reader: Any, n: int, retry_count: int = 0) -> bytes:
    """Symptom: a large frame that arrives in small pieces breaks the connection; a closed one is read 100 times.

    Cause: it counts reads. Cure: read until complete or closed. Also counts frames, which `_keep_alive` looks at.
    """
    buffer = b""
    while len(buffer) < n:
        data = await reader.read(n - len(buffer))
        if not data:
            raise IncompleteReadError("connection closed", expected_bytes=n, received_bytes=len(buffer))
        buffer = buffer + data if buffer else data
    reader.__dict__["_frame_count"] = reader.__dict__.get("_frame_count", 0) + 1
    return buffer


async def _write_frame(self: Any, data: bytes) -> None:
    """Symptom: after a timeout around a write, the whole connection is garbage.

    Cause: cancellation in the middle of a frame leaves half a Noise message on the wire. Cure: a frame that was begun
    is finished, shielded; if TCP does not take it for WRITE_TIMEOUT_S, the connection is closed.
    """
    async with self._write_lock:
        with trio.move_on_after(WRITE_TIMEOUT_S) as scope:
            scope.shield = True
            await self.secured_conn.write(data)
        if scope.cancelled_caught:
            await close_quietly(self.secured_conn)
            raise ConnectionClosedError("the peer takes no data", transport="tcp")


async def _keep_alive(self: Any) -> None:
    """Symptom: a peer that vanished without a FIN stays "connected" until TCP gives up, 15 minutes later.

    Cause: yamux pings to measure, and ignores silence. Cure: several silent rounds close the connection.
    """
    silent_rounds = 0
    while not self.event_shutting_down.is_set():
        before = self.secured_conn.__dict__.get("_frame_count", 0)
        self._ping_id = (self._ping_id + 1) % 2**32
        self._ping_sent_time = trio.current_time()
        ping = struct.pack(yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_PING, yamux.FLAG_SYN, 0, self._ping_id)
        # By another task: a full pipe must not keep us from counting rounds.
        _send_soon(self, ping)
        with trio.move_on_after(PING_INTERVAL_S):
            await self.event_shutting_down.wait()
        is_silent = self.secured_conn.__dict__.get("_frame_count", 0) == before
        silent_rounds = silent_rounds + 1 if is_silent else 0
        if silent_rounds >= PING_SILENT_ROUNDS_MAX:
            _logger.debug("peer %s is silent: closing", self.peer_id)
            # The reader wakes with an error and does the rest.
            await close_quietly(self.secured_conn)
            return


async def _open_stream(self: Any) -> Any:
    """Symptom: after 256 cancelled opens no stream can be opened on a connection.

    Cause: only `Exception` gives the slot back. Cure: so does cancellation.
    """
    await self.stream_backlog_semaphore.acquire()
    if self.event_shutting_down.is_set():
        self.stream_backlog_semaphore.release()
        raise MuxedStreamError("connection is shutting down")
    stream_id = self.next_stream_id
    self.next_stream_id += 2
    stream = yamux.YamuxStream(stream_id, self, True)
    stream._owns_backlog_slot = True
    self.streams[stream_id] = stream
    self.stream_buffers[stream_id] = bytearray()
    self.stream_events[stream_id] = trio.Event()
    header = struct.pack(yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_WINDOW_UPDATE, yamux.FLAG_SYN, stream_id, 0)
    try:
        await self._write_frame(header)
    except BaseException as exc:
        stream.closed = True
        self._finalize_stream_locked(stream, fully_closed=True)
        if isinstance(exc, Exception):
            raise MuxedStreamError(f"failed to open a stream: {exc}") from exc
        raise
    return stream


async def _write_stream(self: Any, data: bytes) -> None:
    """Symptom: a stream whose reader pauses 5 s is reset; waiting costs 100 wake-ups a second.

    Cause: a polling loop with a fixed end. Cure: an event set by the window's setter, and WINDOW_WAIT_MAX_S.
    """
    view, start = memoryview(data), 0
    while start < len(view):
        if self.closed or self.send_closed:
            raise MuxedStreamReset("stream is closed")
        size = min(self.send_window, YAMUX_FRAME_SIZE_MAX_BYTES - yamux.HEADER_SIZE, len(view) - start)
        if size <= 0:
            await _wait_for_window(self)
            continue
        self.send_window -= size
        header = struct.pack(yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_DATA, 0, self.stream_id, size)
        await self.conn._write_frame(header + view[start : start + size])
        start += size


async def _wait_for_window(stream: Any) -> None:
    with trio.move_on_after(WINDOW_WAIT_MAX_S) as scope:
        while stream.send_window <= 0 and not stream.closed and not stream.send_closed:
            event = stream.__dict__["_window_event"] = trio.Event()
            # A reset sets no event of ours: look again after a while.
            with trio.move_on_after(0.5):
                await event.wait()
    if scope.cancelled_caught:
        raise MuxedStreamReset(f"the reader gave no window for {WINDOW_WAIT_MAX_S:.0f} s")


def _set_send_window(self: Any, value: int) -> None:
    self.__dict__["_send_window"] = value
    event = self.__dict__.get("_window_event")
    if value > 0 and event is not None:
        event.set()


def _set_recv_window(self: Any, value: int) -> None:
    """Symptom: a peer that ignores the window fills our memory. Cause: it is only logged. Cure: end the connection."""
    if value < 0:
        excess = self.__dict__["_window_excess"] = self.__dict__.get("_window_excess", 0) - value
        if excess > WINDOW_EXCESS_MAX_BYTES:
            _logger.debug("peer %s ignores the receive window: closing", self.conn.peer_id)
            self.conn.event_shutting_down.set()
    self.__dict__["_recv_window"] = value


async def _release_window(self: Any, *, bytes_read: int = 0) -> None:
    """Symptom: a frame (encryption, system call) for every read; data lost when a read is cancelled.

    Cause: the window update is sent by the reader, after it took the data. Cure: one per half window, by another task.
    The window doubles up to WINDOW_SIZE_MAX_BYTES.
    """
    self._pending_recv_release += bytes_read
    if self._pending_recv_release < self.target_recv_window // 2:
        return
    size, self._pending_recv_release = self._pending_recv_release, 0
    if self.target_recv_window < WINDOW_SIZE_MAX_BYTES:
        size += self.target_recv_window
        self.target_recv_window *= 2
    self.recv_window += size
    _send_soon(self.conn, struct.pack(yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_WINDOW_UPDATE, 0, self.stream_id, size))


def _send_soon(connection: Any, frame: bytes) -> None:
    nursery = connection._nursery
    if nursery is None or connection.event_shutting_down.is_set():
        return
    try:
        nursery.start_soon(_send_quietly, connection, frame)
    except RuntimeError:  # the nursery has just closed: the connection is over
        return


async def _send_quietly(connection: Any, frame: bytes) -> None:
    try:
        await connection._write_frame(frame)
    except Exception as exc:  # noqa: BLE001 - the connection is ending; its reader cleans up
        _logger.debug("frame not sent: %r", exc)


async def close_quietly(connection: Any) -> None:
    """Close something of the library's, whatever state it is in."""
    try:
        await connection.close()
    except Exception as exc:  # noqa: BLE001 - closing what is broken already
        _logger.debug("close failed: %r", exc)
