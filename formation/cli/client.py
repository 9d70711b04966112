"""Synchronous client of a node's HTTP API, over its unix socket or TCP.

It stands on the standard library's `http.client`, which imports in some 10 ms where httpx took 111 ms (one run each). One
request is one connection, which on a unix socket costs less than keeping track of one.
"""

from __future__ import annotations

import http.client
import json
import socket
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from formation.core.errors import DeniedError, FormationError, UnavailableError, UsageError, error_from_code

# An answer is made from the node's memory: one that takes longer than this comes from a node in trouble.
ANSWER_TIMEOUT_S = 10.0
# The node answers a wish when it is certified, or gives up by itself well before this.
INTENT_TIMEOUT_S = 60.0
# The node gives another one 25 s.
FORWARDED_TIMEOUT_S = 30.0
# The node sends a keep-alive comment every 10 s; three missed ones mean that it is gone.
STREAM_TIMEOUT_S = 30.0
# Answers are lists of records, at most a few hundred bytes each; a node has at most thousands.
ANSWER_SIZE_MAX_BYTES = 64 * 1024 * 1024
# The longest line of an event stream: a 64 KiB event body as JSON, with room for its growth in text form.
LINE_SIZE_MAX_BYTES = 1024 * 1024
_READ_SIZE_BYTES = 64 * 1024
# Ours have 27 characters at most.
CURSOR_LENGTH_MAX = 64
_NODE_HINT = "start one with: formation node   (another socket or address: --host or FORMATION_HOST)"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One message of an event stream."""

    cursor: str
    """Up to where everything is told with it: what `since` takes."""
    kind: str
    """Verb, `gap`, or empty: nothing but a newer cursor."""
    data: dict[str, Any]


class Client:
    """The API of one node; every failure comes as a FormationError."""

    def __init__(self, host: str, *, token: str = "", timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Aim at a node; nothing is sent yet.

        Args:
          host: path of a unix socket (also as `unix://…`), or `http://HOST:PORT`.
          token: bearer token for TCP; empty for none.
          timeout_s: patience for plain requests.

        Raises:
          UsageError: host is neither.
        """
        self.host = host
        self._token = token
        self._timeout_s = timeout_s
        self._address = _parse_host(host)
        self._prefix = ""
        self._permit = b""

    def at_node(self, node_id: str, make_permit: Callable[[str], bytes]) -> Client:
        """The API of another node, asked through this one.

        Args:
          node_id: the other one's.
          make_permit: signs the leave that it wants to see; for the id.
        """
        other = Client(self.host, token=self._token, timeout_s=FORWARDED_TIMEOUT_S)
        other._prefix = f"/v1/nodes/{segment(node_id)}/api"
        other._permit = make_permit(node_id)
        return other

    def get(self, path: str, query: Mapping[str, str] | None = None, *, timeout_s: float | None = None) -> Any:
        """The JSON answer to a GET.

        Raises:
          FormationError: the node's own error, or UnavailableError.
        """
        with self._request("GET", _url(path, query), timeout_s=timeout_s or self._timeout_s) as response:
            return self._json(response)

    def rows(self, path: str, key: str, query: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """The records of a list, whether the answer is the list itself or an object that holds it under `key`."""
        answer = self.get(path, query)
        rows = answer.get(key) if isinstance(answer, dict) else answer
        if not isinstance(rows, list):
            raise self._nonsense(f"{path} is not a list")
        return rows

    def post_intent(self, raw: bytes) -> dict[str, Any]:
        """Hand over a signed intent (COSE bytes); returns when it is certified. Sending it twice is sending it once."""
        answer = self._post_wish("/v1/intents", raw)
        if not isinstance(answer, dict) or not isinstance(answer.get("object_id"), str):
            raise self._nonsense("the answer to an intent names no object")
        return answer

    def ask_placement(self, raw: bytes) -> Any:
        """Where the VM of a signed intent (COSE bytes) would go; nothing is asked for."""
        return self._post_wish("/v1/placement", raw)

    def _post_wish(self, path: str, raw: bytes) -> Any:
        headers = {"Content-Type": "application/cose"}
        with self._request("POST", path, body=raw, headers=headers, timeout_s=INTENT_TIMEOUT_S) as response:
            return self._json(response)

    def post_json(self, path: str, value: Any) -> Any:
        """The JSON answer to a POST of JSON; the node may take its time until what was asked for is final.

        Raises:
          FormationError: the node's own error, or UnavailableError.
        """
        headers = {"Content-Type": "application/json"}
        body = json.dumps(value).encode()
        with self._request("POST", _url(path), body=body, headers=headers, timeout_s=INTENT_TIMEOUT_S) as response:
            return self._json(response)

    def events(
        self, query: Mapping[str, str | list[str]], *, timeout_s: float = STREAM_TIMEOUT_S
    ) -> Iterator[ServerEvent | None]:
        """The event stream. The first item is None: the stream is open, nothing after this moment is missed.

        Raises:
          UnavailableError: the stream broke, or was silent for longer than keep-alives allow.
        """
        with self._request("GET", _url("/v1/events", query), timeout_s=timeout_s) as response:
            yield None
            yield from _parse_events(self._lines(response))

    def stream(
        self,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        permit: bytes = b"",
        timeout_s: float | None = STREAM_TIMEOUT_S,
    ) -> Iterator[bytes]:
        """The bytes of an endless answer as they come; an empty first piece says that the stream is open.

        Args:
          path: what to follow.
          query: how.
          permit: the owner's signed leave, for VMs that another node holds.
          timeout_s: longest silence; None: any.
        """
        headers = {"Formation-Permit": urlsafe_b64encode(permit).decode()} if permit else {}
        with self._request("GET", _url(path, query), headers=headers, timeout_s=timeout_s) as response:
            yield b""
            while data := self._read_some(response):
                yield data

    def post_stream(self, path: str, query: Mapping[str, str], body: Iterable[bytes]) -> Iterator[dict[str, Any]]:
        """Send a body piece by piece, and read the answer's JSON lines as they come."""
        headers = {"Content-Type": "application/x-tar", "Transfer-Encoding": "chunked"}
        # A first build downloads packages; the node reports each step, but one of them may be long.
        with self._request("POST", _url(path, query), body=body, headers=headers, timeout_s=600.0) as response:
            for line in self._lines(response):
                if line.strip():
                    yield self._object(line)

    def post_bytes(self, path: str, data: bytes) -> None:
        """Send a few bytes, such as keys pressed in a console."""
        headers = {"Content-Type": "application/octet-stream"}
        with self._request("POST", _url(path), body=data, headers=headers, timeout_s=self._timeout_s) as response:
            self._read_some(response)

    @contextmanager
    def _request(
        self,
        method: str,
        url: str,
        *,
        timeout_s: float | None,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        sent = {"Accept": "*/*", **(headers or {})}
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        if self._permit:
            sent["Formation-Permit"] = urlsafe_b64encode(self._permit).decode()
        connection = _Connection(self._address, timeout_s)
        try:
            with _mapped_errors(self.host):
                connection.connect()
                try:
                    connection.request(
                        method, self._prefix + url, body=body, headers=sent, encode_chunked="Transfer-Encoding" in sent
                    )
                except (BrokenPipeError, ConnectionResetError):
                    # A node that refuses a long body answers before it has read it: its answer is worth reading.
                    pass
                response = connection.getresponse()
            if response.status >= 400:
                raise self._error(response)
            with _mapped_errors(self.host):
                yield response
        finally:
            connection.close()

    def _error(self, response: http.client.HTTPResponse) -> FormationError:
        try:
            with _mapped_errors(self.host):
                error = json.loads(response.read(_READ_SIZE_BYTES))["error"]
            return error_from_code(str(error["code"]), str(error["message"]), str(error.get("hint", "")))
        except (ValueError, KeyError, TypeError, FormationError):
            return UnavailableError(
                f"{self.host} answered HTTP {response.status} without saying why",
                hint="is it a Formation node of this version? see its log",
            )

    def _json(self, response: http.client.HTTPResponse) -> Any:
        data = response.read(ANSWER_SIZE_MAX_BYTES)
        try:
            return json.loads(data)
        except ValueError as exc:
            raise self._nonsense("an answer is not JSON") from exc

    def _object(self, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as exc:
            raise self._nonsense("a line of the answer is not JSON") from exc
        if not isinstance(value, dict):
            raise self._nonsense("a line of the answer is not an object")
        return value

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        while True:
            line = response.readline(LINE_SIZE_MAX_BYTES)
            if not line:
                return
            if len(line) >= LINE_SIZE_MAX_BYTES:
                raise self._nonsense("a line of the answer is too long")
            yield line

    def _read_some(self, response: http.client.HTTPResponse) -> bytes:
        return response.read1(_READ_SIZE_BYTES)

    def _nonsense(self, what: str) -> UnavailableError:
        return UnavailableError(f"{self.host} does not speak the Formation API: {what}", hint="is it a Formation node?")


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket or TCP."""

    def __init__(self, address: str | tuple[str, int], timeout_s: float | None) -> None:
        host, port = address if isinstance(address, tuple) else ("localhost", 80)
        super().__init__(host, port, timeout=timeout_s)
        self._unix_path = address if isinstance(address, str) else None

    def connect(self) -> None:
        if self._unix_path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._unix_path)


def _parse_host(host: str) -> str | tuple[str, int]:
    hint = "give the path of a unix socket, or http://HOST:PORT"
    if host.startswith("http://"):
        try:
            parts = urlsplit(host)
            port = parts.port
        except ValueError as exc:
            raise UsageError(f"host: {host!r} is not an address", hint=hint) from exc
        if not parts.hostname or port is None or parts.path not in ("", "/"):
            raise UsageError(f"host: {host!r} is not an address", hint=hint)
        return parts.hostname, port
    path = host.removeprefix("unix://")
    if "://" in path or not path:
        raise UsageError(f"host: {host!r} is not an address", hint=hint)
    return path


@contextmanager
def _mapped_errors(host: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as exc:
        raise UnavailableError(f"no node is running: there is no socket at {host}", hint=_NODE_HINT) from exc
    except ConnectionRefusedError as exc:
        raise UnavailableError(f"no node is running: nobody listens at {host}", hint=_NODE_HINT) from exc
    except PermissionError as exc:
        raise DeniedError(f"not allowed to use {host}", hint="run as the user who runs the node") from exc
    except TimeoutError as exc:
        raise UnavailableError(f"the node at {host} does not answer", hint="try again; see the node's log") from exc
    except http.client.IncompleteRead as exc:
        # The node ended, or what it passed on did: a VM's log or console from another node.
        raise UnavailableError(
            f"the answer of the node at {host} broke off", hint="formation status shows which nodes answer; then try again"
        ) from exc
    except (OSError, http.client.HTTPException) as exc:
        raise UnavailableError(
            f"the connection to the node at {host} broke: {exc}", hint="is it running? formation status"
        ) from exc


def _url(path: str, query: Mapping[str, str | list[str]] | Mapping[str, str] | None = None) -> str:
    return quote(path) + ("?" + urlencode(query, doseq=True) if query else "")


def segment(text: str) -> str:
    """A name or id as one segment of a path (`quote` of the whole path leaves `/` alone, so refuse it here).

    Raises:
      UsageError: it cannot be a name.
    """
    if not text or "/" in text or text in (".", ".."):
        raise UsageError(f"{text!r} is neither a name nor an id", hint="see formation vm list and formation image list")
    return text


def _parse_events(lines: Iterator[bytes]) -> Iterator[ServerEvent]:
    """Server-sent events (WHATWG HTML section 9.2), as far as our node writes them."""
    cursor, kind, data = "", "", ""
    is_moved = False
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            event = _server_event(cursor, kind, data) if data else ServerEvent(cursor, "", {}) if is_moved else None
            if event is not None:
                yield event
            kind, data, is_moved = "", "", False
        elif field == "id" and len(value) <= CURSOR_LENGTH_MAX:
            cursor, is_moved = value, True
        elif field == "event":
            kind = value
        elif field == "data":
            data += value


def _server_event(cursor: str, kind: str, data: str) -> ServerEvent | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return ServerEvent(cursor, kind, value) if isinstance(value, dict) else None
