"""What a command may not import before it needs it: start-up time is counted in modules, not in milliseconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

_HEAVY = {"trio", "httpx", "pydantic", "msgspec", "nacl", "cbor2", "rich", "libp2p", "starlette", "hypercorn", "ssl", "asyncio"}
_SHOW = (
    "import sys; from formation.cli.main import run_command_line; run_command_line({!r}); print('\\n' + ' '.join(sys.modules))"
)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["vm", "create", "--help"], ["node", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Help is made of typer and our own flags alone."""
    ran = subprocess.run([sys.executable, "-c", _SHOW.format(arguments)], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ran.stdout.splitlines()[-1].split()}
    assert loaded & _HEAVY == set()


@pytest.mark.slow
def test_asking_a_node_imports_no_cryptography() -> None:
    """`ps` needs a socket and JSON, no more."""
    ran = subprocess.run(
        [sys.executable, "-c", _SHOW.format(["ps", "--host", "none.sock"])], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in ran.stdout.splitlines()[-1].split()}
    assert loaded & (_HEAVY - {"ssl"}) == set()
    assert "no node is running" in ran.stderr
