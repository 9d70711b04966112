from __future__ import annotations

import itertools

import pytest

from formation.core.errors import ConflictError
from formation.core.spec import VmPhase
from formation.vmm.lifecycle import LEGAL, Verb, check_verb


@pytest.mark.parametrize(("verb", "phase"), list(itertools.product(Verb, VmPhase)))
def test_illegal_verbs_are_refused_with_a_sentence(verb: Verb, phase: VmPhase) -> None:
    """A verb is legal in exactly the phases of the table; elsewhere it says what the VM is."""
    if phase in LEGAL[verb]:
        check_verb(verb, phase, name="web")
        return
    with pytest.raises(ConflictError, match=f"cannot {verb} web: it is ") as caught:
        check_verb(verb, phase, name="web")
    assert caught.value.hint


def test_nothing_is_legal_after_the_end() -> None:
    """A VM that is gone takes no verb; one that lives can always be deleted."""
    for phase in VmPhase:
        assert (phase in LEGAL[Verb.DELETE]) == (phase not in (VmPhase.DELETING, VmPhase.GONE))
    assert not any(VmPhase.GONE in phases for phases in LEGAL.values())
