"""Fleet-wide single-flight, as one process sees it: which leases it holds, and the thread that renews them.

What may live here: who may load a key now, in the whole fleet. What is loaded, and whether the result may be kept, the
manager knows; where a lease is written down, the remote store.

Theory of operation. A lease is a promise that lapses: whoever holds it loads, everybody else waits for a message. It
carries a *fencing token* that only grows (Kleppmann, "How to do distributed locking", 2016), so that a holder that was
paused past its lease cannot store over what its successor has stored. While the loader runs, one thread for the whole
process renews every lease it holds, each time a third of the lease has passed; it starts with the first lease and
sleeps where there is none. A holder that dies (SIGKILL, OOM, hard time limit, lost machine) renews nothing, so the next
waiter takes over within one lease, however long the task would have run.

A lease is re-entrant: what runs on behalf of its holder (a nested call, a task that the holder's task has sent and
waits for) must not wait for it, for that would be a deadlock (PrefectHQ/prefect#18600). The fences that the running
code acts under are in :func:`held`; the Celery side sends them along with messages.

What is renewed is held weakly, by the code that loads. A signal handler (Celery's soft time limit) may raise between
any two steps of it, the end of a ``with`` statement included: a lease that nobody refers to any more lapses.

Thread- and greenlet-safe. Nothing here outlives a fork: the child builds its own, and the parent goes on renewing.
A loader that holds the GIL, or under gevent and eventlet the hub, for longer than a lease loses it, is loaded by
another process too, and stores nothing over that one's result.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Final, Protocol, Self

from celery_mlcache.errors import RemoteStoreError
from celery_mlcache.protocols import Grant, RemoteStore

SLICE: Final = 1.0  # seconds that a waiter waits before it asks whether the server is still there
AGAIN: Final = "again"  # what waiters are told: look again, there may be a value
ALONE: Final = "alone"  # ... or: what was loaded cannot be shared, so load your own


class LeaseCounts(Protocol):
    """What is counted here."""

    leases: int
    leases_lost: int
    takeovers: int


class Lease:
    """One lease of this process; a context manager that gives it back.

    Attributes:
        fence: The fencing token; it only grows from holder to holder.
        word: What those who wait are told when it is given back.
    """

    __slots__ = ("__weakref__", "_leases", "_token", "fence", "is_borrowed", "key", "renew_at", "word")

    def __init__(self, leases: Leases, key: str, fence: int, *, is_borrowed: bool = False) -> None:
        self.key = key
        self.fence = fence
        self.word = AGAIN
        self.is_borrowed = is_borrowed
        self.renew_at = 0.0
        self._leases = leases
        self._token: Token[tuple[int, ...]] | None = None

    def __enter__(self) -> Self:
        self._token = _HELD.set((*_HELD.get(), self.fence))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._token is not None:
            with suppress(ValueError):  # a greenlet or generator that was moved to another context
                _HELD.reset(self._token)
            self._token = None
        if not self.is_borrowed:
            self._leases.give_back(self)


class Leases:
    """The leases of one process.

    Args:
        store: Where leases are written down.
        owner: Who this process is, and no other; ``explain`` shows it.
        seconds: How long a lease lasts unless it is renewed.
        clock: Monotonic seconds.
        counts: Where things are counted.
    """

    def __init__(
        self, store: RemoteStore, *, owner: str, seconds: float, clock: Callable[[], float], counts: LeaseCounts
    ) -> None:
        self.seconds = seconds
        self._store = store
        self._owner = owner
        self._clock = clock
        self._counts = counts
        self._pid = os.getpid()
        self._held: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()
        # Re-entrant: a signal handler or finalizer that runs under it may use the cache.
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def ask(self, key: str, *, seen: int | None, is_waiting: bool) -> Grant:
        """Ask for the lease of *key*; see :meth:`RemoteStore.acquire`. What is granted must be held at once.

        Raises:
            RemoteStoreError: Redis failed; the lease, if it was granted all the same, lapses.
        """
        return self._store.acquire(key, owner=self._owner, lease=self.seconds, seen=seen, is_waiting=is_waiting)

    def hold(self, key: str, grant: Grant) -> Lease:
        """Return the lease that was granted, renewed from now on until it is given back."""
        lease = Lease(self, key, grant.fence)
        lease.renew_at = self._clock() + self.seconds / 3
        self._counts.leases += 1
        self._counts.takeovers += grant.is_takeover
        with self._changed:
            self._held[id(lease)] = lease
            if self._thread is None and not self._is_closed:
                self._start()
            if len(self._held) == 1:
                self._changed.notify()
        return lease

    def is_mine(self, grant: Grant) -> bool:
        """Return whether this process was granted that lease, and does not know: the reply was lost on its way."""
        return grant.owner == self._owner and all(lease.fence != grant.fence for lease in list(self._held.values()))

    def borrow(self, key: str, fence: int) -> Lease:
        """Return a lease under which this code runs already, further up; it is neither renewed nor given back."""
        return Lease(self, key, fence, is_borrowed=True)

    def wait(self, key: str, grant: Grant, timeout: float) -> str:
        """Wait for the holder's word, at most *timeout* seconds and at most as long as its lease lasts.

        Returns :data:`AGAIN` or :data:`ALONE`, or "" where the time is up: the lease may have lapsed, or been renewed.

        Raises:
            RemoteStoreError: Redis failed, at most a second and a socket timeout after it did.
        """
        give_up = self._clock() + min(timeout, max(grant.remaining, 0.001))
        while True:
            left = give_up - self._clock()
            if left <= 0:
                return ""
            # In slices: a server that froze or went away without a word is noticed, though it owes no answer yet.
            word = self._store.await_release(key, grant.fence, min(left, SLICE))
            if word:
                return word

    def give_back(self, lease: Lease) -> None:
        """Give *lease* back and wake those who wait; never raises for Redis: it lapses then."""
        if os.getpid() != self._pid:
            return  # this process was forked inside of the load: the lease is the parent's, and so may the lock be
        with self._changed:
            self._held.pop(id(lease), None)
        with suppress(RemoteStoreError):
            if not self._store.release(lease.key, lease.fence, word=lease.word):
                self._counts.leases_lost += 1

    def close(self) -> None:
        """End the thread; what is held is not renewed any more, and lapses unless it is given back before."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def __len__(self) -> int:
        """Return how many leases this process holds."""
        return len(self._held)

    # ---- the thread -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._keep, name="mlcache-leases", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads: leases last as long as they were granted for, and may be lost
            self._thread = None

    def _keep(self) -> None:
        while True:
            with self._changed:
                while not self._held and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                # All that is held in one go: then what comes due next comes due together.
                batch = list(self._held.values())
                pause = min((lease.renew_at for lease in batch), default=0.0) - self._clock()
                if batch and pause > 0:
                    batch.clear()  # or it would hold what nobody else does
                    self._changed.wait(pause)
            self._renew(batch)
            batch.clear()

    def _renew(self, batch: list[Lease]) -> None:
        if not batch:
            return
        asked_at = self._clock()
        try:
            kept = self._store.renew([(lease.key, lease.fence) for lease in batch], lease=self.seconds)
        except RemoteStoreError:
            # Whatever Redis says meanwhile, the fence decides: go on asking, sooner.
            for lease in batch:
                lease.renew_at = self._clock() + self.seconds / 6
            return
        for lease, is_kept in zip(batch, kept, strict=True):
            if is_kept:
                lease.renew_at = asked_at + self.seconds / 3
                continue
            with self._changed:
                # Lost, or given back while we asked. The loader goes on; its result is fenced.
                self._held.pop(id(lease), None)


def begin() -> None:
    """Forget what this thread or greenlet held: where a message begins, it is what an interrupt has left behind."""
    if _HELD.get():
        _HELD.set(())


def held() -> tuple[int, ...]:
    """Return the fences of the leases that the running code acts under, in this thread or greenlet."""
    return _HELD.get()


_HELD: ContextVar[tuple[int, ...]] = ContextVar("mlcache_held", default=())
