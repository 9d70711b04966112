"""Whole commands against the fake node when things go wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import tarfile
import threading
from base64 import urlsafe_b64decode
from io import BytesIO
from pathlib import Path
from typing import Protocol

import pytest

from formation.cli.client import Client
from formation.core.errors import UnavailableError
from formation.core.event import VmRequested, parse_event
from formation.core.intent import parse_intent
from tests.unit.cli.fake_node import FakeNode


class _Result(Protocol):
    status: int
    out: str
    err: str


class _Run(Protocol):
    def __call__(self, *arguments: str) -> _Result: ...


def _requested(node: FakeNode) -> VmRequested:
    intent = parse_intent(node.wishes[-1]).intent
    event = parse_event(intent.verb, intent.body)
    assert isinstance(event, VmRequested)
    return event


def test_request_is_what_the_flags_say(run: _Run, node: FakeNode, home: Path) -> None:
    """Sizes, ports and environment arrive as given; flags win over the file."""
    (home / "app.env").write_text("# settings\nA=1\nB=from file\n\n")
    line = "create hello web -c 2 -m 1GiB -d 3GiB -p 8080:80 -p 53:53/udp -e B=flag=x --env-file app.env"
    assert run(*line.split()).status == 0
    request = _requested(node)
    assert (request.name, request.vcpus, request.memory_mib, request.disk_gib) == ("web", 2, 1024, 3)
    assert [(p.guest_port, p.transport, p.host_port) for p in request.publish] == [(80, "tcp", 8080), (53, "udp", 53)]
    assert request.env == {"A": "1", "B": "flag=x"}


def test_exposed_tcp_ports_are_published(run: _Run, node: FakeNode) -> None:
    """Without --publish each exposed TCP port gets a free host port; with --no-publish none."""
    run("create", "hello", "web")
    assert [(p.guest_port, p.transport, p.host_port) for p in _requested(node).publish] == [(80, "tcp", 0)]
    run("create", "hello", "web2", "--no-publish")
    assert _requested(node).publish == ()


def test_json_result(run: _Run, node: FakeNode) -> None:
    """The result is the VM with its steps, alone on stdout."""
    result = run("create", "hello", "web", "-o", "json")
    shown = json.loads(result.out)
    assert shown["phase"] == "running"
    assert [step["step"] for step in shown["steps"]][:2] == ["accepted", "vm.scheduled"]
    assert all(isinstance(step["elapsed_ms"], int) for step in shown["steps"])


def test_broken_stream_is_taken_up_again(run: _Run, node: FakeNode) -> None:
    """A stream that breaks after each of its first events loses no step and repeats none."""
    node.break_streams = 3
    result = run("create", "hello", "web", "-o", "json")
    assert result.status == 0, result.err
    names = [step["step"] for step in json.loads(result.out)["steps"]]
    assert names == ["accepted", "vm.scheduled", "image.ready", "net.leased", "vm.created", "vm.booted", "vm.ready"]


def test_node_that_comes_back_gets_the_same_wish(run: _Run, node: FakeNode) -> None:
    """A node that is away when the wish is sent gets it when it is back, once."""

    def away_for_a_moment() -> None:
        node.stop()
        threading.Timer(0.5, node.start).start()

    take = node.take_wish

    def taken_then_away(raw: bytes) -> dict[str, object]:
        if not node.wishes:
            take(raw)
            away_for_a_moment()
            raise ConnectionResetError
        return take(raw)

    node.take_wish = taken_then_away  # type: ignore[method-assign]
    result = run("create", "hello", "web")
    assert result.status == 0, result.err
    assert len(set(node.wishes)) == 1
    assert [vm["spec"]["name"] for vm in node.vms.values()] == ["web"]


def test_interrupt_says_that_it_goes_on(run: _Run, node: FakeNode) -> None:
    """Ctrl-C ends the command, not the VM."""
    node.outcome = "silent"

    def interrupt_when_accepted() -> None:
        with node.changed:
            node.changed.wait_for(lambda: bool(node.wishes), timeout=10)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_accepted, daemon=True).start()
    result = run("create", "hello", "web")
    assert result.status == 130
    assert "Error: interrupted; the network goes on with web" in result.err
    assert "Hint: formation vm show web" in result.err


def test_init_joins_and_does_not_change_networks(run: _Run, home: Path) -> None:
    """A manifest is copied once; another one is refused, and nothing is made when it is refused."""
    from formation.core.keys import KeyPair
    from formation.core.manifest import found_network, read_manifest

    for name, seed in (("friends", b"\x05"), ("foes", b"\x06")):
        voters = [("n1", KeyPair(seed * 32), ["/ip4/192.0.2.1/tcp/4700"])]
        (home / f"{name}.toml").write_text(found_network(name, voters=voters, founded_ms=1).to_toml())
    assert run("init", "--manifest", "friends.toml", "--name", "attic").status == 0
    assert read_manifest(home / "config" / "formation" / "network.toml").name == "friends"
    assert (home / "config" / "formation" / "config.toml").stat().st_mode & 0o777 == 0o600
    refused = run("init", "--manifest", "foes.toml")
    assert refused.status == 6
    assert "in network 'friends' already" in refused.err


def test_init_completes_a_draft_of_one(run: _Run, home: Path) -> None:
    """A draft of one voter becomes this node's network; one of four is for the demo."""
    from formation.core.manifest import read_manifest

    voter = '[[voter]]\nname = "n{0}"\naddresses = ["/ip4/127.0.0.1/tcp/470{0}"]\n'
    (home / "one.toml").write_text('format = 1\nname = "solo"\n' + voter.format(1))
    (home / "four.toml").write_text('format = 1\nname = "four"\n' + "".join(voter.format(i) for i in range(1, 5)))
    refused = run("init", "--manifest", "four.toml")
    assert (refused.status, "drafts are for formation demo" in refused.err) == (2, True)
    assert not (home / "config" / "formation" / "config.toml").exists()
    assert run("init", "--manifest", "one.toml").status == 0
    manifest = read_manifest(home / "config" / "formation" / "network.toml")
    assert (manifest.name, manifest.voters[0].name) == ("solo", "n1")


def test_new_key_is_private(run: _Run, home: Path) -> None:
    """A further key lies beside the account's, mode 0600, and is listed."""
    result = run("key", "new", "work", "-q")
    path = home / "config" / "formation" / "keys" / "work.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert result.out.strip() in run("key", "list", "-q").out.split()
    path.chmod(0o644)
    assert "can be read by others" in run("key", "list").out


def test_context_is_sent_without_what_is_ignored(run: _Run, home: Path, node: FakeNode) -> None:
    """Files, folders and links in sorted order; .git and .formignore's patterns stay at home."""
    context = home / "web"
    (context / ".git").mkdir(parents=True)
    (context / ".git" / "HEAD").write_text("x")
    (context / "www").mkdir()
    (context / "www" / "index.html").write_text("hello" * 1000)
    (context / "www" / "big.log").write_text("no")
    (context / "link").symlink_to("www/index.html")
    (context / "Formfile").write_text("FROM busybox\n")
    (context / ".formignore").write_text("# logs\n*.log\n.formignore\n")
    assert run("image", "build", "web", "--name", "web").status == 0
    query, body = node.builds[0]
    assert query == {"name": "web"}
    with tarfile.open(fileobj=BytesIO(body)) as archive:
        assert archive.getnames() == ["Formfile", "link", "www", "www/index.html"]
        file = archive.extractfile("www/index.html")
        assert file is not None
        assert file.read() == b"hello" * 1000


def test_node_that_talks_nonsense(node: FakeNode) -> None:
    """A list that is none is an unavailable node, not a traceback."""
    client = Client(str(node.socket_path))
    with pytest.raises(UnavailableError, match="does not speak"):
        client.rows("/v1/status", "vms")


def test_text_that_steers_terminals_is_made_harmless(run: _Run, node: FakeNode) -> None:
    """What a peer writes cannot reach the terminal as a control sequence."""
    node.add_vm("web", reason="\x1b[2J\x07gone")
    out = run("ps").out
    assert "\x1b" not in out
    assert "\ufffd[2J\ufffdgone" in out


def test_colour_is_asked_for_or_not(run: _Run, node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """--color wins over NO_COLOR, which wins over FORCE_COLOR; a pipe has none."""
    node.add_vm("web")
    assert "\x1b[32mrunning\x1b[0m" in run("ps", "--color", "always").out
    assert "\x1b" not in run("ps").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" in run("ps").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("ps").out


def test_names_complete(run: _Run, node: FakeNode) -> None:
    """Names of VMs and images are offered; without a node, quietly none."""
    from formation.cli.completion import complete_images, complete_vms

    node.add_vm("web")
    assert complete_vms("w") == ["web"]
    assert complete_images("") == ["hello"]
    node.stop()
    assert complete_vms("") == []


@pytest.mark.parametrize("line", ["", "vm", "image", "key", "create", "ps", "events", "node", "demo", "init", "top", "status"])
def test_help(run: _Run, line: str) -> None:
    """Each command has help with examples, without asking anybody."""
    result = run(*line.split(), "--help")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("Usage: formation")
    if line not in ("", "vm", "image", "key"):
        assert "Examples:" in result.out


def test_log_comes_with_the_owners_permit(run: _Run, node: FakeNode, home: Path) -> None:
    """The asked node can pass on who asks; without a key it is asked all the same."""
    vm = node.add_vm("web")
    assert run("logs", "web").out == "hello from the guest\n"
    permit = parse_intent(urlsafe_b64decode(node.permits[0])).intent
    assert (permit.verb, permit.object_id, permit.body) == ("vm.attach", vm["vm_id"], b"\xa0")
    (home / "config" / "formation" / "account.key").unlink()
    assert run("logs", "web").status == 0
    assert node.permits[1] == ""
