from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from formation.cli.tui.keys import parse_keys
from formation.cli.tui.model import (
    EVENT_COUNT_MAX,
    Action,
    Model,
    Pane,
    View,
    cursor_of,
    press,
    rows_of,
    selected,
    selected_vm,
    with_event,
    with_log,
    with_news,
)
from tests.unit.cli.fake_node import NODE_2, vm_record


def _vm(name: str, letter: str, phase: str = "running") -> dict[str, Any]:
    return vm_record("vm-" + letter * 16, name, phase=phase)


def _model() -> Model:
    vms = (_vm("web", "a"), _vm("db", "b", "failed"), _vm("cache", "c"))
    return with_news(
        Model(), status={"node": {"name": "n1"}}, nodes=({"node_id": NODE_2, "name": "n2", "live": True},), vms=vms
    )


def _pressed(model: Model, *keys: str) -> Model:
    for key in keys:
        model, _ = press(model, key)
    return model


def test_vms_are_sorted_and_cursor_moves_within() -> None:
    """j and k move, never out of the list."""
    model = _model()
    assert [vm["spec"]["name"] for vm in rows_of(model, Pane.VMS)] == ["cache", "db", "web"]
    assert cursor_of(_pressed(model, "j", "j", "j", "j"), Pane.VMS) == 2
    assert cursor_of(_pressed(model, "j", "k", "k", "up"), Pane.VMS) == 0
    assert cursor_of(_pressed(model, "G"), Pane.VMS) == 2
    assert cursor_of(_pressed(model, "G", "g"), Pane.VMS) == 0


def test_cursor_stays_in_a_list_that_shrinks() -> None:
    """A deleted VM does not leave the cursor in the void."""
    model = with_news(_pressed(_model(), "G"), status={}, nodes=(), vms=(_vm("web", "a"),))
    assert selected(model) is not None


def test_panes() -> None:
    """Numbers and Tab choose the pane."""
    assert _pressed(_model(), "1").pane is Pane.NODES
    assert _pressed(_model(), "tab").pane is Pane.EVENTS
    assert _pressed(_model(), "tab", "tab").pane is Pane.NODES


def test_filter_is_typed_and_dropped() -> None:
    """While a filter is typed all keys are its text; ! turns it round; Escape ends it."""
    model = _pressed(_model(), "/", "w", "q", "backspace", "e")
    assert (model.filter, model.is_typing) == ("we", True)
    assert [vm["spec"]["name"] for vm in rows_of(model, Pane.VMS)] == ["web"]
    inverse = _pressed(_model(), "/", *"!failed", "enter")
    assert [vm["spec"]["name"] for vm in rows_of(inverse, Pane.VMS)] == ["cache", "web"]
    assert _pressed(inverse, "escape").filter == ""
    assert _pressed(model, "escape").filter == ""


def test_actions() -> None:
    """Keys that the shell must act on."""
    model = _model()
    assert press(model, "q")[1] is Action.QUIT
    assert press(model, "ctrl-c")[1] is Action.QUIT
    assert press(replace(model, is_typing=True), "ctrl-c")[1] is Action.QUIT
    assert press(model, "ctrl-r")[1] is Action.REFRESH
    assert press(model, "x") == (model, Action.NONE)


def test_log_of_the_selected_vm() -> None:
    """l opens the log of the VM under the cursor, also from an event of it; a node has none."""
    model, action = press(_pressed(_model(), "j"), "l")
    assert (action, model.view, model.log_name) == (Action.OPEN_LOGS, View.LOGS, "db")
    model = with_log(with_log(model, "one\r\ntw"), "o\n")
    assert model.log_lines == ("one", "two", "")
    model = with_log(with_log(model, "\x1b[1;32mgreen\x1b[0m \x1b[6"), "n\x1b]0;title\x07end")
    assert model.log_lines[-1] == "green end"
    assert _pressed(model, "escape").view is View.LISTS
    event = {"object_id": "vm-" + "a" * 16, "verb": "vm.ready", "position": 1}
    vm = selected_vm(_pressed(with_event(_model(), event), "3"))
    assert vm is not None
    assert vm["spec"]["name"] == "web"
    assert press(_pressed(_model(), "1"), "l")[1] is Action.NONE


def test_details_and_help_come_back_to_where_they_were() -> None:
    """Enter, ?, and back again."""
    details = _pressed(_model(), "enter")
    assert details.view is View.DETAILS
    assert _pressed(details, "?", "?").view is View.DETAILS
    assert _pressed(details, "?", "escape", "escape").view is View.LISTS
    assert _pressed(details, "j", "j", "k").scroll == 1


def test_events_are_bounded_and_the_cursor_stays_on_its_event() -> None:
    """News do not push the event away that a person looks at."""
    model = _model()
    for position in range(EVENT_COUNT_MAX + 10):
        model = with_event(model, {"position": position, "verb": "vm.ready", "at_ms": position})
        model = with_event(model, {"position": position, "verb": "vm.ready", "at_ms": position, "level": "certified"})
    assert len(model.events) == EVENT_COUNT_MAX
    model = _pressed(model, "3", "j", "j")
    before = selected(model)
    assert selected(with_event(model, {"position": 9999, "verb": "vm.ready", "at_ms": 9999})) == before


@pytest.mark.parametrize(
    ("verb", "level", "void", "is_told"),
    [
        ("vm.ready", "observed", "", True),
        ("vm.claimed", "observed", "", False),
        ("vm.claimed", "certified", "", False),
        ("vm.claimed", "final", "", True),
        ("vm.claimed", "final", "held by another", True),
        ("of.a.newer.node", "observed", "", True),
    ],
)
def test_what_the_spine_decides_is_told_when_it_has(verb: str, level: str, void: str, is_told: bool) -> None:
    """A claim that is only certified has not happened yet."""
    model = with_event(_model(), {"position": 1, "verb": verb, "at_ms": 1, "level": level, "void": void})
    assert bool(model.events) is is_told


def test_keys_of_bytes() -> None:
    """Sequences, control characters, UTF-8, and a lone escape."""
    assert parse_keys(b"jk\x1b[A\x1bOB\x1b[5~") == ["j", "k", "up", "down", "page-up"]
    assert parse_keys(b"\x1b") == ["escape"]
    assert parse_keys(b"\x1b\x1b") == ["escape", "escape"]
    assert parse_keys(b"\x03\x12\t\r\x7f") == ["ctrl-c", "ctrl-r", "tab", "enter", "backspace"]
    assert parse_keys("ü/".encode()) == ["ü", "/"]
    assert parse_keys(b"\x1b[1;5Zq\x1b[99\x01") == ["q"]
    assert parse_keys(b"\x1bx\xff\x01q") == ["q"]
