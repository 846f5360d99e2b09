"""Runs the benchmarks that are named, or all."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks import clients, costs, load, soak, tasks, waking
from benchmarks.soak_faults import FAULTS

BENCHMARKS: dict[str, Callable[..., int]] = {
    "costs": costs.main,
    "clients": clients.main,
    "waking": waking.main,
    "load": load.main,
    "tasks": tasks.main,
    "soak": soak.main,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="See the figures beside their bars.")
    parser.add_argument("names", nargs="*", help=", ".join(BENCHMARKS))
    parser.add_argument("--smoke", action="store_true", help="a short form that proves only that it runs")
    soaking = parser.add_argument_group("soak")
    soaking.add_argument("--seconds", type=float, default=600, help="for how long faults come")
    soaking.add_argument("--seed", type=int, help="of the faults, as an earlier run said it")
    soaking.add_argument("--on-redis-down", choices=("local", "wait"), default="local")
    soaking.add_argument("--faults", default="all", help=f"all, keeping, or some of {', '.join(FAULTS)}, with commas")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    options = {
        "soak": {name: getattr(arguments, name) for name in ("seconds", "seed", "on_redis_down", "faults")},
    }
    return max(
        BENCHMARKS[name](smoke=arguments.smoke, **options.get(name, {})) for name in arguments.names or BENCHMARKS
    )


if __name__ == "__main__":
    raise SystemExit(main())
