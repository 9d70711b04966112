"""Golden screens in `screens/`; FORMATION_REWRITE_SCRIPTS=1 writes them anew."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from formation.cli.tui.model import Model, Pane, View, press, with_event, with_log, with_news
from formation.cli.tui.render import render, to_text
from tests.unit.cli.fake_node import NODE_1, NODE_2, FakeNode, vm_record

_SCREENS = Path(__file__).parent / "screens"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("TZ", "UTC")
    fake = FakeNode(Path("unused"))
    web = vm_record("vm-" + "a" * 16, "web", phase="running")
    db = vm_record("vm-" + "b" * 16, "db", phase="failed") | {"reason": "qemu ended with status 1: no space left on device"}
    cache = vm_record("vm-" + "c" * 16, "cache", phase="booting")
    shown = with_news(Model(host="/run/n.sock"), status=fake.status(), nodes=tuple(fake.nodes()), vms=(web, db, cache))
    for position, verb in enumerate(("vm.claimed", "vm.scheduled", "vm.created", "vm.booted", "vm.ready"), start=1):
        event = {
            "position": position,
            "level": "final" if verb == "vm.claimed" else "certified",
            "verb": verb,
            "object_id": "vm-" + "a" * 16,
            "node_id": NODE_2,
            "at_ms": 1_700_000_000_000 + 1000 * position,
            "fields": {"why": "most room"} if verb == "vm.claimed" else {},
        }
        shown = with_event(shown, event)
    return shown


def _many(model: Model) -> Model:
    vms = tuple(vm_record(f"vm-{i:016d}", f"web-{i:02d}", phase="running") for i in range(40))
    nodes = tuple({"node_id": NODE_1, "name": f"n{i:02d}", "live": True} for i in range(12))
    model = with_news(model, status=model.status, nodes=nodes, vms=vms)
    for _ in range(25):
        model, _ = press(model, "j")
    return model


def _variants(model: Model) -> dict[str, tuple[Model, int, int]]:
    log = with_log(replace(model, view=View.LOGS, log_name="web"), "".join(f"line {i}\n" for i in range(100)))
    return {
        "lists_80x24": (model, 80, 24),
        "lists_140x40": (model, 140, 40),
        "lists_40x10": (model, 40, 10),
        "many_80x24": (_many(model), 80, 24),
        "events_80x24": (replace(model, pane=Pane.EVENTS), 80, 24),
        "filter_80x24": (replace(model, filter="web", is_typing=True), 80, 24),
        "unreachable_80x24": (replace(model, error="no node is running", age_s=12.3), 80, 24),
        "start_80x24": (Model(host="/run/n.sock"), 80, 24),
        "never_80x24": (Model(host="/run/n.sock", error="no node is running"), 80, 24),
        "details_80x24": (press(model, "enter")[0], 80, 24),
        "log_80x24": (log, 80, 24),
        "help_80x24": (press(model, "?")[0], 80, 24),
        "tiny_30x5": (model, 30, 5),
    }


@pytest.mark.parametrize("name", sorted(_variants(Model())))
def test_screen(model: Model, name: str) -> None:
    """The screen is exactly the golden one, and exactly as large as the terminal."""
    shown, width, height = _variants(model)[name]
    lines = render(shown, width, height)
    assert len(lines) == height
    text = to_text(lines)
    assert max(len(line) for line in text.split("\n")) <= width
    path = _SCREENS / f"{name}.txt"
    if os.environ.get("FORMATION_REWRITE_SCRIPTS"):
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [1, 39, 40, 59, 80, 99, 140, 300])
@pytest.mark.parametrize("height", [1, 9, 10, 11, 12, 16, 24, 60])
def test_every_size_fits(model: Model, width: int, height: int) -> None:
    """No size breaks it, and no line is wider than the terminal."""
    for shown, _, _ in _variants(model).values():
        lines = render(shown, width, height)
        assert len(lines) == height
        assert all(sum(len(span.text) for span in line) <= width for line in lines)


def test_colours_never_speak_alone(model: Model) -> None:
    """Each coloured piece holds a word."""
    spans = [span for line in render(model, 140, 40) for span in line if span.style in ("green", "yellow", "red")]
    assert {"failed", "running", "live"} <= {word for span in spans for word in span.text.split()}
    assert all(any(c.isalpha() for c in span.text) for span in spans)


def test_hostile_text_cannot_steer_the_terminal(model: Model) -> None:
    """Escapes in names, reasons and logs are shown as marks, wide letters are counted as two."""
    vm: dict[str, Any] = vm_record("vm-" + "d" * 16, "\x1b[2Jevil", phase="failed") | {"reason": "世界" * 60 + "\n\x07"}
    hostile = with_news(model, status=model.status, nodes=(), vms=(vm,))
    hostile = with_log(hostile, "\x1b]0;title\x07\n")
    for view in View:
        text = to_text(render(replace(hostile, view=view), 80, 24))
        assert "\x1b" not in text
        assert "\x07" not in text
    row = next(line for line in to_text(render(hostile, 80, 24)).split("\n") if "evil" in line)
    assert sum(2 if ord(c) > 0x2FFF and c != "\ufffd" else 1 for c in row) <= 80
