"""The HTTP API `/v1`: JSON, on a unix socket, and on TCP with a token.

Who may: the unix socket has mode 0600, so its peer is this node's operator. Over TCP each request needs
`Authorization: Bearer …` with the token in the node's data directory; neither `Host` nor `X-Forwarded-For` nor a
loopback address gives any right. What changes the network is besides an intent signed by an account, which every
node judges for itself: the API is only the door.

Errors are `{"error": {"code", "message", "hint"}}` with the codes of `core.errors`.
"""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import structlog
import trio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from formation.core.clock import NS_PER_MS
from formation.core.errors import FormationError, HostError, UnavailableError, UsageError
from formation.core.event import ImageBuilt, ImageHeld
from formation.core.ids import NodeId, check_label
from formation.core.units import format_size
from formation.node.attach import Attach, AttachRequest
from formation.node.cell_api import CellApi
from formation.node.door import INTENT_SIZE_MAX_BYTES, Door
from formation.node.event_query import EventQuery, parse_event_query
from formation.node.exposition import CONTENT_TYPE
from formation.node.forward import ApiRequest, Begin, Forward
from formation.node.forward import Send as ForwardSend
from formation.node.metrics import metrics_text
from formation.node.net_api import NetApi
from formation.node.peer_api import PeerApi
from formation.node.placement_api import PlacementApi
from formation.node.problem import HTTP_STATUS, error_json
from formation.node.reads import Reads
from formation.node.state_api import REQUEST_SIZE_MAX_BYTES, Ask, Download, StateApi, StateRoute
from formation.node.state_reads import StateReads
from formation.node.stream import FOLLOWER_COUNT_MAX, KEEP_ALIVE_S, STALL_TIMEOUT_S, sse_change, sse_cursor, sse_gap
from formation.node.upload import inside, receive_context
from formation.p2p.serving import AskerGoneError, run_while
from formation.pack.service import BuildProgress, PackService
from formation.state.cell_reader import CellReader
from formation.state.service import Cursor, Gap

log = structlog.get_logger(__name__)

# A keystroke or a paste; the console is no file transfer.
CONSOLE_INPUT_SIZE_MAX_BYTES = 64 * 1024
# Progress lines wait here while a slow client reads; a full buffer makes the build wait, not memory grow.
PROGRESS_BUFFER_COUNT = 256
LOG_TAIL_LINES_MAX = 10_000
# Positions are SQLite's integers, below 2**63.
COUNT_DIGITS_MAX = 18

_OVER_TCP = "formation.over_tcp"
"""Key of a request's scope: it came over TCP, with the token."""

SendBytes = Callable[[bytes], Awaitable[None]]
Application = Starlette
"""What is served; the library's name is this file's business alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiParts:
    """What the API stands on."""

    reads: Reads
    pack: PackService
    attach: Attach
    door: Door
    cells: CellReader
    forward: Forward


def make_api(parts: ApiParts) -> Application:
    """The application; the same for unix socket and TCP."""
    api = _Api(parts)
    app = Starlette(
        routes=[
            Route("/metrics", api.get_metrics),
            Route("/v1/status", api.get_status),
            Route("/v1/nodes", api.get_nodes),
            Route("/v1/nodes/{ref}/api/{path:path}", api.forward, methods=["GET", "POST"]),
            Route("/v1/accounts", api.get_accounts),
            Route("/v1/images", api.get_images),
            Route("/v1/images/build", api.build_image, methods=["POST"]),
            Route("/v1/images/{ref:path}", api.get_image),
            Route("/v1/vms", api.get_vms),
            Route("/v1/vms/{ref}", api.get_vm),
            Route("/v1/vms/{ref}/logs", api.get_logs),
            Route("/v1/vms/{ref}/console", api.get_console),
            Route("/v1/vms/{ref}/console/input", api.post_console_input, methods=["POST"]),
            Route("/v1/intents", api.post_intent, methods=["POST"]),
            Route("/v1/events", api.get_events),
            *map(_state_route, StateApi(parts.reads).routes()),
            *map(_state_route, PlacementApi(parts.reads).routes()),
            *map(_state_route, PeerApi(parts.reads).routes()),
            *map(_state_route, NetApi(parts.reads).routes()),
            *map(_state_route, CellApi(parts.reads, parts.cells, parts.door).routes()),
        ],
        exception_handlers={
            FormationError: _formation_error,
            ClientDisconnect: _client_gone,
            404: _no_such_route,
            405: _no_such_route,
            Exception: _internal_error,
        },
    )
    parts.forward.serve_with(partial(_serve_inside, app))
    return app


async def _serve_inside(app: ASGIApp, method: str, path: str, query: str, begin: Begin, send: ForwardSend) -> None:
    """Answer another node's request with this application, as one that came over TCP."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [],
        "client": None,
        "server": None,
        _OVER_TCP: True,
    }
    is_read = False

    async def receive() -> Any:
        nonlocal is_read
        if is_read:
            # The asker's going cancels all of this.
            await trio.sleep_forever()
        is_read = True
        return {"type": "http.request", "body": b"{}" if method == "POST" else b"", "more_body": False}

    async def take(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = {bytes(name).lower(): bytes(value).decode("latin-1") for name, value in message.get("headers", ())}
            await begin(message["status"], headers.get(b"content-type", "application/json"))
        else:
            await send(message.get("body", b""))

    await app(scope, receive, take)


class TokenGuard:
    """ASGI wrapper for TCP: every request carries the token, or gets 403 and nothing else."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or refuse it."""
        if scope["type"] == "http" and not self._is_authorised(scope):
            error = {
                "error": {"code": "denied", "message": "the API token is missing or wrong", "hint": "set FORMATION_TOKEN_FILE"}
            }
            await JSONResponse(error, status_code=403)(scope, receive, send)
            return
        # A token gives the API to programs elsewhere; what is this machine's operator's alone asks for this mark.
        await self._app({**scope, _OVER_TCP: True}, receive, send)

    def _is_authorised(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


class _Api:
    def __init__(self, parts: ApiParts) -> None:
        self._reads = parts.reads
        self._state = parts.reads.state
        self._pack = parts.pack
        self._attach = parts.attach
        self._door = parts.door
        self._forward = parts.forward
        self._shown = StateReads(parts.reads)
        self._builds = trio.CapacityLimiter(1)
        self._follower_count = 0

    async def get_status(self, _: Request) -> Response:
        return JSONResponse(self._reads.status())

    async def get_metrics(self, _: Request) -> Response:
        return Response(metrics_text(self._reads, self._pack), headers={"content-type": CONTENT_TYPE})

    async def get_nodes(self, _: Request) -> Response:
        return JSONResponse([self._reads.node(record) for record in self._state.view.nodes()])

    async def forward(self, request: Request) -> Response:
        """What another node alone can tell, with its operator's permit."""
        node_id = self._shown.find_node(request.path_params["ref"])
        path = "/" + request.path_params["path"]
        if node_id == self._reads.node_id:
            raise UsageError("that is this node itself", hint="leave --on out")
        try:
            wanted = msgspec.convert((request.method, path, request.url.query, _permit(request)), ApiRequest)
        except msgspec.ValidationError as exc:
            raise UsageError(f"cannot be asked of another node: {exc}", hint="schemas/README.md lists the API") from exc
        # The body first: a POST's comes by `receive` as well, and what it says is nothing to the routes that are passed on.
        await _body(request, REQUEST_SIZE_MAX_BYTES)
        try:
            # Who goes away stops the other node, too.
            answer, body = await run_while(
                partial(self._forward.ask, NodeId(node_id), wanted), partial(_wait_disconnect, request.receive)
            )
        except AskerGoneError:
            raise ClientDisconnect from None
        return Response(body, status_code=answer.status, headers={"content-type": answer.media_type})

    async def get_accounts(self, _: Request) -> Response:
        return JSONResponse([{"account_id": a.account_id, "label": a.label} for a in self._state.view.accounts()])

    async def get_images(self, _: Request) -> Response:
        return JSONResponse([self._reads.image(record) for record in self._state.view.images()])

    async def get_image(self, request: Request) -> Response:
        return JSONResponse(self._reads.image(self._reads.find_image(request.path_params["ref"])))

    async def get_vms(self, _: Request) -> Response:
        return JSONResponse([self._reads.vm(record) for record in self._state.view.vms()])

    async def get_vm(self, request: Request) -> Response:
        return JSONResponse(self._reads.vm(self._reads.find_vm(request.path_params["ref"])))

    async def post_intent(self, request: Request) -> Response:
        accepted = await self._door.submit(await _body(request, INTENT_SIZE_MAX_BYTES))
        answer = {
            "object_id": accepted.object_id,
            "trace_id": accepted.trace_id,
            "token": {"lane": accepted.lane, "seq": accepted.seq},
        }
        return JSONResponse(answer, status_code=202)

    async def build_image(self, request: Request) -> Response:
        name = request.query_params.get("name", "")
        if name:
            check_label(name, what="image name")
        formfile = request.query_params.get("formfile", "")

        async def job(send: SendBytes) -> None:
            async with _context_folder(self._reads.settings.data_dir) as context:
                await receive_context(request.stream(), context)
                path = inside(context, formfile) if formfile else None
                async with self._builds:
                    await self._build(context, path, name, send)

        return _StreamResponse(partial(_ndjson_job, job), media_type="application/x-ndjson")

    async def _build(self, context: Path, formfile: Path | None, name: str, send: SendBytes) -> None:
        lines_in, lines_out = trio.open_memory_channel[BuildProgress](PROGRESS_BUFFER_COUNT)

        def progress(step: BuildProgress) -> None:
            try:
                lines_in.send_nowait(step)
            except trio.WouldBlock:
                # The client reads too slowly: it misses lines of progress, the build does not wait.
                pass

        async def forward() -> None:
            async for step in lines_out:
                await send(_json_line({"step": step.step, "text": step.text}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(forward)
            with lines_in:
                built = await self._pack.build_image(context, formfile_path=formfile, name=name or None, progress=progress)
        config = built.manifest.config
        event = ImageBuilt(
            name=config.name,
            size_bytes=built.size_bytes,
            built_by=self._reads.node_id,
            resources=config.resources,
            expose=tuple((port, transport) for port, transport in config.expose),
        )
        await self._state.append_event(event, built.digest)
        await self._door.say(ImageHeld(), built.digest)
        record = self._state.view.image(built.digest)
        assert record is not None
        text = f"{config.name} {built.digest[:19]} {format_size(built.size_bytes)}"
        await send(_json_line({"step": "done", "text": text + (" (cached)" if built.cached else "")}))
        await send(_json_line({"image": self._reads.image(record), "cached": built.cached}))

    async def get_events(self, request: Request) -> Response:
        items = list(request.query_params.multi_items())
        if not request.query_params.get("since") and (last := request.headers.get("last-event-id")):
            items = [(name, value) for name, value in items if name != "since"] + [("since", last)]
        reads = self._reads
        query = parse_event_query(
            items,
            now_ms=reads.clock.now_ns() // NS_PER_MS,
            find_node=self._shown.find_node,
            find_account=reads.find_account,
        )
        # Settled before the status line: what a client does as soon as it sees that, it will be told.
        start = self._start_of(query)
        if not query.follow:
            return _StreamResponse(partial(_send_events, reads, query=query, since=start), media_type="text/event-stream")
        if self._follower_count >= FOLLOWER_COUNT_MAX:
            raise UnavailableError(
                f"{FOLLOWER_COUNT_MAX} programs follow events at this node already",
                hint="end one, ask another node, or ask again and again with follow=0 and since",
            )

        async def job(send: SendBytes) -> None:
            self._follower_count += 1
            try:
                await _send_events(reads, send, query=query, since=start)
            finally:
                self._follower_count -= 1

        return _StreamResponse(job, media_type="text/event-stream")

    def _start_of(self, query: EventQuery) -> int:
        if query.since is not None:
            return self._state.resume(query.since)
        if query.since_ms is not None:
            return self._state.position_before(query.since_ms)
        return self._state.status().position

    async def get_logs(self, request: Request) -> Response:
        text = request.query_params.get("tail", "200")
        tail = parse_count(text)
        if tail is None or tail > LOG_TAIL_LINES_MAX:
            raise UsageError(
                f"tail: {text[:20]!r} is not a count of lines up to {LOG_TAIL_LINES_MAX}", hint="formation vm logs -n 200"
            )
        follow = request.query_params.get("follow", "0") in ("1", "true")
        return await self._attached(request, AttachRequest("logs", tail, follow, _permit(request)), "text/plain; charset=utf-8")

    async def get_console(self, request: Request) -> Response:
        wanted = AttachRequest("console", 0, True, _permit(request))
        return await self._attached(request, wanted, "application/octet-stream")

    async def _attached(self, request: Request, wanted: AttachRequest, media_type: str) -> Response:
        """Opened before the status line is sent, so that a refusal is a refusal."""
        vm = self._reads.find_vm(request.path_params["ref"])
        stack = AsyncExitStack()
        chunks = await stack.enter_async_context(self._attach.open(vm, wanted))

        async def job(send: SendBytes) -> None:
            async with stack:
                async for chunk in chunks:
                    await send(chunk)

        return _StreamResponse(job, media_type=media_type)

    async def post_console_input(self, request: Request) -> Response:
        vm = self._reads.find_vm(request.path_params["ref"])
        await self._attach.type(vm, await _body(request, CONSOLE_INPUT_SIZE_MAX_BYTES))
        return Response(status_code=204)


def _state_route(route: StateRoute) -> Route:
    async def endpoint(request: Request) -> Response:
        ask = Ask(
            path=request.path_params,
            query=request.query_params,
            body=await _body(request, REQUEST_SIZE_MAX_BYTES) if route.method == "POST" else b"",
            is_local=_OVER_TCP not in request.scope,
        )
        answer = await route.handle(ask)
        if not isinstance(answer, Download):
            return JSONResponse(answer)

        async def job(send: SendBytes) -> None:
            async for chunk in answer.chunks:
                await send(chunk)

        return _StreamResponse(job, media_type=answer.media_type)

    return Route(route.path, endpoint, methods=[route.method])


async def _send_events(reads: Reads, send: SendBytes, *, query: EventQuery, since: int) -> None:
    state, feed_id = reads.state, reads.state.feed_id
    # Without `follow`, the feed ends at the newest change there is now.
    end = None if query.follow else state.status().position
    told = since
    """Up to where everything that is wanted was handed to the server."""
    sending = trio.Lock()

    async def send_in_time(data: bytes) -> None:
        with trio.move_on_after(STALL_TIMEOUT_S) as scope:
            await send(data)
        if scope.cancelled_caught:
            raise UnavailableError(f"a follower of events read nothing for {STALL_TIMEOUT_S:.0f} s", hint="it may come back")

    async def keep_alive() -> None:
        comment = "open"
        while True:
            # Not between two events of one piece: their order is the order of cursors.
            async with sending:
                await send_in_time(sse_cursor(Cursor(feed_id, told), comment=comment))
            comment = "keep-alive"
            await trio.sleep(KEEP_ALIVE_S)

    async with trio.open_nursery() as nursery:
        if query.follow:
            nursery.start_soon(keep_alive)
        if end is None or since < end:
            async for items, read_up_to in state.read_feed(since=since, wanted=query.wanted):
                async with sending:
                    for item in items:
                        if end is not None and item.position > end:
                            break
                        await send_in_time(sse_gap(item, feed_id) if isinstance(item, Gap) else sse_change(item, feed_id))
                    told = read_up_to
                if end is not None and read_up_to >= end:
                    break
        if end is not None:
            await send_in_time(sse_cursor(Cursor(feed_id, end), comment="end"))
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _context_folder(parent: Path) -> AsyncIterator[Path]:
    """A folder for one build's context.

    Raises:
      HostError: the disk refused.
    """
    try:
        folder = TemporaryDirectory(prefix="context-", dir=parent, ignore_cleanup_errors=True)
    except OSError as exc:
        raise HostError(f"cannot keep the build context: {exc.strerror}", hint="is the node's disk full?") from exc
    try:
        yield Path(folder.name)
    finally:
        # Tens of thousands of files take seconds, in which this node would be silent to its peers.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(folder.cleanup)


def _json_line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


async def _ndjson_job(job: Callable[[SendBytes], Awaitable[None]], send: SendBytes) -> None:
    """Run a job whose failure is its last line: the status line has long been sent."""
    try:
        await job(send)
    except (FormationError, BaseExceptionGroup) as exc:
        error = exc if isinstance(exc, FormationError) else only_formation_error(exc)
        if error is None:
            raise
        await send(_json_line(error_json(error)))


def only_formation_error(group: BaseExceptionGroup[BaseException]) -> FormationError | None:
    """The first Formation error of a group that holds nothing else (nurseries wrap what their tasks raise)."""
    _, others = group.split(FormationError)
    if others is not None:
        return None
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, FormationError)
    return first


class _StreamResponse(Response):
    """A body written by a job, which is cancelled when the client goes."""

    def __init__(self, job: Callable[[SendBytes], Awaitable[None]], *, media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the job ends or the client goes."""
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def send_bytes(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        is_whole = True
        async with trio.open_nursery() as nursery:
            if scope["method"] != "POST":
                # A POST's body comes by `receive` as well; its job notices the end of the connection by itself.
                nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
            try:
                await self._job(send_bytes)
            except ClientDisconnect:
                pass
            except Exception as exc:  # noqa: BLE001 - supervision boundary: the server would drop it unseen
                is_whole = False
                _log_broken_stream(scope["path"], exc)
            nursery.cancel_scope.cancel()
        if is_whole:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        # Else the status line is out, and a body without its end is all that can still be said: the server breaks the
        # connection off, and the client sees an incomplete answer.


def _log_broken_stream(path: str, exc: Exception) -> None:
    error = only_formation_error(exc) if isinstance(exc, BaseExceptionGroup) else exc
    if isinstance(error, FormationError):
        log.warning("stream.failed", path=path, error=error.message)
    else:
        log.error("api.failed", path=path, exc_info=exc)


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    await _wait_disconnect(receive)
    scope.cancel()


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def parse_count(text: str) -> int | None:
    """A count or position of the query; None if it is none."""
    # ASCII first: `isdigit` holds for superscripts, which int() refuses, and int() for no more than 4,300 digits.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= COUNT_DIGITS_MAX else None


def _permit(request: Request) -> bytes:
    """The owner's signed permit, base64url in a header; empty where none was sent."""
    text = request.headers.get("formation-permit", "")
    try:
        return base64.b64decode(text, altchars=b"-_", validate=True)
    except ValueError as exc:
        raise UsageError(
            "the header Formation-Permit is not base64url", hint="is the client older or newer than this node?"
        ) from exc


async def _body(request: Request, size_max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > size_max_bytes:
            raise UsageError(f"the request's body is larger than {format_size(size_max_bytes)}", hint="send less at once")
    return bytes(body)


async def _formation_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, FormationError)
    return JSONResponse(error_json(exc), status_code=HTTP_STATUS.get(exc.code, 500))


async def _client_gone(_: Request, __: Exception) -> Response:
    # Nobody reads it; without it, a client that leaves in the middle of its request would be logged as our failure.
    return Response(status_code=400)


async def _no_such_route(request: Request, _: Exception) -> Response:
    error = {
        "code": "not_found",
        "message": f"no {request.method} {request.url.path} here",
        "hint": "schemas/README.md lists the API",
    }
    return JSONResponse({"error": error}, status_code=404)


async def _internal_error(request: Request, exc: Exception) -> Response:
    log.error("api.failed", path=request.url.path, exc_info=exc)
    error = {"code": "failed", "message": "the node failed to answer", "hint": "its log says why"}
    return JSONResponse({"error": error}, status_code=500)
