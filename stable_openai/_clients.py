"""openai clients for the `client` parameter: copies bound to a key, on one connection pool a process or loop.

A client made anew costs a TLS context; a copy of one shares it (the README has the figures). The clients are made
when they are first used, and anew in a forked child; that of a loop is closed with the loop. They do not retry
by themselves, since the broker would not see those attempts; closing a copy closes nothing.
"""

from __future__ import annotations

import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

from stable_openai._keys import Key

if TYPE_CHECKING:
    from stable_openai._loops import PerLoop

__all__ = ["client_for", "shared_client"]

CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ""}}

_mutex = threading.Lock()
_of_process: list[Any] = []
_of_loops: list[PerLoop] = []


def client_for(key: Key, is_async: bool) -> Any:
    """An `openai.OpenAI` (or AsyncOpenAI) that uses this key."""
    options: dict[str, Any] = {"api_key": key.secret.reveal()}
    if key.base_url:
        options["base_url"] = key.base_url
    return shared_client(is_async).with_options(**options)


def shared_client(is_async: bool) -> Any:
    """The client of this process, or of the running event loop, whose connections all copies share."""
    if is_async:
        if not _of_loops:
            from stable_openai._loops import PerLoop

            _of_loops.append(PerLoop(lambda: _make(True), lambda client: client._client.aclose()))
        return _of_loops[0].get()
    if not _of_process:
        with _mutex:
            if not _of_process:
                _of_process.append(_make(False))
    return _of_process[0]


def _make(is_async: bool) -> Any:
    import openai

    class Shared(openai.OpenAI):
        def close(self) -> None:
            """The connection pool is shared."""

    class AsyncShared(openai.AsyncOpenAI):
        async def close(self) -> None:
            """The connection pool is shared."""

    made = (AsyncShared if is_async else Shared)(api_key="none", max_retries=0)
    _ = made.chat.completions, made.responses, made.embeddings  # imported on first use, which takes a while
    _warm_up()
    return made


def _warm_up() -> None:
    """Have openai build the models of a first request and its answer now (0.3 s), for a lease that waits meanwhile is
    sent later than its limits allow."""
    import openai

    httpx = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])  # or httpx2
    answer = {"id": "", "object": "chat.completion", "created": 0, "model": "", "choices": [CHOICE]}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer))
    with openai.OpenAI(api_key="none", http_client=httpx.Client(transport=transport)) as client:
        client.chat.completions.create(model="", messages=[{"role": "user", "content": ""}])


def _after_fork_in_child() -> None:
    global _mutex
    _mutex = threading.Lock()
    _of_process.clear()
    _of_loops.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
