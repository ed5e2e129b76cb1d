"""``make bench ARGS=staleness``: for how long after a write other processes still answer with an older value.

What is measured. Each of READERS processes, with a cache of its own, reads one hot key in a loop, PAUSE seconds
between two reads, and notes each value with the time at which the read *started*. This process writes rising numbers.
For each write and each reader, the *delay* is

    the start of the last read that returned an older value and started after the write had returned,
    minus the time at which the write returned; 0 if there was no such read.

All times are CLOCK_MONOTONIC, which is one clock for all processes of a Linux machine. A miss is not an older value.
Where a fault takes the data itself away, the loss is the write, and every value read after it is an older one. While
Redis is frozen no write can return, so two things are measured there: from the freeze to the last answer at all (which
only L1 can have given), and the delay of a write that was sent to the frozen server, from its return after the thaw.

Before each fault every reader has shown that it answers from L1. The bound is ``staleness_bound``: no delay may exceed
it, nothing is allowed on top. The last row is the control: the same readers without invalidation must exceed it.
Exits 1 if any row fails.
"""

from __future__ import annotations

import logging
import platform
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

from celery_mlcache import MISS, CacheManager, create_cache_manager
from celery_mlcache.config import CacheConfig
from celery_mlcache.factory import assemble
from tests.benchmarks.crew import Crew, Member, load, percentile
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

READERS = 3
PAUSE = 0.0001
BOUND = 1.0  # staleness_bound's default
HEARTBEAT = BOUND / 4
KEY = "hot"
CONTROL_TTL = 2.5  # l1_ttl of the readers that nobody tells anything
SOCKET_TIMEOUT = 0.25


class Spell(NamedTuple):
    """Reads in a row that returned the same: the value, None for a miss, and when the last of them started."""

    value: int | None
    last_started: float


class Write(NamedTuple):
    """From *returned_at* on (and before *until*) a value below *number* is an older one."""

    number: int
    returned_at: float
    until: float = inf


def delays(writes: Sequence[Write], spells: Sequence[Spell]) -> list[float]:
    """Return for each write how long one reader still read an older value, 0 for not at all."""
    found = []
    for write in writes:
        older = [s.last_started for s in spells if s.value is not None and s.value < write.number]
        found.append(max((at - write.returned_at for at in older if write.returned_at < at < write.until), default=0.0))
    return found


class Reader:
    """In each reading process: a cache, a thread that reads, and threads that burn CPU.

    Args:
        commands: URL of the Redis for commands.
        messages: URL of the same Redis for the backplane.
        settings: Others of the manager.
    """

    def __init__(self, commands: str, messages: str, **settings: Any) -> None:
        _be_quiet()
        direct, other = (CacheConfig(redis_url=url, **settings) for url in (commands, messages))
        self._cache = CacheManager(lambda: replace(assemble(direct), backplane=assemble(other).backplane))
        self._spells: list[list[Any]] = []
        self._reads = self._hits = 0
        self._is_burning = False
        self._cache.warm()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        get, clock, sleep, spell = self._cache.get, time.monotonic, time.sleep, [MISS, 0.0]
        while True:
            started = clock()
            value = get(KEY)
            if value != spell[0] or self._spells[-1:] != [spell]:
                spell = [value, started]
                self._spells.append(spell)
            spell[1] = started
            self._reads += 1
            sleep(PAUSE)

    def now(self) -> int | None:
        """Return what was read last."""
        return self._spells[-1][0] if self._spells else None

    def is_settled(self, number: int) -> bool:
        """Whether *number* is what L1 answers."""
        before = self._cache.stats()["l1_hits"]
        return self._cache.get(KEY) == number and self._cache.stats()["l1_hits"] > before

    def burn(self, threads: int) -> None:
        """Let *threads* run Python code without end, as a CPU-bound task does; 0 ends them."""
        self._is_burning = bool(threads)
        for _ in range(threads):
            threading.Thread(target=self._burn, daemon=True).start()

    def _burn(self) -> None:
        number = 0
        while self._is_burning:
            for _ in range(1000):
                number = (number * 31 + 7) % 65_537

    def take(self) -> tuple[list[Spell], int, int]:
        """Return what was read since the last time: spells, reads, and how many L1 answered."""
        spells, self._spells = self._spells, []
        reads, hits = self._reads, self._cache.stats()["l1_hits"]
        taken = reads - self._taken[0], hits - self._taken[1]
        self._taken = reads, hits
        return [Spell(*spell) for spell in spells], *taken

    _taken = (0, 0)


def _be_quiet() -> None:
    """Faults are meant here, and so is the control row that switches invalidation off."""
    logging.getLogger("celery_mlcache").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")


@dataclass
class Stage:
    """A private server, a proxy before it, the readers, and the one writer."""

    server: RedisServer
    proxy: Proxy
    readers: Crew
    writer: CacheManager
    number: int = 0
    writes: list[Write] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(11))

    def write(self) -> None:
        """Write the next number; one that is not stored is tried again as another number."""
        while True:
            self.number += 1
            if self.writer.set(KEY, self.number):
                self.writes.append(Write(self.number, time.monotonic()))
                return

    def lost(self) -> None:
        """The data is gone as of now."""
        self.number += 1
        self.writes.append(Write(self.number, time.monotonic()))

    def write_some(self, count: int = 5) -> None:
        """Write a few times, as things go on while a fault lasts."""
        for _ in range(count):
            self.write()
            self.pause(0.02)

    def pause(self, longest: float) -> None:
        """Let up to *longest* seconds pass."""
        time.sleep(self.rng.uniform(longest / 2, longest))

    def settle(self) -> None:
        """Write, and wait until every reader answers that from L1; then let part of a heartbeat pass."""
        self.write()
        self.writes.pop()
        wait_until(lambda: all(self.readers.call("is_settled", self.number)), 15, "the readers' L1")
        time.sleep(self.rng.random() * HEARTBEAT)

    def await_fresh(self) -> None:
        """Wait until no reader reads an older value."""

        def is_fresh() -> bool:
            return all(value is None or value >= self.number for value in self.readers.call("now"))

        wait_until(is_fresh, 15, "fresh answers", pause=0.02)


# ---- what is done, each from settled readers to fresh answers ------------------------------------------------------


def steady(stage: Stage) -> None:
    """Nothing is wrong."""
    stage.write_some(20)


def burning(stage: Stage) -> None:
    """A thread in each reader never lets go of the GIL but when it must."""
    stage.readers.call("burn", 1)
    stage.write_some(20)
    stage.await_fresh()
    stage.readers.call("burn", 0)


def killed(stage: Stage) -> None:
    """The server closes the subscriptions."""
    stage.server.kill_pubsub()
    stage.write_some()


def silent(stage: Stage) -> None:
    """Nothing passes the backplane's connection, which stays open; commands pass."""
    stage.proxy.deaf()
    stage.write_some()
    stage.await_fresh()
    stage.proxy.drop()
    stage.proxy.mend()


def dropped(stage: Stage) -> None:
    """Messages are swallowed on their way, answers to heartbeats are not."""
    stage.proxy.drop_push()
    stage.write_some()
    stage.await_fresh()
    stage.proxy.drop_push(0)


def frozen(stage: Stage) -> None:
    """Only the freeze counts: until nothing that started before the thaw can be answered after it."""
    writes = len(stage.writes)
    stage.server.freeze()
    stage.lost()
    time.sleep(2 * BOUND)
    stage.writes[-1] = stage.writes[-1]._replace(until=time.monotonic() - SOCKET_TIMEOUT)
    stage.server.thaw()
    stage.write()
    del stage.writes[writes + 1 :]


def thawed(stage: Stage) -> None:
    """A write waits in the frozen server's socket, and happens at the thaw."""
    stage.server.freeze()
    sender = threading.Thread(target=stage.write)
    sender.start()
    time.sleep(1.5 * BOUND)
    stage.server.thaw()
    sender.join()


def restarted(stage: Stage) -> None:
    """Killed and started again with what it held."""
    stage.server.restart()
    stage.write_some()


def restarted_empty(stage: Stage) -> None:
    """Killed and started again with nothing: the loss is the first of the writes."""
    stage.server.kill()
    stage.lost()
    stage.server.restart_empty()
    stage.await_fresh()
    stage.write_some()


def flushed(stage: Stage) -> None:
    """Somebody takes everything away, the protocol's own keys too."""
    stage.server.flushall()
    stage.lost()
    stage.await_fresh()


def delayed(stage: Stage) -> None:
    """Everything takes 20 ms each way, and the readers are settled with that."""
    stage.proxy.delay(0.02)
    stage.settle()
    for _ in range(10):
        stage.write()
        stage.pause(0.15)
    stage.await_fresh()
    stage.proxy.delay(0)


def stopped(stage: Stage, seconds: float) -> None:
    """The readers sleep, and cannot know it, while the value changes."""
    for member in stage.readers.members:
        member.stop_running()
    stage.write()
    time.sleep(seconds)
    for member in stage.readers.members:
        member.go_on()


def stopped_briefly(stage: Stage) -> None:
    """Shorter than a lease."""
    stopped(stage, 0.4 * BOUND)


def stopped_long(stage: Stage) -> None:
    """Longer than a lease."""
    stopped(stage, 1.5 * BOUND)


class Row(NamedTuple):
    """A row of the table: what is done, how often, and through which of the two ports the readers go."""

    title: str
    act: Callable[[Stage], None]
    rounds: int
    ports: str = "direct"


ROWS = [
    Row("idle", steady, 10),
    Row("a CPU-bound thread in each reader", burning, 10),
    Row("subscription killed (CLIENT KILL)", killed, 10),
    Row("Redis frozen 2 s: L1's last answer", frozen, 4),
    Row("Redis frozen 1.5 s: a write sent meanwhile", thawed, 6),
    Row("Redis killed, restarted with its data", restarted, 8),
    Row("Redis killed, restarted empty", restarted_empty, 8),
    Row("FLUSHALL", flushed, 20),
    Row("reader stopped (SIGSTOP) for 0.4 s", stopped_briefly, 8),
    Row("reader stopped (SIGSTOP) for 1.5 s", stopped_long, 5),
    Row("backplane silent, connection open", silent, 8, "split"),
    Row("every push swallowed, answers pass", dropped, 12, "split"),
    Row("20 ms of delay each way", delayed, 4, "proxied"),
    Row("control: no invalidation at all", killed, 2, "control"),
]


def run(row: Row, stage: Stage) -> bool:
    """Measure and print one row; return whether it is as it must be."""
    stage.settle()
    stage.readers.call("take")
    stage.writes.clear()
    for _ in range(row.rounds):
        stage.settle()
        row.act(stage)
        stage.await_fresh()
    taken = stage.readers.call("take")
    found = [delay for spells, _, _ in taken for delay in delays(stage.writes, spells)]
    reads, hits = (sum(each[i] for each in taken) for i in (1, 2))
    is_control = row.ports == "control"
    is_fine = (max(found) > BOUND) if is_control else max(found) <= BOUND
    verdict = ("PASS" if is_fine else "FAIL") + (": exceeds it, as it must" if is_control and is_fine else "")
    seen = sum(delay > 0 for delay in found) / len(found)
    times = "".join(f"{1000 * each:>8.1f}" for each in (percentile(found, 0.5), percentile(found, 0.99), max(found)))
    print(
        f"{row.title:<44}{len(found):>7}{seen:>7.0%}{times}{reads:>9}{min(1, hits / reads):>6.0%}  {verdict}",
        flush=True,
    )
    return is_fine


def run_rows(rows: Sequence[Row]) -> int:
    """Measure rows of the same ports with one set of processes; return how many are not as they must be."""
    ports = rows[0].ports
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        proxy = stack.enter_context(Proxy(server.port))
        urls = {"proxied": (proxy.url, proxy.url), "split": (server.url, proxy.url)}.get(ports, (server.url,) * 2)
        settings = {"cache_sync_enabled": False, "l1_ttl": CONTROL_TTL} if ports == "control" else {}
        settings |= {"staleness_bound": BOUND}
        readers = stack.enter_context(Crew([Member(Reader, *urls, **settings) for _ in range(READERS)]))
        # One patient writer: a write returns only when it is done.
        patient = {"redis_socket_timeout": 10, "circuit_reset": 0.01, "l1_enabled": False}
        writer = stack.enter_context(create_cache_manager(redis_url=server.url, **patient))
        stage = Stage(server, proxy, readers, writer)
        return sum(not run(row, stage) for row in rows)


def main() -> int:
    """Print the table, or the rows with *only* in their title; exit 1 if a row fails."""
    only = "".join(sys.argv[1:2])
    _be_quiet()
    rows = [row for row in ROWS if only in row.title]
    if not rows:
        print("no such row; there are: " + "; ".join(row.title for row in ROWS))
        return 2
    print(f"Python {platform.python_version()}, {READERS} readers, bound {BOUND:g} s, {load()}")
    print("ms from a write's return to the start of the last read that answered with an older value")
    heads = f"{'writes':>7}{'seen':>7}{'p50':>8}{'p99':>8}{'max':>8}{'reads':>9}{'L1':>6}"
    print(f"{'x readers; seen: with any such read':<44}{heads}  bound")
    failures = sum(
        run_rows([row for row in rows if row.ports == ports]) for ports in dict.fromkeys(r.ports for r in rows)
    )
    print(f"{f'{failures} ROWS FAILED' if failures else 'all within the bound'}; {load()}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
