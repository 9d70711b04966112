"""Logs and consoles, also of VMs on other nodes.

A VM's owner may ask any node. Where another node holds the VM, the asked node opens a direct stream to it and passes
bytes through; the holder serves it only with the owner's *permit*: an intent of verb `vm.attach` for that VM, signed by
the owner's account, which expires like any intent and never enters the replicated state. So a node can pass a user's
wish on, and cannot make one up.

On the wire: the asker sends one frame (`AttachRequest`), then what is typed; the holder answers one status frame (empty:
go on; else an error's array [code, message, hint]), then the guest's bytes until either side ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, Protocol

import msgspec
import structlog
import trio

from formation.core.codec import decode, encode
from formation.core.errors import (
    ConflictError,
    DecodeError,
    DeniedError,
    FormationError,
    UnavailableError,
    error_from_code,
)
from formation.core.grants import Role
from formation.core.ids import NodeId
from formation.core.spec import VmRecord
from formation.node.permit import check_key_in_force, check_signed, parse_permit
from formation.node.reads import Reads
from formation.p2p.framing import receive_frame, send_frame
from formation.p2p.service import P2pService
from formation.p2p.slots import Slots
from formation.p2p.transport import ByteStream

log = structlog.get_logger(__name__)

PROTOCOL = "/formation/attach/1"
PERMIT_VERB = "vm.attach"
# The permit and a few numbers; an answer's texts are cut to fit as well.
REQUEST_SIZE_MAX_BYTES = 4 * 1024
TEXT_LENGTH_MAX = 400
# A holder answers from memory, over a link that stands.
ANSWER_TIMEOUT_S = 10.0
CHUNK_SIZE_BYTES = 16 * 1024
# Each follows a console or log for as long as a person looks at it.
SESSION_COUNT_MAX = 64
# A node passes on what its users look at; one of many peers must leave room for the others.
SESSION_PER_PEER_MAX = 16
# An asker that takes nothing for so long. The muxer's own limit is the same; this one holds on any transport.
STALL_TIMEOUT_S = 60.0


_ROLE_OF = {"logs": Role.VIEWER, "console": Role.OPERATOR}


class Readable(Protocol):
    """A console or a stream to another node."""

    async def receive_some(self, size_max_bytes: int) -> bytes:
        """The next bytes; b"" at the end."""
        ...


class AttachRequest(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What the asker wants of the holder; array of four."""

    kind: Literal["logs", "console"]
    tail_lines: int
    follow: bool
    permit: bytes
    """The owner's signed intent."""


class Attach:
    """Serves this node's VMs to other nodes, and asks other nodes for theirs."""

    def __init__(self, *, reads: Reads, p2p: P2pService) -> None:
        self._reads = reads
        self._p2p = p2p
        self._slots = Slots(count_max=SESSION_COUNT_MAX, per_peer_max=SESSION_PER_PEER_MAX)
        self._typing: dict[str, list[ByteStream]] = {}
        """Consoles on other nodes that are open through this one, by VM; several people may look at one."""
        p2p.serve_stream(PROTOCOL, self._serve, is_bulk=True)

    @asynccontextmanager
    async def open(self, vm: VmRecord, request: AttachRequest) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of a log or console, from here or from the node that holds the VM.

        Raises:
          ConflictError: not placed yet, or not running.
          DeniedError: it is held elsewhere, and the permit is missing, not the owner's or not for it.
          UsageError: the permit is not one.
          UnavailableError: the holder does not answer.
        """
        if vm.placement is None:
            raise ConflictError(f"{vm.spec.name} has not been placed on a node yet", hint=f"formation vm show {vm.spec.name}")
        if vm.placement.node_id == self._reads.node_id:
            async with self._open_here(vm.vm_id, request) as chunks:
                yield chunks
            return
        if not request.permit:
            raise DeniedError(
                f"{vm.spec.name} runs on another node, which wants its owner's signature",
                hint="use the account that made it: FORMATION_ACCOUNT_KEY",
            )
        if parse_permit(request.permit).intent.object_id != vm.vm_id:
            raise DeniedError(f"the permit is not for {vm.spec.name}", hint="each VM wants its own")
        stream = await self._ask(NodeId(vm.placement.node_id), request)
        try:
            if request.kind == "console":
                self._typing.setdefault(vm.vm_id, []).append(stream)
            yield _chunks(stream)
        finally:
            self._stop_typing(vm.vm_id, stream)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def type(self, vm: VmRecord, data: bytes) -> None:
        """Type into a VM's console; into another node's through the console that is open here.

        Raises:
          ConflictError: the VM is not running here, and no console of it is open.
        """
        if vm.placement is not None and vm.placement.node_id == self._reads.node_id:
            await self._reads.vmm.write_console(vm.vm_id, data)
            return
        streams = self._typing.get(vm.vm_id)
        if not streams:
            raise ConflictError(f"no console of {vm.spec.name} is open", hint=f"formation vm console {vm.spec.name}")
        # Whichever it is, the guest's console is one; the newest is the likeliest to be whole.
        await streams[-1].send_all(data)

    def _stop_typing(self, vm_id: str, stream: ByteStream) -> None:
        left = [other for other in self._typing.pop(vm_id, []) if other is not stream]
        if left:
            self._typing[vm_id] = left

    @asynccontextmanager
    async def _open_here(self, vm_id: str, request: AttachRequest) -> AsyncIterator[AsyncIterator[bytes]]:
        vmm = self._reads.vmm
        if request.kind == "logs":
            yield _log(await vmm.read_log(vm_id, request.tail_lines), vmm.follow_log(vm_id) if request.follow else None)
            return
        console = await vmm.open_console(vm_id)
        try:
            yield _chunks(console)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await console.aclose()

    async def _ask(self, holder: NodeId, request: AttachRequest) -> ByteStream:
        try:
            stream = await self._p2p.open_stream(holder, PROTOCOL)
        except UnavailableError as exc:
            # By its name, and without the dialler's own words: people ask for a VM, not for an address.
            log.info("attach.holder_unreachable", holder=holder, reason=exc.message)
            name = self._reads.node_name(holder)
            raise UnavailableError(f"node {name}, which holds it, cannot be reached", hint="formation status") from exc
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await send_frame(stream, encode(request))
                answer = await receive_frame(stream, size_max_bytes=REQUEST_SIZE_MAX_BYTES)
            if answer:
                code, message, hint = decode(answer, tuple[str, str, str], what="attach answer")
                raise error_from_code(code, _printable(message), _printable(hint))
        except trio.TooSlowError as exc:
            await stream.aclose()
            name = self._reads.node_name(holder)
            raise UnavailableError(f"node {name} does not answer", hint="formation status") from exc
        except DecodeError as exc:
            await stream.aclose()
            name = self._reads.node_name(holder)
            raise UnavailableError(f"node {name} does not keep to the protocol", hint="it may run another version") from exc
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()
            raise
        return stream

    async def _serve(self, asker: NodeId, stream: ByteStream) -> None:
        try:
            with self._slots.take(asker):
                await self._serve_session(stream)
        except FormationError as exc:
            log.info("attach.refused", asker=asker, reason=exc.message)
            await _refuse(stream, exc)
        except trio.TooSlowError:
            log.info("attach.refused", asker=asker, reason="no request in time")

    async def _serve_session(self, stream: ByteStream) -> None:
        with trio.fail_after(ANSWER_TIMEOUT_S):
            request = decode(await receive_frame(stream, size_max_bytes=REQUEST_SIZE_MAX_BYTES), AttachRequest)
        vm = self._permitted(request)
        async with self._open_here(vm.vm_id, request) as chunks:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await send_frame(stream, b"")
            await self._copy(vm.vm_id, request, chunks, stream)

    def _permitted(self, request: AttachRequest) -> VmRecord:
        """The VM that the permit is for, if we hold it and who signed has the role."""
        permit = parse_permit(request.permit)
        check_signed(self._reads, permit)
        vm = self._reads.find_vm(permit.intent.object_id)
        role = self._reads.state.view.role(vm.vm_id, permit.account_id)
        if permit.intent.verb != PERMIT_VERB or role is None or role < _ROLE_OF[request.kind]:
            raise DeniedError(f"only its owner may look into {vm.spec.name}", hint="use the account that made it")
        check_key_in_force(self._reads, permit)
        if vm.placement is None or vm.placement.node_id != self._reads.node_id:
            raise ConflictError(f"{vm.spec.name} is not on this node any more", hint="try again")
        return vm

    async def _copy(self, vm_id: str, request: AttachRequest, chunks: AsyncIterator[bytes], stream: ByteStream) -> None:
        async def type_in() -> None:
            while data := await stream.receive_some(CHUNK_SIZE_BYTES):
                if request.kind == "console":
                    await self._reads.vmm.write_console(vm_id, data)
            # The asker went: stop following.
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(type_in)
                async for chunk in chunks:
                    # An asker that reads nothing: its person looks again, and its place is another's meanwhile.
                    with trio.move_on_after(STALL_TIMEOUT_S) as stall:
                        await stream.send_all(chunk)
                    if stall.cancelled_caught:
                        log.info("attach.stalled", vm_id=vm_id)
                        break
                nursery.cancel_scope.cancel()
        # The asker broke off, or the VM ended under its hands. A refusal now would be read as the guest's words.
        except* FormationError as ended:
            log.debug("attach.ended", vm_id=vm_id, reason=str(ended.exceptions[0]))


async def _log(tail: bytes, follow: AsyncIterator[bytes] | None) -> AsyncIterator[bytes]:
    yield tail
    if follow is not None:
        async for chunk in follow:
            yield chunk


async def _chunks(stream: Readable) -> AsyncIterator[bytes]:
    while chunk := await stream.receive_some(CHUNK_SIZE_BYTES):
        yield chunk


def _printable(text: str) -> str:
    """No control characters: this text of another node reaches terminals."""
    return "".join(c if c.isprintable() else " " for c in text[:TEXT_LENGTH_MAX])


async def _refuse(stream: ByteStream, error: FormationError) -> None:
    try:
        with trio.fail_after(ANSWER_TIMEOUT_S):
            await send_frame(stream, encode([error.code, error.message[:TEXT_LENGTH_MAX], error.hint[:TEXT_LENGTH_MAX]]))
    except (FormationError, trio.TooSlowError):
        log.debug("attach.refusal_unsent", reason=error.message)
