"""Reading one item of another network's state, and proving it to others: values and both machines. Pure.

What a stranger is given (`ProofAnswer`) and how it is checked, in this order:

    reconfiguration chain   from a committee that the reader trusts to the newest: each link signed by the one before
    certificate             2f+1 voters of the newest committee finalised a proposal that carries (height, state root)
    Merkle path             item → piece → bucket → root (`checkpoint.verify_item`)
    item                    its bytes, or that there is none: the tree orders items, so absence has a proof, too

Where trust begins: the committee that the cell's record in the root names (`network_cells`), final in the reader's own state,
or proven in the same way against the root; or the founders of a manifest that somebody hands over. Signatures cover the network
id and the epoch, so another network's certificate is one without signatures. Whoever serves it can stay silent or serve an old
checkpoint; it cannot mislead. Each flaw has a name (`Flaw`) and a text that says what to do.

**How fresh.** A proof shows the state at the newest checkpoint that the asked node has stored. The network makes one after a
minute of activity or 50,000 operations, each voter stores it in the seconds after; so in an active cell what is read is some
5 to 90 s old. An idle cell makes none: the newest may be days old and the state still that. The proof carries the spine's time
of its proposal, and the reader names the age that it takes (`age_ms_max`). Beyond that a reader who has seen a height of a
network refuses lower ones (`height_min`), so that reads are monotone. Whoever needs what was decided this second must follow
the cell as an observer.

The server keeps nothing of a reader. Bounds: a request is at most 4 KiB; an answer holds one item (at most 960 KiB), two pieces
of 32 KiB, links up to 1 MiB (the reader asks again for what follows) and one certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from formation.core.codec import HASH_SIZE_BYTES, Verify, decode, encode
from formation.core.errors import DecodeError, UnavailableError
from formation.core.ids import NetworkId
from formation.state.ack import EPOCH_MAX
from formation.state.checkpoint import (
    ITEM_SIZE_MAX_BYTES,
    PIECE_SIZE_BYTES,
    ItemProof,
    SnapshotHead,
    SnapshotSource,
    verify_item,
)
from formation.state.committee import Committee
from formation.state.final_chain import FINAL_CHAIN_SIZE_MAX_BYTES, Proven, final_chain_holds, parse_final_chain
from formation.state.membership import parse_link, verify_links
from formation.state.spine_values import CheckpointRef

PROTOCOL = "/formation/proof/1"
SECTION_LENGTH_MAX = 32
# The longest id of an item is an object's of 256 characters under a kind.
ID_LENGTH_MAX = 512
REQUEST_SIZE_MAX_BYTES = 4 * 1024
# Some hundred changes of a committee of 31; who was away for longer asks again.
LINKS_SIZE_MAX_BYTES = 1024 * 1024
LINKS_COUNT_MAX = 256
# A crowded bucket's list of hashes: 32,000 pieces at most in a whole state (`checkpoint`).
PROOF_SIZE_MAX_BYTES = ITEM_SIZE_MAX_BYTES + 2 * PIECE_SIZE_BYTES + 1024 * 1024
ANSWER_SIZE_MAX_BYTES = LINKS_SIZE_MAX_BYTES + FINAL_CHAIN_SIZE_MAX_BYTES + PROOF_SIZE_MAX_BYTES + 4096
# Questions to one server for one item: 4,096 changes of a committee at 256 a time.
ASK_COUNT_MAX = 16
# A voter's clock may be ahead of ours, and the spine's time ahead of that (`claims`); more is somebody's wrong clock.
AHEAD_MS_MAX = 60_000


class ProofAsk(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """One item, for somebody who trusts the committee of this epoch: array of four."""

    network_id: bytes
    epoch: int
    section: str
    id: str


class ProofAnswer(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Array of four. Links alone: there are more; ask again from the epoch to which these lead."""

    network_id: bytes
    links: tuple[bytes, ...]
    """CBOR of a FinalChain for each change of the committee from the epoch asked for on."""
    checkpoint: bytes
    """CBOR of the FinalChain whose first proposal carries the newest stored checkpoint."""
    item: bytes
    """CBOR of the ItemProof under its root."""


class Flaw(StrEnum):
    """What is wrong with a proof."""

    FORM = "form"
    NETWORK = "network"
    LINK = "link"
    EPOCH = "epoch"
    CERTIFICATE = "certificate"
    CHECKPOINT = "checkpoint"
    PATH = "path"
    AGE = "age"
    ROLLBACK = "rollback"
    TIME = "time"


class ProofError(DecodeError):
    """A proof that proves nothing, or not what was wanted."""

    def __init__(self, flaw: Flaw, message: str) -> None:
        super().__init__(f"{flaw}: {message}", hint=_HINTS[flaw])
        self.flaw = flaw


_ANOTHER = "ask another node of that cell: formation cell show lists them"
_HINTS = {
    Flaw.FORM: "does that node run another version? " + _ANOTHER,
    Flaw.NETWORK: "the address is of a node of another network: the cell's owner renews the record by formation cell add",
    Flaw.LINK: _ANOTHER,
    Flaw.EPOCH: "that node is behind a change of its committee: try again in a minute, or " + _ANOTHER,
    Flaw.CERTIFICATE: _ANOTHER,
    Flaw.CHECKPOINT: _ANOTHER,
    Flaw.PATH: _ANOTHER,
    Flaw.AGE: "an idle cell makes no checkpoints: allow for it by --max-age, or " + _ANOTHER,
    Flaw.ROLLBACK: "that node lags behind another that answered before: try again in a minute",
    Flaw.TIME: "set this machine's clock by NTP; or the clocks of that cell's voters are wrong",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadItem:
    """What was proven."""

    value: bytes | None
    """Canonical CBOR; None: it is proven that there is no such item."""
    height: int
    """Whose state this is."""
    root: bytes
    time_ms: int
    """The spine's time of the proposal that carries the root: the state is not newer."""
    committee: Committee
    """Whose quorum signed: where the next read may begin."""
    signers: tuple[int, ...]
    """Voters in the certificate."""


def parse_ask(raw: bytes) -> ProofAsk:
    """A request of anybody.

    Raises:
      DecodeError: it is none.
    """
    ask = decode(raw, ProofAsk, what="proof request")
    if len(ask.network_id) != HASH_SIZE_BYTES or not 0 <= ask.epoch <= EPOCH_MAX:
        raise DecodeError("proof request: no such network or epoch")
    if not 0 < len(ask.section) <= SECTION_LENGTH_MAX or len(ask.id) > ID_LENGTH_MAX:
        raise DecodeError("proof request: section or id out of bounds")
    return ask


def parse_answer(raw: bytes) -> ProofAnswer:
    """An answer of anybody, within its bounds.

    Raises:
      ProofError: it is none (FORM).
    """
    try:
        answer = decode(raw, ProofAnswer, what="proof")
    except DecodeError as exc:
        raise ProofError(Flaw.FORM, exc.message) from exc
    if len(answer.network_id) != HASH_SIZE_BYTES or len(answer.links) > LINKS_COUNT_MAX:
        raise ProofError(Flaw.FORM, "network id or links out of bounds")
    if bool(answer.checkpoint) != bool(answer.item) or not (answer.checkpoint or answer.links):
        raise ProofError(Flaw.FORM, "certificate and item do not stand together")
    return answer


# ── the reader ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_item(
    section: str,
    object_id: str,
    *,
    network_id: NetworkId,
    trusted: Committee,
    verify: Verify,
    now_ms: int,
    age_ms_max: int | None,
    height_min: int = 0,
) -> Generator[ProofAsk, ProofAnswer, ReadItem]:
    """Ask one server, as often as its answers make progress, until the item is proven.

    Args:
      trusted: a committee of that network that the reader believes in.
      now_ms: by the reader's clock, milliseconds since the epoch.
      age_ms_max: how old the checkpoint may be; None: whatever its age.
      height_min: the highest checkpoint of this network that was seen before.

    Raises:
      ProofError: the server's proof proves nothing.
    """
    committee = trusted
    for _ in range(ASK_COUNT_MAX):
        answer = yield ProofAsk(network_id, committee.epoch, section, object_id)
        if answer.network_id != network_id:
            raise ProofError(
                Flaw.NETWORK, f"asked of network {network_id.hex()[:16]}…, answered of {answer.network_id.hex()[:16]}…"
            )
        committee = follow_links(committee, answer.links, verify=verify, network_id=network_id)
        if answer.checkpoint:
            found = prove(
                answer.checkpoint, answer.item, section, object_id, committee=committee, verify=verify, network_id=network_id
            )
            _check_age(found, now_ms=now_ms, age_ms_max=age_ms_max, height_min=height_min)
            return found
    raise ProofError(Flaw.LINK, f"a chain of committees without an end: {ASK_COUNT_MAX} answers")


def follow_links(known: Committee, links: Sequence[bytes], *, verify: Verify, network_id: NetworkId) -> Committee:
    """The committee to which these lead.

    Raises:
      ProofError: one of them is none, does not follow, or is not signed (LINK).
    """
    try:
        return verify_links(known, map(parse_link, links), verify=verify, network_id=network_id)
    except DecodeError as exc:
        raise ProofError(Flaw.LINK, exc.message) from exc


def prove(
    checkpoint: bytes, item: bytes, section: str, object_id: str, *, committee: Committee, verify: Verify, network_id: NetworkId
) -> ReadItem:
    """What a certificate of this committee and an item proof under its root show.

    Raises:
      ProofError: nothing; says at which step.
    """
    proven, ref = _certified(checkpoint, committee, verify, network_id)
    try:
        value = verify_item(ref.root, section, object_id, decode(item, ItemProof, what="item proof"))
    except DecodeError as exc:
        raise ProofError(Flaw.PATH, f"{section} {object_id[:64]!r}: {exc.message}") from exc
    return ReadItem(
        value=value,
        height=ref.height,
        root=ref.root,
        time_ms=proven.first.proposal.time_ms,
        committee=committee,
        signers=tuple(vote.vote.voter for vote in proven.certificate.votes),
    )


def _certified(raw: bytes, committee: Committee, verify: Verify, network_id: NetworkId) -> tuple[Proven, CheckpointRef]:
    try:
        proven = parse_final_chain(raw)
    except DecodeError as exc:
        raise ProofError(Flaw.FORM, exc.message) from exc
    if proven.epoch != committee.epoch:
        raise ProofError(Flaw.EPOCH, f"a certificate of epoch {proven.epoch}, and its chain leads to epoch {committee.epoch}")
    if not final_chain_holds(verify, committee, proven, network_id=network_id):
        raise ProofError(
            Flaw.CERTIFICATE,
            f"no quorum of epoch {committee.epoch} of network {network_id.hex()[:16]}… signed it "
            "(forged, or another network's)",
        )
    ref = proven.first.proposal.checkpoint
    if ref is None:
        raise ProofError(Flaw.CHECKPOINT, f"what was signed, height {proven.first.proposal.height}, carries no state root")
    return proven, ref


def _check_age(found: ReadItem, *, now_ms: int, age_ms_max: int | None, height_min: int) -> None:
    if found.height < height_min:
        raise ProofError(Flaw.ROLLBACK, f"a checkpoint of height {found.height}, and one of {height_min} was shown before")
    if found.time_ms > now_ms + AHEAD_MS_MAX:
        raise ProofError(Flaw.TIME, f"a checkpoint from {(found.time_ms - now_ms) // 1000} s in the future")
    if age_ms_max is not None and now_ms - found.time_ms > age_ms_max:
        raise ProofError(
            Flaw.AGE, f"a checkpoint {(now_ms - found.time_ms) // 1000} s old, {age_ms_max // 1000} s were allowed"
        )


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a node has to prove with; taken from its replica at one moment."""

    network_id: NetworkId
    links: Sequence[bytes]
    """From the founders on; those behind the checkpoint's epoch are left out."""
    checkpoint: bytes
    """Empty: none is stored."""
    head: SnapshotHead | None


class ProofSource:
    """Proves items of one checkpoint; the levels of its tree are hashed once."""

    __slots__ = ("_content", "_source", "head")

    def __init__(self, head: SnapshotHead) -> None:
        self.head = head
        self._content = b""
        self._source = SnapshotSource(head, lambda _: self._content)

    def prove(self, section: str, object_id: str, content: bytes) -> ItemProof | None:
        """The proof, given the bucket's content; None if the store has moved on to another checkpoint."""
        self._content = content
        return self._source.prove(section, object_id)


def answer_ask(ask: ProofAsk, served: Served, prove_item: Callable[[str, str], ItemProof | None]) -> ProofAnswer:
    """A server's answer.

    Raises:
      UnavailableError: there is no checkpoint here (any more), or of another network.
    """
    if ask.network_id != served.network_id:
        raise UnavailableError(
            f"this is a node of network {served.network_id.hex()[:16]}…, not of {ask.network_id.hex()[:16]}…",
            hint=_HINTS[Flaw.NETWORK],
        )
    if not served.checkpoint or served.head is None:
        raise UnavailableError(
            "no checkpoint is stored here yet", hint="the network makes one after a minute of activity: try again then"
        )
    epoch = parse_final_chain(served.checkpoint).epoch
    if ask.epoch > epoch:
        raise UnavailableError(
            f"the checkpoint here is of epoch {epoch}, and epoch {ask.epoch} is known to you", hint=_HINTS[Flaw.EPOCH]
        )
    links = served.links[ask.epoch : epoch]
    fitting = _fitting(links)
    if len(fitting) < len(links):
        return ProofAnswer(served.network_id, fitting, b"", b"")
    item = prove_item(ask.section, ask.id)
    if item is None:
        raise UnavailableError("a newer checkpoint is being stored", hint="try again in a moment")
    return ProofAnswer(served.network_id, fitting, served.checkpoint, encode(item))


def _fitting(links: Sequence[bytes]) -> tuple[bytes, ...]:
    """As many as one answer holds, at least one."""
    fitting: list[bytes] = []
    size_bytes = 0
    for link in links[:LINKS_COUNT_MAX]:
        size_bytes += len(link)
        if fitting and size_bytes > LINKS_SIZE_MAX_BYTES:
            break
        fitting.append(link)
    return tuple(fitting)
