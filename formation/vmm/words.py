"""What a guest and its hypervisor say, as sentences for people.

Pure. All of it is hostile text: of limited length, and without control characters.
"""

from __future__ import annotations

import signal

REASON_LENGTH_MAX = 300
POWERED_OFF = "the guest powered itself off"
"""The one end that is no failure."""


def describe_exit(*, shutdown_reason: str, status: int | None, stderr: bytes, console_tail: bytes) -> str:
    """One sentence: why a VM's process ended. Its status alone proves nothing, so the guest's and QEMU's words go first."""
    panic = [line for line in console_tail.split(b"\n") if b"Kernel panic" in line]
    match shutdown_reason:
        case "guest-shutdown":
            return POWERED_OFF
        case "guest-reset" | "guest-panic" if panic:
            return f"the guest's kernel died: {printable(panic[-1])}"
        case "guest-reset":
            return "the guest reset itself"
        case "guest-panic":
            return "the guest's kernel died"
    if status is not None and status < 0:
        name = signal.Signals(-status).name if -status in {s.value for s in signal.Signals} else "?"
        note = ": it broke its sandbox's rules" if -status == signal.SIGSYS else ""
        return f"the hypervisor was killed by signal {-status} ({name}){note}"
    text = last_line(stderr.decode(errors="replace"))
    if status:
        return f"the hypervisor ended with status {status}" + (f": {text}" if text else "")
    return "the hypervisor ended by itself" + (f": {text}" if text else "")


def printable(data: bytes) -> str:
    """A guest's words as text that is safe to show, of limited length."""
    text = data.decode(errors="replace").strip()
    return "".join(c if c.isprintable() else " " for c in text)[:REASON_LENGTH_MAX].strip()


def last_line(text: str) -> str:
    """The last line that says anything, safe to show."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return printable(lines[-1].encode()) if lines else ""
