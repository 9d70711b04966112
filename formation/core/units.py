"""Sizes and times as people write them, in binary units: `2GiB`, `512MiB`, `90s`.

A plain number is refused where a unit is needed: 512 of what?
"""

from __future__ import annotations

import re

from formation.core.errors import UsageError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# Fifteen digits are exact in a float, and no size or time that is meant needs more.
_SIZE = re.compile(r"^([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(KiB|MiB|GiB|TiB|K|M|G|T)$")
_SIZE_FACTOR = {"K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}
_DURATION = re.compile(r"^([0-9]{1,15}(?:\.[0-9]{1,15})?)(ms|s|m|h)$")
_DURATION_FACTOR_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size_bytes(text: str, *, what: str) -> int:
    """Bytes of a size such as `512MiB` or `1.5G` (binary units only).

    Raises:
      UsageError: no unit, or not a size.
    """
    match = _SIZE.match(text.strip())
    if match is None:
        hint = f"write {text.strip()}MiB or {text.strip()}GiB" if text.strip().isdigit() else "write 512MiB or 2GiB"
        raise UsageError(f"{what}: {text!r} is not a size with a unit", hint=hint)
    return int(float(match[1]) * _SIZE_FACTOR[match[2][0]])


def parse_duration_s(text: str, *, what: str) -> float:
    """Seconds of a duration such as `90s`, `5m` or `250ms`.

    Raises:
      UsageError: no unit, or not a duration.
    """
    match = _DURATION.match(text.strip())
    if match is None:
        raise UsageError(f"{what}: {text!r} is not a duration with a unit", hint="write 90s, 5m or 250ms")
    return float(match[1]) * _DURATION_FACTOR_S[match[2]]


def format_size(size_bytes: int) -> str:
    """`1.5GiB` of 1610612736."""
    for factor, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f}".removesuffix(".0") + unit
    return f"{size_bytes}B"


def format_duration(duration_s: float) -> str:
    """`850ms`, `4.2s`, `3m05s`, `2h10m`, `3d4h`."""
    if duration_s < 0.9995:
        return f"{duration_s * 1000:.0f}ms"
    if duration_s < 60:
        return f"{duration_s:.1f}s"
    minutes, seconds = divmod(int(duration_s), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24}h"
