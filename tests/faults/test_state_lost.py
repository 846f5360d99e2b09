"""Redis loses what it knew: a FLUSHALL, a restart without persistence, an eviction. With the workers alive no limit is
exceeded across that, those of days included; and what only dead workers knew is all that can be.

The time is handed in, so that a minute passes at once; workers attend every 5 s of it.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stable_openai import Limits
from stable_openai._ops import Live, Restore
from tests.faults.clocked import CLASS, World
from tests.faults.servers import Server, until

LOSSES = ("flushall", "class", "restart")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, Server(folder) as server:
        until(server.admin.ping)
        yield server


@pytest.fixture
def make(server: Server) -> Iterator[Callable[..., World]]:
    server.admin.flushall()
    worlds: list[World] = []

    def make(limits: Limits, **options: Any) -> World:
        worlds.append(World(server, limits, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.mark.parametrize("rule", ["bucket", "sliding", "calendar"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("charge", ["reserved", "used"])
def test_no_limit_is_exceeded_across_a_loss(make: Any, rule: Any, loss: str, charge: Any) -> None:
    """Three workers lease at random for some minutes, and the state is lost now and then."""
    chance = random.Random(f"{rule} {loss} {charge}")
    lost = granted = 0
    for _ in range(3 if loss == "restart" else 8):
        limits = Limits(rpm=12, rpd=60, tpm=200, tpd=1500, concurrency=4, rule=rule, charge=charge)
        world = make(limits)
        world.server.admin.flushall()
        for _ in range(120):
            kind = chance.random()
            if kind < 0.55:
                world.lease(chance.choice(world.managers), chance.choice([1, 10, 30]))
            elif kind < 0.8 and world.held:
                world.settle(chance.randrange(len(world.held)), chance.choice([None, None, 5]))
            elif kind < 0.97:
                world.pass_time(chance.choice([50, 500, 2000, 8000, 20_000]))
            elif all(manager._worker._standings for manager in world.managers):
                world.lose(loss)
                lost += 1
            world.check()
        granted += len(world.charges)
        world.close()
    assert lost > 5
    assert granted > 50


def test_a_loss_takes_a_minute_and_gives_none(make: Any) -> None:
    """What is left of the minute is taken for used, and then it refills as always."""
    world = make(Limits(rpm=60), workers=1, keys=1)
    first = world.managers[0]
    assert world.lease(first)
    world.lose("flushall")
    assert world.lease(first) is None
    world.pass_time(1999)
    assert world.lease(first) is None
    world.pass_time(1)
    assert [bool(world.lease(first)) for _ in range(3)] == [True, True, False], "2 s of refill"


def test_what_another_worker_has_seen_of_days_counts_too(make: Any) -> None:
    """An idle worker saw the last of the day's requests: it tells so before anything is granted."""
    world = make(Limits(rpd=5, rule="sliding"), workers=2, keys=1)
    first, other = world.managers
    for manager in (first, other, other, other, other):
        assert world.lease(manager)
        world.settle(0)
    world.lose("flushall")
    assert world.lease(first) is None
    for _ in range(20):
        world.pass_time(1000)
        assert world.lease(first) is None
    world.check()


def test_live_leases_are_restored_and_settled_once(make: Any) -> None:
    world = make(Limits(concurrency=2), workers=2, keys=1)
    first, other = world.managers
    assert world.lease(first)
    assert world.lease(other)
    world.lose("flushall")
    world.attend()
    assert first.status().keys[0].live == 2
    world.pass_time(8000)
    assert world.lease(first) is None, "both slots are taken"
    world.settle(0)
    assert first.status().keys[0].live == 1
    assert world.lease(first)


@pytest.mark.parametrize("loss", ["flushall", "class"])
def test_a_settle_notices_the_loss_itself(make: Any, loss: str, caplog: Any) -> None:
    world = make(Limits(concurrency=2, rpd=9), workers=1, keys=1)
    world.lease(world.managers[0])
    world.lease(world.managers[0])
    world.lose(loss)
    world.settle(0)
    key = world.managers[0].status().keys[0]
    assert (key.live, key.meters[0].used) == (1, pytest.approx(2, abs=0.01))
    assert [record.getMessage().split()[0] for record in caplog.records] == ["state.lost"]


def test_a_restore_that_comes_late_brings_nothing_back(make: Any) -> None:
    """Between what a worker said of its leases and its arrival one of them was settled."""
    world = make(Limits(concurrency=2), workers=1, keys=1)
    manager = world.managers[0]
    lease = world.lease(manager)
    assert lease
    worker = manager._worker
    to = worker.registrations()[0]
    late = Live(lease.id, lease.key.account, lease.key.fingerprint, 10, world.now)
    world.lose("class")
    world.settle(0)
    assert manager._backend.run(Restore(to, worker.ttl_ms, worker.birth_of(to), worker.id, (), (late,)))
    assert manager.status().keys[0].live == 0


def test_what_only_the_dead_knew_is_the_bound(make: Any) -> None:
    """A killed worker's use of the day is granted once more at most, and no more than that."""
    world = make(Limits(rpd=10, rpm=1000, rule="sliding"), workers=2, keys=1)
    first, dead = world.managers
    assert world.lease(first)
    for _ in range(6):
        assert world.lease(dead)
    world.kill(dead)
    world.lose("flushall")
    world.lease(first)
    world.pass_time(70_000)
    granted = sum(world.lease(first) is not None for _ in range(20))
    assert granted == 9, "what the living saw last was one request"


def test_a_new_pool_begins_full(make: Any) -> None:
    """Nothing was lost where nobody knew anything, nor where the last use is days ago."""
    world = make(Limits(rpm=60), workers=1, keys=1)
    manager = world.managers[0]
    world.lease(manager)
    standing = manager._worker._standings["-"]
    world.settle(0)
    world.server.admin.flushall()
    standing.at -= 90_000
    world.attend()
    assert not world.server.admin.exists(CLASS), "what has ended by itself is not begun again"
    assert world.lease(manager)
