"""The body of an answer that is streamed: its lease ends with it.

It ends when it was read to its end, or to the `[DONE]` behind which openai does not read; or it breaks off; or it is
closed or dropped before. That may be the garbage collector's doing, in any thread and inside any lock: then the lease
is only queued to be settled, and the connection to be closed by the next request. (Below a body there are generators
of httpcore's, which would do I/O and take locks if they were collected: `Wire.held` keeps them from that.)
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from time import monotonic
from typing import Any
from weakref import ref

from stable_openai._flow import Outcome, Raised, Returned
from stable_openai._lease import Lease
from stable_openai._usage import Tail, last_error, tokens_used
from stable_openai._wire import http

__all__ = ["AsyncBody", "Body", "StreamError"]

DRAIN_S = 0.1  # as long as openai's async client takes for it


class StreamError(Exception):
    """An error event in a stream, as the flow judges it: like the exception that openai makes of it."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.body = error
        super().__init__(str(error.get("message", "")))


class Closed(BaseException):
    """A stream that was closed before its end: that says nothing of the key, and no user's function is asked."""


def _in_a_finaliser() -> bool:
    """Whether a generator is being closed: by whoever has it, or by the garbage collector."""
    return isinstance(sys.exc_info()[1], GeneratorExit)


class _Streamed:
    """The body of an answer, whichever the colour: what has come of it, and how it ended."""

    _begun: Callable[[Any], Any]

    def __init__(self, response: Any, wire: Any) -> None:
        self._stream = response.stream
        self._tail = Tail(response.headers.get("content-encoding", "").lower())
        # Of a connection that carries nothing else.
        is_own = response.extensions.get("http_version") != b"HTTP/2"
        self._connection = response.extensions.get("network_stream") if is_own else None
        self._chunks = self._begun(self._stream)
        self._held, self._dropped = wire.streams()
        self._held[self._stream] = (self._chunks, ref(self))
        self._owner = os.getpid()
        self._ahead: list[bytes] = []
        self._error: BaseException | None = None
        self._complete = self._closed = False
        self._lease: Lease | None = None
        self._end: Callable[[Outcome], Any] | None = None
        self._drop: Callable[[], None] | None = None

    def deliver(self, lease: Lease, end: Callable[[Outcome], Any], drop: Callable[[], None]) -> None:
        """The user is given the body from now on: it ends, with an outcome, or is not read to its end. `drop` does no
        I/O: it may be the garbage collector that closes the body."""
        self._lease, self._end, self._drop = lease, end, drop

    def ahead(self) -> bytes:
        """What has come so far."""
        return self._tail.text()

    def _came(self, chunk: bytes) -> bytes:
        self._tail.add(chunk)
        return chunk

    def _ended(self, quietly: bool = False) -> Any:
        """Say how it ended, once. What that gives is awaited by async bodies. `quietly`: without I/O."""
        end, drop, self._end, self._drop = self._end, self._drop, None, None
        self._stream = self._chunks = None  # they hold the request that was sent, with its secret
        if end is None or drop is None or self._lease is None:
            return None
        text = self._tail.text()
        self._lease.used(tokens_used(text))
        if quietly or _in_a_finaliser():
            return drop()
        event = last_error(text)
        if self._error is not None:
            return end(Raised(self._error))
        if event is not None:
            return end(Raised(StreamError(event)))
        if self._complete or self._tail.is_done():
            return end(Returned(None))
        return end(Raised(Closed()))

    def lose(self) -> None:
        """Nobody will read on: it was dropped, or its loop has ended."""
        if not self._closed and self._owner == os.getpid():
            self._closed = True
            self._let_go()
            self._ended(quietly=True)

    __del__ = lose

    def _let_go(self) -> None:
        """Leave the connection to the next request, which closes it."""
        self._dropped.append(self._stream)
        if self._connection is not None and not self._complete:
            with suppress(Exception):  # best effort: so that the upstream knows now. It never blocks.
                self._connection.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


class Body(_Streamed, http.SyncByteStream):
    _begun = staticmethod(iter)

    def look_ahead(self) -> None:
        """Read the first chunk. Raises what breaks the stream before it."""
        self._ahead += [self._came(chunk) for chunk in itertools.islice(self._chunks, 1)]

    def __iter__(self) -> Iterator[bytes]:
        while self._ahead:
            yield self._ahead.pop()
        try:
            for chunk in self._chunks:
                yield self._came(chunk)
            self._complete = True
        except GeneratorExit:
            raise
        except BaseException as error:
            self._error = error
            raise

    def close(self) -> None:
        if self._closed or self._owner != os.getpid():
            return
        self._closed = True
        try:
            if _in_a_finaliser():
                self._let_go()
                return
            if self._tail.is_done() and not self._complete:
                self._drain()
            self._held.pop(self._stream, None)
            self._stream.close()
        finally:
            self._ended()

    def _drain(self) -> None:
        """Read what follows `[DONE]`, if it comes soon: a connection is used again only if its response was read to
        its end, and the client stops before that."""
        connection, until = self._connection, monotonic() + DRAIN_S
        if connection is None:
            return
        read = connection.read
        with suppress(Exception):  # then the connection is closed
            connection.read = lambda size, timeout=None: read(size, timeout=max(0.001, until - monotonic()))
            try:
                for _ in self._chunks:
                    if monotonic() > until:
                        break
            finally:
                del connection.read


class AsyncBody(_Streamed, http.AsyncByteStream):
    _begun = staticmethod(aiter)

    async def look_ahead(self) -> None:
        """Read the first chunk. Raises what breaks the stream before it."""
        try:
            self._ahead.append(self._came(await anext(self._chunks)))
        except StopAsyncIteration:
            self._complete = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._ahead:
            yield self._ahead.pop()
        try:
            async for chunk in self._chunks:
                yield self._came(chunk)
            self._complete = True
        except GeneratorExit:
            raise
        except BaseException as error:
            self._error = error
            raise

    async def aclose(self) -> None:
        if self._closed or self._owner != os.getpid():
            return
        self._closed = True
        try:
            self._held.pop(self._stream, None)
            await self._stream.aclose()
        finally:
            ended = self._ended()
            if ended is not None:
                await ended
