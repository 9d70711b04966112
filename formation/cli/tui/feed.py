"""Fetches what the screen shows, in threads, and hands it over by a queue.

A thread looks at the node again and again, a second one reads the event stream, a third one follows a log while one is
open. None of them touches the model.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from formation.cli.client import Client
from formation.cli.follow import read_events
from formation.core.errors import FormationError

# Seconds of a busy network's events; a screen that falls behind makes the reader wait, not memory grow.
_QUEUE_SIZE_MAX = 2000
_LOG_TAIL_LINES = 200


@dataclass(frozen=True, slots=True)
class Looked:
    """One look at the node."""

    status: dict[str, Any]
    nodes: tuple[dict[str, Any], ...]
    vms: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A look that failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Happened:
    """One event."""

    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Logged:
    """A piece of the log of a VM, or why there is no more of it."""

    vm_id: str
    text: str
    note: str = ""


News = Looked | Unreachable | Happened | Logged


class Feed:
    """The threads and their queue."""

    def __init__(
        self, client: Client, *, interval_s: float, permit_for: Callable[[str], bytes], wake: Callable[[], None]
    ) -> None:
        """Nothing runs yet.

        Args:
          client: the node.
          interval_s: between two looks.
          permit_for: the owner's signed leave to read a VM's log; empty where there is none.
          wake: called from the threads whenever there is news.
        """
        self._client = client
        self._interval_s = interval_s
        self._permit_for = permit_for
        self._wake = wake
        self._news: queue.Queue[News] = queue.Queue(_QUEUE_SIZE_MAX)
        self._stopped = threading.Event()
        self._look_now = threading.Event()
        self._log_vm = ""

    def start(self) -> None:
        """Start looking and listening."""
        for job in (self._look, self._listen):
            threading.Thread(target=job, daemon=True).start()

    def stop(self) -> None:
        """Let the threads end; they are daemons, nobody waits for them."""
        self._stopped.set()
        self._look_now.set()

    def look_now(self) -> None:
        """Look again at once."""
        self._look_now.set()

    def open_log(self, vm_id: str) -> None:
        """Follow this VM's log from now on, and no other."""
        self._log_vm = vm_id
        threading.Thread(target=self._follow_log, args=(vm_id,), daemon=True).start()

    def close_log(self) -> None:
        """No log is shown any more."""
        self._log_vm = ""

    def news(self) -> list[News]:
        """What came since the last call."""
        found: list[News] = []
        while True:
            try:
                found.append(self._news.get_nowait())
            except queue.Empty:
                return found

    def _look(self) -> None:
        while not self._stopped.is_set():
            self._look_now.clear()
            try:
                client = self._client
                status = client.get("/v1/status")
                nodes, vms = client.rows("/v1/nodes", "nodes"), client.rows("/v1/vms", "vms")
                self._put(Looked(status if isinstance(status, dict) else {}, tuple(nodes), tuple(vms)))
            except FormationError as error:
                self._put(Unreachable(error.message))
            self._look_now.wait(self._interval_s)

    def _listen(self) -> None:
        # From the node's whole memory at first: what happened before `top` was started is of interest too.
        for item in read_events(self._client, {}, self._stopped, since="0"):
            if item is not None and not isinstance(item, FormationError) and item.kind not in ("", "gap"):
                self._put(Happened(item.data))

    def _follow_log(self, vm_id: str) -> None:
        query = {"tail": str(_LOG_TAIL_LINES), "follow": "1"}
        try:
            permit = self._permit_for(vm_id)
            for data in self._client.stream(f"/v1/vms/{vm_id}/logs", query, permit=permit, timeout_s=None):
                if self._stopped.is_set() or self._log_vm != vm_id:
                    return
                self._put(Logged(vm_id, data.decode("utf-8", "replace")))
            self._put(Logged(vm_id, "", "the guest's log has ended"))
        except FormationError as error:
            self._put(Logged(vm_id, "", error.message))

    def _put(self, news: News) -> None:
        while not self._stopped.is_set():
            try:
                self._news.put(news, timeout=1.0)
                break
            except queue.Full:
                continue
        self._wake()
