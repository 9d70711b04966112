"""Kademlia's routing table: whom to ask, ordered by the distance of their ids from ours. Pure; seconds of a monotone clock.

Buckets by the length of the prefix that an id's place has in common with ours, K peers each (Maymounkov & Mazières 2002; fixed
buckets as in go-libp2p-kad-dht). Who may stand in it, and who gives way:

- Only peers whose connection proved their key, and that answered a question of ours: nothing that is only told.
- At most GROUP_BUCKET_COUNT_MAX of a bucket, and GROUP_TABLE_COUNT_MAX of the table, are of one public network (/24, /48,
  domain): identities are cheap, networks are not (Heilman 2015; go-libp2p-kad-dht's diversity filter). The network is that of
  the address which the connection has, not of one that the peer tells. Hosts of private networks are not counted so: a LAN is
  one network.
- A full bucket makes room for a newcomer of another network at the cost of the largest network in it, whose newest goes;
  otherwise only for one that is gone: the one unseen for longest is asked first, and stays if it answers. Who has been there
  for long is likely to stay (section 4.1 there), and a flood of identities meets a table that does not move.
- *Pinned* peers (the manifest's and the committee's) come in before any other, and never give way but by not answering.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import nsmallest

from formation.core.ids import NodeId
from formation.p2p.kad_scope import Scope, scope_of
from formation.p2p.kad_wire import K, Told, place_of_node
from formation.p2p.peer_book import is_dialable, prefix_of

PLACE_BITS = 256
# A data centre's nodes may share a /24, and a quarter of a bucket cannot hold the rest in check.
GROUP_BUCKET_COUNT_MAX = 5
# With 8 filled buckets (some hundred nodes) a quarter of the table, as in the buckets.
GROUP_TABLE_COUNT_MAX = 40
# A peer may miss one question: it restarts, or the line was bad.
FAILURE_COUNT_MAX = 2
# A bucket that nobody asked for so long is looked up (section 2.3 says an hour; fogs change faster, as go-libp2p's do).
STALE_AFTER_S = 600.0


@dataclass(slots=True)
class Contact:
    """A peer in the table."""

    node_id: NodeId
    place: int
    addresses: tuple[str, ...]
    group: str
    """The network that it is connected from; "" if unknown."""
    seen_s: float
    is_pinned: bool
    failure_count: int = 0


class RoutingTable:
    """The buckets of one node."""

    __slots__ = ("_buckets", "_groups", "_own_place", "_touched_s")

    def __init__(self, own_id: NodeId) -> None:
        # A twin's node without a real id has no place; its table stays empty.
        self._own_place = place_of_node(own_id)
        self._buckets: dict[int, dict[NodeId, Contact]] = {}
        self._groups: Counter[str] = Counter()
        self._touched_s: dict[int, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def __contains__(self, node_id: NodeId) -> bool:
        return self.get(node_id) is not None

    def get(self, node_id: NodeId) -> Contact | None:
        """A peer of the table."""
        return next((bucket[node_id] for bucket in self._buckets.values() if node_id in bucket), None)

    def contacts(self) -> tuple[Contact, ...]:
        """All of them."""
        return tuple(contact for bucket in self._buckets.values() for contact in bucket.values())

    def add(
        self, node_id: NodeId, addresses: Iterable[str], *, seen_at: str, now_s: float, is_pinned: bool = False
    ) -> tuple[bool, Contact | None]:
        """A peer that is connected has answered.

        Args:
          addresses: where it can be dialled, best first; none: those known already.
          seen_at: the other end of its connection, a multiaddr; "" if that tells nothing.

        Returns:
          Whether it has a place now; if not, whom to ask whether it still lives (`failed` or `seen`, then add again).
        """
        place = place_of_node(node_id)
        if place is None or self._own_place is None or place == self._own_place:
            return False, None
        addresses = tuple(addresses)
        index = self.bucket_of(place)
        bucket = self._buckets.get(index, {})
        if (known := bucket.pop(node_id, None)) is not None:
            bucket[node_id] = known  # the latest seen stand at the end
            known.addresses = addresses or known.addresses
            known.seen_s, known.failure_count, known.is_pinned = now_s, 0, is_pinned
            # Its answer told who is around it: as good as a look-up there.
            self._touched_s[index] = now_s
            return True, None
        group = group_of_address(seen_at or next(iter(addresses), ""))
        if not is_pinned and is_counted(group):
            in_bucket = sum(contact.group == group for contact in bucket.values())
            if in_bucket >= GROUP_BUCKET_COUNT_MAX or self._groups[group] >= GROUP_TABLE_COUNT_MAX:
                return False, None
        if len(bucket) >= K and not self._make_room(bucket, group, is_pinned):
            return False, next((contact for contact in bucket.values() if not contact.is_pinned), None)
        contact = Contact(node_id, place, addresses, group, now_s, is_pinned)
        self._buckets.setdefault(index, {})[node_id] = contact
        self._touched_s.setdefault(index, now_s)
        self._groups[group] += 1
        return True, None

    def _make_room(self, bucket: dict[NodeId, Contact], group: str, is_pinned: bool) -> bool:
        """Let the newest of the largest network go, if that is larger than the newcomer's would be."""
        loose = [contact for contact in bucket.values() if not contact.is_pinned]
        sizes = Counter(contact.group for contact in loose)
        if not sizes:
            return False
        largest, size = max(sizes.items(), key=lambda item: (item[1], item[0]))
        if not is_pinned and size <= sizes[group] + 1:
            return False
        self.remove(next(contact for contact in reversed(loose) if contact.group == largest).node_id)
        return True

    def seen(self, node_id: NodeId, *, now_s: float) -> None:
        """It has answered again."""
        for index, bucket in self._buckets.items():
            if (contact := bucket.pop(node_id, None)) is not None:
                bucket[node_id] = contact
                self._touched_s[index] = now_s
                contact.seen_s, contact.failure_count = now_s, 0
                return

    def failed(self, node_id: NodeId) -> bool:
        """It did not answer; whether it has lost its place by that."""
        contact = self.get(node_id)
        if contact is None:
            return False
        contact.failure_count += 1
        if contact.failure_count < FAILURE_COUNT_MAX:
            return False
        self.remove(node_id)
        return True

    def remove(self, node_id: NodeId) -> None:
        """Take it out; again is harmless."""
        for index, bucket in self._buckets.items():
            if (contact := bucket.pop(node_id, None)) is not None:
                self._groups[contact.group] -= 1
                self._groups += Counter()  # forgets those at zero
                if not bucket:
                    del self._buckets[index], self._touched_s[index]
                return

    def closest(self, place: int, *, count_max: int = K) -> tuple[Contact, ...]:
        """Those nearest to a place, nearest first."""
        return tuple(nsmallest(count_max, self.contacts(), key=lambda contact: contact.place ^ place))

    def bucket_of(self, place: int) -> int:
        """The bucket for a place: how many leading bits it has in common with ours."""
        assert self._own_place is not None
        return PLACE_BITS - (place ^ self._own_place).bit_length()

    def touch(self, place: int, *, now_s: float) -> None:
        """A look-up went through the bucket of this place."""
        if self._own_place is not None and (index := self.bucket_of(place)) in self._touched_s:
            self._touched_s[index] = now_s

    def stale_buckets(self, *, now_s: float) -> tuple[int, ...]:
        """Those that have had no look-up, and of which nobody answered, for STALE_AFTER_S."""
        return tuple(sorted(index for index, touched_s in self._touched_s.items() if now_s - touched_s >= STALE_AFTER_S))


def group_of_address(address: str) -> str:
    """The network that a multiaddr is in (`peer_book.prefix_of`), private ones marked; "" if it cannot be told."""
    if not is_dialable(address):
        return ""
    return prefix_of(address) if scope_of(address) is Scope.PUBLIC else f"private {prefix_of(address)}"


def host_of_address(address: str) -> str:
    """The host of a multiaddr: what one machine has one of; "" if it cannot be told."""
    return address.split("/")[2] if is_dialable(address) else ""


def is_counted(group: str) -> bool:
    """Whether a network's share is limited."""
    return bool(group) and not group.startswith("private ")


def as_told(contact: Contact) -> Told:
    """What to tell others of it."""
    return Told(node_id=contact.node_id, addresses=contact.addresses)
