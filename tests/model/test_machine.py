"""The fleet against an oracle: any order of operations, steps of operations, deliveries, losses, outages and time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from celery_mlcache import singleflight
from celery_mlcache.entry import MISS
from celery_mlcache.wire import pack_head, parse_message
from tests.support.scripted import CODEC, DELTA, EPOCH, GREEN_THREADING, Actor, Answer, load, make_fleet, tags_of

PROCESSES = 2
KEYS = ("x", "y")
TAGGED = {"x": ("t",), "y": ("t", "u")}  # what is stored carries these, but new counters
LOADED = 1_000_000  # + version of the source
STEP = 1_000_000_000  # of a counter: values stay distinct
# A lost counter starts again from the server's clock or a margin of 1 s above what its finder knows; two losses within
# that second may hand out the same stamps twice, and are not promised anything.
CALM = 2.0
# Lives are longer than a fence's: a write that has come and expired while a loader ran is test_races' business.
LIVES = st.sampled_from([None, 40.0])


@pytest.fixture(autouse=True)
def _green_flights(monkeypatch):
    monkeypatch.setattr(singleflight, "threading", GREEN_THREADING)


class Running:
    """An operation under way, and what it must leave behind."""

    def __init__(self, machine: Fleet, kind: str, process: int, key: str, ttl: float | None) -> None:
        self.machine, self.kind, self.process, self.key, self.ttl = machine, kind, process, key, ttl
        self.is_outlived = False  # a failover has lost what it knew
        self.version = 0
        self.actor = Actor(self.body, f"{kind} {key}@{process}")

    def body(self) -> Any:
        machine, key = self.machine, self.key
        process = machine.fleet[self.process]
        cache = process.cache
        before = process.l1(key)
        if self.kind in {"set", "delete", "clear", "untag", "prefix"}:
            machine.version += 1  # the truth changes first, then the cache is told
            self.version = machine.version
        loader = load(lambda: LOADED + machine.version)
        result = {
            "get": lambda: cache.get(key, MISS),
            "get_many": lambda: cache.get_many(KEYS),
            "get_or_set": lambda: cache.get_or_set(key, loader, self.ttl, tags=TAGGED[key]),
            "refresh": lambda: cache.refresh(key, loader, self.ttl, tags=TAGGED[key]),
            "set": lambda: cache.set(key, self.version, self.ttl, tags=TAGGED[key]),
            "untag": lambda: cache.invalidate_tags(TAGGED[key][-1]),
            "prefix": lambda: cache.invalidate_prefix(key),
            "delete": lambda: cache.delete(key),
            "incr": lambda: cache.incr(key, STEP, ttl=self.ttl),
            "touch": lambda: cache.touch(key, 50.0),
            "clear": cache.clear,
        }[self.kind]()
        if not self.is_outlived:
            if before is not None and not self.actor.replies and self.kind != "get_many":
                machine.learn(self.process, key, before.stamp)
            for op, reply in self.actor.replies:
                self.learn(op, reply)
        return result

    def learn(self, op: str, reply: Any) -> None:
        learn, process, key = self.machine.learn, self.process, self.key
        if op == "clear":
            for each in KEYS:
                learn(process, each, reply)
        elif op == "invalidate":
            self.machine.learn_tag(process, TAGGED[key][-1], reply)
        elif op == "prefix":
            learn(process, key, reply[0])
        elif op in {"write", "replace", "touch"}:
            learn(process, key, reply)
        elif op in {"delete", "increment"}:
            learn(process, key, reply[0])
        elif op == "read" and self.kind in {"get", "get_or_set"}:
            learn(process, key, max(reply[0].stamp, reply[0].floor))
        elif op == "fill" and reply[0].winner is not None:
            learn(process, key, reply[0].winner.stamp)

    def step(self) -> None:
        at = self.actor.step()
        if at in {"reply write", "reply delete", "reply clear", "reply invalidate", "reply prefix"}:
            tag = TAGGED[self.key][-1]
            touched = {"reply clear": KEYS, "reply invalidate": [key for key in KEYS if tag in TAGGED[key]]}
            for key in touched.get(at, [self.key]):
                self.machine.required[key] = max(self.machine.required[key], self.version)
        assert self.actor.error is None, f"{self.actor.name} raised {self.actor.error!r}"


KINDS = [
    *["get", "get", "get", "get_many", "get_or_set", "get_or_set", "get_or_set", "refresh"],
    *["set", "set", "delete", "delete", "incr", "touch", "clear", "untag", "untag", "untag", "prefix"],
]
FAULTS = [
    *["lose", "repeat", "garbage", "lost reply", "down", "up", "up", "cut", "silent cut", "reconnect", "reconnect"],
    *["pause", "long pause", "snapshot", "flushall", "fail over"],
]
PROCESS = st.integers(0, PROCESSES - 1)


class Fleet(RuleBasedStateMachine):
    """Processes over one script, and an oracle that knows when each value ceased to be the truth."""

    @initialize(engine=st.sampled_from(["cacheout", "moka"]))
    def build(self, engine):
        """Start with proven processes."""
        self.server, self.clock, self.fleet = make_fleet(PROCESSES, engine=engine)
        self.version = 0
        self.running: list[Running] = []
        self.known = [dict.fromkeys(KEYS, 0) for _ in range(PROCESSES)]
        self.known_tags = [dict.fromkeys("tu", 0) for _ in range(PROCESSES)]
        # What the process's token tells: not what it only heard while nothing was proven, for that may be garbage.
        self.told = [dict.fromkeys((*KEYS, "t", "u"), 0) for _ in range(PROCESSES)]
        self.required = dict.fromkeys(KEYS, 0)  # a loader's result may not be older than this version
        self.truth: dict[str, Any] = dict.fromkeys(KEYS)  # what L2 held after the last step
        self.dead_at: dict[tuple[str, Any], float] = {}
        self.saved = self.server.save()
        self.calm_from = 0.0

    def learn(self, process, key, stamp, *, is_told=True):
        """Nothing older than *stamp* may be seen by *process* from now on."""
        self.known[process][key] = max(self.known[process][key], stamp)
        self.told[process][key] = max(self.told[process][key], stamp if is_told else 0)

    def learn_tag(self, process, tag, stamp, *, is_told=True):
        """Nothing older than *stamp* that carries the tag may be seen by *process* from now on."""
        self.known_tags[process][tag] = max(self.known_tags[process][tag], stamp)
        self.told[process][tag] = max(self.told[process][tag], stamp if is_told else 0)

    def least(self, process, key, tags):
        """Return the oldest stamp that *process* may be shown of a key that carries *tags*."""
        return max([self.known[process][key], *[self.known_tags[process][tag] for tag in tags]])

    # ---- operations -----------------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(KINDS), process=PROCESS, key=st.sampled_from(KEYS), ttl=LIVES)
    def run(self, kind, process, key, ttl):
        """Run an operation from its start to its end, if it need not wait for another."""
        running = Running(self, kind, process, key, ttl)
        self.running.append(running)
        while running.actor.is_ready:
            running.step()
            self.look()
        self.running = [each for each in self.running if not each.actor.dead]

    @precondition(lambda self: len(self.running) < 4)
    @rule(kind=st.sampled_from(KINDS), process=PROCESS, key=st.sampled_from(KEYS), ttl=LIVES, steps=st.integers(1, 4))
    def begin(self, kind, process, key, ttl, steps):
        """Start an operation and hold it at one of its seams."""
        running = Running(self, kind, process, key, ttl)
        for _ in range(steps):
            if running.actor.is_ready:
                running.step()
                self.look()
        if not running.actor.dead:
            self.running.append(running)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3), steps=st.integers(1, 4))
    def go_on(self, which, steps):
        """Let one of the held operations go on."""
        running = self.running[which % len(self.running)]
        for _ in range(steps):
            if running.actor.is_ready:
                running.step()
                self.look()
        self.running = [each for each in self.running if not each.actor.dead]

    @rule(process=PROCESS)
    def barrier(self, process):
        """Hand over another process's token: nothing that it knows of may be contradicted."""
        other = (process + 1) % PROCESSES
        self.fleet[process].cache.barrier(self.fleet[other].cache.token())
        for key in KEYS:
            self.learn(process, key, self.told[other][key])
        for tag in ("t", "u"):
            self.learn_tag(process, tag, self.told[other][tag])

    # ---- the backplane --------------------------------------------------------------------------------------

    @rule(process=PROCESS, count=st.integers(1, 4))
    def deliver(self, process, count):
        """Deliver what is next."""
        plane = self.fleet[process].backplane
        for _ in range(min(count, len(plane.queue))):
            self.heard(process, plane.deliver())
            self.look()

    def heard(self, process, item):
        """An invalidation that was applied counts: what it killed may not come back."""
        message = None if isinstance(item, Answer) else parse_message(item)
        if message is not None:
            for key in KEYS if message.is_flush else (*message.keys, *message.prefixes):
                self.learn(process, key, message.stamp, is_told=self.fleet[process].coherence.is_proven)
            for tag in message.tags:
                self.learn_tag(process, tag, message.stamp, is_told=self.fleet[process].coherence.is_proven)

    @rule(process=PROCESS)
    def ask(self, process):
        """Send a heartbeat."""
        self.fleet[process].backplane.ask()

    @rule(process=PROCESS)
    def pulse(self, process):
        """Send a heartbeat and deliver everything up to its answer."""
        plane = self.fleet[process].backplane
        plane.ask()
        while plane.queue:
            self.heard(process, plane.deliver())
            self.look()

    def disturb(self, process, how):
        """Lose, repeat or garble a message."""
        queue = self.fleet[process].backplane.queue
        if how == "garbage":
            queue.appendleft(b"1\nW\nwhat")
        elif queue and not isinstance(queue[0], Answer):
            if how == "lose":
                queue.popleft()
            else:
                queue.appendleft(queue[0])

    def renew(self, process):
        plane = self.fleet[process].backplane
        if not plane.is_connected:
            plane.disconnect()
            plane.connect()

    # ---- time and faults ------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.0, 3.0]))
    def wait(self, seconds):
        """Let time pass."""
        self.clock.advance(seconds)

    @rule(process=PROCESS, fault=st.sampled_from(FAULTS))
    def fault(self, process, fault):
        """Let something go wrong, or be repaired."""
        plane, remote = self.fleet[process].backplane, self.fleet[process].remote
        {
            "lose": lambda: self.disturb(process, "lose"),
            "repeat": lambda: self.disturb(process, "repeat"),
            "garbage": lambda: self.disturb(process, "garbage"),
            "cut": plane.disconnect,
            "silent cut": plane.die,
            "reconnect": lambda: self.renew(process),
            "down": lambda: setattr(remote, "is_down", True),
            "up": lambda: setattr(remote, "is_down", False),
            "lost reply": lambda: setattr(remote, "lost_replies", 1),
            "pause": lambda: self.pause(25.0),
            "long pause": lambda: self.pause(70.0),
            "snapshot": lambda: setattr(self, "saved", self.server.save()),
            "flushall": self.flushall,
            "fail over": self.fail_over,
        }[fault]()

    def pause(self, seconds):
        """Let much time pass: loaders may take it, calls to L2 may not, for their timeout is far shorter."""
        if not any(running.actor.at.startswith("send") for running in self.running):
            self.clock.advance(seconds)

    def flushall(self):
        """Lose everything, unannounced."""
        if self.clock.now >= self.calm_from:
            self.calm_from = self.clock.now + CALM
            self.server.flushall()

    def fail_over(self):
        """Go on with the lagging replica: its lost writes are lost, and every connection dies."""
        if self.clock.now < self.calm_from:
            return
        self.calm_from = self.clock.now + CALM
        self.server.restore(self.saved)
        for process in self.fleet:
            process.backplane.die()
        for known in self.known:
            known.update(dict.fromkeys(KEYS, 0))
        for known in self.known_tags:
            known.update(dict.fromkeys("tu", 0))
        for told in self.told:
            told.update(dict.fromkeys(told, 0))
        self.required = dict.fromkeys(KEYS, 0)
        for running in self.running:
            running.is_outlived = True

    # ---- what must hold -------------------------------------------------------------------------------------

    @invariant()
    def look(self):
        """Compare what every process would be answered now with the oracle."""
        now = self.clock.now
        for key in KEYS:
            stored = self.server.live(key)
            value = None if stored is None else value_of(key, stored)
            self.note_truth(key, value, now)
            if stored is not None and value % STEP >= LOADED:
                assert value % STEP - LOADED >= self.required[key], "an older result was stored over an invalidation"
            for number, process in enumerate(self.fleet):
                entry = process.l1(key)
                tags = entry.tags if entry is not None else tags_of(stored.tail) if stored is not None else ()
                known = self.least(number, key, tags)
                if entry is None:
                    assert stored is None or stored.stamp >= known, f"L2 goes back for process {number}"
                    continue
                assert entry.stamp >= known, f"L1 of process {number} goes back: {entry.stamp} after {known}"
                if entry.value != value:
                    late = now - self.dead_at[key, entry.value]
                    assert late < DELTA, f"L1 of process {number} is {late} s behind"
                if stored is not None and (entry.stamp, entry.value) == (stored.stamp, value):
                    assert entry.deadline <= stored.expires_ms / 1000 - EPOCH, "L1 outlives L2"

    def note_truth(self, key, value, now):
        """Note since when the last value is not the truth any more."""
        if value != self.truth[key]:
            if self.truth[key] is not None:
                self.dead_at[key, self.truth[key]] = now
            self.dead_at.pop((key, value), None)
            self.truth[key] = value

    def teardown(self):
        """After quiescence every level of every process agrees."""
        if not hasattr(self, "fleet"):
            return
        for process in self.fleet:
            process.remote.is_down, process.remote.lost_replies = False, 0
        while self.running:
            ready = [each for each in self.running if each.actor.is_ready]
            assert ready, "everybody waits for somebody"
            ready[0].step()
            self.look()
            self.running = [each for each in self.running if not each.actor.dead]
        for _ in range(2):  # the second time after whatever the first has seeded
            for number in range(PROCESSES):
                self.renew(number)
                self.pulse(number)
        for key in KEYS:
            stored = self.server.live(key)
            for process in self.fleet:
                assert self.clock.now < process.coherence.lease_until, "no lease though all is well"
                assert not process.coherence._tickets, "a ticket was left open"
                entry = process.l1(key)
                if entry is not None:
                    assert stored is not None, "L1 serves what L2 has not"
                    assert (stored.stamp, value_of(key, stored)) == (entry.stamp, entry.value)
                assert process.cache.get(key, MISS) == (MISS if stored is None else value_of(key, stored))


def value_of(key, stored):
    """Return the number that L2 holds."""
    return CODEC.decode(key, pack_head(stored.stamp, stored.expires_ms) + stored.tail).value


class TestFleet(Fleet.TestCase):
    """No history breaks an invariant of DESIGN §2."""

    settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
