"""What one process's cache is made of. Records only: the factory fills them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from celery_mlcache.backplane import Backplane
from celery_mlcache.breaker import CircuitBreaker
from celery_mlcache.leases import Leases
from celery_mlcache.protocols import RemoteStore, ValueCodec
from celery_mlcache.singleflight import SingleFlight
from celery_mlcache.stats import Stats
from celery_mlcache.tier import Tier


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that the manager itself decides by; all times in seconds."""

    namespace: str
    l2_ttl: float = 3600.0
    ttl_jitter: float = 0.0
    is_signed: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """What one process's cache is made of; the factory makes it, and makes it again after a fork."""

    policy: Policy
    codec: ValueCodec
    tier: Tier
    flights: SingleFlight
    stats: Stats
    remote: RemoteStore | None = None
    backplane: Backplane | None = None
    breaker: CircuitBreaker | None = None
    leases: Leases | None = None
    abandon: Callable[[], None] | None = None  # in a forked child: let go of inherited sockets
