"""Interleavings of waiting that once went wrong: each is one story, told in full."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import redis

from stable_openai import Exhausted, Key, KeyManager, Limits, RequestTooLarge, Verdict, stable
from stable_openai._ops import Acquire, Granted, Inspect
from stable_openai.backends.listener import AsyncListener

ONE_SLOT = Limits(concurrency=1)


class Missing(Exception):
    pass


class Broken(Exception):
    pass


@pytest.fixture
def make(redis_url: str) -> Iterator[Callable[..., KeyManager]]:
    """Makes managers of one pool over Redis."""
    managers = []

    def one(pool: str, limits: Limits = ONE_SLOT, keys: Any = ("sk-a",), **options: Any) -> KeyManager:
        managers.append(KeyManager(list(keys), redis_url, pool=f"test-{pool}", limits=limits, **options))
        return managers[-1]

    yield one
    for manager in managers:
        manager.close()


async def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "what was waited for did not come"
        await asyncio.sleep(0.002)


def waiting(manager: KeyManager) -> int:
    return sum(map(len, tuple(manager._worker.lines.values())))


def listening(client: redis.Redis) -> int:
    return sum(row["cmd"] == "blpop" for row in client.client_list())


async def gone(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def slow_down(manager: KeyManager, seconds: Callable[[Any, Any], float], *, before: bool = False) -> None:
    """Operations for which `seconds` says so take longer: before they are sent, or before their reply is there."""
    real = manager._backend.arun

    async def arun(op: Any) -> Any:
        if before:
            await asyncio.sleep(seconds(op, None))
        reply = await real(op)
        if not before:
            await asyncio.sleep(seconds(op, reply))
        return reply

    manager._backend.arun = arun


def grants(op: Any, reply: Any) -> bool:
    return type(op) is Acquire and any(type(answer) is Granted for answer in reply.answers)


def test_a_lease_whose_waiter_left_in_flight_is_one_callers_only(make: Callable[..., KeyManager]) -> None:
    """The leader's ask was granted to one who is cancelled before the reply is there: the next one has that lease, and
    it is not settled under him."""
    manager = make("in-flight")
    at_once = [0, 0]

    async def call(priority: int, seconds: float) -> None:
        async with manager.lease(priority=priority):
            at_once[0] += 1
            at_once[1] = max(at_once)
            await asyncio.sleep(seconds)
            at_once[0] -= 1

    async def main() -> None:
        holder = manager.lease()
        await holder.__aenter__()
        slow_down(manager, lambda op, reply: 0.2 * grants(op, reply))
        leader = asyncio.ensure_future(call(1, 0.05))
        await until(lambda: waiting(manager) == 1)
        victim = asyncio.ensure_future(call(0, 0.05))
        others = [asyncio.ensure_future(call(1, 0.3)) for _ in range(2)]
        await until(lambda: waiting(manager) == 4)
        freed = asyncio.ensure_future(holder.__aexit__(None, None, None))
        await until(lambda: manager.status().keys[0].live == 1 and freed.done())
        victim.cancel()
        await asyncio.gather(leader, *others, freed)
        assert victim.cancelled() or victim.done()

    asyncio.run(main())
    assert at_once[1] == 1
    assert manager.status().keys[0].live == 0


def test_a_model_that_no_key_can_serve_now_holds_up_no_other() -> None:
    manager = KeyManager(
        [Key("sk-a", name="a"), Key("sk-b", name="b")], pool="test-typo", models={"gpt-*": Limits(rpm=4)}
    )

    def classify(error: BaseException) -> Verdict | None:
        return Verdict("model", "move") if isinstance(error, Missing) else None

    @stable(manager=manager, max_wait=100, model="gpt-typo", classify=classify)
    async def misspelt(api_key: str) -> None:
        raise Missing

    @stable(manager=manager, max_wait=3, model="gpt-y")
    async def right(api_key: str) -> str:
        return api_key

    async def main() -> None:
        manager.disable("a")
        with suppress(Exhausted):
            while True:
                async with manager.lease(model="gpt-y", max_wait=0):
                    pass
        manager.enable("a")
        waiter = asyncio.ensure_future(misspelt())  # type: ignore[call-arg]
        await until(lambda: waiting(manager))
        assert await right() == "sk-a"  # type: ignore[call-arg]
        await gone(waiter)

    asyncio.run(main())
    manager.close()


def test_a_large_request_that_leaves_lets_its_account_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stable_openai._line.LARGE_AFTER_MS", 100)
    manager = KeyManager(["sk-a"], pool="test-large", limits=Limits(tpm=60_000))

    async def take(tokens: int) -> float:
        async with manager.lease(tokens=tokens):
            return time.monotonic()

    async def main() -> None:
        await take(59_000)
        large = asyncio.ensure_future(take(50_000))
        await until(lambda: any(line.leader and line.leader.large for line in manager._worker.lines.values()))
        small = asyncio.ensure_future(take(10))
        await until(lambda: waiting(manager) == 2)
        await asyncio.sleep(0)
        assert not small.done()
        await gone(large)
        await asyncio.wait_for(small, 3)

    asyncio.run(main())
    manager.close()


def test_who_joins_while_the_last_one_leaves_keeps_his_claim(make: Callable[..., KeyManager]) -> None:
    manager, other = make("farewell"), make("farewell")

    async def take(of: KeyManager) -> float:
        async with of.lease():
            return time.monotonic()

    async def main() -> None:
        async with manager.lease():
            slow_down(manager, lambda op, _: 0.05 * (type(op) is Acquire and not op.asks), before=True)
            first = asyncio.ensure_future(take(manager))
            await until(lambda: manager.status().line)
            first.cancel()
            await asyncio.sleep(0.01)
            second = asyncio.ensure_future(take(manager))
            await asyncio.gather(first, return_exceptions=True)
            await until(lambda: manager.status().line)
            freed = time.monotonic()
        assert await second - freed < 2, "woken, and not only looking again after five seconds"

    asyncio.run(main())
    assert other.status().line == ()


def test_a_call_that_is_granted_alone_leaves_the_claim_of_the_others(make: Callable[..., KeyManager]) -> None:
    manager = make("alone", Limits(tpm=60_000))

    async def take(tokens: int) -> None:
        async with manager.lease(tokens=tokens):
            pass

    async def main() -> None:
        await take(59_000)
        slow_down(manager, lambda op, _: 0.05 * (type(op) is Acquire and op.asks[0].tokens == 10), before=True)
        small = asyncio.ensure_future(take(10))
        await asyncio.sleep(0)
        large = asyncio.ensure_future(take(30_000))
        await small
        await until(lambda: waiting(manager) == 1 and manager.status().line)
        await gone(large)

    asyncio.run(main())


def test_a_second_cancellation_leaves_no_pop_that_takes_the_wakes_of_others(
    make: Callable[..., KeyManager], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, other = make("ghost"), make("ghost")
    stop = AsyncListener.stop

    async def main() -> None:
        inside = asyncio.Event()

        async def slow(self: AsyncListener) -> int | None:
            inside.set()
            await asyncio.sleep(0.02)
            return await stop(self)

        async def take() -> None:
            async with manager.lease():
                pass

        with redis.Redis.from_url(redis_url) as client:
            async with manager.lease():
                waiter = asyncio.ensure_future(take())
                await until(lambda: listening(client) == 1)
                monkeypatch.setattr(AsyncListener, "stop", slow)
                waiter.cancel()
                await inside.wait()
                waiter.cancel()
                await asyncio.gather(waiter, return_exceptions=True)
                monkeypatch.setattr(AsyncListener, "stop", stop)
                await until(lambda: listening(client) == 0 and not manager.status().line)
                second = asyncio.ensure_future(other.lease().__aenter__())
                await until(lambda: listening(client) == 1)
                freed = time.monotonic()
            lease = await second
            assert time.monotonic() - freed < 2
            await lease.__aexit__(None, None, None)

    asyncio.run(main())


def test_a_lost_connection_does_not_lengthen_the_wait(make: Callable[..., KeyManager], redis_url: str) -> None:
    manager = make("lost", max_wait=1.5)
    took = []

    def take() -> None:
        began = time.monotonic()
        with suppress(Exhausted), manager.lease():
            pass
        took.append(time.monotonic() - began)

    with manager.lease(), redis.Redis.from_url(redis_url) as client:
        thread = threading.Thread(target=take)
        thread.start()
        deadline = time.monotonic() + 10
        while not listening(client):
            assert time.monotonic() < deadline
        for _ in range(3):
            for row in client.client_list():
                if row["cmd"] == "blpop":
                    client.client_kill_filter(_id=row["id"])
        thread.join()
    assert 1.4 < took[0] < 2.9


def test_those_who_give_up_together_do_not_all_look_why() -> None:
    manager = KeyManager(["sk-a"], pool="test-together", limits=Limits(rpm=1), max_wait=1)
    ops: Counter[type] = Counter()
    run = manager._backend.run

    def count(op: Any) -> Any:
        ops[type(op)] += 1
        return run(op)

    manager._backend.run = count

    async def take() -> str:
        try:
            async with manager.lease():
                return "ok"
        except Exhausted as error:
            return error.reason

    async def main() -> Counter[str]:
        return Counter(await asyncio.gather(*(take() for _ in range(500))))

    assert asyncio.run(main()) == {"ok": 1, "rpm": 499}
    assert ops[Inspect] == 0
    manager.close()


def test_a_key_that_a_fresh_process_enables_wakes_who_waits_for_any_class(make: Callable[..., KeyManager]) -> None:
    manager, fresh = make("enable", Limits(rpm=100)), make("enable", Limits(rpm=100))

    async def take() -> None:
        async with manager.lease(model="gpt-4o"):
            pass

    async def main() -> None:
        await take()
        await manager.adisable("sk-a", 30)
        waiter = asyncio.ensure_future(take())
        await until(lambda: fresh.status() and waiting(manager))
        await until(lambda: manager.status().line)
        await fresh.aenable("sk-a")
        await asyncio.wait_for(waiter, 3)

    asyncio.run(main())


def test_what_heals_by_one_class_wakes_who_waits_for_another(make: Callable[..., KeyManager]) -> None:
    manager = make("heal", Limits(rpm=1000), keys=("sk-a", "sk-b"))

    def classify(error: BaseException) -> Verdict | None:
        return Verdict("failed", "raise", reason="5xx") if isinstance(error, Broken) else None

    async def fail() -> None:
        with suppress(Broken):
            async with manager.lease(model="x", classify=classify):
                raise Broken

    async def take() -> None:
        async with manager.lease(model="y"):
            pass

    async def main() -> None:
        older = manager.lease(model="x")
        await older.__aenter__()
        await take()
        while not manager.status().breaker_s:
            await fail()
        await until(lambda: not manager.status().breaker_s)
        await fail()  # the probe: the pause doubles
        await until(lambda: not manager.status().breaker_s)
        await fail()
        assert manager.status().breaker_s > 3
        waiter = asyncio.ensure_future(take())
        await until(lambda: manager.status().line)
        await older.__aexit__(None, None, None)
        await asyncio.wait_for(waiter, 2)

    asyncio.run(main())


def test_a_hasty_call_behind_a_patient_one_fails_at_once_and_costs_no_claim(make: Callable[..., KeyManager]) -> None:
    manager = make("hasty", Limits(rpm=1))

    async def take(max_wait: float) -> None:
        async with manager.lease(max_wait=max_wait):
            pass

    async def main() -> None:
        await take(1)
        patient = asyncio.ensure_future(take(600))
        await until(lambda: manager.status().line)
        began = time.monotonic()
        with pytest.raises(Exhausted) as caught:
            await take(20)
        assert time.monotonic() - began < 2
        assert caught.value.reason == "rpm"
        assert caught.value.retry_after == pytest.approx(60, abs=3)
        await until(lambda: [line.calls for line in manager.status().line] == [1])
        await gone(patient)

    asyncio.run(main())


def test_a_cancellation_is_not_lost_where_the_call_fails_meanwhile(make: Callable[..., KeyManager]) -> None:
    manager = make("cancelled", Limits(rpm=1))
    failed = []

    async def user() -> None:
        for _ in range(3):
            try:
                async with manager.lease(max_wait=1):
                    pass
            except Exhausted as error:
                failed.append(error)

    async def main() -> None:
        async with manager.lease():
            pass
        asked = asyncio.Event()

        def slowly(op: Any, reply: Any) -> float:
            if type(op) is Acquire:
                asked.set()
            return 0.1 * (type(op) is Acquire)

        slow_down(manager, slowly)
        task = asyncio.ensure_future(user())
        await asked.wait()
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        assert not failed

    asyncio.run(main())


def test_calls_that_never_wait_leave_no_claim(make: Callable[..., KeyManager], redis_url: str) -> None:
    manager = make("never", Limits(concurrency=1, tpm=1000))
    with manager.lease():
        with pytest.raises(Exhausted), manager.lease(max_wait=0):
            pass
        with pytest.raises(RequestTooLarge), manager.lease(tokens=5000):
            pass
        assert manager.status().line == ()
    with redis.Redis.from_url(redis_url) as client:
        assert not client.keys("stable:{test-never}:wakes:*")
