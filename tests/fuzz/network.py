"""A network of whole replicas with cheap keys, all frames of which are kept: what mutations of frames begin with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from random import Random
from typing import Any

from formation.core.clock import NS_PER_MS
from formation.core.codec import Context, decode, encode_plain, parse_signed, sha256, sign_value
from formation.core.errors import DecodeError
from formation.core.event import (
    ClaimMade,
    CommitteeProposed,
    NodeAdmitted,
    OpClass,
    Topic,
    ValueCounted,
    ValuePut,
    VmClaimed,
    VmReady,
    VmRequested,
)
from formation.core.ids import NodeId, account_id_of, node_id_of
from formation.state import sync
from formation.state.catchup import answer_from_memory
from formation.state.effects import (
    Commit,
    CommitReady,
    Effect,
    FrameReceived,
    Input,
    Send,
    SendTo,
    Stage,
    Staged,
    Stored,
    Submit,
    Tick,
    WakeAt,
)
from formation.state.frames import FRAME_BLOCK
from formation.state.judge import object_id_of
from formation.state.op import PlainOp, event_op, intent_op
from formation.state.replica import Replica
from formation.state.spine_values import Kind, LedProposal
from tests.fuzz.mutations import edit_value
from tests.unit.state.replicas import KEYS, NETWORK_ID, NOW_NS, USERS, make_replica, make_wish, seats, signer

LIAR = 3
"""The voter whose key signs whatever the tests like: f = 1."""
STEP_NS = 20 * NS_PER_MS
REQUEST = VmRequested(name="web", image="sha256:" + "0" * 64, image_name="hello", vcpus=1, memory_mib=256, disk_gib=1)
CONTEXTS = {
    1: Context.BLOCK,
    2: Context.ACK,
    4: Context.PROPOSAL,
    5: Context.NOTARIZE,
    6: Context.NULLIFY,
    7: Context.FINALIZE,
    8: Context.FREEZE,
}
"""Kind byte of a frame → what its value is signed as."""


class Network:
    """Four replicas; frames arrive at once and in order. Time goes on by `step`."""

    def __init__(self) -> None:
        self.replicas = [make_replica(index) for index in range(4)]
        self.now_ns = NOW_NS
        self.frames: list[bytes] = []
        self._queue: deque[tuple[int, Input]] = deque()
        self._ids = [node_id_of(key) for key in KEYS[:4]]

    def handle(self, index: int, event: Input) -> None:
        """Give one replica an input and do what it wants."""
        for effect in self.replicas[index].handle(event, self.now_ns):
            self._do(index, effect)

    def _do(self, index: int, effect: Effect) -> None:
        match effect:
            case Send(frame):
                self.frames.append(frame)
                self._queue.extend((peer, FrameReceived(self._ids[index], frame)) for peer in range(4) if peer != index)
            case SendTo(node_id, frames):
                self.frames.extend(frames)
                self._queue.extend((self._ids.index(node_id), FrameReceived(self._ids[index], frame)) for frame in frames)
            case Stage(height, _):
                self._queue.append((index, Staged(height)))
            case Commit(number):
                self._queue.append((index, Stored(number)))
            case _:
                pass

    def settle(self) -> None:
        """Until nothing moves without time."""
        while True:
            while self._queue:
                self.handle(*self._queue.popleft())
            for index, replica in enumerate(self.replicas):
                if replica.needs_commit:
                    self.handle(index, CommitReady())
            if not self._queue:
                return

    def step(self, count: int = 1) -> None:
        """Let time go on."""
        for _ in range(count):
            self.now_ns += STEP_NS
            for index in range(4):
                self.handle(index, Tick())
            self.settle()

    def submit(self, index: int, kind: Topic, *ops: PlainOp) -> None:
        """A block of one replica, and all that follows."""
        if self.replicas[index].has_room:
            self.handle(index, Submit(kind, ops))
        self.settle()


def make_life(*, with_handover: bool) -> Network:
    """A network that has seen one of everything: VMs, values, claims, an admission; with a change of the committee."""
    network = Network()
    wish = make_wish(REQUEST)
    vm_id = object_id_of(wish)
    network.submit(0, Topic.VM, intent_op(wish, vm_id, op_class=OpClass.COMMUTATIVE))
    network.submit(1, Topic.VM, event_op(VmClaimed(why="free", ttl_ms=30_000), vm_id))
    network.step(2)
    status = VmReady(trace_id="0" * 16, generation=1, address="192.0.2.1", ports=(), boot_ms=1)
    network.submit(1, Topic.VM, event_op(status, vm_id))
    name = f"{account_id_of(USERS[0])}/k"
    for nonce, event in enumerate((ValuePut(value=b"v"), ValueCounted(delta=2)), start=1):
        network.submit(2, Topic.VALUE, intent_op(make_wish(event, name, nonce=nonce), name, op_class=OpClass.COMMUTATIVE))
    network.submit(LIAR, Topic.CLAIM, event_op(ClaimMade(ttl_ms=10_000), f"node/{node_id_of(KEYS[LIAR])}"))
    network.submit(0, Topic.COMMITTEE, event_op(NodeAdmitted(), node_id_of(KEYS[5])))
    network.step(3)
    if with_handover:
        change = event_op(CommitteeProposed(voters=(*seats(3), seats(5)[4])), "epoch/1")
        for index in range(3):
            network.submit(index, Topic.COMMITTEE, change)
        network.step(5)
    return network


def spine_frames(replica: Replica) -> tuple[bytes, ...]:
    """What it would answer to one who asks for its spine from the beginning."""
    answer = answer_from_memory(replica, sync.SpinePull(0, 0, 0))
    return answer.frames if isinstance(answer, sync.SpinePulled) else ()


def lie(rng: Random, frame: bytes) -> bytes:
    """The frame with its value changed and signed anew by the liar, as far as its kind is signed."""
    kind = frame[0] if frame else 0
    context = CONTEXTS.get(kind)
    if context is None:
        return frame
    try:
        payload = decode(frame[1:], LedProposal).content if kind == Kind.PROPOSAL else parse_signed(frame[1:]).payload
        value: Any = decode(payload, list)
        for _ in range(rng.choice((1, 1, 2))):
            value = edit_value(rng, value)
        if rng.random() < 0.7:
            value = _as_liar(kind, value)
    except DecodeError:
        return frame
    payload = encode_plain(value)
    numbers = [v if type(v) is int else 0 for v in (value[:2] if isinstance(value, list) else ())] + [0, 0]
    epoch, content = numbers[0], payload
    if kind == Kind.PROPOSAL:
        payload = encode_plain([epoch, numbers[1], sha256(content)])
    signed = sign_value(
        signer(KEYS[LIAR]),
        context,
        network_id=NETWORK_ID,
        payload=payload,
        epoch=None if context is Context.BLOCK else max(0, min(epoch, (1 << 64) - 1)),
    )
    return frame[:1] + (encode_plain([content, signed.raw]) if kind == Kind.PROPOSAL else signed.raw)


def _as_liar(kind: int, value: list[object]) -> list[object]:
    """The same in the liar's own name, so that its signature holds."""
    match kind, value:
        case 1, [bytes(lane), *rest]:
            return [KEYS[LIAR] + lane[32:], *rest]
        case 2 | 8, [epoch, _, *rest]:
            return [epoch, LIAR, *rest]
        case 5 | 6 | 7, [epoch, view, _, *rest]:
            return [epoch, view, LIAR, *rest]
        case 4, [epoch, int(view), *rest] if view >= 0:
            return [epoch, view - view % 4 + LIAR, *rest]
    return value


def kinds_of(frames: Iterable[bytes]) -> set[int]:
    """Which kinds of frames there are."""
    return {frame[0] for frame in frames}


def blocks_of(frames: Iterable[bytes]) -> tuple[bytes, ...]:
    """The blocks among them, without their kind byte."""
    return tuple(frame[1:] for frame in frames if frame[:1] == FRAME_BLOCK)


def wakes(effects: Iterable[Effect]) -> list[int]:
    return [effect.at_ns for effect in effects if isinstance(effect, WakeAt)]


PEER_IDS = tuple(NodeId(node_id_of(key)) for key in KEYS)
