from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from formation.core.errors import ConflictError, HostError, UsageError
from formation.core.keys import KeyPair, write_key_file
from formation.node.identity import KEY_FILE_NAME, load_or_make_key, prepare_data_dir, read_network_key


def test_a_new_directory_is_closed_to_others_and_left_empty(tmp_path: Path) -> None:
    """The data directory has mode 0700, and the probe leaves nothing."""
    prepare_data_dir(tmp_path / "a" / "data")
    assert stat.S_IMODE((tmp_path / "a" / "data").stat().st_mode) == 0o700
    assert os.listdir(tmp_path / "a" / "data") == []


def test_an_existing_directory_is_used_again(tmp_path: Path) -> None:
    """Preparing twice is preparing once."""
    (tmp_path / "kept").write_text("x")
    prepare_data_dir(tmp_path)
    prepare_data_dir(tmp_path)
    assert (tmp_path / "kept").read_text() == "x"


def test_a_file_is_no_data_directory(tmp_path: Path) -> None:
    """The error says which, and the hint how to choose another."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(HostError, match="cannot use the data directory") as caught:
            prepare_data_dir(path)
        assert "--data-dir" in caught.value.hint


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """It is noticed at the start: here, for the probe's name is taken by a directory."""
    (tmp_path / ".writable").mkdir()
    with pytest.raises(HostError, match="cannot use the data directory"):
        prepare_data_dir(tmp_path)


def test_a_node_keeps_its_key(tmp_path: Path) -> None:
    """The first start makes a key, all later ones find it."""
    first = load_or_make_key(tmp_path)
    assert load_or_make_key(tmp_path).public_key == first.public_key
    assert stat.S_IMODE((tmp_path / KEY_FILE_NAME).stat().st_mode) == 0o600


def test_a_key_that_was_put_there_is_taken(tmp_path: Path) -> None:
    """An operator may bring the key."""
    key = KeyPair(b"\x07" * 32)
    write_key_file(tmp_path / KEY_FILE_NAME, key)
    assert load_or_make_key(tmp_path).public_key == key.public_key


def test_a_damaged_key_is_not_replaced(tmp_path: Path) -> None:
    """A node never changes who it is by itself."""
    path = tmp_path / KEY_FILE_NAME
    path.touch(mode=0o600)
    with pytest.raises(UsageError, match="is not a Formation key file"):
        load_or_make_key(tmp_path)
    assert path.read_bytes() == b""


def test_a_key_behind_a_dangling_link_is_not_made_anew(tmp_path: Path) -> None:
    """A volume that is not mounted must not give the node another identity."""
    (tmp_path / KEY_FILE_NAME).symlink_to(tmp_path / "volume" / "node.key")
    with pytest.raises(ConflictError, match="exists already"):
        load_or_make_key(tmp_path)


def test_a_network_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """As is one that is not there, or is none; each with what to do."""
    path = tmp_path / "network.key"
    with pytest.raises(UsageError, match="No such file") as caught:
        read_network_key(path)
    assert "openssl rand" in caught.value.hint
    path.write_bytes(b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"6b" * 32 + b"\n")
    path.chmod(0o640)
    with pytest.raises(UsageError, match=r"others can read .* \(mode 640\)") as caught:
        read_network_key(path)
    assert caught.value.hint == f"chmod 600 {path}"
    path.chmod(0o600)
    assert read_network_key(path) == b"k" * 32
    path.write_bytes(b"secret")
    with pytest.raises(UsageError, match="is not the key of a private network"):
        read_network_key(path)


def test_a_pipe_in_place_of_the_network_key_does_not_hang(tmp_path: Path) -> None:
    """It holds no key, and nobody may ever write to it."""
    path = tmp_path / "network.key"
    os.mkfifo(path, 0o600)
    with pytest.raises(UsageError, match="is not the key of a private network"):
        read_network_key(path)
