"""How results look: tables for people, JSON, YAML and names for programs; colour never says anything alone."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO

# A reason or a list of ports may be long; `-o wide` shows them whole.
CELL_LENGTH_MAX = 44
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_YAML_PLAIN = re.compile(r"^[A-Za-z_/][A-Za-z0-9_./+@-]*( [A-Za-z0-9_./+@-]+)*$")
_YAML_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})

_STYLE_CODES = {"green": "32", "yellow": "33", "red": "31", "dim": "2", "bold": "1", "cyan": "36"}
PHASE_STYLES = {
    "running": "green",
    "pending": "yellow",
    "placing": "yellow",
    "fetching": "yellow",
    "attaching": "yellow",
    "booting": "yellow",
    "stopping": "yellow",
    "deleting": "yellow",
    "stopped": "dim",
    "gone": "dim",
    "failed": "red",
    "unknown": "red",
}


class Format(StrEnum):
    """Forms of a result."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    YAML = "yaml"
    NAME = "name"


Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table, or one line of a single record."""

    title: str
    text: Callable[[Row], str]
    wide: bool = False
    """Only shown by `-o wide`."""
    style: Callable[[Row], str] | None = None
    """Style name by row."""
    whole: bool = False
    """Never cropped: for what people copy."""


class Printer:
    """Writes results to stdout and remarks to stderr."""

    def __init__(
        self,
        *,
        format_: Format = Format.TABLE,
        quiet: bool = False,
        headers: bool = True,
        color: str = "auto",
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        """Make a printer; `color` is auto, always or never."""
        self.format = format_
        self.quiet = quiet
        self.headers = headers
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self.color_out = wants_color(color, self._stdout, os.environ)
        self.color_err = wants_color(color, self._stderr, os.environ)

    @property
    def is_for_people(self) -> bool:
        """Whether a person reads stdout, so that hints are welcome."""
        return not self.quiet and self.format in (Format.TABLE, Format.WIDE)

    def rows(self, rows: Sequence[Row], columns: Sequence[Column], *, name: str, empty: str = "") -> None:
        """Print a list; `name` is the key of each row's id; `empty` is told on stderr when there is nothing."""
        if self.quiet or self.format is Format.NAME:
            for row in rows:
                self.line(printable(str(row[name])))
        elif self.format is Format.JSON:
            self.line(to_json(list(rows)))
        elif self.format is Format.JSONL:
            for row in rows:
                self.line(to_json_line(row))
        elif self.format is Format.YAML:
            self.line(to_yaml(list(rows)))
        elif not rows:
            self.remark(empty)
        else:
            shown = [c for c in columns if self.format is Format.WIDE or not c.wide]
            for line in table_lines(
                rows, shown, headers=self.headers, color=self.color_out, crop=self.format is not Format.WIDE
            ):
                self.line(line)

    def record(self, row: Row, columns: Sequence[Column], *, name: str) -> None:
        """Print one thing in full."""
        if self.quiet or self.format is Format.NAME:
            self.line(printable(str(row[name])))
        elif self.format is Format.JSON:
            self.line(to_json(row))
        elif self.format is Format.JSONL:
            self.line(to_json_line(row))
        elif self.format is Format.YAML:
            self.line(to_yaml(row))
        else:
            for line in record_lines(row, columns, color=self.color_out):
                self.line(line)

    def line(self, text: str) -> None:
        """One line of the result."""
        self._stdout.write(text + "\n")
        self._stdout.flush()

    def remark(self, text: str) -> None:
        """A line beside the result, silenced by -q."""
        if text and not self.quiet:
            self._stderr.write(text + "\n")
            self._stderr.flush()

    def hint(self, text: str) -> None:
        """A next step, for people only."""
        if self.is_for_people:
            self.remark(text)


def wants_color(choice: str, stream: TextIO, env: Mapping[str, str]) -> bool:
    """Whether to colour: --color, then NO_COLOR and FORMATION_NO_COLOR, then FORCE_COLOR, then whether a terminal reads."""
    if choice != "auto":
        return choice == "always"
    if env.get("NO_COLOR") or env.get("FORMATION_NO_COLOR") or env.get("TERM") == "dumb":
        return False
    return bool(env.get("FORCE_COLOR")) or stream.isatty()


def paint(text: str, style: str, *, color: bool) -> str:
    """The text in an ANSI style, or as it is."""
    return f"\x1b[{_STYLE_CODES[style]}m{text}\x1b[0m" if color and style and text else text


def printable(text: str) -> str:
    """The text without anything that could steer a terminal: what peers write reaches ours."""
    return _UNPRINTABLE.sub("\ufffd", text)


def table_lines(rows: Sequence[Row], columns: Sequence[Column], *, headers: bool, color: bool, crop: bool) -> list[str]:
    """Aligned columns, two spaces apart."""
    cells = [[_crop(printable(c.text(row)) or "-", crop and not c.whole) for c in columns] for row in rows]
    titles = [c.title for c in columns]
    widths = [max(len(line[i]) for line in [*cells, *([titles] if headers else [])]) for i in range(len(columns))]
    lines = [_aligned(titles, widths, [""] * len(columns), color=False)] if headers else []
    for row, line in zip(rows, cells, strict=True):
        lines.append(_aligned(line, widths, [c.style(row) if c.style else "" for c in columns], color=color))
    return lines


def record_lines(row: Row, columns: Sequence[Column], *, color: bool) -> list[str]:
    """`Title  text` lines; further lines of one text are indented below it; empty ones are left out."""
    shown = [(c, c.text(row)) for c in columns]
    shown = [(c, text) for c, text in shown if text]
    width = max((len(c.title) for c, _ in shown), default=0)
    lines = []
    for column, text in shown:
        style = column.style(row) if column.style else ""
        for index, part in enumerate(text.split("\n")):
            title = column.title if index == 0 else ""
            lines.append(f"{title:<{width}}  {paint(printable(part), style, color=color)}".rstrip())
    return lines


def to_json(value: Any) -> str:
    """Indented JSON, keys in the order of the API."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def to_json_line(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def to_yaml(value: Any) -> str:
    """YAML of JSON-like data: block mappings and lists, strings quoted as JSON wherever a plain one could be misread."""
    return "\n".join(_yaml_lines(value))


def _yaml_lines(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _yaml_item(f"{_yaml_scalar(str(key))}:", item)
    elif isinstance(value, list | tuple) and value:
        for item in value:
            lines = list(_yaml_lines(item))
            yield f"- {lines[0]}"
            yield from (f"  {line}" for line in lines[1:])
    else:
        yield _yaml_scalar(value)


def _yaml_item(head: str, item: Any) -> Iterable[str]:
    if isinstance(item, Mapping | list | tuple) and item:
        yield head
        yield from (f"  {line}" for line in _yaml_lines(item))
    else:
        yield f"{head} {_yaml_scalar(item)}"


def _yaml_scalar(value: Any) -> str:
    if isinstance(value, str) and _YAML_PLAIN.match(value) and value.lower() not in _YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def _aligned(cells: Sequence[str], widths: Sequence[int], styles: Sequence[str], *, color: bool) -> str:
    padded = [
        paint(cell, style, color=color) + " " * (width - len(cell))
        for cell, width, style in zip(cells, widths, styles, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _crop(text: str, crop: bool) -> str:
    return text[: CELL_LENGTH_MAX - 1] + "…" if crop and len(text) > CELL_LENGTH_MAX else text
