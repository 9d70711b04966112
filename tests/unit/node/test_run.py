"""The node's doors: the API's socket and token."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from formation.core.errors import ConflictError, UsageError
from formation.node.run import api_token, remove_stale_socket


def test_a_stale_socket_makes_way(tmp_path: Path) -> None:
    """What a killed process left behind does not keep a node from starting."""
    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    remove_stale_socket(path)
    assert not path.exists()
    remove_stale_socket(path)


@pytest.mark.parametrize("backlog", [0, 8])
def test_a_socket_in_use_is_left_alone(tmp_path: Path, backlog: int) -> None:
    """Another node's socket is not taken from it, not even when that one is too busy to take connections."""
    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(backlog)
        for _ in range(2):
            with pytest.raises(ConflictError, match="another node listens"):
                remove_stale_socket(path)
        assert path.exists()


def test_a_file_is_not_removed_for_a_socket(tmp_path: Path) -> None:
    """A mistyped --api-socket costs nobody a file."""
    path = tmp_path / "thesis.tex"
    path.write_text("precious")
    with pytest.raises(ConflictError, match="is no socket"):
        remove_stale_socket(path)
    assert path.read_text() == "precious"


def test_a_token_is_made_once(tmp_path: Path) -> None:
    """The token is random, closed to others, and the same after a restart."""
    token = api_token(tmp_path)
    assert len(token) == 43
    assert api_token(tmp_path) == token
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [("api.token", 0o600)]


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"\xff" * 32, b"two words, one of them far too many\n"])
def test_a_damaged_token_guards_nothing_and_is_refused(tmp_path: Path, content: bytes) -> None:
    """An empty token file must not let in everybody who sends an empty token."""
    (tmp_path / "api.token").write_bytes(content)
    with pytest.raises(UsageError, match="holds no API token"):
        api_token(tmp_path)
    assert (tmp_path / "api.token").read_bytes() == content
