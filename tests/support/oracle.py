"""What was true in L2, and when: the fold of everything the server executed.

Pure: commands in, spans out. A *span* is the time for which one version was the live value of a key; a *break* is
whatever made the copies of a key old (a write, a delete, a flush, a tag's or a prefix's invalidation, lost data). All
stand in one order, the server's: an event's ``pos``. What an announcement and its script stored share a position.

An event has two times: it did not happen before ``low`` (the server's clock, turned into ours, less a margin) nor
after ``high`` (when the witness heard of it). Whoever concludes something takes the one that can only make him
conclude less.

After a restart from a snapshot, what was stored since is gone: `lost`. A break that was lost binds nobody any more,
for nobody may remember it (the contract says so); the flush that follows once somebody does is a break of its own.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from celery_mlcache.keys import RedisNames
from celery_mlcache.wire import KIND_TOMBSTONE, parse_message, split_value
from tests.support.monitor import Seen

MARGIN = 0.005  # seconds by which a server's time, turned into ours, may be wrong
VALUE = re.compile(rb"<([^<>|]+)\|(\d+)>")
_REMOVES = frozenset({"DEL", "UNLINK", "GETDEL"})
_FLUSHES = frozenset({"FLUSHALL", "FLUSHDB"})


def text_of(key: str, version: int) -> str:
    """Return the value that carries *version* of *key*: found again in any serialization that keeps text as it is."""
    return f"<{key}|{version}>"


def version_in(data: bytes, key: str) -> int:
    """Return the version that a value carries; -1 if it is a value of another key or none of ours."""
    found = VALUE.search(data)
    return int(found[2]) if found is not None and found[1] == key.encode() else -1


@dataclass(slots=True, eq=False)
class Event:
    """Something that the server did."""

    pos: int
    low: float
    high: float
    kind: str  # write, fill, delete, flush, tag, prefix, gone (data lost or removed), revived
    stamp: int = 0
    what: str = ""  # the key, tag or prefix; "": everything
    is_lost: bool = False
    versions: dict[str, int] = field(default_factory=dict)  # what it stored, by key


@dataclass(slots=True, eq=False)
class Span:
    """A version was the live value of a key from ``began`` until ``ended`` or ``expires`` (CLOCK_MONOTONIC)."""

    key: str
    version: int
    stamp: int
    began: Event
    expires: float = inf
    ended: Event | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """One key as a dump has it; version 0 is a tombstone."""

    stamp: int
    version: int
    expires: float


@dataclass(frozen=True, slots=True)
class Reload:
    """A server that was killed and started again, and what it had then, before anybody reached it."""

    killed_from: float
    killed_until: float
    counter: int  # 0: it has none
    values: Mapping[str, Stored]


class BlindError(AssertionError):
    """The witness saw something that the oracle cannot follow: nothing can be concluded."""


@dataclass
class Oracle:
    """L2's past.

    Args:
        names: Of the namespace.
        keys: All keys that are used.
        tags: The tags that each key always carries.
        offset: The server's clock less CLOCK_MONOTONIC.
    """

    names: RedisNames
    keys: Sequence[str]
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    offset: float = 0.0

    def __post_init__(self) -> None:
        self.spans: dict[tuple[str, int], list[Span]] = defaultdict(list)
        self.breaks: dict[str, list[Event]] = defaultdict(list)
        self.states: dict[str, list[tuple[Event, Span | None]]] = defaultdict(list)
        self.fills: list[tuple[Event, str, int, Event | None]] = []  # fill, key, version, the last break before it
        self.kills: list[tuple[float, float]] = []
        self._live: dict[str, Span] = {}
        self._announced: list[tuple[int, Event]] = []  # of this life of the server, by stamp
        self._by_stamp: dict[int, list[Event]] = defaultdict(list)
        self._said: tuple[Event, set[str]] | None = None  # the script that is under way
        self._pos = 0

    # ---- building -------------------------------------------------------------------------------------------

    def feed(self, commands: Iterable[Seen], reloads: Sequence[Reload] = ()) -> Oracle:
        """Fold *commands*; the n-th time that the witness attached again goes with the n-th of *reloads*."""
        attached = 0
        for seen in commands:
            if not seen.args:
                attached += 1
                if attached > 1:
                    self._reload(reloads[attached - 2])
            else:
                self._execute(seen)
        return self

    def _execute(self, seen: Seen) -> None:
        self._pos += 1
        name, *args = seen.args
        verb = name.decode("ascii", "replace").upper()
        low = min(seen.server_time - self.offset - MARGIN, seen.at)
        if verb == "PUBLISH" and args[0].decode() == self.names.channel:
            self._announce(args[1], low, seen.at)
        elif verb == "SET":
            self._set(args, seen, low)
        elif verb in _REMOVES:
            for each in args:
                key = self._key(each)
                if key in self._live:
                    self._break(Event(self._pos, low, seen.at, "gone", what=key), [key])
        elif verb in _FLUSHES:
            self._break(Event(self._pos, low, seen.at, "gone"), self.keys)
        elif verb != "PUBLISH" and any(self._key(each) for each in args):
            raise BlindError(f"{verb} of a value: {args}")

    def _announce(self, data: bytes, low: float, high: float) -> None:
        message = parse_message(data)
        if message is None:
            raise BlindError(f"an announcement that is none: {data!r}")
        tags, prefixes = getattr(message, "tags", ()), getattr(message, "prefixes", ())
        kind = {b"W": "write", b"D": "delete"}.get(data.split(b"\n")[1], "flush")
        kind = "tag" if tags else "prefix" if prefixes else kind
        event = Event(self._pos, low, high, kind, message.stamp, " ".join((*message.keys, *tags, *prefixes)))
        self._said = event, set(message.keys)
        self._announced.append((message.stamp, event))
        self._by_stamp[message.stamp].append(event)
        hit = set(message.keys)
        if message.is_flush:
            hit.update(self.keys)
        hit.update(key for key in self.keys if set(tags) & set(self.tags.get(key, ())))
        hit.update(key for key in self.keys if prefixes and key.startswith(tuple(prefixes)))
        self._break(event, [key for key in self.keys if key in hit])

    def _set(self, args: Sequence[bytes], seen: Seen, low: float) -> None:
        key = self._key(args[0])
        split = split_value(args[1]) if key else None
        if split is None:
            return
        stamp, expires_ms, _, kind = split
        if kind != KIND_TOMBSTONE and key not in self._live and expires_ms <= seen.server_time * 1000:
            return  # expired on arrival: kept for those who take it stale
        if kind == KIND_TOMBSTONE:
            if key in self._live:
                raise BlindError(f"a tombstone of {key} that was not announced")
            return
        version = version_in(args[1], key)
        said, named = self._said or (None, set())
        if said is not None and said.kind == "write" and said.stamp == stamp and key in named:
            event = said
            named.discard(key)  # what comes later under this stamp is a fill that carries it as its fence
        else:
            event = Event(self._pos, low, seen.at, "fill", stamp, key)
            self.fills.append((event, key, version, self.last_break(key)))
            self._end(key, event)
        self._begin(Span(key, version, stamp, event, expires_ms / 1000 - self.offset + MARGIN))

    def _begin(self, span: Span) -> None:
        span.began.versions[span.key] = span.version
        self._live[span.key] = span
        self.spans[span.key, span.version].append(span)
        self.states[span.key].append((span.began, span))

    def _end(self, key: str, event: Event) -> None:
        span = self._live.pop(key, None)
        if span is not None:
            span.ended = event

    def _break(self, event: Event, keys: Iterable[str]) -> None:
        for key in keys:
            self._end(key, event)
            self.breaks[key].append(event)
            self.states[key].append((event, None))

    def _reload(self, reload: Reload) -> None:
        self._pos += 1
        self.kills.append((reload.killed_from, reload.killed_until))
        times = (reload.killed_from, reload.killed_until)
        gone = Event(self._pos, *times, "gone")
        newest = self._announced[-1][0] if self._announced else 0
        if not reload.counter:
            self._break(gone, self.keys)
        else:
            if reload.counter < newest:
                self._lose(reload.counter)
            for key in self.keys:
                self._compare(key, reload, gone)
        self._announced = [(stamp, event) for stamp, event in self._announced if stamp <= reload.counter]
        self._said = None

    def _compare(self, key: str, reload: Reload, gone: Event) -> None:
        stored, live = reload.values.get(key), self._live.get(key)
        if stored is not None and live is not None and (stored.stamp, stored.version) == (live.stamp, live.version):
            return
        if live is not None:
            self._end(key, gone)
            self.states[key].append((gone, None))
        if stored is not None and stored.version and not self._is_dead_in_place(key, stored):
            revived = Event(self._pos, reload.killed_from, reload.killed_until, "revived", stored.stamp, key)
            self._begin(Span(key, stored.version, stored.stamp, revived, stored.expires))

    def _is_dead_in_place(self, key: str, stored: Stored) -> bool:
        """What a tag or a prefix has killed stays where it is stored."""
        spans = [span for span in self.spans[key, stored.version] if span.stamp == stored.stamp]
        ended = spans[-1].ended if spans else None
        return ended is not None and ended.kind in {"tag", "prefix"} and not ended.is_lost

    def _lose(self, counter: int) -> None:
        at = bisect_right([stamp for stamp, _ in self._announced], counter)
        kept = self._announced[at - 1][1].pos if at else 0
        for events in self.breaks.values():
            for event in reversed(events):
                if event.pos <= kept:
                    break
                event.is_lost = True

    def _key(self, name: bytes) -> str:
        prefix = self.names.value_prefix.encode()
        key = name[len(prefix) :].decode("utf-8", "replace") if name.startswith(prefix) else ""
        return key if key in self.keys else ""

    # ---- asking ---------------------------------------------------------------------------------------------

    def last_break(self, key: str, *, pos: float = inf, before: float = inf) -> Event | None:
        """Return the last break, not lost, up to a position, that surely happened before a time."""
        for event in reversed(self.breaks[key]):
            if event.pos <= pos and event.high < before and not event.is_lost:
                return event
        return None

    def really_ended(self, span: Span) -> Event | None:
        """Return what made a copy of *span* wrong: not a fill of the same row, after the record of a tag was lost.

        Nobody announces such a loss, and nobody need: what copies hold is what is there again, and lasts as long as it
        was given first.
        """
        ended = span.ended
        while ended is not None and ended.kind == "fill" and ended.versions.get(span.key) == span.version:
            again = next(each for each in self.spans[span.key, span.version] if each.began is ended)
            ended = again.ended
        return ended

    def at_stamp(self, stamp: int) -> Event | None:
        """Return the event with this stamp; None where there is none, or one in each of two lives of the server."""
        found = self._by_stamp.get(stamp, ())
        return found[0] if len(found) == 1 else None

    def breaks_between(self, key: str, start: float, end: float, kinds: Iterable[str]) -> list[Event]:
        """Return the breaks of these kinds that may have happened in an interval."""
        return [e for e in self.breaks[key] if e.kind in kinds and e.low <= end and e.high >= start]

    def earliest_death(self, key: str, start: float, end: float) -> Event | None:
        """Return the break after which the key was first without a value in an interval, or None if unsure."""
        states = self.states[key]
        first = max(bisect_right(states, start, key=lambda state: state[0].high) - 2, 0)
        if first == 0 and (not states or states[0][0].high >= start):
            return None  # nothing had ever been there
        for i in range(first, len(states)):
            event, span = states[i]
            after = states[i + 1][0] if i + 1 < len(states) else None
            if event.low > end:
                return None
            if after is event or (after is not None and after.high < start):
                continue
            if span is None:
                return event
            if span.expires - 2 * MARGIN <= end:
                return None  # it may just have expired
        return None

    def was_killed_near(self, start: float, end: float) -> tuple[float, float] | None:
        """Return a kill of the server, in whose last moment what it did may have escaped the witness."""
        for killed_from, killed_until in self.kills:
            if start <= killed_until and end >= killed_from - 0.5:
                return killed_from, killed_until
        return None
