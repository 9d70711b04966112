"""What one replica knows of the spine: proposals, votes, certificates, the final chain. Facts only; `spine` acts on them.

A view has at most one notarised proposal (two would need a correct voter that notarised both), and may be nullified as
well. Memory is O(voters) for each view above the final one, and there only for views near the current one: older
views without a notarised proposal shrink to their nullification and our own votes, 1.8 KiB at 4 voters, some 4 KiB at
31. Each such view cost the voters up to eight seconds in vain; a day of that is 20 to 45 MiB, and the next final height
frees it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from formation.core.codec import Hash
from formation.state.lane import Head
from formation.state.spine_values import CONTEXT_OF, Kind, Proposal, ProposalEntry, VoteEntry, encode_votes, make_final

Frame = tuple[Kind, bytes]
"""Kind byte, and the value."""
Spent = tuple[ProposalEntry, tuple[VoteEntry, ...]]
"""A final proposal, with the finalize votes that were for this very one."""

# Final proposals kept in memory for peers that lag: a minute of a busy spine. Whoever is further behind begins with a
# checkpoint, and they come once a minute.
FINAL_KEPT_COUNT = 4_096
# A cut of a small cell is 1 KiB; one of 1,024 lanes 90.
FINAL_KEPT_SIZE_MAX_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What was final when the epoch began or, at a restart, when the state was last stored."""

    height: int
    hash: bytes
    """Of the proposal at that height; the network id at height 0."""
    time_ms: int
    cut: Mapping[bytes, int]
    """Lane → number of its last covered block."""
    closed: Collection[bytes] = ()
    """Lanes that may never advance again."""
    view: int = 0
    """View of the proposal at that height, in this epoch; 0 if it belongs to the one before."""


@dataclass(slots=True, eq=False)
class Known:
    """A proposal above the final head, and how far it has been checked."""

    entry: ProposalEntry
    seqs: dict[bytes, int]
    """Lane → number that it is covered to, for lanes that it advances or closes."""
    is_journalled: bool = False
    is_refused: bool = False
    is_sound: bool = False
    """It follows from its parent."""
    certified_count: int = 0
    """So many of its heads were found certified; they stay so."""

    @property
    def view(self) -> int:
        """View of its leader."""
        return self.entry.proposal.view


@dataclass(slots=True, eq=False)
class ViewFacts:
    """One view above the final one."""

    proposals: dict[Hash, Known] = field(default_factory=dict)
    votes: dict[Kind, dict[int, VoteEntry]] = field(default_factory=lambda: {kind: {} for kind in CONTEXT_OF})
    """Kind → voter → the first such vote of that voter."""
    notarised: bytes | None = None
    """Hash of the proposal that a quorum notarised; its content may be unknown here."""
    notarisation: bytes = b""
    """CBOR of the Votes that prove it."""
    nullification: bytes = b""
    """CBOR of the Votes that prove that nothing is final in this view; empty while unknown."""
    own: dict[Kind, VoteEntry] = field(default_factory=dict)
    """What we promised, stored or not: never to be contradicted."""
    own_proposal: ProposalEntry | None = None
    is_compact: bool = False

    def compact(self) -> None:
        """Forget what only this view's own course needed."""
        # Shared: nobody counts a vote here any more.
        self.proposals, self.votes = {}, _NO_VOTES
        self.is_compact = True


_NO_VOTES: dict[Kind, dict[int, VoteEntry]] = {kind: {} for kind in CONTEXT_OF}


@dataclass(frozen=True, slots=True)
class FinalHead:
    """The last final proposal."""

    height: int
    hash: bytes
    time_ms: int
    view: int


class Book:
    """All facts of one epoch."""

    __slots__ = ("closed", "entries", "final", "final_seqs", "final_votes", "kept", "kept_size_bytes", "top", "views")

    def __init__(self, base: Base) -> None:
        self.final = FinalHead(base.height, base.hash, base.time_ms, base.view)
        self.final_seqs: dict[bytes, int] = dict(base.cut)
        self.closed: set[bytes] = set(base.closed)
        self.final_votes: bytes = b""
        """CBOR of the Votes that made the final head final; empty when it is the base."""
        self.kept: deque[Spent] = deque()
        self.kept_size_bytes = 0
        """Newest final proposals, ascending; with finalize votes where some were for that very proposal."""
        self.entries: dict[bytes, Known] = {}
        """Hash → proposal of a view above the final one."""
        self.views: dict[int, ViewFacts] = {}
        self.top = base.view
        """Highest view with a notarised proposal; the final one if there is none above."""

    def facts(self, view: int) -> ViewFacts:
        """Facts of a view, to add to."""
        found = self.views.get(view)
        if found is None:
            assert view > self.final.view
            found = self.views[view] = ViewFacts()
        return found

    def is_nullified(self, view: int) -> bool:
        """Whether a quorum nullified it."""
        found = self.views.get(view)
        return found is not None and bool(found.nullification)

    def notarised(self, view: int) -> bytes | None:
        """Hash of what is notarised there; of the final head in its view."""
        if view == self.final.view:
            return self.final.hash
        found = self.views.get(view)
        return None if found is None else found.notarised

    def add(self, entry: ProposalEntry) -> Known:
        """Remember a proposal."""
        known = self.entries.get(entry.hash)
        if known is None:
            proposal = entry.proposal
            known = Known(entry, {head.lane: head.seq for head in (*proposal.cut, *proposal.closes)})
            self.entries[entry.hash] = known
            self.facts(proposal.view).proposals[entry.hash] = known
        return known

    def forget_content(self, view: int) -> None:
        """Shrink an old view in which nothing was notarised."""
        facts = self.views.get(view)
        if facts is not None and facts.notarised is None:
            for hash_ in facts.proposals:
                del self.entries[hash_]
            facts.compact()

    def chain(self, hash_: bytes) -> list[Known] | None:
        """Proposals from behind the final head to this one, ascending; None while a link is missing, or if it forks off."""
        found: list[Known] = []
        while hash_ != self.final.hash:
            known = self.entries.get(hash_)
            if known is None or known.entry.proposal.height <= self.final.height:
                return None
            found.append(known)
            hash_ = known.entry.proposal.parent
        found.reverse()
        return found

    def finalise(self, chain: list[Known], tail: list[Known], votes: tuple[VoteEntry, ...]) -> None:
        """Move the final head to the end of the chain; `tail` is what stands behind it only to prove it."""
        for known in chain:
            proposal = known.entry.proposal
            self.final_seqs.update(known.seqs)
            self.closed.update(head.lane for head in proposal.closes)
        last, proof = chain[-1].entry, (tail or chain)[-1]
        self.kept.extend((known.entry, votes if known is proof else ()) for known in (*chain, *tail))
        self.kept_size_bytes += sum(len(known.entry.raw) for known in (*chain, *tail))
        while len(self.kept) > FINAL_KEPT_COUNT or (len(self.kept) > 1 and self.kept_size_bytes > FINAL_KEPT_SIZE_MAX_BYTES):
            self.kept_size_bytes -= len(self.kept.popleft()[0].raw)
        self.final_votes = encode_votes(votes)
        self.final = FinalHead(last.proposal.height, last.hash, last.proposal.time_ms, proof.view)
        self.top = max(self.top, self.final.view)
        for view in [view for view in self.views if view <= self.final.view]:
            for hash_ in self.views.pop(view).proposals:
                del self.entries[hash_]

    # ── for peers ───────────────────────────────────────────────────────────────────────────────────────────────────

    def final_frames(self, *, height: int, size_max_bytes: int) -> list[Frame]:
        """Final proposals above a height and a certificate at their end; none if memory does not reach so far back.

        If not all fit, as many as do; but at least up to the first certificate.
        """
        return final_frames(self.kept, height=height, size_max_bytes=size_max_bytes)

    def last_final_frames(self, *, view: int) -> list[Frame]:
        """The newest certificate, with the final proposals of this view and later ones before it."""
        if not self.kept:
            return []
        *before, (last, votes) = self.kept
        frames = [(Kind.PROPOSAL, entry.raw) for entry, _ in before if entry.proposal.view >= view]
        return [*frames, (Kind.FINAL, make_final(last, votes).raw)]

    def open_frames(self, *, view: int) -> Iterable[Frame]:
        """What is notarised above the final head; then, from `view` on, what is nullified, and single votes."""
        views = sorted(self.views)
        for number in views:
            facts = self.views[number]
            if facts.notarised is not None:
                known = self.entries.get(facts.notarised)
                if known is not None:
                    yield Kind.PROPOSAL, known.entry.raw
                yield Kind.VOTES, facts.notarisation
        for number in views:
            facts = self.views[number]
            if number >= view and facts.nullification:
                yield Kind.VOTES, facts.nullification
        for number in views:
            facts = self.views[number]
            if number < view and facts.notarised is None:
                continue
            for known in facts.proposals.values():
                if known.entry.hash != facts.notarised:
                    yield Kind.PROPOSAL, known.entry.raw
            for kind, votes in facts.votes.items():
                certified = facts.notarised if kind is Kind.NOTARIZE else facts.nullification or None
                if votes and not (certified and kind is not Kind.FINALIZE):
                    for hash_ in sorted({entry.vote.hash for entry in votes.values()}):
                        yield Kind.VOTES, encode_votes([e for e in votes.values() if e.vote.hash == hash_])


def final_frames(kept: Iterable[Spent], *, height: int, size_max_bytes: int) -> list[Frame]:
    """See `Book.final_frames`."""
    frames: list[Frame] = []
    fitting: list[Frame] = []
    size_bytes = 0
    for entry, votes in kept:
        if entry.proposal.height <= height:
            continue
        if not frames and not fitting and entry.proposal.height != height + 1:
            return []
        size_bytes += len(entry.raw)
        if not votes:
            frames.append((Kind.PROPOSAL, entry.raw))
            continue
        frames.append((Kind.FINAL, make_final(entry, votes).raw))
        if fitting and size_bytes > size_max_bytes:
            break
        fitting = list(frames)
    return fitting


class Overlay:
    """What a chain of proposals above the final head has covered and closed."""

    __slots__ = ("_book", "_closed", "_seqs", "height", "is_ending", "time_ms")

    def __init__(self, book: Book, chain: list[Known]) -> None:
        self._book = book
        self._seqs: dict[bytes, int] = {}
        self._closed: set[bytes] = set()
        self.is_ending = any(known.entry.proposal.handover is not None for known in chain)
        self.height, self.time_ms = book.final.height + len(chain), book.final.time_ms
        for known in chain:
            self._seqs.update(known.seqs)
            self._closed.update(head.lane for head in known.entry.proposal.closes)
            self.time_ms = known.entry.proposal.time_ms

    def seq(self, lane: bytes) -> int:
        """How far a lane is covered."""
        found = self._seqs.get(lane)
        return self._book.final_seqs.get(lane, 0) if found is None else found

    def _is_closed(self, lane: bytes) -> bool:
        return lane in self._closed or lane in self._book.closed

    def may_advance(self, head: Head) -> bool:
        """Whether a cut may name it."""
        return head.seq > self.seq(head.lane) and not self._is_closed(head.lane)

    def may_close(self, head: Head) -> bool:
        """Whether its lane may end there."""
        return head.seq >= self.seq(head.lane) and not self._is_closed(head.lane)

    def may_carry(self, proposal: Proposal) -> bool:
        """Whether this proposal may stand on the chain, by what the chain alone tells."""
        return (
            proposal.height == self.height + 1
            and proposal.time_ms >= self.time_ms
            and all(map(self.may_advance, proposal.cut))
            and all(map(self.may_close, proposal.closes))
            and (is_empty(proposal) or not self.is_ending)
        )


def is_empty(proposal: Proposal) -> bool:
    """Whether it moves nothing: good only for making its parent final."""
    moves = (proposal.cut, proposal.closes, proposal.checkpoint, proposal.handover, proposal.equivocations)
    return not any(moves)
