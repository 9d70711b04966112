"""The one door to the network for the rooms above.

It wires the shells of this room around one transport and one table of peers, and starts them in one nursery:
discovery keeps known peers connected, links keep a direct stream to each voter, requests and streams go to any peer,
gossip to whoever listens. What must travel up (a frame, a request, a message) travels by the handlers set here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
import trio

from formation.core.errors import DecodeError, UsageError
from formation.core.ids import NodeId
from formation.p2p.discovery import Discovery, Sight
from formation.p2p.frames import FRAME_SIZE_MAX_BYTES
from formation.p2p.kad import Kad, KadMode, KadStatistics
from formation.p2p.kad_table import Contact
from formation.p2p.link import LINK_PROTOCOL, FrameHandler, Links
from formation.p2p.mdns import Mdns
from formation.p2p.peer_book import PeerBook
from formation.p2p.peer_store import MemoryPeerStore, PeerStore
from formation.p2p.ping import PROTOCOL as PING_PROTOCOL
from formation.p2p.ping import ping, serve_ping
from formation.p2p.presence import Presence
from formation.p2p.publisher import Publisher
from formation.p2p.reach import ReachService, RelayMode
from formation.p2p.reachability import Reach, Reachability
from formation.p2p.relay import RelayCounters
from formation.p2p.requests import RequestHandler, Requests
from formation.p2p.reservations import RelayBook, RelayLimits
from formation.p2p.router import PeerState, PeerTable
from formation.p2p.routes import Routes
from formation.p2p.score import Offence, PeerScore, PeerScores, Refusal
from formation.p2p.subscriber import Subscriber
from formation.p2p.traffic import Traffic
from formation.p2p.transport import (
    ByteStream,
    ConnectionCallback,
    Deliver,
    StreamHandler,
    TaskStatus,
    Transport,
    TransportStatistics,
    Validate,
    Verdict,
)
from formation.p2p.visits import Visits

__all__ = [
    "FRAME_SIZE_MAX_BYTES",
    "ByteStream",
    "FrameHandler",
    "Offence",
    "P2pService",
    "P2pStatistics",
    "PeerScore",
    "PeerState",
    "Reach",
    "Reachability",
    "Refusal",
    "RelayMode",
    "RequestHandler",
    "Sight",
    "StreamHandler",
    "Transport",
    "Verdict",
]

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class P2pStatistics:
    """Counters since start, and gauges."""

    peer_connected_count: int
    link_count: int
    frame_sent_count: int
    frame_dropped_count: int
    frame_received_count: int
    frame_fault_count: int
    request_sent_count: int
    request_served_count: int
    request_refused_count: int
    stream_failed_count: int
    gossip_published_count: int
    gossip_delivered_count: int
    gossip_rejected_count: int
    gossip_ignored_count: int


class P2pService:
    """Peers, links, requests, streams and gossip of one node.

    Args:
      transport: not running yet; `run` runs it.
      known_peers: multiaddrs by peer, kept connected from `run` on; ourselves among them are ignored.
      linked: the voters, with each of which a link is kept; ourselves among them are ignored.
      rng: for the jitter of waits.
      store: where peers are remembered; none: nowhere.
      now_ms: the wall clock, for what is remembered.
      denied: peers that we have nothing to do with.
      allowed: if there are any, nobody else is let in but the committee.
      network_id: 32 bytes; peers of other networks have other Kademlia tables.
      mdns: finds peers on the LAN; None: it is off.
      kad_mode: whether we answer in Kademlia; `auto`: unless nobody can dial us (`set_reachable`).
      routes: the transport's single connections; without them nothing is known of reachability.
      relay: whether we are a relay for others.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        known_peers: Mapping[NodeId, tuple[str, ...]],
        linked: frozenset[NodeId],
        rng: random.Random,
        store: PeerStore | None = None,
        now_ms: Callable[[], int] = lambda: 0,
        denied: frozenset[NodeId] = frozenset(),
        allowed: frozenset[NodeId] = frozenset(),
        network_id: bytes = bytes(32),
        kad_mode: KadMode = "auto",
        mdns: Mdns | None = None,
        routes: Routes | None = None,
        relay: RelayMode = RelayMode.AUTO,
        relay_limits: RelayLimits | None = None,
    ) -> None:
        self._transport = transport
        self._presence = Presence()
        self._store = MemoryPeerStore() if store is None else store
        self._book = PeerBook(transport.node_id)
        self._now_ms = now_ms
        self._scores = PeerScores(denied=denied, allowed=allowed)
        self._table = PeerTable(transport.node_id, known_peers)
        self._links = Links(transport=transport, linked=linked, presence=self._presence, rng=rng)
        self._kad = Kad(
            transport=transport,
            network_id=network_id,
            mode=kad_mode,
            visit=lambda node_id, addresses: self._visits.of_own_network(node_id, addresses),
            is_known=self._table.is_known,
            on_hearsay=lambda node_id, addresses: self._discovery.note_hearsay(node_id, addresses),
            on_offence=self.report,
            rng=rng,
        )
        self._discovery = Discovery(
            transport=transport,
            finder=self._kad,
            table=self._table,
            presence=self._presence,
            scores=self._scores,
            book=self._book,
            save=self._store.save,
            now_ms=now_ms,
            rng=rng,
        )
        self._mdns = mdns
        self._requests = Requests(transport)
        self._visits = Visits(transport, self._discovery, self._table, self._requests)
        self._reach: ReachService | None = None
        if routes is not None:
            self._reach = ReachService(
                transport,
                routes,
                mode=relay,
                limits=RelayLimits() if relay_limits is None else relay_limits,
                is_favoured=lambda node_id: node_id in self._voters or self._table.is_known(node_id),
                now_ms=now_ms,
                rng=rng,
            )
            self._discovery.is_needed = self._reach.is_needed
            self._reach.on_reachability(lambda found: self.set_reachable(found.is_reachable))
        self._publisher = Publisher(transport)
        self._subscriber = Subscriber(transport, on_offence=self.report)
        self._peer_callbacks: list[ConnectionCallback] = []
        self._nursery: trio.Nursery | None = None
        self._voters: frozenset[NodeId] = frozenset()
        transport.refuse_peers(self._is_refused)
        transport.reserve_peers(lambda node_id: node_id in self._voters or self._table.is_known(node_id))
        transport.on_offence(self.report)
        transport.serve_stream(PING_PROTOCOL, serve_ping)
        self._links.on_offence(self.report)
        self._requests.on_offence(self.report)
        transport.on_connection(self._note_connection)
        self._links.on_link(self._table.set_linked)

    @property
    def node_id(self) -> NodeId:
        """Our own id."""
        return self._transport.node_id

    async def run(self, *, task_status: TaskStatus[tuple[str, ...]] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, dial and serve until cancelled; started with the multiaddrs listened on.

        Leaves within 3 s of cancellation, all sockets closed.

        Raises:
          HostError: none of the addresses could be listened on.
        """
        self._table.begin(now_s=trio.current_time())
        await self._load_book()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            addresses: tuple[str, ...] = await nursery.start(self._transport.run)
            nursery.start_soon(self._discovery.run)
            nursery.start_soon(self._kad.run)
            if self._mdns is not None:
                nursery.start_soon(self._mdns.run, self._transport.own_addresses, self._discovery.note_hearsay)
            nursery.start_soon(self._links.run)
            if self._reach is not None:
                nursery.start_soon(self._reach.run)
            _logger.info("listening", node_id=self.node_id, addresses=addresses)
            task_status.started(addresses)

    async def _load_book(self) -> None:
        data = await self._store.load()
        if not data:
            return
        try:
            self._book.read(data, now_ms=self._now_ms())
        except DecodeError as exc:
            await self._store.put_aside(exc.message)
            return
        for node_id in self._book.banned:
            self._scores.ban(node_id)
        _logger.info("peers remembered", count=len(self._book), banned_count=len(self._book.banned))

    # --- links -------------------------------------------------------------------------------------------------------

    def send_frame(self, node_id: NodeId, frame: bytes, *, is_lazy: bool = False) -> bool:
        """Queue a frame of 1 to FRAME_SIZE_MAX_BYTES bytes for a voter; never blocks.

        Args:
          is_lazy: nobody waits for it: it may leave up to 10 ms later, with others.

        Returns:
          False: no link to it, or its queue is full; the frame is dropped, and the room above has to re-sync. True is
          no promise either: a link that breaks loses what was queued.
        """
        return self._links.send_frame(node_id, frame, is_lazy=is_lazy)

    def set_linked(self, linked: frozenset[NodeId]) -> None:
        """Keep links to these peers from now on, and to no others: the committee changed."""
        self._links.set_linked(linked)

    def set_voters(self, voters: frozenset[NodeId]) -> None:
        """Who votes now: never banned by score, always allowed, never let go, and missed when out of sight."""
        self._voters = voters
        self._scores.protect(voters)
        self._discovery.set_voters(voters)
        for node_id in self._transport.connected():
            # Who left the committee may be refused from now on.
            if self._is_refused(node_id):
                self._close_soon(node_id)

    def on_frame(self, handler: FrameHandler) -> None:
        """Set the one receiver of frames; before `run`. Its slowness is back-pressure for that peer only."""
        self._links.on_frame(handler)

    def on_link(self, callback: ConnectionCallback) -> None:
        """Tell when a link opens (True: time to re-sync) and closes; must not block."""
        self._links.on_link(callback)

    # --- requests and streams ----------------------------------------------------------------------------------------

    async def request(self, node_id: NodeId, protocol: str, payload: bytes, *, response_size_max_bytes: int) -> bytes:
        """Ask a peer; connects to it first if need be. The timeout is the caller's.

        Raises:
          UnavailableError: it cannot be reached, does not serve the protocol, or broke off.
          DecodeError: its answer is malformed or longer than `response_size_max_bytes`.
          FormationError: what its handler raised, as the same class, with its message and hint.
        """
        await self._discovery.connect(node_id)
        return await self._requests.ask(node_id, protocol, payload, response_size_max_bytes=response_size_max_bytes)

    async def request_at(
        self, node_id: NodeId, addresses: tuple[str, ...], protocol: str, payload: bytes, *, response_size_max_bytes: int
    ) -> bytes:
        """Ask a node that is no peer of ours (of another network), at these addresses; a connection opened for that is closed.

        Raises:
          As `request`.
        """
        return await self._visits.ask(node_id, addresses, protocol, payload, response_size_max_bytes=response_size_max_bytes)

    def serve_requests(
        self, protocol: str, handler: RequestHandler, *, request_size_max_bytes: int, is_bulk: bool = False
    ) -> None:
        """Answer requests of a protocol; a FormationError that the handler raises travels to the caller.

        With `is_bulk`, questions and answers let other streams go first, as in `serve_stream`.
        """
        self._requests.serve(protocol, handler, request_size_max_bytes=request_size_max_bytes, is_bulk=is_bulk)

    async def open_stream(self, node_id: NodeId, protocol: str) -> ByteStream:
        """A new stream to a peer; connects to it first if need be. Close it with `aclose`.

        Raises:
          UnavailableError: it cannot be reached, or does not serve the protocol.
        """
        await self._discovery.connect(node_id)
        return await self._transport.open_stream(node_id, protocol)

    def serve_stream(self, protocol: str, handler: StreamHandler, *, is_bulk: bool = False) -> None:
        """Answer streams of a protocol; a stream is closed when its handler returns or raises. `is_bulk`: see Transport."""
        self._transport.serve_stream(protocol, handler, is_bulk=is_bulk)

    # --- gossip ------------------------------------------------------------------------------------------------------

    async def publish_event(self, topic: str, data: bytes) -> None:
        """Gossip to everybody on a topic; lossy, and not delivered to ourselves.

        Raises:
          UsageError: it is longer than transport.GOSSIP_SIZE_MAX_BYTES.
        """
        await self._publisher.publish_event(topic, data)

    def subscribe_topic(self, topic: str, validate: Validate, deliver: Deliver) -> None:
        """Take part in a topic; before or after `run`. Messages are validated before they are passed on."""
        self._subscriber.subscribe_topic(topic, validate, deliver)

    def unsubscribe_topic(self, topic: str) -> None:
        """Take no part in a topic any more."""
        self._subscriber.unsubscribe_topic(topic)

    def subscribers(self, topic: str) -> frozenset[NodeId]:
        """Connected peers that take part in a topic."""
        return self._transport.subscribers(topic)

    # --- Kademlia ----------------------------------------------------------------------------------------------------

    def set_reachable(self, reachable: bool | None) -> None:
        """Whether others can dial us (None: not known): where they cannot, we only ask in Kademlia."""
        self._kad.set_reachable(reachable)

    @property
    def is_kad_server(self) -> bool:
        """Whether we answer in Kademlia."""
        return self._kad.is_server

    def kad_statistics(self) -> KadStatistics:
        """What Kademlia has and did."""
        return self._kad.statistics()

    def kad_contacts(self) -> tuple[Contact, ...]:
        """Who stands in our Kademlia table."""
        return self._kad.contacts()

    def provide(self, key: bytes) -> None:
        """Tell the network from now on that we have what a key (`kad_wire.image_key`, `role_key`) stands for.

        Raises:
          UsageError: the key is empty or too long.
        """
        self._kad.provide(key)

    def stop_providing(self, key: bytes) -> None:
        """Tell it no more; others forget within hours (`kad_records.RECORD_TTL_S`)."""
        self._kad.stop_providing(key)

    async def find_providers(self, key: bytes, *, count_max: int) -> tuple[NodeId, ...]:
        """Peers that say that they have what a key stands for, as others tell. Nobody vouches for it.

        Raises:
          UsageError: the key is empty or too long.
        """
        return await self._kad.find_providers(key, count_max=count_max)

    # --- peers -------------------------------------------------------------------------------------------------------

    def on_peer(self, callback: ConnectionCallback) -> None:
        """Tell when a peer comes (first connection) and goes (last one); must not block."""
        self._peer_callbacks.append(callback)

    def peers(self) -> tuple[PeerState, ...]:
        """Known peers and connected strangers, sorted by id."""
        return self._table.states(now_s=trio.current_time())

    def add_known_peer(self, node_id: NodeId, addresses: tuple[str, ...]) -> None:
        """Keep this peer connected from now on; again: its addresses are replaced."""
        if self._table.add_known(node_id, addresses, now_s=trio.current_time()):
            self._discovery.note_known(node_id)

    def statistics(self) -> P2pStatistics:
        """Counters and gauges."""
        links, requests, gossip = self._links.counters, self._requests.counters, self._subscriber.counters
        return P2pStatistics(
            peer_connected_count=len(self._transport.connected()),
            link_count=self._links.open_count(),
            frame_sent_count=links.sent_count,
            frame_dropped_count=links.dropped_count,
            frame_received_count=links.received_count,
            frame_fault_count=links.fault_count,
            request_sent_count=requests.sent_count,
            request_served_count=requests.served_count,
            request_refused_count=requests.refused_count,
            stream_failed_count=self._transport.statistics().stream_failed_count,
            gossip_published_count=self._publisher.published_count,
            gossip_delivered_count=gossip.delivered_count,
            gossip_rejected_count=gossip.rejected_count,
            gossip_ignored_count=gossip.ignored_count,
        )

    def transport_statistics(self) -> TransportStatistics:
        """Counters and gauges of the library's side."""
        return self._transport.statistics()

    def traffic(self) -> Mapping[str, Traffic]:
        """What was sent and received, by protocol: links, gossip, and each protocol of requests."""
        links, gossip = self._links.counters, self._subscriber.counters
        return {
            LINK_PROTOCOL: Traffic(
                sent_count=links.sent_count,
                sent_bytes=links.sent_bytes,
                received_count=links.received_count,
                received_bytes=links.received_bytes,
            ),
            "gossip": Traffic(
                sent_count=self._publisher.published_count,
                sent_bytes=self._publisher.published_bytes,
                received_count=gossip.delivered_count,
                received_bytes=gossip.delivered_bytes,
            ),
            **self._requests.counters.traffic,
        }

    def sight(self) -> Sight:
        """Whom of the committee we see."""
        return self._discovery.sight()

    def report(self, node_id: NodeId, offence: Offence) -> None:
        """A peer did what no correct one does: its score falls, and below a limit it is banned for a while."""
        if self._scores.note(node_id, offence, now_s=trio.current_time()):
            _logger.warning("peer banned", peer=node_id, reason=offence.value, hint=f"formation peer unban {node_id}")
            self._kad.forget(node_id)
            self._close_soon(node_id)

    def scores(self) -> tuple[PeerScore, ...]:
        """How those peers stand that we have noted something of."""
        return self._scores.scores(now_s=trio.current_time())

    def score_of(self, node_id: NodeId) -> PeerScore:
        """How a peer stands."""
        return self._scores.score_of(node_id, now_s=trio.current_time())

    async def ban(self, node_id: NodeId) -> None:
        """Have nothing to do with a peer until `unban`, also after a restart.

        Raises:
          UsageError: it is ourselves, or too many are banned.
        """
        if node_id == self.node_id:
            raise UsageError("a node cannot ban itself", hint="formation peer list shows the others")
        try:
            self._scores.ban(node_id)
        except OverflowError as exc:
            raise UsageError(str(exc), hint="formation peer unban, or a firewall") from exc
        self._book.set_banned(self._scores.manual_bans)
        self._kad.forget(node_id)
        await self._discovery.save_book()
        await self._transport.close_peer(node_id)

    async def unban(self, node_id: NodeId) -> bool:
        """Forgive a peer: its score is 0 again; whether it was banned."""
        was_banned = self._scores.unban(node_id, now_s=trio.current_time())
        self._book.set_banned(self._scores.manual_bans)
        await self._discovery.save_book()
        return was_banned

    async def ping(self, node_id: NodeId) -> float:
        """Seconds there and back; connects to the peer first if need be. The timeout is the caller's.

        Raises:
          UnavailableError: it cannot be reached, is refused here, or does not answer.
        """
        await self._discovery.connect(node_id)
        return await ping(self._transport, node_id)

    # --- reachability ------------------------------------------------------------------------------------------------

    def reachability(self) -> Reachability:
        """Whether others can connect to this node, where, and by which relays; as found last."""
        return Reachability(verdict=Reach.UNKNOWN) if self._reach is None else self._reach.state()

    async def check_reachability(self) -> Reachability:
        """Find out now; takes a few seconds, 15 at most."""
        return self.reachability() if self._reach is None else await self._reach.check()

    def on_reachability(self, callback: Callable[[Reachability], None]) -> None:
        """Tell when the verdict, the addresses or the relays change; must not block; before `run`."""
        if self._reach is not None:
            self._reach.on_reachability(callback)

    def relay_figures(self) -> tuple[RelayBook, RelayCounters]:
        """What we keep and did for others."""
        relay = None if self._reach is None else self._reach.relay
        return (RelayBook(RelayLimits()), RelayCounters()) if relay is None else (relay.book, relay.counters)

    def punch_figures(self) -> tuple[int, int, int]:
        """Since start: relayed connections that became direct, that did not, and peers that were not dialled back."""
        if self._reach is None:
            return 0, 0, 0
        puncher = self._reach.puncher
        return puncher.punched_count, puncher.failed_count, self._reach.autonat.refused_count

    def remembered_addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Where the peer book says that it is."""
        return self._book.addresses(node_id)

    def _is_refused(self, node_id: NodeId) -> bool:
        return self._scores.refusal(node_id, now_s=trio.current_time()) is not None

    def _close_soon(self, node_id: NodeId) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._transport.close_peer, node_id)

    def _note_connection(self, node_id: NodeId, is_up: bool) -> None:
        _logger.debug("peer up" if is_up else "peer down", peer=node_id)
        self._table.set_connected(node_id, is_up, now_s=trio.current_time())
        self._presence.note(node_id, is_up)
        self._discovery.note_connection(node_id, is_up)
        self._kad.note_connection(node_id, is_up)
        for callback in self._peer_callbacks:
            callback(node_id, is_up)
