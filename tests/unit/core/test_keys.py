from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

import pytest

from formation.core.errors import ConflictError, HostError, NotFoundError, UsageError
from formation.core.ids import account_id_of, node_id_of
from formation.core.keys import KeyPair, read_key_file, write_key_file

KEY = KeyPair(b"\x07" * 32)
HEADER = "formation-ed25519-seed-v1"


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_comes_back_from_its_file(tmp_path: Path) -> None:
    """read_key_file undoes write_key_file; missing directories are made, closed to others."""
    path = tmp_path / "keys" / "node.key"
    write_key_file(path, KEY)
    assert read_key_file(path).seed == KEY.seed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["node.key"]


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    """Writing where a file is, even an empty one, is refused and leaves it alone."""
    path = write(tmp_path / "node.key", "precious")
    with pytest.raises(ConflictError, match="exists already"):
        write_key_file(path, KEY)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["node.key"]


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    """A dangling link is a file that exists: the key does not go where it points."""
    (tmp_path / "node.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConflictError, match="exists already"):
        write_key_file(tmp_path / "node.key", KEY)
    assert not (tmp_path / "elsewhere").exists()


def test_where_no_key_can_be_written_the_host_is_blamed(tmp_path: Path) -> None:
    """A directory that is none gives an error with the path, not a trace."""
    write(tmp_path / "file", "")
    with pytest.raises(HostError, match=r"cannot write .*file/node\.key"):
        write_key_file(tmp_path / "file" / "node.key", KEY)


def test_a_full_disk_leaves_no_half_key(tmp_path: Path) -> None:
    """A key that could not be written whole does not stand in the way of the next one."""
    path = tmp_path / "node.key"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(HostError, match="cannot write"):
            write_key_file(path, KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
    write_key_file(path, KEY)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601, 0o777])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """The error says the mode and the command that mends it."""
    path = write(tmp_path / "node.key", f"{HEADER}\n{KEY.seed.hex()}\n", mode)
    with pytest.raises(UsageError, match=rf"can be read by others \(mode 0{mode:o}\)") as caught:
        read_key_file(path)
    assert caught.value.hint == f"chmod 600 {path}"


def test_a_key_without_write_permission_is_fine(tmp_path: Path) -> None:
    """Mode 0400 is closed to others too."""
    assert read_key_file(write(tmp_path / "k", f"{HEADER}\n{KEY.seed.hex()}\n", 0o400)).seed == KEY.seed


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{HEADER}\n",
        f"{HEADER}\n{'00' * 31}\n",
        f"{HEADER}\n{'00' * 33}\n",
        f"{HEADER}\n{'0g' * 32}\n",
        f"{HEADER}\n{'é' * 32}\n",
        f"formation-ed25519-seed-v2\n{'00' * 32}\n",
        f"{HEADER}\r\n{'00' * 32}\r\n",
        f"{'00' * 32}\n",
        f"{HEADER}\n{'00' * 32}\n{' ' * 300}more",
        "-----BEGIN OPENSSH PRIVATE KEY-----\n",
    ],
)
def test_what_is_not_a_key_file_is_refused(tmp_path: Path, text: str) -> None:
    """Wrong header, short, long, not hex: the error says what the lines must be, and nothing of what they are."""
    path = write(tmp_path / "node.key", text)
    with pytest.raises(UsageError, match=r"is not a Formation key file$") as caught:
        read_key_file(path)
    assert HEADER in caught.value.hint


def test_a_missing_key_is_not_found(tmp_path: Path) -> None:
    """The hint says how to make one."""
    with pytest.raises(NotFoundError, match="no key at") as caught:
        read_key_file(tmp_path / "node.key")
    assert caught.value.hint == "formation init makes one"


def test_a_directory_is_not_a_key(tmp_path: Path) -> None:
    """What cannot be read says why."""
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        read_key_file(tmp_path)


def test_a_pipe_is_not_a_key_and_nobody_waits_for_it(tmp_path: Path) -> None:
    """Only a plain file is read."""
    os.mkfifo(tmp_path / "node.key", 0o600)
    with pytest.raises(UsageError, match="is not a Formation key file"):
        read_key_file(tmp_path / "node.key")


def test_new_keys_differ() -> None:
    """generate takes fresh randomness."""
    assert KeyPair.generate().public_key != KeyPair.generate().public_key


def test_a_key_names_itself() -> None:
    """node_id and account_id are those of the public key."""
    assert KEY.node_id == node_id_of(KEY.public_key)
    assert KEY.account_id == account_id_of(KEY.public_key)


def test_a_printed_key_shows_its_public_part_only() -> None:
    """A log line or a trace cannot leak the seed."""
    assert KEY.public_key.hex()[:16] in repr(KEY)
    assert KEY.seed.hex() not in repr(KEY)
    assert KEY.seed.hex() not in str([KEY])


@pytest.mark.parametrize("seed", [b"", b"\0" * 31, b"\0" * 33])
def test_only_32_bytes_are_a_seed(seed: bytes) -> None:
    """A seed of another size is a mistake of ours."""
    with pytest.raises(AssertionError):
        KeyPair(seed)
