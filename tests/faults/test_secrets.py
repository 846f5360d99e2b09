"""Invariant 10 as a whole: a story of all that may happen is told, and whatever came out of it is searched for secrets.

What came out: each command that reached Redis and all that Redis holds then, each log record of whatever logger, what
was printed, each exception with its chain, and what public objects show and are pickled to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import openai
import pytest
import redis

from stable_openai import (
    AsyncOpenAI,
    BrokerUnavailable,
    ConfigurationError,
    Exhausted,
    Key,
    KeyManager,
    Limits,
    NoKeys,
    OpenAI,
    StableError,
    stable,
)
from stable_openai.testing import Failure, FakeOpenAI, closed_port
from tests.faults.servers import Server, until
from tests.faults.telling import Leaks

ONE, TWO, WRONG = "sk-proj-aleph+4711/beth=gimel", "sk-daleth_0815%he&waw", "sk-zayin-2342-heth-mistyped"
PASSWORD = "teth: yod/kaph?lamed#mem@1729"
CODED = quote(PASSWORD, safe="")
LEAKS = Leaks(ONE, TWO, WRONG, PASSWORD)
ASK: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
POOL = "test-secrets"
NO_LIMIT = Limits(rpm=1000)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = {"requirepass": PASSWORD, "slowlog_log_slower_than": "0", "slowlog_max_len": "10000"}
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, Server(folder, **settings) as server:
        server.admin = redis.Redis("127.0.0.1", server.port, password=PASSWORD, socket_timeout=5)
        until(server.admin.ping)
        yield server


@pytest.fixture
def empty(server: Server) -> Server:
    server.admin.flushall()
    server.admin.slowlog_reset()
    return server


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(keys={ONE: "org-1", TWO: "org-2"}) as fake:
        yield fake


def url(server: Server, password: str = PASSWORD) -> str:
    return f"redis://:{quote(password, safe='')}@127.0.0.1:{server.port}/0"


class Monitor:
    """Records each command that a server is given, as MONITOR shows it."""

    END = b"the end of the story"

    def __init__(self, server: Server) -> None:
        self.seen = bytearray()
        self._server = server
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        self._socket.sendall(b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%b\r\nMONITOR\r\n" % (len(PASSWORD), PASSWORD.encode()))
        until(lambda: self._read().count(b"+OK") == 2)
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def _read(self) -> bytearray:
        self.seen += self._socket.recv(1 << 16)
        return self.seen

    def _record(self) -> None:
        with contextlib.suppress(OSError):
            size = -1
            while self.END not in self.seen and len(self.seen) != size:  # else the server has ended
                size = len(self.seen)
                self._read()

    def end(self) -> bytes:
        self._server.admin.echo(self.END)
        self._thread.join(20)
        self._socket.close()
        return bytes(self.seen)


def all_of(server: Server) -> list[str | bytes]:
    """All that a server holds and shows: each key, as it is and serialised, its clients and what was slow."""
    admin, found = server.admin, list[Any]()
    for key in admin.scan_iter():
        kind = admin.type(key)
        read: Callable[[], Any] = {
            b"hash": lambda key=key: admin.hgetall(key),
            b"zset": lambda key=key: admin.zrange(key, 0, -1, withscores=True),
            b"list": lambda key=key: admin.lrange(key, 0, -1),
        }[kind]
        value = read()
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        found += [key, admin.dump(key), *(part if isinstance(part, bytes) else repr(part) for part in parts)]
    return [*found, repr(admin.client_list()), repr(admin.slowlog_get(10_000))]


class Teller:
    """Tells the story, and keeps what comes of each step."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.objects: list[Any] = []

    @contextmanager
    def fails(self, *kinds: type[BaseException]) -> Iterator[None]:
        try:
            yield
        except kinds as error:
            self.errors.append(error)
        else:
            raise AssertionError(f"no {kinds} was raised")

    def shows(self, *objects: Any) -> None:
        self.objects += objects

    def check(self) -> None:
        for error in self.errors:
            assert not LEAKS.in_error(error), type(error)
        for one in self.objects:
            texts = [repr(one), str(one), f"{one}"]
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                with contextlib.suppress(Exception):
                    texts.append(pickle.dumps(one, protocol).decode("latin-1"))
            assert not [found for text in texts for found in LEAKS.in_text(text)], type(one)


def keys(fake: FakeOpenAI, *secrets: str) -> list[Key]:
    return [Key(secret, name=f"key-{n}", base_url=fake.url) for n, secret in enumerate(secrets or (ONE, TWO, WRONG))]


def sync_story(tell: Teller, server: Server, fake: FakeOpenAI) -> None:
    manager = KeyManager(keys(fake), url(server), pool=POOL, limits=NO_LIMIT, max_wait=2.0)
    client = OpenAI(manager=manager, max_retries=0)
    create = client.chat.completions.create
    tell.shows(manager, client, client.api_key, *manager._worker.keys.values(), client.settings)
    tell.shows(*(key.secret for key in manager._worker.keys.values()), manager._worker, manager._backend)

    for _ in range(6):  # the mistyped key is refused, and goes out
        tell.shows(create(**ASK))
    with create(**ASK, stream=True) as stream:
        tell.shows(stream, *stream)
    create(**ASK, stream=True).close()
    for failure, kind in (
        (Failure.bad_request(), openai.BadRequestError),
        (Failure.unsupported_country(), openai.PermissionDeniedError),
        (Failure.gateway_unauthorized(html=True), openai.AuthenticationError),
        (Failure.server_error(), openai.InternalServerError),
        (Failure.cut(), openai.APIConnectionError),
        (Failure.closed(), openai.APIConnectionError),
        (Failure.redirect(f"http://127.0.0.1:{closed_port()}/v1"), openai.APIConnectionError),
    ):
        fake.fail(failure)
        with tell.fails(kind):
            create(**ASK)
    for failure in (Failure.rate_limit(retry_after_ms=30), Failure.model_not_found(), Failure.invalid_api_key()):
        fake.fail(failure)
        tell.shows(create(**ASK))

    @stable(manager=manager, model="gpt-4o")
    def ask(prompt: str, client: Any, lease: Any, api_key: str) -> str:
        tell.shows(client, lease, lease.key, lease.request)
        answer = client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": prompt}])
        return str(answer.choices[0].message.content)

    @stable(manager=manager, model="gpt-4o")
    def fail(api_key: str) -> str:
        raise RuntimeError("the user's own")

    tell.shows(ask, fail)
    ask("hello")
    with tell.fails(RuntimeError):
        fail()
    with manager.lease(model="gpt-4o", affinity="ann") as lease:
        lease.report(tokens=7, status=401, error={"error": {"message": "Incorrect", "code": "invalid_api_key"}})
        tell.shows(lease, lease.id)
        manager._do(manager._worker.renew(1e12))
    tell.shows(manager.status())

    # What a person does, by each name that a key has; and what is not there.
    for name in (ONE, "key-0", Key(ONE, base_url=fake.url), keys(fake)[0].fingerprint):
        manager.disable(name, 60)
        tell.shows(manager.status())
        manager.enable(name)
        manager.reset(name)
    manager.set_ttl(TWO, 1)
    for step in (lambda: manager.disable(WRONG + "-not-held"), lambda: manager.remove("sk-not-held")):
        with tell.fails(ConfigurationError):
            step()
    for secret in (ONE, TWO, WRONG):
        manager.disable(secret)
    with tell.fails(NoKeys):
        create(**ASK)
    for secret in (ONE, TWO, WRONG):
        manager.enable(secret)
    fake.fail(Failure.insufficient_quota(), times=None)
    with tell.fails(NoKeys, openai.RateLimitError):
        create(**ASK)
    fake.clear()
    tell.shows(manager.status())
    manager.remove(ONE)
    manager.add(Key(ONE, base_url=fake.url))
    tell.shows(manager.status())
    client.close()
    manager.close()


async def async_story(tell: Teller, server: Server, fake: FakeOpenAI) -> None:
    limits = Limits(concurrency=1, rpm=1000)
    manager = KeyManager(keys(fake, ONE), url(server), pool=POOL, limits=limits, max_wait=5.0, lease_ttl=1.0)
    client = AsyncOpenAI(manager=manager, max_retries=0)
    create = client.chat.completions.create
    tell.shows(client)
    await manager.areset(ONE)
    await asyncio.gather(*(create(**ASK) for _ in range(4)))  # they wait for each other

    @stable(manager=manager, model="gpt-4o")
    async def generate(client: Any) -> AsyncIterator[Any]:
        async with await client.chat.completions.create(**ASK, stream=True) as stream:
            async for item in stream:
                yield item

    tell.shows(generate, *[item async for item in generate()])
    fake.fail(Failure.stream_error(after=2))
    with tell.fails(openai.APIError):
        [item async for item in generate()]
    async with manager.lease(model="gpt-4o") as lease:
        with tell.fails(Exhausted):
            await manager.lease(model="gpt-4o", max_wait=0.05).__aenter__()
        until(lambda: server.admin.hlen(f"stable:{{{POOL}}}:class:gpt-4o"))
        tell.shows(await manager.astatus())
        manager._worker.live.pop(lease.id)  # nobody renews it: it expires, and is settled late
        await asyncio.sleep(1.01)
    fake.fail(Failure.rate_limit(retry_after_ms=60_000))
    with tell.fails(Exhausted, openai.RateLimitError):
        await client.with_options(max_wait=0.1).chat.completions.create(**ASK)
    await client.close()
    await manager.aclose()


def mistakes(tell: Teller, server: Server, fake: FakeOpenAI) -> None:
    """What users get wrong, each with a secret in it."""
    where = url(server).removeprefix("redis://")
    for make in (
        lambda: Key(f"{ONE} {TWO}"),
        lambda: Key(f"{ONE}\n"),
        lambda: Key(f"{ONE}ä"),
        lambda: Key(ONE.encode()),  # type: ignore[arg-type]
        lambda: Key(ONE, name=ONE),
        lambda: Key(ONE, account=f"of {ONE}"),
        lambda: Key(ONE, base_url=f"https://me:{CODED}@host/v1"),
        lambda: Key(ONE, weight=TWO),  # type: ignore[arg-type]
        lambda: Key(ONE, limits=TWO),  # type: ignore[arg-type]
        lambda: Key(ONE, base_url=TWO),
        lambda: Key(ONE, models=[TWO, 5]),  # type: ignore[list-item]
        lambda: KeyManager(ONE),
        lambda: KeyManager([ONE, ONE]),
        lambda: KeyManager([ONE], pool=TWO),
        lambda: KeyManager([ONE], on_redis_down=TWO),  # type: ignore[arg-type]
        lambda: KeyManager([ONE], max_wait=TWO),  # type: ignore[arg-type]
        lambda: KeyManager([ONE], models={TWO: ONE}),  # type: ignore[dict-item]
        lambda: KeyManager([ONE], f"http://{where}"),
        lambda: KeyManager([ONE], where),
        lambda: KeyManager([ONE], f"redis://{where}?socket_timeout=soon"),
        lambda: KeyManager([ONE], f"redis://{where}?nothing={CODED}"),
        lambda: KeyManager([ONE], f"redis://{where.rpartition(':')[0]}:port"),
        lambda: KeyManager([ONE], PASSWORD),
        lambda: stable(ONE),  # type: ignore[call-overload]
    ):
        with tell.fails(ConfigurationError, TypeError):
            make()
    bad = {"a wrong password": url(server, PASSWORD[::-1]), "nobody": f"redis://:{CODED}@127.0.0.1:1/0"}
    for place in bad.values():
        manager = KeyManager(keys(fake), place, pool=POOL, on_redis_down="raise")
        tell.shows(manager, manager._backend)
        with tell.fails(BrokerUnavailable):
            manager.check()
        with tell.fails(BrokerUnavailable), manager.lease():
            pass
        with tell.fails(StableError):
            OpenAI(manager=manager).chat.completions.create(**ASK)
        with tell.fails(BrokerUnavailable):
            asyncio.run(manager.acheck())
        manager.close()
    manager = KeyManager(keys(fake), pool=POOL)
    with manager.lease() as lease:
        for holder in (manager, lease, lease.key, lease.key.secret, manager._worker):
            with tell.fails(TypeError, pickle.PicklingError, AttributeError):
                pickle.dumps(holder)
    manager.close()


def test_nothing_that_comes_out_holds_a_secret(
    empty: Server, fake: FakeOpenAI, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("stable_openai.leases", "stable_openai.keys", "stable_openai.waiting", "redis", "openai", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    monitor, tell = Monitor(empty), Teller()
    sync_story(tell, empty, fake)
    asyncio.run(async_story(tell, empty, fake))
    mistakes(tell, empty, fake)
    held = all_of(empty)

    commands = monitor.end()
    assert len(held) > 20
    assert commands.lower().count(b'"evalsha"') > 50
    assert b"stable:{test-secrets}:class:gpt-4o" in commands
    assert not LEAKS.in_text(commands)
    assert not [found for one in held for found in LEAKS.in_text(one)]

    said = {record.name.partition(".")[0] for record in caplog.records}
    assert {"stable_openai", "openai"} < said
    for record in caplog.records:
        assert not LEAKS.in_text(f"{record.getMessage()} {vars(record)!r}"), record.name
        assert not LEAKS.in_object(record.args), record.name
        assert record.exc_info is None or record.exc_info[1] is None or not LEAKS.in_error(record.exc_info[1])
    events = {record.getMessage().partition(" ")[0] for record in caplog.records if "stable_openai" in record.name}
    assert events >= {"key.out", "attempt.limited", "attempt.key", "key.disable", "key.enable", "key.reset"}, events
    assert not LEAKS.in_text("".join(capfd.readouterr()))
    tell.check()
    assert len(tell.errors) > 40


@pytest.mark.parametrize("place", ["served", "a wrong password", "a wrong URL", "nobody"])
def test_what_the_command_line_says(empty: Server, place: str) -> None:
    from stable_openai.cli.demo import NAMES

    where = {
        "served": url(empty),
        "a wrong password": url(empty, PASSWORD[::-1]),
        "a wrong URL": f"redis://:{CODED}@host:port/0",
        "nobody": f"redis://:{CODED}@127.0.0.1:{closed_port()}/0",
    }[place]
    command = [sys.executable, "-m", "stable_openai", "demo", "--redis", where]
    monitor = Monitor(empty)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    commands = monitor.end()
    assert done.returncode == {"served": 0, "a wrong URL": 2}.get(place, 1), done.stderr
    leaks = Leaks(PASSWORD, PASSWORD[::-1], *NAMES)
    for text in (done.stdout, done.stderr, commands, *all_of(empty)):
        assert not leaks.in_text(text)


def test_a_secret_would_be_found() -> None:
    """Each way in which this file looks does see one."""
    leaks = Leaks(ONE)
    import base64

    for text in (ONE, quote(ONE, safe=""), base64.b64encode(f"Bearer {ONE}".encode()).decode(), ONE[:14], ONE[-14:]):
        assert leaks.in_text(f"before {text} after")
    error = ValueError("nothing here")
    error.__context__ = KeyError({"deep": [ONE]})
    assert leaks.in_error(error)
    error = ValueError("nothing here")
    error.request = {"headers": [(b"authorization", ONE.encode())]}  # type: ignore[attr-defined]
    assert leaks.in_error(error)
    assert not leaks.in_error(ValueError("nothing here"))
