"""What cells cost one another: an operation's messages and bytes in one cell while others work, and a proof by the root's size.

The cells share a process and nothing else; what would tie them together is the root's state, so its proofs are measured with
few and with many cells recorded, from asking to a verified record (one certificate of four voters, no wire).

python -m bench.run cells [--small]
"""

from __future__ import annotations

import random
from collections.abc import Generator
from time import perf_counter

from bench.micro.state_core import ACCOUNT, ACCOUNT_ID, START_NS, Cluster, Stopwatch, wish
from bench.report import header, row
from formation.core.clock import NS_PER_MS
from formation.core.codec import encode, verify_ed25519
from formation.core.event import DelegationGiven, Topic, ValuePut, event_body
from formation.core.keys import KeyPair
from formation.core.manifest import found_network
from formation.state.checkpoint import StateTree, bucket_number
from formation.state.committee import Committee
from formation.state.effects import Submit, Tick
from formation.state.evidence import founders_of
from formation.state.final_chain import FinalChain
from formation.state.network_cells import CellRecord, NetworkCells, dump_record
from formation.state.op import delegated_op
from formation.state.remote_cell import (
    ProofAnswer,
    ProofAsk,
    ProofSource,
    ReadItem,
    Served,
    answer_ask,
    parse_answer,
    read_item,
)
from formation.state.spine_values import CheckpointRef, Kind, Proposal, Vote, make_final, sign_proposal, sign_vote

BLOCK_OP_COUNT = 64
KEYS = [KeyPair(bytes([i + 1]) * 32) for i in range(4)]
MANIFEST = found_network(
    "root",
    voters=[(f"n{i}", key, ("/ip4/192.0.2.1/tcp/4700",)) for i, key in enumerate(KEYS)],
    founded_ms=START_NS // NS_PER_MS,
)


def per_op(cell_count: int, round_count: int) -> tuple[float, float]:
    """(messages, bytes) of an operation in the first of so many cells that all work."""
    cells = [Cluster(4, Stopwatch()) for _ in range(cell_count)]
    for cell in cells:
        for number, key in enumerate(cell.keys):
            given = DelegationGiven(node_id=key.node_id, verbs=("value.put",), expires_ms=START_NS // NS_PER_MS + 10**9)
            op = wish(given.verb, ACCOUNT_ID, event_body(given), number)
            cell.handle(number, Submit(Topic.ACCOUNT, (op,)))
            cell.run()
        cell.rest(4)
        cell.message_count = cell.size_bytes = 0
    rng = random.Random(1)
    for _ in range(round_count):
        for cell in cells:
            cell.now_ns += 50 * NS_PER_MS
            for index in range(4):
                ops = tuple(
                    delegated_op(
                        ValuePut(value=rng.randbytes(200)), f"{ACCOUNT_ID}/{rng.randrange(4000)}", account=ACCOUNT.public_key
                    )
                    for _ in range(BLOCK_OP_COUNT)
                )
                cell.handle(index, Submit(Topic.VALUE, ops))
                cell.handle(index, Tick())
            cell.run()
    op_count = round_count * 4 * BLOCK_OP_COUNT
    return cells[0].message_count / op_count, cells[0].size_bytes / op_count


def root_of(cell_count: int) -> tuple[StateTree, bytes]:
    """A root's state with so many cells recorded, and the certificate of its checkpoint."""
    tree = StateTree()
    raw = MANIFEST.to_cbor()
    founders = founders_of(MANIFEST)
    record = CellRecord(
        fence=(7, 0), manifest_raw=raw, network_id=MANIFEST.network_id, committee=founders, servers=(), charged=2048
    )
    item = encode(dump_record(record))
    tree.update({(NetworkCells.name, f"cell-{number}"): item for number in range(cell_count)})
    proposal = Proposal(
        epoch=0,
        view=8,
        height=8,
        parent=b"p" * 32,
        time_ms=START_NS // NS_PER_MS,
        cut=(),
        equivocations=(),
        closes=(),
        checkpoint=CheckpointRef(7, tree.root()),
        handover=None,
    )
    entry = sign_proposal(KEYS[founders.leader(8)].sign, proposal, network_id=MANIFEST.network_id)
    votes = [
        sign_vote(KEYS[voter].sign, Kind.FINALIZE, Vote(0, 8, voter, entry.hash), network_id=MANIFEST.network_id)
        for voter in range(3)
    ]
    return tree, encode(FinalChain((), make_final(entry, votes).raw))


def proof_of(tree: StateTree, checkpoint: bytes, source: ProofSource, name: str) -> tuple[int, float, float]:
    """(bytes of the answer, seconds to make it, seconds to verify it)."""
    committee: Committee = founders_of(MANIFEST)
    steps = read_item(
        NetworkCells.name,
        name,
        network_id=MANIFEST.network_id,
        trusted=committee,
        verify=verify_ed25519,
        now_ms=START_NS // NS_PER_MS,
        age_ms_max=None,
    )
    ask = next(steps)
    served = Served(network_id=MANIFEST.network_id, links=(), checkpoint=checkpoint, head=source.head)
    begin_s = perf_counter()
    raw = encode(
        answer_ask(ask, served, lambda section, id_: source.prove(section, id_, tree.bucket(bucket_number(section, id_))))
    )
    made_s = perf_counter()
    found = _end_of(steps, raw)
    verified_s = perf_counter()
    assert found.value == tree.get(NetworkCells.name, name)
    return len(raw), made_s - begin_s, verified_s - made_s


def _end_of(steps: Generator[ProofAsk, ProofAnswer, ReadItem], raw: bytes) -> ReadItem:
    try:
        steps.send(parse_answer(raw))
    except StopIteration as end:
        found: ReadItem = end.value
        return found
    raise AssertionError("one answer is enough")


def main(*, small: bool) -> None:
    """Print the figures."""
    print(header("Cells: four voters each, no wire, no disk; then proofs of a root's records"))
    for cell_count in (1, 2) if small else (1, 4, 16):
        messages, size_bytes = per_op(cell_count, 2 if small else 10)
        print(row(f"{cell_count} cells: messages of an operation", [messages], ""))
        print(row(f"{cell_count} cells: bytes of an operation", [size_bytes], "B"))
    for cell_count in (10, 100) if small else (10, 1_000, 16_000):
        tree, checkpoint = root_of(cell_count)
        source = ProofSource(tree.head(7))
        # The first makes the levels of the tree.
        proof_of(tree, checkpoint, source, "cell-0")
        found = [proof_of(tree, checkpoint, source, f"cell-{number % cell_count}") for number in range(5 if small else 200)]
        print(row(f"{cell_count} cells recorded: a proof", [size for size, _, _ in found], "B"))
        print(row(f"{cell_count} cells recorded: to make it", [1000 * made_s for _, made_s, _ in found], "ms"))
        print(row(f"{cell_count} cells recorded: to verify it", [1000 * verified_s for _, _, verified_s in found], "ms"))
