"""Changes of the state as server-sent events (WHATWG HTML, section 9.2).

`id` is the position in this node's change feed, so that a client resumes with `since`; a client that fell behind is
told how much it missed by an event `gap`, and never slows the node down.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from formation.core.clock import hlc_ms
from formation.core.event import EVENT_BY_VERB, event_fields
from formation.state.service import Change, Gap

KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which changes a follower wants; empty fields let everything through."""

    topic: str = ""
    trace_id: str = ""
    object_id: str = ""

    def passes(self, change: Change) -> bool:
        """Whether this change is wanted."""
        return (
            (not self.topic or change.topic == self.topic)
            and (not self.trace_id or change.trace_id == self.trace_id)
            and (not self.object_id or change.object_id == self.object_id)
        )


def change_json(change: Change) -> dict[str, Any]:
    """A change as the API shows it."""
    return {
        "position": change.position,
        "level": change.level.value,
        "verb": change.verb,
        "topic": change.topic.value,
        "record": change.record.value,
        "object_id": change.object_id,
        "node_id": change.node_id,
        "account": change.account,
        "at_ms": hlc_ms(change.hlc),
        "trace_id": change.trace_id,
        "op": f"{change.lane.hex()}-{change.seq}-{change.index}" if change.lane else "",
        "void": change.void,
        "fields": json_fields(event_fields(change.event)) if change.event is not None else {},
    }


def json_fields(value: Any) -> Any:
    """An event's fields as JSON has them: bytes in hex."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: json_fields(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_fields(item) for item in value]
    return value


def sse_change(change: Change) -> bytes:
    """One change as a server-sent event."""
    data = json.dumps(change_json(change), separators=(",", ":"))
    # A void operation's verb is whatever a peer wrote, line ends and all; in the data it stands quoted.
    name = change.verb if change.verb in EVENT_BY_VERB else "void"
    return f"id: {change.position}\nevent: {name}\ndata: {data}\n\n".encode()


def sse_gap(gap: Gap) -> bytes:
    """What a follower missed."""
    data = json.dumps({"missed": gap.missed_count, "position": gap.position})
    return f"id: {gap.position}\nevent: gap\ndata: {data}\n\n".encode()
