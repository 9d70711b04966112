"""Progress on stderr: one line a step, with a moving last line only where a terminal shows it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import TextIO

from formation.cli.output import Printer, paint, printable
from formation.cli.watch import Step
from formation.core.units import format_duration

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
# Ten frames a second look smooth and cost nothing.
FRAME_S = 0.1


class Progress:
    """Says what is going on; use as a context, which leaves no half line behind."""

    def __init__(self, out: Printer, *, stream: TextIO | None = None) -> None:
        """Progress beside `out`: silent when it is quiet, still when stderr is not a terminal."""
        self._stream = stream or sys.stderr
        self._silent = out.quiet
        self._color = out.color_err
        self._moves = self._stream.isatty() and os.environ.get("TERM") != "dumb" and not out.quiet
        self._drawn = False

    @property
    def moves(self) -> bool:
        """Whether `tick` draws anything."""
        return self._moves

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def step(self, text: str, elapsed_s: float, *, is_bad: bool = False) -> None:
        """A step is over."""
        if self._silent:
            return
        self.clear()
        mark = paint("✘", "red", color=self._color) if is_bad else paint("✔", "green", color=self._color)
        elapsed = paint(f"{format_duration(elapsed_s):>7}", "dim", color=self._color)
        self._stream.write(f"{mark} {elapsed}  {printable(text)}\n")
        self._stream.flush()

    def steps(self, steps: Iterable[Step]) -> None:
        """Steps of a wish are over."""
        for step in steps:
            self.step(step.text, step.elapsed_s, is_bad=step.is_bad)

    def say(self, text: str) -> None:
        """A remark between steps."""
        if not self._silent:
            self.clear()
            self._stream.write(f"  {printable(text)}\n")
            self._stream.flush()

    def tick(self, text: str, started_s: float) -> None:
        """Redraw the last line: what is being waited for, since when (monotonic seconds)."""
        if not self._moves:
            return
        now_s = time.monotonic()
        frame = _FRAMES[int(now_s / FRAME_S) % len(_FRAMES)]
        width = max(20, os.get_terminal_size(self._stream.fileno()).columns)
        line = f"{frame} {format_duration(now_s - started_s):>7}  waiting for {printable(text)}"
        self._stream.write("\r\x1b[2K" + line[: width - 1])
        self._stream.flush()
        self._drawn = True

    def clear(self) -> None:
        """Take the moving line away."""
        if self._drawn:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._drawn = False
