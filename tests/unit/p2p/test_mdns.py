from __future__ import annotations

import random

from trio.testing import MockClock

from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.mdns import FOUND_PER_MINUTE_MAX, FOUND_PER_SOURCE_MAX, Mdns
from formation.p2p.mdns_wire import encode_answer, encode_query, service_name

IDS = [KeyPair(index.to_bytes(32, "big")).node_id for index in range(1, 300)]
SERVICE = service_name(bytes(32))


def answer(node_id: NodeId, source: str, port: int = 1) -> bytes:
    return encode_answer(SERVICE, "x", node_id, [f"/ip4/{source}/tcp/{port}"])


async def test_one_address_cannot_use_up_what_is_taken(autojump_clock: MockClock) -> None:
    """Of any number of invented peers a few are told of; another is, as often as heard; later anew."""
    mdns = Mdns(network_id=bytes(32), node_id=IDS[0], rng=random.Random(1))
    found: list[NodeId] = []

    def take(node_id: NodeId, source: str, port: int = 1) -> None:
        mdns._take(answer(node_id, source, port), source, lambda node_id, _: found.append(node_id))

    for node_id in IDS[1:200]:
        take(node_id, "10.0.0.1")
    assert found == IDS[1 : 1 + FOUND_PER_SOURCE_MAX]
    for _ in range(3):
        take(IDS[250], "10.0.0.2")
    assert found[FOUND_PER_SOURCE_MAX:] == [IDS[250]] * 3
    take(IDS[0], "10.0.0.2")
    mdns._take(b"rubbish", "10.0.0.2", lambda *_: found.clear())
    mdns._take(encode_query(SERVICE), "10.0.0.2", lambda *_: found.clear())
    # Another port each time is news, and counts.
    for port in range(2, 400):
        take(IDS[250], "10.0.0.2", port)
    assert len(found) == FOUND_PER_MINUTE_MAX + 2
    autojump_clock.jump(61)
    take(IDS[251], "10.0.0.2")
    assert found[-1] == IDS[251]
    assert IDS[0] not in found
