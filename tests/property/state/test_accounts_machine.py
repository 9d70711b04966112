"""Authorisation against a naive model that searches the history, over random histories in final order.

At every step, on a replica that never stopped and on one that is rebuilt from snapshots: the verdict is the model's, and the
bytes are the same. So a use and a revocation made at once have one verdict everywhere, whichever came first; no intent acts
twice, however often and late it is carried; and after a rotation the old key does nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from formation.core.codec import encode
from formation.core.event import (
    AccountKeyRotated,
    AccountRecoverySet,
    ClaimMade,
    DelegationGiven,
    DelegationRevoked,
    Event,
    GrantGiven,
    GrantRevoked,
    OwnershipTransferred,
    RecordKind,
    ValuePut,
    VmDeleted,
    VmDesired,
    VmRequested,
    Writer,
)
from formation.core.grants import Role
from formation.core.ids import account_id_of
from formation.core.spec import Desired
from formation.state.accounts import INTENT_FINAL_MS_MAX, Accounts, Actor, Intents

KEYS = tuple(bytes([number]) * 32 for number in range(1, 9))
PEOPLE = tuple(account_id_of(key) for key in KEYS[:3])
NODES = ("12D3one", "12D3two")
VMS = ("vm-one", "vm-two")
LIFE_MS = 3_000
FORGET_COUNT_MAX = 2
STEPS = 150
SEEDS = 150
WORDS = (ValuePut.verb, VmDesired.verb, VmDeleted.verb, AccountKeyRotated.verb)


@dataclass(frozen=True)
class Op:
    actor: Actor
    event: Event
    object_id: str
    digest: bytes
    expires_ms: int


@dataclass(frozen=True)
class Step:
    op: Op
    now_ms: int


def some_event(rng: random.Random, account_id: str, now_ms: int) -> tuple[Event, str]:
    other = rng.choice(PEOPLE)
    mine = rng.choice((account_id, account_id, account_id, other))
    vm = rng.choice(VMS)
    match rng.randrange(12):
        case 0:
            return VmDeleted(), vm
        case 1 | 2:
            return VmDesired(desired=Desired.STOPPED, generation=1), vm
        case 3:
            return VmRequested(name="x", image="", image_name="", vcpus=1, memory_mib=1, disk_gib=1), vm
        case 4:
            return ValuePut(value=b""), f"{mine}/{rng.choice('ab')}"
        case 5:
            return GrantGiven(account=other, level=rng.choice((1, 2, 3))), vm
        case 6:
            return GrantRevoked(account=other), vm
        case 7:
            return OwnershipTransferred(to=other), vm
        case 8:
            verbs = tuple(rng.sample(WORDS, 2))
            prefix = rng.choice(("", "", f"{account_id}/a", "vm-"))
            ends_ms = now_ms + rng.choice((0, 5_000, 50_000))
            return DelegationGiven(node_id=rng.choice(NODES), verbs=verbs, prefix=prefix, expires_ms=ends_ms), mine
        case 9:
            return rng.choice(
                (
                    (DelegationRevoked(node_id=rng.choice(NODES)), mine),
                    (AccountKeyRotated(new_key=rng.choice(KEYS)), mine),
                    (AccountRecoverySet(recovery_key=rng.choice((*KEYS, b""))), mine),
                )
            )
        case 10:
            return ClaimMade(ttl_ms=0), "handle/x"
    return ValuePut(value=b""), f"{account_id}/a"


def history(seed: int) -> list[Step]:
    """Signed and delegated operations by right and wrong keys, with copies of earlier intents in between."""
    rng = random.Random(seed)
    steps: list[Step] = []
    now_ms = 1_000_000
    in_use = dict(zip(PEOPLE, KEYS, strict=False))
    for number in range(STEPS):
        now_ms += rng.choice((0, 200, 1_000, 20_000))
        if steps and rng.random() < 0.3:
            # By another node, now or after its time.
            step = rng.choice(steps[-20:])
            later_ms = rng.choice((now_ms, now_ms, now_ms + INTENT_FINAL_MS_MAX))
            now_ms = later_ms if rng.random() < 0.1 else now_ms
            steps.append(Step(step.op, now_ms))
            continue
        account_id = rng.choice(PEOPLE)
        event, object_id = some_event(rng, account_id, now_ms)
        node_id = rng.choice(NODES)
        if event.is_delegable and rng.random() < 0.4:
            actor = Actor(node_id=node_id, account_id=account_id, is_delegated=True)
            steps.append(Step(Op(actor, event, object_id, b"", 0), now_ms))
            continue
        key = in_use[account_id] if rng.random() < 0.6 else rng.choice(KEYS)
        if isinstance(event, AccountKeyRotated) and object_id == account_id and rng.random() < 0.8:
            in_use[account_id] = event.new_key
        actor = Actor(node_id=node_id, account_id=account_id, key=key)
        steps.append(Step(Op(actor, event, object_id, number.to_bytes(32, "big"), now_ms + LIFE_MS), now_ms))
    return steps


class Replica:
    """What a fold does with the two sections."""

    def __init__(self, accounts: type[Accounts], intents: type[Intents]) -> None:
        self.accounts = accounts(is_voter=lambda _: False)
        self.intents = intents()

    def run(self, step: Step) -> str:
        op, now_ms = step.op, step.now_ms
        self.intents.forget(now_ms, FORGET_COUNT_MAX)
        void = self.accounts.authorise(op.actor, op.event, op.object_id, now_ms)
        void = void or (self.intents.check(op.digest, op.expires_ms, now_ms) if op.digest else "")
        void = void or self.accounts.apply(op.actor.account_id, op.event, op.object_id, now_ms)
        if not void and isinstance(op.event, VmRequested):
            void = self.accounts.own(op.object_id, op.actor.account_id)
        if not void and isinstance(op.event, VmDeleted):
            self.accounts.disown(op.object_id)
        if not void and op.digest:
            void = self.intents.take(op.digest, op.expires_ms, now_ms)
        return void

    def content(self) -> bytes:
        sections = (self.accounts, self.intents)
        return encode([[identity, section.dump(identity)] for section in sections for identity in sorted(section.ids())])

    def rebuilt(self) -> Replica:
        twin = Replica(type(self.accounts), type(self.intents))
        for identity in sorted(self.accounts.ids(), reverse=True):
            value = self.accounts.dump(identity)
            assert value is not None
            twin.accounts.load(identity, value)
        for identity in sorted(self.intents.ids(), reverse=True):
            ends_ms = self.intents.dump(identity)
            assert ends_ms is not None
            twin.intents.load(identity, ends_ms)
        assert twin.content() == self.content()
        return twin


class Model:
    """What holds follows from the list of what had effect."""

    def __init__(self) -> None:
        self.done: list[Op] = []

    def last(self, kinds: tuple[type[Event], ...], account_id: str) -> list[Any]:
        return [op.event for op in self.done if isinstance(op.event, kinds) and op.actor.account_id == account_id]

    def key(self, account_id: str) -> bytes:
        rotations = self.last((AccountKeyRotated,), account_id)
        key: bytes = rotations[-1].new_key if rotations else KEYS[PEOPLE.index(account_id)]
        return key

    def recovery(self, account_id: str) -> bytes:
        named = self.last((AccountRecoverySet,), account_id)
        key: bytes = named[-1].recovery_key if named else b""
        return key

    def delegation(self, account_id: str, node_id: str) -> DelegationGiven | None:
        found = None
        for event in self.last((DelegationGiven, DelegationRevoked, AccountKeyRotated), account_id):
            if isinstance(event, AccountKeyRotated) or event.node_id == node_id:
                found = event
        return found if isinstance(found, DelegationGiven) else None

    def roles(self, vm: str) -> dict[str, int]:
        roles: dict[str, int] = {}
        for op in self.done:
            if op.object_id != vm:
                continue
            match op.event:
                case VmRequested() if not roles:
                    roles = {op.actor.account_id: Role.OWNER}
                case VmDeleted():
                    roles = {}
                case OwnershipTransferred(to=to):
                    roles = {to: Role.OWNER}
                case GrantGiven(account=account, level=level):
                    roles[account] = level
                case GrantRevoked(account=account):
                    del roles[account]
        return roles

    def allows(self, step: Step) -> bool:
        op, now_ms = step.op, step.now_ms
        actor, event, account_id = op.actor, op.event, op.actor.account_id
        if actor.is_delegated:
            given = self.delegation(account_id, actor.node_id)
            if given is None or now_ms >= given.expires_ms:
                return False
            if event.verb not in given.verbs or not event.is_delegable or not op.object_id.startswith(given.prefix):
                return False
        else:
            safe = self.recovery(account_id)
            by_safe = isinstance(event, AccountKeyRotated) or (isinstance(event, AccountRecoverySet) and safe != b"")
            by_key = not (isinstance(event, AccountRecoverySet) and safe)
            if not ((actor.key == self.key(account_id) and by_key) or (actor.key == safe and by_safe)):
                return False
            if now_ms > op.expires_ms + INTENT_FINAL_MS_MAX or any(done.digest == op.digest for done in self.done):
                return False
        return event.writer is Writer.ANY or self.may(op, now_ms)

    def may(self, op: Op, now_ms: int) -> bool:
        account_id, event = op.actor.account_id, op.event
        roles = self.roles(op.object_id)
        if event.role is not None and roles.get(account_id, 0) < event.role:
            return False
        if event.record is RecordKind.VALUE:
            return op.object_id.split("/")[0] == account_id
        if event.record is RecordKind.ACCOUNT and event.role is None and op.object_id != account_id:
            return False
        match event:
            case VmRequested():
                return not roles or roles.get(account_id) == Role.OWNER
            case GrantGiven(account=account):
                return roles.get(account) != Role.OWNER
            case GrantRevoked(account=account):
                return roles.get(account, Role.OWNER) != Role.OWNER
            case OwnershipTransferred(to=to):
                return roles.get(to) != Role.OWNER
            case DelegationGiven(expires_ms=expires_ms):
                return expires_ms > now_ms
            case DelegationRevoked(node_id=node_id):
                return self.delegation(account_id, node_id) is not None
            case AccountKeyRotated(new_key=key):
                return key not in (self.key(account_id), self.recovery(account_id))
            case AccountRecoverySet(recovery_key=key):
                return key != self.key(account_id)
        return True


def check(accounts: type[Accounts], intents: type[Intents], seed: int) -> list[str]:
    """Run one history; returns the verdicts."""
    rng = random.Random(seed)
    steady, joined, model = Replica(accounts, intents), Replica(accounts, intents), Model()
    verdicts: list[str] = []
    known: dict[str, Any] = {}
    for step in history(seed):
        void = steady.run(step)
        assert joined.run(step) == void, "replicas judge differently"
        assert (void == "") == model.allows(step), f"{step}: {void!r}"
        assert steady.content() == joined.content()
        if not void:
            model.done.append(step.op)
        verdicts.append(void)
        for section in (steady.accounts, steady.intents):
            for identity in section.dirty:
                known[identity] = section.dump(identity)
            section.dirty.clear()
        if rng.random() < 0.1:
            joined = steady.rebuilt()
    assert {identity for identity, value in known.items() if value is not None} == {
        *steady.accounts.ids(),
        *steady.intents.ids(),
    }, "a change was not marked dirty"
    acted = [op.digest for op in model.done if op.digest]
    assert len(acted) == len(set(acted)), "an intent acted twice"
    return verdicts


@pytest.mark.slow
def test_random_histories_agree_with_the_model() -> None:
    """Every verdict, every byte, on both replicas; and every kind of verdict occurs."""
    verdicts = [void for seed in range(SEEDS) for void in check(Accounts, Intents, seed)]
    assert verdicts.count("") > len(verdicts) // 10
    assert set(FORGIVEN) <= {text for void in verdicts for text in FORGIVEN if text in void}


FORGIVEN = (
    "has not delegated anything",
    "the delegation has ended",
    "is not delegated to this node",
    "the delegation is for other objects",
    "only the recovery key replaces",
    "the recovery key may only",
    "a key that is not in force",
    "a value belongs to the account",
    "an account speaks for itself",
    "needs the role",
    "it belongs to another account",
)


@pytest.mark.slow
@pytest.mark.parametrize("text", FORGIVEN)
def test_each_refusal_is_needed(text: str) -> None:
    """An implementation that forgives one of them is caught."""

    class Forgiving(Accounts):
        __slots__ = ()

        def authorise(self, actor: Actor, event: Event | type[Event], object_id: str, now_ms: int) -> str:
            void = super().authorise(actor, event, object_id, now_ms)
            return "" if text in void else void

        def own(self, object_id: str, account_id: str) -> str:
            void = super().own(object_id, account_id)
            return "" if text in void else void

    with pytest.raises(AssertionError):
        sum(len(check(Forgiving, Intents, seed)) for seed in range(SEEDS))


class _RolesSurviveTransfer(Accounts):
    __slots__ = ()

    def transfer(self, object_id: str, to: str) -> str:
        grants = dict(self.grants(object_id))
        void = super().transfer(object_id, to)
        if not void:
            self._objects[object_id].grants.update(grants)
        return void


class _DelegationsSurviveRotation(Accounts):
    __slots__ = ()

    def rotate(self, account_id: str, new_key: bytes) -> str:
        given = self.delegations(account_id)
        void = super().rotate(account_id, new_key)
        if not void:
            account = self._account(account_id)
            account.delegations.update(given)
            self._settle(account_id, account)
        return void


class _RevokesNothing(Accounts):
    __slots__ = ()

    def revoke(self, object_id: str, account_id: str) -> str:
        role = self.role_of(object_id, account_id)
        void = super().revoke(object_id, account_id)
        return void or self.grant(object_id, account_id, role or Role.VIEWER)


class _KeepsDelegation(Accounts):
    __slots__ = ()

    def end_delegation(self, account_id: str, node_id: str) -> str:
        given = dict(self.delegations(account_id))
        return super().end_delegation(account_id, node_id) or self.delegate(account_id, node_id, given[node_id], 0)


class _NeverRotates(Accounts):
    __slots__ = ()

    def rotate(self, account_id: str, new_key: bytes) -> str:
        before = self.key_in_force(account_id)
        return super().rotate(account_id, new_key) or super().rotate(account_id, before)


class _KeepsRolesOfTheGone(Accounts):
    __slots__ = ()

    def disown(self, object_id: str) -> None:
        pass


class _NoMemory(Intents):
    __slots__ = ()

    def check(self, digest: bytes, expires_ms: int, now_ms: int) -> str:
        void = super().check(digest, expires_ms, now_ms)
        return "" if "already" in void else void


class _NoAge(Intents):
    __slots__ = ()

    def check(self, digest: bytes, expires_ms: int, now_ms: int) -> str:
        void = super().check(digest, expires_ms, now_ms)
        return "" if "too long" in void else void


class _ForgetsEarly(Intents):
    __slots__ = ()

    def forget(self, now_ms: int, count_max: int) -> int:
        return super().forget(now_ms + INTENT_FINAL_MS_MAX, count_max)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accounts", "intents"),
    [
        *(
            (mutant, Intents)
            for mutant in (
                _RolesSurviveTransfer,
                _DelegationsSurviveRotation,
                _RevokesNothing,
                _KeepsDelegation,
                _NeverRotates,
                _KeepsRolesOfTheGone,
            )
        ),
        *((Accounts, mutant) for mutant in (_NoMemory, _NoAge, _ForgetsEarly)),
    ],
)
def test_the_check_can_fail(accounts: type[Accounts], intents: type[Intents]) -> None:
    """Each rule of keys, grants, delegations and replay, removed once, is caught."""
    with pytest.raises(AssertionError):
        sum(len(check(accounts, intents, seed)) for seed in range(SEEDS))
