"""A ban of ours as another implementation meets it: let go, not let in again, forgiven; others are unharmed."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import trio

from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.libp2p_host import make_libp2p_transport
from formation.p2p.service import Offence, P2pService
from formation.p2p.transport import ByteStream
from tests.interop.conftest import JsError, JsPeer

pytestmark = [pytest.mark.net, pytest.mark.slow]


async def echo(_: NodeId, stream: ByteStream) -> None:
    while piece := await stream.receive_some(4096):
        await stream.send_all(piece)
    await stream.send_eof()


async def test_a_banned_peer_is_let_go_and_not_let_in(start_js: Callable[[bytes], JsPeer]) -> None:
    """By score, after offences enough; and after it is forgiven it may come back."""
    transport = make_libp2p_transport(KeyPair(b"o" * 32), ["/ip4/127.0.0.1/tcp/0"])
    p2p = P2pService(transport=transport, known_peers={}, linked=frozenset(), rng=random.Random(1))
    p2p.serve_stream("/interop/echo/1", echo)
    bad, good = [await trio.to_thread.run_sync(start_js, seed * 32) for seed in (b"b", b"g")]
    bad_id, good_id = NodeId(bad.node_id), NodeId(good.node_id)

    async def can_echo(js: JsPeer) -> bool:
        try:
            said = await trio.to_thread.run_sync(partial(js, "echo", peer=p2p.node_id, size=100, piece=100))
        except JsError:
            return False
        return bool(said["size"] == 100)

    async def dial(js: JsPeer) -> bool:
        try:
            await trio.to_thread.run_sync(partial(js, "dial", addr=address))
        except JsError:
            return False
        return await can_echo(js)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            (listening,) = await nursery.start(p2p.run)
            address = f"{listening}/p2p/{p2p.node_id}"
            assert await dial(bad)
            assert await dial(good)
            while not p2p.score_of(bad_id).banned_for_s:
                p2p.report(bad_id, Offence.MALFORMED)
            assert p2p.score_of(bad_id).offence_count > 1, "one offence is no ban"
            with trio.fail_after(5):
                while bad_id in transport.connected():  # noqa: ASYNC110 - the library has no event for it
                    await trio.sleep(0.02)
            for _ in range(3):
                assert not await dial(bad)
            assert await can_echo(good)
            assert p2p.score_of(good_id).offence_count == 0
            assert await p2p.unban(bad_id)
            with trio.fail_after(10):
                while not await dial(bad):  # noqa: ASYNC110 - it is the answer that is waited for
                    await trio.sleep(0.2)
            assert await can_echo(good)
            nursery.cancel_scope.cancel()
