"""One execution in the fleet: real nodes, real children, and holders that die or stop at any moment."""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections.abc import Iterator

import pytest
from billiard.exceptions import WorkerLostError

from celery_mlcache import CallInProgressError
from celery_mlcache.entry import MISS
from tests.fleet.fleets import TIMEOUT, Fleet, running_fleet
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.redis]

LEASE = 0.5
KILLS, AT_ONCE = 50, 5
SEED = int(os.environ.get("MLCACHE_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Two nodes of two children."""
    with running_fleet(mlcache_single_flight_lease=LEASE, worker_prefetch_multiplier=1) as fleet:
        for _ in range(2):
            fleet.boot(concurrency=2)
        yield fleet


@pytest.fixture(scope="module")
def crowd() -> Iterator[Fleet]:
    """Two nodes of six children, to lose some."""
    with running_fleet(mlcache_single_flight_lease=LEASE, worker_prefetch_multiplier=1) as fleet:
        for _ in range(2):
            fleet.boot(concurrency=6)
        yield fleet


def holder_of(fleet: Fleet, x: str, number: int = 1) -> int:
    """Wait until a call is computed for the *number*-th time, and return the pid that does."""
    wait_until(lambda: fleet.counts.llen(f"holders:{x}") >= number, TIMEOUT, f"execution {number} of {x}")
    return int(fleet.counts.lindex(f"holders:{x}", number - 1))


def test_200_identical_calls_are_executed_once(fleet):
    """However many ask at once, on two nodes of two children, exactly one computes and all get its result."""
    x = uuid.uuid4().hex
    results = [fleet.module.hold.delay(x, 1.0) for _ in range(200)]
    assert [result.get(timeout=TIMEOUT) for result in results] == [1] * 200
    assert fleet.runs(f"start:{x}") == 1


@pytest.mark.timeout(240)
def test_a_killed_holder_is_taken_over_once(crowd):
    """A holder killed with SIGKILL at a random moment costs one more execution; nobody hangs or gets a wrong result."""
    rng = random.Random(SEED)
    outcomes = []
    for _ in range(KILLS // AT_ONCE):
        calls = [uuid.uuid4().hex for _ in range(AT_ONCE)]
        # Only who is killed is in no hurry.
        results = {x: [crowd.module.hold.delay(x, 60.0, 0.2) for _ in range(2)] for x in calls}
        moments = sorted((time.monotonic() + rng.uniform(0.0, 0.5), x, holder_of(crowd, x)) for x in calls)
        for moment, _, pid in moments:
            time.sleep(max(0.0, moment - time.monotonic()))
            os.kill(pid, signal.SIGKILL)
        outcomes += [(x, [result.get(timeout=TIMEOUT, propagate=False) for result in results[x]]) for x in calls]
    for x, answers in outcomes:
        told = f"seed {SEED}, {x}: {answers}"
        ends = crowd.runs(f"end:{x}")
        starts = crowd.runs(f"start:{x}")
        lost = [answer for answer in answers if isinstance(answer, WorkerLostError)]
        assert [answer for answer in answers if answer not in lost] == [2] * (2 - len(lost)), told
        assert (starts, ends, len(lost)) == (2, 1, 1), told


@pytest.mark.timeout(90)
def test_a_holder_that_was_paused_does_not_overwrite(fleet):
    """A holder stopped past its lease is taken over; when it goes on, its result is not stored over what came after.

    Not even where that has come to its end meanwhile.
    """
    x = uuid.uuid4().hex
    first = fleet.module.brief.delay(x, 0.3)
    pid = holder_of(fleet, x)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert fleet.module.brief.delay(x, 0.3).get(timeout=TIMEOUT) == 2
        wait_until(lambda: fleet.module.brief.cache.get(x, 0.3) is MISS, 10, "the end of the second result's life")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert first.get(timeout=TIMEOUT) == 1  # its own caller gets what it has computed
    assert fleet.module.brief.cache.get(x, 0.3) is MISS
    assert fleet.module.brief.delay(x, 0.3).get(timeout=TIMEOUT) == 3


def test_a_long_execution_keeps_its_lease(fleet):
    """What takes four times as long as a lease is renewed, and is executed once all the same."""
    x = uuid.uuid4().hex
    results = [fleet.module.hold.delay(x, 4 * LEASE) for _ in range(4)]
    assert [result.get(timeout=TIMEOUT) for result in results] == [1] * 4
    assert fleet.runs(f"start:{x}") == 1


def test_retry_in_place_of_waiting_holds_no_process(fleet):
    """With on_contention="retry" the other children are free for other tasks, and every call ends well."""
    x = uuid.uuid4().hex
    calls = [fleet.module.patient.delay(x, 20.0) for _ in range(8)]
    wait_until(lambda: fleet.runs(f"start:{x}"), TIMEOUT)
    wait_until(lambda: sum(call.state == "RETRY" for call in calls) == 7, TIMEOUT, "seven calls put off")
    free: set[int] = set()

    def all_others_answer() -> bool:
        # Not at one moment: a node of which one child computes may have taken two of three probes.
        probes = [fleet.module.probe.delay("stats") for _ in range(4)]
        free.update(probe.get(timeout=TIMEOUT)["pid"] for probe in probes)
        return len(free) == 3

    wait_until(all_others_answer, TIMEOUT, "answers of the other three")
    assert not any(call.ready() for call in calls)
    fleet.counts.incr(f"runs:go:{x}")
    assert [call.get(timeout=TIMEOUT) for call in calls] == [1] * 8
    assert fleet.runs(f"start:{x}") == 1


def test_raise_in_place_of_waiting(fleet):
    """With on_contention="raise" a call fails at once while the same is computed, and says who does."""
    x = uuid.uuid4().hex
    first = fleet.module.hasty.delay(x, 20.0)
    wait_until(lambda: fleet.runs(f"start:{x}"), TIMEOUT)
    with pytest.raises(CallInProgressError, match="is being computed by"):
        fleet.module.hasty.delay(x, 20.0).get(timeout=TIMEOUT)
    fleet.counts.incr(f"runs:go:{x}")
    assert first.get(timeout=TIMEOUT) == 1
    assert fleet.module.hasty.delay(x, 20.0).get(timeout=TIMEOUT) == 1


def test_nested_calls_do_not_wait_for_their_own_ancestor(fleet):
    """A task that waits for another which makes the same call gets on, far sooner than max_wait: no deadlock."""
    x = uuid.uuid4().hex
    began = time.monotonic()
    assert fleet.module.outer.delay(x, 1).get(timeout=TIMEOUT) in {0, -1}
    assert fleet.runs(f"outer:{x}:1") == 2
    assert time.monotonic() - began < 8  # single_flight_wait is 10 s


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_other_pools_share_and_renew_too(pool):
    """A node of threads or greenlets and one of processes execute once together, and keep their leases."""
    with running_fleet(mlcache_single_flight_lease=LEASE, worker_prefetch_multiplier=1) as fleet:
        fleet.boot(pool=pool, concurrency=8)
        fleet.boot(concurrency=2)
        x = uuid.uuid4().hex
        results = [fleet.module.hold.delay(x, 3 * LEASE) for _ in range(10)]
        assert [result.get(timeout=TIMEOUT) for result in results] == [1] * 10
        assert fleet.runs(f"start:{x}") == 1
