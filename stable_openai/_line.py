"""Who waits in this process for something that has no time of its own, such as a concurrency slot.

A waiter leaves a waker and sleeps until it is called or its time is over; whoever frees something calls the first.
A wake is a hint: who is woken asks the broker again. (The fair line of design.md, section 7, takes this place.)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Line"]


class Line:
    """The waiters of one worker, threads and coroutines alike."""

    def __init__(self) -> None:
        self._wakers: deque[Callable[[], object]] = deque()

    def wake(self) -> None:
        """Something was freed: wake the first waiter."""
        while True:
            try:
                self._wakers.popleft()()
                return
            except IndexError:
                return
            except RuntimeError:  # its event loop is closed: the next one
                continue

    def wait(self, seconds: float) -> None:
        """Block the thread until it is woken, at most so long."""
        woken = threading.Event()
        self._wakers.append(woken.set)
        try:
            woken.wait(seconds)
        finally:
            self._leave(woken.set)

    async def await_(self, seconds: float) -> None:
        """The same for a coroutine."""
        import asyncio

        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def waker() -> None:
            loop.call_soon_threadsafe(woken.set)

        self._wakers.append(waker)
        try:
            await asyncio.wait_for(woken.wait(), seconds)
        except asyncio.TimeoutError:
            return
        finally:
            self._leave(waker)

    def _leave(self, waker: Callable[[], object]) -> None:
        try:
            self._wakers.remove(waker)
        except ValueError:  # it was woken
            return
