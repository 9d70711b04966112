"""What people write of ports and environments, parsed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from formation.core.errors import UsageError

if TYPE_CHECKING:
    from formation.core.spec import PortMap

PORT_MAX = 65535
# As much as a VM may carry (spec.ENV_SIZE_MAX_BYTES), with room for comments.
_ENV_FILE_SIZE_MAX_BYTES = 256 * 1024
_PUBLISH = re.compile(r"^(?:(\d{1,5}):)?(\d{1,5})(?:/(tcp|udp))?$")
_ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


def parse_publish(text: str) -> PortMap:
    """The port map of `HOST:GUEST[/tcp|udp]` or `GUEST` (then any free host port).

    Raises:
      UsageError: it is none.
    """
    from formation.core.spec import PortMap

    match = _PUBLISH.match(text)
    if match is None:
        raise UsageError(
            f"--publish: {text!r} is not a port map", hint="write 8080:80, 5353:53/udp, or 80 for any free host port"
        )
    host_port, guest_port = int(match[1] or 0), int(match[2])
    if guest_port not in range(1, PORT_MAX + 1) or host_port > PORT_MAX:
        raise UsageError(f"--publish: {text!r}: a port is 1 to {PORT_MAX}", hint="write 8080:80 (HOST:GUEST)")
    return PortMap(guest_port, "udp" if match[3] == "udp" else "tcp", host_port)


def parse_env(pairs: Sequence[str], files: Sequence[Path]) -> dict[str, str]:
    """The environment of `NAME=value` flags, which win, and of files of such lines.

    Raises:
      UsageError: names the flag or the file's line.
    """
    env: dict[str, str] = {}
    for path in files:
        for number, line in enumerate(_env_lines(path), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                name, value = _parse_pair(line.strip(), where=f"{path}:{number}")
                env[name] = value
    for pair in pairs:
        name, value = _parse_pair(pair, where="--env")
        env[name] = value
    return env


def _env_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            data = file.read(_ENV_FILE_SIZE_MAX_BYTES + 1)
        text = data.decode()
    except OSError as exc:
        raise UsageError(f"--env-file: cannot read {path}: {exc.strerror}", hint="one NAME=value a line") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"--env-file: {path} is not UTF-8 text", hint="one NAME=value a line") from exc
    if len(data) > _ENV_FILE_SIZE_MAX_BYTES:
        raise UsageError(f"--env-file: {path} is larger than {_ENV_FILE_SIZE_MAX_BYTES} bytes", hint="is this the right file?")
    return text.splitlines()


def _parse_pair(text: str, *, where: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not _ENV_NAME.match(name):
        raise UsageError(
            f"{where}: {text[:60]!r} is not NAME=value", hint="write GREETING=hello; a name has letters, digits and _"
        )
    return name, value
