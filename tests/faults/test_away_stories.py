"""Stories of workers whose Redis goes away, in handed time: whatever comes in between, no limit is exceeded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stable_openai import KeyManager, Limits
from stable_openai._ops import Acquire
from tests.faults.clocked import World, clock
from tests.faults.proxy import Proxy
from tests.faults.servers import Server, until

__all__ = ["clock"]

FEW = Limits(rpm=10, rule="sliding")
DAY = Limits(rpd=10, rule="sliding")
SLOTS = Limits(concurrency=3)
BY_USE = Limits(tpd=100, rule="sliding", charge="used")


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, Server(folder) as server:
        until(server.admin.ping)
        yield server


@pytest.fixture
def world(server: Server, clock: Callable[[World], None]) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(limits: Limits, workers: int, keys: int) -> World:
        made.append(World(server, limits, workers, keys, "local"))
        clock(made[0])
        return made[0]

    yield make
    if server.has_ended():
        server.start()
    until(server.admin.ping)
    made[0].close()


def drain(world: World, manager: KeyManager, tokens: int = 1) -> int:
    """All that it is granted."""
    count = 0
    while world.lease(manager, tokens):
        count += 1
        assert count < 100
    return count


def attend(manager: KeyManager) -> None:
    manager._do(manager._worker.attend())


def come_back(server: Server) -> None:
    server.start()
    until(server.admin.ping)


@pytest.mark.parametrize("where", ["in Redis", "here"])
def test_leases_that_outlive_their_ttl_are_renewed_here(world: Any, server: Server, where: str) -> None:
    one = world(SLOTS, 1, 1)
    (manager,) = one.managers
    one.lease(manager)
    if where == "in Redis":
        drain(one, manager)
    one.pass_time(30_000)
    server.kill()
    drain(one, manager)
    one.pass_time(70_000)
    assert drain(one, manager) == 0
    one.check()


def test_the_long_leases_of_others_keep_their_slots(world: Any, server: Server) -> None:
    one = world(SLOTS, 2, 2)
    idle, busy = one.managers
    one.lease(idle)
    one.settle(0)
    assert drain(one, busy) == 6
    one.pass_time(30_000)
    server.kill()
    one.lease(idle)
    one.pass_time(70_000)
    assert drain(one, idle) == 0
    one.check()


def test_days_are_known_from_before_when_redis_goes_again_and_again(world: Any, server: Server) -> None:
    one = world(DAY, 1, 1)
    (manager,) = one.managers
    one.lease(manager)
    one.pass_time(30_000)
    for granted in (9, 0, 0):
        server.kill()
        assert drain(one, manager) == granted
        one.pass_time(2000)
        come_back(server)
        one.attend()
        assert manager._backend.kind == "redis"
    one.check()


def test_days_that_nobody_has_seen_are_not_taken_for_unused(world: Any, server: Server) -> None:
    """The first use of a class falls into the time when Redis is away."""
    with Proxy(server.address) as proxy:
        one = world(DAY, 0, 1)
        first, other = one.begin(proxy.url), one.begin()
        attend(first)
        one.now += 15_000
        attend(first)
        assert drain(one, other) == 10
        one.now += 5000
        attend(first)
        proxy.refuse()
        assert drain(one, first) == 0
        attend(first)
        proxy.admit()
        attend(first)
        one.pass_time(5000)
        server.kill()
        assert drain(one, first) == 0
        one.check()


def test_one_that_others_have_not_heard_of_has_nothing(world: Any, server: Server) -> None:
    one = world(FEW, 1, 1)
    (old,) = one.managers
    one.lease(old)
    one.pass_time(30_000)
    joiner = one.begin()
    one.now += 1
    attend(joiner)
    one.lease(joiner)
    one.now += 1000
    server.kill()
    for _ in range(2):
        one.lease(old)
        one.lease(joiner)
        one.now += 62_000
    drain(one, old)
    assert drain(one, joiner) == 0
    one.check()


@pytest.mark.parametrize(
    ("seen", "noticed"), [((9800, 10_050), (9900, 10_100)), ((5000, 5000), (8000, 12_000)), ((0, 0), (9900, 10_100))]
)
def test_one_has_left_and_the_others_notice_at_different_times(
    world: Any, server: Server, seen: tuple[int, int], noticed: tuple[int, int]
) -> None:
    one = world(FEW, 3, 3)
    for manager in one.managers:
        one.lease(manager)
    one.pass_time(30_000)
    gone, *rest = sorted(one.managers, key=lambda manager: manager._worker.id)
    one.kill(gone)
    left = one.now
    for manager in rest:
        attend(manager)
    for manager, at in zip(rest, seen):
        one.now = left + at
        attend(manager)
    server.kill()
    for manager, at in zip(rest, noticed):
        one.now = left + at
        one.lease(manager)
    one.now += 62_000
    for manager in rest:
        drain(one, manager)
    one.check()


def test_one_that_stood_still_waits(world: Any, server: Server) -> None:
    """It has been dropped from the roster, and does not know."""
    one = world(FEW, 2, 1)
    alive, still = one.managers
    one.lease(alive)
    one.lease(still)
    one.pass_time(70_000)
    for _ in range(8):
        one.now += 5000
        attend(alive)
    server.kill()
    one.lease(alive)
    one.lease(still)
    one.now += 62_000
    assert drain(one, alive) == 10
    assert drain(one, still) == 0
    one.check()


def test_a_lease_that_is_granted_while_redis_comes_back_is_told(world: Any, server: Server) -> None:
    one = world(Limits(concurrency=2), 1, 1)
    (manager,) = one.managers
    one.lease(manager)
    one.settle(0)
    one.pass_time(30_000)
    server.kill()
    one.lease(manager)
    one.settle(0)
    backend: Any = manager._backend
    run = backend.run

    def then_redis_is_back(op: Any) -> Any:
        reply = run(op)
        if type(op) is Acquire and backend.kind == "local":
            backend.run = run
            come_back(server)
            attend(manager)
        return reply

    backend.run = then_redis_is_back
    assert one.lease(manager)
    one.now += 9000
    drain(one, manager)
    one.check()


def test_leases_that_expired_meanwhile_are_live_again(world: Any, server: Server) -> None:
    with Proxy(server.address) as proxy:
        one = world(SLOTS, 0, 1)
        manager = one.begin(proxy.url)
        assert drain(one, manager) == 3
        one.pass_time(30_000)
        proxy.refuse()
        one.lease(manager)
        one.now += 70_000
        proxy.admit()
        one.pass_time(15_000)
        assert manager._backend.kind == "redis"
        assert drain(one, manager) == 0
        one.check()


@pytest.mark.parametrize("used_before", [0, 1])
def test_what_ended_meanwhile_is_charged_though_redis_has_lost_its_lease(
    world: Any, server: Server, used_before: int
) -> None:
    one = world(BY_USE, 1, 1)
    (manager,) = one.managers
    one.pass_time(1000)
    for _ in range(used_before):
        one.lease(manager, 10)
        one.settle(0, 10)
    one.pass_time(30_000)
    for _ in range(8):
        one.lease(manager, 10)
    server.kill()
    for _ in range(8):
        one.settle(0, 10)
    come_back(server)
    attend(manager)
    one.pass_time(20_000)
    assert drain(one, manager, 10) == 2 - used_before
    one.check()
