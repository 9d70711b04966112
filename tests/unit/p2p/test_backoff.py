from __future__ import annotations

import random

from formation.p2p.backoff import Backoff


def test_waits_grow_to_the_limit_and_stay_within_their_step() -> None:
    """Each wait is between half of and the whole step; steps grow by the factor up to the limit."""
    backoff = Backoff(random.Random(1), first_s=1.0, max_s=4.0, factor=2.0)
    for step_s in (1.0, 2.0, 4.0, 4.0):
        assert step_s / 2 <= backoff.next_wait_s() <= step_s


def test_reset_starts_over() -> None:
    """After a success the next wait is short again."""
    backoff = Backoff(random.Random(1), first_s=1.0, max_s=100.0)
    for _ in range(10):
        backoff.next_wait_s()
    backoff.reset()
    assert backoff.next_wait_s() <= 1.0


def test_two_peers_do_not_wait_in_step() -> None:
    """Different seeds give different waits."""
    first = Backoff(random.Random(1), first_s=1.0, max_s=1.0)
    second = Backoff(random.Random(2), first_s=1.0, max_s=1.0)
    assert first.next_wait_s() != second.next_wait_s()
