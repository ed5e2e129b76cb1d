"""The seams between the floors: what a level must do, said once, and the records that cross.

A protocol stands here where a second implementation or a test needs it; see STYLE rule 13. No behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from celery_mlcache.entry import Entry
from celery_mlcache.wire import Message


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the codec found in a stored value."""

    value: Any
    is_shareable: bool  # nothing inside can be changed by a reader
    tags: tuple[str, ...] = ()
    created: float = 0.0  # the writer's wall clock, seconds since 1970: for people, never for coherence


class ValueCodec(Protocol):
    """Turns values into tails (see wire.py) and back; thread-safe, holds no state that a fork could break."""

    def encode(self, key: str, value: object, *, tags: Sequence[str] = ()) -> bytes:
        """Return the tail; raises SerializationError for what it would have to alter."""
        ...

    def decode(self, key: str, data: bytes) -> Decoded:
        """Return what *data* (head and tail) holds for *key*; raises CodecError, and nothing else."""
        ...

    def shelve(self, key: str, value: object, tail: bytes) -> tuple[Any, Callable[[Any], Any] | None]:
        """Return ``(value, thaw)`` for an L1 entry that shares nothing with *value*."""
        ...

    def shelve_decoded(self, key: str, decoded: Decoded, tail: bytes) -> tuple[Any, Callable[[Any], Any] | None]:
        """Return ``(value, thaw)`` for an L1 entry of a value that only the cache holds so far."""
        ...


class Shelved(NamedTuple):
    """A value as an L1 entry holds it.

    Attributes:
        value: What readers get, or what ``thaw`` makes it from.
        thaw: Makes each reader's own copy; None for what cannot be changed.
        tags: What the entry can be invalidated by, beside its key.
    """

    value: Any
    thaw: Callable[[Any], Any] | None = None
    tags: tuple[str, ...] = ()

    def read(self) -> Any:
        """Return the value as a reader may have it."""
        return self.value if self.thaw is None else self.thaw(self.value)


class LocalEngine(Protocol):
    """A bounded map of str to Entry; every method is thread-safe and takes microseconds."""

    def get(self, key: str) -> Entry | None:
        """Return the entry or None; may return one whose deadline has passed."""
        ...

    def put(self, key: str, entry: Entry, ttl: float) -> None:
        """Hold *entry* for at most *ttl* seconds (> 0)."""
        ...

    def remove(self, key: str) -> None:
        """Forget the key."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...

    def count(self) -> int:
        """Return about how many entries are held."""
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One key as L2 had it at one instant.

    Attributes:
        data: The stored value (head and tail); None when absent, dead by the floor, or deleted.
        stamp: Of the value or tombstone, or of the invalidation that killed it by a tag; 0 when nothing is stored.
        token: The namespace's counter at that instant: the fence of a fill that may follow.
        floor: The smallest stamp still alive.
        remaining: Seconds of life left in L2; None when there is no value.
        clock: The server's clock, seconds since 1970.
    """

    data: bytes | None
    stamp: int
    token: int
    floor: int
    remaining: float | None
    clock: float = 0.0


class Fence(NamedTuple):
    """What a fill is fenced with: it is refused if anything happened to the key after this.

    Attributes:
        token: The stamp up to which the filler knows what happened.
        clock: The server's clock then, seconds since 1970: tombstones from after it are still there for a while.
        lease: The fence of the lease that the filler holds (see :class:`Grant`); 0: none.
    """

    token: int
    clock: float
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a wish for a lease: leave to be the fleet's only loader of a key.

    Attributes:
        fence: Of the lease that is held now, by whomever: it grows from holder to holder; 0 where there is a value.
        is_mine: The caller is the holder.
        has_value: A live value is there: read it instead.
        remaining: Seconds that the lease has left unless it is renewed.
        owner: Who holds it.
        is_takeover: The one before was not given back, but has lapsed.
    """

    fence: int
    is_mine: bool
    has_value: bool
    remaining: float
    owner: str
    is_takeover: bool


@dataclass(frozen=True, slots=True)
class Filled:
    """The outcome of a fenced add.

    Attributes:
        is_stored: The filler's value is in L2 now.
        winner: The live value that was there instead, or None.
        refused: Why nothing was stored ("" when stored, "winner", or "fence").
    """

    is_stored: bool
    winner: Snapshot | None
    refused: str = ""


class RemoteStore(Protocol):
    """L2. Thread-safe; every call costs one round trip and at most one socket timeout.

    Every method raises RemoteStoreError, and only that, when Redis fails or the breaker is open. *seen* is the
    highest stamp the caller knows of: a counter below it has lost writes and is seeded anew.
    """

    def read(
        self, keys: Sequence[str], *, seen: int, is_lenient: bool = False, within: float | None = None
    ) -> list[Snapshot]:
        """Return a snapshot for each key, in order, all of one instant.

        With *is_lenient* what has expired counts as live until its stale end, and so do its remaining lives.
        *within*: seconds that the call may take, connecting included; running out of them says nothing of the server.
        """
        ...

    def write(self, items: Sequence[tuple[str, bytes, float]], *, seen: int, stale_ttl: float = 0.0) -> int:
        """Store ``(key, tail, ttl)`` unconditionally under one new stamp, announce it once, return the stamp.

        *stale_ttl*, here and below: seconds beyond its life for which a value is kept, to be served stale.
        """
        ...

    def add(self, key: str, tail: bytes, ttl: float, *, seen: int) -> int | None:
        """Store if no live value is there; return the stamp, or None where one is."""
        ...

    def replace(
        self,
        key: str,
        tail: bytes,
        *,
        expected: int,
        ttl: float | None,
        seen: int,
        fence: int | None = None,
        stale_ttl: float = 0.0,
    ) -> int | None:
        """Store if the key's stamp is still *expected* (0: nothing there); keep its life if ttl is None.

        With a *fence*, not either if one of the tail's tags was invalidated after that stamp.
        """
        ...

    def delete(self, keys: Sequence[str], *, seen: int) -> tuple[int, int]:
        """Put tombstones; return ``(stamp, number of live values removed)``."""
        ...

    def fill(self, items: Sequence[tuple[str, bytes, float, Fence]], *, stale_ttl: float = 0.0) -> list[Filled]:
        """Store each ``(key, tail, ttl, fence)`` only if nothing happened to it since its fence."""
        ...

    def increment(
        self, key: str, delta: int, *, initial: tuple[int, bytes, float], seen: int
    ) -> tuple[int, int, float, tuple[str, ...]]:
        """Add atomically, or store *initial* ``(number, its tail, ttl)`` where nothing lives.

        Returns ``(stamp, number, seconds left, tags)``; raises NotAnIntegerError too.
        """
        ...

    def touch(self, key: str, ttl: float, *, seen: int) -> int | None:
        """Give a live value a new life under a new stamp; return the stamp, or None where there is none."""
        ...

    def clear(self, *, seen: int) -> int:
        """Raise the floor over everything stored; return the new floor."""
        ...

    def expire(self, key: str, *, seen: int) -> tuple[int, bool]:
        """Let the key's value have expired, and fence it as a delete does; return ``(stamp, whether it was live)``."""
        ...

    def invalidate_tags(self, tags: Sequence[str], *, seen: int, is_soft: bool = False) -> int:
        """Let everything that carries one of *tags* be dead, or expired if soft, in O(tags); return the stamp."""
        ...

    def invalidate_prefix(self, prefix: str, *, seen: int) -> tuple[int, list[str]]:
        """Let everything whose key begins with *prefix* be dead, at once.

        Returns the stamp and the prefixes whose dead values still take room, this one first.
        """
        ...

    def sweep(self, prefix: str, stamp: int, *, seen: int) -> int:
        """Free what is dead among the keys that begin with *prefix*; return how many keys that were.

        Many round trips, each bounded. *stamp* is that of an invalidation before it: it need not be remembered then.
        """
        ...

    def acquire(self, key: str, *, owner: str, lease: float, seen: int | None, is_waiting: bool) -> Grant:
        """Take the key's lease for *lease* seconds if nobody holds it, unless there is a value to be read instead.

        That is a live one whose stamp is not *seen* (None: do not look). Where somebody holds it, *is_waiting* counts
        the caller among those whom the release wakes.
        """
        ...

    def renew(self, held: Sequence[tuple[str, int]], *, lease: float) -> list[bool]:
        """Give each ``(key, fence)`` that is still held *lease* seconds from now; say of each whether it was."""
        ...

    def release(self, key: str, fence: int, *, word: str) -> bool:
        """Give a lease back if it is still held, wake everybody who waits for that with *word*; say whether it was."""
        ...

    def await_release(self, key: str, fence: int, timeout: float) -> str:
        """Return the word with which the lease was given back, or "" if it was not within *timeout* seconds.

        Takes one word of those that the release leaves, one for each caller it has counted. A server that is frozen
        is found out one socket timeout after *timeout*.
        """
        ...

    def holder(self, key: str, *, within: float | None = None) -> str:
        """Return who holds the key's lease, or "" where nobody does; *within* as in :meth:`read`."""
        ...

    def mark(self, key: str, seconds: float, *, is_new: bool = True) -> bool:
        """Leave a mark for so many seconds, if there is none or not *is_new*; return whether it was left."""
        ...

    def prolong(self, key: str, seconds: float) -> None:
        """Let a mark last for so many seconds from now; where there is none, none comes of it."""
        ...

    def marked(self, key: str, *, within: float | None = None) -> bool:
        """Return whether there is a mark; *within* as in :meth:`read`."""
        ...

    def unmark(self, key: str) -> None:
        """Remove the mark."""
        ...

    def ping(self) -> float:
        """Return the round-trip time in seconds."""
        ...

    def close(self) -> None:
        """Close every idle connection; never raises."""
        ...


@dataclass(frozen=True, slots=True)
class Pulse:
    """A heartbeat's answer; every message up to ``stamp`` was handed over before it.

    Attributes:
        stamp: The server's counter.
        floor: The smallest stamp still alive.
        sent_at: Monotonic time before the question left: what a lease is counted from.
        received_at: Monotonic time when the answer was read.
        server_time: The server's clock, seconds since 1970.
    """

    stamp: int
    floor: int
    sent_at: float
    received_at: float
    server_time: float


class BackplaneListener(Protocol):
    """What the backplane tells; called on the backplane's thread, one call at a time, and must not block."""

    def on_subscribed(self) -> None:
        """A subscription has begun; nothing is proven yet."""
        ...

    def on_message(self, message: Message | None) -> bool:
        """Apply one message (None: undecodable); False asks for a heartbeat at once."""
        ...

    def on_pulse(self, pulse: Pulse) -> None:
        """A heartbeat was answered."""
        ...

    def on_lost(self, why: str) -> None:
        """The subscription has ended, or could not be had."""
        ...

    def highest_stamp(self) -> int:
        """Return the highest stamp this process knows of, to tell a counter that went backward."""
        ...


class Guard(Protocol):
    """What remote needs of the circuit breaker."""

    def allow(self) -> bool:
        """May a call go out now."""
        ...

    def success(self) -> None:
        """The server answered."""
        ...

    def failure(self) -> None:
        """The server did not answer, or not in time."""
        ...


class RemoteCounts(Protocol):
    """What remote counts."""

    l2_errors: int
    l2_rejected: int


class Connector(Protocol):
    """Makes connections to the one server that holds the namespace, wherever that is by now; thread-safe.

    Connections are redis-py's; this floor does not know them.

    Attributes:
        may_part: Whether the namespace's keys may be on two servers at a time.
    """

    may_part: bool

    def __call__(self) -> Any:
        """Return an unconnected connection; may have to ask where to."""
        ...

    def is_current(self, connection: Any) -> bool:
        """Does *connection* lead to where the server was said to be last."""
        ...

    def verify(self, connection: Any) -> None:
        """Raise the driver's ConnectionError where the server is not at the end of *connection* any more."""
        ...

    def is_moved(self, refusal: Exception) -> bool:
        """Does *refusal* say that another server holds the namespace; the next connection then leads there."""
        ...

    def detour(self, refusal: Exception) -> Any | None:
        """Return a connection for one command where *refusal* says that its keys, but not the slot, have moved."""
        ...
