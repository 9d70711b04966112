from __future__ import annotations

import json
from typing import Any

import pytest

from formation.core.event import RecordKind, Topic, VmClaimed
from formation.node.stream import change_json, sse_change, sse_cursor, sse_gap
from formation.state.service import Change, Cursor, Gap, Level

FEED = "5f0c11d2"


def change(**changes: Any) -> Change:
    fields: dict[str, Any] = {
        "position": 7,
        "level": Level.CERTIFIED,
        "record": RecordKind.VM,
        "object_id": "vm-1",
        "verb": "vm.claimed",
        "topic": Topic.VM,
        "event": VmClaimed(why="it fits", ttl_ms=60_000),
        "node_id": "n",
        "account": "",
        "hlc": 1_780_000_000_000 << 16 | 5,
        "trace_id": "t",
        "void": "",
    }
    return Change(**(fields | changes))


def test_a_change_as_json() -> None:
    """All that the API promises, in plain values."""
    assert change_json(change(), FEED) == {
        "position": 7,
        "cursor": "5f0c11d2-7",
        "level": "certified",
        "verb": "vm.claimed",
        "topic": "vm",
        "record": "vm",
        "object_id": "vm-1",
        "node_id": "n",
        "account": "",
        "at_ms": 1_780_000_000_000,
        "trace_id": "t",
        "void": "",
        "op": "",
        "fields": {"why": "it fits", "ttl_ms": 60_000},
    }


def test_a_void_change_has_no_fields() -> None:
    """What could not be read is shown with the reason alone."""
    shown = change_json(change(event=None, void="not CBOR"), FEED)
    assert (shown["fields"], shown["void"]) == ({}, "not CBOR")


def test_a_change_as_a_server_sent_event() -> None:
    """Position as id, verb as event, JSON on one line, an empty line at the end."""
    lines = sse_change(change(), FEED).decode().split("\n")
    assert lines[:2] == ["id: 5f0c11d2-7", "event: vm.claimed"]
    assert json.loads(lines[2].removeprefix("data: ")) == change_json(change(), FEED)
    assert lines[3:] == ["", ""]


def test_line_ends_in_fields_stay_inside_the_data() -> None:
    """JSON escapes them, so a field cannot end the event."""
    raw = sse_change(change(event=VmClaimed(why="a\n\nevent: x\r\n", ttl_ms=60_000), object_id="a\nb"), FEED)
    assert raw.count(b"\n") == 4
    assert b"\r" not in raw


@pytest.mark.parametrize("verb", ["a\n\nid: 99\nevent: vm.ready", "gap", "x\r", "", "message"])
def test_an_unknown_verb_cannot_forge_an_event(verb: str) -> None:
    """What a peer wrote as verb stands in the data only: neither a line end nor the name `gap` gets out."""
    lines = sse_change(change(verb=verb, event=None, void="unknown verb"), FEED).decode().split("\n")
    assert lines[:2] == ["id: 5f0c11d2-7", "event: void"]
    assert json.loads(lines[2].removeprefix("data: "))["verb"] == verb
    assert lines[3:] == ["", ""]


def test_a_gap_as_a_server_sent_event() -> None:
    """How much was missed, from where to where, and where reading goes on."""
    assert sse_gap(Gap(missed_count=3, position=9), FEED) == (
        b'id: 5f0c11d2-9\nevent: gap\ndata: {"missed":3,"first_position":7,"position":9,"cursor":"5f0c11d2-9"}\n\n'
    )


def test_a_sign_of_life_says_how_far_all_is_told() -> None:
    """An id without data: readers of server-sent events keep it, and tell nobody."""
    assert sse_cursor(Cursor(FEED, 9)) == b": keep-alive\nid: 5f0c11d2-9\n\n"
