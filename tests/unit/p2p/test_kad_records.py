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
    OwnKeys,
    ProviderStore,
)
from formation.p2p.kad_wire import Told

IDS = [node_id_of(index.to_bytes(32, "big")) for index in range(1, 100)]


def told(node_id: NodeId) -> Told:
    return Told(node_id=node_id, addresses=())


def test_records_run_out() -> None:
    """Unless they are said again; the latest come first."""
    store = ProviderStore()
    assert store.add(b"k", told(IDS[0]), group="a", now_s=0)
    assert store.add(b"k", told(IDS[1]), group="a", now_s=1)
    assert [t.node_id for t in store.get(b"k", now_s=2, count_max=9)] == [IDS[1], IDS[0]]
    store.add(b"k", told(IDS[0]), group="a", now_s=5)
    assert [t.node_id for t in store.get(b"k", now_s=1 + RECORD_TTL_S, count_max=9)] == [IDS[0]]
    assert store.get(b"k", now_s=5 + RECORD_TTL_S, count_max=9) == ()
    assert len(store) == 0
    assert store._keys == {}


def test_a_full_key_makes_room_for_other_networks_only() -> None:
    """A flood from one network displaces itself."""
    store = ProviderStore()
    for node_id in IDS[: PER_KEY_COUNT_MAX + 5]:
        store.add(b"k", told(node_id), group="flood", now_s=0)
    assert len(store) == PER_KEY_COUNT_MAX
    assert store.add(b"k", told(IDS[60]), group="elsewhere", now_s=0)
    assert not store.add(b"k", told(IDS[61]), group="flood", now_s=0)
    assert len(store) == PER_KEY_COUNT_MAX
    assert IDS[60] in {t.node_id for t in store.get(b"k", now_s=0, count_max=99)}


def test_one_provider_has_its_share_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """And when the store is full, whoever has most makes room."""
    store = ProviderStore()
    for n in range(PER_PROVIDER_COUNT_MAX + 10):
        store.add(b"%d" % n, told(IDS[0]), group="a", now_s=0)
    assert len(store) == PER_PROVIDER_COUNT_MAX
    monkeypatch.setattr(kad_records, "RECORD_COUNT_MAX", PER_PROVIDER_COUNT_MAX)
    assert store.add(b"other", told(IDS[1]), group="a", now_s=0)
    assert len(store) == PER_PROVIDER_COUNT_MAX
    store.forget(IDS[0])
    assert len(store) == 1
    monkeypatch.setattr(kad_records, "RECORD_COUNT_MAX", 1)
    assert not store.add(b"another", told(IDS[2]), group="a", now_s=0)
    assert store.add(b"another", told(IDS[2]), group="a", now_s=RECORD_TTL_S)
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
