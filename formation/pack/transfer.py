"""Blobs over a peer-to-peer stream: one request, one range, one stream.

Protocol `/formation/blobs/1` (`schemas/image.cddl`): the asker sends a frame, 4 bytes big-endian length and then CBOR
`[digest, offset]`; the holder answers with a frame `[status, size]` and, where the status is `ok`, with the blob's bytes
from the offset to its end. The asker closes when it has them all.

Rules: (1) only blobs of images that we hold are served, and nothing tells a blob that we lack from one that we do not
serve; (2) what arrives is checked by the blob's own hash (`blobs.PartialBlob`), so the holder need not be trusted;
(3) both sides give up on a peer that stands still.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
import structlog
import trio

from formation.core.codec import decode, encode
from formation.core.errors import RemoteFault, UnavailableError
from formation.core.ids import Digest, NodeId
from formation.core.units import KIB
from formation.p2p.framing import receive_frame, send_frame
from formation.p2p.service import P2pService
from formation.p2p.transport import ByteStream
from formation.pack.manifest import BLOB_SIZE_MAX_BYTES

PROTOCOL = "/formation/blobs/1"
# A digest, an offset, a status: under 100 bytes.
FRAME_SIZE_MAX_BYTES = 256
# One read from disk and one write to the stream; the stream cuts it into its own frames.
PIECE_SIZE_BYTES = 256 * KIB
# Each stream holds one piece in memory and one thread now and then; a node of 100 peers still answers its links.
SERVED_COUNT_MAX = 8
SERVED_PER_PEER_MAX = 3
# A peer on a bad line moves a piece of 256 KiB in this time at 100 kbit/s.
STALL_TIMEOUT_S = 20.0

log = structlog.get_logger(__name__)
T = TypeVar("T")


class BlobRequest(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What an asker wants; array of two."""

    digest: Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}$")]
    offset: Annotated[int, msgspec.Meta(ge=0, le=BLOB_SIZE_MAX_BYTES)]


class BlobAnswer(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a holder says before the bytes; array of two."""

    status: Literal["ok", "absent", "busy"]
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=BLOB_SIZE_MAX_BYTES)]
    """Of the whole blob."""


class BlobServer:
    """Answers the requests of peers.

    Args:
      find: the file of a blob that may be served, or None.
    """

    def __init__(self, find: Callable[[Digest], Path | None]) -> None:
        self._find = find
        self._serving: Counter[NodeId] = Counter()
        self.served_bytes = 0

    async def serve(self, node_id: NodeId, stream: ByteStream) -> None:
        """Answer one stream; a handler for `P2pService.serve_stream`."""
        if self._serving.total() >= SERVED_COUNT_MAX or self._serving[node_id] >= SERVED_PER_PEER_MAX:
            with trio.move_on_after(STALL_TIMEOUT_S):
                await _read_frame(stream, BlobRequest)
                await _send_frame(stream, BlobAnswer("busy", 0))
                await _wait_closed(stream)
            return
        self._serving[node_id] += 1
        try:
            await self._answer(stream)
        except (UnavailableError, RemoteFault, trio.TooSlowError) as exc:
            log.debug("blob.serve_failed", peer=node_id, error=str(exc))
        finally:
            self._serving[node_id] -= 1
            self._serving += Counter()  # forgets those at zero

    async def _answer(self, stream: ByteStream) -> None:
        with trio.fail_after(STALL_TIMEOUT_S):
            request = await _read_frame(stream, BlobRequest)
        path = self._find(Digest(request.digest))
        size_bytes = 0
        if path is not None:
            try:
                size_bytes = path.stat().st_size
            except OSError:
                path = None
        with trio.fail_after(STALL_TIMEOUT_S):
            await _send_frame(stream, BlobAnswer("absent" if path is None else "ok", size_bytes))
        if path is not None:
            await self._send_file(stream, path, request.offset)
        with trio.fail_after(STALL_TIMEOUT_S):
            await stream.send_eof()
            await _wait_closed(stream)

    async def _send_file(self, stream: ByteStream, path: Path, offset: int) -> None:
        try:
            file = path.open("rb")
        except OSError as exc:
            raise UnavailableError(f"a blob went away: {exc.strerror}") from exc
        with file:
            file.seek(offset)
            while piece := await trio.to_thread.run_sync(file.read, PIECE_SIZE_BYTES):
                with trio.fail_after(STALL_TIMEOUT_S):
                    await stream.send_all(piece)
                self.served_bytes += len(piece)


async def fetch_blob(
    p2p: P2pService,
    holder: NodeId,
    digest: Digest,
    *,
    offset: int,
    size_bytes: int | None,
    size_max_bytes: int,
    sink: Callable[[bytes], Awaitable[None]],
) -> None:
    """Pass a blob's bytes from `offset` to its end to `sink`, as they come.

    Args:
      p2p: the way to the holder.
      holder: who is asked.
      digest: the blob.
      offset: bytes that are here already.
      size_bytes: what the whole blob must have; None: not known.
      size_max_bytes: more is refused.
      sink: takes the bytes; they are not checked yet.

    Raises:
      UnavailableError: the holder is away, busy, has no such blob, or stands still; what came before counts.
      RemoteFault: the holder breaks the protocol.
    """
    with _stall_limit(holder):
        stream = await p2p.open_stream(holder, PROTOCOL)
    try:
        with _stall_limit(holder):
            await _send_frame(stream, BlobRequest(digest, offset))
            answer = await _read_frame(stream, BlobAnswer)
        if answer.status != "ok":
            raise UnavailableError(f"node {holder} answers {answer.status} for blob {digest[:19]}")
        if answer.size_bytes > size_max_bytes or answer.size_bytes < offset or size_bytes not in (None, answer.size_bytes):
            raise RemoteFault(f"blob {digest[:19]} should have {size_bytes} bytes, the peer says {answer.size_bytes}")
        missing = answer.size_bytes - offset
        while missing:
            with _stall_limit(holder):
                piece = await stream.receive_some(min(PIECE_SIZE_BYTES, missing))
            if not piece:
                raise UnavailableError(f"node {holder} ended a blob early")
            missing -= len(piece)
            await sink(piece)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
            await stream.aclose()


@contextmanager
def _stall_limit(holder: NodeId) -> Iterator[None]:
    try:
        with trio.fail_after(STALL_TIMEOUT_S):
            yield
    except trio.TooSlowError as exc:
        raise UnavailableError(f"node {holder} stood still for {STALL_TIMEOUT_S:.0f} s") from exc


async def _send_frame(stream: ByteStream, value: BlobRequest | BlobAnswer) -> None:
    await send_frame(stream, encode(value))


async def _read_frame(stream: ByteStream, as_type: type[T]) -> T:
    return decode(await receive_frame(stream, size_max_bytes=FRAME_SIZE_MAX_BYTES), as_type)


async def _wait_closed(stream: ByteStream) -> None:
    """Until the asker has let go: closing before it has read everything could lose bytes."""
    while await stream.receive_some(FRAME_SIZE_MAX_BYTES):
        pass
