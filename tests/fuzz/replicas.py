"""A replica among liars: whatever comes, and in whatever order, it answers with effects.

Beside honest frames come edited ones, and such as the one voter that may lie has signed itself. More than f liars would
be beyond the promise, so nobody else's key signs anything new.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random

from formation.core.clock import NS_PER_MS
from formation.core.codec import encode
from formation.core.errors import DecodeError
from formation.core.event import Topic
from formation.state.catchup import Push, answer_from_memory, answer_from_store, gather, sync_round
from formation.state.effects import (
    Commit,
    CommitReady,
    Effect,
    FrameReceived,
    Input,
    RangeReceived,
    SpineReceived,
    Stage,
    Staged,
    Stored,
    Submit,
    Tick,
)
from formation.state.frames import FRAME_BLOCK, FRAME_EVIDENCE
from formation.state.lane import NO_HASH, Evidence
from formation.state.replica import Replica
from formation.state.spine_values import Kind, Vote, encode_votes, parse_final, sign_vote
from formation.state.store import MemoryDisk, MemoryStore
from formation.state.sync import (
    ANSWER_OF,
    Answer,
    Buckets,
    Frontier,
    PiecePull,
    PiecesPulled,
    Pull,
    Pulled,
    SnapshotOffer,
    SpinePulled,
    decode_answer,
    decode_request,
)
from tests.fuzz.mutations import mutate
from tests.fuzz.network import LIAR, PEER_IDS, lie, make_life, spine_frames
from tests.unit.state.replicas import KEYS, NETWORK_ID, NOW_NS, OP, make_block, make_replica, signer
from tests.wire.state_values import VALUES

EVENT_COUNT_MAX = 60
ASK_STEP_COUNT_MAX = 40
REQUESTS = ("hello", "spine pull", "frontier", "pull", "snapshot", "pieces")
ANSWERS: dict[str, type[Answer]] = {
    "buckets": Buckets,
    "spined": SpinePulled,
    "lanes": Frontier,
    "pulled": Pulled,
    "offer": SnapshotOffer,
    "pieced": PiecesPulled,
}


@cache
def honest_frames(*, with_handover: bool) -> tuple[bytes, ...]:
    """All frames of a network's life, in order, and behind them what only trouble brings forth."""
    network = make_life(with_handover=with_handover)
    final = spine_frames(network.replicas[0])
    one, other = make_block(author=LIAR), make_block(author=LIAR, at_ms=1)
    nullify = [
        bytes((Kind.NULLIFY,))
        + sign_vote(signer(KEYS[LIAR]), Kind.NULLIFY, Vote(0, view, LIAR, NO_HASH), network_id=NETWORK_ID).raw
        for view in range(1, 6)
    ]
    certificates = [parse_final(frame[1:]) for frame in final if frame[0] == Kind.FINAL]
    votes = [bytes((Kind.VOTES,)) + encode_votes(entry.votes) for entry in certificates]
    trouble = [
        FRAME_EVIDENCE + encode(Evidence(one.raw, other.raw)),
        FRAME_BLOCK + one.raw,
        FRAME_BLOCK + other.raw,
        *nullify,
        *votes,
        *final,
    ]
    return (*network.frames, *trouble)


def play(rng: Random, event_count: int = EVENT_COUNT_MAX) -> Replica:
    """A replica's life among liars; raises whatever the replica raises."""
    frames = honest_frames(with_handover=rng.random() < 0.5)
    replica = make_replica(rng.choice((0, 0, 0, 5)))
    now_ns = NOW_NS
    # What it has heard before the trouble begins.
    for frame in frames[: rng.randrange(len(frames))] if rng.random() < 0.8 else ():
        _give(replica, FrameReceived(PEER_IDS[1], frame), now_ns)
        if rng.random() < 0.3:
            _store(replica, now_ns)
    for _ in range(event_count):
        now_ns += rng.choice((0, 0, 1, 100, 5_000, -600_000)) * NS_PER_MS
        _give(replica, _any_input(rng, replica, frames), max(0, now_ns))
        if rng.random() < 0.4:
            _store(replica, max(0, now_ns))
    return replica


def serve(rng: Random, replica: Replica) -> None:
    """The replica answers a request that decodes, however odd; then it asks a peer that answers as oddly."""
    store = MemoryStore(MemoryDisk())
    store.open(NETWORK_ID)
    for name in REQUESTS:
        try:
            request = decode_request(mutate(rng, VALUES[name][1], ()) if rng.random() < 0.9 else VALUES[name][1])
        except DecodeError:
            continue
        answer = answer_from_memory(replica, request)
        if answer is None:
            assert isinstance(request, Pull | PiecePull)
            answer = answer_from_store(store, request, gather(replica, request))
        assert isinstance(decode_answer(encode(answer), ANSWER_OF[type(request)]), ANSWER_OF[type(request)])
    store.close()
    _ask(rng, replica)


def _ask(rng: Random, replica: Replica) -> None:
    asking = sync_round(replica, PEER_IDS[1], with_closed=rng.random() < 0.5)
    answer: Answer | None = None
    for _ in range(ASK_STEP_COUNT_MAX):
        try:
            step = asking.send(answer)
        except StopIteration:
            return
        answer = None
        if isinstance(step, RangeReceived | SpineReceived):
            replica.handle(step, NOW_NS)
        elif not isinstance(step, Push):
            kind = ANSWER_OF[type(step)]
            names = [name for name in ANSWERS if ANSWERS[name] is kind]
            while answer is None:
                try:
                    answer = decode_answer(mutate(rng, VALUES[rng.choice(names)][1], ()), kind)
                except DecodeError:
                    continue


def _give(replica: Replica, event: Input, now_ns: int) -> tuple[Effect, ...]:
    return replica.handle(event, now_ns)


def _store(replica: Replica, now_ns: int) -> None:
    for effect in replica.handle(CommitReady(), now_ns):
        if isinstance(effect, Stage):
            replica.handle(Staged(effect.height), now_ns)
        if isinstance(effect, Commit):
            replica.handle(Stored(effect.number), now_ns)


def _any_frame(rng: Random, frames: Sequence[bytes]) -> bytes:
    frame = rng.choice(frames)
    match rng.randrange(8):
        case 0:
            return mutate(rng, frame, frames)
        case 1:
            return frame[:1] + mutate(rng, frame[1:], frames)
        case 2 | 3 | 4:
            return lie(rng, frame)
        case 5:
            return bytes((rng.randrange(16),)) + frame[1:]
        case _:
            return frame


def _any_input(rng: Random, replica: Replica, frames: Sequence[bytes]) -> Input:
    peer = rng.choice(PEER_IDS)
    match rng.randrange(12):
        case 0:
            return Tick()
        case 1 if replica.has_room:
            return Submit(Topic.VM, (OP,))
        case 2 | 3:
            some = [_any_frame(rng, frames) for _ in range(rng.randrange(12))]
            blocks = tuple(frame[1:] for frame in some if frame[:1] not in (b"\x02", b"\x03"))
            acks = tuple(frame[1:] for frame in some if frame[:1] == b"\x02")
            return RangeReceived(peer, blocks, acks, tuple(frame[1:] for frame in some if frame[:1] == b"\x03"))
        case 4 | 5:
            return SpineReceived(peer, tuple(_any_frame(rng, frames) for _ in range(rng.randrange(8))))
    return FrameReceived(peer, _any_frame(rng, frames))
