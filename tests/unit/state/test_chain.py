"""One lane, forked: what a quorum acknowledged of it, on whatever branch its acks stand."""

from __future__ import annotations

from formation.core.ids import NetworkId
from formation.state.chain import Lane
from formation.state.lane import NO_HASH, Block, Entry, Head, LaneId, SpineRef, lane_id, make_incarnation, sign_block
from tests.unit.state.replicas import KEYS, NETWORK_ID, NOW_MS, OP, signer

LANE = LaneId(lane_id(KEYS[3], make_incarnation(5 << 16, 7)))


def block(seq: int, prev: bytes, *, branch: int = 0) -> Entry:
    fields = Block(
        lane=LANE,
        seq=seq,
        prev=prev,
        hlc=(NOW_MS + seq << 16) + branch,
        spine_ref=SpineRef(0, NetworkId(NETWORK_ID)),
        deps=(),
        kind="vm",
        ops=(OP,),
    )
    return sign_block(signer(KEYS[3]), fields, network_id=NETWORK_ID)


def head(entry: Entry) -> Head:
    return Head(LANE, entry.block.seq, entry.hash)


def forked() -> tuple[Lane, list[Entry], Entry]:
    """A lane whose third block is there twice: (lane, our chain, the other third)."""
    first = block(1, NO_HASH)
    second = block(2, first.hash)
    ours, other = block(3, second.hash), block(3, second.hash, branch=1)
    lane = Lane(LANE, voter_count=4, quorum_size=3)
    for entry in (first, second, ours):
        lane.append(entry)
    lane.put_side(other)
    return lane, [first, second, ours], other


def test_acks_on_both_branches_certify_what_the_branches_share() -> None:
    """Else a lane that depends on it could wait for ever: the older acks are nowhere any more."""
    lane, chain, other = forked()
    lane.put_ack(0, head(chain[2]), b"a")
    lane.put_ack(1, head(chain[2]), b"b")
    lane.put_ack(2, head(other), b"c")
    assert lane.adopt_nowait() == ((), ())
    assert lane.certify_nowait() == tuple(chain[:2])
    assert dict(lane.tally.proof(2)) == {0: b"a", 1: b"b", 2: b"c"}


def test_no_branch_is_certified_by_acks_of_another() -> None:
    """Two voters here and two there: neither third block has a quorum; three on the other branch take it over."""
    lane, chain, other = forked()
    for voter, at in enumerate((chain[2], chain[2], other, other)):
        lane.put_ack(voter, head(at), b"x")
    lane.adopt_nowait()
    assert lane.certify_nowait() == tuple(chain[:2])
    assert lane.certified_seq == 2
    lane, chain, other = forked()
    for voter, at in enumerate((chain[2], other, other, other)):
        lane.put_ack(voter, head(at), b"x")
    assert lane.adopt_nowait() == ((chain[2],), (other,))
    assert lane.certify_nowait() == (chain[0], chain[1], other)
