"""Who waits for a class, and whose turn it is: the twin of lua/line.lua, which has the theory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from stable_openai._ops import RETURNS_MS, TICKETS, Demand, is_ticket
from stable_openai.backends.meters import POLL

__all__ = ["Claim", "Line", "valid", "wake"]

GRACE, SOON = 1000, 50
Slot = tuple[int, str, bool, str]


@dataclass(slots=True)
class Claim:
    id: str
    ring: str
    told: int = 0
    smallest: int = 0
    reason: str = ""
    held: str = ""
    held_until: int = 0
    waiting: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    turns: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])


def valid(claims: list[Claim], now: int) -> list[Claim]:
    return [claim for claim in claims if claim.told + GRACE > now]


def wake(wakes: list[int], claims: list[Claim], count: int, hops: int | None = None) -> None:
    """Wake so many waiting workers, but never more than wait."""
    count = min(count, len(claims) - len(wakes))
    wakes.extend([len(claims) - 1 if hops is None else hops] * count)


class Line:
    """The line as the worker sees it that asks now.

    Args:
        slot: when so many requests of a size can be served: time, reason, whether it is loose, account.
        room: how many requests of a size can be served now; so many, where it is more.
        size: how many accounts a look covers.
    """

    def __init__(
        self,
        claims: list[Claim],
        demand: Demand | None,
        ring: str,
        now: int,
        slot: Callable[[int, int, str], Slot],
        room: Callable[[int, int, str], int],
        size: int,
        keeps: bool,
    ) -> None:
        self.now, self.slot, self.room, self.size = now, slot, room, size
        self.free: dict[tuple[int, str], int] = {}
        demand = demand or Demand("", (1, 1, 1, 1), 0)
        if demand.claim.startswith("t."):  # a ticket: it has come now
            demand = demand._replace(claim=f"t{now:013d}{demand.claim[1:]}")
        self.demand = demand
        self.hops = self.demand.hops
        self.left = list(self.demand.bands)
        self.all = valid(claims, now)
        was = next((claim for claim in self.all if claim.id == self.demand.claim), None)
        if was:
            self.all.remove(was)
        self.others = [claim for claim in self.all if claim.ring == ring]
        self.holds = {claim.held: claim.held_until for claim in self.all if claim.held and claim.held_until > now}
        self.newcomer = was is None
        self.fits: dict[int, bool] = {}
        self.was_held = was.held if was else ""
        self.mine = mine = Claim(self.demand.claim, ring, now, self.demand.smallest)
        self.ticket = is_ticket(mine.id)
        after = [claim for claim in self.others if self.ticket and is_ticket(claim.id) and claim.id > mine.id]
        if was and keeps and was.held and was.held_until > now:
            mine.held = was.held
        mine.held_until = was.held_until if was else 0
        if mine.held:
            self.holds[mine.held] = mine.held_until
        mine.waiting = list(self.left)
        for b in range(4):
            turns = [claim.turns[b] for claim in self.others if claim.waiting[b]]
            later = [claim.turns[b] for claim in after if claim.waiting[b]]
            before, waiting = was.waiting[b] if was else 0, max(1, self.left[b])
            mine.turns[b] = was.turns[b] if was and before else 0
            if turns and not before:
                mine.turns[b] = min(later) if later else min(turns) + 1 / waiting
            elif turns and waiting >= 2 * before:
                mine.turns[b] = min(turns) + (mine.turns[b] - min(turns)) * before / waiting

    def _ahead(self, b: int, turn: float, tokens: int, model: str, every: bool) -> tuple[int, int]:
        """How many, and how large these and the one itself are on average."""
        n, size = 0, tokens
        for claim in self.others:
            need, count = claim.smallest, claim.waiting[b]
            if need > tokens and not every:
                need = 1 << (need - 1).bit_length()  # few sizes are looked at
            if need > tokens and not every and need not in self.fits:
                self.fits[need] = self.slot(1, need, model)[0] <= self.now
            if every or need <= tokens or self.fits[need]:
                before = n
                n += sum(claim.waiting[:b])
                if self.newcomer and not every:
                    n += count
                elif every or claim.told <= self.now:
                    gap = (turn - claim.turns[b]) * count
                    first = every and claim.id < self.demand.claim  # of those whose turn is the same
                    n += max(0, min(count, math.floor(gap + 1e-6) + 1 if first else math.ceil(gap - 1e-6)))
                size += (n - before) * need
        return n, size // (n + 1)

    def waits(self, b: int, tokens: int, model: str) -> bool:
        """Whether the next request of a band has to leave what is free to others."""
        if not self.others:
            return False
        n, size = self._ahead(b, self.mine.turns[b], tokens, model, False)
        if n == 0:
            return False
        free = self.free.get((size, model))
        if free is None:
            most = 1 + sum(self.left) + sum(sum(claim.waiting) for claim in self.others)
            free = self.free[size, model] = self.room(most, size, model)
        return n >= free

    def later(self, b: int, tokens: int, model: str) -> Slot | None:
        """When it is its turn, if that is not before: ms, reason, whether it is loose, account."""
        if not self.others:
            return None
        n, size = self._ahead(b, self.mine.turns[b], tokens, model, True)
        at, why, loose, account = self.slot(n + 1, size, model)
        if at <= self.now:  # who is not in line yet leaves what is free to those who are; from now on it has its turn
            return SOON if self.newcomer else GRACE, "", False, account
        if n > 0 and at < 2**52:
            return at - self.now, why, loose, account
        return None

    def served(self, b: int, tokens: int, model: str) -> None:
        free = self.free.get((tokens, model))
        self.free = {} if free is None else {(tokens, model): free - 1}
        self.mine.turns[b] += 1 / max(1, self.mine.waiting[b])
        self.left[b] -= 1
        self.hops = -1

    def hold(self, account: str, wait: int, tokens: int) -> None:
        """Nothing else is granted of the account until then, where smaller ones would take what comes free; at most
        every second account is held."""
        if tokens <= min([self.demand.smallest, *(claim.smallest for claim in self.others)]):
            return
        if not self.mine.held and account not in self.holds and len(self.holds) < max(1, self.size // 2):
            self.mine.held = account
        if self.mine.held == account:
            self.mine.held_until = self.holds[account] = self.now + wait + GRACE

    def looks_again(self, ms: int) -> int:
        """Of those that are due some may never come: who would wait for long looks again when they have lost their
        claims."""
        due = any(claim.told <= self.now for claim in self.others)
        return GRACE if due and ms > POLL and not self.newcomer and not self.ticket else ms

    def let_go(self) -> None:
        self.holds.pop(self.mine.held)
        self.mine.held = self.was_held = ""

    def _in_time(self, left: int, model: str) -> tuple[int, int]:
        def comes(n: int) -> tuple[bool, int]:
            within = n
            for b in range(4):
                if within <= self.left[b]:
                    break
                within -= self.left[b]
            turn = self.mine.turns[b] + (within - 1) / self.left[b]
            others, size = self._ahead(b, turn, self.mine.smallest, model, True)
            at, _, loose, _ = self.slot(n + others, size, model)
            return loose or at <= self.now + self.demand.patience_ms, at

        in_time, last = comes(left)
        if in_time:
            return -1, -1
        low, high = 0, left
        while high - low > 1:
            middle = (low + high) // 2
            if comes(middle)[0]:
                low = middle
            else:
                high = middle
        return low, last - self.now

    def save(
        self, wakes: list[int], wait: int | None, why: str, loose: bool, model: str
    ) -> tuple[list[Claim], int, int]:
        """The claims from now on, how many of the line can be served in time, and when the last; for a ticket, how many
        of them came before it."""
        mine, count, last = self.mine, -1, -1
        self.left = [max(0, n) for n in self.left]
        mine.waiting, left = list(self.left), sum(self.left)
        due = any(claim.told <= self.now for claim in self.others)
        asks_early = self.newcomer and wait is not None and not due and bool(self.others)
        if asks_early and self.slot(1, mine.smallest, model)[0] <= self.now:
            wake(wakes, self.all, 1)
        elif self.hops > 0 and self.all:
            wake(wakes, self.all, 1, self.hops - 1)
        if self.was_held and mine.held != self.was_held:  # what was held, for one that has left
            wake(wakes, self.all, len(self.others))
        patience = self.demand.patience_ms
        stays = wait is None or (loose and patience != 0) or patience < 0 or wait <= patience
        if mine.id and left and stays:
            mine.told, mine.reason = self.now + (min(wait or 0, RETURNS_MS) if self.ticket else wait or 0), why
            if left > 1 and wait is not None and patience >= 0:
                count, last = self._in_time(left, model)
            self.all.append(mine)
            tickets = [claim for claim in self.all if self.ticket and is_ticket(claim.id)]
            if self.ticket:
                count = sum(is_ticket(claim.id) and claim.id < mine.id for claim in self.others)
            if len(tickets) > TICKETS:
                self.all.remove(max(tickets, key=lambda claim: claim.id))
        if not self.all:  # nobody is left to be woken
            wakes.clear()
        return self.all, count, last
