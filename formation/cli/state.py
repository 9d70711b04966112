"""`formation state …`: how the replicated state is, how it differs from a peer's, and files that prove it."""

from __future__ import annotations

import os
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from formation.cli.command import command, new_group
from formation.cli.context import Cli
from formation.cli.output import Column, Row, paint
from formation.core.errors import HostError, UnavailableError
from formation.core.units import format_duration, format_size

group = new_group("The replicated state: how it is, and evidence of it.")

# Checkpoints are a minute apart at least, and a file is sent in seconds: a third miss has another cause.
EXPORT_TRY_COUNT = 3
_CLOCK_AHEAD_WARNING_MS = 500
_MS_PER_S = 1000

Manifest = Annotated[
    Path | None, typer.Option("--manifest", metavar="FILE", help="The network that it must be of. Without: whatever it says.")
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="An export.")]

LANE_COLUMNS = (
    Column("LANE OF", lambda lane: str(lane["name"])),
    Column("LANE", lambda lane: str(lane["lane"]), wide=True, whole=True),
    Column("OPENED", lambda lane: _when(lane["opened_ms"])),
    Column("HEAD", lambda lane: str(lane["head_seq"])),
    Column("CERTIFIED", lambda lane: str(lane["certified_seq"])),
    Column("FINAL", lambda lane: str(lane["final_seq"])),
    Column("LAG", lambda lane: _lag(lane)),
    Column("LANE IS", lambda lane: str(lane["condition"])),
)
DIFF_COLUMNS = (
    Column("LANE OF", lambda lane: str(lane["name"])),
    Column("LANE", lambda lane: str(lane["lane"]), wide=True, whole=True),
    Column("HERE", lambda lane: _head(lane["here"])),
    Column("THERE", lambda lane: _head(lane["there"])),
    Column("BRANCH", lambda lane: "FORKED" if lane["is_forked"] else "same"),
)
CHECKPOINT_FIELDS = (
    Column("Height", lambda made: str(made["height"])),
    Column("Root", lambda made: str(made["root"])),
    Column("Time", lambda made: _when(made["time_ms"])),
)
EVIDENCE_FIELDS = (
    Column("Network", lambda found: f"{found['network']}\n{found['network_id']}"),
    Column("Height", lambda found: str(found["height"])),
    Column("Root", lambda found: str(found["root"])),
    Column("Time", lambda found: _when(found["time_ms"])),
    Column("Signed by", lambda found: _signed(found)),
    Column("Items", lambda found: _items(found)),
)


@command(
    group,
    "status",
    examples=("formation state status", "formation state status -o wide", "formation state status --on node2"),
    forwarded=True,
)
def show_state(cli: Cli) -> None:
    """Show lanes and their lags, the spine, voters, bans, the checkpoint and the disk."""
    state = cli.client.get("/v1/state")
    cli.out.record(state, STATE_FIELDS, name="network_id")
    if not cli.out.is_for_people:
        return
    if state["lanes"]:
        cli.out.line("")
        cli.out.rows(state["lanes"], LANE_COLUMNS, name="lane")
    more = state["lane_count"] - len(state["lanes"])
    if more > 0:
        cli.out.remark(f"and {more} more lanes, which lag less")
    ahead_ms = int(state.get("clock_ahead_ms") or 0)
    if ahead_ms > _CLOCK_AHEAD_WARNING_MS:
        warning = paint("Warning:", "yellow", color=cli.out.color_err)
        cli.out.remark(f"{warning} a block waits {format_duration(ahead_ms / _MS_PER_S)} for its time: some clock is wrong")
        cli.out.hint("Hint: set the clocks by NTP, this machine's and those of the lanes above")


@command(group, "diff", examples=("formation state diff node2", "formation state diff node2 -o json"))
def show_diff(cli: Cli, peer: Annotated[str, typer.Argument(metavar="PEER", help="A node's name, id or prefix.")]) -> int:
    """Compare this node's lanes and heights with a peer's. Exit status 1 if they differ."""
    diff = cli.client.get("/v1/state/diff", {"peer": peer})
    if not cli.out.is_for_people:
        cli.out.record(diff, (), name="is_same")
    else:
        for side in (diff["node"], diff["peer"]):
            cli.out.line(f"{side['name']}: epoch {side['epoch']}, height {side['height']}, view {side['view']}")
        if diff["is_same"]:
            cli.out.line("Nothing differs.")
        elif diff["lanes"]:
            cli.out.line("")
            cli.out.rows(diff["lanes"], DIFF_COLUMNS, name="lane")
        else:
            cli.out.line("All lanes are the same; one has applied more of the final order.")
        if not diff["is_same"]:
            cli.out.hint("\nWhat moves differs for moments; look again.")
    return 0 if diff["is_same"] else 1


@command(group, "checkpoint", examples=("formation state checkpoint",))
def make_checkpoint(cli: Cli) -> None:
    """Make a checkpoint now, on a voter's machine: for a fresh export, or for readers in other cells."""
    cli.out.record(cli.client.post_json("/v1/state/checkpoint", {}), CHECKPOINT_FIELDS, name="root")


@command(group, "export", examples=("formation state export backup.cborseq",))
def export_state(cli: Cli, file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; must not exist.")]) -> None:
    """Write the newest checkpoint to a file that proves itself: all items, and who vouches for them."""
    if file.exists():
        raise HostError(f"{file} is there already", hint="choose another name")
    size_bytes = download(cli, "/v1/state/export", file)
    shown = {"path": str(file), "size_bytes": size_bytes}
    cli.out.record(shown, (Column("Wrote", lambda row: f"{row['path']}, {format_size(int(row['size_bytes']))}"),), name="path")
    cli.out.hint(f"Check it anywhere: formation state verify {file}")


@command(
    group,
    "verify",
    examples=("formation state verify backup.cborseq --manifest network.toml", "formation state verify backup.cborseq -o json"),
    common=False,
)
def verify_state(cli: Cli, file: File, manifest: Manifest = None) -> None:
    """Check an export, without any node: every signature and every hash."""
    found = import_module("formation.cli.offline").verify_state_file(file, manifest)
    cli.out.record(found, EVIDENCE_FIELDS, name="root")
    _hint_trust(cli, found)


@command(
    group,
    "import",
    examples=(
        "formation state import backup.cborseq                       with the node stopped",
        "formation state import backup.cborseq --data-dir /srv/node",
    ),
    common=False,
)
def import_state(
    cli: Cli,
    file: File,
    manifest: Annotated[Path | None, typer.Option("--manifest", metavar="FILE", help="The network's manifest.")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="The stopped node's directory.")] = None,
) -> None:
    """Let a stopped node's state begin with an export. What the node has promised so far is kept."""
    from formation.core.keys import read_key_file

    folder = (data_dir or cli.path("node.data_dir")).expanduser()
    key = read_key_file(folder / "node.key")
    found = import_module("formation.cli.offline").import_state(
        file, data_dir=folder, manifest=manifest or cli.path("node.manifest"), key=key
    )
    cli.out.record(found, (*EVIDENCE_FIELDS, Column("Into", lambda row: str(row["data_dir"]))), name="root")
    cli.out.hint("Next: formation node        it fetches what came after from its peers")


def download(cli: Cli, path: str, file: Path) -> int:
    """A file from the node, whole or not at all; its size in bytes.

    Raises:
      FormationError: the node's own, or it broke off.
      HostError: it cannot be written.
    """
    for left in range(EXPORT_TRY_COUNT - 1, -1, -1):
        try:
            return _download(cli, path, file)
        except UnavailableError:
            # The node stored a newer checkpoint while it sent the one before.
            if left == 0:
                raise
    raise AssertionError("the last try returns or raises")


def _download(cli: Cli, path: str, file: Path) -> int:
    size_bytes = 0
    try:
        # It gets its name when it is whole.
        with tempfile.NamedTemporaryFile("wb", dir=file.absolute().parent, prefix=f".{file.name}.", delete=False) as part:
            try:
                for chunk in cli.client.stream(path):
                    part.write(chunk)
                    size_bytes += len(chunk)
                part.flush()
                os.fsync(part.fileno())
                os.replace(part.name, file)
            except BaseException:
                os.unlink(part.name)
                raise
    except OSError as exc:
        raise HostError(f"cannot write {file}: {exc.strerror or exc}", hint="check the directory, and the disk's room") from exc
    return size_bytes


def _hint_trust(cli: Cli, found: Row) -> None:
    if not found["is_checked_against"]:
        cli.out.hint(
            "It proves what the network of this id agreed on. Whether that is your network: compare the id, or give --manifest."
        )


def _when(at_ms: object) -> str:
    if not isinstance(at_ms, int) or not at_ms:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / _MS_PER_S))


def _lag(lane: Row) -> str:
    count = int(lane["lag_count"])
    return f"{count} in {format_duration(int(lane['lag_ms']) / _MS_PER_S)}" if count else "-"


def _head(row: Any) -> str:
    if row is None:
        return "unknown"
    return f"{row['head_seq']}, certified {row['certified_seq']}" + (", frozen" if row["is_frozen"] else "")


def _signed(found: Row) -> str:
    count = f"{len(found['signers'])} of {found['voter_count']} voters of epoch {found['epoch']}"
    return f"{', '.join(map(str, found['signers']))}\n{count}, {found['quorum_size']} needed"


def _items(found: Row) -> str:
    lines = [f"{found['item_count']}, {format_size(int(found['size_bytes']))}"]
    return "\n".join([*lines, *(f"{count} {section}" for section, count in found["items"].items())])


def _spine_text(state: Row) -> str:
    spine = state["spine"]
    lines = [f"height {spine['height']}, view {spine['view']}, epoch {state['epoch']}, time {_when(spine['time_ms'])}"]
    if spine["is_waiting"] and spine["silent"]:
        lines.append(f"waits for votes of {', '.join(spine['silent'])}")
    return "\n".join(lines)


def _counts_text(state: Row) -> str:
    lines = [
        f"{state['final_count']} final, {state['certified_count']} certified, {state['observed_count']} observed",
        f"{state['uncertified_count']} blocks wait for a quorum, {state['uncovered_count']} certified ones for the spine",
    ]
    return "\n".join(lines)


def _checkpoint_text(state: Row) -> str:
    checkpoint = state.get("checkpoint")
    if not checkpoint:
        return "none yet"
    return f"height {checkpoint['height']}, {format_duration(checkpoint['age_ms'] / _MS_PER_S)} old\n{checkpoint['root']}"


def _voters_text(state: Row) -> str:
    silent = [voter["name"] for voter in state["voters"] if not voter["online"]]
    online = len(state["voters"]) - len(silent)
    word = "ok" if state["has_quorum"] else "NO QUORUM, writes wait"
    text = f"{online} of {len(state['voters'])} answer, {state['quorum_size']} needed: {word}"
    return text + (f"\nsilent: {', '.join(silent)}" if silent else "")


def _banned_text(state: Row) -> str:
    def one(node: Row) -> str:
        where = f", final at height {node['height']}" if node["height"] else ""
        return f"{node['name']} (signed {node['why']}{where})"

    return "\n".join(map(one, state["banned"]))


def _node_text(state: Row) -> str:
    word = "votes" if state["is_voter"] else "writes, and does not vote" if state["may_write"] else "only reads"
    return f"{state['name']}, {word}" + ("" if state["is_level"] else "; is behind its peers")


STATE_FIELDS = (
    Column("Node", _node_text),
    Column("Voters", _voters_text, style=lambda state: "green" if state["has_quorum"] else "red"),
    Column("Operations", _counts_text),
    Column("Spine", _spine_text),
    Column("Checkpoint", _checkpoint_text),
    Column("Banned", _banned_text, style=lambda _: "red"),
    Column("Disk", lambda state: format_size(int(state["disk_size_bytes"]))),
)
