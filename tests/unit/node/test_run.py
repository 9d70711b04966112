"""A node's life: the lock, the doors (socket and token), start and drain."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypercorn.trio import serve
from starlette.types import Receive, Scope, Send

from formation.core.errors import ConflictError, FormationError, HostError, NotFoundError, UsageError
from formation.core.event import NodeAdmitted
from formation.core.keys import KeyPair, write_key_file
from formation.core.manifest import found_network
from formation.node.api import SendBytes, _StreamResponse
from formation.node.run import _advertise, _DirectoryLock, _http_config, api_token, remove_stale_socket, run_node
from formation.node.settings import NodeSettings
from formation.node.wiring import Node
from formation.state.feed import Level
from tests.unit.node.nodes import advertised, eventually, running

ROOT = Path(__file__).parents[3]


def test_a_stale_socket_makes_way(tmp_path: Path) -> None:
    """What a killed process left behind does not keep a node from starting."""
    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    remove_stale_socket(path)
    assert not path.exists()
    remove_stale_socket(path)


@pytest.mark.parametrize("backlog", [0, 8])
def test_a_socket_in_use_is_left_alone(tmp_path: Path, backlog: int) -> None:
    """Another node's socket is not taken from it, not even when that one is too busy to take connections."""
    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(backlog)
        for _ in range(2):
            with pytest.raises(ConflictError, match="another node listens"):
                remove_stale_socket(path)
        assert path.exists()


def test_a_file_is_not_removed_for_a_socket(tmp_path: Path) -> None:
    """A mistyped --api-socket costs nobody a file."""
    path = tmp_path / "thesis.tex"
    path.write_text("precious")
    with pytest.raises(ConflictError, match="is no socket"):
        remove_stale_socket(path)
    assert path.read_text() == "precious"


def test_a_token_is_made_once(tmp_path: Path) -> None:
    """The token is random, closed to others, and the same after a restart."""
    token = api_token(tmp_path)
    assert len(token) == 43
    assert api_token(tmp_path) == token
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [("api.token", 0o600)]


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"\xff" * 32, b"two words, one of them far too many\n"])
def test_a_damaged_token_guards_nothing_and_is_refused(tmp_path: Path, content: bytes) -> None:
    """An empty token file must not let in everybody who sends an empty token."""
    (tmp_path / "api.token").write_bytes(content)
    with pytest.raises(UsageError, match="holds no API token"):
        api_token(tmp_path)
    assert (tmp_path / "api.token").read_bytes() == content


# --- the directory's lock --------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from formation.node.run import _DirectoryLock
with _DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_is_one_nodes(tmp_path: Path) -> None:
    """A second process is refused, and told what to do; a killed one's lock is free at once."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"held\n"
            with pytest.raises(ConflictError, match="another node runs in") as caught, _DirectoryLock(tmp_path):
                raise AssertionError
            assert "--data-dir" in caught.value.hint
        finally:
            first.kill()
    with _DirectoryLock(tmp_path):
        pass
    with _DirectoryLock(tmp_path):
        pass


# --- a node's life, on real sockets ----------------------------------------------------------------------------------

VOTER = KeyPair(b"v" * 32)


@pytest.fixture
def process() -> Iterator[None]:
    """What a node changes of its process, put back: it expects the process to end with it."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    handlers, threshold = [signal.getsignal(number) for number in numbers], gc.get_threshold()
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    gc.unfreeze()
    gc.set_threshold(*threshold)


def make_settings(folder: Path, *, key: KeyPair = VOTER, **changes: Any) -> NodeSettings:
    """A node of a network of one voter; its directory is ready but for what it makes itself."""
    manifest = found_network("test", voters=[("n0", VOTER, ("/ip4/127.0.0.1/tcp/1",))], founded_ms=1)
    (folder / "network.toml").write_text(manifest.to_toml())
    data_dir = folder / "data"
    data_dir.mkdir(mode=0o700, exist_ok=True)
    if not (data_dir / "node.key").exists():
        write_key_file(data_dir / "node.key", key)
    fields: dict[str, Any] = {
        "name": "n0",
        "data_dir": data_dir,
        "cache_dir": folder / "cache",
        "manifest": folder / "network.toml",
        "listen": ("/ip4/127.0.0.1/tcp/0",),
        "allow_peers": frozenset(),
        "deny_peers": frozenset(),
        "network_key": None,
        "security": "noise",
        "operators": frozenset(),
        "kademlia": "auto",
        "mdns": False,
        "roles": (),
        "relay": "auto",
        "public_address": "127.0.0.1",
        "api_socket": folder / "run" / "node.sock",
        "api_tcp": "",
        "hypervisor": "none",
        "accelerator": "auto",
        "vcpus": 1,
        "memory_mib": 256,
        "disk_gib": 1,
        "log_level": "info",
        "log_format": "json",
    }
    return NodeSettings(**fields | changes)


async def ask(path: Path, target: str = "/v1/status") -> tuple[bytes, bytes]:
    """Head and body of an answer on the socket."""
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        await stream.send_all(f"GET {target} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join([chunk async for chunk in stream])
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def only(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        assert len(group.exceptions) == 1
        group = group.exceptions[0]
    return group


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_node_starts_answers_and_drains(number: signal.Signals, tmp_path: Path, process: None) -> None:
    """The socket is there when the node can answer, for its owner only; a signal ends the rooms and removes it."""
    settings = make_settings(tmp_path, api_tcp="127.0.0.1:0")
    nodes: list[Node] = []
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            ready = trio.Event()

            def on_ready(node: Node) -> None:
                nodes.append(node)
                ready.set()

            nursery.start_soon(partial(run_node, settings, on_ready=on_ready))
            await ready.wait()
            assert stat.S_IMODE(settings.api_socket.stat().st_mode) == 0o600
            assert (settings.data_dir / "api.token").exists()
            head, body = await ask(settings.api_socket)
            assert head.startswith(b"HTTP/1.1 200")
            assert json.loads(body)["node"]["id"] == VOTER.node_id
            with pytest.raises(ConflictError, match="another node runs in"):
                await run_node(settings)
            while nodes[0].state.view.node(VOTER.node_id) is None:  # noqa: ASYNC110 - reads what has no event
                await trio.sleep(0.01)
            os.kill(os.getpid(), number)
    assert not settings.api_socket.exists()
    with _DirectoryLock(settings.data_dir):
        pass
    with pytest.raises(FormationError):
        await nodes[0].state.append_event(advertised(nodes[0]), VOTER.node_id)


@pytest.mark.net
async def test_a_broken_stream_has_no_end_on_the_wire(tmp_path: Path) -> None:
    """The server breaks the connection off without the last chunk, by which clients know that they lack something."""

    async def job(send: SendBytes, error: FormationError | None) -> None:
        await send(b"words")
        if error is not None:
            raise error

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Raising is how an application says that it has no start of its own.
        assert scope["type"] == "http"
        error = HostError("gone") if scope["path"] == "/broken" else None
        await _StreamResponse(partial(job, error=error), media_type="text/plain")(scope, receive, send)

    path = tmp_path / "node.sock"
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, app, _http_config(f"unix:{path}"), mode="asgi"))
            head, body = await ask(path, "/whole")
            assert b"transfer-encoding: chunked" in head.lower()
            assert (b"words" in body, body.endswith(b"0\r\n\r\n")) == (True, True)
            _, body = await ask(path, "/broken")
            assert (b"words" in body, body.endswith(b"0\r\n\r\n")) == (True, False)
            nursery.cancel_scope.cancel()


@pytest.mark.net
@pytest.mark.slow
async def test_an_unchanged_node_says_nothing_anew(tmp_path: Path, process: None) -> None:
    """It says what it is when that changed, not at each start."""
    settings = make_settings(tmp_path, listen=("/ip4/127.0.0.1/tcp/0",))
    told = []
    for name in ("n0", "renamed"):
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                ready = await started(nursery, dataclasses.replace(settings, name=name))
                await eventually_named(ready, name)
                await _advertise(ready, ready.state.view.nodes()[0].addresses)
                told.append(ready.state.status().certified_count)
                os.kill(os.getpid(), signal.SIGTERM)
    assert told == [1, 2]


@pytest.mark.net
@pytest.mark.slow
async def test_a_node_that_does_not_vote_runs_and_writes_nothing(tmp_path: Path, process: None) -> None:
    """An observer answers reads."""
    settings = make_settings(tmp_path, key=KeyPair(b"x" * 32))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            node = await started(nursery, settings)
            assert (await ask(settings.api_socket, "/v1/nodes"))[1] == b"[]"
            assert node.state.status().observed_count == 0
            os.kill(os.getpid(), signal.SIGTERM)


async def test_an_observer_tells_what_it_is_once_it_is_admitted(tmp_path: Path, jumping_clock: trio.abc.Clock) -> None:
    """Not before: nobody would take it."""
    async with running(tmp_path, observers=1, hosts=frozenset()) as nodes, trio.open_nursery() as nursery:
        observer = nodes[1]
        nursery.start_soon(_advertise, observer, ())
        await trio.sleep(60)
        assert observer.state.status().observed_count == nodes[0].state.status().observed_count
        await nodes[0].state.append_event(NodeAdmitted(), observer.key.node_id, level=Level.FINAL)
        await eventually(lambda: nodes[0].state.view.node(observer.key.node_id) is not None)
        nursery.cancel_scope.cancel()


@pytest.mark.net
@pytest.mark.slow
async def test_where_the_api_cannot_listen_the_node_says_so(tmp_path: Path, process: None) -> None:
    """A port in use, a socket in use, a folder that is a file: errors for people; what is another's stays."""
    with socket.socket() as other, trio.fail_after(60):
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings = make_settings(tmp_path, api_tcp=f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(BaseExceptionGroup) as caught:
            await run_node(settings)
        error = only(caught.value)
        assert isinstance(error, HostError)
        assert settings.api_tcp in error.message
        assert not settings.api_socket.exists()
    with socket.socket(socket.AF_UNIX) as owner, trio.fail_after(60):
        owner.bind(str(settings.api_socket))
        owner.listen()
        with pytest.raises(BaseExceptionGroup) as caught:
            await run_node(dataclasses.replace(settings, api_tcp=""))
        assert isinstance(only(caught.value), ConflictError)
        assert settings.api_socket.exists()
    (tmp_path / "file").write_text("")
    with trio.fail_after(60), pytest.raises(BaseExceptionGroup) as caught:
        await run_node(dataclasses.replace(settings, api_tcp="", api_socket=tmp_path / "file" / "node.sock"))
    assert isinstance(only(caught.value), HostError)


async def test_what_no_node_can_run_with_is_said_before_it_starts(tmp_path: Path, process: None) -> None:
    """Plainly, for nothing runs yet."""
    with pytest.raises(NotFoundError, match="no manifest"):
        await run_node(make_settings(tmp_path, manifest=tmp_path / "missing.toml"))


def test_an_unwritable_token_is_the_hosts_fault(tmp_path: Path) -> None:
    """Neither a missing folder nor a folder in its place gives a traceback."""
    with pytest.raises(HostError, match="cannot write"):
        api_token(tmp_path / "missing")
    (tmp_path / "api.token").mkdir()
    with pytest.raises(HostError, match="cannot read"):
        api_token(tmp_path)


async def started(nursery: trio.Nursery, settings: NodeSettings) -> Node:
    nodes: list[Node] = []
    ready = trio.Event()

    def on_ready(node: Node) -> None:
        nodes.append(node)
        ready.set()

    nursery.start_soon(partial(run_node, settings, on_ready=on_ready))
    await ready.wait()
    return nodes[0]


async def eventually_named(node: Node, name: str) -> None:
    while [record.name for record in node.state.view.nodes()] != [name]:  # noqa: ASYNC110 - as above
        await trio.sleep(0.01)


STUCK = """
import trio
from formation.node.run import _end_on_signal

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end_on_signal, nursery.cancel_scope)
        await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        print("runs", flush=True)
        try:
            await trio.sleep_forever()
        finally:
            print("drains", flush=True)
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()

import trio.testing
trio.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 128 + 15), (signal.SIGINT, 128 + 2), (signal.SIGALRM, 1)])
def test_a_drain_that_hangs_is_ended(second: signal.Signals, status: int) -> None:
    """By a second signal, whichever, or when its time is over (which the alarm's signal says)."""
    argv = [sys.executable, "-c", STUCK]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"runs\n"
            child.send_signal(signal.SIGINT)
            lines = [child.stdout.readline() for _ in range(2)]
            assert lines[-1] == b"drains\n"
            child.send_signal(second)
            assert child.wait(20) == status
        finally:
            child.kill()
