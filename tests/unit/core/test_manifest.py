from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from formation.core.codec import Context, encode, sha256, sign_value
from formation.core.errors import NotFoundError, UsageError
from formation.core.ids import NetworkId
from formation.core.keys import KeyPair
from formation.core.manifest import (
    FORMAT,
    VOTER_COUNT_MAX,
    Genesis,
    Manifest,
    Signature,
    Voter,
    found_network,
    read_draft,
    read_manifest,
)

KEYS = [KeyPair(bytes([n]) * 32) for n in range(1, VOTER_COUNT_MAX + 4)]
NAMES = ("ada", "bob", "cyd", "dan")
FORM_HINT = "see peers/README.md for the form"
COPY_HINT = "copy the file again from whoever gave it to you"


def found(count: int = 4, name: str = "home") -> Manifest:
    voters = [(NAMES[n] if n < 4 else f"v{n}", KEYS[n], [f"/ip4/192.0.2.{n + 1}/tcp/4700"]) for n in range(count)]
    return found_network(name, voters=voters, founded_ms=1_780_000_000_000)


TEXT = found().to_toml()


def refusal(path: Path, text: str | bytes, read: Callable[[Path], object] = read_manifest) -> UsageError:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert caught.value.message.startswith(str(path)), caught.value.message
    return caught.value


def test_a_manifest_comes_back_from_its_file(tmp_path: Path) -> None:
    """read_manifest undoes to_toml: genesis, signatures and network id."""
    path = tmp_path / "network.toml"
    path.write_text(TEXT)
    again = read_manifest(path)
    assert again.genesis == found().genesis
    assert again.signatures == found().signatures
    assert again.network_id == found().network_id
    assert again.network_id.hex() in TEXT


def test_the_network_id_is_the_hash_of_the_genesis() -> None:
    """SHA-256 of the deterministic CBOR; another name is another network."""
    assert found().network_id == NetworkId(sha256(encode(found().genesis)))
    assert found(name="work").network_id != found().network_id


@pytest.mark.parametrize(("count", "fault_count_max", "quorum_size"), [(1, 0, 1), (4, 1, 3), (7, 2, 5), (31, 10, 21)])
def test_a_committee_of_3f_plus_1_needs_2f_plus_1(count: int, fault_count_max: int, quorum_size: int) -> None:
    """f and the quorum follow from the number of voters."""
    manifest = found(count)
    assert (manifest.fault_count_max, manifest.quorum_size) == (fault_count_max, quorum_size)
    assert manifest.name == "home"
    assert [voter.node_id for voter in manifest.voters] == [key.node_id for key in KEYS[:count]]


@pytest.mark.parametrize("count", [0, 2, 3, 5, 34])
def test_other_numbers_of_voters_are_refused(count: int) -> None:
    """A third voter adds a failure and tolerates none: the error says the number, the hint which ones are good."""
    with pytest.raises(UsageError, match=f"manifest 'home': {count} voters") as caught:
        found(count)
    assert "3f+1" in caught.value.hint


def test_all_founders_must_sign() -> None:
    """Who has not signed is named; a stranger's signature does not count."""
    manifest = found()
    others = [s for s in manifest.signatures if s.public_key != KEYS[1].public_key]
    stranger = Signature(KEYS[9].public_key, manifest.signatures[1].signature)
    with pytest.raises(UsageError, match=r"no valid signature of bob$"):
        Manifest(manifest.genesis, [*others, stranger])


def test_a_signature_over_another_genesis_does_not_count() -> None:
    """Founding twice under one name does not let signatures move."""
    manifest, other = found(), found(name="work")
    with pytest.raises(UsageError, match=r"no valid signature of ada, bob, cyd, dan$"):
        Manifest(manifest.genesis, other.signatures)


def test_a_founders_signature_in_another_context_does_not_count() -> None:
    """A block that a voter signed is no manifest."""
    genesis = found(1).genesis
    network_id = NetworkId(sha256(encode(genesis)))
    signed = sign_value(KEYS[0].sign, Context.BLOCK, network_id=network_id, payload=encode(genesis))
    with pytest.raises(UsageError, match=r"no valid signature of ada$"):
        Manifest(genesis, [Signature(KEYS[0].public_key, signed.signature)])


GOOD = Voter("ada", KEYS[0].public_key, ("/ip4/192.0.2.1/tcp/4700",))


@pytest.mark.parametrize(
    ("genesis", "message"),
    [
        (Genesis(2, "home", 1, (GOOD,)), "format 2, this version knows 1"),
        (Genesis(FORMAT, "Home", 1, (GOOD,)), "manifest name: 'Home' is not a valid name"),
        (Genesis(FORMAT, "home\n", 1, (GOOD,)), "is not a valid name"),
        (Genesis(FORMAT, "home", -1, (GOOD,)), "founded_ms is out of range"),
        (Genesis(FORMAT, "home", 1 << 48, (GOOD,)), "founded_ms is out of range"),
        (Genesis(FORMAT, "home", 1, (Voter("a b", KEYS[0].public_key, GOOD.addresses),)), "voter name: 'a b'"),
        (Genesis(FORMAT, "home", 1, (Voter("ada", b"short", GOOD.addresses),)), "voter ada: the key is not 32 bytes"),
        (Genesis(FORMAT, "home", 1, (Voter("ada", KEYS[0].public_key, ()),)), "voter ada: addresses must be multiaddrs"),
        (Genesis(FORMAT, "home", 1, (Voter("ada", KEYS[0].public_key, ('/a"',)),)), "voter ada: addresses must be"),
        (Genesis(FORMAT, "home", 1, (Voter("ada", KEYS[0].public_key, ("/a\n",)),)), "voter ada: addresses must be"),
        (Genesis(FORMAT, "home", 1, (Voter("ada", KEYS[0].public_key, ("/a\\",)),)), "voter ada: addresses must be"),
    ],
)
def test_a_genesis_that_cannot_be_is_refused(genesis: Genesis, message: str) -> None:
    """Whatever made it, a genesis is checked before its signatures are."""
    with pytest.raises(UsageError) as caught:
        Manifest(genesis, [])
    assert message in caught.value.message
    assert caught.value.hint


def test_a_missing_manifest_is_not_found(tmp_path: Path) -> None:
    """The hint says where manifests come from."""
    with pytest.raises(NotFoundError, match=r"no manifest at .*network\.toml") as caught:
        read_manifest(tmp_path / "network.toml")
    assert "formation init" in caught.value.hint


def test_a_directory_is_not_a_manifest(tmp_path: Path) -> None:
    """What cannot be read says why."""
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        read_manifest(tmp_path)


def test_an_edited_address_breaks_the_signatures(tmp_path: Path) -> None:
    """One changed digit, and the voters whose signatures no longer hold are named."""
    error = refusal(tmp_path / "n.toml", TEXT.replace("192.0.2.2", "192.0.2.99"))
    assert "no valid signature of ada, bob, cyd, dan" in error.message
    assert "edited by hand" in error.hint


def test_one_bad_signature_names_its_voter(tmp_path: Path) -> None:
    """Who did not sign is named, alone."""
    signature = found().signatures[2].signature.hex()
    error = refusal(tmp_path / "n.toml", TEXT.replace(signature, signature[:-2] + "00"))
    assert error.message.endswith("no valid signature of cyd")


def test_a_voter_with_the_key_of_another_is_named(tmp_path: Path) -> None:
    """One key, one vote."""
    text = TEXT.replace(KEYS[1].node_id, KEYS[0].node_id)
    error = refusal(tmp_path / "n.toml", text)
    assert f"voter key {KEYS[0].node_id} occurs twice" in error.message
    assert error.hint == "each voter stands once"


def without(line_start: str, nth: int = 0) -> str:
    """The good file without the nth line that starts so."""
    lines = TEXT.splitlines()
    del lines[[i for i, line in enumerate(lines) if line.startswith(line_start)][nth]]
    return "\n".join(lines)


BROKEN: dict[str, tuple[str | bytes, str, str]] = {
    "three voters": (TEXT.rpartition("[[voter]]")[0], "manifest 'home': 3 voters", "n = 3f+1"),
    "name twice": (TEXT.replace('name = "bob"', 'name = "ada"'), "voter name ada occurs twice", "each voter stands once"),
    "key in TOML twice": ("format = 1\n" + TEXT, "not TOML: Cannot overwrite a value", FORM_HINT),
    "unknown key": ("color = 1\n" + TEXT, "unknown key 'color'", FORM_HINT),
    "unknown key of a voter": (TEXT.replace("node_id =", "color = 1\nnode_id =", 1), "voter 1: unknown key 'color'", FORM_HINT),
    "empty": ("", "format is None, this version knows 1", "is this a manifest?"),
    "no format": (without("format"), "format is None", "is this a manifest?"),
    "format of the future": (TEXT.replace("format = 1", "format = 2"), "format is 2, this version knows 1", "upgrade"),
    "format true": (TEXT.replace("format = 1", "format = true"), "format is True", "is this a manifest?"),
    "format 1.0": (TEXT.replace("format = 1", "format = 1.0"), "format is 1.0", "is this a manifest?"),
    "no name": (without("name"), "name is missing or not text", FORM_HINT),
    "name of the wrong type": (TEXT.replace('name = "home"', "name = 7"), "name is missing or not text", FORM_HINT),
    "bad name": (TEXT.replace('"home"', '"Home"'), "", "use 1 to 63"),
    "no date": (without("founded_ms"), "founded_ms is missing or not a whole number", COPY_HINT),
    "date of the wrong type": (TEXT.replace("= 1780000000000", "= true"), "founded_ms is missing", COPY_HINT),
    "date as text": (TEXT.replace("= 1780000000000", '= "today"'), "founded_ms is missing", COPY_HINT),
    "date out of range": (TEXT.replace("= 1780000000000", "= -1"), "founded_ms is out of range", "since 1970"),
    "no voters": (TEXT.partition("[[voter]]")[0], "no [[voter]]", FORM_HINT),
    "voters of the wrong type": (TEXT.partition("[[voter]]")[0] + "voter = [1]", "no [[voter]]", FORM_HINT),
    "one table instead of many": (TEXT.partition("[[voter]]")[0] + "[voter]\nname = 'a'", "no [[voter]]", FORM_HINT),
    "voter without a name": (without("name", 2), "voter 2: name is missing or not text", FORM_HINT),
    "voter without addresses": (without("addresses", 2), "voter 3: addresses must be a list of multiaddrs", "/ip4/"),
    "no address": (TEXT.replace('["/ip4/192.0.2.3/tcp/4700"]', "[]"), "voter 3: addresses must be", "/ip4/"),
    "address without a slash": (TEXT.replace("/ip4/192.0.2.3/", "192.0.2.3:"), "voter 3: addresses must be", "/ip4/"),
    "address with a line end": (TEXT.replace("192.0.2.3/tcp/4700", r"192.0.2.3/tcp/4700\n"), "voter 3: addresses", "/ip4/"),
    "address of the wrong type": (TEXT.replace('["/ip4/192.0.2.3/tcp/4700"]', "[4700]"), "voter 3: addresses", "/ip4/"),
    "voter without an id": (without("node_id", 3), "voter 4: node_id or signature is missing", "this is a draft"),
    "voter without a signature": (without("signature", 1), "signature of bob is missing", "its founders have not all signed"),
    "bad id": (TEXT.replace(KEYS[0].node_id, KEYS[0].node_id[:-1]), "voter 1: '12D3", COPY_HINT),
    "signature not hex": (TEXT.replace('signature = "', 'signature = "zz', 1), "voter 1: non-hexadecimal", COPY_HINT),
    "short signature": (TEXT.replace(found().signatures[0].signature.hex(), "00"), "no valid signature of ada", "edited"),
    "not TOML": ("{}", "not TOML", FORM_HINT),
    "not text": (b"\xff\xfe", "not TOML", FORM_HINT),
    "number of 5,000 digits": ("format = " + "1" * 5000, "not TOML", FORM_HINT),
    "ten thousand brackets": ("format = " + "[" * 10_000, "not TOML", FORM_HINT),
    "huge": (TEXT + "#" * 65_536, "larger than 65536 bytes", "is this a manifest?"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest_says_where_and_how_to_mend_it(tmp_path: Path, name: str) -> None:
    """Each error starts with the file, names the exact place, and has a hint."""
    text, message, hint = BROKEN[name]
    error = refusal(tmp_path / "network.toml", text)
    assert message in error.message
    assert hint in error.hint


DRAFT = """
format = 1
name = "demo"
[[voter]]
name = "n1"
addresses = ["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"]
"""


def test_a_draft_has_names_and_addresses(tmp_path: Path) -> None:
    """A draft is a manifest without keys."""
    path = tmp_path / "draft.toml"
    path.write_text(DRAFT)
    draft = read_draft(path)
    assert (draft.name, draft.voters) == ("demo", (("n1", ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0")),))


def test_the_draft_in_peers_can_be_read() -> None:
    """The demo's network has four voters."""
    draft = read_draft(Path(__file__).parents[3] / "peers" / "demo.toml")
    assert [name for name, _ in draft.voters] == ["n1", "n2", "n3", "n4"]


def test_a_signed_manifest_is_a_draft_too(tmp_path: Path) -> None:
    """Its keys and signatures are then not looked at."""
    path = tmp_path / "network.toml"
    path.write_text(TEXT)
    assert [name for name, _ in read_draft(path).voters] == list(NAMES)


def test_a_draft_where_a_manifest_is_wanted_is_refused(tmp_path: Path) -> None:
    """The error says that it is a draft and what completes it."""
    error = refusal(tmp_path / "draft.toml", DRAFT)
    assert error.message.endswith("voter 1: node_id or signature is missing")
    assert error.hint == "this is a draft: formation demo or formation init completes it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DRAFT.replace("demo", "De mo"), "name: 'De mo' is not a valid name"),
        (DRAFT + '[[voter]]\nname = "n2"\naddresses = ["/ip4/127.0.0.1/tcp/0"]', "2 voters"),
        (DRAFT.replace("[[voter]]", "[[voters]]"), "unknown key 'voters'"),
        (DRAFT.replace('"n1"', "1"), "voter 1: name is missing or not text"),
    ],
)
def test_a_broken_draft_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """A draft is checked as a manifest is, but for keys."""
    assert message in refusal(tmp_path / "draft.toml", text, read_draft).message
