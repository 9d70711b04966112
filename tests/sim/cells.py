"""Three networks at once under virtual time: a root that names two cells, faults and liars in each, and readers of proofs.

Each network is a `Cluster` with all of its own invariants. What is added:

- **C1** an accepted proof of a network shows what its final state had at that height, item or absence, under that very root;
- **C2** it was signed by a committee that the network really had;
- **C3** reads that remember heights do not go back;
- **C4** an honest server's proof is never refused, unless for being older than one seen before;
- **C5** the keys that a cell has for an imported account are the root's at the height of the import, and heights only rise;
- **C6** a cell's record in the root holds a committee that the cell really had; the first who named it owns it;
- **C7** after the faults are over, every item can be read.

A run is its seed: `python -m tests.sim.cells --seed 7`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from formation.core.clock import NS_PER_MS
from formation.core.codec import decode, encode, sha256
from formation.core.errors import UnavailableError
from formation.core.event import (
    AccountImported,
    AccountKeyRotated,
    AccountRecoverySet,
    CellEvent,
    CellRecorded,
    Event,
    RootNamed,
    Topic,
    event_body,
)
from formation.core.ids import NetworkId, account_id_of, public_key_of_account
from formation.core.intent import Intent, sign_intent
from formation.state.checkpoint import ItemProof, SnapshotSource, StateTree, bucket_number
from formation.state.claims import Fence
from formation.state.committee import Committee
from formation.state.final_chain import FinalChain, parse_final_chain
from formation.state.fold import State
from formation.state.judge import Judged
from formation.state.network_cells import load_record
from formation.state.op import PlainOp, event_op, intent_op
from formation.state.remote_cell import (
    Flaw,
    ProofAnswer,
    ProofAsk,
    ProofError,
    ReadItem,
    Served,
    answer_ask,
    parse_answer,
    parse_ask,
    read_item,
)
from formation.state.root_link import account_item
from formation.state.spine_values import CheckpointRef, Kind, Proposal, Vote, make_final, sign_proposal, sign_vote
from tests.sim import byzantine as byzantine_module
from tests.sim import checkers as checkers_module
from tests.sim import cluster as cluster_module
from tests.sim import workload as workload_module
from tests.sim.checkers import Height, Judge, breach
from tests.sim.cluster import Cluster, Node, _small
from tests.sim.faults import Counts, _rough
from tests.sim.workload import fake_sign, fake_verify, public_key
from tests.unit.state.replicas import make_manifest

NAMES = ("root", "berlin", "paris")
STEP_MS = 40.0
READS_PER_STEP = 3
STORE_TURNS_MS = 8_000.0
OWNERS = tuple(public_key(f"owner{i}") for i in range(2))
Item = tuple[str, str]


@contextmanager
def as_network(name: str, network_id: NetworkId) -> Iterator[None]:
    """What the simulator of one network takes for granted: its id, and whose keys its nodes have."""
    cluster_: Any = cluster_module
    modules: tuple[Any, ...] = (byzantine_module, checkers_module, cluster_, workload_module)
    before = workload_module.NETWORK_ID
    for module in modules:
        module.NETWORK_ID = network_id
    cluster_.public_key = lambda label: public_key(f"{name}/{label}")
    try:
        yield
    finally:
        for module in modules:
            module.NETWORK_ID = before
        cluster_.public_key = public_key


class CellJudge(Judge):
    """The rules once more, where another network's word counts."""

    def is_void(self, op: Judged, fence: Fence, state: State) -> bool | None:
        """As the base; keys of imported accounts are C5's to check, cells C6's."""
        for identity in state.root_link.ids():
            if identity.startswith("account/"):
                self._follow(identity.removeprefix("account/"), state)
        if isinstance(op.event, CellEvent | AccountImported):
            return None
        if isinstance(op.event, AccountKeyRotated | AccountRecoverySet) and state.root_link.root is not None:
            return True
        return super().is_void(op, fence, state)

    def _follow(self, account_id: str, state: State) -> None:
        """Before each operation, so no two imports fall between."""
        key = state.accounts.key_in_force(account_id)
        if self.keys.get(account_id, public_key_of_account(account_id)) != key:
            self.delegations = {at: given for at, given in self.delegations.items() if at[0] != account_id}
        self.keys[account_id] = key
        self.recovery[account_id] = state.accounts.recovery_key(account_id)


@dataclass
class Network:
    """One of them, with what its states were."""

    name: str
    manifest: bytes
    network_id: NetworkId
    cluster: Cluster
    truth: dict[int, tuple[bytes, dict[Item, bytes]]] = field(default_factory=dict)
    """Height of each checkpoint that was due → root and items, by the checkers' own fold."""
    shown: list[bytes] = field(default_factory=list)
    """Answers that were given: liars replay them."""

    def items(self) -> dict[Item, bytes]:
        """Of the newest checkpoint."""
        return self.truth[max(self.truth)][1] if self.truth else {}


class World:
    """See the module."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"cells/{seed}")
        self.counts = Counts()
        self.seen: dict[str, int] = {}
        self.committees: dict[tuple[str, int], Committee] = {}
        self.imports: list[AccountImported] = []
        self.networks = {name: self._make(name, seed) for name in NAMES}

    def _make(self, name: str, seed: int) -> Network:
        rng = self.rng
        keys = [public_key(f"{name}/node{i}") for i in range(4)]
        raw = make_manifest(*keys, name=name)
        genesis = decode(raw, list[Any], what="manifest")[0]
        network_id = NetworkId(sha256(encode(genesis)))
        plan = _rough(
            rng,
            loss=rng.choice((0.0, 0.05)),
            checkpoint_op_count=5,
            op_count=30,
            gst_ms=1600,
            mix={"root": "accounts", "berlin": "claims", "paris": "plain"}[name],
            crash_count=rng.randint(0, 2),
            partition_count=rng.choice((0, 0, 1)),
            behaviours=rng.choice(((), (("sync-lies",),), (("fork", "lead-root"),))),
            observer_count=1,
            committee=rng.choice(("", "replace")),
        )
        with as_network(name, network_id):
            cluster = Cluster(seed * 7 + NAMES.index(name), plan)
        cluster.checkers.judge = CellJudge()
        network = Network(name, raw, network_id, cluster)
        self._remember_states(network)
        return network

    def _remember_states(self, network: Network) -> None:
        checkers = network.cluster.checkers
        judge = checkers._judge

        def record(at: Height) -> None:
            judge(at)
            if any(call[0] == "due" for call in at.calls):
                tree: StateTree = checkers._tree
                network.truth[at.number] = (tree.root(), {(i.section, i.id): i.value for i in tree.items()})
            self._check_imports(network, checkers._mirror)

        checkers._judge = record  # type: ignore[method-assign] # to look over its shoulder

    # ── the run ──

    def run(self) -> None:
        """All faults, then quiet, then everything can be read."""
        self._write_down_cells()
        plans = [network.cluster.plan for network in self.networks.values()]
        at_ms = 0.0
        while at_ms < max(plan.gst_ms for plan in plans) + 400:
            at_ms += STEP_MS
            for network in self.networks.values():
                self._in(network, partial(network.cluster.run_until, at_ms))
            for _ in range(READS_PER_STEP):
                self._read_once()
            if self.rng.random() < 0.3:
                self._import_something()
        for network in self.networks.values():
            self._in(network, network.cluster.settle)
            # Nodes store what was agreed on in turns of some hundred ms.
            self._in(network, partial(network.cluster.run_until, network.cluster.now_ms + STORE_TURNS_MS))
        self._check_records()
        self._read_everything()
        for network in self.networks.values():
            for name, count in network.cluster.counts.by_name.items():
                self.counts.add(name, count)

    def _in(self, network: Network, action: Callable[[], None]) -> None:
        with as_network(network.name, network.network_id), _small(network.cluster.plan):
            action()

    def _write_down_cells(self) -> None:
        """Owners record the cells, late ones in vain; voters of the cells name the root, more than once."""
        root = self.networks["root"]
        for cell in ("berlin", "paris"):
            raw = self.networks[cell].manifest
            for owner in range(2):
                for again in range(3):
                    event = CellRecorded(manifest=raw, servers=(), links=())
                    at_ms = self.rng.uniform(20, 1500) + again
                    root.cluster.at(at_ms, partial(self._record, root, owner, event, f"cell/{cell}"))
            network = self.networks[cell]
            named = RootNamed(manifest=root.manifest, servers=(), links=())
            for node in network.cluster.founders():
                for _ in range(3):
                    made = (Topic.COMMITTEE, event_op(named, "root"))
                    network.cluster.at(self.rng.uniform(20, 900), partial(self._submit_now, network, node, made))

    def _record(self, root: Network, owner: int, event: CellRecorded, object_id: str) -> None:
        # The newest chain, if the root is asked late enough; any node can show it.
        cell = self.networks[object_id.removeprefix("cell/")]
        links = max((tuple(node.replica.links) for node in cell.cluster.correct()), key=len)
        event = msgspec.structs.replace(event, links=links if self.rng.random() < 0.7 else ())
        made = (Topic.CLAIM, self._wish(root, OWNERS[owner], event, object_id))
        nodes = [node for node in root.cluster.founders() if node.is_correct and node.is_up]
        if nodes:
            root.cluster.submit(self.rng.choice(nodes), made)

    def _submit_now(self, network: Network, node: Node, made: tuple[Topic, PlainOp]) -> None:
        network.cluster.submit(node, made)

    def _wish(self, network: Network, key: bytes, event: Event, object_id: str) -> PlainOp:
        now_ms = network.cluster.now_ns // NS_PER_MS
        intent = Intent(
            account=key,
            verb=event.verb,
            object_id=object_id,
            body=event_body(event),
            nonce=self.rng.randbytes(16),
            created_ms=now_ms,
            expires_ms=now_ms + 600_000,
            key=key,
        )
        signed = sign_intent(fake_sign(key), intent, network_id=network.network_id)
        return intent_op(signed, object_id, op_class=event.op_class)

    # ── reads ──

    def _trusted(self, network: Network) -> Committee:
        """The founders, or what the root's newest checkpoint records."""
        founders = network.cluster.committees[0]
        record = self.networks["root"].items().get(("cells", network.name))
        if record is None or self.rng.random() < 0.4:
            return founders
        found = load_record(decode(record, list[Any], what="record"))
        if found.network_id != network.network_id:
            breach("C6", f"{network.name} is recorded as another network")
        return found.committee

    def _some_key(self, network: Network) -> Item:
        known = sorted(network.items())
        if known and self.rng.random() < 0.8:
            return self.rng.choice(known)
        return self.rng.choice(("claim", "account", "cells")), f"nobody/{self.rng.randrange(10**6)}"

    def _read_once(self) -> None:
        network = self.networks[self.rng.choice(NAMES)]
        server = self.rng.choice(network.cluster.nodes)
        if not server.is_up or server.is_paused:
            return
        key = self._some_key(network)
        if network.name == "root" and self.rng.random() < 0.5:
            account = self.rng.choice(network.cluster.workload.accounts)
            key = ("account", account_item(account))
        self._read(network, server, key, self._trusted(network), lies=self.rng.random() < 0.5)

    def _read(
        self, network: Network, server: Node, key: Item, trusted: Committee, *, lies: bool
    ) -> tuple[ReadItem, ProofAnswer] | None:
        """What a reader gets of a server, checked (C1-C4); None if nothing."""
        height_min = self.seen.get(network.name, 0) if self.rng.random() < 0.5 else 0
        steps = read_item(
            *key,
            network_id=network.network_id,
            trusted=trusted,
            verify=fake_verify,
            now_ms=network.cluster.now_ns // NS_PER_MS,
            age_ms_max=None,
            height_min=height_min,
        )
        ask = next(steps)
        is_bent = False
        links: tuple[bytes, ...] = ()
        while True:
            try:
                raw = encode(self._serve(network, server, parse_ask(encode(ask))))
            except UnavailableError:
                self.counts.add("nothing to prove with")
                return None
            if lies:
                bent = self._lie(network, server, ask, raw)
                is_bent |= bent != raw
                raw = bent
            elif server.is_correct:
                network.shown.append(raw)
            try:
                answer = parse_answer(raw)
                links += answer.links
                ask = steps.send(answer)
            except StopIteration as end:
                found: ReadItem = end.value
                self._check_read(network, key, found, height_min)
                self.counts.add("accepted lies" if is_bent else "accepted")
                return found, msgspec.structs.replace(answer, links=links)
            except ProofError as exc:
                self.counts.add(f"refused {exc.flaw}")
                if not is_bent and server.is_correct and exc.flaw is not Flaw.ROLLBACK:
                    breach("C4", f"the proof of {server.name} in {network.name} was refused: {exc.message}")
                return None

    def _serve(self, network: Network, server: Node, ask: ProofAsk) -> ProofAnswer:
        replica = server.replica
        head = replica.checkpoint_head
        served = Served(
            network_id=network.network_id, links=tuple(replica.links), checkpoint=replica.checkpoint_proof, head=head
        )

        def prove(section: str, object_id: str) -> ItemProof | None:
            assert head is not None
            return SnapshotSource(head, server.store.read_bucket).prove(section, object_id)

        return answer_ask(ask, served, prove)

    def _check_read(self, network: Network, key: Item, found: ReadItem, height_min: int) -> None:
        if found.height not in network.truth:
            breach("C1", f"{network.name} had no checkpoint at height {found.height}")
        root, items = network.truth[found.height]
        if found.root != root or found.value != items.get(key):
            breach("C1", f"{key} of {network.name} at height {found.height} is not what was proven")
        known = network.cluster.committees.get(found.committee.epoch)
        if known is None or known.voters != found.committee.voters:
            breach("C2", f"{network.name} had no such committee of epoch {found.committee.epoch}")
        if found.height < height_min:
            breach("C3", f"{network.name} was read at height {found.height} after {height_min}")
        self.seen[network.name] = max(found.height, self.seen.get(network.name, 0))

    # ── lies ──

    def _lie(self, network: Network, server: Node, ask: ProofAsk, raw: bytes) -> bytes:
        """What a server with at most f voters' keys may answer in place of the truth."""
        rng = self.rng
        good = parse_answer(raw)
        other = self.networks[rng.choice([name for name in NAMES if name != network.name])]
        match rng.randrange(10):
            case 0 if network.shown:
                return rng.choice(network.shown)
            case 1 if other.shown:
                # Another network's proof, under this one's id.
                stolen = parse_answer(rng.choice(other.shown))
                return encode(msgspec.structs.replace(stolen, network_id=bytes(network.network_id)))
            case 2:
                return encode(msgspec.structs.replace(good, links=good.links[: rng.randrange(len(good.links) + 1)]))
            case 3:
                return encode(msgspec.structs.replace(good, links=(*good.links, *other.cluster.nodes[0].replica.links)))
            case 4 if good.checkpoint:
                # The right answer to another question.
                section, object_id = self._some_key(network)
                content = server.store.read_bucket(bucket_number(section, object_id))
                head = server.replica.checkpoint_head
                assert head is not None
                proof = SnapshotSource(head, lambda _: content).prove(section, object_id)
                if proof is not None:
                    return encode(msgspec.structs.replace(good, item=encode(proof)))
            case 5:
                at = rng.randrange(len(raw))
                return raw[:at] + bytes((raw[at] ^ 1 << rng.randrange(8),)) + raw[at + 1 :]
            case 6:
                return raw[: rng.randrange(len(raw))]
            case 7 | 8 if good.checkpoint:
                return encode(self._forged(network, ask, good))
            case 9:
                return encode(msgspec.structs.replace(good, network_id=bytes(other.network_id)))
        return raw

    def _forged(self, network: Network, ask: ProofAsk, good: ProofAnswer) -> ProofAnswer:
        """A state that never was, signed by f voters of the newest committee, and by all of them in another network."""
        rng = self.rng
        proven = parse_final_chain(good.checkpoint)
        committee = network.cluster.committees[proven.epoch]
        tree = StateTree()
        tree.update({(ask.section, ask.id): encode(["forged", rng.random() < 0.5])})
        before = proven.first.proposal
        forged = Proposal(
            epoch=proven.epoch,
            view=before.view,
            height=before.height,
            parent=before.parent,
            time_ms=before.time_ms,
            cut=(),
            equivocations=(),
            closes=(),
            checkpoint=CheckpointRef(before.height, tree.root()),
            handover=None,
        )
        everybody = rng.random() < 0.5
        network_id = NetworkId(b"x" * 32) if everybody else network.network_id
        leader = committee.voters[committee.leader(forged.view)]
        entry = sign_proposal(fake_sign(leader), forged, network_id=network_id)
        count = len(committee.voters) if everybody else committee.fault_count_max
        votes = []
        for voter in range(committee.quorum_size):
            # Who does not collude gets a signature of somebody who does.
            key = committee.voters[voter if voter < count else 0]
            vote = Vote(committee.epoch, forged.view, voter, entry.hash)
            votes.append(sign_vote(fake_sign(key), Kind.FINALIZE, vote, network_id=network_id))
        proof = SnapshotSource(tree.head(before.height), tree.bucket).prove(ask.section, ask.id)
        certificate = encode(FinalChain((), make_final(entry, votes).raw))
        return msgspec.structs.replace(good, checkpoint=certificate, item=encode(proof))

    # ── accounts ──

    def _import_something(self) -> None:
        """A node of a cell carries what a server of the root gave it: the truth, an old truth, or a lie."""
        root = self.networks["root"]
        cell = self.networks[self.rng.choice(("berlin", "paris"))]
        account = self.rng.choice(root.cluster.workload.accounts)
        servers = [node for node in root.cluster.nodes if node.is_up and not node.is_paused]
        nodes = [node for node in cell.cluster.founders() if node.is_correct and node.is_up]
        if not servers or not nodes:
            return
        server = self.rng.choice(servers)
        asked = ProofAsk(root.network_id, 0, "account", account_item(account))
        try:
            raw = encode(self._serve(root, server, asked))
            if self.rng.random() < 0.5:
                raw = self._lie(root, server, asked, raw)
            answer = parse_answer(raw)
        except (UnavailableError, ProofError):
            return
        if not answer.checkpoint:
            return
        event = AccountImported(links=answer.links[:16], checkpoint=answer.checkpoint, item=answer.item)
        if self.rng.random() < 0.2 and self.imports:
            event = self.rng.choice(self.imports)
        self.imports.append(event)
        made = (Topic.ACCOUNT, event_op(event, account))
        self._in(cell, partial(cell.cluster.submit, self.rng.choice(nodes), made))

    def _check_imports(self, network: Network, state: State) -> None:
        """C5, after each height of a cell."""
        root = self.networks.get("root") if hasattr(self, "networks") else None
        if root is None or network is root or state.root_link.root is None:
            return
        for account in root.cluster.workload.accounts:
            height = state.root_link.imported_height(account)
            if not height:
                continue
            if height not in root.truth:
                breach("C5", f"{network.name} imported from height {height}, of which the root has no checkpoint")
            value = root.truth[height][1].get(("account", account_item(account)))
            plain = None if value is None else decode(value, list[Any], what="account")
            key = public_key_of_account(account) if plain is None else plain[0]
            recovery = b"" if plain is None else plain[1]
            if (state.accounts.key_in_force(account), state.accounts.recovery_key(account)) != (key, recovery):
                breach("C5", f"{network.name} has other keys for {account} than the root at height {height}")
            place = f"import {network.name} {account}"
            if height < self.seen.get(place, 0):
                breach("C5", f"{network.name} went back to height {height} for {account}")
            if height > self.seen.get(place, 0):
                self.counts.add("imported")
            self.seen[place] = height

    # ── the end ──

    def _check_records(self) -> None:
        mirror: State = self.networks["root"].cluster.checkers._mirror
        for name in ("berlin", "paris"):
            network = self.networks[name]
            record = mirror.network_cells.get(name)
            if record is None:
                continue
            self.counts.add("cells recorded")
            known = network.cluster.committees.get(record.committee.epoch)
            if known is None or known.voters != record.committee.voters or record.network_id != network.network_id:
                breach("C6", f"the record of {name} names a committee that it never had")
            if mirror.accounts.owner_of(f"cell/{name}") not in [str(account_id_of(key)) for key in OWNERS]:
                breach("C6", f"nobody owns {name}")

    def _read_everything(self) -> None:
        """C7."""
        for network in self.networks.values():
            servers = [node for node in network.cluster.correct() if node.replica.checkpoint_proof]
            if not servers:
                continue
            for key in [*sorted(network.items())[:6], ("claim", "nobody")]:
                self.seen.pop(network.name, None)
                if self._read(network, self.rng.choice(servers), key, self._trusted(network), lies=False) is None:
                    breach("C7", f"{key} of {network.name} cannot be read")


def run(seed: int) -> Counts:
    """One run.

    Raises:
      AssertionError: an invariant broke; the message has the command that replays it.
    """
    try:
        world = World(seed)
        world.run()
    except Exception as exc:
        raise AssertionError(
            f"cells, seed {seed}: {type(exc).__name__}: {exc}\n  replay: python -m tests.sim.cells --seed {seed}"
        ) from exc
    return world.counts


def main() -> int:
    """Returns the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.cells", description="Runs seeds of three networks at once.")
    parser.add_argument("--seed", type=int, help="this seed only")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    first, count = (options.first_seed, options.seeds) if options.seed is None else (options.seed, 1)
    begin_s, total = time.perf_counter(), Counts()
    for seed in range(first, first + count):
        for name, number in run(seed).by_name.items():
            total.add(name, number)
    told = ", ".join(f"{name} {number}" for name, number in sorted(total.by_name.items()))
    print(f"cells: {count} seeds, {(time.perf_counter() - begin_s) / count:.2f} s each; {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
