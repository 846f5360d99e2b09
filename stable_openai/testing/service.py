"""Sends what the upstream decided: pauses, failures, the bytes of an answer. Runs in the server's loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import h11

from . import admin
from .answers import Answer
from .failures import Failure
from .packing import accepts_gzip, gzipped
from .settings import Settings
from .upstream import Upstream
from .visits import Visit
from .wire import Connection, Request


class Call(NamedTuple):
    """A request with what became of it; `visit` is None for the fake's own endpoints."""

    request: Request
    visit: Visit | None
    released: asyncio.Event


class Service:
    """Answers the requests of all connections (see wire.Handler)."""

    def __init__(self, settings: Settings, upstream: Upstream) -> None:
        self._settings = settings
        self._upstream = upstream
        self._connections: set[Connection[Call]] = set()
        self._answering = asyncio.Event()
        self._answering.set()
        self._released = asyncio.Event()

    def hold(self) -> None:
        """Answer nothing until `release`."""
        self._answering.clear()

    def release(self) -> None:
        """Let go of the requests, arrived until now, that are held, hanging or stalled."""
        self._answering.set()
        self._released.set()
        self._released = asyncio.Event()

    async def close(self) -> None:
        """Abort all connections and wait until they have gone."""
        while self._connections:
            for connection in self._connections:
                connection.abort()
            await asyncio.sleep(0)

    def connected(self, connection: Connection[Call]) -> int:
        """A connection was opened: its number."""
        self._connections.add(connection)
        return self._upstream.connections(1)

    def disconnected(self, connection: Connection[Call]) -> None:
        """It was closed."""
        self._connections.discard(connection)
        self._upstream.connections(-1)

    def arrived(self, request: Request) -> Call:
        """Judge a request."""
        own = request.path.startswith(admin.PREFIX)
        return Call(request, None if own else self._upstream.arrive(request), self._released)

    def left(self, call: Call) -> None:
        """End a request, unless it was ended by its answer."""
        if call.visit is not None:
            self._upstream.leave(call.visit)

    async def answer(self, call: Call, connection: Connection[Call]) -> None:
        """Send what a request deserves, or the failure that was injected."""
        visit = call.visit
        if visit is None:
            answer = admin.answer(self._upstream, call.request)
            connection.send(_response(answer), *_data(answer.parts), h11.EndOfMessage())
            return
        if visit.refused is not None and visit.refused.limit == "concurrency":
            # A client that gives up one request to start another is no offender: by now its goodbye has been
            # read too, if it had come together with the new request. Sure only for clients of this host.
            self._upstream.readmit(visit)
        await self._pause(visit, call.released)
        failure = visit.failure
        if failure.act == "close":
            self._upstream.leave(visit)
            connection.close()
            return
        answer = self._deserved(visit)
        if self._settings.gzip and accepts_gzip(call.request.headers.get("accept-encoding", "")):
            answer = gzipped(answer)
        head = self._head(answer, visit)
        if failure.act in ("cut", "stall"):
            await self._break(call, visit, connection, head, answer)
            return
        # Over before it is sent: whoever has the answer finds it in the log, and its place in flight free.
        self._upstream.leave(visit, answer.status, answer.code)
        connection.send(head, *_data(answer.parts), h11.EndOfMessage())

    # steps

    async def _pause(self, visit: Visit, released: asyncio.Event) -> None:
        if visit.refused is None:
            latency = self._settings.latency_s
            pause_s = visit.failure.seconds + (latency() if callable(latency) else latency)
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            if visit.failure.act == "hang":
                await released.wait()
        await self._answering.wait()

    def _deserved(self, visit: Visit) -> Answer:
        """The proper answer, the injected one, or the beginning of the proper one with an error event after it."""
        failure = visit.failure
        if failure.act == "answer":
            return _injected(failure)
        answer = self._upstream.answer(visit)
        if failure.act != "event":
            return answer
        if not answer.stream:
            return _injected(failure)
        error = f"event: error\ndata: {failure.body}\n\n".encode()
        return replace(answer, parts=(*_halves(answer, failure)[0], error), code=failure.code)

    async def _break(
        self, call: Call, visit: Visit, connection: Connection[Call], head: h11.Response, answer: Answer
    ) -> None:
        """Send the first half of an answer; then close, or wait and send the rest."""
        first, rest = _halves(answer, visit.failure)
        if visit.failure.act == "cut":
            self._upstream.leave(visit, answer.status)
            connection.send(head, *_data(first))
            connection.close()
            return
        connection.send(head, *_data(first))
        await call.released.wait()
        self._upstream.leave(visit, answer.status)
        connection.send(*_data(rest), h11.EndOfMessage())

    def _head(self, answer: Answer, visit: Visit) -> h11.Response:
        """The head of an answer; what only proper ones say is left out of an injected one."""
        more = [("x-request-id", visit.request_id)]
        if visit.failure.act != "answer":
            more += visit.headers
            more.append(("openai-processing-ms", str((time.time_ns() - visit.at) // 1_000_000)))
        if visit.account is not None and (organization := self._settings.organization(visit.account)):
            more.append(("openai-organization", organization))
        return _response(answer, more)


def _halves(answer: Answer, failure: Failure) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """The two halves of an answer that breaks off: see `Failure`."""
    parts, after = answer.parts, failure.after
    if answer.stream:
        middle = len(parts) // 2 if after is None else after
        return parts[:middle], parts[middle:]
    middle = 0 if after == 0 else len(parts[0]) // 2
    return (parts[0][:middle],), (parts[0][middle:],)


def _injected(failure: Failure) -> Answer:
    return Answer(failure.status, failure.headers, (failure.body.encode(),), code=failure.code)


def _response(answer: Answer, more: Iterable[tuple[str, str]] = ()) -> h11.Response:
    """The head of an answer, with more headers where it has not its own of that name."""
    own = {name for name, _ in answer.headers}
    headers = [*answer.headers, *((name, value) for name, value in more if name not in own)]
    if not answer.stream:
        headers.append(("content-length", str(len(answer.parts[0]))))
    return h11.Response(status_code=answer.status, headers=headers)


def _data(parts: Iterable[bytes]) -> list[h11.Data]:
    return [h11.Data(data=part) for part in parts]
