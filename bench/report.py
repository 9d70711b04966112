"""How figures are told: median, minimum, maximum, count, and on what they were taken."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence


def row(what: str, values: Sequence[float], unit: str) -> str:
    """One line: median (min … max), n."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"  {what:<44} {middle:>10.2f} {unit:<5} ({low:.2f} … {high:.2f}, n={len(values)})"


def header(title: str) -> str:
    """What was measured, on what."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    load = os.getloadavg()[0]
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, Linux {platform.release().split('-')[0]}"
    return f"{title}\n  {machine}, load {load:.1f}, commit {commit or 'none'}"
