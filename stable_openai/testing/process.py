"""`FakeProcess`: the fake upstream in a child process, for load generators that must not share its GIL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from .failures import Failure
from .settings import Settings
from .visits import Entry, entries_over

PATIENCE_S = 10.0


class FakeProcess(Settings):
    """A `FakeOpenAI` in a process of its own; the same arguments, of which none may be a function.

        with FakeProcess(keys=["sk-a"], limits=Limit(rpm=60)) as fake:
            ...
        assert not fake.over

    The child ends with the block, and when this process ends, however it does; `log` and `over` outlive it.
    Raises TypeError for functions among the arguments, RuntimeError if the child does not start (it says why
    on stderr).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._config = json.dumps(self.to_json())
        self._child: subprocess.Popen[str] | None = None
        self._url = ""
        self._last_log: list[Entry] = []

    def __enter__(self) -> FakeProcess:
        here = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "stable_openai.testing", "--settings", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(self._config + "\n")
            self._child.stdin.flush()
            self._url = self._child.stdout.readline().strip()
        except BaseException:
            self._end()
            raise
        if not self._url:
            self._end()
            raise RuntimeError("the fake's process did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._last_log = self.log
        finally:
            self._end()

    @property
    def url(self) -> str:
        """The base URL, for `base_url=` or OPENAI_BASE_URL."""
        return self._url

    @property
    def pid(self) -> int:
        """The child's process id, while it lives."""
        if self._child is None:
            raise RuntimeError("the fake is not running: use it as a context manager")
        return self._child.pid

    @property
    def log(self) -> list[Entry]:
        """All requests that are over, in the order in which they ended."""
        if self._child is None:
            return self._last_log.copy()
        return [Entry(**json.loads(line)) for line in self._ask("GET", "log").splitlines()]

    @property
    def over(self) -> list[Entry]:
        """The requests that were refused because a limit was exceeded; no injected ones."""
        return entries_over(self.log)

    @property
    def stats(self) -> dict[str, Any]:
        """Counts, while the child lives: see `admin`."""
        stats: dict[str, Any] = json.loads(self._ask("GET", "stats"))
        return stats

    def fail(
        self,
        failure: Failure,
        *,
        key: str | None = None,
        account: str | None = None,
        model: str | None = None,
        path: str | None = None,
        times: int | None = 1,
    ) -> None:
        """As `FakeOpenAI.fail`."""
        matching = {"key": key, "account": account, "model": model, "path": path, "times": times}
        self._ask("POST", "fail", json.dumps(matching | {"failure": asdict(failure)}))

    def spend(self, account: str, model: str, requests: int = 0, tokens: int = 0) -> None:
        """As `FakeOpenAI.spend`; RuntimeError in place of ValueError."""
        used = {"account": account, "model": model, "requests": requests, "tokens": tokens}
        self._ask("POST", "spend", json.dumps(used))

    def clear(self) -> None:
        """As `FakeOpenAI.clear`."""
        self._ask("POST", "clear")

    def _ask(self, method: str, what: str, body: str | None = None) -> str:
        place = urlsplit(self._url)
        connection = HTTPConnection(place.hostname or "", place.port, timeout=PATIENCE_S)
        try:
            connection.request(method, f"/_fake/{what}", body)
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != 200:
                raise RuntimeError(f"{method} {what}: {response.status} {text}")
            return text
        finally:
            connection.close()

    def _end(self) -> None:
        if self._child is None:
            return
        child, self._child = self._child, None
        child.terminate()
        try:
            child.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
