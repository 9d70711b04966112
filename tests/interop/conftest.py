"""A peer in JavaScript (peer.mjs) for the tests; without Node.js they skip by name, in CI they must not."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
NODE_MAJOR_MIN = 20
START_TIMEOUT_S = 20.0
CALL_TIMEOUT_S = 40.0


def missing_reason() -> str | None:
    """Why the JavaScript peer cannot run on this machine; None: it can."""
    node = shutil.which("node")
    if node is None:
        return f"this machine lacks Node.js {NODE_MAJOR_MIN} or later, with npm"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    if not version.startswith("v") or int(version[1:].partition(".")[0]) < NODE_MAJOR_MIN:
        return f"Node.js here is {version}, the peer needs {NODE_MAJOR_MIN}"
    if not (FOLDER / "node_modules" / "libp2p").is_dir():
        return "the JavaScript packages are not installed: ./bootstrap setup"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only what is in this folder needs Node.js."""
    own = [item for item in items if item.path.parent == FOLDER]
    reason = missing_reason() if own else None
    for item in own if reason is not None else ():
        item.add_marker(pytest.mark.skip(reason=str(reason)))


class JsError(Exception):
    """What the JavaScript peer answered instead of a result."""


class JsPeer:
    """One process of peer.mjs: commands in, answers out. Its methods block; call them from a thread where trio runs."""

    def __init__(self, seed: bytes, **options: str) -> None:
        self._process = subprocess.Popen(
            ["node", str(FOLDER / "peer.mjs"), seed.hex(), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._waiting: dict[int, queue.Queue[dict[str, Any]]] = {0: queue.Queue()}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        ready = self._wait(0, START_TIMEOUT_S, "start")
        self.node_id: str = ready["ready"]
        self.addresses: list[str] = ready["addresses"]

    def __call__(self, command: str, *, timeout_s: float = CALL_TIMEOUT_S, **options: Any) -> Any:
        """Run a command.

        Raises:
          JsError: it failed, or did not answer in time.
        """
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = queue.Queue()
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"id": number, "command": command, **options}) + "\n")
            self._process.stdin.flush()
        answer = self._wait(number, timeout_s, command)
        if "error" in answer:
            raise JsError(f"{command}: {answer['error']}")
        return answer["ok"]

    def _wait(self, number: int, timeout_s: float, command: str) -> dict[str, Any]:
        try:
            answer = self._waiting[number].get(timeout=timeout_s)
        except queue.Empty:
            raise JsError(f"{command}: no answer in {timeout_s:.0f} s") from None
        finally:
            self._waiting.pop(number, None)
        if "ended" in answer:
            raise JsError(f"{command}: the peer ended: {answer['ended']}")
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            waiting = self._waiting.get(answer.get("id", 0))
            if waiting is not None:
                waiting.put(answer)
        last_words = self._process.stderr.read()[-2000:]
        for waiting in list(self._waiting.values()):
            waiting.put({"ended": last_words})

    @property
    def is_running(self) -> bool:
        """Whether its process is alive."""
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL: its connections end without a goodbye of its own."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Leave nothing."""
        if self.is_running:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()


@pytest.fixture
def start_js() -> Iterator[Callable[..., JsPeer]]:
    """Starts peers by their 32-byte seed, and options as node.mjs knows them; they end with the test."""
    peers: list[JsPeer] = []

    def start(seed: bytes, **options: str) -> JsPeer:
        peers.append(JsPeer(seed, **options))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()
