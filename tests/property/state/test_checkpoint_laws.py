"""Section 7: a root is a function of the state, whatever led to it; a snapshot is that state or is refused."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.codec import decode, encode, sha256
from formation.core.errors import DecodeError
from formation.state.checkpoint import (
    BUCKET_COUNT,
    ItemProof,
    SnapshotAssembly,
    SnapshotRange,
    SnapshotSource,
    StateTree,
    parse_snapshot_chunk,
    parse_snapshot_head,
    verify_item,
)
from formation.state.sync import decode_request

KEYS = st.tuples(st.sampled_from(["", "vm", "cell.vm", "é"]), st.text(max_size=4))
# Lengths around the places where CBOR's heads grow, and where a piece is full.
VALUES = st.sampled_from([0, 1, 22, 23, 24, 254, 255, 256, 30_000, 65_000, 70_000]).map(lambda size: b"x" * size)
STATES = st.dictionaries(KEYS, VALUES, max_size=12)
HOSTILE = st.binary(max_size=80) | st.recursive(
    st.integers(-2, 5000) | st.binary(max_size=40) | st.text(max_size=3) | st.none(),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
).map(encode)


def bucket_of(section: str, object_id: str) -> int:
    """The rule as README.md has it: the first 12 bits of SHA-256 over CBOR [section, id]."""
    return int.from_bytes(sha256(encode([section, object_id]))[:2], "big") >> 4


def tree_of(items: dict[tuple[str, str], bytes]) -> StateTree:
    tree = StateTree()
    tree.update(items)
    return tree


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.dictionaries(KEYS, st.none() | VALUES, max_size=6), max_size=6), looks=st.integers(0, 63))
def test_root_forgets_history(steps: list[dict[tuple[str, str], bytes | None]], looks: int) -> None:
    """Any updates, with or without a look at the root between them, end in the root of what is left; so does a rebuild."""
    model: dict[tuple[str, str], bytes] = {}
    tree = StateTree()
    for index, step in enumerate(steps):
        before = dict(model)
        tree.take_dirty()
        tree.update(step)
        for key, value in step.items():
            if value is None:
                model.pop(key, None)
            else:
                model[key] = value
        if looks >> index & 1:
            tree.root()
        touched = {key for key in before.keys() | model.keys() if before.get(key) != model.get(key)}
        assert set(tree.take_dirty()) == {bucket_of(*key) for key in touched}
    assert tree.root() == tree_of(model).root()
    assert {(item.section, item.id): item.value for item in tree.items()} == model
    assert tree.item_count == len(model)
    rebuilt = StateTree()
    for number in {bucket_of(*key) for key in model}:
        rebuilt.load_bucket(number, tree.bucket(number))
    assert (rebuilt.root(), rebuilt.item_count, rebuilt.size_bytes) == (tree.root(), tree.item_count, tree.size_bytes)


@settings(max_examples=60, deadline=None)
@given(one=STATES, other=STATES)
def test_different_states_have_different_roots(one: dict[tuple[str, str], bytes], other: dict[tuple[str, str], bytes]) -> None:
    """Equal roots, equal items."""
    assert (tree_of(one).root() == tree_of(other).root()) == (one == other)


@settings(max_examples=60, deadline=None)
@given(items=STATES, key=KEYS, other=KEYS)
def test_proofs_say_what_is(items: dict[tuple[str, str], bytes], key: tuple[str, str], other: tuple[str, str]) -> None:
    """A proof shows exactly the value, or absence; taken for another key it shows the truth of that one or nothing."""
    tree = tree_of(items)
    source = SnapshotSource(tree.head(1), tree.bucket)
    for asked in (key, *items):
        proof = source.prove(*asked)
        assert proof is not None
        assert verify_item(tree.root(), *asked, decode(encode(proof), ItemProof)) == items.get(asked)
        try:
            assert verify_item(tree.root(), *other, proof) == items.get(other)
        except DecodeError:
            pass


@settings(max_examples=40, deadline=None)
@given(
    old=STATES,
    new=st.dictionaries(KEYS, st.none() | VALUES, max_size=8),
    seed=st.integers(0, 1000),
    more=st.integers(0, 200),
)
def test_snapshots_arrive_whole_from_lying_peers(
    old: dict[tuple[str, str], bytes], new: dict[tuple[str, str], bytes | None], seed: int, more: int
) -> None:
    """Three peers of which two lie or stay silent, a restart in the middle, an old state in the store: the root is reached."""
    rng = random.Random(seed)
    old |= {("node", str(i)): rng.randbytes(20) for i in range(more)}
    tree = tree_of(old)
    held = {number: content for number in range(BUCKET_COUNT) if (content := tree.bucket(number))}
    tree.update(new)
    source = SnapshotSource(tree.head(9), tree.bucket)
    head = parse_snapshot_head(encode(source.head), root=tree.root())
    assembly = SnapshotAssembly(head, held=held.items())
    store = {number: held[number] for number in assembly.kept if number in held}
    restart_at = rng.randrange(1, 8)
    for turn in range(10_000):
        if assembly.is_complete:
            break
        if turn == restart_at:
            assembly = SnapshotAssembly(head, held=store.items())
        for wanted in assembly.wanted(3):
            answer(assembly, source, wanted, rng, store)
    assert assembly.is_complete
    twin = StateTree()
    for number, content in store.items():
        twin.load_bucket(number, content)
    assert twin.root() == tree.root()


def answer(
    assembly: SnapshotAssembly, source: SnapshotSource, wanted: SnapshotRange, rng: random.Random, store: dict[int, bytes]
) -> None:
    """One of three peers answers: one is honest, one changes a byte, one is silent."""
    chunk = source.chunk(wanted)
    assert chunk is not None
    raw = bytearray(encode(chunk))
    peer = rng.randrange(3)
    if peer == 2:
        assembly.give_back(wanted)
        return
    if peer == 1:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    try:
        done = assembly.take(wanted, parse_snapshot_chunk(bytes(raw)))
    except DecodeError:
        assert peer == 1
        assembly.give_back(wanted)
        return
    assert peer == 0
    store.update(done)


@settings(max_examples=200, deadline=None)
@given(data=HOSTILE)
def test_hostile_bytes_raise_decode_errors(data: bytes) -> None:
    """Whatever a peer sends as a head, a range, a chunk, a proof or a bucket."""
    tree = tree_of({("vm", "a"): b"x"})
    assembly = SnapshotAssembly(tree.head(1))
    (wanted,) = assembly.wanted(1)
    for use in (
        lambda: parse_snapshot_head(data, root=tree.root()),
        lambda: decode_request(data),
        lambda: assembly.take(wanted, parse_snapshot_chunk(data)),
        lambda: verify_item(tree.root(), "vm", "a", decode(data, ItemProof)),
        lambda: StateTree().load_bucket(0, data or b"\x00"),
    ):
        try:
            use()
        except DecodeError:
            continue
        # A well-formed request is the only thing that random bytes may be.
        decode_request(data)
