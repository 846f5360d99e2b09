"""`FakeOpenAI`: the fake upstream on a port of this process, served by an event loop in its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import NamedTuple

from .failures import Failure
from .service import Service
from .settings import Settings
from .upstream import Upstream
from .visits import Entry, Order, entries_over
from .wire import Connection

BACKLOG = 4096


class Connections(NamedTuple):
    """Connections open now, and opened ever."""

    open: int
    total: int


class FakeOpenAI(Settings):
    """An OpenAI API that keeps its limits exactly and remembers every request.

        with FakeOpenAI(keys={"sk-a": "org-1"}, limits=Limit(rpm=60)) as fake:
            client = openai.OpenAI(api_key="sk-a", base_url=fake.url, max_retries=0)
            ...
        assert not fake.over

    The arguments are those of `Settings`. Usable from any thread; the methods that wait (`wait_for`) block,
    so call them from coroutines with `asyncio.to_thread`. Raises OSError if the port cannot be had.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._upstream = Upstream(self)
        self._server: _Server | None = None

    def __enter__(self) -> FakeOpenAI:
        self._server = _Server(self, self._upstream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.stop()

    @property
    def url(self) -> str:
        """The base URL, for `base_url=` or OPENAI_BASE_URL."""
        return f"http://{self.host}:{self._running.port}/v1"

    @property
    def log(self) -> list[Entry]:
        """All requests that are over, in the order in which they ended. A copy."""
        with self._upstream.changed:
            return self._upstream.log.copy()

    @property
    def over(self) -> list[Entry]:
        """The requests that were refused because a limit was exceeded; no injected ones."""
        return entries_over(self.log)

    @property
    def in_flight(self) -> int:
        """Requests with a known key that have arrived and are not over."""
        with self._upstream.changed:
            return self._upstream.in_flight.total()

    @property
    def max_in_flight(self) -> Mapping[str, int]:
        """The most requests in flight at a time, by account, refused ones included; 0 for one never seen."""
        with self._upstream.changed:
            return self._upstream.max_in_flight.copy()

    @property
    def connections(self) -> Connections:
        """Connections open now, and opened ever; those to the endpoints under /_fake/ included."""
        with self._upstream.changed:
            return Connections(self._upstream.open_connections, self._upstream.total_connections)

    def fail(
        self,
        failure: Failure,
        *,
        key: str | None = None,
        account: str | None = None,
        model: str | None = None,
        path: str | None = None,
        times: int | None = 1,
    ) -> None:
        """Let the next `times` requests (None: all from now on) that the limits admit fail.

        Only those of a key, account, model (a pattern) or path ("/chat/completions", with or without /v1;
        "/files/{id}" for any file), where given. Of several failures that match a request the first injected is taken.
        """
        self._upstream.order(Order(failure, key, account, model, path, times))

    def spend(self, account: str, model: str, requests: int = 0, tokens: int = 0) -> None:
        """Let somebody else use an account: charge its meters for `model` as if requests had come and been admitted.

        Of what does not fit only as much as does: they would have been refused. Nothing is logged. Raises ValueError
        for an account that no key has, or a negative number.
        """
        self._upstream.spend(account, model, requests, tokens)

    def clear(self) -> None:
        """Forget injected failures, the log and `max_in_flight`. The meters keep what was used."""
        self._upstream.clear()

    def wait_for(self, predicate: Callable[[FakeOpenAI], object], timeout: float = 10.0) -> None:
        """Return as soon as `predicate(fake)` is true; it is looked at whenever something changes.

        Raises TimeoutError after `timeout` seconds.
        """
        with self._upstream.changed:
            if not self._upstream.changed.wait_for(lambda: predicate(self), timeout):
                raise TimeoutError(f"not true within {timeout} s")

    def hold(self) -> AbstractContextManager[None]:
        """Answer nothing until `release`, or until the end of the `with` block if used as a context manager.

        Requests arrive, are judged and charged meanwhile; refusals are held too.
        """
        self._running.hold()
        return self._until_released()

    def release(self) -> None:
        """Answer what is held, hanging or stalled."""
        self._running.release()

    @contextmanager
    def _until_released(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.release()

    @property
    def _running(self) -> _Server:
        if self._server is None:
            raise RuntimeError("the fake was not started: use it as a context manager")
        return self._server


class _Server:
    """The thread, its event loop and the listening socket."""

    def __init__(self, settings: Settings, upstream: Upstream) -> None:
        self.port = settings.port
        self._host = settings.host
        self._service = Service(settings, upstream)
        self._stopping = asyncio.Event()
        self._started = threading.Event()
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="fake-openai", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error

    def stop(self) -> None:
        """Close the port and all connections; returns when the thread has ended. May be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def hold(self) -> None:
        # What is scheduled from here runs before the loop reads any request that is sent later.
        self._loop.call_soon_threadsafe(self._service.hold)

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self._service.release)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            server = await self._loop.create_server(
                lambda: Connection(self._service), self._host, self.port, backlog=BACKLOG
            )
            self.port = server.sockets[0].getsockname()[1]
        except Exception as error:  # raised again by the thread that starts the server
            self._error = error
            return
        finally:
            self._started.set()
        await self._stopping.wait()
        server.close()
        await self._service.close()
