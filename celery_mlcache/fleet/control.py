"""Remote-control commands: ``celery -A app control mlcache_invalidate KEY ...``.

Handlers run in each worker's MainProcess, which has no L1 under prefork, and hold up its consumer while they run. So
they tell Redis, once, within one socket timeout; the backplane tells every process, prefork children included. The
first line of a handler's docstring is its help in ``celery inspect`` and ``celery control``.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command

from celery_mlcache.errors import MLCacheError
from celery_mlcache.fleet.app import find_fleet


# No args=: Celery would take the first KEY for it, and the rest would replace that.
@control_command(variadic="keys", signature="KEY [KEY ...]")
def mlcache_invalidate(state: Any, keys: list[str] | str | None = None, **_: Any) -> dict[str, Any]:
    """Remove keys from the cache of every process of the fleet."""
    fleet = find_fleet(state.app)
    if fleet is None:
        return {"error": "this app has no cache: setup_cache(app) was not called"}
    wanted = [keys] if isinstance(keys, str) else list(keys or [])
    if not wanted:
        return {"error": "give the keys to invalidate"}
    try:
        with fleet.operator() as cache:
            removed = cache.delete_many(wanted)
    except MLCacheError as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return {"ok": f"{removed} of {len(wanted)} keys were in L2; every L1 follows"}
