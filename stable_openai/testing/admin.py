"""The endpoints by which another process looks at the fake: neither judged nor logged.

    GET  /_fake/log    the entries, a JSON object a line
    GET  /_fake/stats  counts: requests, over, in_flight, max_in_flight (by account), open and total
                       connections, statuses (how many of each)
    POST /_fake/fail   {"failure": {...}, "key", "account", "model", "path", "times"}, as `FakeOpenAI.fail`
    POST /_fake/spend  {"account", "model", "requests", "tokens"}, as `FakeOpenAI.spend`
    POST /_fake/clear  forget injected failures, the log and max_in_flight

They are under the root, not under /v1.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from .answers import Answer
from .failures import Failure, error_body
from .upstream import Upstream
from .visits import Order, entries_over
from .wire import Request

PREFIX = "/_fake/"


def answer(upstream: Upstream, request: Request) -> Answer:
    """Do what an admin request asks."""
    match request.method, request.path.removeprefix(PREFIX):
        case "GET", "log":
            with upstream.changed:
                log = upstream.log.copy()
            lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in log)
            return _text(200, lines, "application/x-ndjson")
        case "GET", "stats":
            return _text(200, json.dumps(_stats(upstream)))
        case "POST", "fail":
            fields = json.loads(request.body)
            upstream.order(Order(**(fields | {"failure": Failure.from_json(fields["failure"])})))
            return _text(200, "{}")
        case "POST", "spend":
            try:
                upstream.spend(**json.loads(request.body))
            except ValueError as error:
                return _text(400, error_body(str(error), None, None))
            return _text(200, "{}")
        case "POST", "clear":
            upstream.clear()
            return _text(200, "{}")
    return _text(404, error_body("no such endpoint of the fake", None, None))


def _stats(upstream: Upstream) -> dict[str, object]:
    with upstream.changed:
        return {
            "requests": len(upstream.log),
            "over": len(entries_over(upstream.log)),
            "in_flight": upstream.in_flight.total(),
            "max_in_flight": upstream.max_in_flight,
            "open": upstream.open_connections,
            "total": upstream.total_connections,
            "statuses": Counter(str(entry.status) for entry in upstream.log),
        }


def _text(status: int, text: str, kind: str = "application/json") -> Answer:
    return Answer(status, (("content-type", kind),), (text.encode(),))
