"""Churn: twelve real nodes of which one after the other is killed with -9 and started again, under users' writes.

Voters and followers on loopback. One of each is never touched, and shows over time what a node holds: memory, open files,
sockets, threads, tasks. All others are killed in random order, one every few seconds, and started a moment later. Users write
signed values: at the voters' bulk doors, where the answer says only that it is on that one node's disk and sent, and at two
followers' APIs, which hand it to a voter and answer when it is certified. What was answered is accepted; after the last restart
it must be read, certified, at each of the twelve.

python -m bench.run churn [--small]
python -m bench.macro.churn --seconds 300 --voters 7
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.macro.state_network import BULK_SOCKET, BulkClient, CannotMeasureError, _data_folder, rss_mib
from bench.report import header
from formation.cli.local_network import LocalNetwork, LocalNode
from formation.core.errors import FormationError
from formation.core.event import ValuePut, event_body
from formation.core.intent import LIFETIME_MS, NONCE_SIZE_BYTES, Intent, sign_intent
from formation.core.keys import KeyPair, write_key_file
from formation.core.manifest import Draft

NODE_COUNT = 12
SECONDS = 600.0
SECONDS_SMALL = 40.0
# A restart takes two to four seconds of a core: on two cores a faster nemesis would leave nobody up.
KILL_PAUSE_S = (2.0, 5.0)
DOWN_S = (0.2, 2.0)
WRITE_PAUSE_S = (0.3, 1.0)
WRITING_FOLLOWER_COUNT = 2
SAMPLE_COUNT = 12
# Everything accepted is certified and seen by all so soon after the last restart, on a machine with two busy cores.
SETTLE_MAX_S = 60.0
MESH_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 8.0
LEVEL_OBSERVED, LEVEL_CERTIFIED = 0, 1
READ_BATCH_COUNT = 200
_POLL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one node holds."""

    at_s: float
    """Since the kills began."""
    rss_mib: float
    file_count: int
    """Open file descriptors, sockets included."""
    socket_count: int
    thread_count: int
    task_count: int
    """Of trio; -1: it did not say."""


@dataclass(slots=True)
class Report:
    """What came of it."""

    seconds: float
    voter_count: int
    kill_count: int = 0
    accepted_count: int = 0
    unanswered_count: int = 0
    """Writes that were refused or cut off; they may or may not be there."""
    settle_s: dict[str, float] = field(default_factory=dict)
    """By node: seconds from the last restart until it read all that was accepted, certified."""
    missing: dict[str, int] = field(default_factory=dict)
    """By node: accepted operations that it had not certified after SETTLE_MAX_S."""
    restart_s: list[float] = field(default_factory=list)
    """From start of a process to its first answer; those that were not killed before it."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """Of the two that are never killed; the last one after everything has settled."""

    def leaks(self) -> list[str]:
        """What the nodes that ran all the time hold at rest and did not at the beginning; empty: nothing to speak of."""
        found = []
        for name, samples in self.samples.items():
            first, last = samples[0], samples[-1]
            # Two that dial each other at once keep two connections, each with its socket and some ten tasks.
            for what, slack in (
                ("file_count", NODE_COUNT),
                ("socket_count", NODE_COUNT),
                ("thread_count", 10),
                ("task_count", 150),
            ):
                before, after = getattr(first, what), getattr(last, what)
                if after > before + slack and before >= 0:
                    found.append(f"{name}: {what} {before} -> {after}")
        return found


@dataclass(slots=True)
class _Writer:
    """A user of one node, with an account of its own."""

    node: LocalNode
    network_id: Any
    is_voter: bool
    rng: random.Random
    account: KeyPair = field(default_factory=KeyPair.generate)
    accepted: list[str] = field(default_factory=list)
    count: int = 0
    _client: BulkClient | None = None

    def run(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self.count += 1
            key = f"{self.account.account_id}/k{self.count}"
            try:
                self._write(self._wish(key))
                self.accepted.append(key)
            except (CannotMeasureError, FormationError, OSError):
                self._close()
            time.sleep(self.rng.uniform(*WRITE_PAUSE_S))
        self._close()

    def _write(self, wish: bytes) -> None:
        if not self.is_voter:
            self.node.client.post_intent(wish)
            return
        if self._client is None:
            self._client = BulkClient(self.node.folder / BULK_SOCKET, timeout_s=ANSWER_TIMEOUT_S)
        self._client.write_all([wish], level=LEVEL_OBSERVED)

    def _close(self) -> None:
        if self._client is not None:
            self._client.__exit__()
            self._client = None

    def _wish(self, object_id: str) -> bytes:
        event = ValuePut(value=self.rng.randbytes(64))
        now_ms = time.time_ns() // 1_000_000
        intent = Intent(
            account=self.account.public_key,
            verb=event.verb,
            object_id=object_id,
            body=event_body(event),
            nonce=secrets.token_bytes(NONCE_SIZE_BYTES),
            created_ms=now_ms,
            expires_ms=now_ms + LIFETIME_MS,
            key=self.account.public_key,
        )
        return sign_intent(self.account.sign, intent, network_id=self.network_id).signed.raw


def measure(folder: Path, *, seconds: float, voter_count: int = 4, seed: int = 1) -> Report:
    """Found the network below an empty folder, torment it, and look; nothing is left of it afterwards.

    Raises:
      CannotMeasureError: the nodes do not start.
    """
    voters = tuple((f"voter{number}", ("/ip4/127.0.0.1/tcp/0",)) for number in range(1, voter_count + 1))
    settings = ('hypervisor = "none"', 'log_level = "warning"')
    network = LocalNetwork.found(Draft("churn", voters), folder=folder, node_settings=settings)
    try:
        for number in range(1, NODE_COUNT - voter_count + 1):
            network.nodes.append(_follower(network, f"follower{number}", settings))
        for node in network.nodes:
            network.start(node)
        network.wait_until_meshed(network.nodes[:voter_count], timeout_s=MESH_TIMEOUT_S)
        _await(network.nodes, connected_count=voter_count)
        return _Run(network, Report(seconds, voter_count), random.Random(seed)).run()
    except FormationError as exc:
        tails = [f"{node.name}: {node.log_tail()}" for node in network.nodes if not node.is_running]
        raise CannotMeasureError("\n".join((exc.message, *tails))) from exc
    finally:
        network.close()


class _Run:
    def __init__(self, network: LocalNetwork, report: Report, rng: random.Random) -> None:
        self.network = network
        self.report = report
        self.rng = rng
        voters, followers = network.nodes[: report.voter_count], network.nodes[report.voter_count :]
        self.survivors = (voters[0], followers[0])
        self.victims = [*voters[1:], *followers[1:]]
        writing = [(node, True) for node in voters] + [(node, False) for node in followers[:WRITING_FOLLOWER_COUNT]]
        network_id = network.manifest.network_id
        self.writers = [_Writer(node, network_id, is_voter, random.Random(rng.getrandbits(32))) for node, is_voter in writing]
        self.started: dict[str, float] = {}
        """By name of a node that was started and has not answered yet: when."""
        self.began = time.monotonic()

    def run(self) -> Report:
        report = self.report
        for node in self.survivors:
            report.samples[node.name] = [self._sample(node)]
        over_at = self.began + report.seconds
        threads = [
            threading.Thread(target=writer.run, args=(lambda: time.monotonic() > over_at,), daemon=True)
            for writer in self.writers
        ]
        for thread in threads:
            thread.start()
        self._torment(over_at)
        last_restart = time.monotonic()
        for thread in threads:
            thread.join()
        report.accepted_count = sum(len(writer.accepted) for writer in self.writers)
        report.unanswered_count = sum(writer.count for writer in self.writers) - report.accepted_count
        self._settle(last_restart)
        _await(self.network.nodes, connected_count=report.voter_count)
        for node in self.survivors:
            report.samples[node.name].append(self._sample(node))
        return report

    def _torment(self, over_at: float) -> None:
        next_kill_at = time.monotonic()
        sample_s = self.report.seconds / SAMPLE_COUNT
        next_sample_at = self.began + sample_s
        down: tuple[LocalNode, float] | None = None
        while down is not None or time.monotonic() < over_at:
            now = time.monotonic()
            if down is not None and now >= down[1]:
                self.network.start(down[0])
                self.started[down[0].name] = now
                down = None
                next_kill_at = now + self.rng.uniform(*KILL_PAUSE_S)
            elif down is None and now >= next_kill_at:
                victim = self.rng.choice(self.victims)
                self.network.kill(victim)
                self.started.pop(victim.name, None)
                self.report.kill_count += 1
                down = (victim, now + self.rng.uniform(*DOWN_S))
            if now >= next_sample_at:
                next_sample_at += sample_s
                for node in self.survivors:
                    self.report.samples[node.name].append(self._sample(node))
            self._note_restarts()
            for node in self.network.nodes:
                if not node.is_running and (down is None or node is not down[0]):
                    raise CannotMeasureError(f"{node.name} ended by itself: {node.last_words()}\n{node.log_tail()}")
            time.sleep(_POLL_S)

    def _note_restarts(self) -> None:
        for node in self.victims:
            if node.name in self.started and _status(node) is not None:
                self.report.restart_s.append(time.monotonic() - self.started.pop(node.name))

    def _settle(self, last_restart: float) -> None:
        """Ask each node for what it has not shown yet, until nothing is missing or the time is over."""
        accepted = [key for writer in self.writers for key in writer.accepted]
        missing = {node.name: list(accepted) for node in self.network.nodes}
        while missing and time.monotonic() < last_restart + SETTLE_MAX_S:
            for node in self.network.nodes:
                if node.name not in missing:
                    continue
                missing[node.name] = _missing(node, missing[node.name])
                if not missing[node.name]:
                    del missing[node.name]
                    self.report.settle_s[node.name] = time.monotonic() - last_restart
            time.sleep(_POLL_S)
        self.report.missing = {name: len(keys) for name, keys in missing.items()}

    def _sample(self, node: LocalNode) -> Sample:
        assert node.process is not None
        pid = node.process.pid
        files = [_link(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        told = _status(node)
        return Sample(
            at_s=time.monotonic() - self.began,
            rss_mib=rss_mib(pid),
            file_count=len(files),
            socket_count=sum(target.startswith("socket:") for target in files),
            thread_count=int(status["Threads"]),
            task_count=-1 if told is None else told["node"]["task_count"],
        )


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed meanwhile
        return ""


def _missing(node: LocalNode, keys: Sequence[str]) -> list[str]:
    """Which of these values the node has not certified."""
    try:
        with BulkClient(node.folder / BULK_SOCKET, timeout_s=ANSWER_TIMEOUT_S) as client:
            missing = []
            for start in range(0, len(keys), READ_BATCH_COUNT):
                batch = keys[start : start + READ_BATCH_COUNT]
                values = client.read_all("value", LEVEL_CERTIFIED, batch)
                missing += [key for key, value in zip(batch, values, strict=True) if value is None]
            return missing
    except (CannotMeasureError, FormationError, OSError):
        return list(keys)


def _status(node: LocalNode) -> Any | None:
    try:
        return node.client.get("/v1/status")
    except FormationError:
        return None


def _follower(network: LocalNetwork, name: str, settings: Sequence[str]) -> LocalNode:
    """A node with the manifest's file and a key of its own; not started."""
    node = LocalNode(name, network.folder / name, KeyPair.generate())
    node.folder.mkdir(mode=0o700)
    write_key_file(node.folder / "node.key", node.key)
    lines = (
        "[node]",
        f'name = "{name}"',
        f'data_dir = "{node.folder}"',
        f'cache_dir = "{node.folder / "cache"}"',
        f'manifest = "{network.folder / "network.toml"}"',
        f'api_socket = "{node.socket}"',
        'listen = ["/ip4/127.0.0.1/tcp/0"]',
        *settings,
    )
    (node.folder / "config.toml").write_text("\n".join(lines) + "\n")
    return node


def _await(nodes: Sequence[LocalNode], *, connected_count: int) -> None:
    """Wait until each of them answers and sees so many voters, itself included.

    Raises:
      CannotMeasureError: one does not, in MESH_TIMEOUT_S.
    """
    deadline = time.monotonic() + MESH_TIMEOUT_S
    for node in nodes:
        while (status := _status(node)) is None or sum(v["online"] for v in status["state"]["voters"]) < connected_count:
            if time.monotonic() > deadline:
                raise CannotMeasureError(f"{node.name} does not see all voters\n{node.log_tail()}")
            time.sleep(_POLL_S)


def show(report: Report) -> None:
    """Print the figures."""
    print(
        f"  {report.voter_count} voters, {NODE_COUNT - report.voter_count} followers, {report.seconds:.0f} s,"
        f" {report.kill_count} kills; {report.accepted_count} operations accepted, {report.unanswered_count} not answered"
    )
    if report.restart_s:
        print(
            f"  restart to first answer                    p50 {statistics.median(report.restart_s):.1f} s,"
            f" max {max(report.restart_s):.1f} s, n={len(report.restart_s)}"
        )
    if report.settle_s:
        print(
            f"  all certified at all nodes after the last restart: {max(report.settle_s.values()):.1f} s"
            f" (p50 of the nodes {statistics.median(report.settle_s.values()):.1f} s)"
        )
    for name, count in report.missing.items():
        print(f"  MISSING at {name}: {count} operations after {SETTLE_MAX_S:.0f} s")
    print("  node that is never killed      at   memory   files  sockets  threads  tasks")
    for name, samples in report.samples.items():
        for sample in samples:
            print(
                f"  {name:<24} {sample.at_s:>6.0f} s  {sample.rss_mib:>4.0f} MiB  {sample.file_count:>5}"
                f"  {sample.socket_count:>7}  {sample.thread_count:>7}  {sample.task_count:>5}"
            )
    print("  leaks: " + ("; ".join(report.leaks()) or "none"))


def _measure_and_show(*, seconds: float, voter_count: int, seed: int) -> None:
    print(header(f"Churn: {NODE_COUNT} processes, one killed with -9 and restarted every few seconds"))
    try:
        with _data_folder() as folder:
            show(measure(folder, seconds=seconds, voter_count=voter_count, seed=seed))
    except CannotMeasureError as exc:
        print(f"  not measured: {exc}")


def main(*, small: bool) -> None:
    """Print the figures."""
    _measure_and_show(seconds=SECONDS_SMALL if small else SECONDS, voter_count=4, seed=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--voters", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    _measure_and_show(seconds=given.seconds, voter_count=given.voters, seed=given.seed)
