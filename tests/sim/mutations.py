"""Broken copies of the rules, one rule each, that the checkers must find: who never fails a mutant proves nothing.

Each mutation replaces one method while a run lasts, names the scenario in which it is likeliest to show, and may bend that
scenario's plan towards it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from formation.core.ids import NodeId
from formation.state import accounts, catchup, chain, equivocation, gossip, handover, lanes, spine
from formation.state.accounts import Accounts, Intents
from formation.state.chain import Lane
from formation.state.claims import Claims, Lease
from formation.state.committee import Committee
from formation.state.equivocation import Equivocations
from formation.state.fold import State
from formation.state.lane import NO_HASH, Entry, Head
from formation.state.lanes import Lanes
from formation.state.membership import Handover, plan_handover
from formation.state.oracle import CutOracle
from formation.state.replica import Replica
from formation.state.spine import Spine, Verdict
from formation.state.spine_values import Kind
from tests.sim.cluster import SimulationError, run
from tests.sim.faults import SCENARIOS, Plan

SAFETY = ("I1", "I2", "I3", "I4", "I5", "I6", "I9", "I10", "I11")
Change = Callable[[Plan], Plan]


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One broken rule."""

    name: str
    scenario: str
    patches: tuple[tuple[Any, str, Any], ...]
    """(owner, attribute, what stands there instead)."""
    change: Change = lambda plan: plan
    seed_count_max: int = 60
    invariants: tuple[str, ...] = SAFETY
    """One of these must be what the run reports. Getting stuck (I7) proves only that a rule of progress is broken."""


MUTATIONS: list[Mutation] = []


def _mutation(
    name: str,
    scenario: str,
    *patches: tuple[Any, str, Any],
    change: Change | None = None,
    seeds: int = 60,
    invariants: tuple[str, ...] = SAFETY,
) -> None:
    MUTATIONS.append(
        Mutation(
            name=name,
            scenario=scenario,
            patches=patches,
            change=change or (lambda plan: plan),
            seed_count_max=seeds,
            invariants=invariants,
        )
    )


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """While this lasts, the rule is broken everywhere."""
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in mutation.patches]
    try:
        for owner, name, mutant in mutation.patches:
            setattr(owner, name, mutant)
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def hunt(mutation: Mutation) -> str:
    """The failure by which the mutation shows; empty if it does not within its seeds."""
    import random

    with applied(mutation):
        for seed in range(mutation.seed_count_max):
            plan = mutation.change(SCENARIOS[mutation.scenario](random.Random(f"{mutation.scenario}/{seed}")))
            try:
                run(mutation.scenario, seed, plan=plan)
            except SimulationError as exc:
                if exc.invariant in mutation.invariants:
                    return str(exc)
    return ""


# ── votes and certificates ──────────────────────────────────────────────────────────────────────────────────────────


_mutation(
    "a quorum of 2f",
    "partition",
    (Committee, "quorum_size", property(lambda self: 2 * self.fault_count_max)),
    change=lambda plan: replace(plan, partition_count=3, voter_count=4, loss=0.0, is_asymmetric=False),
)


def _finalize_always(self: Spine) -> None:
    fresh, self._fresh = self._fresh, []
    for view in fresh:
        facts = self._book.views.get(view)
        if facts is not None and facts.notarised is not None and Kind.FINALIZE not in facts.own:
            self._promise_vote(Kind.FINALIZE, view, facts.notarised)


_mutation("finalize after nullify", "lossy", (Spine, "_finalize", _finalize_always))


def _nullify_always(self: Spine) -> None:
    if Kind.NULLIFY not in self._book.facts(self.view - 1 if self.view - 1 > self.final.view else self.view).own:
        view = self.view - 1 if self.view - 1 > self.final.view else self.view
        self._promise_vote(Kind.NULLIFY, view, NO_HASH)


_mutation("nullify after finalize", "lossy", (Spine, "_nullify", _nullify_always))


def _recover_no_vote(self: Spine, kind: Kind, raw: bytes) -> None:
    return None


_mutation(
    "recovery forgets own votes",
    "crash-at-commit",
    (Spine, "recover_vote", _recover_no_vote),
    change=lambda plan: replace(plan, crash_at_commit=0.2, power_cut=True),
)


def _place_any(self: Lanes, lane: Any, entry: Entry, now_ns: int) -> None:
    own = lane.chain.get(entry.block.seq)
    if own is None or own.hash == entry.hash or own.block.prev != entry.block.prev or self.voter is None:
        _PLACE(self, lane, entry, now_ns)
        return
    lane.cut_chain(entry.block.seq)
    lane.acked_seq = min(lane.acked_seq, entry.block.seq - 1)
    lane.tally.heads[self.voter] = None
    self._accept(lane, entry)


_PLACE = Lanes._place_block
_mutation("two acks for one number", "twins", (Lanes, "_place_block", _place_any))


def _forget_acks(self: Lanes) -> None:
    _FINISH(self)
    self._own_acks = {}
    for lane in self:
        if lane.head_seq > lane.certified_seq:
            lane.cut_chain(lane.certified_seq + 1)
        lane.acked_seq = lane.certified_seq
        if self.voter is not None:
            lane.tally.heads[self.voter] = None


_FINISH = Lanes.finish_recovery
_mutation(
    "recovery forgets own acks",
    "twins",
    (Lanes, "finish_recovery", _forget_acks),
    change=lambda plan: replace(plan, crash_count=6, delay_ms_max=40.0, loss=0.05),
    seeds=200,
)


def _deps_on_heads(self: Lanes) -> tuple[Head, ...]:
    return tuple(lane.head for lane in self if lane is not self.own and lane.head_seq > lane.final_seq)[:16]


_mutation(
    "deps on what is not certified",
    "lossy",
    (Lanes, "_take_deps", _deps_on_heads),
    (Lanes, "_is_dep_met", lambda self, dep: True),
)


_mutation(
    "a dep's hash is not compared",
    "byzantine",
    (Lanes, "_is_dep_met", lambda self, dep: self.certified_seq(dep.lane) >= dep.seq),
    change=lambda plan: replace(plan, behaviours=(("bad-deps",),), voter_count=4),
)


# ── the journal ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _told_at_once(self: Replica) -> None:
    known = set(self.journal._in_commit)
    _READY(self)
    for number in set(self.journal._in_commit) - known:
        _STORED(self, number)


def _stored_once(self: Replica, number: int) -> None:
    if number in self.journal._in_commit:
        _STORED(self, number)


_READY, _STORED = Replica._on_commit_ready, Replica._on_stored
_mutation(
    "sync after send", "calm", (Replica, "_on_commit_ready", _told_at_once), (Replica, "_on_stored", _stored_once), seeds=3
)


# ── claims, leases, accounts ────────────────────────────────────────────────────────────────────────────────────────


def _last_wins(self: Claims, space: str, key: str, owner: str, **more: Any) -> str:
    held = self.holder(space, key, more["now_ms"])
    if held is not None and held.owner != owner:
        self._drop(space, key)
    return _CLAIM(self, space, key, owner, **more)


def _same_fence(self: Claims, space: str, key: str, owner: str, **more: Any) -> str:
    return _CLAIM(self, space, key, owner, **(more | {"fence": (1, 0)}))


def _held_by_anyone(self: Claims, space: str, key: str, owner: str, now_ms: int) -> tuple[str, Lease | None]:
    lease = self.holder(space, key, now_ms)
    return ("", lease) if lease is not None else ("nobody holds it", None)


_CLAIM = Claims.claim
_mutation("the last claim wins", "calm", (Claims, "claim", _last_wins), change=lambda plan: replace(plan, mix="claims"))
_mutation("fences do not rise", "calm", (Claims, "claim", _same_fence), change=lambda plan: replace(plan, mix="claims"))


def _place_once(self: State, op: Any, event: Any, fence: tuple[int, int]) -> str:
    cell = self._find("vm", op.object_id)
    before = None if cell is None else cell.placed
    void = _PLACE_VM(self, op, event, fence)
    if cell is not None and before is not None and before[0] == op.node_id:
        cell.placed = before
    return void


_PLACE_VM = State._place
_mutation("the same holder keeps its old fence", "leases", (State, "_place", _place_once))
_mutation(
    "leases do not end",
    "leases",
    (Lease, "is_live", lambda self, now_ms: True),
    (Claims, "expire", lambda self, now_ms, count_max: ()),
)
_mutation("anybody renews", "calm", (Claims, "_held_by", _held_by_anyone), change=lambda plan: replace(plan, mix="claims"))
_mutation(
    "one may hold any number", "calm", (Claims, "_void_count", lambda *_: ""), change=lambda plan: replace(plan, mix="claims")
)
_mutation(
    "roles are not asked for",
    "calm",
    (Accounts, "_void_role", lambda *_: ""),
    change=lambda plan: replace(plan, mix="accounts"),
)
_mutation(
    "any key signs",
    "calm",
    (accounts, "_void_key", lambda *_: ""),
    change=lambda plan: replace(plan, mix="accounts", op_count=60),
)


def _endless(self: Accounts, account_id: str, node_id: str, event: Any, now_ms: int) -> tuple[str, str]:
    return _DELEGATED(self, account_id, node_id, event, 0)


_DELEGATED = Accounts.delegated_prefix
_mutation("delegations do not end", "calm", (Accounts, "delegated_prefix", _endless))
_mutation(
    "intents act twice",
    "calm",
    (Intents, "check", lambda *_: ""),
    change=lambda plan: replace(plan, mix="accounts", op_count=60),
)


# ── closing, handing over, checkpoints ──────────────────────────────────────────────────────────────────────────────


_mutation(
    "a lane is closed below what was acknowledged",
    "byzantine",
    (CutOracle, "_check_close", lambda self, head: Verdict.ACCEPT),
    (Lanes, "older", lambda self, lane: []),
    change=lambda plan: replace(plan, behaviours=(("lead-close",),), voter_count=4),
)


def _lock_nothing(self: Replica, proposal: Any) -> None:
    return None


_mutation(
    "a vote for a lane's end does not bind",
    "byzantine",
    (Replica, "_lock", _lock_nothing),
    change=lambda plan: replace(
        plan,
        behaviours=(("flood", "vote-all", "ack-all", "sync-lies"),),
        voter_count=4,
        close_quiet_ms=50,
        delay_ms_max=80.0,
        slow_share=0.2,
        op_count=40,
    ),
    seeds=300,
)


def _ackable_though_frozen(self: Lanes, lane: Any) -> int:
    frozen, self.is_frozen = self.is_frozen, False
    try:
        return _ACKABLE(self, lane)
    finally:
        self.is_frozen = frozen


_ACKABLE = Lanes._ackable_seq
_mutation("acks after the freeze", "committee", (Lanes, "_ackable_seq", _ackable_though_frozen))


def _handover_of_nothing(*arguments: Any, **more: Any) -> Handover | None:
    planned = plan_handover(*arguments, **more)
    return None if planned is None else msgspec.structs.replace(planned, cut=(), closed=())


_mutation(
    "the handover asks no freezes",
    "committee",
    (handover, "plan_handover", _handover_of_nothing),
    (handover, "check_handover", lambda *_, **__: Verdict.ACCEPT),
)
_mutation(
    "any root is a checkpoint's",
    "byzantine",
    (CutOracle, "_check_checkpoint", lambda self, ref: Verdict.ACCEPT),
    change=lambda plan: replace(plan, behaviours=(("lead-root",),), checkpoint_op_count=4, voter_count=4),
)


_mutation(
    "a ban needs no proof",
    "equivocation",
    (Equivocations, "holds", lambda self, raws: True),
    change=lambda plan: replace(plan, behaviours=(("lead-ban",),), voter_count=4, committee="", observer_count=0),
)
_mutation(
    "any two words are a contradiction",
    "equivocation",
    (equivocation, "_is_contradiction", lambda one, other: True),
    change=lambda plan: replace(plan, behaviours=(("lead-ban", "ban-lies"),), voter_count=4, committee="", observer_count=0),
    seeds=120,
)


# ── gossip, eclipse, back-pressure ──────────────────────────────────────────────────────────────────────────────────────


_mutation(
    "gossip is taken from strangers",
    "followers",
    (gossip, "take_message", lambda author, data, voters: gossip.unpack_frames(data)),
    change=lambda plan: replace(plan, behaviours=(("gossip-lies",),), voter_count=4, gossip_loss=0.0),
)
_mutation(
    "acks that came by gossip are not checked",
    "followers",
    (lanes, "ack_signature_holds", lambda *_, **__: True),
    change=lambda plan: replace(plan, behaviours=(("gossip-lies",),), voter_count=4),
)


def _pull_nothing(peer: NodeId, ranges: object) -> Iterator[Any]:
    yield from ()


_mutation(
    "without gossip, nothing is pulled",
    "followers",
    (catchup, "_pull", _pull_nothing),
    change=lambda plan: replace(plan, gossip_loss=1.0, behaviours=(), checkpoint_op_count=0, final_kept_count=0, limit_ms=6000),
    seeds=10,
    invariants=("I7",),
)
_mutation(
    "an eclipsed follower believes a final certificate",
    "eclipse-follower",
    (spine, "final_holds", lambda *_, **__: True),
    change=lambda plan: replace(plan, voter_count=4, behaviours=(("sync-forge",),)),
)
_mutation(
    "an eclipsed voter believes acks",
    "eclipse-voter",
    (lanes, "ack_signature_holds", lambda *_, **__: True),
    change=lambda plan: replace(plan, voter_count=4, behaviours=(("sync-forge",),)),
)


def _sign_when_full(self: Lanes) -> Any:
    signed = _SIGN_OWN_ACKS(self)
    if self._is_tail_full:
        self._to_ack = {}
    return signed


_SIGN_OWN_ACKS = Lanes.sign_own_acks
_mutation(
    "a full tail forgets what there is to acknowledge",
    "back-pressure",
    (Lanes, "sign_own_acks", _sign_when_full),
    change=lambda plan: replace(plan, tail_count_max=4, limit_ms=8000, behaviours=()),
    seeds=10,
    invariants=("I7",),
)
_mutation(
    "a lane takes more than its window",
    "back-pressure",
    (Lane, "is_full", property(lambda self: False)),
    (lanes, "WINDOW_COUNT_MAX", 5_000),
    (chain, "WINDOW_COUNT_MAX", 5_000),
    change=lambda plan: replace(plan, tail_count_max=4, behaviours=(), burst_count=6_000, slow_disk_ms=400),
    seeds=5,
    invariants=("I8",),
)


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


_mutation(
    "signatures are not checked",
    "byzantine",
    (lanes, "block_signature_holds", lambda *_, **__: True),
    (lanes, "ack_signature_holds", lambda *_, **__: True),
    change=lambda plan: replace(plan, behaviours=(("foreign",),), voter_count=4),
)
