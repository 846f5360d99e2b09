"""Waits for a wake: an element that another worker, on any host, pushes onto a list in Redis.

A listener keeps one blocking pop (`BLPOP key 0`) outstanding on a connection of its own, across many waits: a wait
that ends because its time is over, because of a nudge or because its task was cancelled leaves the pop where it is,
and costs no command. Only a wake that was popped has the next wait send another.

**No wake is lost.** Bytes are taken from the connection only as a whole reply, and a reply is handed to whoever waits
or stops next. To end the pop, `stop` sends CLIENT UNBLOCK on another connection of the same node and then reads the
pop's reply: nil, or the wake that came just then. The server may read CLIENT UNBLOCK before the pop itself (they
travel on two connections) and answers 0 then: it is sent again until the pop has its reply. Where CLIENT UNBLOCK is
refused (it stands in the ACL categories @admin and @dangerous) the connection's sending half is closed instead, and
what was on its way is read to the end: best effort, for the server may pop for a client that it is about to drop. A
server that is silent then is not waited for.

**Threads** have no reader of their own: the one who waits watches the connection and one end of a socket pair, into
whose other end `nudge` writes. It reads only once bytes are there, and then with little patience, since they may be a
push message of RESP3 or a part of the reply; redis-py keeps those for the next read. Nothing stays buffered above the
socket unnoticed, in TLS or in the parser: a read goes on until it has the reply or has drained both.

**Event loops** have one task for each pop, from connecting to its reply, which waits come and go beside: to cancel a
wait cancels no command half sent. A loop's runner cancels that task when it ends; the pop is then read on by another.

A connection that fails, and any error reply (MOVED, READONLY, no right to BLPOP), breaks the listener for good. So
does a wait that begins after the list has gone elsewhere, by what the client has learned meanwhile: a host that has
vanished ends no pop. In a cluster a listener begins with a plain command, which redis-py has follow the list.

After a fork the child forgets its listeners: what is collected there closes descriptors and sends nothing.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
import time
from contextlib import suppress
from typing import Any

import redis

__all__ = ["AsyncListener", "Listener"]

TIMEOUT_S = 2.0  # for a reply that must come
GLANCE_S = 0.05  # for one that may
PAUSES_S = (0.005, 0.02, 0.1, 0.5)  # before CLIENT UNBLOCK, which overtook the pop, is sent again
LONGEST_S = 3600.0  # that a selector is asked to wait at once

# Not epoll: it says nothing of a connection that another thread closes, and a fork would share it.
_Selector: Any = getattr(selectors, "PollSelector", selectors.SelectSelector)


def _hops(reply: Any) -> int | None:
    """What BLPOP answers is [key, element], or nil for a client that was unblocked. No number: for nobody else."""
    if reply is None:
        return None
    hops = str(reply[1])
    return int(hops) if hops.isdecimal() and len(hops) < 10 else 0


class Listener:
    """Listens for threads. One thread at a time uses it; any may nudge.

    Args:
        client: the backend's own client: its pool lends the connection.
        key: the list.
    """

    def __init__(self, client: Any, key: str) -> None:
        self.broken = self.refused = False  # refused: by an error reply, so no wake can have been lost
        self._client, self._key = client, key
        self._server: Any = None  # the client of the node that holds the list
        self._connection: Any = None
        self._socket: Any = None
        self._id: int | None = None
        self._popping = False
        self._bell = socket.socketpair()
        for end in self._bell:
            end.setblocking(False)

    def wait(self, seconds: float) -> int | None:
        """The wake that was popped; None after a nudge or `seconds`, and at once when broken."""
        deadline = time.monotonic() + seconds
        try:
            if self._connection is not None and not _holds(self._client, self._connection, self._key):
                self._leave(clean=False)
            while not self.broken:
                self._begin()
                left = deadline - time.monotonic()
                ready = self._ready(left, self._socket, self._bell[0])
                if self._bell[0] in ready:
                    with suppress(BlockingIOError):
                        while self._bell[0].recv(4096):
                            pass
                    return None
                if self._socket in ready:
                    with suppress(redis.TimeoutError):
                        return self._read(GLANCE_S)
                if left <= 0:
                    return None
        except Exception as error:  # redis-py raises AttributeError too, where another thread closes the client
            self.refused = isinstance(error, redis.ResponseError)
            self._leave(clean=False)
        return None

    def nudge(self) -> None:
        """Have the current wait, or else the next, return None."""
        with suppress(OSError):  # full of earlier nudges
            self._bell[1].send(b"\0")

    def stop(self) -> int | None:
        """End the pop, and give the connection back. Returns a wake that came meanwhile."""
        wake = None
        try:
            if self._popping:
                wake = self._end()
        except Exception:
            self.broken = True
        self._leave(clean=not self.broken)
        return wake

    def drop(self) -> None:
        """Close the connection as it is. Its place in the pool is lost: for those who are done with the pool."""
        connection, self._connection, self._popping = self._connection, None, False
        if connection is not None:
            with suppress(Exception):
                connection.disconnect()  # which only closes the descriptor in a forked child

    def __del__(self) -> None:
        self.drop()
        for end in self._bell:  # no earlier: a thread may be inside nudge() while another one stops
            end.close()

    def _begin(self) -> None:
        if self._connection is None:
            self._server = _node(self._client, self._key)
            self._connection = self._server.connection_pool.get_connection()
            self._socket = self._connection._sock
            self._id = self._ask_id()
        if not self._popping:
            self._popping = True
            self._connection.send_command("BLPOP", self._key, 0, check_health=False)

    def _ask_id(self) -> int | None:
        self._connection.send_command("CLIENT", "ID", check_health=False)
        with suppress(redis.ResponseError):
            return int(self._connection.read_response())
        return None

    def _ready(self, seconds: float, *sockets: Any) -> list[Any]:
        with _Selector() as selector:
            for one in sockets:
                selector.register(one, selectors.EVENT_READ)
            return [key.fileobj for key, _ in selector.select(min(max(seconds, 0.0), LONGEST_S))]

    def _read(self, patience_s: float) -> int | None:
        # The socket's own timeout: redis-py's argument does not hold for what follows a push.
        self._socket.settimeout(patience_s)
        reply = self._connection.read_response(disconnect_on_error=False)
        self._popping = False
        return _hops(reply)

    def _end(self) -> int | None:
        for pause in PAUSES_S:
            if not self._ready(0.0, self._socket) and self._unblock():
                break
            with suppress(redis.TimeoutError):
                return self._read(pause)
        return self._read(TIMEOUT_S)

    def _unblock(self) -> bool:
        try:
            return bool(self._server.execute_command("CLIENT UNBLOCK", self._id))
        except redis.ResponseError:
            self.broken = True
            self._socket.shutdown(socket.SHUT_WR)
            return True

    def _leave(self, clean: bool) -> None:
        connection, self._connection, self._popping = self._connection, None, False
        self.broken = not clean
        if connection is not None:
            with suppress(Exception):
                if clean:
                    self._socket.settimeout(connection.socket_timeout)
                else:
                    connection.disconnect()
            with suppress(Exception):
                self._server.connection_pool.release(connection)


class AsyncListener:
    """The same on the running event loop."""

    def __init__(self, client: Any, key: str) -> None:
        self.broken = self.refused = False
        self._client, self._key = client, key
        self._loop = asyncio.get_running_loop()
        self._bell = self._loop.create_future()
        self._server: Any = None
        self._connection: Any = None
        self._id: int | None = None
        self._sent = self._stopping = False
        self._popping: asyncio.Task[int | None] | None = None

    async def wait(self, seconds: float) -> int | None:
        """See Listener.wait. When it is cancelled, the next wait or stop returns what it would have."""
        if self._connection is not None and not _holds(self._client, self._connection, self._key):
            if self._popping is not None:
                self._popping.cancel()
            await self._leave(clean=False)
        if self.broken:
            return None
        popping = self._begin()
        await asyncio.wait({popping, self._bell}, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if self._bell.done():
            self._bell = self._loop.create_future()
            return None
        if not popping.done() or popping.cancelled():
            return None
        if popping.exception() is not None:
            self.refused = isinstance(popping.exception(), redis.ResponseError)
            await self._leave(clean=False)
            return None
        self._popping = None
        return popping.result()

    def nudge(self) -> None:
        """See Listener.nudge."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ring)

    async def stop(self) -> int | None:
        """See Listener.stop. When it is cancelled, it can be called again."""
        self._stopping = True
        popping = self._popping
        if popping is not None and not popping.done() and not self._sent:
            await asyncio.wait({popping}, timeout=TIMEOUT_S)  # it is still connecting, and then sends no pop
        if self._sent:
            with suppress(Exception):
                await self._end()
        popping = self._popping
        if popping is not None and not popping.done():
            popping.cancel()  # the server is silent (a connection that is being made may swallow this)
            await asyncio.wait({popping}, timeout=0.1)
        finished = popping is None or popping.done()
        await self._leave(clean=finished and not self.broken and not self._sent)
        self._stopping = False
        self._popping = None
        return (
            popping.result() if popping and finished and not popping.cancelled() and not popping.exception() else None
        )

    def drop(self) -> None:
        """See Listener.drop. It is closed when the loop runs next, so never in a forked child."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._close)

    def _ring(self) -> None:
        if not self._bell.done():
            self._bell.set_result(None)

    def _begin(self) -> asyncio.Task[int | None]:
        if self._popping is None or self._popping.cancelled():
            self._popping = self._loop.create_task(self._pop())
            self._popping.add_done_callback(lambda task: task.cancelled() or task.exception())  # no log if nobody asks
        return self._popping

    async def _pop(self) -> int | None:
        if self._connection is None:
            self._server, self._connection, self._id = await _take(self._client, self._key)
        if not self._sent:
            _heed_cancellation()
            if self._stopping:
                return None
            self._sent = True
            await self._connection.send_command("BLPOP", self._key, 0, check_health=False)
            _heed_cancellation()
        reply = await self._connection.read_response(timeout=float("inf"), disconnect_on_error=False)
        self._sent = False
        return _hops(reply)

    async def _end(self) -> None:
        for pause in PAUSES_S:  # _begin(): the loop's runner may be cancelling the task right now
            if self._begin().done() or await self._unblock():
                break
            await asyncio.wait({self._begin()}, timeout=pause)
        await asyncio.wait({self._begin()}, timeout=TIMEOUT_S)

    async def _unblock(self) -> bool:
        try:
            return bool(await self._server.execute_command("CLIENT UNBLOCK", self._id))
        except redis.ResponseError:
            self.broken = True
            self._connection._writer.write_eof()
            return True

    async def _leave(self, clean: bool) -> None:
        connection, self._connection, self._sent = self._connection, None, False
        self.broken = not clean
        if connection is not None:
            with suppress(Exception):
                await _give(self._server, connection, clean)

    def _close(self) -> None:
        connection, self._connection, self._sent = self._connection, None, False
        self._stopping = True
        if self._popping is not None:
            self._popping.cancel()
        if connection is not None:
            connection._close()


def _heed_cancellation() -> None:
    """Raise what wait_for, in which redis-py sends, may swallow before Python 3.12: a runner waits until it ends."""
    if getattr(asyncio.current_task(), "cancelling", int)():  # which Python 3.10 lacks
        raise asyncio.CancelledError


def _node(client: Any, key: str) -> Any:
    """The client of the server that holds a key: one of a cluster's, or the client itself."""
    if not hasattr(client, "nodes_manager"):
        return client
    client.execute_command("LLEN", key)
    return client.get_redis_connection(client.get_node_from_key(key))


def _holds(client: Any, connection: Any, key: str) -> bool:
    """Whether the server that a connection leads to holds a key, as far as the client knows by now."""
    if hasattr(client, "nodes_manager"):
        node = client.get_node_from_key(key)
        return bool((node.host, node.port) == (connection.host, connection.port))
    primary = getattr(client.connection_pool, "master_address", None)  # which only a Sentinel's pool has
    return primary is None or bool(primary == (connection.host, connection.port))


async def _take(client: Any, key: str) -> tuple[Any, Any, int | None]:
    """What has the connections of the server that holds a key, one of them, and its id.

    The nodes of an asyncio cluster lend connections themselves, unconnected, and have no client.
    """
    if hasattr(client, "nodes_manager"):
        await client.execute_command("LLEN", key)
        server = client.get_node_from_key(key)
        connection = server.acquire_connection()
    else:
        server = client
        connection = await client.connection_pool.get_connection()
    try:
        await connection.connect()
        await connection.send_command("CLIENT", "ID", check_health=False)
        with suppress(redis.ResponseError):
            return server, connection, int(await connection.read_response())
    except BaseException:
        await _give(server, connection, clean=False)
        raise
    return server, connection, None


async def _give(server: Any, connection: Any, clean: bool) -> None:
    if not clean:
        await connection.disconnect(nowait=True)
    if hasattr(server, "connection_pool"):
        await server.connection_pool.release(connection)
    else:
        server.release(connection)
