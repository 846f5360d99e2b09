"""The judge's meters: how much of each limit an account has used for a class of models.

Pure and exact. Times are integer nanoseconds handed in by the caller, never decreasing; amounts are integers;
nothing is rounded except the waits, which round up. No arithmetic is shared with the broker that is judged.

Three window rules:

    bucket     refilled continuously at limit/period, starts full, holds `limit` (or `burst_s` seconds of
    refill,
               at least one request). A request larger than the bucket but within the limit needs a full
               bucket and leaves it negative.
    sliding    never more than the limit in any (t - period, t]: a log of every charge.
    calendar   fixed windows that start at multiples of the period; the day's at local midnight if it is 86400
    s.

A meter can also hold an amount that is not charged yet (tokens of requests being answered, where tokens are
charged by use): what is held is not available to others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

SECOND_NS = 1_000_000_000
DAY_NS = 86_400 * SECOND_NS


class Meter(ABC):
    """One limit under one rule. `now` is in nanoseconds and never decreases from call to call."""

    def __init__(self, limit: int, period_ns: int) -> None:
        self.limit = limit
        self.period_ns = period_ns
        self.held = 0

    @abstractmethod
    def wait_ns(self, amount: int, now: int) -> int | None:
        """0 if `amount` fits now, else the time until it will; None if time alone will never make it fit."""

    @abstractmethod
    def charge(self, amount: int, now: int) -> None:
        """Count `amount` as used, whether or not it fits."""

    @abstractmethod
    def used(self, now: int) -> int:
        """How much is used, rounded up; what is held is not in it."""

    @abstractmethod
    def reset_ns(self, now: int) -> int:
        """The time until nothing is used any more."""

    def remaining(self, now: int) -> int:
        """What an answer's headers say is left: at least 0."""
        return max(0, self.limit - self.used(now) - self.held)


class Bucket(Meter):
    """Continuous refill. The level counts in 1/period_ns of a unit: a nanosecond refills exactly `limit`."""

    def __init__(self, limit: int, period_ns: int, burst_ns: int | None = None) -> None:
        super().__init__(limit, period_ns)
        self._capacity = max(limit * (burst_ns or period_ns), period_ns)
        self._level = self._capacity
        self._seen: int | None = None

    def wait_ns(self, amount: int, now: int) -> int | None:
        if amount > self.limit:
            return None
        needed = min(amount * self.period_ns, self._capacity) + self.held * self.period_ns
        missing = needed - self._refilled(now)
        if missing <= 0:
            return 0
        return -(-missing // self.limit) if needed <= self._capacity else None

    def charge(self, amount: int, now: int) -> None:
        self._level = self._refilled(now) - amount * self.period_ns

    def used(self, now: int) -> int:
        return -(-(self._capacity - self._refilled(now)) // self.period_ns)

    def remaining(self, now: int) -> int:
        return max(0, self._refilled(now) // self.period_ns - self.held)

    def reset_ns(self, now: int) -> int:
        return -(-(self._capacity - self._refilled(now)) // self.limit)

    def _refilled(self, now: int) -> int:
        if self._seen is not None:
            self._level = min(self._capacity, self._level + (now - self._seen) * self.limit)
        self._seen = now
        return self._level


class Sliding(Meter):
    """An exact log of charges; one made at t counts until t + period, that instant excluded."""

    def __init__(self, limit: int, period_ns: int) -> None:
        super().__init__(limit, period_ns)
        self._charges: deque[tuple[int, int]] = deque()
        self._used = 0

    def wait_ns(self, amount: int, now: int) -> int | None:
        excess = self.used(now) + self.held + amount - self.limit
        if excess <= 0:
            return 0
        for at, charged in self._charges:
            excess -= charged
            if excess <= 0:
                return at + self.period_ns - now
        return None

    def charge(self, amount: int, now: int) -> None:
        self._charges.append((now, amount))
        self._used += amount

    def used(self, now: int) -> int:
        while self._charges and self._charges[0][0] <= now - self.period_ns:
            self._used -= self._charges.popleft()[1]
        return self._used

    def reset_ns(self, now: int) -> int:
        return self._charges[-1][0] + self.period_ns - now if self.used(now) else 0


class Calendar(Meter):
    """Fixed windows: multiples of the period, or the days of a time zone if the period is 86400 s."""

    def __init__(self, limit: int, period_ns: int, tz: str = "UTC") -> None:
        super().__init__(limit, period_ns)
        self._tz = ZoneInfo(tz)
        self._end = 0
        self._used = 0

    def wait_ns(self, amount: int, now: int) -> int | None:
        if self.used(now) + self.held + amount <= self.limit:
            return 0
        return self._end - now if self.held + amount <= self.limit else None

    def charge(self, amount: int, now: int) -> None:
        self._used = self.used(now) + amount

    def used(self, now: int) -> int:
        if now >= self._end:
            self._end, self._used = self._boundary_after(now), 0
        return self._used

    def reset_ns(self, now: int) -> int:
        return self._end - now if self.used(now) else 0

    def _boundary_after(self, now: int) -> int:
        if self.period_ns != DAY_NS:
            return (now // self.period_ns + 1) * self.period_ns
        tomorrow = datetime.fromtimestamp(now // SECOND_NS, self._tz).date() + timedelta(days=1)
        midnight = datetime(tomorrow.year, tomorrow.month, tomorrow.day, tzinfo=self._tz)
        return int(midnight.timestamp()) * SECOND_NS
