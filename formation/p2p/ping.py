"""Ping: 32 random bytes there and back, by libp2p's own protocol, so that peers of any kind answer."""

from __future__ import annotations

import secrets

import trio

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.p2p.transport import ByteStream, Transport

# libp2p specification, "Ping".
PROTOCOL = "/ipfs/ping/1.0.0"
PAYLOAD_SIZE_BYTES = 32
# A stream for pings is kept open between them by some; one that says nothing for so long is closed.
SILENCE_MAX_S = 60.0


async def serve_ping(node_id: NodeId, stream: ByteStream) -> None:
    """Send back what comes, payload by payload, until the peer ends it."""
    while True:
        with trio.move_on_after(SILENCE_MAX_S) as scope:
            payload = await _receive_payload(stream)
            if len(payload) < PAYLOAD_SIZE_BYTES:
                return
            await stream.send_all(payload)
        if scope.cancelled_caught:
            return


async def ping(transport: Transport, node_id: NodeId) -> float:
    """Seconds that a payload took to a connected peer and back. The timeout is the caller's.

    Raises:
      UnavailableError: the peer broke off, serves no ping, or sent back something else.
    """
    stream = await transport.open_stream(node_id, PROTOCOL)
    try:
        payload = secrets.token_bytes(PAYLOAD_SIZE_BYTES)
        sent_at = trio.current_time()
        await stream.send_all(payload)
        answer = await _receive_payload(stream)
        if answer != payload:
            raise UnavailableError(f"{node_id} answers a ping with something else", hint="it may run another program")
        return trio.current_time() - sent_at
    finally:
        await stream.aclose()


async def _receive_payload(stream: ByteStream) -> bytes:
    """32 bytes, or fewer where the stream ended."""
    data = bytearray()
    while len(data) < PAYLOAD_SIZE_BYTES:
        more = await stream.receive_some(PAYLOAD_SIZE_BYTES - len(data))
        if not more:
            break
        data += more
    return bytes(data)
