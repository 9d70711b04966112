"""How a wish about a VM fares: a pure judge of events and looks at the VM.

Events tell the steps as they happen; the VM as the node shows it decides how it ends, because an event may come from a
node that has lost the placement, and because a silent holder sends no events at all. Only if the view lags behind an
ending event for `CONFIRM_S` is the event taken at its word.

It never asks the time: `now_s` is any monotonic clock in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from formation.core.errors import FormationError, NotFoundError, QuorumError, UnavailableError
from formation.core.units import format_duration, format_size

# The view shows certified state; a certificate is one round trip to the voters and one disk write behind the event.
CONFIRM_S = 5.0
# A holder counts as silent after missing its beats; this leaves it time to come back before a person is told so.
UNKNOWN_S = 20.0
# How long a node may be away (a restart takes two or three seconds) before a command gives up on it.
ABSENCE_S_MAX = 10.0
# VMs of one trace have about ten events; more than this is someone else's noise.
STEP_COUNT_MAX = 200


class Goal(Enum):
    """What the command waits for."""

    RUNNING = "running"
    STOPPED = "stopped"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Step:
    """One line of progress."""

    name: str
    """Stable, for programs: the event's verb, or `accepted`."""
    text: str
    elapsed_s: float
    """Since the step before."""
    is_bad: bool = False


@dataclass(slots=True)
class Watch:
    """One wish being followed."""

    goal: Goal
    vm_id: str
    label: str
    """What people call the VM."""
    generation: int
    started_s: float
    node_names: Mapping[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    vm: dict[str, Any] = field(default_factory=dict)
    """As the node last showed it."""
    is_done: bool = False
    failure: FormationError | None = None
    is_placed: bool = True
    """Whether some node may hold the VM already."""
    is_accepted: bool = False
    needs_look: bool = False
    """An ending event came: look at the VM soon."""
    waiting_for: str = "the network to accept the request"
    _last_step_s: float = 0.0
    _seen: set[tuple[str, str, int]] = field(default_factory=set)
    _ending: tuple[str, str, float] | None = None
    _unknown_since_s: float | None = None
    _absent_since_s: float | None = None
    _missing_since_s: float | None = None

    def __post_init__(self) -> None:
        """The first step is measured from the start."""
        self._last_step_s = self.started_s

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.is_done or self.failure is not None

    def accepted(self, now_s: float) -> tuple[Step, ...]:
        """The wish is certified; returns the line to show, if that was not known yet."""
        if self.is_accepted:
            return ()
        self.is_accepted = True
        is_at_home = self.goal is Goal.RUNNING and self.is_placed
        self.waiting_for = "its node to get the image and begin" if is_at_home else _WAITING_FIRST[self.goal]
        if self.goal is Goal.GONE and not self.is_placed:
            # What never had a place is gone with that alone.
            self.is_done = True
        return (self._step("accepted", "accepted by the network", now_s),)

    def happened(self, event: Mapping[str, Any], now_s: float) -> tuple[Step, ...]:
        """An event of this VM; returns the lines to show, if it is news."""
        verb, fields = str(event.get("verb", "")), event.get("fields") or {}
        if not isinstance(fields, Mapping) or event.get("void"):
            return ()
        generation = fields.get("generation", self.generation)
        key = (verb, str(event.get("node_id", "")), generation if isinstance(generation, int) else 0)
        if key in self._seen or len(self.steps) >= STEP_COUNT_MAX or key[2] < self.generation:
            return ()
        self._seen.add(key)
        text = self._tell(verb, event, fields)
        # A node that acts on the wish has seen it certified, even if that answer is still on its way to us.
        before = self.accepted(now_s) if text else ()
        self._note_ending(verb, fields, now_s)
        return (*before, self._step(verb, text, now_s, is_bad=verb == "vm.failed")) if text else before

    def looked(self, vm: Mapping[str, Any] | None, now_s: float) -> None:
        """The VM as the node shows it now; None when there is no such VM (any more)."""
        self.needs_look = False
        if vm is None:
            self._judge_absence_of_vm(now_s)
            self._judge_event(now_s)
            return
        self._missing_since_s = None
        self.vm = dict(vm)
        phase, reason = str(vm.get("phase", "")), reason_of(vm)
        status = vm.get("status") or {}
        answers = int(status.get("generation", 0)) >= self.generation
        if phase == "unknown":
            self._judge_silence(reason, now_s)
            return
        self._unknown_since_s = None
        if phase == self.goal.value and answers:
            self.is_done = True
        elif phase == "failed" and answers and self.goal is not Goal.GONE:
            self._fail(reason)
        else:
            if reason:
                self.waiting_for = f"a node that can take it ({reason})" if phase == "pending" else f"it, {phase}: {reason}"
            self._judge_event(now_s)

    def lost(self, error: FormationError, now_s: float) -> str:
        """The node cannot be asked; returns what to say about it, if anything."""
        if self._absent_since_s is None:
            self._absent_since_s = now_s
            return "the node does not answer, trying again" if self.is_accepted else ""
        if self.is_accepted and now_s - self._absent_since_s > ABSENCE_S_MAX:
            self.failure = UnavailableError(
                f"{error.message}; the network goes on with {self.label}",
                hint=f"when a node is back: formation vm show {self.vm_id}",
            )
        return ""

    def back(self) -> str:
        """The node answers; returns what to say about it, if anything."""
        was_absent, self._absent_since_s = self._absent_since_s is not None, None
        return "the node is back" if was_absent and self.is_accepted else ""

    def refused(self, error: FormationError) -> None:
        """The wish was not taken, or nobody knows whether it was."""
        self.failure = error
        if isinstance(error, UnavailableError):
            self.failure = UnavailableError(
                f"{error.message} (it is not known whether {self.label} was accepted)",
                hint=f"{error.hint}   then: formation vm show {self.vm_id}",
            )

    def timed_out(self, timeout_s: float) -> None:
        """Waiting any longer was not asked for."""
        self.failure = QuorumError(
            f"{self.label} is not {self.goal.value} after {format_duration(timeout_s)}: still waiting for {self.waiting_for}",
            hint=f"it goes on in the network: formation vm show {self.label}",
        )

    def _judge_event(self, now_s: float) -> None:
        if self._ending is None:
            return
        verb, reason, since_s = self._ending
        self.needs_look = True
        if verb == "vm.gone":
            self.is_done = True
        elif now_s - since_s >= CONFIRM_S:
            if verb == "vm.failed":
                self._fail(reason)
            else:
                self.is_done = True

    def _judge_absence_of_vm(self, now_s: float) -> None:
        # A node that has just come back may not have all certificates again: believe it after a while only.
        if self._missing_since_s is None:
            self._missing_since_s = now_s
        if self.goal is not Goal.GONE and now_s - self._missing_since_s >= CONFIRM_S:
            self.failure = NotFoundError(f"{self.label} was deleted meanwhile", hint="formation vm list")

    def _judge_silence(self, reason: str, now_s: float) -> None:
        if self._unknown_since_s is None:
            self._unknown_since_s = now_s
        self.waiting_for = f"a sign of life from the node that holds it ({reason or 'it is silent'})"
        if now_s - self._unknown_since_s >= UNKNOWN_S:
            self.failure = FormationError(
                f"{self.label} is unknown: {reason or 'the node that holds it is silent'}",
                hint=f"it may come back with its node: formation vm show {self.label}; or create another",
            )

    def _note_ending(self, verb: str, fields: Mapping[str, Any], now_s: float) -> None:
        ending = {Goal.RUNNING: "vm.ready", Goal.STOPPED: "vm.stopped", Goal.GONE: "vm.gone"}[self.goal]
        if verb == ending or (verb == "vm.failed" and self.goal is not Goal.GONE):
            self._ending = (verb, str(fields.get("reason", "")), now_s)
            self.needs_look = True
            self.waiting_for = "the network to confirm it"
            if verb == "vm.gone":
                self.is_done = True
        elif verb in _WAITING_AFTER:
            self._ending = None
            self.waiting_for = _WAITING_AFTER[verb]

    def _fail(self, reason: str) -> None:
        self.failure = FormationError(
            f"{self.label} failed: {reason or 'its node gave no reason'}",
            hint=f"formation vm logs {self.label}   then: formation vm start {self.label}",
        )

    def _step(self, name: str, text: str, now_s: float, *, is_bad: bool = False) -> Step:
        step = Step(name, text, max(0.0, now_s - self._last_step_s), is_bad)
        self._last_step_s = now_s
        self.steps.append(step)
        return step

    def _tell(self, verb: str, event: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
        node = self._node(str(fields.get("node_id") or event.get("node_id", "")))
        match verb:
            case "vm.scheduled":
                return f"down on {node}: {fields['reason']}" if fields.get("reason") else f"placed on {node}"
            case "image.ready":
                if fields.get("cached"):
                    return f"image is on {node} already"
                source = self._node(str(fields.get("pulled_from", "")))
                return f"image pulled from {source} ({format_size(_int(fields.get('pulled_bytes')))})"
            case "net.leased":
                return "network attached" + _ports_suffix(fields)
            case "vm.created":
                return f"machine made ({fields.get('hypervisor', '')})"
            case "vm.booted":
                return "guest boots"
            case "vm.ready":
                return "guest is ready"
            case "vm.failed":
                return f"failed: {fields.get('reason') or 'no reason given'}"
            case "vm.stopping":
                return "guest shuts down"
            case "vm.stopped":
                return "stopped"
            case "vm.gone":
                return f"nothing is left on {self._node(str(event.get('node_id', '')))}"
        return ""

    def _node(self, node_id: str) -> str:
        return self.node_names.get(node_id) or short_id(node_id) or "a node"


_WAITING_FIRST = {Goal.RUNNING: "a node to take it", Goal.STOPPED: "the guest to shut down", Goal.GONE: "its node to clean up"}
_WAITING_AFTER = {
    "vm.claimed": "the placement to be final",
    "vm.scheduled": "the image",
    "image.ready": "the network",
    "net.leased": "the machine",
    "vm.created": "the guest to boot",
    "vm.booted": "the guest's own word that it is ready",
    "vm.stopping": "the guest to shut down",
}


def short_id(identity: str) -> str:
    """An id short enough for a table: a node id's last eight letters (its first ones are the same for all)."""
    if identity.startswith("12D3Koo"):
        return "…" + identity[-8:]
    if identity.startswith("sha256:"):
        return identity[7:19]
    return identity


def reason_of(vm: Mapping[str, Any]) -> str:
    """Why a VM is in its phase, as far as somebody said."""
    return str(vm.get("reason") or (vm.get("status") or {}).get("reason") or "")


def port_texts(vm: Mapping[str, Any]) -> list[str]:
    """`127.0.0.1:40123->80/tcp` of each published port of a VM, or of an event's fields."""
    status = vm.get("status") or vm
    address = str(status.get("address") or "")
    ports = [port for port in status.get("ports") or () if isinstance(port, list | tuple) and len(port) == 3]
    return [f"{address}:{port[2]}->{port[0]}/{port[1]}" for port in ports]


def _ports_suffix(fields: Mapping[str, Any]) -> str:
    texts = port_texts(fields)
    return f": {', '.join(texts)}" if texts else ""


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0
