"""The line: who waits in this process for keys of one ring, in which order, and who asks the broker for all.

There is one line for threads and one for each event loop. Its head leads: it alone asks, for everyone at once; sleeps
until the time it was told, or until it is woken; hands out what it got; and when it is served, cancelled or out of
time, the next one leads. What leads is a caller's own flow (`_obtain.py`); here is only what it works on. There is no
thread or task of the line's own, and a forked child begins with none.

THE ORDER is by band, 0 the most urgent, and in a band by who came first; a call that returns for another key keeps its
place. A waiter rises one band for each 30 s that it waits, by the store's clock.

WHO IS ASKED FOR. Eight from the front (what is granted together should also be sent together, since the upstream counts
when requests arrive); behind them, up to the 200th, everyone who wants fewer tokens than all before, and the first for
each other model: so a large request at the head stops no small one, and a model that no key serves no other. Where the
head has not fitted for 2 s, it is asked for as LARGE, and the store holds one account for it: so the small ones do not
stop it either. The store is told how many wait in each band, and shares between workers (lua/line.lua).
"""

from __future__ import annotations

import heapq
import math
import random
import threading
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

from stable_openai._ops import LARGE, Acquired, Answer, Ask, Demand, Granted, Refused, Registration
from stable_openai._waiter import BANDS, Moved, Waiter, Waiting

__all__ = ["LARGE_AFTER_MS", "NO_ROOM", "POLL_S", "RISE_MS", "Line", "of_one"]

ONE = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
RISE_MS = 30_000
LARGE_AFTER_MS = 2000
NO_ROOM = ("tpm", "tpd", "held")  # for a request of its size
ASKS, LOOKED_AT = 8, 200
ALONE = 8  # so many ask by themselves at the same time while nobody waits
POLL_S = 5.0
SHORTEST_S = 0.02
QUIET_S = 1.0
REPORT_AFTER_S, REPORT_MOST_S = 5.0, 60.0
UNREACHED = Refused(0, "redis", False, False)


class Line:
    """The waiters of one ring and one colour. All methods may be called from any thread; none blocks or does I/O."""

    def __init__(self, to: Registration, claim: str) -> None:
        self.to = to
        self.claim = claim
        self.leader: Waiter | None = None
        self.listener: Any = None
        self.deaf_s = 0.0  # how long it was not listened for after the last break
        self._passes_on = False
        self._quiet_until = 0.0
        self.refusal: Refused | None = None
        self._mutex = threading.Lock()
        # By band; of each those who have returned, and the others.
        self._groups: list[dict[Waiter, None]] = [{} for _ in range(2 * BANDS)]
        self._asking = 0
        self._claimed = False
        self._told = 0.0
        self._nudged = self._granted = False
        self._hops = -1
        self._looks = 0
        self._offset: float | None = None
        self._best_asked = (0, 0)
        self._counted, self._exact = 1, True
        self._shapes: set[tuple[str, tuple[str, ...]]] = set()
        self._claims = count(2)
        self.failing = False  # the store did not answer the last time: nobody need say farewell to it
        self._patience = 0.0
        self._reported, self._report_again_s = 0.0, REPORT_AFTER_S

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def is_idle(self) -> bool:
        """Nobody waits or asks: another may take its place (who joins it nevertheless is moved there)."""
        return not self._asking and not len(self)

    def __contains__(self, id: str) -> bool:
        return any(waiter.id == id for group in self._groups for waiter in tuple(group))

    # A call that finds nobody waiting asks by itself.

    def begin_alone(self, waiter: Waiter, now: float) -> tuple[Ask, Demand] | None:
        """A call's own ask, and what the store is told with it; None: others wait, or enough are asking."""
        with self._mutex:
            if self._asking >= ALONE or len(self):
                return None
            self._asking += 1
        band = self._band(waiter, self._server(now))
        return waiter.ask(band), of_one(self.claim, band, waiter.request.tokens, waiter.deadline - now)

    def end_alone(self, waiter: Waiter, answer: Answer | None, now_ms: int, now: float) -> None:
        with self._mutex:
            self._asking -= 1
            if answer is not None:
                self._offset = now_ms - now * 1000
            if answer is None:  # what came of it is not known
                self._claimed = True
            else:
                self.failing = False
            if len(self):  # who joined meanwhile: the store has been told of this call only
                self.nudge()
            elif type(answer) is Refused:
                self._claimed = not (answer.timed and now + answer.wait_ms / 1000 > waiter.deadline)
                self._counted, self._shapes = 1, {waiter.shape}
                self._best_asked = (waiter.request.band, waiter.request.tokens)
                self._note_short(waiter, answer, now_ms)
                self._refuse([answer], now)

    # Joining and leaving.

    def join(self, waiter: Waiter, now: float) -> None:
        if waiter.joined is None:
            waiter.joined = now
        with self._mutex:
            if not len(self):
                self._reported, self._report_again_s, self._granted = 0.0, REPORT_AFTER_S, False
                if not waiter.asked:  # those for whom the line had asked have gone
                    self._told = now
            self._groups[2 * waiter.request.band + (not waiter.returned)][waiter] = None
            if self.leader is None:
                self._lead(waiter)
                return
            grown = not self._exact and len(self) >= 2 * self._counted
            band, tokens = self._best_asked
            differs = waiter.request.band < band or waiter.request.tokens < tokens or waiter.shape not in self._shapes
            if not differs and self._told > waiter.deadline and self.refusal is not None and self.refusal.timed:
                self._answer(waiter, self.late(now))  # not even those before it can be served in time
                return
        if grown or differs:
            self.nudge()  # it may be served before the others; or for so many, the store names another time

    def leave(self, waiter: Waiter) -> None:
        """The lead passes on, and so does what the waiter was granted and does not take."""
        with self._mutex:
            self._groups[2 * waiter.request.band + (not waiter.returned)].pop(waiter, None)
            if waiter.large and type(waiter.answer) is not Granted:
                self._nudged = True  # an account may be held for it
            if self.leader is waiter:
                self.leader = None
                heads = [next(iter(group)) for group in self._groups if group]
                if heads:
                    self._lead(min(heads, key=lambda head: (self._band(head), head.number)))

    def _lead(self, waiter: Waiter) -> None:
        self.leader = waiter
        waiter.leads = True
        waiter.signal()

    def hand_on(self, granted: Granted, tokens: int, model: str) -> bool:
        """Give a lease whose waiter has gone to the first who can use it; False: there is none."""
        with self._mutex:
            for waiter in islice(self._order(), LOOKED_AT):
                request = waiter.request
                if request.model == model and request.tokens <= tokens and granted.account not in waiter.never:
                    self._answer(waiter, granted)
                    return True
        return False

    def end(self) -> tuple[str, Any]:
        """For who leaves: the claim that the store has of a line that is empty now, and the listener to be stopped."""
        with self._mutex:
            if len(self) or self._asking:
                return "", None
            claim = self.claim if self._claimed and not self.failing else ""
            if self._claimed:  # who joins from now on has another
                self.claim, self._claimed = f"{self.claim.partition('/')[0]}/{next(self._claims)}", False
            listener, self.listener = self.listener, None
            return claim, listener

    def has_traces(self) -> bool:
        return self._claimed or self.listener is not None

    def late(self, now: float) -> Refused:
        """Why a call's time is over: what was said last."""
        refusal = UNREACHED if self.failing else self.refusal
        if refusal is None:
            return Refused(0, "line", False, False)
        return refusal._replace(wait_ms=max(0, math.ceil((self._told - now) * 1000)))

    # What the leader does.

    def nudge(self) -> None:
        """Something has changed: the leader should ask at once."""
        self._nudged = True
        listener, leader = self.listener, self.leader
        if listener is not None:
            listener.nudge()
        if leader is not None:
            leader.signal_from_anywhere()

    @property
    def nudged(self) -> bool:
        return self._nudged

    def grants_more(self) -> bool:
        """Whether all that was asked for last was granted: there will be more."""
        granted, self._granted = self._granted, False
        return granted

    def woken(self, hops: int, now: float) -> None:
        """The store has called; so many others may use what it called for."""
        self._told, self._hops = now, hops

    def quiet(self, now: float) -> float:
        """Seconds for which the wake that was just passed on is left to the others, who may not be listening yet."""
        return max(0.0, self._quiet_until - now)

    def delay(self, now: float, seconds: float) -> None:
        self._told = now + seconds

    def pause(self, now: float) -> float:
        """Seconds until it is time to ask."""
        if self._nudged:
            self._nudged = False
            return 0.0
        with self._mutex:
            server = self._server(now)
            head = next(self._order(server), None)
        told = self._told - now
        if head is None or server is None:
            return told
        if head.short_since is not None and not head.large:
            told = min(told, max(0.0, (head.short_since + LARGE_AFTER_MS - server) / 1000))
        if self._best_asked[0] > 0 and not self._exact:  # when it rises, it comes before those of other workers
            rises = head.request.band - self._best_asked[0] + 1
            told = min(told, max(0.0, (self._since(head) + rises * RISE_MS - server) / 1000))
        return told

    def pick(self, now: float) -> tuple[list[Waiter], tuple[Ask, ...], Demand]:
        """Who is asked for, and what the store is told of the others."""
        with self._mutex:
            server = self._server(now)
            picked: list[Waiter] = []
            smallest = math.inf
            shapes: set[tuple[str, tuple[str, ...]]] = set()
            for place, waiter in enumerate(islice(self._order(server), LOOKED_AT)):
                tokens = waiter.request.tokens
                if place < ASKS or tokens < smallest or (waiter.shape not in shapes and len(shapes) < ASKS):
                    waiter.asking = True
                    picked.append(waiter)
                    shapes.add(waiter.shape)
                    smallest = min(smallest, tokens)
            bands, last = [0] * BANDS, 0.0
            for number, group in enumerate(self._groups):
                risen = 0
                for waiter in group:
                    band = self._band(waiter, server)
                    if band == number // 2:
                        break
                    bands[band] += 1
                    risen += 1
                bands[number // 2] += len(group) - risen
                if group:
                    last = max(last, max(waiter.deadline for waiter in group))
        if not picked:
            return [], (), Demand(self.claim, (0, 0, 0, 0), 0)
        large = self._is_large(picked[0], server)
        asks = tuple(waiter.ask(self._band(waiter, server), large and waiter is picked[0]) for waiter in picked)
        hops, self._hops, self._counted = self._hops, -1, sum(bands)
        self._passes_on = hops > 0
        self._shapes = shapes
        self._best_asked, self._patience = (asks[0].rank % LARGE, int(smallest)), last
        return picked, asks, Demand(self.claim, tuple(bands), int(smallest), _ms(last - now), hops)  # type: ignore[arg-type]

    def deliver(self, asked: list[Waiter], reply: Acquired, now: float) -> list[tuple[Waiter, Granted]]:
        """Hand out what the store answered; returns the leases of those who have left meanwhile."""
        strays: list[tuple[Waiter, Granted]] = []
        refused: list[Refused] = []
        with self._mutex:
            self._offset = reply.now_ms - now * 1000
            granted = 0
            self.failing = False
            for waiter, answer in zip(asked, reply.answers):
                waiter.asking = waiter.unsure = False
                waits = waiter in self._groups[2 * waiter.request.band + (not waiter.returned)]
                if type(answer) is Refused:
                    refused.append(answer)
                    if waits and answer.timed and now + answer.wait_ms / 1000 > waiter.deadline:
                        self._answer(waiter, answer)
                    elif waits and waiter is asked[0]:
                        self._note_short(waiter, answer, reply.now_ms)
                elif waits:
                    granted += type(answer) is Granted
                    self._answer(waiter, answer)
                elif type(answer) is Granted:
                    strays.append((waiter, answer))
            if granted:
                self._looks = 0
            self._claimed = bool(refused) or len(self) > 0
            self._granted = granted > 0 and not refused
            if self._passes_on and not granted:
                self._quiet_until = now + QUIET_S
            if refused:
                self._refuse(refused, now)
                self._give_up_in_time(reply, now)
            else:
                self.refusal, self._told = None, now
        return strays

    def miss(self, asked: list[Waiter]) -> list[Waiter]:
        """What came of an ask is not known; returns those who have left meanwhile, for whom nobody will ask again."""
        for waiter in asked:
            waiter.unsure = True
            waiter.asking = False
        with self._mutex:
            self._claimed = True
            return [w for w in asked if w not in self._groups[2 * w.request.band + (not w.returned)]]

    def dismiss(self, answer: Refused | Moved | Exception) -> None:
        """All are answered so."""
        with self._mutex:
            for group in self._groups:
                for waiter in tuple(group):
                    self._answer(waiter, answer)

    def report(self, now: float, pool: str) -> tuple[float, Waiting | None]:
        """Seconds until there is to be a report, and the one that is due now."""
        with self._mutex:
            firsts = [next(iter(group)) for group in self._groups if group]
            first = min((waiter.joined or now for waiter in firsts), default=now)
            due = max(first + REPORT_AFTER_S, self._reported + self._report_again_s if self._reported else 0.0)
            if now < due or not firsts:
                return max(0.001, due - now), None
            self._reported = now
            self._report_again_s = min(REPORT_MOST_S, 2 * self._report_again_s)
            refusal = UNREACHED if self.failing else self.refusal
            next_s = max(0.0, self._told - now) if refusal and refusal.timed else None
            reason, account = (refusal.reason, refusal.account) if refusal else ("", "")
            said = Waiting(pool, self.to.model_class, len(self), now - first, reason, account, next_s)
            return self._report_again_s, said

    # The rest holds the mutex.

    def _answer(self, waiter: Waiter, answer: Answer | Moved | Exception) -> None:
        waiter.answer = answer
        self._groups[2 * waiter.request.band + (not waiter.returned)].pop(waiter, None)
        waiter.signal()
        if waiter is self.leader and self.listener is not None:
            self.listener.nudge()

    def _refuse(self, refused: list[Refused], now: float) -> None:
        """When to ask again."""
        first = min(refused, key=lambda refusal: refusal.wait_ms)
        self.refusal = first
        wait = first.wait_ms / 1000
        if not first.timed and wait >= POLL_S:  # look again, not all at the same moment
            wait *= random.uniform(0.9, 1.1)
        if not first.exact and wait < SHORTEST_S:  # there are more accounts than one look covers
            wait = min(POLL_S, SHORTEST_S * 2**self._looks)
            self._looks += 1
        self._told, self._exact = now + wait, first.exact

    def _give_up_in_time(self, reply: Acquired, now: float) -> None:
        """Those who cannot be served before their deadline need not wait for it."""
        if reply.in_time < 0 or self.refusal is None:
            return
        refusal = self.refusal._replace(exact=False, timed=True)
        first_ms = (self._patience - now) * 1000
        late = list(islice(self._order(reply.now_ms), reply.in_time, None))
        for place, waiter in enumerate(late, 1):
            if waiter.deadline <= self._patience:  # (who came meanwhile was not counted)
                ms = first_ms + max(0.0, reply.last_ms - first_ms) * place / len(late)
                self._answer(waiter, refusal._replace(wait_ms=math.ceil(ms)))

    def _note_short(self, waiter: Waiter, refusal: Refused, server: float) -> None:
        if refusal.reason not in NO_ROOM:
            waiter.short_since = None
        elif waiter.short_since is None:
            waiter.short_since = server

    def _is_large(self, head: Waiter, server: float | None) -> bool:
        return head.short_since is not None and server is not None and server - head.short_since >= LARGE_AFTER_MS

    def _server(self, now: float) -> float | None:
        """The store's time in ms, as far as it is known."""
        return None if self._offset is None else self._offset + now * 1000

    def _band(self, waiter: Waiter, server: float | None = None) -> int:
        if server is None or waiter.joined is None:
            return waiter.request.band
        return max(0, waiter.request.band - int(max(0.0, server - self._since(waiter)) // RISE_MS))

    def _since(self, waiter: Waiter) -> float:
        """Since when it has waited, by the store's clock (who joined before that was known is told later)."""
        if waiter.since is None:
            waiter.since = (self._offset or 0.0) + (waiter.joined or 0.0) * 1000
        return waiter.since

    def _order(self, server: float | None = None) -> Iterator[Waiter]:
        groups = [group for group in self._groups if group]
        if len(groups) == 1:
            return iter(groups[0])
        return heapq.merge(*groups, key=lambda waiter: (self._band(waiter, server), waiter.number))


def of_one(claim: str, band: int, tokens: int, patience_s: float) -> Demand:
    """What a call wants that asks by itself."""
    return Demand(claim, ONE[band], tokens, _ms(patience_s))


def _ms(seconds: float) -> int:
    """For the store: -1 is for ever."""
    return -1 if seconds > 1e9 else max(0, math.ceil(seconds * 1000))
