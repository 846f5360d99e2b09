"""Sends what the upstream decided: pauses, failures, the bytes of an answer. Runs in the server's loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import NamedTuple

import h11

from . import admin
from .answers import Answer
from .failures import Failure
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
            connection.send(_head(answer), *_data(answer.parts), h11.EndOfMessage())
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
        answer = _injected(failure) if failure.act == "answer" else self._upstream.answer(visit)
        if failure.act == "event" and len(answer.parts) == 1:
            answer = _injected(failure)
        elif failure.act in ("cut", "stall", "event"):
            await self._break(call, visit, connection, answer)
            return
        # Over before it is sent: whoever has the answer finds it in the log, and its place in flight free.
        head = _head(answer, visit)
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

    async def _break(self, call: Call, visit: Visit, connection: Connection[Call], answer: Answer) -> None:
        """Send half of the answer; then close, wait, or send an error event in place of the rest."""
        failure = visit.failure
        first, rest = _halves(answer.parts)
        if failure.act == "cut":
            head = _head(answer, visit)
            self._upstream.leave(visit, answer.status)
            connection.send(head, *_data(first))
            connection.close()
            return
        connection.send(_head(answer, visit), *_data(first))
        if failure.act == "stall":
            await call.released.wait()
        else:
            rest = (f"event: error\ndata: {failure.body}\n\n".encode(),)
        self._upstream.leave(visit, answer.status, failure.code)
        connection.send(*_data(rest), h11.EndOfMessage())


def _halves(parts: tuple[bytes, ...]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    if len(parts) == 1:
        middle = len(parts[0]) // 2
        parts = (parts[0][:middle], parts[0][middle:])
    middle = len(parts) // 2
    return parts[:middle], parts[middle:]


def _injected(failure: Failure) -> Answer:
    return Answer(failure.status, failure.headers, (failure.body.encode(),), code=failure.code)


def _head(answer: Answer, visit: Visit | None = None) -> h11.Response:
    headers = [*answer.headers]
    if visit is not None:
        headers.append(("x-request-id", visit.request_id))
    if visit is not None and visit.failure.act != "answer":
        headers += visit.headers
        headers.append(("openai-processing-ms", str((time.time_ns() - visit.at) // 1_000_000)))
        if visit.account is not None:
            headers.append(("openai-organization", visit.account))
    if len(answer.parts) == 1:
        headers.append(("content-length", str(len(answer.parts[0]))))
    return h11.Response(status_code=answer.status, headers=headers)


def _data(parts: Iterable[bytes]) -> list[h11.Data]:
    return [h11.Data(data=part) for part in parts]
