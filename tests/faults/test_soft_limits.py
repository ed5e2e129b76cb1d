"""Celery's soft time limit: a signal handler that raises, in the main thread, between any two steps of a call."""

from __future__ import annotations

import pytest

from celery_mlcache import create_cache_manager
from tests.support.scripts import run_python
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

STORM = """
import random, signal, sys, time
from celery.exceptions import SoftTimeLimitExceeded
from celery_mlcache import MISS, create_cache_manager
from tests.support.waiting import wait_until

def interrupt(*args):
    raise SoftTimeLimitExceeded

signal.signal(signal.SIGALRM, interrupt)
SETTINGS = dict(redis_url=sys.argv[1], cache_namespace=sys.argv[2], staleness_bound=0.5)
cache = create_cache_manager(**SETTINGS)
KEYS = [f"k{number}" for number in range(20)]
cache.set("n", 0)
cache.get_or_set("warm", lambda: 1)
cache.delete("warm")
cache.get_many(KEYS)
cache.incr("n")
wait_until(lambda: cache.stats()["lease"] == "held")

def check(key, value):
    if value is not MISS and value[0] != key:
        print("an answer to another question:", key, value)
        sys.exit(1)

def step(rng, number):
    key, dice = rng.choice(KEYS), rng.random()
    if dice < 0.3:
        check(key, cache.get(key, MISS))
    elif dice < 0.5:
        cache.set(key, [key, number])
    elif dice < 0.7:
        check(key, cache.get_or_set(key, lambda: [key, 0]))
    elif dice < 0.8:
        cache.delete(key)
    elif dice < 0.9:
        for found, value in cache.get_many(rng.sample(KEYS, 5)).items():
            check(found, value)
    else:
        cache.incr("n")

rng, interrupts = random.Random(5), 0
end = time.monotonic() + 3
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.004 + 1e-5)
        for number in range(20):
            step(rng, number)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except SoftTimeLimitExceeded:
        interrupts += 1
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except SoftTimeLimitExceeded:
            pass
signal.signal(signal.SIGALRM, signal.SIG_IGN)
assert interrupts > 50, interrupts
print("survived")
"""

AFTER = """
remote = create_cache_manager(**SETTINGS, l1_enabled=False)
wait_until(lambda: cache.stats()["lease"] == "held")
for key in KEYS:
    assert cache.get(key, MISS) == remote.get(key, MISS), key
broken = []
for key in KEYS:
    cache.set(key, [key, 1])
    before = cache.stats()["l1_hits"]
    cache.get(key)
    if cache.stats()["l1_hits"] == before:
        broken.append(key)
assert not broken, f"L1 takes these keys no more: {broken}"
for key in KEYS:
    cache.delete(key)
    cache.get_or_set(key, lambda: [key, 2])
    assert remote.get(key) == [key, 2], f"fills of {key} are refused for ever"
print("well")
"""

# hiredis.pack_command calls str() of an int without looking whether it raised: a handler that raises there is the end.
PACK = """
import random, signal, time
from celery.exceptions import SoftTimeLimitExceeded
from celery_mlcache import {module} as module

def interrupt(*args):
    raise SoftTimeLimitExceeded

signal.signal(signal.SIGALRM, interrupt)
command = ("EVALSHA", "x" * 40, *[1795363371350840] * 100)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0003 * random.random() + 1e-5)
        while True:
            {call}
    except SoftTimeLimitExceeded:
        pass
signal.signal(signal.SIGALRM, signal.SIG_IGN)
print("survived")
"""


@pytest.mark.parametrize(
    ("module", "call"), [("remote", "module._pack(command)"), ("backplane", "module._pack(*command)")]
)
def test_packing_a_command_does_not_end_the_process(module, call):
    """An exception of a signal handler while a command is packed is an exception, not a segmentation fault."""
    assert run_python(PACK.format(module=module, call=call), timeout=20).endswith("survived\n")


@pytest.mark.timeout(60)
def test_a_storm_of_soft_limits(shared_redis, namespace):
    """Interrupted anywhere, thousands of times: no crash, no reply for another, and all keys work afterwards."""
    assert run_python(STORM + AFTER, shared_redis.url, namespace, timeout=40).endswith("survived\nwell\n")


def test_a_ticket_that_was_lost_does_not_poison_its_key(shared_redis, namespace):
    """An exception between opening and guarding a ticket leaves it open; the key is cached again all the same."""
    with create_cache_manager(redis_url=shared_redis.url, cache_namespace=namespace) as cache:
        cache.set("k", 0)
        wait_until(lambda: cache.stats()["lease"] == "held")
        coherence = cache._parts.tier.coherence
        lost = coherence.open("k")
        coherence.cancel(lost)
        cache.set("k", 1)
        before = cache.stats()["l1_hits"]
        assert cache.get("k") == 1
        assert cache.stats()["l1_hits"] == before + 1
        cache.delete("k")
        assert cache.get_or_set("k", lambda: 2) == 2
        assert cache.get_or_set("k", lambda: 3) == 2
