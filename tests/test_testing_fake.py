"""The fake upstream: its meters against brute-force definitions, the rest through the real openai client."""

from __future__ import annotations

import ast
import asyncio
import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stable_openai.testing
from stable_openai.testing import Failure, FakeOpenAI, FakeProcess, Limit, closed_port
from stable_openai.testing.limits import Account, Rule
from stable_openai.testing.meters import DAY_NS, SECOND_NS, Bucket, Calendar, Meter, Sliding
from stable_openai.testing.refusals import go_duration

ROOT = Path(stable_openai.testing.__file__).parents[2]
HI: Any = [{"role": "user", "content": "hi"}]

# meters: pure, on simulated nanoseconds

Charges = list[tuple[int, int]]
Fits = Callable[[Charges, int, int], bool]


def bucket_fits(limit: int, period: int, capacity: Fraction) -> Fits:
    """A full bucket's level is the least, over all starting points, of a full bucket less what came since."""

    def fits(charges: Charges, amount: int, now: int) -> bool:
        rate = Fraction(limit, period)
        since = [capacity]
        for start in {at for at, _ in charges}:
            spent = sum(charged for at, charged in charges if at >= start)
            since.append(capacity - spent + rate * (now - start))
        return amount <= limit and min(since) >= min(Fraction(amount), capacity)

    return fits


def window_fits(limit: int, counts: Callable[[int, int], bool]) -> Fits:
    def fits(charges: Charges, amount: int, now: int) -> bool:
        return sum(charged for at, charged in charges if counts(at, now)) + amount <= limit

    return fits


limits = st.integers(1, 6)
periods = st.integers(1, 20)


@st.composite
def meters(draw: st.DrawFn) -> tuple[Meter, Fits]:
    limit, period = draw(limits), draw(periods)
    match draw(st.sampled_from(["bucket", "burst", "sliding", "calendar"])):
        case "bucket":
            return Bucket(limit, period), bucket_fits(limit, period, Fraction(limit))
        case "burst":
            burst = draw(st.integers(1, period))
            capacity = max(Fraction(limit * burst, period), Fraction(1))
            return Bucket(limit, period, burst), bucket_fits(limit, period, capacity)
        case "sliding":
            return Sliding(limit, period), window_fits(limit, lambda at, now: now - period < at <= now)
        case _:
            return Calendar(limit, period), window_fits(limit, lambda at, now: at // period == now // period)


@given(meters(), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 8)), max_size=25), st.integers(0, 99))
def test_a_meter_grants_what_its_definition_grants_and_its_waits_are_exact(
    made: tuple[Meter, Fits], steps: list[tuple[int, int]], now: int
) -> None:
    meter, fits = made
    charges: Charges = []
    for pause, amount in steps:
        now += pause
        wait = meter.wait_ns(amount, now)
        assert (wait == 0) == fits(charges, amount, now)
        assert (wait is None) == (amount > meter.limit)
        if wait == 0:
            meter.charge(amount, now)
            charges.append((now, amount))
        elif wait is not None:
            assert not fits(charges, amount, now + wait - 1)
            assert fits(charges, amount, now + wait)
            later = copy.deepcopy(meter)
            assert later.wait_ns(amount, now + wait) == 0
        fresh = copy.deepcopy(meter)
        reset = fresh.reset_ns(now)
        assert fresh.used(now + reset) == 0
        assert reset == 0 or copy.deepcopy(meter).used(now + reset - 1) > 0


@given(st.integers(1, 5), periods, st.lists(st.integers(0, 9), max_size=40))
def test_sliding_never_has_more_than_the_limit_in_any_window(limit: int, period: int, pauses: list[int]) -> None:
    meter, now, granted = Sliding(limit, period), 0, list[int]()
    for pause in pauses:
        now += pause
        if meter.wait_ns(1, now) == 0:
            meter.charge(1, now)
            granted.append(now)
    for start in granted:
        assert sum(start <= at < start + period for at in granted) <= limit


def test_a_request_larger_than_the_burst_needs_a_full_bucket_and_leaves_it_negative() -> None:
    meter = Bucket(60, 60 * SECOND_NS, 10 * SECOND_NS)
    assert meter.wait_ns(40, 0) == 0
    meter.charge(40, 0)
    assert meter.remaining(0) == 0
    assert meter.wait_ns(1, 0) == 31 * SECOND_NS
    assert meter.wait_ns(40, 0) == 40 * SECOND_NS
    assert meter.wait_ns(61, 0) is None


@pytest.mark.parametrize(("day", "hours"), [("2027-03-28", 23), ("2027-10-31", 25), ("2027-06-01", 24)])
def test_a_calendar_day_ends_at_local_midnight(day: str, hours: int) -> None:
    midnight = int(datetime.fromisoformat(day).replace(tzinfo=ZoneInfo("Europe/Berlin")).timestamp()) * SECOND_NS
    meter = Calendar(1, DAY_NS, "Europe/Berlin")
    meter.charge(1, midnight)
    assert meter.wait_ns(1, midnight) == hours * 3600 * SECOND_NS
    assert meter.wait_ns(1, midnight + hours * 3600 * SECOND_NS) == 0


def test_limits_are_charged_all_or_nothing_and_the_slowest_is_named() -> None:
    account = Account(Limit(rpm=10, rpd=100, tpm=50, tpd=60, rule="sliding"), 60 * SECOND_NS, DAY_NS)
    assert account.admit(45, 0) is None
    refused = account.admit(20, 1)
    assert refused is not None
    assert (refused.limit, refused.used, refused.wait_ns) == ("tpd", 45, DAY_NS - 1)
    assert account.requests["rpm"].used(1) == account.requests["rpd"].used(1) == 1
    assert account.tokens["tpm"].used(1) == 45
    too_large = account.admit(51, 1)
    assert too_large is not None
    assert too_large.too_large
    assert too_large.limit == "tpm"


def test_day_rule_applies_to_the_day_alone() -> None:
    account = Account(Limit(rpm=1, rpd=1, rule="sliding", day_rule="calendar"), 60 * SECOND_NS, DAY_NS)
    assert isinstance(account.requests["rpm"], Sliding)
    assert isinstance(account.requests["rpd"], Calendar)


def test_tokens_held_are_not_available_until_what_was_used_is_charged() -> None:
    for rule in ("bucket", "sliding", "calendar"):
        account = Account(Limit(tpm=100, rule=rule), 60 * SECOND_NS, DAY_NS)
        assert account.admit(80, 0, hold=True) is None
        refused = account.admit(30, 0, hold=True)
        assert refused is not None
        assert refused.wait_ns is None
        account.use(80, 10, 0)
        account.leave()
        assert account.admit(90, 0, hold=True) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0, "0s"), (0.012, "12ms"), (0.0111, "12ms"), (0.9999, "1s"), (1, "1s"), (1.25, "1.25s")],
        *[(59.9999, "1m0s"), (360, "6m0s"), (432, "7m12s"), (3600.5, "1h0m0.5s")],
    ],
)
def test_go_durations(seconds: float, text: str) -> None:
    assert go_duration(round(seconds * SECOND_NS)) == text


@pytest.mark.parametrize(
    "wrong", [{"rpm": 0}, {"rule": "leaky"}, {"day_rule": "x"}, {"tz": "No/Where"}, {"burst_s": 0}]
)
def test_limits_without_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Limit(**wrong)


# endpoints, through the client


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[FakeOpenAI, openai.OpenAI]]:
    """A fake with the key sk-a of org-1, unless told otherwise, and a client with that key."""
    with FakeOpenAI(**{"keys": {"sk-a": "org-1"}} | settings) as fake, client_of(fake.url) as client:
        yield fake, client


def client_of(url: str, key: str = "sk-a", timeout: float = 10.0) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=url, max_retries=0, timeout=timeout)


def async_client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="sk-a", base_url=url, max_retries=0, timeout=10)


def port_of(fake: FakeOpenAI) -> int:
    return urlsplit(fake.url).port or 0


def ask(client: openai.OpenAI, text: str = "hi", **more: Any) -> Any:
    return client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": text}], **more)


def test_chat() -> None:
    with serving() as (fake, client):
        answer = ask(client, "what is up?", n=2, user="test-7")
        assert [choice.message.content for choice in answer.choices] == ["echo: what is up?"] * 2
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 16)
        (entry,) = fake.log
        assert (entry.key, entry.account, entry.model, entry.user) == ("sk-a", "org-1", "gpt-4o", "test-7")
        assert (entry.path, entry.status, entry.code, entry.tokens) == ("/v1/chat/completions", 200, None, 2)
        assert (entry.request_id, entry.connection) == (answer._request_id, 1)
        ask(client, extra_headers={"X-Test-Id": "test-8"})
        assert fake.log[-1].user == "test-8"


def test_chat_streamed() -> None:
    with serving() as (_, client):
        chunks = list(ask(client, "a b  c", stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "echo: a b  c"
        assert [chunk.usage and chunk.usage.total_tokens for chunk in chunks] == [None] * (len(chunks) - 1) + [17]
        assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_responses() -> None:
    with serving() as (_, client):
        assert client.responses.create(model="gpt-4o", input="hello").output_text == "echo: hello"
        parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": "in parts"}]}]
        answer = client.responses.create(model="gpt-4o", input=parts, max_output_tokens=3)
        assert answer.output_text == "echo: in parts"
        assert answer.usage is not None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (2, 3)


def test_responses_streamed() -> None:
    with serving() as (_, client):
        events = list(client.responses.create(model="gpt-4o", input="one two", stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "echo: one two"
        with client.responses.stream(model="gpt-4o", input="one two") as stream:
            assert stream.get_final_response().output_text == "echo: one two"


def test_embeddings() -> None:
    with serving() as (fake, client):
        one = client.embeddings.create(model="e", input="same words")
        two = client.embeddings.create(model="e", input=["other", "same words"], encoding_format="float")
        assert one.data[0].embedding == two.data[1].embedding != two.data[0].embedding
        client.embeddings.create(model="e", input=[1, 2, 3], dimensions=5)
        assert len(client.embeddings.create(model="e", input=[[1, 2], [3]], dimensions=5).data[1].embedding) == 5
        assert [entry.tokens for entry in fake.log] == [2, 3, 3, 3]


def test_the_async_client() -> None:
    async def use(url: str) -> None:
        async with async_client_of(url) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model="m", messages=[{"role": "user", "content": str(number)}])
                    for number in range(50)
                )
            )
            assert [answer.choices[0].message.content for answer in answers] == [f"echo: {n}" for n in range(50)]
            stream: Any = await client.chat.completions.create(model="m", messages=HI, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "echo: hi"
            assert (await client.responses.create(model="m", input="hi")).output_text == "echo: hi"
            assert len((await client.embeddings.create(model="m", input=["a", "b"])).data) == 2
            assert [model.id async for model in client.models.list()]

    with serving() as (fake, _):
        asyncio.run(use(fake.url))
        assert len(fake.log) == 54
        assert not fake.over


def test_any_base_path_and_azures_header() -> None:
    with serving() as (fake, client):
        ask(client.with_options(base_url=fake.url.removesuffix("/v1")))
        azure = openai.AzureOpenAI(
            api_key="sk-a",
            azure_endpoint=fake.url,
            api_version="2026-01-01",
            azure_deployment="d",
            max_retries=0,
        )
        with azure:
            ask(azure)
        assert [(entry.path, entry.account) for entry in fake.log] == [
            ("/chat/completions", "org-1"),
            ("/v1/openai/deployments/d/chat/completions", "org-1"),
        ]


def test_requests_without_sense() -> None:
    with serving(unknown_models=["gpt-9"]) as (fake, client):
        with pytest.raises(openai.AuthenticationError) as unknown_key:
            ask(client.with_options(api_key="sk-nobody"))
        assert unknown_key.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError) as unknown_model:
            client.responses.create(model="gpt-9", input="hi")
        assert unknown_model.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.batches.list()
        bodies: list[object] = [{}, [], {"model": 3}]
        for body in bodies:
            with pytest.raises(openai.BadRequestError):
                client.post("/chat/completions", cast_to=object, body=body)
        assert [entry.account for entry in fake.log] == [None] + ["org-1"] * 5
        assert not fake.over


# failures

STATUSES = [
    (Failure.rate_limit(), openai.RateLimitError, 429, "rate_limit_exceeded"),
    (Failure.slow_down(), openai.RateLimitError, 429, "slow_down"),
    (Failure.slow_down(503), openai.InternalServerError, 503, "slow_down"),
    (Failure.insufficient_quota(), openai.RateLimitError, 429, "insufficient_quota"),
    (Failure.billing_hard_limit_reached(), openai.RateLimitError, 429, "billing_hard_limit_reached"),
    (Failure.billing_not_active(), openai.RateLimitError, 429, "billing_not_active"),
    (Failure.credit_balance_exhausted(), openai.RateLimitError, 429, "credit_balance_exhausted"),
    (
        Failure.organization_spend_limit_exceeded(),
        openai.RateLimitError,
        429,
        "organization_spend_limit_exceeded",
    ),
    (Failure.project_spend_limit_exceeded(), openai.RateLimitError, 429, "project_spend_limit_exceeded"),
    (Failure.quota_in_text_only(), openai.RateLimitError, 429, None),
    (Failure.payment_required(), openai.APIStatusError, 402, None),
    (Failure.invalid_api_key(), openai.AuthenticationError, 401, "invalid_api_key"),
    (Failure.gateway_unauthorized(), openai.AuthenticationError, 401, None),
    (Failure.gateway_unauthorized(html=True), openai.AuthenticationError, 401, None),
    (Failure.account_deactivated(), openai.AuthenticationError, 401, "account_deactivated"),
    (Failure.ip_not_authorized(), openai.AuthenticationError, 401, "ip_not_authorized"),
    (
        Failure.unsupported_country(),
        openai.PermissionDeniedError,
        403,
        "unsupported_country_region_territory",
    ),
    (Failure.model_not_found(), openai.NotFoundError, 404, "model_not_found"),
    (Failure.model_not_found(403), openai.PermissionDeniedError, 403, "model_not_found"),
    (Failure.bad_request(), openai.BadRequestError, 400, None),
    (Failure.unprocessable(), openai.UnprocessableEntityError, 422, None),
    (Failure.request_timeout(), openai.APIStatusError, 408, None),
    (Failure.conflict(), openai.ConflictError, 409, None),
    (Failure.server_error(), openai.InternalServerError, 500, None),
    (Failure.server_error(502), openai.InternalServerError, 502, None),
    (Failure.server_error(503), openai.InternalServerError, 503, None),
    (Failure.server_error(504), openai.InternalServerError, 504, None),
    (
        Failure.error(429, code="organization_x_limit_exceeded"),
        openai.RateLimitError,
        429,
        "organization_x_limit_exceeded",
    ),
    (Failure.stream_error(), openai.InternalServerError, 500, "server_error"),
]


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeOpenAI, openai.OpenAI]]:
    with serving() as both:
        yield both


@pytest.mark.parametrize(("failure", "kind", "status", "code"), STATUSES)
def test_failures_that_answer(
    shared: tuple[FakeOpenAI, openai.OpenAI],
    failure: Failure,
    kind: type[openai.APIStatusError],
    status: int,
    code: str | None,
) -> None:
    fake, client = shared
    fake.clear()
    fake.fail(failure)
    with pytest.raises(kind) as raised:
        ask(client)
    assert (raised.value.status_code, raised.value.code) == (status, code)
    assert "x-ratelimit-limit-requests" not in raised.value.response.headers
    assert (fake.log[-1].status, fake.log[-1].code, fake.log[-1].limit) == (status, code, None)
    assert ask(client).choices


def test_waits_of_a_rate_limit() -> None:
    with serving() as (fake, client):
        fake.fail(Failure.rate_limit(retry_after_ms=20.5, retry_after=3, message_wait="7m12s"))
        with pytest.raises(openai.RateLimitError, match=r"Please try again in 7m12s\.") as raised:
            ask(client)
        assert raised.value.response.headers["retry-after-ms"] == "20.5"
        assert raised.value.response.headers["retry-after"] == "3"
        fake.fail(Failure.rate_limit())
        with pytest.raises(openai.RateLimitError, match=r"Requested 1\.$") as raised:
            ask(client)
        assert not [name for name in raised.value.response.headers if "retry" in name]


def test_a_failure_may_carry_any_headers_and_body() -> None:
    with serving() as (fake, client):
        fake.fail(Failure.error(503, headers={"X-Why": "x"}, body="busy").no_retry())
        with pytest.raises(openai.InternalServerError) as raised:
            ask(client)
        assert raised.value.response.text == "busy"
        assert raised.value.response.headers["x-should-retry"] == "false"
        assert raised.value.response.headers["x-why"] == "x"


def test_failures_hit_only_what_they_are_meant_for() -> None:
    with serving(keys={"sk-a": "org-1", "sk-b": "org-2"}) as (fake, client):
        other = client.with_options(api_key="sk-b")
        fake.fail(Failure.server_error(501), account="org-2", times=2)
        fake.fail(Failure.server_error(502), key="sk-a", model="gpt-4o*", path="/chat/completions")
        fake.fail(Failure.server_error(503), path="/v1/embeddings", times=None)
        client.responses.create(model="gpt-4o", input="hi")
        client.chat.completions.create(model="o3", messages=[{"role": "user", "content": "hi"}])
        for call in (client, other, other):
            with pytest.raises(openai.InternalServerError):
                ask(call)
        ask(client)
        ask(other)
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                other.embeddings.create(model="e", input="x")
        assert [entry.status for entry in fake.log] == [200, 200, 502, 501, 501, 200, 200, 503, 503, 503]
        fake.clear()
        assert not fake.log
        other.embeddings.create(model="e", input="x")


def test_connections_that_break() -> None:
    with serving() as (fake, client):
        fake.fail(Failure.closed())
        with pytest.raises(openai.APIConnectionError):
            ask(client)
        fake.fail(Failure.cut())
        with pytest.raises(openai.APIConnectionError):
            ask(client)
        fake.fail(Failure.cut())
        stream = iter(ask(client, "a b", stream=True))
        assert [next(stream).choices[0].delta.content for _ in range(3)] == ["", "echo:", " a"]
        with pytest.raises(openai.APIConnectionError):
            next(stream)
        assert [entry.status for entry in fake.log] == [0, 200, 200]
        assert fake.in_flight == 0


def test_an_error_event_in_a_stream() -> None:
    with serving() as (fake, client):
        fake.fail(Failure.stream_error("overloaded"), times=2)
        for stream in (
            ask(client, "a b c d", stream=True),
            client.responses.create(model="m", input="a b c d", stream=True),
        ):
            assert next(iter(stream))
            with pytest.raises(openai.APIError) as raised:
                list(stream)
            assert type(raised.value) is openai.APIError
            assert raised.value.code == "overloaded"
        assert [(entry.status, entry.code) for entry in fake.log] == [(200, "overloaded")] * 2


def test_a_hanging_request_ends_when_the_client_gives_up() -> None:
    with serving(limits=Limit(concurrency=1)) as (fake, client):
        fake.fail(Failure.hang())
        with pytest.raises(openai.APITimeoutError):
            ask(client, timeout=0.05)
        fake.wait_for(lambda fake: fake.log)
        assert (fake.log[0].status, fake.log[0].tokens, fake.in_flight) == (0, 1, 0)
        assert ask(client).choices


def test_release_lets_go_of_what_hangs_or_stalls() -> None:
    with serving() as (fake, client), ThreadPoolExecutor(2) as threads:
        fake.fail(Failure.hang())
        hanging = threads.submit(ask, client)
        fake.wait_for(lambda fake: fake.in_flight == 1)
        fake.release()
        assert hanging.result(10).choices
        fake.fail(Failure.stall())
        stream = iter(ask(client, "a b c", stream=True))
        first = next(stream)
        assert fake.in_flight == 1
        fake.release()
        text = "".join(chunk.choices[0].delta.content or "" for chunk in [first, *stream])
        assert text == "echo: a b c"


def test_latency_and_slow_answers() -> None:
    with serving(latency_s=lambda: 0.02) as (fake, client):
        fake.fail(Failure.slow(0.02))
        ask(client)
        ask(client)
        assert fake.log[0].duration_s >= 0.04
        assert fake.log[1].duration_s >= 0.02


def test_a_closed_port_refuses_connections() -> None:
    with (
        client_of(f"http://127.0.0.1:{closed_port()}/v1") as client,
        pytest.raises(openai.APIConnectionError),
    ):
        ask(client)


# limits

FOREVER_S = 1e6  # a window whose end no test meets


@pytest.mark.parametrize("rule", ["bucket", "sliding", "calendar"])
def test_requests_over_the_limit_are_refused(rule: Rule) -> None:
    with serving(limits=Limit(rpm=2, rule=rule), minute_s=FOREVER_S) as (fake, client):
        ask(client)
        ask(client)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client)
        error = raised.value
        assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
        wait_ms = int(error.response.headers["retry-after-ms"])
        assert 0 < wait_ms <= FOREVER_S * 1000
        assert int(error.response.headers["retry-after"]) == -(-wait_ms // 1000)
        text = r"Rate limit reached for gpt-4o in organization org-1 on requests per min \(RPM\): "
        text += r"Limit 2, Used 2, Requested 1\. Please try again in (\S+)\."
        found = re.fullmatch(text, json.loads(error.response.text)["error"]["message"])
        assert found is not None
        assert found[1] == go_duration(wait_ms * 1_000_000)
        assert [entry.limit for entry in fake.over] == ["rpm"]
        assert fake.log[-1] == fake.over[0]
        assert (fake.over[0].status, fake.over[0].tokens) == (429, 0)
        assert client.responses.create(model="another", input="hi")


def test_a_request_fits_after_the_wait_that_it_was_told() -> None:
    with serving(limits=Limit(rpm=10, burst_s=0.001), minute_s=1.0) as (fake, client):
        ask(client)
        ask(client.with_options(max_retries=1))
        assert [entry.status for entry in fake.log] == [200, 429, 200]


def test_a_clock_that_jumps_back_stands_still_for_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(limits=Limit(rpm=1, rule="sliding")) as (_, client):
        ask(client)
        monkeypatch.setattr("time.time_ns", lambda: 10**18)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client)
        assert int(raised.value.response.headers["retry-after-ms"]) <= 60_000


def test_headers_tell_the_minutes_limits_else_the_days() -> None:
    limit = Limit(rpm=5, rpd=100, tpd=50, rule="sliding")
    with serving(limits=limit) as (_, client):
        headers = client.chat.completions.with_raw_response.create(
            model="m", messages=[{"role": "user", "content": "x" * 40}], max_tokens=20
        ).headers
        told = {name: value for name, value in headers.items() if name.startswith("x-ratelimit")}
        assert told == {
            "x-ratelimit-limit-requests": "5",
            "x-ratelimit-remaining-requests": "4",
            "x-ratelimit-reset-requests": "1m0s",
            "x-ratelimit-limit-tokens": "50",
            "x-ratelimit-remaining-tokens": "30",
            "x-ratelimit-reset-tokens": "24h0m0s",
        }
        assert headers["openai-organization"] == "org-1"
        assert headers["x-request-id"].startswith("req_")
        assert int(headers["openai-processing-ms"]) >= 0


def test_the_larger_of_output_limit_and_prompt_is_reserved_on_arrival() -> None:
    with serving(limits=Limit(tpm=120, rule="sliding")) as (fake, client):
        ask(client, "x" * 40, max_tokens=50, n=2)
        with pytest.raises(openai.RateLimitError, match=r"\(TPM\): Limit 120, Used 100, Requested 21") as raised:
            ask(client, "x" * 84, max_completion_tokens=10)
        assert raised.value.type == "tokens"
        ask(client, "x" * 80, max_tokens=19)
        with pytest.raises(openai.RateLimitError, match="Request too large for gpt-4o in org") as raised:
            ask(client, max_tokens=200)
        assert "retry-after" not in raised.value.response.headers
        assert [(entry.tokens, entry.limit) for entry in fake.log] == [
            (100, None),
            (0, "tpm"),
            (20, None),
            (0, "tpm"),
        ]


def test_tokens_charged_by_use_are_held_meanwhile() -> None:
    limit = Limit(tpm=100, rule="sliding")
    with (
        serving(limits=limit, charge="used", output_tokens=lambda body: len(body["user"])) as (fake, client),
        ThreadPoolExecutor(2) as threads,
    ):
        with fake.hold():
            first = threads.submit(ask, client, max_tokens=90, user="12345")
            fake.wait_for(lambda fake: fake.in_flight == 1)
            second = threads.submit(ask, client, max_tokens=90, user="12345")
            fake.wait_for(lambda fake: fake.in_flight == 2)
        assert first.result(10).usage.total_tokens == 6
        assert isinstance(second.exception(10), openai.RateLimitError)
        ask(client, max_tokens=90, user="123")
        assert [(entry.tokens, entry.limit) for entry in fake.log] == [(6, None), (0, "tpm"), (4, None)]


def test_models_of_a_pattern_share_meters_and_accounts_do_not() -> None:
    with serving(
        keys={"sk-a": "org-1", "sk-a2": "org-1", "sk-b": "org-2"},
        limits=Limit(rpm=1),
        models={"gpt-4o*": Limit(rpm=2), "gpt-4o-pro": Limit(rpm=3)},
        account_limits={"org-2": Limit(rpm=4)},
        minute_s=FOREVER_S,
    ) as (_, client):

        def admitted(key: str, *models: str) -> int:
            caller, count = client.with_options(api_key=key), 0
            try:
                while count < 9:
                    caller.responses.create(model=models[count % len(models)], input="hi")
                    count += 1
            except openai.RateLimitError:
                pass
            return count

        assert admitted("sk-a", "gpt-4o", "gpt-4o-mini") == 2
        assert admitted("sk-a2", "gpt-4o-nano") == 0
        assert admitted("sk-a", "gpt-4o-pro") == 3
        assert admitted("sk-a2", "o3") == 1
        assert admitted("sk-b", "gpt-4o", "gpt-4o-mini") == 4


@pytest.mark.parametrize(("refusals_count", "left"), [(False, 2), (True, 1)])
def test_refusals_cost_a_request_only_if_told_so(refusals_count: bool, left: int) -> None:
    limit = Limit(rpm=2, tpm=10, rule="sliding")
    with serving(limits=limit, refusals_count=refusals_count) as (fake, client):
        with pytest.raises(openai.RateLimitError):
            ask(client, max_tokens=50)
        for _ in range(left):
            ask(client)
        with pytest.raises(openai.RateLimitError):
            ask(client)
        assert [entry.limit for entry in fake.over] == ["tpm", "rpm"]


def test_an_injected_failure_is_charged_but_never_hides_a_request_over_the_limit() -> None:
    with serving(limits=Limit(rpm=1), minute_s=FOREVER_S) as (fake, client):
        fake.fail(Failure.server_error(), times=None)
        with pytest.raises(openai.InternalServerError):
            ask(client)
        with pytest.raises(openai.RateLimitError):
            ask(client)
        assert len(fake.over) == 1


def test_concurrency_hold_and_release() -> None:
    async def use(fake: FakeOpenAI) -> list[Any]:
        async with async_client_of(fake.url) as client:
            with fake.hold():
                calls = [asyncio.create_task(client.responses.create(model="m", input="hi")) for _ in range(5)]
                await asyncio.to_thread(fake.wait_for, lambda fake: fake.in_flight == 5)
                assert not fake.log
            return await asyncio.gather(*calls, return_exceptions=True)

    with serving(limits=Limit(concurrency=3)) as (fake, client):
        answers = asyncio.run(use(fake))
        refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
        assert len(refused) == 2
        assert "retry-after" not in refused[0].response.headers
        assert [entry.limit for entry in fake.over] == ["concurrency"] * 2
        assert fake.max_in_flight["org-1"] == 5
        assert fake.in_flight == 0
        for _ in range(5):
            ask(client)
        assert len(fake.over) == 2


def test_a_goodbye_that_was_not_read_yet_is_no_offence() -> None:
    """The loop is kept busy while a client starts and another leaves; then it reads both before it judges."""
    busy, go_on = threading.Event(), threading.Event()

    def output_tokens(body: dict[str, Any]) -> int:
        if body["model"] == "busy":
            busy.set()
            go_on.wait(10)
        return 1

    with serving(limits=Limit(concurrency=1), output_tokens=output_tokens) as (fake, client):
        port = port_of(fake)
        body = json.dumps({"model": "m", "messages": HI}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-a\r\n"
        request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        fake.fail(Failure.hang(), model="m")
        with (
            socket.create_connection(("127.0.0.1", port)) as leaver,
            socket.create_connection(("127.0.0.1", port)) as starter,
            ThreadPoolExecutor(1) as threads,
        ):
            leaver.sendall(request)
            fake.wait_for(lambda fake: fake.in_flight == 1 and fake.connections.open == 2)
            distraction = threads.submit(client.responses.create, model="busy", input="hi")
            assert busy.wait(10)
            starter.sendall(request)
            leaver.close()
            go_on.set()
            distraction.result(10)
            assert starter.recv(12) == b"HTTP/1.1 200"
        assert not fake.over


def test_connections_are_counted_and_kept_alive() -> None:
    with serving() as (fake, client):
        for _ in range(3):
            ask(client)
        assert fake.connections == (1, 1)
        with client_of(fake.url) as other:
            ask(other)
            assert fake.connections == (2, 2)
        fake.wait_for(lambda fake: fake.connections.open == 1)
        assert [entry.connection for entry in fake.log] == [1, 1, 1, 2]


def test_pipelined_requests_are_answered_in_order() -> None:
    with serving() as (fake, _):
        port = port_of(fake)
        get = b"GET /v1/models HTTP/1.1\r\nhost: x\r\napi-key: sk-a\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(get + b"\r\n" + get + b"connection: close\r\n\r\n")
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        assert received.count(b"HTTP/1.1 200") == 2
        assert received.index(b"req_000000000001") < received.index(b"req_000000000002")


def test_wait_for_gives_up() -> None:
    with serving() as (fake, _), pytest.raises(TimeoutError):
        fake.wait_for(lambda fake: fake.log, timeout=0.01)


# life and death


def test_keys_may_be_an_iterable_and_must_not_be_a_string() -> None:
    assert FakeOpenAI(keys=iter(["sk-a"]))._upstream._accounts == {"sk-a": "sk-a"}
    with pytest.raises(TypeError):
        FakeOpenAI(keys="sk-a")
    assert "sk-a" not in repr(FakeOpenAI(keys=["sk-a"]))


def test_nothing_is_left_behind() -> None:
    before = set(threading.enumerate())
    with (
        serving() as (fake, client),
        ThreadPoolExecutor(1) as threads,
        socket.create_connection(("127.0.0.1", port := port_of(fake))) as idle,
    ):
        fake.fail(Failure.hang())
        hanging = threads.submit(ask, client)
        fake.wait_for(lambda fake: fake.in_flight == 1 and fake.connections.open == 2)
        fake.__exit__(None, None, None)
        assert isinstance(hanging.exception(10), openai.APIConnectionError)
        assert idle.recv(1) == b""
        assert fake.connections.open == 0
        assert fake.in_flight == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    assert set(threading.enumerate()) == before


def test_a_port_in_use_is_an_error() -> None:
    with serving() as (fake, _):
        port = port_of(fake)
        with pytest.raises(OSError, match="in use"), FakeOpenAI(keys=["sk-a"], port=port):
            pass
    with pytest.raises(RuntimeError, match="context manager"):
        _ = FakeOpenAI(keys=["sk-a"]).url


def test_a_fake_in_another_process() -> None:
    with FakeProcess(
        keys={"sk-a": "org-1"},
        limits=Limit(rpm=9),
        models={"gpt-4o*": Limit(rpm=2, rule="sliding")},
        account_limits={"org-9": Limit(rpm=1)},
        unknown_models=["gpt-9"],
    ) as fake:
        pid = fake.pid
        with client_of(fake.url) as client:
            fake.fail(Failure.cut(), account="org-1")
            with pytest.raises(openai.APIConnectionError):
                ask(client)
            fake.fail(Failure.error(500, headers={"x-why": "x"}), times=None)
            with pytest.raises(openai.InternalServerError) as raised:
                ask(client)
            assert raised.value.response.headers["x-why"] == "x"
            with pytest.raises(openai.RateLimitError):
                ask(client)
            assert [entry.limit for entry in fake.over] == ["rpm"]
            stats = fake.stats
            assert (stats["requests"], stats["over"], stats["statuses"]) == (
                3,
                1,
                {"200": 1, "500": 1, "429": 1},
            )
            fake.clear()
            assert not fake.log
            client.responses.create(model="o3", input="hi")
    assert [entry.account for entry in fake.log] == ["org-1"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_takes_no_functions() -> None:
    with pytest.raises(TypeError, match="not functions"):
        FakeProcess(keys=["sk-a"], latency_s=lambda: 0.1)


def test_a_process_that_cannot_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="did not start"), FakeProcess(keys=["sk-a"], host="256.0.0.1"):
        pass


def test_the_process_dies_with_its_parent() -> None:
    """The child shares the stderr of a parent that kills itself: the pipe's end comes when both are gone."""
    program = (
        "import os, signal; from stable_openai.testing import FakeProcess; "
        "FakeProcess(keys=['sk-a']).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, timeout=20, check=False)
    assert done.returncode == -signal.SIGKILL


@contextmanager
def command_line(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "stable_openai.testing", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as child:
        try:
            assert child.stdout is not None
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


def test_the_command_line_serves_until_sigterm() -> None:
    arguments = [
        "--keys",
        "sk-a=org-1,sk-b",
        "--rpm",
        "1",
        "--rule",
        "sliding",
        "--unknown-models",
        "gpt-9,gpt-8",
    ]
    with command_line(*arguments) as (child, url), client_of(url) as client:
        ask(client)
        with pytest.raises(openai.RateLimitError, match="org-1"):
            ask(client)
        ask(client.with_options(api_key="sk-b"))
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="gpt-8", input="hi")
        child.terminate()
        assert child.wait(10) == 0


def test_the_command_line_outlives_its_stdin() -> None:
    """It is started with `&`, or by a service manager: only FakeProcess's ends with stdin."""
    with command_line() as (child, url):
        assert child.stdin is not None
        child.stdin.close()
        with client_of(url) as client:
            ask(client)
        child.terminate()
        assert child.wait(10) == 0


def test_the_judge_is_independent_of_what_it_judges() -> None:
    for path in (ROOT / "stable_openai" / "testing").glob("*.py"):
        if path.name == "fixtures.py":  # it judges nothing, and none of the others may import it
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2
                assert node.level == 1 or not (node.module or "").startswith("stable_openai")
                assert "fixtures" not in {node.module, *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Import):
                assert not [alias for alias in node.names if alias.name.startswith("stable_openai")]
    program = "import sys, stable_openai.testing; sys.exit(bool({'openai', 'redis', 'pytest'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=20)
