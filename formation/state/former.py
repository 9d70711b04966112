"""The last heights of an epoch that has ended, for voters that have not heard of its end yet, and for people who want proof.

A voter that was cut off while the committee changed still asks the old committee's voters for their last heights; without
them only a snapshot would bring it into the new epoch. So they are kept in memory, whole until a checkpoint of the new epoch
is stored here (so long the journal may hold blocks that they cover), and their end from then on; and every journal that
begins anew begins with that end, so that restarts do not lose it. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from formation.core.codec import decode, encode
from formation.state.spine_book import Frame, Spent, final_frames
from formation.state.spine_values import Kind, VoteEntry, parse_proposal, parse_vote

# What a voter can lack that was cut off for a moment; whoever lacks more lacks the blocks too, and needs a snapshot anyway.
END_HEIGHT_COUNT = 64
# Written again with each checkpoint. The end of an epoch with 1,024 busy lanes: one height with its proof may be larger.
END_SIZE_BYTES = 256 * 1024
# Epochs of which something is kept: changes of the committee between two stored checkpoints; more than one is rare.
FORMER_EPOCH_COUNT_MAX = 4


class _Row(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A height: array of two."""

    proposal: bytes
    votes: tuple[bytes, ...]
    """COSE_Sign1 of finalize votes for this very proposal; often none."""


class _Former(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """What a journal holds: array of three."""

    epoch: int
    final_height: int
    rows: tuple[_Row, ...]


class FormerEpoch:
    """See the module."""

    __slots__ = ("_kept", "epoch", "final_height")

    def __init__(self, epoch: int, *, final_height: int, kept: Sequence[Spent]) -> None:
        """Take over what the epoch's spine kept.

        Args:
          final_height: the epoch's last; behind it may stand void proposals that prove it.
          kept: final proposals, ascending, each with the finalize votes that were for it.
        """
        self.epoch = epoch
        self.final_height = final_height
        self._kept = tuple(kept)

    @classmethod
    def load(cls, raw: bytes) -> FormerEpoch:
        """What `dump` gave.

        Raises:
          DecodeError: it is not that.
        """
        value = decode(raw, _Former, what="former epoch")

        def votes_of(row: _Row) -> tuple[VoteEntry, ...]:
            return tuple(parse_vote(Kind.FINALIZE, vote) for vote in row.votes)

        kept = [(parse_proposal(row.proposal), votes_of(row)) for row in value.rows]
        return cls(value.epoch, final_height=value.final_height, kept=kept)

    def dump(self) -> bytes:
        """The epoch's end, for a journal."""
        rows = tuple(_Row(entry.raw, tuple(vote.raw for vote in votes)) for entry, votes in self._end())
        return encode(_Former(self.epoch, self.final_height, rows))

    def trim(self) -> None:
        """No block below the end is in the journal any more: keep what a peer may lack."""
        self._kept = self._end()

    def _end(self) -> tuple[Spent, ...]:
        size_bytes, count = 0, 0
        for entry, _ in reversed(self._kept):
            size_bytes += len(entry.raw)
            is_proof = entry.proposal.height >= self.final_height
            if not is_proof and (count >= END_HEIGHT_COUNT or size_bytes > END_SIZE_BYTES):
                break
            count += 1
        return self._kept[len(self._kept) - count :]

    def reaches(self, height: int) -> bool:
        """Whether the epoch's heights above this one are all here."""
        return height >= self.final_height or (bool(self._kept) and self._kept[0][0].proposal.height <= height + 1)

    def final_frames(self, *, height: int, size_max_bytes: int) -> tuple[Frame, ...]:
        """As `Spine.final_frames`: final proposals above a height, and a certificate at their end."""
        if height >= self.final_height:
            return ()
        return tuple(final_frames(self._kept, height=height, size_max_bytes=size_max_bytes))

    @property
    def lowest_height(self) -> int:
        """Of the first proposal that is here; above all if there is none."""
        return self._kept[0][0].proposal.height if self._kept else self.final_height + 1
