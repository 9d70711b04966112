"""Laws of the machines below reachability: codecs, places at a relay, the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formation.core.errors import DecodeError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.multiaddrs import decode_multiaddr, encode_multiaddr
from formation.p2p.protobuf import decode_fields, decode_varint, encode_fields, encode_varint
from formation.p2p.rate import WINDOW_S, Rate
from formation.p2p.reach_messages import (
    DialAnswer,
    DialRequest,
    HopKind,
    HopMessage,
    Limit,
    PunchKind,
    PunchMessage,
    Reserved,
    Status,
    StopKind,
    StopMessage,
    decode_dial_answer,
    decode_dial_request,
    decode_hop,
    decode_punch,
    decode_stop,
    encode_dial_answer,
    encode_dial_request,
    encode_hop,
    encode_punch,
    encode_stop,
    observed_in_identify,
)
from formation.p2p.reachability import DialBack, Reach, Sighting, judge, overall
from formation.p2p.reservations import Ends, RelayBook, RelayLimits

IDS = [KeyPair(bytes((n,)) * 32).node_id for n in range(12)]
ips = st.ip_addresses().filter(lambda ip: not (ip.is_unspecified or ip.is_multicast or getattr(ip, "ipv4_mapped", None)))
direct = st.builds(lambda ip, port: f"/ip{ip.version}/{ip}/tcp/{port}", ips, st.integers(1, 65535))
node_ids = st.sampled_from(IDS)
addresses = st.one_of(direct, st.builds(lambda a, n: f"{a}/p2p/{n}/p2p-circuit", direct, node_ids))
some_addresses = st.lists(addresses, max_size=8).map(tuple)
limits = st.builds(Limit, duration_s=st.integers(0, 2**32 - 1), size_bytes=st.integers(0, 2**64 - 1))
DECODERS: list[Callable[[bytes], Any]] = [
    decode_hop, decode_stop, decode_dial_request, decode_dial_answer, decode_punch, decode_fields, observed_in_identify,
]  # fmt: skip


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_varints_come_back(value: int, behind: bytes) -> None:
    encoded = encode_varint(value)
    assert decode_varint(encoded + behind) == (value, len(encoded))


@given(addresses)
def test_multiaddrs_come_back(address: str) -> None:
    assert decode_multiaddr(encode_multiaddr(address)) == address


@given(node_ids, st.none() | limits, st.builds(Reserved, expires_s=st.integers(0, 2**63), addresses=some_addresses))
def test_relay_messages_come_back(peer: NodeId, limit: Limit | None, reserved: Reserved) -> None:
    for hop in (
        HopMessage(kind=HopKind.RESERVE),
        HopMessage(kind=HopKind.CONNECT, peer=peer),
        HopMessage(kind=HopKind.STATUS, status=Status.OK, reserved=reserved, limit=limit),
    ):
        assert decode_hop(encode_hop(hop)) == hop
    stop = StopMessage(kind=StopKind.CONNECT, peer=peer, limit=limit)
    assert decode_stop(encode_stop(stop)) == stop


@given(node_ids, some_addresses, st.text(max_size=20).filter(str.isprintable))
def test_other_messages_come_back(peer: NodeId, several: tuple[str, ...], text: str) -> None:
    request = DialRequest(node_id=peer, addresses=several)
    assert decode_dial_request(encode_dial_request(request)) == request
    answer = DialAnswer(status=100, text=text, address=several[0] if several else "")
    assert decode_dial_answer(encode_dial_answer(answer)) == answer
    punch = PunchMessage(kind=PunchKind.CONNECT, addresses=several)
    assert decode_punch(encode_punch(punch)) == punch


@given(st.binary(max_size=300), st.sampled_from(DECODERS))
def test_rubbish_is_a_decode_error_and_nothing_else(data: bytes, decode: Callable[[bytes], Any]) -> None:
    try:
        decode(data)
    except DecodeError:
        pass


@given(node_ids, some_addresses, st.data())
def test_a_message_with_a_byte_changed_is_read_or_refused(peer: NodeId, several: tuple[str, ...], data: Any) -> None:
    """What is nearly right gets further in than rubbish."""
    whole = bytearray(encode_dial_request(DialRequest(node_id=peer, addresses=several)))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_dial_request(bytes(whole))
    except DecodeError:
        pass


def test_too_many_fields_are_refused() -> None:
    with pytest.raises(DecodeError, match="more than"):
        decode_fields(encode_fields([(1, 0)] * 1000))


small = RelayLimits(
    reservation_count_max=4, reservations_per_group_max=2, reservation_ttl_s=50, circuit_count_max=4, circuits_per_peer_max=2,
    circuits_per_group_max=2, connects_per_minute_max=5, connects_per_minute_total_max=8,
)  # fmt: skip
steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), node_ids, st.sampled_from("abc"), st.booleans()),
        st.tuples(st.just("open"), node_ids, node_ids, st.sampled_from("abc")),
        st.tuples(st.just("close"), st.none(), st.none(), st.none()),
        st.tuples(st.just("release"), node_ids, st.none(), st.none()),
        st.tuples(st.just("wait"), st.floats(0, 40), st.none(), st.none()),
    ),
    max_size=60,
)


@given(steps)
def test_a_relay_never_goes_beyond_its_limits(several: list[tuple[Any, ...]]) -> None:
    """Whoever asks for what in whatever order; and what is given back is there again."""
    book, now_s = RelayBook(small), 0.0
    open_circuits: list[Ends] = []
    strangers: dict[NodeId, tuple[str, float]] = {}
    for what, one, other, flag in several:
        if what == "wait":
            now_s += one
        elif what == "reserve":
            if book.reserve(one, other, is_favoured=flag, now_s=now_s) is Status.OK:
                strangers.pop(one, None)
                if not flag:
                    strangers[one] = (other, now_s + small.reservation_ttl_s)
        elif what == "release":
            book.release(one)
            strangers.pop(one, None)
        elif what == "open":
            ends = Ends(source=one, source_group=flag, target=other, is_favoured=one in IDS[:4] and other in IDS[:4])
            if book.open(ends, now_s=now_s) is Status.OK:
                assert one != other
                assert book.has_place(other, now_s=now_s)
                open_circuits.append(ends)
        elif open_circuits:
            book.close(open_circuits.pop())
        living = [group for group, until_s in strangers.values() if until_s > now_s]
        assert len(living) <= small.reservation_count_max
        assert all(living.count(group) <= small.reservations_per_group_max for group in living)
        assert book.circuit_count == len(open_circuits)
        for favoured in (True, False):
            counted = [ends for ends in open_circuits if ends.is_favoured is favoured]
            assert len(counted) <= small.circuit_count_max
            for node_id in IDS:
                assert sum(node_id in (ends.source, ends.target) for ends in counted) <= small.circuits_per_peer_max
        for group in "abc":
            from_group = [ends for ends in open_circuits if ends.source_group == group and not ends.is_favoured]
            assert len(from_group) <= small.circuits_per_group_max
    for ends in open_circuits:
        book.close(ends)
    assert book.circuit_count == 0


def test_a_sybil_gets_what_one_gets() -> None:
    """A hundred keys at one address have as many places as one address has, and those of our network find room."""
    book = RelayBook(RelayLimits())
    keys = [NodeId(f"sybil{n}") for n in range(100)]
    given_ = [book.reserve(key, "198.51.100.1", is_favoured=False, now_s=0) for key in keys]
    assert given_.count(Status.OK) == RelayLimits().reservations_per_group_max
    assert book.reserve(IDS[0], "198.51.100.1", is_favoured=True, now_s=0) is Status.OK
    assert book.reserve(IDS[1], "198.51.100.2", is_favoured=False, now_s=0) is Status.OK


def test_idle_circuits_of_one_machine_keep_nobody_out() -> None:
    """A machine with a key for each circuit has its share; a stranger from elsewhere and two of our network have theirs."""
    limits = RelayLimits(connects_per_minute_max=1000)
    book = RelayBook(limits)
    target, voter = IDS[0], IDS[1]
    for number in range(20):
        assert book.reserve(NodeId(f"t{number}"), f"198.51.100.{number}", is_favoured=False, now_s=0) is Status.OK
    for node_id in (target, voter):
        assert book.reserve(node_id, "198.51.100.99", is_favoured=True, now_s=0) is Status.OK

    def ask(source: str, target: NodeId, group: str, *, is_favoured: bool = False) -> Status:
        ends = Ends(source=NodeId(source), source_group=group, target=target, is_favoured=is_favoured)
        return book.open(ends, now_s=0)

    answers = [ask(f"sybil{n}", NodeId(f"t{n % 20}"), "203.0.113.1") for n in range(200)]
    assert answers.count(Status.OK) == limits.circuits_per_group_max
    assert ask("elsewhere", NodeId("t0"), "203.0.113.2") is Status.OK
    # And a target that strangers have filled is still there for its own.
    assert [ask(f"s{n}", target, f"192.0.2.{n}") for n in range(17)].count(Status.OK) == limits.circuits_per_peer_max
    assert ask(voter, target, "198.51.100.99", is_favoured=True) is Status.OK


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 30)), max_size=80))
def test_a_rate_holds_in_every_window(several: list[tuple[str, float]]) -> None:
    """Of one asker and of all; and who waits for a window's end is served."""
    rate, now_s, served = Rate(count_max=5, per_key_max=3), 0.0, list[tuple[float, str]]()
    for key, wait_s in several:
        now_s += wait_s
        if rate.take(key, now_s=now_s):
            served.append((now_s, key))
    for begun_s, _ in served:
        # Two windows may touch.
        within = [key for at_s, key in served if begun_s <= at_s < begun_s + WINDOW_S]
        assert len(within) <= 10
        assert all(within.count(key) <= 6 for key in "abc")
    assert rate.take("d", now_s=now_s + WINDOW_S)


def sighting(number: int, seen: str, local: str = "192.168.1.2") -> Sighting:
    return Sighting(observer=IDS[number], host=f"198.51.100.{number}", local_host=local, seen=seen, is_from_listener=True)


def dial_back(number: int, address: str, fault: str = "") -> DialBack:
    return DialBack(by=IDS[number], host=f"198.51.100.{number}", address=address, fault=fault)


votes = st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=12)


@given(votes, st.randoms(use_true_random=False))
def test_the_majority_of_networks_decides_in_whatever_order(several: list[tuple[int, bool]], rng: Any) -> None:
    seen, at = [sighting(n, "/ip4/203.0.113.9/tcp/1") for n, _ in several], "/ip4/203.0.113.9/tcp/1"
    backs = [dial_back(n, at, "" if ok else "refused") for n, ok in several]
    networks_ok = {n for n, ok in several if ok}
    networks_failed = {n for n, _ in several} - networks_ok
    judged = Reach.PUBLIC if len(networks_ok) > len(networks_failed) else Reach.PRIVATE
    wanted = judged if several else Reach.UNKNOWN
    assert overall(judge(seen, backs)) is wanted
    rng.shuffle(seen)
    rng.shuffle(backs)
    assert overall(judge(seen, backs)) is wanted


def test_a_neighbour_on_the_lan_does_not_make_a_node_public() -> None:
    """Where anybody sees it from the world."""
    lan, world = "/ip4/192.168.1.2/tcp/1", "/ip4/203.0.113.9/tcp/1"
    families = judge([sighting(1, lan), sighting(2, world)], [dial_back(1, lan), dial_back(2, world, "refused")])
    assert overall(families) is Reach.PRIVATE
    assert overall(judge([sighting(1, lan)], [dial_back(1, lan)])) is Reach.PUBLIC


def test_a_liar_does_not_have_us_announce_a_victim() -> None:
    """It says that it sees us there, and that it reached us there; two others see us elsewhere, and do not reach us."""
    ours, victim = "/ip4/203.0.113.9/tcp/1", "/ip4/192.0.2.66/tcp/80"
    seen = [sighting(1, victim), sighting(2, ours), sighting(3, ours)]
    backs = [dial_back(1, victim), dial_back(2, ours, "refused"), dial_back(3, ours, "refused")]
    (family,) = judge(seen, backs)
    assert family.reach is Reach.PRIVATE
    assert not any(address.is_reachable for address in family.addresses)
    # A node with two lines is seen at either, and both are its own.
    two = [sighting(1, "/ip4/192.0.2.1/tcp/1", local="192.0.2.1"), sighting(2, ours, local="203.0.113.9")]
    (family,) = judge(two, [dial_back(1, "/ip4/192.0.2.1/tcp/1"), dial_back(2, ours)])
    assert all(address.is_reachable for address in family.addresses)


def test_a_neighbour_cannot_tell_what_the_world_sees() -> None:
    """On a LAN one of three says that it sees us in the world, and cannot reach us there: that is not looked at."""
    lan, world = "/ip4/192.168.1.2/tcp/1", "/ip4/203.0.113.9/tcp/1"
    seen = [dataclasses.replace(sighting(n, lan), host=f"192.168.1.{n + 10}") for n in range(3)]
    backs = [dataclasses.replace(dial_back(n, lan), host=f"192.168.1.{n + 10}") for n in range(3)]
    seen[0] = dataclasses.replace(seen[0], seen=world)
    backs[0] = dataclasses.replace(backs[0], address=world, fault="no answer in time")
    (family,) = judge(seen, backs)
    assert (family.reach, family.seen_as) == (Reach.PUBLIC, (lan,))


def test_ports_tell_the_kind_of_nat() -> None:
    same, other = "/ip4/203.0.113.9/tcp/1", "/ip4/203.0.113.9/tcp/2"
    assert judge([sighting(1, same), sighting(2, same)], [])[0].is_punchable
    assert judge([sighting(1, same), sighting(2, other)], [])[0].nat.value == "address-dependent"
    assert judge([sighting(1, same)], [])[0].nat.value == "unknown"
    assert judge([sighting(1, same, local="203.0.113.9")], [])[0].nat.value == "none"


def test_families_are_judged_apart() -> None:
    four, six = "/ip4/203.0.113.9/tcp/1", "/ip6/2001:db8::9/tcp/1"
    families = judge([sighting(1, four), sighting(1, six)], [dial_back(1, four, "refused"), dial_back(1, six)])
    assert [(f.family, f.reach) for f in families] == [(4, Reach.PRIVATE), (6, Reach.PUBLIC)]
    assert overall(families) is Reach.PUBLIC
