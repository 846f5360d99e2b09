"""Clients of both colours on both backends, for stories that are told once.

A story is a coroutine; where the client is sync it never suspends, and runs without an event loop. The fixtures are to
be imported by name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from inspect import isawaitable
from typing import Any

import pytest

from stable_openai import AsyncOpenAI, Key, KeyManager, OpenAI, stable
from stable_openai.testing import FakeOpenAI

__all__ = ["ASK", "STREAM", "WAYS", "Async", "Sync", "World", "colour", "fake", "make", "read", "redis", "wire_of"]

ASK: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
STREAM: dict[str, Any] = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
WAYS = ("client", "returned", "generated")


class Sync:
    client: Any = OpenAI

    @staticmethod
    def run(story: Coroutine[Any, Any, Any]) -> Any:
        try:
            story.send(None)
        except StopIteration as stop:
            return stop.value
        raise AssertionError("it suspended")

    @staticmethod
    async def next(stream: Any) -> Any:
        return next(stream)

    @staticmethod
    async def rest(stream: Any) -> list[Any]:
        return list(stream)

    @staticmethod
    def iterated(made: Any) -> Iterator[Any]:
        """A generator of the user's that closes its stream."""
        with made as stream:
            yield from stream

    @staticmethod
    async def pause() -> None:
        time.sleep(0.001)  # noqa: ASYNC251  no event loop runs

    @staticmethod
    def decorated(manager: KeyManager) -> dict[str, Any]:
        @stable(manager=manager)
        def returned(client: Any, **options: Any) -> Any:
            return client.chat.completions.create(**{**STREAM, **options})

        @stable(manager=manager)
        def generated(client: Any, **options: Any) -> Iterator[Any]:
            with client.chat.completions.create(**{**STREAM, **options}) as stream:
                yield from stream

        return {"returned": returned, "generated": generated}


class Async(Sync):
    client = AsyncOpenAI
    run = staticmethod(asyncio.run)

    @staticmethod
    async def next(stream: Any) -> Any:
        return await anext(stream)

    @staticmethod
    async def rest(stream: Any) -> list[Any]:
        return [item async for item in stream]

    @staticmethod
    async def iterated(made: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        async with await made as stream:
            async for item in stream:
                yield item

    @staticmethod
    async def pause() -> None:
        await asyncio.sleep(0.001)

    @staticmethod
    def decorated(manager: KeyManager) -> dict[str, Any]:
        @stable(manager=manager)
        async def returned(client: Any, **options: Any) -> Any:
            return await client.chat.completions.create(**{**STREAM, **options})

        @stable(manager=manager)
        async def generated(client: Any, **options: Any) -> AsyncIterator[Any]:
            async with await client.chat.completions.create(**{**STREAM, **options}) as stream:
                async for item in stream:
                    yield item

        return {"returned": returned, "generated": generated}


class World:
    """A fake upstream, a manager of one key (or of `keys`) for it, and the three ways to a stream."""

    def __init__(
        self, colour: Any, fake: FakeOpenAI, redis: str | None, keys: Sequence[Key] | None = None, **options: Any
    ) -> None:
        self.colour, self.fake = colour, fake
        keys = keys or [Key("sk-a", base_url=fake.url)]
        self.manager = KeyManager(keys, redis, **{"pool": "test-streams", "max_wait": 5.0, **options})
        self.worker = self.manager._worker
        self.client = colour.client(manager=self.manager)
        self.ways = {"client": self.client.chat.completions.create, **colour.decorated(self.manager)}

    async def open(self, way: str, **options: Any) -> Any:
        made = self.ways[way](**(STREAM if way == "client" else {}), **options)
        return await made if isawaitable(made) else made

    async def until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not true():
            assert time.monotonic() < deadline, "it did not become true"
            await self.colour.pause()

    def live(self) -> int:
        """Leases that the store holds to be live; what is queued is settled first."""
        self.manager._do(self.worker.flush())
        return sum(key.live for key in self.manager.status().keys)

    def used(self) -> float:
        return sum(meter.used for meter in self.manager.status().keys[0].meters if meter.limit == "tpm")

    def close(self) -> None:
        if self.colour is Sync and hasattr(self, "client"):  # async clients close with their loop
            self.client.close()
        self.manager.close()

    async def settled(self) -> None:
        await self.until(lambda: not self.worker.live and self.live() == 0)  # the heartbeat may be settling it


async def read(world: World, way: str) -> None:
    """Open a stream and read it to its end."""
    assert len(await world.colour.rest(await world.open(way))) > 2


def wire_of(client: Any) -> Any:
    return client._client._transport._wire


@pytest.fixture(params=[Sync, Async], ids=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["memory", "redis"])
def redis(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("redis_url") if request.param == "redis" else None


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(keys=["sk-a"]) as fake:
        yield fake


@pytest.fixture
def make(colour: Any, fake: FakeOpenAI, redis: Any) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**options: Any) -> World:
        worlds.append(World(colour, fake, redis, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
