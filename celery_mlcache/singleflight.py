"""Single-flight: one loader run per key in this process, and the others wait for it.

What may live here: who leads and who waits. What a flight loads, and whether its result may be kept, the manager
knows.

Theory of operation
-------------------
``dict.setdefault`` elects the leader without a lock. The leader lands a result or abandons; either way the flight
leaves the table first and only then wakes its followers, so that a follower who joins again meets a new flight, never
the same one. The lock stands where a flight is taken out of the table or replaced in it, which must not cross.

A caller does not wait

- for a flight that an invalidation has overtaken: it leads a new one, and those who wait for the old one still get
  the old one's result, which was good enough when they asked;
- for a flight of its own thread or greenlet (a loader that asks for its own key): it leads a private flight, which
  nobody joins;
- longer than ``max_wait`` in all, whatever happens (two loaders that ask for each other's key): then likewise.

A flight older than ``max_wait`` is joined by nobody: should a leader be killed between ``join`` and ``with``, its key
heals by that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Flight:
    """One loader run; the leader uses it as a context manager, and leaving it without a landing abandons it.

    Attributes:
        ticket: The leader's, None until it is set; the leader must set it before it reads anything.
        result: What the loader returned; only after a landing.
    """

    __slots__ = ("_event", "_flights", "_is_landed", "_is_over", "began", "key", "owner", "result", "ticket")

    def __init__(self, flights: SingleFlight, key: str, began: float) -> None:
        self.key = key
        self.began = began
        self.owner = threading.get_ident()
        self.ticket: object = None
        self.result: Any = None
        self._flights = flights
        self._event: threading.Event | None = None
        self._is_over = False
        self._is_landed = False

    def land(self, result: Any) -> None:
        """Hand *result* to every follower."""
        self.result = result
        self._is_landed = True
        self._end()

    def abandon(self) -> None:
        """Give up: the followers are woken, and one of them leads next. Nothing happens after a landing."""
        if not self._is_over:
            self._end()

    def wait(self, timeout: float) -> bool:
        """Wait at most *timeout* seconds; return whether the flight has landed."""
        if not self._is_over and timeout > 0:
            event = self._flights.event_of(self)
            # Asked again now that the leader can see the event: it may have ended before, and set nothing.
            if not self._is_over:
                event.wait(timeout)
        return self._is_landed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abandon()

    def _end(self) -> None:
        self._flights.remove(self)
        self._is_over = True
        if self._event is not None:
            self._event.set()


class SingleFlight:
    """The flights of one process. Thread- and greenlet-safe; after a fork the child builds a new one.

    Args:
        max_wait: Seconds a follower waits at most, over all the flights it follows one after the other.
        clock: Monotonic seconds.
    """

    def __init__(self, *, max_wait: float, clock: Callable[[], float]) -> None:
        self.max_wait = max_wait
        self._clock = clock
        self._table: dict[str, Flight] = {}
        self._lock = threading.RLock()  # a signal handler or finalizer that runs under it may use the cache

    def __len__(self) -> int:
        """Return how many flights are under way."""
        return len(self._table)

    def board(
        self, key: str, is_current: Callable[[Flight], bool], give_up: float | None = None
    ) -> tuple[Flight, bool]:
        """Return a landed flight and False, or True and one that the caller leads; waits in between.

        ::

            flight, is_leader = flights.board(key, is_current)
            if not is_leader:
                return flight.result
            with flight:
                flight.ticket = ...
                flight.land(loader())

        Args:
            key: What is loaded.
            is_current: As for :meth:`join`.
            give_up: When to wait no longer, by the clock; None for ``max_wait`` seconds from now.
        """
        if give_up is None:
            give_up = self._clock() + self.max_wait
        while True:
            flight, is_leader = self.join(key, is_current)
            if is_leader or flight.wait(give_up - self._clock()):
                return flight, is_leader
            if self._clock() >= give_up:
                return self.alone(key), True

    def alone(self, key: str) -> Flight:
        """Return a flight that nobody joins, for a leader that waits for nobody."""
        return Flight(self, key, self._clock())

    def join(self, key: str, is_current: Callable[[Flight], bool]) -> tuple[Flight, bool]:
        """Return ``(flight, is_leader)`` without waiting; the leader must enter the flight at once.

        Args:
            key: What is loaded.
            is_current: Says whether nothing has happened to the key since the flight's ticket was opened. A flight
                without a ticket has not read anything yet, and so is current. Called without a lock, maybe twice.
        """
        mine = Flight(self, key, self._clock())
        while True:
            flight = self._table.setdefault(key, mine)
            if flight is mine:
                return mine, True
            if mine.began - flight.began < self.max_wait:
                if flight.owner == mine.owner:
                    return mine, True  # private: it is not in the table
                if is_current(flight):
                    return flight, False
            with self._lock:
                # Another newcomer may have replaced it, or its leader may have ended it, since we looked.
                if self._table.get(key) is flight:
                    self._table[key] = mine
                    return mine, True

    def remove(self, flight: Flight) -> None:
        """Take *flight* out of the table if it is still there; for :class:`Flight`."""
        with self._lock:
            if self._table.get(flight.key) is flight:
                del self._table[flight.key]

    def event_of(self, flight: Flight) -> threading.Event:
        """Return the event that ends *flight*'s waiting; for :class:`Flight`.

        Made when the first follower comes: an Event costs as much as 30 locks, and most flights have none.
        """
        with self._lock:
            event = flight._event  # noqa: SLF001 - the lock that guards it is here
            if event is None:
                event = flight._event = threading.Event()  # noqa: SLF001 - as above
            return event
