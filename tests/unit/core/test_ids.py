from __future__ import annotations

import pytest

from formation.core.errors import ConflictError, NotFoundError, UsageError
from formation.core.ids import (
    account_id_of,
    check_digest,
    check_label,
    digest_of,
    is_vm_id,
    node_id_of,
    pick_by_name_or_prefix,
    public_key_of_account,
    public_key_of_node,
    trace_id_of,
    vm_id_of,
)

# RFC 8032 section 7.1, TEST 1.
KEY = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
NODE = "12D3KooWQK7vjChGhk4PyQCVzGwZgCCiqf8YNymVPzGm9q3HPTHa"


def test_a_node_id_holds_its_key() -> None:
    """public_key_of_node undoes node_id_of."""
    assert public_key_of_node(node_id_of(KEY)) == KEY


def test_an_account_id_holds_its_key() -> None:
    """public_key_of_account undoes account_id_of."""
    assert public_key_of_account(account_id_of(KEY)) == KEY


def test_ids_look_as_their_standards_say() -> None:
    """A PeerId of Ed25519 starts with 12D3KooW, a did:key of Ed25519 with z6Mk."""
    assert node_id_of(KEY).startswith("12D3KooW")
    assert len(node_id_of(KEY)) == 52
    assert account_id_of(KEY).startswith("did:key:z6Mk")


@pytest.mark.parametrize("key", [b"", KEY[:31], KEY + b"\0"])
def test_only_32_bytes_have_an_id(key: bytes) -> None:
    """An id of a key that is none is a mistake of ours."""
    with pytest.raises(AssertionError):
        node_id_of(key)
    with pytest.raises(AssertionError):
        account_id_of(key)


def broken_forms(text: str) -> list[str]:
    # White space, the letters that base58 leaves out, other scripts, one more or less, two spellings of the same bytes.
    return ["", text[:-1], text + "1", "1" + text, text + "\n", " " + text, text[:-1] + "0", text[:-1] + "é", "2" * 5000]


@pytest.mark.parametrize("text", [*broken_forms(NODE), account_id_of(KEY), "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"])
def test_what_is_not_a_node_id_is_refused(text: str) -> None:
    """A node id has exactly one spelling, and the error shows how one looks."""
    with pytest.raises(UsageError, match="is not a node id") as caught:
        public_key_of_node(text)
    assert "12D3KooW" in caught.value.hint
    assert len(caught.value.message) < 120


@pytest.mark.parametrize("text", [*broken_forms(account_id_of(KEY)), node_id_of(KEY), account_id_of(KEY)[8:], "did:key:z"])
def test_what_is_not_an_account_id_is_refused(text: str) -> None:
    """An account id has exactly one spelling, and the error shows how one looks."""
    with pytest.raises(UsageError, match="is not an account id") as caught:
        public_key_of_account(text)
    assert "did:key:z6Mk" in caught.value.hint


def test_a_vm_id_is_derived_from_its_intent() -> None:
    """The same intent names the same VM, in a form that is recognised."""
    assert vm_id_of(b"\1" * 32) == "vm-aeaqcaibaeaqcaib"
    assert is_vm_id(vm_id_of(b"\1" * 32))
    assert vm_id_of(b"\2" * 32) != vm_id_of(b"\1" * 32)


@pytest.mark.parametrize(
    "text", ["", "vm-", "vm-aeaqcaibaeaqcai", "vm-aeaqcaibaeaqcaib\n", "vm-AEAQCAIBAEAQCAIB", "vm-1eaqcaibaeaqcaib"]
)
def test_what_is_not_a_vm_id(text: str) -> None:
    """Length, alphabet and end are exact."""
    assert not is_vm_id(text)


def test_a_trace_id_is_the_start_of_the_intents_digest() -> None:
    """Sixteen hex digits."""
    assert trace_id_of(bytes(range(32))) == "0001020304050607"


def test_a_digest_is_recognised() -> None:
    """check_digest lets digest_of's form through."""
    assert check_digest(digest_of(b"")) == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:" + "0" * 63, "sha256:" + "0" * 64 + "\n", "sha256:" + "A" * 64, "0" * 64]
)
def test_what_is_not_a_digest_is_refused(text: str) -> None:
    """Sixty-four lower-case hex digits, and no line end after them."""
    with pytest.raises(UsageError, match="is not a digest"):
        check_digest(text)


@pytest.mark.parametrize("text", ["a", "0", "a-b", "a" * 63, "web--1"])
def test_labels(text: str) -> None:
    """A DNS label is a name."""
    assert check_label(text, what="name") == text


@pytest.mark.parametrize("text", ["", "-a", "a-", "A", "a b", "a.b", "ä", "a" * 64, "a\n", "a\0"])
def test_what_is_not_a_label_is_refused(text: str) -> None:
    """Anything else is refused with the field's name; a line end too, for names go into files of lines."""
    with pytest.raises(UsageError, match=r"^name: .* is not a valid name$"):
        check_label(text, what="name")


VMS = (("vm-aeaqcaibaeaqcaib", "web"), ("vm-aeaqzzzzzzzzzzzz", "db"), ("vm-bbbbbbbbbbbbbbbb", "db"))


@pytest.mark.parametrize("wanted", ["vm-aeaqcaibaeaqcaib", "web", "vm-aeaqc", "aeaqc"])
def test_a_thing_is_found_by_id_name_or_prefix(wanted: str) -> None:
    """Exact id, exact name, prefix with kind, prefix without."""
    assert pick_by_name_or_prefix(wanted, candidates=VMS, what="vm") == "vm-aeaqcaibaeaqcaib"


@pytest.mark.parametrize("wanted", ["", "bbb", "vm-c", "we", "zzzz"])
def test_nothing_is_found_by_anything_else(wanted: str) -> None:
    """Short prefixes, inner parts and prefixes of names do not count."""
    with pytest.raises(NotFoundError, match="no vm matches") as caught:
        pick_by_name_or_prefix(wanted, candidates=VMS, what="vm")
    assert caught.value.hint == "formation vm list"


@pytest.mark.parametrize(
    ("wanted", "message"), [("aeaq", "matches 2 of kind vm: vm-aeaqc"), ("db", "vm-aeaqzzzzzzzzzzzz, vm-bbbb")]
)
def test_several_matches_are_listed(wanted: str, message: str) -> None:
    """The answer to an ambiguous name shows what it may mean."""
    with pytest.raises(ConflictError, match=message):
        pick_by_name_or_prefix(wanted, candidates=VMS, what="vm")


def test_an_id_wins_over_somebody_elses_name() -> None:
    """Naming a VM like the id of another does not hide that other one."""
    candidates = [*VMS, ("vm-cccccccccccccccc", "vm-aeaqcaibaeaqcaib")]
    assert pick_by_name_or_prefix("vm-aeaqcaibaeaqcaib", candidates=candidates, what="vm") == "vm-aeaqcaibaeaqcaib"


def test_digests_are_found_without_their_kind() -> None:
    """A prefix of the hex digits is enough."""
    assert pick_by_name_or_prefix("e3b0", candidates=[(digest_of(b""), "hello")], what="image") == digest_of(b"")
