"""Where the peer book and a person's bans lie: `peers.cbor` in the node's data directory. A convenience: a file that is
damaged or cannot be written is put aside or logged, and the node goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import structlog

from formation.core.files import replace_durably

# Ten times what a full book takes.
FILE_SIZE_MAX_BYTES = 8 * 1024 * 1024

_logger = structlog.get_logger(__name__)


class PeerStore(Protocol):
    """A place for one value."""

    def load(self) -> bytes:
        """What was saved last; b"" if nothing was, or it cannot be read."""
        ...

    def save(self, data: bytes) -> None:
        """Put another value in its place. Blocking; never raises."""
        ...

    def put_aside(self, why: str) -> None:
        """What `load` gave is no such value: keep it for people, and go on without. Never raises."""
        ...


class FilePeerStore:
    """See PeerStore."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> bytes:
        """See PeerStore."""
        try:
            with self._path.open("rb") as file:
                data = file.read(FILE_SIZE_MAX_BYTES + 1)
        except FileNotFoundError:
            return b""
        except OSError as exc:
            _logger.warning("peer book not read", path=str(self._path), error=exc.strerror)
            return b""
        if len(data) > FILE_SIZE_MAX_BYTES:
            self.put_aside(f"larger than {FILE_SIZE_MAX_BYTES} bytes")
            return b""
        return data

    def save(self, data: bytes) -> None:
        """See PeerStore."""
        try:
            replace_durably(self._path, data, mode=0o600)
        except OSError as exc:
            _logger.warning("peer book not written", path=str(self._path), error=exc.strerror)

    def put_aside(self, why: str) -> None:
        """See PeerStore."""
        aside = self._path.with_suffix(".damaged")
        _logger.warning("peer book put aside: known peers are dialled, others must be found anew", path=str(aside), why=why)
        try:
            self._path.replace(aside)
        except OSError as exc:
            _logger.warning("peer book not put aside", path=str(self._path), error=exc.strerror)


class MemoryPeerStore:
    """The twin."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.aside = b""

    def load(self) -> bytes:
        """See PeerStore."""
        return self.data

    def save(self, data: bytes) -> None:
        """See PeerStore."""
        self.data = data

    def put_aside(self, why: str) -> None:
        """See PeerStore."""
        self.data, self.aside = b"", self.data
