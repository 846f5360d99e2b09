"""Benchmarks of the bars in the README: each prints its figure beside its yardstick, from the same run.

    python -m benchmarks                 all of them
    python -m benchmarks costs --smoke   one, in a short form that proves only that it runs

costs     acquire and settle: time, server CPU, 10,000 keys, memory in Redis; in memory; @stable; the import
load      the main job: processes of threads over Redis against the fake upstream, which judges
waking    how soon a waiter has a lease that another process frees
tasks     Celery tasks that wait in their queue, beside rate_limit, autoretry and a sleeping wait
clients   what the drop-in client adds to a call of openai's own
soak      four processes for ten minutes of faults; the upstream judges
"""
