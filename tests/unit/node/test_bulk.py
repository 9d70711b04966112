"""The bulk door: what comes in by the socket, what goes out, and what is kept out."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import memory_stream_one_way_pair, wait_all_tasks_blocked

from formation.core.codec import decode, encode
from formation.core.errors import ConflictError, FormationError, HostError, NotFoundError, UsageError
from formation.core.spec import ValueRecord
from formation.node.bulk import (
    CONNECTION_COUNT_MAX,
    FRAME_SIZE_MAX_BYTES,
    HELD_SIZE_MAX_BYTES,
    IN_FLIGHT_COUNT_MAX,
    SOCKET_NAME,
    BulkDoor,
    Read,
    _Connection,
    view_reads,
)
from formation.p2p.frames import FrameDecoder, encode_frame
from formation.state.claims import Lease
from formation.state.service import Level, Token, WriteRequest

LANE = "ab" * 42
ACCOUNT = b"a" * 32
OP = ["node.advertised", "12D3", b"body"]


@dataclass
class FakeState:
    """Takes writes up and answers when the test says so, or at once."""

    answers_at_once: bool = False
    taken: list[tuple[Sequence[WriteRequest], Level]] = field(default_factory=list)
    waiting: list[Callable[[Token | FormationError], None]] = field(default_factory=list)

    def submit_nowait(self, ops: Sequence[WriteRequest], level: Level, done: Callable[[Token | FormationError], None]) -> None:
        self.taken.append((ops, level))
        if self.answers_at_once:
            done(token(len(self.taken)))
        else:
            self.waiting.append(done)


class Program:
    """A client: frames out, answers in."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._decoder = FrameDecoder(size_max_bytes=1 << 30)
        self._answers: list[Any] = []

    async def send(self, *requests: object) -> None:
        await self.stream.send_all(b"".join(encode_frame(encode(request)) for request in requests))

    async def receive(self, count: int = 1) -> list[Any]:
        """That many answers; fewer where the door closed the connection."""
        while len(self._answers) < count and (chunk := await self.stream.receive_some()):
            self._answers += [decode(frame, list) for frame in self._decoder.feed(chunk)]
        taken, self._answers = self._answers[:count], self._answers[count:]
        return taken

    async def is_closed(self) -> bool:
        return await self.receive() == []


class Hall:
    """A door that is open, and its visitors."""

    def __init__(self, state: FakeState, door: BulkDoor, path: Path) -> None:
        self.state = state
        self.door = door
        self.path = path

    @asynccontextmanager
    async def visit(self) -> AsyncIterator[Program]:
        async with await trio.open_unix_socket(str(self.path)) as stream:
            yield Program(stream)


@asynccontextmanager
async def open_door(
    folder: Path,
    *,
    answers_at_once: bool = False,
    reads: Mapping[str, Read] | None = None,
    allowed_uids: frozenset[int] | None = None,
) -> AsyncIterator[Hall]:
    state = FakeState(answers_at_once)
    path = folder / SOCKET_NAME
    door = BulkDoor(state=state, reads=reads or {}, path=path, allowed_uids=allowed_uids)
    async with trio.open_nursery() as nursery:
        await nursery.start(door.run)
        with trio.fail_after(20):
            yield Hall(state, door, path)
        nursery.cancel_scope.cancel()


def token(seq: int) -> Token:
    return Token(lane=LANE, seq=seq)


def write(request_id: int, *ops: object, level: int = 1) -> list[object]:
    return [request_id, "write", level, list(ops or [OP])]


async def test_a_write_is_answered_with_its_place(tmp_path: Path) -> None:
    """Every kind of op reaches the state as it was sent, in order, and the answer is where it stands."""
    async with open_door(tmp_path) as hall, hall.visit() as program:
        await program.send(write(7, OP, ["value.put", "k", b"v", ACCOUNT], b"intent", level=2))
        await wait_all_tasks_blocked()
        [(ops, level)] = hall.state.taken
        assert list(ops) == [
            WriteRequest(verb="node.advertised", object_id="12D3", body=b"body", account=None, intent=None),
            WriteRequest(verb="value.put", object_id="k", body=b"v", account=ACCOUNT, intent=None),
            WriteRequest(verb="", object_id="", body=b"", account=None, intent=b"intent"),
        ]
        assert level is Level.FINAL
        hall.state.waiting[0](token(3))
        assert await program.receive() == [[7, "ok", [LANE, 3]]]


@pytest.mark.parametrize(("number", "level"), list(enumerate([Level.OBSERVED, Level.CERTIFIED, Level.FINAL])))
async def test_levels_are_numbers_on_the_wire(tmp_path: Path, number: int, level: Level) -> None:
    """0, 1, 2 are observed, certified, final."""
    async with open_door(tmp_path, answers_at_once=True) as hall, hall.visit() as program:
        await program.send(write(1, level=number))
        await program.receive()
        assert hall.state.taken[0][1] is level


async def test_what_is_wrong_with_a_write_is_its_answer(tmp_path: Path) -> None:
    """Code, message and hint come through, and the connection goes on."""
    async with open_door(tmp_path) as hall, hall.visit() as program:
        await program.send(write(1), write(2))
        await wait_all_tasks_blocked()
        hall.state.waiting[0](ConflictError("held by another", hint="choose another key"))
        hall.state.waiting[1](token(1))
        assert await program.receive(2) == [[1, "conflict", "held by another", "choose another key"], [2, "ok", [LANE, 1]]]


async def test_answers_come_as_they_are_ready(tmp_path: Path) -> None:
    """A slow write holds up no other."""
    async with open_door(tmp_path) as hall, hall.visit() as program:
        await program.send(write(1, level=2), write(2))
        await wait_all_tasks_blocked()
        hall.state.waiting[1](token(2))
        assert await program.receive() == [[2, "ok", [LANE, 2]]]
        hall.state.waiting[0](token(1))
        assert await program.receive() == [[1, "ok", [LANE, 1]]]


async def test_answers_of_one_moment_leave_in_one_piece() -> None:
    """What one certificate answers is one write to the socket."""
    pieces = 0
    asks, requests = memory_stream_one_way_pair()
    answers, hears = memory_stream_one_way_pair()
    pump = answers.send_all_hook
    assert pump is not None

    async def count_piece() -> None:
        nonlocal pieces
        pieces += 1
        await pump()

    answers.send_all_hook = count_piece
    state = FakeState()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_Connection(trio.StapledStream(answers, requests), state, {}).serve)
        await asks.send_all(b"".join(encode_frame(encode(write(number))) for number in range(1, 51)))
        await wait_all_tasks_blocked()
        for seq, done in enumerate(state.waiting, start=1):
            done(token(seq))
        await wait_all_tasks_blocked()
        assert len(FrameDecoder(size_max_bytes=1000).feed(await hears.receive_some())) == 50
        assert pieces == 1
        await asks.aclose()


async def test_frames_may_come_in_pieces(tmp_path: Path) -> None:
    """A stream has no message boundaries."""
    async with open_door(tmp_path, answers_at_once=True) as hall, hall.visit() as program:
        for byte in encode_frame(encode(write(1))) + encode_frame(encode(write(2))):
            await program.stream.send_all(bytes([byte]))
        assert [answer[0] for answer in await program.receive(2)] == [1, 2]


async def test_more_requests_than_allowed_wait_outside(tmp_path: Path) -> None:
    """At the limit nothing more is taken up until something is answered."""
    async with open_door(tmp_path) as hall, hall.visit() as program, trio.open_nursery() as nursery:
        nursery.start_soon(program.send, *(write(number) for number in range(IN_FLIGHT_COUNT_MAX + 10)))
        await wait_all_tasks_blocked()
        assert len(hall.state.taken) == IN_FLIGHT_COUNT_MAX
        for done in hall.state.waiting[:4]:
            done(token(1))
        await wait_all_tasks_blocked()
        assert len(hall.state.taken) == IN_FLIGHT_COUNT_MAX + 4
        for done in hall.state.waiting[4:]:
            done(token(1))
        await wait_all_tasks_blocked()
        assert len(hall.state.taken) == IN_FLIGHT_COUNT_MAX + 10


async def test_large_requests_are_limited_by_their_bytes(tmp_path: Path) -> None:
    """A thousand large requests at once would be hundreds of megabytes."""
    size = 64 * 1024
    async with open_door(tmp_path) as hall, hall.visit() as program, trio.open_nursery() as nursery:
        nursery.start_soon(program.send, *(write(number, ["value.put", "k", bytes(size)]) for number in range(100)))
        await wait_all_tasks_blocked()
        assert len(hall.state.taken) == HELD_SIZE_MAX_BYTES // size
        nursery.cancel_scope.cancel()


async def test_answers_that_nobody_reads_are_limited(tmp_path: Path) -> None:
    """A program that asks and never listens makes us hold no more than the limit and what the kernel takes."""
    count = 0

    def read(_level: Level, _key: str) -> bytes:
        nonlocal count
        count += 1
        return bytes(32 * 1024)

    async with open_door(tmp_path, reads={"value": read}) as hall, hall.visit() as program, trio.open_nursery() as nursery:
        nursery.start_soon(program.send, *([number, "read", "value", 1, "k"] for number in range(IN_FLIGHT_COUNT_MAX)))
        await wait_all_tasks_blocked()
        # What the kernel took of it (its buffers are below a megabyte) was released for more.
        assert HELD_SIZE_MAX_BYTES <= count * 32 * 1024 < 3 * HELD_SIZE_MAX_BYTES
        assert len(await program.receive(IN_FLIGHT_COUNT_MAX)) == IN_FLIGHT_COUNT_MAX


BAD = {
    "not CBOR": (b"\xff", 0),
    "an empty frame": (b"", 0),
    "no list": (encode("write"), 0),
    "an empty list": (encode([]), 0),
    "a negative id": (encode([-1, "write", 1, [OP]]), 0),
    "a longer form of an integer": (bytes.fromhex("84" + "1807") + encode(write(7))[2:], 0),
    "a bignum as id": (bytes.fromhex("83c2490100000000000000006161" + "00"), 0),
    "something behind it": (encode(write(7)) + b"\0", 0),
    "a level that there is not": (encode(write(7, level=3)), 7),
    "true for a level": (encode([7, "write", True, [OP]]), 7),
    "no ops": (encode([7, "write", 1, []]), 7),
    "too many ops": (encode(write(7, *[[*OP]] * 1025)), 7),
    "an op too short": (encode(write(7, ["verb", "id"])), 7),
    "an op too long": (encode(write(7, ["verb", "id", b"", ACCOUNT, b""])), 7),
    "text for a body": (encode(write(7, ["verb", "id", "body"])), 7),
    "no account's key": (encode(write(7, ["verb", "id", b"", b"a" * 31])), 7),
    "a number for an op": (encode(write(7, 5)), 7),
    "a field too many": (encode([*write(7), 0]), 7),
    "a read without key": (encode([7, "read", "value", 1]), 7),
    "a number for a name": (encode([7, 5]), 7),
}


@pytest.mark.parametrize("name", BAD)
async def test_bytes_that_are_no_request_end_the_connection(tmp_path: Path, name: str) -> None:
    """One clear answer, then the end; nothing of it is written."""
    payload, request_id = BAD[name]
    async with open_door(tmp_path, reads={"value": lambda level, key: None}) as hall, hall.visit() as program:
        await program.stream.send_all(encode_frame(payload))
        [[answered, code, message, hint]] = await program.receive()
        assert (answered, code) == (request_id, "usage")
        assert message
        assert "bulk.cddl" in hint
        assert hall.state.taken == []
        # At once, not when its last word has had its time.
        await wait_all_tasks_blocked()
        assert hall.door.connection_count == 0
        assert await program.is_closed()


async def test_a_frame_too_long_ends_the_connection(tmp_path: Path) -> None:
    """Its length alone is enough: nothing of it is waited for."""
    async with open_door(tmp_path) as hall, hall.visit() as program:
        await program.stream.send_all((FRAME_SIZE_MAX_BYTES + 1).to_bytes(4, "big"))
        [[request_id, code, _, _]] = await program.receive()
        assert (request_id, code) == (0, "usage")
        assert await program.is_closed()


async def test_what_was_taken_up_before_a_bad_frame_is_not_undone(tmp_path: Path) -> None:
    """Bad bytes end a connection, not the writes before them."""
    async with open_door(tmp_path, answers_at_once=True) as hall, hall.visit() as program:
        await program.stream.send_all(encode_frame(encode(write(1))) + encode_frame(b"\xff"))
        assert [answer[:2] for answer in await program.receive(2)] == [[1, "ok"], [0, "usage"]]
        assert len(hall.state.taken) == 1


async def test_an_unknown_request_is_refused_and_the_connection_goes_on(tmp_path: Path) -> None:
    """Newer programs may ask older nodes."""
    async with open_door(tmp_path, answers_at_once=True) as hall, hall.visit() as program:
        await program.send([1, "follow", "value", 3, 4, 5], write(2))
        [refused, written] = await program.receive(2)
        assert refused[:2] == [1, "usage"]
        assert "follow" in refused[2]
        assert written[:2] == [2, "ok"]


async def test_reads_see_the_level_that_was_asked_for(tmp_path: Path) -> None:
    """A read gets level and key, its value is the answer, and its error too."""

    def claim(level: Level, key: str) -> list[object] | None:
        if key == "missing":
            raise NotFoundError("no such space", hint="see the list")
        return [level.value, key] if key else None

    async with open_door(tmp_path, reads={"claim": claim}) as hall, hall.visit() as program:
        await program.send(
            [1, "read", "claim", 2, "seat/1"],
            [2, "read", "claim", 0, ""],
            [3, "read", "claim", 1, "missing"],
            [4, "read", "weather", 1, "k"],
        )
        assert await program.receive(4) == [
            [1, "ok", ["final", "seat/1"]],
            [2, "ok", None],
            [3, "not_found", "no such space", "see the list"],
            [4, "usage", "nothing called 'weather' can be read", "one of: claim"],
        ]


class FakeView:
    """One value and one lease."""

    def value(self, account_id: str, key: str, level: Level, /) -> ValueRecord | None:
        if (account_id, key) != ("did:key:z6Mk", "a/b"):
            return None
        return ValueRecord(account=account_id, key=key, value=level.value.encode(), count=0, seen=())

    def lease(self, space: str, key: str, /) -> Lease | None:
        return Lease("12D3", (7, 2), 1, 99, 98, "") if (space, key) == ("seat", "a/b") else None


async def test_values_and_claims_can_be_read(tmp_path: Path) -> None:
    """By the ids that their operations have; what is not there is null."""
    async with open_door(tmp_path, reads=view_reads(FakeView)) as hall, hall.visit() as program:
        await program.send(
            [1, "read", "value", 1, "did:key:z6Mk/a/b"],
            [2, "read", "value", 1, "did:key:z6Mk/a"],
            [3, "read", "claim", 2, "seat/a/b"],
            [4, "read", "claim", 2, "seat"],
        )
        assert await program.receive(4) == [
            [1, "ok", b"certified"],
            [2, "ok", None],
            [3, "ok", ["12D3", [7, 2], 99]],
            [4, "ok", None],
        ]


async def test_the_end_of_the_stream_ends_the_connection(tmp_path: Path) -> None:
    """What was under way goes on, and its late answer is nobody's."""
    async with open_door(tmp_path) as hall:
        async with hall.visit() as program:
            await program.send(write(1))
            await wait_all_tasks_blocked()
            assert hall.door.connection_count == 1
        await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert hall.door.connection_count == 0
        hall.state.waiting[0](token(1))


async def test_a_program_that_dies_takes_nobody_along(tmp_path: Path) -> None:
    """Its unread answers go nowhere; others are served."""
    async with open_door(tmp_path, reads={"value": lambda level, key: bytes(32 * 1024)}) as hall:
        async with hall.visit() as program:
            await program.send(*([number, "read", "value", 1, "k"] for number in range(IN_FLIGHT_COUNT_MAX)))
            await wait_all_tasks_blocked()
        async with hall.visit() as other:
            await other.send([1, "read", "value", 1, "k"])
            assert len(await other.receive()) == 1
        await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert hall.door.connection_count == 0


async def test_connections_are_limited(tmp_path: Path) -> None:
    """One too many is told so; a place that gets free is given away again."""
    async with open_door(tmp_path, answers_at_once=True) as hall:
        visits = [hall.visit() for _ in range(CONNECTION_COUNT_MAX)]
        for visit in visits:
            await visit.__aenter__()
        await wait_all_tasks_blocked()
        assert hall.door.connection_count == CONNECTION_COUNT_MAX
        async with hall.visit() as program:
            assert [answer[:2] for answer in await program.receive()] == [[0, "unavailable"]]
            assert await program.is_closed()
        await visits[0].__aexit__(None, None, None)
        await wait_all_tasks_blocked()
        async with hall.visit() as program:
            await program.send(write(1))
            assert [answer[:2] for answer in await program.receive()] == [[1, "ok"]]
        for visit in visits[1:]:
            await visit.__aexit__(None, None, None)


async def test_other_users_are_refused(tmp_path: Path) -> None:
    """By the peer's credentials, even where the socket's mode would let them in."""
    async with open_door(tmp_path, allowed_uids=frozenset({os.geteuid() + 1})) as hall, hall.visit() as program:
        [[request_id, code, _, _]] = await program.receive()
        assert (request_id, code) == (0, "denied")
        assert await program.is_closed()


async def test_the_socket_is_its_owner_s_alone_and_goes_with_the_door(tmp_path: Path) -> None:
    """Mode 0600 while it is there; nothing left afterwards; the process's own mask as before."""
    mask = os.umask(0o022)
    try:
        async with open_door(tmp_path) as hall:
            assert stat.S_IMODE(hall.path.stat().st_mode) == 0o600
        assert list(tmp_path.iterdir()) == []
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)


async def test_a_dead_node_s_socket_makes_way(tmp_path: Path) -> None:
    """A node that was killed leaves its socket behind."""
    async with open_door(tmp_path) as hall:
        os.link(hall.path, tmp_path / "left")
    (tmp_path / "left").rename(tmp_path / SOCKET_NAME)
    async with open_door(tmp_path, answers_at_once=True) as hall, hall.visit() as program:
        await program.send(write(1))
        assert len(await program.receive()) == 1


async def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    """Somebody's file is not removed for ours."""
    (tmp_path / SOCKET_NAME).write_text("mine")
    with pytest.RaisesGroup(HostError):
        async with open_door(tmp_path):
            pass
    assert (tmp_path / SOCKET_NAME).read_text() == "mine"


async def test_a_path_too_long_for_the_kernel_is_said_so(tmp_path: Path) -> None:
    """sun_path has 108 bytes."""
    door = BulkDoor(state=FakeState(), reads={}, path=tmp_path / ("x" * 110))
    with pytest.raises(UsageError, match="longer"):
        await door.run()
