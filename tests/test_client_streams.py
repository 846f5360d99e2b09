"""Streams of the clients: whatever becomes of one, its lease is settled and its connection is used again or closed."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any
from unittest.mock import patch

import anyio
import openai
import pytest

from stable_openai._clients import shared_client
from stable_openai._ops import Renew
from stable_openai.testing import Failure, FakeOpenAI
from tests.worlds import *  # noqa: F403  its fixtures too
from tests.worlds import STREAM, WAYS, Async, Sync, World, read, wire_of

ENDS = {
    "read": (None, 0, "read"),
    "closed": (Failure.stall(after=3), 2, "close"),
    "closed unread": (Failure.stall(after=3), 0, "close"),
    "cut": (Failure.cut(after=3), 1, openai.APIConnectionError),
    "an error event": (Failure.stream_error(after=3), 1, openai.APIError),
    "dropped": (Failure.stall(after=3), 2, "drop"),
    "dropped unread": (Failure.stall(after=3), 0, "drop"),
    "dropped when all of it has come": (None, 3, "drop"),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("way", WAYS)
def test_however_a_stream_ends(make: Callable[..., World], way: str, end: str) -> None:
    failure, taken, how = ENDS[end]
    world = make()
    colour, fake = world.colour, world.fake

    async def story() -> None:
        if failure is not None:
            fake.fail(failure)
        stream = await world.open(way)
        for _ in range(taken):
            await colour.next(stream)
        begun = way != "generated" or taken > 0
        assert (len(world.worker.live), world.live()) == (begun, begun)
        if how == "read":
            assert len(await colour.rest(stream)) > 2
        elif how == "close":
            closed = (stream.aclose if way == "generated" and colour is Async else stream.close)()
            if closed is not None:
                await closed
        elif how == "drop":
            stream = None
            gc.collect()
        else:
            with pytest.raises(how):
                await colour.rest(stream)
        await world.settled()
        await world.until(lambda: fake.in_flight == 0)
        if how != "read":  # the upstream knows at once, not when something is sent next
            await world.until(lambda: fake.connections.open == 0)
        fake.clear()
        stream = await world.open(way)
        assert len(await colour.rest(stream)) > 2
        await world.settled()
        assert fake.connections == ((1, 1) if how == "read" else (1, 2) if begun else (1, 1))

    colour.run(story())


def test_streams_use_a_connection_again(make: Callable[..., World], fake: FakeOpenAI) -> None:
    world = make()

    async def story() -> None:
        for way in world.ways:
            before = fake.connections.total
            for _ in range(5):
                await world.colour.rest(await world.open(way))
            assert fake.connections.total - before == (way != "generated")  # injected clients share their connections
        await world.settled()

    world.colour.run(story())


def test_an_upstream_that_does_not_end_what_is_done(make: Callable[..., World], fake: FakeOpenAI) -> None:
    world = make()

    async def story() -> None:
        for way in world.ways:
            fake.fail(Failure.stall(after=99))  # after [DONE]
            began = time.monotonic()
            assert len(await world.colour.rest(await world.open(way))) > 2
            assert time.monotonic() - began < 5
            await world.settled()

    world.colour.run(story())


def test_leases_are_renewed_as_long_as_their_streams_last(
    make: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    world = make(lease_ttl=1.0)
    backend, enough, renewals = world.manager._backend, threading.Event(), []
    run = backend.run

    def counting(op: Any) -> Any:
        if type(op) is Renew:
            renewals.append(time.monotonic())
            if renewals[-1] - renewals[0] > 1.2:
                enough.set()
        return run(op)

    backend.run = counting

    async def story() -> None:
        world.fake.fail(Failure.stall(after=2), times=3)
        streams = [await world.open(way) for way in WAYS]
        for stream in streams:
            await world.colour.next(stream)
        await world.until(enough.is_set)
        assert world.live() == 3
        world.fake.release()
        for stream in streams:
            assert len(await world.colour.rest(stream)) > 2
        await world.settled()

    world.colour.run(story())
    assert not [record for record in caplog.records if "lost" in record.message]


@pytest.mark.parametrize("way", WAYS)
def test_retried_only_before_the_first_item(make: Callable[..., World], fake: FakeOpenAI, way: str) -> None:
    world = make()

    async def story() -> None:
        failures = [Failure.cut(after=0), Failure.server_error(), Failure.closed()]
        # An injected client's create() returns before such an event is read.
        failures += [Failure.stream_error(after=0)] if way != "returned" else []
        for failure in failures:
            fake.fail(failure)
            assert len(await world.colour.rest(await world.open(way))) > 2
            assert len(fake.log) == 2
            fake.clear()
        for failure in (Failure.cut(after=1), Failure.stream_error(after=1)):
            fake.fail(failure)
            stream = await world.open(way)
            await world.colour.next(stream)
            with pytest.raises(openai.APIError):
                await world.colour.rest(stream)
            assert len(fake.log) == 1
            fake.clear()
        await world.settled()

    world.colour.run(story())


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_the_garbage_collector_waits_for_nothing(make: Callable[..., World], way: str, taken: int) -> None:
    """Whichever locks are held meanwhile, and nothing is asked of the store."""
    world = make(lease_ttl=60.0)  # so that the heartbeat asks nothing meanwhile
    backend, asked = world.manager._backend, []
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks_of(world):
                stack.enter_context(lock)
            held.set()
            release.wait()

    async def story() -> None:
        box = [await world.open(way)]
        box.append(box)  # a cycle
        for _ in range(taken):
            await world.colour.next(box[0])
        holder, collector = threading.Thread(target=hold), threading.Thread(target=gc.collect, daemon=True)
        with patch.object(backend, "run", asked.append), patch.object(backend, "arun", asked.append, create=True):
            holder.start()
            held.wait()
            del box
            collector.start()
            collector.join(5)
            stuck = collector.is_alive()
            if not stuck:
                await world.until(lambda: not world.worker.live)
            release.set()
            holder.join()
        assert not stuck
        assert asked == []
        await world.settled()

    world.colour.run(story())


def locks_of(world: World) -> list[Any]:
    """Those of the store in memory, and of the connection pools under sync clients."""
    locks = [world.manager._backend._mutex] if world.manager._backend.local else []
    if world.colour is Sync:
        for client in (world.client, shared_client(is_async=False)):
            locks += [lines.send.__self__._pool._optional_thread_lock for lines in wire_of(client)._lines.values()]
    return locks


@pytest.mark.parametrize("failure", [Failure.hang(), Failure.stall(after=0), Failure.stall(after=2)], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by", ["a deadline", "a task that fails beside it", "another task"])
def test_cancelled(fake: FakeOpenAI, redis: Any, way: str, failure: Failure, by: str) -> None:
    world = World(Async, fake, redis)

    async def consume() -> None:
        await Async.rest(await world.open(way))

    async def fails() -> None:
        await asyncio.to_thread(fake.wait_for, lambda fake: fake.in_flight)
        raise ValueError

    async def story() -> None:
        fake.fail(failure)
        if by == "a deadline":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(consume(), 0.1)
        elif by == "another task":
            task = asyncio.ensure_future(consume())
            await asyncio.to_thread(fake.wait_for, lambda fake: fake.in_flight)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            errors: tuple[BaseException, ...] = ()
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(consume)
                    group.start_soon(fails)
            except BaseException as group_of_errors:  # a class of its own before Python 3.11
                errors = group_of_errors.exceptions  # type: ignore[attr-defined]
            assert [type(error) for error in errors] == [ValueError]
        assert (len(world.worker.live), world.live()) == (0, 0)
        await world.until(lambda: fake.connections.open == 0 and fake.in_flight == 0)
        assert len(await Async.rest(await world.open(way))) > 2
        await world.settled()
        assert fake.connections.open == 1

    asyncio.run(story())
    fake.wait_for(lambda fake: fake.connections.open == 0)
    world.manager.close()


@pytest.mark.parametrize("taken", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_a_loop_that_ends_with_an_open_stream(fake: FakeOpenAI, redis: Any, way: str, taken: int) -> None:
    world = World(Async, fake, redis)
    kept: list[Any] = []

    async def story() -> None:
        fake.fail(Failure.stall(after=2))
        kept.append(await world.open(way))
        for _ in range(taken):
            await anext(kept[0])

    asyncio.run(story())
    assert not world.worker.live
    assert world.live() == 0
    fake.wait_for(lambda fake: fake.connections.open == 0 and fake.in_flight == 0)
    kept.clear()
    gc.collect()
    asyncio.run(story())  # the same client on another loop
    kept.clear()
    world.manager.close()


# asyncio warns of transports that it has to close when they are collected, under openai's own client too.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@LEFT_OPEN
def test_a_loop_that_is_closed_and_nothing_with_it(fake: FakeOpenAI, redis: Any) -> None:
    world = World(Async, fake, redis)
    for taken in (0, 1):
        loop = asyncio.new_event_loop()
        fake.fail(Failure.stall(after=2))
        stream = loop.run_until_complete(world.open("client"))
        for _ in range(taken):
            loop.run_until_complete(anext(stream))
        loop.close()
        del stream
        gc.collect()
        assert (len(world.worker.live), world.live()) == (0, 0)
        for way in ("client", "returned"):
            asyncio.run(read(world, way))
        gc.collect()
        fake.wait_for(lambda fake: fake.connections.open == 0 and fake.in_flight == 0)
    world.manager.close()
    del world, loop
    gc.collect()


@LEFT_OPEN
def test_a_client_that_is_dropped(make: Callable[..., World], fake: FakeOpenAI) -> None:
    world = make()

    async def story() -> None:
        stream = await world.open("client")
        await world.colour.next(stream)
        del world.client, world.ways["client"]
        gc.collect()
        assert len(await world.colour.rest(stream)) > 2  # the stream has what it needs
        await world.settled()
        del stream
        await world.until(lambda: gc.collect() >= 0 and fake.connections.open == 0)

    world.colour.run(story())


def test_a_users_own_http_client_outlives_ours(make: Callable[..., World]) -> None:
    world = make()
    own = (openai.DefaultHttpxClient if world.colour is Sync else openai.DefaultAsyncHttpxClient)()

    async def story() -> None:
        for _ in range(2):
            client = world.colour.client(manager=world.manager, http_client=own)
            world.ways["own"] = client.chat.completions.create
            assert len(await world.colour.rest(await world.open("own", **STREAM))) > 2
            del client, world.ways["own"]
            gc.collect()
            await world.colour.pause()
            assert not own.is_closed
        client = world.colour.client(manager=world.manager, http_client=own)
        if (closing := client.close()) is not None:
            await closing
        assert own.is_closed  # as openai does

    world.colour.run(story())


def test_threads_that_come_at_once_share_the_connections(fake: FakeOpenAI, redis: Any) -> None:
    world, start = World(Sync, fake, redis), threading.Barrier(16)

    def one(_: int) -> None:
        start.wait()
        for _ in range(5):
            assert len(list(world.client.chat.completions.create(**STREAM))) > 2

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(one, range(16)))
    assert world.live() == 0
    world.client.close()
    fake.wait_for(lambda fake: fake.connections.open == 0)
    assert fake.connections.total <= 16
    world.manager.close()


def sockets() -> int:
    names = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.readlink(name).startswith("socket:") for name in names if os.path.islink(name))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts this process's sockets in /proc")
def test_nothing_leaks(make: Callable[..., World], fake: FakeOpenAI) -> None:
    world = make()

    async def story() -> None:
        counts = []
        for _ in range(3):
            for failure, taken, how in ENDS.values():
                if failure is not None:
                    fake.fail(failure)
                stream = await world.open("client")
                for _ in range(taken):
                    await world.colour.next(stream)
                with suppress(openai.APIError):
                    if isinstance(how, str) and how != "read":
                        if how == "close" and (closing := stream.close()) is not None:
                            await closing
                    else:
                        await world.colour.rest(stream)
                del stream
                gc.collect()
            await world.until(lambda: fake.in_flight == 0)
            await world.colour.rest(await world.open("client"))
            await world.settled()
            await world.until(lambda: fake.connections.open == 1)
            counts.append(sockets())
            lines = wire_of(world.client)._mine()
            assert (len(lines.held), len(lines.dropped), len(lines.send.__self__._pool._requests)) == (0, 0, 0)
        assert counts[0] == counts[1] == counts[2]

    world.colour.run(story())


def test_a_fork_with_an_open_stream(fake: FakeOpenAI, redis: Any) -> None:
    world = World(Sync, fake, redis)
    fake.fail(Failure.stall(after=2))
    box = [Sync.run(world.open("client"))]
    next(box[0])
    other = Sync.run(world.open("returned"))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert not world.worker.live
            for way in ("client", "returned"):
                assert len(list(Sync.run(world.open(way)))) > 2
            box[0].close()
            box.clear()
            del other
            gc.collect()
            assert len(list(Sync.run(world.open("client")))) > 2
            assert world.live() == 2  # the parent's
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert world.live() == 2
    fake.release()
    assert min(len(list(box[0])), len(list(other))) > 1
    assert world.live() == 0
    world.manager.close()
