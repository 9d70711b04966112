"""The muxer that libp2p's connections get: `yamux` driven straight from the socket.

The library's own (0.8.1) costs ten rounds of the scheduler per message, breaks on large frames, cancelled writes and
paused readers, and notices a vanished peer after 15 minutes. Here one task per connection reads the socket, decrypts
every complete Noise message (libp2p noise specification: 2 bytes of length, at most 65,535 of ciphertext) and feeds the
session; frames are encrypted and written where they arise, and wait in `_unsent` only while the socket takes no more.
So a message costs one round at its receiver and none at its sender, and a cancelled write leaves no half frame.

Connections that are not Noise directly on TCP (TLS, a private network's cipher below Noise) are read and written as the
library's secured connection instead: one task more, which writes what has gathered, and some rounds more per message.

Where a line is slow, blocks, acks and pings go before bulk: what waits here is sent in the order in which it was written,
so little of a bulk stream may wait. It writes one frame at a time and the next only below UNSENT_SIZE_BULK_BYTES, and the
kernel is asked to hold no more than KERNEL_UNSENT_SIZE_BYTES that are not on their way, where it would take megabytes. A
message so stands behind some 160 KiB at most of bulk (0.13 s at 10 Mbit/s), however many such streams there are.

Limits: a peer that does not read may have UNSENT_SIZE_MAX_BYTES of ours waiting, then its connection is closed, as is one
that takes nothing for WRITE_TIMEOUT_S or says nothing for PING_SILENT_ROUNDS_MAX pings. Writers of other streams wait from
UNSENT_SIZE_HIGH_BYTES on.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.io.trio import TrioTCPStream
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from formation.core.errors import DecodeError
from formation.p2p.yamux import Channel, Session

# A ping every 2.5 s and three silent rounds: a peer that vanished is noticed in 7.5 to 10 s, a stall of ours counts once.
PING_INTERVAL_S = 2.5
PING_SILENT_ROUNDS_MAX = 3
# Bytes that TCP does not take for this long: the peer is gone or stuck. Longer than the pings take to find out.
WRITE_TIMEOUT_S = 15.0
# How long a stream may wait for its reader's window: a slow disk may take its time, a forgotten stream must end.
WINDOW_WAIT_MAX_S = 60.0
UNSENT_SIZE_HIGH_BYTES = 256 * 1024
# Less than a frame of 64 KiB: one more may then be written, and no more stands before a message of another stream.
UNSENT_SIZE_BULK_BYTES = 48 * 1024
# Written to the socket and not on its way: enough that no line is idle between two turns of ours (loopback carries as much
# with it as without), and little to stand behind.
KERNEL_UNSENT_SIZE_BYTES = 64 * 1024
# Above the high mark come only answers to pings, window updates and ends of streams: this much is a hostile peer.
UNSENT_SIZE_MAX_BYTES = 2 * 1024 * 1024
READ_SIZE_BYTES = 256 * 1024
WRITE_SIZE_BYTES = 256 * 1024
LENGTH_SIZE_BYTES = 2
# All connections together, what was received and not read, and what was not sent: beyond it the connection that holds the
# most ends. A node's own traffic holds a few MB; 512 connections could hold 20 GB by their windows.
HELD_SIZE_MAX_BYTES = 256 * 1024 * 1024
# A connection that holds less than this does not look at the others.
HELD_SIZE_LOOK_BYTES = 1024 * 1024

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Traffic:
    """Bytes on all connections since the process began."""

    sent_bytes: int = 0
    received_bytes: int = 0


traffic = Traffic()
_living: set[Muxer] = set()
"""Connections that are served just now."""


class Stream(IMuxedStream):  # type: ignore[misc] # the library is untyped here
    """One stream, as the library and `libp2p_stream` use it."""

    def __init__(self, muxer: Muxer, channel: Channel) -> None:
        self.muxed_conn = muxer
        self._channel = channel
        self._changed = trio.Event()
        self.is_bulk = False
        """Lets what others write go first."""
        channel.wake = self._wake

    def _wake(self) -> None:
        self._changed.set()

    async def _wait(self) -> None:
        # Reader and writer may wait for the same one.
        if self._changed.is_set():
            self._changed = trio.Event()
        await self._changed.wait()

    @property
    def is_broken(self) -> bool:
        """It ended other than by the peer's saying so."""
        return self._channel.is_reset

    async def wait_reset(self) -> None:
        """Until it is broken."""
        while not self._channel.is_reset:
            await self._wait()

    async def read(self, n: int | None = None) -> bytes:
        """1 to n bytes.

        Raises:
          MuxedStreamEOF: the peer sends no more.
          MuxedStreamReset: the stream or its connection broke.
        """
        channel = self._channel
        while not channel.incoming:
            if channel.is_reset:
                raise MuxedStreamReset("stream was reset")
            if channel.is_eof:
                raise MuxedStreamEOF("the peer sends no more")
            await self._wait()
        return self.muxed_conn.session.read(channel, len(channel.incoming) if n is None or n < 0 else n)

    async def write(self, data: bytes) -> None:
        """Send all of it, at the pace of the reader. Cancelled, a part has been sent.

        Raises:
          MuxedStreamReset: the stream or its connection broke, or the reader gives no window.
        """
        channel, muxer = self._channel, self.muxed_conn
        rest = memoryview(data)
        while rest:
            if channel.is_reset or channel.is_finished:
                raise MuxedStreamReset("stream is closed")
            await muxer.wait_for_room(UNSENT_SIZE_BULK_BYTES if self.is_bulk else UNSENT_SIZE_HIGH_BYTES)
            size = muxer.session.write(channel, rest)
            rest = rest[size:]
            if not size:
                with trio.move_on_after(WINDOW_WAIT_MAX_S) as scope:
                    while channel.send_window <= 0 and not channel.is_reset:
                        await self._wait()
                if scope.cancelled_caught:
                    raise MuxedStreamReset(f"the reader gave no window for {WINDOW_WAIT_MAX_S:.0f} s")

    async def close(self) -> None:
        """Say that we send no more; reading goes on."""
        self.muxed_conn.session.finish(self._channel)
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """End both directions at once."""
        self.muxed_conn.session.reset(self._channel)
        await trio.lowlevel.checkpoint()

    def set_deadline(self, ttl: int) -> None:
        """Not of this muxer: bound the call instead."""
        raise NotImplementedError("bound the call with a cancel scope")

    def get_remote_address(self) -> Any:
        """Host and port of the other end, if known."""
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> Stream:
        """For the library: as a context manager it closes itself."""
        return self


class Muxer(IMuxedConn):  # type: ignore[misc] # the library is untyped here
    """One connection, whatever secures it; the socket itself is used where Noise is directly on TCP."""

    def __init__(
        self,
        secured_conn: Any,
        peer_id: Any,
        is_initiator: bool | None = None,
        on_close: Callable[[], Awaitable[Any]] | None = None,
    ) -> None:
        self.secured_conn = secured_conn
        self.peer_id = peer_id
        self.on_close = on_close
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self._is_initiator = secured_conn.is_initiator if is_initiator is None else is_initiator
        noise = secured_conn.conn
        self._tcp = _tcp_below(noise)
        if self._tcp is not None:
            self._socket = self._tcp.stream.socket
            if self._socket.family != socket.AF_UNIX:  # a circuit's: the relay's connection has its own
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, KERNEL_UNSENT_SIZE_BYTES)
            self._encrypt = noise.encrypt
            self._decrypt = noise.decrypt
        self._received = bytearray()
        """Ciphertext that is no complete message yet."""
        self._unsent = bytearray()
        """Ciphertext on a socket, else plaintext."""
        self._has_unsent = trio.Event()
        self._has_room = trio.Event()
        self._is_ending = False
        self._nursery: trio.Nursery | None = None
        self._accepted: deque[Channel] = deque()
        self._has_accepted = trio.Event()
        self.session = Session(is_initiator=self._is_initiator, send=self._send, on_accept=self._note_accepted)

    # --- what the library asks ---------------------------------------------------------------------------------------

    @property
    def is_initiator(self) -> bool:
        """Whether we dialled."""
        return self._is_initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self._is_ending

    @property
    def is_closed(self) -> bool:
        """Whether it is over."""
        return self.event_closed.is_set()

    def get_transport_addresses(self) -> Any:
        """Multiaddrs of the other end."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> Any:
        """Direct or relayed."""
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> Any:
        """Host and port of the other end, if known."""
        return self.secured_conn.get_remote_address()

    async def open_stream(self) -> Stream:
        """A new stream; writing may begin at once.

        Raises:
          MuxedStreamError: the connection is over, or has too many streams.
        """
        await trio.lowlevel.checkpoint()
        if self._is_ending:
            raise MuxedStreamError("the connection is closed")
        try:
            return Stream(self, self.session.open())
        except OverflowError as exc:
            raise MuxedStreamError(str(exc)) from exc

    async def accept_stream(self) -> Stream:
        """The next stream that the peer opened.

        Raises:
          MuxedConnUnavailable: the connection is over.
        """
        while not self._accepted:
            if self._is_ending:
                raise MuxedConnUnavailable("the connection is closed")
            self._has_accepted = trio.Event()
            await self._has_accepted.wait()
        self.session.note_accepted()
        return Stream(self, self._accepted.popleft())

    async def start(self) -> None:
        """Serve the connection until it ends, however it does; never raises for a fault of the peer's."""
        if self.event_started.is_set():
            return
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                _living.add(self)
                nursery.start_soon(self._send_rest if self._tcp is not None else self._send_secured)
                nursery.start_soon(self._keep_alive)
                self.event_started.set()
                await (self._receive() if self._tcp is not None else self._receive_secured())
                nursery.cancel_scope.cancel()
        except Exception as exc:  # noqa: BLE001 - supervision boundary of one connection
            _logger.debug("connection with %s failed: %r", self.peer_id, exc)
        finally:
            self._nursery = None
            _living.discard(self)
            self.event_started.set()
            with trio.CancelScope(shield=True):
                await self.close()

    async def close(self) -> None:
        """End the connection and its streams; again is harmless."""
        if not self._is_ending:
            self.session.go_away()
            self._end()
        await close_quietly(self.secured_conn)
        if not self.event_closed.is_set():
            self.event_closed.set()
            if self.on_close is not None:
                await self.on_close()

    def _end(self) -> None:
        """Everybody who waits for this connection learns that it is over."""
        self._is_ending = True
        self.session.end()
        self._accepted.clear()
        self._unsent.clear()
        self._has_accepted.set()
        self._has_room.set()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def _note_accepted(self, channel: Channel) -> None:
        self._accepted.append(channel)
        self._has_accepted.set()

    # --- bytes out ---------------------------------------------------------------------------------------------------

    def _send(self, frame: bytes) -> None:
        if self._is_ending:
            return
        if self._tcp is not None:
            message = self._encrypt(frame)
            packet = len(message).to_bytes(LENGTH_SIZE_BYTES, "big") + message
        else:
            packet = frame
        traffic.sent_bytes += len(packet)
        if self._unsent or self._tcp is None:
            if len(self._unsent) + len(packet) > UNSENT_SIZE_MAX_BYTES:
                _logger.debug("peer %s does not read: closing", self.peer_id)
                self._end()
                return
            self._unsent += packet
            self._has_unsent.set()
            return
        try:
            # The descriptor is asked for each time: once closed it is -1, and never another file's.
            sent = os.write(self._socket.fileno(), packet)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            _logger.debug("peer %s takes no data: %r", self.peer_id, exc)
            self._end()
            return
        if sent < len(packet):
            self._unsent += packet[sent:]
            self._has_unsent.set()

    async def _send_rest(self) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent = trio.Event()
            while self._unsent:
                with trio.fail_after(WRITE_TIMEOUT_S):
                    await trio.lowlevel.wait_writable(self._socket)
                try:
                    sent = os.write(self._socket.fileno(), memoryview(self._unsent)[:WRITE_SIZE_BYTES])
                except BlockingIOError:
                    continue
                del self._unsent[:sent]
                if len(self._unsent) < UNSENT_SIZE_HIGH_BYTES:
                    self._has_room.set()

    async def _send_secured(self) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent = trio.Event()
            while self._unsent:
                data = bytes(self._unsent[:WRITE_SIZE_BYTES])
                with trio.fail_after(WRITE_TIMEOUT_S):
                    await self.secured_conn.write(data)
                # Only behind the write: until then it counts as held.
                del self._unsent[: len(data)]
                if len(self._unsent) < UNSENT_SIZE_HIGH_BYTES:
                    self._has_room.set()

    async def wait_for_room(self, size_bytes: int) -> None:
        """Until less than this waits of what was written before."""
        while len(self._unsent) >= size_bytes and not self._is_ending:
            if self._has_room.is_set():
                self._has_room = trio.Event()
            await self._has_room.wait()

    async def _keep_alive(self) -> None:
        silent_rounds, value = 0, 0
        while True:
            before = self.session.frame_count
            value += 1
            self.session.begin_round()
            self.session.ping(value)
            await trio.sleep(PING_INTERVAL_S)
            silent_rounds = silent_rounds + 1 if self.session.frame_count == before else 0
            if silent_rounds >= PING_SILENT_ROUNDS_MAX:
                _logger.debug("peer %s is silent: closing", self.peer_id)
                self._end()

    # --- bytes in ----------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        self._take_buffered()
        while not self._is_ending:
            try:
                data = os.read(self._socket.fileno(), READ_SIZE_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                continue
            if not data:
                return
            traffic.received_bytes += len(data)
            try:
                self._take(data)
            except DecodeError as exc:
                _logger.debug("peer %s breaks the protocol: %s", self.peer_id, exc)
                return
            if self.session.is_over:
                return
            if self.held_size >= HELD_SIZE_LOOK_BYTES:
                _make_room()
            # A short read has emptied the socket; after a full one others come first.
            if len(data) == READ_SIZE_BYTES:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self._socket)

    async def _receive_secured(self) -> None:
        while not (self._is_ending or self.session.is_over):
            # It gives what it has read ahead first, then message by message, and raises at the end.
            data = await self.secured_conn.read(None)
            traffic.received_bytes += len(data)
            try:
                self.session.receive(data)
            except DecodeError as exc:
                _logger.debug("peer %s breaks the protocol: %s", self.peer_id, exc)
                return
            if self.held_size >= HELD_SIZE_LOOK_BYTES:
                _make_room()

    @property
    def held_size(self) -> int:
        """Bytes that it holds for its peer, in both directions."""
        return self.session.unread_size + len(self._unsent)

    def give_way(self) -> None:
        """End it at once, for what it holds."""
        _logger.debug("peer %s holds %d bytes: closing", self.peer_id, self.held_size)
        self._end()

    def _take_buffered(self) -> None:
        """What the library read ahead while it negotiated: decrypted bytes, then ciphertext."""
        while ahead := self.secured_conn._drain(None):
            self.session.receive(ahead)
        buffer, start = self._tcp.__dict__.get("_unread", b""), self._tcp.__dict__.get("_unread_start", 0)
        if start < len(buffer):
            self._take(buffer[start:])

    def _take(self, data: bytes) -> None:
        received = self._received
        if received:
            received += data
            data = bytes(received)
            received.clear()
        start, end = 0, len(data)
        while end - start >= LENGTH_SIZE_BYTES:
            stop = start + LENGTH_SIZE_BYTES + int.from_bytes(data[start : start + LENGTH_SIZE_BYTES], "big")
            if stop > end:
                break
            try:
                plain = self._decrypt(data[start + LENGTH_SIZE_BYTES : stop])
            except Exception as exc:
                raise DecodeError("a noise message does not decrypt") from exc
            start = stop
            self.session.receive(plain)
        if start < end:
            received += data[start:]


def _tcp_below(secured: Any) -> Any:
    """The library's TCP stream, where Noise is directly on one; else None."""
    if not isinstance(secured, NoiseTransportReadWriter):
        return None
    stream = getattr(secured.read_writer.read_write_closer, "stream", None)
    return stream if isinstance(stream, TrioTCPStream) else None


def _make_room() -> None:
    """End the connection that holds the most, if all together hold too much."""
    if sum(muxer.held_size for muxer in _living) > HELD_SIZE_MAX_BYTES:
        max(_living, key=lambda muxer: muxer.held_size).give_way()


async def close_quietly(connection: Any) -> None:
    """Close something of the library's, whatever state it is in."""
    try:
        await connection.close()
    except Exception as exc:  # noqa: BLE001 - closing what is broken already
        _logger.debug("close failed: %r", exc)
