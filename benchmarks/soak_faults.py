"""What goes wrong in a soak: each fault is a function that lets it happen, and ends it in bounded time.

KEEPING leave the state in Redis alone, LOSING lose it. `partition`, where one process alone cannot reach Redis, is left
out of "all" under on_redis_down="local": what that process then grants by itself comes on top of what the others do, so
that the excess is bounded and not 0. No worker is stopped and continued: what it was granted before would leave late.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.soak_worker import MODELS, POOL, Worker
from tests.faults.proxy import Proxy
from tests.faults.servers import Server, until


@dataclass
class World:
    """What can go wrong, and a chance that decides how."""

    server: Server
    proxies: list[Proxy]
    workers: list[Worker]
    replace: Callable[[int], Worker]
    chance: random.Random
    longest_s: float
    killed: list[Worker] = field(default_factory=list)

    def last(self, least_s: float = 0.2) -> None:
        time.sleep(self.chance.uniform(least_s, max(least_s, self.longest_s)))


def cut(world: World) -> None:
    """All connections."""
    for proxy in world.proxies:
        proxy.cut()


def gamble(world: World) -> None:
    """Commands and replies get lost, one in ten each."""
    for proxy in world.proxies:
        proxy.gamble(random.Random(world.chance.random()), before=0.1, after=0.1)
    world.last()
    for proxy in world.proxies:
        proxy.gamble(None)


def delay(world: World) -> None:
    """Each command is late."""
    for proxy in world.proxies:
        proxy.delay_s = world.chance.uniform(0.02, 0.5)
    world.last()
    for proxy in world.proxies:
        proxy.delay_s = 0.0


def refuse(world: World) -> None:
    """No connection is let through."""
    _refuse(world, world.proxies)


def partition(world: World) -> None:
    """The same, for one process only."""
    _refuse(world, [world.chance.choice(world.proxies)])


def _refuse(world: World, proxies: list[Proxy]) -> None:
    for proxy in proxies:
        proxy.refuse()
    world.last()
    for proxy in proxies:
        proxy.admit()


def pause(world: World) -> None:
    """Redis is stopped, and goes on."""
    world.server.pause()
    world.last()
    world.server.resume()


def script_flush(world: World) -> None:
    world.server.admin.script_flush()


def out_of_memory(world: World) -> None:
    """Whatever writes is refused for a second."""
    world.server.admin.config_set("maxmemory", 1)
    time.sleep(1.0)
    world.server.admin.config_set("maxmemory", 0)


def client_kill(world: World) -> None:
    """Redis ends all connections."""
    world.server.admin.client_kill_filter(_type="normal", skipme=True)


def kill_worker(world: World) -> None:
    """With -9; another takes its place."""
    place = world.chance.randrange(len(world.workers))
    world.workers[place].kill()
    world.killed.append(world.workers[place])
    world.workers[place] = world.replace(place)


def restart(world: World) -> None:
    """Redis is killed with -9, and comes again without what it knew."""
    world.server.kill()
    world.last(least_s=0.0)
    world.server.start()
    until(world.server.admin.ping)


def flush_all(world: World) -> None:
    world.server.admin.flushall()


def delete_class(world: World) -> None:
    """The hash of one class, with its meters and leases."""
    world.server.admin.delete(f"stable:{{{POOL}}}:class:{world.chance.choice(MODELS)}")


Fault = Callable[[World], None]
KEEPING: tuple[Fault, ...] = (cut, gamble, delay, refuse, pause, script_flush, out_of_memory, client_kill, kill_worker)
LOSING: tuple[Fault, ...] = (restart, flush_all, delete_class)
FAULTS = {fault.__name__: fault for fault in (*KEEPING, *LOSING, partition)}


def chosen(names: str, on_redis_down: str) -> list[Fault]:
    """The faults of a list of names with commas; of "keeping" or "all", those that are to leave no trace."""
    if names in ("all", "keeping"):
        of_one = () if on_redis_down == "local" else (partition,)
        return [*KEEPING, *(LOSING if names == "all" else ()), *of_one]
    unknown = set(names.split(",")) - set(FAULTS)
    if unknown:
        raise SystemExit(f"no such fault: {', '.join(sorted(unknown))}")
    return [FAULTS[name] for name in names.split(",")]
