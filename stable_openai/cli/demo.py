"""stable-openai demo: the broker at work on a fake OpenAI, with the fake as the judge.

The limits are such that there is something to see within ten seconds, though the broker's minute has 60: an account
has fewer slots than there are threads, and a bucket of 22 s of its rpm, which less the headroom holds 20 of its 25
requests (a process), so that the last of them wait for single requests to trickle in. The fake enforces the same
limits. With several processes all of it grows alike. The headroom is longer than usual, for machines that are busy.

Every prompt is reported as it ends, by a queue from threads and by pipes from processes, to the one loop that draws
the progress. The processes are spawned, and end with this one, however it ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stable_openai import ConfigurationError, Key, KeyManager, Limits, StableError, stable
from stable_openai.testing import Entry, FakeOpenAI, FakeProcess, Limit

__all__ = ["run"]

THREADS, PROMPTS = 10, 5
MODEL = "gpt-4o-mini"
ACCOUNTS = {"sk-demo-alpha": "org-1", "sk-demo-beta": "org-2"}
NAMES = {"sk-demo-alpha": "alpha", "sk-demo-beta": "beta", "sk-demo-mistyped": "mistyped"}
LATENCY_S = 0.1
NOTABLE_S = 0.5


class Settings(NamedTuple):
    """What every process is told."""

    url: str
    pool: str
    redis: str | None
    processes: int
    max_wait: float


class Done(NamedTuple):
    """A prompt has ended: how long it waited before its last attempt, in s, and what is wrong ("": nothing)."""

    waited: float
    problem: str


Report = Callable[[Done | str], object]
Reports = Generator[Done | str, None, None]


def run(redis: str | None, processes: int, max_wait: float) -> int:
    """Run the demo; returns its exit code.

    Args:
        redis: the URL of what all processes share; None: in memory, for which there must be only one.
        max_wait: how long a prompt may wait for a key, in seconds.
    """
    console = Console(highlight=False)
    for name in ("no_proxy", "NO_PROXY"):  # the fake is here, whatever proxy the environment names
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    pool = f"demo-{os.urandom(4).hex()}"
    arguments: dict[str, Any] = {"keys": ACCOUNTS, "limits": Limit(**_limits(processes)), "latency_s": LATENCY_S}
    fake = FakeOpenAI(**arguments) if processes == 1 else FakeProcess(**arguments)
    with _interrupts() as interrupts:
        try:
            with fake:
                settings = Settings(fake.url, pool, redis, processes, max_wait)
                done, took, keys = _play(console, settings, interrupts)
        except KeyboardInterrupt:
            return _interrupted()
        except OSError:  # Ctrl-C ended the fake's process too, which cannot be asked for its log any more
            if not interrupts:
                raise
            return _interrupted()
        except StableError as error:
            print(f"the demo cannot start: {error}", file=sys.stderr)
            return 2 if isinstance(error, ConfigurationError) else 1
    count = processes * THREADS * PROMPTS
    console.print(_table(keys, fake.log))
    waits = [one.waited for one in done]
    print(
        f"{count - len(_failed(done, count))} of {count} prompts answered in {took:.1f} s; "
        f"{sum(waited > NOTABLE_S for waited in waits)} waited for a key longer than {NOTABLE_S:g} s, "
        f"one of them {max(waits, default=0):.1f} s"
    )
    why = problems(done, count, fake.log)
    for problem in why:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if why else 0


def _play(console: Console, settings: Settings, interrupts: list[int]) -> tuple[list[Done], float, Sequence[Any]]:
    """Send the prompts; returns what came of each, the seconds it took, and the states of the keys then."""
    threads = settings.processes * THREADS
    count = threads * PROMPTS
    with _manager(settings) as manager:
        manager.check()
        place = f"pool {settings.pool!r} on Redis" if settings.redis else "in memory"
        print(f"{count} prompts, {threads} threads, {len(NAMES)} keys, {place}", flush=True)
        began = time.monotonic()
        reports = _from_threads(manager) if settings.processes == 1 else _from_processes(settings)
        done = _follow(console, reports, count, interrupts)
        return done, time.monotonic() - began, manager.status().keys


def problems(done: Sequence[Done], count: int, log: Iterable[Entry]) -> list[str]:
    """Why the demo has failed; empty where every prompt was answered and no limit exceeded."""
    why = [f"{times} x {problem}" for problem, times in Counter(_failed(done, count)).most_common()]
    over = Counter(entry.limit for entry in log if entry.limit is not None)
    return why + [f"{times} requests over the {limit} of their account" for limit, times in over.items()]


def _failed(done: Sequence[Done], count: int) -> list[str]:
    lost = ["a prompt without any answer: its process has ended"] * (count - len(done))
    return [one.problem for one in done if one.problem] + lost


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The times that Ctrl-C was heard: Python swallows the exception where it comes while a finaliser runs."""
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130


def _limits(processes: int) -> dict[str, Any]:
    """Of each account, for the broker and for the fake."""
    return {"rpm": 60 * processes, "burst_s": 22, "concurrency": 3 * processes}


@contextmanager
def _manager(settings: Settings) -> Iterator[KeyManager]:
    manager = KeyManager(
        [
            Key(secret, name=name, account=ACCOUNTS.get(secret, "org-3"), base_url=settings.url)
            for secret, name in NAMES.items()
        ],
        settings.redis,
        pool=settings.pool,
        limits=Limits(**_limits(settings.processes)),
        on_redis_down="raise",
        max_wait=settings.max_wait,
        headroom_s=2,
    )
    try:
        yield manager
    finally:
        manager.close()


# the prompts: threads, and processes of threads


def _prompt(manager: KeyManager, process: int, report: Report) -> list[threading.Thread]:
    """Start the threads of one process; they report each prompt as it ends."""

    @stable(manager=manager, model=MODEL)
    def ask(prompt: str, begun: list[float], client: Any = None) -> str:
        begun.append(time.monotonic())
        answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": prompt}])
        return str(answer.choices[0].message.content)

    def one(prompt: str) -> Done:
        called, begun = time.monotonic(), list[float]()
        try:
            answer = ask(prompt, begun)
            problem = "" if answer == f"echo: {prompt}" else "an answer to another question"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return Done((begun[-1] if begun else time.monotonic()) - called, problem)

    def work(thread: int) -> None:
        for number in range(PROMPTS):
            report(one(f"process {process}, thread {thread}, prompt {number}"))

    logging.getLogger("stable_openai").addHandler(_Forward(report))
    threads = [threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    return threads


class _Forward(logging.Handler):
    """What the broker has to say, to be shown above the progress bar."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report(record.getMessage())


def _from_threads(manager: KeyManager) -> Reports:
    queue: SimpleQueue[Done | str] = SimpleQueue()
    _prompt(manager, 0, queue.put)
    while True:
        yield queue.get()


def _from_processes(settings: Settings) -> Reports:
    """Ends when all processes have: one that dies early does not report its last prompts."""
    context = multiprocessing.get_context("spawn")
    children: list[SpawnProcess] = []
    readers: list[Connection] = []
    try:
        with _deaf():
            for number in range(settings.processes):
                reader, writer = context.Pipe(duplex=False)
                child = context.Process(target=_process, args=(number, settings, writer), daemon=True)
                child.start()
                writer.close()
                children.append(child)
                readers.append(reader)
        while readers:
            for ready in wait(readers):
                assert isinstance(ready, Connection)
                try:
                    yield ready.recv()
                except EOFError:
                    readers.remove(ready)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.join()


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C never comes to the processes that are started, and to this thread only later: it has to end them."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # to start it would undo the mask
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _process(number: int, settings: Settings, writer: Connection) -> None:
    """The main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    mutex = threading.Lock()

    def report(item: Done | str) -> None:
        with mutex:
            writer.send(item)

    with _manager(settings) as manager:
        for thread in _prompt(manager, number, report):
            thread.join()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# what is shown


def _follow(console: Console, reports: Reports, count: int, interrupts: list[int]) -> list[Done]:
    """Draw the progress until all prompts have ended, or nobody is left to report one."""
    done: list[Done] = []
    columns = (TextColumn("prompts"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
    with closing(reports), Progress(*columns, console=console) as progress:
        task = progress.add_task("prompts", total=count)
        for item in reports:
            if interrupts:
                raise KeyboardInterrupt
            if isinstance(item, str):
                progress.console.print(item, markup=False, style="dim")
                continue
            done.append(item)
            progress.advance(task)
            if len(done) == count:
                break
    return done


def _table(keys: Iterable[Any], log: Iterable[Entry]) -> Table:
    """What each key did, by the fake's own log."""
    table = Table("key", "account", "state", "why", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for title in ("sent", "answered", "401", "429", "over\nlimit"):
        table.add_column(title, justify="right")
    mine: dict[str, list[Entry]] = {name: [] for name in NAMES.values()}
    for entry in log:
        mine[NAMES[entry.key or ""]].append(entry)
    for key in keys:
        statuses = Counter(entry.status for entry in mine[key.name])
        over = sum(entry.limit is not None for entry in mine[key.name])
        counts = (statuses.total(), statuses[200], statuses[401], statuses[429], over)
        state = key.state if not key.seconds else f"{key.state} {key.seconds:.0f} s"
        account = f"{key.organization}, undeclared" if key.organization else key.account
        table.add_row(key.name, account, state, key.reason, *map(str, counts))
    return table
