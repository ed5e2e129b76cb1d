"""``make bench ARGS=fanout``: what one invalidation costs the server and the fleet, and what costs how many messages.

How. 1 to 100 real cache managers, each with a real backplane (its thread, its connection, its heartbeats), in up to
PROCESSES processes; every one of them has had a copy of the key that is written. This process writes, in two ways: in
*bursts*, each write as soon as the one before has returned, and *paced*, slowly enough for each message to wake every
listener by itself. Server CPU is what INFO tells of its process; fleet CPU is what the listening processes used. Both
are less what they use in the same time when nothing is written (heartbeats). Rounds of all acts are interleaved, and
the lower quartile is printed: what else a shared machine does can only add. The writer's own CPU is not counted.

Listeners that share a process share its GIL and are woken together, so a fleet of one listener a process pays rather
more context switches than this shows for 50 and 100.
"""

from __future__ import annotations

import platform
import random
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import redis

from celery_mlcache import CacheManager, backplane, create_cache_manager
from tests.benchmarks.crew import Crew, Member, load, percentile, published, server_cpu
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

SIZES = (1, 10, 50, 100)
PROCESSES = 10
ROUNDS = 15  # of bursts
BURST = 200
PACED_ROUNDS = 5
PACED = 100
PACE = 0.01  # seconds from one write to the next
VALUE = "v" * 200
NAMESPACE = "fanout"


class Listeners:
    """In each listening process: managers that hold a copy of one key and hear of it.

    Args:
        url: Of the Redis.
        count: How many.
        session: In place of the backplane's session, for experiments.
    """

    def __init__(self, url: str, count: int, session: Any = None) -> None:
        if session is not None:
            backplane._Session = session
        self._caches = [create_cache_manager(redis_url=url, cache_namespace=NAMESPACE) for _ in range(count)]
        for cache in self._caches:
            cache.warm()

    def is_ready(self) -> bool:
        """Whether all have a lease."""
        return all(cache.stats()["lease"] == "held" for cache in self._caches)

    def hold(self, key: str) -> bool:
        """Take copies."""
        return all(cache.get(key) is not None for cache in self._caches)

    def heard(self) -> int:
        """Return how many messages all have heard."""
        return sum(cache.stats()["messages"] for cache in self._caches)

    def cpu(self) -> float:
        """Return the seconds of CPU this process has used."""
        return time.process_time()


def fleet(server: RedisServer, size: int, session: Any = None) -> Crew:
    """Start *size* listeners and wait for their leases."""
    processes = min(size, PROCESSES)
    counts = [size // processes + (each < size % processes) for each in range(processes)]
    crew = Crew([Member(Listeners, server.url, count, session) for count in counts])
    wait_until(lambda: all(crew.call("is_ready")), 30, "the listeners' leases", pause=0.05)
    return crew


class Cost(NamedTuple):
    """Microseconds of CPU for one act."""

    server: float
    fleet: float


Act = tuple[Callable[[int], object], int]  # does it once, given a number; how many messages it sends


class Gauge:
    """Measures what acts cost the server and its listeners."""

    def __init__(self, server: RedisServer, crew: Crew, size: int) -> None:
        self._server, self._crew, self._size = server, crew, size
        self._number = 0

    def bursts(self, acts: dict[str, Act], count: int = BURST) -> dict[str, Cost]:
        """Return what each act costs when done without a pause."""
        return self._rounds(acts, ROUNDS, count, 0.0)

    def paced(self, acts: dict[str, Act]) -> dict[str, Cost]:
        """Return what each act costs when done at a slow pace."""
        return self._rounds(acts, PACED_ROUNDS, PACED, PACE)

    def _rounds(self, acts: dict[str, Act], rounds: int, count: int, pace: float) -> dict[str, Cost]:
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in acts}
        rng = random.Random(5)
        for number in range(rounds + 1):
            for name in rng.sample(list(acts), len(acts)):
                cost = self._spend(*acts[name], count, pace)
                if number:  # the first round only warms up
                    found[name].append(cost)
        idle = self._idle(1.0)
        return {
            name: Cost(
                *(
                    percentile([(cost[side] - rate * cost[2]) / count * 1e6 for cost in costs], 0.25)
                    for side, rate in enumerate(idle)
                )
            )
            for name, costs in found.items()
        }

    def _used(self) -> tuple[float, float]:
        return server_cpu(self._server), sum(self._crew.call("cpu"))

    def _idle(self, seconds: float) -> list[float]:
        before = self._used()
        time.sleep(seconds)
        return [(b - a) / seconds for a, b in zip(before, self._used(), strict=True)]

    def _spend(self, act: Callable[[int], object], messages: int, count: int, pace: float) -> tuple[float, ...]:
        """Return the seconds of CPU of server and fleet, and the seconds it took."""
        expected = sum(self._crew.call("heard")) + messages * count * self._size
        before, began = self._used(), time.perf_counter()
        for each in range(count):
            self._number += 1
            act(self._number)
            if pace:
                time.sleep(max(0.0, began + (each + 1) * pace - time.perf_counter()))
        wait_until(lambda: sum(self._crew.call("heard")) >= expected, 30, "every message", pause=0.02)
        after, took = self._used(), time.perf_counter() - began
        return (*(b - a for a, b in zip(before, after, strict=True)), took)


def acts_of(cache: CacheManager, client: redis.Redis) -> dict[str, Act]:
    """Return what is compared."""
    return {
        "plain SET": (lambda number: client.set("plain", VALUE, px=60_000), 0),
        "set": (lambda number: cache.set("hot", VALUE), 1),
        "fill": (lambda number: cache.get_or_set(f"filled:{number}", lambda: VALUE, ttl=60), 0),
    }


def costs() -> None:
    """Print what a write costs at each number of listeners."""
    print(f"CPU, us each; lower quartile of {ROUNDS} bursts of {BURST}; paced: one each {1000 * PACE:g} ms")
    print(f"{'':<12}{'server, for one':<40}{'fleet, for one message in one listener':>40}")
    print(f"{'listeners':<12}{'plain SET':>10}{'fill':>8}{'set':>8}{'a listener':>14}{'in bursts':>24}{'paced':>16}")
    for size in SIZES:
        with RedisServer() as server, server.client() as client, fleet(server, size) as crew:
            settings = {"redis_url": server.url, "cache_namespace": NAMESPACE, "l1_enabled": False}
            with create_cache_manager(**settings) as cache:
                cache.set("hot", VALUE)
                assert all(crew.call("hold", "hot"))
                gauge, acts = Gauge(server, crew, size), acts_of(cache, client)
                found, paced = gauge.bursts(acts), gauge.paced({"set": acts["set"]})["set"]
        plain, fill, write = (found[name] for name in ("plain SET", "fill", "set"))
        one = (write.server - plain.server) / size
        print(f"{size:<12}{plain.server:>10.0f}{fill.server:>8.0f}{write.server:>8.0f}{one:>14.1f}", end="")
        print(f"{write.fleet / size:>24.0f}{paced.fleet / size:>16.0f}", flush=True)


def messages() -> None:
    """Print how many PUBLISH commands each operation makes the server execute."""
    hundred = {f"k{number}": VALUE for number in range(100)}
    with RedisServer() as server, create_cache_manager(redis_url=server.url) as cache:
        cache.warm()
        wait_until(lambda: cache.stats()["lease"] == "held", what="a lease")
        for first in range(0, 1000, 500):
            cache.set_many({f"t{number}": VALUE for number in range(first, first + 500)}, tags=["tag"])
        operations: dict[str, Callable[[], object]] = {
            "get, get_many: hit or miss": lambda: (cache.get("k"), cache.get_many(hundred)),
            "get_or_set, on a miss": lambda: cache.get_or_set("k", lambda: VALUE),
            "get_or_set_many(100), all missing": lambda: cache.get_or_set_many(hundred, lambda keys: hundred),
            "set": lambda: cache.set("k", VALUE),
            "set_many(100)": lambda: cache.set_many(hundred),
            "delete": lambda: cache.delete("k"),
            "delete_many(100)": lambda: cache.delete_many(hundred),
            "incr": lambda: cache.incr("n"),
            "invalidate_tags, 1000 entries": lambda: cache.invalidate_tags("tag"),
            "invalidate_prefix, 1000 entries": lambda: cache.invalidate_prefix("t"),
            "clear": cache.clear,
        }
        print(f"\n{'PUBLISH by':<40}count")
        for title, act in operations.items():
            before = published(server)
            act()
            print(f"{title:<40}{published(server) - before}")


def main() -> int:
    """Print both tables; exit 0."""
    only = "".join(sys.argv[1:2])
    print(f"Python {platform.python_version()}, {load()}; listeners in up to {PROCESSES} processes")
    if only != "messages":
        costs()
    messages()
    print(load())
    return 0


if __name__ == "__main__":
    sys.exit(main())
