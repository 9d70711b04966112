"""`python -m bench.run [SCENARIO …] [--small]`: figures, one scenario after the other."""

from __future__ import annotations

import argparse
import importlib
import sys

SCENARIOS = {
    "state": "bench.micro.state_core",
    "store": "bench.micro.store",
    "join": "bench.micro.state_join",
    "cells": "bench.micro.cells",
    "sparse": "bench.micro.sparse",
    "load": "bench.macro.state_load",
    "failover": "bench.macro.state_failover",
    "spam": "bench.macro.state_spam",
    "churn": "bench.macro.churn",
    "idle": "bench.macro.idle",
    "create": "bench.macro.create",
    "gossip": "bench.macro.p2p_gossip",
    "stream": "bench.macro.p2p_stream",
    "slow_line": "bench.macro.p2p_slow_line",
    "discovery": "bench.macro.p2p_discovery",
    "idle_peers": "bench.macro.p2p_idle",
}


def main() -> None:
    """Run the scenarios named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", nargs="*", choices=[*SCENARIOS, []], help="default: all")
    parser.add_argument("--small", action="store_true", help="once and short: shows that it still works")
    arguments = parser.parse_args()
    for name in arguments.scenario or SCENARIOS:
        importlib.import_module(SCENARIOS[name]).main(small=arguments.small)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
