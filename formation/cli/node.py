"""`formation node`: run a node in the foreground. The only part of the CLI that imports the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formation.core.config import load_settings, settings_to_toml
from formation.core.errors import FormationError


def run(flags: dict[str, Any], *, config: Path | None, print_config: bool) -> None:
    """Run a node with these flags (by dotted setting name) until a signal ends it.

    Raises:
      UsageError, NotFoundError, HostError, ConflictError: it cannot start; says why.
    """
    settings = load_settings(flags, config=config)
    if print_config:
        print(settings_to_toml(settings), end="")
        return
    from formation.node.settings import node_settings
    from formation.node.telemetry import set_up_logs

    chosen = node_settings(settings)
    set_up_logs(level=chosen.log_level, form=chosen.log_format)

    import trio

    from formation.node.run import run_node

    try:
        trio.run(run_node, chosen)
    except BaseExceptionGroup as group:
        raise _reason(group) from group


def _reason(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a person should see of a start that failed: the one Formation error in it, if there is one."""
    errors, _ = group.split(FormationError)
    first: BaseException = errors or group
    while isinstance(first, BaseExceptionGroup) and len(first.exceptions) == 1:
        first = first.exceptions[0]
    return first
