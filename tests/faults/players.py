"""Processes that run one of two protocols, and the moves that experiments are made of.

Nothing here but :func:`build` and :meth:`Player.settle` knows which protocol it is.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, Self

from celery_mlcache import CacheConfig, CacheManager
from celery_mlcache.factory import assemble
from tests.faults.actors import Actor, serve
from tests.support.naive import NaiveCache
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

Protocol = Literal["ours", "naive"]

OLD, NEW, OTHER = 0, 1, 2
LOADER = 0.005  # seconds that a loader takes after it has read the database
PATIENCE = 5.0  # seconds for a reply where no experiment is about time-outs: the machine is shared


def build(
    protocol: Protocol, redis_url: str, pushes_url: str | None = None, *, bound: float = 1.0, **settings: Any
) -> Any:
    """Return an unopened cache whose commands and whose pushes may go different ways."""
    if protocol == "naive":
        return NaiveCache(redis_url=redis_url, pushes_url=pushes_url, **settings)
    commands, pushes = (
        CacheConfig(
            redis_url=url,
            staleness_bound=bound,
            redis_connect_timeout=PATIENCE,
            redis_max_connections=64,
            **settings,
        )
        for url in (redis_url, pushes_url or redis_url)
    )
    if pushes_url is None:
        return CacheManager(lambda: assemble(commands))
    return CacheManager(lambda: replace(assemble(commands), backplane=assemble(pushes).backplane))


class Player:
    """A cache in a process of its own, and the moves that experiments are made of.

    Args:
        protocol: Of the cache.
        side: Port of the Redis that carries orders; it is the loaders' database and the hand-offs' channel too.
        settings: See :func:`build`.
    """

    def __init__(self, protocol: Protocol, side: int, **settings: Any) -> None:
        import redis

        self.cache = build(protocol, **settings)
        self._side_port = side
        self._side = redis.Redis("127.0.0.1", side, decode_responses=True, socket_timeout=20)
        self._busy: threading.Event | None = None

    def warm(self) -> None:
        """Open it, and wait until L1 may answer."""
        self.cache.warm()
        self.settle([])

    def settle(self, tokens: Sequence[str]) -> None:
        """Return when every message up to *tokens* has been applied here."""
        if isinstance(self.cache, NaiveCache):
            self.cache.settle()
            return
        for token in tokens:
            self.cache.barrier(token)
        wait_until(lambda: self.cache.stats()["lease"] == "held", 10, what="a lease")

    def token(self) -> str:
        return self.cache.token()

    def read(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the values, None for misses, and how many came from L1."""
        before = self.cache.stats()["l1_hits"]
        values = [self.cache.get(key) for key in keys]
        return {"values": values, "l1": self.cache.stats()["l1_hits"] - before}

    def meet(self, move: str, keys: Sequence[str], pauses: Sequence[float], value: Any, places: Sequence[str]) -> None:
        """Make one move for each key, so long after this process and another have met: here, and there."""
        make = getattr(self, f"_{move}")
        here, there = places
        for key, pause in zip(keys, pauses, strict=True):
            self._side.rpush(there, 1)
            assert self._side.blpop([here], timeout=10)
            if pause:
                time.sleep(pause)
            make(key, value)

    def fill(self, keys: Sequence[str], value: Any, ttl: float | None = None, step: float = 0.0) -> int:
        """Set all of them, one by one, one every *step* seconds at most; return how many were stored."""
        start, stored = time.monotonic(), 0
        for number, key in enumerate(keys):
            time.sleep(max(0.0, start + number * step - time.monotonic()))
            stored += self.cache.set(key, value, ttl=ttl)
        return stored

    def storm(self, keys: Sequence[str], value: Any) -> None:
        """Set each key in a thread of its own, all at once; failures are the experiment's business."""
        start = threading.Barrier(len(keys))

        def write(key: str) -> None:
            start.wait(10)
            with suppress(Exception):
                self.cache.set(key, value)

        threads = [threading.Thread(target=write, args=(key,)) for key in keys]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(12)

    def busy(self, is_busy: bool) -> None:
        """Start or end a thread that never lets the processor go of its own will."""
        if self._busy is not None:
            self._busy.set()
        if is_busy:
            over = self._busy = threading.Event()

            def burn() -> None:
                while not over.is_set():
                    sum(range(1000))

            threading.Thread(target=burn, daemon=True).start()

    def send(self, channel: str, keys: Sequence[str], value: Any) -> None:
        """Set each key and hand over, by another channel, its name and the token; wait for an answer each time."""
        for key in keys:
            self.cache.set(key, value)
            self._side.rpush(channel, json.dumps([key, self.cache.token()]))
            assert self._side.blpop([f"{channel}:done"], timeout=10)

    def receive(self, channel: str, count: int, with_token: bool) -> list[Any]:
        """Take what is handed over and read it at once; return the values."""
        got = []
        for _ in range(count):
            _, order = self._side.blpop([channel], timeout=10)
            key, token = json.loads(order)
            if with_token:
                self.cache.barrier(token)
            got.append(self.cache.get(key))
            self._side.rpush(f"{channel}:done", 1)
        return got

    def fork(self, name: str) -> int:
        """Make a child that goes on with this very cache, obeying orders for *name*."""
        pid = os.fork()
        if pid:
            return pid
        try:
            serve(self._side_port, name, self)
        finally:
            os._exit(0)

    def _get(self, key: str, value: Any) -> None:
        self.cache.get(key)

    def _set(self, key: str, value: Any) -> None:
        self.cache.set(key, value)

    def _delete(self, key: str, value: Any) -> None:
        self.cache.delete(key)

    def _load(self, key: str, value: Any) -> None:
        def loader() -> int:
            found = int(self._side.get(key) or OLD)
            time.sleep(LOADER)
            return found

        self.cache.get_or_set(key, loader)

    def _commit(self, key: str, value: Any) -> None:
        self._side.set(key, value)
        self.cache.delete(key)


class Fleet:
    """A Redis of its own and up to three processes on it that run one protocol; ``close`` ends them all.

    Args:
        protocol: Theirs.
        control: A Redis that no experiment breaks.
        bound: Seconds after which nothing stale may be answered, whatever fails.
        patience: Seconds for a reply of Redis.
    """

    def __init__(self, protocol: Protocol, control: RedisServer, *, bound: float, patience: float = PATIENCE) -> None:
        self.protocol, self.control, self.bound = protocol, control, bound
        self.redis = RedisServer()
        self.commands, self.pushes = Proxy(self.redis.port), Proxy(self.redis.port)
        self.database = control.client()
        self._settings = {"redis_socket_timeout": patience, "cache_namespace": "lab"}
        if protocol == "ours":
            self._settings["bound"] = bound
        self._actors: list[Actor] = []
        self._oracle = build(protocol, self.redis.url, l1_enabled=False, **self._settings)

    @cached_property
    def near(self) -> Actor:
        """A process on the same host as Redis."""
        return self._start(redis_url=self.redis.url)

    @cached_property
    def other(self) -> Actor:
        """Another one."""
        return self._start(redis_url=self.redis.url)

    @cached_property
    def far(self) -> Actor:
        """A process behind two proxies, ``commands`` and ``pushes``."""
        return self._start(redis_url=self.commands.url, pushes_url=self.pushes.url)

    def truth(self, keys: Sequence[str]) -> list[Any]:
        """Return what L2 has, None where it has nothing."""
        return [self._oracle.get(key) for key in keys]

    def settle(self, *actors: Actor) -> None:
        """Wait until everything that was published has reached *actors*."""
        tokens = [actor.call("token") for actor in actors]
        for actor in actors:
            actor.order("settle", tokens)
        for actor in actors:
            actor.answer()

    def hold(self, actor: Actor, keys: Sequence[str], writer: Actor, ttl: float | None = None) -> None:
        """Write an old value, and have *actor* answer every key from L1."""

        def is_held() -> bool:
            writer.call("fill", keys, OLD, ttl)
            self.settle(actor, writer)
            actor.call("read", keys)
            return actor.call("read", keys)["l1"] == len(keys)

        wait_until(is_held, 15, what="copies in L1")

    def pass_bound(self) -> None:
        """Wait until the bound on staleness has passed since the last write."""
        since = time.monotonic()
        wait_until(lambda: time.monotonic() > since + self.bound, self.bound + 5)

    @contextmanager
    def distance(self, *, commands: float = 0.0, pushes: float = 0.0, replies_only: bool = False) -> Iterator[None]:
        """Put the far process so many seconds away, each way, until the end of the block."""
        direction: Literal["reply", "both"] = "reply" if replies_only else "both"
        self.commands.delay(commands, direction)
        self.pushes.delay(pushes, direction)
        try:
            yield
        finally:
            self.commands.delay(0)
            self.pushes.delay(0)

    def close(self) -> None:
        """End everything."""
        for actor in self._actors:
            actor.kill()
        self._oracle.close()
        for each in (self.commands, self.pushes, self.redis):
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, **urls: str) -> Actor:
        settings = {"protocol": self.protocol, "side": self.control.port, **self._settings, **urls}
        actor = Actor(self.control, subject="tests.faults.players:Player", **settings)
        self._actors.append(actor)
        return actor


def new_keys(count: int) -> list[str]:
    """Return names that nobody has used."""
    prefix = uuid.uuid4().hex[:10]
    return [f"{prefix}:{number}" for number in range(count)]
