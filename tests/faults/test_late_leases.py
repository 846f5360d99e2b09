"""A lease whose reply was lost is answered again when Redis can be reached again; meanwhile its meter has refilled."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from typing import Any

from stable_openai import INJECTED, Key, KeyManager, Limits, stable
from stable_openai.testing import FakeOpenAI, Limit
from tests.faults.proxy import Proxy
from tests.faults.servers import Server, until

LIMITS: dict[str, Any] = {"rpm": 600, "burst_s": 1.0, "rule": "bucket"}
OUTAGE_S = 2.5


def test_leases_granted_before_an_outage_and_known_after_it_exceed_nothing() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="stable-openai-") as folder,
        Server(folder) as server,
        FakeOpenAI(keys=["sk-a"], limits=Limit(**LIMITS)) as fake,
    ):
        until(server.admin.ping)
        with Proxy(server.address) as proxy:
            managers = [
                KeyManager([Key("sk-a", base_url=fake.url)], proxy.url, pool="test-late", limits=Limits(**LIMITS))
                for _ in range(7)
            ]
            calls = [_caller(manager) for manager in managers]
            _run(calls)  # registers
            time.sleep(1)
            proxy.gamble(random.Random(1), after=1.0)
            first = [threading.Thread(target=call) for call in calls]
            for thread in first:
                thread.start()
            time.sleep(0.2)
            proxy.refuse()
            time.sleep(OUTAGE_S)
            proxy.gamble(None)
            proxy.admit()
            _run(calls * 2)
            for thread in first:
                thread.join()
            for manager in managers:
                manager.close()
        assert fake.log
        assert not fake.over


def _caller(manager: KeyManager) -> Any:
    @stable(manager=manager)
    def call(model: str = "gpt-4o", client: Any = INJECTED) -> Any:
        return client.chat.completions.create(model=model, max_tokens=1, messages=[{"role": "user", "content": "x"}])

    return call


def _run(calls: list[Any]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
