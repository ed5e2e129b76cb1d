"""Celery signals of the cache, for tracing and metrics. The sender is the task; handlers must be quick.

Each is sent in the process in which it happens, once for a call, and only where a handler is connected. What handlers
raise is logged by Celery and goes no further.
"""

from __future__ import annotations

from typing import Final

from celery.utils.dispatch import Signal

#: A call was answered from the cache. ``key``; ``level``: "l1", "l2", "shared" where another caller in this
#: process was just computing it, or "producer" where no message was sent; ``seconds_saved``: what it took to compute.
cache_hit: Final = Signal(name="cache_hit", providing_args=["key", "level", "seconds_saved"])

#: A call's function has run, because nothing was cached, and returned or raised (but for what tells the worker what to
#: do, such as Retry). ``key``; ``seconds``: how long it took; ``is_cached``: whether what came of it is cached now.
cache_miss: Final = Signal(name="cache_miss", providing_args=["key", "seconds", "is_cached"])

#: A call was answered with a result whose life has ended. ``key``; ``age``: seconds since it was computed; ``error``:
#: the exception in whose place it stands, or None.
cache_stale: Final = Signal(name="cache_stale", providing_args=["key", "age", "error"])

#: Something went wrong about the cache, and the call went on without. ``key``, or None where there is none; ``what``:
#: "key", "value" (the outcome cannot be stored), "l2", "hook", "refresh", or "producer"; ``error``: an exception, or
#: None.
cache_error: Final = Signal(name="cache_error", providing_args=["key", "what", "error"])
