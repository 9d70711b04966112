"""Claims against a naive model, over random histories in final order, with snapshots taken on the way.

At every step: verdict and holders are the model's; a key has at most one holder, and its fences rise; a replica that sweeps,
one that was rebuilt from a snapshot, and one that never stopped have the same bytes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from formation.core.codec import encode
from formation.state import claims as module
from formation.state.claims import SPACES, Claims, Lease

VMS = tuple("vm-" + letter * 16 for letter in "abc")
NODES, ACCOUNTS = ("12D3one", "12D3two"), ("did:key:ann", "did:key:bob")
SWEEP_COUNT_MAX = 1
STEPS = 60
SEEDS = 300


@dataclass(frozen=True)
class Op:
    kind: str
    space: str
    key: str
    owner: str
    ttl_ms: int
    to: str
    now_ms: int
    height: int


def history(seed: int) -> list[Op]:
    rng = random.Random(seed)
    ops, now_ms = [], 1_000_000
    for height in range(1, STEPS):
        now_ms += rng.choice((0, 0, 500, 1000, 2000, 5000))
        space = rng.choice(("placement", "placement", "handle", "address"))
        owners = ACCOUNTS if space == "handle" else NODES
        keys = {"placement": VMS, "handle": ("ann", "bob"), "address": ("10.0.0.1", "10.0.0.2")}[space]
        kind = rng.choice(("claim", "claim", "claim", "renew", "renew", "renew all", "transfer", "release"))
        ttl_ms = {"placement": (2000, 4000, 9000), "handle": (0,), "address": (0, 3000)}[space]
        ops.append(
            Op(kind, space, rng.choice(keys), rng.choice(owners), rng.choice(ttl_ms), rng.choice(owners), now_ms, height)
        )
    return ops


def run(claims: Claims, op: Op) -> str:
    place = (op.space, "" if op.kind == "renew all" else op.key, op.owner)
    match op.kind:
        case "claim":
            return claims.claim(*place, ttl_ms=op.ttl_ms, note="n", fence=(op.height, 0), now_ms=op.now_ms)
        case "transfer":
            return claims.transfer(*place, to=op.to, fence=(op.height, 0), now_ms=op.now_ms)
        case "release":
            return claims.release(*place, now_ms=op.now_ms)
    return claims.renew(*place, now_ms=op.now_ms)


class Model:
    """The rules, with a list that is searched."""

    def __init__(self) -> None:
        self.leases: list[dict[str, Any]] = []

    def live(self, now_ms: int) -> list[dict[str, Any]]:
        return [lease for lease in self.leases if lease["end"] == 0 or lease["end"] > now_ms]

    def run(self, op: Op) -> bool:
        """Whether it has an effect."""
        self.leases = self.live(op.now_ms)
        mine = [one for one in self.leases if (one["space"], one["owner"]) == (op.space, op.owner)]
        held = next((one for one in self.leases if (one["space"], one["key"]) == (op.space, op.key)), None)
        is_mine = held is not None and held["owner"] == op.owner
        if op.kind == "renew all":
            for one in mine:
                self.renew(one, op.now_ms)
            return bool(mine)
        if op.kind == "claim" and held is None and self.has_room(op.space, op.owner):
            self.grant(op, op.owner, op.ttl_ms)
            return True
        if held is None or not is_mine:
            return False
        if op.kind == "claim":
            held["ttl"], held["end"] = op.ttl_ms, max(held["end"], op.now_ms + op.ttl_ms) if op.ttl_ms else 0
        elif op.kind == "renew":
            self.renew(held, op.now_ms)
        elif op.kind == "transfer":
            if op.to == op.owner or not self.has_room(op.space, op.to):
                return False
            self.leases.remove(held)
            self.grant(op, op.to, held["ttl"])
        else:
            self.leases.remove(held)
        return True

    def has_room(self, space: str, owner: str) -> bool:
        return sum((one["space"], one["owner"]) == (space, owner) for one in self.leases) < SPACES[space].count_max

    def grant(self, op: Op, owner: str, ttl_ms: int) -> None:
        end_ms = op.now_ms + ttl_ms if ttl_ms else 0
        self.leases.append(
            {"space": op.space, "key": op.key, "owner": owner, "fence": (op.height, 0), "ttl": ttl_ms, "end": end_ms}
        )

    def renew(self, one: dict[str, Any], now_ms: int) -> None:
        if one["end"]:
            one["end"] = max(one["end"], now_ms + one["ttl"])

    def holders(self, now_ms: int) -> dict[str, tuple[str, tuple[int, int], int]]:
        return {f"{one['space']}/{one['key']}": (one["owner"], one["fence"], one["end"]) for one in self.live(now_ms)}


def holders(claims: Claims, now_ms: int) -> dict[str, tuple[str, tuple[int, int], int]]:
    held = {}
    for identity in claims.ids():
        space, _, key = identity.partition("/")
        lease = claims.holder(space, key, now_ms)
        if lease is not None:
            assert any(one == (key, lease) for one in claims.of_owner(space, lease.owner, now_ms))
            held[identity] = (lease.owner, lease.fence, lease.expires_ms)
    return held


def content(claims: Claims) -> bytes:
    return encode([[identity, claims.dump(identity)] for identity in sorted(claims.ids())])


def rebuilt(claims: Claims) -> Claims:
    twin = type(claims)()
    # A snapshot comes in the order of its hashes, not of arrival.
    for identity in sorted(claims.ids(), reverse=True):
        value = claims.dump(identity)
        assert value is not None
        twin.load(identity, value)
        assert twin.dump(identity) == value
    return twin


def check(make: type[Claims], seed: int) -> int:
    """Run one history; returns how many operations had an effect."""
    rng = random.Random(seed)
    model, lazy, swept, joined = Model(), make(), make(), make()
    fences: dict[str, tuple[int, int]] = {}
    known: dict[str, Any] = {}
    count = 0
    for op in history(seed):
        ended = swept.expire(op.now_ms, SWEEP_COUNT_MAX)
        assert ended == joined.expire(op.now_ms, SWEEP_COUNT_MAX)
        verdicts = {run(claims, op) for claims in (lazy, swept, joined)}
        assert len(verdicts) == 1, "replicas judge differently"
        assert ("" in verdicts) == model.run(op), f"{op}: {verdicts}"
        count += "" in verdicts
        expected = model.holders(op.now_ms)
        assert holders(lazy, op.now_ms) == holders(swept, op.now_ms) == expected
        assert content(swept) == content(joined)
        for identity, (_, fence, _) in expected.items():
            if fence != fences.get(identity):
                assert fence > fences.get(identity, (0, 0)), "a fence fell"
                fences[identity] = fence
        for identity in swept.dirty:
            known[identity] = swept.dump(identity)
        swept.dirty.clear()
        assert {identity: value for identity, value in known.items() if value is not None} == {
            identity: swept.dump(identity) for identity in swept.ids()
        }, "a change was not marked dirty"
        if rng.random() < 0.1:
            joined = rebuilt(swept)
    end_ms = op.now_ms + 1_000_000
    swept.expire(end_ms, 1000)
    assert sorted(swept.ids()) == sorted(model.holders(end_ms)), "a full sweep leaves only what never ends"
    return count


@pytest.mark.slow
def test_random_histories_agree_with_the_model() -> None:
    """Verdicts, holders, fences, sweeps, dirty marks and snapshots, over many histories; and most of what is tried happens."""
    count = sum(check(Claims, seed) for seed in range(SEEDS))
    assert count > SEEDS * STEPS // 4


class _NeverEnds(Claims):
    __slots__ = ()

    def holder(self, space: str, key: str, now_ms: int) -> Lease | None:
        return self._leases.get(f"{space}/{key}")


class _AnybodyLetsGo(Claims):
    __slots__ = ()

    def release(self, space: str, key: str, owner: str, *, now_ms: int) -> str:
        lease = self.holder(space, key, now_ms)
        return super().release(space, key, lease.owner if lease else owner, now_ms=now_ms)


class _AnybodyHandsOver(Claims):
    __slots__ = ()

    def transfer(self, space: str, key: str, owner: str, *, to: str, fence: tuple[int, int], now_ms: int) -> str:
        lease = self.holder(space, key, now_ms)
        return super().transfer(space, key, lease.owner if lease else owner, to=to, fence=fence, now_ms=now_ms)


class _RevivesTheEnded(Claims):
    __slots__ = ()

    def renew(self, space: str, key: str, owner: str, *, now_ms: int) -> str:
        lease = self._leases.get(f"{space}/{key}")
        return super().renew(space, key, owner, now_ms=min(now_ms, lease.expires_ms - 1) if lease and key else now_ms)


class _NoLimit(Claims):
    __slots__ = ()

    def _void_count(self, space: str, owner: str, now_ms: int) -> str:
        return ""


class _LastWins(Claims):
    __slots__ = ()

    def claim(self, space: str, key: str, owner: str, **rest: Any) -> str:
        lease = self.holder(space, key, rest["now_ms"])
        if lease is not None:
            self.release(space, key, lease.owner, now_ms=rest["now_ms"])
        return super().claim(space, key, owner, **rest)


class _SweepsInAnyOrder(Claims):
    __slots__ = ()

    def expire(self, now_ms: int, count_max: int) -> tuple[tuple[str, Lease], ...]:
        ended = [(identity, lease) for identity, lease in self._leases.items() if not lease.is_live(now_ms)][:count_max]
        for identity, _ in ended:
            self._drop(*module._split(identity))
        return tuple(ended)


class _ForgetsToSay(Claims):
    __slots__ = ()

    def _renew(self, space: str, key: str, lease: Lease, now_ms: int) -> None:
        before = set(self.dirty)
        super()._renew(space, key, lease, now_ms)
        self.dirty = before


MUTANTS = (
    _NeverEnds,
    _AnybodyLetsGo,
    _AnybodyHandsOver,
    _RevivesTheEnded,
    _NoLimit,
    _LastWins,
    _SweepsInAnyOrder,
    _ForgetsToSay,
)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_can_fail(mutant: type[Claims]) -> None:
    """Each rule removed once is caught."""
    with pytest.raises(AssertionError):
        sum(check(mutant, seed) for seed in range(SEEDS))
