"""Places for work that peers ask for: so many in all, and so many of one peer. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId


class Slots:
    """Places of one protocol.

    Args:
      count_max: in all.
      per_peer_max: of one peer, so that none keeps the others out.
    """

    __slots__ = ("_count_max", "_held", "_per_peer_max", "refused_count")

    def __init__(self, *, count_max: int, per_peer_max: int) -> None:
        assert 0 < per_peer_max <= count_max
        self._count_max = count_max
        self._per_peer_max = per_peer_max
        self._held: Counter[NodeId] = Counter()
        self.refused_count = 0

    def __len__(self) -> int:
        return self._held.total()

    @contextmanager
    def take(self, node_id: NodeId) -> Iterator[None]:
        """Hold a place for a peer.

        Raises:
          UnavailableError: it has as many as it may, or all are taken.
        """
        if self._held[node_id] >= self._per_peer_max or len(self) >= self._count_max:
            self._forget(node_id)
            self.refused_count += 1
            raise UnavailableError("too many are open at that node", hint="end one, or try again")
        self._held[node_id] += 1
        try:
            yield
        finally:
            self._held[node_id] -= 1
            self._forget(node_id)

    def _forget(self, node_id: NodeId) -> None:
        # Nothing is kept for peers that come and go.
        if not self._held[node_id]:
            del self._held[node_id]
