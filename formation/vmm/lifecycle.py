"""Which verb is legal in which phase (ux 6.3).

Pure. The node's API asks before it carries an owner's wish, so that a person is told at once; what becomes of a wish
that is carried all the same is `plan`'s business.
"""

from __future__ import annotations

from enum import StrEnum

from formation.core.errors import ConflictError
from formation.core.spec import VmPhase


class Verb(StrEnum):
    """What a person can ask of a VM."""

    START = "start"
    STOP = "stop"
    DELETE = "delete"
    CONSOLE = "console"


_EVERY = frozenset(VmPhase)
_ENDED = frozenset({VmPhase.DELETING, VmPhase.GONE})

LEGAL: dict[Verb, frozenset[VmPhase]] = {
    # Starting a stopping VM is legal: it starts again when it has stopped. An unknown one may be down: its node decides.
    Verb.START: frozenset({VmPhase.STOPPED, VmPhase.STOPPING, VmPhase.FAILED, VmPhase.UNKNOWN}),
    Verb.STOP: _EVERY - _ENDED - {VmPhase.STOPPED, VmPhase.STOPPING},
    Verb.DELETE: _EVERY - _ENDED,
    Verb.CONSOLE: frozenset({VmPhase.BOOTING, VmPhase.RUNNING, VmPhase.STOPPING}),
}

_HINT: dict[Verb, str] = {
    Verb.START: "stop it first to start it afresh",
    Verb.STOP: "nothing of it runs; formation vm start starts it",
    Verb.DELETE: "formation vm list shows what there is",
    Verb.CONSOLE: "formation vm logs shows what it printed last",
}


def check_verb(verb: Verb, phase: VmPhase, *, name: str) -> None:
    """Refuse a verb that makes no sense for a VM in this phase.

    Raises:
      ConflictError: says what it is and what to do.
    """
    if phase not in LEGAL[verb]:
        raise ConflictError(f"cannot {verb} {name}: it is {_sentence(phase)}", hint=_HINT[verb])


def _sentence(phase: VmPhase) -> str:
    match phase:
        case VmPhase.GONE:
            return "deleted"
        case VmPhase.DELETING:
            return "being deleted"
        case VmPhase.UNKNOWN:
            return "on a node that is silent"
        case VmPhase.PENDING:
            return "waiting for a node"
        case _:
            return str(phase)
