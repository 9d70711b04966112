"""`formation voter …`: who votes, who may write, and how that changes. For operators of voters, on their own machines."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from formation.cli.command import command, new_group
from formation.cli.context import Cli
from formation.cli.output import Column, Row
from formation.core.errors import EXIT_PENDING, UsageError
from formation.core.units import format_duration

group = new_group("Voters: who keeps the network's word, and how that changes.")

_CHANGE_EXAMPLES = (
    "formation voter add e=12D3KooW…@/ip4/192.0.2.5/tcp/4700 f=… g=…     4 voters become 7",
    "formation voter add e=…,/ip6/2001:db8::5/tcp/4700 f=… g=…           a voter with two addresses",
)
Seats = Annotated[
    list[str], typer.Argument(metavar="NAME=NODE_ID@MULTIADDR...", help="New voters; formation network node-id prints an id.")
]
Force = Annotated[bool, typer.Option("--force", help="Also if the new voters do not run yet.")]

SEAT_COLUMNS = (
    Column("VOTER", lambda seat: str(seat["name"])),
    Column("NODE", lambda seat: str(seat["node_id"]), whole=True),
    Column("ANSWERS", lambda seat: "yes" if seat["online"] else "SILENT", style=lambda seat: "" if seat["online"] else "red"),
    Column("LAST ACK", lambda seat: _age(seat.get("last_ack_age_s"))),
    Column("ADDRESSES", lambda seat: ", ".join(seat.get("addresses") or []), wide=True, whole=True),
)


@command(group, "list", examples=("formation voter list", "formation voter list -o json"), aliases=("ls", "show"))
def list_voters(cli: Cli) -> None:
    """Show the committee, what its operators have proposed, and the nodes that write without a vote."""
    _show(cli, cli.client.get("/v1/voters"))


@command(group, "add", examples=_CHANGE_EXAMPLES)
def add_voters(cli: Cli, seats: Seats, force: Force = False) -> int:
    """Propose more voters: three at once, for n = 3f+1. It is done when 2f+1 voters have said the same."""
    return _propose(cli, add=seats, remove=[], force=force)


@command(group, "remove", examples=("formation voter remove e f g     7 voters become 4",), aliases=("rm",))
def remove_voters(cli: Cli, names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Voters to go.")]) -> int:
    """Propose fewer voters: three at once, for n = 3f+1. It is done when 2f+1 voters have said the same."""
    return _propose(cli, add=[], remove=names, force=False)


@command(
    group,
    "replace",
    examples=(
        "formation voter replace d e=12D3KooW…@/ip4/192.0.2.5/tcp/4700",
        "formation voter replace d d=12D3KooW…@/ip4/198.51.100.7/tcp/4700     the same node, moved",
    ),
)
def replace_voters(
    cli: Cli,
    pairs: Annotated[
        list[str], typer.Argument(metavar="OLD NAME=NODE_ID@MULTIADDR...", help="Who goes, and who comes instead.")
    ],
    force: Force = False,
) -> int:
    """Propose other voters in the places of some. It is done when 2f+1 voters have said the same."""
    if len(pairs) % 2:
        raise UsageError("not pairs of an old voter and a new one", hint="formation voter replace OLD NAME=NODE_ID@MULTIADDR")
    return _propose(cli, add=pairs[1::2], remove=pairs[::2], force=force)


@command(group, "withdraw", examples=("formation voter withdraw",))
def withdraw(cli: Cli) -> None:
    """Take back what this voter has proposed."""
    _show(cli, cli.client.post_json("/v1/voters", {"action": "withdraw"}))


@command(group, "admit", examples=("formation voter admit attic", "formation voter admit 12D3KooW…"))
def admit(
    cli: Cli, node: Annotated[str, typer.Argument(metavar="NODE", help="Its id; or name, once it votes or writes.")]
) -> None:
    """Let a node write that does not vote: run VMs, build images, take requests. One voter's word is enough."""
    _show(cli, cli.client.post_json("/v1/voters", {"action": "admit", "node": node}))


@command(group, "dismiss", examples=("formation voter dismiss attic",))
def dismiss(cli: Cli, node: Annotated[str, typer.Argument(metavar="NODE", help="Name, id or prefix of an id.")]) -> None:
    """Take no more of what an admitted node writes. One voter's word is enough."""
    _show(cli, cli.client.post_json("/v1/voters", {"action": "dismiss", "node": node}))


def _propose(cli: Cli, *, add: list[str], remove: list[str], force: bool) -> int:
    epoch = cli.client.get("/v1/voters")["epoch"]
    wish = {"action": "propose", "add": add, "remove": remove, "force": force}
    voters = cli.client.post_json("/v1/voters", wish)
    _show(cli, voters)
    is_open = voters["epoch"] == epoch and voters["decided"] is None
    return EXIT_PENDING if is_open else 0


def _show(cli: Cli, voters: Row) -> None:
    out = cli.out
    if not out.is_for_people:
        if out.quiet or out.format.value == "name":
            out.rows(voters["seats"], SEAT_COLUMNS, name="node_id")
        else:
            out.record(voters, (), name="epoch")
        return
    out.rows(voters["seats"], SEAT_COLUMNS, name="node_id")
    out.line(f"\nEpoch {voters['epoch']}: {len(voters['seats'])} voters, {voters['quorum_size']} make a quorum.")
    decided = voters.get("decided")
    if decided:
        out.line(f"Decided at height {decided['height']}, under way: {decided['command']}")
    for proposal in voters["proposals"]:
        _show_proposal(cli, proposal)
    if voters["admitted"]:
        names = ", ".join(f"{node['name']} (by {node['by']})" for node in voters["admitted"])
        out.line(f"May write without a vote: {names}")


def _show_proposal(cli: Cli, proposal: dict[str, Any]) -> None:
    agreed, needed = proposal["agreed_count"], proposal["needed_count"]
    cli.out.line(f"Proposed by {', '.join(proposal['by'])} ({agreed} of {needed} needed): {proposal['command']}")
    left = needed - agreed
    if left > 0:
        which = ", ".join(proposal["missing"])
        cli.out.hint(f"On {left} more of {which}, the operator types the very same:\n  {proposal['command']}")


def _age(age_s: object) -> str:
    return f"{format_duration(float(age_s))} ago" if isinstance(age_s, int | float) else "none yet"
