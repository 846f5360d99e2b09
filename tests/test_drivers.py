"""The four drivers obey one flow: the same story gives the same operations, whatever is decorated."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import openai
import pytest
import redis
from tenacity import stop_after_attempt, wait_none

from stable_openai import BrokerUnavailable, ConfigurationError, Exhausted, Key, KeyManager, Limits, Verdict, stable
from stable_openai._limits import quota
from stable_openai._ops import Acquire, Ask, Attend, Closing, Granted, Member, Register, Registration, Settle
from stable_openai.backends.memory import MemoryBackend
from stable_openai.testing import Failure, FakeOpenAI, Limit

KEYS = ("sk-a", "sk-b")


async def until(true: Callable[[], object]) -> None:
    """Let the loop turn until something is true."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


def waiting(manager: KeyManager) -> int:
    """The calls that wait in this process."""
    return sum(map(len, tuple(manager._worker.lines.values())))


class Recorder:
    """A backend that notes what it is asked, and what it answers."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.local = backend.local
        self.story: list[str] = []

    def note(self, op: Any, reply: Any) -> Any:
        if isinstance(op, Acquire):
            self.story += ["granted" if isinstance(answer, Granted) else "refused" for answer in reply.answers]
        elif isinstance(op, Settle):
            self.story += [f"{closing.outcome} {closing.tokens}" for closing in op.closings]
        return reply

    def run(self, op: Any) -> Any:
        return self.note(op, self.backend.run(op))

    async def arun(self, op: Any) -> Any:
        return self.note(op, await self.backend.arun(op))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@pytest.fixture(params=["memory", "redis"])
def recorded(request: pytest.FixtureRequest, redis_url: str) -> Iterator[tuple[KeyManager, list[str]]]:
    where = redis_url if request.param == "redis" else None
    manager = KeyManager(KEYS, where, pool="test-drivers", max_wait=5)
    recorder = manager._backend = Recorder(manager._backend)
    yield manager, recorder.story
    manager.close()


def upstream(story: list[object]) -> Callable[[], str]:
    """Answers, or raises, as the story says, one part for each attempt."""
    parts = iter(story)

    def attempt() -> str:
        part = next(parts)
        if isinstance(part, Exception):
            raise part
        return str(part)

    return attempt


def rate_limited() -> Exception:
    return classified("limited", "move")


def server_error() -> Exception:
    return classified("failed", "retry")


class Classified(Exception):
    def __init__(self, outcome: str, action: str) -> None:
        super().__init__(outcome)
        self.outcome, self.action = outcome, action


def classified(outcome: str, action: str) -> Exception:
    return Classified(outcome, action)


def classify(error: BaseException) -> Any:
    from stable_openai import Verdict

    return Verdict(error.outcome, error.action, "test", wait_s=0.0) if isinstance(error, Classified) else None  # type: ignore[arg-type]


STORIES: dict[str, tuple[list[object], list[str]]] = {
    "answered": (["fine"], ["granted", "ok 7"]),
    "moved": ([rate_limited(), "fine"], ["granted", "limited 7", "granted", "ok 7"]),
    "retried": ([server_error(), server_error(), "fine"], ["granted", "failed 7"] * 2 + ["granted", "ok 7"]),
    "given up": ([server_error()] * 3, ["granted", "failed 7"] * 3),
    "raised": ([ValueError("mine")], ["granted", "neutral 7"]),
}


def call_in_four_ways(manager: KeyManager, attempt: Callable[[], str]) -> dict[str, Callable[[], str]]:
    options: Any = {"manager": manager, "stop": stop_after_attempt(3), "wait": wait_none(), "classify": classify}

    @stable(**options)
    def function(lease: Any = None) -> str:
        lease.report(tokens=7)
        return attempt()

    @stable(**options)
    async def coroutine(lease: Any = None) -> str:
        lease.report(tokens=7)
        return attempt()

    @stable(**options)
    def generator(lease: Any = None) -> Iterator[str]:
        lease.report(tokens=7)
        yield attempt()

    @stable(**options)
    async def async_generator(lease: Any = None) -> AsyncIterator[str]:
        lease.report(tokens=7)
        yield attempt()

    async def gather() -> str:
        return "".join([item async for item in async_generator()])

    return {
        "function": function,
        "coroutine": lambda: asyncio.run(coroutine()),
        "generator": lambda: "".join(generator()),
        "async generator": lambda: asyncio.run(gather()),
    }


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("way", ["function", "coroutine", "generator", "async generator"])
def test_the_same_story_gives_the_same_operations(recorded: tuple[KeyManager, list[str]], story: str, way: str) -> None:
    manager, seen = recorded
    parts, expected = STORIES[story]
    run = call_in_four_ways(manager, upstream(parts))[way]
    if story in ("given up", "raised"):
        with pytest.raises((Classified, ValueError)) as raised:
            run()
        assert raised.value is parts[-1], "the very exception"
    else:
        assert run() == "fine"
    assert seen == expected


def test_a_generator_is_retried_only_before_its_first_item(recorded: tuple[KeyManager, list[str]]) -> None:
    manager, seen = recorded
    error = server_error()

    @stable(manager=manager, wait=wait_none(), classify=classify)
    def items(api_key: str = "") -> Iterator[int]:
        yield 1
        raise error

    generator = items()
    assert next(generator) == 1
    with pytest.raises(Classified) as raised:
        next(generator)
    assert (raised.value is error, seen) == (True, ["granted", "failed None"])


def test_a_generator_passes_on_what_is_sent_thrown_and_returned(recorded: tuple[KeyManager, list[str]]) -> None:
    manager, _ = recorded

    @stable(manager=manager)
    def echo(api_key: str = "") -> Any:
        try:
            sent = yield "first"
            sent = yield f"sent {sent}"
        except KeyError as error:
            yield f"caught {error}"
        return "returned"

    generator = echo()
    assert next(generator) == "first"
    assert generator.send("x") == "sent x"
    assert generator.throw(KeyError("k")) == "caught 'k'"
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == "returned"


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_generator_that_is_not_exhausted_gives_its_slot_back(
    recorded: tuple[KeyManager, list[str]], end: str
) -> None:
    manager, seen = recorded
    closed = []

    @stable(manager=manager)
    def items(api_key: str = "") -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            closed.append(True)

    generator = items()
    assert next(generator) == 0
    if end == "close":
        generator.close()  # type: ignore[attr-defined]
    del generator
    assert closed == [True]
    assert manager._worker.live == {}
    with manager.lease():  # the next operation settles what was only queued
        assert seen == ["granted", "neutral None", "granted"]


def test_an_async_generator_closes_the_inner_one(recorded: tuple[KeyManager, list[str]]) -> None:
    manager, _ = recorded
    closed = []

    @stable(manager=manager)
    async def items(api_key: str = "") -> AsyncIterator[int]:
        try:
            for number in range(10):
                yield number
        finally:
            closed.append(True)

    async def main() -> None:
        generator: Any = items()
        assert await generator.__anext__() == 0
        await generator.aclose()

    asyncio.run(main())
    assert closed == [True]
    assert manager._worker.live == {}


def test_methods_and_static_methods() -> None:
    manager = KeyManager(["sk-a"], pool="methods")

    class Service:
        name = "service"

        @stable(manager=manager)
        def method(self, prompt: str, api_key: str = "") -> str:
            return f"{self.name} {prompt} {api_key}"

        @staticmethod
        @stable(manager=manager)
        def static(prompt: str, api_key: str = "") -> str:
            return f"{prompt} {api_key}"

        @classmethod
        @stable(manager=manager)
        def of_class(cls, prompt: str, api_key: str = "") -> str:
            return f"{cls.name} {prompt} {api_key}"

    assert Service().method("hello") == "service hello sk-a"
    assert Service().static("hello") == "hello sk-a"
    assert Service.of_class(prompt="hello") == "service hello sk-a"
    manager.close()


def test_the_injected_parameters_are_not_part_of_the_signature() -> None:
    import inspect

    manager = KeyManager(["sk-a"], pool="signature")

    @stable(manager=manager)
    def ask(prompt: str, *, lease: Any = None, api_key: str = "") -> str:
        return prompt

    assert str(inspect.signature(ask)) == "(prompt: 'str') -> 'str'"
    assert set(ask.__annotations__) == {"prompt", "return"}
    manager.close()


def test_falsy_results_are_results() -> None:
    manager = KeyManager(["sk-a"], pool="falsy")
    calls = []

    @stable(manager=manager)
    def nothing(api_key: str = "") -> None:
        calls.append(api_key)

    assert (nothing(), calls) == (None, ["sk-a"])  # type: ignore[func-returns-value]
    manager.close()


@pytest.fixture(params=["memory", "redis"])
def one_slot(request: pytest.FixtureRequest, redis_url: str) -> Iterator[KeyManager]:
    where = redis_url if request.param == "redis" else None
    manager = KeyManager(["sk-a"], where, pool="test-slot", limits=Limits(concurrency=1), max_wait=30)
    yield manager
    manager.close()


def test_a_cancelled_waiter_leaves_nothing_behind(one_slot: KeyManager) -> None:
    async def main() -> None:
        async with one_slot.lease():
            waiter = asyncio.ensure_future(one_slot.lease().__aenter__())
            await until(lambda: waiting(one_slot))
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            assert not waiting(one_slot)
            assert not (await one_slot.astatus()).line
        async with one_slot.lease(max_wait=0):
            pass

    asyncio.run(main())
    assert one_slot.status().keys[0].live == 0


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_close_waits_for_what_the_heartbeat_has_begun(
    colour: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = KeyManager(["sk-a"], redis_url, pool="test-flight", on_redis_down="wait")
    run, reached, go = manager._backend.run, threading.Event(), threading.Event()

    def slow(op: Any) -> Any:
        if isinstance(op, Attend):
            reached.set()
            assert go.wait(5)
        return run(op)

    manager._backend.run = slow
    manager.check()
    assert reached.wait(5)
    threading.Timer(0.2, go.set).start()
    manager.close() if colour == "sync" else asyncio.run(manager.aclose())
    assert go.is_set()
    assert "heartbeat.failed" not in caplog.text


def test_a_grant_whose_waiter_was_cancelled_in_flight_is_given_back(redis_url: str) -> None:
    """The acquire is on its way when its caller is cancelled: what it grants is settled as never sent."""
    manager = KeyManager(["sk-a"], redis_url, pool="test-flight", limits=Limits(concurrency=1, rpm=60))

    async def main() -> None:
        await manager.acheck()
        backend, sent, reached = manager._backend, asyncio.Event(), asyncio.Event()
        arun = backend.arun

        async def slow(op: Any) -> Any:
            reply = await arun(op)
            if isinstance(op, Acquire):
                reached.set()
                await sent.wait()
            return reply

        backend.arun = slow
        waiter = asyncio.ensure_future(manager.lease().__aenter__())
        await reached.wait()
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        backend.arun = arun
        watcher = KeyManager(["sk-a"], redis_url, pool="test-flight")
        assert (await watcher.astatus()).keys[0].live == 1
        await watcher.aclose()
        sent.set()
        while manager._worker.tasks:
            await asyncio.gather(*manager._worker.tasks)
        key = (await manager.astatus()).keys[0]
        assert (key.live, key.meters[0].used) == (0, 0)
        await manager.aclose()

    asyncio.run(main())


def test_a_freed_slot_wakes_a_waiter_at_once(one_slot: KeyManager) -> None:
    """Threads and coroutines of one process: far sooner than the next look, which comes after five seconds."""
    held = one_slot.lease()
    held.__enter__()
    waited = []

    def wait() -> None:
        began = time.monotonic()
        with one_slot.lease():
            waited.append(time.monotonic() - began)

    thread = threading.Thread(target=wait)
    thread.start()
    while not waiting(one_slot):
        time.sleep(0.001)
    held.__exit__(None, None, None)
    thread.join()
    assert waited[0] < 3


def test_the_deadline_fails_at_once_where_the_wait_cannot_end_in_time(redis_url: str) -> None:
    manager = KeyManager(["sk-a"], redis_url, pool="test-deadline", limits=Limits(rpm=1), max_wait=10)
    with manager.lease():
        pass
    began = time.monotonic()
    with pytest.raises(Exhausted) as raised, manager.lease():
        pass
    assert time.monotonic() - began < 5
    assert raised.value.reason == "rpm"
    assert raised.value.retry_after == pytest.approx(60, abs=2)
    manager.close()


def test_one_manager_serves_two_event_loops_and_a_second_run(redis_url: str) -> None:
    with FakeOpenAI(keys=KEYS) as fake:
        manager = KeyManager([Key(key, base_url=fake.url) for key in KEYS], redis_url, pool="test-loops")

        @stable(manager=manager)
        async def ask(prompt: str, client: Any = None) -> str:
            answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}])
            return str(answer.choices[0].message.content)

        async def main(name: str) -> list[str]:
            answers = await asyncio.gather(*(ask(f"{name} {number}") for number in range(5)))
            return list(answers)

        answers: dict[str, list[str]] = {}

        def run(name: str) -> None:
            answers[name] = asyncio.run(main(name))

        threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run("three")
        assert answers == {name: [f"echo: {name} {i}" for i in range(5)] for name in ("one", "two", "three")}
        manager.close()


def test_a_lease_is_renewed_while_the_call_runs(redis_url: str) -> None:
    manager = KeyManager(["sk-a"], redis_url, pool="test-renew", lease_ttl=1.0)
    with redis.Redis.from_url(redis_url) as client, manager.lease() as lease:
        to = manager._worker.registration("-")
        first = client.zscore(to.keys[2], lease.id)
        assert first is not None
        deadline = time.monotonic() + 10
        while client.zscore(to.keys[2], lease.id) in (first, None):
            assert time.monotonic() < deadline, "renewed"
            time.sleep(0.01)
    manager.close()


FORK = """
import os, sys
from stable_openai import KeyManager, Limits
manager = KeyManager(["sk-a", "sk-b"], {url!r}, pool="test-fork", limits=Limits(concurrency=1))
with manager.lease() as mine:
    child = os.fork()
    if child == 0:
        with manager.lease() as lease:
            ok = lease.api_key != mine.api_key and lease.id.split(":")[0] != mine.id.split(":")[0]
        os._exit(0 if ok and manager._worker.live == {{}} else 1)
    _, status = os.waitpid(child, 0)
assert [key.live for key in manager.status().keys] == [0, 0]
manager.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_with_live_leases_makes_another_worker(redis_url: str) -> None:
    finished = subprocess.run([sys.executable, "-c", FORK.format(url=redis_url)], timeout=60)
    assert finished.returncode == 0


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decoded", [True, False])
def test_a_redis_client_of_either_protocol(redis_url: str, protocol: int, decoded: bool) -> None:
    with redis.Redis.from_url(redis_url, protocol=protocol, decode_responses=decoded) as client:
        manager = KeyManager(["sk-a"], client, pool="test-protocol", limits=Limits(rpm=5))
        with manager.lease() as lease:
            assert lease.api_key == "sk-a"

        async def main() -> str:
            async with manager.lease() as lease:
                key = lease.api_key
            await manager.aclose()
            return key

        assert asyncio.run(main()) == "sk-a"
        assert client.ping()


def test_no_secret_leaves_the_process(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = "sk-very-secret-value"
    with FakeOpenAI(keys={secret: "org-1"}, limits=Limit(rpm=100)) as fake, redis.Redis.from_url(redis_url) as client:
        key = Key(secret, base_url=fake.url)
        manager = KeyManager([key], redis_url, pool="test-secret", limits=Limits(rpm=100))

        @stable(manager=manager, stop=stop_after_attempt(1))
        def ask(client: Any = None, lease: Any = None) -> Any:
            return client.chat.completions.create(model="m", messages=[])

        ask()
        fake.fail(Failure.server_error())
        with pytest.raises(openai.InternalServerError) as raised:
            ask()
        assert raised.value.request.headers["authorization"] == "[redacted]"
        seen = [repr(key), repr(manager), str(manager.status()), caplog.text, repr(raised.value)]
        for name in client.scan_iter("stable:{test-secret}*"):
            kind = client.type(name)
            seen.append(str(name) + str(client.hgetall(name) if kind == b"hash" else client.zrange(name, 0, -1)))
        assert len(seen) > 7
        assert not [text for text in seen if secret in text]
        manager.close()


def test_a_pool_leaves_nothing_behind_when_it_is_idle(redis_url: str) -> None:
    """Every key of a pool has a time at which it is collected, after any sequence of operations."""
    manager = KeyManager(["sk-a", Key("sk-b", account="two")], redis_url, pool="test-idle", limits=Limits(rpm=9))
    for _ in range(3):
        with manager.lease(model="m"):
            pass
    manager.disable("sk-a")
    manager.status()
    with redis.Redis.from_url(redis_url) as client:
        names = list(client.scan_iter("stable:{test-idle}*"))
        assert len(names) >= 5  # and the roster, where it has attended
        assert all(client.pttl(name) > 3_600_000 for name in names)
    manager.close()


def test_constructing_starts_no_thread_and_os_exit_is_not_held_up() -> None:
    program = (
        "import threading; from stable_openai import KeyManager\n"
        "manager = KeyManager(['sk-a']); assert threading.active_count() == 1\n"
        "lease = manager.lease(); lease.__enter__(); assert threading.active_count() == 2\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=20, env=dict(os.environ)).returncode == 0


def test_what_is_given_by_place_is_for_the_parameters_that_callers_see() -> None:
    manager = KeyManager(["sk-a"], pool="places")

    @stable(manager=manager)
    def ask(api_key: str, prompt: str, model: str = "m", lease: Any = None) -> str:
        return f"{api_key} {prompt} {model}"

    assert ask("hello") == "sk-a hello m"  # type: ignore[call-arg]
    assert ask("hello", "gpt") == "sk-a hello gpt"
    assert ask("hello", model="gpt") == "sk-a hello gpt"  # type: ignore[call-arg]
    assert ask("hello", api_key="mine") == "mine hello m"  # type: ignore[misc]
    with pytest.raises(TypeError, match="prompt"):
        ask("hello", prompt="again")  # type: ignore[call-arg]
    manager.close()


def test_a_refund_is_not_taken_from_another_leases_window() -> None:
    """The window of the grant has gone: nothing comes back for it."""
    clock = [1_790_000_000_000]
    backend = MemoryBackend(clock=lambda: clock[0])
    to = Registration("refund", "m", [quota(Limits(rpm=2, rule="sliding"), 0.25)], [Member("a", 0, 1, (("a", 1),))])
    backend.run(Register(to, "epoch", {}))

    def acquire(id: str) -> Any:
        return backend.run(Acquire(to, 600_000, (Ask(id, 0, "m"),))).answers[0]

    assert isinstance(acquire("w:1"), Granted)
    clock[0] += 61_000
    assert isinstance(acquire("w:2"), Granted)
    backend.run(Settle(to, 600_000, (Closing("w:1", "a", "a", "m", "unsent"),)))
    assert isinstance(acquire("w:3"), Granted)
    assert not isinstance(acquire("w:4"), Granted)


class Away:
    """A backend whose settles fail, as when Redis is away."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.local = backend, backend.local

    def run(self, op: Any) -> Any:
        if isinstance(op, Settle):
            raise BrokerUnavailable("away")
        return self.backend.run(op)

    async def arun(self, op: Any) -> Any:
        return self.run(op)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@pytest.mark.parametrize("way", ["function", "coroutine", "generator", "async generator"])
@pytest.mark.parametrize("story", ["answered", "raised"])
def test_a_settle_that_redis_does_not_answer_changes_nothing_for_the_caller(way: str, story: str) -> None:
    manager = KeyManager(KEYS, pool="away")
    whole = manager._backend
    manager._backend = Away(whole)
    parts = STORIES[story][0]
    run = call_in_four_ways(manager, upstream(parts))[way]
    if story == "raised":
        with pytest.raises(ValueError, match="mine"):
            run()
    else:
        assert run() == "fine"
    assert len(manager._worker.pending) == 1
    manager._backend = whole
    with manager.lease():  # flushes
        assert sum(key.live for key in manager.status().keys) == 1
    manager.close()


TWICE = """
import os, sys
from stable_openai import KeyManager, Limits, stable
manager = KeyManager(["sk-a"], {url!r}, pool="test-twice", limits=Limits(concurrency=1))

@stable(manager=manager)
def items(api_key):
    yield 1
    yield 2

stream = items()
next(stream)
child = os.fork()
if child == 0:
    stream.close()
    manager.status()
    os._exit(0)
os.waitpid(child, 0)
live = [key.live for key in manager.status().keys]
assert live == [1], live
assert list(stream) == [2]
assert [key.live for key in manager.status().keys] == [0]
"""


def test_a_forked_child_does_not_settle_its_parents_leases(redis_url: str) -> None:
    assert subprocess.run([sys.executable, "-c", TWICE.format(url=redis_url)], timeout=60).returncode == 0


def test_a_wrong_classify_keeps_no_lease_and_no_secret(recorded: tuple[KeyManager, list[str]]) -> None:
    manager, _ = recorded

    @stable(manager=manager, classify=lambda error: "retry")  # type: ignore[arg-type,return-value]
    def ask(api_key: str = "") -> None:
        raise OSError("mine")

    with pytest.raises(ConfigurationError, match="classify") as raised:
        ask()
    assert isinstance(raised.value.__cause__, OSError)
    assert manager._worker.live == {}
    with pytest.raises(ConfigurationError, match="unknown verdict"):
        Verdict("retry", "retry")  # type: ignore[arg-type]


def test_many_accounts_that_cannot_serve_are_not_asked_in_a_tight_loop() -> None:
    """Each could serve a smaller request: the pause between the looks doubles."""
    keys = [f"sk-{number}" for number in range(20)]
    manager = KeyManager(keys, pool="looks", limits=Limits(tpm=1000))
    for _ in keys:
        with manager.lease(tokens=900):
            pass
    recorder = manager._backend = Recorder(manager._backend)
    with pytest.raises(Exhausted), manager.lease(tokens=900, max_wait=1.5):
        pass
    assert len(recorder.story) < 12
    manager.close()


def test_a_flush_that_is_cut_short_loses_no_closing() -> None:
    manager = KeyManager(KEYS, pool="flush")
    worker = manager._worker
    to = worker.registration("-")
    closings = [Closing(f"w:{number}", "a", "a", "-", "ok") for number in range(450)]
    worker.pending.extend((to, closing) for closing in closings)
    steps = worker.flush()
    assert len(next(steps).closings) == 200
    assert len(steps.send((0.0, [])).closings) == 200
    steps.close()  # the second batch may have been sent; to settle twice is to settle once
    assert [closing for _, closing in worker.pending] == closings[200:]
    worker.pending.clear()
    manager.close()
