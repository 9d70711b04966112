from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from formation.state import spine_book
from formation.state.spine import Effect, Frame, Journal, Send, Spine, Verdict
from formation.state.spine_book import Known, Overlay
from formation.state.spine_values import Kind, Proposal, parse_votes
from tests.sim.spine_world import Faults, run

LIES = Faults(loss=0.1, duplicate=0.1, liar_count=1, skew_ms=200)
TROUBLES = {
    "calm": Faults(),
    "half lost": Faults(loss=0.5, duplicate=0.2),
    "partitions": Faults(loss=0.1, partition_count=3),
    "crashes": Faults(loss=0.1, crash_count=4, crash_at_commit=0.05, compact=0.1),
    "power cut": Faults(loss=0.2, duplicate=0.1, crash_at_commit=0.05, crash_all=True, compact=0.1),
    "liars": LIES,
    "banned liars": replace(LIES, bans=True, loss=0.2, crash_count=2, partition_count=1),
    "power cut and liars": replace(LIES, loss=0.2, crash_at_commit=0.05, crash_all=True),
    "no sync": replace(LIES, has_sync=False, liar_count=0, loss=0.4, partition_count=2),
    "long": replace(LIES, op_count=60, gst_ms=6000, partition_count=3, crash_at_commit=0.02, crash_count=3, delay_ms_max=60),
    "handover": Faults(loss=0.2, liar_count=1, crash_count=2, partition_count=1, handover=True, closes=True),
    "all": Faults(
        loss=0.2,
        duplicate=0.1,
        liar_count=1,
        skew_ms=200,
        crash_count=2,
        crash_at_commit=0.03,
        crash_all=True,
        partition_count=2,
        compact=0.1,
        closes=True,
        checkpoint_interval=3,
        clock_jump_ms=30_000,
    ),
}
SEED_COUNT = 10
"""Of each kind of trouble."""
SEED_COUNT_SLOW = 100


def check_seeds(trouble: str, seeds: range, *, count: int = 4) -> None:
    faults = TROUBLES[trouble]
    if faults.liar_count:
        faults = replace(faults, liar_count=(count - 1) // 3)
    for seed in seeds:
        try:
            run(seed, faults, count=count)
        except AssertionError as exc:
            raise AssertionError(f"seed {seed}, {trouble}, {count} voters: {exc}") from exc


@pytest.mark.parametrize("trouble", TROUBLES)
def test_final_chains_are_one_and_all_that_is_wished_gets_final(trouble: str) -> None:
    """I2, I4 and I9 after every event, I7 after GST, silence when nothing is wanted; whatever wire, disks and liars do."""
    check_seeds(trouble, range(SEED_COUNT))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLES)
def test_more_seeds(trouble: str) -> None:
    """The same for more seeds."""
    check_seeds(trouble, range(SEED_COUNT, SEED_COUNT + SEED_COUNT_SLOW))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLES)
def test_seven_voters_two_liars(trouble: str) -> None:
    """The same with n = 7, f = 2."""
    check_seeds(trouble, range(15), count=7)


@pytest.mark.slow
def test_one_voter_and_thirteen() -> None:
    """The same with n = 1, where every quorum is one's own vote, and n = 13."""
    for count in (1, 13):
        check_seeds("crashes", range(4), count=count)
    check_seeds("liars", range(3), count=13)


@pytest.mark.slow
@pytest.mark.parametrize("is_after", [False, True])
def test_a_crash_at_each_commit(is_after: bool) -> None:
    """A kill at any promise, before or after it is on disk, contradicts nothing and stops nobody."""
    for number in range(1, 61):
        run(number, Faults(loss=0.05, crash_number=number, crash_is_after=is_after))


def test_those_who_lag_beyond_memory_are_served_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine keeps its last final heights only; the chain behind them comes from its owner, and links."""
    monkeypatch.setattr(spine_book, "FINAL_KEPT_COUNT", 1)
    for seed in range(20):
        run(seed, TROUBLES["partitions"])


# ── the checkers can fail: each rule removed once ──


class FinalizesAfterNullify(Spine):
    def _finalize(self) -> None:
        for facts in self._book.views.values():
            facts.own.pop(Kind.NULLIFY, None)
        super()._finalize()


class NullifiesAfterFinalize(Spine):
    def _nullify(self) -> None:
        below = self._book.views.get(self.view - 1)
        if below is not None and Kind.NULLIFY not in below.own and Kind.FINALIZE in below.own:
            self._promise_vote(Kind.NULLIFY, self.view - 1, bytes(32))
        super()._nullify()


class NotarizesTwice(Spine):
    def _notarize(self, now_ns: int) -> None:
        facts = self._book.views.get(self.view)
        own = None if facts is None else facts.own.pop(Kind.NOTARIZE, None)
        if facts is not None and own is not None:
            known = facts.proposals.pop(own.vote.hash, None)  # type: ignore[call-overload]
            super()._notarize(now_ns)
            if known is not None:
                facts.proposals[known.entry.hash] = known
            facts.own.setdefault(Kind.NOTARIZE, own)
        else:
            super()._notarize(now_ns)


class AcceptsAnyParent(Spine):
    """Neither notarisation of the parent nor nullifications above it are asked for."""

    def _judge_place(self, known: Known) -> Verdict:
        verdict = super()._judge_place(known)
        chain = self._book.chain(known.entry.proposal.parent)
        if verdict is Verdict.WAIT and chain is not None and Overlay(self._book, chain).may_carry(known.entry.proposal):
            return Verdict.ACCEPT
        return verdict


class SendsBeforeStored(Spine):
    def _promise_vote(self, kind: Kind, view: int, hash_: bytes) -> None:
        super()._promise_vote(kind, view, hash_)
        self._out.append(Send(kind, self._book.facts(view).own[kind].raw))


class CountsBeforeStored(Spine):
    """Counts its vote at once: then others may see it in a certificate that its disk never had."""

    def _promise_vote(self, kind: Kind, view: int, hash_: bytes) -> None:
        super()._promise_vote(kind, view, hash_)
        self._count(self._book.facts(view).own[kind])


class LeadsTwice(Spine):
    def _propose(self, now_ns: int) -> None:
        facts = self._book.facts(self.view)
        if facts.own_proposal is not None and facts.own_proposal.hash in self._book.entries and now_ns % 3 == 0:
            own, facts.own = facts.own, {}
            facts.own_proposal = None
            super()._propose(now_ns)
            facts.own = own | facts.own
        else:
            super()._propose(now_ns)


class KeepsNoProof(Spine):
    """Finalizes without writing the notarisation down."""

    def drain(self) -> tuple[Effect, ...]:
        return tuple(effect for effect in super().drain() if not _is_notarisation(effect))


class KeepsNoProposal(Spine):
    """Votes for proposals without writing them down."""

    def drain(self) -> tuple[Effect, ...]:
        return tuple(e for e in super().drain() if not (isinstance(e, Journal) and e.kind is Kind.PROPOSAL))


class AnswersNobody(Spine):
    def _lift(self, voter: int, view: int, now_ns: int) -> None:
        pass


class SaysNothingTwice(Spine):
    def _standing_frames(self) -> list[Frame]:
        return []


class TalksWhenIdle(Spine):
    def _run_timer(self, now_ns: int) -> None:
        self._is_wanted = True
        super()._run_timer(now_ns)


class BelievesTheLeader(Spine):
    """Checks no head, no time, no extras."""

    def _judge(self, known: Known, now_ns: int) -> Verdict:
        return Verdict.ACCEPT if known.is_sound else self._judge_place_only(known)

    def _judge_place_only(self, known: Known) -> Verdict:
        return self._judge_place(known)


class LetsLanesRegress(Spine):
    def _judge_place(self, known: Known) -> Verdict:
        verdict = super()._judge_place(known)
        return Verdict.ACCEPT if verdict is Verdict.REFUSE and _stands_right(self, known.entry.proposal) else verdict


def _stands_right(spine: Spine, proposal: Proposal) -> bool:
    chain = spine._book.chain(proposal.parent)
    return chain is not None and proposal.height == spine.final_height + len(chain) + 1


def _is_notarisation(effect: Effect) -> bool:
    return isinstance(effect, Journal) and effect.kind is Kind.VOTES and parse_votes(effect.raw)[0].kind is Kind.NOTARIZE


MUTANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "quorum of 2f": ("half lost", {"quorum_size": 2}, "I2"),
    "finalize after nullify": ("half lost", {"spine_class": FinalizesAfterNullify}, "I4"),
    "nullify after finalize": ("half lost", {"spine_class": NullifiesAfterFinalize}, "I4"),
    "second notarize": ("liars", {"spine_class": NotarizesTwice}, "I4"),
    "restart without the journal": ("power cut", {"is_forgetful": True}, "I4"),
    "any parent": ("long", {"spine_class": AcceptsAnyParent}, "I2"),
    "send before stored": ("calm", {"spine_class": SendsBeforeStored}, "I9"),
    "count before stored": ("power cut", {"spine_class": CountsBeforeStored}, "I"),
    "two proposals": ("half lost", {"spine_class": LeadsTwice}, "I4"),
    "no notarisation kept": ("power cut and liars", {"spine_class": KeepsNoProof}, "I7"),
    "no proposal kept": ("power cut and liars", {"spine_class": KeepsNoProposal}, "I7"),
    "no answers": ("power cut and liars", {"spine_class": AnswersNobody}, "I7"),
    "nothing said twice": ("half lost", {"spine_class": SaysNothingTwice}, "I7"),
    "timers always": ("calm", {"spine_class": TalksWhenIdle}, "an idle network talks"),
    "uncertified heads": ("liars", {"spine_class": BelievesTheLeader}, "not certified"),
    "regressing cuts": ("liars", {"spine_class": LetsLanesRegress}, "regresses"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutation_is_caught(mutant: str) -> None:
    """A machine that breaks one rule is found out."""
    trouble, options, reason = MUTANTS[mutant]
    for seed in range(200):
        found = failure(seed, TROUBLES[trouble], options)
        if found:
            print(f"{mutant}: seed {seed}: {found}")
            assert reason in found
            return
    pytest.fail(f"{mutant} was never caught")


def failure(seed: int, faults: Faults, options: dict[str, Any]) -> str:
    try:
        run(seed, faults, **options)
    except AssertionError as exc:
        return str(exc) or "an assertion"
    return ""


@pytest.mark.slow
def test_one_liar_too_many_is_seen() -> None:
    """With f+1 liars nothing can be promised, and the checkers tell."""
    faults = replace(LIES, liar_count=2, partition_count=4, loss=0)
    assert any(failure(seed, faults, {}).startswith("I2") for seed in range(300))
