"""Gets blobs from whoever holds them: one holder after the other, going on where the last one stopped.

Rules: (1) a holder that breaks the protocol, or sends bytes that are not the blob's, is not asked again in this pull;
(2) when a blob came from several holders and its hash does not hold, none can be blamed: it is fetched again from its
start, each time from one holder only, so that the next failure has an author; (3) when the holders that were
named do not do, the network is asked once for others (provider records); (4) a round over all holders without one new byte
ends the pull.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Sequence

import structlog
import trio

from formation.core.errors import RemoteFault, UnavailableError
from formation.core.ids import Digest, NodeId, digest_of
from formation.core.units import MIB
from formation.p2p.service import P2pService
from formation.pack.blobs import BlobStore, PartialBlob
from formation.pack.manifest import MANIFEST_SIZE_MAX_BYTES, BlobRef, ImageManifest, parse_manifest
from formation.pack.transfer import fetch_blob

# Bytes gathered before a thread writes them: a thread costs 50 us, as much as writing 100 KiB.
_WRITE_SIZE_BYTES = 1 * MIB
# A flapping holder may make a little progress in each round for ever; honest trouble ends sooner.
ROUND_COUNT_MAX = 20

log = structlog.get_logger(__name__)


class Pull:
    """One image's way here.

    Args:
      p2p: the way to the holders.
      store: where the blobs go.
      holders: whom to ask, best first.
      on_bytes: told each count of bytes received.
      find_more: other holders, as the network tells of them; asked once, when those do not do.
    """

    def __init__(
        self,
        p2p: P2pService,
        store: BlobStore,
        holders: Sequence[NodeId],
        on_bytes: Callable[[int], None],
        find_more: Callable[[], Awaitable[Sequence[NodeId]]],
    ) -> None:
        self._p2p, self._store, self._on_bytes, self._find_more = p2p, store, on_bytes, find_more
        self._has_asked = False
        self._holders = [holder for holder in dict.fromkeys(holders) if holder != p2p.node_id]
        self._last_error = "no node that holds it is known"
        self.received_bytes = 0
        self.used: list[NodeId] = []
        """Holders that gave bytes, in order."""

    async def fetch_manifest(self, digest: Digest) -> ImageManifest:
        """The image's manifest, checked against its digest.

        Raises:
          UnavailableError: nobody gave it.
        """
        tried: set[NodeId] = set()
        while (holder := await self._next_holder(tried)) is not None:
            tried.add(holder)
            pieces: list[bytes] = []

            async def gather(piece: bytes, into: list[bytes] = pieces) -> None:
                into.append(piece)

            try:
                await fetch_blob(
                    self._p2p, holder, digest, offset=0, size_bytes=None, size_max_bytes=MANIFEST_SIZE_MAX_BYTES, sink=gather
                )
                data = b"".join(pieces)
                if digest_of(data) != digest:
                    raise RemoteFault("the manifest arrived with other bytes")
                manifest = parse_manifest(data)
            except (UnavailableError, RemoteFault) as exc:
                self._failed(holder, exc)
                continue
            await trio.to_thread.run_sync(self._store.add_bytes, data)
            self._count(holder, len(data))
            return manifest
        raise self._nobody(digest)

    async def fetch(self, blob: BlobRef) -> None:
        """Get one blob into the store.

        Raises:
          UnavailableError: nobody gave it; what came is kept for the next try.
          HostError: the disk is full or says no.
        """
        digest = Digest(blob.digest)
        with await trio.to_thread.run_sync(lambda: self._store.open_partial(digest, size_bytes=blob.size_bytes)) as partial:
            alone = False
            for _ in range(ROUND_COUNT_MAX):
                before = partial.offset
                for holder in tuple(self._holders):
                    if alone and partial.offset:
                        await trio.to_thread.run_sync(partial.restart)
                    sole = partial.offset == 0
                    if not await self._fetch_from(holder, digest, partial):
                        continue
                    try:
                        await trio.to_thread.run_sync(partial.finish)
                    except RemoteFault as exc:
                        if sole:
                            self._failed(holder, exc)
                        alone = True
                        continue
                    return
                if (not self._holders or (partial.offset <= before and not alone)) and not await self._has_found_more():
                    break
        raise self._nobody(digest)

    async def _next_holder(self, tried: Container[NodeId]) -> NodeId | None:
        """One that was not tried yet, found if need be."""
        for _ in range(2):
            if (left := next((holder for holder in self._holders if holder not in tried), None)) is not None:
                return left
            if not await self._has_found_more():
                break
        return None

    async def _has_found_more(self) -> bool:
        """Ask the network for other holders, once; whether it knows one."""
        if self._has_asked:
            return False
        self._has_asked = True
        found = [holder for holder in await self._find_more() if holder not in self._holders and holder != self._p2p.node_id]
        self._holders += found
        log.info("image.providers_found", count=len(found))
        return bool(found)

    async def _fetch_from(self, holder: NodeId, digest: Digest, partial: PartialBlob) -> bool:
        """Go on with a blob at one holder; whether all of it is here now."""
        buffer = bytearray()

        async def flush() -> None:
            data = bytes(buffer)
            buffer.clear()
            if data:
                await trio.to_thread.run_sync(partial.append, data)
                self._count(holder, len(data))

        async def take(piece: bytes) -> None:
            buffer.extend(piece)
            if len(buffer) >= _WRITE_SIZE_BYTES:
                await flush()

        size_bytes = partial.size_bytes
        try:
            await fetch_blob(
                self._p2p, holder, digest, offset=partial.offset, size_bytes=size_bytes, size_max_bytes=size_bytes, sink=take
            )
        except (UnavailableError, RemoteFault) as exc:
            self._failed(holder, exc)
        await flush()
        return partial.offset == size_bytes

    def _count(self, holder: NodeId, size_bytes: int) -> None:
        if holder not in self.used:
            self.used.append(holder)
        self.received_bytes += size_bytes
        self._on_bytes(size_bytes)

    def _failed(self, holder: NodeId, exc: UnavailableError | RemoteFault) -> None:
        self._last_error = exc.message
        if isinstance(exc, RemoteFault):
            self._holders = [other for other in self._holders if other != holder]
        log.info("blob.holder_failed", holder=holder, error=exc.message, dropped=isinstance(exc, RemoteFault))

    def _nobody(self, digest: Digest) -> UnavailableError:
        return UnavailableError(
            f"no node gave blob {digest[:19]}: {self._last_error}",
            hint="formation image show lists who holds an image; is one of them reachable?",
        )
