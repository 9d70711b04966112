"""Who this node is: its key file, and its place in the manifest."""

from __future__ import annotations

from pathlib import Path

from formation.core.errors import HostError
from formation.core.keys import KeyPair, read_key_file, write_key_file

KEY_FILE_NAME = "node.key"
DATA_DIR_MODE = 0o700


def prepare_data_dir(data_dir: Path) -> None:
    """Make the node's directory, closed to others.

    Raises:
      HostError: it cannot be made or entered.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=DATA_DIR_MODE)
        probe = data_dir / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as exc:
        raise HostError(
            f"cannot use the data directory {data_dir}: {exc.strerror}", hint="choose another with --data-dir"
        ) from exc


def load_or_make_key(data_dir: Path) -> KeyPair:
    """The node's key; a new one in a new directory.

    Raises:
      UsageError: the file is not a key, or others can read it.
    """
    path = data_dir / KEY_FILE_NAME
    if not path.exists():
        write_key_file(path, KeyPair.generate())
    return read_key_file(path)
