"""Calls an ASGI application in the test's own trio loop: whole answers, and streams that are read piece by piece."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from starlette.types import ASGIApp, Message

# Of the test's (mocked) clock: far beyond anything that the API may take.
ANSWER_TIMEOUT_S = 120.0


@dataclass
class Answer:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False
    """The application said where the body ends; else the server would break the connection off."""
    raised: Exception | None = None
    """What went up to the server."""

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        """The body as JSON lines."""
        return [json.loads(line) for line in self.body.splitlines()]

    def error(self) -> tuple[int, str]:
        """(status, code); an error has a message, too."""
        error = self.json()["error"]
        assert set(error) == {"code", "message", "hint"}
        assert error["message"]
        return self.status, error["code"]


class Call:
    """One request under way."""

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        *,
        query: str,
        headers: Iterable[tuple[bytes, bytes]],
        chunks: list[bytes],
        cut: bool = False,
    ) -> None:
        self.answer = Answer()
        self.is_done = trio.Event()
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": list(headers),
            "client": None,
            "server": None,
        }
        self._chunks = chunks
        self._is_cut = cut
        self._gone = trio.Event()
        self._started = trio.Event()
        self._pieces_in, self._pieces = trio.open_memory_channel[bytes](10_000)

    async def run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception as exc:  # noqa: BLE001 - stands for the server, which survives all
            self.answer.raised = exc
        finally:
            self._pieces_in.close()
            self._started.set()
            self.is_done.set()

    async def started(self) -> int:
        """The status, once it is known."""
        with trio.fail_after(ANSWER_TIMEOUT_S):
            await self._started.wait()
        return self.answer.status

    async def piece(self) -> bytes:
        """The next piece of the body; empty at its end."""
        with trio.fail_after(ANSWER_TIMEOUT_S):
            try:
                return await self._pieces.receive()
            except trio.EndOfChannel:
                return b""

    async def until(self, wanted: bytes) -> bytes:
        """The body up to the piece that holds this."""
        read = b""
        while wanted not in read:
            piece = await self.piece()
            assert piece, f"ended before {wanted!r}: {read!r}"
            read += piece
        return read

    def leave(self) -> None:
        """The client goes."""
        self._gone.set()

    async def _receive(self) -> Message:
        await trio.lowlevel.checkpoint()
        if self._chunks:
            chunk = self._chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks) or self._is_cut}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            self._started.set()
            return
        assert not self.answer.is_whole, "a body after its end"
        self.answer.body += message.get("body", b"")
        self.answer.is_whole = not message.get("more_body", False)
        if message.get("body"):
            self._pieces_in.send_nowait(message["body"])


class Client:
    """A client of one application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def get(self, path: str, query: str = "", **headers: str) -> Answer:
        return await self.request("GET", path, query=query, headers=headers)

    async def post(self, path: str, body: bytes | list[bytes] = b"", query: str = "", **headers: str) -> Answer:
        return await self.request("POST", path, query=query, body=body, headers=headers)

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: str = "",
        body: bytes | list[bytes] = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """A whole answer; the client stays until it is there."""
        chunks = [body] if isinstance(body, bytes) else list(body)
        call = Call(self._app, method, path, query=query, headers=_raw(headers or {}), chunks=chunks)
        with trio.fail_after(ANSWER_TIMEOUT_S):
            await call.run()
        return call.answer

    @asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        query: str = "",
        *,
        chunks: list[bytes] | None = None,
        cut: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Call]:
        """A request that is read piece by piece; the client goes at the end, and the application must end then, too.

        Args:
          cut: the body does not end with the last chunk; more would come.
        """
        chunks = [b""] if chunks is None else chunks
        call = Call(self._app, method, path, query=query, headers=_raw(headers or {}), chunks=chunks, cut=cut)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.run)
            yield call
            call.leave()
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await call.is_done.wait()


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
