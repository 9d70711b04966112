"""Each rule, once broken, is found broken by the checkers."""

from __future__ import annotations

import pytest

from tests.sim.mutations import MUTATIONS, Mutation, hunt


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(mutation: Mutation) -> None:
    """Some seed within the mutation's bound breaks a safety invariant, and the report names it."""
    assert hunt(mutation), f"{mutation.name}: not noticed in {mutation.seed_count_max} seeds"
