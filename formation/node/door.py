"""The door for intents: looks at a wish before it enters the log, and says when it has taken effect.

A wish of class C has when it is certified, one of class O when it is final: then it is known too whether it had any.

Every node judges every intent for itself; what is checked here too is what a person should be told at once. A node that
neither votes nor was admitted writes nothing itself: it hands the wish, signed as it is, to a voter, which looks at it
with the same eyes; so a user may ask any node. Handing it to a second voter when the first one dies is safe, for an intent
that is carried twice counts once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import structlog
import trio

from formation.core.clock import NS_PER_MS
from formation.core.codec import decode, encode, verify_ed25519
from formation.core.errors import ConflictError, DecodeError, NotFoundError, QuorumError, UnavailableError, UsageError
from formation.core.event import Event, OpClass, VmDesired, VmRequested, parse_event
from formation.core.ids import NodeId, TraceId, trace_id_of, vm_id_of
from formation.core.intent import SignedIntent, check_intent, parse_intent
from formation.core.spec import Desired, VmPhase, VmRecord, check_vm_spec
from formation.node.reads import Reads
from formation.p2p.service import P2pService
from formation.state.service import Level, Token
from formation.vmm.lifecycle import Verb, check_verb

PROTOCOL = "/formation/intent/1"
# One intent with a full environment is below 64 KiB (state: one operation).
INTENT_SIZE_MAX_BYTES = 64 * 1024
# Beyond 63 bits the fold takes an operation for void.
GENERATIONS = range(1 << 63)
# A VM's id, a trace, a token: some 200 bytes.
ANSWER_SIZE_MAX_BYTES = 1024
# With a quorum it takes milliseconds; after this long there is none, and the person should know.
EFFECT_TIMEOUT_S = 10.0
# A voter answers within its own EFFECT_TIMEOUT_S, or is gone.
VOTER_TIMEOUT_S = EFFECT_TIMEOUT_S + 5.0
# Gossip brings it here within a tenth of a second, sync within a few.
FOLLOW_TIMEOUT_S = 5.0

log = structlog.get_logger(__name__)


class Accepted(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A wish that took effect; array of four."""

    object_id: str
    trace_id: str
    lane: str
    seq: int


class Door:
    """Takes signed intents from the API and, where this node may write, from nodes that may not."""

    def __init__(self, *, reads: Reads, p2p: P2pService) -> None:
        self._reads = reads
        self._state = reads.state
        self._p2p = p2p
        p2p.serve_requests(PROTOCOL, self._serve, request_size_max_bytes=INTENT_SIZE_MAX_BYTES)

    async def submit(self, raw: bytes) -> Accepted:
        """Check a signed intent, write it or hand it to a voter, and wait until it takes effect.

        Raises:
          UsageError: not an intent, or asks for something malformed.
          DeniedError, ConflictError, NotFoundError: it would have no effect, or turned out to have none.
          QuorumError: written, but too few voters answer.
          UnavailableError: this node may not write, and reaches no voter.
        """
        try:
            wish = parse_intent(raw)
        except DecodeError as exc:
            raise UsageError(f"not an intent: {exc.message}", hint="schemas/core.cddl says what an intent is") from exc
        now_ms = self._reads.clock.now_ns() // NS_PER_MS
        check_intent(verify_ed25519, wish, network_id=self._reads.manifest.network_id, now_ms=now_ms)
        object_id, trace_id, level = self._check_wish(wish)
        if not self._state.status().may_write:
            return await self._hand_on(raw, level)
        token = await self._in_time(partial(self._state.append_intent, wish, level=level), level)
        return Accepted(object_id=object_id, trace_id=trace_id, lane=token.lane, seq=token.seq)

    async def say(self, event: Event, object_id: str) -> Token:
        """Write an event in this node's name and wait until it takes effect.

        Raises:
          QuorumError: not in time; says how many voters answer.
          ConflictError: it has no effect.
          FormationError: the state does not take it.
        """
        level = level_of(event)
        return await self._in_time(partial(self._state.append_event, event, object_id, level=level), level)

    async def _in_time(self, write: Callable[[], Awaitable[Token]], level: Level) -> Token:
        with trio.move_on_after(EFFECT_TIMEOUT_S) as scope:
            token = await write()
        if not scope.cancelled_caught:
            return token
        status = self._state.status()
        online = sum(voter.is_online for voter in status.voters)
        if online >= status.quorum_size:
            # Voters hold what is ahead of their time until that time comes.
            what = "ordered" if level is Level.FINAL else "acknowledged"
            raise QuorumError(
                f"written here, but not {what} by {status.quorum_size} voters within {EFFECT_TIMEOUT_S:.0f} s, "
                f"though {online} of {len(status.voters)} answer",
                hint="is this machine's clock right, or are they overloaded? it takes effect by itself: formation status",
            )
        raise QuorumError(
            f"written here, but only {online} of {len(status.voters)} voters answer and {status.quorum_size} are needed",
            hint="it takes effect by itself when a quorum is back: formation status",
        )

    def _check_wish(self, wish: SignedIntent) -> tuple[str, TraceId, Level]:
        """What every node will judge again, told early; gives object, trace, and the level at which it takes effect."""
        try:
            event = parse_event(wish.intent.verb, wish.intent.body)
        except DecodeError as exc:
            raise UsageError(exc.message, hint="is the client older or newer than this node?") from exc
        if isinstance(event, VmRequested | VmDesired) and event.generation not in GENERATIONS:
            raise UsageError(f"generation: {event.generation} is out of range", hint="each start and stop raises it by one")
        view = self._state.view
        if not isinstance(event, VmRequested):
            vm = view.vm(wish.intent.object_id, Level.CERTIFIED) if wish.intent.object_id.startswith("vm-") else None
            if vm is not None and isinstance(event, VmDesired) and vm.owner == wish.account_id:
                self._check_verb(vm, event)
            # Only an account that makes itself known may leave the object out: it means itself.
            trace_id = TraceId(vm.trace_id) if vm else trace_id_of(wish.digest)
            return wish.intent.object_id or wish.account_id, trace_id, level_of(event)
        vm_id = vm_id_of(wish.digest)
        spec = check_vm_spec(event.spec)
        for vm in view.vms():
            if vm.owner == wish.account_id and vm.spec.name == spec.name and vm.vm_id != vm_id:
                raise ConflictError(
                    f"a VM named {spec.name!r} exists already", hint=f"choose another name, or: formation vm delete {spec.name}"
                )
        if view.image(spec.image) is None:
            raise NotFoundError(f"no node has image {spec.image[:19]}…", hint="formation image build makes it known")
        return vm_id, trace_id_of(wish.digest), level_of(event)

    def _check_verb(self, vm: VmRecord, event: VmDesired) -> None:
        """Refuse a start or stop that makes no sense now; one that was carried before counts once, whatever came of it."""
        if event.generation <= vm.spec.generation:
            return
        # A VM that is meant to be stopped may be started in any phase: when it was never placed, for one.
        if event.desired is Desired.STOPPED or vm.spec.desired is Desired.RUNNING:
            verb = Verb.START if event.desired is Desired.RUNNING else Verb.STOP
            check_verb(verb, VmPhase(self._reads.vm(vm)["phase"]), name=vm.spec.name)

    async def _hand_on(self, raw: bytes, level: Level) -> Accepted:
        """Ask one voter after the other, those that answer first; what a voter refuses is refused."""
        voters = sorted(self._state.status().voters, key=lambda voter: not voter.is_online)
        for voter in voters:
            try:
                with trio.fail_after(VOTER_TIMEOUT_S):
                    answer = await self._p2p.request(
                        NodeId(voter.node_id), PROTOCOL, raw, response_size_max_bytes=ANSWER_SIZE_MAX_BYTES
                    )
                accepted = decode(answer, Accepted)
            except (UnavailableError, DecodeError, trio.TooSlowError) as exc:
                log.info("door.voter_failed", voter=voter.name, reason=str(exc))
                continue
            await self._follow(Token(lane=accepted.lane, seq=accepted.seq), level)
            return accepted
        raise UnavailableError(
            "this node may not write in the network, and no voter answers it",
            hint="formation status shows the voters; try again",
        )

    async def _follow(self, token: Token, level: Level) -> None:
        """Let the wish arrive here too, so that what is asked of this node next knows of it; it stands in any case."""
        try:
            with trio.move_on_after(FOLLOW_TIMEOUT_S):
                await (self._state.wait_final(token) if level is Level.FINAL else self._state.wait_certified(token))
        except UsageError as exc:
            log.warning("door.odd_token", reason=exc.message)

    async def _serve(self, _asker: NodeId, raw: bytes) -> bytes:
        if not self._state.status().may_write:
            raise UnavailableError("this node may not write", hint="ask a voter")
        return encode(await self.submit(raw))


def level_of(event: Event) -> Level:
    """The level at which an event takes effect."""
    return Level.FINAL if event.op_class is OpClass.ORDERED else Level.CERTIFIED
