"""Cells recorded in a root, a root named by a cell, accounts taken over: each rule by the bytes that would break it."""

from __future__ import annotations

from typing import Any

import pytest

from formation.core.codec import encode, verify_ed25519
from formation.core.errors import DecodeError
from formation.core.event import AccountImported, CellRecorded, CheckpointWanted, RootNamed, Seat
from formation.core.ids import NetworkId, account_id_of
from formation.core.keys import KeyPair
from formation.core.manifest import Manifest, found_network, parse_manifest
from formation.state.accounts import Accounts, Delegation
from formation.state.checkpoint import CHECKPOINT_WANTED_INTERVAL_MS, StateTree, bucket_number
from formation.state.committee import Committee
from formation.state.evidence import founders_of
from formation.state.fold import State
from formation.state.membership import CommitteeState
from formation.state.network_cells import (
    NetworkCells,
    RecordedCell,
    check_cell_id,
    load_record,
    make_record,
)
from formation.state.remote_cell import ProofSource
from formation.state.root_link import Root, RootLink, account_item
from formation.state.spine_values import CheckpointRef
from tests.unit.state import proofs
from tests.unit.state.proofs import FOUNDERS, KEYS, MANIFEST, NEXT, TIME_MS

RAW = MANIFEST.to_cbor()
SEAT = Seat("s", KEYS[0].public_key, ("/ip4/192.0.2.1/tcp/1",))
OTHER = found_network("other", voters=[("n", KEYS[7], ("/memory/7",))], founded_ms=TIME_MS)
OWN = NetworkId(b"o" * 32)
USER = KeyPair(b"u" * 32)
ACCOUNT = account_id_of(USER.public_key)
NEW, RECOVERY = KeyPair(b"N" * 32).public_key, KeyPair(b"R" * 32).public_key
# The committee of the cell that imports.
CELL = Committee(0, tuple(key.public_key for key in KEYS[:4]))


def recorded(manifest: bytes = RAW, servers: tuple[Seat, ...] = (), links: tuple[bytes, ...] = ()) -> CellRecorded:
    return CellRecorded(manifest=manifest, servers=servers, links=links)


# ── records ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_holds_the_newest_committee_that_was_shown() -> None:
    first = make_record(recorded(), None, fence=(3, 1), verify=verify_ed25519)
    assert (first.network_id, first.committee, first.fence) == (MANIFEST.network_id, FOUNDERS, (3, 1))
    later = make_record(recorded(links=(proofs.link(),), servers=(SEAT,)), first, fence=(9, 0), verify=verify_ed25519)
    assert (later.committee, later.fence, later.servers) == (NEXT, (3, 1), (SEAT,))
    # Not back: the same links are passed over, and none at all change nothing.
    for links in ((), (proofs.link(),)):
        assert make_record(recorded(links=links), later, fence=(10, 0), verify=verify_ed25519).committee == NEXT
    assert make_record(recorded(links=(proofs.link(),)), None, fence=(3, 1), verify=verify_ed25519).committee == NEXT


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (recorded(b"\x80"), "Expected"),
        (recorded(RAW[:-1] + bytes([RAW[-1] ^ 1])), "no valid signature"),
        (recorded(OTHER.to_cbor()), "another network's"),
        (recorded(links=(b"junk",)), "CBOR"),
        (recorded(links=(proofs.final(proofs.proposal(height=5)),)), "no handover"),
        (recorded(servers=(Seat("s", KEYS[0].public_key, ("tcp://x",)),)), "no multiaddr"),
        (recorded(servers=(Seat("s\x1b", KEYS[0].public_key, ("/memory/1",)),)), "not printable"),
    ],
)
def test_a_record_that_proves_nothing_is_void(event: CellRecorded, why: str) -> None:
    """What the fold refuses, with a text that says why."""
    before = make_record(recorded(), None, fence=(3, 1), verify=verify_ed25519)
    with pytest.raises(DecodeError, match=why):
        make_record(event, before, fence=(9, 9), verify=verify_ed25519)


def test_records_survive_a_dump() -> None:
    """What one replica dumps another loads, and a reader of a proof reads the same."""
    cells = NetworkCells()
    record = make_record(recorded(links=(proofs.link(),), servers=(SEAT,)), None, fence=(3, 1), verify=verify_ed25519)
    cells.put("berlin", record)
    plain = cells.dump("berlin")
    assert plain is not None
    twin = NetworkCells()
    twin.load("berlin", plain)
    assert twin.get("berlin") == load_record(plain) == record
    assert RecordedCell("berlin", record).servers == (SEAT,)
    founders = RecordedCell("b", make_record(recorded(), None, fence=(1, 1), verify=verify_ed25519)).servers
    assert [seat.name for seat in founders] == ["n0", "n1", "n2", "n3"]
    assert cells.remove("berlin") == record
    assert cells.dump("berlin") is None
    assert cells.remove("berlin") is None
    for junk in ([], [1, 2, 3, 4, 5, 6], plain[:-1]):
        with pytest.raises(DecodeError):
            load_record(junk)


@pytest.mark.parametrize("object_id", ["berlin", "cell/", "cell/Berlin", "cell/a/b", "cell/" + "x" * 64, "vm-1"])
def test_a_cells_id_is_a_label(object_id: str) -> None:
    with pytest.raises(DecodeError):
        check_cell_id(object_id)
    check_cell_id("cell/berlin-2")


def test_a_manifest_comes_back_from_its_bytes() -> None:
    assert parse_manifest(RAW).network_id == MANIFEST.network_id
    for raw in (b"", b"\x80", encode([MANIFEST.genesis, []]), encode([MANIFEST.genesis, [[b"k", b"s"]]]), RAW + b"\0"):
        with pytest.raises(DecodeError):
            parse_manifest(raw)


# ── the root ────────────────────────────────────────────────────────────────────────────────────────────────────────


def named(manifest: Manifest = MANIFEST, servers: tuple[Seat, ...] = (), links: tuple[bytes, ...] = ()) -> RootNamed:
    return RootNamed(manifest=manifest.to_cbor(), servers=servers, links=links)


def say(link: RootLink, voter: int, event: RootNamed, committee: Committee = CELL) -> str:
    return link.name_root(committee.voters[voter], event, committee=committee, own=OWN, verify=verify_ed25519)


def root_of(link: RootLink) -> Root | None:
    return link.root


def linked(*, links: tuple[bytes, ...] = ()) -> RootLink:
    link = RootLink()
    for voter in range(3):
        assert say(link, voter, named(links=links)) == ""
    assert link.root is not None
    return link


def test_a_root_is_named_by_a_quorum_that_says_the_same() -> None:
    link = RootLink()
    assert say(link, 0, named()) == say(link, 1, named(servers=(SEAT,))) == say(link, 2, named()) == ""
    assert root_of(link) is None
    assert len(link.words()) == 3
    # One voter's later word replaces its earlier one, so it never counts twice.
    assert say(link, 2, named()) == ""
    assert root_of(link) is None
    assert say(link, 1, named()) == ""
    assert link.root is not None
    assert (link.root.network_id, link.root.committee) == (MANIFEST.network_id, FOUNDERS)
    assert link.words() == ()
    assert "for good" in say(link, 0, named(OTHER))
    for voter in range(3):
        assert say(link, voter, named(servers=(SEAT,), links=(proofs.link(),))) == ""
    assert (link.root.servers, link.root.committee) == ((SEAT,), NEXT)


def test_words_of_voters_who_left_do_not_count() -> None:
    link = RootLink()
    assert say(link, 0, named()) == say(link, 1, named()) == ""
    later = Committee(1, tuple(key.public_key for key in KEYS[2:6]))
    assert say(link, 0, named(), later) == say(link, 1, named(), later) == ""
    assert root_of(link) is None
    assert say(link, 2, named(), later) == ""
    assert link.root is not None


def test_a_root_that_is_none() -> None:
    link = RootLink()
    bad = RootNamed(manifest=b"\x80", servers=(), links=())
    assert say(link, 0, bad) != ""
    assert "its own root" in link.name_root(
        CELL.voters[0], named(), committee=CELL, own=MANIFEST.network_id, verify=verify_ed25519
    )
    assert link.words() == ()


# ── accounts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def imported(
    height: int,
    value: list[Any] | None,
    *,
    committee: Committee = FOUNDERS,
    links: tuple[bytes, ...] = (),
    account: str = ACCOUNT,
    shown: str = ACCOUNT,
    voters: tuple[int, ...] = (0, 1, 2),
) -> AccountImported:
    """A proof of the root: what it has of `account`, shown as if it were of `shown`."""
    tree = StateTree()
    tree.update(
        {("spine", ""): encode([height])} | ({} if value is None else {("account", account_item(account)): encode(value)})
    )
    entry = proofs.proposal(
        committee=committee, height=height + 1, parent=b"p" * 32, checkpoint=CheckpointRef(height, tree.root())
    )
    asked = ("account", account_item(shown))
    proof = ProofSource(tree.head(height)).prove(*asked, tree.bucket(bucket_number(*asked)))
    return AccountImported(links=links, checkpoint=proofs.final(entry, committee=committee, voters=voters), item=encode(proof))


KEYS_VALUE: list[Any] = [NEW, RECOVERY, []]


def apply(link: RootLink, accounts: Accounts, event: AccountImported, account: str = ACCOUNT) -> None:
    keys = link.read_import(account, event, verify=verify_ed25519)
    accounts.adopt(account, key=keys.key, recovery_key=keys.recovery_key)
    link.note_import(account, keys)


def make_accounts() -> Accounts:
    return Accounts(is_voter=lambda _: False)


def test_an_import_takes_keys_over_and_only_forwards() -> None:
    link, accounts = linked(), make_accounts()
    accounts.delegate(ACCOUNT, "node", Delegation(frozenset({"value.put"}), "", 10), 1)
    assert not accounts.has_own_keys(ACCOUNT)
    apply(link, accounts, imported(9, KEYS_VALUE))
    assert (accounts.key_in_force(ACCOUNT), accounts.recovery_key(ACCOUNT)) == (NEW, RECOVERY)
    assert accounts.delegations(ACCOUNT) == ()
    for height in (9, 8):
        with pytest.raises(DecodeError, match="imported before"):
            link.read_import(ACCOUNT, imported(height, KEYS_VALUE), verify=verify_ed25519)
    # The root lost its record: the account is back at its first key.
    apply(link, accounts, imported(10, None))
    assert (accounts.key_in_force(ACCOUNT), accounts.recovery_key(ACCOUNT)) == (USER.public_key, b"")
    assert accounts.dump(account_item(ACCOUNT)) is None
    assert link.dump(account_item(ACCOUNT)) == 10


def test_an_import_that_keeps_the_key_keeps_the_delegations() -> None:
    link, accounts = linked(), make_accounts()
    accounts.delegate(ACCOUNT, "node", Delegation(frozenset({"value.put"}), "", 10), 1)
    apply(link, accounts, imported(9, [USER.public_key, RECOVERY, []]))
    assert len(accounts.delegations(ACCOUNT)) == 1


def test_an_import_follows_the_roots_committee_and_remembers_it() -> None:
    link, accounts = linked(), make_accounts()
    event = imported(9, KEYS_VALUE, committee=NEXT, links=(proofs.link(),))
    with pytest.raises(DecodeError, match="epoch"):
        link.read_import(ACCOUNT, imported(9, KEYS_VALUE, committee=NEXT), verify=verify_ed25519)
    apply(link, accounts, event)
    assert link.root is not None
    assert link.root.committee == NEXT
    # The old committee cannot take anything back, with whatever keys of it are left.
    with pytest.raises(DecodeError, match="epoch"):
        link.read_import(ACCOUNT, imported(99, None), verify=verify_ed25519)
    other = account_id_of(NEW)
    apply(link, accounts, imported(9, KEYS_VALUE, committee=NEXT, links=(proofs.link(),), account=other, shown=other), other)


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (imported(9, None), "no more of the account than its id says"),
        (imported(9, KEYS_VALUE, voters=(0, 1)), "quorum|votes"),
        (imported(9, [NEW, RECOVERY]), "not what this version knows"),
        (imported(9, [NEW[:-1], RECOVERY, []]), "another size"),
        (imported(9, ["k", RECOVERY, []]), "not what this version knows"),
        (imported(9, KEYS_VALUE, shown=account_id_of(RECOVERY)), "proof|path"),
        (AccountImported(links=(b"x",), checkpoint=b"c", item=b"i"), "CBOR|FinalChain"),
        (AccountImported(links=(), checkpoint=b"c", item=b"i"), "CBOR|FinalChain"),
    ],
)
def test_an_import_that_proves_nothing_is_void(event: AccountImported, why: str) -> None:
    with pytest.raises(DecodeError, match=why):
        linked().read_import(ACCOUNT, event, verify=verify_ed25519)


def test_without_a_root_nothing_is_imported() -> None:
    with pytest.raises(DecodeError, match="no root"):
        RootLink().read_import(ACCOUNT, imported(9, KEYS_VALUE), verify=verify_ed25519)


def test_the_link_survives_a_dump() -> None:
    link = linked(links=(proofs.link(),))
    apply(link, make_accounts(), imported(9, KEYS_VALUE, committee=NEXT))
    assert say(link, 3, named(servers=(SEAT,))) == ""
    twin = RootLink()
    for identity in link.ids():
        twin.load(identity, link.dump(identity))
    assert sorted(twin.ids()) == sorted(link.ids())
    assert [twin.dump(i) for i in link.ids()] == [link.dump(i) for i in link.ids()]
    assert twin.root == link.root
    assert twin.root is not None
    assert [seat.name for seat in twin.root.addresses()] == ["n0", "n1", "n2", "n3"]


# ── checkpoints on request ──────────────────────────────────────────────────────────────────────────────────────────


def is_wanted(state: State) -> bool:
    return state.is_checkpoint_wanted


def test_a_checkpoint_is_wanted_for_its_height_and_not_too_often() -> None:
    state = State(CommitteeState(tuple(Seat(f"n{i}", k, ("/m",)) for i, k in enumerate(CELL.voters))), genesis_hash=OWN)

    def at(height: int, time_ms: int) -> None:
        state.begin_height(height=height, hash_=b"h" * 32, time_ms=time_ms, view=height, epoch=0)

    at(1, TIME_MS)
    assert "old" in state._want_checkpoint()
    at(2, TIME_MS + CHECKPOINT_WANTED_INTERVAL_MS)
    assert state._want_checkpoint() == ""
    assert state.is_checkpoint_wanted
    state.note_checkpoint()
    assert state._want_checkpoint() != ""
    at(3, TIME_MS + CHECKPOINT_WANTED_INTERVAL_MS + 1)
    assert is_wanted(state) is False
    assert CheckpointWanted.verb == "checkpoint.wanted"


def test_founders_are_the_first_committee() -> None:
    assert founders_of(MANIFEST) == FOUNDERS
