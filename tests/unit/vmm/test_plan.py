from __future__ import annotations

from dataclasses import replace

from formation.vmm.plan import Goal, Observed, Said, Step, plan

HELD = Observed(is_held=True)
RUNNING = Observed(
    is_held=True, is_recorded=True, has_nic=True, has_files=True, has_process=True, is_ready=True, said=Said.READY
)


def test_from_nothing_to_running() -> None:
    """The happy path, up to the guest's word."""
    steps = (Step.HOLD, Step.FETCH, Step.ATTACH, Step.BOOT, Step.WAIT)
    assert plan(Goal.RUNNING, Observed()) == steps


def test_a_new_wish_for_what_runs_is_only_answered() -> None:
    """A start of a VM that still runs says ready for the new generation and touches nothing."""
    assert plan(Goal.RUNNING, replace(RUNNING, said=Said.NOTHING)) == (Step.SAY_READY,)
    assert plan(Goal.RUNNING, RUNNING) == ()


def test_what_came_back_under_a_new_placement_is_said_anew() -> None:
    """It ran here before, ran elsewhere meanwhile, and comes back: its old words here stand for nothing."""
    seen = Observed(is_held=True, has_files=True, said=Said.READY)
    assert plan(Goal.RUNNING, seen) == (Step.HOLD, Step.FETCH, Step.ATTACH, Step.BOOT, Step.WAIT)


def test_failure_is_cleared_before_it_is_said() -> None:
    """A failed VM's process is ended first."""
    seen = Observed(is_held=True, has_process=True, failure="why")
    assert plan(Goal.RUNNING, seen) == (Step.KILL, Step.FAIL)


def test_stop_and_delete() -> None:
    """Stopping asks the guest and keeps its files; deleting does neither."""
    assert plan(Goal.STOPPED, RUNNING) == (Step.STOP, Step.SAY_STOPPED)
    assert plan(Goal.GONE, RUNNING) == (Step.KILL, Step.REMOVE, Step.SAY_GONE, Step.FORGET)
    assert plan(Goal.ELSEWHERE, RUNNING) == (Step.KILL, Step.REMOVE, Step.FORGET)


def test_strangers_are_left_alone() -> None:
    """A VM of which nothing is here needs nothing, whatever became of it."""
    for goal in (Goal.GONE, Goal.ELSEWHERE, Goal.UNPLACED):
        assert plan(goal, Observed()) == ()
    assert plan(Goal.CLAIM, Observed()) == (Step.CLAIM,)


def test_interrupted_removal_goes_on() -> None:
    """After a crash between removal and the last word, only the word and the record are left to do."""
    assert plan(Goal.GONE, HELD) == (Step.SAY_GONE, Step.FORGET)
