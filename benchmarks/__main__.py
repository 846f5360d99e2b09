"""Runs the benchmarks that are named, or all."""

from __future__ import annotations

import argparse

from benchmarks import clients, costs, load, waking

BENCHMARKS = {"costs": costs.main, "clients": clients.main, "waking": waking.main, "load": load.main}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="See the figures beside their bars.")
    parser.add_argument("names", nargs="*", help=", ".join(BENCHMARKS))
    parser.add_argument("--smoke", action="store_true", help="a short form that proves only that it runs")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    return max(BENCHMARKS[name](smoke=arguments.smoke) for name in arguments.names or BENCHMARKS)


if __name__ == "__main__":
    raise SystemExit(main())
