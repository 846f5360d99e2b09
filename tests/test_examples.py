"""The examples, run as a user runs them, against the fake instead of OpenAI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stable_openai.testing import FakeOpenAI, Limit

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("arguments", "prompts", "limits"),
    [
        (["threads.py"], 20, Limit(rpm=500, concurrency=4)),
        (["async_many.py", "100"], 100, Limit(rpm=5000, tpm=2_000_000, concurrency=32)),
    ],
)
def test_an_example_has_every_prompt_answered(arguments: list[str], prompts: int, limits: Limit) -> None:
    with FakeOpenAI(keys=["sk-a", "sk-b"], limits=limits, latency_s=0.01) as fake:
        given = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "STABLE_"))}
        given |= {"OPENAI_BASE_URL": fake.url, "STABLE_OPENAI_KEYS": "sk-a,sk-b", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT / "examples", env=given, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    questions = [f"What is {number} times {number}?" for number in range(prompts)]
    assert done.stdout.splitlines() == [f"{question} echo: {question}" for question in questions]
    assert len(fake.log) == prompts
    assert {entry.key for entry in fake.log} == {"sk-a", "sk-b"}
    assert not fake.over
