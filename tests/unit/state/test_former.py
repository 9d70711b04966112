"""What is kept of an epoch that has ended: for voters that missed it, for proofs, and across restarts."""

from __future__ import annotations

import pytest

from formation.core.event import CommitteeProposed, NodeAdmitted, Topic
from formation.state import former as former_module
from formation.state import replica as replica_module
from formation.state import sync
from formation.state.catchup import answer_from_memory
from formation.state.effects import Commit, Effect, SpineReceived, Stage
from formation.state.final_chain import final_chain_holds, parse_final_chain
from formation.state.former import FORMER_EPOCH_COUNT_MAX, FormerEpoch
from formation.state.journal import RecordKindOf
from formation.state.lookup import OpRef, proofs_of
from formation.state.op import event_op
from formation.state.replica import Replica
from formation.state.store import MemoryDisk, MemoryStore
from tests.fuzz.network import Network
from tests.unit.state.replicas import KEYS, NETWORK_ID, make_replica, node_id, seats, verify


class Stored(Network):
    """The same network, whose replicas have disks."""

    def __init__(self) -> None:
        self.stores = [MemoryStore(MemoryDisk()) for _ in range(4)]
        for store in self.stores:
            store.open(NETWORK_ID)
        super().__init__()

    def _do(self, index: int, effect: Effect) -> None:
        if isinstance(effect, Stage):
            self.stores[index].stage(effect.height, effect.buckets)
        if isinstance(effect, Commit):
            if effect.checkpoint is None:
                self.stores[index].commit(effect.records)
            else:
                self.stores[index].checkpoint(effect.checkpoint.meta, {}, effect.records, staged=effect.checkpoint.height)
        super()._do(index, effect)

    def restarted(self, index: int) -> Replica:
        """The replica that a new process would make of the disk."""
        replica = Replica(self.replicas[index]._config, sign=lambda _: bytes(64), verify=verify)
        loaded = self.stores[index].load()
        base_count = replica.recover_checkpoint(loaded.meta, loaded.buckets)
        for number, record in enumerate(loaded.records):
            replica.recover(record, is_repeat=number < base_count)
        replica.finish_recovery()
        return replica


def own_ref(replica: Replica) -> OpRef:
    own = replica.own_lane
    assert own is not None
    return OpRef(own, replica.own_head_seq, 0)


def change_committee(network: Network) -> None:
    """The fourth seat goes to another."""
    change = event_op(CommitteeProposed(voters=(*seats(3), seats(5)[4])), "epoch/1")
    for index in range(3):
        network.submit(index, Topic.COMMITTEE, change)
    network.step(10)
    assert network.replicas[0].state.committee.committee.epoch == 1


def proven_height(replica: Replica, ref: OpRef) -> int:
    """The height at which a final cut that is found here proves an operation; its signatures are checked."""
    proofs = proofs_of(replica, ref)
    proven = parse_final_chain(proofs.final)
    committee = replica.committee_of(proven.epoch)
    assert final_chain_holds(verify, committee, proven, network_id=NETWORK_ID)
    assert proofs.final_seq >= ref.seq
    return proven.first.proposal.height


def admit_many(network: Network, count: int) -> None:
    """So many heights."""
    for number in range(count):
        network.submit(number % 3, Topic.COMMITTEE, event_op(NodeAdmitted(), node_id(5)))
        network.step(2)


def test_any_final_operation_of_the_log_is_proven_after_a_restart() -> None:
    """Acks of others are gone; the cut, the certificate and the hashes between are not, however many heights ago."""
    network = Stored()
    network.submit(0, Topic.COMMITTEE, event_op(NodeAdmitted(), node_id(5)))
    network.step(2)
    ref = own_ref(network.replicas[0])
    height = network.replicas[0].state.height
    admit_many(network, 150)
    assert network.replicas[0].state.height > height + 128
    for replica in (network.replicas[0], network.restarted(0), network.restarted(1)):
        assert proven_height(replica, ref) == height
    assert proofs_of(network.restarted(1), ref).acks == ()


def test_an_operation_of_the_epoch_before_is_proven_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """While its block is in the log: by the former committee, before and after a restart."""
    network = Stored()
    network.submit(0, Topic.COMMITTEE, event_op(NodeAdmitted(), node_id(5)))
    network.step(2)
    ref = own_ref(network.replicas[0])
    height = network.replicas[0].state.height
    # Nobody agrees on a checkpoint meanwhile, so the journal does not begin anew.
    monkeypatch.setattr(replica_module, "stagger_ns", lambda voter: 1 << 60)
    change_committee(network)
    for replica in (network.replicas[0], network.restarted(0)):
        assert replica.spine.epoch == 1
        assert proven_height(replica, ref) == height
        assert replica.committee_of(0).voters == KEYS[:4]
        assert replica.committee_of(1).voters[3] == KEYS[4]


def test_a_voter_that_missed_the_handover_gets_it_from_peers_that_restarted_after_it() -> None:
    """The end of an epoch outlives the checkpoint that follows it, and the process."""
    network = Stored()
    network.submit(0, Topic.COMMITTEE, event_op(NodeAdmitted(), node_id(5)))
    network.step(2)
    change_committee(network)
    network.step(200)
    peer = network.restarted(0)
    assert peer.checkpoint_head is not None, "the journal has begun anew in the new epoch"
    assert peer.spine.epoch == 1
    former = peer.former_epoch(0)
    assert former is not None
    # Who has all blocks, and stands at the height before the handover.
    height = former.final_height - 1
    assert former.reaches(height)
    answer = answer_from_memory(peer, sync.SpinePull(0, 1, height))
    assert isinstance(answer, sync.SpinePulled)
    assert not answer.is_forgotten
    assert answer.frames
    late = make_replica(3)
    assert former.reaches(0), "of so short an epoch all is kept"
    whole = answer_from_memory(peer, sync.SpinePull(0, 1, 0))
    assert isinstance(whole, sync.SpinePulled)
    late.handle(SpineReceived(node_id(0), whole.frames), network.now_ns)
    assert late.spine.is_ended, "it knows that the epoch is over"
    forgotten = answer_from_memory(peer, sync.SpinePull(7, 0, 0))
    assert isinstance(forgotten, sync.SpinePulled)
    assert not forgotten.is_forgotten, "nothing is known of an epoch to come"


def test_an_epochs_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many heights, so many bytes, but never less than what proves its last height; and so many epochs."""
    network = Stored()
    admit_many(network, 12)
    change_committee(network)
    (former,) = network.replicas[0].former_epochs
    last = former.final_height
    assert FormerEpoch.load(former.dump()).dump() == former.dump()
    monkeypatch.setattr(former_module, "END_HEIGHT_COUNT", 4)
    short = FormerEpoch.load(former.dump())
    assert short.lowest_height > last - 6
    assert short.reaches(last - 2)
    assert not short.reaches(last - 8)
    assert short.final_frames(height=last - 8, size_max_bytes=1 << 20) == ()
    assert short.final_frames(height=last, size_max_bytes=1 << 20) == ()
    monkeypatch.setattr(former_module, "END_SIZE_BYTES", 1)
    tiny = FormerEpoch.load(former.dump())
    assert tiny.reaches(last - 1)
    assert tiny.final_frames(height=last - 1, size_max_bytes=0)
    former.trim()
    assert former.dump() == tiny.dump()
    replica = network.replicas[0]
    for epoch in range(1, 9):
        replica._put_former(FormerEpoch(epoch, final_height=epoch, kept=()))
    assert [each.epoch for each in replica.former_epochs] == list(range(9 - FORMER_EPOCH_COUNT_MAX, 9))
    assert FormerEpoch(1, final_height=3, kept=()).lowest_height == 4


def test_a_journal_that_begins_anew_begins_with_the_end_of_the_epoch_before() -> None:
    """One record per former epoch."""
    network = Stored()
    change_committee(network)
    kinds = [record.kind for record in network.replicas[0]._base_records()]
    assert kinds.count(RecordKindOf.FORMER) == 1
