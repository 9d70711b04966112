"""Waiting for peers to come and go."""

from __future__ import annotations

import trio

from formation.core.ids import NodeId


class Presence:
    """Turns up/down callbacks into something that tasks wait for; made for one run of trio."""

    __slots__ = ("_changed", "_up")

    def __init__(self) -> None:
        self._up: set[NodeId] = set()
        self._changed: dict[NodeId, trio.Event] = {}

    def note(self, node_id: NodeId, is_up: bool) -> None:
        """A peer came or went."""
        if is_up:
            self._up.add(node_id)
        else:
            self._up.discard(node_id)
        event = self._changed.pop(node_id, None)
        if event is not None:
            event.set()

    def is_up(self, node_id: NodeId) -> bool:
        """Whether it is up just now."""
        return node_id in self._up

    async def wait_up(self, node_id: NodeId) -> None:
        """Return once the peer is up."""
        while node_id not in self._up:
            await self._wait_change(node_id)

    async def wait_down(self, node_id: NodeId) -> None:
        """Return once the peer is down."""
        while node_id in self._up:
            await self._wait_change(node_id)

    async def _wait_change(self, node_id: NodeId) -> None:
        await self._changed.setdefault(node_id, trio.Event()).wait()
