"""Resources that belong to an event loop: one for each loop, closed when the loop ends.

`asyncio.run` closes the async generators that were begun on its loop; so does every runner that calls
`loop.shutdown_asyncgens()`. Each resource is held by such a generator, whose end closes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

__all__ = ["PerLoop"]


class PerLoop:
    """Makes a resource on first use on a loop, and closes it with the loop."""

    def __init__(self, make: Callable[[], Any], close: Callable[[Any], Awaitable[None]]) -> None:
        self._make, self._close = make, close
        self._held: dict[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[None, None]]] = {}

    def get(self) -> Any:
        """The resource of the running loop."""
        loop = asyncio.get_running_loop()
        held = self._held.get(loop)
        if held is None:
            for closed in [other for other in tuple(self._held) if other.is_closed()]:
                self._held.pop(closed, None)
            resource = self._make()
            keeper = self._keep(loop, resource)
            try:
                keeper.__anext__().__await__().__next__()  # begun on this loop, without awaiting
            except StopIteration:
                held = self._held[loop] = (resource, keeper)
        assert held is not None
        return held[0]

    async def _keep(self, loop: asyncio.AbstractEventLoop, resource: Any) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._held.pop(loop, None)
            await self._close(resource)

    async def aclose(self) -> None:
        """Close the resource of the running loop."""
        held = self._held.get(asyncio.get_running_loop())
        if held is not None:
            await held[1].aclose()
