"""Servers that a test kills, stops, demotes and moves: a primary with its replica under three sentinels, a cluster, and
one that speaks TLS. Each is a process on loopback, ended by its own handle."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.servers import executable, free_port

HOST = "127.0.0.1"
NAME = "mymaster"
SLOTS = 16_384


def until(true: Callable[[], Any], within: float = 20.0) -> Any:
    """Wait until something holds, also where a server does not answer yet; returns what it gave."""
    deadline = time.monotonic() + within
    while True:
        try:
            found = true()
        except redis.RedisError:
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.01)


class Server:
    """A process of redis-server or valkey-server.

    Args:
        folder: where it keeps what it writes.
        config: the words of its command line that come first: a sentinel's file, say.
        settings: of its configuration.
    """

    def __init__(self, folder: str, *config: str, port: int | None = None, **settings: str) -> None:
        self.port = port or free_port()
        self.address = (HOST, self.port)
        own = Path(folder) / str(self.port)
        own.mkdir()
        if not config:
            plain = "0" if "tls_port" in settings else str(self.port)
            settings = {"port": plain, "bind": HOST, "save": "", "dir": str(own), **settings}
        options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
        self._command = [executable(), *config, *options]
        self.admin = redis.Redis(HOST, self.port, decode_responses=True, socket_timeout=5)
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def role(self) -> str:
        return str(self.admin.info("replication")["role"])

    def close(self) -> None:
        self.kill()
        self.admin.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Trio:
    """A primary and its replica, and the three sentinels that watch them."""

    def __init__(self, folder: str, stack: ExitStack) -> None:
        server: dict[str, str] = {"repl_diskless_sync_delay": "0", "appendonly": "no"}
        first = stack.enter_context(Server(folder, **server))
        other = stack.enter_context(Server(folder, **server))
        self.servers = [first, other]
        until(lambda: first.admin.ping() and other.admin.ping())
        other.admin.replicaof(HOST, first.port)
        until(lambda: other.admin.info("replication")["master_link_status"] == "up")
        self.sentinels = [stack.enter_context(self._sentinel(folder, first.port)) for _ in range(3)]
        for sentinel in self.sentinels:
            until(lambda: self._knows_all(sentinel))  # noqa: B023 - called at once

    def _sentinel(self, folder: str, primary: int) -> Server:
        port = free_port()
        config = Path(folder) / f"sentinel-{port}.conf"
        config.write_text(
            f"port {port}\nbind {HOST}\nsentinel monitor {NAME} {HOST} {primary} 2\n"
            f"sentinel down-after-milliseconds {NAME} 500\nsentinel failover-timeout {NAME} 3000\n"
        )
        return Server(folder, str(config), "--sentinel", port=port)

    @staticmethod
    def _knows_all(sentinel: Server) -> bool:
        known = sentinel.admin.sentinel_masters()[NAME]
        return bool(known["num-other-sentinels"] == 2 and known["num-slaves"] == 1)

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [sentinel.address for sentinel in self.sentinels]

    @property
    def primary(self) -> Server:
        """The one that the first sentinel names."""
        port = self.sentinels[0].admin.sentinel_masters()[NAME]["port"]
        return next(server for server in self.servers if server.port == port)

    def fail_over(self) -> None:
        """Have the replica promoted and the primary demoted, both alive."""
        until(lambda: self.sentinels[0].admin.execute_command("SENTINEL", "FAILOVER", NAME))


@contextmanager
def private_trio() -> Iterator[Trio]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, ExitStack() as stack:
        yield Trio(folder, stack)


class Cluster:
    """Three primaries and a replica of the first."""

    def __init__(self, folder: str, stack: ExitStack) -> None:
        settings = {"cluster_enabled": "yes", "cluster_node_timeout": "1000", "repl_diskless_sync_delay": "0"}
        settings |= {"cluster_replica_validity_factor": "0", "cluster_allow_replica_migration": "no"}
        nodes = [stack.enter_context(Server(folder, **settings)) for _ in range(4)]
        self.nodes, self.replica = nodes[:3], nodes[3]
        for number, node in enumerate(nodes):
            until(node.admin.ping)
            node.admin.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < 3:
                slots = range(SLOTS * number // 3, SLOTS * (number + 1) // 3)
                node.admin.execute_command("CLUSTER ADDSLOTS", *slots)
            if number:
                node.admin.execute_command("CLUSTER", "MEET", HOST, nodes[0].port)
        for node in nodes:
            until(lambda: self._known(node) == 4)  # noqa: B023 - called at once
        self.replica.admin.execute_command("CLUSTER", "REPLICATE", self.id(nodes[0]))
        until(lambda: self.replica.admin.info("replication").get("master_link_status") == "up")
        for node in nodes:
            until(lambda: self._is_ready(node))  # noqa: B023 - called at once

    @staticmethod
    def _known(node: Server) -> int:
        return int(node.admin.execute_command("CLUSTER INFO")["cluster_known_nodes"])

    def _is_ready(self, node: Server) -> bool:
        info = node.admin.execute_command("CLUSTER INFO")
        roles = [row["flags"] for row in node.admin.execute_command("CLUSTER NODES").values()]
        return info["cluster_state"] == "ok" and sum("slave" in flags for flags in roles) == 1

    @staticmethod
    def id(node: Server) -> str:
        return str(node.admin.execute_command("CLUSTER", "MYID"))

    def slot(self, key: str) -> int:
        return int(self.nodes[0].admin.execute_command("CLUSTER", "KEYSLOT", key))

    def pool_on(self, node: Server, prefix: str) -> str:
        """The name of a pool whose slot a node has."""
        number = self.nodes.index(node)
        names = (f"{prefix}-{n}" for n in range(1000))
        return next(n for n in names if SLOTS * number // 3 <= self.slot("{" + n + "}") < SLOTS * (number + 1) // 3)


@contextmanager
def private_cluster_of_three() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, ExitStack() as stack:
        yield Cluster(folder, stack)


class Migration:
    """A slot on its way from one node of a cluster to another, step by step."""

    def __init__(self, cluster: Cluster, slot: int, source: Server, target: Server) -> None:
        self.cluster, self.slot, self.source, self.target = cluster, slot, source, target

    def begin(self) -> None:
        self.target.admin.execute_command("CLUSTER", "SETSLOT", self.slot, "IMPORTING", self.cluster.id(self.source))
        self.source.admin.execute_command("CLUSTER", "SETSLOT", self.slot, "MIGRATING", self.cluster.id(self.target))

    def move(self, count: int = 1000) -> int:
        """Move so many keys; returns how many there were."""
        keys = self.source.admin.execute_command("CLUSTER", "GETKEYSINSLOT", self.slot, count)
        if keys:
            self.source.admin.execute_command("MIGRATE", HOST, self.target.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def end(self) -> None:
        for node in (self.target, self.source, *self.cluster.nodes):
            node.admin.execute_command("CLUSTER", "SETSLOT", self.slot, "NODE", self.cluster.id(self.target))

    def run(self) -> None:
        self.begin()
        while self.move():
            pass
        self.end()


class Certificate:
    """One for 127.0.0.1 and localhost, which is its own authority."""

    def __init__(self, folder: str) -> None:
        openssl = shutil.which("openssl")
        if openssl is None:
            pytest.skip("openssl makes the certificate, and is not there")
        self.key, self.file = f"{folder}/key.pem", f"{folder}/certificate.pem"
        command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", self.key, "-out", self.file, "-days", "2", "-subj", "/CN=localhost"]
        command += ["-addext", f"subjectAltName=IP:{HOST},DNS:localhost"]
        subprocess.run(command, check=True, capture_output=True)


class TLS:
    """A server that speaks nothing but TLS, and its certificate's file."""

    def __init__(self, folder: str, stack: ExitStack, **settings: str) -> None:
        self.certificate = Certificate(folder)
        port = free_port()
        trusts = {"tls_ca_cert_file": self.certificate.file, "tls_auth_clients": "no"}
        own = {"tls_cert_file": self.certificate.file, "tls_key_file": self.certificate.key, **trusts}
        own |= {"tls_port": str(port), **settings}
        self.server = stack.enter_context(Server(folder, port=port, **own))
        self.server.admin.close()
        self.server.admin = redis.Redis(HOST, port, ssl=True, ssl_ca_certs=self.certificate.file, decode_responses=True)
        until(self._speaks_tls)

    def _speaks_tls(self) -> bool:
        if self.server.has_ended():
            pytest.skip("this server was built without TLS")
        return bool(self.server.admin.ping())


@contextmanager
def private_tls(**settings: str) -> Iterator[TLS]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, ExitStack() as stack:
        yield TLS(folder, stack, **settings)


@contextmanager
def private_tls_sentinel() -> Iterator[tuple[TLS, int]]:
    """The same as a primary, and the port of a sentinel, which itself speaks no TLS to its clients."""
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, ExitStack() as stack:
        tls, port = TLS(folder, stack), free_port()
        config = Path(folder) / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind {HOST}\ntls-replication yes\ntls-ca-cert-file {tls.certificate.file}\n"
            f"tls-cert-file {tls.certificate.file}\ntls-key-file {tls.certificate.key}\n"
            f"sentinel monitor {NAME} {HOST} {tls.server.port} 1\n"
        )
        sentinel = stack.enter_context(Server(folder, str(config), "--sentinel", port=port))
        until(lambda: sentinel.admin.sentinel_masters()[NAME]["flags"] == "master")
        yield tls, port
