from __future__ import annotations

import pytest

from formation.core.errors import DecodeError
from formation.core.keys import KeyPair
from formation.p2p.mdns_wire import RECORD_COUNT_MAX, decode_packet, encode_answer, encode_query, peers_in, service_name

ONE = KeyPair(b"1" * 32).node_id
SERVICE = service_name(b"\xab\xcd\xef\x01" + bytes(28))
ADDRESSES = ("/ip4/192.168.1.5/tcp/4700", "/ip4/10.0.0.5/tcp/4700")


def test_what_is_sent_is_read() -> None:
    """A question, and an answer, of which the sender's own address counts only."""
    assert SERVICE == "_p2p-abcdef01._udp.local"
    assert decode_packet(encode_query(SERVICE)).asked == (SERVICE,)
    packet = decode_packet(encode_answer(SERVICE, "random", ONE, ADDRESSES))
    assert packet.is_answer
    assert peers_in(packet, SERVICE, source="192.168.1.5") == {ONE: ADDRESSES[:1]}
    assert peers_in(packet, SERVICE, source="192.168.1.6") == {}
    assert peers_in(packet, service_name(bytes(32)), source="192.168.1.5") == {}
    assert peers_in(decode_packet(encode_query(SERVICE)), SERVICE, source="192.168.1.5") == {}


def test_the_form_that_others_send() -> None:
    """PTR and TXT among the answers, the pointer named as the service, `dnsaddr=` with the peer's id."""
    data = encode_answer(SERVICE, "random", ONE, ADDRESSES[:1])
    assert data[:12].hex() == "000084000000000200000000"
    text = f"dnsaddr=/ip4/192.168.1.5/tcp/4700/p2p/{ONE}".encode()
    assert bytes((len(text),)) + text in data
    assert decode_packet(data).texts == ((f"random.{SERVICE}", (text,)),)


def test_an_answer_as_multicast_dns_compresses_it() -> None:
    """Names that point back; and what does not concern us beside it."""
    name = b"\x0d_p2p-abcdef01\x04_udp\x05local\x00"
    text = f"dnsaddr=/ip4/192.168.1.5/tcp/1/p2p/{ONE}".encode()
    txt = b"\x04peer\xc0\x0c" + bytes.fromhex("00108001 00000078") + (len(text) + 1).to_bytes(2, "big")
    other = b"\xc0\x0c" + bytes.fromhex("0001 0001 00000078 0004 c0a80105")
    pointer = name + bytes.fromhex("000c0001 00000078 0007") + b"\x04peer\xc0\x0c"
    data = bytes.fromhex("0000840000000003") + bytes(4) + pointer + other + txt + bytes((len(text),)) + text
    found = peers_in(decode_packet(data), SERVICE, source="192.168.1.5")
    assert found == {ONE: ("/ip4/192.168.1.5/tcp/1",)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(11),
        bytes(9001),
        bytes.fromhex("0000 7800 0000 0000 0000 0000"),
        bytes(4) + (RECORD_COUNT_MAX + 1).to_bytes(2, "big") + bytes(6),
        bytes(4) + b"\0\1" + bytes(6),
        bytes(4) + b"\0\1" + bytes(6) + b"\xc0\x0c\0\x0c\0\1",  # points at itself
        bytes(4) + b"\0\1" + bytes(6) + b"\x41" + bytes(70),
        bytes(4) + b"\0\1" + bytes(6) + b"\x3fabc",
        bytes(4) + b"\0\1" + bytes(6) + b"\0\0",
        bytes(6) + b"\0\1" + bytes(4) + b"\0\0\x10\0\1\0\0\0\0\xff\xff",
        bytes(6) + b"\0\1" + bytes(4) + b"\0\0\x10\0\1\0\0\0\0\0\2\x09a",
    ],
)
def test_what_is_malformed(data: bytes) -> None:
    """Refused in one way."""
    with pytest.raises(DecodeError):
        decode_packet(data)


def test_a_chain_of_pointers_is_short() -> None:
    """Each goes back, as it must, and all together through the whole packet, for each name of many."""
    record = bytes.fromhex("0001 0001 00000078")
    at = 12 + 1 + len(record) + 2
    chain = b"\0" + b"".join((0xC000 | (at + max(0, 2 * n - 1))).to_bytes(2, "big") for n in range(40))
    first = bytes.fromhex("0000 8400 0000 0002 0000 0000") + b"\0" + record + len(chain).to_bytes(2, "big") + chain
    near, far = ((0xC000 | place).to_bytes(2, "big") for place in (at + 3, at + len(chain) - 2))
    assert decode_packet(first + near + record + b"\0\0").is_answer
    with pytest.raises(DecodeError, match="pointers"):
        decode_packet(first + far + record + b"\0\0")


@pytest.mark.parametrize("text", ["/ip4/192.168.1.5/udp/1", "/dns4/192.168.1.5/tcp/1x", "/ip4/192.168.1.5/tcp/1"])
def test_what_is_no_peer(text: str) -> None:
    """Another transport, another kind of id."""
    for node_id in (ONE, ONE[:-1], ""):
        packet = decode_packet(encode_answer(SERVICE, "random", type(ONE)(node_id), (text,)))
        assert bool(peers_in(packet, SERVICE, source="192.168.1.5")) == (text.endswith("tcp/1") and node_id == ONE)
