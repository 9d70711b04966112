"""Corrections to libp2p 0.8.1, applied once, before the first host is made.

Each patch says its symptom, the cause in the library and our cure. They replace private methods, so they hold for
exactly one version: `apply_patches` refuses any other. To move to a newer one: run the tests marked `net` without
`apply_patches`; a patch whose symptom test passes then is no longer needed.

What is cured by other means: streams by a muxer of our own (`libp2p_muxer`), gossip messages in `libp2p_gossip` (a
subclass), dialling in `libp2p_host` (it avoids `dial_peer`, with its 250 ms wait, one address per transport and 60 s of
silence after a failure).
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

import trio
from libp2p.exceptions import ParseError
from libp2p.host.basic_host import BasicHost
from libp2p.io.exceptions import ConnectionClosedError, MessageTooLarge
from libp2p.io.trio import TrioTCPStream
from libp2p.network import swarm
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.protocol_muxer import multiselect_communicator
from libp2p.pubsub import gossipsub, pubsub, rpc_queue
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer import muxer_multistream
from libp2p.tools.anyio_service.trio_manager import TrioManager
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from formation.core.errors import HostError
from formation.p2p.libp2p_admission import admitting, handle_inbound_connection
from formation.p2p.libp2p_muxer import Muxer
from formation.p2p.libp2p_pnet import ProtectedConnection

LIBP2P_VERSION = "0.8.1"

IDENTIFY_TIMEOUT_S = 15.0
# Outbound gossip RPCs waiting for one peer; the library's 32 lost a third of the messages at 50 per second.
GOSSIP_QUEUE_COUNT_MAX = 4096
# And their bytes: a peer that does not read would have us keep 4096 times 512 KiB.
GOSSIP_QUEUE_SIZE_MAX_BYTES = 8 * 1024 * 1024
# One message of protocol negotiation, as in js-libp2p; ours are shorter than 50.
NEGOTIATION_SIZE_MAX_BYTES = 1024
READ_SIZE_BYTES = 256 * 1024

_logger = logging.getLogger(__name__)
_applied = False


def apply_patches() -> None:
    """Patch the library; again is harmless.

    Raises:
      HostError: another version of libp2p is installed.
    """
    global _applied
    check_version(importlib.metadata.version("libp2p"))
    if _applied:
        return
    _patch_connections()
    # It would make its own Yamux, whatever class it is told of.
    muxer_multistream.Yamux = Muxer
    swarm.new_protected_conn = ProtectedConnection
    _patch_gossip()
    _applied = True


def check_version(version: str) -> None:
    """Refuse a version that the patches were not made for.

    Raises:
      HostError: it is not LIBP2P_VERSION.
    """
    if version != LIBP2P_VERSION:
        raise HostError(
            f"libp2p {version} is installed, formation works with {LIBP2P_VERSION} only",
            hint=f"pip install libp2p=={LIBP2P_VERSION}",
        )


# --- connections -----------------------------------------------------------------------------------------------------


def _patch_connections() -> None:
    Swarm._handle_inbound_connection = handle_inbound_connection
    Swarm.add_conn = admitting(Swarm.add_conn)
    multiselect_communicator.read_delim = _read_delim
    SwarmConn._handle_muxed_stream = _guard_stream_handler(SwarmConn._handle_muxed_stream)
    TrioManager._find_parent_task = _find_no_parent_task
    TrioTCPStream.read = _read_tcp
    BasicHost._identify_task_entry = _guard_identify(BasicHost._identify_task_entry)


def _guard_stream_handler(handle: Any) -> Any:
    """Symptom: garbage on a new stream (bad UTF-8 in multistream, a malformed gossip RPC) ends the process.

    Cause: an exception in a stream's handler travels up to the swarm's nursery. Cure: it resets that stream.
    Streams beyond a connection's share are reset unread, too.
    """

    async def handle_guarded(self: Any, stream: Any) -> None:
        admission = self.swarm.admission
        if not admission.may_open(len(self.streams)):
            await stream.reset()
            return
        admission.stream_count += 1
        try:
            await handle(self, stream)
        except Exception as exc:  # noqa: BLE001 - supervision boundary of one stream
            _logger.debug("stream of %s failed: %r", self.muxed_conn.peer_id, exc)
            with trio.move_on_after(1) as scope:
                scope.shield = True
                try:
                    await stream.reset()
                except Exception as reset_exc:  # noqa: BLE001 - its connection is gone
                    _logger.debug("reset failed: %r", reset_exc)
        finally:
            admission.stream_count -= 1

    return handle_guarded


def _guard_identify(identify: Any) -> Any:
    """Symptom: whatever identify fails to catch ends the process, and at once.

    Cause: it runs as a system task of trio. Cure: it is caught, and bounded in time.
    """

    async def identify_guarded(self: Any, peer_id: Any, reason: str) -> None:
        try:
            with trio.move_on_after(IDENTIFY_TIMEOUT_S):
                await identify(self, peer_id, reason)
        except Exception as exc:  # noqa: BLE001 - supervision boundary: identify only gives hints
            _logger.debug("identify of %s failed: %r", peer_id, exc)

    return identify_guarded


def _find_no_parent_task(self: Any, task: Any) -> None:
    """Symptom: cost per gossip message grows with the number of living tasks.

    Cause: `run_task` searches them all for its parent, for statistics. Cure: every task is a root task.
    """


async def _read_delim(reader: Any) -> bytes:
    """Symptom: 26 MB of memory for each connection or stream that is negotiating, to anybody who asks.

    Cause: a message of multistream-select may claim any size. Cure: NEGOTIATION_SIZE_MAX_BYTES.
    """
    try:
        data = await read_varint_prefixed_bytes_limited(reader, NEGOTIATION_SIZE_MAX_BYTES)
    except (MessageTooLarge, ValueError) as exc:
        raise ParseError(f"a negotiation message: {exc}") from exc
    if data[-1:] != b"\n":
        raise ParseError("a negotiation message without its end")
    return bytes(data[:-1])


async def _read_tcp(self: Any, n: int | None = None) -> bytes:
    """Symptom: two system calls per Noise message. Cause: it reads 2 bytes of length, then the body. Cure: a buffer."""
    if n == 0:
        return b""
    async with self.read_lock:
        buffer: bytes = self.__dict__.get("_unread", b"")
        start: int = self.__dict__.get("_unread_start", 0)
        if start >= len(buffer):
            try:
                buffer, start = await self.stream.receive_some(READ_SIZE_BYTES), 0
            except trio.BrokenResourceError as exc:
                raise ConnectionClosedError(f"TCP connection reset: {exc}", transport="tcp") from exc
            except trio.ClosedResourceError:
                return b""
        end = len(buffer) if n is None else min(len(buffer), start + n)
        self._unread, self._unread_start = (buffer, end) if end < len(buffer) else (b"", 0)
        return buffer[start:end]


# --- gossip ---------------------------------------------------------------------------------------------------------


class LongQueue(rpc_queue.RpcQueue):  # type: ignore[misc] # the library is untyped here
    """Symptom: bursts are lost. Cause: 32 RPCs per peer. Cure: GOSSIP_QUEUE_COUNT_MAX, and a limit in bytes."""

    def __init__(self) -> None:
        super().__init__(max_size=GOSSIP_QUEUE_COUNT_MAX)
        self.size_bytes = 0

    def push(self, rpc: Any, priority: bool = False) -> bool:
        """Take an RPC, unless it is full."""
        size_bytes = rpc.ByteSize()
        if self.size_bytes + size_bytes > GOSSIP_QUEUE_SIZE_MAX_BYTES or not super().push(rpc, priority):
            return False
        self.size_bytes += size_bytes
        return True

    async def pop(self) -> Any:
        """The next RPC; None once it is closed."""
        rpc = await super().pop()
        if rpc is not None:
            self.size_bytes -= rpc.ByteSize()
        return rpc


class _NoPubsub:
    """Symptom: a signed address record is built for and checked from every RPC.

    Cause: gossipsub attaches it if `isinstance(pubsub, Pubsub)`. Cure: its name stands for this class; the first RPC
    on a stream, made by pubsub itself, still carries the record.
    """


def _patch_gossip() -> None:
    pubsub.RpcQueue = LongQueue
    gossipsub.Pubsub = _NoPubsub
    gossipsub.GossipSub._emit_control_msgs = _emit_control_msgs


async def _emit_control_msgs(self: Any, to_graft: Any, to_prune: Any, to_gossip: Any) -> None:
    """Symptom: asymmetric meshes with several topics. Cause: one peer's GRAFTs are sent to the next, too. Cure: apart."""
    for peer in {*to_graft, *to_prune, *to_gossip}:
        ihaves = [rpc_pb2.ControlIHave(messageIDs=ids, topicID=topic) for topic, ids in to_gossip.get(peer, {}).items()]
        grafts = [rpc_pb2.ControlGraft(topicID=topic) for topic in to_graft.get(peer, ())]
        prunes = [rpc_pb2.ControlPrune(topicID=topic, backoff=self.prune_back_off) for topic in to_prune.get(peer, ())]
        await self.emit_control_message(self.pack_control_msgs(ihaves, grafts, prunes), peer)
