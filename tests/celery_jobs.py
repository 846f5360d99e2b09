"""The app of tests/test_celery.py: its workers import it, and so does the test, which says in the environment where all
is. What the tasks do is written down in Redis, since a worker is another process."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import openai
import redis
from celery import Celery, Task, signals
from tenacity import stop_after_attempt, wait_fixed

from stable_openai import Key, stable
from stable_openai.celery import setup

BROKER = os.environ.get("TEST_BROKER", "memory://")
STORE = os.environ.get("TEST_STORE", "redis://127.0.0.1:1")
SETTINGS: dict[str, Any] = json.loads(os.environ.get("TEST_SETTINGS", "{}"))
FAKE: dict[str, Any] = json.loads(os.environ.get("TEST_FAKE", '{"url": "http://127.0.0.1:1", "keys": ["sk-a"]}'))

app = Celery("jobs", broker=BROKER, backend=f"{STORE}/2")
app.conf.update(
    broker_connection_retry_on_startup=True,
    result_extended=True,
    stable_openai_keys=[Key(key, base_url=FAKE["url"]) for key in FAKE["keys"]],
    stable_openai_redis=f"{STORE}/0",
    stable_openai_pool="test-celery",
    **SETTINGS,
)
manager = setup(app)
notes = redis.Redis.from_url(f"{STORE}/3", decode_responses=True)
MODEL = "gpt-4o"


def note(name: str, what: Any) -> None:
    notes.rpush(name, json.dumps(what))


@signals.task_prerun.connect  # type: ignore[untyped-decorator]
def delivered(task: Task, task_id: str, **_: Any) -> None:
    request = task.request
    request.began = time.monotonic()
    note(
        f"deliveries:{task_id}",
        {
            "retries": request.retries,
            "args": request.args,
            "kwargs": request.kwargs,
            "timelimit": request.timelimit,
            "expires": str(request.expires),
            "root_id": request.root_id,
            "parent_id": request.parent_id,
            "callbacks": len(request.callbacks or ()),
            "priority": request.delivery_info.get("priority"),
            "queue": request.delivery_info.get("routing_key"),
            "own": (request.headers or {}).get("own") or getattr(request, "own", None),
            "at": time.time(),
            "pid": os.getpid(),
        },
    )


@signals.task_postrun.connect  # type: ignore[untyped-decorator]
def ended(task: Task, task_id: str, **_: Any) -> None:
    if task.name != quick.name:
        note("held_s", time.monotonic() - task.request.began)


def chat(client: Any, text: str) -> str:
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}])
    return str(answer.choices[0].message.content)


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
@stable(model=MODEL)
def ask(self: Task, number: int, client: Any) -> str:
    answer = chat(client, str(number))
    note("runs", [number, self.request.retries, time.time()])
    return answer


@app.task
def quick(sent: float) -> None:
    note("latencies", time.time() - sent)


@app.task(bind=True, autoretry_for=(ValueError,), max_retries=2, default_retry_delay=0, retry_jitter=False)
@stable(model=MODEL)
def clumsy(self: Task, fails: int, api_key: str) -> int:
    """Raises an error of its own so often."""
    if self.request.retries < fails:
        raise ValueError("mine")
    return int(self.request.retries)


@app.task(bind=True, max_retries=1)
@stable(model=MODEL)
def again(self: Task, api_key: str) -> int:
    """Retries itself, once."""
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return int(self.request.retries)


class Based(Task):  # type: ignore[misc]  # Celery has no types
    name = "based"

    @stable(model=MODEL)
    def run(self, text: str, client: Any) -> str:
        return chat(client, text)


based = app.register_task(Based())


@app.task
@stable(model=MODEL)
def add(number: int, more: int = 0, *, client: Any) -> int:
    chat(client, str(number))
    return number + more


@app.task
@stable(model=MODEL)
def total(numbers: list[int], client: Any) -> int:
    chat(client, str(numbers))
    return sum(numbers)


@app.task(bind=True)
@stable(model=MODEL)
def hold(self: Task, seconds: float, api_key: str) -> str:
    """Keeps its lease for so long."""
    note("held", self.request.id)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)
    return "held"


@stable(model=MODEL)
def helper(text: str, client: Any) -> str:
    return chat(client, text)


@app.task
def calls_a_helper(text: str) -> str:
    note("began", text)
    return helper(text)


@app.task(celery_wait=None)
@stable(model=MODEL)
def stays(number: int, client: Any) -> str:
    answer = chat(client, str(number))
    note("runs", [number, 0, time.time()])
    return answer


def keeps_to_rate_limit(self: Task, number: int) -> str:
    """As it is done without a broker: each key in its turn, tried again after a refusal."""
    keys = FAKE["keys"]
    with openai.OpenAI(api_key=keys[number % len(keys)], base_url=FAKE["url"], max_retries=0) as client:
        answer = chat(client, str(number))
    note("runs", [number, self.request.retries, time.time()])
    return answer


BY_HAND = {"autoretry_for": (openai.RateLimitError,), "retry_backoff": True, "max_retries": 20}
limited = app.task(bind=True, name="limited", rate_limit="600/m", **BY_HAND)(keeps_to_rate_limit)
unlimited = app.task(bind=True, name="unlimited", **BY_HAND)(keeps_to_rate_limit)


@app.task
@stable(model=MODEL, max_wait=3)
def impatient(number: int, client: Any) -> str:
    return chat(client, str(number))


@app.task
@stable(model=MODEL, wait=wait_fixed(3), stop=stop_after_attempt(3))
def stubborn(number: int, client: Any) -> str:
    note("tries", number)
    return chat(client, str(number))
