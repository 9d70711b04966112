"""Every lie that a server of proofs could tell has its own error, and what is accepted is what the state was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formation.core.codec import encode, verify_ed25519
from formation.core.errors import DecodeError, UnavailableError
from formation.core.ids import NetworkId
from formation.core.manifest import found_network
from formation.state import remote_cell
from formation.state.checkpoint import ItemProof, StateTree, bucket_number
from formation.state.final_chain import FinalChain
from formation.state.membership import Handover
from formation.state.remote_cell import (
    ASK_COUNT_MAX,
    LINKS_COUNT_MAX,
    Flaw,
    ProofAnswer,
    ProofAsk,
    ProofError,
    ProofSource,
    ReadItem,
    Served,
    answer_ask,
    parse_answer,
    parse_ask,
    read_item,
)
from formation.state.spine_values import CheckpointRef
from tests.unit.state import proofs
from tests.unit.state.proofs import FOUNDERS, KEYS, NETWORK_ID, NEXT, TIME_MS, make_tree

HEIGHT = 9
OTHER = found_network("other", voters=[(f"n{i}", KEYS[i], (f"/memory/{i}",)) for i in range(4)], founded_ms=TIME_MS)
"""Another network of the very same voters."""


@dataclass
class Server:
    """A node of a cell whose committee changed once, with a checkpoint."""

    tree: StateTree
    links: tuple[bytes, ...]
    checkpoint: bytes
    network_id: NetworkId = NETWORK_ID

    def __call__(self, ask: ProofAsk) -> ProofAnswer:
        head = self.tree.head(HEIGHT)
        source = ProofSource(head)
        served = Served(network_id=self.network_id, links=self.links, checkpoint=self.checkpoint, head=head)
        return answer_ask(ask, served, lambda s, i: source.prove(s, i, self.tree.bucket(bucket_number(s, i))))


def make_server(tree: StateTree | None = None, **changes: Any) -> Server:
    tree = tree or make_tree()
    entry = proofs.proposal(committee=NEXT, height=HEIGHT + 1, parent=b"p" * 32, checkpoint=CheckpointRef(HEIGHT, tree.root()))
    return replace(Server(tree, (proofs.link(),), proofs.final(entry, committee=NEXT)), **changes)


def read(serve: Callable[[ProofAsk], ProofAnswer], object_id: str = "node7", **changes: Any) -> ReadItem:
    options: dict[str, Any] = {
        "network_id": NETWORK_ID,
        "trusted": FOUNDERS,
        "verify": verify_ed25519,
        "now_ms": TIME_MS + 1000,
        "age_ms_max": 60_000,
    }
    steps = read_item("cell.node", object_id, **options | changes)
    ask = next(steps)
    while True:
        # As it comes over the wire.
        answer = parse_answer(encode(serve(parse_ask(encode(ask)))))
        try:
            ask = steps.send(answer)
        except StopIteration as end:
            found: ReadItem = end.value
            return found


def flaw(serve: Callable[[ProofAsk], ProofAnswer], **changes: Any) -> tuple[Flaw, str]:
    with pytest.raises(ProofError) as caught:
        read(serve, **changes)
    assert caught.value.hint
    assert str(caught.value.flaw) in caught.value.message
    return caught.value.flaw, caught.value.message


def test_an_item_and_an_absence_are_proven() -> None:
    """Whoever trusts the founders follows the link; whoever trusts the newer committee needs none."""
    server = make_server()
    for trusted in (FOUNDERS, NEXT):
        found = read(server, trusted=trusted)
        assert found.value == encode([7, "x" * 7]) == server.tree.get("cell.node", "node7")
        assert (found.height, found.root, found.committee) == (HEIGHT, server.tree.root(), NEXT)
        assert found.time_ms == TIME_MS + HEIGHT + 1
        assert found.signers == (0, 1, 2)
        assert read(server, "nobody", trusted=trusted).value is None


def test_an_empty_state_proves_absence() -> None:
    assert read(make_server(StateTree())).value is None


def altered(**changes: Any) -> Callable[[ProofAsk], ProofAnswer]:
    """A server whose answers have other fields."""

    def serve(ask: ProofAsk) -> ProofAnswer:
        return msgspec.structs.replace(make_server()(ask), **changes)

    return serve


def test_another_networks_answer() -> None:
    """By its own id, and, should it lie about that, by its signatures; even of the same voters."""
    assert flaw(altered(network_id=bytes(OTHER.network_id)))[0] is Flaw.NETWORK
    server = make_server()

    def lies(ask: ProofAsk) -> ProofAnswer:
        plain = server(msgspec.structs.replace(ask, network_id=bytes(NETWORK_ID)))
        return msgspec.structs.replace(plain, network_id=bytes(OTHER.network_id))

    what, text = flaw(lies, network_id=OTHER.network_id, trusted=NEXT)
    assert what is Flaw.CERTIFICATE
    assert "another network's" in text


def test_a_link_that_is_forged_skipped_or_none() -> None:
    handover = Handover(freezes=(b"\0" * 32,) * 3, cut=(), closed=(), next=NEXT)
    entry = proofs.proposal(height=5, parent=b"p" * 32, handover=encode(handover))
    two = proofs.final(entry, voters=(0, 1))
    assert flaw(altered(links=(two,)))[0] is Flaw.LINK
    assert flaw(altered(links=(proofs.link(), proofs.link())))[0] is Flaw.LINK
    assert flaw(altered(links=(b"junk",)))[0] is Flaw.LINK
    plain = proofs.final(proofs.proposal(height=5))
    assert flaw(altered(links=(plain,)))[0] is Flaw.LINK


def test_a_certificate_of_the_wrong_epoch() -> None:
    """The old committee's word counts no more once its successor is known; the new one's not before its link is shown."""
    tree = make_tree()
    ref = CheckpointRef(HEIGHT, tree.root())
    old = proofs.final(proofs.proposal(height=HEIGHT + 1, parent=b"p" * 32, checkpoint=ref))
    assert flaw(altered(checkpoint=old))[0] is Flaw.EPOCH
    what, text = flaw(altered(links=()))
    assert what is Flaw.EPOCH
    assert "of epoch 1" in text
    assert "epoch 0" in text


def test_a_certificate_that_no_quorum_signed() -> None:
    tree = make_tree()
    entry = proofs.proposal(committee=NEXT, height=HEIGHT + 1, parent=b"p" * 32, checkpoint=CheckpointRef(HEIGHT, tree.root()))
    two = proofs.final(entry, committee=NEXT, voters=(0, 1))
    assert flaw(altered(checkpoint=two))[0] in (Flaw.CERTIFICATE, Flaw.FORM)
    wrong = FinalChain((), proofs.final(entry, committee=NEXT))
    assert flaw(altered(checkpoint=encode(wrong)))[0] is Flaw.FORM


def test_a_certificate_without_a_state() -> None:
    entry = proofs.proposal(committee=NEXT, height=HEIGHT + 1, parent=b"p" * 32)
    assert flaw(altered(checkpoint=proofs.final(entry, committee=NEXT)))[0] is Flaw.CHECKPOINT


def test_a_path_of_another_item_or_root() -> None:
    server = make_server()
    other = server(ProofAsk(NETWORK_ID, 0, "cell.node", "node8")).item
    assert flaw(altered(item=other))[0] is Flaw.PATH
    assert flaw(altered(item=b"\x80"))[0] is Flaw.PATH
    bigger = make_tree(301)
    source = ProofSource(bigger.head(HEIGHT))
    proof = source.prove("cell.node", "node7", bigger.bucket(bucket_number("cell.node", "node7")))
    what, text = flaw(altered(item=encode(proof)))
    assert what is Flaw.PATH
    assert "another root" in text or "node" in text


def test_old_checkpoints_and_clocks() -> None:
    server = make_server()
    late_ms = TIME_MS + HEIGHT + 1 + 60_001
    what, text = flaw(server, now_ms=late_ms)
    assert what is Flaw.AGE
    assert "60 s were allowed" in text
    assert read(server, now_ms=late_ms - 1).height == HEIGHT
    assert read(server, now_ms=late_ms, age_ms_max=None).height == HEIGHT
    assert flaw(server, height_min=HEIGHT + 1)[0] is Flaw.ROLLBACK
    assert read(server, height_min=HEIGHT).height == HEIGHT
    assert flaw(server, now_ms=TIME_MS - remote_cell.AHEAD_MS_MAX)[0] is Flaw.TIME


def test_an_answer_out_of_form() -> None:
    for raw in (
        b"",
        b"\x80",
        encode([bytes(NETWORK_ID), [], b"c", b""]),
        encode([bytes(NETWORK_ID), [], b"", b""]),
        encode([bytes(31), [b"l"], b"", b""]),
        encode([bytes(NETWORK_ID), [b""] * (LINKS_COUNT_MAX + 1), b"", b""]),
    ):
        with pytest.raises(ProofError) as caught:
            parse_answer(raw)
        assert caught.value.flaw is Flaw.FORM
    for raw in (
        b"\x80",
        encode([bytes(32), -1, "s", ""]),
        encode([bytes(32), 0, "s" * 33, ""]),
        encode([bytes(32), 0, "s", "i" * 513]),
    ):
        with pytest.raises(DecodeError):
            parse_ask(raw)


def test_links_come_in_pieces_and_not_for_ever() -> None:
    """An answer that holds only links is followed by another question; one that makes no progress ends."""
    asks: list[int] = []
    server = make_server()

    def stepwise(ask: ProofAsk) -> ProofAnswer:
        asks.append(ask.epoch)
        whole = server(msgspec.structs.replace(ask, epoch=1))
        return whole if ask.epoch else ProofAnswer(NETWORK_ID, (proofs.link(),), b"", b"")

    assert read(stepwise).height == HEIGHT
    assert asks == [0, 1]

    def circles(_: ProofAsk) -> ProofAnswer:
        return ProofAnswer(NETWORK_ID, (proofs.link(),), b"", b"")

    # The second time it does not follow.
    assert flaw(circles)[0] is Flaw.LINK


def test_a_server_sends_as_many_links_as_fit() -> None:
    """A long chain in several answers, none longer than its bounds, and the reader gets through."""
    links = tuple(bytes([1]) * 500_000 for _ in range(5))
    checkpoint = make_server().checkpoint

    def at_epoch(epoch: int) -> ProofAnswer:
        served = Served(network_id=NETWORK_ID, links=links, checkpoint=checkpoint, head=make_tree().head(HEIGHT))
        return answer_ask(ProofAsk(NETWORK_ID, epoch, "spine", ""), served, lambda *_: ItemProof(0, (), b"", ()))

    # The checkpoint is of epoch 1: only links up to there are ever sent.
    assert at_epoch(0).links == links[:1]
    assert at_epoch(1).links == ()
    assert len(remote_cell._fitting(links)) == 2
    assert len(remote_cell._fitting((b"l",) * 1000)) == LINKS_COUNT_MAX
    assert remote_cell._fitting((bytes(2_000_000),)) == (bytes(2_000_000),)
    assert ASK_COUNT_MAX * LINKS_COUNT_MAX >= 4096


def test_a_server_says_what_it_lacks() -> None:
    head = make_tree().head(HEIGHT)
    good = Served(network_id=NETWORK_ID, links=(), checkpoint=make_server().checkpoint, head=head)
    ask = ProofAsk(NETWORK_ID, 1, "spine", "")
    for served, asked, text in (
        (replace(good, checkpoint=b""), ask, "no checkpoint"),
        (replace(good, head=None), ask, "no checkpoint"),
        (good, msgspec.structs.replace(ask, epoch=2), "epoch 2 is known to you"),
        (good, msgspec.structs.replace(ask, network_id=b"x" * 32), "not of"),
        (good, ask, "newer checkpoint"),
    ):
        with pytest.raises(UnavailableError, match=text):
            answer_ask(asked, served, lambda *_: None)


SERVER = make_server()
GOOD = encode(SERVER(ProofAsk(NETWORK_ID, 0, "cell.node", "node7")))


@given(
    at=st.integers(0, len(GOOD) - 1),
    bits=st.integers(1, 255),
    cut=st.booleans(),
)
def test_no_changed_byte_changes_what_is_read(at: int, bits: int, cut: bool) -> None:
    """Any byte of an answer altered, or its end cut off: refused, or the very same value (votes beyond a quorum may fall)."""
    raw = GOOD[:at] if cut else GOOD[:at] + bytes([GOOD[at] ^ bits]) + GOOD[at + 1 :]
    steps = read_item(
        "cell.node",
        "node7",
        network_id=NETWORK_ID,
        trusted=FOUNDERS,
        verify=verify_ed25519,
        now_ms=TIME_MS,
        age_ms_max=None,
    )
    next(steps)
    with pytest.raises((ProofError, StopIteration)) as end:
        steps.send(parse_answer(raw))
    if isinstance(end.value, StopIteration):
        assert end.value.value.value == SERVER.tree.get("cell.node", "node7")
        assert (end.value.value.root, end.value.value.height) == (SERVER.tree.root(), HEIGHT)


@given(
    keys=st.lists(st.tuples(st.sampled_from(["claim", "account", "cells"]), st.text(max_size=40)), max_size=40, unique=True),
    asked=st.tuples(st.sampled_from(["claim", "account", "cells"]), st.text(max_size=40)),
    size=st.integers(0, 9000),
)
def test_what_is_proven_is_what_is_there(keys: list[tuple[str, str]], asked: tuple[str, str], size: int) -> None:
    """Of any state, any item or absence, also where buckets have several pieces."""
    tree = StateTree()
    tree.update({key: encode(["v" * size, *key]) for key in keys})
    server = make_server(tree)
    for section, object_id in [asked, *keys[:3]]:
        steps = read_item(
            section,
            object_id,
            network_id=NETWORK_ID,
            trusted=NEXT,
            verify=lambda *_: True,
            now_ms=TIME_MS,
            age_ms_max=None,
        )
        ask = next(steps)
        with pytest.raises(StopIteration) as end:
            steps.send(parse_answer(encode(server(ask))))
        assert end.value.value.value == tree.get(section, object_id)
