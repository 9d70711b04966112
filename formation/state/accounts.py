"""Accounts: who may do what, judged alike at the door (API), in the certified preview and in the final order.

Rules:
1. `Accounts.authorise` is the one check. It reads only what the final order wrote, so a use and a revocation that were made
   at the same time are judged by their places in that order, on every replica alike. A certified operation of class C is
   void at final if, and only if, a revocation of that very actor (rotation, revoked or ended delegation or grant, transfer,
   deletion) was ordered before it, or its intent took effect through another carrier.
2. An account is named by its first key (did:key) and exists by being named; until it rotates its key, that first key signs.
   After a rotation only the new key does, and every delegation is gone: whoever took the old key may have given some.
3. The recovery key may do two things: rotate the signing key, and replace (or remove) itself. Once there is one, the signing
   key cannot replace it, else a stolen signing key would take the account for good and a recovery key would help against
   loss only. The two are never the same key.
4. An object has one owner. The owner gives other accounts roles on it; a transfer of ownership ends them all.
5. A delegation lets one node (the block's author) write chosen verbs about chosen objects in an account's name until the
   spine's time reaches its end. There is one for each account and node; a newer one replaces it. What decides about keys,
   roles and delegations themselves cannot be delegated (`Event.is_delegable`).
6. An intent takes effect once (`Intents`).

What a node says in its own name is checked here as far as ids go (SELF) and by a hook (VOTER). A status (HOLDER) needs no
check: it is kept under the node that wrote it, and readers look at the holder's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any

from formation.core.errors import UsageError
from formation.core.event import (
    AccountKeyRotated,
    AccountRecoverySet,
    DelegationGiven,
    DelegationRevoked,
    Event,
    GrantGiven,
    GrantRevoked,
    OwnershipTransferred,
    RecordKind,
    Writer,
)
from formation.core.grants import Role
from formation.core.ids import public_key_of_account
from formation.core.intent import LIFETIME_MS

# Nodes that write for one account: more than a cell's committee twice over, and a record of at most 200 KiB.
DELEGATION_COUNT_MAX = 64
# People and services with a role on one VM; a larger group gets an account of its own.
GRANT_COUNT_MAX = 64
# A forgotten delegation ends by itself; renewing one a year is no burden.
DELEGATION_MS_MAX = 366 * 24 * 3600 * 1000
# How long after an intent's end its certified operation may become final. Normally it takes a second or two; a spine that
# stands still for longer voids it. As long as an intent lives, so what is remembered is at most doubled.
INTENT_FINAL_MS_MAX = LIFETIME_MS
# Accounts active at a time in one cell; decoding base58 takes ten times longer than the look-up.
_KEY_CACHE_COUNT_MAX = 8_192

# Enum members are looked up once, not for each operation.
_ACCOUNT, _ANY, _SELF, _VOTER = Writer.ACCOUNT, Writer.ANY, Writer.SELF, Writer.VOTER
_RECORD_ACCOUNT, _RECORD_VALUE = RecordKind.ACCOUNT, RecordKind.VALUE


@dataclass(slots=True, kw_only=True)
class Actor:
    """Whose word an operation is; may be made once for a run of operations of one writer."""

    node_id: str
    """Author of the block that carries it; at the door, the node that would."""
    account_id: str = ""
    """Empty: the node speaks in its own name."""
    key: bytes = b""
    """32-byte key that signed the intent (the caller checked the signature); empty under a delegation."""
    is_delegated: bool = False
    """The node wrote it in the account's name, without a signature of the account."""


@dataclass(frozen=True, slots=True)
class Delegation:
    """What a node may write in an account's name."""

    verbs: frozenset[str]
    prefix: str
    expires_ms: int


@dataclass(slots=True)
class _Account:
    """What differs from an account that is merely named."""

    key: bytes
    recovery_key: bytes = b""
    delegations: dict[str, Delegation] = field(default_factory=dict)
    """By node."""


@dataclass(slots=True)
class _Object:
    owner: str
    grants: dict[str, Role] = field(default_factory=dict)


class Accounts:
    """Keys, recovery keys and delegations by account, owner and grants by object: a section of the final state.

    Ids are `account/ACCOUNT_ID` and `object/OBJECT_ID`. Verdicts are empty, or say why an operation is void.
    """

    __slots__ = ("_accounts", "_is_voter", "_objects", "dirty")

    name = "account"

    def __init__(self, *, is_voter: Callable[[str], bool]) -> None:
        """Args: is_voter: whether a node is of the committee now, by the same final state."""
        self.dirty: set[str] = set()
        """Ids that changed since the owner cleared it."""
        self._is_voter = is_voter
        self._accounts: dict[str, _Account] = {}
        self._objects: dict[str, _Object] = {}

    def authorise(self, actor: Actor, event: Event | type[Event], object_id: str, now_ms: int) -> str:
        """Whether this actor may do this, at this time of the spine.

        Whether `object_id` fits the event is the caller's to check; whether it is the account's own is checked here.

        Returns:
          Empty, or why not.
        """
        writer = event.writer
        account_id = actor.account_id
        if not account_id:
            if writer is _ACCOUNT:
                return "needs the word of an account"
            if writer is _SELF and object_id != actor.node_id:
                return "a node speaks for itself only"
            if writer is _VOTER and not self._is_voter(actor.node_id):
                return "not a voter"
            return ""
        if writer is not _ACCOUNT and writer is not _ANY:
            return "not for an account to say"
        account = self._accounts.get(account_id)
        if actor.is_delegated:
            void = _void_delegated(account, actor.node_id, event, object_id, now_ms)
        else:
            void = _void_key(account, account_id, actor.key, event)
        if void or writer is _ANY:
            return void
        if event.role is not None:
            return self._void_role(account_id, event.role, object_id)
        record = event.record
        if record is _RECORD_VALUE:
            # An account id holds no slash, so the first one ends it.
            is_own = object_id.startswith(account_id) and 0 < object_id.find("/") == len(account_id) < len(object_id) - 1
            return "" if is_own else "a value belongs to the account that its id begins with"
        if record is _RECORD_ACCOUNT:
            return "" if object_id == account_id else "an account speaks for itself only"
        return self._void_made(account_id, object_id)

    def apply(self, account_id: str, event: Event, object_id: str, now_ms: int) -> str:
        """Apply what `authorise` allowed, if the event is one of this section; any other is no matter of ours."""
        match event:
            case AccountKeyRotated():
                return self.rotate(account_id, event.new_key)
            case AccountRecoverySet():
                return self.set_recovery(account_id, event.recovery_key)
            case DelegationGiven():
                given = Delegation(frozenset(event.verbs), event.prefix, event.expires_ms)
                return self.delegate(account_id, event.node_id, given, now_ms)
            case DelegationRevoked():
                return self.end_delegation(account_id, event.node_id)
            case GrantGiven():
                return self.grant(object_id, event.account, Role(event.level))
            case GrantRevoked():
                return self.revoke(object_id, event.account)
            case OwnershipTransferred():
                return self.transfer(object_id, event.to)
        return ""

    def key_in_force(self, account_id: str) -> bytes:
        """The 32-byte key that signs for an account; empty if it is no account's id."""
        account = self._accounts.get(account_id)
        return _first_key(account_id) if account is None else account.key

    def recovery_key(self, account_id: str) -> bytes:
        """The 32-byte recovery key; empty: none."""
        account = self._accounts.get(account_id)
        return b"" if account is None else account.recovery_key

    def delegations(self, account_id: str) -> tuple[tuple[str, Delegation], ...]:
        """(node id, delegation), by node; ended ones included until their place is needed."""
        account = self._accounts.get(account_id)
        return () if account is None else tuple(sorted(account.delegations.items()))

    def role_of(self, object_id: str, account_id: str) -> Role | None:
        """An account's role on an object."""
        known = self._objects.get(object_id)
        if known is None:
            return None
        return Role.OWNER if known.owner == account_id else known.grants.get(account_id)

    def grants(self, object_id: str) -> tuple[tuple[str, Role], ...]:
        """(account, role) of those who are not the owner, by account."""
        known = self._objects.get(object_id)
        return () if known is None else tuple(sorted(known.grants.items()))

    def own(self, object_id: str, account_id: str) -> str:
        """An object was made by this account."""
        void = self._void_made(account_id, object_id)
        if not void and object_id not in self._objects:
            self._objects[object_id] = _Object(account_id)
            self.dirty.add(_object_item(object_id))
        return void

    def disown(self, object_id: str) -> None:
        """An object is gone, and who had a role on it."""
        if self._objects.pop(object_id, None) is not None:
            self.dirty.add(_object_item(object_id))

    def rotate(self, account_id: str, new_key: bytes) -> str:
        """Another key signs for the account; all its delegations end."""
        if new_key == self.key_in_force(account_id):
            return "that key is in force already"
        if new_key == self.recovery_key(account_id):
            return "the recovery key must stay apart from the signing key"
        account = self._account(account_id)
        account.key = new_key
        account.delegations.clear()
        self._settle(account_id, account)
        return ""

    def set_recovery(self, account_id: str, recovery_key: bytes) -> str:
        """Name the recovery key (32 bytes), or none (empty)."""
        if len(recovery_key) not in (0, 32):
            return "a key has 32 bytes"
        if recovery_key == self.key_in_force(account_id):
            return "the recovery key must stay apart from the signing key"
        account = self._account(account_id)
        account.recovery_key = recovery_key
        self._settle(account_id, account)
        return ""

    def delegate(self, account_id: str, node_id: str, given: Delegation, now_ms: int) -> str:
        """Let a node write in the account's name, in place of what it might before."""
        if given.expires_ms <= now_ms:
            return "the delegation has ended before it began"
        if given.expires_ms > now_ms + DELEGATION_MS_MAX:
            return f"a delegation lasts at most {DELEGATION_MS_MAX} ms"
        account = self._account(account_id)
        held = account.delegations
        if node_id not in held and len(held) >= DELEGATION_COUNT_MAX:
            for ended in [each for each, old in held.items() if old.expires_ms <= now_ms]:
                del held[ended]
            if len(held) >= DELEGATION_COUNT_MAX:
                return f"the account has {DELEGATION_COUNT_MAX} delegations already, the limit"
        held[node_id] = given
        self._settle(account_id, account)
        return ""

    def end_delegation(self, account_id: str, node_id: str) -> str:
        """Take a node's delegation back."""
        account = self._accounts.get(account_id)
        if account is None or account.delegations.pop(node_id, None) is None:
            return "no delegation to this node"
        self._settle(account_id, account)
        return ""

    def grant(self, object_id: str, account_id: str, role: Role) -> str:
        """Give an account a role, in place of what it had."""
        assert role is not Role.OWNER
        known = self._objects.get(object_id)
        if known is None:
            return "no such object"
        if account_id == known.owner:
            return "the owner needs no role"
        if not _first_key(account_id):
            return "not an account id"
        if account_id not in known.grants and len(known.grants) >= GRANT_COUNT_MAX:
            return f"{GRANT_COUNT_MAX} accounts have a role on it already, the limit"
        known.grants[account_id] = role
        self.dirty.add(_object_item(object_id))
        return ""

    def revoke(self, object_id: str, account_id: str) -> str:
        """Take an account's role away."""
        known = self._objects.get(object_id)
        if known is None or known.grants.pop(account_id, None) is None:
            return "it has no role on this"
        self.dirty.add(_object_item(object_id))
        return ""

    def transfer(self, object_id: str, to: str) -> str:
        """Hand an object to another account; roles on it end, and the new owner gives its own."""
        known = self._objects.get(object_id)
        if known is None:
            return "no such object"
        if to == known.owner:
            return "it owns that already"
        # What belongs to nobody's key could never be deleted.
        if not _first_key(to):
            return "not an account id"
        known.owner = to
        known.grants.clear()
        self.dirty.add(_object_item(object_id))
        return ""

    def ids(self) -> Iterable[str]:
        """Ids of all that differs from what a name alone says."""
        yield from map(_account_item, self._accounts)
        yield from map(_object_item, self._objects)

    def dump(self, identity: str) -> list[Any] | None:
        """An account's [key, recovery key, [[node, [verb…], prefix, expires_ms]…]]; an object's [owner, [[account, role]…]]."""
        kind, _, name = identity.partition("/")
        if kind == "account":
            account = self._accounts.get(name)
            if account is None:
                return None
            given = [[node, sorted(d.verbs), d.prefix, d.expires_ms] for node, d in sorted(account.delegations.items())]
            return [account.key, account.recovery_key, given]
        known = self._objects.get(name)
        return None if known is None else [known.owner, [[each, int(role)] for each, role in sorted(known.grants.items())]]

    def load(self, identity: str, value: list[Any]) -> None:
        """Take over what another replica's `dump` gave."""
        kind, _, name = identity.partition("/")
        self.dirty.add(identity)
        if kind == "account":
            key, recovery_key, given = value
            delegations = {node: Delegation(frozenset(verbs), prefix, end_ms) for node, verbs, prefix, end_ms in given}
            self._accounts[name] = _Account(key, recovery_key, delegations)
        else:
            owner, grants = value
            self._objects[name] = _Object(owner, {each: Role(role) for each, role in grants})

    def _account(self, account_id: str) -> _Account:
        return self._accounts.get(account_id) or _Account(_first_key(account_id))

    def _settle(self, account_id: str, account: _Account) -> None:
        """Keep an account only while it differs from one that is merely named, so that equal states have equal bytes."""
        if account.delegations or account.recovery_key or account.key != _first_key(account_id):
            self._accounts[account_id] = account
        else:
            self._accounts.pop(account_id, None)
        self.dirty.add(_account_item(account_id))

    def _void_role(self, account_id: str, role: Role, object_id: str) -> str:
        known = self._objects.get(object_id)
        if known is None:
            return "no such object"
        if known.owner == account_id:
            return ""
        held = known.grants.get(account_id)
        if held is not None and held >= role:
            return ""
        return f"needs the role {role.name.lower()} on it"

    def _void_made(self, account_id: str, object_id: str) -> str:
        known = self._objects.get(object_id)
        return "" if known is None or known.owner == account_id else "it belongs to another account"


class Intents:
    """Intents that took effect: a section of the final state, with digests in hex as ids.

    An intent takes effect at most once, whoever carries it, however often and however late: it is remembered until the
    spine's time passes `expires_ms + INTENT_FINAL_MS_MAX`, and from then on it is refused for its age. Exactness rests on
    these two only; the block's own timestamp, which the author chooses, is not needed. `now_ms` never falls; the caller may
    pass the time of the height *before* the one that it applies, so that what was certified before an outage of the spine
    is judged by the time of before the outage.
    """

    __slots__ = ("_heap", "_seen", "dirty")

    name = "intent"

    def __init__(self) -> None:
        self.dirty: set[str] = set()
        """Ids that changed since the owner cleared it."""
        self._seen: dict[bytes, int] = {}
        """Digest -> expires_ms."""
        self._heap: list[tuple[int, bytes]] = []

    def check(self, digest: bytes, expires_ms: int, now_ms: int) -> str:
        """Empty if the intent may still take effect, or why not."""
        if digest in self._seen:
            return "the intent took effect already"
        return "the intent ended too long ago" if now_ms > expires_ms + INTENT_FINAL_MS_MAX else ""

    def take(self, digest: bytes, expires_ms: int, now_ms: int) -> str:
        """Let the intent (32-byte digest) take effect, once; call it for what is allowed otherwise.

        Returns:
          Empty, or why it may not.
        """
        void = self.check(digest, expires_ms, now_ms)
        if not void:
            self._put(digest, expires_ms)
        return void

    def forget(self, now_ms: int, count_max: int) -> int:
        """Forget what is refused for its age by now, oldest first; called once for each height, with the same limit everywhere.

        Returns:
          How many went, at most `count_max`; the rest goes next time.
        """
        count = 0
        while self._heap and count < count_max and self._heap[0][0] + INTENT_FINAL_MS_MAX < now_ms:
            expires_ms, digest = heappop(self._heap)
            # A load over a known digest leaves two entries.
            if self._seen.get(digest) == expires_ms:
                del self._seen[digest]
                self.dirty.add(digest.hex())
                count += 1
        return count

    def ids(self) -> Iterable[str]:
        """Digests in hex."""
        return (digest.hex() for digest in self._seen)

    def dump(self, identity: str) -> int | None:
        """expires_ms; None: not seen, or forgotten."""
        return self._seen.get(bytes.fromhex(identity))

    def load(self, identity: str, value: int) -> None:
        """Take over what another replica's `dump` gave."""
        self._put(bytes.fromhex(identity), value)

    def _put(self, digest: bytes, expires_ms: int) -> None:
        self._seen[digest] = expires_ms
        heappush(self._heap, (expires_ms, digest))
        self.dirty.add(digest.hex())


def _void_delegated(account: _Account | None, node_id: str, event: Event | type[Event], object_id: str, now_ms: int) -> str:
    given = None if account is None else account.delegations.get(node_id)
    if given is None:
        return "the account has not delegated anything to this node"
    if now_ms >= given.expires_ms:
        return "the delegation has ended"
    if not event.is_delegable or event.verb not in given.verbs:
        return f"{event.verb} is not delegated to this node"
    return "" if object_id.startswith(given.prefix) else "the delegation is for other objects"


def _void_key(account: _Account | None, account_id: str, key: bytes, event: Event | type[Event]) -> str:
    in_force = _first_key(account_id) if account is None else account.key
    recovery_key = b"" if account is None else account.recovery_key
    verb = event.verb
    if key == in_force and key:
        if recovery_key and verb == AccountRecoverySet.verb:
            return "only the recovery key replaces the recovery key"
        return ""
    if key == recovery_key and key:
        if verb in (AccountKeyRotated.verb, AccountRecoverySet.verb):
            return ""
        return "the recovery key may only rotate the signing key or replace itself"
    return "signed by a key that is not in force"


@lru_cache(_KEY_CACHE_COUNT_MAX)
def _first_key(account_id: str) -> bytes:
    """The key that an account id is made of; empty if it is not one."""
    try:
        return public_key_of_account(account_id)
    except UsageError:
        return b""


def _account_item(account_id: str) -> str:
    return f"account/{account_id}"


def _object_item(object_id: str) -> str:
    return f"object/{object_id}"
