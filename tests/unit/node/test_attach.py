"""Logs and consoles of VMs on other nodes: a voter that runs them, and an observer that is asked."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.testing

from formation.core.codec import encode
from formation.core.errors import FormationError
from formation.core.intent import LIFETIME_MS
from formation.core.spec import Placement, VmRecord
from formation.node.attach import (
    ANSWER_TIMEOUT_S,
    PROTOCOL,
    REQUEST_SIZE_MAX_BYTES,
    SESSION_PER_PEER_MAX,
    STALL_TIMEOUT_S,
    AttachRequest,
)
from formation.node.permit import PERMIT_SIZE_MAX_BYTES
from formation.p2p.transport import ByteStream
from formation.vmm.twin import TwinVm
from tests.unit.node.asgi import Answer
from tests.unit.node.nodes import OTHER, Nodes, eventually, now_ms, running

Clock = trio.abc.Clock
HOLDER, ASKER = 0, 1


@asynccontextmanager
async def two_nodes(folder: Path) -> AsyncIterator[tuple[Nodes, str, TwinVm]]:
    """A VM on the holder, which the asker knows of."""
    async with running(folder, observers=1) as nodes:
        vm_id, guest = await nodes.boot()
        await nodes.phase(vm_id, "running", ASKER)
        await guest.console.feed(b"one\ntwo\n")
        yield nodes, vm_id, guest


async def logs(nodes: Nodes, permit: str, query: str = "") -> Answer:
    return await nodes.client(ASKER).get("/v1/vms/web/logs", query, formation_permit=permit)


async def test_the_log_of_a_vm_elsewhere(tmp_path: Path, jumping_clock: Clock) -> None:
    """With the owner's permit, any node shows it."""
    async with two_nodes(tmp_path) as (nodes, vm_id, _):
        answer = await logs(nodes, nodes.permit(vm_id), "tail=1")
        assert (answer.status, answer.body, answer.is_whole) == (200, b"two\n", True)


async def test_a_log_elsewhere_is_followed(tmp_path: Path, jumping_clock: Clock) -> None:
    """Until the VM ends; what is typed along goes nowhere."""
    async with two_nodes(tmp_path) as (nodes, vm_id, guest):
        headers = {"formation_permit": nodes.permit(vm_id)}
        async with nodes.client(ASKER).open("GET", "/v1/vms/web/logs", "follow=1", headers=headers) as call:
            await call.until(b"two\n")
            await eventually(lambda: bool(guest.console._followers))
            await guest.console.feed(b"three\n")
            await call.until(b"three\n")
            guest.crash("the guest powered itself off")
            assert await call.piece() == b""
        assert call.answer.is_whole
        assert guest.typed == b""


async def test_a_console_elsewhere_and_typing(tmp_path: Path, jumping_clock: Clock) -> None:
    """Bytes both ways through the asked node; who goes leaves nothing behind at the holder."""
    async with two_nodes(tmp_path) as (nodes, vm_id, guest):
        client, headers = nodes.client(ASKER), {"formation_permit": nodes.permit(vm_id)}
        async with client.open("GET", "/v1/vms/web/console", headers=headers) as call:
            await call.until(b"two\n")
            assert (await client.post("/v1/vms/web/console/input", b"ls\n")).status == 204
            await eventually(lambda: guest.typed == b"ls\n")
            await guest.console.feed(b"bin\n")
            await call.until(b"bin\n")
        await eventually(lambda: len(nodes[HOLDER].attach._slots) == 0)
        assert guest.console._followers == []
        assert (await client.post("/v1/vms/web/console/input", b"x")).error() == (409, "conflict")


async def test_two_people_at_one_console_elsewhere(tmp_path: Path, jumping_clock: Clock) -> None:
    """When the second goes, the first types on."""
    async with two_nodes(tmp_path) as (nodes, vm_id, guest):
        client, headers = nodes.client(ASKER), {"formation_permit": nodes.permit(vm_id)}
        async with client.open("GET", "/v1/vms/web/console", headers=headers) as first:
            await first.until(b"two\n")
            async with client.open("GET", "/v1/vms/web/console", headers=headers) as second:
                await second.until(b"two\n")
            assert (await client.post("/v1/vms/web/console/input", b"still here")).status == 204
            await eventually(lambda: guest.typed == b"still here")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda nodes, vm_id: "", (403, "denied")),
        (lambda nodes, vm_id: nodes.permit(vm_id, key=OTHER), (403, "denied")),
        (lambda nodes, vm_id: nodes.permit(vm_id, verb="vm.deleted"), (403, "denied")),
        (lambda nodes, vm_id: nodes.permit("vm-aaaaaaaaaaaaaaaa"), (403, "denied")),
        (lambda nodes, vm_id: nodes.permit(vm_id, network_id=b"x" * 32), (403, "denied")),
        (lambda nodes, vm_id: nodes.permit(vm_id, created_ms=now_ms() - LIFETIME_MS), (403, "denied")),
        (lambda nodes, vm_id: nodes.permit(vm_id, body=b"x" * PERMIT_SIZE_MAX_BYTES), (400, "usage")),
        (lambda nodes, vm_id: base64.urlsafe_b64encode(b"no permit").decode(), (400, "usage")),
        (lambda nodes, vm_id: "not base64!", (400, "usage")),
        (lambda nodes, vm_id: "\xe9", (400, "usage")),
    ],
)
async def test_without_its_owners_permit_a_vm_elsewhere_is_closed(
    make: Callable[[Nodes, str], str], expected: tuple[int, str], tmp_path: Path, jumping_clock: Clock
) -> None:
    """Another account's, another verb's, another VM's, another network's, an old one: none opens."""
    async with two_nodes(tmp_path) as (nodes, vm_id, _):
        assert (await logs(nodes, make(nodes, vm_id))).error() == expected


@asynccontextmanager
async def asked(nodes: Nodes) -> AsyncIterator[ByteStream]:
    """A stream to the holder by somebody who does not keep to our code."""
    stream = await nodes[ASKER].p2p.open_stream(nodes[HOLDER].key.node_id, PROTOCOL)
    try:
        yield stream
    finally:
        await stream.aclose()


async def answer_to(stream: ByteStream, payload: bytes) -> bytes:
    await stream.send_all(len(payload).to_bytes(4, "big") + payload)
    return await stream.receive_some(10_000)


def request(permit: str, kind: str = "logs") -> bytes:
    return encode([kind, 10, False, base64.urlsafe_b64decode(permit)])


async def test_the_holder_judges_for_itself(tmp_path: Path, jumping_clock: Clock) -> None:
    """An asker that skips its own checks gains nothing by it."""
    async with two_nodes(tmp_path) as (nodes, vm_id, _):
        for payload, code in (
            (b"\xff", b"decode"),
            (encode(["disk", 1, True, b""]), b"decode"),
            (encode(["logs", 1, True, b"x"]), b"usage"),
            (encode(["logs", 1, True, b"x" * (PERMIT_SIZE_MAX_BYTES + 1)]), b"usage"),
            (request(nodes.permit(vm_id, key=OTHER)), b"denied"),
            (request(nodes.permit("vm-aaaaaaaaaaaaaaaa")), b"not_found"),
        ):
            async with asked(nodes) as stream:
                assert code in await answer_to(stream, payload)
        async with asked(nodes) as stream:
            await stream.send_all((REQUEST_SIZE_MAX_BYTES + 1).to_bytes(4, "big"))
            assert b"decode" in await stream.receive_some(10_000)
        await eventually(lambda: len(nodes[HOLDER].attach._slots) == 0)


async def test_a_vm_that_moved_is_not_served(tmp_path: Path, jumping_clock: Clock) -> None:
    """The holder looks whether it holds the VM still."""
    async with running(tmp_path, observers=1, hosts=frozenset()) as nodes:
        vm_id = await nodes.create(await nodes.build())
        async with asked(nodes) as stream:
            assert b"conflict" in await answer_to(stream, request(nodes.permit(vm_id)))


async def test_a_console_that_does_not_run_elsewhere_is_refused(tmp_path: Path, jumping_clock: Clock) -> None:
    """The holder's error arrives as the error it is."""
    async with two_nodes(tmp_path) as (nodes, vm_id, guest):
        guest.crash("the guest powered itself off")
        await nodes.phase(vm_id, "stopped")
        answer = await nodes.client(ASKER).get("/v1/vms/web/console", formation_permit=nodes.permit(vm_id))
        assert answer.error() == (409, "conflict")


async def test_only_so_many_sessions_are_served(tmp_path: Path, jumping_clock: Clock) -> None:
    """Of one peer, so that it does not keep the others out. One more is told so; and there is room again when one ends."""
    async with two_nodes(tmp_path) as (nodes, vm_id, _):
        holder = nodes[HOLDER].key.node_id
        streams = [await nodes[ASKER].p2p.open_stream(holder, PROTOCOL) for _ in range(SESSION_PER_PEER_MAX)]
        await eventually(lambda: len(nodes[HOLDER].attach._slots) == SESSION_PER_PEER_MAX)
        answer = await logs(nodes, nodes.permit(vm_id))
        assert answer.error() == (503, "unavailable")
        assert "too many" in answer.json()["error"]["message"]
        await streams[0].aclose()
        await eventually(lambda: len(nodes[HOLDER].attach._slots) < SESSION_PER_PEER_MAX)
        assert (await logs(nodes, nodes.permit(vm_id))).status == 200


async def test_who_opens_a_session_and_says_nothing_is_let_go(tmp_path: Path, jumping_clock: Clock) -> None:
    """Its place is free again after a while."""
    async with two_nodes(tmp_path) as (nodes, _, __), asked(nodes) as stream:
        began = trio.current_time()
        assert await stream.receive_some(1) == b""
        assert trio.current_time() - began == pytest.approx(ANSWER_TIMEOUT_S, abs=1)
        assert len(nodes[HOLDER].attach._slots) == 0


async def test_a_holder_that_vanishes_breaks_the_stream_off(tmp_path: Path, jumping_clock: Clock) -> None:
    """The body has no end, so nobody takes it for a guest that said all it had to say."""
    async with two_nodes(tmp_path) as (nodes, vm_id, _):
        headers = {"formation_permit": nodes.permit(vm_id)}
        with structlog.testing.capture_logs() as lines:
            async with nodes.client(ASKER).open("GET", "/v1/vms/web/logs", "follow=1", headers=headers) as call:
                await call.until(b"two\n")
                await nodes.stop(HOLDER)
                assert await call.piece() == b""
        assert not call.answer.is_whole
        assert call.answer.raised is None
        assert "stream.failed" in [line["event"] for line in lines]
        answer = await logs(nodes, nodes.permit(vm_id))
        assert answer.error() == (503, "unavailable")


async def test_an_asker_that_vanishes_is_no_failure(tmp_path: Path, jumping_clock: Clock) -> None:
    """In the middle of what it was sent: the holder logs no error, and follows no more."""
    async with two_nodes(tmp_path) as (nodes, vm_id, guest):
        with structlog.testing.capture_logs() as lines:
            async with asked(nodes) as stream:
                assert await answer_to(stream, encode(["console", 0, True, base64.urlsafe_b64decode(nodes.permit(vm_id))]))
                # More than the stream takes, so that the holder is sending when the asker goes.
                for _ in range(40):
                    await guest.console.feed(b"x" * 16_000)
                await trio.testing.wait_all_tasks_blocked()
            await eventually(lambda: len(nodes[HOLDER].attach._slots) == 0)
            await trio.sleep(1)
        assert [line for line in lines if line["log_level"] in ("warning", "error")] == []
        assert guest.console._followers == []


async def test_an_asker_that_ends_its_side_ends_the_session(tmp_path: Path, jumping_clock: Clock) -> None:
    """Who types no more looks no more."""
    async with two_nodes(tmp_path) as (nodes, vm_id, guest), asked(nodes) as stream:
        assert await answer_to(stream, encode(["console", 0, True, base64.urlsafe_b64decode(nodes.permit(vm_id))]))
        await stream.send_eof()
        while await stream.receive_some(1000):
            pass
        assert guest.console._followers == []


async def test_a_vm_that_ends_while_somebody_types_ends_the_session(tmp_path: Path, jumping_clock: Clock) -> None:
    """No refusal is mixed into the guest's words."""
    async with two_nodes(tmp_path) as (nodes, vm_id, guest):
        async with asked(nodes) as stream:
            assert await answer_to(stream, encode(["console", 0, True, base64.urlsafe_b64decode(nodes.permit(vm_id))]))
            read = b""
            guest.console.close = lambda: None  # type: ignore[method-assign] # its end is not heard of yet
            guest.crash("killed")
            await stream.send_all(b"x")
            while chunk := await stream.receive_some(1000):
                read += chunk
        assert b"conflict" not in read


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, (503, "unavailable")),
        (b"", (503, "unavailable")),
        (b"\x00\x00\x00\x01\xff", (503, "unavailable")),
        (b"\xff\xff\xff\xff", (503, "unavailable")),
        (b"\x00\x00\x00\x10short", (503, "unavailable")),
        (encode(["gone", "red \x1b[31m\x07", "hint\r\n"]), (500, "failed")),
    ],
)
async def test_a_holder_that_answers_nonsense(
    answer: bytes | None, expected: tuple[int, str], tmp_path: Path, jumping_clock: Clock
) -> None:
    """Is as good as none; and its words reach no terminal with control characters."""
    async with two_nodes(tmp_path) as (nodes, vm_id, _):

        async def serve(_: object, stream: ByteStream) -> None:
            if answer is None:
                await trio.sleep_forever()
            elif answer[:1] == b"\x83":
                await stream.send_all(len(answer).to_bytes(4, "big") + answer)
            elif answer:
                await stream.send_all(answer)

        nodes[HOLDER].p2p.serve_stream(PROTOCOL, serve)
        got = await logs(nodes, nodes.permit(vm_id))
        assert got.error() == expected
        error = got.json()["error"]
        assert (error["message"] + error["hint"]).isprintable()


async def test_a_refusal_that_nobody_hears_is_let_go(tmp_path: Path, jumping_clock: Clock) -> None:
    """The asker went before it was answered."""
    async with two_nodes(tmp_path) as (nodes, _, __):
        with structlog.testing.capture_logs() as lines:
            async with asked(nodes) as stream:
                await stream.send_all(b"\xff\xff\xff\xff")
            await trio.sleep(1)
            await eventually(lambda: len(nodes[HOLDER].attach._slots) == 0)
        assert [line for line in lines if line["log_level"] in ("warning", "error")] == []


async def test_a_holder_nobody_knows_is_unavailable(tmp_path: Path, jumping_clock: Clock) -> None:
    """The asker tries, then says so."""
    async with two_nodes(tmp_path) as (nodes, vm_id, _):
        vm = nodes[ASKER].state.view.vm(vm_id)
        assert vm is not None
        nodes.network.partition([nodes[ASKER].key.node_id])
        wanted = AttachRequest("logs", 1, False, base64.urlsafe_b64decode(nodes.permit(vm_id)))
        with pytest.raises(FormationError) as caught:
            async with nodes[ASKER].attach.open(vm, wanted):
                raise AssertionError
        assert caught.value.code == "unavailable"
        assert isinstance(vm, VmRecord)
        assert isinstance(vm.placement, Placement)


async def test_an_asker_that_reads_nothing_is_let_go(tmp_path: Path, jumping_clock: Clock) -> None:
    """What the guest writes meanwhile holds no task of the holder's for longer than that."""
    async with two_nodes(tmp_path) as (nodes, vm_id, guest), asked(nodes) as stream:
        payload = encode(["console", 0, True, base64.urlsafe_b64decode(nodes.permit(vm_id))])
        await stream.send_all(len(payload).to_bytes(4, "big") + payload)
        await eventually(lambda: bool(guest.console._followers))
        began = trio.current_time()
        # What the stream's window takes, and a little more.
        for _ in range(20):
            with trio.move_on_after(1):
                await guest.console.feed(b"x" * 16_384)
        await trio.sleep(STALL_TIMEOUT_S / 2)
        assert len(nodes[HOLDER].attach._slots) == 1
        await eventually(lambda: not len(nodes[HOLDER].attach._slots), STALL_TIMEOUT_S)
        assert trio.current_time() - began < 2 * STALL_TIMEOUT_S
