from __future__ import annotations

import math
import random

import pytest

from formation.core.ids import NodeId
from formation.p2p.score import (
    BAN_FIRST_S,
    BAN_FORGIVEN_AFTER_S,
    BAN_MAX_S,
    BAN_SCORE,
    HALF_LIFE_S,
    MANUAL_BAN_COUNT_MAX,
    PEER_COUNT_MAX,
    Offence,
    PeerScores,
    Refusal,
)

A, B, C = (NodeId(name) for name in "abc")


def ban_by_score(scores: PeerScores, node_id: NodeId, *, now_s: float) -> int:
    """How many malformed messages it took."""
    count = 1
    while not scores.note(node_id, Offence.MALFORMED, now_s=now_s):
        count += 1
        assert count < 100
    return count


def test_a_score_comes_back_by_half_each_half_life() -> None:
    """Nothing is held against a peer for ever."""
    scores = PeerScores()
    assert scores.score_of(A, now_s=0).score == 0
    assert not scores.note(A, Offence.REJECTED, now_s=10)
    assert scores.score_of(A, now_s=10).score == -Offence.REJECTED.weight
    assert scores.score_of(A, now_s=10 + HALF_LIFE_S).score == pytest.approx(-Offence.REJECTED.weight / 2)
    assert scores.score_of(A, now_s=10 + 20 * HALF_LIFE_S).score > -0.001
    stands = scores.score_of(A, now_s=10)
    assert (stands.offence_count, stands.last_offence, stands.banned_for_s, stands.refusal) == (1, "rejected", 0.0, None)


def test_a_clock_that_stands_still_gives_nothing_back() -> None:
    """Nor does one that a caller reads a little early."""
    scores = PeerScores()
    scores.note(A, Offence.REJECTED, now_s=100)
    scores.note(A, Offence.REJECTED, now_s=99)
    assert scores.score_of(A, now_s=98).score == -2 * Offence.REJECTED.weight


def test_below_the_limit_a_peer_is_banned_for_a_while() -> None:
    """Each offence has its price, and the limit is the sum of a few."""
    for offence in Offence:
        scores, count = PeerScores(), 1
        while not scores.note(A, offence, now_s=0):
            count += 1
        assert count == math.ceil(-BAN_SCORE / offence.weight)
        assert scores.refusal(A, now_s=BAN_FIRST_S - 1) is Refusal.BANNED_BY_SCORE
        assert scores.score_of(A, now_s=0).banned_for_s == BAN_FIRST_S
        assert scores.refusal(A, now_s=BAN_FIRST_S) is None
        assert scores.refusal(B, now_s=0) is None


def test_a_flood_of_moments_is_no_ban() -> None:
    """An honest peer that is above its rate for some seconds, now and then, stays."""
    scores = PeerScores()
    for minute in range(600):
        for second in range(3):
            assert not scores.note(A, Offence.FLOOD, now_s=600 * minute + second)


def test_each_ban_is_twice_as_long_up_to_a_day() -> None:
    """And a week without one starts over."""
    scores, now_s, lengths = PeerScores(), 0.0, []
    for _ in range(40):
        ban_by_score(scores, A, now_s=now_s)
        lengths.append(scores.score_of(A, now_s=now_s).banned_for_s)
        now_s += lengths[-1] + 1
    assert lengths[:4] == [BAN_FIRST_S, 2 * BAN_FIRST_S, 4 * BAN_FIRST_S, 8 * BAN_FIRST_S]
    assert lengths[-1] == BAN_MAX_S == max(lengths)
    now_s += BAN_FORGIVEN_AFTER_S
    ban_by_score(scores, A, now_s=now_s)
    assert scores.score_of(A, now_s=now_s).banned_for_s == BAN_FIRST_S


def test_after_a_ban_it_has_half_the_way_left() -> None:
    """And what it does while it is banned lengthens nothing."""
    scores = PeerScores()
    first_count = ban_by_score(scores, A, now_s=0)
    assert not scores.note(A, Offence.MALFORMED, now_s=1)
    assert scores.score_of(A, now_s=1).banned_for_s == BAN_FIRST_S - 1
    scores = PeerScores()
    ban_by_score(scores, A, now_s=0)
    assert 1 < ban_by_score(scores, A, now_s=BAN_FIRST_S) < first_count


def test_the_protected_are_scored_and_never_banned() -> None:
    """A ban that one has ends when it becomes one; a person's stays."""
    scores = PeerScores()
    ban_by_score(scores, A, now_s=0)
    scores.ban(B)
    scores.protect(frozenset((A, B, C)))
    assert not scores.is_banned(A, now_s=0)
    assert scores.refusal(B, now_s=0) is Refusal.BANNED_BY_HAND
    assert not any(scores.note(C, Offence.MALFORMED, now_s=0) for _ in range(1000))
    assert scores.score_of(C, now_s=0).score == -1000 * Offence.MALFORMED.weight
    scores.protect(frozenset())
    assert scores.note(C, Offence.FLOOD, now_s=0)


def test_bans_by_a_person() -> None:
    """Until taken back, whatever time passes; and then all is forgotten."""
    scores = PeerScores()
    scores.ban(B)
    scores.ban(A)
    scores.ban(A)
    assert scores.manual_bans == (A, B)
    assert scores.is_banned(A, now_s=1e12)
    assert math.isinf(scores.score_of(A, now_s=0).banned_for_s)
    assert [stands.node_id for stands in scores.scores(now_s=0)] == [A, B]
    assert scores.unban(A, now_s=0)
    assert not scores.unban(A, now_s=0)
    assert not scores.is_banned(A, now_s=0)
    ban_by_score(scores, C, now_s=0)
    assert scores.unban(C, now_s=0)
    assert scores.score_of(C, now_s=0).offence_count == 0


def test_bans_by_a_person_are_bounded() -> None:
    """And one more is refused, not forgotten."""
    scores = PeerScores()
    for index in range(MANUAL_BAN_COUNT_MAX):
        scores.ban(NodeId(f"n{index}"))
    scores.ban(NodeId("n0"))
    with pytest.raises(OverflowError, match="banned already"):
        scores.ban(A)


def test_lists_of_the_settings() -> None:
    """Denied is denied, voters too; where some are allowed, nobody else is, but voters."""
    scores = PeerScores(denied=frozenset((A,)), allowed=frozenset((A, B)))
    scores.protect(frozenset((A, C)))
    assert [scores.refusal(n, now_s=0) for n in (A, B, C, NodeId("d"))] == [Refusal.DENIED, None, None, Refusal.NOT_ALLOWED]
    assert scores.score_of(A, now_s=0).refusal is Refusal.DENIED
    assert not scores.is_banned(A, now_s=0)


def test_what_is_remembered_is_bounded() -> None:
    """A flood of identities drives out the least guilty ones; bans and the worst stay."""
    scores = PeerScores()
    scores.ban(B)
    ban_by_score(scores, A, now_s=0)
    for _ in range(4):
        scores.note(C, Offence.MALFORMED, now_s=0)
    rng = random.Random(1)
    for index in range(3 * PEER_COUNT_MAX):
        scores.note(NodeId(f"s{index}-{rng.random()}"), Offence.FLOOD, now_s=0)
        if index % 997 == 0:
            assert len(scores.scores(now_s=0)) <= PEER_COUNT_MAX + 1
    assert scores.is_banned(A, now_s=0)
    assert scores.is_banned(B, now_s=0)
    assert scores.score_of(C, now_s=0).offence_count == 4
