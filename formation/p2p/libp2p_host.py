"""The adapter: a libp2p host as a Transport. TCP, Noise or TLS, and Yamux; in a private network under its key.

No QUIC: the library's is pure Python and carries 2.3 MB/s, where Noise on TCP carries 448.

Rules: (1) every await on the library is bounded by a time; (2) its exceptions become the port's or are logged, and
never end the node: if the host itself fails, it is made anew on the same addresses; (3) the library is imported only
here and in the `libp2p_*` files beside.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Any

import structlog
import trio
from libp2p.abc import INotifee
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from formation.core.errors import HostError, UnavailableError, UsageError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.libp2p_admission import Admission
from formation.p2p.libp2p_gossip import running_gossip
from formation.p2p.libp2p_muxer import traffic
from formation.p2p.libp2p_patches import apply_patches
from formation.p2p.libp2p_routes import Libp2pRoutes
from formation.p2p.libp2p_setup import (
    Security,
    check_free,
    dial_address,
    dialable,
    listen_address,
    make_host,
    parse_address,
    parse_id,
)
from formation.p2p.libp2p_stream import Libp2pStream
from formation.p2p.multiaddrs import Scope, endpoint_of, is_circuit, parse_circuit, scope_of
from formation.p2p.reach_messages import HOP_PROTOCOL
from formation.p2p.relay import ask_for_circuit
from formation.p2p.score import Offence
from formation.p2p.serving import serve_one
from formation.p2p.transport import (
    GOSSIP_SIZE_MAX_BYTES,
    ByteStream,
    ConnectionCallback,
    Deliver,
    OffenceCallback,
    StreamHandler,
    TaskStatus,
    TransportStatistics,
    Validate,
    Verdict,
)

# One address: SYN, noise and yamux take 4 round trips; the slowest links of a fog have 300 ms.
DIAL_TIMEOUT_S = 5.0
# An address of a LAN, of a peer that says how it is reached through relays: it answers at once or is of another LAN, and may be
# one of several that nobody answers; the way through the relay comes behind them.
DIAL_SITE_TIMEOUT_S = 1.5
OPEN_TIMEOUT_S = 10.0
# Through a relay: it is dialled first, asks the peer, and then there is a handshake.
CIRCUIT_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 2.0
# How often subscriptions are told again; it heals one-way silence after a peer moved (measured: 9 s).
ANNOUNCE_INTERVAL_S = 5.0
ADDRESS_TTL_S = 24 * 3600
RESTART_DELAY_S = 1.0
# A host that fails this often in a row will not get better by itself.
RESTART_COUNT_MAX = 10
RESTART_FORGIVEN_AFTER_S = 60.0

_NOBODY_THERE = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH)

_logger = structlog.get_logger(__name__)


def make_libp2p_transport(
    key: KeyPair,
    listen: Sequence[str],
    *,
    announce: Sequence[str] = (),
    security: Security = "noise",
    network_key: bytes | None = None,
) -> Libp2pTransport:
    """A transport that listens on multiaddrs such as `/ip4/0.0.0.0/tcp/4700` (port 0: any free one).

    Args:
      announce: multiaddrs to tell others instead of those listened on (behind NAT, or when listening on all interfaces).
      security: what secures connections; two that have none in common cannot connect.
      network_key: 32 bytes that only the members of a private network have; who has another, or none, cannot connect.

    Raises:
      HostError: another version of libp2p is installed.
      UsageError: an address is not an IP multiaddr with TCP.
    """
    apply_patches()
    # Importing the library cuts its logger off from ours and fills stderr; what matters of it we log ourselves.
    library_logger = logging.getLogger("libp2p")
    library_logger.propagate = True
    library_logger.setLevel(logging.CRITICAL)
    addresses, told = [listen_address(a) for a in listen], [parse_address(a) for a in announce]
    return Libp2pTransport(key, addresses, told, security=security, network_key=network_key)


class Libp2pTransport:
    """See Transport."""

    def __init__(
        self,
        key: KeyPair,
        listen: Sequence[Multiaddr],
        announce: Sequence[Multiaddr],
        *,
        security: Security,
        network_key: bytes | None,
    ) -> None:
        self._key = key
        self._security = security
        self._network_key = network_key
        self._node_id = key.node_id
        self._listen = list(listen)
        self._announce = list(announce)
        self._handlers: dict[str, StreamHandler] = {}
        self._bulk_protocols: set[str] = set()
        self._topics: dict[str, tuple[Validate, Deliver]] = {}
        self._callbacks: list[ConnectionCallback] = []
        self._offence_callbacks: list[OffenceCallback] = []
        self._is_refused: Callable[[NodeId], bool] = lambda node_id: False
        self._is_reserved: Callable[[NodeId], bool] = lambda node_id: False
        self._up: set[NodeId] = set()
        self._host: Any = None
        self.routes = Libp2pRoutes()
        """Its single connections, for reachability."""
        self._gossip: Any = None
        self._subscribing = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._stream_failed_count = 0
        self._published_count = 0
        self._delivered_count = 0
        self._rejected_count = 0
        self._ignored_count = 0

    @property
    def node_id(self) -> NodeId:
        """See Transport."""
        return self._node_id

    # --- running -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[tuple[str, ...]] = trio.TASK_STATUS_IGNORED) -> None:
        """See Transport."""
        check_free(self._listen)
        restart_count = 0
        status: TaskStatus[tuple[str, ...]] = task_status
        while True:
            started_at = trio.current_time()
            try:
                await self._run_host(status)
            except Exception as exc:
                if (own := _own_error(exc)) is not None:
                    raise own from exc
                restart_count = 1 if trio.current_time() - started_at > RESTART_FORGIVEN_AFTER_S else restart_count + 1
                _logger.error("libp2p host failed, starting anew", restart_count=restart_count, exc_info=exc)
                if restart_count > RESTART_COUNT_MAX:
                    raise HostError("libp2p fails again and again", hint="see the log for its last error") from exc
            # From now on `started` has been called; a new host listens on the ports that the first one got.
            status = trio.TASK_STATUS_IGNORED
            await trio.sleep(RESTART_DELAY_S)

    async def _run_host(self, task_status: TaskStatus[tuple[str, ...]]) -> None:
        host = self._host = make_host(
            self._key, self._listen, self._announce, security=self._security, network_key=self._network_key
        )
        host.get_network().admission.is_reserved = self._is_reserved
        for protocol, handler in self._handlers.items():
            host.set_stream_handler(protocol, self._stream_handler(protocol, handler))
        host.get_network().register_notifee(_Notifee(self))
        _announce_circuits(host, self.routes)
        try:
            async with host.run(self._listen):
                self._listen = self._listening_on(host)
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    self.routes.host, self.routes.nursery = host, nursery
                    self.routes.listen = tuple(str(address) for address in self._listen)
                    try:
                        await nursery.start(self._keep_gossip, host)
                        task_status.started(tuple(str(address) for address in self._listen))
                        await trio.sleep_forever()
                    finally:
                        self._nursery = self.routes.nursery = None
                        await self._close_host(host)
        finally:
            self._host = self.routes.host = None
            for node_id in list(self._up):
                self.note_connection(node_id, False)

    def _listening_on(self, host: Any) -> list[Multiaddr]:
        addresses = list(host.get_transport_addrs())
        if len(addresses) < len(self._listen):
            wanted = ", ".join(str(address) for address in self._listen)
            raise HostError(f"cannot listen on {wanted}", hint="is the address one of this host, and the port free?")
        return addresses

    async def _close_host(self, host: Any) -> None:
        """Close all sockets, then the host: leaving `host.run` alone leaves them open."""
        with trio.move_on_after(CLOSE_TIMEOUT_S) as scope:
            scope.shield = True
            try:
                # Connections first and at once: the library closes them one by one with 0.2 s of sleep for each.
                async with trio.open_nursery() as nursery:
                    for connection in host.get_network().get_connections():
                        nursery.start_soon(_close_connection, connection)
                await host.close()
            except Exception as exc:  # noqa: BLE001 - the end is near in any case
                _logger.debug("host close failed", error=repr(exc))

    async def _keep_gossip(self, host: Any, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        status: TaskStatus[None] = task_status
        while True:
            try:
                async with running_gossip(host, self._take_message, self._note_offence, self._topics) as gossip:
                    self._gossip = gossip
                    status.started(None)
                    while True:
                        await trio.sleep(ANNOUNCE_INTERVAL_S)
                        gossip.announce_again()
            except Exception as exc:
                _logger.error("gossip failed, starting anew", exc_info=exc)
            finally:
                self._gossip = None
            status = trio.TASK_STATUS_IGNORED
            await trio.sleep(RESTART_DELAY_S)

    # --- peers -------------------------------------------------------------------------------------------------------

    async def dial(self, node_id: NodeId, addresses: Sequence[str]) -> str:
        """See Transport."""
        host, peer_id = self._running_host(), parse_id(node_id)
        tried: list[str] = []
        is_private = any(map(is_circuit, addresses))
        for text in addresses:
            if node_id in self.connected():
                return ""
            try:
                if is_circuit(text):
                    with trio.fail_after(CIRCUIT_TIMEOUT_S):
                        return await self._dial_circuit(node_id, text)
                address = dial_address(text, node_id)
                with trio.fail_after(DIAL_SITE_TIMEOUT_S if is_private and _is_of_a_site(text) else DIAL_TIMEOUT_S):
                    await self._dial_direct(address, peer_id)
            except Exception as exc:  # noqa: BLE001 - the library raises all kinds; each means: try the next address
                tried.append(f"{text} ({_reason(exc)})")
                continue
            host.get_peerstore().add_addrs(peer_id, [address], ADDRESS_TTL_S)
            host._schedule_identify(peer_id, reason="connect")
            return str(address)
        raise UnavailableError(
            f"cannot reach {node_id}: " + ("; ".join(tried) if tried else "no address is known"),
            hint="is that node running, and its address right?"
            if self._network_key is None
            else "is that node running, its address right, and its network key the same as ours?",
        )

    async def _dial_direct(self, address: Multiaddr, peer_id: Any) -> None:
        network = self._running_host().get_network()
        source = self.routes.source_for(str(address))
        if source is not None:
            try:
                await network.dial_addr(address, peer_id, source=source)
            except Exception as exc:
                cause = _innermost(exc)
                if isinstance(cause, OSError) and cause.errno in _NOBODY_THERE:
                    raise
                # The port is in use towards there, or both dialled at once and met in the middle: any other port, then.
                _logger.debug("not dialled from the listening port", address=str(address), error=_reason(exc))
            else:
                return
        await network.dial_addr(address, peer_id)

    async def _dial_circuit(self, node_id: NodeId, text: str) -> str:
        """Connect through a relay, which is connected to first if need be."""
        circuit = parse_circuit(text.removesuffix(f"/p2p/{node_id}"))
        if circuit is None or circuit.relay_id in (node_id, self._node_id):
            raise UsageError(f"{text!r} is no way through a relay", hint="write /ip4/…/tcp/…/p2p/RELAY/p2p-circuit")
        if self._is_refused(circuit.relay_id):
            raise UnavailableError("this node has nothing to do with that relay", hint="formation peer list --all")
        if circuit.relay_id not in self.connected():
            await self.dial(circuit.relay_id, (circuit.relay_address,))
        stream = await self.open_stream(circuit.relay_id, HOP_PROTOCOL)
        try:
            limit = await ask_for_circuit(stream, node_id)
            await self.routes.enter_circuit(node_id, stream, circuit, limit=limit, is_initiator=True)
        except BaseException:
            await stream.aclose()
            raise
        self._running_host()._schedule_identify(parse_id(node_id), reason="connect")
        return str(circuit)

    def connected(self) -> frozenset[NodeId]:
        """See Transport."""
        if self._host is None:
            return frozenset()
        connections = self._host.get_network().connections
        return frozenset(
            NodeId(peer_id.to_base58()) for peer_id, several in connections.items() if any(not c.is_closed for c in several)
        )

    async def close_peer(self, node_id: NodeId) -> None:
        """See Transport."""
        if self._host is None:
            return
        for connection in self._host.get_network().get_connections(parse_id(node_id)):
            # The socket now, the bookkeeping (0.2 s) by another task.
            await _close_socket(connection)
            if self._nursery is not None:
                self._nursery.start_soon(_close_connection, connection)

    def refuse_peers(self, is_refused: Callable[[NodeId], bool]) -> None:
        """See Transport."""
        self._is_refused = is_refused

    def reserve_peers(self, is_reserved: Callable[[NodeId], bool]) -> None:
        """See Transport."""
        self._is_reserved = is_reserved

    def on_connection(self, callback: ConnectionCallback) -> None:
        """See Transport."""
        self._callbacks.append(callback)

    def on_offence(self, callback: OffenceCallback) -> None:
        """See Transport."""
        self._offence_callbacks.append(callback)

    def _note_offence(self, node_id: NodeId, offence: Offence) -> None:
        for callback in self._offence_callbacks:
            callback(node_id, offence)

    def note_connection(self, node_id: NodeId, is_up: bool) -> None:
        """A first connection came or a last one went (called by the library's notifee)."""
        if is_up and self._is_refused(node_id):
            if self._nursery is not None:
                self._nursery.start_soon(self.close_peer, node_id)
            return
        if is_up == (node_id in self._up):
            return
        if is_up:
            self._up.add(node_id)
        else:
            self._up.discard(node_id)
        for callback in self._callbacks:
            callback(node_id, is_up)

    def seen_at(self, node_id: NodeId) -> str:
        """See Transport."""
        if self._host is None:
            return ""
        for connection in self._host.get_network().get_connections(parse_id(node_id)):
            try:
                remote = None if connection.is_closed else connection.muxed_conn.get_remote_address()
            except Exception as exc:  # noqa: BLE001 - it is closing
                _logger.debug("remote address not read", peer=node_id, error=repr(exc))
                continue
            if remote is not None:
                return f"/ip{6 if ':' in remote[0] else 4}/{remote[0].partition('%')[0]}/tcp/{remote[1]}"
        return ""

    def own_addresses(self) -> tuple[str, ...]:
        """See Transport."""
        return () if self._host is None else dialable(self._node_id, self._host.get_addrs())

    def told_addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """See Transport."""
        if self._host is None:
            return ()
        try:
            # Not all addresses that the library has of it: those of others' hearsay are among them.
            envelope = self._host.get_peerstore().get_peer_record(parse_id(node_id))
            return () if envelope is None else dialable(node_id, envelope.record().addrs)
        except Exception as exc:  # noqa: BLE001 - a record may be signed and malformed all the same
            _logger.debug("peer record not read", peer=node_id, error=repr(exc))
            return ()

    # --- streams -----------------------------------------------------------------------------------------------------

    async def open_stream(self, node_id: NodeId, protocol: str) -> ByteStream:
        """See Transport."""
        host, peer_id = self._running_host(), parse_id(node_id)
        # Asked for first, because the library would dial by itself.
        if node_id not in self.connected():
            raise UnavailableError(f"not connected to {node_id}", hint="is that node running?")
        try:
            with trio.fail_after(OPEN_TIMEOUT_S):
                stream = await host.new_stream(peer_id, [protocol])
                return Libp2pStream(stream, node_id, is_bulk=protocol in self._bulk_protocols)
        except Exception as exc:
            raise UnavailableError(
                f"{node_id} opens no stream for {protocol}: {_reason(exc)}", hint="it may run another version, or be stopping"
            ) from exc

    def serve_stream(self, protocol: str, handler: StreamHandler, *, is_bulk: bool = False) -> None:
        """See Transport."""
        self._handlers[protocol] = handler
        if is_bulk:
            self._bulk_protocols.add(protocol)
        if self._host is not None:
            self._host.set_stream_handler(protocol, self._stream_handler(protocol, handler))
            self._tell_protocols()

    def unserve_stream(self, protocol: str) -> None:
        """See Transport."""
        if self._handlers.pop(protocol, None) is not None and self._host is not None:
            self._host.remove_stream_handler(protocol)
            self._tell_protocols()

    def _tell_protocols(self) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._push_identify)

    async def _push_identify(self) -> None:
        """Tell those who are connected what we serve by now; others ask."""
        try:
            with trio.move_on_after(OPEN_TIMEOUT_S):
                await self._host._push_identify_to_all_peers()
        except Exception as exc:  # noqa: BLE001 - they hear of it with their next identify
            _logger.debug("identify not pushed", error=repr(exc))

    def _stream_handler(self, protocol: str, handler: StreamHandler) -> Any:
        is_bulk = protocol in self._bulk_protocols

        async def handle(library_stream: Any) -> None:
            node_id = NodeId(library_stream.muxed_conn.peer_id.to_base58())
            if self._is_refused(node_id):
                await library_stream.reset()
                return
            if not await serve_one(handler, node_id, Libp2pStream(library_stream, node_id, is_bulk=is_bulk)):
                self._stream_failed_count += 1

        return handle

    # --- gossip ------------------------------------------------------------------------------------------------------

    async def publish(self, topic: str, data: bytes) -> None:
        """See Transport."""
        if len(data) > GOSSIP_SIZE_MAX_BYTES:
            raise UsageError(f"gossip of {len(data)} bytes, {GOSSIP_SIZE_MAX_BYTES} allowed", hint="send it as a stream")
        self._published_count += 1
        if self._gossip is None:  # being made anew; gossip may be lost at any time
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._gossip.publish(topic, data)
        except Exception as exc:
            _logger.warning("gossip not published", topic=topic, exc_info=exc)

    def subscribe(self, topic: str, validate: Validate, deliver: Deliver) -> None:
        """See Transport."""
        assert topic not in self._topics
        self._topics[topic] = (validate, deliver)
        if self._gossip is not None and self._nursery is not None:
            self._nursery.start_soon(self._subscribe_soon, topic)

    async def _subscribe_soon(self, topic: str) -> None:
        """Tell the library whether we take part, as it stands by then."""
        try:
            async with self._subscribing:
                if self._gossip is None:
                    return
                if topic in self._topics:
                    await self._gossip.subscribe(topic)
                else:
                    await self._gossip.unsubscribe(topic)
        except Exception as exc:
            _logger.error("subscribe failed", topic=topic, exc_info=exc)

    def unsubscribe(self, topic: str) -> None:
        """See Transport."""
        if self._topics.pop(topic, None) is not None and self._gossip is not None and self._nursery is not None:
            self._nursery.start_soon(self._subscribe_soon, topic)

    def subscribers(self, topic: str) -> frozenset[NodeId]:
        """See Transport."""
        told = () if self._gossip is None else self._gossip.peer_topics.get(topic, ())
        return frozenset(NodeId(peer_id.to_base58()) for peer_id in told) & self.connected()

    def _take_message(self, topic: str, author: NodeId, data: bytes) -> Verdict:
        if topic not in self._topics:
            return Verdict.IGNORE
        validate, deliver = self._topics[topic]
        verdict = validate(author, data)
        if verdict is Verdict.ACCEPT:
            self._delivered_count += 1
            deliver(author, data)
        elif verdict is Verdict.REJECT:
            self._rejected_count += 1
        else:
            self._ignored_count += 1
        return verdict

    def statistics(self) -> TransportStatistics:
        """See Transport."""
        network = None if self._host is None else self._host.get_network()
        # Counters of a host or gossip that is made anew begin at 0, as after a restart.
        admission = Admission() if network is None else network.admission
        gossip = self._gossip
        return TransportStatistics(
            connection_count=0 if network is None else len(network.get_connections()),
            stream_failed_count=self._stream_failed_count,
            gossip_published_count=self._published_count,
            gossip_delivered_count=self._delivered_count,
            gossip_rejected_count=self._rejected_count,
            gossip_ignored_count=self._ignored_count,
            gossip_malformed_count=0 if gossip is None else gossip.malformed_count,
            gossip_bad_signature_count=0 if gossip is None else gossip.bad_signature_count,
            gossip_duplicate_count=0 if gossip is None else gossip.duplicate_count,
            mesh_degrees={} if gossip is None else {topic: len(peers) for topic, peers in gossip.router.mesh.items()},
            handshake_count=len(admission.handshakes),
            handshake_failed_count=admission.handshake_failed_count,
            handshake_displaced_count=admission.handshakes.displaced_count,
            connection_refused_count=admission.connections.refused_count,
            connection_displaced_count=admission.connections.displaced_count,
            stream_count=admission.stream_count,
            stream_refused_count=admission.stream_refused_count,
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
        )

    def _running_host(self) -> Any:
        if self._host is None or self._nursery is None:
            raise UnavailableError("the network is not running", hint="it may be starting; try again")
        return self._host


class _Notifee(INotifee):  # type: ignore[misc] # the library is untyped here
    """Turns the library's events per connection into ours per peer."""

    def __init__(self, transport: Libp2pTransport) -> None:
        self._transport = transport

    async def connected(self, network: Any, conn: Any) -> None:
        self._transport.note_connection(NodeId(conn.muxed_conn.peer_id.to_base58()), True)
        self._transport.routes.note_route(conn, True)

    async def disconnected(self, network: Any, conn: Any) -> None:
        peer_id = conn.muxed_conn.peer_id
        if all(other.is_closed for other in network.get_connections(peer_id)):
            self._transport.note_connection(NodeId(peer_id.to_base58()), False)
        self._transport.routes.note_route(conn, False)

    async def opened_stream(self, network: Any, stream: Any) -> None:
        pass

    async def closed_stream(self, network: Any, stream: Any) -> None:
        pass

    async def listen(self, network: Any, multiaddr: Any) -> None:
        pass

    async def listen_close(self, network: Any, multiaddr: Any) -> None:
        pass


def _announce_circuits(host: Any, routes: Libp2pRoutes) -> None:
    """Symptom: a circuit is told to others as an address of the relay's. Cause: the library cuts addresses at `/p2p/`.

    Cure: those that `routes` announces are put behind what the library makes of the others.
    """
    direct_addresses = host.get_addrs

    def get_addrs() -> list[Any]:
        known = list(direct_addresses())
        told = (Multiaddr(f"{address}/p2p/{host.get_id()}") for address in routes.announced)
        return known + [address for address in told if address not in known]

    host.get_addrs = get_addrs


def _is_of_a_site(address: str) -> bool:
    end = endpoint_of(address)
    return end is not None and scope_of(end[0]) == Scope.SITE


async def _close_socket(connection: Any) -> None:
    try:
        await connection.muxed_conn.secured_conn.close()
    except Exception as exc:  # noqa: BLE001 - closing what is broken already
        _logger.debug("socket close failed", error=repr(exc))


async def _close_connection(connection: Any) -> None:
    with trio.move_on_after(CLOSE_TIMEOUT_S):
        await _close_socket(connection)
        try:
            await connection.close()
        except Exception as exc:  # noqa: BLE001 - closing what is broken already
            _logger.debug("connection close failed", error=repr(exc))


def _own_error(exc: BaseException) -> HostError | None:
    """The HostError inside the library's nested groups, if there is one."""
    if isinstance(exc, BaseExceptionGroup):
        return next((own for inner in exc.exceptions if (own := _own_error(inner)) is not None), None)
    return exc if isinstance(exc, HostError) else None


def _innermost(exc: BaseException) -> BaseException:
    while True:
        if exc.__cause__ is not None:
            exc = exc.__cause__
        elif isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        else:
            return exc


def _reason(exc: BaseException) -> str:
    """The innermost cause, which is the one that tells something."""
    exc = _innermost(exc)
    return "no answer in time" if isinstance(exc, trio.TooSlowError) else (str(exc)[:120] or type(exc).__name__)
