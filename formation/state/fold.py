"""The final state, and what is certified beyond it.

Theory. The *final state* is a fold over the final order: same order, same state, on every replica, byte for byte; its
items make the state root (`checkpoint`). Class-O operations have their effect here only. What is certified and not yet
covered by the spine lies over it as an *overlay*: per object, the class-C operations that wait, joined to a copy of the
object's cell when somebody looks (`cell`). When the spine covers them they are folded once, and leave the overlay. So an
operation is decoded once, judged once and folded once, whoever reads in between.

Why the overlay may be trusted: cells are joins, so the order in which certified operations arrived does not matter, and
the final order gives the same cell. One thing can take a certified class-C operation back: a revocation (of a role, key or
delegation) of that very actor that the spine ordered before it. Then it is void when final, and the feed says so.

Blocks are folded whole (`apply_block`), for most hold many writes of values by one writer: the delegation under which it
writes is looked up for each run of such writes (`_put_values`), which any other operation ends, since that may change it.
`apply` is the same fold for one operation, and what everything else goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from formation.core.codec import HASH_SIZE_BYTES, Verify, decode, decode_own, encode, verify_ed25519
from formation.core.errors import DecodeError, FormationError, UsageError
from formation.core.event import (
    AccountEvent,
    AccountImported,
    AccountKeyRotated,
    AccountRecoverySet,
    CellEvent,
    CellRecorded,
    CheckpointWanted,
    ClaimEvent,
    ClaimMade,
    ClaimReleased,
    ClaimRenewed,
    ClaimTransferred,
    CommitteeProposed,
    Effect,
    Event,
    NodeAdmitted,
    NodeDismissed,
    OwnershipTransferred,
    RecordKind,
    RootNamed,
    ValuePut,
    ValueRemoved,
    VmClaimed,
    VmDeleted,
    VmDescribed,
    VmGone,
    VmLabelled,
    VmRequested,
    Writer,
)
from formation.core.ids import NetworkId, node_id_of, public_key_of_account, public_key_of_node
from formation.core.intent import LIFETIME_MS
from formation.state.accounts import OTHER_OBJECTS, Accounts, Actor, Intents
from formation.state.cells import Cell, author_of
from formation.state.checkpoint import CHECKPOINT_WANTED_INTERVAL_MS
from formation.state.claims import SPACES, Claims, Lease
from formation.state.crdt import ORValue
from formation.state.judge import Judged
from formation.state.lane import INCARNATION_SIZE_BYTES, LANE_ID_SIZE_BYTES, LaneId, lane_incarnation, lane_key
from formation.state.membership import CommitteeState
from formation.state.network_cells import NetworkCells, cell_name, make_record
from formation.state.overlay import Overlay
from formation.state.quota import Quotas
from formation.state.root_link import OBJECT_ID as ROOT_ID
from formation.state.root_link import RootLink

PLACEMENT = "placement"
NO_SUCH_OBJECT = "no such object"
"""What `Accounts.authorise` says last of all: key and delegation were in order."""
# Expired leases taken away at one height: all of them at any honest load; the rest at the next.
EXPIRE_COUNT_MAX = 65_536
# What a value costs beside its bytes.
VALUE_CHARGE_BYTES = 512
# Lane, number and index of a node's own write; an intent's dot is its digest.
DOT_SIZE_BYTES = LANE_ID_SIZE_BYTES + 8 + 4
CELL_KINDS = (RecordKind.NODE, RecordKind.ACCOUNT, RecordKind.IMAGE, RecordKind.VM, RecordKind.VALUE)
_LANE, _KEY, _SPINE, _ADMITTED, _BURIED, _BANNED = "lane", "key", "spine", "admitted", "buried", "banned"
_DISMISSED = "dismissed"
_BANNED_VOID = "its key is banned: it signed two ways"
# Cells of values that are kept as objects, 1.2 KiB each; an encoded one takes 0.4 and is a cell again in some µs.
HOT_CELL_COUNT_MAX = 65_536
_CELL = {kind.value: f"cell.{kind.value}" for kind in CELL_KINDS}
_VM, _VALUE = RecordKind.VM.value, RecordKind.VALUE.value
_NODE_WRITER, _HOLDER_WRITER, _ACCOUNT_WRITER = Writer.NODE, Writer.HOLDER, Writer.ACCOUNT
_NOTE = Effect.NOTE
_REMOVERS = (ValueRemoved, VmLabelled, VmDescribed)
"""Events that may leave tombstones."""

Item = tuple[str, str]
"""(section, id) of one item of the final state."""


class Ended:
    """Where the final order stands in a lane: number, hash and time of its last block in it."""

    __slots__ = ("hash", "hlc", "seq")

    def __init__(self, seq: int, hash_: bytes, hlc: int) -> None:
        self.seq, self.hash, self.hlc = seq, hash_, hlc


class State:
    """See the module. Everything here is the same on every replica at the same height, but for the overlay."""

    def __init__(
        self,
        committee: CommitteeState,
        *,
        genesis_hash: bytes,
        read_item: Callable[[str, str], bytes | None] = lambda _section, _identity: None,
        verify: Verify = verify_ed25519,
    ) -> None:
        """Begin at the genesis.

        Args:
          genesis_hash: the network's id.
          verify: checks one signature, of what other networks' committees signed.
          read_item: (section, id) → the value that `take_dirty` or `load_items` last gave or took: where cells that are
            seldom asked for are kept, encoded.
        """
        self._read_item = read_item
        self._verify = verify
        self._network_id = NetworkId(genesis_hash)
        self.height = 0
        self.hash = genesis_hash
        self.time_ms = 0
        self.view = 0
        self.epoch = 0
        """View and epoch of the proposal at this height."""
        self.op_count = 0
        """Operations folded since the beginning."""
        self.checkpoint_op_count = 0
        self.checkpoint_time_ms = 0
        """Where the last checkpoint was due."""
        self.is_checkpoint_wanted = False
        """A voter asked for one at this height."""
        self.committee = committee
        self.accounts = Accounts(is_voter=lambda node_id: node_id in committee.committee.node_ids)
        self.intents = Intents()
        self.claims = Claims()
        self.quotas = Quotas()
        self.network_cells = NetworkCells()
        self.root_link = RootLink()
        self._sections = (
            self.accounts,
            self.intents,
            self.claims,
            self.committee,
            self.quotas,
            self.network_cells,
            self.root_link,
        )
        self._intent_ms = 0
        """Time of the height before: what waited through an outage of the spine is judged by the time before it."""
        self.lanes: dict[LaneId, Ended] = {}
        self.closed: dict[bytes, bytes] = {}
        """Key → its newest closed incarnation: it and older ones are never taken again."""
        self.admitted: dict[bytes, str] = {}
        """Keys of nodes that may write and do not vote → the NodeId of the voter that let them in."""
        self.dismissed: dict[bytes, int] = {}
        """Keys of nodes that were admitted → the height at which that ended; the newest of them."""
        self._ended: list[bytes] = []
        """Keys that may not write any more, since somebody last asked."""
        self.banned: dict[bytes, tuple[int, bytes]] = {}
        """Keys that provably signed two ways on the spine → (height, CBOR of the Equivocation)."""
        self._actor = Actor(node_id="")
        self._cells: dict[str, dict[str, Cell | None]] = {kind.value: {} for kind in CELL_KINDS}
        """None: the object is there, and cold: its cell is made again of its item when somebody asks."""
        self._warm: set[str] = set()
        """Values written since the last `cool`, but for those that are dirty."""
        self._dirty: set[Item] = set()
        self._dirty_cells: dict[str, set[str]] = {kind.value: set() for kind in CELL_KINDS}
        """Written since the last `take_cold`."""
        self._cooling: dict[str, set[str]] = {kind.value: set() for kind in CELL_KINDS}
        """Written before that, and not encoded yet."""
        self._buried: dict[tuple[str, str], None] = {}
        """Objects with tombstones."""
        self._overlay = Overlay()
        self._shown: dict[tuple[str, str], tuple[Cell, int]] = {}
        """(cell, how many of the overlay's operations about it are joined to it) of objects that somebody looked at."""
        self._version = 0

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    def final_cell(self, record: RecordKind, object_id: str) -> Cell | None:
        """One object as the final order has it."""
        return self._find(record.value, object_id)

    def cell(self, record: RecordKind, object_id: str, extra: Iterable[Judged] = ()) -> Cell | None:
        """One object as it is certified; with `extra`, joined to observed operations as well."""
        key = (record.value, object_id)
        waiting = self._overlay.of(key)
        more = tuple(extra)
        final = self._find(record.value, object_id)
        if not waiting and not more:
            return final
        shown, joined_count = self._shown.get(key, (None, 0))
        if len(waiting) > joined_count:
            if shown is None:
                shown = Cell() if final is None else final.copy()
            for op in waiting[joined_count:]:
                self._preview(shown, op)
            self._number(shown)
            self._shown[key] = shown, len(waiting)
        if more:
            base = shown if shown is not None else final
            shown = Cell() if base is None else base.copy()
            for op in more:
                self._preview(shown, op)
            self._number(shown)
        return shown

    def _find(self, record: str, object_id: str) -> Cell | None:
        cells = self._cells[record]
        cell = cells.get(object_id)
        if cell is None and object_id in cells:
            raw = self._read_item(_CELL[record], object_id)
            assert raw is not None, "a cold cell has an item"
            cell = cells[object_id] = Cell.load(decode_own(raw))
            self._number(cell)
        return cell

    def cool(self) -> None:
        """Let go of the cells of values that were not written since the last call, if they are many; all have their items."""
        values, dirty = self._cells[_VALUE], self._dirty_cells[_VALUE] | self._cooling[_VALUE]
        if len(values) > HOT_CELL_COUNT_MAX and sum(cell is not None for cell in values.values()) > HOT_CELL_COUNT_MAX:
            for object_id, cell in values.items():
                if cell is not None and object_id not in self._warm and object_id not in dirty:
                    values[object_id] = None
        self._warm = set()

    def object_ids(self, record: RecordKind) -> set[str]:
        """Ids of all objects of a kind, certified ones included."""
        name = record.value
        return set(self._cells[name]) | self._overlay.ids(name)

    def placement(self, vm_id: str) -> Lease | None:
        """The live lease of a VM's placement, by the spine's time."""
        return self.claims.holder(PLACEMENT, vm_id, self.time_ms)

    # ── the overlay ─────────────────────────────────────────────────────────────────────────────────────────────

    def certify(self, block_hash: bytes, ops: Sequence[Judged]) -> None:
        """A block was certified: what is of class C in it shows from now on."""
        self._overlay.add(block_hash, ops)

    def _preview(self, cell: Cell, op: Judged) -> None:
        if not self.void_reason(op, owner=cell.owner):
            cell.join(op, mark=self.time_ms)

    def _number(self, cell: Cell) -> None:
        self._version += 1
        cell.version = self._version

    # ── judging in order ────────────────────────────────────────────────────────────────────────────────────────

    def void_reason(self, op: Judged, *, owner: str | None = None) -> str:
        """Empty, or why an operation has no effect as things stand: the one check for the door, the overlay and the order.

        Args:
          owner: of the object, where it was made by an operation that is not final yet.
        """
        event = op.event
        if op.void or event is None:
            return op.void or "it cannot be read"
        writer = event.writer
        if writer is _NODE_WRITER or writer is _HOLDER_WRITER:
            return ""
        actor = self._actor
        is_delegated = not op.digest and bool(op.account)
        if (
            actor.account_id != op.account
            or actor.node_id != op.node_id
            or actor.key != op.key
            or actor.is_delegated is not is_delegated
        ):
            # Most operations are like the one before.
            actor = self._actor = Actor(node_id=op.node_id, account_id=op.account, key=op.key, is_delegated=is_delegated)
        void = self.accounts.authorise(actor, event, op.object_id, self.time_ms)
        if void == NO_SUCH_OBJECT and owner == op.account:
            return ""
        return void

    def apply_block(self, block_hash: bytes, ops: Sequence[Judged], *, index: int) -> list[str]:
        """Fold a block's operations at this height; what of them was certified leaves the overlay.

        Args:
          index: of the first one inside the height; the others follow.

        Returns:
          For each one empty, or why it is void.
        """
        for key in self._overlay.remove(block_hash, ops):
            # What is shown was joined with it in another order, or in spite of a revocation: it is made anew when asked.
            self._shown.pop(key, None)
        verdicts: list[str] = []
        at = 0
        while at < len(ops):
            op = ops[at]
            end = at
            while end < len(ops) and _is_like_put(ops[end], op):
                end += 1
            if end > at:
                self._put_values(ops[at:end], verdicts)
            else:
                verdicts.append(self.apply(op, index=index + at))
            at = max(end, at + 1)
        return verdicts

    def _put_values(self, ops: Sequence[Judged], verdicts: list[str]) -> None:
        """`apply` of what is written most: writes of values by one node in one account's name, one after the other.

        What is the same for all of them is looked up once, and what has one answer here is not asked at all.
        """
        first = ops[0]
        assert first.event is not None
        account = first.account
        refused, prefix = self.accounts.delegated_prefix(account, first.node_id, first.event, self.time_ms)
        author = author_of(first)
        cells, dirty, shown = self._cells[_VALUE], self._dirty_cells[_VALUE], self._shown
        room = self.quotas.room(account)
        self.op_count += len(ops)
        for op in ops:
            object_id, event = op.object_id, op.event
            assert type(event) is ValuePut
            # Whose value it is has been judged already: its id begins with the account.
            if refused or not object_id.startswith(prefix):
                verdicts.append(refused or OTHER_OBJECTS)
                continue
            content = event.value
            size_bytes = VALUE_CHARGE_BYTES + len(content)
            cell = cells.get(object_id) or self._find(_VALUE, object_id)
            if cell is None or size_bytes > cell.charged:
                # See `_join`.
                growth = size_bytes if cell is None else size_bytes - cell.charged
                void = room.charge(objects=int(cell is None), size_bytes=growth)
                if void:
                    verdicts.append(void)
                    continue
                if cell is None:
                    cell = cells[object_id] = Cell()
                cell.charged = size_bytes
            value = cell.value
            if value is None:
                value = cell.value = ORValue()
            value.put(content, op.stamp, author)
            self._version += 1
            cell.version = self._version
            dirty.add(object_id)
            if shown:
                shown.pop((_VALUE, object_id), None)
            verdicts.append("")
        room.settle()

    def apply(self, op: Judged, *, index: int) -> str:
        """Fold one operation at this height.

        Returns:
          Empty, or why it is void.
        """
        self.op_count += 1
        void = self.void_reason(op)
        if not void and op.digest:
            void = self.intents.check(op.digest, op.expires_ms, self._intent_ms)
        if not void:
            void = self._act(op, index)
        if not void and op.digest:
            self.intents.take(op.digest, op.expires_ms, self._intent_ms)
        return void

    def _act(self, op: Judged, index: int) -> str:
        event = op.event
        assert event is not None
        if event.effect is _NOTE:
            return self._forget_vm(op) if isinstance(event, VmGone) else ""
        if op.is_ordered:
            return self._apply_ordered(op, (self.height, index))
        return self._join(op)

    def _join(self, op: Judged) -> str:
        event = op.event
        assert event is not None
        cells = self._cells[event.record_key]
        cell = cells.get(op.object_id) or self._find(event.record_key, op.object_id)
        if cell is None:
            if event.record_key == _VM and not isinstance(event, VmRequested):
                return "no such vm"
            size_bytes = _charge_of(event)
            void = self.quotas.charge(op.actor, objects=1, size_bytes=size_bytes)
            if not void and isinstance(event, VmRequested):
                void = self.accounts.own(op.object_id, op.account)
                if void:
                    self.quotas.refund(op.actor, objects=1, size_bytes=size_bytes)
            if void:
                return void
            cell = cells[op.object_id] = Cell()
            cell.charged = size_bytes
        elif event.writer is _HOLDER_WRITER:
            if cell.placed is None or cell.placed[0] != op.node_id:
                return "not the holder of the placement"
        elif cell.is_deleted:
            return "the vm is deleted"
        elif event.record_key == _VM and not isinstance(event, VmRequested) and event.writer is _ACCOUNT_WRITER:
            growth = _words_size_bytes(event)
            void = self.quotas.charge(cell.owner, objects=0, size_bytes=growth) if growth else ""
            if void:
                return void
            cell.charged += growth
        elif event.record_key == _VALUE:
            # What a smaller value frees is counted when the key goes: its older writes may still be kept.
            growth = max(0, _charge_of(event) - cell.charged)
            void = self.quotas.charge(op.actor, objects=0, size_bytes=growth) if growth else ""
            if void:
                return void
            cell.charged += growth
        owner = cell.owner
        cell.join(op, mark=self.time_ms)
        if owner:
            # A second creation with the same intent cannot be; an owner changes by a transfer only.
            cell.owner = owner
        if isinstance(event, _REMOVERS) and cell.has_tombstones:
            self._bury_later(event.record_key, op.object_id)
        self._touch(event.record_key, op.object_id, cell)
        return ""

    def _touch(self, record: str, object_id: str, cell: Cell) -> None:
        self._number(cell)
        self._dirty_cells[record].add(object_id)
        if self._shown:
            self._shown.pop((record, object_id), None)

    def _apply_ordered(self, op: Judged, fence: tuple[int, int]) -> str:
        event = op.event
        match event:
            case VmClaimed():
                return self._place(op, event, fence)
            case VmDeleted():
                return self._delete_vm(op)
            case ClaimEvent():
                return self._claim(op, event, fence)
            case AccountEvent():
                return self._apply_account(op, event)
            case AccountImported():
                return self._import_account(op, event)
            case CellEvent():
                return self._keep_cell(op, event, fence)
            case RootNamed():
                return self._name_root(op, event)
            case CheckpointWanted():
                return self._want_checkpoint()
            case CommitteeProposed():
                new = [seat for seat in event.voters if seat.public_key not in self.committee.committee.index_of]
                if any(self.is_banned(seat.public_key) for seat in new):
                    return _BANNED_VOID
                return self.committee.apply(lane_key(op.lane), event, op.object_id, height=self.height)
            case NodeAdmitted():
                return self._admit(op)
            case NodeDismissed():
                return self._dismiss(op)
        raise AssertionError(f"{op.verb} is ordered and nobody's")

    def _place(self, op: Judged, event: VmClaimed, fence: tuple[int, int]) -> str:
        cell = self._find(_VM, op.object_id)
        if cell is None:
            return "no such vm"
        if cell.is_deleted:
            return "the vm is deleted"
        void = self.claims.claim(
            PLACEMENT, op.object_id, op.node_id, ttl_ms=event.ttl_ms, note=event.why, fence=fence, now_ms=self.time_ms
        )
        if void:
            return void
        lease = self.placement(op.object_id)
        assert lease is not None
        if cell.placed is None or cell.placed[3:] != lease.fence:
            # A new grant, also where it goes to who held it before: what the fence guards must not take the old for the new.
            cell.placed = (op.node_id, event.why, op.hlc, *lease.fence)
        self._touch(_VM, op.object_id, cell)
        return ""

    def _delete_vm(self, op: Judged) -> str:
        cell = self._find(_VM, op.object_id)
        if cell is None:
            return "no such vm"
        if cell.is_deleted:
            return "the vm is deleted"
        cell.is_deleted = True
        self.accounts.disown(op.object_id)
        self.quotas.refund(cell.owner, objects=1, size_bytes=cell.charged)
        lease = self.placement(op.object_id)
        if lease is not None:
            self.claims.release(PLACEMENT, op.object_id, lease.owner, now_ms=self.time_ms)
        self._touch(_VM, op.object_id, cell)
        return ""

    def _forget_vm(self, op: Judged) -> str:
        """Its holder has nothing of it left: nobody need be told any more that it is deleted.

        Its id is its intent's digest, and an intent acts once and within ten minutes, so it can never come back.
        """
        cell = self._find(_VM, op.object_id)
        if cell is not None and cell.is_deleted and cell.placed is not None and cell.placed[0] == op.node_id:
            del self._cells[_VM][op.object_id]
            self._shown.pop((_VM, op.object_id), None)
            self._dirty_cells[_VM].add(op.object_id)
        return ""

    def _claim(self, op: Judged, event: ClaimEvent, fence: tuple[int, int]) -> str:
        space, _, key = op.object_id.partition("/")
        now_ms = self.time_ms
        match event:
            case ClaimMade():
                if space == PLACEMENT:
                    return "a vm's placement is claimed by vm.claimed"
                return self.claims.claim(space, key, op.actor, ttl_ms=event.ttl_ms, note=event.note, fence=fence, now_ms=now_ms)
            case ClaimRenewed():
                return self.claims.renew(space, key, op.actor, now_ms=now_ms)
            case ClaimReleased():
                return self.claims.release(space, key, op.actor, now_ms=now_ms)
            case ClaimTransferred():
                if space in SPACES and (
                    SPACES[space].is_of_accounts != event.to.startswith("did:key:") or not self._may_hold(event.to)
                ):
                    return f"{event.to[:64]} cannot hold a key of this space"
                void = self.claims.transfer(space, key, op.actor, to=event.to, fence=fence, now_ms=now_ms)
                if not void and space == PLACEMENT:
                    cell = self._find(_VM, key)
                    if cell is not None:
                        cell.placed = (event.to, "handed over by its holder", op.hlc, *fence)
                        self._touch(_VM, key, cell)
                return void
        raise AssertionError(f"{op.verb} is a claim and nobody's")

    def _may_hold(self, actor: str) -> bool:
        """Whether a name is somebody's: made-up ones would evade the limits that each has."""
        try:
            return (
                self.may_write(public_key_of_node(actor))
                if not actor.startswith("did:key:")
                else bool(public_key_of_account(actor))
            )
        except UsageError:
            return False

    def _want_checkpoint(self) -> str:
        since_ms = self.time_ms - self.checkpoint_time_ms
        if since_ms < CHECKPOINT_WANTED_INTERVAL_MS:
            return f"the last checkpoint (or the beginning) is {since_ms} ms old, {CHECKPOINT_WANTED_INTERVAL_MS} at least"
        self.is_checkpoint_wanted = True
        return ""

    def _name_root(self, op: Judged, event: RootNamed) -> str:
        if op.object_id != ROOT_ID:
            return f"the root's object is {ROOT_ID!r}"
        return self.root_link.name_root(
            lane_key(op.lane), event, committee=self.committee.committee, own=self._network_id, verify=self._verify
        )

    def _import_account(self, op: Judged, event: AccountImported) -> str:
        account_id = op.object_id
        link, accounts = self.root_link, self.accounts
        # The root may hold whatever its voters like; here only what is an account's id gets keys.
        if not accounts.key_in_force(account_id):
            return "not an account id"
        if not link.imported_height(account_id) and accounts.has_own_keys(account_id):
            return "the account's keys were changed here before this network had a root"
        try:
            keys = link.read_import(account_id, event, verify=self._verify)
        except FormationError as exc:
            return exc.message
        if not link.imported_height(account_id):
            # The carrier's, not the account's: one that has used its quota up must be able to change its key.
            void = self.quotas.charge(op.node_id, objects=1, size_bytes=IMPORT_CHARGE_BYTES)
            if void:
                return void
        accounts.adopt(account_id, key=keys.key, recovery_key=keys.recovery_key)
        link.note_import(account_id, keys)
        return ""

    def _keep_cell(self, op: Judged, event: CellEvent, fence: tuple[int, int]) -> str:
        """Give, renew or free a cell's name; that the account owns it was asked before (`Accounts.authorise`)."""
        name = cell_name(op.object_id)
        known = self.network_cells.get(name)
        if not isinstance(event, CellRecorded):
            if known is None:
                return "no such cell"
            self.network_cells.remove(name)
            self.accounts.disown(op.object_id)
            self.quotas.refund(op.account, objects=1, size_bytes=known.charged)
            return ""
        if known is None and self.network_cells.is_full:
            return "the root holds as many cells as it may"
        try:
            record = make_record(event, known, fence=fence, verify=self._verify)
        except FormationError as exc:
            return exc.message
        growth = record.charged - (0 if known is None else known.charged)
        void = self.quotas.charge(op.account, objects=int(known is None), size_bytes=growth)
        if void:
            return void
        if known is None:
            void = self.accounts.own(op.object_id, op.account)
            assert not void
        self.network_cells.put(name, record)
        return ""

    def _hand_cell_over(self, op: Judged, event: OwnershipTransferred, charged: int) -> str:
        void = self.quotas.move(op.account, to=event.to, objects=1, size_bytes=charged)
        if void:
            return void
        void = self.accounts.apply(op.account, event, op.object_id, self.time_ms)
        if void:
            self.quotas.move(event.to, to=op.account, objects=1, size_bytes=charged)
        return void

    def _apply_account(self, op: Judged, event: AccountEvent) -> str:
        if self.root_link.root is not None and isinstance(event, AccountKeyRotated | AccountRecoverySet):
            return "keys are changed in the root cell: do it there, then formation account import"
        if isinstance(event, OwnershipTransferred):
            record = self.network_cells.get(cell_name(op.object_id))
            if record is not None:
                return self._hand_cell_over(op, event, record.charged)
        cell = self._find(_VM, op.object_id)
        if isinstance(event, OwnershipTransferred) and cell is not None and not cell.is_deleted:
            void = self.quotas.move(cell.owner, to=event.to, objects=1, size_bytes=cell.charged)
            if void:
                return void
            void = self.accounts.apply(op.account, event, op.object_id, self.time_ms)
            if void:
                self.quotas.move(event.to, to=cell.owner, objects=1, size_bytes=cell.charged)
                return void
            cell.owner = event.to
            self._touch(_VM, op.object_id, cell)
            return ""
        return self.accounts.apply(op.account, event, op.object_id, self.time_ms)

    def _admit(self, op: Judged) -> str:
        key = public_key_of_node(op.object_id)
        if key in self.committee.committee.index_of:
            return "it votes already"
        if self.is_banned(key):
            return _BANNED_VOID
        if len(self.admitted) >= ADMITTED_COUNT_MAX:
            return f"{ADMITTED_COUNT_MAX} nodes are admitted already"
        self.admitted[key] = op.node_id
        self._dirty.add((_ADMITTED, op.object_id))
        if self.dismissed.pop(key, None) is not None:
            self._dirty.add((_DISMISSED, op.object_id))
        return ""

    def _dismiss(self, op: Judged) -> str:
        key = public_key_of_node(op.object_id)
        if self.admitted.pop(key, None) is None:
            return "it is not admitted"
        self._dirty.add((_ADMITTED, op.object_id))
        self._ended.append(key)
        self.dismissed[key] = self.height
        self._dirty.add((_DISMISSED, op.object_id))
        if len(self.dismissed) > DISMISSED_COUNT_MAX:
            oldest = min(self.dismissed, key=lambda each: (self.dismissed[each], each))
            del self.dismissed[oldest]
            self._dirty.add((_DISMISSED, node_id_of(oldest)))
        return ""

    # ── heights ─────────────────────────────────────────────────────────────────────────────────────────────────

    def begin_height(self, *, height: int, hash_: bytes, time_ms: int, view: int, epoch: int) -> None:
        """The next proposal is final: its time is the time of everything it covers."""
        assert height == self.height + 1
        assert time_ms >= self.time_ms
        self._intent_ms = self.time_ms
        self.is_checkpoint_wanted = False
        if height == 1:
            # The first checkpoint is counted from here: the spine has no time before.
            self.checkpoint_time_ms = self._intent_ms = time_ms
        self.height, self.hash, self.time_ms, self.view, self.epoch = height, hash_, time_ms, view, epoch
        self.claims.expire(time_ms, EXPIRE_COUNT_MAX)
        self.intents.forget(self._intent_ms, EXPIRE_COUNT_MAX)
        self._dirty.add((_SPINE, ""))

    def end_lane(self, lane: LaneId, *, seq: int, hash_: bytes, hlc: int) -> None:
        """The order has reached this block of a lane."""
        self.lanes[lane] = Ended(seq, hash_, hlc)
        self._dirty.add((_LANE, lane.hex()))

    def close_lane(self, lane: LaneId) -> None:
        """The lane is closed; older incarnations of its key with it."""
        key, incarnation = lane_key(lane), lane_incarnation(lane)
        if self.closed.get(key, b"") < incarnation:
            self.closed[key] = incarnation
            self._dirty.add((_KEY, key.hex()))
        for ended in [each for each in self.lanes if lane_key(each) == key and each <= lane]:
            del self.lanes[ended]
            self._dirty.add((_LANE, ended.hex()))

    def is_closed(self, lane: LaneId) -> bool:
        """Whether the lane takes nothing any more."""
        return lane_incarnation(lane) <= self.closed.get(lane_key(lane), bytes(INCARNATION_SIZE_BYTES))

    def may_write(self, public_key: bytes) -> bool:
        """Whether a node of this key may have lanes."""
        return self.is_member(public_key) and public_key not in self.banned

    def is_member(self, public_key: bytes) -> bool:
        """Whether the key votes or was admitted."""
        return public_key in self.committee.committee.index_of or public_key in self.admitted

    def is_banned(self, public_key: bytes) -> bool:
        """Whether the final order has banned the key."""
        return public_key in self.banned

    def ban(self, public_key: bytes, evidence: bytes) -> bool:
        """The order shows that a key signed two ways: it writes nothing any more. Others than members are nobody's concern.

        Returns:
          Whether that is news.
        """
        if not self.is_member(public_key) or self.is_banned(public_key):
            return False
        self.banned[public_key] = (self.height, evidence)
        self._dirty.add((_BANNED, public_key.hex()))
        self._ended.append(public_key)
        return True

    def has_written(self, public_key: bytes) -> bool:
        """Whether the right of this key to write has ended, by a ban or a dismissal that is remembered."""
        return public_key in self.banned or public_key in self.dismissed

    def take_ended(self) -> tuple[bytes, ...]:
        """Keys that may not write any more, since the last call."""
        ended, self._ended = tuple(key for key in self._ended if not self.may_write(key)), []
        return ended

    def note_checkpoint(self) -> None:
        """A checkpoint is due at this height: the next is counted from here, and what nothing can need any more goes."""
        self._bury()
        self.checkpoint_op_count, self.checkpoint_time_ms = self.op_count, self.time_ms
        self._dirty.add((_SPINE, ""))

    def _bury(self) -> None:
        """Drop settled tombstones; the same on every replica, for it happens at the same heights over the same cells."""
        for record, object_id in sorted(self._buried):
            cell = self._find(record, object_id)
            if cell is not None and cell.forget(self._is_settled):
                del self._cells[record][object_id]
                self._shown.pop((record, object_id), None)
                owner = object_id.partition("/")[0] if record == _VALUE else cell.owner
                self.quotas.refund(owner, objects=1, size_bytes=cell.charged)
                self._dirty_cells[record].add(object_id)
            elif cell is not None:
                self._touch(record, object_id, cell)
            if cell is None or not cell.has_tombstones:
                del self._buried[record, object_id]
                self._dirty.add((_BURIED, f"{record}/{object_id}"))

    def _bury_later(self, record: str, object_id: str) -> None:
        if (record, object_id) not in self._buried:
            self._buried[record, object_id] = None
            self._dirty.add((_BURIED, f"{record}/{object_id}"))

    def _is_settled(self, dot: bytes, mark: int) -> bool:
        if len(dot) == HASH_SIZE_BYTES:
            return mark + 2 * LIFETIME_MS < self.time_ms
        lane, seq = LaneId(dot[:LANE_ID_SIZE_BYTES]), int.from_bytes(dot[LANE_ID_SIZE_BYTES : LANE_ID_SIZE_BYTES + 8], "big")
        if len(dot) != DOT_SIZE_BYTES or self.is_closed(lane):
            return True
        ended = self.lanes.get(lane)
        return ended is not None and ended.seq >= seq

    # ── items: state root, snapshots ────────────────────────────────────────────────────────────────────────────

    @property
    def warm_count(self) -> int:
        """Cells written since the last `take_cold` or `take_dirty`."""
        return sum(map(len, self._dirty_cells.values()))

    def take_dirty(self) -> dict[Item, bytes | None]:
        """Items that changed since the last call, encoded; None: gone."""
        items = {item: self._encode(*item) for item in self._dirty}
        self._dirty = set()
        for record, ids in self._dirty_cells.items():
            ids |= self._cooling[record]
            self._encode_cells(record, ids, items)
            self._dirty_cells[record], self._cooling[record] = set(), set()
        for section in self._sections:
            for identity in section.dirty:
                value = section.dump(identity)
                items[section.name, identity] = None if value is None else encode(value)
            section.dirty.clear()
        return items

    def take_cold(self) -> dict[Item, bytes | None]:
        """As `take_dirty`, but for what was written since the last call of this: it is most likely to be written again.

        So a cell is encoded when it has been left alone from one call to the next, and one that is written at every height
        once for each checkpoint.
        """
        items: dict[Item, bytes | None] = {}
        for record, ids in self._dirty_cells.items():
            self._encode_cells(record, self._cooling[record] - ids, items)
            self._dirty_cells[record], self._cooling[record] = set(), ids
        return items

    def _encode_cells(self, record: str, ids: set[str], items: dict[Item, bytes | None]) -> None:
        name, cells = _CELL[record], self._cells[record]
        for object_id in ids:
            cell = cells.get(object_id)
            items[name, object_id] = None if cell is None else cell.encoded()
        if record == _VALUE:
            self._warm |= ids

    def _encode(self, section: str, identity: str) -> bytes | None:
        value: Any
        match section:
            case "spine":
                value = [
                    self.height,
                    self.hash,
                    self.time_ms,
                    self.op_count,
                    self.checkpoint_op_count,
                    self.checkpoint_time_ms,
                    self._intent_ms,
                    self.view,
                    self.epoch,
                ]
            case "lane":
                ended = self.lanes.get(LaneId(bytes.fromhex(identity)))
                value = None if ended is None else [ended.seq, ended.hash, ended.hlc]
            case "key":
                value = self.closed.get(bytes.fromhex(identity))
            case "buried":
                record, _, object_id = identity.partition("/")
                value = True if (record, object_id) in self._buried else None
            case "admitted":
                value = self.admitted.get(public_key_of_node(identity))
            case "dismissed":
                value = self.dismissed.get(public_key_of_node(identity))
            case "banned":
                value = self.banned.get(bytes.fromhex(identity))
            case _:
                cell = self._find(section.removeprefix("cell."), identity)
                value = None if cell is None else cell.dump()
        return None if value is None else encode(value)

    def load_items(self, items: Iterable[tuple[str, str, bytes]]) -> None:
        """Fill an empty state from a snapshot's items (section, id, value).

        Raises:
          DecodeError: an item is not what its section holds.
        """
        sections: Mapping[str, Callable[[str, Any], None]] = {section.name: section.load for section in self._sections}
        for section, identity, raw in items:
            if section.startswith("cell."):
                # Cold: of 200,000 a newcomer needs few at once.
                self._cells[section.removeprefix("cell.")][identity] = None
                continue
            load = sections.get(section)
            value = decode(raw, Any, what=f"snapshot item {section}")
            if load is not None:
                load(identity, value)
            else:
                self._load(section, identity, value)
        for part in self._sections:
            part.dirty.clear()
        self._dirty = set()
        for ids in (*self._dirty_cells.values(), *self._cooling.values()):
            ids.clear()

    def _load(self, section: str, identity: str, value: Any) -> None:
        match section:
            case "spine":
                self.height, self.hash, self.time_ms, self.op_count = value[:4]
                self.checkpoint_op_count, self.checkpoint_time_ms, self._intent_ms, self.view, self.epoch = value[4:]
            case "lane":
                self.lanes[LaneId(bytes.fromhex(identity))] = Ended(*value)
            case "key":
                self.closed[bytes.fromhex(identity)] = value
            case "buried":
                record, _, object_id = identity.partition("/")
                self._buried[record, object_id] = None
            case "admitted":
                self.admitted[public_key_of_node(identity)] = value
            case "dismissed":
                self.dismissed[public_key_of_node(identity)] = value
            case "banned":
                self.banned[bytes.fromhex(identity)] = (value[0], value[1])
            case _:
                raise DecodeError(f"snapshot item of unknown section {section[:40]!r}")


# An item of two keys and one of a height.
IMPORT_CHARGE_BYTES = 512
# More nodes than one committee can take the blocks of; larger networks are cells (design/state section 7).
ADMITTED_COUNT_MAX = 1024
# Of whom lanes may still come to their end; that takes seconds, so these are more than any honest operators dismiss meanwhile.
DISMISSED_COUNT_MAX = 256


def _charge_of(event: Event) -> int:
    """Bytes that an object costs whoever made it, roughly: cell, indices, and its share of the state's tree."""
    # By the very class: msgspec's classes make isinstance a call into Python.
    if type(event) is ValuePut:
        return VALUE_CHARGE_BYTES + len(event.value)
    return 2048


def _is_like_put(op: Judged, first: Judged) -> bool:
    """Whether it is a write of a value under the delegation under which the first one is."""
    return type(op.event) is ValuePut and op.account is first.account and op.account != "" and not op.digest and not op.void


def _words_size_bytes(event: Event) -> int:
    """What labels and descriptions add to a VM's cell."""
    match event:
        case VmLabelled():
            return sum(128 + len(label) for label in event.add) + 128 * len(event.remove) * len(event.seen)
        case VmDescribed():
            return 128 + 4 * len(event.text)
    return 0
