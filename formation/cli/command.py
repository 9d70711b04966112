"""Registers commands so that all take the same common options and end with examples.

A command is a function whose first parameter is the `Cli`; `command` adds `--host`, `--config`, `--color` and `--debug`
(and the output options where there is a result to shape) to what typer sees, and puts them together before the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from formation.cli.context import Cli
from formation.cli.output import Format
from formation.cli.plain_values import PlainCommand, PlainGroup

F = TypeVar("F", bound=Callable[..., Any])

HELP_NAMES = {"help_option_names": ["-h", "--help"]}

Host = Annotated[
    str | None, typer.Option("--host", metavar="SOCKET|URL", help="The node to ask: a socket's path or http://HOST:PORT.")
]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Configuration file.")]
Color = Annotated[Literal["auto", "always", "never"], typer.Option("--color", help="Colour the output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]
Output = Annotated[
    Format | None,
    typer.Option("--output", "-o", envvar="FORMATION_OUTPUT", show_envvar=False, help="Form of the result."),
]
Json = Annotated[bool, typer.Option("--json", help="Same as -o json.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only ids on stdout, no hints and no progress.")]
NoHeaders = Annotated[bool, typer.Option("--no-headers", help="Leave the table's titles out.")]

_COMMON: tuple[tuple[str, Any, Any], ...] = (
    ("host", Host, None),
    ("config", Config, None),
    ("color", Color, "auto"),
    ("debug", Debug, False),
)
On = Annotated[
    str | None,
    typer.Option("--on", metavar="NODE", help="Ask this node, through the one that answers here; its operators may."),
]
_FORWARDED: tuple[tuple[str, Any, Any], ...] = (("on", On, None),)
_OUTPUT: tuple[tuple[str, Any, Any], ...] = (
    ("output", Output, None),
    ("json_", Json, False),
    ("quiet", Quiet, False),
    ("no_headers", NoHeaders, False),
)


def new_group(help_: str) -> typer.Typer:
    """An empty group; called without a command it shows its help."""
    group = typer.Typer(cls=PlainGroup, help=help_, rich_markup_mode=None, add_completion=False, context_settings=HELP_NAMES)

    @group.callback(invoke_without_command=True)
    def show_help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    return group


def command(
    group: typer.Typer,
    name: str,
    *,
    examples: Sequence[str],
    aliases: Sequence[str] = (),
    hidden: bool = False,
    output: bool = True,
    common: bool = True,
    forwarded: bool = False,
) -> Callable[[F], F]:
    """Register a function as a command.

    Args:
      group: where.
      name: how people call it.
      examples: whole command lines, shown at the end of its help.
      aliases: further names, not shown.
      hidden: whether help leaves it out.
      output: whether it has a result, and so the output options.
      common: whether it talks to a node, and so the connection options.
      forwarded: whether it reads what each node alone can tell, and so may be asked of another node through this one.
    """

    def register(function: F) -> F:
        added = (
            *(_FORWARDED if forwarded else ()),
            *(_COMMON if common else _COMMON[1:]),
            *(_OUTPUT if output else ()),
        )
        shown = _with_options(function, added)
        epilog = "Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in examples)
        group.command(name, epilog=epilog, hidden=hidden, cls=PlainCommand, context_settings=HELP_NAMES)(shown)
        for alias in aliases:
            group.command(alias, epilog=epilog, hidden=True, cls=PlainCommand, context_settings=HELP_NAMES)(shown)
        return function

    return register


def _with_options(function: Callable[..., Any], options: Sequence[tuple[str, Any, Any]]) -> Callable[..., Any]:
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation, default in options
    ]

    @wraps(function)
    def call(**values: Any) -> Any:
        given = {name: values.pop(name, None) for name, _, _ in (*_FORWARDED, *_COMMON, *_OUTPUT)}
        return function(_cli_of(given), **values)

    del call.__dict__["__wrapped__"]
    signature = inspect.Signature([*own, *added])
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return call


def _cli_of(given: dict[str, Any]) -> Cli:
    format_ = Format.JSON if given["json_"] else given["output"] or Format.TABLE
    return Cli(
        host=given["host"],
        on=given["on"] or "",
        config=given["config"],
        format=Format(format_),
        quiet=bool(given["quiet"]),
        headers=not given["no_headers"],
        color=given["color"] or "auto",
    )
