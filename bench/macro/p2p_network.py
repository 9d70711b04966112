"""What the network is measured on: processes of ours (`p2p_peer.py`) and of js-libp2p (`p2p_peer.mjs`), told what to do.

Both answer to the same commands, on stdin. Only processes that were started here are ended.
"""

from __future__ import annotations

import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from bench.macro.state_network import CannotMeasureError

S = TypeVar("S")

OURS, JS = "ours", "js"
# Ours, with streams that are all alike.
UNORDERED = "unordered"
FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
JS_PACKAGES = ROOT / "tests" / "interop" / "node_modules" / "libp2p"
NODE_MAJOR_MIN = 20
# Sixteen that start at a time share the cores, and importing the libraries takes each a second.
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 60.0
WAIT_TIMEOUT_S = 60.0
# Where profiles go, if anywhere (cProfile's format; of ours only).
PROFILE_FOLDER = os.environ.get("FORMATION_BENCH_PROFILE", "")
_POLL_S = 0.05


def missing_reason(kind: str) -> str | None:
    """Why this kind of peer cannot run on this machine; None: it can."""
    if kind in (OURS, UNORDERED):
        return None
    node = shutil.which("node")
    if node is None:
        return f"this machine lacks Node.js {NODE_MAJOR_MIN} or later, with npm"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    if not version.startswith("v") or int(version[1:].partition(".")[0]) < NODE_MAJOR_MIN:
        return f"Node.js here is {version}, js-libp2p needs {NODE_MAJOR_MIN}"
    if not JS_PACKAGES.is_dir():
        return "the JavaScript packages are not installed: ./bootstrap setup"
    return None


def present_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Those that can run here; of the others it is printed why not."""
    reasons = {kind: missing_reason(kind) for kind in kinds}
    for kind, reason in reasons.items():
        if reason is not None:
            print(f"  {kind} not measured: {reason}")
    return tuple(kind for kind, reason in reasons.items() if reason is None)


class PeerProcess:
    """One peer."""

    def __init__(self, kind: str, seed: bytes, *, discovers: bool, namespace: str = "") -> None:
        options: dict[str, Any] = {"seed": seed.hex(), "discovers": discovers, "is_bulk": kind != UNORDERED}
        if kind == OURS and PROFILE_FOLDER:
            options["profile"] = f"{PROFILE_FOLDER}/{seed.hex()[:8]}.prof"
        program = ["node", str(FOLDER / "p2p_peer.mjs")] if kind == JS else [sys.executable, "-m", "bench.macro.p2p_peer"]
        if namespace:
            program = ["ip", "netns", "exec", namespace, *program]
        self.kind = kind
        # What a peer says to stderr may be long; a pipe that nobody reads would stop it.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        self._process = subprocess.Popen(
            [*program, json.dumps(options)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._numbers = count(1)
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {0: queue.Queue()}
        self._last_words: str | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.node_id = ""
        self.addresses: list[str] = []

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Until it listens."""
        ready = self._wait(0, START_TIMEOUT_S, "start")
        self.node_id, self.addresses = ready["ready"], ready["addresses"]

    def begin(self, command: str, **options: Any) -> int:
        """Tell it to do something; `result` waits for the answer to this number."""
        number = next(self._numbers)
        self._answers[number] = queue.Queue()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"id": number, "command": command, **options}) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._answers[number].put({"ended": "its stdin is closed"})
        return number

    def result(self, number: int, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """What it answered.

        Raises:
          CannotMeasureError: it failed, ended, or did not answer in time.
        """
        answer = self._wait(number, timeout_s, "a command")
        if "error" in answer:
            raise CannotMeasureError(f"{self.kind}: {answer['error']}")
        return answer["ok"]

    def __call__(self, command: str, *, timeout_s: float = ANSWER_TIMEOUT_S, **options: Any) -> Any:
        """Do something and wait for the answer.

        Raises:
          As `result`.
        """
        return self.result(self.begin(command, **options), timeout_s=timeout_s)

    def _wait(self, number: int, timeout_s: float, what: str) -> dict[str, Any]:
        if self._last_words is not None:
            raise CannotMeasureError(f"{self.kind}: the peer has ended: {self._last_words}")
        try:
            answer = self._answers[number].get(timeout=timeout_s)
        except queue.Empty:
            raise CannotMeasureError(f"{self.kind}: no answer to {what} in {timeout_s:.0f} s") from None
        finally:
            self._answers.pop(number, None)
        if "ended" in answer:
            raise CannotMeasureError(f"{self.kind}: the peer has ended: {answer['ended']}")
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            waiting = self._answers.get(answer.get("id", 0))
            if waiting is not None:
                waiting.put(answer)
        self._process.wait()
        if not self._errors.closed:
            self._errors.seek(0)
            self._last_words = self._errors.read()[-1000:].strip() or f"exit status {self._process.returncode}"
        for waiting in list(self._answers.values()):
            waiting.put({"ended": self._last_words})

    def stop_soon(self) -> None:
        """It ends when its stdin does."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            return  # it has ended

    def end(self) -> None:
        """Leave nothing."""
        self.stop_soon()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(STOP_TIMEOUT_S)
        self._errors.close()


@contextmanager
def running_peers(
    kinds: Sequence[str], *, seed: str = "", discovers: bool = False, namespace: str = ""
) -> Iterator[list[PeerProcess]]:
    """One peer of each of these kinds, listening on loopback and connected to nobody; the same ids for the same seed.

    With `namespace`, on that network namespace's loopback.
    """
    peers: list[PeerProcess] = []
    try:
        for index, kind in enumerate(kinds):
            key_seed = random.Random(f"{seed}/{index}").randbytes(32)
            peers.append(PeerProcess(kind, key_seed, discovers=discovers, namespace=namespace))
        for peer in peers:
            peer.wait_ready()
        yield peers
    finally:
        for peer in peers:
            peer.stop_soon()
        for peer in peers:
            peer.end()


def all_do(peers: Sequence[PeerProcess], command: str, **options: Any) -> list[Any]:
    """The same command to all at a time."""
    numbers = [peer.begin(command, **options) for peer in peers]
    return [peer.result(number) for peer, number in zip(peers, numbers, strict=True)]


def connect(peer: PeerProcess, other: PeerProcess) -> None:
    """Connect two."""
    peer("connect", peer=other.node_id, addresses=other.addresses)


def wait_each(peers: Sequence[PeerProcess], command: str, at_least: Sequence[int]) -> None:
    """Until what each answers has reached its number.

    Raises:
      CannotMeasureError: it has not in time.
    """
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while True:
        got = all_do(peers, command)
        if all(one >= wanted for one, wanted in zip(got, at_least, strict=True)):
            return
        if time.monotonic() > deadline:
            raise CannotMeasureError(f"{peers[0].kind}: {command} {got}, wanted {list(at_least)}")
        time.sleep(_POLL_S)


# ── what a process costs ────────────────────────────────────────────────────────────────────────────────────────────


def proportional_mib(pid: int) -> float:
    """Memory, of what is shared with other processes its part."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def moved_bytes(pid: int) -> int | None:
    """Sent and received by the TCP connections that it now holds; None: no `ss`, which counts."""
    if shutil.which("ss") is None:
        return None
    listing = subprocess.run(["ss", "-tinpHO"], capture_output=True, text=True, check=True).stdout
    lines = [line for line in listing.splitlines() if f"pid={pid}," in line]
    return sum(int(number) for line in lines for number in re.findall(r"\bbytes_(?:sent|received):(\d+)", line))


def take_turns(rounds: int, subjects: Sequence[S], run: Callable[[S], None], name_of: Callable[[S], str]) -> None:
    """Run each so often, in one order and back in turn; what cannot be measured is said and left out."""
    for number in range(rounds):
        for subject in subjects if number % 2 == 0 else subjects[::-1]:
            try:
                run(subject)
            except CannotMeasureError as exc:
                print(f"  {name_of(subject)}, round {number + 1} not measured to its end: {exc}")


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values; nan of none."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else float("nan")
