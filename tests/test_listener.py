"""Listening for wakes: the same contract on a thread and on an event loop, on each kind of Redis, losing no wake."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.cluster import RedisCluster
from redis.sentinel import Sentinel

from stable_openai._loops import PerLoop
from stable_openai.backends.listener import AsyncListener, Listener
from stable_openai.backends.redis import TIMEOUT_S, _aclose, _factory, _sentinels_of
from tests.servers import private_cluster, private_redis, private_sentinel

KEY = "stable:{test-listener}:wake:gpt-4o"
LONG_S = 30.0  # a wait that only something else ends


class OnThread:
    """A listener of the calling thread's, with a client of the backend's."""

    def __init__(self, where: Any) -> None:
        self.client = _factory(where, TIMEOUT_S)(redis)
        self.renew()

    def renew(self) -> None:
        self.listener: Any = Listener(self.client, KEY)

    def run(self, reply: Any) -> Any:
        return reply

    def wait(self, seconds: float) -> Any:
        return self.listener.wait(seconds)

    def stop(self) -> Any:
        return self.listener.stop()

    def ping(self) -> bool:
        return bool(self.client.ping())

    def close(self) -> None:
        self.listener.stop()
        for one in (self.client, *_sentinels_of(self.client)):
            one.close()


class OnLoop:
    """The same of an event loop's, which runs only while one of its methods does."""

    def __init__(self, where: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.complaints.append(context))
        self.client = self.run(self._call(_factory(where, TIMEOUT_S), redis.asyncio))
        self.renew()

    def run(self, what: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(what)

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def renew(self) -> None:
        self.listener: Any = self.run(self._call(AsyncListener, self.client, KEY))

    def wait(self, seconds: float) -> Any:
        return self.run(self.listener.wait(seconds))

    def stop(self) -> Any:
        return self.run(self.listener.stop())

    def ping(self) -> bool:
        return bool(self.run(self.client.ping()))

    def close(self) -> None:
        self.stop()
        self.run(_aclose(self.client))
        self.run(asyncio.sleep(0))
        self.loop.close()
        gc.collect()
        assert not self.complaints


COLOURS = [OnThread, OnLoop]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Any, redis.Redis]]:
    with private_cluster() as port, redis.Redis(port=port) as admin:
        client = RedisCluster(host="127.0.0.1", port=port)
        yield client, admin
        client.close()


@pytest.fixture(scope="module")
def sentinel() -> Iterator[tuple[Any, redis.Redis]]:
    with private_sentinel() as port:
        sentinel = Sentinel([("127.0.0.1", port)])
        host, primary = sentinel.discover_master("mymaster")
        with redis.Redis(host=host, port=primary) as admin, sentinel.master_for("mymaster") as client:
            yield client, admin
        for one in sentinel.sentinels:
            one.close()


@pytest.fixture
def plain(redis_url: str) -> Iterator[tuple[Any, redis.Redis]]:
    with redis.Redis.from_url(redis_url) as admin:
        yield redis_url, admin


@pytest.fixture(params=["plain", "cluster", "sentinel"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[tuple[Any, redis.Redis]]:
    where, admin = request.getfixturevalue(request.param)
    yield where, admin
    admin.delete(KEY)


@pytest.fixture(params=COLOURS)
def one(request: pytest.FixtureRequest, plain: tuple[Any, redis.Redis]) -> Iterator[Any]:
    made = request.param(plain[0])
    yield made
    made.close()


@pytest.fixture
def admin(plain: tuple[Any, redis.Redis]) -> redis.Redis:
    return plain[1]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.001)


def blocked(admin: redis.Redis) -> int:
    return int(admin.info("clients")["blocked_clients"])


def listen(one: Any, admin: redis.Redis) -> None:
    """Have the pop outstanding on the server, and nobody in wait()."""

    def outstanding() -> bool:
        assert one.wait(0) is None
        assert not one.listener.broken
        return blocked(admin) == 1

    until(outstanding)


async def until_blocked(admin: redis.Redis) -> None:
    while blocked(admin) == 0:  # noqa: ASYNC110 - the server's state has no event
        await asyncio.sleep(0.001)


def pops(admin: redis.Redis) -> int:
    return int(admin.info("commandstats").get("cmdstat_blpop", {"calls": 0})["calls"])


def after(seconds_started: float) -> float:
    return time.monotonic() - seconds_started


@pytest.mark.parametrize("colour", COLOURS)
def test_the_contract_on_each_kind_of_redis(colour: Any, anywhere: tuple[Any, redis.Redis]) -> None:
    where, admin = anywhere
    one = colour(where)
    listen(one, admin)
    admin.rpush(KEY, 3)
    assert one.wait(LONG_S) == 3
    listen(one, admin)
    admin.rpush(KEY, 4)
    assert one.stop() == 4, "a wake that came while nobody waited"
    listen(one, admin)
    connections = admin.info("clients")["connected_clients"]
    for _ in range(5):
        assert one.stop() is None
        assert one.stop() is None
        assert not one.listener.broken
        until(lambda: blocked(admin) == 0)
        assert one.ping()
        one.renew()
        listen(one, admin)
    assert admin.info("clients")["connected_clients"] <= connections + 1, "connections are used again"
    one.close()
    until(lambda: blocked(admin) == 0)


def test_many_waits_are_one_command(one: Any, admin: redis.Redis) -> None:
    before = pops(admin)
    listen(one, admin)
    for _ in range(20):
        assert one.wait(0) is None
        assert one.wait(0.001) is None
        one.listener.nudge()
        assert one.wait(LONG_S) is None
    started = time.monotonic()
    pusher = threading.Timer(0.01, admin.rpush, (KEY, 7))
    pusher.start()
    assert one.wait(LONG_S) == 7
    assert after(started) < 5
    pusher.join()
    assert pops(admin) - before == 1


def test_the_time_is_over(one: Any) -> None:
    one.wait(0)
    started = time.monotonic()
    assert one.wait(0.05) is None
    assert 0.045 < after(started) < 5
    assert one.wait(-1) is None


def test_a_nudge_from_another_thread_ends_the_wait_or_the_next(one: Any, admin: redis.Redis) -> None:
    listen(one, admin)
    started = time.monotonic()
    nudger = threading.Timer(0.01, one.listener.nudge)
    nudger.start()
    assert one.wait(LONG_S) is None
    nudger.join()
    for _ in range(100_000 if isinstance(one, OnThread) else 10):  # more than a socket holds
        one.listener.nudge()
    admin.rpush(KEY, 1)
    assert one.wait(LONG_S) is None
    assert one.wait(LONG_S) == 1, "several nudges are one, and keep no wake"
    assert after(started) < LONG_S / 2
    one.stop()
    one.listener.nudge()
    one.listener.drop()
    one.listener.nudge()


def test_a_killed_connection_breaks_it_at_once(one: Any, admin: redis.Redis) -> None:
    listen(one, admin)
    (ours,) = [entry["id"] for entry in admin.client_list() if "b" in entry["flags"]]
    started = time.monotonic()
    killer = threading.Timer(0.01, admin.client_kill_filter, kwargs={"_id": ours})
    killer.start()
    assert one.wait(LONG_S) is None
    assert one.listener.broken
    killer.join()
    assert one.wait(LONG_S) is None
    assert one.stop() is None
    assert after(started) < LONG_S / 2
    one.renew()
    listen(one, admin)
    admin.rpush(KEY, 2)
    assert one.wait(LONG_S) == 2


def test_stopping_after_the_connection_was_killed(one: Any, admin: redis.Redis) -> None:
    listen(one, admin)
    (ours,) = [entry["id"] for entry in admin.client_list() if "b" in entry["flags"]]
    admin.client_kill_filter(_id=ours)
    assert one.stop() is None
    assert one.ping()


def test_an_error_reply_breaks_it_at_once(one: Any, admin: redis.Redis) -> None:
    admin.set(KEY, "no list")
    started = time.monotonic()
    assert one.wait(LONG_S) is None
    assert one.listener.broken
    assert after(started) < LONG_S / 2
    assert one.stop() is None
    admin.delete(KEY)


@pytest.mark.parametrize("colour", COLOURS)
def test_no_server_breaks_it_at_once(colour: Any) -> None:
    one = colour("unix:///nowhere/redis.sock")
    started = time.monotonic()
    assert one.wait(LONG_S) is None
    assert one.listener.broken
    assert after(started) < LONG_S / 2
    one.close()


@pytest.mark.parametrize("colour", COLOURS)
def test_a_server_that_refuses_commands(colour: Any) -> None:
    """Without CLIENT UNBLOCK (or the id that it needs) the connection is closed; without BLPOP it is broken."""
    with private_redis() as url, redis.Redis.from_url(url) as admin:
        for denied in ("-client|unblock", "-client|id"):
            admin.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">secret", "~*", "+@all", denied)
            client = redis.Redis.from_url(url, username="worker", password="secret")
            one = colour(client)
            listen(one, admin)
            admin.rpush(KEY, 5)
            assert one.stop() == 5
            one.renew()
            listen(one, admin)
            started = time.monotonic()
            assert one.stop() is None
            assert after(started) < 1.5, "sooner than it would give up"
            until(lambda: blocked(admin) == 0)
            assert one.ping()
            one.close()
        admin.execute_command("ACL", "SETUSER", "worker", "-blpop")
        one = colour(client)
        assert one.wait(LONG_S) is None
        assert one.listener.broken
        one.close()
        client.close()


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("colour", COLOURS)
def test_push_messages_delay_nothing(colour: Any, protocol: int, plain: tuple[Any, redis.Redis]) -> None:
    url, admin = plain
    with redis.Redis.from_url(url, protocol=protocol) as client:
        one = colour(client)
    if protocol == 3:
        pool = one.client.connection_pool  # hands out last what came back last
        if colour is OnThread:
            connection = pool.get_connection()
            connection.send_command("CLIENT", "TRACKING", "ON", "BCAST")
            connection.read_response()
            pool.release(connection)
        else:
            connection = one.run(pool.get_connection())
            one.run(connection.send_command("CLIENT", "TRACKING", "ON", "BCAST"))
            one.run(connection.read_response())
            one.run(pool.release(connection))
    listen(one, admin)
    started = time.monotonic()
    for number in range(3):
        admin.set("stable:{test-listener}:other", number)
        assert one.wait(0.01) is None
    assert after(started) < 1.5, "less than redis-py's own timeout"
    admin.rpush(KEY, 6)
    assert one.wait(LONG_S) == 6
    one.close()


def test_dropping_closes_the_connection(one: Any, admin: redis.Redis) -> None:
    listen(one, admin)
    one.listener.drop()
    one.listener.drop()
    if isinstance(one, OnLoop):
        one.run(asyncio.sleep(0))
    until(lambda: blocked(admin) == 0)
    one.renew()
    one.listener.drop()


def test_a_forgotten_listener_pops_no_more(plain: tuple[Any, redis.Redis]) -> None:
    one = OnThread(plain[0])
    listen(one, plain[1])
    del one.listener
    gc.collect()
    until(lambda: blocked(plain[1]) == 0)
    one.renew()
    one.close()


def test_a_forked_child_forgets_and_the_parent_listens_on(one: Any, admin: redis.Redis) -> None:
    listen(one, admin)
    child = os.fork()
    if child == 0:
        try:
            one.listener.drop()
            del one.listener
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert blocked(admin) == 1
    admin.rpush(KEY, 9)
    assert one.wait(LONG_S) == 9


def test_another_thread_closes_the_client(plain: tuple[Any, redis.Redis]) -> None:
    one = OnThread(plain[0])
    started = time.monotonic()
    for _ in range(20):
        one.renew()
        listen(one, plain[1])
        closer = threading.Timer(0.005, one.client.close)
        closer.start()
        assert one.wait(LONG_S) is None
        assert one.listener.broken
        closer.join()
        until(lambda: blocked(plain[1]) == 0)
    assert after(started) < LONG_S / 2
    one.renew()
    listen(one, plain[1])
    one.client.close()
    assert one.stop() is None
    one.renew()
    listen(one, plain[1])
    plain[1].rpush(KEY, 1)
    assert one.wait(LONG_S) == 1
    one.client.close()
    assert one.wait(LONG_S) is None
    assert one.listener.broken
    one.close()


def test_an_unblock_that_overtakes_the_pop_is_sent_again(one: Any, admin: redis.Redis, monkeypatch: Any) -> None:
    listen(one, admin)
    send, early = one.client.execute_command, [0, 0, 0]

    def overtake(*args: Any) -> Any:
        if not early:
            return send(*args)
        return early.pop() if isinstance(one, OnThread) else asyncio.sleep(0, early.pop())

    monkeypatch.setattr(one.client, "execute_command", overtake)
    started = time.monotonic()
    assert one.stop() is None
    assert after(started) < 1.5, "sooner than it would give up"
    assert not one.listener.broken
    assert blocked(admin) == 0


def test_the_connection_comes_back_as_it_was(one: Any, admin: redis.Redis) -> None:
    listen(one, admin)
    admin.rpush(KEY, 1)
    assert one.wait(LONG_S) == 1
    assert one.stop() is None
    assert one.run(one.client.execute_command("BLPOP", KEY, 0.2)) is None, "its patience, too"


def test_a_pop_that_failed_unnoticed_is_forgotten_in_silence(one: Any, admin: redis.Redis) -> None:
    listen(one, admin)
    (ours,) = [entry["id"] for entry in admin.client_list() if "b" in entry["flags"]]
    admin.client_kill_filter(_id=ours)
    one.run(asyncio.sleep(0.01) if isinstance(one, OnLoop) else None)
    one.renew()
    gc.collect()


@pytest.mark.parametrize("finish", ["wait", "stop"])
def test_a_cancelled_wait_loses_nothing(finish: str, plain: tuple[Any, redis.Redis]) -> None:
    url, admin = plain
    one = OnLoop(url)

    async def main() -> None:
        before = pops(admin)
        for number in range(10):
            waiting = asyncio.create_task(one.listener.wait(LONG_S))
            await until_blocked(admin)
            if number % 2:
                admin.rpush(KEY, number)  # the loop has not read it when it cancels
            waiting.cancel()
            await asyncio.wait({waiting})
            assert waiting.cancelled()
            if number % 2:
                assert await (one.listener.wait(LONG_S) if finish == "wait" else one.listener.stop()) == number
        assert pops(admin) - before == 5

    one.run(main())
    one.close()


def test_a_cancelled_stop_loses_nothing(plain: tuple[Any, redis.Redis]) -> None:
    url, admin = plain
    one = OnLoop(url)

    async def main() -> None:
        for steps in range(12):
            while blocked(admin) == 0:
                await one.listener.wait(0.001)
            admin.rpush(KEY, steps)
            stopping = asyncio.create_task(one.listener.stop())
            for _ in range(steps):
                await asyncio.sleep(0)
            stopping.cancel()
            await asyncio.wait({stopping})
            got = await one.listener.stop() if stopping.cancelled() else stopping.result()
            assert got == steps

    one.run(main())
    one.close()


def test_event_loops_in_two_threads(plain: tuple[Any, redis.Redis]) -> None:
    url, admin = plain
    got: list[int | None] = []
    started: list[AsyncListener] = []

    async def main() -> None:
        client = _factory(url, TIMEOUT_S)(redis.asyncio)
        listener = AsyncListener(client, KEY)
        started.append(listener)
        got.append(await listener.wait(LONG_S))
        got.append(await listener.wait(LONG_S))  # ended by a nudge
        assert await listener.stop() is None
        await client.aclose()

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: blocked(admin) == 2)
    admin.rpush(KEY, 1, 2)
    until(lambda: len(got) == 2)
    for listener in started:
        listener.nudge()
    for thread in threads:
        thread.join()
    assert sorted(got[:2]) == [1, 2]
    assert got[2:] == [None, None]
    for listener in started:
        listener.nudge()  # their loops are closed
        listener.drop()


@pytest.mark.parametrize("end", ["stop", "drop", "nothing"])
def test_a_loop_that_ends_meanwhile_is_not_disturbed(end: str, plain: tuple[Any, redis.Redis], caplog: Any) -> None:
    url, admin = plain
    got: list[int | None] = []
    clients = PerLoop(lambda: _factory(url, TIMEOUT_S)(redis.asyncio), _aclose)

    async def lead(listener: AsyncListener) -> None:
        try:
            await listener.wait(LONG_S)
        finally:
            if end == "stop":
                admin.rpush(KEY, 8)
                got.append(await listener.stop())
            elif end == "drop":
                listener.drop()

    async def main() -> asyncio.Task[None]:
        leading = asyncio.create_task(lead(AsyncListener(clients.get(), KEY)))
        await until_blocked(admin)
        return leading

    leading = asyncio.run(main())
    assert leading.cancelled()
    assert got == ([8] if end == "stop" else [])
    del leading
    gc.collect()
    assert not caplog.records
    until(lambda: blocked(admin) == 0)


@pytest.mark.parametrize("end", ["stop", "drop", "nothing"])
def test_a_loop_can_end_at_any_step_of_connecting_and_sending(end: str, plain: tuple[Any, redis.Redis]) -> None:
    """Before Python 3.12 wait_for, in which redis-py sends, swallows a cancellation that comes in the wrong moment."""
    if end == "nothing" and sys.version_info < (3, 11):
        pytest.skip("a task cannot know that it was cancelled; and whoever waits stops or drops")

    async def lead(listener: AsyncListener) -> None:
        try:
            await listener.wait(LONG_S)
        finally:
            if end == "stop":
                assert await listener.stop() is None
            elif end == "drop":
                listener.drop()

    clients = PerLoop(lambda: _factory(plain[0], TIMEOUT_S)(redis.asyncio), _aclose)

    async def main(steps: int) -> None:
        leading = asyncio.create_task(lead(AsyncListener(clients.get(), KEY)))
        for _ in range(steps):
            await asyncio.sleep(0)
        assert not leading.done()

    for steps in range(40):
        ending = threading.Thread(target=lambda steps=steps: asyncio.run(main(steps)), daemon=True)
        ending.start()
        ending.join(LONG_S)
        assert not ending.is_alive(), steps
    until(lambda: blocked(plain[1]) == 0)


class Pusher(threading.Thread):
    """Pushes a wake in each round, at a time of its own."""

    def __init__(self, admin: redis.Redis) -> None:
        super().__init__()
        self.admin, self.rounds = admin, threading.Semaphore(0)

    def run(self) -> None:
        for number in range(ROUNDS):
            assert self.rounds.acquire(timeout=LONG_S)
            self.admin.rpush(KEY, number)


ROUNDS = 300


def test_stopping_while_others_push_loses_no_wake(one: Any, admin: redis.Redis) -> None:
    pusher = Pusher(admin)
    pusher.start()
    got = 0
    for number in range(ROUNDS):
        pusher.rounds.release()
        for wake in (one.wait(number % 5 / 5000), one.stop()):
            got += wake is not None
        assert not one.listener.broken
    pusher.join()
    assert got + admin.llen(KEY) == ROUNDS
    until(lambda: blocked(admin) == 0)


def test_cancelling_while_others_push_loses_no_wake(plain: tuple[Any, redis.Redis]) -> None:
    url, admin = plain
    one = OnLoop(url)
    pusher = Pusher(admin)

    async def main() -> int:
        got = 0
        for number in range(ROUNDS):
            pusher.rounds.release()
            waiting = asyncio.create_task(one.listener.wait(LONG_S))
            await asyncio.sleep(number % 5 / 5000)
            waiting.cancel()
            await asyncio.wait({waiting})
            got += not waiting.cancelled() and waiting.result() is not None
            if number % 7 == 0:
                got += await one.listener.stop() is not None
        return got + (await one.listener.stop() is not None)

    pusher.start()
    got = one.run(main())
    pusher.join()
    assert got + admin.llen(KEY) == ROUNDS
    one.close()
