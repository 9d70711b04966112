from __future__ import annotations

import pytest
import trio.testing

# Real seconds in which nothing happens before the clock jumps: the nodes' threads (stores, images) take less.
JUMP_AFTER_S = 0.003


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """Time that passes at once where all only wait."""
    return trio.testing.MockClock(autojump_threshold=JUMP_AFTER_S)
