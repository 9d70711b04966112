from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formation.core.codec import encode
from formation.core.errors import DecodeError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.peer_book import (
    FAILURE_COUNT_MAX,
    FORGOTTEN_AFTER_MS,
    PEER_COUNT_MAX,
    PREFIX_PEER_COUNT_MAX,
    SEEN_RESOLUTION_MS,
    VERSION,
    PeerBook,
    is_dialable,
    prefix_of,
)
from formation.p2p.router import ADDRESS_COUNT_MAX, ADDRESS_LENGTH_MAX

IDS = [KeyPair(bytes((index + 1,)) * 32).node_id for index in range(20)]
OWN, A, B, C = IDS[:4]
NOW_MS = 1_800_000_000_000
DAY_MS = 24 * 3600 * 1000


def at(host: int, *, net: int = 1, port: int = 4700) -> str:
    return f"/ip4/10.{net // 256}.{net % 256}.{host}/tcp/{port}"


def test_a_peer_is_remembered_where_it_was_reached_first() -> None:
    """What it says of itself comes behind, and does not drive that out."""
    book = PeerBook(OWN)
    book.note_seen(A, (at(1), at(2)), now_ms=NOW_MS)
    assert not book.is_proven(A)
    book.note_reached(A, at(3), now_ms=NOW_MS)
    assert book.is_proven(A)
    assert book.addresses(A) == (at(3), at(1), at(2))
    book.note_seen(A, tuple(at(n) for n in range(10, 40)), now_ms=NOW_MS)
    assert book.addresses(A)[0] == at(3)
    assert len(book.addresses(A)) == ADDRESS_COUNT_MAX
    book.note_reached(A, at(99), now_ms=NOW_MS)
    assert book.addresses(A)[:2] == (at(99), at(3))
    assert book.addresses(B) == ()


def test_what_cannot_be_remembered() -> None:
    """Ourselves, and peers that never said where they are."""
    book = PeerBook(OWN)
    book.note_seen(OWN, (at(1),), now_ms=NOW_MS)
    book.note_reached(OWN, at(1), now_ms=NOW_MS)
    book.note_seen(A, (), now_ms=NOW_MS)
    book.note_seen(A, ("/ip4/1.2.3.4/udp/1",), now_ms=NOW_MS)
    book.note_reached(A, "nonsense", now_ms=NOW_MS)
    book.note_failed(A, now_ms=NOW_MS)
    assert len(book) == 0
    assert not book.is_changed


def test_a_book_whose_peers_stay_need_not_be_written() -> None:
    """Only what is news changes it."""
    book = PeerBook(OWN)
    book.note_seen(A, (at(1),), now_ms=NOW_MS)
    book.encode()
    book.note_seen(A, (at(1),), now_ms=NOW_MS + SEEN_RESOLUTION_MS - 1)
    assert not book.is_changed
    book.note_seen(A, (), now_ms=NOW_MS + SEEN_RESOLUTION_MS)
    assert bool(book.is_changed)


def test_candidates_are_those_that_answered_last() -> None:
    """Then those that were seen last."""
    book = PeerBook(OWN)
    book.note_seen(A, (at(1),), now_ms=NOW_MS)
    book.note_seen(B, (at(2),), now_ms=NOW_MS + SEEN_RESOLUTION_MS)
    book.note_seen(C, (at(3),), now_ms=NOW_MS + 2 * SEEN_RESOLUTION_MS)
    book.note_failed(C, now_ms=NOW_MS)
    assert book.candidates() == (B, A, C)
    book.note_seen(C, (), now_ms=NOW_MS)
    assert book.candidates()[0] == C


def test_a_peer_that_is_gone_for_good_is_forgotten() -> None:
    """After some failures and a week; not after failures alone, nor after a week alone."""
    book = PeerBook(OWN)
    for node_id in (A, B):
        book.note_seen(node_id, (at(1),), now_ms=NOW_MS)
    for _ in range(10 * FAILURE_COUNT_MAX):
        book.note_failed(A, now_ms=NOW_MS + FORGOTTEN_AFTER_MS)
    book.note_failed(B, now_ms=NOW_MS + 2 * FORGOTTEN_AFTER_MS)
    assert A in book
    assert B in book
    book.note_failed(A, now_ms=NOW_MS + FORGOTTEN_AFTER_MS + 1)
    assert A not in book


def test_one_network_cannot_fill_the_book() -> None:
    """Of one /24 only so many are kept, the latest."""
    book = PeerBook(OWN)
    book.note_seen(A, (at(1, net=2),), now_ms=0)
    for index in range(4 * PREFIX_PEER_COUNT_MAX):
        book.note_seen(NodeId(f"n{index}"), (at(index % 250 + 1),), now_ms=NOW_MS + index)
    assert len(book) == PREFIX_PEER_COUNT_MAX + 1
    assert A in book
    assert NodeId("n0") not in book


def test_callers_do_not_drive_out_whom_we_reached() -> None:
    """However many identities call on us, from however many networks, and however lately."""
    book = PeerBook(OWN)
    book.note_reached(A, at(1, net=60_000), now_ms=0)
    for index in range(2 * PEER_COUNT_MAX):
        book.note_seen(NodeId(f"n{index}"), (at(1, net=index),), now_ms=NOW_MS + index)
    assert len(book) == PEER_COUNT_MAX
    assert A in book
    assert NodeId("n0") not in book


def test_bans_are_kept_with_it() -> None:
    """Sorted, and written."""
    book = PeerBook(OWN)
    book.set_banned([C, A])
    assert book.is_changed
    assert book.banned == tuple(sorted((A, C)))
    other = PeerBook(OWN)
    other.read(book.encode(), now_ms=NOW_MS)
    assert other.banned == book.banned


HOSTS = st.one_of(
    st.ip_addresses(v=4).filter(lambda ip: not (ip.is_unspecified or ip.is_multicast)).map(lambda ip: f"/ip4/{ip}"),
    st.ip_addresses(v=6).filter(lambda ip: not (ip.is_unspecified or ip.is_multicast)).map(lambda ip: f"/ip6/{ip}"),
    st.sampled_from(["/dns4/a.example", "/dns6/b.example", "/dns/x"]),
)
ADDRESSES = st.builds(lambda host, port: f"{host}/tcp/{port}", HOSTS, st.integers(1, 65535))
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["seen", "reached", "failed"]),
        st.sampled_from(IDS),
        st.lists(ADDRESSES, min_size=1, max_size=12),
        st.integers(0, NOW_MS),
    ),
    max_size=60,
)


@given(CALLS, st.lists(st.sampled_from(IDS), max_size=4))
def test_what_is_written_is_read_back(calls: list[Any], banned: list[NodeId]) -> None:
    """All of it, whatever happened before."""
    book = PeerBook(OWN)
    for kind, node_id, addresses, now_ms in calls:
        if kind == "seen":
            book.note_seen(node_id, addresses, now_ms=now_ms)
        elif kind == "reached":
            book.note_reached(node_id, addresses[0], now_ms=now_ms)
        else:
            book.note_failed(node_id, now_ms=now_ms)
    book.set_banned(banned)
    other = PeerBook(OWN)
    other.read(book.encode(), now_ms=NOW_MS)
    assert (other.candidates(), other.banned) == (book.candidates(), book.banned)
    for node_id in IDS:
        assert other.addresses(node_id) == book.addresses(node_id)
        assert other.is_proven(node_id) == book.is_proven(node_id)
        assert all(map(is_dialable, book.addresses(node_id)))
    assert other.encode() == book.encode()
    assert not other.is_changed


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """By one kind of error, and then nothing has changed."""
    book = PeerBook(OWN)
    book.note_seen(A, (at(1),), now_ms=NOW_MS)
    try:
        book.read(data, now_ms=NOW_MS)
    except DecodeError:
        assert book.addresses(A) == (at(1),)


@pytest.mark.parametrize(
    "value",
    [
        [VERSION + 1, [], []],
        [VERSION, [["12D3KooWnothing", [at(1)], 0, 0, False]], []],
        [VERSION, [[A, [at(1)], 0, 0]], []],
        [VERSION, [[A, [at(1)], "0", 0, False]], []],
        [VERSION, [], ["x"]],
        {"version": VERSION},
    ],
)
def test_a_file_that_is_none_is_refused(value: object) -> None:
    """With a word that says which file."""
    with pytest.raises(DecodeError, match="peer book"):
        PeerBook(OWN).read(encode(value), now_ms=NOW_MS)


def test_a_file_full_of_lies_does_little() -> None:
    """Times that lie ahead, negative counts, our own id, addresses that nobody can dial, far too many rows and bans."""
    rows: list[list[Any]] = [
        [A, [at(1), "/ip4/0.0.0.0/tcp/1", "x" * 1000, *(at(n) for n in range(2, 50))], 2**62, -5, True],
        [OWN, [at(2)], 0, 0, True],
        [B, ["/ip4/1.2.3.4/udp/5"], 0, 0, True],
    ]
    many = [[KeyPair(n.to_bytes(32, "big")).node_id, [at(1)], -1, 0, False] for n in range(1, PEER_COUNT_MAX + 50)]
    book = PeerBook(OWN)
    book.read(encode([VERSION, rows, []]), now_ms=NOW_MS)
    assert book.candidates() == (A,)
    assert book.addresses(A) == tuple(at(n) for n in range(1, ADDRESS_COUNT_MAX + 1))
    assert not book.is_changed
    book.note_seen(B, (at(9),), now_ms=NOW_MS + DAY_MS)
    assert book.candidates() == (B, A)
    book.read(encode([VERSION, many, []]), now_ms=NOW_MS)
    assert len(book) <= PEER_COUNT_MAX


@pytest.mark.parametrize(
    ("address", "is_good"),
    [
        ("/ip4/192.0.2.1/tcp/4700", True),
        ("/ip6/2001:db8::1/tcp/1", True),
        ("/dns4/node.example.org/tcp/65535", True),
        ("/memory/a", True),
        ("/memory/", False),
        ("/memory/a/b", False),
        ("/ip4/0.0.0.0/tcp/4700", False),
        ("/ip4/224.0.0.1/tcp/4700", False),
        ("/ip4/1.2.3.4/tcp/0", False),
        ("/ip4/1.2.3.4/tcp/65536", False),
        ("/ip4/1.2.3.4/tcp/²", False),
        ("/ip4/1.2.3.4/udp/4700", False),
        ("/ip4/1.2.3.4/tcp/4700/ws", False),
        ("/ip4/1.2.3.4/tcp/4700/p2p-circuit", False),
        ("/ip4/1.2.3/tcp/4700", False),
        ("/ip4/::1/tcp/4700", False),
        ("/ip6/fe80::1%eth0/tcp/4700", False),
        ("/ip6/::/tcp/4700", False),
        ("/dns4/-x/tcp/1", False),
        ("/dns4/a b/tcp/1", False),
        ("/dns4//tcp/1", False),
        ("/dns4/" + "a" * ADDRESS_LENGTH_MAX + "/tcp/1", False),
        ("x/ip4/1.2.3.4/tcp/1", False),
        ("/onion3/x/tcp/1", False),
        ("", False),
    ],
)
def test_which_addresses_are_worth_a_dial(address: str, is_good: bool) -> None:
    """IP or name, TCP, a real host and port, and nothing behind."""
    assert is_dialable(address) is is_good


def test_which_network_an_address_is_in() -> None:
    """/24, /48, the domain."""
    assert prefix_of("/ip4/10.1.2.3/tcp/1") == prefix_of("/ip4/10.1.2.200/tcp/2") != prefix_of("/ip4/10.1.3.3/tcp/1")
    assert prefix_of("/ip6/2001:db8:1:2::/tcp/1") == prefix_of("/ip6/2001:db8:1:ff::1/tcp/1")
    assert prefix_of("/dns4/a.Example.org/tcp/1") == prefix_of("/dns6/b.c.example.ORG/tcp/1") == "example.org"
    assert prefix_of("/memory/a") != prefix_of("/memory/b")
