"""Where the peer book and a person's bans lie: `peers.cbor` in the node's data directory. A convenience: a file that is
damaged or cannot be written is put aside or logged, and the node goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import structlog
import trio

from formation.core.files import replace_durably

# Ten times what a full book takes.
FILE_SIZE_MAX_BYTES = 8 * 1024 * 1024

_logger = structlog.get_logger(__name__)


class PeerStore(Protocol):
    """A place for one value."""

    async def load(self) -> bytes:
        """What was saved last; b"" if nothing was, or it cannot be read."""
        ...

    async def save(self, data: bytes) -> None:
        """Put another value in its place; one call at a time. Never raises."""
        ...

    async def put_aside(self, why: str) -> None:
        """What `load` gave is no such value: keep it for people, and go on without. Never raises."""
        ...


class FilePeerStore:
    """See PeerStore."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def load(self) -> bytes:
        """See PeerStore."""
        return await trio.to_thread.run_sync(self._load)

    async def save(self, data: bytes) -> None:
        """See PeerStore."""
        await trio.to_thread.run_sync(self._save, data)

    async def put_aside(self, why: str) -> None:
        """See PeerStore."""
        await trio.to_thread.run_sync(self._put_aside, why)

    def _load(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                data = file.read(FILE_SIZE_MAX_BYTES + 1)
        except FileNotFoundError:
            return b""
        except OSError as exc:
            _logger.warning("peer book not read", path=str(self._path), error=exc.strerror)
            return b""
        if len(data) > FILE_SIZE_MAX_BYTES:
            self._put_aside(f"larger than {FILE_SIZE_MAX_BYTES} bytes")
            return b""
        return data

    def _save(self, data: bytes) -> None:
        try:
            replace_durably(self._path, data, mode=0o600)
        except OSError as exc:
            _logger.warning("peer book not written", path=str(self._path), error=exc.strerror)

    def _put_aside(self, why: str) -> None:
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

    async def load(self) -> bytes:
        """See PeerStore."""
        await trio.lowlevel.checkpoint()
        return self.data

    async def save(self, data: bytes) -> None:
        """See PeerStore."""
        await trio.lowlevel.checkpoint()
        self.data = data

    async def put_aside(self, why: str) -> None:
        """See PeerStore."""
        await trio.lowlevel.checkpoint()
        self.data, self.aside = b"", self.data
