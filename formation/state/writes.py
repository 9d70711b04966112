"""Writes of callers: waiting for a block, then for the level that each asked for. Pure; whoever waits is told by a function.

Neighbours of one kind share a block, in the order in which they came. What a caller may have under way is bounded on both
sides: WRITE_COUNT_MAX before they have a block, WAITING_COUNT_MAX in all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from formation.core.errors import ConflictError, FormationError, UnavailableError, UsageError
from formation.core.event import Topic
from formation.state.feed import Level
from formation.state.lane import BLOCK_OP_COUNT_MAX, LaneId
from formation.state.op import OP_SIZE_MAX_BYTES, PlainOp, estimated_size_bytes

# Writes that wait for a block: some seconds' worth at full speed. Beyond, callers are told to come back.
WRITE_COUNT_MAX = 8192
# Writes of ours that wait for a level; with the window of 64 blocks this is what a caller may have under way.
WAITING_COUNT_MAX = 65_536
# Operations of one block by their estimate, leaving room for its header and 64 deps below 256 KiB.
BLOCK_OPS_SIZE_MAX_BYTES = 240 * 1024


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """Where a write stands: wait for its level, or read it at another node."""

    lane: str
    """84 hex digits."""
    seq: int


class WriteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An operation that a program wants written."""

    verb: str
    object_id: str
    body: bytes
    """CBOR map of the event's fields; empty with an intent."""
    account: bytes | None = None
    """32-byte key of the account in whose name the node shall write, under a delegation."""
    intent: bytes | None = None
    """COSE_Sign1 of an account's intent."""


Done = Callable[[Token | FormationError], None]
"""Called once: where the write stands, or why it will not."""


@dataclass(slots=True, eq=False)
class Write:
    """One operation of a caller's."""

    kind: Topic
    op: PlainOp
    size_bytes: int
    level: Level
    done: Done
    seq: int = 0
    """Of its block; 0: it has none yet."""
    index: int = 0


class Writes:
    """Those of one node."""

    __slots__ = ("_done_count", "_placed_count", "_queue", "_waiting")

    def __init__(self) -> None:
        self._queue: deque[Write] = deque()
        self._waiting: dict[Level, deque[Write]] = {level: deque() for level in Level}
        """Those that have a block, in the order of their blocks."""
        self._placed_count = self._done_count = 0

    @property
    def are_waiting(self) -> bool:
        """Whether any waits for a block."""
        return bool(self._queue)

    def put(self, kind: Topic, op: PlainOp, level: Level, done: Done) -> Write:
        """Take a write.

        Raises:
          UsageError: it is too large.
          UnavailableError: too many wait already.
        """
        size_bytes = estimated_size_bytes(op)
        if size_bytes > OP_SIZE_MAX_BYTES:
            raise UsageError(
                f"an operation of about {size_bytes} bytes, the limit is {OP_SIZE_MAX_BYTES}",
                hint="put large data into the image",
            )
        if len(self._queue) >= WRITE_COUNT_MAX or self._placed_count - self._done_count >= WAITING_COUNT_MAX:
            raise UnavailableError(
                f"this node's outbox is full: {self._placed_count - self._done_count + len(self._queue)} writes wait already",
                hint="try again in a few seconds; formation status shows whether there is a quorum",
            )
        write = Write(kind, op, size_bytes, level, done)
        self._queue.append(write)
        return write

    def withdraw(self, write: Write) -> None:
        """Its caller gave up; one that has a block goes on all the same."""
        if write in self._queue:
            self._queue.remove(write)

    def take_block(self, seq: int) -> list[Write]:
        """The next block's writes, of one kind, as many neighbours as fit; empty: none wait.

        Args:
          seq: the number that the block will have.
        """
        taken: list[Write] = []
        size_bytes = 0
        while self._queue and len(taken) < BLOCK_OP_COUNT_MAX:
            write = self._queue[0]
            size_bytes += write.size_bytes
            if taken and (write.kind is not taken[0].kind or size_bytes > BLOCK_OPS_SIZE_MAX_BYTES):
                break
            self._queue.popleft()
            write.seq, write.index = seq, len(taken)
            taken.append(write)
            self._waiting[write.level].append(write)
        self._placed_count += len(taken)
        return taken

    def release(self, level: Level, seq: int, lane: LaneId | None) -> None:
        """Our lane has reached a level up to this block."""
        waiting = self._waiting[level]
        while waiting and waiting[0].seq <= seq:
            self._end(waiting.popleft(), lane)

    def release_final(self, seq: int, voids: tuple[str, ...], lane: LaneId | None) -> None:
        """A block of ours is final; its operations took effect, or say why not."""
        waiting = self._waiting[Level.FINAL]
        while waiting and waiting[0].seq <= seq:
            write = waiting.popleft()
            self._end(write, lane, void=voids[write.index] if write.seq == seq else "")

    def _end(self, write: Write, lane: LaneId | None, *, void: str = "") -> None:
        self._done_count += 1
        if void:
            write.done(ConflictError(void, hint="formation op show tells where it stands"))
        else:
            write.done(Token(lane="" if lane is None else lane.hex(), seq=write.seq))

    def fail_all(self, error: FormationError) -> None:
        """None of them will reach its level as it was promised."""
        self._done_count = self._placed_count
        for queue in (self._queue, *self._waiting.values()):
            failed = list(queue)
            queue.clear()
            for write in failed:
                write.done(error)
