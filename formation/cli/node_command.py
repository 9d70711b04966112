"""`formation node`: its flags. The node itself is imported when it runs, for its libraries are slow to load."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from formation.cli.context import Cli

EXAMPLES = (
    "formation node                              run with the configuration file",
    "formation node --print-config               what it would run with, and why",
    "formation node --name attic --api-tcp 127.0.0.1:4701",
)


def run_node(
    cli: Cli,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="The node's name, for people.")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="Keys, state, images, VMs.")] = None,
    manifest: Annotated[Path | None, typer.Option("--manifest", metavar="FILE", help="The network's manifest.")] = None,
    listen: Annotated[
        list[str] | None, typer.Option("--listen", metavar="MULTIADDR", help="Where to listen for peers.")
    ] = None,
    public_address: Annotated[
        str | None, typer.Option("--public-address", metavar="HOST", help="Where published ports are reached.")
    ] = None,
    api_socket: Annotated[
        Path | None, typer.Option("--api-socket", metavar="FILE", help="Unix socket of the HTTP API.")
    ] = None,
    api_tcp: Annotated[str | None, typer.Option("--api-tcp", metavar="HOST:PORT", help="The HTTP API on TCP as well.")] = None,
    hypervisor: Annotated[Literal["auto", "qemu", "none"] | None, typer.Option("--hypervisor", help="What runs VMs.")] = None,
    accelerator: Annotated[Literal["auto", "kvm", "tcg"] | None, typer.Option("--accelerator", help="Or emulation.")] = None,
    vcpus: Annotated[int | None, typer.Option("--vcpus", metavar="COUNT", help="Offered to VMs.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Offered to VMs, such as 8GiB.")] = None,
    disk: Annotated[str | None, typer.Option("--disk", metavar="SIZE", help="Offered to VMs, such as 100GiB.")] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option("--log-level", help="Least level that is logged.")
    ] = None,
    log_format: Annotated[
        Literal["auto", "console", "json"] | None, typer.Option("--log-format", help="Form of lines.")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting with its origin, and end.")] = False,
) -> None:
    """Run a node in the foreground, until Ctrl-C or SIGTERM. Its VMs go on without it."""
    from formation.cli.vm_create import whole_units
    from formation.core.units import GIB, MIB

    flags: dict[str, Any] = {
        "node.name": name,
        "node.data_dir": _text(data_dir),
        "node.manifest": _text(manifest),
        "node.listen": listen or None,
        "node.public_address": public_address,
        "node.api_socket": _text(api_socket),
        "node.api_tcp": api_tcp,
        "node.hypervisor": hypervisor,
        "node.accelerator": accelerator,
        "node.vcpus": vcpus,
        "node.memory_mib": None if memory is None else whole_units(memory, "--memory", MIB, "MiB"),
        "node.disk_gib": None if disk is None else whole_units(disk, "--disk", GIB, "GiB"),
        "node.log_level": log_level,
        "node.log_format": log_format,
    }
    import_module("formation.cli.node").run(flags, config=cli.config, print_config=print_config)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
