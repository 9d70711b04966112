"""`formation vm console`: this terminal as the guest's.

Keys go out in small posts, one after the other, so that their order holds; the guest's output comes as one endless
answer in a thread of its own. The terminal's settings are put back however it ends.
"""

from __future__ import annotations

import os
import queue
import select
import sys
import termios
import threading
import tty
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from formation.core.errors import FormationError, UsageError

if TYPE_CHECKING:
    from formation.cli.context import Cli

# Ctrl-], as telnet and virsh have it: a key that shells and editors leave alone.
DETACH_KEY = b"\x1d"
# A paste comes in one read up to the terminal's own buffer.
_READ_SIZE_BYTES = 4096
_POLL_S = 0.2


def run_console(cli: Cli, vm: Mapping[str, Any]) -> None:
    """Connect until the detach key, the guest's end or an error.

    Raises:
      UsageError: stdin is no terminal.
      FormationError: the node refuses, or the connection breaks.
    """
    from formation.cli.wish import make_permit

    if not sys.stdin.isatty():
        raise UsageError("a console needs a terminal", hint="for the output alone: formation vm logs -f VM")
    name = str((vm.get("spec") or {}).get("name") or vm["vm_id"])
    ended: queue.Queue[FormationError | None] = queue.Queue()
    opened = threading.Event()
    path, permit = f"/v1/vms/{vm['vm_id']}/console", make_permit(cli, str(vm["vm_id"]))
    reader = threading.Thread(target=_copy_output, args=(cli, path, permit, opened, ended), daemon=True)
    reader.start()
    while not opened.wait(_POLL_S):
        _raise_if_ended(ended, name)
    cli.out.remark(f"Connected to {name}. Press Enter for a prompt; Ctrl-] leaves.")
    with raw_terminal(sys.stdin.fileno()):
        error = _copy_keys(cli, f"{path}/input", ended)
    sys.stderr.write("\r\n")
    if error is not None:
        raise error
    cli.out.remark(f"Left the console of {name}.")


def split_at_detach(data: bytes) -> tuple[bytes, bool]:
    """What of the typed bytes goes to the guest, and whether the detach key was among them."""
    before, key, _ = data.partition(DETACH_KEY)
    return before, bool(key)


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """The terminal in raw mode; as it was afterwards, whatever happens."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _copy_keys(cli: Cli, path: str, ended: queue.Queue[FormationError | None]) -> FormationError | None:
    fd = sys.stdin.fileno()
    while True:
        try:
            return ended.get_nowait()
        except queue.Empty:
            pass
        readable, _, _ = select.select([fd], [], [], _POLL_S)
        if not readable:
            continue
        typed, leaves = split_at_detach(os.read(fd, _READ_SIZE_BYTES))
        try:
            if typed:
                cli.client.post_bytes(path, typed)
        except FormationError as error:
            return error
        if leaves or not typed:
            return None


def _copy_output(
    cli: Cli, path: str, permit: bytes, opened: threading.Event, ended: queue.Queue[FormationError | None]
) -> None:
    try:
        # A guest at a prompt is silent for as long as its user thinks.
        for data in cli.client.stream(path, permit=permit, timeout_s=None):
            opened.set()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    except FormationError as error:
        ended.put(error)
    else:
        ended.put(None)


def _raise_if_ended(ended: queue.Queue[FormationError | None], name: str) -> None:
    try:
        error = ended.get_nowait()
    except queue.Empty:
        return
    raise error or FormationError(f"the console of {name} closed at once", hint=f"formation vm show {name}")
