"""Values on their way between the levels: reads of L2 under tickets, and fenced stores of what was loaded.

What may live here: packing, unpacking and moving, and what each outcome means for L1 and the counters. When a level is
asked, and who loads, others say; whether a copy is true, the tier does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from celery_mlcache.coherence import Ticket
from celery_mlcache.entry import MISS, Entry
from celery_mlcache.errors import CodecError, RemoteStoreError, SerializationError
from celery_mlcache.parts import Parts
from celery_mlcache.plans import Loaded, check_ttl
from celery_mlcache.protocols import Fence, RemoteStore, Shelved, Snapshot
from celery_mlcache.wire import HEAD_SIZE

T = TypeVar("T")

BATCH: Final = 500  # keys in one script: Redis serves nobody else meanwhile

log = logging.getLogger("celery_mlcache")


@dataclass(slots=True)
class Found:
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
    refused: SerializationError | None = None  # why it cannot be


@dataclass(frozen=True, slots=True)
class Draft:
    """A loaded value, ready to be stored."""

    found: Found
    tail: bytes
    shelved: Shelved
    life: float  # seconds
    stale_life: float = 0.0  # seconds beyond it


def check_size(tail: bytes, loaded: Loaded) -> None:
    """Raise TooLargeError if what was packed is larger than it may be."""
    if loaded.max_size is not None and len(tail) > loaded.max_size:
        why = f"takes {len(tail)} bytes, max_size is {loaded.max_size}"
        raise TooLargeError("value", type(loaded.value).__name__, why)


class TooLargeError(SerializationError):
    """More bytes than ``max_size``."""


def batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield as many at a time as one script may take."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def shelved_of(entry: Entry) -> Shelved:
    """Return what an entry of L1 holds."""
    return Shelved(entry.value, entry.thaw, entry.tags)


class Transfer:
    """Moves values for one manager; of its own it knows only whether it has warned, so that it outlives a fork.

    Args:
        clock: Monotonic seconds.
        rng: 0 to 1, for the jitter of lives.
    """

    def __init__(self, clock: Callable[[], float], rng: Callable[[], float]) -> None:
        self._clock = clock
        self._rng = rng
        self._has_warned = False

    def fetch(
        self, parts: Parts, remote: RemoteStore, tickets: Sequence[Ticket], *, within: float | None = None
    ) -> list[Found]:
        """Read L2 in one round trip, and keep copies of what the tickets still admit."""
        sent_at = self._clock()
        try:
            keys = [ticket.key for ticket in tickets]
            snapshots = remote.read(keys, seen=parts.tier.highest_stamp(), within=within)
        except RemoteStoreError as exc:
            self.failed(parts, exc)
            return [Found(ticket, sent_at, is_unanswered=True) for ticket in tickets]
        return [
            self._take(parts, ticket, snapshot, sent_at) for ticket, snapshot in zip(tickets, snapshots, strict=True)
        ]

    def _take(self, parts: Parts, ticket: Ticket, snapshot: Snapshot, sent_at: float) -> Found:
        found = Found(ticket, sent_at, token=snapshot.token, stamp=snapshot.stamp, clock=snapshot.clock)
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

    def find_stale(self, parts: Parts, key: str) -> Shelved | None:
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

    def peek(self, parts: Parts, key: str) -> Snapshot | None:
        """Ask L2 without taking a copy; what L1 has from before must not answer afterwards."""
        if parts.remote is None:
            return None
        with parts.tier.tickets((key,)) as (ticket,):
            try:
                snapshot = parts.remote.read((key,), seen=parts.tier.highest_stamp())[0]
            except RemoteStoreError as exc:
                self.failed(parts, exc)
                return None
            if snapshot.data is None:
                parts.tier.missed(ticket, snapshot)
            else:
                parts.tier.met(ticket, snapshot.stamp)
            return snapshot

    def find_many(self, parts: Parts, tickets: Sequence[Ticket]) -> list[Found]:
        """Look for what the tickets are for on the last level there is."""
        if parts.remote is not None:
            return [found for batch in batches(tickets) for found in self.fetch(parts, parts.remote, list(batch))]
        return [self._find_local(parts, ticket) for ticket in tickets]

    def _find_local(self, parts: Parts, ticket: Ticket) -> Found:
        """Look again now that the ticket is open: another flight may have landed since the miss."""
        found = Found(ticket, self._clock(), token=parts.tier.highest_stamp())
        entry = parts.tier.live(ticket.key)
        if entry is not None:
            parts.stats.l1_hits += 1
            found.value, found.shelved = entry.read(), shelved_of(entry)
        return found

    def observe(self, parts: Parts, ticket: Ticket) -> Found:
        """Note what the key is before a loader runs, taking no copy."""
        found = Found(ticket, self._clock(), token=parts.tier.highest_stamp(), is_absent=True)
        if parts.remote is not None:
            snapshot = self.peek(parts, ticket.key)
            if snapshot is None:
                found.is_unanswered = True
            else:
                found.token, found.stamp, found.clock = snapshot.token, snapshot.stamp, snapshot.clock
                found.is_absent = snapshot.data is None
        return found

    def draft(self, parts: Parts, found: Found, loaded: Loaded) -> Draft | None:
        """Return what was loaded, ready to be stored, or None where it is not to be, or the codec refuses it.

        The latter is noted in *found*, and logged once unless whoever loads tells of it.
        """
        if not loaded.is_kept:
            return None
        key, value, tags = found.ticket.key, loaded.value, loaded.tags
        try:
            tail = parts.codec.encode(key, value, tags=tags)
            check_size(tail, loaded)
            shelved = Shelved(*parts.codec.shelve(key, value, tail), tags)
        except TooLargeError as exc:
            parts.stats.too_large += 1
            found.refused = exc
            return None
        except SerializationError as exc:
            parts.stats.unserializable += 1
            found.refused = exc
            if parts.policy.strict and not loaded.is_optional:
                raise
            if not (loaded.is_told or self._has_warned):
                self._has_warned = True
                log.warning("a loaded value cannot be cached: %.200s: %s", key, exc, extra={"key": key})
            return None
        return Draft(found, tail, shelved, self.life_of(parts, loaded), loaded.stale_life)

    def fill(self, parts: Parts, drafts: Sequence[Draft]) -> dict[str, Found]:
        """Store by fenced adds; return the live values that were there already, by key."""
        if parts.remote is None:
            return self._fill_local(parts, drafts)
        fenced: list[tuple[Draft, Fence]] = []
        for draft in drafts:
            fence = self._fence(parts, draft)
            if fence is None:
                parts.stats.fills_refused += 1
            elif draft.found.is_absent:
                fenced.append((draft, fence))
            else:
                # A live value that cannot be read would win over every filler until it expires: swap it for ours.
                self._swap(parts, parts.remote, draft, fence)
        winners: dict[str, Found] = {}
        for batch in batches(fenced):
            winners |= self._fill_remote(parts, parts.remote, batch)
        return winners

    def _fence(self, parts: Parts, draft: Draft) -> Fence | None:
        """Return what a store of *draft* may be fenced with, or None."""
        found = draft.found
        if found.is_unanswered:
            return None  # L2 did not answer the read
        fence = parts.tier.fence(found.ticket, Fence(found.token, found.clock), found.taken_at, draft.shelved.tags)
        return fence if fence is None or not found.lease else fence._replace(lease=found.lease)

    def _fill_remote(self, parts: Parts, remote: RemoteStore, batch: Sequence[tuple[Draft, Fence]]) -> dict[str, Found]:
        sent_at = self._clock()
        try:
            outcomes = remote.fill(
                [(draft.found.ticket.key, draft.tail, draft.life, fence) for draft, fence in batch],
                stale_ttl=batch[0][0].stale_life,
            )
        except RemoteStoreError as exc:
            for draft, _ in batch:
                draft.found.is_unanswered = True
            self.dropped(parts, exc, len(batch))
            return {}
        winners: dict[str, Found] = {}
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

    def _fill_local(self, parts: Parts, drafts: Sequence[Draft]) -> dict[str, Found]:
        """Where L1 is all there is: a fill stores nothing over a live value, or over what happened since the miss."""
        winners: dict[str, Found] = {}
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
                winners[found.ticket.key] = Found(found.ticket, now, value=entry.read(), shelved=shelved_of(entry))
        return winners

    def _swap(self, parts: Parts, remote: RemoteStore, draft: Draft, fence: Fence) -> None:
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
            self.dropped(parts, exc)
            return
        if stamp is None:
            parts.stats.fills_refused += 1
        else:
            found.is_stored = True
            parts.stats.fills += 1
            parts.tier.keep(found.ticket, stamp, draft.shelved, (sent_at, draft.life))

    def swap_local(self, parts: Parts, draft: Draft) -> None:
        """Store over what is there, where L1 is all there is, unless something has happened to it since."""
        found = draft.found
        with parts.tier.alone:
            is_untouched = parts.tier.admits(found.ticket, found.token, draft.shelved.tags)
            if is_untouched:
                stamp = parts.tier.own_stamp()
                parts.tier.keep(found.ticket, stamp, draft.shelved, (self._clock(), draft.life))
        found.is_stored = is_untouched
        parts.stats.fills += is_untouched
        parts.stats.fills_refused += not is_untouched

    def life(self, parts: Parts, ttl: float | None) -> float:
        """Return the seconds that a value lives that is given *ttl*; raises ValueError as :func:`check_ttl`."""
        life = parts.policy.l2_ttl if ttl is None else check_ttl(ttl)
        jitter = parts.policy.ttl_jitter
        return life * (1 - jitter * self._rng()) if jitter else life

    def life_of(self, parts: Parts, loaded: Loaded) -> float:
        """Return the seconds that what was loaded lives."""
        return self.life(parts, loaded.life) if loaded.is_jittered else check_ttl(loaded.life)

    def failed(self, parts: Parts, exc: RemoteStoreError) -> None:
        """Raise L2's error if ``strict``."""
        if parts.policy.strict:
            raise exc

    def dropped(self, parts: Parts, exc: RemoteStoreError, count: int = 1) -> None:
        """Count writes that L2 did not take; raise its error if ``strict``."""
        parts.stats.writes_dropped += count
        self.failed(parts, exc)
