"""The `client` that @stable injects, and the tokens that answers say they cost."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from inspect import isawaitable
from typing import Any

import openai
import pytest
from tenacity import stop_after_attempt, wait_none

from stable_openai import Key, KeyManager, Limits, StableError, Verdict, stable
from stable_openai.testing import Failure, FakeOpenAI
from tests.worlds import *  # noqa: F403  its fixtures too
from tests.worlds import ASK, STREAM, WAYS, Async, Sync, World


def decorated(world: World, body: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function of the world's colour, whose body is a coroutine function of its `client` and its `lease`."""
    options.setdefault("model", "gpt-4o")
    if world.colour is Sync:

        @stable(manager=world.manager, **options)
        def call(client: Any, lease: Any) -> Any:
            return Sync.run(body(client, lease))

    else:

        @stable(manager=world.manager, **options)
        async def call(client: Any, lease: Any) -> Any:
            return await body(client, lease)

    return call


async def got(made: Any) -> Any:
    return await made if isawaitable(made) else made


async def at_once(world: World, *makes: Callable[[], Any]) -> list[Any]:
    """What each comes to: a result, or what it raised."""
    if world.colour is Sync:
        with ThreadPoolExecutor(len(makes)) as threads:
            futures = [threads.submit(make) for make in makes]
            return [future.exception() or future.result() for future in futures]
    return await asyncio.gather(*(make() for make in makes), return_exceptions=True)


def requests(world: World) -> float:
    return sum(meter.used for meter in world.manager.status().keys[0].meters if meter.limit == "rpm")


def test_every_request_of_a_function_is_counted(make: Callable[..., World], fake: FakeOpenAI) -> None:
    """The first uses the lease of the call; those that follow, through copies too, lease for themselves."""
    world = make(limits=Limits(rpm=100, tpm=100_000, rule="sliding", charge="used"))

    async def body(client: Any, lease: Any) -> int:
        same = client.with_options(timeout=30.0)
        answers = [await got(one.chat.completions.create(**ASK)) for one in (client, same, client)]
        lease.report(tokens=10**6)  # too late: that of the first request is known
        assert len(world.worker.live) == 0
        return sum(answer.usage.total_tokens for answer in answers)

    async def story() -> None:
        tokens = await got(decorated(world, body)())
        assert (len(fake.log), requests(world), world.used()) == (3, 3, tokens)
        assert world.live() == 0

    world.colour.run(story())


def test_what_names_no_model_counts_for_that_of_the_function(make: Callable[..., World]) -> None:
    world = make(limits=Limits(rpm=100, rule="sliding"), models={"gpt-4o*": Limits(rpm=50)})

    async def body(client: Any, lease: Any) -> None:
        for _ in range(2):
            await got(client.models.retrieve("gpt-4o"))
        await got(client.chat.completions.create(**{**ASK, "model": "o1"}))

    async def story() -> None:
        await got(decorated(world, body)())
        meters = {meter.model_class: meter.used for meter in world.manager.status().keys[0].meters}
        assert meters == {"gpt-4o*": 2, "o1": 1}

    world.colour.run(story())


def test_a_second_request_does_not_wait_for_the_lease_of_its_own_function(
    make: Callable[..., World], fake: FakeOpenAI
) -> None:
    world = make(limits=Limits(concurrency=1))

    async def one_after_the_other(client: Any, lease: Any) -> None:
        for _ in range(2):
            await got(client.chat.completions.create(**ASK))
            await world.colour.rest(await got(client.chat.completions.create(**STREAM)))

    async def together(client: Any, lease: Any) -> None:
        ask, stream = partial(client.chat.completions.create, **ASK), partial(client.chat.completions.create, **STREAM)

        async def read() -> Any:
            return await world.colour.rest(await got(stream()))

        read_one = read if world.colour is Async else lambda: list(stream())
        for answer in await at_once(world, read_one, ask, ask, read_one):
            assert not isinstance(answer, BaseException)

    async def story() -> None:
        for body in (one_after_the_other, together):
            call = decorated(world, body)
            assert await at_once(world, call, call) == [None, None]
        await world.settled()

    world.colour.run(story())
    assert (len(fake.log), fake.max_in_flight) == (16, {"sk-a": 1})


def test_a_request_beside_an_open_one_has_a_lease_of_its_own(make: Callable[..., World], fake: FakeOpenAI) -> None:
    world = make(limits=Limits(concurrency=2, rpm=100, rule="sliding"))

    async def body(client: Any, lease: Any) -> None:
        stream = await got(client.chat.completions.create(**STREAM))
        assert world.live() == 1
        await world.colour.next(stream)
        other = await got(client.chat.completions.create(**STREAM))
        assert world.live() == 2
        await world.colour.rest(stream)
        assert world.live() == 1  # that of the function has ended with its stream
        await got(other.close())
        assert world.live() == 0

    async def story() -> None:
        await got(decorated(world, body)())
        assert requests(world) == 2

    world.colour.run(story())


def test_further_requests_go_to_the_account_of_the_first(colour: Any, redis: Any) -> None:
    """What was stored is known there, and what was cached. Where it cannot serve, to another."""
    with FakeOpenAI(keys={"sk-a": "org-a", "sk-b": "org-b"}) as fake:
        keys = [Key(secret, base_url=fake.url) for secret in ("sk-a", "sk-b")]
        world = World(colour, fake, redis, keys)

        async def body(client: Any, lease: Any) -> list[str]:
            for _ in range(3):
                await got(client.chat.completions.create(**ASK))
            fake.fail(Failure.rate_limit(retry_after=60))
            await got(client.chat.completions.create(**ASK))
            return [entry.key for entry in fake.log]

        async def story() -> None:
            one, two, three, refused, other = await got(decorated(world, body)())
            assert one == two == three == refused != other

        colour.run(story())
        world.close()


def test_what_a_further_request_comes_to_is_not_the_functions_affair(
    colour: Any, redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again as often as the function's options say, but the function is not; and what is concluded of a key
    is concluded of that of its own lease, once, as the function's classify says."""
    caplog.set_level(logging.INFO, "stable_openai.leases")
    seen: list[BaseException] = []

    def classify(error: BaseException) -> Verdict | None:
        seen.append(error)
        return Verdict("failed", "retry", "mine") if isinstance(error, openai.ConflictError) else None

    with FakeOpenAI(keys={"sk-a": "org-a", "sk-b": "org-b"}) as fake:
        keys = [Key(secret, name=secret[3:], base_url=fake.url) for secret in ("sk-a", "sk-b")]
        world = World(colour, fake, redis, keys, pool="test-further")
        calls: list[str] = []

        async def body(client: Any, lease: Any) -> None:
            calls.append(lease.key.name)
            stream = await got(client.chat.completions.create(**STREAM))
            await colour.next(stream)
            world.manager.disable(lease.key)
            fake.fail(Failure.error(409), times=9)
            try:
                await got(client.chat.completions.create(**ASK))
            finally:
                await got(stream.close())

        call = decorated(world, body, stop=stop_after_attempt(3), wait=wait_none(), classify=classify)

        async def story() -> None:
            with pytest.raises(openai.ConflictError) as raised:
                await got(call())
            assert (len(calls), len(fake.log)) == (1, 4)
            assert [type(error) for error in seen] == [openai.ConflictError] * 3
            assert all(error.status_code == 409 and error.request.url for error in seen)  # type: ignore[attr-defined]
            assert raised.value.request is seen[-1].request  # type: ignore[attr-defined]
            assert world.live() == 0

        colour.run(story())
        (other,) = {"a", "b"} - set(calls)
        said = [record.getMessage() for record in caplog.records if "attempt." in record.getMessage()]
        assert said == [f"attempt.failed pool=test-further key={other} reason=mine"] * 3
        world.close()


def test_several_streams_of_one_function(make: Callable[..., World], fake: FakeOpenAI) -> None:
    """Returned together, ended in different ways and threads, by a method; each has a lease, which ends with it."""
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
        assert len(world.worker.live) == 3
        tokens = first.usage.total_tokens
        tokens += (await colour.rest(streams[0]))[-1].usage.total_tokens
        await got(streams.pop(1).close())
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
        assert world.used() == tokens + 1  # what was closed unread said nothing: what it had reserved counts

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


CAUGHT = {
    "429": (Failure.rate_limit(retry_after=60), "cooldown", "rate limit of gpt-4o"),
    "quota": (Failure.insufficient_quota(), "out", "insufficient_quota"),
    "account": (Failure.account_deactivated(), "out", "account_deactivated"),
    "event": (Failure.stream_error("rate_limit_exceeded", after=2), "cooldown", "rate limit of gpt-4o"),
    "mistake": (Failure.error(400), "ready", ""),
}


@pytest.mark.parametrize("then", ["returns", "raises", "asks again", "raises it later"])
@pytest.mark.parametrize("what", CAUGHT)
def test_a_failure_that_the_function_has_caught(
    make: Callable[..., World], fake: FakeOpenAI, what: str, then: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of the key all the same, once; but what the function returns, or raises of its own, is the result."""
    caplog.set_level(logging.INFO, "stable_openai.leases")
    failure, state, reason = CAUGHT[what]
    world = make(max_wait=0.0)
    calls: list[int] = []

    async def body(client: Any, lease: Any) -> str:
        calls.append(1)
        caught: list[BaseException] = []
        try:
            await world.colour.rest(await got(client.chat.completions.create(**(STREAM if what == "event" else ASK))))
        except openai.APIError as error:
            caught.append(error)
        assert caught
        if then == "raises":
            raise LookupError
        if then != "returns":
            (answer,) = await at_once(world, lambda: client.chat.completions.create(**ASK))
            assert isinstance(answer, StableError) == (state != "ready")
        if then == "raises it later":
            raise caught.pop()
        return ""

    async def story() -> None:
        fake.fail(failure)
        (result,) = await at_once(world, decorated(world, body))
        raised = {"raises": LookupError, "raises it later": openai.BadRequestError if state == "ready" else StableError}
        assert isinstance(result, raised.get(then, str))
        (key,) = world.manager.status().keys
        assert (key.state, key.reason, key.live) == (state, reason, 0)
        assert (len(calls), len(fake.log)) == (1, 2 if state == "ready" and then.endswith(("again", "later")) else 1)

    world.colour.run(story())
    said = [record.getMessage().split()[0] for record in caplog.records if record.name == "stable_openai.leases"]
    assert said == {"cooldown": ["attempt.limited"], "out": ["key.out"], "ready": []}[state]


def test_connections_that_the_function_has_lost_and_caught(make: Callable[..., World], fake: FakeOpenAI) -> None:
    """Five of them pause the pool, as if they had been raised."""
    world = make()

    async def body(client: Any, lease: Any) -> None:
        with pytest.raises(openai.APIConnectionError):
            await got(client.chat.completions.create(**ASK))

    async def story() -> None:
        fake.fail(Failure.closed(), times=5)
        for number in range(5):
            assert world.manager.status().breaker == ""
            await got(decorated(world, body)())
            assert len(fake.log) == number + 1
        assert world.manager.status().breaker == "connection"

    world.colour.run(story())


def test_what_is_reported_goes_before_what_the_client_saw(make: Callable[..., World], fake: FakeOpenAI) -> None:
    world = make()

    async def body(client: Any, lease: Any) -> None:
        with pytest.raises(openai.RateLimitError):
            await got(client.chat.completions.create(**ASK))
        lease.report(status=200)

    async def story() -> None:
        fake.fail(Failure.rate_limit(retry_after=60))
        await got(decorated(world, body)())
        assert world.manager.status().keys[0].state == "ready"

    world.colour.run(story())


@pytest.mark.parametrize("caught", [True, False])
def test_every_failure_is_classified_once(make: Callable[..., World], fake: FakeOpenAI, caught: bool) -> None:
    """Of all requests of a bound client, as what openai's client raises."""
    world = make()
    seen: list[Any] = []

    def classify(error: BaseException) -> Verdict | None:
        seen.append(error)
        return Verdict("neutral", "retry" if error.status_code == 500 else "raise")  # type: ignore[attr-defined]

    async def body(client: Any, lease: Any) -> None:
        if not seen:
            fake.fail(Failure.error(400 if caught else 500))
        with suppress(openai.BadRequestError):
            await got(client.chat.completions.create(**ASK))
        fake.fail(Failure.error(500), times=2)
        fake.fail(Failure.rate_limit())
        await got(client.chat.completions.create(**ASK))

    async def story() -> None:
        with pytest.raises(openai.RateLimitError):
            await got(decorated(world, body, classify=classify, wait=wait_none())())
        assert [error.status_code for error in seen] == [400 if caught else 500, 500, 500, 429]
        assert len(fake.log) == (4 if caught else 5)
        assert all(isinstance(error, openai.APIStatusError) for error in seen)
        assert world.manager.status().keys[0].state == "ready"
        assert world.live() == 0

    world.colour.run(story())


@pytest.mark.parametrize("failure", [Failure.closed(), Failure.cut(after=0), Failure.server_error()], ids=str)
def test_a_failure_that_was_caught_keeps_nothing_alive(
    make: Callable[..., World], fake: FakeOpenAI, failure: Failure
) -> None:
    """What the function had (an open stream, say) goes with it, and need not wait for the garbage collector."""
    world = make()
    kept: list[weakref.ref[Any]] = []

    class Had:
        pass

    async def body(client: Any, lease: Any) -> None:
        had = Had()
        kept.append(weakref.ref(had))
        with suppress(openai.APIError):
            await got(client.chat.completions.create(**ASK))

    async def story() -> None:
        call = decorated(world, body)
        await got(call())  # what is made on first use
        fake.fail(failure)
        gc.collect()
        gc.disable()
        await got(call())
        assert kept[-1]() is None

    try:
        world.colour.run(story())
    finally:
        gc.enable()


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


@pytest.mark.parametrize("way", ["injected", "drop-in"])
@pytest.mark.parametrize("colour", ["sync", "async"])
def test_no_lease_waits_until_connections_can_be_made(colour: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first transport of a process (a TLS context) takes so long that what was leased would be sent too late."""
    from stable_openai import AsyncOpenAI, OpenAI, _clients
    from stable_openai._wire import http

    name = "HTTPTransport" if colour == "sync" else "AsyncHTTPTransport"
    make = getattr(http, name)
    leased: list[int] = []

    def made(**options: Any) -> Any:
        leased.append(len(manager._worker.live))
        return make(**options)

    with FakeOpenAI(keys={"sk-a": "org-a"}) as fake:
        manager = KeyManager([Key("sk-a", base_url=fake.url)], pool="test-prepared")
        monkeypatch.setattr(http, name, made)
        monkeypatch.setattr(_clients, "_made", {})

        @stable(manager=manager)
        def ask(client: Any) -> Any:
            return client.chat.completions.create(**ASK)

        @stable(manager=manager)
        async def aask(client: Any) -> Any:
            return await client.chat.completions.create(**ASK)

        async def story() -> None:
            if way == "injected":
                await aask()
            else:
                await AsyncOpenAI(manager=manager).chat.completions.create(**ASK)

        if colour == "async":
            asyncio.run(story())
        elif way == "injected":
            ask()
        else:
            OpenAI(manager=manager).chat.completions.create(**ASK)
        assert [entry.status for entry in fake.log] == [200]
        assert leased == [0]
        manager.close()
