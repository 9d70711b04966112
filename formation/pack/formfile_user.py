"""The fields of a Formfile's USER."""

from __future__ import annotations

import re
from collections.abc import Mapping

from formation.pack.formfile_checks import USERNAME, absolute_path
from formation.pack.formfile_text import Word
from formation.pack.manifest import UserAccount
from formation.pack.passwords import PASSWORD_SIZE_MAX_BYTES, crypt_sha512, is_crypted, salt_for

USER_FIELDS = (
    "username",
    "passwd",
    "ssh_authorized_keys",
    "lock_passwd",
    "sudo",
    "shell",
    "groups",
    "ssh_pwauth",
    "disable_root",
    "chpasswd_expire",
)
_USER_FLAGS = ("lock_passwd", "sudo", "ssh_pwauth", "disable_root", "chpasswd_expire")
_SSH_KEY = re.compile(r"^(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]+( .*)?$")
_BOOLEANS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


def check_user(values: Mapping[str, Word]) -> None:
    """Check all fields but the username.

    Raises:
      UsageError: at the field's place.
    """
    for name in _USER_FLAGS:
        read_flag(values.get(name), default=False)
    password = values.get("passwd")
    if password is not None:
        size = len(password.text.encode())
        if not 1 <= size <= PASSWORD_SIZE_MAX_BYTES and not is_crypted(password.text):
            raise password.place.error(
                f"expected a password of 1 to {PASSWORD_SIZE_MAX_BYTES} bytes", hint="or its sha512-crypt form, $6$…"
            )
    shell = values.get("shell")
    if shell is not None:
        absolute_path(shell, "shell")
        if ":" in shell.text or any(c.isspace() for c in shell.text):
            raise shell.place.error("expected a path without blanks and colons for shell", hint="for example: shell:/bin/sh")
    for name in _listed(values.get("groups")):
        if not USERNAME.match(name):
            raise values["groups"].place.error(
                f"expected group names separated by commas, found {name[:40]!r}", hint="for example: groups:sudo,web"
            )
    for key in _listed(values.get("ssh_authorized_keys")):
        if not _SSH_KEY.match(key):
            raise values["ssh_authorized_keys"].place.error(
                f"expected public keys separated by commas, found {key[:40]!r}",
                hint="quote it: ssh_authorized_keys:'ssh-ed25519 AAAA… me'",
            )


def finish_user(image_name: str, values: Mapping[str, Word]) -> UserAccount:
    """The account that checked fields stand for; from here on its password is a hash."""
    name = values["username"].text
    clear = values["passwd"].text if "passwd" in values else ""
    hashed = clear if not clear or is_crypted(clear) else crypt_sha512(clear, salt_for(image_name, name))
    return UserAccount(
        name=name,
        password_hash=hashed,
        ssh_authorized_keys=tuple(_listed(values.get("ssh_authorized_keys"))),
        lock_password=read_flag(values.get("lock_passwd"), default=not hashed),
        sudo=read_flag(values.get("sudo"), default=False),
        shell=values["shell"].text if "shell" in values else "/bin/sh",
        groups=tuple(dict.fromkeys(_listed(values.get("groups")))),
        ssh_password_auth=read_flag(values.get("ssh_pwauth"), default=False),
        password_expired=read_flag(values.get("chpasswd_expire"), default=False),
    )


def _listed(word: Word | None) -> list[str]:
    return [] if word is None else [item.strip() for item in word.text.split(",") if item.strip()]


def read_flag(word: Word | None, *, default: bool) -> bool:
    """A boolean as people write it.

    Raises:
      UsageError: it is none.
    """
    if word is None:
        return default
    value = _BOOLEANS.get(word.text.lower())
    if value is None:
        raise word.place.error(f"expected true or false, found {word.text[:40]!r}", hint="true, yes, 1, on; false, no, 0, off")
    return value
