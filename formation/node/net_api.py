"""The API's routes about this node's place in the network: can others reach it, and how."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from formation.core.ids import NodeId
from formation.node.reads import Reads
from formation.node.state_api import Answer, Ask, StateRoute
from formation.p2p.service import Reach, Reachability

# What a person can do about addresses that nobody reached.
FORWARD_HINT = "forward TCP port {port} to this machine in the router, or open it in its firewall"


class NetApi:
    """Handlers of one node."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def routes(self) -> tuple[StateRoute, ...]:
        """All of them."""
        return (
            StateRoute("GET", "/v1/net", self.get_net),
            StateRoute("POST", "/v1/net/check", self.post_check),
        )

    async def get_net(self, _: Ask) -> Answer:
        """As found last."""
        return shown_reachability(self._reads, self._reads.p2p.reachability())

    async def post_check(self, _: Ask) -> Answer:
        """Ask the peers now; a few seconds, 15 at most."""
        return shown_reachability(self._reads, await self._reads.p2p.check_reachability())


def shown_reachability(reads: Reads, found: Reachability) -> dict[str, Any]:
    """Reachability as the API shows it."""
    return {
        "verdict": found.verdict.value,
        "is_reached": found.verdict is Reach.PUBLIC or bool(found.relays),
        "listen": list(reads.settings.listen),
        "families": [
            {
                "family": f"IPv{family.family}",
                "verdict": family.reach.value,
                "nat": family.nat.value,
                "is_punchable": family.is_punchable,
                "asked_count": family.asked_count,
                "seen_as": list(family.seen_as),
                "addresses": [
                    {
                        "address": each.address,
                        "is_reachable": each.is_reachable,
                        "ok_count": each.ok_count,
                        "failed_count": each.failed_count,
                        "why": each.why,
                    }
                    for each in family.addresses
                ],
            }
            for family in found.families
        ],
        "relays": [
            {
                "node_id": relay.node_id,
                "name": reads.node_name(relay.node_id),
                "addresses": list(relay.addresses),
                "expires_in_s": round(relay.expires_in_s),
            }
            for relay in found.relays
        ],
        "relay_refusals": _with_reasons(reads, found.refusals),
        "relayed_peers": _with_reasons(reads, found.relayed),
        "silent_peers": _with_reasons(reads, found.silent),
        "serves_as_relay": found.serves_as_relay,
        "answers_in_kademlia": reads.p2p.is_kad_server,
        "checked_ago_s": None if found.checked_ago_s is None else round(found.checked_ago_s, 1),
        "advice": advice(found, reads.settings.listen),
    }


def _with_reasons(reads: Reads, peers: Iterable[tuple[NodeId, str]]) -> list[dict[str, str]]:
    return [{"node_id": node_id, "name": reads.node_name(node_id), "why": why} for node_id, why in peers]


def advice(found: Reachability, listen: tuple[str, ...]) -> str:
    """What to do to be reached; "" if nothing needs to be done."""
    if found.verdict is Reach.PUBLIC:
        return ""
    if found.verdict is Reach.UNKNOWN:
        if found.silent:
            return "the peers that were asked did not dial back: try again in a minute"
        return "nobody to ask: connect to a peer first (formation peer list)"
    ports = sorted({address.split("/")[4] for address in listen if address.count("/") >= 4})
    hint = FORWARD_HINT.format(port=" and ".join(ports))
    if found.relays:
        return f"fine as it is, through relays; to be reached directly, {hint}"
    return f"{hint}; or add a public peer that serves as a relay (node.relay)"
