"""L2: Redis. One guarded call site (:meth:`RedisRemote._exchange`); everything else packs arguments and reads replies.

Theory of operation. Connections are redis-py's own (authentication, TLS, Sentinel), made by the factory with
explicit timeouts and no retries of theirs, kept in a deque of ours and driven with hiredis-packed commands: about
twice as fast as ``Redis.get`` (facts of redis-py 8.1: a pool lock, a poll and telemetry for each command). There is
no poll at checkout, so a connection that the server closed while idle fails at first use; a command that may be
repeated is then sent once more on a fresh connection. A time-out is never retried: one call costs at most one.
A call may have another pace (:class:`_Pace`): one that waits for somebody takes longer, one in a hurry may not.

A cluster may send a command elsewhere. It was not executed, so it is sent once more whatever it is: for MOVED to the
server that connections lead to from then on, for ASK on a connection of its own. A slot that is moving key by key can
refuse a script for as long as that takes (TRYAGAIN): it is not tried again, but what it would have invalidated is
(:meth:`RedisRemote._bury`).

Every error of the driver or the OS becomes RemoteStoreError here and nowhere else. Anything else that unwinds a call
(SoftTimeLimitExceeded, GreenletExit, KeyboardInterrupt) passes through untouched, but its connection is dropped, for
a reply may still be on its way.

Not for use after a fork: the child builds a new one and closes the inherited sockets (:meth:`RedisRemote.abandon`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from math import inf
from typing import Any, Final, NamedTuple

import hiredis
from redis.connection import AbstractConnection
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from celery_mlcache.errors import NotAnIntegerError, RemoteStoreError
from celery_mlcache.keys import RedisNames
from celery_mlcache.protocols import Connector, Fence, Filled, Grant, Guard, RemoteCounts, Snapshot
from celery_mlcache.wire import KIND_TOMBSTONE, MAX_STAMP, is_plain, parse_order, split_value

_TIME: Final = b"*1\r\n$4\r\nTIME\r\n"
REMOTE_ERRORS: Final = (RedisError, OSError)
TIMEOUTS: Final = (RedisTimeoutError, TimeoutError)
# What redis-py and hiredis raise over bytes that are no RESP. Not Exception: a soft time limit must get through.
NONSENSE: Final = (ValueError, TypeError, LookupError, ArithmeticError, SystemError)
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 seconds
ASKING: Final = b"*1\r\n$6\r\nASKING\r\n"  # before each command to a server that does not have the slot yet
MOST_BURIED: Final = 16  # keys that are invalidated one by one; more are not worth the round trips
KEY_BY_KEY: Final = frozenset({"write", "replace", "delete", "touch", "expire"})  # by op
INVALIDATES_NOTHING: Final = frozenset(
    {"read", "seed", "add", "fill", "increment", "sweep", "acquire", "renew", "release"}  # by op
)
ABOUT_LEASES: Final = frozenset({"acquire", "renew", "release", "fill"})  # scripts
_GLOB: Final = re.compile(r"[*?\[\]\\^-]")  # what means something in a pattern of Redis
RECALL: Final = 60.0  # seconds
MAX_READS: Final = 5  # in one read, when others write between its two commands
MAX_PREFIXES: Final = 64  # that were invalidated and not swept yet: each operation looks through them
SCAN_COUNT: Final = 500  # Redis serves nobody else meanwhile
SHORTEST_WAIT: Final = 0.01  # seconds; a server may round less than a millisecond to 0, which is for ever


class Script:
    """A Lua script with what it shares with others before it, called by its SHA-1."""

    __slots__ = ("sha", "source")

    def __init__(self, name: str) -> None:
        folder = files("celery_mlcache") / "lua"
        parts = ("prelude", "lease", name) if name in ABOUT_LEASES else ("prelude", name)
        self.source = "\n".join((folder / f"{part}.lua").read_text("utf-8") for part in parts)
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


def milliseconds(seconds: float) -> int:
    """Round down, to 1 at least: nobody's value lives longer than was asked."""
    return max(1, int(seconds * 1000))


class RedisRemote:
    """See :class:`celery_mlcache.protocols.RemoteStore`. Thread-safe; greenlet-safe.

    Args:
        connect: Makes unconnected redis-py connections with explicit timeouts, no retry, RESP2, raw bytes.
        names: Every Redis name of the namespace.
        guard: The circuit breaker.
        counts: Where errors are counted.
        clock: Seconds, monotonic.
        max_idle: Connections kept between calls.
        tombstone_ttl: Seconds that what is left of a removed value refuses late fills.
    """

    def __init__(
        self,
        connect: Connector,
        names: RedisNames,
        *,
        guard: Guard,
        counts: RemoteCounts,
        clock: Callable[[], float],
        max_idle: int,
        tombstone_ttl: float,
    ) -> None:
        self._connect = connect
        self._names = names
        self._guard = guard
        self._counts = counts
        self._clock = clock
        self._max_idle = max_idle
        self._tombstone = milliseconds(tombstone_ttl)
        self._idle: deque[AbstractConnection] = deque()
        self._open: weakref.WeakSet[AbstractConnection] = weakref.WeakSet()  # busy ones too: a child lets go of all
        self._pid = os.getpid()
        self._control = (names.counter, names.floors)
        self._read, self._write, self._replace = Script("read"), Script("write"), Script("replace")
        self._delete, self._fill, self._increment = Script("delete"), Script("fill"), Script("increment")
        self._touch, self._clear, self._invalidate = Script("touch"), Script("clear"), Script("invalidate")
        self._prefix, self._sweep, self._expire = Script("prefix"), Script("sweep"), Script("expire")
        self._burial = Script("bury")
        self._acquire, self._renew, self._release = Script("acquire"), Script("renew"), Script("release")
        self._judged_until = 0.0  # until then, values are met that plain commands cannot judge

    # ---- reads ----------------------------------------------------------------------------------------------

    def read(
        self, keys: Sequence[str], *, seen: int, is_lenient: bool = False, within: float | None = None
    ) -> list[Snapshot]:
        """Return a snapshot for each key; see the protocol.

        Plain commands cost the server a third of what a script does, and tell all as long as no tagged value is older
        than the newest invalidation of any tag. Where one is, the script judges, from then on in the same trip: only
        the first such read of a while (:data:`RECALL`) is asked twice.
        """
        names = [self._names.value(key) for key in keys]
        pace = self._hurry(within)
        if not is_lenient and self._clock() >= self._judged_until:
            found = self._read_plain(names, seen, pace)
            if found is not None:
                return found
        return self._read_judged(names, seen, pace, is_lenient=is_lenient)

    def _read_plain(self, names: Sequence[str], seen: int, pace: _Pace | None) -> list[Snapshot] | None:
        """Read without a script, or return None where only that can tell."""
        clock, stored = self._exchange("read", _TIME, _pack(("MGET", *self._control, *names)), pace=pace)
        try:
            counter_text, floors, *values = stored
            counter, floor = parse_order(counter_text, floors)
            now_ms = int(clock[0]) * 1000 + int(clock[1]) / 1000
            if len(values) != len(names):
                raise ValueError(len(values))
        except NONSENSE as exc:
            raise self._misunderstood("read") from exc
        if not counter or not floor or counter < seen:
            return None  # lost: the script seeds
        if not is_plain(floors, values):
            self._judged_until = self._clock() + RECALL
            return None
        order = _Order(now_ms, counter, floor)
        return [_snapshot(data, order) or order.nothing(0) for data in values]  # newer than all is no value of ours

    def _read_judged(self, names: Sequence[str], seen: int, pace: _Pace | None, *, is_lenient: bool) -> list[Snapshot]:
        """Let the script judge; the command behind it, in the same trip, brings the bodies.

        Through Lua a body of 1 MB would take the server ten times as long. Where somebody writes between the two, both
        are asked again.
        """
        bodies = _pack(("MGET", *names))
        for _ in range(MAX_READS):
            mode = ("stale" if is_lenient else "",)
            reply, stored = self._call("read", self._read, names, mode, seen=seen, behind=(bodies,), pace=pace)
            try:
                counter_text, floor_text, clock_text, verdicts = reply
                order = _Order(int(clock_text) / 1000, int(counter_text), int(floor_text), is_lenient=is_lenient)
                if len(stored) != len(names) or len(verdicts) not in {0, len(names)}:
                    raise ValueError(len(stored))
                found = [
                    _snapshot(data, order) if not verdicts else _judged(data, verdicts[i], order)
                    for i, data in enumerate(stored)
                ]
            except NONSENSE as exc:
                raise self._misunderstood("read") from exc
            if None not in found:
                break
        return [each or order.nothing(0) for each in found]  # what is newer than the order to the last is not ours

    def ping(self) -> float:
        """Return the round-trip time in seconds."""
        sent_at = self._clock()
        self._exchange("ping", _pack(("PING",)))
        return self._clock() - sent_at

    # ---- writes ---------------------------------------------------------------------------------------------

    def write(self, items: Sequence[tuple[str, bytes, float]], *, seen: int, stale_ttl: float = 0.0) -> int:
        """Store all under one stamp with one announcement; see the protocol."""
        keys = [key for key, _, _ in items]
        arguments: list[Any] = [_joined(keys), int(stale_ttl * 1000)]
        for _, tail, ttl in items:
            arguments += (milliseconds(ttl), tail)
        reply = self._run("write", self._write, keys, arguments, seen=seen)
        with self._understanding("write"):
            return _stamp(reply)

    def add(self, key: str, tail: bytes, ttl: float, *, seen: int) -> int | None:
        """Store if no live value is there."""
        return self._replace_if("add", key, (key, milliseconds(ttl), tail, "", "", 0), seen)

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
        """Compare the stamp and set."""
        life = "" if ttl is None else milliseconds(ttl)
        arguments = (key, life, tail, expected, "" if fence is None else fence, int(stale_ttl * 1000))
        return self._replace_if("replace", key, arguments, seen)

    def _replace_if(self, op: str, key: str, arguments: Sequence[Any], seen: int) -> int | None:
        reply = self._run(op, self._replace, (key,), arguments, seen=seen, is_repeatable=False)
        with self._understanding(op):
            return _stamp(reply, allow_none=True) or None

    def delete(self, keys: Sequence[str], *, seen: int) -> tuple[int, int]:
        """Put tombstones under one stamp with one announcement."""
        reply = self._run("delete", self._delete, keys, (_joined(keys),), seen=seen)
        with self._understanding("delete"):
            stamp, removed = reply
            return _stamp(stamp), int(removed)

    def fill(self, items: Sequence[tuple[str, bytes, float, Fence]], *, stale_ttl: float = 0.0) -> list[Filled]:
        """Store what nothing has passed since its token."""
        arguments: list[Any] = [int(stale_ttl * 1000), self._names.lease_prefix]
        for _, tail, ttl, fence in items:
            # Half a tombstone's life after the fence: what is left for the command to wait in a frozen server's buffer.
            until_ms = int(fence.clock * 1000) + self._tombstone // 2
            arguments += (fence.token, until_ms, milliseconds(ttl), tail, fence.lease)
        reply = self._run("fill", self._fill, [key for key, *_ in items], arguments, seen=0, is_repeatable=False)
        with self._understanding("fill"):
            *outcomes, counter, floor, now_us = reply
            order = _Order(int(now_us) / 1000, int(counter), int(floor))
            filled = [_filled(outcome, order) for outcome in outcomes]
            if len(filled) == len(items):
                return filled
            raise ValueError(len(filled))

    def increment(
        self, key: str, delta: int, *, initial: tuple[int, bytes, float], seen: int
    ) -> tuple[int, int, float, tuple[str, ...]]:
        """Add in Lua; see the protocol."""
        number, tail, ttl = initial
        try:
            arguments = (key, delta, milliseconds(ttl), tail, number)
            reply = self._run("increment", self._increment, (key,), arguments, seen=seen, is_repeatable=False)
        except RemoteStoreError as exc:
            if "NOTINTEGER" in exc.why:
                raise NotAnIntegerError(key, "holds something that is not an integer") from None
            if "OVERFLOW" in exc.why:
                raise NotAnIntegerError(key, "would leave the range of ±2**53") from None
            raise
        with self._understanding("increment"):
            stamp, number, life, tags = reply
            return _stamp(stamp), int(number), int(life) / 1000, tuple([bytes.decode(tag) for tag in tags])

    def touch(self, key: str, ttl: float, *, seen: int) -> int | None:
        """Give a live value a new life."""
        reply = self._run("touch", self._touch, (key,), (key, milliseconds(ttl)), seen=seen)
        with self._understanding("touch"):
            return _stamp(reply, allow_none=True) or None

    def clear(self, *, seen: int) -> int:
        """Raise the floor over everything stored."""
        reply = self._run("clear", self._clear, (), (), seen=seen)
        with self._understanding("clear"):
            return _stamp(reply)

    def expire(self, key: str, *, seen: int) -> tuple[int, bool]:
        """End the value's life, but for those who take it stale."""
        reply = self._run("expire", self._expire, (key,), (key,), seen=seen)
        with self._understanding("expire"):
            stamp, was_live = reply
            return _stamp(stamp), bool(was_live)

    def invalidate_tags(self, tags: Sequence[str], *, seen: int, is_soft: bool = False) -> int:
        """Raise the tags' records under one stamp with one announcement."""
        names = [self._names.tag(tag) for tag in tags]
        arguments = (_joined(tags), "soft" if is_soft else "")
        reply = self._call("invalidate", self._invalidate, names, arguments, seen=seen)[0]
        with self._understanding("invalidate"):
            return _stamp(reply)

    def invalidate_prefix(self, prefix: str, *, seen: int) -> tuple[int, list[str]]:
        """Write the prefix among the floors, with one announcement."""
        reply = self._run("prefix", self._prefix, (), (prefix, MAX_PREFIXES), seen=seen)
        with self._understanding("prefix"):
            stamp, *unswept = reply
            # One that somebody has left is enough to take along; in a cluster none is ever done with.
            return _stamp(stamp), [bytes.decode(name) for name in unswept[: 1 if self._connect.may_part else 2]]

    def sweep(self, prefix: str, stamp: int, *, seen: int) -> int:
        """Scan in bounded batches, and free what is dead; see the protocol.

        All has been looked at only if it was one server from the first batch to the last (after a restart or a failover
        a cursor means nothing), and one that had all of it: not in a cluster, where keys move one by one.
        """
        server = self._server_id()
        pattern = _GLOB.sub(r"\\\g<0>", self._names.value(prefix)) + "*"
        cursor, freed = b"0", 0
        while True:
            scan = _pack(("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT))
            (reply,) = self._exchange("sweep", scan)
            with self._understanding("sweep"):
                cursor, found = reply
                if not isinstance(cursor, bytes) or not all(isinstance(name, bytes) for name in found):
                    raise ValueError(cursor)
            is_last = cursor == b"0"
            if found or is_last:
                is_swept = is_last and server is not None and server == self._server_id()
                arguments = (prefix, stamp if is_swept else "")
                reply = self._call("sweep", self._sweep, found, arguments, seen=seen)[0]
                with self._understanding("sweep"):
                    freed += int(reply)
            if is_last:
                return freed

    def _server_id(self) -> bytes | None:
        """Return what a server has for its life, or None where it does not have all keys, or does not tell."""
        if self._connect.may_part:
            return None
        with contextlib.suppress(RemoteStoreError):
            (info,) = self._exchange("sweep", _pack(("INFO", "server")))
            found = re.search(rb"run_id:(\w+)", info) if isinstance(info, bytes) else None
            return found[1] if found else None
        return None

    # ---- leases ---------------------------------------------------------------------------------------------

    def acquire(self, key: str, *, owner: str, lease: float, seen: int | None, is_waiting: bool) -> Grant:
        """Take the lease, or learn whose it is; see the protocol. One whose grant is lost on its way lapses."""
        names = (self._names.value(key), self._names.lease(key))
        arguments = (owner, milliseconds(lease), "" if seen is None else seen, "1" if is_waiting else "")
        (reply,) = self._call("acquire", self._acquire, names, arguments, seen=0, is_repeatable=False)
        with self._understanding("acquire"):
            return _grant(reply)

    def renew(self, held: Sequence[tuple[str, int]], *, lease: float) -> list[bool]:
        """Renew them all in one round trip; see the protocol."""
        if not held:
            return []
        names = [self._names.lease(key) for key, _ in held]
        arguments = (milliseconds(lease), *[fence for _, fence in held])
        (reply,) = self._call("renew", self._renew, names, arguments, seen=0)
        with self._understanding("renew"):
            renewed = [_claim(each) for each in reply]
            if len(renewed) == len(held):
                return renewed
            raise ValueError(len(renewed))

    def release(self, key: str, fence: int, *, word: str) -> bool:
        """Give the lease back, and wake who waits; see the protocol."""
        names = (self._names.lease(key), self._names.wake(key, fence))
        (reply,) = self._call("release", self._release, names, (fence, word), seen=0)  # said twice, it wakes once
        with self._understanding("release"):
            return _claim(reply)

    def await_release(self, key: str, fence: int, timeout: float) -> str:
        """Let the server wait, on a connection that nobody else uses meanwhile; see the protocol."""
        timeout = max(SHORTEST_WAIT, timeout)
        pace = _Pace(self._clock() + timeout, is_hurried=False)
        command = _pack(("BLPOP", self._names.wake(key, fence), f"{timeout:.3f}"))
        (reply,) = self._exchange("await", command, is_repeatable=False, pace=pace)
        with self._understanding("await"):
            if reply is None:
                return ""
            _, word = reply
            return bytes.decode(word)

    def holder(self, key: str, *, within: float | None = None) -> str:
        """Look who holds the lease."""
        pace = self._hurry(within)
        ask = _pack(("HMGET", self._names.lease(key), "until", "owner"))
        clock, found = self._exchange("holder", _TIME, ask, pace=pace)
        with self._understanding("holder"):
            until, owner = found
            now_ms = int(clock[0]) * 1000 + int(clock[1]) // 1000
            return bytes.decode(owner) if until and int(until) > now_ms else ""

    def _hurry(self, within: float | None) -> _Pace | None:
        return None if within is None else _Pace(self._clock() + within, is_hurried=True)

    def mark(self, key: str, seconds: float, *, is_new: bool = True) -> bool:
        """Leave a mark, unless there is one that is to stay."""
        command = ("SET", self._names.mark(key), "1", "PX", milliseconds(seconds), *(("NX",) if is_new else ()))
        (reply,) = self._exchange("mark", _pack(command), is_repeatable=not is_new)
        with self._understanding("mark"):
            return {b"OK": True, None: False}[reply]

    def prolong(self, key: str, seconds: float) -> None:
        """Prolong a mark."""
        self._exchange("prolong", _pack(("PEXPIRE", self._names.mark(key), milliseconds(seconds))))

    def marked(self, key: str, *, within: float | None = None) -> bool:
        """Look for a mark."""
        (reply,) = self._exchange("marked", _pack(("EXISTS", self._names.mark(key))), pace=self._hurry(within))
        with self._understanding("marked"):
            return {0: False, 1: True}[reply]

    def unmark(self, key: str) -> None:
        """Remove the mark."""
        self._exchange("unmark", _pack(("DEL", self._names.mark(key))))

    # ---- connections ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close every idle connection."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return
            self._drop(connection, is_clean=True)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's sockets without a word on them.

        Closes this process's copies of the descriptors; no destructor of an inherited object runs a protocol.
        One that another thread was just making when the process forked stays open, unused, until the child ends.
        """
        for connection in list(self._open):
            abandon_socket(connection)

    def _run(
        self,
        op: str,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Any],
        *,
        seen: int,
        is_repeatable: bool = True,
    ) -> Any:
        """Run a script about user keys and return its reply."""
        names = [self._names.value(key) for key in keys]
        return self._call(op, script, names, arguments, seen=seen, is_repeatable=is_repeatable)[0]

    def _call(
        self,
        op: str,
        script: Script,
        names: Sequence[str | bytes],
        arguments: Sequence[Any],
        *,
        seen: int,
        is_repeatable: bool = True,
        behind: Sequence[bytes] = (),
        pace: _Pace | None = None,
    ) -> list[Any]:
        """Run a script about Redis keys, and packed commands *behind* it in the same trip; return the replies."""
        common = (self._names.channel, seen, self._tombstone, self._names.value_prefix, self._names.tag_prefix)
        rest = (len(names) + len(self._control), *self._control, *names, *common, *arguments)
        try:
            return self._evaluate(op, script, rest, behind, is_repeatable=is_repeatable, pace=pace)
        except RemoteStoreError as exc:
            if op not in INVALIDATES_NOTHING and _is_apart(exc.__cause__):
                with contextlib.suppress(RemoteStoreError):
                    self._bury(op, names, common)
            raise

    def _evaluate(
        self,
        op: str,
        script: Script,
        rest: Sequence[Any],
        behind: Sequence[bytes] = (),
        *,
        is_repeatable: bool = True,
        pace: _Pace | None = None,
    ) -> list[Any]:
        try:
            packed = _pack(("EVALSHA", script.sha, *rest))
            return self._exchange(op, packed, *behind, is_repeatable=is_repeatable, pace=pace)
        except RemoteStoreError as exc:
            if not isinstance(exc.__cause__, NoScriptError):
                raise
        packed = _pack(("EVAL", script.source, *rest))
        return self._exchange(op, packed, *behind, is_repeatable=is_repeatable, pace=pace)

    def _bury(self, op: str, names: Sequence[str | bytes], common: Sequence[Any]) -> None:
        """Invalidate what a write could not replace, while the keys of a cluster's slot are on two servers.

        What touches one key can always be done: it is here, or has gone ahead. So each key takes a stamp of its own
        and leaves a tombstone; that this is no longer one step looks like a lost message, which voids L1.
        With many keys, or other things than keys, everything dies: by a new floor, or where even that is apart, by
        none.
        """
        if op in KEY_BY_KEY and len(names) <= MOST_BURIED:
            for name in names:
                (stamp,) = self._exchange(op, _pack(("INCR", self._names.counter)), is_repeatable=False)
                key = str(name).removeprefix(self._names.value_prefix)
                self._evaluate(op, self._burial, (1, name, *common, key, stamp))
            # A hole behind them: who was proven between a stamp and its burial, and never hears of that, starts anew.
            self._exchange(op, _pack(("INCR", self._names.counter)), is_repeatable=False)
        elif op == "clear":
            self._exchange(op, _pack(("DEL", self._names.floors)))
        else:
            self.clear(seen=common[1])

    def _exchange(self, op: str, *commands: bytes, is_repeatable: bool = True, pace: _Pace | None = None) -> list[Any]:
        """Send and read: the one place where breaker, error wrapping and counting stand."""
        if os.getpid() != self._pid:
            # A call that was under way when this process was forked comes out of its loader in the child.
            raise RemoteStoreError(op, "this connection belongs to the parent process")
        if not self._guard.allow():
            self._counts.l2_rejected += 1
            raise RemoteStoreError(op, "the circuit is open")
        try:
            answers = self._exchange_once(commands, pace, is_repeatable=is_repeatable)
        except ResponseError as exc:
            # The server lives and refuses (NOSCRIPT, OOM, NOPERM, READONLY, ...): no reason to stop asking it.
            self._guard.success()
            if isinstance(exc, ReadOnlyError):
                self.close()  # demoted to a replica: ask who is master now
            if not isinstance(exc, NoScriptError):
                self._counts.l2_errors += 1
            raise RemoteStoreError(op, str(exc)) from exc
        except (*REMOTE_ERRORS, *NONSENSE) as exc:
            # A time-out of somebody in a hurry says nothing of the server: others may wait longer.
            if pace is None or not pace.is_hurried or not isinstance(exc, TIMEOUTS):
                self.close()  # idle ones lead to the same server
                self._guard.failure()
            self._counts.l2_errors += 1
            raise RemoteStoreError(op, f"{type(exc).__name__}: {exc}", outcome_unknown=True) from exc
        self._guard.success()
        return answers

    def _exchange_once(self, commands: Sequence[bytes], pace: _Pace | None, *, is_repeatable: bool) -> list[Any]:
        try:
            return self._attempt(b"".join(commands), len(commands), pace, is_repeatable=is_repeatable)
        except ResponseError as exc:
            # Redirected, so not executed: it may be sent once more, whatever it is.
            detour = self._connect.detour(exc)
            if detour is None and not self._connect.is_moved(exc):
                raise
        if detour is None:
            self.close()
            return self._attempt(b"".join(commands), len(commands), pace, is_repeatable=False)
        self._dial(detour, pace)
        asking = b"".join([part for command in commands for part in (ASKING, command)])
        return self._round_trip(detour, asking, 2 * len(commands), pace)[1::2]

    def _attempt(self, packed: bytes, replies: int, pace: _Pace | None, *, is_repeatable: bool) -> list[Any]:
        connection, is_reused = self._checkout(pace, must_live=not is_repeatable)
        try:
            return self._round_trip(connection, packed, replies, pace)
        except (RedisConnectionError, OSError) as exc:
            if isinstance(exc, TIMEOUTS) or not is_reused or not is_repeatable:
                raise
        # The server closed it while it was idle, and most likely its siblings too.
        self.close()
        connection, _ = self._checkout(pace, must_live=False)
        return self._round_trip(connection, packed, replies, pace)

    def _round_trip(self, connection: AbstractConnection, packed: bytes, replies: int, pace: _Pace | None) -> list[Any]:
        refusal: ResponseError | None = None
        answers = []
        is_clean = False
        try:
            if pace is not None:
                self._set_pace(connection, pace)
            connection.send_packed_command([packed], check_health=False)
            for number in range(replies):
                if pace is not None and number:
                    self._set_pace(connection, pace)
                try:
                    answers.append(connection.read_response())
                except ResponseError as exc:
                    refusal = refusal or exc
            if pace is not None:
                _set_timeout(connection, connection.socket_timeout)
            is_clean = True
        finally:
            # Whatever unwound this, a reply may still come: such a connection must not be used again.
            if is_clean and len(self._idle) < self._max_idle:
                self._idle.append(connection)
            else:
                self._drop(connection, is_clean=is_clean)
        if refusal is not None:
            raise refusal
        return answers

    def _set_pace(self, connection: AbstractConnection, pace: _Pace) -> None:
        """Have the next read, or write, take no longer than *pace* leaves."""
        left, regular = pace.until - self._clock(), connection.socket_timeout or inf
        timeout = min(left, regular) if pace.is_hurried else left + regular
        if timeout <= 0:
            raise RedisTimeoutError("no time is left")
        _set_timeout(connection, timeout)

    def _checkout(self, pace: _Pace | None = None, *, must_live: bool) -> tuple[AbstractConnection, bool]:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if self._connect.is_current(connection) and (not must_live or _is_quiet(connection)):
                return connection, True
            self._drop(connection, is_clean=True)
        connection = self._connect()
        self._dial(connection, pace)
        return connection, False

    def _dial(self, connection: AbstractConnection, pace: _Pace | None) -> None:
        self._open.add(connection)
        try:
            if pace is None or not pace.is_hurried:
                connection.connect()
            else:
                _connect_within(connection, pace.until - self._clock())
        except BaseException:
            self._drop(connection, is_clean=True)
            raise

    def _drop(self, connection: AbstractConnection, *, is_clean: bool) -> None:
        sock = socket_of(connection)
        with contextlib.suppress(*REMOTE_ERRORS):
            if not is_clean and sock is not None:
                # A reset takes back what still waits in the buffers: a frozen server must not run, minutes later, a
                # command whose caller has long given it up.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.close()
            connection.disconnect()
        self._open.discard(connection)  # only now: a child forked in between has to let go of it

    @contextlib.contextmanager
    def _understanding(self, op: str) -> Iterator[None]:
        try:
            yield
        except NONSENSE as exc:
            raise self._misunderstood(op) from exc

    def _misunderstood(self, op: str) -> RemoteStoreError:
        """Turn a reply of another shape into an outage: something else than Redis is talking."""
        self._guard.failure()
        self._counts.l2_errors += 1
        return RemoteStoreError(op, "the reply has an unknown shape", outcome_unknown=True)


class _Pace(NamedTuple):
    """How long a call may take that is in a hurry, or has the server wait."""

    until: float  # by the clock
    is_hurried: bool  # else the server may take one socket timeout more to say that nothing has happened


class _Order(NamedTuple):
    """What a script says beside its values: the server's clock in ms, counter and floor; and how it judged."""

    now_ms: float
    counter: int
    floor: int
    is_lenient: bool = False

    def nothing(self, stamp: int) -> Snapshot:
        return Snapshot(None, stamp, self.counter, self.floor, None, self.now_ms / 1000)


def _snapshot(data: Any, order: _Order) -> Snapshot | None:
    """Return what *data* says of itself, or None where it is newer than *order*."""
    split = split_value(data) if isinstance(data, bytes) else None
    if split is None or split[0] < order.floor:
        return order.nothing(0)
    stamp, expires_ms, stale_ms, kind = split
    if stamp > order.counter:
        return None
    # The clock was read before the value, and the caller counts from before it asked: never too long.
    remaining = ((max(expires_ms, stale_ms) if order.is_lenient else expires_ms) - order.now_ms) / 1000
    if kind == KIND_TOMBSTONE or remaining <= 0:
        return order.nothing(stamp)  # the key may outlive its value, as a tombstone or to be served stale
    return Snapshot(data, stamp, order.counter, order.floor, remaining, order.now_ms / 1000)


def _judged(data: Any, verdict: int, order: _Order) -> Snapshot | None:
    """As :func:`_snapshot`, where the script has judged what was stored a moment before."""
    if verdict <= 0 or data is None:  # gone meanwhile: its life has ended
        return order.nothing(max(0, -verdict))
    found = _snapshot(data, order)
    return found if found is not None and found.stamp == verdict else None


def _filled(outcome: Any, order: _Order) -> Filled:
    code, *rest = outcome
    if code == 0:
        return Filled(is_stored=True, winner=None)
    if code == 1:
        (data,) = rest
        return Filled(is_stored=False, winner=_snapshot(data, order), refused="winner")
    return Filled(is_stored=False, winner=None, refused="fence")


def _grant(reply: Any) -> Grant:
    code, *rest = reply
    if not isinstance(code, int) or not 0 <= code <= 3:  # noqa: PLR2004 - as acquire.lua says
        raise ValueError(code)
    if code == 0:
        return Grant(0, is_mine=False, has_value=True, remaining=0.0, owner="", is_takeover=False)
    fence, left_us, owner = rest
    return Grant(
        _stamp(fence),
        is_mine=code > 1,
        has_value=False,
        remaining=max(0, left_us) / 1e6,
        owner=bytes.decode(owner, "utf-8", "replace"),  # it is for people, and may be anybody's
        is_takeover=code == 3,  # noqa: PLR2004
    )


def _claim(reply: Any) -> bool:
    if reply not in {0, 1}:
        raise ValueError(reply)
    return bool(reply)


def _stamp(reply: Any, *, allow_none: bool = False) -> int:
    if not isinstance(reply, int) or not (0 < reply <= MAX_STAMP or (allow_none and reply == 0)):
        raise ValueError(reply)
    return reply


def _pack(command: tuple[Any, ...]) -> bytes:
    # Numbers as bytes: hiredis 3 calls back into Python for an int, and takes the process down if a signal handler
    # (Celery's soft time limit) raises in there.
    parts: Any = tuple([b"%d" % part if isinstance(part, int) else part for part in command])
    packed: bytes = hiredis.pack_command(parts)
    return packed


def _joined(keys: Sequence[str]) -> str:
    return "\n".join(keys)


def _is_apart(error: BaseException | None) -> bool:
    """Does a cluster say that it is just moving the slot, and that not all of the keys are on one server."""
    text = str(error)
    return isinstance(error, TryAgainError) or text.startswith("TRYAGAIN") or "non local key" in text


def _is_quiet(connection: AbstractConnection) -> bool:
    """An idle connection with something to read has been closed, or is out of step."""
    try:
        return not connection.can_read(timeout=0)
    except REMOTE_ERRORS:
        return False


def socket_of(connection: AbstractConnection) -> socket.socket | None:
    """Return redis-py's socket; it has no public way to it."""
    return getattr(connection, "_sock", None)


def _set_timeout(connection: AbstractConnection, timeout: float | None) -> None:
    sock = socket_of(connection)
    if sock is not None:
        sock.settimeout(timeout)


def _connect_within(connection: Any, seconds: float) -> None:
    """Connect in about *seconds*: a name may have two addresses, and each step of the greeting waits for itself.

    It is an ordinary connection afterwards. redis-py's parser has a copy of the timeout, to which some releases (5.2 to
    7.1) return after a poll.
    """
    regular = connection.socket_timeout, getattr(connection, "socket_connect_timeout", None)
    if seconds <= 0:
        raise RedisTimeoutError("no time is left to connect")
    timeouts = [min(seconds / 4, each or inf) for each in regular]
    connection.socket_timeout, connection.socket_connect_timeout = timeouts
    connection.connect()
    connection.socket_timeout, connection.socket_connect_timeout = regular
    connection._parser._socket_timeout = regular[0]  # noqa: SLF001 - there is no public way
    _set_timeout(connection, regular[0])


def abandon_socket(connection: AbstractConnection) -> None:
    """Close this process's copy of an inherited connection's descriptor, telling the server nothing."""
    sock = socket_of(connection)
    if sock is not None:
        with contextlib.suppress(OSError):
            os.close(sock.detach())
