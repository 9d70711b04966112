"""One signature rule for the whole network: crafted signatures are judged as `ed25519_edge.json` says, for ever."""

from __future__ import annotations

import json
from typing import Any

import pytest

from formation.core.codec import verify_ed25519
from formation.core.keys import KeyPair
from tests.wire import ed25519_edge
from tests.wire.ed25519_edge import BASE, IDENTITY, PATH, SCALAR, SEED, TORSION, Case, L, compress, equation_holds, multiply

ROWS: list[dict[str, Any]] = json.loads(PATH.read_text())


def case_of(row: dict[str, Any]) -> Case:
    public_key, message, signature = (bytes.fromhex(row[name]) for name in ("public_key", "message", "signature"))
    return Case(row["name"], public_key, message, signature, row["holds"], row["why"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["name"]))
def test_the_verdict_is_as_written_down(row: dict[str, Any]) -> None:
    """A library that changes its mind about one of these would split a committee."""
    case = case_of(row)
    assert verify_ed25519(case.public_key, case.message, case.signature) is case.holds, case.why


def test_the_table_follows_from_the_curve() -> None:
    """The bytes are those that the equations give; nobody edited the file by hand."""
    assert [case_of(row) for row in ROWS] == list(ed25519_edge.cases())


def test_the_curve_is_the_curve() -> None:
    """The arithmetic agrees with libsodium, so a refusal means what it says."""
    assert compress(multiply(SCALAR, BASE)) == KeyPair(SEED).public_key
    assert multiply(L, BASE) == IDENTITY
    assert multiply(8, TORSION) == IDENTITY
    assert multiply(4, TORSION) != IDENTITY


def test_the_refused_ones_would_pass_a_careless_library() -> None:
    """The cases are crafted, not random: those of the paper's table satisfy the equation, or eight times it."""
    for case in map(case_of, ROWS):
        number = case.name.partition(":")[0]
        if number in ("2", "3", "4", "5", "6", "7"):
            assert equation_holds(case, is_cofactored=True), case.name
        if number in ("3", "6"):
            assert equation_holds(case, is_cofactored=False), case.name
        if number in ("4", "5"):
            assert not equation_holds(case, is_cofactored=False), case.name
    assert any(case.name.startswith("0:") and equation_holds(case, is_cofactored=False) for case in map(case_of, ROWS))


def test_some_hold_and_some_do_not() -> None:
    """A check that always said no, or always yes, would fail here."""
    assert [row["name"] for row in ROWS if row["holds"]] == ["3: both of mixed order, parts cancel", "honest", "a vote"]
