"""mDNS: finds peers of our network on the same LAN without any address to begin with. Shell and socket; `mdns_wire` has the
packets.

A socket of our own and no library: what is sent and read are two records (`mdns_wire`), and threads would be all that one
added. Other implementations are met as far as the tests show it: the records stand where the specification's readers look
for them, and are read wherever a sender puts them.

What is heard is hearsay: a peer to be dialled if we need one, whose key the connection proves. Anybody on the LAN may say
anything, so: only packets from port 5353 to the multicast group count, which no router passes on (who is elsewhere cannot
write to us here); only the sender's own address counts (`mdns_wire.peers_in`); FOUND_PER_SOURCE_MAX peers a minute are taken
of one address and FOUND_PER_MINUTE_MAX of all; and we answer by multicast only, once in ANSWER_INTERVAL_S, so that
nobody can have us send anything elsewhere. Who can forge the addresses of others on the LAN can keep its nodes from hearing
of one another there, as he can with ARP; he gains no more by it than dials.

IPv4 only: the LANs that have IPv6 only have not been met. A machine whose interfaces cannot do multicast logs that, and goes
on.
"""

from __future__ import annotations

import errno
import random
import socket
import string
import struct
from collections.abc import Callable

import structlog
import trio

from formation.core.errors import DecodeError
from formation.core.ids import NodeId
from formation.p2p.mdns_wire import (
    ANNOUNCED_ADDRESS_COUNT_MAX,
    PACKET_SIZE_MAX_BYTES,
    decode_packet,
    encode_answer,
    encode_query,
    peers_in,
    service_name,
)
from formation.p2p.multiaddrs import is_direct

GROUP = "224.0.0.251"
PORT = 5353
# RFC 6762 section 6: a record is multicast once a second at most. On a LAN of a hundred nodes each hears a hundred answers
# whenever one asks: who asks can wait a little, and others' questions are answered with it.
ANSWER_INTERVAL_S = 5.0
# The same section: so that those who answer one question do not speak at once.
ANSWER_DELAY_MIN_S, ANSWER_DELAY_MAX_S = 0.02, 0.12
# Section 5.2: the first questions a second apart, then ever rarer. A minute is what a person waits who plugs in a machine.
QUERY_FIRST_S = 1.0
QUERY_MAX_S = 60.0
# A LAN of hundreds of nodes is heard within minutes, and HEARSAY_COUNT_MAX (discovery) is not washed away by liars.
FOUND_PER_MINUTE_MAX = 120
# Nodes of one machine; more than that are a test's, or invented.
FOUND_PER_SOURCE_MAX = 16
# After an error of the socket, which none is known to give: it must not become a busy loop.
ERROR_PAUSE_S = 1.0
# Interfaces come and go with cables.
INTERFACES_INTERVAL_S = 10.0
INTERFACE_COUNT_MAX = 64
# RFC 6762 section 11: packets of others' links are told by it; and ours stay on the link in any case.
_TTL = 255
# linux/in.h; the socket module does not name it.
_IP_MULTICAST_ALL = 49

Found = Callable[[NodeId, tuple[str, ...]], None]
"""(peer, addresses); must not block."""

_logger = structlog.get_logger(__name__)


class Mdns:
    """The mDNS of one node."""

    def __init__(self, *, network_id: bytes, node_id: NodeId, rng: random.Random) -> None:
        self._service = service_name(network_id)
        self._node_id = node_id
        self._rng = rng
        # Random, so that it tells nothing about the machine (specification: 32 to 63 characters).
        self._peer_name = "".join(rng.choices(string.ascii_lowercase + string.digits, k=40))
        self._interfaces: set[int] = set()
        self._was_asked = trio.Event()
        self._minute_begun_s = float("-inf")
        self._heard: dict[str, dict[NodeId, tuple[str, ...]]] = {}
        """By source: what was told of it in this minute."""
        self._found_count = 0

    async def run(self, own_addresses: Callable[[], tuple[str, ...]], on_found: Found) -> None:
        """Ask, answer and tell until cancelled; returns if this machine cannot do it."""
        try:
            link = _open_socket()
        except OSError as exc:
            _logger.warning("mDNS is off: its port cannot be used", error=exc.strerror)
            return
        with link:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ask_loop, link)
                nursery.start_soon(self._answer_loop, link, own_addresses)
                await self._listen(link, on_found)

    async def _ask_loop(self, link: trio.socket.SocketType) -> None:
        wait_s, looked_at_s = QUERY_FIRST_S, float("-inf")
        asked_at_s = float("-inf")
        while True:
            now_s = trio.current_time()
            if now_s - looked_at_s >= INTERFACES_INTERVAL_S:
                looked_at_s = now_s
                if self._join(link):
                    wait_s, asked_at_s = QUERY_FIRST_S, float("-inf")
            if now_s - asked_at_s >= wait_s:
                wait_s, asked_at_s = min(2 * wait_s, QUERY_MAX_S), now_s
                await self._send(link, encode_query(self._service))
            await trio.sleep(min(wait_s, INTERFACES_INTERVAL_S) * (0.5 + 0.5 * self._rng.random()))

    def _join(self, link: trio.socket.SocketType) -> bool:
        """Take part on each interface that is there; whether there is a new one."""
        there = {index for index, name in socket.if_nameindex() if name != "lo"}
        is_new = False
        self._interfaces &= there
        for index in sorted(there - self._interfaces)[:INTERFACE_COUNT_MAX]:
            try:
                link.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, _request(index))
            except OSError as exc:
                # Down, without an address, or joined already under this number.
                _logger.debug("mDNS: interface not joined", index=index, error=exc.strerror)
                if exc.errno != errno.EADDRINUSE:
                    continue
            self._interfaces.add(index)
            is_new = True
        return is_new

    async def _send(self, link: trio.socket.SocketType, packet: bytes) -> None:
        for index in sorted(self._interfaces):
            try:
                link.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, _request(index))
                await link.sendto(packet, (GROUP, PORT))
            except OSError as exc:
                _logger.debug("mDNS: not sent", index=index, error=exc.strerror)

    async def _listen(self, link: trio.socket.SocketType, on_found: Found) -> None:
        while True:
            try:
                data, (host, port, *_) = await link.recvfrom(PACKET_SIZE_MAX_BYTES + 1)
            except OSError as exc:
                _logger.debug("mDNS: not received", error=exc.strerror)
                await trio.sleep(ERROR_PAUSE_S)
                continue
            if port == PORT:
                self._take(data, host, on_found)

    def _take(self, data: bytes, source: str, on_found: Found) -> None:
        try:
            packet = decode_packet(data)
        except DecodeError as exc:
            _logger.debug("mDNS: not a packet", source=source, error=str(exc))
            return
        if not packet.is_answer and self._service in packet.asked:
            self._was_asked.set()
        for node_id, addresses in peers_in(packet, self._service, source=source).items():
            if node_id != self._node_id and self._may_tell(source, node_id, addresses):
                on_found(node_id, addresses)

    async def _answer_loop(self, link: trio.socket.SocketType, own_addresses: Callable[[], tuple[str, ...]]) -> None:
        while True:
            await self._was_asked.wait()
            await trio.sleep(self._rng.uniform(ANSWER_DELAY_MIN_S, ANSWER_DELAY_MAX_S))
            self._was_asked = trio.Event()
            usable = [a for a in own_addresses() if is_direct(a) and a.startswith("/ip4/") and not a.startswith("/ip4/127.")]
            if usable:
                usable = usable[:ANNOUNCED_ADDRESS_COUNT_MAX]
                await self._send(link, encode_answer(self._service, self._peer_name, self._node_id, usable))
            await trio.sleep(ANSWER_INTERVAL_S)

    def _may_tell(self, source: str, node_id: NodeId, addresses: tuple[str, ...]) -> bool:
        """Whether a peer is not too much for this minute; what was told in it may be told again, for it may have been lost."""
        now_s = trio.current_time()
        if now_s - self._minute_begun_s >= 60:
            self._minute_begun_s, self._found_count = now_s, 0
            self._heard.clear()
        heard = self._heard.get(source, {})
        if heard.get(node_id) == addresses:
            return True
        if self._found_count >= FOUND_PER_MINUTE_MAX or (node_id not in heard and len(heard) >= FOUND_PER_SOURCE_MAX):
            return False
        self._found_count += 1
        self._heard.setdefault(source, heard)[node_id] = addresses
        return True


def _request(interface_index: int) -> bytes:
    """`struct ip_mreqn`: the group, any address, the interface."""
    return struct.pack("=4s4si", socket.inet_aton(GROUP), bytes(4), interface_index)


def _open_socket() -> trio.socket.SocketType:
    plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        # The port is shared with whoever else does mDNS here, and other nodes: multicast reaches all.
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Only from interfaces that we joined on.
        plain.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        plain.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, _TTL)
        # To the group: what somebody sends to this machine alone is not heard, wherever it comes from.
        plain.bind((GROUP, PORT))
    except OSError:
        plain.close()
        raise
    return trio.socket.from_stdlib_socket(plain)
