from __future__ import annotations

import pytest

from formation.vmm.words import REASON_LENGTH_MAX, describe_exit, printable


@pytest.mark.parametrize(
    ("reason", "status", "stderr", "tail", "sentence"),
    [
        ("guest-shutdown", 0, b"", b"", "the guest powered itself off"),
        ("guest-reset", 0, b"", b"", "the guest reset itself"),
        ("guest-reset", 0, b"", b"[1.0] Kernel panic - no\n", "the guest's kernel died: [1.0] Kernel panic - no"),
        ("guest-panic", 0, b"", b"", "the guest's kernel died"),
        ("", 0, b"", b"", "the hypervisor ended by itself"),
        ("", None, b"", b"", "the hypervisor ended by itself"),
        ("", 1, b"a\nqemu: no\n", b"", "the hypervisor ended with status 1: qemu: no"),
        ("", -9, b"", b"", "the hypervisor was killed by signal 9 (SIGKILL)"),
        ("", -31, b"", b"", "the hypervisor was killed by signal 31 (SIGSYS): it broke its sandbox's rules"),
        ("", -200, b"", b"", "the hypervisor was killed by signal 200 (?)"),
    ],
)  # fmt: skip
def test_why_a_process_ended(reason: str, status: int | None, stderr: bytes, tail: bytes, sentence: str) -> None:
    """The guest's and QEMU's words go before the exit status, which alone proves nothing."""
    assert describe_exit(shutdown_reason=reason, status=status, stderr=stderr, console_tail=tail) == sentence


def test_guests_words_are_made_safe() -> None:
    """No control character and no endless text passes."""
    assert printable(b"\x1b[2Jboo\x00\xff") == "[2Jboo �"
    assert len(printable(b"x" * 10_000)) == REASON_LENGTH_MAX
