"""Who may share a loader's result while nothing proves that the process hears anything."""

from __future__ import annotations

import threading
import time

import pytest

from celery_mlcache import create_cache_manager
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

DELTA = 0.3


def test_a_silent_connection_bounds_the_sharing_of_a_flight(redis_server, proxy):
    """More than delta after a delete that a deaf process could not hear, nobody there joins a loader from before it."""
    settings = {"redis_url": proxy.url, "staleness_bound": DELTA}
    loading, go_on = threading.Event(), threading.Event()
    answers: list[str] = []

    def slow() -> str:
        loading.set()
        go_on.wait(10)
        return "old"

    with (
        create_cache_manager(redis_url=redis_server.url, l1_enabled=False) as writer,
        create_cache_manager(**settings) as reader,
    ):
        reader.warm()
        wait_until(lambda: reader.stats()["lease"] == "held")
        leader = threading.Thread(target=reader.get_or_set, args=("k", slow))
        leader.start()
        assert loading.wait(5)
        proxy.deaf()
        writer.delete("k")
        deleted = time.monotonic()
        wait_until(lambda: time.monotonic() > deleted + DELTA)
        newcomer = threading.Thread(target=lambda: answers.append(reader.get_or_set("k", lambda: "new")))
        newcomer.start()
        newcomer.join(0.6)  # its own question to L2 costs a time-out at most; in a shared flight it would wait
        go_on.set()
        newcomer.join(5)
        leader.join(5)
    assert answers == ["new"]
