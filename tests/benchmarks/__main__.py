"""``make bench``: the ratios the README quotes, each pair interleaved in one run on a private Redis.

Absolute times belong to this machine and minute; the ratios are what to compare. Prints the load before and after.
``make bench ARGS=staleness`` (or ``experiments``, ``fanout``, ``tracking``, ``wakeup``) runs another bench,
``ARGS="staleness idle"`` a part of it; ``ARGS=peers`` plays the peers' scenarios and writes ``PEERS.md`` (minutes).
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module

import redis
from moka_py import Moka

from celery_mlcache import CacheManager, create_cache_manager
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

OTHERS = ("experiments", "staleness", "fanout", "tracking", "peers", "wakeup")
ROUNDS = 15
KEYS = 10_000


def zipf_keys(count: int) -> list[str]:
    """Return *count* draws of ``user:profile:<i>``, Zipf 1.0 over KEYS keys, as strings of their own."""
    rng = random.Random(7)
    weights = [1 / (rank + 1) for rank in range(KEYS)]
    return [f"user:profile:{i}" for i in rng.choices(range(KEYS), weights, k=count)]


def compare(
    title: str, ours: Callable[[], object], theirs: Callable[[], object], calls: int, *, goal: str = ""
) -> None:
    """Print ours, theirs and how many times faster ours is; both in each round, in changing order."""
    samples: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    rng = random.Random(3)
    for _ in range(ROUNDS):
        for run in rng.sample([ours, theirs], 2):
            began = time.perf_counter()
            run()
            samples[run].append((time.perf_counter() - began) / calls * 1e6)
    ratios = [b / a for a, b in zip(samples[ours], samples[theirs], strict=True)]
    a, b = statistics.median(samples[ours]), statistics.median(samples[theirs])
    print(f"{title:<52}{a:>10.2f}{b:>10.2f}{statistics.median(ratios):>8.2f}x  {goal}")


def local_hits(cache: CacheManager) -> None:
    """L1 hits against the engine alone."""
    keys = zipf_keys(20_000)
    raw: Moka[str, object] = Moka(KEYS)
    for i in range(KEYS):
        raw.set(f"user:profile:{i}", "v" * 100, ttl=600.0)
    for batch in range(0, KEYS, 500):
        cache.set_many({f"user:profile:{i}": "v" * 100 for i in range(batch, batch + 500)})
    get, raw_get = cache.get, raw.get
    for key in keys:
        get(key)

    def ours() -> None:
        for key in keys:
            get(key)

    def theirs() -> None:
        for key in keys:
            raw_get(key)

    compare("L1 hit, 10k keys, Zipf / raw moka.get", ours, theirs, len(keys), goal="gate 0.60")
    loader = str

    def loading() -> None:
        for key in keys:
            cache.get_or_set(key, loader)

    compare("get_or_set, L1 hit / raw moka.get", loading, theirs, len(keys))
    hundred = list(dict.fromkeys(keys))[:100]
    compare(
        "get_many(100), L1 / 100 raw moka.get",
        lambda: [cache.get_many(hundred) for _ in range(50)],
        lambda: [[raw_get(key) for key in hundred] for _ in range(50)],
        50,
        goal="gate 0.65",
    )
    cache.set("profile", {"name": "Alice", "plan": "pro", "visits": 7})
    compare(
        "L1 hit of a flat dict (own copy) / raw moka.get",
        lambda: [get("profile") for _ in range(20_000)],
        lambda: [raw_get("user:profile:1") for _ in range(20_000)],
        20_000,
    )


def remote_calls(cache: CacheManager, server: RedisServer) -> None:
    """L2 operations, with everything the protocol adds, against redis-py's plain commands."""
    client = redis.Redis(port=server.port, protocol=2)
    value = "v" * 200
    client.set("plain", value)
    with create_cache_manager(redis_port=server.port, cache_namespace="bench-l2", l1_enabled=False) as l2:
        l2.set("k", value)
        compare(
            "L2 hit with decoding / redis-py get",
            lambda: [l2.get("k") for _ in range(500)],
            lambda: [client.get("plain") for _ in range(500)],
            500,
            goal="gate 1.2",
        )
    compare(
        "set with stamp and invalidation / redis-py set",
        lambda: [cache.set("k", value) for _ in range(300)],
        lambda: [client.set("plain", value, px=60_000) for _ in range(300)],
        300,
        goal="gate 0.75",
    )
    rows = {f"row:{i}": value for i in range(100)}

    def piped() -> None:
        pipe = client.pipeline(transaction=False)
        for key, row in rows.items():
            pipe.set(key, row, px=60_000)
        pipe.execute()

    compare("set_many(100) / redis-py pipeline of 100 set", lambda: cache.set_many(rows), piped, 1, goal="gate 1.8")
    client.close()


def main() -> int:
    """Run the bench that is named, or the ratios; exit 0, or what that bench says."""
    if sys.argv[1:] and sys.argv[1] in OTHERS:
        return int(import_module(f"tests.benchmarks.{sys.argv.pop(1)}").main())
    if not sys.argv[1:]:
        print(f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}")
    print(f"{'median of ' + str(ROUNDS) + ' rounds, us a call':<52}{'ours':>10}{'theirs':>10}{'faster':>9}")
    with (
        RedisServer() as server,
        create_cache_manager(redis_port=server.port, cache_namespace="bench", l1_max_size=40_000) as cache,
    ):
        cache.warm()
        wait_until(lambda: cache.stats()["lease"] == "held", timeout=5, what="the lease")
        local_hits(cache)
        remote_calls(cache, server)
    print(f"load after: {os.getloadavg()[0]:.2f}; more: make bench ARGS={'|'.join(OTHERS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
