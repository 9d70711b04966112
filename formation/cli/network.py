"""`formation network …`: a network's manifest, signed by its founders on the machine of each."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from formation.cli.command import command, new_group
from formation.cli.context import Cli
from formation.cli.output import Column
from formation.core.errors import ConflictError, FormationError, HostError, UsageError

if TYPE_CHECKING:
    from formation.core.manifest import Founding, Voter

group = new_group("Networks: found one with others, and look at it.")

_MODE = 0o644
_MS_PER_S = 1000
_NODE_KEY_NAME = "node.key"

DataDir = Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="The node's directory, which holds its key.")]

NETWORK_FIELDS = (
    Column("Network", lambda network: f"{network['name']}\n{network['network_id']}"),
    Column("Voters", lambda network: _voters(network)),
    Column("Signed", lambda network: _signed(network)),
    Column("Now", lambda network: _now(network)),
)


@command(
    group, "node-id", examples=("formation network node-id", "formation network node-id --data-dir /srv/node"), common=False
)
def show_node_id(cli: Cli, data_dir: DataDir = None) -> None:
    """Print this machine's node id, for whoever writes the network down. Makes the node's key if there is none."""
    from formation.core.keys import KeyPair, read_key_file, write_key_file

    path = _key_path(cli, data_dir)
    if not path.exists():
        write_key_file(path, KeyPair.generate())
        cli.out.remark(f"made {path}")
    shown = {"node_id": str(read_key_file(path).node_id), "path": str(path)}
    if cli.out.is_for_people:
        cli.out.line(shown["node_id"])
    else:
        cli.out.record(shown, (), name="node_id")


@command(
    group,
    "create",
    examples=(
        "formation network create home --voter a=12D3KooW…@/ip4/192.0.2.1/tcp/4700 --voter b=… --voter c=… --voter d=… \\",
        "    --out network.toml                            then each founder: formation network sign network.toml",
    ),
    common=False,
)
def create_network(
    cli: Cli,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The network's name.")],
    voter: Annotated[
        list[str], typer.Option("--voter", metavar="NAME=NODE_ID@MULTIADDR", help="A founding voter; 1, 4, 7, … of them.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to; must not exist.")],
) -> None:
    """Write down a new network, for its founders to sign."""
    from formation.core.manifest import FORMAT, Founding, Genesis

    voters = tuple(map(_voter, voter))
    founding = Founding(Genesis(FORMAT, name, int(time.time() * _MS_PER_S), voters))
    if out.exists():
        raise ConflictError(f"{out} is there already", hint="a manifest is never overwritten: choose another name")
    _write(out, founding.to_toml())
    cli.out.record(_shown(founding, out), NETWORK_FIELDS, name="network_id")
    cli.out.hint(f"\nNext, each founder on its own machine: formation network sign {out}")


@command(group, "sign", examples=("formation network sign network.toml",), common=False)
def sign_network(
    cli: Cli, file: Annotated[Path, typer.Argument(metavar="FILE", help="The manifest.")], data_dir: DataDir = None
) -> None:
    """Add this machine's signature to a network that is being founded. Look at the file first: you vouch for all of it."""
    from formation.core.keys import read_key_file
    from formation.core.manifest import read_founding

    founding = read_founding(file).sign(read_key_file(_key_path(cli, data_dir)))
    _write(file, founding.to_toml())
    cli.out.record(_shown(founding, file), NETWORK_FIELDS, name="network_id")
    if founding.is_complete:
        cli.out.hint(f"\nAll have signed. Next, on each machine: formation init --manifest {file} && formation node")
    else:
        missing = ", ".join((*founding.missing, *founding.invalid))
        cli.out.hint(f"\nStill to sign, each on its own machine: {missing}")


@command(group, "show", examples=("formation network show", "formation network show network.toml -o json"))
def show_network(
    cli: Cli,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A manifest. Default: this machine's network.")] = None,
) -> None:
    """Show a network: its id, its founders, whose signatures are missing; and its voters now, when a node answers."""
    from formation.core.manifest import read_founding

    path = file or cli.path("node.manifest")
    founding = read_founding(path)
    cli.out.record(_shown(founding, path) | {"now": _asked(cli, founding)}, NETWORK_FIELDS, name="network_id")


def _asked(cli: Cli, founding: Founding) -> dict[str, Any] | None:
    """What a node says of this network now; None where none answers, or one of another network."""
    try:
        status = cli.client.get("/v1/status")
        if status["network"]["id"] != founding.network_id.hex():
            return None
        voters = cli.client.get("/v1/voters")
    except (FormationError, KeyError, TypeError):
        return None
    return {"epoch": voters["epoch"], "voters": [seat["name"] for seat in voters["seats"]]}


def _shown(founding: Founding, path: Path) -> dict[str, Any]:
    genesis = founding.genesis
    conditions = dict.fromkeys(founding.missing, "missing") | dict.fromkeys(founding.invalid, "invalid")
    return {
        "name": genesis.name,
        "network_id": founding.network_id.hex(),
        "founded_ms": genesis.founded_ms,
        "is_complete": founding.is_complete,
        "voters": [
            {
                "name": voter.name,
                "node_id": str(voter.node_id),
                "addresses": list(voter.addresses),
                "signature": conditions.get(voter.name, "valid"),
            }
            for voter in genesis.voters
        ],
        "path": str(path),
        "now": None,
    }


def _voter(text: str) -> Voter:
    from formation.core.ids import public_key_of_node
    from formation.core.manifest import Voter

    name, _, rest = text.partition("=")
    node_id, _, addresses = rest.partition("@")
    if not name or not node_id or not addresses:
        raise UsageError(f"--voter: {text[:120]!r} is not a voter", hint="write NAME=NODE_ID@/ip4/192.0.2.1/tcp/4700")
    return Voter(name, public_key_of_node(node_id), tuple(addresses.split(",")))


def _key_path(cli: Cli, data_dir: Path | None) -> Path:
    return (data_dir or cli.path("node.data_dir")).expanduser() / _NODE_KEY_NAME


def _write(path: Path, text: str) -> None:
    from formation.core.files import replace_durably

    try:
        replace_durably(path, text.encode(), mode=_MODE & ~_umask())
    except OSError as exc:
        raise HostError(f"cannot write {path}: {exc.strerror}", hint="check the directory's owner and mode") from exc


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _voters(network: Any) -> str:
    count = len(network["voters"])
    seats = (f"{voter['name']}: {voter['node_id']} {', '.join(voter['addresses'])}" for voter in network["voters"])
    return "\n".join([f"{count}, survives {(count - 1) // 3} faulty", *seats])


def _signed(network: Any) -> str:
    if network["is_complete"]:
        return "by all founders"
    return "\n".join(f"{voter['name']}: {_CONDITIONS[voter['signature']]}" for voter in network["voters"])


_CONDITIONS = {"valid": "valid", "missing": "MISSING", "invalid": "INVALID: the file was changed after it signed"}


def _now(network: Any) -> str:
    now = network["now"]
    return "" if now is None else f"epoch {now['epoch']}: {', '.join(now['voters'])}"
