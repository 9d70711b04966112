from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from formation.node.telemetry import set_up_logs


class Terminal(io.StringIO):
    """Claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def one_line(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize(("form", "stream"), [("json", Terminal()), ("json", io.StringIO()), ("auto", io.StringIO())])
def test_programs_get_json(form: str, stream: io.StringIO) -> None:
    """One object a line, with level, time, event and values."""
    set_up_logs(level="info", form=form, stream=stream)
    structlog.get_logger("t").info("vm booted", vm_id="vm-1")
    line = one_line(stream)
    assert (line["event"], line["level"], line["vm_id"]) == ("vm booted", "info", "vm-1")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize(("form", "stream"), [("console", io.StringIO()), ("auto", Terminal())])
def test_people_get_text(form: str, stream: io.StringIO) -> None:
    """Event and values are readable, coloured on a terminal only."""
    set_up_logs(level="info", form=form, stream=stream)
    structlog.get_logger("t").info("vm booted", vm_id="vm-1")
    assert "vm booted" in stream.getvalue()
    assert not stream.getvalue().startswith("{")
    assert ("\x1b[" in stream.getvalue()) == stream.isatty()


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_what_is_below_the_level_is_left_out(level: str, shown: int) -> None:
    """Each level shows itself and what is above."""
    stream = io.StringIO()
    set_up_logs(level=level, form="json", stream=stream)
    log = structlog.get_logger("t")
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)("x")
    assert len(stream.getvalue().splitlines()) == shown


def test_a_traceback_stays_in_its_json_line() -> None:
    """An exception becomes a field."""
    stream = io.StringIO()
    set_up_logs(level="info", form="json", stream=stream)
    try:
        raise ValueError("odd")
    except ValueError:
        structlog.get_logger("t").exception("failed")
    assert "ValueError: odd" in one_line(stream)["exception"]


@pytest.mark.parametrize(("level", "lines"), [("debug", ["WARNING lib b"]), ("error", [])])
def test_libraries_are_heard_from_warnings_on(level: str, lines: list[str]) -> None:
    """Debugging the node does not mean debugging its libraries; a higher level counts for them too."""
    stream = io.StringIO()
    set_up_logs(level=level, form="console", stream=stream)
    logging.getLogger("lib").info("a")
    logging.getLogger("lib").warning("b")
    assert stream.getvalue().splitlines() == lines


def test_logs_go_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is for results."""
    set_up_logs(level="info", form="json")
    structlog.get_logger("t").info("x")
    out, err = capsys.readouterr()
    assert (out, json.loads(err)["event"]) == ("", "x")
