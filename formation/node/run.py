"""A node's life: start order, nursery tree, drain.

Start: lock the data directory, then floor by floor, each ready before the next begins (p2p listens, state has replayed
its store, images are checked, VMs are found again), then dispatch, then the API. So the API's socket appears when the
node can answer.

Drain on SIGTERM or SIGINT: the API stops first, then the rooms from the roof down, each within a deadline. Guests go
on: a node's end is not its VMs' end. A second signal ends the process at once; the store is crash-safe.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import platform
import re
import secrets
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from formation import __version__
from formation.core.errors import ConflictError, DeniedError, HostError, UnavailableError, UsageError
from formation.core.event import NodeAdvertised
from formation.core.files import replace_durably
from formation.node.api import ApiParts, Application, TokenGuard, make_api
from formation.node.bulk import SOCKET_NAME, BulkDoor, view_reads
from formation.node.identity import prepare_data_dir
from formation.node.settings import NodeSettings, split_host_port
from formation.node.wiring import Node, build_node
from formation.p2p.transport import TaskStatus

log = structlog.get_logger(__name__)

DRAIN_DEADLINE_S = 8.0
API_DRAIN_S = 1.0
# An observer looks this often whether it was admitted: whoever did that is waiting for it.
ADMISSION_LOOK_S = 1.0
# What the state did not take is told again; others know the node by its id meanwhile.
TELL_RETRY_S = 5.0
# Owner may read and write, nobody else: the socket's mode is the API's access rule.
_SOCKET_UMASK = 0o177
_TOKEN_FILE_NAME = "api.token"
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A person may write their own token; one of fewer characters can be guessed.
TOKEN_SIZE_MIN = 16
_TOKEN_FORM = re.compile(rf"[!-~]{{{TOKEN_SIZE_MIN},256}}")
# A tight young generation costs a third of the state layer's throughput (measured on its core: 52-68k against
# 70-78k operations a second); long-lived records are frozen out of the collector after start.
_GC_THRESHOLD = 100_000
# Every commit passes to a thread and back. A thread that wants to go on waits this long for the one that computes; the
# interpreter's 5 ms, twice a commit, would be most of a write's latency under load.
_SWITCH_INTERVAL_S = 0.0005


async def run_node(settings: NodeSettings, *, on_ready: Callable[[Node], None] | None = None) -> None:
    """Run a node until a signal ends it.

    Raises:
      UsageError, HostError, ConflictError: it cannot start; says why.
    """
    gc.set_threshold(_GC_THRESHOLD)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    prepare_data_dir(settings.data_dir)
    with _DirectoryLock(settings.data_dir):
        node = await build_node(settings)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, nursery.cancel_scope)
            try:
                async with trio.open_nursery() as rooms:
                    await _start_rooms(rooms, node)
                    gc.freeze()
                    log.info("node.ready", name=settings.name, node_id=node.key.node_id, api=str(settings.api_socket))
                    if on_ready is not None:
                        on_ready(node)
            finally:
                log.info("node.stopped", name=settings.name)


async def _start_rooms(rooms: trio.Nursery, node: Node) -> None:
    addresses: tuple[str, ...] = await rooms.start(node.p2p.run)
    log.info("p2p.listening", addresses=list(addresses))
    await rooms.start(node.state.run)
    await rooms.start(node.pack.run)
    await rooms.start(node.vmm.run)
    rooms.start_soon(node.dispatch.run)
    rooms.start_soon(_advertise, node, addresses)
    door = BulkDoor(state=node.state, reads=view_reads(lambda: node.state.view), path=node.settings.data_dir / SOCKET_NAME)
    await rooms.start(door.run)
    await _start_api(rooms, node)


async def _advertise(node: Node, addresses: tuple[str, ...]) -> None:
    """Tell the network what this node is, if that changed since the last time."""
    settings = node.settings
    if not node.state.status().may_write:
        log.info("node.observes", reason="it neither votes nor was admitted, so it reads and tells nothing")
    while not node.state.status().may_write:  # noqa: ASYNC110 - no event says so: it may come with a snapshot
        await trio.sleep(ADMISSION_LOOK_S)
    event = NodeAdvertised(
        name=settings.name,
        addresses=addresses,
        public_address=settings.public_address,
        capacity=node.capacity,
        hypervisor=node.vmm.hypervisor_name,
        version=__version__,
        cordon=node.vmm.cordon,
        labels={"arch": platform.machine(), **settings.labels},
    )
    known = node.state.view.node(node.key.node_id)
    if known is None or any(getattr(known, field) != getattr(event, field) for field in event.__struct_fields__):
        await _tell(node, event)


async def _tell(node: Node, event: NodeAdvertised) -> None:
    while True:
        try:
            await node.state.append_event(event, node.key.node_id)
        except (UnavailableError, DeniedError) as exc:
            # The outbox is full, a snapshot came in between, or the lane was closed: none is a reason to end.
            log.info("node.untold", reason=exc.message)
            await trio.sleep(TELL_RETRY_S)
        else:
            return


async def _start_api(rooms: trio.Nursery, node: Node) -> None:
    app = make_api(
        ApiParts(reads=node.reads, pack=node.pack, attach=node.attach, door=node.door, cells=node.cells, forward=node.forward)
    )
    path = node.settings.api_socket
    with _listen_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_stale_socket(path)
        await rooms.start(partial(_serve_socket, app, path))
    if node.settings.api_tcp:
        host, port = split_host_port(node.settings.api_tcp)
        guarded = TokenGuard(app, token=api_token(node.settings.data_dir))
        with _listen_errors(node.settings.api_tcp):
            await rooms.start(partial(serve, guarded, _http_config(f"{host}:{port}"), mode="asgi"))


@contextlib.contextmanager
def _listen_errors(where: str) -> Iterator[None]:
    """Say where the API cannot listen; the server's own nurseries wrap the kernel's word in groups."""
    hint = "choose another with --api-socket or --api-tcp"
    try:
        yield
    except OSError as exc:
        raise HostError(f"the API cannot listen on {where}: {exc.strerror or exc}", hint=hint) from exc
    except BaseExceptionGroup as group:
        refused, other = group.split(OSError)
        if refused is None or other is not None:
            raise
        first = next(_leaves(refused))
        raise HostError(f"the API cannot listen on {where}: {first.strerror or first}", hint=hint) from group


def _leaves(group: BaseExceptionGroup[OSError]) -> Iterator[OSError]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc


async def _serve_socket(app: Application, path: Path, *, task_status: TaskStatus[Sequence[str]]) -> None:
    """Serve on a unix socket, and remove it at the end if it is still ours."""
    identity: tuple[int, int] | None = None

    class _Started:
        def started(self, value: Sequence[str]) -> None:
            nonlocal identity
            identity = _identity(path)
            task_status.started(value)

    try:
        await serve(app, _http_config(f"unix:{path}"), mode="asgi", task_status=_Started())
    finally:
        _remove_own(path, identity)


def remove_stale_socket(path: Path) -> None:
    """Make way for our socket: remove one that nobody listens on any more.

    Raises:
      ConflictError: somebody listens there, or it is no socket; it is left alone.
      OSError: it cannot be looked at or removed.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConflictError(f"{path} is there and is no socket", hint="move it away, or choose another with --api-socket")
        with socket.socket(socket.AF_UNIX) as probe:
            # Not blocking: a listener that is too busy to take us listens all the same.
            probe.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                probe.connect(str(path))
        raise ConflictError(f"another node listens at {path}", hint="choose another with --api-socket")
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        # Its process was killed.
        path.unlink(missing_ok=True)


def _remove_own(path: Path, identity: tuple[int, int] | None) -> None:
    if identity is not None and _identity(path) == identity:
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _http_config(bind: str) -> Config:
    config = Config()
    config.bind = [bind]
    config.umask = _SOCKET_UMASK
    config.graceful_timeout = API_DRAIN_S
    config.errorlog = None
    config.accesslog = None
    config.include_server_header = False
    return config


def api_token(data_dir: Path) -> str:
    """The token in the node's directory; a new one if there is none.

    Raises:
      UsageError: the file holds no token that could guard anything; a damaged one is not replaced behind its users' backs.
      HostError: it cannot be read or written.
    """
    path = data_dir / _TOKEN_FILE_NAME
    try:
        token = path.read_bytes().decode("ascii", "replace").strip()
        if not _TOKEN_FORM.fullmatch(token):
            raise UsageError(
                f"{path} holds no API token",
                hint=f"remove it, and the node makes a new one; {TOKEN_SIZE_MIN} characters at least",
            )
        return token
    except FileNotFoundError:
        token = secrets.token_urlsafe(32)
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}", hint="check its owner and mode") from exc
    # By rename: a crash or a full disk must not leave half a token, or an empty one that anybody has.
    try:
        replace_durably(path, f"{token}\n".encode(), mode=0o600)
    except OSError as exc:
        raise HostError(f"cannot write {path}: {exc.strerror}", hint="is the node's disk full?") from exc
    return token


async def _end_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(*_END_SIGNALS) as signals:
        number = await anext(aiter(signals))
    log.info("node.draining", signal=signal.Signals(number).name)
    # Plain handlers: they need no event loop, which a room may hold up.
    for each in _END_SIGNALS:
        signal.signal(each, _end_now)
    # A room that does not end in time must not keep an operator waiting.
    signal.signal(signal.SIGALRM, _drain_overdue)
    signal.setitimer(signal.ITIMER_REAL, DRAIN_DEADLINE_S)
    scope.cancel()


def _end_now(number: int, _frame: object) -> None:
    os._exit(128 + number)


def _drain_overdue(_signal: int, _frame: object) -> None:
    os.write(2, b"formation: drain overdue, ending now (the store is crash-safe)\n")
    os._exit(1)


class _DirectoryLock:
    """One node process for one data directory; the kernel frees the lock with the process."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "lock"
        self._fd = -1

    def __enter__(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._fd)
            raise ConflictError(
                f"another node runs in {self._path.parent}", hint="stop it, or give this one its own --data-dir"
            ) from exc

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
