"""State Store: the port, its values, and the in-memory twin.

A batch is one commit: blocks, acks (our own among them), evidence and feed rows become durable together or not at all.
That is what makes "block and own ack on disk before the ack leaves" hold across crashes. The store knows nothing of
what it holds; it answers by lane and number, and replays in the order of the feed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from formation.core.errors import HostError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRow:
    """A block as received."""

    hash: bytes
    lane: bytes
    seq: int
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AckRow:
    """An ack as received."""

    hash: bytes
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofRow:
    """One of the acks that certified a lane up to a number: kept now and then, so that history can be proven in parts."""

    lane: bytes
    seq: int
    voter: int
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedRow:
    """All operations of one block reached one level here."""

    position: int
    """Of the first operation; the others follow."""
    count: int
    is_certified: bool
    hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One commit."""

    number: int
    blocks: tuple[BlockRow, ...] = ()
    acks: tuple[AckRow, ...] = ()
    acks_dropped: tuple[bytes, ...] = ()
    """Hashes of acks that nothing needs any more."""
    evidence: tuple[tuple[bytes, bytes], ...] = ()
    """(lane, CBOR of Evidence)."""
    feed: tuple[FeedRow, ...] = ()
    proofs: tuple[ProofRow, ...] = ()
    unseated: tuple[bytes, ...] = ()
    """Hashes of blocks that are no longer on their lane's chain; kept for the feed's sake, not served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedRow:
    """A feed row with the block that it is about (raw only when observed: certified repeats an earlier one)."""

    row: FeedRow
    raw: bytes | None
    is_unseated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """All that was committed."""

    feed: Iterator[ReplayedRow]
    """In order of position; consume it in the thread that `replay` ran in, or before the next call."""
    acks: tuple[AckRow, ...]
    evidence: tuple[tuple[bytes, bytes], ...]


class Store(Protocol):
    """Blocking calls: the shell runs them in a worker thread. Not re-entrant; one caller at a time."""

    def open(self, network_id: bytes) -> None:
        """Take the store for this process and this network.

        Raises:
          HostError: it cannot be opened; says which file and what to do.
          UsageError: it belongs to another network.
        """
        ...

    def replay(self) -> Replay:
        """Everything committed so far."""
        ...

    def commit(self, batches: Sequence[Batch]) -> None:
        """Make batches durable, all with one sync.

        Raises:
          HostError: the disk refused; the process must stop, for its promises can no longer be kept.
        """
        ...

    def read_blocks(self, lane: bytes, *, first_seq: int, last_seq: int, size_max_bytes: int) -> tuple[bytes, ...]:
        """Blocks on the lane's chain in order of number, without gaps from `first_seq`.

        At least one if there is one, then as many as fit.
        """
        ...

    def read_proof(self, lane: bytes, *, above_seq: int) -> tuple[bytes, ...]:
        """Raw acks of the first proof above a number; empty if none was kept there."""
        ...

    def close(self) -> None:
        """Give the store free. Never raises."""
        ...


class MemoryDisk:
    """What survives when a MemoryStore is closed or its process "crashes"; for tests and simulators."""

    def __init__(self) -> None:
        self.network_id = b""
        self.is_taken = False
        self.blocks: dict[bytes, BlockRow] = {}
        self.by_lane: dict[bytes, dict[int, bytes]] = {}
        self.acks: dict[bytes, AckRow] = {}
        self.evidence: dict[bytes, bytes] = {}
        self.feed: list[FeedRow] = []
        self.unseated: set[bytes] = set()
        self.proofs: dict[bytes, dict[int, dict[int, bytes]]] = {}


class MemoryStore:
    """In-memory twin of the SQLite store."""

    def __init__(self, disk: MemoryDisk | None = None) -> None:
        self._disk = disk or MemoryDisk()
        self._is_open = False

    def open(self, network_id: bytes) -> None:
        """See Store."""
        if self._disk.is_taken:
            raise HostError(
                "the store is in use by another process", hint="stop the other node, or give this one its own --data-dir"
            )
        if self._disk.network_id not in (b"", network_id):
            raise UsageError("the store belongs to another network", hint="give this network its own --data-dir")
        self._disk.network_id, self._disk.is_taken, self._is_open = network_id, True, True

    def replay(self) -> Replay:
        """See Store."""
        return Replay(feed=self._rows(), acks=tuple(self._disk.acks.values()), evidence=tuple(self._disk.evidence.items()))

    def _rows(self) -> Iterator[ReplayedRow]:
        for row in self._disk.feed:
            raw = None if row.is_certified else self._disk.blocks[row.hash].raw
            yield ReplayedRow(row=row, raw=raw, is_unseated=row.hash in self._disk.unseated)

    def commit(self, batches: Sequence[Batch]) -> None:
        """See Store."""
        assert self._is_open
        disk = self._disk
        for batch in batches:
            for block in batch.blocks:
                disk.blocks[block.hash] = block
                disk.by_lane.setdefault(block.lane, {})[block.seq] = block.hash
            disk.unseated.update(batch.unseated)
            for lane in disk.by_lane.values() if batch.unseated else ():
                for seq in [s for s, h in lane.items() if h in disk.unseated]:
                    del lane[seq]
            for ack in batch.acks:
                disk.acks[ack.hash] = ack
            for key in batch.acks_dropped:
                disk.acks.pop(key, None)
            for lane_id, evidence in batch.evidence:
                disk.evidence.setdefault(lane_id, evidence)
            for proof in batch.proofs:
                disk.proofs.setdefault(proof.lane, {}).setdefault(proof.seq, {})[proof.voter] = proof.raw
            disk.feed.extend(batch.feed)

    def read_blocks(self, lane: bytes, *, first_seq: int, last_seq: int, size_max_bytes: int) -> tuple[bytes, ...]:
        """See Store."""
        assert self._is_open
        numbered = self._disk.by_lane.get(lane, {})
        found: list[bytes] = []
        size_bytes = 0
        for seq in range(first_seq, last_seq + 1):
            if seq not in numbered:
                break
            raw = self._disk.blocks[numbered[seq]].raw
            size_bytes += len(raw)
            if found and size_bytes > size_max_bytes:
                break
            found.append(raw)
        return tuple(found)

    def read_proof(self, lane: bytes, *, above_seq: int) -> tuple[bytes, ...]:
        """See Store."""
        proofs = self._disk.proofs.get(lane, {})
        seq = min((s for s in proofs if s > above_seq), default=None)
        return () if seq is None else tuple(proofs[seq].values())

    def close(self) -> None:
        """See Store."""
        if self._is_open:
            self._is_open, self._disk.is_taken = False, False
