from __future__ import annotations

import pytest

from formation.core.event import (
    AccountKeyRotated,
    AccountRecoverySet,
    AccountRegistered,
    ClaimMade,
    CommitteeProposed,
    DelegationGiven,
    DelegationRevoked,
    Event,
    GrantGiven,
    GrantRevoked,
    ImageHeld,
    NodeAdvertised,
    OwnershipTransferred,
    ValuePut,
    VmBooted,
    VmDeleted,
    VmDesired,
    VmRequested,
)
from formation.core.grants import Role
from formation.core.ids import account_id_of
from formation.state.accounts import (
    DELEGATION_COUNT_MAX,
    DELEGATION_MS_MAX,
    GRANT_COUNT_MAX,
    INTENT_FINAL_MS_MAX,
    Accounts,
    Actor,
    Delegation,
    Intents,
)
from formation.state.quota import Quotas

NODE, OTHER = "12D3KooWone", "12D3KooWtwo"
ANN_KEY, BOB_KEY, NEW_KEY, SAFE_KEY = (bytes([number]) * 32 for number in (1, 2, 3, 4))
ANN, BOB = account_id_of(ANN_KEY), account_id_of(BOB_KEY)
VM = "vm-" + "a" * 16
NOW_MS = 1_000_000
VALUE = ValuePut(value=b"x")


def accounts() -> Accounts:
    made = Accounts(is_voter=lambda node_id: node_id == NODE)
    assert made.own(VM, ANN) == ""
    return made


def signed(account_id: str = ANN, key: bytes = ANN_KEY) -> Actor:
    return Actor(node_id=OTHER, account_id=account_id, key=key)


def delegated(account_id: str = ANN, node_id: str = NODE) -> Actor:
    return Actor(node_id=node_id, account_id=account_id, is_delegated=True)


def ask(made: Accounts, actor: Actor, event: Event | type[Event], object_id: str, now_ms: int = NOW_MS) -> str:
    return made.authorise(actor, event, object_id, now_ms)


def delegate(made: Accounts, *verbs: str, prefix: str = "", expires_ms: int = NOW_MS + 1000, node_id: str = NODE) -> str:
    event = DelegationGiven(node_id=node_id, verbs=verbs or (ValuePut.verb,), prefix=prefix, expires_ms=expires_ms)
    return made.apply(ANN, event, ANN, NOW_MS)


@pytest.mark.parametrize(
    ("actor", "event", "object_id", "void"),
    [
        (Actor(node_id=NODE), ImageHeld, "sha256:0", ""),
        (Actor(node_id=NODE), VmBooted, VM, ""),
        (Actor(node_id=NODE), NodeAdvertised, NODE, ""),
        (Actor(node_id=NODE), NodeAdvertised, OTHER, "a node speaks for itself only"),
        (Actor(node_id=NODE), CommitteeProposed, "epoch/1", ""),
        (Actor(node_id=OTHER), CommitteeProposed, "epoch/1", "not a voter"),
        (Actor(node_id=NODE), ClaimMade, "placement/x", ""),
        (Actor(node_id=NODE), VALUE, f"{ANN}/x", "needs the word of an account"),
        (signed(), ImageHeld, "sha256:0", "not for an account to say"),
        (signed(), CommitteeProposed, "epoch/1", "not for an account to say"),
        (signed(), ClaimMade, "handle/ann", ""),
        (signed(), VALUE, f"{ANN}/x", ""),
        (signed(), VALUE, f"{BOB}/x", "a value belongs to the account that its id begins with"),
        (signed(), VALUE, f"{ANN}/", "a value belongs to the account that its id begins with"),
        (signed(), VALUE, ANN, "a value belongs to the account that its id begins with"),
        (signed(), VALUE, f"{ANN}x/x", "a value belongs to the account that its id begins with"),
        (signed(), AccountRegistered, ANN, ""),
        (signed(), AccountRegistered, BOB, "an account speaks for itself only"),
        (signed(), VmRequested, "vm-" + "b" * 16, ""),
        (signed(), VmRequested, VM, ""),
        (signed(BOB, BOB_KEY), VmRequested, VM, "it belongs to another account"),
        (signed(), VmDeleted, VM, ""),
        (signed(), VmDeleted, "vm-" + "b" * 16, "no such object"),
        (signed(BOB, BOB_KEY), VmDeleted, VM, "needs the role manager on it"),
        (signed(key=BOB_KEY), VmDeleted, VM, "signed by a key that is not in force"),
        (signed(key=b""), VALUE, f"{ANN}/x", "signed by a key that is not in force"),
        (signed("nonsense", b""), VALUE, "nonsense/x", "signed by a key that is not in force"),
        (delegated(), VALUE, f"{ANN}/x", "the account has not delegated anything to this node"),
    ],
)
def test_who_may_do_what(actor: Actor, event: Event | type[Event], object_id: str, void: str) -> None:
    """Each writer by its own rule, without anything granted yet."""
    assert ask(accounts(), actor, event, object_id) == void


def test_roles_include_those_below() -> None:
    """A manager may operate, an operator may not delete, nobody but the owner grants."""
    made = accounts()
    bob = signed(BOB, BOB_KEY)
    assert made.apply(ANN, GrantGiven(account=BOB, level=int(Role.OPERATOR)), VM, NOW_MS) == ""
    assert ask(made, bob, VmDesired, VM) == ""
    assert ask(made, bob, VmDeleted, VM) == "needs the role manager on it"
    assert made.apply(ANN, GrantGiven(account=BOB, level=int(Role.MANAGER)), VM, NOW_MS) == ""
    assert ask(made, bob, VmDeleted, VM) == ""
    assert ask(made, bob, GrantGiven, VM) == "needs the role owner on it"
    assert made.role_of(VM, ANN) is Role.OWNER
    assert made.grants(VM) == ((BOB, Role.MANAGER),)
    assert made.apply(ANN, GrantRevoked(account=BOB), VM, NOW_MS) == ""
    assert ask(made, bob, VmDesired, VM) == "needs the role operator on it"
    assert made.apply(ANN, GrantRevoked(account=BOB), VM, NOW_MS) == "it has no role on this"


def test_void_grants() -> None:
    """To the owner, to nobody, on nothing, beyond the limit."""
    made = accounts()
    assert made.grant(VM, ANN, Role.VIEWER) == "the owner needs no role"
    assert made.grant(VM, "nobody", Role.VIEWER) == "not an account id"
    assert made.grant("nothing", BOB, Role.VIEWER) == "no such object"
    assert made.revoke("nothing", BOB) == "it has no role on this"
    for number in range(GRANT_COUNT_MAX):
        assert made.grant(VM, account_id_of(bytes([9, number]) * 16), Role.VIEWER) == ""
    assert made.grant(VM, BOB, Role.VIEWER) == "64 accounts have a role on it already, the limit"
    assert made.grant(VM, account_id_of(bytes([9, 0]) * 16), Role.MANAGER) == ""


def test_a_transfer_leaves_the_old_owner_and_its_friends_nothing() -> None:
    """Ownership and all roles end."""
    made = accounts()
    carol = account_id_of(NEW_KEY)
    made.grant(VM, carol, Role.MANAGER)
    assert made.transfer(VM, "nobody") == "not an account id"
    assert made.transfer(VM, ANN) == "it owns that already"
    assert made.transfer("nothing", BOB) == "no such object"
    assert made.apply(ANN, OwnershipTransferred(to=BOB), VM, NOW_MS) == ""
    assert made.role_of(VM, BOB) is Role.OWNER
    assert ask(made, signed(BOB, BOB_KEY), VmDeleted, VM) == ""
    assert ask(made, signed(), VmDesired, VM) != ""
    assert made.role_of(VM, carol) is None


def test_an_object_is_owned_once_until_it_is_gone() -> None:
    """And then nobody has a role on it."""
    made = accounts()
    assert made.own(VM, ANN) == ""
    assert made.own(VM, BOB) == "it belongs to another account"
    made.disown(VM)
    made.disown(VM)
    assert made.role_of(VM, ANN) is None
    assert made.grants(VM) == ()
    assert made.dump(f"object/{VM}") is None


def test_a_delegated_node_writes_what_was_delegated() -> None:
    """These verbs, below this prefix, at this node, until its end."""
    made = accounts()
    assert delegate(made, ValuePut.verb, VmDesired.verb, prefix=f"{ANN}/app/") == ""
    assert ask(made, delegated(), VALUE, f"{ANN}/app/x") == ""
    assert ask(made, delegated(), VALUE, f"{ANN}/x") == "the delegation is for other objects"
    assert ask(made, delegated(node_id=OTHER), VALUE, f"{ANN}/app/x") == "the account has not delegated anything to this node"
    assert ask(made, delegated(), VmDeleted, VM) == "vm.deleted is not delegated to this node"
    assert ask(made, delegated(), VALUE, f"{ANN}/app/x", NOW_MS + 999) == ""
    assert ask(made, delegated(), VALUE, f"{ANN}/app/x", NOW_MS + 1000) == "the delegation has ended"
    assert delegate(made, VmDesired.verb) == ""
    assert ask(made, delegated(), VmDesired, VM) == ""
    assert ask(made, delegated(), VALUE, f"{ANN}/app/x") == "value.put is not delegated to this node"
    assert made.apply(ANN, DelegationRevoked(node_id=NODE), ANN, NOW_MS) == ""
    assert made.apply(ANN, DelegationRevoked(node_id=NODE), ANN, NOW_MS) == "no delegation to this node"
    assert ask(made, delegated(), VmDesired, VM) != ""


def test_a_delegation_gives_no_role_that_the_account_has_not() -> None:
    """A node in Ann's name may do to Bob's things what Ann may."""
    made = accounts()
    made.transfer(VM, BOB)
    delegate(made, VmDesired.verb)
    assert ask(made, delegated(), VmDesired, VM) == "needs the role operator on it"


def test_keys_and_roles_cannot_be_delegated() -> None:
    """Whatever the delegation says."""
    made = accounts()
    events = (AccountKeyRotated, AccountRecoverySet, GrantGiven, GrantRevoked, OwnershipTransferred, DelegationGiven)
    delegate(made, *(event.verb for event in events), DelegationRevoked.verb)
    for event in (*events, DelegationRevoked):
        assert ask(made, delegated(), event, ANN) == f"{event.verb} is not delegated to this node"


def test_void_delegations() -> None:
    """Ended before it began, too long, or one too many; ended ones make room."""
    made = accounts()
    assert delegate(made, expires_ms=NOW_MS) == "the delegation has ended before it began"
    assert "at most" in delegate(made, expires_ms=NOW_MS + DELEGATION_MS_MAX + 1)
    assert not made.delegations(ANN)
    for number in range(DELEGATION_COUNT_MAX):
        assert delegate(made, node_id=f"node{number:02}", expires_ms=NOW_MS + 1 + number) == ""
    assert delegate(made) == "the account has 64 delegations already, the limit"
    assert delegate(made, node_id="node63") == ""
    given = Delegation(frozenset({"value.put"}), "", NOW_MS + 5000)
    assert made.delegate(ANN, NODE, given, NOW_MS + 2) == ""
    assert [node for node, _ in made.delegations(ANN)] == [NODE, *(f"node{number:02}" for number in range(2, 64))]


def test_after_a_rotation_the_old_key_does_nothing() -> None:
    """And what it delegated is gone with it."""
    made = accounts()
    delegate(made)
    assert ask(made, signed(), AccountKeyRotated, ANN) == ""
    assert made.apply(ANN, AccountKeyRotated(new_key=NEW_KEY), ANN, NOW_MS) == ""
    assert made.key_in_force(ANN) == NEW_KEY
    for event, object_id in ((VALUE, f"{ANN}/x"), (VmDeleted, VM), (AccountKeyRotated, ANN), (ClaimMade, "handle/a")):
        assert ask(made, signed(), event, object_id) == "signed by a key that is not in force"
        assert ask(made, signed(key=NEW_KEY), event, object_id) == ""
    assert ask(made, delegated(), VALUE, f"{ANN}/x") != ""
    assert made.rotate(ANN, NEW_KEY) == "that key is in force already"


def test_the_recovery_key_rotates_and_replaces_itself_and_nothing_else() -> None:
    """A stolen signing key cannot take it away, so the owner has the last word."""
    made = accounts()
    safe, thief = signed(key=SAFE_KEY), signed()
    assert ask(made, signed(), AccountRecoverySet, ANN) == ""
    assert made.apply(ANN, AccountRecoverySet(recovery_key=SAFE_KEY), ANN, NOW_MS) == ""
    assert made.recovery_key(ANN) == SAFE_KEY
    assert ask(made, thief, AccountRecoverySet, ANN) == "only the recovery key replaces the recovery key"
    assert "may only" in ask(made, safe, VALUE, f"{ANN}/x")
    assert "may only" in ask(made, safe, VmDeleted, VM)
    assert ask(made, safe, AccountRecoverySet, ANN) == ""
    assert ask(made, safe, AccountKeyRotated, ANN) == ""
    assert ask(made, safe, AccountKeyRotated, BOB) == "an account speaks for itself only"
    assert made.rotate(ANN, NEW_KEY) == ""
    assert ask(made, thief, AccountKeyRotated, ANN) == "signed by a key that is not in force"
    assert ask(made, safe, AccountKeyRotated, ANN) == ""


def test_signing_and_recovery_key_stay_apart() -> None:
    """Neither becomes the other."""
    made = accounts()
    assert made.set_recovery(ANN, ANN_KEY) == "the recovery key must stay apart from the signing key"
    assert made.set_recovery(ANN, b"short") == "a key has 32 bytes"
    assert made.set_recovery(ANN, SAFE_KEY) == ""
    assert made.rotate(ANN, SAFE_KEY) == "the recovery key must stay apart from the signing key"


def test_an_account_that_is_as_it_began_takes_no_room() -> None:
    """Equal states have equal bytes, whichever way they were reached."""
    made = accounts()
    assert made.key_in_force(BOB) == BOB_KEY
    assert made.key_in_force("nobody") == b""
    assert made.recovery_key(BOB) == b""
    assert made.delegations(BOB) == ()
    made.set_recovery(ANN, SAFE_KEY)
    assert sorted(made.ids()) == [f"account/{ANN}", f"object/{VM}"]
    assert made.set_recovery(ANN, b"") == ""
    assert made.dump(f"account/{ANN}") is None
    assert made.end_delegation(ANN, NODE) == "no delegation to this node"
    assert [*made.ids()] == [f"object/{VM}"]
    assert made.dirty == {f"account/{ANN}", f"object/{VM}"}


def test_what_is_dumped_can_be_loaded() -> None:
    """Keys, delegations, owners and roles, in one form whatever the order in which they came."""
    made, twin = accounts(), Accounts(is_voter=lambda _: False)
    made.rotate(ANN, NEW_KEY)
    made.set_recovery(ANN, SAFE_KEY)
    for node_id in (OTHER, NODE):
        delegate(made, VmDesired.verb, ValuePut.verb, prefix="vm-", node_id=node_id)
    made.grant(VM, BOB, Role.VIEWER)
    verbs = [ValuePut.verb, VmDesired.verb]
    assert made.dump(f"account/{ANN}") == [
        NEW_KEY,
        SAFE_KEY,
        [[node_id, verbs, "vm-", NOW_MS + 1000] for node_id in (NODE, OTHER)],
    ]
    assert made.dump(f"object/{VM}") == [ANN, [[BOB, 1]]]
    for identity in made.ids():
        value = made.dump(identity)
        assert value is not None
        twin.load(identity, value)
        assert twin.dump(identity) == value
    assert ask(twin, delegated(), VmDesired, VM) == ""


def test_other_events_are_no_matter_of_this_section() -> None:
    """They change nothing here."""
    made = accounts()
    made.dirty.clear()
    assert made.apply(ANN, VALUE, f"{ANN}/x", NOW_MS) == ""
    assert not made.dirty


def test_an_intent_takes_effect_once() -> None:
    """A second copy is void, and once it is forgotten, its age voids it: there is no moment between."""
    intents = Intents()
    digest, expires_ms = b"d" * 32, NOW_MS
    last_ms = expires_ms + INTENT_FINAL_MS_MAX
    assert intents.take(digest, expires_ms, NOW_MS - 5) == ""
    for now_ms in (NOW_MS, last_ms, last_ms + 1, last_ms + 10**9):
        intents.forget(now_ms, 10)
        assert intents.take(digest, expires_ms, now_ms) != ""
    assert not [*intents.ids()]
    assert intents.take(b"e" * 32, expires_ms, last_ms) == ""
    assert intents.take(b"f" * 32, expires_ms, last_ms + 1) == "the intent ended too long ago"


def test_asking_does_not_use_an_intent_up() -> None:
    """The door asks, the final order takes."""
    intents = Intents()
    for _ in range(2):
        assert intents.check(b"d" * 32, NOW_MS, NOW_MS) == ""
    assert not intents.dirty
    assert intents.take(b"d" * 32, NOW_MS, NOW_MS) == ""
    assert intents.check(b"d" * 32, NOW_MS, NOW_MS) == "the intent took effect already"
    assert intents.dirty == {(b"d" * 32).hex()}


def test_intents_are_forgotten_oldest_first_and_as_many_as_told() -> None:
    """The same ones everywhere."""
    intents = Intents()
    for number, expires_ms in enumerate((30, 10, 20)):
        assert intents.take(bytes([number]) * 32, expires_ms, 0) == ""
    late_ms = INTENT_FINAL_MS_MAX + 21
    assert intents.forget(late_ms, 1) == 1
    assert sorted(intents.ids()) == [(b"\0" * 32).hex(), (b"\2" * 32).hex()]
    assert intents.forget(late_ms, 10) == 1
    assert intents.forget(late_ms, 10) == 0
    assert [*intents.ids()] == [(b"\0" * 32).hex()]


def test_loaded_intents_are_forgotten_like_the_others() -> None:
    """Also where one is loaded over itself."""
    intents, twin = Intents(), Intents()
    intents.take(b"d" * 32, NOW_MS, NOW_MS)
    (identity,) = intents.ids()
    value = intents.dump(identity)
    assert value == NOW_MS
    twin.load(identity, value)
    twin.load(identity, value)
    assert twin.forget(NOW_MS + INTENT_FINAL_MS_MAX + 1, 10) == 1
    assert twin.dump(identity) is None


def test_a_quota_refuses_what_is_beyond_it_and_counts_what_goes() -> None:
    """Objects and bytes, each by itself; shrinking is always allowed."""
    quotas = Quotas(object_count_max=2, size_bytes_max=100)
    assert quotas.charge(ANN, objects=1, size_bytes=60) == ""
    assert quotas.charge(ANN, objects=1, size_bytes=41) == "the quota of 100 bytes is used up"
    assert quotas.charge(ANN, objects=1, size_bytes=40) == ""
    assert quotas.charge(ANN, objects=1, size_bytes=0) == "the quota of 2 objects is used up"
    assert quotas.charge(ANN, objects=0, size_bytes=1) == "the quota of 100 bytes is used up"
    assert quotas.charge(ANN, objects=0, size_bytes=-10) == ""
    assert quotas.used(ANN) == (2, 90)
    quotas.refund(ANN, objects=1, size_bytes=50)
    assert quotas.used(ANN) == (1, 40)
    assert quotas.dirty == {ANN}


def test_a_transfer_needs_room_at_the_receiver() -> None:
    """What it cannot take stays charged to the giver; to oneself it costs nothing."""
    quotas = Quotas(object_count_max=1, size_bytes_max=100)
    quotas.charge(ANN, objects=1, size_bytes=60)
    quotas.charge(BOB, objects=0, size_bytes=50)
    assert quotas.move(ANN, to=BOB, objects=1, size_bytes=60) == "the quota of 100 bytes is used up"
    assert quotas.move(ANN, to=ANN, objects=1, size_bytes=60) == ""
    assert (quotas.used(ANN), quotas.used(BOB)) == ((1, 60), (0, 50))
    quotas.refund(BOB, objects=0, size_bytes=50)
    assert quotas.move(ANN, to=BOB, objects=1, size_bytes=60) == ""
    assert [*quotas.ids()] == [BOB]
    assert quotas.dump(ANN) is None
    twin = Quotas()
    value = quotas.dump(BOB)
    assert value == [1, 60]
    twin.load(BOB, value)
    assert twin.used(BOB) == (1, 60)


def test_refunding_what_was_never_charged_is_our_own_mistake() -> None:
    """It is asserted, not clamped."""
    with pytest.raises(AssertionError):
        Quotas().refund(ANN, objects=1, size_bytes=0)
    with pytest.raises(AssertionError):
        Quotas().refund(ANN, objects=0, size_bytes=1)
