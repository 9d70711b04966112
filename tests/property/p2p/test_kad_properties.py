"""Kademlia's and mDNS's pure parts: what is written is read, rubbish has one error, bounds hold whatever comes."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address

from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.errors import DecodeError
from formation.core.keys import KeyPair
from formation.p2p.kad_records import (
    PER_KEY_COUNT_MAX,
    PER_PROVIDER_COUNT_MAX,
    RECORD_COUNT_MAX,
    RECORD_TTL_S,
    ProviderStore,
    ProviderTally,
)
from formation.p2p.kad_scope import may_be_told
from formation.p2p.kad_table import GROUP_BUCKET_COUNT_MAX, RoutingTable, is_counted
from formation.p2p.kad_wire import (
    K,
    Kind,
    Message,
    MessageDecoder,
    Told,
    decode_address,
    decode_message,
    encode_address,
    encode_message,
)
from formation.p2p.mdns_wire import decode_packet, encode_answer, peers_in, service_name
from formation.p2p.peer_book import is_dialable

OWN = KeyPair(b"o" * 32).node_id
IDS = [KeyPair(index.to_bytes(32, "big")).node_id for index in range(1, 120)]
ADDRESSES = ["/ip4/192.0.2.1/tcp/4700", "/ip6/2001:db8::1/tcp/1", "/dns4/node.example/tcp/65535", "/memory/abc"]
SERVICE = service_name(b"\xab\xcd\xef\x01" + bytes(28))


def public(n: int) -> str:
    return f"/ip4/9.{n // 250}.{n % 250}.1/tcp/1"


def lan(n: int) -> str:
    return f"/ip4/192.168.1.{n % 250 + 1}/tcp/1"


told = st.builds(
    lambda node_id, addresses: Told(node_id=node_id, addresses=tuple(addresses)),
    st.sampled_from(IDS),
    st.lists(st.sampled_from(ADDRESSES), unique=True),
)
messages = st.builds(
    lambda kind, key, closer, providers: Message(kind=kind, key=key, closer=tuple(closer), providers=tuple(providers)),
    st.sampled_from(Kind),
    st.binary(max_size=128),
    st.lists(told, max_size=K, unique_by=lambda each: each.node_id),
    st.lists(told, max_size=K, unique_by=lambda each: each.node_id),
)


@given(st.lists(messages, max_size=4), st.integers(1, 40))
def test_what_was_written_is_read(sent: list[Message], chunk: int) -> None:
    """In whatever pieces it arrives."""
    data = b"".join(map(encode_message, sent))
    decoder = MessageDecoder()
    read = [m for start in range(0, len(data), chunk) for m in decoder.feed(data[start : start + chunk])]
    assert read == sent


@given(st.binary(max_size=200))
def test_rubbish_of_kad_is_refused(data: bytes) -> None:
    """With the one error, or it happens to be a message."""
    decoder = MessageDecoder()
    try:
        decoder.feed(data)
        decode_message(data)
    except DecodeError:
        pass
    address = decode_address(data)
    assert address is None or is_dialable(address)


@given(st.sampled_from(ADDRESSES))
def test_an_address_comes_back(address: str) -> None:
    """Through its binary form."""
    assert decode_address(encode_address(address)) == address


@given(st.binary(max_size=300), st.integers(0, 250))
def test_rubbish_of_mdns_is_refused(data: bytes, at: int) -> None:
    """Alone, or over a packet that was right."""
    right = encode_answer(SERVICE, "random", OWN, ADDRESSES[:1])
    for each in (data, right[:at] + data, right[:at] + data[:1] + right[at + 1 :]):
        try:
            peers_in(decode_packet(each), SERVICE, source="192.168.1.5")
        except DecodeError:
            continue


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 300))
def test_the_table_stays_within_its_bounds(seed: int, count: int) -> None:
    """Whatever comes in whatever order: buckets, shares and the count of groups are right."""
    rng, table = random.Random(seed), RoutingTable(OWN)
    for step in range(count):
        node_id = rng.choice(IDS)
        match rng.randrange(4):
            case 0:
                table.failed(node_id)
            case 1:
                table.seen(node_id, now_s=step)
            case _:
                where = rng.choice((public(rng.randrange(6)), lan(rng.randrange(9))))
                table.add(node_id, (where,), seen_at=where, now_s=step, is_pinned=rng.random() < 0.1)
    contacts = table.contacts()
    assert len({c.node_id for c in contacts}) == len(contacts) == len(table)
    buckets: dict[int, list[str]] = {}
    for contact in contacts:
        buckets.setdefault(table.bucket_of(contact.place), []).append("pinned" if contact.is_pinned else contact.group)
    for groups in buckets.values():
        assert len(groups) <= K
        # One that was pinned once may be counted again.
        assert all(groups.count(g) <= GROUP_BUCKET_COUNT_MAX + groups.count("pinned") + 5 for g in groups if is_counted(g))
    assert sum(table._groups.values()) == len(contacts)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 400))
def test_the_records_stay_within_their_bounds(seed: int, count: int) -> None:
    """Whatever is said, forgotten and asked in whatever order: shares are counted right, nobody is told of too late."""
    rng, store, now_s = random.Random(seed), ProviderStore(), 0.0
    keys = [b"%d" % n for n in range(4)]
    for _ in range(count):
        node_id, key = rng.choice(IDS), rng.choice(keys)
        now_s += rng.choice((0.0, 1.0, RECORD_TTL_S / 50))
        match rng.randrange(8):
            case 0:
                store.forget(node_id)
            case 1:
                store.expire(now_s=now_s)
            case 2:
                told = store.get(key, now_s=now_s, count_max=K)
                assert len({each.node_id for each in told}) == len(told) <= K
            case _:
                network, host = rng.choice("abc"), rng.choice("123")
                store.add(key, Told(node_id=node_id, addresses=()), network=network, host=host, now_s=now_s)
        records = [record for kept in store._keys.values() for record in kept.values()]
        assert len(records) == len(store) <= RECORD_COUNT_MAX
        assert all(0 < len(kept) <= PER_KEY_COUNT_MAX for kept in store._keys.values())
        assert all(0 < n <= PER_PROVIDER_COUNT_MAX for n in store._per_provider.values())
        assert [sum(counts.values()) for counts in store._shares._counts] == [len(records)] * 3


@given(st.lists(st.lists(st.sampled_from(IDS[:30]), max_size=K, unique=True), max_size=8), st.integers(1, 9), st.randoms())
def test_who_is_named_by_more_comes_first(answers: list[list[str]], count_max: int, rng: random.Random) -> None:
    """Never somebody with fewer voices before somebody with more, and nobody twice."""
    tally = ProviderTally(OWN)
    for voice, names in enumerate(answers):
        tally.hear(str(voice), [Told(node_id=type(OWN)(name), addresses=()) for name in names])
    voices = {name: sum(name in names for names in answers) for names in answers for name in names}
    best = [told.node_id for told in tally.best(count_max=count_max, shuffle=rng.shuffle)]
    assert len(set(best)) == len(best) == min(count_max, len(voices))
    assert [voices[name] for name in best] == sorted(voices.values(), reverse=True)[:count_max]


@given(st.ip_addresses(), st.ip_addresses())
def test_who_is_nearer_may_tell_more(ip: IPv4Address | IPv6Address, teller: IPv4Address | IPv6Address) -> None:
    """What is believed of a stranger far away is believed of everybody; and anybody may tell where it is itself."""
    told, seen_at = (f"/ip{each.version}/{each}/tcp/1" for each in (ip, teller))
    if ip == teller or may_be_told(told, seen_at="/ip4/9.9.9.9/tcp/1", own=()):
        assert may_be_told(told, seen_at=seen_at, own=())
