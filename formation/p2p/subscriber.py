"""Event Subscriber: gossip in. A message is judged before it is passed on; a judge that fails passes nothing on."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from formation.core.errors import FormationError
from formation.core.ids import NodeId
from formation.p2p.score import Offence
from formation.p2p.transport import Deliver, OffenceCallback, Transport, Validate, Verdict

_logger = structlog.get_logger(__name__)


@dataclass(slots=True)
class GossipCounters:
    """Messages since start, by what became of them."""

    delivered_count: int = 0
    delivered_bytes: int = 0
    rejected_count: int = 0
    ignored_count: int = 0
    failed_count: int = 0
    """Whose validator or receiver raised what it should not."""


class Subscriber:
    """Runs validators and receivers so that they cannot harm the network."""

    def __init__(self, transport: Transport, *, on_offence: OffenceCallback) -> None:
        self._transport = transport
        self._on_offence = on_offence
        self.counters = GossipCounters()

    def subscribe_topic(self, topic: str, validate: Validate, deliver: Deliver) -> None:
        """Take part in a topic."""

        def judge(author: NodeId, data: bytes) -> Verdict:
            verdict = self._judge(topic, validate, author, data)
            if verdict is Verdict.REJECT:
                self.counters.rejected_count += 1
                # The author's: its signature was checked, and who passed it on may know other rules.
                self._on_offence(author, Offence.REJECTED)
            elif verdict is Verdict.IGNORE:
                self.counters.ignored_count += 1
            return verdict

        def receive(author: NodeId, data: bytes) -> None:
            self.counters.delivered_count += 1
            self.counters.delivered_bytes += len(data)
            try:
                deliver(author, data)
            except Exception as exc:
                self.counters.failed_count += 1
                _logger.error("gossip receiver failed", topic=topic, author=author, exc_info=exc)

        self._transport.subscribe(topic, judge, receive)

    def unsubscribe_topic(self, topic: str) -> None:
        """Take no part in a topic any more."""
        self._transport.unsubscribe(topic)

    def _judge(self, topic: str, validate: Validate, author: NodeId, data: bytes) -> Verdict:
        try:
            return validate(author, data)
        except FormationError as exc:
            _logger.debug("gossip refused", topic=topic, author=author, error=str(exc))
            return Verdict.REJECT
        except Exception as exc:
            # Our fault, not the author's: do not pass it on, do not blame.
            self.counters.failed_count += 1
            _logger.error("gossip validator failed", topic=topic, author=author, exc_info=exc)
            return Verdict.IGNORE
