"""What is learned from responses: limits, other people's spending, shared accounts, usage; over real HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from openai import RateLimitError

from stable_openai import AsyncOpenAI, AzureOpenAI, Exhausted, Key, KeyManager, Limits, OpenAI, stable
from stable_openai._affinity import _favourites
from stable_openai._estimate import Estimate, Outputs
from stable_openai._worker import MANY_MODELS
from stable_openai.testing import Failure, FakeOpenAI, Limit

ASKED: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Any:
    """None, or the URL of a Redis."""
    return None if request.param == "memory" else request.getfixturevalue("redis_url")


@pytest.fixture
def managers(store: Any) -> Iterator[Any]:
    """Makes managers of one pool for a fake."""
    made: list[KeyManager] = []

    def make(fake: FakeOpenAI, keys: list[str] | None = None, **options: Any) -> KeyManager:
        held = [Key(secret, name=secret[3:], base_url=fake.url) for secret in keys or ["sk-a"]]
        made.append(KeyManager(held, store, pool="test-learning", **options))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def ask(manager: KeyManager, **options: Any) -> Any:
    with OpenAI(manager=manager) as client:
        return client.chat.completions.create(**{**ASKED, **options})


def answered_at_once(manager: KeyManager, of: int) -> int:
    answered = 0
    with OpenAI(manager=manager, max_wait=0) as client, suppress(Exhausted):
        for _ in range(of):
            client.chat.completions.create(**ASKED)
            answered += 1
    return answered


def meter(manager: KeyManager, limit: str, key: int = 0) -> Any:
    found = [row for row in manager.status().keys[key].meters if (row.limit, row.model_class) == (limit, "gpt-4o")]
    return found[0] if found else None


def test_somebody_else_who_spends_is_noticed_from_the_first_response(managers: Any) -> None:
    with FakeOpenAI(keys={"sk-a": "org-a"}, limits=Limit(rpm=100)) as fake:
        manager = managers(fake, limits=Limits(rpm=100))
        fake.spend("org-a", "gpt-4o", requests=90)
        ask(manager)
        assert meter(manager, "rpm").used > 85
        assert not meter(manager, "rpm").learned
        assert answered_at_once(manager, of=20) < 12
        assert not fake.over


def test_limits_that_nobody_declared_are_learned_and_shared(managers: Any, store: Any) -> None:
    with FakeOpenAI(keys={"sk-a": "org-a"}, limits=Limit(rpm=60, tpm=5000), output_tokens=10) as fake:
        one = managers(fake)
        assert meter(one, "rpm") is None
        ask(one, max_tokens=10)
        assert [(meter(one, name).of, meter(one, name).learned) for name in ("rpm", "tpm")] == [
            (60, True),
            (5000, True),
        ]
        before = meter(one, "tpm").used
        ask(one, max_tokens=500)
        assert meter(one, "tpm").used - before > 400  # from now on, tokens are reserved
        if store is not None:
            two = managers(fake)
            ask(two)
            assert meter(two, "rpm").learned
        declared = managers(fake, limits=Limits(rpm=30)) if store is not None else None
        if declared is not None:
            ask(declared)
            assert (meter(declared, "rpm").of, meter(declared, "rpm").learned) == (30, False)
            assert meter(declared, "tpm").learned


@pytest.mark.parametrize("provider", ["openai", "groq", "azure", "none"])
def test_headers_of_a_provider(managers: Any, provider: Any) -> None:
    limits = Limit(rpd=1000, tpm=5000) if provider == "groq" else Limit(rpm=60, tpm=5000)
    with FakeOpenAI(keys={"sk-a": "org-a"}, limits=limits, rate_headers=provider) as fake:
        manager = managers(fake)
        fake.spend("org-a", "gpt-4o", requests=10, tokens=1000)
        ask(manager)
        rows = {row.limit: (row.of, row.learned) for row in manager.status().keys[0].meters}
        expected = {"rpd" if provider == "groq" else "rpm": 1000 if provider == "groq" else 60, "tpm": 5000}
        assert rows == ({} if provider == "none" else {name: (of, True) for name, of in expected.items()})


def test_a_pool_that_was_told_no_limits_is_never_refused_twice(managers: Any) -> None:
    with FakeOpenAI(keys={"sk-a": "org-a", "sk-b": "org-b"}, limits=Limit(rpm=600, burst_s=1)) as fake:
        manager = managers(fake, ["sk-a", "sk-b"])

        async def main() -> None:
            async with AsyncOpenAI(manager=manager) as client:
                for _ in range(2):  # what both keys answer first tells their limits
                    await client.chat.completions.create(**ASKED)
                known = len(fake.log)
                await asyncio.gather(*(client.chat.completions.create(**ASKED) for _ in range(40)))
                assert len(fake.log) - known >= 40

        asyncio.run(main())
        assert sum(entry.status == 200 for entry in fake.log) == 42


def test_keys_of_one_organisation_are_told_of_once_and_rest_together(
    managers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeOpenAI(keys={"sk-a": "org-1", "sk-b": "org-1", "sk-c": "org-2"}) as fake:
        manager = managers(fake, ["sk-a", "sk-b", "sk-c"])
        with caplog.at_level(logging.WARNING, "stable_openai.keys"):
            for _ in range(6):
                ask(manager)
        told = [record.getMessage() for record in caplog.records if record.name == "stable_openai.keys"]
        assert len(told) == 1
        assert "keys=a, b" in told[0]
        assert "account='org-1'" in told[0]
        assert [key.organization for key in manager.status().keys] == ["org-1", "org-1", ""]
        fake.fail(Failure.rate_limit(retry_after_ms=60_000), account="org-1")
        for _ in range(3):
            ask(manager)
        assert [key.state for key in manager.status().keys] == ["cooldown", "cooldown", "ready"]
        assert [entry.account for entry in fake.log if entry.status == 429] == ["org-1"]


def test_accounts_that_were_declared_are_left_alone(
    managers: Any, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeOpenAI(keys={"sk-a": "org-1", "sk-b": "org-1"}) as fake:
        keys = [Key(secret, account=secret[-1], base_url=fake.url) for secret in ("sk-a", "sk-b")]
        manager = KeyManager(keys, store, pool="test-learning")
        for _ in range(4):
            ask(manager)
        fake.fail(Failure.rate_limit(retry_after_ms=60_000))
        ask(manager)
        assert sorted(key.state for key in manager.status().keys) == ["cooldown", "ready"]
        assert not caplog.records
        manager.close()


def test_the_tokens_really_used_correct_the_reservation(managers: Any) -> None:
    limits = Limit(tpm=10_000)
    with FakeOpenAI(
        keys={"sk-a": "org-a"}, limits=limits, output_tokens=20, charge="used", rate_headers="none"
    ) as fake:
        manager = managers(fake, limits=Limits(tpm=10_000, charge="used"))
        answer = ask(manager, max_tokens=4000)
        assert meter(manager, "tpm").used == pytest.approx(answer.usage.total_tokens, abs=10)
        with OpenAI(manager=manager) as client:
            options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4000}
            used = [chunk.usage for chunk in client.chat.completions.create(**ASKED, **options)][-1].total_tokens
        assert meter(manager, "tpm").used == pytest.approx(answer.usage.total_tokens + used, abs=20)
        with OpenAI(manager=manager) as client:
            list(client.chat.completions.create(**ASKED, stream=True, max_tokens=4000))  # it does not say
        assert meter(manager, "tpm").used > 4000


def test_the_output_is_estimated_from_what_it_was(managers: Any) -> None:
    with FakeOpenAI(keys={"sk-a": "org-a"}, output_tokens=300, rate_headers="none") as fake:
        manager = managers(fake, limits=Limits(tpm=1_000_000, charge="used"))
        worker = manager._worker
        seen: list[int] = []

        @stable(manager=manager)
        def call(
            messages: Any, model: str = "gpt-4o", max_tokens: Any = None, client: Any = None, lease: Any = None
        ) -> None:
            seen.append(lease.request.tokens)
            client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens)

        for _ in range(10):
            call(ASKED["messages"])
        assert seen[0] < 10
        assert 300 <= seen[-1] < 500
        call(ASKED["messages"], max_tokens=50)
        call(ASKED["messages"], max_tokens=4000)
        assert seen[-2] <= 52
        assert seen[-1] < 500
        assert not worker.live


def test_names_of_models_do_not_fill_the_memory(store: Any) -> None:
    """Users may name any; what was learned of one that is used all along is learned again."""
    manager = KeyManager(["sk-a"], store, pool="test-learning", limits=Limits(rpm=10**6))
    worker, headers = manager._worker, {"x-ratelimit-limit-tokens": "100000", "x-ratelimit-remaining-tokens": "99999"}

    @stable(manager=manager, affinity="user")
    def call(model: str, user: str, messages: str, lease: Any = None) -> int:
        lease.report(tokens=50, headers=headers)
        return int(lease.request.tokens)

    for number in range(2 * MANY_MODELS):
        for _ in range(2):  # the first tells that there is a limit of tokens
            call(f"model-{number}", f"user-{number}", "x")
    sizes = {name: len(held) for name, held in vars(worker).items() if isinstance(held, (dict, set))}
    assert max(sizes.values()) <= MANY_MODELS, sizes
    assert min(sizes[name] for name in ("_by_model", "_needs_tokens", "_outputs", "_registered", "class_names")) > 9
    assert _favourites.cache_info().currsize <= 4096
    assert [call("model-0", "ann", "x") for _ in range(10)][-1] >= 50
    assert manager.status().keys[0].live == 0
    manager.close()


def test_what_heals_wakes_others_whatever_has_become_of_the_keys(store: Any) -> None:
    manager = KeyManager(["sk-a"], store, pool="test-learning")
    to = manager._worker.registration("gpt-4o")
    manager.add("sk-b")  # nothing has been asked of these keys so far
    manager._do(manager._worker.wake_all(to))
    manager.close()


def test_azure_and_openai_in_one_pool(store: Any) -> None:
    with FakeOpenAI(keys={"sk-o": "org-1"}) as theirs, FakeOpenAI(keys={"az-1": "r-1"}) as azure:
        resource = azure.url.removesuffix("/v1")
        keys = [
            Key("sk-o", base_url=theirs.url),
            Key("az-1", base_url=resource, api_version="2024-10-21", models={"gpt-4o": "my-deployment"}),
        ]
        manager = KeyManager(keys, store, pool="test-learning")
        with OpenAI(manager=manager) as client:
            for _ in range(4):
                client.chat.completions.create(**ASKED)
        with AzureOpenAI(manager=manager, azure_endpoint="http://127.0.0.1:9", api_version="old") as client:
            for _ in range(4):
                client.chat.completions.create(**ASKED)
        manager.close()
        assert {entry.status for entry in (*theirs.log, *azure.log)} == {200}
        assert len(theirs.log) == len(azure.log) == 4
        assert {(entry.key, entry.model) for entry in theirs.log} == {("sk-o", "gpt-4o")}
        assert {(entry.key, entry.model) for entry in azure.log} == {("az-1", "my-deployment")}


def test_a_guess_is_never_larger_than_the_limits(managers: Any) -> None:
    """Neither what outputs were, nor what a request states where only the upstream told of a limit."""
    with FakeOpenAI(keys={"sk-a": "org-a"}, limits=Limit(tpm=6000), output_tokens=5) as fake:
        learned = managers(fake)
        ask(learned, max_tokens=5)
        with suppress(RateLimitError):
            ask(learned, max_tokens=32_768, n=2)
        assert meter(learned, "tpm").used <= 6000
        declared = managers(fake, limits=Limits(tpm=10_000))
        worker = declared._worker
        for tokens in (1000, 9000) * 8:
            worker._outputs.setdefault("gpt-4o", Outputs()).note(tokens)
        assert worker.reserve("gpt-4o", Estimate(10, None)) == 10_000
