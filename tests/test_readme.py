"""The README's programs run, word for word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stable_openai.testing import FakeOpenAI

README = (Path(__file__).parents[1] / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
SECRETS = ["sk-team-a", "sk-team-b", "sk-1", "sk-2", "sk-3"]


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program_of_the_readme(program: str, tmp_path: Path) -> None:
    """With only OPENAI_BASE_URL set; the keys in it are those of the fake."""
    with FakeOpenAI(keys=SECRETS) as fake:
        environment = {**os.environ, "OPENAI_BASE_URL": fake.url}
        finished = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert finished.returncode == 0, finished.stderr


def test_every_event_that_is_logged_is_listed() -> None:
    source = "".join(path.read_text() for path in (Path(__file__).parents[1] / "stable_openai").rglob("*.py"))
    events = set(re.findall(r"log\.\w+\(\s*\"([a-z_]+\.[a-z_]+)", source))
    assert len(events) > 6
    assert not [event for event in events if f"`{event}`" not in README]
