"""Three networks under faults and liars keep C1 to C7; and each of these checks has a mutation that it catches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from formation.core.codec import decode
from formation.state import remote_cell, root_link
from formation.state.checkpoint import Item
from formation.state.root_link import ImportedKeys, RootLink
from tests.sim.cells import run

SEED_COUNT = 12
SEEDS_PER_TEST = 6
# Seeds that a mutation may take to be noticed.
MUTANT_SEED_COUNT = 12


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(0, SEED_COUNT, SEEDS_PER_TEST))
def test_cells_hold(first_seed: int) -> None:
    """No accepted proof differs from the state that it speaks of, whoever serves it."""
    happened: dict[str, int] = {}
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        for name, count in run(seed).by_name.items():
            happened[name] = happened.get(name, 0) + count
    for name in (
        "accepted",
        "imported",
        "cells recorded",
        "refused certificate",
        "refused path",
        "refused network",
        "handovers",
    ):
        assert happened.get(name), f"the runs no longer do what they are for: no {name}"


def _any_path(_root: bytes, section: str, object_id: str, proof: Any) -> bytes | None:
    """Takes the pieces for what they are, without hashing up to the root."""
    items = [item for piece in proof.pieces for item in decode(piece, tuple[Item, ...])]
    return next((item.value for item in items if (item.section, item.id) == (section, object_id)), None)


def _forgetful(self: RootLink, account_id: str, keys: ImportedKeys) -> None:
    """Does not remember how far an account was imported: an older proof counts again."""
    _note_import(self, account_id, keys)
    self._heights[account_id] = 1


def _other_key(value: bytes) -> tuple[bytes, bytes]:
    """Takes another key over than the root has."""
    key, recovery_key = _keys_of(value)
    return key[::-1], recovery_key


_note_import = RootLink.note_import
_keys_of = root_link._keys_of

MUTATIONS: dict[str, tuple[object, str, Callable[..., object], str]] = {
    "signatures are not checked": (remote_cell, "final_chain_holds", lambda *_args, **_kw: True, "C1|C2|C5"),
    "the path is not hashed": (remote_cell, "verify_item", _any_path, "C1|C5"),
    "older checkpoints are taken": (remote_cell, "_check_age", lambda *_args, **_kw: None, "C3"),
    "imports may go back": (RootLink, "note_import", _forgetful, "C5"),
    "another key is taken over": (root_link, "_keys_of", _other_key, "C5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule left out is noticed by the invariant that rests on it, within a few seeds."""
    owner, attribute, mutant, invariant = MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, mutant)
    with pytest.raises(AssertionError, match=rf"InvariantError: ({invariant}):"):
        _run_seeds(MUTANT_SEED_COUNT)


def _run_seeds(count: int) -> None:
    for seed in range(count):
        run(seed)
