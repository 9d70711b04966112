from __future__ import annotations

from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.kad_table import (
    FAILURE_COUNT_MAX,
    GROUP_BUCKET_COUNT_MAX,
    GROUP_TABLE_COUNT_MAX,
    STALE_AFTER_S,
    RoutingTable,
    as_told,
    group_of_address,
    is_counted,
)
from formation.p2p.kad_wire import K, place_of_node

OWN = KeyPair(b"o" * 32).node_id
IDS = [KeyPair(index.to_bytes(32, "big")).node_id for index in range(1, 800)]


def place(node_id: NodeId) -> int:
    found = place_of_node(node_id)
    assert found is not None
    return found


TABLE = RoutingTable(OWN)
FAR = [node_id for node_id in IDS if TABLE.bucket_of(place(node_id)) == 0]
NEAR = [node_id for node_id in IDS if TABLE.bucket_of(place(node_id)) == 1]


def public(n: int) -> str:
    return f"/ip4/9.{n // 250}.{n % 250}.1/tcp/1"


def lan(n: int) -> str:
    return f"/ip4/192.168.1.{n % 250 + 1}/tcp/1"


def filled(address_of: object = public, count: int = K) -> RoutingTable:
    table = RoutingTable(OWN)
    for n, node_id in enumerate(FAR[:count]):
        address = public(n) if address_of is public else lan(n)
        assert table.add(node_id, (address,), seen_at=address, now_s=float(n))[0]
    return table


def test_the_nearest_come_first() -> None:
    """By XOR; and a peer that is seen again is not there twice."""
    table = filled()
    table.add(NEAR[0], (), seen_at="", now_s=1)
    table.add(NEAR[0], (lan(1),), seen_at="", now_s=2)
    closest = table.closest(place(OWN), count_max=5)
    assert closest[0].node_id == NEAR[0]
    assert closest[0].addresses == (lan(1),)
    assert as_told(closest[0]).addresses == (lan(1),)
    assert [c.place ^ place(OWN) for c in closest] == sorted(c.place ^ place(OWN) for c in closest)
    assert len(table) == K + 1
    assert NEAR[0] in table


def test_who_has_been_there_stays_if_it_lives() -> None:
    """A full bucket names the one unseen for longest; the newcomer gets its place only when that is gone."""
    table = filled()
    table.seen(FAR[0], now_s=100)
    has_place, doubtful = table.add(FAR[K], (), seen_at=public(K), now_s=101)
    assert not has_place
    assert doubtful is not None
    assert doubtful.node_id == FAR[1]
    for _ in range(FAILURE_COUNT_MAX - 1):
        assert not table.failed(FAR[1])
    table.seen(FAR[2], now_s=102)
    assert table.failed(FAR[1])
    assert not table.failed(FAR[1])
    assert table.add(FAR[K], (), seen_at=public(K), now_s=103) == (True, None)


def test_one_public_network_gets_its_share_only() -> None:
    """Of a bucket and of the table, whatever the number of its identities; a LAN is one network and has no such limit."""
    table = RoutingTable(OWN)
    for node_id in IDS:
        table.add(node_id, (public(1),), seen_at="/ip4/9.9.9.9/tcp/5", now_s=0)
    per_bucket = [table.bucket_of(c.place) for c in table.contacts()]
    assert max(per_bucket.count(b) for b in per_bucket) == GROUP_BUCKET_COUNT_MAX
    assert len(table) <= GROUP_TABLE_COUNT_MAX
    assert len(filled(lan)) == K


def test_a_newcomer_from_elsewhere_displaces_the_newest_of_the_largest_network() -> None:
    """A LAN's flood does not keep others out; and it displaces nobody who is alone in his network."""
    table = filled(lan)
    assert table.add(FAR[K], (), seen_at=public(1), now_s=50) == (True, None)
    assert FAR[K - 1] not in table
    full = filled()
    assert not full.add(FAR[K], (), seen_at=lan(1), now_s=50)[0]


def test_pinned_peers_get_in_and_stay() -> None:
    """However full it is; among pinned ones only there is no place left."""
    table = filled()
    for node_id in FAR[K : 2 * K]:
        assert table.add(node_id, (), seen_at="/ip4/9.9.9.9/tcp/1", now_s=1, is_pinned=True)[0]
    assert {c.node_id for c in table.contacts()} == set(FAR[K : 2 * K])
    assert table.add(FAR[2 * K], (), seen_at="", now_s=2, is_pinned=True) == (False, None)


def test_who_has_no_place_gets_none() -> None:
    """Ourselves, and what is no id; a table without an own id stays empty."""
    table = RoutingTable(OWN)
    assert table.add(OWN, (), seen_at="", now_s=0) == (False, None)
    assert table.add(NodeId("a"), (), seen_at="", now_s=0) == (False, None)
    odd = RoutingTable(NodeId("a"))
    assert odd.add(IDS[0], (), seen_at="", now_s=0) == (False, None)
    odd.touch(1, now_s=0)
    table.seen(IDS[0], now_s=0)
    table.remove(IDS[0])
    assert not table.failed(IDS[0])


def test_buckets_go_stale() -> None:
    """Unless a look-up went through; an empty one is none."""
    table = filled(count=2)
    table.add(NEAR[0], (), seen_at="", now_s=0)
    assert table.stale_buckets(now_s=STALE_AFTER_S - 1) == ()
    assert table.stale_buckets(now_s=STALE_AFTER_S) == (0, 1)
    table.touch(place(FAR[0]), now_s=STALE_AFTER_S)
    assert table.stale_buckets(now_s=STALE_AFTER_S) == (1,)
    table.remove(NEAR[0])
    assert table.stale_buckets(now_s=STALE_AFTER_S) == ()


def test_groups() -> None:
    """Public ones are counted."""
    assert group_of_address("/ip4/9.9.9.9/tcp/1") == group_of_address("/ip4/9.9.9.200/tcp/2")
    assert is_counted(group_of_address("/dns4/a.example.org/tcp/1"))
    for address in ("/ip4/10.0.0.1/tcp/1", "/memory/a", "", "/ip4/9.9.9.9/udp/1"):
        assert not is_counted(group_of_address(address))
