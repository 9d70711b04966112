"""What goes wrong in a run: named scenarios, each a recipe by which a seed picks the parameters of its faults.

A scenario is a function from the run's random numbers to a Plan. The Plan is all that distinguishes one run from another
besides the seed itself, so a scenario's name and a seed replay a run exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parameters of one run. Times are virtual milliseconds; faults end at `gst_ms`."""

    voter_count: int = 4
    observer_count: int = 0
    gst_ms: int = 1200
    limit_ms: int = 90_000
    """How long after GST everything must be final and equal."""
    op_count: int = 24
    mix: str = "plain"
    """Which operations: see `workload.MIXES`."""
    delay_ms_max: float = 20.0
    slow_share: float = 0.05
    """Messages that take ten times as long before GST."""
    loss: float = 0.0
    duplicate: float = 0.0
    replay: float = 0.0
    """Chance that a frame is delivered once more, up to two seconds later."""
    disk_ms_max: float = 3.0
    partition_count: int = 0
    is_asymmetric: bool = False
    pause_count: int = 0
    skew_ms: int = 0
    jump_ms: int = 0
    """A clock of one node is set, at one moment before GST, by up to so much, and set right again at GST."""
    crash_count: int = 0
    crash_at_commit: float = 0.0
    """Chance that a commit before GST ends in a crash of its node, before or after it is safe."""
    power_cut: bool = False
    """All correct nodes crash at one moment."""
    full_disk_count: int = 0
    old_copy: bool = False
    """One node's disk is put back to an earlier copy; it counts among the Byzantine."""
    clone: bool = False
    """A second machine runs with a copy of one node's disk and key; both count as one Byzantine voter."""
    lying_disk: bool = False
    """One node's disk forgets what it acknowledged; it counts among the Byzantine."""
    behaviours: tuple[tuple[str, ...], ...] = ()
    """For each Byzantine voter what it does: see `byzantine.BEHAVIOURS`."""
    checkpoint_op_count: int = 0
    """0: as in the product, which no short run reaches."""
    committee: str = ""
    """'grow' (3 more), 'shrink' (3 less), 'replace' (one for another), or several with a '+' between."""
    final_kept_count: int = 0
    """How many final heights a voter keeps for others; 0: as in the product."""
    close_quiet_ms: int = 0
    """How long a lane that was left must be quiet before it is closed; 0: as in the product."""
    admits: bool = False
    """An observer is admitted and writes too."""
    misses_handover: bool = False
    """One voter is cut off when the committee changes, and all others crash before it comes back."""
    dismisses: bool = False
    """And is dismissed again before GST."""
    late_node_count: int = 0
    """Nodes that are down from the beginning to GST."""
    gossip_loss: float = 0.2
    """Share of gossip that a follower never gets, also after GST; 1.0: gossip is switched off."""
    eclipse: str = ""
    """'voter' or 'follower': one such node is reached by the liars only for `eclipse_ms`, then by one honest voter more."""
    eclipse_ms: int = 0
    tail_count_max: int = 0
    """Certified blocks that may wait for the spine; 0: as in the product, which no short run reaches."""
    burst_count: int = 0
    """Writes that come at one moment."""
    slow_disk_ms: int = 0
    """What a commit takes on one correct voter's disk."""
    stop_ms: int = 0
    """How long one correct voter is stopped (SIGSTOP), beyond the short pauses."""


Recipe = Callable[[random.Random], Plan]
SCENARIOS: dict[str, Recipe] = {}


def scenario(recipe: Recipe) -> Recipe:
    SCENARIOS[recipe.__name__.replace("_", "-")] = recipe
    return recipe


def _rough(rng: random.Random, **more: object) -> Plan:
    """A network as bad as it gets."""
    plan = Plan(
        loss=rng.choice((0.0, 0.05, 0.2, 0.5)),
        duplicate=rng.choice((0.0, 0.2)),
        replay=rng.choice((0.0, 0.05)),
        delay_ms_max=rng.choice((5.0, 20.0, 80.0)),
        slow_share=rng.choice((0.0, 0.05, 0.2)),
        disk_ms_max=rng.choice((0.5, 3.0, 30.0)),
        close_quiet_ms=rng.choice((0, 50, 200)),
    )
    return replace(plan, **more)  # type: ignore[arg-type] # its own fields


def _count(rng: random.Random) -> int:
    return 7 if rng.random() < 0.1 else 4


@scenario
def calm(rng: random.Random) -> Plan:
    return Plan(mix=rng.choice(("plain", "claims", "accounts")))


@scenario
def lossy(rng: random.Random) -> Plan:
    return _rough(rng, voter_count=_count(rng), mix=rng.choice(("plain", "claims", "accounts")))


@scenario
def partition(rng: random.Random) -> Plan:
    return _rough(
        rng, voter_count=_count(rng), partition_count=rng.randint(1, 3), is_asymmetric=rng.random() < 0.5, mix="claims"
    )


@scenario
def pause(rng: random.Random) -> Plan:
    return _rough(rng, pause_count=rng.randint(1, 3), mix="claims")


@scenario
def clocks(rng: random.Random) -> Plan:
    return _rough(rng, skew_ms=rng.choice((100, 400, 2000)), jump_ms=rng.choice((0, 1000, 600_000)), mix="claims")


@scenario
def crash(rng: random.Random) -> Plan:
    return _rough(rng, voter_count=_count(rng), crash_count=rng.randint(1, 4), mix=rng.choice(("plain", "claims")))


@scenario
def crash_at_commit(rng: random.Random) -> Plan:
    return _rough(
        rng, crash_at_commit=rng.choice((0.03, 0.1, 0.2)), power_cut=rng.random() < 0.3, full_disk_count=rng.randint(0, 1)
    )


@scenario
def disks(rng: random.Random) -> Plan:
    kind = rng.choice(("old_copy", "clone", "lying_disk"))
    return _rough(rng, voter_count=_count(rng), crash_count=rng.randint(0, 2), mix="claims", **{kind: True})


@scenario
def twins(rng: random.Random) -> Plan:
    return _rough(rng, voter_count=_count(rng), behaviours=(("twins",),), crash_count=rng.choice((0, 0, 1)), mix="claims")


AUTHORS = ("fork", "bad-deps", "bad-clock", "garbage", "bad-intents", "flood", "ground", "foreign")
VOTERS = ("ack-all", "ack-wrong", "ack-some", "ack-none", "vote-all", "freeze-lies", "sync-lies", "ban-lies")
LEADERS = (
    "lead-two",
    "lead-back",
    "lead-parent",
    "lead-time",
    "lead-censor",
    "lead-root",
    "lead-close",
    "lead-ban",
    "lead-none",
)


@scenario
def byzantine(rng: random.Random) -> Plan:
    behaviours = tuple(rng.sample(AUTHORS + VOTERS + LEADERS, rng.randint(1, 4)))
    return _rough(
        rng,
        voter_count=_count(rng),
        behaviours=(behaviours,),
        mix=rng.choice(("plain", "claims", "accounts")),
        crash_count=rng.choice((0, 0, 2)),
        checkpoint_op_count=rng.choice((0, 6)),
    )


@scenario
def equivocation(rng: random.Random) -> Plan:
    """Voters that sign two ways on the spine, and their bans; evidence is lost, and so are disks' last commits."""
    lies = (rng.choice(("vote-all", "lead-two")), rng.choice(("ban-lies", "lead-ban", "fork", "sync-lies", "ack-some")))
    change = rng.random() < 0.3
    return _rough(
        rng,
        voter_count=_count(rng),
        observer_count=3 if change else 0,
        behaviours=(lies,),
        crash_count=rng.choice((0, 0, 2)),
        power_cut=rng.random() < 0.3,
        checkpoint_op_count=rng.choice((0, 6)),
        committee="replace" if change else "",
        mix=rng.choice(("plain", "claims")),
        gst_ms=1600,
    )


@scenario
def byzantine_seven(rng: random.Random) -> Plan:
    behaviours = tuple(("twins",) if rng.random() < 0.3 else tuple(rng.sample(AUTHORS + VOTERS + LEADERS, 3)) for _ in range(2))
    return _rough(rng, voter_count=7, behaviours=behaviours, mix="claims", op_count=16)


@scenario
def checkpoints(rng: random.Random) -> Plan:
    return _rough(
        rng,
        checkpoint_op_count=rng.choice((3, 8)),
        crash_count=rng.randint(0, 3),
        crash_at_commit=rng.choice((0.0, 0.05)),
        behaviours=rng.choice(((), (), (("lead-root",),), (("sync-lies",),))),
        mix=rng.choice(("claims", "accounts")),
    )


@scenario
def snapshot(rng: random.Random) -> Plan:
    return _rough(
        rng,
        loss=0.0,
        observer_count=1,
        late_node_count=rng.randint(1, 2),
        checkpoint_op_count=3,
        final_kept_count=8,
        op_count=40,
        gst_ms=1600,
        crash_count=rng.randint(0, 1),
        behaviours=rng.choice(((), (("sync-lies",),))),
        mix=rng.choice(("claims", "accounts")),
    )


@scenario
def committee(rng: random.Random) -> Plan:
    change = rng.choice(("grow", "replace", "grow+shrink", "replace+replace", "shrink"))
    return _rough(
        rng,
        loss=rng.choice((0.0, 0.05, 0.2)),
        voter_count=7 if change == "shrink" else 4,
        observer_count=3,
        committee=change,
        mix="claims",
        crash_count=rng.choice((0, 0, 1, 2)),
        partition_count=rng.choice((0, 0, 1)),
        gst_ms=1600,
        admits=rng.random() < 0.3,
    )


@scenario
def missed_handover(rng: random.Random) -> Plan:
    """A voter with all blocks misses the end of an epoch, and whoever could tell it has been restarted since."""
    return Plan(
        observer_count=3,
        committee="grow",
        misses_handover=True,
        op_count=rng.randint(4, 16),
        loss=rng.choice((0.0, 0.05)),
        delay_ms_max=rng.choice((20.0, 60.0)),
        gst_ms=8000,
        limit_ms=20_000,
    )


@scenario
def committee_byzantine(rng: random.Random) -> Plan:
    behaviours = tuple(rng.sample(("fork", "freeze-lies", "ack-all", "ack-some", "lead-two", "sync-lies", "vote-all"), 2))
    return _rough(
        rng,
        loss=rng.choice((0.0, 0.05, 0.2)),
        observer_count=3,
        committee=rng.choice(("grow", "replace", "replace+replace")),
        behaviours=(rng.choice((("twins",), behaviours)),),
        checkpoint_op_count=rng.choice((0, 6)),
        gst_ms=1600,
    )


@scenario
def leases(rng: random.Random) -> Plan:
    return _rough(
        rng,
        loss=rng.choice((0.0, 0.1, 0.3)),
        skew_ms=rng.choice((0, 200)),
        mix="leases",
        op_count=40,
        gst_ms=7000,
        partition_count=rng.randint(0, 2),
        crash_count=rng.randint(0, 2),
        behaviours=rng.choice(((), (), (("lead-time",),), (("lead-censor",),))),
    )


@scenario
def observers(rng: random.Random) -> Plan:
    return _rough(rng, observer_count=2, admits=True, mix="claims", crash_count=rng.randint(0, 2))


ECLIPSERS = ("sync-forge", "sync-lies", "gossip-lies", "ack-all", "vote-all", "foreign", "lead-time", "lead-root", "fork")


@scenario
def followers(rng: random.Random) -> Plan:
    """Nodes that only follow, with whatever gossip there is, or none at all."""
    return _rough(
        rng,
        voter_count=_count(rng),
        observer_count=2,
        gossip_loss=rng.choice((0.0, 0.3, 0.9, 1.0, 1.0)),
        behaviours=rng.choice(((), (("gossip-lies",),), (("gossip-lies", "fork"),), (("gossip-lies", "sync-lies"),))),
        **rng.choice(({}, {"checkpoint_op_count": 3}, {"checkpoint_op_count": 3, "final_kept_count": 8})),
        crash_count=rng.choice((0, 0, 2)),
        late_node_count=rng.choice((0, 0, 1)),
        mix=rng.choice(("plain", "claims", "accounts")),
    )


@scenario
def eclipse_voter(rng: random.Random) -> Plan:
    """A voter that hears only the f liars for a while."""
    count = _count(rng)
    behaviours = tuple(("sync-forge", *rng.sample(ECLIPSERS, 2)) for _ in range((count - 1) // 3))
    gst_ms = 2400
    return _rough(
        rng,
        voter_count=count,
        behaviours=behaviours,
        gst_ms=gst_ms,
        eclipse="voter",
        eclipse_ms=rng.randint(200, 1200),
        checkpoint_op_count=rng.choice((0, 6)),
        mix="claims",
    )


@scenario
def eclipse_follower(rng: random.Random) -> Plan:
    """A follower that hears only the f liars for long, after GST too, and then one honest voter and no one else."""
    count = _count(rng)
    behaviours = tuple(("sync-forge", *rng.sample(ECLIPSERS, 2)) for _ in range((count - 1) // 3))
    return _rough(
        rng,
        voter_count=count,
        observer_count=1,
        behaviours=behaviours,
        eclipse="follower",
        eclipse_ms=rng.choice((800, 3000, 12_000)),
        gossip_loss=rng.choice((0.2, 1.0)),
        **rng.choice(({}, {"checkpoint_op_count": 3}, {"checkpoint_op_count": 3, "final_kept_count": 8})),
        op_count=40,
        mix=rng.choice(("claims", "accounts")),
    )


@scenario
def back_pressure(rng: random.Random) -> Plan:
    """More writes than there is room for, while one voter's disk is slow or full, or one voter stands still."""
    return _rough(
        rng,
        voter_count=4,
        tail_count_max=rng.choice((4, 12, 60)),
        burst_count=rng.choice((300, 500)),
        slow_disk_ms=rng.choice((0, 150, 400)),
        stop_ms=rng.choice((0, 0, 900)),
        full_disk_count=rng.randint(0, 1),
        observer_count=rng.choice((0, 1)),
        gossip_loss=1.0,
        partition_count=rng.choice((0, 1)),
        behaviours=rng.choice(((), (("lead-none",),), (("flood", "ack-none"),), (("lead-censor",),))),
        gst_ms=1800,
    )


@scenario
def dismissal(rng: random.Random) -> Plan:
    """A node is admitted and dismissed while what it writes is on its way, beside a voter that is silent or takes sides."""
    return _rough(
        rng,
        loss=rng.choice((0.05, 0.2, 0.5)),
        observer_count=2,
        admits=True,
        dismisses=True,
        op_count=40,
        behaviours=rng.choice(((), (("ack-none",),), (("ack-some", "sync-lies"),), (("ack-all", "garbage"),))),
        crash_count=rng.choice((0, 0, 1)),
        close_quiet_ms=rng.choice((50, 200)),
    )


@scenario
def too_many_liars(_: random.Random) -> Plan:
    """More than f: the checkers must find something. Not among those that must hold."""
    return Plan(behaviours=(("twins",), ("twins",)), mix="claims", delay_ms_max=40.0, gst_ms=2500, limit_ms=8000)


MUST_HOLD = tuple(name for name in SCENARIOS if name != "too-many-liars")


@dataclass
class Counts:
    """How often what happened; a scenario that never did what it is for shows here."""

    by_name: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, count: int = 1) -> None:
        self.by_name[name] = self.by_name.get(name, 0) + count
