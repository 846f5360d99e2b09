"""The soak of benchmarks/soak.py: a short form with each fault that leaves Redis' state alone, and the long one."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import soak
from benchmarks.soak_faults import FAULTS, chosen
from benchmarks.soak_worker import LATENCY_S, MODELS, THREADS
from stable_openai.testing import FakeProcess, Limit


def test_briefly() -> None:
    judgement = soak.run(13, 5, chosen("keeping", "wait"), "wait", soak.SHORT)
    assert judgement.wrong == 0, f"\n{judgement}"
    assert len(judgement.faults) >= 8
    assert judgement.requests > 100


def test_the_judge_sees_what_is_over_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the upstream allows less than the workers are told."""

    def less(**limits: Any) -> Limit:
        return Limit(**{**limits, "concurrency": 1})

    monkeypatch.setattr(soak, "Limit", less)
    judgement = soak.run(1, 5, [], "wait", soak.SHORT)
    assert judgement.over


def test_the_judge_sees_what_is_stuck() -> None:
    """Where each call takes longer than it may; at the end all of them are under way, with a lease each."""
    judgement = soak.run(1, 5, [], "wait", soak.SHORT._replace(patience=LATENCY_S / 10))
    assert judgement.stuck >= soak.PROCESSES * THREADS
    assert judgement.left > 0


def test_the_judge_sees_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the upstream answers otherwise than a call expects."""
    monkeypatch.setattr(soak, "FakeProcess", lambda **settings: FakeProcess(**settings, unknown_models=[MODELS[0]]))
    judgement = soak.run(1, 5, [], "wait", soak.SHORT)
    assert judgement.lost


@pytest.mark.soak
def test_for_ten_minutes() -> None:
    judgement = soak.run(600, 5, list(FAULTS.values()), "wait")
    assert judgement.wrong == 0, f"\n{judgement}"
