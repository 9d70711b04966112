"""`formation value …` and `formation claim …`: small facts of one account, and who holds what only one may hold."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from formation.cli.account import find_account, own_id, wish
from formation.cli.command import command, new_group
from formation.cli.context import Cli
from formation.cli.output import Column, Row
from formation.core.errors import NotFoundError, UsageError
from formation.core.units import format_duration

group = new_group("Values: small facts that the account's services share.")
claim_group = new_group("Claims: who holds what only one may hold.")

# What one value may hold (core.event.ValuePut).
VALUE_SIZE_MAX_BYTES = 32 * 1024
_SEEN_COUNT_MAX = 64
_MS_PER_S = 1000

Key = Annotated[str, typer.Argument(metavar="KEY", help="1 to 128 printable letters.")]
Of = Annotated[str | None, typer.Option("--account", metavar="ACCOUNT", help="Another account's: id or handle.")]
At = Annotated[Literal["observed", "certified", "final"], typer.Option("--level", help="How sure it must be.")]

VALUE_COLUMNS = (
    Column("KEY", lambda value: str(value["key"])),
    Column("VALUE", lambda value: _text(value)),
    Column("COUNT", lambda value: str(value["count"]) if value["count"] else ""),
)
VALUE_FIELDS = (
    Column("Key", lambda value: str(value["key"])),
    Column("Value", lambda value: _text(value)),
    Column("Count", lambda value: str(value["count"])),
)
CLAIM_COLUMNS = (
    Column("SPACE", lambda claim: str(claim["space"])),
    Column("KEY", lambda claim: str(claim["key"])),
    Column("HELD BY", lambda claim: str(claim["owner_name"]) or str(claim["owner"])),
    Column("FENCE", lambda claim: ".".join(map(str, claim["fence"]))),
    Column("ENDS", lambda claim: _end(claim)),
    Column("OWNER", lambda claim: str(claim["owner"]), wide=True, whole=True),
    Column("NOTE", lambda claim: str(claim["note"]), wide=True),
)


@command(
    group,
    "put",
    examples=(
        "formation value put color blue",
        "formation value put config --file app.toml",
        "date | formation value put when -",
    ),
    aliases=("set",),
)
def put(
    cli: Cli,
    key: Key,
    text: Annotated[str | None, typer.Argument(metavar="[VALUE]", help="The value; - reads it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Read the value from a file.")] = None,
) -> None:
    """Write a value; returns when it is certified. The latest write is read."""
    from formation.core.event import ValuePut

    if (text is None) == (file is None):
        raise UsageError("give a value, or --file", hint="formation value put KEY VALUE")
    data = _read(text, file)
    if len(data) > VALUE_SIZE_MAX_BYTES:
        raise UsageError(f"a value of {len(data)} bytes, the limit is {VALUE_SIZE_MAX_BYTES}", hint="put large data elsewhere")
    wish(cli, ValuePut(value=data), f"{own_id(cli)}/{_checked(key)}")
    _say(cli, key, f"{key} is written.")


@command(
    group,
    "get",
    examples=("formation value get color", "formation value get color -o json", "formation value get x --level final"),
)
def get(cli: Cli, key: Key, account: Of = None, level: At = "certified") -> None:
    """Print a value as it is, or its count if it has no value."""
    value = _value(cli, _account(cli, account), key, level)
    if not cli.out.is_for_people:
        cli.out.record(value, VALUE_FIELDS, name="key")
        return
    if value["value_base64"] is None:
        cli.out.line(str(value["count"]))
        return
    data = base64.b64decode(value["value_base64"])
    if sys.stdout.isatty():
        # What others wrote must not steer this terminal; a pipe gets the bytes.
        cli.out.line(_text(value))
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@command(group, "list", examples=("formation value list", "formation value list app/ -o json"), aliases=("ls",))
def list_values(
    cli: Cli,
    prefix: Annotated[str, typer.Argument(metavar="[PREFIX]", help="Only keys that begin so.")] = "",
    account: Of = None,
    level: At = "certified",
) -> None:
    """Show an account's values."""
    query = {"account": _account(cli, account), "prefix": prefix, "level": level}
    rows = cli.client.rows("/v1/values", "values", query)
    cli.out.rows(rows, VALUE_COLUMNS, name="key", empty="No values. Write one: formation value put KEY VALUE")


@command(group, "remove", examples=("formation value remove color",), aliases=("rm", "delete"))
def remove(cli: Cli, key: Key) -> None:
    """Remove a value: the writes that this node has seen. One that it has not seen stays."""
    from formation.core.event import ValueRemoved

    account_id = own_id(cli)
    seen = tuple(bytes.fromhex(dot) for dot in _value(cli, account_id, key, "certified")["seen"])
    if not seen:
        raise NotFoundError(
            f"{key!r} has no value to remove, only a count", hint="formation value count KEY -- -N takes it to 0"
        )
    for first in range(0, len(seen), _SEEN_COUNT_MAX):
        wish(cli, ValueRemoved(seen=seen[first : first + _SEEN_COUNT_MAX]), f"{account_id}/{key}")
    if cli.out.is_for_people:
        cli.out.line(f"{key} is removed.")
    else:
        cli.out.record({"key": key, "removed": True}, (), name="key")


@command(
    group,
    "count",
    examples=("formation value count visits", "formation value count visits 5", "formation value count visits -- -5"),
)
def count(
    cli: Cli,
    key: Key,
    delta: Annotated[int, typer.Argument(metavar="[DELTA]", help="What is added; behind -- if negative.")] = 1,
) -> None:
    """Add to a key's counter: additions at different nodes at once all count."""
    from formation.core.event import ValueCounted

    wish(cli, ValueCounted(delta=delta), f"{own_id(cli)}/{_checked(key)}")
    value = _value(cli, own_id(cli), key, "certified")
    if cli.out.is_for_people:
        cli.out.line(str(value["count"]))
    else:
        cli.out.record(value, VALUE_FIELDS, name="key")


@command(
    claim_group, "list", examples=("formation claim list", "formation claim list --space placement -o wide"), aliases=("ls",)
)
def list_claims(
    cli: Cli,
    space: Annotated[
        Literal["placement", "handle", "name", "address", "seat"] | None, typer.Option("--space", help="Only of this space.")
    ] = None,
    owner: Annotated[str | None, typer.Option("--owner", metavar="ID", help="Only what this account or node holds.")] = None,
) -> None:
    """Show what is held now: placements, handles, names, addresses, seats; by whom and since which fence."""
    query = {key: value for key, value in (("space", space), ("owner", owner)) if value}
    cli.out.rows(cli.client.rows("/v1/claims", "claims", query), CLAIM_COLUMNS, name="id", empty="Nothing is claimed.")


def _account(cli: Cli, account: str | None) -> str:
    return own_id(cli) if account is None else find_account(cli, account)


def _value(cli: Cli, account_id: str, key: str, level: str) -> dict[str, Any]:
    value: dict[str, Any] = cli.client.get("/v1/values", {"account": account_id, "key": key, "level": level})
    return value


def _checked(key: str) -> str:
    if not 0 < len(key) <= 128 or not key.isprintable():
        raise UsageError(f"{key[:40]!r} is not a key", hint="1 to 128 printable letters")
    return key


def _read(text: str | None, file: Path | None) -> bytes:
    if text is not None and text != "-":
        return text.encode()
    try:
        if file is None:
            return sys.stdin.buffer.read(VALUE_SIZE_MAX_BYTES + 1)
        with file.open("rb") as source:
            return source.read(VALUE_SIZE_MAX_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"cannot read {file}: {exc.strerror}", hint="check the path") from exc


def _say(cli: Cli, key: str, text: str) -> None:
    if cli.out.is_for_people:
        cli.out.line(text)
    else:
        cli.out.record(_value(cli, own_id(cli), key, "observed"), VALUE_FIELDS, name="key")


def _text(value: Row) -> str:
    if value["value_base64"] is None:
        return ""
    if value["text"] is not None:
        return str(value["text"])
    return f"{len(base64.b64decode(value['value_base64']))} bytes"


def _end(claim: Row) -> str:
    left_ms = claim["left_ms"]
    return "never" if left_ms is None else f"in {format_duration(int(left_ms) / _MS_PER_S)}"
