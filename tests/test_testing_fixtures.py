"""The fixtures for users' tests, used as a user does: a conftest that imports them, a suite that knows no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = "from stable_openai.testing.fixtures import fake_openai, stable_manager\n"

SUITE = """
import asyncio, os

import openai, pytest
from stable_openai import KeyManager, stable
from stable_openai.manager import find_default
from stable_openai.testing import Failure, FakeOpenAI, Limit

seen = []

def chat(client, prompt):
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model="gpt-4o", messages=messages).choices[0].message.content

@stable
def ask(prompt, api_key):
    with openai.OpenAI(api_key=api_key, max_retries=0) as client:
        return chat(client, prompt)

@stable
def ask_with(prompt, client):
    return chat(client, prompt)

@stable
async def aask(prompt, api_key):
    async with openai.AsyncOpenAI(api_key=api_key) as client:
        answer = await client.responses.create(model="gpt-4o", input=prompt)
        return answer.output_text

@pytest.mark.parametrize("prompt", ["a", "b"])
def test_a_users_function_reaches_the_fake(fake_openai, stable_manager, prompt):
    assert [ask(prompt), ask_with(prompt), asyncio.run(aask(prompt))] == [f"echo: {prompt}"] * 3
    assert [entry.status for entry in fake_openai.log] == [200] * 3
    assert {entry.account for entry in fake_openai.log} <= {"org-1", "org-2", "org-3"}
    assert [key.name for key in stable_manager.status().keys] == ["key-1", "key-2", "key-3"]
    assert find_default() is stable_manager
    seen.append(fake_openai.url)

def test_failures_are_passed_over(fake_openai, stable_manager):
    fake_openai.fail(Failure.insufficient_quota(), account="org-1", times=None)
    assert ask("hi") == "echo: hi"
    assert [entry.key for entry in fake_openai.log] == ["sk-fake-1", "sk-fake-2"]
    assert [key.state for key in stable_manager.status().keys] == ["out", "ready", "ready"]

def test_nothing_is_left_behind():
    assert len(set(seen)) == 2
    assert "OPENAI_BASE_URL" not in os.environ
    assert find_default() is None

class TestWithAnotherFake:
    @pytest.fixture
    def fake_openai(self):
        with FakeOpenAI(keys={"sk-x": "org-x", "sk-y": "org-x"}, limits=Limit(concurrency=1)) as fake:
            yield fake

    def test_the_manager_takes_its_keys(self, fake_openai, stable_manager):
        assert [key.account for key in stable_manager.status().keys] == ["org-x", "org-x"]
        ask("hi")
        ask("hi")
        assert [entry.key for entry in fake_openai.log] == ["sk-x", "sk-y"]
"""


def test_a_users_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_mine.py").write_text(SUITE)
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_the_fake_itself_needs_neither_pytest_nor_a_client_nor_redis() -> None:
    program = (
        "import sys, stable_openai.testing; sys.exit(str({'pytest', 'openai', 'redis'} & sys.modules.keys() or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""
