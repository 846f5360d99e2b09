"""python -m stable_openai.testing: the fake upstream on its own.

The first line on stdout is its base URL. It serves until SIGTERM or SIGINT; with `--settings -`, which
`FakeProcess` uses, until the end of stdin, so that it ends with whoever started it. Other processes look at it through
the endpoints of `admin`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, get_args

from .limits import UNITS, Limit
from .refusals import RateHeaders
from .server import FakeOpenAI
from .settings import Settings, from_json


def main(argv: Sequence[str] | None = None) -> int:
    """Serve. Returns the exit code."""
    options = _parser().parse_args(argv)
    arguments = from_json(json.loads(sys.stdin.readline())) if options.settings else _arguments(options)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: sys.exit(0))
    with FakeOpenAI(**arguments) as fake:
        print(fake.url, flush=True)
        if options.settings:  # ends with the process that gave them
            for _ in sys.stdin:
                pass
        else:
            while True:
                signal.pause()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m stable_openai.testing", description="A fake OpenAI upstream.")
    default = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
    parser.add_argument("--host", default=default["host"])
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--keys", default="sk-a", help="secrets, or secret=account, with commas between them")
    for name, unit in UNITS.items():
        parser.add_argument(f"--{name}", type=int, help=f"limit of {unit}, an account and model")
    parser.add_argument("--rule", default="bucket", help="bucket, sliding or calendar")
    parser.add_argument("--day-rule", help="the day's rule, if it differs")
    parser.add_argument("--tz", default="UTC", help="zone of a calendar day")
    parser.add_argument("--burst-s", type=float, help="seconds of refill that a bucket holds")
    parser.add_argument("--minute-s", type=float, default=default["minute_s"])
    parser.add_argument("--day-s", type=float, default=default["day_s"])
    parser.add_argument("--latency-s", type=float, default=default["latency_s"])
    parser.add_argument("--output-tokens", type=int, default=default["output_tokens"])
    parser.add_argument("--charge", choices=("reserved", "used"), default=default["charge"])
    parser.add_argument("--refusals-count", action="store_true", help="a refused request uses up a request")
    parser.add_argument("--unknown-models", default="", help="models answered 404, with commas between them")
    parser.add_argument("--organizations", help="account=organisation (or nothing), with commas between them")
    parser.add_argument("--rate-headers", choices=get_args(RateHeaders), default=default["rate_headers"])
    parser.add_argument("--gzip", action="store_true", help="compress answers for clients that accept it")
    parser.add_argument("--settings", choices=("-",), help="read all this as JSON from stdin's first line")
    return parser


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    given = vars(options).copy()
    del given["settings"]
    limit = Limit(**{field.name: given.pop(field.name) for field in fields(Limit)})
    keys = {secret: account or secret for secret, account in _pairs(given.pop("keys"))}
    organizations = dict(_pairs(given.pop("organizations") or ""))
    models = [name for name in given.pop("unknown_models").split(",") if name]
    return given | {"keys": keys, "limits": limit, "unknown_models": models, "organizations": organizations}


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (item.partition("=") for item in text.split(",") if item)]


if __name__ == "__main__":
    sys.exit(main())
