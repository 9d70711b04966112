"""Commands about accounts, networks, voters and evidence do what they say, and leave files that a crash cannot spoil."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from formation.cli import account, state
from formation.core.codec import verify_ed25519
from formation.core.event import AccountKeyRotated, Seat, ValuePut, ValueRemoved, parse_event
from formation.core.intent import Intent, parse_intent
from formation.core.keys import KeyPair, read_key_file, write_key_file
from formation.core.manifest import read_manifest
from formation.state.checkpoint import BUCKET_COUNT, StateTree
from formation.state.disk import DiskStore
from formation.state.evidence import bucket_values, encode_op_bundle, state_bundle_head
from formation.state.fold import State
from formation.state.membership import CommitteeState
from formation.state.replica import Replica, ReplicaConfig
from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_node import FakeNode
from tests.unit.cli.state_answers import answers, voters
from tests.unit.state import proofs

FIRST = KeyPair(b"\x01" * 32)
"""The account key of the `home` fixture."""


@pytest.fixture
def key_file(home: Path) -> Path:
    return home / "config" / "formation" / "account.key"


def last_intent(node: FakeNode) -> Intent:
    return parse_intent(node.wishes[-1]).intent


# ── key rotation ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rotation_replaces_the_key_and_keeps_the_account(run: Run, node: FakeNode, key_file: Path) -> None:
    """Afterwards the new key signs in the name of the same account; the old one stands beside it."""
    assert run("account", "rotate").status == 0
    new = read_key_file(key_file)
    assert new.public_key == node.accounts.keys[FIRST.account_id] != FIRST.public_key
    assert read_key_file(key_file.with_name("account.key.old")).public_key == FIRST.public_key
    assert not key_file.with_name("account.key.next").exists()
    assert run("value", "put", "color", "blue").status == 0
    intent = last_intent(node)
    assert (intent.account, intent.key) == (FIRST.public_key, new.public_key)
    assert intent.object_id == f"{FIRST.account_id}/color"
    shown = json.loads(run("key", "show", "-o", "json").out)
    assert shown["account_id"] == FIRST.account_id
    assert run("account", "rotate").status == 0
    assert read_key_file(key_file.with_name("account.key.old")).public_key == new.public_key


def test_the_new_key_is_on_disk_before_the_network_hears_of_it(
    run: Run, node: FakeNode, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the wish arrives, both keys are in files; so whatever breaks then, one of them is in force."""
    seen: list[tuple[bytes, bytes]] = []
    take = node.accounts.take

    def look(wish: object, event: object, object_id: str) -> None:
        assert isinstance(event, AccountKeyRotated)
        seen.append((read_key_file(key_file).public_key, read_key_file(key_file.with_name("account.key.next")).public_key))
        assert seen[-1][1] == event.new_key
        take(wish, event, object_id)  # type: ignore[arg-type] # as it came

    monkeypatch.setattr(node.accounts, "take", look)
    assert run("account", "rotate").status == 0
    assert seen[0][0] == FIRST.public_key


def test_an_interrupted_rotation_is_taken_up_again(
    run: Run, node: FakeNode, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is final at the node both keys stay; once it is, the same command finishes without another wish."""
    monkeypatch.setattr(account, "FOLLOW_TIMEOUT_S", 0.2)
    node.accounts.is_late = True
    assert run("account", "rotate").status == 7
    following = read_key_file(key_file.with_name("account.key.next"))
    assert read_key_file(key_file).public_key == FIRST.public_key
    assert run("account", "rotate").status == 7
    assert read_key_file(key_file.with_name("account.key.next")).public_key == following.public_key
    node.accounts.keys[FIRST.account_id] = following.public_key
    assert "formation account rotate" in run("account", "show").err
    sent = len(node.wishes)
    assert run("account", "rotate").status == 0
    assert len(node.wishes) == sent
    assert read_key_file(key_file).public_key == following.public_key


def test_a_refused_rotation_changes_no_key(run: Run, node: FakeNode, key_file: Path, home: Path) -> None:
    """A wrong recovery key, or a key that was rotated elsewhere, is told before any file is made."""
    write_key_file(home / "wrong.key", KeyPair.generate())
    assert run("account", "rotate", "--recovery-key", "wrong.key").status == 4
    node.accounts.keys[FIRST.account_id] = KeyPair.generate().public_key
    result = run("account", "rotate")
    assert result.status == 4
    assert "rotated elsewhere" in result.err
    assert "not in force" in run("account", "show").err
    assert not key_file.with_name("account.key.next").exists()


def test_a_recovery_key_gives_a_lost_account_a_new_key(run: Run, node: FakeNode, key_file: Path, home: Path) -> None:
    """Without the key file, the account's id and the recovery key are enough; only the recovery key replaces itself."""
    assert run("account", "recovery", "paper.key").status == 0
    paper = read_key_file(home / "paper.key")
    assert node.accounts.recovery[FIRST.account_id] == paper.public_key
    assert run("account", "recovery", "next.key").status == 4
    assert not (home / "next.key").exists()
    assert run("account", "recovery", "next.key", "--with", "paper.key").status == 0
    key_file.unlink()
    assert run("account", "rotate", "--recovery-key", "next.key").status == 5
    assert run("account", "rotate", "--recovery-key", "next.key", "--account", FIRST.account_id).status == 0
    assert last_intent(node).key == read_key_file(home / "next.key").public_key
    assert read_key_file(key_file).public_key == node.accounts.keys[FIRST.account_id]
    assert run("account", "recovery", "--none", "--with", "next.key").status == 0
    assert node.accounts.recovery[FIRST.account_id] == b""
    assert run("account", "recovery").status == 2


def test_a_damaged_id_file_is_told(run: Run, node: FakeNode, key_file: Path) -> None:
    """Nobody signs for a wrong account by accident."""
    key_file.with_suffix(".id").write_text("nonsense\n")
    result = run("account", "show")
    assert result.status == 2
    assert "holds no account id" in result.err
    key_file.with_suffix(".id").write_text(KeyPair.generate().account_id)
    assert run("account", "rotate", "--account", FIRST.account_id).status == 6


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_values_come_from_files_and_removal_names_what_was_seen(run: Run, node: FakeNode, home: Path) -> None:
    """Bytes are kept as they are; a removal names the dots that the node showed."""
    (home / "raw").write_bytes(b"\xff\x00\n")
    assert run("value", "put", "raw", "--file", "raw").status == 0
    event = parse_event("value.put", last_intent(node).body)
    assert event == ValuePut(value=b"\xff\x00\n")
    assert json.loads(run("value", "get", "raw", "-o", "json").out)["text"] is None
    assert run("value", "remove", "raw").status == 0
    assert parse_event("value.removed", last_intent(node).body) == ValueRemoved(seen=(bytes.fromhex("5b" * 32),))
    (home / "large").write_bytes(b"x" * 40_000)
    assert run("value", "put", "large", "--file", "large").status == 2
    assert run("value", "put", "", "x").status == 2
    assert run("value", "put", "none", "--file", "missing").status == 2


# ── networks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_founders_sign_one_after_the_other(run: Run, home: Path) -> None:
    """Before the last has signed it is no network; afterwards each can join with the file."""
    seats: list[str] = []
    for name in "abcd":
        result = run("network", "node-id", "--data-dir", name, "-o", "json")
        seats += ["--voter", f"{name}={json.loads(result.out)['node_id']}@/ip4/192.0.2.1/tcp/470{len(seats) // 2}"]
        assert run("network", "node-id", "--data-dir", name).out.strip() == json.loads(result.out)["node_id"]
    assert run("network", "create", "home", *seats[:4], "--out", "net.toml").status == 2
    assert run("network", "create", "home", *seats, "--out", "net.toml").status == 0
    for name in "abc":
        assert run("network", "sign", "net.toml", "--data-dir", name).status == 0
    shown = json.loads(run("network", "show", "net.toml", "-o", "json").out)
    assert [voter["signature"] for voter in shown["voters"]] == ["valid"] * 3 + ["missing"]
    refused = run("init", "--manifest", "net.toml")
    assert refused.status == 2
    assert "formation network sign" in refused.err
    assert run("network", "sign", "net.toml", "--data-dir", "d").status == 0
    manifest = read_manifest(home / "net.toml")
    assert [voter.name for voter in manifest.voters] == list("abcd")
    assert manifest.network_id.hex() == shown["network_id"]
    assert "by all founders" in run("network", "show", "net.toml").out
    assert run("init", "--manifest", "net.toml").status == 0
    assert run("network", "show").status == 0


def test_a_change_after_signing_is_seen(run: Run, home: Path) -> None:
    """A signature over another text is told as such, and one new signature mends it."""
    node_id = json.loads(run("network", "node-id", "--data-dir", "a", "-o", "json").out)["node_id"]
    run("network", "create", "home", "--voter", f"a={node_id}@/ip4/192.0.2.1/tcp/4700", "--out", "net.toml")
    run("network", "sign", "net.toml", "--data-dir", "a")
    (home / "net.toml").write_text((home / "net.toml").read_text().replace("192.0.2.1", "192.0.2.2"))
    assert "INVALID" in run("network", "show", "net.toml").out
    assert run("network", "sign", "net.toml", "--data-dir", "a").status == 0
    assert read_manifest(home / "net.toml").voters[0].addresses == ("/ip4/192.0.2.2/tcp/4700",)


def test_a_stranger_cannot_sign(run: Run, home: Path) -> None:
    """Only founders' keys have a place in the file."""
    node_id = json.loads(run("network", "node-id", "--data-dir", "a", "-o", "json").out)["node_id"]
    run("network", "create", "home", "--voter", f"a={node_id}@/ip4/192.0.2.1/tcp/4700", "--out", "net.toml")
    run("network", "node-id", "--data-dir", "b")
    result = run("network", "sign", "net.toml", "--data-dir", "b")
    assert result.status == 5
    assert "not one of the founders" in result.err
    assert run("network", "sign", "net.toml", "--data-dir", "c").status == 5


# ── voters ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_typed_is_what_is_proposed(run: Run, node: FakeNode) -> None:
    """Each command posts one proposal; it is pending (8) while voters are missing and done (0) once it is decided."""
    node.answers["voters"] = voters()
    assert run("voter", "add", "e=x@/a", "f=y@/b", "g=z@/c").status == 8
    assert run("voter", "remove", "n1", "n2", "n3").status == 8
    assert run("voter", "replace", "n1", "e=x@/a", "n2", "f=y@/b", "--force").status == 8
    node.answers["voters"] = voters() | {"decided": {"height": 7, "command": "formation voter remove n1"}}
    assert run("voter", "remove", "n1", "n2", "n3").status == 0
    assert run("voter", "withdraw").status == 0
    assert run("voter", "dismiss", "attic", "-o", "json").status == 0
    assert [post for _, post in node.posts] == [
        {"action": "propose", "add": ["e=x@/a", "f=y@/b", "g=z@/c"], "remove": [], "force": False},
        {"action": "propose", "add": [], "remove": ["n1", "n2", "n3"], "force": False},
        {"action": "propose", "add": ["e=x@/a", "f=y@/b"], "remove": ["n1", "n2"], "force": True},
        {"action": "propose", "add": [], "remove": ["n1", "n2", "n3"], "force": False},
        {"action": "withdraw"},
        {"action": "dismiss", "node": "attic"},
    ]


# ── evidence ────────────────────────────────────────────────────────────────────────────────────────────────────────


def export_file() -> bytes:
    """An export of a network whose first height was empty, at that height."""
    seats = tuple(Seat(voter.name, voter.public_key, voter.addresses) for voter in proofs.MANIFEST.voters)
    final = State(CommitteeState(seats), genesis_hash=proofs.NETWORK_ID)
    final.begin_height(height=1, hash_=b"h" * 32, time_ms=proofs.TIME_MS, view=1, epoch=0)
    tree = StateTree()
    tree.update(final.take_dirty())
    begin = state_bundle_head(proofs.MANIFEST, proofs.offer(tree, height=1))
    return begin + bucket_values((number, tree.bucket(number)) for number in range(BUCKET_COUNT))


@pytest.fixture
def manifest(home: Path) -> Path:
    path = home / "test.toml"
    path.write_text(proofs.MANIFEST.to_toml())
    return path


def test_an_export_arrives_whole_or_not_at_all(run: Run, node: FakeNode, home: Path) -> None:
    """What breaks off is asked for again; a file that is there is never overwritten; no part of one is left."""
    node.files["state/export"] = [b"cut off", b"the whole file"]
    assert run("state", "export", "one").status == 0
    assert (home / "one").read_bytes() == b"the whole file"
    assert run("state", "export", "one").status == 1
    node.files["state/export"] = [b"cut"] * state.EXPORT_TRY_COUNT
    assert run("state", "export", "two").status == 3
    assert not list(home.glob("*two*")) + list(home.glob(".two*"))


def test_an_export_is_verified_and_imported(run: Run, home: Path, manifest: Path) -> None:
    """It is checked against the manifest, becomes the beginning of a fresh store, and never a step back."""
    file = home / "export"
    file.write_bytes(export_file())
    found = json.loads(run("state", "verify", str(file), "--manifest", str(manifest), "-o", "json").out)
    assert (found["height"], found["epoch"], found["signers"]) == (1, 0, ["n0", "n1", "n2"])
    assert "Whether that is your network" in run("state", "verify", str(file)).err
    write_key_file(home / "node" / "node.key", proofs.KEYS[0])
    arguments = ("state", "import", str(file), "--data-dir", "node", "--manifest", str(manifest))
    assert run(*arguments).status == 0
    store = DiskStore(home / "node" / "state")
    store.open(bytes(proofs.NETWORK_ID))
    loaded = store.load()
    config = ReplicaConfig(
        network_id=proofs.NETWORK_ID,
        founders=tuple(Seat(v.name, v.public_key, v.addresses) for v in proofs.MANIFEST.voters),
        public_key=proofs.KEYS[0].public_key,
    )
    replica = Replica(config, sign=proofs.KEYS[0].sign, verify=verify_ed25519)
    replica.recover_checkpoint(loaded.meta, loaded.buckets)
    for record in loaded.records:
        replica.recover(record, is_repeat=True)
    replica.finish_recovery()
    store.close()
    assert replica.state.height == 1
    assert replica.snapshot_offer().proof
    again = run(*arguments)
    assert again.status == 6
    assert "height 1 already" in again.err


@pytest.mark.parametrize("name", ["state", "op"])
def test_evidence_of_another_network_or_damaged_is_denied(name: str, run: Run, home: Path, manifest: Path) -> None:
    """Exit status 4, with the step at which it failed."""
    blocks = proofs.make_blocks(2)
    acks = [proofs.ack(blocks[1], voter) for voter in range(3)]
    data = {
        "state": export_file(),
        "op": encode_op_bundle(proofs.MANIFEST, (), proofs.bundle(blocks, acks=acks)),
    }[name]
    (home / "file").write_bytes(data)
    assert run(name, "verify", "file", "--manifest", str(manifest)).status == 0
    node_id = json.loads(run("network", "node-id", "--data-dir", "a", "-o", "json").out)["node_id"]
    run("network", "create", "other", "--voter", f"a={node_id}@/ip4/192.0.2.1/tcp/4700", "--out", "other.toml")
    run("network", "sign", "other.toml", "--data-dir", "a")
    result = run(name, "verify", "file", "--manifest", "other.toml")
    assert result.status == 4
    assert "is of network 'test'" in result.err
    (home / "file").write_bytes(data[:-1])
    assert run(name, "verify", "file").status == 4
    assert run(name, "verify", "missing").status == 5


def test_a_bundle_is_saved_and_says_what_it_proves(run: Run, node: FakeNode, home: Path) -> None:
    """Certified only: the words say so, and do not say more."""
    blocks = proofs.make_blocks(1)
    acks = [proofs.ack(blocks[0], voter) for voter in range(3)]
    node.files["ops/00112233/bundle"] = [encode_op_bundle(proofs.MANIFEST, (), proofs.bundle(blocks, acks=acks))]
    assert run("op", "bundle", "00112233", "--out", "op").status == 0
    shown = run("op", "verify", "op").out
    assert "a quorum stored this very block" in shown
    assert "not proven by this file" in shown
    assert "whether it had an effect is not proven" in shown
    assert run("op", "bundle", "00112233", "--out", "op").status == 1


def test_results_are_json_where_asked_for(run: Run, node: FakeNode) -> None:
    """The API's own answer, whole; errors too."""
    node.answers |= answers()
    for arguments in (
        ["state", "status"],
        ["voter", "list"],
        ["op", "show", "00112233"],
        ["account", "show"],
        ["claim", "list"],
    ):
        result = run(*arguments, "-o", "json")
        assert result.status == 0, arguments
        json.loads(result.out)
        assert result.err == ""
    assert json.loads(run("state", "diff", "n2", "-o", "json").out)["is_same"] is False
    assert json.loads(run("op", "show", "zz", "-o", "json").err)["error"]["code"] == "not_found"


@pytest.mark.parametrize("group", ["account", "grant", "value", "claim", "network", "voter", "state", "op"])
def test_every_command_has_examples(group: str, run: Run) -> None:
    """Help of each command ends with how people call it."""
    listing = run(group, "--help").out
    names = [
        line.split()[0] for line in listing.partition("Commands:\n")[2].splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert names
    for name in names:
        text = run(group, name, "--help").out
        assert f"formation {group} {name}" in text.partition("Examples:")[2], name
