"""`formation top` in a terminal: keys and news in, screens out."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from formation.cli.tui.feed import Feed, Happened, Logged, Looked, News, Unreachable
from formation.cli.tui.keys import cbreak, parse_keys
from formation.cli.tui.model import Action, Model, View, press, with_event, with_log, with_news
from formation.cli.tui.render import Line, render
from formation.cli.wish import make_permit
from formation.core.errors import UsageError

if TYPE_CHECKING:
    from formation.cli.context import Cli

INTERVAL_S_MIN = 0.2
# The age in the header counts seconds.
_TICK_S = 1.0
# A burst of events is one paint.
_PAINT_INTERVAL_S = 0.05
_READ_SIZE_BYTES = 4096


def run_top(cli: Cli, *, interval_s: float) -> None:
    """Show the network until the user leaves.

    Raises:
      UsageError: not on a terminal.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("top needs a terminal", hint="for programs: formation vm list -o json, formation events -f -o jsonl")
    if interval_s < INTERVAL_S_MIN:
        raise UsageError(f"--interval: shorter than {INTERVAL_S_MIN} s", hint="give 500ms or more")
    with _wake_pipe() as (wake_fd, wake):
        feed = Feed(cli.client, interval_s=interval_s, permit_for=partial(make_permit, cli), wake=wake)
        try:
            with cbreak(sys.stdin.fileno()), _screen(color=cli.out.color_out) as paint:
                feed.start()
                _Top(feed, paint, cli.client.host).run(wake_fd)
        finally:
            feed.stop()


class _Top:
    def __init__(self, feed: Feed, paint: Any, host: str) -> None:
        self._feed = feed
        self._paint = paint
        self._model = Model(host=host)
        self._seen_s: float | None = None

    def run(self, wake_fd: int) -> None:
        stdin = sys.stdin.fileno()
        self._show()
        while True:
            readable, _, _ = select.select([stdin, wake_fd], [], [], _TICK_S)
            if stdin in readable:
                data = os.read(stdin, _READ_SIZE_BYTES)
                if not data or not self._take_keys(parse_keys(data)):
                    return
            if wake_fd in readable:
                time.sleep(0 if stdin in readable else _PAINT_INTERVAL_S)
                os.read(wake_fd, _READ_SIZE_BYTES)
            for news in self._feed.news():
                self._take_news(news)
            self._show()

    def _take_keys(self, keys: list[str]) -> bool:
        for key in keys:
            self._model, action = press(self._model, key)
            if action is Action.QUIT:
                return False
            if action is Action.REFRESH:
                self._feed.look_now()
            elif action is Action.OPEN_LOGS:
                self._feed.open_log(self._model.log_vm)
            elif self._model.view is View.LISTS:
                self._feed.close_log()
        return True

    def _take_news(self, news: News) -> None:
        match news:
            case Looked(status=status, nodes=nodes, vms=vms):
                self._seen_s = time.monotonic()
                self._model = with_news(self._model, status=status, nodes=nodes, vms=vms)
            case Unreachable(reason=reason):
                self._model = replace(self._model, error=reason)
            case Happened(event=event):
                self._model = with_event(self._model, event)
            case Logged(vm_id=vm_id, text=text, note=note):
                if vm_id == self._model.log_vm:
                    self._model = replace(with_log(self._model, text), log_note=note)

    def _show(self) -> None:
        if self._seen_s is not None:
            self._model = replace(self._model, age_s=time.monotonic() - self._seen_s)
        self._paint(self._model)


@contextmanager
def _screen(*, color: bool) -> Iterator[Any]:
    """The alternate screen, painted by rich; the old one comes back at the end."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(no_color=not color, highlight=False)
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:

        def paint(model: Model) -> None:
            width, height = os.get_terminal_size(sys.stdout.fileno())
            lines = [_text(Text, line) for line in render(model, width, height)]
            live.update(Text("\n").join(lines), refresh=True)

        yield paint


def _text(text_class: Any, line: Line) -> Any:
    return text_class.assemble(*[(span.text, span.style) for span in line], no_wrap=True, end="")


@contextmanager
def _wake_pipe() -> Iterator[tuple[int, Any]]:
    """A descriptor that becomes readable on news and when the window's size changes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wake(*_: object) -> None:
        try:
            os.write(writer, b"\0")
        except OSError:
            # Full: it is readable already. Closed: the screen is gone, and a last thread does not know yet.
            pass

    before = signal.signal(signal.SIGWINCH, wake)
    try:
        yield reader, wake
    finally:
        signal.signal(signal.SIGWINCH, before)
        # The writer stays open: a thread that still runs must not write into a descriptor that is someone else's by now.
        os.close(reader)
