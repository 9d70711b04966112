"""`formation key …`: the keys that sign what an account wants.

The account's own key is where `client.account_key` says; further ones stand beside it in `keys/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from formation.cli.command import command, new_group
from formation.cli.context import Cli
from formation.cli.keystore import Keystore
from formation.cli.output import Column
from formation.core.errors import FormationError

group = new_group("Account keys: make, look at.")

ACCOUNT = "account"
_SUFFIX = ".key"

KEY_COLUMNS = (
    Column("NAME", lambda key: str(key["name"])),
    Column("ACCOUNT", lambda key: str(key["account_id"]) or "unusable", whole=True),
    Column("FILE", lambda key: str(key["path"]), whole=True),
    Column("PROBLEM", lambda key: str(key["problem"]), whole=True),
)
KEY_FIELDS = (
    Column("Name", lambda key: str(key["name"])),
    Column("Account", lambda key: str(key["account_id"])),
    Column("Public key", lambda key: str(key["public_key"])),
    Column("File", lambda key: str(key["path"])),
)

Name = Annotated[str, typer.Argument(metavar="[NAME]", help="Which key; `account` is the one that signs.")]


@command(
    group,
    "new",
    examples=(
        "formation key new                  the account's key, if there is none",
        "formation key new work             a further one",
    ),
)
def new_key(cli: Cli, name: Name = ACCOUNT) -> None:
    """Make a key. An existing one is never overwritten."""
    from formation.core.keys import KeyPair, write_key_file

    path = key_path(cli, name)
    key = KeyPair.generate()
    write_key_file(path, key)
    cli.out.record(_shown(name, path, key), KEY_FIELDS, name="account_id")
    cli.out.hint("\nKeep the file safe: whoever has it is you, and nobody can give it back to you.")
    if name != ACCOUNT:
        cli.out.hint(f"Use it: FORMATION_ACCOUNT_KEY={path} formation …")


@command(group, "list", examples=("formation key list", "formation key list -q"), aliases=("ls",))
def list_keys(cli: Cli) -> None:
    """Show the keys on this machine, and whether they can be used."""
    first = cli.path("client.account_key")
    paths = [(ACCOUNT, first)] if first.exists() else []
    paths += [(path.stem, path) for path in sorted((first.parent / "keys").glob(f"*{_SUFFIX}"))]
    cli.out.rows(
        [_listed(name, path) for name, path in paths], KEY_COLUMNS, name="account_id", empty="No keys yet: formation key new"
    )


@command(group, "show", examples=("formation key show", "formation key show work -o json"))
def show_key(cli: Cli, name: Name = ACCOUNT) -> None:
    """Show a key's public side. The secret is never shown."""
    from formation.core.keys import read_key_file

    path = key_path(cli, name)
    cli.out.record(_shown(name, path, read_key_file(path)), KEY_FIELDS, name="account_id")


def key_path(cli: Cli, name: str) -> Path:
    """Where a key of this name is.

    Raises:
      UsageError: not a name.
    """
    from formation.core.ids import check_label

    account = cli.path("client.account_key")
    return account if name == ACCOUNT else account.parent / "keys" / f"{check_label(name, what='NAME')}{_SUFFIX}"


def _listed(name: str, path: Path) -> dict[str, Any]:
    from formation.core.keys import read_key_file

    try:
        return _shown(name, path, read_key_file(path)) | {"problem": ""}
    except FormationError as error:
        return {"name": name, "account_id": "", "public_key": "", "path": str(path), "problem": error.message}


def _shown(name: str, path: Path, key: Any) -> dict[str, Any]:
    account_id = Keystore(path).account_id() if path.exists() else str(key.account_id)
    return {"name": name, "account_id": account_id, "public_key": key.public_key.hex(), "path": str(path)}
