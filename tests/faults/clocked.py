"""Workers on a real Redis to whom the time is handed in, and a judge of what they were granted."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from stable_openai import BrokerUnavailable, Exhausted, KeyManager, Limits
from stable_openai._lease import Lease
from stable_openai._worker import ATTENDS_S
from stable_openai.backends import away, failover
from stable_openai.backends.failover import FailoverBackend
from stable_openai.backends.redis import RedisBackend
from tests.faults.servers import Server, until
from tests.test_twins import Charge, Oracle

START = int(time.time()) // 60 * 60_000  # today: the midnights that workers register are those of the real clock
PERIOD_MS = round(ATTENDS_S * 1000)
POOL = "test-clocked"
CLASS = f"stable:{{{POOL}}}:class:-"
HOLD_MS = 900_000


class World:
    """Workers of one pool with one clock; what they were granted is judged by the oracle of the twins."""

    def __init__(
        self, server: Server, limits: Limits, workers: int = 3, keys: int = 2, on_redis_down: Any = "wait"
    ) -> None:
        self.server, self.limits, self.now, self.on_redis_down = server, limits, START, on_redis_down
        self.keys = [f"sk-{n}" for n in range(keys)]
        self.managers: list[KeyManager] = []
        self.held: list[tuple[Lease, Charge]] = []
        self.charges: list[Charge] = []
        self.beats = 0
        for _ in range(workers):
            self.begin()

    def begin(self, url: str = "") -> KeyManager:
        url = url or f"redis://127.0.0.1:{self.server.port}"
        local = self.on_redis_down == "local"
        made = KeyManager(self.keys, url, pool=POOL, limits=self.limits, max_wait=0, on_redis_down=self.on_redis_down)
        made._backend = RedisBackend(url, hasty=local, now=lambda: self.now)
        if local:
            made._backend = FailoverBackend(made._backend, made._worker)
        made._worker.attends, made._worker.attend_at = True, 1e15  # here, and not by the heartbeat
        self.managers.append(made)
        return made

    def lease(self, manager: KeyManager, tokens: int = 10) -> Lease | None:
        lease = manager.lease(tokens=tokens)
        try:
            lease.__enter__()
        except (Exhausted, BrokerUnavailable):
            return None
        self.charges.append(Charge(self.now, lease.key.account, tokens))
        self.held.append((lease, self.charges[-1]))
        return lease

    def settle(self, place: int, tokens: int | None = None) -> None:
        lease, charge = self.held.pop(place)
        if tokens is not None:
            lease.report(tokens=tokens)
            charge.tokens = max(charge.tokens, tokens) if self.limits.charge != "used" else tokens
        lease.__exit__(None, None, None)

    def attend(self) -> None:
        """What the heartbeat does."""
        self.beats += 1
        for manager in self.managers:
            with suppress(BrokerUnavailable):
                manager._do(manager._worker.renew(1e9 * self.beats))
                manager._do(manager._worker.flush())
                manager._do(manager._worker.attend())

    def pass_time(self, ms: int) -> None:
        while ms > 0:
            step = min(ms, PERIOD_MS - self.now % PERIOD_MS)
            self.now += step
            ms -= step
            if self.now % PERIOD_MS == 0:
                self.attend()

    def lose(self, how: str) -> None:
        if how == "flushall":
            self.server.admin.flushall()
        elif how == "class":
            self.server.admin.delete(CLASS)
        else:
            self.server.kill()
            self.server.start()
            until(self.server.admin.ping)

    def kill(self, manager: KeyManager) -> None:
        """It is gone, and tells nobody anything."""
        self.managers.remove(manager)
        self.held = [(lease, charge) for lease, charge in self.held if lease._worker is not manager._worker]
        manager._worker.live.clear()
        manager.close()

    def check(self) -> None:
        if self.charges:
            Oracle(self.limits).check(self.charges)
        if self.limits.concurrency:
            for key in self.keys:
                live = [lease for lease, charge in self.held if lease.api_key == key and self.now < charge.at + HOLD_MS]
                assert len(live) <= self.limits.concurrency

    def close(self) -> None:
        for manager in self.managers:
            manager._worker.live.clear()
            manager.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[World], None]:
    """Has what a worker does without Redis go by a world's clock too."""

    def use(world: World) -> None:
        for module in (away, failover):
            monkeypatch.setattr(module, "monotonic", lambda: world.now / 1000)

    return use
