"""Twin of a node for the tests of this room: the HTTP API over a unix socket, with a script of events for each wish.

No network and no VMs; its wishes are checked as a node checks them. Nothing outside the tests imports it.
"""

from __future__ import annotations

import base64
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from formation.core.codec import verify_ed25519
from formation.core.errors import ConflictError, DeniedError, FormationError, NotFoundError
from formation.core.event import (
    AccountKeyRotated,
    AccountRecoverySet,
    ClaimMade,
    ClaimReleased,
    DelegationGiven,
    DelegationRevoked,
    Event,
    GrantGiven,
    GrantRevoked,
    ValueCounted,
    ValuePut,
    ValueRemoved,
    VmDeleted,
    VmDesired,
    VmRequested,
    event_fields,
    parse_event,
)
from formation.core.grants import Role
from formation.core.ids import (
    NetworkId,
    account_id_of,
    pick_by_name_or_prefix,
    public_key_of_account,
    trace_id_of,
    vm_id_of,
)
from formation.core.intent import SignedIntent, check_intent, parse_intent
from formation.node.event_query import parse_event_query

NETWORK_ID = NetworkId(b"\x07" * 32)
NODE_1 = "12D3KooWAaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa1"
NODE_2 = "12D3KooWBbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb2"
NAMES = {NODE_1: "n1", NODE_2: "n2"}
DIGEST = "sha256:" + "ab" * 32
_HTTP_STATUS = {"usage": 400, "denied": 403, "not_found": 404, "conflict": 409, "unavailable": 503, "quorum": 503}
_STREAM_WAIT_S = 0.05


class FakeNode:
    """State of the fake, and what it does on wishes; tests set its fields."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self.vms: dict[str, dict[str, Any]] = {}
        self.images: list[dict[str, Any]] = [image_record()]
        self.events: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self.wishes: list[bytes] = []
        self.refuse: FormationError | None = None
        self.outcome = "ready"
        """What becomes of a wish for a VM: ready, failed, silent (no event at all), unknown."""
        self.builds: list[tuple[dict[str, str], bytes]] = []
        self.build_error: FormationError | None = None
        self.permits: list[str] = []
        self.typed = b""
        self.log = b"hello from the guest\n"
        self.break_streams = 0
        self.accounts = FakeAccounts()
        self.partitioned_s: float | None = None
        self.answers: dict[str, Any] = {}
        """Path (below /v1/) → what a GET of it answers."""
        self.files: dict[str, list[bytes]] = {}
        """The same for files, one for each time that it is asked for; one that begins with `cut` breaks off."""
        self.posts: list[tuple[str, Any]] = []
        """(path, JSON) of what was posted there."""
        self.closing = False
        self._server: _Server | None = None

    def __enter__(self) -> FakeNode:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen."""
        self.closing = False
        self.socket_path.unlink(missing_ok=True)
        self._server = _Server(str(self.socket_path), _Handler)
        self._server.node = self
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """End all connections and take the socket away."""
        self.closing = True
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self.socket_path.unlink(missing_ok=True)

    def tell(self, verb: str, object_id: str, *, trace_id: str = "", node_id: str = NODE_2, **fields: Any) -> None:
        """Let an event happen."""
        with self.changed:
            self.events.append(
                {
                    "position": len(self.events) + 1,
                    "level": "final" if verb in ("vm.claimed", "vm.deleted") else "certified",
                    "verb": verb,
                    "topic": verb.partition(".")[0],
                    "record": "vm",
                    "object_id": object_id,
                    "node_id": node_id,
                    "account": "",
                    "at_ms": 1_700_000_000_000 + len(self.events),
                    "trace_id": trace_id,
                    "void": "",
                    "fields": fields,
                }
            )
            self.changed.notify_all()

    def add_vm(self, name: str, *, phase: str = "running", letter: str = "a", **changes: Any) -> dict[str, Any]:
        """Put a VM into the state."""
        vm_id = "vm-" + letter * 16
        self.vms[vm_id] = vm_record(vm_id, name, phase=phase) | changes
        return self.vms[vm_id]

    def take_wish(self, raw: bytes) -> dict[str, Any]:
        """Do what a node does with an intent."""
        if self.refuse is not None:
            raise self.refuse
        wish = parse_intent(raw)
        check_intent(verify_ed25519, wish, network_id=NETWORK_ID, now_ms=int(time.time() * 1000))
        with self.changed:
            self.wishes.append(raw)
            self.changed.notify_all()
        event = parse_event(wish.intent.verb, wish.intent.body)
        object_id = wish.intent.object_id
        if isinstance(event, VmRequested):
            object_id = vm_id_of(wish.digest)
            if object_id not in self.vms:
                self._create(object_id, event_fields(event), trace_id_of(wish.digest), account_id_of(wish.intent.account))
        elif isinstance(event, VmDesired):
            self._change(object_id, event.desired.value, event.generation)
        elif not isinstance(event, VmDeleted):
            self.accounts.take(wish, event, object_id)
        else:
            placed = self.vms.pop(object_id)["placement"]
            if placed and self.outcome != "silent":
                self.tell("vm.gone", object_id, trace_id="", name="x")
        return {"object_id": object_id, "trace_id": trace_id_of(wish.digest), "token": {"lane": "00", "seq": 1}}

    def _create(self, vm_id: str, fields: dict[str, Any], trace_id: str, owner: str) -> None:
        vm = vm_record(vm_id, fields["name"], phase="pending")
        vm["spec"] |= fields
        vm |= {"trace_id": trace_id, "owner": owner, "placement": None, "node": ""}
        self.vms[vm_id] = vm
        if self.outcome == "silent" or fields["desired"] == "stopped":
            vm["reason"] = "no node has room"
            return
        ports = [[port[0], port[1], port[2] or 40000 + index] for index, port in enumerate(fields["publish"])]
        holder: dict[str, Any] = {"trace_id": trace_id, "generation": 0, "reason": ""}
        self.tell("vm.claimed", vm_id, trace_id=trace_id, why="most room")
        self.tell("vm.scheduled", vm_id, **holder, node_id=NODE_2)
        vm |= {"placement": {"node_id": NODE_2, "why": "most room", "hlc": 1}, "node": "n2"}
        if self.outcome == "unknown":
            vm |= {"phase": "unknown", "reason": "node n2, which runs it, has been silent for 12s"}
            return
        self.tell("image.ready", vm_id, **holder, digest=DIGEST, cached=False, pulled_bytes=3 << 20, pulled_from=NODE_1)
        self.tell("net.leased", vm_id, **holder, address="127.0.0.1", ports=ports)
        self.tell("vm.created", vm_id, **holder, hypervisor="qemu/tcg")
        if self.outcome == "failed":
            vm["status"] |= {"phase": "failed", "reason": "qemu ended with status 1"}
            vm |= {"phase": "failed", "reason": "qemu ended with status 1"}
            self.tell("vm.failed", vm_id, **holder | {"reason": "qemu ended with status 1"})
            return
        self.tell("vm.booted", vm_id, **holder)
        vm["status"] |= {"phase": "running", "address": "127.0.0.1", "ports": ports, "boot_ms": 1234}
        vm |= {"phase": "running", "reason": ""}
        self.tell("vm.ready", vm_id, **holder, address="127.0.0.1", ports=ports, boot_ms=1234)

    def _change(self, vm_id: str, desired: str, generation: int) -> None:
        vm = self.vms[vm_id]
        vm["spec"] |= {"desired": desired, "generation": generation}
        vm["status"] |= {"phase": desired, "generation": generation}
        vm |= {"phase": desired, "reason": ""}
        verb = {"running": "vm.ready", "stopped": "vm.stopped"}[desired]
        self.tell(verb, vm_id, trace_id=vm["trace_id"], generation=generation, reason="", ports=[])

    def find_vm(self, wanted: str) -> dict[str, Any]:
        """By id, name or prefix."""
        candidates = ((vm_id, vm["spec"]["name"]) for vm_id, vm in self.vms.items())
        return self.vms[pick_by_name_or_prefix(wanted, candidates=candidates, what="vm")]

    def find_image(self, wanted: str) -> dict[str, Any]:
        """By digest, name or prefix."""
        candidates = ((image["digest"], image["name"]) for image in self.images)
        digest = pick_by_name_or_prefix(wanted, candidates=candidates, what="image")
        return next(image for image in self.images if image["digest"] == digest)

    def status(self) -> dict[str, Any]:
        """As a node answers."""
        return {
            "node": {"id": NODE_1, "name": "n1", "version": "0.1.0", "uptime_s": 61.0, "data_dir": "/data"},
            "network": {
                "id": NETWORK_ID.hex(),
                "name": "home",
                "voters": 4,
                "quorum_size": 3,
                "fault_count_max": 1,
                "sight": {"seen_count": 1 if self.partitioned_s else 4, "voter_count": 4, "partitioned_s": self.partitioned_s},
            },
            "state": {
                "has_quorum": True,
                "observed_count": 12,
                "certified_count": 12,
                "uncertified_count": 0,
                "lanes": 4,
                "voters": [
                    {"name": f"n{i}", "node_id": f"x{i}", "online": i < 4, "last_ack_age_s": 0.2 * i} for i in range(1, 5)
                ],
            },
            "peers": [
                {"node_id": NODE_2, "name": "n2", "connected": True, "linked": True},
                {"node_id": "x3", "name": "n3", "connected": False, "linked": False},
            ],
            "host": {
                "hypervisor": "qemu",
                "accelerator": "tcg",
                "why": "no /dev/kvm",
                "hint": "",
                "capacity": {"vcpus": 4, "memory_mib": 6144, "disk_gib": 50},
                "free": {"vcpus": 3, "memory_mib": 5888, "disk_gib": 49},
            },
            "vms": {"running": 1, "failed": 1},
            "warnings": [{"text": "silent voters: n4", "hint": "formation node runs one"}],
        }

    def nodes(self) -> list[dict[str, Any]]:
        """As a node answers."""
        return [
            {
                "node_id": node_id,
                "name": name,
                "public_address": "127.0.0.1",
                "capacity": {"vcpus": 4, "memory_mib": 6144, "disk_gib": 50},
                "promised": {"vcpus": 1, "memory_mib": 256, "disk_gib": 1},
                "hypervisor": "qemu/tcg",
                "version": "0.1.0",
                "addresses": [],
                "live": name == "n1",
                "silent_s": 0.0 if name == "n1" else 42.0,
                "vms": 1,
            }
            for node_id, name in NAMES.items()
        ]


class FakeAccounts:
    """Keys, values and claims as a node keeps them, as far as commands can tell."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.recovery: dict[str, bytes] = {}
        self.delegations: dict[str, dict[str, dict[str, Any]]] = {}
        self.grants: dict[str, dict[str, str]] = {}
        self.values: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}
        self.claims: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self.is_late = False
        """What is decided shows only when a test says so."""

    def take(self, wish: SignedIntent, event: Event, object_id: str) -> None:
        """Judge and apply."""
        account_id = account_id_of(wish.intent.account)
        recovery = self.recovery.get(account_id, b"")
        wanted = {self.keys.get(account_id, wish.intent.account)}
        if isinstance(event, AccountKeyRotated | AccountRecoverySet) and recovery:
            wanted = {recovery} if isinstance(event, AccountRecoverySet) else wanted | {recovery}
        if wish.intent.key not in wanted:
            raise DeniedError(f"{event.verb}: signed by a key that is not in force")
        self.events.append(event)
        if not self.is_late:
            self._apply(account_id, event, object_id)

    def _apply(self, account_id: str, event: Event, object_id: str) -> None:
        key = object_id.partition("/")[2]
        match event:
            case AccountKeyRotated(new_key=new_key):
                self.keys[account_id] = new_key
                self.delegations.pop(account_id, None)
            case AccountRecoverySet(recovery_key=recovery_key):
                self.recovery[account_id] = recovery_key
            case DelegationGiven():
                given = {"verbs": list(event.verbs), "prefix": event.prefix, "expires_ms": event.expires_ms}
                self.delegations.setdefault(account_id, {})[event.node_id] = given
            case DelegationRevoked(node_id=node_id):
                if self.delegations.get(account_id, {}).pop(node_id, None) is None:
                    raise ConflictError("no delegation to this node")
            case ClaimMade():
                if any(claim["key"] == key for claim in self.claims):
                    raise ConflictError("held by did:key:zOther since height 3")
                self.claims.append(claim_record("handle", key, account_id))
            case ClaimReleased():
                self.claims = [claim for claim in self.claims if claim["key"] != key]
            case ValuePut(value=value):
                self.values[key] = value
            case ValueCounted(delta=delta):
                self.counts[key] = self.counts.get(key, 0) + delta
            case ValueRemoved():
                self.values.pop(key, None)
            case GrantGiven(account=account, level=level):
                self.grants.setdefault(object_id, {})[account] = Role(level).name.lower()
            case GrantRevoked(account=account):
                if self.grants.get(object_id, {}).pop(account, None) is None:
                    raise ConflictError("it has no role on this")
            case _:
                pass

    def shown(self, account_id: str) -> dict[str, Any]:
        """As a node answers."""
        first = public_key_of_account(account_id)
        key = self.keys.get(account_id, first)
        return {
            "account_id": account_id,
            "label": "",
            "handle": next((claim["key"] for claim in self.claims if claim["owner"] == account_id), ""),
            "key": key.hex(),
            "is_rotated": key != first,
            "recovery_key": self.recovery.get(account_id, b"").hex(),
            "delegations": [
                {"node_id": node_id, "name": NAMES.get(node_id, "?"), "has_ended": False} | given
                for node_id, given in self.delegations.get(account_id, {}).items()
            ],
            "object_count": len(self.values),
            "size_bytes": 512 * len(self.values),
            "spine_time_ms": 0,
        }

    def values_of(self, query: dict[str, str]) -> Any:
        """As a node answers."""
        rows = [self._value(query["account"], key) for key in sorted(self.values.keys() | self.counts.keys())]
        if "key" not in query:
            return [row for row in rows if row["key"].startswith(query.get("prefix", ""))]
        for row in rows:
            if row["key"] == query["key"]:
                return row
        raise NotFoundError(f"the account has no value {query['key']!r}", hint="formation value list")

    def _value(self, account_id: str, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        is_text = value is not None and value.isascii()
        return {
            "account": account_id,
            "key": key,
            "value_base64": None if value is None else base64.b64encode(value).decode(),
            "text": value.decode() if value is not None and is_text else None,
            "count": self.counts.get(key, 0),
            "seen": [] if value is None else ["5b" * 32],
        }


def claim_record(space: str, key: str, owner: str, *, left_ms: int | None = None) -> dict[str, Any]:
    """A claim as the API shows it."""
    return {
        "id": f"{space}/{key}",
        "space": space,
        "key": key,
        "owner": owner,
        "owner_name": NAMES.get(owner, key if space == "handle" else ""),
        "fence": [4, 1],
        "granted_ms": 0,
        "expires_ms": left_ms or 0,
        "left_ms": left_ms,
        "note": "",
    }


def vm_record(vm_id: str, name: str, *, phase: str) -> dict[str, Any]:
    """A VM as the API shows it."""
    return {
        "vm_id": vm_id,
        "owner": "did:key:z6Mkowner",
        "trace_id": "00112233aabbccdd",
        "created_ms": 0,
        "spec": {
            "name": name,
            "image": DIGEST,
            "image_name": "hello",
            "vcpus": 1,
            "memory_mib": 256,
            "disk_gib": 1,
            "publish": [[80, "tcp", 0]],
            "env": {},
            "desired": "running",
            "generation": 0,
        },
        "placement": {"node_id": NODE_2, "why": "most room", "hlc": 1},
        "status": {
            "phase": phase,
            "reason": "",
            "since_ms": 0,
            "generation": 0,
            "address": "127.0.0.1",
            "ports": [[80, "tcp", 40000]],
            "boot_ms": 1234,
        },
        "phase": phase,
        "reason": "",
        "node": "n2",
    }


def image_record(name: str = "hello", digest: str = DIGEST) -> dict[str, Any]:
    """An image as the API shows it."""
    return {
        "digest": digest,
        "name": name,
        "size_bytes": 34 << 20,
        "built_by": NODE_1,
        "built_ms": 0,
        "resources": {"vcpus": 1, "memory_mib": 256, "disk_gib": 1},
        "expose": [[80, "tcp"], [53, "udp"]],
        "holders": [NODE_1],
        "nodes": ["n1"],
    }


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    node: FakeNode


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, job: Callable[[list[str], dict[str, str]], None]) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        try:
            job([unquote(part) for part in parts.path.split("/")[2:]], query)
        except FormationError as error:
            body = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
            self._json(body, status=_HTTP_STATUS.get(error.code, 500))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _get(self, path: list[str], query: dict[str, str]) -> None:
        node = self.server.node
        match path:
            case ["status"]:
                self._json(node.status())
            case ["nodes"]:
                self._json(node.nodes())
            case ["vms"]:
                self._json(list(node.vms.values()))
            case ["vms", wanted]:
                self._json(node.find_vm(wanted))
            case ["vms", wanted, "grants"]:
                vm = node.find_vm(wanted)
                grants = node.accounts.grants.get(vm["vm_id"], {})
                rows = [{"account_id": account, "role": role, "handle": ""} for account, role in grants.items()]
                self._json({"vm_id": vm["vm_id"], "owner": vm["owner"], "owner_handle": "alice", "grants": rows})
            case ["vms", wanted, "logs"]:
                node.find_vm(wanted)
                node.permits.append(self.headers.get("Formation-Permit", ""))
                self._stream(iter([node.log]), "text/plain")
            case ["vms", wanted, "console"]:
                node.find_vm(wanted)
                self._stream(self._console(), "application/octet-stream")
            case ["images"]:
                self._json(node.images)
            case ["images", wanted]:
                self._json(node.find_image(wanted))
            case ["events"]:
                # As the node reads it: what it refuses is refused here.
                parse_event_query(query.items(), now_ms=0, find_node=str, find_account=str)
                self._stream(self._events(query), "text/event-stream")
            case ["accounts", account_id]:
                self._json(node.accounts.shown(account_id))
            case ["values"]:
                self._json(node.accounts.values_of(query))
            case ["claims"]:
                self._json([claim for claim in node.accounts.claims if query.get("space") in (None, claim["space"])])
            case _ if "/".join(path) in node.files:
                name = "/".join(path)
                data = node.files[name].pop(0)
                self._file(data)
            case _ if "/".join(path) in node.answers:
                answer = node.answers["/".join(path)]
                if isinstance(answer, FormationError):
                    raise answer
                self._json(answer)
            case _:
                raise NotFoundError("no such route")

    def _post(self, path: list[str], query: dict[str, str]) -> None:
        node = self.server.node
        match path:
            case ["intents"]:
                self._json(node.take_wish(self._body()), status=202)
            case ["images", "build"]:
                node.builds.append((query, self._body()))
                self._stream(self._build(query), "application/x-ndjson")
            case ["voters"]:
                if node.refuse is not None:
                    raise node.refuse
                node.posts.append(("voters", json.loads(self._body())))
                self._json(node.answers["voters"])
            case ["vms", _, "console", "input"]:
                node.typed += self._body()
                self.send_response(204)
                self.end_headers()
            case _ if "POST " + "/".join(path) in node.answers:
                node.posts.append(("/".join(path), json.loads(self._body())))
                answer = node.answers["POST " + "/".join(path)]
                if isinstance(answer, FormationError):
                    raise answer
                self._json(answer)
            case _:
                raise NotFoundError("no such route")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _build(self, query: dict[str, str]) -> Iterator[bytes]:
        node = self.server.node
        yield b'{"step":"parse","text":"Formfile, 5 lines"}\n'
        if node.build_error is not None:
            error = node.build_error
            yield json.dumps({"error": {"code": error.code, "message": error.message, "hint": error.hint}}).encode() + b"\n"
            return
        yield b'{"step":"done","text":"hello"}\n'
        yield json.dumps({"image": image_record(query.get("name", "hello")), "cached": False}).encode() + b"\n"

    def _console(self) -> Iterator[bytes]:
        node = self.server.node
        sent = 0
        yield b"welcome\r\n"
        while not node.closing:
            if len(node.typed) > sent:
                yield node.typed[sent:]
                sent = len(node.typed)
            time.sleep(_STREAM_WAIT_S)

    def _events(self, query: dict[str, str]) -> Iterator[bytes]:
        node = self.server.node
        position = int(query["since"]) if "since" in query else len(node.events)
        yield b": open\n\n"
        while not node.closing:
            for event in node.events[position:]:
                position = event["position"]
                wanted = all(
                    query.get(k) in (None, event[f])
                    for k, f in (("trace", "trace_id"), ("object", "object_id"), ("topic", "topic"))
                )
                if wanted:
                    yield f"id: {position}\nevent: {event['verb']}\ndata: {json.dumps(event)}\n\n".encode()
                if wanted and node.break_streams:
                    node.break_streams -= 1
                    return
            if query.get("follow") == "0":
                return
            with node.changed:
                if len(node.events) == position:
                    node.changed.wait(timeout=_STREAM_WAIT_S)

    def _json(self, value: Any, *, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, data: bytes) -> None:
        """A file; one that begins with `cut` breaks off."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if data.startswith(b"cut"):
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")

    def _stream(self, chunks: Iterator[bytes], media_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


def main() -> None:
    """Run a fake by hand, to try commands and `top`: python -m tests.unit.cli.fake_node SOCKET."""
    import sys

    with FakeNode(Path(sys.argv[1])) as node:
        node.add_vm("web", letter="a")
        node.add_vm("db", phase="failed", letter="b", reason="qemu ended with status 1")
        node.add_vm("cache", phase="booting", letter="c")
        node.tell("vm.ready", "vm-" + "a" * 16, address="127.0.0.1", ports=[[80, "tcp", 40000]], boot_ms=1234)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main()
