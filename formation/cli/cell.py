"""`formation cell …`: other networks by name, reads of their state with proofs, and the root cell that names them."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from formation.cli.account import wish
from formation.cli.command import command, new_group
from formation.cli.context import Cli
from formation.cli.output import Column, Row, to_json_line
from formation.core.errors import EXIT_PENDING, NotFoundError, UnavailableError, UsageError
from formation.core.ids import check_label
from formation.core.units import format_duration, parse_duration_s

if TYPE_CHECKING:
    from formation.core.event import Seat
    from formation.core.manifest import Manifest

group = new_group("Cells: other networks by name, and proven reads of their state.")

_MS_PER_S = 1000
_ROOT = "@root"
# What the API allows when nothing is said (state/cell_reader.py).
_AGE_HELP = "How old the other cell's checkpoint may be; 0: any age. Default: a day."

Name = Annotated[str, typer.Argument(metavar="CELL", help="The cell's name in the root.")]
ServerOption = Annotated[
    list[str] | None,
    typer.Option("--server", metavar="NAME=NODE_ID@MULTIADDR", help="A node that answers; default: the founders."),
]
MaxAge = Annotated[str | None, typer.Option("--max-age", metavar="DURATION", help=_AGE_HELP)]
RootFile = Annotated[
    Path | None, typer.Option("--root", metavar="FILE", help="The root's manifest, where this network has named no root.")
]

CELL_COLUMNS = (
    Column("CELL", lambda cell: str(cell["name"])),
    Column("NETWORK", lambda cell: str(cell["network"])),
    Column("ID", lambda cell: str(cell["network_id"])[:16]),
    Column("EPOCH", lambda cell: str(cell["epoch"])),
    Column("VOTERS", lambda cell: str(len(cell["voters"]))),
    Column("OWNER", lambda cell: str(cell["owner"]), wide=True, whole=True),
    Column("SERVERS", lambda cell: " ".join(cell["servers"]), wide=True, whole=True),
)
CELL_FIELDS = (
    Column("Cell", lambda cell: str(cell["name"])),
    Column("Network", lambda cell: f"{cell['network']}\n{cell['network_id']}"),
    Column("Owner", lambda cell: str(cell["owner"])),
    Column("Committee", lambda cell: f"epoch {cell['epoch']}: {len(cell['voters'])} voters, {cell['quorum_size']} a quorum"),
    Column("Voters", lambda cell: "\n".join(cell["voters"])),
    Column("Servers", lambda cell: "\n".join(cell["servers"])),
    Column("Known", lambda cell: _known(cell)),
)
READ_FIELDS = (
    Column("Cell", lambda found: f"{found['cell']}, network {str(found['network_id'])[:16]}…"),
    Column("Record", lambda found: f"{found['kind']} {found['id']}"),
    Column("Value", lambda found: _value(found)),
    Column("Proof", lambda found: _proof(found["proof"])),
)
ROOT_FIELDS = (
    Column("Root", lambda root: f"{root['network']}\n{root['network_id']}" if root["network_id"] else "not named yet"),
    Column("Committee", lambda root: f"epoch {root['epoch']}: {len(root['voters'])} voters" if root["network_id"] else ""),
    Column("Servers", lambda root: "\n".join(root["servers"])),
    Column("Said so", lambda root: _agreed(root)),
)


@command(
    group,
    "add",
    examples=(
        "formation cell add berlin berlin.toml                            at a node of the root: gives the name, or renews",
        "formation cell add berlin berlin.toml --server b=12D3KooW…@/ip4/192.0.2.7/tcp/4700",
    ),
    aliases=("renew",),
)
def add_cell(
    cli: Cli,
    name: Name,
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The cell's manifest.")],
    server: ServerOption = None,
) -> None:
    """Give a cell a name in this network, which so is its root; or, as its owner, record where it is now and who votes."""
    from formation.core.event import CellRecorded
    from formation.core.manifest import read_manifest

    check_label(name, what="a cell's name")
    found, servers = read_manifest(manifest), tuple(map(_seat, server or ()))
    for links in _links(cli, found, server or [], name):
        event = CellRecorded(manifest=found.to_cbor(), servers=servers, links=links)
        wish(cli, event, f"cell/{name}")
    _show_cell(cli, _cell(cli, name))
    cli.out.hint(f"\nRead from it: formation cell read {name} value ACCOUNT/KEY")


@command(group, "remove", examples=("formation cell remove berlin",), aliases=("rm", "delete"))
def remove_cell(cli: Cli, name: Name) -> None:
    """Let a cell's name go. The cell itself is not touched."""
    from formation.core.event import CellRemoved

    check_label(name, what="a cell's name")
    wish(cli, CellRemoved(), f"cell/{name}")
    if cli.out.is_for_people:
        cli.out.line(f"{name} is no cell's name any more.")
    else:
        cli.out.record({"name": name, "removed": True}, (), name="name")


@command(group, "list", examples=("formation cell list", "formation cell list -o wide"), aliases=("ls",))
def list_cells(cli: Cli) -> None:
    """Show the cells that this node's own network records."""
    rows = cli.client.rows("/v1/cells", "cells")
    cli.out.rows(
        rows, CELL_COLUMNS, name="name", empty="No cells are recorded here. Record one: formation cell add NAME MANIFEST"
    )


@command(group, "show", examples=("formation cell show berlin", "formation cell show berlin -o json"))
def show_cell(cli: Cli, name: Name, max_age: MaxAge = None) -> None:
    """Show a cell: its committee, and where it answers. Elsewhere than in the root, the record is proven against the root."""
    _show_cell(cli, _cell(cli, name, max_age))


@command(
    group,
    "read",
    examples=(
        "formation cell read berlin value did:key:z6Mk…/color",
        "formation cell read berlin claim name/shop.example --max-age 5m",
        "formation cell read @root account did:key:z6Mk… -o json          the root itself",
        "formation cell read berlin vm vm-0011aabb22ccdd33 --root root.toml",
    ),
    aliases=("get",),
)
def read_cell(
    cli: Cli,
    name: Annotated[str, typer.Argument(metavar="CELL", help="The cell's name in the root; @root is the root itself.")],
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="value, claim, account, vm, node, image, cell; or a section of the state.")
    ],
    id_: Annotated[str, typer.Argument(metavar="ID", help="As in the cell: ACCOUNT_ID/KEY, SPACE/KEY, an id.")],
    max_age: MaxAge = None,
    root: RootFile = None,
) -> None:
    """Read one record of another cell, as of its newest checkpoint, and verify it: committees, certificate, Merkle path.

    Exit status 5 if it is proven that there is no such record.
    """
    from formation.core.manifest import read_manifest

    if name != _ROOT:
        check_label(name, what="a cell's name")
    asked: dict[str, Any] = {"cell": name, "kind": kind, "id": id_}
    if max_age is not None:
        asked["max_age_ms"] = _age_ms(max_age)
    if root is not None:
        asked["root_base64"] = base64.b64encode(read_manifest(root).to_cbor()).decode()
    found = cli.client.post_json("/v1/cells/read", asked)
    if not found["is_there"] and cli.out.is_for_people:
        proof = found["proof"]
        raise NotFoundError(
            f"{found['cell']} has no {kind} {id_!r}: proven for height {proof['height']}, {_since(proof)} ago",
            hint="what was written since its newest checkpoint is not seen yet: try again in a minute",
        )
    cli.out.record(found, READ_FIELDS, name="id")
    if not found["is_there"]:
        raise typer.Exit(NotFoundError.exit_status)


@command(
    group,
    "root",
    examples=(
        "formation cell root                                     which root this network has named",
        "formation cell root root.toml                           on each voter's machine: name it, for good",
    ),
)
def root_cell(
    cli: Cli,
    manifest: Annotated[Path | None, typer.Argument(metavar="[MANIFEST]", help="The root's manifest.")] = None,
    server: ServerOption = None,
) -> int:
    """Show this network's root cell, or name it: in force when 2f+1 voters have said the same. Then keys change only there."""
    from formation.core.manifest import read_manifest

    if manifest is None:
        cli.out.record(cli.client.get("/v1/root"), ROOT_FIELDS, name="network_id")
        return 0
    found = read_manifest(manifest)
    said: dict[str, Any] = {"manifest_base64": base64.b64encode(found.to_cbor()).decode(), "servers": server or []}
    for links in _links(cli, found, server or [], _ROOT):
        encoded = [base64.b64encode(link).decode() for link in links]
        shown = cli.client.post_json("/v1/root", said | {"links_base64": encoded})
        if shown["agreed_count"]:
            # Further links follow from the committee that these lead to, when a quorum has said so.
            break
    cli.out.record(shown, ROOT_FIELDS, name="network_id")
    if shown["agreed_count"]:
        left = shown["needed_count"] - shown["agreed_count"]
        cli.out.hint(f"\nOn {left} more voters the operator types the very same: formation cell root {manifest}")
        return EXIT_PENDING
    return 0


def _links(cli: Cli, manifest: Manifest, servers: list[str], name: str) -> list[tuple[bytes, ...]]:
    """The chain to the network's newest committee, in groups for one operation each; one empty group if nobody can be asked."""
    asked = {
        "manifest_base64": base64.b64encode(manifest.to_cbor()).decode(),
        "servers": servers,
        "name": name,
    }
    try:
        groups = cli.client.post_json("/v1/cells/links", asked)["groups"]
    except UnavailableError as exc:
        cli.out.remark(
            f"Its newest committee is not known here, so the founders' or the one recorded before stands: {exc.message}"
        )
        return [()]
    return [tuple(base64.b64decode(link) for link in group) for group in groups] or [()]


def _cell(cli: Cli, name: str, max_age: str | None = None) -> dict[str, Any]:
    from formation.cli.client import segment

    check_label(name, what="a cell's name")
    query = {} if max_age is None else {"max_age_ms": str(_age_ms(max_age))}
    shown: dict[str, Any] = cli.client.get(f"/v1/cells/{segment(name)}", query)
    return shown


def _show_cell(cli: Cli, cell: Row) -> None:
    cli.out.record(cell, CELL_FIELDS, name="name")


def _seat(text: str) -> Seat:
    from formation.core.event import Seat
    from formation.core.ids import public_key_of_node

    name, _, rest = text.partition("=")
    node_id, _, addresses = rest.partition("@")
    if not name or not node_id or not addresses.startswith("/"):
        raise UsageError(f"--server: {text[:120]!r} is no node", hint="write NAME=NODE_ID@/ip4/192.0.2.1/tcp/4700")
    return Seat(name, public_key_of_node(node_id), tuple(addresses.split(",")))


def _age_ms(text: str) -> int:
    return 0 if text == "0" else int(parse_duration_s(text, what="--max-age") * _MS_PER_S)


def _since(proof: Row) -> str:
    return format_duration(int(proof["age_ms"]) / _MS_PER_S)


def _proof(proof: Row) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(proof["time_ms"]) / _MS_PER_S))
    return (
        f"height {proof['height']}, {at} ({_since(proof)} ago)\n"
        f"signed by {len(proof['signers'])} voters of epoch {proof['epoch']}, {proof['quorum_size']} needed\n"
        f"given by {proof['server']}"
    )


def _known(cell: Row) -> str:
    return "final in this network" if cell["proof"] is None else f"by proof of the root\n{_proof(cell['proof'])}"


def _value(found: Row) -> str:
    value = found["value"]
    if value is None:
        return "none, and that is proven"
    if isinstance(value, dict) and value.get("text") is not None:
        return str(value["text"])
    return to_json_line(value)


def _agreed(root: Row) -> str:
    return f"{', '.join(root['agreed'])}: {root['agreed_count']} of {root['needed_count']}" if root["agreed_count"] else ""
