"""A file proves what it says to somebody with nothing but the manifest; one that was tampered with proves nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from formation.core.codec import encode, verify_ed25519
from formation.core.errors import DecodeError
from formation.core.keys import KeyPair
from formation.core.manifest import found_network
from formation.state.checkpoint import BUCKET_COUNT, StateTree
from formation.state.evidence import (
    OP_BLOCK_COUNT_MAX,
    OpBundle,
    OpEvidence,
    StateEvidence,
    bucket_values,
    encode_op_bundle,
    join_sequence,
    split_sequence,
    state_bundle_head,
    verify_op,
    verify_state,
)
from formation.state.lane import Entry
from formation.state.spine_values import CheckpointRef
from tests.unit.state.proofs import (
    FOUNDERS,
    KEYS,
    LANE,
    MANIFEST,
    NEXT,
    TIME_MS,
    ack,
    bundle,
    final,
    head_of,
    link,
    make_blocks,
    make_tree,
    offer,
    proposal,
)

BLOCKS = make_blocks(4)
TREE = make_tree()


def state_file(tree: StateTree = TREE, **changes: object) -> bytes:
    buckets = bucket_values((number, tree.bucket(number)) for number in range(BUCKET_COUNT))
    return state_bundle_head(MANIFEST, offer(tree, **changes)) + buckets  # type: ignore[arg-type] # of `offer`


def check_state(data: bytes) -> StateEvidence:
    return verify_state(data, verify=verify_ed25519)


def check_op(value: OpBundle, links: Sequence[bytes] = ()) -> OpEvidence:
    return verify_op(encode_op_bundle(MANIFEST, links, value), verify=verify_ed25519)


def covering(entry: Entry) -> bytes:
    return final(proposal(cut=(head_of(entry),)))


# ── the form ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 23, 24, 255, 256, 65_535, 65_536])
def test_a_sequence_comes_apart_as_it_was_joined(size: int) -> None:
    """Every length has one form, and values come back as they were."""
    values = [b"x" * size, b"", b"y"]
    assert list(split_sequence(b"".join(join_sequence(values)))) == values


@pytest.mark.parametrize(
    "data",
    [b"\x01", b"\x80", b"\x44abc", b"\x58", b"\x58\x17" + b"x" * 23, b"\x59\x00\x20" + b"x" * 32, b"\x5f\x41a\xff", b"\x5c"],
)
def test_what_is_no_sequence_is_refused(data: bytes) -> None:
    """Other items, cut ends, long forms of lengths and indefinite lengths are errors."""
    with pytest.raises(DecodeError):
        list(split_sequence(data))


def test_damage_anywhere_raises_the_declared_error_only() -> None:
    """Flipped bits, cuts and splices end in DecodeError, or change nothing that the file says."""
    rng = random.Random(1)
    files: list[tuple[bytes, Callable[[bytes], object]]] = [
        (state_file(make_tree(40)), check_state),
        (
            encode_op_bundle(
                MANIFEST, (), bundle(BLOCKS[:3], acks=[ack(BLOCKS[2], v) for v in range(3)], final_=covering(BLOCKS[1]))
            ),
            lambda data: verify_op(data, verify=verify_ed25519),
        ),
    ]
    refused = 0
    for data, check in files:
        for _ in range(150):
            damaged = bytearray(data)
            at = rng.randrange(len(damaged))
            match rng.randrange(3):
                case 0:
                    damaged[at] ^= 1 << rng.randrange(8)
                case 1:
                    del damaged[at:]
                case _:
                    damaged[at:at] = damaged[: rng.randrange(60)]
            try:
                check(bytes(damaged))
            except DecodeError:
                refused += 1
    # A leader's signature on a proposal that a quorum finalised adds nothing, so damage to it does no harm.
    assert refused > 280


# ── a state ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_export_proves_a_state() -> None:
    """Height, root, signers and all items come out of a file that was not touched."""
    found = check_state(state_file())
    assert found.ref.height == 4
    assert found.ref.root == TREE.root()
    assert found.manifest.network_id == MANIFEST.network_id
    assert found.quorum.voters == (0, 1, 2)
    assert found.item_counts == {"cell.node": 300}
    assert found.size_bytes == TREE.size_bytes
    assert found.buckets == {n: TREE.bucket(n) for n in range(BUCKET_COUNT) if TREE.bucket(n)}
    assert found.time_ms == TIME_MS + 5


def test_links_lead_to_the_committee_that_signed() -> None:
    """A checkpoint of a later committee is proven by the handover before it, and not without it."""
    found = check_state(state_file(committee=NEXT, links=(link(),)))
    assert found.quorum.epoch == 1
    with pytest.raises(DecodeError, match="another epoch"):
        check_state(state_file(committee=NEXT))


def test_a_state_with_one_item_changed_proves_nothing() -> None:
    """Buckets that do not give the root are refused: changed, missing, or one too many."""
    other = make_tree()
    other.update({("cell.node", "node7"): encode("changed")})
    begin = state_bundle_head(MANIFEST, offer(TREE))
    changed = bucket_values((n, other.bucket(n)) for n in range(BUCKET_COUNT))
    kept = [(n, TREE.bucket(n)) for n in range(BUCKET_COUNT) if TREE.bucket(n)]
    empty = next(n for n in range(BUCKET_COUNT) if not TREE.bucket(n))
    for data in (
        begin + changed,
        begin + bucket_values(kept[:-1]),
        begin + bucket_values(sorted([*kept, (empty, kept[0][1])])),
        begin + bucket_values(kept[::-1]),
        begin,
    ):
        with pytest.raises(DecodeError):
            check_state(data)


def test_too_few_signatures_prove_no_state() -> None:
    """2f votes are no quorum, and a final proposal without a checkpoint vouches for no state."""
    values = list(split_sequence(state_file()))
    ref = CheckpointRef(4, TREE.root())
    for proof, message in (
        (final(proposal(height=5, parent=b"p" * 32, checkpoint=ref), voters=(0, 1)), "no quorum"),
        (final(proposal(height=5, parent=b"p" * 32)), "no checkpoint"),
    ):
        with pytest.raises(DecodeError, match=message):
            check_state(b"".join(join_sequence([*values[:3], proof, *values[4:]])))


def test_the_manifest_inside_must_be_signed_by_all_founders() -> None:
    """A genesis without its founders' signatures, or of other founders, begins no proof."""
    others = found_network(
        "test", voters=[(f"n{i}", KeyPair(bytes([90 + i]) * 32), ("/memory/x",)) for i in range(4)], founded_ms=1
    )
    foreign = list(split_sequence(state_bundle_head(others, offer(TREE))))
    values = list(split_sequence(state_file()))
    with pytest.raises(DecodeError, match=r"no quorum|signed"):
        check_state(b"".join(join_sequence([values[0], foreign[1], *values[2:]])))
    unsigned = encode([[1, "test", 1, [["n0", KEYS[0].public_key, ["/memory/0"]]]], []])
    with pytest.raises(DecodeError, match="no valid signature"):
        check_state(b"".join(join_sequence([values[0], unsigned, *values[2:]])))


# ── an operation ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_acks_of_a_quorum_prove_an_operation_certified() -> None:
    """They may name the block itself or one behind it, each voter another."""
    acks = [ack(BLOCKS[0], 0), ack(BLOCKS[2], 1), ack(BLOCKS[3], 3)]
    found = check_op(bundle(BLOCKS, acks=acks, index=1))
    assert found.certified is not None
    assert found.certified.voters == (0, 1, 3)
    assert found.final is None
    assert found.op.verb == "node.advertised"
    assert (found.op.lane, found.op.seq, found.op.index) == (LANE, 1, 1)
    assert found.op.void == ""


def test_a_final_cut_behind_the_block_proves_it_final() -> None:
    """The cut may name a later block of the lane, and the certificate be for a later proposal."""
    one = proposal(cut=(head_of(BLOCKS[2]),))
    two = proposal(height=2, parent=one.hash)
    found = check_op(bundle(BLOCKS[1:3], final_=final(one, two, voters=(1, 2, 3))))
    assert found.final is not None
    assert (found.final_height, found.final.voters) == (1, (1, 2, 3))
    assert found.certified is None


def test_acks_of_a_later_committee_need_its_link() -> None:
    """Acks of epoch 1 are counted against the committee that the link leads to."""
    acks = [ack(BLOCKS[0], v, committee=NEXT) for v in range(3)]
    found = check_op(bundle(BLOCKS[:1], acks=acks), (link(),))
    assert found.certified is not None
    assert found.certified.committee == NEXT
    with pytest.raises(DecodeError, match="links lead to epoch 0"):
        check_op(bundle(BLOCKS[:1], acks=acks))


def _bad_bundles() -> dict[str, tuple[OpBundle, str]]:
    good = [ack(BLOCKS[1], v) for v in range(3)]
    gap = [BLOCKS[0], BLOCKS[2]]
    return {
        "nothing that proves": (bundle(BLOCKS[:2]), "neither acks nor"),
        "two acks": (bundle(BLOCKS[:2], acks=good[:2]), "acks of 2 voters"),
        "one voter twice": (bundle(BLOCKS[:2], acks=[good[0], good[1], good[1]]), "acks of 2 voters"),
        "another voter's signature": (
            bundle(BLOCKS[:2], acks=[*good[:2], ack(BLOCKS[1], 2, signer=KEYS[3])]),
            "not signed by it",
        ),
        "a voter who is none": (bundle(BLOCKS[:2], acks=[*good[:2], ack(BLOCKS[1], 0, committee=NEXT)]), "another epoch"),
        "acks of a block that is not there": (bundle(BLOCKS[:1], acks=good), "names none of the blocks"),
        "a gap in the chain": (bundle(gap, acks=[ack(BLOCKS[2], v) for v in range(3)]), "does not follow"),
        "another block first": (
            OpBundle(lane=LANE, seq=2, index=0, blocks=(BLOCKS[0].raw,), acks=tuple(good), final=b""),
            "another one",
        ),
        "no such operation": (bundle(BLOCKS[:2], acks=good, index=2), "has 2 operations"),
        "no blocks": (OpBundle(lane=LANE, seq=1, index=0, blocks=(), acks=tuple(good), final=b""), "0 blocks"),
        "too many blocks": (
            OpBundle(lane=LANE, seq=1, index=0, blocks=(BLOCKS[0].raw,) * (OP_BLOCK_COUNT_MAX + 1), acks=(), final=b""),
            "blocks, allowed",
        ),
        "a cut that names another block": (bundle(BLOCKS[:1], final_=covering(BLOCKS[1])), "names none of the blocks"),
        "a cut of 2f voters": (
            bundle(BLOCKS[:1], final_=final(proposal(cut=(head_of(BLOCKS[0]),)), voters=(0, 1))),
            "no quorum",
        ),
        "good acks beside a bad cut": (bundle(BLOCKS[:2], acks=good, final_=covering(BLOCKS[3])), "names none"),
    }


@pytest.mark.parametrize("name", _bad_bundles())
def test_a_bundle_that_does_not_hold_proves_nothing(name: str) -> None:
    """Each way in which a bundle can lie is told by its own words."""
    value, message = _bad_bundles()[name]
    with pytest.raises(DecodeError, match=message):
        check_op(value)


def test_the_authors_signature_is_checked() -> None:
    """A block that its lane's key did not sign is nobody's word, whoever acknowledged it."""
    raw = bytearray(BLOCKS[0].raw)
    raw[-1] ^= 1
    value = OpBundle(
        lane=LANE, seq=1, index=0, blocks=(bytes(raw),), acks=tuple(ack(BLOCKS[0], v) for v in range(3)), final=b""
    )
    with pytest.raises(DecodeError, match="signature"):
        check_op(value)


def test_the_good_bundle_of_these_tests_holds() -> None:
    """What the bad ones are changed from is accepted: so they are refused for their change."""
    found = check_op(bundle(BLOCKS[:2], acks=[ack(BLOCKS[1], v) for v in range(3)], final_=covering(BLOCKS[1])))
    assert found.certified is not None
    assert found.final is not None
    assert found.certified.committee == FOUNDERS
