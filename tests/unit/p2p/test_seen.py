"""Ids of messages seen lately."""

from __future__ import annotations

import pytest

from formation.p2p import seen
from formation.p2p.seen import Seen


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_an_id_is_remembered_for_its_time() -> None:
    """Counted from when it was seen first: who sends it again and again does not keep it here."""
    clock = Clock()
    ids = Seen(10, now_s=clock)
    assert ids.add(b"a")
    clock.now_s = 9
    assert not ids.add(b"a")
    assert ids.has(b"a")
    clock.now_s = 10
    assert not ids.has(b"a")
    assert ids.add(b"a")


def test_what_is_too_old_makes_way() -> None:
    """Without anybody's asking for it."""
    clock = Clock()
    ids = Seen(10, now_s=clock)
    for index in range(100):
        ids.add(b"old %d" % index)
    clock.now_s = 11
    for index in range(100):
        ids.add(b"new %d" % index)
    assert len(ids) == 100


def test_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten."""
    monkeypatch.setattr(seen, "SEEN_COUNT_MAX", 5)
    ids = Seen(10, now_s=Clock())
    for index in range(20):
        ids.add(b"%d" % index)
    assert len(ids) == 5
    assert ids.has(b"19")
    assert not ids.has(b"14")
    ids.stop()
