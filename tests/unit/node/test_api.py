"""The HTTP API, driven as a server would, over whole nodes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import structlog.testing
import trio
import trio.testing
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from formation.core import errors
from formation.core.errors import FormationError, HostError
from formation.core.event import AccountRegistered, NodeAdmitted, NodeAdvertised, NodeDismissed, VmClaimed, VmDeleted, VmDesired
from formation.core.ids import vm_id_of
from formation.core.intent import FUTURE_MS_MAX, SignedIntent
from formation.core.spec import Desired, PortMap
from formation.node.api import (
    CONSOLE_INPUT_SIZE_MAX_BYTES,
    LOG_TAIL_LINES_MAX,
    ApiParts,
    TokenGuard,
    make_api,
    only_formation_error,
)
from formation.node.door import EFFECT_TIMEOUT_S, INTENT_SIZE_MAX_BYTES
from formation.node.problem import error_json
from formation.node.stream import FOLLOWER_COUNT_MAX, KEEP_ALIVE_S, STALL_TIMEOUT_S
from formation.pack.service import BuildProgress, PackService
from formation.state.feed import Feed, Level
from formation.vmm.service import VmmService
from tests.unit.node.asgi import Answer, Call, Client
from tests.unit.node.nodes import (
    NO_IMAGE,
    OTHER,
    USER,
    Nodes,
    advertised,
    context,
    eventually,
    now_ms,
    requested,
    running,
)

Clock = trio.abc.Clock


class Broken:
    """Stands for a room in which everything raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


class BrokenBuild:
    """Stands for an image manager whose builds fail."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def build_image(self, context_dir: Path, *, progress: Callable[[BuildProgress], None], **_: Any) -> None:
        for n in range(1000):
            progress(BuildProgress(step="layer", text=str(n)))
        await trio.lowlevel.checkpoint()
        raise self._error


def client_with(nodes: Nodes, *, vmm: Any = None, pack: Any = None) -> Client:
    """A client of a node of which a part was exchanged."""
    node = nodes[0]
    reads = node.reads if vmm is None else dataclasses.replace(node.reads, vmm=cast("VmmService", vmm))
    return Client(
        make_api(
            ApiParts(
                reads=reads,
                pack=cast("PackService", pack or node.pack),
                attach=node.attach,
                door=node.door,
                cells=node.cells,
                forward=node.forward,
            )
        )
    )


# --- reads -----------------------------------------------------------------------------------------------------------


async def test_lists_and_single_things_are_answered(tmp_path: Path, jumping_clock: Clock) -> None:
    """Each route gives what the state has, by id, name or prefix."""
    async with running(tmp_path) as nodes:
        client = nodes.client()
        vm_id, _ = await nodes.boot()
        digest = nodes[0].state.view.images()[0].digest
        assert (await client.get("/v1/status")).json()["vms"] == {"running": 1}
        assert [node["name"] for node in (await client.get("/v1/nodes")).json()] == ["n0"]
        assert [vm["vm_id"] for vm in (await client.get("/v1/vms")).json()] == [vm_id]
        assert [image["digest"] for image in (await client.get("/v1/images")).json()] == [digest]
        for ref in (vm_id, "web", vm_id[:8], vm_id[3:9]):
            assert (await client.get(f"/v1/vms/{ref}")).json()["vm_id"] == vm_id
        for ref in (digest, "hello", digest[:14], digest[7:14]):
            assert (await client.get(f"/v1/images/{ref}")).json()["digest"] == digest


async def test_an_account_makes_itself_known(tmp_path: Path, jumping_clock: Clock) -> None:
    """It stands in the list from then on, and the answer names it though its wish need not."""
    async with running(tmp_path) as nodes:
        answer = await nodes.client().post("/v1/intents", nodes.wish(AccountRegistered(label="ann")).signed.raw)
        assert (answer.status, answer.json()["object_id"]) == (202, USER.account_id)
        assert (await nodes.client().get("/v1/accounts")).json() == [{"account_id": USER.account_id, "label": "ann"}]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/vms/nothing", 404),
        ("GET", "/v1/images/nothing", 404),
        ("GET", "/v1/vms/nothing/logs", 404),
        ("GET", "/v1/vms/nothing/console", 404),
        ("POST", "/v1/vms/nothing/console/input", 404),
        ("GET", "/", 404),
        ("GET", "/v2/vms", 404),
        ("GET", "/v1/vms/a/b/c", 404),
        ("DELETE", "/v1/vms", 404),
        ("POST", "/v1/status", 404),
        ("GET", "/v1/intents", 404),
        ("POST", "/v1/images/hello", 404),
    ],
)
async def test_what_is_not_there_is_not_found(
    method: str, path: str, status: int, tmp_path: Path, jumping_clock: Clock
) -> None:
    """In JSON with a code, as every error, a wrong method too."""
    async with running(tmp_path) as nodes:
        assert (await nodes.client().request(method, path)).error() == (status, "not_found")


async def test_an_image_may_be_named_like_a_route(tmp_path: Path, jumping_clock: Clock) -> None:
    """GET of `build` is the image of that name."""
    async with running(tmp_path) as nodes:
        digest = await nodes.build(name="build")
        assert (await nodes.client().get("/v1/images/build")).json()["digest"] == digest


async def test_a_name_that_two_accounts_use_is_a_conflict(tmp_path: Path, jumping_clock: Clock) -> None:
    """Names are unique within an account only; the id still tells."""
    async with running(tmp_path) as nodes:
        image = await nodes.build()
        await nodes.create(image)
        vm_id = await nodes.create(image, key=OTHER)
        assert (await nodes.client().get("/v1/vms/web")).error() == (409, "conflict")
        assert (await nodes.client().get(f"/v1/vms/{vm_id}")).status == 200


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UsageError, 400),
        (errors.DeniedError, 403),
        (errors.NotFoundError, 404),
        (errors.ConflictError, 409),
        (errors.UnavailableError, 503),
        (errors.QuorumError, 503),
        (errors.HostError, 500),
        (errors.FormationError, 500),
        (errors.RemoteFault, 500),
    ],
)
async def test_each_error_has_its_status(
    error: type[FormationError], status: int, tmp_path: Path, jumping_clock: Clock
) -> None:
    """The code says what it is, the status who must act."""
    async with running(tmp_path) as nodes:
        answer = await client_with(nodes, vmm=Broken(error("so it is", hint="do that"))).get("/v1/status")
        assert answer.status == status
        assert answer.json() == {"error": {"code": error.code, "message": "so it is", "hint": "do that"}}


def test_an_error_in_json() -> None:
    """Code, message and hint, and nothing else."""
    assert error_json(HostError("full", hint="make room")) == {
        "error": {"code": "host", "message": "full", "hint": "make room"}
    }


async def test_our_own_fault_gives_no_details(tmp_path: Path, jumping_clock: Clock) -> None:
    """The client learns that the node failed, the log why."""
    async with running(tmp_path) as nodes:
        answer = await client_with(nodes, vmm=Broken(RuntimeError("secret"))).get("/v1/status")
        assert answer.error() == (500, "failed")
        assert b"secret" not in answer.body
        assert b"Traceback" not in answer.body


def test_the_one_formation_error_in_a_group() -> None:
    """Nested groups are looked into; one that holds anything else is not explained away."""
    inner = HostError("full")
    assert only_formation_error(BaseExceptionGroup("", [ExceptionGroup("", [inner])])) is inner
    assert only_formation_error(BaseExceptionGroup("", [inner, ValueError()])) is None


# --- intents ---------------------------------------------------------------------------------------------------------


async def test_an_intent_is_answered_when_it_is_certified(tmp_path: Path, jumping_clock: Clock) -> None:
    """With the object, the trace and where it stands; and it holds from then on."""
    async with running(tmp_path) as nodes:
        wish = nodes.wish(requested(await nodes.build()))
        answer = await nodes.client().post("/v1/intents", wish.signed.raw)
        assert answer.status == 202
        assert set(answer.json()) == {"object_id", "trace_id", "token"}
        vm = nodes[0].state.view.vm(answer.json()["object_id"])
        assert vm is not None
        assert (vm.owner, vm.trace_id) == (USER.account_id, answer.json()["trace_id"])


async def test_an_intent_twice_is_an_intent_once(tmp_path: Path, jumping_clock: Clock) -> None:
    """The same object and trace come back, here and at another node, and there is one VM."""
    async with running(tmp_path, voters=4) as nodes:
        wish = nodes.wish(requested(await nodes.build())).signed.raw
        answers = [await nodes.client().post("/v1/intents", wish) for _ in range(2)]
        await eventually(lambda: bool(nodes[1].state.view.vms()))
        answers.append(await nodes.client(1).post("/v1/intents", wish))
        assert [answer.status for answer in answers] == [202] * 3
        assert len({(answer.json()["object_id"], answer.json()["trace_id"]) for answer in answers}) == 1
        assert len(nodes[1].state.view.vms()) == 1


async def test_what_follows_has_the_vms_trace(tmp_path: Path, jumping_clock: Clock) -> None:
    """Stop and delete belong to the story that the request began."""
    async with running(tmp_path) as nodes:
        vm_id, _ = await nodes.boot()
        vm = nodes[0].state.view.vm(vm_id)
        assert vm is not None
        for event in (VmDesired(desired=Desired.STOPPED, generation=1), VmDeleted()):
            answer = await nodes.client().post("/v1/intents", nodes.wish(event, vm_id).signed.raw)
            assert answer.status == 202
            assert (answer.json()["object_id"], answer.json()["trace_id"]) == (vm_id, vm.trace_id)
        await eventually(lambda: not nodes[0].vmm.statistics()["held"])


Wish = Callable[[Nodes, str], SignedIntent]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda nodes, image: nodes.wish(requested(image), network_id=b"x" * 32), (403, "denied")),
        (lambda nodes, image: nodes.wish(requested(image), created_ms=now_ms() - 60_001), (403, "denied")),
        (lambda nodes, image: nodes.wish(requested(image), created_ms=now_ms() + FUTURE_MS_MAX + 1000), (403, "denied")),
        (lambda nodes, image: nodes.wish(verb="vm.exploded"), (400, "usage")),
        (lambda nodes, image: nodes.wish(verb="vm.attach"), (400, "usage")),
        (lambda nodes, image: nodes.wish(verb="vm.requested"), (400, "usage")),
        (lambda nodes, image: nodes.wish(verb="vm.requested", body=b"\xff"), (400, "usage")),
        (lambda nodes, image: nodes.wish(VmClaimed(why="I like it", ttl_ms=60_000), "vm-aaaaaaaaaaaaaaaa"), (400, "usage")),
        (lambda nodes, image: nodes.wish(requested(image), "vm-aaaaaaaaaaaaaaaa"), (400, "usage")),
        (lambda nodes, image: nodes.wish(AccountRegistered(label="x"), OTHER.account_id), (400, "usage")),
        (lambda nodes, image: nodes.wish(requested(NO_IMAGE)), (404, "not_found")),
        (lambda nodes, image: nodes.wish(requested("latest")), (400, "usage")),
        (lambda nodes, image: nodes.wish(requested(image, "No Name")), (400, "usage")),
        (lambda nodes, image: nodes.wish(requested(image, vcpus=0)), (400, "usage")),
        (lambda nodes, image: nodes.wish(requested(image, vcpus=2**64 - 1)), (400, "usage")),
        (lambda nodes, image: nodes.wish(requested(image, memory_mib=1)), (400, "usage")),
        (lambda nodes, image: nodes.wish(requested(image, generation=1 << 63)), (400, "usage")),
        (
            lambda nodes, image: nodes.wish(VmDesired(desired=Desired.STOPPED, generation=-1), "vm-aaaaaaaaaaaaaaaa"),
            (400, "usage"),
        ),
        (lambda nodes, image: nodes.wish(requested(image, disk_gib=-1)), (400, "usage")),
        (lambda nodes, image: nodes.wish(requested(image, env={"A=": "b"})), (400, "usage")),
        (
            lambda nodes, image: nodes.wish(requested(image, publish=(PortMap(80, "tcp", 0), PortMap(80, "tcp", 0)))),
            (400, "usage"),
        ),
        (lambda nodes, image: nodes.wish(VmDeleted(), "vm-aaaaaaaaaaaaaaaa"), (404, "not_found")),
        (lambda nodes, image: nodes.wish(VmDeleted(), "web"), (400, "usage")),
        (lambda nodes, image: nodes.wish(VmDeleted()), (400, "usage")),
    ],
)
async def test_an_intent_that_would_have_no_effect_is_refused(
    make: Wish, expected: tuple[int, str], tmp_path: Path, jumping_clock: Clock
) -> None:
    """At once and with the reason; nothing is written."""
    async with running(tmp_path) as nodes:
        wish = make(nodes, await nodes.build())
        answer = await nodes.client().post("/v1/intents", wish.signed.raw)
        assert answer.error() == expected
        assert answer.json()["error"]["hint"]
        assert not nodes[0].state._was_carried(wish.digest)


@pytest.mark.parametrize("body", [b"", b"hello", b"\x84" * 100, b"x" * (INTENT_SIZE_MAX_BYTES + 1)])
async def test_garbage_is_no_intent(body: bytes, tmp_path: Path, jumping_clock: Clock) -> None:
    """Neither short nor long."""
    async with running(tmp_path) as nodes:
        assert (await nodes.client().post("/v1/intents", [body, b""])).error() == (400, "usage")


async def test_a_name_can_be_taken_once(tmp_path: Path, jumping_clock: Clock) -> None:
    """By one account; another may have a VM of that name."""
    async with running(tmp_path) as nodes:
        image = await nodes.build()
        await nodes.create(image)
        answer = await nodes.client().post("/v1/intents", nodes.wish(requested(image)).signed.raw)
        assert answer.error() == (409, "conflict")
        assert "formation vm delete web" in answer.json()["error"]["hint"]
        await nodes.create(image, key=OTHER)


async def test_only_the_owner_changes_a_vm(tmp_path: Path, jumping_clock: Clock) -> None:
    """Another account's wish is denied and changes nothing."""
    async with running(tmp_path) as nodes:
        vm_id = await nodes.create(await nodes.build())
        answer = await nodes.client().post("/v1/intents", nodes.wish(VmDeleted(), vm_id, key=OTHER).signed.raw)
        assert answer.error() == (403, "denied")
        assert nodes[0].state.view.vm(vm_id) is not None


async def test_a_start_of_what_runs_is_a_conflict(tmp_path: Path, jumping_clock: Clock) -> None:
    """A verb that makes no sense in the VM's phase is refused with a sentence; the same wish sent again is not."""
    async with running(tmp_path) as nodes:
        vm_id = await nodes.create(await nodes.build())
        await eventually(lambda: phase_of(nodes, vm_id) == "running")
        again = nodes.wish(VmDesired(desired=Desired.RUNNING, generation=1), vm_id)
        answer = await nodes.client().post("/v1/intents", again.signed.raw)
        assert answer.error() == (409, "conflict")
        assert "it is running" in answer.json()["error"]["message"]
        stop = nodes.wish(VmDesired(desired=Desired.STOPPED, generation=1), vm_id)
        assert (await nodes.client().post("/v1/intents", stop.signed.raw)).status == 202
        await eventually(lambda: phase_of(nodes, vm_id) == "stopped")
        assert (await nodes.client().post("/v1/intents", stop.signed.raw)).status == 202


def phase_of(nodes: Nodes, vm_id: str) -> str:
    record = nodes[0].state.view.vm(vm_id)
    return record.status.phase.value if record is not None else ""


async def test_a_deletion_is_answered_when_it_is_final(tmp_path: Path, jumping_clock: Clock) -> None:
    """Only the spine's order makes it true; by then the node that is asked next knows."""
    async with running(tmp_path, voters=4, hosts=frozenset()) as nodes:
        vm_id = await nodes.create(await nodes.build())
        answer = await nodes.client().post("/v1/intents", nodes.wish(VmDeleted(), vm_id).signed.raw)
        assert answer.status == 202
        assert nodes[0].state.view.vm(vm_id, Level.FINAL) is None
        assert nodes[0].state.view.vm_is_deleted(vm_id, Level.FINAL)


async def test_of_two_who_want_the_same_at_once_one_hears_that_it_was_in_vain(tmp_path: Path, jumping_clock: Clock) -> None:
    """At their doors both wishes look good; the spine has one take effect, and the other is a conflict that says why."""
    async with running(tmp_path, voters=4, hosts=frozenset()) as nodes:
        vm_id = await nodes.create(await nodes.build())
        await eventually(lambda: nodes[3].state.view.vm(vm_id) is not None)
        answers: list[Answer] = []

        async def ask(index: int, raw: bytes) -> None:
            answers.append(await nodes.client(index).post("/v1/intents", raw))

        async with trio.open_nursery() as nursery:
            for index in (0, 3):
                nursery.start_soon(ask, index, nodes.wish(VmDeleted(), vm_id).signed.raw)
        assert sorted(answer.status for answer in answers) == [202, 409]
        lost = next(answer for answer in answers if answer.status == 409)
        assert lost.error() == (409, "conflict")
        assert lost.json()["error"]["message"] == "no such object"


async def test_without_a_quorum_a_deletion_waits_and_that_is_told(tmp_path: Path, jumping_clock: Clock) -> None:
    """As any other wish; nothing is gone before the quorum is back."""
    async with trio.open_nursery() as nursery:
        nodes = Nodes(tmp_path, voters=4, hosts=frozenset())
        await nodes.start(nursery, 0, 1, 2)
        vm_id = await nodes.create(await nodes.build())
        await nodes.stop(1)
        answer = await nodes.client().post("/v1/intents", nodes.wish(VmDeleted(), vm_id).signed.raw)
        assert answer.error() == (503, "quorum")
        assert nodes[0].state.view.vm(vm_id) is not None
        await nodes.start(nursery, 1)
        await eventually(lambda: nodes[0].state.view.vm_is_deleted(vm_id))
        nursery.cancel_scope.cancel()


async def test_an_admitted_node_takes_wishes_and_runs_vms(tmp_path: Path, jumping_clock: Clock) -> None:
    """It does not vote, and writes in its own lane."""
    async with running(tmp_path, observers=1, hosts=frozenset({1})) as nodes:
        image = await nodes.build()
        node_id = nodes.keys[1].node_id
        await nodes[0].state.append_event(NodeAdmitted(), node_id, level=Level.FINAL)
        await eventually(lambda: nodes[1].state.status().may_write)
        await nodes[1].state.append_event(advertised(nodes[1]), node_id, level=Level.CERTIFIED)
        answer = await nodes.client(1).post("/v1/intents", nodes.wish(requested(image)).signed.raw)
        assert answer.status == 202
        assert answer.json()["token"]["lane"].startswith(nodes.keys[1].public_key.hex())
        vm_id = answer.json()["object_id"]
        await nodes.phase(vm_id, "running")
        record = nodes[0].state.view.vm(vm_id)
        assert record is not None
        assert record.placement is not None
        assert record.placement.node_id == node_id
        # Once dismissed, it is given nothing any more.
        await nodes[0].state.append_event(NodeDismissed(), node_id, level=Level.FINAL)
        await nodes.create(image, "late")
        late = next(vm for vm in nodes[0].state.view.vms() if vm.spec.name == "late")
        assert nodes[0].reads.vm(late)["reason"] == "no live node runs VMs"


async def test_an_observer_hands_wishes_to_a_voter(tmp_path: Path, jumping_clock: Clock) -> None:
    """A user may ask any node; the answer is the voter's, and the observer knows of the VM by then."""
    async with running(tmp_path, observers=1) as nodes:
        image = await nodes.build()
        await eventually(lambda: nodes[1].state.view.image(image) is not None)
        wish = nodes.wish(requested(image))
        answer = await nodes.client(1).post("/v1/intents", wish.signed.raw)
        assert answer.status == 202
        vm_id = answer.json()["object_id"]
        assert vm_id == vm_id_of(wish.digest)
        assert nodes[1].state.view.vm(vm_id) is not None
        assert nodes[0].state.view.vm(vm_id) is not None


async def test_what_a_voter_refuses_an_observer_refuses(tmp_path: Path, jumping_clock: Clock) -> None:
    """The voter's own error comes back, with its code and hint."""
    async with running(tmp_path, observers=1) as nodes:
        vm_id = await nodes.create(await nodes.build())
        await eventually(lambda: nodes[1].state.view.vm(vm_id) is not None)
        answer = await nodes.client(1).post("/v1/intents", nodes.wish(VmDeleted(), vm_id, key=OTHER).signed.raw)
        assert answer.error() == (403, "denied")


async def test_an_observer_that_reaches_no_voter_says_so(tmp_path: Path, jumping_clock: Clock) -> None:
    """Nothing is written, and the person hears that it was not."""
    async with running(tmp_path, observers=1) as nodes:
        image = await nodes.build()
        await eventually(lambda: nodes[1].state.view.image(image) is not None)
        await nodes.stop(0)
        answer = await nodes.client(1).post("/v1/intents", nodes.wish(requested(image)).signed.raw)
        assert answer.error() == (503, "unavailable")
        assert "no voter answers" in answer.json()["error"]["message"]


async def test_a_client_that_leaves_in_the_middle_is_nobodys_fault(tmp_path: Path, jumping_clock: Clock) -> None:
    """Nothing is raised, so nothing is logged as a failure."""
    async with running(tmp_path) as nodes:
        async with nodes.client().open("POST", "/v1/intents", chunks=[b"half"], cut=True) as call:
            await trio.testing.wait_all_tasks_blocked()
        assert call.answer.raised is None


async def test_without_a_quorum_a_wish_waits_and_that_is_told(tmp_path: Path, jumping_clock: Clock) -> None:
    """Within the time allowed, with who is missing; and it takes effect by itself when the quorum is back."""
    async with trio.open_nursery() as nursery:
        nodes = Nodes(tmp_path, voters=4)
        await nodes.start(nursery, 0, 1)
        began = trio.current_time()
        answer = await nodes.client().post("/v1/intents", nodes.wish(AccountRegistered(label="ann")).signed.raw)
        assert answer.error() == (503, "quorum")
        assert "2 of 4 voters answer and 3 are needed" in answer.json()["error"]["message"]
        assert trio.current_time() - began == pytest.approx(EFFECT_TIMEOUT_S, abs=1)
        status = (await nodes.client().get("/v1/status")).json()
        assert "no quorum: 2 of 4 voters answer" in status["warnings"][0]["text"]
        assert "n2, n3" in status["warnings"][0]["hint"]
        await nodes.start(nursery, 2)
        await eventually(lambda: bool(nodes[0].state.view.accounts()))
        nursery.cancel_scope.cancel()


# --- builds ----------------------------------------------------------------------------------------------------------


async def test_a_build_tells_its_steps_and_then_the_image(tmp_path: Path, jumping_clock: Clock) -> None:
    """JSON lines; the last one is the certified image, held here. Nothing of the context stays."""
    async with running(tmp_path) as nodes:
        answer = await nodes.client().post("/v1/images/build", [context()[:700], context()[700:]], "name=site")
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        *steps, last = answer.lines()
        assert {"read", "base", "layer", "store", "done"} <= {step["step"] for step in steps}
        assert (last["image"]["name"], last["image"]["nodes"], last["cached"]) == ("site", ["n0"], False)
        assert nodes[0].state.view.image(last["image"]["digest"]) is not None
        assert not list((tmp_path / "n0").glob("context-*"))


async def test_the_same_build_again_is_cached(tmp_path: Path, jumping_clock: Clock) -> None:
    """One image, and it says so."""
    async with running(tmp_path) as nodes:
        lines = [(await nodes.client().post("/v1/images/build", context())).lines()[-1] for _ in range(2)]
        assert lines[0]["image"]["digest"] == lines[1]["image"]["digest"]
        assert [line["cached"] for line in lines] == [False, True]


@pytest.mark.parametrize(
    ("body", "query", "code"),
    [
        (b"no tar", "", "usage"),
        (b"", "", "usage"),
        (context()[:900], "", "usage"),
        (context("FROM nothing\n"), "", "usage"),
        (context(), "formfile=../../etc/passwd", "usage"),
        (context(), "formfile=missing", "usage"),
    ],
)
async def test_what_is_wrong_with_a_build_is_its_last_line(
    body: bytes, query: str, code: str, tmp_path: Path, jumping_clock: Clock
) -> None:
    """The status line was sent long ago. Nothing of the context stays."""
    async with running(tmp_path) as nodes:
        answer = await nodes.client().post("/v1/images/build", body, query)
        assert (answer.status, answer.is_whole) == (200, True)
        assert answer.lines()[-1]["error"]["code"] == code
        assert answer.lines()[-1]["error"]["message"]
        assert not list((tmp_path / "n0").glob("context-*"))


async def test_a_bad_image_name_is_refused_before_the_upload(tmp_path: Path, jumping_clock: Clock) -> None:
    """With a status of its own."""
    async with running(tmp_path) as nodes:
        assert (await nodes.client().post("/v1/images/build", b"", "name=No%20Name")).error() == (400, "usage")


async def test_the_host_saying_no_is_the_last_line(tmp_path: Path, jumping_clock: Clock) -> None:
    """Whatever the build's tasks were doing; a client that reads slowly misses steps, not the end."""
    async with running(tmp_path) as nodes:
        client = client_with(nodes, pack=BrokenBuild(HostError("the disk is full", hint="make room")))
        answer = await client.post("/v1/images/build", context())
        assert answer.lines()[-1] == {"error": {"code": "host", "message": "the disk is full", "hint": "make room"}}
        assert len(answer.lines()) < 1000


async def test_a_context_that_cannot_be_kept_is_the_hosts_fault(tmp_path: Path, jumping_clock: Clock) -> None:
    """Also where not even a folder can be made for it."""
    async with running(tmp_path) as nodes:
        settings = dataclasses.replace(nodes[0].settings, data_dir=tmp_path / "gone")
        reads = dataclasses.replace(nodes[0].reads, settings=settings)
        client = Client(
            make_api(
                ApiParts(
                    reads=reads,
                    pack=nodes[0].pack,
                    attach=nodes[0].attach,
                    door=nodes[0].door,
                    cells=nodes[0].cells,
                    forward=nodes[0].forward,
                )
            )
        )
        assert (await client.post("/v1/images/build", context())).lines()[-1]["error"]["code"] == "host"


async def test_our_own_fault_breaks_a_build_off(tmp_path: Path, jumping_clock: Clock) -> None:
    """The answer has no end, so that nobody takes it for a whole one; and the log says why."""
    async with running(tmp_path) as nodes:
        client = client_with(nodes, pack=BrokenBuild(RuntimeError("secret")))
        with structlog.testing.capture_logs() as logs:
            answer = await client.post("/v1/images/build", context())
        assert not answer.is_whole
        assert b"secret" not in answer.body
        assert [line["event"] for line in logs if line["log_level"] == "error"] == ["api.failed"]


async def test_a_build_without_a_quorum_says_so(tmp_path: Path, jumping_clock: Clock) -> None:
    """The image is here, but nobody else knows it yet."""
    async with running(tmp_path, voters=4, started=2) as nodes:
        answer = await nodes.client().post("/v1/images/build", context())
        assert answer.lines()[-1]["error"]["code"] == "quorum"


async def test_a_wrong_clock_is_not_taken_for_silent_voters(tmp_path: Path, jumping_clock: Clock) -> None:
    """All answer, and hold back what is ahead of their time."""
    async with trio.open_nursery() as nursery:
        nodes = Nodes(tmp_path, voters=4)
        nodes.ahead_s[0] = 3600.0
        await nodes.start(nursery, 0, 1, 2, 3)
        await eventually(lambda: nodes[0].state.status().has_quorum)
        error = (await nodes.client().post("/v1/images/build", context())).lines()[-1]["error"]
        assert error["code"] == "quorum"
        assert "though 4 of 4 answer" in error["message"]
        assert "clock" in error["hint"]
        nursery.cancel_scope.cancel()


async def test_a_client_that_leaves_during_the_upload_ends_the_build(tmp_path: Path, jumping_clock: Clock) -> None:
    """Half a context is no context, and none of it stays."""
    async with running(tmp_path) as nodes:
        async with nodes.client().open("POST", "/v1/images/build", chunks=[context()[:700]], cut=True) as call:
            await call.started()
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(list((tmp_path / "n0").glob("context-*"))) == 1
        assert call.answer.raised is None
        assert not nodes[0].pack.images()
        assert not list((tmp_path / "n0").glob("context-*"))


# --- events ----------------------------------------------------------------------------------------------------------


def events(body: bytes) -> list[tuple[int, str, dict[str, Any]]]:
    """(id, event, data) of a body of server-sent events."""
    found = []
    for block in body.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            feed_id, position = fields["id"].split("-")
            assert feed_id == "0a0a0a0a"
            found.append((int(position), fields["event"], json.loads(fields["data"])))
    return found


async def test_events_so_far_and_no_further(tmp_path: Path, jumping_clock: Clock) -> None:
    """`follow=0` gives what there is behind `since`, then ends; without `since` there is nothing."""
    async with running(tmp_path) as nodes:
        vm_id, _ = await nodes.boot()
        client = nodes.client()
        answer = await client.get("/v1/events", "since=0&follow=0")
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer.body)
        assert answer.is_whole
        assert [position for position, _, _ in told] == list(range(1, nodes[0].state.status().position + 1))
        assert {"node.advertised", "image.built", "vm.requested", "vm.ready"} <= {verb for _, verb, _ in told}
        assert all(data["position"] == position and data["verb"] == verb for position, verb, data in told)
        for query in ("follow=0", f"since={told[-1][0]}&follow=0", f"since={told[-1][0]}&follow=false"):
            assert events((await client.get("/v1/events", query)).body) == []
        resumed = events((await client.get("/v1/events", f"since={told[4][0]}&follow=0")).body)
        assert resumed == told[5:]
        assert events((await client.get("/v1/events", "follow=0", last_event_id=str(told[4][0]))).body) == told[5:]
        trace = nodes[0].state.view.vms()[0].trace_id
        filters: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (
            ("topic=image", lambda data: data["topic"] == "image"),
            (f"trace={trace}", lambda data: data["trace_id"] == trace),
            (f"object={vm_id}&topic=net", lambda data: data["object_id"] == vm_id and data["topic"] == "net"),
            ("topic=image&topic=net", lambda data: data["topic"] in ("image", "net")),
            ("record=vm&level=final", lambda data: data["record"] == "vm" and data["level"] == "final"),
            (f"account={USER.account_id}", lambda data: data["account"] == USER.account_id),
            ("node=n0&topic=node", lambda data: data["topic"] == "node"),
        )
        for query, passes in filters:
            wanted = [event for event in told if passes(event[2])]
            assert wanted
            assert events((await client.get("/v1/events", f"since=0&follow=0&{query}")).body) == wanted


@pytest.mark.parametrize("since", ["-1", "x", "1.5", "%C2%B2", "9" * 5000, "0x1"])
async def test_a_position_is_a_number(since: str, tmp_path: Path, jumping_clock: Clock) -> None:
    """Not all that Python takes for digits is one."""
    async with running(tmp_path) as nodes:
        assert (await nodes.client().get("/v1/events", f"since={since}")).error() == (400, "usage")


async def test_events_are_followed_from_the_moment_of_asking(tmp_path: Path, jumping_clock: Clock) -> None:
    """What happened before is not told; what happens after the status line is."""
    async with running(tmp_path) as nodes:
        await nodes.boot()
        async with nodes.client().open("GET", "/v1/events") as call:
            await call.started()
            await nodes[0].state.append_event(_advertised("other"), nodes[0].key.node_id)
            first = await call.until(b"event: ")
            assert b"event: node.advertised" in first
        assert call.answer.raised is None


async def test_a_quiet_stream_is_kept_alive_and_ends_with_its_client(tmp_path: Path, jumping_clock: Clock) -> None:
    """A comment every ten seconds, so that nobody takes silence for death; HEAD is no way to stay for ever either."""
    async with running(tmp_path) as nodes:
        await trio.sleep(5)
        async with nodes.client().open("GET", "/v1/events", "topic=account") as call:
            began, position = trio.current_time(), nodes[0].state.status().position
            assert await call.piece() == b": open\nid: 0a0a0a0a-%d\n\n" % position
            assert await call.piece() == b": keep-alive\nid: 0a0a0a0a-%d\n\n" % position
            await nodes[0].state.append_event(_advertised("other"), nodes[0].key.node_id)
            await eventually(lambda: nodes[0].state.status().position > position)
            # What its filter held back need not be looked at again.
            assert await call.piece() == b": keep-alive\nid: 0a0a0a0a-%d\n\n" % nodes[0].state.status().position
            assert trio.current_time() - began == pytest.approx(2 * KEEP_ALIVE_S, abs=1)
        async with nodes.client().open("HEAD", "/v1/events") as call:
            await call.started()
        assert call.is_done.is_set()


async def test_a_client_that_missed_changes_is_told_how_many(tmp_path: Path, jumping_clock: Clock) -> None:
    """The window is bounded; what fell out of it is a gap, and the stream goes on behind it."""
    async with running(tmp_path) as nodes:
        await nodes.boot()
        state, newest = nodes[0].state, nodes[0].state.status().position
        small = Feed(state.replica.expand, count_max=3)
        small.publish(state._feed._rows)
        state._feed = small
        told = events((await nodes.client().get("/v1/events", "since=0&follow=0")).body)
        missed = told[0][0]
        # What reached a level at once is kept or forgotten together.
        assert missed in range(newest - 3, newest)
        gap = {"missed": missed, "first_position": 1, "position": missed, "cursor": f"0a0a0a0a-{missed}"}
        assert told[0] == (missed, "gap", gap)
        assert [position for position, _, _ in told[1:]] == list(range(missed + 1, newest + 1))
        filtered = events((await nodes.client().get("/v1/events", "since=0&follow=0&topic=account")).body)
        assert [verb for _, verb, _ in filtered] == ["gap"]


@pytest.mark.parametrize(
    ("query", "expected", "near"),
    [
        ("topic=vmm", (400, "usage"), "did you mean vm?"),
        ("record=images", (400, "usage"), "did you mean image?"),
        ("level=finale", (400, "usage"), "did you mean final?"),
        ("topics=vm", (400, "usage"), "did you mean topic?"),
        ("object=a&object=b", (400, "usage"), ""),
        ("topic=vm&" * 33, (400, "usage"), ""),
        ("trace=" + "a" * 257, (400, "usage"), ""),
        ("node=n7", (404, "not_found"), "formation status"),
        ("account=nobody", (404, "not_found"), "whole id"),
        ("since=2026-01-31T12:00:00", (400, "usage"), "12:00:00Z"),
        ("since=5f0c11d2-1", (409, "conflict"), "--since 10m"),
        ("since=0a0a0a0a-99999", (409, "conflict"), "--since 10m"),
        ("since=99999", (409, "conflict"), "--since 10m"),
    ],
)
async def test_a_filter_that_is_none_is_refused_by_name(
    query: str, expected: tuple[int, str], near: str, tmp_path: Path, jumping_clock: Clock
) -> None:
    """One that is passed over in silence would show what nobody asked for; so would another node's position."""
    async with running(tmp_path) as nodes:
        answer = await nodes.client().get("/v1/events", query.rstrip("&"))
        assert answer.error() == expected
        assert near in answer.json()["error"]["hint"]


async def test_events_since_a_time(tmp_path: Path, jumping_clock: Clock) -> None:
    """A duration counts back from the node's clock; a time with its zone says the same."""
    async with running(tmp_path) as nodes:
        await nodes.boot()
        before = nodes[0].state.status().position
        await trio.sleep(100)
        at_ms = now_ms()
        await nodes[0].state.append_event(_advertised("other"), nodes[0].key.node_id, level=Level.CERTIFIED)
        text = datetime.fromtimestamp(at_ms / 1000, UTC).isoformat().replace("+00:00", "Z")
        for since in ("50s", text):
            told = events((await nodes.client().get("/v1/events", f"since={since}&follow=0&topic=node")).body)
            assert {data["fields"]["name"] for _, _, data in told} == {"other"}
            assert all(position > before for position, _, _ in told)


async def test_so_many_may_follow(tmp_path: Path, jumping_clock: Clock) -> None:
    """One more is told so, with what to do; a place is free again as soon as somebody goes."""
    async with running(tmp_path) as nodes:
        client = nodes.client()
        async with AsyncExitStack() as stack:
            for _ in range(FOLLOWER_COUNT_MAX):
                call = await stack.enter_async_context(client.open("GET", "/v1/events"))
                await call.piece()
            assert (await client.get("/v1/events")).error() == (503, "unavailable")
            assert (await client.get("/v1/events", "follow=0&since=0")).status == 200
        async with client.open("GET", "/v1/events") as call:
            assert await call.piece()


async def test_a_follower_that_reads_nothing_is_let_go(tmp_path: Path, jumping_clock: Clock) -> None:
    """Nobody waits for it, and its place is free after a while; the body has no end, so it knows that it missed something."""
    async with running(tmp_path) as nodes:
        node = nodes[0]
        app = make_api(
            ApiParts(
                reads=node.reads, pack=node.pack, attach=node.attach, door=node.door, cells=node.cells, forward=node.forward
            )
        )
        scope = Call(app, "GET", "/v1/events", query="", headers=(), chunks=[])._scope
        took: list[bytes] = []
        gone = trio.Event()

        async def receive() -> Any:
            await trio.sleep_forever()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                took.append(message["body"])
                await trio.sleep_forever()

        async def call() -> None:
            await app(scope, receive, send)
            gone.set()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await eventually(lambda: bool(took))
            await nodes[0].state.append_event(_advertised("other"), nodes[0].key.node_id, level=Level.CERTIFIED)
            with trio.fail_after(2 * STALL_TIMEOUT_S):
                await gone.wait()
        assert trio.current_time() - began == pytest.approx(STALL_TIMEOUT_S, abs=1)
        assert len(took) <= 2


def _advertised(name: str) -> NodeAdvertised:
    from formation.core.spec import Resources

    capacity = Resources(vcpus=1, memory_mib=1, disk_gib=1)
    return NodeAdvertised(name=name, addresses=(), public_address="a", capacity=capacity, hypervisor="", version="1")


# --- logs and consoles here ------------------------------------------------------------------------------------------


async def test_the_log_of_a_vm_here(tmp_path: Path, jumping_clock: Clock) -> None:
    """Its last lines, as many as asked for; and it needs no permit, for the socket is the operator's."""
    async with running(tmp_path) as nodes:
        _, guest = await nodes.boot()
        await guest.console.feed(b"one\ntwo\nthree\n")
        answer = await nodes.client().get("/v1/vms/web/logs", "tail=2")
        assert (answer.status, answer.body, answer.is_whole) == (200, b"two\nthree\n", True)
        assert (await nodes.client().get("/v1/vms/web/logs", "tail=0")).body == b""
        assert (await nodes.client().get("/v1/vms/web/logs")).body == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("tail", ["-1", "x", "%C2%B2", str(LOG_TAIL_LINES_MAX + 1), "9" * 5000])
async def test_a_tail_is_a_count_of_lines(tail: str, tmp_path: Path, jumping_clock: Clock) -> None:
    """A bounded one."""
    async with running(tmp_path) as nodes:
        assert (await nodes.client().get("/v1/vms/web/logs", f"tail={tail}")).error() == (400, "usage")


async def test_a_log_is_followed_until_the_vm_ends(tmp_path: Path, jumping_clock: Clock) -> None:
    """What was there first, then what comes, then the end."""
    async with running(tmp_path) as nodes:
        vm_id, guest = await nodes.boot()
        await guest.console.feed(b"before\n")
        async with nodes.client().open("GET", f"/v1/vms/{vm_id}/logs", "follow=1") as call:
            await call.until(b"before\n")
            await trio.testing.wait_all_tasks_blocked()
            await guest.console.feed(b"after\n")
            await call.until(b"after\n")
            guest.crash("the guest powered itself off")
            assert await call.piece() == b""
        assert call.answer.is_whole


async def test_a_console_here_and_typing(tmp_path: Path, jumping_clock: Clock) -> None:
    """Bytes out, bytes in; who goes leaves no follower behind."""
    async with running(tmp_path) as nodes:
        _, guest = await nodes.boot()
        async with nodes.client().open("GET", "/v1/vms/web/console") as call:
            await trio.testing.wait_all_tasks_blocked()
            await guest.console.feed(b"login: ")
            await call.until(b"login: ")
            answer = await nodes.client().post("/v1/vms/web/console/input", b"root\n")
            assert (answer.status, answer.body) == (204, b"")
            assert guest.typed == b"root\n"
            too_much = b"x" * (CONSOLE_INPUT_SIZE_MAX_BYTES + 1)
            assert (await nodes.client().post("/v1/vms/web/console/input", too_much)).error() == (400, "usage")
        async with nodes.client().open("GET", "/v1/vms/web/logs", "follow=1"):
            await trio.testing.wait_all_tasks_blocked()
        assert guest.console._followers == []


async def test_a_console_of_a_vm_that_does_not_run_is_refused(tmp_path: Path, jumping_clock: Clock) -> None:
    """With a status of its own: before the stream begins."""
    async with running(tmp_path) as nodes:
        vm_id, _ = await nodes.boot()
        stop = nodes.wish(VmDesired(desired=Desired.STOPPED, generation=1), vm_id)
        await nodes.client().post("/v1/intents", stop.signed.raw)
        await nodes.phase(vm_id, "stopped")
        assert (await nodes.client().get("/v1/vms/web/console")).error() == (409, "conflict")
        assert (await nodes.client().post("/v1/vms/web/console/input", b"x")).error() == (409, "conflict")


async def test_a_vm_without_a_place_has_neither_log_nor_console(tmp_path: Path, jumping_clock: Clock) -> None:
    """It was not placed, because nobody runs VMs."""
    async with running(tmp_path, hosts=frozenset()) as nodes:
        await nodes.create(await nodes.build())
        for path in ("/v1/vms/web/logs", "/v1/vms/web/console"):
            assert (await nodes.client().get(path)).error() == (409, "conflict")
        assert (await nodes.client().post("/v1/vms/web/console/input", b"x")).error() == (409, "conflict")


# --- the token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 403),
        ([b"Bearer right"], 200),
        ([b"Bearer wrong"], 403),
        ([b"Bearer right "], 403),
        ([b"bearer right"], 403),
        ([b"right"], 403),
        ([b"Bearer"], 403),
        ([b"Bearer right", b"Bearer right"], 403),
        ([b"Bearer wrong", b"Bearer right"], 403),
        ([b"Bearer \xff"], 403),
    ],
)
async def test_over_tcp_each_request_carries_the_token(headers: list[bytes], status: int) -> None:
    """Once, exactly; a refusal is all that others learn."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("nothing is read of a refused request")

    async def send(message: Any) -> None:
        sent.append(message)

    guard = TokenGuard(PlainTextResponse("in"), token="right")
    scope = {"type": "http", "method": "GET", "path": "/v1/status", "headers": [(b"authorization", value) for value in headers]}
    await guard(scope, receive, send)
    assert sent[0]["status"] == status
    if status == 403:
        assert json.loads(sent[1]["body"])["error"]["code"] == "denied"


async def test_the_guard_lets_the_servers_own_talk_through() -> None:
    """Start and end of the server carry no headers."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    await TokenGuard(app, token="right")({"type": "lifespan"}, nothing, nothing)
    assert seen == ["lifespan"]
