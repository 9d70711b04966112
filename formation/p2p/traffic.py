"""What was sent and received by one protocol since start."""

from __future__ import annotations

from dataclasses import dataclass

from formation.core.histogram import Histogram


@dataclass(slots=True)
class Traffic:
    """Messages and their payload; for requests: questions and answers in both directions."""

    sent_count: int = 0
    sent_bytes: int = 0
    received_count: int = 0
    received_bytes: int = 0
    latency: Histogram | None = None
    """From asking to the answer, in seconds; None: nothing is asked in this protocol."""

    def note_sent(self, size_bytes: int) -> None:
        """One message went out."""
        self.sent_count += 1
        self.sent_bytes += size_bytes

    def note_received(self, size_bytes: int) -> None:
        """One message came in."""
        self.received_count += 1
        self.received_bytes += size_bytes
