"""Ed25519 keys and the files that hold them.

A key file is 32 bytes of seed in hex with a one-line header that says what it is; mode 0600, refused when others can
read it. Secrets are never in an argument, a log or a record: `repr` shows the public part.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from nacl import bindings

from formation.core.errors import ConflictError, HostError, NotFoundError, UsageError
from formation.core.files import sync_directory
from formation.core.ids import AccountId, NodeId, account_id_of, node_id_of

SEED_SIZE_BYTES = 32
KEY_FILE_MODE = 0o600
_HEADER = "formation-ed25519-seed-v1"
# Header, 64 hex digits, two line ends; anything longer is another kind of file.
_FILE_SIZE_MAX_BYTES = 256


class KeyPair:
    """An Ed25519 key pair (RFC 8032)."""

    __slots__ = ("_secret", "public_key")

    def __init__(self, seed: bytes) -> None:
        """Derive the pair from a 32-byte seed."""
        assert len(seed) == SEED_SIZE_BYTES
        self.public_key, self._secret = bindings.crypto_sign_seed_keypair(seed)

    @classmethod
    def generate(cls) -> KeyPair:
        """A new pair from the system's randomness."""
        return cls(secrets.token_bytes(SEED_SIZE_BYTES))

    def sign(self, message: bytes) -> bytes:
        """64-byte signature."""
        signed: bytes = bindings.crypto_sign(message, self._secret)
        return signed[:64]

    @property
    def seed(self) -> bytes:
        """The 32-byte secret seed: for the key file and for libp2p's identity, nothing else."""
        return self._secret[:SEED_SIZE_BYTES]

    @property
    def node_id(self) -> NodeId:
        """This key as a libp2p PeerId."""
        return node_id_of(self.public_key)

    @property
    def account_id(self) -> AccountId:
        """This key as a did:key."""
        return account_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public_key.hex()[:16]}…)"


def write_key_file(path: Path, key: KeyPair) -> None:
    """Write a new key file, mode 0600 from the first byte on.

    Raises:
      ConflictError: the file exists; a key is never overwritten.
      HostError: the directory or the disk refused; no half a file is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The file gets its name when it is whole: a node that dies meanwhile must find no key or this one.
        with tempfile.NamedTemporaryFile("w", encoding="ascii", dir=path.parent, prefix=f".{path.name}.") as file:
            file.write(f"{_HEADER}\n{key.seed.hex()}\n")
            file.flush()
            os.fsync(file.fileno())
            _link_new(file.name, path)
        sync_directory(path.parent)
    except OSError as exc:
        raise HostError(f"cannot write {path}: {exc.strerror}", hint="check the directory's owner and mode") from exc


def read_key_file(path: Path) -> KeyPair:
    """Read a key file.

    Raises:
      NotFoundError: no such file.
      UsageError: readable by others, or not a key file.
    """
    try:
        data, mode = read_secret_file(path, size_max_bytes=_FILE_SIZE_MAX_BYTES)
    except FileNotFoundError as exc:
        raise NotFoundError(f"no key at {path}", hint="formation init makes one") from exc
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", hint="check its owner and mode") from exc
    if mode & 0o077:
        raise UsageError(f"{path} can be read by others (mode {mode:04o})", hint=f"chmod 600 {path}")
    text = data.decode("ascii", "replace")
    header, _, body = text.partition("\n")
    try:
        seed = bytes.fromhex(body.strip())
    except ValueError:
        seed = b""
    if header != _HEADER or len(seed) != SEED_SIZE_BYTES or len(text) > _FILE_SIZE_MAX_BYTES:
        raise UsageError(
            f"{path} is not a Formation key file", hint=f"its first line must be {_HEADER!r}, its second 64 hex digits"
        )
    return KeyPair(seed)


def read_secret_file(path: Path, *, size_max_bytes: int) -> tuple[bytes, int]:
    """What a file holds, and one byte more than the limit at most; and its permission bits. Nothing of what is no regular file.

    Raises:
      OSError: it cannot be read.
    """
    # Non-blocking, for a pipe would never answer; the mode is that of the very file that is read.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        mode = os.fstat(file.fileno()).st_mode
        return file.read(size_max_bytes + 1) if stat.S_ISREG(mode) else b"", stat.S_IMODE(mode)


def _link_new(source: str, path: Path) -> None:
    try:
        os.link(source, path)
    except FileExistsError as exc:
        raise ConflictError(f"{path} exists already", hint="a key is never overwritten: move the file away first") from exc
