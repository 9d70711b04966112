"""One tree of errors, divided by who must act.

Every error that a person can see has a `code` (stable, for programs), an `exit_status` (for shells, see
`docs/exit-codes.md`), says whether trying again can help, and carries a `hint`: what to do next.
Subclasses exist only where somebody catches them.
"""

from __future__ import annotations

from typing import ClassVar


class FormationError(Exception):
    """Base of all errors that Formation raises on purpose.

    Args:
      message: one sentence: what is wrong and where.
      hint: one sentence or command: how to mend it.
    """

    code: ClassVar[str] = "failed"
    exit_status: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(FormationError):
    """The caller asked for something malformed: a flag, a file, a field."""

    code = "usage"
    exit_status = 2


class UnavailableError(FormationError):
    """A node or peer cannot be reached just now."""

    code = "unavailable"
    exit_status = 3
    retryable = True


class DeniedError(FormationError):
    """A signature or capability was refused."""

    code = "denied"
    exit_status = 4


class NotFoundError(FormationError):
    """No such vm, image, peer."""

    code = "not_found"
    exit_status = 5


class ConflictError(FormationError):
    """It exists already, or is in a state that does not allow this."""

    code = "conflict"
    exit_status = 6


class QuorumError(FormationError):
    """Not enough acknowledgements, or not ready, in the time allowed."""

    code = "quorum"
    exit_status = 7
    retryable = True


class HostError(FormationError):
    """The kernel, the hypervisor or the disk of this machine said no."""

    code = "host"
    exit_status = 1


class RemoteFault(FormationError):  # noqa: N818 - a fault of theirs, not an error of ours
    """A peer broke a protocol. It is scored and dropped; people never see this raw."""

    code = "remote_fault"
    exit_status = 1


class DecodeError(RemoteFault):
    """Bytes are not the value that they should be."""

    code = "decode"


EXIT_PENDING = 8
EXIT_INTERRUPTED = 130


class InterruptedByUserError(FormationError):
    """Ctrl-C while the network goes on; says how to go on looking."""

    code = "interrupted"
    exit_status = EXIT_INTERRUPTED


_BY_CODE: dict[str, type[FormationError]] = {
    cls.code: cls
    for cls in (
        FormationError,
        UsageError,
        UnavailableError,
        DeniedError,
        NotFoundError,
        ConflictError,
        QuorumError,
        HostError,
    )
}


def error_from_code(code: str, message: str, hint: str) -> FormationError:
    """The error that an API answer stands for; an unknown code gives the base class."""
    return _BY_CODE.get(code, FormationError)(message, hint=hint)
