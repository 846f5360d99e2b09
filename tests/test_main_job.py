"""The main job: processes of threads share keys through a real Redis, calling through the real openai client, against
an upstream that enforces limits. Its log is the judge."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import redis

from benchmarks import load
from stable_openai import KeyManager, Limits
from stable_openai.testing import FakeOpenAI, FakeProcess, Limit

KEYS = 4
RPM = 60


@pytest.mark.parametrize("rule", load.RULES)
def test_all_that_the_limits_allow_is_granted_and_nothing_more(rule: str, redis_url: str) -> None:
    """As many calls as the limits allow at once, and SCRIPT FLUSH meanwhile: all are answered, without a refusal."""
    keys = {f"sk-{number}": f"org-{number}" for number in range(KEYS)}
    with FakeProcess(keys=keys, limits=Limit(rpm=RPM, rule=rule)) as fake:  # type: ignore[arg-type]
        capacity = KEYS * (RPM - 1 if rule == "bucket" else RPM)  # a bucket leaves out one for the headroom
        calls = capacity // 16
        job = {"redis": redis_url, "base_url": fake.url, "keys": list(keys), "threads": 8}
        job |= {"limits": {"rpm": RPM, "rule": rule}, "seconds": 60, "calls": calls, "pool": f"test-{rule}"}
        stop = threading.Event()

        def flush() -> None:
            with redis.Redis.from_url(redis_url) as client:
                while not stop.wait(0.2):
                    client.script_flush()

        flusher = threading.Thread(target=flush)
        flusher.start()
        try:
            results = load.run_processes([job, job], timeout=90)
        finally:
            stop.set()
            flusher.join()
        assert [(result["answered"], result["wrong"]) for result in results] == [(8 * calls, 0)] * 2
        assert fake.over == []
        by_key = {secret: sum(entry.key == secret for entry in fake.log) for secret in keys}
        assert max(by_key.values()) <= RPM
        if rule != "calendar":  # whose minute may have ended meanwhile
            assert max(result["waits"][-1] for result in results) < 30, "nothing had to wait for a window"


def test_a_killed_worker_gives_its_slot_back_within_the_ttl(redis_url: str) -> None:
    script = f"""
import openai
from stable_openai import KeyManager, Limits, stable
manager = KeyManager(["sk-a"], {redis_url!r}, pool="test-kill", limits=Limits(concurrency=1), lease_ttl=1.5)

@stable(manager=manager)
def ask(api_key):
    openai.OpenAI(api_key=api_key, max_retries=0).models.list()

ask()
"""
    with FakeOpenAI(keys=["sk-a"], limits=Limit(concurrency=1)) as fake, fake.hold():
        environment = {**os.environ, "OPENAI_BASE_URL": fake.url}
        process = subprocess.Popen([sys.executable, "-c", script], env=environment)
        try:
            fake.wait_for(lambda fake: fake.in_flight == 1, timeout=20)
            manager = KeyManager(
                ["sk-a"], redis_url, pool="test-kill", limits=Limits(concurrency=1), lease_ttl=1.5, max_wait=20
            )
            assert manager.status().keys[0].live == 1
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed = time.monotonic()
            with manager.lease():
                waited = time.monotonic() - killed
            manager.close()
        finally:
            process.kill()
            process.wait()
    assert waited < 1.5 + 1.0, "the ttl, and what a loaded machine needs"


@pytest.mark.soak
@pytest.mark.parametrize("rule", load.RULES)
def test_a_minute_of_saturation(rule: str) -> None:
    assert load.run(rule, seconds=60, processes=8) == 0
