"""The usual two-level cache, for comparison: write L2, PUBLISH, write L1; a listener deletes; a read fills L1.

What almost everybody writes, done with care for everything but the races: connections that come back, values that
expire, messages of its own that are told from others'. The experiments must find fault with it, or they prove nothing.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_mlcache import MISS
from tests.support.waiting import wait_until

RECONNECT = 0.05  # seconds between two tries, as ours begins with


class NaiveCache:
    """Has the methods of :class:`~celery_mlcache.CacheManager` that the experiments call; an error of L2 raises.

    Args:
        redis_url: Commands go there.
        pushes_url: The subscription goes there; the same by default.
        cache_namespace: Prefix of keys, and the channel.
        l1_enabled: Whether it has an L1 and a listener.
        l1_ttl: Seconds an entry lives in L1.
        redis_socket_timeout: Seconds for a reply.
    """

    def __init__(
        self,
        *,
        redis_url: str,
        pushes_url: str | None = None,
        cache_namespace: str = "naive",
        l1_enabled: bool = True,
        l1_ttl: float = 300.0,
        redis_socket_timeout: float = 0.25,
    ) -> None:
        retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        self._client = redis.Redis.from_url(redis_url, protocol=2, socket_timeout=redis_socket_timeout, retry=retry)
        self._pushes_url = pushes_url or redis_url
        self._namespace = cache_namespace
        self._has_l1, self._l1_ttl = l1_enabled, l1_ttl
        self._l1: dict[str, tuple[Any, float]] = {}
        self._id = uuid.uuid4().hex
        self._l1_hits = 0
        self._subscribed, self._heard = threading.Event(), threading.Event()

    def warm(self) -> None:
        """Start listening, and wait until that is so."""
        if self._has_l1:
            threading.Thread(target=self._listen, daemon=True).start()
            assert self._subscribed.wait(10)

    def get(self, key: str, default: Any = None) -> Any:
        """L1, else L2, with a copy for L1."""
        value, deadline = self._l1.get(key, (MISS, 0.0))
        if value is not MISS and time.monotonic() < deadline:
            self._l1_hits += 1
            return value
        stored = self._client.get(self._name(key))
        if stored is None:
            return default
        self._keep(key, json.loads(stored))
        return json.loads(stored)

    def set(self, key: str, value: Any, ttl: float | None = None) -> bool:
        """Write L2, tell the others, write L1."""
        self._store(key, value, ttl)
        self._publish(key)
        self._keep(key, value)
        return True

    def delete(self, key: str) -> bool:
        """Delete in L2, tell the others, delete in L1."""
        removed = self._client.delete(self._name(key))
        self._publish(key)
        self._l1.pop(key, None)
        return bool(removed)

    def get_or_set(self, key: str, loader: Callable[[], Any], ttl: float | None = None) -> Any:
        """On a miss load, and fill L2 and L1."""
        value = self.get(key, MISS)
        if value is MISS:
            value = loader()
            self._store(key, value, ttl)
            self._keep(key, value)
        return value

    def token(self) -> str:
        """It has none."""
        return ""

    def barrier(self, token: str) -> None:
        """It can wait for nothing."""

    def stats(self) -> dict[str, Any]:
        """What the experiments ask for."""
        return {"l1_hits": self._l1_hits}

    def settle(self) -> None:
        """Return when every message that was published before has been applied here."""
        self._heard.clear()
        wait_until(lambda: self._publish("", to=self._id) or self._heard.wait(0.1), 10, what="word of ourselves")

    def close(self) -> None:
        """Close the connections for commands."""
        self._client.close()

    def _name(self, key: str) -> str:
        return f"{self._namespace}:{key}"

    def _store(self, key: str, value: Any, ttl: float | None) -> None:
        self._client.set(self._name(key), json.dumps(value), px=None if ttl is None else int(ttl * 1000))

    def _keep(self, key: str, value: Any) -> None:
        if self._has_l1:
            self._l1[key] = (value, time.monotonic() + self._l1_ttl)

    def _publish(self, key: str, to: str = "") -> None:
        self._client.publish(self._namespace, json.dumps([self._id, key, to]))

    def _listen(self) -> None:
        # RESP3, for the proxy tells messages from replies by it.
        client = redis.Redis.from_url(self._pushes_url, protocol=3, retry=Retry(NoBackoff(), 0))
        while True:
            try:
                pubsub = client.pubsub()
                pubsub.subscribe(self._namespace)
                for message in pubsub.listen():
                    self._apply(message)
            except (redis.RedisError, OSError):
                self._subscribed.clear()
                time.sleep(RECONNECT)

    def _apply(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            self._subscribed.set()
        elif message["type"] == "message":
            sender, key, to = json.loads(message["data"])
            if to == self._id:
                self._heard.set()
            if sender != self._id:
                self._l1.pop(key, None)
