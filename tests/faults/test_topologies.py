"""Failovers and moving slots, on real servers, while workers lease and wait.

The judge of what was granted is the clock of the process that got it: a bucket that is charged at those times, and how
many leases were held at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import quote

import pytest
import redis
from redis.cluster import RedisCluster
from redis.sentinel import Sentinel

from stable_openai import BrokerUnavailable, KeyManager, Limits
from stable_openai.testing.limits import Account, Limit
from tests.faults.least_rights import CLUSTER_RIGHTS, PASSWORD, RIGHTS, SAYS_WHO_IT_IS, USER
from tests.faults.servers import (
    HOST,
    NAME,
    Cluster,
    Migration,
    Server,
    Trio,
    private_cluster_of_three,
    private_tls,
    private_tls_sentinel,
    private_trio,
    until,
)
from tests.servers import private_cluster, private_redis
from tests.test_topologies import exercise

SECOND_NS = 10**9
RPM, BURST_S = 6000, 1.0
SLOTS = 2
RATE = Limits(rpm=RPM, burst_s=BURST_S)
HELD = Limits(concurrency=SLOTS)
CALLERS = 4


class Load:
    """Calls without end, of two workers, each in threads and on an event loop of its own."""

    def __init__(self, where: Any, pool: str, limits: Limits, hold_s: float) -> None:
        self.grants: list[tuple[float, float, int]] = []  # from, to, who
        self.errors: list[BaseException] = []
        self._hold_s, self._over = hold_s, threading.Event()
        self._make = lambda: KeyManager(
            ["sk-a"], where, pool=pool, limits=limits, max_wait=30, lease_ttl=5, on_redis_down="wait"
        )
        self.managers: list[KeyManager] = []
        self._threads: list[threading.Thread] = []
        for _ in range(2):
            self.start_worker()

    def start_worker(self) -> None:
        """One more of them."""
        manager, first = self._make(), 100 * len(self.managers)
        self.managers.append(manager)
        threads = [threading.Thread(target=self._work, args=(manager, first + n)) for n in range(CALLERS)]
        threads.append(threading.Thread(target=asyncio.run, args=(self._crowd(manager, first + CALLERS),)))
        for thread in threads:
            thread.start()
        self._threads += threads

    def _work(self, manager: KeyManager, who: int) -> None:
        try:
            while not self._over.is_set():
                with manager.lease():
                    got = time.monotonic()
                    time.sleep(self._hold_s)  # what a call to the upstream takes
                    self.grants.append((got, time.monotonic(), who))
        except BaseException as error:
            self.errors.append(error)

    async def _crowd(self, manager: KeyManager, first: int) -> None:
        await asyncio.gather(*(self._awork(manager, first + n) for n in range(CALLERS)))

    async def _awork(self, manager: KeyManager, who: int) -> None:
        try:
            while not self._over.is_set():
                async with manager.lease():
                    got = time.monotonic()
                    await asyncio.sleep(self._hold_s)
                    self.grants.append((got, time.monotonic(), who))
        except BaseException as error:
            self.errors.append(error)

    def go_on(self, count: int = 1) -> None:
        """Wait until every caller has been served so often from now on."""
        since = len(self.grants)

        def served() -> bool:
            whose = [who for _, _, who in tuple(self.grants[since:])]
            return bool(self.errors) or (
                len({*whose}) == 2 * CALLERS * len(self.managers) and min(map(whose.count, whose)) >= count
            )

        until(served, 25)
        assert not self.errors

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads)
        for manager in self.managers:
            manager.close()
        assert not self.errors
        self.grants.sort()

    def refused(self) -> int:
        """How many of the grants an upstream with the limits of RATE would have refused."""
        account = Account(Limit(rpm=RPM, burst_s=BURST_S), 60 * SECOND_NS, 86_400 * SECOND_NS)
        refused = 0
        for got, _, _ in self.grants:
            if account.admit(0, int(got * SECOND_NS)) is not None:
                refused += 1
        return refused

    def most_at_once(self) -> int:
        events = sorted([(got, 1) for got, _, _ in self.grants] + [(end, -1) for _, end, _ in self.grants])
        most = now = 0
        for _, step in events:
            now += step
            most = max(most, now)
        return most

    def __repr__(self) -> str:
        gap = max(after[0] - before[0] for before, after in zip(self.grants, self.grants[1:]))
        return f"{len(self.grants)} grants ({self.refused()} over, {self.most_at_once()} at once, none for {gap:.1f} s)"


class Waiters:
    """A slot that one worker holds, and for which a thread and a coroutine of another two wait."""

    def __init__(self, where: Any, pool: str) -> None:
        self.managers = [
            KeyManager(["sk-a"], where, pool=pool, limits=HELD, max_wait=90, on_redis_down="wait") for _ in range(3)
        ]
        self.served: list[float] = []
        self.errors: list[BaseException] = []
        self._slots = ExitStack()
        for _ in range(SLOTS):
            self._slots.enter_context(self.managers[0].lease())
        self._threads = [
            threading.Thread(target=self._wait, args=(self.managers[1],)),
            threading.Thread(target=asyncio.run, args=(self._await(self.managers[2]),)),
        ]
        for thread in self._threads:
            thread.start()

    def _wait(self, manager: KeyManager) -> None:
        try:
            with manager.lease():
                self.served.append(time.monotonic())
        except BaseException as error:
            self.errors.append(error)

    async def _await(self, manager: KeyManager) -> None:
        try:
            async with manager.lease():
                self.served.append(time.monotonic())
            await manager.aclose()
        except BaseException as error:
            self.errors.append(error)

    def stop(self) -> None:
        """Free the slots, and wait until both have been served or (without a server) have given up."""
        self._slots.close()
        for thread in self._threads:
            thread.join()
        for manager in self.managers:
            manager.close()
            manager._worker.pending.clear()  # where its servers are gone, nobody is left to be told

    def are_told(self) -> float:
        """Free the slots; returns in how many seconds both had been served."""
        freed = time.monotonic()
        self.stop()
        assert not self.errors
        assert len(self.served) == 2
        return max(self.served) - freed


def listeners(server: Server) -> int:
    """How many connections a server keeps waiting for a wake."""
    return sum("b" in row["flags"] and row["cmd"] == "blpop" for row in server.admin.client_list())


@contextmanager
def sentinel_client(trio: Trio) -> Iterator[Any]:
    sentinel = Sentinel(trio.addresses, socket_timeout=1)
    with sentinel.master_for(NAME) as client:
        yield client
    for one in sentinel.sentinels:
        one.close()


@pytest.fixture
def loads() -> Iterator[list[Load | Waiters]]:
    """What a test has begun is stopped, also where it failed: what goes on without its servers would hold up others."""
    made: list[Load | Waiters] = []
    yield made
    for load in made:
        load.stop()


KILLED, DEMOTED, HANGS = "killed", "demoted", "hangs"


@pytest.mark.parametrize("how", [KILLED, DEMOTED, HANGS])
def test_a_sentinel_promotes_the_replica(how: str, loads: list[Load | Waiters]) -> None:
    """A primary that is demoted by hand goes on for ten seconds, until its sentinels tell it."""
    with private_trio() as trio, sentinel_client(trio) as client:
        old, new = trio.servers
        waiters = Waiters(client, "test-waiters")
        rate = Load(client, "test-rate", RATE, 0.0)
        held = Load(client, "test-held", HELD, 0.005)
        loads += [waiters, rate, held]
        until(lambda: listeners(old) >= 2)
        rate.go_on()
        held.go_on()
        {KILLED: old.kill, DEMOTED: trio.fail_over, HANGS: old.pause}[how]()
        until(lambda: trio.primary is new and new.role() == "master")
        rate.start_worker()
        held.start_worker()
        rate.go_on()
        held.go_on()
        if how == HANGS:
            old.resume()  # it still believes that it is the primary
            rate.go_on()
            held.go_on()
            until(lambda: old.role() == "slave", within=60)  # its sentinels have told it
        for manager in rate.managers + held.managers:
            known = manager._backend._client.connection_pool.sentinel_manager.sentinels
            assert len({*map(id, known)}) == 3, "redis-py has lost one of the sentinels"
        rate.stop()
        held.stop()
        until(lambda: listeners(new) >= 2)
        took = waiters.are_told()
        print(how, rate, held, f"woken in {took * 1000:.0f} ms")
        assert took < 2.5
        lost_s = 2.0 if how == DEMOTED else 0.25
        assert rate.refused() <= RPM / 60 * lost_s, "only what the replica could not know"
        assert held.most_at_once() <= 2 * SLOTS


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Cluster, Any]]:
    """Its workers are users with the least rights."""
    with private_cluster_of_three() as made:
        nodes, rights = [*made.nodes, made.replica], f"{RIGHTS} {CLUSTER_RIGHTS}".split()
        for node in nodes:
            node.admin.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", *rights)
        with RedisCluster(host=HOST, port=made.nodes[2].port, username=USER, password=PASSWORD) as client:
            yield made, client
        alive = [node for node in nodes if not node.has_ended()]
        assert {row["object"] for node in alive for row in node.admin.acl_log()} <= SAYS_WHO_IT_IS


def redirected(server: Server) -> int:
    """How often a server has said so of a slot that moves: Redis 6.2 answers ASK where later ones answer TRYAGAIN."""
    told = server.admin.info("errorstats")
    return sum(int(told.get(f"errorstat_{kind}", {"count": 0})["count"]) for kind in ("TRYAGAIN", "ASK"))


def test_a_slot_moves(cluster: tuple[Cluster, Any], loads: list[Load | Waiters]) -> None:
    """What names several keys of a slot that moves is answered TRYAGAIN until they all have arrived."""
    made, client = cluster
    source, target = made.nodes[1:]
    pools = [made.pool_on(source, f"test-{name}") for name in ("waiters", "rate", "held")]
    waiters = Waiters(client, pools[0])
    rate = Load(client, pools[1], RATE, 0.0)
    held = Load(client, pools[2], HELD, 0.005)
    loads += [waiters, rate, held]
    until(lambda: listeners(source) >= 2)
    rate.go_on()
    held.go_on()
    for pool in pools:
        move = Migration(made, made.slot(f"stable:{{{pool}}}:pool"), source, target)
        before = redirected(source), redirected(target)
        move.begin()
        until(lambda: redirected(source) > before[0])  # noqa: B023 - called at once
        move.move(2)
        move.move()
        until(lambda: redirected(target) > before[1])  # noqa: B023
        move.end()
    rate.go_on()
    held.go_on()
    rate.stop()
    held.stop()
    until(lambda: listeners(target) >= 2)
    took = waiters.are_told()
    print(rate, held, f"woken in {took * 1000:.0f} ms")
    assert took < 2.5
    assert rate.refused() == 0
    assert held.most_at_once() <= SLOTS


def test_a_primary_of_a_cluster_is_killed(cluster: tuple[Cluster, Any], loads: list[Load | Waiters]) -> None:
    made, client = cluster
    old, new = made.nodes[0], made.replica
    pools = [made.pool_on(old, f"test-{name}") for name in ("waiters", "rate", "held")]
    waiters = Waiters(client, pools[0])
    rate = Load(client, pools[1], RATE, 0.0)
    held = Load(client, pools[2], HELD, 0.005)
    loads += [waiters, rate, held]
    until(lambda: listeners(old) >= 2)
    rate.go_on()
    held.go_on()
    old.kill()
    until(lambda: new.role() == "master")
    rate.go_on()
    held.go_on()
    rate.stop()
    held.stop()
    until(lambda: listeners(new) >= 2)
    took = waiters.are_told()
    print(rate, held, f"woken in {took * 1000:.0f} ms")
    assert took < 2.5
    assert rate.refused() <= RPM / 60 * 0.25, "only what the replica could not know"
    assert held.most_at_once() <= 2 * SLOTS


def test_a_cluster_that_is_gone() -> None:
    """redis-py's error for that is none of its RedisError."""
    with private_cluster() as port, RedisCluster(host=HOST, port=port) as client:
        manager = KeyManager(["sk-a"], client, pool="test-gone", on_redis_down="raise")
        manager.check()
    with pytest.raises(BrokerUnavailable):
        manager.check()
    with pytest.raises(BrokerUnavailable):
        asyncio.run(manager.acheck())
    manager.close()


def test_tls() -> None:
    with private_tls() as tls:
        url, file = f"rediss://localhost:{tls.server.port}", tls.certificate.file
        exercise(f"{url}?ssl_ca_certs={file}")
        with redis.Redis(port=tls.server.port, ssl=True, ssl_ca_certs=file) as client:
            exercise(client, "test-tls")
            waiters = Waiters(client, "test-waiters")
            until(lambda: listeners(tls.server) >= 2)
            assert waiters.are_told() < 2.5
        manager = KeyManager(["sk-a"], url, pool="test-tls", on_redis_down="raise")  # which trusts nobody like that
        with pytest.raises(BrokerUnavailable):
            manager.check()
        with pytest.raises(BrokerUnavailable):
            asyncio.run(manager.acheck())
        manager.close()


def test_tls_of_a_primary_behind_a_sentinel() -> None:
    with private_tls_sentinel() as (tls, port):
        sentinel = Sentinel([(HOST, port)])
        with sentinel.master_for(NAME, ssl=True, ssl_ca_certs=tls.certificate.file) as client:
            exercise(client)
        for one in sentinel.sentinels:
            one.close()


def test_tls_of_a_cluster() -> None:
    with private_tls(cluster_enabled="yes", tls_cluster="yes") as tls:
        tls.server.admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        until(lambda: tls.server.admin.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        port, file = tls.server.port, tls.certificate.file
        with RedisCluster.from_url(f"rediss://{HOST}:{port}?ssl_ca_certs={file}") as client:
            exercise(client, "test-url")
        with RedisCluster(host=HOST, port=port, ssl=True, ssl_ca_certs=file) as client:
            exercise(client, "test-client")


@pytest.mark.parametrize("user", ["", "least"])
def test_a_password_with_special_characters(user: str, caplog: pytest.LogCaptureFixture) -> None:
    with private_redis() as url, redis.Redis.from_url(url) as admin:
        if user:
            admin.execute_command("ACL", "SETUSER", user, "on", f">{PASSWORD}", *RIGHTS.split())
        else:
            admin.config_set("requirepass", PASSWORD)
        named = url.replace("unix://", f"unix://{user}:{quote(PASSWORD, safe='')}@")
        exercise(named)
        with redis.Redis.from_url(url, username=user or None, password=PASSWORD) as client:
            exercise(client, "test-client")
        manager = KeyManager(["sk-a"], named.replace("@", "x@"), pool="test-password", on_redis_down="raise")
        with pytest.raises(BrokerUnavailable) as caught:
            manager.check()
        told = "".join(traceback.format_exception(caught.value)) + repr(manager) + caplog.text
        assert PASSWORD not in told
        assert quote(PASSWORD, safe="") not in told
        manager.close()
