"""What a node answers about the replicated state, for the fake node."""

from __future__ import annotations

from typing import Any

from formation.core.errors import ConflictError, UnavailableError
from tests.unit.cli.fake_node import NODE_1, NODE_2

LANE = "8a" * 32 + "01a20ff241080000d237"
AT_MS = 1_700_000_000_000


def answers() -> dict[str, Any]:
    """Path → answer."""
    op_id = f"{LANE}-7-0"
    return {
        "state": state(),
        "state/diff": diff(),
        "voters": voters(),
        "peers": peers(),
        "peers/n2": peers()[0],
        "peers/n3": peers()[1],
        "peers/12D3": ConflictError("'12D3' matches 3 of kind peer", hint="give the full id"),
        "POST peers/n2/ban": peers()[0] | {"connected": False, "linked": False, "refused_by": "ban", "banned_for_s": None},
        "POST peers/n3/unban": peers()[1] | {"refused_by": "", "banned_for_s": 0.0, "was_banned": True},
        "POST peers/n2/unban": peers()[0] | {"was_banned": False},
        "POST peers/n4/unban": peers()[2] | {"was_banned": False},
        "POST peers/n2/ping": {"node_id": NODE_2, "name": "n2", "latency_ms": 2.31},
        "POST peers/n3/ping": UnavailableError("n3 does not answer within 15 s", hint="formation peer show n3"),
        "net": net() | {"verdict": "private", "is_reached": False, "relays": [], "relayed_peers": []},
        "POST net/check": net(),
        f"ops/{op_id}": op(op_id),
        "ops/00112233": op(op_id, void="held by n2 since height 3"),
        "ops/44556677": op(op_id, level="observed"),
    }


def net() -> dict[str, Any]:
    address = {"address": "/ip4/203.0.113.9/tcp/4700", "is_reachable": False, "ok_count": 0, "failed_count": 2}
    family = {"family": "IPv4", "verdict": "private", "nat": "endpoint-independent", "is_punchable": True, "asked_count": 2}
    return {
        "verdict": "private",
        "is_reached": True,
        "listen": ["/ip4/0.0.0.0/tcp/4700"],
        "families": [family | {"seen_as": [address["address"]], "addresses": [address | {"why": "no answer in time"}]}],
        "relays": [{"node_id": NODE_2, "name": "n2", "addresses": [], "expires_in_s": 3540}],
        "relay_refusals": [
            {"node_id": f"12D3KooW{'D' * 43}4", "name": "n4", "why": "permission denied: it does not relay for us"}
        ],
        "relayed_peers": [{"node_id": f"12D3KooW{'C' * 43}3", "name": "n3", "why": "being tried"}],
        "silent_peers": [{"node_id": f"12D3KooW{'D' * 43}4", "name": "n4", "why": "does not dial back: asked too often"}],
        "answers_in_kademlia": False,
        "serves_as_relay": False,
        "checked_ago_s": 0.1,
        "advice": "forward TCP port 4700",
    }


def seats() -> list[dict[str, Any]]:
    return [
        {"name": f"n{i}", "node_id": f"12D3KooW{i}", "addresses": [f"/ip4/192.0.2.{i}/tcp/4700"], "online": i < 4}
        | {"last_ack_age_s": None if i == 4 else 0.2 * i}
        for i in range(1, 5)
    ]


def peers() -> list[dict[str, Any]]:
    fields = {"connected": False, "linked": False, "is_known": False, "is_voter": False, "addresses": []}
    clean = {"score": 0.0, "offence_count": 0, "last_offence": "", "refused_by": "", "banned_for_s": 0.0}
    guilty = {"score": -62.5, "offence_count": 5, "last_offence": "bad-signature", "refused_by": "score", "banned_for_s": 241.0}
    return [
        {"node_id": NODE_2, "name": "n2", "since_s": 3725.0}
        | fields
        | clean
        | {"connected": True, "linked": True, "is_voter": True, "is_known": True, "addresses": ["/ip4/192.0.2.2/tcp/4700"]},
        {"node_id": f"12D3KooW{'C' * 43}3", "name": "n3", "since_s": None} | fields | guilty,
        {"node_id": f"12D3KooW{'D' * 43}4", "name": "n4", "since_s": 12.0} | fields | clean | {"refused_by": "deny_peers"},
    ]


def voters() -> dict[str, Any]:
    command = "formation voter replace n4 e=12D3KooWe@/ip4/192.0.2.5/tcp/4700"
    return {
        "epoch": 2,
        "quorum_size": 3,
        "seats": seats(),
        "proposals": [
            {"command": command, "seats": [], "by": ["n1"], "agreed_count": 1, "needed_count": 3, "missing": ["n2", "n3", "n4"]}
        ],
        "decided": None,
        "admitted": [{"node_id": NODE_2, "name": "attic", "by": "n1"}],
    }


def lane(name: str, *, head: int, certified: int, final: int, condition: str = "open") -> dict[str, Any]:
    return {
        "lane": LANE,
        "node_id": NODE_1,
        "name": name,
        "opened_ms": AT_MS,
        "condition": condition,
        "head_seq": head,
        "certified_seq": certified,
        "final_seq": final,
        "lag_count": head - final,
        "lag_ms": 1_500 if head > final else 0,
    }


def state() -> dict[str, Any]:
    return {
        "network_id": "07" * 32,
        "node_id": NODE_1,
        "name": "n1",
        "is_voter": True,
        "may_write": True,
        "epoch": 2,
        "has_quorum": True,
        "quorum_size": 3,
        "is_level": True,
        "observed_count": 20,
        "certified_count": 18,
        "final_count": 15,
        "uncertified_count": 2,
        "uncovered_count": 3,
        "spine": {"height": 9, "view": 12, "time_ms": AT_MS, "is_waiting": True, "silent": ["n4"]},
        "voters": seats(),
        "lane_count": 3,
        "lanes": [
            lane("n3", head=9, certified=7, final=4),
            lane("n1", head=7, certified=7, final=7),
            lane("n2", head=3, certified=3, final=3, condition="forked"),
        ],
        "banned": [
            {"node_id": NODE_2, "name": "n2", "why": "two blocks", "height": 0},
            {"node_id": NODE_1, "name": "n1", "why": "two votes", "height": 7},
        ],
        "checkpoint": {"height": 6, "root": "ab" * 32, "time_ms": AT_MS, "age_ms": 61_000},
        "disk_size_bytes": 64 << 20,
        "clock_ahead_ms": 1_250,
    }


def diff() -> dict[str, Any]:
    side = {"epoch": 2, "view": 12}
    return {
        "node": {"node_id": NODE_1, "name": "n1", "height": 9} | side,
        "peer": {"node_id": NODE_2, "name": "n2", "height": 8} | side,
        "is_same": False,
        "lane_count": 2,
        "lanes": [
            {"lane": LANE, "node_id": NODE_1, "name": "n1", "is_forked": False}
            | {"here": {"head_seq": 9, "certified_seq": 8, "is_frozen": False}}
            | {"there": {"head_seq": 7, "certified_seq": 7, "is_frozen": False}},
            {"lane": LANE, "node_id": NODE_2, "name": "n2", "is_forked": False}
            | {"here": None, "there": {"head_seq": 1, "certified_seq": 0, "is_frozen": True}},
        ],
    }


def op(op_id: str, *, level: str = "final", void: str = "") -> dict[str, Any]:
    is_final = level == "final"
    return {
        "op": op_id,
        "lane": LANE,
        "seq": 7,
        "index": 0,
        "verb": "claim.made",
        "object_id": "handle/alice",
        "class": "O",
        "fields": {"ttl_ms": 0, "note": ""},
        "node_id": NODE_1,
        "node": "n1",
        "account": "did:key:z6Mkowner",
        "is_delegated": False,
        "trace_id": "00112233aabbccdd",
        "at_ms": AT_MS,
        "level": level,
        "signers": ["n1", "n2", "n3"] if is_final else [],
        "quorum_size": 3,
        "height": 4 if is_final else 0,
        "final_index": 1 if is_final else 0,
        "final_signers": ["n1", "n3", "n4"] if is_final else [],
        "void": void,
    }
