"""The cache manager: the only file in which the order of the levels is written.

How a look-up flows::

    get(key) ── lease and front ──▶ value                            L1, one frame, no lock
        └── _get_slow ── tier.look ──▶ value                         L1, under its lock
               └── _fetch ── open a ticket, read L2 ──▶ value        L2, one round trip
                      ├── the ticket still admits it? keep a copy
                      └── MISS ──▶ default, or the loader (get_or_set) and a fenced fill

Whether a copy is true is :class:`~celery_mlcache.tier.Tier`'s to decide; this file asks it and moves values.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar

from celery_mlcache.backplane import Backplane
from celery_mlcache.breaker import CircuitBreaker
from celery_mlcache.coherence import Coherence, Departure, Ticket
from celery_mlcache.entry import MISS, Entry
from celery_mlcache.errors import (
    CacheClosedError,
    CallInProgressError,
    CodecError,
    NotAnIntegerError,
    RemoteStoreError,
    SerializationError,
    is_interrupt,
)
from celery_mlcache.keys import check_key, check_prefix, check_tags, format_token, parse_token
from celery_mlcache.leases import ALONE, Lease, Leases, held
from celery_mlcache.protocols import Fence, Grant, RemoteStore, Shelved, Snapshot, ValueCodec
from celery_mlcache.singleflight import Flight, SingleFlight
from celery_mlcache.stats import Stats
from celery_mlcache.tier import Tier
from celery_mlcache.wire import HEAD_SIZE, MAX_INTEGER

T = TypeVar("T")
Contention = Literal["wait", "stale", "retry", "compute", "raise"]
Level = Literal["l1", "l2", "shared", "miss", "stale"]
_Sum = tuple[int, int, float, tuple[str, ...]]  # stamp, number, seconds left, tags
_Collection = list[str] | tuple[str, ...] | set[str] | frozenset[str]

BATCH: Final = 500  # keys in one script: Redis serves nobody else meanwhile
MAX_CAS_TRIES: Final = 100
MAX_LOST: Final = 3  # times that L2 may fail a call over a lease, though it answers reads, before it loads without
MAX_TTL: Final = 10 * 365 * 86400.0  # seconds; far above it Redis refuses the command

log = logging.getLogger("celery_mlcache")


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that the manager itself decides by; all times in seconds."""

    namespace: str
    l2_ttl: float = 3600.0
    ttl_jitter: float = 0.0
    is_signed: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """What one process's cache is made of; the factory makes it, and makes it again after a fork."""

    policy: Policy
    codec: ValueCodec
    tier: Tier
    flights: SingleFlight
    stats: Stats
    remote: RemoteStore | None = None
    backplane: Backplane | None = None
    breaker: CircuitBreaker | None = None
    leases: Leases | None = None
    abandon: Callable[[], None] | None = None  # in a forked child: let go of inherited sockets


class Loaded(NamedTuple):
    """What a loader made, and how it is to be kept.

    Attributes:
        value: The value.
        life: Seconds that it lives; None for the default.
        tags: What it can be invalidated by, beside its key.
        stale_life: Seconds beyond its life for which it is kept in L2, to be served stale.
        is_kept: Whether it is to be stored at all.
        is_jittered: Whether the cache's jitter shortens its life.
        max_size: Bytes that it may take in Redis; None for any.
        is_optional: Where it cannot be stored, that is no error even if ``strict``.
    """

    value: Any
    life: float | None = None
    tags: tuple[str, ...] = ()
    stale_life: float = 0.0
    is_kept: bool = True
    is_jittered: bool = True
    max_size: int | None = None
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """How a look-up goes on where no level has a value; for :meth:`CacheManager.resolve`.

    Attributes:
        load: Makes the value.
        tags: Those of its tags that are known before.
        wants_stale: A stale value will do, and nobody loads then.
        forgives: Says of an Exception that *load* has raised whether a stale value may stand in for it.
        is_shared: One load at a time in the whole fleet, by a lease; else in this process.
        contention: What to do while another one loads.
        max_wait: Seconds to wait for others in all; None for the cache's setting.
        ancestry: Returns fences of leases that this call must not wait for, beside those of :func:`leases.held`.
    """

    load: Callable[[], Loaded]
    tags: tuple[str, ...] = ()
    wants_stale: bool = False
    forgives: Callable[[Exception], bool] | None = None
    is_shared: bool = False
    contention: Contention = "wait"
    max_wait: float | None = None
    ancestry: Callable[[], Sequence[int]] = tuple


class Answer(NamedTuple):
    """What a look-up has come to.

    Attributes:
        value: The value.
        level: Where it was found. "shared": another caller in this process was just loading it; "miss": nowhere.
        is_loaded: This caller's own loader made it. Where it ran and another's value won, this is that value.
        error: What the loader raised, where a stale value stands in for it.
        is_degraded: L2 did not answer.
        is_kept: What was loaded could be stored, and was not told not to be.
        is_stored: It was; else something has happened to the key meanwhile, or L2 did not take it.
    """

    value: Any
    level: Level
    is_loaded: bool = False
    error: Exception | None = None
    is_degraded: bool = False
    is_kept: bool = True
    is_stored: bool = False


class Glance(NamedTuple):
    """What a look-up of limited time has come to.

    Attributes:
        value: The value, or MISS.
        is_answered: Whether that was said in time.
        stamp: Where L2 has no value: when that was last removed, in the order of writes; 0: never, as far as is known.
        is_remote: L2 was asked.
    """

    value: Any
    is_answered: bool
    stamp: int = 0
    is_remote: bool = False


class Inspection(NamedTuple):
    """What there is of a key, found without changing anything.

    Attributes:
        value: The value, or MISS.
        level: Where it is: "stale" where its life has ended, None where it is nowhere.
        remaining: Seconds of life that it has left.
        tags: What it can be invalidated by.
        why: Why it is nowhere, in a sentence.
    """

    value: Any = MISS
    level: Literal["l1", "l2", "stale"] | None = None
    remaining: float | None = None
    tags: tuple[str, ...] = ()
    why: str = ""


@dataclass(slots=True)
class _Found:
    """What L2 said of one key, and what became of it."""

    ticket: Ticket
    taken_at: float  # monotonic, before the question left
    value: Any = MISS
    shelved: Shelved = Shelved(None)  # noqa: RUF009 - a constant
    token: int = 0
    stamp: int = 0
    clock: float = 0.0  # the server's, when it answered
    lease: int = 0  # the fence of the lease under which it is loaded
    is_absent: bool = False  # no live value, readable or not
    is_unanswered: bool = False
    is_stored: bool = False  # what was loaded for it


@dataclass(frozen=True, slots=True)
class _Draft:
    """A loaded value, ready to be stored."""

    found: _Found
    tail: bytes
    shelved: Shelved
    life: float  # seconds
    stale_life: float = 0.0  # seconds beyond it


class CacheManager:
    """A multi-level cache: L1 in this process over L2 in Redis, coherent over every process of the namespace.

    Thread-safe, greenlet-safe and fork-safe: a child starts with an empty L1 and connections of its own. Lazy:
    nothing is built, connected or started before the first use, in each process. A context manager; :meth:`close` is
    polite, not needed.

    At run time L2 trouble never raises (unless ``strict``): reads miss, loaders run, writes are dropped after the
    local invalidation, and all of it is counted in :meth:`stats`. Wrong arguments always raise: CacheKeyError for
    keys, ValueError for ``ttl``, SerializationError for a value that would come back altered.

    Not promised: writes by foreign clients and L2's own evictions are not announced, so they show after at most
    ``l1_ttl``; a write that could not reach Redis is dropped for every other process.

    Args:
        assemble: Makes the parts; called once in each process, on the first use. Must do no I/O.
        name: The namespace, for messages before the parts exist.
        clock: Monotonic seconds.
        rng: 0 to 1, for the jitter of lives.
    """

    def __init__(
        self,
        assemble: Callable[[], Parts],
        *,
        name: str = "default",
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._assemble = assemble
        self._name = name
        self._clock = clock
        self._rng = rng
        self._is_closed = False
        self._inherited: list[Parts] = []
        self.told = 0  # the token's stamp when the last parts were given up: what was seen stays seen
        self._reset()
        _MANAGERS.add(self)

    def _reset(self) -> None:
        self._parts: Parts | None = None
        self._build_lock = threading.RLock()  # re-entrant for the same reason as the tier's
        self._coherence = _unproven()
        self._front_get: Callable[[str], Entry | None] = _NO_FRONT.get
        self._l1_hits = 0

    def _forked(self) -> None:
        """Runs in the child, inside fork: drops references and builds nothing, for any inherited lock may be held.

        What is inherited stays referenced for ever, so that no destructor of it runs here.
        """
        if self._parts is not None:
            self._inherited.append(self._parts)
            self.told = self._parts.tier.coherence.token()
        self._reset()

    def _start(self) -> Parts:
        """Build this process's parts, without I/O; the backplane connects on its own thread."""
        with self._build_lock:
            if self._parts is not None:
                return self._parts
            if self._is_closed:
                raise CacheClosedError(self._name)
            parts = self._assemble()
            if self.is_running:
                return self._start()  # a signal handler came in between, and used the cache
            for inherited in self._inherited:
                if inherited.abandon is not None:
                    inherited.abandon()
            self._name = parts.policy.namespace
            self._coherence = parts.tier.coherence
            self._coherence.seen = self.told
            if parts.tier.local is not None:
                self._front_get = parts.tier.local.front_get
            self._parts = parts
            if parts.backplane is not None:
                parts.backplane.start(parts.tier)
            return parts

    def warm(self) -> None:
        """Build this process's cache and start its backplane now, without I/O on this thread; idempotent."""
        self._parts or self._start()

    @property
    def is_running(self) -> bool:
        """Return whether this process has built its parts."""
        return self._parts is not None

    def release(self, timeout: float = 1.0) -> None:
        """Stop the backplane, waiting at most *timeout* seconds for its thread, and close idle connections.

        The next use builds everything anew. Never raises; calls that are under way end as if L2 had failed.
        """
        with self._build_lock:
            parts, self._parts = self._parts, None
            self._front_get = _NO_FRONT.get
            self._coherence = _unproven()
        if parts is None:
            return
        self.told = parts.tier.coherence.token()
        if parts.leases is not None:
            parts.leases.close()
        if parts.backplane is not None:
            parts.backplane.stop(timeout)
        if parts.remote is not None:
            parts.remote.close()

    def close(self, timeout: float = 1.0) -> None:
        """Release everything for good: any later use raises CacheClosedError. Idempotent."""
        self._is_closed = True
        self.release(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "idle" if self._parts is None else "running"
        return f"<CacheManager {self._name!r} {state}>"

    # ---- reading --------------------------------------------------------------------------------------------

    def get(self, key: str, default: Any = None, *, stale: bool = False) -> Any:
        """Return the value of *key*, or *default*.

        ``None`` is a value; ask with ``default=MISS`` to tell it from a miss. With *stale*, a value that was stored
        with a ``stale_ttl`` and has expired since will do where there is no other: one more round trip.

        Raises:
            CacheKeyError: *key* cannot be a key.
            RemoteStoreError: Only with ``strict``.
        """
        # One own frame and no lock for a hit: tests/benchmarks. The lease is read before the entry: the other way
        # round, a lease granted in between would vouch for a copy that was fetched before it.
        lease = self._coherence.lease_until
        try:
            entry = self._front_get(key)
        except TypeError:
            entry = None  # unhashable: refused on the slow path
        if entry is not None:
            now = self._clock()
            if now < lease and now < entry.deadline:
                self._l1_hits += 1
                return entry.value if entry.thaw is None else entry.thaw(entry.value)
        return self._get_slow(key, default, is_lenient=stale)

    def _get_slow(self, key: str, default: Any, *, is_lenient: bool) -> Any:
        parts = self._parts or self._start()
        key = check_key(key)
        found = self._find_slow(parts, key)
        if found is not None:
            return found.value
        stale = self._find_stale(parts, key) if is_lenient else None
        return default if stale is None else stale.read()

    def _find_slow(self, parts: Parts, key: str) -> Answer | None:
        value, is_stale = parts.tier.look_closely(key)
        if value is not MISS:
            return Answer(value, "stale" if is_stale else "l1")
        if parts.remote is not None:
            with parts.tier.tickets((key,)) as tickets:
                value = self._fetch(parts, parts.remote, tickets)[0].value
                parts.stats.l2_hits += value is not MISS
        if value is not MISS:
            return Answer(value, "l2")
        parts.stats.misses += 1
        return None

    def exists(self, key: str) -> bool:
        """Return whether *key* has a live value; loads nothing into L1. Raises as :meth:`get`."""
        parts = self._parts or self._start()
        key = check_key(key)
        if parts.tier.look(key) is not MISS:
            return True
        snapshot = self._peek_remote(parts, key)
        is_there = snapshot is not None and snapshot.data is not None
        parts.stats.l2_hits += is_there
        parts.stats.misses += not is_there
        return is_there

    __contains__ = exists

    def ttl(self, key: str) -> float | None:
        """Return the seconds of life that *key* has left (in L2, or in L1 where there is no L2), or None."""
        parts = self._parts or self._start()
        key = check_key(key)
        if parts.remote is not None:
            snapshot = self._peek_remote(parts, key)
            return None if snapshot is None else snapshot.remaining
        entry = parts.tier.live(key)
        return None if entry is None else entry.deadline - self._clock()

    def front(self, key: str) -> Answer | None:
        """Return what the front of L1 answers, or None: ask :meth:`find` or :meth:`resolve` then. *key* is a str."""
        lease = self._coherence.lease_until  # as in get(), and written out for the same reason
        entry = self._front_get(key)
        if entry is not None:
            now = self._clock()
            if now < lease and now < entry.deadline:
                self._l1_hits += 1
                return Answer(entry.value if entry.thaw is None else entry.thaw(entry.value), "l1")
        return None

    def find(self, key: str) -> Answer | None:
        """Return what a look-up finds of *key*, and on which level, or None; raises as :meth:`get`."""
        return self.front(check_key(key)) or self._find_slow(self._parts or self._start(), key)

    def glance(self, key: str, within: float) -> Glance:
        """Return what is found of *key* *within* so many seconds.

        Never raises for Redis, and one that is too slow for this is not taken for an outage by others.
        """
        parts = self._parts or self._start()
        key = check_key(key)
        value, is_stale = parts.tier.look_closely(key)
        if parts.remote is None or (value is not MISS and not is_stale):
            return Glance(value, is_answered=True)
        with parts.tier.tickets((key,)) as tickets:
            try:
                found = self._fetch(parts, parts.remote, tickets, within=within)[0]
            except RemoteStoreError:  # strict
                return Glance(MISS, is_answered=False)
            parts.stats.l2_hits += found.value is not MISS
            return Glance(found.value, not found.is_unanswered, found.stamp, is_remote=True)

    def inspect(self, key: str) -> Inspection:
        """Return what there is of *key* and where, without counting, filling or changing anything.

        Raises:
            CacheKeyError: *key* cannot be a key.
            RemoteStoreError: Only with ``strict``.
        """
        parts = self._parts or self._start()
        key = check_key(key)
        entry = parts.tier.live(key) if self._clock() < self._coherence.lease_until else None
        if parts.remote is not None:
            seen = self._inspect_remote(parts, parts.remote, key, "l2" if entry is None else "l1")
        else:
            seen = Inspection(why="nothing is in L1, and there is no L2")
        if entry is None or (seen.level is not None and parts.remote is not None):
            return seen
        return Inspection(entry.read(), "l1", entry.deadline - self._clock(), entry.tags)

    def _inspect_remote(self, parts: Parts, remote: RemoteStore, key: str, level: Literal["l1", "l2"]) -> Inspection:
        snapshot = self._peek_remote(parts, key)
        if snapshot is None:
            return Inspection(why="L2 does not answer")
        if snapshot.data is not None:
            return self._inspected(parts, key, snapshot, level)
        with suppress(RemoteStoreError):
            (stale,) = remote.read((key,), seen=parts.tier.highest_stamp(), is_lenient=True)
            if stale.data is not None:
                return self._inspected(parts, key, stale, "stale")
        if snapshot.stamp:
            return Inspection(why="it was invalidated, or its life has ended, a while ago")
        return Inspection(why="nothing is stored: it was never computed, or has long been gone")

    def _inspected(self, parts: Parts, key: str, snapshot: Snapshot, level: Literal["l1", "l2", "stale"]) -> Inspection:
        assert snapshot.data is not None
        try:
            decoded = parts.codec.decode(key, snapshot.data)
        except CodecError as exc:
            return Inspection(why=f"what is stored cannot be read ({exc.reason})")
        return Inspection(decoded.value, level, snapshot.remaining, decoded.tags)

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values of those *keys* that have one; what L1 lacks is asked for in one round trip.

        Raises as :meth:`get`.
        """
        parts = self._parts or self._start()
        found, missing = self._look_many(parts, keys)
        if missing and parts.remote is not None:
            for batch in _batches(missing):
                with parts.tier.tickets(batch) as tickets:
                    for ticket, seen in zip(tickets, self._fetch(parts, parts.remote, tickets), strict=True):
                        if seen.value is not MISS:
                            found[ticket.key] = seen.value
                            parts.stats.l2_hits += 1
        parts.stats.misses += sum(key not in found for key in missing)
        return found

    # ---- reading or loading ---------------------------------------------------------------------------------

    def get_or_set(
        self,
        key: str,
        loader: Callable[[], T],
        ttl: float | None = None,
        *,
        tags: _Collection = (),
        stale_ttl: float = 0.0,
    ) -> T:
        """Return the value of *key*; on a miss run *loader* and keep its result.

        The loader runs once at a time for a key in this process; other callers wait for it, at most
        ``single_flight_wait`` seconds, and then run their own. A caller that comes after an invalidation never shares
        a loader that began before it. The result is stored by a fenced add: if the key was written, deleted or
        cleared since the miss, it is returned and not stored; if a live value was written meanwhile, that is
        returned.

        Args:
            key: The key.
            loader: Called without arguments.
            ttl: Seconds of life, > 0 and finite; None for the default.
            tags: What the result can be invalidated by, beside its key: see :meth:`invalidate_tags`.
            stale_ttl: Seconds for which the result is kept in L2 after it has expired, and served where a later
                *loader* raises an ``Exception`` (counted as ``stale_served``); 0: not at all.

        Raises:
            Exception: Whatever *loader* raises, unchanged, if there is nothing stale; nothing is stored then.
            CacheKeyError: *key* cannot be a key, or one of *tags* cannot be a tag.
            TypeError: *tags* is not a list, tuple or set.
            ValueError: *ttl* is out of range.
            RemoteStoreError: Only with ``strict``.
            SerializationError: Only with ``strict``; else a result that cannot be stored is returned and counted.
        """
        if ttl is not None:
            check_ttl(ttl)
        checked = check_tags(tags) if tags != () else ()
        if stale_ttl != 0:
            check_stale_ttl(stale_ttl)
        lease = self._coherence.lease_until  # as in get(), and written out for the same reason
        try:
            entry = self._front_get(key)
        except TypeError:
            entry = None
        if entry is not None:
            now = self._clock()
            if now < lease and now < entry.deadline:
                self._l1_hits += 1
                value: T = entry.value if entry.thaw is None else entry.thaw(entry.value)
                return value
        plan = Plan(
            lambda: Loaded(loader(), ttl, checked, stale_ttl),
            tags=checked,
            forgives=_any_error if stale_ttl else None,
        )
        loaded: T = self.resolve(key, plan).value
        return loaded

    def resolve(self, key: str, plan: Plan) -> Answer:
        """Return the value of *key* and where it was found; where no level has one, go by *plan*.

        What :meth:`get_or_set` does behind the front, with all that cached tasks need beside it: stale values that
        others refresh, one load at a time in the whole fleet, and a say in what happens meanwhile.

        Raises:
            CallInProgressError: Another one loads it, and the plan says not to wait.
            Exception: As :meth:`get_or_set`.
        """
        parts = self._parts or self._start()
        key = check_key(key)
        value, is_stale = parts.tier.look_closely(key)
        if value is not MISS:
            return Answer(value, "stale" if is_stale else "l1")
        if parts.remote is None and parts.tier.local is None:
            parts.stats.misses += 1
            return self._load_alone(parts, plan)  # switched off: every loader runs
        give_up = self._clock() + (parts.flights.max_wait if plan.max_wait is None else plan.max_wait)
        flight, is_leader = self._board(parts, key, plan, give_up)
        if not is_leader:
            if isinstance(flight.result, Shelved):
                parts.stats.coalesced += 1
                return Answer(flight.result.read(), "shared")
            return self._load_alone(parts, plan)  # the leader's result cannot be copied: no use in waiting in line
        with flight, parts.tier.tickets((key,)) as (ticket,):
            departure = parts.tier.depart(ticket, plan.tags)
            flight.ticket = partial(parts.tier.is_current, departure)
            return self._lead(parts, flight, departure, plan, give_up)

    def _load_alone(self, parts: Parts, plan: Plan) -> Answer:
        return Answer(self._load(parts, plan.load).value, "miss", is_loaded=True, is_kept=False)

    def _board(self, parts: Parts, key: str, plan: Plan, give_up: float) -> tuple[Flight, bool]:
        """Lead a flight of this process, or follow one to its end, or do what the plan says in place of waiting."""
        is_current = partial(_is_current, plan.tags)
        if plan.contention == "wait" or not plan.is_shared:
            return parts.flights.board(key, is_current, give_up)
        flight, is_leader = parts.flights.join(key, is_current)
        if is_leader:
            return flight, True
        if plan.contention in {"raise", "retry"}:
            raise CallInProgressError(key, "this process", 0.0)
        if plan.contention == "stale" and parts.remote is None:
            return parts.flights.board(key, is_current, give_up)
        return parts.flights.alone(key), True

    def _lead(self, parts: Parts, flight: Flight, departure: Departure, plan: Plan, give_up: float) -> Answer:
        """Find or load for everybody who follows this flight."""
        key = departure.ticket.key
        is_stale_asked, lost = plan.wants_stale, 0
        while True:
            (found,) = self._find_many(parts, [departure.ticket])
            departure.tags = (*departure.tags, *found.shelved.tags)  # before the token: then these are what counts
            departure.token = found.token
            if found.value is not MISS:
                parts.stats.l2_hits += parts.remote is not None
                flight.land(found.shelved)
                return Answer(found.value, "l2" if parts.remote is not None else "l1")
            if is_stale_asked and not found.is_unanswered:
                stale = self._find_stale(parts, key)
                if stale is not None:
                    parts.stats.misses += 1
                    return Answer(stale.read(), "stale")  # who follows finds it too, and knows what it is
                is_stale_asked = False
            turn = self._take_turn(parts, found, plan, give_up)
            lost += turn is False
            if turn is None or lost > MAX_LOST:
                break
            if isinstance(turn, Shelved):
                parts.stats.misses += 1
                return Answer(turn.read(), "stale")
            if isinstance(turn, Lease):
                with turn:
                    found.lease = turn.fence
                    answer = self._load_and_land(parts, flight, departure, found, plan)
                    turn.word = turn.word if answer.is_kept else ALONE
                    return answer
        return self._load_and_land(parts, flight, departure, found, plan)

    def _take_turn(self, parts: Parts, found: _Found, plan: Plan, give_up: float) -> Lease | Shelved | bool | None:
        """Ask for the fleet's lease, and wait for it if that is the plan.

        Returns the lease; or a stale value, for one is being loaded; or True: look again; or False: the same, for L2
        has failed, and whether that was a connection or the server the next look tells; or None: load without.
        """
        if parts.leases is None or not plan.is_shared or found.is_unanswered:
            return None
        key, left = found.ticket.key, give_up - self._clock()
        is_waiting = left > 0 and plan.contention in {"wait", "stale"}
        try:
            # What is there but cannot be read must not be taken for the value that another one has loaded.
            grant = parts.leases.ask(key, seen=0 if found.is_absent else found.stamp, is_waiting=is_waiting)
            if grant.is_mine:
                return parts.leases.hold(key, grant)
            return grant.has_value or self._contend(parts, parts.leases, key, grant, plan=plan, left=left)
        except RemoteStoreError as exc:
            self._failed(parts, exc)
            return False

    def _contend(
        self, parts: Parts, leases: Leases, key: str, grant: Grant, *, plan: Plan, left: float
    ) -> Lease | Shelved | bool | None:
        """Another one loads: do what the plan says, and return as :meth:`_take_turn` does."""
        if grant.fence in held() or grant.fence in plan.ancestry():
            return leases.borrow(key, grant.fence)
        if plan.contention in {"raise", "retry"}:
            raise CallInProgressError(key, grant.owner, grant.remaining)
        stale = self._find_stale(parts, key) if plan.contention == "stale" else None
        if stale is not None:
            return stale
        if left > 0 and plan.contention != "compute":
            return self._wait(parts, leases, key, grant, left)
        parts.stats.wait_timeouts += plan.contention != "compute"
        return None

    def _wait(self, parts: Parts, leases: Leases, key: str, grant: Grant, left: float) -> bool | None:
        parts.stats.waits += 1
        began = self._clock()
        try:
            word = leases.wait(key, grant, left)
        finally:
            parts.stats.wait_seconds += self._clock() - began
        return None if word == ALONE else True

    def _load_and_land(self, parts: Parts, flight: Flight, departure: Departure, found: _Found, plan: Plan) -> Answer:
        parts.stats.misses += 1
        try:
            loaded = self._load(parts, plan.load)
        except Exception as exc:
            is_forgiven = plan.forgives is not None and not is_interrupt(exc) and plan.forgives(exc)
            stale = self._find_stale(parts, found.ticket.key) if is_forgiven else None
            if stale is None:
                raise
            log.warning("a loader failed, and a stale value is served", exc_info=exc, extra={"key": found.ticket.key})
            return Answer(stale.read(), "stale", error=exc)
        draft = self._draft(parts, found, loaded)
        if draft is None:
            flight.land(None)
            return _loaded(loaded, found, is_kept=False)
        winner = self._fill(parts, [draft]).get(found.ticket.key)
        if winner is None:
            flight.land(draft.shelved)
            return _loaded(loaded, found, is_kept=True)
        departure.tags = (*departure.tags, *winner.shelved.tags)
        if parts.tier.is_current(departure, ()):
            flight.land(winner.shelved)  # else it may be dead to who came later, and they ask for themselves
        return Answer(winner.value, "miss")

    def get_or_set_many(
        self,
        keys: Iterable[str],
        loader: Callable[[list[str]], Mapping[str, Any]],
        ttl: float | None = None,
        *,
        tags: _Collection = (),
    ) -> dict[str, Any]:
        """Return the values of *keys*; *loader* gets the list of those that no level has and returns a mapping.

        One round trip reads, one fills. Keys that the mapping lacks are absent from the result and not stored; keys
        it has beyond those asked for are ignored. No single-flight: two callers may load the same key at once. Raises
        as :meth:`get_or_set`.
        """
        parts = self._parts or self._start()
        if ttl is not None:
            check_ttl(ttl)
        checked = check_tags(tags)
        found, missing = self._look_many(parts, keys)
        if not missing:
            return found
        with parts.tier.tickets(missing) as tickets:
            absent = []
            for seen in self._find_many(parts, tickets):
                if seen.value is MISS:
                    absent.append(seen)
                else:
                    found[seen.ticket.key] = seen.value
                    parts.stats.l2_hits += 1
            parts.stats.misses += len(absent)
            if absent:
                loaded = self._load(parts, lambda: loader([seen.ticket.key for seen in absent]))
                drafts = []
                for seen in absent:
                    if seen.ticket.key in loaded:
                        found[seen.ticket.key] = value = loaded[seen.ticket.key]
                        draft = self._draft(parts, seen, Loaded(value, ttl, checked))
                        if draft is not None:
                            drafts.append(draft)
                for key, winner in self._fill(parts, drafts).items():
                    found[key] = winner.value
        return found

    def _find_many(self, parts: Parts, tickets: Sequence[Ticket]) -> list[_Found]:
        if parts.remote is not None:
            return [found for batch in _batches(tickets) for found in self._fetch(parts, parts.remote, list(batch))]
        return [self._find_local(parts, ticket) for ticket in tickets]

    def _find_local(self, parts: Parts, ticket: Ticket) -> _Found:
        """Look again now that the ticket is open: another flight may have landed since the miss."""
        found = _Found(ticket, self._clock(), token=parts.tier.highest_stamp())
        entry = parts.tier.live(ticket.key)
        if entry is not None:
            parts.stats.l1_hits += 1
            found.value, found.shelved = entry.read(), _shelved(entry)
        return found

    def _load(self, parts: Parts, loader: Callable[[], T]) -> T:
        parts.stats.loads += 1
        began = self._clock()
        try:
            return loader()
        except BaseException:
            parts.stats.load_failures += 1
            raise
        finally:
            parts.stats.load_seconds += self._clock() - began

    def _draft(self, parts: Parts, found: _Found, loaded: Loaded) -> _Draft | None:
        """Return what was loaded, ready to be stored, or None where it is not to be, or the codec refuses it."""
        if not loaded.is_kept:
            return None
        key, value, tags = found.ticket.key, loaded.value, loaded.tags
        try:
            tail = parts.codec.encode(key, value, tags=tags)
            _check_size(tail, loaded)
            shelved = Shelved(*parts.codec.shelve(key, value, tail), tags)
        except SerializationError as exc:
            parts.stats.unserializable += 1
            if parts.policy.strict and not (loaded.is_optional or isinstance(exc, _TooLargeError)):
                raise
            if parts.stats.unserializable == 1:
                log.warning("a loaded value cannot be cached: %s", exc, extra={"key": key})
            return None
        return _Draft(found, tail, shelved, self._life_of(parts, loaded), loaded.stale_life)

    def _fill(self, parts: Parts, drafts: Sequence[_Draft]) -> dict[str, _Found]:
        """Store by fenced adds; return the live values that were there already, by key."""
        if parts.remote is None:
            return self._fill_local(parts, drafts)
        fenced: list[tuple[_Draft, Fence]] = []
        for draft in drafts:
            fence = self._fence(parts, draft)
            if fence is None:
                parts.stats.fills_refused += 1
            elif draft.found.is_absent:
                fenced.append((draft, fence))
            else:
                # A live value that cannot be read would win over every filler until it expires: swap it for ours.
                self._swap(parts, parts.remote, draft, fence)
        winners: dict[str, _Found] = {}
        for batch in _batches(fenced):
            winners |= self._fill_remote(parts, parts.remote, batch)
        return winners

    def _fence(self, parts: Parts, draft: _Draft) -> Fence | None:
        """Return what a store of *draft* may be fenced with, or None."""
        found = draft.found
        if found.is_unanswered:
            return None  # L2 did not answer the read
        fence = parts.tier.fence(found.ticket, Fence(found.token, found.clock), found.taken_at, draft.shelved.tags)
        return fence if fence is None or not found.lease else fence._replace(lease=found.lease)

    def _fill_remote(
        self, parts: Parts, remote: RemoteStore, batch: Sequence[tuple[_Draft, Fence]]
    ) -> dict[str, _Found]:
        sent_at = self._clock()
        try:
            outcomes = remote.fill(
                [(draft.found.ticket.key, draft.tail, draft.life, fence) for draft, fence in batch],
                stale_ttl=batch[0][0].stale_life,
            )
        except RemoteStoreError as exc:
            for draft, _ in batch:
                draft.found.is_unanswered = True
            self._dropped(parts, exc, len(batch))
            return {}
        winners: dict[str, _Found] = {}
        for (draft, fence), outcome in zip(batch, outcomes, strict=True):
            ticket = draft.found.ticket
            if outcome.is_stored:
                draft.found.is_stored = True
                parts.stats.fills += 1
                parts.tier.keep(ticket, fence.token, draft.shelved, (sent_at, draft.life))
            elif outcome.winner is not None:
                parts.stats.fills_lost += 1
                winner = self._take(parts, ticket, outcome.winner, sent_at)
                if winner.value is not MISS:
                    winners[ticket.key] = winner
            else:
                parts.stats.fills_refused += 1
        return winners

    def _fill_local(self, parts: Parts, drafts: Sequence[_Draft]) -> dict[str, _Found]:
        """Where L1 is all there is: a fill stores nothing over a live value, or over what happened since the miss."""
        winners: dict[str, _Found] = {}
        for draft in drafts:
            found = draft.found
            with parts.tier.alone:
                now = self._clock()
                entry = parts.tier.live(found.ticket.key)
                if entry is None and parts.tier.admits(found.ticket, found.token, draft.shelved.tags):
                    found.is_stored = True
                    parts.stats.fills += 1
                    parts.tier.keep(found.ticket, found.token, draft.shelved, (now, draft.life))
                elif entry is None:
                    parts.stats.fills_refused += 1
            if entry is not None:
                parts.stats.fills_lost += 1
                winners[found.ticket.key] = _Found(found.ticket, now, value=entry.read(), shelved=_shelved(entry))
        return winners

    def _swap(self, parts: Parts, remote: RemoteStore, draft: _Draft, fence: Fence) -> None:
        """Store by compare and set over what was found, if no one has written or removed the key since."""
        found, sent_at = draft.found, self._clock()
        key = found.ticket.key
        try:
            with parts.tier.writing((key,)):
                stamp = remote.replace(
                    key,
                    draft.tail,
                    expected=found.stamp,
                    ttl=draft.life,
                    seen=parts.tier.highest_stamp(),
                    fence=fence.token,
                    stale_ttl=draft.stale_life,
                )
        except RemoteStoreError as exc:
            found.is_unanswered = True
            self._dropped(parts, exc)
            return
        if stamp is None:
            parts.stats.fills_refused += 1
        else:
            found.is_stored = True
            parts.stats.fills += 1
            parts.tier.keep(found.ticket, stamp, draft.shelved, (sent_at, draft.life))

    # ---- writing --------------------------------------------------------------------------------------------

    def set(
        self, key: str, value: Any, ttl: float | None = None, *, tags: _Collection = (), stale_ttl: float = 0.0
    ) -> bool:
        """Store *value* on every level and invalidate every other process's copy, in one round trip.

        Args:
            key: The key.
            value: Anything the codec restores exactly; a later change of it does not change the cache.
            ttl: Seconds of life, > 0 and finite; None for the default.
            tags: What it can be invalidated by, beside its key, in place of what it had: see :meth:`invalidate_tags`.
            stale_ttl: Seconds for which it is kept in L2 after it has expired, for those who take it stale.

        Returns:
            Whether it was stored. False: L2 did not take it (counted as ``writes_dropped``), or the cache is off.

        Raises:
            CacheKeyError: *key* cannot be a key, or one of *tags* cannot be a tag.
            TypeError: *tags* is not a list, tuple or set.
            ValueError: *ttl* is out of range.
            SerializationError: *value* would come back altered; nothing was sent.
            RemoteStoreError: Only with ``strict``.
        """
        return self._set_many(((key, value),), ttl, tags, stale_ttl)

    def put(self, key: str, loaded: Loaded) -> bool:
        """Do as :meth:`set`, with all that a loader may say; what is too large is not stored, and not an error."""
        try:
            return self._set_many(((key, loaded.value),), loaded.life, loaded.tags, loaded.stale_life, loaded=loaded)
        except _TooLargeError:
            self.count("unserializable")
            return False

    def set_many(
        self, mapping: Mapping[str, Any], ttl: float | None = None, *, tags: _Collection = (), stale_ttl: float = 0.0
    ) -> bool:
        """Store all of *mapping* (up to 500 keys with one script and one announcement each time).

        Every key and value is checked before anything is sent. Returns and raises as :meth:`set`.
        """
        return self._set_many(tuple(mapping.items()), ttl, tags, stale_ttl)

    def _set_many(
        self,
        items: Sequence[tuple[str, Any]],
        ttl: float | None,
        tags: _Collection,
        stale_ttl: float,
        *,
        loaded: Loaded | None = None,
    ) -> bool:
        parts = self._parts or self._start()
        if ttl is not None:
            check_ttl(ttl)
        check_stale_ttl(stale_ttl)
        tags = check_tags(tags)
        lots: list[tuple[str, bytes, float]] = []
        shelved = []
        for given, value in items:
            key = check_key(given)
            tail = parts.codec.encode(key, value, tags=tags)
            if loaded is not None:
                _check_size(tail, loaded)
            lots.append((key, tail, self._life(parts, ttl) if loaded is None else self._life_of(parts, loaded)))
            shelved.append(Shelved(*parts.codec.shelve(key, value, tail), tags))
        is_stored = True
        for batch in _batches(range(len(lots))):
            lot = [lots[i] for i in batch]
            try:
                with self._alone(parts), parts.tier.writing([key for key, _, _ in lot]) as tickets:
                    sent_at = self._clock()
                    if parts.remote is not None:
                        stamp = parts.remote.write(lot, seen=parts.tier.highest_stamp(), stale_ttl=stale_ttl)
                    else:
                        stamp = parts.tier.own_stamp()
                    for ticket, i in zip(tickets, batch, strict=True):
                        parts.tier.keep(ticket, stamp, shelved[i], (sent_at, lots[i][2]))
            except RemoteStoreError as exc:
                self._dropped(parts, exc, len(lot))
                is_stored = False
            else:
                parts.stats.writes += len(lot)
        return is_stored and (parts.remote is not None or parts.tier.local is not None)

    def _alone(self, parts: Parts) -> AbstractContextManager[Any]:
        """Make one step of looking and writing where L1 is all there is; in L2 the script is one already."""
        return parts.tier.alone if parts.remote is None else _TOGETHER

    def add(self, key: str, value: Any, ttl: float | None = None, *, tags: _Collection = ()) -> bool:
        """Store *value* only if *key* has no live value, atomically in L2; return whether it was stored.

        Raises as :meth:`set`.
        """
        parts = self._parts or self._start()
        key = check_key(key)
        life = self._life(parts, ttl)
        tags = check_tags(tags)
        tail = parts.codec.encode(key, value, tags=tags)
        shelved = Shelved(*parts.codec.shelve(key, value, tail), tags)
        try:
            with self._alone(parts), parts.tier.writing((key,)) as (ticket,):
                sent_at = self._clock()
                if parts.remote is not None:
                    stamp = parts.remote.add(key, tail, life, seen=parts.tier.highest_stamp())
                else:
                    is_free = parts.tier.live(key) is None and parts.tier.local is not None
                    stamp = parts.tier.own_stamp() if is_free else None
                if stamp is None:
                    return False
                parts.stats.writes += 1
                parts.tier.keep(ticket, stamp, shelved, (sent_at, life))
                return True
        except RemoteStoreError as exc:
            self._dropped(parts, exc)
            return False

    def incr(self, key: str, delta: int = 1, *, initial: int = 0, ttl: float | None = None) -> int:
        """Add *delta* to an integer, atomically over the fleet, and return the sum; its life goes on.

        Args:
            key: The key.
            delta: What to add.
            initial: What an absent key counts as.
            ttl: Seconds of life of a key that was absent.

        Returns:
            The new number. Where L2 cannot be asked: ``initial + delta``, as if the key were absent, and counted as
            ``writes_dropped``.

        Raises:
            NotAnIntegerError: The value is not an integer, or the sum would leave ±2**53.
            TypeError: *delta* or *initial* is not an ``int``.
            CacheKeyError: *key* cannot be a key.
            ValueError: *ttl* is out of range.
            RemoteStoreError: Only with ``strict``.
        """
        parts = self._parts or self._start()
        key = check_key(key)
        life = self._life(parts, ttl)
        for name, number in (("delta", delta), ("initial", initial)):
            if type(number) is not int:
                msg = f"{name} must be an int, not {number!r:.80}"
                raise TypeError(msg)
        fresh = _checked_sum(key, initial, delta)
        _checked_sum(key, 0, delta)
        try:
            with self._alone(parts), parts.tier.writing((key,)) as (ticket,):
                sent_at = self._clock()
                if parts.remote is None:
                    stamp, number, remaining, tags = self._increment_local(parts, key, delta, fresh, life)
                elif parts.policy.is_signed:
                    stamp, number, remaining, tags = self._increment_signed(
                        parts, parts.remote, key, (delta, fresh, life)
                    )
                else:
                    stamp, number, remaining, tags = parts.remote.increment(
                        key,
                        delta,
                        initial=(fresh, parts.codec.encode(key, fresh), life),
                        seen=parts.tier.highest_stamp(),
                    )
                parts.stats.writes += 1
                parts.tier.keep(ticket, stamp, Shelved(number, None, tags), (sent_at, remaining))
                return number
        except RemoteStoreError as exc:
            self._dropped(parts, exc)
            return fresh

    def decr(self, key: str, delta: int = 1, *, initial: int = 0, ttl: float | None = None) -> int:
        """Subtract *delta*; everything else as :meth:`incr`."""
        if type(delta) is not int:
            msg = f"delta must be an int, not {delta!r:.80}"
            raise TypeError(msg)
        return self.incr(key, -delta, initial=initial, ttl=ttl)

    def _increment_local(self, parts: Parts, key: str, delta: int, fresh: int, life: float) -> _Sum:
        entry = parts.tier.live(key)
        if entry is None:
            return parts.tier.own_stamp(), fresh, life, ()
        value = entry.read()
        if type(value) is not int:
            raise NotAnIntegerError(key, "holds something that is not an integer")
        return parts.tier.own_stamp(), _checked_sum(key, value, delta), entry.deadline - self._clock(), entry.tags

    def _increment_signed(self, parts: Parts, remote: RemoteStore, key: str, step: tuple[int, int, float]) -> _Sum:
        """Compare and set: Lua cannot sign. Every round, one of the contenders gets through."""
        delta, fresh, life = step
        for _ in range(MAX_CAS_TRIES):
            (snapshot,) = remote.read((key,), seen=parts.tier.highest_stamp())
            number, remaining = fresh, None
            tags: tuple[str, ...] = ()
            if snapshot.data is not None:
                try:
                    decoded = parts.codec.decode(key, snapshot.data)
                except CodecError as exc:
                    parts.stats.add_codec_miss(exc.reason)
                else:
                    if type(decoded.value) is not int:
                        raise NotAnIntegerError(key, "holds something that is not an integer")
                    number, remaining, tags = _checked_sum(key, decoded.value, delta), snapshot.remaining, decoded.tags
            stamp = remote.replace(
                key,
                parts.codec.encode(key, number, tags=tags),
                expected=snapshot.stamp,
                ttl=life if remaining is None else None,
                seen=parts.tier.highest_stamp(),
            )
            if stamp is not None:
                return stamp, number, life if remaining is None else remaining, tags
        raise RemoteStoreError("increment", f"{MAX_CAS_TRIES} others got in between")

    def touch(self, key: str, ttl: float) -> bool:
        """Give a live value *ttl* seconds from now on, on every level; return whether there is one.

        Raises as :meth:`set`.
        """
        parts = self._parts or self._start()
        key = check_key(key)
        life = check_ttl(ttl)
        try:
            with self._alone(parts), parts.tier.writing((key,)) as (ticket,):
                if parts.remote is None:
                    return self._touch_local(parts, ticket, life)
                stamp = parts.remote.touch(key, life, seen=parts.tier.highest_stamp())
                if stamp is None:
                    return False
                parts.stats.writes += 1
                parts.tier.forget((ticket,), stamp)
                return True
        except RemoteStoreError as exc:
            self._dropped(parts, exc)
            return False

    def _touch_local(self, parts: Parts, ticket: Ticket, life: float) -> bool:
        entry = parts.tier.live(ticket.key)
        if entry is None:
            return False
        parts.tier.keep(ticket, parts.tier.own_stamp(), _shelved(entry), (self._clock(), life))
        return True

    def refresh(
        self,
        key: str,
        loader: Callable[[], T],
        ttl: float | None = None,
        *,
        tags: _Collection = (),
        stale_ttl: float = 0.0,
    ) -> T:
        """Run *loader* now, store its result over whatever is cached, and return it.

        What happens to the key meanwhile wins: the result is then returned and not stored, for it may be older.
        Raises as :meth:`get_or_set`.
        """
        if ttl is not None:
            check_ttl(ttl)
        checked, stale_life = check_tags(tags), check_stale_ttl(stale_ttl)
        renewed: T = self.renew(key, Plan(lambda: Loaded(loader(), ttl, checked, stale_life))).value
        return renewed

    def renew(self, key: str, plan: Plan) -> Answer:
        """Do as :meth:`refresh`, by *plan*.

        Where it ``is_shared``, others who miss meanwhile wait for this load; it itself waits for nobody, for what
        another one loads now may be older than this call.

        Raises:
            CallInProgressError: The plan's ``contention`` is "raise", and another one loads.
            Exception: As :meth:`get_or_set`.
        """
        parts = self._parts or self._start()
        key = check_key(key)
        with parts.tier.tickets((key,)) as tickets:
            before = self._observe(parts, tickets[0])
            lease = self._take_lease(parts, before, plan)
            if lease is None:
                return self._renew(parts, before, plan)
            with lease:
                before.lease = lease.fence
                answer = self._renew(parts, before, plan)
                lease.word = lease.word if answer.is_kept else ALONE
                return answer

    def _take_lease(self, parts: Parts, before: _Found, plan: Plan) -> Lease | None:
        if parts.leases is None or not plan.is_shared or before.is_unanswered:
            return None
        key = before.ticket.key
        try:
            grant = parts.leases.ask(key, seen=None, is_waiting=False)
        except RemoteStoreError as exc:
            self._failed(parts, exc)
            return None
        if grant.is_mine:
            return parts.leases.hold(key, grant)
        if plan.contention == "raise":
            raise CallInProgressError(key, grant.owner, grant.remaining)
        return None

    def _renew(self, parts: Parts, before: _Found, plan: Plan) -> Answer:
        loaded = self._load(parts, plan.load)
        # Whether it gets stored or something newer is there: no older copy may answer after this.
        parts.tier.drop(before.ticket.key, before.token)
        draft = self._draft(parts, before, loaded)
        if draft is not None and parts.remote is None:
            self._swap_local(parts, draft)
        elif draft is not None:
            self._fill(parts, [draft])
        return _loaded(loaded, before, is_kept=draft is not None)

    def _observe(self, parts: Parts, ticket: Ticket) -> _Found:
        """Note what the key is before a loader runs, taking no copy."""
        found = _Found(ticket, self._clock(), token=parts.tier.highest_stamp(), is_absent=True)
        if parts.remote is not None:
            snapshot = self._peek_remote(parts, ticket.key)
            if snapshot is None:
                found.is_unanswered = True
            else:
                found.token, found.stamp, found.clock = snapshot.token, snapshot.stamp, snapshot.clock
                found.is_absent = snapshot.data is None
        return found

    def _swap_local(self, parts: Parts, draft: _Draft) -> None:
        found = draft.found
        with parts.tier.alone:
            is_untouched = parts.tier.admits(found.ticket, found.token, draft.shelved.tags)
            if is_untouched:
                stamp = parts.tier.own_stamp()
                parts.tier.keep(found.ticket, stamp, draft.shelved, (self._clock(), draft.life))
        found.is_stored = is_untouched
        parts.stats.fills += is_untouched
        parts.stats.fills_refused += not is_untouched

    def delete(self, key: str) -> bool:
        """Remove *key* from every level and every process; return whether L2 (or else L1) had a live value.

        Raises as :meth:`get`.
        """
        return self.delete_many((key,)) > 0

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove *keys* (up to 500 with one script and one announcement each time); return how many were live.

        Raises as :meth:`get`.
        """
        parts = self._parts or self._start()
        removed = 0
        for batch in _batches([check_key(key) for key in _distinct(keys)]):
            try:
                with self._alone(parts), parts.tier.writing(batch) as tickets:
                    if parts.remote is not None:
                        stamp, count = parts.remote.delete(batch, seen=parts.tier.highest_stamp())
                    else:
                        count = sum(parts.tier.live(key) is not None for key in batch)
                        stamp = parts.tier.own_stamp()
                    parts.tier.forget(tickets, stamp)
            except RemoteStoreError as exc:
                self._dropped(parts, exc, len(batch))
            else:
                removed += count
                parts.stats.deletes += len(batch)
        return removed

    def clear(self) -> bool:
        """Make everything in the namespace dead, on every level and process, in O(1); return whether L2 was told.

        Raises a floor under the stamps; nothing is scanned, no FLUSHDB. What is dead goes as its life ends.

        Raises:
            RemoteStoreError: Only with ``strict``.
        """
        parts = self._parts or self._start()
        parts.stats.flushes += 1
        with self._alone(parts):
            floor = self._invalidate(parts, lambda remote, seen: remote.clear(seen=seen))
            if floor is None:
                return False
            parts.tier.flush(floor)
        return True

    def expire(self, key: str) -> bool:
        """End the life of *key* on every level and process, softly; return whether it had a live value.

        As :meth:`delete`, but a value that was stored with a ``stale_ttl`` stays where those find it who take it
        stale: :meth:`get` with ``stale=True``, and :meth:`get_or_set` when its loader fails. Raises as :meth:`get`.
        """
        parts = self._parts or self._start()
        key = check_key(key)
        if parts.remote is None:
            return self.delete(key)
        try:
            with parts.tier.writing((key,)) as tickets:
                stamp, was_live = parts.remote.expire(key, seen=parts.tier.highest_stamp())
                parts.tier.forget(tickets, stamp)
        except RemoteStoreError as exc:
            self._dropped(parts, exc)
            return False
        parts.stats.deletes += 1
        return was_live

    def expire_tags(self, *tags: str) -> bool:
        """End the life of every entry that carries one of *tags*, softly, as :meth:`expire` does for a key.

        Costs and raises as :meth:`invalidate_tags`, which removes them from those too who would take them stale.
        """
        return self._invalidate_tags(tags, is_soft=True)

    def invalidate_tags(self, *tags: str) -> bool:
        """Make every entry that carries one of *tags* dead, on every level and process; return whether L2 was told.

        One round trip and one announcement, whatever the number of entries: nothing is scanned, and no list of a
        tag's keys is kept anywhere. A loader that runs meanwhile does not bring back what it read before; nor does
        the loss of a tag's record in Redis, which counts as an invalidation. What is dead goes as its life ends.

        Raises:
            CacheKeyError: One of them cannot be a tag, or there are more than 64.
            RemoteStoreError: Only with ``strict``.
        """
        return self._invalidate_tags(tags, is_soft=False)

    def _invalidate_tags(self, tags: tuple[str, ...], *, is_soft: bool) -> bool:
        parts = self._parts or self._start()
        checked = check_tags(tags)
        if not checked:
            return True
        parts.stats.tag_invalidations += len(checked)
        with self._alone(parts):
            stamp = self._invalidate(
                parts, lambda remote, seen: remote.invalidate_tags(checked, seen=seen, is_soft=is_soft)
            )
            if stamp is None:
                return False
            parts.tier.invalidate(checked, (), stamp)
        return True

    def invalidate_prefix(self, prefix: str) -> bool:
        """Make every entry whose key begins with *prefix* dead, on every level and process; return whether L2 was told.

        All are dead after the first round trip. Then L2 is scanned, in batches of about 500 keys, and what is dead is
        unlinked: that takes as long as there are keys in the database, and if it is broken off the rest goes as its
        life ends, or with a later call. While 64 invalidated prefixes wait for their scans (in a cluster they always
        do), the next one clears the whole namespace. A load that began before, of whatever key, is not stored, unless
        its process has heard meanwhile that it is not concerned. For what is often invalidated together, use tags.

        Raises:
            CacheKeyError: No key can begin with *prefix*.
            RemoteStoreError: Only with ``strict``.
        """
        parts = self._parts or self._start()
        prefix = check_prefix(prefix)
        parts.stats.prefix_invalidations += 1
        unswept: list[str] = []

        def tell(remote: RemoteStore, seen: int) -> int:
            stamp, unswept[:] = remote.invalidate_prefix(prefix, seen=seen)
            return stamp

        with self._alone(parts):
            stamp = self._invalidate(parts, tell)
            if stamp is None:
                return False
            parts.tier.invalidate((), (prefix,), stamp)
        if parts.remote is not None:
            with suppress(RemoteStoreError):  # even if strict: they are dead, and go as their lives end
                for each in unswept:
                    parts.remote.sweep(each, stamp, seen=parts.tier.highest_stamp())
        return True

    def _invalidate(self, parts: Parts, tell: Callable[[RemoteStore, int], int]) -> int | None:
        """Return the stamp of an invalidation of many keys at once, or None where L2 could not be told."""
        if parts.remote is None:
            return parts.tier.own_stamp()
        try:
            return tell(parts.remote, parts.tier.highest_stamp())
        except RemoteStoreError as exc:
            parts.tier.void()  # it may happen yet, or not at all
            self._dropped(parts, exc)
            return None
        except BaseException:
            parts.tier.void()
            raise

    # ---- causality and state --------------------------------------------------------------------------------

    def token(self) -> str:
        """Return the causal token of all that this process has written, applied or read so far."""
        parts = self._parts or self._start()
        return format_token(parts.policy.namespace, parts.tier.coherence.token())

    def now(self) -> int:
        """Return the newest stamp that this process has seen: all it knows of is from then or before."""
        return (self._parts or self._start()).tier.coherence.token()

    def latest_token(self) -> str:
        """Return the causal token of all that any process has written so far, for one round trip to L2.

        For where no token arrives: ``barrier(latest_token())``. Without an answer it is :meth:`token`.

        Raises:
            RemoteStoreError: Only with ``strict``.
        """
        parts = self._parts or self._start()
        snapshot = self._peek_remote(parts, "")  # nobody's key: only the counter is wanted
        newest = 0 if snapshot is None else snapshot.token
        return format_token(parts.policy.namespace, max(newest, parts.tier.coherence.token()))

    def barrier(self, token: str) -> None:
        """See to it that no later read here is older than what the sender of *token* had seen; never waits.

        Until that stamp has been applied L1 does not answer, and reads go to L2.

        Raises:
            ValueError: *token* is not one of this namespace.
        """
        parts = self._parts or self._start()
        stamp = parse_token(token, parts.policy.namespace)
        if parts.remote is None:
            return  # every stamp is this process's own
        if parts.tier.barrier(stamp) and parts.backplane is not None:
            parts.backplane.ask_soon()

    def count(self, name: str, number: float = 1) -> None:
        """Add to one of the counters, for cached tasks."""
        stats = (self._parts or self._start()).stats
        setattr(stats, name, getattr(stats, name) + number)

    def mark(self, name: str, seconds: float, *, owner: str = "1", is_new: bool = True) -> bool:
        """Set a mark that everybody sees, for so many seconds; return whether it was set.

        Args:
            name: What is marked.
            seconds: How long, unless it is taken away before.
            owner: Whose it is.
            is_new: Only if there is none; else in the place of what is there.

        Raises:
            RemoteStoreError: Only with ``strict``; else, and without L2, it is False.
        """
        parts = self._parts or self._start()
        if parts.remote is None:
            return False
        try:
            return parts.remote.mark(name, seconds, owner=owner, is_new=is_new)
        except RemoteStoreError as exc:
            self._failed(parts, exc)
            return False

    def marked_within(self, name: str, seconds: float) -> tuple[str, bool]:
        """Return whose mark is set ("": there is none), and whether that was said in so many seconds; never raises."""
        parts = self._parts or self._start()
        if parts.remote is None:
            return "", True
        try:
            return parts.remote.marked(name, within=seconds), True
        except RemoteStoreError:
            return "", False

    def holder(self, key: str, *, within: float | None = None) -> str:
        """Return who computes *key* just now under a lease, as far as L2 tells *within* so many seconds, or "".

        Never raises for Redis.
        """
        parts = self._parts or self._start()
        if parts.remote is None:
            return ""
        with suppress(RemoteStoreError):
            return parts.remote.holder(key, within=within)
        return ""

    def unmark(self, name: str, *, owner: str = "") -> None:
        """Take a mark away, if it is *owner*'s, where one is given. Never raises for Redis."""
        parts = self._parts or self._start()
        if parts.remote is not None:
            with suppress(RemoteStoreError):
                parts.remote.unmark(name, owner=owner)

    def ping(self) -> float | None:
        """Return L2's round-trip time in seconds; None where L2 is off or does not answer."""
        parts = self._parts or self._start()
        if parts.remote is None:
            return None
        try:
            return parts.remote.ping()
        except RemoteStoreError:
            return None

    def stats(self) -> dict[str, Any]:
        """Return this process's counters and states; times in seconds.

        Look-ups end as one of ``l1_hits``, ``l2_hits``, ``misses`` and ``coalesced``. Before the first use every
        counter is 0, and asking starts nothing.
        """
        parts = self._parts
        found: dict[str, Any] = (Stats() if parts is None else parts.stats).snapshot()
        found["l1_hits"] += self._l1_hits
        count, total, longest = (found.pop(name) for name in ("lag_count", "lag_sum", "lag_max"))
        found["invalidation_lag"] = {"count": count, "mean": total / count if count else 0.0, "max": longest}
        local = None if parts is None else parts.tier.local
        is_held = parts is not None and self._clock() < self._coherence.lease_until
        return found | {
            "namespace": self._name,
            "pid": os.getpid(),
            "l1_entries": local.count() if local is not None else 0,
            "l1_engine": local.engine if local is not None else None,
            "lease": "held" if is_held else "lapsed",
            "backplane": parts.tier.backplane_state if parts is not None and parts.backplane is not None else "off",
            "circuit": parts.breaker.state if parts is not None and parts.breaker is not None else "off",
        }

    # ---- inside ---------------------------------------------------------------------------------------------

    def _life(self, parts: Parts, ttl: float | None) -> float:
        life = parts.policy.l2_ttl if ttl is None else check_ttl(ttl)
        jitter = parts.policy.ttl_jitter
        return life * (1 - jitter * self._rng()) if jitter else life

    def _life_of(self, parts: Parts, loaded: Loaded) -> float:
        return self._life(parts, loaded.life) if loaded.is_jittered else check_ttl(loaded.life)

    def _look_many(self, parts: Parts, keys: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
        """Return what L1 answers, and the other keys, each once."""
        lease, front_get = self._coherence.lease_until, self._front_get
        wanted = _distinct(keys)
        entries = [(key, front_get(key)) for key in wanted]
        now = self._clock()  # once, and after the entries: as in get()
        found: dict[str, Any] = {}
        rest = []
        for key, entry in entries:
            if entry is not None and now < lease and now < entry.deadline:
                found[key] = entry.value if entry.thaw is None else entry.thaw(entry.value)
            else:
                rest.append(check_key(key))
        self._l1_hits += len(found)
        missing = []
        for key in rest:
            value = parts.tier.look(key)
            if value is MISS:
                missing.append(key)
            else:
                found[key] = value
        return found, missing

    def _peek_remote(self, parts: Parts, key: str) -> Snapshot | None:
        """Ask L2 without taking a copy; what L1 has from before must not answer afterwards."""
        if parts.remote is None:
            return None
        with parts.tier.tickets((key,)) as (ticket,):
            try:
                snapshot = parts.remote.read((key,), seen=parts.tier.highest_stamp())[0]
            except RemoteStoreError as exc:
                self._failed(parts, exc)
                return None
            if snapshot.data is None:
                parts.tier.missed(ticket, snapshot)
            else:
                parts.tier.met(ticket, snapshot.stamp)
            return snapshot

    def _fetch(
        self, parts: Parts, remote: RemoteStore, tickets: Sequence[Ticket], *, within: float | None = None
    ) -> list[_Found]:
        """Read L2 in one round trip, and keep copies of what the tickets still admit."""
        sent_at = self._clock()
        try:
            keys = [ticket.key for ticket in tickets]
            snapshots = remote.read(keys, seen=parts.tier.highest_stamp(), within=within)
        except RemoteStoreError as exc:
            self._failed(parts, exc)
            return [_Found(ticket, sent_at, is_unanswered=True) for ticket in tickets]
        return [
            self._take(parts, ticket, snapshot, sent_at) for ticket, snapshot in zip(tickets, snapshots, strict=True)
        ]

    def _take(self, parts: Parts, ticket: Ticket, snapshot: Snapshot, sent_at: float) -> _Found:
        found = _Found(ticket, sent_at, token=snapshot.token, stamp=snapshot.stamp, clock=snapshot.clock)
        found.is_absent = snapshot.data is None
        if snapshot.data is not None and snapshot.remaining is not None:
            try:
                decoded = parts.codec.decode(ticket.key, snapshot.data)
            except CodecError as exc:
                parts.stats.add_codec_miss(exc.reason)
            else:
                own = parts.codec.shelve_decoded(ticket.key, decoded, snapshot.data[HEAD_SIZE:])
                found.shelved = Shelved(*own, decoded.tags)
                found.value = decoded.value
                parts.tier.keep(ticket, snapshot.stamp, found.shelved, (sent_at, snapshot.remaining))
                return found
        parts.tier.missed(ticket, snapshot)
        return found

    def _find_stale(self, parts: Parts, key: str) -> Shelved | None:
        """Return what L2 still keeps of a value that has expired; no level takes a copy."""
        if parts.remote is None:
            return None
        try:
            (snapshot,) = parts.remote.read((key,), seen=parts.tier.highest_stamp(), is_lenient=True)
        except RemoteStoreError:
            return None  # even if strict: whoever asks has an answer without it
        if snapshot.data is None:
            return None
        try:
            decoded = parts.codec.decode(key, snapshot.data)
        except CodecError as exc:
            parts.stats.add_codec_miss(exc.reason)
            return None
        parts.stats.stale_served += 1
        return Shelved(*parts.codec.shelve_decoded(key, decoded, snapshot.data[HEAD_SIZE:]), decoded.tags)

    def _failed(self, parts: Parts, exc: RemoteStoreError) -> None:
        if parts.policy.strict:
            raise exc

    def _dropped(self, parts: Parts, exc: RemoteStoreError, count: int = 1) -> None:
        parts.stats.writes_dropped += count
        self._failed(parts, exc)


def check_ttl(ttl: object) -> float:
    """Return *ttl* if it is a number of seconds > 0, finite and storable.

    Raises:
        ValueError: It is not.
    """
    if isinstance(ttl, (int, float)) and not isinstance(ttl, bool) and 0 < ttl <= MAX_TTL:  # nan is neither
        return float(ttl)
    msg = f"ttl must be a number of seconds > 0 and <= {MAX_TTL:g}, or None for the default, not {ttl!r:.80}"
    raise ValueError(msg)


def check_stale_ttl(stale_ttl: object) -> float:
    """Return *stale_ttl* if it is 0 or could be a ttl; raises ValueError if not."""
    if isinstance(stale_ttl, (int, float)) and not isinstance(stale_ttl, bool) and 0 <= stale_ttl <= MAX_TTL:
        return float(stale_ttl)
    msg = f"stale_ttl must be a number of seconds >= 0 and <= {MAX_TTL:g}, not {stale_ttl!r:.80}"
    raise ValueError(msg)


def _unproven() -> Coherence:
    """Stands in until the parts are built: no lease, so every look-up takes the slow path."""
    return Coherence(delta=0, tombstone_ttl=0, synced=True)


def _distinct(keys: Iterable[str]) -> dict[str, None]:
    if isinstance(keys, str):
        msg = f"keys must be a list or another iterable of keys, not the str {keys!r:.80}"
        raise TypeError(msg)
    given = list(keys)
    try:
        return dict.fromkeys(given)
    except TypeError:
        return dict.fromkeys(check_key(key) for key in given)  # names the unhashable one


def _loaded(loaded: Loaded, found: _Found, *, is_kept: bool) -> Answer:
    return Answer(
        loaded.value,
        "miss",
        is_loaded=True,
        is_degraded=found.is_unanswered,
        is_kept=is_kept,
        is_stored=found.is_stored,
    )


def _check_size(tail: bytes, loaded: Loaded) -> None:
    if loaded.max_size is not None and len(tail) > loaded.max_size:
        why = f"takes {len(tail)} bytes, max_size is {loaded.max_size}"
        raise _TooLargeError("value", type(loaded.value).__name__, why)


class _TooLargeError(SerializationError):
    """More bytes than ``max_size``."""


def _any_error(_error: Exception) -> bool:
    return True


def _is_current(tags: tuple[str, ...], flight: Flight) -> bool:
    return flight.ticket(tags) if callable(flight.ticket) else True  # without one it has not read anything yet


def _shelved(entry: Entry) -> Shelved:
    return Shelved(entry.value, entry.thaw, entry.tags)


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _checked_sum(key: str, number: int, delta: int) -> int:
    total = number + delta
    if abs(total) > MAX_INTEGER:
        raise NotAnIntegerError(key, "would leave the range of ±2**53")
    return total


def _after_fork_in_child() -> None:
    for manager in list(_MANAGERS):
        manager._forked()  # noqa: SLF001 - the same class's module


_MANAGERS: weakref.WeakSet[CacheManager] = weakref.WeakSet()
_TOGETHER: Final = nullcontext()
_NO_FRONT: Final[dict[str, Entry]] = {}
os.register_at_fork(after_in_child=_after_fork_in_child)
