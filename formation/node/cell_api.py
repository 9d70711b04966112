"""The API's routes about cells: other networks by name, reads of their state, the root cell, accounts taken over from it.

What another network says is proven to this node (`state/remote_cell.py`); the answers say of which height, how old, and who
signed, so that nobody takes them for the state of this moment. Recording a cell is an account's wish like any other
(`POST /v1/intents`); naming the root is the voters', on their own machines.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from formation.core.codec import decode
from formation.core.errors import DecodeError, DeniedError, NotFoundError, UsageError
from formation.core.event import RootNamed, Seat
from formation.core.ids import check_label, node_id_of, public_key_of_account
from formation.core.manifest import Manifest, parse_manifest
from formation.node.door import Door
from formation.node.reads import Reads
from formation.node.state_api import Answer, Ask, StateRoute, check_local, json_object
from formation.node.state_reads import parse_seat, seat_text
from formation.node.stream import json_fields
from formation.state.cell_reader import (
    AGE_MS_MAX,
    LINKS_PER_OP_MAX,
    CellReader,
    FoundCell,
    RemoteItem,
    Target,
    target_of_cell,
    target_of_manifest,
)
from formation.state.cells import Cell
from formation.state.network_cells import OBJECT_PREFIX, RecordedCell
from formation.state.remote_cell import ID_LENGTH_MAX, SECTION_LENGTH_MAX
from formation.state.root_link import OBJECT_ID as ROOT_ID
from formation.state.root_link import account_item

ROOT = "@root"
"""Stands for the root itself where a cell's name is expected; no label begins so."""
# What one operation holds beside a manifest and its servers.
LINKS_SIZE_MAX_BYTES = 24 * 1024
# Cells in one answer: some MiB of JSON.
LISTED_COUNT_MAX = 4_096
_SECTION_OF = {
    "value": "cell.value",
    "vm": "cell.vm",
    "node": "cell.node",
    "image": "cell.image",
    "claim": "claim",
    "account": "account",
    "cell": "cells",
}
"""Kind of record → section of the state; any other name is taken for a section."""
_CLAIM_FIELDS = ("owner", "height", "index", "granted_ms", "expires_ms", "ttl_ms", "note")


class CellApi:
    """Handlers of one node."""

    def __init__(self, reads: Reads, cells: CellReader, door: Door) -> None:
        self._reads = reads
        self._cells = cells
        self._door = door

    def routes(self) -> tuple[StateRoute, ...]:
        """All of them."""
        return (
            StateRoute("GET", "/v1/cells", self.get_cells),
            StateRoute("POST", "/v1/cells/read", self.post_read),
            StateRoute("POST", "/v1/cells/links", self.post_links),
            StateRoute("GET", "/v1/cells/{name}", self.get_cell),
            StateRoute("GET", "/v1/root", self.get_root),
            StateRoute("POST", "/v1/root", self.post_root),
            StateRoute("POST", "/v1/accounts/{id}/import", self.post_import),
        )

    # ── records ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def get_cells(self, _: Ask) -> Answer:
        """Cells that this node's own network records."""
        names = sorted(self._cells.cells.ids())
        if len(names) > LISTED_COUNT_MAX:
            raise UsageError(f"{len(names)} cells, and one answer holds {LISTED_COUNT_MAX}", hint="formation cell show NAME")
        found = []
        for name in names:
            record = self._cells.cells.get(name)
            assert record is not None
            found.append(self._shown(FoundCell(RecordedCell(name, record), None)))
        return found

    async def get_cell(self, ask: Ask) -> Answer:
        """One cell's record: final here, or proven against the root.

        Raises:
          NotFoundError: no such cell, which is final or proven; or no root is known.
          UnavailableError: the root gives no proof that holds.
        """
        return self._shown(await self._cells.find(_name(ask.path["name"]), age_ms_max=_age(ask.query.get("max_age_ms"))))

    def _shown(self, found: FoundCell) -> dict[str, Any]:
        cell = found.cell
        record, manifest = cell.record, cell.manifest
        owner = ""
        if found.proven is None:
            owner = self._reads.state.replica.state.accounts.owner_of(OBJECT_PREFIX + cell.name)
        return {
            "name": cell.name,
            "network_id": record.network_id.hex(),
            "network": manifest.name,
            "owner": owner,
            "fence": list(record.fence),
            "epoch": record.committee.epoch,
            "voters": [node_id_of(key) for key in record.committee.voters],
            "quorum_size": record.committee.quorum_size,
            "servers": [seat_text(seat) for seat in cell.servers],
            "manifest_base64": base64.b64encode(record.manifest_raw).decode(),
            "proof": None if found.proven is None else self._proof(found.proven),
        }

    # ── reads ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def post_read(self, ask: Ask) -> Answer:
        """An item of another network's state, proven.

        Body: JSON `{"cell": NAME, "kind": KIND or section, "id": ID}`, and where wanted `"max_age_ms"` (0: any age),
        `"root_base64"` (CBOR of the root's manifest, for who is in no network that knows it). `@root` is the root itself.

        Raises:
          UsageError: malformed.
          NotFoundError: no such cell; no root is known.
          UnavailableError: nobody gave a proof that holds: says what each gave.
        """
        wish = json_object(ask.body)
        kind, object_id = _text(wish, "kind"), _text(wish, "id")
        section = _SECTION_OF.get(kind, kind)
        if not 0 < len(section) <= SECTION_LENGTH_MAX or len(object_id) > ID_LENGTH_MAX - len("account/"):
            raise UsageError("kind or id is out of bounds", hint="formation cell read CELL value ACCOUNT/KEY")
        age_ms_max = _age(wish.get("max_age_ms"))
        target, record = await self._target(wish, age_ms_max)
        wanted = account_item(object_id) if kind == "account" else object_id
        found = await self._cells.read(target, section, wanted, age_ms_max=age_ms_max)
        raw = found.item.value
        return {
            "cell": target.name,
            "network_id": target.network_id.hex(),
            "kind": kind,
            "section": section,
            "id": object_id,
            "is_there": raw is not None,
            "value": None if raw is None else _plain(kind, section, raw),
            "value_base64": None if raw is None else base64.b64encode(raw).decode(),
            "proof": self._proof(found),
            "record_proof": None if record is None or record.proven is None else self._proof(record.proven),
        }

    async def _target(self, wish: Mapping[str, Any], age_ms_max: int | None) -> tuple[Target, FoundCell | None]:
        root = _manifest(wish, "root_base64") if wish.get("root_base64") else None
        name = _text(wish, "cell")
        if name == ROOT:
            return self._cells.root_target(root), None
        found = await self._cells.find(_name(name), root=root, age_ms_max=age_ms_max)
        return target_of_cell(found.cell), found

    def _proof(self, found: RemoteItem) -> dict[str, Any]:
        item = found.item
        return {
            "height": item.height,
            "root": item.root.hex(),
            "time_ms": item.time_ms,
            "age_ms": max(0, self._cells.now_ms() - item.time_ms),
            "epoch": item.committee.epoch,
            "signers": [node_id_of(item.committee.voters[voter]) for voter in item.signers],
            "quorum_size": item.committee.quorum_size,
            "link_count": len(found.links),
            "server": found.server.name,
            "server_node_id": node_id_of(found.server.public_key),
        }

    # ── what a record or a root is renewed with ─────────────────────────────────────────────────────────────────

    async def post_links(self, ask: Ask) -> Answer:
        """The chain from the recorded committee of a network (else its founders) to its newest, grouped for operations.

        Body: JSON `{"manifest_base64": …, "servers": ["NAME=NODE_ID@MULTIADDR"…], "name": the cell's name or @root}`.

        Raises:
          UsageError: malformed.
          UnavailableError: nobody gave a chain that holds.
        """
        wish = json_object(ask.body)
        manifest = _manifest(wish, "manifest_base64")
        servers, name = _servers(wish), _text(wish, "name")
        target = target_of_manifest(manifest)
        state = self._reads.state.replica.state
        known = state.root_link.root if name == ROOT else state.network_cells.get(name)
        trusted = known.committee if known is not None and known.network_id == manifest.network_id else target.trusted
        found = await self._cells.newest_links(
            Target(
                name=manifest.name,
                network_id=manifest.network_id,
                trusted=trusted,
                servers=servers or target.servers,
            )
        )
        return {
            "epoch": found.item.committee.epoch,
            "groups": [[base64.b64encode(link).decode() for link in group] for group in _groups(found.links)],
            "proof": self._proof(found),
        }

    # ── the root ────────────────────────────────────────────────────────────────────────────────────────────────

    async def get_root(self, _: Ask) -> Answer:
        """The root that this network has named.

        Raises:
          NotFoundError: none.
        """
        return self._root()

    def _root(self) -> dict[str, Any]:
        state = self._reads.state.replica.state
        link, committee = state.root_link, state.committee
        names = {seat.public_key: seat.name for seat in committee.seats}
        words = [names[key] for key in link.words() if key in names]
        root = link.root
        if root is None and not words:
            raise NotFoundError(
                "this network has named no root cell", hint="on each voter's machine: formation cell root MANIFEST"
            )
        shown = {"agreed": words, "agreed_count": len(words), "needed_count": committee.committee.quorum_size}
        if root is None:
            return {"network_id": "", "network": "", "epoch": None, "voters": [], "servers": []} | shown
        return {
            "network_id": root.network_id.hex(),
            "network": root.manifest.name,
            "epoch": root.committee.epoch,
            "voters": [node_id_of(key) for key in root.committee.voters],
            "servers": [seat_text(seat) for seat in root.addresses()],
        } | shown

    async def post_root(self, ask: Ask) -> Answer:
        """This voter's word about the root; answers when it is final.

        Body: JSON `{"manifest_base64": …, "servers": […], "links_base64": […]}`.

        Raises:
          DeniedError: not by the unix socket, or this node does not vote.
          UsageError: malformed.
          ConflictError: it has no effect; says why.
          QuorumError: written, and not final in time.
        """
        check_local(ask, "the root is named on the voter's own machine", hint="run the command there")
        if not self._reads.state.status().is_voter:
            raise DeniedError("this node does not vote, so it has no word in this", hint="formation voter list")
        wish = json_object(ask.body)
        manifest = _manifest(wish, "manifest_base64")
        links = wish.get("links_base64", [])
        if not isinstance(links, list) or len(links) > LINKS_PER_OP_MAX:
            raise UsageError(
                f"links_base64 is not a list of at most {LINKS_PER_OP_MAX}", hint="schemas/README.md lists the API"
            )
        event = RootNamed(
            manifest=manifest.to_cbor(), servers=_servers(wish), links=tuple(_base64("links_base64", link) for link in links)
        )
        await self._door.say(event, ROOT_ID)
        return self._root()

    async def post_import(self, ask: Ask) -> Answer:
        """Take an account's keys over from the root; answers when that is final.

        Raises:
          NotFoundError: this network has named no root.
          UnavailableError: the root gives no proof that holds; or this node is not ready.
          ConflictError: it has no effect; says why.
        """
        account_id = ask.path["id"]
        public_key_of_account(account_id)
        event = await self._cells.prove_account(account_id)
        await self._door.say(event, account_id)
        state = self._reads.state.replica.state
        return {
            "account_id": account_id,
            "key": state.accounts.key_in_force(account_id).hex(),
            "recovery_key": state.accounts.recovery_key(account_id).hex(),
            "root_height": state.root_link.imported_height(account_id),
        }


def _groups(links: tuple[bytes, ...]) -> list[list[bytes]]:
    """Runs of links of which each fits into one operation."""
    groups: list[list[bytes]] = []
    size_bytes = 0
    for link in links:
        size_bytes += len(link)
        if not groups or size_bytes > LINKS_SIZE_MAX_BYTES or len(groups[-1]) == LINKS_PER_OP_MAX:
            groups.append([])
            size_bytes = len(link)
        groups[-1].append(link)
    return groups


def _plain(kind: str, section: str, raw: bytes) -> Any:
    """An item as JSON has it: of the usual kinds by the names of their fields, of others as it stands, bytes in hex."""
    value: Any = decode(raw, Any, what="item")
    try:
        if section.startswith("cell."):
            return _cell(kind, Cell.load(value))
        if section == "claim":
            return dict(zip(_CLAIM_FIELDS, value, strict=True))
        if kind == "account":
            return {"key": value[0].hex(), "recovery_key": value[1].hex()}
    except (TypeError, ValueError, IndexError, AttributeError) as exc:
        raise DecodeError(f"a {kind} that this version does not know") from exc
    return json_fields(value)


def _cell(kind: str, cell: Cell) -> dict[str, Any]:
    shown: dict[str, Any] = {"owner": cell.owner, "is_deleted": cell.is_deleted}
    if kind == "value":
        data = None if cell.value is None else cell.value.read()
        text = None
        try:
            text = None if data is None else data.decode()
        except UnicodeDecodeError:
            pass
        encoded = None if data is None else base64.b64encode(data).decode()
        return {"value_base64": encoded, "text": text, "count": 0 if cell.count is None else cell.count.read()}
    fields = cell.fields.get("")
    shown["fields"] = json_fields({} if fields is None else fields.read())
    shown["holders"] = [] if cell.holders is None else list(cell.holders.read())
    shown["placed"] = None if cell.placed is None else cell.placed[0]
    return shown


def _name(text: str) -> str:
    return check_label(text, what="a cell's name")


def _text(wish: Mapping[str, Any], key: str) -> str:
    value = wish.get(key, "")
    if not isinstance(value, str):
        raise UsageError(f"{key} is not a text", hint="schemas/README.md lists the API")
    return value


def _age(value: Any) -> int | None:
    """Milliseconds; None: whatever its age."""
    if value is None:
        return AGE_MS_MAX
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()) or len(text) > 15:
        raise UsageError("max_age_ms is not a number of milliseconds", hint="0 takes a checkpoint of any age")
    return int(text) or None


def _base64(key: str, text: Any) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except ValueError as exc:
        raise UsageError(f"{key} is not base64", hint="schemas/README.md lists the API") from exc


def _manifest(wish: Mapping[str, Any], key: str) -> Manifest:
    try:
        return parse_manifest(_base64(key, wish.get(key)))
    except DecodeError as exc:
        raise UsageError(f"{key}: {exc.message}", hint="formation network show FILE looks at a manifest") from exc


def _servers(wish: Mapping[str, Any]) -> tuple[Seat, ...]:
    value = wish.get("servers", [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError("servers is not a list of texts", hint="schemas/README.md lists the API")
    return tuple(map(parse_seat, value))
