"""``make bench ARGS=wakeup``: how soon those who wait for a value have it, and what a hit at the producer saves.

How. (a) Two processes call the same cached task directly: the *holder* computes it for HOLD seconds, the *follower*
comes while it does and waits. What is measured is the time from the end of the holder's function to the follower's
return, so the holder's fill and release are in it; both read the same monotonic clock. Beside each round the follower
times PINGs, one after a pause and some without: the unit is what one round trip costs at that moment.
A follower that computed itself has not been woken: it is counted, and its time is left out.

(b) One worker process answers the same call of three tasks in turns: a plain one, a cached one whose hit is served in
the worker, and a cached one with ``producer=True``, whose hit needs no message. All are read with ``get()``: by one
caller, so that the worker is idle when the call comes, and by CALLERS threads, which is how workers are used. Over
Redis, and over RabbitMQ where one answers; results and cache are in Redis.

Absolute times belong to this machine and minute; the ratios are what to compare.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis
from celery import Celery
from celery.signals import after_task_publish

from celery_mlcache import cached_task, setup_cache
from tests.benchmarks.crew import Member, load, percentile
from tests.support.rabbit import rabbit_names, rabbitmq_url
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

ROUNDS = 200
HOLD = 0.02  # seconds that the holder computes
PINGS = 5  # beside each round
NAMESPACE = "wakeup"
HOLDERS = "the holder's"
CALL_ROUNDS = 30
CALLS = 10  # of each task in a round
WAIT = 10.0
CALLERS = 8
_CONF = "WAKEUP_CONF"  # in a worker's environment: settings as JSON


# --- (a) followers --------------------------------------------------------------------------------------------------


class Asker:
    """In each process: a cached task, which is called directly, and a plain client for flags and round trips."""

    def __init__(self, port: int) -> None:
        celery = Celery(NAMESPACE, broker="memory://")
        self._cache = setup_cache(celery, redis_port=port, cache_namespace=NAMESPACE)
        self._cache.warm()
        self._client = redis.Redis(port=port, protocol=2)
        self._load: Callable[[str], str] = self._follow
        self._ended = 0.0

        @cached_task(app=celery, ttl=60, name="asked")
        def asked(key: str) -> str:
            return self._load(key)

        self._ask = asked

    def is_ready(self) -> bool:
        """Whether L1 may answer."""
        return bool(self._cache.stats()["lease"] == "held")

    def hold(self, key: str) -> float:
        """Compute *key*; return when that ended, also where a follower's value was stored before."""
        self._load = self._hold
        self._ask(key)
        return self._ended

    def follow(self, key: str, threads: int) -> list[tuple[str, float]]:
        """Ask for *key* from each of *threads* while it is computed; return what each got, and when."""
        wait_until(lambda: self._client.exists(f"began:{key}"), WAIT, "the holder's turn", pause=0.001)
        found: list[tuple[str, float]] = []

        def one() -> None:
            value = self._ask(key)
            found.append((value, time.monotonic()))

        waiting = [threading.Thread(target=one) for _ in range(threads)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        return found

    def round_trips(self) -> list[float]:
        """Return the seconds that PINGS took one after the other, and before them one after a pause like a wait."""
        found = []
        time.sleep(HOLD)
        for _ in range(PINGS + 1):
            began = time.perf_counter()
            self._client.ping()
            found.append(time.perf_counter() - began)
        return found

    def _hold(self, key: str) -> str:
        self._client.set(f"began:{key}", 1, ex=60)
        time.sleep(HOLD)
        self._ended = time.monotonic()
        return HOLDERS

    def _follow(self, key: str) -> str:
        return "the follower's"


def followers(server: RedisServer) -> None:
    """Print how long followers waited after the loader had ended."""
    holder, follower = Member(Asker, server.port), Member(Asker, server.port)
    try:
        wait_until(lambda: holder.call("is_ready") and follower.call("is_ready"), WAIT, "leases", pause=0.02)
        print(f"\nfrom the end of the function to the return in another process, us; {ROUNDS} rounds")
        print(f"{'':<40}{'p50':>8}{'p90':>8}{'p99':>8}{'worst':>8}{'p50 / PING':>14}{'p99 / PING':>12}")
        pings: list[float] = []
        cold: list[float] = []
        for threads in (1, 8):
            waits, alone = _rounds(holder, follower, threads, pings, cold)
            title = "1 follower" if threads == 1 else f"{threads} threads of one process, the last"
            if not waits:
                print(f"{title:<40}nobody was woken: all {alone} computed by themselves")
                continue
            _line(title, waits, pings)
            if alone:
                print(f"{'':<40}{alone} of {ROUNDS} rounds left out: somebody computed by itself")
        _line("PING after a pause of the same length", cold, pings)
        _line("PING", pings, pings)
    finally:
        holder.end()
        follower.end()


def _rounds(
    holder: Member, follower: Member, threads: int, pings: list[float], cold: list[float]
) -> tuple[list[float], int]:
    """Return the last thread's wait of each round, and in how many rounds one computed itself."""
    last: list[float] = []
    alone = 0
    for number in range(ROUNDS):
        key = f"{threads}:{number}"
        follower.order("follow", key, threads)
        ended = holder.call("hold", key)
        found = follower.answer()
        after_pause, *hot = follower.call("round_trips")
        cold.append(after_pause)
        pings += hot
        if any(value != HOLDERS for value, _ in found):
            alone += 1
            continue
        last.append(max(at for _, at in found) - ended)
    return last, alone


def _line(title: str, waits: list[float], pings: list[float]) -> None:
    unit = statistics.median(pings)
    shares = [percentile(waits, share) for share in (0.5, 0.9, 0.99, 1.0)]
    print(f"{title:<40}" + "".join(f"{wait * 1e6:>8.0f}" for wait in shares), end="")
    print(f"{shares[0] / unit:>13.1f}x{shares[2] / unit:>11.1f}x", flush=True)


# --- (b) producers --------------------------------------------------------------------------------------------------


def build(conf: dict[str, Any]) -> Celery:
    """Return the app of worker and producer."""
    celery = Celery("wakeup")
    celery.conf.update(conf)
    setup_cache(celery)

    @celery.task(shared=False, name="plain")
    def plain(x: int) -> dict[str, Any]:
        return {"x": x, "by": "plain"}

    @cached_task(app=celery, shared=False, ttl=3600, name="in_worker")
    def in_worker(x: int) -> dict[str, Any]:
        return {"x": x, "by": "in_worker"}

    @cached_task(app=celery, shared=False, ttl=3600, producer=True, name="at_producer")
    def at_producer(x: int) -> dict[str, Any]:
        return {"x": x, "by": "at_producer"}

    return celery


app = build(json.loads(os.environ[_CONF])) if _CONF in os.environ else None


def producers(server: RedisServer) -> None:
    """Print a hit at the producer, a hit in the worker and a plain call, interleaved, over each broker there is."""
    conf = {"result_backend": server.url, "mlcache_redis_url": server.url}
    _producers("Redis", {**conf, "broker_url": server.url})
    amqp = rabbitmq_url()
    if amqp is not None:
        with rabbit_names(amqp) as names:
            _producers("RabbitMQ", {**conf, "broker_url": amqp, **names.conf})


def _producers(broker: str, conf: dict[str, Any]) -> None:
    celery = build(conf)
    with WorkerProcess("tests.benchmarks.wakeup:app", concurrency=1, env={_CONF: json.dumps(conf)}):
        calls: dict[str, Callable[[], Any]] = {
            name: lambda task=celery.tasks[name]: task.delay(1).get(timeout=WAIT)
            for name in ("plain", "in_worker", "at_producer")
        }
        for name, call in calls.items():
            assert call()["by"] == name
            assert call()["by"] == name
        assert _messages(calls["at_producer"]) == 0, "a hit at the producer sent a message"
        assert _messages(calls["in_worker"]) == 1
        with ThreadPoolExecutor(CALLERS) as pool:
            _table(f"{broker}, one caller", calls, lambda call: [call() for _ in range(CALLS)])
            _table(
                f"{broker}, {CALLERS} callers at once",
                calls,
                lambda call: list(pool.map(lambda _: [call() for _ in range(CALLS)], range(CALLERS))),
            )
        celery.mlcache.close()


def _table(title: str, calls: dict[str, Callable[[], Any]], run: Callable[[Callable[[], Any]], object]) -> None:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rng = random.Random(11)
    for _ in range(CALL_ROUNDS):
        for name in rng.sample(list(calls), len(calls)):
            began = time.perf_counter()
            run(calls[name])
            samples[name].append((time.perf_counter() - began) / CALLS)
    print(f"\n{title}: delay().get(), us a call of each caller; median of {CALL_ROUNDS} rounds of {CALLS}")
    titles = {"plain": "plain task", "in_worker": "hit in the worker", "at_producer": "hit at the producer"}
    for name, text in titles.items():
        ratio = statistics.median(a / b for a, b in zip(samples["plain"], samples[name], strict=True))
        print(f"{text:<40}{statistics.median(samples[name]) * 1e6:>8.0f}{ratio:>8.1f}x faster than the plain task")


def _messages(call: Callable[[], Any]) -> int:
    """Return how many messages a call publishes."""
    sent: list[object] = []

    def note(**_: Any) -> None:
        sent.append(None)

    after_task_publish.connect(note)
    call()
    after_task_publish.disconnect(note)
    return len(sent)


def main() -> int:
    """Print both, or the part that is named; exit 0."""
    only = "".join(sys.argv[1:2])
    print(f"Python {platform.python_version()}, {load()}")
    with RedisServer() as server:
        if only != "producers":
            followers(server)
        if only != "followers":
            producers(server)
    print(load())
    return 0


if __name__ == "__main__":
    sys.exit(main())
