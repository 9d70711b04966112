"""The spine: Simplex consensus over cuts, as a machine without I/O, clock or randomness. One per epoch.

    spine.on_vote(kind, raw, now_ns); for effect in spine.drain(): …

Source: Chan & Pass, "Simplex Consensus" (TCC 2023), with views in the place of its iterations (a nullified view is its
dummy block). Rules:

1. *Notarize* at most one proposal of a view, in that view: its parent is notarised in view p below, all views between
   are nullified, it regresses nowhere, and every head in its cut is certified here.
2. 2f+1 notarize votes: enter the next view; if we have not nullified this one, *finalize* it.
3. The timer runs out, or f+1 nullify: *nullify*, unless we finalized; and never finalize after. 2f+1: enter the next.
4. 2f+1 finalize votes make the proposal and its ancestors final.
5. What we sign is on disk before it leaves or counts (`Promise`). With a notarize vote goes the proposal, with a
   finalize vote the notarisation that allowed it. So after any crash, even of all at once, a correct voter can show why
   it must not nullify a view; and where none must, all can. Either way the view can be left. (With the votes alone on
   disk, as in design/state section 4, one liar and a power cut stop the others for ever: tests/sim/test_spine_sim,
   "power cut and liars", seeds 129 and 155 of the mutants that keep no notarisation, no proposal.)

Why it is safe: finalize and nullify exclude each other in each correct voter, so a view with a final proposal has no
nullification; whoever notarises in a later view has that view, or one above it, below its proposal; and one view has one
notarised proposal. Nothing in this needs the order, the timeliness or the number of messages.

Why it is live: a voter enters views without gaps (a notarisation leaps, a nullification only steps), so it always holds a
parent for its view. Who waits repeats its votes and what brought it there. Who has left a view answers each nullify vote
for it with what lifts its voter. A leader whose parent is not obvious sends the proof along. What is still missing after
that (a proposal's bytes, a long absence) is asked for by `ChainWanted` and answered by `frames_since`. Certificates
travel as `Votes` and never provoke an answer, so answers end.

On demand: the timer runs and a leader proposes only while `oracle.is_wanted()`. A proposal that moves nothing is
allowed only on a parent that is not final yet: it may be the one thing left that can make it final.

A leader that the final order has banned (`equivocation`) is not waited for: its views are nullified as soon as anything is
wanted. Its votes count like any other's.

The proposal that carries a handover is the epoch's last: what stands on it is empty and serves to make it final.
"""

from __future__ import annotations

from collections.abc import Sequence

from formation.core.clock import NS_PER_MS
from formation.core.codec import Sign, Verify, sha256
from formation.core.errors import DecodeError
from formation.core.ids import NetworkId
from formation.state.committee import Committee
from formation.state.former import FormerEpoch
from formation.state.lane import NO_HASH, Head
from formation.state.spine_book import Base, Book, FinalHead, Frame, Known, Overlay, ViewFacts, is_empty
from formation.state.spine_effects import (
    ChainWanted,
    Effect,
    Extras,
    Finalised,
    Journal,
    Oracle,
    Promise,
    Send,
    SendTo,
    Verdict,
    VoterEvidence,
    WakeAt,
)
from formation.state.spine_values import (
    CONTEXT_OF,
    CUT_LANE_COUNT_MAX,
    HEAD_SIZE_MAX_BYTES,
    PROPOSAL_SIZE_MAX_BYTES,
    Kind,
    Proposal,
    ProposalEntry,
    Vote,
    VoteEntry,
    encode_votes,
    final_holds,
    is_chain,
    make_final,
    parse_final,
    parse_proposal,
    parse_vote,
    parse_votes,
    proposal_signature_holds,
    sign_proposal,
    sign_vote,
    vote_signature_holds,
)

__all__ = [
    "Base",
    "ChainWanted",
    "Effect",
    "Extras",
    "Finalised",
    "Frame",
    "Journal",
    "Oracle",
    "Promise",
    "Send",
    "SendTo",
    "Spine",
    "Verdict",
    "VoterEvidence",
    "WakeAt",
]

DELTA_MS = 100
"""What we take for the longest delay of a message between correct voters, to begin with."""
TIMER_MS_MIN = 3 * DELTA_MS
# Doubled for every nullified view, halved by every final one: two continents and a full disk queue fit below this.
TIMER_MS_MAX = 8000
# How often one who waits repeats itself, and how often one peer is answered for one view.
RESEND_MS = 1000
# design/state section 7. Votes for views further ahead are dropped; certificates bring us there.
VIEW_AHEAD_MAX = 8
# An honest leader makes one; two prove that it lies; a notarised one is taken whatever their number.
PROPOSALS_PER_VIEW_MAX = 4
# A validator's clock may be this far behind the leader's (design/state section 4); later is waited for.
AHEAD_MS_MAX = 500
# Nullifications that a leader sends along with a proposal on an old parent; more are asked for by ChainWanted.
JUSTIFY_VIEW_COUNT_MAX = 32
# Views below ours of which we keep single votes and unnotarised proposals.
VIEW_DETAIL_COUNT = 64
# Of one answer to a peer that lags: two full proposals with their votes.
LIFT_SIZE_MAX_BYTES = 640 * 1024
_PROPOSAL_REST_SIZE_BYTES = 1024
"""Of a proposal without its heads and its handover, generously."""


# ── the machine ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Spine:
    """One epoch's consensus. Construct, `recover` each journal record in order, then `poke` and feed it.

    Inputs append to the effects that `drain` takes. Raises DecodeError from inputs only, for what their sender is to
    blame for; then nothing has changed.
    """

    __slots__ = (
        "_answered",
        "_asked_ns",
        "_book",
        "_committee",
        "_convicted",
        "_deadline_ns",
        "_due_ns",
        "_entered_ns",
        "_fresh",
        "_has_news",
        "_is_entered",
        "_is_wanted",
        "_missing_view",
        "_network_id",
        "_oracle",
        "_out",
        "_pending",
        "_sign",
        "_timer_ms",
        "_verify",
        "_wake_ns",
        "is_ended",
        "view",
        "voter",
    )

    def __init__(
        self,
        committee: Committee,
        *,
        network_id: NetworkId,
        voter: int | None,
        base: Base,
        oracle: Oracle,
        sign: Sign,
        verify: Verify,
    ) -> None:
        self._committee = committee
        self._network_id = network_id
        self.voter = voter
        """Our index in the committee; None: an observer, who follows and never votes."""
        self._oracle = oracle
        self._sign = sign
        self._verify = verify
        self._book = Book(base)
        self.view = base.view + 1
        self.is_ended = False
        """Whether a handover is final: this machine votes no more."""
        self._is_entered = False
        """Whether the settling of this view has been done."""
        self._entered_ns = 0
        self._is_wanted = False
        self._has_news = False
        """Whether a Finalised is on its way to the oracle, whose answers are out of date until then."""
        self._timer_ms = TIMER_MS_MIN
        self._deadline_ns: int | None = None
        self._due_ns: int | None = None
        """When what waits for time alone should be looked at again."""
        self._wake_ns: int | None = None
        self._asked_ns: int | None = None
        """When we last asked for a chain."""
        self._missing_view: int | None = None
        """From where on we lack what a proposal of this view needs."""
        self._fresh: list[int] = []
        """Views whose notarisation came since we last looked."""
        self._pending: tuple[VoteEntry, ...] = ()
        """Finalize votes of a quorum for the highest proposal whose chain is not all here."""
        self._answered: dict[int, tuple[int, int]] = {}
        """Voter → (view, time) of our last answer to it."""
        self._convicted: set[int] = set()
        self._out: list[Effect] = []

    # ── what the owner may ask ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def epoch(self) -> int:
        """The committee's."""
        return self._committee.epoch

    @property
    def final(self) -> FinalHead:
        """Height, hash, time and view of the last final proposal."""
        return self._book.final

    @property
    def final_height(self) -> int:
        """Of the last final proposal."""
        return self._book.final.height

    @property
    def final_hash(self) -> bytes:
        """Of the last final proposal."""
        return self._book.final.hash

    @property
    def final_time_ms(self) -> int:
        """Spine time: by which leases expire."""
        return self._book.final.time_ms

    @property
    def is_waiting(self) -> bool:
        """Whether the timer of this view runs."""
        return self._deadline_ns is not None

    def proposal(self, hash_: bytes) -> ProposalEntry | None:
        """A proposal above the final head; None when unknown."""
        known = self._book.entries.get(hash_)
        return None if known is None else known.entry

    def final_seq(self, lane: bytes) -> int:
        """How far a lane is covered by the final chain; 0 when not at all."""
        return self._book.final_seqs.get(lane, 0)

    def missing_voters(self) -> tuple[int, ...]:
        """Voters of whom no vote in this view has arrived; all of them while nothing is wanted."""
        facts = self._book.views.get(self.view)
        voted = set() if facts is None else {voter for votes in facts.votes.values() for voter in votes}
        return tuple(voter for voter in range(len(self._committee.voters)) if voter not in voted)

    def reaches(self, height: int) -> bool:
        """Whether the final heights above this one are all in memory."""
        kept = self._book.kept
        return height >= self.final_height or (bool(kept) and kept[0][0].proposal.height <= height + 1)

    def frames_since(self, *, view: int, height: int, size_max_bytes: int) -> tuple[Frame, ...]:
        """What a peer lacks whose ChainWanted says this: for its `take_frames`.

        Empty of final heights if the peer is further behind than what is kept: it needs a checkpoint (see `reaches`).
        """
        frames = self._book.final_frames(height=height, size_max_bytes=size_max_bytes) if height < self.final_height else []
        size_bytes = sum(len(raw) for _, raw in frames)
        for frame in self._book.open_frames(view=view):
            size_bytes += len(frame[1])
            if frames and size_bytes > size_max_bytes:
                break
            frames.append(frame)
        return tuple(frames)

    def final_frames(self, *, height: int, size_max_bytes: int) -> tuple[Frame, ...]:
        """Final proposals above a height and a certificate at their end, as many as fit; none if memory ends above it."""
        return tuple(self._book.final_frames(height=height, size_max_bytes=size_max_bytes))

    @property
    def lowest_height(self) -> int:
        """Of the first final proposal that is in memory; above the final one if there is none."""
        kept = self._book.kept
        return kept[0][0].proposal.height if kept else self.final_height + 1

    def retire(self) -> FormerEpoch:
        """What of an epoch that has ended is worth keeping."""
        return FormerEpoch(self.epoch, final_height=self.final_height, kept=tuple(self._book.kept))

    def journal_rows(self) -> tuple[Frame, ...]:
        """What a journal must hold that begins at our final head: everything that we may not contradict, and its proof."""
        book = self._book
        rows: list[Frame] = []
        if self.is_ended:
            return ()
        if book.kept:
            rows.append((Kind.FINAL, book.last_final_frames(view=self.final.view + 1)[-1][1]))
        rows.extend((Kind.PROPOSAL, known.entry.raw) for known in book.entries.values() if known.is_journalled)
        for view in sorted(book.views):
            facts = book.views[view]
            if facts.own_proposal is not None:
                rows.append((Kind.PROPOSAL, facts.own_proposal.raw))
            if Kind.FINALIZE in facts.own and facts.notarisation:
                rows.append((Kind.VOTES, facts.notarisation))
            rows.extend((kind, entry.raw) for kind, entry in facts.own.items())
        return tuple(dict.fromkeys(rows))

    def drain(self) -> tuple[Effect, ...]:
        """Effects since the last call, in the order in which they are to be done. After a Finalised, `poke`."""
        out, self._out = tuple(self._out), []
        self._has_news = False
        return out

    # ── recovery: trusted records of our own journal ────────────────────────────────────────────────────────────────

    def recover(self, kind: Kind, raw: bytes) -> None:
        """Take one journal record, in order. What it makes final comes out as Finalised."""
        match kind:
            case Kind.PROPOSAL:
                self.recover_proposal(raw)
            case Kind.VOTES:
                self._certify(parse_votes(raw), is_journalled=True)
            case Kind.FINAL:
                self.recover_final(raw)
            case _:
                self.recover_vote(kind, raw)

    def recover_proposal(self, raw: bytes) -> None:
        """A proposal that we made or voted for, or that became final."""
        entry = parse_proposal(raw)
        if entry.proposal.view <= self.final.view:
            return
        self._book.add(entry).is_journalled = True
        if self._committee.leader(entry.proposal.view) == self.voter:
            self._book.facts(entry.proposal.view).own_proposal = entry

    def recover_vote(self, kind: Kind, raw: bytes) -> None:
        """A vote of our own."""
        entry = parse_vote(kind, raw)
        assert entry.vote.voter == self.voter
        self._count(entry)

    def recover_final(self, raw: bytes) -> None:
        """A final certificate: of the base, or of a proposal above it whose ancestors are recovered too."""
        certificate = parse_final(raw)
        entry = certificate.proposal
        if entry.hash == self.final_hash:
            if not self._book.kept:
                self._book.kept.append((entry, certificate.votes))
                self._book.final_votes = encode_votes(certificate.votes)
        elif entry.proposal.view > self.final.view:
            self.recover_proposal(entry.raw)
            self._certify(certificate.votes, is_journalled=True)

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_frame(self, kind: Kind, raw: bytes, now_ns: int) -> None:
        """A frame of the spine from a peer.

        Raises:
          DecodeError: not what its kind says, out of bounds, or a signature does not hold.
        """
        match kind:
            case Kind.PROPOSAL:
                self.on_proposal(raw, now_ns)
            case Kind.VOTES:
                self.on_votes(raw, now_ns)
            case Kind.FINAL:
                self.on_final(raw, now_ns)
            case _:
                self.on_vote(kind, raw, now_ns)

    def on_proposal(self, raw: bytes, now_ns: int) -> None:
        """A proposal; see `on_frame`."""
        self._learn_proposal(raw)
        self._settle(now_ns)

    def on_vote(self, kind: Kind, raw: bytes, now_ns: int) -> None:
        """A vote from its voter, or by way of others; see `on_frame`."""
        entry = parse_vote(kind, raw)
        vote = entry.vote
        if not self._is_ours(entry) or vote.voter == self.voter:
            return
        if vote.view > self.view + VIEW_AHEAD_MAX and not self.is_ended:
            self._ask(self.view, now_ns)
            return
        if vote.view > self.final.view and not self.is_ended:
            self._learn_votes((entry,))
        self._settle(now_ns)
        # Its voter waits. We have left its view, or want nothing: then it lacks something that we have.
        if kind is Kind.NULLIFY and (vote.view < self.view or not self._is_wanted):
            self._answer(entry, now_ns)

    def on_votes(self, raw: bytes, now_ns: int) -> None:
        """Votes of one kind, view and hash, gathered by a peer; see `on_frame`. Never answered."""
        votes = parse_votes(raw)
        one = votes[0]
        if not all(map(self._is_ours, votes)) or one.vote.view <= self.final.view or self.is_ended:
            return
        # A nullification only steps, so one far ahead is of no use yet; any other certificate leaps.
        can_leap = one.kind is not Kind.NULLIFY and len(votes) >= self._committee.quorum_size
        if one.vote.view <= self.view + VIEW_AHEAD_MAX or can_leap:
            self._learn_votes(votes)
            self._settle(now_ns)

    def on_final(self, raw: bytes, now_ns: int) -> None:
        """A final certificate; see `on_frame`. If we lack its chain, ChainWanted follows."""
        self._learn_final(raw, ())
        self._settle(now_ns)

    def take_frames(self, frames: Sequence[Frame], now_ns: int) -> None:
        """A peer's `frames_since`.

        Of final heights only the certificates' signatures are checked: the proposals before each, ascending from any height up
        to the one above our head, are bound to it by their hashes. What we know to be final already is skipped.

        Raises:
          DecodeError: as in `on_frame`, or final heights that do not lead from our head to their certificate; what came
            before the culprit was taken.
        """
        chain: list[bytes] = []
        try:
            for kind, raw in frames:
                if kind is Kind.PROPOSAL:
                    chain.append(raw)
                elif kind is Kind.FINAL:
                    self._learn_final(raw, chain)
                    self._settle(now_ns)
                    chain = []
                elif kind is Kind.VOTES:
                    for proposal in chain:
                        self._learn_proposal(proposal)
                    chain = []
                    self.on_votes(raw, now_ns)
                else:
                    raise DecodeError(f"sync: {kind} does not belong there")
            for proposal in chain:
                self._learn_proposal(proposal)
        finally:
            self._settle(now_ns)

    def poke(self, now_ns: int) -> None:
        """Lanes moved, a wish or extras changed, or this is the beginning: look again."""
        self._settle(now_ns)

    def tick(self, now_ns: int) -> None:
        """It is as late as WakeAt said."""
        self._wake_ns = None
        self._settle(now_ns)

    def stored(self, promise: Promise, now_ns: int) -> None:
        """This promise is durable: it counts here, and leaves."""
        entry = promise.entry
        view = entry.proposal.view if isinstance(entry, ProposalEntry) else entry.vote.view
        # A finalize vote serves those who miss one, even when it is final here.
        if view > self.final.view or promise.kind is Kind.FINALIZE:
            self._out.append(Send(promise.kind, entry.raw))
        if view > self.final.view:
            if isinstance(entry, ProposalEntry):
                self._book.add(entry).is_journalled = True
                self._out.extend(Send(kind, raw) for kind, raw in self._justification(entry.proposal))
            else:
                self._count(entry)
        self._settle(now_ns)

    # ── learning: facts only ────────────────────────────────────────────────────────────────────────────────────────

    def _is_ours(self, entry: VoteEntry) -> bool:
        """Whether it is of this epoch and committee: others have no effect, and nobody is to blame."""
        return entry.vote.epoch == self.epoch and entry.vote.voter < len(self._committee.voters)

    def _learn_proposal(self, raw: bytes) -> None:
        if sha256(raw) in self._book.entries:
            return
        entry = parse_proposal(raw)
        view = entry.proposal.view
        views = range(self.final.view + 1, self.view + VIEW_AHEAD_MAX + 1)
        if entry.proposal.epoch != self.epoch or view not in views or self.is_ended:
            return
        facts = self._book.facts(view)
        # What a quorum named is wanted, however many others its leader made.
        if facts.notarised != entry.hash and (facts.is_compact or len(facts.proposals) >= PROPOSALS_PER_VIEW_MAX):
            return
        if not proposal_signature_holds(self._verify, self._committee, entry, network_id=self._network_id):
            raise DecodeError("proposal: not signed by the leader of its view")
        for other in facts.proposals.values():
            leader = self._committee.leader(view)
            self._convict(leader, view, (Kind.PROPOSAL, other.entry.header.raw), (Kind.PROPOSAL, entry.header.raw))
        self._book.add(entry)

    def _learn_votes(self, votes: tuple[VoteEntry, ...]) -> None:
        """Votes of one kind, view and hash, above the final view: check what is new, count it."""
        one = votes[0]
        # A view that is far away gets its place with the first vote that holds, not before.
        facts = self._book.views.get(one.vote.view, ViewFacts())
        is_known = (
            facts.nullification if one.kind is Kind.NULLIFY else one.kind is Kind.NOTARIZE and facts.notarised == one.vote.hash
        )
        is_certificate = len(votes) >= self._committee.quorum_size
        if is_known or (facts.is_compact and not is_certificate):
            return
        # What was counted is not checked again; and another signature under the same words is not taken in its place.
        held = facts.votes[one.kind]
        votes = tuple(held[v] if (v := e.vote.voter) in held and held[v].vote == e.vote else e for e in votes)
        fresh = [entry for entry in votes if held.get(entry.vote.voter) is not entry]
        for entry in fresh:
            if not vote_signature_holds(self._verify, self._committee, entry, network_id=self._network_id):
                raise DecodeError("vote: its voter's signature does not hold")
        for entry in fresh:
            self._count(entry)
        # A liar's other vote may have been counted above: the certificate is as good without it.
        if is_certificate:
            self._certify(votes)

    def _learn_final(self, raw: bytes, proposals: Sequence[bytes]) -> None:
        certificate = parse_final(raw)
        last = certificate.proposal
        if last.proposal.epoch != self.epoch or last.proposal.height <= self.final_height or self.is_ended:
            return
        if self._pending and self._pending[0].vote.hash == last.hash and last.hash in self._book.entries and not proposals:
            return
        if not final_holds(self._verify, self._committee, certificate, network_id=self._network_id):
            raise DecodeError("final certificate: not a quorum of this epoch's voters")
        if proposals:
            chain = [entry for entry in map(parse_proposal, proposals) if entry.proposal.height > self.final_height]
            if not chain or chain[-1].hash != last.hash:
                chain.append(last)
            if (
                not is_chain(chain)
                or chain[0].proposal.view <= self.final.view
                or self._book.chain(chain[0].proposal.parent) is None
            ):
                raise DecodeError("final chain: does not lead from our final head to its certificate")
            for entry in chain:
                self._book.add(entry)
        elif last.proposal.view <= self.final.view:
            raise DecodeError("final certificate: contradicts our final head")
        self._book.add(last)
        self._certify(certificate.votes)

    def _count(self, entry: VoteEntry) -> None:
        """Count a vote that holds, the first of its voter for this kind and view."""
        vote, kind = entry.vote, entry.kind
        if vote.view <= self.final.view:
            # The vote counted before this one has made the view final.
            return
        facts = self._book.facts(vote.view)
        if vote.voter == self.voter:
            # Also if a peer shows us a vote that our disk has lost.
            facts.own.setdefault(kind, entry)
        if facts.is_compact:
            return
        votes = facts.votes[kind]
        first = votes.setdefault(vote.voter, entry)
        if first.vote.hash != vote.hash:
            self._convict(vote.voter, vote.view, (kind, first.raw), (kind, entry.raw))
            return
        contrary = {Kind.NULLIFY: Kind.FINALIZE, Kind.FINALIZE: Kind.NULLIFY}.get(kind)
        if contrary is not None and vote.voter in facts.votes[contrary]:
            self._convict(vote.voter, vote.view, (kind, entry.raw), (contrary, facts.votes[contrary][vote.voter].raw))
        alike = tuple(other for other in votes.values() if other.vote.hash == vote.hash)
        if len(alike) >= self._committee.quorum_size:
            self._certify(alike[: self._committee.quorum_size])

    def _certify(self, votes: tuple[VoteEntry, ...], *, is_journalled: bool = False) -> None:
        """Take a certificate: 2f+1 votes that hold."""
        one = votes[0]
        view = one.vote.view
        if view <= self.final.view or self.is_ended:
            return
        facts = self._book.facts(view)
        if one.kind is Kind.NULLIFY:
            facts.nullification = facts.nullification or encode_votes(votes)
            return
        # Finalize votes prove the notarisation too: a correct voter among them has seen it.
        if facts.notarised is None:
            facts.notarised, facts.notarisation = one.vote.hash, encode_votes(votes)
            self._book.top = max(self._book.top, view)
            self._fresh.append(view)
        if one.kind is Kind.FINALIZE:
            chain = self._book.chain(one.vote.hash)
            if chain:
                self._finalise(chain, votes, is_journalled=is_journalled)
            elif not self._pending or self._pending[0].vote.view < view:
                self._pending = votes

    def _finalise(self, chain: list[Known], votes: tuple[VoteEntry, ...], *, is_journalled: bool) -> None:
        for known in chain:
            if not known.is_journalled:
                self._out.append(Journal(Kind.PROPOSAL, known.entry.raw))
        if not is_journalled:
            self._out.append(Journal(Kind.VOTES, encode_votes(votes)))
        certificate = make_final(chain[-1].entry, votes)
        end = next((i for i, known in enumerate(chain) if known.entry.proposal.handover is not None), len(chain) - 1) + 1
        tail = chain[end:]
        self.is_ended = chain[end - 1].entry.proposal.handover is not None
        self._book.finalise(chain[:end], tail, votes)
        if self._pending and (self.is_ended or self._pending[0].vote.view <= self.final.view):
            self._pending = ()
        self._timer_ms = max(TIMER_MS_MIN, self._timer_ms // 2)
        entries = tuple(known.entry for known in chain)
        self._out.append(Finalised(entries[:end], certificate, entries[end:]))
        self._has_news = True

    def _convict(self, voter: int, view: int, one: Frame, other: Frame) -> None:
        if voter not in self._convicted:
            self._convicted.add(voter)
            self._out.append(VoterEvidence(voter, view, one, other))

    # ── acting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self, now_ns: int) -> None:
        """Do whatever the facts and the time allow by now."""
        self._due_ns = None
        self._entered_ns = min(self._entered_ns, now_ns)
        if self._pending and (chain := self._book.chain(self._pending[0].vote.hash)):
            self._finalise(chain, self._pending, is_journalled=False)
        self._advance(now_ns)
        if self.voter is not None and not self.is_ended:
            self._finalize()
            if self._has_news:
                self._due_at(now_ns)
            else:
                self._is_wanted = self._oracle.is_wanted()
                self._propose(now_ns)
                self._notarize(now_ns)
                self._run_timer(now_ns)
        else:
            self._is_wanted, self._deadline_ns = False, None
        if self._pending and not self.is_ended:
            self._ask(self.final.view + 1, now_ns)
        self._wake()

    def _advance(self, now_ns: int) -> None:
        """Enter the highest view that we can: a notarisation leaps, a nullification steps."""
        book, view = self._book, max(self.view, self._book.top + 1)
        while book.is_nullified(view):
            if not self._oracle.is_banned(self._committee.leader(view)):
                self._timer_ms = min(TIMER_MS_MAX, self._timer_ms * 2)
            view += 1
        if view == self.view and self._is_entered:
            return
        for old in range(max(self.view, book.final.view + VIEW_DETAIL_COUNT) - VIEW_DETAIL_COUNT, view - VIEW_DETAIL_COUNT):
            book.forget_content(old)
        self.view, self._is_entered = view, True
        self._entered_ns, self._deadline_ns, self._missing_view = now_ns, None, None
        # After a restart we come through views in which we have voted: others may wait for those very votes.
        self._out.extend(Send(kind, raw) for kind, raw in self._own_frames(view))

    def _finalize(self) -> None:
        """Rule 2, for each notarisation that came, in whatever order they came."""
        fresh, self._fresh = self._fresh, []
        for view in fresh:
            facts = self._book.views.get(view)
            if facts is None or facts.nullification or Kind.NULLIFY in facts.own or Kind.FINALIZE in facts.own:
                continue
            assert facts.notarised is not None
            self._out.append(Journal(Kind.VOTES, facts.notarisation))
            self._promise_vote(Kind.FINALIZE, view, facts.notarised)

    def _propose(self, now_ns: int) -> None:
        if not self._is_wanted or self._committee.leader(self.view) != self.voter:
            return
        facts = self._book.facts(self.view)
        if facts.own_proposal is not None or facts.own or self._oracle.is_banned(self.voter):
            return
        parent = self._book.notarised(self._book.top)
        chain = None if parent is None else self._book.chain(parent)
        if parent is None or chain is None:
            self._missing_view = self.final.view + 1
            return
        overlay = Overlay(self._book, chain)
        proposal = self._make_proposal(parent, overlay, now_ns)
        if is_empty(proposal):
            # In good times the parent is final one message delay after we came here.
            later_ns = self._entered_ns + self._timer_ms * NS_PER_MS // 3
            if not chain or now_ns < later_ns:
                self._due_at(later_ns if chain else None)
                return
        entry = sign_proposal(self._sign, proposal, network_id=self._network_id)
        assert len(entry.raw) <= PROPOSAL_SIZE_MAX_BYTES
        facts.own_proposal = entry
        self._out.append(Promise(Kind.PROPOSAL, entry))
        self._promise_vote(Kind.NOTARIZE, self.view, entry.hash)

    def _make_proposal(self, parent: bytes, overlay: Overlay, now_ns: int) -> Proposal:
        height = overlay.height + 1
        extras = Extras()
        cut: tuple[Head, ...] = ()
        if not overlay.is_ending:
            extras = self._oracle.extras(parent, height)
            cut = self._oracle.next_cut(overlay.seq)
        # An owner may wish for a close before it has what it closes at: others would not vote for that, nor may we.
        certified = (head for head in extras.closes if head.seq == 0 or self._oracle.is_certified(head))
        closes = tuple(head for head in certified if overlay.may_close(head))[:CUT_LANE_COUNT_MAX]
        closed = {head.lane for head in closes}
        room = PROPOSAL_SIZE_MAX_BYTES - _PROPOSAL_REST_SIZE_BYTES - len(extras.handover or b"")
        room -= sum(len(each) + 3 for each in extras.equivocations)
        room_count = min(CUT_LANE_COUNT_MAX, room // HEAD_SIZE_MAX_BYTES - len(closes))
        return Proposal(
            epoch=self.epoch,
            view=self.view,
            height=height,
            parent=parent,
            time_ms=max(overlay.time_ms, now_ns // NS_PER_MS),
            cut=tuple(head for head in cut if head.lane not in closed and overlay.may_advance(head))[:room_count],
            closes=closes,
            checkpoint=extras.checkpoint,
            handover=extras.handover,
            equivocations=extras.equivocations,
        )

    def _notarize(self, now_ns: int) -> None:
        facts = self._book.views.get(self.view)
        if facts is None or Kind.NOTARIZE in facts.own or self._oracle.is_banned(self._committee.leader(self.view)):
            return
        for known in facts.proposals.values():
            if not known.is_refused and self._judge(known, now_ns) is Verdict.ACCEPT:
                if not known.is_journalled:
                    known.is_journalled = True
                    self._out.append(Journal(Kind.PROPOSAL, known.entry.raw))
                self._promise_vote(Kind.NOTARIZE, self.view, known.entry.hash)
                return

    def _run_timer(self, now_ns: int) -> None:
        facts = self._book.views.get(self.view)
        if facts is not None and len(facts.votes[Kind.NULLIFY]) > self._committee.fault_count_max:
            self._nullify()
        if self._is_wanted and self._is_view_barren(facts):
            self._nullify()
        if not self._is_wanted:
            self._deadline_ns = None
        elif self._deadline_ns is None or self._deadline_ns > now_ns + self._timer_ms * NS_PER_MS:
            # New in this view, or the clock was put back.
            self._deadline_ns = now_ns + self._timer_ms * NS_PER_MS
        elif self._deadline_ns <= now_ns:
            self._deadline_ns = now_ns + min(self._timer_ms, RESEND_MS) * NS_PER_MS
            self._nullify()
            self._out.extend(Send(kind, raw) for kind, raw in self._standing_frames())
            if self._missing_view is not None:
                self._ask(self._missing_view, now_ns)

    def _is_view_barren(self, facts: ViewFacts | None) -> bool:
        """Whether nothing will come of this view: its leader is banned, and we did not vote for it before we knew."""
        has_voted = facts is not None and Kind.NOTARIZE in facts.own
        return not has_voted and self._oracle.is_banned(self._committee.leader(self.view))

    def _nullify(self) -> None:
        own = self._book.facts(self.view).own
        if Kind.NULLIFY not in own and Kind.FINALIZE not in own:
            self._promise_vote(Kind.NULLIFY, self.view, NO_HASH)

    def _promise_vote(self, kind: Kind, view: int, hash_: bytes) -> None:
        assert self.voter is not None
        own = self._book.facts(view).own
        assert kind not in own
        vote = Vote(self.epoch, view, self.voter, hash_)
        own[kind] = sign_vote(self._sign, kind, vote, network_id=self._network_id)
        self._out.append(Promise(kind, own[kind]))

    def _due_at(self, at_ns: int | None) -> None:
        if at_ns is not None:
            self._due_ns = at_ns if self._due_ns is None else min(self._due_ns, at_ns)

    def _ask(self, view: int, now_ns: int) -> None:
        """Ask peers for what is missing from this view on, not more often than RESEND_MS."""
        if self._asked_ns is None or not _is_recent(self._asked_ns, now_ns):
            self._asked_ns = now_ns
            self._out.append(ChainWanted(view, self.final_height))
        if self._pending:
            self._due_at(self._asked_ns + RESEND_MS * NS_PER_MS)

    def _wake(self) -> None:
        self._due_at(self._deadline_ns)
        if self._due_ns is not None and self._due_ns != self._wake_ns:
            self._out.append(WakeAt(self._due_ns))
        self._wake_ns = self._due_ns

    # ── judging a proposal of the current view ──────────────────────────────────────────────────────────────────────

    def _judge(self, known: Known, now_ns: int) -> Verdict:
        proposal = known.entry.proposal
        if not known.is_sound:
            verdict = self._judge_place(known)
            if verdict is not Verdict.ACCEPT:
                known.is_refused = verdict is Verdict.REFUSE
                return verdict
            known.is_sound = True
        if is_empty(proposal) and proposal.parent == self.final_hash:
            # Its leader does not know that the parent is final.
            self._lift(self._committee.leader(proposal.view), proposal.view, now_ns)
            known.is_refused = True
            return Verdict.REFUSE
        due_ns = (proposal.time_ms - AHEAD_MS_MAX) * NS_PER_MS
        if now_ns < due_ns:
            self._due_at(due_ns)
            return Verdict.WAIT
        heads = (*proposal.cut, *proposal.closes)
        while known.certified_count < len(heads):
            head = heads[known.certified_count]
            if head.seq > 0 and not self._oracle.is_certified(head):
                return Verdict.WAIT
            known.certified_count += 1
        verdict = self._oracle.check_extras(proposal, now_ns // NS_PER_MS)
        known.is_refused = verdict is Verdict.REFUSE
        return verdict

    def _judge_place(self, known: Known) -> Verdict:
        """Whether it stands on a parent on which it may stand."""
        book, proposal = self._book, known.entry.proposal
        if proposal.parent == self.final_hash:
            parent_view = self.final.view
        else:
            parent = book.entries.get(proposal.parent)
            if parent is None:
                self._missing_view = self.final.view + 1
                return Verdict.WAIT
            parent_view = parent.view
            if parent_view >= proposal.view:
                return Verdict.REFUSE
        if book.notarised(parent_view) != proposal.parent:
            self._missing_view = self.final.view + 1
            return Verdict.WAIT
        # From the highest notarised view on all are nullified, or we would not be in this one.
        for view in range(parent_view + 1, min(book.top, proposal.view - 1) + 1):
            if not book.is_nullified(view):
                self._missing_view = view
                return Verdict.WAIT
        chain = book.chain(proposal.parent)
        if chain is None:
            self._missing_view = self.final.view + 1
            return Verdict.WAIT
        return Verdict.ACCEPT if Overlay(book, chain).may_carry(proposal) else Verdict.REFUSE

    # ── what is said again, and to whom ─────────────────────────────────────────────────────────────────────────────

    def _own_frames(self, view: int) -> list[Frame]:
        """Our stored proposal and votes of a view."""
        facts = self._book.views.get(view)
        if facts is None or self.voter is None:
            return []
        frames: list[Frame] = []
        if facts.own_proposal is not None and facts.own_proposal.hash in self._book.entries:
            frames.append((Kind.PROPOSAL, facts.own_proposal.raw))
            frames.extend(self._justification(facts.own_proposal.proposal))
        stored = (facts.votes[kind].get(self.voter) for kind in CONTEXT_OF)
        frames.extend((entry.kind, entry.raw) for entry in stored if entry is not None)
        return frames

    def _standing_frames(self) -> list[Frame]:
        """What one who waits repeats: its votes of this view, its finalize vote below, and what brought it here."""
        top, before = self._book.views.get(self._book.top), self._book.views.get(self.view - 1)
        frames = self._own_frames(self.view)
        if top is not None and self.voter in top.votes[Kind.FINALIZE]:
            frames.append((Kind.FINALIZE, top.votes[Kind.FINALIZE][self.voter].raw))
        brought = self._book.final_votes if before is None else before.notarisation or before.nullification
        return [*frames, (Kind.VOTES, brought)] if brought else frames

    def _justification(self, proposal: Proposal) -> list[Frame]:
        """What shows that our proposal stands on a notarised parent, where that may not be known to all."""
        book, parent = self._book, self._book.entries.get(proposal.parent)
        proof: list[Frame]
        if parent is None:
            parent_view, is_doubtful = self.final.view, False
            proof = [(Kind.VOTES, book.final_votes)]
        else:
            facts, parent_view = book.facts(parent.view), parent.view
            is_doubtful = bool(facts.votes[Kind.NULLIFY] or facts.nullification)
            proof = [(Kind.PROPOSAL, parent.entry.raw), (Kind.VOTES, facts.notarisation)]
        if parent_view == proposal.view - 1 and not is_doubtful:
            return []
        between = range(parent_view + 1, min(proposal.view, parent_view + 1 + JUSTIFY_VIEW_COUNT_MAX))
        proof += [(Kind.VOTES, book.facts(view).nullification) for view in between if book.is_nullified(view)]
        # After a restart we may not have it ourselves.
        return [(kind, raw) for kind, raw in proof if raw]

    def _answer(self, entry: VoteEntry, now_ns: int) -> None:
        """Somebody waits in a view that we know more of."""
        vote = entry.vote
        if self._may_lift(vote.voter, vote.view, now_ns) and vote_signature_holds(
            self._verify, self._committee, entry, network_id=self._network_id
        ):
            self._lift(vote.voter, vote.view, now_ns)

    def _may_lift(self, voter: int, view: int, now_ns: int) -> bool:
        last_view, last_ns = self._answered.get(voter, (0, 0))
        return voter != self.voter and (view > last_view or not _is_recent(last_ns, now_ns))

    def _lift(self, voter: int, view: int, now_ns: int) -> None:
        """Show a voter in this view the way to ours."""
        if not self._may_lift(voter, view, now_ns):
            return
        self._answered[voter] = (view, now_ns)
        frames = self._book.last_final_frames(view=view)
        size_bytes = sum(len(raw) for _, raw in frames)
        for frame in self._book.open_frames(view=view):
            size_bytes += len(frame[1])
            if frames and size_bytes > LIFT_SIZE_MAX_BYTES:
                break
            frames.append(frame)
        if frames:
            self._out.append(SendTo(voter, tuple(frames)))


def _is_recent(at_ns: int, now_ns: int) -> bool:
    """Whether that was less than RESEND_MS ago; not if the clock was put back behind it."""
    return at_ns <= now_ns < at_ns + RESEND_MS * NS_PER_MS
