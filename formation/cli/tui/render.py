"""From the model to a screen of exactly `height` lines of at most `width` cells. Pure.

Colour says nothing alone: each phase, liveness and quorum is a word first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from formation.cli.output import PHASE_STYLES, printable
from formation.cli.tui.model import (
    Model,
    Pane,
    Record,
    View,
    cursor_of,
    detail_lines,
    event_cells,
    node_cells,
    rows_of,
    selected_vm,
    vm_cells,
)
from formation.core.units import format_duration

# Below this there is no room for three lists; a sentence says so.
WIDTH_MIN = 40
HEIGHT_MIN = 10
# A look that is older than this many seconds is marked, error or not.
STALE_S = 10.0
_GAP = "  "


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a line in one style (`green`, `yellow`, `red`, `dim`, `bold`, `reverse`, or empty)."""

    text: str
    style: str = ""


Line = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class _Col:
    """A column: its title, the widest that it gets, and from which screen width on it is shown."""

    title: str
    width_max: int
    from_width: int = 0


_NODE_COLS = (
    _Col("NODE", 16),
    _Col("STATE", 12),
    _Col("VMS", 7),
    _Col("CPU", 14),
    _Col("MEMORY", 16),
    _Col("HYPERVISOR", 12, 76),
    _Col("ID", 12, 110),
)
_VM_COLS = (
    _Col("VM", 24),
    _Col("PHASE", 9),
    _Col("NODE", 12),
    _Col("IMAGE", 16, 100),
    _Col("SIZE", 10, 110),
    _Col("PORTS", 40, 60),
    _Col("REASON", 200),
)
_EVENT_COLS = (_Col("TIME", 8), _Col("EVENT", 15), _Col("OBJECT", 20), _Col("NODE", 12), _Col("DETAIL", 200))

_HELP = (
    ("1 2 3, Tab", "go to nodes, VMs, events"),
    ("j k, arrows", "move; PgUp PgDn by ten, g G to the ends"),
    ("Enter", "show the selected thing in full"),
    ("l", "show the log of the selected VM"),
    ("/", "filter what is listed: /text, or /!text for all others; Esc ends it"),
    ("Ctrl-R", "look again now"),
    ("Esc", "go back"),
    ("?", "this help"),
    ("q, Ctrl-C", "leave"),
)


def render(model: Model, width: int, height: int) -> list[Line]:
    """The screen."""
    if width < WIDTH_MIN or height < HEIGHT_MIN:
        lines = [(Span(f"formation top needs {WIDTH_MIN}x{HEIGHT_MIN}, this is {width}x{height}"),)]
        return _exactly(lines, width, height)
    head = _header(model)
    room = height - len(head) - 1
    if model.view is View.HELP:
        body: list[Line] = [(Span("Keys", "bold"),), *[(Span(f"  {keys:<14}", "bold"), Span(text)) for keys, text in _HELP]]
    elif model.view is View.DETAILS:
        body = _details(model, room)
    elif model.view is View.LOGS:
        body = _logs(model, room)
    else:
        body = _lists(model, width, room)
    return [*_exactly([*head], width, len(head)), *_exactly(body, width, room), *_exactly([_footer(model)], width, 1)]


def to_text(lines: Sequence[Line]) -> str:
    """The screen without colours."""
    return "\n".join("".join(span.text for span in line).rstrip() for line in lines)


def _header(model: Model) -> list[Line]:
    status = model.status
    node, network, state = (status.get(part) or {} for part in ("node", "network", "state"))
    voters, peers = state.get("voters") or [], status.get("peers") or []
    online = sum(bool(voter.get("online")) for voter in voters)
    has_quorum = bool(state.get("has_quorum"))
    connected = sum(bool(peer.get("connected")) for peer in peers)
    if not status:
        first: Line = (Span("formation", "bold"), Span(f"  {printable(model.host)}"))
        return [first, _condition(model, ())]
    first = (
        Span("formation", "bold"),
        Span(f"  node {printable(str(node.get('name', '?')))}  network {printable(str(network.get('name', '?')))}  "),
        Span(f"quorum {online}/{len(voters)} {'ok' if has_quorum else 'LOST'}", "green" if has_quorum else "red"),
        Span(f"  peers {connected}/{len(peers)}  "),
        _age(model),
    )
    warnings = tuple(str(warning.get("text", "")) for warning in status.get("warnings") or ())
    return [first, _condition(model, warnings)]


def _age(model: Model) -> Span:
    if model.age_s is None:
        return Span("no answer yet", "yellow")
    stale = bool(model.error) or model.age_s > STALE_S
    # Whole seconds: tenths would flicker, and say nothing.
    return Span(f"seen {int(model.age_s)}s ago" + (" (old)" if stale else ""), "yellow" if stale else "dim")


def _condition(model: Model, warnings: Sequence[str]) -> Line:
    if model.error:
        since = f" for {format_duration(float(int(model.age_s)))}" if model.age_s else ""
        return (Span(f"node unreachable{since}, retrying: {printable(model.error)}", "red"),)
    if not model.status:
        return (Span("connecting", "yellow"),)
    if warnings:
        more = f" (and {len(warnings) - 1} more: formation status)" if len(warnings) > 1 else ""
        return (Span(f"warning: {printable(warnings[0])}{more}", "yellow"),)
    return (Span("all is well", "dim"),)


def _lists(model: Model, width: int, room: int) -> list[Line]:
    counts = {pane: len(rows_of(model, pane)) for pane in Pane}
    nodes_room, vms_room, events_room = _share(room, counts[Pane.NODES], counts[Pane.VMS])
    return [
        *_pane(model, Pane.NODES, "Nodes", _NODE_COLS, node_cells, _node_style, width, nodes_room),
        *_pane(model, Pane.VMS, "VMs", _VM_COLS, vm_cells, _vm_style, width, vms_room),
        *_pane(model, Pane.EVENTS, "Events", _EVENT_COLS, lambda e: event_cells(model, e), _event_style, width, events_room),
    ]


def _share(room: int, node_count: int, vm_count: int) -> tuple[int, int, int]:
    """Lines of each pane, with its title and its column heads: each has a part, what one leaves goes to the others."""
    nodes = min(node_count or 1, max(1, room // 5)) + 2
    events_least = max(3, room // 4)
    vms = min(vm_count or 1, max(1, room - nodes - events_least - 2)) + 2
    return nodes, vms, max(0, room - nodes - vms)


def _pane(
    model: Model,
    pane: Pane,
    title: str,
    columns: Sequence[_Col],
    cells_of: Callable[[Record], tuple[str, ...]],
    style_of: Callable[[Record], str],
    width: int,
    room: int,
) -> list[Line]:
    if room <= 0:
        return []
    rows = rows_of(model, pane)
    is_active = model.pane is pane
    cursor = cursor_of(model, pane)
    capacity = max(0, room - 2)
    first = max(0, min(cursor - capacity + 1, len(rows) - capacity)) if cursor >= capacity else 0
    shown = rows[first : first + capacity]
    count = f"{len(rows)}" if len(rows) <= capacity or not capacity else f"{first + 1}-{first + len(shown)} of {len(rows)}"
    filtered = f" matching {model.filter!r}" if model.filter else ""
    head = f"{'▸' if is_active else ' '} {pane.value} {title} ({count}{filtered}) "
    lines: list[Line] = [(Span(head + "─" * max(0, width - len(head)), "bold" if is_active else "dim"),)]
    visible = [index for index, column in enumerate(columns) if width >= column.from_width]
    cells = [[printable(cells_of(row)[index]) for index in visible] for row in shown]
    widths = [
        min(columns[index].width_max, max([len(columns[index].title), *[len(line[at]) for line in cells]]))
        for at, index in enumerate(visible)
    ]
    # The last column takes what is left, and shows by its … that there is more.
    widths[-1] = max(1, min(widths[-1], width - 2 - sum(widths[:-1]) - len(_GAP) * (len(widths) - 1)))
    lines.append((Span("  " + _row([columns[index].title for index in visible], widths), "dim"),))
    for offset, (row, line) in enumerate(zip(shown, cells, strict=True)):
        is_selected = is_active and first + offset == cursor
        lines.append(_row_line(line, widths, style_of(row), is_selected=is_selected))
    if not rows:
        lines.append((Span("  nothing here" + (" matches" if model.filter else " yet"), "dim"),))
    return lines[:room] + [()] * (room - len(lines))


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(f"{_crop(cell, width):<{width}}" for cell, width in zip(cells, widths, strict=True))


def _row_line(cells: Sequence[str], widths: Sequence[int], style: str, *, is_selected: bool) -> Line:
    """A row whose second cell (state, phase, verb) carries the colour; the selected one is marked and reversed."""
    if is_selected:
        return (Span("> " + _row(cells, widths), "reverse"),)
    before = "  " + _row(cells[:1], widths[:1]) + _GAP
    return (
        Span(before),
        Span(_row(cells[1:2], widths[1:2]), style),
        Span(_GAP + _row(cells[2:], widths[2:]) if len(cells) > 2 else ""),
    )


def _details(model: Model, room: int) -> list[Line]:
    lines = detail_lines(model)
    shown = lines[model.scroll : model.scroll + room - 1]
    head = f"Details (lines {model.scroll + 1}-{model.scroll + len(shown)} of {len(lines)})"
    return [(Span(head, "bold"),), *[(Span(printable(line)),) for line in shown]]


def _logs(model: Model, room: int) -> list[Line]:
    lines = model.log_lines[:-1] if model.log_lines and not model.log_lines[-1] else model.log_lines
    end = max(0, len(lines) - model.scroll)
    shown = lines[max(0, end - room + 1) : end]
    place = "following" if model.scroll == 0 else f"{model.scroll} lines above the end"
    note = f", {printable(model.log_note)}" if model.log_note else ""
    return [
        (Span(f"Log of {printable(model.log_name)} ({place}{note})", "bold"),),
        *[(Span(printable(line)),) for line in shown],
    ]


def _footer(model: Model) -> Line:
    if model.is_typing:
        return (Span("filter: ", "bold"), Span(printable(model.filter) + "▏"), Span("   Enter keeps it  Esc drops it", "dim"))
    if model.view is View.HELP:
        keys = [("?", "back"), ("q", "quit")]
    elif model.view is View.DETAILS:
        keys = [("Esc", "back"), ("j/k", "scroll"), ("?", "help"), ("q", "quit")]
    elif model.view is View.LOGS:
        keys = [("Esc", "back"), ("j/k", "scroll"), ("G", "follow"), ("?", "help"), ("q", "quit")]
    else:
        keys = [("q", "quit"), ("?", "help"), ("1-3", "panes"), ("j/k", "move"), ("/", "filter")]
        keys += [("Esc", "no filter")] if model.filter else []
        keys += [("Enter", "details")] if rows_of(model, model.pane) else []
        keys += [("l", "log")] if selected_vm(model) is not None else []
        keys += [("^R", "refresh")]
    return tuple(span for key, text in keys for span in (Span(key, "bold"), Span(f" {text}  ")))


def _node_style(node: Record) -> str:
    return "green" if node.get("live") else "red"


def _vm_style(vm: Record) -> str:
    return PHASE_STYLES.get(str(vm.get("phase", "")), "")


def _event_style(event: Record) -> str:
    return {"vm.ready": "green", "vm.failed": "red"}.get(str(event.get("verb", "")), "")


def _crop(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _exactly(lines: Sequence[Line], width: int, height: int) -> list[Line]:
    fitted = [_fitted(line, width) for line in lines[:height]]
    return fitted + [()] * (height - len(fitted))


def _fitted(line: Line, width: int) -> Line:
    """The line cut to the screen, so that it never wraps; wide characters count two cells."""
    spans, left = [], width
    for span in line:
        text = _cut_cells(span.text, left)
        left -= _cells(text)
        if text:
            spans.append(Span(text, span.style))
        if len(text) < len(span.text):
            break
    return tuple(spans)


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _cut_cells(text: str, width: int) -> str:
    if _cells(text) <= width:
        return text
    while text and _cells(text) > width:
        text = text[: -max(1, (_cells(text) - width) // 2)]
    return text
