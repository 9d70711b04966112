"""Coverage-guided fuzzing with atheris (libFuzzer); run by `nox -s fuzz`, which says for how long.

    python -m tests.fuzz.coverage_guided decoders -max_total_time=60
    python -m tests.fuzz.coverage_guided replica  -max_total_time=60

`decoders`: the first byte picks one of `decoders.DECODERS`, the rest is what it is given. `replica`: the bytes are the
choices of `replicas.play`. Anything raised but DecodeError ends the run with the input, which goes into a test. Arguments
after the target are libFuzzer's; what it finds of interest is kept in the directory given, if one is.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import atheris

with atheris.instrument_imports(include=["formation"], enable_loader_override=False):
    from tests.fuzz.decoders import DECODERS, refuses, seeds_of
    from tests.fuzz.replicas import honest_frames, play

NAMES = tuple(DECODERS)


class Choices(Random):
    """A random number generator that says what the fuzzer's bytes say, and zero when they are used up."""

    def __new__(cls, _: bytes) -> Any:
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        taken = self._data[self._at : self._at + size].ljust(size, b"\0")
        self._at += size
        return int.from_bytes(taken, "big") >> (8 * size - k)

    def random(self) -> float:
        return self.getrandbits(16) / 65536

    def randbytes(self, n: int) -> bytes:
        return self.getrandbits(8 * n).to_bytes(n, "big") if n else b""


def fuzz_decoders(data: bytes) -> None:
    if data:
        refuses(NAMES[data[0] % len(NAMES)], data[1:])


def fuzz_replica(data: bytes) -> None:
    play(Choices(data), event_count=20)


TARGETS = {"decoders": fuzz_decoders, "replica": fuzz_replica}


def _write_seeds(folder: Path) -> None:
    for number, name in enumerate(NAMES):
        for index, seed in enumerate(seeds_of(name)):
            (folder / f"{number}-{index}").write_bytes(bytes((number,)) + seed)


def main() -> None:
    target, *arguments = sys.argv[1:]
    for with_handover in (False, True):
        honest_frames(with_handover=with_handover)
    with tempfile.TemporaryDirectory() as folder:
        _write_seeds(Path(folder))
        atheris.Setup([sys.argv[0], *arguments, folder], TARGETS[target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
