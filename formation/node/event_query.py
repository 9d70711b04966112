"""What somebody who asks for events wants: the query of `GET /v1/events`, read once and checked. Pure.

| name | value | again |
|---|---|---|
| `topic`, `record`, `level` | one of the kinds that there are | any of them |
| `account` | an AccountId, or a label that only one account has | any of them |
| `node` | a node's name, id or beginning of it: who wrote the block | any of them |
| `object`, `trace` | an id | no |
| `since` | a cursor, a bare position, a duration before now, or an RFC 3339 time with its zone | no |
| `follow` | 0: end at what there is now | no |

What several names say must all hold. A name that is not here is refused, for a filter that is passed over in silence shows
what nobody asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypeVar

from formation.core.errors import UsageError
from formation.core.event import RecordKind, Topic
from formation.core.units import parse_duration_s
from formation.state.feed import Cursor, Level, Wanted, parse_cursor

# Values of one name; more is a program that should filter by itself.
VALUE_COUNT_MAX = 32
# No id is longer; the texts come back in error messages.
VALUE_LENGTH_MAX = 256
NAMES = ("topic", "record", "level", "account", "node", "object", "trace", "since", "follow")
_ONCE = frozenset({"object", "trace", "since", "follow"})
_MS_PER_S = 1000

E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventQuery:
    """A query that is understood."""

    wanted: Wanted
    since: Cursor | None = None
    since_ms: int | None = None
    """Milliseconds since the epoch, where a time was given; neither this nor `since`: from now."""
    follow: bool = True


def parse_event_query(
    items: Iterable[tuple[str, str]],
    *,
    now_ms: int,
    find_node: Callable[[str], str],
    find_account: Callable[[str], str],
) -> EventQuery:
    """Read the names and values of a query.

    Args:
      items: in their order; a name may come several times.
      now_ms: by this node's clock; durations count back from it.
      find_node, find_account: the id that a value means; raise where it means none.

    Raises:
      UsageError: a name or value that is not understood; names it, with what comes near.
      NotFoundError, ConflictError: of `find_node` and `find_account`.
    """
    given: dict[str, list[str]] = {}
    for name, value in items:
        if name not in NAMES:
            raise UsageError(f"no filter {name[:40]!r}", hint=_suggestion(name, NAMES))
        values = given.setdefault(name, [])
        values.append(value)
        if len(values) > (1 if name in _ONCE else VALUE_COUNT_MAX):
            limit = "once" if name in _ONCE else f"{VALUE_COUNT_MAX} times"
            raise UsageError(f"{name} may be given {limit}", hint="schemas/README.md lists the API")
        if len(value) > VALUE_LENGTH_MAX:
            raise UsageError(f"{name}: {len(value)} characters, the limit is {VALUE_LENGTH_MAX}", hint="is that an id?")
    since, since_ms = _parse_since(given.get("since", [""])[0], now_ms=now_ms)
    accounts, nodes = given.get("account"), given.get("node")
    return EventQuery(
        wanted=Wanted(
            topics=_kinds(given.get("topic"), Topic, "topic"),
            records=_kinds(given.get("record"), RecordKind, "record"),
            levels=_kinds(given.get("level"), Level, "level"),
            accounts=None if accounts is None else frozenset(map(find_account, accounts)),
            node_ids=None if nodes is None else frozenset(map(find_node, nodes)),
            object_id=given.get("object", [""])[0],
            trace_id=given.get("trace", [""])[0],
        ),
        since=since,
        since_ms=since_ms,
        follow=given.get("follow", ["1"])[0] not in ("0", "false"),
    )


def _kinds(values: Sequence[str] | None, kind: type[E], name: str) -> frozenset[E] | None:
    if values is None:
        return None
    known = [member.value for member in kind]
    for value in values:
        if value not in known:
            raise UsageError(f"{name}: there is no {value[:40]!r}", hint=_suggestion(value, known))
    return frozenset(map(kind, values))


def _suggestion(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"one of: {', '.join(known)}"


def _parse_since(text: str, *, now_ms: int) -> tuple[Cursor | None, int | None]:
    if not text:
        return None, None
    cursor = parse_cursor(text)
    if cursor is not None:
        return cursor, None
    at_ms = _time_ms(text, now_ms=now_ms)
    if at_ms is None:
        raise UsageError(
            f"since: {text[:40]!r} is neither a position nor a time",
            hint="a position as an event shows it (`cursor`), or 10m, or 2026-01-31T12:00:00Z",
        )
    return None, at_ms


def _time_ms(text: str, *, now_ms: int) -> int | None:
    try:
        return max(0, now_ms - int(parse_duration_s(text, what="since") * _MS_PER_S))
    except (UsageError, OverflowError):
        pass
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    # A time without a zone would be another moment at each node.
    return None if at.tzinfo is None else max(0, int(at.timestamp() * _MS_PER_S))
