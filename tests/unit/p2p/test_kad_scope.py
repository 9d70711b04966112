from __future__ import annotations

import pytest

from formation.p2p.kad_scope import Scope, may_be_told, scope_of

PUBLIC, LAN, LINK, HERE = "/ip4/9.9.9.9/tcp/1", "/ip4/192.168.7.3/tcp/1", "/ip4/169.254.1.1/tcp/1", "/ip4/127.0.0.1/tcp/1"


@pytest.mark.parametrize(
    ("address", "scope"),
    [
        (PUBLIC, Scope.PUBLIC),
        (LAN, Scope.PRIVATE),
        (LINK, Scope.LINK),
        (HERE, Scope.MACHINE),
        ("/ip6/::1/tcp/1", Scope.MACHINE),
        ("/ip6/::ffff:127.0.0.1/tcp/1", Scope.MACHINE),
        ("/ip6/::ffff:9.9.9.9/tcp/1", Scope.PUBLIC),
        ("/ip6/fe80::1/tcp/1", Scope.LINK),
        ("/ip6/fd00::1/tcp/1", Scope.PRIVATE),
        ("/ip4/100.64.0.1/tcp/1", Scope.PRIVATE),
        ("/dns4/a.example/tcp/1", Scope.PUBLIC),
        ("/memory/a", Scope.MACHINE),
        ("", Scope.PUBLIC),
        ("/ip4", Scope.PUBLIC),
    ],
)
def test_scopes(address: str, scope: Scope) -> None:
    """Of each kind of address; an IPv4 address in IPv6's clothes is what it is."""
    assert scope_of(address) is scope


@pytest.mark.parametrize(
    ("seen_at", "believed"),
    [
        (PUBLIC, {PUBLIC}),
        ("", {PUBLIC}),
        (LAN, {PUBLIC, LAN}),
        (LINK, {PUBLIC, LAN, LINK}),
        (HERE, {PUBLIC, LAN, LINK, HERE}),
        ("/memory/a", {PUBLIC, LAN, LINK, HERE, "/memory/b"}),
    ],
)
def test_nobody_tells_of_where_it_cannot_be(seen_at: str, believed: set[str]) -> None:
    """A stranger sends us neither to ourselves nor round our LAN."""
    addresses = (PUBLIC, LAN, LINK, HERE, "/memory/b")
    assert {address for address in addresses if may_be_told(address, seen_at=seen_at, own=())} == believed


def test_two_of_one_home_hear_of_each_other_from_outside() -> None:
    """A private address in a network of ours is taken; another, and loopback, are not."""
    own = ("/ip4/192.168.7.9/tcp/1", HERE, LINK, "/ip4/0.0.0.0/tcp/1")
    assert may_be_told(LAN, seen_at=PUBLIC, own=own)
    assert not may_be_told("/ip4/192.168.8.3/tcp/1", seen_at=PUBLIC, own=own)
    assert not may_be_told("/ip4/127.0.0.5/tcp/1", seen_at=PUBLIC, own=own)
    assert not may_be_told(LINK, seen_at=PUBLIC, own=own)
