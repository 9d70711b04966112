"""Shell of cross-cell reads: serves proofs of our checkpoint to anybody, and reads and verifies those of other networks.

`remote_cell` has the rules of what is believed. Here is what keeps it cheap: a token bucket for each asking node, a few answers
at a time, a short queue before them; and for the reader: one server after the other, each within its time, none believed.
The highest checkpoint that was proven of a network is kept for the next read, under the committee from which it was proven:
what was shown to somebody who trusts little must not hinder somebody who trusts more.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import structlog
import trio

from formation.core.clock import NS_PER_MS, Clock
from formation.core.codec import decode, encode, verify_ed25519
from formation.core.errors import ConflictError, FormationError, NotFoundError, UnavailableError
from formation.core.event import AccountImported, Seat
from formation.core.ids import NetworkId, NodeId, node_id_of
from formation.core.manifest import Manifest
from formation.p2p.service import P2pService
from formation.state.checkpoint import bucket_number
from formation.state.committee import Committee
from formation.state.evidence import founders_of
from formation.state.limits import Bucket
from formation.state.network_cells import NetworkCells, RecordedCell, load_record
from formation.state.remote_cell import (
    ANSWER_SIZE_MAX_BYTES,
    PROTOCOL,
    REQUEST_SIZE_MAX_BYTES,
    ProofAnswer,
    ProofAsk,
    ProofError,
    ProofSource,
    ReadItem,
    Served,
    answer_ask,
    parse_answer,
    parse_ask,
    read_item,
)
from formation.state.root_link import ACCOUNT_SECTION, account_item
from formation.state.service import StateService

# A proof is one bucket read and encoded, about 1 ms: an asker gets a fiftieth of a core, a burst serves a page of names.
ASK_RATE_PER_S = 20.0
ASK_BURST_COUNT = 60.0
# Askers remembered; the one heard of longest ago is forgotten first, and gets a whole burst when it returns.
ASKER_COUNT_MAX = 2_048
# Answers made at a time: they read the store between the voter's own commits.
SERVED_COUNT_MAX = 4
# Those that wait for it: a second's worth. Beyond, askers go to another node.
WAITING_COUNT_MAX = 64
SERVE_TIMEOUT_S = 10.0

# The reader: a dial, a handshake, an answer of some KiB.
SERVER_TIMEOUT_S = 10.0
# All servers together: twice this (record and item) is below the client's patience of 60 s.
READ_TIMEOUT_S = 20.0
# f+1 of the largest committee are 11; who finds none of so many has another problem.
SERVER_COUNT_MAX = 11
# Networks of which the height is remembered: 1 KiB each.
SEEN_COUNT_MAX = 1_024
# What one operation may carry (core.event.Links).
LINKS_PER_OP_MAX = 16
# A day: an idle cell makes no checkpoint, and a cell without any change for a day is worth a look by a person.
AGE_MS_MAX = 24 * 3600 * 1000

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A network to read from, and why it is believed."""

    name: str
    network_id: NetworkId
    trusted: Committee
    servers: tuple[Seat, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteItem:
    """What was read, with what proves it."""

    item: ReadItem
    links: tuple[bytes, ...]
    """From the trusted committee on."""
    checkpoint: bytes
    proof: bytes
    server: Seat
    """Who gave it."""


@dataclass(frozen=True, slots=True)
class FoundCell:
    """A cell's record and where it was found."""

    cell: RecordedCell
    proven: RemoteItem | None
    """None: it is final in this node's own state."""


class CellReader:
    """Both sides, for one node."""

    def __init__(self, *, manifest: Manifest, state: StateService, p2p: P2pService, clock: Clock, rng: random.Random) -> None:
        self._manifest = manifest
        self._state = state
        self._p2p = p2p
        self._clock = clock
        self._rng = rng
        self._source: ProofSource | None = None
        self._askers: OrderedDict[NodeId, Bucket] = OrderedDict()
        self._limiter = trio.CapacityLimiter(SERVED_COUNT_MAX)
        self._seen: OrderedDict[tuple[NetworkId, Committee], int] = OrderedDict()
        """(network, committee that was trusted) → the highest checkpoint that was proven."""
        self.served_count = 0
        self.refused_count = 0
        p2p.serve_requests(PROTOCOL, self.serve, request_size_max_bytes=REQUEST_SIZE_MAX_BYTES, is_bulk=True)

    def now_ms(self) -> int:
        """By this node's clock."""
        return self._clock.now_ns() // NS_PER_MS

    # ── serving ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def serve(self, node_id: NodeId, data: bytes) -> bytes:
        """Answer one question of anybody.

        Raises:
          DecodeError: it is none.
          UnavailableError: too many, or there is nothing to prove with.
        """
        self._admit(node_id)
        ask = parse_ask(data)
        with trio.fail_after(SERVE_TIMEOUT_S):
            async with self._limiter:
                return encode(await self._answer(ask))

    def _admit(self, node_id: NodeId) -> None:
        now_ns = self._clock.now_ns()
        bucket = self._askers.get(node_id)
        if bucket is None:
            bucket = self._askers[node_id] = Bucket(rate_per_s=ASK_RATE_PER_S, burst=ASK_BURST_COUNT, now_ns=now_ns)
            if len(self._askers) > ASKER_COUNT_MAX:
                self._askers.popitem(last=False)
        self._askers.move_to_end(node_id)
        if not bucket.take(1, now_ns=now_ns) or self._limiter.statistics().tasks_waiting >= WAITING_COUNT_MAX:
            self.refused_count += 1
            raise UnavailableError("too many questions for proofs", hint="ask slower, or another node of this network")
        self.served_count += 1

    async def _answer(self, ask: ProofAsk) -> ProofAnswer:
        replica = self._state.replica
        head = replica.checkpoint_head
        served = Served(
            network_id=self._manifest.network_id,
            links=tuple(replica.links),
            checkpoint=replica.checkpoint_proof,
            head=head,
        )
        content = b""
        source: ProofSource | None = None
        if head is not None:
            (content,) = await self._state.read_buckets((bucket_number(ask.section, ask.id),))
            source = self._source
            if source is None or source.head is not head:
                source = self._source = ProofSource(head)
        # Without an await from here on: what proves and what is proven belong together.
        return answer_ask(ask, served, lambda section, id_: None if source is None else source.prove(section, id_, content))

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def read(self, target: Target, section: str, object_id: str, *, age_ms_max: int | None = AGE_MS_MAX) -> RemoteItem:
        """One item of another network, proven.

        Args:
          age_ms_max: how old its checkpoint may be; None: whatever its age.

        Raises:
          UnavailableError: no server gave a proof that holds; says what each did.
        """
        failures: list[str] = []
        hint = "does the cell run? formation cell show tells where it is looked for"
        deadline = trio.current_time() + READ_TIMEOUT_S
        for server in self._in_order(target.servers):
            try:
                with trio.fail_at(min(deadline, trio.current_time() + SERVER_TIMEOUT_S)):
                    return await self._read_from(server, target, section, object_id, age_ms_max)
            except ProofError as exc:
                _logger.info("cell.proof_refused", cell=target.name, server=server.name, flaw=str(exc.flaw), why=exc.message)
                failures.append(f"{server.name}: proof refused, {exc.message}")
                hint = exc.hint
            except FormationError as exc:
                failures.append(f"{server.name}: {exc.message}")
                hint = exc.hint or hint
            except trio.TooSlowError:
                failures.append(f"{server.name}: no answer in time")
        raise UnavailableError(f"cell {target.name}: {'; '.join(failures) or 'no server is known'}", hint=hint)

    def _in_order(self, servers: Sequence[Seat]) -> list[Seat]:
        mixed = list(servers)
        self._rng.shuffle(mixed)
        return mixed[:SERVER_COUNT_MAX]

    async def _read_from(
        self, server: Seat, target: Target, section: str, object_id: str, age_ms_max: int | None
    ) -> RemoteItem:
        place = (target.network_id, target.trusted)
        steps = read_item(
            section,
            object_id,
            network_id=target.network_id,
            trusted=target.trusted,
            verify=verify_ed25519,
            now_ms=self.now_ms(),
            age_ms_max=age_ms_max,
            height_min=self._seen.get(place, 0),
        )
        found, answers = await self._drive(steps, server)
        self._remember(place, found.height)
        return RemoteItem(
            item=found,
            links=tuple(link for answer in answers for link in answer.links),
            checkpoint=answers[-1].checkpoint,
            proof=answers[-1].item,
            server=server,
        )

    async def _drive(
        self, steps: Generator[ProofAsk, ProofAnswer, ReadItem], server: Seat
    ) -> tuple[ReadItem, list[ProofAnswer]]:
        answers: list[ProofAnswer] = []
        ask = next(steps)
        while True:
            answers.append(parse_answer(await self._ask(server, encode(ask))))
            try:
                ask = steps.send(answers[-1])
            except StopIteration as end:
                found: ReadItem = end.value
                return found, answers

    async def _ask(self, server: Seat, request: bytes) -> bytes:
        node_id = node_id_of(server.public_key)
        if node_id == self._p2p.node_id:
            return encode(await self._answer(parse_ask(request)))
        return await self._p2p.request_at(
            node_id, server.addresses, PROTOCOL, request, response_size_max_bytes=ANSWER_SIZE_MAX_BYTES
        )

    def _remember(self, place: tuple[NetworkId, Committee], height: int) -> None:
        self._seen[place] = max(height, self._seen.pop(place, 0))
        if len(self._seen) > SEEN_COUNT_MAX:
            self._seen.popitem(last=False)

    # ── finding a cell ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def cells(self) -> NetworkCells:
        """What this node's own network records."""
        return self._state.replica.state.network_cells

    def root_target(self, manifest: Manifest | None = None) -> Target:
        """The root cell: by a manifest that somebody hands over, else the one that this network has named.

        Raises:
          NotFoundError: this network has named none.
        """
        if manifest is not None:
            return target_of_manifest(manifest, name="the root")
        root = self._state.replica.state.root_link.root
        if root is None:
            raise NotFoundError(
                "this network records no such cell, and has named no root cell",
                hint="ask a node of the root, or give its manifest: --root FILE; formation cell root FILE names it for good",
            )
        return Target(name="the root", network_id=root.network_id, trusted=root.committee, servers=root.addresses())

    async def find(self, name: str, *, root: Manifest | None = None, age_ms_max: int | None = AGE_MS_MAX) -> FoundCell:
        """A cell's record: final in this node's own state, else proven against the root.

        Raises:
          NotFoundError: there is no such cell, which is proven; or no root is known.
          UnavailableError: the root gives no proof that holds.
        """
        if root is None or root.network_id == self._manifest.network_id:
            record = self.cells.get(name)
            if record is not None:
                return FoundCell(RecordedCell(name, record), None)
            if root is not None or next(iter(self.cells.ids()), None) is not None:
                raise NotFoundError(f"no cell is called {name!r} here", hint="formation cell list")
        proven = await self.read(self.root_target(root), NetworkCells.name, name, age_ms_max=age_ms_max)
        if proven.item.value is None:
            raise NotFoundError(
                f"no cell was called {name!r} in the root at height {proven.item.height}",
                hint="formation cell list, at the root",
            )
        value = decode(proven.item.value, list, what="the cell's record")
        return FoundCell(RecordedCell(name, load_record(value)), proven)

    async def newest_links(self, target: Target) -> RemoteItem:
        """The reconfiguration chain of a network from the trusted committee on, whatever the age of its checkpoint.

        Raises:
          As `read`.
        """
        return await self.read(target, "spine", "", age_ms_max=None)

    async def prove_account(self, account_id: str) -> AccountImported:
        """What takes an account's keys over from the root.

        Raises:
          NotFoundError: this network has named no root.
          UnavailableError: the root gives no proof that holds.
          ConflictError: the root's committee changed more often than one import may show.
        """
        found = await self.read(self.root_target(), ACCOUNT_SECTION, account_item(account_id), age_ms_max=None)
        if len(found.links) > LINKS_PER_OP_MAX:
            raise ConflictError(
                f"the root's committee has changed {len(found.links)} times since this network last looked",
                hint="its voters show it the way: formation cell root FILE, on the machine of each",
            )
        return AccountImported(links=found.links, checkpoint=found.checkpoint, item=found.proof)


def target_of_manifest(manifest: Manifest, *, name: str = "") -> Target:
    """A network by its founders."""
    servers = tuple(Seat(voter.name, voter.public_key, voter.addresses) for voter in manifest.voters)
    return Target(name=name or manifest.name, network_id=manifest.network_id, trusted=founders_of(manifest), servers=servers)


def target_of_cell(cell: RecordedCell) -> Target:
    """A cell by its record."""
    return Target(name=cell.name, network_id=cell.record.network_id, trusted=cell.record.committee, servers=cell.servers)
