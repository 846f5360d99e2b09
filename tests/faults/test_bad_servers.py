"""Servers that refuse, forget or lie: what cannot be served is BrokerUnavailable, and nothing is lost for ever."""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from stable_openai import BrokerUnavailable, Exhausted, KeyManager, Limits, stable
from stable_openai._limits import quota
from stable_openai._ops import (
    Acquire,
    Acquired,
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
    Renew,
    Settle,
)
from stable_openai.backends.redis import RedisBackend
from tests.faults.servers import Server, until
from tests.faults.test_workers import short

START = 1_790_000_000_000
TTL, LONGEST = 60_000, 900_000
POOL = "test-bad"
LIMITS = Limits(concurrency=2, rpm=1000, tpm=100_000, rule="sliding")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, Server(folder, save="") as server:
        until(server.admin.ping)
        yield server


@pytest.fixture
def empty(server: Server) -> Server:
    server.admin.flushall()
    return server


def url(server: Server) -> str:
    return f"redis://127.0.0.1:{server.port}"


@contextmanager
def pool(server: Server, limits: Limits = LIMITS, **options: Any) -> Iterator[KeyManager]:
    made = KeyManager(["sk-a"], url(server), pool=POOL, limits=limits, **{"max_wait": 10.0, **options})
    try:
        yield made
    finally:
        made.close()


def live(manager: KeyManager) -> int:
    return manager.status().keys[0].live


def used(manager: KeyManager, meter: str) -> float:
    return next(row.used for row in manager.status().keys[0].meters if row.limit == meter)


@contextmanager
def configured(server: Server, **settings: str) -> Iterator[None]:
    names = {name: name.replace("_", "-") for name in settings}
    before = {names[name]: server.admin.config_get(names[name])[names[name]] for name in settings}
    try:
        for name, value in settings.items():
            server.admin.config_set(names[name], value)
        yield
    finally:
        for name, value in before.items():
            server.admin.config_set(name, value)


# Servers that refuse.


@contextmanager
def busy(server: Server) -> Iterator[None]:
    """It runs a script that does not end."""
    with configured(server, lua_time_limit="1"):

        def run() -> None:
            with redis.Redis(port=server.port, socket_timeout=60) as client, suppress(redis.RedisError):
                client.eval("while true do end", 0)

        thread = threading.Thread(target=run)
        thread.start()
        with redis.Redis(port=server.port) as client:
            until(
                lambda: answer(client, "PING").startswith("BUSY") or answer(client, "PING").startswith("Redis is busy")
            )
            yield
            client.execute_command("SCRIPT", "KILL")
        thread.join()


def answer(client: redis.Redis, command: str) -> str:
    try:
        return str(client.execute_command(command))
    except redis.RedisError as error:
        return str(error)


@contextmanager
def demoted(server: Server) -> Iterator[None]:
    """It has become the replica of a server that cannot be reached, and keeps what it has."""
    server.admin.execute_command("REPLICAOF", "127.0.0.1", 1)
    yield
    server.admin.execute_command("REPLICAOF", "NO", "ONE")


@contextmanager
def not_saving(server: Server) -> Iterator[None]:
    """Its last snapshot failed, so it accepts no writes."""
    target = Path(server.admin.config_get("dir")["dir"]) / server.admin.config_get("dbfilename")["dbfilename"]
    target.unlink(missing_ok=True)
    target.mkdir()  # no file can take its place
    with configured(server, save="3600 1000000"):
        save(server, "err")
        yield
        target.rmdir()
        save(server, "ok")


def save(server: Server, status: str) -> None:
    with suppress(redis.RedisError):
        server.admin.bgsave()
    until(lambda: server.admin.info("persistence")["rdb_last_bgsave_status"] == status)


@contextmanager
def too_few_replicas(server: Server) -> Iterator[None]:
    with configured(server, min_replicas_to_write="1"):
        yield


@contextmanager
def full(server: Server) -> Iterator[None]:
    """It is out of memory, and evicts nothing."""
    with configured(server, maxmemory="1", maxmemory_policy="noeviction"):
        yield


REFUSALS = {"NOREPLICAS": too_few_replicas, "BUSY": busy, "READONLY": demoted, "MISCONF": not_saving, "OOM": full}


@pytest.mark.parametrize("how", [*list(REFUSALS)[1:], pytest.param("NOREPLICAS", marks=pytest.mark.soak)])
def test_a_server_that_refuses(empty: Server, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """The call that is under way gives its result; the next is told at once; and when the server is well again, what
    was deferred is settled, without anybody calling."""
    with pool(empty, on_redis_down="raise") as manager:

        @stable(manager=manager, tokens=10)
        def call(lease: Any) -> str:
            bad.__enter__()
            lease.report(tokens=25)
            return "the result"

        bad = REFUSALS[how](empty)
        assert call() == "the result"
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable) as raised, manager.lease():
            pass
        assert time.monotonic() - began < 2.5
        assert url(empty) not in str(raised.value)
        assert ("settle.deferred" in caplog.text) == (how != "OOM")  # closing only frees memory, and is let through
        bad.__exit__(None, None, None)
        until(lambda: live(manager) == 0, 5)
        assert (used(manager, "rpm"), used(manager, "tpm")) == (1, 25)
        with manager.lease():
            assert live(manager) == 1


@pytest.mark.parametrize(
    ("how", "colour"),
    short(
        *(("BUSY", "sync"), ("READONLY", "sync"), ("OOM", "async")),
        of=itertools.product(REFUSALS, ["sync", "async"]),
    ),
)
def test_a_call_waits_for_a_server_that_refuses(empty: Server, how: str, colour: str) -> None:
    with pool(empty, on_redis_down="wait") as manager:

        def call() -> None:
            with manager.lease():
                served.append(time.monotonic())

        async def acall() -> None:
            async with manager.lease():
                served.append(time.monotonic())

        served: list[float] = []
        manager.check()
        with REFUSALS[how](empty):
            thread = threading.Thread(target=call if colour == "sync" else lambda: asyncio.run(acall()))
            thread.start()
            until(lambda: any(line.failing for line in tuple(manager._worker.lines.values())), 8)
            assert not served
        back = time.monotonic()
        thread.join(10)
        assert served[0] - back < 2.5  # it is asked again each second
        assert (live(manager), used(manager, "rpm")) == (0, 1)


@pytest.mark.parametrize("how", ["OOM", "BUSY", pytest.param("READONLY", marks=pytest.mark.soak)])
def test_leases_are_renewed_where_that_is_possible_else_as_soon_as_it_is(empty: Server, how: str) -> None:
    """While the memory is full renewals go on, for longer than the ttl; what refuses all is asked again soon."""
    with pool(empty, lease_ttl=3.0) as manager, manager.lease():
        with REFUSALS[how](empty):
            time.sleep(3.5 if how == "OOM" else 1.5)  # the ttl passes, or half of it
        with pool(empty) as watcher:
            assert live(watcher) == 1
            time.sleep(2.0)  # now it has passed
            assert live(watcher) == 1


def test_what_works_without_memory(empty: Server) -> None:
    """Whatever frees or keeps; not what takes more."""
    backend = RedisBackend(url(empty))
    to = registration()
    backend.run(Register(to, "epoch", {}))
    backend.run(acquire(to, "w:1", "w:2"))
    with full(empty):
        assert backend.run(Renew(to, TTL, LONGEST, ("w:1", "w:2"))) == [True, True]
        assert backend.run(Inspect(to, TTL)).accounts["a"].live == 2
        assert [reply.code for reply in backend.run(settle(to, "w:1", "w:2", "w:3"))] == [0, 0, 2]
        with pytest.raises(BrokerUnavailable):
            backend.run(acquire(to, "w:4"))
    assert isinstance(backend.run(acquire(to, "w:4")).answers[0], Granted)
    backend.close()


def test_loading(tmp_path: Path) -> None:
    """A server that starts reads its file for seconds, and then knows what it knew."""
    with Server(str(tmp_path), appendonly="no") as server, pool(server, on_redis_down="wait") as manager:
        until(server.admin.ping)
        with manager.lease():
            pass
        for number in range(3000):
            server.admin.set(f"filler:{number}", "x" * 100)
        server.admin.save()
        server.kill()
        server._command += ["--key-load-delay", "500", "--loading-process-events-interval-bytes", "1024"]
        server.start()
        with redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)) as client:
            until(lambda: "loading" in answer(client, "PING"))
        began = time.monotonic()
        with manager.lease():
            assert time.monotonic() - began > 0.2
        assert used(manager, "rpm") == 2


def test_a_server_restarts_its_scripts(empty: Server) -> None:
    with pool(empty) as manager:
        for _ in range(3):
            empty.admin.script_flush()
            with manager.lease():
                empty.admin.script_flush()
            empty.admin.script_flush()
            manager.disable("sk-a")
            manager.enable("sk-a")
        assert (live(manager), used(manager, "rpm")) == (0, 3)


# A wrong type under one of our keys.


@pytest.mark.parametrize("place", range(6), ids=["pool", "class", "expiry", "ring", "ready", "wakes"])
def test_a_wrong_type(empty: Server, place: int) -> None:
    """Where the key matters the broker says that it is not served; once it is gone all is well again."""
    with pool(empty, limits=Limits(concurrency=1), on_redis_down="raise", max_wait=0.3) as manager:
        manager.check()
        key = manager._worker.registration("-").keys[place]
        lease = manager.lease()
        lease.__enter__()
        empty.admin.delete(key)
        empty.admin.set(key, "not ours")
        for step in (lambda: lease.__exit__(None, None, None), lambda: manager.lease().__enter__(), manager.status):
            with suppress(BrokerUnavailable, Exhausted):
                step()
        empty.admin.delete(key)
        manager._do(manager._worker.flush())
        for id in tuple(manager._worker.live):  # what the second step was granted, where the key does not matter
            manager._worker.live.pop(id)
    empty.admin.flushall()
    with pool(empty, limits=Limits(concurrency=1), on_redis_down="raise", max_wait=0.3) as manager, manager.lease():
        assert live(manager) == 1


# Eviction: each of our keys is lost, at every moment of a story.


def registration(limits: Limits = LIMITS, names: tuple[str, ...] = ("a",), keys: int = 1, name: str = "gpt") -> Any:
    members = [
        Member(account, 0, keys, tuple((account if keys == 1 else f"{account}{n}", 1) for n in range(keys)))
        for account in names
    ]
    return Registration(POOL, name, [quota(limits, 0.25)], members)


def acquire(to: Registration, *ids: str, tokens: int = 10, demand: Demand | None = None) -> Acquire:
    return Acquire(to, TTL, tuple(Ask(id, tokens, "gpt") for id in ids), demand)


def settle(to: Registration, *ids: str, tokens: int | None = 10) -> Settle:
    return Settle(to, TTL, tuple(Closing(id, "a", "a", "gpt", "ok", tokens) for id in ids))


class Client:
    """What a worker does with the store: it registers when it is told to."""

    def __init__(self, server: Server, to: Registration, clock: list[int], id: str = "w") -> None:
        self.backend = RedisBackend(url(server), now=lambda: clock[0])
        self.to, self.id, self.clock = to, id, clock
        self.numbers = itertools.count(1)
        self.held: dict[str, int] = {}
        self.granted: list[int] = []

    def register(self) -> None:
        self.backend.run(Register(self.to, f"{random.getrandbits(64):x}", {}))

    def ask(self, count: int = 1, demand: Demand | None = None) -> list[Any]:
        ids = [f"{self.id}:{next(self.numbers)}" for _ in range(count)]
        reply = self.backend.run(acquire(self.to, *ids, demand=demand))
        if isinstance(reply, NotRegistered):
            self.register()
            reply = self.backend.run(acquire(self.to, *ids, demand=demand))
        assert isinstance(reply, Acquired), "it is told to register twice"
        for answer in reply.answers:
            assert isinstance(answer, (Granted, Refused))
            if isinstance(answer, Granted):
                self.held[answer.id] = self.clock[0] + TTL
                self.granted.append(self.clock[0])
        return reply.answers

    def settle(self) -> list[int]:
        ids, self.held = tuple(self.held), {}
        return [reply.code for reply in self.backend.run(settle(self.to, *ids))] if ids else []

    def renew(self) -> list[bool]:
        found: list[bool] = self.backend.run(Renew(self.to, TTL, LONGEST, tuple(self.held)))
        for id, alive in zip(tuple(self.held), found):
            if alive:
                self.held[id] = self.clock[0] + TTL
            else:
                del self.held[id]
        return found

    def inspect(self) -> Any:
        return self.backend.run(Inspect(self.to, TTL))

    def admin(self, verb: str) -> bool:
        return bool(self.backend.run(Admin(POOL, verb, "a", "a", None, (self.to.model_class,))))


NAMES = ("pool", "class", "expiry", "ring", "ready", "wakes")


def losses(*sizes: int) -> list[tuple[int, ...]]:
    return [loss for size in sizes for loss in itertools.combinations(range(6), size)]


def story(first: Client, second: Client, clock: list[int]) -> Iterator[str]:
    """Two workers, four slots, ten requests a minute, in a pool a day old; between its steps something is lost."""
    first.register()
    clock[0] += 86_400_000
    first.ask(2)
    yield "two leases"
    second.ask(3, Demand("second", (0, 3, 0, 0), 10))
    yield "two more, and one waits"
    clock[0] += 20_000
    first.renew()
    yield "renewed"
    first.admin("disable")
    yield "disabled"
    first.admin("enable")
    yield "enabled"
    first.settle()
    yield "settled"
    clock[0] += 10_000
    second.ask(1, Demand("second", (0, 1, 0, 0), 10))
    first.inspect()
    yield "one more"
    first.ask(5, Demand("first", (0, 5, 0, 0), 10))
    yield "the limit is reached"
    second.renew()
    first.settle()
    second.settle()
    yield "all are settled"


@pytest.mark.parametrize("plain", [True, False], ids=["one key", "three keys"])
@pytest.mark.parametrize("rule", ["sliding", "bucket"])
@pytest.mark.parametrize(
    "some", [[*losses(1, 6), (0, 1), (1, 2)], pytest.param(losses(2, 3, 4, 5), marks=pytest.mark.soak)], ids=len
)
def test_what_is_evicted_is_all_that_is_lost(empty: Server, rule: Any, plain: bool, some: Any) -> None:
    """Each of our keys, and each combination, at every moment: no crash, no deadlock, and no more granted than what
    the loss itself forgot."""
    limits = Limits(rpm=10, concurrency=4, rule=rule)
    to = registration(limits, keys=1 if plain else 3)
    moments = len(list(story(*(two := clients(empty, to))[0], two[1])))
    for loss, moment in itertools.product(some, range(moments)):
        empty.admin.flushall()
        (first, second), clock = clients(empty, to)
        what = f"without {[NAMES[place] for place in loss]} after step {moment}"
        lost_leases = 0
        for step, _ in enumerate(story(first, second, clock)):
            check_slots(first, second, clock, 4 + lost_leases, what)
            if step == moment:
                empty.admin.delete(*(to.keys[place] for place in loss))
                clock[0] += 1
                if 1 in loss:  # the class: with it go the leases that live
                    lost_leases = len(first.held) + len(second.held)
        granted = sorted(first.granted + second.granted)
        most = 10 + 5 * (rule == "bucket")  # what half a minute refills
        assert len(granted) <= most * (2 if 1 in loss else 1), what
        # Nothing is locked: a worker that died is forgotten after its ttl, and a minute later the limit is whole.
        first.ask(1)
        first.held.clear()
        clock[0] += TTL + 1
        first.inspect()
        clock[0] += 60_251
        answers = first.ask(5)
        assert [type(answer) for answer in answers] == [Granted] * 4 + [Refused], (what, answers)
        if rule == "sliding":
            assert first.inspect().accounts["a"].live == 4, what
        first.settle()
        assert first.inspect().accounts["a"].live == 0, what
        clock[0] += 3 * TTL
        first.ask(1)
        first.settle()
        assert leftovers(empty, to) == [], what
        first.backend.close()
        second.backend.close()


def clients(server: Server, to: Registration) -> tuple[tuple[Client, Client], list[int]]:
    clock = [START]
    return (Client(server, to, clock, "w1"), Client(server, to, clock, "w2")), clock


def check_slots(first: Client, second: Client, clock: list[int], most: int, what: str) -> None:
    alive = [at for client in (first, second) for at in client.held.values() if at > clock[0]]
    assert len(alive) <= most, what


def leftovers(server: Server, to: Registration) -> list[str]:
    """Leases of the class, and what is without an end of its own."""
    kept = [name for name in server.admin.hkeys(to.keys[1]) if name[:2] == "l:"]
    return kept + [key for key in server.admin.scan_iter() if server.admin.pttl(key) < 0]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_leases_outlive_what_does_not_hold_them(empty: Server, place: int) -> None:
    """Without the pool's hash, or the list of when they expire, leases are renewed and settled as they were."""
    (first, second), _ = clients(empty, registration(Limits(concurrency=2, tpm=1000, rule="sliding")))
    first.ask(2)
    empty.admin.delete(first.to.keys[place])
    assert first.renew() == [place != 1] * 2
    if place == 1:
        return
    assert isinstance(second.ask(1)[0], Refused)
    ids = tuple(first.held)
    replies = first.backend.run(settle(first.to, *ids, tokens=30))
    assert [reply.code for reply in replies] == [0, 0]
    row = first.inspect().accounts["a"]
    assert (row.live, row.meters["tpm"][0]) == (0, 60)


def test_other_classes_are_known_again_after_the_pool_was_lost(empty: Server) -> None:
    """A disabled key is enabled for all classes, those of other workers too, once they have asked."""
    clock = [START]
    one, other = (Client(empty, registration(name=name), clock, name) for name in ("one", "other"))
    for client in (one, other):
        client.ask()
    empty.admin.delete(one.to.keys[0])
    clock[0] += 1
    for client in (one, other):
        assert isinstance(client.ask()[0], Granted)
    assert sorted(one.inspect().classes) == ["one", "other"]


def test_an_admin_reaches_all_classes_of_its_worker_after_the_pool_was_lost(empty: Server) -> None:
    with pool(empty, models={"gpt-*": Limits(rpm=5)}) as manager:
        for model in ("gpt-4o", "o1"):
            with manager.lease(model=model) as lease:
                lease.report(status=429, headers={"retry-after": "600"})
        assert {key.state for key in manager.status().keys} == {"cooldown"}
        empty.admin.delete(f"stable:{{{POOL}}}:pool")
        manager.reset("sk-a")
        for model in ("gpt-4o", "o1"):
            with manager.lease(model=model, max_wait=0):
                pass


def test_the_ready_index_of_an_older_class_holds_nobody_back(empty: Server) -> None:
    """More accounts than one look covers, all refused until tomorrow: when the class is lost they are ready."""
    names = tuple(f"a{n}" for n in range(40))
    clock = [START]
    client = Client(empty, registration(Limits(rpd=1), names), clock)
    for _ in range(40):
        client.ask()
    assert isinstance(client.ask()[0], Refused)
    empty.admin.delete(client.to.keys[1])
    assert isinstance(client.ask()[0], Granted)


def test_real_eviction(tmp_path: Path) -> None:
    """allkeys-lru and too little memory, while threads lease: no call fails, and in the end nothing is held."""
    with Server(str(tmp_path), maxmemory="3mb", maxmemory_policy="allkeys-random") as server:
        until(server.admin.ping)
        with pool(server, limits=Limits(concurrency=4), on_redis_down="wait", max_wait=20.0) as manager:
            stop, calls, failed = threading.Event(), [0], list[BaseException]()

            def fill() -> None:
                with redis.Redis(port=server.port) as client:
                    for number in itertools.count():
                        client.set(f"filler:{number}", "x" * 20_000)
                        if stop.is_set():
                            return

            def lease() -> None:
                try:
                    while not stop.is_set():
                        with manager.lease():
                            calls[0] += 1
                except BaseException as error:
                    failed.append(error)

            threads = [threading.Thread(target=target) for target in (fill, *[lease] * 6)]
            for thread in threads:
                thread.start()
            with suppress(AssertionError):
                until(lambda: failed, 1.5)
            stop.set()
            for thread in threads:
                thread.join(25)
            assert not failed
            assert calls[0] > 0  # (where a class was evicted, its accounts are not granted for 8 s)
            assert server.admin.info("stats")["evicted_keys"] > 100
            server.admin.config_set("maxmemory", "0")
            until(lambda: not manager._worker.pending and live(manager) == 0)


# A server whose clock jumps.


@pytest.mark.parametrize("rule", ["sliding", "bucket", "calendar"])
@pytest.mark.parametrize("hours", [-1, 1, (-1, 1), (1, -1)], ids=["back", "on", "back and on", "on and back"])
def test_a_clock_that_jumps_an_hour(empty: Server, hours: Any, rule: Any) -> None:
    """Ten a minute, asked for each second of real time: a jump back grants nothing more, one forward the limit once
    more, and within two minutes all is as it was."""
    limits = Limits(rpm=10, concurrency=2, rule=rule)
    real, jumped = START, 0
    clock = [START]
    client = Client(empty, registration(limits), clock)
    jumps = dict(zip((65, 200), hours if isinstance(hours, tuple) else (hours,)))
    granted: list[int] = []
    for second in range(420):
        real += 1000
        jumped += 3_600_000 * jumps.get(second, 0)
        clock[0] = real + jumped
        answer = client.ask()[0]
        if isinstance(answer, Granted):
            granted.append(second)
        client.settle()
    assert client.inspect().accounts["a"].live == 0
    per_minute = [sum(start <= at < start + 60 for at in granted) for start in range(360)]
    usual = 20 if rule in ("bucket", "calendar") else 10  # a bucket's minute begins full; a calendar's ends in between
    for start, count in enumerate(per_minute):
        forward = any(start <= at < start + 60 and hour > 0 for at, hour in jumps.items())
        assert count <= usual + 10 * forward, (start, count)
    last = max(jumps) + 125
    assert min(per_minute[last:] or [10]) >= 9
    client.backend.close()


def test_leases_and_waiters_over_a_jump(empty: Server) -> None:
    """Back: leases live on and are renewed. Forward: they are over, settled late, and counted once."""
    clock = [START]
    client = Client(empty, registration(Limits(concurrency=1, tpm=1000, rule="sliding")), clock)
    client.ask()
    clock[0] -= 3_600_000
    assert client.renew() == [True]
    assert isinstance(client.ask(1, Demand("w", (0, 1, 0, 0), 10))[0], Refused)
    assert client.settle() == [0]
    client.ask(1, Demand("w", (0, 1, 0, 0), 10))
    clock[0] += 7_200_000
    ids = tuple(client.held)
    assert [reply.code for reply in client.backend.run(settle(client.to, *ids, tokens=50))] == [1]
    assert [reply.code for reply in client.backend.run(settle(client.to, *ids, tokens=50))] == [2]
    assert client.inspect().accounts["a"].live == 0
    assert isinstance(client.ask()[0], Granted)
    client.backend.close()
