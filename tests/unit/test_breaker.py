"""The breaker's rules that the state machine does not reach: real threads, the callback, the clean path."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from celery_mlcache.breaker import CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class UntouchableLock:
    """Proves that a path takes no lock."""

    def __enter__(self) -> None:
        raise AssertionError("the lock was taken")

    def __exit__(self, *args: object) -> None:
        raise AssertionError("the lock was taken")


@pytest.fixture
def clock():
    """Time that stands still."""
    return Clock()


@pytest.fixture
def changes():
    """What on_change was told."""
    return []


@pytest.fixture
def breaker(clock, changes):
    """Opens after 2 failures, for 4 s."""
    return CircuitBreaker(
        threshold=2, reset=4.0, clock=clock, jitter=lambda: 0.5, on_change=lambda old, new: changes.append((old, new))
    )


@pytest.fixture
def elsewhere():
    """Run calls on one other thread."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda call: pool.submit(call).result(timeout=10)


def open_it(breaker):
    """Fail as often as it takes."""
    breaker.failure()
    breaker.failure()
    assert breaker.state == "open"


def test_closed_takes_no_lock(breaker):
    """A healthy call costs no lock."""
    breaker._lock = UntouchableLock()

    assert breaker.allow()
    breaker.success()
    breaker.proof_of_life()


def test_only_failures_in_a_row_open(breaker):
    """A success between two failures begins the count anew."""
    breaker.failure()
    breaker.success()
    breaker.failure()

    assert breaker.state == "closed"
    assert breaker.allow()


def test_open_refuses_until_the_reopen_time(breaker, clock):
    """An open breaker lets nobody through before its time, and one caller then."""
    open_it(breaker)

    clock.now += 3.999
    assert not breaker.allow()
    clock.now += 0.001
    assert breaker.allow()
    assert breaker.state == "half-open"
    assert not breaker.allow()


@pytest.mark.parametrize(("roll", "reopens_after"), [(0.0, 3.6), (1.0, 4.4)])
def test_jitter_moves_the_reopen_time_by_a_tenth(clock, roll, reopens_after):
    """The reopen time is at most 10 % shorter or longer than the reset period."""
    breaker = CircuitBreaker(threshold=2, reset=4.0, clock=clock, jitter=lambda: roll)
    open_it(breaker)

    clock.now += reopens_after - 0.001
    assert not breaker.allow()
    clock.now += 0.002
    assert breaker.allow()


def test_failed_probes_double_the_wait_up_to_eight_times(breaker, clock):
    """Each failed probe doubles the reset period, and never beyond 8 times; a good one begins anew."""
    open_it(breaker)
    for factor in (1, 2, 4, 8, 8):
        clock.now += 4.0 * factor - 0.001
        assert not breaker.allow()
        clock.now += 0.001
        assert breaker.allow()
        breaker.failure()
    assert breaker.opened_count == 1

    clock.now += 32.0
    assert breaker.allow()
    breaker.success()
    open_it(breaker)
    clock.now += 4.0
    assert breaker.allow()
    assert breaker.opened_count == 2


def test_late_success_does_not_close(breaker, clock, elsewhere):
    """A call that began before the breaker opened neither closes it nor speaks for the probe."""
    assert elsewhere(breaker.allow)
    open_it(breaker)

    elsewhere(breaker.success)
    assert breaker.state == "open"
    clock.now += 4.0
    assert breaker.allow()
    elsewhere(breaker.success)
    assert breaker.state == "half-open"
    breaker.success()
    assert breaker.state == "closed"


def test_late_failure_does_not_reopen(breaker, clock, elsewhere):
    """A call that began before the breaker opened does not fail the probe."""
    open_it(breaker)
    clock.now += 4.0
    assert breaker.allow()

    elsewhere(breaker.failure)
    assert breaker.state == "half-open"


def test_silent_probe_lapses(breaker, clock, elsewhere):
    """A probe whose thread was killed holds the breaker for one reset period, not for ever."""
    open_it(breaker)
    clock.now += 4.0
    assert elsewhere(breaker.allow)

    clock.now += 3.999
    assert not breaker.allow()
    clock.now += 0.001
    assert breaker.allow()
    elsewhere(breaker.success)
    assert breaker.state == "half-open"


def test_proof_of_life_lets_a_probe_go_at_once(breaker):
    """What has seen the server alive spares the waiting, but only the probe closes."""
    open_it(breaker)

    breaker.proof_of_life()
    assert breaker.state == "open"
    assert breaker.allow()
    breaker.proof_of_life()
    assert not breaker.allow()
    breaker.success()
    assert breaker.state == "closed"


def test_caller_that_looked_before_the_probe_succeeded_is_no_probe(breaker, clock, changes, elsewhere):
    """Who finds the breaker open, and closed when it has the lock, goes as anybody does while it is closed."""
    open_it(breaker)
    clock.now += 4.0
    assert elsewhere(breaker.allow)
    clock.now += 4.0

    class Interleaved:
        def __enter__(self):
            breaker._lock = lock
            elsewhere(breaker.success)
            lock.acquire()

        def __exit__(self, *args):
            lock.release()

    lock, breaker._lock = breaker._lock, Interleaved()
    assert breaker.allow()
    assert breaker.state == "closed"
    assert changes[-1] == ("half-open", "closed")


def test_changes_are_told_once_and_outside_the_lock(breaker, clock, changes):
    """Each change of state is told once, and whoever is told may use the breaker."""
    breaker._on_change = lambda old, new: (changes.append((old, new)), breaker.proof_of_life(), breaker.state)
    open_it(breaker)
    clock.now += 4.0
    breaker.allow()
    breaker.failure()
    clock.now += 8.0
    breaker.allow()
    breaker.success()
    breaker.success()

    assert changes == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ]


def test_half_open_lets_exactly_one_of_eight_threads_through(clock):
    """Of threads that ask at the same instant, one is the probe."""
    breaker = CircuitBreaker(threshold=1, reset=4.0, clock=clock, jitter=lambda: 0.5)
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait(timeout=10)
        return breaker.allow()

    with ThreadPoolExecutor(8) as pool:
        breaker.failure()
        for _ in range(50):
            clock.now += 100.0
            asked = [pool.submit(ask) for _ in range(8)]
            assert sum(a.result(timeout=10) for a in asked) == 1
            # The probe's thread says nothing: the next round finds it lapsed.
    assert breaker.opened_count == 1
