"""L1 as the protocol lets it answer: the store, the coherence state and the one lock that joins them.

What may live here: each step that must be indivisible against the backplane's thread, namely a decision of
:class:`~celery_mlcache.coherence.Coherence` and the change of L1 that follows from it. No I/O, no codec, no user code
and no log call runs under the lock; nothing here knows that there is an L2.

A tier is built once in a process and never outlives a fork: a backplane's thread that is slow to end can feed only
the tier it was started for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Literal

from celery_mlcache.coherence import Act, Coherence, Departure, Ticket
from celery_mlcache.entry import MISS, Entry
from celery_mlcache.errors import NotAnIntegerError
from celery_mlcache.local import Local
from celery_mlcache.protocols import Fence, Pulse, Shelved, Snapshot
from celery_mlcache.stats import Stats
from celery_mlcache.wire import Message

DRIFT: Final = 0.999  # our clock may run slower than the server's; twice what NTP slews at most
ROUNDING: Final = 0.002  # seconds: Redis counts lives and clocks in whole milliseconds, rounded down

log = logging.getLogger("celery_mlcache")


class Tickets:
    """A context manager that holds tickets; see :meth:`Tier.tickets` and :meth:`Tier.writing`.

    A class, for a generator costs three times as much, and every read from L2 makes one.
    """

    __slots__ = ("_is_writing", "_keys", "_lock", "_tickets", "_tier")

    def __init__(self, tier: Tier, lock: threading.RLock, keys: Sequence[str], *, is_writing: bool = False) -> None:
        self._tier = tier
        self._lock = lock
        self._keys = keys
        self._is_writing = is_writing
        self._tickets: list[Ticket] = []

    def __enter__(self) -> list[Ticket]:
        with self._lock:
            self._tickets = [self._tier.coherence.open(key) for key in self._keys]
        return self._tickets

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        coherence, local = self._tier.coherence, self._tier.local
        # A refusal by the server itself is an outcome that is known.
        is_unknown = self._is_writing and kind is not None and not issubclass(kind, NotAnIntegerError)
        with self._lock:
            for ticket in self._tickets:
                if is_unknown:
                    coherence.cancel(ticket)
                    if local is not None:
                        local.discard(ticket.key)
                coherence.close(ticket)


class Tier:
    """One process's L1 under the coherence protocol; a :class:`~celery_mlcache.protocols.BackplaneListener`.

    Thread- and greenlet-safe.

    Args:
        coherence: The protocol's state; only this object changes it.
        local: The store, or None where L1 is off: the bookkeeping goes on, for fills and tokens need it.
        stats: Where things are counted.
        namespace: For log records.
        l1_ttl: Seconds an entry lives in L1 at most.
        max_stale: Seconds after the last proof for which L1 may answer without a lease; 0: not at all.
        clock: Monotonic seconds.
        on_alive: Called when a heartbeat was answered.
        is_copy: What L1 holds are copies of what L2 holds, and must not outlive it.
    """

    def __init__(
        self,
        coherence: Coherence,
        local: Local | None,
        stats: Stats,
        *,
        namespace: str,
        l1_ttl: float,
        max_stale: float,
        clock: Callable[[], float],
        on_alive: Callable[[], None] | None = None,
        is_copy: bool = True,
    ) -> None:
        self.coherence = coherence
        self.local = local
        self.backplane_state: Literal["starting", "up", "down"] = "starting"
        self._stats = stats
        self._namespace = namespace
        self._l1_ttl = l1_ttl
        self._max_stale = max_stale
        self._clock = clock
        self._on_alive = on_alive
        self._drift, self._rounding = (DRIFT, ROUNDING) if is_copy else (1.0, 0.0)
        self._proof_clock = 0.0  # the server's clock at the last proof
        self._clock_offset: float | None = None  # the server's clock less ours
        # Re-entrant: the collector may run a user's finalizer under it, and that may use the cache.
        self._lock = threading.RLock()
        if local is not None:
            local.floors = coherence.floors

    # ---- reading L1 -----------------------------------------------------------------------------------------

    def look(self, key: str) -> Any:
        """Return what L1 may answer beyond the front, or MISS."""
        return self.look_closely(key)[0]

    def look_closely(self, key: str) -> tuple[Any, bool]:
        """Return what L1 may answer, or MISS, and whether that is without a lease, for want of anything better."""
        local, coherence = self.local, self.coherence
        if local is None:
            return MISS, False
        is_stale = False
        with self._lock:
            # The clock last: a pause after it can only make the answer as old as the pause.
            now = self._clock()
            if now < coherence.lease_until:
                entry = local.promote(key)
            elif self._max_stale and coherence.may_serve(now, self._max_stale):
                entry, is_stale = local.peek(key), True
            else:
                self._stats.bypassed += 1
                return MISS, False
        if entry is None or now >= entry.deadline:
            return MISS, False
        self._stats.l1_hits += 1
        self._stats.stale_served += is_stale
        return entry.read(), is_stale

    def live(self, key: str) -> Entry | None:
        """Return L1's entry where L1 is all there is."""
        if self.local is None:
            return None
        with self._lock:
            entry = self.local.peek(key)
        return entry if entry is not None and self._clock() < entry.deadline else None

    # ---- operations -----------------------------------------------------------------------------------------

    def tickets(self, keys: Sequence[str]) -> Tickets:
        """Hold a ticket for each key: opened before anything is sent, closed however the operation ends."""
        return Tickets(self, self._lock, keys)

    def writing(self, keys: Sequence[str]) -> Tickets:
        """Hold tickets round a write; if it fails in any way it may have happened: forget the copies."""
        return Tickets(self, self._lock, keys, is_writing=True)

    def keep(self, ticket: Ticket, stamp: int, shelved: Shelved, life: tuple[float, float]) -> None:
        """Put a copy into L1 if nothing newer has passed; *life* is (monotonic start, seconds in L2)."""
        sent_at, remaining = life
        deadline = sent_at + min(remaining * self._drift - self._rounding, self._l1_ttl)
        with self._lock:
            value, thaw, tags = shelved
            is_admitted = self.coherence.commit(ticket, stamp, tags)
            if self.local is None:
                return
            ttl = deadline - self._clock()
            if is_admitted and ttl > 0:
                self.local.put(ticket.key, Entry(value, stamp, deadline, self.coherence.epoch, thaw, tags), ttl)
                return
            # Reads must not go backward when the lease returns.
            self.local.discard_older(ticket.key, stamp)
        self._stats.l1_refused += 1

    def forget(self, tickets: Sequence[Ticket], stamp: int) -> None:
        """This process removed the keys under *stamp*."""
        with self._lock:
            for ticket in tickets:
                self.coherence.commit(ticket, stamp)
                if self.local is not None:
                    self.local.discard_older(ticket.key, stamp)

    def missed(self, ticket: Ticket, snapshot: Snapshot) -> None:
        """L2 had nothing (or nothing readable): a copy from before that instant must not answer later."""
        with self._lock:
            self.coherence.note(snapshot.token)
            self.coherence.missed(ticket, 0 if snapshot.data is not None else snapshot.stamp, snapshot.floor)
            if self.local is not None:
                self.local.void_below(snapshot.floor)  # the server's own: garbage must not raise it for good
                self.local.discard_older(ticket.key, snapshot.token + 1)

    def met(self, ticket: Ticket, stamp: int) -> None:
        """L2 had a value of *stamp*, and no copy of it is to be kept."""
        with self._lock:
            self.coherence.commit(ticket, stamp)
            if self.local is not None:
                self.local.discard_older(ticket.key, stamp)

    def drop(self, key: str, token: int) -> None:
        """Something newer than *token* may be in L2: forget a copy that is not."""
        with self._lock:
            if self.local is not None:
                self.local.discard_older(key, token + 1)

    def admits(self, ticket: Ticket, stamp: int, tags: Sequence[str]) -> bool:
        """Has nothing happened to the key or *tags* since *stamp* was the newest?"""
        with self._lock:
            return self.coherence.admits(ticket, stamp, tags)

    def fence(self, ticket: Ticket, fence: Fence, taken_at: float, tags: Sequence[str]) -> Fence | None:
        """Return what a fill may be fenced with now, or None; *taken_at* is our clock when *fence* was asked for."""
        with self._lock:
            now = self._clock()
            token = self.coherence.fence(ticket, fence.token, taken_at, now, tags)
            if token is None:
                return None
            is_covered = self.coherence.is_covered(ticket, now)
            return Fence(token, max(fence.clock, self._proof_clock) if is_covered else fence.clock)

    def depart(self, ticket: Ticket, tags: tuple[str, ...]) -> Departure:
        """Note what a flight begins with."""
        with self._lock:
            coherence = self.coherence
            return Departure(ticket, self._clock(), coherence.floors.newest, coherence.required, tags=tags)

    def is_current(self, flight: Departure, tags: Sequence[str]) -> bool:
        """May a newcomer with *tags* share the answer of a flight? See :meth:`Coherence.is_current`."""
        with self._lock:
            return self.coherence.is_current(flight, self._clock(), tags)

    @property
    def alone(self) -> threading.RLock:
        """The lock, for making one step of several where L1 is all there is."""
        return self._lock

    def own_stamp(self) -> int:
        """Take a stamp where there is no Redis to take it from."""
        with self._lock:
            self.coherence.note(self.coherence.highest + 1)
            return self.coherence.highest

    def flush(self, floor: int) -> None:
        """This process raised the floor."""
        with self._lock:
            self.coherence.flushed(floor)
            if self.local is not None:
                self.local.void_below(floor)

    def invalidate(self, tags: Sequence[str], prefixes: Sequence[str], stamp: int) -> None:
        """This process invalidated *tags* or *prefixes* under *stamp*."""
        with self._lock:
            self.coherence.invalidated(tags, prefixes, stamp)
            self._void_wide(tags, prefixes, stamp)

    def void(self) -> None:
        """Start again with an empty L1: a flush of this process may happen yet, or not at all."""
        with self._lock:
            self.coherence.void()
            if self.local is not None:
                self.local.void(self.coherence.epoch)

    def barrier(self, stamp: int) -> bool:
        """Withdraw the lease until *stamp* has been applied; True asks for a heartbeat."""
        with self._lock:
            act = self.coherence.barrier(stamp, self._clock())
            self._apply(act)
        return act.ask

    # ---- what the backplane tells (its thread) --------------------------------------------------------------

    def highest_stamp(self) -> int:
        """Return the highest stamp known here."""
        return self.coherence.highest

    def on_subscribed(self) -> None:
        """Count the subscription; only a heartbeat proves it."""
        self._stats.subscriptions += 1

    def on_message(self, message: Message | None) -> bool:
        """Apply one message; False asks for a heartbeat at once."""
        with self._lock:
            act = self.coherence.observe(message)
            self._apply(act)
        self._stats.messages += 1
        if message is None:
            self._stats.message_garbage += 1
        elif self._clock_offset is not None:
            self._stats.add_lag(max(0.0, self._clock() + self._clock_offset - message.server_time))
        return not act.ask

    def on_pulse(self, pulse: Pulse) -> None:
        """Renew the lease."""
        with self._lock:
            act = self.coherence.prove(pulse)
            # Half a round trip too early at most: the clock stood at the question's end of the trip or later.
            self._proof_clock = pulse.server_time - (pulse.received_at - pulse.sent_at)
            self._apply(act)
        # Half a round trip is the error; the server's clock itself never enters a decision.
        self._clock_offset = pulse.server_time - (pulse.sent_at + pulse.received_at) / 2
        if self._on_alive is not None:
            self._on_alive()
        if self.backplane_state != "up":
            self.backplane_state = "up"
            more = {"namespace": self._namespace, "stamp": pulse.stamp}
            log.info("the cache's backplane is up (%s)", self._namespace, extra=more)

    def on_lost(self, why: str) -> None:
        """End the lease."""
        with self._lock:
            self.coherence.lose()
        if self.backplane_state == "up":
            self._stats.subscription_losses += 1
        if self.backplane_state != "down":
            self.backplane_state = "down"
            more = {"namespace": self._namespace, "why": why}
            log.warning("the cache's backplane is down: %s (%s)", why or "it ended", self._namespace, extra=more)

    def _apply(self, act: Act) -> None:
        """Do to L1 what coherence decided; under the lock."""
        if act.void:
            self._stats.add_gap(act.void)
            self._stats.reseeds += act.void == "reseed"
        local = self.local
        if local is None:
            return
        if act.void:
            local.void(self.coherence.epoch)
        if act.is_flush:
            self._stats.flushes += 1
            local.void_below(act.stamp)
        for key in act.keys:
            local.discard_older(key, act.stamp)
        self._void_wide(act.tags, act.prefixes, act.stamp)

    def _void_wide(self, tags: Sequence[str], prefixes: Sequence[str], stamp: int) -> None:
        if self.local is not None:
            for tag in tags:
                self.local.void_tag(tag, stamp)
            for prefix in prefixes:
                self.local.void_prefix(prefix, stamp)
