"""`formation demo`: the main job, shown on this machine with four real nodes and a real guest.

It runs the same commands that a person would type, and prints each. What it makes lies below one temporary directory;
at the end, after a failure and on Ctrl-C, nothing of it is left, unless `--keep` asked for it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError
from urllib.request import urlopen

from formation.cli.local_network import LocalNetwork, LocalNode, end_processes_of
from formation.core.errors import FormationError, HostError, NotFoundError, UsageError
from formation.core.manifest import read_draft

CATCH_UP_TIMEOUT_S = 30.0
PAGE_TIMEOUT_S = 20.0
_PAGE_SIZE_MAX_BYTES = 64 * 1024
_STEP_TEXT_WIDTH = 64


def run_demo(*, keep: bool = False, stop: Path | None = None) -> None:
    """Show the main job.

    Args:
      keep: leave nodes and guests running, and say what to try next.
      stop: end a demo that was kept, by its directory, instead.

    Raises:
      FormationError: a step failed; says which and why.
    """
    if stop is not None:
        _stop_kept(stop)
        return
    _check_host()
    draft = read_draft(_shared("peers/demo.toml"))
    # A polite end for SIGTERM too: the clean-up below is in `finally`.
    signal.signal(signal.SIGTERM, _interrupt)
    network = LocalNetwork.found(draft)
    is_kept = False
    try:
        _Demo(network).run()
        is_kept = keep
        if keep:
            _say_what_next(network)
    finally:
        if not is_kept:
            # A second Ctrl-C must not leave half of it behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            network.close()


class _Demo:
    def __init__(self, network: LocalNetwork) -> None:
        self._network = network
        self._steps: list[tuple[str, float]] = []

    def run(self) -> None:
        """All steps, then their times."""
        network = self._network
        names = ", ".join(node.name for node in network.nodes)
        _say(f"Network {network.manifest.name}: {names}; quorum {network.manifest.quorum_size} of {len(network.nodes)}")
        with self._step("four nodes started, all see one another"):
            for node in network.nodes:
                network.start(node)
            network.wait_until_meshed()
        with self._step("image built"):
            self._formation("image", "build", str(_shared("examples/hello")))
        with self._step("first VM from command to ready"):
            self._formation("vm", "create", "hello", "web")
        with self._step("page fetched over the published port"):
            self._show_page("web")
        victim = self._victim("web")
        with self._step(f"{victim.name} killed with SIGKILL, second VM created with 3 of 4"):
            _say(f"\n$ kill -9 {victim.process.pid if victim.process else 0}    # node {victim.name}")
            network.kill(victim)
            self._formation("vm", "create", "hello", "web2")
            self._show_page("web2")
        with self._step(f"{victim.name} restarted and caught up"):
            network.start(victim)
            network.wait_until_meshed()
            self._await_caught_up(victim)
            self._formation("ps", host=victim)
        _say("\nWhat it took:")
        for text, took_s in self._steps:
            _say(f"  {text:<{_STEP_TEXT_WIDTH}} {took_s:6.1f} s")

    @contextmanager
    def _step(self, text: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except FormationError as exc:
            exc.message = f"demo step failed: {text}: {exc.message}"
            _say_logs(self._network)
            raise
        self._steps.append((text, time.monotonic() - started))
        _say(f"✔ {text} ({self._steps[-1][1]:.1f} s)")

    def _formation(self, *arguments: str, host: LocalNode | None = None) -> None:
        env = dict(self._network.env)
        shown = " ".join(arguments)
        if host is not None:
            env["FORMATION_HOST"] = str(host.socket)
            shown += f"    # asking {host.name}"
        _say(f"\n$ formation {shown}")
        status = subprocess.run([sys.executable, "-m", "formation", *arguments], env=env, check=False).returncode
        if status:
            raise HostError(f"formation {arguments[0]} ended with exit status {status}", hint="its message stands above")

    def _victim(self, name: str) -> LocalNode:
        """A node that is neither the one we talk to nor the one that runs the VM."""
        holder = self._network.nodes[0].client.get(f"/v1/vms/{name}")["placement"]["node_id"]
        return next(node for node in self._network.nodes[1:] if node.key.node_id != holder)

    def _show_page(self, name: str) -> None:
        vm = self._network.nodes[0].client.get(f"/v1/vms/{name}")
        if not vm["status"]["ports"]:
            raise HostError(f"{name} publishes no port", hint="examples/hello/Formfile should EXPOSE one")
        port = vm["status"]["ports"][0][2]
        url = f"http://{vm['status']['address']}:{port}/"
        _say(f"\n$ curl {url}")
        page = _fetch(url)
        lines = [line for line in page.splitlines() if line.strip()]
        for line in lines[:8]:
            _say(f"  {line[:100]}")
        if len(lines) > 8:
            _say(f"  … {len(lines) - 8} more lines, {len(page)} bytes in all")

    def _await_caught_up(self, victim: LocalNode) -> None:
        goal = self._network.nodes[0].client.get("/v1/status")["state"]["certified_count"]
        deadline = time.monotonic() + CATCH_UP_TIMEOUT_S
        while (has := victim.client.get("/v1/status")["state"]["certified_count"]) < goal:
            if time.monotonic() > deadline:
                raise HostError(f"{victim.name} has {has} of {goal} certified operations after {CATCH_UP_TIMEOUT_S:.0f} s")
            time.sleep(0.1)
        _say(f"\n{victim.name} has caught up: {has} certified operations, {self._network.nodes[0].name} has {goal}")


def _check_host() -> None:
    # Debian keeps these in sbin, which an ordinary user's PATH may lack.
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    needed = {"qemu-system-x86_64": "qemu-system-x86", "mke2fs": "e2fsprogs", "dpkg-deb": "dpkg"}
    missing = [package for command, package in needed.items() if shutil.which(command, path=path) is None]
    if missing:
        raise HostError(
            f"the demo boots a real guest, and this machine lacks: {', '.join(missing)}",
            hint=f"as root: apt-get install {' '.join(missing)}; without, a node still votes and serves images",
        )


def _shared(name: str) -> Path:
    """A file that ships with Formation: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for base in (package.parent, package / "share"):
        if (base / name).exists():
            return base / name
    raise NotFoundError(f"{name} is missing from this installation", hint="install formation again")


def _fetch(url: str) -> str:
    deadline = time.monotonic() + PAGE_TIMEOUT_S
    while True:
        try:
            with urlopen(url, timeout=5) as answer:
                return str(answer.read(_PAGE_SIZE_MAX_BYTES).decode("utf-8", "replace"))
        except (URLError, OSError) as exc:
            if time.monotonic() > deadline:
                raise HostError(f"{url} does not answer: {exc}", hint="formation vm logs NAME") from exc
            time.sleep(0.2)


def _say(text: str) -> None:
    print(text, flush=True)


def _say_logs(network: LocalNetwork) -> None:
    for node in network.nodes:
        state = "running" if node.is_running else "not running"
        print(f"--- end of {node.name}'s log ({state})\n{node.log_tail()}", file=sys.stderr)


def _say_what_next(network: LocalNetwork) -> None:
    lines = (
        "\nAll is left running. Try:",
        f"  export FORMATION_CONFIG={network.folder / 'config.toml'}",
        "  formation ps                     # what runs where",
        "  formation top                    # live; q ends it",
        "  formation vm console web         # the guest's console; Ctrl-] leaves it",
        "  formation events -f              # what happens",
        f"  formation demo --stop {network.folder}   # end it all",
    )
    _say("\n".join(lines))


def _stop_kept(folder: Path) -> None:
    folder = folder.resolve()
    if not (folder / "network.toml").is_file() or not (folder / "n1" / "node.key").is_file():
        raise UsageError(f"{folder} is not a demo's directory", hint="formation demo --keep says its directory at the end")
    ended = end_processes_of(folder)
    shutil.rmtree(folder, ignore_errors=True)
    _say(f"ended {ended} processes and removed {folder}")


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
