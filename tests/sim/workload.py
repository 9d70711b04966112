"""What the correct nodes' users do meanwhile: operations of every class, contended on purpose.

Few accounts, few keys, few VMs: almost everything meets something else that is under way.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from formation.core.clock import NS_PER_MS
from formation.core.codec import Sign
from formation.core.event import (
    AccountKeyRotated,
    AccountRecoverySet,
    AccountRegistered,
    ClaimMade,
    ClaimReleased,
    ClaimRenewed,
    ClaimTransferred,
    CommitteeProposed,
    DelegationGiven,
    DelegationRevoked,
    Event,
    GrantGiven,
    GrantRevoked,
    ImageDropped,
    ImageHeld,
    NodeAdmitted,
    NodeAdvertised,
    NodeDismissed,
    OwnershipTransferred,
    Seat,
    Topic,
    ValueCounted,
    ValuePut,
    VmClaimed,
    VmDeleted,
    VmDesired,
    VmRequested,
    event_body,
)
from formation.core.ids import NetworkId, account_id_of, vm_id_of
from formation.core.intent import Intent, SignedIntent, sign_intent
from formation.core.spec import Desired, Resources
from formation.state.op import PlainOp, delegated_op, event_op, intent_op

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster, Node

NETWORK_ID = NetworkId(b"n" * 32)
IMAGE = "sha256:" + "a" * 64
ACCOUNT_COUNT = 3
LEASE_TTL_MS = 4_000

MIXES: dict[str, dict[str, int]] = {
    "plain": {"value": 5, "signed_value": 2, "counted": 2, "advertised": 2, "image": 2, "request": 1, "desired": 1},
    "claims": {
        "value": 3,
        "image": 1,
        "request": 2,
        "place": 4,
        "place_move": 1,
        "place_release": 1,
        "handle": 2,
        "name": 2,
        "address": 3,
        "seat": 1,
        "claim_more": 4,
        "delete": 1,
        "desired": 1,
    },
    "accounts": {
        "value": 4,
        "signed_value": 2,
        "replay": 3,
        "request": 2,
        "desired": 4,
        "grant": 3,
        "revoke": 2,
        "transfer": 1,
        "rotate": 1,
        "recovery": 1,
        "delegate": 2,
        "undelegate": 1,
        "delete": 1,
        "registered": 1,
    },
    "leases": {"request": 1, "place": 8, "renew": 8, "place_release": 1, "place_move": 1, "value": 1},
}


def public_key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def fake_sign(key: bytes) -> Sign:
    """A keyed hash: as good as a signature where nobody computes it for others, and forty times cheaper."""
    return lambda message: hashlib.sha512(key + message).digest()


def fake_verify(key: bytes, message: bytes, signature: bytes) -> bool:
    return hashlib.sha512(key + message).digest() == signature


class Workload:
    """Makes the next operation for a node; remembers what there is to fight about."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._rng: random.Random = cluster.rng
        self.keys = [public_key(f"account{i}") for i in range(ACCOUNT_COUNT)]
        self.accounts = [account_id_of(key) for key in self.keys]
        self.signing: dict[str, list[bytes]] = {account: [key] for account, key in zip(self.accounts, self.keys, strict=True)}
        """Keys with which somebody might sign for the account, in force or not."""
        self.vms: list[str] = []
        self.wishes: list[tuple[Topic, PlainOp]] = []
        """Intents that were sent; anybody may carry them again."""

    # ── intents ──

    def wish(
        self, account: int, event: Event, object_id: str, *, key: bytes | None = None
    ) -> tuple[Topic, PlainOp, SignedIntent]:
        now_ms = self._cluster.now_ns // NS_PER_MS
        account_id = self.accounts[account]
        if key is None:
            key = self._rng.choice(self.signing[account_id])
        intent = Intent(
            account=self.keys[account],
            verb=event.verb,
            object_id=object_id,
            body=event_body(event),
            nonce=self._rng.randbytes(16),
            created_ms=now_ms,
            expires_ms=now_ms + self._rng.choice((20, 60_000, 600_000)),
            key=key,
        )
        signed = sign_intent(fake_sign(key), intent, network_id=NETWORK_ID)
        target = vm_id_of(signed.digest) if isinstance(event, VmRequested) else object_id
        made = event.topic, intent_op(signed, target, op_class=event.op_class)
        self.wishes.append(made)
        return *made, signed

    def delegations(self) -> list[tuple[Topic, PlainOp]]:
        """What lets every founder write in every account's name: most of it for long, some of it not."""
        made = []
        now_ms = self._cluster.now_ns // NS_PER_MS
        verbs = (
            "value.put",
            "value.counted",
            "vm.desired",
            "claim.made",
            "claim.released",
            "claim.renewed",
            "claim.transferred",
        )
        for index, account_id in enumerate(self.accounts):
            for node in self._cluster.founders():
                life_ms = self._rng.choice((500, 3_600_000, 3_600_000))
                event = DelegationGiven(node_id=node.node_id, verbs=verbs, expires_ms=now_ms + life_ms)
                made.append(self.wish(index, event, account_id, key=self.keys[index])[:2])
        return made

    # ── one operation ──

    def make(self, node: Node, mix: str) -> tuple[Topic, PlainOp]:
        """Something for this node to write now."""
        weights = MIXES[mix]
        name = self._rng.choices(list(weights), list(weights.values()))[0]
        made: tuple[Topic, PlainOp] = getattr(self, "_" + name)(node)
        return made

    def _own(self, node: Node, event: Event, object_id: str) -> tuple[Topic, PlainOp]:
        return event.topic, event_op(event, object_id)

    def _delegated(self, event: Event, object_id: str, account: int) -> tuple[Topic, PlainOp]:
        return event.topic, delegated_op(event, object_id, account=self.keys[account])

    def _account(self) -> int:
        return self._rng.randrange(ACCOUNT_COUNT)

    def _value(self, node: Node) -> tuple[Topic, PlainOp]:
        account = self._account()
        event = ValuePut(value=self._rng.randbytes(8))
        return self._delegated(event, f"{self.accounts[account]}/k{self._rng.randrange(4)}", account)

    def _signed_value(self, node: Node) -> tuple[Topic, PlainOp]:
        account = self._account()
        event = ValuePut(value=self._rng.randbytes(8))
        return self.wish(account, event, f"{self.accounts[account]}/k{self._rng.randrange(4)}")[:2]

    def _counted(self, node: Node) -> tuple[Topic, PlainOp]:
        account = self._account()
        return self._delegated(ValueCounted(delta=self._rng.randint(-5, 5)), f"{self.accounts[account]}/n", account)

    def _advertised(self, node: Node) -> tuple[Topic, PlainOp]:
        event = NodeAdvertised(
            name=f"{node.name}-{self._rng.getrandbits(16)}",
            addresses=(),
            public_address="",
            capacity=Resources(vcpus=1, memory_mib=1, disk_gib=1),
            hypervisor="",
            version="",
        )
        return self._own(node, event, node.node_id)

    def _image(self, node: Node) -> tuple[Topic, PlainOp]:
        return self._own(node, self._rng.choice((ImageHeld(), ImageDropped())), IMAGE)

    def _registered(self, node: Node) -> tuple[Topic, PlainOp]:
        account = self._account()
        return self.wish(account, AccountRegistered(label=f"l{self._rng.getrandbits(8)}"), self.accounts[account])[:2]

    def _request(self, node: Node) -> tuple[Topic, PlainOp]:
        if len(self.vms) >= 3:
            return self._value(node)
        event = VmRequested(name=f"vm{len(self.vms)}", image=IMAGE, image_name="i", vcpus=1, memory_mib=128, disk_gib=1)
        topic, op, signed = self.wish(self._account(), event, "")
        self.vms.append(vm_id_of(signed.digest))
        return topic, op

    def _vm(self) -> str:
        return self._rng.choice(self.vms) if self.vms else "vm-" + "a" * 16

    def _desired(self, node: Node) -> tuple[Topic, PlainOp]:
        event = VmDesired(desired=self._rng.choice(tuple(Desired)), generation=self._rng.getrandbits(8))
        if self._rng.random() < 0.4:
            return self._delegated(event, self._vm(), self._account())
        return self.wish(self._account(), event, self._vm())[:2]

    def _delete(self, node: Node) -> tuple[Topic, PlainOp]:
        return self.wish(self._account(), VmDeleted(), self._vm())[:2]

    # ── claims ──

    def _place(self, node: Node) -> tuple[Topic, PlainOp]:
        return self._own(
            node, VmClaimed(why="it fits", ttl_ms=self._rng.choice((2_000, LEASE_TTL_MS, LEASE_TTL_MS))), self._vm()
        )

    def _renew(self, node: Node) -> tuple[Topic, PlainOp]:
        key = self._vm() if self._rng.random() < 0.7 else ""
        return self._own(node, ClaimRenewed(), f"placement/{key}")

    def _place_release(self, node: Node) -> tuple[Topic, PlainOp]:
        return self._own(node, ClaimReleased(), f"placement/{self._vm()}")

    def _place_move(self, node: Node) -> tuple[Topic, PlainOp]:
        to = self._rng.choice(self._cluster.founders()).node_id
        return self._own(node, ClaimTransferred(to=to), f"placement/{self._vm()}")

    def _as_account(self, event: Event, object_id: str) -> tuple[Topic, PlainOp]:
        account = self._account()
        if self._rng.random() < 0.5:
            return self._delegated(event, object_id, account)
        return self.wish(account, event, object_id)[:2]

    def _handle(self, node: Node) -> tuple[Topic, PlainOp]:
        return self._as_account(ClaimMade(ttl_ms=0), f"handle/h{self._rng.randrange(2)}")

    def _name(self, node: Node) -> tuple[Topic, PlainOp]:
        return self._as_account(ClaimMade(ttl_ms=0), f"name/n{self._rng.randrange(2)}.example")

    def _address(self, node: Node) -> tuple[Topic, PlainOp]:
        return self._own(node, ClaimMade(ttl_ms=self._rng.choice((0, 2_000))), f"address/10.0.0.{self._rng.randrange(2)}")

    def _seat(self, node: Node) -> tuple[Topic, PlainOp]:
        return self._own(node, ClaimMade(ttl_ms=0), f"seat/s{self._rng.randrange(2)}")

    def _claim_more(self, node: Node) -> tuple[Topic, PlainOp]:
        """Renew, hand over or let go, whether one holds it or not."""
        kind: Callable[[str], Event] = self._rng.choice(
            (lambda _: ClaimRenewed(), lambda to: ClaimTransferred(to=to), lambda _: ClaimReleased())
        )
        if self._rng.random() < 0.5:
            key = f"address/10.0.0.{self._rng.randrange(2)}"
            to = self._rng.choice(self._cluster.founders()).node_id
            return self._own(node, kind(to), key)
        key = self._rng.choice((f"handle/h{self._rng.randrange(2)}", f"name/n{self._rng.randrange(2)}.example"))
        return self._as_account(kind(self._rng.choice(self.accounts)), key)

    # ── accounts ──

    def _replay(self, node: Node) -> tuple[Topic, PlainOp]:
        return self._rng.choice(self.wishes) if self.wishes else self._value(node)

    def _grant(self, node: Node) -> tuple[Topic, PlainOp]:
        event = GrantGiven(account=self._rng.choice(self.accounts), level=self._rng.randint(1, 3))
        return self.wish(self._account(), event, self._vm())[:2]

    def _revoke(self, node: Node) -> tuple[Topic, PlainOp]:
        return self.wish(self._account(), GrantRevoked(account=self._rng.choice(self.accounts)), self._vm())[:2]

    def _transfer(self, node: Node) -> tuple[Topic, PlainOp]:
        return self.wish(self._account(), OwnershipTransferred(to=self._rng.choice(self.accounts)), self._vm())[:2]

    def _rotate(self, node: Node) -> tuple[Topic, PlainOp]:
        account = self._account()
        account_id = self.accounts[account]
        new_key = public_key(f"rotated{self._rng.randrange(4)}")
        wish = self.wish(account, AccountKeyRotated(new_key=new_key), account_id)[:2]
        self.signing[account_id].append(new_key)
        return wish

    def _recovery(self, node: Node) -> tuple[Topic, PlainOp]:
        account = self._account()
        account_id = self.accounts[account]
        key = self._rng.choice((b"", public_key(f"recovery{account}")))
        wish = self.wish(account, AccountRecoverySet(recovery_key=key), account_id)[:2]
        if key:
            self.signing[account_id].append(key)
        return wish

    def _delegate(self, node: Node) -> tuple[Topic, PlainOp]:
        account = self._account()
        now_ms = self._cluster.now_ns // NS_PER_MS
        event = DelegationGiven(
            node_id=self._rng.choice(self._cluster.founders()).node_id,
            verbs=self._rng.choice((("value.put",), ("value.put", "vm.desired", "claim.made"))),
            prefix=self._rng.choice(("", self.accounts[account])),
            expires_ms=now_ms + self._rng.choice((-5, 300, 60_000)),
        )
        return self.wish(account, event, self.accounts[account])[:2]

    def _undelegate(self, node: Node) -> tuple[Topic, PlainOp]:
        account = self._account()
        event = DelegationRevoked(node_id=self._rng.choice(self._cluster.founders()).node_id)
        return self.wish(account, event, self.accounts[account])[:2]

    # ── the committee ──

    def propose(self, seats: tuple[Seat, ...], epoch: int) -> tuple[Topic, PlainOp]:
        return Topic.COMMITTEE, event_op(CommitteeProposed(voters=seats), f"epoch/{epoch}")

    def admit(self, node_id: str) -> tuple[Topic, PlainOp]:
        return Topic.COMMITTEE, event_op(NodeAdmitted(), node_id)

    def dismiss(self, node_id: str) -> tuple[Topic, PlainOp]:
        return Topic.COMMITTEE, event_op(NodeDismissed(), node_id)
