"""The lease that a user holds: by hand (`with manager.lease()`), or as a function's `lease` argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from types import TracebackType
from typing import Any, NoReturn

from stable_openai._drive import adrive, drive
from stable_openai._flow import Sleep, verdict_of
from stable_openai._flow import outcome_of as _outcome_of
from stable_openai._keys import Key
from stable_openai._obtain import obtain
from stable_openai._ops import Granted
from stable_openai._verdict import Verdict, redact, verdict_of_response
from stable_openai._waiter import Request
from stable_openai._worker import Worker
from stable_openai.errors import ConfigurationError

__all__ = ["Lease"]


class Lease:
    """The right to make one attempt with one key.

    As a context manager (`with` or `async with`) it waits for a key, holds it, renewed, for as long as the body runs,
    and is settled at the end: an exception from the body says what is wrong with the key, and passes on. For other
    SDKs, `report()` says what happened.

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
        self._tokens: int | None = None
        self._verdict: Verdict | None = None

    @property
    def id(self) -> str:
        """The lease's id, as logs show it."""
        return self._held.id

    @property
    def key(self) -> Key:
        """The key; its secret is hidden."""
        return self._worker.known[self._held.key]

    @property
    def api_key(self) -> str:
        """The secret, to be given to a client."""
        return self.key.secret.reveal()

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
            headers: its headers (names in lower case, or a mapping that ignores case), for the server's wait.
            error: an exception, or the decoded body of an error response.
        """
        if tokens is not None:
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                raise ConfigurationError("tokens", "must be a whole number, 0 or more")
            self._tokens = tokens
        if isinstance(error, BaseException):
            self._verdict = verdict_of(error, self._classify)
        elif status is not None:
            # A success takes back what was reported before.
            self._verdict = verdict_of_response(status, headers or {}, error) if status >= 400 else None

    def unproven(self) -> None:
        """Nothing was sent by whoever holds the lease, so its end proves nothing of the key."""
        self._verdict = Verdict("neutral", "raise")

    def reported(self) -> tuple[int | None, Verdict | None]:
        return self._tokens, self._verdict

    def _open(self, loop: Any) -> Any:
        if self._granted is not None:
            raise RuntimeError("the lease is held already: make one for each use")
        self._tokens = self._verdict = None
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
            self._worker.abandon(self._request, lease, "neutral", self._tokens)
            return
        mistake = None
        if error is not None:
            try:
                self._verdict = self._verdict or verdict_of(error, self._classify)
            except Exception as raised:  # in the user's classify: the lease must not stay open for it
                mistake, self._verdict = raised, Verdict("neutral", "raise")
                redact(mistake)
            redact(error)
        advice = yield from self._worker.settle(self._request, lease, *_outcome_of(self._verdict), tokens=self._tokens)
        if self._verdict is not None:
            self._worker.note(lease, self._verdict, advice)
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
