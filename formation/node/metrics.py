"""What a node tells Prometheus: `GET /metrics`. `docs/metrics.md` lists it, and a test holds the two together.

Labels have few values by construction: protocols and topics are ours, reasons and states are fixed words. No label names a
peer, an account or a VM, of which anybody can make any number.
"""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import trio

from formation import __version__
from formation.core.spec import VmPhase
from formation.node.exposition import Family, Page
from formation.node.reads import Reads
from formation.p2p.service import PeerScore, Reach
from formation.pack.service import PackService

_families: list[Family] = []
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_SIZE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Scores are 0 or below, and -100 is a ban (`p2p.score`).
_SCORE_RANGES = ((-50.0, "-100 to -50"), (-10.0, "-50 to -10"), (0.0, "-10 to 0"))
_SCORE_FINE = "0"
_SCORE_BANNED = "banned"


def _family(kind: str, name: str, text: str, *labels: str) -> Family:
    family = Family(name, kind, text, labels)
    _families.append(family)
    return family


def _gauge(name: str, text: str, *labels: str) -> Family:
    return _family("gauge", name, text, *labels)


def _counter(name: str, text: str, *labels: str) -> Family:
    return _family("counter", name, text, *labels)


BUILD_INFO = _gauge("formation_build_info", "Always 1; the label says which version runs.", "version")

PEERS = _gauge("formation_peers", "Peers, by whether they are connected and whether we know them.", "state")
PEERS_BY_SCORE = _gauge("formation_peers_by_score", "Peers of whom something is noted, by range of their score.", "score")
CONNECTIONS = _gauge("formation_connections", "Connections to peers, in both directions.")
STREAMS = _gauge("formation_streams_inbound", "Streams that peers opened and that are open.")
HANDSHAKES = _gauge("formation_handshakes", "Accepted sockets that have not yet shown whose they are.")
REFUSED = _counter(
    "formation_connections_refused_total",
    "Sockets and connections that were closed for want of a place, or for a bad handshake.",
    "reason",
)
STREAMS_REFUSED = _counter("formation_streams_refused_total", "Streams of peers that were reset: too many at a time.")
NETWORK_BYTES = _counter("formation_network_bytes_total", "Bytes on connections to peers, encrypted.", "direction")

REACHABILITY = _gauge("formation_reachability", "1 at the verdict: whether others can connect to this node.", "state")
RELAYS_HELD = _gauge("formation_relays", "Relays that keep a place for this node.")
RELAY_PLACES = _gauge("formation_relay_reservations", "Places that this node keeps for others.")
RELAY_CIRCUITS = _gauge("formation_relay_circuits", "Circuits between others through this node.")
RELAY_BYTES = _counter("formation_relay_bytes_total", "Bytes relayed for others.")
RELAY_REFUSED = _counter("formation_relay_refused_total", "Places and circuits refused for want of room.", "reason")
RELAY_CUT = _counter("formation_relay_cut_total", "Circuits ended at their limit of bytes or of time.", "reason")
PUNCHED = _counter("formation_hole_punching_total", "Relayed connections of which a direct one was tried.", "state")
DIAL_BACKS_REFUSED = _counter("formation_dial_backs_refused_total", "Peers not dialled back: too often, or elsewhere.")

LINKS = _gauge("formation_links", "Links to voters that are open.")
PROTOCOL_MESSAGES = _counter(
    "formation_protocol_messages_total", "Frames, requests and gossip messages.", "protocol", "direction"
)
PROTOCOL_BYTES = _counter("formation_protocol_bytes_total", "Their payload in bytes.", "protocol", "direction")
DROPPED = _counter("formation_messages_dropped_total", "Messages that were not sent, or not taken.", "reason")
REQUEST_SECONDS = _family(
    "histogram",
    "formation_request_duration_seconds",
    "From asking a connected peer to its answer, or to where it broke off.",
    "protocol",
)
REQUESTS_REFUSED = _counter("formation_requests_refused_total", "Requests not served: malformed, or too many of one peer.")
STREAMS_FAILED = _counter("formation_streams_failed_total", "Streams of peers whose handler ended with an error.")
MESH_DEGREE = _gauge("formation_gossip_mesh_degree", "Peers in the gossip mesh.", "topic")

KAD_SERVER = _gauge("formation_kad_is_server", "1 if this node answers in Kademlia.")
KAD_PEERS = _gauge("formation_kad_table_peers", "Peers in the Kademlia table.")
KAD_RECORDS = _gauge("formation_kad_provider_records", "Provider records: those kept for others, and our own.", "owner")
KAD_LOOKUPS = _counter("formation_kad_lookups_total", "Walks through the network, by how they ended.", "outcome")
KAD_QUESTIONS = _counter("formation_kad_questions_total", "Questions of Kademlia.", "direction")
KAD_UNANSWERED = _counter("formation_kad_questions_unanswered_total", "Questions of this node that nobody answered in time.")

QUORUM = _gauge("formation_state_has_quorum", "1 while enough voters are online for certificates.")
LEVEL = _gauge("formation_state_is_level", "1 if the last sync round found nothing missing here.")
VOTERS = _gauge("formation_state_voters", "Members of the committee, as seen from here.", "state")
ACK_AGE = _gauge("formation_state_ack_age_seconds", "Since the last new ack of the voter that is silent the longest.")
OPERATIONS = _gauge("formation_state_operations", "Operations that this node holds, by how sure they are.", "level")
LANES = _gauge("formation_state_lanes", "Lanes of authors.")
FORKED = _gauge("formation_state_forked_lanes", "Lanes that their authors forked.")
UNCERTIFIED = _gauge("formation_state_uncertified_blocks", "Blocks that wait for a quorum of acks.")
UNCOVERED = _gauge("formation_state_uncovered_blocks", "Certified blocks that wait for the final order.")
EPOCH = _gauge("formation_state_epoch", "Of the committee.")
HEIGHT = _gauge("formation_state_height", "Of the final order, applied here.")
VIEW = _gauge("formation_state_view", "Of the final order's consensus; it rises faster than the height while leaders fail.")
SPINE_TIME = _gauge("formation_state_final_time_seconds", "Time of the newest final block, in seconds since 1970; 0: none.")
CHECKPOINT = _gauge("formation_state_checkpoint_height", "Height of the newest checkpoint that is stored here; 0: none.")
POSITION = _gauge("formation_state_feed_position", "Of the newest change that subscribers were told.")
CLOCK_AHEAD = _gauge("formation_state_clock_ahead_seconds", "How far the newest block waits for its time.")

STORE_BYTES = _gauge("formation_store_size_bytes", "Taken on disk by the replicated state.")
IMAGES = _gauge("formation_images", "Images that are here.")
IMAGE_BYTES = _counter("formation_image_bytes_total", "Of images, to and from peers.", "direction")

VMS = _gauge("formation_vms", "VMs of the network, by phase.", "phase")
VMS_HERE = _gauge("formation_vms_here", "VMs of this node.", "state")
VM_FAULTS = _counter("formation_vm_faults_total", "Steps of this node's VMs that failed.")

TASKS = _gauge("formation_tasks", "Tasks of the node's process.")
CPU = _counter("process_cpu_seconds_total", "CPU time of the node's process, user and system.")
RSS = _gauge("process_resident_memory_bytes", "Resident memory of the node's process.")
VIRTUAL = _gauge("process_virtual_memory_bytes", "Virtual memory of the node's process.")
FDS = _gauge("process_open_fds", "Open file descriptors.")
FDS_MAX = _gauge("process_max_fds", "Limit of open file descriptors.")
STARTED = _gauge("process_start_time_seconds", "When the node's process began, in seconds since 1970.")

FAMILIES = tuple(_families)


def metrics_text(reads: Reads, pack: PackService) -> str:
    """All metrics of this node, now."""
    page = Page()
    page.put(BUILD_INFO, 1, __version__)
    _put_peers(page, reads)
    _put_messages(page, reads)
    _put_kad(page, reads)
    _put_state(page, reads)
    _put_rooms(page, reads, pack)
    put_process(page)
    return page.text(FAMILIES)


def _put_peers(page: Page, reads: Reads) -> None:
    p2p, transport = reads.p2p, reads.p2p.transport_statistics()
    states = Counter(("connected" if peer.connected else "away") if peer.is_known else "stranger" for peer in p2p.peers())
    page.put_all(PEERS, {state: states[state] for state in ("connected", "away", "stranger")})
    page.put_all(PEERS_BY_SCORE, peers_by_score(p2p.scores()))
    page.put(CONNECTIONS, transport.connection_count)
    page.put(STREAMS, transport.stream_count)
    page.put(HANDSHAKES, transport.handshake_count)
    page.put_all(
        REFUSED,
        {
            "handshake_failed": transport.handshake_failed_count,
            "handshake_displaced": transport.handshake_displaced_count,
            "no_place": transport.connection_refused_count,
            "displaced": transport.connection_displaced_count,
        },
    )
    page.put(STREAMS_REFUSED, transport.stream_refused_count)
    page.put_all(NETWORK_BYTES, {"sent": transport.sent_bytes, "received": transport.received_bytes})
    page.put_all(MESH_DEGREE, transport.mesh_degrees)


def peers_by_score(scores: tuple[PeerScore, ...]) -> Mapping[str, int]:
    """How many peers stand in which range."""
    counts = dict.fromkeys((_SCORE_BANNED, *(name for _, name in _SCORE_RANGES), _SCORE_FINE), 0)
    for peer in scores:
        if peer.banned_for_s > 0:
            counts[_SCORE_BANNED] += 1
        else:
            counts[next((name for limit, name in _SCORE_RANGES if peer.score < limit), _SCORE_FINE)] += 1
    return counts


def _put_messages(page: Page, reads: Reads) -> None:
    _put_reachability(page, reads)
    figures, transport = reads.p2p.statistics(), reads.p2p.transport_statistics()
    page.put(LINKS, figures.link_count)
    for protocol, counts in reads.p2p.traffic().items():
        page.put(PROTOCOL_MESSAGES, counts.sent_count, protocol, "sent")
        page.put(PROTOCOL_MESSAGES, counts.received_count, protocol, "received")
        page.put(PROTOCOL_BYTES, counts.sent_bytes, protocol, "sent")
        page.put(PROTOCOL_BYTES, counts.received_bytes, protocol, "received")
        if counts.latency is not None:
            page.put(REQUEST_SECONDS, counts.latency, protocol)
    page.put_all(
        DROPPED,
        {
            "link_full_or_down": figures.frame_dropped_count,
            "link_fault": figures.frame_fault_count,
            "link_rate": reads.state.status().dropped_frame_count,
            "gossip_rejected": figures.gossip_rejected_count,
            "gossip_ignored": figures.gossip_ignored_count,
            "gossip_malformed": transport.gossip_malformed_count,
            "gossip_bad_signature": transport.gossip_bad_signature_count,
            "gossip_duplicate": transport.gossip_duplicate_count,
        },
    )
    page.put(REQUESTS_REFUSED, figures.request_refused_count)
    page.put(STREAMS_FAILED, figures.stream_failed_count)


def _put_kad(page: Page, reads: Reads) -> None:
    kad = reads.p2p.kad_statistics()
    page.put(KAD_SERVER, kad.is_server)
    page.put(KAD_PEERS, kad.contact_count)
    page.put_all(KAD_RECORDS, {"others": kad.record_count, "own": kad.own_key_count})
    page.put_all(KAD_LOOKUPS, kad.lookup_counts)
    page.put_all(KAD_QUESTIONS, {"sent": kad.asked_count, "received": kad.served_count})
    page.put(KAD_UNANSWERED, kad.ask_failed_count)


def _put_reachability(page: Page, reads: Reads) -> None:
    found = reads.p2p.reachability()
    page.put_all(REACHABILITY, {reach.value: int(found.verdict is reach) for reach in Reach})
    page.put(RELAYS_HELD, len(found.relays))
    book, counters = reads.p2p.relay_figures()
    page.put(RELAY_PLACES, book.reservation_count)
    page.put(RELAY_CIRCUITS, book.circuit_count)
    page.put(RELAY_BYTES, counters.size_bytes)
    page.put_all(RELAY_CUT, {"bytes": counters.cut_bytes_count, "time": counters.cut_time_count})
    punched, failed, refused = reads.p2p.punch_figures()
    page.put_all(PUNCHED, {"direct": punched, "still_relayed": failed})
    page.put(DIAL_BACKS_REFUSED, refused)
    page.put_all(RELAY_REFUSED, {"no_place": book.reservation_refused_count, "no_circuit": book.circuit_refused_count})


def _put_state(page: Page, reads: Reads) -> None:
    state = reads.state.status()
    online_count = sum(voter.is_online for voter in state.voters)
    page.put(QUORUM, state.has_quorum)
    page.put(LEVEL, state.is_level)
    page.put_all(VOTERS, {"online": online_count, "silent": len(state.voters) - online_count})
    ages_s = [voter.last_ack_age_s for voter in state.voters if voter.last_ack_age_s is not None]
    page.put(ACK_AGE, max(ages_s, default=0.0))
    page.put_all(
        OPERATIONS,
        {"observed": state.observed_count, "certified": state.certified_count, "final": state.final_count},
    )
    page.put(LANES, state.lane_count)
    page.put(FORKED, state.evidence_count)
    page.put(UNCERTIFIED, state.uncertified_count)
    page.put(UNCOVERED, state.uncovered_count)
    page.put(EPOCH, state.epoch)
    page.put(HEIGHT, state.height)
    page.put(VIEW, state.spine_view)
    page.put(SPINE_TIME, state.spine_time_ms / 1000)
    page.put(CHECKPOINT, state.checkpoint_height)
    page.put(POSITION, state.position)
    page.put(CLOCK_AHEAD, state.clock_ahead_ms / 1000)
    page.put(STORE_BYTES, reads.state.store_size_bytes)


def _put_rooms(page: Page, reads: Reads, pack: PackService) -> None:
    images = pack.statistics()
    page.put(IMAGES, images.image_count)
    page.put_all(IMAGE_BYTES, {"sent": images.served_bytes, "received": images.pulled_bytes})
    phases = Counter(reads.vm(vm)["phase"] for vm in reads.state.view.vms())
    page.put_all(VMS, {phase.value: phases[phase.value] for phase in VmPhase})
    here = reads.vmm.statistics()
    page.put_all(VMS_HERE, {state: here[state] for state in ("held", "running", "working")})
    page.put(VM_FAULTS, here["faults"])


def put_process(page: Page) -> None:
    """The process itself, under the names that every exporter gives it; what the system does not tell is left out."""
    page.put(TASKS, trio.lowlevel.current_statistics().tasks_living)
    times = os.times()
    page.put(CPU, times.user + times.system)
    page.put(FDS_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    for family, value in _proc_values():
        page.put(family, value)


def _proc_values() -> Iterator[tuple[Family, float]]:
    try:
        virtual, resident = Path("/proc/self/statm").read_text().split()[:2]
        yield VIRTUAL, int(virtual) * _PAGE_SIZE_BYTES
        yield RSS, int(resident) * _PAGE_SIZE_BYTES
        yield FDS, len(os.listdir("/proc/self/fd"))
        # Behind the command's name, which may hold blanks and brackets; field 22 of proc(5).
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
        yield STARTED, int(booted.split()[1]) + ticks / _TICKS_PER_S
    except (OSError, StopIteration):
        return
