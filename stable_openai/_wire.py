"""What really sends the requests of the openai clients: connections of this process, or of the running loop.

Nothing in openai or httpx knows of forks, and an async client does not survive its loop: so connections are made when
they are first used, anew in a forked child and for each loop.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import getproxies

import openai

from stable_openai._loops import PerLoop

__all__ = ["AsyncWire", "Wire", "http"]


def _library(kind: type) -> Any:
    """The HTTP library that a class of clients is built on: httpx, or httpx2 (which openai 3 uses); else None."""
    roots = (base.__module__.partition(".")[0] for base in kind.__mro__)
    root = next((root for root in roots if root in ("httpx", "httpx2")), None)
    return root and importlib.import_module(root)


if TYPE_CHECKING:
    import httpx2 as http
else:
    http = _library(openai.DefaultHttpxClient)

REDIRECTS = (301, 302, 303, 307, 308)
HOPS = "stable_openai.hops"
_inherited: list[Any] = []
_mutex = threading.Lock()


class _Lines(NamedTuple):
    """The connections of a process, or of an event loop.

    held: the streams that are open, each with what reads it and a reference to its body: so that none is finalised
        where its body is dropped.
    dropped: those whose body was dropped, to be closed.
    """

    send: Callable[[Any], Any]
    close: Callable[[], Any]
    held: dict[Any, Any]
    dropped: deque[Any]

    def streams(self) -> tuple[dict[Any, Any], deque[Any]]:
        return self.held, self.dropped


class Wire:
    """What sends for sync clients: connections of this process, made when they are first used.

    Args:
        client: the user's own httpx client, which then sends.
    """

    def __init__(self, client: Any = None) -> None:
        self._client = client
        self.http: Any = _http_of(client, "Client")
        self._lines: dict[int, _Lines] = {}  # of this process, by its id

    def _mine(self) -> _Lines:
        return self._lines.get(os.getpid()) or self._begin()

    def open(self) -> None:
        """Have what sends: making it takes a while, in which no lease should wait to be used."""
        self._mine()

    def streams(self) -> tuple[dict[Any, Any], deque[Any]]:
        return self._mine().streams()

    def send(self, request: Any, follow: bool = False) -> Any:
        """Send a request. `follow`: redirects on the same host, with the same secret."""
        send, _, held, dropped = self._mine()
        while dropped:
            with suppress(Exception):  # another thread may have been first
                stream = dropped.popleft()
                held.pop(stream, None)
                stream.close()
        response = send(request)
        while follow and (onwards := _onwards(request, response, self.http)) is not None:
            response.read()
            request, response = onwards, send(onwards)
        return response

    def _begin(self) -> _Lines:
        """On first use, and in a forked child, where the parent's sockets are dropped, unused; its open streams are
        kept, for their end would take locks that other threads of the parent may have held."""
        with _mutex:  # threads that come at once make one
            return self._lines.get(os.getpid()) or self._make()

    def _make(self) -> _Lines:
        client = self._client
        if client is None and _has_proxies():
            client = openai.DefaultHttpxClient()
        if client is not None:
            made = _Lines(partial(client.send, stream=True, follow_redirects=False), client.close, {}, deque())
        else:
            transport = http.HTTPTransport(limits=openai.DEFAULT_CONNECTION_LIMITS)
            made = _Lines(transport.handle_request, transport.close, {}, deque())
        for owner, lines in tuple(self._lines.items()):
            if owner != os.getpid():
                _inherited.append(lines.held)
                self._lines.pop(owner, None)
        self._lines[os.getpid()] = made
        return made

    def close(self) -> None:
        lines = self._lines.get(os.getpid())
        if self._client is not None:
            self._client.close()
        elif lines is not None:
            lines.close()


class AsyncWire:
    """That of async clients: connections of the running loop, which are closed with it."""

    def __init__(self, client: Any = None) -> None:
        self._client = client
        self.http: Any = _http_of(client, "AsyncClient")
        self._lines = PerLoop(self._make, self._end)

    def _mine(self) -> _Lines:
        lines: _Lines = self._lines.get()
        return lines

    def open(self) -> None:
        """As Wire.open."""
        self._mine()

    def streams(self) -> tuple[dict[Any, Any], deque[Any]]:
        return self._mine().streams()

    async def send(self, request: Any, follow: bool = False) -> Any:
        send, _, held, dropped = self._mine()
        while dropped:
            with suppress(Exception):
                stream = dropped.popleft()
                held.pop(stream, None)
                await stream.aclose()
        response = await send(request)
        while follow and (onwards := _onwards(request, response, self.http)) is not None:
            await response.aread()
            request, response = onwards, await send(onwards)
        return response

    def _make(self) -> _Lines:
        client = self._client
        if client is None and _has_proxies():
            client = openai.DefaultAsyncHttpxClient()
        if client is not None:
            close = _nothing if client is self._client else client.aclose
            send = partial(client.send, stream=True, follow_redirects=False)
            return _Lines(send, close, {}, deque())
        transport = http.AsyncHTTPTransport(limits=openai.DEFAULT_CONNECTION_LIMITS)
        return _Lines(transport.handle_async_request, transport.aclose, {}, deque())

    @staticmethod
    async def _end(lines: _Lines) -> None:
        for _, body in tuple(lines.held.values()):
            if (open := body()) is not None:
                open.lose()
        await lines.close()

    async def aclose(self) -> None:
        await self._lines.aclose()
        if self._client is not None:
            await self._client.aclose()


def _http_of(client: Any, kind: str) -> Any:
    """The library of the user's own client, else openai's. Raises TypeError where it is a client of another kind."""
    found = http if client is None else _library(type(client))
    if client is not None and not (found and isinstance(client, getattr(found, kind))):
        raise TypeError(
            f"Invalid `http_client` argument; Expected an instance of `{http.__name__}.{kind}` but got {type(client)}"
        )
    return found


def _onwards(request: Any, response: Any, http: Any) -> Any:
    """The request to which a redirect on the same host leads, as httpx makes it; None where there is none. What leads
    to another host is the client's to follow, without a secret."""
    status, method = response.status_code, request.method
    if status not in REDIRECTS or "location" not in response.headers or "transfer-encoding" in request.headers:
        return None
    hops = request.extensions.get(HOPS, 0)
    try:
        url = request.url.join(response.headers["location"])
    except Exception:  # it is no URL
        return None
    if (url.scheme, url.host, url.port) != (request.url.scheme, request.url.host, request.url.port) or hops >= 20:
        return None
    extensions = {**request.extensions, HOPS: hops + 1}
    if method == "HEAD" or status >= 307 or (status == 301 and method != "POST"):
        return http.Request(method, url, headers=request.headers, stream=request.stream, extensions=extensions)
    headers = [row for row in request.headers.raw if row[0].lower() not in (b"content-length", b"content-type")]
    return http.Request("GET", url, headers=headers, extensions=extensions)


async def _nothing() -> None:
    """The user's own client does not end with a loop, nor with this package's client."""


def _has_proxies() -> bool:
    """Whether the environment names proxies, which httpx then mounts."""
    return any(name in getproxies() for name in ("http", "https", "all"))


def _after_fork_in_child() -> None:
    global _mutex
    _mutex = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
