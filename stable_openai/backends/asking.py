"""One acquire in memory: the twin of lua/acquire.lua and of serve() in lua/choose.lua."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stable_openai._ops import LARGE, Acquire, Answer, Ask, Gone, Granted, Member, Refused, TooLarge
from stable_openai.backends.line import Line, Slot
from stable_openai.backends.meters import POLL
from stable_openai.backends.state import EXAMINED, LIVE, NEVER, UNHEARD, ModelClass, Pool, Ring

if TYPE_CHECKING:
    from stable_openai.backends.memory import MemoryBackend

__all__ = ["Asking"]


class Asking:
    """One acquire: what answer(), serve() and line_of() of lua/acquire.lua and lua/choose.lua share."""

    line: Line | None = None
    alone: Answer | None = None
    wait: int | None = None
    reason, vague = "", False
    _smaller: dict[tuple[str, tuple[str, ...]], tuple[int, Refused]] | None = None

    def __init__(self, backend: MemoryBackend, pool: Pool, known: ModelClass, ring: Ring, op: Acquire) -> None:
        self.backend, self.pool, self.known, self.ring, self.op = backend, pool, known, ring, op
        if known.claims or (len(op.asks) > 1 and op.demand):
            self.line = self._line_of()

    def _line_of(self) -> Line:
        op = self.op
        size = min(EXAMINED, len(self.ring.index.order))
        keeps = bool(op.asks) and op.asks[0].rank >= LARGE
        return Line(self.known.claims, op.demand, op.to.ring, self.pool.now, self._slot, self._room, size, keeps)

    def _slot(self, count: int, tokens: int, model: str) -> Slot:
        """When so many requests of a size can be served, whichever accounts serve them."""
        order = self.ring.index.order
        size = min(EXAMINED, len(order))
        found: list[Member] = []
        best: Slot = NEVER, "", False, ""
        least, unknown = NEVER + 1, NEVER
        for _, name in order[:size]:
            member = self.ring.members[name]
            at, why, loose, _ = self._judge(member, tokens, model)
            as_good_as = at
            if loose and why == "disabled":
                as_good_as = NEVER - 1
            elif loose:
                unknown = min(unknown, at)
            elif at < NEVER:
                found.append(member)
            if as_good_as < least:
                best, least = (at, why, loose, name), as_good_as
        count = math.ceil(count * size / len(order))
        if count == 1 or not found:
            return best
        parts = 1 if len(found) == 1 else 2 * len(found)
        rows = [[NEVER, n, 0, math.ceil(count / parts)] for n in range(len(found))]
        looked = rows
        while True:
            for row in looked:
                at, _, loose, _ = self._judge(found[row[1]], tokens, model, row[2] + row[3])
                while loose and row[3] > 1:
                    row[3] = math.ceil(row[3] / 2)
                    at, _, loose, _ = self._judge(found[row[1]], tokens, model, row[2] + row[3])
                if loose:
                    at, unknown = NEVER, min(unknown, at)
                row[0] = at
            row = min(rows)
            if row[0] == NEVER or unknown < row[0]:
                return unknown, best[1], True, best[3]
            if row[3] == count:
                return row[0], best[1], False, best[3]
            if row[3] < count:
                count, row[2] = count - row[3], row[2] + row[3]
                row[3] = math.ceil(count / parts)
            else:
                row[3] = count
            looked = [row]

    def _room(self, most: int, tokens: int, model: str) -> int:
        """How many requests of a size can be served now; so many, where it is more."""
        order = self.ring.index.order
        size = min(EXAMINED, len(order))
        left = asked = math.ceil(most * size / len(order))
        for _, name in order[:size]:
            low, high, middle = 0, left + 1, left
            while high - low > 1:
                if self._judge(self.ring.members[name], tokens, model, middle)[0] <= self.pool.now:
                    low = middle
                else:
                    high = middle
                middle = (low + high) // 2
            left -= low
            if left == 0:
                break
        return math.floor((asked - left) * len(order) / size)

    def _judge(
        self, member: Member, tokens: int, model: str, count: int = 1, holding: str = ""
    ) -> tuple[int, str, bool, str]:
        if self.line is None:
            return self.backend.judge(self.pool, self.known, member, tokens, model, count)
        held = self.line.holds.get(member.account, 0) if member.account != holding else 0
        return self.backend.judge(self.pool, self.known, member, tokens, model, count, held)

    def answer(self, ask: Ask) -> Answer:
        """Not before its turn; nor where one that is no larger has just been refused."""
        lease, band = self.known.leases.get(ask.id), ask.rank % LARGE
        if lease and lease.state != LIVE:
            if self.line:
                self.line.left[band] -= 1
            return Gone()
        if lease and self.pool.now - lease.granted >= UNHEARD:
            self.backend.refund(self.known, lease)  # who asks again has not had it so far
            del self.known.leases[ask.id]
        elif lease:
            lease.expires = self.pool.now + self.op.ttl_ms
            self.known.watch(ask.id, lease.expires)
            if self.line:
                self.line.served(band, ask.tokens, ask.model)
            return Granted(ask.id, lease.key, lease.account)
        if self._smaller is None:
            self._smaller = {}
        known = self._smaller.get((ask.model, ask.never))
        if known and ask.tokens >= known[0]:
            return known[1]
        refusal: Refused | None = None
        for_it = self.line is not None and ask.rank >= LARGE and self.line.mine.held != ""
        if self.line and not for_it and self.line.waits(band, ask.tokens, ask.model):
            refusal = self._later(band, 0 if ask.rank >= LARGE else ask.tokens, ask.model)
            if refusal:
                refusal = refusal._replace(wait_ms=self.line.looks_again(refusal.wait_ms))
        if refusal is None:
            large = ask.rank >= LARGE
            answer = self.alone or self.serve(ask, self.line.mine.held if large and self.line else "")
            if isinstance(answer, Granted) and self.line:
                self.line.served(band, ask.tokens, ask.model)
                if large and self.line.mine.held == answer.account:
                    self.line.let_go()
            if self.line and isinstance(answer, TooLarge):
                self.line.left[band] -= 1  # it will not be asked for again
            if not isinstance(answer, Refused):
                return answer
            self.line = self.line or (self._line_of() if self.op.demand else None)
            if large and self.line:
                self.line.hold(answer.account, answer.wait_ms, ask.tokens)
            holds = large and self.line is not None and self.line.mine.held == answer.account
            later = None if holds else self._later(band, ask.tokens, ask.model)
            refusal = later if later and later.wait_ms > answer.wait_ms else answer
        self._smaller[ask.model, ask.never] = (ask.tokens, refusal)
        if self.wait is None or refusal.wait_ms < self.wait:
            self.wait, self.reason, self.vague = refusal.wait_ms, refusal.reason, not refusal.timed
        return refusal

    def _later(self, band: int, tokens: int, model: str) -> Refused | None:
        found = self.line.later(band, tokens, model) if self.line else None
        if found is None:
            return None
        ms, why, loose, account = found
        return Refused(ms, why or "line", False, not loose, account)

    def end(self) -> tuple[int, int]:
        """How many of the line can be served in time, and when the last of them."""
        if self.line is None:
            return -1, -1
        model = self.op.asks[0].model if self.op.asks else ""
        known = self.known
        known.claims, *in_time = self.line.save(known.wakes, self.wait, self.reason, self.vague, model)
        return in_time[0], in_time[1]

    def serve(self, ask: Ask, holding: str) -> Answer:
        pool, ring = self.pool, self.ring
        now = pool.now
        if pool.breaker:
            open_at = pool.opens(pool.breaker)
            if open_at is None:
                return Refused(POLL, pool.breaker.reason, False, False)
            if open_at > now:
                return Refused(open_at - now, pool.breaker.reason, False, True)
        best, why, loose, whose, bounded, last = NEVER, "", False, "", False, 0.0
        first_try = True
        ahead: list[tuple[float, str]] = []
        candidates = ring.index.order[:EXAMINED]
        if ask.wanted:
            scores = ring.index.scores
            ahead = [(scores[name], name) for name in ask.wanted if name in scores]
            candidates = ahead + candidates
        for avoided in (False, True) if ask.avoid else (False,):
            for n, (at, name) in enumerate(candidates):
                if n >= len(ahead) and at >= now + 1 and at >= best:
                    bounded = True
                    break
                last = max(last, at)
                if (name in ask.avoid) != avoided or name in ask.never:
                    continue
                member = ring.members[name]
                time, reason, vague, key = self._judge(member, ask.tokens, ask.model, 1, holding)
                if time <= now:
                    return self.backend.grant(pool, self.known, ring, ask, member, key, at, self.op.ttl_ms)
                if vague and reason == "disabled":  # somebody has to enable it
                    time = NEVER - 1
                if time < best or first_try:
                    best, why, loose, whose, first_try = time, reason, vague, name, False
                small = self._judge(member, 0, "", 1, name)[0]  # a hold may end at any time
                if small > now:
                    ring.index.put(name, small)
                elif len(ring.index.order) >= EXAMINED:
                    ring.index.put(name, self.backend.back(pool, self.known.look(name, pool), member.weight))
            else:
                bounded = bounded or len(ring.index.order) < EXAMINED
        if not bounded:
            return Refused(math.floor(max(0, min(best, last) - now)), why, False, True, whose)
        if best == NEVER:
            return TooLarge(why)
        if best == NEVER - 1:
            best = now + POLL
        return Refused(best - now, why, not loose, not loose, whose)
