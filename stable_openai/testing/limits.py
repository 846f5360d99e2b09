"""What an account may do with a class of models, and the set of meters that holds it to that. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args
from zoneinfo import ZoneInfo

from .meters import SECOND_NS, Bucket, Calendar, Meter, Sliding

Rule = Literal["bucket", "sliding", "calendar"]

UNITS = {
    "rpm": "requests per min (RPM)",
    "rpd": "requests per day (RPD)",
    "tpm": "tokens per min (TPM)",
    "tpd": "tokens per day (TPD)",
    "concurrency": "concurrent requests",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """What an account may do with a class of models; None means without limit.

    `rpm`, `rpd` count requests and `tpm`, `tpd` tokens, in the fake's minute and day; `concurrency` counts
    requests in flight. `day_rule` is the rule of the day's meters if it differs, `tz` the zone whose midnight
    starts a calendar day, `burst_s` the seconds of refill that a bucket holds (of every bucket, the day's
    too; default: its period).

    Raises ValueError for a limit below 1, a burst that is not positive, an unknown rule or zone.
    """

    rpm: int | None = None
    rpd: int | None = None
    tpm: int | None = None
    tpd: int | None = None
    concurrency: int | None = None
    rule: Rule = "bucket"
    day_rule: Rule | None = None
    tz: str = "UTC"
    burst_s: float | None = None

    def __post_init__(self) -> None:
        for name in UNITS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for rule in (self.rule, self.day_rule or self.rule):
            if rule not in get_args(Rule):
                raise ValueError(f"unknown rule {rule!r}: one of {', '.join(get_args(Rule))}")
        if self.burst_s is not None and self.burst_s <= 0:
            raise ValueError(f"burst_s must be positive, not {self.burst_s}")
        try:
            ZoneInfo(self.tz)
        except Exception as error:  # zoneinfo raises KeyError, ValueError or OSError, by the kind of nonsense
            raise ValueError(f"unknown time zone {self.tz!r}") from error


@dataclass(frozen=True, slots=True)
class Exceeded:
    """Which limit a request would exceed. `wait_ns` is None where time alone does not help."""

    limit: str
    maximum: int
    used: int
    requested: int
    wait_ns: int | None

    @property
    def too_large(self) -> bool:
        """Whether the request is larger than the whole limit."""
        return self.requested > self.maximum


class Account:
    """All the meters of one account for one class: charged all or nothing."""

    def __init__(self, limit: Limit, minute_ns: int, day_ns: int) -> None:
        def meters(names: tuple[str, str]) -> dict[str, Meter]:
            return {name: _meter(limit, name, minute_ns, day_ns) for name in names if getattr(limit, name) is not None}

        self.requests = meters(("rpm", "rpd"))
        self.tokens = meters(("tpm", "tpd"))
        self.concurrency = limit.concurrency
        self.in_flight = 0

    def admit(self, tokens: int, now: int, *, hold: bool = False) -> Exceeded | None:
        """Charge one request and its tokens, or say which limit that would exceed and charge nothing.

        Where several are exceeded, the one that takes longest to recover is named. With `hold` the tokens are
        only
        held: `use` charges them. An admitted request is in flight until `leave`.
        """
        exceeded = max(self._exceeded(tokens, now), key=_recovery, default=None)
        if exceeded is None:
            self.in_flight += 1
            for meter in self.requests.values():
                meter.charge(1, now)
            for meter in self.tokens.values():
                if hold:
                    meter.held += tokens
                else:
                    meter.charge(tokens, now)
        return exceeded

    def refuse(self, now: int) -> None:
        """Charge a refused request to every request meter that still has room for it."""
        for meter in self.requests.values():
            if meter.wait_ns(1, now) == 0:
                meter.charge(1, now)

    def spend(self, requests: int, tokens: int, now: int) -> None:
        """Charge what somebody else used: of each kind as much as there is left under all its limits."""
        for meters, amount in ((self.requests, requests), (self.tokens, tokens)):
            amount = min([amount, *(meter.remaining(now) for meter in meters.values())])
            if amount:
                for meter in meters.values():
                    meter.charge(amount, now)

    def use(self, held: int, used: int, now: int) -> None:
        """Charge the tokens that were used in place of those that were held."""
        for meter in self.tokens.values():
            meter.held -= held
            if used:
                meter.charge(used, now)

    def leave(self) -> None:
        """An admitted request is not in flight any more."""
        self.in_flight -= 1

    def _exceeded(self, tokens: int, now: int) -> Iterator[Exceeded]:
        if self.concurrency is not None and self.in_flight >= self.concurrency:
            yield Exceeded("concurrency", self.concurrency, self.in_flight, 1, None)
        for meters, amount in ((self.requests, 1), (self.tokens, tokens)):
            for name, meter in meters.items():
                wait = meter.wait_ns(amount, now)
                if wait != 0:
                    yield Exceeded(name, meter.limit, meter.used(now) + meter.held, amount, wait)


def _meter(limit: Limit, name: str, minute_ns: int, day_ns: int) -> Meter:
    amount: int = getattr(limit, name)
    daily = name.endswith("d")
    period_ns = day_ns if daily else minute_ns
    rule = (limit.day_rule if daily else None) or limit.rule
    if rule == "sliding":
        return Sliding(amount, period_ns)
    if rule == "calendar":
        return Calendar(amount, period_ns, limit.tz)
    return Bucket(amount, period_ns, None if limit.burst_s is None else round(limit.burst_s * SECOND_NS))


def _recovery(exceeded: Exceeded) -> tuple[bool, bool, int]:
    """Sorts what is exceeded: a request too large goes last, before it what no time heals, then by wait."""
    return exceeded.too_large, exceeded.wait_ns is None, exceeded.wait_ns or 0
