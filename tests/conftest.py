from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis

import stable_openai.manager
from tests.servers import private_redis


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a real Redis or Valkey: REDIS_URL's, else a private one."""
    given = os.environ.get("REDIS_URL")
    if given:
        yield given
    else:
        with private_redis() as url:
            yield url


@pytest.fixture
def redis_url(redis_server: str) -> Iterator[str]:
    """The same, without any key of an earlier test (the pools of this package's tests are all named test-...)."""
    yield redis_server
    with redis.Redis.from_url(redis_server) as client:
        for key in client.scan_iter("stable:{test*"):
            client.delete(key)


@pytest.fixture
def only_its_managers() -> Iterator[None]:
    """The registry of open managers is global: a test that leaves one would decide what another finds. Only the next
    test says so."""
    left = _close_managers()
    assert not left
    yield
    _close_managers()


def _close_managers() -> list[stable_openai.KeyManager]:
    left = list(stable_openai.manager._open)
    for manager in left:
        manager.close()
    return left
