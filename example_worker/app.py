"""The Celery application and its cache: ``celery -A example_worker.app worker``."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.signals import worker_init

from celery_mlcache import setup_cache
from example_worker import shop
from example_worker.heartbeat import install_heartbeat

app = Celery("shop", config_source="example_worker.celeryconfig")
cache = setup_cache(app)  # opens nothing; every worker process gets a manager of its own
install_heartbeat(app)


@worker_init.connect(weak=False)
def _load_catalogue(**_: Any) -> None:
    shop.load_catalogue()
