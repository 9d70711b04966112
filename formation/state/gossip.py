"""What followers hear: voters' own blocks, acks and evidence, coalesced per topic at a bounded rate. Pure.

Gossip is a convenience. It may be lost, late or switched off, and everything still converges by sync. Who hears by it and
who is sent frames directly, what is taken from whom, and when there is anything to publish is decided here; the service
and the simulator (tests/sim) carry it out alike.

Who hears whom. Only voters publish, followers pass on what voters published, and a voter publishes a topic only while a
peer of it takes part in it: a network of voters alone sends no gossip. A follower that is connected to a quorum of voters
hears certificates complete. Others may sit behind one voter only, whose own words certify nothing: such a follower takes
part in one more topic, in which nothing is ever sent (TOPIC_RELAY). A voter with such a neighbour takes part in all topics
itself and passes on what the other voters publish, which they do because it takes part. Voters hear one another by their
links, so this costs them only where it is needed. Hence: voters have to reach each other directly; a follower needs any
one path to a voter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError
from formation.core.event import Topic
from formation.core.ids import NetworkId, NodeId, node_id_of
from formation.state.committee import Committee
from formation.state.fold import State

# One message; p2p's own limit is 512 KiB.
MESSAGE_SIZE_MAX_BYTES = 480 * 1024
# Frames that wait for the next message of a topic; the oldest go first, sync brings them.
OUTBOX_SIZE_MAX_BYTES = 2 * 1024 * 1024
MESSAGE_FRAME_COUNT_MAX = 1024
# Links of a voter to nodes that write and do not vote: a few times a committee. Others send through sync and gossip.
LINKED_COUNT_MAX = 128
# Observers see what is new within this time, and one message a topic carries all of it.
INTERVAL_S = 0.05
TOPIC_ACK = "ack"
TOPIC_SPINE = "spine"
TOPIC_EVIDENCE = "evidence"
# Followers that do not reach a quorum of voters themselves take part in it; nothing is sent there.
TOPIC_RELAY = "relay"
# How often those who pass gossip on are looked for: followers have sync until then.
RELAY_INTERVAL_S = 1.0
TOPICS = (*(topic.value for topic in Topic), TOPIC_ACK, TOPIC_SPINE, TOPIC_EVIDENCE)


def topic_name(network_id: NetworkId, topic: str) -> str:
    """The gossip topic of this network."""
    return f"formation/{network_id.hex()[:16]}/{topic}"


def pack_frames(frames: tuple[bytes, ...]) -> bytes:
    """One gossip message."""
    return encode(frames)


def unpack_frames(data: bytes) -> tuple[bytes, ...]:
    """The frames of a gossip message.

    Raises:
      DecodeError: not a list of frames.
    """
    frames = decode(data, tuple[bytes, ...], what="gossip message")
    if len(frames) > MESSAGE_FRAME_COUNT_MAX:
        raise DecodeError("gossip message: too many frames")
    return frames


def linked_nodes(state: State, public_key: bytes) -> frozenset[NodeId]:
    """Those with whom this node exchanges frames directly: the voters, and, if it votes, nodes that were admitted."""
    voters = state.committee.committee.node_ids
    own = node_id_of(public_key)
    linked: set[NodeId] = set()
    if own in voters:
        linked.update(voters, map(node_id_of, sorted(state.admitted)[:LINKED_COUNT_MAX]))
    elif public_key in state.admitted:
        linked.update(voters)
    return frozenset(linked - {own})


def needs_relay(connected: Iterable[NodeId], *, committee: Committee, own: NodeId) -> bool:
    """Whether this node asks its neighbours that vote to pass on what the others publish."""
    voters = frozenset(committee.node_ids)
    return own not in voters and len(voters & frozenset(connected)) < committee.quorum_size


def takes_part(*, own: NodeId, voters: Iterable[NodeId], has_relay_seekers: bool) -> bool:
    """Whether this node takes part in the topics: followers always, voters while a neighbour needs them to pass things on."""
    return has_relay_seekers or own not in voters


def take_message(author: NodeId, data: bytes, *, voters: Iterable[NodeId]) -> tuple[bytes, ...] | None:
    """The frames to look at in a message whose author is proven; None: it is ignored.

    Then its author does not vote here; it may elsewhere, where another epoch is known.
    Frames are as hostile as those of any peer, and count against the author's rate (`limits.PeerLimits`).

    Raises:
      DecodeError: it is no message, whoever sent it; it is not passed on.
    """
    frames = unpack_frames(data)
    return frames if author in voters else None


class Outbox:
    """Frames that wait to be published."""

    __slots__ = ("_frames", "_sizes")

    def __init__(self) -> None:
        self._frames: dict[str, deque[bytes]] = {}
        self._sizes: dict[str, int] = {}

    def put(self, topic: str, frame: bytes) -> None:
        """Add a frame; drops the oldest of its topic when there are too many."""
        frames = self._frames.setdefault(topic, deque())
        frames.append(frame)
        self._sizes[topic] = self._sizes.get(topic, 0) + len(frame)
        while self._sizes[topic] > OUTBOX_SIZE_MAX_BYTES:
            self._sizes[topic] -= len(frames.popleft())

    def take_messages(self) -> tuple[tuple[str, bytes], ...]:
        """At most one (topic, message) per topic."""
        return tuple((topic, pack_frames(self._take(topic))) for topic, frames in self._frames.items() if frames)

    def _take(self, topic: str) -> tuple[bytes, ...]:
        frames, size_bytes = self._frames[topic], 0
        taken: list[bytes] = []
        while (
            frames
            and len(taken) < MESSAGE_FRAME_COUNT_MAX
            and (not taken or size_bytes + len(frames[0]) <= MESSAGE_SIZE_MAX_BYTES)
        ):
            size_bytes += len(frames[0])
            taken.append(frames.popleft())
        self._sizes[topic] -= size_bytes
        return tuple(taken)
