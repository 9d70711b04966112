from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formation.core.errors import DecodeError
from formation.p2p.frames import FRAME_SIZE_MAX_BYTES, LENGTH_SIZE_BYTES, FrameDecoder, encode_frame


@given(payloads=st.lists(st.binary(max_size=50)), cuts=st.lists(st.integers(1, 60), min_size=1))
def test_any_cutting_of_the_stream_gives_the_same_frames(payloads: list[bytes], cuts: list[int]) -> None:
    """decode(encode(x)) == x, however the bytes arrive."""
    stream = b"".join(encode_frame(payload) for payload in payloads)
    decoder = FrameDecoder(size_max_bytes=50)
    frames: list[bytes] = []
    index = 0
    while stream:
        size = cuts[index % len(cuts)]
        frames += decoder.feed(stream[:size])
        stream = stream[size:]
        index += 1
    assert frames == payloads


@given(data=st.binary(max_size=200))
def test_garbage_gives_frames_or_a_decode_error(data: bytes) -> None:
    """No input makes the decoder fail otherwise, nor hold more than a frame."""
    decoder = FrameDecoder(size_max_bytes=20)
    try:
        frames = decoder.feed(data)
    except DecodeError:
        return
    assert all(len(frame) <= 20 for frame in frames)


def test_a_frame_too_long_is_refused_by_its_length_alone() -> None:
    """The payload of an oversized frame is not waited for."""
    decoder = FrameDecoder(size_max_bytes=10)
    with pytest.raises(DecodeError, match="11 bytes"):
        decoder.feed((11).to_bytes(LENGTH_SIZE_BYTES, "big"))


def test_a_frame_of_exactly_the_limit_passes() -> None:
    """The limit is inclusive."""
    payload = bytes(FRAME_SIZE_MAX_BYTES)
    assert FrameDecoder(size_max_bytes=FRAME_SIZE_MAX_BYTES).feed(encode_frame(payload)) == [payload]
