"""Whatever bytes a stranger sends, a decoder gives a value or raises DecodeError, and a replica answers with effects.

Small and derandomised here; `nox -s fuzz` goes on for as long as one likes (see coverage_guided.py).
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formation.core.errors import DecodeError
from tests.fuzz import decoders
from tests.fuzz.decoders import CORPUS, DECODERS, SEEDS, judge_plain, refuses, seeds_of
from tests.fuzz.mutations import any_value, edit_value, every_edit, mutate
from tests.fuzz.replicas import honest_frames, play, serve
from tests.wire.state_values import NODE_OP

SMALL = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
RANDOMS = st.randoms(use_true_random=True, note_method_calls=False)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_raises_its_one_error(name: str) -> None:
    """Bytes of any kind, and values that are nearly right: DecodeError or nothing."""

    @SMALL
    @given(RANDOMS, st.binary(max_size=64))
    def check(rng: Random, data: bytes) -> None:
        refuses(name, data)
        data = rng.choice(seeds_of(name))
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = mutate(rng, data, CORPUS)
            refuses(name, data)

    check()


@pytest.mark.parametrize("name", DECODERS)
def test_no_odd_value_in_any_place_raises_another(name: str) -> None:
    """Not by chance but one by one: empty lists, numbers beyond their range, other types, in every place of every value."""
    for seed in seeds_of(name):
        for data in every_edit(seed):
            refuses(name, data)


TAKEN = [
    name for name in DECODERS if not name.startswith(("epoch_of", "bulk", "accepted", "attach", "verify_state", "verify_op"))
]


@pytest.mark.parametrize("name", TAKEN)
def test_a_decoder_takes_what_it_should(name: str) -> None:
    """The mutations begin with values that are right: else a decoder that refuses everything would pass."""
    assert not any(refuses(name, seed) for seed in seeds_of(name))


def test_this_fuzzing_finds_a_decoder_that_raises_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail."""

    def careless(data: bytes) -> None:
        if data.startswith(b"\xd2") and len(data) % 7 == 0:
            raise KeyError(len(data))
        raise DecodeError("no")

    monkeypatch.setattr(decoders, "DECODERS", {"parse_ack": (careless, ("ack signed",))})

    def fuzz() -> None:
        for seed in range(200):
            refuses("parse_ack", mutate(Random(seed), SEEDS["ack signed"], CORPUS))

    with pytest.raises(KeyError):
        fuzz()


@SMALL
@given(RANDOMS)
def test_every_operation_gets_a_verdict(rng: Random) -> None:
    """A block with any plain value for an operation is judged, in every kind of block."""
    for kind in ("vm", "node", "image", "value", "claim", "account", "committee"):
        plain = any_value(rng) if rng.random() < 0.3 else edit_value(rng, NODE_OP)
        try:
            judge_plain(plain, kind)
        except DecodeError:
            continue


@settings(SMALL, max_examples=60)
@given(RANDOMS)
def test_a_replica_among_liars_never_raises(rng: Random) -> None:
    """Honest frames in any order, edited ones, and the lies of one voter: the replica answers, serves and asks."""
    serve(rng, play(rng))


def test_the_liars_have_everything_to_lie_with() -> None:
    """Every kind of frame is among those that are edited."""
    assert {frame[0] for frame in honest_frames(with_handover=True)} == set(range(1, 11))
