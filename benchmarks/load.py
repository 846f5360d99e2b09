"""The main job: 8 processes × 8 threads share 8 keys through one Redis, calling through the real openai client.

The judge is the fake upstream's own log: over the limit 0, answered all. Goodput is what was answered in the window
of saturation beside what the rule allows in it (an oracle without delays).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from stable_openai import Key, KeyManager, Limits, stable
from stable_openai.testing import Entry, FakeProcess, Limit
from tests.servers import private_redis

RULES = ("bucket", "sliding", "calendar")
KEYS = 8
RPM = 120


def main(*, smoke: bool = False) -> int:
    """The whole: a minute and more of saturation for each rule. In smoke form nothing is saturated."""
    if smoke:
        return max(run(rule, seconds=2, processes=2, rpm=60_000) for rule in RULES)
    return max(run(rule, seconds=60, processes=8) for rule in RULES)


def run(rule: str, *, seconds: float, processes: int, threads: int = 8, rpm: int = RPM) -> int:
    """One rule. Returns 0 where nothing went over a limit and every call was answered."""
    keys = {f"sk-{number}": f"org-{number}" for number in range(KEYS)}
    with private_redis() as url, FakeProcess(keys=keys, limits=Limit(rpm=rpm, rule=rule)) as fake:  # type: ignore[arg-type]
        job = {"redis": url, "base_url": fake.url, "keys": list(keys), "rpm": rpm, "rule": rule, "threads": threads}
        started = time.time()
        results = run_processes([{**job, "seconds": seconds}] * processes, timeout=seconds + 120)
        log, over = fake.log, fake.over
    wrong = sum(result["wrong"] for result in results)
    answered = [result["answered"] for result in results]
    waited = statistics.median(wait for result in results for wait in result["waits"])
    print(
        f"load {rule:9} {processes} × {threads}, {KEYS} keys, rpm {rpm}: over a limit {len(over)}, lost {wrong}, "
        f"answered {sum(answered)}, goodput {goodput(log, rule, rpm, started, seconds):.3f} of the oracle's, "
        f"Jain {jain(answered):.3f}, half of the calls waited less than {waited:.2f} s"
    )
    return int(bool(over or wrong))


def run_processes(jobs: list[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """Run `work` in a process for each job; what each came to."""
    command = [sys.executable, "-m", "benchmarks.load"]
    workers = [subprocess.Popen([*command, json.dumps(job)], stdout=subprocess.PIPE, text=True) for job in jobs]
    try:
        return [json.loads(worker.communicate(timeout=timeout)[0].splitlines()[-1]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def goodput(log: list[Entry], rule: str, rpm: int, started: float, seconds: float) -> float:
    """Answers beside what an oracle without delays is granted from the first arrival on, in the same time."""
    first = min(entry.at for entry in log)
    end = started + seconds
    served = sum(1 for entry in log if entry.status == 200 and entry.at <= end)
    span = end - first
    if rule == "bucket":
        each = rpm + rpm * span / 60
    elif rule == "sliding":
        each = rpm * (1 + span // 60)
    else:
        each = rpm * (1 + end // 60 - first // 60)
    return served / (KEYS * each)


def jain(shares: list[int]) -> float:
    """Jain's index of fairness: 1 where all have the same."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares)) if any(shares) else 0.0


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One process: its threads call until the time is over, or so many `calls` each; those that wait then are still
    answered."""
    manager = KeyManager(
        [Key(secret, base_url=job["base_url"]) for secret in job["keys"]],
        job["redis"],
        pool=job.get("pool", "load"),
        limits=Limits(rpm=job["rpm"], rule=job["rule"]),
    )

    @stable(manager=manager)
    def ask(prompt: str, client: Any = None) -> str:
        answer = client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": prompt}])
        return str(answer.choices[0].message.content)

    answered, wrong, waits = [0], [0], []
    until = time.monotonic() + job["seconds"]
    most = job.get("calls", float("inf"))

    def loop(number: int) -> None:
        count = 0
        while time.monotonic() < until and count < most:
            count += 1
            began = time.monotonic()
            prompt = f"thread {number}, prompt {count}"
            try:
                right = ask(prompt) == f"echo: {prompt}"
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                right = False
            waits.append(time.monotonic() - began)
            answered[0] += right
            wrong[0] += not right

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(job["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager.close()
    return {"answered": answered[0], "wrong": wrong[0], "waits": waits}


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
