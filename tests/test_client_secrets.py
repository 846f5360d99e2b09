"""No secret is where it should not be: in what a client raises, logs or holds, or at a host that is not its key's."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import pickle
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import openai
import pytest

from stable_openai import (
    AsyncAzureOpenAI,
    AsyncOpenAI,
    AzureOpenAI,
    Exhausted,
    Key,
    KeyManager,
    Limits,
    NoKeys,
    OpenAI,
    RequestTooLarge,
    StableError,
    stable,
)
from stable_openai._keys import Secret
from stable_openai._wire import http
from stable_openai.testing import Failure, FakeOpenAI, closed_port
from stable_openai.testing.upstream import Upstream

ONE, OTHER = "sk-secret-of-one-4711", "sk-secret-of-other-0815"
SECRETS = (ONE, OTHER)
ASK: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
STREAM: dict[str, Any] = {**ASK, "stream": True}
VERSION = "2024-10-21"
KINDS = [OpenAI, AsyncOpenAI, AzureOpenAI, AsyncAzureOpenAI]


def result(call: Callable[[], Any], client: Any = None) -> Any:
    """What a call of either colour comes to (of a stream, its items), and the client closed after it."""

    async def awaited(made: Any) -> Any:
        try:
            found = await made if inspect.isawaitable(made) else made
            return [item async for item in found] if hasattr(found, "__aiter__") else found
        finally:
            if client is not None:
                await client.close()

    async def inside() -> Any:
        return await awaited(call())

    if is_async(client):
        return asyncio.run(inside())
    try:
        found = call()
        return list(found) if isinstance(found, openai.Stream) else found
    finally:
        if client is not None:
            client.close()


def is_async(client: Any) -> bool:
    return isinstance(client, openai.AsyncOpenAI)


def found_in(root: object) -> list[str]:
    """Where a secret is that can be reached from an object, through attributes, containers and closures."""
    todo: deque[tuple[object, str]] = deque([(root, type(root).__name__)])
    seen: dict[int, object] = {}
    found = []
    closed = (type, types.ModuleType, types.FrameType, types.TracebackType, types.CodeType, Secret, KeyManager)
    closed += (types.GeneratorType, types.AsyncGeneratorType)  # they are frames
    while todo:
        one, way = todo.popleft()
        if id(one) in seen or isinstance(one, closed):
            continue
        seen[id(one)] = one
        if isinstance(one, (str, bytes, bytearray, memoryview)):
            text = one if isinstance(one, str) else bytes(one).decode("latin-1")
            found += [f"{way}: {text[:80]!r}" for secret in SECRETS if secret in text]
        elif isinstance(one, types.FunctionType):
            todo += [(cell, f"{way}.closure") for cell in one.__closure__ or ()]
        else:
            todo += [(other, f"{way}.{type(other).__name__}") for other in gc.get_referents(one)]
            todo += [(link, f"{way}.chain") for link in (getattr(one, "__cause__", 0), getattr(one, "__context__", 0))]
    return found


def texts_of(error: BaseException) -> list[str]:
    texts = [repr(error), str(error), *traceback.format_exception(error)]
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        try:
            pickled = pickle.dumps(error, protocol)
        except Exception:
            continue
        texts.append(pickled.decode("latin-1"))
    links, link = [], error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    for link in links:
        for holder in (link, getattr(link, "response", None)):
            try:
                request = holder.request  # type: ignore[union-attr]
            except (AttributeError, RuntimeError):
                continue
            texts += [repr(vars(request)), repr(request.headers.raw), str(request.url)]
    return texts


def assert_clean(*things: object) -> None:
    for thing in things:
        assert found_in(thing) == []


@pytest.fixture
def fakes() -> Iterator[tuple[FakeOpenAI, FakeOpenAI]]:
    with FakeOpenAI(keys={ONE: "org-1"}) as one, FakeOpenAI(keys={OTHER: "org-2"}) as other:
        yield one, other


@pytest.fixture(params=["memory", "redis"])
def redis(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("redis_url") if request.param == "redis" else None


@pytest.fixture
def arrived() -> Iterator[dict[int, list[dict[str, str]]]]:
    """The headers of all requests that a fake has read, by its port."""
    seen: dict[int, list[dict[str, str]]] = {}
    arrive = Upstream.arrive

    def seeing(self: Upstream, request: Any) -> Any:
        seen.setdefault(int(request.headers["host"].rpartition(":")[2]), []).append(request.headers)
        return arrive(self, request)

    with patch.object(Upstream, "arrive", seeing):
        yield seen


def port(fake: FakeOpenAI) -> int:
    return int(fake.url.rsplit(":")[2].removesuffix("/v1"))


def home(fake: FakeOpenAI, azure: bool = False) -> str:
    """The base URL of a fake; that of the other names another host, also to whoever keeps cookies."""
    url = fake.url.replace("127.0.0.1", "localhost") if OTHER in fake.accounts() else fake.url
    return url.removesuffix("/v1") if azure else url


def keys_of(kind: Any, *fakes: FakeOpenAI) -> list[Key]:
    """A key of each fake."""
    secrets = zip(SECRETS, fakes)
    if kind in (AzureOpenAI, AsyncAzureOpenAI):
        return [Key(secret, base_url=home(fake, azure=True), api_version=VERSION) for secret, fake in secrets]
    return [Key(secret, base_url=home(fake)) for secret, fake in secrets]


def client_of(kind: Any, manager: KeyManager, **options: Any) -> Any:
    if kind in (AzureOpenAI, AsyncAzureOpenAI):
        options = {"azure_endpoint": "https://nowhere.invalid", "api_version": VERSION, **options}
    return kind(manager=manager, **options)


def injected(kind: Any, manager: KeyManager) -> Callable[..., Any]:
    """A function that asks with the client it is given."""
    if kind is OpenAI:

        @stable(manager=manager, stop=lambda state: True)
        def ask(client: Any, **options: Any) -> Any:
            return client.chat.completions.create(**options)

        return ask

    @stable(manager=manager, stop=lambda state: True)
    async def aask(client: Any, **options: Any) -> Any:
        return await client.chat.completions.create(**options)

    return aask


# A stream that breaks off: openai 2 passes what httpx raises.
BROKEN: Any = openai.APIConnectionError if http.__name__ == "httpx2" else http.TransportError
FAILURES: dict[str, tuple[Failure, dict[str, Any], Any]] = {
    "400": (Failure.bad_request(), ASK, openai.BadRequestError),
    "400 to a stream": (Failure.bad_request(), STREAM, openai.BadRequestError),
    "401": (Failure.invalid_api_key(), ASK, openai.AuthenticationError),
    "401 of a gateway": (Failure.gateway_unauthorized(html=True), ASK, openai.AuthenticationError),
    "403": (Failure.unsupported_country(), ASK, openai.PermissionDeniedError),
    "404": (Failure.error(404), ASK, openai.NotFoundError),
    "429, for ever": (Failure.rate_limit(), ASK, (openai.RateLimitError, Exhausted)),
    "no quota": (Failure.insufficient_quota(), ASK, (openai.RateLimitError, NoKeys)),
    "500": (Failure.server_error(), ASK, openai.InternalServerError),
    "closed": (Failure.closed(), ASK, openai.APIConnectionError),
    "a timeout": (Failure.hang(), {**ASK, "timeout": 0.1}, openai.APITimeoutError),
    "a timeout in a stream": (Failure.stall(after=1), {**STREAM, "timeout": 0.1}, BROKEN),
    "cut": (Failure.cut(), ASK, openai.APIConnectionError),
    "cut in a stream": (Failure.cut(after=2), STREAM, BROKEN),
    "an error event": (Failure.stream_error(after=2), STREAM, openai.APIError),
    "a redirect that leads nowhere": (
        Failure.redirect(f"http://127.0.0.1:{closed_port()}/v1/x"),
        ASK,
        openai.APIConnectionError,
    ),
    "a redirect without end": (Failure.redirect("/v1/chat/completions"), ASK, openai.APIError),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("how", ["ours", "the user's http client", "injected"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_raised_and_logged(
    fakes: tuple[FakeOpenAI, FakeOpenAI], caplog: pytest.LogCaptureFixture, kind: Any, how: str, case: str
) -> None:
    if how == "injected" and kind in (AzureOpenAI, AsyncAzureOpenAI):
        kind = {AzureOpenAI: OpenAI, AsyncAzureOpenAI: AsyncOpenAI}[kind]
        keys = keys_of(AzureOpenAI, fakes[0])
    else:
        keys = keys_of(kind, fakes[0])
    failure, options, expected = FAILURES[case]
    caplog.set_level(logging.DEBUG)
    manager = KeyManager(keys, pool="test-secrets", max_wait=0.5)
    fakes[0].fail(failure, times=None)
    own: Any = {}
    if how == "the user's http client":
        kinds = openai.DefaultHttpxClient, openai.DefaultAsyncHttpxClient
        own = {"http_client": kinds[issubclass(kind, openai.AsyncOpenAI)]()}
    client = client_of(kind, manager, max_retries=0, **own)
    create = injected(kind, manager) if how == "injected" else client.chat.completions.create
    with pytest.raises(expected) as raised:
        result(lambda: create(**options), client)
    assert fakes[0].log or fakes[0].in_flight
    assert_clean(raised.value, texts_of(raised.value), client)
    assert_clean([(record.getMessage(), record.args, record.exc_text) for record in caplog.records])
    assert {record.name.partition(".")[0] for record in caplog.records} >= {
        "openai",
        http.__name__.replace("httpx", "httpcore"),
    }
    manager.close()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("why", [Exhausted, NoKeys, RequestTooLarge])
def test_what_the_broker_raises(
    fakes: tuple[FakeOpenAI, FakeOpenAI], redis: Any, caplog: pytest.LogCaptureFixture, kind: Any, why: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    limits = Limits(rpm=1, tpm=1000)
    manager = KeyManager(keys_of(kind, *fakes), redis, pool="test-secrets", max_wait=0.0, limits=limits)
    client = client_of(kind, manager)
    options = {**ASK, "max_tokens": 5000 if why is RequestTooLarge else 5}
    if why is NoKeys:
        for key in manager._worker.keys.values():
            manager.disable(key)
    elif why is Exhausted:
        for fake in fakes:
            fake.fail(Failure.rate_limit())
    with pytest.raises(why) as raised:
        result(lambda: client.chat.completions.create(**options), client)
    assert isinstance(raised.value, StableError)
    assert isinstance(raised.value, openai.OpenAIError)
    assert_clean(raised.value, texts_of(raised.value), client)
    assert_clean([(record.getMessage(), record.args) for record in caplog.records])
    manager.close()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_a_client_shows(fakes: tuple[FakeOpenAI, FakeOpenAI], kind: Any) -> None:
    manager = KeyManager(keys_of(kind, *fakes), pool="test-secrets")
    client = client_of(kind, manager)

    async def story() -> None:
        for options in (ASK, STREAM, STREAM):  # the last is left open: what it holds is none of the client's
            made = client.chat.completions.create(**options)
            made = await made if inspect.isawaitable(made) else made
            if options is STREAM:
                for _ in range(2):
                    item = await anext(made) if is_async(client) else next(made)
                    assert_clean(item)
            else:
                assert_clean(made)
            assert_clean(made.response.headers if options is STREAM else made, client.settings, client.api_key)
            closing = made.close() if options is STREAM else None
            if closing is not None:
                await closing
            assert_clean(client, made, repr(client), str(client), vars(client), client.auth_headers, client._client)

    asyncio.run(story())
    with pytest.raises(Exception, match=r"pickle|SSLContext|secret"):
        pickle.dumps(client.settings.manager)
    client._client.close() if not is_async(client) else None
    manager.close()


# Where requests go. Each fake sees only the secret of its own key, whatever the other says.


def no_other(arrived: dict[int, list[dict[str, str]]], *fakes: FakeOpenAI) -> None:
    for fake, own in zip(fakes, SECRETS):
        for headers in arrived.get(port(fake), ()):
            (other,) = {*SECRETS} - {own}
            assert other not in str(headers)
            assert "stable-openai-" not in str([value for name, value in headers.items() if name != "user-agent"])


ROUTES: dict[str, Callable[[Any, FakeOpenAI, FakeOpenAI], Any]] = {
    "a call": lambda client, one, other: client.chat.completions.create(**ASK),
    "a stream": lambda client, one, other: client.chat.completions.create(**STREAM),
    "a list": lambda client, one, other: client.models.list(),
    "another base_url": lambda client, one, other: client.with_options(base_url=home(other)).models.list(),
    "a URL of the other": lambda client, one, other: client.get(f"{home(other)}/models", cast_to=object),
    "a URL of one": lambda client, one, other: client.post(f"{home(one)}/chat/completions", body=ASK, cast_to=object),
    "the user's own header": lambda client, one, other: client.chat.completions.create(
        **ASK, extra_headers={"Authorization": "Bearer sk-users"}
    ),
    "a copy": lambda client, one, other: client.with_options(timeout=9.0).chat.completions.create(**ASK),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("base", ["nowhere", "one", "other"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_host_sees_its_own_secret(
    fakes: tuple[FakeOpenAI, FakeOpenAI], arrived: dict[int, list[dict[str, str]]], kind: Any, base: str, route: str
) -> None:
    keys = [*keys_of(OpenAI, *fakes)[:1], *keys_of(AzureOpenAI, *fakes)[1:]]
    manager = KeyManager(keys, pool="test-secrets", max_wait=1.0)
    at = {"nowhere": "http://127.0.0.1:9", "one": home(fakes[0], azure=True), "other": home(fakes[1], azure=True)}[base]
    place = {"azure_endpoint": at} if "Azure" in kind.__name__ else {"base_url": f"{at}/v1"}
    for _ in range(3):
        client = client_of(kind, manager, max_retries=0, **place)
        with suppress(openai.APIError, StableError):
            result(partial(ROUTES[route], client, *fakes), client)
    assert base == "nowhere" or arrived
    no_other(arrived, *fakes)
    if route in ("a call", "a stream", "a list", "a copy"):
        assert {entry.key for fake in fakes for entry in fake.log if entry.status == 200} == {*SECRETS}
    if route == "the user's own header" and "Azure" not in kind.__name__:
        assert not [h for headers in arrived.values() for h in headers if any(s in str(h) for s in SECRETS)]
    manager.close()


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "the user's own header"])
@pytest.mark.parametrize("kind", [OpenAI, AsyncOpenAI], ids=lambda kind: kind.__name__)
def test_an_injected_client_too(
    fakes: tuple[FakeOpenAI, FakeOpenAI], arrived: dict[int, list[dict[str, str]]], kind: Any, route: str
) -> None:
    keys = [*keys_of(OpenAI, *fakes)[:1], *keys_of(AzureOpenAI, *fakes)[1:]]
    manager = KeyManager(keys, pool="test-secrets", max_wait=0.5)

    @stable(manager=manager)
    def ask(client: Any) -> Any:
        found = ROUTES[route](client, *fakes)
        return list(found) if isinstance(found, openai.Stream) else found

    @stable(manager=manager)
    async def aask(client: Any) -> Any:
        found = await ROUTES[route](client, *fakes)
        return [item async for item in found] if hasattr(found, "__aiter__") else found

    for _ in range(4):
        with suppress(openai.APIError, StableError):
            asyncio.run(aask()) if kind is AsyncOpenAI else ask()
    assert arrived
    no_other(arrived, *fakes)
    manager.close()


@pytest.mark.parametrize("status", [302, 307])
@pytest.mark.parametrize("to", ["the same host", "the same host, in full", "the other host"])
@pytest.mark.parametrize("how", ["ours", "injected", "the user's http client"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_redirects(
    fakes: tuple[FakeOpenAI, FakeOpenAI],
    arrived: dict[int, list[dict[str, str]]],
    kind: Any,
    how: str,
    to: str,
    status: int,
) -> None:
    one, other = fakes
    manager = KeyManager(keys_of(kind, *fakes), pool="test-secrets")
    azure_key = "Azure" in kind.__name__
    path = f"/openai/deployments/gpt-4o/chat/completions?api-version={VERSION}" if azure_key else "/v1/chat/completions"
    start = {
        "the same host": "",
        "the same host, in full": home(one, azure=True),
        "the other host": home(other, azure=True),
    }[to]
    cookie = {"set-cookie": f"session={ONE}; Path=/"}
    redirect = Failure.redirect(start + path, status)
    one.fail(replace(redirect, headers=(*redirect.headers, *cookie.items())), times=1)
    own: Any = {}
    if how == "the user's http client":
        kinds = openai.DefaultHttpxClient, openai.DefaultAsyncHttpxClient
        own = {"http_client": kinds[issubclass(kind, openai.AsyncOpenAI)]()}
    client = client_of(kind, manager, max_retries=0, **own)
    answers = []

    async def asked_again() -> None:
        create = injected(kind, manager) if how == "injected" else client.chat.completions.create
        for _ in range(4):
            try:
                made = create(**ASK)
                answers.append(await made if inspect.isawaitable(made) else made)
            except openai.APIError as error:
                answers.append(error)
        if is_async(client):
            await client.close()

    asyncio.run(asked_again())
    if not is_async(client):
        client.close()
    no_other(arrived, *fakes)
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    # A POST that becomes a GET is no request that this endpoint knows. (@stable moves on after a 401.)
    assert len(failed) == (status < 307 or (to == "the other host" and how != "injected"))
    if to == "the other host":
        bare = [h for h in arrived[port(other)] if "authorization" not in h and "api-key" not in h]
        assert len(bare) == 1
    elif status >= 307:
        there, elsewhere = ([entry.status for entry in fake.log] for fake in fakes)
        assert there[:2] == [307, 200]  # whose turns the others are depends on the clock, which may step back
        assert there[2:] + elsewhere == [200, 200, 200]
    manager.close()


@pytest.mark.parametrize("own", [False, True], ids=["ours", "the user's http client"])
@pytest.mark.parametrize("kind", [OpenAI, AsyncOpenAI], ids=lambda kind: kind.__name__)
def test_cookies_stay_at_their_host(
    fakes: tuple[FakeOpenAI, FakeOpenAI], arrived: dict[int, list[dict[str, str]]], kind: Any, own: bool
) -> None:
    """The cookies of one key's host are not sent to another's, which the client takes for the same; ours keep none."""
    one, other = fakes
    for fake, name in ((one, "one"), (other, "other")):
        fake.fail(Failure.error(400, headers={"set-cookie": f"session=tied-to-{name}; Path=/"}), times=2)
    manager = KeyManager([Key(ONE, base_url=home(one)), Key(OTHER)], pool="test-secrets")
    made_by_user = (
        (openai.DefaultAsyncHttpxClient if kind is AsyncOpenAI else openai.DefaultHttpxClient)() if own else None
    )
    client = kind(manager=manager, base_url=home(other), http_client=made_by_user)

    async def story() -> None:
        for _ in range(8):
            with suppress(openai.BadRequestError):
                made = client.chat.completions.create(**ASK)
                await made if inspect.isawaitable(made) else made
        closing = client.close()
        if closing is not None:
            await closing

    asyncio.run(story())
    assert "tied-to" not in str(arrived[port(one)])
    assert "tied-to-one" not in str(arrived[port(other)])
    assert ("tied-to-other" in str(arrived[port(other)][-1])) is own
    manager.close()
