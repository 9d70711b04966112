from __future__ import annotations

import json

import pytest

from formation.core.errors import HostError
from formation.vmm.qmp import LINE_SIZE_MAX_BYTES, Greeting, QmpCodec, QmpEvent, Reply

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}\r\n'
EVENT = b'{"timestamp": {"seconds": 1}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}\r\n'


def test_messages_of_a_session() -> None:
    """Greeting, answer, error and event are told apart, wherever the stream is cut."""
    stream = (
        GREETING + b'{"return": {}, "id": 1}\r\n' + EVENT + b'{"id": 2, "error": {"class": "GenericError", "desc": "no"}}\r\n'
    )
    expected = [
        Greeting("7.2.22"),
        Reply(1, {}, ""),
        QmpEvent("SHUTDOWN", {"guest": True, "reason": "guest-reset"}),
        Reply(2, None, "no"),
    ]
    for size in (1, 7, len(stream)):
        codec = QmpCodec()
        got = [m for i in range(0, len(stream), size) for m in codec.feed(stream[i : i + size])]
        assert got == expected


def test_commands_are_numbered() -> None:
    """Each command has its own id; arguments only where there are some."""
    codec = QmpCodec()
    first_id, first = codec.encode_command("qmp_capabilities")
    second_id, second = codec.encode_command("device_del", {"id": "x"})
    assert first_id != second_id
    assert json.loads(first) == {"execute": "qmp_capabilities", "id": first_id}
    assert json.loads(second)["arguments"] == {"id": "x"}


@pytest.mark.parametrize(
    "data", [b"hello\n", b"\xff\xfe\n", b'{"error": {"desc": "bad"}}\n', b"x" * (LINE_SIZE_MAX_BYTES + 1), b"[" * 5000 + b"\n"]
)
def test_what_is_not_the_protocol_is_refused(data: bytes) -> None:
    """A hypervisor taken over by its guest cannot make us hold or believe anything."""
    with pytest.raises(HostError):
        QmpCodec().feed(data)


def test_unknown_messages_are_ignored() -> None:
    """Kinds of messages of later versions, and empty lines, do no harm."""
    assert QmpCodec().feed(b'{"news": 1}\n\r\n[]\n3\n') == []
