"""The openai clients of the `client` parameter: copies bound to a lease, on one connection pool a process or loop.

A client made anew costs a TLS context; a copy of one shares it (the README has the figures). They are made when they
are first used; their connections are a process's, or a loop's, own (`_transport.Wire`). Closing a copy closes nothing.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_openai._flow import Policy
    from stable_openai._lease import Lease
    from stable_openai.manager import KeyManager

__all__ = ["client_for", "prepare", "shared_client"]

CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ""}}


def client_for(manager: KeyManager, lease: Lease, is_async: bool, policy: Policy | None = None) -> Any:
    """An `openai.OpenAI` (or AsyncOpenAI) whose first request uses a lease; it leases for each further one."""
    return shared_client(is_async).bound(manager, lease, policy)


def prepare(is_async: bool) -> None:
    """Have the shared client, and its connections of this process or loop."""
    shared_client(is_async)._client._transport.open()


def shared_client(is_async: bool) -> Any:
    """The client whose connections all copies share. Made once: it takes a second."""
    return _made.get(is_async) or _make(is_async)


_made: dict[bool, Any] = {}
_mutex = threading.RLock()


def _make(is_async: bool) -> Any:
    from stable_openai.client import AsyncOpenAI, OpenAI

    class Shared(OpenAI):
        def close(self) -> None:
            """The connection pool is shared."""

    class AsyncShared(AsyncOpenAI):
        async def close(self) -> None:
            """The connection pool is shared."""

    Shared.__name__, AsyncShared.__name__ = "OpenAI", "AsyncOpenAI"  # as they tell the upstream
    with _mutex:
        if is_async not in _made:
            made: Any = AsyncShared() if is_async else Shared()
            _ = made.chat.completions, made.responses, made.embeddings  # imported on first use, which takes a while
            _warm_up()
            _made[is_async] = made
        return _made[is_async]


@cache
def _warm_up() -> None:
    """Have openai build the models of a first request and its answer now (0.3 s), for a lease that waits meanwhile is
    sent later than its limits allow."""
    import openai

    from stable_openai._wire import http

    answer = {"id": "", "object": "chat.completion", "created": 0, "model": "", "choices": [CHOICE]}
    transport = http.MockTransport(lambda request: http.Response(200, json=answer))
    nowhere = "http://nothing-is-sent.invalid"  # httpx logs it
    with openai.OpenAI(api_key="none", base_url=nowhere, http_client=http.Client(transport=transport)) as client:
        client.chat.completions.create(model="", messages=[{"role": "user", "content": ""}])


def _after_fork_in_child() -> None:
    global _mutex
    _mutex = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)
