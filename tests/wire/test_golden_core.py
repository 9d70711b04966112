"""The wire form of formation/core, byte by byte: who changes one of these makes another network.

Keys are RFC 8032's TEST 1; signatures of Ed25519 are deterministic, so they are golden too.
"""

from __future__ import annotations

import pytest

from formation.core.codec import (
    Context,
    decode,
    encode,
    parse_signed,
    sha256,
    sign_value,
    signature_holds,
    signed_bytes,
    verify_ed25519,
)
from formation.core.event import VmRequested, event_body, parse_event
from formation.core.ids import NetworkId, trace_id_of, vm_id_of
from formation.core.intent import Intent, intent_signature_holds, parse_intent, sign_intent
from formation.core.keys import KeyPair
from formation.core.manifest import Genesis, Voter, found_network
from formation.core.spec import Desired, PortMap

KEY = KeyPair(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
NETWORK = NetworkId(b"\x11" * 32)

REQUEST = VmRequested(
    name="web",
    image="sha256:" + "ab" * 32,
    image_name="hello",
    vcpus=2,
    memory_mib=512,
    disk_gib=3,
    publish=(PortMap(80, "tcp", 8080),),
    env={"B": "2", "AA": "1"},
    desired=Desired.RUNNING,
    generation=7,
)
# A map of fifteen, keys by length first: env, name, image, vcpus, desired, publish, disk_gib, …
REQUEST_HEX = (
    "af63656e76a2614261326241416131646e616d65637765626561706172746065696d61676578477368613235363a61626162"
    "6162616261626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162"
    "6162616261626162616265766370757302667370726561646067646573697265646772756e6e696e67677075626c69736881"
    "83185063746370191f906772657175697265a067726573746172746a6f6e2d6661696c757265686469736b5f676962036a66"
    "61696c6f7665725f7319012c6a67656e65726174696f6e076a696d6167655f6e616d656568656c6c6f6a6d656d6f72795f6d"
    "6962190200"
)

INTENT = Intent(
    account=KEY.public_key,
    verb="vm.requested",
    object_id="",
    body=event_body(REQUEST),
    nonce=bytes(range(16)),
    created_ms=1_780_000_000_000,
    expires_ms=1_780_000_600_000,
    key=KEY.public_key,
)
# An array of eight: account, verb, object, body, nonce, created, expires, key.
INTENT_HEX = (
    "885820d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a6c766d2e7265717565737465646058"
    "ffaf63656e76a2614261326241416131646e616d65637765626561706172746065696d61676578477368613235363a616261"
    "6261626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162616261"
    "626162616261626162616265766370757302667370726561646067646573697265646772756e6e696e67677075626c697368"
    "8183185063746370191f906772657175697265a067726573746172746a6f6e2d6661696c757265686469736b5f676962036a"
    "6661696c6f7665725f7319012c6a67656e65726174696f6e076a696d6167655f6e616d656568656c6c6f6a6d656d6f72795f"
    "6d696219020050000102030405060708090a0b0c0d0e0f1b0000019e704488001b0000019e704dafc05820d75a980182b10a"
    "b7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
)
INTENT_DIGEST_HEX = "e1a6e0d2688a35d30802e904c8d2a7320da1e81cbc7d57aad50e2d68307557b0"
# What the account's signature covers is INTENT_HEX in the context of NETWORK.
SIGNED_INTENT_HEX = (
    "d28443a10127a0590177885820d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a6c766d2e72"
    "65717565737465646058ffaf63656e76a2614261326241416131646e616d65637765626561706172746065696d6167657847"
    "7368613235363a61626162616261626162616261626162616261626162616261626162616261626162616261626162616261"
    "62616261626162616261626162616261626162616265766370757302667370726561646067646573697265646772756e6e69"
    "6e67677075626c6973688183185063746370191f906772657175697265a067726573746172746a6f6e2d6661696c75726568"
    "6469736b5f676962036a6661696c6f7665725f7319012c6a67656e65726174696f6e076a696d6167655f6e616d656568656c"
    "6c6f6a6d656d6f72795f6d696219020050000102030405060708090a0b0c0d0e0f1b0000019e704488001b0000019e704daf"
    "c05820d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a58400a88403f292bbc41fc96f51297"
    "5c5c47b293ccbbe630865b7627ffc4e7eaedf79b772d21a266d18f396a3162f19631d83ea421bf076b84054bd948b3aba51b"
    "01"
)

GENESIS = Genesis(
    1, "home", 1_780_000_000_000, (Voter("ada", KEY.public_key, ("/ip4/192.0.2.1/tcp/4700", "/ip6/::1/tcp/4700")),)
)
# An array of four: format, name, founded_ms, voters; each voter an array of three.
GENESIS_HEX = (
    "840164686f6d651b0000019e704488008183636164615820d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af02"
    "1a68f707511a82772f6970342f3139322e302e322e312f7463702f34373030712f6970362f3a3a312f7463702f34373030"
)
NETWORK_ID_HEX = "21df60c62d1693e072ed1d092de6e76eb55e9261dfbc441c5580e0b9df596506"
FOUNDER_SIGNATURE_HEX = (
    "dac6aa56d9bebdd32916f0046db77ef2e48fea8633ea26f40c0f83053dbe070194452998bf0147ad8a673e9d6a7db8b263c2"
    "2db5f91051818ca996c4ad96ff01"
)

# Tag 18, [protected {1: -8}, {}, payload, signature]; without and with an epoch.
COSE_HEX = (
    "d28443a10127a041a05840755e3e74adf63329e6bf30efb4c91f0b9c6622fff1b39c517ece39b489b6b7099d274785d5010a"
    "0cb76c6aa119eacf16277bc0bee93e37498b9453eac0ea5d0a"
)
COSE_EPOCH_HEX = (
    "d28443a10127a041a058402eaec4b04069500aa84e2ffcc5d7abac30ba5d475aa42e3a35d885fa92d5cababf4298691ea636"
    "da77bb6473623651e3dd0b445b8365294927e571add0812b0a"
)
# ["Signature1", protected, ["ack", network id, 5] as bytes, payload]
SIG_STRUCTURE_HEX = (
    "846a5369676e61747572653143a101275828836361636b582011111111111111111111111111111111111111111111111111111111111111110541a0"
)


def test_vm_requested() -> None:
    """The body of vm.requested, to and fro."""
    assert event_body(REQUEST).hex() == REQUEST_HEX
    assert parse_event("vm.requested", bytes.fromhex(REQUEST_HEX)) == REQUEST


def test_intent() -> None:
    """An intent, to and fro, and its identity."""
    assert encode(INTENT).hex() == INTENT_HEX
    assert decode(bytes.fromhex(INTENT_HEX), Intent) == INTENT
    assert sha256(bytes.fromhex(INTENT_HEX)).hex() == INTENT_DIGEST_HEX


def test_signed_intent() -> None:
    """A signed intent, to and fro; it holds in its network, and names its VM and its trace."""
    assert sign_intent(KEY.sign, INTENT, network_id=NETWORK).signed.raw.hex() == SIGNED_INTENT_HEX
    wish = parse_intent(bytes.fromhex(SIGNED_INTENT_HEX))
    assert wish.intent == INTENT
    assert intent_signature_holds(verify_ed25519, wish, network_id=NETWORK)
    assert vm_id_of(wish.digest) == "vm-4gtobutiri25gcac"
    assert trace_id_of(wish.digest) == "e1a6e0d2688a35d3"
    assert wish.account_id == "did:key:z6MktwupdmLXVVqTzCw4i46r4uGyosGXRnR3XjN4Zq7oMMsw"


def test_genesis() -> None:
    """A genesis, to and fro; its hash is the network id, and its founder's signature is this one."""
    assert encode(GENESIS).hex() == GENESIS_HEX
    assert decode(bytes.fromhex(GENESIS_HEX), Genesis) == GENESIS
    manifest = found_network("home", voters=[("ada", KEY, GENESIS.voters[0].addresses)], founded_ms=GENESIS.founded_ms)
    assert manifest.network_id.hex() == NETWORK_ID_HEX
    assert manifest.signatures[0].signature.hex() == FOUNDER_SIGNATURE_HEX
    assert manifest.voters[0].node_id == "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV"


@pytest.mark.parametrize(("context", "epoch", "golden"), [(Context.INTENT, None, COSE_HEX), (Context.ACK, 5, COSE_EPOCH_HEX)])
def test_cose_sign1(context: Context, epoch: int | None, golden: str) -> None:
    """A signed empty map, to and fro."""
    assert sign_value(KEY.sign, context, network_id=NETWORK, payload=b"\xa0", epoch=epoch).raw.hex() == golden
    signed = parse_signed(bytes.fromhex(golden))
    assert signed.payload == b"\xa0"
    assert signature_holds(verify_ed25519, KEY.public_key, signed, context, network_id=NETWORK, epoch=epoch)


def test_sig_structure() -> None:
    """What a signature covers."""
    assert signed_bytes(Context.ACK, network_id=NETWORK, payload=b"\xa0", epoch=5).hex() == SIG_STRUCTURE_HEX


def test_context_names() -> None:
    """The names that signatures cover never change."""
    assert [context.value for context in Context] == [
        "block",
        "ack",
        "proposal",
        "notarize",
        "nullify",
        "finalize",
        "freeze",
        "intent",
        "manifest",
    ]
