"""Runs seeds of scenarios.

python -m tests.sim --scenario crash --seed 7                        one run; a failure shows its stack
python -m tests.sim --first-seed 1000 --seeds 200000 --workers 2     so many of every scenario that must hold
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.sim.cluster import SimulationError, run
from tests.sim.faults import MUST_HOLD, SCENARIOS

# Seeds that a worker takes at once: a few seconds of work.
BATCH_SEED_COUNT = 25

Result = tuple[dict[str, int], tuple[str, ...]]
"""What happened how often, and the failures' messages."""


def run_batch(scenario: str, seeds: range) -> Result:
    """Some seeds of one scenario, one after another."""
    counts: dict[str, int] = {}
    failures: list[str] = []
    for seed in seeds:
        try:
            happened = run(scenario, seed).counts.by_name
        except SimulationError as exc:
            failures.append(str(exc))
            if len(seeds) == 1:
                traceback.print_exception(exc.__cause__)
            continue
        for name, count in happened.items():
            counts[name] = counts.get(name, 0) + count
    return counts, tuple(failures)


def _results(scenario: str, batches: list[range], workers: int) -> Iterator[Result]:
    if workers == 1:
        yield from map(partial(run_batch, scenario), batches)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(partial(run_batch, scenario), batches)


def main() -> int:
    """Returns the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="default: all that must hold")
    parser.add_argument("--seed", type=int, help="this seed only")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10, help="how many of each scenario")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--keep-going", action="store_true", help="report all failures instead of stopping at the first")
    options = parser.parse_args()
    first, count = (options.first_seed, options.seeds) if options.seed is None else (options.seed, 1)
    batches = [range(at, min(at + BATCH_SEED_COUNT, first + count)) for at in range(first, first + count, BATCH_SEED_COUNT)]
    workers = 1 if count == 1 else options.workers
    has_failed = False
    for name in options.scenario or MUST_HOLD:
        begin_s = time.perf_counter()
        counts: dict[str, int] = {}
        for happened, failures in _results(name, batches, workers):
            for key, number in happened.items():
                counts[key] = counts.get(key, 0) + number
            for failure in failures:
                print(failure, file=sys.stderr, flush=True)
            if failures:
                has_failed = True
                if not options.keep_going:
                    return 1
        each_s = (time.perf_counter() - begin_s) / count
        told = ", ".join(f"{key} {number}" for key, number in sorted(counts.items()))
        print(f"{name}: {count} seeds, {each_s:.3f} s each; {told}", flush=True)
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
