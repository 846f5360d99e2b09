"""Limits, classes of models, and the numbers that a meter works with.

`Limits` is what a user declares. `quota()` compiles it, once, into the numbers that both backends compute with:
whoever grants (Lua or memory) never sees a period, a burst or a headroom, only these.

    Quota    = (concurrency or 0, 1 if tokens are charged by use, *rpm, *rpd, *tpm, *tpd, time zone), a meter being
    none     = (0, 0, 0, 0)
    bucket   = (1, limit, rate per ms, capacity)
    sliding  = (2, limit, period in ms with the headroom, slot in ms)
    calendar = (3, limit, headroom in ms, period in ms or 0 for days)

Source of the rules: OpenAI's own headers refill continuously (bucket); any upstream that counts "requests in
the last minute" is never exceeded by sliding; gateways that reset at the full minute are calendar.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

from stable_openai.errors import ConfigurationError

__all__ = [
    "BUCKET",
    "CALENDAR",
    "METERS",
    "MOST",
    "SLIDING",
    "Limits",
    "Meter",
    "Quota",
    "class_of",
    "day_starts",
    "limits_of",
    "quota",
    "seen_text",
]

Rule = Literal["bucket", "sliding", "calendar"]
Meter = tuple[float, float, float, float]
Quota = tuple[Any, ...]

BUCKET, SLIDING, CALENDAR = 1, 2, 3
METERS = ("rpm", "rpd", "tpm", "tpd")
MINUTE_MS = 60_000
DAY_MS = 86_400_000
MINUTE_SLOTS = 192
DAY_SLOTS = 128
MOST = 10**12


@dataclass(frozen=True)
class Limits:
    """What an account may use for one class of models. A field left out is inherited, at last unlimited.

    Args:
        rpm, rpd: requests a minute, a day.
        tpm, tpd: tokens a minute, a day.
        concurrency: requests at the same time.
        rule: "bucket" (continuous refill, OpenAI's way; the default), "sliding" (never more than the limit in
            any period; safe everywhere) or "calendar" (resets at the full minute and at midnight of `tz`).
        day_rule: the rule of rpd and tpd, where it differs.
        tz: the time zone of the calendar's days, such as "America/Los_Angeles".
        burst_s: seconds of refill that a bucket holds; by default the whole period.
        charge: "reserved" (the larger of output limit and estimate counts, as at OpenAI) or "used" (what was
            really used counts, once it is known).

    >>> Limits(rpm=500, tpm=200_000)
    Limits(rpm=500, tpm=200000)
    """

    rpm: int | None = None
    rpd: int | None = None
    tpm: int | None = None
    tpd: int | None = None
    concurrency: int | None = None
    rule: Rule | None = None
    day_rule: Rule | None = None
    tz: str | None = None
    burst_s: float | None = None
    charge: Literal["reserved", "used"] | None = None

    def __post_init__(self) -> None:
        for name in (*METERS, "concurrency"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
                raise ConfigurationError(name, "must be a whole number from 1 to 1e12, or None for no limit")
        for name in ("rule", "day_rule"):
            if getattr(self, name) not in (None, "bucket", "sliding", "calendar"):
                raise ConfigurationError(name, "is unknown; use 'bucket', 'sliding' or 'calendar'")
        if self.charge not in (None, "reserved", "used"):
            raise ConfigurationError("charge", "is unknown; use 'reserved' or 'used'")
        burst = self.burst_s
        if burst is not None and (
            isinstance(burst, bool) or not isinstance(burst, (int, float)) or not 0 < burst <= 86_400
        ):
            raise ConfigurationError("burst_s", "must be a number of seconds above 0, at most 86400")
        if self.tz not in (None, "UTC"):
            _zone(self.tz)

    def __repr__(self) -> str:
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return f"Limits({', '.join(f'{name}={value!r}' for name, value in given if value is not None)})"

    def over(self, other: Limits) -> Limits:
        """These limits where they say something, the other's where they do not."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return Limits(**{name: getattr(other, name) if value is None else value for name, value in mine.items()})


def class_of(model: str, classes: Mapping[str, Limits]) -> str:
    """The class of a model: its exact entry, else the first pattern that matches, else the model itself."""
    if model in classes:
        return model
    return next((pattern for pattern in classes if matches(model, pattern)), model)


def matches(model: str, pattern: str) -> bool:
    """Whether the model is named by the pattern (shell's `*`, `?`, `[...]`; case counts)."""
    from fnmatch import fnmatchcase

    return model == pattern or fnmatchcase(model, pattern)


def serves(models: Iterable[str] | None, model: str) -> bool:
    """Whether an allow-list (None: everything) names the model. A call without a model goes anywhere."""
    return models is None or model == "-" or any(matches(model, pattern) for pattern in models)


def quota(limits: Limits, headroom_s: float) -> Quota:
    """Compile limits into the numbers that the backends work with; see the head of this module."""
    meters = [_meter(number, getattr(limits, name), limits, headroom_s) for number, name in enumerate(METERS)]
    days = any(rule == CALENDAR and not period for rule, _, _, period in meters)
    numbers = (number for meter in meters for number in meter)
    return (limits.concurrency or 0, int(limits.charge == "used"), *numbers, (limits.tz or "UTC") if days else "")


def limits_of(quota: Quota) -> dict[str, int]:
    """The limits that a quota has, by name.

    >>> limits_of(quota(Limits(rpm=60, concurrency=4), 0.25))
    {'concurrency': 4, 'rpm': 60}
    """
    metered = {name: quota[4 * number + 3] for number, name in enumerate(METERS) if quota[4 * number + 2]}
    return {"concurrency": quota[0], **metered} if quota[0] else metered


def _meter(number: int, limit: int | None, limits: Limits, headroom_s: float) -> Meter:
    """The meter `number` of METERS with a limit, under the rules of `limits`."""
    if limit is None:
        return (0, 0, 0, 0)
    minute = limits.rule or "bucket"
    day = number % 2 == 1
    period, slots = (DAY_MS, DAY_SLOTS) if day else (MINUTE_MS, MINUTE_SLOTS)
    rule = (limits.day_rule or minute) if day else minute
    headroom_ms = math.ceil(headroom_s * 1000)
    if rule == "bucket":
        burst_ms = None if limits.burst_s is None else limits.burst_s * 1000
        return (BUCKET, limit, limit / period, _capacity(limit, period, burst_ms, headroom_ms))
    if rule == "sliding":
        return (SLIDING, limit, period + headroom_ms, math.ceil(period / slots))
    return (CALENDAR, limit, headroom_ms, 0 if day else period)


def seen_text(rows: Iterable[tuple[int, int | None, int | None]], limits: Limits, headroom_s: float) -> str:
    """What a response's headers said, as the store reads it (lua/learning.lua): for each row (number of METERS, limit,
    remaining) six words, the last three what the meter is under the rules of `limits` if nobody has declared it; the
    rows joined by ";". What is not known is "-"; a row that cannot be is left out.

    >>> seen_text([(0, 60, 59), (2, None, 100)], Limits(), 0.25)
    '0 60 59 1 0.001 59;2 - 100 0 0 0'
    """
    known = []
    for number, limit, remaining in rows:
        if limit is not None and not 1 <= limit <= MOST:
            continue
        if remaining is not None and not 0 <= remaining <= (limit or MOST):
            continue
        left = "-" if remaining is None else remaining
        known.append(f"{number} {limit or '-'} {left} {_if_learned(number, limit, limits, headroom_s)}")
    return ";".join(known)


@lru_cache(maxsize=1024)
def _if_learned(number: int, limit: int | None, limits: Limits, headroom_s: float) -> str:
    """Rule and two numbers of a learned meter. Days of the calendar need a time zone that is registered, and so are
    buckets."""
    rule, _, first, second = _meter(number, limit, limits, headroom_s)
    if rule == CALENDAR and not second:
        rule, _, first, second = _meter(number, limit, Limits(day_rule="bucket").over(limits), headroom_s)
    return f"{rule} {first:.17g} {second:.17g}"


def _capacity(limit: int, period: int, burst_ms: float | None, headroom_ms: int) -> int:
    """What a bucket holds. Requests that were sent up to `headroom` apart may arrive together, so that much
    refill is left out: at least 1, and never so much that not one request fits."""
    held = limit if burst_ms is None else max(1, math.floor(limit * min(burst_ms, period) / period))
    if headroom_ms:
        held -= max(1, math.ceil(limit * headroom_ms / period))
    return max(1, held)


def day_starts(tz: str, now_ms: int, days: int = 8) -> list[int]:
    """The last two midnights of the time zone and the next ones, as epoch ms (days of 23 and 25 hours too)."""
    from datetime import datetime, timedelta, timezone

    zone = timezone.utc if tz == "UTC" else _zone(tz)
    today = datetime.fromtimestamp(now_ms / 1000, zone).date()
    midnights = (
        datetime(day.year, day.month, day.day, tzinfo=zone)
        for day in (today + timedelta(days=ahead) for ahead in range(-2, days))
    )
    starts = [int(midnight.timestamp() * 1000) for midnight in midnights]
    # One midnight more than seems needed: the store's clock decides, and this one may be ahead of it.
    return [start for start, following in zip(starts, [*starts[1:], math.inf]) if following > now_ms - DAY_MS]


def _zone(name: str) -> Any:
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except Exception:
        raise ConfigurationError("tz", "is unknown; use a name such as 'UTC' or 'America/Los_Angeles'") from None
