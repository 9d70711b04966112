"""The house's rules that import-linter cannot say: pure machines stay pure, one importer for each foreign library.

Each checker is shown to catch a deliberate break.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "formation"

# design: pure machines take time and randomness as arguments, and do no I/O.
IMPURE = frozenset(
    {
        "trio", "os", "time", "random", "secrets", "socket", "subprocess", "sqlite3",
        "threading", "libp2p", "httpx", "pyroute2", "starlette", "hypercorn", "pathlib",
    }
)  # fmt: skip
# Ports, adapters and shells of the state; whatever else is there is a machine or a value.
STATE_OUTSIDE = frozenset({"cell_reader", "disk", "disk_files", "segments", "service", "sqlite", "store", "syncer"})
STATE_PURE = sorted(path.stem for path in (PACKAGE / "state").glob("*.py") if path.stem not in STATE_OUTSIDE)
PURE_MODULES = [
    *(
        f"core/{name}"
        for name in ("clock", "codec", "errors", "event", "grants", "histogram", "ids", "intent", "spec", "units")
    ),
    *(
        f"p2p/{name}"
        for name in (
            "admission",
            "backoff",
            "frames",
            "kad_lookup",
            "kad_records",
            "kad_scope",
            "kad_table",
            "kad_wire",
            "mdns_wire",
            "multiaddrs",
            "peer_book",
            "protobuf",
            "rate",
            "reachability",
            "reservations",
            "router",
            "score",
            "seen",
            "traffic",
            "yamux",
        )
    ),
    *(f"state/{name}" for name in STATE_PURE),
    *(f"pack/{name}" for name in ("formfile", "manifest", "plan")),
    *(f"vmm/{name}" for name in ("allocator", "devices", "lifecycle", "plan", "pvh", "qmp", "words")),
    "net/ports",
]
# The clock's real face is one method that imports `time` itself; `Random` as an argument's type rolls no dice.
ALLOWED = {("core/clock", "time"), ("p2p/backoff", "random"), ("state/sync_peers", "random")}

IMPORTERS = {
    # One adapter, in as many files as it takes.
    "libp2p": {
        f"p2p/libp2p_{part}"
        for part in ("admission", "control", "gossip", "host", "patches", "pnet", "routes", "setup", "stream", "muxer")
    },
    "sqlite3": {"state/sqlite"},
    "cbor2": {"core/codec"},
    "nacl": {"core/codec", "core/keys"},
    "base58": {"core/ids"},
    "lz4": {"pack/rootfs", "pack/vmlinux"},
    "starlette": {"node/api"},
    "hypercorn": {"node/run"},
}


def imported_by(source: str) -> set[str]:
    """Top-level packages that a module imports at run time, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def impure_imports(module: str, source: str) -> set[str]:
    return {name for name in imported_by(source) & IMPURE if (module, name) not in ALLOWED}


def foreign_imports(module: str, source: str) -> set[str]:
    return {name for name in imported_by(source) & set(IMPORTERS) if module not in IMPORTERS[name]}


def modules() -> list[tuple[str, str]]:
    return [(str(path.relative_to(PACKAGE).with_suffix("")), path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("module", PURE_MODULES)
def test_pure_machines_stay_pure(module: str) -> None:
    """A pure machine imports nothing that does I/O, tells the time or rolls dice."""
    assert impure_imports(module, (PACKAGE / f"{module}.py").read_text()) == set()


def test_the_machines_of_the_state_are_among_them() -> None:
    """A machine that somebody renames or moves stays under this rule."""
    named = "op lane ack lanes committee spine order crdt fold claims accounts quota checkpoint membership sync replica view"
    assert set(named.split()) <= set(STATE_PURE)


def test_one_importer_for_each_foreign_library() -> None:
    """A foreign library has one adapter, so that it can be replaced in one place."""
    offenders = {module: found for module, source in modules() if (found := foreign_imports(module, source))}
    assert offenders == {}


@pytest.mark.parametrize("line", ["import time", "from os import path", "def f() -> None:\n    import trio"])
def test_the_purity_check_can_fail(line: str) -> None:
    """A deliberate break of purity is caught."""
    assert impure_imports("state/fold", line)


def test_the_importer_check_can_fail() -> None:
    """A second importer of a library is caught."""
    assert foreign_imports("state/fold", "import cbor2\nfrom libp2p.host import x") == {"cbor2", "libp2p"}


BREAKS = {
    "core imports upwards": ("core/units.py", "import formation.p2p.frames"),
    "net and pack see each other": ("net/ports.py", "import formation.pack.manifest"),
    "state imports vmm": ("state/op.py", "import formation.vmm.plan"),
    "cli reaches past the API": ("cli/output.py", "import formation.state.op"),
    "cli imports the node": ("cli/client.py", "import formation.node.stream"),
}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_each_import_contract_can_fail(name: str, tmp_path: Path) -> None:
    """A deliberate import against the floors is caught by name."""
    shutil.copytree(PACKAGE, tmp_path / "formation", ignore=shutil.ignore_patterns("__pycache__"))
    module, line = BREAKS[name]
    with (tmp_path / "formation" / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout
