"""Transcripts in tests/scripts: commands and what they print, against the fake node.

`@` lines set the fake up, `$` lines are commands; below each stand stdout as it is, stderr behind `! `, and the exit
status in brackets unless it is 0. FORMATION_REWRITE_SCRIPTS=1 writes the files anew; review the difference.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Protocol

import pytest

from tests.unit.cli.fake_node import FakeNode, claim_record
from tests.unit.cli.state_answers import answers

_SCRIPTS = sorted((Path(__file__).parents[2] / "scripts").glob("*.txt"))
# What differs from run to run: ids, random names, times, places.
_CHANGING = (
    (re.compile(r"vm-(?!([a-z])\1{15})[a-z2-7]{16}"), "vm-<id>"),
    (re.compile(r"\bhello-[a-z]{4}\b"), "hello-<rand>"),
    (re.compile(r" +\b\d+(\.\d+)?m?s(?=  |$)", re.MULTILINE), " <time>"),
    (re.compile(r"\bid [0-9a-f]{16}…"), "id <network>"),
    (re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}(?=  )"), "<node id>"),
)


class _Result(Protocol):
    status: int
    out: str
    err: str


class _Run(Protocol):
    def __call__(self, *arguments: str) -> _Result: ...


@pytest.mark.parametrize("path", _SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path, run: _Run, node: FakeNode, home: Path) -> None:
    """Each command of the transcript prints what stands below it."""
    expected = path.read_text(encoding="utf-8")
    actual = []
    for line in expected.splitlines():
        if line.startswith("$ formation "):
            actual += [line, *_played(run, shlex.split(line)[2:], home, node)]
        elif line.startswith("@ "):
            _set_up(node, line.split()[1:])
            actual.append(line)
        elif line.startswith("# "):
            actual += ["", line] if actual else [line]
    text = "\n".join(actual) + "\n"
    if os.environ.get("FORMATION_REWRITE_SCRIPTS"):
        path.write_text(text, encoding="utf-8")
    assert text == expected


def _played(run: _Run, arguments: list[str], home: Path, node: FakeNode) -> list[str]:
    result = run(*arguments)
    lines = [*result.out.splitlines(), *[f"! {line}".rstrip() for line in result.err.splitlines()]]
    if result.status:
        lines.append(f"[{result.status}]")
    text = "\n".join(lines).replace(str(home), "~").replace(str(node.socket_path), "SOCKET")
    for pattern, replacement in _CHANGING:
        text = pattern.sub(replacement, text)
    return text.split("\n") if text else []


def _set_up(node: FakeNode, words: list[str]) -> None:
    match words:
        case ["vm", name, phase, letter, *reason]:
            node.add_vm(name, phase=phase, letter=letter, reason=" ".join(reason))
        case ["outcome", outcome]:
            node.outcome = outcome
        case ["stop"]:
            node.stop()
        case ["cut", seconds]:
            node.partitioned_s = float(seconds)
        case ["state"]:
            node.answers |= answers()
        case ["claim", space, key, owner, left_ms]:
            node.accounts.claims.append(claim_record(space, key, owner, left_ms=int(left_ms)))
        case ["formfile", folder]:
            Path(folder).mkdir()
            (Path(folder) / "Formfile").write_text("FROM busybox\n")
        case _:
            raise AssertionError(f"unknown set-up: {words}")
