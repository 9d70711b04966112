from __future__ import annotations

import pytest

from formation.core.errors import (
    ConflictError,
    DecodeError,
    DeniedError,
    FormationError,
    HostError,
    NotFoundError,
    QuorumError,
    RemoteFault,
    UnavailableError,
    UsageError,
    error_from_code,
)

SHOWN = (FormationError, UsageError, UnavailableError, DeniedError, NotFoundError, ConflictError, QuorumError, HostError)


@pytest.mark.parametrize("cls", SHOWN)
def test_an_error_survives_the_api(cls: type[FormationError]) -> None:
    """An error's code, message and hint give the same error at the other side."""
    error = error_from_code(cls.code, "what is wrong", "how to mend it")
    assert type(error) is cls
    assert (error.message, error.hint, str(error)) == ("what is wrong", "how to mend it", "what is wrong")


@pytest.mark.parametrize("code", ["", "from-the-future", "remote_fault", "decode"])
def test_an_unknown_code_gives_the_base_class(code: str) -> None:
    """A code that this version does not show to people becomes a plain failure."""
    assert type(error_from_code(code, "m", "h")) is FormationError


def test_codes_are_unique() -> None:
    """Programs can tell errors apart by code."""
    classes = (*SHOWN, RemoteFault, DecodeError)
    assert len({cls.code for cls in classes}) == len(classes)


def test_exit_statuses_are_as_published() -> None:
    """Shell scripts rely on these numbers."""
    assert [cls.exit_status for cls in SHOWN] == [1, 2, 3, 4, 5, 6, 7, 1]


def test_only_waiting_helps_against_two_errors() -> None:
    """Retryable are: unreachable, and no quorum."""
    assert [cls for cls in SHOWN if cls.retryable] == [UnavailableError, QuorumError]


def test_a_hint_may_be_left_out() -> None:
    """An error without a hint has an empty one."""
    assert UsageError("m").hint == ""
