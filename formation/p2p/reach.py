"""Reachability: finds out whether others can reach this node, and sees to it that they can.

Theory of operation. Up to ASKED_COUNT directly connected peers, of the widest scope and of different networks, say where they
see us and dial us back there (`autonat`), and `reachability` judges. Public: the addresses that were reached are announced, and
the node serves others as a relay (setting `node.relay`). Private: it keeps places at RELAY_COUNT relays and announces the
circuits; a relay that goes is replaced at once. Whoever then comes through a circuit is asked for a direct connection
(`punch`). It begins anew every TEST_INTERVAL_S, sooner while nobody could be asked, and when connections or this
machine's addresses change. A verdict that was carried by several falls only if as many say so, or twice in a row; one that
nobody says anything about any more (no peers, or none that dials back) is kept for KEPT_S.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import structlog
import trio

from formation.core.errors import DecodeError, FormationError, UnavailableError
from formation.core.ids import NodeId
from formation.p2p.admission import group_of
from formation.p2p.autonat import AutoNat
from formation.p2p.multiaddrs import Circuit, Scope, address_of, endpoint_of, family_of, is_direct, scope_of
from formation.p2p.punch import Puncher
from formation.p2p.reach_messages import HOP_PROTOCOL, STOP_PROTOCOL
from formation.p2p.reachability import (
    DialBack,
    FamilyReach,
    HeldRelay,
    NatKind,
    Reach,
    Reachability,
    Sighting,
    judge,
    overall,
)
from formation.p2p.relay import RelayServer, answer_circuit, ask_for_place
from formation.p2p.reservations import RelayLimits
from formation.p2p.routes import Route, Routes, in_time
from formation.p2p.transport import ByteStream, Transport

ASKED_COUNT = 3
# Addresses that one peer is asked to try: where it sees us, and there with the ports that we listen on.
CANDIDATE_COUNT_MAX = 4
TEST_INTERVAL_S = 300.0
# While the verdict stands on fewer than that many.
TEST_INTERVAL_UNSURE_S = 30.0
FIRST_TEST_AFTER_S = 2.0
# A line that is down for a while leaves the NAT as it is.
KEPT_S = 900.0
# Connections come in bursts; one test is for all of them. Strangers that come and go must not have us ask the others more often
# than these answer (autonat), so the wait doubles with each test that comes before its time.
SETTLE_S = 1.5
SETTLE_MAX_S = 30.0
# One that goes must not make us unreachable.
RELAY_COUNT = 2
RELAY_ADDRESS_COUNT_MAX = 2
KEEP_INTERVAL_S = 5.0
PLACE_TIMEOUT_S = 10.0
# A peer that refused is asked again so much later, the wait doubling: one that has just started learns within seconds that it
# is public, one that is full may be so for an hour.
REFUSED_FOR_S = 4.0
REFUSED_FOR_MAX_S = 120.0
# Places are asked for again when so much of their time is left, as a share.
RENEW_AT = 0.5
# Seeing takes 5 s at most and a dial that nobody answers as long; people wait for it, at another node too (node.forward: 20 s).
CHECK_TIMEOUT_S = 15.0

_logger = structlog.get_logger(__name__)


class RelayMode(Enum):
    """Whether this node serves as a relay."""

    AUTO = "auto"
    """While it is public."""
    ON = "on"
    OFF = "off"


@dataclass(slots=True)
class _Held:
    circuits: tuple[Circuit, ...]
    until_s: float
    renew_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refused:
    until_s: float
    wait_s: float
    why: str


class ReachService:
    """One node's reachability.

    Args:
      is_favoured: whether a peer is known to us (the committee): asked first for places, and given more.
      now_ms: the wall clock.
    """

    def __init__(
        self,
        transport: Transport,
        routes: Routes,
        *,
        mode: RelayMode,
        limits: RelayLimits,
        is_favoured: Callable[[NodeId], bool],
        now_ms: Callable[[], int],
        rng: random.Random,
    ) -> None:
        self._transport = transport
        self._routes = routes
        self._mode = mode
        self._is_favoured = is_favoured
        self._now_ms = now_ms
        self._rng = rng
        self._families: tuple[FamilyReach, ...] = ()
        self._sightings: tuple[Sighting, ...] = ()
        self._verdict = Reach.UNKNOWN
        self._against_count = 0
        self._local_hosts: set[str] = set()
        """Own addresses of connections since the last test."""
        self._checked_at_s: float | None = None
        self._held: dict[NodeId, _Held] = {}
        self._refused: dict[NodeId, _Refused] = {}
        """Connected peers that keep no place for us."""
        self._silent: tuple[tuple[NodeId, str], ...] = ()
        self._is_told_alone = False
        self._look_again = trio.Event()
        self._keep_again = trio.Event()
        self._testing = trio.Lock()
        self._callbacks: list[Callable[[Reachability], None]] = []
        self.autonat = AutoNat(transport, routes)
        self.relay = RelayServer(
            transport, routes, limits=limits, is_favoured=is_favoured, own_addresses=self._own_addresses, now_ms=now_ms
        )
        self.relay.is_serving = mode is RelayMode.ON
        self.puncher = Puncher(transport, routes, own_addresses=self._seen_addresses, hopeless=self._hopeless)
        transport.serve_stream(STOP_PROTOCOL, self._serve_stop)
        transport.on_connection(self._note_connection)
        routes.on_route(self._note_route)

    async def run(self) -> None:
        """Test and keep relays until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.puncher.run)
            nursery.start_soon(self._test_loop)
            nursery.start_soon(self._keep_loop)

    def on_reachability(self, callback: Callable[[Reachability], None]) -> None:
        """Tell when the verdict, the addresses or the relays change; must not block."""
        self._callbacks.append(callback)

    def state(self) -> Reachability:
        """As found last."""
        now_s = trio.current_time()
        return Reachability(
            verdict=self._verdict,
            families=self._families,
            relays=tuple(
                HeldRelay(node_id=n, addresses=tuple(map(str, held.circuits)), expires_in_s=max(0.0, held.until_s - now_s))
                for n, held in sorted(self._held.items())
            ),
            relayed=tuple(sorted(self.puncher.outcomes.items())),
            refusals=tuple(sorted((node_id, refused.why) for node_id, refused in self._refused.items())),
            silent=self._silent,
            serves_as_relay=self.relay.is_serving,
            checked_ago_s=None if self._checked_at_s is None else now_s - self._checked_at_s,
        )

    def is_needed(self, node_id: NodeId) -> bool:
        """Whether somebody's reachability hangs on the connection to this peer: ours, or its own."""
        return node_id in self._held or self.relay.book.has_place(node_id, now_s=trio.current_time())

    async def check(self) -> Reachability:
        """Test now; what is found, or what was found last if it takes longer than CHECK_TIMEOUT_S."""
        with trio.move_on_after(CHECK_TIMEOUT_S):
            await self._test()
        return self.state()

    def _note_connection(self, node_id: NodeId, is_up: bool) -> None:
        self.relay.note_connection(node_id, is_up)
        if not is_up:
            self._refused.pop(node_id, None)
            if self._held.pop(node_id, None) is not None:
                _logger.info("relay lost", relay=node_id)
                self._announce()
        self._keep_again.set()
        if is_up and self._asked_count() < ASKED_COUNT:
            self._look_again.set()

    def _note_route(self, route: Route, is_up: bool) -> None:
        """A connection from an address of ours that the last test did not know: the machine has moved, or has one more."""
        known = {sighting.local_host for sighting in self._sightings}
        if (
            is_up
            and not route.is_relayed
            and known
            and route.local_host not in known
            and route.local_host not in self._local_hosts
        ):
            self._look_again.set()
        if not route.is_relayed and is_up:
            self._local_hosts.add(route.local_host)

    # --- the test ----------------------------------------------------------------------------------------------------

    def _asked_count(self) -> int:
        return max((family.asked_count for family in self._families), default=0)

    async def _test_loop(self) -> None:
        await trio.sleep(FIRST_TEST_AFTER_S * (0.5 + self._rng.random()))
        settle_s = SETTLE_S
        while True:
            self._look_again = trio.Event()
            await self._test()
            interval_s = TEST_INTERVAL_S if self._asked_count() >= 2 else TEST_INTERVAL_UNSURE_S
            with trio.move_on_after(interval_s * (0.75 + 0.5 * self._rng.random())) as scope:
                await self._look_again.wait()
                await trio.sleep(settle_s)
            settle_s = SETTLE_S if scope.cancelled_caught else min(2 * settle_s, SETTLE_MAX_S)

    async def _test(self) -> None:
        async with self._testing:
            sightings: list[Sighting] = []
            dial_backs: list[DialBack] = []
            silent: dict[NodeId, str] = {}
            async with trio.open_nursery() as nursery:
                for node_id in self._whom_to_ask():
                    nursery.start_soon(self._ask, node_id, sightings, dial_backs, silent)
            self._silent = tuple(sorted(silent.items()))
            self._take(sightings, dial_backs)

    def _whom_to_ask(self) -> list[NodeId]:
        """Of each network one, the widest scope first; known peers before strangers."""
        direct = [route for route in self._routes.routes() if not route.is_relayed and route.host]
        self._rng.shuffle(direct)
        direct.sort(key=lambda r: (-scope_of(r.host), not self._is_favoured(r.node_id), not r.is_from_listener))
        chosen: dict[NodeId, Route] = {}
        groups: dict[tuple[int, str], int] = {}
        for route in direct:
            group = (4 if "." in route.host else 6, group_of(route.host))
            is_local = scope_of(route.host) == Scope.HOST
            if route.node_id not in chosen and (is_local or group not in groups):
                chosen[route.node_id] = route
                groups[group] = 1
        of_family: dict[int, int] = {}
        wanted = []
        for node_id, route in chosen.items():
            family = 4 if "." in route.host else 6
            if of_family.get(family, 0) < ASKED_COUNT:
                of_family[family] = of_family.get(family, 0) + 1
                wanted.append(node_id)
        return wanted

    async def _ask(
        self, node_id: NodeId, sightings: list[Sighting], dial_backs: list[DialBack], silent: dict[NodeId, str]
    ) -> None:
        try:
            route, seen = await self._routes.sight(node_id)
        except UnavailableError as exc:
            silent[node_id] = exc.message
            return
        end = endpoint_of(seen)
        if end is None:
            silent[node_id] = "does not say where it sees us"
            return
        sightings.append(
            Sighting(
                observer=node_id,
                host=route.host,
                local_host=route.local_host,
                seen=seen,
                is_from_listener=route.is_from_listener,
            )
        )
        ports = [int(a.split("/")[4]) for a in self._routes.listening() if family_of(a) == family_of(seen)]
        candidates = [seen] if route.is_from_listener else []
        candidates += [address_of(end[0], port) for port in ports]

        async def ask(address: str) -> None:
            try:
                fault = await self.autonat.ask(node_id, address)
            except (UnavailableError, DecodeError) as exc:
                silent[node_id] = exc.message
            else:
                dial_backs.append(DialBack(by=node_id, host=route.host, address=address, fault=fault))

        # Side by side: an address that nobody answers takes some seconds. One question for each, because there is one answer.
        async with trio.open_nursery() as nursery:
            for address in list(dict.fromkeys(candidates))[:CANDIDATE_COUNT_MAX]:
                nursery.start_soon(ask, address)

    def _take(self, sightings: list[Sighting], dial_backs: list[DialBack]) -> None:
        before, now_s = self.state(), trio.current_time()
        self._local_hosts.clear()
        families = judge(sightings, dial_backs)
        verdict = overall(families)
        if verdict is Reach.UNKNOWN and self._checked_at_s is not None and now_s - self._checked_at_s < KEPT_S:
            return
        if verdict is not Reach.UNKNOWN:
            self._checked_at_s = now_s
        asked_count = max((family.asked_count for family in families), default=0)
        is_turned = verdict is not self._verdict and Reach.UNKNOWN not in (verdict, self._verdict)
        if is_turned and asked_count < self._asked_count():
            self._against_count += 1
            if self._against_count < 2:
                self._look_again.set()
                return
        self._against_count = 0
        self._families, self._sightings = families, tuple(sightings)
        if verdict is not self._verdict:
            _logger.info("reachability", verdict=verdict.value, was=self._verdict.value)
        self._verdict = verdict
        # Two that are reached anyhow would only collide when they dial each other at once.
        self._routes.dial_from_listener(verdict is not Reach.PUBLIC)
        if self._mode is RelayMode.AUTO:
            self.relay.is_serving = verdict is Reach.PUBLIC
        if verdict is Reach.PUBLIC:
            self._held.clear()
            self._refused.clear()
        self._keep_again.set()
        self._announce()
        if (before.verdict, before.reachable) != (verdict, self.state().reachable):
            self._tell()

    def _tell(self) -> None:
        state = self.state()
        for callback in self._callbacks:
            callback(state)

    def _announce(self) -> None:
        circuits = tuple(str(circuit) for held in self._held.values() for circuit in held.circuits)
        reached = tuple(address for family in self._families for address in _reached(family))
        self._routes.announce((*reached, *circuits))

    def _own_addresses(self) -> tuple[str, ...]:
        """Direct ones, for those who have a place here."""
        reached = tuple(address for family in self._families for address in _reached(family))
        return reached or tuple(a for a in self._routes.listening() if is_direct(a))

    def _seen_addresses(self) -> tuple[str, ...]:
        """Where most see our listening port: one that lies must not have others knock elsewhere."""
        counts = Counter(sighting.seen for sighting in self._sightings if sighting.is_from_listener)
        most = max(counts.values(), default=0)
        return tuple(address for address, count in counts.items() if count == most)

    def _hopeless(self) -> str:
        kinds = {family.nat for family in self._families}
        is_so = NatKind.ADDRESS_DEPENDENT in kinds and not kinds & {NatKind.NONE, NatKind.ENDPOINT_INDEPENDENT}
        return "this node's NAT takes another port for each peer" if is_so else ""

    # --- relays ------------------------------------------------------------------------------------------------------

    async def _keep_loop(self) -> None:
        while True:
            self._keep_again = trio.Event()
            await self._keep()
            with trio.move_on_after(KEEP_INTERVAL_S):
                await self._keep_again.wait()

    async def _keep(self) -> None:
        if self._verdict is not Reach.PRIVATE:
            return
        now_s = trio.current_time()
        due = [node_id for node_id, held in self._held.items() if held.renew_s <= now_s]
        for node_id in due:
            await self._reserve(node_id)
        for node_id in self._candidates():
            if len(self._held) >= RELAY_COUNT:
                break
            await self._reserve(node_id)
        if bool(self._held) == self._is_told_alone:
            self._is_told_alone = not self._held
            if not self._held:
                _logger.warning("nobody can connect to this node: it found no relay", hint="formation net check says why")

    def _candidates(self) -> list[NodeId]:
        """Directly connected peers that may keep a place for us: known ones, and those of other networks than held, first."""
        now_s = trio.current_time()
        held_groups = {group_of(r.host) for node_id in self._held for r in self._routes.routes(node_id)}
        direct = {r.node_id: r for r in self._routes.routes() if not r.is_relayed and self._may_reserve(r.node_id, now_s)}
        ids = list(direct)
        self._rng.shuffle(ids)
        ids.sort(key=lambda n: (-scope_of(direct[n].host), group_of(direct[n].host) in held_groups, not self._is_favoured(n)))
        return ids

    def _may_reserve(self, node_id: NodeId, now_s: float) -> bool:
        refused = self._refused.get(node_id)
        return node_id not in self._held and (refused is None or refused.until_s <= now_s)

    async def _reserve(self, node_id: NodeId) -> None:
        try:
            with in_time(PLACE_TIMEOUT_S):
                stream = await self._transport.open_stream(node_id, HOP_PROTOCOL)
                try:
                    answer = await ask_for_place(stream)
                finally:
                    await stream.aclose()
        except FormationError as exc:
            self._note_refused(node_id, exc.message)
            if self._held.get(node_id, _Held((), float("inf"), 0.0)).until_s <= trio.current_time() + KEEP_INTERVAL_S:
                self._held.pop(node_id, None)
            return
        assert answer.reserved is not None
        circuits = self._circuits(node_id, answer.reserved.addresses)
        if not circuits or node_id not in self._transport.connected():
            self._note_refused(node_id, "it does not say where it can be dialled")
            return
        # Its clock may be wrong, so no longer than a day, and renewed by ours.
        left_s = min(max(answer.reserved.expires_s - self._now_ms() / 1000, KEEP_INTERVAL_S), 24 * 3600.0)
        now_s = trio.current_time()
        self._refused.pop(node_id, None)
        is_new = node_id not in self._held
        self._held[node_id] = _Held(circuits, now_s + left_s, now_s + left_s * RENEW_AT)
        if is_new:
            _logger.info("relay found", relay=node_id, expires_in_s=round(left_s))
            self._announce()
            self._tell()

    def _note_refused(self, node_id: NodeId, why: str) -> None:
        before = self._refused.get(node_id)
        log = _logger.info if before is None or before.why != why else _logger.debug
        log("no place at a peer", peer=node_id, why=why)
        if node_id in self._transport.connected():
            wait_s = REFUSED_FOR_S if before is None else min(2 * before.wait_s, REFUSED_FOR_MAX_S)
            until_s = trio.current_time() + wait_s * (0.5 + self._rng.random())
            self._refused[node_id] = _Refused(until_s=until_s, wait_s=wait_s, why=why)

    def _circuits(self, node_id: NodeId, told: Iterable[str]) -> tuple[Circuit, ...]:
        dialled = (address_of(r.host, r.port) for r in self._routes.routes(node_id) if r.is_outbound and not r.is_relayed)
        addresses = [*dialled, *filter(is_direct, told)]
        ends = {address: end for address in addresses if (end := endpoint_of(address)) is not None}
        widest = max((scope_of(end[0]) for end in ends.values()), default=0)
        best = [address for address, end in ends.items() if scope_of(end[0]) == widest]
        return tuple(Circuit(node_id, address) for address in best[:RELAY_ADDRESS_COUNT_MAX])

    async def _serve_stop(self, node_id: NodeId, stream: ByteStream) -> None:
        """A relay of ours brings somebody."""
        held = self._held.get(node_id)
        if held is None:
            raise UnavailableError("no relay of ours")
        peer, limit = await answer_circuit(stream)
        over = await self._routes.enter_circuit(peer, stream, held.circuits[0], limit=limit, is_initiator=False)
        await over.wait()


def _reached(family: FamilyReach) -> tuple[str, ...]:
    return tuple(address.address for address in family.addresses if address.is_reachable)
