"""Waiting, end to end: real managers, threads and event loops, in memory and on a real Redis.

Each story ends with nothing left behind: no lease, no claim, no wake and no blocked client in the store, and nobody in
a line, no listener and no task in the process. What depends on time uses windows of a second.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from typing import Any

import openai
import pytest
import redis
from redis.cluster import RedisCluster
from redis.sentinel import Sentinel

from stable_openai import (
    INJECTED,
    ConfigurationError,
    Exhausted,
    Key,
    KeyManager,
    Limits,
    NoKeys,
    Verdict,
    Waiting,
    stable,
)
from stable_openai._affinity import favourites
from stable_openai._ops import Acquire, Settle
from stable_openai.backends.listener import AsyncListener
from tests.servers import private_cluster, private_sentinel

httpx: Any = import_module(openai.DefaultHttpxClient.__bases__[0].__module__)  # httpx2; httpx under openai 2.x

ONE = Limits(concurrency=1)
SECONDS = Limits(rpm=600, burst_s=1)  # ten at once, and ten a second
SOON = 3.0  # far less than the poll of five seconds, and enough for a machine that is busy
TOMB = 3  # lua/accounts.lua


def until(true: Callable[[], object], within: float = 10.0) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


async def auntil(true: Callable[[], object], within: float = 10.0) -> None:
    """Let the loop turn until something is true."""
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.0005)


def waiting(manager: KeyManager) -> int:
    """The calls that wait in this process."""
    return sum(map(len, tuple(manager._worker.lines.values())))


def joined(manager: KeyManager, count: int) -> None:
    until(lambda: waiting(manager) == count)


async def ajoined(manager: KeyManager, count: int) -> None:
    await auntil(lambda: waiting(manager) == count)


def note(to: list[Any], value: Any) -> Callable[[Any], None]:
    """What a call does with its lease: it notes that its turn came."""
    return lambda lease: to.append(value)


class Noted:
    """A backend that notes what it is asked."""

    def __init__(self, manager: KeyManager) -> None:
        self.backend: Any = manager._backend
        self.local = self.backend.local
        self.ops: list[Any] = []
        self.flying = 0  # of those on an event loop
        manager._backend = self

    def run(self, op: Any) -> Any:
        self.ops.append(op)
        return self.backend.run(op)

    async def arun(self, op: Any) -> Any:
        self.ops.append(op)
        self.flying += 1
        try:
            return await self.backend.arun(op)
        finally:
            self.flying -= 1

    def count(self, kind: type) -> int:
        return sum(isinstance(op, kind) for op in self.ops)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


class Held(Noted):
    """A backend that keeps the replies to acquires back, from when it is told to, until it is told to let them go."""

    def __init__(self, manager: KeyManager) -> None:
        super().__init__(manager)
        self.holding = False
        self.reached, self.go = asyncio.Event(), asyncio.Event()

    async def arun(self, op: Any) -> Any:
        reply = await super().arun(op)
        if self.holding and isinstance(op, Acquire):
            self.reached.set()
            await self.go.wait()
        return reply


# Calls of either colour.


class Threads:
    """Calls, each in a thread of its own."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def lease(self, manager: KeyManager, body: Callable[[Any], Any] | None = None, **options: Any) -> Future[Any]:
        """A call that leases, does something quick with the lease, and ends."""

        def work() -> Any:
            with manager.lease(**options) as lease:
                return body(lease) if body else lease.api_key

        return self.run(work)

    def run(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def target() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def close(self) -> None:
        for thread in self._threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self._threads)


class Coroutines:
    """Calls, each a task of one event loop, which runs in a thread."""

    def __init__(self) -> None:
        self.complaints: list[dict[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: self.complaints.append(context))
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def lease(self, manager: KeyManager, body: Callable[[Any], Any] | None = None, **options: Any) -> Future[Any]:
        async def work() -> Any:
            async with manager.lease(**options) as lease:
                return body(lease) if body else lease.api_key

        return self.run(work)

    def run(self, work: Callable[[], Awaitable[Any]]) -> Future[Any]:
        async def call() -> Any:
            return await work()

        return asyncio.run_coroutine_threadsafe(call(), self.loop)

    def close(self) -> None:
        if self.loop.is_closed():
            return

        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()
        gc.collect()
        assert not self.complaints

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        late = (await asyncio.wait(others, timeout=3))[1] if others else ()
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await self.loop.shutdown_asyncgens()
        assert not late


Crowd = Threads | Coroutines


@pytest.fixture(params=[Threads, Coroutines])
def crowd(request: pytest.FixtureRequest) -> Iterator[Crowd]:
    made: Crowd = request.param()
    yield made
    made.close()


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_not_garbage() -> Iterator[None]:
    """So that collecting garbage, after each test, is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# Managers, and what they leave behind.


@pytest.fixture(params=["memory", "redis"])
def where(request: pytest.FixtureRequest, redis_url: str) -> str | None:
    return redis_url if request.param == "redis" else None


IN_REDIS = pytest.mark.parametrize("where", ["redis"], indirect=True)
IN_MEMORY = pytest.mark.parametrize("where", ["memory"], indirect=True)


class Pool:
    """Managers of one pool: in Redis each is another worker's."""

    _numbers = itertools.count(1)

    def __init__(self, where: str | None) -> None:
        self.where = where
        self.name = f"test-waiting-{next(self._numbers)}"
        self.managers: list[KeyManager] = []
        self.blocked = self.blocked_clients()

    def manager(self, *keys: str | Key, redis: Any = None, **options: Any) -> KeyManager:
        options = {"pool": self.name, "max_wait": 30, "headroom_s": 0, "limits": ONE, **options}
        made = KeyManager(list(keys or ("sk-a",)), redis or self.where, **options)
        self.managers.append(made)
        return made

    def close(self) -> None:
        for manager in self.managers:
            manager.close()

    def blocked_clients(self) -> int:
        if self.where is None:
            return 0
        with redis.Redis.from_url(self.where) as client:
            return int(client.info("clients")["blocked_clients"])

    def left(self, tombstones: bool = False) -> list[str]:
        """What is left behind. `tombstones`: of leases that were settled before they were granted, they may be."""
        found = []
        for manager in self.managers:
            worker = manager._worker
            manager._do(worker.flush())
            lines = tuple(worker.lines.values())
            state = {
                "waiting": waiting(manager),
                "live": worker.live,
                "pending": list(worker.pending),
                "tasks": worker.tasks,
                "listeners": [line.listener for line in lines if line.listener is not None],
                "leaders": [line.leader for line in lines if line.leader is not None],
                "asking": sum(line._asking for line in lines),
                "line": manager.status().line,
                "leases": sum(key.live for key in manager.status().keys),
            }
            found += [f"{name}: {value}" for name, value in state.items() if value]
        if self.where is not None:
            with redis.Redis.from_url(self.where) as client:
                for name in client.scan_iter(f"stable:{{{self.name}}}:class:*"):
                    for field, value in client.hgetall(name).items():
                        if field == b"w":
                            found.append(f"claims: {value!r}")
                        elif field.startswith(b"l:") and not (tombstones and struct.unpack("<d", value[:8])[0] == TOMB):
                            found.append(f"lease: {field!r}")
                found += [f"wakes: {name!r}" for name in client.scan_iter(f"stable:{{{self.name}}}:wakes:*")]
            if self.blocked_clients() != self.blocked:
                found.append("a blocked client")
        return found

    def assert_empty(self, tombstones: bool = False, within: float = 1.5) -> None:
        """Soon, and far sooner than a claim or a lease ends by itself, nothing is left behind."""
        deadline = time.monotonic() + within
        while self.left(tombstones) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self.left(tombstones) == []


@pytest.fixture
def pool(where: str | None) -> Iterator[Pool]:
    made = Pool(where)
    yield made
    made.close()


@contextmanager
def slot_of(manager: KeyManager, **options: Any) -> Iterator[Callable[[], None]]:
    """A lease that the test holds; gives what ends it."""
    with ExitStack() as stack:
        stack.enter_context(manager.lease(**options))
        yield stack.close


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """On a new event loop, on which nothing is complained of."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        return await main()

    result = asyncio.run(watched())
    gc.collect()
    assert not complaints
    return result


# 1, 2, 3: in order, and with few operations.


def test_who_comes_first_is_served_first(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager()
    served: list[int] = []
    calls = []
    with slot_of(manager) as release:
        for number in range(20):
            calls.append(crowd.lease(manager, note(served, number)))
            joined(manager, number + 1)
        assert served == []
        release()
        for call in calls:
            call.result(20)
    assert served == list(range(20))
    pool.assert_empty()


@pytest.mark.parametrize("way", ["a trickle", "at once"])
def test_many_coroutines_ask_as_one(pool: Pool, way: str) -> None:
    """200 through a bucket that holds 20 and refills with 200 a second: hardly more than one ask for each that comes
    free. 200 that wait for a key that is enabled: an ask for each eight."""
    trickles = way == "a trickle"
    manager = pool.manager(limits=Limits(rpm=12_000, burst_s=0.1) if trickles else Limits(), max_wait=100)
    noted = Noted(manager)
    if not trickles:
        manager.disable("sk-a", 60)

    @stable(manager=manager)
    async def ask(number: int, api_key: str = INJECTED) -> int:
        return number

    async def main() -> list[int]:
        everyone = asyncio.gather(*(ask(number) for number in range(200)))
        if not trickles:
            await ajoined(manager, 200)
            await manager.aenable("sk-a")
        return list(await everyone)

    began = time.monotonic()
    assert run(main) == list(range(200))
    assert not trickles or time.monotonic() - began > 0.7, "not over the limit"
    assert noted.count(Settle) == 200
    assert noted.count(Acquire) < (230 if trickles else 60)
    pool.assert_empty()


def test_a_call_that_need_not_wait_is_one_acquire_and_one_settle(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager("sk-a", "sk-b")
    crowd.lease(manager).result(10)  # registers
    noted = Noted(manager)
    for _ in range(3):
        crowd.lease(manager).result(10)
    assert [type(op) for op in noted.ops] == [Acquire, Settle] * 3
    assert all(len(op.asks) == 1 for op in noted.ops if isinstance(op, Acquire))
    pool.assert_empty()


# 4: cancellation.


@pytest.mark.parametrize("who", ["the leader", "a follower", "the last"])
@pytest.mark.parametrize("how", ["wait_for", "cancel"])
def test_one_who_is_cancelled_stops_nobody(pool: Pool, who: str, how: str) -> None:
    manager = pool.manager()
    place = {"the leader": 0, "a follower": 2, "the last": 4}[who]
    served: list[int] = []

    async def call(number: int) -> None:
        async with manager.lease():
            served.append(number)

    async def main() -> None:
        async with manager.lease():
            tasks = []
            for number in range(5):
                limited = how == "wait_for" and number == place
                tasks.append(asyncio.ensure_future(asyncio.wait_for(call(number), 0.15) if limited else call(number)))
                await ajoined(manager, number + 1)
            if how == "cancel":
                tasks[place].cancel()
            await asyncio.wait({tasks[place]})
            with pytest.raises((asyncio.CancelledError, asyncio.TimeoutError)):
                tasks[place].result()
            assert waiting(manager) == 4
        tasks.pop(place)
        await asyncio.wait_for(asyncio.gather(*tasks), SOON)
        assert served == [number for number in range(5) if number != place]
        async with manager.lease(max_wait=0):
            pass

    run(main)
    pool.assert_empty()


def test_all_are_cancelled_at_once(pool: Pool) -> None:
    manager = pool.manager()

    async def main() -> None:
        async with manager.lease():
            tasks = [asyncio.ensure_future(manager.lease().__aenter__()) for _ in range(50)]
            everyone = asyncio.gather(*tasks)
            await ajoined(manager, 50)
            everyone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await everyone  # until the first has ended
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)
            assert waiting(manager) == 0
            assert (await manager.astatus()).line == ()
        async with manager.lease(max_wait=0):
            pass

    run(main)
    pool.assert_empty()


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_cancelled_at_any_moment(pool: Pool, seed: int, slots: int) -> None:
    """While slots are freed and taken: never more leases than slots, and whoever is not cancelled is served."""
    manager = pool.manager(limits=Limits(concurrency=slots), lease_ttl=30)
    dice = random.Random(seed)
    holding, most, served = 0, 0, set()

    async def call(number: int) -> None:
        nonlocal holding, most
        async with manager.lease():
            holding += 1
            most = max(most, holding)
            try:
                for _ in range(dice.randrange(3)):
                    await asyncio.sleep(0)
                served.add(number)
            finally:
                holding -= 1

    async def cut(task: asyncio.Task[None]) -> None:
        for _ in range(dice.randrange(60)):
            await asyncio.sleep(dice.choice((0, 0, 0, 0.0005)))
        task.cancel()

    async def main() -> None:
        tasks = [asyncio.ensure_future(call(number)) for number in range(50)]
        doomed = [number for number in range(50) if dice.random() < 0.7]
        await asyncio.gather(*(cut(tasks[number]) for number in doomed))
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 15)
        for number, task in enumerate(tasks):
            assert task.cancelled() or task.exception() is None
            assert number in served or number in doomed
        assert most <= slots
        while manager._worker.tasks:
            await asyncio.gather(*manager._worker.tasks)
        async with manager.lease(max_wait=0):
            pass

    run(main)
    pool.assert_empty(tombstones=True)


@IN_REDIS
def test_a_lease_that_was_handed_on_is_not_taken_back(pool: Pool) -> None:
    """A follower is cancelled while the leader asks for it too; its grant goes to the next, who keeps it."""
    manager = pool.manager(limits=Limits(concurrency=2))

    async def main() -> None:
        held = Held(manager)
        async with ExitStackOf(manager, 2) as holders:
            waiters = []
            for number in range(3):
                waiters.append(asyncio.ensure_future(manager.lease().__aenter__()))
                await ajoined(manager, number + 1)
            held.holding = True
            await holders.release()
            await asyncio.wait_for(held.reached.wait(), SOON)
            waiters[1].cancel()
            await asyncio.wait({waiters[1]})
            held.holding = False
            held.go.set()
            kept = [await asyncio.wait_for(waiters[place], SOON) for place in (0, 2)]
            await manager._ado(manager._worker.flush())
            assert (await manager.astatus()).keys[0].live == 2
            with pytest.raises(Exhausted):
                await manager.lease(max_wait=0).__aenter__()
            for lease in kept:
                await lease.__aexit__(None, None, None)

    run(main)
    pool.assert_empty(tombstones=True)


class ExitStackOf:
    """So many leases of a manager, on an event loop."""

    def __init__(self, manager: KeyManager, count: int) -> None:
        self.leases = [manager.lease() for _ in range(count)]

    async def __aenter__(self) -> ExitStackOf:
        for lease in self.leases:
            await lease.__aenter__()
        return self

    async def release(self) -> None:
        while self.leases:
            await self.leases.pop().__aexit__(None, None, None)

    async def __aexit__(self, *_: object) -> None:
        await self.release()


@IN_REDIS
@pytest.mark.parametrize("served", [True, False])
def test_cancelled_while_it_ends_its_listening(pool: Pool, monkeypatch: pytest.MonkeyPatch, served: bool) -> None:
    """The last of the line has its lease, or has been cancelled once, and is cancelled while the pop is ended."""
    manager = pool.manager()
    stop = AsyncListener.stop
    reached, go = asyncio.Event(), asyncio.Event()

    async def slow(self: AsyncListener) -> int | None:
        reached.set()
        await go.wait()
        return await stop(self)

    async def main() -> None:
        async with manager.lease() as mine:
            waiter = asyncio.ensure_future(manager.lease().__aenter__())
            await auntil(lambda: pool.blocked_clients() == pool.blocked + 1)
            monkeypatch.setattr(AsyncListener, "stop", slow)
            if served:
                await mine.__aexit__(None, None, None)
                mine._granted = None
            else:
                waiter.cancel()
            await asyncio.wait_for(reached.wait(), SOON)
            waiter.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            go.set()
            await asyncio.wait({waiter})
            assert waiter.cancelled()
            monkeypatch.setattr(AsyncListener, "stop", stop)
            if served:
                await mine.__aenter__()  # the slot is free again
        while manager._worker.tasks:
            await asyncio.gather(*manager._worker.tasks)

    run(main)
    pool.assert_empty()


@IN_REDIS
def test_the_loop_ends_while_the_last_ends_its_listening(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its lease already, and never gets to use it."""
    manager = pool.manager()
    stop = AsyncListener.stop
    reached = asyncio.Event()

    async def slow(self: AsyncListener) -> int | None:
        reached.set()
        await asyncio.sleep(0.05)
        return await stop(self)

    async def main() -> None:
        async with manager.lease():
            waiter = asyncio.ensure_future(manager.lease().__aenter__())
            await auntil(lambda: pool.blocked_clients() == pool.blocked + 1)
            monkeypatch.setattr(AsyncListener, "stop", slow)
        await asyncio.wait_for(reached.wait(), SOON)
        assert not waiter.done()

    run(main)
    pool.assert_empty(tombstones=True)


# 5, 6: time-outs.


def test_a_wait_that_has_no_time_ends_at_its_deadline(pool: Pool, crowd: Crowd) -> None:
    """The leader gives up first, then a follower; one more is served."""
    manager = pool.manager(Key("sk-a", name="the key"))
    with slot_of(manager) as release:
        began = time.monotonic()
        calls = []
        for number, max_wait in enumerate((0.2, 0.3, 30)):
            calls.append(crowd.lease(manager, max_wait=max_wait))
            joined(manager, number + 1)
        for call, max_wait in zip(calls[:2], (0.2, 0.3)):
            with pytest.raises(Exhausted) as raised:
                call.result(5)
            assert max_wait - 0.001 <= time.monotonic() - began < max_wait + 1
            assert not isinstance(raised.value, NoKeys)
            assert (raised.value.reason, raised.value.retry_after, raised.value.key) == ("concurrency", None, "the key")
        assert waiting(manager) == 1
        release()
        assert calls[2].result(SOON) == "sk-a"
    pool.assert_empty()


def test_all_time_out_together(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager()
    with slot_of(manager):
        calls = [crowd.lease(manager, max_wait=0.3) for _ in range(20)]
        for call in calls:
            with pytest.raises(Exhausted, match="concurrency"):
                call.result(5)
        assert manager.status().line == ()
    pool.assert_empty()


def test_who_cannot_be_served_in_time_fails_at_once(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager(Key("sk-a", name="the key"), limits=Limits(rpm=6, burst_s=1))
    crowd.lease(manager).result(5)
    began = time.monotonic()
    with pytest.raises(Exhausted) as raised:
        crowd.lease(manager, max_wait=5).result(10)
    assert time.monotonic() - began < 2
    assert (raised.value.reason, raised.value.key) == ("rpm", "the key")
    assert raised.value.retry_after == pytest.approx(10, abs=2)
    pool.assert_empty()


def test_of_many_the_late_ones_fail_early(pool: Pool, crowd: Crowd) -> None:
    """Ten at once, twenty a second, and forty calls that would wait for half a second."""
    manager = pool.manager(Key("sk-a", name="the key"), limits=Limits(rpm=1200, burst_s=0.5))
    began = time.monotonic()
    calls = [crowd.lease(manager, lambda lease: time.monotonic() - began, max_wait=0.5) for _ in range(40)]
    failed: list[tuple[float, Any]] = []
    for call in calls:
        call.add_done_callback(
            lambda call: failed.append((time.monotonic() - began, call.exception())) if call.exception() else None
        )
    served = []
    for call in calls:
        with suppress(Exhausted):
            served.append(call.result(5))
    assert 17 <= len(served) <= 22
    until(lambda: len(failed) == 40 - len(served))
    assert max(served) < 0.7
    # One or two are told that they come just in time, and then do not.
    early = sorted(failed, key=lambda each: each[0])[:-3]
    assert max(at for at, _ in early) < 0.3
    for _, error in early:
        assert (error.reason, error.key) == ("rpm", "the key")
        assert error.retry_after is not None
        assert 0.35 < error.retry_after < 1.7
    pool.assert_empty()


# 7: what wakes a waiter of another worker.


def awaited(crowd: Crowd, manager: KeyManager, **options: Any) -> Future[Any]:
    """A call that waits, and whose claim the store knows."""
    call = crowd.lease(manager, **options)
    until(lambda: waiting(manager) == 1 and manager.status().line)
    if not manager._backend.local:
        until(lambda: all(line.listener for line in manager._worker.lines.values() if len(line)))
    return call


@IN_REDIS
def test_a_freed_slot_wakes_another_worker(pool: Pool, crowd: Crowd) -> None:
    one, other = pool.manager(), pool.manager()
    with slot_of(one) as release:
        call = awaited(crowd, other)
        release()
        assert call.result(SOON) == "sk-a"
    pool.assert_empty()


@IN_REDIS
def test_two_slots_that_are_freed_at_once_wake_two_workers(pool: Pool, crowd: Crowd) -> None:
    """Each waits for one; the second slot comes free while the first is still on its way to somebody."""
    one, *others = (pool.manager(limits=Limits(concurrency=2)) for _ in range(3))
    held = [one.lease().__enter__() for _ in range(2)]
    calls = [awaited(crowd, other) for other in others]
    until(lambda: pool.blocked_clients() == pool.blocked + 2)
    for lease in held:
        one._worker.abandon(lease._request, lease._held, "neutral")
    one._do(one._worker.flush())  # both are settled in one step
    assert [call.result(SOON) for call in calls] == ["sk-a"] * 2
    pool.assert_empty()


@IN_REDIS
def test_a_wake_that_one_passes_on_comes_to_another_who_is_away(
    pool: Pool, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot is the urgent call's. Its worker does not listen just now: the idle one gets the wake, cannot use it,
    passes it on, and must not take it again itself."""
    one, idle, urgent = pool.manager(), pool.manager(), pool.manager()
    wait = AsyncListener.wait
    away, back = threading.Event(), asyncio.Event()

    async def late(self: AsyncListener, seconds: float) -> int | None:
        away.set()
        await back.wait()
        return await wait(self, seconds)

    others = Coroutines()
    noted = Noted(idle)
    with slot_of(one) as release:
        low = crowd.lease(idle, priority=3)
        until(lambda: pool.blocked_clients() == pool.blocked + 1)
        if isinstance(crowd, Coroutines):
            monkeypatch.setattr(AsyncListener, "wait", for_the_loop(others.loop, late, wait))
        else:
            monkeypatch.setattr(AsyncListener, "wait", late)
        high = others.lease(urgent, priority=0)
        until(away.is_set)
        asked = noted.count(Acquire)
        release()
        until(lambda: noted.count(Acquire) > asked)
        others.loop.call_soon_threadsafe(back.set)
        assert high.result(SOON) == "sk-a"
        assert low.result(SOON) == "sk-a"
    others.close()
    pool.assert_empty()


def for_the_loop(loop: asyncio.AbstractEventLoop, one: Callable[..., Any], other: Callable[..., Any]) -> Any:
    """A method that is `one` on a loop, and `other` on others."""

    async def chosen(*args: Any) -> Any:
        return await (one if asyncio.get_running_loop() is loop else other)(*args)

    return chosen


@IN_REDIS
@pytest.mark.parametrize("cause", ["ConnectError", "PoolTimeout"])
def test_a_request_that_was_never_sent_wakes_another_worker(pool: Pool, crowd: Crowd, cause: str) -> None:
    limits = Limits(rpm=1)
    one, other = pool.manager(limits=limits), pool.manager(limits=limits, max_wait=100)
    with one.lease() as lease:
        call = awaited(crowd, other)
        lease.report(error=getattr(httpx, cause)("x", request=httpx.Request("POST", "http://127.0.0.1")))
    assert call.result(SOON) == "sk-a"
    pool.assert_empty()


@IN_REDIS
@pytest.mark.parametrize("fresh", [False, True])
def test_an_enabled_key_wakes_another_worker(pool: Pool, crowd: Crowd, fresh: bool) -> None:
    """`fresh`: it is enabled from a process that has called nothing, such as a command line's."""
    one, other = pool.manager(), pool.manager(max_wait=8)
    if not fresh:
        with one.lease(model="gpt"):
            pass
    other.disable("sk-a", 7)
    call = awaited(crowd, other, model="gpt")
    one.enable("sk-a")
    assert call.result(SOON) == "sk-a"
    pool.assert_empty()


@IN_REDIS
def test_an_enabled_key_wakes_who_waits_for_a_slot_of_another_key(pool: Pool, crowd: Crowd) -> None:
    one, other = pool.manager("sk-a", "sk-b"), pool.manager("sk-a", "sk-b")
    one.disable("sk-b")
    with slot_of(one):
        call = awaited(crowd, other)
        one.enable("sk-b")
        assert call.result(SOON) == "sk-b"
    pool.assert_empty()


@IN_REDIS
def test_a_key_whose_cooldown_is_reset_wakes_another_worker(pool: Pool, crowd: Crowd) -> None:
    one, other = pool.manager(), pool.manager(max_wait=100)
    with one.lease() as lease:
        lease.report(status=429, headers={"retry-after": "60"})
    call = awaited(crowd, other)
    assert other.status().line[0].reasons == ("cooldown",)
    one.reset("sk-a")
    assert call.result(SOON) == "sk-a"
    pool.assert_empty()


@IN_REDIS
def test_a_probe_that_succeeds_wakes_all_who_wait(pool: Pool, crowd: Crowd) -> None:
    """The breaker is open, one probe is on its way, and the others wait for what comes of it."""
    limits = Limits(rpm=1000)
    one, other = pool.manager(limits=limits), pool.manager(limits=limits)
    failure = httpx.ReadError("x", request=httpx.Request("POST", "http://127.0.0.1"))
    for _ in range(5):
        with one.lease() as lease:
            lease.report(error=failure)
    assert one.status().breaker == "connection"
    with one.lease():  # after the breaker's second: the probe
        call = awaited(crowd, other)
    assert call.result(SOON) == "sk-a"
    pool.assert_empty()


def test_a_key_that_is_added_serves_who_waits(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager("sk-a")
    with slot_of(manager):
        calls = [awaited(crowd, manager)]
        calls.append(crowd.lease(manager))
        joined(manager, 2)
        manager.add("sk-b")
        assert [call.result(SOON) for call in calls] == ["sk-b", "sk-b"]
    pool.assert_empty()


@pytest.fixture(scope="module", params=["cluster", "sentinel"])
def topology(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "cluster":
        with private_cluster() as port:
            client = RedisCluster(host="127.0.0.1", port=port)
            yield client
            client.close()
    else:
        with private_sentinel() as port:
            sentinel: Any = Sentinel([("127.0.0.1", port)])  # type: ignore[no-untyped-call]
            with sentinel.master_for("mymaster") as client:
                yield client
            for one in sentinel.sentinels:
                one.close()


@IN_MEMORY
def test_a_freed_slot_wakes_another_worker_on_other_kinds_of_redis(topology: Any, pool: Pool, crowd: Crowd) -> None:
    one, other = pool.manager(redis=topology), pool.manager(redis=topology)
    for _ in range(2):
        with slot_of(one) as release:
            call = awaited(crowd, other)
            release()
            assert call.result(SOON) == "sk-a"
    pool.assert_empty()


# 8: priority.


def test_the_urgent_come_first(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager()
    served: list[tuple[int, int]] = []
    calling = [(priority, number) for number, priority in enumerate((3, 2, 1, 0, 3, 2, 1, 0, 1, 0))]
    with slot_of(manager) as release:
        calls = []
        for each in calling:
            calls.append(crowd.lease(manager, note(served, each), priority=each[0]))
            joined(manager, len(calls))
        (line,) = (line for line in manager._worker.lines.values() if len(line))
        until(lambda: line._best_asked[0] == 0)  # before the most urgent came it asked for others, maybe until now
        release()
        for call in calls:
            call.result(20)
    assert served == sorted(calling)
    pool.assert_empty()


@IN_REDIS
@pytest.mark.parametrize("limits", [ONE, Limits(rpm=6000, burst_s=0.05)], ids=["slot", "bucket"])
def test_the_urgent_of_one_worker_pass_the_idle_of_another(pool: Pool, crowd: Crowd, limits: Limits) -> None:
    idle, urgent = pool.manager(limits=limits), pool.manager(limits=limits)
    served: list[str] = []
    with slot_of(idle):
        low = [crowd.lease(idle, note(served, "low"), priority=3) for _ in range(100)]
        until(lambda: waiting(idle) + len(served) == 100)
        already = len(served)
        high = [crowd.lease(urgent, note(served, "high"), priority=0) for _ in range(10)]
        if limits is ONE:
            joined(urgent, 10)
    for call in high:
        call.result(20)
    before = len([name for name in served[already:] if name == "low"])
    for call in low:
        call.result(20)
    assert before < 20
    pool.assert_empty()


def test_an_idle_call_is_served_in_bounded_time(pool: Pool, crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Urgent ones keep coming, more than can be served; it rises one band each 50 ms (30 s in earnest)."""
    monkeypatch.setattr("stable_openai._line.RISE_MS", 50)
    manager = pool.manager(limits=Limits(rpm=6000, burst_s=0.01))
    done = threading.Event()

    def again(_: object = None) -> None:
        if not done.is_set():
            crowd.lease(manager, priority=0).add_done_callback(again)

    try:
        for _ in range(8):
            again()
        until(lambda: waiting(manager) >= 4)
        crowd.lease(manager, priority=3).result(SOON)
    finally:
        done.set()
    joined(manager, 0)
    pool.assert_empty()


# 9, 10: affinity and weights.


def test_the_same_value_has_the_same_key(pool: Pool) -> None:
    manager = pool.manager(*(f"sk-{number}" for number in range(4)), limits=Limits())

    def key_for(value: object) -> str:
        with manager.lease(affinity=value) as lease:
            return lease.api_key

    for value in ("ann", b"ann", 17, 1.5, uuid.UUID(int=5)):
        first = key_for(value)
        assert {key_for(value) for _ in range(8)} == {first}
        manager.disable(first)
        second = key_for(value)
        assert second != first
        assert {key_for(value) for _ in range(4)} == {second}
        manager.enable(first)
        assert key_for(value) == first
    assert len({key_for(f"user {number}") for number in range(40)}) == 4
    assert len({key_for(None) for _ in range(8)}) > 1, "no affinity: the keys take turns"
    for wrong in ([1], {"a": 1}, object(), ("a",)):
        with pytest.raises(ConfigurationError, match="affinity"):
            key_for(wrong)
    pool.assert_empty()


def test_a_key_that_is_added_takes_its_share_and_moves_no_other(pool: Pool) -> None:
    manager = pool.manager(*(f"sk-{number}" for number in range(4)))
    values = [f"user {number}" for number in range(1000)]
    before = {value: favourites(value, manager._worker.registration("-")) for value in values}
    assert all(len(set(accounts)) == 3 for accounts in before.values())
    assert min(Counter(accounts[0] for accounts in before.values()).values()) > 200
    fifth = Key("sk-4")
    manager.add(fifth)
    after = {value: favourites(value, manager._worker.registration("-")) for value in values}
    moved = [value for value in values if after[value][0] != before[value][0]]
    assert 150 < len(moved) < 250
    assert {after[value][0] for value in moved} == {fifth.account}
    manager.remove(fifth)
    assert {value: favourites(value, manager._worker.registration("-")) for value in values} == before


def test_affinity_of_a_decorated_function(pool: Pool) -> None:
    manager = pool.manager(*(f"sk-{number}" for number in range(4)), limits=Limits())

    @stable(manager=manager, affinity="user")
    def by_name(question: str, user: str | None = None, api_key: str = INJECTED) -> str:
        return api_key

    @stable(manager=manager, affinity=lambda question, user=None: user)
    def by_function(question: str, user: str | None = None, api_key: str = INJECTED) -> str:
        return api_key

    for ask in (by_name, by_function):
        for user in ("ann", "bob", "eve"):
            wanted = manager._worker.known
            account = favourites(user, manager._worker.registration("-"))[0]
            secret = next(key.secret.reveal() for key in wanted.values() if key.account == account)
            assert {ask("what?", user), ask("why?", user=user)} == {secret}
        assert len({ask("what?") for _ in range(8)}) > 1, "no affinity: the keys take turns"
    with pytest.raises(ConfigurationError, match=r"affinity.*'users'"):
        stable(manager=manager, affinity="users")(lambda user, api_key: user)

    @stable(manager=manager, affinity="user")
    def wrong(user: object, api_key: str = INJECTED) -> None: ...

    with pytest.raises(ConfigurationError, match="affinity"):
        wrong([1])


@IN_REDIS
def test_an_affinity_value_does_not_leave_the_process(
    pool: Pool, crowd: Crowd, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    value = "very-private-value"
    manager = pool.manager("sk-a", "sk-b")
    with slot_of(manager, affinity=value), slot_of(manager, affinity=value) as release:
        call = awaited(crowd, manager, affinity=value)
        seen = [caplog.text]
        with redis.Redis.from_url(pool.where or "") as client:
            for name in client.scan_iter():
                seen += [str(name), str(client.dump(name))]
                if client.type(name) == b"hash":
                    seen.append(str(client.hgetall(name)))
        assert len(seen) > 7
        assert not [text for text in seen if value in text]
        release()
        call.result(SOON)


def test_a_key_of_three_times_the_weight_is_chosen_three_times_as_often(pool: Pool) -> None:
    manager = pool.manager(Key("sk-a", weight=3), Key("sk-b"), limits=Limits())
    chosen: Counter[str] = Counter()
    for _ in range(40):
        with manager.lease() as lease:
            chosen[lease.api_key] += 1
    assert chosen == {"sk-a": 30, "sk-b": 10}


# 11: large requests.


def test_a_large_request_is_served_while_small_ones_keep_coming(
    pool: Pool, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stable_openai._line.LARGE_AFTER_MS", 200)
    manager = pool.manager(limits=Limits(tpm=240_000, burst_s=0.5))
    done = threading.Event()
    small: list[float] = []

    def again(_: object = None) -> None:
        small.append(time.monotonic())
        if not done.is_set():
            crowd.lease(manager, tokens=100).add_done_callback(again)

    try:
        for _ in range(20):
            again()
        until(lambda: waiting(manager) >= 5)
        began = time.monotonic()
        assert crowd.lease(manager, tokens=1900).result(5) == "sk-a"
        served = time.monotonic()
        assert len([at for at in small if began < at < served]) > 2, "the small ones go on meanwhile"
        until(lambda: len([at for at in small if at > served]) > 5)
    finally:
        done.set()
    joined(manager, 0)
    pool.assert_empty()


# 12, 14: other processes.

FORK = """
import os, sys, threading
from stable_openai import KeyManager, Limits

def until(true):
    import time
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)

manager = KeyManager(["sk-a"], {url!r}, pool={pool!r}, limits=Limits(concurrency=1), max_wait=30)
served = []

def wait(number):
    with manager.lease():
        served.append(number)

def lines(): return list(manager._worker.lines.values())

held = manager.lease()
held.__enter__()
threads = [threading.Thread(target=wait, args=(number,)) for number in range(5)]
for thread in threads:
    thread.start()
until(lambda: sum(map(len, lines())) == 5 and lines()[0].listener is not None and lines()[0].listener._popping)
parent = manager._worker.id
child = os.fork()
if child == 0:
    try:
        worker = manager._worker
        assert worker.id != parent and not worker.lines and not worker.live and not worker.pending
        import gc; gc.collect()
        with manager.lease() as lease:  # the parent's waiters come before it, or after it: it takes its turn
            assert lease.id.startswith(worker.id)
            assert sum(map(len, lines())) == 0
        assert not worker.live
        manager.close()
        os._exit(0)
    except BaseException:
        import traceback; traceback.print_exc()
        os._exit(1)
until(lambda: any(line.workers == 2 for line in manager.status().line))
listener = lines()[0].listener
assert not listener.broken
held.__exit__(None, None, None)
for thread in threads:
    thread.join(10)
    assert not thread.is_alive()
assert sorted(served) == [0, 1, 2, 3, 4], served
assert not listener.broken, "the parent's listener was not disturbed"
_, status = os.waitpid(child, 0)
assert [key.live for key in manager.status().keys] == [0]
manager.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@IN_REDIS
def test_a_fork_while_threads_wait(pool: Pool) -> None:
    program = FORK.format(url=pool.where, pool=pool.name)
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
    pool.manager()
    pool.assert_empty()


LEADER = """
import threading
from stable_openai import KeyManager, Limits

manager = KeyManager(["sk-a", "sk-b"], {url!r}, pool={pool!r}, limits=Limits(concurrency=1), max_wait=60, lease_ttl=2)
held = manager.lease()
held.__enter__()

def wait():
    with manager.lease():
        pass

for _ in range(10):
    threading.Thread(target=wait, daemon=True).start()
while sum(map(len, list(manager._worker.lines.values()))) < 10:
    pass
print("ready", flush=True)
threading.Event().wait()
"""


@IN_REDIS
def test_a_leader_that_is_killed_holds_nobody_up(pool: Pool) -> None:
    """One of two slots is a killed process's, the other another worker's; ten threads of the killed one waited."""
    manager = pool.manager("sk-a", "sk-b", lease_ttl=2)
    crowd = Threads()
    mine = manager.lease()
    mine.__enter__()
    process = subprocess.Popen(
        [sys.executable, "-c", LEADER.format(url=pool.where, pool=pool.name)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        until(lambda: pool.blocked_clients() == pool.blocked + 1)
        until(lambda: manager.status().line and manager.status().line[0].workers == 1)
        call = crowd.lease(manager, lambda lease: lease.id)
        until(lambda: manager.status().line[0].workers == 2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: pool.blocked_clients() <= pool.blocked + 1, within=SOON)
        mine.__exit__(None, None, None)
        call.result(4)
        until(lambda: not manager.status().line, within=8)
        until(lambda: sum(key.live for key in manager.status().keys) == 0, within=5)
        assert pool.blocked_clients() == pool.blocked
        with manager.lease(max_wait=0), manager.lease(max_wait=0):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
        crowd.close()


# 13: everybody at once.


def test_threads_and_two_event_loops_share_a_manager(pool: Pool) -> None:
    manager = pool.manager(limits=Limits(concurrency=2))
    crowds: list[Crowd] = [Threads(), Coroutines(), Coroutines()]
    mutex = threading.Lock()
    holding, most = 0, 0

    def body(lease: Any) -> str:
        nonlocal holding, most
        with mutex:
            holding += 1
            most = max(most, holding)
        with mutex:
            holding -= 1
        return str(lease.api_key)

    with slot_of(manager), slot_of(manager):
        calls = [one.lease(manager, body) for _ in range(30) for one in crowds]
        joined(manager, 90)
        began = time.monotonic()
    assert [call.result(20) for call in calls] == ["sk-a"] * 90
    assert time.monotonic() - began < SOON, "no slot lies idle while somebody waits"
    assert most <= 2
    for one in crowds:
        one.close()
    pool.assert_empty()


# 15: event loops that end.


def test_a_loop_ends_by_an_exception_while_calls_wait(
    pool: Pool, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    manager = pool.manager()
    threads = Threads()

    async def main() -> None:
        tasks = [asyncio.ensure_future(manager.lease().__aenter__()) for _ in range(20)]
        await ajoined(manager, 21)
        assert tasks
        raise KeyError("mine")

    with slot_of(manager) as release:
        other = threads.lease(manager)
        joined(manager, 1)
        with pytest.raises(KeyError, match="mine"):
            asyncio.run(main())
        gc.collect()
        assert waiting(manager) == 1
        release()
        assert other.result(SOON) == "sk-a"
    threads.close()
    assert capfd.readouterr().err == ""
    assert not [record for record in caplog.records if record.name == "asyncio"]
    pool.assert_empty(tombstones=True)


# Python itself says of a task that goes with its loop that it was pending, and of streams that they were open.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning")
def test_a_loop_is_closed_by_hand_while_calls_wait(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    manager = pool.manager()
    noted = Noted(manager)
    threads = Threads()

    async def main() -> list[Any]:
        tasks = [asyncio.ensure_future(manager.lease().__aenter__()) for _ in range(20)]
        await ajoined(manager, 21)
        quiet = 0
        while quiet < 20:  # nothing is on its way: redis-py cannot be left in the middle of a command
            await asyncio.sleep(0.001)
            quiet = 0 if noted.flying or pool.blocked_clients() < pool.blocked + 2 * bool(pool.where) else quiet + 1
        return tasks

    with slot_of(manager) as release:
        other = threads.lease(manager)
        joined(manager, 1)
        loop = asyncio.new_event_loop()
        tasks = loop.run_until_complete(main())
        loop.close()
        release()
        assert other.result(SOON) == "sk-a", "those who are left go on"
    run(lambda: served(manager, 5))  # on another loop, whose line finds that the first is closed
    tasks.clear()
    gc.collect()
    said = {record.getMessage().split("\n")[0] for record in caplog.records if record.name == "asyncio"}
    assert said == {"Task was destroyed but it is pending!"}
    assert waiting(manager) == 0
    until(lambda: pool.blocked_clients() == pool.blocked)
    threads.close()


async def served(manager: KeyManager, count: int) -> None:
    async def call() -> None:
        async with manager.lease():
            pass

    await asyncio.gather(*(call() for _ in range(count)))


# 16: what is said of long waits.


def test_long_waits_are_reported(
    pool: Pool, crowd: Crowd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stable_openai._line.REPORT_AFTER_S", 0.1)
    monkeypatch.setattr("stable_openai._line.REPORT_MOST_S", 0.3)
    seen: list[tuple[float, Waiting]] = []

    def hook(waiting: Waiting) -> None:
        seen.append((time.monotonic(), waiting))
        raise RuntimeError("in the hook")

    manager = pool.manager(Key("sk-a", name="the key"), on_wait=hook)
    with slot_of(manager) as release:
        began = time.monotonic()
        calls = [crowd.lease(manager, priority=priority) for priority in (1, 1, 3)]
        until(lambda: len(seen) == 4)
        release()
        for call in calls:
            assert call.result(SOON) == "sk-a"
    times = [began, *(at for at, _ in seen)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    for gap, expected in zip(gaps, (0.1, 0.2, 0.3, 0.3)):
        assert expected - 0.02 <= gap < expected + 0.5
    for _, waiting in seen:
        assert (waiting.pool, waiting.model_class, waiting.calls) == (pool.name, "-", 3)
        assert (waiting.reason, waiting.key, waiting.next_s) == ("concurrency", "the key", None)
    assert seen[3][1].longest_s > seen[0][1].longest_s >= 0.1
    said = [record for record in caplog.records if record.name == "stable_openai.waiting"]
    assert [record.getMessage().split()[0] for record in said][:2] == ["wait.long", "wait.hook_failed"]
    assert said[0].levelno == logging.WARNING
    assert "calls=3" in said[0].getMessage()
    assert "key=the key" in said[0].getMessage()
    pool.assert_empty()


def test_a_report_says_when_the_next_is_served(pool: Pool, crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stable_openai._line.REPORT_AFTER_S", 0.1)
    seen: list[Waiting] = []
    manager = pool.manager(limits=Limits(rpm=120, burst_s=0.5), on_wait=seen.append)
    crowd.lease(manager).result(5)
    crowd.lease(manager).result(5)
    assert seen
    assert seen[0].reason == "rpm"
    assert seen[0].next_s == pytest.approx(0.4, abs=0.2)
    pool.assert_empty()


def test_a_short_wait_is_not_reported(pool: Pool, crowd: Crowd, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Waiting] = []
    manager = pool.manager(on_wait=seen.append)
    with slot_of(manager) as release:
        call = awaited(crowd, manager)
        release()
        call.result(SOON)
    assert (seen, [record for record in caplog.records if record.name == "stable_openai.waiting"]) == ([], [])


def test_the_status_of_the_line(pool: Pool, crowd: Crowd) -> None:
    """As it is told to the store: at first, when the urgent come, and when it has doubled."""
    manager = pool.manager()
    assert manager.status().line == ()
    with slot_of(manager) as release:
        calls = []
        for priority in (3, 1, 1, 0):
            calls.append(crowd.lease(manager, priority=priority))
            joined(manager, len(calls))
        until(lambda: manager.status().line[0].calls == 4)
        [line] = manager.status().line
        assert (line.model_class, line.by_priority, line.workers, line.here) == ("-", (1, 2, 0, 1), 1, 4)
        assert line.reasons == ("concurrency",)
        assert 0 < line.next_s < 6
        if pool.where:
            [seen] = pool.manager().status().line
            assert (seen.calls, seen.workers, seen.here) == (4, 1, 0)
        release()
        for call in calls:
            call.result(SOON)
    assert manager.status().line == ()
    pool.assert_empty()


@IN_REDIS
def test_a_shell_sees_the_line_of_a_class_that_only_others_have_used(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager(limits=Limits(concurrency=1, rpm=60))
    shell = KeyManager(["sk-a"], pool.where, pool=pool.name)
    with manager.lease(model="gpt-4o"):
        call = crowd.lease(manager, model="gpt-4o")
        until(lambda: shell.status().line)
        status = shell.status()
        assert [(line.model_class, line.calls, line.here) for line in status.line] == [("gpt-4o", 1, 0)]
        (key,) = status.keys
        assert (key.live, [(row.model_class, row.limit, row.of) for row in key.meters]) == (1, [("gpt-4o", "rpm", 60)])
    call.result(SOON)
    shell.close()
    pool.assert_empty()


# 17: no wait, and another attempt.


def test_who_will_not_wait_leaves_nothing_behind(pool: Pool, crowd: Crowd) -> None:
    """Nobody else waits: the refused call counts no longer, and the slot is anybody's."""
    manager = pool.manager()
    other = pool.manager() if pool.where else manager
    with slot_of(manager) as release:
        with pytest.raises(Exhausted) as raised:
            crowd.lease(other, max_wait=0).result(5)
        assert (raised.value.reason, raised.value.retry_after) == ("concurrency", None)
        assert manager.status().line == ()
        release()
        with manager.lease(max_wait=0):
            pass
    pool.assert_empty()


def test_who_will_not_wait_takes_nobodys_place(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager()
    with slot_of(manager) as release:
        call = awaited(crowd, manager)
        began = time.monotonic()
        with pytest.raises(Exhausted):
            crowd.lease(manager, max_wait=0, priority=0).result(5)
        assert time.monotonic() - began < 1
        assert waiting(manager) == 1
        assert manager.status().line[0].calls == 1
        release()
        assert call.result(SOON) == "sk-a"
    pool.assert_empty()


class RateLimited(Exception):
    pass


def move(error: BaseException) -> Verdict | None:
    return Verdict("limited", "move", "test", wait_s=0.0) if isinstance(error, RateLimited) else None


def test_a_call_that_tries_again_keeps_its_place(pool: Pool, crowd: Crowd) -> None:
    """The first in line is refused upstream: it is served again before those that came after it."""
    manager = pool.manager()
    attempts: list[int] = []

    def attempt(number: int) -> int:
        attempts.append(number)
        if attempts == [0]:
            raise RateLimited
        return number

    def first_is_back() -> bool:
        return attempts.count(0) == 2 or waiting(manager) == 4

    @stable(manager=manager, classify=move)
    def ask(number: int, api_key: str = INJECTED) -> int:
        attempt(number)
        if number == 1:
            until(first_is_back)
        return number

    @stable(manager=manager, classify=move)
    async def aask(number: int, api_key: str = INJECTED) -> int:
        attempt(number)
        if number == 1:
            await auntil(first_is_back)
        return number

    def start(number: int) -> Future[Any]:
        if isinstance(crowd, Threads):
            return crowd.run(lambda: ask(number))
        return crowd.run(lambda: aask(number))

    calls = []
    with slot_of(manager) as release:
        for number in range(5):
            calls.append(start(number))
            joined(manager, number + 1)
        release()
        assert [call.result(SOON) for call in calls] == list(range(5))
    # The slot that the first gives back may go to the second before the first has asked again; to no third.
    assert attempts.index(0, 1) <= 2
    assert [number for number in attempts if number] == [1, 2, 3, 4]
    pool.assert_empty()


# 18: the keys change while calls wait.


def test_a_key_is_removed_while_calls_wait(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager("sk-a", "sk-b")
    with ExitStack() as stack:
        held = {lease.api_key: lease for lease in (stack.enter_context(manager.lease()) for _ in range(2))}
        calls = [crowd.lease(manager) for _ in range(5)]
        joined(manager, 5)
        manager.remove("sk-a")
        ring = manager._worker.registration("-").ring
        until(lambda: any(line.to.ring == ring and len(line) == 5 for line in manager._worker.lines.values()))
        held["sk-a"].__exit__(None, None, None)
        time.sleep(0.05)
        assert not any(call.done() for call in calls), "the slot of the removed key serves nobody"
        held["sk-b"].__exit__(None, None, None)
        assert [call.result(SOON) for call in calls] == ["sk-b"] * 5
        stack.pop_all()
    pool.assert_empty()


def test_the_last_key_is_removed_while_calls_wait(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager("sk-a")
    with slot_of(manager):
        calls = [crowd.lease(manager) for _ in range(5)]
        joined(manager, 5)
        manager.remove("sk-a")
        for call in calls:
            with pytest.raises(NoKeys):
                call.result(SOON)
    assert waiting(manager) == 0
    manager.add("sk-a")
    pool.assert_empty()


def test_all_keys_are_disabled_while_calls_wait(pool: Pool, crowd: Crowd) -> None:
    """They are told when the line looks again: after five seconds, or, here, when the last slot is freed."""
    manager = pool.manager(Key("sk-a", name="one"), Key("sk-b", name="two"))
    other = pool.manager("sk-a", "sk-b") if pool.where else manager
    with slot_of(manager) as release, slot_of(manager) as release_too:
        calls = [crowd.lease(manager) for _ in range(10)]
        joined(manager, 10)
        other.disable("sk-a")
        other.disable("sk-b")
        release()
        release_too()
        for call in calls:
            with pytest.raises(NoKeys) as raised:
                call.result(SOON)
            assert raised.value.keys == {"one": "disabled", "two": "disabled"}
    assert waiting(manager) == 0
    pool.assert_empty()


def test_no_key_is_left_and_nobody_waits(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager(Key("sk-a", name="one"))
    manager.disable("sk-a")
    for _ in range(2):
        with pytest.raises(NoKeys) as raised:
            crowd.lease(manager).result(5)
        assert raised.value.keys == {"one": "disabled"}
    assert manager.status().line == ()
    manager.enable("sk-a")
    crowd.lease(manager, max_wait=0).result(5)
    pool.assert_empty()


def test_keys_that_come_back_serve_who_waited(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager(max_wait=100)
    manager.disable("sk-a", 60)
    calls = [crowd.lease(manager) for _ in range(10)]
    joined(manager, 10)
    assert manager.status().line[0].reasons == ("disabled",)
    manager.enable("sk-a")
    assert [call.result(SOON) for call in calls] == ["sk-a"] * 10
    pool.assert_empty()


# 19: the store forgets, and drops everybody.


@IN_REDIS
def test_connections_are_killed_and_scripts_forgotten_while_calls_wait(pool: Pool, crowd: Crowd) -> None:
    one, other = pool.manager(), pool.manager()
    with redis.Redis.from_url(pool.where or "") as client, slot_of(one) as release:
        calls = [crowd.lease(other) for _ in range(20)]
        until(lambda: waiting(other) == 20 and pool.blocked_clients() == pool.blocked + 1)
        client.script_flush()
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)
        release()
        assert [call.result(10) for call in calls] == ["sk-a"] * 20
    pool.assert_empty(tombstones=True)


@IN_REDIS
def test_killed_again_and_again(pool: Pool, crowd: Crowd) -> None:
    manager = pool.manager(limits=SECONDS)
    with redis.Redis.from_url(pool.where or "") as client:
        calls = [crowd.lease(manager) for _ in range(25)]
        for _ in range(10):
            client.script_flush()
            client.client_kill_filter(_type="normal", skipme=True)
            time.sleep(0.05)
        assert [call.result(10) for call in calls] == ["sk-a"] * 25
    pool.assert_empty(tombstones=True)
