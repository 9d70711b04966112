"""`formation peer …`: whom this node is connected to, how they stand with it, and who is not let in."""

from __future__ import annotations

from typing import Annotated

import typer

from formation.cli.command import command, new_group
from formation.cli.context import Cli
from formation.cli.output import Column, Row
from formation.core.errors import UsageError
from formation.core.units import format_duration

group = new_group("Peers: who is connected, how they behave, and who is not let in.")

PING_COUNT_MAX = 100

Peer = Annotated[str, typer.Argument(metavar="PEER", help="Its name, id or a prefix of that; whole ids of any node.")]

LIST_COLUMNS = (
    Column("PEER", lambda peer: str(peer["name"])),
    Column("NODE", lambda peer: str(peer["node_id"]), whole=True),
    Column("VOTES", lambda peer: "yes" if peer["is_voter"] else "no"),
    Column("IS", lambda peer: _condition(peer), style=lambda peer: _style(peer)),
    Column("SINCE", lambda peer: _duration(peer.get("since_s"))),
    Column("SCORE", lambda peer: f"{peer['score']:.0f}"),
    Column("LAST OFFENCE", lambda peer: str(peer["last_offence"]) or "-"),
    Column("ADDRESSES", lambda peer: ", ".join(peer["addresses"]), wide=True, whole=True),
)
SHOW_FIELDS = (
    Column("Peer", lambda peer: f"{peer['name']}{', votes' if peer['is_voter'] else ''}\n{peer['node_id']}"),
    Column("Is", lambda peer: _connection(peer), style=lambda peer: _style(peer)),
    Column("Addresses", lambda peer: "\n".join(peer["addresses"]) or "none known"),
    Column("Score", lambda peer: _score(peer)),
    Column("Let in", lambda peer: _let_in(peer)),
)


@command(
    group,
    "list",
    examples=(
        "formation peer list",
        "formation peer list --role gpu",
        "formation peer list -o wide",
        "formation peer list --on node2",
    ),
    aliases=("ls",),
    forwarded=True,
)
def list_peers(
    cli: Cli,
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="Those that say that they have it: gpu, ingress, …")] = "",
) -> None:
    """Show known and connected peers, and those that something is held against."""
    peers = cli.client.rows("/v1/peers", "peers", {"role": role} if role else None)
    empty = f"No peer says that it has the role {role}." if role else "No peers."
    cli.out.rows(peers, LIST_COLUMNS, name="node_id", empty=empty)
    if cli.out.is_for_people and peers:
        connected_count = sum(bool(peer["connected"]) for peer in peers)
        cli.out.hint(f"{connected_count} of {len(peers)} connected.")


@command(group, "show", examples=("formation peer show node2", "formation peer show 12D3KooW… -o json"), forwarded=True)
def show_peer(cli: Cli, peer: Peer) -> None:
    """Show where a peer is, and how it stands."""
    cli.out.record(cli.client.get(f"/v1/peers/{_segment(peer)}"), SHOW_FIELDS, name="node_id")


@command(group, "ban", examples=("formation peer ban 12D3KooW…",))
def ban_peer(cli: Cli, peer: Peer) -> None:
    """Have nothing to do with a peer until it is unbanned, also after a restart. Only this node does so."""
    banned = cli.client.post_json(f"/v1/peers/{_segment(peer)}/ban", {})
    if not cli.out.is_for_people:
        cli.out.record(banned, (), name="node_id")
        return
    cli.out.line(f"Banned {banned['name']} here.")
    if banned["is_voter"]:
        cli.out.hint("It votes: without it this node depends on the other voters. For all nodes: formation voter replace")
    cli.out.hint(f"Take it back: formation peer unban {banned['node_id']}")


@command(group, "unban", examples=("formation peer unban 12D3KooW…",))
def unban_peer(cli: Cli, peer: Peer) -> None:
    """Forgive a peer: no ban, and nothing is held against it."""
    freed = cli.client.post_json(f"/v1/peers/{_segment(peer)}/unban", {})
    if not cli.out.is_for_people:
        cli.out.record(freed, (), name="node_id")
        return
    cli.out.line(f"{freed['name']} is not banned any more." if freed["was_banned"] else f"{freed['name']} was not banned.")
    if freed["refused_by"]:
        cli.out.hint(f"It is still not let in: {_let_in(freed)}")


@command(group, "ping", examples=("formation peer ping node2", "formation peer ping node3 --on node2"), forwarded=True)
def ping_peer(
    cli: Cli, peer: Peer, count: Annotated[int, typer.Option("--count", "-n", metavar="COUNT", help="How often.")] = 3
) -> None:
    """Measure how long a peer takes to answer, through the peer-to-peer connection."""
    if count not in range(1, PING_COUNT_MAX + 1):
        raise UsageError(f"--count {count} is not from 1 to {PING_COUNT_MAX}", hint="formation peer ping PEER --count 3")
    answers = []
    for _ in range(count):
        answers.append(cli.client.post_json(f"/v1/peers/{_segment(peer)}/ping", {}))
        if cli.out.is_for_people:
            cli.out.line(f"{answers[-1]['name']}: {answers[-1]['latency_ms']:.1f} ms")
    if not cli.out.is_for_people:
        latencies_ms = [answer["latency_ms"] for answer in answers]
        shown = {"node_id": answers[0]["node_id"], "name": answers[0]["name"], "latencies_ms": latencies_ms}
        cli.out.record(shown, (), name="node_id")


def _segment(peer: str) -> str:
    # Imported late: it brings the HTTP client along, which help does without.
    from formation.cli.client import segment

    return segment(peer)


def _condition(peer: Row) -> str:
    if peer["connected"]:
        return "linked" if peer["linked"] else "connected"
    return {"": "AWAY", "ban": "BANNED", "score": "BANNED"}.get(peer["refused_by"], "REFUSED")


def _style(peer: Row) -> str:
    return "" if peer["connected"] else "red"


def _connection(peer: Row) -> str:
    since = _duration(peer.get("since_s"))
    return _condition(peer) + (f" for {since}" if since != "-" else "")


def _score(peer: Row) -> str:
    count = peer["offence_count"]
    if not count:
        return "0, nothing is held against it"
    times = "1 offence" if count == 1 else f"{count} offences"
    return f"{peer['score']:.1f}, {times}, the last: {peer['last_offence']}"


def _let_in(peer: Row) -> str:
    match peer["refused_by"]:
        case "":
            return "yes"
        case "ban":
            return f"no, banned by hand; formation peer unban {peer['node_id']}"
        case "score":
            left = _duration(peer.get("banned_for_s"))
            return f"no, banned for {left} more by its score; formation peer unban {peer['node_id']}"
        case setting:
            return f"no, by the setting node.{setting}"


def _duration(seconds: object) -> str:
    return format_duration(float(seconds)) if isinstance(seconds, int | float) else "-"
