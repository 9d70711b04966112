"""What of gossip's control messages is acted on."""

from __future__ import annotations

from typing import Any

from libp2p.pubsub.pb import rpc_pb2

from formation.p2p.libp2p_control import ANSWER_SIZE_MAX_BYTES, ID_COUNT_MAX, ID_LENGTH_MAX, bounded_control

TOPICS = {"ours"}


def bounded(size_bytes: int = 100, **parts: Any) -> Any:
    return bounded_control(rpc_pb2.ControlMessage(**parts), TOPICS, lambda message_id: size_bytes)


def ids(count: int) -> list[bytes]:
    return [b"%d" % index for index in range(count)]


def test_a_message_is_sent_again_once_however_often_it_is_asked_for() -> None:
    """Unbounded, 64 KB of questions have gigabytes built."""
    control = bounded(iwant=[rpc_pb2.ControlIWant(messageIDs=[b"1"] * 1000), rpc_pb2.ControlIWant(messageIDs=[b"1", b"2"])])
    assert [list(iwant.messageIDs) for iwant in control.iwant] == [[b"1", b"2"]]


def test_an_answer_is_bounded_in_bytes() -> None:
    """By what one RPC holds."""
    control = bounded(ANSWER_SIZE_MAX_BYTES // 3, iwant=[rpc_pb2.ControlIWant(messageIDs=ids(100))])
    assert len(control.iwant[0].messageIDs) == 3


def test_ids_are_bounded_in_number_and_length() -> None:
    """Of all parts together; and those that nobody has are not asked for."""
    long = b"x" * (ID_LENGTH_MAX + 1)
    control = bounded(
        1,
        ihave=[rpc_pb2.ControlIHave(topicID="ours", messageIDs=[long, *ids(ID_COUNT_MAX)]) for _ in range(3)],
        iwant=[rpc_pb2.ControlIWant(messageIDs=[long, *ids(2 * ID_COUNT_MAX)])],
    )
    assert [len(ihave.messageIDs) for ihave in control.ihave] == [ID_COUNT_MAX - 1]
    assert [len(iwant.messageIDs) for iwant in control.iwant] == [ID_COUNT_MAX - 1]
    assert not bounded(0, iwant=[rpc_pb2.ControlIWant(messageIDs=ids(9))]).iwant


def test_topics_that_are_not_ours_are_passed_by() -> None:
    """The router would remember each for ever."""
    control = bounded(
        graft=[rpc_pb2.ControlGraft(topicID=topic) for topic in ("ours", "other", "ours")],
        prune=[rpc_pb2.ControlPrune(topicID=topic, backoff=5) for topic in ("ours", "other")],
        ihave=[rpc_pb2.ControlIHave(topicID="other", messageIDs=ids(3))],
    )
    assert [graft.topicID for graft in control.graft] == ["ours"]
    assert [(prune.topicID, prune.backoff) for prune in control.prune] == [("ours", 5)]
    assert not control.ihave


def test_peers_that_a_stranger_names_are_not_dialled() -> None:
    """Nor is anything kept of versions that we do not speak."""
    control = bounded(
        prune=[rpc_pb2.ControlPrune(topicID="ours", peers=[rpc_pb2.PeerInfo(peerID=b"x")])],
        idontwant=[rpc_pb2.ControlIDontWant(messageIDs=ids(10))],
    )
    assert not control.prune[0].peers
    assert not control.idontwant
