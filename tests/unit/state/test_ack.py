"""Acknowledgements: bounds on the wire, and what a tally of them proves."""

from __future__ import annotations

from typing import Any

import pytest

from formation.core.codec import Context, encode, sign_value
from formation.core.errors import DecodeError
from formation.state.ack import ACK_HEAD_COUNT_MAX, EPOCH_MAX, AckBook, Tally, ack_signature_holds, parse_ack
from formation.state.lane import SEQ_MAX, Head, LaneId
from tests.unit.state.replicas import KEYS, NETWORK_ID, head_of, make_ack, make_block, make_chain, signer, verify

LANE = LaneId(b"L" * 42)


def lanes(count: int) -> list[list[Any]]:
    return [[n.to_bytes(42, "big"), 1, bytes(32)] for n in range(count)]


def raw_ack(epoch: int = 0, voter: int = 1, n: int = 1, heads: Any = None) -> bytes:
    payload = encode([epoch, voter, n, lanes(1) if heads is None else heads])
    return sign_value(signer(KEYS[1]), Context.ACK, network_id=NETWORK_ID, payload=payload, epoch=max(0, epoch)).raw


def head(seq: int, tag: bytes = b"h") -> Head:
    return Head(LANE, seq, tag * 32)


def test_an_ack_holds_in_its_epoch_and_network() -> None:
    """What it says of its epoch is what its signature covers."""
    entry = parse_ack(make_ack(1, make_block(), epoch=3))
    assert ack_signature_holds(verify, KEYS[1], entry, network_id=NETWORK_ID)
    assert not ack_signature_holds(verify, KEYS[2], entry, network_id=NETWORK_ID)
    as_of_four = sign_value(
        lambda _: entry.signed.signature, Context.ACK, network_id=NETWORK_ID, payload=raw_payload(4), epoch=4
    )
    assert not ack_signature_holds(verify, KEYS[1], parse_ack(as_of_four.raw), network_id=NETWORK_ID)


def raw_payload(epoch: int) -> bytes:
    return encode([epoch, 1, 1, lanes(1)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": -1},
        {"epoch": EPOCH_MAX + 1},
        {"voter": 31},
        {"voter": -1},
        {"n": 0},
        {"n": SEQ_MAX + 1},
        {"heads": []},
        {"heads": lanes(ACK_HEAD_COUNT_MAX + 1)},
        {"heads": lanes(1) * 2},
        {"heads": [[LANE, 0, bytes(32)]]},
        {"heads": [[LANE, 1, bytes(31)]]},
        {"heads": [[LANE[1:], 1, bytes(32)]]},
    ],
    ids=str,
)
def test_an_ack_out_of_bounds_is_refused(wrong: dict[str, Any]) -> None:
    """Each bound from outside."""
    with pytest.raises(DecodeError):
        parse_ack(raw_ack(**wrong))


@pytest.mark.parametrize(
    "right", [{"epoch": EPOCH_MAX}, {"voter": 30}, {"n": SEQ_MAX}, {"heads": lanes(ACK_HEAD_COUNT_MAX)}], ids=str
)
def test_an_ack_at_its_bounds_is_taken(right: dict[str, Any]) -> None:
    """Each bound from inside."""
    parse_ack(raw_ack(**right))


def test_a_quorum_of_confirmed_acks_certifies_what_all_of_them_reach() -> None:
    """The highest number that 3 of 4 acknowledged; unconfirmed acks count nothing."""
    tally = Tally(voter_count=4, quorum_size=3)
    for voter, seq in enumerate((5, 3, 4)):
        tally.put(voter, head(seq), b"raw%d" % voter)
        assert tally.certified_seq() == 0
    for voter, seq in enumerate((5, 3)):
        tally.confirm(voter, seq)
    assert tally.certified_seq() == 0
    tally.confirm(2, 4)
    assert tally.certified_seq() == 3
    assert [voter for voter, _ in tally.proof(4)] == [0, 2]
    tally.reset_confirmed(2)
    assert tally.certified_seq() == 2


def test_a_claim_needs_a_quorum_of_any_blocks() -> None:
    """is_claimed asks for numbers only: forks are told apart elsewhere."""
    tally = Tally(voter_count=4, quorum_size=3)
    for voter, tag in enumerate((b"a", b"b", b"c")):
        assert not tally.is_claimed(2)
        tally.put(voter, head(2, tag), b"")
    assert tally.is_claimed(2)
    assert not tally.is_claimed(3)
    assert [voter for voter, _ in tally.voters_of(2, b"b" * 32)] == [1]


def test_an_older_ack_is_not_news() -> None:
    """Only a higher number is a voter's newest."""
    tally = Tally(voter_count=4, quorum_size=3)
    tally.put(0, head(2), b"")
    assert not tally.is_newer(0, 2)
    assert tally.is_newer(0, 3)
    with pytest.raises(AssertionError):
        tally.put(0, head(2), b"")


def test_the_book_keeps_an_ack_while_it_is_somebodys_newest() -> None:
    """One ack may be the newest word for many lanes; it goes with the last of them."""
    chain = make_chain(2)
    book, lane = AckBook(), LaneId(chain[0].block.lane)
    old, new = parse_ack(make_ack(1, chain[0])), parse_ack(make_ack(1, chain[1], n=2))
    book.put(old, [lane, LANE])
    book.put(new, [lane])
    assert book.newest(1, lane) is new
    assert book.newest(1, LANE) is old
    assert old.lane_count == 1
    book.forget(LANE, voter_count=4)
    assert (old.lane_count, book.newest(1, LANE)) == (0, None)
    assert head_of(chain[1]) == new.ack.heads[0]
