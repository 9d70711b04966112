"""Can others reach this node? The verdict, from what several peers saw and tried. Pure.

Two kinds of evidence of each peer: where it *sees* us (our end of a connection to it), and whether it could *dial us back* at
an address. Of an address those decide who tried it, each network once (`admission.group_of`); a tie is against it, because an
address that fails some is no address to announce. Only the widest scope counts: a node behind a NAT is reached by its LAN,
which is no help to the world, and where all peers are on one LAN or host, that is the world.

A peer may lie about both, and have us tell everybody a victim's address as ours. So (1) an address that is none of our own
interfaces' must be reached by more than half of the networks that were asked, and (2) nobody sees us in a wider scope than the
one that we see it in: who is on our LAN cannot tell what the world sees. One peer alone is believed: there is no other.

The kind of NAT follows from the port that several peers see one and the same port of ours as: the same for all
(*endpoint-independent*: a hole can be punched) or another for each (*address-dependent*: it cannot). AutoNAT v1 cannot tell a
NAT that lets in whom we talk to already from an open port (the peer dials from an address that we talk to); a circuit
through a relay is then not set up though others need one. Linux's NAT is none of those.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from formation.core.ids import NodeId
from formation.p2p.admission import group_of
from formation.p2p.multiaddrs import endpoint_of, family_of, same_ip, scope_of


class Reach(Enum):
    """Whether others can connect to this node."""

    PUBLIC = "public"
    PRIVATE = "private"
    UNKNOWN = "unknown"


class NatKind(Enum):
    """What stands between."""

    NONE = "none"
    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """Where a peer sees us."""

    observer: NodeId
    host: str
    """The observer's IP address."""
    local_host: str
    seen: str
    """The multiaddr of our end."""
    is_from_listener: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DialBack:
    """What came of a peer's try to reach us; a peer that would not try says nothing."""

    by: NodeId
    host: str
    address: str
    fault: str
    """"" if it did reach us."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressReach:
    """One address."""

    address: str
    ok_count: int
    failed_count: int
    why: str = ""
    """The reason that was given last; "" where it is reached."""
    needed_count: int = 1
    """How many must have reached us there."""

    @property
    def is_reachable(self) -> bool:
        """Whether more reached us there than did not, and enough."""
        return self.ok_count > self.failed_count and self.ok_count >= self.needed_count


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyReach:
    """IPv4 or IPv6."""

    family: int
    reach: Reach
    nat: NatKind
    seen_as: tuple[str, ...]
    addresses: tuple[AddressReach, ...]
    asked_count: int

    @property
    def is_punchable(self) -> bool:
        """Whether a hole can be punched, as far as our side goes."""
        return self.nat in (NatKind.NONE, NatKind.ENDPOINT_INDEPENDENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldRelay:
    """A relay that keeps a place for us."""

    node_id: NodeId
    addresses: tuple[str, ...]
    """Circuits through it."""
    expires_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reachability:
    """All of it, as it was found last."""

    verdict: Reach
    families: tuple[FamilyReach, ...] = ()
    relays: tuple[HeldRelay, ...] = ()
    relayed: tuple[tuple[NodeId, str], ...] = ()
    """Peers that we talk to through a relay, and why not directly."""
    refusals: tuple[tuple[NodeId, str], ...] = ()
    """Peers that keep no place for us though we asked, and why."""
    silent: tuple[tuple[NodeId, str], ...] = ()
    """Peers that were asked to dial us back and did not try, and why."""
    serves_as_relay: bool = False
    checked_ago_s: float | None = None

    @property
    def is_reachable(self) -> bool | None:
        """Whether others can dial us directly; None: not known."""
        return {Reach.PUBLIC: True, Reach.PRIVATE: False}.get(self.verdict)

    @property
    def reachable(self) -> tuple[str, ...]:
        """Addresses at which others reach us."""
        return tuple(a.address for family in self.families for a in family.addresses if a.is_reachable)


def judge(sightings: Iterable[Sighting], dial_backs: Iterable[DialBack]) -> tuple[FamilyReach, ...]:
    """The verdict for IPv4 and IPv6, where there is any evidence."""
    seen = [s for s in sightings if _scope(s.seen) <= scope_of(s.host)]
    tried = [d for d in dial_backs if _scope(d.address) <= scope_of(d.host)]
    families = sorted({family_of(s.seen) for s in seen} | {family_of(d.address) for d in tried})
    return tuple(
        _judge_family(
            family, [s for s in seen if family_of(s.seen) == family], [d for d in tried if family_of(d.address) == family]
        )
        for family in families
        if family
    )


def overall(families: Iterable[FamilyReach]) -> Reach:
    """Of the whole node: reached by one family is reached."""
    found = {family.reach for family in families}
    return next((reach for reach in (Reach.PUBLIC, Reach.PRIVATE) if reach in found), Reach.UNKNOWN)


def _judge_family(family: int, sightings: list[Sighting], dial_backs: list[DialBack]) -> FamilyReach:
    widest = max((_scope(s.seen) for s in sightings), default=0)
    sightings = [s for s in sightings if _scope(s.seen) == widest]
    votes: dict[str, dict[str, str]] = {}
    for each in dial_backs:
        if _scope(each.address) >= widest:
            of_address = votes.setdefault(each.address, {})
            group = group_of(each.host)
            # Of several in one network the one that reached us is believed: a failure may have many reasons.
            of_address[group] = "" if of_address.get(group) == "" else each.fault
    asked_count = len({group for faults in votes.values() for group in faults})
    local_hosts = {s.local_host for s in sightings}
    addresses = tuple(
        _judge_address(address, faults, asked_count=asked_count, local_hosts=local_hosts)
        for address, faults in sorted(votes.items())
    )
    if any(address.is_reachable for address in addresses):
        reach = Reach.PUBLIC
    else:
        reach = Reach.PRIVATE if addresses else Reach.UNKNOWN
    return FamilyReach(
        family=family,
        reach=reach,
        nat=_nat(sightings),
        seen_as=tuple(sorted({s.seen for s in sightings})),
        addresses=addresses,
        asked_count=asked_count,
    )


def _judge_address(address: str, faults: dict[str, str], *, asked_count: int, local_hosts: set[str]) -> AddressReach:
    end = endpoint_of(address)
    is_own = end is not None and any(same_ip(end[0], host) for host in local_hosts)
    ok_count, needed_count = sum(not fault for fault in faults.values()), 1 if is_own else asked_count // 2 + 1
    why = next((fault for fault in reversed(faults.values()) if fault), "")
    return AddressReach(
        address=address,
        ok_count=ok_count,
        failed_count=len(faults) - ok_count,
        why=why or (f"others see this node elsewhere, {needed_count} are needed" if ok_count < needed_count else ""),
        needed_count=needed_count,
    )


def _nat(sightings: list[Sighting]) -> NatKind:
    ends = [(s, end) for s in sightings if (end := endpoint_of(s.seen)) is not None]
    if ends and all(same_ip(end[0], s.local_host) for s, end in ends):
        return NatKind.NONE
    ports = {group_of(s.host): end for s, end in ends if s.is_from_listener}
    if len(ports) < 2:
        return NatKind.UNKNOWN
    return NatKind.ENDPOINT_INDEPENDENT if len(set(ports.values())) == 1 else NatKind.ADDRESS_DEPENDENT


def _scope(address: str) -> int:
    end = endpoint_of(address)
    return 0 if end is None else scope_of(end[0])
