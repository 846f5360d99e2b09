"""The command line: `stable-openai`, also `python -m stable_openai`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

__all__ = ["main"]

DEMO = """\
Start a fake OpenAI on this machine, which enforces limits, and send 50 prompts a process through three keys, one of
which the fake does not know. The broker rotates the keys, waits where a limit says so, and takes the bad key out of
use. No key, no network and no server are needed; it takes about ten seconds."""

MORE = """\
exit code: 0 if every prompt was answered and no limit was exceeded, 1 if not (it says why), 2 for a wrong argument
or a missing extra, 130 after Ctrl-C.

  stable-openai demo
  stable-openai demo --redis redis://localhost:6379/0 --processes 4"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (argparse itself exits with 2 for a wrong argument)."""
    parser = argparse.ArgumentParser("stable-openai", description="A broker that leases OpenAI API keys.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    demo = commands.add_parser(
        "demo", help="see the broker at work on a fake OpenAI", description=DEMO, epilog=MORE, formatter_class=raw
    )
    demo.add_argument(
        "--redis",
        metavar="URL",
        help="share the limits over this Redis, in a pool of its own that expires; by default in memory",
    )
    demo.add_argument(
        "--processes", type=_processes, default=1, metavar="N", help="1 to 16 processes of 10 threads; needs --redis"
    )
    demo.add_argument(
        "--max-wait",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds that a prompt may wait for a key (default: 60); with 1 you see prompts fail",
    )
    options = parser.parse_args(argv)
    if options.processes > 1 and not options.redis:
        demo.error("--processes needs --redis URL: in memory each process would keep the limits for itself")
    try:
        from stable_openai.cli.demo import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("h11", "rich"):
            raise
        print(f"the demo needs {missing}: pip install 'stable-openai[demo]'", file=sys.stderr)
        return 2
    return run(options.redis, options.processes, options.max_wait)


def _processes(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError("must be a whole number from 1 to 16")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError("must be a number of seconds, 0 or more")
    return seconds
