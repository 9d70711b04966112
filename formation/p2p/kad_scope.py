"""Which addresses a peer may tell us of: no others than where it can be itself, or we. Pure.

Whoever answers questions can name any address as somebody's, and we would dial there. So that strangers do not send us to
services of our own machine, or round networks that they cannot see:

| address | is taken from |
|---|---|
| public, or a name | anybody |
| of a private network | who is in one, too, or on this machine |
| link-local | who is there, too, or on this machine |
| loopback | who is on this machine |
| the in-memory twin's | its peers |

A private address in a network that we have one in ourselves (`peer_book.prefix_of`) is taken from anybody: two nodes of one
home find each other through a peer that both reach from there. Private are RFC 1918, 4193, 6598 and the like. go-libp2p has
two tables for that, one of public addresses and one of a LAN's.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache

from formation.p2p.multiaddrs import ip_of
from formation.p2p.peer_book import is_dialable, prefix_of

_CACHED_ADDRESS_COUNT = 8192


class Scope(IntEnum):
    """From how far an address can be reached."""

    MACHINE = 0
    LINK = 1
    PRIVATE = 2
    PUBLIC = 3


@lru_cache(maxsize=_CACHED_ADDRESS_COUNT)
def scope_of(address: str) -> Scope:
    """The scope of a multiaddr of ours (a connection's end may have any port); what tells nothing counts as public."""
    _, kind, host, *_ = (*address.split("/"), "", "", "")
    if kind == "memory":
        return Scope.MACHINE
    try:
        ip = ip_of(host)
    except ValueError:
        return Scope.PUBLIC
    if ip.is_loopback:
        return Scope.MACHINE
    if ip.is_link_local:
        return Scope.LINK
    return Scope.PUBLIC if ip.is_global else Scope.PRIVATE


def may_be_told(address: str, *, seen_at: str, own: Iterable[str]) -> bool:
    """Whether to believe a peer that somebody is at a dialable address.

    Args:
      seen_at: the other end of the teller's connection; "" if that tells nothing: then it is anywhere.
      own: where we can be dialled ourselves.
    """
    if address.startswith("/memory/") and not seen_at.startswith("/memory/"):
        return False
    scope = scope_of(address)
    # A private network is told of by whoever is in one: which of them sees which nobody knows here.
    if scope >= scope_of(seen_at):
        return True
    return scope is Scope.PRIVATE and prefix_of(address) in {prefix_of(each) for each in own if is_dialable(each)}
