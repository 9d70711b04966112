"""Changes of the state as server-sent events (WHATWG HTML, section 9.2).

`id` is the cursor in this node's change feed (`FEED_ID-POSITION`), with which a client resumes as `since`. It comes alone when
the stream opens and with each keep-alive, so that a client whose filter lets little through need not look at all again. A
client that fell behind is told how much it missed by an event `gap`, and never slows the node down.
"""

from __future__ import annotations

import json
from typing import Any

from formation.core.clock import hlc_ms
from formation.core.event import EVENT_BY_VERB, event_fields
from formation.state.service import Change, Cursor, Gap

KEEP_ALIVE_S = 10.0


# A reader that takes nothing for so long is let go: it comes back with its cursor and is told what it missed.
STALL_TIMEOUT_S = 60.0
# Programs and people that follow at one node; each may make us hold one piece of changes and what its socket buffers.
FOLLOWER_COUNT_MAX = 64


def change_json(change: Change, feed_id: str) -> dict[str, Any]:
    """A change as the API shows it."""
    return {
        "position": change.position,
        "cursor": str(Cursor(feed_id, change.position)),
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


def sse_change(change: Change, feed_id: str) -> bytes:
    """One change as a server-sent event."""
    data = json.dumps(change_json(change, feed_id), separators=(",", ":"))
    # A void operation's verb is whatever a peer wrote, line ends and all; in the data it stands quoted.
    name = change.verb if change.verb in EVENT_BY_VERB else "void"
    return f"id: {Cursor(feed_id, change.position)}\nevent: {name}\ndata: {data}\n\n".encode()


def gap_json(gap: Gap, feed_id: str) -> dict[str, Any]:
    """What a follower missed, as the API shows it."""
    return {
        "missed": gap.missed_count,
        "first_position": gap.first_position,
        "position": gap.position,
        "cursor": str(Cursor(feed_id, gap.position)),
    }


def sse_gap(gap: Gap, feed_id: str) -> bytes:
    """What a follower missed, as a server-sent event."""
    data = json.dumps(gap_json(gap, feed_id), separators=(",", ":"))
    return f"id: {Cursor(feed_id, gap.position)}\nevent: gap\ndata: {data}\n\n".encode()


def sse_cursor(cursor: Cursor, *, comment: str = "keep-alive") -> bytes:
    """A sign of life, and up to where everything has been told."""
    return f": {comment}\nid: {cursor}\n\n".encode()
