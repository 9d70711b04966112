"""Keys of a terminal: bytes into names, and the terminal's mode while they are read."""

from __future__ import annotations

import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[C": "right",
    b"\x1b[D": "left",
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"\x1bOC": "right",
    b"\x1bOD": "left",
    b"\x1b[5~": "page-up",
    b"\x1b[6~": "page-down",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
    b"\x1b[1~": "home",
    b"\x1b[4~": "end",
}
_SINGLE = {
    0x03: "ctrl-c",
    0x12: "ctrl-r",
    0x09: "tab",
    0x0D: "enter",
    0x0A: "enter",
    0x7F: "backspace",
    0x08: "backspace",
}
# CSI: parameters, then one final byte (ECMA-48 section 5.4).
_CSI_FINAL = range(0x40, 0x7F)


def parse_keys(data: bytes) -> list[str]:
    """The keys in what one read gave.

    A terminal sends a sequence in one piece, so an escape that stands alone at the end is the Escape key. Unknown
    sequences are skipped as a whole, unknown control characters too.
    """
    keys: list[str] = []
    at = 0
    while at < len(data):
        if data[at] == 0x1B:
            length, key = _sequence(data[at:])
            at += length
            if key:
                keys.append(key)
            continue
        if data[at] in _SINGLE:
            keys.append(_SINGLE[data[at]])
            at += 1
            continue
        end = at + 1
        while end < len(data) and data[end] >= 0x20 and data[end] not in (0x1B, 0x7F):
            end += 1
        keys += [character for character in data[at:end].decode("utf-8", "ignore") if character.isprintable()]
        at = end
    return keys


def _sequence(data: bytes) -> tuple[int, str]:
    for known, key in _SEQUENCES.items():
        if data.startswith(known):
            return len(known), key
    if data[:2] == b"\x1b[":
        for length, byte in enumerate(data[2:], start=3):
            if byte in _CSI_FINAL:
                return length, ""
        return len(data), ""
    if len(data) == 1 or data[1] == 0x1B:
        return 1, "escape"
    # Alt with a key: the terminal sends an escape before it.
    return 2, ""


@contextmanager
def cbreak(fd: int) -> Iterator[None]:
    """Keys one by one and unseen; Ctrl-C comes as a key. The terminal is put back whatever happens."""
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSANOW)
        mode = termios.tcgetattr(fd)
        mode[3] &= ~termios.ISIG
        termios.tcsetattr(fd, termios.TCSANOW, mode)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
