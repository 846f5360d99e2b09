"""The soak: four processes share keys through one Redis, and every few seconds something goes wrong.

The judge is the fake upstream's own log: requests over a limit 0. Beside that: calls lost 0 (a call that raised, or was
answered wrongly, but for those of a process that was killed), leases left behind 0 (by workers that have ended; in
Redis, when the ttl of those that were killed is over; in flight at the upstream), stuck workers 0 (a thread without a
step for longer than any limit makes it wait, a process that does not end by itself).

Each process has a proxy of its own before Redis. Faults come one after the other, in an order that the seed decides:
each kind once before any comes again, but for those that lose the state, which come seldom (see soak_faults.py; of the
workers, soak_worker.py).
"""

from __future__ import annotations

import math
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.load import goodput
from benchmarks.soak_faults import LOSING, Fault, World, chosen
from benchmarks.soak_worker import ACCOUNTS, LATENCY_S, LIMITS, MODELS, RPM, THREADS, Worker, manager_of
from stable_openai import KeyManager
from stable_openai.testing import Entry, FakeProcess, Limit
from tests.faults.proxy import Proxy
from tests.faults.servers import Server, until

PROCESSES = 4
SHOWN = 10  # of what went wrong


class Pace(NamedTuple):
    """Seconds: between two faults, the longest of a fault, a lease's ttl, after how many a thread is stuck, and between
    two faults that lose the state (a loss takes what is left of a minute for used: nothing is granted for so long)."""

    between: tuple[float, float]
    longest: float
    ttl: float
    patience: float
    calm: float


LONG = Pace((2.0, 5.0), 5.0, 12.0, 150.0, 90.0)
SHORT = Pace((0.2, 0.6), 1.0, 3.0, 15.0, 0.0)


@dataclass(frozen=True)
class Judgement:
    """What came of a run. All but `requests`, `faults`, `idle_s` and `goodput` is to be 0 or empty."""

    requests: int
    over: list[str]
    lost: list[str]
    left: int
    stuck: int
    faults: Counter[str]
    idle_s: float
    goodput: dict[str, float]

    @property
    def wrong(self) -> int:
        return len(self.over) + len(self.lost) + self.left + self.stuck

    def __str__(self) -> str:
        rows = [
            ("faults", f"{self.faults.total()}: {', '.join(f'{name} {n}' for name, n in sorted(self.faults.items()))}"),
            ("requests over a limit", f"{len(self.over)} of {self.requests:,}"),
            ("calls lost", len(self.lost)),
            ("leases left behind", self.left),
            ("stuck workers", self.stuck),
            ("longest time of a thread without a step", f"{self.idle_s:.1f} s"),
            ("goodput beside the oracle's", ", ".join(f"{model} {part:.3f}" for model, part in self.goodput.items())),
        ]
        return "\n".join(f"  {what:40} {figure}" for what, figure in rows) + "".join(
            f"\n  {problem}" for problem in (*self.over[:SHOWN], *self.lost[:SHOWN])
        )


def main(
    *,
    smoke: bool = False,
    seconds: float = 600,
    seed: int | None = None,
    on_redis_down: str = "local",
    faults: str = "all",
) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    seed = random.randrange(10**6) if seed is None else seed
    pace = SHORT if smoke else LONG
    seconds = min(seconds, 12) if smoke else seconds
    print(
        f"soak {seconds:g} s, {PROCESSES} × {THREADS} threads, on_redis_down={on_redis_down!r}, seed {seed}", flush=True
    )
    faults = "keeping" if smoke else faults  # after a loss nothing is granted for longer than the short form takes
    judgement = run(seconds, seed, chosen(faults, on_redis_down), on_redis_down, pace)
    print(judgement, flush=True)
    return int(judgement.wrong > 0)


def run(seconds: float, seed: int, faults: list[Fault], on_redis_down: str = "local", pace: Pace = LONG) -> Judgement:
    """Let these faults come for so many seconds, then all end, and judge."""
    chance = random.Random(seed)
    job = {"on_redis_down": on_redis_down, "ttl": pace.ttl, "patience": pace.patience}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stable-openai-"))
        server = stack.enter_context(Server(folder))
        until(server.admin.ping)
        proxies = [stack.enter_context(Proxy(server.address)) for _ in range(PROCESSES)]
        models = {model: Limit(**limits) for model, limits in LIMITS.items()}
        fake = stack.enter_context(FakeProcess(keys=ACCOUNTS, models=models, latency_s=LATENCY_S))

        def start(place: int) -> Worker:
            worker = Worker({**job, "base_url": fake.url, "redis": proxies[place].url})
            stack.callback(worker.kill)
            return worker

        workers = [start(place) for place in range(PROCESSES)]
        world = World(server, proxies, workers, start, chance, pace.longest)
        until(lambda: all(worker.answered or worker.lost for worker in workers))
        began = time.time()
        story = list(_go_wrong(world, faults, seconds, pace))
        ended = _end(workers, pace.patience)
        left = sum(worker.left for worker in workers) + fake.stats["in_flight"]
        with closing(manager_of(job | {"base_url": fake.url, "redis": f"redis://127.0.0.1:{server.port}"})) as manager:
            left += _live(manager, pace.ttl)
        log = fake.log
    everyone = [*workers, *world.killed]
    stuck = [
        (worker, thread)
        for worker in everyone
        for thread, idle in enumerate(worker.idle)
        if idle > pace.patience or (worker in workers and thread in worker.alive)
    ]
    return Judgement(
        requests=len(log),
        over=[_told(entry, story, began) for entry in log if entry.limit],
        lost=[problem for worker in everyone for problem in worker.lost],
        left=left,
        stuck=len(stuck) + ended.count(False),
        faults=Counter(name for _, name in story),
        idle_s=max(idle for worker in everyone for idle in worker.idle),
        goodput={model: _goodput(log, model, began, seconds) for model in MODELS},
    )


def _go_wrong(world: World, faults: list[Fault], seconds: float, pace: Pace) -> Iterator[tuple[float, str]]:
    """Let faults come; yields when each began, and its name."""
    end, lost_at, deck = time.monotonic() + seconds, -math.inf, list[Fault]()
    while (pause := world.chance.uniform(*pace.between)) < end - time.monotonic():
        time.sleep(pause)
        calm = time.monotonic() < lost_at + pace.calm
        if not any(fault not in LOSING or not calm for fault in deck):
            deck = world.chance.sample(faults, len(faults)) + deck
        fault = next((fault for fault in reversed(deck) if fault not in LOSING or not calm), None)
        if fault is not None:
            deck.remove(fault)
            if fault in LOSING:
                lost_at = time.monotonic()
            yield time.time(), fault.__name__
            fault(world)
    time.sleep(max(0.0, end - time.monotonic()))


def _end(workers: list[Worker], patience: float) -> list[bool]:
    """End them all; whether each did by itself. They have some seconds more than their threads have."""
    for worker in workers:
        worker.stop()
    deadline = time.monotonic() + patience + 10
    return [worker.join(deadline) for worker in workers]


def _live(manager: KeyManager, ttl: float) -> int:
    """The leases in Redis that are still live when all that were left have expired."""
    for model in MODELS:
        manager.request(model, 1)
    deadline = time.monotonic() + ttl + 1
    while True:
        live = sum(key.live for key in manager.status().keys)
        if not live or time.monotonic() > deadline:
            return live
        time.sleep(0.1)


def _goodput(log: list[Entry], model: str, began: float, seconds: float) -> float:
    mine = [entry for entry in log if entry.model == model]
    rule = model.removeprefix("gpt-")
    burst_s = LIMITS[model].get("burst_s", 60)
    accounts = len(set(ACCOUNTS.values()))
    return goodput(mine, rule, RPM, began, seconds, accounts=accounts, burst_s=burst_s) if mine else 0.0


def _told(entry: Entry, story: list[tuple[float, str]], began: float) -> str:
    """A request over a limit, and the faults before it."""
    before = [f"{name} {entry.at - at:.2f} s before" for at, name in story if at <= entry.at][-3:]
    return f"over {entry.limit} of {entry.model}, {entry.account}, at {entry.at - began:.2f} s: {', '.join(before)}"
