"""What sends for the drop-in clients, where threads share it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from stable_openai import KeyManager, OpenAI
from stable_openai.testing import FakeOpenAI


def test_threads_that_begin_together_share_the_connections_that_one_of_them_makes() -> None:
    with FakeOpenAI(keys=["sk-a"]) as fake, ThreadPoolExecutor(8) as threads:
        manager = KeyManager(["sk-a"], pool="test-wire")
        with OpenAI(manager=manager, base_url=fake.url, max_retries=0) as client:
            pages = list(threads.map(lambda _: client.models.list(), range(8)))
        manager.close()
        assert len(pages) == len(fake.log) == 8
        fake.wait_for(lambda fake: fake.connections.open == 0)
