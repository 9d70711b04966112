"""Commands about cells: what they ask of the node, what they sign, what people and programs see."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from formation.core.errors import DeniedError, UnavailableError
from formation.core.event import CellRecorded, CellRemoved, Seat, parse_event
from formation.core.intent import parse_intent
from formation.core.keys import KeyPair
from formation.core.manifest import found_network, parse_manifest
from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_node import FakeNode

KEY = KeyPair(b"\x07" * 32)
MANIFEST = found_network("berlin", voters=[("b", KEY, ("/ip4/192.0.2.7/tcp/4700",))], founded_ms=1)
NODE_ID = str(KEY.node_id)
PROOF: dict[str, Any] = {
    "height": 42,
    "root": "aa" * 32,
    "time_ms": 1_700_000_000_000,
    "age_ms": 65_000,
    "epoch": 1,
    "signers": [NODE_ID],
    "quorum_size": 1,
    "link_count": 1,
    "server": "b",
    "server_node_id": NODE_ID,
}
CELL: dict[str, Any] = {
    "name": "berlin",
    "network_id": MANIFEST.network_id.hex(),
    "network": "berlin",
    "owner": "did:key:z6Mk",
    "fence": [7, 0],
    "epoch": 1,
    "voters": [NODE_ID],
    "quorum_size": 1,
    "servers": [f"b={NODE_ID}@/ip4/192.0.2.7/tcp/4700"],
    "manifest_base64": "",
    "proof": None,
}
READ: dict[str, Any] = {
    "cell": "berlin",
    "network_id": MANIFEST.network_id.hex(),
    "kind": "value",
    "section": "cell.value",
    "id": "did:key:z6Mk/color",
    "is_there": True,
    "value": {"value_base64": "Ymx1ZQ==", "text": "blue", "count": 0},
    "value_base64": "gA==",
    "proof": PROOF,
    "record_proof": None,
}


@pytest.fixture
def manifest_file(tmp_path: Path) -> str:
    path = tmp_path / "berlin.toml"
    path.write_text(MANIFEST.to_toml())
    return str(path)


def test_a_cell_is_recorded_with_its_chain(run: Run, node: FakeNode, manifest_file: str) -> None:
    """One signed wish for each group of links; the servers that were given; the manifest as it is."""
    node.answers |= {
        "cells/berlin": CELL,
        "POST cells/links": {"epoch": 2, "groups": [["bDE=", "bDI="], ["bDM="]], "proof": PROOF},
    }
    result = run("cell", "add", "berlin", manifest_file, "--server", f"b={NODE_ID}@/ip4/192.0.2.7/tcp/4700")
    assert result.status == 0, result.err
    wishes = [parse_intent(raw).intent for raw in node.wishes]
    assert [wish.object_id for wish in wishes] == ["cell/berlin"] * 2
    events = [parse_event(wish.verb, wish.body) for wish in wishes]
    assert all(isinstance(event, CellRecorded) for event in events)
    first, second = (event for event in events if isinstance(event, CellRecorded))
    assert (first.links, second.links) == ((b"l1", b"l2"), (b"l3",))
    assert first.servers == (Seat("b", KEY.public_key, ("/ip4/192.0.2.7/tcp/4700",)),)
    assert parse_manifest(first.manifest).network_id == MANIFEST.network_id
    assert "epoch 1: 1 voters, 1 a quorum" in result.out
    assert "formation cell read berlin" in result.err


def test_a_cell_that_does_not_answer_is_recorded_all_the_same(run: Run, node: FakeNode, manifest_file: str) -> None:
    """With its founders, and that is said; any other refusal ends the command."""
    node.answers |= {"cells/berlin": CELL, "POST cells/links": UnavailableError("nobody there")}
    result = run("cell", "add", "berlin", manifest_file)
    assert result.status == 0, result.err
    assert "nobody there" in result.err
    wish = parse_intent(node.wishes[-1]).intent
    event = parse_event(wish.verb, wish.body)
    assert isinstance(event, CellRecorded)
    assert event.links == ()
    node.answers |= {"POST cells/links": DeniedError("no")}
    assert run("cell", "add", "berlin", manifest_file).status == 4
    assert len(node.wishes) == 1


def test_a_cells_name_goes(run: Run, node: FakeNode) -> None:
    assert json.loads(run("cell", "remove", "berlin", "-o", "json").out) == {"name": "berlin", "removed": True}
    wish = parse_intent(node.wishes[-1]).intent
    assert (wish.verb, wish.object_id) == (CellRemoved.verb, "cell/berlin")


def test_cells_are_listed_and_shown(run: Run, node: FakeNode) -> None:
    node.answers |= {"cells": [CELL], "cells/berlin": CELL | {"proof": PROOF}}
    assert "berlin" in run("cell", "list").out
    assert json.loads(run("cell", "list", "-o", "json").out) == [CELL]
    shown = run("cell", "show", "berlin").out
    assert "by proof of the root" in shown
    assert "1 min" in shown or "65 s" in shown or "1m" in shown
    node.answers |= {"cells": []}
    assert "No cells are recorded here" in run("cell", "list").err


def test_a_record_is_read(run: Run, node: FakeNode, manifest_file: str) -> None:
    """The value for people, everything for programs; ages and the root's manifest are passed on."""
    node.answers |= {"POST cells/read": READ}
    result = run("cell", "read", "berlin", "value", "did:key:z6Mk/color", "--max-age", "5m", "--root", manifest_file)
    assert result.status == 0, result.err
    assert "blue" in result.out
    assert "signed by 1 voters of epoch 1" in result.out
    path, asked = node.posts[-1]
    assert path == "cells/read"
    assert asked["max_age_ms"] == 300_000
    assert parse_manifest(base64.b64decode(asked["root_base64"])).network_id == MANIFEST.network_id
    assert json.loads(run("cell", "read", "berlin", "value", "x", "-o", "json").out) == READ
    assert "max_age_ms" not in node.posts[-1][1]
    assert run("cell", "read", "berlin", "value", "x", "--max-age", "0").status == 0
    assert node.posts[-1][1]["max_age_ms"] == 0


def test_that_there_is_no_record_is_an_answer(run: Run, node: FakeNode) -> None:
    """Exit status 5, for people as an error that says for which height, for programs with the proof."""
    node.answers |= {"POST cells/read": READ | {"is_there": False, "value": None, "value_base64": None}}
    result = run("cell", "read", "berlin", "value", "x")
    assert result.status == 5
    assert "proven for height 42" in result.err
    result = run("cell", "read", "berlin", "value", "x", "-o", "json")
    assert result.status == 5
    assert json.loads(result.out)["is_there"] is False


def test_the_root_is_named_and_shown(run: Run, node: FakeNode, manifest_file: str) -> None:
    """While others must say the same the exit status is 8, and the hint is what they type."""
    root: dict[str, Any] = {"network_id": "", "network": "", "epoch": None, "voters": [], "servers": []}
    node.answers |= {
        "POST cells/links": {"epoch": 0, "groups": [], "proof": PROOF},
        "POST root": root | {"agreed": ["n1"], "agreed_count": 1, "needed_count": 3},
    }
    result = run("cell", "root", manifest_file)
    assert result.status == 8
    assert f"On 2 more voters the operator types the very same: formation cell root {manifest_file}" in result.err
    assert node.posts[-1][1]["links_base64"] == []
    done = {"network_id": "ab" * 32, "network": "r", "epoch": 0, "voters": [NODE_ID], "servers": ["s"]}
    node.answers |= {"root": done | {"agreed": [], "agreed_count": 0, "needed_count": 3}}
    assert "epoch 0: 1 voters" in run("cell", "root").out


def test_an_account_is_imported(run: Run, node: FakeNode) -> None:
    account = KeyPair(b"\x01" * 32).account_id
    done = {"account_id": account, "key": "aa" * 32, "recovery_key": "", "root_height": 9}
    node.answers |= {f"POST accounts/{account}/import": done}
    assert "height 9 of the root" in run("account", "import").out


def test_a_checkpoint_is_made(run: Run, node: FakeNode) -> None:
    node.answers |= {"POST state/checkpoint": {"height": 9, "root": "aa" * 32, "time_ms": 1_700_000_000_000, "age_ms": 5}}
    assert "aa" * 32 in run("state", "checkpoint").out


@pytest.mark.parametrize(
    "arguments",
    [
        ("cell", "read", "Berlin!", "value", "x"),
        ("cell", "show", "a/b"),
        ("cell", "read", "berlin", "value", "x", "--max-age", "soon"),
    ],
)
def test_mistakes_are_told_before_anybody_is_asked(run: Run, node: FakeNode, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.status == 2
    assert "Hint" in result.err or "hint" in result.err or "Usage" in result.err
    assert node.posts == []


def test_a_server_that_is_none_is_refused(run: Run, node: FakeNode, manifest_file: str) -> None:
    assert run("cell", "add", "berlin", manifest_file, "--server", "nonsense").status == 2
    assert node.wishes == []
