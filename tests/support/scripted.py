"""L2, the backplane and time as a script of the test: nothing happens unless the test lets it.

:class:`Server` is Redis as the Lua scripts see it, :class:`ScriptedRemote` one process's way to it (each call can be
held before it takes effect and before its reply is delivered), :class:`ScriptedBackplane` one process's subscription:
a queue of messages and heartbeat answers in the order of execution, exactly as one RESP3 connection delivers them.
:class:`Process` is a real manager on top of the three. tests/model/test_script_is_redis.py holds this to the Lua.

:func:`explore` runs operations as greenlets that stop at those seams, in every order.
"""

from __future__ import annotations

import copy
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import greenlet

from celery_mlcache.codec import Codec
from celery_mlcache.coherence import Coherence
from celery_mlcache.entry import Entry
from celery_mlcache.errors import NotAnIntegerError, RemoteStoreError
from celery_mlcache.local import Local
from celery_mlcache.manager import CacheManager
from celery_mlcache.parts import Parts, Policy
from celery_mlcache.protocols import BackplaneListener, Fence, Filled, Grant, Pulse, Snapshot
from celery_mlcache.singleflight import SingleFlight
from celery_mlcache.stats import Stats
from celery_mlcache.tier import Tier
from celery_mlcache.wire import KIND_INTEGER, KIND_TOMBSTONE, MAX_INTEGER, pack_head, parse_message

EPOCH = 1_700_000_000  # the server's wall clock at the fake clock's 0, seconds since 1970
MARGIN = 1_000_000
NAMESPACE = "model"
DELTA = 1.0
TOMBSTONE_TTL = 60.0
GRAVE = bytes([KIND_TOMBSTONE])
WAKE_MS = 10_000


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Stored:
    """One Redis string, its head taken apart."""

    stamp: int
    expires_ms: int
    tail: bytes
    until_ms: int  # when Redis forgets it
    stale_ms: int = 0  # until when it may be served stale


@dataclass
class Line:
    """A prefix among the floors."""

    stamp: int
    prefix: str


@dataclass
class Lease:
    """The record of one key's lease."""

    fence: int
    owner: str
    ends_ms: int  # 0: given back
    until_ms: int  # when Redis forgets it
    waiters: int = 0


@dataclass(eq=False)
class Waiter:
    """Who waits for the release of one lease: an event for :class:`Actor`."""

    remote: ScriptedRemote
    deadline: float  # by the test's clock
    word: str | None = None

    def is_set(self) -> bool:
        return self.word is not None or self.remote.is_down or self.remote.server.clock.now >= self.deadline


class Server:
    """What Redis holds for one namespace, and what each Lua script does to it; one method a script."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.counter: int | None = None
        self.floor: int | None = None
        self.newest = self.guard = 0
        self.prefixes: list[Line] = []
        self.records: dict[str, tuple[int, int, int]] = {}  # tag: stamp, soft, until (ms)
        self.values: dict[str, Stored] = {}
        self.leases: dict[str, Lease] = {}
        self.words: dict[tuple[str, int], tuple[list[str], int]] = {}  # (key, fence): what is to be popped, until (ms)
        self.marks: dict[str, int] = {}  # until (ms)
        self.blocked: dict[tuple[str, int], list[Waiter]] = {}
        self.feeds: list[deque[Any]] = []
        self.announced: list[bytes] = []
        self.writes: list[tuple[int, str, bytes | None]] = []  # (stamp, key, tail; None: deleted), in order

    # ---- what a test does to it -----------------------------------------------------------------------------

    def flushall(self) -> None:
        """Lose everything, without a word to anybody."""
        self.counter = self.floor = None
        self.newest = self.guard = 0
        self.prefixes.clear()
        self.records.clear()
        self.values.clear()
        self.leases.clear()
        self.words.clear()
        self.marks.clear()

    def save(self) -> Any:
        """Return what a lagging replica would have."""
        floors = (self.counter, self.floor, self.newest, self.guard, self.prefixes)
        return copy.deepcopy((*floors, self.records, self.values, self.leases, self.words, self.marks))

    def restore(self, saved: Any) -> None:
        """Fail over to that replica."""
        self.counter, self.floor, self.newest, self.guard, *rest = copy.deepcopy(saved)
        self.prefixes, self.records, self.values, self.leases, self.words, self.marks = rest

    def live(self, key: str) -> Stored | None:
        """Return what a read would find, or None."""
        return None if self.floor is None else self._stored(key, self.floor)[0]

    def lose_record(self, tag: str) -> None:
        """Evict a tag's record."""
        self.records.pop(tag, None)

    # ---- the prelude ----------------------------------------------------------------------------------------

    def now_us(self) -> int:
        return EPOCH * 1_000_000 + round(self.clock.now * 1_000_000)

    def order(self, seen: int) -> tuple[int, int]:
        if self.counter and self.floor and self.counter >= seen:
            return self.counter, self.floor
        seed = max(self.now_us(), seen + MARGIN, (self.counter or 0) + MARGIN, (self.floor or 0) + MARGIN)
        self.counter = self.floor = self.newest = self.guard = seed
        self.prefixes.clear()
        self._announce("F", seed)
        return seed, seed

    def _next_stamp(self, seen: int) -> tuple[int, int]:
        _, floor = self.order(seen)
        assert self.counter is not None
        self.counter += 1
        return self.counter, floor

    def _announce(self, op: str, stamp: int, *keys: str) -> None:
        message = "\n".join(["1", op, str(stamp), str(self.now_us()), *keys]).encode()
        self.announced.append(message)
        for feed in self.feeds:
            feed.append(message)

    def _after(self, milliseconds: int) -> int:
        return self.now_us() // 1000 + milliseconds

    def _present(self, key: str) -> Stored | None:
        found = self.values.get(key)
        if found is not None and self.now_us() // 1000 > found.until_ms:
            del self.values[key]
            return None
        return found

    def _put(  # noqa: PLR0917 - as the Lua's
        self, key: str, stamp: int, expires_ms: int, tail: bytes, until_ms: int = 0, stale_ms: int = 0
    ) -> None:
        self.values[key] = Stored(stamp, expires_ms, tail, max(expires_ms, until_ms, stale_ms), stale_ms)
        self.writes.append((stamp, key, None if tail == GRAVE else tail))

    def _write(self, key: str, stamp: int, expires_ms: int, tail: bytes, stale_ms: int = 0) -> None:
        self._hold_records(tags_of(tail), max(expires_ms, stale_ms))
        self._put(key, stamp, expires_ms, tail, self._after(milliseconds(TOMBSTONE_TTL)), stale_ms)

    def _is_dead(self, found: Stored, *, is_lenient: bool = False) -> bool:
        ends = max(found.expires_ms, found.stale_ms) if is_lenient else found.expires_ms
        return found.tail == GRAVE or ends <= self.now_us() // 1000

    def _stored(self, key: str, floor: int, *, is_lenient: bool = False) -> tuple[Stored | None, int]:
        found = self._present(key)
        if found is None or found.stamp < floor:
            return None, 0
        last = (
            0
            if found.tail == GRAVE
            else self._invalidated(key, tags_of(found.tail), is_lenient=is_lenient and found.stale_ms > 0)
        )
        if last > found.stamp:
            return None, last
        return (None if self._is_dead(found, is_lenient=is_lenient) else found), found.stamp

    def _record_of(self, tag: str) -> tuple[int, int, int]:
        found = self.records.get(tag)
        if found is None or found[2] < self.now_us() // 1000:
            return self.newest, self.newest, 0
        return found

    def _hold_records(self, tags: Sequence[str], expires_ms: int) -> None:
        for tag in tags:
            stamp, soft, until = self._record_of(tag)
            if until < expires_ms:
                self.records[tag] = stamp, soft, 2 * expires_ms - self.now_us() // 1000

    def _invalidated(self, key: str, tags: Sequence[str], *, is_lenient: bool = False) -> int:
        lines = [line.stamp for line in self.prefixes if key.startswith(line.prefix)]
        return max([0, *lines, *[max(self._record_of(tag)[: 1 if is_lenient else 2]) for tag in tags]])

    def _snapshot(self, key: str, counter: int, floor: int, *, is_lenient: bool = False) -> Snapshot:
        found, stamp = self._stored(key, floor, is_lenient=is_lenient)
        if found is None:
            return Snapshot(None, stamp, counter, floor, None, self.now_us() / 1e6)
        ends = max(found.expires_ms, found.stale_ms) if is_lenient else found.expires_ms
        data = pack_head(stamp, found.expires_ms, found.stale_ms) + found.tail
        remaining = max(0.0, (ends - self.now_us() / 1000) / 1000)
        return Snapshot(data, stamp, counter, floor, remaining, self.now_us() / 1e6)

    # ---- the scripts ----------------------------------------------------------------------------------------

    def read(self, keys: Sequence[str], seen: int, *, is_lenient: bool = False) -> list[Snapshot]:
        counter, floor = self.order(seen)
        return [self._snapshot(key, counter, floor, is_lenient=is_lenient) for key in keys]

    def write(self, items: Sequence[tuple[str, bytes, int]], seen: int, stale: int = 0) -> int:
        stamp, _ = self._next_stamp(seen)
        for key, tail, ms in items:
            self._write(key, stamp, self._after(ms), tail, stale and self._after(ms + stale))
        self._announce("W", stamp, *[key for key, _, _ in items])
        return stamp

    def replace(
        self,
        key: str,
        tail: bytes,
        expected: int | None,
        ms: int | None,
        seen: int,
        *,
        fence: int | None = None,
        stale: int = 0,
    ) -> int | None:
        _, floor = self.order(seen)
        found, stamp = self._stored(key, floor)
        if (found is not None) if expected is None else (stamp != expected):
            return None
        if fence is not None and max(self.guard, self._invalidated(key, tags_of(tail))) > fence:
            return None
        if ms is None and found is None:
            return None
        expires, stale_ms = self._after(ms or 1), stale and self._after((ms or 1) + stale)
        if ms is None and found is not None:
            expires, stale_ms = found.expires_ms, found.stale_ms
        stamp, _ = self._next_stamp(seen)
        self._write(key, stamp, expires, tail, stale_ms)
        self._announce("W", stamp, key)
        return stamp

    def delete(self, keys: Sequence[str], seen: int) -> tuple[int, int]:
        ms = milliseconds(TOMBSTONE_TTL)
        stamp, floor = self._next_stamp(seen)
        removed = 0
        for key in keys:
            removed += self._stored(key, floor)[0] is not None
            self._put(key, stamp, self._after(ms), GRAVE)
        self._announce("D", stamp, *keys)
        return stamp, removed

    def fill(self, items: Sequence[tuple[str, bytes, int, Fence]], stale: int = 0) -> list[Filled]:
        outcome = []
        now_ms = self.now_us() // 1000
        for key, tail, ms, (token, clock, lease) in items:
            answer = Filled(is_stored=False, winner=None, refused="fence")
            is_early = now_ms <= int(clock * 1000) + milliseconds(TOMBSTONE_TTL) // 2
            if self.counter and self.floor and self.counter >= token >= max(self.floor, self.guard) and is_early:
                found, stamp = self._stored(key, self.floor)
                if found is not None:
                    winner = self._snapshot(key, self.counter, self.floor)
                    answer = Filled(is_stored=False, winner=winner, refused="winner")
                elif lease and (record := self._lease(key)) is not None and record.fence > lease:
                    pass
                elif stamp <= token:
                    is_valid = self._invalidated(key, tags_of(tail)) <= token
                    stale_ms = stale and self._after(ms + stale)
                    self._hold_records(tags_of(tail), max(self._after(ms), stale_ms))
                    if is_valid:
                        self._put(key, token, self._after(ms), tail, 0, stale_ms)
                        answer = Filled(is_stored=True, winner=None)
            outcome.append(answer)
        return outcome

    def increment(
        self, key: str, delta: int, initial: tuple[int, bytes, int], seen: int
    ) -> tuple[int, int, float, tuple[str, ...]]:
        _, floor = self.order(seen)
        found, _ = self._stored(key, floor)
        number, tail, ms = initial
        expires, stale_ms = self._after(ms), 0
        if found is not None:
            tail, expires, stale_ms = found.tail, found.expires_ms, found.stale_ms
            if tail[0] != KIND_INTEGER or tail[1] != 0:
                raise NotAnIntegerError(key, "holds something that is not an integer")
            body_at = 5 + tail[3] * 256 + tail[4]
            number = int(tail[body_at:]) + delta
            if abs(number) > MAX_INTEGER:
                raise NotAnIntegerError(key, "would leave the range of ±2**53")
            tail = tail[:body_at] + str(number).encode()
        stamp, _ = self._next_stamp(seen)
        self._write(key, stamp, expires, tail, stale_ms)
        self._announce("W", stamp, key)
        return stamp, number, max(0, round(expires - self.now_us() / 1000)) / 1000, tags_of(tail)

    def touch(self, key: str, ms: int, seen: int) -> int | None:
        _, floor = self.order(seen)
        found, _ = self._stored(key, floor)
        if found is None:
            return None
        stamp, _ = self._next_stamp(seen)
        stale = found.stale_ms - found.expires_ms
        self._write(key, stamp, self._after(ms), found.tail, self._after(ms + stale) if stale > 0 else 0)
        self._announce("W", stamp, key)
        return stamp

    def clear(self, seen: int) -> int:
        self.floor, _ = self._next_stamp(seen)
        self.newest = self.guard = self.floor
        self.prefixes.clear()
        self._announce("F", self.floor)
        return self.floor

    def expire(self, key: str, seen: int) -> tuple[int, bool]:
        stamp, floor = self._next_stamp(seen)
        was_live = self._stored(key, floor)[0] is not None
        found, _ = self._stored(key, floor, is_lenient=True)
        fenced = self._after(milliseconds(TOMBSTONE_TTL))
        if found is not None and found.stale_ms > self.now_us() // 1000:
            self._put(key, stamp, self._after(0), found.tail, fenced, found.stale_ms)
        else:
            self._put(key, stamp, fenced, GRAVE)
        self._announce("D", stamp, key)
        return stamp, was_live

    def invalidate_tags(self, tags: Sequence[str], seen: int, *, is_soft: bool = False) -> int:
        stamp, _ = self._next_stamp(seen)
        for tag in tags:
            hard, _, until = self._record_of(tag)
            self.records[tag] = (
                *(hard if is_soft else stamp, stamp),
                max(until, self._after(milliseconds(TOMBSTONE_TTL))),
            )
        self.newest = stamp
        self._announce("T", stamp, *tags)
        return stamp

    def invalidate_prefix(self, prefix: str, seen: int) -> tuple[int, list[str]]:
        stamp, _ = self._next_stamp(seen)
        self.prefixes = [line for line in self.prefixes if not line.prefix.startswith(prefix)]
        unswept = [line.prefix for line in self.prefixes]
        self.prefixes.append(Line(stamp, prefix))
        self.guard = stamp
        self._announce("P", stamp, prefix)
        return stamp, [prefix, *unswept][:2]

    def sweep(self, prefix: str, stamp: int, seen: int) -> int:
        _, floor = self.order(seen)
        freed = 0
        for key in [key for key in self.values if key.startswith(prefix) and self._present(key) is not None]:
            if self.values[key].stamp < max(floor, self._invalidated(key, ())):
                del self.values[key]
                freed += 1
        self.prefixes = [line for line in self.prefixes if line.stamp > stamp or not line.prefix.startswith(prefix)]
        return freed

    # ---- the scripts about leases ---------------------------------------------------------------------------

    def _lease(self, key: str) -> Lease | None:
        found = self.leases.get(key)
        if found is not None and self.now_us() // 1000 >= found.until_ms:
            del self.leases[key]
            return None
        return found

    def acquire(self, key: str, owner: str, ms: int, seen: int | None, *, is_waiting: bool) -> Grant:
        if seen is not None and self.counter and self.floor:
            value, stamp = self._stored(key, self.floor)
            if value is not None and stamp != seen:
                return Grant(0, is_mine=False, has_value=True, remaining=0.0, owner="", is_takeover=False)
        lease = self._lease(key)
        is_mine = lease is None or lease.ends_ms <= self.now_us() // 1000
        is_takeover = is_mine and lease is not None and lease.ends_ms > 0
        if is_mine:
            fence, until = self.now_us(), self._after(ms + milliseconds(TOMBSTONE_TTL))
            if lease is not None:
                fence, until = max(fence, lease.fence + 1), max(until, lease.until_ms)
            lease = self.leases[key] = Lease(fence, owner, self._after(ms), until)
        else:
            assert lease is not None
            lease.waiters += is_waiting
        remaining = (lease.ends_ms * 1000 - self.now_us()) / 1e6
        return Grant(lease.fence, is_mine, False, remaining, lease.owner, is_takeover)

    def renew(self, held: Sequence[tuple[str, int]], ms: int) -> list[bool]:
        outcome = []
        for key, fence in held:
            lease = self._lease(key)
            is_held = lease is not None and lease.ends_ms > 0 and lease.fence == fence
            if lease is not None and is_held:
                lease.ends_ms = self._after(ms)
                lease.until_ms = max(lease.until_ms, lease.ends_ms + milliseconds(TOMBSTONE_TTL))
            outcome.append(is_held)
        return outcome

    def release(self, key: str, fence: int, word: str) -> bool:
        lease = self._lease(key)
        if lease is None or lease.ends_ms == 0 or lease.fence != fence:
            return False
        blocked = self.blocked.pop((key, fence), [])[: lease.waiters]
        for waiter in blocked:
            waiter.word = word
        if lease.waiters > len(blocked):
            self.words[key, fence] = [word] * (lease.waiters - len(blocked)), self._after(WAKE_MS)
        lease.owner, lease.ends_ms, lease.waiters = "", 0, 0
        return True

    def pop_word(self, key: str, fence: int) -> str | None:
        words, until_ms = self.words.get((key, fence), ([], 0))
        return words.pop() if words and self.now_us() // 1000 < until_ms else None

    def holder(self, key: str) -> str:
        lease = self._lease(key)
        return lease.owner if lease is not None and lease.ends_ms > self.now_us() // 1000 else ""

    def mark(self, key: str, ms: int, *, is_new: bool) -> bool:
        if is_new and self.marked(key):
            return False
        self.marks[key] = self._after(ms)
        return True

    def prolong(self, key: str, ms: int) -> None:
        if self.marked(key):
            self.marks[key] = self._after(ms)

    def marked(self, key: str) -> bool:
        return self.marks.get(key, 0) > self.now_us() // 1000


def tags_of(tail: bytes) -> tuple[str, ...]:
    """Return the tags that stand in a tail; none in what is no codec's."""
    try:
        at, found = 17, []
        for _ in range(2):  # the key and the note
            at += 2 + int.from_bytes(tail[at : at + 2])
        (count,) = struct.unpack_from(">H", tail, at)
        at += 2
        for _ in range(count):
            (size,) = struct.unpack_from(">H", tail, at)
            found.append(tail[at + 2 : at + 2 + size].decode())
            at += 2 + size
    except struct.error:
        return ()
    return tuple(found)


def milliseconds(seconds: float) -> int:
    """As remote.py rounds."""
    return max(1, int(seconds * 1000))


class ScriptedRemote:
    """A :class:`~celery_mlcache.protocols.RemoteStore` on a :class:`Server`.

    Attributes:
        is_down: Calls fail before they take effect.
        lost_replies: So many calls to come take effect and then fail.
        seam: Called with ("send" or "reply", operation, result) before the effect and before the reply.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.is_down = False
        self.lost_replies = 0
        self.seam: Callable[[str, str, Any], None] = stop
        self.calls: list[str] = []

    def _call(self, op: str, script: Callable[[], Any]) -> Any:
        self.calls.append(op)
        self.seam("send", op, None)
        if self.is_down:
            raise RemoteStoreError(op, "down")
        result = script()
        is_lost = self.lost_replies > 0
        self.lost_replies -= is_lost
        self.seam("reply", op, None if is_lost else result)
        if is_lost:
            raise RemoteStoreError(op, "no reply in time", outcome_unknown=True)
        return result

    def read(
        self, keys: Sequence[str], *, seen: int, is_lenient: bool = False, within: float | None = None
    ) -> list[Snapshot]:
        op = "lenient" if is_lenient else "read"
        return list(self._call(op, lambda: self.server.read(keys, seen, is_lenient=is_lenient)))

    def write(self, items: Sequence[tuple[str, bytes, float]], *, seen: int, stale_ttl: float = 0.0) -> int:
        lot = [(key, tail, milliseconds(ttl)) for key, tail, ttl in items]
        return int(self._call("write", lambda: self.server.write(lot, seen, int(stale_ttl * 1000))))

    def add(self, key: str, tail: bytes, ttl: float, *, seen: int) -> int | None:
        return self._call("add", lambda: self.server.replace(key, tail, None, milliseconds(ttl), seen))

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
        ms, stale = None if ttl is None else milliseconds(ttl), int(stale_ttl * 1000)
        script = self.server.replace
        return self._call("replace", lambda: script(key, tail, expected, ms, seen, fence=fence, stale=stale))

    def delete(self, keys: Sequence[str], *, seen: int) -> tuple[int, int]:
        return self._call("delete", lambda: self.server.delete(keys, seen))

    def fill(self, items: Sequence[tuple[str, bytes, float, Fence]], *, stale_ttl: float = 0.0) -> list[Filled]:
        lot = [(key, tail, milliseconds(ttl), fence) for key, tail, ttl, fence in items]
        return list(self._call("fill", lambda: self.server.fill(lot, int(stale_ttl * 1000))))

    def increment(
        self, key: str, delta: int, *, initial: tuple[int, bytes, float], seen: int
    ) -> tuple[int, int, float, tuple[str, ...]]:
        number, tail, ttl = initial
        first = (number, tail, milliseconds(ttl))
        return self._call("increment", lambda: self.server.increment(key, delta, first, seen))

    def touch(self, key: str, ttl: float, *, seen: int) -> int | None:
        return self._call("touch", lambda: self.server.touch(key, milliseconds(ttl), seen))

    def clear(self, *, seen: int) -> int:
        return int(self._call("clear", lambda: self.server.clear(seen)))

    def expire(self, key: str, *, seen: int) -> tuple[int, bool]:
        return self._call("expire", lambda: self.server.expire(key, seen))

    def invalidate_tags(self, tags: Sequence[str], *, seen: int, is_soft: bool = False) -> int:
        return int(self._call("invalidate", lambda: self.server.invalidate_tags(tags, seen, is_soft=is_soft)))

    def invalidate_prefix(self, prefix: str, *, seen: int) -> tuple[int, list[str]]:
        return self._call("prefix", lambda: self.server.invalidate_prefix(prefix, seen))

    def sweep(self, prefix: str, stamp: int, *, seen: int) -> int:
        return int(self._call("sweep", lambda: self.server.sweep(prefix, stamp, seen)))

    def acquire(self, key: str, *, owner: str, lease: float, seen: int | None, is_waiting: bool) -> Grant:
        ms, script = milliseconds(lease), self.server.acquire
        grant: Grant = self._call("acquire", lambda: script(key, owner, ms, seen, is_waiting=is_waiting))
        return grant

    def renew(self, held: Sequence[tuple[str, int]], *, lease: float) -> list[bool]:
        return list(self._call("renew", lambda: self.server.renew(held, milliseconds(lease)))) if held else []

    def release(self, key: str, fence: int, *, word: str) -> bool:
        return bool(self._call("release", lambda: self.server.release(key, fence, word)))

    def await_release(self, key: str, fence: int, timeout: float) -> str:
        """Wait as an actor; the test itself, to which nobody can give anything meanwhile, lets the time pass."""
        return str(self._call("await", lambda: self._wait(key, fence, timeout)))

    def _wait(self, key: str, fence: int, timeout: float) -> str:
        server = self.server
        word = server.pop_word(key, fence)
        if word is not None:
            return word
        actor = greenlet.getcurrent()
        if not isinstance(actor, Actor):
            server.clock.advance(timeout)
            return ""
        waiter = Waiter(self, server.clock.now + timeout)
        server.blocked.setdefault((key, fence), []).append(waiter)
        while not waiter.is_set():
            actor.waits_for = waiter
            actor.parent.switch("wait")
        if waiter.word is None:
            if waiter in server.blocked.get((key, fence), ()):
                server.blocked[key, fence].remove(waiter)
            if self.is_down:
                raise RemoteStoreError("await", "down", outcome_unknown=True)
        return waiter.word or ""

    def holder(self, key: str, *, within: float | None = None) -> str:
        return str(self._call("holder", lambda: self.server.holder(key)))

    def mark(self, key: str, seconds: float, *, is_new: bool = True) -> bool:
        return bool(self._call("mark", lambda: self.server.mark(key, milliseconds(seconds), is_new=is_new)))

    def prolong(self, key: str, seconds: float) -> None:
        self._call("prolong", lambda: self.server.prolong(key, milliseconds(seconds)))

    def marked(self, key: str, *, within: float | None = None) -> bool:
        return bool(self._call("marked", lambda: self.server.marked(key)))

    def unmark(self, key: str) -> None:
        self._call("unmark", lambda: self.server.marks.pop(key, None))

    def ping(self) -> float:
        self._call("ping", lambda: None)
        return 0.0

    def close(self) -> None:
        pass


@dataclass
class Answer:
    """A heartbeat's answer on its way."""

    counter: int | None
    floor: int | None
    sent_at: float
    highest: int


class ScriptedBackplane:
    """One process's subscription: the test says when the next thing in its queue arrives, or is lost.

    An answer stands in the queue behind every message that the server had sent before it, so it can be handed over
    only after they were delivered or lost: the one rule that the real backplane's single connection guarantees.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.queue: deque[Any] = deque()
        self.asked_soon = 0
        self.listener: BackplaneListener | None = None

    # ---- what the manager calls -----------------------------------------------------------------------------

    def start(self, listener: BackplaneListener) -> None:
        self.listener = listener
        self.connect()

    def stop(self, timeout: float) -> bool:
        self._cut()
        self.listener = None
        return True

    def ask_soon(self) -> None:
        self.asked_soon += 1

    def inherited_connection(self) -> None:
        return None

    # ---- what the test does ---------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return any(feed is self.queue for feed in self.server.feeds)

    def connect(self) -> None:
        """Subscribe."""
        assert self.listener is not None
        self.server.feeds.append(self.queue)
        self.listener.on_subscribed()

    def disconnect(self, why: str = "cut") -> None:
        """Lose the connection and all that was under way on it."""
        assert self.listener is not None
        self._cut()
        self.listener.on_lost(why)

    def ask(self) -> None:
        """Send a heartbeat; the server answers at once, the answer stands in the queue. None on a dead connection."""
        assert self.listener is not None
        server = self.server
        if not self.is_connected:
            return
        answer = Answer(server.counter, server.floor, server.clock.now, self.listener.highest_stamp())
        self.queue.append(answer)

    def deliver(self) -> Any:
        """Hand over the next thing in the queue and return it."""
        assert self.listener is not None
        item = self.queue.popleft()
        if isinstance(item, Answer):
            self._answer(item)
        else:
            self.listener.on_message(parse_message(item))
        return item

    def die(self) -> None:
        """Let the connection die without a word: nothing comes any more."""
        self._cut()

    def lose(self) -> Any:
        """Lose the next thing in the queue."""
        return self.queue.popleft()

    def drain(self) -> None:
        """Deliver everything."""
        while self.queue:
            self.deliver()

    def pulse(self) -> None:
        """Ask, and deliver everything up to the answer."""
        self.ask()
        self.drain()

    def _cut(self) -> None:
        self.server.feeds[:] = [feed for feed in self.server.feeds if feed is not self.queue]
        self.queue.clear()

    def _answer(self, answer: Answer) -> None:
        assert self.listener is not None
        counter, floor = answer.counter, answer.floor
        server = self.server
        if not counter or not floor or counter < answer.highest:
            sent_at = server.clock.now
            counter, floor = server.order(answer.highest)  # its announcement is in the queue before the answer
            self.queue.append(Answer(counter, floor, sent_at, 0))
            return
        self.listener.on_pulse(Pulse(counter, floor, answer.sent_at, server.clock.now, server.now_us() / 1e6))


CODEC = Codec()


class Process:
    """One process of the fleet: a real manager, tier, coherence, codec and L1 over the script."""

    def __init__(
        self,
        server: Server | None,
        clock: Clock,
        *,
        engine: str = "cacheout",
        is_synced: bool = True,
        max_stale: float = 0.0,
        strict: bool = False,
        l1_ttl: float = 300.0,
    ) -> None:
        self.clock = clock
        self.remote = None if server is None else ScriptedRemote(server)
        is_synced = is_synced and server is not None
        self.backplane = ScriptedBackplane(server) if is_synced and server is not None else None
        self.coherence = Coherence(
            delta=DELTA if is_synced else float("inf"), tombstone_ttl=TOMBSTONE_TTL, synced=is_synced
        )
        self.stats = Stats()
        self.local = Local(engine, 16)  # type: ignore[arg-type]
        self.tier = Tier(
            self.coherence,
            self.local,
            self.stats,
            namespace=NAMESPACE,
            l1_ttl=l1_ttl,
            max_stale=max_stale,
            clock=clock,
        )
        parts = Parts(
            policy=Policy(NAMESPACE, strict=strict),
            codec=CODEC,
            tier=self.tier,
            flights=SingleFlight(max_wait=30.0, clock=clock),
            stats=self.stats,
            remote=self.remote,
            backplane=self.backplane,  # type: ignore[arg-type]
        )
        self.cache = CacheManager(lambda: parts, name=NAMESPACE, clock=clock)
        self.cache.warm()

    def l1(self, key: str) -> Entry | None:
        """Return what L1 would answer with now, touching nothing."""
        now = self.clock.now
        entry = self.local.peek(key)
        if entry is None or now >= entry.deadline or now >= self.coherence.lease_until:
            return None
        return entry

    def pulse(self) -> None:
        """Renew the lease: ask, and deliver everything up to the answer."""
        assert self.backplane is not None
        self.backplane.pulse()


def make_fleet(count: int = 2, **options: Any) -> tuple[Server, Clock, list[Process]]:
    """Return a seeded server and *count* proven processes."""
    clock = Clock()
    server = Server(clock)
    server.order(0)
    fleet = [Process(server, clock, **options) for _ in range(count)]
    for process in fleet:
        if process.backplane is not None:
            process.pulse()
    return server, clock, fleet


# ---- every interleaving -------------------------------------------------------------------------------------


class Actor(greenlet.greenlet):
    """One operation; stops at each seam and goes on when it is switched to."""

    def __init__(self, run: Callable[[], Any], name: str = "") -> None:
        super().__init__(self._run)
        self.name = name
        self.body = run
        self.result: Any = None
        self.error: BaseException | None = None
        self.replies: list[tuple[str, Any]] = []
        self.waits_for: GreenEvent | Waiter | None = None
        self.at = "start"

    def _run(self) -> None:
        try:
            self.result = self.body()
        except Exception as exc:
            self.error = exc

    @property
    def is_ready(self) -> bool:
        return not self.dead and (self.waits_for is None or self.waits_for.is_set())

    def step(self) -> str:
        """Go on to the next seam; return its name, or "end"."""
        self.parent = greenlet.getcurrent()
        self.waits_for = None
        self.at = self.switch() or "end"
        if self.dead:
            self.at = "end"
        return self.at

    def run_to(self, *points: str) -> None:
        """Go on to the first of the named seams ("send read", "load", "end", ...)."""
        while self.step() not in points:
            assert not self.dead, f"{self.name} ended before {points}"

    def finish(self) -> Any:
        """Go on to the end; raise what it raised, or return what it returned."""
        while not self.dead:
            assert self.is_ready, f"{self.name} waits for ever"
            self.step()
        if self.error is not None:
            raise self.error
        return self.result


def stop(point: str, op: str, result: Any = None) -> None:
    """The seam: hand control back to the test, if an actor is running."""
    actor = greenlet.getcurrent()
    if isinstance(actor, Actor):
        if point == "reply" and result is not None:
            actor.replies.append((op, result))
        actor.parent.switch(f"{point} {op}".strip())


def load(source: Callable[[], Any]) -> Callable[[], Any]:
    """Return a loader that reads *source* and then stops once, as a slow query does."""

    def loader() -> Any:
        value = source()
        stop("load", "")
        return value

    return loader


class GreenEvent:
    """An Event whose wait hands control back to the test."""

    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True

    def wait(self, timeout: float | None = None) -> bool:
        actor = greenlet.getcurrent()
        assert isinstance(actor, Actor), "the test itself would wait for ever"
        while not self._is_set:
            actor.waits_for = self
            actor.parent.switch("wait")
        return True


# What singleflight finds under the name "threading": each actor counts as a thread.
GREEN_THREADING = SimpleNamespace(Event=GreenEvent, RLock=threading.RLock, get_ident=lambda: id(greenlet.getcurrent()))


@dataclass
class Schedule:
    """One order of steps: a list of choices, extended by 0 where it ends."""

    prefix: list[int]
    taken: list[tuple[int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def pick(self, options: Sequence[Any]) -> Any:
        at = len(self.taken)
        choice = self.prefix[at] if at < len(self.prefix) else 0
        self.taken.append((choice, len(options)))
        return options[choice]

    def successor(self) -> list[int] | None:
        taken = list(self.taken)
        while taken:
            choice, count = taken.pop()
            if choice + 1 < count:
                return [*[made for made, _ in taken], choice + 1]
        return None


def explore(run: Callable[[Schedule], None]) -> int:
    """Call *run* with every schedule there is, depth first; return how many there were."""
    prefix: list[int] | None = []
    count = 0
    while prefix is not None:
        schedule = Schedule(prefix)
        try:
            run(schedule)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\nafter the steps:\n  " + "\n  ".join(schedule.names)) from exc
        count += 1
        prefix = schedule.successor()
    return count
