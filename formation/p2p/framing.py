"""Single frames on a stream: for protocols that begin with a question and go on with bytes."""

from __future__ import annotations

from formation.core.errors import DecodeError, UnavailableError
from formation.p2p.frames import LENGTH_SIZE_BYTES, encode_frame
from formation.p2p.transport import ByteStream


async def send_frame(stream: ByteStream, payload: bytes) -> None:
    """Send one frame (`frames`).

    Raises:
      UnavailableError: the stream broke.
    """
    await stream.send_all(encode_frame(payload))


async def receive_frame(stream: ByteStream, *, size_max_bytes: int) -> bytes:
    """The next frame's payload; nothing behind it is read.

    Raises:
      DecodeError: it is longer than allowed.
      UnavailableError: the stream broke or ended before the frame did.
    """
    size = int.from_bytes(await receive_exactly(stream, LENGTH_SIZE_BYTES), "big")
    if size > size_max_bytes:
        raise DecodeError(f"a frame of {size} bytes, the limit is {size_max_bytes}")
    return await receive_exactly(stream, size)


async def receive_exactly(stream: ByteStream, size_bytes: int) -> bytes:
    """So many bytes; nothing behind them is read.

    Raises:
      UnavailableError: the stream broke or ended before.
    """
    data = bytearray()
    while len(data) < size_bytes:
        chunk = await stream.receive_some(size_bytes - len(data))
        if not chunk:
            raise UnavailableError("the other node closed the stream", hint="try again")
        data += chunk
    return bytes(data)
