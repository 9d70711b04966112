"""The commands, in the order in which people meet them.

What a command needs beyond its flags is imported when it is called.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from formation import __version__
from formation.cli import account, cell, image, key, net, network, op, peer, state, value, vm, voter
from formation.cli.command import HELP_NAMES, command
from formation.cli.completion import EXAMPLES as COMPLETION_EXAMPLES
from formation.cli.completion import print_completion
from formation.cli.context import Cli
from formation.cli.cordon import CORDON_EXAMPLES, DRAIN_EXAMPLES, UNCORDON_EXAMPLES, cordon_node, drain_node, uncordon_node
from formation.cli.events import EXAMPLES as EVENTS_EXAMPLES
from formation.cli.events import show_events
from formation.cli.init import EXAMPLES as INIT_EXAMPLES
from formation.cli.init import init
from formation.cli.node_command import EXAMPLES as NODE_EXAMPLES
from formation.cli.node_command import run_node
from formation.cli.plain_values import PlainGroup
from formation.cli.status import EXAMPLES as STATUS_EXAMPLES
from formation.cli.status import show_status
from formation.cli.vm_create import EXAMPLES as CREATE_EXAMPLES
from formation.cli.vm_create import create_vm

_EPILOG = """First steps:

\b
  formation init                          keys and a network of this machine alone
  formation node                          run it
  formation image build examples/hello    make an image
  formation create hello                  run it in a VM

Each command has examples: formation COMMAND --help
"""


_DEMO_EXAMPLES = (
    "formation demo                 cleans up behind itself",
    "formation demo --keep          leaves it running, to try things",
)


def make_command() -> Any:
    """The whole command line, ready for `main`."""
    app = typer.Typer(
        name="formation",
        cls=PlainGroup,
        epilog=_EPILOG,
        rich_markup_mode=None,
        context_settings=HELP_NAMES,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_root)
    _add_commands(app)
    return get_command(app)


def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False
) -> None:
    """One cloud without a centre, run by the machines of the people who use it."""
    if version:
        typer.echo(f"formation {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _add_commands(app: typer.Typer) -> None:
    command(app, "create", examples=CREATE_EXAMPLES, aliases=("launch", "run"))(create_vm)
    command(app, "ps", examples=vm.LIST_EXAMPLES)(vm.list_vms)
    command(app, "logs", examples=vm.LOGS_EXAMPLES, output=False)(vm.show_logs)
    command(app, "status", examples=STATUS_EXAMPLES, forwarded=True)(show_status)
    command(app, "events", examples=EVENTS_EXAMPLES)(show_events)
    command(app, "top", examples=("formation top     q leaves, ? shows the keys",), output=False)(_top)
    command(app, "cordon", examples=CORDON_EXAMPLES, output=False)(cordon_node)
    command(app, "uncordon", examples=UNCORDON_EXAMPLES, output=False)(uncordon_node)
    command(app, "drain", examples=DRAIN_EXAMPLES, output=False)(drain_node)
    app.add_typer(vm.group, name="vm")
    app.add_typer(image.group, name="image")
    app.add_typer(key.group, name="key")
    app.add_typer(account.group, name="account")
    app.add_typer(account.grant_group, name="grant")
    app.add_typer(value.group, name="value")
    app.add_typer(value.claim_group, name="claim")
    app.add_typer(network.group, name="network")
    app.add_typer(cell.group, name="cell")
    app.add_typer(voter.group, name="voter")
    app.add_typer(peer.group, name="peer")
    app.add_typer(net.group, name="net")
    app.add_typer(state.group, name="state")
    app.add_typer(op.group, name="op")
    command(app, "init", examples=INIT_EXAMPLES, common=False)(init)
    command(app, "node", examples=NODE_EXAMPLES, output=False, common=False)(run_node)
    command(app, "demo", examples=_DEMO_EXAMPLES, output=False, common=False)(_demo)
    command(app, "completion", examples=COMPLETION_EXAMPLES, output=False, common=False)(print_completion)
    command(app, "version", examples=("formation version -o json",), common=False)(_version)
    command(app, "pack", examples=image.BUILD_EXAMPLES, hidden=True)(image.build_image)


def _top(
    cli: Cli,
    interval: Annotated[str, typer.Option("--interval", metavar="DURATION", help="Between looks at the node.")] = "2s",
) -> None:
    """Watch nodes, VMs and events live."""
    from formation.cli.tui.app import run_top
    from formation.core.units import parse_duration_s

    run_top(cli, interval_s=parse_duration_s(interval, what="--interval"))


def _version(cli: Cli) -> None:
    """Print the version."""
    import platform

    from formation.cli.output import Column

    shown = {"version": __version__, "python": platform.python_version()}
    if cli.out.is_for_people:
        cli.out.line(f"formation {__version__}")
    else:
        cli.out.record(shown, (Column("Version", lambda row: str(row["version"])),), name="version")


def _demo(
    cli: Cli,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running at the end.")] = False,
    stop: Annotated[Path | None, typer.Option("--stop", metavar="DIRECTORY", help="End a demo that was kept.")] = None,
) -> None:
    """Show it all on this machine: four nodes, an image, VMs, and one node killed and brought back."""
    import_module("formation.cli.demo").run_demo(keep=keep, stop=stop)
