"""How much of a limit is used, under each window rule: the twin of lua/meters.lua, in the same arithmetic.

A meter is made for one account from four numbers of its quota (see `_limits.quota`). All times are milliseconds
since the pool's base. `ready` says when the meter admits `n` more beside what is `held`: a time (0: at once), or
None where that has no time; with a `count`, when it admits the last of so many, from the time `opens` on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from stable_openai._limits import BUCKET, SLIDING, Quota

__all__ = ["POLL", "Bucket", "Calendar", "Meter", "Sliding", "drain", "make_meter", "use_up_to"]

POLL = 5000
LOG = 100
DAY = 86_400_000
Window = Callable[[int], tuple[int, int] | None]


class Bucket:
    """Refilled continuously; full at first."""

    __slots__ = ("at", "capacity", "level", "limit", "rate")

    def __init__(self, limit: int, rate: float, capacity: int, now: int) -> None:
        self.limit, self.rate, self.capacity = limit, rate, capacity
        self.level: float = capacity
        self.at = now

    def ready(self, n: int, held: int, at: int, opens: int, count: int = 1) -> int | None:
        need = n + held
        if need > self.capacity:
            if held > 0:
                return None
            need = self.capacity
        level, since = self.level, self.at
        if count > 1:  # until it opens it fills up, and no further
            need += (count - 1) * min(n, self.capacity)
            if opens > since:
                level, since = min(self.capacity, level + (opens - since) * self.rate), opens
        if level >= need:
            return 0
        return since + math.ceil((need - level) / self.rate)

    def charge(self, n: float, now: int) -> None:
        level = self.level
        if now > self.at:
            level, self.at = level + (now - self.at) * self.rate, now
        self.level = (min(self.capacity, level)) - n

    def amend(self, n: float, granted: int, now: int) -> None:
        if n < 0:
            n = -max(0, -n - self.rate * max(0, now - granted))
        self.charge(n, now)
        self.level = min(self.capacity, self.level)

    def lower(self, left: float, granted: int, now: int) -> None:
        """No more is left than that, said at the earliest when it was granted (see lua/learning.lua)."""
        level, at = self.level, self.at
        if now > at:
            level, at = min(self.capacity, level + (now - at) * self.rate), now
        left += self.rate * max(0, now - granted)
        if left < level:
            self.level, self.at = left, at

    def still(self, n: float, at: int, now: int) -> float:
        """How much of what was used at a time still counts."""
        return max(0, n - self.rate * max(0, now - at))

    def used(self, now: int) -> float:
        """What is used of the limit now; looking changes nothing."""
        return self.capacity - min(self.capacity, self.level + max(0, now - self.at) * self.rate)


class Sliding:
    """An exact log up to 100 entries; beyond that an entry's time is the end of its slot. `head` is the time of the
    last that has expired."""

    __slots__ = ("entries", "head", "limit", "period", "pool", "slot", "sum")

    def __init__(self, limit: int, period: int, slot: int, pool: Any) -> None:
        self.limit, self.period, self.slot, self.pool = limit, period, slot, pool
        self.sum = 0
        self.head = pool.now - 2 * period
        self.entries: list[list[int]] = []

    def ready(self, n: int, held: int, at: int, opens: int, count: int = 1) -> int | None:
        if n + held > self.limit:
            return None
        if count > 1:
            return _in_rounds(self, n * count + held, at, self.pool.now, self.period)
        return self.room(n + held, at)

    def room(self, need: int, at: int) -> int:
        """When there is room for so much."""
        over = self.sum + need - self.limit
        if over <= 0:
            return 0
        for time, amount in self.entries:
            over -= amount
            if over <= 0:
                return time + self.period
        raise AssertionError("what is used is more than its entries")

    def _prune(self, now: int) -> list[list[int]]:
        entries = self.entries
        gone = 0
        for time, amount in entries:
            if time + self.period > now:
                break
            self.sum -= amount
            self.head = time
            gone += 1
        if gone:
            del entries[:gone]
        return entries

    def charge(self, n: int, now: int) -> None:
        entries = self._prune(now)
        if n == 0:
            return
        at = now if len(entries) < LOG else math.ceil(now / self.slot) * self.slot
        self.sum += n
        if entries and entries[-1][0] >= at:
            entries[-1][1] += n
        else:
            entries.append([at, n])

    def amend(self, n: int, granted: int, now: int) -> None:
        if granted + self.period <= now:
            return  # its window has gone
        for entry in self._prune(now):
            if entry[0] >= granted:
                amended = max(0, entry[1] + n)
                self.sum += amended - entry[1]
                entry[1] = amended
                return

    def lower(self, left: int, granted: int, now: int) -> None:
        self._prune(now)
        before = self.sum
        missing = self.limit - left - before
        if missing > 0 and granted + self.period > now and self.head + self.period <= granted:
            self.amend(missing, granted, now)
            if self.sum == before:  # the grant has no entry
                self.charge(missing, now)

    def still(self, n: float, at: int, now: int) -> float:
        return n if at + self.period > now else 0

    def used(self, now: int) -> float:
        return sum(amount for time, amount in self.entries if time + self.period > now)


class Calendar:
    """Reset at the full minute, or at midnight; grants nothing so close to a boundary that it may arrive after it."""

    __slots__ = ("headroom", "limit", "period", "pool", "start", "taken", "window")

    def __init__(self, limit: int, headroom: int, window: Window, period: int, pool: Any, now: int) -> None:
        self.limit, self.headroom, self.window, self.period, self.pool = limit, headroom, window, period, pool
        self.taken = 0
        current = window(now)
        self.start = current[0] if current else 0

    def ready(self, n: int, held: int, at: int, opens: int, count: int = 1) -> int | None:
        if n + held > self.limit:
            return None
        if count > 1:
            return _in_rounds(self, n * count + held, at, self.pool.now, self.period or DAY)
        return self.room(n + held, at)

    def room(self, need: int, at: int) -> int:
        """When there is room for so much, seen from the time `at`."""
        current = self.window(at)
        if current is None:
            pooled_now: int = self.pool.now
            return pooled_now + POLL  # of `at` it would rise for ever
        start, finish = current
        base: int = self.pool.base
        if at + base >= finish - self.headroom:
            return finish - base
        if self._is_others(start) or self.taken + need <= self.limit:
            return 0
        return finish - base

    def charge(self, n: int, now: int) -> None:
        current = self.window(now)
        if current and self._is_others(current[0]):
            self.taken, self.start = 0, current[0]
        self.taken += n

    def amend(self, n: int, granted: int, now: int) -> None:
        current = self.window(granted)
        if current and current[0] == self.start:
            self.taken = max(0, self.taken + n)

    def lower(self, left: int, granted: int, now: int) -> None:
        self.charge(0, now)
        base: int = self.pool.base
        missing = self.limit - left - self.taken
        if missing > 0 and granted + base >= self.start + self.headroom:
            self.amend(missing, granted, now)

    def still(self, n: float, at: int, now: int) -> float:
        current = self.window(now)
        return n if current and current == self.window(at) else 0

    def used(self, now: int) -> float:
        current = self.window(now)
        return 0 if current and self._is_others(current[0]) else self.taken

    def _is_others(self, start: int) -> bool:
        """Whether what was taken is another window's: an earlier one's, or (after a jump back) one's far ahead."""
        return self.start < start or self.start > start + (self.period or DAY)


def _in_rounds(meter: Sliding | Calendar, need: int, at: int, now: int, period: int) -> int:
    """When there was room for what may be more than the limit: as many periods later as that is filled before."""
    rounds = max(0, math.ceil(need / meter.limit) - 1)
    time = meter.room(need - rounds * meter.limit, at)
    return max(now, time) + rounds * period if rounds else time


Meter = Bucket | Sliding | Calendar


def use_up_to(meter: Meter, n: float, now: int) -> None:
    """Charge what is missing of so much."""
    missing = n - meter.used(now)
    if missing > 0:
        meter.charge(missing, now)  # type: ignore[arg-type]  # of windows it is whole


def drain(meter: Meter, now: int) -> None:
    """Nothing is left of it."""
    use_up_to(meter, meter.capacity if isinstance(meter, Bucket) else meter.limit, now)


def make_meter(quota: Quota, number: int, pool: Any) -> Meter | None:
    """The meter `number` (0 to 3: rpm, rpd, tpm, tpd) of a quota; None where there is no limit."""
    rule, limit, first, second = quota[2 + 4 * number : 6 + 4 * number]
    if not rule:
        return None
    if rule == BUCKET:
        return Bucket(limit, first, second, pool.now)
    if rule == SLIDING:
        return Sliding(limit, first, second, pool)
    return Calendar(limit, first, pool.window(second, quota[-1]), second, pool, pool.now)
