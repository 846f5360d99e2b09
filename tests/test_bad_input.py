"""What bad input gets: an error that names the field and says what would be right, before anything is sent.

No message, repr or chained error of any of them holds a secret: `refused` looks.
"""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import stable_openai.manager
from stable_openai import (
    BrokerUnavailable,
    ConfigurationError,
    Exhausted,
    Key,
    KeyManager,
    Lease,
    Limits,
    RequestTooLarge,
    stable,
)
from stable_openai.testing import FakeOpenAI, closed_port

ROOT = Path(__file__).resolve().parents[1]
SECRET, OTHER, PASSWORD = "sk-geheim-4711", "sk-geheim-0815", "pass-geheim"
VARIABLES = ("STABLE_OPENAI_KEYS", "OPENAI_API_KEY", "STABLE_OPENAI_REDIS", "STABLE_OPENAI_POOL")


@pytest.fixture(autouse=True)
def no_environment(only_its_managers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is global too: no test finds anything there."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise AssertionError("a constructor has opened a connection")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def told(error: BaseException | None) -> str:
    """All that an error, and those behind it, could show to somebody."""
    parts = []
    while error is not None:
        parts += [str(error), repr(error), repr(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


def refused(make: Callable[[], Any], field: str, right: str = "") -> None:
    with pytest.raises(ConfigurationError) as raised:
        make()
    assert raised.value.field == field
    assert str(raised.value).startswith(f"{field}: ")
    assert right in str(raised.value)
    assert "geheim" not in told(raised.value)
    assert not stable_openai.manager._open


# keys


@pytest.mark.parametrize("none", [[], (), {}, iter(())])
def test_no_keys(none: Any) -> None:
    refused(lambda: KeyManager(none), "keys", "give at least one")


def test_no_keys_in_the_environment() -> None:
    refused(KeyManager, "keys", "give at least one")
    refused(lambda: KeyManager(pool="p"), "keys", "give at least one")


@pytest.mark.parametrize("one", [SECRET, SECRET.encode()])
def test_a_key_in_place_of_a_list(one: Any) -> None:
    refused(lambda: KeyManager(one), "keys", "list")


@pytest.mark.parametrize("empty", ["", " ", "\n", None, 5, b"sk-geheim"])
def test_an_empty_key(empty: Any) -> None:
    refused(lambda: KeyManager([SECRET, empty]), "key", "'sk-...'")
    refused(lambda: Key(empty), "key", "'sk-...'")


@pytest.mark.parametrize("secret", [f" {SECRET}", f"{SECRET}\n", "sk geheim", "sk-\tgeheim", "sk-geheim\ud800"])
def test_a_key_with_white_space(secret: str) -> None:
    refused(lambda: Key(secret), "key", "strip them")


def test_a_key_that_no_header_can_carry() -> None:
    refused(lambda: Key("sk-geheim-ключ"), "key", "ASCII")


def test_a_duplicate_key() -> None:
    refused(lambda: KeyManager([SECRET, OTHER, SECRET]), "keys", "number 3 repeats number 1")
    refused(lambda: KeyManager([Key(SECRET, name="a"), SECRET]), "keys", "number 2 repeats number 1")
    manager = KeyManager([SECRET, Key(SECRET, base_url="http://other/v1")])  # another endpoint, another key
    with pytest.raises(ConfigurationError, match="repeats"):
        manager.add(SECRET)
    assert len(manager.status().keys) == 2


@pytest.mark.parametrize("weight", [0, -1, 1001, 1.0, True, "1", None])
def test_a_wrong_weight(weight: Any) -> None:
    refused(lambda: Key(SECRET, weight=weight), "weight", "whole number")


@pytest.mark.parametrize("label", ["", "a\nb", 5, f"my {SECRET}", SECRET])
def test_a_wrong_label(label: Any) -> None:
    """An account's name goes to Redis, a key's into logs: neither may be the key."""
    refused(lambda: Key(SECRET, name=label), "name", "name")
    refused(lambda: Key(SECRET, account=label), "account", "name")


@pytest.mark.parametrize("models", ["gpt-4o", [5], [""], [None]])
def test_wrong_models_of_a_key(models: Any) -> None:
    refused(lambda: Key(SECRET, models=models), "models", "list of names" if models != "gpt-4o" else "['gpt-4o']")


def test_keys_of_one_account_with_different_limits() -> None:
    keys = [Key(SECRET, account="org", name="a", limits=Limits(rpm=1)), Key(OTHER, account="org", name="b")]
    refused(lambda: KeyManager(keys), "limits", "the keys a and b share an account but differ")
    refused(lambda: KeyManager([Key(SECRET, account="org"), Key(OTHER, account="org", limits=Limits(rpm=2))]), "limits")
    same = [Key(secret, account="org", limits=Limits(rpm=1)) for secret in (SECRET, OTHER)]
    assert len(KeyManager(same).status().keys) == 2


# limits


@pytest.mark.parametrize("name", ["rpm", "rpd", "tpm", "tpd", "concurrency"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, float("nan"), True, False, "60", 10**12 + 1, [1]])
def test_a_limit_that_is_no_whole_number(name: str, value: Any) -> None:
    refused(lambda: Limits(**{name: value}), name, "whole number from 1 to 1e12, or None for no limit")


@pytest.mark.parametrize("name", ["rpm", "rpd", "tpm", "tpd", "concurrency"])
def test_the_least_and_the_greatest_limit(name: str) -> None:
    value: Any
    for value in (1, 10**12):
        manager = KeyManager([SECRET], limits=Limits(**{name: value}), pool=f"p{value}")
        with manager.lease(tokens=1):
            pass


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("rule", "leaky", "'bucket', 'sliding' or 'calendar'"),
        ("rule", ["bucket"], "'bucket', 'sliding' or 'calendar'"),
        ("day_rule", "daily", "'bucket', 'sliding' or 'calendar'"),
        ("charge", "all", "'reserved' or 'used'"),
        ("tz", "Mars/Olympus", "'America/Los_Angeles'"),
        ("tz", "", "'America/Los_Angeles'"),
        ("tz", 5, "'America/Los_Angeles'"),
        ("tz", "../../etc/passwd", "'America/Los_Angeles'"),
        ("burst_s", 0, "above 0"),
        ("burst_s", -1, "above 0"),
        ("burst_s", 86_401, "above 0"),
        ("burst_s", float("nan"), "above 0"),
        ("burst_s", float("inf"), "above 0"),
        ("burst_s", True, "above 0"),
        ("burst_s", "20", "above 0"),
    ],
)
def test_a_wrong_rule(name: str, value: Any, right: str) -> None:
    refused(lambda: Limits(**{name: value}), name, right)


@pytest.mark.parametrize("limits", [{"rpm": 1}, 5, "rpm=5"])
def test_limits_that_are_none(limits: Any) -> None:
    refused(lambda: KeyManager([SECRET], limits=limits), "limits", "Limits(...)")
    refused(lambda: Key(SECRET, limits=limits), "limits", "Limits(...)")
    refused(lambda: KeyManager([SECRET], models={"gpt": limits}), "models", "to Limits(...)")


@pytest.mark.parametrize("models", [[Limits()], {5: Limits()}, "gpt", Limits()])
def test_wrong_classes_of_models(models: Any) -> None:
    refused(lambda: KeyManager([SECRET], models=models), "models", "map names or patterns")


# settings


@pytest.mark.parametrize("pool", ["", "a b", "a{b}", "a:b", "ä", "a\n", 5, b"p", ["p"]])
def test_a_wrong_pool(pool: Any) -> None:
    refused(lambda: KeyManager([SECRET], pool=pool), "pool", "letters, digits")


@pytest.mark.parametrize("name", ["lease_ttl", "max_wait", "headroom_s"])
@pytest.mark.parametrize("value", [-1, "5", None, True, float("nan"), [1]])
def test_a_time_that_is_none(name: str, value: Any) -> None:
    refused(lambda: KeyManager([SECRET], **{name: value}), name, "number of seconds from")


@pytest.mark.parametrize(("name", "value"), [("lease_ttl", 0.5), ("lease_ttl", 3601), ("headroom_s", 11)])
def test_a_time_out_of_bounds(name: str, value: float) -> None:
    refused(lambda: KeyManager([SECRET], **{name: value}), name, "number of seconds from")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["ignore", None, True, ["raise"]])
def test_a_wrong_on_redis_down(value: Any) -> None:
    refused(lambda: KeyManager([SECRET], on_redis_down=value), "on_redis_down", "'local', 'wait' or 'raise'")


@pytest.mark.parametrize(
    "url",
    ["", "nonsense", f"http://:{PASSWORD}@host", f":{PASSWORD}@host:6379", f"redis://:{PASSWORD}@host:port/0",
     f"redis://:{PASSWORD}@host:99999/0", f"redis://:{PASSWORD}@[::1/0", f"redis://:{PASSWORD}@h/0?socket_timeout=x"],
)  # fmt: skip
def test_a_redis_url_that_cannot_be_parsed(url: str) -> None:
    refused(lambda: KeyManager([SECRET], url), "redis", "'redis://host:6379/0'")


@pytest.mark.parametrize("where", [object(), 5, b"redis://host", ["redis://host"]])
def test_a_redis_that_is_none(where: Any) -> None:
    refused(lambda: KeyManager([SECRET], where), "redis", "must be a URL or a redis-py client")


@pytest.mark.parametrize(
    "url",
    ["", "host/v1", "ftp://host/v1", "https://", "https:///v1", "https://host:port/v1", "https://host:99999/v1",
     "https://[::1/v1", "https://ho st/v1", "https://host\n/v1", 5, b"https://host"],
)  # fmt: skip
def test_a_base_url_that_cannot_be_parsed(url: Any) -> None:
    refused(lambda: Key(SECRET, base_url=url), "base_url", "'https://host/v1'")


def test_a_base_url_with_a_password() -> None:
    refused(lambda: Key(SECRET, base_url=f"https://me:{PASSWORD}@host/v1"), "base_url", "password")


# what is decorated


def without(prompt: str) -> None: ...
def anything(**kwargs: Any) -> None: ...
def anywhere(*api_key: Any) -> None: ...
def by_place(api_key: str, /) -> None: ...
def misspelt(prompt: str, apikey: str) -> None: ...


@pytest.mark.parametrize("function", [without, anything, anywhere, by_place, misspelt])
def test_a_function_that_declares_none_of_the_parameters(function: Callable[..., None]) -> None:
    refused(lambda: stable(function), "stable", f"{function.__name__} declares none of the parameters api_key")
    refused(lambda: stable(model="gpt-4o")(function), "stable", "add client or api_key")


@pytest.mark.parametrize("nothing", [5, "gpt-4o", SECRET])
def test_what_is_no_function(nothing: Any) -> None:
    refused(lambda: stable(nothing), "stable", "decorates a function")


def ask(prompt: str = "", model: str = "gpt-4o", api_key: str = "") -> str:
    return api_key


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("manager", "default", "must be a KeyManager"),
        ("manager", [SECRET], "must be a KeyManager"),
        ("tokens", -1, "whole number, 0 or more"),
        ("tokens", 1.5, "whole number, 0 or more"),
        ("tokens", True, "whole number, 0 or more"),
        ("max_wait", "5", "number of seconds"),
        ("max_wait", -1, "number of seconds"),
        ("stop", 5, "must be a function"),
        ("wait", 5, "must be a function"),
        ("classify", "5xx", "must be a function"),
    ],
)
def test_a_wrong_option(name: str, value: Any, right: str) -> None:
    refused(lambda: stable(**{name: value})(ask), name, right)


@pytest.mark.parametrize("tokens", [-1, 1.5, "7"])
def test_tokens_that_are_none(tokens: Any) -> None:
    """Of a number below zero a meter would gain."""
    manager = KeyManager([SECRET], limits=Limits(tpm=100))
    for call in (stable(tokens=lambda: tokens)(ask), lambda: manager.lease(tokens=tokens)):
        with pytest.raises(ConfigurationError, match="tokens: must be a whole number") as raised:
            call()
        assert raised.value.field == "tokens"
    assert manager.status().keys[0].meters[0].used == 0


@pytest.mark.parametrize(("name", "value"), [("status", "429"), ("status", 429.0), ("tokens", -1), ("tokens", "7")])
def test_a_report_of_what_cannot_be(name: str, value: Any) -> None:
    with (
        KeyManager([SECRET]).lease() as lease,
        pytest.raises(ConfigurationError, match="must be a whole num") as raised,
    ):
        lease.report(**{name: value})
    assert raised.value.field == name


@pytest.mark.parametrize("max_wait", ["5", -1, True])
def test_a_lease_that_waits_no_time(max_wait: Any) -> None:
    manager = KeyManager([SECRET])
    with pytest.raises(ConfigurationError, match="max_wait: must be a number of seconds"):
        manager.lease(max_wait=max_wait)


def test_a_model_that_no_key_serves() -> None:
    manager = KeyManager([Key(SECRET, models=["gpt-4o*"])], limits=Limits(tpm=5))
    for call in (lambda: stable(ask)(model="o3"), lambda: manager.lease(model="o3").__enter__()):
        with pytest.raises(ConfigurationError, match="'o3' is served by no key") as raised:
            call()
        assert raised.value.field == "model"
        assert "geheim" not in told(raised.value)
    assert stable(ask)(model="gpt-4o-mini") == SECRET


def test_a_key_that_is_not_held() -> None:
    manager = KeyManager([SECRET])
    for verb in (manager.disable, manager.enable, manager.reset, manager.remove):
        with pytest.raises(ConfigurationError, match="is not one of pool 'default'") as raised:
            verb(OTHER)
        assert "geheim" not in told(raised.value)


# Redis


@pytest.mark.usefixtures("no_network")
def test_a_constructor_does_no_io() -> None:
    for where in ("redis://host:1/0", redis.Redis(host="host"), None):
        manager = KeyManager([SECRET], where)
        stable(manager=manager)(ask)
        manager.lease()
        manager.close()


async def in_coroutine(manager: KeyManager) -> str:
    @stable(manager=manager)
    async def coroutine(api_key: str = "") -> str:
        return api_key

    return await coroutine()


def in_generator(manager: KeyManager) -> str:
    @stable(manager=manager)
    def generator(api_key: str = "") -> Iterator[str]:
        yield api_key

    return next(generator())


async def in_async_lease(manager: KeyManager) -> None:
    async with manager.lease():
        pass


USES: dict[str, Callable[[KeyManager], object]] = {
    "check": KeyManager.check,
    "acheck": lambda manager: asyncio.run(manager.acheck()),
    "status": KeyManager.status,
    "function": lambda manager: stable(manager=manager)(ask)(),
    "coroutine": lambda manager: asyncio.run(in_coroutine(manager)),
    "generator": in_generator,
    "lease": lambda manager: manager.lease().__enter__(),
    "async_lease": lambda manager: asyncio.run(in_async_lease(manager)),
    "disable": lambda manager: manager.disable(SECRET),
    "get_key": KeyManager.get_key,
}


@pytest.mark.parametrize("use", USES)
def test_a_redis_that_cannot_be_reached(use: str) -> None:
    manager = KeyManager([SECRET], f"redis://:{PASSWORD}@127.0.0.1:{closed_port()}/0", on_redis_down="raise")
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable, match="Redis does not serve the broker") as raised:
        USES[use](manager)
    assert time.monotonic() - began < 30  # not the 600 s that a call may wait for a key
    assert "geheim" not in told(raised.value) + repr(manager)


def test_a_client_that_cannot_reach_its_redis() -> None:
    client = redis.Redis(port=closed_port(), password=PASSWORD)
    manager = KeyManager([SECRET], client, on_redis_down="raise")
    with pytest.raises(BrokerUnavailable) as raised:
        manager.check()
    assert "geheim" not in told(raised.value) + repr(manager)


def test_a_redis_that_refuses_the_password(redis_server: str) -> None:
    with redis.Redis.from_url(redis_server) as client:
        settings = client.connection_pool.connection_kwargs
        kind = client.connection_pool.connection_class
    pool = redis.ConnectionPool(connection_class=kind, **settings | {"username": "me", "password": PASSWORD})
    manager = KeyManager([SECRET], redis.Redis(connection_pool=pool), on_redis_down="raise")
    with pytest.raises(BrokerUnavailable, match=r"Redis does not serve the broker \(\w+Error\)") as raised:
        manager.check()
    assert "geheim" not in told(raised.value)


# requests


@pytest.mark.parametrize("limit", ["tpm", "tpd"])
def test_a_request_that_is_too_large(limit: str) -> None:
    manager = KeyManager([SECRET, OTHER], limits=Limits(**{limit: 100}))  # type: ignore[arg-type]
    called = []

    @stable(tokens=101)
    def call(api_key: str = "") -> None:
        called.append(api_key)

    for large in (call, lambda: manager.lease(tokens=101).__enter__()):
        with pytest.raises(RequestTooLarge) as raised:
            large()
        assert (raised.value.tokens, raised.value.limit) == (101, limit)
        assert "geheim" not in told(raised.value)
    assert not called
    assert all(meter.used == 0 for key in manager.status().keys for meter in key.meters)
    with manager.lease(tokens=100):
        pass


def test_what_cannot_be_in_time_says_so_at_once() -> None:
    manager = KeyManager([SECRET], limits=Limits(rpm=1), max_wait=5)
    assert manager.get_key() == SECRET
    with pytest.raises(Exhausted, match=r"5 s \(max_wait\)") as raised:
        manager.get_key()
    assert raised.value.reason == "rpm"
    assert raised.value.retry_after is not None
    assert raised.value.retry_after > 50  # so it cannot have waited
    assert "geheim" not in told(raised.value)


# the caller's own key


async def collect(items: AsyncIterator[str]) -> list[str]:
    return [item async for item in items]


def callers() -> dict[str, Callable[..., Any]]:
    """All four kinds of functions, so wrapped that they return the key that they were given."""

    @stable
    def function(prompt: str, api_key: str = "") -> str:
        return api_key

    @stable
    async def coroutine(prompt: str, api_key: str = "") -> str:
        return api_key

    @stable
    def generator(prompt: str, api_key: str = "") -> Iterator[str]:
        yield api_key

    @stable
    async def async_generator(prompt: str, api_key: str = "") -> AsyncIterator[str]:
        yield api_key

    class Service:
        @stable
        def method(self, prompt: str, api_key: str = "") -> str:
            return api_key

    return {
        "function": function,
        "coroutine": lambda *args, **kwargs: asyncio.run(coroutine(*args, **kwargs)),
        "generator": lambda *args, **kwargs: next(generator(*args, **kwargs)),
        "async_generator": lambda *args, **kwargs: asyncio.run(collect(async_generator(*args, **kwargs)))[0],
        "method": Service().method,
    }


@pytest.mark.parametrize("kind", callers())
def test_the_key_of_the_caller_is_used_and_nothing_leased(kind: str) -> None:
    call = callers()[kind]
    assert call("hi", api_key="sk-mine") == "sk-mine"  # there need be no manager
    manager = KeyManager([SECRET], limits=Limits(rpm=100))
    assert call("hi", api_key="sk-mine") == "sk-mine"
    assert call("hi", "sk-mine") == "sk-mine"
    assert [meter.used for meter in manager.status().keys[0].meters] == [0]
    assert call("hi") == SECRET  # and this one is leased
    assert sum(round(meter.used) for key in manager.status().keys for meter in key.meters) == 1


def test_the_client_of_the_caller_is_used() -> None:
    manager = KeyManager([SECRET], limits=Limits(rpm=100))

    @stable
    def call(client: Any = None, api_key: str = "") -> Any:
        return client, api_key

    mine = object()
    assert call(client=mine) == (mine, "")
    assert [meter.used for meter in manager.status().keys[0].meters] == [0]


# secrets


def test_what_holds_a_secret_is_neither_shown_nor_pickled() -> None:
    key = Key(SECRET, name="a", account="org")
    manager = KeyManager([key], f"redis://:{PASSWORD}@127.0.0.1:1/0", pool="p")
    held = KeyManager([key], pool="q")
    with held.lease() as lease:
        for thing in (key, key.secret, manager, held, lease):
            assert "geheim" not in f"{thing!r} {thing!s}"
            for copied in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="pickled") as raised:
                    copied(thing)
                assert "geheim" not in told(raised.value)
        assert isinstance(lease, Lease)
    assert "geheim" not in repr(held.status())


# the default manager


def test_the_default_is_the_newest_of_the_pool_default() -> None:
    KeyManager([SECRET])
    newest = KeyManager([OTHER])
    KeyManager(["sk-named"], pool="named")
    assert KeyManager() is newest
    assert stable(ask)() == OTHER
    newest.close()
    assert stable(ask)() == SECRET


def test_the_default_is_else_the_only_one() -> None:
    named = KeyManager([SECRET], pool="named")
    assert KeyManager() is named
    assert stable(ask)() == SECRET


def test_several_named_pools_have_no_default() -> None:
    managers = [KeyManager([SECRET], pool="b"), KeyManager([OTHER], pool="a")]
    with pytest.raises(ConfigurationError, match=r"several pools are open \(a, b\); say which: manager=") as raised:
        stable(ask)()
    assert raised.value.field == "manager"
    assert stable(manager=managers[0])(ask)() == SECRET
    managers[0].close()
    assert stable(ask)() == OTHER


def test_two_managers_of_one_named_pool_have_no_default() -> None:
    for _ in range(2):
        KeyManager([SECRET], pool="a")
    with pytest.raises(ConfigurationError, match=r"several pools are open \(a\)"):
        stable(ask)()


def test_the_manager_is_found_when_the_function_is_called() -> None:
    decorated = stable(ask)
    first = KeyManager([SECRET])
    assert decorated() == SECRET
    first.close()
    KeyManager([OTHER])
    assert decorated() == OTHER


def test_without_a_manager_and_keys() -> None:
    with pytest.raises(ConfigurationError, match="keys: there are none"):
        stable(ask)()


def test_a_manager_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    assert stable(ask)() == "sk-one"
    made = KeyManager()
    assert (made.pool, repr(made)) == ("default", "KeyManager(pool='default', keys=1, backend='memory')")
    made.close()
    monkeypatch.setenv("STABLE_OPENAI_KEYS", f" {SECRET}, {OTHER},")
    monkeypatch.setenv("STABLE_OPENAI_POOL", "from-environment")
    monkeypatch.setenv("STABLE_OPENAI_REDIS", "redis://host:1/0")
    made = KeyManager()
    assert repr(made) == "KeyManager(pool='from-environment', keys=2, backend='redis')"


@pytest.mark.parametrize(
    ("variable", "value", "field"),
    [
        ("STABLE_OPENAI_KEYS", f"{SECRET},{SECRET}", "keys"),
        ("STABLE_OPENAI_KEYS", ",", "keys"),
        ("STABLE_OPENAI_POOL", "a b", "pool"),
        ("STABLE_OPENAI_REDIS", f"//:{PASSWORD}@host", "redis"),
    ],
)
def test_a_wrong_environment(variable: str, value: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable != "STABLE_OPENAI_KEYS":
        monkeypatch.setenv("STABLE_OPENAI_KEYS", SECRET)
    monkeypatch.setenv(variable, value)
    refused(KeyManager, field)
    refused(stable(ask), field)


def test_threads_that_come_at_once_are_given_one_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in memory would keep the limits twice. The first thread is held while it makes its manager."""
    monkeypatch.setenv("STABLE_OPENAI_KEYS", SECRET)
    making, go_on = threading.Event(), threading.Event()
    init = KeyManager.__init__

    def slow(self: KeyManager, *args: Any, **kwargs: Any) -> None:
        making.set()
        go_on.wait(10)
        init(self, *args, **kwargs)

    monkeypatch.setattr(KeyManager, "__init__", slow)
    threads = [threading.Thread(target=stable(ask)) for _ in range(4)]
    threads[0].start()
    assert making.wait(10)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(stable_openai.manager._open) == 1


FORKED = """
import os, sys
from stable_openai import KeyManager, Limits
manager = KeyManager(["sk-geheim-4711"], limits=Limits(rpm=100), pool="forked")
child = os.fork()
for _ in range(3):
    manager.get_key()
if child:
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
print("in the child", file=sys.stderr)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_in_memory_a_forked_child_warns_once() -> None:
    given = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FORKED], env=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    warning, last = done.stderr.splitlines()  # the parent has nothing to warn of
    assert warning.startswith("memory.forked pool=forked: ")
    assert last == "in the child"


def test_nothing_is_sent_for_bad_input() -> None:
    import openai

    with FakeOpenAI(keys=[SECRET], limits=stable_openai.testing.Limit(rpm=100)) as fake:
        KeyManager([Key(SECRET, models=["gpt-4o"], base_url=fake.url)], limits=Limits(tpm=100))

        @stable
        def chat(model: str, messages: Any, client: openai.OpenAI = None) -> object:  # type: ignore[assignment]
            return client.chat.completions.create(model=model, messages=messages)

        with pytest.raises(ConfigurationError):
            chat("o3", [])
        with pytest.raises(RequestTooLarge):
            chat("gpt-4o", [{"role": "user", "content": "x" * 1000}])
        assert not fake.log
        chat("gpt-4o", [{"role": "user", "content": "x" * 100}])
    assert len(fake.log) == 1
