"""The multiplexer's machine: two sessions joined by a pipe that cuts as it likes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.errors import DecodeError
from formation.p2p import yamux
from formation.p2p.yamux import (
    CHANNEL_COUNT_MAX,
    FLAG_ACK,
    FLAG_FIN,
    FLAG_RST,
    FLAG_SYN,
    HEADER,
    TYPE_DATA,
    TYPE_GO_AWAY,
    TYPE_PING,
    TYPE_WINDOW,
    WINDOW_EXCESS_MAX_BYTES,
    WINDOW_FIRST_BYTES,
    WINDOW_SIZE_MAX_BYTES,
    Channel,
    Session,
)


class End:
    """One end, and what it has sent."""

    def __init__(self, *, is_initiator: bool) -> None:
        self.sent = bytearray()
        self.accepted: list[Channel] = []
        self.session = Session(is_initiator=is_initiator, send=self.sent.extend, on_accept=self.accepted.append)

    def take_sent(self) -> bytes:
        data = bytes(self.sent)
        self.sent.clear()
        return data


def pair() -> tuple[End, End]:
    return End(is_initiator=True), End(is_initiator=False)


def carry(*ends: End, rng: random.Random | None = None) -> None:
    """Bring all bytes across, both ways, in pieces."""
    a, b = ends
    while a.sent or b.sent:
        for one, other in ((a, b), (b, a)):
            data = one.take_sent()
            while data:
                size = rng.randint(1, 40) if rng is not None else len(data)
                other.session.receive(data[:size])
                data = data[size:]


def frames(data: bytes) -> list[tuple[int, int, int, int]]:
    """(type, flags, stream, value) of frames without payload."""
    assert len(data) % HEADER.size == 0
    return [HEADER.unpack_from(data, at)[1:] for at in range(0, len(data), HEADER.size)]


def test_golden_bytes_of_a_short_stream() -> None:
    """As the specification's examples: SYN, data, FIN of the first stream of the side that dialled."""
    a, b = pair()
    channel = a.session.open()
    assert a.session.write(channel, memoryview(b"hi")) == 2
    a.session.finish(channel)
    assert a.take_sent() == (
        bytes.fromhex("00 01 0001 00000001 00000000")
        + bytes.fromhex("00 00 0000 00000001 00000002")
        + b"hi"
        + bytes.fromhex("00 01 0004 00000001 00000000")
    )
    b.session.open()
    assert b.take_sent() == bytes.fromhex("00 01 0001 00000002 00000000")
    a.session.ping(0x1_0000_0007)
    a.session.go_away()
    assert a.take_sent() == bytes.fromhex("00 02 0001 00000000 00000007") + bytes.fromhex("00 03 0000 00000000 00000000")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=12))
def test_bytes_arrive_whole_and_in_order_however_they_are_cut(seed: int, pieces: list[bytes]) -> None:
    """Of several streams at once, in both directions."""
    a, b = pair()
    rng = random.Random(seed)
    mine = [a.session.open() for _ in range(3)]
    carry(a, b, rng=rng)
    theirs = b.accepted
    wanted: dict[int, bytearray] = {channel.number: bytearray() for channel in mine}
    back: dict[int, bytearray] = {channel.number: bytearray() for channel in mine}
    for piece in pieces:
        at = rng.randrange(3)
        assert a.session.write(mine[at], memoryview(piece)) == len(piece)
        assert b.session.write(theirs[at], memoryview(piece[::-1])) == len(piece)
        wanted[mine[at].number] += piece
        back[mine[at].number] += piece[::-1]
    for channel in mine:
        a.session.finish(channel)
    carry(a, b, rng=rng)
    assert {c.number: c.incoming for c in theirs} == wanted
    assert all(c.is_eof for c in theirs)
    assert {c.number: c.incoming for c in mine} == back
    for channel in theirs:
        b.session.finish(channel)
    carry(a, b, rng=rng)
    assert not {**a.session.channels, **b.session.channels}, "what is over at both ends is forgotten"
    assert a.session.read(mine[0], 1 << 20) == back[mine[0].number], "and can still be read"
    assert not a.sent


def test_the_window_stops_the_writer_and_reading_opens_it() -> None:
    """No byte beyond it; it grows while the reader keeps up, to its maximum."""
    a, b = pair()
    channel = a.session.open()
    data = memoryview(bytes(WINDOW_SIZE_MAX_BYTES))
    total = 0
    while size := a.session.write(channel, data):
        total += size
    assert total == WINDOW_FIRST_BYTES
    woken: list[int] = []
    channel.wake = lambda: woken.append(channel.send_window)
    carry(a, b)
    (theirs,) = b.accepted
    assert len(theirs.incoming) == WINDOW_FIRST_BYTES
    assert b.session.read(theirs, 100) == bytes(100)
    assert not b.sent, "an update for each read would cost a frame each"
    for _ in range(40):
        b.session.read(theirs, 1 << 20)
        carry(a, b)
        while a.session.write(channel, data):
            pass
        carry(a, b)
        assert len(theirs.incoming) <= WINDOW_SIZE_MAX_BYTES
    assert max(woken) == WINDOW_SIZE_MAX_BYTES
    assert theirs.window_target == WINDOW_SIZE_MAX_BYTES


def test_a_peer_that_ignores_the_window_is_refused() -> None:
    """A frame too many is forgiven, as it may cross a window update; no more."""
    _, b = pair()
    b.session.receive(HEADER.pack(0, TYPE_WINDOW, FLAG_SYN, 1, 0))
    size = WINDOW_FIRST_BYTES + WINDOW_EXCESS_MAX_BYTES
    b.session.receive(HEADER.pack(0, TYPE_DATA, 0, 1, size) + bytes(size))
    with pytest.raises(DecodeError, match="beyond the window"):
        b.session.receive(HEADER.pack(0, TYPE_DATA, 0, 1, 1))


def test_a_frame_whose_rest_never_comes_holds_nothing_of_its_own() -> None:
    """What is here can be read before the rest is."""
    _, b = pair()
    b.session.receive(HEADER.pack(0, TYPE_DATA, FLAG_SYN | FLAG_FIN, 1, 1000) + b"abc")
    (channel,) = b.accepted
    assert b.session.read(channel, 10) == b"abc"
    assert not channel.is_eof
    b.session.receive(bytes(997))
    assert channel.is_eof


def test_a_reset_ends_both_sides_at_once() -> None:
    """Unread bytes go; late frames of the peer are passed by."""
    a, b = pair()
    channel = a.session.open()
    a.session.write(channel, memoryview(b"unread"))
    carry(a, b)
    (theirs,) = b.accepted
    b.session.write(theirs, memoryview(b"crosses the reset"))
    woken: list[bool] = []
    theirs.wake = lambda: woken.append(theirs.is_reset)
    a.session.reset(channel)
    carry(a, b)
    assert woken == [True]
    assert not theirs.incoming + channel.incoming
    assert not {**a.session.channels, **b.session.channels}
    a.session.reset(channel)
    b.session.finish(theirs)
    assert not a.sent + b.sent, "there is nothing left to say"


def test_the_end_of_the_connection_ends_its_streams() -> None:
    """Whoever waits for one is woken."""
    a, _ = pair()
    woken: list[int] = []
    for _ in range(3):
        channel = a.session.open()
        channel.wake = lambda number=channel.number: woken.append(number)  # type: ignore[misc]
    a.session.end()
    assert woken == [1, 3, 5]


def test_pings_are_answered_and_answers_are_not() -> None:
    """Each frame counts as a sign of life."""
    a, b = pair()
    a.session.ping(7)
    b.session.receive(a.take_sent())
    assert frames(bytes(b.sent)) == [(TYPE_PING, FLAG_ACK, 0, 7)]
    a.session.receive(b.take_sent())
    assert not a.sent
    assert (a.session.frame_count, b.session.frame_count) == (1, 1)
    b.session.receive(HEADER.pack(0, TYPE_GO_AWAY, 0, 0, 0))
    assert b.session.is_over


def test_streams_have_a_limit_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are refused with an error, the peer's with a reset."""
    monkeypatch.setattr(yamux, "CHANNEL_COUNT_MAX", 3)
    a, b = pair()
    for _ in range(3):
        a.session.open()
    with pytest.raises(OverflowError, match="3 streams"):
        a.session.open()
    b.session.receive(a.take_sent())
    b.take_sent()
    b.session.receive(HEADER.pack(0, TYPE_WINDOW, FLAG_SYN, 7, 0))
    assert frames(bytes(b.sent)) == [(TYPE_WINDOW, FLAG_RST, 7, 0)]
    assert len(b.accepted) == 3
    assert CHANNEL_COUNT_MAX > 3


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 50))
def test_hostile_bytes_are_refused_or_bounded(data: bytes, size: int) -> None:
    """No other error than DecodeError, whatever comes."""
    end = End(is_initiator=True)
    try:
        for at in range(0, len(data), size):
            end.session.receive(data[at : at + size])
    except DecodeError:
        return
    assert sum(len(channel.incoming) for channel in end.session.channels.values()) <= len(data)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            HEADER.pack,
            st.just(0),
            st.integers(0, 3),
            st.sampled_from((0, FLAG_SYN, FLAG_FIN, FLAG_RST, FLAG_SYN | FLAG_FIN, FLAG_SYN | FLAG_RST, 15)),
            st.integers(0, 6),
            st.integers(0, 20),
        ),
        max_size=30,
    )
)
def test_hostile_frames_are_refused_or_bounded(parts: list[bytes]) -> None:
    """Well-formed headers in any order, with payload where none was announced and none where it was."""
    end = End(is_initiator=True)
    own = end.session.open()
    try:
        for part in parts:
            end.session.receive(part)
    except DecodeError:
        return
    assert len(own.incoming) <= sum(map(len, parts))
    assert all(channel.receive_window >= -WINDOW_EXCESS_MAX_BYTES for channel in end.session.channels.values())


def syn(number: int) -> bytes:
    return HEADER.pack(0, TYPE_WINDOW, FLAG_SYN, number, 0)


@pytest.mark.parametrize(
    ("frame", "limit"),
    [
        (HEADER.pack(0, TYPE_PING, FLAG_SYN, 0, 7), yamux.ROUND_PING_COUNT_MAX),
        (HEADER.pack(0, TYPE_PING, FLAG_ACK, 0, 7), yamux.ROUND_PING_COUNT_MAX),
        (HEADER.pack(0, TYPE_WINDOW, 0, 1, 0), yamux.ROUND_EMPTY_COUNT_MAX),
        (HEADER.pack(0, TYPE_DATA, 0, 1, 0), yamux.ROUND_EMPTY_COUNT_MAX),
    ],
    ids=["ping", "answer", "window", "empty data"],
)
def test_frames_that_say_nothing_are_limited_in_a_round(frame: bytes, limit: int) -> None:
    """A flood of them ends the connection; spread over time they do not."""
    _, b = pair()
    for _ in range(2):
        b.session.receive(frame * limit)
        b.session.begin_round()
    b.session.receive(frame * limit)
    with pytest.raises(DecodeError):
        b.session.receive(frame)


def test_streams_opened_and_reset_at_once_are_limited_in_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """What brought down HTTP/2 servers: each costs its opener nothing, and is never one too many."""
    monkeypatch.setattr(yamux, "ROUND_STREAM_COUNT_MAX", 10)
    _, b = pair()

    def open_and_reset(number: int) -> None:
        b.session.receive(syn(number) + HEADER.pack(0, TYPE_WINDOW, FLAG_RST, number, 0))
        b.session.note_accepted()

    for number in range(1, 21, 2):
        open_and_reset(number)
    assert not b.session.channels
    with pytest.raises(DecodeError, match="opened"):
        open_and_reset(21)


def test_streams_that_nobody_has_looked_at_are_limited() -> None:
    """They are refused until the others have been taken, also when they were reset meanwhile."""
    _, b = pair()
    numbers = range(1, 2 * yamux.UNACCEPTED_COUNT_MAX, 2)
    for number in numbers:
        b.session.receive(syn(number) + HEADER.pack(0, TYPE_WINDOW, FLAG_RST, number, 0))
    b.take_sent()
    b.session.receive(syn(9001))
    assert b.take_sent() == HEADER.pack(0, TYPE_WINDOW, FLAG_RST, 9001, 0)
    assert (b.session.stream_refused_count, len(b.accepted)) == (1, yamux.UNACCEPTED_COUNT_MAX)
    b.session.note_accepted()
    b.session.receive(syn(9003))
    assert b.accepted[-1].number == 9003


def test_who_opens_streams_beyond_the_limits_again_and_again_is_hung_up_on() -> None:
    """It is told so each time until then."""
    _, b = pair()
    first = 2 * yamux.UNACCEPTED_COUNT_MAX + 1
    b.session.receive(b"".join(syn(number) for number in range(1, first, 2)))
    b.session.receive(b"".join(syn(first + 2 * index) for index in range(yamux.ROUND_REFUSED_COUNT_MAX)))
    with pytest.raises(DecodeError, match="beyond the limits"):
        b.session.receive(syn(99_999))


def test_what_is_not_read_is_counted() -> None:
    """However it goes: read, reset, or with the connection."""
    a, b = pair()
    channels = [a.session.open() for _ in range(3)]
    for channel in channels:
        a.session.write(channel, memoryview(bytes(1000)))
    carry(a, b)
    assert b.session.unread_size == 3000
    b.session.read(b.accepted[0], 400)
    assert b.session.unread_size == 2600
    b.session.read(b.accepted[0], 4000)
    b.session.reset(b.accepted[1])
    assert b.session.unread_size == 1000
    b.session.end()
    assert b.session.unread_size == 0


def test_the_rest_of_a_frame_of_a_stream_that_was_reset_is_not_kept() -> None:
    """The peer may not know yet."""
    _, b = pair()
    b.session.receive(HEADER.pack(0, TYPE_DATA, FLAG_SYN, 1, 100) + bytes(50))
    b.session.reset(b.accepted[0])
    b.session.receive(bytes(50) + HEADER.pack(0, TYPE_DATA, FLAG_SYN, 3, 2) + b"ok")
    assert b.session.unread_size == 2
    assert b.accepted[1].incoming == b"ok"
