"""Streams of the clients: whatever becomes of one, its lease is settled and its connection is used again or closed."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
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

from stable_openai import BrokerUnavailable, Limits
from stable_openai._clients import shared_client
from stable_openai._ops import Renew
from stable_openai._wire import http
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


async def drop(world: World, box: list[Any], how: Callable[[list[Any]], object]) -> None:
    """Drop what is in a box, in a thread, while others hold all locks: nothing is asked of the store, or closed."""
    backend, asked = world.manager._backend, []
    held, release, close = threading.Event(), threading.Event(), socket.socket.close

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks_of(world):
                stack.enter_context(lock)
            held.set()
            release.wait()

    def asking(op: Any) -> None:
        if threading.current_thread().name == "stable_openai-heartbeat":  # it may, and finds the store down
            raise BrokerUnavailable
        asked.append(op)

    def closing(one: Any) -> None:
        if threading.current_thread() is dropper:
            asked.append(one)
        close(one)

    dropper = threading.Thread(target=how, args=[box], daemon=True)
    holder = threading.Thread(target=hold, daemon=True)
    with patch.object(backend, "run", asking), patch.object(socket.socket, "close", closing):
        holder.start()
        held.wait()
        dropper.start()
        dropper.join(5)
        if not (stuck := dropper.is_alive()) and how is collect:
            await world.until(lambda: not world.worker.live)
        release.set()
        holder.join()
    assert (stuck, asked) == (False, [])


def collect(box: list[Any]) -> None:
    box.append(box)  # a cycle
    box.clear()
    gc.collect()


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_who_drops_a_stream_waits_for_nothing(make: Callable[..., World], way: str, taken: int) -> None:
    world = make(lease_ttl=60.0)  # so that the heartbeat asks nothing meanwhile

    async def story() -> None:
        for how in (list.clear, collect):
            box = [await world.open(way)]
            for _ in range(taken):
                await world.colour.next(box[0])
            await drop(world, box, how)
            gc.collect()
            await world.settled()

    world.colour.run(story())


EVENTS = [{"choices": [{"index": 0, "delta": {"content": "x"}}]}] * 3
EVENTS.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}})


@pytest.mark.parametrize("how", [list.clear, collect])
def test_a_stream_that_is_dropped_when_all_of_it_has_come(make: Callable[..., World], how: Any) -> None:
    """In one piece: what it says of its tokens counts."""
    world = make(lease_ttl=60.0, limits=Limits(tpm=1000, charge="used", rule="sliding"))
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in (*EVENTS, "[DONE]")).replace('"[DONE]"', "[DONE]")
    answer = http.Response(200, headers={"content-type": "text/event-stream"}, stream=http.ByteStream(body.encode()))
    own = (http.Client if world.colour is Sync else http.AsyncClient)(transport=http.MockTransport(lambda _: answer))
    client = world.colour.client(manager=world.manager, http_client=own)

    async def story() -> None:
        box = [world.colour.iterated(client.chat.completions.create(**STREAM))]
        for _ in range(2):
            await world.colour.next(box[0])
        await drop(world, box, how)
        gc.collect()
        await world.settled()
        assert world.used() == 7

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
            task = asyncio.ensure_future(consume())
            await asyncio.to_thread(fake.wait_for, lambda fake: fake.in_flight)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.05)
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
    world.close()


@pytest.mark.parametrize("way", WAYS)
def test_cancelled_at_any_step(fake: FakeOpenAI, redis: Any, way: str) -> None:
    world = World(Async, fake, redis)

    async def story() -> None:
        for steps in range(40):
            task = asyncio.ensure_future(read(world, way))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await world.settled()
        await read(world, way)
        await world.until(lambda: fake.connections.open == 1 and fake.in_flight == 0)

    asyncio.run(story())
    world.close()


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
    world.close()


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
    world.close()
    del world, loop
    while gc.collect():
        pass


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
    world.close()


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
                    if how == "close" and (closing := stream.close()) is not None:
                        await closing
                    elif how not in ("close", "drop"):
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
    fake.fail(Failure.stall(after=2), times=2)
    box = [Sync.run(world.open("client"))]
    next(box[0])
    other = Sync.run(world.open("returned"))
    for way in ("client", "returned"):
        Sync.run(read(world, way))  # its connection is idle now
    fake.clear()
    ours = fake.connections.total
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert not world.worker.live
            for way in ("client", "returned"):
                assert len(list(Sync.run(world.open(way)))) > 2
            box.pop().close()
            del other
            gc.collect()
            assert len(list(Sync.run(world.open("client")))) > 2
            assert world.live() == 2  # the parent's
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert min(entry.connection for entry in fake.log) > ours
    assert world.live() == 2
    fake.release()
    assert (len(list(box[0])), len(list(other))) == (4, 5)  # an item was taken of the first
    assert world.live() == 0
    world.close()
