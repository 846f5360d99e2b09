"""What a lease costs: over Redis (time, server CPU, 10,000 keys, memory), in memory, in @stable, and the import.

Each figure is a ratio to a yardstick of the same run; medians of several rounds, the two taking turns.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import redis

from stable_openai import KeyManager, Limits, stable
from stable_openai._limits import quota
from stable_openai._ops import Acquire, Ask, Closing, Demand, Granted, Member, Register, Registration, Settle, encode
from stable_openai.backends.redis import RedisBackend
from tests.servers import private_redis

TTL_MS = 60_000
LIVE = 100
NO_OP = "return 1"
ALONE = Demand("bench.1", (0, 1, 0, 0), 100, 600_000)
ALL_FOUR = {"rpm": 500_000, "rpd": 100_000_000, "tpm": 50_000_000, "tpd": 10**10}


def main(*, smoke: bool = False) -> int:
    rounds, pairs = (1, 50) if smoke else (7, 1500)
    with private_redis() as url:
        base = over_redis(url, "bucket", 10, rounds, pairs)
        report("acquire + settle over Redis, 1 worker, 100 live leases: time", base["time"], "2 no-op EVALSHA", 1.5)
        report("the same: server CPU, bucket", base["cpu"], "2 no-op EVALSHA", 10)
        sliding = over_redis(url, "sliding", 10, rounds, pairs)
        report("the same: server CPU, sliding", sliding["cpu"], "2 no-op EVALSHA", 25)
        print(f"{'  (the same: time, sliding)':72} {sliding['time']:6.2f} times")
        for rule, figures in (("bucket", base), ("sliding", sliding)):
            what = f"the same: all CPU of the server, its sockets too, {rule}"
            print(f"{what:72} {figures['whole_us']:6.0f} µs: {1e6 / figures['whole_us']:,.0f} leases a second at most")
        many, few = with_many_keys(url, rounds, pairs, 1000 if smoke else 10_000)
        report("the same with 10,000 keys: time", many["us"] / few["us"], "with 10 keys", 1.3)
        report("the same with 10,000 keys: server CPU", many["cpu_us"] / few["cpu_us"], "with 10 keys", 1.3)
        for rule, bar in (("bucket", 512), ("sliding", 4096)):
            used = memory(url, rule, 20 if smoke else 400)
            print(f"{f'memory in Redis, account and class, all four limits, {rule}':72} {used:6.0f} B (bar: {bar} B)")
    in_memory(rounds, pairs)
    imports(1 if smoke else 9)
    return 0


def report(what: str, ratio: float, yardstick: str, bar: float) -> None:
    verdict = "met" if ratio <= bar else "MISSED"
    print(f"{what:72} {ratio:6.2f} times {yardstick} (bar: {bar:g}, {verdict})")


def registration(
    url: str, rule: str, keys: int, limits: dict[str, int] | None = None
) -> tuple[RedisBackend, Registration]:
    declared = Limits(**(limits or ALL_FOUR), concurrency=100_000, rule=rule)  # type: ignore[arg-type]
    names = [f"{number:016x}" for number in range(keys)]
    members = [Member(name, 0, 1, ((name, 1),)) for name in names]
    to = Registration(f"bench-{rule}-{keys}", "gpt-4o", [quota(declared, 0.25)], members)
    backend = RedisBackend(url)
    backend.run(Register(to, "bench", {}))
    return backend, to


def over_redis(url: str, rule: str, keys: int, rounds: int, pairs: int) -> dict[str, float]:
    """Ratios of time and server CPU to two no-op scripts with the same KEYS and ARGV, by the same client; and all CPU
    of the server for one."""
    backend, to = registration(url, rule, keys)
    pair, no_op = verbs(backend, to)
    client = backend._connect()
    figures: dict[str, list[float]] = {"time": [], "cpu": [], "whole_us": []}
    for _ in range(rounds):
        real, plain = timed(client, pair, pairs), timed(client, no_op, pairs)
        figures["time"].append(real[0] / plain[0])
        figures["cpu"].append(real[1] / plain[1])
        figures["whole_us"].append(real[2])
    backend.close()
    return {name: statistics.median(values) for name, values in figures.items()}


def with_many_keys(url: str, rounds: int, pairs: int, keys: int) -> tuple[dict[str, float], dict[str, float]]:
    """Times and server CPU in µs with many keys and with ten, taking turns."""
    figures: list[dict[str, list[float]]] = []
    runs = []
    for count in (keys, 10):
        backend, to = registration(url, "bucket", count)
        runs.append((backend, verbs(backend, to)[0]))
        figures.append({"us": [], "cpu_us": []})
    for _ in range(rounds):
        for (backend, pair), figure in zip(runs, figures):
            elapsed, cpu, _ = timed(backend._connect(), pair, pairs)
            figure["us"].append(elapsed)
            figure["cpu_us"].append(cpu)
    for backend, _ in runs:
        backend.close()
    many, few = ({name: statistics.median(values) for name, values in figure.items()} for figure in figures)
    return many, few


def verbs(backend: RedisBackend, to: Registration) -> tuple[Callable[[], None], Callable[[], None]]:
    """An acquire with its settle, beside 100 live leases; and the no-op scripts of the same KEYS and ARGV."""
    numbers = itertools.count()
    for _ in range(LIVE):
        backend.run(Acquire(to, TTL_MS, (Ask(f"live:{next(numbers)}", 100, "gpt-4o"),)))

    def pair() -> None:
        lease = backend.run(Acquire(to, TTL_MS, (Ask(f"bench:{next(numbers)}", 100, "gpt-4o"),), ALONE)).answers[0]
        backend.run(Settle(to, TTL_MS, (Closing(lease.id, lease.account, lease.key, "gpt-4o", "ok", 100),)))

    client = backend._connect()
    sha = client.script_load(NO_OP)
    name = to.members[0].account

    def no_op() -> None:
        lease = Granted(f"bench:{next(numbers)}", name, name)
        for op in (
            Acquire(to, TTL_MS, (Ask(lease.id, 100, "gpt-4o"),), ALONE),
            Settle(to, TTL_MS, (Closing(lease.id, name, name, "gpt-4o", "ok", 100),)),
        ):
            _, keys, args = encode(op, "")
            client.execute_command("EVALSHA", sha, len(keys), *keys, *args)

    return pair, no_op


def timed(client: redis.Redis, work: Callable[[], None], count: int) -> tuple[float, float, float]:
    """µs for one, and the server's CPU for it: as INFO commandstats has it, and of its whole process."""
    work()
    client.config_resetstat()
    before: Any = client.info("cpu")
    started = time.perf_counter()
    for _ in range(count):
        work()
    elapsed = (time.perf_counter() - started) / count * 1e6
    after: Any = client.info("cpu")
    whole = sum(after[name] - before[name] for name in ("used_cpu_sys", "used_cpu_user"))
    stats: Any = client.info("commandstats")
    return elapsed, stats["cmdstat_evalsha"]["usec"] / count, whole / count * 1e6


def memory(url: str, rule: str, grants: int) -> float:
    """Bytes of the class's hash that one account adds, its windows filled: over simulated time, by MEMORY USAGE."""
    clock = [1_790_000_000_000]
    limits = {"rpm": 500, "rpd": 10_000, "tpm": 200_000, "tpd": 2_000_000}

    def filled(keys: int) -> int:
        _, to = registration(url, rule, keys, limits)
        backend = RedisBackend(url, now=lambda: clock[0])
        with redis.Redis.from_url(url) as client:
            client.delete(*to.keys)
            backend.run(Register(to, "bench", {}))
            for spread in (86_400_000 // grants, 60_000 // grants):  # through a day, then through a minute
                for step in range(grants):
                    clock[0] += spread
                    asks = tuple(Ask(f"m:{spread}:{step}:{key}", 200, "gpt-4o") for key in range(keys))
                    granted = [a for a in backend.run(Acquire(to, TTL_MS, asks)).answers if isinstance(a, Granted)]
                    closings = tuple(Closing(g.id, g.account, g.key, "gpt-4o", "ok") for g in granted)
                    if closings:
                        backend.run(Settle(to, TTL_MS, closings))
            backend.close()
            return int(client.memory_usage(to.keys[1], samples=0) or 0)

    return (filled(12) - filled(2)) / 10


def in_memory(rounds: int, pairs: int) -> None:
    import tenacity
    from limits import RateLimitItemPerMinute
    from limits.storage import MemoryStorage
    from limits.strategies import MovingWindowRateLimiter

    manager = KeyManager(["sk-bench"], pool="bench", limits=Limits(rpm=10**9))
    worker, backend = manager._worker, manager._backend
    manager.check()
    to = worker.registration("-")
    birth = worker.birth_of(to)
    numbers = itertools.count()

    def pair() -> None:
        lease = backend.run(Acquire(to, TTL_MS, (Ask(f"bench:{next(numbers)}", 0, "-"),), ALONE, birth)).answers[0]
        backend.run(Settle(to, TTL_MS, (Closing(lease.id, lease.account, lease.key, "-", "ok"),)))

    limiter, limit = MovingWindowRateLimiter(MemoryStorage()), RateLimitItemPerMinute(10**9)

    def hit() -> None:
        limiter.hit(limit, "bench")

    @stable(manager=manager)
    def ours(api_key: str = "") -> None:
        return None

    @tenacity.retry
    def theirs() -> None:
        return None

    def us(work: Callable[[], None]) -> float:
        started = time.perf_counter()
        for _ in range(pairs):
            work()
        return (time.perf_counter() - started) / pairs * 1e6

    for what, mine, yardstick, name, bar in (
        ("in-memory acquire + settle", pair, hit, "a hit of limits' moving window", 3),
        ("@stable on a function that does nothing, in memory", ours, theirs, "tenacity's @retry", 3),
    ):
        report(what, statistics.median(us(mine) / us(yardstick) for _ in range(rounds)), name, bar)  # type: ignore[arg-type]
    manager.close()


def imports(rounds: int) -> None:
    ours = (
        "from stable_openai import KeyManager, Limits, Key, stable\n"
        "@stable\ndef ask(prompt, api_key): ...\n"
        "import sys; assert not {'openai', 'redis', 'asyncio'} & set(sys.modules)"
    )

    def seconds(program: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        return time.perf_counter() - started

    seconds(ours), seconds("import tenacity")
    bare, mine, theirs = (
        statistics.median(seconds(program) for _ in range(rounds)) for program in ("pass", ours, "import tenacity")
    )
    report(
        "the import and one decoration, a bare interpreter taken off",
        (mine - bare) / (theirs - bare),
        "import tenacity",
        2,
    )
