"""Who gets a place when there are more connections than places. Pure.

Two tables of places use the same rule: connections that have not yet shown who they are (handshakes), and those that have.
While there is room everybody gets in. When there is none, whoever holds the most gives way: places are counted by
*group*, the network that an address belongs to, because addresses of one network are cheap and networks are not. So an
attacker from a few networks takes places from itself only, as many keys and connections as it may make (compare the
"network groups" of Bitcoin Core's eviction, after Heilman 2015, "Eclipse Attacks on Bitcoin's Peer-to-Peer Network").

Among handshakes the oldest of the largest group goes: an honest one takes milliseconds, one that dribbles stays. Among
connections the newest goes, which may be the newcomer itself: those that have lasted are worth more than those that come.
Reserved ones (peers that we know) are neither counted nor displaced.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from typing import Generic, TypeVar

# An IPv6 host commonly has a whole /64 to itself.
IPV6_PREFIX_BITS = 64
_MAPPED_PREFIX = "::ffff:"

K = TypeVar("K", bound=Hashable)


class Places(Generic[K]):
    """A bounded set of things that came from somewhere.

    Args:
      count_max: places.
      gives_way_oldest: whether the oldest of the largest group is displaced; else the newest.
    """

    __slots__ = ("_count_max", "_gives_way_oldest", "_groups", "_of", "_reserved", "displaced_count", "refused_count")

    def __init__(self, count_max: int, *, gives_way_oldest: bool) -> None:
        self._count_max = count_max
        self._gives_way_oldest = gives_way_oldest
        self._groups: dict[str, dict[K, None]] = {}
        self._of: dict[K, str] = {}
        self._reserved: set[K] = set()
        self.displaced_count = 0
        """Those that had a place and lost it to another."""
        self.refused_count = 0

    def __len__(self) -> int:
        return len(self._of) + len(self._reserved)

    def take(self, key: K, group: str, *, is_reserved: bool = False) -> tuple[bool, K | None]:
        """Ask for a place; whether it got one, and who lost theirs for it (the caller has to end that)."""
        assert key not in self._of
        assert key not in self._reserved
        displaced: K | None = None
        if len(self._of) + len(self._reserved) >= self._count_max:
            largest = self._largest(group)
            if not self._gives_way_oldest and not is_reserved and largest == group:
                self.refused_count += 1
                return False, None
            members = self._groups.get(largest)
            if not members:
                # Only reserved ones are here.
                if not is_reserved:
                    self.refused_count += 1
                    return False, None
            else:
                displaced = next(iter(members)) if self._gives_way_oldest else next(reversed(members))
                self.release(displaced)
                self.displaced_count += 1
        if is_reserved:
            self._reserved.add(key)
        else:
            self._groups.setdefault(group, {})[key] = None
            self._of[key] = group
        return True, displaced

    def release(self, key: K) -> None:
        """It has gone; again is harmless."""
        self._reserved.discard(key)
        if (group := self._of.pop(key, None)) is None:
            return
        members = self._groups[group]
        del members[key]
        if not members:
            del self._groups[group]

    def _largest(self, newcomer: str) -> str:
        """The group that would hold the most; of equals the newcomer's."""
        largest, size = newcomer, len(self._groups.get(newcomer, ())) + 1
        for group, members in self._groups.items():
            if len(members) > size:
                largest, size = group, len(members)
        return largest


def group_of(host: str | None) -> str:
    """The network that an IP address belongs to, for counting: the address itself, or the /64 of an IPv6 one."""
    if host is None:
        return ""
    text = host.partition("%")[0].removeprefix(_MAPPED_PREFIX)
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, IPV6_PREFIX_BITS), strict=False))
