from __future__ import annotations

import pytest

from formation.core.event import TTL_MS_MAX, TTL_MS_MIN
from formation.state.claims import (
    SPACES,
    SPINE_AHEAD_MS_MAX,
    SPINE_BEHIND_MS_MAX,
    STOP_MARGIN_MS,
    Claims,
    Lease,
    stop_after_ms,
    stop_deadline_ms,
)

VM, OTHER_VM = "vm-" + "a" * 16, "vm-" + "b" * 16
NODE, OTHER = "12D3KooWone", "12D3KooWtwo"
ANN, BOB = "did:key:z6Mkann", "did:key:z6Mkbob"
TTL_MS = 10_000
NOW_MS = 1_000_000


def place(claims: Claims, owner: str = NODE, *, key: str = VM, at: int = 1, now_ms: int = NOW_MS, ttl_ms: int = TTL_MS) -> str:
    return claims.claim("placement", key, owner, ttl_ms=ttl_ms, note="why", fence=(at, 0), now_ms=now_ms)


def named(claims: Claims, space: str, key: str, owner: str, *, ttl_ms: int = 0, at: int = 1) -> str:
    return claims.claim(space, key, owner, ttl_ms=ttl_ms, note="", fence=(at, 0), now_ms=NOW_MS)


def owner_of(claims: Claims, now_ms: int, key: str = VM) -> str | None:
    lease = claims.holder("placement", key, now_ms)
    return None if lease is None else lease.owner


def test_the_first_in_order_gets_the_key() -> None:
    """The second is told who holds it, and since when."""
    claims = Claims()
    assert place(claims, at=7) == ""
    assert place(claims, OTHER, at=8) == f"held by {NODE} since height 7"
    assert claims.holder("placement", VM, NOW_MS) == Lease(NODE, (7, 0), NOW_MS, NOW_MS + TTL_MS, TTL_MS, "why")


def test_a_lease_ends_at_its_end_and_not_before() -> None:
    """At expires_ms it is free, a millisecond earlier it is not."""
    claims = Claims()
    place(claims)
    end_ms = NOW_MS + TTL_MS
    assert place(claims, OTHER, at=2, now_ms=end_ms - 1) != ""
    assert owner_of(claims, end_ms) is None
    assert place(claims, OTHER, at=3, now_ms=end_ms) == ""
    assert owner_of(claims, end_ms) == OTHER


def test_a_late_renewal_is_void() -> None:
    """What has ended cannot be renewed, only claimed again under a new fence."""
    claims = Claims()
    place(claims)
    end_ms = NOW_MS + TTL_MS
    assert claims.renew("placement", VM, NODE, now_ms=end_ms) == "nobody holds it"
    assert claims.renew("placement", "", NODE, now_ms=end_ms) == "holds nothing in placement"
    assert place(claims, at=2, now_ms=end_ms) == ""
    lease = claims.holder("placement", VM, end_ms)
    assert lease is not None
    assert lease.fence == (2, 0)


def test_claiming_what_one_holds_renews_it() -> None:
    """The fence stays; the end never comes closer."""
    claims = Claims()
    place(claims, at=1)
    assert place(claims, at=2, now_ms=NOW_MS + 1000, ttl_ms=TTL_MS_MIN) == ""
    lease = claims.holder("placement", VM, NOW_MS + 1000)
    assert lease == Lease(NODE, (1, 0), NOW_MS, NOW_MS + TTL_MS, TTL_MS_MIN, "why")


def test_renewing_all_renews_what_the_owner_holds() -> None:
    """One operation for all leases of a node, and of no other."""
    claims = Claims()
    place(claims)
    place(claims, key=OTHER_VM)
    place(claims, OTHER, key="vm-" + "c" * 16)
    claims.dirty.clear()
    assert claims.renew("placement", "", NODE, now_ms=NOW_MS + 5000) == ""
    assert claims.dirty == {f"placement/{VM}", f"placement/{OTHER_VM}"}
    assert [lease.expires_ms for _, lease in claims.of_owner("placement", NODE, NOW_MS)] == [NOW_MS + 5000 + TTL_MS] * 2


def test_only_the_holder_renews_transfers_and_releases() -> None:
    """Anybody else is told who holds it."""
    claims = Claims()
    place(claims, at=3)
    void = f"not the holder: held by {NODE} since height 3"
    assert claims.renew("placement", VM, OTHER, now_ms=NOW_MS) == void
    assert claims.release("placement", VM, OTHER, now_ms=NOW_MS) == void
    assert claims.transfer("placement", VM, OTHER, to=OTHER, fence=(4, 0), now_ms=NOW_MS) == void
    assert owner_of(claims, NOW_MS) == NODE


def test_a_transfer_gives_a_new_fence_and_a_whole_time_to_live() -> None:
    """The old holder holds nothing afterwards."""
    claims = Claims()
    place(claims)
    assert claims.transfer("placement", VM, NODE, to=OTHER, fence=(2, 0), now_ms=NOW_MS + 9000) == ""
    assert claims.holder("placement", VM, NOW_MS + 9000) == Lease(OTHER, (2, 0), NOW_MS + 9000, NOW_MS + 19_000, TTL_MS, "why")
    assert claims.of_owner("placement", NODE, NOW_MS) == ()
    assert claims.transfer("placement", VM, OTHER, to=OTHER, fence=(3, 0), now_ms=NOW_MS + 9000) == "it holds that already"
    assert "only a node" in claims.transfer("placement", VM, OTHER, to=ANN, fence=(3, 0), now_ms=NOW_MS + 9000)


def test_a_released_key_is_free() -> None:
    """And gone from the state at once."""
    claims = Claims()
    place(claims)
    assert claims.release("placement", VM, NODE, now_ms=NOW_MS) == ""
    assert claims.dump(f"placement/{VM}") is None
    assert place(claims, OTHER, at=2) == ""


def test_what_is_held_for_ever_neither_ends_nor_changes_by_renewal() -> None:
    """A handle without end."""
    claims = Claims()
    assert named(claims, "handle", "ann", ANN) == ""
    claims.dirty.clear()
    assert claims.renew("handle", "ann", ANN, now_ms=1 << 47) == ""
    assert not claims.dirty
    assert claims.expire(1 << 47, 10) == ()
    assert claims.transfer("handle", "ann", ANN, to=BOB, fence=(2, 0), now_ms=1 << 47) == ""
    lease = claims.holder("handle", "ann", 1 << 47)
    assert lease is not None
    assert (lease.owner, lease.expires_ms) == (BOB, 0)


def test_an_owner_holds_at_most_so_many_keys() -> None:
    """The limit counts what is live, at claims and at transfers."""
    claims = Claims()
    assert named(claims, "handle", "ann", ANN) == ""
    assert named(claims, "handle", "ann", ANN, at=2) == ""
    assert named(claims, "handle", "queen-ann", ANN, at=3) == "holds 1 in handle already, the limit"
    assert named(claims, "handle", "bob", BOB, at=4) == ""
    assert "limit" in claims.transfer("handle", "bob", BOB, to=ANN, fence=(5, 0), now_ms=NOW_MS)
    count_max = SPACES["address"].count_max
    for index in range(count_max):
        assert named(claims, "address", f"10.0.0.{index}", NODE, ttl_ms=TTL_MS, at=6) == ""
    assert "limit" in place_address(claims, NOW_MS + TTL_MS - 1)
    assert place_address(claims, NOW_MS + TTL_MS) == ""


def place_address(claims: Claims, now_ms: int) -> str:
    return claims.claim("address", "10.0.1.0", NODE, ttl_ms=0, note="", fence=(7, 0), now_ms=now_ms)


@pytest.mark.parametrize(
    ("space", "key", "owner", "ttl_ms", "why"),
    [
        ("nowhere", "x", NODE, 0, "no space"),
        ("placement", VM, ANN, TTL_MS, "only a node"),
        ("placement", VM, NODE, 0, "needs a time to live"),
        ("placement", VM, NODE, TTL_MS_MIN - 1, "a time to live is"),
        ("placement", VM, NODE, TTL_MS_MAX + 1, "a time to live is"),
        ("placement", "web", NODE, TTL_MS, "not the id of a vm"),
        ("handle", "ann", NODE, 0, "only an account"),
        ("handle", "ann", ANN, TTL_MS, "held for ever"),
        ("handle", "Ann", ANN, 0, "not a valid name"),
        ("name", "a" * 64 + ".example", ANN, 0, "not a valid name"),
        ("name", ".".join(["a" * 60] * 5), ANN, 0, "at most 253"),
        ("name", "shop..example", ANN, 0, "not a valid name"),
        ("address", "10.0.0.01", NODE, 0, "not an ipv4"),
        ("address", "10.0.0.256", NODE, 0, "not an ipv4"),
        ("address", "10.0.0", NODE, 0, "not an ipv4"),
        ("address", "10.0.0.\u0661", NODE, 0, "not an ipv4"),
        ("address", "1" * 5000, NODE, 0, "not an ipv4"),
        ("seat", "north", NODE, TTL_MS, "held for ever"),
        ("seat", "-", NODE, 0, "not a valid name"),
    ],
)
def test_a_claim_against_the_rules_of_its_space_is_void(space: str, key: str, owner: str, ttl_ms: int, why: str) -> None:
    """Each rule has its own sentence, and leaves nothing behind."""
    claims = Claims()
    assert why in named(claims, space, key, owner, ttl_ms=ttl_ms)
    assert not list(claims.ids())
    assert not claims.dirty


def test_good_keys_are_granted() -> None:
    """One of each space."""
    claims = Claims()
    assert named(claims, "name", "shop.example", ANN) == ""
    assert named(claims, "address", "10.0.0.255", NODE) == ""
    assert named(claims, "address", "10.0.0.1", NODE, ttl_ms=TTL_MS) == ""
    assert named(claims, "seat", "north", NODE) == ""
    assert sorted(claims.ids()) == ["address/10.0.0.1", "address/10.0.0.255", "name/shop.example", "seat/north"]


def test_operations_in_no_space_are_void() -> None:
    """Renewal, transfer and release say so, too."""
    claims = Claims()
    assert "no space" in claims.renew("nowhere", "", NODE, now_ms=0)
    assert "no space" in claims.release("nowhere", "x", NODE, now_ms=0)
    assert "no space" in claims.transfer("nowhere", "x", NODE, to=OTHER, fence=(1, 0), now_ms=0)


def test_a_sweep_takes_the_earliest_ends_first_and_no_more_than_told() -> None:
    """The rest goes next time, and holds nothing meanwhile."""
    claims = Claims()
    keys = [f"vm-{letter * 16}" for letter in "abc"]
    for key, ttl_ms in zip(keys, (3000, 2000, 9000), strict=True):
        place(claims, key=key, ttl_ms=ttl_ms)
    now_ms = NOW_MS + 5000
    assert [identity for identity, _ in claims.expire(now_ms, 1)] == [f"placement/{keys[1]}"]
    assert owner_of(claims, now_ms, keys[0]) is None
    assert [identity for identity, _ in claims.expire(now_ms, 10)] == [f"placement/{keys[0]}"]
    assert [*claims.ids()] == [f"placement/{keys[2]}"]


def test_a_renewed_lease_costs_no_memory() -> None:
    """A thousand renewals, or claims and releases with ever nearer ends, leave a bounded heap."""
    claims = Claims()
    place(claims)
    for step in range(5000):
        assert claims.renew("placement", VM, NODE, now_ms=NOW_MS + step) == ""
    assert len(claims._heap) == 1
    for step in range(5000):
        assert place(claims, key=OTHER_VM, at=step + 2, ttl_ms=100_000 - step) == ""
        assert claims.release("placement", OTHER_VM, NODE, now_ms=NOW_MS) == ""
    assert len(claims._heap) < 2000
    assert [identity for identity, _ in claims.expire(NOW_MS + 20_000, 10)] == [f"placement/{VM}"]
    assert not claims.expire(NOW_MS + 200_000, 10)
    assert not claims._heap


def test_a_renewed_lease_is_swept_at_its_new_end() -> None:
    """And not at the one that it had first."""
    claims = Claims()
    place(claims)
    claims.renew("placement", VM, NODE, now_ms=NOW_MS + 5000)
    assert claims.expire(NOW_MS + TTL_MS, 10) == ()
    assert claims.expire(NOW_MS + TTL_MS + 4999, 10) == ()
    assert len(claims.expire(NOW_MS + TTL_MS + 5000, 10)) == 1


def test_a_holder_stops_before_anybody_can_take_over() -> None:
    """By its own clock that is behind, while the spine runs ahead by clocks that are fast: the worst case of the contract."""
    lease = Lease(NODE, (1, 0), NOW_MS, NOW_MS + TTL_MS, TTL_MS, "")
    skew_ms = 300
    deadline_ms = stop_deadline_ms(lease, skew_ms=skew_ms)
    assert deadline_ms is not None
    # True time when a clock that is 300 ms behind the voters' shows the deadline, and when a voter first lets the end pass.
    stopped_by_ms = deadline_ms + skew_ms
    assert stopped_by_ms + 500 <= lease.expires_ms - SPINE_AHEAD_MS_MAX
    assert STOP_MARGIN_MS == 1000


def test_the_monotonic_deadline_is_the_earlier_of_both() -> None:
    """Neither a wrong wall clock nor a grant at an old time of the spine makes it later than what is safe."""
    good = Lease(NODE, (1, 0), NOW_MS, NOW_MS + TTL_MS, TTL_MS, "")
    by_ttl_ms = TTL_MS - STOP_MARGIN_MS - SPINE_BEHIND_MS_MAX
    assert stop_after_ms(good, sent_ms=NOW_MS - 100, skew_ms=0) == by_ttl_ms
    # A wall clock that is an hour behind would allow an hour more.
    assert stop_after_ms(good, sent_ms=NOW_MS - 3_600_000, skew_ms=0) == by_ttl_ms
    # Granted at the time of a parent that is a minute old: over already.
    stale = Lease(NODE, (1, 0), NOW_MS - 60_000, NOW_MS - 60_000 + TTL_MS, TTL_MS, "")
    after_ms = stop_after_ms(stale, sent_ms=NOW_MS, skew_ms=0)
    assert after_ms is not None
    assert after_ms < 0


def test_what_never_ends_needs_no_deadline() -> None:
    """A seat is held until it is released."""
    lease = Lease(NODE, (1, 0), NOW_MS, 0, 0, "")
    assert stop_deadline_ms(lease, skew_ms=0) is None
    assert stop_after_ms(lease, sent_ms=NOW_MS, skew_ms=0) is None


def test_loading_over_a_claim_replaces_it() -> None:
    """Whoever held it before holds nothing."""
    claims, later = Claims(), Claims()
    place(claims)
    place(later, OTHER, at=5)
    identity = f"placement/{VM}"
    value = later.dump(identity)
    assert value is not None
    claims.load(identity, value)
    assert claims.dump(identity) == value
    assert claims.of_owner("placement", NODE, NOW_MS) == ()
