"""stable-openai demo, run as a user runs it; and what makes it fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import redis

from stable_openai.cli import demo, main
from stable_openai.testing import Entry, Failure, FakeOpenAI, Limit, closed_port

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "stable_openai", "demo")


def environment() -> dict[str, str]:
    """What a program finds that knows of no key, and that a proxy would keep from the fake."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "STABLE_"))}
    return clean | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "http_proxy": "http://127.0.0.1:9"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], env=environment(), capture_output=True, text=True, timeout=120)


def rows(output: str) -> dict[str, dict[str, Any]]:
    """The table at the end, by the names of the keys."""
    line = r"^ *(alpha|beta|mistyped) +(\S+) +(ready|(?:out|cooldown) \d+ s) +(\S+ +)??" + r" +".join([r"(\d+)"] * 5)
    names = ("account", "state", "why", "sent", "answered", "401", "429", "over")
    found = {}
    for name, *fields in re.findall(rf"{line} *$", output, re.MULTILINE):
        found[name] = dict(zip(names, [*map(str.strip, fields[:3]), *map(int, fields[3:])]))
    return found


def check(output: str, prompts: int) -> None:
    """The table says that all was answered, shared by two keys, and what became of the third."""
    table = rows(output)
    assert list(table) == ["alpha", "beta", "mistyped"]
    good, bad = (table["alpha"], table["beta"]), table["mistyped"]
    assert sum(row["answered"] for row in good) == prompts
    for row in good:
        assert row["state"] == "ready"
        assert row["sent"] == row["answered"] > prompts / 3
    assert bad["state"].startswith("out ")
    assert bad["why"] == "invalid_api_key"
    assert bad["answered"] == 0
    assert bad["sent"] == bad["401"] >= 2
    for row in table.values():
        assert (row["429"], row["over"]) == (0, 0)
    assert f"{prompts} of {prompts} prompts answered" in output


@pytest.fixture
def pools(redis_url: str) -> Iterator[redis.Redis]:
    """A client that forgets the pools of demos at the end; they would expire, in a server that others use too."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client
        for key in client.scan_iter("stable:{demo-*"):
            client.delete(key)


def test_in_memory() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    check(done.stdout, 50)
    assert "key.out" in done.stdout
    assert "sk-demo" not in done.stdout


def test_over_redis_with_two_processes(redis_url: str, pools: redis.Redis) -> None:
    done = run("--redis", redis_url, "--processes", "2")
    assert (done.returncode, done.stderr) == (0, "")
    check(done.stdout, 100)
    named = re.findall(r"pool '(demo-\w+)' on Redis", done.stdout)
    assert {key.split(":")[1] for key in pools.scan_iter("stable:*")} == {f"{{{name}}}" for name in named}
    assert len(named) == 1


def test_a_prompt_that_is_not_answered_in_time() -> None:
    done = run("--max-wait", "1")
    assert done.returncode == 1
    assert re.search(r"^failed: \d+ x Exhausted: no key .* serve the call within its 1 s", done.stderr, re.MULTILINE)
    answered = sum(row["answered"] for row in rows(done.stdout).values())
    assert 0 < answered < 50
    assert f"{answered} of 50 prompts answered" in done.stdout


class Faulty(FakeOpenAI):
    """Refuses a prompt, answers another with an answer that is not its own, and allows less than it should."""

    def __enter__(self) -> FakeOpenAI:
        super().__enter__()
        message = {"role": "assistant", "content": "echo: something else"}
        answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
        answer["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self.fail(Failure.error(400))
        self.fail(Failure.error(200, body=json.dumps(answer)))
        self.fail(Failure.error(200, body=json.dumps(answer)))
        return self


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """run() changes the environment: it is to be restored."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")


@pytest.mark.usefixtures("no_proxy")
def test_answers_that_are_wrong_or_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "FakeOpenAI", Faulty)
    assert main(["demo"]) == 1
    output = capsys.readouterr()
    assert "failed: 1 x BadRequestError" in output.err
    assert "failed: 2 x an answer to another question" in output.err
    assert "47 of 50 prompts answered" in output.out


@pytest.mark.usefixtures("no_proxy")
def test_requests_over_a_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The fake is the judge: here it allows less than the broker was told."""

    class Stingy(FakeOpenAI):
        def __init__(self, **arguments: Any) -> None:
            limits = Limit(rpm=60, burst_s=19)
            super().__init__(**arguments | {"limits": limits})

    monkeypatch.setattr(demo, "FakeOpenAI", Stingy)
    assert main(["demo"]) == 1
    output = capsys.readouterr()
    found = re.search(r"^failed: (\d+) requests over the rpm", output.err, re.MULTILINE)
    assert found
    assert sum(row["over"] for row in rows(output.out).values()) == int(found[1]) > 0


def test_what_makes_it_fail() -> None:
    entry = Entry(0.0, None, None, None, "/", 429, None, None, 0, "r", 1, 0.0, None)
    over = Entry(0.0, None, None, None, "/", 429, None, "rpm", 0, "r", 1, 0.0, None)
    good, bad = demo.Done(0, ""), demo.Done(0, "Exhausted")
    assert demo.problems([good, good], 2, [entry]) == []
    assert demo.problems([good, bad], 2, []) == ["1 x Exhausted"]
    assert demo.problems([good], 3, []) == ["2 x a prompt without any answer: its process has ended"]
    assert demo.problems([good], 1, [entry, over]) == ["1 requests over the rpm of their account"]


def dies(number: int, settings: demo.Settings, writer: Connection) -> None:
    """In place of the main function of a process."""
    os._exit(9)


@pytest.mark.usefixtures("no_proxy", "pools")
def test_processes_that_die(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_process", dies)
    assert main(["demo", "--redis", redis_url, "--processes", "2"]) == 1
    output = capsys.readouterr()
    assert "failed: 100 x a prompt without any answer" in output.err
    assert "0 of 100 prompts answered" in output.out


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("ended", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("when", ["50 prompts|100 prompts", "key.out"])  # before there are others; when all are busy
@pytest.mark.usefixtures("pools")
def test_the_end_leaves_no_process_behind(when: str, ended: signal.Signals, processes: int, redis_url: str) -> None:
    """Ctrl-C reaches all processes of the terminal, kill -9 one. All hold the pipes: at their end nobody is left."""
    command = [*COMMAND, "--redis", redis_url, "--processes", str(processes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None
        assert any(re.match(when, line) for line in child.stdout)
        if ended == signal.SIGINT:
            os.killpg(child.pid, ended)
        else:
            child.kill()
        _, errors = child.communicate(timeout=60)
    if ended == signal.SIGINT:
        assert child.returncode == 130
        assert errors.endswith("interrupted\n")  # what comes while a finaliser runs is told by Python too


def test_ctrl_c_that_python_swallows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while a finaliser runs: the next report is the last."""

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    swallowed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: swallowed.append(told.exc_type))

    def reports() -> demo.Reports:
        yield demo.Done(0.0, "")
        raise AssertionError("it goes on")

    with demo._interrupts() as interrupts:
        Finalised()
        with pytest.raises(KeyboardInterrupt):
            demo._follow(demo.Console(quiet=True), reports(), 2, interrupts)
    assert swallowed == [KeyboardInterrupt]


def test_ctrl_c_while_processes_are_started() -> None:
    """It is heard when all have been started, and never by them."""
    program = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    printed = []

    def start() -> None:
        with demo._deaf():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            printed.append(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert printed == ["True\n"]


@pytest.mark.parametrize("missing", ["rich", "h11"])
def test_a_missing_extra_is_named(missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom stable_openai.cli import main\nsys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"the demo needs {missing}: pip install 'stable-openai[demo]'\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "COMMAND"),
        (("demo", "--processes", "2"), "--processes needs --redis URL"),
        (("demo", "--processes", "0"), "whole number from 1 to 16"),
        (("demo", "--processes", "two"), "whole number from 1 to 16"),
        (("demo", "--max-wait", "-1"), "number of seconds"),
        (("demo", "--max-wait", "nan"), "number of seconds"),
    ],
)
def test_a_wrong_argument(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("redis://:hidden@127.0.0.1:{port}/0", 1, "the demo cannot start: Redis does not serve the broker"),
        ("hidden@127.0.0.1:{port}", 2, "the demo cannot start: redis: cannot be parsed"),
    ],
)
def test_a_redis_that_does_not_serve(url: str, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--redis", url.format(port=closed_port())]) == code
    output = capsys.readouterr()
    assert said in output.err
    assert "hidden" not in output.out + output.err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--help"], "demo"), (["demo", "--help"], "--redis URL")):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 0
        assert said in capsys.readouterr().out
