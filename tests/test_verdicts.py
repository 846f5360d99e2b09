"""The verdict table (design.md, section 6), row by row: the fake upstream, the real openai client, both backends.

Time is handed in: one clock serves the store and the drivers, and nothing moves it but a wait of the broker's (which
is recorded) or the test. So no test sleeps, and every wait is seen to the millisecond.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from typing import Any

import openai
import pytest
import tenacity
from tenacity import stop_after_attempt, stop_after_delay, stop_never, wait_fixed, wait_none

from stable_openai import INJECTED, Exhausted, Key, KeyManager, Lease, Limits, NoKeys, RequestTooLarge, Verdict, stable
from stable_openai._flow import Attempt, Policy, call
from stable_openai._heartbeat import heartbeat
from stable_openai._verdict import judge, redact
from stable_openai._worker import Report
from stable_openai.backends.memory import MemoryBackend
from stable_openai.backends.redis import RedisBackend
from stable_openai.testing import Failure, FakeOpenAI, Limit, closed_port

httpx: Any = import_module(openai.DefaultHttpxClient.__bases__[0].__module__)  # httpx2; httpx under openai 2.x
START = 1_790_000_000_000
MINUTES = 60.0
DAY = 86_400.0
MODEL = "gpt-4o"
ALL_READY = {"one": "ready", "two": "ready", "three": "ready"}
NAMES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


class Clock:
    """The store's time and the drivers'. `slept` are the waits of the broker, in seconds."""

    def __init__(self) -> None:
        self.ms = START
        self.slept: list[float] = []

    def now(self) -> int:
        return self.ms

    def monotonic(self) -> float:
        return (self.ms - START) / 1000

    def advance(self, seconds: float) -> None:
        self.ms += round(seconds * 1000)

    def pause(self, backend: object, effect: Any) -> None:
        self.slept.append(effect.seconds)
        self.ms += math.ceil(round(effect.seconds * 1000, 6))

    async def apause(self, backend: object, effect: Any) -> None:
        self.pause(backend, effect)


class Asker:
    """A user's decorated function that sends one request; `raised` is what its attempts raised."""

    def __init__(self, manager: KeyManager, send: Callable[..., Any], options: dict[str, Any]) -> None:
        self.raised: list[Any] = []

        @stable(manager=manager, **options)
        def ask(model: str, api_key: str = INJECTED, **more: Any) -> Any:
            try:
                return send(api_key, model, **more)
            except Exception as error:
                self.raised.append(error)
                raise

        self._ask = ask

    def __call__(self, *, model: str = MODEL, **more: Any) -> Any:
        return self._ask(model, **more)


class World:
    """A fake upstream, a clock, and managers of one pool on one backend."""

    def __init__(self, fake: FakeOpenAI, http: Any, clock: Clock, url: str | None) -> None:
        self.fake, self.http, self.clock, self.url = fake, http, clock, url
        self.memory = MemoryBackend(clock=clock.now)
        self.managers: list[KeyManager] = []
        self.seen = 0

    def manager(self, keys: int | list[Key] = 3, **options: Any) -> KeyManager:
        """A manager of the keys sk-1, sk-2, .., each of its own account; the first ones are the next to be used."""
        made = KeyManager(keys if isinstance(keys, list) else own_keys(keys), pool="test-verdicts", **options)
        made._backend = RedisBackend(self.url, now=self.clock.now) if self.url else self.memory
        self.managers.append(made)
        made.check()
        self.clock.advance(1)
        return made

    def client(self, api_key: str, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{"api_key": api_key, "base_url": self.fake.url, "max_retries": 0, "http_client": self.http, **options}
        )

    def chat(self, api_key: str, model: str = MODEL, **options: Any) -> str | None:
        messages: Any = [{"role": "user", "content": "hi"}]
        answer = self.client(api_key, **options).chat.completions.create(model=model, messages=messages)
        return answer.choices[0].message.content

    def respond(self, api_key: str, model: str = MODEL, *, store: bool | None = None, **options: Any) -> str:
        stored: Any = {} if store is None else {"store": store}
        return self.client(api_key, **options).responses.create(model=model, input="hi", **stored).output_text

    def asker(self, manager: KeyManager, send: Callable[..., Any] | None = None, **options: Any) -> Asker:
        return Asker(manager, send or self.chat, {"stop": stop_after_attempt(3), "wait": wait_none(), **options})

    def refuse(self, manager: KeyManager, failure: Failure, model: str = MODEL) -> tuple[str, openai.APIError]:
        """One attempt by hand that fails so: its key, and the error."""
        with pytest.raises(openai.APIError) as caught, manager.lease(model=model, max_wait=0) as lease:
            self.fail_once(lease, failure, model)
        return lease.key.name, caught.value

    def fail_once(self, lease: Lease, failure: Failure, model: str = MODEL) -> None:
        self.fake.fail(failure, key=lease.api_key)
        self.chat(lease.api_key, model)

    def serve(self, manager: KeyManager, model: str = MODEL) -> str:
        """One attempt by hand that succeeds: its key."""
        with manager.lease(model=model, max_wait=0) as lease:
            assert self.chat(lease.api_key, model) == "echo: hi"
        return lease.key.name

    def used(self) -> list[str | None]:
        """The keys that went out since this was last asked."""
        self.fake.wait_for(lambda fake: fake.in_flight == 0)
        log = self.fake.log
        keys = [entry.key for entry in log[self.seen :]]
        self.seen = len(log)
        return keys


def own_keys(count: int) -> list[Key]:
    return [Key(f"sk-{n + 1}", name=NAMES[n], account=f"org-{n + 1:02}") for n in range(count)]


def states(manager: KeyManager) -> dict[str, str]:
    """Each key's state, with its reason if it is out, and how long."""
    return {key.name: state_of(key) for key in manager.status().keys}


def state_of(key: Any) -> str:
    if key.state == "ready":
        return "ready"
    return f"{key.state} {key.reason + ' ' if key.state == 'out' else ''}{key.seconds:g}"


def enter(manager: KeyManager, count: int, **options: Any) -> list[Lease]:
    """So many leases, held."""
    return [manager.lease(model=MODEL, **options).__enter__() for _ in range(count)]


def end(lease: Lease, error: BaseException | None = None) -> None:
    lease.__exit__(type(error) if error else None, error, None)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeOpenAI]:
    secrets = {f"sk-{n + 1}": f"org-{n + 1:02}" for n in range(12)}
    with FakeOpenAI(keys={**secrets, "sk-1b": "org-01"}) as fake:
        yield fake


@pytest.fixture(scope="module")
def http() -> Iterator[Any]:
    with openai.DefaultHttpxClient() as client:  # one TLS context for all the clients that the tests make
        yield client


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    # The heartbeat keeps real time: it would renew what a test has left to expire, and at the clock of an earlier test.
    monkeypatch.setattr(heartbeat, "serve", lambda worker: None)
    monkeypatch.setattr(heartbeat, "watch", lambda worker: None)
    for module in ("_drive", "_decorator", "_lease"):
        monkeypatch.setattr(f"stable_openai.{module}.monotonic", clock.monotonic)
    monkeypatch.setattr("stable_openai._drive.pause", clock.pause)
    monkeypatch.setattr("stable_openai._drive.apause", clock.apause)
    monkeypatch.setattr("stable_openai._worker.random.random", lambda: 0.0)  # the jitter of cooldowns
    monkeypatch.setattr("stable_openai._line.REPORT_AFTER_S", 1e9)  # a wait is one sleep
    monkeypatch.setattr("stable_openai._line.RISE_MS", 10**12)
    return clock


@pytest.fixture(params=["memory", "redis"])
def world(request: pytest.FixtureRequest, fake: FakeOpenAI, http: Any, clock: Clock) -> Iterator[World]:
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    fake.clear()
    world = World(fake, http, clock, url)
    yield world
    for manager in world.managers:
        manager.close()
    fake.wait_for(lambda fake: fake.in_flight == 0)


# a refusal that concerns the key or its account: another one at once, which is no attempt

QUOTA = [
    (Failure.insufficient_quota(), "insufficient_quota"),
    (Failure.billing_hard_limit_reached(), "billing_hard_limit_reached"),
    (Failure.billing_not_active(), "billing_not_active"),
    (Failure.credit_balance_exhausted(), "credit_balance_exhausted"),
    (Failure.organization_spend_limit_exceeded(), "organization_spend_limit_exceeded"),
    (Failure.error(429, code="organization_usage_limit_exceeded"), "organization_usage_limit_exceeded"),
    (Failure.project_spend_limit_exceeded(), "project_spend_limit_exceeded"),
    (Failure.insufficient_quota().no_retry(), "insufficient_quota"),
    (Failure.payment_required(), "payment_required"),
    (Failure.account_deactivated(), "account_deactivated"),
]
REFUSALS = [
    (Failure.rate_limit(retry_after_ms=20_500), openai.RateLimitError, "cooldown 20.5"),
    (Failure.rate_limit(), openai.RateLimitError, "cooldown 1"),
    (Failure.slow_down(), openai.RateLimitError, "cooldown 1"),
    (Failure.slow_down(503), openai.InternalServerError, "cooldown 1"),
    (Failure.quota_in_text_only(), openai.RateLimitError, "cooldown 1"),
    (Failure.error(429, message="Request too large for us now"), openai.RateLimitError, "cooldown 1"),  # text alone
    (Failure.error(429, body="<html>busy</html>", headers={"retry-after": "7"}), openai.RateLimitError, "cooldown 7"),
    (Failure.invalid_api_key(), openai.AuthenticationError, "ready"),  # the first of two
    *[(failure, openai.APIStatusError, f"out {code} 900") for failure, code in QUOTA],
]


@pytest.mark.parametrize(("failure", "kind", "state"), REFUSALS)
def test_a_refusal_moves_the_call_to_another_key_at_once(
    world: World, failure: Failure, kind: type[openai.APIStatusError], state: str
) -> None:
    manager = world.manager()
    ask = world.asker(manager, stop=stop_after_attempt(1))  # a move that were an attempt would end the call
    world.fake.fail(failure, key="sk-1")
    assert ask() == "echo: hi"
    assert world.used() == ["sk-1", "sk-2"]
    assert [type(error) for error in ask.raised] == [kind] or isinstance(ask.raised[0], kind)
    assert states(manager) == {**ALL_READY, "one": state}
    assert world.clock.slept == []
    # What the key is left alone for is its account's (× class), and only for as long.
    ask(), ask(), ask()
    assert ("sk-1" in world.used()) is (state == "ready")


@pytest.mark.parametrize(("failure", "kind", "state"), REFUSALS)
def test_a_refusal_inside_a_lease_passes_on_and_is_remembered(
    world: World, failure: Failure, kind: type[openai.APIStatusError], state: str
) -> None:
    manager = world.manager()
    name, error = world.refuse(manager, failure)
    assert (name, isinstance(error, kind)) == ("one", True)
    assert states(manager) == {**ALL_READY, "one": state}
    assert world.used() == ["sk-1"]


@pytest.mark.parametrize(("failure", "kind", "state"), REFUSALS)
def test_a_refusal_reported_by_hand_is_remembered_alike(
    world: World, failure: Failure, kind: type[openai.APIStatusError], state: str
) -> None:
    """As another SDK's user reports it: status, headers and decoded body."""
    manager = world.manager()
    world.fake.fail(failure)
    with manager.lease(model=MODEL) as lease:
        with pytest.raises(kind) as caught:
            world.chat(lease.api_key)
        lease.report(
            status=caught.value.status_code, headers=caught.value.response.headers, error={"error": caught.value.body}
        )
    assert states(manager) == {**ALL_READY, "one": state}


def test_a_cooldown_is_of_one_class_and_ends_when_the_server_said(world: World) -> None:
    manager = world.manager(1)
    world.refuse(manager, Failure.rate_limit(retry_after_ms=20_000))
    assert world.serve(manager, model="o3") == "one"
    world.clock.advance(19.999)
    with pytest.raises(Exhausted) as caught:
        world.serve(manager)
    assert (caught.value.reason, caught.value.retry_after) == ("cooldown", 0.001)
    world.clock.advance(0.001)
    assert world.serve(manager) == "one"


@pytest.mark.parametrize(("failure", "code"), QUOTA)
def test_a_quota_is_the_accounts_for_all_its_keys_and_models(world: World, failure: Failure, code: str) -> None:
    other = Key("sk-1b", name="sibling", account="org-01")
    manager = world.manager([*own_keys(2), other])
    world.refuse(manager, failure)
    assert states(manager) == {"one": f"out {code} 900", "two": "ready", "sibling": f"out {code} 900"}
    assert [world.serve(manager, model=model) for model in (MODEL, MODEL, "o3", "o3")] == ["two"] * 4


@pytest.mark.parametrize("failure", [Failure.rate_limit(retry_after=60), Failure.invalid_api_key()])
def test_a_call_moves_up_to_eight_times_then_moves_are_attempts(world: World, failure: Failure) -> None:
    keys = 12 if failure.status == 429 else 2  # of 401s three are a pool fault: see there
    manager = world.manager(keys)
    world.fake.fail(failure, times=None)
    ask = world.asker(manager, stop=stop_after_attempt(1))
    with pytest.raises(openai.APIStatusError) as caught:
        ask()
    assert caught.value is ask.raised[-1]
    assert world.used() == ([f"sk-{n}" for n in range(1, 10)] if keys == 12 else ["sk-1", "sk-2"])
    if keys == 12:
        with pytest.raises(openai.RateLimitError):
            world.asker(manager, stop=stop_after_attempt(2), max_wait=600)()
        assert world.used()[:3] == ["sk-10", "sk-11", "sk-12"]
        assert len(ask.raised) == 9


def test_a_ninth_refusal_waits_for_its_own_key_only(world: World) -> None:
    """The server's wait is that of the account which it refused: the call goes on with the next that is ready."""
    manager = world.manager(10)
    for n in range(1, 10):
        world.fake.fail(Failure.rate_limit(retry_after=300), key=f"sk-{n}")
    assert world.asker(manager)() == "echo: hi"
    assert world.used()[-1] == "sk-10"
    assert world.clock.slept == []


# the server's waits

WAITS = [
    ({"retry_after_ms": 1500}, 1.5),
    ({"retry_after": 2}, 2),
    ({"retry_after": "2.5"}, 2.5),
    ({"retry_after": 0}, 0),
    ({"message_wait": "7m12s"}, 432),
    ({"message_wait": "12ms"}, 0.012),
    ({"message_wait": "1.25s"}, 1.25),
    ({"message_wait": "6m0s"}, 360),
    ({"retry_after_ms": 1500, "retry_after": 9, "message_wait": "7m12s"}, 1.5),
    ({"retry_after": 9, "message_wait": "7m12s"}, 9),
    ({"retry_after": "soon", "message_wait": "3s"}, 3),
    ({"message_wait": "3s", "retry_after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 3),  # a date, but no clock to go by
    ({"retry_after": 901}, 900),
    ({"message_wait": "1h0m0.5s"}, 900),
    ({"retry_after": -3}, 1),  # without sense: as if there were none
    ({"retry_after": "nan"}, 1),
    ({"message_wait": "a while"}, 1),
]


@pytest.mark.parametrize(("waits", "seconds"), WAITS)
def test_the_servers_wait_is_kept(world: World, waits: dict[str, Any], seconds: float) -> None:
    manager = world.manager()
    world.refuse(manager, Failure.rate_limit(**waits))
    assert states(manager)["one"] == (f"cooldown {seconds:g}" if seconds else "ready")


@pytest.mark.parametrize(
    ("then", "seconds"),
    [("07:28:09", "9"), ("09:00:00", "900"), ("07:28:00", ""), ("07:00:00", ""), ("7 o'clock", "1")],
)
def test_a_date_to_retry_after_is_told_by_the_servers_clock(world: World, then: str, seconds: str) -> None:
    day = "Wed, 21 Oct 2026"
    manager = world.manager()
    headers = {"date": f"{day} 07:28:00 GMT", "retry-after": f"{day} {then} GMT"}
    world.refuse(manager, Failure.error(429, code="rate_limit_exceeded", headers=headers))
    assert states(manager)["one"] == (f"cooldown {seconds}" if seconds else "ready")


@pytest.mark.parametrize(("random", "seconds"), [(0.0, 100), (0.5, 105), (0.9999, 109.999)])
def test_a_cooldown_is_lengthened_by_jitter_never_shortened(
    world: World, monkeypatch: pytest.MonkeyPatch, random: float, seconds: float
) -> None:
    monkeypatch.setattr("stable_openai._worker.random.random", lambda: random)
    manager = world.manager()
    world.refuse(manager, Failure.rate_limit(retry_after=100))
    assert states(manager)["one"] == f"cooldown {seconds:g}"


def test_cooldowns_only_extend(world: World) -> None:
    manager = world.manager(1)
    leases = enter(manager, 3)
    for lease, wait, left in zip(leases, (60, 5, 90), (60, 60, 90)):
        with pytest.raises(openai.RateLimitError) as caught:
            world.fail_once(lease, Failure.rate_limit(retry_after=wait))
        end(lease, caught.value)
        assert states(manager) == {"one": f"cooldown {left}"}


def test_without_a_wait_the_cooldown_doubles_to_a_minute_and_a_success_resets_it(world: World) -> None:
    manager = world.manager(1)
    pauses = []
    for _ in range(9):
        world.refuse(manager, Failure.rate_limit())
        pauses.append(manager.status().keys[0].seconds or 0.0)
        world.clock.advance(pauses[-1])
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert world.serve(manager) == "one"
    world.refuse(manager, Failure.rate_limit())
    assert states(manager) == {"one": "cooldown 1"}


def test_what_was_granted_before_the_cooldown_does_not_double_it(world: World) -> None:
    manager = world.manager(1)
    leases = enter(manager, 5)
    world.clock.advance(0.1)
    for lease in leases:
        with pytest.raises(openai.RateLimitError) as caught:
            world.fail_once(lease, Failure.rate_limit())
        end(lease, caught.value)
    assert states(manager) == {"one": "cooldown 1"}


def test_a_call_waits_for_the_cooldown_of_the_only_key(world: World) -> None:
    manager = world.manager(1)
    world.fake.fail(Failure.rate_limit(message_wait="7m12s"))
    assert world.asker(manager, stop=stop_after_attempt(1))() == "echo: hi"
    assert world.clock.slept == [432]
    assert world.used() == ["sk-1", "sk-1"]


# 401: the key, or everybody

UNAUTHORISED = Failure.invalid_api_key()


def test_a_key_is_out_after_two_401s_in_a_row(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stable_openai")
    manager = world.manager()
    world.fake.fail(UNAUTHORISED, key="sk-1", times=None)
    ask = world.asker(manager)
    for _ in range(9):
        assert ask() == "echo: hi"
    assert world.used().count("sk-1") == 2
    assert states(manager) == {**ALL_READY, "one": "out invalid_api_key 900"}
    (line,) = [record.getMessage() for record in caplog.records if record.message.startswith("key.out")]
    fingerprint = manager.status().keys[0].fingerprint
    assert line == f"key.out pool=test-verdicts key=one fingerprint={fingerprint} scope=key reason=invalid_api_key"
    assert "sk-" not in caplog.text


def test_a_success_between_two_401s_starts_again(world: World) -> None:
    manager = world.manager(2)
    for _ in range(3):
        world.fake.fail(UNAUTHORISED, key="sk-1")
        assert [world.asker(manager)() for _ in range(4)] == ["echo: hi"] * 4
    assert states(manager) == {"one": "ready", "two": "ready"}


def test_a_key_of_an_account_is_out_alone(world: World) -> None:
    manager = world.manager([*own_keys(2), Key("sk-1b", name="sibling", account="org-01")])
    world.fake.fail(UNAUTHORISED, key="sk-1", times=None)
    ask = world.asker(manager)
    for _ in range(12):
        ask()
    assert states(manager) == {"one": "out invalid_api_key 900", "two": "ready", "sibling": "ready"}
    world.used()
    for _ in range(4):
        ask()
    assert sorted(map(str, world.used())) == ["sk-1b", "sk-1b", "sk-2", "sk-2"]


@pytest.mark.parametrize(("keys", "asked"), [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_three_accounts_or_all_that_fail_alike_are_a_pool_fault(
    world: World, caplog: pytest.LogCaptureFixture, keys: int, asked: int
) -> None:
    manager = world.manager(keys)
    world.fake.fail(UNAUTHORISED, times=None)
    ask = world.asker(manager)
    with pytest.raises(openai.AuthenticationError) as caught:
        ask()
    assert caught.value is ask.raised[-1]
    assert world.used() == [f"sk-{n + 1}" for n in range(asked)]
    assert "pool.fault" in caplog.text
    for _ in range(4):  # each call learns it anew, from one key, and touches none
        with pytest.raises(openai.AuthenticationError):
            ask()
        assert len(world.used()) == 1
    assert set(states(manager).values()) == {"ready"}
    assert world.clock.slept == []


def test_a_pool_fault_brings_back_the_keys_that_went_out_for_it(world: World) -> None:
    manager = world.manager(4)
    one, two, three, four, again = enter(manager, 5)
    assert again.key.name == "one"
    for lease in (one, again):
        with pytest.raises(openai.AuthenticationError) as caught:
            world.fail_once(lease, UNAUTHORISED)
        end(lease, caught.value)
    assert states(manager)["one"] == "out invalid_api_key 900"
    # Whoever asks meanwhile learns when the key comes back; the healing must reach the index too.
    waiting = enter(manager, 4)
    assert "one" not in [lease.key.name for lease in waiting]
    for lease in (two, three):
        with pytest.raises(openai.AuthenticationError) as caught:
            world.fail_once(lease, UNAUTHORISED)
        end(lease, caught.value)
    assert set(states(manager).values()) == {"ready"}
    for lease in (four, *waiting):
        end(lease)
    world.clock.advance(1)
    assert "one" in [world.serve(manager) for _ in range(4)]


def test_401s_more_than_a_minute_apart_are_no_pool_fault(world: World) -> None:
    manager = world.manager(3)
    for _ in range(3):
        world.refuse(manager, UNAUTHORISED)
        world.clock.advance(60)
    for _ in range(2):
        world.refuse(manager, UNAUTHORISED)
    assert states(manager) == {**ALL_READY, "one": "out invalid_api_key 900", "two": "out invalid_api_key 900"}


def test_a_success_between_401s_is_no_pool_fault(world: World) -> None:
    manager = world.manager(4)
    assert [world.refuse(manager, UNAUTHORISED)[0] for _ in range(2)] == ["one", "two"]
    assert world.serve(manager) == "three"
    world.fake.fail(UNAUTHORISED, key="sk-4")
    assert world.asker(manager)() == "echo: hi"
    assert world.used()[-2:] == ["sk-4", "sk-1"]


@pytest.mark.parametrize("failure", [UNAUTHORISED, Failure.insufficient_quota()])
def test_two_keys_without_use_do_not_hide_a_third(world: World, failure: Failure) -> None:
    manager = world.manager(3)
    for key in ("sk-1", "sk-2"):
        world.fake.fail(failure, key=key, times=None)
    ask = world.asker(manager)
    assert [ask() for _ in range(6)] == ["echo: hi"] * 6
    reason = failure.code
    assert states(manager) == {"one": f"out {reason} 900", "two": f"out {reason} 900", "three": "ready"}


# what concerns no key: raised at once, nothing is put out, no other key goes out for it

MISTAKES = [
    (Failure.bad_request(), openai.BadRequestError, "400"),
    (Failure.unprocessable(), openai.UnprocessableEntityError, "422"),
    (Failure.error(404), openai.NotFoundError, "404"),
    (Failure.error(403, type="request_forbidden"), openai.PermissionDeniedError, "403"),
    (Failure.error(413), openai.APIStatusError, "413"),
    (Failure.error(400, code="context_length_exceeded"), openai.BadRequestError, "400"),
    (Failure.ip_not_authorized(), openai.AuthenticationError, "ip_not_authorized"),
    (Failure.unsupported_country(), openai.PermissionDeniedError, "unsupported_country_region_territory"),
    (Failure.gateway_unauthorized(), openai.AuthenticationError, "401"),
    (Failure.gateway_unauthorized(html=True), openai.AuthenticationError, "401"),
    (Failure.server_error().no_retry(), openai.InternalServerError, "500"),
    (Failure.error(429, message="Slow.").no_retry(), openai.RateLimitError, "429"),
    (Failure.conflict().no_retry(), openai.ConflictError, "409"),
    (
        Failure.error(
            429,
            code="rate_limit_exceeded",
            type="tokens",
            message="Request too large for gpt-4o: Limit 9, Requested 10.",
        ),
        openai.RateLimitError,
        "rate_limit_exceeded",
    ),
]


@pytest.mark.parametrize(("failure", "kind", "reason"), MISTAKES)
def test_mistakes_burn_nothing(world: World, failure: Failure, kind: type[openai.APIStatusError], reason: str) -> None:
    manager = world.manager()
    world.fake.fail(failure, times=None)
    ask = world.asker(manager)
    for number in range(7):  # often enough for every counter: two in a row, three accounts, five failures
        with pytest.raises(kind) as caught:
            ask()
        assert type(caught.value) is type(ask.raised[-1])
        assert caught.value is ask.raised[number]
        assert len(world.used()) == 1
    with pytest.raises(kind), manager.lease(model=MODEL) as lease:
        world.chat(lease.api_key)
    assert judge(caught.value) == Verdict("neutral", "raise", reason)
    assert (states(manager), manager.status().breaker, world.clock.slept) == (ALL_READY, "", [])


def test_a_users_own_error_and_falsy_results_pass_through(world: World) -> None:
    manager = world.manager()
    own = LookupError("mine")

    def send(api_key: str, model: str, give: Any) -> Any:
        if give is own:
            raise own
        return give

    ask = world.asker(manager, send)
    with pytest.raises(LookupError) as caught:
        ask(give=own)
    assert caught.value is own
    assert [ask(give=value) for value in (None, 0, "", [])] == [None, 0, "", []]
    assert states(manager) == ALL_READY


def test_a_request_larger_than_the_servers_limit_is_raised_at_once(http: Any, clock: Clock) -> None:
    """As the fake itself answers it, and not by an injected failure."""
    with FakeOpenAI(keys={"sk-1": "org-01", "sk-2": "org-02"}, limits=Limit(tpm=10)) as fake:
        world = World(fake, http, clock, None)
        manager = world.manager(2)
        ask = world.asker(manager, lambda api_key, model: world.respond(api_key, "m" * 3 + model, store=False))
        assert ask() == "echo: hi"
        messages: Any = [{"role": "user", "content": "x" * 400}]
        large = world.asker(
            manager, lambda key, model: world.client(key).chat.completions.create(model=model, messages=messages)
        )
        with pytest.raises(openai.RateLimitError, match="Request too large"):
            large()
        assert world.used() == ["sk-1", "sk-2"]
        assert set(states(manager).values()) == {"ready"}
        manager.close()


def test_a_request_larger_than_every_declared_limit_is_refused_at_once(world: World) -> None:
    manager = world.manager(limits=Limits(tpm=100))
    ask = world.asker(manager, tokens=101)
    for attempt in (ask, lambda: manager.lease(model=MODEL, tokens=101).__enter__()):
        with pytest.raises(RequestTooLarge) as caught:
            attempt()
        assert (caught.value.tokens, caught.value.limit) == (101, "tpm")
    assert (world.used(), world.clock.slept) == ([], [])
    assert world.asker(manager, tokens=100)() == "echo: hi"


# models that a key has not


@pytest.mark.parametrize("status", [403, 404])
def test_a_model_that_another_account_has_served_is_out_for_the_key(world: World, status: int) -> None:
    manager = world.manager(models={"gpt-*": Limits()})
    ask = world.asker(manager, stop=stop_after_attempt(1))
    world.fake.fail(Failure.model_not_found(status), key="sk-1", model=MODEL, times=None)
    assert ask() == "echo: hi"
    assert world.used() == ["sk-1", "sk-2"]
    assert [ask() for _ in range(5)] == ["echo: hi"] * 5  # sk-1 says it again: by now another has served it
    assert world.used().count("sk-1") == 1
    assert states(manager) == ALL_READY  # for all other models
    assert "one" in [world.serve(manager, model="gpt-5") for _ in range(3)]
    world.used()
    world.clock.advance(15 * MINUTES - 1)
    assert [ask() for _ in range(3)] == ["echo: hi"] * 3
    assert "sk-1" not in world.used()
    world.clock.advance(1)
    assert [ask() for _ in range(3)] == ["echo: hi"] * 3
    assert "sk-1" in world.used()


def test_what_the_account_itself_has_served_is_no_proof(world: World) -> None:
    manager = world.manager(2)
    world.fake.fail(Failure.server_error(), key="sk-2", times=None)
    assert world.serve(manager) == "one"
    world.refuse(manager, Failure.server_error())
    name, _ = world.refuse(manager, Failure.model_not_found())
    assert name == "one"
    with manager.lease(model=MODEL, max_wait=0), manager.lease(model=MODEL, max_wait=0) as lease:
        assert lease.key.name == "one"  # it was not put out


def test_a_model_that_exists_is_looked_for_beyond_three_accounts(world: World) -> None:
    manager = world.manager(4)
    leases = enter(manager, 4)
    for lease in leases:
        end(lease, None if lease.key.name == "four" else LookupError())
    for n in (1, 2, 3):
        world.fake.fail(Failure.model_not_found(), key=f"sk-{n}", times=None)
    ask = world.asker(manager, stop=stop_after_attempt(1))
    assert [ask(), ask()] == ["echo: hi"] * 2
    assert world.used() == ["sk-1", "sk-2", "sk-3", "sk-4", "sk-4"]


@pytest.mark.parametrize(("keys", "asked"), [(1, 1), (2, 2), (3, 3), (5, 3)])
@pytest.mark.parametrize("status", [403, 404])
def test_a_misspelt_model_is_raised_after_three_accounts(world: World, status: int, keys: int, asked: int) -> None:
    manager = world.manager(keys)
    world.fake.fail(Failure.model_not_found(status), model="gpt-4x", times=None)
    ask = world.asker(manager)
    for _ in range(4):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(model="gpt-4x")
        assert (caught.value.status_code, caught.value.code) == (status, "model_not_found")
        assert caught.value is ask.raised[-1]
        assert len(set(world.used())) == asked
    assert set(states(manager).values()) == {"ready"}
    assert [key.live for key in manager.status().keys] == [0] * keys
    assert world.clock.slept == []
    with pytest.raises(openai.APIStatusError), manager.lease(model="gpt-4x", max_wait=0) as lease:
        world.chat(lease.api_key, "gpt-4x")


def test_a_failure_after_an_unknown_model_is_retried_where_the_model_may_be(world: World) -> None:
    manager = world.manager(2)
    world.fake.fail(Failure.model_not_found(), key="sk-1", times=None)
    world.fake.fail(Failure.server_error(), key="sk-2")
    assert world.asker(manager)() == "echo: hi"
    assert world.used() == ["sk-1", "sk-2", "sk-2"]
    assert [key.live for key in manager.status().keys] == [0, 0]


# failures of the attempt: another key, with a backoff; they count

FAILURES = [
    (Failure.request_timeout(), openai.APIStatusError),
    (Failure.conflict(), openai.ConflictError),
    *[(Failure.server_error(status), openai.InternalServerError) for status in (500, 502, 503, 504, 529)],
    (Failure.closed(), openai.APIConnectionError),
    (Failure.cut(), openai.APIConnectionError),
]


@pytest.mark.parametrize(("failure", "kind"), FAILURES)
def test_a_failure_is_retried_with_another_key(world: World, failure: Failure, kind: type[openai.APIError]) -> None:
    manager = world.manager()
    world.fake.fail(failure)
    ask = world.asker(manager, wait=wait_fixed(3))
    assert ask() == "echo: hi"
    assert world.used() == ["sk-1", "sk-2"]
    assert [isinstance(error, kind) for error in ask.raised] == [True]
    assert world.clock.slept == [3]
    assert states(manager) == ALL_READY


@pytest.mark.parametrize(("failure", "kind"), FAILURES)
def test_the_last_failure_reaches_the_caller_unchanged(
    world: World, failure: Failure, kind: type[openai.APIError]
) -> None:
    manager = world.manager()
    world.fake.fail(failure, times=None)
    ask = world.asker(manager, stop=stop_after_attempt(4))
    with pytest.raises(kind) as caught:
        ask()
    assert caught.value is ask.raised[3]
    assert world.used() == ["sk-1", "sk-2", "sk-3", "sk-1"]
    assert isinstance(world.refuse(manager, failure)[1], kind)
    assert states(manager) == ALL_READY


def test_another_key_is_taken_even_where_the_same_would_be_next(world: World) -> None:
    manager = world.manager(2)
    held = enter(manager, 3)  # one, two, one: the next would be two
    end(held[0])
    world.fake.fail(Failure.server_error(), key="sk-2")
    assert world.asker(manager)() == "echo: hi"
    assert world.used() == ["sk-2", "sk-1"]
    for lease in held[1:]:
        end(lease)


def test_a_503_that_names_its_wait_is_left_alone_for_as_long(world: World) -> None:
    manager = world.manager()
    world.fake.fail(Failure.error(503, headers={"retry-after": "4"}))
    assert world.asker(manager)() == "echo: hi"
    assert world.clock.slept == [4]


@pytest.mark.parametrize("failure", [Failure.hang(), Failure.stall(), Failure.closed(), Failure.cut()])
@pytest.mark.parametrize(
    ("endpoint", "store", "harmless"),
    [("chat", None, True), ("respond", False, True), ("respond", True, False), ("respond", None, False)],
)
def test_what_may_have_been_done_is_repeated_only_where_that_is_harmless(
    world: World, failure: Failure, endpoint: str, store: bool | None, harmless: bool
) -> None:
    manager = world.manager()
    world.fake.fail(failure)
    more: dict[str, Any] = {"timeout": 0.1 if failure.act in ("hang", "stall") else 10.0}
    if endpoint == "respond":
        more["store"] = store
    ask = world.asker(manager, getattr(world, endpoint))
    expected = openai.APITimeoutError if failure.act in ("hang", "stall") else openai.APIConnectionError
    if harmless:
        assert ask(**more) == "echo: hi"
        assert world.used() == ["sk-1", "sk-2"]
    else:
        with pytest.raises(expected) as caught:
            ask(**more)
        assert caught.value is ask.raised[0]
        assert world.used() == ["sk-1"]
    assert type(ask.raised[0]) is expected
    assert states(manager) == ALL_READY


def test_what_never_left_is_repeated_refunded_and_counts_for_the_breaker(world: World) -> None:
    manager = world.manager(limits=Limits(rpm=60, tpm=1000))
    nowhere = f"http://127.0.0.1:{closed_port()}/v1"
    ask = world.asker(manager, world.respond, tokens=100, stop=stop_after_attempt(4))
    with pytest.raises(openai.APIConnectionError) as caught:
        ask(base_url=nowhere, store=True)
    assert caught.value is ask.raised[3]
    assert not judge(caught.value).sent
    assert {meter.used for key in manager.status().keys for meter in key.meters} == {0}
    assert manager.status().breaker == ""
    with pytest.raises(openai.APIConnectionError), manager.lease(model=MODEL) as lease:
        world.chat(lease.api_key, base_url=nowhere)
    assert (manager.status().breaker, manager.status().breaker_s) == ("connection", 1)
    assert states(manager) == ALL_READY
    world.fake.fail(Failure.server_error())
    assert world.asker(manager, tokens=100)() == "echo: hi"  # a refusal costs, after the breaker's pause
    assert sum(meter.used for key in manager.status().keys for meter in key.meters) == pytest.approx(202, abs=2)


REQUEST = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions", json={})


@pytest.mark.parametrize(
    ("cause", "kind", "sent"),
    [
        (httpx.ConnectError, "connection", False),
        (httpx.ConnectTimeout, "timeout", False),
        (httpx.ReadTimeout, "timeout", True),
        (httpx.WriteTimeout, "timeout", True),
        (httpx.ReadError, "connection", True),
        (httpx.WriteError, "connection", True),
        (httpx.ProxyError, "connection", True),
        (httpx.RemoteProtocolError, "connection", True),
    ],
)
def test_the_type_of_the_cause_says_whether_a_request_was_sent(cause: type[Exception], kind: str, sent: bool) -> None:
    bare = cause("x", request=REQUEST)
    wrapped: openai.APIConnectionError
    if issubclass(cause, httpx.TimeoutException):
        wrapped = openai.APITimeoutError(REQUEST)
    else:
        wrapped = openai.APIConnectionError(request=REQUEST)
    wrapped.__cause__ = bare
    for error in (bare, wrapped):
        assert judge(error) == Verdict("failed", "retry", kind, sent=sent)
    mine = ConnectionRefusedError()  # of a library that is not known: nobody can tell what was sent
    assert judge(mine) == Verdict("neutral", "raise", "ConnectionRefusedError")


def test_the_plain_client_of_a_users_function(world: World) -> None:
    """As people write it, without a shared connection pool."""
    manager = world.manager()

    @stable(manager=manager, wait=wait_none())
    def ask(model: str, api_key: str = INJECTED) -> str:
        with openai.OpenAI(api_key=api_key, base_url=world.fake.url, max_retries=0) as client:
            return client.responses.create(model=model, input="hi").output_text

    for failure in (UNAUTHORISED, Failure.rate_limit(retry_after=9), Failure.server_error(503)):
        world.fake.fail(failure)
        assert ask(MODEL) == "echo: hi"
    assert world.used() == ["sk-1", "sk-2", "sk-3", "sk-1", "sk-2", "sk-1"]
    assert states(manager) == {**ALL_READY, "three": "cooldown 9"}


def test_tenacitys_strategies_say_how_often_and_how_long(world: World) -> None:
    manager = world.manager()
    world.fake.fail(Failure.conflict(), times=None)
    seen: list[tuple[int, float, float]] = []

    def wait(state: tenacity.RetryCallState) -> float:
        assert isinstance(state.outcome and state.outcome.exception(), openai.ConflictError)
        seen.append((state.attempt_number, state.seconds_since_start or 0.0, state.upcoming_sleep))
        return 2.0**state.attempt_number

    with pytest.raises(openai.ConflictError):
        world.asker(manager, wait=wait, stop=stop_after_delay(14))()
    assert world.clock.slept == [2, 4, 8]
    assert [entry[:2] for entry in seen] == [(1, 0), (2, 2), (3, 6), (4, 14)]
    assert len(world.used()) == 4


def test_a_backoff_that_cannot_end_in_time_ends_the_call(world: World) -> None:
    manager = world.manager()
    world.fake.fail(Failure.conflict(), times=None)
    with pytest.raises(openai.ConflictError):
        world.asker(manager, wait=wait_fixed(4), stop=stop_never, max_wait=10)()
    assert world.clock.slept == [4, 4]


# the breaker


def test_five_failures_of_one_kind_pause_the_pool_and_a_success_ends_it(world: World) -> None:
    manager = world.manager()
    world.fake.fail(Failure.server_error(), times=5)
    with pytest.raises(openai.InternalServerError):
        world.asker(manager, stop=stop_after_attempt(4))()
    assert manager.status().breaker == ""
    with pytest.raises(openai.InternalServerError):
        world.asker(manager, stop=stop_after_attempt(1))()
    status = manager.status()
    assert (status.breaker, status.breaker_s, states(manager)) == ("5xx", 1, ALL_READY)
    assert len(world.used()) == 5
    ask = world.asker(manager)
    with pytest.raises(Exhausted) as caught:
        world.asker(manager, max_wait=0.999)()
    assert (caught.value.reason, caught.value.retry_after, caught.value.__cause__) == ("5xx", 1, None)
    assert (world.used(), world.clock.slept) == ([], [])
    assert ask() == "echo: hi"
    assert world.clock.slept == [1]
    assert manager.status().breaker == ""
    assert [ask() for _ in range(3)] == ["echo: hi"] * 3
    assert world.clock.slept == [1]


def test_the_breakers_pause_doubles_to_a_minute(world: World) -> None:
    manager = world.manager()
    world.fake.fail(Failure.server_error(), times=5 + 8)
    assert world.asker(manager, stop=stop_after_attempt(14))() == "echo: hi"
    assert world.clock.slept == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert manager.status().breaker == ""
    world.fake.fail(Failure.server_error(), times=None)
    with pytest.raises(Exhausted):  # a call that would have to wait beyond its deadline
        world.asker(manager, stop=stop_never, max_wait=20)()
    assert world.clock.slept[9:] == [1, 2, 4, 8]


def test_another_failure_of_the_breakers_probe_leaves_it_as_it_was(world: World) -> None:
    manager = world.manager()
    for _ in range(5):
        world.refuse(manager, Failure.server_error())
    world.clock.advance(1)
    world.refuse(manager, Failure.bad_request())
    world.refuse(manager, Failure.closed())
    world.refuse(manager, Failure.server_error())
    assert (manager.status().breaker, manager.status().breaker_s) == ("5xx", 2)
    world.clock.advance(2)
    world.refuse(manager, Failure.rate_limit())  # somebody is there, and alive
    assert manager.status().breaker == ""


@pytest.mark.parametrize(
    ("heard", "opens"), [([], True), (["two"], True), (["two", "three"], False), (["two", "three", "four"], False)]
)
def test_the_breaker_needs_half_of_the_accounts_that_were_heard_of(world: World, heard: list[str], opens: bool) -> None:
    manager = world.manager(1 + len(heard))
    world.refuse(manager, Failure.server_error())
    assert [world.refuse(manager, Failure.rate_limit(retry_after=60))[0] for _ in heard] == heard
    for _ in range(4):
        assert manager.status().breaker == ""
        assert world.refuse(manager, Failure.server_error())[0] == "one"
    assert manager.status().breaker == ("5xx" if opens else "")


def test_failures_of_several_kinds_or_long_ago_or_before_a_success_are_no_outage(world: World) -> None:
    manager = world.manager()
    for _ in range(4):
        world.refuse(manager, Failure.server_error())
    for _ in range(4):
        world.refuse(manager, Failure.closed())
    world.clock.advance(10)
    world.refuse(manager, Failure.server_error())
    assert manager.status().breaker == ""
    for _ in range(3):
        world.refuse(manager, Failure.server_error())
    world.serve(manager)
    for _ in range(4):
        world.refuse(manager, Failure.server_error())
    assert manager.status().breaker == ""
    world.refuse(manager, Failure.server_error())
    assert manager.status().breaker == "5xx"


@pytest.mark.parametrize("failure", [Failure.conflict(), Failure.request_timeout(), Failure.rate_limit(retry_after=0)])
def test_conflicts_and_refusals_are_no_outage(world: World, failure: Failure) -> None:
    manager = world.manager()
    for _ in range(12):
        world.refuse(manager, failure)
    assert manager.status().breaker == ""


# half-open probes

OUT: list[tuple[Failure, int, str]] = [
    (Failure.insufficient_quota(), 1, "insufficient_quota"),
    (UNAUTHORISED, 2, "invalid_api_key"),
]


def put_out(world: World, manager: KeyManager, failure: Failure, times: int) -> None:
    """The key sk-1 is out. (A second account keeps a 401 from being everybody's.)"""
    world.fake.fail(failure, key="sk-1", times=times)
    ask = world.asker(manager)
    for _ in range(4):
        assert ask() == "echo: hi"
    assert states(manager)["one"] == f"out {failure.code} 900"
    world.used()


def probe(world: World, manager: KeyManager) -> Lease:
    """The next lease of key one; its turn comes within two."""
    world.clock.advance(0.002)  # it is ready from now on; the others have been for longer
    lease, other = enter(manager, 2, max_wait=0)
    if lease.key.name != "one":
        lease, other = other, lease
    end(other)
    assert lease.key.name == "one"
    return lease


@pytest.mark.parametrize(("failure", "times", "reason"), OUT)
def test_a_probe_comes_after_a_quarter_of_an_hour_and_the_pause_doubles_to_a_day(
    world: World, failure: Failure, times: int, reason: str
) -> None:
    manager = world.manager(2)
    put_out(world, manager, failure, times)
    pauses = []
    for _ in range(9):
        pauses.append(manager.status().keys[0].seconds or 0.0)
        world.clock.advance(pauses[-1] - 0.001)
        assert [world.serve(manager) for _ in range(3)] == ["two"] * 3
        world.clock.advance(0.001)
        lease = probe(world, manager)
        assert [world.serve(manager) for _ in range(3)] == ["two"] * 3  # one probe at a time
        with pytest.raises(openai.APIStatusError) as caught:
            world.fail_once(lease, failure)
        end(lease, caught.value)
    assert pauses == [900 * 2**n for n in range(7)] + [DAY, DAY]
    world.clock.advance(DAY)
    end(probe(world, manager))
    assert states(manager)["one"] == "ready"
    world.clock.advance(10)
    assert "one" in [world.serve(manager) for _ in range(2)]


@pytest.mark.parametrize(("failure", "times", "reason"), OUT)
@pytest.mark.parametrize(
    ("answer", "healed"),
    [
        (None, True),
        (Failure.rate_limit(retry_after=7), True),
        (Failure.quota_in_text_only(), True),
        (Failure.bad_request(), False),
        (Failure.server_error(), False),
        (Failure.closed(), False),
        (Failure.model_not_found(), False),
        (Failure.gateway_unauthorized(), False),
    ],
)
def test_what_heals_and_what_frees_the_probe_unchanged(
    world: World, failure: Failure, times: int, reason: str, answer: Failure | None, healed: bool
) -> None:
    manager = world.manager(2)
    put_out(world, manager, failure, times)
    world.clock.advance(900)
    lease = probe(world, manager)
    if answer is None:
        end(lease)
    else:
        with pytest.raises(openai.APIError) as caught:
            world.fail_once(lease, answer)
        end(lease, caught.value)
    cooled = answer is not None and answer.status == 429
    waits = f"cooldown {7 if answer and answer.headers[1:] else 1}"
    assert states(manager)["one"].startswith(waits if cooled else "ready" if healed else f"out {reason} 0")
    world.clock.advance(900 if answer and answer.code == "model_not_found" else 10)  # it has not that model meanwhile
    first = probe(world, manager)
    # Healed, the key serves many at once; else this is the next probe, and its failure doubles the first pause.
    assert ("one" in [world.serve(manager) for _ in range(3)]) is healed
    with pytest.raises(openai.APIStatusError) as again:
        world.fail_once(first, failure)
    end(first, again.value)
    expected = "ready" if healed and times == 2 else f"out {reason} {900 if healed else 1800}"
    assert states(manager)["one"] == expected


@pytest.mark.parametrize(("failure", "times", "reason"), OUT)
def test_a_probe_whose_worker_died_is_freed_unchanged(world: World, failure: Failure, times: int, reason: str) -> None:
    manager, other = world.manager(2), world.manager(2)
    put_out(world, manager, failure, times)
    world.clock.advance(900)
    probe(world, manager)  # never settled
    assert [world.serve(other) for _ in range(3)] == ["two"] * 3
    world.clock.advance(60)
    assert "one" in [world.serve(other) for _ in range(2)]
    assert states(other)["one"].startswith("ready")


def test_what_was_granted_before_a_key_was_out_does_not_double_its_pause(world: World) -> None:
    manager = world.manager(1)
    for lease in enter(manager, 3):
        with pytest.raises(openai.RateLimitError) as caught:
            world.fail_once(lease, Failure.insufficient_quota())
        end(lease, caught.value)
        assert states(manager) == {"one": "out insufficient_quota 900"}


@pytest.mark.parametrize("kind", ["account", "breaker"])
def test_one_probe_at_a_time_across_workers(world: World, kind: str) -> None:
    workers = [world.manager(1 if kind == "account" else 3) for _ in range(4)]
    for _ in range(1 if kind == "account" else 5):
        world.refuse(workers[0], Failure.insufficient_quota() if kind == "account" else Failure.server_error())
    world.clock.advance(900 if kind == "account" else 1)
    start = threading.Barrier(16)

    def ask(number: int) -> Lease | Exhausted:
        start.wait(10)
        try:
            return workers[number % 4].lease(model=MODEL, max_wait=0).__enter__()
        except Exhausted as error:
            return error

    with ThreadPoolExecutor(16) as threads:
        got = list(threads.map(ask, range(16)))
    (lease,) = [one for one in got if isinstance(one, Lease)]
    refused = [one for one in got if isinstance(one, Exhausted)]
    assert {(type(one), one.reason, one.retry_after) for one in refused} == {
        (Exhausted, "insufficient_quota" if kind == "account" else "5xx", None)
    }
    end(lease)
    world.clock.advance(5)
    assert {world.serve(worker) for worker in workers} <= {"one", "two", "three"}


# deadlines, and what is said where no key can serve


def test_a_wait_that_cannot_end_in_time_fails_at_once(world: World) -> None:
    manager = world.manager(2)
    for seconds in (60, 30):
        world.refuse(manager, Failure.rate_limit(retry_after=seconds))
    world.used()
    for wait in (29.9, 0):
        with pytest.raises(Exhausted) as caught:
            world.asker(manager, max_wait=wait)()
        assert (type(caught.value), caught.value.reason, caught.value.retry_after) == (Exhausted, "cooldown", 30)
    assert (world.used(), world.clock.slept) == ([], [])
    assert world.asker(manager, max_wait=30)() == "echo: hi"
    assert (world.used(), world.clock.slept) == (["sk-2"], [30])


def test_the_deadline_is_the_whole_calls(world: World) -> None:
    manager = world.manager(1)
    world.fake.fail(Failure.rate_limit(retry_after=20), times=None)
    ask = world.asker(manager, stop=stop_never, max_wait=50)
    with pytest.raises(Exhausted) as caught:
        ask()
    assert world.clock.slept == [20, 20]
    assert caught.value.__cause__ is ask.raised[-1]


def test_no_keys_says_why_key_by_key(world: World) -> None:
    manager = world.manager(3)
    world.fake.fail(Failure.insufficient_quota(), key="sk-1")
    world.fake.fail(Failure.billing_not_active(), key="sk-2")
    world.fake.fail(Failure.payment_required(), key="sk-3")
    ask = world.asker(manager)
    with pytest.raises(NoKeys) as caught:
        ask()
    why = {"one": "insufficient_quota", "two": "billing_not_active", "three": "payment_required"}
    assert (caught.value.keys, caught.value.retry_after) == (why, 900)
    assert caught.value.reason in why.values()
    assert all(f"{name}: {reason}" in str(caught.value) for name, reason in why.items())
    assert caught.value.__cause__ is ask.raised[-1]
    assert world.used() == ["sk-1", "sk-2", "sk-3"]
    with pytest.raises(NoKeys) as again, manager.lease(model=MODEL):
        pass
    assert (again.value.keys, world.used(), world.clock.slept) == (why, [], [])
    manager.enable("one")
    assert world.serve(manager) == "one"


def test_a_patient_call_waits_for_the_probe(world: World) -> None:
    manager = world.manager(1)
    world.fake.fail(Failure.insufficient_quota())
    assert world.asker(manager, max_wait=900)() == "echo: hi"
    assert world.clock.slept == [900]


def test_disabled_keys_are_no_keys(world: World) -> None:
    manager = world.manager(2)
    manager.disable("one")
    manager.disable("two")
    with pytest.raises(NoKeys) as caught:
        world.asker(manager)()
    assert (caught.value.keys, caught.value.retry_after) == ({"one": "disabled", "two": "disabled"}, None)
    assert (world.used(), world.clock.slept) == ([], [])


# classify=


@pytest.mark.parametrize(
    ("verdict", "used", "state"),
    [
        (Verdict("account", "move", "mine"), ["sk-1", "sk-2"], "out mine 900"),
        (Verdict("limited", "move", "mine", wait_s=33.0), ["sk-1", "sk-2"], "cooldown 33"),
        (Verdict("failed", "retry", "mine"), ["sk-1", "sk-2"], "ready"),
        (Verdict("neutral", "raise", "mine"), ["sk-1"], "ready"),
        (Verdict("account", "raise", "mine"), ["sk-1"], "out mine 900"),
        (None, ["sk-1"], "ready"),
    ],
)
def test_classify_goes_before_the_table(world: World, verdict: Verdict | None, used: list[str], state: str) -> None:
    manager = world.manager()
    seen: list[BaseException] = []

    def classify(error: BaseException) -> Verdict | None:
        seen.append(error)
        return verdict

    world.fake.fail(Failure.bad_request())
    ask = world.asker(manager, classify=classify)
    if used == ["sk-1"]:
        with pytest.raises(openai.BadRequestError):
            ask()
    else:
        assert ask() == "echo: hi"
    assert seen == ask.raised
    assert world.used() == used
    assert states(manager) == {**ALL_READY, "one": state}
    with pytest.raises(openai.BadRequestError), manager.lease(model=MODEL, classify=classify) as lease:
        world.fail_once(lease, Failure.bad_request())
    assert states(manager)[lease.key.name] == state


def test_a_classify_that_fails_gives_the_lease_back(world: World) -> None:
    manager = world.manager(1)

    def classify(error: BaseException) -> Verdict | None:
        raise ZeroDivisionError

    world.fake.fail(Failure.bad_request())
    with pytest.raises(ZeroDivisionError) as caught:
        world.asker(manager, classify=classify)()
    assert isinstance(caught.value.__cause__, openai.BadRequestError)
    assert secrets_in(caught.value) == []
    assert manager.status().keys[0].live == 0


# generators and coroutines


def streamed(world: World, api_key: str) -> Iterator[str]:
    messages: Any = [{"role": "user", "content": "a b c d"}]
    stream: Any = world.client(api_key).chat.completions.create(model=MODEL, messages=messages, stream=True)
    with stream:
        for chunk in stream:
            yield chunk.choices[0].delta.content or ""


@pytest.mark.parametrize(
    ("failure", "kind", "outcome"),
    [
        (Failure.stream_error(), openai.APIError, "failed"),
        (Failure.stream_error("rate_limit_exceeded"), openai.APIError, "limited"),
        (Failure.stream_error("insufficient_quota"), openai.APIError, "account"),
        (Failure.stream_error(None), openai.APIError, "failed"),  # its type says server_error
        (Failure.stream_error("organization_spend_limit_exceeded"), openai.APIError, "account"),
        (Failure.cut(), Exception, "failed"),
    ],
)
def test_a_stream_that_breaks_off_is_retried_by_who_gives_nothing_before_its_end(
    world: World, failure: Failure, kind: type[Exception], outcome: str
) -> None:
    """An error event is a bare APIError, without a response: its code and type decide."""
    manager = world.manager()
    ask = world.asker(manager, lambda api_key, model: "".join(streamed(world, api_key)))
    world.fake.fail(failure)
    assert ask() == "echo: a b c d"
    assert world.used() == ["sk-1", "sk-2"]
    (error,) = ask.raised
    assert isinstance(error, kind)
    assert not isinstance(error, openai.APIStatusError)
    assert judge(error).outcome == outcome
    state = {"failed": "ready", "limited": "cooldown 1", "account": f"out {failure.code} 900"}[outcome]
    assert states(manager)["one"] == state


def test_an_error_event_about_the_request_is_raised(world: World) -> None:
    manager = world.manager()
    ask = world.asker(manager, lambda api_key, model: "".join(streamed(world, api_key)))
    for kind, code in (("invalid_request_error", "invalid_prompt"), (None, None)):
        world.fake.fail(replace(Failure.error(500, code=code, type=kind), act="event"))
        with pytest.raises(openai.APIError) as caught:
            ask()
        assert type(caught.value) is openai.APIError
        assert judge(caught.value) == Verdict("neutral", "raise", "APIError")
        assert len(world.used()) == 1
    assert states(manager) == ALL_READY


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_generators_are_retried_only_before_their_first_item(world: World, colour: str) -> None:
    manager = world.manager()

    @stable(manager=manager, model=MODEL, wait=wait_none())
    def words(api_key: str = INJECTED) -> Iterator[str]:
        yield from streamed(world, api_key)

    @stable(manager=manager, model=MODEL, wait=wait_none())
    async def awords(api_key: str = INJECTED) -> AsyncIterator[str]:
        for word in streamed(world, api_key):
            yield word

    async def collect(got: list[str]) -> None:
        try:
            async for word in awords():
                got.append(word)
        finally:
            await manager._backend.aclose()

    def run() -> list[str]:
        got: list[str] = []
        try:
            if colour == "async":
                asyncio.run(collect(got))
            else:
                got.extend(words())
        except openai.APIError as error:
            got.append(type(error).__name__)
        return got

    def words_of(got: list[str]) -> str:
        return "".join(got)

    for failure in (Failure.server_error(), Failure.rate_limit(retry_after=1), Failure.insufficient_quota()):
        world.fake.fail(failure)
        assert words_of(run()) == "echo: a b c d"
        assert len(world.used()) == 2
        world.clock.advance(1)
    manager.enable("three")
    before = states(manager)
    world.fake.fail(Failure.stream_error())
    got = run()
    assert (got[-1], len(world.used())) == ("APIError", 1)
    assert 1 < len(got) < 7
    assert [key.live for key in manager.status().keys] == [0, 0, 0]
    assert states(manager) == before
    world.fake.fail(Failure.stream_error("insufficient_quota"))
    assert run()[-1] == "APIError"  # not retried, but settled with what it says
    assert sum(state.startswith("out insufficient_quota") for state in states(manager).values()) > sum(
        state.startswith("out") for state in before.values()
    )


def test_a_generator_that_is_closed_says_nothing_of_its_key(world: World) -> None:
    manager = world.manager(1)

    @stable(manager=manager, model=MODEL)
    def words(api_key: str = INJECTED) -> Iterator[str]:
        yield from streamed(world, api_key)

    some: Any = words()
    next(some)
    some.close()
    assert world.serve(manager) == "one"
    assert (states(manager), manager.status().keys[0].live) == ({"one": "ready"}, 0)


def test_a_call_whose_driver_is_dropped_gives_its_lease_back(world: World) -> None:
    manager = world.manager(1)
    policy = Policy(stop_never, wait_none())
    flow = call(manager._worker, manager.request(MODEL), policy, None, 0.0, Report)
    effect = next(flow)
    while not isinstance(effect, Attempt):
        effect = flow.send((0.0, manager._backend.run(effect)))
    assert manager.status().keys[0].live == 1
    flow.close()
    assert world.serve(manager) == "one"  # whatever comes next settles it
    assert manager.status().keys[0].live == 0


def test_an_async_generator_that_is_closed_says_nothing_of_its_key(world: World) -> None:
    manager = world.manager(1)

    @stable(manager=manager, model=MODEL)
    async def words(api_key: str = INJECTED) -> AsyncIterator[str]:
        for word in streamed(world, api_key):
            yield word

    async def use() -> None:
        some: Any = words()
        await some.__anext__()
        await some.aclose()
        async with manager.lease(model=MODEL, max_wait=0):
            assert [key.live for key in (await manager.astatus()).keys] == [1]
        await manager._backend.aclose()

    asyncio.run(use())
    assert (states(manager), manager.status().keys[0].live) == ({"one": "ready"}, 0)


def test_coroutine_functions_follow_the_same_table(world: World) -> None:
    manager = world.manager()
    rows = [
        (Failure.insufficient_quota(), ["sk-1", "sk-2"]),
        (Failure.server_error(), ["sk-3", "sk-2"]),
        (Failure.rate_limit(retry_after=5), ["sk-3", "sk-2"]),
        (Failure.bad_request(), ["sk-2"]),
    ]

    async def use() -> None:
        async with openai.AsyncOpenAI(api_key="none", base_url=world.fake.url, max_retries=0) as base:

            @stable(manager=manager, wait=wait_none())
            async def ask(model: str = MODEL, api_key: str = INJECTED) -> str:
                client = base.with_options(api_key=api_key)
                return (await client.responses.create(model=model, input="hi")).output_text

            for failure, used in rows:
                world.fake.fail(failure)
                if len(used) == 1:
                    with pytest.raises(openai.BadRequestError) as caught:
                        await ask()
                    assert secrets_in(caught.value) == []
                else:
                    assert await ask() == "echo: hi"
                assert world.used() == used
            world.fake.fail(Failure.insufficient_quota())
            with pytest.raises(openai.RateLimitError):
                async with manager.lease(model=MODEL) as lease:
                    await base.with_options(api_key=lease.api_key).responses.create(model=MODEL, input="hi")
        await manager._backend.aclose()

    asyncio.run(use())
    assert states(manager) == {
        "one": "out insufficient_quota 900", "two": "out insufficient_quota 900", "three": "cooldown 5",
    }  # fmt: skip


# secrets stay home


def chain_of(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    todo = [error]
    while todo:
        link = todo.pop()
        if link is not None and link not in found:
            found.append(link)
            todo += [link.__cause__, link.__context__]
    return found


def requests_in(error: BaseException) -> list[Any]:
    holders: list[Any] = chain_of(error)
    holders += [getattr(link, "response", None) for link in holders]
    found = []
    for holder in holders:
        try:
            found.append(holder.request)
        except (AttributeError, RuntimeError):
            continue
    return found


def secrets_in(error: BaseException) -> list[str]:
    """The headers of an error's requests that hold a key; there must be a request, and it must have had one."""
    sent = [request.headers["authorization"] for request in requests_in(error) if "authorization" in request.headers]
    assert sent
    return [header for header in sent if header != "[redacted]"]


@pytest.mark.parametrize(
    "failure",
    [
        Failure.bad_request(),
        Failure.rate_limit(retry_after=60),
        Failure.insufficient_quota(),
        Failure.server_error(),
        Failure.closed(),
        Failure.cut(),
        Failure.hang(),
        UNAUTHORISED,
    ],
)
def test_the_keys_in_openais_errors_are_redacted(world: World, failure: Failure) -> None:
    manager = world.manager(1, max_wait=0)
    world.fake.fail(failure, times=None)
    ask = world.asker(manager, stop=stop_after_attempt(1))
    with pytest.raises((openai.APIError, Exhausted)) as caught:
        ask(timeout=0.1 if failure.act == "hang" else 10.0)
    assert secrets_in(caught.value) == []
    (error,) = ask.raised
    assert error.request.headers["authorization"] == "[redacted]"
    if isinstance(error, openai.APIStatusError):
        assert error.response.request.headers["authorization"] == "[redacted]"
    else:
        assert len(requests_in(error)) > 1  # the HTTP library's errors behind it


@pytest.mark.parametrize(
    "reported",
    [False, True],
)
def test_errors_that_leave_a_lease_are_redacted(world: World, reported: bool) -> None:
    manager = world.manager(1)
    world.fake.fail(Failure.bad_request())

    def use() -> None:
        with manager.lease(model=MODEL) as lease:
            if reported:
                lease.report(status=400)
            world.chat(lease.api_key)

    with pytest.raises(openai.BadRequestError) as caught:
        use()
    assert secrets_in(caught.value) == []


@pytest.mark.parametrize("header", ["Authorization", "api-key"])
def test_requests_are_redacted_wherever_an_error_keeps_them(header: str) -> None:
    request = httpx.Request("GET", "http://127.0.0.1", headers={header: "Bearer sk-1"})
    bare, grouped = ValueError(), ValueError()
    bare.response = httpx.Response(400, request=request)  # type: ignore[attr-defined]
    grouped.exceptions = (bare,)  # type: ignore[attr-defined]  # as an ExceptionGroup has them
    orphan = ValueError()
    orphan.response = httpx.Response(400)  # type: ignore[attr-defined]  # its .request raises
    orphan.__context__, grouped.__cause__ = grouped, orphan  # a circle
    redact(orphan)
    assert request.headers[header] == "[redacted]"


def test_a_users_error_around_openais_is_redacted_too(world: World) -> None:
    manager = world.manager()

    def send(api_key: str, model: str) -> str | None:
        try:
            return world.chat(api_key, model)
        except openai.BadRequestError as error:
            raise RuntimeError("mine") from error

    world.fake.fail(Failure.bad_request())
    with pytest.raises(RuntimeError) as caught:
        world.asker(manager, send)()
    assert isinstance(caught.value.__cause__, openai.BadRequestError)
    assert secrets_in(caught.value) == []


def test_this_processs_own_pool_of_connections_says_nothing_of_the_upstream() -> None:
    assert judge(httpx.PoolTimeout("x", request=REQUEST)) == Verdict("neutral", "retry", "pool_timeout", sent=False)


def test_what_another_call_came_to_says_nothing_of_this_ones_key() -> None:
    """Not even where it was a lost connection that it gave up with."""
    error = Exhausted("m", retry_after=1.5, reason="rpm", key="a")
    error.__cause__ = openai.APIConnectionError(request=httpx.Request("POST", "https://host/v1/chat/completions"))
    assert judge(error) == Verdict("neutral", "raise", "Exhausted")


def test_one_revoked_key_of_an_account_is_no_fault_of_the_pool(world: World) -> None:
    """A sibling that works shows that the fault is the key's: it goes out, and its account serves on."""
    world.fake.fail(Failure.invalid_api_key(), key="sk-1", times=None)
    manager = world.manager([Key("sk-1", name="one", account="shared"), Key("sk-2", name="two", account="shared")])
    ask = world.asker(manager)
    for _ in range(6):
        ask()
    assert states(manager) == {"one": "out invalid_api_key 900", "two": "ready"}


def test_an_unknown_model_waits_for_the_account_that_rests(world: World) -> None:
    """Nobody has served the model: the account that rests may know it, so it is asked before the call gives up."""
    manager = world.manager(2, max_wait=0)
    world.fake.fail(Failure.model_not_found(), key="sk-1", times=None)
    world.fake.fail(Failure.rate_limit(retry_after_ms=30_000), key="sk-2")
    with pytest.raises(Exhausted) as raised:
        world.asker(manager)()
    assert raised.value.retry_after == pytest.approx(31.5, abs=1.6)
    assert isinstance(raised.value.__cause__, openai.RateLimitError | openai.NotFoundError)


def test_a_lease_outlives_its_key(world: World) -> None:
    manager = world.manager(2)
    with manager.lease() as lease:
        manager.remove(lease.key)
        assert lease.api_key == "sk-1"
    assert [key.name for key in manager.status().keys] == ["two"]
