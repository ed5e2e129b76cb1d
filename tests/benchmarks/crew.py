"""Processes that a benchmark tells what to do, and the figures it prints of them."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from tests.support.servers import RedisServer

_SPAWN = multiprocessing.get_context("spawn")  # nothing inherited: no locks, no threads, no connections
_PATIENCE = 60.0


class Member:
    """A process that builds one object and calls its methods on demand; it ends with this process.

    Args:
        build: Makes the object, in the process; a module's class.
        args: For *build*.
    """

    def __init__(self, build: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_obey, args=(theirs, build, args, options), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method there and return what it returns."""
        self.order(method, *args)
        return self.answer()

    def order(self, method: str, *args: Any) -> None:
        """Send an order without waiting; its answer must be fetched."""
        self._pipe.send((method, args))

    def answer(self) -> Any:
        """Return the answer to the oldest order."""
        assert self._pipe.poll(_PATIENCE), f"no answer for {_PATIENCE:g} s"
        is_fine, answer = self._pipe.recv()
        assert is_fine, f"a process of the benchmark failed: {answer}"
        return answer

    def stop_running(self) -> None:
        """SIGSTOP; in force on return."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        """SIGCONT."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        """SIGKILL, reaped."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


class Crew:
    """Members of one kind, ordered about together."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method in all of them at once; return the answers in order."""
        for member in self.members:
            member.order(method, *args)
        return [member.answer() for member in self.members]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            member.end()


def _obey(pipe: Connection, build: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with the parent, even if stopped
    target: Any = None
    while True:
        try:
            method, given = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            os._exit(0)  # the benchmark is gone
        try:
            if target is None:
                target = build(*args, **options)
            answer = (True, getattr(target, method)(*given))
        except Exception as exc:
            answer = (False, f"{type(exc).__name__}: {exc}")
        pipe.send(answer)


def server_cpu(server: RedisServer) -> float:
    """Return the seconds of CPU that the server has used, all threads."""
    cpu = server.client().info("cpu")
    return float(cpu["used_cpu_sys"]) + float(cpu["used_cpu_user"])


def published(server: RedisServer) -> int:
    """Return how many PUBLISH commands the server has executed, those in scripts included."""
    stats = server.client().info("commandstats")
    return int(stats.get("cmdstat_publish", {}).get("calls", 0))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least *share* of all are not above (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def load() -> str:
    """Say how busy this machine is, for beside a table."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {time.strftime('%H:%M')}"
