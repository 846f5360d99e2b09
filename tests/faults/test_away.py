"""Redis is away: calls go on with this worker's share, wait, or raise; when it is back, what was used is told once."""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_openai import BrokerUnavailable, Exhausted, KeyManager, Limits
from stable_openai._limits import quota
from stable_openai.backends.away import Seat, deal, part
from stable_openai.backends.redis import script
from tests.faults.clocked import World, clock
from tests.faults.proxy import CUT_AFTER, Proxy
from tests.faults.servers import Server, until

__all__ = ["clock"]

POOL = "test-away"
MANY = Limits(rpm=60_000, tpm=10**9, rpd=10**6, day_rule="sliding")


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, Server(folder) as server:
        until(server.admin.ping)
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    for verb in ("restore", "attend"):  # or the reply that is lost says NOSCRIPT
        server.admin.script_load(script(verb)[0])
    with Proxy(server.address) as proxy:
        yield proxy


@pytest.fixture
def make(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., KeyManager]]:
    """Makes managers that have had their first contact, and know their place (without the ten seconds' wait for it)."""
    monkeypatch.setattr("stable_openai.backends.failover.IN_FORCE_S", 0.0)
    made: list[KeyManager] = []

    def one(limits: Limits = MANY, proxy: Proxy | None = None, **options: Any) -> KeyManager:
        where = proxy.url if proxy else f"redis://127.0.0.1:{server.port}"
        manager = KeyManager(["sk-a", "sk-b"], where, pool=POOL, limits=limits, **{"max_wait": 5.0, **options})
        made.append(manager)
        with manager.lease():
            pass
        if manager._worker.on_redis_down == "local":
            until(lambda: manager._backend._in_force)
        return manager

    yield one
    server.resume()
    for manager in made:
        manager.close()


def take(manager: KeyManager, colour: str = "sync", tokens: int = 1) -> float:
    """One call; how long it took, in seconds."""

    async def call() -> None:
        async with manager.lease(tokens=tokens):
            pass

    began = time.monotonic()
    if colour == "async":
        asyncio.run(call())
    else:
        with manager.lease(tokens=tokens):
            pass
    return time.monotonic() - began


def used(manager: KeyManager, meter: str = "rpd") -> float:
    return sum(row.used for key in manager.status().keys for row in key.meters if row.limit == meter)


def live(manager: KeyManager) -> int:
    return sum(key.live for key in manager.status().keys)


def is_back(manager: KeyManager) -> bool:
    return manager._backend.kind == "redis"


@pytest.mark.parametrize("colour", ["sync", "async"])
@pytest.mark.parametrize("how", ["hangs", "is gone"])
def test_calls_go_on_and_what_they_used_is_told(
    make: Any, server: Server, colour: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make()
    (server.pause if how == "hangs" else server.kill)()
    assert take(manager, colour) < 0.9
    assert max(take(manager, colour) for _ in range(20)) < 0.3
    assert manager.status().backend == "local"
    assert repr(manager).endswith("backend='local')")
    assert len([record for record in caplog.records if record.name == "stable_openai.redis"]) == 1
    (server.resume if how == "hangs" else server.start)()
    until(lambda: is_back(manager))
    assert manager.status().backend == "redis"
    assert used(manager) == pytest.approx(22, abs=0.01), "of days, the one that was seen before too"
    events = [record.getMessage().split()[0] for record in caplog.records if record.name == "stable_openai.redis"]
    assert events == ["redis.away", "redis.back"]
    assert live(manager) == 0


@pytest.mark.parametrize("colour", ["sync", "async"])
@pytest.mark.parametrize("how", ["hangs", "is gone"])
def test_raise(make: Any, server: Server, colour: str, how: str) -> None:
    manager = make(on_redis_down="raise")
    (server.pause if how == "hangs" else server.kill)()
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        take(manager, colour)
    assert time.monotonic() - began < 0.9
    manager._worker.live.clear()


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_wait(make: Any, server: Server, colour: str) -> None:
    manager = make(Limits(rpm=60_000), on_redis_down="wait", max_wait=30.0)
    server.kill()
    threading.Timer(1.0, server.start).start()
    assert take(manager, colour) > 0.5
    until(server.admin.ping)
    server.kill()
    began = time.monotonic()
    with pytest.raises(Exhausted, match="Redis cannot be reached") as raised:
        manager.lease(max_wait=2.5).__enter__()
    assert raised.value.reason == "redis"
    assert time.monotonic() - began < 4.0


def test_who_was_never_there_waits(server: Server) -> None:
    server.kill()
    manager = KeyManager(["sk-a"], f"redis://127.0.0.1:{server.port}", pool=POOL, max_wait=20.0)
    with pytest.raises((BrokerUnavailable, Exhausted)):
        manager.lease(max_wait=0.5).__enter__()
    threading.Timer(0.5, server.start).start()
    take(manager)
    assert manager.status().backend == "redis"
    manager.close()


def test_who_has_just_come_waits_though_it_seems_to_be_alone(server: Server) -> None:
    """Others may have come since it looked."""
    manager = KeyManager(["sk-a"], f"redis://127.0.0.1:{server.port}", pool=POOL, max_wait=20.0)
    take(manager)
    until(lambda: manager._backend._newest)
    server.kill()
    with pytest.raises((BrokerUnavailable, Exhausted)):
        manager.lease(max_wait=0.5).__enter__()
    assert is_back(manager)
    server.start()
    manager.close()


def test_ten_thousand_coroutines_go_on(make: Any, server: Server) -> None:
    manager = make(max_wait=60.0, limits=Limits(concurrency=5000))

    async def call() -> None:
        async with manager.lease():
            await asyncio.sleep(0)

    async def main() -> None:
        first = [asyncio.create_task(call()) for _ in range(5000)]
        await asyncio.sleep(0.05)
        server.pause()
        await asyncio.gather(*first, *(call() for _ in range(5000)))

    asyncio.run(main())
    server.resume()
    until(lambda: is_back(manager))
    until(lambda: live(manager) == 0)


# Leases across the borders.


@pytest.mark.parametrize("how", ["hangs", "is gone"])
def test_leases_are_settled_once_on_whichever_side(make: Any, server: Server, how: str) -> None:
    manager = make(limits=Limits(concurrency=3, rpd=1000, tpd=10**6, day_rule="sliding"))
    before, over = manager.lease(tokens=10), manager.lease(tokens=10)
    before.__enter__()
    over.__enter__()
    (server.pause if how == "hangs" else server.kill)()
    during, after = manager.lease(tokens=10), manager.lease(tokens=10)
    during.__enter__()
    after.__enter__()
    assert live(manager) == 4
    before.report(tokens=50)
    for lease in (before, during):
        lease.__exit__(None, None, None)
    assert live(manager) == 2
    (server.resume if how == "hangs" else server.start)()
    until(lambda: is_back(manager))
    manager._do(manager._worker.flush())
    assert live(manager) == 2
    after.report(tokens=30)
    for lease in (over, after):
        lease.__exit__(None, None, None)
    assert live(manager) == 0
    assert used(manager) == pytest.approx(5, abs=0.01)
    assert used(manager, "tpd") == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("times", [1, 3])
def test_what_was_used_is_charged_once_whatever_replies_are_lost(make: Any, proxy: Proxy, times: int) -> None:
    manager = make(proxy=proxy)
    proxy.refuse()
    for _ in range(7):
        take(manager)
    proxy.meet("restore", CUT_AFTER, times)
    proxy.admit()
    until(lambda: is_back(manager))
    assert proxy.met
    assert used(manager) == pytest.approx(8, abs=0.01)


def test_admin_says_that_redis_is_away(make: Any, server: Server) -> None:
    manager = make()
    server.kill()
    take(manager)
    with pytest.raises(BrokerUnavailable, match="away"):
        manager.disable("sk-a")
    server.start()
    until(lambda: is_back(manager))
    manager.disable("sk-a")


def test_who_closes_tells_what_it_used(make: Any, server: Server) -> None:
    manager, other = make(), make(on_redis_down="wait")
    server.pause()
    for _ in range(5):
        take(manager)
    server.resume()
    manager.close()
    assert used(other) == pytest.approx(7, abs=0.01)
    assert server.admin.zcard(f"stable:{{{POOL}}}:roster") <= 2, "it has left: the other one, and when that was"


def test_who_has_no_share_says_so(make: Any, server: Server) -> None:
    manager = make()
    manager._backend._in_force = Seat(5, 6, True)
    manager._backend._newest = (Seat(5, 6, True), 0.0)
    manager._worker.limits = Limits(rpm=2)
    manager._worker.hold(list(manager._worker.keys.values()))
    server.kill()
    with pytest.raises(Exhausted, match="other workers have the keys") as raised:
        manager.lease(max_wait=1.5).__enter__()
    assert raised.value.reason == "elsewhere"


# Shares.

SEATS = st.integers(1, 9).flatmap(lambda size: st.tuples(st.just(size), st.booleans()))


@given(SEATS, st.integers(1, 12))
def test_accounts_are_dealt_once(seats: tuple[int, bool], count: int) -> None:
    size, alike = seats
    accounts = [f"a{n}" for n in range(count)]
    dealt = [deal(accounts, Seat(rank, size, alike)) for rank in range(size)]
    for account in accounts:
        shares = [share[account] for share in dealt if account in share]
        assert sorted(shares) == [(place, len(shares)) for place in range(len(shares))]
        assert len(shares) == 1 or count < size or not alike
    assert all(share for share in dealt)


@given(
    st.integers(1, 9),
    st.fixed_dictionaries(
        {name: st.sampled_from([None, 1, 2, 7, 60, 10**12]) for name in ("rpm", "rpd", "tpm", "tpd", "concurrency")}
    ),
    st.sampled_from(["bucket", "sliding", "calendar"]),
    st.sampled_from([None, 1, 10]),
)
def test_the_parts_are_no_more_than_the_whole(of: int, limits: dict[str, int], rule: Any, burst: Any) -> None:
    whole = quota(Limits(**limits, rule=rule, burst_s=burst), 0.25)
    parts = [part(whole, place, of) for place in range(of)]
    assert part(whole, 0, 1) == whole
    for number in (0, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17):
        is_shared = number % 4 == 3 or number == 0 or whole[2 + (number - 2) // 4 * 4] == 1
        if is_shared:
            assert sum(one[number] for one in parts if one) <= whole[number] * (1 + 1e-12)
    assert [bool(one) for one in parts] == sorted([bool(one) for one in parts], reverse=True), "the low ranks have more"


# Nothing is exceeded.


@pytest.mark.parametrize("rule", ["bucket", "sliding", "calendar"])
@pytest.mark.parametrize("charge", ["reserved", "used"])
@pytest.mark.parametrize("keys", [2, 5])
def test_no_limit_is_exceeded_while_redis_is_away_for_all(
    server: Server, clock: Any, rule: Any, charge: Any, keys: int
) -> None:
    """Three workers lease at random, and Redis goes and comes, at times without what it knew."""
    chance = random.Random(f"{rule} {charge} {keys}")
    granted = left = 0
    for _ in range(4):
        server.admin.flushall()
        limits = Limits(rpm=12, rpd=100, tpm=300, tpd=3000, rule=rule, charge=charge)
        world = World(server, limits, 3, keys, "local")
        clock(world)
        for manager in world.managers:
            world.lease(manager)
        world.pass_time(30_000)
        away = False
        for _ in range(100):
            kind = chance.random()
            if kind < 0.5:
                granted += world.lease(chance.choice(world.managers), chance.choice([1, 10, 30])) is not None and away
            elif kind < 0.75 and world.held:
                world.settle(chance.randrange(len(world.held)), chance.choice([None, None, 5]))
            elif kind < 0.95:
                world.pass_time(chance.choice([50, 500, 2000, 8000, 20_000, 70_000]))
            elif away:
                server.start()
                until(server.admin.ping)
                away = False
                world.attend()
            else:
                server.kill()
                away = True
                left += 1
            world.check()
        if away:
            server.start()
            until(server.admin.ping)
        world.close()
    assert granted > 10
    assert left > 5


def test_under_a_partition_the_excess_is_at_most_the_share_that_is_cut_off(server: Server, clock: Any) -> None:
    world = World(server, Limits(rpm=40, rule="sliding"), 1, 4, "local")
    clock(world)
    with Proxy(server.address) as proxy:
        cut, other = world.begin(proxy.url), world.managers[0]
        for manager in (cut, other):
            world.lease(manager)
        world.pass_time(70_000)
        proxy.refuse()
        counts = {id(cut): 0, id(other): 0}
        for _ in range(30):
            for manager in (cut, other):
                while world.lease(manager):
                    counts[id(manager)] += 1
            world.pass_time(2000)
        assert counts[id(other)] == 4 * 40, "those who see Redis have the whole"
        assert counts[id(cut)] == 0, "of the minute before nothing is left"
        world.pass_time(10_000)
        while world.lease(cut):
            counts[id(cut)] += 1
        assert counts[id(cut)] == 2 * 40, "two of four keys fall to one of two workers"
        proxy.admit()
        world.attend()
        assert cut._backend.kind == "redis"
        world.close()


def test_who_is_back_first_waits_for_what_the_others_used(server: Server, clock: Any) -> None:
    world = World(server, Limits(rpm=40, rule="sliding"), 0, 2, "local")
    clock(world)
    with Proxy(server.address) as one, Proxy(server.address) as two:
        first, other = world.begin(one.url), world.begin(two.url)
        for manager in (first, other):
            assert world.lease(manager)
        world.pass_time(70_000)
        for proxy in (one, two):
            proxy.refuse()
        for manager in (first, other):
            assert world.lease(manager) is None, "of the minute before nothing is left"
        world.pass_time(65_000)
        while world.lease(other):
            pass
        one.admit()
        first._do(first._worker.attend())
        assert first._backend.kind == "redis"
        assert other._backend.kind == "local"
        assert world.lease(first) is None
        with pytest.raises(Exhausted, match="has just come back"):
            first.lease(max_wait=1.5).__enter__()
        two.admit()
        other._do(other._worker.attend())
        world.now += 2000
        while world.lease(first):
            pass
        world.check()
        assert len(world.charges) == 2 + 40 + 40, "one key for each, and then what was left of the other"
        world.close()


def test_slots_of_others_are_taken_until_their_leases_have_expired(server: Server, clock: Any) -> None:
    world = World(server, Limits(concurrency=3), 2, 2, "local")
    clock(world)
    first, other = world.managers
    for manager in (first, first, other, other):
        assert world.lease(manager)
    world.pass_time(15_000)
    server.kill()
    for manager in (first, other):
        while world.lease(manager):
            pass
    world.check()
    assert len(world.held) == 4, "no slot is known to be free"
    world.settle(0)
    world.settle(0)
    assert not all(world.lease(manager) is None for manager in (first, other)), "but for one's own"
    world.check()
    world.now += 61_000
    assert world.lease(other)
    assert world.lease(first)
    server.start()
    until(server.admin.ping)
    world.close()
