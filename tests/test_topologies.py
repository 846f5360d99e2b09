"""A redis-py client of each kind is taken: the connections are the broker's own, for threads and for event loops."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.cluster import RedisCluster
from redis.sentinel import Sentinel

from stable_openai import KeyManager, Limits
from tests.servers import private_cluster, private_sentinel


def exercise(where: Any, pool: str = "test-topology") -> None:
    manager = KeyManager(["sk-a", "sk-b"], where, pool=pool, limits=Limits(rpm=5))
    with manager.lease():
        pass
    manager.disable("sk-a")

    async def main() -> None:
        async with manager.lease() as lease:
            assert lease.api_key == "sk-b"
        keys = (await manager.astatus()).keys
        assert [key.state for key in keys] == ["disabled", "ready"]
        assert 1.9 < sum(key.meters[0].used for key in keys) <= 2
        await manager.aclose()

    asyncio.run(main())


def test_a_cluster() -> None:
    with private_cluster() as port:
        client = RedisCluster(host="127.0.0.1", port=port)
        exercise(client)
        client.close()


def test_a_sentinel() -> None:
    with private_sentinel() as port:
        sentinel = Sentinel([("127.0.0.1", port)])
        client = sentinel.master_for("mymaster")
        exercise(client)
        client.close()
        for one in sentinel.sentinels:
            one.close()
