"""`formation completion`: scripts that make shells complete commands, options and names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from formation.cli.context import Cli
from formation.core.errors import UsageError

EXAMPLES = (
    "formation completion bash > ~/.local/share/bash-completion/completions/formation",
    'eval "$(formation completion zsh)"',
    "formation completion fish > ~/.config/fish/completions/formation.fish",
)


def print_completion(
    cli: Cli, shell: Annotated[Literal["bash", "zsh", "fish", "powershell"], typer.Argument(help="Which shell.")]
) -> None:
    """Print a completion script for a shell."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # typer offers it no other way

    try:
        script = get_completion_script(prog_name="formation", complete_var="_FORMATION_COMPLETE", shell=shell)
    except (ValueError, KeyError) as exc:
        raise UsageError(f"no completion for {shell}", hint="bash, zsh, fish or powershell") from exc
    sys.stdout.write(script + "\n")


# A shell waits for this while a person presses Tab: rather no names than a pause that is felt.
NAMES_TIMEOUT_S = 0.3


def complete_vms(incomplete: str) -> list[str]:
    """Names of VMs that begin so; none when there is no node to ask."""
    return _names("/v1/vms", "vms", lambda vm: str((vm.get("spec") or {}).get("name", "")), incomplete)


def complete_images(incomplete: str) -> list[str]:
    """Names of images that begin so; none when there is no node to ask."""
    return _names("/v1/images", "images", lambda image: str(image.get("name", "")), incomplete)


def _names(path: str, key: str, name_of: Callable[[dict[str, Any]], str], incomplete: str) -> list[str]:
    from formation.cli.client import Client
    from formation.cli.output import printable
    from formation.core.errors import FormationError

    try:
        client = Client(Cli().setting("client.host"), timeout_s=NAMES_TIMEOUT_S)
        names = {printable(name_of(row)) for row in client.rows(path, key)}
    except FormationError:
        return []
    return sorted(name for name in names if name.startswith(incomplete))
