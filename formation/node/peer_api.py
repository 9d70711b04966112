"""The API's routes about peers: who is there, how they stand, bans, ping.

Who is let in is the operator's to decide: bans are taken on the unix socket only, whatever token comes over TCP.
"""

from __future__ import annotations

import math
from typing import Any

import trio

from formation.core.errors import NotFoundError, UnavailableError, UsageError
from formation.core.ids import NodeId, check_label, pick_by_name_or_prefix, public_key_of_node
from formation.node.reads import Reads
from formation.node.state_api import Answer, Ask, StateRoute, check_local
from formation.p2p.kad_wire import role_key
from formation.p2p.service import PeerState

# A dial, a look-up, and a round trip round the world.
PING_TIMEOUT_S = 15.0
# A walk through the network (kad.LOOKUP_TIMEOUT_S) that waits for others.
ROLE_TIMEOUT_S = 30.0
ROLE_PEER_COUNT_MAX = 32


class PeerApi:
    """Handlers of one node."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._p2p = reads.p2p

    def routes(self) -> tuple[StateRoute, ...]:
        """All of them."""
        return (
            StateRoute("GET", "/v1/peers", self.get_peers),
            StateRoute("GET", "/v1/peers/{ref}", self.get_peer),
            StateRoute("POST", "/v1/peers/{ref}/ban", self.post_ban),
            StateRoute("POST", "/v1/peers/{ref}/unban", self.post_unban),
            StateRoute("POST", "/v1/peers/{ref}/ping", self.post_ping),
        )

    async def get_peers(self, ask: Ask) -> Answer:
        """Known and connected peers, and those that something is held against; with `?role=NAME` those that say they have it.

        Raises:
          UsageError: that is no role's name.
        """
        if role := ask.query.get("role", ""):
            return await self._peers_of_role(check_label(role, what="role"))
        states = {state.node_id: state for state in self._p2p.peers()}
        ids = sorted(states.keys() | {stands.node_id for stands in self._p2p.scores()})
        return [self._peer(node_id, states.get(node_id)) for node_id in ids]

    async def _peers_of_role(self, role: str) -> list[dict[str, Any]]:
        found: tuple[NodeId, ...] = ()
        with trio.move_on_after(ROLE_TIMEOUT_S):
            found = await self._p2p.find_providers(role_key(role), count_max=ROLE_PEER_COUNT_MAX)
        states = {state.node_id: state for state in self._p2p.peers()}
        return [self._peer(node_id, states.get(node_id)) for node_id in sorted(found)]

    async def get_peer(self, ask: Ask) -> Answer:
        """One of them."""
        return self._shown(self._find(ask.path["ref"]))

    async def post_ban(self, ask: Ask) -> Answer:
        """Have nothing to do with a peer from now on, also after a restart.

        Raises:
          DeniedError: not by the unix socket.
          UsageError: it is this node itself, or too many are banned.
        """
        _check_operator(ask)
        node_id = self._find(ask.path["ref"])
        await self._p2p.ban(node_id)
        return self._shown(node_id)

    async def post_unban(self, ask: Ask) -> Answer:
        """Forgive a peer: no ban, and its score is 0.

        Raises:
          DeniedError: not by the unix socket.
        """
        _check_operator(ask)
        node_id = self._find(ask.path["ref"])
        was_banned = await self._p2p.unban(node_id)
        return self._shown(node_id) | {"was_banned": was_banned}

    async def post_ping(self, ask: Ask) -> Answer:
        """How long 32 bytes take there and back; connects first if need be.

        Raises:
          UnavailableError: the peer does not answer, or is refused here.
        """
        node_id = self._find(ask.path["ref"])
        if node_id == self._reads.node_id:
            raise UsageError("that is this node itself", hint="formation peer list shows the others")
        with trio.move_on_after(PING_TIMEOUT_S) as scope:
            latency_s = await self._p2p.ping(node_id)
        if scope.cancelled_caught:
            raise UnavailableError(
                f"{self._reads.node_name(node_id)} does not answer within {PING_TIMEOUT_S:.0f} s",
                hint=f"formation peer show {node_id}",
            )
        return {"node_id": node_id, "name": self._reads.node_name(node_id), "latency_ms": round(latency_s * 1000, 2)}

    def _shown(self, node_id: NodeId) -> dict[str, Any]:
        states = {state.node_id: state for state in self._p2p.peers()}
        return self._peer(node_id, states.get(node_id))

    def _peer(self, node_id: NodeId, state: PeerState | None) -> dict[str, Any]:
        stands = self._p2p.score_of(node_id)
        addresses = () if state is None else state.addresses
        return {
            "node_id": node_id,
            "name": self._reads.node_name(node_id),
            "is_voter": node_id in self._reads.state.replica.state.committee.committee.node_ids,
            "is_known": state is not None and state.is_known,
            "connected": state is not None and state.connected,
            "linked": state is not None and state.linked,
            "since_s": None if state is None else round(state.since_s, 1),
            "addresses": list(dict.fromkeys((*addresses, *self._p2p.remembered_addresses(node_id)))),
            # Not -0.0, which nobody understands.
            "score": round(stands.score, 1) + 0.0,
            "offence_count": stands.offence_count,
            "last_offence": stands.last_offence,
            "refused_by": "" if stands.refusal is None else stands.refusal.value,
            "banned_for_s": None if math.isinf(stands.banned_for_s) else round(stands.banned_for_s, 1),
        }

    def _find(self, wanted: str) -> NodeId:
        """A peer's id, name or unique prefix; any node by its whole id.

        Raises:
          NotFoundError, ConflictError: none, or several.
        """
        try:
            public_key_of_node(wanted)
        except UsageError:
            ids = {state.node_id for state in self._p2p.peers()} | {stands.node_id for stands in self._p2p.scores()}
            candidates = [(node_id, self._reads.node_name(node_id)) for node_id in sorted(ids)]
            try:
                return NodeId(pick_by_name_or_prefix(wanted, candidates=candidates, what="peer"))
            except NotFoundError as exc:
                raise NotFoundError(exc.message, hint="formation peer list shows them; any node by its whole id") from exc
        return NodeId(wanted)


def _check_operator(ask: Ask) -> None:
    check_local(ask, "who is let in is decided on the node's own machine")
