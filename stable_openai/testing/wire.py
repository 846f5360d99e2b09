"""HTTP/1.1 on one connection: h11 between an asyncio transport and a handler of requests.

A request is announced by `arrived` as soon as its last byte is read, in the order of reading, before anything
else is done; then a task answers it. `left` is called when that task has ended, however it did, and also at
once where the client gives up first: so it may be called twice.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import h11

logger = logging.getLogger("stable_openai.testing")


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request; the names of headers are lower case, the query is as sent."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    connection: int


V = TypeVar("V")


class Handler(Protocol[V]):
    """What answers requests; V is whatever it wants to remember of one."""

    def connected(self, connection: Connection[V]) -> int:
        """A connection was opened: its number."""

    def disconnected(self, connection: Connection[V]) -> None:
        """It was closed."""

    def arrived(self, request: Request) -> V:
        """A whole request was read."""

    async def answer(self, visit: V, connection: Connection[V]) -> None:
        """Send the answer to `connection`."""

    def left(self, visit: V) -> None:
        """The request is over, answered or not."""


class Connection(asyncio.Protocol, Generic[V]):
    """One client's connection: reads requests, one at a time, and sends what the handler answers."""

    def __init__(self, handler: Handler[V]) -> None:
        self._handler = handler
        self._http = h11.Connection(h11.SERVER)
        self._head: h11.Request | None = None
        self._body = bytearray()
        self._visit: V | None = None
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport
        self._number: int

    def send(self, *events: h11.Event) -> None:
        """Send several events in one write."""
        self._transport.write(b"".join(self._http.send(event) or b"" for event in events))

    def close(self) -> None:
        """Close once everything that was sent has gone out."""
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    # called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._number = self._handler.connected(self)

    def data_received(self, data: bytes) -> None:
        self._http.receive_data(data)
        self._read()

    def eof_received(self) -> None:
        self._give_up()

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_up()
        self._handler.disconnected(self)

    # one request after the other

    def _read(self) -> None:
        while self._task is None:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError:
                self.abort()
                return
            if isinstance(event, h11.Request):
                self._head = event
                self._body = bytearray()
            elif isinstance(event, h11.Data):
                self._body += event.data
            elif isinstance(event, h11.EndOfMessage):
                self._begin()
            else:  # more bytes are needed
                return

    def _begin(self) -> None:
        assert self._head is not None
        path, _, query = self._head.target.decode().partition("?")
        self._visit = visit = self._handler.arrived(
            Request(
                method=self._head.method.decode(),
                path=path,
                query=query,
                headers={name.decode(): value.decode("latin-1") for name, value in self._head.headers},
                body=bytes(self._body),
                connection=self._number,
            )
        )
        self._task = asyncio.get_running_loop().create_task(self._handler.answer(visit, self))
        self._task.add_done_callback(partial(self._end, visit))

    def _end(self, visit: V, task: asyncio.Task[None]) -> None:
        self._task = None
        self._handler.left(visit)
        if task.cancelled():
            self.abort()
        elif error := task.exception():
            logger.error("the fake could not answer", exc_info=error)
            self.abort()
        elif self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            self._read()
        else:
            self.close()

    def _give_up(self) -> None:
        if self._task is not None and self._visit is not None:
            self._handler.left(self._visit)
            self._task.cancel()
