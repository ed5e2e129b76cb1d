"""One load at a time in the fleet: managers of several processes, here in one, and what each does meanwhile."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_mlcache import CacheManager, CallInProgressError, create_cache_manager
from celery_mlcache.entry import MISS
from celery_mlcache.errors import RemoteStoreError
from celery_mlcache.keys import RedisNames
from celery_mlcache.leases import Lease, Leases, held
from celery_mlcache.loading import MAX_LOST
from celery_mlcache.plans import Answer, Glance, Loaded, Plan
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

LEASE = 0.3  # seconds: short enough to wait for, long enough for a loaded machine to renew in time
TIMEOUT = 15.0
LONG = 30.0  # a lease that lasts longer than any test


class Fleet:
    """Managers of one namespace, each as another process has it, and threads to call them in."""

    def __init__(self, url: str, namespace: str, stack: ExitStack, **settings: Any) -> None:
        self.names = RedisNames(namespace)
        self._stack = stack
        self._settings = {"redis_url": url, "cache_namespace": namespace, "single_flight_lease": LEASE, **settings}
        self.a, self.b = self.join(), self.join()
        self.pool = stack.enter_context(ThreadPoolExecutor(16))

    def join(self, **settings: Any) -> CacheManager:
        """Return one more process's manager."""
        return self._stack.enter_context(create_cache_manager(**{**self._settings, **settings}))

    def start(self, manager: CacheManager, load: Callable[[], Any], key: str = "k", **plan: Any) -> Future[Answer]:
        """Resolve a key in a thread."""
        return self.pool.submit(manager.resolve, key, plan_of(load, **plan))


def plan_of(load: Callable[[], Any], *, life: float = 60.0, stale_life: float = 0.0, **options: Any) -> Plan:
    """Return a plan that is shared by the fleet."""

    def loaded() -> Loaded:
        value = load()
        return value if isinstance(value, Loaded) else Loaded(value, life, (), stale_life)

    return Plan(loaded, **{"is_shared": True, **options})


def leases_of(manager: CacheManager) -> Leases:
    """Return what a manager knows of its leases."""
    manager.warm()
    assert manager._parts is not None
    assert manager._parts.leases is not None
    return manager._parts.leases


def never() -> Any:
    """Fail where nothing may be loaded."""
    raise AssertionError("loaded")


class Gate:
    """A loader that says when it has begun, and ends when it is let."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.began = threading.Event()
        self.may_end = threading.Event()
        self.runs = 0

    def __call__(self) -> Any:
        self.runs += 1
        self.began.set()
        assert self.may_end.wait(TIMEOUT)
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.fixture
def fleet(shared_redis, namespace) -> Iterator[Fleet]:
    """Two processes and a Redis that answers."""
    with ExitStack() as stack:
        yield Fleet(shared_redis.url, namespace, stack)


def waiting(manager: CacheManager, count: int = 1) -> None:
    """Wait until so many of a manager's calls have begun to wait for another process."""
    wait_until(lambda: manager.stats()["waits"] >= count, TIMEOUT, "a call that waits")


class TestSharing:
    def test_a_follower_gets_what_the_holder_has_loaded(self, fleet):
        """A call in another process waits for the one that loads, runs nothing, and finds the value in L2."""
        gate = Gate("v")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        second = fleet.start(fleet.b, never)
        waiting(fleet.b)
        gate.may_end.set()
        assert first.result(TIMEOUT) == Answer("v", "miss", is_loaded=True, is_stored=True)
        assert second.result(TIMEOUT) == Answer("v", "l2")
        assert (fleet.b.stats()["waits"], fleet.b.stats()["leases"], fleet.a.stats()["leases"]) == (1, 0, 1)

    def test_a_value_that_came_between_the_miss_and_the_lease_is_read(self, fleet):
        """Who misses, and gets the lease only after another one has loaded and gone, reads and does not load again."""
        leases = leases_of(fleet.b)
        ask, asked = leases.ask, []

        def late(key: str, **options: Any) -> Any:
            if not asked:
                asked.append(fleet.a.resolve(key, plan_of(lambda: "first")))
            return ask(key, **options)

        leases.ask = late
        assert fleet.b.resolve("k", plan_of(never)) == Answer("first", "l2")

    def test_what_cannot_be_kept_is_loaded_by_everybody_at_once(self, fleet):
        """Where the holder's result is not stored, those who wait are told, and load side by side."""
        gate = Gate(Loaded("mine", is_kept=False))
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        both = threading.Barrier(2)
        others = [
            fleet.start(each, lambda: Loaded(both.wait(TIMEOUT), is_kept=False)) for each in (fleet.b, fleet.join())
        ]
        waiting(fleet.b)
        wait_until(lambda: sum(not other.running() for other in others) == 0, TIMEOUT)
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "mine"
        assert sorted(other.result(TIMEOUT).value for other in others) == [0, 1]

    def test_when_the_holder_fails_the_next_one_loads(self, fleet):
        """An error is the holder's own; one of those who wait loads, and the others get that."""
        gate = Gate(KeyError("k"))
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        runs: list[int] = []
        others = [fleet.start(each, lambda: runs.append(1) or "second") for each in (fleet.b, fleet.join())]
        waiting(fleet.b)
        gate.may_end.set()
        with pytest.raises(KeyError):
            first.result(TIMEOUT)
        assert [other.result(TIMEOUT).value for other in others] == ["second"] * 2
        assert runs == [1]

    def test_an_invalidation_while_it_is_loaded_makes_the_next_one_load_again(self, fleet):
        """What was invalidated meanwhile is its caller's only: who waited for it loads anew."""
        gate = Gate("old")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        second = fleet.start(fleet.b, lambda: "new")
        waiting(fleet.b)
        fleet.join().delete("k")
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "old"
        assert second.result(TIMEOUT) == Answer("new", "miss", is_loaded=True, is_stored=True)
        assert fleet.a.get("k") == "new"

    def test_different_keys_do_not_wait_for_each_other(self, fleet):
        """A lease is one key's."""
        gate = Gate("v")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        assert fleet.b.resolve("other", plan_of(lambda: 1)).value == 1
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "v"

    def test_waiting_ends_after_max_wait(self, fleet):
        """Who has waited long enough loads all the same, and the value that was stored first is the one that counts."""
        gate = Gate("slow")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        assert fleet.b.resolve("k", plan_of(lambda: "impatient", max_wait=0.1)).value == "impatient"
        assert fleet.b.stats()["wait_timeouts"] == 1
        gate.may_end.set()
        assert first.result(TIMEOUT) == Answer("impatient", "miss")

    def test_no_lease_no_wait_without_l2(self, namespace):
        """Without L2 there is nobody to wait for: one load at a time in this process, as ever."""
        with create_cache_manager(l2_enabled=False, cache_namespace=namespace) as alone:
            assert alone.resolve("k", plan_of(lambda: 1)) == Answer(1, "miss", is_loaded=True, is_stored=True)
            assert alone.resolve("k", plan_of(never)) == Answer(1, "l1")


class TestOutcomes:
    def test_an_answer_says_whether_it_was_stored(self, fleet):
        """Not where the key was touched meanwhile, nor where it was not to be kept; nor is that taken for trouble."""
        touched = fleet.a.resolve("k", plan_of(lambda: fleet.b.delete("k") or "v"))
        assert (touched.is_kept, touched.is_stored, touched.is_degraded) == (True, False, False)
        unkept = fleet.a.resolve("k", plan_of(lambda: Loaded("v", is_kept=False)))
        assert (unkept.is_kept, unkept.is_stored, unkept.is_degraded) == (False, False, False)

    def test_find_says_where(self, fleet):
        """A value that another process has stored is found in L2 first, and then in L1."""
        fleet.a.set("k", 1)
        assert fleet.b.find("k") == Answer(1, "l2")
        fleet.b.warm()
        wait_until(lambda: fleet.b.find("k") == Answer(1, "l1"), TIMEOUT)
        assert fleet.b.front("k") == Answer(1, "l1")
        assert fleet.b.find("none") is fleet.b.front("none") is None

    def test_put_stores_as_a_loader_would(self, fleet):
        """An exact life without the cache's jitter, and nothing where it is too large."""
        jittery = fleet.join(ttl_jitter=0.5)
        assert jittery.put("k", Loaded("v", 100.0, ("t",), is_jittered=False))
        assert 99 < jittery.ttl("k") <= 100
        assert not jittery.put("k", Loaded("v" * 200, 100.0, max_size=100))
        assert (jittery.get("k"), jittery.stats()["too_large"]) == ("v", 1)
        fleet.b.invalidate_tags("t")
        assert fleet.join().get("k") is None

    def test_inspect_asks_l1_where_l2_is_gone(self, redis_server, namespace):
        """While the lease lasts, what L1 answers is there, whatever L2 says."""
        with create_cache_manager(
            redis_url=redis_server.url, cache_namespace=namespace, staleness_bound=30, tombstone_ttl=300
        ) as cache:
            cache.set("k", "v")
            wait_until(lambda: cache.find("k") == Answer("v", "l1"), TIMEOUT)
            redis_server.freeze()
            found = cache.inspect("k")
        assert (found.value, found.level) == ("v", "l1")


class TestGlance:
    def test_what_it_finds(self, fleet):
        """A value from L2 or L1; or when the key was last removed, in the order of writes."""
        before = fleet.b.now()
        assert fleet.b.glance("k", TIMEOUT) == Glance(MISS, is_answered=True, stamp=0, is_remote=True)
        fleet.a.set("k", 1)
        found = fleet.b.glance("k", TIMEOUT)
        assert (found.value, found.is_answered, found.is_remote, found.stamp > before) == (1, True, True, True)
        wait_until(lambda: not fleet.b.glance("k", TIMEOUT).is_remote, TIMEOUT, "an answer from L1")
        fleet.a.delete("k")
        gone = wait_until(lambda: (seen := fleet.b.glance("k", TIMEOUT)).value is MISS and seen, TIMEOUT)
        assert gone.stamp > found.stamp
        assert fleet.b.now() >= gone.stamp

    def test_nothing_that_is_served_for_want_of_better(self, redis_server, namespace):
        """With on_disconnect="serve" L1 goes on answering, as stale; an answer that must be fresh is not among them."""
        with create_cache_manager(
            redis_url=redis_server.url, cache_namespace=namespace, on_disconnect="serve", max_stale=600
        ) as cache:
            cache.set("k", "v")
            wait_until(lambda: cache.find("k") == Answer("v", "l1"), TIMEOUT)
            redis_server.kill()
            wait_until(lambda: cache.stats()["lease"] == "lapsed", TIMEOUT)
            assert cache.find("k") == Answer("v", "stale")
            assert cache.resolve("k", plan_of(never)) == Answer("v", "stale")
            assert cache.glance("k", 0.05)[:2] == (MISS, False)


class TestContention:
    @pytest.fixture
    def gate(self, fleet) -> Iterator[Gate]:
        """The key is being loaded in process a."""
        gate = Gate("v")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        yield gate
        gate.may_end.set()
        first.result(TIMEOUT)

    @pytest.mark.parametrize("where", ["a", "b"])
    @pytest.mark.parametrize("contention", ["raise", "retry"])
    def test_raise(self, fleet, gate, contention, where):
        """Whether it is loaded in this process or another one, the call ends at once, and says who loads."""
        with pytest.raises(CallInProgressError, match=r"'k' is being computed by \S+"):
            getattr(fleet, where).resolve("k", plan_of(never, contention=contention))

    @pytest.mark.parametrize("where", ["a", "b"])
    def test_compute(self, fleet, gate, where):
        """The call loads at once, and its value is there for all."""
        assert getattr(fleet, where).resolve("k", plan_of(lambda: "mine", contention="compute")).value == "mine"
        assert fleet.join().get("k") == "mine"
        assert getattr(fleet, where).stats()["wait_timeouts"] == 0

    @pytest.mark.parametrize("where", ["a", "b"])
    def test_stale(self, fleet, where):
        """The call gets what has expired, where there is something; the one that loads is not disturbed."""
        fleet.a.set("s", "old", 60, stale_ttl=60)
        fleet.a.expire("s")
        gate = Gate("new")
        first = fleet.start(fleet.a, gate, "s", contention="stale")
        assert gate.began.wait(TIMEOUT)
        answer = getattr(fleet, where).resolve("s", plan_of(never, contention="stale"))
        assert answer == Answer("old", "stale")
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "new"

    def test_stale_with_nothing_stale_waits(self, fleet, gate):
        """Where there is nothing stale the call waits as any other."""
        second = fleet.start(fleet.b, never, contention="stale")
        waiting(fleet.b)
        gate.may_end.set()
        assert second.result(TIMEOUT) == Answer("v", "l2")


class TestReentrancy:
    def test_a_loader_that_asks_for_its_own_key_does_not_wait(self, fleet):
        """In the same thread, through another manager of the namespace too, and what is nested has stored first."""
        inner = lambda: fleet.b.resolve("k", plan_of(lambda: "inner")).value  # noqa: E731
        assert fleet.a.resolve("k", plan_of(lambda: f"outer of {inner()}", max_wait=60)).value == "inner"
        assert fleet.b.stats()["waits"] == 0
        assert held() == ()

    def test_an_ancestor_in_another_process_is_not_waited_for(self, fleet):
        """Fences that came with a message count as the caller's own."""
        gate = Gate("v")
        fences: list[int] = []
        first = fleet.start(fleet.a, lambda: (fences.extend(held()), gate())[1])
        assert gate.began.wait(TIMEOUT)
        assert len(fences) == 1
        plan = plan_of(lambda: "descendant", ancestry=lambda: fences, max_wait=60)
        assert fleet.b.resolve("k", plan).value == "descendant"
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "descendant"

    def test_a_stranger_waits(self, fleet):
        """Fences of other leases open no door."""
        gate = Gate("v")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        second = fleet.start(fleet.b, never, ancestry=lambda: (1, 2, 3))
        waiting(fleet.b)
        gate.may_end.set()
        assert {first.result(TIMEOUT).value, second.result(TIMEOUT).value} == {"v"}


class TestLeases:
    def test_a_lease_is_renewed_while_it_is_held(self, fleet, shared_redis):
        """However long a load takes, nobody takes over: the lease is given new time again and again."""
        gate = Gate("v")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        client = shared_redis.client(decode_responses=True)
        until = lambda: int(client.hget(fleet.names.lease("k"), "until"))  # noqa: E731
        for _ in range(4):
            gc.collect()  # what renews it does not keep it: the code that loads does
            before = until()
            wait_until(lambda before=before: until() > before, TIMEOUT, "a renewal")
        assert not leases_of(fleet.b).ask("k", seen=None, is_waiting=False).is_mine
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "v"
        assert fleet.a.stats()["leases_lost"] == fleet.b.stats()["takeovers"] == 0
        assert not client.hget(fleet.names.lease("k"), "until")

    def test_a_lease_that_is_not_renewed_is_taken_over_and_its_value_refused(self, fleet):
        """As for a holder that is paused: the next one loads after one lease, and the late value is not stored.

        Not even once the successor's value is gone.
        """
        leases_of(fleet.a)._renew = lambda _batch: None
        gate = Gate("late")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        assert fleet.b.resolve("k", plan_of(lambda: "next", life=0.2)).value == "next"
        assert fleet.b.stats()["takeovers"] == 1
        wait_until(lambda: fleet.b.get("k", MISS) is MISS, TIMEOUT)
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "late"
        assert fleet.b.get("k", MISS) is MISS
        assert fleet.a.get("k", MISS) is MISS
        assert (fleet.a.stats()["leases_lost"], fleet.a.stats()["fills_refused"]) == (1, 1)

    @pytest.mark.parametrize("where", ["hold", "__enter__", "__exit__", "give_back"])
    def test_a_lease_whose_holder_was_interrupted_lapses(self, fleet, monkeypatch, where):
        """A signal handler may raise between any two steps of a load: what nobody refers to any more is not renewed."""
        leases = leases_of(fleet.a)
        hold, renew, is_renewed = leases.hold, leases._renew, threading.Event()

        def renew_and_tell(batch: list[Lease]) -> None:
            renew(batch)
            if batch:
                is_renewed.set()

        def interrupted(*args: Any) -> None:
            if where == "hold":
                hold(*args)
            raise SoftTimeLimitExceeded

        def load() -> Loaded:
            assert is_renewed.wait(TIMEOUT)  # the thread that renews has had the lease in hand, too
            return Loaded("v", is_kept=False)

        with monkeypatch.context() as patch:
            patch.setattr(leases, "_renew", renew_and_tell)
            patch.setattr(Lease if where.startswith("_") else leases, where, interrupted)
            with pytest.raises(SoftTimeLimitExceeded):  # in a context of its own, for fences may be left in it
                copy_context().run(fleet.a.resolve, "k", plan_of(load))
        gc.collect()
        wait_until(lambda: len(leases) == 0, TIMEOUT, "the end of what nobody holds")
        assert fleet.b.resolve("k", plan_of(lambda: "next", max_wait=TIMEOUT)).value == "next"
        assert fleet.b.stats()["takeovers"] == 1

    def test_a_lease_that_was_lost_is_renewed_no_more(self, fleet, shared_redis):
        """When Redis has forgotten a lease, or another one has it, the thread lets it go."""
        gate = Gate("v")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        assert len(leases_of(fleet.a)) == 1
        shared_redis.client().delete(fleet.names.lease("k"))
        assert leases_of(fleet.b).ask("k", seen=None, is_waiting=False).is_mine
        wait_until(lambda: len(leases_of(fleet.a)) == 0, TIMEOUT)
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "v"

    def test_one_thread_renews_them_all_and_ends_with_the_cache(self, fleet):
        """Many loads at once need one thread, which starts with the first and is gone after close()."""
        named = lambda: [each for each in threading.enumerate() if each.name == "mlcache-leases"]  # noqa: E731
        before = named()
        gates = [Gate(i) for i in range(4)]
        flights = [fleet.start(fleet.a, gate, f"k{i}") for i, gate in enumerate(gates)]
        assert all(gate.began.wait(TIMEOUT) for gate in gates)
        (mine,) = [each for each in named() if each not in before]
        for gate in gates:
            gate.may_end.set()
        assert [flight.result(TIMEOUT).value for flight in flights] == [0, 1, 2, 3]
        assert mine.daemon
        fleet.a.close()
        mine.join(TIMEOUT)
        assert not mine.is_alive()

    def test_a_grant_whose_reply_was_lost_is_still_ones_own(self, fleet):
        """Who has got the lease without knowing takes it up, and waits for nobody; another cache would wait."""
        leases, lost = leases_of(fleet.a), []
        ask = leases.ask

        def lose(*args: Any, **options: Any) -> Any:
            grant = ask(*args, **options)
            if not lost:
                lost.append(grant)
                raise RemoteStoreError("acquire", "connection lost", outcome_unknown=True)
            return grant

        leases.ask = lose
        assert fleet.a.resolve("k", plan_of(lambda: "v", max_wait=3600)).value == "v"
        assert lost[0].is_mine
        assert (fleet.a.stats()["waits"], fleet.a.stats()["leases"]) == (0, 1)
        assert not leases_of(fleet.b).is_mine(lost[0])

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # eventlet's, where a test has imported it
    def test_a_forked_child_loads_under_leases_of_its_own(self, fleet):
        """A child made in the middle of a load neither keeps the parent's lease nor lacks a thread for its own."""
        gate = Gate("parent")
        first = fleet.start(fleet.a, gate)
        assert gate.began.wait(TIMEOUT)
        read, write = os.pipe()
        pid = os.fork()
        if not pid:  # pragma: no cover - another process
            answer = fleet.a.resolve("child", plan_of(lambda: "child")).value
            os.write(write, f"{answer} {len(leases_of(fleet.a))} {leases_of(fleet.a)._thread is not None}".encode())
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(read, 100) == b"child 0 True"
        os.close(read), os.close(write)
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "parent"
        assert fleet.a.stats()["leases_lost"] == 0

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # eventlet's, where a test has imported it
    def test_a_child_that_was_forked_inside_of_a_load_gives_nothing_back(self, fleet):
        """Its copy of the lease is the parent's, and so may the lock be, which nobody in the child will release."""
        parent = fleet.join(single_flight_lease=LONG)  # for it is not renewed while the lock is held
        leases = leases_of(parent)
        lease = leases.hold("k", leases.ask("k", seen=None, is_waiting=False))
        is_locked, may_unlock = threading.Event(), threading.Event()

        def lock() -> None:
            with leases._changed:
                is_locked.set()
                may_unlock.wait(TIMEOUT)

        other = fleet.pool.submit(lock)
        assert is_locked.wait(TIMEOUT)
        pid = os.fork()
        if not pid:  # pragma: no cover - another process
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)  # the end of one that waits for the lock
            with lease:
                pass
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        may_unlock.set()
        other.result(TIMEOUT)
        assert os.waitstatus_to_exitcode(status) == 0
        assert not leases_of(fleet.b).ask("k", seen=None, is_waiting=False).is_mine
        with lease:
            pass
        assert leases_of(fleet.b).ask("k", seen=None, is_waiting=False).is_mine
        assert parent.stats()["leases_lost"] == 0

    def test_a_refresh_takes_the_lease_and_waits_for_nobody(self, fleet):
        """Others who miss wait for a refresh; a refresh itself waits for nobody, and may have to yield."""
        gate = Gate("fresh")
        first = fleet.pool.submit(fleet.a.renew, "k", plan_of(gate))
        assert gate.began.wait(TIMEOUT)
        second = fleet.start(fleet.b, never)
        waiting(fleet.b)
        with pytest.raises(CallInProgressError):
            fleet.b.renew("k", plan_of(never, contention="raise"))
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "fresh"
        assert second.result(TIMEOUT).value == "fresh"
        again = Gate("again")
        third = fleet.pool.submit(fleet.a.renew, "k", plan_of(again))
        assert again.began.wait(TIMEOUT)
        assert fleet.b.renew("k", plan_of(lambda: "mine")).value == "mine"
        again.may_end.set()
        third.result(TIMEOUT)
        assert fleet.join().get("k") == "mine"  # what was stored first was loaded last


class TestFaults:
    @pytest.fixture
    def lonely(self, redis_server, namespace) -> Iterator[Fleet]:
        """Two processes and a Redis to break."""
        with ExitStack() as stack:
            yield Fleet(redis_server.url, namespace, stack, single_flight_lease=2.0)

    def test_waiting_ends_when_redis_is_gone(self, lonely, redis_server):
        """A call that waits for another process's load runs its own when the server dies."""
        gate = Gate("v")
        first = lonely.start(lonely.a, gate)
        assert gate.began.wait(TIMEOUT)
        second = lonely.start(lonely.b, lambda: "mine")
        waiting(lonely.b)
        redis_server.kill()
        assert second.result(TIMEOUT).value == "mine"
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "v"

    def test_a_connection_that_is_lost_while_one_waits_is_no_reason_to_load(self, lonely, redis_server):
        """Who waits on a connection that breaks looks again, and waits on: the value is loaded once."""
        gate = Gate("v")
        first = lonely.start(lonely.a, gate)
        assert gate.began.wait(TIMEOUT)
        second = lonely.start(lonely.b, never)
        client = redis_server.client(decode_responses=True)

        def waiters() -> list[str]:
            return [each["id"] for each in client.client_list() if each["cmd"] == "blpop"]

        (lost,) = wait_until(waiters, TIMEOUT, "a call that waits")
        assert client.client_kill_filter(_id=lost) == 1
        wait_until(lambda: waiters() and waiters() != [lost], TIMEOUT, "a call that waits again")
        gate.may_end.set()
        assert (first.result(TIMEOUT).value, second.result(TIMEOUT).value) == ("v", "v")
        assert (gate.runs, lonely.b.stats()["l2_errors"]) == (1, 1)

    def test_a_server_that_lets_nobody_wait_is_asked_a_few_times(self, lonely, redis_server, monkeypatch):
        """Where BLPOP is forbidden a call asks for the lease a few times more, and loads without."""
        redis_server.client().execute_command("ACL", "SETUSER", "default", "-blpop")
        gate = Gate("v")
        first = lonely.start(lonely.a, gate)
        assert gate.began.wait(TIMEOUT)
        leases = leases_of(lonely.b)
        ask, asked = leases.ask, []
        monkeypatch.setattr(leases, "ask", lambda *args, **options: asked.append(args) or ask(*args, **options))
        second = lonely.start(lonely.b, lambda: "mine", max_wait=3600)
        try:
            assert second.result(TIMEOUT).value == "mine"
        finally:
            gate.may_end.set()
        assert first.result(TIMEOUT).value == "mine"
        assert len(asked) == MAX_LOST + 1

    def test_waiting_ends_when_redis_is_frozen(self, lonely, redis_server):
        """... and when it stops answering: after a second and a socket timeout, not after max_wait."""
        gate = Gate("v")
        first = lonely.start(lonely.a, gate)
        assert gate.began.wait(TIMEOUT)
        second = lonely.start(lonely.b, lambda: "mine", max_wait=3600)
        waiting(lonely.b)
        redis_server.freeze()
        assert second.result(TIMEOUT).value == "mine"
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "v"

    def test_a_pause_of_the_server_shorter_than_the_lease_loses_nothing(self, lonely, redis_server):
        """The thread goes on renewing when Redis comes back."""
        gate = Gate("v")
        first = lonely.start(lonely.a, gate)
        assert gate.began.wait(TIMEOUT)
        errors = lambda: lonely.a.stats()["l2_errors"]  # noqa: E731
        redis_server.freeze()
        wait_until(errors, TIMEOUT, "a renewal that failed")
        redis_server.thaw()
        gate.may_end.set()
        assert first.result(TIMEOUT).value == "v"
        wait_until(lambda: lonely.b.resolve("other", plan_of(lambda: 1)).value == 1, TIMEOUT)

    def test_every_call_ends_where_eight_threads_of_two_processes_meet_resets(self, lonely, redis_server):
        """While connections are cut all the time, every call returns a value that one of the loaders has made."""
        stop = threading.Event()
        client = redis_server.client()

        def cut() -> None:
            while not stop.is_set():
                client.client_kill_filter(_type="normal", skipme=True)
                stop.wait(0.02)

        def ask(number: int) -> set[Any]:
            manager = (lonely.a, lonely.b)[number % 2]
            return {
                manager.resolve(f"k{i % 7}", plan_of(lambda i=i: i % 7, life=0.05)).value - i % 7 for i in range(60)
            }

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            assert set().union(*lonely.pool.map(ask, range(8))) == {0}
        finally:
            stop.set()
            cutter.join()
