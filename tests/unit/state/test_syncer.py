from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, cast

import trio

from formation.core.ids import NetworkId
from formation.state.committee import Committee
from formation.state.sync import Range
from formation.state.syncer import STALLED_S, Syncer


@dataclass
class FakeState:
    height: int = 7


@dataclass
class FakeReplica:
    """Only what tells whether a height waits for blocks."""

    state: FakeState = field(default_factory=FakeState)
    missing: tuple[Range, ...] = ()

    def missing_ranges(self) -> tuple[Range, ...]:
        return self.missing


@dataclass
class FakeOwner:
    replica: FakeReplica = field(default_factory=FakeReplica)


def make_syncer(owner: FakeOwner) -> Syncer:
    return Syncer(
        owner=cast("Any", owner),
        store=cast("Any", None),
        limiter=trio.CapacityLimiter(1),
        p2p=cast("Any", None),
        founders=Committee(0, (b"k" * 32,)),
        network_id=NetworkId(b"n" * 32),
        voters=frozenset,
        followers=frozenset,
        rng=random.Random(1),
    )


async def test_a_height_whose_blocks_do_not_come_is_given_up_for_a_snapshot(autojump_clock: trio.abc.Clock) -> None:
    """However much else arrives meanwhile; but not while heights go on, and not twice for one wait."""
    owner = FakeOwner()
    syncer = make_syncer(owner)
    assert not syncer._has_stalled()
    owner.replica.missing = (Range(b"l" * 42, 1, 2, 0, False),)
    assert not syncer._has_stalled()
    await trio.sleep(STALLED_S * 0.9)
    assert not syncer._has_stalled()
    owner.replica.state.height += 1
    assert not syncer._has_stalled()
    await trio.sleep(STALLED_S * 0.9)
    assert not syncer._has_stalled()
    await trio.sleep(STALLED_S * 0.2)
    assert syncer._has_stalled()
    assert not syncer._has_stalled()
    owner.replica.missing = ()
    await trio.sleep(STALLED_S * 2)
    assert not syncer._has_stalled()
