"""Tokens by hand: what two processes of one namespace promise each other over a real Redis."""

from __future__ import annotations

import pytest

from celery_mlcache import create_cache_manager
from tests.support.scripts import run_python
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis


@pytest.fixture
def open_cache(shared_redis, namespace):
    """Make caches of one namespace; closed after the test."""
    caches = []

    def make(**settings):
        caches.append(create_cache_manager(redis_url=shared_redis.url, cache_namespace=namespace, **settings))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def stamp(token: str) -> int:
    """Return what a token says."""
    return int(token.rpartition("@")[2])


def test_the_latest_token_covers_every_process(open_cache):
    """It is no older than any process's own token, for a process that has heard nothing yet."""
    one, two = open_cache(), open_cache()
    one.set("k", 1)
    assert stamp(two.latest_token()) >= stamp(one.token())


def test_catching_up_by_hand(open_cache):
    """After ``barrier(latest_token())`` a process never reads older than what was written before."""
    one, two = open_cache(), open_cache()
    one.set("k", 0)
    wait_until(lambda: two.get("k") == 0 and two.stats()["l1_hits"])
    for number in range(1, 100):
        one.set("k", number)
        two.barrier(two.latest_token())
        assert two.get("k") == number


@pytest.mark.filterwarnings("ignore::celery_mlcache.config.ConfigurationWarning")
@pytest.mark.parametrize(
    "settings", [{"l1_enabled": False}, {"cache_sync_enabled": False}, {}], ids=["no L1", "no backplane", "both levels"]
)
def test_what_was_heard_is_handed_on(open_cache, settings):
    """Whatever its levels, a process's token is no older than the barriers that it has raised."""
    one, passer_by = open_cache(), open_cache(**settings)
    one.set("k", 1)
    passer_by.barrier(one.token())
    assert stamp(passer_by.token()) >= stamp(one.token())


def test_without_redis(open_cache):
    """Where L2 is off, or does not answer, the latest token is the own one."""
    assert stamp(open_cache(l2_enabled=False).latest_token()) == 0
    nobody = create_cache_manager(redis_url="redis://127.0.0.1:1/0")
    with nobody:
        assert nobody.latest_token() == nobody.token()


def test_what_was_seen_stays_seen_over_a_release(open_cache):
    """The next life of the same cache tells no less."""
    cache = open_cache()
    cache.set("k", 1)
    token = cache.token()
    cache.release()
    assert stamp(cache.token()) >= stamp(token)


def test_a_child_has_seen_what_its_parent_saw(shared_redis, namespace):
    """A script that writes, forks and sends from the child is one history."""
    code = """
        import os, sys
        from celery_mlcache import create_cache_manager

        with create_cache_manager() as cache:
            cache.set("k", 1)
            before = int(cache.token().rpartition("@")[2])
            child = os.fork()
            if not child:
                os._exit(int(cache.token().rpartition("@")[2]) < before)
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    run_python(code, env={"LIB_REDIS_URL": shared_redis.url, "LIB_CACHE_NAMESPACE": namespace})
