"""Single connections on libp2p 0.8.1: where a peer sees us, dial-back probes, hole punching, and circuits through relays.

A circuit is a stream to a relay that becomes a connection: it is carried to and from a socket pair, whose other end the library
takes for a TCP socket. So handshake, muxer and their limits are those of any connection, and the relay sees ciphertext only.
"""

from __future__ import annotations

import errno
import socket
from functools import partial
from typing import Any

import structlog
import trio
from libp2p.connection_types import ConnectionType
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify_push.identify_push import push_identify_to_peers
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from formation.core.errors import FormationError, UnavailableError
from formation.core.ids import NodeId
from formation.core.units import format_duration, format_size
from formation.p2p.libp2p_muxer import close_quietly
from formation.p2p.libp2p_pnet import ProtectedConnection
from formation.p2p.libp2p_setup import parse_id
from formation.p2p.libp2p_stream import Libp2pStream
from formation.p2p.multiaddrs import Circuit, Scope, address_of, endpoint_of, family_of, is_direct, scope_of
from formation.p2p.reach_messages import Limit, observed_in_identify, receive_message
from formation.p2p.routes import Route, RouteCallback
from formation.p2p.transport import READ_SIZE_MAX_BYTES, ByteStream, TaskStatus

# A relay, two NATs and a handshake; the slowest links of a fog have 300 ms.
UPGRADE_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 5.0
# SYNs are sent again after 1 and 3 s: both sides' mappings are there by then.
PUNCH_TIMEOUT_S = 4.0
SIGHT_TIMEOUT_S = 5.0
# Identify: a key, protocols, addresses and a signed record.
IDENTIFY_SIZE_MAX_BYTES = 64 * 1024
_LAYERS = ("stream_writer", "stream", "conn", "read_writer", "read_write_closer", "raw_connection", "raw_conn", "_connection")

_logger = structlog.get_logger(__name__)


class _Carried(TrioTCPStream):  # type: ignore[misc] # the library is untyped here
    """The library's end of a socket pair; it has no address that means anything."""

    def get_remote_address(self) -> None:
        """None: it is at the other end of a relay."""


class Libp2pRoutes:
    """See Routes; `host` and `nursery` are set while the transport runs."""

    def __init__(self) -> None:
        self.host: Any = None
        self.nursery: trio.Nursery | None = None
        self.listen: tuple[str, ...] = ()
        self.announced: tuple[str, ...] = ()
        self._uses_listener = True
        self._callbacks: list[RouteCallback] = []

    def listening(self) -> tuple[str, ...]:
        """See Routes."""
        return self.listen

    def routes(self, node_id: NodeId | None = None) -> tuple[Route, ...]:
        """See Routes."""
        if self.host is None:
            return ()
        several = self.host.get_network().get_connections(None if node_id is None else parse_id(node_id))
        routes = [self._route(connection) for connection in several if not connection.is_closed]
        # A socket that was reset a moment ago has no ends any more; its connection ends as soon as somebody reads.
        return tuple(route for route in routes if route.is_relayed or route.host)

    def on_route(self, callback: RouteCallback) -> None:
        """See Routes."""
        self._callbacks.append(callback)

    def dial_from_listener(self, is_wanted: bool) -> None:
        """See Routes."""
        self._uses_listener = is_wanted

    def note_route(self, connection: Any, is_up: bool) -> None:
        """A connection came or went (called by the transport)."""
        route = self._route(connection)
        if route.is_relayed and connection.get_connection_type() is not ConnectionType.RELAYED:
            connection.set_transport_info([], ConnectionType.RELAYED)
        elif route.host and connection.get_connection_type() is ConnectionType.UNKNOWN:
            # New streams go by direct connections, if there is one.
            connection.set_transport_info([Multiaddr(address_of(route.host, route.port))], ConnectionType.DIRECT)
        for callback in self._callbacks:
            callback(route, is_up)

    def _route(self, connection: Any) -> Route:
        muxer = connection.muxed_conn
        is_relayed = _below(muxer, _Carried) is not None
        host, port, local_host, local_port = "", 0, "", 0
        if not is_relayed:
            (host, port), (local_host, local_port) = ends_of(muxer)
        return Route(
            node_id=NodeId(muxer.peer_id.to_base58()),
            is_relayed=is_relayed,
            is_outbound=bool(muxer.is_initiator),
            host=host,
            port=port,
            local_host=local_host,
            is_from_listener=local_port in {int(address.split("/")[4]) for address in self.listen},
        )

    def source_for(self, address: str) -> tuple[str, int] | None:
        """The listening end to dial an address from; None: any port will do."""
        end = endpoint_of(address)
        if not self._uses_listener or end is None or scope_of(end[0]) == Scope.HOST:
            return None
        for listen in self.listen:
            text, port = listen.split("/")[2], int(listen.split("/")[4])
            if family_of(listen) == family_of(address) and (text in ("0.0.0.0", "::") or scope_of(text) != Scope.HOST):
                return text, port
        return None

    # --- where we are seen -------------------------------------------------------------------------------------------

    async def sight(self, node_id: NodeId) -> tuple[Route, str]:
        """See Routes."""
        connections = self._network().get_connections(parse_id(node_id))
        direct = [(self._route(c), c) for c in connections if not c.is_closed]
        direct = sorted((pair for pair in direct if not pair[0].is_relayed), key=lambda pair: not pair[0].is_from_listener)
        if not direct:
            raise UnavailableError(f"no direct connection to {node_id}")
        route, connection = direct[0]
        try:
            with trio.fail_after(SIGHT_TIMEOUT_S):
                stream = await connection.new_stream()
                try:
                    await self.host.multiselect_client.select_one_of([IDENTIFY], MultiselectCommunicator(stream))
                    said = await receive_message(Libp2pStream(stream, node_id), size_max_bytes=IDENTIFY_SIZE_MAX_BYTES)
                finally:
                    await Libp2pStream(stream, node_id).aclose()
            seen = observed_in_identify(said)
        except Exception as exc:
            raise UnavailableError(f"{node_id} does not say where it sees us: {exc!r}") from exc
        return route, seen if is_direct(seen) else ""

    # --- dial-back and punching --------------------------------------------------------------------------------------

    async def probe(self, node_id: NodeId, address: str) -> None:
        """See Routes."""
        end = endpoint_of(address)
        assert end is not None
        try:
            with trio.fail_after(PROBE_TIMEOUT_S):
                raw = await _connect(end, source=None)
                try:
                    await self._network().upgrader.upgrade_security(self._protected(raw), True, parse_id(node_id))
                except Exception as exc:
                    raise UnavailableError("another node answers, or none of ours") from exc
                finally:
                    await close_quietly(raw)
        except trio.TooSlowError as exc:
            raise UnavailableError("no answer in time") from exc
        except OSError as exc:
            raise UnavailableError(_why(exc)) from exc

    async def punch(self, node_id: NodeId, address: str, *, is_initiator: bool) -> None:
        """See Routes."""
        end, source = endpoint_of(address), self.source_for(address)
        if end is None or source is None or self.nursery is None:
            raise UnavailableError("no port to punch from")
        network = self._network()
        try:
            with trio.fail_after(PUNCH_TIMEOUT_S):
                raw = await _connect(end, source=source, is_initiator=is_initiator)
                try:
                    await self._upgrade(network, raw, node_id, Multiaddr(address), end[0], is_initiator)
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await close_quietly(raw)
                    raise
        except trio.TooSlowError as exc:
            raise UnavailableError("no answer in time") from exc
        except OSError as exc:
            raise UnavailableError(_why(exc)) from exc

    async def _upgrade(self, network: Any, raw: Any, node_id: NodeId, address: Any, host: str, is_initiator: bool) -> None:
        assert self.nursery is not None
        try:
            if is_initiator:
                await network.upgrade_outbound_raw_conn(self._protected(raw), parse_id(node_id))
            else:
                await self.nursery.start(partial(_accept, network, raw, address, node_id, host))
        except FormationError:
            raise
        except Exception as exc:
            raise UnavailableError(f"no handshake with {node_id}: {exc}") from exc

    def _protected(self, raw: Any) -> Any:
        psk = getattr(self._network(), "psk", None)
        return raw if psk is None else ProtectedConnection(raw, psk)

    # --- circuits ----------------------------------------------------------------------------------------------------

    async def enter_circuit(
        self, node_id: NodeId, stream: ByteStream, circuit: Circuit, *, limit: Limit, is_initiator: bool
    ) -> trio.Event:
        """See Routes."""
        network = self._network()
        if self.nursery is None:
            raise UnavailableError("the network is not running")
        ours, theirs = socket.socketpair()
        near, far = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (ours, theirs))
        raw = RawConnection(_Carried(far), is_initiator, ConnectionType.RELAYED, [Multiaddr(str(circuit))])
        over = trio.Event()
        self.nursery.start_soon(_Carrier(node_id, circuit, limit).carry, stream, near, over)
        try:
            with trio.fail_after(UPGRADE_TIMEOUT_S):
                # Counted as of its relay's address: who brings many takes places from itself.
                relay_host = (endpoint_of(circuit.relay_address) or ("", 0))[0]
                await self._upgrade(network, raw, node_id, Multiaddr(str(circuit)), relay_host, is_initiator)
        except BaseException as exc:
            with trio.CancelScope(shield=True):
                await close_quietly(raw)
            if isinstance(exc, trio.TooSlowError):
                raise UnavailableError(f"no handshake with {node_id} in time") from exc
            raise
        return over

    def announce(self, addresses: tuple[str, ...]) -> None:
        """See Routes."""
        if addresses == self.announced:
            return
        self.announced = addresses
        if self.host is not None and self.nursery is not None:
            self.nursery.start_soon(self._push)

    async def _push(self) -> None:
        try:
            with trio.move_on_after(UPGRADE_TIMEOUT_S):
                await push_identify_to_peers(self.host)
        except Exception as exc:  # noqa: BLE001 - they hear of it with the next look-up
            _logger.debug("addresses not pushed", error=repr(exc))

    async def close_relayed(self, node_id: NodeId) -> None:
        """See Routes."""
        for connection in list(self._network().get_connections(parse_id(node_id))):
            if self._route(connection).is_relayed:
                await close_quietly(connection.muxed_conn)
                await close_quietly(connection)

    def _network(self) -> Any:
        if self.host is None:
            raise UnavailableError("the network is not running", hint="it may be starting; try again")
        return self.host.get_network()


def _below(muxer: Any, kind: type) -> Any:
    """What of this kind a connection stands on: the library wraps each layer under another name; None if there is none.

    Not by `get_connection_type` and the like: of a TLS connection the library (0.8.1) raises AttributeError there.
    """
    layer = muxer.secured_conn
    for _ in range(10):
        if layer is None or isinstance(layer, kind):
            return layer
        layer = next((inner for name in _LAYERS if (inner := getattr(layer, name, None)) is not None), None)
    return None


def ends_of(muxer: Any) -> tuple[tuple[str, int], tuple[str, int]]:
    """(IP address, port) of the other end of a TCP connection and of ours; ("", 0) each if it is none, or over."""
    tcp = _below(muxer, trio.SocketStream)
    try:
        if tcp is not None:
            theirs, ours = tcp.socket.getpeername(), tcp.socket.getsockname()
            return (_plain(theirs[0]), theirs[1]), (_plain(ours[0]), ours[1])
    except (OSError, ValueError):
        pass
    return ("", 0), ("", 0)


def _plain(host: str) -> str:
    """An IP address without its interface, IPv4 inside IPv6 as IPv4."""
    return host.partition("%")[0].removeprefix("::ffff:")


async def _connect(end: tuple[str, int], *, source: tuple[str, int] | None, is_initiator: bool = True) -> Any:
    sock = trio.socket.socket(socket.AF_INET6 if ":" in end[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if source is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            await sock.bind(source)
        await sock.connect(end)
    except BaseException:
        sock.close()
        raise
    return RawConnection(TrioTCPStream(trio.SocketStream(sock)), is_initiator)


async def _accept(
    network: Any,
    raw: Any,
    address: Any,
    node_id: NodeId,
    host: str,
    *,
    task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Be the answering side of a connection that no listener accepted, until it is over; see `handle_inbound_connection`."""
    admission, task = network.admission, trio.lowlevel.current_task()
    is_started = False
    try:
        with trio.CancelScope() as scope:
            admission.begin(task, scope, host)
            muxed = await network.upgrade_inbound_raw_conn(raw, address)
            if muxed.peer_id.to_base58() != node_id:
                await close_quietly(muxed)
                raise UnavailableError("another node is at the other end")
            is_started = True
            task_status.started(None)
            await muxed.event_closed.wait()
    except Exception as exc:
        if not is_started:
            raise
        _logger.debug("connection ended", peer=node_id, error=repr(exc))
    finally:
        admission.end(task)
        with trio.move_on_after(1) as closing:
            closing.shield = True
            await close_quietly(raw)
    if not is_started:
        raise UnavailableError("there is no place for this connection")


class _Carrier:
    """Carries the bytes of one circuit, and says why it ended if the relay's limit is the likely cause."""

    def __init__(self, node_id: NodeId, circuit: Circuit, limit: Limit) -> None:
        self._node_id = node_id
        self._circuit = circuit
        self._limit = limit
        self._sent_bytes = self._received_bytes = 0

    async def carry(self, stream: ByteStream, sock: trio.SocketStream, over: trio.Event) -> None:
        """Bytes between a stream and a socket, both ways, until either ends."""
        begun_s = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry_in, stream, sock, nursery.cancel_scope)
                while data := await sock.receive_some(READ_SIZE_MAX_BYTES):
                    self._sent_bytes += len(data)
                    await stream.send_all(data)
                nursery.cancel_scope.cancel()
        except* (FormationError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._explain(trio.current_time() - begun_s)
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(sock)
                await stream.aclose()
            over.set()

    async def _carry_in(self, stream: ByteStream, sock: trio.SocketStream, scope: trio.CancelScope) -> None:
        while data := await stream.receive_some(READ_SIZE_MAX_BYTES):
            self._received_bytes += len(data)
            await sock.send_all(data)
        scope.cancel()

    def _explain(self, lasted_s: float) -> None:
        limit = self._limit
        # What the relay cuts at does not get here, so the receiver's count stays a little below.
        most_bytes = max(self._sent_bytes, self._received_bytes + 2 * READ_SIZE_MAX_BYTES)
        if limit.size_bytes and most_bytes > limit.size_bytes:
            why = f"its limit of {format_size(limit.size_bytes)} in each direction is reached"
        elif limit.duration_s and lasted_s >= limit.duration_s - 1:
            why = f"its limit of {format_duration(limit.duration_s)} is reached"
        else:
            return  # the relay or the peer went, which the loss of their connections tells
        _logger.info("the relay ended a connection", peer=self._node_id, relay=self._circuit.relay_id, why=why)


def _why(exc: OSError) -> str:
    return "refused" if exc.errno == errno.ECONNREFUSED else (exc.strerror or type(exc).__name__).lower()
