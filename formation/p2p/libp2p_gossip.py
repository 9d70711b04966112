"""Gossip on libp2p 0.8.1: Pubsub with our own way in, and GossipSub with the defaults that it needs.

The library's way in has three faults that this one does not share: a message with a malformed key or a validator
that raises ends the process; every message costs a task; a subscriber that is slow for a moment loses messages.
Here a message is checked in this order, cheapest first, and in the stream's own task, which is back-pressure:
form, seen before, signature, verdict. It is marked as seen only once its signature holds, so that nobody can make us
deaf for another's messages.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import trio
from google.protobuf.message import DecodeError as ProtobufDecodeError
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID, PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.mcache import MessageCache
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.utils import maybe_consume_signed_record, safe_bytes_from_hex
from libp2p.tools.anyio_service import background_trio_service

from formation.core.codec import verify_ed25519
from formation.core.errors import DecodeError, UnavailableError, UsageError
from formation.core.ids import NodeId, public_key_of_node
from formation.p2p.libp2p_control import bounded_control
from formation.p2p.score import Offence
from formation.p2p.seen import Seen
from formation.p2p.transport import GOSSIP_SIZE_MAX_BYTES, OffenceCallback, Verdict

SEEN_TTL_S = 120
SEQNO_SIZE_BYTES = 8
TOPIC_LENGTH_MAX = 200
# Mesh degree as in the GossipSub 1.1 paper's defaults; the upper bound stands above any number of connections that we
# hold, because 0.8.1 prunes whole meshes at once when it is crossed.
DEGREE, DEGREE_LOW, DEGREE_HIGH = 8, 6, 1024
RPC_SIZE_MAX_BYTES = 1 << 20
READ_SIZE_BYTES = 64 * 1024
CLOSE_TIMEOUT_S = 1.0
# The last 5 heartbeats' messages, for who missed one: at full speed of small ones a tenth of this.
CACHE_SIZE_MAX_BYTES = 64 * 1024 * 1024
# Bad messages on one stream: a correct peer passes on none, but another version may call good what we do not.
BAD_COUNT_MAX = 64
# Messages, 0.1 to 0.2 ms of checking each, after which other peers have their turn.
TURN_COUNT = 16
_VARINT_SIZE_MAX_BYTES = 5
_SIGNING_PREFIX = b"libp2p-pubsub:"
# protobuf PublicKey{Type: Ed25519, Data: 32 bytes}
_KEY_PREFIX = bytes.fromhex("08011220")

_logger = logging.getLogger(__name__)

OnMessage = Callable[[str, NodeId, bytes], Verdict]
"""(topic, author, data) -> verdict; an ACCEPTed message is delivered by the time it returns."""


class _BoundedCache(MessageCache):  # type: ignore[misc] # the library is untyped here
    """Messages that can be asked for again; once it is full, those that come are passed on and not kept."""

    def __init__(self, window_size: int, history_size: int) -> None:
        super().__init__(window_size, history_size)
        self.size_bytes = 0

    def put(self, msg: Any) -> None:
        """Keep a message, if there is room."""
        size_bytes = msg.ByteSize()
        if self.size_bytes + size_bytes <= CACHE_SIZE_MAX_BYTES and msg.from_id + msg.seqno not in self.msgs:
            self.size_bytes += size_bytes
            super().put(msg)

    def shift(self) -> None:
        """A heartbeat has passed."""
        super().shift()
        self.size_bytes = sum(msg.ByteSize() for msg in self.msgs.values())


class _Forgetful(dict[str, Any]):
    """In place of a table that only grows: one float per message, for statistics that are switched off."""

    def __missing__(self, key: str) -> deque[float]:
        return deque(maxlen=0)


def make_gossipsub() -> Any:
    """A GossipSub router whose defaults do not throw messages away; each was shown to be needed."""
    router = GossipSub(
        [PROTOCOL_ID_V11, PROTOCOL_ID],
        degree=DEGREE,
        degree_low=DEGREE_LOW,
        degree_high=DEGREE_HIGH,
        heartbeat_interval=1,  # 120: no repair for minutes
        adaptive_gossip_enabled=False,  # calls a small mesh unhealthy and slows the heartbeat to 30 s
        spam_protection_enabled=False,  # 10 messages per second and peer
        eclipse_protection_enabled=False,  # wants many networks: a LAN is one
        prune_back_off=10,
        pending_messages_ttl=0.0,  # queues each message for each peer that is not on the topic
    )
    router.mcache = _BoundedCache(router.mcache.window_size, router.mcache.history_size)
    router.recent_message_deliveries = _Forgetful()
    router._check_equivocation = lambda message: True  # keeps up to 1000 whole messages; lanes detect equivocation
    return router


class Gossip(Pubsub):  # type: ignore[misc] # the library is untyped here
    """Pubsub that hands each valid message to one function, synchronously."""

    def __init__(self, host: Any, router: Any, on_message: OnMessage, on_offence: OffenceCallback) -> None:
        super().__init__(host, router, strict_signing=True, seen_ttl=SEEN_TTL_S, max_inbound_rpc_size=RPC_SIZE_MAX_BYTES)
        # The default, seconds, repeats sequence numbers after a restart: peers would take new messages for seen ones.
        self.counter = time.time_ns()
        self._on_message = on_message
        self._on_offence = on_offence
        self._inbound: set[Any] = set()
        # The library's grows with what anybody sends, and has a thread.
        self.__dict__.pop("seen_messages").stop()
        self.seen_messages = Seen(SEEN_TTL_S, now_s=time.monotonic)
        self.malformed_count = 0
        self.bad_signature_count = 0
        self.duplicate_count = 0

    def announce_again(self) -> None:
        """Tell every peer our topics once more, and open a stream to those that have none.

        Symptom: one-way silence, for ever, after a peer came back from another address or a stream failed to open.
        Cause: subscriptions are sent once, and forgotten with the stream that brought them; opening is tried again
        after some errors only. Cure: now and then, do both again.
        """
        for queue in list(self.peer_queues.values()):
            queue.push(self.get_hello_packet())
        for peer_id in list(self.host.get_network().connections):
            if peer_id not in self.peers:
                self._schedule_peer_stream_retry(peer_id)

    async def reset_streams(self) -> None:
        """End all gossip streams, so that peers open theirs anew to the Gossip that comes after this one."""
        for stream in [*self.peers.values(), *self._inbound]:
            await stream.reset()

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        """Take a message from a peer, or from ourselves, and pass it on if it is good."""
        if msg_forwarder == self.my_id:
            self._mark_msg_seen(msg)
            await self.router.publish(msg_forwarder, msg)
        else:
            await self._take(msg_forwarder, msg)

    async def _take(self, forwarder: ID, msg: Any) -> bool:
        """Take a message from a peer; False if no correct peer would have passed it on."""
        try:
            topic, author, public_key = _parse_message(msg)
        except (DecodeError, UsageError) as exc:
            # No offence of the forwarder's: a correct one of another kind may pass on what only we do not understand.
            self.malformed_count += 1
            _logger.debug("malformed message via %s: %s", forwarder, exc)
            return False
        if author == self.my_id.to_base58() or topic not in self.topic_ids:
            return True
        if self._is_msg_seen(msg):
            self.duplicate_count += 1
            return True
        if not verify_ed25519(public_key, signed_part(msg), msg.signature):
            # Correct peers of any kind check it before they pass a message on.
            self.bad_signature_count += 1
            self._on_offence(NodeId(forwarder.to_base58()), Offence.BAD_SIGNATURE)
            _logger.debug("bad signature via %s", forwarder)
            return False
        self._mark_msg_seen(msg)
        if self._on_message(topic, author, msg.data) is Verdict.ACCEPT:
            await self.router.publish(forwarder, msg)
        return True

    async def continuously_read_stream(self, stream: Any) -> None:
        """Read RPCs until the stream ends; anything malformed resets the stream, and only that."""
        peer_id = stream.muxed_conn.peer_id
        buffer = bytearray()
        self._inbound.add(stream)
        try:
            while self.manager.is_running:
                for raw in take_rpcs(buffer):
                    await self._handle_rpc(peer_id, rpc_pb2.RPC.FromString(raw), stream)
                    # Reading does not wait while there is something to read.
                    await trio.lowlevel.checkpoint()
                buffer += await stream.read(READ_SIZE_BYTES)
            # This Gossip has ended: the peer must not take the stream for one that is read.
            await stream.reset()
        except StreamEOF:
            return
        except (DecodeError, ProtobufDecodeError) as exc:
            _logger.debug("malformed gossip of %s: %s", peer_id, exc)
            self._on_offence(NodeId(peer_id.to_base58()), Offence.MALFORMED)
            await stream.reset()
            self._handle_dead_peer(peer_id)
        except Exception as exc:  # noqa: BLE001 - supervision boundary: protobuf, router and stream raise all kinds
            _logger.debug("gossip stream of %s ended: %r", peer_id, exc)
            await stream.reset()
            self._handle_dead_peer(peer_id)
        finally:
            self._inbound.discard(stream)

    async def _handle_rpc(self, peer_id: ID, rpc: Any, stream: Any) -> None:
        if rpc.HasField("senderRecord") and stream.__dict__.get("_sender_record") != rpc.senderRecord:
            if not maybe_consume_signed_record(rpc, self.host, peer_id):
                # Or an older one than we have, which a peer whose clock was set back sends in good faith.
                raise UnavailableError("peer record refused")
            stream.__dict__["_sender_record"] = rpc.senderRecord
        if len(rpc.subscriptions) <= self.max_subscriptions_per_rpc:
            for subscription in rpc.subscriptions:
                if len(subscription.topicid) <= TOPIC_LENGTH_MAX:
                    self.handle_subscription(peer_id, subscription)
        for index, message in enumerate(rpc.publish):
            if not await self._take(peer_id, message):
                self._note_bad(stream)
            if index % TURN_COUNT == TURN_COUNT - 1:
                await trio.lowlevel.checkpoint()
        if rpc.HasField("control"):
            control = bounded_control(rpc.control, self.topic_ids, self._kept_size)
            await self.router.handle_rpc(rpc_pb2.RPC(control=control), peer_id)

    def _note_bad(self, stream: Any) -> None:
        count = stream.__dict__["_bad_count"] = stream.__dict__.get("_bad_count", 0) + 1
        if count > BAD_COUNT_MAX:
            raise DecodeError(f"{count} bad messages on one stream")

    def _kept_size(self, message_id: Any) -> int:
        key = safe_bytes_from_hex(message_id)
        message = None if key is None else self.router.mcache.get(key)
        return 0 if message is None else message.ByteSize()


@asynccontextmanager
async def running_gossip(
    host: Any, on_message: OnMessage, on_offence: OffenceCallback, topics: Iterable[str]
) -> AsyncIterator[Gossip]:
    """Gossip on a host, for as long as the block runs; finds the peers that are connected already."""
    network = host.get_network()
    notifees = list(network.notifees)
    router = make_gossipsub()
    gossip = Gossip(host, router, on_message, on_offence)
    try:
        async with background_trio_service(gossip), background_trio_service(router):
            await gossip.wait_until_ready()
            for topic in list(topics):
                await gossip.subscribe(topic)
            for peer_id in list(network.connections):
                gossip.manager.run_task(gossip._handle_new_peer_with_retry, peer_id)
            yield gossip
    finally:
        with trio.move_on_after(CLOSE_TIMEOUT_S) as scope:
            scope.shield = True
            await gossip.reset_streams()
        # Its notifee would block every new connection once nobody reads the other end.
        network.notifees[:] = [n for n in network.notifees if n in notifees or not type(n).__name__.startswith("Pubsub")]


def take_rpcs(buffer: bytearray) -> list[bytes]:
    """Cut the complete RPCs, each with a varint of its size before it, off a buffer.

    Raises:
      DecodeError: a size that is not a varint of 5 bytes at most, or above RPC_SIZE_MAX_BYTES.
    """
    rpcs: list[bytes] = []
    while True:
        size, start = 0, 0
        for index, byte in enumerate(buffer[:_VARINT_SIZE_MAX_BYTES]):
            size |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                start = index + 1
                break
        else:
            if len(buffer) >= _VARINT_SIZE_MAX_BYTES:
                raise DecodeError("gossip RPC with an overlong size")
            return rpcs
        if size > RPC_SIZE_MAX_BYTES:
            raise DecodeError(f"gossip RPC of {size} bytes")
        if len(buffer) < start + size:
            return rpcs
        rpcs.append(bytes(buffer[start : start + size]))
        del buffer[: start + size]


def _parse_message(message: Any) -> tuple[str, NodeId, bytes]:
    """Topic, author and the author's 32-byte public key.

    Raises:
      DecodeError: not a message of the one form that we send: one topic, an Ed25519 author, its own key or none.
      UsageError: the author is not the PeerId of an Ed25519 key.
    """
    if len(message.topicIDs) != 1 or len(message.data) > GOSSIP_SIZE_MAX_BYTES or len(message.seqno) != SEQNO_SIZE_BYTES:
        raise DecodeError("message with several topics, an odd sequence number or too much data")
    author = NodeId(ID(message.from_id).to_base58())
    public_key = public_key_of_node(author)
    if message.key not in (b"", _KEY_PREFIX + public_key):
        raise DecodeError("message with another's key")
    return message.topicIDs[0], author, public_key


def signed_part(message: Any) -> bytes:
    """The bytes that a message's signature covers (libp2p pubsub specification, "Message Signing")."""
    bare = rpc_pb2.Message(data=message.data, topicIDs=message.topicIDs, from_id=message.from_id, seqno=message.seqno)
    return _SIGNING_PREFIX + bytes(bare.SerializeToString())
