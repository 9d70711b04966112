"""Who is where: known peers, their addresses, and which of them are up. A pure table; shells act on what it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from formation.core.ids import NodeId
from formation.p2p.multiaddrs import is_circuit

# Addresses of one peer: a host has a few interfaces and perhaps a name; more would only slow down dialling.
ADDRESS_COUNT_MAX = 8
ADDRESS_LENGTH_MAX = 256
# Strangers that we remember while they are connected; as many as the transport lets in.
STRANGER_COUNT_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """What we know about a peer just now."""

    node_id: NodeId
    is_known: bool
    """We keep dialling it; False for strangers that dialled us."""
    connected: bool
    linked: bool
    """Our link stream to it is open (voters only)."""
    since_s: float
    """Seconds since `connected` last changed."""
    addresses: tuple[str, ...]


@dataclass(slots=True)
class _Peer:
    is_known: bool
    given: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    connected: bool = False
    linked: bool = False
    changed_s: float = 0.0

    def addresses(self) -> tuple[str, ...]:
        return best_first(self.given + self.learned, ADDRESS_COUNT_MAX)


class PeerTable:
    """Known peers and connected strangers; times are seconds of any monotone clock."""

    __slots__ = ("_own_id", "_peers")

    def __init__(self, own_id: NodeId, known_peers: Mapping[NodeId, Iterable[str]], *, now_s: float = 0.0) -> None:
        self._own_id = own_id
        self._peers: dict[NodeId, _Peer] = {}
        for node_id, addresses in known_peers.items():
            self.add_known(node_id, addresses, now_s=now_s)

    def begin(self, *, now_s: float) -> None:
        """Count `since_s` from now: the node starts."""
        for peer in self._peers.values():
            peer.changed_s = now_s

    def add_known(self, node_id: NodeId, addresses: Iterable[str], *, now_s: float) -> bool:
        """Keep this peer dialled from now on; True if it was not known before. Ourselves are ignored."""
        if node_id == self._own_id:
            return False
        peer = self._peers.setdefault(node_id, _Peer(is_known=False, changed_s=now_s))
        was_known = peer.is_known
        peer.is_known = True
        peer.given = tuple(addresses)[:ADDRESS_COUNT_MAX]
        return not was_known

    def learn_addresses(self, node_id: NodeId, addresses: Iterable[str]) -> None:
        """Addresses that others told: tried after the given ones; the newest replace the older."""
        peer = self._peers.get(node_id)
        if peer is not None:
            peer.learned = tuple(a for a in addresses if len(a) <= ADDRESS_LENGTH_MAX)[:ADDRESS_COUNT_MAX]

    def set_connected(self, node_id: NodeId, connected: bool, *, now_s: float) -> None:
        """A peer came or went; a stranger is forgotten when it goes."""
        peer = self._peers.get(node_id)
        if peer is None:
            if not connected or len(self._peers) >= STRANGER_COUNT_MAX:
                return
            peer = self._peers[node_id] = _Peer(is_known=False)
        elif not connected and not peer.is_known:
            del self._peers[node_id]
            return
        if peer.connected != connected:
            peer.connected = connected
            peer.changed_s = now_s

    def set_linked(self, node_id: NodeId, linked: bool) -> None:
        """Our link to a known peer opened or closed."""
        peer = self._peers.get(node_id)
        if peer is not None:
            peer.linked = linked

    def known(self) -> tuple[NodeId, ...]:
        """Peers to keep dialled."""
        return tuple(node_id for node_id, peer in self._peers.items() if peer.is_known)

    def is_known(self, node_id: NodeId) -> bool:
        """Whether it is one to keep dialled."""
        peer = self._peers.get(node_id)
        return peer is not None and peer.is_known

    def addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Where to try a peer, best first."""
        peer = self._peers.get(node_id)
        return () if peer is None else peer.addresses()

    def given_addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Those of them that the manifest or the committee gave."""
        peer = self._peers.get(node_id)
        return () if peer is None else peer.given

    def is_connected(self, node_id: NodeId) -> bool:
        """Whether it is up, as far as we know."""
        peer = self._peers.get(node_id)
        return peer is not None and peer.connected

    def states(self, *, now_s: float) -> tuple[PeerState, ...]:
        """All of it, sorted by id."""
        return tuple(
            PeerState(
                node_id=node_id,
                is_known=peer.is_known,
                connected=peer.connected,
                linked=peer.linked,
                since_s=max(0.0, now_s - peer.changed_s),
                addresses=peer.addresses(),
            )
            for node_id, peer in sorted(self._peers.items())
        )


def best_first(addresses: Iterable[str], count_max: int) -> tuple[str, ...]:
    """Direct addresses before those through relays, in their order; of as many as there are places, one is a relay's."""
    several = tuple(dict.fromkeys(addresses))
    direct, relayed = [a for a in several if not is_circuit(a)], [a for a in several if is_circuit(a)]
    kept = direct[: max(0, count_max - 1)] if relayed else direct[:count_max]
    return tuple((*kept, *relayed)[:count_max])


def dials_first(own_id: NodeId, node_id: NodeId) -> bool:
    """Whether we are the one of the pair that dials at once; the other waits a moment, so that they rarely dial twice."""
    return own_id < node_id
