"""How a call that may go away and come again comes by a lease: a task of a queue, which must not hold its worker.

A generator of a flow, without I/O (see `_obtain.py`). It asks for itself, sleeps where its turn comes soon, and else
raises Postponed: whoever called it is to make the call again after so many seconds, with the Place that it is given.

SOON is within the call's patience for the first four, and for the others within 0.2 s: otherwise a few that wait for a
second each would hold all slots of the workers, one after the other, for as long as there is a line. Where no time is
known, as for a slot of `concurrency`, the first four look four times a second meanwhile.

THE PLACE. The store keeps a claim of one request for the call (lua/line.lua), valid until a second after the time that
it was told, or after a minute: a call that waits for longer looks in meanwhile, so that those which never come again (a
queue that is purged) are forgotten. The claim's id says when the call asked first, by the store's clock; of such claims
whoever asked first has its turn first, also where it comes too late and has lost the claim. The store keeps so those of
the first 128; the others are told of the turn behind these, and come again then.
"""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from typing import Any, NamedTuple

from stable_openai._line import LARGE_AFTER_MS, NO_ROOM, POLL_S, RISE_MS, of_one
from stable_openai._obtain import ASK_AGAIN_S, Sleep, give_up, if_all_disabled, taken
from stable_openai._ops import TICKETS, Gone, Granted, Refused
from stable_openai._waiter import Request, Waiter
from stable_openai._worker import Worker
from stable_openai.errors import BrokerUnavailable

__all__ = ["Place", "Postponed", "Visit", "new_place", "obtain_or_postpone"]

SOON_S, LOOKS_S = 0.2, 0.25
FIRST = 4  # of those that the store keeps


class Place(NamedTuple):
    """What a call that comes again brings along: the id of its claim; how many attempts and moves it has made; whether
    it was refused for its size; and the accounts that do not know its model."""

    claim: str
    attempts: int = 0
    moves: int = 0
    short: bool = False
    missing: tuple[str, ...] = ()


class Visit(NamedTuple):
    """A call that may be postponed: how long it may wait here at a time, in s; the place that it has; and how long it
    is to rest before its next attempt, in s."""

    patience_s: float
    place: Place
    rest_s: float = 0.0

    def after(self, attempts: int, moves: int, missing: tuple[str, ...]) -> Visit:
        return self._replace(place=self.place._replace(attempts=attempts, moves=moves, missing=missing))


class Postponed(Exception):
    """The call's turn comes later than it may wait here: in so many seconds, and why; or it is to rest for so long."""

    def __init__(self, seconds: float, reason: str, place: Place, rests: bool = False) -> None:
        self.seconds, self.reason, self.place, self.rests = seconds, reason, place, rests
        super().__init__(f"{'another attempt' if rests else 'a key'} in {seconds:.1f} s ({reason})")


def new_place() -> Place:
    return Place(f"t.{os.urandom(6).hex()}")  # the store puts in when it has come


def obtain_or_postpone(
    worker: Worker,
    request: Request,
    visit: Visit,
    began: float,
    now: float,
    deadline: float,
    *,
    avoid: tuple[str, ...] = (),
    never: tuple[str, ...] = (),
    error: BaseException | None = None,
) -> Generator[Any, Any, tuple[float, Granted | None, Visit]]:
    """A lease; None where `never` leaves no account.

    Args:
        began: when the call was made first; its deadline is counted from there.

    Raises what `obtain` raises, or Postponed.
    """
    came, place = now, visit.place
    while True:
        to = worker.registration(request.model)
        waiter = Waiter(request, avoid, never, deadline, worker.next_id(), None, None)
        band = max(0, request.band - int((now - began) * 1000 // RISE_MS))
        ask = waiter.ask(band, place.short and now - began >= LARGE_AFTER_MS / 1000)
        demand = of_one(place.claim, band, request.tokens, deadline - now)
        try:
            now, reply = yield from worker.ask(to, (ask,), demand)
        except BrokerUnavailable:
            worker.disown(to, waiter)
            now, _ = yield Sleep(0)  # it has taken its time
            if worker.on_redis_down == "raise" or now + ASK_AGAIN_S > deadline:
                raise
            wait, reason, stays_s = POLL_S * random.uniform(0.5, 1), "redis", 0.0
            wait = min(wait, deadline - now)
        except BaseException as stop:
            worker.disown(to, waiter, isinstance(stop, GeneratorExit))
            raise
        else:
            answer = reply.answers[0]
            if isinstance(answer, Gone):  # for an id of its own it asks once more
                continue
            if not isinstance(answer, Refused):
                return now, taken(request, answer), visit._replace(place=place)
            wait, reason = answer.wait_ms / 1000, answer.reason
            late = now >= deadline or (answer.timed and now + wait > deadline)
            if late or (yield from if_all_disabled(worker, request, answer)):
                yield from give_up(worker, request, answer, now, error)
            first = reply.in_time < FIRST
            stays_s = visit.patience_s if first else min(visit.patience_s, SOON_S)
            place = place._replace(claim=_dated(place.claim, reply.now_ms), short=reason in NO_ROOM)
            if not answer.timed and first and now + LOOKS_S <= came + stays_s:
                wait = min(wait, LOOKS_S)
            elif not answer.timed:
                wait *= random.uniform(0.5, 1)
            elif reply.in_time >= TICKETS:  # all of these are told the same time
                wait *= random.uniform(1, 1.25)
            wait = max(0.0, min(wait, deadline - now))
        if now + wait > came + stays_s:
            raise Postponed(wait, reason, place) from error
        now, _ = yield Sleep(wait)


def _dated(claim: str, now_ms: int) -> str:
    """A claim's id, as the store keeps it (lua/line.lua)."""
    return f"t{now_ms:013d}{claim[1:]}" if claim.startswith("t.") else claim
