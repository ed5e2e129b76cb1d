"""Other processes that use the cache, and the watch over how old an answer may be."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from celery_mlcache import MISS, CacheManager
from tests.support import logs, processes
from tests.support.servers import RedisServer

PAUSE = 0.001  # between two looks of a watch: the machine is shared


class Line:
    """Orders to a process and its answers, through a Redis that no test breaks."""

    def __init__(self, control: RedisServer) -> None:
        self._name = f"actor-{uuid.uuid4().hex[:8]}"
        self._client = control.client(socket_timeout=60, decode_responses=True)

    @property
    def name(self) -> str:
        """Where the process looks for orders."""
        return self._name

    def call(self, method: str, *args: Any) -> Any:
        """Have a method called there and return the answer; a miss is None."""
        self.order(method, *args)
        return self.answer()

    def order(self, method: str, *args: Any) -> None:
        """Send an order without waiting."""
        self._client.rpush(self._name, json.dumps([method, *args]))

    def answer(self, timeout: float = 15) -> Any:
        """Wait for the answer to the oldest order."""
        got = self._client.blpop([f"{self._name}:out"], timeout=timeout)
        assert got is not None, f"{self._name} does not answer"
        return json.loads(got[1])


class Actor(Line):
    """A process with a cache of its own, told what to do.

    Args:
        control: Carries orders and answers.
        subject: Makes what the orders are for: the cache, or something round it that has a ``warm`` too.
        settings: What it is made with.
    """

    def __init__(
        self, control: RedisServer, *, subject: str = "celery_mlcache:create_cache_manager", **settings: Any
    ) -> None:
        super().__init__(control)
        args = [sys.executable, "-m", "tests.faults.actors", str(control.port), self._name, subject]
        self._process = processes.spawn(
            [*args, json.dumps(settings)],
            log=logs.new_log(self._name, lambda: self._process.poll() is None),
            cwd=processes.ROOT,
        )
        try:
            assert self.call("ready") == "ready"
        except BaseException:
            self.kill()
            raise

    def stop_running(self) -> None:
        """SIGSTOP; in force on return."""
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, reaped."""
        processes.kill_group(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class Watch:
    """A reader thread that knows what was written when, and notes every answer older than the bound allows.

    The writer writes rising numbers under one key. An answer to a question asked at *t* must not be below a number
    whose write had returned before *t - bound*. A miss is never too old.
    """

    def __init__(self, cache: CacheManager, bound: float, key: str = "watched") -> None:
        self.violations: list[tuple[float, int, int]] = []
        self.answers = 0
        self._cache, self._bound, self._key = cache, bound, key
        self._written: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def write(self, writer: Callable[[str, int], bool], number: int) -> bool:
        """Write *number* and remember when that was done."""
        is_stored = writer(self._key, number)
        if is_stored:
            self._written.append((time.monotonic(), number))
        return is_stored

    def write_for(self, writer: Callable[[str, int], bool], seconds: float, pause: float = 0.005) -> None:
        """Write rising numbers for a while."""
        number = self._written[-1][1] if self._written else 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            number += 1
            self.write(writer, number)
            self._stop.wait(pause)

    def _run(self) -> None:
        while not self._stop.is_set():
            asked = time.monotonic()
            got = self._cache.get(self._key, MISS)
            if got is not MISS:
                self.answers += 1
                due = max((number for at, number in list(self._written) if at < asked - self._bound), default=0)
                if got < due:
                    self.violations.append((round(asked, 3), got, due))
            self._stop.wait(PAUSE)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(10)
        if kind is None:
            assert not self.violations, f"{len(self.violations)} answers too old, such as {self.violations[:3]}"
            assert self.answers, "nothing was ever answered"


def serve(port: int, name: str, cache: Any) -> None:
    """Obey what is asked for under *name*, for ever."""
    import redis

    client = redis.Redis("127.0.0.1", port, decode_responses=True, socket_timeout=60)
    while True:
        got = client.blpop([name], timeout=50)
        if got is None:
            continue  # it ends when its Redis or the test run does
        method, *args = json.loads(got[1])
        if method == "ready":
            cache.warm()
            answer: Any = "ready"
        elif method == "write_for":
            end, answer = time.monotonic() + args[0], 0
            while time.monotonic() < end:
                answer += cache.set("watched", int(time.time() * 1e6))
        else:
            answer = getattr(cache, method)(*args)
        client.rpush(f"{name}:out", json.dumps(answer))


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], pkgutil.resolve_name(sys.argv[3])(**json.loads(sys.argv[4])))
