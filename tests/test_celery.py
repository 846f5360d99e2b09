"""Tasks of real Celery workers, on a real broker, over the real openai client, against the fake upstream."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, chain, chord, group

from stable_openai import ConfigurationError, Exhausted, Key, KeyManager, Limits, stable
from stable_openai.celery import _runs, setup
from stable_openai.testing import Failure
from tests.celery_site import ROOT, Site, latencies, said, site
from tests.faults.servers import until
from tests.servers import RABBITMQ

# A pool, and how many tasks a worker runs at the same time (gevent's takes new ones every 2 s where slots are few).
POOLS = {"prefork": 4, "threads": 4, "gevent": 100, "solo": 1}
TASKS = 200
RPM = 300


@pytest.mark.parametrize(
    ("pool", "broker"),
    [*((pool, "redis") for pool in POOLS), *([("prefork", "rabbitmq")] if RABBITMQ.exists() else [])],
)
def test_a_flood_waits_in_the_queue(pool: str, broker: str, capsys: pytest.CaptureFixture[str]) -> None:
    with site({"rpm": RPM, "burst_s": 1}, broker=broker) as here:
        for _ in range(2):
            here.worker(pool, POOLS[pool])
        without = latencies(here, 2)
        results = [here.send("ask", n) for n in range(TASKS)]
        beside = latencies(here, 6)
        answers = [result.get(timeout=60) for result in results]
        runs = here.notes("runs")
        over = here.fake.over
    assert answers == [f"echo: {n}" for n in range(TASKS)]
    assert sorted(number for number, _, _ in runs) == list(range(TASKS)), "some ran twice"
    assert {retries for _, retries, _ in runs} == {0}
    assert over == []
    order = [number for number, _, _ in sorted(runs, key=lambda run: run[2])]
    behind = max(place - number for place, number in enumerate(order))
    with capsys.disabled():
        print(
            f"\n{pool}, {broker}: quick tasks {said(without)}; beside the flood {said(beside)}; "
            f"at most {behind} places behind"
        )


def program_of_the_readme() -> str:
    programs = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (program,) = [program for program in programs if "stable_openai.celery" in program]
    return str(program)


@pytest.mark.parametrize("which", ["work", "celery_app"])
def test_the_programs_that_are_shown(which: str) -> None:
    """The README's, and the example: with only the servers' addresses set."""
    with site({"rpm": 600}, {"sk-1": "org-1", "sk-2": "org-2", "sk-3": "org-3"}) as here:
        program = program_of_the_readme() if which == "work" else (ROOT / "examples/celery_app.py").read_text()
        Path(here.folder, f"{which}.py").write_text(program.replace("redis://localhost:6379", here.store))
        here.env |= {"OPENAI_BASE_URL": here.fake.url, "STABLE_OPENAI_KEYS": "sk-1,sk-2", "PYTHONPATH": str(ROOT)}
        here.worker(slots=2, app=which, folder=here.folder)
        assert here.app.send_task(f"{which}.ask", ["Say hello"]).get(timeout=30) == "echo: Say hello"
        if which == "celery_app":
            env = os.environ | here.env
            done = subprocess.run(
                [sys.executable, f"{which}.py"], cwd=here.folder, env=env, capture_output=True, text=True
            )
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.splitlines()[19] == "What is 19 times 19? echo: What is 19 times 19?"


# What a task has keeps its meaning.

ONE = {"sk-a": "org-a"}


@contextmanager
def busy(here: Site, seconds: float) -> Iterator[None]:
    """The only key is out, for so long."""
    with manager_of(here) as manager:
        manager.disable("sk-a", seconds)
        yield


@contextmanager
def manager_of(here: Site) -> Iterator[KeyManager]:
    """One of the pool that the workers share, here."""
    keys = [Key(key, base_url=here.fake.url) for key in here.fake.accounts()]
    settings = json.loads(here.env["TEST_SETTINGS"])
    limits = Limits(**settings["stable_openai_limits"])
    ttl = settings.get("stable_openai_lease_ttl", 60.0)
    manager = KeyManager(keys, f"{here.store}/0", pool="test-celery", limits=limits, lease_ttl=ttl)
    try:
        yield manager
    finally:
        manager.close()


def deliveries(here: Site, result: Any) -> list[dict[str, Any]]:
    return here.notes(f"deliveries:{result.id}")


def test_a_task_that_goes_back_is_the_same_task() -> None:
    with site({"rpm": 600}, ONE) as here:
        here.worker(slots=2)
        with busy(here, 3):
            signature = here.task("add", 1, kwargs={"more": 2})
            options = {
                "priority": 3,
                "expires": 60,
                "time_limit": 50,
                "soft_time_limit": 40,
                "headers": {"own": "mine"},
            }
            result = signature.apply_async(link=here.task("add", 5), **options)
            assert result.get(timeout=30) == 3
            until(lambda: here.app.AsyncResult(result.id).children)
            (linked,) = result.children
            assert linked.get(timeout=30) == 8
            first, *_, last = deliveries(here, result)
            assert last["at"] - first["at"] > 1.5, "it has not waited in the queue"
            for name in first.keys() - {"at", "pid", "parent_id"}:  # as in Celery's own retries, it is its own parent
                assert first[name] == last[name], name
            assert (last["retries"], last["priority"], last["own"]) == (0, 3, "mine")
            assert last["timelimit"] == [50, 40]
            assert (last["args"], last["kwargs"], last["callbacks"]) == ([1], {"more": 2}, 1)
            assert here.fake.over == []


def test_its_own_retries_count() -> None:
    """Those of autoretry_for= and of self.retry, after it has been in the queue again."""
    with site({"rpm": 600}, ONE) as here:
        here.worker(slots=2)
        with busy(here, 2.5):
            clumsy, hopeless, again = here.send("clumsy", 2), here.send("clumsy", 3), here.send("again")
            assert clumsy.get(timeout=30) == 2
            assert again.get(timeout=30) == 1
            with pytest.raises(ValueError, match="mine"):
                hopeless.get(timeout=30)
            assert [delivery["retries"] for delivery in deliveries(here, clumsy)][-3:] == [0, 1, 2]
            assert deliveries(here, clumsy)[1]["retries"] == 0, "it has not been in the queue again"


def test_chains_groups_and_chords() -> None:
    with site({"rpm": 120, "burst_s": 1}) as here:
        here.worker(slots=4)
        chained = chain(here.task("add", 1), here.task("add", 10), here.task("add", 100), app=here.app)
        together = group([here.task("add", n) for n in range(12)], app=here.app)
        summed = chord([here.task("add", n) for n in range(12)], here.task("total"), app=here.app)
        results = [chained.apply_async(), together.apply_async(), summed.apply_async()]
        assert results[0].get(timeout=60) == 111
        assert results[1].get(timeout=60) == list(range(12))
        assert results[2].get(timeout=60) == 66
        assert here.fake.over == []


def test_a_task_of_a_class() -> None:
    with site({"rpm": 600}, ONE) as here:
        here.worker(slots=1)
        with busy(here, 2):
            result = here.app.send_task("based", ["hello"])
            assert result.get(timeout=30) == "echo: hello"
            assert len(deliveries(here, result)) > 1


def test_a_function_that_a_task_calls_waits_where_it_is() -> None:
    """For the task would have to begin anew."""
    with site({"rpm": 600}, ONE) as here:
        here.worker(slots=1)
        with busy(here, 2):
            results = [here.send("calls_a_helper", "hello"), here.send("stays", 7)]
            assert results[0].get(timeout=30) == "echo: hello"
            assert here.notes("began") == ["hello"]
            assert results[1].get(timeout=30) == "echo: 7"
            assert [len(deliveries(here, result)) for result in results] == [1, 1]


def test_a_long_cooldown_is_waited_for_in_steps() -> None:
    """Each well under the visibility timeout, after which the broker delivers a task once more."""
    with site({"rpm": 600}, ONE, broker_transport_options={"visibility_timeout": 4}) as here:
        here.worker(slots=2)
        with busy(here, 6):
            result = here.send("ask", 1)
            assert result.get(timeout=30) == "echo: 1"
            times = [delivery["at"] for delivery in deliveries(here, result)]
            assert len(times) >= 6
            assert max(times[n + 1] - times[n] for n in range(len(times) - 1)) < 2
            assert [number for number, _, _ in here.notes("runs")] == [1]


def test_the_deadline_counts_from_the_first_delivery() -> None:
    """The key has no time at which it comes back, so the task looks again and again, but not longer than max_wait."""
    with site({"concurrency": 1}, ONE, broker_transport_options={"visibility_timeout": 2}) as here:
        here.worker(slots=2)
        with manager_of(here) as manager, manager.lease(model="gpt-4o"):
            began = time.time()
            result = here.send("impatient", 1)
            with pytest.raises(Exception, match="max_wait") as raised:
                result.get(timeout=30)
            took = time.time() - began
        assert type(raised.value) is Exhausted
        assert 2.9 < took < 6
        assert len(deliveries(here, result)) > 2


def test_a_backoff_is_waited_for_in_the_queue_and_its_attempts_count() -> None:
    with site({"rpm": 600}, ONE) as here:
        here.worker(slots=1)
        here.fake.fail(Failure.server_error(), times=None)
        result = here.send("stubborn", 1)
        until(lambda: len(deliveries(here, result)) == 2)
        quick = time.time()
        here.send("quick", quick)
        until(lambda: here.notes("latencies"))
        with pytest.raises(Exception, match=r"500|overloaded|error"):
            result.get(timeout=30)
        assert len(here.notes("tries")) == 3


def test_slots_of_concurrency_are_taken_as_they_come_free() -> None:
    """There is no time at which one does, so the first few look often."""
    with site({"concurrency": 1}, ONE) as here:
        here.worker(slots=4)
        began = time.monotonic()
        results = [here.send("hold", 0.2) for _ in range(20)]
        assert [result.get(timeout=60) for result in results] == ["held"] * 20
        assert time.monotonic() - began < 20


def test_a_task_that_cannot_be_sent_back_waits_in_its_worker() -> None:
    """The broker ends while the task looks for a slot."""
    with site({"concurrency": 1}, ONE, broker="another redis") as here, manager_of(here) as manager:
        here.worker(slots=1)
        with manager.lease(model="gpt-4o"):
            result = here.send("ask", 1)
            until(lambda: deliveries(here, result))
            here.broker.kill()
            until(lambda: "task.stays" in here.log())
        until(lambda: here.notes("runs"))
        assert len(deliveries(here, result)) == 1
        assert here.notes("runs")[0][0] == 1


# A lease is settled, or expires.


def used(manager: KeyManager) -> int:
    """Slots that are taken."""
    (key,) = manager.status().keys
    return sum(meter.used for meter in key.meters if meter.limit_name == "concurrency")


@pytest.mark.parametrize("how", ["soft limit", "hard limit", "revoked", "killed"])
def test_a_task_that_is_ended_gives_its_slot_back(how: str) -> None:
    """At once where it can still say so, else with the lease's ttl."""
    with site({"concurrency": 1}, ONE, stable_openai_lease_ttl=2.0) as here, manager_of(here) as manager:
        here.worker(slots=1)
        limit = {"soft limit": {"soft_time_limit": 1}, "hard limit": {"time_limit": 1}}.get(how, {})
        result = here.send("hold", 60, **limit)
        until(lambda: here.notes("held"))
        if how == "revoked":
            here.app.control.revoke(result.id, terminate=True)
        if how == "killed":
            os.kill(deliveries(here, result)[0]["pid"], signal.SIGKILL)
        with pytest.raises(Exception, match=r"Soft|TimeLimit|revoked|terminated|WorkerLost|signal"):
            result.get(timeout=30)
        with manager.lease(model="gpt-4o", max_wait=8):
            pass
        assert here.send("hold", 0).get(timeout=30) == "held"


@pytest.mark.parametrize("who", ["child", "main"])
def test_a_killed_worker_loses_no_task(who: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Under acks_late, while its tasks wait in the queue and in its hands; and no limit is exceeded."""
    often = {"visibility_timeout": 6, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    often["unacked_mutex_expire"] = 3  # the worker may die while it restores
    with site({"rpm": RPM, "burst_s": 1}, broker_transport_options=often, stable_openai_lease_ttl=3.0) as here:
        killed, _ = here.worker(slots=4), here.worker(slots=4)
        results = [here.send("ask", n) for n in range(100)]
        until(lambda: len(here.notes("runs")) >= 20)
        if who == "main":
            stop_between_messages(here, killed.pid, {result.id for result in results})
            os.killpg(killed.pid, signal.SIGKILL)
        else:
            children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
        answers = [result.get(timeout=90) for result in results]
        runs = [number for number, _, _ in here.notes("runs")]
        over = here.fake.over
    assert answers == [f"echo: {n}" for n in range(100)]
    assert set(runs) == set(range(100))
    assert over == []
    with capsys.disabled():
        print(f"\n{who} killed: {len(runs) - 100} of 100 tasks ran twice")


def stop_between_messages(here: Site, pid: int, ids: set[str]) -> None:
    """Stop a worker that has nothing in its hands but what the broker has noted. (Kombu takes a message from Redis, and
    notes it as taken in a second step: who is killed between the two loses it, whatever the task is.)"""
    with redis.Redis.from_url(here.env["TEST_BROKER"], decode_responses=True) as broker:

        def is_noted() -> bool:
            messages = "".join([*broker.lrange("celery", 0, -1), *broker.hvals("unacked")])
            return all(id in messages or here.app.AsyncResult(id).ready() for id in ids)

        for _ in range(100):
            os.kill(pid, signal.SIGSTOP)
            with suppress(AssertionError):
                until(is_noted, 0.5)  # (of the others too)
                return
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)
    raise AssertionError("it was never between two messages")


# Without a worker.


@pytest.fixture
def app() -> Iterator[Celery]:
    made = Celery(broker="memory://", set_as_current=False)
    yield made
    made.close()


def test_eager_and_direct_calls_are_as_without_celery(app: Celery) -> None:
    manager = KeyManager(["sk-a"], limits=Limits(concurrency=1), pool="test-eager")
    calls = []

    @app.task(bind=True)
    @stable(manager=manager, max_wait=1.5)
    def ask(self: Any, number: int, api_key: str) -> str:
        calls.append(self.request.called_directly)
        return f"{number} {api_key}"

    assert ask(1) == "1 sk-a"
    app.conf.task_always_eager = True
    assert ask.delay(2).get() == "2 sk-a"
    assert calls == [True, False]
    with manager.lease():
        eager = ask.delay(3)
        assert isinstance(eager.result, Exhausted)
        with pytest.raises(Exhausted):
            ask(4)
    manager.close()


def test_the_wrong_order_of_decorators_fails_when_it_decorates(app: Celery) -> None:
    def ask(prompt: str, api_key: str) -> str:
        return prompt

    for lazy in (True, False):
        task = app.task(ask, lazy=lazy, name=f"wrong-{lazy}")
        with pytest.raises(ConfigurationError, match=r"@app\.task above @stable"):
            stable(task)


def test_celery_checks_arguments_as_the_caller_sees_them(app: Celery) -> None:
    @app.task
    @stable
    def ask(prompt: str, api_key: str) -> str:
        return prompt

    app.conf.task_always_eager = True
    with pytest.raises(TypeError, match="argument"):
        ask.apply_async(("hello", "too many"))
    with pytest.raises(TypeError, match="prompt"):
        ask.apply_async(())


@pytest.mark.parametrize("options", [{"pydantic": True}, {"autoretry_for": (KeyError,)}, {"bind": True}])
def test_wrappers_of_the_body_are_seen_through(app: Celery, options: dict[str, Any]) -> None:
    def ask(self: str, api_key: str) -> str:
        return self

    decorated = stable(ask)
    task = app.task(name="wrapped", **options)(decorated)
    assert _runs(task.run, decorated)
    assert not _runs(task.run, stable(ask))


def test_settings_make_the_pool(app: Celery) -> None:
    app.conf.update(
        stable_openai_keys="sk-a, sk-b",
        stable_openai_redis="redis://:hunter2@127.0.0.1:1/0?password=hunter2",
        stable_openai_pool="test-settings",
        stable_openai_limits={"rpm": 5},
        stable_openai_models={"gpt-4o*": {"rpm": 7}},
        stable_openai_max_wait=9.0,
        stable_openai_lease_ttl=30.0,
    )
    manager = setup(app)
    try:
        assert (manager.pool, manager.max_wait) == ("test-settings", 9.0)
        assert "keys=2, backend='redis'" in repr(manager)
        again = setup(app)
        assert "hunter2" in str(again._backend._redis._make(redis).connection_pool.connection_kwargs)
        again.close()
        assert "hunter2" not in app.conf.humanize(with_defaults=False)
        assert "sk-a" not in app.conf.humanize(with_defaults=False)
    finally:
        manager.close()


def test_settings_of_a_module_with_a_namespace(app: Celery) -> None:
    class Module:
        CELERY_STABLE_OPENAI_KEYS = ("sk-a",)
        CELERY_STABLE_OPENAI_POOL = "test-module"

    app.config_from_object(Module, namespace="CELERY")
    manager = setup(app)
    assert manager.pool == "test-module"
    manager.close()


def test_a_manager_that_has_been_made(app: Celery) -> None:
    manager = KeyManager(["sk-a"], pool="test-made")
    assert setup(app, manager) is manager
    manager.close()


@pytest.mark.parametrize("namespace", [None, "CELERY"])
def test_a_setting_that_is_misspelt(namespace: str | None) -> None:
    settings = {"stable_openai_keys": "sk-a", "stable_openai_limit": {"rpm": 3}}
    if namespace:  # as Django's are
        settings = {f"{namespace}_{name}".upper(): value for name, value in settings.items()}
        settings["STABLE_OPENAI_OF_ANOTHER"] = 1
    app = Celery("misspelt", set_as_current=False)
    app.config_from_object(settings, namespace=namespace)
    with pytest.raises(ConfigurationError, match=r"stable_openai_limit: is no setting; .* limits, "):
        setup(app)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("celery_wait", -1), ("celery_wait", "1"), ("celery_wait", True), ("limits", {"rps": 1}), ("limits", 5)],
)
def test_a_setting_that_is_wrong(app: Celery, name: str, wrong: Any) -> None:
    app.conf[f"stable_openai_{name}"] = wrong
    with pytest.raises(ConfigurationError, match=name):
        setup(app)
