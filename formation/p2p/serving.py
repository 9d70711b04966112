"""How a stream handler is run: the one boundary where its failure stops, and work that ends when its asker goes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
import trio

from formation.core.errors import FormationError, UnavailableError
from formation.core.ids import NodeId
from formation.p2p.transport import READ_SIZE_MAX_BYTES, ByteStream, StreamHandler

# After a handler is done its peer may still be reading: a reset now would throw away what it has not read.
LINGER_S = 10.0
LINGER_SIZE_MAX_BYTES = 1 << 20

T = TypeVar("T")

_logger = structlog.get_logger(__name__)


class AskerGoneError(UnavailableError):
    """Nobody waits for the answer any more."""


async def serve_one(handler: StreamHandler, node_id: NodeId, stream: ByteStream) -> bool:
    """Run a handler on a stream and close it; False if the handler raised."""
    try:
        await handler(node_id, stream)
    except FormationError as exc:
        _logger.debug("stream handler ended", peer=node_id, error=str(exc))
        return False
    except Exception as exc:
        _logger.error("stream handler failed", peer=node_id, exc_info=exc)
        return False
    else:
        await _linger(stream)
        return True
    finally:
        await stream.aclose()


async def run_while(job: Callable[[], Awaitable[T]], wait_gone: Callable[[], Awaitable[object]]) -> T:
    """What a job gives. It is cancelled as soon as `wait_gone` returns, for nobody would hear it.

    Raises:
      AskerGoneError: it was cancelled so.
      Exception: what the job raised, as it is.
    """
    outcome: list[T] = []
    failure: Exception | None = None

    async def cancel_when_gone() -> None:
        await wait_gone()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_when_gone)
        try:
            outcome.append(await job())
        except Exception as exc:  # noqa: BLE001 - raised again below: the nursery would wrap it
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not outcome:
        raise AskerGoneError("the asker went", hint="")
    return outcome[0]


async def _linger(stream: ByteStream) -> None:
    """Say that we are done, and give the peer a while to read what was sent and to say so, too."""
    try:
        with trio.move_on_after(LINGER_S):
            await stream.send_eof()
            left = LINGER_SIZE_MAX_BYTES
            while left > 0:
                data = await stream.receive_some(READ_SIZE_MAX_BYTES)
                if not data:
                    return
                left -= len(data)
    except UnavailableError:
        return  # it left without a word; the handler is done all the same
