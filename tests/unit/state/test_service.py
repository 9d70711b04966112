from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from formation.core.clock import NS_PER_MS
from formation.core.errors import ConflictError, DeniedError, FormationError, NotFoundError, UnavailableError
from formation.core.event import (
    ClaimMade,
    CommitteeProposed,
    NodeAdvertised,
    Seat,
    VmClaimed,
    VmDeleted,
    VmDesired,
    VmReady,
    VmRequested,
    event_body,
)
from formation.core.intent import NONCE_SIZE_BYTES, Intent, SignedIntent, sign_intent
from formation.core.keys import KeyPair
from formation.core.manifest import Manifest, found_network
from formation.core.spec import Desired, Resources, VmPhase
from formation.p2p.loopback import LoopbackNetwork
from formation.p2p.service import P2pService
from formation.p2p.transport import TaskStatus
from formation.state import gossip, sync
from formation.state.effects import Tick, WakeAt
from formation.state.feed import Change, Level
from formation.state.gossip import TOPICS, topic_name
from formation.state.journal import RecordKindOf
from formation.state.service import StateService
from formation.state.store import MemoryDisk, MemoryStore

START_MS = 1_800_000_000_000
USER = KeyPair(b"u" * 32)
OTHER = KeyPair(b"o" * 32)


class TrioClock:
    def now_ns(self) -> int:
        return START_MS * NS_PER_MS + int(trio.current_time() * 1e9)


class Cluster:
    """Whole state services over the in-memory wire."""

    def __init__(self, count: int = 4, observers: int = 0) -> None:
        self.keys = [KeyPair(bytes([i + 1]) * 32) for i in range(count + observers)]
        voters = [(f"n{i}", key, (f"/memory/{key.node_id}",)) for i, key in enumerate(self.keys[:count])]
        self.manifest: Manifest = found_network("test", voters=voters, founded_ms=START_MS)
        self.network = LoopbackNetwork(7)
        self.disks = [MemoryDisk() for _ in self.keys]
        self.services: dict[int, StateService] = {}
        self.honest = {key.node_id for key in self.keys}
        """Who of them is correct; a test takes out whom it lets misbehave."""
        self._scopes: dict[int, trio.CancelScope] = {}
        self._ended: dict[int, trio.Event] = {}
        self._generation = 0

    async def start(self, nursery: trio.Nursery, *indices: int) -> None:
        for index in indices:
            await nursery.start(self._node, index)

    async def _node(self, index: int, *, task_status: TaskStatus[None]) -> None:
        self._generation += 1
        key = self.keys[index]
        known = {k.node_id: (f"/memory/{k.node_id}",) for k in self.keys if k is not key}
        is_voter = index < len(self.manifest.voters)
        linked = frozenset(v.node_id for v in self.manifest.voters) if is_voter else frozenset()
        transport = self.network.transport(key.node_id)
        p2p = P2pService(transport=transport, known_peers=known, linked=linked, rng=random.Random(index))
        service = StateService(
            manifest=self.manifest,
            key=key,
            store=MemoryStore(self.disks[index]),
            p2p=p2p,
            clock=TrioClock(),
            rng=random.Random(self._generation),
        )
        ended = trio.Event()
        try:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(p2p.run)
                    await nursery.start(service.run)
                    self.services[index], self._scopes[index], self._ended[index] = service, scope, ended
                    task_status.started(None)
        finally:
            ended.set()

    async def stop(self, index: int) -> None:
        self._scopes[index].cancel()
        self.network.kill(self.keys[index].node_id)
        # The store is closed in a thread, which takes no time on a mock clock: no sleep is long enough.
        await self._ended[index].wait()

    def wish(self, verb: str, body: bytes, object_id: str = "", *, key: KeyPair = USER) -> SignedIntent:
        now_ms = START_MS + int(trio.current_time() * 1000)
        intent = Intent(
            account=key.public_key,
            verb=verb,
            object_id=object_id,
            body=body,
            nonce=random.Random(now_ms).randbytes(NONCE_SIZE_BYTES),
            created_ms=now_ms,
            expires_ms=now_ms + 60_000,
            key=key.public_key,
        )
        return sign_intent(key.sign, intent, network_id=self.manifest.network_id)

    def create(self, name: str, *, key: KeyPair = USER) -> SignedIntent:
        event = VmRequested(name=name, image="sha256:" + "0" * 64, image_name="hello", vcpus=1, memory_mib=256, disk_gib=1)
        return self.wish(event.verb, event_body(event), key=key)


@asynccontextmanager
async def running(count: int = 4, observers: int = 0) -> AsyncIterator[tuple[Cluster, trio.Nursery]]:
    cluster = Cluster(count, observers)
    async with trio.open_nursery() as nursery:
        await cluster.start(nursery, *range(count + observers))
        yield cluster, nursery
        # Whatever a test did to them: correct nodes have nothing against each other.
        records = [score for service in cluster.services.values() for score in service._p2p.scores()]
        assert all(score.node_id not in cluster.honest for score in records), records
        nursery.cancel_scope.cancel()


def advertised(name: str) -> NodeAdvertised:
    capacity = Resources(vcpus=1, memory_mib=1, disk_gib=1)
    return NodeAdvertised(name=name, addresses=(), public_address="a", capacity=capacity, hypervisor="", version="1")


async def eventually(check: object, timeout_s: float = 30) -> None:
    assert callable(check)
    with trio.fail_after(timeout_s):
        while not check():  # noqa: ASYNC110 - reads what has no event
            await trio.sleep(0.05)


async def test_an_event_is_certified_and_read_everywhere(autojump_clock: trio.abc.Clock) -> None:
    """What one voter appends, each voter reads at the certified level."""
    async with running() as (cluster, _):
        service = cluster.services[0]
        with trio.fail_after(10):
            token = await service.append_event(advertised("n0"), cluster.keys[0].node_id)
            await service.wait_certified(token)
        await eventually(lambda: all(len(s.view.nodes()) == 1 for s in cluster.services.values()))
        assert service.status().has_quorum


async def test_wakes_that_are_due_together_do_not_end_the_node(autojump_clock: trio.testing.MockClock) -> None:
    """A second, earlier one comes when both are due already: the loop then waits for the next, and the node goes on."""
    async with running(1) as (cluster, _):
        service = cluster.services[0]
        await eventually(lambda: not service._wakes)
        now_ns = service._clock.now_ns()
        service._carry_out(WakeAt(now_ns + 50 * NS_PER_MS))
        await trio.sleep(0.001)
        autojump_clock.jump(0.1)
        service._carry_out(WakeAt(now_ns + 40 * NS_PER_MS))
        # No limit of time: the clock jumps while the store's thread works.
        await service.wait_certified(await service.append_event(advertised("n0"), cluster.keys[0].node_id))


async def test_a_vm_from_intent_to_ready(autojump_clock: trio.abc.Clock) -> None:
    """The claim winner's status is the VM's; another account can change nothing; a deleted VM stays deleted."""
    async with running() as (cluster, _):
        first, second = cluster.services[0], cluster.services[1]
        await first.wait_certified(await first.append_intent(cluster.create("web")))
        await eventually(lambda: len(second.view.vms()) == 1)
        vm = second.view.vms()[0]
        assert vm.owner == USER.account_id
        assert vm.status.phase is VmPhase.PENDING
        with trio.fail_after(10):
            await second.append_event(VmClaimed(why="fits", ttl_ms=60_000), vm.vm_id, level=Level.FINAL)
        with pytest.raises(ConflictError, match="held by"):
            await first.append_event(VmClaimed(why="fits too", ttl_ms=60_000), vm.vm_id, level=Level.FINAL)
        ready = VmReady(trace_id=vm.trace_id, generation=0, address="10.0.0.1", ports=(), boot_ms=900)
        await second.wait_certified(await second.append_event(ready, vm.vm_id))
        await eventually(lambda: any(v.status.phase is VmPhase.RUNNING for v in first.view.vms()))
        placement = first.view.vms()[0].placement
        assert placement is not None
        assert placement.node_id == cluster.keys[1].node_id
        with pytest.raises(ConflictError):
            await first.append_intent(cluster.create("web"))
        with pytest.raises(DeniedError):
            await first.append_intent(cluster.wish(VmDeleted.verb, event_body(VmDeleted()), vm.vm_id, key=OTHER))
        stop = VmDesired(desired=Desired.STOPPED, generation=1)
        await first.append_intent(cluster.wish(stop.verb, event_body(stop), vm.vm_id))
        deletion = cluster.wish(VmDeleted.verb, event_body(VmDeleted()), vm.vm_id)
        token = await first.append_intent(deletion, level=Level.FINAL)
        await second.wait_final(token)
        await eventually(lambda: second.view.vm_is_deleted(vm.vm_id))
        assert second.view.vms() == ()
        # Handed over again, here and at another node, by somebody who did not hear that it was taken.
        for service in (first, second):
            await service.wait_certified(await service.append_intent(deletion))
        with pytest.raises(NotFoundError):
            await first.append_intent(cluster.wish(VmDeleted.verb, event_body(VmDeleted()), vm.vm_id))


async def test_three_of_four_go_on_and_the_fourth_catches_up(autojump_clock: trio.abc.Clock) -> None:
    """A stopped voter does not hinder the others; restarted, it reads all it missed and keeps its positions."""
    async with running() as (cluster, nursery):
        node = cluster.services[3]
        await node.append_event(advertised("n3"), cluster.keys[3].node_id)
        await cluster.stop(3)
        first = cluster.services[0]
        for i in range(150):
            token = await first.append_event(advertised(f"n0-{i}"), cluster.keys[0].node_id)
        with trio.fail_after(30):
            await first.wait_certified(token)
        await cluster.start(nursery, 3)
        back = cluster.services[3]
        await eventually(lambda: (n := back.view.node(cluster.keys[0].node_id)) is not None and n.name == "n0-149")
        assert (await back.append_event(advertised("n3"), cluster.keys[3].node_id)).seq == 1


async def test_without_quorum_nothing_is_certified_until_it_heals(autojump_clock: trio.abc.Clock) -> None:
    """Two of four observe their own writes, certify nothing, and certify by themselves at heal."""
    async with running() as (cluster, _):
        ids = [key.node_id for key in cluster.keys]
        cluster.network.partition([ids[0], ids[1]], [ids[2], ids[3]])
        service = cluster.services[0]
        token = await service.append_event(advertised("lonely"), ids[0])
        with trio.move_on_after(5) as scope:
            await service.wait_certified(token)
        assert scope.cancelled_caught
        assert service.view.node(ids[0]) is None
        assert service.view.node(ids[0], Level.OBSERVED) is not None
        cluster.network.heal()
        with trio.fail_after(60):
            await service.wait_certified(token)


async def test_changes_resume_after_a_restart(autojump_clock: trio.abc.Clock) -> None:
    """Positions survive a restart: reading again from 0 gives the same changes at the same numbers."""
    async with running() as (cluster, nursery):

        async def read(count: int) -> list[tuple[int, str, str]]:
            rows: list[tuple[int, str, str]] = []
            async for change in cluster.services[0].changes(since=0):
                assert isinstance(change, Change)
                rows.append((change.position, change.level, change.verb))
                if len(rows) == count:
                    return rows
            raise AssertionError

        for i in range(3):
            token = await cluster.services[0].append_event(advertised(str(i)), cluster.keys[0].node_id)
        await cluster.services[0].wait_certified(token)
        await eventually(lambda: cluster.services[0].status().position >= 6)
        before = await read(6)
        await cluster.stop(0)
        await cluster.start(nursery, 0)
        assert await read(6) == before
        assert [row[0] for row in before] == [1, 2, 3, 4, 5, 6]


async def test_an_observer_reads_and_does_not_write(autojump_clock: trio.abc.Clock) -> None:
    """A node outside the committee converges, by gossip or by sync, and refuses writes."""
    async with running(observers=1) as (cluster, _):
        service, observer = cluster.services[0], cluster.services[4]
        await service.append_event(advertised("n0"), cluster.keys[0].node_id)
        await eventually(lambda: len(observer.view.nodes()) == 1)
        with pytest.raises(DeniedError):
            await observer.append_event(advertised("me"), cluster.keys[4].node_id)


async def test_claims_are_decided_once_and_everywhere_alike(autojump_clock: trio.abc.Clock) -> None:
    """Of four nodes that want one key at once, one gets it, and all read the same holder and fence."""
    async with running() as (cluster, _):
        outcomes: list[str] = []

        async def want(index: int) -> None:
            try:
                await cluster.services[index].append_event(ClaimMade(ttl_ms=0), "address/10.0.0.1", level=Level.FINAL)
                outcomes.append("granted")
            except ConflictError as exc:
                outcomes.append(exc.message.split()[0])

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for index in range(4):
                    nursery.start_soon(want, index)
        assert sorted(outcomes) == ["granted", "held", "held", "held"]
        await eventually(lambda: len({s.view.lease("address", "10.0.0.1") for s in cluster.services.values()}) == 1)


async def test_writes_that_wait_end_when_the_spine_closes_their_lane(autojump_clock: trio.abc.Clock) -> None:
    """Whoever waits is told to try again; the next lane's numbers are not mistaken for theirs."""
    async with running() as (cluster, nursery):
        service = cluster.services[0]
        ids = [key.node_id for key in cluster.keys]
        await service.append_event(advertised("n0"), ids[0], level=Level.FINAL)
        cluster.network.partition([ids[0]], ids[1:])
        outcome: list[str] = []

        async def write() -> None:
            try:
                await service.append_event(advertised("cut off"), ids[0], level=Level.CERTIFIED)
                outcome.append("certified")
            except UnavailableError:
                outcome.append("try again")

        nursery.start_soon(write)
        await trio.sleep(1)
        lane = service.replica.own_lane
        assert lane is not None
        service.replica._close_lane(lane)
        service._handle(Tick())
        service.replica._own_final.append((1, ("",)))
        service._handle(Tick())
        await eventually(lambda: outcome == ["try again"])
        assert service.replica.own_lane not in (None, lane)


async def test_a_newcomer_begins_with_a_snapshot_and_the_committee_grows(autojump_clock: trio.abc.Clock) -> None:
    """Seven nodes of which four vote: late ones join by a checkpoint; by the word of three, seven vote; two may be lost."""
    cluster = Cluster(4, observers=3)
    async with trio.open_nursery() as nursery:
        await cluster.start(nursery, 0, 1, 2)
        first = cluster.services[0]
        for number in range(40):
            await first.append_event(advertised(f"n0-{number}"), cluster.keys[0].node_id, level=Level.CERTIFIED)
            await trio.sleep(3)
        await eventually(lambda: first.status().checkpoint_height > 0)
        await cluster.start(nursery, 3, 4, 5, 6)
        late = cluster.services[6]
        await eventually(lambda: late.status().height >= first.status().height, timeout_s=60)
        node = late.view.node(cluster.keys[0].node_id)
        assert node is not None
        assert node.name == "n0-39"
        seats = tuple(Seat(f"n{i}", key.public_key, (f"/memory/{key.node_id}",)) for i, key in enumerate(cluster.keys))
        for index in range(3):
            await cluster.services[index].append_event(CommitteeProposed(voters=seats), "epoch/1", level=Level.FINAL)
        await eventually(lambda: all(s.status().epoch == 1 for s in cluster.services.values()), timeout_s=60)
        assert len(first.status().voters) == 7
        await cluster.stop(1)
        await cluster.stop(2)
        with trio.fail_after(60):
            await late.append_event(advertised("new voter"), cluster.keys[6].node_id, level=Level.FINAL)
        nursery.cancel_scope.cancel()


async def test_what_our_own_ack_certified_is_certified_after_a_restart(autojump_clock: trio.abc.Clock) -> None:
    """In a network of one the ack is on disk before the certificate is noted: an end between the two loses nothing."""
    async with running(count=1) as (cluster, nursery):
        service = cluster.services[0]
        await service.append_event(advertised("n0"), cluster.keys[0].node_id)
        disk = cluster.disks[0]
        await cluster.stop(0)
        # Up to and with our ack, as after a kill right behind that commit.
        last_ack = max(at for at, record in enumerate(disk.journal) if record.kind == RecordKindOf.ACK)
        del disk.journal[last_ack + 1 :]
        await cluster.start(nursery, 0)
        await eventually(lambda: len(cluster.services[0].view.nodes(Level.CERTIFIED)) == 1)


async def test_offences_are_told_to_the_network(autojump_clock: trio.testing.MockClock) -> None:
    """What the replica calls a fault, requests that are none, and floods, once a second; a voter is never banned for it."""
    async with running(4, observers=1) as (cluster, _):
        service, other, observer = cluster.services[0], cluster.keys[1].node_id, cluster.services[4]
        cluster.honest -= {other, observer._node_id}
        p2p = service._p2p
        for count in range(20):
            service._take_frame(other, b"\xff not a frame")
            assert p2p.score_of(other).offence_count == count + 1
        assert p2p.score_of(other).last_offence == "rejected"
        assert p2p.score_of(other).refusal is None
        with pytest.raises(FormationError):
            await observer._p2p.request(service._node_id, sync.PROTOCOL, b"\xff", response_size_max_bytes=1000)
        assert p2p.score_of(observer._node_id).last_offence == "malformed"
        before = p2p.score_of(other).offence_count
        now_ns = service._clock.now_ns()
        while service._limits.admits(other, size_bytes=1 << 20, now_ns=now_ns):
            pass
        for _ in range(100):
            service._take_frame(other, bytes(1 << 20))
        assert p2p.score_of(other).offence_count == before + 1
        assert p2p.score_of(other).last_offence == "flood"


async def test_rubbish_on_a_topic_is_its_authors(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever it is; but a well-formed message of somebody who does not vote here is no offence: he may elsewhere."""
    async with running(4, observers=2) as (cluster, _):
        one, two = cluster.services[4], cluster.services[5]
        cluster.honest.discard(one._node_id)
        topic = topic_name(cluster.manifest.network_id, TOPICS[0])
        await trio.sleep(5)
        await one._p2p.publish_event(topic, gossip.pack_frames((b"frame",)))
        await trio.sleep(1)
        assert two._p2p.scores() == ()
        await one._p2p.publish_event(topic, b"\xff rubbish")
        await trio.sleep(1)
        assert [(s.node_id, s.last_offence) for s in two._p2p.scores()] == [(one._node_id, "rejected")]
