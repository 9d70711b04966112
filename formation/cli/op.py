"""`formation op …`: one operation of the log: how sure it is, who signed it, why it may be void; and a file that proves it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from formation.cli.command import command, new_group
from formation.cli.context import Cli
from formation.cli.events import clock_text
from formation.cli.output import Column, Row
from formation.core.errors import HostError

group = new_group("Single operations: what became of them, and evidence of it.")

Ref = Annotated[
    str,
    typer.Argument(metavar="ID", help="LANE-SEQ-INDEX (`op` of formation events -o json), or the beginning of a trace id."),
]

OP_FIELDS = (
    Column("Operation", lambda op: str(op["op"])),
    Column("Says", lambda op: f"{op['verb']} {op['object_id']}"),
    Column("", lambda op: "\n".join(f"  {key}: {value}" for key, value in op["fields"].items())),
    Column("Written by", lambda op: _writer(op)),
    Column("At", lambda op: clock_text(int(op["at_ms"]))),
    Column("Level", lambda op: _level(op)),
    Column("Acked by", lambda op: _acked(op)),
    Column("Position", lambda op: _position(op)),
    Column("Effect", lambda op: _effect(op), style=lambda op: "red" if op["void"] else ""),
)
EVIDENCE_FIELDS = (
    Column("Network", lambda op: f"{op['network']}\n{op['network_id']}"),
    Column("Operation", lambda op: str(op["op"])),
    Column("Says", lambda op: f"{op['verb']} {op['object_id']}"),
    Column("", lambda op: "\n".join(f"  {key}: {value}" for key, value in op["fields"].items())),
    Column("Written by", lambda op: str(op["node_id"]) + (f"\nfor {op['account']}" if op["account"] else "")),
    Column("Certified", lambda op: _quorum(op["certified"]) or "not proven by this file"),
    Column("Final", lambda op: _final(op)),
    Column("Void", lambda op: str(op["void"]), style=lambda _: "red"),
    Column("So", lambda op: _meaning(op)),
)


@command(
    group,
    "show",
    examples=(
        "formation op show 0011aabb22ccdd33           by the trace id that create and events show",
        "formation op show 8a88e3dd7409f195-17-0      block 17 of a lane, its first operation",
    ),
)
def show_op(cli: Cli, ref: Ref) -> None:
    """Show an operation: writer, level, who acknowledged it, its place in the final order, why it is void."""
    cli.out.record(cli.client.get(f"/v1/ops/{_segment(ref)}"), OP_FIELDS, name="op")


@command(group, "bundle", examples=("formation op bundle 0011aabb22ccdd33 --out op.cborseq",))
def save_bundle(
    cli: Cli,
    ref: Ref,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to; must not exist.")],
) -> None:
    """Write a file that proves an operation's level to anybody, without any node."""
    from formation.cli.state import download

    if out.exists():
        raise HostError(f"{out} is there already", hint="choose another name")
    size_bytes = download(cli, f"/v1/ops/{_segment(ref)}/bundle", out)
    shown = {"path": str(out), "size_bytes": size_bytes}
    cli.out.record(shown, (Column("Wrote", lambda row: f"{row['path']}, {row['size_bytes']} bytes"),), name="path")
    cli.out.hint(f"Check it anywhere: formation op verify {out}")


@command(
    group,
    "verify",
    examples=("formation op verify op.cborseq --manifest network.toml", "formation op verify op.cborseq -o json"),
    common=False,
)
def verify_bundle(
    cli: Cli,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle.")],
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", metavar="FILE", help="The network that it must be of. Without: whatever it says."),
    ] = None,
) -> None:
    """Check a bundle, without any node, and say plainly what it proves."""
    found = import_module("formation.cli.offline").verify_op_file(file, manifest)
    cli.out.record(found, EVIDENCE_FIELDS, name="op")
    if not found["is_checked_against"]:
        cli.out.hint("Whether the network of this id is yours: compare the id, or give --manifest.")


def _segment(ref: str) -> str:
    from formation.cli.client import segment

    return segment(ref)


def _writer(op: Row) -> str:
    text = f"{op['node']} ({op['node_id']})"
    if not op["account"]:
        return text
    how = "under a delegation" if op["is_delegated"] else "by its signed intent"
    return f"{text}\nfor {op['account']}, {how}" + (f", trace {op['trace_id']}" if op["trace_id"] else "")


def _level(op: Row) -> str:
    meaning = {
        "observed": "its block is valid here; no quorum has acknowledged it yet",
        "certified": "a quorum has it on disk, and nothing else can stand in its place; not final yet",
        "final": "it has its place in the one order",
    }
    return f"{op['level']}: {meaning.get(str(op['level']), '')}"


def _acked(op: Row) -> str:
    signers = op["signers"]
    if signers:
        return f"{', '.join(signers)} ({len(signers)}, {op['quorum_size']} make a certificate)"
    return "no acks are kept of it here" if op["level"] == "final" else "nobody yet"


def _position(op: Row) -> str:
    if op["height"]:
        text = f"height {op['height']}, operation {op['final_index']} of it"
        return text + (f"\nfinalised by {', '.join(op['final_signers'])}" if op["final_signers"] else "")
    return "below the checkpoint: no longer known" if op["level"] == "final" else "not final yet"


def _effect(op: Row) -> str:
    if op["void"]:
        return f"none, it is void: {op['void']}"
    if op["level"] == "final":
        return "it took effect" if op["height"] else "no longer known"
    return (
        "when final, in the spine's order" if op["class"] == "O" else "since it was certified, unless a revocation comes first"
    )


def _quorum(quorum: Row | None) -> str:
    if quorum is None:
        return ""
    count = f"{len(quorum['signers'])} of {quorum['voter_count']} voters of epoch {quorum['epoch']}"
    return f"{', '.join(quorum['signers'])}\n{count}, {quorum['quorum_size']} needed"


def _final(op: Row) -> str:
    if op["final"] is None:
        return "not proven by this file"
    return f"at height {op['final_height_max']} or before it\n{_quorum(op['final'])}"


def _meaning(op: Row) -> str:
    proven = []
    if op["certified"] is not None:
        proven.append("a quorum stored this very block: nothing else can ever stand in its place")
    if op["final"] is not None:
        proven.append(f"the final order holds it at height {op['final_height_max']} or before it")
    if op["void"]:
        return "\n".join([*proven, "it is void by itself: it never had an effect"])
    return "\n".join([*proven, "whether it had an effect is not proven: that takes the state (formation op show)"])
