"""Somebody on the LAN who lies by mDNS, floods and asks without end, until its input ends; then says what it heard."""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time

from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.mdns import GROUP, PORT
from formation.p2p.mdns_wire import encode_answer, encode_query, service_name

ROUND_S = 0.02


def ghosts(first: int) -> list[NodeId]:
    """Nodes that never were."""
    return [KeyPair(index.to_bytes(32, "big")).node_id for index in range(first, first + 100)]


def pointer_bomb() -> bytes:
    """A name for each of its records that leads through a chain of pointers as long as the packet."""
    record = bytes.fromhex("0001 0001 00000078")
    at = 12 + 1 + len(record) + 2
    chain = b"\0" + b"".join((0xC000 | (at + max(0, 2 * n - 1))).to_bytes(2, "big") for n in range(4000))
    last = (0xC000 | (at + len(chain) - 2)).to_bytes(2, "big")
    head = bytes.fromhex("0000 8400 0000 0020 0000 0000")
    return head + b"\0" + record + len(chain).to_bytes(2, "big") + chain + (last + record + b"\0\0") * 31


def main(network_id: bytes, own: str, victims: list[str]) -> None:
    service = service_name(network_id)
    link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    link.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
    link.bind(("", PORT))
    membership = struct.pack("=4s4s", socket.inet_aton(GROUP), socket.inet_aton(own))
    link.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    link.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own))
    answers: dict[str, int] = dict.fromkeys(victims, 0)
    begun_s, turn = time.monotonic(), 0
    mine, theirs, alone = ghosts(1000), ghosts(2000), ghosts(3000)
    print(json.dumps("ready"), flush=True)
    while True:
        turn += 1
        own_lie = encode_answer(service, f"m{turn}", mine[turn % 100], [f"/ip4/{own}/tcp/9"])
        of_others = encode_answer(service, f"t{turn}", theirs[turn % 100], [f"/ip4/{victims[0]}/tcp/9"])
        directly = encode_answer(service, f"d{turn}", alone[turn % 100], [f"/ip4/{own}/tcp/9"])
        for packet in (encode_query(service), own_lie, of_others, pointer_bomb(), own_lie[: turn % len(own_lie)]):
            link.sendto(packet, (GROUP, PORT))
        for victim in victims:
            link.sendto(directly, (victim, PORT))
        while select.select([link], [], [], 0)[0]:
            data, (host, *_) = link.recvfrom(9000)
            if host in answers and data[2] & 0x80:
                answers[host] += 1
        if select.select([sys.stdin], [], [], ROUND_S)[0]:
            break
    told = {"mine": mine, "theirs": theirs, "alone": alone}
    print(
        json.dumps({"answers": answers, "asked_count": turn, "lasted_s": time.monotonic() - begun_s, "ghosts": told}),
        flush=True,
    )


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    main(bytes.fromhex(options["network"]), options["own"], options["victims"])
