"""The broker in Redis (or Valkey): each operation is one Lua script, run in one step by the server.

Redis' retries and timeouts are never inherited: every verb is idempotent by its lease ids, so a command whose reply
was lost is simply sent again, for at most half of a lease's ttl (the ids of a lease would be collected after that).
Scripts are sent as EVALSHA; a server that does not know one is sent EVAL, which needs no right to use SCRIPT and
makes the server keep it, after a flush, a restart or a failover too.

A Sentinel's client would stay on a primary that was demoted but lives, which grants beside the new one until it hears
of that (ten seconds, where an operator has asked for the failover): so it looks for the primary once a second.

A cluster answers TRYAGAIN to whatever names several keys of a slot that is just moving, and CLUSTERDOWN while it
promotes a replica; a server that was demoted answers READONLY. All of that passes: it is tried again like a lost
reply, and after READONLY on another connection, which may lead to the new primary. (Before Redis 7 a script wraps that
error in another.)
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.cluster
import redis.sentinel
from redis.backoff import NoBackoff

from stable_openai._loops import PerLoop
from stable_openai._ops import Inspect, Register, Registration, Renew, decode, encode
from stable_openai.backends.listener import AsyncListener, Listener
from stable_openai.errors import BrokerUnavailable, ConfigurationError

__all__ = ["RedisBackend", "script"]

CONTACTS, OLD = (Register, Inspect), "OLD"  # what comes first to a server, and what their scripts say
TIMEOUT_S, HASTY_S = 2.0, 0.3
CONNECTIONS = 64
_inherited: list[Any] = []
LISTENERS = 32
LOOK_S = 1.0
CLUSTER_SETTINGS = ("username", "password", "client_name", "protocol", "credential_provider", "socket_timeout")
SAY_NO = ("ssl_cert_reqs", "ssl_check_hostname")
PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.4)
NO_SCRIPT = redis.exceptions.NoScriptError
PASSING = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.exceptions.RedisClusterException,  # no RedisError: no node of it answers
    redis.exceptions.ClusterError,  # CLUSTERDOWN, and too many redirections
    redis.exceptions.TryAgainError,
    redis.exceptions.ReadOnlyError,
    AttributeError,  # what redis-py raises where the connection was closed meanwhile, as its cluster's client does
)
FAILURES = (redis.RedisError, *PASSING)


@cache
def script(verb: str) -> tuple[str, str]:
    """The text of a verb with all that it uses, and its SHA-1. The scripts lie beside the installed package, or
    in the checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = next((place for place in (package / "lua", package.parent / "lua") if place.is_dir()), None)
    if folder is None:
        raise BrokerUnavailable("the Lua scripts are missing from the installation; install stable_openai again")
    body = (folder / f"{verb}.lua").read_text()
    uses = re.search(r"^-- USES (.+)$", body, re.MULTILINE)
    parts = ["prelude", *(uses.group(1).split(", ") if uses else ())]
    text = "\n".join([*((folder / f"{part}.lua").read_text() for part in parts), body])
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class RedisBackend:
    """Runs the broker's operations on a Redis server.

    Args:
        where: a URL, or a redis-py client: plain, one that a Sentinel made, or a RedisCluster.
        ttl_s: a lease's ttl in seconds; a command is repeated for at most half of it.
        hasty: whether to wait for a reply for 0.3 s, and not for 2 s.
        attempts: how often an operation is tried at most; 0: as long as there is patience.
        now: tests hand in the time, in ms since 1970; otherwise the server's clock decides.

    A URL or a plain client is only read for its settings: the connections are the backend's own, one pool for
    threads and one for each event loop.
    """

    local = False
    kind = "redis"

    def __init__(
        self,
        where: Any,
        *,
        ttl_s: float = 60.0,
        hasty: bool = False,
        attempts: int = 0,
        now: Callable[[], int] | None = None,
    ) -> None:
        self._make = _factory(where, HASTY_S if hasty else TIMEOUT_S)
        self._patience_s, self._attempts = ttl_s / 2, attempts
        self._now: Callable[[], str] = (lambda: str(now())) if now else str
        self._mutex = threading.Lock()
        self._client: Any = None
        self._clients = PerLoop(lambda: self._make(redis.asyncio), _aclose)
        self._listeners: WeakSet[Listener | AsyncListener] = WeakSet()  # each holds one of the connections

    def run(self, op: Any, attempts: int = 0) -> Any:
        """The reply to an operation. Raises BrokerUnavailable when Redis cannot be reached in time, or (0: for as long
        as there is patience) with so many attempts."""
        client = self._client or self._connect()
        verb, keys, args = encode(op, self._now())
        text, sha = script(verb)
        started = time.monotonic()
        for pause in self._pauses(op, attempts, started):
            if pause:
                time.sleep(pause)
            try:
                try:
                    reply = client.execute_command("EVALSHA", sha, len(keys), *keys, *args)
                except NO_SCRIPT:
                    reply = client.execute_command("EVAL", text, len(keys), *keys, *args)
            except FAILURES as error:
                problem = error
                if not isinstance(error, PASSING):
                    break
            else:
                return decode(op, reply)
        if type(op) in CONTACTS and _says_old(problem):
            self._refuse_if_old(problem)
        raise unavailable(problem) from cause_of(problem)

    async def arun(self, op: Any, attempts: int = 0) -> Any:
        """The same on the running event loop."""
        client = self._clients.get()
        verb, keys, args = encode(op, self._now())
        text, sha = script(verb)
        started = time.monotonic()
        for pause in self._pauses(op, attempts, started):
            if pause:
                await asyncio.sleep(pause)
            try:
                try:
                    reply = await client.execute_command("EVALSHA", sha, len(keys), *keys, *args)
                except NO_SCRIPT:
                    reply = await client.execute_command("EVAL", text, len(keys), *keys, *args)
            except FAILURES as error:
                problem = error
                if not isinstance(error, PASSING):
                    break
            else:
                return decode(op, reply)
        if type(op) in CONTACTS and _says_old(problem):
            await asyncio.to_thread(self._refuse_if_old, problem)
        raise unavailable(problem) from cause_of(problem)

    def listen(self, to: Registration) -> Listener | None:
        """What wakes a thread that waits for leases of a class; None where Redis cannot be reached now, or enough
        connections listen already (then those who wait look at the time that they were told)."""
        if len(self._listeners) >= LISTENERS:
            return None
        try:
            listener = Listener(self._client or self._connect(), to.keys[5])
        except BrokerUnavailable:
            return None
        self._listeners.add(listener)
        return listener

    def alisten(self, to: Registration) -> AsyncListener | None:
        """The same for the running event loop."""
        if len(self._listeners) >= LISTENERS:
            return None
        listener = AsyncListener(self._clients.get(), to.keys[5])
        self._listeners.add(listener)
        return listener

    def _pauses(self, op: Any, attempts: int, started: float) -> Iterator[float]:
        # The heartbeat renews again soon, and others wait for it.
        for pause in PAUSES_S[: attempts or self._attempts or None] if type(op) is not Renew else PAUSES_S[:1]:
            if time.monotonic() + pause - started < self._patience_s:
                yield pause

    def _connect(self) -> Any:
        with self._mutex:
            if self._client is None:
                try:
                    self._client = self._make(redis)
                except redis.exceptions.RedisClusterException as error:  # only a cluster's client connects when made
                    problem = error
                else:
                    return self._client
                raise unavailable(problem) from cause_of(problem)
            return self._client

    def _refuse_if_old(self, problem: Exception) -> None:
        """Raise ConfigurationError, with the server's version if it says that: no wait makes it younger."""
        version = ""
        with suppress(Exception):
            client = self._make(redis)
            pool = client.connection_pool  # RESP2 is all that a server before Redis 6 speaks
            known = {name: value for name, value in pool.connection_kwargs.items() if not name.startswith("maint_")}
            pool.connection_kwargs = {**known, "protocol": 2}
            with client:
                version = str(client.info("server")["redis_version"])
        if str(problem) == OLD or version[:2] in ("2.", "3.", "4.", "5."):  # a proxy may know no greeting, either
            raise ConfigurationError(
                "redis", f"the server is {version or 'too old'}; the oldest Redis that works is 6.2"
            )

    def close(self) -> None:
        """Close the connections of threads."""
        with self._mutex:
            client, self._client = self._client, None
        if client is not None:
            for one in (client, *_sentinels_of(client)):
                one.close()

    async def aclose(self) -> None:
        """Close those of the running event loop, and of threads."""
        await self._clients.aclose()
        self.close()

    def after_fork(self) -> None:
        """In a child: sockets of the parent's are dropped, unused. Those of its event loops are kept: their end would
        take them out of the parent's selector."""
        self._mutex = threading.Lock()
        self._client = None
        _inherited.append(self._clients)
        self._clients = PerLoop(self._clients._make, self._clients._close)
        self._listeners = WeakSet()


async def _aclose(client: Any) -> None:
    for one in (client, *_sentinels_of(client)):
        await one.aclose()


def _sentinels_of(client: Any) -> list[Any]:
    """The clients by which a Sentinel's client finds its primary."""
    manager = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    return [] if manager is None else list(manager.sentinels)


def is_passing(error: BaseException | None) -> bool:
    """Whether what redis-py raised says that Redis is away, or about to come back; not that we may not use it."""
    lasting = (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError)  # which are ConnectionErrors
    return isinstance(error, PASSING) and not isinstance(error, lasting)


def unavailable(error: Exception) -> BrokerUnavailable:
    """What went wrong, without redis-py's own words (a URL may hold a password); a server's words say what it lacks."""
    said = f": {str(error).partition(', with args')[0]:.200}" if isinstance(error, redis.ResponseError) else ""
    return BrokerUnavailable(f"Redis does not serve the broker ({type(error).__name__}{said})")


def cause_of(error: Exception) -> Exception | None:
    """The error, to be raised from; not where it repeats the command (a greeting holds the password)."""
    link: BaseException | None = error
    while link is not None and "with args" not in str(link):
        link = link.__cause__ or link.__context__
    return error if link is None else None


def _says_old(problem: Exception) -> bool:
    """Whether a script found the server to be too old; or maybe that it does not know redis-py's greeting."""
    said = str(problem)
    return isinstance(problem, redis.ResponseError) and (said == OLD or ("unknown command" in said and "HELLO" in said))


def _factory(where: Any, timeout_s: float) -> Callable[[Any], Any]:
    """How to make a client of our own: a function that takes the namespace, `redis` or `redis.asyncio`."""
    if isinstance(where, str):
        try:
            parsed = redis.ConnectionPool.from_url(where)
            parsed.make_connection()  # not connected: it only says whether the settings are known
            return _to_server(parsed, timeout_s)
        except (ValueError, TypeError, LookupError, AttributeError, redis.RedisError):
            raise ConfigurationError("redis", "cannot be parsed; write it as 'redis://host:6379/0'") from None
    nodes = getattr(where, "nodes_manager", None)
    if nodes is not None:
        return _to_cluster(nodes, timeout_s)
    pool = getattr(where, "connection_pool", None)
    if pool is None:
        raise ConfigurationError("redis", "must be a URL or a redis-py client")
    return (_to_sentinel if hasattr(pool, "sentinel_manager") else _to_server)(pool, timeout_s)


def _own(settings: dict[str, Any], namespace: Any, timeout_s: float) -> dict[str, Any]:
    """A user's settings with our own retries, and a timeout that is not longer than ours."""
    dropped = ("retry", "retry_on_error", "retry_on_timeout", "connection_pool", "event_dispatcher", "himport_registry")
    kept = {  # (redis.asyncio does not know all of TLS' settings, not even unset)
        name: value
        for name, value in settings.items()
        if name not in dropped and (value or not name.startswith("ssl_") or name in SAY_NO)
    }
    for name in ("socket_timeout", "socket_connect_timeout"):
        kept[name] = min(kept.get(name) or timeout_s, timeout_s)
    retry = (redis.retry.Retry if namespace is redis else redis.asyncio.retry.Retry)(NoBackoff(), 0)
    retry.update_supported_errors([redis.exceptions.ReadOnlyError])  # which is to end the connection, too
    # (What is no UTF-8 is to be told as a reply that is none of ours, not as an error of a codec's.)
    return {**kept, "decode_responses": True, "encoding": "utf-8", "encoding_errors": "replace", "retry": retry}


def _to_server(pool: Any, timeout_s: float) -> Callable[[Any], Any]:
    def make(namespace: Any) -> Any:
        made = namespace.BlockingConnectionPool(
            connection_class=getattr(namespace.connection, pool.connection_class.__name__),
            max_connections=CONNECTIONS,
            timeout=TIMEOUT_S,
            **_own(pool.connection_kwargs, namespace, timeout_s),
        )
        return namespace.Redis.from_pool(made)

    return make


def _to_sentinel(pool: Any, timeout_s: float) -> Callable[[Any], Any]:
    manager = pool.sentinel_manager
    addresses = [sentinel.connection_pool.connection_kwargs for sentinel in manager.sentinels]
    ssl = issubclass(pool.connection_class, (redis.SSLConnection, redis.asyncio.SSLConnection))

    def make(namespace: Any) -> Any:
        kinds: Any = (_Sentinel, _Pool) if namespace is redis else (_AsyncSentinel, _AsyncPool)
        sentinel = kinds[0](
            [(address["host"], address["port"]) for address in addresses],
            min_other_sentinels=manager.min_other_sentinels,
            force_master_ip=manager._force_master_ip,
            sentinel_kwargs=_own(manager.sentinel_kwargs, namespace, timeout_s),
        )
        settings = _own(pool.connection_kwargs, namespace, timeout_s)
        return sentinel.master_for(pool.service_name, connection_pool_class=kinds[1], ssl=ssl, **settings)

    return make


class _Sentinel(redis.sentinel.Sentinel):
    """Asks for one at a time: redis-py moves the sentinel that answers to the front of its list by a swap, and two that
    swap at once may leave one twice in the list and another not at all."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)  # type: ignore[no-untyped-call]
        self._mutex = threading.Lock()

    def discover_master(self, name: str) -> Any:
        with self._mutex:
            return super().discover_master(name)  # type: ignore[no-untyped-call]


class _AsyncSentinel(redis.asyncio.sentinel.Sentinel):
    """The same on an event loop."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)  # type: ignore[no-untyped-call]
        self._mutex = asyncio.Lock()

    async def discover_master(self, name: str) -> Any:
        async with self._mutex:
            return await super().discover_master(name)


class _Pool(redis.sentinel.SentinelConnectionPool):
    """Looks for the primary once a second: where that is another one, idle connections are closed."""

    _look_at = 0.0

    def get_connection(self, *args: Any, **options: Any) -> Any:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            with suppress(redis.RedisError):  # no sentinel knows one now
                self.get_master_address()  # type: ignore[no-untyped-call]
        return super().get_connection(*args, **options)


class _AsyncPool(redis.asyncio.sentinel.SentinelConnectionPool):
    """The same on an event loop."""

    _look_at = 0.0

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            with suppress(redis.RedisError):
                await self.get_master_address()  # type: ignore[no-untyped-call]
        return await super().get_connection(*args, **options)  # type: ignore[no-untyped-call]

    async def release(self, connection: Any) -> None:
        if self.master_address != (connection.host, connection.port):  # as the pool of threads does by itself
            await connection.disconnect()
        await super().release(connection)


def _to_cluster(nodes: Any, timeout_s: float) -> Callable[[Any], Any]:
    kind = nodes.connection_kwargs.get("connection_class") or redis.Connection  # a rediss:// URL says TLS by that

    def make(namespace: Any) -> Any:
        known = [namespace.cluster.ClusterNode(node.host, node.port) for node in nodes.startup_nodes.values()]
        settings = {
            name: value
            for name, value in nodes.connection_kwargs.items()
            if name in CLUSTER_SETTINGS or name.startswith("ssl")
        }
        settings["ssl"] = settings.get("ssl") or issubclass(kind, (redis.SSLConnection, redis.asyncio.SSLConnection))
        own = _own(settings, namespace, timeout_s)
        # No steps: of the slots that have moved only a pool's matters, and others' connections are not to be closed.
        return namespace.cluster.RedisCluster(startup_nodes=known, reinitialize_steps=0, **own)

    return make
