"""Yamux, the stream multiplexer of libp2p, as a machine without I/O.

Source: the specification of hashicorp/yamux (header of 12 bytes, credit-based windows) in the profile of libp2p
(`/yamux/1.0.0`). Bytes of the secure channel go into `receive` in pieces of any size; what it has to send goes out
through the function it was given, frame by frame. Payload is handed on as it arrives, so that a frame whose rest never
comes holds no memory of its own.

A peer can make us hold: per stream its window and WINDOW_EXCESS_MAX_BYTES, and CHANNEL_COUNT_MAX streams. What it does
beyond that, and what the specification forbids, is a DecodeError: the connection is over.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from formation.core.errors import DecodeError

HEADER = struct.Struct("!BBHII")
"""Version, type, flags, stream, length (or window, ping value, reason)."""
TYPE_DATA, TYPE_WINDOW, TYPE_PING, TYPE_GO_AWAY = range(4)
FLAG_SYN, FLAG_ACK, FLAG_FIN, FLAG_RST = 1, 2, 4, 8
WINDOW_FIRST_BYTES = 256 * 1024
# One stream's receive window: 1 MiB fills 100 Mbit/s at 80 ms; other implementations let it grow to 16 MiB.
WINDOW_SIZE_MAX_BYTES = 1 << 20
# A peer that ignores its window by more than a frame is hostile: what it sends beyond is kept in our memory.
WINDOW_EXCESS_MAX_BYTES = 64 * 1024
# With its header and the noise tag this is exactly one noise message; more would be cut in two, at twice the cost.
PAYLOAD_SIZE_MAX_BYTES = 65_507
# Streams of one connection, both directions: links, gossip, kad and requests stay far below; each may hold a window.
CHANNEL_COUNT_MAX = 1024
# Of those, opened by the peer and not looked at yet: a burst within one round of the scheduler.
UNACCEPTED_COUNT_MAX = 256
# What a peer may cause in a *round* (`begin_round`; 2.5 s) without sending data. Correct ones ping every 2.5 to 30 s, and
# 4,000 requests a second are twice what a node serves; a flood of these is what brought down HTTP/2 servers
# (CVE-2019-9512 pings, CVE-2019-9514 and CVE-2023-44487 streams opened and reset).
ROUND_PING_COUNT_MAX = 250
ROUND_STREAM_COUNT_MAX = 10_000
# Streams refused: who runs into a limit waits, and does not try thousands of times.
ROUND_REFUSED_COUNT_MAX = 2_000
# Frames without data, 1 to 2 us each; at full speed a stream's window updates are a tenth of this.
ROUND_EMPTY_COUNT_MAX = 100_000

Send = Callable[[bytes], None]
"""Takes one whole frame; called in the order in which frames must leave."""


class Channel:
    """One stream's state. Its owner sets `wake`, which is called whenever something below has changed."""

    __slots__ = (
        "incoming",
        "is_eof",
        "is_finished",
        "is_reset",
        "number",
        "receive_window",
        "released",
        "send_window",
        "wake",
        "window_target",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.incoming = bytearray()
        """Received and not yet read."""
        self.is_eof = False
        """The peer sends nothing more."""
        self.is_finished = False
        """We send nothing more."""
        self.is_reset = False
        """Over in both directions, by either side or with the connection."""
        self.send_window = WINDOW_FIRST_BYTES
        self.receive_window = WINDOW_FIRST_BYTES
        self.window_target = WINDOW_FIRST_BYTES
        self.released = 0
        """Bytes read since the last window update."""
        self.wake: Callable[[], None] = _nothing


def _nothing() -> None:
    pass


class Session:
    """One connection's streams."""

    def __init__(self, *, is_initiator: bool, send: Send, on_accept: Callable[[Channel], None]) -> None:
        self._send = send
        self._on_accept = on_accept
        self._next_number = 1 if is_initiator else 2
        self._peer_parity = 0 if is_initiator else 1
        self.channels: dict[int, Channel] = {}
        """Those that a frame of the peer may still name."""
        self.is_over = False
        """The peer said that it goes."""
        self.frame_count = 0
        """Frames received; a peer that lives answers pings, so this grows."""
        self.unread_size = 0
        """Bytes received on all streams and not yet read."""
        self.stream_refused_count = 0
        self._unaccepted_count = 0
        self._round_ping_count = 0
        self._round_stream_count = 0
        self._round_refused_count = 0
        self._round_empty_count = 0
        self._header = b""
        self._left = 0
        self._flags = 0
        self._channel: Channel | None = None

    # --- our side ----------------------------------------------------------------------------------------------------

    def open(self) -> Channel:
        """Open a stream; it can be written at once.

        Raises:
          OverflowError: CHANNEL_COUNT_MAX are open.
        """
        if len(self.channels) >= CHANNEL_COUNT_MAX:
            raise OverflowError(f"{CHANNEL_COUNT_MAX} streams are open on this connection")
        channel = Channel(self._next_number)
        self._next_number += 2
        self.channels[channel.number] = channel
        self._send(HEADER.pack(0, TYPE_WINDOW, FLAG_SYN, channel.number, 0))
        return channel

    def write(self, channel: Channel, data: memoryview) -> int:
        """Send as much as the window allows in one frame; how many bytes that were."""
        size = min(channel.send_window, len(data), PAYLOAD_SIZE_MAX_BYTES)
        if size > 0:
            channel.send_window -= size
            self._send(HEADER.pack(0, TYPE_DATA, 0, channel.number, size) + data[:size])
        return size

    def read(self, channel: Channel, size_max_bytes: int) -> bytes:
        """Take up to so many bytes of what has arrived, and let the peer send as many more."""
        incoming = channel.incoming
        self.unread_size -= min(len(incoming), size_max_bytes)
        if len(incoming) <= size_max_bytes:
            data = bytes(incoming)
            incoming.clear()
        else:
            data = bytes(incoming[:size_max_bytes])
            del incoming[:size_max_bytes]
        channel.released += len(data)
        if channel.released >= channel.window_target // 2 and not channel.is_eof and not channel.is_reset:
            size, channel.released = channel.released, 0
            if channel.window_target < WINDOW_SIZE_MAX_BYTES:
                size += channel.window_target
                channel.window_target *= 2
            channel.receive_window += size
            self._send(HEADER.pack(0, TYPE_WINDOW, 0, channel.number, size))
        return data

    def finish(self, channel: Channel) -> None:
        """Say that we send nothing more on this stream."""
        if channel.is_finished or channel.is_reset:
            return
        channel.is_finished = True
        self._send(HEADER.pack(0, TYPE_WINDOW, FLAG_FIN, channel.number, 0))
        self._forget_if_done(channel)

    def reset(self, channel: Channel) -> None:
        """End a stream in both directions; what was not read is lost."""
        is_known = self.channels.pop(channel.number, None) is not None
        if is_known and not channel.is_reset:
            self._send(HEADER.pack(0, TYPE_WINDOW, FLAG_RST, channel.number, 0))
        self._end(channel)

    def ping(self, value: int) -> None:
        """Ask the peer for a sign of life."""
        self._send(HEADER.pack(0, TYPE_PING, FLAG_SYN, 0, value & 0xFFFF_FFFF))

    def go_away(self) -> None:
        """Say that we are about to close the connection."""
        self._send(HEADER.pack(0, TYPE_GO_AWAY, 0, 0, 0))

    def end(self) -> None:
        """The connection is gone: so are its streams."""
        channels = list(self.channels.values())
        self.channels.clear()
        for channel in channels:
            self._end(channel)

    def note_accepted(self) -> None:
        """Its owner has taken a stream that the peer opened."""
        self._unaccepted_count -= 1

    def refuse(self, number: int) -> None:
        """Reset a stream that the peer wants to open.

        Raises:
          DecodeError: it has wanted that too often in this round.
        """
        self.stream_refused_count += 1
        self._round_refused_count += 1
        if self._round_refused_count > ROUND_REFUSED_COUNT_MAX:
            raise DecodeError(f"{self._round_refused_count} yamux streams beyond the limits within a moment")
        self._send(HEADER.pack(0, TYPE_WINDOW, FLAG_RST, number, 0))

    def begin_round(self) -> None:
        """Time has passed: the peer may cause as much again."""
        self._round_ping_count = self._round_stream_count = self._round_refused_count = self._round_empty_count = 0

    def _end(self, channel: Channel) -> None:
        channel.is_reset = True
        self.unread_size -= len(channel.incoming)
        channel.incoming.clear()
        channel.wake()

    def _forget_if_done(self, channel: Channel) -> None:
        if channel.is_eof and channel.is_finished:
            self.channels.pop(channel.number, None)

    # --- the peer's side ---------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take bytes as they came from the secure channel.

        Raises:
          DecodeError: the peer breaks the protocol or its windows.
        """
        start, end = 0, len(data)
        while start < end:
            if self._left:
                size = min(self._left, end - start)
                if self._channel is not None:
                    self._take_data(self._channel, data[start : start + size])
                start += size
                self._left -= size
                if self._left:
                    # What is here may be read already.
                    if self._channel is not None:
                        self._channel.wake()
                    return
                self._finish_data()
                continue
            if self._header or end - start < HEADER.size:
                size = min(HEADER.size - len(self._header), end - start)
                self._header += data[start : start + size]
                start += size
                if len(self._header) < HEADER.size:
                    return
                fields = HEADER.unpack(self._header)
                self._header = b""
            else:
                fields = HEADER.unpack_from(data, start)
                start += HEADER.size
            self._take_header(*fields)

    def _take_header(self, version: int, kind: int, flags: int, number: int, value: int) -> None:
        self.frame_count += 1
        if version != 0 or kind > TYPE_GO_AWAY:
            raise DecodeError(f"yamux frame of version {version}, type {kind}")
        if kind == TYPE_PING:
            self._round_ping_count += 1
            if self._round_ping_count > ROUND_PING_COUNT_MAX:
                raise DecodeError(f"{self._round_ping_count} yamux pings within a moment")
            if flags & FLAG_SYN:
                self._send(HEADER.pack(0, TYPE_PING, FLAG_ACK, 0, value))
            return
        if kind == TYPE_GO_AWAY:
            self.is_over = True
            return
        if kind == TYPE_WINDOW or not value:
            self._round_empty_count += 1
            if self._round_empty_count > ROUND_EMPTY_COUNT_MAX:
                raise DecodeError(f"{self._round_empty_count} yamux frames without data within a moment")
        channel = self._accept(number) if flags & FLAG_SYN else self.channels.get(number)
        if kind == TYPE_WINDOW:
            if channel is not None:
                channel.send_window += value
                self._take_flags(channel, flags)
            return
        if channel is not None:
            channel.receive_window -= value
            if channel.receive_window < -WINDOW_EXCESS_MAX_BYTES:
                raise DecodeError(f"{-channel.receive_window} bytes beyond the window of a yamux stream")
        elif value > WINDOW_SIZE_MAX_BYTES + WINDOW_EXCESS_MAX_BYTES:
            raise DecodeError(f"yamux frame of {value} bytes")
        # For a stream that is over, the bytes are passed by: the peer may not know yet.
        self._channel, self._flags, self._left = channel, flags, value
        if not value:
            self._finish_data()

    def _take_data(self, channel: Channel, data: bytes) -> None:
        # What comes for a stream that was reset in the middle of a frame is passed by.
        if not channel.is_reset:
            channel.incoming += data
            self.unread_size += len(data)

    def _finish_data(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            self._take_flags(channel, self._flags)

    def _take_flags(self, channel: Channel, flags: int) -> None:
        if flags & FLAG_RST:
            self.channels.pop(channel.number, None)
            self._end(channel)
            return
        if flags & FLAG_FIN:
            channel.is_eof = True
            self._forget_if_done(channel)
        channel.wake()

    def _accept(self, number: int) -> Channel | None:
        if number & 1 != self._peer_parity or number == 0 or number in self.channels:
            raise DecodeError(f"yamux stream {number} cannot be opened by the peer")
        self._round_stream_count += 1
        if self._round_stream_count > ROUND_STREAM_COUNT_MAX:
            raise DecodeError(f"{self._round_stream_count} yamux streams opened within a moment")
        if len(self.channels) >= CHANNEL_COUNT_MAX or self._unaccepted_count >= UNACCEPTED_COUNT_MAX:
            self.refuse(number)
            return None
        self._unaccepted_count += 1
        channel = self.channels[number] = Channel(number)
        self._send(HEADER.pack(0, TYPE_WINDOW, FLAG_ACK, number, 0))
        self._on_accept(channel)
        return channel
