"""KeyManager: a pool of keys, as its user sees it."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from stable_openai._drive import adrive, drive
from stable_openai._heartbeat import heartbeat
from stable_openai._keys import Key, as_keys
from stable_openai._lease import Lease
from stable_openai._limits import MOST, Limits
from stable_openai._verdict import Verdict
from stable_openai._waiter import BANDS, Request, Waiting
from stable_openai._worker import NO_MODEL, Steps, Worker, runs_under_a_forking_server
from stable_openai.errors import ConfigurationError

if TYPE_CHECKING:
    from stable_openai._status import Status

__all__ = ["KeyManager", "default_manager"]

_open: list[KeyManager] = []
_made: weakref.WeakSet[KeyManager] = weakref.WeakSet()
_registry = threading.Lock()
_making = threading.Lock()
PRIORITY = 1


class KeyManager:
    """A pool of API keys, from which every attempt leases one.

    Args:
        api_keys: the keys, as strings or `Key`. Left out: the default manager where one is open, else one made from
            the environment (STABLE_OPENAI_KEYS with commas, or OPENAI_API_KEY; STABLE_OPENAI_REDIS;
            STABLE_OPENAI_POOL).
        redis: a URL or a redis-py client (plain, a Sentinel's, a cluster's): what all processes share. None: in memory.
        pool: the pool's name; managers of one pool on one Redis share its limits.
        limits: the limits of each account for each class of models.
        models: limits by class; a name or a pattern such as "gpt-4o*".
        on_redis_down: "local": go on in memory with this worker's share of the keys (once it is known; until then calls
            wait), "wait" (within max_wait) or "raise" (BrokerUnavailable at once).
        lease_ttl: seconds after which the slots of a worker that died come back.
        max_wait: how long, in seconds, a call waits for a key before it raises Exhausted.
        headroom_s: the time in which requests may overtake each other on their way to the upstream.
        on_wait: called with a `Waiting` when calls have waited for 5 s, and again after 10, 20, 40 and each further
            60 s; from the thread or event loop that waits, so it should be quick.

    Raises ConfigurationError for a setting that is wrong. Does no I/O.

    >>> manager = KeyManager(["sk-1", "sk-2"], limits=Limits(rpm=500), pool="doc")
    >>> manager.status().keys[0].state
    'ready'
    >>> manager.close()
    """

    _worker: Worker

    def __new__(cls, api_keys: Iterable[str | Key] | None = None, redis: Any = None, **options: Any) -> KeyManager:
        if cls is KeyManager and api_keys is None and redis is None and not options:
            found = find_default()
            if found is not None:
                return found
        return super().__new__(cls)

    def __init__(
        self,
        api_keys: Iterable[str | Key] | None = None,
        redis: Any = None,
        *,
        pool: str | None = None,
        limits: Limits | None = None,
        models: Mapping[str, Limits] | None = None,
        on_redis_down: Literal["local", "wait", "raise"] = "local",
        lease_ttl: float = 60.0,
        max_wait: float = 600.0,
        headroom_s: float = 0.25,
        on_wait: Callable[[Waiting], object] | None = None,
    ) -> None:
        if hasattr(self, "_worker"):  # KeyManager() found the one that is open
            return
        if api_keys is None:
            given = os.environ.get("STABLE_OPENAI_KEYS") or os.environ.get("OPENAI_API_KEY") or ""
            api_keys = [key.strip() for key in given.split(",") if key.strip()]
            redis = redis or os.environ.get("STABLE_OPENAI_REDIS") or None
            pool = pool or os.environ.get("STABLE_OPENAI_POOL")
        pool = "default" if pool is None else pool
        if not (isinstance(pool, str) and pool and all(c.isascii() and (c.isalnum() or c in "_.-") for c in pool)):
            raise ConfigurationError("pool", "must be made of letters, digits, '_', '.' and '-'")
        if on_redis_down not in ("local", "wait", "raise"):
            raise ConfigurationError("on_redis_down", "is unknown; use 'local', 'wait' or 'raise'")
        check_number("lease_ttl", lease_ttl, 1, 3600)
        check_number("max_wait", max_wait, 0, math.inf)
        check_number("headroom_s", headroom_s, 0, 10)
        if limits is not None and not isinstance(limits, Limits):
            raise ConfigurationError("limits", "must be a Limits(...)")
        if models is not None and not (
            isinstance(models, Mapping)
            and all(isinstance(name, str) and isinstance(value, Limits) for name, value in models.items())
        ):
            raise ConfigurationError("models", "must map names or patterns of models to Limits(...)")
        if on_wait is not None and not callable(on_wait):
            raise ConfigurationError("on_wait", "must be a function that takes a Waiting")
        self.pool = pool
        self.max_wait = max_wait
        self._worker = Worker(
            pool,
            as_keys(api_keys),
            limits or Limits(),
            models or {},
            ttl_s=lease_ttl,
            headroom_s=headroom_s,
            on_redis_down=on_redis_down,
        )
        self._backend: Any
        if redis is None:
            from stable_openai.backends.memory import MemoryBackend

            self._backend = MemoryBackend()
            self._backend.on_wake = self._worker.nudge
            self._worker.warn_once = runs_under_a_forking_server()
        else:
            from stable_openai.backends.redis import RedisBackend

            hasty, attempts = on_redis_down != "wait", 2 if on_redis_down == "raise" else 0
            self._backend = RedisBackend(redis, ttl_s=lease_ttl, hasty=hasty, attempts=attempts)
            self._worker.attends = True
            if on_redis_down == "local":
                from stable_openai.backends.failover import FailoverBackend

                self._backend = FailoverBackend(self._backend, self._worker)
        self._worker.run = self._do
        self._worker.on_wait = on_wait
        self._mutex = threading.Lock()
        heartbeat.serve(self._worker)
        with _registry:
            _open.append(self)
            _made.add(self)

    def __repr__(self) -> str:
        return f"KeyManager(pool={self.pool!r}, keys={len(self._worker.keys)}, backend={self._backend.kind!r})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a KeyManager is not pickled: it holds secrets; make one in each process")

    def _do(self, steps: Steps) -> Any:
        return drive(steps, self._worker, self._backend)

    async def _ado(self, steps: Steps) -> Any:
        return await adrive(steps, self._worker, self._backend)

    def request(
        self,
        model: str | None = None,
        tokens: int | None = None,
        max_wait: float | None = None,
        priority: int = PRIORITY,
        affinity: object = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Request:
        """What a call asks for, with this manager's defaults. For those who build on this package.

        Args:
            arguments: those of the call, from which tokens are estimated where limits count them and `tokens` is None.
        """
        if tokens is not None and (not isinstance(tokens, int) or tokens < 0):
            raise ConfigurationError("tokens", "must be a whole number, 0 or more")
        if priority not in range(BANDS):
            raise ConfigurationError("priority", f"must be a whole number from 0 (most urgent) to {BANDS - 1}")
        if model is None:
            self._worker.warn_of_no_model()
        model, prompt = model or NO_MODEL, -1
        to = self._worker.registration(model)
        if tokens is None and arguments is not None and self._worker.counts_tokens(model):
            from stable_openai._estimate import estimate

            estimated = estimate(arguments)
            tokens, prompt = self._worker.reserve(model, estimated), estimated.prompt
        wanted: tuple[str, ...] = ()
        if affinity is not None:
            from stable_openai._affinity import favourites

            wanted = favourites(affinity, to)
        return Request(
            model, min(tokens or 0, MOST), self.max_wait if max_wait is None else max_wait, priority, wanted, prompt
        )

    def lease(
        self,
        *,
        model: str | None = None,
        tokens: int | None = None,
        max_wait: float | None = None,
        priority: int = PRIORITY,
        affinity: object = None,
        classify: Callable[[BaseException], Verdict | None] | None = None,
    ) -> Lease:
        """A lease for a `with` or `async with` block.

        Args:
            model: the model that will be called; it decides which limits count.
            tokens: the tokens to reserve.
            max_wait: seconds to wait for a key; the manager's where it is None.
            priority: 0 (most urgent) to 3.
            affinity: a value (str, bytes, number, UUID) whose requests should go to the same account.
            classify: gives the verdict of an exception, or None to leave it to the table.

        Entering it raises Exhausted, NoKeys, RequestTooLarge or BrokerUnavailable.
        """
        if max_wait is not None:
            check_number("max_wait", max_wait, 0, math.inf)
        request = self.request(model, tokens, max_wait, priority, affinity)
        return Lease(self._worker, self._backend, request, classify=classify)

    def _status(self) -> Steps:
        from stable_openai._status import Status, key_states, line_states

        worker = self._worker
        if not worker.keys:
            return Status(self.pool, self._backend.kind, "", 0.0, ())
        seen = yield from worker.look()
        _, snapshot = seen[0]
        keys = key_states(worker, seen)
        line = line_states(worker, seen)
        return Status(self.pool, self._backend.kind, snapshot.breaker, snapshot.breaker_ms / 1000, keys, line)

    def status(self) -> Status:
        """A snapshot of the pool: each key's state, why, for how long, what is used of its limits; and who waits. It
        may be taken from a shell: this worker does not come into the pool by it, nor do its limits."""
        status: Status = self._do(self._status())
        return status

    async def astatus(self) -> Status:
        """The same, on an event loop."""
        status: Status = await self._ado(self._status())
        return status

    def check(self) -> None:
        """Make the first contact, as a first call would: the pool knows this worker's limits from then on. Raises
        BrokerUnavailable where Redis cannot be reached or does not serve the broker."""
        self._do(self._worker.check())

    async def acheck(self) -> None:
        """The same, on an event loop."""
        await self._ado(self._worker.check())

    def _find(self, key: str | Key) -> Key:
        """A key by itself, its secret, its name or its fingerprint."""
        for mine in self._worker.keys.values():
            if key in (mine, mine.name, mine.fingerprint) or (isinstance(key, str) and mine.secret.reveal() == key):
                return mine
            if isinstance(key, Key) and key.fingerprint == mine.fingerprint:
                return mine
        raise ConfigurationError("key", f"is not one of pool {self.pool!r}; give the key, its name or its fingerprint")

    def add(self, key: str | Key) -> None:
        """Hold one more key from now on, in this worker."""
        made = key if isinstance(key, Key) else Key(key)
        with self._mutex:
            self._worker.hold(as_keys([*self._worker.keys.values(), made]))
        self._worker.nudge()

    def remove(self, key: str | Key) -> None:
        """Hold a key no longer, in this worker; its live leases settle as usual."""
        gone = self._find(key)
        with self._mutex:
            self._worker.hold([mine for mine in self._worker.keys.values() if mine is not gone])
        self._worker.nudge()

    async def aadd(self, key: str | Key) -> None:
        """The same as add()."""
        self.add(key)

    async def aremove(self, key: str | Key) -> None:
        """The same as remove()."""
        self.remove(key)

    def disable(self, key: str | Key, seconds: float | None = None) -> None:
        """Take a key out of use in the whole pool, for so many seconds or until it is enabled."""
        self._do(self._disable(key, seconds))

    async def adisable(self, key: str | Key, seconds: float | None = None) -> None:
        """The same, on an event loop."""
        await self._ado(self._disable(key, seconds))

    def _disable(self, key: str | Key, seconds: float | None) -> Steps:
        if seconds is not None:
            check_number("seconds", seconds, 0, 10**9)
        ms = None if seconds is None else math.ceil(seconds * 1000)
        yield from self._worker.admin("disable", self._find(key), ms)

    def enable(self, key: str | Key) -> None:
        """Bring a key back into use in the whole pool, whatever put it out."""
        self._do(self._worker.admin("enable", self._find(key)))

    async def aenable(self, key: str | Key) -> None:
        """The same, on an event loop."""
        await self._ado(self._worker.admin("enable", self._find(key)))

    def reset(self, key: str | Key) -> None:
        """Forget all that was concluded of a key and its account, cooldowns too; what was used stays used."""
        self._do(self._worker.admin("reset", self._find(key)))

    async def areset(self, key: str | Key) -> None:
        """The same, on an event loop."""
        await self._ado(self._worker.admin("reset", self._find(key)))

    def close(self) -> None:
        """Settle what is pending and close the connections. The manager is no longer the default one."""
        self._leave()
        if not self._backend.local:
            heartbeat.rest()
        self._do(self._worker.flush())
        self._backend.close()

    async def aclose(self) -> None:
        """The same, on an event loop."""
        self._leave()
        if not self._backend.local:
            import asyncio

            await asyncio.to_thread(heartbeat.rest)
        await self._ado(self._worker.flush())
        await self._backend.aclose()

    def _leave(self) -> None:
        self._worker.attends, self._worker.attend_at = False, math.inf
        with _registry:
            if self in _open:
                _open.remove(self)

    # What the first stable-openai had.

    def get_key(self) -> str:
        """A key's secret, for one request now; waits for one. Prefer `lease()`, which sees what comes of it."""
        with self.lease() as lease:
            lease.unproven()
            return lease.api_key

    def set_ttl(self, key: str, ttl: float) -> None:
        """Do not use the key for so many seconds; 0 enables it. A key that is not held is ignored."""
        if any(mine.secret.reveal() == key for mine in self._worker.keys.values()):
            self.disable(key, ttl) if ttl > 0 else self.enable(key)

    def delete_key(self, key: str) -> None:
        """Hold the key no longer. A key that is not held is ignored."""
        if any(mine.secret.reveal() == key for mine in self._worker.keys.values()):
            self.remove(key)

    def get_min_ttl(self) -> float:
        """Seconds until the first key may be used; 0 where one may be now, or where there are none."""
        return min((math.inf if key.seconds is None else key.seconds for key in self.status().keys), default=0)


def check_number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ConfigurationError(name, f"must be a number of seconds from {least:g} to {most:g}")


def find_default() -> KeyManager | None:
    """The newest open manager of the pool "default", else the only one that is open."""
    with _registry:
        of_default = [manager for manager in _open if manager.pool == "default"]
        if of_default:
            return of_default[-1]
        return _open[0] if len(_open) == 1 else None


def default_manager() -> KeyManager:
    """The manager of a bare @stable. Raises ConfigurationError where several named pools are open."""
    manager = find_default()
    if manager is not None:
        return manager
    with _making:  # threads that come at once are given the same one
        manager = find_default()
        if manager is not None:
            return manager
        with _registry:
            names = sorted({manager.pool for manager in _open})
        if names:
            raise ConfigurationError("manager", f"several pools are open ({', '.join(names)}); say which: manager=...")
        return KeyManager()


def _after_fork_in_child() -> None:
    global _registry, _making
    _registry, _making = threading.Lock(), threading.Lock()
    for manager in tuple(_made):
        manager._mutex = threading.Lock()
        manager._worker.begin_life()
        manager._worker.warn_once = manager._backend.local
        manager._backend.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
