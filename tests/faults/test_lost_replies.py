"""A connection is cut between a script's execution and its reply: nothing is granted twice, settled twice or left."""

from __future__ import annotations

import asyncio
import gc
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from stable_openai import BrokerUnavailable, Exhausted, KeyManager, Limits, stable
from stable_openai._limits import quota
from stable_openai._ops import (
    Acquire,
    Admin,
    Ask,
    Closing,
    Demand,
    Inspect,
    Member,
    Register,
    Registration,
    Renew,
    Settle,
)
from stable_openai._status import KeyStatus
from stable_openai.backends.memory import MemoryBackend
from stable_openai.backends.redis import RedisBackend, script
from tests.faults.proxy import CUT_AFTER, CUT_BEFORE, SWALLOW, Proxy
from tests.faults.servers import Server, until
from tests.faults.test_workers import short

START = 1_790_000_000_000
TTL = 60_000
VERBS = ["register", "inspect", "acquire", "renew", "settle", "admin"]
POLL_S = 5.0  # whoever waits for what has no time looks again after this, and a tenth more at most
TWO_SLOTS = Limits(concurrency=2, rpm=10_000, tpm=1_000_000, rule="sliding")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, Server(folder) as server:
        until(server.admin.ping)
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    server.admin.flushall()
    for verb in VERBS:  # or the reply that is lost says NOSCRIPT
        server.admin.script_load(script(verb)[0])
    with Proxy(server.address) as proxy:
        yield proxy


@pytest.fixture
def make(proxy: Proxy, server: Server) -> Iterator[Callable[..., KeyManager]]:
    """Makes managers of one pool: through the proxy, or (`direct`) past it."""
    managers = []

    def one(
        limits: Limits = TWO_SLOTS, keys: tuple[str, ...] = ("sk-a",), direct: bool = False, **o: Any
    ) -> KeyManager:
        url = f"redis://127.0.0.1:{server.port}" if direct else proxy.url
        managers.append(KeyManager(keys, url, pool="test-lost", limits=limits, **{"max_wait": 20.0, **o}))
        return managers[-1]

    yield one
    proxy.gamble(None)
    for manager in managers:
        manager.close()


def key_of(manager: KeyManager) -> KeyStatus:
    return manager.status().keys[0]


def used(manager: KeyManager, meter: str, key: int = 0) -> float:
    return next(row.used for row in manager.status().keys[key].meters if row.limit == meter)


def left_behind(server: Server, manager: KeyManager) -> list[str]:
    """What is left in Redis of leases, claims and wakes, once all that expires has expired."""
    to = manager._worker.registration("-")
    hours = iter(range(1, 100))
    later = RedisBackend(
        f"redis://127.0.0.1:{server.port}", now=lambda: int(time.time() * 1000) + 3_600_000 * next(hours)
    )
    for _ in range(20):
        later.run(Inspect(to, TTL))
    later.close()
    fields = [name for name in server.admin.hkeys(to.keys[1]) if name[:2] == "l:" or name == "w"]
    return [*fields, *(server.admin.zrange(to.keys[2], 0, -1)[:-1]), *server.admin.lrange(to.keys[5], 0, -1)]


class Story:
    """Each verb once and more, on Redis through the proxy and in memory; one clock, which stands still meanwhile."""

    def __init__(self, url: str, colour: str) -> None:
        self.now = START
        self.redis = RedisBackend(url, now=lambda: self.now)
        self.memory = MemoryBackend(clock=lambda: self.now)
        self.loop = asyncio.new_event_loop() if colour == "async" else None
        members = [Member(name, 0, 1, ((name, 1),)) for name in ("key-a", "key-b")]
        limits = quota(Limits(rpm=100, tpm=5000, concurrency=2, rule="sliding"), 0.25)
        self.to = Registration("test-lost", "gpt", [limits], members)

    def ops(self) -> Iterator[Any]:
        to, asks = self.to, [Ask(f"w:{n}", 10 * n, "gpt") for n in range(7)]
        closings = [Closing(f"w:{n}", "key-a", "key-a", "gpt", "ok", 100 * n) for n in range(7)]
        yield Register(to, "epoch", {})
        yield Inspect(to, TTL)
        yield Acquire(to, TTL, (asks[0],))
        yield Acquire(to, TTL, (asks[1],), Demand("w", (0, 1, 0, 0), 10, -1))
        yield Renew(to, TTL, 900_000, ("w:0", "w:1"))
        self.now += 10
        yield Settle(to, TTL, (closings[0],))
        yield Acquire(to, TTL, tuple(asks[2:6]), Demand("w", (0, 6, 0, 0), 10, -1))  # three, and one waits
        yield Admin("test-lost", "disable", "key-b", "key-b", 5000, ("gpt",))
        yield Settle(to, TTL, (*closings[1:4], closings[4]._replace(outcome="unsent")))
        yield Admin("test-lost", "enable", "key-b", "key-b", None, ("gpt",))
        yield Acquire(to, TTL, (asks[5], asks[6]), Demand("w", (0, 2, 0, 0), 10, -1))
        yield Acquire(to, TTL, (), Demand("w", (0, 0, 0, 0), 0))
        self.now += TTL
        yield Settle(to, TTL, (closings[5],))  # late
        yield Inspect(to, TTL)

    def run(self, op: Any) -> Any:
        while True:
            try:
                return self.run_once(op)
            except BrokerUnavailable:
                assert type(op) is Renew  # the heartbeat asks again

    def run_once(self, op: Any) -> Any:
        return self.redis.run(op) if self.loop is None else self.loop.run_until_complete(self.redis.arun(op))

    def close(self) -> None:
        if self.loop is not None:
            self.loop.run_until_complete(self.redis.aclose())
            self.loop.close()
        self.redis.close()


@pytest.mark.parametrize("colour", ["sync", "async"])
@pytest.mark.parametrize("verb", [*VERBS, pytest.param("all", marks=pytest.mark.soak)])
def test_every_verb_repeated_is_the_verb_done_once(proxy: Proxy, verb: str, colour: str) -> None:
    """Each reply of the verb is lost, then lost again: the state is that of a store that was asked once."""
    story = Story(proxy.url, colour)
    for op in story.ops():
        name = type(op).__name__.lower()
        expected = story.memory.run(op)
        lost = verb in (name, "all")
        if lost:
            proxy.meet(name, CUT_AFTER, 2)
        got = story.run(op)
        assert proxy.met
        if type(op) is Settle and lost:
            assert [reply.code for reply in got] == [2] * len(op.closings)  # done already
        elif type(op) is Register:
            assert got.epoch == expected.epoch
        else:
            assert got == expected
        assert story.run(Inspect(story.to, TTL)) == story.memory.run(Inspect(story.to, TTL)), op
    assert proxy.cuts > 0
    story.close()


@pytest.mark.parametrize("fate", [CUT_BEFORE, CUT_AFTER, pytest.param(SWALLOW, marks=pytest.mark.soak)])
def test_a_lease_by_itself(proxy: Proxy, make: Callable[..., KeyManager], fate: str) -> None:
    manager = make()
    proxy.meet("acquire", fate)
    proxy.meet("settle", fate)
    with manager.lease(tokens=10) as lease:
        lease.report(tokens=25)
        assert key_of(manager).live == 1
    assert proxy.met
    assert (key_of(manager).live, used(manager, "rpm"), used(manager, "tpm")) == (0, 1, 25)


def test_a_lease_whose_grant_was_lost_lives_for_a_whole_ttl_from_the_answer(server: Server) -> None:
    now = [START]
    backend = RedisBackend(f"redis://127.0.0.1:{server.port}", now=lambda: now[0])
    to = Registration("test-whole", "gpt", [quota(Limits(concurrency=1), 0.25)], [Member("a", 0, 1, (("a", 1),))])
    backend.run(Register(to, "epoch", {}))
    first, other = (Acquire(to, TTL, (Ask(id, 0, "gpt"),)) for id in ("w:1", "w:2"))
    for _ in range(3):
        backend.run(first)
        now[0] += TTL - 1
        assert backend.run(other).answers[0].reason == "concurrency"
    now[0] += 1
    assert backend.run(other).answers[0].id == "w:2"
    backend.close()


@pytest.mark.parametrize("lost", ["acquire", "settle", "both"])
def test_several_asks_in_a_line(proxy: Proxy, server: Server, make: Callable[..., KeyManager], lost: str) -> None:
    """Two slots, twelve calls in a line: every second reply is lost, and none is served twice or never."""
    manager = make()
    at_once, most, served = [0], [0], Counter[str]()

    async def call() -> None:
        async with manager.lease(tokens=10) as lease:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            served[lease.id] += 1
            lease.report(tokens=20)
            await asyncio.sleep(0.01)
            at_once[0] -= 1

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*(call() for _ in range(12))), 20)
        await manager.aclose()

    proxy.cut_every_second("acquire", "settle") if lost == "both" else proxy.cut_every_second(lost)
    asyncio.run(main())
    proxy.cut_every_second()
    assert proxy.cuts >= 3
    assert most[0] <= 2
    assert (len(served), set(served.values())) == (12, {1})
    watcher = make(direct=True)
    assert (key_of(watcher).live, used(watcher, "rpm"), used(watcher, "tpm")) == (0, 12, 240)
    assert left_behind(server, watcher) == []


def test_a_batch_of_settles(proxy: Proxy, server: Server, make: Callable[..., KeyManager]) -> None:
    manager = make(limits=Limits(concurrency=10, rpm=100, rule="sliding"))

    @stable(manager=manager)
    def stream(api_key: str) -> Iterator[int]:
        yield from range(3)

    held = [stream() for _ in range(5)]
    for one in held:
        next(one)
    proxy.meet("settle", CUT_AFTER, 2)
    before = proxy.log.count("settle")
    held.clear()
    del one
    gc.collect()
    manager._do(manager._worker.flush())
    assert proxy.met
    assert proxy.log.count("settle") - before == 3  # one batch, which was sent three times
    assert (key_of(manager).live, used(manager, "rpm")) == (0, 5)
    assert left_behind(server, manager) == []


def test_a_heartbeat(proxy: Proxy, make: Callable[..., KeyManager]) -> None:
    """Every second renewal's reply is lost: the lease is not, though it is held for twice its ttl."""
    manager = make(lease_ttl=2.0)
    watcher = make(direct=True)
    with manager.lease() as lease:
        began = time.monotonic()
        while time.monotonic() - began < 4:
            count = proxy.log.count("renew")
            proxy.meet("renew", CUT_AFTER)
            until(lambda: proxy.log.count("renew") >= count + 2)  # noqa: B023 - called at once
            assert key_of(watcher).live == 1
        assert manager._worker.live[lease.id][1] < time.monotonic()
    assert key_of(watcher).live == 0


@pytest.mark.parametrize("verb", ["disable", "enable", "reset"])
def test_what_an_admin_does(proxy: Proxy, make: Callable[..., KeyManager], verb: str) -> None:
    manager = make()
    manager.check()
    if verb == "enable":
        manager.disable("sk-a")
    for lost in ("inspect", "admin"):
        proxy.meet(lost, CUT_AFTER)
    getattr(manager, verb)("sk-a")
    assert proxy.met
    assert key_of(manager).state == ("disabled" if verb == "disable" else "ready")


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_the_answer_never_comes(proxy: Proxy, make: Callable[..., KeyManager], server: Server, colour: str) -> None:
    """A call that gives up because each reply is lost gives back what it was granted, though nobody calls again."""
    watcher = make(direct=True, limits=Limits(concurrency=1, rpm=100, rule="sliding"))
    manager = make(limits=Limits(concurrency=1, rpm=100, rule="sliding"), on_redis_down="raise")
    manager.check()
    proxy.meet("acquire", CUT_AFTER, 5)

    async def main() -> None:
        async with manager.lease():
            pass

    with pytest.raises(BrokerUnavailable):
        manager.lease().__enter__() if colour == "sync" else asyncio.run(main())
    until(lambda: key_of(watcher).live == 0 and not manager._worker.pending, 5)
    assert used(watcher, "rpm") == 0
    assert left_behind(server, manager) == []


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_a_wake_is_lost(proxy: Proxy, server: Server, make: Callable[..., KeyManager], colour: str) -> None:
    """The reply of a BLPOP is lost, with the wake in it: who waits asks, now that its connection is broken."""
    holder = make(direct=True, limits=Limits(concurrency=1))
    waiter = make(limits=Limits(concurrency=1))
    lease = holder.lease()
    lease.__enter__()
    proxy.meet("blpop", CUT_AFTER)
    served: list[float] = []

    def call() -> None:
        with waiter.lease():
            served.append(time.monotonic())

    async def acall() -> None:
        async with waiter.lease():
            served.append(time.monotonic())

    thread = threading.Thread(target=call if colour == "sync" else lambda: asyncio.run(acall()))
    thread.start()
    until(lambda: any(row["cmd"] == "blpop" for row in server.admin.client_list()))
    lease.__exit__(None, None, None)
    freed = time.monotonic()
    thread.join(20)
    assert proxy.met
    assert served[0] - freed < 1.0 < POLL_S
    assert left_behind(server, waiter) == []


@pytest.mark.parametrize(
    ("how", "colour"),
    short(("cut", "sync"), ("refused", "async"), of=product(["cut", "refused"], ["sync", "async"])),
)
def test_no_tight_loop_where_nobody_may_block(
    proxy: Proxy, server: Server, make: Callable[..., KeyManager], how: str, colour: str
) -> None:
    """Each BLPOP fails at once, since something cuts it or its right is missing: it is tried ever less often, and only
    where a wake may have been lost the leader asks."""
    holder = make(direct=True, limits=Limits(concurrency=1))
    waiter = make(limits=Limits(concurrency=1), max_wait=2.0)
    waiter.check()
    if how == "cut":
        proxy.meet("blpop", CUT_BEFORE, 1000)
    else:
        server.admin.acl_setuser("default", commands=["-blpop"], enabled=True)

    async def acall() -> None:
        async with waiter.lease():
            pass

    try:
        with holder.lease(), pytest.raises(Exhausted):
            waiter.lease().__enter__() if colour == "sync" else asyncio.run(acall())
    finally:
        server.admin.acl_setuser("default", commands=["+blpop"], enabled=True)
    assert 3 <= proxy.log.count("blpop") <= 6
    assert proxy.log.count("acquire") <= (7 if how == "cut" else 3)


class Load:
    """Threads and coroutines that lease through one manager, until no key has a request left for this minute."""

    def __init__(self, manager: KeyManager, limits: Limits, hold_s: float) -> None:
        self.manager, self.limits, self.hold_s = manager, limits, hold_s
        self.calls, self.ids, self.live = Counter[str](), Counter[str](), Counter[str]()
        self.over: list[str] = []
        self.stuck = 0
        self._mutex = threading.Lock()

    def begin(self, lease: Any) -> None:
        with self._mutex:
            self.calls[lease.key.name] += 1
            self.ids[lease.id] += 1
            self.live[lease.key.name] += 1
            if self.live[lease.key.name] > (self.limits.concurrency or 0):
                self.over.append(lease.id)

    def end(self, lease: Any) -> None:
        lease.report(tokens=25)
        with self._mutex:
            self.live[lease.key.name] -= 1

    def thread(self) -> None:
        try:
            while True:
                with self.manager.lease(tokens=10) as lease:
                    self.begin(lease)
                    time.sleep(self.hold_s)
                    self.end(lease)
        except Exhausted:
            pass

    async def coroutine(self) -> None:
        try:
            while True:
                async with self.manager.lease(tokens=10) as lease:
                    self.begin(lease)
                    await asyncio.sleep(self.hold_s)
                    self.end(lease)
        except Exhausted:
            pass

    def run(self, seconds: float, threads: int = 8, coroutines: int = 8) -> None:
        async def main() -> None:
            await asyncio.gather(*(self.coroutine() for _ in range(coroutines)))

        all_of_them = [threading.Thread(target=self.thread, daemon=True) for _ in range(threads)]
        all_of_them.append(threading.Thread(target=lambda: asyncio.run(main()), daemon=True))
        for thread in all_of_them:
            thread.start()
        deadline = time.monotonic() + seconds
        for thread in all_of_them:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.stuck = sum(thread.is_alive() for thread in all_of_them)


def storm(seed: int, rpm: int, proxy: Proxy, server: Server, make: Callable[..., KeyManager]) -> None:
    limits = Limits(rpm=rpm, tpm=10**6, concurrency=2, rule="sliding")
    keys = ("sk-a", "sk-b", "sk-c")
    manager = make(limits=limits, keys=keys, max_wait=8.0, on_redis_down="wait")
    watcher = make(limits=limits, keys=keys, direct=True)
    load = Load(manager, limits, hold_s=0.004)
    proxy.gamble(random.Random(seed), before=0.02, after=0.06)
    cutting = threading.Event()

    def cut() -> None:
        chance = random.Random(-seed)
        while not cutting.wait(chance.uniform(0.1, 0.6)):
            proxy.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    began = time.monotonic()
    load.run(seconds=50)
    cutting.set()
    cutter.join()
    assert time.monotonic() - began < 55  # within one window
    proxy.gamble(None)
    assert load.stuck == 0
    assert load.over == []
    assert max(load.ids.values()) == 1, "one lease for two calls"
    until(lambda: not manager._worker.pending and not manager._worker.live, 10)
    assert proxy.cuts > 20
    until(lambda: all(key.live == 0 for key in watcher.status().keys), 5)
    for place, key in enumerate(watcher.status().keys):
        assert used(watcher, "rpm", place) == load.calls[key.name] == rpm
        assert used(watcher, "tpm", place) == 25 * rpm
    assert left_behind(server, watcher) == []


def test_random_cuts(proxy: Proxy, server: Server, make: Callable[..., KeyManager]) -> None:
    storm(1, 60, proxy, server, make)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 12))
def test_random_cuts_for_long(seed: int, proxy: Proxy, server: Server, make: Callable[..., KeyManager]) -> None:
    storm(seed, 500, proxy, server, make)
