"""`formation events`: what happens in the network, one line an event."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from formation.cli.context import Cli
from formation.cli.output import Format, paint, printable, to_json, to_json_line, to_yaml
from formation.cli.watch import port_texts, short_id
from formation.core.errors import FormationError, InterruptedByUserError

if TYPE_CHECKING:
    from formation.cli.client import ServerEvent

# A node may be restarted while somebody watches; one that stays away for longer is worth an exit status.
ABSENCE_S_MAX = 60.0

EXAMPLES = (
    "formation events                                everything that this node remembers",
    "formation events -f                             what happens from now on",
    "formation events --since 10m --topic vm         only VMs', of the last ten minutes",
    "formation events -f --record vm --node node2    what node2 says of VMs",
    "formation events -f --since 5f0c11d2-1042       go on where another look ended",
    "formation events -o wide                        also positions, and each level by itself",
    "formation events --vm web -o jsonl              one VM's, for programs",
)
_DETAIL_KEYS = ("reason", "why", "name", "image_name", "hypervisor", "desired", "boot_ms", "pulled_bytes", "label")


def show_events(
    cli: Cli,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens; without --since, from now.")] = False,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="CURSOR|TIME", help="After this event's cursor; or since 10m, or an RFC 3339 time."),
    ] = None,
    topic: Annotated[
        list[str] | None,
        typer.Option("--topic", help="Only node, account, image, vm, net, value, claim or committee; again for more."),
    ] = None,
    record: Annotated[
        list[str] | None,
        typer.Option("--record", help="Only about node, account, image, vm, value, claim, committee or cell; again for more."),
    ] = None,
    account: Annotated[
        list[str] | None, typer.Option("--account", metavar="ACCOUNT", help="Only in this account's name; again for more.")
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option("--node", metavar="NODE", help="Only what this node wrote; again for more.")
    ] = None,
    level: Annotated[
        list[str] | None, typer.Option("--level", help="Only as observed, certified or final; again for more.")
    ] = None,
    vm: Annotated[str | None, typer.Option("--vm", metavar="VM", help="Only about this VM.")] = None,
    object_: Annotated[str | None, typer.Option("--object", metavar="ID", help="Only about this object.")] = None,
    trace: Annotated[str | None, typer.Option("--trace", metavar="ID", help="Only what follows from one command.")] = None,
) -> None:
    """Show events. With -f they come as they happen, and the stream is taken up again when the node was away.

    What several options say must all hold. A cursor belongs to the node that gave it.
    """
    from formation.cli.vm import find_vm
    from formation.cli.wish import node_names

    object_id = str(find_vm(cli, vm)["vm_id"]) if vm else object_
    named = (("topic", topic), ("record", record), ("account", account), ("node", node), ("level", level))
    query: dict[str, str | list[str]] = {name: values for name, values in named if values}
    query |= {name: value for name, value in (("trace", trace), ("object", object_id)) if value}
    names = {str(row.get("vm_id")): str((row.get("spec") or {}).get("name", "")) for row in cli.client.rows("/v1/vms", "vms")}
    show = _Lines(cli, names | node_names(cli), is_all=since is None and not follow)
    if not follow:
        for event in cli.client.events(query | {"follow": "0", "since": since or "0"}):
            if event is not None:
                show.event(event)
        show.end()
        return
    try:
        _follow(cli, query, since or "", show)
    except KeyboardInterrupt as exc:
        # Where a program or person may go on; without it what happens meanwhile would have to be looked for.
        hint = f"go on from here: formation events -f --since {show.cursor}" if show.cursor else ""
        raise InterruptedByUserError("interrupted", hint=hint) from exc


def _follow(cli: Cli, query: Mapping[str, str | list[str]], since: str, show: _Lines) -> None:
    from formation.cli.follow import read_events

    absent_since_s: float | None = None
    for item in read_events(cli.client, query, threading.Event(), since=since):
        if isinstance(item, FormationError):
            now_s = time.monotonic()
            if not item.retryable or (absent_since_s is None and show.count == 0 and not show.was_open):
                raise item
            if absent_since_s is not None and now_s - absent_since_s > ABSENCE_S_MAX:
                raise item
            if absent_since_s is None:
                cli.out.remark("The node does not answer; trying again.")
                absent_since_s = now_s
            continue
        if absent_since_s is not None:
            cli.out.remark("The node is back.")
        absent_since_s, show.was_open = None, True
        if item is not None:
            show.event(item)


# An event is told at each level that it reaches, with this much between them at most.
TOLD_COUNT_MAX = 500


def event_key(data: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an event has in common with its tellings at other levels."""
    return tuple(data.get(name) for name in ("verb", "object_id", "node_id", "account", "at_ms", "void"))


def has_happened(data: Mapping[str, Any]) -> bool:
    """Whether this telling is of something that took effect; what the spine decides does when it is final."""
    from formation.core.event import EVENT_BY_VERB, OpClass

    event = EVENT_BY_VERB.get(str(data.get("verb", "")))
    return event is None or event.op_class is not OpClass.ORDERED or data.get("level") == "final" or bool(data.get("void"))


class _Lines:
    """Writes events in the wanted form."""

    def __init__(self, cli: Cli, names: Mapping[str, str], *, is_all: bool) -> None:
        """Args: is_all: whether everything was asked for that the node has, so that what is older is nobody's loss."""
        self._cli = cli
        self._is_all = is_all
        self._names = names
        self._all: list[Any] = []
        self._told: deque[tuple[Any, ...]] = deque(maxlen=TOLD_COUNT_MAX)
        self.count = 0
        self.was_open = False
        self.cursor = ""
        """Up to where everything was told; empty: the node has not said."""

    def event(self, event: ServerEvent) -> None:
        """One event, at once; a list that must be closed (JSON, YAML) only grows as far as the node remembers."""
        self.cursor = event.cursor or self.cursor
        if not event.kind:
            return
        kind, data = event.kind, event.data
        self.count += 1
        out = self._cli.out
        if kind == "gap" and (out.quiet or out.format in (Format.TABLE, Format.WIDE, Format.NAME)):
            out.remark(gap_text(data, is_all=self._is_all))
            return
        if kind == "gap":
            data = {"kind": "gap", **data}
        if out.quiet or out.format is Format.NAME:
            out.line(printable(str(data.get("position", ""))))
        elif out.format is Format.YAML:
            out.line(to_yaml([data]))
        elif out.format is Format.JSON:
            out.line(to_json_line(data)) if self.was_open else self._all.append(data)
        elif out.format is Format.JSONL:
            out.line(to_json_line(data))
        elif out.format is Format.WIDE or (has_happened(data) and event_key(data) not in self._told):
            self._told.append(event_key(data))
            out.line(event_line(data, self._names, color=out.color_out, wide=out.format is Format.WIDE))

    def end(self) -> None:
        """There is no more."""
        if self._cli.out.format is Format.JSON and not self._cli.out.quiet:
            self._cli.out.line(to_json(self._all))
        elif not self.count:
            self._cli.out.remark("No events.")


def gap_text(data: Mapping[str, Any], *, is_all: bool) -> str:
    """What cannot be told any more, and where to look instead."""
    count, last = data.get("missed", "?"), data.get("position", "?")
    events = "1 event" if count == 1 else f"{count} events"
    if is_all:
        return f"({events} before these are not kept one by one any more.)"
    first = data.get("first_position", "?")
    return f"Missed {events}, positions {first} to {last}; how things stand now: formation status, formation vm list"


def event_line(data: Mapping[str, Any], names: Mapping[str, str], *, color: bool, wide: bool = False) -> str:
    """`12:03:04.123  vm.ready  vm-…  node2  …`."""
    at_ms = data.get("at_ms")
    clock = clock_text(at_ms) if isinstance(at_ms, int) else "-"
    verb = str(data.get("verb", ""))
    node_id = str(data.get("node_id", ""))
    object_id = str(data.get("object_id", ""))
    known = names.get(object_id) or (object_id if wide else short_id(object_id))
    parts = [
        clock,
        paint(printable(f"{verb:<16}"), verb_style(verb, data), color=color),
        printable(f"{known:<19}"),
        printable(f"{names.get(node_id) or short_id(node_id):<10}"),
        printable(event_detail(data)),
    ]
    if wide:
        parts.insert(0, f"{data.get('position', '')!s:>7}  {data.get('level', ''):<9}")
    return "  ".join(parts).rstrip()


def event_detail(data: Mapping[str, Any]) -> str:
    """The few fields that a person wants to see at once."""
    fields = data.get("fields")
    if not isinstance(fields, Mapping):
        return ""
    if data.get("void"):
        return f"void: {data['void']}"
    texts = [f"{key}={fields[key]}" for key in _DETAIL_KEYS if fields.get(key)]
    return " ".join([*texts, *port_texts(fields)])


def verb_style(verb: str, data: Mapping[str, Any]) -> str:
    """Colour of a verb: good and bad ends, and what has no effect."""
    if data.get("void"):
        return "dim"
    return {"vm.ready": "green", "vm.failed": "red", "vm.stopped": "dim", "vm.gone": "dim"}.get(verb, "")


def clock_text(at_ms: int) -> str:
    """Local time of day, with milliseconds."""
    return time.strftime("%H:%M:%S", time.localtime(at_ms / 1000)) + f".{at_ms % 1000:03d}"
