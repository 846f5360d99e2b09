"""Both backends mean the same, and neither ever grants more than a limit (design.md, invariants 2 and 7).

Random sequences of operations run on Lua and in memory on one simulated clock; every reply must be equal. A third
party, the oracle, knows only the declared limits and charges the final amounts at the time of the grant.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stable_openai._limits import Limits, day_starts, quota, seen_text
from stable_openai._ops import (
    LONGEST_MS,
    Acquire,
    Admin,
    Ask,
    Closing,
    Days,
    Demand,
    Granted,
    Inspect,
    Live,
    Member,
    NotRegistered,
    Refused,
    Register,
    Registration,
    Renew,
    Restore,
    Settle,
    Spent,
)
from stable_openai.backends.memory import MemoryBackend
from stable_openai.backends.redis import RedisBackend

START = 1_790_000_000_000
TTL = 60_000
LONGEST = 900_000
TOKENS = st.sampled_from([0, 1, 5, 40, 99, 100, 101, 1000])
VERBS = st.sampled_from(["disable", "disable", "enable", "reset", "wake"])
STEPS = st.sampled_from([1, 100, 250, 999, 1000, 5000, 30_000, 60_000, 61_000, 900_000, 3_600_000, 90_000_000])
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]  # shrinking takes minutes: add Phase.shrink to study a failure
UNHEARD = 250  # lua/accounts.lua
EXAMPLES = int(os.environ.get("STABLE_OPENAI_EXAMPLES", "60"))


def demands() -> st.SearchStrategy[Demand]:
    """What a worker's line wants, beyond what it asks for."""
    return st.builds(
        Demand,
        claim=st.sampled_from(["w1", "w2", "w3", "t.new", *(f"t{ms:013d}.a" for ms in (1, 2, 3))]),
        bands=st.tuples(*[st.sampled_from([0, 0, 1, 7])] * 4),
        smallest=st.sampled_from([0, 1, 40, 99]),
        patience_ms=st.sampled_from([-1, 0, 1000, 60_000]),
        hops=st.sampled_from([-1, -1, 0, 2]),
    )


LEARNABLE = st.sampled_from([None, 1, 3, 60, 90, 100, 1000, 10**12])
REMAINING = st.sampled_from([None, 0, 0, 1, 2, 30, 55, 99, 5000])
GARBAGE = [
    "",
    ";;",
    "0 0 0 1 0.001 1",
    "0 -5 - 1 0.001 1",
    "1 5 -1 2 86400250 675000",
    "0 5 6 1 0.001 1",
    "2 - 2000000000000 0 0 0",
    "2 9000000000000 1 1 1 1",
    "4 5 4 1 0.001 1",
    "0 5 4 4 0.001 1",
    "0 5 4 0 0.001 1",
    "0 5 4 1 0 1",
    "0 5 4 1 nan 1",
    "0 5 4 1 0x1 1",
    "0 5 4 1 1e999 1",
    "0 5 4 1 1e-4 1.5",
    "0 5 4 2 60250.5 313",
    "0 5 4 2 60250 0",
    "0 5.5 4 1 0.001 1",
    "0 5- 4 1 0.001 1",
    "0 5 4 1 0.001",
    "0 5 4 1 0.001 1 1",
    "10 5 4 1 0.001 1",
    "- - - - - -",
    "nonsense",
    "2 60 50 1 .001 5e1",
    "3 1000000 5 2 60250 313",
    "0 - 00001 1 + e",
]


@st.composite
def seen(draw: st.DrawFn) -> str:
    """What a response's headers said of limits, or something that none ever says."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(GARBAGE))
    rows = draw(st.lists(st.tuples(st.integers(0, 3), LEARNABLE, REMAINING), min_size=1, max_size=4))
    return ";".join(
        [
            seen_text(rows, Limits(**draw(st.fixed_dictionaries(RULES))), draw(st.sampled_from([0.25, 0.25, 0.0]))),
            *draw(st.lists(st.sampled_from(GARBAGE), max_size=1)),
        ]
    )


RULES: dict[str, st.SearchStrategy[Any]] = {
    "rule": st.sampled_from(["bucket", "sliding", "calendar"]),
    "day_rule": st.sampled_from([None, "bucket", "sliding", "calendar"]),
    "burst_s": st.sampled_from([None, None, 1, 10]),
}
SEEN = st.one_of(st.just(""), seen(), seen())


@dataclass(eq=False)
class Charge:
    """What was granted, and how much it came to in the end."""

    at: int
    account: str
    tokens: int
    requests: int = 1


class Oracle:
    """Checks a list of charges against the declared limits, by the definition of each rule."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def check(self, charges: list[Charge]) -> None:
        day_rule = self.limits.day_rule or self.limits.rule
        for limit, rule_name, period, what in (
            (self.limits.rpm, self.limits.rule, 60_000, "requests"),
            (self.limits.rpd, day_rule, 86_400_000, "requests"),
            (self.limits.tpm, self.limits.rule, 60_000, "tokens"),
            (self.limits.tpd, day_rule, 86_400_000, "tokens"),
        ):
            if limit is None:
                continue
            for account in {charge.account for charge in charges}:
                mine = [(c.at, getattr(c, what)) for c in charges if c.account == account]
                getattr(self, f"_{rule_name or 'bucket'}")(mine, limit, period)

    @staticmethod
    def _bucket(charges: list[tuple[int, int]], limit: int, period: int) -> None:
        level, before = limit * period, charges[0][0]  # in units of 1/period, so that all is exact
        for at, amount in charges:
            level = min(limit * period, level + (at - before) * limit)
            level -= amount * period
            before = at
            assert level >= 0, "the upstream's bucket ran dry"

    @staticmethod
    def _sliding(charges: list[tuple[int, int]], limit: int, period: int) -> None:
        for at, _ in charges:
            assert sum(amount for when, amount in charges if at - period < when <= at) <= limit

    @staticmethod
    def _calendar(charges: list[tuple[int, int]], limit: int, period: int) -> None:
        windows: dict[int, int] = {}
        for at, amount in charges:
            windows[at // period] = windows.get(at // period, 0) + amount
        assert max(windows.values()) <= limit


@dataclass
class Held:
    ask: Ask
    granted: Granted
    charge: Charge
    expires: int


class Twins(RuleBasedStateMachine):
    url: str

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.now = START + data.draw(st.integers(0, 86_400_000))
        self.pool = f"test-{uuid.uuid4().hex}"
        self.memory = MemoryBackend(clock=lambda: self.now)
        self.redis = RedisBackend(self.url, now=lambda: self.now)
        self.limits = data.draw(limits())
        self.charges: list[Charge] = []
        self.held: list[Held] = []
        self.deadlines: list[int] = []
        self.number = 0
        self.changed = False
        self.went_back = False
        self.overused = False
        size = data.draw(st.sampled_from([1, 2, 3, 5, 20]))
        self.members = [
            Member(f"acct{i}" if i % 3 == 2 else f"key{i}a", 0, weight, keys)
            for i in range(size)
            for weight, keys in [data.draw(st.sampled_from(rows(i)))]
        ]
        self.to = Registration(self.pool, "gpt", [quota(self.limits, 0.25)], self.members)
        self.register()
        self.wakes = redis.Redis.from_url(self.url, decode_responses=True)

    def teardown(self) -> None:
        if hasattr(self, "redis"):
            self.redis.close()
            self.wakes.close()

    def both(self, op: Any) -> Any:
        in_redis = self.redis.run(op)
        in_memory = self.memory.run(op)
        assert in_redis == in_memory, op
        return in_redis

    @rule()
    def register(self) -> None:
        self.both(Register(self.to, "epoch", {zone: day_starts(zone, self.now) for zone in self.to.zones}))

    @precondition(lambda self: len(self.members) < 20)
    @rule(data=st.data())
    def change_limits(self, data: st.DataObject) -> None:
        """A rolling deploy: the new limits win; the old revision stays known."""
        self.changed = True
        some = data.draw(st.one_of(limits(), limits(), limits(), st.just(Limits())))
        self.to = Registration(self.pool, "gpt", [quota(some, 0.25)], self.members)
        self.register()

    @rule(
        asks=st.lists(st.tuples(TOKENS, st.booleans()), min_size=1, max_size=4),
        model=st.sampled_from(["gpt", "gpt-mini"]),
        repeat=st.booleans(),
        avoid=st.integers(0, 3),
        wanted=st.integers(0, 3),
        ranks=st.lists(st.sampled_from([0, 1, 1, 3]), min_size=4, max_size=4).map(sorted),
        demand=st.one_of(st.none(), demands()),
        large=st.booleans(),
    )
    def acquire(
        self,
        asks: list[tuple[int, bool]],
        model: str,
        repeat: bool,
        avoid: int,
        wanted: int,
        ranks: list[int],
        demand: Demand | None,
        large: bool,
    ) -> None:
        names = [member.account for member in self.members]
        made = []
        for (tokens, steered), rank in zip(asks, ranks):
            self.number += 1
            rank += 4 * (large and not made)
            around = (tuple(names[:avoid]), tuple(names[-wanted:] if wanted else ()), ()) if steered else ((), (), ())
            if steered and avoid == 3:
                around = ((), *around[1:2], around[0])
            made.append(Ask(f"w:{self.number}", tokens, model, *around, rank))
        if repeat and self.held:
            made.append(self.held[-1].ask)
        if demand is not None:
            bands = [sum(ask.rank % 4 == band for ask in made) for band in range(4)]
            demand = demand._replace(bands=tuple(map(sum, zip(bands, demand.bands))))
        op = Acquire(self.to, TTL, tuple(made), demand)
        reply = self.both(op)
        if isinstance(reply, NotRegistered):
            self.register()
            reply = self.both(op)
        if isinstance(reply, NotRegistered):
            return
        for ask, answer in zip(made, reply.answers):
            held = next((held for held in self.held if held.ask.id == ask.id), None)
            if held and self.now - held.charge.at >= UNHEARD and isinstance(answer, (Granted, Refused)):
                self.held.remove(held)  # nobody has heard of it: it is asked for anew
                self.charges.remove(held.charge)
                held = None
            if isinstance(answer, Granted) and held is None:
                self.take(ask, answer)
            elif isinstance(answer, Refused) and answer.wait_ms < LONGEST_MS:  # years that can be named
                self.deadlines.append(self.now + answer.wait_ms)

    def check_slots(self, account: str) -> None:
        """No more live leases than the account has slots."""
        live = [held for held in self.held if held.granted.account == account and held.expires > self.now]
        if self.limits.concurrency and not self.changed and not self.went_back:
            assert len(live) <= self.limits.concurrency

    @rule(tokens=st.sampled_from([0, 1, 99, 150]))
    def wait_for_it(self, tokens: int) -> None:
        """A wait that is called exact is: refused one ms before, granted then (or refused for what has no time)."""

        done = [Closing(held.ask.id, held.granted.account, held.granted.key, "gpt", "ok") for held in self.held]
        self.held.clear()
        if done:
            self.both(Settle(self.to, TTL, tuple(done)))

        def ask() -> Any:
            self.number += 1
            op = Acquire(self.to, TTL, (Ask(f"w:{self.number}", tokens, "gpt"),))
            reply = self.both(op)
            if isinstance(reply, NotRegistered):  # the days that were registered are over
                self.register()
                reply = self.both(op)
            return reply

        reply = ask()
        if isinstance(reply, NotRegistered):
            return
        answer = reply.answers[0]
        if not isinstance(answer, Refused) or not answer.exact:
            if isinstance(answer, Granted):
                self.take(Ask(f"w:{self.number}", tokens, "gpt"), answer)
            return
        if answer.wait_ms > 6 * 86_400_000 or self.went_back or answer.reason == "held":
            return
        self.now += answer.wait_ms - 1
        if answer.wait_ms > 1:
            assert isinstance(ask().answers[0], Refused)
        self.now += 1
        again = ask().answers[0]
        assert isinstance(again, Granted) or self.both(Inspect(self.to, TTL)).line, again
        if isinstance(again, Granted):
            self.take(Ask(f"w:{self.number}", tokens, "gpt"), again)

    def take(self, ask: Ask, granted: Granted) -> None:
        charge = Charge(self.now, granted.account, ask.tokens)
        self.charges.append(charge)
        self.held.append(Held(ask, granted, charge, self.now + TTL))
        self.check_slots(granted.account)

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(
            ["ok", "ok", "ok", "unsent", "neutral", "limited", "account", "key", "key", "model", "failed", "failed"]
        ),
        tokens=st.one_of(st.none(), st.integers(0, 150)),
        count=st.integers(1, 3),
        repeat=st.booleans(),
        siblings=st.lists(st.integers(0, 21), max_size=3),
    )
    def settle(
        self, data: st.DataObject, outcome: str, tokens: int | None, count: int, repeat: bool, siblings: list[int]
    ) -> None:
        closings = []
        closed = []
        for _ in range(min(count, len(self.held))):
            held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            closed.append(held)
            detail = {"failed": "5xx", "account": "insufficient_quota"}.get(outcome, "")
            if outcome == "unsent":
                detail = data.draw(st.sampled_from(["", "connection"]))
            if outcome == "limited":
                detail = data.draw(st.sampled_from(["", "0", "1500", "70000"]))
            used = None if outcome == "unsent" else tokens
            self.overused = self.overused or (used or 0) > held.ask.tokens
            granted = held.granted
            jitter = data.draw(st.sampled_from([0.0, 0.5]))
            model = held.ask.model
            closing = Closing(held.ask.id, granted.account, granted.key, model, outcome, used, detail, jitter)
            names = [self.members[n].account if n < len(self.members) else f"nobody{n}" for n in siblings]
            closings.append(closing._replace(seen=data.draw(SEEN), siblings=tuple(names)))
        replies = self.both(Settle(self.to, TTL, tuple(closings)))
        for held, closing, reply in zip(closed, closings, replies):
            if reply.code == 0 and outcome == "unsent":
                self.charges.remove(held.charge)
            elif reply.code == 0 and closing.tokens is not None and self.limits.charge == "used":
                held.charge.tokens = closing.tokens
        if repeat:
            assert [reply.code for reply in self.both(Settle(self.to, TTL, tuple(closings)))] == [2] * len(closings)

    @rule(demand=demands())
    def leave_the_line(self, demand: Demand) -> None:
        self.both(Acquire(self.to, TTL, (), demand._replace(bands=(0, 0, 0, 0))))

    @rule()
    def pop_a_wake(self) -> None:
        popped = self.wakes.lpop(self.to.keys[5])
        known = self.memory._pool and self.memory._pool.classes.get("gpt")
        assert popped == (str(known.wakes.pop(0)) if known and known.wakes else None)

    @rule(id=st.integers(1, 50))
    def settle_before_acquire(self, id: int) -> None:
        """A settle that overtakes its acquire leaves a tombstone, which refuses the acquire."""
        closing = Closing(f"late:{id}", "x", "x", "gpt", "ok")
        self.both(Settle(self.to, TTL, (closing,)))
        self.both(Acquire(self.to, TTL, (Ask(f"late:{id}", 1, "gpt"),)))

    @precondition(lambda self: not self.went_back)
    @rule(ago_ms=st.sampled_from([0, 1000, 3_600_000, 86_400_000]))
    def register_after_a_loss(self, ago_ms: int) -> None:
        """Who knew the class as another one says so: then less is granted than would be, and never more."""
        reply = self.both(Register(self.to, "epoch", {}, "new", "old", ago_ms))
        assert (reply.birth, reply.lost) == ("", ago_ms < 86_400_000)

    @rule(
        data=st.data(),
        birth=st.sampled_from(["", "", "", "other"]),
        live=st.lists(st.integers(1, 60), max_size=3),
        number=st.integers(0, 5),
        spent=st.lists(st.tuples(*[st.integers(0, 3)] * 4), max_size=2),
        seen=st.lists(st.tuples(st.integers(0, 100_000_000), st.integers(0, 400), st.integers(0, 3000)), max_size=2),
    )
    def restore(
        self,
        data: st.DataObject,
        birth: str,
        live: list[int],
        number: int,
        spent: list[tuple[int, int, int, int]],
        seen: list[tuple[int, int, int]],
    ) -> None:
        """Twice is once; what is restored takes from what may be granted, and gives nothing."""
        member = data.draw(st.sampled_from(self.members))
        account, key = member.account, member.keys[0][0]
        days = tuple(Days(account, self.now - ago, requests, tokens) for ago, requests, tokens in seen)
        leases = tuple(Live(f"r:{n}", account, key, n, self.now - n) for n in live)
        op = Restore(self.to, TTL, birth, "w", days, leases, tuple(Spent(account, *row) for row in spent), number)
        assert self.both(op) == (birth == "")
        before = self.both(Inspect(self.to, TTL)).accounts[account]
        self.both(op)
        after = self.both(Inspect(self.to, TTL)).accounts[account]
        assert (after.live, after.held, after.meters) == (before.live, before.held, before.meters)

    @rule(birth=st.sampled_from(["other"]))
    def come_with_another_birth(self, birth: str) -> None:
        asks = (Ask(f"other:{self.number}", 1, "gpt"),)
        for op in (
            Acquire(self.to, TTL, asks, None, birth),
            Settle(self.to, TTL, (Closing("w:1", "x", "x", "gpt", "ok"),), birth),
            Renew(self.to, TTL, LONGEST, ("w:1",), birth),
        ):
            assert isinstance(self.both(op), NotRegistered)

    @rule()
    def renew(self) -> None:
        renewed = self.both(Renew(self.to, TTL, LONGEST, tuple(held.ask.id for held in self.held)))
        for held, alive in zip(self.held, renewed):
            if alive:
                held.expires = max(held.expires, min(self.now + TTL, held.charge.at + LONGEST))

    @rule(
        data=st.data(),
        verb=VERBS,
        ms=st.sampled_from([None, 0, 30_000]),
    )
    def admin(self, data: st.DataObject, verb: str, ms: int | None) -> None:
        member = data.draw(st.sampled_from(self.members))
        self.both(Admin(self.pool, verb, member.keys[0][0], member.account, ms, ("gpt",)))

    @rule(
        ms=st.sampled_from(
            [1, 100, 250, 999, 1000, 5000, 10_000, 30_000, 60_000, 61_000, 900_000, 3_600_000, 90_000_000]
        )
    )
    def pass_time(self, ms: int) -> None:
        self.now += ms

    @precondition(lambda self: self.deadlines)
    @rule(data=st.data(), off=st.sampled_from([-1, 0, 0, 1]))
    def step_to_a_deadline(self, data: st.DataObject, off: int) -> None:
        later = [deadline for deadline in self.deadlines if deadline + off > self.now]
        if later:
            self.now = data.draw(st.sampled_from(sorted(later)[:5])) + off
        self.deadlines = later

    @precondition(lambda self: not self.went_back)
    @rule(ms=st.sampled_from([1, 500, 2000, 70_000, 7_200_000]))
    def clock_jumps_back(self, ms: int) -> None:
        self.went_back = True
        self.now -= ms

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "to"):
            self.both(Inspect(self.to, TTL))
            known = self.memory._pool and self.memory._pool.classes.get("gpt")
            assert self.wakes.lrange(self.to.keys[5], 0, -1) == [str(hops) for hops in (known.wakes if known else ())]

    @invariant()
    def never_over(self) -> None:
        if getattr(self, "charges", None) and not (self.changed or self.went_back or self.overused):
            Oracle(self.limits).check(self.charges)


def rows(i: int) -> list[tuple[int, tuple[tuple[str, int], ...]]]:
    """Rows of a ring: an account of one key, mostly plain, or of three with weights."""
    if i % 3 == 2:
        return [(6, ((f"key{i}a", 1), (f"key{i}b", 3), (f"key{i}c", 2)))]
    return [(1, ((f"key{i}a", 1),)), (3, ((f"key{i}a", 3),))]


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    def some(*values: int) -> int | None:
        return draw(st.sampled_from([None, *values]))

    return Limits(
        rpm=some(1, 3, 60, 200),
        rpd=some(5, 300),
        tpm=some(100, 150, 1000),
        tpd=some(2000, 10**12),
        concurrency=some(1, 4),
        rule=draw(st.sampled_from(["bucket", "sliding", "calendar"])),
        day_rule=draw(st.sampled_from([None, "bucket", "sliding", "calendar"])),
        burst_s=draw(st.sampled_from([None, None, 1, 10])),
        charge=draw(st.sampled_from(["reserved", "used"])),
    )


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Any]:
    """Either backend, on a clock of its own: `now` is its list of one."""
    now = [START]
    made = MemoryBackend(lambda: now[0]) if request.param == "memory" else RedisBackend(redis_url, now=lambda: now[0])
    yield made, now
    made.close()


def one_account(limits: Limits) -> Registration:
    return Registration("test-one", "gpt", [quota(limits, 0.25)], [Member("a", 0, 1, (("a", 1),))])


def test_a_wait_of_ages_is_told_alike(store: Any) -> None:
    """A limit may have become a millionth of what was used: no longer wait than LONGEST_MS is told."""
    backend, _ = store
    for tokens, limit in ((10**12, 10**12), (1, 1)):
        to = one_account(Limits(tpd=limit))
        backend.run(Register(to, "epoch", {}))
        (answer,) = backend.run(Acquire(to, TTL, (Ask(f"w:{limit}", tokens, "gpt"),))).answers
    assert answer == Refused(LONGEST_MS, "tpd", True, True, "a")


def test_days_that_were_seen_stay_used_where_an_expired_lease_is_taken_back(store: Any) -> None:
    backend, now = store
    to = one_account(Limits(tpd=1000, rule="sliding", charge="used"))
    backend.run(Register(to, "epoch", {}))
    (granted,) = backend.run(Acquire(to, TTL, (Ask("w:1", 90, "gpt"),))).answers
    assert isinstance(granted, Granted)
    seen, live = Days("a", START, 1, 300), Live("w:1", "a", "a", 90, START)
    now[0] += TTL
    assert backend.run(Inspect(to, TTL)).accounts["a"].meters["tpd"][0] == 90
    assert backend.run(Restore(to, TTL, "", "w", (seen,), (live,)))
    row = backend.run(Inspect(to, TTL)).accounts["a"]
    assert (row.live, row.held, row.meters["tpd"][0]) == (1, 90, 300)


def test_lua_and_memory_answer_alike_and_never_over(redis_url: str) -> None:
    Twins.url = redis_url
    run_state_machine_as_test(
        Twins,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=PHASES,
            report_multiple_bugs=False,
        ),
    )
