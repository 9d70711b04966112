from __future__ import annotations

import trio
import trio.testing

from formation.core.ids import NodeId
from formation.p2p.presence import Presence

A, B = NodeId("a"), NodeId("b")


async def test_waiting_ends_with_the_peers_coming_and_going() -> None:
    """For that peer only, and at once if it is so already."""
    presence = Presence()
    seen: list[str] = []

    async def watch() -> None:
        await presence.wait_up(A)
        seen.append("up")
        await presence.wait_down(A)
        seen.append("down")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        presence.note(B, True)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        presence.note(A, True)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["up", "up"]
        assert presence.is_up(A)
        presence.note(A, False)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["up", "up", "down", "down"]
        await presence.wait_down(A)


async def test_a_peer_that_came_and_went_at_once_is_not_taken_for_up() -> None:
    """A waiter looks again when it runs."""
    presence = Presence()
    woken: list[bool] = []

    async def watch() -> None:
        await presence.wait_up(A)
        woken.append(presence.is_up(A))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        presence.note(A, True)
        presence.note(A, False)
        await trio.testing.wait_all_tasks_blocked()
        assert woken == []
        presence.note(A, True)
    assert woken == [True]
