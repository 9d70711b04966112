"""Sends a wish and follows it to its end: the shell around `watch.Watch`.

Three things run side by side: a thread reads the event stream and opens it again from where it broke, a thread hands
the signed wish over (again and again while the node is away: the same wish twice is the same wish), and the main
thread looks at the VM every few seconds and judges. Ctrl-C therefore always works at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formation.cli.client import Client, ServerEvent
from formation.cli.progress import FRAME_S, Progress
from formation.cli.watch import ABSENCE_S_MAX, Watch
from formation.core.errors import FormationError, InterruptedByUserError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from formation.core.intent import SignedIntent

# Between looks at the VM: catches what no event tells, such as a holder gone silent.
LOOK_INTERVAL_S = 2.0
# While an ending waits for its certificate.
CONFIRM_INTERVAL_S = 0.05
RETRY_DELAY_S = (0.1, 0.2, 0.5, 1.0, 1.0)
# The stream should be open before the wish is sent, so that no step is missed; an old node gets no longer than this.
OPEN_WAIT_S = 2.0
# Far more than one VM's events; a reader that falls behind blocks the reading thread, nothing else.
_QUEUE_SIZE_MAX = 1000


@dataclass(frozen=True, slots=True)
class _Opened:
    """The event stream is open."""


@dataclass(frozen=True, slots=True)
class _Lost:
    """The event stream broke."""

    error: FormationError


@dataclass(frozen=True, slots=True)
class _Accepted:
    """The wish is certified."""


@dataclass(frozen=True, slots=True)
class _Refused:
    """The wish was not taken."""

    error: FormationError


_Message = ServerEvent | _Opened | _Lost | _Accepted | _Refused


def send_wish(client: Client, wish: SignedIntent) -> dict[str, Any]:
    """Hand a wish over and come back when it is certified, trying again while the node is away.

    Raises:
      FormationError: refused, no quorum, or the node stays away.
    """
    deadline_s = time.monotonic() + ABSENCE_S_MAX
    for delay_s in _delays():
        try:
            return client.post_intent(wish.signed.raw)
        except UnavailableError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(delay_s)
    raise AssertionError("delays never end")


def follow_wish(client: Client, wish: SignedIntent, watch: Watch, progress: Progress, *, timeout_s: float) -> None:
    """Send a wish and wait until its goal is reached.

    Args:
      client: the node.
      wish: what the account wants.
      watch: judge of it; holds the steps and the VM afterwards.
      progress: where the steps are shown.
      timeout_s: patience.
      is_placed: whether some node may hold the VM already.

    Raises:
      FormationError: the wish failed, or the wait ended without it.
    """
    messages: queue.Queue[_Message] = queue.Queue(_QUEUE_SIZE_MAX)
    stopped = threading.Event()
    follower = _Follower(client, watch, progress, messages)
    reader = threading.Thread(target=_read_events, args=(client, {"object": watch.vm_id}, messages, stopped), daemon=True)
    sender = threading.Thread(target=_send, args=(client, wish, messages), daemon=True)
    try:
        reader.start()
        follower.wait_open()
        sender.start()
        follower.run(deadline_s=watch.started_s + timeout_s, timeout_s=timeout_s)
    except KeyboardInterrupt as exc:
        progress.clear()
        raise InterruptedByUserError(
            f"interrupted; the network goes on with {watch.label}",
            hint=f"formation vm show {watch.label}   (id {watch.vm_id})",
        ) from exc
    finally:
        stopped.set()
    if watch.failure is not None:
        raise watch.failure


class _Follower:
    """The main thread's part."""

    def __init__(self, client: Client, watch: Watch, progress: Progress, messages: queue.Queue[_Message]) -> None:
        self._client = client
        self._watch = watch
        self._progress = progress
        self._messages = messages
        self._last_look_s = 0.0

    def wait_open(self) -> None:
        """Wait a moment for the stream, so that the first steps are seen."""
        try:
            message = self._messages.get(timeout=OPEN_WAIT_S)
        except queue.Empty:
            return
        self._take(message)

    def run(self, *, deadline_s: float, timeout_s: float) -> None:
        """Judge what comes in until it is over."""
        self._last_look_s = time.monotonic()
        while not self._watch.is_over:
            now_s = time.monotonic()
            if now_s >= deadline_s:
                self._watch.timed_out(timeout_s)
                return
            try:
                self._take(self._messages.get(timeout=min(FRAME_S, deadline_s - now_s)))
            except queue.Empty:
                self._progress.tick(self._watch.waiting_for, self._watch.started_s)
            if self._watch.is_accepted and not self._watch.is_over:
                self._look_if_due()

    def _take(self, message: _Message) -> None:
        now_s = time.monotonic()
        match message:
            case ServerEvent(data=data):
                self._say(self._watch.back())
                self._progress.steps(self._watch.happened(data, now_s))
            case _Accepted():
                self._progress.steps(self._watch.accepted(now_s))
            case _Opened():
                self._say(self._watch.back())
            case _Refused(error=error):
                self._watch.refused(error)
            case _Lost(error=error):
                self._say(self._watch.lost(error, now_s))

    def _look_if_due(self) -> None:
        now_s = time.monotonic()
        if now_s - self._last_look_s < (CONFIRM_INTERVAL_S if self._watch.needs_look else LOOK_INTERVAL_S):
            return
        try:
            self._watch.looked(self._client.get(f"/v1/vms/{self._watch.vm_id}", timeout_s=LOOK_INTERVAL_S), time.monotonic())
            self._say(self._watch.back())
        except NotFoundError:
            self._watch.looked(None, time.monotonic())
        except UnavailableError as error:
            self._say(self._watch.lost(error, now_s))
        self._last_look_s = time.monotonic()

    def _say(self, remark: str) -> None:
        if remark:
            self._progress.say(remark)


def read_events(
    client: Client,
    query: Mapping[str, str | list[str]],
    stopped: threading.Event,
    *,
    since: str = "",
    since_after_break: str = "",
) -> Iterator[ServerEvent | FormationError | None]:
    """Events, with the stream opened again from the last position whenever it breaks.

    Args:
      client: the node.
      query: filters.
      stopped: set it to end.
      since: cursor or time to begin after; empty: now.
      since_after_break: the same where the stream broke before its first event.

    Yields None each time that the stream opens, and the error each time that it breaks or cannot be opened. Ends when
    `stopped` is set, or after an error that trying again cannot mend. Events of kind "" say only how far the node has told.
    """
    delays = _delays()
    while not stopped.is_set():
        resumed = {**query, "follow": "1", **({"since": since} if since else {})}
        try:
            for event in client.events(resumed):
                if stopped.is_set():
                    return
                if event is not None and event.cursor:
                    since = event.cursor
                delays = _delays()
                yield event
            yield UnavailableError("the node ended the event stream", hint="is it shutting down? formation status")
        except FormationError as error:
            yield error
            if not error.retryable:
                return
        since = since or since_after_break
        stopped.wait(next(delays))


def _read_events(client: Client, query: dict[str, str], messages: queue.Queue[_Message], stopped: threading.Event) -> None:
    # Everything that ever happened to one VM is little, and a step seen before is not shown again.
    for item in read_events(client, query, stopped, since_after_break="0"):
        if item is None:
            message: _Message = _Opened()
        elif isinstance(item, FormationError):
            message = _Lost(item)
        elif not item.kind:
            continue
        else:
            message = item
        while not stopped.is_set():
            try:
                messages.put(message, timeout=1.0)
                break
            except queue.Full:
                continue


def _send(client: Client, wish: SignedIntent, messages: queue.Queue[_Message]) -> None:
    try:
        send_wish(client, wish)
    except FormationError as error:
        messages.put(_Refused(error))
    else:
        messages.put(_Accepted())


def _delays() -> Iterator[float]:
    yield from RETRY_DELAY_S
    while True:
        yield RETRY_DELAY_S[-1]
