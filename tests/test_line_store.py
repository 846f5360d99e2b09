"""Who waits, and whose turn it is: the line in the store (lua/line.lua and its twin), on a clock of the tests' own.

Two parts. `WaitingTwins` is tests/test_twins.py with nearly always somebody in the line: workers that mostly behave
as real ones do, on limits that are tight. `Crowd` is a simulation of workers that wait for the same accounts, each
asking again exactly when it was told, or at once when a wake falls to it; what it measures are the promises of the
line: never over, fair, nothing left unused, few asks, strict bands, and a large request that comes through.
"""

from __future__ import annotations

import heapq
import itertools
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stable_openai._limits import Limits, day_starts, quota
from stable_openai._ops import (
    LARGE,
    Acquire,
    Admin,
    Ask,
    Closing,
    Demand,
    Granted,
    Inspect,
    Member,
    NotRegistered,
    Refused,
    Register,
    Registration,
    Settle,
)
from stable_openai.backends.memory import MemoryBackend
from stable_openai.backends.redis import RedisBackend
from tests.test_twins import EXAMPLES, PHASES, TTL, Charge, Oracle

START = 1_790_000_000_000 // 60_000 * 60_000 + 30_000
LARGE_AFTER = 2000
SHORT = ("tpm", "tpd", "held")
BATCH = 64


SIZES = st.sampled_from([1, 1, 5, 40, 60, 99])
OFFSETS = st.sampled_from([0, 0, 0, 0, 0, -5, -1, 1, 7, 999, 999, 1000, 1001, 3000])


@st.composite
def tight(draw: st.DrawFn) -> Limits:
    """Limits that a few workers use up."""
    rule = draw(st.sampled_from(["bucket", "bucket", "sliding", "calendar"]))
    return Limits(
        rpm=draw(st.sampled_from([None, 2, 6, 60])),
        rpd=draw(st.sampled_from([None, None, 40])),
        tpm=draw(st.sampled_from([None, 100, 100, 600])),
        concurrency=draw(st.sampled_from([None, None, 1, 2])),
        rule=rule,  # type: ignore[arg-type]
        day_rule=draw(st.sampled_from([None, None, "bucket"])),
        burst_s=draw(st.sampled_from([None, 1, 10])) if rule == "bucket" else None,
        charge=draw(st.sampled_from(["reserved", "reserved", "used"])),
    )


@dataclass(eq=False)
class Simulated:
    """A worker of the state machine: what waits in its process, and when it was told to ask again."""

    name: str
    ring: int
    backlog: list[tuple[int, int]] = field(default_factory=list)
    told: int | None = None
    wait: int = 1000
    usual: int = 1
    large: bool = False


class WaitingTwins(RuleBasedStateMachine):
    """Both backends answer alike while nearly always somebody waits."""

    url: str

    @initialize(data=st.data(), size=st.sampled_from([1, 1, 2, 2, 3, 8, 20]), limits=tight(), second=tight())
    def begin(self, data: st.DataObject, size: int, limits: Limits, second: Limits) -> None:
        self.now = START + data.draw(st.integers(0, 60_000))
        self.pool = f"test-{uuid.uuid4().hex}"
        self.memory = MemoryBackend(clock=lambda: self.now)
        self.redis = RedisBackend(self.url, now=lambda: self.now)
        self.client = redis.Redis.from_url(self.url, decode_responses=True)
        self.size = size
        self.uneven = data.draw(st.booleans())
        self.quotas = [quota(limits, 0.25), quota(second, 0.25)]
        self.make_rings()
        self.tickets = data.draw(st.booleans())
        self.workers = [
            Simulated(self.name(n), int(n == 3), usual=data.draw(SIZES)) for n in range(data.draw(st.integers(2, 5)))
        ]
        self.held: list[tuple[Registration, str, Granted, int]] = []
        self.number = 0
        for _ in range(data.draw(st.sampled_from([0, 1, 3]))):  # somebody has used them up before
            asks = [self.new_ask(1, 1) for _ in range(2 * size)]
            self.ask_both(self.rings[0], asks, None)

    def name(self, n: int) -> str:
        """A claim's id; of some a ticket's, which came before those of lower numbers."""
        return f"t{START + 999 - n:013d}.a" if self.tickets and n % 3 else f"w{n}"

    def make_rings(self) -> None:
        """Two rings of one class: the second has one account more."""
        members = [
            Member(f"key{n}", int(self.uneven and n % 2 == 1), 1, ((f"key{n}", 1),)) for n in range(self.size + 1)
        ]
        self.rings = [
            Registration(self.pool, "gpt", self.quotas, members[:-1]),
            Registration(self.pool, "gpt", self.quotas, members),
        ]
        for to in self.rings:
            self.register(to)

    def teardown(self) -> None:
        if hasattr(self, "client"):
            self.redis.close()
            self.client.close()

    def both(self, op: Any) -> Any:
        in_redis = self.redis.run(op)
        in_memory = self.memory.run(op)
        assert in_redis == in_memory, op
        return in_redis

    def register(self, to: Registration) -> None:
        self.both(Register(to, "epoch", {zone: day_starts(zone, self.now) for zone in to.zones}))

    def new_ask(self, tokens: int, rank: int) -> Ask:
        self.number += 1
        return Ask(f"a:{self.number}", tokens, "gpt", rank=rank)

    def ask_both(self, to: Registration, asks: list[Ask], demand: Demand | None) -> list[Any]:
        reply = self.both(Acquire(to, TTL, tuple(asks), demand))
        if isinstance(reply, NotRegistered):
            self.register(to)
            reply = self.both(Acquire(to, TTL, tuple(asks), demand))
        answers = list(reply.answers)
        for ask, answer in zip(asks, answers):
            if isinstance(answer, Granted):
                self.held.append((to, ask.id, answer, ask.tokens))
        return answers

    def ask(self, data: st.DataObject, worker: Simulated, hops: int = -1) -> None:
        """As a leader asks: for its first waiters, telling of all of them."""
        sizes = st.one_of(st.just(worker.usual), st.just(worker.usual), SIZES)
        new = data.draw(st.lists(st.tuples(sizes, st.sampled_from([0, 1, 1, 1, 2, 3])), max_size=4))
        worker.backlog = sorted(worker.backlog + new, key=lambda waiter: waiter[1])[:8] or [(1, 1)]
        width = data.draw(st.sampled_from([1, 3, 8]))
        bands = [sum(band == of for _, band in worker.backlog) for of in range(4)]
        bands[worker.backlog[-1][1]] += data.draw(st.sampled_from([0, 0, 0, 1, 7]))
        large = data.draw(st.sampled_from([LARGE, LARGE, LARGE, 0] if worker.large else [0, 0, LARGE]))
        asks = [self.new_ask(tokens, band) for tokens, band in worker.backlog[:width]]
        asks[0] = asks[0]._replace(rank=asks[0].rank + large)
        patience = -1
        if data.draw(st.booleans()):
            times, off = data.draw(st.integers(0, 6)), data.draw(st.sampled_from([-1, 0, 0, 1, 500]))
            patience = max(0, worker.wait * times + off)
        smallest = min(tokens for tokens, _ in worker.backlog)
        demand = Demand(worker.name, tuple(bands), smallest, patience, hops)  # type: ignore[arg-type]
        answers = self.ask_both(self.rings[worker.ring], asks, demand)
        worker.large = large > 0 and isinstance(answers[0], Refused)
        kept = [waiter for waiter, answer in zip(worker.backlog, answers) if isinstance(answer, Refused)]
        worker.backlog = kept + worker.backlog[width:]
        waits = [answer.wait_ms for answer in answers if isinstance(answer, Refused)]
        worker.told = self.now + (min(waits) if waits else 0) if worker.backlog else None
        worker.wait = max(1, min(min(waits), 100_000)) if waits else 1000

    @rule(data=st.data(), number=st.integers(0, 4))
    def come(self, data: st.DataObject, number: int) -> None:
        """One asks without having been told to: it is new, or its demand has changed."""
        self.ask(data, self.workers[number % len(self.workers)])

    @precondition(lambda self: any(worker.told is not None for worker in self.workers))
    @rule(data=st.data(), number=st.integers(0, 4), off=st.sampled_from([0, 1, 400, 900]))
    def come_anew(self, data: st.DataObject, number: int, off: int) -> None:
        """A newcomer, while something is free that others were told of; one of the old ones is gone."""
        told = min(worker.told for worker in self.workers if worker.told is not None)
        if told - self.now < 200_000:
            self.now = max(self.now, told + off)
        number %= len(self.workers)
        self.number += 1
        self.workers[number] = Simulated(self.name(self.number), self.workers[number].ring, usual=data.draw(SIZES))
        self.ask(data, self.workers[number])

    @precondition(lambda self: any(worker.told is not None for worker in self.workers))
    @rule(data=st.data(), off=OFFSETS, later=st.sampled_from([0, 0, 0, 1]))
    def ask_as_told(self, data: st.DataObject, off: int, later: int) -> None:
        """Who was told to ask first does, or the one after it."""
        waiting = [worker for worker in self.workers if worker.told is not None]
        waiting.sort(key=lambda worker: worker.told or 0)
        worker = waiting[min(later, len(waiting) - 1)]
        assert worker.told is not None
        if worker.told - self.now < 200_000:
            self.now = max(self.now, worker.told + off)
        self.ask(data, worker)

    @precondition(lambda self: sum(worker.told is not None for worker in self.workers) > 1)
    @rule(data=st.data())
    def all_ask(self, data: st.DataObject) -> None:
        """At one time, when all of them are due."""
        told = [worker.told for worker in self.workers if worker.told is not None]
        self.now = max(self.now, min(max(told), min(told) + 1000))
        for worker in self.workers:
            if worker.told is not None:
                self.ask(data, worker)

    @rule(data=st.data(), number=st.integers(0, 4))
    def pop_a_wake(self, data: st.DataObject, number: int) -> None:
        popped = self.client.lpop(self.rings[0].keys[5])
        known = self.memory._pool.classes["gpt"].wakes  # type: ignore[union-attr]
        assert popped == (str(known.pop(0)) if known else None)
        if popped is not None:
            self.ask(data, self.workers[number % len(self.workers)], int(popped))

    @rule(number=st.integers(0, 4), grace=st.sampled_from([998, 999, 1000]))
    def die(self, number: int, grace: int) -> None:
        """It is never heard of again; what counts it looks just before its claim is lost, or then."""
        worker = self.workers[number % len(self.workers)]
        if worker.told is not None and 0 <= worker.told + grace - self.now < 100_000:
            self.now = worker.told + grace
        worker.told, worker.backlog = None, []

    @rule(number=st.integers(0, 4))
    def leave(self, number: int) -> None:
        worker = self.workers[number % len(self.workers)]
        self.both(Acquire(self.rings[worker.ring], TTL, (), Demand(worker.name, (0, 0, 0, 0), 0)))
        worker.told, worker.backlog = None, []

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=3), ring=st.integers(0, 1), band=st.integers(0, 3))
    def ask_without_waiting(self, sizes: list[int], ring: int, band: int) -> None:
        self.ask_both(self.rings[ring], [self.new_ask(tokens, band) for tokens in sizes], None)

    @precondition(lambda self: self.held)
    @rule(
        count=st.integers(1, 4),
        last=st.booleans(),
        outcome=st.sampled_from(["ok", "ok", "unsent", "unsent", "limited", "account"]),
        wait=st.sampled_from(["", "1500"]),
        used=st.sampled_from([None, 0, 1, 150]),
    )
    def settle(self, count: int, last: bool, outcome: str, wait: str, used: int | None) -> None:
        """Something is freed: wakes are pushed."""
        to, closings = self.held[-1 if last else 0][0], []
        for entry in self.held[-count:] if last else self.held[:count]:
            self.held.remove(entry)
            _, id, granted, _ = entry
            detail = {"limited": wait, "account": "insufficient_quota"}.get(outcome, "")
            tokens = None if outcome == "unsent" else used
            closings.append(Closing(id, granted.account, granted.key, "gpt", outcome, tokens, detail))
        self.both(Settle(to, TTL, tuple(closings)))

    @rule(verb=st.sampled_from(["disable", "enable", "reset"]), n=st.integers(0, 20), ms=st.sampled_from([None, 3000]))
    def admin(self, verb: str, n: int, ms: int | None) -> None:
        key = f"key{n % (self.size + 1)}"
        self.both(Admin(self.pool, verb, key, key, ms, ("gpt",)))

    @rule(limits=tight(), which=st.integers(0, 1))
    def change_limits(self, limits: Limits, which: int) -> None:
        self.quotas[which] = quota(limits, 0.25)
        self.make_rings()

    @rule(ms=st.sampled_from([1, 10, 250, 1000, 5000, 61_000]))
    def pass_time(self, ms: int) -> None:
        self.now += ms

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "rings"):
            self.both(Inspect(self.rings[1], TTL))
            known = self.memory._pool.classes["gpt"]  # type: ignore[union-attr]
            wakes = self.client.lrange(self.rings[0].keys[5], 0, -1)
            assert wakes == [str(hops) for hops in known.wakes]


def test_lua_and_memory_keep_the_same_line(redis_url: str) -> None:
    WaitingTwins.url = redis_url
    run_state_machine_as_test(
        WaitingTwins,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=PHASES,
            report_multiple_bugs=False,
        ),
    )


@dataclass(eq=False)
class Waiter:
    """A request that waits."""

    tokens: int = 1
    band: int = 1
    since: int = 0
    stuck: int | None = None
    """Since when it is known not to fit, for want of tokens."""


@dataclass(eq=False)
class Worker:
    name: str
    backlog: list[Waiter]
    refill: Callable[[], Waiter | None] = lambda: None
    told: int | None = None
    turn: int = 0
    asked: int = 0
    served: int = 0


@dataclass(frozen=True)
class Event:
    """What an ask brought: the grants, and what was refused."""

    at: int
    worker: Worker
    granted: list[Waiter]
    waits: list[int] = field(default_factory=list)


class Crowd:
    """Workers that wait for the same accounts."""

    def __init__(
        self,
        limits: Limits,
        accounts: int,
        url: str | None = None,
        *,
        takes: int = 0,
        disabled: int = 0,
        slow: int = 0,
    ) -> None:
        """`takes`: how long a request takes in ms; of the accounts, so many are disabled or have a tenth of the rpm."""
        self.now = START
        self.limits = limits
        self.takes = takes
        self.random = random.Random(0)
        self.memory = MemoryBackend(clock=lambda: self.now)
        self.redis = RedisBackend(url, now=lambda: self.now) if url else None
        self.client = redis.Redis.from_url(url, decode_responses=True) if url else None
        members = [Member(f"key{n}", int(n < slow), 1, ((f"key{n}", 1),)) for n in range(accounts)]
        quotas = [quota(limits, 0.25), quota(replace(limits, rpm=(limits.rpm or 0) // 10 or None), 0.25)]
        self.to = Registration(f"test-{uuid.uuid4().hex}", "gpt", quotas, members)
        self.run_op(Register(self.to, "epoch", {zone: day_starts(zone, self.now) for zone in self.to.zones}))
        for n in range(disabled):
            self.run_op(Admin(self.to.pool, "disable", f"key{n}", f"key{n}", None, ("gpt",)))
        self.workers: list[Worker] = []
        self.closings: list[tuple[int, int, Closing]] = []
        self.charges: list[Charge] = []
        self.events: list[Event] = []
        self.number = itertools.count(1)
        self.agenda: list[tuple[int, float, int, Worker]] = []
        self.woken = 0

    def close(self) -> None:
        if self.redis and self.client:
            self.redis.close()
            self.client.close()

    def run_op(self, op: Any) -> Any:
        return (self.redis or self.memory).run(op)

    def join(self, backlog: list[Waiter], refill: Callable[[], Waiter | None] = lambda: None, at: int = 0) -> Worker:
        """A worker with so much to do comes, after so many ms."""
        worker = Worker(f"w{len(self.workers)}", backlog, refill)
        self.workers.append(worker)
        self.call(worker, START + at)
        return worker

    def call(self, worker: Worker, at: int) -> None:
        worker.told, worker.turn = at, next(self.number)
        heapq.heappush(self.agenda, (at, self.random.random(), worker.turn, worker))

    def run(self, ms: int) -> None:
        """Until so many ms after the start."""
        same = 0
        while self.agenda and self.agenda[0][0] <= START + ms:
            if self.closings and self.closings[0][0] <= min(self.agenda[0][0], START + ms):
                self.now, _, closing = heapq.heappop(self.closings)
                self.run_op(Settle(self.to, TTL, (closing,)))
                self.pass_wakes()
                continue
            at, _, turn, worker = heapq.heappop(self.agenda)
            if worker.told is None or worker.turn != turn:
                continue
            same = same + 1 if at <= self.now else 0
            assert same < 1000, "the workers ask for ever, and time stands still"
            self.now = max(self.now, at)
            self.ask(worker)
            self.pass_wakes()
        self.now = START + ms

    def pop_wake(self) -> int | None:
        if self.client:
            popped = self.client.lpop(self.to.keys[5])
            return None if popped is None else int(popped)  # type: ignore[arg-type]
        known = self.memory._pool.classes["gpt"].wakes  # type: ignore[union-attr]
        return known.pop(0) if known else None

    def pass_wakes(self) -> None:
        """Each goes to who has been waiting for the longest time."""
        while any(worker.told is not None and worker.asked for worker in self.workers):
            hops = self.pop_wake()
            if hops is None:
                return
            self.woken += 1
            waiting = [worker for worker in self.workers if worker.told is not None and worker.asked]
            self.ask(min(waiting, key=lambda worker: worker.turn), hops)

    def ask(self, worker: Worker, hops: int = -1) -> None:
        backlog = sorted(worker.backlog, key=lambda waiter: waiter.band)
        bands = [sum(waiter.band == band for waiter in backlog) for band in range(4)]
        smallest = min((waiter.tokens for waiter in backlog), default=0)
        asks: list[Ask] = []
        for waiter in backlog[:BATCH]:
            large = not asks and waiter.stuck is not None and self.now - waiter.stuck >= LARGE_AFTER
            rank = waiter.band + (LARGE if large else 0)
            asks.append(Ask(f"{worker.name}:{next(self.number)}", waiter.tokens, "gpt", rank=rank))
        demand = Demand(worker.name, tuple(bands), smallest, -1, hops)  # type: ignore[arg-type]
        reply = self.run_op(Acquire(self.to, TTL, tuple(asks), demand))
        worker.asked += 1
        waits, granted = [], []
        for waiter, answer in zip(backlog, reply.answers):
            if isinstance(answer, Granted):
                granted.append(waiter)
                worker.backlog.remove(waiter)
                self.charges.append(Charge(self.now, answer.account, waiter.tokens))
                closing = Closing(answer.id, answer.account, answer.key, "gpt", "ok")
                heapq.heappush(self.closings, (self.now + self.takes, next(self.number), closing))
                new = worker.refill()
                if new:
                    new.since = self.now
                    worker.backlog.append(new)
            else:
                assert isinstance(answer, Refused), answer
                waits.append(answer.wait_ms)
                if answer.reason not in SHORT:
                    waiter.stuck = None
                elif waiter.stuck is None:
                    waiter.stuck = self.now
        worker.served += len(granted)
        self.events.append(Event(self.now, worker, granted, waits))
        worker.told = None
        if worker.backlog:
            told = self.now + (min(waits) if waits else 0)
            head = min(worker.backlog, key=lambda waiter: waiter.band)
            if waits and head.stuck is not None and self.now < head.stuck + LARGE_AFTER:
                told = min(told, head.stuck + LARGE_AFTER)
            self.call(worker, told)

    def die(self, worker: Worker) -> None:
        """It is gone without a word."""
        worker.told, worker.backlog = None, []

    def granted(self, worker: Worker | None = None, since: int = 0, until: int = 10**12) -> int:
        """Requests granted in a time (ms after the start), to one or to all."""
        return sum(
            len(event.granted)
            for event in self.events
            if since <= event.at - START < until and (worker is None or event.worker is worker)
        )

    def asks(self, since: int = 0) -> int:
        return sum(event.at - START >= since for event in self.events)

    def check(self) -> None:
        """Never over."""
        if self.charges:
            Oracle(self.limits).check(self.charges)


def jain(shares: Sequence[float]) -> float:
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


RULES = ["bucket", "sliding", "calendar"]
MINUTE = 60_000


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str | None:
    return str(request.getfixturevalue("redis_url")) if request.param == "redis" else None


def limits_of(rule: Any, tokens: int | None = None) -> Limits:
    return Limits(rpm=60, tpm=tokens, rule=rule)


def keep(count: int, tokens: int = 1, band: int = 1) -> tuple[list[Waiter], Callable[[], Waiter]]:
    """A backlog that never shrinks."""
    return [Waiter(tokens, band) for _ in range(count)], lambda: Waiter(tokens, band)


def alone(limits: Limits, accounts: int, ms: int, tokens: int = 1, **kind: Any) -> int:
    """What a single worker is granted that wants everything."""
    crowd = Crowd(limits, accounts, **kind)
    crowd.join(*keep(400 * accounts, tokens))
    crowd.run(ms)
    return crowd.granted()


def minutes(url: str | None) -> int:
    return 3 if url else 6


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("accounts", [1, 2, 8])
@pytest.mark.parametrize("rule", RULES)
def test_equal_workers_get_equal_shares_of_all_there_is_with_few_asks(
    url: str | None, rule: str, accounts: int, tokens: int
) -> None:
    limits = limits_of(rule, 600 if tokens > 1 else None)
    crowd = Crowd(limits, accounts, url)
    workers = [crowd.join(*keep(100 * accounts, tokens), at=7 * n) for n in range(5)]
    end = minutes(url) * MINUTE
    crowd.run(end)
    crowd.check()
    shares = [crowd.granted(worker, MINUTE) for worker in workers]
    assert jain(shares) >= 0.99, shares
    assert max(shares) - min(shares) <= 4 + 0.02 * max(shares), shares
    best = alone(limits, accounts, end, tokens)
    assert crowd.granted() >= best - max(2, best // 100)
    asks, periods = crowd.asks(MINUTE), end // MINUTE - 1
    if rule == "bucket":  # requests that all want as many tokens: two accounts in step make some come in vain
        assert asks <= (1.3 if tokens == 1 else 1.8) * sum(shares)
    else:
        assert asks <= len(workers) * periods * 3 + sum(shares) // BATCH


@pytest.mark.parametrize("accounts", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_shares_are_in_proportion_to_demand(url: str | None, rule: str, accounts: int) -> None:
    """Within a tenth of each one's part, or three requests."""
    crowd = Crowd(limits_of(rule), accounts, url)
    weights = [10, 1, 1]
    workers = [crowd.join(*keep(100 * accounts * weight), at=7 * n) for n, weight in enumerate(weights)]
    crowd.run(minutes(url) * MINUTE)
    crowd.check()
    total = crowd.granted(since=MINUTE)
    for worker, weight in zip(workers, weights):
        part = total * weight / sum(weights)
        assert abs(crowd.granted(worker, MINUTE) - part) <= max(3, part / 10)


@pytest.mark.parametrize("kind", [{"disabled": 1}, {"slow": 2}])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("rule", RULES)
def test_accounts_that_differ_are_shared_out_and_used_up_too(
    url: str | None, rule: str, count: int, kind: dict[str, int]
) -> None:
    limits = limits_of(rule)
    crowd = Crowd(limits, 4, url, **kind)
    workers = [crowd.join(*keep(400), at=7 * n) for n in range(count)]
    end = minutes(url) * MINUTE
    crowd.run(end)
    crowd.check()
    shares = [crowd.granted(worker, MINUTE) for worker in workers]
    assert jain(shares) >= 0.99, shares
    best = alone(limits, 4, end, **kind)
    assert crowd.granted() >= best - max(2, best // 100)


@pytest.mark.parametrize("accounts", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_bands_are_strict(url: str | None, rule: str, accounts: int) -> None:
    """Once a band 0 request has been refused, nobody is granted one of band 3 in a millisecond after which it waits."""
    crowd = Crowd(limits_of(rule), accounts, url)
    for n in range(2):
        crowd.join(*keep(100 * accounts, band=3), at=7 * n)
    urgent = crowd.join([Waiter(band=0) for _ in range(130 * accounts)], at=20_000)
    crowd.run((minutes(url) + 1) * MINUTE)
    crowd.check()
    left, known = 130 * accounts, False
    for at, group in itertools.groupby(crowd.events, key=lambda event: event.at):
        events, waited = list(group), known
        known = known or any(event.worker is urgent for event in events)
        left -= sum(len(event.granted) for event in events if event.worker is urgent)
        if waited and left:
            assert not any(event.granted for event in events if event.worker is not urgent), (at - START, left)
    assert left == 0
    assert crowd.asks(MINUTE) <= 1.3 * crowd.granted(since=MINUTE)


@pytest.mark.parametrize("accounts", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_a_large_request_comes_through_among_small_ones(url: str | None, rule: str, accounts: int) -> None:
    """Within the time that those before it take, two periods, and some seconds; and nothing is lost by it."""
    limits = Limits(tpm=60_000, rule=rule)  # type: ignore[arg-type]
    crowd = Crowd(limits, accounts, url)
    small = [crowd.join(*keep(10, 1000), at=7 * n) for n in range(3)]
    large = crowd.join([Waiter(50_000)], at=100_000)
    crowd.run(300_000)
    crowd.check()
    served = [event.at - START for event in crowd.events if event.worker is large and event.granted]
    assert served, "it was never served"
    assert served[0] <= 100_000 + 30_000 // accounts + 2 * 60_250 + 5000
    assert min(crowd.granted(worker, served[0]) for worker in small) > 0
    used = sum(charge.tokens for charge in crowd.charges)
    assert used >= 0.98 * 1000 * alone(limits, accounts, 300_000, 1000)


@pytest.mark.parametrize("accounts", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_small_requests_are_served_while_large_ones_keep_coming(url: str | None, rule: str, accounts: int) -> None:
    """30 small ones wait and 5 large ones: so at least three small ones are granted to each large one (in proportion
    it were six), and no two minutes pass without."""
    crowd = Crowd(Limits(tpm=60_000, rule=rule), accounts, url)  # type: ignore[arg-type]
    small = [crowd.join(*keep(10, 1000), at=7 * n) for n in range(3)]
    large = crowd.join(*keep(5, 50_000), at=20_000)
    crowd.run(600_000)
    crowd.check()
    assert crowd.granted(large) >= 4
    for worker in small:
        assert crowd.granted(worker, 20_000) >= crowd.granted(large)
    times = [START + 20_000] + [event.at for event in crowd.events if event.worker in small and event.granted]
    gaps = [after - before for before, after in itertools.pairwise([*times, crowd.now]) if after > times[0]]
    assert max(gaps) <= 2 * 60_250 + 5000, max(gaps)


@pytest.mark.parametrize("accounts", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_who_dies_counts_no_longer_than_two_seconds(url: str | None, rule: str, accounts: int) -> None:
    crowd = Crowd(limits_of(rule), accounts, url)
    dead, *others = [crowd.join(*keep(100 * accounts), at=7 * n) for n in range(3)]
    crowd.run(100_000)
    assert dead.told is not None
    since = dead.told - START + 2000
    crowd.die(dead)
    crowd.run(since + 30_000)
    best = alone(limits_of(rule), accounts, since + 30_000)
    assert crowd.granted() >= best - 2, "what the dead one would have taken lies idle"
    crowd.run(since + 2 * MINUTE)
    crowd.check()
    assert jain([crowd.granted(worker, since) for worker in others]) >= 0.99


@pytest.mark.parametrize("accounts", [1, 3])
def test_a_freed_slot_wakes_who_has_waited_longest_and_none_lies_idle(url: str | None, accounts: int) -> None:
    """Each request takes 300 ms, and nothing but slots is scarce: nobody has a time to wait for."""
    crowd = Crowd(Limits(concurrency=2), accounts, url, takes=300)
    workers = [crowd.join(*keep(20), at=7 * n) for n in range(4)]
    crowd.run(20_000)
    shares = [crowd.granted(worker, 1000) for worker in workers]
    assert crowd.granted() >= 0.98 * 2 * accounts * 20_000 / 300
    assert jain(shares) >= 0.99, shares
    assert crowd.asks(1000) <= 1.5 * sum(shares)
