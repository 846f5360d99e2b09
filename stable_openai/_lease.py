"""The lease that a user holds: by hand (`with manager.lease()`), or as a function's `lease` argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import RLock
from time import monotonic
from types import TracebackType
from typing import Any, NoReturn

from stable_openai._drive import adrive, drive
from stable_openai._flow import Outcome, Raised, Returned, Sleep, verdict_of, verdict_on
from stable_openai._flow import outcome_of as _outcome_of
from stable_openai._keys import Key
from stable_openai._limits import MOST
from stable_openai._obtain import obtain
from stable_openai._ops import Granted
from stable_openai._verdict import Verdict, redact, verdict_of_response
from stable_openai._waiter import Request
from stable_openai._worker import Report, Worker
from stable_openai.errors import ConfigurationError

__all__ = ["Lease"]


class Lease:
    """The right to make one attempt with one key.

    As a context manager (`with` or `async with`) it waits for a key, holds it, renewed, for as long as the body runs,
    and is settled at the end: an exception from the body says what is wrong with the key, and passes on. For other
    SDKs, `report()` says what happened.

    Where a function is given a `client` too, the first request of that uses the lease, and what comes of it is reported
    by itself. Where a second one begins, which leases for itself, the first being over, this lease is settled: what is
    reported later is too late.

    >>> from stable_openai import KeyManager
    >>> manager = KeyManager(["sk-doc"], pool="doc-lease")
    >>> with manager.lease(model="gpt-4o") as lease:
    ...     lease.report(tokens=42)
    >>> manager.close()
    """

    def __init__(
        self,
        worker: Worker,
        backend: Any,
        request: Request,
        granted: Granted | None = None,
        classify: Callable[[BaseException], Verdict | None] | None = None,
    ) -> None:
        self._worker = worker
        self._backend = backend
        self._request = request
        self._granted = granted
        self._classify = classify
        self._told = Report()
        self._used: list[int] = []
        # One request of a client's that is bound to the lease: whether it has begun, whether it is under way or the
        # body of its answer is still read, and what ends the lease with that. When it is over it takes none.
        self._begun = self._busy = self._over = False
        self._rest: tuple[Callable[[Outcome], Any], Callable[[], None]] | None = None
        self._mutex = RLock()

    @property
    def id(self) -> str:
        """The lease's id, as logs show it."""
        return self._held.id

    @property
    def key(self) -> Key:
        """The key; its secret is hidden."""
        return self._worker.known[self._held.key]

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self._request

    @property
    def api_key(self) -> str:
        """The secret, to be given to a client."""
        return self.key.secret.reveal()

    @property
    def wanted(self) -> tuple[str, ...]:
        """The accounts that further requests of its holder like best: its own (what was stored is known there, and what
        was cached), then those of its call."""
        return tuple(dict.fromkeys((self._held.account, *self._request.wanted)))

    @property
    def _held(self) -> Granted:
        if self._granted is None:
            raise RuntimeError("the lease is not held: use it inside `with manager.lease() as lease`")
        return self._granted

    def report(
        self,
        *,
        tokens: int | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        error: BaseException | Mapping[str, Any] | None = None,
    ) -> None:
        """Say what the attempt came to; the lease is settled with it when it ends.

        Args:
            tokens: the tokens really used, in and out.
            status: the HTTP status of the response.
            headers: its headers (names in lower case, or a mapping that ignores case): the server's wait, and what they
                say of the account's limits.
            error: an exception, or the decoded body of an error response.
        """
        if status is not None and not isinstance(status, int):
            raise ConfigurationError("status", "must be a whole number, such as 429")
        if tokens is not None:
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                raise ConfigurationError("tokens", "must be a whole number, 0 or more")
            self._used.clear()
            self._tell(tokens=min(tokens, MOST))
        if headers:
            from stable_openai._headers import seen_in  # here, so that importing the package stays quick

            seen, organization = seen_in(headers), headers.get("openai-organization") or ""
            self._tell(seen=seen or self._told.seen, organization=organization)
        if isinstance(error, BaseException):
            self._tell(verdict=verdict_of(error, self._classify))
        elif status is not None:
            # A success takes back what was reported before.
            verdict = verdict_of_response(status, headers or {}, error) if status >= 400 else None
            self._tell(verdict=verdict, error=None)

    def _tell(self, **said: Any) -> None:
        with self._mutex:  # a request may be under way in another thread
            self._told = self._told._replace(**said)

    def used(self, tokens: int | None) -> None:
        """The request of a bound client used so many tokens, beside what is reported."""
        if tokens is not None:
            self._used.append(tokens)

    def begin(self) -> bool:
        """The request of a bound client begins; `end_body` or `drop_body` says that it, or the body of its answer, has
        ended. False: there was one before, or the lease is over."""
        with self._mutex:
            if self._begun or self._over or not self._is_live():
                return False
            self._begun = self._busy = True
        return True

    def _is_live(self) -> bool:
        return self._granted is not None and self._granted.id in self._worker.live

    def end_body(self, outcome: Outcome) -> Any:
        """The request, or the body of its answer, has ended. What that gives is awaited in async code."""
        with self._mutex:
            if type(outcome) is Raised:
                self._tell(error=outcome.error)
            rest = self._close()
        return rest and rest[0](outcome)

    def drop_body(self) -> None:
        """The body was not read to its end: what follows does no I/O."""
        with self._mutex:
            rest = self._close()
        if rest:
            rest[1]()

    def _close(self) -> tuple[Callable[[Outcome], Any], Callable[[], None]] | None:
        rest, self._rest, self._busy = self._rest, None, False
        self._over = self._over or rest is not None
        return rest

    def is_over(self) -> bool:
        """Its holder has returned: whether nothing is under way. If so, nothing begins any more."""
        with self._mutex:
            self._over = not self._busy
        return self._over

    def outlive(self, end: Callable[[Outcome], Any], drop: Callable[[], None]) -> Any:
        """Its holder has returned, and a body is still read: call one of these when it ends."""
        with self._mutex:
            if not self.is_over():
                self._rest = (end, drop)
                return None
        return end(Returned(None))

    def make_way(self, end: Callable[[Outcome], Any]) -> Any:
        """A further request begins, which leases for itself, while the holder goes on: this lease ends (`finish` or
        `afinish`) as soon as its own request has, since both may need the one slot that there is."""
        with self._mutex:
            if not self._begun or not self._is_live():
                return None
            if self._busy:
                self._rest = self._rest or (end, self._forsake)
                return None
        return end(Returned(None))

    def finish(self, outcome: Outcome) -> None:
        """Settle it before its holder does, to whom it then makes no difference."""
        drive(self._end(None), self._worker, self._backend)

    async def afinish(self, outcome: Outcome) -> None:
        """The same, on an event loop."""
        await adrive(self._end(None), self._worker, self._backend)

    def _forsake(self) -> None:
        self._worker.abandon(self._request, self._held, "neutral", self.reported())

    def unproven(self) -> None:
        """Nothing was sent by whoever holds the lease, so its end proves nothing of the key."""
        self._tell(verdict=Verdict("neutral", "raise"))

    def reported(self) -> Report:
        """What was reported, and what the request used beside that. A failure is told once: it holds the frames of
        whoever has caught it."""
        with self._mutex:
            told, self._told, used = self._told, self._told._replace(error=None), sum(self._used)
        return told._replace(tokens=(told.tokens or 0) + used) if self._used else told

    def _open(self, loop: Any) -> Any:
        if self._granted is not None:
            raise RuntimeError("the lease is held already: make one for each use")
        self._told = Report()
        began = monotonic()
        request = self._request
        _, found, _ = yield from obtain(self._worker, request, loop, began, began + request.max_wait)
        granted: Any = found  # with no account excluded there is always one
        if loop is not None:
            try:
                yield Sleep(0)  # here a cancellation arrives that came with the lease
            except BaseException:
                yield from self._worker.settle(request, granted, "unsent")
                raise
        self._granted = granted

    def _end(self, error: BaseException | None) -> Any:
        lease = self._held
        if isinstance(error, GeneratorExit):  # maybe from the garbage collector: no I/O
            self._forsake()
            return
        told, mistake = self.reported(), None
        verdict: Verdict | None
        try:
            verdict = verdict_on(lease, told, error, self._classify)
        except Exception as raised:  # in the user's classify: the lease must not stay open for it
            mistake, verdict = raised, Verdict("neutral", "raise")
            redact(mistake)
        redact(error)
        advice = yield from self._worker.settle(self._request, lease, *_outcome_of(verdict), told)
        if verdict is not None:
            self._worker.note(lease, verdict, advice)
        if mistake is not None:
            raise mistake from error

    def __enter__(self) -> Lease:
        drive(self._open(None), self._worker, self._backend)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        drive(self._end(error), self._worker, self._backend)

    async def __aenter__(self) -> Lease:
        from asyncio import get_running_loop

        await adrive(self._open(get_running_loop()), self._worker, self._backend)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await adrive(self._end(error), self._worker, self._backend)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a lease is not pickled: it belongs to this process, and holds a secret")
