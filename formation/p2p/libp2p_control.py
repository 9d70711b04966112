"""What of a peer's gossip control messages reaches the router of libp2p 0.8.1.

The router trusts them: an IWANT that names one message of 512 KiB ten thousand times has 5 GB built for it; PRUNEs for
invented topics are remembered for ever; a PRUNE's peer exchange makes it dial whatever a stranger names; the ids of
IDONTWANT (of a version that we do not speak) are kept without end. So each RPC's control part is made anew here, from what
a correct peer of version 1.1 sends.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from libp2p.pubsub.pb import rpc_pb2

# As in go-libp2p-pubsub (GossipSubMaxIHaveLength).
ID_COUNT_MAX = 5000
# Author (38 bytes), sequence number (8), as hexadecimal digits: 92; other implementations' may be longer.
ID_LENGTH_MAX = 256
# What one IWANT may have us send: as much as one RPC holds, so that asking costs about a hundredth of answering at most.
ANSWER_SIZE_MAX_BYTES = 1 << 20


def bounded_control(control: Any, topics: Container[str], size_of: Callable[[bytes], int]) -> Any:
    """The part of a control message that is acted on.

    Args:
      topics: ours; what is said of others is not our business.
      size_of: the size in bytes of a message that we can send again, by its id on the wire; 0 if there is none.
    """
    bounded = rpc_pb2.ControlMessage()
    left = ID_COUNT_MAX
    for ihave in control.ihave:
        if ihave.topicID in topics and left > 0:
            ids = [each for each in ihave.messageIDs[:left] if len(each) <= ID_LENGTH_MAX]
            bounded.ihave.append(rpc_pb2.ControlIHave(topicID=ihave.topicID, messageIDs=ids))
            left -= len(ihave.messageIDs)
    if wanted := _wanted(control, size_of):
        bounded.iwant.append(rpc_pb2.ControlIWant(messageIDs=wanted))
    for topic in {graft.topicID for graft in control.graft if graft.topicID in topics}:
        bounded.graft.append(rpc_pb2.ControlGraft(topicID=topic))
    # Without the peers to dial instead: discovery has its own sources.
    for topic, backoff in {prune.topicID: prune.backoff for prune in control.prune if prune.topicID in topics}.items():
        bounded.prune.append(rpc_pb2.ControlPrune(topicID=topic, backoff=backoff))
    return bounded


def _wanted(control: Any, size_of: Callable[[bytes], int]) -> list[Any]:
    wanted: dict[Any, None] = {}
    left, size_bytes = ID_COUNT_MAX, 0
    for iwant in control.iwant:
        for message_id in iwant.messageIDs[:left]:
            left -= 1
            if message_id in wanted or len(message_id) > ID_LENGTH_MAX or not (size := size_of(message_id)):
                continue
            if size_bytes + size > ANSWER_SIZE_MAX_BYTES:
                return list(wanted)
            size_bytes += size
            wanted[message_id] = None
    return list(wanted)
