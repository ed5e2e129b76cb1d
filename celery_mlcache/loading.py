"""What happens where L1 has no answer: who loads, who waits for it, and for whom something stale will do.

::

    resolve(key, plan) ── a flight of this process ── followers ──▶ its result
        └── the leader: read L2 ──▶ value
               ├── something stale will do ──▶ stale value
               └── ask for the fleet's lease
                      ├── a value came meanwhile, or the holder has given it back ──▶ read L2 again
                      ├── another one loads ──▶ wait for its word · stale · raise, as planned
                      └── mine, or it cannot be had ──▶ load, and store by a fenced add

One load at a time in a process (singleflight.py), and where the plan is shared in the whole fleet (leases.py). Neither
is needed for coherence, which the fences see to; so where Redis or time runs out, a caller loads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Final, TypeVar

from celery_mlcache.coherence import Departure
from celery_mlcache.entry import MISS
from celery_mlcache.errors import CallInProgressError, RemoteStoreError, is_interrupt
from celery_mlcache.leases import ALONE, Lease, Leases, held
from celery_mlcache.parts import Parts
from celery_mlcache.plans import Answer, Loaded, Plan
from celery_mlcache.protocols import Grant, Shelved
from celery_mlcache.singleflight import Flight
from celery_mlcache.transfer import Found, Transfer

T = TypeVar("T")


class Turn(Enum):
    """What a call is to do that has neither a lease nor a value."""

    AGAIN = "look again"
    LOST = "look again: L2 has failed, and whether that was a connection or the server the look will tell"
    ALONE = "load without a lease"


MAX_LOST: Final = 3  # times that L2 may fail a call over a lease, though it answers reads, before it loads without

log = logging.getLogger("celery_mlcache")


class Loading:
    """Loads for one manager; holds no state of its own, so that it outlives a fork.

    Args:
        transfer: Moves values.
        clock: Monotonic seconds.
    """

    def __init__(self, transfer: Transfer, clock: Callable[[], float]) -> None:
        self._transfer = transfer
        self._clock = clock

    def resolve(self, parts: Parts, key: str, plan: Plan) -> Answer:
        """Return the value of *key*, found or loaded; see the manager's."""
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
        return Answer(self.load(parts, plan.load).value, "miss", is_loaded=True, is_kept=False)

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
            (found,) = self._transfer.find_many(parts, [departure.ticket])
            departure.tags = (*departure.tags, *found.shelved.tags)  # before the token: then these are what counts
            departure.token = found.token
            if found.value is not MISS:
                parts.stats.l2_hits += parts.remote is not None
                flight.land(found.shelved)
                return Answer(found.value, "l2" if parts.remote is not None else "l1")
            if is_stale_asked and not found.is_unanswered:
                stale = self._transfer.find_stale(parts, key)
                if stale is not None:
                    parts.stats.misses += 1
                    return Answer(stale.read(), "stale")  # who follows finds it too, and knows what it is
                is_stale_asked = False
            turn = self._take_turn(parts, found, plan, give_up)
            lost += turn is Turn.LOST
            if turn is Turn.ALONE or lost > MAX_LOST:
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

    def _take_turn(self, parts: Parts, found: Found, plan: Plan, give_up: float) -> Lease | Shelved | Turn:
        """Ask for the fleet's lease, and wait for it if that is the plan; return it, a stale value, or what to do."""
        if parts.leases is None or not plan.is_shared or found.is_unanswered:
            return Turn.ALONE
        key, left = found.ticket.key, give_up - self._clock()
        is_waiting = left > 0 and plan.contention in {"wait", "stale"}
        try:
            # What is there but cannot be read must not be taken for the value that another one has loaded.
            grant = parts.leases.ask(key, seen=0 if found.is_absent else found.stamp, is_waiting=is_waiting)
            if grant.is_mine:
                return parts.leases.hold(key, grant)
            if grant.has_value:
                return Turn.AGAIN
            return self._contend(parts, parts.leases, key, grant, plan=plan, left=left)
        except RemoteStoreError as exc:
            self._transfer.failed(parts, exc)
            return Turn.LOST

    def _contend(
        self, parts: Parts, leases: Leases, key: str, grant: Grant, *, plan: Plan, left: float
    ) -> Lease | Shelved | Turn:
        """Another one loads: do what the plan says, and return as :meth:`_take_turn` does."""
        if grant.fence in held() or grant.fence in plan.ancestry():
            return leases.borrow(key, grant.fence)
        if leases.is_mine(grant):
            return leases.hold(key, grant)
        if plan.contention in {"raise", "retry"}:
            raise CallInProgressError(key, grant.owner, grant.remaining)
        stale = self._transfer.find_stale(parts, key) if plan.contention == "stale" else None
        if stale is not None:
            return stale
        if left > 0 and plan.contention != "compute":
            return self._wait(parts, leases, key, grant, left)
        parts.stats.wait_timeouts += plan.contention != "compute"
        return Turn.ALONE

    def _wait(self, parts: Parts, leases: Leases, key: str, grant: Grant, left: float) -> Turn:
        parts.stats.waits += 1
        began = self._clock()
        try:
            word = leases.wait(key, grant, left)
        finally:
            parts.stats.wait_seconds += self._clock() - began
        return Turn.ALONE if word == ALONE else Turn.AGAIN

    def _load_and_land(self, parts: Parts, flight: Flight, departure: Departure, found: Found, plan: Plan) -> Answer:
        parts.stats.misses += 1
        try:
            loaded = self.load(parts, plan.load)
        except Exception as exc:
            is_forgiven = plan.forgives is not None and not is_interrupt(exc) and plan.forgives(exc)
            stale = self._transfer.find_stale(parts, found.ticket.key) if is_forgiven else None
            if stale is None:
                raise
            log.warning("a loader failed, and a stale value is served", exc_info=exc, extra={"key": found.ticket.key})
            return Answer(stale.read(), "stale", error=exc)
        draft = self._transfer.draft(parts, found, loaded)
        if draft is None:
            flight.land(None)
            return _loaded(loaded, found, is_kept=False)
        winner = self._transfer.fill(parts, [draft]).get(found.ticket.key)
        if winner is None:
            flight.land(draft.shelved)
            return _loaded(loaded, found, is_kept=True)
        departure.tags = (*departure.tags, *winner.shelved.tags)
        if parts.tier.is_current(departure, ()):
            flight.land(winner.shelved)  # else it may be dead to who came later, and they ask for themselves
        return Answer(winner.value, "miss")

    def renew(self, parts: Parts, key: str, plan: Plan) -> Answer:
        """Load *key* whatever is cached; see the manager's."""
        with parts.tier.tickets((key,)) as tickets:
            before = self._transfer.observe(parts, tickets[0])
            lease = self._take_lease(parts, before, plan)
            if lease is None:
                return self._renew(parts, before, plan)
            with lease:
                before.lease = lease.fence
                answer = self._renew(parts, before, plan)
                lease.word = lease.word if answer.is_kept else ALONE
                return answer

    def _take_lease(self, parts: Parts, before: Found, plan: Plan) -> Lease | None:
        if parts.leases is None or not plan.is_shared or before.is_unanswered:
            return None
        key = before.ticket.key
        try:
            grant = parts.leases.ask(key, seen=None, is_waiting=False)
        except RemoteStoreError as exc:
            self._transfer.failed(parts, exc)
            return None
        if grant.is_mine:
            return parts.leases.hold(key, grant)
        if plan.contention == "raise":
            raise CallInProgressError(key, grant.owner, grant.remaining)
        return None

    def _renew(self, parts: Parts, before: Found, plan: Plan) -> Answer:
        loaded = self.load(parts, plan.load)
        # Whether it gets stored or something newer is there: no older copy may answer after this.
        parts.tier.drop(before.ticket.key, before.token)
        draft = self._transfer.draft(parts, before, loaded)
        if draft is not None and parts.remote is None:
            self._transfer.swap_local(parts, draft)
        elif draft is not None:
            self._transfer.fill(parts, [draft])
        return _loaded(loaded, before, is_kept=draft is not None)

    def load(self, parts: Parts, loader: Callable[[], T]) -> T:
        """Run *loader*, counted."""
        parts.stats.loads += 1
        began = self._clock()
        try:
            return loader()
        except BaseException:
            parts.stats.load_failures += 1
            raise
        finally:
            parts.stats.load_seconds += self._clock() - began


def _loaded(loaded: Loaded, found: Found, *, is_kept: bool) -> Answer:
    return Answer(
        loaded.value,
        "miss",
        is_loaded=True,
        is_degraded=found.is_unanswered,
        is_kept=is_kept,
        is_stored=found.is_stored,
        refused=found.refused,
    )


def _is_current(tags: tuple[str, ...], flight: Flight) -> bool:
    return flight.ticket(tags) if callable(flight.ticket) else True  # without one it has not read anything yet
