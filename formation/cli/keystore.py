"""The account's key file, and what stands beside it once the key was rotated.

| file | holds |
|---|---|
| `account.key` | the key that signs now |
| `account.id` | the account's id, once it no longer follows from the key: an account keeps the id of its first key |
| `account.key.next` | a new key, from before the network is told of it until the rotation is final |
| `account.key.old` | the key before, which signs nothing any more; kept, should the node that said so have lied |

A crash between any two steps leaves at least one file with the key in force, and `formation account rotate` goes on from
there. Other keys (`keys/NAME.key`) have the same files beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from formation.core.errors import ConflictError, HostError, UsageError

if TYPE_CHECKING:
    from formation.core.keys import KeyPair

_ID_SIZE_MAX_BYTES = 256


@dataclass(frozen=True, slots=True)
class Signer:
    """Who an intent is of, and the key that signs it."""

    account_id: str
    key: KeyPair

    @property
    def account_key(self) -> bytes:
        """The 32-byte key that the account is named by."""
        from formation.core.ids import public_key_of_account

        return public_key_of_account(self.account_id)


@dataclass(frozen=True, slots=True)
class Keystore:
    """The files of one account."""

    path: Path
    """Of the key that signs."""

    @property
    def next_path(self) -> Path:
        """Of a key that is about to sign."""
        return self.path.with_name(f"{self.path.name}.next")

    @property
    def old_path(self) -> Path:
        """Of the key before."""
        return self.path.with_name(f"{self.path.name}.old")

    @property
    def id_path(self) -> Path:
        """Of the account's id."""
        return self.path.with_suffix(".id")

    def account_id(self) -> str:
        """Whose key this is.

        Raises:
          NotFoundError, UsageError: no usable key, or its id file is damaged.
        """
        return self._kept_id() or str(self.key().account_id)

    def key(self) -> KeyPair:
        """The key that signs.

        Raises:
          NotFoundError, UsageError: as `read_key_file`.
        """
        from formation.core.keys import read_key_file

        return read_key_file(self.path)

    def signer(self) -> Signer:
        """Account and key.

        Raises:
          NotFoundError, UsageError: no usable key.
        """
        key = self.key()
        return Signer(self._kept_id() or str(key.account_id), key)

    def next_key(self) -> KeyPair:
        """The key that is about to sign; made and on disk when this returns.

        Raises:
          HostError, UsageError: it cannot be written, or is damaged.
        """
        from formation.core.keys import KeyPair, read_key_file, write_key_file

        if not self.next_path.exists():
            write_key_file(self.next_path, KeyPair.generate())
        return read_key_file(self.next_path)

    def remember_id(self, account_id: str) -> None:
        """Keep the account's id, before the first key is gone; a kept one is never changed.

        Raises:
          ConflictError: another account's id is kept here.
          HostError: it cannot be written.
        """
        from formation.core.files import replace_durably

        kept = self._kept_id()
        if kept and kept != account_id:
            raise ConflictError(f"{self.id_path} is of {kept}", hint="is FORMATION_ACCOUNT_KEY the file that you mean?")
        if not kept:
            with _disk_errors(self.id_path):
                replace_durably(self.id_path, f"{account_id}\n".encode(), mode=0o600)

    def finish_rotation(self) -> None:
        """The next key is in force: it becomes the key, and the key becomes the old one.

        Raises:
          HostError: the disk refused.
        """
        from formation.core.files import sync_directory

        with _disk_errors(self.path):
            if self.path.exists():
                # The old one has two names for a moment, so that there is a key at every moment.
                self.old_path.unlink(missing_ok=True)
                os.link(self.path, self.old_path)
            self.next_path.replace(self.path)
            sync_directory(self.path.parent)

    def _kept_id(self) -> str:
        from formation.core.ids import public_key_of_account

        try:
            with self.id_path.open("rb") as file:
                text = file.read(_ID_SIZE_MAX_BYTES).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return ""
        except OSError as exc:
            raise UsageError(f"cannot read {self.id_path}: {exc.strerror}", hint="check its owner and mode") from exc
        try:
            public_key_of_account(text)
        except UsageError as exc:
            raise UsageError(f"{self.id_path} holds no account id", hint="write the did:key:… of the account into it") from exc
        return text


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise HostError(f"cannot write beside {path}: {exc.strerror}", hint="check the directory's owner and mode") from exc
