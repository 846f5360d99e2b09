"""Answers that say no, and what their headers say about limits. Pure."""

from __future__ import annotations

from .answers import Answer
from .failures import error_body
from .limits import UNITS, Account, Exceeded
from .meters import SECOND_NS

JSON = ("content-type", "application/json")


def refusal(status: int, message: str, code: str | None) -> Answer:
    """An error that the request itself is the reason for."""
    body = error_body(message, "invalid_request_error", code).encode()
    return Answer(status, (JSON,), (body,), code=code)


def over_limit(model: str, account: str, exceeded: Exceeded) -> Answer:
    """429, with the wait in the text and headers if time helps."""
    kind = "tokens" if exceeded.limit.startswith("t") else "requests"
    where = f"{model} in organization {account} on {UNITS[exceeded.limit]}"
    headers: tuple[tuple[str, str], ...] = (JSON,)
    if exceeded.too_large:
        message = f"Request too large for {where}: Limit {exceeded.maximum}, Requested {exceeded.requested}."
    else:
        counts = f"Limit {exceeded.maximum}, Used {exceeded.used}, Requested {exceeded.requested}"
        message = f"Rate limit reached for {where}: {counts}."
        if exceeded.wait_ns is not None:
            message += f" Please try again in {go_duration(exceeded.wait_ns)}."
            headers += (
                ("retry-after-ms", str(-(-exceeded.wait_ns // 1_000_000))),
                ("retry-after", str(-(-exceeded.wait_ns // SECOND_NS))),
            )
    body = error_body(message, kind, "rate_limit_exceeded").encode()
    return Answer(429, headers, (body,), code="rate_limit_exceeded", limit=exceeded.limit)


def limit_headers(meters: Account, now: int) -> tuple[tuple[str, str], ...]:
    """What OpenAI tells of the minute's limits, or of the day's where there is none for the minute."""
    headers: list[tuple[str, str]] = []
    for kind, kept in (("requests", meters.requests), ("tokens", meters.tokens)):
        for meter in list(kept.values())[:1]:
            headers += (
                (f"x-ratelimit-limit-{kind}", str(meter.limit)),
                (f"x-ratelimit-remaining-{kind}", str(meter.remaining(now))),
                (f"x-ratelimit-reset-{kind}", go_duration(meter.reset_ns(now))),
            )
    return tuple(headers)


def go_duration(ns: int) -> str:
    """A duration as Go writes it, rounded up to milliseconds: 12ms, 1s, 6m0s, 7m12s, 1h0m0.5s."""
    ms = -(-ns // 1_000_000)
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds
