"""Places for connections: who gives way to whom."""

from __future__ import annotations

import pytest

from formation.p2p.admission import Places, group_of


def test_while_there_is_room_everybody_gets_in() -> None:
    """Whatever group they are of."""
    places: Places[int] = Places(3, gives_way_oldest=False)
    assert [places.take(key, "a") for key in range(3)] == [(True, None)] * 3
    assert len(places) == 3


def test_a_newcomer_of_the_largest_group_is_refused() -> None:
    """Connections that last are worth more than those that come."""
    places: Places[int] = Places(3, gives_way_oldest=False)
    for key in range(3):
        places.take(key, "a")
    assert places.take(9, "a") == (False, None)
    assert (places.refused_count, len(places)) == (1, 3)


def test_a_newcomer_of_a_smaller_group_displaces_the_newest_of_the_largest() -> None:
    """Until the groups are equal; then it is refused."""
    places: Places[int] = Places(4, gives_way_oldest=False)
    for key in range(4):
        places.take(key, "a")
    assert places.take(10, "b") == (True, 3)
    assert places.take(11, "b") == (True, 2)
    assert places.take(12, "b") == (False, None)
    assert (places.displaced_count, len(places)) == (2, 4)


def test_among_handshakes_the_oldest_of_the_largest_group_gives_way() -> None:
    """Also to one of its own group: an honest one takes milliseconds."""
    places: Places[int] = Places(3, gives_way_oldest=True)
    places.take(0, "b")
    places.take(1, "a")
    places.take(2, "a")
    assert places.take(3, "a") == (True, 1)
    assert places.take(4, "c") == (True, 2)
    assert len(places) == 3


def test_a_reserved_one_always_gets_in_and_never_gives_way() -> None:
    """Even when all who are there are reserved."""
    places: Places[int] = Places(2, gives_way_oldest=False)
    places.take(0, "a")
    assert places.take(1, "a", is_reserved=True) == (True, None)
    assert places.take(2, "a", is_reserved=True) == (True, 0)
    assert places.take(3, "a", is_reserved=True) == (True, None)
    assert places.take(4, "z") == (False, None)
    assert places.refused_count == 1


def test_a_place_that_was_given_back_is_free() -> None:
    """And giving it back again does no harm."""
    places: Places[int] = Places(1, gives_way_oldest=False)
    places.take(0, "a")
    places.release(0)
    places.release(0)
    assert places.take(1, "a") == (True, None)
    places.release(1)
    places.take(2, "a", is_reserved=True)
    places.release(2)
    assert len(places) == 0


def test_an_attacker_from_one_network_displaces_itself_only() -> None:
    """However many it opens, and whoever comes later still gets in."""
    places: Places[int] = Places(10, gives_way_oldest=False)
    honest = [places.take(key, f"h{key}") for key in range(4)]
    for key in range(100, 400):
        places.take(key, "evil")
    assert all(admitted for admitted, _ in honest)
    admitted, displaced = places.take(50, "late")
    assert admitted
    assert displaced is not None
    assert displaced >= 100


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("nonsense", ""),
        (None, ""),
    ],
)
def test_group_is_the_network(host: str | None, group: str) -> None:
    """IPv4 by address, IPv6 by /64."""
    assert group_of(host) == group
