"""What an idle node costs: memory, CPU, bytes written, of each of four that are connected and have nothing to do."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.report import header, row
from formation.cli.local_network import LocalNode, local_network
from formation.core.manifest import read_draft

SECONDS = 30.0
SETTLE_S = 5.0
ROOT = Path(__file__).parents[2]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _written_bytes(pid: int) -> int:
    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(lines["write_bytes"])


def _pid(node: LocalNode) -> int:
    assert node.process is not None
    return node.process.pid


def main(*, small: bool) -> None:
    """Print the figures."""
    seconds = 3.0 if small else SECONDS
    with local_network(read_draft(ROOT / "peers" / "demo.toml")) as network:
        time.sleep(SETTLE_S)
        pids = [_pid(node) for node in network.nodes]
        before = [(_cpu_s(pid), _written_bytes(pid)) for pid in pids]
        time.sleep(seconds)
        after = [(_cpu_s(pid), _written_bytes(pid)) for pid in pids]
        print(header(f"Idle node, one of four connected voters, over {seconds:.0f} s"))
        print(row("resident memory", [_rss_mib(pid) for pid in pids], "MiB"))
        print(row("CPU", [100 * (b[0] - a[0]) / seconds for a, b in zip(before, after, strict=True)], "%"))
        print(row("written to disk", [(b[1] - a[1]) / seconds for a, b in zip(before, after, strict=True)], "B/s"))
