"""The cache manager: what users call, and the order in which levels are asked.

How a look-up flows::

    get(key) ── lease and front ──▶ value                            L1, one frame, no lock
        └── _get_slow ── tier.look ──▶ value                         L1, under its lock
               └── transfer.fetch ── open a ticket, read L2 ──▶ value    L2, one round trip
                      ├── the ticket still admits it? keep a copy
                      └── MISS ──▶ default, or loading.resolve (get_or_set): the loader and a fenced fill

Whether a copy is true is :class:`~celery_mlcache.tier.Tier`'s to decide. How values get from one level to another,
:class:`~celery_mlcache.transfer.Transfer` knows; who loads what none has, :class:`~celery_mlcache.loading.Loading`.
"""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

from celery_mlcache.coherence import Coherence, Ticket
from celery_mlcache.entry import MISS, Entry
from celery_mlcache.errors import CacheClosedError, CodecError, NotAnIntegerError, RemoteStoreError
from celery_mlcache.keys import check_key, check_prefix, check_tags, format_token, parse_token
from celery_mlcache.loading import Loading
from celery_mlcache.parts import Parts
from celery_mlcache.plans import Answer, Glance, Inspection, Loaded, Plan, check_stale_ttl, check_ttl
from celery_mlcache.protocols import RemoteStore, Shelved, Snapshot
from celery_mlcache.stats import Stats
from celery_mlcache.transfer import TooLargeError, Transfer, batches, check_size, shelved_of
from celery_mlcache.wire import MAX_INTEGER

T = TypeVar("T")
_Sum = tuple[int, int, float, tuple[str, ...]]  # stamp, number, seconds left, tags
_Collection = list[str] | tuple[str, ...] | set[str] | frozenset[str]

MAX_CAS_TRIES: Final = 100


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
        self._transfer = Transfer(clock, rng)
        self._loading = Loading(self._transfer, clock)
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
        stale = self._transfer.find_stale(parts, key) if is_lenient else None
        return default if stale is None else stale.read()

    def _find_slow(self, parts: Parts, key: str) -> Answer | None:
        value, is_stale = parts.tier.look_closely(key)
        if value is not MISS:
            return Answer(value, "stale" if is_stale else "l1")
        if parts.remote is not None:
            with parts.tier.tickets((key,)) as tickets:
                value = self._transfer.fetch(parts, parts.remote, tickets)[0].value
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
        snapshot = self._transfer.peek(parts, key)
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
            snapshot = self._transfer.peek(parts, key)
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
                found = self._transfer.fetch(parts, parts.remote, tickets, within=within)[0]
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
            is_off = parts.tier.local is None
            seen = Inspection(why="the cache is switched off" if is_off else "nothing is in L1, and there is no L2")
        if entry is None or (seen.level is not None and parts.remote is not None):
            return seen
        return Inspection(entry.read(), "l1", entry.deadline - self._clock(), entry.tags)

    def _inspect_remote(self, parts: Parts, remote: RemoteStore, key: str, level: Literal["l1", "l2"]) -> Inspection:
        snapshot = self._transfer.peek(parts, key)
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
        return Inspection(
            why="nothing is stored: it was never computed, its result was not to be kept, or it has long been gone"
        )

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
            for batch in batches(missing):
                with parts.tier.tickets(batch) as tickets:
                    for ticket, seen in zip(tickets, self._transfer.fetch(parts, parts.remote, tickets), strict=True):
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
        return self._loading.resolve(self._parts or self._start(), check_key(key), plan)

    def renew(self, key: str, plan: Plan) -> Answer:
        """Do as :meth:`refresh`, by *plan*.

        Where it ``is_shared``, others who miss meanwhile wait for this load; it itself waits for nobody, for what
        another one loads now may be older than this call.

        Raises:
            CallInProgressError: The plan's ``contention`` is "raise", and another one loads.
            Exception: As :meth:`get_or_set`.
        """
        return self._loading.renew(self._parts or self._start(), check_key(key), plan)

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
            for seen in self._transfer.find_many(parts, tickets):
                if seen.value is MISS:
                    absent.append(seen)
                else:
                    found[seen.ticket.key] = seen.value
                    parts.stats.l2_hits += 1
            parts.stats.misses += len(absent)
            if absent:
                loaded = self._loading.load(parts, lambda: loader([seen.ticket.key for seen in absent]))
                drafts = []
                for seen in absent:
                    if seen.ticket.key in loaded:
                        found[seen.ticket.key] = value = loaded[seen.ticket.key]
                        draft = self._transfer.draft(parts, seen, Loaded(value, ttl, checked))
                        if draft is not None:
                            drafts.append(draft)
                for key, winner in self._transfer.fill(parts, drafts).items():
                    found[key] = winner.value
        return found

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
        except TooLargeError:
            self.count("too_large")
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
                check_size(tail, loaded)
            lots.append(
                (
                    key,
                    tail,
                    self._transfer.life(parts, ttl) if loaded is None else self._transfer.life_of(parts, loaded),
                )
            )
            shelved.append(Shelved(*parts.codec.shelve(key, value, tail), tags))
        is_stored = True
        for batch in batches(range(len(lots))):
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
                self._transfer.dropped(parts, exc, len(lot))
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
        life = self._transfer.life(parts, ttl)
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
            self._transfer.dropped(parts, exc)
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
        life = self._transfer.life(parts, ttl)
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
            self._transfer.dropped(parts, exc)
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
            self._transfer.dropped(parts, exc)
            return False

    def _touch_local(self, parts: Parts, ticket: Ticket, life: float) -> bool:
        entry = parts.tier.live(ticket.key)
        if entry is None:
            return False
        parts.tier.keep(ticket, parts.tier.own_stamp(), shelved_of(entry), (self._clock(), life))
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
        for batch in batches([check_key(key) for key in _distinct(keys)]):
            try:
                with self._alone(parts), parts.tier.writing(batch) as tickets:
                    if parts.remote is not None:
                        stamp, count = parts.remote.delete(batch, seen=parts.tier.highest_stamp())
                    else:
                        count = sum(parts.tier.live(key) is not None for key in batch)
                        stamp = parts.tier.own_stamp()
                    parts.tier.forget(tickets, stamp)
            except RemoteStoreError as exc:
                self._transfer.dropped(parts, exc, len(batch))
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
            self._transfer.dropped(parts, exc)
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
            self._transfer.dropped(parts, exc)
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
        snapshot = self._transfer.peek(parts, "")  # nobody's key: only the counter is wanted
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

    def mark(self, name: str, seconds: float, *, is_new: bool = True) -> bool:
        """Set a mark that everybody sees, for so many seconds; return whether it was set.

        Args:
            name: What is marked.
            seconds: How long, unless it is taken away before.
            is_new: Only if there is none; else in the place of what is there.

        Raises:
            RemoteStoreError: Only with ``strict``; else, and without L2, it is False.
        """
        parts = self._parts or self._start()
        if parts.remote is None:
            return False
        try:
            return parts.remote.mark(name, seconds, is_new=is_new)
        except RemoteStoreError as exc:
            self._transfer.failed(parts, exc)
            return False

    def prolong(self, name: str, seconds: float) -> None:
        """Let a mark that is still there last for so many seconds from now. Never raises for Redis."""
        parts = self._parts or self._start()
        if parts.remote is not None:
            with suppress(RemoteStoreError):
                parts.remote.prolong(name, seconds)

    def marked_within(self, name: str, seconds: float) -> tuple[bool, bool]:
        """Return whether a mark is set, and whether that was said in so many seconds. Never raises for Redis."""
        parts = self._parts or self._start()
        if parts.remote is None:
            return False, True
        try:
            return parts.remote.marked(name, within=seconds), True
        except RemoteStoreError:
            return False, False

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

    def unmark(self, name: str) -> None:
        """Take a mark away. Never raises for Redis."""
        parts = self._parts or self._start()
        if parts.remote is not None:
            with suppress(RemoteStoreError):
                parts.remote.unmark(name)

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


def _any_error(_error: Exception) -> bool:
    return True


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
