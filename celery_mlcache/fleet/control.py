"""Remote-control commands: ``celery -A app control mlcache_invalidate KEY ...``, ``mlcache_invalidate_tags TAG ...``.

Handlers run in each worker's MainProcess, which has no L1 under prefork, and hold up its consumer while they run. So
they tell Redis, once, within one socket timeout; the backplane tells every process, prefork children included. The
first line of a handler's docstring is its help in ``celery inspect`` and ``celery control``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.worker.control import control_command

from celery_mlcache.errors import MLCacheError
from celery_mlcache.fleet.app import find_fleet
from celery_mlcache.manager import CacheManager


# No args=: Celery would take the first KEY for it, and the rest would replace that.
@control_command(variadic="keys", signature="KEY [KEY ...]")
def mlcache_invalidate(state: Any, keys: list[str] | str | None = None, **_: Any) -> dict[str, Any]:
    """Remove keys from the cache of every process of the fleet."""

    def act(cache: CacheManager, names: list[str]) -> str:
        return f"{cache.delete_many(names)} of {len(names)} keys were in L2; every L1 follows"

    return _act(state, keys, "keys", act)


@control_command(variadic="tags", signature="TAG [TAG ...]")
def mlcache_invalidate_tags(state: Any, tags: list[str] | str | None = None, **_: Any) -> dict[str, Any]:
    """Remove what carries one of the tags from the cache of every process of the fleet."""

    def act(cache: CacheManager, names: list[str]) -> str:
        cache.invalidate_tags(*names)
        return f"whatever carries {', '.join(names)} is invalid, in L2 and in every L1"

    return _act(state, tags, "tags", act)


def _act(
    state: Any, given: list[str] | str | None, what: str, act: Callable[[CacheManager, list[str]], str]
) -> dict[str, Any]:
    fleet = find_fleet(state.app)
    if fleet is None:
        return {"error": "this app has no cache: setup_cache(app) was not called"}
    names = [given] if isinstance(given, str) else list(given or [])
    if not names:
        return {"error": f"give the {what} to invalidate"}
    try:
        with fleet.operator() as cache:
            return {"ok": act(cache, names)}
    except MLCacheError as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
