"""`formation net …`: this node's place in the network."""

from __future__ import annotations

from typing import Any

import typer

from formation.cli.command import command, new_group
from formation.cli.context import Cli
from formation.cli.output import Column, Row
from formation.core.units import format_duration

group = new_group("The network as this node sees it: who can reach it, and how.")

# docs/exit-codes.md.
EXIT_NOT_REACHED = 9
JUST_NOW_S = 2.0

FIELDS = (
    Column("Reached", lambda net: _reached(net), style=lambda net: "" if net["is_reached"] else "red"),
    Column("Listens on", lambda net: "\n".join(net["listen"]) or "nothing"),
    Column("Checked", lambda net: _checked(net)),
    Column("Dialled back", lambda net: "\n".join(_addresses(net)) or "nobody has tried"),
    Column("Seen as", lambda net: "\n".join(address for f in net["families"] for address in f["seen_as"]) or "-"),
    Column("NAT", lambda net: "\n".join(f"{f['family']}: {_nat(f)}" for f in net["families"]) or "unknown: nobody to ask"),
    Column("Relays", lambda net: "\n".join(_relays(net)) or "none"),
    Column("Through relays", lambda net: "\n".join(f"{p['name']}: {p['why']}" for p in net["relayed_peers"]) or "nobody"),
    Column("Is a relay", lambda net: "yes, for others" if net["serves_as_relay"] else "no"),
    Column("Kademlia", lambda net: "answers others (server)" if net["answers_in_kademlia"] else "only asks (client)"),
)


@command(group, "check", examples=("formation net check", "formation net check --last", "formation net check -o json"))
def check(cli: Cli, last: bool = typer.Option(False, "--last", help="What was found last, without asking the peers.")) -> None:
    """Have other nodes try to reach this one, and say what is reached, what is not and why. Ends with 9 if nothing is."""
    net = cli.client.get("/v1/net") if last else cli.client.post_json("/v1/net/check", {})
    cli.out.record(net, FIELDS, name="verdict")
    if cli.out.is_for_people and net["advice"]:
        cli.out.hint(net["advice"][0].upper() + net["advice"][1:] + ".")
    if not net["is_reached"]:
        raise typer.Exit(EXIT_NOT_REACHED)


def _reached(net: Row) -> str:
    if net["verdict"] == "public":
        return "yes, directly"
    if net["relays"]:
        return "yes, through " + ("a relay" if len(net["relays"]) == 1 else f"{len(net['relays'])} relays") + ", not directly"
    return "NO, nobody can connect to this node" if net["verdict"] == "private" else "UNKNOWN, nobody to ask"


def _addresses(net: Row) -> list[str]:
    tried = [f"{each['address']}: {_tried(each)}" for family in net["families"] for each in family["addresses"]]
    return [*tried, *(f"not by {peer['name']}: {peer['why']}" for peer in net["silent_peers"])]


def _tried(each: dict[str, Any]) -> str:
    count = each["ok_count"] + each["failed_count"]
    peers = f"{each['ok_count']} of {count} peer{'' if count == 1 else 's'}"
    return f"reached by {peers}" + (f" ({each['why']})" if each["why"] else "")


def _nat(family: dict[str, Any]) -> str:
    match family["nat"]:
        case "none":
            return "none"
        case "endpoint-independent":
            return "the same port for all peers (endpoint-independent): hole punching is likely to work"
        case "address-dependent":
            return "another port for each peer (address-dependent): no hole punching"
        case _:
            return "unknown: two peers of different networks are needed to tell"


def _checked(net: Row) -> str:
    ago_s = net["checked_ago_s"]
    return "not yet" if ago_s is None else "just now" if ago_s < JUST_NOW_S else f"{format_duration(ago_s)} ago"


def _relays(net: Row) -> list[str]:
    refused = [f"not {peer['name']}: {peer['why']}" for peer in net["relay_refusals"]]
    return [*map(_relay, net["relays"]), *refused]


def _relay(relay: dict[str, Any]) -> str:
    return f"{relay['name']}, its place lasts {format_duration(float(relay['expires_in_s']))} more\n{relay['node_id']}"
