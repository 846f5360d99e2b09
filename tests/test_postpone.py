"""Calls that go away and come again keep their places (stable_openai/_postpone.py, lua/line.lua): in both stores, in
handed time."""

from __future__ import annotations

import heapq
import itertools
import random
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from stable_openai import Limits
from stable_openai._limits import quota
from stable_openai._ops import (
    RETURNS_MS,
    TICKETS,
    Acquire,
    Ask,
    Closing,
    Demand,
    Granted,
    Inspect,
    Member,
    Refused,
    Register,
    Registration,
    Settle,
)
from stable_openai.backends.memory import MemoryBackend
from stable_openai.backends.redis import RedisBackend

START, TTL = 1_790_000_000_000, 60_000


class Call(NamedTuple):
    number: int
    claim: str
    first: int
    tokens: int = 1


class Store:
    """One of the two, and calls that come to it; each settles what it is granted at once."""

    def __init__(self, backend: Any, limits: Limits, accounts: int) -> None:
        self.backend = backend
        self.now = START
        members = [Member(f"key{n}", 0, 1, ((f"key{n}", 1),)) for n in range(accounts)]
        self.to = Registration(f"test-{uuid.uuid4().hex}", "gpt", [quota(limits, 0.25)], members)
        self.ids = itertools.count(1)
        self.served: list[Call] = []
        self.times: list[int] = []
        self.asked = 0

    def begin(self) -> None:
        self.backend.run(Register(self.to, "epoch", {}))

    def ask(self, call: Call, band: int = 1, patience: int = 600_000) -> tuple[Call, int | None]:
        """The call, with the claim that it has now; and in how many ms it is to come again (None: it was granted)."""
        self.asked += 1
        bands = tuple(int(b == band) for b in range(4))
        demand = Demand(call.claim, bands, call.tokens, patience)  # type: ignore[arg-type]
        ask = Ask(f"a:{next(self.ids)}", call.tokens, "gpt", rank=band)
        reply = self.backend.run(Acquire(self.to, TTL, (ask,), demand))
        (answer,) = reply.answers
        if isinstance(answer, Granted):
            self.backend.run(Settle(self.to, TTL, (Closing(ask.id, answer.account, answer.key, "gpt", "ok"),)))
            self.served.append(call)
            self.times.append(self.now - START)
            return call, None
        assert isinstance(answer, Refused)
        if call.claim.startswith("t."):
            call = call._replace(claim=f"t{reply.now_ms:013d}{call.claim[1:]}")
        return call, answer.wait_ms


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Any]:
    made: list[Store] = []

    def make(limits: Limits, accounts: int) -> Store:
        backend: Any
        if request.param == "redis":
            backend = RedisBackend(redis_url, now=lambda: made[0].now)
        else:
            backend = MemoryBackend(clock=lambda: made[0].now)
        made.append(Store(backend, limits, accounts))
        made[0].begin()
        return made[0]

    yield make
    for one in made:
        one.backend.close()


def run(store: Store, count: int, *, apart: int, late: Any) -> None:
    """So many calls come, each so many ms after the one before, and again as each is told, late by so much; who is told
    to come within a second waits for it."""
    agenda = [(START + n * apart, n, Call(n, f"t.{n}", START + n * apart)) for n in range(count)]
    heapq.heapify(agenda)
    while agenda:
        at, number, call = heapq.heappop(agenda)
        store.now = max(store.now, at)
        call, wait = store.ask(call)
        if wait is not None:
            again = wait if wait <= 1000 else min(wait, 60_000) + late(number)
            heapq.heappush(agenda, (store.now + again, number, call))


def displacement(store: Store) -> list[int]:
    """By how many places each call was served after its turn."""
    return [place - call.number for place, call in enumerate(store.served)]


LIMITS = [Limits(rpm=60, burst_s=1), Limits(rpm=60), Limits(rpm=60, rule="sliding")]


@pytest.mark.parametrize("limits", LIMITS, ids=["trickle", "bucket", "sliding"])
def test_calls_are_served_in_the_order_in_which_they_came(store: Any, limits: Limits) -> None:
    """Though each comes up to 0.2 s late, and new ones come all the time."""
    one, chance = store(limits, 4), random.Random(1)
    run(one, 250, apart=100, late=lambda _: chance.randrange(200))
    moved = displacement(one)
    assert len(moved) == 250
    assert max(moved) <= 8, "behind those that came after it"
    assert min(moved) >= -25
    assert one.asked <= 4 * 250


def test_the_rate_is_kept(store: Any) -> None:
    """What is told is when it is one's turn: nobody comes in vain, and hardly anything stays unused."""
    one, chance = store(LIMITS[0], 4), random.Random(2)
    run(one, 200, apart=1, late=lambda _: chance.randrange(100))
    assert one.now - START <= 1.1 * 50_000
    assert one.asked <= 4 * 200


def test_more_than_the_store_keeps_are_all_served(store: Any) -> None:
    one, chance = store(Limits(rpm=600, burst_s=1), 4), random.Random(3)
    run(one, 700, apart=1, late=lambda _: chance.randrange(50))
    moved = displacement(one)
    assert len(moved) == 700
    assert max(moved) <= 50
    assert one.now - START <= 1.15 * 700 / 40 * 1000


def test_who_comes_too_late_is_before_those_that_came_after(store: Any) -> None:
    one = store(LIMITS[0], 4)
    run(one, 120, apart=1, late=lambda number: 4000 if number == 20 else 0)
    place = one.served.index(next(call for call in one.served if call.number == 20))
    # In four seconds 16 are served; then it is its turn, not after the other 80.
    assert 20 <= place <= 20 + 16 + 8


def test_who_never_comes_again_takes_no_more_than_its_turn(store: Any) -> None:
    """Half of the calls are lost with their worker: the others are served no later than with them."""
    one = store(LIMITS[0], 4)
    run(one, 120, apart=1, late=lambda number: 10**9 if number % 2 else 0)
    living = [at for call, at in zip(one.served, one.times) if call.number % 2 == 0]
    assert len(living) == 60
    assert max(living) <= 120 * 250 + 1000


def test_calls_that_are_never_made_again_are_forgotten_after_a_minute(store: Any) -> None:
    """A queue that was purged: who comes then has all that is free."""
    one = store(LIMITS[0], 1)
    for n in range(100):
        one.ask(Call(n, f"t.{n}", START))
    one.now += RETURNS_MS + 1001
    assert one.ask(Call(100, "t.100", one.now))[1] is None


def test_both_stores_keep_as_many(store: Any) -> None:
    one = store(LIMITS[0], 1)
    for n in range(TICKETS + 20):
        one.ask(Call(n, f"t.{n:03}", START))
    snapshot = one.backend.run(Inspect(one.to, TTL))
    assert len(snapshot.line) == TICKETS
    assert max(claim.ms for claim in snapshot.line) == RETURNS_MS


def test_a_call_rises_with_its_age(store: Any) -> None:
    """One that has risen a band comes before all that have not."""
    one = store(LIMITS[0], 1)
    for n in range(40):
        one.ask(Call(n, f"t.{n}", START))
    old, wait = one.ask(Call(40, "t.old", START))
    assert wait is not None
    assert wait > 30_000
    risen, sooner = one.ask(old, band=0)
    assert risen.claim == old.claim
    assert sooner is not None
    assert sooner < 3000


def test_a_call_that_cannot_be_served_in_time_leaves_no_claim(store: Any) -> None:
    one = store(LIMITS[0], 1)
    one.ask(Call(0, "t.0", START))
    _, wait = one.ask(Call(1, "t.1", START), patience=10)
    assert wait is not None
    assert wait > 10
    _, again = one.ask(Call(2, "t.2", START))
    assert again == wait
