from __future__ import annotations

import pytest

from formation.core.ids import NodeId, node_id_of
from formation.p2p import kad_records
from formation.p2p.kad_records import (
    OWN_KEY_COUNT_MAX,
    PER_KEY_COUNT_MAX,
    PER_PROVIDER_COUNT_MAX,
    RECORD_TTL_S,
    REPROVIDE_FIRST_S,
    REPROVIDE_INTERVAL_S,
    SWEEP_INTERVAL_S,
    OwnKeys,
    ProviderStore,
    ProviderTally,
)
from formation.p2p.kad_wire import Told

IDS = [node_id_of(index.to_bytes(32, "big")) for index in range(1, 100)]


def told(node_id: NodeId) -> Told:
    return Told(node_id=node_id, addresses=())


def test_records_run_out() -> None:
    """Unless they are said again, which gives nobody a better place."""
    store = ProviderStore()
    assert store.add(b"k", told(IDS[0]), network="a", host="h", now_s=0)
    assert store.add(b"k", told(IDS[1]), network="a", host="h", now_s=1)
    assert [t.node_id for t in store.get(b"k", now_s=2, count_max=9)] == [IDS[0], IDS[1]]
    store.add(b"k", told(IDS[0]), network="a", host="h", now_s=5)
    assert [t.node_id for t in store.get(b"k", now_s=1 + RECORD_TTL_S, count_max=9)] == [IDS[0]]
    assert store.get(b"k", now_s=5 + RECORD_TTL_S, count_max=9) == ()
    assert len(store) == 0
    assert store._keys == {}


def test_a_full_key_makes_room_for_other_networks_only() -> None:
    """A flood from one network displaces itself."""
    store = ProviderStore()
    for node_id in IDS[: PER_KEY_COUNT_MAX + 5]:
        store.add(b"k", told(node_id), network="flood", host="h", now_s=0)
    assert len(store) == PER_KEY_COUNT_MAX
    assert store.add(b"k", told(IDS[60]), network="elsewhere", host="h", now_s=0)
    assert not store.add(b"k", told(IDS[61]), network="flood", host="h", now_s=0)
    assert len(store) == PER_KEY_COUNT_MAX
    assert IDS[60] in {t.node_id for t in store.get(b"k", now_s=0, count_max=99)}


def test_one_provider_has_its_share_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """And when the store is full, whoever has most makes room."""
    store = ProviderStore()
    for n in range(PER_PROVIDER_COUNT_MAX + 10):
        store.add(b"%d" % n, told(IDS[0]), network="a", host="h", now_s=0)
    assert len(store) == PER_PROVIDER_COUNT_MAX
    monkeypatch.setattr(kad_records, "RECORD_COUNT_MAX", PER_PROVIDER_COUNT_MAX)
    assert store.add(b"other", told(IDS[1]), network="a", host="h", now_s=0)
    assert len(store) == PER_PROVIDER_COUNT_MAX
    store.forget(IDS[0])
    assert len(store) == 1
    monkeypatch.setattr(kad_records, "RECORD_COUNT_MAX", 1)
    assert not store.add(b"another", told(IDS[2]), network="a", host="h", now_s=0)
    assert store.add(b"another", told(IDS[2]), network="a", host="h", now_s=RECORD_TTL_S)
    assert set(store._keys) == {b"another"}


def test_own_keys_are_said_again_ever_later() -> None:
    """Soon at first, because a network grows; soon again when it has changed."""
    keys, now_s, waits = OwnKeys(), 0.0, []
    keys.add(b"k", now_s=0)
    keys.add(b"k", now_s=5)
    for _ in range(14):
        assert keys.take_due(now_s=now_s, jitter=1.0) == b"k"
        assert keys.take_due(now_s=now_s, jitter=1.0) is None
        waits.append(keys.next_at_s() - now_s)
        now_s = keys.next_at_s()
    assert waits[0] == REPROVIDE_FIRST_S
    assert waits[-1] == REPROVIDE_INTERVAL_S < RECORD_TTL_S / 2
    keys.take_due(now_s=now_s, jitter=0.0)
    keys.again(now_s=now_s)
    assert keys.next_at_s() == now_s + REPROVIDE_FIRST_S
    keys.remove(b"k")
    keys.remove(b"k")
    assert keys.next_at_s() == float("inf")
    for n in range(OWN_KEY_COUNT_MAX + 3):
        keys.add(b"%d" % n, now_s=0)
    assert len(keys) == OWN_KEY_COUNT_MAX
    assert b"0" not in keys


def test_a_flood_from_one_host_displaces_itself() -> None:
    """In one network, too, as on a LAN: another host has room, and another identity of the same host has not."""
    store = ProviderStore()
    for node_id in IDS[:PER_KEY_COUNT_MAX]:
        assert store.add(b"k", told(node_id), network="lan", host="flood", now_s=0)
    assert not store.add(b"k", told(IDS[70]), network="lan", host="flood", now_s=0)
    assert store.add(b"k", told(IDS[71]), network="lan", host="other", now_s=0)
    named = store.get(b"k", now_s=0, count_max=2)
    assert [t.node_id for t in named] == [IDS[0], IDS[71]]


def test_a_full_store_has_room_for_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each of a flood's identities says one thing only; what has run out is looked for once a minute."""
    monkeypatch.setattr(kad_records, "RECORD_COUNT_MAX", 20)
    store = ProviderStore()
    for n, node_id in enumerate(IDS[:25]):
        store.add(b"%d" % n, told(node_id), network="flood", host=str(n), now_s=0)
    assert len(store) == 20
    assert store.add(b"mine", told(IDS[70]), network="elsewhere", host="h", now_s=0)
    assert len(store) == 20
    assert not store.add(b"27", told(IDS[71]), network="flood", host="x", now_s=SWEEP_INTERVAL_S)
    assert store.add(b"28", told(IDS[72]), network="flood", host="x", now_s=RECORD_TTL_S)


def test_who_says_it_oftener_is_not_told_of_first() -> None:
    """Those that were there first, and of each network in turn."""
    store = ProviderStore()
    for n, node_id in enumerate(IDS[:6]):
        store.add(b"k", told(node_id), network="a" if n < 5 else "b", host="h", now_s=n)
    store.add(b"k", told(IDS[4]), network="a", host="h", now_s=100)
    assert [t.node_id for t in store.get(b"k", now_s=100, count_max=3)] == [IDS[0], IDS[5], IDS[1]]


def test_many_names_of_one_liar_come_last() -> None:
    """Behind what two name; and his second behind everybody's first."""
    tally = ProviderTally(IDS[0])
    where = [Told(node_id=IDS[2], addresses=(address,)) for address in ("/ip4/9.9.9.1/tcp/1", "/ip4/9.9.9.2/tcp/1")]
    tally.hear("liar", [told(IDS[0]), *map(told, IDS[50:70]), told(IDS[2])])
    tally.hear("a", [where[0], told(IDS[1])])
    tally.hear("b", [where[1], told(IDS[1])])
    tally.hear("b", [where[1], told(IDS[1])])
    tally.hear("c", [where[1], told(IDS[3])])
    best = tally.best(count_max=5, shuffle=lambda names: names.reverse())
    assert best[0] == Told(node_id=IDS[2], addresses=("/ip4/9.9.9.2/tcp/1", "/ip4/9.9.9.1/tcp/1"))
    assert [t.node_id for t in best[1:]][:1] == [IDS[1]]
    assert {t.node_id for t in best[2:4]} == {IDS[3], IDS[50]}
