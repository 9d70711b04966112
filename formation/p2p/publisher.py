"""Event Publisher: gossip out."""

from __future__ import annotations

from formation.core.errors import UsageError
from formation.p2p.transport import GOSSIP_SIZE_MAX_BYTES, Transport

# A topic is `formation/<16 hex>/<name>`; others refuse longer ones unread.
TOPIC_LENGTH_MAX = 200


class Publisher:
    """Checks and counts what goes out."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.published_count = 0
        self.published_bytes = 0

    async def publish_event(self, topic: str, data: bytes) -> None:
        """Gossip a message; lossy: nothing may depend on its arrival.

        Raises:
          UsageError: it, or the topic's name, is too long.
        """
        if not 0 < len(topic) <= TOPIC_LENGTH_MAX:
            raise UsageError(f"topic of {len(topic)} characters", hint=f"1 to {TOPIC_LENGTH_MAX} are allowed")
        if len(data) > GOSSIP_SIZE_MAX_BYTES:
            raise UsageError(f"gossip of {len(data)} bytes, {GOSSIP_SIZE_MAX_BYTES} allowed", hint="send it as a stream")
        await self._transport.publish(topic, data)
        self.published_count += 1
        self.published_bytes += len(data)
