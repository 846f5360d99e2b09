"""openai clients for the `client` parameter: copies bound to a key, on one connection pool a process or loop.

A client made anew costs a TLS context; a copy of one shares it (the README has the figures). The clients are made
when they are first used, and anew in a forked child; those of loops that are closed are forgotten. They do not retry
by themselves, since the broker would not see those attempts; closing a copy closes nothing.
"""

from __future__ import annotations

import os
from typing import Any

from stable_openai._keys import Key

__all__ = ["client_for"]

_bases: dict[Any, tuple[Any, Any]] = {}


def client_for(key: Key, is_async: bool) -> Any:
    """An `openai.OpenAI` (or AsyncOpenAI) that uses this key."""
    base = _async_base() if is_async else _base()
    options: dict[str, Any] = {"api_key": key.secret.reveal()}
    if key.base_url:
        options["base_url"] = key.base_url
    return base.with_options(**options)


def _base() -> Any:
    known = _bases.get("sync")
    if known is None:
        import openai

        class Shared(openai.OpenAI):
            def close(self) -> None:
                """The connection pool is shared."""

        known = _bases["sync"] = (None, Shared(api_key="none", max_retries=0))
    return known[1]


def _async_base() -> Any:
    import asyncio

    import openai

    class Shared(openai.AsyncOpenAI):
        async def close(self) -> None:
            """The connection pool is shared."""

    loop = asyncio.get_running_loop()
    known = _bases.get(id(loop))
    if known is None or known[0] is not loop:
        for stale in [name for name, pair in _bases.items() if pair[0] is not None and pair[0].is_closed()]:
            del _bases[stale]
        known = _bases[id(loop)] = (loop, Shared(api_key="none", max_retries=0))
    return known[1]


os.register_at_fork(after_in_child=_bases.clear)
