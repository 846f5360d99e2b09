"""The `client` that @stable injects, and the tokens that answers say they cost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import isawaitable
from typing import Any

import openai
import pytest

from stable_openai import Key, KeyManager, Limits, stable
from stable_openai.testing import Failure, FakeOpenAI
from tests.worlds import *  # noqa: F403  its fixtures too
from tests.worlds import ASK, STREAM, WAYS, Sync, World


def test_several_streams_of_one_lease(make: Callable[..., World], fake: FakeOpenAI) -> None:
    """Returned together, ended in different ways and threads, by a method; the lease ends with the last of them."""
    world = make(limits=Limits(tpm=100_000, charge="used", rule="sliding"))
    colour = world.colour
    if colour is Sync:

        class Asker:
            @stable(manager=world.manager)
            def ask(self, client: Any) -> Any:
                first = client.chat.completions.create(**ASK)
                same = client.with_options(timeout=30.0)
                return first, [one.chat.completions.create(**STREAM) for one in (client, same, client)]

    else:

        class Asker:  # type: ignore[no-redef]
            @stable(manager=world.manager)
            async def ask(self, client: Any) -> Any:
                first = await client.chat.completions.create(**ASK)
                same = client.with_options(timeout=30.0)
                return first, [await one.chat.completions.create(**STREAM) for one in (client, same, client)]

    async def story() -> None:
        first, streams = Asker().ask() if colour is Sync else await Asker().ask()
        assert len(world.worker.live) == 1
        tokens = first.usage.total_tokens
        tokens += (await colour.rest(streams[0]))[-1].usage.total_tokens
        closing = streams.pop(1).close()
        if closing is not None:
            await closing
        assert len(world.worker.live) == 1
        if colour is Sync:
            reader = threading.Thread(target=lambda: streams.append(list(streams[1])))
            reader.start()
            reader.join()
        else:
            streams.append(await colour.rest(streams[1]))
        tokens += streams[-1][-1].usage.total_tokens
        await world.settled()
        assert len(fake.log) == 4
        assert world.used() == tokens  # what was closed unread said nothing

    colour.run(story())


@pytest.mark.parametrize("gzip", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("charge", ["reserved", "used"])
@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_that_an_answer_names_are_charged(
    colour: Any, redis: Any, way: str, charge: Any, gzip: bool
) -> None:
    with FakeOpenAI(keys=["sk-a"], gzip=gzip, output_tokens=lambda body: int(body["user"])) as fake:
        limits = Limits(tpm=100_000, charge=charge, rule="sliding")
        world = World(colour, fake, redis, limits=limits)

        async def story() -> None:
            for output, most in ((500, None), (7, 400)):
                before = world.used()
                options = {"user": str(output), "max_tokens": most or openai.NOT_GIVEN}
                items = await colour.rest(await world.open(way, **options))
                await world.settled()
                named = items[-1].usage.total_tokens
                assert named > output
                assert world.used() - before == (most if most and charge == "reserved" else named)
            if way == "client":  # what is not streamed
                for output in (500, 7):
                    before = world.used()
                    options = {**ASK, "user": str(output)}
                    made = world.ways["client"](**options)
                    answer = await made if isawaitable(made) else made
                    await world.settled()
                    assert world.used() - before == answer.usage.total_tokens

        colour.run(story())
        world.close()


def test_an_injected_client_after_its_lease(make: Callable[..., World], fake: FakeOpenAI) -> None:
    """It leases by itself: so no more go at once than the limit allows, not even while the function's lease ends."""
    world = make(limits=Limits(concurrency=2))
    colour, clients = world.colour, []

    @stable(manager=world.manager)
    def keep(client: Any) -> None:
        clients.append(client)

    @stable(manager=world.manager)
    async def akeep(client: Any) -> None:
        clients.append(client)

    async def story() -> None:
        if (kept := (keep if colour is Sync else akeep)()) is not None:
            await kept
        client = clients[0]
        assert world.live() == 0
        world.ways["kept"] = client.with_options(timeout=20).chat.completions.create
        stream = await world.open("kept", **STREAM)
        assert world.live() == 1
        assert len(await colour.rest(stream)) > 2
        await world.settled()
        if colour is Sync:
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda _: list(client.chat.completions.create(**STREAM)), range(40)))
        else:

            async def one() -> None:
                await colour.rest(await client.chat.completions.create(**STREAM))

            await asyncio.gather(*(one() for _ in range(40)))
        await world.settled()

    colour.run(story())
    assert max(fake.max_in_flight.values()) <= 2


def test_a_request_that_outlives_its_function(fake: FakeOpenAI, redis: Any) -> None:
    """In a thread of its own: the lease is kept for it."""
    world = World(Sync, fake, redis, limits=Limits(concurrency=1))
    answers: list[Any] = []

    @stable(manager=world.manager)
    def begin(client: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: answers.append(client.chat.completions.create(**ASK)))
        thread.start()
        fake.wait_for(lambda fake: fake.in_flight == 1)
        return thread

    with fake.hold():
        thread = begin()
        assert world.live() == 1
    thread.join()
    assert answers[0].usage
    assert world.live() == 0
    list(world.client.chat.completions.create(**STREAM))
    assert fake.max_in_flight == {"sk-a": 1}
    world.close()


def test_nested(fake: FakeOpenAI, redis: Any) -> None:
    world = World(Sync, fake, redis)

    @stable(manager=world.manager)
    def inner(client: Any) -> Any:
        return client.chat.completions.create(**STREAM)

    @stable(manager=world.manager)
    def outer(client: Any) -> Any:
        return client.chat.completions.create(**STREAM), inner()

    one, other = outer()
    assert world.live() == 2
    list(one)
    assert world.live() == 1
    other.close()
    assert world.live() == 0
    world.close()


def test_no_cookie_of_one_account_is_sent_for_another() -> None:
    with FakeOpenAI(keys={"sk-a": "org-a"}) as fake:
        manager = KeyManager([Key("sk-a", base_url=fake.url)], pool="test-cookies")
        fake.fail(Failure.error(500, headers={"set-cookie": "session=a"}))

        @stable(manager=manager)
        def ask(client: Any = None) -> Any:
            client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
            return client._client.cookies.jar

        assert not list(ask())
        manager.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_that_breaks_off_says_what_is_wrong_with_its_key(
    make: Callable[..., World], fake: FakeOpenAI, way: str
) -> None:
    world = make()

    async def story() -> None:
        fake.fail(Failure.stream_error("rate_limit_exceeded", after=2))
        with pytest.raises(openai.APIError):
            await world.colour.rest(await world.open(way))
        await world.settled()
        assert [key.state for key in world.manager.status().keys] == ["cooldown"]

    world.colour.run(story())
