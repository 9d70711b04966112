"""Cells of the network, as its root cell records them: name → manifest, committee, servers.

A *cell* is an ordinary network with a manifest, a committee, lanes and a spine of its own. A *root cell* is an ordinary
network, too; what makes it the root of others is that they are recorded in its state. Nothing but these records, accounts
and names needs to be there, so what an operation costs in a cell does not depend on how many cells there are. (The word has
two more meanings in the literature of CRDTs: what `cells` keeps has nothing to do with this.)

Rules, all judged in the final order, by bytes alone:
1. A name is a DNS label. The first `cell.recorded` of a free name gets it, with a fence, as with claims. Who gets it owns the
   object `cell/NAME`: only the owner renews or removes it, and `owner.transferred` hands it on (`accounts`). It is no claim of
   `claims`, because a lease has a note of 1,024 characters and this has a manifest and a committee.
2. The manifest is checked here: form, n = 3f+1, each founder's signature. Its hash is the cell's network id. A record never
   changes to another network: the owner removes it first, and the new one has a new fence that readers see.
3. The record holds the newest committee that was shown here: `links` are the reconfiguration chain from the committee that
   is recorded (in the beginning the founders) on, each signed by a quorum of the committee before (`membership.verify_links`).
   It only moves forward. Readers begin there, not at the founders: so keys of voters that left long ago, with which another
   history could be signed, deceive nobody who asks the root, once somebody has renewed the record. Links below the recorded
   epoch are passed over: two who renew at once do not hinder one another.
4. `servers` are where the cell answers today. They are hints: whatever they say is proven.

What the root does *not* say is that a cell's voters are honest: who gives a cell a name vouches for that. f of the cell's
voters may lie as in any network; more can show its readers anything, of this cell.

Source: design/state section 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from formation.core.codec import Verify
from formation.core.errors import DecodeError, UsageError
from formation.core.event import CellRecorded, Seat
from formation.core.ids import NetworkId, check_label
from formation.core.manifest import Manifest, parse_manifest
from formation.state.claims import Fence
from formation.state.committee import Committee
from formation.state.membership import parse_link, verify_links

OBJECT_PREFIX = "cell/"
# 16,384 cells of 1,000 nodes each are more machines than one person's DNS; at 4 KiB a record they take 64 MiB of the root.
CELL_COUNT_MAX = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRecord:
    """What the root knows of a cell."""

    fence: Fence
    """(height, index) at which the name was given."""
    manifest_raw: bytes
    """CBOR of its SignedGenesis."""
    network_id: NetworkId
    committee: Committee
    """The newest that was shown here."""
    servers: tuple[Seat, ...]
    charged: int
    """Bytes of the owner's quota."""


class RecordedCell:
    """A record with its manifest read."""

    def __init__(self, name: str, record: CellRecord) -> None:
        self.name = name
        self.record = record

    @cached_property
    def manifest(self) -> Manifest:
        """Its signatures were checked when it was recorded."""
        return parse_manifest(self.record.manifest_raw, verify=lambda *_: True)

    @property
    def servers(self) -> tuple[Seat, ...]:
        """Where to ask: those that are recorded, else the founders."""
        founders = (Seat(voter.name, voter.public_key, voter.addresses) for voter in self.manifest.voters)
        return self.record.servers or tuple(founders)


def cell_name(object_id: str) -> str:
    """The name in `cell/NAME`; empty if it is not such an id."""
    return object_id.removeprefix(OBJECT_PREFIX) if object_id.startswith(OBJECT_PREFIX) else ""


def check_cell_id(object_id: str) -> None:
    """Refuse what is no cell's id.

    Raises:
      DecodeError: it is none.
    """
    try:
        check_label(cell_name(object_id), what="a cell's name")
    except UsageError as exc:
        raise DecodeError(exc.message) from exc


def check_servers(servers: Iterable[Seat]) -> None:
    """Refuse addresses that nobody could dial or read.

    Raises:
      DecodeError: names the server.
    """
    for seat in servers:
        if not seat.name.isprintable() or not all(
            a.startswith("/") and a.isascii() and a.isprintable() and " " not in a for a in seat.addresses
        ):
            raise DecodeError(f"server {seat.name[:63]!r}: its name or an address is not printable, or no multiaddr")


def newer_committee(known: Committee, links: Iterable[bytes], *, verify: Verify, network_id: NetworkId) -> Committee:
    """The committee to which a reconfiguration chain leads from one that is known; links below it are passed over.

    Raises:
      DecodeError: a link is none, does not follow, or is not signed by a quorum.
    """
    fresh = [link for link in map(parse_link, links) if link.epoch >= known.epoch]
    return verify_links(known, fresh, verify=verify, network_id=network_id)


def make_record(event: CellRecorded, before: CellRecord | None, *, fence: Fence, verify: Verify) -> CellRecord:
    """The record that an event makes, or makes of the one before.

    Raises:
      DecodeError: the manifest is none, it is another network's, or the chain does not hold; says which.
    """
    if before is None or event.manifest != before.manifest_raw:
        manifest = parse_manifest(event.manifest, verify=verify)
        network_id = manifest.network_id
        known = Committee(0, tuple(voter.public_key for voter in manifest.voters))
    if before is not None:
        if event.manifest != before.manifest_raw and network_id != before.network_id:
            raise DecodeError("the name is another network's: remove that record first")
        network_id, known, fence = before.network_id, before.committee, before.fence
    check_servers(event.servers)
    committee = newer_committee(known, event.links, verify=verify, network_id=network_id)
    return CellRecord(
        fence=fence,
        manifest_raw=event.manifest,
        network_id=network_id,
        committee=committee,
        servers=event.servers,
        charged=1024 + len(event.manifest) + 40 * len(committee.voters) + 512 * len(event.servers),
    )


class NetworkCells:
    """All records: a section of the final state, with names as ids."""

    __slots__ = ("_records", "dirty")

    name = "cells"

    def __init__(self) -> None:
        self.dirty: set[str] = set()
        """Names that changed since the owner of this section cleared it."""
        self._records: dict[str, CellRecord] = {}

    def get(self, name: str) -> CellRecord | None:
        """The record of this name."""
        return self._records.get(name)

    def put(self, name: str, record: CellRecord) -> None:
        """Keep a record that `make_record` gave."""
        self._records[name] = record
        self.dirty.add(name)

    def remove(self, name: str) -> CellRecord | None:
        """Let a name go."""
        record = self._records.pop(name, None)
        if record is not None:
            self.dirty.add(name)
        return record

    @property
    def is_full(self) -> bool:
        """Whether no more are taken."""
        return len(self._records) >= CELL_COUNT_MAX

    def ids(self) -> Iterable[str]:
        """All names."""
        return self._records.keys()

    def dump(self, identity: str) -> list[Any] | None:
        """[height, index, manifest, [epoch, [key…]], [seat…], bytes charged]; None: no such cell."""
        record = self._records.get(identity)
        return None if record is None else dump_record(record)

    def load(self, identity: str, value: list[Any]) -> None:
        """Take over what another replica's `dump` gave."""
        self.put(identity, load_record(value))


def dump_record(record: CellRecord) -> list[Any]:
    """See `NetworkCells.dump`."""
    committee = [record.committee.epoch, list(record.committee.voters)]
    return [*record.fence, record.manifest_raw, committee, dump_seats(record.servers), record.charged]


def load_record(value: list[Any]) -> CellRecord:
    """The inverse of `dump_record`; of bytes under a root that is trusted, so their signatures were checked there.

    Raises:
      DecodeError: not a record: its root's voters run another version.
    """
    try:
        height, index, raw, (epoch, voters), servers, charged = value
        return CellRecord(
            fence=(height, index),
            manifest_raw=raw,
            network_id=parse_manifest(raw, verify=lambda *_: True).network_id,
            committee=Committee(epoch, tuple(voters)),
            servers=load_seats(servers),
            charged=charged,
        )
    except (TypeError, ValueError) as exc:
        raise DecodeError("not a cell's record: does its root run another version?") from exc


def dump_seats(seats: Iterable[Seat]) -> list[list[Any]]:
    """Plain values."""
    return [[seat.name, seat.public_key, list(seat.addresses)] for seat in seats]


def load_seats(value: Iterable[list[Any]]) -> tuple[Seat, ...]:
    """The inverse of `dump_seats`."""
    return tuple(Seat(name, key, tuple(addresses)) for name, key, addresses in value)
