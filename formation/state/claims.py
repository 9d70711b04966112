"""Claims and leases: who holds what only one may hold.

A *claim* gives one owner a key of a *space*; with a time to live it is a *lease*. Rules:

1. Operations arrive in final order only, with their place (height, index) in it and the spine's time of their height.
   The first claim of a free key gets it; its place is the **fence**. Fences rise strictly along the final order, so of two
   leases of one key the later has the higher fence: the holder attaches it to every side effect, and what sees two refuses
   the lower (Kleppmann 2016, "How to do distributed locking").
2. A lease has ended when the spine's time reaches `expires_ms`: from then on it is as if it were not there, whether or not
   `expire` has swept it away yet. Time is an argument, so all replicas agree to the operation.
3. A claim by the holder of its own live key is a renewal: the fence stays, time to live and note become the new ones.
4. A renewal moves the end to now + time to live, never closer. Transfer gives the key to another owner under a new fence,
   with a whole time to live. Release frees it.
5. Of a lost claim nothing is kept: its verdict names the holder and the height since which it holds.

| space | who claims | time to live | key |
|---|---|---|---|
| placement | node | required | VM id |
| handle | account, one each | none | DNS label |
| name | account | none | DNS name |
| address | node | optional | IPv4 address of the pool |
| seat | node, one each | none | label of a committee's seat |

**What a holder must do when it cannot renew**, and when it must have done it. Whoever takes over does so at a height h with
T(h) >= expires_ms. For a correct voter to notarise h, T(h) <= its clock + 500 ms. So no takeover is final before some correct
voter's clock shows expires_ms - 500 ms. The holder therefore begins to stop 1 s before the end: 500 ms for the spine's
lead, 500 ms to be gone (a hypervisor process is killed in a few ms; there is no graceful shutdown by then). Two ways to
measure that:

- *By wall clock* (`stop_deadline_ms`): expires_ms - 1 s - skew, where skew bounds the difference between the holder's
  clock and any correct voter's. It needs synchronised clocks, and no one who steps the holder's clock backwards.
- *By the monotonic clock, from the moment at which the holder sent the claim or renewal that became final* (to be
  preferred, part of `stop_after_ms`). Let g be the height that covered it. g and h were each notarised by 2f+1 voters, so
  one correct voter notarised both; by that one clock h came at least T(h) - T(g) - 500 ms - B after g, where B bounds how
  far T(g) may lie behind the clock of a voter that notarises it, and g came after the sending. T(h) - T(g) >= ttl, hence:
  stop after ttl - 1 s - B. Clocks need not agree, they only have to run at the rate of time (and a voter's must not be
  stepped forwards). B is the spine's duty: **without a lower bound on proposed times a lying leader can grant at the
  time of a parent that is hours old, and the lease is over when it begins**. Across a change of the committee the two
  quorums need not share a voter; there the voters' mutual skew counts once more.

`stop_after_ms` takes the earlier of both, so it is safe if either assumption holds. After each *final* renewal the holder
counts anew, from the sending of that renewal; a sent one changes nothing. Whoever receives a key by transfer has sent nothing:
it acts only after its own first renewal is final, and whoever transfers a placement stops before it sends the transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import Any

from formation.core.errors import UsageError
from formation.core.event import TTL_MS_MAX, TTL_MS_MIN
from formation.core.ids import check_label, is_vm_id

Fence = tuple[int, int]
"""(height, index of the operation within it)."""

# How far the spine's time may run ahead of a correct voter's clock (design/state section 4).
SPINE_AHEAD_MS_MAX = 500
# How far it may lie behind the clock of a voter that notarises it; for the spine to enforce. A view takes far less.
SPINE_BEHIND_MS_MAX = 1_000
# From the decision to stop until a killed hypervisor process is gone: milliseconds, plus a host under load.
STOP_MS_MAX = 500
STOP_MARGIN_MS = SPINE_AHEAD_MS_MAX + STOP_MS_MAX
# A heap that is more stale than this over its live entries is rebuilt; smaller ones are not worth it.
_STALE_COUNT_MAX = 1_024
_DNS_NAME_LENGTH_MAX = 253
_ACCOUNT_PREFIX = "did:key:"


@dataclass(frozen=True, slots=True)
class Lease:
    """A key held."""

    owner: str
    """NodeId or AccountId."""
    fence: Fence
    granted_ms: int
    """The spine's time at the fence."""
    expires_ms: int
    """By the spine's time; 0: never."""
    ttl_ms: int
    """What a renewal gives; 0: for ever."""
    note: str

    def is_live(self, now_ms: int) -> bool:
        """Whether it holds at this time of the spine."""
        return not self.expires_ms or now_ms < self.expires_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The rules of one space."""

    is_of_accounts: bool
    """Accounts claim here; otherwise nodes do."""
    is_ttl_allowed: bool
    is_ttl_required: bool
    count_max: int
    """Keys that one owner may hold."""
    check_key: Callable[[str], str]
    """Empty, or why the text is not a key of the space."""


def stop_deadline_ms(lease: Lease, *, skew_ms: int) -> int | None:
    """When the holder begins to stop, by its own wall clock, unless a renewal is final by then; None: never.

    Args:
      skew_ms: bound of the difference between the holder's clock and any correct voter's.
    """
    return lease.expires_ms - STOP_MARGIN_MS - skew_ms if lease.expires_ms else None


def stop_after_ms(lease: Lease, *, sent_ms: int, skew_ms: int) -> int | None:
    """When the holder begins to stop, as milliseconds of its monotonic clock since it sent the claim or renewal that gave
    it this lease; not above 0: at once; None: never.

    Args:
      lease: as it stands after that operation became final.
      sent_ms: the holder's wall clock at the sending.
      skew_ms: bound of the difference between the holder's clock and any correct voter's.
    """
    deadline_ms = stop_deadline_ms(lease, skew_ms=skew_ms)
    return None if deadline_ms is None else min(lease.ttl_ms - STOP_MARGIN_MS - SPINE_BEHIND_MS_MAX, deadline_ms - sent_ms)


def claim_id(space: str, key: str) -> str:
    """`SPACE/KEY`: the id of a claim's record."""
    return f"{space}/{key}"


class Claims:
    """All claims: a section of the final state, with ids `SPACE/KEY`. Verdicts are empty, or say why an operation is void."""

    __slots__ = ("_heap", "_leases", "_owned", "_queued", "dirty")

    name = "claim"

    def __init__(self) -> None:
        self.dirty: set[str] = set()
        """Ids that changed since the owner cleared it."""
        self._leases: dict[str, Lease] = {}
        self._owned: dict[tuple[str, str], set[str]] = {}
        """(space, owner) -> keys, ended ones included until somebody looks."""
        # (expires_ms, id), one valid entry for each lease that ends, at or before its true end: a renewal does not touch
        # the heap, the entry is put back when it comes up. So a lease that is renewed every second costs no memory.
        self._heap: list[tuple[int, str]] = []
        self._queued: dict[str, int] = {}
        """Id -> expires_ms of its valid entry."""

    def claim(self, space: str, key: str, owner: str, *, ttl_ms: int, note: str, fence: Fence, now_ms: int) -> str:
        """The owner wants the key."""
        void = _void_claim(space, key, owner, ttl_ms)
        if void:
            return void
        held = self.holder(space, key, now_ms)
        expires_ms = now_ms + ttl_ms if ttl_ms else 0
        if held is None:
            void = self._void_count(space, owner, now_ms)
            if not void:
                self._put(space, key, Lease(owner, fence, now_ms, expires_ms, ttl_ms, note))
            return void
        if held.owner != owner:
            return f"held by {held.owner} since height {held.fence[0]}"
        self._put(
            space, key, replace(held, expires_ms=expires_ms and max(held.expires_ms, expires_ms), ttl_ms=ttl_ms, note=note)
        )
        return ""

    def renew(self, space: str, key: str, owner: str, *, now_ms: int) -> str:
        """The owner goes on holding a key, or with an empty key all that it holds in the space."""
        if space not in SPACES:
            return _no_space(space)
        if not key:
            held = self.of_owner(space, owner, now_ms)
            for each, lease in held:
                self._renew(space, each, lease, now_ms)
            return "" if held else f"holds nothing in {space}"
        void, one = self._held_by(space, key, owner, now_ms)
        if one is not None:
            self._renew(space, key, one, now_ms)
        return void

    def transfer(self, space: str, key: str, owner: str, *, to: str, fence: Fence, now_ms: int) -> str:
        """The owner hands the key to another."""
        void, lease = self._held_by(space, key, owner, now_ms)
        if lease is None:
            return void
        if to == owner:
            return "it holds that already"
        void = _void_owner(space, to) or self._void_count(space, to, now_ms)
        if not void:
            assert fence > lease.fence
            expires_ms = now_ms + lease.ttl_ms if lease.ttl_ms else 0
            self._put(space, key, Lease(to, fence, now_ms, expires_ms, lease.ttl_ms, lease.note))
        return void

    def release(self, space: str, key: str, owner: str, *, now_ms: int) -> str:
        """The owner lets go."""
        void, lease = self._held_by(space, key, owner, now_ms)
        if lease is not None:
            self._drop(space, key)
        return void

    def expire(self, now_ms: int, count_max: int) -> tuple[tuple[str, Lease], ...]:
        """Sweep away what has ended, earliest end first; called once for each height, with the same limit everywhere.

        Returns:
          (id, lease) of what went, at most `count_max`; the rest goes next time, and counts for nothing meanwhile.
        """
        ended: list[tuple[str, Lease]] = []
        while self._heap and self._heap[0][0] <= now_ms and len(ended) < count_max:
            expires_ms, identity = heappop(self._heap)
            if self._queued.get(identity) != expires_ms:
                continue
            del self._queued[identity]
            lease = self._leases.get(identity)
            if lease is None or not lease.expires_ms:
                continue
            # Handled only at its true end, so what a limited sweep takes does not depend on when entries were pushed.
            if lease.expires_ms > expires_ms:
                self._queue(identity, lease.expires_ms)
                continue
            ended.append((identity, lease))
            self._drop(*_split(identity))
        return tuple(ended)

    def holder(self, space: str, key: str, now_ms: int) -> Lease | None:
        """Who holds a key at this time of the spine."""
        lease = self._leases.get(claim_id(space, key))
        return lease if lease is not None and lease.is_live(now_ms) else None

    def of_owner(self, space: str, owner: str, now_ms: int) -> tuple[tuple[str, Lease], ...]:
        """(key, lease) of all that an owner holds in a space, by key."""
        keys = sorted(self._owned.get((space, owner), ()))
        leases = ((key, self._leases[claim_id(space, key)]) for key in keys)
        return tuple((key, lease) for key, lease in leases if lease.is_live(now_ms))

    def ids(self) -> Iterable[str]:
        """Ids of all claims, ended ones included until they are swept."""
        return self._leases.keys()

    def dump(self, identity: str) -> list[Any] | None:
        """[owner, height, index, granted_ms, expires_ms, ttl_ms, note]; None: no such claim."""
        lease = self._leases.get(identity)
        if lease is None:
            return None
        return [lease.owner, *lease.fence, lease.granted_ms, lease.expires_ms, lease.ttl_ms, lease.note]

    def load(self, identity: str, value: list[Any]) -> None:
        """Take over what another replica's `dump` gave."""
        owner, height, index, granted_ms, expires_ms, ttl_ms, note = value
        space, key = _split(identity)
        if identity in self._leases:
            self._drop(space, key)
        self._put(space, key, Lease(owner, (height, index), granted_ms, expires_ms, ttl_ms, note))

    def _held_by(self, space: str, key: str, owner: str, now_ms: int) -> tuple[str, Lease | None]:
        if space not in SPACES:
            return _no_space(space), None
        lease = self.holder(space, key, now_ms)
        if lease is None:
            return "nobody holds it", None
        if lease.owner != owner:
            return f"not the holder: held by {lease.owner} since height {lease.fence[0]}", None
        return "", lease

    def _void_count(self, space: str, owner: str, now_ms: int) -> str:
        """Empty, or that the owner holds as many keys as one may."""
        limit = SPACES[space].count_max
        # Counted exactly only where it matters: sets hold ended leases until they are swept.
        if len(self._owned.get((space, owner), ())) < limit or len(self.of_owner(space, owner, now_ms)) < limit:
            return ""
        return f"holds {limit} in {space} already, the limit"

    def _renew(self, space: str, key: str, lease: Lease, now_ms: int) -> None:
        if lease.expires_ms:
            self._put(space, key, replace(lease, expires_ms=max(lease.expires_ms, now_ms + lease.ttl_ms)))

    def _put(self, space: str, key: str, lease: Lease) -> None:
        identity = claim_id(space, key)
        before = self._leases.get(identity)
        assert before is None or before.fence <= lease.fence
        if before is None or before.owner != lease.owner:
            if before is not None:
                assert before.fence < lease.fence
                self._drop(space, key)
            self._owned.setdefault((space, lease.owner), set()).add(key)
        self._leases[identity] = lease
        self.dirty.add(identity)
        if lease.expires_ms and self._queued.get(identity, lease.expires_ms + 1) > lease.expires_ms:
            self._queue(identity, lease.expires_ms)

    def _drop(self, space: str, key: str) -> None:
        identity = claim_id(space, key)
        lease = self._leases.pop(identity)
        keys = self._owned[(space, lease.owner)]
        keys.discard(key)
        if not keys:
            del self._owned[(space, lease.owner)]
        self.dirty.add(identity)

    def _queue(self, identity: str, expires_ms: int) -> None:
        self._queued[identity] = expires_ms
        heappush(self._heap, (expires_ms, identity))
        if len(self._heap) > 2 * len(self._leases) + _STALE_COUNT_MAX:
            self._queued = {each: lease.expires_ms for each, lease in self._leases.items() if lease.expires_ms}
            self._heap = [(end_ms, each) for each, end_ms in self._queued.items()]
            heapify(self._heap)


def _split(identity: str) -> tuple[str, str]:
    space, _, key = identity.partition("/")
    return space, key


def _no_space(space: str) -> str:
    return f"no space is called {space[:32]!r}"


def _void_claim(space: str, key: str, owner: str, ttl_ms: int) -> str:
    """Empty, or why nobody may claim this so."""
    rules = SPACES.get(space)
    if rules is None:
        return _no_space(space)
    void = _void_owner(space, owner) or rules.check_key(key)
    if void:
        return void
    if not ttl_ms:
        return f"{space} needs a time to live" if rules.is_ttl_required else ""
    if not rules.is_ttl_allowed:
        return f"{space} is held for ever, without a time to live"
    return "" if TTL_MS_MIN <= ttl_ms <= TTL_MS_MAX else f"a time to live is {TTL_MS_MIN} to {TTL_MS_MAX} ms"


def _void_owner(space: str, owner: str) -> str:
    is_of_accounts = SPACES[space].is_of_accounts
    if owner.startswith(_ACCOUNT_PREFIX) == is_of_accounts:
        return ""
    return f"only {'an account' if is_of_accounts else 'a node'} may hold a key of {space}"


def _check_vm_id(key: str) -> str:
    return "" if is_vm_id(key) else "not the id of a vm"


def _check_label(key: str) -> str:
    try:
        check_label(key, what="key")
    except UsageError as exc:
        return exc.message
    return ""


def _check_dns_name(key: str) -> str:
    if len(key) > _DNS_NAME_LENGTH_MAX:
        return f"a dns name has at most {_DNS_NAME_LENGTH_MAX} letters"
    return next(filter(None, map(_check_label, key.split("."))), "")


def _check_ipv4(key: str) -> str:
    parts = key.split(".")
    is_canonical = (
        len(key) <= 15
        and len(parts) == 4
        and all(part.isascii() and part.isdigit() and str(int(part)) == part and int(part) <= 255 for part in parts)
    )
    return "" if is_canonical else "not an ipv4 address"


SPACES: dict[str, Space] = {
    # Ten times the guests that the largest hosts run; bounds what one `renew all` touches.
    "placement": Space(
        is_of_accounts=False, is_ttl_allowed=True, is_ttl_required=True, count_max=4_096, check_key=_check_vm_id
    ),
    # A handle is who somebody is. One each, so that nobody collects the short ones.
    "handle": Space(is_of_accounts=True, is_ttl_allowed=False, is_ttl_required=False, count_max=1, check_key=_check_label),
    # Enough for the services of one account; global names are scarce.
    "name": Space(is_of_accounts=True, is_ttl_allowed=False, is_ttl_required=False, count_max=256, check_key=_check_dns_name),
    # A /24: what one node could route as one block.
    "address": Space(is_of_accounts=False, is_ttl_allowed=True, is_ttl_required=False, count_max=256, check_key=_check_ipv4),
    # A node sits on one seat.
    "seat": Space(is_of_accounts=False, is_ttl_allowed=False, is_ttl_required=False, count_max=1, check_key=_check_label),
}
