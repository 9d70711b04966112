"""Kademlia on libp2p 0.8.1, for two purposes: where is a peer that we lost, and who else is there?"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import Any

import structlog
import trio
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.records.validator import NamespacedValidator
from libp2p.tools.anyio_service import background_trio_service

from formation.core.ids import NodeId
from formation.p2p.libp2p_setup import parse_id
from formation.p2p.peer_book import is_dialable

FIND_TIMEOUT_S = 5.0
# Kademlia's k: what one peer tells.
FOUND_COUNT_MAX = 20
# Kademlia's alpha: three that do not all lie.
ASKED_COUNT = 3
# Identify needs a moment before a peer has addresses that the routing table accepts.
ROUTING_FEED_DELAYS_S = (0.5, 2.0, 5.0)

_logger = structlog.get_logger(__name__)


class Kad:
    """The routing table of one host; made for each host anew."""

    def __init__(self, host: Any) -> None:
        self._host = host
        # No namespace is registered, values and providers are off: no record of a stranger is stored here.
        self._dht = KadDHT(
            host,
            DHTMode.SERVER,
            validator=NamespacedValidator({}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
            enable_providers=False,
            enable_values=False,
        )
        self._is_running = False

    async def run(self) -> None:
        """Answer and refresh until cancelled."""
        try:
            async with background_trio_service(self._dht):
                self._is_running = True
                await trio.sleep_forever()
        except Exception as exc:
            _logger.error("kad failed: peers that move will not be found", exc_info=exc)
        finally:
            self._is_running = False

    async def add_peer(self, node_id: NodeId) -> None:
        """Put a connected peer into the routing table, which the library does not do by itself."""
        for delay_s in ROUTING_FEED_DELAYS_S:
            await trio.sleep(delay_s)
            if not self._is_running:
                return
            try:
                with trio.fail_after(FIND_TIMEOUT_S):
                    if await self._dht.add_peer(parse_id(node_id), skip_server_mode_check=True):
                        return
            except Exception as exc:  # noqa: BLE001 - only a table of hints
                _logger.debug("routing table refused a peer", error=repr(exc))

    async def find_addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Multiaddrs of a peer as others tell them; () if nobody does."""
        peer_id = parse_id(node_id)
        try:
            with trio.move_on_after(FIND_TIMEOUT_S):
                if self._is_running:
                    # Not `find_peer`: it answers from what is stored here, which is just what failed.
                    await self._dht.peer_routing.find_closest_peers_network(peer_id.to_bytes())
            known = self._host.get_peerstore().addrs(peer_id)
        except Exception as exc:  # noqa: BLE001 - the library raises for "unknown", too
            _logger.debug("address lookup failed", peer=node_id, error=repr(exc))
            return ()
        return dialable(node_id, known)

    async def find_peers(self) -> dict[NodeId, tuple[str, ...]]:
        """Who stands near a random point of the key space, as some connected peers tell.

        Not the library's own walk: that dials whoever it is told of, past our limits. Who is told of is dialled by
        `discovery`, and asked next time.
        """
        found: dict[NodeId, tuple[str, ...]] = {}
        key = os.urandom(32)
        connected = list(self._host.get_connected_peers())
        asked = random.sample(connected, min(ASKED_COUNT, len(connected)))

        async def ask(peer_id: Any) -> None:
            try:
                told = await self._dht.peer_routing._query_peer_for_closest(peer_id, key)
                for other in told[:FOUND_COUNT_MAX]:
                    node_id = NodeId(other.to_base58())
                    if other != self._host.get_id():
                        found[node_id] = dialable(node_id, self._host.get_peerstore().addrs(other))
            except Exception as exc:  # noqa: BLE001 - what a stranger answers raises all kinds
                _logger.debug("no peers told", error=repr(exc))

        if self._is_running:
            with trio.move_on_after(FIND_TIMEOUT_S):
                async with trio.open_nursery() as nursery:
                    for peer_id in asked:
                        nursery.start_soon(ask, peer_id)
        return found


def dialable(node_id: NodeId, addresses: Iterable[Any]) -> tuple[str, ...]:
    """Multiaddrs of the library's as ours, without those that nobody can dial."""
    texts = (str(address).removesuffix(f"/p2p/{node_id}") for address in addresses)
    return tuple(text for text in texts if is_dialable(text))
