"""Everything at once, in an interpreter of its own: a hang that holds the GIL must not take the test run with it."""

from __future__ import annotations

import pytest

from tests.support.scripts import run_python

pytestmark = pytest.mark.redis

# The laws, held by every thread at every step: no exception, no value of another key, own keys read back, own
# numbers never smaller than before; and when all is said, every process says the same.
WORK = """
import os, random, subprocess, sys, threading, time, traceback
from celery_mlcache import MISS, create_cache_manager
from tests.support.waiting import wait_until

URL, NAMESPACE, SECONDS = sys.argv[1], sys.argv[2], float(sys.argv[3])
SETTINGS = dict(redis_url=URL, cache_namespace=NAMESPACE, staleness_bound=0.5, l1_max_size=200, heartbeat_interval=0.1,
                redis_socket_timeout=5, redis_connect_timeout=5)  # the machine is shared: no timeouts here
KEYS = [f"k{number}" for number in range(60)]
END = time.monotonic() + SECONDS

def check(key, value):
    assert value is MISS or value[0] == key, (key, value)

def work(cache, seed, pause=lambda: None):
    rng = random.Random(seed)
    own, number, floor, steps = f"own{seed}-{os.getpid()}", 0, 0, 0
    while time.monotonic() < END:
        steps += 1
        key = rng.choice(KEYS)
        dice = rng.random()
        if dice < 0.45:
            check(key, cache.get(key, MISS))
        elif dice < 0.6:
            check(key, cache.get_or_set(key, lambda: (pause(), [key, seed])[1], ttl=rng.choice([None, 0.05, 5])))
        elif dice < 0.7:
            cache.set(key, [key, steps], ttl=rng.choice([None, 0.02, 5]))
        elif dice < 0.75:
            cache.delete(key)
        elif dice < 0.8:
            for found, value in cache.get_many(rng.sample(KEYS, 10)).items():
                check(found, value)
        elif dice < 0.85:
            cache.incr("counter", rng.randrange(1, 5))
        elif dice < 0.87:
            cache.set_many({each: [each, steps] for each in rng.sample(KEYS, 5)})
        elif dice < 0.89:
            asked = rng.sample(KEYS, 5)
            for found, value in cache.get_or_set_many(asked, lambda keys: {each: [each, 0] for each in keys}).items():
                check(found, value)
        elif dice < 0.9:
            cache.delete_many(rng.sample(KEYS, 5))
        elif dice < 0.905:
            cache.clear()
        elif dice < 0.92:
            cache.barrier(cache.token())
            cache.stats()
            key in cache
            cache.touch(key, 5)
            check(key, cache.refresh(key, lambda: [key, -1]))
        else:
            number += 1
            cache.set(own, [own, number])
            got = cache.get(own, MISS)
            check(own, got)
            assert got is MISS or got[1] == number, (got, number)  # others may only clear it
    return steps
"""

OTHER = """
cache = create_cache_manager(**SETTINGS)
work(cache, 99)
"""

THREADS = """
sys.setswitchinterval(1e-5)
other = subprocess.Popen([sys.executable, "-c", WORK + OTHER, *sys.argv[1:]])
cache = create_cache_manager(**SETTINGS)
errors, steps = [], []

def run(seed):
    try:
        steps.append(work(cache, seed))
    except BaseException as exc:
        errors.append(exc)
        traceback.print_exc()

threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert other.wait(15) == 0
assert not errors
"""

AGREE = """
remote = create_cache_manager(**{**SETTINGS, "l1_enabled": False})
wait_until(lambda: cache.stats()["lease"] == "held")
settled = time.monotonic()
wait_until(lambda: time.monotonic() > settled + 0.6)
for key in KEYS:
    mine, truth = cache.get(key, MISS), remote.get(key, MISS)
    if mine != truth:  # a life may have ended between the two questions
        mine = cache.get(key, MISS)
    assert mine == truth, (key, mine, truth)
stats = cache.stats()
assert stats["l2_errors"] == stats["message_garbage"] == 0, stats
assert stats["l1_hits"] and stats["l2_hits"] and stats["fills"], stats
assert len(cache._parts.flights) == 0
assert not cache._parts.tier.coherence._tickets
print(sum(steps), "steps, well")
"""


@pytest.mark.timeout(60)
def test_threads(shared_redis, namespace):
    """8 threads with a switch interval of 10 µs, and another process that writes, deletes and clears: the laws hold."""
    code = f"WORK = {WORK!r}\nOTHER = {OTHER!r}\n" + WORK + THREADS + AGREE
    assert run_python(code, shared_redis.url, namespace, "5", timeout=45).endswith("well\n")


@pytest.mark.parametrize("backend", ["cacheout"])
@pytest.mark.timeout(60)
def test_threads_on_the_other_engine(shared_redis, namespace, backend):
    """The same on the other engine, shorter."""
    code = f"WORK = {WORK!r}\nOTHER = {OTHER!r}\n" + WORK + f"SETTINGS['l1_backend'] = {backend!r}\n" + THREADS + AGREE
    assert run_python(code, shared_redis.url, namespace, "2", timeout=45).endswith("well\n")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", ["moka", "cacheout"])
def test_threads_without_redis(namespace, backend):
    """L1 alone under 8 threads: no exception, no hang, every thread reads what it wrote."""
    code = (
        WORK
        + f"SETTINGS.update(l2_enabled=False, l1_backend={backend!r})\n"
        + """
sys.setswitchinterval(1e-5)
cache = create_cache_manager(**SETTINGS)
errors, steps = [], []

def run(seed):
    try:
        steps.append(work(cache, seed))
    except BaseException as exc:
        errors.append(exc)
        traceback.print_exc()

threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors
print(sum(steps), "steps, well")
"""
    )
    assert run_python(code, "redis://unused", namespace, "2", timeout=30).endswith("well\n")


GREENLETS = """
import gevent
cache = create_cache_manager(**SETTINGS)
cache.warm()
wait_until(lambda: cache.stats()["lease"] == "held")  # no flight is shared over the first proof

loads = []
def slow():
    loads.append(1)
    gevent.sleep(0.05)
    return ["k", 1]

asked = [gevent.spawn(cache.get_or_set, "same", slow) for _ in range(2)]
gevent.joinall(asked, timeout=5, raise_error=True)
assert [each.value for each in asked] == [["k", 1]] * 2 and len(loads) == 1, (asked, loads)

other = subprocess.Popen([sys.executable, "-c", WORK + OTHER, *sys.argv[1:]])
greenlets = [gevent.spawn(work, cache, seed, lambda: gevent.sleep(0.001)) for seed in range(20)]
gevent.joinall(greenlets, timeout=SECONDS + 15, raise_error=True)
steps = [each.value for each in greenlets]
assert None not in steps, steps
assert other.wait(15) == 0
"""


@pytest.mark.timeout(60)
def test_greenlets(shared_redis, namespace):
    """Monkey-patched by gevent: two greenlets on one key load once, and 20 greenlets keep the laws."""
    pytest.importorskip("gevent")
    code = "from gevent import monkey\nmonkey.patch_all()\n" + f"WORK = {WORK!r}\nOTHER = {OTHER!r}\n"
    # No switch happens inside a busy loop: the heartbeat's greenlet gets its turn at every reply of Redis.
    assert run_python(code + WORK + GREENLETS + AGREE, shared_redis.url, namespace, "2", timeout=45).endswith("well\n")


@pytest.mark.timeout(60)
def test_greenlets_that_are_killed(shared_redis, namespace):
    """A greenlet killed in its loader or in a round trip leaves nobody waiting and no reply for another."""
    pytest.importorskip("gevent")
    code = (
        "from gevent import monkey\nmonkey.patch_all()\n"
        + WORK
        + """
import gevent
cache = create_cache_manager(**SETTINGS)
cache.set_many({f"v{number}": [f"v{number}", number] for number in range(50)})
for round_number in range(30):
    leader = gevent.spawn(cache.get_or_set, "slow", lambda: gevent.sleep(30))
    gevent.sleep(0.001)
    follower = gevent.spawn(cache.get_or_set, "slow", lambda: "mine")
    gevent.sleep(0.001)
    leader.kill()
    assert follower.get(timeout=5) == "mine"
    cache.delete("slow")

uncached = create_cache_manager(**{**SETTINGS, "l1_enabled": False})
def read(rng):
    while True:
        key = f"v{rng.randrange(50)}"
        check(key, uncached.get(key, MISS))

rng = random.Random(3)
for round_number in range(100):
    readers = [gevent.spawn(read, random.Random(rng.random())) for _ in range(5)]
    gevent.sleep(rng.random() / 500)
    for reader in readers:
        reader.kill()
    for reader in readers:
        assert isinstance(reader.value, gevent.GreenletExit), reader.exception
assert uncached.get("v7") == ["v7", 7]
assert uncached.stats()["l2_errors"] == 0, uncached.stats()
print("well")
"""
    )
    assert run_python(code, shared_redis.url, namespace, "1", timeout=30).endswith("well\n")


@pytest.mark.timeout(60)
def test_eventlet(shared_redis, namespace):
    """Monkey-patched by eventlet: one load for two, and the cache works."""
    pytest.importorskip("eventlet")
    code = (
        "import warnings\nwarnings.simplefilter('ignore')\nimport eventlet\neventlet.monkey_patch()\n"
        + WORK
        + """
cache = create_cache_manager(**SETTINGS)
cache.warm()
wait_until(lambda: cache.stats()["lease"] == "held")
loads = []
def slow():
    loads.append(1)
    eventlet.sleep(0.05)
    return ["k", 1]

asked = [eventlet.spawn(cache.get_or_set, "same", slow) for _ in range(2)]
assert [each.wait() for each in asked] == [["k", 1]] * 2 and len(loads) == 1
assert cache.get("same") == cache.get("same") == ["k", 1]
assert cache.stats()["l1_hits"] >= 1
greenlets = [eventlet.spawn(work, cache, seed, lambda: eventlet.sleep(0.001)) for seed in range(5)]
assert sum(each.wait() for each in greenlets) > 100
print("well")
"""
    )
    assert run_python(code, shared_redis.url, namespace, "1", timeout=30).endswith("well\n")
