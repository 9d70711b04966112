"""What a node process knows of a VM and could not find out by looking."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from formation.core.spec import Resources, Restart
from formation.vmm.hypervisor import BootedVm
from formation.vmm.needs import Image
from formation.vmm.plan import Goal, Said, Step
from formation.vmm.words import POWERED_OFF

# 1, 2, 4, 8, 16, 30, 30 s: two minutes, in which a peer restarts or a port is given back.
RETRY_COUNT_MAX = 7
RETRY_PAUSE_S_MIN = 1.0
RETRY_PAUSE_S_MAX = 30.0
# 1, 2, 4, … 256, 300 s: a service that dies at once does not eat its node, one that died of a passing fault is back soon.
RESTART_PAUSE_S_MIN = 1.0
RESTART_PAUSE_S_MAX = 300.0
# Of `on-failure`: ten pauses are a quarter of an hour; what is still dead then needs a person.
RESTART_COUNT_MAX = 10
# What ran this long was well; the next end is the first one again.
RESTART_FORGIVEN_AFTER_S = 600.0


@dataclass(slots=True, kw_only=True)
class Memory:
    """What this node process knows of a VM and could not find out again."""

    vm: BootedVm | None = None
    image: Image | None = None
    is_attached: bool = False
    is_stopping: bool = False
    is_gone_said: bool = False
    failure: str = ""
    failure_generation: int = -1
    said: Said = Said.NOTHING
    said_generation: int = -1
    is_lapse_said: bool = False
    has_ended_itself: bool = False
    """What is in `failure` is no failure: its guest powered off, and it shall stay so."""
    restart_count: int = 0
    """Restarts after ends that nobody asked for, since it last ran for long."""
    claim_needs: Resources | None = None
    """What a claim promises whose outcome the view does not show yet."""
    attempt_count: int = 0
    retry_at: float = 0.0
    """trio's time before which nothing is tried for `retry_goal`; another goal need not wait."""
    retry_goal: Goal | None = None
    doing: tuple[Step, Goal] | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def must_wait(self, goal: Goal) -> bool:
        """Whether the last failure for this goal is too fresh to try again."""
        return goal is self.retry_goal and trio.current_time() < self.retry_at

    def pause(self, goal: Goal, pause_s: float) -> None:
        """Try nothing for this goal for a while."""
        self.retry_at, self.retry_goal = trio.current_time() + pause_s, goal

    def note_failure(self, goal: Goal, *, is_retryable: bool) -> bool:
        """A step failed: pause, longer each time. Whether that was the last try, for steps that have one."""
        self.attempt_count += 1
        self.pause(goal, min(RETRY_PAUSE_S_MIN * 2 ** min(self.attempt_count - 1, RETRY_COUNT_MAX), RETRY_PAUSE_S_MAX))
        return not is_retryable or self.attempt_count > RETRY_COUNT_MAX

    def fail(self, reason: str, *, generation: int) -> None:
        """This generation cannot go on; what comes next need not wait."""
        self.attempt_count, self.retry_goal = 0, None
        self.failure, self.failure_generation = reason, generation
        self.has_ended_itself = False

    def note_end(self, restart: Restart, reason: str, *, ran_s: float, was_ready: bool, generation: int) -> float | None:
        """Its process ended and nobody asked for that: seconds until it is started again, or None: it rests.

        Args:
          restart: what its owner wants.
          reason: why it ended.
          ran_s: how long the process was there.
          was_ready: whether its guest was ready in that time.
          generation: of its spec.
        """
        has_powered_off = reason == POWERED_OFF
        if ran_s >= RESTART_FORGIVEN_AFTER_S:
            self.restart_count = 0
        is_given_up = restart is Restart.ON_FAILURE and self.restart_count >= RESTART_COUNT_MAX
        if not was_ready or is_given_up or restart is Restart.NEVER or (restart is Restart.ON_FAILURE and has_powered_off):
            if is_given_up:
                reason = f"{reason}; it was started again {self.restart_count} times"
            self.fail(reason, generation=generation)
            self.has_ended_itself = has_powered_off and was_ready
            return None
        pause_s = min(RESTART_PAUSE_S_MIN * 2.0**self.restart_count, RESTART_PAUSE_S_MAX)
        self.restart_count += 1
        self.pause(Goal.RUNNING, pause_s)
        return pause_s

    def note_said(self, said: Said, *, generation: int) -> None:
        """This was said and is durable."""
        self.said, self.said_generation = said, generation
