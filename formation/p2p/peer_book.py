"""Peers remembered across restarts: where each was last reached, so that a node finds the network with every bootstrap
node gone. Pure; times are milliseconds of the wall clock.

A stranger can fill a book with lies, so: an address is written down only when we reached its peer there (the handshake
proves the key), which makes the peer *proven*, or when a connected peer told it about itself; what others say of it never.
Who must make room: the unproven first, so that no number of identities that only call on us drives out one that we reached,
then the longest unseen. Each network prefix (/24 of IPv4, /48 of IPv6, a domain) may hold PREFIX_PEER_COUNT_MAX of the book.
Who lies about its own address costs one failed dial now and then. After FAILURE_COUNT_MAX failures in a row, and a week, a
peer is forgotten.

File: CBOR [version, [[node id, [multiaddr, …], seen ms, failures, proven], …], [node id banned by a person, …]]; see
peer_store.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError, UsageError
from formation.core.ids import NodeId, public_key_of_node
from formation.p2p.multiaddrs import is_direct, parse_circuit
from formation.p2p.router import ADDRESS_COUNT_MAX, ADDRESS_LENGTH_MAX
from formation.p2p.score import MANUAL_BAN_COUNT_MAX

VERSION = 1
# Some hundred kilobytes at most, read at once when a node starts.
PEER_COUNT_MAX = 1024
PREFIX_PEER_COUNT_MAX = 64
FAILURE_COUNT_MAX = 10
FORGOTTEN_AFTER_MS = 7 * 24 * 3600 * 1000
# Times are kept so exactly: a book whose peers just stay need not be written every minute.
SEEN_RESOLUTION_MS = 10 * 60 * 1000


@dataclass(slots=True)
class Remembered:
    """One peer."""

    addresses: tuple[str, ...]
    """Multiaddrs, the newest first; of a proven one the first is where it was reached."""
    seen_ms: int
    """When it was last connected, by our clock."""
    failure_count: int = 0
    """Dials in a row that did not reach it."""
    is_proven: bool = False
    """We reached it, by the first of these addresses if it was there lately."""


class PeerBook:
    """What is remembered; `is_changed` until it was encoded."""

    def __init__(self, own_id: NodeId) -> None:
        self._own_id = own_id
        self._peers: dict[NodeId, Remembered] = {}
        self._banned: tuple[NodeId, ...] = ()
        self.is_changed = False

    def __len__(self) -> int:
        return len(self._peers)

    def __contains__(self, node_id: NodeId) -> bool:
        return node_id in self._peers

    @property
    def banned(self) -> tuple[NodeId, ...]:
        """Those that a person banned."""
        return self._banned

    def set_banned(self, banned: Iterable[NodeId]) -> None:
        """Keep a person's bans with the book."""
        self._banned = tuple(sorted(banned))
        self.is_changed = True

    def note_reached(self, node_id: NodeId, address: str, *, now_ms: int) -> None:
        """A dial to this address was answered by this peer."""
        self._note(node_id, (address,), now_ms)
        known = self._peers.get(node_id)
        if known is not None and known.addresses[0] == address and not known.is_proven:
            known.is_proven = self.is_changed = True

    def note_seen(self, node_id: NodeId, told: Iterable[str], *, now_ms: int) -> None:
        """A peer is connected, and says that it can be dialled at these (none: at those known already)."""
        known = self._peers.get(node_id)
        reached = known.addresses[:1] if known is not None and known.is_proven else ()
        self._note(node_id, (*reached, *told), now_ms)

    def _note(self, node_id: NodeId, addresses: Iterable[str], now_ms: int) -> None:
        usable = tuple(a for a in addresses if is_dialable(a))
        known = self._peers.get(node_id)
        if node_id == self._own_id or (known is None and not usable):
            return
        if known is None:
            self._make_room(usable)
            known = self._peers[node_id] = Remembered((), now_ms)
            self.is_changed = True
        merged = tuple(dict.fromkeys(usable + known.addresses))[:ADDRESS_COUNT_MAX]
        if merged != known.addresses or known.failure_count or now_ms - known.seen_ms >= SEEN_RESOLUTION_MS:
            known.addresses, known.failure_count, known.seen_ms = merged, 0, max(known.seen_ms, now_ms)
            self.is_changed = True

    def note_failed(self, node_id: NodeId, *, now_ms: int) -> None:
        """A dial did not reach it."""
        known = self._peers.get(node_id)
        if known is None:
            return
        known.failure_count += 1
        self.is_changed = True
        if known.failure_count > FAILURE_COUNT_MAX and now_ms - known.seen_ms > FORGOTTEN_AFTER_MS:
            del self._peers[node_id]

    def addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Where it was reached; () if it is not known."""
        known = self._peers.get(node_id)
        return () if known is None else known.addresses

    def is_proven(self, node_id: NodeId) -> bool:
        """Whether we reached it ourselves once."""
        known = self._peers.get(node_id)
        return known is not None and known.is_proven

    def candidates(self) -> tuple[NodeId, ...]:
        """Everybody, best first: reached last time, then seen latest."""
        return tuple(sorted(self._peers, key=lambda n: (self._peers[n].failure_count, -self._peers[n].seen_ms, n)))

    def _make_room(self, addresses: tuple[str, ...]) -> None:
        prefix = prefix_of(addresses[0])
        neighbours = [n for n, known in self._peers.items() if prefix_of(known.addresses[0]) == prefix]
        if len(neighbours) >= PREFIX_PEER_COUNT_MAX:
            self._drop_least(neighbours)
        elif len(self._peers) >= PEER_COUNT_MAX:
            self._drop_least(self._peers)

    def _drop_least(self, node_ids: Iterable[NodeId]) -> None:
        del self._peers[min(node_ids, key=lambda n: (self._peers[n].is_proven, self._peers[n].seen_ms, n))]

    def encode(self) -> bytes:
        """The file's content."""
        self.is_changed = False
        rows = [[n, list(k.addresses), k.seen_ms, k.failure_count, k.is_proven] for n, k in sorted(self._peers.items())]
        return encode([VERSION, rows, list(self._banned)])

    def read(self, data: bytes, *, now_ms: int) -> None:
        """Take over a file's content; times that lie ahead count as now.

        Raises:
          DecodeError: it is none; the book is as before.
        """
        version, rows, banned = decode(
            data, tuple[int, list[tuple[str, list[str], int, int, bool]], list[str]], what="peer book"
        )
        if version != VERSION:
            raise DecodeError(f"peer book: version {version}, this one knows {VERSION}")
        found: dict[NodeId, Remembered] = {}
        for text, addresses, seen_ms, failure_count, is_proven in rows[:PEER_COUNT_MAX]:
            usable = tuple(a for a in addresses if is_dialable(a))[:ADDRESS_COUNT_MAX]
            if usable and text != self._own_id:
                seen_ms = max(0, min(seen_ms, now_ms))
                found[_node_id(text)] = Remembered(usable, seen_ms, max(0, failure_count), is_proven)
        self._banned = tuple(sorted(map(_node_id, banned[:MANUAL_BAN_COUNT_MAX])))
        self._peers, self.is_changed = found, False


def _node_id(text: str) -> NodeId:
    try:
        public_key_of_node(NodeId(text))
    except UsageError as exc:
        raise DecodeError(f"peer book: {text[:60]!r} is no node id") from exc
    return NodeId(text)


def is_dialable(address: str) -> bool:
    """Whether a multiaddr may be worth a dial from elsewhere: IP or DNS name, TCP, a real host and port; or a relay there.

    `/memory/NAME` is the in-memory twin's; on a real network nobody has one, and its dial fails at once.
    """
    parts = address.split("/")
    if parts[:2] == ["", "memory"]:
        return len(parts) == 3 and 0 < len(parts[2]) <= 253
    return len(address) <= ADDRESS_LENGTH_MAX and (is_direct(address) or parse_circuit(address) is not None)


# A full book is looked through for each stranger.
@lru_cache(maxsize=2 * PEER_COUNT_MAX)
def prefix_of(address: str) -> str:
    """The network that a dialable address is in: /24 of IPv4, /48 of IPv6, else the last two labels of the name."""
    kind, host = address.split("/")[1:3]
    if kind == "ip4":
        return str(ipaddress.ip_network((host, 24), strict=False))
    if kind == "ip6":
        return str(ipaddress.ip_network((host, 48), strict=False))
    return host if kind == "memory" else ".".join(host.lower().split(".")[-2:])
