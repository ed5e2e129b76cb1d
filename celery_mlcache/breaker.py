"""The circuit breaker before L2: after a few failures in a row, calls fail at once instead of waiting for a timeout.

What may live here: when a call may go. What the calls are, what counts as a failure and what is logged is the
caller's business; clock and randomness are parameters.

Theory of operation
-------------------
::

    closed ── threshold failures in a row ──▶ open ── reopen time, or proof of life, and a caller ──▶ half-open
      ▲                                        ▲                                                        │   │
      └──────────── the probe succeeds ────────┼────────────────────────────────────────────────────────┘   │
                                               └──────────── the probe fails: twice as long, up to 8 times ──┘

Half-open lets exactly one caller through: the probe, known by its thread (or greenlet), so that the report of a late
call, begun before the breaker opened, neither closes nor reopens it. A probe that never reports (its thread was
killed) lapses after one reset period. While closed, ``allow`` and ``success`` take no lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Literal

State = Literal["closed", "open", "half-open"]

MAX_BACKOFF: Final = 8
JITTER: Final = 0.1  # of the reopen time, either way, so that a fleet does not probe in step


class CircuitBreaker:
    """Decides whether a call may go. Thread- and greenlet-safe; after a fork the child builds a new one.

    A caller that was allowed reports ``success()`` or ``failure()`` on the same thread.

    Args:
        threshold: Failures in a row that open it.
        reset: Seconds from opening to the first probe, and for which a silent probe is waited for.
        clock: Monotonic seconds.
        jitter: Like ``random.random``.
        on_change: Called with (old, new) state on the thread that caused the change, outside the lock: two changes
            may be reported in either order. It must not raise.
    """

    def __init__(
        self,
        *,
        threshold: int,
        reset: float,
        clock: Callable[[], float],
        jitter: Callable[[], float],
        on_change: Callable[[str, str], None] | None = None,
    ) -> None:
        self.opened_count = 0  # times it left "closed"; a failed probe is the same outage
        self._threshold = threshold
        self._reset = reset
        self._clock = clock
        self._jitter = jitter
        self._on_change = on_change
        self._lock = threading.RLock()  # a signal handler or finalizer that runs under it may use the cache
        self._is_closed = True
        self._failures = 0  # stays above 0 while open, so that success() looks no further than this when closed
        self._backoff = 1
        self._due = 0.0  # open: the next probe may go; half-open: the probe has lapsed
        self._prober: int | None = None

    @property
    def state(self) -> State:
        """Return the state; "open" lasts until a caller becomes the probe, however long that takes."""
        if self._is_closed:
            return "closed"
        return "open" if self._prober is None else "half-open"

    def allow(self) -> bool:
        """Return whether the caller may call; whoever gets True while it is not closed is the probe."""
        if self._is_closed:
            return True
        with self._lock:
            old = self.state
            now = self._clock()
            if old == "closed":  # a probe has succeeded since we looked
                return True
            if now < self._due:
                return False
            # Asked when the call begins: gevent and eventlet put their own function in threading.
            self._prober = threading.get_ident()
            self._due = now + self._reset
        self._tell(old, "half-open")
        return True

    def success(self) -> None:
        """Report that a call succeeded."""
        if not self._failures:
            return
        with self._lock:
            old = self.state
            if old != "closed" and self._prober != threading.get_ident():
                return  # a late call; what it saw was before the failures
            self._failures = 0
            self._backoff = 1
            self._prober = None
            self._is_closed = True
        self._tell(old, "closed")

    def failure(self) -> None:
        """Report that a call failed in a way that speaks against the server."""
        with self._lock:
            old = self.state
            if old == "closed":
                self._failures += 1
                if self._failures < self._threshold:
                    return
                self.opened_count += 1
            elif self._prober == threading.get_ident():
                self._backoff = min(2 * self._backoff, MAX_BACKOFF)
            else:
                return  # a late call; the breaker knows already
            self._prober = None
            self._due = self._clock() + self._reset * self._backoff * (1 + JITTER * (2 * self._jitter() - 1))
            self._is_closed = False
        self._tell(old, "open")

    def proof_of_life(self) -> None:
        """Say that something else has seen the server alive: the next caller may probe at once."""
        if self._is_closed:
            return
        with self._lock:
            if self._prober is None:
                self._due = self._clock()

    def _tell(self, old: State, new: State) -> None:
        if self._on_change is not None and new != old:
            self._on_change(old, new)
