"""Byzantine voters: a whole node whose replica works as it should, and a will of its own about what leaves the machine.

The replica inside keeps the liar well informed (it sees all that a voter sees). Each behaviour bends what it sends, answers
wrongly, or acts by itself on a calendar. It has its own key and no other; what it forges in the name of others comes with
signatures that do not hold, or hold in another network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from formation.core.clock import NS_PER_MS, hlc_at
from formation.core.codec import encode, sha256
from formation.core.errors import DecodeError
from formation.core.event import ValuePut
from formation.core.ids import NetworkId, NodeId, node_id_of
from formation.state import gossip, sync
from formation.state.ack import Ack, sign_ack
from formation.state.effects import Tick
from formation.state.equivocation import make_equivocation
from formation.state.final_chain import FinalChain
from formation.state.frames import FRAME_ACK, FRAME_BLOCK, FRAME_EQUIVOCATION, FRAME_FREEZE
from formation.state.lane import NO_HASH, Block, Head, LaneId, SpineRef, lane_id, make_incarnation, parse_block, sign_block
from formation.state.membership import Freeze, parse_freeze, sign_freeze
from formation.state.op import PlainOp, delegated_op
from formation.state.spine_values import (
    CheckpointRef,
    Kind,
    Proposal,
    Vote,
    make_final,
    parse_final,
    parse_proposal,
    sign_proposal,
    sign_vote,
)
from tests.sim.workload import NETWORK_ID, fake_sign

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster, Node

OTHER_NETWORK = NetworkId(b"m" * 32)
ACT_INTERVAL_MS = 120.0
# A hundred times what an honest node sends in that time.
FLOOD_COUNT = 100
GROUND_COUNT = 8


class Liar:
    """One Byzantine voter."""

    def __init__(self, cluster: Cluster, node: Node, behaviours: Sequence[str]) -> None:
        self._cluster = cluster
        self._node = node
        self._does = frozenset(behaviours)
        self._rng = cluster.rng
        self._sign = fake_sign(node.key)
        self._halves: tuple[list[Node], list[Node]] | None = None
        self._branch: tuple[bytes, int, bytes] | None = None
        """(lane, number, hash) of the newest block on our lane's other branch."""
        self._side: tuple[LaneId, int, bytes, int] | None = None
        """(lane, number, hash, hlc) of a lane that the replica inside knows nothing of."""
        self._ack_n = 1_000_000
        self._forge_share = cluster.rng.choice((0.6, 1.0))
        self._seen: list[bytes] = []
        """Frames of others, to be said again."""

    # ── sending ──

    def _half(self, which: int) -> list[Node]:
        if self._halves is None:
            others = [node for node in self._cluster.nodes if node.key != self._node.key]
            self._rng.shuffle(others)
            middle = self._rng.randint(1, len(others) - 1)
            self._halves = others[:middle], others[middle:]
        return self._halves[which]

    def _emit(self, frame: bytes, to: Sequence[Node] | None = None) -> None:
        self._cluster.checkers.on_send(self._node, frame)
        for other in self._cluster.nodes if to is None else to:
            if other.key != self._node.key:
                self._cluster.transmit(self._node, other, frame)

    def send(self, to: NodeId | None, frame: bytes, topic: str) -> None:
        """What the replica inside wants to send."""
        kind = frame[:1]
        if to is None:
            if kind == FRAME_BLOCK and "fork" in self._does and self._fork(frame[1:]):
                return
            if kind == FRAME_ACK and self._bend_ack(frame):
                return
            if kind == FRAME_FREEZE and "freeze-lies" in self._does:
                self._bend_freeze(frame[1:])
                return
            if kind[0] == Kind.PROPOSAL and self._bend_proposal(frame):
                return
        self._cluster.checkers.on_send(self._node, frame)
        self._cluster.spread(self._node, to, frame, topic)

    def on_frame(self, sender: Node, frame: bytes) -> None:
        """What arrives, before the replica inside sees it."""
        if self._cluster.is_stable and self._rng.random() < 0.8:
            return
        if len(self._seen) < 200:
            self._seen.append(frame)
        kind = frame[:1]
        try:
            if kind == FRAME_BLOCK and "ack-all" in self._does:
                entry = parse_block(frame[1:], network_id=NETWORK_ID)
                self._ack(Head(entry.block.lane, entry.block.seq, entry.hash))
            elif kind and kind[0] == Kind.PROPOSAL and "vote-all" in self._does:
                entry_ = parse_proposal(frame[1:])
                self._vote_all(entry_.proposal, entry_.hash)
        except DecodeError:
            return

    def install(self) -> None:
        """Put our deeds on the calendar."""
        names = ("bad-deps", "bad-clock", "garbage", "bad-intents", "foreign", "ack-wrong", "ban-lies", "gossip-lies", "ground")
        acts = [name for name in names if name in self._does]
        at_ms = self._rng.uniform(50, 200)
        while acts and at_ms < self._cluster.plan.gst_ms + 600:
            self._cluster.at(at_ms, partial(self._act, self._rng.choice(acts)))
            at_ms += self._rng.uniform(0.5, 1.5) * ACT_INTERVAL_MS
        if "flood" in self._does:
            self._cluster.at(self._rng.uniform(100, self._cluster.plan.gst_ms), self._flood)

    def _act(self, name: str) -> None:
        if self._node.is_up:
            getattr(self, "_" + name.replace("-", "_"))()

    # ── authors ──

    def _block(self, **fields: Any) -> tuple[bytes, bytes]:
        """(frame, hash) of a block of ours."""
        entry = sign_block(self._sign, Block(**fields), network_id=NETWORK_ID)
        return FRAME_BLOCK + entry.raw, entry.hash

    def _value(self) -> PlainOp:
        workload = self._cluster.workload
        return delegated_op(ValuePut(value=self._rng.randbytes(6)), f"{workload.accounts[0]}/liar", account=workload.keys[0])

    def _fork(self, raw: bytes) -> bool:
        """The same number twice: now and then, also in the first block, also after a long honest beginning."""
        block = parse_block(raw, network_id=NETWORK_ID).block
        prev = block.prev
        if self._branch is not None and self._branch[:2] == (block.lane, block.seq - 1):
            prev = self._branch[2]
        elif self._rng.random() > 0.3:
            return False
        fields = {name: getattr(block, name) for name in Block.__struct_fields__}
        frame, hash_ = self._block(**(fields | {"prev": prev, "ops": (self._value(),), "kind": "value"}))
        self._branch = (block.lane, block.seq, hash_)
        self._emit(FRAME_BLOCK + raw, self._half(0))
        self._emit(frame, self._half(1))
        return True

    def _next_side(self, **fields: Any) -> bytes:
        """The next block of our other lane, with these fields bent."""
        now_hlc = int(hlc_at(self._cluster.now_ns))
        if self._side is None or self._rng.random() < 0.2:
            lane = lane_id(self._node.key, make_incarnation(now_hlc, self._rng.getrandbits(16)))
            self._side = (lane, 0, NO_HASH, now_hlc)
        return self._next_side_block(**fields)

    def _next_side_block(self, **fields: Any) -> bytes:
        assert self._side is not None
        now_hlc = int(hlc_at(self._cluster.now_ns))
        lane, seq, prev, hlc = self._side
        honest: dict[str, Any] = {
            "lane": lane,
            "seq": seq + 1,
            "prev": prev,
            "hlc": max(hlc + 1, now_hlc),
            "spine_ref": SpineRef(0, NETWORK_ID),
            "deps": (),
            "kind": "value",
            "ops": (self._value(),),
        }
        made = honest | fields
        frame, hash_ = self._block(**made)
        self._side = (lane, made["seq"], hash_, made["hlc"])
        return frame

    def _bad_deps(self) -> None:
        lanes = [lane for lane in self._node.replica.lanes if lane.head_seq]
        lane = self._rng.choice(lanes) if lanes else None
        deps = [Head(lane_id(self._rng.randbytes(32), self._rng.randbytes(10)), 1, self._rng.randbytes(32))]
        if lane is not None:
            deps.append(lane.head)
            deps.append(Head(lane.id, lane.head_seq + 3, self._rng.randbytes(32)))
            deps.append(Head(lane.id, max(1, lane.certified_seq), self._rng.randbytes(32)))
        ref = self._rng.choice((SpineRef(0, NETWORK_ID), SpineRef(10_000, self._rng.randbytes(32))))
        self._emit(self._next_side(deps=(self._rng.choice(deps),), spine_ref=ref), self._some())

    def _some(self) -> list[Node]:
        return self._rng.choice((self._half(0), self._half(1), [*self._half(0), *self._half(1)]))

    def _bad_clock(self) -> None:
        now_ns = self._cluster.now_ns
        shift_ms = self._rng.choice((600_000, 2_000, -600_000, 0))
        hlc = max(1, int(hlc_at(now_ns + shift_ms * NS_PER_MS)))
        if shift_ms == 0 and self._side is not None:
            hlc = self._side[3]
        self._emit(self._next_side(hlc=hlc), self._some())

    def _garbage(self) -> None:
        rng = self._rng
        base = rng.choice(self._seen) if self._seen else b"\x01abc"
        cut = rng.randrange(len(base) + 1)
        frame = rng.choice(
            (
                b"",
                bytes((rng.randrange(256),)) + rng.randbytes(rng.randrange(80)),
                base[:cut],
                base + b"\x00",
                base[:cut] + bytes((rng.randrange(256),)) + base[cut + 1 :],
                bytes((rng.randint(1, 8),)) + base[1:],
                b"\x01" + bytes(300_000) if rng.random() < 0.1 else b"\x04",
            )
        )
        self._emit_raw(frame)
        self._emit_raw(self._next_side(kind="nothing"))
        self._emit_raw(self._next_side(ops=()))

    def _emit_raw(self, frame: bytes) -> None:
        for other in self._some():
            self._cluster.transmit(self._node, other, frame)

    def _bad_intents(self) -> None:
        """Blocks that are as they should be, with operations that are not."""
        rng, workload = self._rng, self._cluster.workload
        vm_id = workload.vms[0] if workload.vms else "vm-" + "a" * 16
        wishes = [op for _, op in workload.wishes if op[5]]
        ops: list[PlainOp] = [
            ["O", "value.put", "x", {"value": b"1"}, None, None],
            ["C", "value.put", f"{workload.accounts[1]}/k", {"value": b"1"}, None, None],
            ["O", "vm.deleted", vm_id, {}, workload.keys[1], None],
            ["O", "vm.claimed", vm_id, {"why": "", "ttl_ms": 1 << 60}, None, None],
            ["O", "claim.transferred", f"placement/{vm_id}", {"to": "nobody"}, None, None],
            ["C", "no.such.verb", "x", {}, None, None],
            ["C", "node.advertised", "another", {}, None, None],
            ["?"],
            [1, 2, 3, 4, 5, 6],
        ]
        if wishes:
            raw = bytearray(rng.choice(wishes)[5])
            raw[-1] ^= 1
            ops.append(["C", "vm.requested", "", None, None, bytes(raw)])
        self._cluster.submit(self._node, (rng.choice(("value", "vm", "claim", "node", "account")), rng.choice(ops)))

    def _flood(self) -> None:
        """Orphans, unknown lanes, incarnations, votes and proposals of far views, all at once."""
        rng = self._rng
        voter, epoch = self._voter()
        now_hlc = int(hlc_at(self._cluster.now_ns))
        target = self._some()
        for index in range(FLOOD_COUNT):
            fields = {
                "spine_ref": SpineRef(0, NETWORK_ID),
                "deps": (),
                "kind": "value",
                "ops": (self._value(),),
                "prev": rng.randbytes(32),
                "hlc": now_hlc + index,
            }
            lane = lane_id(self._node.key, make_incarnation(now_hlc + index, index))
            seq = rng.choice((1, 2, 40, 5000))
            if seq == 1:
                fields["prev"] = NO_HASH
            self._emit(self._block(lane=lane, seq=seq, **fields)[0], target)
            unknown = lane_id(rng.randbytes(32), rng.randbytes(10))
            self._ack(Head(unknown, 1 + index, rng.randbytes(32)), target)
            if voter is not None:
                vote = Vote(epoch, 1 + rng.randrange(1000), voter, rng.randbytes(32))
                self._emit_vote(Kind.NOTARIZE, vote, target)
                self._propose_any(epoch, 1 + rng.randrange(60), target)

    def _propose_any(self, epoch: int, view: int, target: Sequence[Node]) -> None:
        proposal = Proposal(
            epoch=epoch,
            view=view,
            height=view,
            parent=self._rng.randbytes(32),
            time_ms=self._cluster.now_ns // NS_PER_MS,
            cut=(),
            closes=(),
            checkpoint=None,
            handover=None,
            equivocations=(),
        )
        committee = self._cluster.committees[epoch]
        if committee.voters[committee.leader(view)] == self._node.key:
            raw = sign_proposal(self._sign, proposal, network_id=NETWORK_ID).raw
            self._emit(bytes((Kind.PROPOSAL,)) + raw, target)

    def _ground(self) -> None:
        """Lanes whose ids were ground until they all fall into one bucket of the frontier."""
        now_hlc = int(hlc_at(self._cluster.now_ns))
        found = 0
        for bits in range(1 << 16):
            lane = lane_id(self._node.key, make_incarnation(now_hlc + found, bits))
            if sync.bucket_of(lane) == 0:
                self._side = (lane, 0, NO_HASH, now_hlc)
                self._emit(self._next_side_block(), self._some())
                self._cluster.counts.add("ground lanes")
                found += 1
            if found == GROUND_COUNT:
                break

    def _gossip_lies(self) -> None:
        """Forged, foreign, old and unreadable gossip: in our own name, for another's cannot be used, and as a stranger."""
        cluster, rng = self._cluster, self._rng
        followers = [node for node in cluster.correct() if node.key not in cluster.committees[0].index_of and node.is_up]
        if not followers:
            return
        topic = rng.choice(gossip.TOPICS)
        kinds = [self._forged_frames, self._foreign_frames]
        frames = rng.choice(kinds)(rng.choice(followers))
        cluster.inject_gossip(self._node.node_id, self._node, rng.choice(followers), gossip.pack_frames(tuple(frames)))
        message = gossip.pack_frames(tuple(rng.sample(self._seen, min(8, len(self._seen)))))
        cluster.publish(self._node.node_id, self._node, topic, message)
        cluster.publish(node_id_of(rng.randbytes(32)), self._node, topic, message)
        cluster.publish(self._node.node_id, self._node, topic, message[: rng.randrange(len(message))])
        too_many = gossip.pack_frames((b"",) * (gossip.MESSAGE_FRAME_COUNT_MAX + 1))
        cluster.publish(self._node.node_id, self._node, topic, too_many)
        cluster.publish(self._node.node_id, self._node, topic, gossip.pack_frames((b"", b"\x00", b"\x63abc", bytes(3))))

    # ── what never was ──

    def _forged_final(self, node: Node) -> bytes:
        """Frame of a final certificate above what the node has, signed by us in everybody's name."""
        spine, state = node.replica.spine, node.replica.state
        committee = self._cluster.committees[spine.epoch]
        cut = tuple(sorted((lane.head for lane in self._node.replica.lanes if lane.head_seq), key=_lane))
        proposal = Proposal(
            epoch=spine.epoch,
            view=spine.view + self._rng.randint(0, 3),
            height=spine.final_height + 1,
            parent=state.hash,
            time_ms=max(state.time_ms + 1, self._cluster.now_ns // NS_PER_MS),
            cut=cut[:4],
            closes=(),
            equivocations=(),
            checkpoint=None,
            handover=None,
        )
        entry = sign_proposal(self._sign, proposal, network_id=NETWORK_ID)
        votes = [
            sign_vote(self._sign, Kind.FINALIZE, Vote(proposal.epoch, proposal.view, voter, entry.hash), network_id=NETWORK_ID)
            for voter in range(committee.quorum_size)
        ]
        return bytes((Kind.FINAL,)) + make_final(entry, votes).raw

    def _forged_acks(self, node: Node) -> list[bytes]:
        """Acks of all voters, by our own key, for what nobody else has acknowledged."""
        epoch = node.replica.spine.epoch
        lanes = [lane for lane in self._node.replica.lanes if lane.head_seq > lane.certified_seq]
        heads = [lane.head for lane in lanes[:3]] or [Head(lane_id(self._node.key, self._rng.randbytes(10)), 1, bytes(32))]
        own = self._node.committee_index(epoch)
        return [
            sign_ack(self._sign, Ack(epoch=epoch, voter=voter, n=50_000, heads=(head,)), network_id=NETWORK_ID).raw
            for voter in range(len(self._cluster.committees[epoch].voters))
            for head in heads
            if voter != own
        ]

    def _forged_frames(self, node: Node) -> list[bytes]:
        return [self._forged_final(node), *(FRAME_ACK + raw for raw in self._forged_acks(node))]

    def _foreign_frames(self, node: Node) -> list[bytes]:
        return self._frames_of_another_network(node, self._rng.choice(self._cluster.correct()))

    def _foreign(self) -> None:
        """I11: what was signed for another network, or long ago, has no effect."""
        nodes = [node for node in self._cluster.correct() if node.is_up and not node.is_paused]
        if not nodes:
            return
        node = self._rng.choice(nodes)
        frames = self._frames_of_another_network(node, self._rng.choice(nodes))
        self._cluster.handle(node, Tick())
        self._cluster.inject(self._node, node, self._rng.choice(frames))

    def _frames_of_another_network(self, node: Node, other: Node) -> list[bytes]:
        """What the other node would have signed, had it been in another network, or in another epoch."""
        sign = fake_sign(other.key)
        epoch = node.replica.spine.epoch
        index = other.committee_index(epoch)
        lane = lane_id(other.key, make_incarnation(int(hlc_at(self._cluster.now_ns)) + 5, 1))
        block = Block(
            lane=lane,
            seq=1,
            prev=NO_HASH,
            hlc=int(hlc_at(self._cluster.now_ns)) + 6,
            spine_ref=SpineRef(1, self._rng.randbytes(32)),
            deps=(),
            kind="value",
            ops=(self._value(),),
        )
        frames = [FRAME_BLOCK + sign_block(sign, block, network_id=OTHER_NETWORK).raw]
        if index is not None:
            view = node.replica.spine.view
            known = [each for each in node.replica.lanes if each.head_seq]
            if known:
                ack = Ack(epoch=epoch, voter=index, n=9_999, heads=(self._rng.choice(known).head,))
                frames.append(FRAME_ACK + sign_ack(sign, ack, network_id=OTHER_NETWORK).raw)
                # Of another epoch: the signature covers it, so its number cannot be changed back.
                frames.append(
                    FRAME_ACK + sign_ack(sign, msgspec.structs.replace(ack, epoch=epoch + 7), network_id=NETWORK_ID).raw
                )
            for kind in (Kind.NULLIFY, Kind.FINALIZE, Kind.NOTARIZE):
                vote = Vote(epoch, view, index, NO_HASH if kind is Kind.NULLIFY else self._rng.randbytes(32))
                frames.append(bytes((kind,)) + sign_vote(sign, kind, vote, network_id=OTHER_NETWORK).raw)
            freeze = Freeze(epoch=epoch, voter=index, decided_height=1, heads=())
            frames.append(FRAME_FREEZE + sign_freeze(sign, freeze, network_id=OTHER_NETWORK).raw)
        return frames

    # ── voters ──

    def _voter(self) -> tuple[int | None, int]:
        epoch = self._node.replica.spine.epoch
        return self._node.committee_index(epoch), epoch

    def _ack(self, head: Head, target: Sequence[Node] | None = None, *, epoch_shift: int = 0) -> None:
        voter, epoch = self._voter()
        if voter is None:
            return
        self._ack_n += 1
        ack = Ack(epoch=max(0, epoch + epoch_shift), voter=voter, n=self._ack_n, heads=(head,))
        self._emit(FRAME_ACK + sign_ack(self._sign, ack, network_id=NETWORK_ID).raw, target)

    def _ack_wrong(self) -> None:
        lanes = [lane for lane in self._node.replica.lanes if lane.head_seq]
        if not lanes:
            return
        lane = self._rng.choice(lanes)
        seq = max(1, lane.head_seq + self._rng.randint(-1, 2))
        self._ack(Head(lane.id, seq, self._rng.randbytes(32)), self._some())
        self._ack(lane.head, self._some(), epoch_shift=self._rng.choice((-1, 1)))

    def _bend_ack(self, frame: bytes) -> bool:
        if "ack-none" in self._does:
            return True
        if "ack-some" in self._does:
            if self._rng.random() < 0.5:
                self._emit(frame, self._half(0))
            return True
        return False

    def _emit_vote(self, kind: Kind, vote: Vote, target: Sequence[Node] | None) -> None:
        self._emit(bytes((kind,)) + sign_vote(self._sign, kind, vote, network_id=NETWORK_ID).raw, target)

    def _vote_all(self, proposal: Proposal, hash_: bytes) -> None:
        voter = self._node.committee_index(proposal.epoch)
        if voter is None:
            return
        vote = Vote(proposal.epoch, proposal.view, voter, hash_)
        self._emit_vote(Kind.NOTARIZE, vote, None)
        self._emit_vote(Kind.FINALIZE, vote, self._some())
        self._emit_vote(Kind.NULLIFY, Vote(proposal.epoch, proposal.view, voter, NO_HASH), self._some())

    def _forged_equivocation(self, epoch: int) -> bytes:
        """Against an honest voter: signed by us in its name, or with words that it might well have signed both."""
        rng, committee = self._rng, self._cluster.committees[epoch]
        victim = rng.choice([node for node in self._cluster.correct() if node.key in committee.index_of])
        voter, view = committee.index_of[victim.key], rng.randint(1, 9)

        def word(kind: Kind, hash_: bytes) -> tuple[Kind, bytes]:
            return kind, sign_vote(self._sign, kind, Vote(epoch, view, voter, hash_), network_id=NETWORK_ID).raw

        honest = [frame for frame in self._seen if frame and frame[0] in (Kind.NOTARIZE, Kind.NULLIFY, Kind.FINALIZE)]
        if len(honest) > 1 and rng.random() < 0.5:
            one, other = rng.sample(honest, 2)
            return make_equivocation(victim.key, (Kind(one[0]), one[1:]), (Kind(other[0]), other[1:]))
        one_word = word(Kind.NOTARIZE, rng.randbytes(32))
        other_word = rng.choice((word(Kind.NOTARIZE, rng.randbytes(32)), one_word))
        return make_equivocation(victim.key, one_word, other_word)

    def _ban_lies(self) -> None:
        _, epoch = self._voter()
        self._emit_raw(FRAME_EQUIVOCATION + self._forged_equivocation(epoch))

    def _bend_freeze(self, raw: bytes) -> None:
        freeze = parse_freeze(raw).freeze
        raised = []
        for head in freeze.heads:
            lane = self._node.replica.lanes.get(LaneId(head.lane))
            raised.append(head if lane is None or not lane.head_seq else lane.head)
        choices = (
            freeze,
            msgspec.structs.replace(freeze, heads=()),
            msgspec.structs.replace(freeze, heads=freeze.heads[:1]),
            msgspec.structs.replace(freeze, heads=tuple(raised)),
            msgspec.structs.replace(
                freeze, heads=tuple(Head(head.lane, head.seq + 1, self._rng.randbytes(32)) for head in freeze.heads)
            ),
            msgspec.structs.replace(freeze, decided_height=freeze.decided_height + 1),
        )
        for half in (0, 1):
            made = sign_freeze(self._sign, self._rng.choice(choices), network_id=NETWORK_ID)
            self._emit(FRAME_FREEZE + made.raw, self._half(half))

    # ── leaders ──

    def _bend_proposal(self, frame: bytes) -> bool:
        """Our turn to lead; whether the frame has been dealt with."""
        names = [name for name in self._does if name.startswith("lead-")]
        if not names or (self._cluster.is_stable and self._rng.random() < 0.7):
            return False
        proposal = parse_proposal(frame[1:]).proposal
        name = self._rng.choice(sorted(names))
        if name == "lead-none":
            return True
        bent = self._bent(name, proposal)
        if bent is None:
            return False
        entry = sign_proposal(self._sign, bent, network_id=NETWORK_ID)
        other = bytes((Kind.PROPOSAL,)) + entry.raw
        if name == "lead-two":
            self._emit(frame, self._half(0))
            self._emit(other, self._half(1))
        else:
            self._emit(other)
        voter = self._node.committee_index(bent.epoch)
        if voter is not None:
            for kind in (Kind.NOTARIZE, Kind.FINALIZE):
                self._emit_vote(kind, Vote(bent.epoch, bent.view, voter, entry.hash), None)
        return True

    def _bent(self, name: str, proposal: Proposal) -> Proposal | None:
        rng = self._rng
        state = self._node.replica.state
        match name:
            case "lead-two":
                if proposal.cut and rng.random() < 0.5:
                    return msgspec.structs.replace(proposal, cut=proposal.cut[1:])
                return msgspec.structs.replace(proposal, time_ms=proposal.time_ms + 1)
            case "lead-back":
                back = tuple(
                    sorted((Head(lane, max(1, e.seq - 1), rng.randbytes(32)) for lane, e in state.lanes.items()), key=_lane)
                )
                return msgspec.structs.replace(proposal, cut=back) if back else None
            case "lead-parent":
                n = len(self._cluster.committees[proposal.epoch].voters)
                return rng.choice(
                    (
                        msgspec.structs.replace(proposal, parent=rng.randbytes(32)),
                        msgspec.structs.replace(proposal, parent=NETWORK_ID),
                        msgspec.structs.replace(proposal, height=proposal.height + 1),
                        msgspec.structs.replace(proposal, view=proposal.view + n),
                    )
                )
            case "lead-time":
                time_ms = rng.choice((state.time_ms, proposal.time_ms + 600_000, proposal.time_ms + 450, 0))
                return msgspec.structs.replace(proposal, time_ms=time_ms)
            case "lead-censor":
                victim = self._cluster.nodes[0].key
                return msgspec.structs.replace(proposal, cut=tuple(h for h in proposal.cut if h.lane[:32] != victim))
            case "lead-ban":
                return msgspec.structs.replace(proposal, equivocations=(self._forged_equivocation(proposal.epoch),))
            case "lead-root":
                ref = proposal.checkpoint or CheckpointRef(max(1, state.height), rng.randbytes(32))
                return msgspec.structs.replace(proposal, checkpoint=CheckpointRef(ref.height, rng.randbytes(32)))
            case "lead-close":
                lanes = [lane for lane in self._node.replica.lanes if lane.certified_seq]
                named = {head.lane for head in proposal.cut}
                closes = tuple(lane.certified for lane in sorted(lanes, key=lambda each: each.id) if lane.id not in named)
                return msgspec.structs.replace(proposal, closes=closes[:2])
        return None

    # ── servers ──

    def answer(self, asker: Node, request: sync.Request, packed: bytes) -> bytes:
        """What we answer in place of the right answer."""
        rng = self._rng
        is_tame = self._cluster.is_stable and not self._is_alone(asker)
        if "sync-forge" in self._does and rng.random() < (0.1 if is_tame else self._forge_share):
            return self._forged(asker, request, packed)
        if "sync-lies" not in self._does or rng.random() < (0.9 if self._cluster.is_stable else 0.4):
            return packed
        answer = sync.decode_answer(packed, sync.ANSWER_OF[type(request)])
        match answer:
            case sync.Buckets(_, epoch, view, height):
                return encode(sync.Buckets(rng.randbytes(2048), epoch, view + rng.randint(0, 50), height + rng.randint(0, 50)))
            case sync.SpinePulled(frames):
                some = tuple(frame for frame in frames if rng.random() < 0.7)
                return encode(sync.SpinePulled(some + tuple(self._seen[:2]), rng.random() < 0.3))
            case sync.Frontier(rows):
                bent = [msgspec.structs.replace(row, hash=rng.randbytes(32), seq=row.seq + rng.randint(0, 9)) for row in rows]
                bent.append(sync.FrontierRow(rng.randbytes(42), 5, rng.randbytes(32), 5, False))
                return encode(sync.Frontier(tuple(bent)))
            case sync.Pulled(blocks, acks, _):
                mixed = list(blocks)
                rng.shuffle(mixed)
                if mixed and rng.random() < 0.5:
                    mixed[0] = mixed[0][:-1] + bytes((mixed[0][-1] ^ 1,))
                return encode(sync.Pulled(tuple(mixed[: rng.randint(0, len(mixed))]), acks[: rng.randint(0, len(acks))], ()))
            case sync.SnapshotOffer(links, proof, head):
                return encode(
                    rng.choice(
                        (
                            sync.SnapshotOffer((), b"", b""),
                            sync.SnapshotOffer(links, proof[:-1], head),
                            sync.SnapshotOffer(links, proof, head[:-1]),
                            sync.SnapshotOffer((*links, proof), proof, head),
                        )
                    )
                )
            case sync.PiecesPulled(chunk):
                return encode(sync.PiecesPulled(chunk[:-1] if rng.random() < 0.5 else rng.randbytes(len(chunk))))

    def _is_alone(self, asker: Node) -> bool:
        return self._cluster.eclipsed is asker and self._cluster.is_eclipsing

    def _forged(self, asker: Node, request: sync.Request, packed: bytes) -> bytes:
        """A whole history that never was, as far as one key can make it."""
        self._cluster.counts.add("forged answers")
        match sync.decode_answer(packed, sync.ANSWER_OF[type(request)]):
            case sync.Buckets(fingerprints, epoch, view, height):
                return encode(sync.Buckets(fingerprints or self._rng.randbytes(2048), epoch, view + 5, height + 5))
            case sync.SpinePulled(frames, _):
                return encode(sync.SpinePulled((self._forged_final(asker), *frames[:3]), self._rng.random() < 0.3))
            case sync.Pulled(blocks, _, _):
                return encode(sync.Pulled(blocks, tuple(self._forged_acks(asker)), ()))
            case sync.SnapshotOffer(links, _, head):
                final = self._forged_final(asker)[1:]
                root = CheckpointRef(asker.replica.state.height + 1, sha256(head))
                proposal = msgspec.structs.replace(parse_final(final).proposal.proposal, checkpoint=root)
                entry = sign_proposal(self._sign, proposal, network_id=NETWORK_ID)
                votes = [
                    sign_vote(
                        self._sign,
                        Kind.FINALIZE,
                        Vote(proposal.epoch, proposal.view, voter, entry.hash),
                        network_id=NETWORK_ID,
                    )
                    for voter in range(self._cluster.committees[proposal.epoch].quorum_size)
                ]
                proof = encode(FinalChain((), make_final(entry, votes).raw))
                return encode(sync.SnapshotOffer(links, proof, head))
        return packed


def _lane(head: Head) -> bytes:
    return head.lane
