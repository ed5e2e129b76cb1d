"""Forked and spawned processes: each in an interpreter of its own, under a watchdog."""

from __future__ import annotations

import pytest

from tests.support.scripts import run_python

pytestmark = pytest.mark.redis

# What every script begins with: a cache in use, and children that report by exit code and on stderr.
PROLOGUE = """
import os, sys, threading, time, traceback
from celery_mlcache import MISS, create_cache_manager
from tests.support.waiting import wait_until

URL, NAMESPACE = sys.argv[1:3]

def make(**settings):
    return create_cache_manager(redis_url=URL, cache_namespace=NAMESPACE, staleness_bound=0.5, **settings)

def is_held(cache):
    return cache.stats()["lease"] == "held"

def hits_l1(cache, key):
    before = cache.stats()["l1_hits"]
    cache.get(key)
    return cache.stats()["l1_hits"] > before

def sockets():
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if link.startswith("socket:"):
            found.add(link)
    return found

def fork(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)

def reap(*pids):
    for pid in pids:
        deadline = time.monotonic() + 15
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.abort()  # faulthandler shows where the parent stands; the child hangs
            time.sleep(0.002)
        assert os.waitstatus_to_exitcode(status) == 0, f"child {pid} ended with {status}"

# Patient: a connection that is given up and made anew has no owner for a moment, and stays open in a child.
cache = make(redis_socket_timeout=10)
cache.set_many({f"k{number}": number for number in range(50)})
wait_until(lambda: is_held(cache))
"""

HAMMER = """
stop = threading.Event()
errors = []

def hammer(seed):
    number = seed
    try:
        while not stop.is_set():
            number += 1
            key = f"k{number % 50}"
            cache.get(key)
            cache.get_or_set(f"f{number % 97}", lambda: number)
            cache.set(f"own{seed}", number)
            assert cache.get(f"own{seed}") == number
            cache.delete(f"f{number % 89}")
            cache.get_many([key, f"f{number % 97}"])
    except BaseException as exc:
        errors.append(exc)
        traceback.print_exc()

threads = [threading.Thread(target=hammer, args=(seed,), daemon=True) for seed in range(4)]
for thread in threads:
    thread.start()
"""

EPILOGUE = """
stop.set()
for thread in threads:
    thread.join(10)
    assert not thread.is_alive()
assert not errors, errors
stats = cache.stats()
assert stats["l2_errors"] == 0, stats
assert stats["subscriptions"] == 1 and stats["subscription_losses"] == 0, stats
assert not set(stats["gaps"]) & {"garbage", "hole", "lost", "regress"}, stats["gaps"]
wait_until(lambda: is_held(cache))
other = make()
cache.set("last", "old")
other.set("last", "new")
wait_until(lambda: cache.get("last") == "new", 1.0)
print("well")
"""


def run(server, namespace: str, body: str, timeout: float = 40.0) -> str:
    """Run a script after the prologue."""
    return run_python(PROLOGUE + body, server.url, namespace, timeout=timeout)


class TestForkOfABusyProcess:
    def test_20_children_use_the_cache(self, shared_redis, namespace):
        """Forked among 4 busy threads, a child reads, writes and hears; the parent notices nothing."""
        body = (
            HAMMER
            + """
def child():
    assert cache.stats()["l1_entries"] == 0 and cache.stats()["subscriptions"] == 0
    assert not cache.is_running
    assert cache.get("k7") == 7
    assert cache.set("from child", os.getpid())
    assert cache.get("from child") == os.getpid()
    assert cache.get_or_set(f"child {os.getpid()}", lambda: 5) == 5
    assert cache.incr("children") > 0
    wait_until(lambda: is_held(cache))
    cache.get("k7")
    assert hits_l1(cache, "k7")
    stats = cache.stats()
    assert stats["pid"] == os.getpid() and stats["l2_errors"] == 0, stats
    assert threading.active_count() == 2, threading.enumerate()
    cache.close()

for _ in range(20):
    reap(fork(child))
assert cache.get("children") == 20
"""
            + EPILOGUE
        )
        assert run(shared_redis, namespace, body).endswith("well\n")

    def test_children_hold_no_socket_of_their_parent(self, shared_redis, namespace):
        """Once a child has used the cache, none of the parent's connections is open in it, busy or idle."""
        body = (
            HAMMER
            + """
def child():
    inherited = sockets()
    assert inherited
    assert cache.get("k7") == 7
    kept = inherited & sockets()
    assert not kept, f"{len(kept)} of {len(inherited)} inherited sockets are still open"

# Every thread has its connection: one that is just being made has no owner yet, and stays open in a child.
opened = cache._parts.remote._open
wait_until(lambda: len(opened) >= 4 and all(connection._sock for connection in list(opened)))
for _ in range(20):
    reap(fork(child))
"""
            + EPILOGUE
        )
        assert run(shared_redis, namespace, body).endswith("well\n")

    def test_children_that_never_use_the_cache(self, shared_redis, namespace):
        """A child that ends in the ordinary way, with every destructor, takes nothing from its parent."""
        body = (
            HAMMER
            + """
for _ in range(4):
    pid = os.fork()
    if not pid:
        import gc
        gc.collect()
        sys.exit(0)
    reap(pid)
"""
            + EPILOGUE
        )
        assert run(shared_redis, namespace, body).endswith("well\n")

    def test_children_that_end_in_the_ordinary_way_after_use(self, shared_redis, namespace):
        """The same for a child that has used the cache and did not close it."""
        body = (
            HAMMER
            + """
for _ in range(4):
    pid = os.fork()
    if not pid:
        assert cache.get("k7") == 7
        cache.set("x", 1)
        sys.exit(0)
    reap(pid)
"""
            + EPILOGUE
        )
        assert run(shared_redis, namespace, body).endswith("well\n")


class TestForkOfAnIdleProcess:
    def test_siblings_stay_coherent(self, shared_redis, namespace):
        """Children of one used cache hear one another, each with a subscription of its own."""
        body = """
from celery_mlcache.keys import RedisNames
import redis
client = redis.Redis.from_url(URL, socket_timeout=5)
channel = RedisNames(NAMESPACE).channel
cache.set("shared", 0)
assert cache.get("shared") == 0
read, write = [], []

def child(number):
    assert cache.get("shared") == 0
    wait_until(lambda: is_held(cache) and hits_l1(cache, "shared"))
    cache.incr("ready")
    wait_until(lambda: cache.get("ready") == 4)
    cache.set(f"by {number}", "old")
    cache.get_many([f"by {each}" for each in range(4)])
    cache.incr("written")
    wait_until(lambda: cache.get("written") == 4)
    for each in range(4):
        assert cache.get(f"by {each}") == "old"
    cache.incr("seen")
    wait_until(lambda: cache.get("seen") == 4)
    cache.set(f"by {number}", "new")
    for each in range(4):
        wait_until(lambda: cache.get(f"by {each}") == "new", 1.5)
    cache.incr("done")
    wait_until(lambda: cache.get("done") == 5)

pids = [fork(lambda number=number: child(number)) for number in range(4)]
wait_until(lambda: cache.get("done") == 4, 10)
assert client.pubsub_numsub(channel)[0][1] == 5
assert cache.get_many([f"by {each}" for each in range(4)]) == {f"by {each}": "new" for each in range(4)}
cache.incr("done")
reap(*pids)
wait_until(lambda: client.pubsub_numsub(channel)[0][1] == 1)
stats = cache.stats()
assert stats["subscriptions"] == 1 and stats["l2_errors"] == 0
print("well")
"""
        assert run(shared_redis, namespace, body).endswith("well\n")

    def test_children_begin_with_nothing(self, shared_redis, namespace):
        """A child has no copy, no lease, no token and no counts from its parent."""
        body = """
cache.set("k", "parent")
for _ in range(5):
    assert cache.get("k") == "parent"

def child():
    stats = cache.stats()
    assert stats["lease"] == "lapsed"
    assert stats["l1_hits"] == stats["writes"] == stats["messages"] == 0, stats
    cache.get("k")
    assert cache.stats()["l2_hits"] == 1 and cache.stats()["l1_hits"] == 0

reap(fork(child))
print("well")
"""
        assert run(shared_redis, namespace, body).endswith("well\n")

    def test_grandchildren(self, shared_redis, namespace):
        """A child of a child is a process like any other."""
        body = """
def grandchild():
    inherited = sockets()
    assert cache.get("k7") == 7
    assert cache.set("grandchild", 1)
    assert not inherited & sockets()
    wait_until(lambda: is_held(cache))

def child():
    assert cache.get("k7") == 7
    wait_until(lambda: is_held(cache))
    reap(fork(grandchild))
    wait_until(lambda: cache.get("grandchild") == 1, 2)
    assert cache.stats()["l2_errors"] == 0 and is_held(cache)

reap(fork(child))
wait_until(lambda: cache.get("grandchild") == 1, 2)
assert cache.stats()["subscriptions"] == 1
print("well")
"""
        assert run(shared_redis, namespace, body).endswith("well\n")

    def test_a_closed_cache_is_closed_in_the_child(self, shared_redis, namespace):
        """Closed stays closed over a fork."""
        body = """
from celery_mlcache import CacheClosedError
cache.close()

def child():
    try:
        cache.get("k")
    except CacheClosedError:
        return
    raise AssertionError("it is open")

reap(fork(child))
print("well")
"""
        assert run(shared_redis, namespace, body).endswith("well\n")

    def test_fork_inside_a_loader(self, shared_redis, namespace):
        """A child that comes out of a loader its parent was in neither speaks nor listens on the parent's sockets."""
        body = """
for round_number in range(5):
    pids = []

    def loader():
        pid = os.fork()
        if pid:
            pids.append(pid)
            reap(pid)
            return "parent"
        return "child"

    try:
        got = cache.get_or_set(f"forked {round_number}", loader)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    if not pids:
        try:
            assert got in ("child", "parent"), got
            assert cache.get("k7") == 7
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert got in ("parent", "child"), got
    assert cache.get("k7") == 7
    assert cache.stats()["l2_errors"] == 0, cache.stats()
print("well")
"""
        assert run(shared_redis, namespace, body).endswith("well\n")

    def test_fork_inside_a_loader_sends_nothing_on_the_parents_socket(self, shared_redis, namespace):
        """The parent's connection carries no byte of the child's: the server counts its commands."""
        body = """
import redis
client = redis.Redis.from_url(URL, decode_responses=True)

def commands_on(connection_id):
    (found,) = [each for each in client.client_list() if each["id"] == connection_id]
    return int(found.get("tot-cmds", -1)), found["cmd"], int(found["age"])

connection = cache._parts.remote._idle[-1]
connection.send_command("CLIENT", "ID")
connection_id = str(int(connection.read_response()))
cache.delete("forked")
cache.get("k7")

def loader():
    before = commands_on(connection_id)
    # The parent must not use its connection while the child runs.
    pid = os.fork()
    if not pid:
        return "child"
    reap(pid)
    after = commands_on(connection_id)
    assert before[:2] == after[:2], f"the child used its parent's connection: {before} {after}"
    return "parent"

is_parent = os.getpid()
try:
    got = cache.get_or_set("forked", loader)
except BaseException:
    traceback.print_exc()
    os._exit(1)
if os.getpid() != is_parent:
    os._exit(0)
print("well")
"""
        assert run(shared_redis, namespace, body).endswith("well\n")


class TestMultiprocessing:
    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_every_start_method(self, shared_redis, namespace, tmp_path, method):
        """Processes of every start method use the cache and hear the parent's invalidations."""
        module = tmp_path / f"mp_job_{method}.py"
        module.write_text(
            """
import sys
from celery_mlcache import create_cache_manager
from tests.support.waiting import wait_until

CACHE = []

def the_cache(url, namespace):
    if not CACHE:
        CACHE.append(create_cache_manager(redis_url=url, cache_namespace=namespace, staleness_bound=0.5))
    return CACHE[0]

def job(url, namespace):
    cache = the_cache(url, namespace)
    assert cache.get("k") == "old"
    wait_until(lambda: cache.stats()["lease"] == "held")
    cache.set("child is ready", 1)
    wait_until(lambda: cache.get("k") == "new", 5)
    cache.set("child saw", "new")
""",
            "utf-8",
        )
        body = f"""
import multiprocessing
sys.path.insert(0, {str(tmp_path)!r})
import mp_job_{method} as jobs

if __name__ == "__main__":
    cache = jobs.the_cache(URL, NAMESPACE)
    cache.set("k", "old")
    context = multiprocessing.get_context({method!r})
    process = context.Process(target=jobs.job, args=(URL, NAMESPACE))
    process.start()
    wait_until(lambda: cache.get("child is ready"), 15)
    cache.set("k", "new")
    wait_until(lambda: cache.get("child saw") == "new", 5)
    process.join(10)
    assert process.exitcode == 0, process.exitcode
    assert cache.stats()["l2_errors"] == 0
    print("well")
"""
        assert run(shared_redis, namespace, body).endswith("well\n")
