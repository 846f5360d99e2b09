"""How soon a waiter has its lease after another process frees a slot, beside a bare BLPOP that another process ends.

Both processes read the same clock. The two take turns; medians of the rounds, in ms.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time

import redis

from stable_openai import KeyManager, Limits
from tests.servers import private_redis

BAR_MS = 5.0


def main(*, smoke: bool = False) -> int:
    rounds = 3 if smoke else 200
    with private_redis() as url:
        for colour in ("thread", "coroutine"):
            bare, ours = measure(url, colour, rounds)
            more = ours - bare
            verdict = "met" if more <= BAR_MS else "MISSED"
            print(
                f"{f'a {colour} woken after another process frees a slot':72} {ours:6.2f} ms, "
                f"a bare BLPOP {bare:.2f} ms: {more:.2f} ms more (bar: {BAR_MS:g} ms, {verdict})"
            )
    return 0


def measure(url: str, colour: str, rounds: int) -> tuple[float, float]:
    """Medians in ms: of the bare wake-up, and of ours."""
    manager = manager_of(url)
    waiter = subprocess.Popen([sys.executable, "-m", "benchmarks.waking", url, colour])
    bare, ours = [], []
    try:
        with redis.Redis.from_url(url) as client:
            for _ in range(rounds):
                client.rpush("go", "bare")
                wait_until_blocked(client)
                began = time.monotonic()
                client.rpush("bare", 1)
                bare.append(woken(client) - began)
                lease = manager.lease()
                lease.__enter__()
                client.rpush("go", "lease")
                wait_until_blocked(client)
                began = time.monotonic()
                lease.__exit__(None, None, None)
                ours.append(woken(client) - began)
            client.rpush("go", "stop")
        waiter.wait(timeout=10)
    finally:
        waiter.kill()
        waiter.wait()
        manager.close()
    return statistics.median(bare) * 1000, statistics.median(ours) * 1000


def manager_of(url: str) -> KeyManager:
    return KeyManager(["sk-one"], url, pool="waking", limits=Limits(concurrency=1))


def wait_until_blocked(client: redis.Redis) -> None:
    time.sleep(0.002)  # it is on its way from "go" to where it waits
    while int(client.info("clients")["blocked_clients"]) != 1:  # type: ignore[index]
        time.sleep(0.001)


def woken(client: redis.Redis) -> float:
    popped = client.blpop(["woken"], timeout=10)
    assert popped, "nobody woke"
    return float(popped[1])  # type: ignore[index]


def wait(url: str, colour: str) -> None:
    """The other process: waits for what it is told to, and says when it had it."""
    manager = manager_of(url)

    def lease() -> None:
        with manager.lease():
            client.rpush("woken", time.monotonic())

    async def alease() -> None:
        async with manager.lease():
            client.rpush("woken", time.monotonic())

    loop = asyncio.new_event_loop()
    with redis.Redis.from_url(url) as client:
        while True:
            told = client.blpop(["go"], timeout=30)
            what = told[1] if told else b"stop"  # type: ignore[index]
            if what == b"stop":
                break
            if what == b"bare":
                client.blpop(["bare"], timeout=30)
                client.rpush("woken", time.monotonic())
            elif colour == "thread":
                lease()
            else:
                loop.run_until_complete(alease())
    loop.run_until_complete(manager.aclose())
    loop.close()


if __name__ == "__main__":
    wait(*sys.argv[1:])
