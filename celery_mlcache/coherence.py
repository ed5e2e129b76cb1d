"""The coherence protocol's decisions: no I/O, no clock, no lock, no thread; the tier holds one lock round all of it.

Theory of operation. Every write takes a *stamp* from one counter in Redis, in the script that also stores and
announces it, so stamps are at once versions, sequence numbers of the channel and fences. This process has *applied*
all messages up to a stamp. A message that is not ``applied + 1`` shows a *gap*: the *epoch* rises, which voids L1 and
every ticket, and nothing is proven until the next heartbeat. Heartbeats run on the subscription's own connection, so
an answer "counter = S, asked at t" proves that every message up to S was handed over: L1 may answer until t + delta
(the *lease*), whatever happens to the connection, the server or this thread afterwards.

A *ticket* is open for a key while an operation on it is under way. Messages and commits raise it; a copy may enter
L1 only under a ticket of this epoch that nothing newer has passed. So an invalidation cannot be lost to a read that
it overtakes (dask/zict's generation check, extended over processes by the stamps).

A *fence* is what a fill carries to L2: "store unless something happened after this stamp". While the lease lives,
the listener has seen everything up to a moment ago, so a clean ticket moves the fence forward and a loader may run
for hours; without it the fence is the counter read with the miss, good for half a tombstone's life.

A *barrier* withdraws the lease until a stamp has been applied; a heartbeat that left after the barrier and finds a
lower counter shows that the stamp is not of this server's life, and lifts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from celery_mlcache.floors import Floors
from celery_mlcache.protocols import Pulse
from celery_mlcache.wire import MAX_STAMP, Message

_NEVER: Final = MAX_STAMP + 1  # a ticket raised to this admits nothing


@dataclass(slots=True)
class Ticket:
    """An open operation on one key; shared by the operations of one epoch that overlap."""

    key: str
    epoch: int
    raised: int = 0  # the highest stamp seen for the key while open
    users: int = 0


@dataclass(slots=True)
class Departure:
    """What the leader of a flight has seen so far: newcomers judge by it whether they may share its answer.

    Attributes:
        ticket: Its ticket.
        began: Monotonic time.
        newest: The newest invalidation of any tag or prefix when it began.
        barrier: What was required when it began.
        token: The counter when it read its miss; 0: not yet.
        tags: Those of the value it brings.
    """

    ticket: Ticket
    began: float
    newest: int
    barrier: int
    token: int = 0
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Act:
    """What the tier must do to L1 now.

    Attributes:
        keys: Copies of these keys older than ``stamp`` are dead.
        tags: So are those that carry one of these tags.
        prefixes: So are those whose key begins with one of these.
        void: Why the whole of L1 is void (a counter's name), or "".
        is_flush: The floor rose to ``stamp``: everything older is dead.
        ask: Ask for a heartbeat at once.
    """

    keys: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    stamp: int = 0
    void: str = ""
    is_flush: bool = False
    ask: bool = False


class Coherence:
    """Stamps, tickets, lease and fences of one process.

    Not thread-safe: callers hold the tier's lock, except for reading ``lease_until`` on the hit path, which is one
    attribute read. Not for use after a fork: the child builds a new one.

    Args:
        delta: Seconds that a proof covers: the bound on staleness.
        tombstone_ttl: Seconds that a tombstone lives in L2.
        synced: Whether a backplane feeds this process. If not, L1 answers until its entries' deadlines.
    """

    __slots__ = (
        "_barrier_at",
        "_delta",
        "_fence_life",
        "_proof_at",
        "_proof_until",
        "_synced",
        "_tickets",
        "applied",
        "epoch",
        "floors",
        "highest",
        "is_proven",
        "lease_until",
        "required",
        "seen",
    )

    def __init__(self, *, delta: float, tombstone_ttl: float, synced: bool) -> None:
        self._delta = delta
        self._fence_life = tombstone_ttl / 2
        self._synced = synced
        self._tickets: dict[str, Ticket] = {}
        self.required = 0  # the stamp that a barrier waits for
        self._barrier_at = 0.0
        self._proof_at = 0.0
        self._proof_until = 0.0
        self.is_proven = False
        self.epoch = 0
        self.applied = 0
        self.floors = Floors()
        self.seen = 0  # newest stamp written, applied or read: the causal token
        self.highest = 0  # newest stamp known to exist: a counter below it has lost writes
        self.lease_until = 0.0 if synced else inf

    # ---- operations of this process -------------------------------------------------------------------------

    def open(self, key: str) -> Ticket:
        """Open a ticket before anything is sent."""
        ticket = self._tickets.get(key)
        if ticket is None or ticket.epoch != self.epoch:
            ticket = self._tickets[key] = Ticket(key, self.epoch)
        ticket.users += 1
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Close it when the operation has ended, however it ended."""
        ticket.users -= 1
        if not ticket.users and self._tickets.get(ticket.key) is ticket:
            del self._tickets[ticket.key]

    def admits(self, ticket: Ticket, stamp: int, tags: Sequence[str] = ()) -> bool:
        """May a copy with this stamp and these tags enter L1?

        Not without a proof either: the next one voids L1 anyway.
        """
        is_fed = self.is_proven or not self._synced
        is_untouched = ticket.epoch == self.epoch and stamp >= ticket.raised
        return is_fed and is_untouched and stamp >= self.floors.of(ticket.key, tags)

    def commit(self, ticket: Ticket, stamp: int, tags: Sequence[str] = ()) -> bool:
        """Note that this process has read or written *stamp* of the key; return whether L1 may keep the copy.

        A slower operation under the same ticket may hold something older, so every commit raises it.
        """
        self._see(stamp)
        is_admitted = self.admits(ticket, stamp, tags)
        self._raise(ticket, stamp)
        return is_admitted

    def missed(self, ticket: Ticket, stamp: int, floor: int) -> None:
        """Note that L2 had nothing for the key but a tombstone of *stamp* (0: not even that) over *floor*.

        A slower read under the same ticket may hold what was there before, and whoever is told of the miss must not
        see the value again.
        """
        self._see(max(stamp, floor))
        self._raise(ticket, stamp)
        self._raise_floor(floor)

    def cancel(self, ticket: Ticket) -> None:
        """The outcome of a write is unknown: it may happen yet. Nothing under this ticket enters L1.

        Operations that begin later have a ticket of their own: they read after this, and are told if it happens.
        """
        self._raise(ticket, _NEVER)
        self._tickets.pop(ticket.key, None)

    def note(self, stamp: int) -> None:
        """Note that *stamp* exists."""
        self.highest = max(self.highest, stamp)

    def is_current(self, flight: Departure, now: float, tags: Sequence[str] = ()) -> bool:
        """May a newcomer share the answer of a flight, who would give it *tags*?

        Not if anything happened to the key or to one of the tags of either since, nor if a barrier was raised after the
        flight began. Without a fresh proof nothing tells what happened: only one younger than the bound will do then.
        """
        ticket, token = flight.ticket, flight.token
        is_proven = self.is_proven and now < self._proof_until
        is_covered = not self._synced or is_proven or now - flight.began <= self._delta
        is_untouched = ticket.epoch == self.epoch and ticket.raised <= token
        # Before it has read its miss it may read a value with tags that nobody knows yet.
        is_tag_untouched = (
            self.floors.of_tags((*flight.tags, *tags)) <= token if token else self.floors.newest <= flight.newest
        )
        return is_covered and is_untouched and is_tag_untouched and flight.barrier >= self.required

    def fence(self, ticket: Ticket, token: int, taken_at: float, now: float, tags: Sequence[str] = ()) -> int | None:
        """Return the stamp that a fill with *tags* may be fenced with, or None where it cannot be fenced any more."""
        if not token or ticket.raised > token or self.floors.of_tags(tags) > token:
            return None
        if self.is_covered(ticket, now) and self.applied >= token:
            token, taken_at = self.applied, max(self._proof_at, taken_at)
        return token if now - taken_at <= self._fence_life else None

    def is_covered(self, ticket: Ticket, now: float) -> bool:
        """Has the listener heard all that happened under *ticket*, up to the last proof, which is not long ago?"""
        return self._synced and self.is_proven and ticket.epoch == self.epoch and now < self._proof_until

    def token(self) -> int:
        """Return the newest stamp that a reader of ours may have to be told of, barriers handed on."""
        return max(self.seen, self.required)

    def flushed(self, stamp: int) -> None:
        """This process raised the floor itself."""
        self._see(stamp)
        self._raise_floor(stamp)

    def invalidated(self, tags: Sequence[str], prefixes: Sequence[str], stamp: int) -> None:
        """This process invalidated *tags* or *prefixes* itself."""
        self._see(stamp)
        self._raise_wide(tags, prefixes, stamp)

    def void(self) -> None:
        """Start again with an empty L1; every ticket is dead."""
        self.epoch += 1
        self.floors.forget()

    # ---- what the backplane tells ---------------------------------------------------------------------------

    def observe(self, message: Message | None) -> Act:
        """Apply one message; None is an undecodable one, which may have been about anything."""
        if message is None:
            return self._gap("garbage")
        stamp = message.stamp
        for key in message.keys:
            ticket = self._tickets.get(key)
            if ticket is not None and ticket.raised < stamp:
                ticket.raised = stamp
        # Unproven too: garbage may raise these, but the next proof forgets them.
        self._raise_wide(message.tags, message.prefixes, stamp)
        if self.is_proven and stamp != self.applied + 1:
            return self._gap("reseed" if message.is_flush and stamp > self.applied else "hole")
        is_flush = False
        if self.is_proven:
            # Not before the proof, which brings the floor itself: garbage must not raise one for good.
            is_flush = message.is_flush and stamp > self.floors.everything
            if is_flush:
                self._raise_floor(stamp)
            # Only in-order messages count as known to exist: garbage must not push the counter up.
            self.applied = stamp
            self._see(stamp)
            self._grant()
        return Act(keys=message.keys, tags=message.tags, prefixes=message.prefixes, stamp=stamp, is_flush=is_flush)

    def prove(self, pulse: Pulse) -> Act:
        """Apply a heartbeat's answer: every message up to its stamp has been observed, or was lost."""
        void = ""
        if not self.is_proven:
            void = "subscription"
        elif pulse.stamp > self.applied:
            void = "lost"
        elif pulse.stamp < self.applied:
            void = "regress"
        if void:
            self.void()
        self.applied = pulse.stamp
        self.floors.everything = pulse.floor if void else max(self.floors.everything, pulse.floor)
        self.is_proven = True
        self._see(pulse.stamp)
        self._proof_at = pulse.sent_at
        self._proof_until = pulse.sent_at + self._delta
        if self.required > pulse.stamp and pulse.sent_at > self._barrier_at:
            self.required = 0
        self._grant()
        return Act(void=void)

    def lose(self) -> None:
        """The subscription ended: nothing that L1 holds can be relied on until the next proof."""
        self.is_proven = False
        self._grant()

    # ---- causal tokens --------------------------------------------------------------------------------------

    def barrier(self, stamp: int, now: float) -> Act:
        """Withdraw the lease until *stamp* has been applied."""
        if stamp <= self.applied:
            return Act()
        if not self._synced:
            # Nobody will tell when it has been applied: start again with an empty L1. The token hands it on.
            self.void()
            self.seen = max(self.seen, stamp)
            return Act(void="barrier")
        # The time of the last one, even if it asks for less: lifting a bogus one must not lift it too.
        self.required, self._barrier_at = max(stamp, self.required), now
        self._grant()
        return Act(ask=True)

    def may_serve(self, now: float, max_stale: float) -> bool:
        """While the lease has lapsed: may L1 still answer under ``on_disconnect="serve"``?"""
        return self.applied >= self.required and now < self._proof_until - self._delta + max_stale

    # ---- inside ---------------------------------------------------------------------------------------------

    def _see(self, stamp: int) -> None:
        self.note(stamp)
        self.seen = max(self.seen, stamp)

    def _raise(self, ticket: Ticket, stamp: int) -> None:
        for open_ticket in (ticket, self._tickets.get(ticket.key)):
            if open_ticket is not None and open_ticket.raised < stamp:
                open_ticket.raised = stamp

    def _raise_floor(self, floor: int) -> None:
        if floor > self.floors.everything:
            self.floors.everything = floor
            for ticket in self._tickets.values():
                ticket.raised = max(ticket.raised, floor)

    def _raise_wide(self, tags: Sequence[str], prefixes: Sequence[str], stamp: int) -> None:
        if tags:
            self.floors.raise_tags(tags, stamp)
        for prefix in prefixes:
            self.floors.raise_prefix(prefix, stamp)
            for ticket in self._tickets.values():
                if ticket.key.startswith(prefix):
                    ticket.raised = max(ticket.raised, stamp)

    def _gap(self, reason: str) -> Act:
        self.void()
        self.is_proven = False
        self._grant()
        return Act(void=reason, ask=True)

    def _grant(self) -> None:
        is_covered = self.is_proven and self.applied >= self.required
        self.lease_until = self._proof_until if is_covered else 0.0
