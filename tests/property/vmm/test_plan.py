from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from formation.vmm.plan import Goal, Observed, Said, Step, apply_step, next_step, plan

observations = st.builds(
    Observed,
    is_held=st.booleans(),
    has_image=st.booleans(),
    has_nic=st.booleans(),
    has_files=st.booleans(),
    is_attached=st.booleans(),
    has_process=st.booleans(),
    is_ready=st.booleans(),
    failure=st.sampled_from(["", "why"]),
    said=st.sampled_from(Said),
    is_gone_said=st.booleans(),
)
goals = st.sampled_from(Goal)


@given(goals, observations)
def test_every_plan_ends(goal: Goal, observed: Observed) -> None:
    """plan(apply(plan)) is empty, or only waits for what others do."""
    for step in plan(goal, observed):
        observed = apply_step(observed, step)
    assert plan(goal, observed) in ((), (Step.WAIT,), (Step.CLAIM,), (Step.RELEASE,))


@given(goals, observations)
def test_first_step_is_the_next_step(goal: Goal, observed: Observed) -> None:
    """The forecast begins with what is done."""
    steps = plan(goal, observed)
    assert (steps[0] if steps else None) == next_step(goal, observed)


@given(observations)
def test_a_boot_needs_image_and_ports(observed: Observed) -> None:
    """No plan boots a VM without an image, freshly checked ports and a record that it is held."""
    for step in plan(Goal.RUNNING, observed):
        if step is Step.BOOT:
            assert observed.is_held
            assert observed.has_image
            assert observed.is_attached
            assert not observed.has_process
        observed = apply_step(observed, step)


@given(observations)
def test_nothing_is_left_of_a_deleted_vm(observed: Observed) -> None:
    """After the plan for a deleted VM nothing is held; `gone` is said only when nothing runs and nothing is left."""
    for step in plan(Goal.GONE, observed):
        if step is Step.SAY_GONE:
            assert not (observed.has_process)
            assert not (observed.has_files)
            assert not (observed.has_nic)
        observed = apply_step(observed, step)
    assert not observed.is_held


@given(observations)
def test_only_a_deleted_or_lost_vm_loses_its_files(observed: Observed) -> None:
    """Neither stopping nor failing removes a disk."""
    for goal in (Goal.RUNNING, Goal.STOPPED):
        assert Step.REMOVE not in plan(goal, observed)


@given(observations)
def test_a_failed_generation_stays_failed(observed: Observed) -> None:
    """What was said to have failed is not started again, and not said again."""
    steps = plan(Goal.RUNNING, apply_step(observed, Step.FAIL))
    assert steps in ((), (Step.KILL,))
