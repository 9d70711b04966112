"""The replicated state's own condition as the API's answers: lanes, spine, voters, accounts, values, claims, operations.

Everything here reads; what writes or asks others is `state_api`'s. Names stand beside ids, for people know nodes by name.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from formation.core.clock import NS_PER_MS, hlc_ms
from formation.core.errors import NotFoundError, UsageError
from formation.core.event import Seat, event_fields
from formation.core.ids import (
    NodeId,
    check_label,
    node_id_of,
    pick_by_name_or_prefix,
    public_key_of_account,
    public_key_of_node,
)
from formation.core.spec import ValueRecord
from formation.node.reads import Reads
from formation.node.stream import json_fields
from formation.state.chain import Lane
from formation.state.claims import SPACES, Lease
from formation.state.equivocation import parse_equivocation
from formation.state.feed import Level
from formation.state.final_chain import parse_final_chain
from formation.state.lane import lane_incarnation
from formation.state.lookup import OpFound
from formation.state.membership import CommitteeState
from formation.state.view import View

# Lanes in one answer, those that lag most first; a person reads no more, and an idle network has one for each node.
LANE_COUNT_MAX = 256
# Values or claims in one answer: some MiB of JSON.
LISTED_COUNT_MAX = 4_096
_SEAT = re.compile(r"([^=@\s]+)=([^=@\s]+)@(\S+)")


@dataclass(frozen=True, slots=True)
class StateReads:
    """Shapes what the state service knows."""

    reads: Reads

    @property
    def view(self) -> View:
        """Typed records of now."""
        return self.reads.state.view

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch, by this node's clock."""
        return self.reads.clock.now_ns() // NS_PER_MS

    # ── the state's condition ───────────────────────────────────────────────────────────────────────────────────

    def state(self) -> dict[str, Any]:
        """Lanes, spine, checkpoint, disk: how far what is, and what hinders it."""
        service = self.reads.state
        status, replica = service.status(), service.replica
        now_ms = self.now_ms()
        lanes = sorted((self._lane(lane, now_ms) for lane in replica.lanes), key=_by_lag)
        return {
            "network_id": self.reads.manifest.network_id.hex(),
            "node_id": self.reads.node_id,
            "name": self.reads.settings.name,
            "is_voter": status.is_voter,
            "may_write": status.may_write,
            "epoch": status.epoch,
            "has_quorum": status.has_quorum,
            "quorum_size": status.quorum_size,
            "is_level": status.is_level,
            "observed_count": status.observed_count,
            "certified_count": status.certified_count,
            "final_count": status.final_count,
            "uncertified_count": status.uncertified_count,
            "uncovered_count": status.uncovered_count,
            "spine": {
                "height": status.height,
                "view": status.spine_view,
                "time_ms": status.spine_time_ms,
                "is_waiting": replica.spine.is_waiting,
                "silent": [self.reads.node_name(node_id) for node_id in status.silent_voters],
            },
            "voters": self.seats(),
            "lane_count": len(lanes),
            "lanes": lanes[:LANE_COUNT_MAX],
            "banned": self._banned(),
            "checkpoint": self._checkpoint(now_ms),
            "disk_size_bytes": service.store_size_bytes,
            "clock_ahead_ms": status.clock_ahead_ms,
            "dropped_frame_count": status.dropped_frame_count,
        }

    def _banned(self) -> list[dict[str, Any]]:
        """Keys that signed two ways, why, and since which final height; 0: it is known here, and not final."""
        replica = self.reads.state.replica
        found = dict.fromkeys(replica.lanes.banned_keys, ("two blocks", 0))
        found |= {parse_equivocation(raw).key: ("two votes", 0) for raw in replica.equivocations.pending()}
        found |= {key: ("two votes", height) for key, (height, _) in replica.state.banned.items()}
        return [self._node(node_id_of(key)) | {"why": why, "height": height} for key, (why, height) in sorted(found.items())]

    def _lane(self, lane: Lane, now_ms: int) -> dict[str, Any]:
        oldest = lane.tail.get(lane.final_seq + 1) or lane.chain.get(lane.final_seq + 1)
        if lane.evidence is not None:
            condition = "forked"
        else:
            condition = "left" if self.reads.state.replica.lanes.is_superseded(lane.id) else "open"
        return {
            "lane": lane.id.hex(),
            "node_id": lane.node_id,
            "name": self.reads.node_name(lane.node_id),
            "opened_ms": hlc_ms(int.from_bytes(lane_incarnation(lane.id)[:8], "big")),
            "condition": condition,
            "head_seq": lane.head_seq,
            "certified_seq": lane.certified_seq,
            "final_seq": lane.final_seq,
            "lag_count": lane.head_seq - lane.final_seq,
            "lag_ms": 0 if oldest is None else max(0, now_ms - hlc_ms(oldest.block.hlc)),
        }

    def _checkpoint(self, now_ms: int) -> dict[str, Any] | None:
        replica = self.reads.state.replica
        ref = parse_final_chain(replica.checkpoint_proof).first.proposal if replica.checkpoint_proof else None
        if ref is None or ref.checkpoint is None:
            return None
        age_ms = max(0, now_ms - ref.time_ms)
        return {"height": ref.checkpoint.height, "root": ref.checkpoint.root.hex(), "time_ms": ref.time_ms, "age_ms": age_ms}

    # ── the committee ───────────────────────────────────────────────────────────────────────────────────────────

    def seats(self) -> list[dict[str, Any]]:
        """Who votes, and who of them answers."""
        committee = self.reads.state.replica.state.committee
        return [
            {
                "name": voter.name,
                "node_id": voter.node_id,
                "addresses": list(seat.addresses),
                "online": voter.is_online,
                "last_ack_age_s": voter.last_ack_age_s,
            }
            for voter, seat in zip(self.reads.state.status().voters, committee.seats, strict=True)
        ]

    def voters(self) -> dict[str, Any]:
        """The committee, what is proposed for the next one, and who writes without a vote."""
        state = self.reads.state.replica.state
        committee = state.committee
        decision = committee.decision
        return {
            "epoch": committee.committee.epoch,
            "quorum_size": committee.committee.quorum_size,
            "seats": self.seats(),
            "proposals": self._proposals(committee),
            "decided": None
            if decision is None
            else {"height": decision.height, "command": command_of(committee.seats, decision.seats)},
            "admitted": [
                self._node(node_id_of(key)) | {"by": self.reads.node_name(by)} for key, by in sorted(state.admitted.items())
            ],
        }

    def _proposals(self, committee: CommitteeState) -> list[dict[str, Any]]:
        """Wanted committees, each with its supporters, most first."""
        names = {seat.public_key: seat.name for seat in committee.seats}
        by_seats: dict[tuple[Seat, ...], list[str]] = {}
        for key, seats in committee.proposed().items():
            by_seats.setdefault(seats, []).append(names[key])
        proposals = [
            {
                "command": command_of(committee.seats, seats),
                "seats": [{"name": seat.name, "node_id": node_id_of(seat.public_key)} for seat in seats],
                "by": sorted(by),
                "agreed_count": len(by),
                "needed_count": committee.committee.quorum_size,
                "missing": [name for name in names.values() if name not in by],
            }
            for seats, by in by_seats.items()
        ]
        return sorted(proposals, key=lambda proposal: -int(str(proposal["agreed_count"])))

    def find_node(self, wanted: str) -> NodeId:
        """The node of this id, name or unique prefix: one that told of itself, or votes; any by its whole id.

        Raises:
          NotFoundError, ConflictError: none, or several.
        """
        try:
            public_key_of_node(wanted)
        except UsageError:
            known = {record.node_id: record.name for record in self.view.nodes()}
            for seat in self.reads.state.replica.state.committee.seats:
                known.setdefault(node_id_of(seat.public_key), seat.name)
            try:
                return NodeId(pick_by_name_or_prefix(wanted, candidates=known.items(), what="node"))
            except NotFoundError as exc:
                raise NotFoundError(exc.message, hint="formation status shows the peers; any node by its whole id") from exc
        return NodeId(wanted)

    def _node(self, node_id: str) -> dict[str, Any]:
        return {"node_id": node_id, "name": self.reads.node_name(node_id)}

    # ── accounts, values, claims ────────────────────────────────────────────────────────────────────────────────

    def account(self, account_id: str) -> dict[str, Any]:
        """One account: keys, delegations, what it holds.

        Raises:
          UsageError: not an account's id.
        """
        public_key_of_account(account_id)
        state = self.reads.state.replica.state
        accounts = state.accounts
        known = next((record for record in self.view.accounts() if record.account_id == account_id), None)
        handles = state.claims.of_owner("handle", account_id, state.time_ms)
        objects, size_bytes = state.quotas.used(account_id)
        recovery_key = accounts.recovery_key(account_id)
        return {
            "account_id": account_id,
            "label": known.label if known is not None else "",
            "handle": handles[0][0] if handles else "",
            "key": accounts.key_in_force(account_id).hex(),
            "is_rotated": accounts.key_in_force(account_id) != public_key_of_account(account_id),
            "recovery_key": recovery_key.hex(),
            "delegations": [
                self._node(node_id)
                | {
                    "verbs": sorted(given.verbs),
                    "prefix": given.prefix,
                    "expires_ms": given.expires_ms,
                    "has_ended": given.expires_ms <= state.time_ms,
                }
                for node_id, given in accounts.delegations(account_id)
            ],
            "object_count": objects,
            "size_bytes": size_bytes,
            "spine_time_ms": state.time_ms,
        }

    def grants(self, vm_id: str) -> dict[str, Any]:
        """Who may do what with a VM."""
        grants = [
            {"account_id": account_id, "role": role.name.lower(), "handle": self._handle(account_id)}
            for account_id, role in self.view.grants(vm_id)
        ]
        owner = self.view.owner(vm_id) or ""
        return {"vm_id": vm_id, "owner": owner, "owner_handle": self._handle(owner), "grants": grants}

    def _handle(self, account_id: str) -> str:
        state = self.reads.state.replica.state
        held = state.claims.of_owner("handle", account_id, state.time_ms)
        return held[0][0] if held else ""

    def values(self, account_id: str, *, prefix: str, level: Level) -> list[dict[str, Any]]:
        """An account's values whose key begins so.

        Raises:
          UsageError: not an account's id, or too many to list.
        """
        public_key_of_account(account_id)
        found = [_value(record) for record in self.view.values(account_id, level) if record.key.startswith(prefix)]
        return _listed(found, "values", "give a longer prefix")

    def value(self, account_id: str, key: str, *, level: Level) -> dict[str, Any]:
        """One value.

        Raises:
          UsageError: not an account's id.
          NotFoundError: no such key.
        """
        public_key_of_account(account_id)
        record = self.view.value(account_id, key, level)
        if record is None:
            raise NotFoundError(f"the account has no value {key!r}", hint="formation value list")
        return _value(record)

    def claims(self, *, space: str, owner: str) -> list[dict[str, Any]]:
        """What is held now, by the spine's time.

        Raises:
          UsageError: no such space, or too many to list.
        """
        if space and space not in SPACES:
            raise UsageError(f"no space is called {space[:32]!r}", hint=f"spaces are {', '.join(sorted(SPACES))}")
        state = self.reads.state.replica.state
        claims = state.claims
        found = []
        for identity in sorted(claims.ids()):
            in_space, _, key = identity.partition("/")
            lease = claims.holder(in_space, key, state.time_ms) if space in ("", in_space) else None
            if lease is not None and owner in ("", lease.owner):
                found.append(self._claim(in_space, key, lease, state.time_ms))
        return _listed(found, "claims", "give a space or an owner")

    def _claim(self, space: str, key: str, lease: Lease, spine_ms: int) -> dict[str, Any]:
        is_account = lease.owner.startswith("did:key:")
        return {
            "id": f"{space}/{key}",
            "space": space,
            "key": key,
            "owner": lease.owner,
            "owner_name": self._handle(lease.owner) if is_account else self.reads.node_name(lease.owner),
            "fence": list(lease.fence),
            "granted_ms": lease.granted_ms,
            "expires_ms": lease.expires_ms,
            "left_ms": max(0, lease.expires_ms - spine_ms) if lease.expires_ms else None,
            "note": lease.note,
        }

    # ── one operation ───────────────────────────────────────────────────────────────────────────────────────────

    def op(self, found: OpFound, *, final_signers: Sequence[str]) -> dict[str, Any]:
        """One operation, and how sure it is."""
        op = found.op
        seats = self.reads.state.replica.state.committee.seats
        return {
            "op": str(found.ref),
            "lane": found.ref.lane.hex(),
            "seq": found.ref.seq,
            "index": found.ref.index,
            "verb": op.verb,
            "object_id": op.object_id,
            "class": "O" if op.is_ordered else "C",
            "fields": {} if op.event is None else json_fields(event_fields(op.event)),
            "node_id": op.node_id,
            "node": self.reads.node_name(op.node_id),
            "account": op.account,
            "is_delegated": op.is_delegated,
            "trace_id": op.trace_id,
            "at_ms": hlc_ms(op.hlc),
            "level": found.level.value,
            "signers": [seats[voter].name for voter in found.signers],
            "quorum_size": self.reads.state.status().quorum_size,
            "height": found.height,
            "final_index": found.final_index,
            "final_signers": list(final_signers),
            "void": found.void,
        }


def parse_seat(text: str) -> Seat:
    """`NAME=NODE_ID@MULTIADDR[,MULTIADDR…]` as a seat.

    Raises:
      UsageError: it is none.
    """
    match = _SEAT.fullmatch(text)
    if match is None:
        raise UsageError(f"{text[:120]!r} is not a voter", hint="write NAME=NODE_ID@/ip4/192.0.2.1/tcp/4700")
    name, node_id, addresses = match[1], match[2], tuple(match[3].split(","))
    if not all(address.startswith("/") for address in addresses):
        raise UsageError(f"voter {name}: {match[3][:80]!r} is no multiaddr", hint="write it like /ip4/192.0.2.1/tcp/4700")
    return Seat(check_label(name, what="voter name"), public_key_of_node(node_id), addresses)


def seat_text(seat: Seat) -> str:
    """The inverse of `parse_seat`."""
    return f"{seat.name}={node_id_of(seat.public_key)}@{','.join(seat.addresses)}"


def command_of(seats: Sequence[Seat], wanted: Sequence[Seat]) -> str:
    """The command line that wants this committee in the place of that one."""
    gone = [seat for seat in seats if seat not in wanted]
    new = sorted((seat for seat in wanted if seat not in seats), key=lambda seat: seat.name)
    if not gone:
        return " ".join(["formation voter add", *map(seat_text, new)])
    if not new:
        return " ".join(["formation voter remove", *(seat.name for seat in gone)])
    if len(gone) == len(new):
        pairs = (part for old, fresh in zip(gone, new, strict=True) for part in (old.name, seat_text(fresh)))
        return " ".join(["formation voter replace", *pairs])
    # More seats come than go, or fewer: no command of ours makes such a change, but the API takes it.
    return f"POST /v1/voters add {' '.join(map(seat_text, new))} remove {' '.join(seat.name for seat in gone)}"


def _value(record: ValueRecord) -> dict[str, Any]:
    text: str | None
    try:
        text = None if record.value is None else record.value.decode()
    except UnicodeDecodeError:
        text = None
    return {
        "account": record.account,
        "key": record.key,
        "value_base64": None if record.value is None else base64.b64encode(record.value).decode(),
        "text": text,
        "count": record.count,
        "seen": [dot.hex() for dot in record.seen],
    }


def _listed(found: list[dict[str, Any]], what: str, hint: str) -> list[dict[str, Any]]:
    if len(found) > LISTED_COUNT_MAX:
        raise UsageError(f"{len(found)} {what}, and one answer holds {LISTED_COUNT_MAX}", hint=hint)
    return found


def _by_lag(lane: dict[str, Any]) -> tuple[int, str, int]:
    return (-int(lane["lag_count"]), str(lane["name"]), -int(lane["opened_ms"]))


def names_of(reads: Reads, node_ids: Iterable[str]) -> list[str]:
    """Names of nodes, in their order."""
    return [reads.node_name(node_id) for node_id in node_ids]
