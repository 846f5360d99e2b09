"""Fixtures for users' own pytest suites: a fake OpenAI, and a manager on it. Import them in a conftest.py:

    from stable_openai.testing.fixtures import fake_openai, stable_manager  # noqa: F401

Then a test runs the code as it is, against the fake; no key, no network, no Redis:

    @stable
    def ask(prompt, api_key):
        client = openai.OpenAI(api_key=api_key, max_retries=0)
        messages = [{"role": "user", "content": prompt}]
        return client.chat.completions.create(model="gpt-4o", messages=messages).choices[0].message.content

    def test_a_key_without_credit_is_passed_over(fake_openai, stable_manager):
        fake_openai.fail(Failure.insufficient_quota(), account="org-1", times=None)
        assert ask("hi") == "echo: hi"
        assert "org-1" in [entry.account for entry in fake_openai.log]

A test that needs other keys or limits overrides `fake_openai` with a fixture of its own; `stable_manager` takes the
keys and accounts from whatever fake it finds. This is the one module of stable_openai.testing that imports the broker
and pytest: it judges nothing, and none of the others imports it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stable_openai import Key, KeyManager

from .server import FakeOpenAI

__all__ = ["fake_openai", "stable_manager"]

MAX_WAIT_S = 10.0


@pytest.fixture
def fake_openai() -> Iterator[FakeOpenAI]:
    """A FakeOpenAI without limits, with the keys sk-fake-1, sk-fake-2 and sk-fake-3 of org-1, org-2 and org-3."""
    with FakeOpenAI(keys={f"sk-fake-{number}": f"org-{number}" for number in (1, 2, 3)}) as fake:
        yield fake


@pytest.fixture
def stable_manager(fake_openai: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyManager]:
    """A KeyManager of the fake's keys (named key-1, key-2, ...), in memory, closed after the test.

    It is the default manager, so that a bare @stable uses it; OPENAI_BASE_URL is set, so that a function which makes
    an `openai.OpenAI(api_key=api_key)` itself reaches the fake, as do the clients that @stable injects. A call waits
    10 s for a key at most.
    """
    monkeypatch.setenv("OPENAI_BASE_URL", fake_openai.url)
    keys = [
        Key(secret, name=f"key-{number}", account=account, base_url=fake_openai.url)
        for number, (secret, account) in enumerate(fake_openai.accounts().items(), 1)
    ]
    manager = KeyManager(keys, pool="default", max_wait=MAX_WAIT_S)
    yield manager
    manager.close()
