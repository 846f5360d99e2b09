"""A worker of the soak: a process of threads that call until its stdin ends. As it is, and as the driver sees it.

Each rule has a model of its own. Limits bind: those of the bucket and of concurrency all the time, those of the windows
most of the time. Two of the keys share an account.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks.load import RULES, TOKENS, request
from stable_openai import INJECTED, Key, KeyManager, Limits, stable
from stable_openai._clients import shared_client

POOL = "soak"
THREADS = 8
ACCOUNTS = {"sk-0": "org-0", "sk-1": "org-0", "sk-2": "org-1", "sk-3": "org-2"}
RPM, BURST_S = 240, 5.0
LATENCY_S = 0.3
LIMITS: dict[str, dict[str, Any]] = {
    f"gpt-{rule}": {"rpm": RPM, "tpm": RPM * TOKENS, "rpd": 1_000_000, "concurrency": 2, "rule": rule} for rule in RULES
}
LIMITS["gpt-bucket"]["burst_s"] = BURST_S
MODELS = list(LIMITS)


class Worker:
    """A process of threads that call until its stdin ends, and what it has said.

    `idle` is for each thread the longest time without a step; `left` and `alive` are what it says at its end: the
    leases that it still holds, and the threads that have not ended.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.answered = 0
        self.lost: list[str] = []
        self.idle, self._stepped = [0.0] * THREADS, [time.monotonic()] * THREADS
        self.left, self.alive = 0, list(range(THREADS))
        command = [sys.executable, "-m", "benchmarks.soak_worker", json.dumps(job)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            what, *rest = json.loads(line)
            if what == "end":
                self.left, self.alive = rest
            else:
                self._note(*rest)

    def _note(self, thread: int, problem: str) -> None:
        now = time.monotonic()
        self.idle[thread] = max(self.idle[thread], now - self._stepped[thread])
        self._stepped[thread] = now
        if problem:
            self.lost.append(problem)
        else:
            self.answered += 1

    def stop(self) -> None:
        """Its threads are to end when they have been answered."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def join(self, deadline: float) -> bool:
        """Whether it has ended by itself, and well."""
        try:
            return self._process.wait(max(0.0, deadline - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def manager_of(job: dict[str, Any]) -> KeyManager:
    return KeyManager(
        [Key(secret, account=account, base_url=job["base_url"]) for secret, account in ACCOUNTS.items()],
        job["redis"],
        pool=POOL,
        models={model: Limits(**limits) for model, limits in LIMITS.items()},
        on_redis_down=job["on_redis_down"],
        lease_ttl=job["ttl"],
        max_wait=3600,
    )


def work(job: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the driver's
    logging.getLogger("stable_openai").setLevel(logging.ERROR)  # that Redis does not answer is meant
    shared_client(False)
    gc.freeze()  # see load.py
    manager, stopping = manager_of(job), threading.Event()

    @stable(manager=manager, tokens=TOKENS)
    def ask(prompt: str, model: str, client: Any = INJECTED) -> str:
        answer = client.chat.completions.create(**{**request(prompt), "model": model})
        return str(answer.choices[0].message.content)

    def loop(thread: int) -> None:
        model, count = MODELS[thread % len(MODELS)], 0
        while not stopping.is_set():
            count += 1
            prompt = f"thread {thread}, prompt {count}"
            try:
                answer = ask(prompt, model)
                problem = "" if answer == f"echo: {prompt}" else f"the answer to {prompt!r} was {answer!r}"
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"[:200]
            say("step", thread, problem)

    threads = [threading.Thread(target=loop, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stopping.set()
    deadline = time.monotonic() + job["patience"]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    manager.close()
    alive = [number for number, thread in enumerate(threads) if thread.is_alive()]
    say("end", len(manager._worker.live) + len(manager._worker.pending), alive)


def say(*words: Any) -> None:
    os.write(1, f"{json.dumps(words)}\n".encode())  # in one piece, whichever thread says it


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
