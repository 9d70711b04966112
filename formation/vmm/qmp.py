"""QEMU's machine protocol, without I/O: bytes in, messages out.

Source: QEMU, docs/interop/qmp-spec.rst. JSON objects, one a line: a greeting, then answers (matched by `id`) and events
in any order. A guest that breaks out speaks this protocol to us, so lines are bounded and every field is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from formation.core.errors import HostError

# The longest answer we ask for (query-status) has 80 bytes; the greeting 200. Room for verbose errors and events.
LINE_SIZE_MAX_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first line: who speaks."""

    version: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a command; `error` is empty when it was done."""

    command_id: int
    value: Any
    error: str


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """Something happened, such as `SHUTDOWN`."""

    name: str
    data: Mapping[str, Any]


Message = Greeting | Reply | QmpEvent


class QmpCodec:
    """One connection's worth of the protocol."""

    __slots__ = ("_buffer", "_last_id")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._last_id = 0

    def encode_command(self, name: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """(id, bytes to send) of a command."""
        self._last_id += 1
        command: dict[str, Any] = {"execute": name, "id": self._last_id}
        if arguments:
            command["arguments"] = dict(arguments)
        return self._last_id, msgspec.json.encode(command) + b"\r\n"

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete.

        Raises:
          HostError: not the protocol; the connection is of no more use.
        """
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        if len(rest) > LINE_SIZE_MAX_BYTES or any(len(line) > LINE_SIZE_MAX_BYTES for line in lines):
            raise HostError(f"the hypervisor sent a line of more than {LINE_SIZE_MAX_BYTES} bytes", hint="see the node's log")
        self._buffer = bytearray(rest)
        return [message for line in lines if line.strip() and (message := _parse(bytes(line))) is not None]


def _parse(line: bytes) -> Message | None:
    try:
        item = msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise HostError(f"the hypervisor sent something that is not QMP: {line[:80]!r}", hint="see the node's log") from exc
    match item:
        case {"QMP": {"version": {"qemu": {"major": int(major), "minor": int(minor), "micro": int(micro)}}}}:
            return Greeting(f"{major}.{minor}.{micro}")
        case {"event": str(name), **rest}:
            data = rest.get("data")
            return QmpEvent(name, data if isinstance(data, dict) else {})
        case {"return": value, "id": int(command_id)}:
            return Reply(command_id, value, "")
        case {"error": {"desc": str(text)}, "id": int(command_id)}:
            return Reply(command_id, None, text or "unknown error")
        case {"error": {"desc": str(text)}}:
            raise HostError(f"the hypervisor refused our command: {text[:200]}", hint="see the node's log")
    # A kind of message that later versions may add concerns nobody here.
    return None
