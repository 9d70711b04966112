"""What the state layer is measured on: real node processes, or etcd members, on loopback; and the load generator.

Both kinds of network look alike from here: start, ask for the members' addresses, kill one, look at what they cost, stop.
Data lies on a real disk, for both sync it before they answer. Only processes that were started here are ended.

The generator is Go, for that is what etcd's own client is written in; it is built from `loadgen/` on first use, with
Debian's toolchain and packages, into the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from formation.cli.local_network import LocalNetwork
from formation.core.codec import decode, encode
from formation.core.errors import FormationError, error_from_code
from formation.core.event import DelegationGiven, event_body
from formation.core.intent import LIFETIME_MS, NONCE_SIZE_BYTES, Intent, sign_intent
from formation.core.keys import KeyPair
from formation.core.manifest import Draft
from formation.p2p.frames import FrameDecoder, encode_frame

SOURCES = Path(__file__).parent / "loadgen"
# Where Debian's golang-*-dev packages lie.
GO_LIBRARIES = Path("/usr/share/gocode")
INSTALL = "apt-get install --no-install-recommends etcd-server golang-go golang-etcd-server-dev iproute2"
BULK_SOCKET = "bulk.sock"
# Just below what one account may have (state/quota.py, state/claims.py).
KEYS_PER_ACCOUNT = 4_000
NAMES_PER_ACCOUNT = 250
DELEGATION_MS = 24 * 3600 * 1000
LEVEL_FINAL = 2
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 12.0
ANSWER_TIMEOUT_S = 30.0
_POLL_S = 0.1
_BUILD_TIMEOUT_S = 600.0
# A run lasts as long as it was told to and a little for connecting and reading back.
_RUN_SLACK_S = 60.0
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


class CannotMeasureError(Exception):
    """Something is missing on this machine; the text says what to do."""


class Network(Protocol):
    """Members under measurement."""

    name: str

    def targets(self) -> list[str]:
        """What clients connect to, of each member that runs."""
        ...

    def pids(self) -> list[int]:
        """Of each member that runs."""
        ...

    def kill_one(self) -> str:
        """SIGKILL the member whose loss hurts most (etcd's leader; of ours any, so the first); its target."""
        ...

    def next_victim(self) -> str:
        """The target of the member that `kill_one` would kill now."""
        ...

    def client_arguments(self) -> list[str]:
        """What the load generator must know besides the targets."""
        ...


# ── the load generator ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one run of the generator found."""

    count: int
    per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    error_count: int
    errors: dict[str, int]
    verified_count: int
    wrong_count: int
    gaps: tuple[tuple[float, float], ...]
    """(Unix ms at which it began, length in ms) of each time longer than 20 ms in which nobody succeeded."""

    def complaint(self) -> str:
        """Why these figures must not be trusted as they stand; empty: nothing is known against them."""
        if self.wrong_count:
            return f"{self.wrong_count} of {self.wrong_count + self.verified_count} clients could not read back what they wrote"
        worst = max(self.errors.items(), key=lambda item: item[1], default=("", 0))
        return f"{self.error_count} errors, most of them: {worst[0]}" if self.error_count else ""


@dataclass(slots=True)
class Run:
    """A generator at work."""

    process: subprocess.Popen[str]
    timeout_s: float

    def result(self) -> Load:
        """Wait for its end.

        Raises:
          CannotMeasureError: it failed; its own words.
        """
        try:
            text, words = self.process.communicate(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise CannotMeasureError(f"the load generator did not end in {self.timeout_s:.0f} s") from None
        if self.process.returncode:
            raise CannotMeasureError(words.strip() or f"the load generator ended with {self.process.returncode}")
        found = json.loads(text)
        names = [name for name in Load.__slots__ if name != "gaps"]
        gaps = tuple((begin_ms, length_ms) for begin_ms, length_ms in found["gaps"])
        return Load(**{name: found[name] for name in names}, gaps=gaps)


def start_load(
    network: Network, *, targets: Sequence[str], client_count: int, warm_up_s: float, duration_s: float, further: Sequence[str]
) -> Run:
    """Start the generator against these members."""
    command = [
        str(loadgen()),
        f"-targets={','.join(targets)}",
        f"-clients={client_count}",
        f"-warm-up={warm_up_s}s",
        f"-duration={duration_s}s",
        *network.client_arguments(),
        *further,
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return Run(process, warm_up_s + duration_s + _RUN_SLACK_S)


def loadgen() -> Path:
    """The generator's binary, built if these sources have not been built yet.

    Raises:
      CannotMeasureError: no Go, no etcd client library, or it does not build.
    """
    sources = sorted(SOURCES.glob("*.go"))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "formation" / "bench"
    binary = cache / f"loadgen-{digest}"
    if binary.exists():
        return binary
    if shutil.which("go") is None or not (GO_LIBRARIES / "src/go.etcd.io/etcd/clientv3").is_dir():
        raise CannotMeasureError(f"the load generator needs Go and etcd's client library: {INSTALL}")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "src" / "loadgen"
        package.mkdir(parents=True)
        for path in sources:
            shutil.copy(path, package)
        env = {**os.environ, "GO111MODULE": "off", "GOFLAGS": "", "GOPATH": f"{folder}:{GO_LIBRARIES}"}
        cache.mkdir(parents=True, exist_ok=True)
        # Under another name until it is whole: two runs may build at once.
        built = cache / f".loadgen-{os.getpid()}"
        command = ["go", "build", "-o", str(built), "loadgen"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=_BUILD_TIMEOUT_S)
        if done.returncode:
            raise CannotMeasureError(f"the load generator does not build:\n{done.stderr.strip()}")
        built.rename(binary)
    return binary


# ── etcd ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Member:
    url: str
    folder: Path
    process: subprocess.Popen[bytes]


@dataclass(slots=True)
class EtcdNetwork:
    """etcd members with their defaults: they sync before they answer."""

    name: str
    _members: list[_Member] = field(default_factory=list)

    def targets(self) -> list[str]:
        """Client URLs."""
        return [member.url for member in self._running()]

    def pids(self) -> list[int]:
        """Of the members that run."""
        return [member.process.pid for member in self._running()]

    def next_victim(self) -> str:
        """The leader's URL."""
        for member in self._running():
            status = _post(f"{member.url}/v3/maintenance/status")
            if status["header"]["member_id"] == status["leader"]:
                return member.url
        raise CannotMeasureError(f"{self.name} has no leader")

    def kill_one(self) -> str:
        """SIGKILL the leader."""
        victim = self.next_victim()
        [process] = [member.process for member in self._members if member.url == victim]
        process.kill()
        process.wait()
        return victim

    def client_arguments(self) -> list[str]:
        """Nothing but its kind."""
        return ["-system=etcd"]

    def _running(self) -> list[_Member]:
        return [member for member in self._members if member.process.poll() is None]


@contextmanager
def etcd_network(member_count: int) -> Iterator[EtcdNetwork]:
    """That many members, ready; nothing is left of them afterwards.

    Raises:
      CannotMeasureError: no etcd, or it does not start; with its last words.
    """
    binary = shutil.which("etcd")
    if binary is None:
        raise CannotMeasureError(f"etcd is not installed: {INSTALL}")
    network = EtcdNetwork(f"etcd-{member_count}")
    with _data_folder() as folder:
        try:
            network._members += _start_etcd(binary, folder, member_count)
            for member in network._members:
                _await_etcd(member)
            yield network
        finally:
            _stop([member.process for member in network._members])


def _start_etcd(binary: str, folder: Path, count: int) -> Iterator[_Member]:
    ports = _free_ports(2 * count)
    peers = [f"http://127.0.0.1:{port}" for port in ports[:count]]
    clients = [f"http://127.0.0.1:{port}" for port in ports[count:]]
    names = [f"member{number}" for number in range(1, count + 1)]
    cluster = ",".join(f"{name}={peer}" for name, peer in zip(names, peers, strict=True))
    for name, peer, client in zip(names, peers, clients, strict=True):
        home = folder / name
        home.mkdir()
        options = {
            "name": name,
            "data-dir": str(home / "data"),
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "initial-cluster": cluster,
            "initial-cluster-state": "new",
            # The default of 2 GiB is not for a load like this; 8 GB is the largest that its manual suggests.
            "quota-backend-bytes": "8000000000",
            "logger": "zap",
            "log-level": "error",
        }
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                [binary, *(f"--{key}={value}" for key, value in options.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        yield _Member(client, home, process)


def _await_etcd(member: _Member) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{member.url}/health", timeout=2) as answer:
                if json.load(answer).get("health") == "true":
                    return
        except (urllib.error.URLError, OSError, ValueError):
            pass
        if member.process.poll() is not None or time.monotonic() > deadline:
            words = (member.folder / "log").read_text(errors="replace").splitlines()[-3:]
            raise CannotMeasureError("etcd does not start: " + ("\n".join(words) or "without a word"))
        time.sleep(_POLL_S)


def _post(url: str) -> Any:
    request = urllib.request.Request(url, data=b"{}", method="POST")
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class FormationNetwork:
    """Voters without a hypervisor, and accounts that let each of them write values and claim names for them."""

    name: str
    local: LocalNetwork
    accounts: list[KeyPair] = field(default_factory=list)

    def targets(self) -> list[str]:
        """Bulk sockets."""
        return [str(node.folder / BULK_SOCKET) for node in self.local.nodes if node.is_running]

    def pids(self) -> list[int]:
        """Of the nodes that run."""
        return [node.process.pid for node in self.local.nodes if node.process is not None and node.is_running]

    def next_victim(self) -> str:
        """There is no leader whose loss would be worse."""
        return self.targets()[0]

    def kill_one(self) -> str:
        """SIGKILL the first node that runs."""
        victim = self.next_victim()
        self.local.kill(next(node for node in self.local.nodes if node.is_running))
        return victim

    def client_arguments(self) -> list[str]:
        """Keys of the accounts, and the network that signatures are for."""
        return ["-system=bulk", f"-accounts={self._account_file}", f"-network={self.local.manifest.network_id.hex()}"]

    @property
    def _account_file(self) -> Path:
        return self.local.folder / "accounts.json"

    def make_accounts(self, count: int) -> None:
        """Fresh accounts that let every node write in their name; returns when that is final.

        Raises:
          CannotMeasureError: a node refused.
        """
        self.accounts = [KeyPair.generate() for _ in range(count)]
        with os.fdopen(os.open(self._account_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump([{"account_id": key.account_id, "seed": key.seed.hex()} for key in self.accounts], file)
        with BulkClient(Path(self.targets()[0])) as client:
            now_ms = time.time_ns() // 1_000_000
            wishes = [
                self._delegation(account, node.key.node_id, now_ms) for account in self.accounts for node in self.local.nodes
            ]
            try:
                client.write_all(wishes, level=LEVEL_FINAL)
            except FormationError as exc:
                raise CannotMeasureError(f"a delegation was refused: {exc.message}") from exc

    def _delegation(self, account: KeyPair, node_id: str, now_ms: int) -> bytes:
        given = DelegationGiven(
            node_id=node_id, verbs=("claim.made", "value.put"), prefix="", expires_ms=now_ms + DELEGATION_MS
        )
        intent = Intent(
            account=account.public_key,
            verb=given.verb,
            object_id=account.account_id,
            body=event_body(given),
            nonce=secrets.token_bytes(NONCE_SIZE_BYTES),
            created_ms=now_ms,
            expires_ms=now_ms + LIFETIME_MS,
            key=account.public_key,
        )
        return sign_intent(account.sign, intent, network_id=self.local.manifest.network_id).signed.raw


class BulkClient:
    """As much of a client of the bulk door as getting ready takes; blocking."""

    def __init__(self, path: Path, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Connect.

        Raises:
          CannotMeasureError: nobody listens there.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError as exc:
            self._socket.close()
            raise CannotMeasureError(f"no bulk door at {path}: {exc.strerror}") from exc
        self._decoder = FrameDecoder(size_max_bytes=1 << 20)
        self._answers: list[list[Any]] = []

    def __enter__(self) -> BulkClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def write_all(self, ops: Sequence[object], *, level: int) -> None:
        """Write each op by a request of its own; all must succeed.

        Raises:
          FormationError: the first refusal.
        """
        self._socket.sendall(
            b"".join(encode_frame(encode([number, "write", level, [op]])) for number, op in enumerate(ops, start=1))
        )
        for _ in ops:
            _result(self._next())

    def read(self, what: str, level: int, key: str) -> Any:
        """The value at a level.

        Raises:
          FormationError: it cannot be read.
        """
        self._socket.sendall(encode_frame(encode([1, "read", what, level, key])))
        return _result(self._next())

    def read_all(self, what: str, level: int, keys: Sequence[str]) -> list[Any]:
        """The values at a level, in the order of the keys; asked for all at once.

        Raises:
          FormationError: one cannot be read.
        """
        self._socket.sendall(
            b"".join(encode_frame(encode([number, "read", what, level, key])) for number, key in enumerate(keys, start=1))
        )
        answers = {answer[0]: answer for answer in (self._next() for _ in keys)}
        return [_result(answers[number]) for number in range(1, len(keys) + 1)]

    def _next(self) -> list[Any]:
        while not self._answers:
            chunk = self._socket.recv(64 * 1024)
            if not chunk:
                raise CannotMeasureError("the node closed its bulk door")
            self._answers += [decode(frame, list) for frame in self._decoder.feed(chunk)]
        return self._answers.pop(0)


def _result(answer: list[Any]) -> Any:
    if answer[1] != "ok":
        raise error_from_code(answer[1], answer[2], answer[3])
    return answer[2]


@contextmanager
def formation_network(*, voter_count: int = 4, key_count: int = 0, claim_count: int = 0) -> Iterator[FormationNetwork]:
    """That many voters, connected to each other, with accounts for so many keys and claims; nothing is left of it afterwards.

    Raises:
      CannotMeasureError: they do not start, or have no bulk door.
    """
    draft = Draft("bench", tuple((f"node{number}", ("/ip4/127.0.0.1/tcp/0",)) for number in range(1, voter_count + 1)))
    with _data_folder() as folder:
        # The figures are for nodes that do nothing but keep the state.
        local = LocalNetwork.found(draft, folder=folder, node_settings=('hypervisor = "none"', 'log_level = "warning"'))
        network = FormationNetwork(f"ours-{voter_count}", local)
        try:
            for node in local.nodes:
                local.start(node)
            local.wait_until_meshed()
            await_doors(network)
            network.make_accounts(max(-(-key_count // KEYS_PER_ACCOUNT), -(-claim_count // NAMES_PER_ACCOUNT)))
            yield network
        except FormationError as exc:
            # The logs go with the folder, so what is told here is all that is left.
            tails = [node.log_tail() for node in local.nodes if not node.is_running]
            raise CannotMeasureError("\n".join((exc.message, *tails))) from exc
        finally:
            local.close()


def await_doors(network: FormationNetwork) -> None:
    """Wait until each voter that runs listens for programs.

    Raises:
      CannotMeasureError: one does not.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while missing := [target for target in network.targets() if not Path(target).is_socket()]:
        if time.monotonic() > deadline:
            raise CannotMeasureError(f"no bulk door at {missing[0]}")
        time.sleep(_POLL_S)


# ── what members cost ───────────────────────────────────────────────────────────────────────────────────────────────


def rss_mib(pid: int) -> float:
    """Resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pid: int) -> float:
    """Processor time used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sent_bytes(pids: Sequence[int]) -> int:
    """What these processes have sent by the TCP connections that they now hold.

    Raises:
      CannotMeasureError: no `ss`.
    """
    if shutil.which("ss") is None:
        raise CannotMeasureError(f"ss, which counts bytes, is not installed: {INSTALL}")
    listing = subprocess.run(["ss", "-tinpHO"], capture_output=True, text=True, check=True).stdout
    wanted = {str(pid) for pid in pids}
    lines = [line for line in listing.splitlines() if wanted & set(re.findall(r"pid=(\d+)", line))]
    return sum(int(number) for line in lines for number in re.findall(r"\bbytes_sent:(\d+)", line))


# ── folders, ports, ends ────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _data_folder() -> Iterator[Path]:
    """A directory on a disk: a file system in memory would make every sync free."""
    base = Path(os.environ.get("TMPDIR") or "/var/tmp")
    kind = _file_system(base)
    if kind in _MEMORY_FILE_SYSTEMS:
        raise CannotMeasureError(f"{base} is a {kind}, where a sync costs nothing: set TMPDIR to a directory on a disk")
    with tempfile.TemporaryDirectory(prefix="formation-bench-", dir=base, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _file_system(path: Path) -> str:
    rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = {str(path.resolve()), *(str(parent) for parent in path.resolve().parents)}
    # The longest mount point above it; of two at one place the later hides the earlier.
    return max(((len(row[1]), index, row[2]) for index, row in enumerate(rows) if row[1] in above), default=(0, 0, ""))[2]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
