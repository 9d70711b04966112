"""From what a VM should be and what it is here to the steps between them.

Rules: (1) pure; (2) the caller does the first step, looks again and plans again, so later steps are a forecast;
(3) `plan(desired, apply(plan))` is empty: every plan ends; (4) steps are idempotent, because a crash may come between
a step and its record.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

# Longer than any path through the table below; a plan that exceeds it is a bug, not a situation.
STEP_COUNT_MAX = 16


class Goal(StrEnum):
    """What a VM should be, on this node."""

    RUNNING = "running"
    STOPPED = "stopped"
    GONE = "gone"
    """Its owner deleted it."""
    ELSEWHERE = "elsewhere"
    """Another node holds it."""
    UNPLACED = "unplaced"
    """Nobody holds it, and this node is not the one to claim it."""
    CLAIM = "claim"
    """Nobody holds it, and this node is the one to claim it."""
    LEAVING = "leaving"
    """This node holds it and is drained, and there is another one for it."""
    LEFT = "left"
    """This node let go of it so, and nobody holds it yet."""
    LAPSED = "lapsed"
    """This node was its last holder, and the lease is over or may be: it must not run until it is held anew."""


class Step(StrEnum):
    """One thing to do."""

    CLAIM = "claim"
    HOLD = "hold"
    """Record that something of it may be on this node, and say that it is scheduled."""
    FETCH = "fetch"
    ATTACH = "attach"
    BOOT = "boot"
    WAIT = "wait"
    """For the guest's word; the service is woken by it and does nothing here."""
    SAY_READY = "say_ready"
    FAIL = "fail"
    """Say that it failed, having undone what runs."""
    STOP = "stop"
    KILL = "kill"
    """Stop without asking the guest: its data is to be dropped, or it must not run here any more."""
    RELEASE = "release"
    """Let go of the placement, so that another node may take it at once."""
    SAY_LAPSED = "say_lapsed"
    """Say why it does not run."""
    SAY_STOPPED = "say_stopped"
    REMOVE = "remove"
    SAY_GONE = "say_gone"
    FORGET = "forget"


class Said(StrEnum):
    """The last word of this node about the VM in its present generation."""

    NOTHING = "nothing"
    UNDER_WAY = "under_way"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What is here of a VM."""

    is_held: bool = False
    """Something of it may be here: it is in the ledger, or its folder or lease was found."""
    is_recorded: bool = False
    """The ledger has it under the placement that it has now, and that was said."""
    has_image: bool = False
    has_nic: bool = False
    has_files: bool = False
    """Its folder exists: disk, console log."""
    is_attached: bool = False
    """Its ports were checked for the boot that comes next."""
    has_process: bool = False
    is_ready: bool = False
    failure: str = ""
    """Why this generation cannot go on, not said yet."""
    said: Said = Said.NOTHING
    is_gone_said: bool = False
    is_lapse_said: bool = False


def plan(goal: Goal, observed: Observed) -> tuple[Step, ...]:
    """The steps from `observed` to `goal`; empty when there is nothing to do."""
    steps: list[Step] = []
    while (step := next_step(goal, observed)) is not None:
        assert len(steps) < STEP_COUNT_MAX, steps
        steps.append(step)
        if step in (Step.WAIT, Step.CLAIM, Step.RELEASE):
            break  # What comes of these is not ours to foretell.
        observed = apply_step(observed, step)
    return tuple(steps)


def next_step(goal: Goal, seen: Observed) -> Step | None:
    """The one thing to do first."""
    match goal:
        case Goal.CLAIM:
            return Step.CLAIM
        case Goal.LAPSED:
            return _suspend(seen)
        case Goal.LEAVING:
            return Step.STOP if seen.has_process else Step.RELEASE
        case Goal.LEFT:
            return Step.KILL if seen.has_process else None
        case Goal.UNPLACED | Goal.ELSEWHERE:
            return _clear(seen)
        case Goal.GONE:
            return _bury(seen)
        case Goal.STOPPED:
            return _settle(seen)
        case Goal.RUNNING:
            return _raise(seen)


def _raise(seen: Observed) -> Step | None:
    # A start is a new generation: what has stopped in this one did so by itself, and rests.
    if seen.said in (Said.FAILED, Said.STOPPED):
        return Step.KILL if seen.has_process else None
    if seen.failure:
        return Step.KILL if seen.has_process else Step.FAIL
    if not seen.is_recorded:
        return Step.HOLD
    if seen.has_process:
        if not seen.is_ready:
            return Step.WAIT
        return None if seen.said is Said.READY else Step.SAY_READY
    if not seen.has_image:
        return Step.FETCH
    return Step.BOOT if seen.is_attached else Step.ATTACH


def _suspend(seen: Observed) -> Step | None:
    if seen.has_process:
        return Step.KILL
    # What was stopped or has failed is so still, lease or not.
    if seen.said in (Said.UNDER_WAY, Said.READY) and not seen.is_lapse_said:
        return Step.SAY_LAPSED
    return Step.CLAIM


def _settle(seen: Observed) -> Step | None:
    if seen.has_process:
        return Step.STOP
    return None if seen.said is Said.STOPPED else Step.SAY_STOPPED


def _bury(seen: Observed) -> Step | None:
    if not seen.is_held:
        return None
    if seen.has_process:
        return Step.KILL
    if seen.has_nic or seen.has_files:
        return Step.REMOVE
    return Step.FORGET if seen.is_gone_said else Step.SAY_GONE


def _clear(seen: Observed) -> Step | None:
    if not seen.is_held:
        return None
    if seen.has_process:
        return Step.KILL
    return Step.REMOVE if seen.has_nic or seen.has_files else Step.FORGET


def apply_step(observed: Observed, step: Step) -> Observed:
    """What a step that succeeds makes of it."""
    match step:
        case Step.HOLD:
            return replace(observed, is_held=True, is_recorded=True, said=Said.UNDER_WAY)
        case Step.FETCH:
            return replace(observed, has_image=True)
        case Step.ATTACH:
            return replace(observed, has_nic=True, is_attached=True)
        case Step.BOOT:
            return replace(observed, has_process=True, has_files=True, is_attached=False)
        case Step.SAY_READY:
            return replace(observed, said=Said.READY)
        case Step.FAIL:
            return replace(observed, failure="", said=Said.FAILED, has_nic=False, is_attached=False)
        case Step.STOP | Step.KILL:
            return replace(observed, has_process=False, is_ready=False, is_attached=False)
        case Step.SAY_LAPSED:
            return replace(observed, said=Said.UNDER_WAY, is_lapse_said=True)
        case Step.SAY_STOPPED:
            return replace(observed, said=Said.STOPPED)
        case Step.REMOVE:
            return replace(observed, has_nic=False, has_files=False, is_attached=False)
        case Step.SAY_GONE:
            return replace(observed, is_gone_said=True)
        case Step.FORGET:
            return Observed(has_image=observed.has_image)
        case Step.WAIT | Step.CLAIM | Step.RELEASE:
            return observed
