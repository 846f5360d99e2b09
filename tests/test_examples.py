"""The examples, run as a user runs them, against the fake instead of OpenAI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stable_openai.testing import Failure, FakeOpenAI, Limit

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["sk-a", "sk-b"]


def output(fake: FakeOpenAI, *command: str) -> list[str]:
    """The lines that an example prints; it says nothing else, and succeeds."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "STABLE_"))}
    given |= {"OPENAI_BASE_URL": fake.url, "STABLE_OPENAI_KEYS": ",".join(KEYS), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT / "examples", env=given, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "prompts", "limits"),
    [
        (["threads.py"], 20, Limit(rpm=500, concurrency=4)),
        (["async_many.py", "100"], 100, Limit(rpm=5000, tpm=2_000_000, concurrency=32)),
    ],
)
def test_an_example_has_every_prompt_answered(arguments: list[str], prompts: int, limits: Limit) -> None:
    with FakeOpenAI(keys=KEYS, limits=limits, latency_s=0.01) as fake:
        lines = output(fake, *arguments)
    questions = [f"What is {number} times {number}?" for number in range(prompts)]
    assert lines == [f"{question} echo: {question}" for question in questions]
    assert len(fake.log) == prompts
    assert {entry.key for entry in fake.log} == {*KEYS}
    assert not fake.over


CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
SQUARES = [f"echo: What is {number} times {number}?" for number in range(10)]
LANGCHAIN = [*SQUARES, "echo: Count to ten.", "stars=1"]
REVIEW = "stars=1 complaints=[]"
WEATHER = [f"echo: How warm is it in {city}?" for city in ("Rome", "Oslo", "Lima", "Cairo", "Quito")]


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    ("example", "printed", "requests"),
    [
        ("langchain_chat.py", LANGCHAIN * 2, {CHAT: 24}),
        ("instructor_extract.py", [*[REVIEW] * 5, f"so far: {REVIEW}"] * 2, {CHAT: 12}),
        # A turn for the call of the tool, and a turn for the answer.
        (
            "agents_sdk.py",
            [WEATHER[0], *[*WEATHER, "echo: And in Paris?"] * 2, "celsius=0"],
            {RESPONSES: 2 + 10 + 2 + 1, CHAT: 10 + 2},
        ),
    ],
)
def test_another_library_sees_no_429_of_a_key(example: str, printed: list[str], requests: dict[str, int]) -> None:
    refusals = 2
    with FakeOpenAI(keys=KEYS, limits=Limit(rpm=500, concurrency=2), latency_s=0.02) as fake:
        for path in requests:
            for key in KEYS:
                fake.fail(Failure.rate_limit(retry_after_ms=20), key=key, path=path, times=refusals)
        lines = output(fake, example)
    finished = [line for line in lines if "None" not in line]  # a stream of Instructor's begins with parts
    assert finished == printed
    for path, count in requests.items():
        for status, expected in ((200, count), (429, refusals * len(KEYS))):
            keys = [entry.key for entry in fake.log if (entry.path, entry.status) == (path, status)]
            assert len(keys) == expected
            assert {*keys} == {*KEYS}
    assert len(fake.log) == sum(requests.values()) + refusals * len(KEYS) * len(requests)
    assert not fake.over
