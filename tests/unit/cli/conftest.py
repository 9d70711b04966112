from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from formation.cli.main import run_command_line
from formation.core.keys import KeyPair, write_key_file
from tests.unit.cli.fake_node import FakeNode


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home with an account key and no node; the environment says nothing else."""
    for name in ("HOST", "CONFIG", "DATA", "NETWORK", "OUTPUT", "ACCOUNT_KEY", "TOKEN_FILE", "LOG", "NO_COLOR"):
        monkeypatch.delenv(f"FORMATION_{name}", raising=False)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("FORMATION_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FORMATION_HOST", str(tmp_path / "none.sock"))
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.chdir(tmp_path)
    write_key_file(tmp_path / "config" / "formation" / "account.key", KeyPair(b"\x01" * 32))
    return tmp_path


@pytest.fixture
def run(home: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs one command line in this process."""

    def call(*arguments: str) -> Result:
        capfd.readouterr()
        status = run_command_line([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture
def node(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNode]:
    """A fake node that commands find by FORMATION_HOST."""
    # The kernel allows a socket 107 bytes of path; pytest's own directories may be longer.
    with TemporaryDirectory(prefix="f-") as folder, FakeNode(Path(folder) / "node.sock") as fake:
        monkeypatch.setenv("FORMATION_HOST", str(fake.socket_path))
        yield fake
