"""Workers that die, fork or sleep: their slots come back within the ttl, and no process settles another's leases."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from stable_openai import KeyManager, Limits
from tests.faults.servers import Server, until
from tests.servers import free_port

ROOT = str(Path(__file__).resolve().parents[2])
TTL_S = 1.0
HEAD = """
import asyncio, gc, logging, os, signal, sys, threading, time
from stable_openai import Exhausted, KeyManager, Limits, stable

url, ttl = sys.argv[1], float(sys.argv[2])

def say(*words):
    print(*words, flush=True)

def manage(concurrency=1, ttl=ttl, **more):
    limits = Limits(concurrency=concurrency, rpm=100, tpm=10_000, rule="sliding")
    return KeyManager(["sk-a"], url, pool="test-workers", limits=limits, lease_ttl=ttl, max_wait=20, **more)
"""
LIMITS = Limits(concurrency=1, rpm=100, tpm=10_000, rule="sliding")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, Server(folder) as server:
        until(server.admin.ping)
        yield server


@pytest.fixture
def manager(server: Server) -> Iterator[KeyManager]:
    """Of the same pool as the children's, in this process."""
    server.admin.flushall()
    made = KeyManager(["sk-a"], url(server), pool="test-workers", limits=LIMITS, max_wait=10.0)
    yield made
    made.close()


def url(server: Server) -> str:
    return f"redis://127.0.0.1:{server.port}"


class Child:
    """A Python process that runs a script and says how far it is, a line each."""

    def __init__(self, script: str, *words: str, folder: Path) -> None:
        self.path = folder / "worker.py"
        self.path.write_text(HEAD + textwrap.dedent(script))
        environment = {**os.environ, "PYTHONPATH": ROOT, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(self.path), *words]
        self.stderr = folder / "stderr"
        with self.stderr.open("w") as said:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)

    def line(self, within: float = 15.0) -> str:
        """The next line that it says; "" at the end."""
        out = self.process.stdout
        assert out is not None
        ready, _, _ = select.select([out], [], [], within)
        assert ready, f"the worker said nothing\n{self.stderr.read_text()}"
        return out.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self, within: float = 15.0) -> int:
        return self.process.wait(within)


@pytest.fixture
def child(server: Server, manager: KeyManager, tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Starts workers; `manager` comes first, so that the store is empty."""
    made: list[Child] = []

    def start(script: str, ttl: float = TTL_S) -> Child:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Child(script, url(server), str(ttl), folder=folder))
        return made[-1]

    yield start
    for one in made:
        one.process.kill()
        one.process.wait()
        assert one.process.stdout is not None
        one.process.stdout.close()


def live(manager: KeyManager) -> int:
    return manager.status().keys[0].live


def used(manager: KeyManager, meter: str) -> float:
    return next(row.used for row in manager.status().keys[0].meters if row.limit == meter)


@contextmanager
def taken_within(seconds: float, manager: KeyManager) -> Iterator[Any]:
    began = time.monotonic()
    with manager.lease(tokens=10) as lease:
        assert time.monotonic() - began <= seconds
        yield lease


HOLD = {
    "with": """
        with manage().lease(tokens=10):
            say("held")
            {end}
            time.sleep(60)
        """,
    "function": """
        @stable(manager=manage(), tokens=10)
        def call(api_key):
            say("held")
            {end}
            time.sleep(60)

        call()
        """,
    "coroutine": """
        @stable(manager=manage(), tokens=10)
        async def call(api_key):
            say("held")
            {end}
            await asyncio.sleep(60)

        asyncio.run(call())
        """,
    "generator": """
        manager = manage()

        @stable(manager=manager, tokens=10)
        def call(api_key):
            say("held")
            yield 1

        try:
            for item in call():
                {end}
                time.sleep(60)
        finally:  # a generator that is dropped does no I/O
            manager.close()
        """,
}


def short(*cases: tuple[Any, ...], of: Iterable[tuple[Any, ...]]) -> list[Any]:
    """All cases, of which only some are run in the short form."""
    return [pytest.param(*case, marks=() if case in cases else pytest.mark.soak) for case in of]


@pytest.mark.parametrize(
    ("how", "end"),
    short(
        *(("with", "kill -9"), ("generator", "os._exit"), ("coroutine", "SIGTERM")),
        of=product(["with", "generator", "coroutine"], ["kill -9", "os._exit", "SIGTERM"]),
    ),
)
def test_slots_of_a_dead_worker_come_back_within_the_ttl(
    manager: KeyManager, child: Callable[..., Child], how: str, end: str
) -> None:
    worker = child(HOLD[how].format(end="os._exit(3)" if end == "os._exit" else "pass"))
    assert worker.line() == "held"
    time.sleep(1.5 * TTL_S if end != "os._exit" else 0)  # it is renewed for as long as the worker lives
    if end == "os._exit":
        assert worker.ends() == 3
    else:
        assert live(manager) == 1
        worker.send(signal.SIGKILL if end == "kill -9" else signal.SIGTERM)
        worker.ends()
    with taken_within(TTL_S + 0.7, manager):
        assert live(manager) == 1
    assert (live(manager), used(manager, "rpm"), used(manager, "tpm")) == (0, 2, 20)  # what was used stays used


@pytest.mark.parametrize("how", [*HOLD, "waiting", "waiting coroutine"])
def test_sigterm_that_is_heeded_leaves_nothing(
    server: Server, manager: KeyManager, child: Callable[..., Child], how: str
) -> None:
    """A server that turns SIGTERM into SystemExit, or that cancels its tasks: slots are back at once."""
    waits = {
        "waiting": "say('held')\nmanage().lease().__enter__()",
        "waiting coroutine": textwrap.dedent(HOLD["coroutine"]).format(end="pass").replace("asyncio.run", "wait"),
    }
    script = waits.get(how) or textwrap.dedent(HOLD[how]).format(end="pass")
    asynchronous = "coroutine" in how
    if asynchronous:
        heed = """
            def wait(what):
                async def main():
                    task = asyncio.ensure_future(what)
                    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
                    say("ready")
                    await task
                asyncio.run(main())
            """
        script = textwrap.dedent(heed) + script.replace("asyncio.run", "wait")
    else:
        script = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\nsay('ready')\n" + script
    holder = manager.lease()
    if "waiting" in how:
        holder.__enter__()
    worker = child(script, ttl=60.0)
    assert worker.line() == "ready"
    if "waiting" in how:
        until(lambda: len(manager.status().line) == 1)
        until(lambda: any(row["cmd"] == "blpop" for row in server.admin.client_list()))
    else:
        assert worker.line() == "held"
        assert live(manager) == 1
    worker.send(signal.SIGTERM)
    assert worker.ends() == (1 if asynchronous else 3), worker.stderr.read_text()
    if "waiting" in how:
        assert not manager.status().line
        holder.__exit__(None, None, None)
    assert live(manager) == 0
    fields = server.admin.hkeys("stable:{test-workers}:class:-")
    assert "q" in fields
    assert not [name for name in fields if name[:2] == "l:" or name == "w"]


FORK = {
    "with": """
        manager = manage(2)
        with manager.lease(tokens=10) as lease:
            if os.fork() == 0:
                child(manager, lease)
                # the end of the block is the child's too
            else:
                os.wait()
                say("parent", lease.id, manager.status().keys[0].live)
        if os.getpid() != me:
            gc.collect()
            sys.stdout.flush()
            os._exit(0)
        """,
    "coroutine": """
        manager = manage(2)

        async def main():
            async with manager.lease(tokens=10) as lease:
                if os.fork() == 0:
                    # The loop is the parent's, and so is the selector's descriptor: the child only leaves it.
                    asyncio._set_running_loop(None)
                    child(manager, lease)
                    gc.collect()
                    os._exit(0)
                os.wait()
                began = time.monotonic()
                say("parent", lease.id, (await manager.astatus()).keys[0].live)
                async with manager.lease():
                    pass
                assert time.monotonic() - began < 1, "the child has cut the parent's connections off"

        asyncio.run(main())
        """,
    "generator": """
        manager = manage(2)

        @stable(manager=manager, tokens=10)
        def call(lease):
            yield lease

        calls = call()
        lease = next(calls)
        if os.fork() == 0:
            child(manager, lease)
            calls.close()
            del calls
            gc.collect()
            manager._do(manager._worker.flush())
            os._exit(0)
        os.wait()
        say("parent", lease.id, manager.status().keys[0].live)
        calls.close()
        manager.close()
        """,
    "a loop that waits": """
        manager = manage(2)

        async def call():
            async with manager.lease():
                return time.monotonic()

        async def main():
            lease = await manager.lease(tokens=10).__aenter__()
            other = await manager.lease(tokens=10).__aenter__()
            waiting = [asyncio.ensure_future(call()) for _ in range(3)]
            while not manager._backend._redis._listeners:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            if os.fork() == 0:
                asyncio._set_running_loop(None)
                gc.collect()
                say("child", manager._worker.id, len(manager._worker.live), len(manager._worker.lines))
                os._exit(0)
            os.wait()
            say("parent", lease.id, (await manager.astatus()).keys[0].live)
            began = time.monotonic()
            await other.__aexit__(None, None, None)
            say("served" if max(await asyncio.gather(*waiting)) - began < 1 else "late")
            await lease.__aexit__(None, None, None)

        asyncio.run(main())
        """,
    "a thread that waits": """
        manager = manage(2)
        lease = manager.lease(tokens=10).__enter__()
        other = manager.lease().__enter__()
        waiter = threading.Thread(target=lambda: manager.lease().__enter__())
        waiter.start()
        while not manager.status().line:
            time.sleep(0.01)
        time.sleep(0.3)
        other.__exit__(None, None, None)
        waiter.join()
        waiting = threading.Thread(target=lambda: manager.lease().__enter__() and say("served"))
        waiting.start()
        while not manager.status().line:
            time.sleep(0.01)
        if os.fork() == 0:
            gc.collect()
            say("child", manager._worker.id, len(manager._worker.live), len(manager._worker.lines))
            os._exit(0)
        os.wait()
        say("parent", lease.id, manager.status().keys[0].live)
        lease.__exit__(None, None, None)
        waiting.join()
        """,
}
CHILD = """
me = os.getpid()

def child(manager, inherited):
    with manager.lease(tokens=10) as lease:
        say("child", lease.id, manager.status().keys[0].live)
    inherited.report(tokens=9999)
"""


@pytest.mark.parametrize("how", FORK)
def test_fork_with_live_leases(manager: KeyManager, child: Callable[..., Child], how: str) -> None:
    """The child leases its own, and leaves its parent's to the parent, whatever it does with them."""
    worker = child(CHILD + textwrap.dedent(FORK[how]), ttl=60.0)
    of_child, of_parent = worker.line().split(), worker.line().split()
    assert (of_child[0], of_parent[0]) == ("child", "parent"), worker.stderr.read_text()
    assert of_child[1].partition(":")[0] != of_parent[1].partition(":")[0]
    if how in ("a thread that waits", "a loop that waits"):
        assert of_child[2:] == ["0", "0"]
        assert of_parent[2] == "2"
        assert worker.line() == "served"
        assert worker.ends() == 0
        return
    assert (of_child[2], of_parent[2]) == ("2", "1")
    assert worker.ends() == 0, worker.stderr.read_text()
    assert live(manager) == 0
    assert used(manager, "tpm") == 20
    assert worker.stderr.read_text() == ""


MANY = """
import multiprocessing

limits = Limits(rpm=60, concurrency=3, rule="sliding")

def lease(count):
    manager = KeyManager(["sk-a"], url, pool="test-many", limits=limits, max_wait=5)
    ids = []
    try:
        for _ in range(count):
            with manager.lease() as lease:
                ids.append(lease.id)
    except Exhausted:
        pass
    manager.close()
    return ids

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    if "{method}" == "fork":
        manager = KeyManager(["sk-a"], url, pool="test-many", limits=limits)
        held = manager.lease().__enter__()
    with context.Pool(4) as pool:
        found = pool.map(lease, [25] * 4, chunksize=1)
    if "{method}" == "fork":
        held.__exit__(None, None, None)
        found.append([held.id])
    ids = [id for one in found for id in one]
    say(len(ids), len(set(ids)), len(set(id.partition(":")[0] for id in ids)))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(child: Callable[..., Child], method: str) -> None:
    """Four processes share 60 requests a minute, and two of them never a lease."""
    worker = child(MANY.replace("{method}", method), ttl=60.0)
    total, differing, workers = map(int, worker.line(40).split())
    assert (total, differing) == (60, 60)
    assert workers >= 2
    assert worker.ends() == 0, worker.stderr.read_text()


def test_a_manager_is_not_pickled_to_a_process(child: Callable[..., Child]) -> None:
    script = """
        import multiprocessing

        if __name__ == "__main__":
            try:
                multiprocessing.get_context("spawn").Process(target=print, args=(manage(),)).start()
            except TypeError as error:
                say(error)
        """
    assert "a KeyManager is not pickled" in child(script).line()


PAUSED = {
    "function": """
        @stable(manager=manage(), tokens=10)
        def call(lease):
            say("held")
            while time.monotonic() < end:
                time.sleep(0.01)
            lease.report(tokens=50)
            return "the result"

        """,
    "coroutine": """
        @stable(manager=manage(), tokens=10)
        async def acall(lease):
            say("held")
            while time.monotonic() < end:
                await asyncio.sleep(0.01)
            lease.report(tokens=50)
            return "the result"

        call = lambda: asyncio.run(acall())
        """,
    "with": """
        def call():
            with manage().lease(tokens=10) as lease:
                say("held")
                while time.monotonic() < end:
                    time.sleep(0.01)
                lease.report(tokens=50)
            return "the result"

        """,
}


@pytest.mark.parametrize(
    ("how", "first"),
    short(
        *(("coroutine", "heartbeat"), ("function", "settle")),
        of=product(PAUSED, ["heartbeat", "settle"]),
    ),
)
def test_a_worker_that_was_paused_for_longer_than_the_ttl(
    manager: KeyManager, child: Callable[..., Child], how: str, first: str
) -> None:
    """Its lease is lost: that is a line in its log, and its result is the user's, its usage counted."""
    head = f"logging.basicConfig(level=logging.INFO)\nend = time.monotonic() + {2.2 if first == 'heartbeat' else 0.6}\n"
    tail = "say(call())\nsay('settled')\ntime.sleep(0.5)\n"
    worker = child(head + textwrap.dedent(PAUSED[how]) + tail)
    assert worker.line() == "held"
    worker.send(signal.SIGSTOP)
    stopped = time.monotonic()
    with taken_within(TTL_S + 0.7, manager):  # its slot is another's now
        until(lambda: time.monotonic() - stopped > TTL_S + 0.2)
        worker.send(signal.SIGCONT)
        assert worker.line() == "the result"
        assert worker.line() == "settled"
        assert live(manager) == 1
    assert worker.ends() == 0
    said = worker.stderr.read_text()
    assert said.count("lease.lost") == 1, said
    assert "Traceback" not in said
    assert (live(manager), used(manager, "rpm"), used(manager, "tpm")) == (0, 2, 60)


APP = """
import json, os, threading, time
from stable_openai import KeyManager, Limits, stable

limits = Limits(rpm=40, concurrency=4, rule="sliding")
manager = KeyManager(["sk-a"], {url!r}, pool="test-gunicorn", limits=limits, lease_ttl=1.0, max_wait=20)
held = manager.lease()  # taken before the workers are forked, and given back by the one that took it
held.__enter__()
boss = os.getpid()

@stable(manager=manager)
def call(lease, seconds):
    time.sleep(seconds)
    return lease.id

def app(environ, start_response):
    seconds = float(environ["QUERY_STRING"] or 0)
    start_response("200 OK", [("Content-Type", "application/json")])
    reply = {{"pid": os.getpid(), "boss": boss, "lease": call(seconds=seconds), "held": held.id}}
    return [json.dumps(reply).encode()]
"""


@pytest.fixture
def gunicorn(server: Server, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    server.admin.flushall()
    (tmp_path / "shop.py").write_text(APP.format(url=url(server)))
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--threads", "4", "--no-control-socket"]
    command += ["--bind", f"127.0.0.1:{port}", "--graceful-timeout", "5", "--log-level", "error", "shop:app"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=log, env=environment)
    try:
        yield process, f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(15)


def test_gunicorn_with_preload(server: Server, gunicorn: tuple[subprocess.Popen[bytes], str]) -> None:
    """One manager, made before the fork: each worker is one of its own, they share the limits, and a worker that is
    killed in mid-call gives its slot back."""
    from concurrent.futures import ThreadPoolExecutor

    process, address = gunicorn
    watcher = KeyManager(
        ["sk-a"], url(server), pool="test-gunicorn", limits=Limits(rpm=40, concurrency=4, rule="sliding"), max_wait=5
    )

    def ask(seconds: float = 0.0) -> dict[str, Any]:
        with urlopen(f"{address}?{seconds}", timeout=30) as reply:
            found: dict[str, Any] = json.load(reply)
            return found

    def is_up() -> bool:
        try:
            return bool(ask())
        except OSError:
            return False

    until(is_up)
    before = watcher.status().keys[0].meters[0].used
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: ask(0.05), range(24)))
        by_pid = {reply["pid"]: reply["lease"].partition(":")[0] for reply in replies}
        assert len(by_pid) == len(set(by_pid.values())) == 2
        assert process.pid not in by_pid
        assert all(reply["lease"].partition(":")[0] == by_pid[reply["pid"]] for reply in replies)
        assert len({reply["lease"] for reply in replies}) == 24
        assert replies[0]["held"].partition(":")[0] not in by_pid.values()
        assert (live(watcher), watcher.status().keys[0].meters[0].used) == (1, before + 24)  # the boss's is live still
        calls = [threads.submit(ask, 20.0) for _ in range(3)]
        until(lambda: live(watcher) == 4)
        for pid in by_pid:
            os.kill(pid, signal.SIGKILL)
        until(lambda: live(watcher) == 1, 1.0 + 0.7)
        assert all(isinstance(call.exception(10), OSError) for call in calls)
        until(is_up)
    watcher.close()
