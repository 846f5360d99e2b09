"""Answers that say no, and what their headers say about limits. Pure."""

from __future__ import annotations

from typing import Literal

from .answers import Answer, Headers
from .failures import error_body
from .limits import UNITS, Account, Exceeded
from .meters import SECOND_NS

JSON = ("content-type", "application/json")

RateHeaders = Literal["openai", "groq", "azure", "none"]

# Of which limit of requests and of tokens headers tell (the first that there is), and whether of its reset.
TOLD: dict[RateHeaders, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "openai": (("rpm", "rpd"), ("tpm", "tpd"), True),
    "groq": (("rpd",), ("tpm",), True),
    "azure": (("rpm", "rpd"), ("tpm", "tpd"), False),
    "none": ((), (), False),
}


def refusal(status: int, message: str, code: str | None) -> Answer:
    """An error that the request itself is the reason for."""
    body = error_body(message, "invalid_request_error", code).encode()
    return Answer(status, (JSON,), (body,), code=code)


def over_limit(model: str, account: str, exceeded: Exceeded) -> Answer:
    """429, with the wait in the text and headers if time helps."""
    kind = "tokens" if exceeded.limit.startswith("t") else "requests"
    where = f"{model} in organization {account} on {UNITS[exceeded.limit]}"
    headers: Headers = (JSON,)
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


def limit_headers(meters: Account, now: int, style: RateHeaders) -> Headers:
    """What the headers of an answer tell of the limits."""
    headers: list[tuple[str, str]] = []
    requests, tokens, with_reset = TOLD[style]
    for kind, names, kept in (("requests", requests, meters.requests), ("tokens", tokens, meters.tokens)):
        for meter in [kept[name] for name in names if name in kept][:1]:
            headers += (
                (f"x-ratelimit-limit-{kind}", str(meter.limit)),
                (f"x-ratelimit-remaining-{kind}", str(meter.remaining(now))),
            )
            if with_reset:
                headers.append((f"x-ratelimit-reset-{kind}", go_duration(meter.reset_ns(now))))
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
