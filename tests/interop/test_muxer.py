"""Our multiplexer against js-libp2p's, over real sockets: both dial, both open, much data, many streams, all kinds of ends."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.libp2p_host import Libp2pTransport, make_libp2p_transport
from formation.p2p.transport import ByteStream
from tests.interop.conftest import JsPeer

pytestmark = [pytest.mark.net, pytest.mark.slow]
MIB = 1 << 20
PIECE_BYTES = 64 * 1024
# Bytes of the pattern that peer.mjs sends: 251 is a prime, so that no cut of a power of two falls on its period.
PERIOD = bytes(i * 31 % 251 for i in range(251))
DIALLERS = pytest.mark.parametrize("dialler", ["js", "formation"])


def pattern(size: int) -> bytes:
    return (PERIOD * (size // len(PERIOD) + 1))[:size]


def digest(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "digest": hashlib.sha256(data).hexdigest()}


async def until(condition: Callable[[], bool], *, timeout_s: float = 5.0) -> None:
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 - the library and the other process have no events for it
            await trio.sleep(0.02)


async def receive_all(stream: ByteStream, *, pause_s: float = 0.0) -> bytes:
    data = bytearray()
    while piece := await stream.receive_some(PIECE_BYTES):
        data += piece
        if pause_s:
            await trio.sleep(pause_s)
    return bytes(data)


@dataclass
class Served:
    """How the streams ended that the JavaScript peer opened here."""

    broken: list[str] = field(default_factory=list)

    async def echo(self, _: NodeId, stream: ByteStream) -> None:
        while piece := await stream.receive_some(PIECE_BYTES):
            await stream.send_all(piece)
        await stream.send_eof()

    async def sink(self, _: NodeId, stream: ByteStream, *, pause_s: float = 0.0) -> None:
        try:
            data = await receive_all(stream, pause_s=pause_s)
        except UnavailableError as exc:
            self.broken.append(exc.message)
            raise
        await stream.send_all(json.dumps(digest(data)).encode())
        await stream.send_eof()

    async def source(self, _: NodeId, stream: ByteStream) -> None:
        await stream.send_all(pattern(int(await receive_all(stream))))
        await stream.send_eof()

    async def reset(self, _: NodeId, stream: ByteStream) -> None:
        await stream.send_all(b"so far")
        await trio.sleep(0.05)
        await stream.aclose()


@dataclass
class Pair:
    ours: Libp2pTransport
    js: JsPeer
    served: Served
    js_id: NodeId

    async def call(self, command: str, **options: Any) -> Any:
        """A command of the JavaScript peer, about us."""
        return await trio.to_thread.run_sync(partial(self.js, command, peer=self.ours.node_id, **options))

    async def open(self, protocol: str) -> ByteStream:
        return await self.ours.open_stream(self.js_id, protocol)


@asynccontextmanager
async def connected(start_js: Callable[[bytes], JsPeer], dialler: str) -> AsyncIterator[Pair]:
    ours = make_libp2p_transport(KeyPair(b"o" * 32), ["/ip4/127.0.0.1/tcp/0"])
    served = Served()
    ours.serve_stream("/interop/echo/1", served.echo)
    ours.serve_stream("/interop/sink/1", served.sink)
    ours.serve_stream("/interop/slow/1", partial(served.sink, pause_s=0.002))
    ours.serve_stream("/interop/source/1", served.source)
    ours.serve_stream("/interop/reset/1", served.reset)
    js = await trio.to_thread.run_sync(start_js, b"j" * 32)
    pair = Pair(ours, js, served, NodeId(js.node_id))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(ours.run)
            if dialler == "js":
                address = f"{addresses[0]}/p2p/{ours.node_id}"
                said = await trio.to_thread.run_sync(partial(js, "dial", addr=address))
                assert said == {"peer": ours.node_id, "encryption": "/noise", "multiplexer": "/yamux/1.0.0"}
            else:
                await ours.dial(pair.js_id, js.addresses)
            await until(lambda: pair.js_id in ours.connected())
            yield pair
            assert pair.js_id in ours.connected(), "the connection outlives whatever its streams do"
            nursery.cancel_scope.cancel()


@DIALLERS
async def test_streams_carry_megabytes_both_ways(start_js: Callable[[bytes], JsPeer], dialler: str) -> None:
    """Each side opens; all bytes come, in order, in both directions at once, in pieces that fit no frame."""
    data = pattern(5 * MIB + 17)
    async with connected(start_js, dialler) as pair:
        for piece in (PIECE_BYTES, 300_001):
            assert await pair.call("echo", size=len(data), piece=piece) == digest(data)
        assert await pair.call("sink", size=len(data), piece=1_000_003) == digest(data)
        assert await pair.call("source", size=len(data)) == digest(data)

        stream = await pair.open("/interop/echo/1")
        got = bytearray()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(data)
                await stream.send_eof()

            nursery.start_soon(send)
            got += await receive_all(stream)
        assert bytes(got) == data

        stream = await pair.open("/interop/source/1")
        await stream.send_all(b"5000000")
        await stream.send_eof()
        assert await receive_all(stream) == pattern(5_000_000)


@DIALLERS
async def test_a_slow_reader_slows_its_writer_and_nobody_else(start_js: Callable[[bytes], JsPeer], dialler: str) -> None:
    """Back-pressure in both directions, while other streams of the connection go on."""
    data = pattern(4 * MIB)
    async with connected(start_js, dialler) as pair:
        results: dict[str, Any] = {}
        async with trio.open_nursery() as nursery:

            async def ours_to_theirs() -> None:
                stream = await pair.open("/interop/slow/1")
                await stream.send_all(data)
                await stream.send_eof()
                results["ours"] = json.loads(await receive_all(stream))

            async def theirs_to_ours() -> None:
                results["theirs"] = await pair.call("sink", size=len(data), piece=PIECE_BYTES, protocol="/interop/slow/1")

            async def their_slow_read() -> None:
                results["read"] = await pair.call("source", size=len(data), pauseMs=2)

            for task in (ours_to_theirs, theirs_to_ours, their_slow_read):
                nursery.start_soon(task)
            for _ in range(20):
                assert (await pair.call("echo", size=100, piece=100))["size"] == 100
        assert results == {"ours": digest(data), "theirs": digest(data), "read": digest(data)}


@DIALLERS
async def test_a_reader_that_gives_no_window_stops_us(start_js: Callable[[bytes], JsPeer], dialler: str) -> None:
    """Not a byte beyond it is sent, for js ends the connection of who does; then the rest follows."""
    data = pattern(4 * MIB)
    async with connected(start_js, dialler) as pair:
        stream = await pair.open("/interop/paused/1")
        with trio.move_on_after(0.3) as scope:
            await stream.send_all(data)
        assert scope.cancelled_caught, "it was taken without a window"
        await stream.aclose()
        stream = await pair.open("/interop/paused/1")
        await stream.send_all(data)
        await stream.send_eof()
        assert json.loads(await receive_all(stream)) == digest(data)


@DIALLERS
async def test_a_reader_that_pauses_bounds_what_waits_here(start_js: Callable[[bytes], JsPeer], dialler: str) -> None:
    """Nobody reads for a while: what has arrived is a window at most, and then all of it comes."""
    async with connected(start_js, dialler) as pair:
        stream = await pair.open("/interop/source/1")
        await stream.send_all(str(3 * MIB).encode())
        await stream.send_eof()
        await trio.sleep(0.5)
        (connection,) = pair.ours._host.get_network().get_connections()
        held = [len(channel.incoming) for channel in connection.muxed_conn.session.channels.values()]
        assert 0 < max(held) <= 256 * 1024
        assert await receive_all(stream) == pattern(3 * MIB)


@DIALLERS
async def test_many_streams_at_once_and_one_after_the_other(start_js: Callable[[bytes], JsPeer], dialler: str) -> None:
    """A hundred at a time by each side (128 is what we serve one peer at once), three rounds; afterwards none is left."""
    async with connected(start_js, dialler) as pair:
        for _ in range(3):
            assert await pair.call("many", count=100, size=3_000) == {"sizes": [3_000] * 100}
        sizes: list[int] = []

        async def one() -> None:
            stream = await pair.open("/interop/echo/1")
            await stream.send_all(pattern(3_000))
            await stream.send_eof()
            sizes.append(len(await receive_all(stream)))
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(one)
        assert sizes == [3_000] * 300
        (connection,) = pair.ours._host.get_network().get_connections()
        # Gossip's and kad's own stay.
        await until(lambda: len(connection.muxed_conn.session.channels) <= 8)


async def test_streams_beyond_what_we_serve_are_reset(start_js: Callable[[bytes], JsPeer]) -> None:
    """The limit costs the greedy peer those streams, and nothing else."""
    async with connected(start_js, "js") as pair:
        served = (await pair.call("tooMany", count=400))["served"]
        assert 100 <= served < 400
        assert await pair.call("many", count=100, size=3_000) == {"sizes": [3_000] * 100}


async def our_life(pair: Pair, rng: random.Random) -> None:
    """One stream of ours, as `life` of peer.mjs does them."""
    kind, size = rng.randrange(5), rng.randint(1, 400_000)
    if kind == 0:
        stream = await pair.open("/interop/echo/1")
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(pattern(size))
                await stream.send_eof()

            nursery.start_soon(send)
            assert await receive_all(stream) == pattern(size)
    elif kind == 1:
        stream = await pair.open("/interop/sink/1")
        await stream.send_all(pattern(size))
        await stream.send_eof()
        assert json.loads(await receive_all(stream)) == digest(pattern(size))
    elif kind == 2:
        stream = await pair.open("/interop/source/1")
        await stream.send_all(str(size).encode())
        await stream.send_eof()
        await stream.receive_some(1000)
    elif kind == 3:
        stream = await pair.open("/interop/sink/1")
        with trio.move_on_after(rng.random() * 0.01):  # broken off in the middle of a write
            await stream.send_all(pattern(size))
    else:
        stream = await pair.open("/interop/reset/1")
        with pytest.raises(UnavailableError):
            await receive_all(stream)
    await stream.aclose()


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_long_life_leaves_nothing_behind(start_js: Callable[[bytes], JsPeer], seed: int) -> None:
    """Hundreds of streams of all kinds from both sides at once: no byte is wrong, and in the end none is left anywhere."""
    async with connected(start_js, ("js", "formation")[seed % 2]) as pair:
        await trio.sleep(1.0)
        (connection,) = pair.ours._host.get_network().get_connections()
        said: list[Any] = []
        rng = random.Random(seed)
        left = iter(range(200))

        async def ours() -> None:
            for _ in left:
                await our_life(pair, rng)

        async def theirs() -> None:
            said.append(await pair.call("life", randomSeed=seed, count=200, width=20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(theirs)
            for _ in range(20):
                nursery.start_soon(ours)
        assert said == [{"wrong": []}]
        await until(lambda: not [p for p in pair.js("open") if p.startswith("/interop")])
        # Gossip's, identify's and kad's own stay.
        await until(lambda: len(connection.muxed_conn.session.channels) <= 8)
        await until(lambda: len(connection.streams) <= 8)


@DIALLERS
async def test_a_reset_ends_one_stream_only(start_js: Callable[[bytes], JsPeer], dialler: str) -> None:
    """By either side, at any time: the other learns of it, and the connection goes on."""
    async with connected(start_js, dialler) as pair:
        # Ours resets what it serves.
        assert (await pair.call("reset"))["error"] in ("StreamResetError", "StreamStateError")
        # Theirs does.
        stream = await pair.open("/interop/reset/1")
        assert await stream.receive_some(100) == b"so far"
        with pytest.raises(UnavailableError):
            await stream.receive_some(100)
        # They abort what they have opened.
        await pair.call("abort", count=50)
        await until(lambda: len(pair.served.broken) == 50)
        # And we.
        before = (await pair.call("ended"))["resets"]
        for _ in range(50):
            stream = await pair.open("/interop/sink/1")
            await stream.send_all(pattern(1_000))
            await stream.aclose()
        await until(lambda: pair.js("ended")["resets"] == before + 50)
        assert await pair.call("echo", size=MIB, piece=PIECE_BYTES) == digest(pattern(MIB))


async def test_pings_are_answered_both_ways(start_js: Callable[[bytes], JsPeer]) -> None:
    """Those of the muxer, without which an idle connection ends after 10 s; and those of libp2p."""
    async with connected(start_js, "js") as pair:
        (connection,) = pair.ours._host.get_network().get_connections()
        before = connection.muxed_conn.session.frame_count
        await trio.sleep(5.5)
        assert connection.muxed_conn.session.frame_count >= before + 2
        assert (await pair.call("muxerPing"))["ms"] < 3_000
        assert (await pair.call("ping"))["ms"] < 5_000


@DIALLERS
async def test_a_goodbye_is_heard_at_once(start_js: Callable[[bytes], JsPeer], dialler: str) -> None:
    """Closed by either side, killed, and back again: the other side knows in a moment."""
    async with connected(start_js, dialler) as pair:
        await pair.call("close")
        await until(lambda: pair.js_id not in pair.ours.connected(), timeout_s=3)
        await pair.ours.dial(pair.js_id, pair.js.addresses)
        assert await pair.call("echo", size=1_000, piece=1_000) == digest(pattern(1_000))
        await pair.ours.close_peer(pair.js_id)
        await until(lambda: pair.js("connections") == [], timeout_s=3)
        await until(lambda: pair.js_id not in pair.ours.connected(), timeout_s=3)
        await pair.ours.dial(pair.js_id, pair.js.addresses)
        stream = await pair.open("/interop/echo/1")
        pair.js.kill()
        with pytest.raises(UnavailableError), trio.fail_after(3):
            await stream.receive_some(1)
        again = await trio.to_thread.run_sync(start_js, b"j" * 32)
        await until(lambda: pair.js_id not in pair.ours.connected(), timeout_s=3)
        await pair.ours.dial(pair.js_id, again.addresses)
        pair.js = again
        assert await pair.call("echo", size=1_000, piece=1_000) == digest(pattern(1_000))
