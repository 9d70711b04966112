from __future__ import annotations

from typing import Any

from formation.cli.watch import ABSENCE_S_MAX, CONFIRM_S, UNKNOWN_S, Goal, Watch, port_texts, short_id
from formation.core.errors import FormationError, NotFoundError, QuorumError, UnavailableError
from tests.unit.cli.fake_node import DIGEST, NODE_1, NODE_2, vm_record

VM_ID = "vm-" + "a" * 16


def _watch(goal: Goal = Goal.RUNNING, **changes: Any) -> Watch:
    wanted: dict[str, Any] = {"generation": 0, "node_names": {NODE_1: "n1", NODE_2: "n2"}} | changes
    return Watch(goal=goal, vm_id=VM_ID, label="web", started_s=100.0, **wanted)


def _event(verb: str, *, node_id: str = NODE_2, generation: int = 0, **fields: Any) -> dict[str, Any]:
    return {"verb": verb, "node_id": node_id, "void": "", "fields": {"generation": generation, **fields}}


def _vm(phase: str, *, reason: str = "", generation: int = 0) -> dict[str, Any]:
    vm = vm_record(VM_ID, "web", phase=phase) | {"reason": reason}
    vm["status"] |= {"generation": generation}
    return vm


def test_steps_have_the_time_since_the_step_before() -> None:
    """Each line says how long it took, not when it was."""
    watch = _watch()
    watch.accepted(100.5)
    watch.happened(_event("vm.scheduled"), 101.0)
    watch.happened(_event("image.ready", digest=DIGEST, cached=False, pulled_bytes=1 << 20, pulled_from=NODE_1), 103.0)
    assert [(step.text, step.elapsed_s) for step in watch.steps] == [
        ("accepted by the network", 0.5),
        ("placed on n2", 0.5),
        ("image pulled from n1 (1MiB)", 2.0),
    ]


def test_an_event_of_a_node_proves_acceptance() -> None:
    """A step that overtakes the answer to the wish is shown after `accepted`, which is shown once."""
    watch = _watch()
    assert [step.name for step in watch.happened(_event("vm.scheduled"), 101.0)] == ["accepted", "vm.scheduled"]
    assert watch.accepted(102.0) == ()


def test_the_same_event_is_shown_once() -> None:
    """Observed and certified, or sent again after a break: one line."""
    watch = _watch()
    watch.accepted(100.0)
    assert len(watch.happened(_event("vm.booted"), 101.0)) == 1
    assert watch.happened(_event("vm.booted"), 102.0) == ()


def test_events_of_an_earlier_generation_do_not_count() -> None:
    """A start is not satisfied by the ready event before the stop."""
    watch = _watch(generation=2)
    assert watch.happened(_event("vm.ready", generation=1), 101.0) == ()
    assert not watch.needs_look


def test_void_events_do_not_count() -> None:
    """What the fold refused changed nothing."""
    watch = _watch()
    assert watch.happened(_event("vm.ready") | {"void": "not the owner"}, 101.0) == ()


def test_ready_event_and_view_together_end_it() -> None:
    """The event asks for a look; the view decides."""
    watch = _watch()
    watch.happened(_event("vm.ready"), 101.0)
    assert watch.needs_look
    assert not watch.is_over
    watch.looked(_vm("running"), 101.1)
    assert watch.is_done


def test_lagging_view_is_believed_only_for_a_while() -> None:
    """If the certificate does not come, the event is taken at its word."""
    watch = _watch()
    watch.happened(_event("vm.ready"), 101.0)
    watch.looked(_vm("booting"), 101.1)
    assert not watch.is_over
    assert watch.needs_look
    watch.looked(_vm("booting"), 101.0 + CONFIRM_S)
    assert watch.is_done


def test_failure_of_a_node_that_lost_the_placement_is_not_the_end() -> None:
    """Another node's scheduling takes a failure event back."""
    watch = _watch()
    watch.happened(_event("vm.failed", reason="no disk", node_id=NODE_1), 101.0)
    watch.looked(_vm("booting"), 101.1)
    watch.happened(_event("vm.scheduled"), 101.2)
    watch.looked(_vm("fetching"), 120.0)
    assert not watch.is_over


def test_failed_vm_tells_its_reason() -> None:
    """The reason of the view is the error, with what to do."""
    watch = _watch()
    watch.looked(_vm("failed", reason="qemu ended"), 101.0)
    assert watch.failure is not None
    assert watch.failure.message == "web failed: qemu ended"
    assert "formation vm logs web" in watch.failure.hint
    assert watch.failure.exit_status == 1


def test_silent_holder_fails_after_a_while() -> None:
    """`unknown` may pass; when it does not, it is an error with its reason."""
    watch = _watch()
    watch.looked(_vm("unknown", reason="n2 has been silent for 5s"), 101.0)
    watch.looked(_vm("booting"), 102.0)
    watch.looked(_vm("unknown", reason="n2 has been silent for 5s"), 103.0)
    watch.looked(_vm("unknown", reason="n2 has been silent for 9s"), 102.0 + UNKNOWN_S)
    assert not watch.is_over
    watch.looked(_vm("unknown", reason="n2 has been silent for 25s"), 103.0 + UNKNOWN_S)
    assert watch.failure is not None
    assert "n2 has been silent for 25s" in watch.failure.message


def test_time_out_says_what_it_waited_for() -> None:
    """The pending reason is part of the error; trying again can help."""
    watch = _watch()
    watch.accepted(100.0)
    watch.looked(_vm("pending", reason="no node has 64 vCPUs"), 101.0)
    watch.timed_out(300.0)
    assert isinstance(watch.failure, QuorumError)
    assert "no node has 64 vCPUs" in watch.failure.message
    assert watch.failure.exit_status == 7


def test_node_away_for_too_long() -> None:
    """A restart is survived and told; a node that stays away ends the command, not the wish."""
    watch = _watch()
    watch.accepted(100.0)
    gone = UnavailableError("no node is running", hint="start it")
    assert watch.lost(gone, 101.0) == "the node does not answer, trying again"
    assert watch.lost(gone, 102.0) == ""
    assert watch.back() == "the node is back"
    watch.lost(gone, 200.0)
    watch.lost(gone, 200.0 + ABSENCE_S_MAX)
    assert not watch.is_over
    watch.lost(gone, 200.5 + ABSENCE_S_MAX)
    assert isinstance(watch.failure, UnavailableError)
    assert watch.failure.exit_status == 3
    assert f"formation vm show {VM_ID}" in watch.failure.hint


def test_unknown_whether_accepted() -> None:
    """A wish whose answer never came may have been taken: the error says so."""
    watch = _watch()
    watch.refused(UnavailableError("no node is running", hint="start it"))
    assert watch.failure is not None
    assert "not known whether web was accepted" in watch.failure.message
    refused = FormationError("no", hint="ask")
    watch.refused(refused)
    assert watch.failure is refused


def test_vm_that_vanishes_was_deleted() -> None:
    """Missing for a moment is a node catching up, missing for longer is a deletion."""
    watch = _watch()
    watch.looked(None, 101.0)
    watch.looked(_vm("booting"), 102.0)
    watch.looked(None, 103.0)
    assert not watch.is_over
    watch.looked(None, 103.0 + CONFIRM_S)
    assert isinstance(watch.failure, NotFoundError)


def test_delete_waits_for_the_holder() -> None:
    """Gone is what the holder says, not what the view no longer shows; what had no place is gone at once."""
    watch = _watch(Goal.GONE)
    watch.accepted(101.0)
    watch.looked(None, 150.0)
    assert not watch.is_over
    watch.happened(_event("vm.gone"), 151.0)
    assert watch.is_done
    unplaced = _watch(Goal.GONE, is_placed=False)
    unplaced.accepted(101.0)
    assert unplaced.is_done


def test_stop_ends_with_the_right_generation() -> None:
    """A VM that was stopped before does not answer a new stop."""
    watch = _watch(Goal.STOPPED, generation=3)
    watch.looked(_vm("stopped", generation=2), 101.0)
    assert not watch.is_over
    watch.looked(_vm("stopped", generation=3), 102.0)
    assert watch.is_done


def test_short_forms() -> None:
    """Ids that fit a table, ports as people write them; nonsense gives nothing."""
    assert short_id(NODE_1) == "…" + NODE_1[-8:]
    assert short_id(DIGEST) == "abababababab"
    assert port_texts({"status": {"address": "h", "ports": [[80, "tcp", 1], "x"]}}) == ["h:1->80/tcp"]


def test_a_start_waits_for_the_node_that_holds_the_vm() -> None:
    """A VM that has its place waits for no other: only what was never placed waits for a node to take it."""
    for is_placed, waits_for in ((True, "its node to get the image and begin"), (False, "a node to take it")):
        watch = _watch()
        watch.is_placed = is_placed
        watch.accepted(101.0)
        assert watch.waiting_for == waits_for
