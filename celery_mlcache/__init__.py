"""celery_mlcache: a multi-level cache in every process of a Celery fleet, and a stated bound on staleness.

Importing this package imports neither celery nor redis; each name below is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_mlcache.config import CacheConfig
    from celery_mlcache.entry import MISS
    from celery_mlcache.errors import (
        CacheClosedError,
        CacheKeyError,
        CallInProgressError,
        CodecError,
        ConfigurationError,
        MLCacheError,
        NotAnIntegerError,
        NotCachedError,
        RemoteStoreError,
        SerializationError,
    )
    from celery_mlcache.factory import create_cache_manager
    from celery_mlcache.fleet.app import setup_cache
    from celery_mlcache.fleet.decorator import cached_task
    from celery_mlcache.fleet.signals import cache_error, cache_hit, cache_miss, cache_stale
    from celery_mlcache.fleet.task import CachedTask
    from celery_mlcache.manager import CacheManager

_HOMES = {
    "MISS": "entry",
    "CacheClosedError": "errors",
    "CacheConfig": "config",
    "CacheKeyError": "errors",
    "CacheManager": "manager",
    "CachedTask": "fleet.task",
    "CallInProgressError": "errors",
    "CodecError": "errors",
    "ConfigurationError": "errors",
    "MLCacheError": "errors",
    "NotAnIntegerError": "errors",
    "NotCachedError": "errors",
    "RemoteStoreError": "errors",
    "SerializationError": "errors",
    "cache_error": "fleet.signals",
    "cache_hit": "fleet.signals",
    "cache_miss": "fleet.signals",
    "cache_stale": "fleet.signals",
    "cached_task": "fleet.decorator",
    "create_cache_manager": "factory",
    "setup_cache": "fleet.app",
}

__all__ = [
    "MISS",
    "CacheClosedError",
    "CacheConfig",
    "CacheKeyError",
    "CacheManager",
    "CachedTask",
    "CallInProgressError",
    "CodecError",
    "ConfigurationError",
    "MLCacheError",
    "NotAnIntegerError",
    "NotCachedError",
    "RemoteStoreError",
    "SerializationError",
    "cache_error",
    "cache_hit",
    "cache_miss",
    "cache_stale",
    "cached_task",
    "create_cache_manager",
    "setup_cache",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("celery-mlcache")
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
