"""The main job: processes of threads or coroutines share 8 keys through one Redis, calling through the openai client.

The judge is the fake upstream's own log: over the limit 0, answered all. Goodput is what was answered in the time of
saturation beside what the rule allows in it (an oracle without delays). The others by which waiting is judged: the
commands that clients send for each lease, Jain's index of the processes' shares, and the CPU of those who wait.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import redis

from stable_openai import Key, KeyManager, Limits, stable
from stable_openai._clients import shared_client
from stable_openai.testing import Entry, FakeProcess, Limit
from tests.servers import private_redis

RULES = ("bucket", "sliding", "calendar")
KEYS = 8
RPM = 120
TOKENS = 100  # of each request, where tokens are what is limited
SENT = ("evalsha", "eval", "blpop", "client|id", "client|unblock", "client|setinfo", "hello", "select", "script|load")


def main(*, smoke: bool = False, rules: tuple[str, ...] = RULES, seconds: float = 175) -> int:
    """The whole: three periods of saturation for each rule, limit and shape. In smoke form nothing is."""
    if smoke:
        return max(run(rule, seconds=2, processes=2, rpm=60_000) for rule in rules)
    wrong = 0
    for rule in rules:
        for what in ("requests", "tokens"):
            wrong += run(rule, what=what, seconds=seconds, processes=8)
            wrong += run(rule, what=what, seconds=seconds, processes=4, coroutines=2500)
    return int(wrong > 0)


def run(
    rule: str,
    *,
    seconds: float,
    processes: int,
    threads: int = 8,
    coroutines: int = 0,
    rpm: int = RPM,
    what: str = "requests",
) -> int:
    """One rule. Returns 0 where nothing went over a limit and every call was answered."""
    keys = {f"sk-{number}": f"org-{number}" for number in range(KEYS)}
    limits: dict[str, Any] = {"rpm": rpm, "rule": rule} if what == "requests" else {"tpm": rpm * TOKENS, "rule": rule}
    with private_redis() as url, FakeProcess(keys=keys, limits=Limit(**limits)) as fake:
        job = {"redis": url, "base_url": fake.url, "keys": list(keys), "limits": limits, "seconds": seconds}
        job |= {"threads": threads, "coroutines": coroutines, "processes": processes, "rule": rule}
        with redis.Redis.from_url(url, decode_responses=True) as client:
            client.config_resetstat()
            results = run_processes([job] * processes, timeout=seconds + 180)
            commands = sent(client)
            left = sorted(key for key in client.keys("*") if ":wakes:" in key)  # type: ignore[union-attr]
        log, over = fake.log, fake.over
    wrong = sum(result["wrong"] for result in results)
    leases = sum(result["leases"] for result in results)
    shares = [result["in_saturation"] for result in results]
    waited = statistics.median([wait for result in results for wait in result["waits"]] or [0.0])
    started = min(result["started"] for result in results)
    idle = [result["cpu"] for result in results if result["cpu"] is not None]
    shape = f"{processes} × {coroutines or threads}{' coroutines' if coroutines else ''}"
    print(
        f"load {rule:9} {what:8} {shape}, {KEYS} keys, {rpm} requests a minute: "
        f"over a limit {len(over)}, lost {wrong}, answered {sum(result['answered'] for result in results)}, "
        f"goodput {goodput(log, rule, rpm, started, seconds):.3f} of the oracle's, Jain {jain(shares):.3f}, "
        f"commands for each lease {commands / max(1, leases):.2f}, half of the calls waited less than {waited:.2f} s"
        + (f", CPU while nothing is granted {', '.join(str(share) for share in idle)} % of a core" if idle else "")
        + (f", left in Redis {left}" if left else ""),
        flush=True,
    )
    return int(bool(over or wrong))


def sent(client: redis.Redis) -> int:
    """The commands that clients have sent (a script's own are counted apart)."""
    stats: Any = client.info("commandstats")
    return sum(stats[f"cmdstat_{name}"]["calls"] for name in SENT if f"cmdstat_{name}" in stats)


def run_processes(jobs: list[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """Run `work` in a process for each job; what each came to."""
    command = [sys.executable, "-m", "benchmarks.load"]
    workers = [subprocess.Popen([*command, json.dumps(job)], stdout=subprocess.PIPE, text=True) for job in jobs]
    try:
        return [json.loads(worker.communicate(timeout=timeout)[0].splitlines()[-1]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def goodput(
    log: list[Entry], rule: str, rpm: int, started: float, seconds: float, *, accounts: int = KEYS, burst_s: float = 60
) -> float:
    """Answers beside what an oracle without delays is granted from the first arrival on, in the same time."""
    first = min(entry.at for entry in log)
    end = started + seconds
    served = sum(1 for entry in log if entry.status == 200 and entry.at <= end)
    span = end - first
    if rule == "bucket":
        each = rpm * (burst_s + span) / 60
    elif rule == "sliding":
        each = rpm * (1 + span // 60)
    else:
        each = rpm * (1 + end // 60 - first // 60)
    return served / (accounts * each)


def jain(shares: list[int]) -> float:
    """Jain's index of fairness: 1 where all have the same."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares)) if any(shares) else 0.0


class Work:
    """One process: its threads or coroutines call until the time is over, or so many `calls` each. Threads that wait
    then are still answered; coroutines are cancelled."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.manager = KeyManager(
            [Key(secret, base_url=job["base_url"]) for secret in job["keys"]],
            job["redis"],
            pool=job.get("pool", "load"),
            limits=Limits(**job["limits"]),
            max_wait=3600,
        )
        self.answered = self.leases = self.wrong = self.in_saturation = 0
        self.waits: list[float] = []
        self.cpu: list[float] = []
        self.mutex = threading.Lock()

    def begin(self) -> None:
        """Wait until all processes are there."""
        if "processes" in self.job:
            with redis.Redis.from_url(self.job["redis"]) as client:
                client.incr("ready")
                while int(client.get("ready") or 0) < self.job["processes"]:  # type: ignore[arg-type]
                    time.sleep(0.01)
        self.started, self.began = time.time(), time.monotonic()

    def note(self, right: bool, began: float) -> None:
        now = time.monotonic()
        with self.mutex:
            self.waits.append(now - began)
            self.answered += right
            self.wrong += not right
            self.in_saturation += right and now - self.began < self.job["seconds"]

    def go_on(self, count: int) -> bool:
        return time.monotonic() - self.began < self.job["seconds"] and count < self.job.get("calls", float("inf"))

    def sample(self) -> None:
        """Where a sliding window is full, nothing is granted from the tenth second to the sixtieth."""
        if self.job.get("rule") == "sliding" and self.job["seconds"] > 60:
            for until in (20, 50):
                time.sleep(max(0.0, self.began + until - time.monotonic()))
                self.cpu.append(time.process_time())

    def by_threads(self) -> None:
        @stable(manager=self.manager, tokens=TOKENS)
        def ask(prompt: str, client: Any = None) -> str:
            self.leases += 1
            answer = client.chat.completions.create(**request(prompt))
            return str(answer.choices[0].message.content)

        def loop(number: int) -> None:
            count = 0
            while self.go_on(count):
                count += 1
                began, prompt = time.monotonic(), f"thread {number}, prompt {count}"
                try:
                    right = ask(prompt) == f"echo: {prompt}"
                except Exception as error:
                    print(f"{type(error).__name__}: {error}"[:200], file=sys.stderr)
                    right = False
                self.note(right, began)

        threads = [threading.Thread(target=loop, args=(number,)) for number in range(self.job["threads"])]
        for thread in threads:
            thread.start()
        self.sample()
        for thread in threads:
            thread.join()
        self.manager.close()

    async def by_coroutines(self) -> None:
        @stable(manager=self.manager, tokens=TOKENS)
        async def ask(prompt: str, client: Any = None) -> str:
            self.leases += 1
            answer = await client.chat.completions.create(**request(prompt))
            return str(answer.choices[0].message.content)

        async def loop(number: int) -> None:
            count = 0
            while self.go_on(count):
                count += 1
                began, prompt = time.monotonic(), f"coroutine {number}, prompt {count}"
                try:
                    right = await ask(prompt) == f"echo: {prompt}"
                except Exception as error:
                    print(f"{type(error).__name__}: {error}"[:200], file=sys.stderr)
                    right = False
                self.note(right, began)

        sampling = threading.Thread(target=self.sample)
        sampling.start()
        tasks = [asyncio.ensure_future(loop(number)) for number in range(self.job["coroutines"])]
        await asyncio.wait(tasks, timeout=self.job["seconds"])
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        sampling.join()
        await self.manager.aclose()

    def result(self) -> dict[str, Any]:
        cpu = round((self.cpu[1] - self.cpu[0]) / 30 * 100, 2) if len(self.cpu) == 2 else None
        names = ("answered", "leases", "wrong", "in_saturation", "waits", "started")
        return {**{name: getattr(self, name) for name in names}, "cpu": cpu}


def request(prompt: str) -> dict[str, Any]:
    return {"model": "gpt-4o", "max_tokens": TOKENS, "messages": [{"role": "user", "content": prompt}]}


def work(job: dict[str, Any]) -> dict[str, Any]:
    made = Work(job)
    shared_client(False)
    gc.freeze()  # else a full collection, 0.2 s among thousands of tasks, holds up what is leased (see the README)
    made.begin()
    if job.get("coroutines"):
        asyncio.run(made.by_coroutines())
    else:
        made.by_threads()
    return made.result()


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
