"""Celery's settings, each from the environment where a fleet may want its own.

=======================  ==========================================================================================
``SHOP_BROKER_URL``      the broker; ``redis://localhost:6379/0`` unless given
``SHOP_RESULT_BACKEND``  where results go; ``redis://localhost:6379/1`` unless given
``SHOP_NAME``            names the queue and the exchanges, so that two fleets can share a broker; ``shop``
``SHOP_KEY_PREFIX``      put before every key that Celery itself keeps in Redis; nothing
=======================  ==========================================================================================

The cache has its own settings, ``LIB_*``; nothing of it stands here.
"""

from __future__ import annotations

import os
from typing import Any

_name = os.environ.get("SHOP_NAME") or "shop"
_prefix = os.environ.get("SHOP_KEY_PREFIX") or ""

broker_url = os.environ.get("SHOP_BROKER_URL") or "redis://localhost:6379/0"
result_backend = os.environ.get("SHOP_RESULT_BACKEND") or "redis://localhost:6379/1"
result_expires = 600
imports = ("example_worker.tasks",)

task_default_queue = task_default_exchange = task_default_routing_key = _name
control_exchange = f"{_name}.control"
event_exchange = f"{_name}.events"

# Only the Redis transport knows the option; an AMQP connection would be handed it as a parameter.
_redis_options: dict[str, Any] = {"global_keyprefix": _prefix} if _prefix else {}
broker_transport_options = _redis_options if broker_url.startswith(("redis", "unix")) else {}
result_backend_transport_options = _redis_options if result_backend.startswith(("redis", "unix")) else {}

broker_connection_retry_on_startup = True
# A process takes one task at a time and holds none back: work spreads over the fleet evenly. Every task here may run
# twice without harm, so that a lost process loses no cart.
worker_prefetch_multiplier = 1
task_acks_late = True

beat_schedule = {
    "exchange rates stay warm": {"task": "shop.refresh_rates", "schedule": 30.0},
    "the market moves": {"task": "shop.move_market", "schedule": 10.0},
}
