"""Golden bytes of what nodes say to each other beside the state layer: a change here is a change of the protocol."""

from __future__ import annotations

from pathlib import Path

import pycddl
import pytest

from formation.core.codec import decode, encode
from formation.core.errors import ConflictError
from formation.node.attach import AttachRequest
from formation.node.door import Accepted
from formation.node.forward import ApiAnswer, ApiRequest
from formation.p2p.calls import encode_answer, encode_error

TEXT = (Path(__file__).parents[2] / "schemas" / "p2p.cddl").read_text()
ACCEPTED = Accepted(object_id="vm-" + "a" * 16, trace_id="0123456789abcdef", lane="ab" * 42, seq=7)
ATTACH = AttachRequest("console", 0, True, b"permit")
FAILURE = encode(["conflict", "it exists", "choose another name"])
GOLDEN = {
    "accepted": (
        encode(ACCEPTED),
        "84" + "73" + b"vm-aaaaaaaaaaaaaaaa".hex() + "70" + b"0123456789abcdef".hex() + "7854" + (b"ab" * 42).hex() + "07",
    ),
    "attach_request": (encode(ATTACH), "84" + "67" + b"console".hex() + "00" + "f5" + "46" + b"permit".hex()),
    "api_request": (
        encode(ApiRequest("GET", "/v1/status", "", b"permit")),
        "84" + "63" + b"GET".hex() + "6a" + b"/v1/status".hex() + "60" + "46" + b"permit".hex(),
    ),
    "api_answer": (encode(ApiAnswer(200, "text/plain")), "82" + "18c8" + "6a" + b"text/plain".hex()),
    "failure": (
        FAILURE,
        "83" + "68" + b"conflict".hex() + "69" + b"it exists".hex() + "73" + b"choose another name".hex(),
    ),
}


def schema(rule: str) -> pycddl.Schema:
    # A schema is its first rule; the others follow.
    return pycddl.Schema(f"start = {rule}\n{TEXT}")


@pytest.mark.parametrize("rule", GOLDEN)
def test_the_bytes_are_as_written_down(rule: str) -> None:
    """Encoding gives these very bytes, and the schema takes them."""
    data, golden = GOLDEN[rule]
    assert data.hex() == golden
    schema(rule).validate_cbor(data)


@pytest.mark.parametrize("rule", GOLDEN)
def test_the_schema_can_refuse(rule: str) -> None:
    """One item more is another message."""
    data, _ = GOLDEN[rule]
    longer = encode([*decode(data, list), "more"])
    with pytest.raises(pycddl.ValidationError):
        schema(rule).validate_cbor(longer)


def test_answers_are_framed() -> None:
    """Status byte, length, payload."""
    assert encode_answer(b"xyz").hex() == "00" + "00000003" + b"xyz".hex()
    error = ConflictError("it exists", hint="choose another name")
    assert encode_error(error).hex() == "01" + f"{len(FAILURE):08x}" + FAILURE.hex()
