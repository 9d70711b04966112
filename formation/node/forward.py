"""Reads of another node's API: what only that node knows (its status, its peers, its metrics), asked through any node.

The asked node opens a direct stream to the other one and passes the answer back. The other one answers only with a *permit*:
an intent of verb `node.read` for its id, signed by an account that its own settings name (`node.operators`; by default none:
then its API is for who can open its socket). A permit expires like any intent and never enters the replicated state, so the
node in the middle can pass a wish on, and cannot make one up; until it expires that node could read the same again.

On the wire (`/formation/api/1`): the asker sends one frame (`ApiRequest`) and keeps its side open, for its end or reset means
that nobody waits any more; the answer is one frame (`ApiAnswer`) and the body until the end of the stream.

Rules: (1) only `ROUTES` are served, which read; none of them asks yet another node for its API. (2) The request goes to the
node's own application as one over TCP would: what is for the operator on the machine alone stays so. (3) Both sides have a
deadline, both count the bytes, and the serving side stops when the asker goes.
"""

from __future__ import annotations

import contextlib
import re
from functools import partial
from typing import Annotated, Literal, Protocol

import msgspec
import structlog
import trio

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError, DeniedError, FormationError, NotFoundError, UnavailableError
from formation.core.ids import NodeId
from formation.node.permit import PERMIT_SIZE_MAX_BYTES, check_key_in_force, check_signed, parse_permit
from formation.node.problem import HTTP_STATUS, error_json
from formation.node.reads import Reads
from formation.p2p.framing import receive_frame, send_frame
from formation.p2p.service import P2pService
from formation.p2p.serving import run_while
from formation.p2p.slots import Slots
from formation.p2p.transport import READ_SIZE_MAX_BYTES, ByteStream

log = structlog.get_logger(__name__)

PROTOCOL = "/formation/api/1"
PERMIT_VERB = "node.read"
PATH_LENGTH_MAX = 512
QUERY_LENGTH_MAX = 1024
# The three above, in UTF-8, with their heads.
REQUEST_SIZE_MAX_BYTES = 8 * 1024
ANSWER_SIZE_MAX_BYTES = 256
# Status, 256 lanes, a thousand peers: some hundred KiB of JSON. The asker holds a whole answer.
BODY_SIZE_MAX_BYTES = 4 * 1024 * 1024
# A request must be here by then; it is sent with the stream's first frame.
RECEIVE_TIMEOUT_S = 10.0
# The longest route is a ping of yet another peer, 15 s; the whole answer has gone by then, whoever reads slowly.
SERVE_TIMEOUT_S = 20.0
# A little longer than the other node takes, so that its own word is heard.
ASK_TIMEOUT_S = SERVE_TIMEOUT_S + 5.0
# People who look; each holds one answer at worst.
SERVED_COUNT_MAX = 16
SERVED_PER_PEER_MAX = 4
ASKED_COUNT_MAX = 16

_NAME = r"[A-Za-z0-9_.:-]{1,128}"
ROUTES = tuple(
    (method, re.compile(path))
    for method, path in (
        ("GET", "/metrics"),
        ("GET", "/v1/status"),
        ("GET", "/v1/state"),
        ("GET", "/v1/peers"),
        ("GET", f"/v1/peers/{_NAME}"),
        ("POST", f"/v1/peers/{_NAME}/ping"),
        ("GET", "/v1/net"),
        ("POST", "/v1/net/check"),
    )
)
"""What may be asked; each matches a whole path."""


class ApiRequest(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What is asked of the other node; array of four."""

    method: Literal["GET", "POST"]
    path: Annotated[str, msgspec.Meta(max_length=PATH_LENGTH_MAX)]
    query: Annotated[str, msgspec.Meta(max_length=QUERY_LENGTH_MAX)]
    permit: Annotated[bytes, msgspec.Meta(max_length=PERMIT_SIZE_MAX_BYTES)]
    """An operator's signed intent."""


class ApiAnswer(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What comes before the body; array of two."""

    status: Annotated[int, msgspec.Meta(ge=200, le=599)]
    media_type: Annotated[str, msgspec.Meta(max_length=100, pattern="^[ -~]*$")]


class Serve(Protocol):
    """The node's own API, in this process."""

    async def __call__(self, method: str, path: str, query: str, begin: Begin, send: Send, /) -> None:
        """Answer a request: `begin` once, then `send` for each piece of the body."""
        ...


class Begin(Protocol):
    """Takes status and media type."""

    async def __call__(self, status: int, media_type: str, /) -> None:
        """Once, before the body."""
        ...


class Send(Protocol):
    """Takes a piece of the body."""

    async def __call__(self, data: bytes, /) -> None:
        """In order."""
        ...


def check_route(method: str, path: str) -> None:
    """Refuse what is not in ROUTES.

    Raises:
      NotFoundError: it is not.
    """
    if not any(method == allowed and route.fullmatch(path) for allowed, route in ROUTES):
        raise NotFoundError(
            f"{method} {path[:80]} cannot be asked of another node", hint="status, peer list|show|ping, state status, /metrics"
        )


class Forward:
    """Serves this node's reads to other nodes, and asks other nodes for theirs."""

    def __init__(self, *, reads: Reads, p2p: P2pService) -> None:
        self._reads = reads
        self._p2p = p2p
        self._slots = Slots(count_max=SERVED_COUNT_MAX, per_peer_max=SERVED_PER_PEER_MAX)
        self._asking = trio.CapacityLimiter(ASKED_COUNT_MAX)
        self._serve_here: Serve | None = None
        p2p.serve_stream(PROTOCOL, self._serve, is_bulk=True)

    def serve_with(self, serve: Serve) -> None:
        """Set the API that answers; until then others are told that this node is starting."""
        self._serve_here = serve

    @property
    def served_count(self) -> int:
        """Requests of other nodes that are being answered."""
        return len(self._slots)

    async def ask(self, node_id: NodeId, request: ApiRequest) -> tuple[ApiAnswer, bytes]:
        """A node's answer, whole. Cancelled, the other node stops, too.

        Raises:
          NotFoundError: that route is not for other nodes.
          UnavailableError: the node cannot be reached, does not answer in time, breaks off, or runs an older version.
        """
        check_route(request.method, request.path)
        name = self._reads.node_name(node_id)
        if self._asking.available_tokens < 1:
            raise UnavailableError(f"{ASKED_COUNT_MAX} questions to other nodes are under way", hint="try again")
        async with self._asking:
            try:
                with trio.fail_after(ASK_TIMEOUT_S):
                    return await self._ask(node_id, name, request)
            except trio.TooSlowError as exc:
                raise UnavailableError(f"node {name} does not answer within {ASK_TIMEOUT_S:.0f} s", hint=_HINT) from exc
            except DecodeError as exc:
                raise UnavailableError(f"node {name} does not keep to the protocol", hint="it may run another version") from exc

    async def _ask(self, node_id: NodeId, name: str, request: ApiRequest) -> tuple[ApiAnswer, bytes]:
        try:
            stream = await self._p2p.open_stream(node_id, PROTOCOL)
        except UnavailableError as exc:
            # By its name, and without the dialler's own words.
            log.info("forward.unreachable", node_id=node_id, reason=exc.message)
            if any(peer.node_id == node_id and peer.connected for peer in self._p2p.peers()):
                raise UnavailableError(
                    f"node {name} answers, and not to this: it may run an older version", hint="ask on its own machine"
                ) from exc
            raise UnavailableError(f"node {name} cannot be reached", hint=_HINT) from exc
        try:
            await send_frame(stream, encode(request))
            answer = decode(await receive_frame(stream, size_max_bytes=ANSWER_SIZE_MAX_BYTES), ApiAnswer)
            body = bytearray()
            while data := await stream.receive_some(READ_SIZE_MAX_BYTES):
                body += data
                if len(body) > BODY_SIZE_MAX_BYTES:
                    raise DecodeError(f"an answer of more than {BODY_SIZE_MAX_BYTES} bytes")
            await stream.send_eof()
            return answer, bytes(body)
        except UnavailableError as exc:
            raise UnavailableError(f"node {name} broke off its answer", hint=_HINT) from exc
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def _serve(self, asker: NodeId, stream: ByteStream) -> None:
        with trio.move_on_after(RECEIVE_TIMEOUT_S + SERVE_TIMEOUT_S) as scope:
            answer = _Answering(stream)
            try:
                with self._slots.take(asker):
                    with trio.fail_after(RECEIVE_TIMEOUT_S):
                        request = decode(await receive_frame(stream, size_max_bytes=REQUEST_SIZE_MAX_BYTES), ApiRequest)
                    await self._answer(request, stream, answer)
            except (FormationError, trio.TooSlowError) as exc:
                error = exc if isinstance(exc, FormationError) else UnavailableError("took too long", hint="try again")
                log.info("forward.refused", asker=asker, reason=error.message)
                if answer.is_begun:
                    # A body without its end: the asker sees that the stream broke.
                    raise UnavailableError(error.message, hint=error.hint) from exc
                await answer.refuse(error, node_name=self._reads.settings.name)
        if scope.cancelled_caught:
            raise UnavailableError("the asker took too long", hint="")

    async def _answer(self, request: ApiRequest, stream: ByteStream, answer: _Answering) -> None:
        self._check_permit(request.permit)
        check_route(request.method, request.path)
        if self._serve_here is None:
            raise UnavailableError("it is starting", hint="try again in a moment")
        job = partial(self._serve_here, request.method, request.path, request.query, answer.begin, answer.send)
        with trio.fail_after(SERVE_TIMEOUT_S):
            await run_while(job, partial(_wait_end, stream))

    def _check_permit(self, raw: bytes) -> None:
        hint = "its settings name who may: node.operators"
        if not raw:
            raise DeniedError(
                "it answers its operators only, and no permit came along", hint="FORMATION_ACCOUNT_KEY names a key"
            )
        permit = parse_permit(raw)
        check_signed(self._reads, permit)
        if permit.intent.verb != PERMIT_VERB or permit.intent.object_id != self._reads.node_id:
            raise DeniedError("the permit is for something else", hint=hint)
        if permit.account_id not in self._reads.settings.operators:
            raise DeniedError(f"account {permit.account_id} is none of its operators", hint=hint)
        check_key_in_force(self._reads, permit)


async def _wait_end(stream: ByteStream) -> None:
    # What it sends beyond its request is nothing that we know: only its end counts.
    with contextlib.suppress(UnavailableError):
        while await stream.receive_some(READ_SIZE_MAX_BYTES):
            pass


_HINT = "formation peer list shows who is connected"


class _Answering:
    """The answer on its way out, counted."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._size_bytes = 0
        self.is_begun = False

    async def begin(self, status: int, media_type: str) -> None:
        self.is_begun = True
        await send_frame(self._stream, encode(ApiAnswer(status, media_type)))

    async def send(self, data: bytes) -> None:
        self._size_bytes += len(data)
        if self._size_bytes > BODY_SIZE_MAX_BYTES:
            raise UnavailableError(f"an answer of more than {BODY_SIZE_MAX_BYTES} bytes", hint="ask on its own machine")
        if data:
            await self._stream.send_all(data)

    async def refuse(self, error: FormationError, *, node_name: str) -> None:
        body = error_json(error)
        body["error"]["message"] = f"node {node_name}: {error.message}"[:1000]
        try:
            await self.begin(_STATUS.get(error.code, 500), "application/json")
            await self.send(msgspec.json.encode(body))
        except UnavailableError as exc:
            log.debug("forward.refusal_unsent", reason=exc.message)


# A request that is none: here the asker is to blame, not a peer of the asked node.
_STATUS = HTTP_STATUS | {"decode": 400}
