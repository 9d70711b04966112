"""Whole clusters under each scenario keep all invariants, for every seed of the fixed range."""

from __future__ import annotations

import pytest

from formation.state.journal import RecordKindOf
from formation.state.replica import Replica
from formation.state.store import Record
from tests.sim.cluster import Cluster, SimulationError, run
from tests.sim.faults import MUST_HOLD

# More than a thousand in all, and less than four minutes on two cores.
SEED_COUNT = 45
SEEDS_PER_TEST = 12
assert SEED_COUNT * len(MUST_HOLD) >= 1_000


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(0, SEED_COUNT, SEEDS_PER_TEST))
@pytest.mark.parametrize("scenario", MUST_HOLD)
def test_scenario_holds(scenario: str, first_seed: int) -> None:
    """No fault of the scenario, and no liar of at most f, breaks an invariant; everything becomes final."""
    happened: dict[str, int] = {}
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        for name, count in run(scenario, seed).counts.by_name.items():
            happened[name] = happened.get(name, 0) + count
    assert happened["heights"] >= SEEDS_PER_TEST
    for name in WHAT_IT_IS_FOR.get(scenario, ()):
        assert happened.get(name), f"{scenario} no longer does what it is for: no {name}"


# A scenario that never does what it is for proves nothing.
WHAT_IT_IS_FOR: dict[str, tuple[str, ...]] = {
    "crash": ("crashes", "closes"),
    "crash-at-commit": ("crashes",),
    "checkpoints": ("checkpoints", "stored checkpoints"),
    "snapshot": ("joins", "installs"),
    "committee": ("handovers",),
    "committee-byzantine": ("handovers", "faults"),
    "leases": ("runs", "claim.renewed"),
    "byzantine": ("faults",),
    "observers": ("node.admitted",),
    "equivocation": ("bans", "faults"),
    "dismissal": ("dismissals",),
    "missed-handover": ("missed handovers", "restarted after a handover"),
    "followers": ("gossip", "foreign"),
    "eclipse-voter": ("eclipses", "forged answers", "heights missed"),
    "eclipse-follower": ("eclipses", "forged answers", "heights missed"),
    "back-pressure": ("refused",),
}


def _failure(scenario: str, seed: int) -> SimulationError | None:
    try:
        run(scenario, seed)
    except SimulationError as exc:
        return exc
    return None


@pytest.mark.slow
def test_too_many_liars_are_noticed() -> None:
    """With f+1 Byzantine voters nothing is promised, and the checkers see it."""
    found = [exc for seed in range(8) if (exc := _failure("too-many-liars", seed)) is not None]
    assert sum(bool(exc.invariant) for exc in found) >= 4


@pytest.mark.slow
def test_a_run_is_its_seed() -> None:
    """The same scenario and seed give the same run, to the last event."""

    def trace(cluster: Cluster) -> tuple[object, ...]:
        return cluster.event_count, cluster.now_ns, [height.hash for height in cluster.checkers.heights], cluster.counts.by_name

    for scenario in ("byzantine", "committee"):
        assert trace(run(scenario, 3)) == trace(run(scenario, 3))


def test_a_failure_says_how_to_replay_it() -> None:
    """Scenario, seed, time, invariant and the command are in the message."""
    seed, failure = next((seed, exc) for seed in range(8) if (exc := _failure("too-many-liars", seed)) is not None)
    text = str(failure)
    assert failure.invariant in text
    assert f"python -m tests.sim --scenario too-many-liars --seed {seed}" in text


@pytest.mark.parametrize("forgets", [False, True], ids=["kept", "forgotten"])
def test_who_missed_a_handover_needs_no_snapshot(forgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all others were restarted since; were the end of the epoch in memory only, it would need one."""
    whole = Replica._base_records

    def without_former(self: Replica) -> list[Record]:
        return [record for record in whole(self) if record.kind != RecordKindOf.FORMER]

    if forgets:
        monkeypatch.setattr(Replica, "_base_records", without_former)
    counts = [run("missed-handover", seed).counts.by_name for seed in range(4)]
    assert sum(each.get("restarted after a handover", 0) for each in counts) > 0
    assert (sum(each.get("installs", 0) for each in counts) > 0) is forgets


def test_a_forked_lane_of_a_banned_key_is_not_told_for_ever() -> None:
    """One voter had let it go, others had acknowledged some of it, and nobody could close it (seed found by the simulator)."""
    assert _failure("byzantine-seven", 2036) is None
