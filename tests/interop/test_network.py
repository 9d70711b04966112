"""A program in another language in a live network of real processes: joins, verifies, writes, and does harm."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from formation.cli.local_network import LocalNetwork, LocalNode, local_network
from formation.core.errors import NotFoundError, UnavailableError
from formation.core.keys import KeyPair, write_key_file
from formation.core.manifest import read_draft
from formation.p2p.kad import kad_protocol
from tests.interop.conftest import JsError, JsPeer

pytestmark = [pytest.mark.processes, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
WIRE = ROOT / "tests" / "wire"
TOPICS = ["node", "account", "image", "vm", "net", "value", "claim", "committee", "ack", "spine", "evidence"]
QUORUM = 3


def wait_for(condition: Callable[[], Any], *, what: str, timeout_s: float = 40.0) -> Any:
    """Poll a condition of other processes until it holds; what it said then."""
    deadline = time.monotonic() + timeout_s
    while not (said := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {timeout_s:.0f} s: {what}; last: {said!r}")
        time.sleep(0.1)
    return said


def address(network: LocalNetwork, index: int) -> str:
    voter = network.manifest.voters[index]
    return f"{voter.addresses[0]}/p2p/{network.nodes[index].key.node_id}"


def start_observer(network: LocalNetwork) -> LocalNode:
    """A node that does not vote: voters gossip among themselves by links, it is for such as it that they publish."""
    observer = LocalNode("observer", network.folder / "observer", KeyPair.generate())
    observer.folder.mkdir()
    write_key_file(observer.folder / "node.key", observer.key)
    (observer.folder / "config.toml").write_text(
        f'[node]\nname = "observer"\ndata_dir = "{observer.folder}"\nmanifest = "{network.folder / "network.toml"}"\n'
        f'api_socket = "{observer.socket}"\nlisten = ["/ip4/127.0.0.1/tcp/0"]\nhypervisor = "none"\n'
    )
    network.nodes.append(observer)
    network.start(observer)
    return observer


@pytest.fixture(scope="module")
def network() -> Iterator[LocalNetwork]:
    """Four voters and an observer, none of which runs VMs."""
    with local_network(read_draft(ROOT / "peers" / "demo.toml"), node_settings=('hypervisor = "none"',)) as network:
        observer = start_observer(network)
        wait_for(partial(sees_all_voters, observer), what="the observer is connected to the voters")
        yield network


def sees_all_voters(node: LocalNode) -> bool:
    try:
        return sum(bool(peer["connected"]) for peer in node.client.get("/v1/status")["peers"]) >= 4
    except UnavailableError:
        return False


def trusting(js: JsPeer, network: LocalNetwork) -> JsPeer:
    """It knows what the manifest says: the network's id and its founders' keys."""
    voters = [voter.public_key.hex() for voter in network.manifest.voters]
    js("trust", networkId=network.manifest.network_id.hex(), voters=voters)
    return js


def admit(network: LocalNetwork, js: JsPeer) -> None:
    """What an operator types on a voter's machine: `formation voter admit NODE_ID`."""
    said = network.nodes[0].client.post_json("/v1/voters", {"action": "admit", "node": js.node_id})
    assert js.node_id in [node["node_id"] for node in said["admitted"]]


def is_dialled(js: JsPeer, node: LocalNode) -> bool:
    """Whether the node finds and dials the peer when it has something to ask it; the peer hangs up first."""
    js("close", peer=node.key.node_id)
    with pytest.raises(UnavailableError):
        # It has no state to compare: only the way there matters.
        node.client.get("/v1/state/diff", {"peer": js.node_id})
    return {"peer": node.key.node_id, "direction": "inbound"} in js("connections")


def link_to_quorum(network: LocalNetwork, js: JsPeer) -> list[str]:
    """Dial all voters, and open a link to each."""
    linked: list[str] = []
    for index, node in enumerate(network.nodes[:4]):
        js("dial", addr=address(network, index))
        js("link", peer=node.key.node_id)
        linked.append(node.key.node_id)
    return linked


def certify(js: JsPeer, block: dict[str, Any]) -> None:
    """Wait until the peer itself has verified a certificate of its block: acks of 2f+1 voters."""
    wait_for(lambda: js("signers", seq=block["seq"])["count"] >= QUORUM, what="2f+1 voters acknowledge the peer's block")


def op_at(node: LocalNode, block: dict[str, Any]) -> Any:
    try:
        return node.client.get(f"/v1/ops/{block['lane']}-{block['seq']}-0")
    except NotFoundError:
        return {"level": "unknown here"}


def sure_op_at(node: LocalNode, block: dict[str, Any]) -> Any:
    op = op_at(node, block)
    return op if op["level"] in ("certified", "final") else None


def addresses_of(js: JsPeer, node: LocalNode) -> Any:
    return js("findPeer", peer=node.key.node_id)["addresses"]


def meets(js: JsPeer, node: LocalNode) -> bool:
    """Find it by Kademlia, and connect."""
    if not addresses_of(js, node):
        return False
    try:
        js("ping", peer=node.key.node_id)
    except JsError:
        return False
    return True


def value_at(node: LocalNode, query: dict[str, str]) -> Any:
    try:
        return node.client.get("/v1/values", query)
    except NotFoundError:
        return None


def test_schemas_alone_are_enough(start_js: Callable[..., JsPeer]) -> None:
    """Every golden value has the one encoding there, signed ones verify, and crafted ones get the verdict that all give."""
    js = start_js(b"g" * 32)
    said = js("golden", values=str(WIRE / "golden_state.json"), edge=str(WIRE / "ed25519_edge.json"))
    assert said["wrong"] == []
    assert said["count"] == len(json.loads((WIRE / "golden_state.json").read_text()))


@pytest.mark.timeout(150)
def test_a_stranger_finds_its_way_and_follows(network: LocalNetwork, start_js: Callable[..., JsPeer]) -> None:
    """From one address: identify, ping, Kademlia; then all topics. What it cannot verify it would not pass on."""
    js = trusting(start_js(b"s" * 32, network=network.manifest.network_id.hex()), network)
    first, others = network.nodes[0], network.nodes[1:4]
    assert js("dial", addr=address(network, 0)) == {
        "peer": first.key.node_id,
        "encryption": "/noise",
        "multiplexer": "/yamux/1.0.0",
    }
    known = wait_for(
        lambda: (found := js("identity", peer=first.key.node_id))["protocols"] and found, what="identify tells the protocols"
    )
    assert {
        "/formation/link/1",
        "/formation/sync/1",
        kad_protocol(network.manifest.network_id),
        "/meshsub/1.1.0",
        "/ipfs/ping/1.0.0",
    } <= set(known["protocols"])
    assert js("ping", peer=first.key.node_id)["ms"] < 5_000

    # It finds those that it was never told of, and is found and dialled itself.
    for other in others:
        wait_for(partial(addresses_of, js, other), what=f"Kademlia tells where {other.name} is")
    ours = {node.key.node_id for node in network.nodes}
    assert len(set(js("closest", key="00" * 32)["peers"]) & ours) >= 3
    wait_for(partial(is_dialled, js, others[1]), what=f"{others[1].name} dials the peer")

    # Nobody let it in: what it would write is not listened to. A signed wish of an account is taken from anybody.
    js("link", peer=first.key.node_id)
    wait_for(lambda: not js("links")[first.key.node_id], what="a link of a key that was not admitted is closed")
    wish = js("wish", peer=first.key.node_id, accountSeed=(b"w" * 32).hex(), key="hello", value="from a stranger")
    assert wish["object"] == f"{KeyPair(b'w' * 32).account_id}/hello"
    assert sure_op_at(first, wish)["object_id"] == wish["object"], "the answer comes when it is certified"

    wait_for(partial(meets, js, network.nodes[4]), what="the observer is found: it is who listens to gossip")
    js("follow", topics=TOPICS)
    wait_for(
        lambda: any(t["topic"].endswith("/committee") and len(t["subscribers"]) >= 1 for t in js("gossip")),
        what="the observer's subscriptions are known",
    )
    # Any write of a voter's will do: each admission is one. Gossip may lose it, as long as its meshes are being made.
    admitted: list[str] = []

    def told() -> list[dict[str, Any]]:
        admitted.append(KeyPair.generate().node_id)
        first.client.post_json("/v1/voters", {"action": "admit", "node": admitted[-1]})
        time.sleep(0.5)
        return [b for b in js("seen")["blocks"] if "node.admitted" in b["verbs"] and b["from"] == "gossip committee"]

    (block, *_) = wait_for(told, what="the block of an admission comes by gossip")
    seen = js("seen")
    assert seen["bad"] == 0, seen["refused"]
    assert seen["acks"] > 0, "voters' acks come by gossip, and verify"
    assert op_at(first, block)["object_id"] in admitted
    assert op_at(first, block)["lane"] == block["lane"]


@pytest.mark.timeout(150)
def test_its_own_blocks_are_certified_and_final(network: LocalNetwork, start_js: Callable[..., JsPeer]) -> None:
    """An admitted key writes a lane: our nodes certify and order it, a node that asks another gets it, and so does the peer."""
    js = trusting(start_js(b"w" * 32, network=network.manifest.network_id.hex()), network)
    admit(network, js)
    linked = link_to_quorum(network, js)
    block = js("advertise", name="javascript")
    certify(js, block)
    for node in network.nodes:
        op = wait_for(partial(sure_op_at, node, block), what=f"{node.name} says certified")
        assert (op["verb"], op["node_id"], op["void"]) == ("node.advertised", js.node_id, "")
        assert node.name == "observer" or len(op["signers"]) >= QUORUM
    assert "javascript" in [row["name"] for row in network.nodes[3].client.rows("/v1/nodes", "nodes")]

    # An account's wish, carried by the peer: a value that everybody reads.
    wish = js("putValue", accountSeed=(b"a" * 32).hex(), key="greeting", value="from JavaScript")
    assert wish["account"] == KeyPair(b"a" * 32).account_id
    certify(js, wish)
    query = {"account": wish["account"], "key": "greeting", "level": "final"}

    value = wait_for(lambda: value_at(network.nodes[2], query), what="the value is final")
    assert "from JavaScript" in json.dumps(value), value

    # What proves it to people, checked there as schemas/README.md says; any bit of it is covered by some hash or signature.
    file = b"".join(network.nodes[1].client.stream(f"/v1/ops/{block['lane']}-{block['seq']}-0/bundle"))
    said = js("opFile", base64=base64.b64encode(file).decode(), flipCount=400)
    assert (said["verb"], said["objectId"]) == ("node.advertised", js.node_id)
    assert said["height"] >= 1
    assert said["believed"] == [], said

    # Any voter serves its chain. What is final needs no acks any more: they are for what stands above the cut.
    pulled = js("pull", peer=linked[1], lane=block["lane"], last=wish["seq"])
    assert [b["hash"] for b in pulled["blocks"]] == [block["hash"], wish["hash"]]
    assert pulled["blocks"][1]["prev"] == block["hash"]
    hello = js("syncHello", peer=linked[1])
    assert (hello["kind"], hello["size"]) == ("buckets", 2048)
    assert all(js("links").values()), "its links are still open: keep-alives are enough"


@pytest.mark.timeout(150)
def test_rubbish_is_refused_and_harms_nobody(network: LocalNetwork, start_js: Callable[..., JsPeer]) -> None:
    """Bad frames, requests, streams and gossip of an admitted key: scored down, not passed on, banned in the end."""
    bad, good = (
        trusting(start_js(b"b" * 32, network=network.manifest.network_id.hex()), network),
        trusting(start_js(b"h" * 32, network=network.manifest.network_id.hex()), network),
    )
    for js in (bad, good):
        admit(network, js)
        link_to_quorum(network, js)
    certify(good, good("advertise", name="honest"))
    for js in (bad, good):
        wait_for(partial(meets, js, network.nodes[4]), what="the observer is found: it is who listens to gossip")
        js("follow", topics=TOPICS)
    wait_for(lambda: any(t["subscribers"] for t in good("gossip")), what="somebody else is on the topics")

    voters = network.nodes[:4]
    # A few to each, so that nobody bans it before all has been tried.
    for voter, kinds in ((voters[0], ("unknown", "notCbor")), (voters[3], ("forged", "badAck", "otherNetwork"))):
        for what in kinds:
            bad("rubbishFrames", peer=voter.key.node_id, what=what)
        wait_for(partial(has_offences, voter, bad, count=len(kinds)), what=f"{voter.name} scores the peer down")
    with pytest.raises(JsError, match="sync request"):
        bad("badRequest", peer=voters[2].key.node_id)
    bad("rawGossip", peer=voters[2].key.node_id)
    wait_for(partial(has_offences, voters[2], bad, count=1), what="garbage on a gossip stream counts")
    # A length beyond all limits ends that link, at once.
    bad("oversized", peer=voters[1].key.node_id)
    wait_for(lambda: not bad("links")[voters[1].key.node_id], what="the link that claims 4 GiB is closed")
    wait_for(partial(has_offences, voters[1], bad, count=1), what="and it counts")
    assert bad("gossipRubbish", topic="vm", count=40)["recipients"]

    # It does not stop: it is shown the door, and does not come in again.
    wait_for(partial(is_banned_after_more, voters[0], bad), what="too low a score is a ban")
    wait_for(lambda: not bad("links")[voters[0].key.node_id], what="a ban ends its links")
    with pytest.raises(JsError):  # dials, and is hung up on
        bad("syncHello", peer=voters[0].key.node_id)

    # Honest peers are unharmed, by the same nodes at the same time.
    certify(good, good("advertise", name="still-honest"))
    assert all(good("links").values())
    for node in network.nodes:
        assert node.is_running
        assert stands(node, good)["offence_count"] == 0, node.name
    assert network.nodes[0].client.get("/v1/status")["state"]["has_quorum"]
    wait_for(
        lambda: "still-honest" in [row["name"] for row in network.nodes[4].client.rows("/v1/nodes", "nodes")],
        what="the observer has the honest peer's block",
    )
    seen = good("seen")
    assert seen["bad"] == 0, seen["refused"]
    ours = {node.key.node_id for node in network.nodes}
    passed_on = [ignored for ignored in seen["ignored"] if ignored["via"] in ours]
    assert passed_on == [], "our nodes pass nobody's rubbish on"


def stands(node: LocalNode, js: JsPeer) -> Any:
    """How the peer stands with a node: what `formation peer show` says."""
    return node.client.get(f"/v1/peers/{js.node_id}")


def has_offences(node: LocalNode, js: JsPeer, *, count: int) -> bool:
    said = stands(node, js)
    return bool(said["offence_count"] >= count and said["score"] < 0)


def is_banned_after_more(node: LocalNode, js: JsPeer) -> bool:
    """Send one more bad frame, and see."""
    if not stands(node, js)["refused_by"]:
        try:
            js("rubbishFrames", peer=node.key.node_id, what="forged")
        except JsError:
            pass  # it has just been cut off
    return bool(stands(node, js)["refused_by"])
