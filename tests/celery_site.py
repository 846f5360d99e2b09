"""Real Celery workers on a real broker, with a store and the fake upstream: for the tests and the benchmark."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from stable_openai.testing import FakeProcess, Limit
from tests.faults.servers import Server, until
from tests.servers import private_rabbitmq

__all__ = ["KEYS", "ROOT", "Site", "latencies", "said", "site"]

ROOT = Path(__file__).parent.parent
KEYS = {f"sk-{n}": f"org-{n}" for n in range(4)}


class Site:
    """A broker, a store, the fake upstream, and the app that uses them; workers are started on it."""

    def __init__(
        self, stack: ExitStack, folder: str, limit: dict[str, Any], keys: dict[str, str], broker: str, settings: Any
    ) -> None:
        self.stack, self.folder = stack, folder
        self.server = stack.enter_context(Server(folder))
        until(self.server.admin.ping)
        self.fake = stack.enter_context(FakeProcess(keys=keys, limits=Limit(**limit)))
        self.store = f"redis://127.0.0.1:{self.server.port}"
        self.broker = stack.enter_context(Server(folder)) if broker == "another redis" else self.server
        until(self.broker.admin.ping)
        self.env = {
            "TEST_STORE": self.store,
            "TEST_BROKER": stack.enter_context(private_rabbitmq())
            if broker == "rabbitmq"
            else f"redis://127.0.0.1:{self.broker.port}/1",
            "TEST_FAKE": json.dumps({"url": self.fake.url, "keys": list(keys)}),
            "TEST_SETTINGS": json.dumps({"stable_openai_limits": limit, **settings}),
        }
        self.app = Celery(broker=self.env["TEST_BROKER"], backend=f"{self.store}/2", set_as_current=False)
        self.redis = stack.enter_context(redis.Redis.from_url(f"{self.store}/3", decode_responses=True))
        stack.callback(self._close)
        self.processes: list[subprocess.Popen[bytes]] = []

    def _close(self) -> None:
        self.app.backend.remove_pending_result = lambda result: result  # results that are collected later: it has gone
        self.app.backend.client.close()
        self.app.close()

    def task(self, name: str, *args: Any, **options: Any) -> Any:
        """The signature of a task of celery_jobs.py."""
        return self.app.signature(f"tests.celery_jobs.{name}", args, **options)

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.task(name, *args).apply_async(**options)

    def worker(
        self, pool: str = "prefork", slots: int = 4, app: str = "tests.celery_jobs", folder: str | Path = ROOT
    ) -> subprocess.Popen[bytes]:
        """One, that is ready."""
        name = f"w{len(self.processes)}"
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-P", pool, "-c", str(slots)]
        command += ["-n", f"{name}@here", "-l", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        log = Path(f"{self.folder}/{name}.log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=out, env=os.environ | self.env, start_new_session=True
            )
        self.processes.append(process)
        self.stack.callback(end, process)
        until(lambda: b" ready." in log.read_bytes() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        return process

    def log(self) -> str:
        return "".join(Path(self.folder, f"w{n}.log").read_text() for n in range(len(self.processes)))

    def notes(self, name: str) -> list[Any]:
        return [json.loads(text) for text in self.redis.lrange(name, 0, -1)]


def end(process: subprocess.Popen[bytes]) -> None:
    """The worker, and what it started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def site(limit: dict[str, Any], keys: dict[str, str] = KEYS, broker: str = "redis", **settings: Any) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, ExitStack() as stack:
        yield Site(stack, folder, limit, keys, broker, settings)


def latencies(here: Site, seconds: float, every: float = 0.05, within: float = 20.0) -> list[float]:
    """Of quick tasks that are sent all the time, in s."""
    here.redis.delete("latencies")
    ends, sent = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        here.send("quick", time.time())
        sent += 1
        time.sleep(every)
    until(lambda: here.redis.llen("latencies") == sent, within)
    return sorted(here.notes("latencies"))


def said(found: list[float]) -> str:
    return f"median {statistics.median(found) * 1000:.0f} ms, 95 % {found[int(len(found) * 0.95)] * 1000:.0f} ms"
