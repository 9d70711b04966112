"""A cell's link to its root: which network that is, and accounts whose keys are taken over from there.

Accounts and global names live in the root cell. Names need no copy: whoever wants to know who holds one reads it there
(`remote_cell`). Keys do: a cell judges the signature of every intent, in its own final order, so it must know which key is in
force without asking anybody. Rules, all judged in the final order by bytes alone:

1. **Which root.** 2f+1 voters of the present committee say the same manifest (`root.named`), as they do for a new committee.
   Once and for all: another root would mean other keys for the same accounts. The same manifest again renews `servers`, and
   shows the root's newest committee by `links`, as in a cell's record (`network_cells`).
2. **Import.** `account.imported` carries what any reader is given (`remote_cell`): links, a certificate of the root's
   committee, the proof of the root's item `account/ACCOUNT_ID`. Anybody who may write may carry it, for it speaks for itself.
   Its effect: key and recovery key of the account are from here on those of the root. If it is proven that the root has no
   such item, the account is back at the key that its id is made of (which is what that absence means there, too).
3. **Only forwards.** The proof's height must be above that of the account's last import. So nobody can bring back a key
   that was rotated away by replaying an older proof. There is no bound on the proof's age: an idle root makes no checkpoints,
   and an old proof as the *first* one gives no more than no proof, since without one the very first key is in force.
4. **Only there.** In a cell with a root, rotating a key or naming a recovery key is void: two places that both may do it
   could not be merged. For an account that had changed its keys in the cell before a root was named, no import counts: else a
   thief of the first key could take the account over through a root where nothing was ever changed.
5. Its delegations end when an import changes the key (as with a rotation): whoever took the old key may have given some.
   Delegations of the root are not taken over: they name nodes, and those of the root are not the cell's.
6. The link remembers the newest committee of the root that an import proved, and begins there next time; older links in an
   import are passed over. A certificate of an older epoch than that is void: carry a newer one.

What it costs: at most 16 links and one certificate, each of at most 21 signatures, once at each replica; in an operation of
at most 64 KiB like any other, from nodes that the voters admitted. A root whose proposal or bucket is larger than that has to
wait for its next checkpoint. What it gives up: between a rotation in the root and the import, the old key still signs in the
cell. Whoever rotates because of a theft therefore imports at once, in each cell where the account matters.

Source: design/state section 7 ("a root cell holds only cell manifests, accounts and global names").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from formation.core.codec import Verify, decode, encode, sha256
from formation.core.errors import DecodeError
from formation.core.event import AccountImported, RootNamed, Seat
from formation.core.ids import PUBLIC_KEY_SIZE_BYTES, NetworkId
from formation.core.manifest import Manifest, parse_manifest
from formation.state.committee import Committee
from formation.state.network_cells import check_servers, dump_seats, load_seats, newer_committee
from formation.state.remote_cell import prove

OBJECT_ID = "root"
ACCOUNT_SECTION = "account"
"""Where the root keeps accounts (`Accounts.name`)."""
_CURRENT, _VOTER, _ACCOUNT = "current", "voter/", "account/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """The root as it is known here."""

    manifest_raw: bytes
    network_id: NetworkId
    committee: Committee
    """The newest that an import proved."""
    servers: tuple[Seat, ...]

    @property
    def manifest(self) -> Manifest:
        """Its signatures were checked when it was named."""
        return parse_manifest(self.manifest_raw, verify=lambda *_: True)

    def addresses(self) -> tuple[Seat, ...]:
        """Where to ask: those that were named, else the founders."""
        founders = (Seat(voter.name, voter.public_key, voter.addresses) for voter in self.manifest.voters)
        return self.servers or tuple(founders)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedKeys:
    """What the root says of an account."""

    height: int
    """Of the root's state."""
    key: bytes
    """32 bytes; empty: the root has no item of it, so its first key is in force."""
    recovery_key: bytes
    committee: Committee
    """Of the root, whose quorum signed."""


def account_item(account_id: str) -> str:
    """The id of the item, in section `account`, that holds an account's keys."""
    return f"{_ACCOUNT}{account_id}"


class RootLink:
    """A section of the final state; ids `current`, `voter/KEY` (who said what) and `account/ACCOUNT_ID` (last import).

    Verdicts are empty, or say why an operation is void.
    """

    __slots__ = ("_heights", "_named", "dirty", "root")

    name = "root"

    def __init__(self) -> None:
        self.dirty: set[str] = set()
        """Ids that changed since the owner of this section cleared it."""
        self.root: Root | None = None
        self._named: dict[bytes, bytes] = {}
        """Voter's key → SHA-256 of what it said."""
        self._heights: dict[str, int] = {}
        """Account → height of the root's state of its last import."""

    def imported_height(self, account_id: str) -> int:
        """Of the root's state of its last import; 0: none."""
        return self._heights.get(account_id, 0)

    def words(self) -> tuple[bytes, ...]:
        """Keys of the voters whose word waits for others to say the same."""
        return tuple(sorted(self._named))

    def name_root(self, voter_key: bytes, event: RootNamed, *, committee: Committee, own: NetworkId, verify: Verify) -> str:
        """A voter's word about the root, in final order. Its later word replaces its earlier one."""
        try:
            root = self._said(event, verify)
        except DecodeError as exc:
            return exc.message
        if root.network_id == own:
            return "a network cannot be its own root"
        for gone in [key for key in self._named if key not in committee.index_of]:
            self._forget(gone)
        self._named[voter_key] = said = sha256(encode([event.manifest, dump_seats(event.servers)]))
        self.dirty.add(_VOTER + voter_key.hex())
        if Counter(self._named.values())[said] < committee.quorum_size:
            return ""
        for key in list(self._named):
            self._forget(key)
        self._set(root)
        return ""

    def _said(self, event: RootNamed, verify: Verify) -> Root:
        """The root as it would be with this word.

        Raises:
          DecodeError: it cannot be.
        """
        manifest = parse_manifest(event.manifest, verify=verify)
        network_id, known = manifest.network_id, Committee(0, tuple(voter.public_key for voter in manifest.voters))
        if self.root is not None:
            if self.root.network_id != network_id:
                raise DecodeError("this network has a root already, for good")
            known = self.root.committee
        check_servers(event.servers)
        committee = newer_committee(known, event.links, verify=verify, network_id=network_id)
        return Root(manifest_raw=event.manifest, network_id=network_id, committee=committee, servers=event.servers)

    def read_import(self, account_id: str, event: AccountImported, *, verify: Verify) -> ImportedKeys:
        """What a proof says of an account; nothing is changed yet.

        Raises:
          DecodeError: nothing that counts here; says why.
        """
        root = self.root
        if root is None:
            raise DecodeError("this network has no root cell")
        committee = newer_committee(root.committee, event.links, verify=verify, network_id=root.network_id)
        found = prove(
            event.checkpoint,
            event.item,
            ACCOUNT_SECTION,
            account_item(account_id),
            committee=committee,
            verify=verify,
            network_id=root.network_id,
        )
        last = self._heights.get(account_id, 0)
        if found.height <= last:
            raise DecodeError(f"the root's state of height {found.height}, and that of height {last} was imported before")
        if found.value is None and not last:
            raise DecodeError("the root knows no more of the account than its id says")
        key, recovery_key = (b"", b"") if found.value is None else _keys_of(found.value)
        return ImportedKeys(height=found.height, key=key, recovery_key=recovery_key, committee=committee)

    def note_import(self, account_id: str, keys: ImportedKeys) -> None:
        """The import had its effect."""
        assert self.root is not None
        self._heights[account_id] = keys.height
        self.dirty.add(account_item(account_id))
        if keys.committee.epoch > self.root.committee.epoch:
            self._set(replace(self.root, committee=keys.committee))

    def ids(self) -> Iterable[str]:
        """All ids."""
        if self.root is not None:
            yield _CURRENT
        yield from (_VOTER + key.hex() for key in self._named)
        yield from map(account_item, self._heights)

    def dump(self, identity: str) -> Any:
        """`current`: [manifest, [epoch, [key…]], [seat…]]; a voter's SHA-256; an account's height; None: nothing."""
        if identity == _CURRENT:
            root = self.root
            if root is None:
                return None
            return [root.manifest_raw, [root.committee.epoch, list(root.committee.voters)], dump_seats(root.servers)]
        if identity.startswith(_VOTER):
            return self._named.get(bytes.fromhex(identity.removeprefix(_VOTER)))
        return self._heights.get(identity.removeprefix(_ACCOUNT))

    def load(self, identity: str, value: Any) -> None:
        """Take over what another replica's `dump` gave."""
        self.dirty.add(identity)
        if identity == _CURRENT:
            raw, (epoch, voters), servers = value
            network_id = parse_manifest(raw, verify=lambda *_: True).network_id
            committee = Committee(epoch, tuple(voters))
            self._set(Root(manifest_raw=raw, network_id=network_id, committee=committee, servers=load_seats(servers)))
        elif identity.startswith(_VOTER):
            self._named[bytes.fromhex(identity.removeprefix(_VOTER))] = value
        else:
            self._heights[identity.removeprefix(_ACCOUNT)] = value

    def _set(self, root: Root) -> None:
        self.root = root
        self.dirty.add(_CURRENT)

    def _forget(self, voter_key: bytes) -> None:
        del self._named[voter_key]
        self.dirty.add(_VOTER + voter_key.hex())


def _keys_of(value: bytes) -> tuple[bytes, bytes]:
    """(key, recovery key) of the root's item of an account.

    Raises:
      DecodeError: not such an item: the root's voters run another version.
    """
    plain = decode(value, list[Any], what="the root's account")
    if len(plain) != 3 or not all(isinstance(key, bytes) for key in plain[:2]):
        raise DecodeError("the root's account is not what this version knows")
    key, recovery_key = plain[0], plain[1]
    if len(key) != PUBLIC_KEY_SIZE_BYTES or len(recovery_key) not in (0, PUBLIC_KEY_SIZE_BYTES):
        raise DecodeError("the root's account has keys of another size")
    return key, recovery_key
