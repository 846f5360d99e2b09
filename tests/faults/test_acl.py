"""The ACL user with the least rights that suffice: the tests of the contract, run again as that user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from stable_openai import BrokerUnavailable, KeyManager
from tests.faults.least_rights import CLUSTER_RIGHTS, PASSWORD, RIGHTS, SAYS_WHO_IT_IS, USER
from tests.servers import private_redis

ROOT = Path(__file__).resolve().parents[2]


def test_the_scripts_use_no_other_command() -> None:
    used = {
        name.lower()
        for script in (ROOT / "lua").glob("*.lua")
        for name in re.findall(r"call\('(\w+)'", script.read_text())
    }
    granted = {right[1:] for right in RIGHTS.split() if right.startswith("+")}
    assert granted == used | {"eval", "evalsha", "blpop", "client|id", "client|unblock"}


def test_the_readme_says_which_rights() -> None:
    assert RIGHTS in " ".join((ROOT / "README.md").read_text().split())
    assert CLUSTER_RIGHTS in (ROOT / "README.md").read_text()


def run(files: list[str], less: str, seconds: float, **environment: str) -> None:
    """Run those tests, as the user without the rights `less`; nothing else is refused."""
    with private_redis() as url, redis.Redis.from_url(url, decode_responses=True) as admin:
        admin.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", *f"{RIGHTS} {less}".split())
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.faults.least_rights", "-k", "not memory"]
        environment = {**os.environ, "REDIS_URL": url, **environment}
        paths = [f"tests/{name}" for name in files]
        done = subprocess.run(
            [*command, *paths], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, done.stdout[-4000:]
        refused = {row["object"] for row in admin.acl_log()} - SAYS_WHO_IT_IS
        assert refused == {right[1:] for right in less.split()}
        assert int(admin.info("commandstats")["cmdstat_evalsha"]["calls"]) > 100


def test_the_contract() -> None:
    run(["test_twins.py", "test_waiting_races.py"], "", 60, STABLE_OPENAI_EXAMPLES="10")


def test_where_client_unblock_is_not_allowed_connections_are_closed_instead() -> None:
    run(["test_waiting_races.py"], "-client|unblock", 60)


@pytest.mark.soak
@pytest.mark.parametrize("less", ["", "-client|unblock"])
def test_the_whole_contract(less: str) -> None:
    files = ["twins", "waiting_races", "line_store", "waiting", "learning_store", "limits", "drivers", "verdicts"]
    run([f"test_{name}.py" for name in files], less, 280)


@pytest.mark.parametrize("right", ["+evalsha", "+zadd"])
def test_it_is_said_that_a_right_is_missing(right: str) -> None:
    with private_redis() as url, redis.Redis.from_url(url) as admin:
        admin.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", *RIGHTS.replace(f" {right} ", " ").split())
        with redis.Redis.from_url(url, username=USER, password=PASSWORD) as client:
            manager = KeyManager(["sk-a"], client, pool="test-right", on_redis_down="raise")
            with pytest.raises(BrokerUnavailable, match=r"permission|can't run"):
                manager.check()
            manager.close()
