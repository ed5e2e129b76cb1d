"""Small jobs that nobody waits for: sending the tasks that refresh results, by a thread of this process.

Who is given a stale result must not wait for the broker: with a dead one, Celery tries to connect for seconds (5.7: 6 s
until ``apply_async(retry=False)`` gives up), and with a frozen Redis for ever. Jobs are done one after the other, in
the order they came; when too many wait, more are refused. The thread starts with the first job. A forked child starts
with none of its parent's. What still waits when the process ends is lost, but for a moment of patience.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

MAX_WAITING: Final = 1000
LAST_PATIENCE: Final = 0.5  # seconds, at the end of the interpreter

log = logging.getLogger("celery_mlcache")


class Errands:
    """The jobs of one app in this process. Thread-, greenlet- and fork-safe."""

    def __init__(self) -> None:
        self._reset()
        _ALL.add(self)

    def _reset(self) -> None:
        self._jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._lock = threading.RLock()  # a signal handler that comes in between may use the cache
        self._thread: threading.Thread | None = None

    def ask(self, job: Callable[[], object]) -> bool:
        """Have *job* done soon; return False where too many wait already, or no thread can be had."""
        if self._jobs.qsize() >= MAX_WAITING:
            return False
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, args=(self._jobs,), name="mlcache-errands", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter ends
                    return False
                self._thread = thread
        self._jobs.put(job)
        return True

    def join(self, timeout: float) -> bool:
        """Wait until all that was asked for before is done, at most *timeout* seconds; return whether it is."""
        if self._thread is None:
            return True
        is_done = threading.Event()
        self._jobs.put(is_done.set)
        return is_done.wait(timeout)

    @staticmethod
    def _work(jobs: SimpleQueue[Callable[[], object]]) -> None:
        while True:
            job = jobs.get()
            try:
                job()
            except Exception:  # the top of a thread: the next job is another's
                log.exception("an errand failed")
            del job  # it may hold large arguments


def _after_fork_in_child() -> None:
    for each in list(_ALL):
        each._reset()  # noqa: SLF001 - the same module


def _at_exit() -> None:
    for each in list(_ALL):
        each.join(LAST_PATIENCE)


_ALL: weakref.WeakSet[Errands] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
