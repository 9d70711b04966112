"""A build context sent as a tar stream, unpacked where nothing can escape from.

Python's `data` filter (PEP 706) refuses absolute names, parents, links out of the folder and device nodes; sizes and
counts are limited here, for the filter does not.
"""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

import trio

from formation.core.errors import HostError, UsageError
from formation.core.units import MIB, format_size

# What people COPY into a small image; more belongs into a volume or a base image.
CONTEXT_SIZE_MAX_BYTES = 512 * MIB
CONTEXT_FILE_COUNT_MAX = 50_000
# Up to here the stream stays in memory, and no temporary file is made for a small context.
SPOOL_SIZE_BYTES = 8 * MIB


async def receive_context(chunks: AsyncIterator[bytes], folder: Path) -> None:
    """Unpack a tar stream into an empty folder.

    Raises:
      UsageError: not a tar, too large, or a member that would leave the folder; names it.
      HostError: the disk refused.
    """
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_SIZE_BYTES, dir=folder.parent) as spool:
        size_bytes = 0
        async for chunk in chunks:
            size_bytes += len(chunk)
            if size_bytes > CONTEXT_SIZE_MAX_BYTES:
                raise UsageError(
                    f"the build context is larger than {format_size(CONTEXT_SIZE_MAX_BYTES)}",
                    hint="list what is not needed in .formignore",
                )
            await trio.to_thread.run_sync(spool.write, chunk)
        spool.seek(0)
        await trio.to_thread.run_sync(_unpack, spool, folder)


def _unpack(spool: IO[bytes], folder: Path) -> None:
    unpacked_bytes = 0
    name = ""
    try:
        with tarfile.open(fileobj=spool, mode="r:") as archive:
            for count, member in enumerate(archive, start=1):
                name = member.name
                unpacked_bytes += member.size
                # Sparse members claim sizes far beyond what was sent.
                if count > CONTEXT_FILE_COUNT_MAX or unpacked_bytes > CONTEXT_SIZE_MAX_BYTES:
                    raise UsageError("the build context unpacks to too much", hint="list what is not needed in .formignore")
                archive.extract(member, folder, filter="data")
    except tarfile.FilterError as exc:
        raise UsageError(
            f"build context: {name[:200]!r} is not allowed: {exc}", hint="send plain files, folders and inner links"
        ) from exc
    except tarfile.TarError as exc:
        raise UsageError(f"the build context is not a tar stream: {exc}", hint="formation image build sends one") from exc
    except OSError as exc:
        raise HostError(f"cannot unpack the build context: {exc.strerror}", hint="is the node's disk full?") from exc
