from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formation.core.codec import encode
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
)
from formation.p2p.calls import (
    ERROR_TEXT_LENGTH_MAX,
    STATUS_ERROR,
    AnswerDecoder,
    decode_error,
    encode_answer,
    encode_error,
)
from formation.p2p.frames import encode_frame


@given(payload=st.binary(max_size=100), cut=st.integers(1, 104))
def test_an_answer_comes_back_whole(payload: bytes, cut: int) -> None:
    """However it is cut in two."""
    data = encode_answer(payload)
    decoder = AnswerDecoder(size_max_bytes=100)
    first = decoder.feed(data[:cut])
    assert (first if first is not None else decoder.feed(data[cut:])) == payload


def test_nothing_fed_is_no_answer() -> None:
    """An empty chunk changes nothing."""
    assert AnswerDecoder(size_max_bytes=1).feed(b"") is None


@pytest.mark.parametrize(
    "error_type", [UsageError, UnavailableError, DeniedError, NotFoundError, ConflictError, QuorumError, HostError]
)
def test_an_error_comes_back_as_its_class(error_type: type[FormationError]) -> None:
    """With its message and hint."""
    with pytest.raises(error_type, match="no vm") as caught:
        AnswerDecoder(size_max_bytes=0).feed(encode_error(error_type("no vm", hint="list them")))
    assert caught.value.hint == "list them"


def test_an_unknown_code_gives_the_base_class() -> None:
    """A newer peer's error is an error all the same."""
    error = decode_error(encode(["brand_new", "message", ""]))
    assert type(error) is FormationError
    assert error.message == "message"


def test_error_texts_are_cut_and_printable() -> None:
    """A peer can neither flood a terminal nor send escape sequences to it."""
    decoder = AnswerDecoder(size_max_bytes=0)
    with pytest.raises(UsageError) as caught:
        decoder.feed(encode_error(UsageError("\x1b[2J" + "é" * 5000, hint="a\nb")))
    assert len(caught.value.message) == ERROR_TEXT_LENGTH_MAX
    assert "\x1b" not in caught.value.message
    assert caught.value.hint == "a b"


@pytest.mark.parametrize("payload", [b"", b"\xff", encode(["one"]), encode([1, 2, 3]), encode({"a": 1})])
def test_a_malformed_error_is_a_remote_fault(payload: bytes) -> None:
    """And never an exception of the decoder's own."""
    assert isinstance(decode_error(payload), RemoteFault)


def test_an_unknown_status_is_refused() -> None:
    """Only 0 and 1 are answers."""
    with pytest.raises(DecodeError, match="status 2"):
        AnswerDecoder(size_max_bytes=10).feed(b"\x02" + encode_frame(b""))


def test_an_answer_too_long_is_refused() -> None:
    """By its length, before it is here."""
    with pytest.raises(DecodeError):
        AnswerDecoder(size_max_bytes=3).feed(encode_answer(b"four")[:5])


def test_an_error_has_its_own_limit() -> None:
    """A caller that wants no payload still gets the error; an endless error is refused."""
    with pytest.raises(DecodeError):
        AnswerDecoder(size_max_bytes=1 << 30).feed(bytes((STATUS_ERROR,)) + (1 << 20).to_bytes(4, "big"))
