"""What the drop-in clients cost: a call, and the time to a stream's first token, beside openai's own client.

Both call the same fake, in a process of its own, one call after the other, the two taking turns. What is compared is
the time of a call as its caller sees it, the fake's own time included, and the CPU time of the client's process.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import openai

from stable_openai import AsyncOpenAI, Key, KeyManager, OpenAI
from stable_openai.testing import FakeProcess
from tests.servers import private_redis

BAR = 0.10
CALL: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}


def main(*, smoke: bool = False) -> int:
    rounds, calls = (2, 5) if smoke else (9, 200)
    with FakeProcess(keys={"sk-plain": "org-1", "sk-ours": "org-2"}, output_tokens=16) as fake, private_redis() as url:
        for redis, what in ((None, "in memory"), (url, "over Redis")):
            manager = KeyManager([Key("sk-ours", base_url=fake.url)], redis, pool="bench-clients")
            plain = openai.OpenAI(api_key="sk-plain", base_url=fake.url, max_retries=0)
            ours = OpenAI(manager=manager, base_url=fake.url)
            report(f"a call, sync, {what}", compare(call(ours), call(plain), rounds, calls), bar=redis is None)
            report(f"the first token of a stream, sync, {what}", compare(first(ours), first(plain), rounds, calls))
            plain.close(), ours.close()
            asyncio.run(in_loop(manager, fake.url, what, rounds, calls, bar=redis is None))
            manager.close()
    return 0


async def in_loop(manager: KeyManager, url: str, what: str, rounds: int, calls: int, bar: bool) -> None:
    plain = openai.AsyncOpenAI(api_key="sk-plain", base_url=url, max_retries=0)
    ours = AsyncOpenAI(manager=manager, base_url=url)
    report(f"a call, async, {what}", await acompare(acall(ours), acall(plain), rounds, calls), bar=bar)
    report(f"the first token of a stream, async, {what}", await acompare(afirst(ours), afirst(plain), rounds, calls))
    await plain.close()
    await ours.close()
    await manager.aclose()


def report(what: str, figures: tuple[float, float, float], bar: bool = False) -> None:
    wall, cpu, us = figures
    verdict = f" (aim: less than {BAR:.0%}, {'met' if cpu < BAR else 'MISSED'})" if bar else ""
    print(f"{what:45} {wall:+7.1%} time, {cpu:+7.1%} CPU{verdict} over openai's own {us:.0f} µs", flush=True)


def call(client: Any) -> Callable[[], None]:
    return lambda: client.chat.completions.create(**CALL)


def first(client: Any) -> Callable[[], None]:
    def take() -> None:
        with client.chat.completions.create(**CALL, stream=True) as stream:
            next(iter(stream))
            elapsed.append(time.perf_counter())
            for _ in stream:
                pass

    return take


elapsed: list[float] = []


def acall(client: Any) -> Callable[[], Awaitable[None]]:
    async def one() -> None:
        await client.chat.completions.create(**CALL)

    return one


def afirst(client: Any) -> Callable[[], Awaitable[None]]:
    async def take() -> None:
        async with await client.chat.completions.create(**CALL, stream=True) as stream:
            await anext(aiter(stream))
            elapsed.append(time.perf_counter())
            async for _ in stream:
                pass

    return take


def compare(mine: Callable[[], None], yours: Callable[[], None], rounds: int, calls: int) -> tuple[float, float, float]:
    """How much more time, and CPU time, one takes (medians of rounds), and the other's time in µs."""

    def timed(work: Callable[[], None]) -> tuple[float, float]:
        times, cpu = [], time.process_time()
        for _ in range(calls):
            elapsed.clear()
            began = time.perf_counter()
            work()
            times.append((elapsed[0] if elapsed else time.perf_counter()) - began)
        return statistics.median(times), time.process_time() - cpu

    mine(), yours()
    return ratios([(timed(mine), timed(yours)) for _ in range(rounds)])


async def acompare(
    mine: Callable[[], Awaitable[None]], yours: Callable[[], Awaitable[None]], rounds: int, calls: int
) -> tuple[float, float, float]:
    async def timed(work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
        times, cpu = [], time.process_time()
        for _ in range(calls):
            elapsed.clear()
            began = time.perf_counter()
            await work()
            times.append((elapsed[0] if elapsed else time.perf_counter()) - began)
        return statistics.median(times), time.process_time() - cpu

    await mine()
    await yours()
    return ratios([(await timed(mine), await timed(yours)) for _ in range(rounds)])


def ratios(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> tuple[float, float, float]:
    wall = statistics.median(mine[0] / yours[0] for mine, yours in pairs) - 1
    cpu = statistics.median(mine[1] / yours[1] for mine, yours in pairs) - 1
    return wall, cpu, statistics.median(yours[0] for _, yours in pairs) * 1e6
