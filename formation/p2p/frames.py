"""Length-prefixed frames on a byte stream, without I/O.

A frame is a 4-byte big-endian length and as many bytes. A length beyond the limit ends the stream at once: nothing of
it is buffered. An empty frame is legal; links use it as a keep-alive.
"""

from __future__ import annotations

from formation.core.errors import DecodeError

LENGTH_SIZE_BYTES = 4
# A block is at most 256 KiB; acks and the frame's kind byte need a little more. Larger things travel as requests or streams.
FRAME_SIZE_MAX_BYTES = 320 * 1024


def encode_frame(payload: bytes) -> bytes:
    """The frame of a payload; its limit is the receiver's to set and the caller's to keep."""
    return len(payload).to_bytes(LENGTH_SIZE_BYTES, "big") + payload


class FrameDecoder:
    """Cuts a stream into frames.

    Holds at most one incomplete frame and the last chunk fed, so its memory is bounded by the limit and the reader's
    chunk size.
    """

    __slots__ = ("_buffer", "_size_max_bytes")

    def __init__(self, *, size_max_bytes: int) -> None:
        self._buffer = bytearray()
        self._size_max_bytes = size_max_bytes

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that are complete with this data, in order.

        Raises:
          DecodeError: a frame claims to be longer than the limit; the stream is of no use any more.
        """
        self._buffer += data
        frames: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= LENGTH_SIZE_BYTES:
            size = int.from_bytes(self._buffer[start : start + LENGTH_SIZE_BYTES], "big")
            if size > self._size_max_bytes:
                raise DecodeError(f"frame of {size} bytes, {self._size_max_bytes} allowed")
            end = start + LENGTH_SIZE_BYTES + size
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[start + LENGTH_SIZE_BYTES : end]))
            start = end
        del self._buffer[:start]
        return frames
