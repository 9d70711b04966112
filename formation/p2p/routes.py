"""The port below reachability: single connections to peers, where `transport` knows only whether there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from formation.core.errors import UnavailableError
from formation.core.ids import NodeId
from formation.p2p.multiaddrs import Circuit
from formation.p2p.reach_messages import Limit
from formation.p2p.transport import ByteStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One connection to a peer."""

    node_id: NodeId
    is_relayed: bool
    is_outbound: bool
    """We made it."""
    host: str
    """The other end's IP address; "" if relayed."""
    port: int
    local_host: str
    """Our end's IP address; "" if relayed."""
    is_from_listener: bool
    """Our end's port is one that we listen on, so that where the peer sees it is where a NAT keeps it open."""


@contextmanager
def in_time(timeout_s: float) -> Iterator[None]:
    """What a stranger may let us wait for.

    Raises:
      UnavailableError: it did not come in time.
    """
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise UnavailableError(f"no answer within {timeout_s:.0f} s")


RouteCallback = Callable[[Route, bool], None]
"""(connection, it came or went); must not block."""


class Routes(Protocol):
    """What reachability needs of a library."""

    def listening(self) -> tuple[str, ...]:
        """Multiaddrs listened on, with real ports; () while it does not run."""
        ...

    def routes(self, node_id: NodeId | None = None) -> tuple[Route, ...]:
        """Connections to a peer, or all."""
        ...

    def on_route(self, callback: RouteCallback) -> None:
        """Tell of connections that come and go."""
        ...

    def dial_from_listener(self, is_wanted: bool) -> None:
        """Whether dials leave from the port listened on, so that peers see what a NAT makes of it; they do from the start."""
        ...

    async def sight(self, node_id: NodeId) -> tuple[Route, str]:
        """A direct connection, and where the peer sees our end of it (a multiaddr; "" if it does not say).

        Raises:
          UnavailableError: no direct connection, or no answer.
        """
        ...

    async def probe(self, node_id: NodeId, address: str) -> None:
        """Connect from a fresh port, see that it is this peer, and hang up.

        Raises:
          UnavailableError: its message is the reason: "refused", "no answer in time", "another node answers", …
        """
        ...

    async def punch(self, node_id: NodeId, address: str, *, is_initiator: bool) -> None:
        """Connect from the port listened on, while the peer does the same towards us.

        Args:
          is_initiator: whether we begin the handshake of the connection: just one side must.

        Raises:
          UnavailableError: nothing came of it.
        """
        ...

    async def enter_circuit(
        self, node_id: NodeId, stream: ByteStream, circuit: Circuit, *, limit: Limit, is_initiator: bool
    ) -> trio.Event:
        """Make a stream through a relay a connection to the peer at its other end, secured end to end.

        Args:
          limit: what the relay lets it carry: the log says so when it ends by that.

        Returns:
          What is set when the connection is over; the stream is closed by then.

        Raises:
          UnavailableError: another peer is at its end, or none.
        """
        ...

    def announce(self, addresses: tuple[str, ...]) -> None:
        """Tell peers of these addresses as well, in place of those told here before."""
        ...

    async def close_relayed(self, node_id: NodeId) -> None:
        """Close those connections to a peer that go through a relay."""
        ...
