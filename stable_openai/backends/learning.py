"""What the headers of responses say of an account's limits: the twin of lua/learning.lua, which has the theory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from stable_openai._limits import BUCKET, MOST, Quota
from stable_openai.backends.meters import Bucket, Calendar, make_meter

if TYPE_CHECKING:
    from stable_openai.backends.state import Account, Lease, Pool

__all__ = ["declare", "forget", "learn"]

ROW = re.compile(r"([0-3]) ([0-9-]+) ([0-9-]+) ([0-3]) ([0-9.e+-]+) ([0-9.e+-]+)")
EVERYBODY = 2**52
Numbers = tuple[float, float, float, float]


def learn(pool: Pool, account: Account, lease: Lease, seen: str, earliest: Callable[[], int]) -> None:
    """`earliest` says when the account can serve the smallest request."""
    before, grown = None, False
    for number, limit, left, numbers in _rows(seen):
        known = account.meters[number]
        if limit is not None and (known is None or (number in account.learned and known.limit != limit)):
            if numbers is None:
                continue
            if known is not None:
                before = earliest() if before is None else before
                grown = grown or limit > known.limit or numbers[0] != account.quota[2 + 4 * number]
            account.learned.setdefault(number, pool.now)
            new = _with(account.quota, number, numbers)
            _carry(account, number, new, pool)
            account.quota = new
        meter = account.meters[number]
        if left is None or meter is None:
            continue
        if number > 1 and account.quota[1]:
            left += account.ever_held - lease.let_go
        meter.lower(left, lease.granted, pool.now)
    if before is not None and before > pool.now and earliest() < before:
        pool.revision += 1
        pool.freed += EVERYBODY
    else:
        pool.freed += grown


def declare(account: Account, quota: Quota, pool: Pool) -> None:
    """The limits of an account are these from now on; of what was learned, what they do not say stays."""
    account.learned = {number: since for number, since in account.learned.items() if not quota[2 + 4 * number]}
    for number in account.learned:
        quota = _with(quota, number, account.quota[2 + 4 * number : 6 + 4 * number])
    for number in range(4):
        _carry(account, number, quota, pool)
    account.quota = quota


def forget(account: Account) -> None:
    """What was learned of it."""
    for number in account.learned:
        account.meters[number] = None
        account.quota = _with(account.quota, number, (0, 0, 0, 0))
    account.learned = {}


def _carry(account: Account, number: int, quota: Quota, pool: Pool) -> None:
    """A changed limit keeps the level, clamped to the new capacity; another rule starts with what was used."""
    old, new = account.meters[number], make_meter(quota, number, pool)
    taken = math.ceil(old.used(pool.now)) if old else 0
    if isinstance(old, Bucket) and isinstance(new, Bucket):
        old.charge(0, pool.now)
        new.level, new.at = min(old.level, new.capacity), old.at
    elif old and type(old) is type(new) and not (isinstance(old, Calendar) and account.quota[-1] != quota[-1]):
        for kept in ("sum", "entries", "head", "taken", "start"):
            if hasattr(old, kept):
                setattr(new, kept, getattr(old, kept))
    elif new and taken > 0:
        new.charge(taken, pool.now)
    account.meters[number] = new


def _with(quota: Quota, number: int, numbers: Quota) -> Quota:
    return (*quota[: 2 + 4 * number], *numbers, *quota[6 + 4 * number :])


def _rows(seen: str) -> Iterator[tuple[int, int | None, int | None, Numbers | None]]:
    """Number of the meter, limit, what remains, and the meter's four numbers (None where they cannot be)."""
    for row in seen.split(";"):
        found = ROW.fullmatch(row)
        if found is None:
            continue
        number, of, remaining, rule, first, second = found.groups()
        limit, left = _number(of), _number(remaining)
        if of != "-" and not (limit is not None and 1 <= limit <= MOST):
            continue
        if remaining != "-" and not (left is not None and 0 <= left <= (limit or MOST)):
            continue
        yield int(number), limit, left, _meter(int(rule), limit, _number(first), _number(second))  # type: ignore[misc]
        # (a limit and what remains are whole)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _meter(rule: int, limit: float | None, first: float | None, second: float | None) -> Numbers | None:
    if limit is None or first is None or second is None:
        return None
    if rule == 0 or not 1 <= second <= MOST or second % 1 or first > MOST:
        return None
    if rule == BUCKET:
        return (rule, limit, first, second) if first > 0 else None
    return (rule, limit, first, second) if first >= 0 and first % 1 == 0 else None
