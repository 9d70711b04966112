from __future__ import annotations

import pytest

from tests.sim.state_cluster import Faults, forked_lanes, run

SEED_COUNT = 12
"""Of each kind of trouble; 5 kinds."""
SEED_COUNT_SLOW = 10


TROUBLES = {
    "calm": Faults(),
    "loss": Faults(loss=0.3, duplicate=0.2, delay_ms_max=80),
    "partition": Faults(loss=0.1, partition_count=3),
    "crash": Faults(loss=0.1, crash_count=3),
    "all and twins": Faults(loss=0.15, duplicate=0.1, crash_count=2, partition_count=1, has_twins=True, clock_skew_ms=1500),
}


def check_seeds(trouble: str, seeds: range) -> None:
    for seed in seeds:
        try:
            run(seed, TROUBLES[trouble]).check_converged()
        except AssertionError as exc:
            raise AssertionError(f"seed {seed}, {trouble}: {exc}") from exc


@pytest.mark.parametrize("trouble", TROUBLES)
def test_nothing_certified_is_contradicted_and_all_converge(trouble: str) -> None:
    """I1, I4, I5, I9 after every event, and agreement at quiescence, whatever the wire, the disks and one voter do."""
    check_seeds(trouble, range(SEED_COUNT))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("trouble", TROUBLES)
def test_more_seeds(trouble: str, part: int) -> None:
    """The same for more seeds."""
    check_seeds(trouble, range(SEED_COUNT + part * SEED_COUNT_SLOW, SEED_COUNT + (part + 1) * SEED_COUNT_SLOW))


def test_twins_are_convicted() -> None:
    """Where a voter's twins forked its lane, correct voters hold the proof."""
    convicted = 0
    for seed in range(10):
        cluster = run(seed, Faults(has_twins=True))
        cluster.check_converged()
        convicted += bool(forked_lanes(n for n in cluster.nodes.values() if n.is_correct))
    assert convicted >= 5


def test_the_checkers_see_a_quorum_that_is_too_small() -> None:
    """With a quorum of 2 of 4, twins get two blocks of one number certified, and I1 is seen to break."""
    broken = 0
    for seed in range(30):
        try:
            run(seed, Faults(has_twins=True), quorum_size=2)
        except AssertionError:
            broken += 1
    assert broken > 0
