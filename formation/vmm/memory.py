"""What a node process knows of a VM and could not find out by looking."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from formation.core.spec import Resources
from formation.vmm.hypervisor import BootedVm
from formation.vmm.needs import Image
from formation.vmm.plan import Goal, Said, Step

# 1, 2, 4, 8, 16, 30, 30 s: two minutes, in which a peer restarts or a port is given back.
RETRY_COUNT_MAX = 7
RETRY_PAUSE_S_MIN = 1.0
RETRY_PAUSE_S_MAX = 30.0


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

    def note_said(self, said: Said, *, generation: int) -> None:
        """This was said and is durable."""
        self.said, self.said_generation = said, generation
