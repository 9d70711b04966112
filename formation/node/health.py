"""Who is alive, as far as this node can see.

A node is alive while a connection to it stands: the p2p layer probes connections, so a killed process is noticed at
once and a silent one within seconds. This is a node-local opinion; it decides where a *new* VM is offered, never who
owns a placement.
"""

from __future__ import annotations

from formation.core.clock import NS_PER_S, Clock
from formation.core.ids import NodeId

# A dropped connection that is dialled again at once must not move work about.
GRACE_S = 1.0
# Anybody may connect under ever new keys; far above any network that this version can hold.
GONE_COUNT_MAX = 4096


class Liveness:
    """Remembers since when each node is or is not connected."""

    def __init__(self, *, own_id: NodeId, clock: Clock) -> None:
        self._own_id = own_id
        self._clock = clock
        self._up: set[NodeId] = set()
        self._down_since_ns: dict[NodeId, int] = {}
        self._started_ns = clock.now_ns()

    def on_peer(self, node_id: NodeId, is_up: bool) -> None:
        """Take note of a connection that came or went."""
        if is_up:
            self._up.add(node_id)
            self._down_since_ns.pop(node_id, None)
        else:
            self._up.discard(node_id)
            self._down_since_ns.setdefault(node_id, self._clock.now_ns())
            if len(self._down_since_ns) > GONE_COUNT_MAX:
                # Insertion order is time order: the longest silent is forgotten.
                del self._down_since_ns[next(iter(self._down_since_ns))]

    def is_live(self, node_id: NodeId) -> bool:
        """Whether work may be offered to this node."""
        if node_id == self._own_id or node_id in self._up:
            return True
        return node_id in self._down_since_ns and self.silent_s(node_id) < GRACE_S

    def silent_s(self, node_id: NodeId) -> float:
        """Seconds without a connection; 0 for a connected one."""
        if node_id == self._own_id or node_id in self._up:
            return 0.0
        return (self._clock.now_ns() - self._down_since_ns.get(node_id, self._started_ns)) / NS_PER_S
