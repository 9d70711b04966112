"""`formation account …` and `formation grant …`: keys, delegations and handles of an account, and roles on its VMs.

All of these take effect in the network's one order, so each command waits until what it asked for is final there.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from formation.cli import vm
from formation.cli.command import command, new_group
from formation.cli.completion import complete_vms
from formation.cli.context import Cli
from formation.cli.keystore import Keystore, Signer
from formation.cli.output import Column, Row
from formation.core.errors import ConflictError, DeniedError, NotFoundError, QuorumError, UsageError
from formation.core.units import format_duration, format_size, parse_duration_s

if TYPE_CHECKING:
    from formation.core.event import Event

group = new_group("Accounts: keys, recovery, delegations, handles.")
grant_group = new_group("Roles: who else may do what with a VM.")

_MS_PER_S = 1000
# The node that was asked may follow the voters' word a moment late.
FOLLOW_TIMEOUT_S = 10.0
_FOLLOW_PAUSE_S = 0.1

Account = Annotated[str, typer.Argument(metavar="ACCOUNT", help="An account's id (did:key:…) or handle.")]
Vm = Annotated[str, typer.Argument(metavar="VM", help="Name, id, or unique prefix of an id.", autocompletion=complete_vms)]
Node = Annotated[str, typer.Argument(metavar="NODE", help="A node's name, id or prefix of an id.")]

ACCOUNT_FIELDS = (
    Column("Account", lambda account: str(account["account_id"])),
    Column("Label", lambda account: str(account["label"])),
    Column("Handle", lambda account: str(account["handle"])),
    Column("Key in force", lambda account: _key(account)),
    Column("Recovery key", lambda account: str(account["recovery_key"]) or "none: a lost key is lost for good"),
    Column("Delegations", lambda account: "\n".join(map(_delegation, account["delegations"])) or "none"),
    Column("Uses", lambda account: f"{account['object_count']} objects, {format_size(int(account['size_bytes']))}"),
)
IMPORT_FIELDS = (
    Column("Account", lambda account: str(account["account_id"])),
    Column("Key in force", lambda account: str(account["key"])),
    Column("Recovery key", lambda account: str(account["recovery_key"]) or "none"),
    Column("As of", lambda account: f"height {account['root_height']} of the root"),
)
GRANT_COLUMNS = (
    Column("ACCOUNT", lambda grant: str(grant["account_id"]), whole=True),
    Column("HANDLE", lambda grant: str(grant["handle"])),
    Column("ROLE", lambda grant: str(grant["role"])),
)
_ROLES = Literal["viewer", "operator", "manager"]


@command(group, "show", examples=("formation account show", "formation account show alice -o json"))
def show_account(
    cli: Cli, account: Annotated[str | None, typer.Argument(metavar="[ACCOUNT]", help="Default: this machine's.")] = None
) -> None:
    """Show an account: the key in force, its recovery key, what it delegated, what it uses."""
    account_id = own_id(cli) if account is None else find_account(cli, account)
    shown = account_record(cli, account_id)
    cli.out.record(shown, ACCOUNT_FIELDS, name="account_id")
    if account is None:
        _hint_keys(cli, shown)


@command(
    group,
    "rotate",
    examples=(
        "formation account rotate                                 a new key; the old one signs nothing any more",
        "formation account rotate --recovery-key paper.key        the key was lost or stolen",
    ),
)
def rotate(
    cli: Cli,
    recovery_key: Annotated[
        Path | None, typer.Option("--recovery-key", metavar="FILE", help="Sign with this key, the account's recovery key.")
    ] = None,
    account: Annotated[
        str | None, typer.Option("--account", metavar="ID", help="Which account, where its key file is lost.")
    ] = None,
) -> None:
    """Give the account a new key. All its delegations end. Run it again if it was interrupted: it goes on where it was."""
    from formation.core.event import AccountKeyRotated
    from formation.core.keys import read_key_file

    store = Keystore(cli.path("client.account_key"))
    account_id = account or store.account_id()
    before = account_record(cli, account_id)
    if not store.next_path.exists() or before["key"] != store.next_key().public_key.hex():
        signing = store.key() if recovery_key is None else read_key_file(recovery_key)
        _check_signs(before, signing.public_key.hex(), is_recovery=recovery_key is not None)
        store.remember_id(account_id)
        new_key = store.next_key()
        wish(cli, AccountKeyRotated(new_key=new_key.public_key), account_id, signer=Signer(account_id, signing))
        _await_account(cli, account_id, "key", new_key.public_key.hex())
    store.remember_id(account_id)
    store.finish_rotation()
    _say_account(cli, account_id, f"The account's key is a new one: {store.path}")
    cli.out.hint(f"The old one is void: {store.old_path}. Copies of the key that you keep elsewhere are, too.")


@command(group, "import", examples=("formation account import", "formation account import did:key:z6Mk… -o json"))
def import_account(
    cli: Cli, account: Annotated[str | None, typer.Argument(metavar="[ACCOUNT]", help="Default: this machine's.")] = None
) -> None:
    """Take the account's keys over from the root cell, proven: after a rotation there, in each cell where it matters."""
    from formation.cli.client import segment

    account_id = own_id(cli) if account is None else find_account(cli, account)
    shown = cli.client.post_json(f"/v1/accounts/{segment(account_id)}/import", {})
    cli.out.record(shown, IMPORT_FIELDS, name="account_id")


@command(
    group,
    "recovery",
    examples=(
        "formation account recovery paper.key                     makes the key if there is none; keep it elsewhere",
        "formation account recovery new.key --with paper.key      replace it: only the present one may",
        "formation account recovery --none --with paper.key       remove it",
    ),
)
def set_recovery(
    cli: Cli,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The recovery key.")] = None,
    none: Annotated[bool, typer.Option("--none", help="Have no recovery key.")] = False,
    with_: Annotated[Path | None, typer.Option("--with", metavar="FILE", help="The present recovery key, which signs.")] = None,
) -> None:
    """Name the key that may give the account a new key, should that be lost or stolen."""
    from formation.core.event import AccountRecoverySet
    from formation.core.keys import KeyPair, read_key_file, write_key_file

    if none == (file is not None):
        raise UsageError("give a key file, or --none", hint="formation account recovery FILE")
    store = Keystore(cli.path("client.account_key"))
    account_id = store.account_id()
    before = account_record(cli, account_id)
    if before["recovery_key"] and with_ is None:
        raise DeniedError("only the present recovery key can replace it", hint="formation account recovery FILE --with PRESENT")
    if file is not None and not file.exists():
        write_key_file(file, KeyPair.generate())
    key = b"" if file is None else read_key_file(file).public_key
    signer = store.signer() if with_ is None else Signer(account_id, read_key_file(with_))
    wish(cli, AccountRecoverySet(recovery_key=key), account_id, signer=signer)
    _await_account(cli, account_id, "recovery_key", key.hex())
    _say_account(cli, account_id, "The account has no recovery key now." if file is None else f"The recovery key is {file}.")
    if file is not None:
        cli.out.hint("Keep it where this machine's thief does not find it.")


@command(
    group,
    "delegate",
    examples=(
        "formation account delegate node2 --verb value.put --verb value.counted",
        "formation account delegate node2 --verb vm.desired --prefix vm-abcd --for 24h",
    ),
)
def delegate(
    cli: Cli,
    node: Node,
    verb: Annotated[list[str], typer.Option("--verb", metavar="VERB", help="What it may write; again for more.")],
    prefix: Annotated[str, typer.Option("--prefix", metavar="TEXT", help="Only about objects whose ids begin so.")] = "",
    for_: Annotated[str, typer.Option("--for", metavar="DURATION", help="How long.")] = "720h",
) -> None:
    """Let a node write in the account's name without a signature of each; in place of what it might before."""
    from formation.core.event import EVENT_TYPES, DelegationGiven

    allowed = sorted(cls.verb for cls in EVENT_TYPES if cls.is_delegable)
    for each in verb:
        if each not in allowed:
            raise UsageError(f"{each[:40]!r} cannot be delegated", hint=f"these can: {', '.join(allowed)}")
    account_id = own_id(cli)
    # The end is by the network's time, which an idle network does not move; what is past there is judged as past.
    now_ms = max(int(time.time() * _MS_PER_S), int(account_record(cli, account_id)["spine_time_ms"]))
    expires_ms = now_ms + int(parse_duration_s(for_, what="--for") * _MS_PER_S)
    node_id = _find_node(cli, node)
    event = DelegationGiven(node_id=node_id, verbs=tuple(verb), prefix=prefix, expires_ms=expires_ms)
    wish(cli, event, account_id)
    _say_account(cli, account_id, f"{node} may write {', '.join(verb)} for the account, for {for_}.")


@command(group, "revoke-delegation", examples=("formation account revoke-delegation node2",))
def revoke_delegation(cli: Cli, node: Node) -> None:
    """Take back what a node may write in the account's name."""
    from formation.core.event import DelegationRevoked

    account_id = own_id(cli)
    wish(cli, DelegationRevoked(node_id=_find_node(cli, node)), account_id)
    _say_account(cli, account_id, f"{node} writes nothing for the account any more.")


@command(group, "handle", examples=("formation account handle alice", "formation account handle --release"))
def set_handle(
    cli: Cli,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A DNS label; the first who asks gets it.")] = None,
    release: Annotated[bool, typer.Option("--release", help="Let go of the account's handle.")] = False,
) -> None:
    """Claim the name by which people know the account; one for each account."""
    from formation.core.event import ClaimMade, ClaimReleased
    from formation.core.ids import check_label

    account_id = own_id(cli)
    if release == (name is not None):
        raise UsageError("give a name, or --release", hint="formation account handle NAME")
    handle = account_record(cli, account_id)["handle"]
    if name is not None:
        if handle not in ("", check_label(name, what="NAME")):
            raise ConflictError(f"the account's handle is {handle!r}", hint="formation account handle --release   first")
        wish(cli, ClaimMade(ttl_ms=0), f"handle/{name}")
        _say_account(cli, account_id, f"The account's handle is {name}.")
        return
    if not handle:
        raise NotFoundError("the account has no handle", hint="formation account handle NAME")
    wish(cli, ClaimReleased(), f"handle/{handle}")
    _say_account(cli, account_id, f"{handle} is free for others.")


# ── roles ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@command(grant_group, "give", examples=("formation grant give web alice operator",))
def give(
    cli: Cli,
    vm_: Vm,
    account: Account,
    role: Annotated[_ROLES, typer.Argument(help="viewer reads logs; operator also starts and stops; manager also deletes.")],
) -> None:
    """Give an account a role on a VM, in place of what it had."""
    from formation.core.event import GrantGiven
    from formation.core.grants import Role

    found, account_id = vm.find_vm(cli, vm_), find_account(cli, account)
    wish(cli, GrantGiven(account=account_id, level=int(Role[role.upper()])), str(found["vm_id"]))
    _show_grants(cli, str(found["vm_id"]))


@command(grant_group, "revoke", examples=("formation grant revoke web alice",))
def revoke(cli: Cli, vm_: Vm, account: Account) -> None:
    """Take an account's role on a VM away."""
    from formation.core.event import GrantRevoked

    found, account_id = vm.find_vm(cli, vm_), find_account(cli, account)
    wish(cli, GrantRevoked(account=account_id), str(found["vm_id"]))
    _show_grants(cli, str(found["vm_id"]))


@command(grant_group, "list", examples=("formation grant list web", "formation grant list web -o json"), aliases=("ls",))
def list_grants(cli: Cli, vm_: Vm) -> None:
    """Show who may do what with a VM."""
    _show_grants(cli, str(vm.find_vm(cli, vm_)["vm_id"]))


@command(vm.group, "transfer", examples=("formation vm transfer web alice",))
def transfer(
    cli: Cli, vm_: Vm, account: Account, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False
) -> int:
    """Hand a VM to another account. All roles on it end, yours too."""
    from formation.core.event import OwnershipTransferred

    found, account_id = vm.find_vm(cli, vm_), find_account(cli, account)
    if not yes and cli.is_interactive() and not typer.confirm(f"Give {vm_} to {account_id}?", err=True):
        cli.out.remark("Nothing was changed.")
        return 1
    wish(cli, OwnershipTransferred(to=account_id), str(found["vm_id"]))
    _show_grants(cli, str(found["vm_id"]))
    return 0


def _show_grants(cli: Cli, vm_id: str) -> None:
    shown = cli.client.get(f"/v1/vms/{vm_id}/grants")
    if not cli.out.is_for_people:
        cli.out.record(shown, (), name="vm_id")
        return
    owner = {"account_id": shown["owner"], "handle": shown["owner_handle"], "role": "owner"}
    cli.out.rows([owner, *shown["grants"]], GRANT_COLUMNS, name="account_id")


# ── shared with other commands ──────────────────────────────────────────────────────────────────────────────────────


def own_id(cli: Cli) -> str:
    """This machine's account.

    Raises:
      NotFoundError, UsageError: no usable key.
    """
    return Keystore(cli.path("client.account_key")).account_id()


def find_account(cli: Cli, wanted: str) -> str:
    """The account of this id or handle.

    Raises:
      NotFoundError: nobody has the handle.
    """
    if wanted.startswith("did:key:"):
        return wanted
    for claim in cli.client.rows("/v1/claims", "claims", {"space": "handle"}):
        if claim["key"] == wanted:
            return str(claim["owner"])
    raise NotFoundError(
        f"nobody has the handle {wanted!r}", hint="give the account's id: formation account show, at its owner's"
    )


def account_record(cli: Cli, account_id: str) -> dict[str, Any]:
    """An account as the node shows it."""
    from formation.cli.client import segment

    shown: dict[str, Any] = cli.client.get(f"/v1/accounts/{segment(account_id)}")
    return shown


def wish(cli: Cli, event: Event, object_id: str, *, signer: Signer | None = None) -> dict[str, Any]:
    """Sign what the account wants, hand it over, and come back when it is final (class O) or certified."""
    from formation.cli.follow import send_wish
    from formation.cli.wish import make_wish

    made = make_wish(cli, event, object_id=object_id, signer=signer)
    return send_wish(cli.client, made.wish)


def _await_account(cli: Cli, account_id: str, field: str, value: str) -> None:
    """Wait until the node that we asked shows the change: only then may files follow.

    Raises:
      QuorumError: it does not, for as long as we wait.
    """
    deadline_s = time.monotonic() + FOLLOW_TIMEOUT_S
    while account_record(cli, account_id)[field] != value:
        if time.monotonic() > deadline_s:
            raise QuorumError("handed over, and not final at this node yet", hint="run the same command again, it goes on")
        time.sleep(_FOLLOW_PAUSE_S)


def _check_signs(account: Row, public_key: str, *, is_recovery: bool) -> None:
    wanted = account["recovery_key"] if is_recovery else account["key"]
    if public_key == wanted:
        return
    if is_recovery:
        raise DeniedError("that is not the account's recovery key", hint="formation account show tells which it is")
    raise DeniedError(
        "this machine's key is not the account's any more",
        hint="it was rotated elsewhere: copy the key from there, or --recovery-key FILE",
    )


def _find_node(cli: Cli, wanted: str) -> str:
    from formation.core.ids import pick_by_name_or_prefix

    nodes = cli.client.rows("/v1/nodes", "nodes")
    candidates = [(str(node["node_id"]), str(node["name"])) for node in nodes]
    try:
        return pick_by_name_or_prefix(wanted, candidates=candidates, what="node")
    except NotFoundError as exc:
        raise NotFoundError(exc.message, hint="formation status shows the nodes that are connected") from exc


def _say_account(cli: Cli, account_id: str, text: str) -> None:
    if cli.out.is_for_people:
        cli.out.line(text)
    else:
        cli.out.record(account_record(cli, account_id), (), name="account_id")


def _hint_keys(cli: Cli, account: Row) -> None:
    store = Keystore(cli.path("client.account_key"))
    if store.next_path.exists() and store.next_key().public_key.hex() == account["key"]:
        cli.out.hint("\nA rotation is final and not finished here: formation account rotate")
    elif store.key().public_key.hex() != account["key"]:
        cli.out.hint(f"\nThe key in {store.path} is not in force: it was rotated elsewhere.")


def _key(account: Row) -> str:
    return f"{account['key']}" + ("" if not account["is_rotated"] else "\nrotated: no longer the one that the id is made of")


def _delegation(given: Row) -> str:
    left_s = (int(given["expires_ms"]) - time.time() * _MS_PER_S) / _MS_PER_S
    end = "ended" if given["has_ended"] or left_s <= 0 else f"for {format_duration(left_s)} more"
    about = f" about {given['prefix']}…" if given["prefix"] else ""
    return f"{given['name']}: {', '.join(given['verbs'])}{about}, {end}"
