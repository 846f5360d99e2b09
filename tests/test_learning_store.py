"""What responses' headers said of limits, in the store (lua/learning.lua and its twin), on a clock of the tests' own.

First the stories, on both backends. Then the promise that lowering keeps: where only we use an account, and the
upstream counts by the rule that was declared, nothing that headers say lowers what is granted, in whichever order
requests arrive and responses are settled. Between them, random sequences on both backends: tests/test_twins.py has such
settles too, among everything else.
"""

from __future__ import annotations

import heapq
import itertools
import random
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import redis

from stable_openai._limits import METERS, Limits, day_starts, quota, seen_text
from stable_openai._ops import (
    AccountRow,
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
    Settled,
)
from stable_openai.backends.memory import MemoryBackend
from stable_openai.backends.redis import RedisBackend
from stable_openai.testing.meters import Bucket, Calendar, Meter, Sliding
from tests.test_twins import EXAMPLES

START = 1_790_000_000_000 // 86_400_000 * 86_400_000 + 43_200_000 + 20_000  # 20 s into a minute, at noon
TTL = 60_000
HEADROOM_S = 0.25
RPM, RPD, TPM, TPD = range(4)
RULES: Any = ("bucket", "sliding", "calendar")
Rows = tuple[tuple[int, int | None, int | None], ...]


class Store:
    """A pool on one backend, and a worker of it."""

    def __init__(self, url: str | None) -> None:
        self.now = START
        self.url = url
        self.pool = f"test-{uuid.uuid4().hex}"
        self.backend: Any = RedisBackend(url, now=lambda: self.now) if url else MemoryBackend(lambda: self.now)
        self.numbers = itertools.count(1)

    def register(self, limits: Limits, accounts: tuple[str, ...] = ("a",)) -> Registration:
        members = [Member(name, 0, 1, ((name, 1),)) for name in accounts]
        to = Registration(self.pool, "gpt", [quota(limits, HEADROOM_S)], members)
        self.enter(to)
        return to

    def enter(self, to: Registration) -> None:
        self.backend.run(Register(to, "epoch", {zone: day_starts(zone, self.now) for zone in to.zones}))

    def ask(self, to: Registration, tokens: int = 0, **more: Any) -> Any:
        return self.backend.run(Acquire(to, TTL, (Ask(f"w:{next(self.numbers)}", tokens, "gpt"),), **more)).answers[0]

    def grant(self, to: Registration, tokens: int = 0) -> Granted:
        answer = self.ask(to, tokens)
        assert isinstance(answer, Granted), answer
        return answer

    def count(self, to: Registration, tokens: int = 0) -> int:
        """How many more are granted now."""
        granted = 0
        while isinstance(self.ask(to, tokens), Granted):
            granted += 1
        return granted

    def settle(self, to: Registration, lease: Granted, seen: str = "", outcome: str = "ok", **more: Any) -> Settled:
        closing = Closing(lease.id, lease.account, lease.key, "gpt", outcome, seen=seen, **more)
        settled: Settled = self.backend.run(Settle(to, TTL, (closing,)))[0]
        return settled

    def hear(self, to: Registration, rows: Rows, limits: Limits | None = None, account: str = "a") -> None:
        """One request, and what its response says."""
        lease = self.backend.run(
            Acquire(to, TTL, (Ask(f"w:{next(self.numbers)}", 0, "gpt", wanted=(account,)),))
        ).answers[0]
        assert lease.account == account
        self.settle(to, lease, said(rows, limits))

    def row(self, to: Registration, account: str = "a") -> AccountRow:
        row: AccountRow = self.backend.run(Inspect(to, TTL)).accounts[account]
        return row


def said(rows: Rows, limits: Limits | None = None) -> str:
    return seen_text(rows, limits or Limits(), HEADROOM_S)


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Store]:
    made = Store(redis_url if request.param == "redis" else None)
    yield made
    made.backend.close()


@pytest.mark.parametrize("rule", RULES)
def test_the_first_response_notices_what_somebody_else_has_used(store: Store, rule: Any) -> None:
    to = store.register(Limits(rpm=60, tpm=1000, rule=rule))
    lease = store.grant(to, 100)
    store.settle(to, lease, said(((RPM, 60, 5), (TPM, None, 400))))
    assert store.row(to).meters["tpm"][0] == pytest.approx(1000 - 400 - (5 if rule == "bucket" else 0))
    assert store.count(to, 10) == 5


@pytest.mark.parametrize("rule", RULES)
def test_what_remains_of_a_day_lowers_it_too(store: Store, rule: Any) -> None:
    to = store.register(Limits(rpd=500, rule="bucket", day_rule=rule))
    store.hear(to, ((RPD, 500, 3),))
    assert store.count(to) == 3


@pytest.mark.parametrize("rule", RULES)
def test_what_remains_never_raises_a_meter(store: Store, rule: Any) -> None:
    to = store.register(Limits(rpm=60, rule=rule))
    leases = [store.grant(to) for _ in range(40)]
    before = store.row(to).meters
    for lease in leases:
        store.settle(to, lease, said(((RPM, 60, 59),)))
    assert store.row(to).meters == before


def test_a_bucket_has_refilled_since_the_grant(store: Store) -> None:
    to = store.register(Limits(rpm=60))
    lease = store.grant(to)
    store.now += 20_000
    store.settle(to, lease, said(((RPM, 60, 5),)))
    assert store.count(to) == 25


def test_what_a_response_of_the_last_window_says_is_over(store: Store) -> None:
    to = store.register(Limits(rpm=60, rule="calendar"))
    lease = store.grant(to)
    store.now += 40_000
    late = store.grant(to)
    store.settle(to, lease, said(((RPM, 60, 0),)))
    assert store.row(to).meters["rpm"][0] == 1
    # So close to the boundary the upstream's clock may still have been in the last window.
    store.settle(to, late, said(((RPM, 60, 0),)))
    assert store.row(to).meters["rpm"][0] == 1
    store.now += 250
    store.hear(to, ((RPM, 60, 0),))
    assert store.row(to).meters["rpm"][0] == 60


def test_a_sliding_log_from_which_something_has_expired_is_not_compared(store: Store) -> None:
    to = store.register(Limits(rpm=10, rule="sliding"))
    for _ in range(4):
        store.grant(to)
    store.now += 30_000
    lease = store.grant(to)
    store.now += 30_251
    store.settle(to, lease, said(((RPM, 10, 5),)))  # the five that it counts are the first four and itself
    assert store.row(to).meters["rpm"][0] == 1
    store.hear(to, ((RPM, 10, 2),))
    assert store.row(to).meters["rpm"][0] == 8


def test_nor_is_one_that_was_empty_meanwhile(store: Store) -> None:
    to = store.register(Limits(tpm=100, rule="sliding", charge="used"))
    store.settle(to, store.grant(to, 50), tokens=50)
    store.now += 30_000
    lease = store.grant(to, 1)
    store.now += 30_251
    store.settle(to, store.grant(to, 5), tokens=5)
    store.settle(to, lease, said(((TPM, 100, 49),)), tokens=1)
    assert store.row(to).meters["tpm"][0] == 6


@pytest.mark.parametrize("rule", RULES)
def test_a_limit_that_nobody_declared_is_learned_and_shared(store: Store, rule: Any) -> None:
    limits = Limits(rule=rule)
    to = store.register(limits)
    other = store.register(limits, ("a", "b"))
    assert store.row(to).meters == {}
    store.hear(to, ((RPM, 60, 10), (TPD, 5000, None)), limits)
    for ring in (to, other):
        assert {name: meter[1:] for name, meter in store.row(ring).meters.items()} == {
            "rpm": (60, True),
            "tpd": (5000, True),
        }
        assert store.row(other, "b").meters == {}
    assert store.count(to) == 10
    # A worker that knows nothing of it registers, with the same limits and with others.
    store.register(limits)
    newer = store.register(Limits(rpd=5, rule=rule))
    rows = store.row(newer).meters
    assert {name: meter[1:] for name, meter in rows.items()} == {
        "rpm": (60, True),
        "rpd": (5, False),
        "tpd": (5000, True),
    }
    assert isinstance(store.ask(newer), Refused)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_declared_later_wins_and_keeps_the_level(store: Store, rule: Any) -> None:
    to = store.register(Limits(rule=rule))
    store.hear(to, ((RPM, 60, 10),), Limits(rule=rule))
    used = store.row(to).meters["rpm"][0]
    declared = store.register(Limits(rpm=55, rule=rule))
    lost = 5 if rule == "bucket" else 0  # of a bucket the level is kept, and the capacity is less
    assert store.row(declared).meters == {"rpm": (pytest.approx(used - lost), 55, False)}
    store.hear(declared, ((RPM, 1000, 999),))
    assert store.row(declared).meters["rpm"][1:] == (55, False)
    assert store.row(store.register(Limits(rule=rule))).meters["rpm"][1:] == (55, False)  # who declares nothing
    assert "rpm" not in store.row(store.register(Limits(tpm=1000, rule=rule))).meters, "it was dropped for good"


def test_a_rule_that_is_declared_later_starts_with_what_was_used(store: Store) -> None:
    to = store.register(Limits())
    store.hear(to, ((RPM, 60, 10),))
    declared = store.register(Limits(rpm=60, rule="sliding"))
    assert store.row(declared).meters == {"rpm": (49, 60, False)}


NOT_ROWS = [
    "nonsense", ";", "0 0 0 1 0.001 1", "0 5 6 1 0.001 1", "0 -5 - 1 0.001 1", "0 - -1 0 0 0", "0 1e3 5 1 0.1 9",
    "0 2000000000000 1 1 0.001 1", "0 - 2000000000000 0 0 0", "0 nan 1 1 0.001 1", "4 5 4 1 0.001 1", "0 5 4 1 0.001",
    "0 5 4 1 nan 5", "0 5 4 4 1 1", " 0 5 4 1 0.001 1", "0  5 4 1 0.001 1", "0 5- 4 1 0.001 1",
]  # fmt: skip
NO_METERS = [
    "0 5 4 0 0.001 5",
    "0 5 4 1 0 5",
    "0 5 4 1 1e999 5",
    "0 5 4 2 60250 0",
    "0 5 4 2 0.5 1",
    "0 5 4 3 250 0",
    "0 5 4 1 0.01 1.5",
]


@pytest.mark.parametrize(
    ("text", "declared"),
    [
        *itertools.product(NOT_ROWS, (Limits(), Limits(rpm=60, tpm=10), Limits(rpm=60, rule="sliding"))),
        *itertools.product(NO_METERS, (Limits(),)),
    ],
)
def test_what_cannot_be_changes_nothing(store: Store, declared: Limits, text: str) -> None:
    to = store.register(declared)
    lease = store.grant(to)
    before = store.row(to)
    assert store.settle(to, lease, text) == Settled(0, "")
    assert store.row(to) == before._replace(live=0)


def test_the_worker_leaves_out_what_cannot_be() -> None:
    assert said(((0, 0, 0), (1, 5, 6), (2, -1, None), (3, None, -1), (0, 10**13, 1))) == ""
    assert said(((0, None, 7),)) == "0 - 7 0 0 0"
    assert said(((1, 9, None), (3, 9, 9)), Limits(rule="calendar")).split(";") == [
        f"{number} 9 {left} 1 {9 / 86_400_000:.17g} 8" for number, left in ((1, "-"), (3, 9))
    ], "a learned day of the calendar is a bucket"
    assert said(((2, 9, 1),), Limits(rule="calendar")) == "2 9 1 3 250 60000"
    assert said(((1, 300, 1),), Limits(rule="calendar", day_rule="sliding")) == "1 300 1 2 86400250 675000"


@pytest.mark.parametrize("charge", ["reserved", "used"])
@pytest.mark.parametrize("rule", RULES)
def test_a_request_larger_than_what_was_learned(store: Store, rule: Any, charge: Any) -> None:
    """It waits until all is free, and reserves as much as that: it and who comes after wait for one window at most."""
    limits = Limits(rule=rule, charge=charge)
    to = store.register(limits)
    store.hear(to, ((TPM, 600, 500),), limits)
    for part in (599, 5000):
        refused = store.ask(to, 5000)
        assert isinstance(refused, Refused)
        assert (refused.reason, refused.exact) == ("tpm", True)
        assert refused.wait_ms <= 60_250
        store.now += refused.wait_ms
        lease = store.grant(to, 5000)
        assert isinstance(store.ask(to, 1), Refused)
        if part == 599:
            store.settle(to, lease)
            assert store.row(to).meters["tpm"][0] == pytest.approx(600, abs=0.1)
        else:
            store.settle(to, lease, outcome="unsent")  # what was reserved comes back, and no more
            assert store.row(to).meters["tpm"][0] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("declared", ["tpm", "tpd", None])
def test_a_request_larger_than_one_of_two_limits(store: Store, declared: str | None) -> None:
    """Of one that was declared it reserves what it asks for."""
    to = store.register(Limits(**{declared: 10_000} if declared else {}))
    store.hear(to, tuple((number, 600 + number, None) for number in (TPM, TPD) if METERS[number] != declared))
    lease = store.grant(to, 5000)
    used = [row[0] for row in store.row(to).meters.values()]
    assert used == pytest.approx([5000, 5000] if declared else [602, 602], abs=0.1)
    store.settle(to, lease, tokens=6000)  # what was really used is charged, whatever was learned
    assert [row[0] for row in store.row(to).meters.values()] == pytest.approx([6000, 6000], abs=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_another_limit_replaces_what_was_learned(store: Store, rule: Any) -> None:
    limits = Limits(rule=rule)
    to = store.register(limits)
    store.hear(to, ((RPM, 60, 10),), limits)
    used = store.row(to).meters["rpm"][0]
    store.hear(to, ((RPM, 30, None),), limits)
    assert store.row(to).meters["rpm"] == (pytest.approx(used + 1 - (30 if rule == "bucket" else 0)), 30, True)
    assert store.count(to) == (9 if rule == "bucket" else 0)


@pytest.mark.parametrize("rule", RULES)
def test_a_larger_limit_is_known_to_all_rings_at_once_and_wakes_who_waits(store: Store, rule: Any) -> None:
    """The accounts' scores of the ready indexes were true under the limit that is no more."""
    limits = Limits(rule=rule)
    to, other = store.register(limits, ("a", "b")), store.register(limits, ("a", "b", "c"))
    store.hear(to, ((RPM, 2, 1),), limits, "a")
    open_still = store.backend.run(Acquire(to, TTL, (Ask("open", 0, "gpt", wanted=("a",)),))).answers[0]
    assert open_still.account == "a"
    store.now += 1000
    for name in ("b", "c"):
        store.hear(other, ((RPM, 2, 0),), limits, name)
    waiting = Demand("w9", (0, 1, 0, 0), 0)
    for ring in (to, other):
        assert isinstance(store.ask(ring, demand=waiting), Refused)
    woken: list[str] = []
    store.backend.on_wake = woken.append
    store.settle(to, open_still, said(((RPM, 6000, None),), limits))
    if store.url:
        with redis.Redis.from_url(store.url) as client:
            assert client.llen(to.keys[5]) == 1
    else:
        assert woken == ["gpt"]
    store.now += 100
    for ring in (to, other):
        answer = store.ask(ring, demand=waiting if ring is to else None)
        assert isinstance(answer, Granted) or answer.reason == "line", answer
        store.backend.run(Acquire(ring, TTL, (), waiting._replace(bands=(0, 0, 0, 0))))
        assert store.grant(ring).account == "a"


def test_what_is_said_again_writes_nothing(redis_url: str) -> None:
    store = Store(redis_url)
    to = store.register(Limits())
    store.hear(to, ((RPM, 60, 10), (TPM, 500, 400)))
    with redis.Redis.from_url(redis_url) as client:
        learned: Any = client.hget(to.keys[1], "h:a")
        assert len(learned) == 2 * 41
        store.now += 1000
        store.hear(to, ((TPM, 500, 300), (RPM, 60, 8)), Limits(rule="sliding"))
        assert client.hget(to.keys[1], "h:a") == learned
    store.backend.close()


@pytest.mark.parametrize("rule", RULES)
def test_what_was_granted_before_a_limit_was_learned_gives_nothing_back(store: Store, rule: Any) -> None:
    to = store.register(Limits(rule=rule))
    early = [store.grant(to, 50) for _ in range(3)]
    store.now += 1
    store.settle(to, early[0], said(((RPM, 60, 10), (TPM, 600, 100)), Limits(rule=rule)))
    before = store.row(to).meters
    store.settle(to, early[1], outcome="unsent")
    store.settle(to, early[2], tokens=80)
    assert store.row(to).meters == before
    store.settle(to, store.grant(to, 50), outcome="unsent")
    assert store.row(to).meters == before


@pytest.mark.parametrize("rule", RULES)
def test_a_lease_that_has_expired_teaches_too(store: Store, rule: Any) -> None:
    limits = Limits(rpd=100, rule=rule)
    to = store.register(limits)
    lease = store.grant(to)
    store.now += TTL + 1
    assert store.settle(to, lease, said(((RPD, 100, 4), (TPM, 500, 0)), limits)).code == 1
    meters = store.row(to).meters
    assert (meters["rpd"][0], meters["tpm"][1:]) == (pytest.approx(96, abs=1.1), (500, True))
    assert store.settle(to, lease, said(((RPD, 100, 0),), limits)).code == 2
    assert store.row(to).meters == meters


def test_what_was_never_sent_teaches_nothing(store: Store) -> None:
    to = store.register(Limits(rpm=60))
    lease = store.grant(to)
    store.settle(to, lease, said(((RPM, 60, 0), (TPM, 60, 0))), "unsent")
    assert store.row(to).meters == {"rpm": (0, 60, False)}


def test_a_refusal_lowers_and_rests(store: Store) -> None:
    to = store.register(Limits(rpm=60))
    lease = store.grant(to)
    store.settle(to, lease, said(((RPM, 60, 0),)), "limited", detail="200")
    assert store.ask(to) == Refused(1000, "rpm", True, True, "a")


def test_siblings_rest_as_long(store: Store) -> None:
    to = store.register(Limits(), ("a", "b", "c"))
    store.register(Limits(), ("a", "d"))
    for wait, siblings in (("5000", ("a", "c", "d", "nobody")), ("1000", ("c",))):
        store.settle(to, Granted("w:0", "a", "a"))  # a tombstone: siblings of what is not known rest not
        lease = store.ask(to)
        assert lease.account == ("a" if wait == "5000" else "b")
        store.settle(to, lease, outcome="limited", detail=wait, siblings=siblings)
    assert [store.row(to, name).cooldown_ms for name in "abc"] == [5000, 1000, 5000]
    other = store.register(Limits(), ("a", "d", "nobody"))
    assert [store.row(other, name).cooldown_ms for name in ("d", "nobody")] == [0, 0], "the caller's ring has them not"
    if store.url:
        with redis.Redis.from_url(store.url) as client:
            assert not any(client.hmget(to.keys[1], "a:nobody", "a:d"))


def test_siblings_of_other_outcomes_do_not_rest_and_their_refusals_do_not_count(store: Store) -> None:
    to = store.register(Limits(), ("a", "b"))
    store.settle(to, store.grant(to), siblings=("b",))
    assert store.row(to, "b").cooldown_ms == 0
    lease = store.grant(to)
    assert lease.account == "b"
    for _ in range(3):  # a's refusals: 1 s, 2 s, 4 s; each is its first for b
        answer = store.ask(to)
        store.settle(to, answer, outcome="limited", siblings=("b",))
        store.now += store.row(to, answer.account).cooldown_ms
    store.settle(to, lease, outcome="limited")
    assert store.row(to, "b").cooldown_ms < 5000


def test_a_reset_forgets_what_was_learned(store: Store) -> None:
    to = store.register(Limits(rpd=10))
    store.hear(to, ((RPM, 60, 0), (RPD, 10, 5)))
    assert isinstance(store.ask(to), Refused)
    store.backend.run(Admin(store.pool, "reset", "a", "a", None, ("gpt",)))
    assert store.row(to).meters == {"rpd": (pytest.approx(4), 10, False)}
    store.grant(to)
    store.hear(to, ((RPM, 60, 30),))
    assert store.row(to).meters["rpm"] == (pytest.approx(29), 60, True)


WALKS = max(10, EXAMPLES // 2)
STEP_MS = [0, 1, 100, 249, 1000, 10_000, 10_000, 20_000, 30_000, 30_250, 60_250, 61_000, 7_200_000, 86_400_250]
AMOUNTS = [0, 0, 1, 1, 5, 20, 90, 500]
HEARD_LIMITS = [None, None, None, 3, 60, 60, 60, 60, 100, 6000]
HEARD_REMAINING = [None, None, 0, 2, 5, 20, 40, 50, 55, 59, 99]


class Walk:
    """A random sequence on both backends, of little but what can be learned: two accounts, two rings of one class."""

    def __init__(self, seed: int, url: str) -> None:
        self.chance = random.Random(seed)
        self.stores = [Store(url), Store(None)]
        self.stores[0].pool = self.stores[1].pool
        self.rules = {"rule": self.pick(RULES), "day_rule": self.pick([None, None, *RULES])}
        self.rules["charge"] = self.pick(["reserved", "used"])
        self.register()
        self.held: list[tuple[Registration, Granted, int]] = []

    def pick(self, values: Any) -> Any:
        return self.chance.choice(values)

    def register(self) -> None:
        declared = {name: self.pick([None, None, 60, 600]) for name in METERS}
        limits = Limits(**declared, **self.rules, concurrency=self.pick([None, None, None, 9]))
        self.rings = [self.stores[0].register(limits, names) for names in (("a", "b"), ("a", "b", "c"))]
        for to in self.rings:
            self.stores[1].enter(to)

    def both(self, op: Any) -> Any:
        in_redis, in_memory = (store.backend.run(op) for store in self.stores)
        assert in_redis == in_memory, op
        return in_redis

    def acquire(self) -> None:
        to = self.pick(self.rings)
        asks = []
        for _ in range(self.pick([1, 1, 1, 2, 5])):
            wanted = self.pick([(), (), ("a",), ("b",)])
            asks.append(Ask(f"w:{next(self.stores[0].numbers)}", self.pick(AMOUNTS), "gpt", wanted=wanted))
        demand = Demand(self.pick(["w1", "w2"]), (0, len(asks), 0, 0), min(ask.tokens for ask in asks))
        reply = self.both(Acquire(to, TTL, tuple(asks), self.pick([None, None, demand])))
        if isinstance(reply, NotRegistered):
            for store, ring in itertools.product(self.stores, self.rings):
                store.enter(ring)
            return
        for ask, answer in zip(asks, reply.answers):
            if isinstance(answer, Granted):
                self.held.append((to, answer, ask.tokens))

    def heard(self) -> str:
        rules = Limits(**self.rules) if self.chance.random() < 0.7 else Limits(rule=self.pick(RULES), burst_s=10)
        rows = [
            (n, self.pick(HEARD_LIMITS), self.pick(HEARD_REMAINING)) for n in range(4) if self.chance.random() < 0.6
        ]
        more = [self.pick([*NOT_ROWS, *NO_METERS])] if self.chance.random() < 0.1 else []
        return ";".join([said(tuple(rows), rules), *more])

    def settle(self) -> None:
        closings = []
        for _ in range(min(len(self.held), self.pick([1, 1, 3]))):
            to, lease, tokens = self.held.pop(self.chance.randrange(len(self.held)))
            outcome = self.pick([*["ok"] * 8, "neutral", "unsent", "limited"])
            detail = self.pick(["", "1500"]) if outcome == "limited" else ""
            used = self.pick([None, tokens, tokens // 2, tokens + 7]) if outcome != "unsent" else None
            closing = Closing(lease.id, lease.account, lease.key, "gpt", outcome, used, detail)
            siblings = tuple(self.chance.sample(["a", "b", "c", "nobody"], 2))
            closings.append(closing._replace(seen=self.heard(), siblings=siblings))
        if closings:
            self.both(Settle(to, TTL, tuple(closings)))

    @property
    def now(self) -> int:
        return self.stores[0].now

    def pass_time(self) -> None:
        """Or go to where a minute begins."""
        now = self.now + self.pick(STEP_MS)
        if self.chance.random() < 0.2:
            now = max(now, now // 60_000 * 60_000 + 60_000 + self.pick([-250, -1, 0, 1, 249, 250]))
        for store in self.stores:
            store.now = now

    def reset(self) -> None:
        self.both(Admin(self.stores[0].pool, "reset", "a", "a", None, ("gpt",)))

    def check(self, client: redis.Redis) -> None:
        self.both(Inspect(self.rings[1], TTL))
        known = self.stores[1].backend._pool.classes["gpt"]
        assert client.lrange(self.rings[0].keys[5], 0, -1) == [str(hops) for hops in known.wakes]
        for ring in self.rings:
            scores: Any = client.zrange(ring.keys[4], 0, -1, withscores=True)
            assert [(score, name) for name, score in scores] == known.rings[ring.ring].index.order


def test_both_backends_learn_alike(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        for seed in range(WALKS):
            walk = Walk(seed, redis_url)
            steps = [walk.acquire] * 20 + [walk.settle] * 20 + [walk.pass_time] * 12 + [walk.register, walk.reset]
            for _ in range(150):
                walk.pick(steps)()
                walk.check(client)
            for store in walk.stores:
                store.backend.close()


class Upstream:
    """It counts by the rule that was declared, when a request arrives; all the tokens are of one account."""

    def __init__(self, limits: Limits) -> None:
        self.by_use = limits.charge == "used"
        self.meters: dict[int, Meter] = {}
        for number, limit in ((RPM, limits.rpm), (TPM, limits.tpm)):
            if limit is not None:
                kinds: dict[str, Any] = {"bucket": Bucket, "sliding": Sliding, "calendar": Calendar}
                self.meters[number] = kinds[limits.rule or "bucket"](limit, 60_000_000_000)

    def take(self, tokens: int, now: int) -> None:
        for number, meter in self.meters.items():
            amount = 1 if number == RPM else tokens
            if self.by_use and number == TPM:
                meter.held += amount
            else:
                meter.charge(amount, now * 1_000_000)

    def finish(self, reserved: int, used: int, now: int) -> None:
        if self.by_use and TPM in self.meters:
            self.meters[TPM].held -= reserved
            self.meters[TPM].charge(used, now * 1_000_000)

    def headers(self, now: int) -> Rows:
        return tuple((number, meter.limit, meter.remaining(now * 1_000_000)) for number, meter in self.meters.items())


class Fate(NamedTuple):
    """What becomes of a request; times in ms."""

    tokens: int
    used: int
    travels: int
    works: int
    returns: int
    is_sent: bool
    says_early: bool
    """The headers are written when it arrives, else when it is done."""
    pause: int
    """Until the next one asks."""


def fates(seed: int) -> Iterator[Fate]:
    """The network takes up to the headroom, the upstream and the worker up to 40 s each."""
    chance = random.Random(seed)
    slowest, farthest = chance.choice([300, 5000, 40_000]), chance.choice([0, 100, 249])
    while True:
        tokens = chance.choice([1, 5, 20, 20, 90])
        yield Fate(
            tokens,
            chance.choice([tokens, chance.randint(0, tokens)]),
            chance.randint(0, farthest),
            chance.randint(0, slowest),
            chance.randint(0, slowest),
            chance.random() > 0.03,
            chance.random() < 0.5,
            chance.choice([0, 0, chance.randint(0, 4000)]),
        )


def simulate(limits: Limits, seed: int, hears: bool, url: str | None = None, length_ms: int = 300_000) -> list[int]:
    """When each request was granted, of those who nearly always want more."""
    store = Store(url)
    to, upstream = store.register(limits), Upstream(limits)
    coming = fates(seed)
    fate = next(coming)
    granted: list[int] = []
    order = itertools.count()
    events: list[Any] = [(START, next(order), "ask", None, None, ())]
    while events[0][0] < START + length_ms:
        store.now, _, what, lease, of, rows = heapq.heappop(events)

        def then(ms: int, *event: Any) -> None:
            heapq.heappush(events, (store.now + ms, next(order), *event))

        if what == "ask":
            answer = store.ask(to, fate.tokens)
            if isinstance(answer, Refused):
                then(max(1, answer.wait_ms), "ask", None, None, ())
                continue
            granted.append(store.now)
            then(fate.travels, "arrive" if fate.is_sent else "fail", answer, fate, ())
            then(fate.pause, "ask", None, None, ())
            fate = next(coming)
        elif what == "fail":
            store.settle(to, lease, outcome="unsent")
        elif what == "arrive":
            upstream.take(of.tokens, store.now)
            then(of.works, "finish", lease, of, upstream.headers(store.now))
        elif what == "finish":
            upstream.finish(of.tokens, of.used, store.now)
            then(of.returns, "settle", lease, of, rows if of.says_early else upstream.headers(store.now))
        else:
            store.settle(to, lease, said(rows, limits) if hears else "", tokens=of.used)
    store.backend.close()
    return granted


LIMITS = [
    Limits(rpm=60),
    Limits(rpm=500, tpm=4000),
    Limits(tpm=600),
    Limits(rpm=30, tpm=600, concurrency=5),
]


@pytest.mark.parametrize("charge", ["reserved", "used"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_headers_lower_nothing_that_only_we_use(limits: Limits, rule: Any, charge: Any) -> None:
    limits = replace(limits, rule=rule, charge=charge)
    for seed in range(4):
        told, untold = (simulate(limits, seed, hears) for hears in (True, False))
        assert len(untold) > 50
        assert told == untold, f"seed {seed}"


def test_a_bucket_loses_no_more_than_the_headroom_where_a_request_overtakes_others() -> None:
    """At 60 a minute, 10 leave together and take 249 ms; 1.1 s later one arrives and is answered at once."""
    limits = Limits(rpm=60)
    store = Store(None)
    to, upstream = store.register(limits), Upstream(limits)
    slow = [store.grant(to) for _ in range(10)]
    store.now += 249
    for _ in slow:
        upstream.take(0, store.now)
    store.now += 851
    quick = store.grant(to)
    upstream.take(0, store.now)
    before = store.row(to).meters["rpm"][0]
    store.settle(to, quick, said(upstream.headers(store.now), limits))
    assert 0 < store.row(to).meters["rpm"][0] - before < 0.25
    before = store.row(to).meters["rpm"][0]
    for _ in range(20):
        lease = store.grant(to)
        upstream.take(0, store.now)
        store.settle(to, lease, said(upstream.headers(store.now), limits))
    assert store.row(to).meters["rpm"][0] == pytest.approx(before + 20), "once"


def test_nor_in_redis(redis_url: str) -> None:
    for rule, charge in itertools.product(RULES, ("reserved", "used")):
        limits = Limits(rpm=60, tpm=900, rule=rule, charge=charge)  # type: ignore[arg-type]
        told, untold = (simulate(limits, 1, hears, url, 70_000) for hears, url in ((True, redis_url), (False, None)))
        assert told == untold
