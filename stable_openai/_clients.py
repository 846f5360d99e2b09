"""openai clients for the `client` parameter: copies bound to a key, on one connection pool a process or loop.

A client made anew costs a TLS context; a copy of one shares it (the README has the figures). The clients are made
when they are first used, and anew in a forked child; those of loops that are closed are forgotten. They do not retry
by themselves, since the broker would not see those attempts; closing a copy closes nothing.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from stable_openai._keys import Key

__all__ = ["client_for", "shared_client"]

_bases: dict[Any, tuple[Any, Any]] = {}
_mutex = threading.Lock()


def client_for(key: Key, is_async: bool) -> Any:
    """An `openai.OpenAI` (or AsyncOpenAI) that uses this key."""
    options: dict[str, Any] = {"api_key": key.secret.reveal()}
    if key.base_url:
        options["base_url"] = key.base_url
    return shared_client(is_async).with_options(**options)


def shared_client(is_async: bool) -> Any:
    """The client of this process, or of the running event loop, whose connections all copies share."""
    loop = None
    if is_async:
        import asyncio

        loop = asyncio.get_running_loop()
    known = _bases.get(id(loop))
    if known is None or known[0] is not loop:
        with _mutex:
            known = _bases.get(id(loop))
            if known is None or known[0] is not loop:
                for stale in [name for name, (of, _) in _bases.items() if of is not None and of.is_closed()]:
                    del _bases[stale]
                known = _bases[id(loop)] = (loop, _make(is_async))
    return known[1]


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
    return made


def _after_fork_in_child() -> None:
    global _mutex
    _mutex = threading.Lock()
    _bases.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
