"""Every interleaving of two operations and a delivery: no schedule breaks an invariant of the protocol.

An operation stops before each call takes effect, before its reply arrives, and inside its loader; so does nothing
else, and no time passes but the fake clock's. test_races.py tells the named races one by one.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import pytest

from celery_mlcache import singleflight
from celery_mlcache.entry import MISS
from celery_mlcache.wire import pack_head, parse_message
from tests.support.scripted import (
    CODEC,
    DELTA,
    EPOCH,
    GREEN_THREADING,
    Actor,
    Answer,
    Schedule,
    explore,
    load,
    make_fleet,
)

KEY = "k"
TAG = "t"  # every value carries it, but a new counter
FIRST = 1  # what the key holds where it is warm
FOREIGN = 2  # what another process has written, whose message is on its way
FOREIGN_TAIL = CODEC.encode(KEY, FOREIGN, tags=(TAG,))
WRITTEN = 1000  # + number of the writer
LOADED = 100_000  # + version of the source
STEP = 10_000_000  # of a counter: values stay distinct


@pytest.fixture(autouse=True)
def _green_flights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(singleflight, "threading", GREEN_THREADING)


class World:
    """Two processes, the source that loaders read, and what each process has been shown so far."""

    def __init__(self, *, engine: str = "cacheout") -> None:
        self.server, self.clock, self.fleet = make_fleet(2, engine=engine)
        self.source = 0
        self.known = [0 for _ in self.fleet]  # per process: nothing older than this stamp may be seen of KEY
        self.began: dict[int, int] = {}  # what was known when a read began
        self.readings: list[tuple[int, int]] = []

    # ---- states to start from -------------------------------------------------------------------------------

    def cold(self) -> None:
        """Nothing is stored."""

    def stored(self) -> None:
        """L2 has the value, no L1 does."""
        self.server.write([(KEY, FOREIGN_TAIL, 3_600_000)], 0)
        self.settle()

    def warm(self) -> None:
        """Both processes hold the value in L1."""
        self.fleet[0].cache.set(KEY, FIRST, tags=[TAG])
        self.settle()
        assert [process.cache.get(KEY) for process in self.fleet] == [FIRST, FIRST]

    def overwritten(self) -> None:
        """A third process has overwritten it; its message is on its way to both."""
        self.warm()
        self.foreign_set()

    def deleted(self) -> None:
        """A third process has deleted it; its message is on its way to both."""
        self.warm()
        self.foreign_delete()

    def lapsed(self) -> None:
        """As before, but the leases have lapsed; an answer older than the write is on its way too."""
        self.warm()
        self.clock.advance(2 * DELTA)
        for process in self.fleet:
            process.backplane.ask()
        self.foreign_set()

    def foreign_set(self) -> None:
        self.server.write([(KEY, FOREIGN_TAIL, 3_600_000)], 0)

    def foreign_delete(self) -> None:
        self.source += 1
        self.server.delete([KEY], 0)

    def untagged(self) -> None:
        """A third process has invalidated its tag; its message is on its way to both."""
        self.warm()
        self.foreign_untag()

    def foreign_untag(self) -> None:
        self.source += 1
        self.server.invalidate_tags([TAG], 0)

    def lost_record(self) -> None:
        """As before, and the tag's record is evicted."""
        self.untagged()
        self.server.lose_record(TAG)

    def settle(self) -> None:
        for process in self.fleet:
            process.pulse()

    # ---- what is promised at every moment -------------------------------------------------------------------

    def learn(self, number: int, stamp: int) -> None:
        self.known[number] = max(self.known[number], stamp)

    def check(self) -> None:
        stored = self.server.live(KEY)
        for number, process in enumerate(self.fleet):
            known = self.known[number]
            entry = process.l1(KEY)
            if entry is not None:
                assert entry.stamp >= known, f"L1 of process {number} serves {entry.stamp} after {known}"
                if stored is not None and stored.stamp == entry.stamp:
                    assert entry.deadline <= stored.expires_ms / 1000 - EPOCH, "L1 outlives L2"
            elif stored is not None:
                assert stored.stamp >= known, f"L2 serves {stored.stamp} to process {number} after {known}"

    def check_settled(self) -> None:
        for process in self.fleet:
            process.backplane.drain()
        self.settle()
        self.check()
        stored = self.server.live(KEY)
        for process in self.fleet:
            assert process.clock.now < process.coherence.lease_until, "no lease though all is well"
            entry = process.l1(KEY)
            if entry is not None:
                assert stored is not None, "L1 serves what L2 has not"
                assert (entry.stamp, entry.value) == (stored.stamp, value_of(stored))
            assert not process.coherence._tickets, "a ticket was left open"
        if stored is not None and LOADED <= value_of(stored) % STEP < LOADED + WRITTEN:
            version = value_of(stored) % STEP - LOADED
            assert version == self.source, "a loader's older result was kept over an invalidation"


def value_of(stored: Any) -> Any:
    """Return the number that L2 holds."""
    return CODEC.decode(KEY, pack_head(stored.stamp, stored.expires_ms) + stored.tail).value


class Operation:
    """One operation of one process: what it runs, and what its process knows when it has ended."""

    def __init__(self, world: World, kind: str, number: int, process: int) -> None:
        self.world, self.kind, self.number, self.process = world, kind, number, process
        self.cache = world.fleet[process].cache
        self.actor = Actor(self._body, f"{kind}#{number}@{process}")

    def _body(self) -> Any:
        world, cache = self.world, self.cache
        before = world.fleet[self.process].l1(KEY)
        if self.kind in {"set", "delete", "clear", "untag", "prefix"}:
            world.source += 1  # the truth changes first, then the cache is told
        result = {
            "get": lambda: cache.get(KEY, MISS),
            "exists": lambda: cache.exists(KEY),
            "get_or_set": lambda: cache.get_or_set(KEY, load(lambda: LOADED + world.source), tags=[TAG]),
            "refresh": lambda: cache.refresh(KEY, load(lambda: LOADED + world.source), tags=[TAG]),
            "set": lambda: cache.set(KEY, WRITTEN + self.number, tags=[TAG]),
            "untag": lambda: cache.invalidate_tags(TAG),
            "prefix": lambda: cache.invalidate_prefix(KEY),
            "delete": lambda: cache.delete(KEY),
            "incr": lambda: cache.incr(KEY, STEP),
            "clear": cache.clear,
        }[self.kind]()
        if before is not None and not self.actor.replies:
            world.learn(self.process, before.stamp)
        for op, reply in self.actor.replies:
            self._learn(op, reply, result)
        return result

    def _learn(self, op: str, reply: Any, result: Any) -> None:
        learn = self.world.learn
        if op in {"write", "clear", "invalidate"}:
            learn(self.process, reply)
        elif op in {"delete", "increment", "prefix"}:
            learn(self.process, reply[0])
        elif op == "replace":
            learn(self.process, reply)
        elif op == "read" and self.kind in {"get", "exists", "get_or_set"}:
            learn(self.process, max(reply[0].stamp, reply[0].floor))
        elif op == "fill" and reply[0].winner is not None:
            learn(self.process, reply[0].winner.stamp)


def run_all(world: World, case: Case, schedule: Schedule) -> None:
    """Run the case's operations, event and delivery in the order that *schedule* says; check after every step."""
    operations = [Operation(world, kind, i, case.places[i]) for i, kind in enumerate(case.kinds)]
    deliveries = case.deliveries
    event = getattr(world, case.event) if case.event else None
    while any(not operation.actor.dead for operation in operations):
        options: list[Any] = [operation for operation in operations if operation.actor.is_ready]
        if event is not None:
            options.append(event)
        if deliveries:
            options += [number for number, process in enumerate(world.fleet) if process.backplane.queue]
        assert options, "everybody waits for somebody"
        chosen = schedule.pick(options)
        if isinstance(chosen, Operation):
            schedule.names.append(f"{chosen.actor.name}: {chosen.actor.step()}")
            if chosen.actor.error is not None:
                raise AssertionError(f"{chosen.actor.name} raised {chosen.actor.error!r}") from chosen.actor.error
        elif isinstance(chosen, int):
            schedule.names.append(f"deliver to {chosen}")
            deliveries -= 1
            deliver(world, chosen)
        else:
            schedule.names.append(case.event)
            event = None
            chosen()
        world.check()
    world.check_settled()


def deliver(world: World, number: int) -> None:
    """Deliver what is next; an invalidation that was applied counts."""
    item = world.fleet[number].backplane.deliver()
    if not isinstance(item, Answer):
        message = parse_message(item)
        if message.is_flush or KEY in message.keys or message.tags or message.prefixes:
            world.learn(number, message.stamp)


class Case(NamedTuple):
    """What is run in every order."""

    kinds: tuple[str, str]
    places: tuple[int, int]
    state: str
    deliveries: int = 1
    event: str = ""

    def __str__(self) -> str:
        where = "one process" if self.places == (0, 0) else "two processes"
        return " ".join(filter(None, ["+".join(self.kinds), where, self.state, self.event]))


SHORT = ("get", "exists", "set", "delete", "incr", "clear", "untag")
READS = ("get", "exists")


def cases() -> list[Case]:
    """Return all of them; two loaders have so many orders that fewer states must do."""
    found = []
    for places in ((0, 0), (0, 1)):
        for kinds in combinations_with_replacement(SHORT, 2):
            states = ("cold", "warm", "overwritten", "lapsed")
            if "untag" in kinds:  # a new counter carries no tag, and what is overwritten is warm
                states = ("warm", "lapsed")
            found += [Case(kinds, places, state) for state in states]
        for kind in SHORT:
            found += [Case(("get_or_set", kind), places, state) for state in ("cold", "deleted", "lapsed")]
            found += [Case(("refresh", kind), places, state) for state in ("cold", "warm")]
            found += [Case(("get_or_set", kind), places, state) for state in ("untagged", "lost_record")]
        for kind in (*READS, "set", "get_or_set"):
            found += [Case((kind, "prefix"), places, "warm")]
        found += [Case(("get_or_set", "get_or_set"), places, state) for state in ("cold", "lapsed")]
        found += [Case(("get_or_set", "refresh"), places, "cold", 0), Case(("refresh", "refresh"), places, "warm", 0)]
    for kinds in combinations_with_replacement(SHORT, 2):
        if set(kinds) & set(READS):
            found += [Case(kinds, (0, 0), "stored", event=event) for event in ("foreign_delete", "foreign_untag")]
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_no_interleaving_breaks_an_invariant(case):
    """Whatever the order of steps, reads never go back, nothing dead comes back, and all levels agree in the end."""

    def run(schedule: Schedule) -> None:
        world = World()
        getattr(world, case.state)()
        run_all(world, case, schedule)

    assert explore(run) > 1
