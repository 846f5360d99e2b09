"""The heartbeat: one daemon thread a process, which renews live leases, settles what finalisers have queued, and lets
the others who share the store know that a worker is there.

It starts with the first lease, looks every third of the shortest ttl (soon again, where what it did has failed), and
ends when there is nothing left to do. It serves coroutines too: a lease is renewed for as long as its process lives,
even while an event loop is busy. (So there is no task for each loop, as the design first had it: one mechanism, and
one more connection a process.)

Finalisers may run anywhere, inside any lock: they only append to a worker's `pending`, and call nothing here. The
thread that their lease needed is still there, and looks at what is pending before it ends.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_openai._worker import Worker

__all__ = ["heartbeat"]

log = logging.getLogger("stable_openai.leases")
FLUSH_S = 1.0
REST_S = 1.0


class Heartbeat:
    def __init__(self) -> None:
        self._served: tuple[weakref.ref[Worker], ...] = ()  # replaced whole, so that it can be read at any time
        self.begin_life()

    def begin_life(self) -> None:
        self._mutex = threading.Lock()
        self._works = threading.Lock()
        self._thread: threading.Thread | None = None
        self._sooner = threading.Event()
        self._pause = math.inf
        self._failed = False
        self._forks = threading.local()

    def serve(self, worker: Worker) -> None:
        """Serve this worker from now on, for as long as somebody else holds it."""
        with self._mutex:
            known = [ref for ref in self._served if ref() is not None]
            self._served = (*known, weakref.ref(worker))

    def watch(self, worker: Worker) -> None:
        """The worker has a lease, or something pending: there must be a thread, and it must not sleep for longer than
        that allows."""
        if self._pause > self._pause_of(worker):
            self._sooner.set()
        if self._thread is None:
            with self._mutex:
                if self._thread is None:
                    thread = threading.Thread(target=self._live, name="stable_openai-heartbeat", daemon=True)
                    thread.start()
                    self._thread = thread

    def _workers(self) -> list[Worker]:
        workers = [ref() for ref in self._served]
        return [
            worker
            for worker in workers
            if worker is not None and (worker.live or worker.pending or worker.attend_at < math.inf)
        ]

    def _live(self) -> None:
        try:
            while self._beat():
                pass
        finally:
            with self._mutex:
                if self._thread is threading.current_thread():  # and not one that came after it
                    self._thread = None

    def _beat(self) -> bool:
        """One look. Says whether there is more to do."""
        self._sooner.clear()
        self._pause = math.inf  # a lease that comes from now on wakes this thread
        self._pause = min(map(self._pause_of, self._workers()), default=0.0)
        if self._sooner.wait(self._pause):
            return True
        with self._works:
            self._work()
        if self._workers():
            return True
        # A lease that is granted between the two looks finds no thread, or is seen by the second.
        self._thread = None
        if not self._workers():
            return False
        with self._mutex:
            if self._thread is not None:
                return False
            self._thread = threading.current_thread()
            return True

    def _work(self) -> None:
        # What is renewed comes before what may wait; the shortest lease first.
        workers, now = sorted(self._workers(), key=lambda worker: worker.ttl_ms), time.monotonic()
        failed = [self._fails(worker, worker.renew(now)) for worker in workers]
        failed += [self._fails(worker, worker.flush()) for worker in workers]
        failed += [self._fails(worker, worker.attend()) for worker in workers if worker.attend_at <= now]
        self._failed = any(failed)

    def rest(self) -> None:
        """Wait until what is under way has ended, for a second at most: who closes what it works on would cut it."""
        if self._works.acquire(timeout=REST_S):
            self._works.release()

    def before_fork(self) -> None:
        """Come to rest: a module that this thread imports, say, could never be imported in the child."""
        self._forks.rests = self._works.acquire(timeout=REST_S)

    def after_fork_in_parent(self) -> None:
        if self._forks.rests:
            self._works.release()

    def _pause_of(self, worker: Worker) -> float:
        ttl_s = worker.ttl_ms / 1000
        soon = FLUSH_S if worker.pending or self._failed else math.inf
        return min(ttl_s / 20 if self._failed else ttl_s / 3, soon, max(0.0, worker.attend_at - time.monotonic()))

    def _fails(self, worker: Worker, steps: Any) -> bool:
        try:
            worker.run(steps)
        except Exception as error:
            if not self._failed:
                log.warning("heartbeat.failed pool=%s error=%s", worker.pool, type(error).__name__)
            return True
        return False


heartbeat = Heartbeat()


def _after_fork_in_child() -> None:
    heartbeat.begin_life()


os.register_at_fork(
    before=heartbeat.before_fork,
    after_in_parent=heartbeat.after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
