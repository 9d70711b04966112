"""Private networks and TLS with another implementation: the pre-shared key's file and cipher, and both handshakes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.libp2p_host import make_libp2p_transport
from formation.p2p.network_key import parse_network_key
from formation.p2p.transport import ByteStream
from tests.interop.conftest import JsError, JsPeer
from tests.interop.test_muxer import digest, pattern

pytestmark = [pytest.mark.processes, pytest.mark.slow]

ECHO = "/interop/echo/1"
# More than a window, in pieces that fit no frame.
DATA = pattern(3 * 2**20 + 17)
PIECE_BYTES = 300_001


async def echo(_: NodeId, stream: ByteStream) -> None:
    while piece := await stream.receive_some(65536):
        await stream.send_all(piece)
    await stream.send_eof()


def key_file(folder: Path, key: bytes) -> Path:
    file = folder / f"{key.hex()[:4]}.key"
    file.write_bytes(b"/key/swarm/psk/1.0.0/\n/base16/\n" + key.hex().encode() + b"\n")
    return file


@pytest.mark.parametrize("dialler", ["js", "ours"])
@pytest.mark.parametrize(("security", "is_private"), [("noise", True), ("tls", False), ("tls", True)])
async def test_streams_on_connections_of_every_kind(
    start_js: Callable[..., JsPeer], tmp_path: Path, security: Any, is_private: bool, dialler: str
) -> None:
    """Each dials; megabytes go there and back, opened by either side."""
    file = key_file(tmp_path, b"k" * 32)
    network_key = parse_network_key(file.read_bytes(), what=file.name) if is_private else None
    ours = make_libp2p_transport(KeyPair(b"o" * 32), ["/ip4/127.0.0.1/tcp/0"], security=security, network_key=network_key)
    ours.serve_stream(ECHO, echo)
    options = {"security": security, **({"networkKey": str(file)} if is_private else {})}
    js = await trio.to_thread.run_sync(partial(start_js, b"j" * 32, **options))
    js_id = NodeId(js.node_id)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(ours.run)
            if dialler == "js":
                said = await trio.to_thread.run_sync(partial(js, "dial", addr=f"{addresses[0]}/p2p/{ours.node_id}"))
                encryption = {"noise": "/noise", "tls": "/tls/1.0.0"}[security]
                assert said == {"peer": ours.node_id, "encryption": encryption, "multiplexer": "/yamux/1.0.0"}
            else:
                await ours.dial(js_id, js.addresses)
            call = partial(js, "echo", peer=ours.node_id, size=len(DATA), piece=PIECE_BYTES)
            assert await trio.to_thread.run_sync(call) == digest(DATA)
            stream = await ours.open_stream(js_id, ECHO)
            got = bytearray()
            async with trio.open_nursery() as inner:
                inner.start_soon(stream.send_all, DATA)
                while len(got) < len(DATA):
                    got += await stream.receive_some(65536)
            assert bytes(got) == DATA
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("dialler", ["js", "ours"])
async def test_another_network_key_is_another_network(start_js: Callable[..., JsPeer], tmp_path: Path, dialler: str) -> None:
    """Neither gets as far as a handshake."""
    ours = make_libp2p_transport(KeyPair(b"o" * 32), ["/ip4/127.0.0.1/tcp/0"], network_key=b"k" * 32)
    other = key_file(tmp_path, b"x" * 32)
    js = await trio.to_thread.run_sync(partial(start_js, b"j" * 32, networkKey=str(other)))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(ours.run)
            if dialler == "js":
                with pytest.raises(JsError):
                    await trio.to_thread.run_sync(partial(js, "dial", addr=f"{addresses[0]}/p2p/{ours.node_id}"))
            else:
                with pytest.raises(UnavailableError):
                    await ours.dial(NodeId(js.node_id), js.addresses)
            assert not ours.connected()
            nursery.cancel_scope.cancel()
