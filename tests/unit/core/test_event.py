from __future__ import annotations

import pytest

from formation.core.errors import DecodeError
from formation.core.event import (
    BODY_SIZE_MAX_BYTES,
    EVENT_BY_VERB,
    EVENT_TYPES,
    Effect,
    Event,
    HolderEvent,
    ImageBuilt,
    VmDeleted,
    VmDesired,
    VmRequested,
    Writer,
    event_body,
    event_fields,
    parse_event,
)
from formation.core.spec import Desired, PortMap, Resources


def test_an_event_comes_back() -> None:
    """parse_event undoes event_body."""
    event = ImageBuilt(
        name="hello", size_bytes=1, built_by="n", resources=Resources(vcpus=1, memory_mib=2, disk_gib=3), expose=((80, "tcp"),)
    )
    assert parse_event("image.built", event_body(event)) == event


def test_an_event_without_fields_is_an_empty_map() -> None:
    """Its body is one byte."""
    assert event_body(VmDeleted()) == b"\xa0"
    assert parse_event("vm.deleted", b"\xa0") == VmDeleted()


@pytest.mark.parametrize("verb", ["", "vm.exploded", "VM.DELETED", "vm.deleted\n", "x" * 10_000])
def test_an_unknown_verb_is_refused_shortly(verb: str) -> None:
    """The error quotes no more than the beginning."""
    with pytest.raises(DecodeError, match=r"^unknown verb ") as caught:
        parse_event(verb, b"\xa0")
    assert len(caught.value.message) < 80


def test_a_large_body_is_refused_unread() -> None:
    """A record field that needs more belongs into a blob."""
    with pytest.raises(DecodeError, match=rf"^vm.deleted: body of {BODY_SIZE_MAX_BYTES + 1} bytes, the limit is"):
        parse_event("vm.deleted", bytes(BODY_SIZE_MAX_BYTES + 1))


@pytest.mark.parametrize("body", [b"", b"\x80", b"\xa0\x00", bytes.fromhex("a1616100"), b"\xf6"])
def test_another_events_fields_are_refused(body: bytes) -> None:
    """The error names the verb."""
    with pytest.raises(DecodeError, match=r"^vm\.deleted: "):
        parse_event("vm.deleted", body)


def test_fields_are_plain_values() -> None:
    """One register each: enums as texts, structs as lists and maps, tuples as they are."""
    event = VmRequested(
        name="web",
        image="i",
        image_name="n",
        vcpus=1,
        memory_mib=2,
        disk_gib=3,
        publish=(PortMap(80, "tcp", 0),),
        env={"A": "b"},
    )
    assert event_fields(event) == {
        "name": "web",
        "image": "i",
        "image_name": "n",
        "vcpus": 1,
        "memory_mib": 2,
        "disk_gib": 3,
        "publish": ([80, "tcp", 0],),
        "env": {"A": "b"},
        "failover_s": 300,
        "restart": "on-failure",
        "require": {},
        "apart": "",
        "spread": "",
        "desired": "running",
        "generation": 0,
    }
    assert event_fields(VmDesired(desired=Desired.STOPPED, generation=3)) == {"desired": "stopped", "generation": 3}


@pytest.mark.parametrize("cls", EVENT_TYPES)
def test_each_event_says_all_about_itself(cls: type[Event]) -> None:
    """Verb, topic, record, effect and writer stand on the class, and the verb finds it."""
    assert EVENT_BY_VERB[cls.verb] is cls
    assert cls.topic
    assert cls.record
    assert isinstance(cls.effect, Effect)
    assert isinstance(cls.writer, Writer)
    assert cls.__doc__


@pytest.mark.parametrize("cls", EVENT_TYPES)
def test_only_a_holder_tells_phases(cls: type[Event]) -> None:
    """A phase belongs to a status, and a status to the placement's holder."""
    assert (cls.phase is not None) == issubclass(cls, HolderEvent) == (cls.writer is Writer.HOLDER)
