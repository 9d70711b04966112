"""The bulk door: a unix socket for programs of this machine that write much.

The HTTP API takes one wish at a time from a person. Here a program keeps thousands of requests under way on one
connection, and pays neither for HTTP nor for a task, an event or a timer of each.

Protocol. Both ways go frames (p2p/frames: 4-byte big-endian length, then so many bytes of deterministic CBOR; rules in
`schemas/bulk.cddl`):

    [id, "write", level, [op, …]]      ->  [id, "ok", [lane, seq]]
    [id, "read", what, level, key]     ->  [id, "ok", value]
    any                                ->  [id, code, message, hint]      codes are those of core/errors

- `id` is the client's; answers come in the order in which they are ready, not in that of the requests.
- `level` says when a write is answered, and which state a read sees: 0 observed (on disk here and sent to the others),
  1 certified (2f+1 voters have it on disk), 2 final (in the order that all nodes share). A write that turned out to
  have no effect is answered by an error, where its level can know it.
- An `op` is one of
      [verb, object_id, body]            by the node itself: the events that a node may write
      [verb, object_id, body, account]   in an account's name (its 32-byte key), under a delegation to this node
      bytes                              an account's own intent, signed (COSE_Sign1)
  and the ops of one request enter this node's lane in their order.
- Requests of one connection are taken up in the order in which they were sent; a read does not wait for the writes
  before it. Whoever must read what others wrote sends a write of level 2 first: the state that it is final in holds
  all that was final anywhere before it was sent.
- A request of an unknown name is refused and the connection goes on, so newer clients may ask. Bytes that are no
  request are answered once (with the id, if there was one, else 0), and the connection ends.
- The client keeps its side open until it has its answers: the end of its stream ends the connection. Writes that were
  taken up go on without it.

Back-pressure. While a connection has as much under way as it may (requests, and bytes of requests and of answers not
yet sent), nothing more is read of it: the kernel's buffer fills, and the program's writes wait.

Who may come in: the user that the node runs as, and root. The socket's mode says so, and the peer's credentials are
looked at as well, for a mode can be changed and a directory moved.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio

from formation.core.codec import decode, encode
from formation.core.config import check_socket_path
from formation.core.errors import DecodeError, DeniedError, FormationError, HostError, UnavailableError, UsageError
from formation.core.ids import PUBLIC_KEY_SIZE_BYTES
from formation.core.spec import ValueRecord
from formation.p2p.frames import FrameDecoder, encode_frame
from formation.p2p.transport import TaskStatus
from formation.state.claims import Lease
from formation.state.lane import BLOCK_OP_COUNT_MAX
from formation.state.service import Level, Token, WriteRequest

SOCKET_NAME = "bulk.sock"
# One request becomes at most one block's worth (256 KiB); its accounts and lengths need a little more.
FRAME_SIZE_MAX_BYTES = 320 * 1024
# A client that waits for certificates (10 ms) gets 100,000 requests a second through with so many under way.
IN_FLIGHT_COUNT_MAX = 1024
# Requests and answers that one connection makes us hold; one more frame may stand above it.
HELD_SIZE_MAX_BYTES = 1024 * 1024
# Programs of one user on one machine; with the limit above they hold 64 MiB at worst.
CONNECTION_COUNT_MAX = 64
RECEIVE_SIZE_BYTES = 64 * 1024
# A client that does not read its last answer must not keep its place for it.
LAST_WORD_S = 1.0
_LISTEN_BACKLOG = 16
# The id of an answer to what had none.
_NO_ID = 0
# unix(7): struct ucred is pid, uid, gid.
_UCRED = struct.Struct("3i")
_SOCKET_UMASK = 0o177
_LEVELS = (Level.OBSERVED, Level.CERTIFIED, Level.FINAL)

Read = Callable[[Level, str], Any]
"""(level, key) -> a plain CBOR value; raises FormationError."""


class Writes(Protocol):
    """What the door needs of the state service."""

    def submit_nowait(self, ops: Sequence[WriteRequest], level: Level, done: Callable[[Token | FormationError], None]) -> None:
        """Take ops up in their order; `done` is called once, in this thread, at the level or with what is wrong."""
        ...


class Views(Protocol):
    """What reads need of the state's view."""

    def value(self, account_id: str, key: str, level: Level, /) -> ValueRecord | None:
        """One value of an account."""
        ...

    def lease(self, space: str, key: str, /) -> Lease | None:
        """Who holds a key of a space."""
        ...


def view_reads(view: Callable[[], Views]) -> dict[str, Read]:
    """What programs may look at, in the view of the moment at which they look.

    | name | key | value |
    |---|---|---|
    | value | `ACCOUNT_ID/KEY` | its bytes; null: none |
    | claim | `SPACE/KEY` | [holder, [height, index] of the fence, expires_ms by the spine's time or 0]; null: free |

    Claims are decided in the final order alone, so they are the same at each level.
    """

    def read_value(level: Level, object_id: str) -> bytes | None:
        account_id, _, key = object_id.partition("/")
        record = view().value(account_id, key, level)
        return None if record is None else record.value

    def read_claim(_level: Level, object_id: str) -> list[Any] | None:
        space, _, key = object_id.partition("/")
        lease = view().lease(space, key)
        return None if lease is None else [lease.owner, list(lease.fence), lease.expires_ms]

    return {"value": read_value, "claim": read_claim}


class BulkDoor:
    """Listens while it runs.

    Args:
      path: where the socket shall be; nobody else uses the place, so what lies there is a dead node's.
      reads: what clients may look at, by name.
      allowed_uids: users that may connect; None: the node's own and root.
    """

    def __init__(
        self, *, state: Writes, reads: Mapping[str, Read], path: Path, allowed_uids: frozenset[int] | None = None
    ) -> None:
        self._state = state
        self._reads = reads
        self._path = path
        self._allowed_uids = frozenset({os.geteuid(), 0}) if allowed_uids is None else allowed_uids
        self.connection_count = 0

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then the socket is gone.

        Raises:
          UsageError: the path is too long for a socket.
          HostError: the directory refused.
        """
        listener = self._listen()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(trio.serve_listeners, self._serve, [listener])
                task_status.started(None)
        finally:
            self._path.unlink(missing_ok=True)

    def _listen(self) -> trio.SocketListener:
        check_socket_path(self._path)
        bound = socket.socket(socket.AF_UNIX)
        # The socket has its mode from its first moment on; nothing awaits before the mask is back.
        mask = os.umask(_SOCKET_UMASK)
        try:
            # Only a socket: bind refuses where anything else lies.
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(self._path.lstat().st_mode):
                    self._path.unlink()
            bound.bind(str(self._path))
            bound.listen(_LISTEN_BACKLOG)
        except OSError as exc:
            bound.close()
            raise HostError(
                f"cannot listen at {self._path}: {exc.strerror}", hint="check the directory, its owner too"
            ) from exc
        finally:
            os.umask(mask)
        return trio.SocketListener(trio.socket.from_stdlib_socket(bound))

    async def _serve(self, stream: trio.SocketStream) -> None:
        connection = _Connection(stream, self._state, self._reads)
        if _peer_uid(stream) not in self._allowed_uids:
            await connection.refuse(DeniedError("only the node's own user may write here", hint="sudo -u that user"))
            return
        if self.connection_count >= CONNECTION_COUNT_MAX:
            await connection.refuse(
                UnavailableError(f"{CONNECTION_COUNT_MAX} programs are connected already", hint="share a connection")
            )
            return
        self.connection_count += 1
        try:
            await connection.serve()
        finally:
            self.connection_count -= 1


class _Connection:
    """One program's stream: a reader that takes requests up, a writer that sends what answers there are, in one piece."""

    __slots__ = (
        "_answered",
        "_answers",
        "_count",
        "_decoder",
        "_held_bytes",
        "_is_ending",
        "_reads",
        "_room",
        "_state",
        "_stream",
    )

    def __init__(self, stream: trio.abc.Stream, state: Writes, reads: Mapping[str, Read]) -> None:
        self._stream = stream
        self._state = state
        self._reads = reads
        self._decoder = FrameDecoder(size_max_bytes=FRAME_SIZE_MAX_BYTES)
        self._answers: list[bytes] = []
        self._count = 0
        """Requests taken up whose answers are not with the kernel."""
        self._held_bytes = 0
        """Of those requests while they have no answer, and of their answers afterwards."""
        self._is_ending = False
        self._answered = trio.Event()
        self._room = trio.Event()

    async def refuse(self, error: FormationError) -> None:
        """Say why, then close."""
        self._answer(_NO_ID, 0, error)
        self._is_ending = True
        async with self._stream:
            with trio.move_on_after(LAST_WORD_S), contextlib.suppress(trio.BrokenResourceError):
                await self._write()

    async def serve(self) -> None:
        """Serve until the client ends its stream or breaks the protocol."""
        async with self._stream, trio.open_nursery() as nursery:
            nursery.start_soon(self._write_and_cancel, nursery.cancel_scope)
            try:
                await self._read()
            except trio.BrokenResourceError:
                nursery.cancel_scope.cancel()
            except _NotARequest as exc:
                # The writer ends when it has sent this.
                self._is_ending = True
                self._answer(exc.request_id, 0, exc.error)
                nursery.cancel_scope.deadline = trio.current_time() + LAST_WORD_S
            else:
                nursery.cancel_scope.cancel()

    async def _read(self) -> None:
        while chunk := await self._stream.receive_some(RECEIVE_SIZE_BYTES):
            try:
                frames = self._decoder.feed(chunk)
            except DecodeError as exc:
                raise _NotARequest(_NO_ID, exc.message) from exc
            for frame in frames:
                while self._count >= IN_FLIGHT_COUNT_MAX or self._held_bytes >= HELD_SIZE_MAX_BYTES:
                    self._room = trio.Event()
                    await self._room.wait()
                self._take(frame)

    def _take(self, frame: bytes) -> None:
        try:
            item = decode(frame, list, what="request")
        except DecodeError as exc:
            raise _NotARequest(_NO_ID, exc.message) from exc
        if not item or type(item[0]) is not int or item[0] < 0:
            raise _NotARequest(_NO_ID, "a request begins with its id, a whole number that is not negative")
        request_id: int = item[0]
        match item:
            case [_, "write", level, [*ops]] if _is_level(level) and 0 < len(ops) <= BLOCK_OP_COUNT_MAX:
                writes = [_write_request(request_id, op) for op in ops]
                self._hold(frame)
                self._state.submit_nowait(writes, _LEVELS[level], partial(self._answer, request_id, len(frame)))
            case [_, "read", str(what), level, str(key)] if _is_level(level):
                self._hold(frame)
                self._answer(request_id, len(frame), self._read_value(what, _LEVELS[level], key))
            case [_, str(name), *_] if name not in ("write", "read"):
                self._hold(frame)
                self._answer(request_id, len(frame), UsageError(f"no request {name[:40]!r} here", hint="upgrade formation"))
            case _:
                raise _NotARequest(request_id, "not a request of this protocol")

    def _hold(self, frame: bytes) -> None:
        self._count += 1
        self._held_bytes += len(frame)

    def _read_value(self, what: str, level: Level, key: str) -> _Value | FormationError:
        read = self._reads.get(what)
        if read is None:
            return UsageError(f"nothing called {what[:40]!r} can be read", hint=f"one of: {', '.join(self._reads)}")
        try:
            return _Value(read(level, key))
        except FormationError as exc:
            return exc

    def _answer(self, request_id: int, held_bytes: int, result: Token | _Value | FormationError) -> None:
        match result:
            case Token():
                item = [request_id, "ok", [result.lane, result.seq]]
            case _Value():
                item = [request_id, "ok", result.value]
            case FormationError():
                item = [request_id, result.code, result.message, result.hint]
        frame = encode_frame(encode(item))
        self._held_bytes += len(frame) - held_bytes
        self._answers.append(frame)
        self._answered.set()

    async def _write_and_cancel(self, scope: trio.CancelScope) -> None:
        # A client that is gone does not want what it still waited for.
        with contextlib.suppress(trio.BrokenResourceError):
            await self._write()
        scope.cancel()

    async def _write(self) -> None:
        while self._answers or not self._is_ending:
            if not self._answers:
                self._answered = trio.Event()
                await self._answered.wait()
            # All that one certificate answers was added in one go, and so leaves in one write.
            answers, self._answers = self._answers, []
            data = b"".join(answers)
            await self._stream.send_all(data)
            self._count -= len(answers)
            self._held_bytes -= len(data)
            self._room.set()


class _Value:
    """What a read found."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _NotARequest(Exception):  # noqa: N818 - what the client sent, not what went wrong here
    """Bytes that end a connection."""

    def __init__(self, request_id: int, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.error = UsageError(message, hint="schemas/bulk.cddl says what is understood")


def _is_level(level: object) -> bool:
    # True equals 1 in Python.
    return type(level) is int and level in range(len(_LEVELS))


def _write_request(request_id: int, op: object) -> WriteRequest:
    # Every write of every program passes here; matching patterns would take four times as long.
    if type(op) is list and len(op) in (3, 4):
        verb, object_id, body, account = op if len(op) == 4 else (*op, None)
        is_key = type(account) is bytes and len(account) == PUBLIC_KEY_SIZE_BYTES
        if type(verb) is str and type(object_id) is str and type(body) is bytes and (is_key or len(op) == 3):
            return WriteRequest(verb=verb, object_id=object_id, body=body, account=account, intent=None)
    elif type(op) is bytes:
        return WriteRequest(verb="", object_id="", body=b"", account=None, intent=op)
    raise _NotARequest(request_id, "an op is [verb, object_id, body], the same with an account's 32-byte key, or an intent")


def _peer_uid(stream: trio.SocketStream) -> int:
    raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(raw)[1]
    return uid
