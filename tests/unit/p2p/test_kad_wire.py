from __future__ import annotations

import pytest

from formation.core.errors import DecodeError
from formation.core.ids import Digest
from formation.core.keys import KeyPair
from formation.p2p.kad_wire import (
    MESSAGE_SIZE_MAX_BYTES,
    K,
    Kind,
    Message,
    MessageDecoder,
    Told,
    decode_address,
    decode_message,
    encode_message,
    image_key,
    peer_id_bytes,
    place_of_node,
    role_key,
    told_of,
)

IDS = [KeyPair(index.to_bytes(32, "big")).node_id for index in range(1, 60)]
ADDRESSES = ["/ip4/192.0.2.1/tcp/4700", "/ip6/2001:db8::1/tcp/1", "/dns4/node.example/tcp/65535", "/memory/abc"]
ADDRESSES.append(f"{ADDRESSES[0]}/p2p/{IDS[0]}/p2p-circuit")


def test_the_bytes_are_those_of_the_specification() -> None:
    """A FIND_NODE and an answer as protoc writes them."""
    assert encode_message(Message(kind=Kind.FIND_NODE, key=b"abc")) == bytes.fromhex("07 08 04 12 03") + b"abc"
    one = peer_id_bytes(IDS[0])
    address = bytes.fromhex("04 c0000201 06 125c")
    peer = b"\x0a\x26" + one + b"\x12" + bytes((len(address),)) + address
    body = b"\x08\x04\x42" + bytes((len(peer),)) + peer
    answer = Message(kind=Kind.FIND_NODE, closer=(Told(node_id=IDS[0], addresses=(ADDRESSES[0],)),))
    assert encode_message(answer) == bytes((len(body),)) + body


@pytest.mark.parametrize(
    "body",
    [
        "0807",  # a kind that is none
        "08",  # cut off
        "12ff",
        "0a0161",  # a kind that is bytes
        "4001",  # a peer that is a number
        "0b",  # a group
        "0001",  # field 0
        "ffffffffffffffffffff01",
        "42020801",  # a peer whose id is a number
    ],
)
def test_what_is_malformed(body: str) -> None:
    """Each way on its own."""
    with pytest.raises(DecodeError):
        decode_message(bytes.fromhex(body))


def test_sizes_are_limited() -> None:
    """A message by its length, before it has arrived; its key; a length without an end."""
    with pytest.raises(DecodeError, match="limit"):
        MessageDecoder().feed(encode_message(Message(kind=Kind.PING, key=bytes(MESSAGE_SIZE_MAX_BYTES)))[:4])
    with pytest.raises(DecodeError, match="key"):
        MessageDecoder().feed(encode_message(Message(kind=Kind.PING, key=bytes(129))))
    decoder = MessageDecoder()
    assert decoder.feed(b"\xff" * 9) == []
    with pytest.raises(DecodeError):
        decoder.feed(b"\xff" * 2)


def test_no_more_is_taken_than_a_correct_peer_sends() -> None:
    """Peers above K, addresses above 8."""
    many = told_of((node_id, [f"/ip4/192.0.2.{n}/tcp/1" for n in range(1, 30)]) for node_id in IDS)
    (read,) = MessageDecoder().feed(encode_message(Message(kind=Kind.FIND_NODE, closer=many)))
    assert len(read.closer) == K
    assert {len(each.addresses) for each in read.closer} == {8}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("047f000001060fa1", "/ip4/127.0.0.1/tcp/4001"),
        ("047f000001060fa1a50326" + peer_id_bytes(IDS[0]).hex(), "/ip4/127.0.0.1/tcp/4001"),  # /p2p/…
        ("047f000001060fa1a5030131", None),  # /p2p/ of another kind of key: not one of ours
        ("047f000001060fa1a203", None),  # /p2p-circuit of no relay
        ("047f000001060fa1dd03", None),  # /ws
        ("047f000001910200", None),  # /udp
        ("0400000000060fa1", None),  # dials nothing
        ("047f0000", None),
        ("047f000001", None),
        ("047f00000106", None),
        ("047f0000010600", None),
        ("36026578", None),
        ("360261c3060001", None),
        ("", None),
    ],
)
def test_addresses_that_we_dial_and_others(data: str, text: str | None) -> None:
    """What we cannot dial is left out; it is nobody's fault."""
    assert decode_address(bytes.fromhex(data)) == text


def test_peers_with_keys_of_other_kinds_are_left_out() -> None:
    """An RSA key's id is a SHA-256 multihash; what is no id at all has no place."""
    rsa = bytes.fromhex("1220") + bytes(32)
    body = b"\x08\x04\x42" + bytes((len(rsa) + 2,)) + b"\x0a" + bytes((len(rsa),)) + rsa
    assert decode_message(body).closer == ()
    assert place_of_node(type(IDS[0])("a")) is None
    assert told_of([(type(IDS[0])("a"), ())]) == ()


def test_who_is_named_twice_is_told_of_once() -> None:
    """A peer has one voice for each that it names; what it said first counts."""
    one, two = (Told(node_id=IDS[0], addresses=(address,)) for address in ADDRESSES[:2])
    twice = Message(kind=Kind.GET_PROVIDERS, key=b"k", closer=(one, two, one), providers=(two, one))
    (read,) = MessageDecoder().feed(encode_message(twice))
    assert (read.closer, read.providers) == ((one,), (two,))


def test_a_heap_of_questions_is_read_one_by_one() -> None:
    """What stands behind a question costs nothing until that is answered, were it rubbish."""
    decoder = MessageDecoder()
    decoder.push(encode_message(Message(kind=Kind.PING)) + b"\x02\x08\x63")
    assert decoder.next_message() == Message(kind=Kind.PING)
    with pytest.raises(DecodeError):
        decoder.next_message()


def test_keys_are_multihashes() -> None:
    """As other implementations check; an image's is its digest."""
    assert image_key(Digest("sha256:" + "ab" * 32)) == bytes.fromhex("1220" + "ab" * 32)
    assert role_key("gpu")[:2] == b"\x12\x20"
    assert len({role_key("gpu"), role_key("ingress")}) == 2
