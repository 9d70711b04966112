"""Who this node is: its key file, and its place in the manifest."""

from __future__ import annotations

from pathlib import Path

from formation.core.errors import HostError, UsageError
from formation.core.keys import KeyPair, read_key_file, read_secret_file, write_key_file
from formation.p2p.network_key import FILE_SIZE_MAX_BYTES, HINT, parse_network_key

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


def read_network_key(path: Path) -> bytes:
    """The 32 bytes of a private network's key file.

    Raises:
      UsageError: there is none, it is not a key, or others can read it.
    """
    try:
        data, mode = read_secret_file(path, size_max_bytes=FILE_SIZE_MAX_BYTES)
    except OSError as exc:
        hint = HINT if isinstance(exc, FileNotFoundError) else "check its owner and mode"
        raise UsageError(f"node.network_key: cannot read {path}: {exc.strerror}", hint=hint) from exc
    if mode & 0o077:
        raise UsageError(f"node.network_key: others can read {path} (mode {mode:03o})", hint=f"chmod 600 {path}")
    return parse_network_key(data, what=str(path))
