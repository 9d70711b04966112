"""Replicas with cheap keys, and what a test gives them: blocks, acks, frames, commits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from formation.core.clock import NS_PER_MS
from formation.core.codec import Context, Sign, encode, sha256, signed_bytes
from formation.core.event import Event, Seat, VmClaimed
from formation.core.ids import NetworkId, NodeId, node_id_of
from formation.core.intent import Intent, SignedIntent, sign_intent
from formation.core.manifest import FORMAT, Genesis, Signature, SignedGenesis, Voter
from formation.state.ack import Ack, parse_ack, sign_ack
from formation.state.effects import (
    Commit,
    CommitReady,
    Effect,
    Fault,
    FrameReceived,
    Input,
    Notify,
    Send,
    Stage,
    Staged,
    Stored,
    Submit,
    Tick,
    WakeAt,
)
from formation.state.feed import Change
from formation.state.frames import FRAME_ACK
from formation.state.lane import NO_HASH, Block, Entry, Head, LaneId, SpineRef, lane_id, make_incarnation, sign_block
from formation.state.op import PlainOp, event_op
from formation.state.replica import Replica, ReplicaConfig

NETWORK_ID = NetworkId(b"n" * 32)
NOW_MS = 1_800_000_000_000
NOW_NS = NOW_MS * NS_PER_MS
PEER = NodeId("peer")
VM_ID = "vm-" + "a" * 16
OP = event_op(VmClaimed(why="x", ttl_ms=30_000), VM_ID)


def key_of(name: str) -> bytes:
    """A public key, which is its own secret key."""
    return hashlib.sha256(name.encode()).digest()


KEYS = tuple(key_of(f"node {i}") for i in range(7))
USERS = tuple(key_of(f"user {i}") for i in range(2))


def signer(key: bytes) -> Sign:
    return lambda message: hashlib.sha512(key + message).digest()


def verify(key: bytes, message: bytes, signature: bytes) -> bool:
    return hashlib.sha512(key + message).digest() == signature


def make_manifest(*keys: bytes, name: str = "other") -> bytes:
    """CBOR of a manifest of these founders, signed in the way of these keys; there must be 3f+1."""
    founders = tuple(Voter(f"v{i}", key, ("/ip4/192.0.2.9/tcp/1",)) for i, key in enumerate(keys))
    genesis = Genesis(FORMAT, name, NOW_MS, founders)
    message = signed_bytes(Context.MANIFEST, network_id=NetworkId(sha256(encode(genesis))), payload=encode(genesis))
    return encode(SignedGenesis(genesis, tuple(Signature(key, signer(key)(message)) for key in keys)))


def seats(count: int = 4) -> tuple[Seat, ...]:
    return tuple(Seat(f"n{i}", key, ("/ip4/192.0.2.1/tcp/1",)) for i, key in enumerate(KEYS[:count]))


def make_replica(index: int = 0, *, voter_count: int = 4) -> Replica:
    """A replica of this node after a start with an empty store."""
    config = ReplicaConfig(network_id=NETWORK_ID, founders=seats(voter_count), public_key=KEYS[index])
    replica = Replica(config, sign=signer(KEYS[index]), verify=verify)
    replica.finish_recovery()
    replica.open_lane(NOW_NS, 1)
    return replica


def make_wish(event: Event, object_id: str = "", *, user: int = 0, at_ms: int = 0, nonce: int = 0) -> SignedIntent:
    """An account's signed intent."""
    key = USERS[user]
    from formation.core.event import event_body

    intent = Intent(
        account=key,
        verb=event.verb,
        object_id=object_id,
        body=event_body(event),
        nonce=nonce.to_bytes(16, "big"),
        created_ms=NOW_MS + at_ms,
        expires_ms=NOW_MS + at_ms + 60_000,
        key=key,
    )
    return sign_intent(signer(key), intent, network_id=NETWORK_ID)


def make_block(
    *,
    author: int = 1,
    seq: int = 1,
    prev: bytes = NO_HASH,
    at_ms: int = 0,
    incarnation: int = 1,
    deps: tuple[Head, ...] = (),
    kind: str = "vm",
    ops: Sequence[PlainOp] = (OP,),
    signed_by: int | None = None,
) -> Entry:
    """A signed block of one of the nodes; its incarnation is that many milliseconds of HLC."""
    block = Block(
        lane=lane_id(KEYS[author], make_incarnation(incarnation << 16, 0)),
        seq=seq,
        prev=prev,
        hlc=((NOW_MS + at_ms) << 16) + seq,
        spine_ref=SpineRef(0, NETWORK_ID),
        deps=deps,
        kind=kind,
        ops=tuple(ops),
    )
    return sign_block(signer(KEYS[author if signed_by is None else signed_by]), block, network_id=NETWORK_ID)


def make_chain(count: int, **kind: Any) -> list[Entry]:
    """Blocks that follow one another."""
    chain: list[Entry] = []
    for seq in range(1, count + 1):
        chain.append(make_block(seq=seq, prev=chain[-1].hash if chain else NO_HASH, **kind))
    return chain


def head_of(entry: Entry) -> Head:
    return Head(entry.block.lane, entry.block.seq, entry.hash)


def make_ack(voter: int, *entries: Entry, n: int = 1, epoch: int = 0) -> bytes:
    """COSE_Sign1 of a voter's ack of these blocks."""
    value = Ack(epoch=epoch, voter=voter, n=n, heads=tuple(map(head_of, entries)))
    return sign_ack(signer(KEYS[voter]), value, network_id=NETWORK_ID).raw


def take(replica: Replica, frame: bytes, now_ns: int = NOW_NS) -> tuple[Effect, ...]:
    return replica.handle(FrameReceived(PEER, frame), now_ns)


def commit(replica: Replica, now_ns: int = NOW_NS) -> tuple[Effect, ...]:
    """One whole commit: what came out when it was stored."""
    for effect in replica.handle(CommitReady(), now_ns):
        if isinstance(effect, Stage):
            replica.handle(Staged(effect.height), now_ns)
        if isinstance(effect, Commit):
            return replica.handle(Stored(effect.number), now_ns)
    return ()


def settle(replica: Replica, now_ns: int = NOW_NS) -> tuple[Effect, ...]:
    """Commits until there is nothing to commit; what came out."""
    out: list[Effect] = []
    while replica.needs_commit:
        out.extend(commit(replica, now_ns))
    return tuple(out)


def run(replica: Replica, event: Input, now_ns: int = NOW_NS) -> tuple[Effect, ...]:
    """An input, then commits and due timers until all is quiet."""
    out = list(replica.handle(event, now_ns))
    while True:
        more = [*settle(replica, now_ns)]
        wakes = [e.at_ns for e in (*out, *more) if isinstance(e, WakeAt) and e.at_ns <= now_ns]
        if wakes:
            more += replica.handle(Tick(), now_ns)
        out += more
        if not replica.needs_commit:
            return tuple(out)


def submit(replica: Replica, kind: Any, ops: Iterable[PlainOp], now_ns: int = NOW_NS) -> tuple[Effect, ...]:
    return run(replica, Submit(kind, tuple(ops)), now_ns)


def acked(effects: Iterable[Effect]) -> list[tuple[bytes, int]]:
    """(lane, number) of every head in the acks that were sent."""
    frames = [e.frame for e in effects if isinstance(e, Send) and e.frame[:1] == FRAME_ACK]
    return [(h.lane, h.seq) for frame in frames for h in parse_ack(frame[1:]).ack.heads]


def faults(effects: Iterable[Effect]) -> list[str]:
    return [e.reason for e in effects if isinstance(e, Fault)]


def changes(replica: Replica, effects: Iterable[Effect]) -> list[Change]:
    """What the feed was told."""
    return [c for e in effects if isinstance(e, Notify) for row in e.rows for c in replica.expand(row)]


def lane_of(replica: Replica, entry: Entry) -> Any:
    return replica.lanes.get(LaneId(entry.block.lane))


def node_id(index: int) -> NodeId:
    return node_id_of(KEYS[index])
