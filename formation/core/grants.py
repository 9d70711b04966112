"""Roles on an object, from least to most; each includes those before it.

| role | may |
|---|---|
| viewer | read what is not public of it: console output and logs |
| operator | start, stop, describe; type into its console |
| manager | change its specification, delete it |
| owner | all of that, give and take roles, hand it over; exactly one account, named by the object itself |
"""

from __future__ import annotations

from enum import IntEnum


class Role(IntEnum):
    """Compares as "includes"."""

    VIEWER = 1
    OPERATOR = 2
    MANAGER = 3
    OWNER = 4
