"""A node's life: start order, nursery tree, drain.

Start: lock the data directory, then floor by floor, each ready before the next begins (p2p listens, state has replayed
its store, images are checked, VMs are found again), then dispatch, then the API. So the API's socket appears when the
node can answer.

Drain on SIGTERM or SIGINT: the API stops first, then the rooms from the roof down, each within a deadline. Guests go
on: a node's end is not its VMs' end. A second signal ends the process at once; the store is crash-safe.
"""

from __future__ import annotations

import fcntl
import gc
import os
import secrets
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from formation import __version__
from formation.core.errors import ConflictError, HostError
from formation.core.event import NodeAdvertised
from formation.node.api import ApiParts, TokenGuard, make_api
from formation.node.identity import prepare_data_dir
from formation.node.settings import NodeSettings, split_host_port
from formation.node.wiring import Node, build_node

log = structlog.get_logger(__name__)

DRAIN_DEADLINE_S = 8.0
API_DRAIN_S = 1.0
# Owner may read and write, nobody else: the socket's mode is the API's access rule.
_SOCKET_UMASK = 0o177
_TOKEN_FILE_NAME = "api.token"
# A tight young generation costs a third of the state layer's throughput (measured on its core: 52-68k against
# 70-78k operations a second); long-lived records are frozen out of the collector after start.
_GC_THRESHOLD = 20_000


async def run_node(settings: NodeSettings, *, on_ready: Callable[[Node], None] | None = None) -> None:
    """Run a node until a signal ends it.

    Raises:
      UsageError, HostError, ConflictError: it cannot start; says why.
    """
    gc.set_threshold(_GC_THRESHOLD)
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
                settings.api_socket.unlink(missing_ok=True)
                log.info("node.stopped", name=settings.name)


async def _start_rooms(rooms: trio.Nursery, node: Node) -> None:
    addresses: tuple[str, ...] = await rooms.start(node.p2p.run)
    log.info("p2p.listening", addresses=list(addresses))
    await rooms.start(node.state.run)
    await rooms.start(node.pack.run)
    await rooms.start(node.vmm.run)
    rooms.start_soon(node.dispatch.run)
    rooms.start_soon(_advertise, node, addresses)
    await _start_api(rooms, node)


async def _advertise(node: Node, addresses: tuple[str, ...]) -> None:
    """Tell the network what this node is, if that changed since the last time."""
    settings = node.settings
    event = NodeAdvertised(
        name=settings.name,
        addresses=addresses,
        public_address=settings.public_address,
        capacity=node.capacity,
        hypervisor=node.vmm.hypervisor_name,
        version=__version__,
    )
    known = node.state.view.node(node.key.node_id)
    if known is None or any(getattr(known, field) != getattr(event, field) for field in event.__struct_fields__):
        await node.state.append_event(event, node.key.node_id)


async def _start_api(rooms: trio.Nursery, node: Node) -> None:
    app = make_api(ApiParts(reads=node.reads, pack=node.pack, attach=node.attach))
    socket = node.settings.api_socket
    try:
        socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        socket.unlink(missing_ok=True)
        await rooms.start(partial(serve, app, _http_config(f"unix:{socket}"), mode="asgi"))
        if node.settings.api_tcp:
            host, port = split_host_port(node.settings.api_tcp)
            guarded = TokenGuard(app, token=_api_token(node.settings.data_dir))
            await rooms.start(partial(serve, guarded, _http_config(f"{host}:{port}"), mode="asgi"))
    except OSError as exc:
        where = node.settings.api_tcp or socket
        raise HostError(
            f"the API cannot listen on {where}: {exc.strerror or exc}", hint="choose another with --api-socket or --api-tcp"
        ) from exc


def _http_config(bind: str) -> Config:
    config = Config()
    config.bind = [bind]
    config.umask = _SOCKET_UMASK
    config.graceful_timeout = API_DRAIN_S
    config.errorlog = None
    config.accesslog = None
    config.include_server_header = False
    return config


def _api_token(data_dir: Path) -> str:
    path = data_dir / _TOKEN_FILE_NAME
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        token = secrets.token_urlsafe(32)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token + "\n")
        return token


async def _end_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            if scope.cancel_called:
                os._exit(128 + number)
            log.info("node.draining", signal=signal.Signals(number).name)
            # A room that does not end in time must not keep an operator waiting; SIGALRM needs no event loop.
            signal.signal(signal.SIGALRM, _drain_overdue)
            signal.setitimer(signal.ITIMER_REAL, DRAIN_DEADLINE_S)
            scope.cancel()


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
