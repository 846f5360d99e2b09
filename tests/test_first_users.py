"""Code written for the first stable-openai still works, as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from stable_openai import KeyManager, Limits, NoKeys, stable
from stable_openai.testing import Failure, FakeOpenAI

pytestmark = pytest.mark.usefixtures("only_its_managers")
ROOT = Path(__file__).resolve().parents[1]
KEYS = ["your_api_key1", "your_api_key2"]

# The program of the first README, with two keys in its list.
PROGRAM = """
import threading

import openai

from stable_openai import KeyManager, stable

api_keys = ["your_api_key1", "your_api_key2"]
KeyManager(api_keys)


@stable
def completions_with_backoff(model, messages, api_key):
    client = openai.OpenAI(api_key=api_key)
    response = client.chat.completions.create(model=model, messages=messages)
    return response.choices[0].message.content


def thread_function(thread_id):
    for i in range(5):
        try:
            response = completions_with_backoff(
                model="gpt-3.5-turbo",
                messages=[{"role": "user", "content": f"Say {thread_id} and {i}"}],
            )
            print(f"Thread {thread_id}, Request {i + 1}/5: Success, Response: {response}")
        except Exception as e:
            print(f"Thread {thread_id}, Request {i + 1}/5: Failed, Error: {e}")


threads = []
for i in range(10):
    thread = threading.Thread(target=thread_function, args=(i,))
    threads.append(thread)
    thread.start()

for thread in threads:
    thread.join()
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    with FakeOpenAI(keys=KEYS) as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.url)
        yield fake


@pytest.mark.parametrize("spent", [False, True])
def test_the_program_of_the_first_readme(fake: FakeOpenAI, tmp_path: Path, spent: bool) -> None:
    """All 50 succeed, also where the quota of a key is spent; and the program ends by itself."""
    if spent:
        fake.fail(Failure.insufficient_quota(), key="your_api_key1", times=None)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "STABLE_"))}
    clean |= {"OPENAI_BASE_URL": fake.url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=clean, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    said = set(done.stderr.splitlines())  # a warning of the key, and no traceback
    assert {line.partition(" pool=")[0] for line in said} == ({"key.out"} if spent else set())
    for thread in range(10):  # print() writes the end of its line by itself: the lines of threads run into each other
        for i in range(5):
            line = f"Thread {thread}, Request {i + 1}/5: Success, Response: echo: Say {thread} and {i}"
            assert done.stdout.count(line) == 1
    assert "Failed" not in done.stdout
    assert Counter(entry.status for entry in fake.log)[200] == 50
    assert {entry.key for entry in fake.log} == set(KEYS)


def completions(model: Any, messages: Any, api_key: Any) -> Any:
    client = openai.OpenAI(api_key=api_key)
    response = client.chat.completions.create(model=model, messages=messages)
    return response.choices[0].message.content


def test_a_static_method_is_called_through_an_instance(fake: FakeOpenAI) -> None:
    class Model:
        @staticmethod
        @stable
        def ask(model: Any, messages: Any, api_key: Any = None) -> Any:
            return completions(model, messages, api_key)

        def answer(self, text: str) -> Any:
            return self.ask(model="gpt-3.5-turbo", messages=[{"role": "user", "content": text}])

    KeyManager(KEYS)
    assert Model().answer("hello") == "echo: hello"
    assert Model.ask("gpt-3.5-turbo", [{"role": "user", "content": "by place"}]) == "echo: by place"
    assert {entry.model for entry in fake.log} == {"gpt-3.5-turbo"}


def test_no_thread_keeps_the_process_alive(fake: FakeOpenAI) -> None:
    before = set(threading.enumerate())
    manager = KeyManager(KEYS)
    with manager.lease():  # it is live: there is a heartbeat
        started = set(threading.enumerate()) - before
        assert all(thread.daemon for thread in started)


def test_a_manager_without_arguments_is_the_one_that_is_open() -> None:
    manager = KeyManager(KEYS)
    assert KeyManager() is manager
    assert KeyManager().get_key() in KEYS
    manager.close()
    newer = KeyManager(KEYS[:1])
    assert KeyManager() is newer
    assert KeyManager().get_key() == KEYS[0]


def given(manager: KeyManager) -> set[str]:
    """The keys that are given in so many requests that each has its turn."""
    return {manager.get_key() for _ in range(200)}


def test_get_key_takes_turns() -> None:
    manager = KeyManager(KEYS)
    used = Counter(manager.get_key() for _ in range(1000))
    assert used.keys() == set(KEYS)
    assert min(used.values()) >= 450


def test_get_key_gives_no_key_that_rests() -> None:
    manager = KeyManager(KEYS)
    manager.set_ttl(KEYS[0], 60)
    assert given(manager) == {KEYS[1]}
    manager.set_ttl(KEYS[0], 0)
    assert given(manager) == set(KEYS)


def test_get_key_waits_for_the_first_that_is_free() -> None:
    manager = KeyManager(KEYS)
    manager.set_ttl(KEYS[0], 60)
    manager.set_ttl(KEYS[1], 0.3)
    free_at = time.monotonic() + manager.get_min_ttl()
    assert manager.get_key() == KEYS[1]
    assert time.monotonic() >= free_at - 0.002  # the broker counts in whole ms


def test_get_key_raises_where_none_are_left() -> None:
    manager = KeyManager(KEYS)
    for key in KEYS:
        manager.delete_key(key)
    with pytest.raises(ValueError, match="no keys are left") as raised:
        manager.get_key()
    assert isinstance(raised.value, NoKeys)


def test_a_call_raises_where_no_keys_are_left(fake: FakeOpenAI) -> None:
    manager = KeyManager(KEYS, limits=Limits(tpm=1000))
    for key in KEYS:
        manager.delete_key(key)
    with pytest.raises(NoKeys):
        stable(completions)(model="gpt-3.5-turbo", messages=[])  # type: ignore[call-arg]
    assert manager.status().keys == ()
    assert not fake.log


def test_a_key_that_is_deleted_is_not_given_again() -> None:
    manager = KeyManager(KEYS)
    manager.delete_key(KEYS[0])
    assert given(manager) == {KEYS[1]}


def test_keys_that_are_unknown_are_ignored() -> None:
    manager = KeyManager(KEYS)
    manager.set_ttl("sk-unknown", 60)
    manager.set_ttl(manager.status().keys[0].fingerprint, 60)
    manager.delete_key("sk-unknown")
    assert given(manager) == set(KEYS)


def test_the_shortest_time_until_a_key_is_free() -> None:
    manager = KeyManager(KEYS)
    assert manager.get_min_ttl() == 0
    manager.set_ttl(KEYS[0], 60)
    assert manager.get_min_ttl() == 0
    manager.set_ttl(KEYS[1], 30)
    assert 29 < manager.get_min_ttl() <= 30
    manager.delete_key(KEYS[1])
    assert 59 < manager.get_min_ttl() <= 60
    manager.delete_key(KEYS[0])
    assert manager.get_min_ttl() == 0


def test_the_same_over_redis(redis_url: str) -> None:
    manager = KeyManager(KEYS, redis_url, pool="test-first-users")
    other = KeyManager(KEYS, redis_url, pool="test-first-users")
    manager.set_ttl(KEYS[0], 60)
    assert given(other) == {KEYS[1]}
    other.delete_key(KEYS[1])
    assert 59 < other.get_min_ttl() <= 60
    assert manager.get_min_ttl() == 0
