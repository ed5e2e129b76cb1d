"""A real Celery worker in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support import logs, processes


class WorkerError(AssertionError):
    """The worker did not come up; the message ends with its log."""


class WorkerProcess:
    """``python -m celery -A module worker``, ready when the constructor returns; dies with the test run.

    Its log is kept until the test is over and shown if that fails.

    Args:
        module: What ``-A`` gets; importable from *cwd* (default: the repository's root).
        pool: prefork, solo, threads, gevent or eventlet.
        concurrency: Children, threads or greenlets.
        name: Left part of the host name; a unique one when None. :attr:`hostname` has the whole.
        env: Added to this process's environment.
        args: More arguments for ``celery worker``.
        ready_timeout: Seconds to wait for "ready".
    """

    def __init__(
        self,
        module: str,
        *,
        pool: str = "prefork",
        concurrency: int = 2,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        cwd: Path = processes.ROOT,
        ready_timeout: float = 30.0,
    ) -> None:
        self.name = name or f"w{uuid.uuid4().hex[:6]}"
        self.hostname = ""
        self.returncode: int | None = None
        command = [sys.executable, "-m", "celery", "-A", module, "worker", "-l", "INFO", "-n", f"{self.name}@%h"]
        command += ["--pool", pool, "--concurrency", str(concurrency)]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat", *args]
        paths = os.pathsep.join(filter(None, [str(cwd), os.environ.get("PYTHONPATH")]))
        fixed = {"C_FORCE_ROOT": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, "NO_COLOR": "1"}
        self.log_path = logs.new_log(f"worker {self.name}", lambda: self.is_running)
        self._process = processes.spawn(command, log=self.log_path, env={**os.environ, **fixed, **(env or {})}, cwd=cwd)
        try:
            self._wait_until_ready(ready_timeout)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Process id of the worker (prefork: of its MainProcess)."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the main process exists."""
        return self._process.poll() is None

    def children(self) -> list[int]:
        """Return the pids of its direct children that are alive (prefork: the pool), oldest first."""
        return processes.children_of(self.pid)

    def log(self) -> str:
        """Return all it has printed so far."""
        return self.log_path.read_text("utf-8", "replace")

    def stop(self, timeout: float = 15.0) -> int:
        """Ask for a warm shutdown (SIGTERM), SIGKILL the group after *timeout* seconds; return the exit code.

        Negative: the signal that ended it; -9 means that it did not stop by itself.
        """
        if self.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
            self.returncode = processes.kill_group(self._process)
        return self.returncode

    def kill(self) -> None:
        """SIGKILL the main process and all of its group at once."""
        self.returncode = processes.kill_group(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        ready = re.compile(rf"({re.escape(self.name)}@\S+) ready\.")
        while (found := ready.search(self.log())) is None:
            if not self.is_running:
                raise WorkerError(f"worker {self.name} ended with {self._process.returncode}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise WorkerError(f"worker {self.name} was not ready within {timeout:g} s:\n{self._tail()}")
            time.sleep(0.02)
        self.hostname = found.group(1)

    def _tail(self) -> str:
        return logs.tail(self.log_path, 60)
