"""Histories of claims, and whether they are linearizable.

A key is a lock: free, or held by one node. `claim` by X succeeds iff it is free or X's; `release` by X iff it is X's. Each
operation has the times of its invocation and of its answer; one without an answer (its node died, or took too long) may
have taken effect at any time after its invocation, or never. A history is linearizable if all answered operations, and
some of the others, have an order that respects time and in which each answer is right.

Source: Wing & Gong, "Testing and verifying concurrent objects" (1993), with Lowe's memo of configurations (2017). Keys are
independent, so each is checked by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NEVER = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of a client."""

    node: str
    verb: str
    """`claim` or `release`."""
    key: str
    begin: float
    end: float
    """NEVER: no answer."""
    is_granted: bool | None
    """None: no answer."""


def apply(holder: str | None, operation: Operation) -> tuple[bool, str | None]:
    """(granted, holder afterwards) of an operation in a state."""
    if operation.verb == "claim":
        return (True, operation.node) if holder in (None, operation.node) else (False, holder)
    return (True, None) if holder == operation.node else (False, holder)


def violations(history: Iterable[Operation]) -> list[str]:
    """Keys whose history is not linearizable, with the operations around the place where no order goes on."""
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    found = []
    for key, operations in sorted(by_key.items()):
        stuck = _check(sorted(operations, key=lambda operation: operation.begin))
        if stuck:
            found.append(f"{key}: no order explains {stuck}")
    return found


def _check(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """Empty, or what could not be placed."""
    answered = frozenset(i for i, operation in enumerate(operations) if operation.is_granted is not None)
    todo: list[tuple[frozenset[int], str | None]] = [(frozenset(), None)]
    seen = set(todo)
    furthest: frozenset[int] = frozenset()
    while todo:
        done, holder = todo.pop()
        if answered <= done:
            return ()
        if len(done & answered) > len(furthest & answered):
            furthest = done
        # Whatever begins after some undone operation has ended cannot come before that one.
        first_end = min(operations[i].end for i in answered - done)
        for i, operation in enumerate(operations):
            if operation.begin > first_end:
                break
            if i in done:
                continue
            granted, after = apply(holder, operation)
            if operation.is_granted not in (None, granted) or (operation.is_granted is None and not granted):
                # An unanswered operation that would be refused changes nothing: leaving it away is the same.
                continue
            following = (done | {i}, after)
            if following not in seen:
                seen.add(following)
                todo.append(following)
    left = sorted(answered - furthest, key=lambda i: operations[i].end)
    return tuple(operations[i] for i in left[:4])
