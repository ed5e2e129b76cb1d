"""Other processes that use the cache, and the watch over how old an answer may be."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from celery_mlcache import MISS, CacheManager, create_cache_manager
from tests.support import logs, processes
from tests.support.servers import RedisServer

PAUSE = 0.001  # between two looks of a watch: the machine is shared


class Actor:
    """A process with a cache of its own, told what to do through a Redis that no test breaks.

    Args:
        control: Carries orders and answers.
        settings: Of its manager.
    """

    def __init__(self, control: RedisServer, **settings: Any) -> None:
        self._name = f"actor-{uuid.uuid4().hex[:8]}"
        self._client = control.client(socket_timeout=20, decode_responses=True)
        args = [sys.executable, "-m", "tests.faults.actors", str(control.port), self._name, json.dumps(settings)]
        self._process = processes.spawn(
            args, log=logs.new_log(self._name, lambda: self._process.poll() is None), cwd=processes.ROOT
        )
        assert self.call("ready") == "ready"

    def call(self, method: str, *args: Any) -> Any:
        """Have a method called there and return the answer; a miss is None."""
        self.order(method, *args)
        return self.answer()

    def order(self, method: str, *args: Any) -> None:
        """Send an order without waiting."""
        self._client.rpush(self._name, json.dumps([method, *args]))

    def answer(self) -> Any:
        """Wait for the answer to the oldest order."""
        got = self._client.blpop([f"{self._name}:out"], timeout=15)
        assert got is not None, f"{self._name} does not answer"
        return json.loads(got[1])

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


def _act(port: int, name: str, settings: dict[str, Any]) -> None:
    import redis

    client = redis.Redis("127.0.0.1", port, decode_responses=True, socket_timeout=60)
    cache = create_cache_manager(**settings)
    while True:
        got = client.blpop([name], timeout=50)
        if got is None:
            return
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
    _act(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
