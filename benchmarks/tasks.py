"""Celery tasks that share four keys, beside what people do without a broker: how long they take, what the upstream
refuses, how much of the workers' slots they hold, and what that is for quick tasks of another kind in the same queue.

Two prefork workers of four slots each; the limit is a bucket that trickles, so that all but the first have to wait.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from celery import group

from tests.celery_site import latencies, said, site

SLOTS, WORKERS = 4, 2


class Way(NamedTuple):
    """How tasks wait: the name of the task in tests/celery_jobs.py, and what that is."""

    task: str
    what: str


WAYS = (
    Way("ask", "@stable: back to the queue"),
    Way("stays", "@stable, celery_wait=None: a sleeping wait"),
    Way("limited", "rate_limit, autoretry_for=(RateLimitError,)"),
    Way("unlimited", "autoretry_for=(RateLimitError,) alone"),
)


def main(*, smoke: bool = False) -> int:
    tasks, rpm, seconds = (20, 600, 1.0) if smoke else (400, 300, 15.0)
    print(f"tasks {tasks}, 4 keys of {rpm} requests a minute each (one at once): at best {tasks / rpm * 15:.0f} s")
    return sum(run(way, tasks, rpm, seconds) for way in WAYS)


def run(way: Way, tasks: int, rpm: int, seconds: float) -> int:
    """One way. Returns 1 where the broker let a request be refused, or a task was lost or ran twice."""
    with site({"rpm": rpm, "burst_s": 1}) as here:
        for _ in range(WORKERS):
            here.worker("prefork", SLOTS)
        name = way.task if way.task.endswith("limited") else f"tests.celery_jobs.{way.task}"
        began = time.time()
        results = group([here.app.signature(name, (n,)) for n in range(tasks)]).apply_async()
        beside = latencies(here, seconds, within=600)
        results.join(timeout=600, propagate=False)
        runs = here.notes("runs")
        took = max(at for _, _, at in runs) - began
        held = sum(here.notes("held_s")) / (took * SLOTS * WORKERS)
        refused = len(here.fake.over)
        executions = sum(len(here.notes(f"deliveries:{result.id}")) for result in results)
    print(
        f"  {way.what:45} {took:5.1f} s, refused {refused}, lost {tasks - len({n for n, _, _ in runs})}, "
        f"slots held {held:.0%}, executions a task {executions / tasks:.1f}; quick tasks beside: {said(beside)}",
        flush=True,
    )
    ours = way.task in ("ask", "stays")
    return int(ours and (refused > 0 or sorted(n for n, _, _ in runs) != list(range(tasks))))
