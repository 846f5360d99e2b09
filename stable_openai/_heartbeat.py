"""The heartbeat: one daemon thread a process, which renews live leases and settles what finalisers have queued.

It starts with the first lease, looks every third of the shortest ttl, and ends when there is nothing left to do. It
serves coroutines too: a lease is renewed for as long as its process lives, even while an event loop is busy. (So
there is no task for each loop, as the design first had it: one mechanism, and one more connection a process.)
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_openai._worker import Worker

__all__ = ["heartbeat"]

log = logging.getLogger("stable_openai.leases")


class Heartbeat:
    def __init__(self) -> None:
        self._runs: weakref.WeakKeyDictionary[Worker, Callable[[Generator[Any, Any, Any]], Any]]
        self._runs = weakref.WeakKeyDictionary()
        self.begin_life()

    def begin_life(self) -> None:
        self._mutex = threading.Lock()
        self._thread: threading.Thread | None = None
        self._sooner = threading.Event()
        self._pause = 0.0

    def serve(self, worker: Worker, run: Callable[[Generator[Any, Any, Any]], Any]) -> None:
        """Serve this worker from now on; `run` drives its steps."""
        self._runs[worker] = run

    def watch(self, worker: Worker) -> None:
        """The worker has something to do: there must be a thread, and it must not sleep for longer than that."""
        if self._pause > worker.ttl_ms / 3000:
            self._sooner.set()
        if self._thread is None:
            with self._mutex:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._beat, name="stable_openai-heartbeat", daemon=True)
                    self._thread.start()

    def _beat(self) -> None:
        while True:
            busy = [worker for worker in tuple(self._runs) if worker.live or worker.pending]
            pauses = [1.0 if worker.pending else worker.ttl_ms / 3000 for worker in busy]
            self._pause = min(pauses, default=0.0)
            if self._sooner.wait(self._pause):
                self._sooner.clear()
                continue
            for worker, run in tuple(self._runs.items()):
                try:
                    run(worker.flush())
                    run(worker.renew(time.monotonic()))
                except Exception as error:
                    log.warning("heartbeat.failed pool=%s error=%s", worker.pool, type(error).__name__)
            if not self._busy():
                # A lease that is granted between the two looks finds no thread, or is seen by the second.
                self._thread = None
                if not self._busy():
                    return
                with self._mutex:
                    if self._thread is not None:
                        return
                    self._thread = threading.current_thread()

    def _busy(self) -> bool:
        return any(worker.live or worker.pending for worker in tuple(self._runs))


heartbeat = Heartbeat()


def _after_fork_in_child() -> None:
    heartbeat.begin_life()


os.register_at_fork(after_in_child=_after_fork_in_child)
