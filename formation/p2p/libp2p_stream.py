"""A libp2p stream as a ByteStream."""

from __future__ import annotations

from typing import Any

import structlog
import trio
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId

# Saying goodbye takes one frame; it must not hold up anybody.
CLOSE_TIMEOUT_S = 1.0

_logger = structlog.get_logger(__name__)


class Libp2pStream:
    """Maps the library's exceptions and odd ends of streams to the port's."""

    __slots__ = ("_eof_received", "_eof_sent", "_muxed", "_node_id", "_stream")

    def __init__(self, stream: Any, node_id: NodeId, *, is_bulk: bool = False) -> None:
        self._stream = stream
        # Read and written without the library's own states, which cost a round of the scheduler each.
        self._muxed = stream.muxed_stream
        self._muxed.is_bulk = is_bulk
        self._node_id = node_id
        self._eof_sent = False
        self._eof_received = False

    async def receive_some(self, size_max_bytes: int) -> bytes:
        """See ByteStream."""
        assert size_max_bytes > 0
        if self._eof_received:
            await trio.lowlevel.checkpoint()
            return b""
        try:
            return bytes(await self._muxed.read(size_max_bytes))
        except MuxedStreamEOF:
            self._eof_received = True
            return b""
        except Exception as exc:
            raise self._broken(exc) from exc

    async def send_all(self, data: bytes) -> None:
        """See ByteStream."""
        try:
            await self._muxed.write(data)
        except Exception as exc:
            raise self._broken(exc) from exc

    async def send_eof(self) -> None:
        """See ByteStream."""
        if self._eof_sent:
            return
        self._eof_sent = True
        try:
            await self._stream.close_write()
        except Exception as exc:
            raise self._broken(exc) from exc

    async def wait_reset(self) -> None:
        """See ByteStream."""
        await self._muxed.wait_reset()

    async def aclose(self) -> None:
        """See ByteStream."""
        with trio.move_on_after(CLOSE_TIMEOUT_S) as scope:
            scope.shield = True
            try:
                if self._eof_sent and self._eof_received:
                    await self._stream.close()
                else:
                    await self._stream.reset()
            except Exception as exc:  # noqa: BLE001 - closing what is broken already
                _logger.debug("stream close failed", peer=self._node_id, error=repr(exc))

    def _broken(self, cause: Exception) -> UnavailableError:
        text = f"the stream to {self._node_id} broke: {type(cause).__name__}"
        return UnavailableError(text, hint="the peer may have stopped; try again")
