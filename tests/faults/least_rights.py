"""A pytest plugin (`-p tests.faults.least_rights`): the package's connections are those of an ACL user with the least
rights that suffice, whatever the tests connect with themselves. On their server (REDIS_URL) that user exists."""

from __future__ import annotations

from typing import Any

import pytest

from stable_openai.backends import redis as backend

USER, PASSWORD = "stable-openai", "least rights: @/?#%"
RIGHTS = (
    "resetkeys ~stable:{*}:* resetchannels -@all +eval +evalsha"
    " +hget +hgetall +hmget +hset +hdel +del +pexpire +llen +rpush +blpop +time"
    " +zadd +zcard +zrange +zrangebyscore +zrem +zscore +zunionstore +client|id +client|unblock"
)
SAYS_WHO_IT_IS = {"client|setinfo", "client"}  # redis-py does that, and takes a refusal; Redis 6.2 calls it "client"
CLUSTER_RIGHTS = "+cluster|slots +command +asking"  # for a RedisCluster


@pytest.fixture(autouse=True, scope="session")
def _with_least_rights() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        own = backend._own

        def restricted(settings: dict[str, Any], *rest: Any) -> dict[str, Any]:
            return own({**settings, "username": USER, "password": PASSWORD}, *rest)

        patch.setattr(backend, "_own", restricted)
        yield
