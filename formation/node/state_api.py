"""The API's routes about the replicated state itself: its condition, voters, evidence, accounts, values, claims.

Handlers take an `Ask` and give plain values, so that `api` alone knows the web framework. Who votes is the operator's to
decide: `POST /v1/voters` is answered on the unix socket only, whatever token comes over TCP. What accounts do comes through
`POST /v1/intents` like any wish.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from formation.core.codec import encode
from formation.core.errors import (
    ConflictError,
    DecodeError,
    DeniedError,
    NotFoundError,
    QuorumError,
    UnavailableError,
    UsageError,
)
from formation.core.event import CheckpointWanted, CommitteeProposed, Event, NodeAdmitted, NodeDismissed, Seat
from formation.core.ids import NodeId, node_id_of
from formation.node.reads import Reads
from formation.node.state_reads import StateReads, names_of, parse_seat
from formation.state import evidence, lookup, sync
from formation.state.checkpoint import BUCKET_COUNT, SnapshotAssembly, SnapshotHead
from formation.state.feed import Level
from formation.state.final_chain import parse_final_chain
from formation.state.lane import Entry
from formation.state.membership import check_seats
from formation.state.spine import Spine

# Below the client's patience with an intent; what was written takes effect by itself later.
FINAL_TIMEOUT_S = 20.0
# A voter stores a checkpoint in its turn, a second or two after it was agreed on.
CHECKPOINT_LOOK_S = 0.1
# A peer answers from memory.
PEER_TIMEOUT_S = 10.0
REQUEST_SIZE_MAX_BYTES = 64 * 1024
# Lanes that differ, in one answer; two nodes that are level differ by the few that are moving.
DIFFERING_COUNT_MAX = 256
# Buckets read and sent at a time: a MiB of a large state; between two of them other tasks run.
EXPORT_BUCKET_COUNT = 64

Answer = Any
"""What JSON can say, or a Download."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request without the web framework."""

    path: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes
    is_local: bool
    """It came by the unix socket: this node's operator asks."""


def check_local(ask: Ask, refusal: str, *, hint: str = "run the command there; --host takes its socket") -> None:
    """Go on only for this node's operator.

    Raises:
      DeniedError: it did not come by the unix socket; `refusal` says what is not given.
    """
    if not ask.is_local:
        raise DeniedError(refusal, hint=hint)


@dataclass(frozen=True, slots=True)
class Download:
    """A file that is sent piece by piece."""

    media_type: str
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class StateRoute:
    """Where a handler is found."""

    method: str
    path: str
    handle: Callable[[Ask], Awaitable[Answer]]


class StateApi:
    """Handlers of one node."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._state = reads.state
        self._shown = StateReads(reads)

    def routes(self) -> tuple[StateRoute, ...]:
        """All of them; none takes a path of `api`'s own."""
        return (
            StateRoute("GET", "/v1/state", self.get_state),
            StateRoute("GET", "/v1/state/diff", self.get_diff),
            StateRoute("GET", "/v1/state/export", self.get_export),
            StateRoute("POST", "/v1/state/checkpoint", self.post_checkpoint),
            StateRoute("GET", "/v1/voters", self.get_voters),
            StateRoute("POST", "/v1/voters", self.post_voters),
            StateRoute("GET", "/v1/ops/{ref}", self.get_op),
            StateRoute("GET", "/v1/ops/{ref}/bundle", self.get_op_bundle),
            StateRoute("GET", "/v1/accounts/{id}", self.get_account),
            StateRoute("GET", "/v1/vms/{ref}/grants", self.get_grants),
            StateRoute("GET", "/v1/values", self.get_values),
            StateRoute("GET", "/v1/claims", self.get_claims),
        )

    # ── the state's condition ───────────────────────────────────────────────────────────────────────────────────

    async def get_state(self, _: Ask) -> Answer:
        """Lanes, spine, voters, checkpoint, disk."""
        return self._shown.state()

    async def get_diff(self, ask: Ask) -> Answer:
        """What a peer has that this node lacks, and the other way round, by the sync protocol.

        Raises:
          UnavailableError: the peer does not answer, or not sensibly.
        """
        peer = self._shown.find_node(ask.query.get("peer", ""))
        if peer == self._reads.node_id:
            raise UsageError("that is this node itself", hint="formation status shows the peers")
        index = self._state.replica.lanes.index
        ours_root, ours_fingerprints = index.root(), index.fingerprints()
        hello = await self._ask_peer(peer, sync.Hello(ours_root))
        assert isinstance(hello, sync.Buckets)
        buckets = sync.differing_buckets(ours_fingerprints, hello.fingerprints)
        theirs: tuple[sync.FrontierRow, ...] = ()
        if buckets:
            frontier = await self._ask_peer(peer, sync.FrontierRequest(buckets))
            assert isinstance(frontier, sync.Frontier)
            theirs = frontier.rows
        rows = self._differing({row.lane: row for row in theirs}, buckets)
        replica = self._state.replica
        return {
            "node": {"node_id": self._reads.node_id, "name": self._reads.settings.name} | _spine(replica.spine),
            "peer": {"node_id": peer, "name": self._reads.node_name(peer)}
            | {"epoch": hello.epoch, "height": hello.height, "view": hello.view},
            "is_same": not rows and hello.height == replica.spine.final_height and hello.epoch == replica.spine.epoch,
            "lane_count": len(rows),
            "lanes": rows[:DIFFERING_COUNT_MAX],
        }

    def _differing(self, theirs: Mapping[bytes, sync.FrontierRow], buckets: bytes) -> list[dict[str, Any]]:
        index = self._state.replica.lanes.index
        ours = {row.lane: row for row in index.rows(buckets)}
        rows = []
        for lane in sorted(ours.keys() | theirs.keys()):
            one, other = ours.get(lane), theirs.get(lane)
            if one != other:
                node_id = node_id_of(lane[:32])
                rows.append(
                    {"lane": lane.hex(), "node_id": node_id, "name": self._reads.node_name(node_id)}
                    | {"here": _row(one), "there": _row(other)}
                    | {"is_forked": one is not None and other is not None and one.seq == other.seq and one.hash != other.hash}
                )
        return rows

    async def _ask_peer(self, peer: NodeId, request: sync.Request) -> sync.Answer:
        try:
            with trio.fail_after(PEER_TIMEOUT_S):
                data = await self._reads.p2p.request(
                    peer, sync.PROTOCOL, encode(request), response_size_max_bytes=sync.ANSWER_SIZE_MAX_BYTES
                )
            return sync.decode_answer(data, sync.ANSWER_OF[type(request)])
        except (trio.TooSlowError, UnavailableError) as exc:
            raise UnavailableError(
                f"{self._reads.node_name(peer)} does not answer", hint="formation status shows which peers are connected"
            ) from exc
        except DecodeError as exc:
            raise UnavailableError(
                f"{self._reads.node_name(peer)} answers nonsense: {exc.message}", hint="does it run another version?"
            ) from exc

    async def get_export(self, _: Ask) -> Answer:
        """The newest checkpoint with everything that proves it, as a file.

        Raises:
          ConflictError: no checkpoint is stored yet.
        """
        offer = self._state.replica.snapshot_offer()
        head = self._state.replica.checkpoint_head
        if not offer.proof or head is None:
            raise ConflictError(
                "no checkpoint is stored here yet",
                hint="the network makes one after a minute of activity, or 50,000 operations",
            )
        return Download("application/cbor-seq", self._export(evidence.state_bundle_head(self._reads.manifest, offer), head))

    async def _export(self, begin: bytes, head: SnapshotHead) -> AsyncIterator[bytes]:
        yield begin
        for first in range(0, BUCKET_COUNT, EXPORT_BUCKET_COUNT):
            numbers = range(first, first + EXPORT_BUCKET_COUNT)
            contents = await self._state.read_buckets(numbers)
            held = dict(zip(numbers, contents, strict=True))
            if len(SnapshotAssembly(head, held=held.items()).kept) != len(held):
                # The node stored the next checkpoint meanwhile: what was sent is of the one before. Who asks again gets it.
                raise UnavailableError("a newer checkpoint was stored meanwhile", hint="try again")
            yield evidence.bucket_values(held.items())

    async def post_checkpoint(self, ask: Ask) -> Answer:
        """Make a checkpoint now; answers when this node has stored it.

        Raises:
          DeniedError: not by the unix socket, or this node does not vote.
          ConflictError: the last one is too young.
          QuorumError: not agreed on in time.
        """
        self._check_operator(ask, "checkpoints are asked for on a voter's own machine")
        await self._say(CheckpointWanted(), "checkpoint")
        height = self._state.replica.due_checkpoint_height
        with trio.move_on_after(FINAL_TIMEOUT_S):
            while self._state.status().checkpoint_height < height:  # noqa: ASYNC110 - stored in a turn of its own, no event says so
                await trio.sleep(CHECKPOINT_LOOK_S)
        shown = self._shown.state()["checkpoint"]
        if shown is None or shown["height"] < height:
            raise QuorumError(
                "a checkpoint is due, and not agreed on in time",
                hint="it comes by itself when a quorum answers: formation state status",
            )
        return shown

    # ── the committee ───────────────────────────────────────────────────────────────────────────────────────────

    async def get_voters(self, _: Ask) -> Answer:
        """The committee and what is proposed for it."""
        return self._shown.voters()

    async def post_voters(self, ask: Ask) -> Answer:
        """This voter's word about who shall vote or write; answers when it is final.

        Body: JSON `{"action": "propose", "add": ["NAME=NODE_ID@MULTIADDR"…], "remove": ["NAME"…], "force": false}`, or
        `{"action": "withdraw"}`, or `{"action": "admit" | "dismiss", "node": "NODE"}`.

        Raises:
          DeniedError: not by the unix socket, or this node does not vote.
          UsageError: malformed, or no committee.
          ConflictError: it has no effect; or voters-to-be do not run yet.
          QuorumError: written, and not final in time.
        """
        self._check_operator(ask, "who votes is decided on the voter's own machine")
        wish = json_object(ask.body)
        action = wish.get("action")
        committee = self._state.replica.state.committee
        epoch = committee.committee.epoch
        match action:
            case "propose":
                seats = self._wanted_seats(_texts(wish, "add"), _texts(wish, "remove"), is_forced=wish.get("force") is True)
                await self._say(CommitteeProposed(voters=seats), f"epoch/{epoch + 1}")
            case "withdraw":
                await self._say(CommitteeProposed(voters=committee.seats), f"epoch/{epoch + 1}")
            case "admit" | "dismiss":
                event: Event = NodeAdmitted() if action == "admit" else NodeDismissed()
                await self._say(event, self._shown.find_node(str(wish.get("node", ""))))
            case _:
                raise UsageError(f"no action {str(action)[:40]!r}", hint="propose, withdraw, admit or dismiss")
        return self._shown.voters()

    def _check_operator(self, ask: Ask, refusal: str) -> None:
        check_local(ask, refusal)
        if not self._state.status().is_voter:
            raise DeniedError(
                "this node does not vote, so it has no word in this", hint="run it on a voter: formation voter list"
            )

    def _wanted_seats(self, add: list[str], remove: list[str], *, is_forced: bool) -> tuple[Seat, ...]:
        seats = self._state.replica.state.committee.seats
        new = tuple(map(parse_seat, add))
        names = {seat.name for seat in seats}
        for name in remove:
            if name not in names:
                raise NotFoundError(f"no voter is called {name[:64]!r}", hint=f"voters are {', '.join(sorted(names))}")
        wanted = tuple(seat for seat in seats if seat.name not in remove) + new
        if len(wanted) % 3 != 1:
            raise UsageError(
                f"{len(seats)} voters, {len(new)} more and {len(remove)} fewer make {len(wanted)}",
                hint="n = 3f+1: 1, 4, 7, 10, … so add or remove three at once, or replace one by another",
            )
        reason = check_seats(wanted)
        if reason:
            raise UsageError(reason, hint="formation voter list shows the seats")
        if not is_forced:
            self._check_reachable(seats, new)
        return wanted

    def _check_reachable(self, seats: tuple[Seat, ...], new: tuple[Seat, ...]) -> None:
        """Voters-to-be join as observers first: with seats that nobody answers for, the network could stand still for good."""
        connected = {peer.node_id for peer in self._reads.p2p.peers() if peer.connected}
        voting = {seat.public_key for seat in seats}
        absent = [seat.name for seat in new if seat.public_key not in voting and node_id_of(seat.public_key) not in connected]
        if absent:
            raise ConflictError(
                f"not connected to this node: {', '.join(absent)}",
                hint="start them with this network's manifest first, and wait until formation status shows them; "
                "--force does without",
            )

    async def _say(self, event: Event, object_id: str) -> None:
        with trio.move_on_after(FINAL_TIMEOUT_S) as scope:
            await self._state.append_event(event, object_id, level=Level.FINAL)
        if scope.cancelled_caught:
            raise QuorumError(
                f"written here, and not final within {FINAL_TIMEOUT_S:.0f} s",
                hint="it takes effect by itself when a quorum answers: formation state status",
            )

    # ── one operation ───────────────────────────────────────────────────────────────────────────────────────────

    async def get_op(self, ask: Ask) -> Answer:
        """An operation: what it says, how sure it is, who signed, and why it may be void."""
        ref, entry = await self._find_op(ask.path["ref"])
        replica = self._state.replica
        found = lookup.report(replica, entry, ref)
        signers: list[str] = []
        if found.level is Level.FINAL:
            proofs = lookup.proofs_of(replica, ref)
            if proofs.final:
                votes = parse_final_chain(proofs.final).certificate.votes
                committee = replica.committee_of(votes[0].vote.epoch)
                signers = names_of(self._reads, (committee.node_ids[vote.vote.voter] for vote in votes))
        return self._shown.op(found, final_signers=signers)

    async def get_op_bundle(self, ask: Ask) -> Answer:
        """A file that proves an operation's level.

        Raises:
          ConflictError: nothing here proves it.
        """
        ref, entry = await self._find_op(ask.path["ref"])
        replica = self._state.replica
        lookup.report(replica, entry, ref)
        proofs = lookup.proofs_of(replica, ref)
        last_seq = lookup.last_seq_wanted(ref, proofs)
        raws = await self._state.read_blocks(
            ref.lane, first_seq=ref.seq, last_seq=last_seq, size_max_bytes=evidence.OP_BLOCKS_SIZE_MAX_BYTES
        )
        bundle = lookup.make_op_bundle(ref, lookup.entries_from(replica, ref, raws, last_seq), proofs)

        async def chunks() -> AsyncIterator[bytes]:
            yield evidence.encode_op_bundle(self._reads.manifest, replica.links, bundle)

        return Download("application/cbor-seq", chunks())

    async def _find_op(self, text: str) -> tuple[lookup.OpRef, Entry]:
        replica = self._state.replica
        ref = lookup.op_ref(replica, self._state.newest_blocks(), text)
        entry = lookup.block_here(replica, ref, self._state.newest_blocks())
        if entry is None:
            raws = await self._state.read_blocks(ref.lane, first_seq=ref.seq, last_seq=ref.seq, size_max_bytes=1)
            entry = lookup.block_of_journal(replica, ref, raws)
        return ref, entry

    # ── accounts, values, claims ────────────────────────────────────────────────────────────────────────────────

    async def get_account(self, ask: Ask) -> Answer:
        """Keys in force, delegations, handle, quota."""
        return self._shown.account(ask.path["id"])

    async def get_grants(self, ask: Ask) -> Answer:
        """Roles on a VM."""
        return self._shown.grants(self._reads.find_vm(ask.path["ref"]).vm_id)

    async def get_values(self, ask: Ask) -> Answer:
        """Values of an account: one by `key`, or all whose key begins with `prefix`."""
        account_id, key = ask.query.get("account", ""), ask.query.get("key", "")
        level = _level(ask.query.get("level", Level.CERTIFIED.value))
        if key:
            return self._shown.value(account_id, key, level=level)
        return self._shown.values(account_id, prefix=ask.query.get("prefix", ""), level=level)

    async def get_claims(self, ask: Ask) -> Answer:
        """What is held, by space and owner."""
        return self._shown.claims(space=ask.query.get("space", ""), owner=ask.query.get("owner", ""))


def _level(text: str) -> Level:
    try:
        return Level(text)
    except ValueError as exc:
        raise UsageError(f"no level {text[:20]!r}", hint=f"levels are {', '.join(Level)}") from exc


def _spine(spine: Spine) -> dict[str, int]:
    return {"epoch": spine.epoch, "height": spine.final_height, "view": spine.view}


def _row(row: sync.FrontierRow | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {"head_seq": row.seq, "certified_seq": row.certified_seq, "is_frozen": row.is_frozen}


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
      UsageError: there is none.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise UsageError("the body is not JSON", hint="schemas/README.md lists the API") from exc
    if not isinstance(value, dict):
        raise UsageError("the body is not a JSON object", hint="schemas/README.md lists the API")
    return value


def _texts(wish: Mapping[str, Any], key: str) -> list[str]:
    value = wish.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{key} is not a list of texts", hint="schemas/README.md lists the API")
    return value
