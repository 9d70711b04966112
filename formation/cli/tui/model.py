"""State of the screen, and what each key does to it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from formation.cli.events import clock_text, event_detail, event_key, has_happened
from formation.cli.output import to_yaml
from formation.cli.watch import port_texts, reason_of, short_id

Record = Mapping[str, Any]

# What a person scrolls back through by hand; older events are in `formation events`.
EVENT_COUNT_MAX = 500
LOG_LINE_COUNT_MAX = 1000
# Observed and certified are one event told twice, with few others between them.
_TWICE_WITHIN_COUNT = 100
# Control sequences (ECMA-48 section 5.4) that guests write for a terminal; the screen here is ours.
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(\x07|\x1b\\)|[@-Z^_])")
FILTER_LENGTH_MAX = 60


class Pane(Enum):
    """The three lists."""

    NODES = 1
    VMS = 2
    EVENTS = 3


class View(Enum):
    """What fills the screen."""

    LISTS = auto()
    DETAILS = auto()
    LOGS = auto()
    HELP = auto()


class Action(Enum):
    """What a key asks of the shell."""

    NONE = auto()
    QUIT = auto()
    REFRESH = auto()
    OPEN_LOGS = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Everything that the screen shows."""

    host: str = ""
    status: Record = field(default_factory=dict)
    nodes: tuple[Record, ...] = ()
    vms: tuple[Record, ...] = ()
    events: tuple[Record, ...] = ()
    """Oldest first."""
    error: str = ""
    """Why the last look failed; empty when it did not."""
    age_s: float | None = None
    """Since the last successful look; None before the first."""
    pane: Pane = Pane.VMS
    cursors: tuple[int, int, int] = (0, 0, 0)
    """Row of each pane; for events 0 is the newest."""
    filter: str = ""
    is_typing: bool = False
    """The filter is being typed."""
    view: View = View.LISTS
    before_help: View = View.LISTS
    scroll: int = 0
    """First line shown of details, or lines above the end of logs."""
    log_vm: str = ""
    log_name: str = ""
    log_lines: tuple[str, ...] = ()
    log_note: str = ""


def press(model: Model, key: str) -> tuple[Model, Action]:
    """The model after a key, and what the shell shall do.

    Keys are single characters or names: `up`, `down`, `left`, `right`, `page-up`, `page-down`, `home`, `end`, `enter`,
    `escape`, `tab`, `backspace`, `ctrl-c`, `ctrl-r`.
    """
    if key == "ctrl-c":
        return model, Action.QUIT
    if model.is_typing:
        return _typed(model, key), Action.NONE
    if key == "q":
        return model, Action.QUIT
    if key == "ctrl-r":
        return model, Action.REFRESH
    if key == "?":
        if model.view is View.HELP:
            return replace(model, view=model.before_help), Action.NONE
        return replace(model, view=View.HELP, before_help=model.view), Action.NONE
    if model.view is not View.LISTS:
        return _pressed_in_view(model, key), Action.NONE
    return _pressed_in_lists(model, key)


def with_news(model: Model, *, status: Record, nodes: tuple[Record, ...], vms: tuple[Record, ...]) -> Model:
    """The model after a successful look; cursors stay within their lists."""
    ordered = tuple(sorted(vms, key=lambda vm: (str((vm.get("spec") or {}).get("name", "")), str(vm.get("vm_id", "")))))
    named = tuple(sorted(nodes, key=lambda node: str(node.get("name", ""))))
    return _clamped(replace(model, status=status, nodes=named, vms=ordered, error="", age_s=0.0))


def with_event(model: Model, event: Record) -> Model:
    """The model with one more event, told once, when it took effect; a cursor that is not at the newest stays where it was."""
    key = event_key(event)
    if not has_happened(event) or any(event_key(known) == key for known in model.events[-_TWICE_WITHIN_COUNT:]):
        return model
    events = (*model.events, event)[-EVENT_COUNT_MAX:]
    nodes, vms, at = model.cursors
    shifted = at + 1 if at and _passes(event_cells(model, event), model.filter) else at
    return _clamped(replace(model, events=events, cursors=(nodes, vms, shifted)))


def with_log(model: Model, text: str) -> Model:
    """The model with more of the log that is shown; an unfinished last line is continued."""
    joined = (model.log_lines[-1] if model.log_lines else "") + text.replace("\r\n", "\n").replace("\r", "\n")
    joined = _ESCAPES.sub("", joined)
    lines = (*model.log_lines[:-1], *joined.split("\n"))
    return replace(model, log_lines=lines[-LOG_LINE_COUNT_MAX:])


def rows_of(model: Model, pane: Pane) -> tuple[Record, ...]:
    """What a pane lists, filtered; events newest first."""
    if pane is Pane.NODES:
        return tuple(node for node in model.nodes if _passes(node_cells(node), model.filter))
    if pane is Pane.VMS:
        return tuple(vm for vm in model.vms if _passes(vm_cells(vm), model.filter))
    return tuple(event for event in reversed(model.events) if _passes(event_cells(model, event), model.filter))


def cursor_of(model: Model, pane: Pane) -> int:
    """The row that a pane points at."""
    return model.cursors[pane.value - 1]


def selected(model: Model) -> Record | None:
    """What the cursor of the active pane points at."""
    rows = rows_of(model, model.pane)
    at = cursor_of(model, model.pane)
    return rows[at] if at < len(rows) else None


def selected_vm(model: Model) -> Record | None:
    """The VM under the cursor, also when it is an event of that VM."""
    row = selected(model)
    if row is None or model.pane is Pane.NODES:
        return None
    vm_id = row.get("vm_id") or row.get("object_id")
    return next((vm for vm in model.vms if vm.get("vm_id") == vm_id), None)


def node_cells(node: Record) -> tuple[str, ...]:
    """Name, liveness, load, VMs, hypervisor, address."""
    live = node.get("live")
    silent_s = node.get("silent_s")
    word = "live" if live else f"SILENT {silent_s:.0f}s" if isinstance(silent_s, int | float) else "SILENT"
    promised, capacity = node.get("promised") or {}, node.get("capacity") or {}
    load = f"{promised.get('vcpus', 0)}/{capacity.get('vcpus', '?')} vCPU"
    memory = f"{promised.get('memory_mib', 0)}/{capacity.get('memory_mib', '?')}MiB"
    return (
        str(node.get("name", "")),
        word,
        f"{node.get('vms', 0)} VMs",
        load,
        memory,
        str(node.get("hypervisor") or "no VMs"),
        short_id(str(node.get("node_id", ""))),
    )


def vm_cells(vm: Record) -> tuple[str, ...]:
    """Name, phase, node, image, size, ports, reason."""
    spec = vm.get("spec") or {}
    return (
        str(spec.get("name", "")),
        str(vm.get("phase", "")),
        str(vm.get("node") or "-"),
        str(spec.get("image_name", "")),
        f"{spec.get('vcpus', '?')}x{spec.get('memory_mib', '?')}MiB",
        ", ".join(port_texts(vm)),
        reason_of(vm),
    )


def event_cells(model: Model, event: Record) -> tuple[str, ...]:
    """Time, verb, object, node, detail."""
    at_ms = event.get("at_ms")
    vms = {vm.get("vm_id"): str((vm.get("spec") or {}).get("name", "")) for vm in model.vms}
    nodes = {node.get("node_id"): str(node.get("name", "")) for node in model.nodes}
    object_id, node_id = str(event.get("object_id", "")), str(event.get("node_id", ""))
    return (
        clock_text(at_ms)[:8] if isinstance(at_ms, int) else "",
        str(event.get("verb", "")),
        vms.get(object_id) or nodes.get(object_id) or short_id(object_id),
        nodes.get(node_id) or short_id(node_id),
        event_detail(event),
    )


def detail_lines(model: Model) -> tuple[str, ...]:
    """The selected thing in full, as YAML."""
    row = selected(model)
    return tuple(to_yaml(dict(row)).split("\n")) if row is not None else ("nothing is selected",)


def _pressed_in_lists(model: Model, key: str) -> tuple[Model, Action]:
    if key in ("1", "2", "3"):
        return replace(model, pane=Pane(int(key))), Action.NONE
    if key == "tab":
        return replace(model, pane=Pane(model.pane.value % len(Pane) + 1)), Action.NONE
    if key in _MOVES:
        return _moved(model, _MOVES[key]), Action.NONE
    if key == "/":
        return replace(model, is_typing=True), Action.NONE
    if key == "escape":
        return _clamped(replace(model, filter="")), Action.NONE
    if key == "enter" and selected(model) is not None:
        return replace(model, view=View.DETAILS, scroll=0), Action.NONE
    vm = selected_vm(model)
    if key == "l" and vm is not None:
        name = str((vm.get("spec") or {}).get("name", ""))
        opened = replace(
            model, view=View.LOGS, scroll=0, log_vm=str(vm.get("vm_id", "")), log_name=name, log_lines=(), log_note="opening"
        )
        return opened, Action.OPEN_LOGS
    return model, Action.NONE


def _pressed_in_view(model: Model, key: str) -> Model:
    if key in ("escape", "left", "h") or (key == "enter" and model.view is View.DETAILS):
        return replace(model, view=model.before_help if model.view is View.HELP else View.LISTS, scroll=0)
    if key not in _MOVES or model.view is View.HELP:
        return model
    # Details scroll down from their top; logs scroll up from their end.
    if model.view is View.DETAILS:
        top = max(0, len(detail_lines(model)) - 1)
        return replace(model, scroll=min(top, max(0, model.scroll + _MOVES[key])))
    return replace(model, scroll=min(max(0, len(model.log_lines) - 1), max(0, model.scroll - _MOVES[key])))


_PAGE = 10
_FAR = 1_000_000
_MOVES = {
    "j": 1,
    "down": 1,
    "k": -1,
    "up": -1,
    "page-down": _PAGE,
    "page-up": -_PAGE,
    "g": -_FAR,
    "home": -_FAR,
    "G": _FAR,
    "end": _FAR,
}


def _moved(model: Model, by: int) -> Model:
    cursors = list(model.cursors)
    cursors[model.pane.value - 1] += by
    return _clamped(replace(model, cursors=(cursors[0], cursors[1], cursors[2])))


def _typed(model: Model, key: str) -> Model:
    if key == "enter":
        return replace(model, is_typing=False)
    if key == "escape":
        return _clamped(replace(model, is_typing=False, filter=""))
    text = model.filter
    if key == "backspace":
        text = text[:-1]
    elif len(key) == 1 and key.isprintable():
        text = (text + key)[:FILTER_LENGTH_MAX]
    return _clamped(replace(model, filter=text))


def _clamped(model: Model) -> Model:
    nodes, vms, events = (
        max(0, min(cursor_of(model, pane), len(rows_of(model, pane)) - 1)) for pane in (Pane.NODES, Pane.VMS, Pane.EVENTS)
    )
    return replace(model, cursors=(nodes, vms, events))


def _passes(cells: tuple[str, ...], wanted: str) -> bool:
    """Whether a row shows the text anywhere; `!text` turns it round."""
    if not wanted or wanted == "!":
        return True
    text = " ".join(cells).lower()
    return wanted[1:].lower() not in text if wanted.startswith("!") else wanted.lower() in text
