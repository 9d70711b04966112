"""A table of what people get wrong: each gives one error, one hint, the right exit status, and no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import pytest

from formation.core.errors import ConflictError, DeniedError, QuorumError
from tests.unit.cli.fake_node import FakeNode


class _Result(Protocol):
    status: int
    out: str
    err: str


class _Run(Protocol):
    def __call__(self, *arguments: str) -> _Result: ...


# (what, arguments, exit status, part of the error, part of the hint)
_MISTAKES: list[tuple[str, str, int, str, str]] = [
    ("no such command", "creat", 2, "no such command 'creat'. Did you mean 'create'", "formation --help"),
    ("no such subcommand", "vm lost", 2, "no such command 'lost'", "formation vm --help"),
    ("no such flag", "ps --colour always", 2, "no such option: --colour", "formation ps --help"),
    ("missing argument", "vm create", 2, "missing argument 'IMAGE'", "formation vm create --help"),
    ("missing value", "create hello web --cpus", 2, "--cpus", "formation create --help"),
    (
        "count is no number",
        "create hello web --cpus two",
        2,
        "'--cpus' / '-c': 'two' is not a whole number",
        "formation create --help",
    ),
    ("no vCPU", "create hello web --cpus 0", 2, "--cpus: 0 is not within 1 and 128", "give 1 to 128"),
    ("size without unit", "create hello web --memory 512", 2, "--memory: '512' is not a size with a unit", "512MiB"),
    ("size that is none", "create hello web --disk huge", 2, "--disk: 'huge'", "2GiB"),
    ("too little memory", "create hello web --memory 1MiB", 2, "--memory: 1MiB is not within", "128"),
    ("broken size", "create hello web --disk 1500MiB", 2, "not a whole number of GiB", "2GiB"),
    ("port map with a word", "create hello web --publish web:80", 2, "--publish: 'web:80' is not a port map", "8080:80"),
    ("port too high", "create hello web --publish 8080:70000", 2, "a port is 1 to 65535", "HOST:GUEST"),
    ("port zero", "create hello web -p 0", 2, "a port is 1 to 65535", "8080:80"),
    ("same port twice", "create hello web -p 80:80 -p 81:80", 2, "the same guest port twice", "once"),
    ("publish and not", "create hello web -p 80 --no-publish", 2, "exclude each other", "leave one away"),
    ("env without =", "create hello web --env GREETING", 2, "--env: 'GREETING' is not NAME=value", "GREETING=hello"),
    ("env file missing", "create hello web --env-file no.env", 2, "cannot read no.env", "NAME=value"),
    ("name in capitals", "create hello Web", 2, "NAME: 'Web' is not a valid name", "a-z, 0-9"),
    ("name too long", "create hello " + "x" * 64, 2, "not a valid name", "1 to 63"),
    ("timeout without unit", "create hello web --timeout 90", 2, "--timeout: '90'", "90s"),
    ("unknown image", "create nope", 5, "no image matches 'nope'", "formation image list"),
    ("unknown VM", "vm show nope", 5, "no vm matches 'nope'", "formation vm list"),
    ("VM with a slash", "vm show a/b", 2, "'a/b' is neither a name nor an id", "formation vm list"),
    ("ambiguous prefix", "vm show aaaa", 6, "matches 2 of kind vm", "full id"),
    ("unknown form", "ps -o xml", 2, "'xml' is not one of table, wide, json", "formation ps --help"),
    ("unknown topic", "events --topic disks", 2, "topic: there is no 'disks'", "one of: node, account"),
    ("position below zero", "events --since -3", 2, "since: '-3' is neither a position nor a time", "10m"),
    ("unknown shell", "completion tcsh", 2, "tcsh", "formation completion --help"),
    ("no directory", "image build nowhere", 2, "nowhere is not a directory", "formation image build DIRECTORY"),
    ("no Formfile", "image build .", 5, "no Formfile at Formfile", "Formfile"),
    ("bad image name", "image build with --name A_B", 2, "--name: 'A_B'", "a-z"),
    ("Formfile elsewhere", "image build with --file other/Formfile", 2, "lies outside with", "into the directory"),
    ("too many log lines", "logs web -n 99999999", 2, "--lines: 99999999", "-n 200"),
    ("console without terminal", "vm console web", 2, "a console needs a terminal", "logs -f"),
    ("top without terminal", "top", 2, "top needs a terminal", "-o json"),
    ("host is no address", "ps --host ftp://x", 2, "'ftp://x' is not an address", "http://HOST:PORT"),
    ("host without port", "ps --host http://127.0.0.1", 2, "not an address", "http://HOST:PORT"),
    ("wrong socket", "ps --host no.sock", 3, "there is no socket at no.sock", "formation node"),
    ("socket is a file", "ps --host plain", 3, "nobody listens at plain", "formation node"),
    ("config missing", "ps --config no.toml", 2, "no configuration at no.toml", "formation init"),
    ("config broken", "ps --config broken.toml", 2, "broken.toml: not TOML", "--print-config"),
    ("config misspelt", "ps --config misspelt.toml", 2, "unknown setting client.hots", "client.host"),
    ("key exists", "key new", 6, "exists already", "never overwritten"),
    ("key name", "key new Bad_Name", 2, "NAME: 'Bad_Name'", "a-z"),
    ("no such key", "key show work", 5, "no key at", "formation init"),
    ("manifest missing", "init --manifest no.toml", 5, "no manifest at no.toml", "member"),
    ("manifest broken", "init --manifest broken.toml", 2, "broken.toml: not TOML", ""),
    ("manifest and network", "init --manifest a --network b", 2, "exclude each other", "names its network"),
    ("listen is no multiaddr", "init --listen 0.0.0.0:4700", 2, "--listen: '0.0.0.0:4700'", "/ip4/"),
]


def _check(result: _Result, status: int, error: str, hint: str) -> None:
    assert result.status == status, result.err
    assert "Traceback" not in result.err
    assert result.err.count("Error: ") == 1
    assert error in result.err.partition("Error: ")[2].partition("\n")[0]
    assert result.err.count("Hint: ") == 1
    assert hint in result.err.partition("Hint: ")[2]
    assert result.out == ""


@pytest.fixture
def surroundings(home: Path, node: FakeNode) -> None:
    node.add_vm("web", letter="a")
    other = node.add_vm("db", letter="b")
    node.vms["vm-" + "a" * 15 + "b"] = other | {"vm_id": "vm-" + "a" * 15 + "b"}
    (home / "plain").write_text("")
    (home / "broken.toml").write_text("[client\n")
    (home / "misspelt.toml").write_text('[client]\nhots = "x"\n')
    for folder in ("with", "other"):
        (home / folder).mkdir()
        (home / folder / "Formfile").write_text("FROM busybox\n")


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize(("arguments", "status", "error", "hint"), [m[1:] for m in _MISTAKES], ids=[m[0] for m in _MISTAKES])
def test_mistake(run: _Run, arguments: str, status: int, error: str, hint: str) -> None:
    """One error, one hint, the exit status of the table, nothing on stdout."""
    _check(run(*arguments.split()), status, error, hint)


def test_no_node_running(run: _Run, home: Path) -> None:
    """Without a node the hint says how to start one."""
    _check(run("status"), 3, "no node is running: there is no socket at", "formation node")


def test_no_account_key(run: _Run, home: Path, node: FakeNode) -> None:
    """A wish without a key fails before anything is sent."""
    (home / "config" / "formation" / "account.key").unlink()
    _check(run("create", "hello"), 5, "no key at", "formation init")
    assert node.wishes == []


def test_key_readable_by_others(run: _Run, home: Path, node: FakeNode) -> None:
    """A key that others can read is refused with the command that mends it."""
    (home / "config" / "formation" / "account.key").chmod(0o644)
    _check(run("create", "hello"), 2, "can be read by others (mode 0644)", "chmod 600")


def test_key_file_is_another(run: _Run, home: Path, node: FakeNode) -> None:
    """A file that is no key is named."""
    (home / "config" / "formation" / "account.key").write_text("-----BEGIN\n")
    _check(run("vm", "create", "hello"), 2, "is not a Formation key file", "first line")


def test_node_refuses(run: _Run, node: FakeNode) -> None:
    """The node's own error comes through with its code's exit status."""
    for error, status in (
        (DeniedError("not yours", hint="ask the owner"), 4),
        (ConflictError("a VM named 'web' exists already", hint="choose another name"), 6),
        (QuorumError("only 2 of 4 voters answer", hint="formation status"), 7),
    ):
        node.refuse = error
        _check(run("create", "hello", "web"), status, error.message, error.hint)


def test_build_error_has_its_place(run: _Run, home: Path, node: FakeNode, surroundings: None) -> None:
    """A Formfile's error arrives with line and column."""
    from formation.core.errors import UsageError

    node.build_error = UsageError("Formfile:3:1: unknown directive COPPY", hint="did you mean COPY?")
    result = run("image", "build", "with", "-q")
    _check(result, 2, "Formfile:3:1: unknown directive COPPY", "did you mean COPY?")


@pytest.mark.parametrize("flags", [["-o", "json"], ["--json"], ["--output=jsonl"], ["-ojson"]])
def test_json_mode_tells_errors_as_json(run: _Run, node: FakeNode, flags: list[str]) -> None:
    """Programs get the error as one JSON object on stderr."""
    result = run("vm", "show", "nope", *flags)
    assert json.loads(result.err) == {
        "error": {"code": "not_found", "message": "no vm matches 'nope'", "hint": "formation vm list"}
    }
    assert (result.status, result.out) == (5, "")


def test_debug_adds_the_traceback(run: _Run, node: FakeNode) -> None:
    """--debug shows the traceback before the error."""
    result = run("vm", "show", "nope", "--debug")
    assert "Traceback" in result.err
    assert result.err.rstrip().endswith("Hint: formation vm list")
