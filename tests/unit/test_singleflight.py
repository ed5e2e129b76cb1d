"""Single-flight: who leads, who waits, and that nobody waits in vain. Every interleaving is forced."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from celery_mlcache.singleflight import SingleFlight

LONG = 30.0  # longer than any test may take: who waits so long has been forgotten


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Killed(BaseException):
    """Stands for GreenletExit, SystemExit, KeyboardInterrupt."""


def always(flight):
    """Say that no invalidation has passed."""
    return True


def never(flight):
    """Say that an invalidation has passed."""
    return False


class Threads:
    """Runs every call on a thread that had no other, and keeps the thread: a flight knows its leader by it."""

    def __init__(self, stack) -> None:
        self._stack = stack

    def submit(self, call, *args):
        """Return the future of the call."""
        return self._stack.enter_context(ThreadPoolExecutor(1)).submit(call, *args)


@pytest.fixture
def pool():
    """Threads for the other callers."""
    with ExitStack() as stack:
        yield Threads(stack)


@pytest.fixture
def flights():
    """Patient flights; none may be left in the table."""
    flights = SingleFlight(max_wait=LONG, clock=time.monotonic)
    yield flights
    assert len(flights) == 0


class Followers:
    """An ``is_current`` that tells when so many have joined as followers."""

    def __init__(self, expected: int) -> None:
        self._joined = threading.Semaphore(0)
        self._expected = expected

    def __call__(self, flight):
        self._joined.release()
        return True

    def wait(self):
        """Return when all have joined."""
        for _ in range(self._expected):
            assert self._joined.acquire(timeout=10)


def load(flights, key, loader, is_current=always):
    """Do as the manager does; return the result and whether this caller loaded it."""
    flight, is_leader = flights.board(key, is_current)
    if not is_leader:
        return flight.result, False
    with flight:
        flight.land(loader())
    return flight.result, True


def test_eight_threads_one_loader_run(flights, pool):
    """Of eight that miss the same key at once, one loads and all get its result."""
    followers = Followers(7)
    barrier = threading.Barrier(8)
    result = object()

    def loader():
        followers.wait()
        return result

    def caller():
        barrier.wait(timeout=10)
        return load(flights, "k", loader, followers)

    answers = [f.result(timeout=10) for f in [pool.submit(caller) for _ in range(8)]]
    assert all(value is result for value, _ in answers)
    assert sum(did_load for _, did_load in answers) == 1


def test_keys_do_not_wait_for_one_another(flights, pool):
    """A flight holds up its own key only."""
    leader, _ = flights.join("a", always)

    with leader:
        assert pool.submit(load, flights, "b", lambda: 2).result(timeout=10) == (2, True)


def test_none_is_a_result(flights, pool):
    """A loader that returns None has landed."""
    leader, _ = flights.join("k", always)
    followers = Followers(1)
    follower = pool.submit(load, flights, "k", lambda: "again", followers)
    followers.wait()
    leader.land(None)

    assert follower.result(timeout=10) == (None, False)


@pytest.mark.parametrize("error", [ValueError, Killed])
def test_failed_leader_is_succeeded_by_a_follower(flights, pool, error):
    """When a loader raises or is killed, its error stays with it, and one follower loads for the rest."""
    followers = Followers(3)
    second_run = Followers(2)

    def fail():
        followers.wait()
        raise error

    def follow(flight):
        return (second_run if flight.owner != leader_thread else followers)(flight)

    def loader():
        second_run.wait()
        return "second"

    begun = threading.Event()
    leader_thread = 0

    def lead():
        nonlocal leader_thread
        leader_thread = threading.get_ident()
        flight, is_leader = flights.board("k", always)
        assert is_leader
        begun.set()
        with flight:
            fail()

    leader = pool.submit(lead)
    assert begun.wait(timeout=10)
    rest = [pool.submit(load, flights, "k", loader, follow) for _ in range(3)]

    assert isinstance(leader.exception(timeout=10), error)
    answers = [f.result(timeout=10) for f in rest]
    assert {value for value, _ in answers} == {"second"}
    assert sum(did_load for _, did_load in answers) == 1


def test_overtaken_flight_is_replaced(flights, pool):
    """Who asks after an invalidation gets a new loader run; who asked before gets the old one's result."""
    old, _ = flights.join("k", always)
    old.ticket = 1
    followers = Followers(1)
    before = pool.submit(load, flights, "k", None, followers)
    followers.wait()

    new, is_leader = pool.submit(flights.join, "k", lambda flight: flight.ticket != 1).result(timeout=10)
    assert is_leader
    assert new is not old
    old.land("old")
    assert before.result(timeout=10) == ("old", False)

    after = Followers(1)
    late = pool.submit(load, flights, "k", None, after)
    after.wait()
    new.land("new")
    assert late.result(timeout=10) == ("new", False)


def test_two_newcomers_replace_a_flight_once(flights, pool):
    """Of two that find the same flight overtaken, the later one follows the earlier one's new flight."""
    old, _ = flights.join("k", always)
    led = []

    def overtaken(flight):
        if flight is not old:
            return True
        if not led:  # the other newcomer is faster, just after we looked
            led.append(pool.submit(flights.join, "k", never).result(timeout=10))
        return False

    flight, is_leader = pool.submit(flights.join, "k", overtaken).result(timeout=10)
    assert (flight, is_leader) == (led[0][0], False)
    flight.land(None)
    old.abandon()


def test_flight_that_ends_while_it_is_judged(flights, pool):
    """A flight that lands while a newcomer finds it overtaken leaves the key to the newcomer."""
    old, _ = flights.join("k", always)

    def overtaken(flight):
        old.land("old")
        return False

    flight, is_leader = pool.submit(flights.join, "k", overtaken).result(timeout=10)
    assert is_leader
    assert pool.submit(flights.join, "k", always).result(timeout=10) == (flight, False)
    flight.land("new")


@pytest.mark.parametrize("when", ["before the event is made", "after the event is made"])
def test_landing_while_a_follower_lies_down_wakes_it(flights, pool, monkeypatch, when):
    """A flight that lands between a follower's look and its wait does not leave it waiting."""
    flight, _ = flights.join("k", always)
    event_of = flights.event_of

    def interleaved(flight):
        if when == "before the event is made":
            flight.land(1)
        event = event_of(flight)
        if when == "after the event is made":
            flight.land(1)
        return event

    monkeypatch.setattr(flights, "event_of", interleaved)
    assert pool.submit(flight.wait, LONG).result(timeout=10)


@pytest.mark.parametrize("end", ["land", "abandon"])
def test_flight_leaves_the_table_before_it_is_over(flights, monkeypatch, end):
    """Nobody can be woken by a flight and join the same one again."""
    flight, _ = flights.join("k", always)
    remove = flights.remove
    was_over = []
    monkeypatch.setattr(flights, "remove", lambda flight: (was_over.append(flight._is_over), remove(flight)))

    flight.land(1) if end == "land" else flight.abandon()
    assert was_over == [False]


def test_loader_may_ask_for_its_own_key(flights):
    """A loader that asks for its own key loads for itself instead of waiting for itself."""
    inner = []

    def loader():
        inner.append(load(flights, "k", lambda: "inner"))
        return "outer"

    assert load(flights, "k", loader) == ("outer", True)
    assert inner == [("inner", True)]


def test_crossing_loaders_end(pool):
    """Two loaders that ask for each other's key are held up for max_wait, not for ever."""
    flights = SingleFlight(max_wait=0.05, clock=time.monotonic)
    barrier = threading.Barrier(2)

    def caller(mine, other):
        def loader():
            barrier.wait(timeout=10)
            return load(flights, other, lambda: f"{other} by {mine}")[0]

        return load(flights, mine, loader)

    first, second = pool.submit(caller, "a", "b"), pool.submit(caller, "b", "a")
    assert first.result(timeout=10)[1]
    assert second.result(timeout=10)[1]
    assert len(flights) == 0


def test_follower_gives_up_after_max_wait(pool):
    """A follower whose leader takes too long loads for itself, and the leader's flight is not disturbed."""
    flights = SingleFlight(max_wait=0.02, clock=time.monotonic)
    leader, _ = flights.join("k", always)

    assert pool.submit(load, flights, "k", lambda: "own").result(timeout=10) == ("own", True)
    leader.land("late")
    assert leader.result == "late"
    assert len(flights) == 0


def test_patience_is_for_all_flights_together(pool):
    """A follower of one failing leader after the other waits for max_wait in all."""
    clock = Clock()
    flights = SingleFlight(max_wait=10.0, clock=clock)
    first, _ = flights.join("k", always)
    successor = []

    def follow(flight):
        if flight is first:
            clock.now += 6.0
            first.abandon()
            successor.append(pool.submit(flights.join, "k", always).result(timeout=10)[0])
        else:
            clock.now += 6.0
        return True

    flight, is_leader = pool.submit(flights.board, "k", follow).result(timeout=10)
    assert is_leader
    assert flight is not successor[0]
    assert clock.now == 1012.0, "asked again after its time was up"
    flight.abandon()
    successor[0].abandon()
    assert len(flights) == 0


def test_lost_leader_heals(pool):
    """The flight of a leader that was killed before it could abandon is joined no longer than max_wait."""
    clock = Clock()
    flights = SingleFlight(max_wait=10.0, clock=clock)
    for asker in (pool.submit, lambda call, *args: _Done(call(*args))):
        lost, _ = flights.join("k", always)
        clock.now += 10.0
        flight, is_leader = asker(flights.join, "k", always).result(timeout=10)
        assert is_leader
        flight.land(1)
        assert len(flights) == 0
        assert lost is not flight


class _Done:
    """A finished future: the lost leader's own thread asks again."""

    def __init__(self, result) -> None:
        self._result = result

    def result(self, timeout):
        return self._result


def test_nothing_is_left_after_a_hammer(flights, pool):
    """Whatever lands, fails, is replaced or is asked again from inside, the table is empty in the end."""
    barrier = threading.Barrier(8)

    def caller(seed):
        dice = random.Random(seed)

        def loader():
            if dice.random() < 0.2:
                raise ValueError
            return load(flights, f"inner{dice.randrange(3)}", lambda: 1, lambda flight: dice.random() < 0.7)

        barrier.wait(timeout=10)
        done = 0
        for _ in range(500):
            try:
                load(flights, f"k{dice.randrange(3)}", loader, lambda flight: dice.random() < 0.7)
            except ValueError:
                continue
            done += 1
        return done

    assert all(f.result(timeout=30) for f in [pool.submit(caller, seed) for seed in range(8)])


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import time, gevent
from gevent.event import Event
from celery_mlcache.singleflight import SingleFlight

def scenario(is_killed):
    flights = SingleFlight(max_wait=30.0, clock=time.monotonic)
    joined, runs = Event(), []

    def is_current(flight):
        joined.set()
        return True

    def caller():
        flight, is_leader = flights.board("k", is_current)
        if is_leader:
            with flight:
                runs.append(1)
                joined.wait()
                if is_killed and len(runs) == 1:
                    raise gevent.GreenletExit
                flight.land("landed")
        return flight.result

    first, second = gevent.spawn(caller), gevent.spawn(caller)
    gevent.joinall([first, second], timeout=10)
    assert second.value == "landed", second
    assert (len(runs), len(flights)) == (1 + is_killed, 0), (runs, flights)

scenario(False)
scenario(True)
"""


def test_greenlets_of_one_thread_wait_for_one_another():
    """Two greenlets on one key are two callers; a leader that is killed leaves the key to the other."""
    pytest.importorskip("gevent")
    done = subprocess.run([sys.executable, "-c", GREENLETS], check=False, timeout=30, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
