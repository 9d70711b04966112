"""SHA-512 crypt, the `$6$` form of passwords in /etc/shadow.

Source: Ulrich Drepper 2007, "Unix crypt using SHA-256 and SHA-512", version 0.6. Python's own `crypt` module leaves in
3.13. The salt is not random: builds must be reproducible. It is made of image and user name (never of the password,
which would let a guesser skip the 5,000 rounds), so it is different for each user of each image.
"""

from __future__ import annotations

import hashlib
import re

_ALPHABET = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ROUNDS = 5000
_CRYPTED = re.compile(r"^\$6\$(rounds=[0-9]{4,9}\$)?[./0-9A-Za-z]{1,16}\$[./0-9A-Za-z]{86}$")
# The work grows with the square of it; a passphrase is shorter.
PASSWORD_SIZE_MAX_BYTES = 128


def is_crypted(text: str) -> bool:
    """Whether the text is the result of sha512-crypt already."""
    return _CRYPTED.match(text) is not None


def salt_for(image_name: str, username: str) -> str:
    """16 characters."""
    digest = hashlib.sha256(f"formation.passwd.v1\0{image_name}\0{username}".encode()).digest()
    return "".join(_ALPHABET[byte & 63] for byte in digest[:16])


def crypt_sha512(password: str, salt: str) -> str:
    """`$6$salt$…` of a password of at most `PASSWORD_SIZE_MAX_BYTES`."""
    key, salted = password.encode(), salt.encode()
    assert len(key) <= PASSWORD_SIZE_MAX_BYTES
    assert 1 <= len(salted) <= 16
    alternate = hashlib.sha512(key + salted + key).digest()
    mixed = hashlib.sha512(key + salted + _stretch(alternate, len(key)))
    bits = len(key)
    while bits:
        mixed.update(alternate if bits & 1 else key)
        bits >>= 1
    digest = mixed.digest()
    p = _stretch(hashlib.sha512(key * len(key)).digest(), len(key))
    s = _stretch(hashlib.sha512(salted * (16 + digest[0])).digest(), len(salted))
    for turn in range(_ROUNDS):
        step = hashlib.sha512(p if turn & 1 else digest)
        if turn % 3:
            step.update(s)
        if turn % 7:
            step.update(p)
        step.update(digest if turn & 1 else p)
        digest = step.digest()
    return f"$6${salt}${_encode(digest)}"


def _stretch(block: bytes, size: int) -> bytes:
    return (block * (size // len(block) + 1))[:size]


def _encode(digest: bytes) -> str:
    letters = []
    a, b, c = 0, 21, 42
    for _ in range(21):
        letters.append(_base64(digest[a] << 16 | digest[b] << 8 | digest[c], 4))
        a, b, c = b + 1, c + 1, a + 1
    return "".join(letters) + _base64(digest[63], 2)


def _base64(value: int, count: int) -> str:
    return "".join(_ALPHABET[value >> 6 * place & 63] for place in range(count))
