"""The request protocol: one request and one answer on a stream of their own.

| direction | bytes |
|---|---|
| request | a frame (see `frames`), then end of stream |
| answer | one status byte, then a frame: 0 = the payload; 1 = CBOR array [code, message, hint], each text |

A FormationError raised by the remote handler so comes back as the same class; anything else it raises comes back as
"failed" without a reason, because an unexpected exception's text is nobody else's business.
"""

from __future__ import annotations

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError, FormationError, RemoteFault, error_from_code
from formation.p2p.frames import FrameDecoder, encode_frame

STATUS_OK = 0
STATUS_ERROR = 1
# People read these; longer ones are cut, so that a peer cannot fill a terminal or a log.
ERROR_TEXT_LENGTH_MAX = 1000
# Three texts of 1000 characters of up to 4 bytes each, and their headers.
ERROR_SIZE_MAX_BYTES = 3 * (4 * ERROR_TEXT_LENGTH_MAX + 5) + 1


def encode_answer(payload: bytes) -> bytes:
    """The answer of a request that succeeded."""
    return bytes((STATUS_OK,)) + encode_frame(payload)


def encode_error(error: FormationError) -> bytes:
    """The answer of a request that failed."""
    texts = [_printable(text) for text in (error.code, error.message, error.hint)]
    return bytes((STATUS_ERROR,)) + encode_frame(encode(texts))


class AnswerDecoder:
    """Takes an answer as it arrives."""

    __slots__ = ("_frames", "_is_error", "_size_max_bytes")

    def __init__(self, *, size_max_bytes: int) -> None:
        self._size_max_bytes = size_max_bytes
        self._frames: FrameDecoder | None = None
        self._is_error = False

    def feed(self, data: bytes) -> bytes | None:
        """The payload, once it is complete.

        Raises:
          FormationError: the remote handler's own error, as the class its code stands for.
          DecodeError: not an answer, or too long.
        """
        if not data:
            return None
        if self._frames is None:
            if data[0] not in (STATUS_OK, STATUS_ERROR):
                raise DecodeError(f"answer with status {data[0]}")
            self._is_error = data[0] == STATUS_ERROR
            self._frames = FrameDecoder(size_max_bytes=ERROR_SIZE_MAX_BYTES if self._is_error else self._size_max_bytes)
            data = data[1:]
        frames = self._frames.feed(data)
        if not frames:
            return None
        if self._is_error:
            raise decode_error(frames[0])
        return frames[0]


def decode_error(payload: bytes) -> FormationError:
    """The error that a remote handler raised; a malformed one gives the RemoteFault instead."""
    try:
        texts = decode(payload, list[str], what="error answer")
    except DecodeError as exc:
        return exc
    if len(texts) != 3:
        return RemoteFault(f"error answer of {len(texts)} texts")
    code, message, hint = (_printable(text) for text in texts)
    return error_from_code(code, message or "the peer gave no reason", hint)


def _printable(text: str) -> str:
    """No control characters: this text of a stranger reaches terminals and logs."""
    return "".join(c if c.isprintable() else " " for c in text[:ERROR_TEXT_LENGTH_MAX])
