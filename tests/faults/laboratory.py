"""The laboratory: one server, processes behind proxies of their own, a schedule of faults, and the verdict.

A round is: start everything; let the processes run while the faults of the seed come; mend all; when everybody is
quiet, have each process read every key once more and compare with L2; then check all histories by `tests.support.laws`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from celery_mlcache import MISS, create_cache_manager
from celery_mlcache.keys import RedisNames
from celery_mlcache.wire import KIND_TOMBSTONE, parse_order, split_value
from tests.faults import nemesis
from tests.faults.lab_process import END, FINISHED, HEAL_WITHIN, PARKED, QUIET, READ, RUN, STARTED, Board, Habits, Spec
from tests.faults.nemesis import ALL, Fault, Mood
from tests.support import laws, logs, processes
from tests.support.history import READS, Note, Outcome, Verb, read_history
from tests.support.laws import Case, Line, Violation
from tests.support.monitor import Monitor
from tests.support.oracle import Oracle, Reload, Stored, version_in
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

NAMESPACE = "lab"
NAMES = RedisNames(NAMESPACE)
DELTA = 0.4
PATIENCE = 5.0  # seconds that a call may take at most: some time-outs, one loader, and a machine that is shared
KEYS = ("a0", "a1", "a2", "b0", "b1", "b2")
TAGS = {"a2": ("red",), "b1": ("red",), "b2": ("red", "blue")}
PREFIXES = ("b",)


@dataclass(frozen=True)
class Plan:
    """One round, but for its seed."""

    processes: int = 4
    seconds: float = 10.0
    habits: Habits = field(default_factory=Habits)
    mood: Mood = field(default_factory=Mood)
    keys: tuple[str, ...] = KEYS
    mutant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Verdict:
    """What a round showed."""

    seed: int
    plan: Plan
    violations: list[Violation]
    ops: int
    reads: int
    hits: int
    faults: int
    events: int
    seconds: float
    text: str = ""

    @property
    def summary(self) -> str:
        """One line."""
        found = f"{len(self.violations)} VIOLATIONS" if self.violations else "no violation"
        share = 100 * self.hits / max(self.reads, 1)
        return (
            f"seed {self.seed}: {self.plan.processes} processes, {self.plan.seconds:g} s, {self.faults} faults, "
            f"{self.ops} operations, {self.reads} reads ({share:.0f} % from L1), {self.events} events in L2: {found}"
        )


class _Member:
    """A slot of the fleet: a proxy, and one process after the other behind it."""

    def __init__(self, lab: _Round, slot: int) -> None:
        self.lab, self.slot = lab, slot
        self.proxy = Proxy(lab.server.port)
        self.lives = 0
        self.who = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.lives += 1
        self.who = f"p{self.slot}" + (f"'{self.lives}" if self.lives > 1 else "")
        lab, plan = self.lab, self.lab.plan
        lab.people.append(self.who)
        settings = {
            "redis_url": self.proxy.url,
            "cache_namespace": NAMESPACE,
            "staleness_bound": DELTA,
            "circuit_reset": 0.2,
            "tombstone_ttl": 10.0,
            "single_flight_wait": 2.0,
            **plan.settings,
        }
        spec = Spec(
            self.who,
            self.slot,
            plan.processes,
            lab.seed,
            str(lab.folder),
            plan.keys,
            {key: tags for key, tags in TAGS.items() if key in plan.keys},
            PREFIXES,
            settings,
            plan.habits,
            plan.mutant,
        )
        self.spec = spec
        path = lab.folder / f"{self.who}.json"
        spec.save(path)
        lab.board.ask_to_leave(self.slot, 0)
        lab.board.say(self.slot, 0)
        args = [sys.executable, "-m", "tests.faults.lab_process", str(path)]
        self.process = processes.spawn(
            args, log=logs.new_log(f"lab {self.who}", lambda: self.is_running), cwd=processes.ROOT
        )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def sigkill(self) -> None:
        """SIGKILL, reaped, and a successor."""
        assert self.process is not None
        self.lab.killed.add(self.who)
        processes.kill_group(self.process)
        self.start()

    def sigstop(self) -> None:
        """SIGSTOP; in force on return."""
        assert self.process is not None
        if self.who in self.lab.stopped:
            return
        self.lab.stopped[self.who] = time.monotonic()
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def sigcont(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        since = self.lab.stopped.pop(self.who, None)
        if since is not None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.lab.stops.setdefault(self.who, []).append((since, time.monotonic() + 0.05))

    def recycle(self) -> None:
        """End it in good order and start a successor."""
        assert self.process is not None
        if self.who in self.lab.stopped or self.lab.board.state(self.slot) != STARTED:
            return  # it is stopped, or still on its way up
        self.lab.board.ask_to_leave(self.slot)
        try:
            self.process.wait(PATIENCE + HEAL_WITHIN)
        except subprocess.TimeoutExpired:
            return  # its history shows where it hangs
        self.start()

    def close(self) -> None:
        if self.process is not None:
            processes.kill_group(self.process)
        self.proxy.close()


class _Round:
    """One round under way."""

    def __init__(self, seed: int, plan: Plan, stack: ExitStack) -> None:
        self.seed, self.plan = seed, plan
        self.folder = Path(tempfile.mkdtemp(prefix="mlcache-lab-"))
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.board = Board(self.folder / "board", len(plan.keys))
        stack.callback(self.board.close)
        self.server = stack.enter_context(RedisServer())
        self.monitor = Monitor(self.server.port, self.folder / "monitor")
        stack.callback(self.monitor.close)
        self.offsets = [_offset()]
        self.people: list[str] = []
        self.killed: set[str] = set()
        self.stopped: dict[str, float] = {}
        self.stops: dict[str, list[tuple[float, float]]] = {}
        self.reloads: list[Reload] = []
        self.faults: list[tuple[float, str]] = []
        self.members = [_Member(self, slot) for slot in range(plan.processes)]
        for member in self.members:
            stack.callback(member.close)
            member.start()
        self.zero = 0.0
        self.is_frozen = False

    # ---- the course of a round ----------------------------------------------------------------------------------

    def run(self) -> Verdict:
        began = time.monotonic()
        self._wait_for(STARTED, 30)
        self.zero = time.monotonic()
        self.board.phase = RUN
        faults = nemesis.schedule(self.seed, self.plan.seconds, self.plan.processes, self.plan.mood)
        for fault in faults:
            self._pause_until(self.zero + fault.at)
            self._inflict(fault)
        self._pause_until(self.zero + self.plan.seconds)
        self._mend_all()
        self._wait_for(STARTED, 30)  # the last successors
        self.board.phase = QUIET
        final = self._last_reads() if self._wait_for(PARKED, PATIENCE + 2) else {}
        self.offsets.append(_offset())
        now = time.monotonic()
        unwell = [self._unwell(member, now) for member in self.members]
        self.board.phase = END
        verdict = self._judge(final, now, len(faults), began)
        return self._told(verdict, [each for each in unwell if each is not None])

    def _unwell(self, member: _Member, now: float) -> Violation | None:
        """Return what is wrong with a process that did not come to the end of its last reads."""
        if member.is_running and self.board.state(member.slot) == FINISHED:
            return None
        law = laws.HANG if member.is_running else laws.EXCEPTION
        code = member.process.poll() if member.process is not None else None
        why = "does not come to rest" if member.is_running else f"ended with {code}"
        return Violation(law, f"{member.who} {why}", [Line(now, member.who, why)])

    def _last_reads(self) -> dict[str, int]:
        """Have everybody read everything once more; return what L2 held all the while."""
        settings = {"redis_url": self.server.url, "cache_namespace": NAMESPACE, "l1_enabled": False}
        with create_cache_manager(**settings, redis_socket_timeout=5, redis_connect_timeout=5) as truth:
            self._pause_until(time.monotonic() + DELTA + 0.3)  # late commands arrive, late messages are proven
            before = self._truth(truth)
            self.board.phase = READ
            self._wait_for(FINISHED, HEAL_WITHIN + 10)
            after = self._truth(truth)
        return {key: version for key, version in before.items() if after[key] == version}

    def _truth(self, cache: Any) -> dict[str, int]:
        found = {key: cache.get(key, MISS) for key in self.plan.keys}
        return {key: 0 if value is MISS else version_in(value.encode(), key) for key, value in found.items()}

    def _wait_for(self, state: int, timeout: float) -> bool:
        """Wait until every process says so; what does not is seen in its history."""
        with suppress(AssertionError):
            wait_until(
                lambda: all(self.board.state(slot) >= state for slot in range(self.plan.processes)),
                timeout,
                pause=0.02,
            )
            return True
        return False

    def _judge(self, final: Mapping[str, int], now: float, faults: int, began: float) -> Verdict:
        spec = self.members[0].spec
        ops = [op for who in self.people for op in read_history(self.folder / f"{who}.history", who, spec.names)]
        offset = sum(self.offsets) / 2
        if abs(self.offsets[0] - self.offsets[1]) > 0.002:
            raise AssertionError("the machine's clock was changed during the round: nothing can be concluded")
        tags = {key: tags for key, tags in TAGS.items() if key in self.plan.keys}
        oracle = Oracle(NAMES, self.plan.keys, tags, offset).feed(self.monitor.read(), self.reloads)
        case = Case(ops, oracle, DELTA, PATIENCE, final=final, killed=frozenset(self.killed), stops=self.stops, now=now)
        violations = laws.check(case)
        reads = [op for op in ops if op.verb in READS and op.outcome is Outcome.DONE]
        hits = sum(Note.LOCAL in op.note for op in reads)
        events = sum(len(each) for each in oracle.states.values())
        count = sum(op.verb not in {Verb.COMMIT, Verb.LOAD} for op in ops)
        return Verdict(
            self.seed, self.plan, violations, count, len(reads), hits, faults, events, time.monotonic() - began
        )

    def _told(self, verdict: Verdict, unwell: list[Violation]) -> Verdict:
        verdict.violations += unwell
        if verdict.violations:
            mutant = f", mutant {self.plan.mutant}" if self.plan.mutant else ""
            verdict.text = (
                f"seed {self.seed}, {self.plan.processes} processes, {self.plan.seconds:g} s{mutant}\n"
                + laws.render(verdict.violations, self.zero, self.faults)
            )
            keep = os.environ.get("MLCACHE_LAB_KEEP")  # a folder for the files of rounds that failed
            if keep and not self.plan.mutant:  # without the pipes
                target = Path(keep) / f"seed-{self.seed}-{int(time.time())}"
                shutil.copytree(self.folder, target, ignore=shutil.ignore_patterns("mail-*"), dirs_exist_ok=True)
        return verdict

    # ---- faults -------------------------------------------------------------------------------------------------

    def _inflict(self, fault: Fault) -> None:
        self.faults.append((time.monotonic(), str(fault)))
        members = self.members if fault.target == ALL else [self.members[fault.target]]
        if fault.verb in nemesis.PROXY_VERBS or fault.verb == "mend":
            for member in members:
                self._spoil(member.proxy, fault)
        elif fault.verb in {*nemesis.PROCESS_VERBS, "sigcont"}:
            if fault.verb in {"sigkill", "recycle"}:
                members[0].sigcont()
            getattr(members[0], fault.verb)()
        else:
            getattr(self, f"_{fault.verb}")()

    def _spoil(self, proxy: Proxy, fault: Fault) -> None:
        verbs: dict[str, Callable[[], None]] = {
            "deaf_drop": proxy.deaf,
            "delay": lambda: proxy.delay(fault.amount),
            "delay_reply": lambda: proxy.delay(fault.amount, "reply"),
            "jitter": lambda: proxy.jitter(fault.amount, seed=self.seed),
            "drop_push": lambda: proxy.drop_push(int(fault.amount)),
            "drop_pushes": proxy.drop_push,
            "truncate": lambda: proxy.truncate(int(fault.amount)),
        }
        if fault.verb == "mend" and fault.amount:
            proxy.drop()
        verbs.get(fault.verb, getattr(proxy, fault.verb, proxy.mend))()

    def _freeze(self) -> None:
        self.server.freeze()

    def _thaw(self) -> None:
        self.server.thaw()

    def _flushall(self) -> None:
        self.server.flushall()

    def _kill_pubsub(self) -> None:
        self.server.kill_pubsub()

    def _lose_counter(self) -> None:
        self._evict(NAMES.counter)

    def _lose_floors(self) -> None:
        self._evict(NAMES.floors)

    def _lose_tags(self) -> None:
        self._evict(*{NAMES.tag(tag) for tags in TAGS.values() for tag in tags})

    def _evict(self, *names: str) -> None:
        """Delete our own records, as a server without memory does."""
        client = self.server.client()
        client.delete(*names)
        client.close()

    def _restart(self) -> None:
        self.server.save()
        self._kill_and_start()

    def _restart_lossy(self) -> None:
        self.server.save()
        self._pause_until(time.monotonic() + 0.3)
        self._kill_and_start()

    def _restart_empty(self) -> None:
        self._kill_and_start(is_empty=True)

    def _kill_and_start(self, *, is_empty: bool = False) -> None:
        """Kill the server and start it; the witness is back before anybody else can reach it."""
        killed_from = time.monotonic()
        self.server.kill()
        killed_until = time.monotonic()
        for member in self.members:
            member.proxy.cut()
        if is_empty:
            self.server.restart_empty()
        else:
            self.server.start()
        self.monitor.wait_attached(len(self.reloads) + 2)
        self.reloads.append(self._dump(killed_from, killed_until))
        for member in self.members:
            member.proxy.mend()

    def _dump(self, killed_from: float, killed_until: float) -> Reload:
        client = self.server.client()
        counter, floor, *values = client.mget(
            NAMES.counter, NAMES.floors, *[NAMES.value(key) for key in self.plan.keys]
        )
        client.close()
        counter, floor = parse_order(counter, floor)
        stored = {}
        for key, data in zip(self.plan.keys, values, strict=True):
            split = split_value(data) if data else None
            if split is not None and floor <= split[0] <= counter:
                stamp, expires_ms, _, kind = split
                version = 0 if kind == KIND_TOMBSTONE else version_in(data, key)
                stored[key] = Stored(stamp, version, expires_ms / 1000 - self.offsets[0] + 0.005)
        return Reload(killed_from, killed_until, counter, stored)

    def _mend_all(self) -> None:
        for member in self.members:
            member.sigcont()
            member.proxy.mend()

    def _pause_until(self, at: float) -> None:
        _NEVER.wait(max(0.0, at - time.monotonic()))


_NEVER = threading.Event()


def _offset() -> float:
    """Return the wall clock less CLOCK_MONOTONIC."""
    best = (1.0, 0.0)
    for _ in range(20):
        before = time.monotonic()
        wall = time.time()
        after = time.monotonic()
        best = min(best, (after - before, wall - (before + after) / 2))
    return best[1]


def run_round(seed: int, plan: Plan) -> Verdict:
    """Run one round; the calling thread must outlive it."""
    with ExitStack() as stack:
        return _Round(seed, plan, stack).run()


# ---- how the fleet may behave: rounds take these in turn ------------------------------------------------------------

HABITS: dict[str, Habits] = {
    "mixed": Habits(),
    "loading": Habits(
        {"GET": 15, "GET_OR_SET": 60, "DELETE": 10, "DELETE_MANY": 2, "TAG": 3, "SET": 2},
        dawdle=0.1,
        long_load=0.02,
        threads=3,
    ),
    "waiting": Habits(
        {"GET": 5, "GET_OR_SET": 60, "DELETE": 8, "TAG": 2, "SET": 1}, dawdle=0.9, long_load=0.0, threads=5
    ),
    "reading": Habits({"GET": 60, "GET_MANY": 10, "SET": 1, "DELETE": 1, "GET_OR_SET": 10, "TAG": 0.5}, pause=0.008),
    "writing": Habits({"GET": 40, "SET": 15, "SET_MANY": 6, "ADD": 4, "TOUCH": 4, "DELETE": 8, "CLEAR": 0.5}),
}

# ---- the mutants ----------------------------------------------------------------------------------------------------

_FILLS = Habits(
    {"GET": 10, "GET_OR_SET": 50, "DELETE": 15, "DELETE_MANY": 3},
    pause=0.004,
    dawdle=0.02,
    long_load=0.0,
    ttls=(None,),
    handoff=0.0,
)
_WRITERS = Habits({"GET": 50, "SET": 20, "SET_MANY": 5}, pause=0.003, ttls=(None,), handoff=0.0)
_READERS = Habits({"GET": 70, "GET_MANY": 10, "SET": 1}, pause=0.004, ttls=(None,), handoff=0.0)
_REMOVERS = replace(_READERS, weights={"GET": 60, "SET": 10, "DELETE": 10}, threads=4)
_TAGS = replace(_READERS, weights={"GET": 40, "GET_OR_SET": 30, "SET": 5, "TAG": 15})
_LATE = Mood(0.15, (1, 0, 0), ("jitter", "delay_reply"))
_DEAF = Mood(0.3, (1, 0, 0), ("deaf", "drop_pushes"), (1.0, 2.0))
_HOLES = Mood(0.15, (1, 0, 0), ("drop_push", "drop_pushes"), (1.0, 2.0))
_SMALL = Plan(processes=3, seconds=5.0, keys=("a0", "a1"))
_WIDE = Plan(processes=3, seconds=5.0)  # few own writes to each key, which would heal it

MUTANT_PLANS: dict[str, Plan] = {
    "ticket": replace(_SMALL, habits=_WRITERS, mood=_LATE),
    "stamps": replace(_SMALL, habits=_WRITERS, mood=_LATE),
    "sequence": replace(_WIDE, habits=_READERS, mood=_HOLES),
    "epoch": replace(_WIDE, habits=_READERS, mood=_HOLES),
    "lease": replace(_WIDE, habits=_READERS, mood=_DEAF),
    "tombstone": replace(_SMALL, habits=_FILLS, mood=_HOLES),
    "own_write": replace(_SMALL, habits=_WRITERS, mood=_LATE),
    "fence": replace(_SMALL, habits=_FILLS, mood=Mood(0)),
    "barrier": replace(_SMALL, habits=replace(_READERS, weights={"GET": 60, "SET": 6}, handoff=1.0), mood=_LATE),
    "expiry": replace(_SMALL, habits=replace(_READERS, weights={"GET": 60, "SET": 6}, ttls=(0.15, 0.3)), mood=Mood(0)),
    "tag_floor": replace(_SMALL, keys=("a0", "a2", "b1"), habits=_TAGS, mood=_LATE),
    "prefix_floor": replace(_WIDE, habits=replace(_READERS, weights={"GET": 50, "SET": 5, "PREFIX": 2}), mood=Mood(0)),
    "flight": replace(_SMALL, habits=replace(_FILLS, dawdle=0.2, threads=4), mood=Mood(0)),
    "miss": replace(_SMALL, habits=_REMOVERS, mood=_LATE),
    "regress": replace(_WIDE, habits=_READERS, mood=Mood(0.5, (0, 1, 0), ("restart_lossy",))),
    "tag_record": replace(_SMALL, keys=("a0", "a2", "b1"), habits=_TAGS, mood=Mood(0)),
}


def run_mutant(name: str, seed: int, *, plan: Plan | None = None, tries: int = 4) -> tuple[Verdict, float]:
    """Run rounds with a mutant until it is caught; return the last verdict and the seconds that it took."""
    began = time.monotonic()
    plan = replace(plan or MUTANT_PLANS[name], mutant=name)
    for attempt in range(tries):
        verdict = run_round(seed + attempt, plan)
        if verdict.violations:
            break
    return verdict, time.monotonic() - began
