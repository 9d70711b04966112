"""State Store: the port, its values, and the in-memory twin.

The store is a journal of records and, below it, a checkpointed state: numbered buckets and one meta value. It knows
nothing of what it holds. `commit` makes records durable, all of them or none; `checkpoint` moves the beginning of the
journal forward, atomically: afterwards the state is the newest content of every bucket ever given, the meta value, and
the records given with it, followed by what is committed later. Nothing else of the journal stays readable.

Rules that callers rely on:
(1) What `commit` or `checkpoint` returned for is there after any crash. What they had not returned for is there as a
    whole or not at all, and only if everything before it is there.
(2) An error of `commit` says "not promised", not "not there": what failed may turn up as a whole after the next open.
(3) `load` gives records in the order of their commits; `read_blocks` the newest record of each (lane, seq).
(4) One thread at a time calls open, load, commit, stage, tidy, checkpoint and close. `read_blocks` and `read_bucket` may run in
    other threads meanwhile and see either the state before or after a commit or checkpoint, never one in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from threading import Lock
from typing import Protocol

from formation.core.errors import HostError, UsageError

KIND_MAX = 255
SEQ_MAX = (1 << 63) - 1
LANE_SIZE_BYTES = 42


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the journal."""

    kind: int
    """1 to 255; what it means is the replica's business."""
    body: bytes
    """Raw."""
    lane: bytes = b""
    """42-byte lane id, for blocks only: makes the record findable by `read_blocks`."""
    seq: int = 0
    """Of the block on its lane; below 2**63."""


def check_record(record: Record) -> None:
    """Stop a caller who gives what cannot be kept."""
    assert 1 <= record.kind <= KIND_MAX
    assert 0 <= record.seq <= SEQ_MAX
    assert len(record.lane) in (0, LANE_SIZE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """All that is in a store. Use both iterators up, once, before the next call of the store."""

    meta: bytes
    """Of the last checkpoint; b"" before the first."""
    buckets: Iterator[tuple[int, bytes]]
    """(number, content) by rising number."""
    records: Iterator[Record]
    """In order of commit, from the last checkpoint's records on."""
    notes: tuple[str, ...] = ()
    """What was found and repaired when the store was opened, one sentence each, for the log."""


class Store(Protocol):
    """Blocking calls; for threads see rule 4 of the module."""

    def open(self, network_id: bytes) -> None:
        """Take the store for this process and this network; repair what a crash left. From then on it has a `feed_id`.

        Args:
          network_id: 32 bytes; a new store keeps it.

        Raises:
          HostError: locked by another process, damaged, or not writable; says which file and what to do.
          UsageError: it belongs to another network.
        """
        ...

    @property
    def feed_id(self) -> str:
        """8 hex digits, chosen at random when the store was made: positions counted in it are no others' (`feed`)."""
        ...

    def load(self) -> Loaded:
        """Everything that is in the store; once after `open`.

        Raises:
          HostError: a file is damaged (from the iterators as well).
        """
        ...

    def commit(self, records: Sequence[Record]) -> None:
        """Make records durable, all of them with one sync, or none.

        Raises:
          HostError: not promised. With the disk full nothing was kept, and later commits work once there is space. After a
            failed sync nobody knows what is on the disk: every later call raises, the process must stop.
        """
        ...

    def stage(self, height: int, buckets: Mapping[int, bytes]) -> None:
        """Write some of the next checkpoint's buckets ahead, so that no commit waits for all of them.

        Nothing shows before the checkpoint, and nothing of it is there after a crash.

        Args:
          height: of that checkpoint, above 0; what was staged for another one is forgotten.
          buckets: b"" deletes; those staged before are replaced.

        Raises:
          HostError: none of these is staged; as for `commit`.
        """
        ...

    def tidy(self) -> bool:
        """Give back some of the space of what the last checkpoint superseded; whether there is more.

        Raises:
          HostError: the disk refused.
        """
        ...

    def checkpoint(
        self, meta: bytes, buckets: Mapping[int, bytes], records: Sequence[Record], *, staged: int | None = None
    ) -> None:
        """Start the journal anew; durable and atomic when it returns.

        Args:
          meta: replaces the one before.
          buckets: the changed ones only; b"" deletes.
          records: what of the journal is not covered by the buckets and must stay; they come first from now on.
          staged: the height that further changed buckets were staged for, to the last one; None: none were, and any that are
            staged are forgotten.

        Raises:
          HostError: as for `commit`; the state before is kept.
        """
        ...

    def read_blocks(self, lane: bytes, *, first_seq: int, last_seq: int, size_max_bytes: int) -> tuple[bytes, ...]:
        """Bodies of a lane's blocks by number, without gaps from `first_seq`; the newest record of each number.

        At least one if there is one, then as many as fit.

        Raises:
          HostError: the disk refused, or what it gave is not what was written.
        """
        ...

    def read_bucket(self, number: int) -> bytes:
        """Content of a bucket as of the last checkpoint; b"" if there is none.

        Raises:
          HostError: as for `read_blocks`.
        """
        ...

    @property
    def size_bytes(self) -> int:
        """What the store takes on disk."""
        ...

    def close(self) -> None:
        """Give the store free. Never raises; a second call does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    meta: bytes
    buckets: Mapping[int, bytes]
    records: Sequence[Record]


_Write = Sequence[Record] | _Checkpoint


@dataclass(slots=True)
class MemoryDisk:
    """What survives when a MemoryStore is closed or its process "crashes"; for tests and simulators.

    Faults: `is_full` makes commits and checkpoints fail; after `lie` they are acknowledged without being safe, so that a
    crash may lose them; `copy` is a backup, or the disk of a cloned machine.
    """

    network_id: bytes = b""
    feed_id: str = "0a0a0a0a"
    holder: MemoryStore | None = None
    """The store that has it open."""
    meta: bytes = b""
    buckets: dict[int, bytes] = field(default_factory=dict)
    journal: list[Record] = field(default_factory=list)
    blocks: dict[bytes, dict[int, bytes]] = field(default_factory=dict)
    """Lane -> seq -> body of the newest record."""
    staged: dict[int, bytes] = field(default_factory=dict)
    """Of the next checkpoint; forgotten by opening."""
    staged_for: int = 0
    unsynced: list[_Write] = field(default_factory=list)
    """Begun and not yet promised, oldest first."""
    is_full: bool = False
    safe: MemoryDisk | None = None
    """While the disk lies: what was safe when it began to."""
    lied: list[_Write] = field(default_factory=list)
    """Promised and not safe, oldest first."""

    def lie(self) -> None:
        """Acknowledge writes without keeping them safe, from now until the next crash."""
        if self.safe is None:
            self.safe = self.copy()

    def crash(self, rng: Random) -> None:
        """The machine goes down: of what was not synced, some beginning survives, by whole commits.

        A log is read up to the first frame that is not whole, so a later write never survives without the earlier ones.
        """
        at_risk = self.lied + self.unsynced
        if self.safe is not None:
            safe = self.safe
            self.meta, self.buckets, self.journal, self.blocks = safe.meta, safe.buckets, safe.journal, safe.blocks
        kept = rng.randint(0, len(at_risk)) if at_risk else 0
        for write in at_risk[:kept]:
            self._apply(write)
        self.unsynced, self.lied, self.safe, self.holder = [], [], None, None

    def copy(self) -> MemoryDisk:
        """A copy of what a process reads on it, free to be opened."""
        return MemoryDisk(
            network_id=self.network_id,
            meta=self.meta,
            buckets=dict(self.buckets),
            journal=list(self.journal),
            blocks={lane: dict(bodies) for lane, bodies in self.blocks.items()},
        )

    def _apply(self, write: _Write) -> None:
        if isinstance(write, _Checkpoint):
            self.meta = write.meta
            self.buckets.update(write.buckets)
            for number in [number for number, content in write.buckets.items() if not content]:
                self.buckets.pop(number, None)
            self.journal, self.blocks = [], {}
            write = write.records
        self.journal.extend(write)
        for record in write:
            if record.lane:
                self.blocks.setdefault(record.lane, {})[record.seq] = record.body


class MemoryStore:
    """In-memory twin of the real store.

    A simulator that wants to crash between write and promise calls `begin` (or `begin_checkpoint`) when the machine asks for
    a commit, and `sync` when the disk is done; `commit` and `checkpoint` are both at once.
    """

    def __init__(self, disk: MemoryDisk | None = None) -> None:
        self._disk = MemoryDisk() if disk is None else disk
        # Between readers in other threads and the moment at which a commit or checkpoint shows.
        self._guard = Lock()

    @property
    def _is_open(self) -> bool:
        return self._disk.holder is self

    def open(self, network_id: bytes) -> None:
        """See Store."""
        if self._disk.holder is not None:
            raise HostError(
                "the store is in use by another process", hint="stop the other node, or give this one its own --data-dir"
            )
        if self._disk.network_id not in (b"", network_id):
            raise UsageError("the store belongs to another network", hint="give this network its own --data-dir")
        self._disk.network_id, self._disk.holder = network_id, self
        self._disk.staged, self._disk.staged_for = {}, 0

    @property
    def feed_id(self) -> str:
        """See Store."""
        return self._disk.feed_id

    def load(self) -> Loaded:
        """See Store."""
        assert self._is_open
        disk = self._disk
        return Loaded(meta=disk.meta, buckets=iter(sorted(disk.buckets.items())), records=iter(disk.journal))

    def begin(self, records: Sequence[Record]) -> None:
        """Write without sync."""
        assert self._is_open
        self._refuse_if_full()
        for record in records:
            check_record(record)
        self._disk.unsynced.append(tuple(records))

    def stage(self, height: int, buckets: Mapping[int, bytes]) -> None:
        """See Store."""
        assert self._is_open
        self._refuse_if_full()
        assert height >= self._disk.staged_for
        if height != self._disk.staged_for:
            self._disk.staged, self._disk.staged_for = {}, height
        self._disk.staged.update(buckets)

    def tidy(self) -> bool:
        """See Store."""
        return False

    def begin_checkpoint(
        self, meta: bytes, buckets: Mapping[int, bytes], records: Sequence[Record], *, staged: int | None = None
    ) -> None:
        """Write without sync."""
        assert self._is_open
        self._refuse_if_full()
        for record in records:
            check_record(record)
        assert staged in (None, self._disk.staged_for)
        ahead = {} if staged is None else self._disk.staged
        self._disk.unsynced.append(_Checkpoint(meta, {**ahead, **buckets}, tuple(records)))
        self._disk.staged, self._disk.staged_for = {}, 0

    def sync(self) -> None:
        """Promise everything begun."""
        disk = self._disk
        with self._guard:
            for write in disk.unsynced:
                disk._apply(write)
        if disk.safe is not None:
            disk.lied += disk.unsynced
        disk.unsynced.clear()

    def commit(self, records: Sequence[Record]) -> None:
        """See Store."""
        self.begin(records)
        self.sync()

    def checkpoint(
        self, meta: bytes, buckets: Mapping[int, bytes], records: Sequence[Record], *, staged: int | None = None
    ) -> None:
        """See Store."""
        self.begin_checkpoint(meta, buckets, records, staged=staged)
        self.sync()

    def read_blocks(self, lane: bytes, *, first_seq: int, last_seq: int, size_max_bytes: int) -> tuple[bytes, ...]:
        """See Store."""
        assert self._is_open
        found: list[bytes] = []
        size_bytes = 0
        with self._guard:
            bodies = self._disk.blocks.get(lane, {})
            for seq in range(first_seq, last_seq + 1):
                body = bodies.get(seq)
                if body is None:
                    break
                size_bytes += len(body)
                if found and size_bytes > size_max_bytes:
                    break
                found.append(body)
        return tuple(found)

    def read_bucket(self, number: int) -> bytes:
        """See Store."""
        assert self._is_open
        with self._guard:
            return self._disk.buckets.get(number, b"")

    @property
    def size_bytes(self) -> int:
        """See Store."""
        disk = self._disk
        return len(disk.meta) + sum(map(len, disk.buckets.values())) + sum(len(record.body) for record in disk.journal)

    def close(self) -> None:
        """See Store."""
        if self._is_open:
            # A process that closes in order leaves its writes to the kernel, which brings them to the disk.
            self.sync()
            self._disk.holder = None

    def _refuse_if_full(self) -> None:
        if self._disk.is_full:
            raise HostError("the store cannot grow: the disk is full", hint="free some space on it")
