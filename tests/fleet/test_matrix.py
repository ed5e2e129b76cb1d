"""Every way to call a task x both sides x 3 result backends x 2 brokers: the caller of a cached one sees no difference.

A scenario runs once with the uncached task of a fleet, and once with each of the cached ones: the same body, called in
the same way. What it returns is what the caller sees, in wire form, and must be equal. What may differ is stated next
to each scenario, and exact: how often bodies are executed, and how many calls are answered where they are made, so that
no message is sent. Without a result backend, what executions end with is read from the control Redis.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest.mock import ANY

import celery.exceptions
import pytest
from celery import chain, chord, group, signals
from celery.result import EagerResult, GroupResult, ResultSet

from tests.fleet import matrix_app
from tests.fleet.fleets import MODULE, TIMEOUT, Fleet, running_fleet
from tests.fleet.matrix_app import SIDES, Order, wire
from tests.support import logs, processes
from tests.support.scripts import run_python
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.redis,
    pytest.mark.timeout(120),
    # Celery's own: its result backend for Redis uses SETEX, which redis-py 8 deprecates.
    pytest.mark.filterwarnings("ignore:.*setex:DeprecationWarning"),
]

BACKENDS, BROKERS = ("redis", "rpc", "disabled"), ("redis", "rabbitmq")
LEASE = 0.5  # seconds: whoever takes over from a killed child waits for so long at most
FAST = 5.0  # seconds: well below single_flight_wait, which is what a call would wait for a lease that never ends


# ---- one fleet for each backend and broker ------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of one scenario."""

    seen: Any  # by the caller
    runs: int  # of bodies, in all processes
    sent: int  # messages, by this process
    answered: int  # calls, without a message


class MatrixFleet(Fleet):
    """A worker, and the test process as a caller that counts its messages."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        matrix_app.define(self.module)
        self.backend = "rpc" if self.settings["result_backend"] == "rpc://" else "redis"
        if self.settings["result_backend"] == "disabled://":
            self.backend = "disabled"
        self.sent: list[str] = []
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        # Before 5.7, Celery tells no object's method from another's, but for this.
        signals.before_task_publish.connect(self._on_publish, dispatch_uid=self.namespace)

    def _on_publish(self, sender: str, headers: Any = None, **_: Any) -> None:
        if sender != "matrix.die":
            self.sent.append(headers["id"])

    def outcome(self, side: str, name: str) -> Outcome:
        """Run a scenario with the tasks of one side, unless that was done before."""
        if (side, name) not in self.outcomes:
            sent, answered = len(self.sent), self.answered
            caller = Caller(self, side, name)
            seen = SCENARIOS[name].play(caller)
            self.outcomes[side, name] = Outcome(seen, caller.runs, len(self.sent) - sent, self.answered - answered)
        return self.outcomes[side, name]

    @property
    def answered(self) -> int:
        """How many calls of this process were answered without a message."""
        return self.cache.stats()["producer_hits"]


class Caller:
    """Calls the tasks of one side, and tells what can be seen."""

    def __init__(self, fleet: MatrixFleet, side: str, x: str) -> None:
        self.fleet, self.side, self.x = fleet, side, x
        self.app = fleet.app
        self.has_results = fleet.backend != "disabled"
        self.has_chords = fleet.backend == "redis"
        self.channel = f"{side}:{x}"  # of notes

    def __getattr__(self, name: str) -> Any:
        return self.app.tasks[f"{self.side}.{name}"]

    @property
    def runs(self) -> int:
        """Return how often bodies were executed for this scenario."""
        return self.fleet.runs(f"{self.side}:{self.x}")

    def see(self, result: Any, *, is_sent_by_worker: bool = False) -> Any:
        """Return a call's state and result."""
        if self.has_results or isinstance(result, EagerResult):
            value = result.get(timeout=TIMEOUT, propagate=False)
            return [result.state, wire(value)]
        # Who answers a call without a message leaves no trace where results have no place.
        is_answered = result.id not in self.fleet.sent and not is_sent_by_worker
        if is_answered or (is_sent_by_worker and self.side == "producer"):
            return ANY
        while (ended := self.end_of(result))[0] == "RETRY":
            pass
        return ended

    def see_again(self, result: Any) -> Any:
        """Return state and result of a call whose child is killed: Celery notes that when the next one exits."""
        ended = f"ended:{result.id}"
        while not self.fleet.counts.exists(ended):
            self.app.tasks["matrix.die"].delay()
            with contextlib.suppress(AssertionError):
                wait_until(lambda: self.fleet.counts.exists(ended), 0.4)
        return self.see(result)

    def end_of(self, result: Any) -> Any:
        """Return state and result of one more execution, as the worker knows them."""
        return self._pop(f"ended:{result.id}")

    def note(self) -> Any:
        """Return what the next callback was told."""
        return self._pop(f"seen:{self.channel}")

    def _pop(self, name: str) -> Any:
        return json.loads(wait_until(lambda: self.fleet.counts.lpop(name), TIMEOUT, name))

    def see_all(self, result: GroupResult) -> Any:
        """Return what each member of a group came to, and the whole."""
        each = [self.see_all(r) if isinstance(r, GroupResult) else self.see(r) for r in result.results]
        return [each, wire(result.get(timeout=TIMEOUT)), result.successful()] if self.has_results else each


@pytest.fixture(
    scope="module",
    params=[(backend, broker) for backend in BACKENDS for broker in BROKERS],
    ids="-".join,
)
def fleet(request) -> Iterator[MatrixFleet]:
    """A worker with two children."""
    backend, broker = request.param
    conf: dict[str, Any] = {} if backend == "redis" else {"result_backend": f"{backend}://"}
    if broker == "rabbitmq":
        conf["amqp_url"] = request.getfixturevalue("module_amqp_url")
    more = ["tests.fleet.matrix_app"]
    with running_fleet(
        kind=MatrixFleet,
        more_modules=more,
        mlcache_producer_budget=2.0,
        mlcache_single_flight_lease=LEASE,
        result_expires=60,
        worker_lost_wait=0.001,  # it is 10 s
        result_extended=True,
        **conf,
    ) as fleet:
        fleet.boot(args=["--prefetch-multiplier", "1"])
        yield fleet


# ---- the scenarios ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """How a task is called, and what that costs."""

    play: Callable[[Caller], Any]
    plain: int  # executions of the uncached task
    cached: int  # and of the cached one
    answered: int = 0  # calls that a producer answers
    needs_chords: bool = False  # without them, nothing at all is executed


SCENARIOS: dict[str, Scenario] = {}


def scenario(*, plain: int, cached: int, answered: int = 0, needs_chords: bool = False) -> Any:
    """Add a function to the scenarios."""

    def add(play: Callable[[Caller], Any]) -> Callable[[Caller], Any]:
        SCENARIOS[play.__name__] = Scenario(play, plain, cached, answered, needs_chords)
        return play

    return add


@scenario(plain=2, cached=1, answered=1)
def delay(c):
    """Twice the same, the second time from the cache."""
    return [c.see(c.echo.delay(c.x, 1)) for _ in range(2)]


@scenario(plain=3, cached=1, answered=2)
def apply_async(c):
    """Positional, by name, with an id of the caller's, and with an expiry."""
    first = c.see(c.echo.apply_async((c.x,), {"y": 2}))
    named = c.echo.apply_async([c.x, 2], task_id=f"{c.side}-{uuid.uuid4()}", priority=3)
    assert named.id.startswith(c.side)
    return [first, c.see(named), c.see(c.echo.apply_async(kwargs={"x": c.x, "y": 2}, expires=60))]


@scenario(plain=2, cached=1)
def countdown(c):
    """Later: what is cached when it is called may not be when it is executed."""
    return [c.see(c.echo.apply_async((c.x,), countdown=0.05)) for _ in range(2)]


@scenario(plain=2, cached=1)
def direct(c):
    """As a function."""
    return [wire(c.echo(c.x)) for _ in range(2)]


@scenario(plain=2, cached=1)
def apply(c):
    """In this process, as a task."""
    return [c.see(c.echo.apply((c.x,))) for _ in range(2)]


@scenario(plain=2, cached=1)
def eager(c):
    """In this process, because the settings say so."""
    c.app.conf.task_always_eager = True
    try:
        results = [c.echo.delay(c.x) for _ in range(2)]
    finally:
        c.app.conf.task_always_eager = False
    return [[type(result).__name__, c.see(result)] for result in results]


@scenario(plain=6, cached=3, answered=3)
def in_group(c):
    """As members of a group."""
    members = [c.echo.s(c.x, number) for number in range(3)]
    return [c.see_all(group(members)()) for _ in range(2)]


@scenario(plain=6, cached=3, answered=3)
def in_nested_group(c):
    """A group in a group."""
    inner = group(c.echo.s(c.x, 2), c.echo.s(c.x, 3))
    return [c.see_all(group(c.echo.s(c.x, 1), inner)()) for _ in range(2)]


@scenario(plain=6, cached=3, needs_chords=True)
def in_chord(c):
    """In the header and as the body; Celery refuses chords where the backend cannot count."""
    seen = []
    for _ in range(2):
        whole = chord([c.add.s(1, 2, c.x), c.add.s(3, 4, c.x)], c.total.s(c.x))
        if c.has_chords:
            result = whole()
            seen.append([c.see(result), c.see_all(result.parent)])
        else:
            with pytest.raises(NotImplementedError) as caught:
                whole()
            seen.append(wire(caught.value))
    return seen


@scenario(plain=8, cached=2)
def in_chain(c):
    """First, in the middle and last."""
    seen = []
    for _ in range(2):
        noted = (c.add.s(1, 2, c.x) | c.add.s(3, x=c.x) | c.app.tasks["matrix.note"].s(name=c.channel))()
        seen += [c.see(noted), c.note(), c.see(noted.parent, is_sent_by_worker=True), c.see(noted.parent.parent)]
        whole = chain(c.add.s(1, 2, c.x), c.add.s(3, x=c.x))()
        seen.append(c.see(whole, is_sent_by_worker=True))
    return seen


@scenario(plain=2, cached=1)
def link(c):
    """With a callback."""
    note = c.app.tasks["matrix.note"]
    return [[c.see(c.echo.apply_async((c.x,), link=note.s(name=c.channel))), c.note()] for _ in range(2)]


@scenario(plain=2, cached=2)
def link_error(c):
    """Failing, with an errback: no failure is cached."""
    note = c.app.tasks["matrix.note_error"]
    return [[c.see(c.fail.apply_async((c.x,), link_error=note.s(name=c.channel))), c.note()] for _ in range(2)]


@scenario(plain=3, cached=1)
def by_map(c):
    """As the task of a map."""
    return c.see(c.echo.map([c.x] * 3).delay())


@scenario(plain=3, cached=2)
def by_starmap(c):
    """As the task of a starmap."""
    return c.see(c.add.starmap([(1, 2, c.x), (3, 4, c.x), (1, 2, c.x)]).delay())


@scenario(plain=4, cached=1)
def by_chunks(c):
    """As the task of chunks, on two processes."""
    return c.see_all(c.add.chunks([(1, 2, c.x)] * 4, 2).apply_async())


@scenario(plain=2, cached=1, answered=1)
def immutable(c):
    """As an immutable signature."""
    return [c.see(c.echo.si(c.x).apply_async(("ignored",))) for _ in range(2)]


@scenario(plain=4, cached=3)
def replaced(c):
    """In the place of another task, which is itself never cached."""
    results = [c.replacing.delay(c.x) for _ in range(2)]
    if c.fleet.backend == "redis":
        return [c.see(result) for result in results]
    expected = SCENARIOS["replaced"]
    wait_until(lambda: c.runs == (expected.plain if c.side == "plain" else expected.cached), TIMEOUT)
    # With rpc, Celery sends the replacement's result to the process that has replaced: the caller never gets it.
    return [c.has_results and result.state for result in results]


@scenario(plain=3, cached=2, answered=1)
def retried(c):
    """Ending in a retry first."""
    return [c.see(c.retry.delay(c.x)) for _ in range(2)]


@scenario(plain=3, cached=2, answered=1)
def autoretried(c):
    """Failing first, and retried for it."""
    return [c.see(c.autoretry.delay(c.x)) for _ in range(2)]


@scenario(plain=3, cached=2, answered=1)
def ignored(c):
    """Raising Ignore first."""
    return [c.end_of(c.ignore.delay(c.x)), c.see(c.ignore.delay(c.x)), c.see(c.ignore.delay(c.x))]


@scenario(plain=3, cached=2, answered=1)
def rejected(c):
    """Raising Reject first."""
    return [c.end_of(c.reject.delay(c.x)), c.see(c.reject.delay(c.x)), c.see(c.reject.delay(c.x))]


@scenario(plain=5, cached=3, answered=1)
def redelivered(c):
    """Acknowledged late, in a child that is killed."""
    lost = [c.see_again(c.late.delay(c.x)), c.see(c.late.delay(c.x))]  # killed before there was a result
    return [lost, c.see_again(c.over.delay(c.x))]  # killed after: whoever gets it again needs not compute it again


@scenario(plain=3, cached=2, answered=1)
def soft_limit(c):
    """Meeting the soft time limit first."""
    first = c.see(c.limited.apply_async((c.x,), soft_time_limit=0.2))
    return [first, c.see(c.limited.delay(c.x)), c.see(c.limited.delay(c.x))]


@scenario(plain=3, cached=2, answered=1)
def hard_limit(c):
    """Meeting the hard time limit first: its lease holds up nobody for long."""
    result = c.limited.apply_async((c.x,), time_limit=0.2)
    if c.has_results:
        first = c.see(result)
    else:
        said = f"Hard time limit (0.2s) exceeded for {c.limited.name}[{result.id}]"
        first = wait_until(lambda: said in c.fleet.worker.log(), TIMEOUT, said)
    began = time.monotonic()
    second = c.see(c.limited.delay(c.x))
    assert time.monotonic() - began < FAST
    return [first, second, c.see(c.limited.delay(c.x))]


@scenario(plain=2, cached=1, answered=1)
def revoked(c):
    """Revoked before it is executed."""
    task_id = str(uuid.uuid4())
    (reply,) = c.app.control.revoke(task_id, reply=True, limit=1, timeout=TIMEOUT)
    assert "ok" in reply[c.fleet.worker.hostname]
    first = c.see(c.echo.apply_async((c.x,), task_id=task_id))
    return [first, c.see(c.echo.delay(c.x)), c.see(c.echo.delay(c.x))]


@scenario(plain=2, cached=1, answered=1)
def bind(c):
    """A bound task."""
    return [c.see(c.bound.delay(c.x)) for _ in range(2)]


@scenario(plain=2, cached=1, answered=1)
def pydantic(c):
    """A task that takes and returns models."""
    order: Any = Order(sku="a", amount=2)
    if celery.VERSION < (5, 7):  # only data could be sent
        order = order.model_dump()
    return [c.see(c.order.delay(order, x=c.x)) for _ in range(2)]


@scenario(plain=2, cached=1, answered=1)
def shared(c):
    """A task of every app."""
    return [c.see(c.shared.delay(c.x)) for _ in range(2)]


@scenario(plain=2, cached=1, answered=1)
def class_based(c):
    """A task that is a class."""
    return [c.see(c.Price.delay(c.x)) for _ in range(2)]


@scenario(plain=2, cached=1)
def send_task(c):
    """By name."""
    return [c.see(c.app.send_task(f"{c.side}.echo", (c.x,))) for _ in range(2)]


# What else a result is asked for.


@scenario(plain=2, cached=1, answered=1)
def details(c):
    """All that a result can be asked."""
    seen = []
    for _ in range(2):
        result = c.echo.delay(c.x, y=2)
        seen.append(c.see(result))
        if c.has_results:
            name = result.name and result.name.partition(".")[2]  # before 5.7, rpc:// does not tell it
            seen.append([name, result.args, result.kwargs, result.retries, result.children, result.parent])
            seen.append([type(result).__name__, type(result.date_done).__name__, result.ignored, result.ready()])
    return seen


@scenario(plain=2, cached=1, answered=1)
def stamped(c):
    """Stamped, which a result that is extended tells."""
    seen = []
    for _ in range(2):
        call = c.echo.s(c.x)
        call.stamp(tenant="a")
        result = call.apply_async()
        seen.append(c.see(result))
        if c.has_results:
            meta = c.app.backend.get_task_meta(result.id)
            seen.append([meta.get("stamped_headers"), meta.get("tenant")])
    return seen


@scenario(plain=2, cached=1, answered=1)
def forgotten(c):
    """A result that is forgotten after it was read."""
    seen = []
    for _ in range(2):
        result = c.echo.delay(c.x)
        seen.append(c.see(result))
        try:
            result.forget()
            seen.append(result.state)
        except NotImplementedError as exc:
            seen.append(wire(exc))
    return seen


@scenario(plain=2, cached=1, answered=1)
def then(c):
    """A callback in the calling process."""
    seen, told = [], []
    for number in range(2):
        result = c.echo.delay(c.x)
        result.then(lambda result: told.append(result.state))
        if c.has_results:  # whatever makes the consumer read tells of it, too
            wait_until(lambda n=number: _drain(c) or len(told) > n, TIMEOUT)
        seen.append(c.see(result))
    return [seen, told]


def _drain(c):
    with contextlib.suppress(TimeoutError):
        c.app.backend.result_consumer.drain_events(timeout=0.05)


@scenario(plain=2, cached=1, answered=1)
def elsewhere(c):
    """By its id, where it was not called."""
    seen = [c.see(c.echo.delay(c.x))]
    result = c.echo.delay(c.x)
    seen.append(c.see(result))
    with ThreadPoolExecutor(1) as another:  # with a backend of its own
        seen.append(another.submit(_find, c, result.id).result())
    return seen


def _find(c, task_id):
    try:
        return wire(c.app.AsyncResult(task_id).get(timeout=0.2))
    except (celery.exceptions.TimeoutError, NotImplementedError) as exc:  # rpc tells the caller only
        return wire(exc)
    finally:
        if c.fleet.backend == "rpc":
            c.app.backend.result_consumer.stop()


@scenario(plain=4, cached=2, answered=2)
def in_result_set(c):
    """In a result set."""
    seen = []
    for _ in range(2):
        results = ResultSet([c.echo.delay(c.x, number) for number in range(2)])
        seen.append([c.see(result) for result in results.results])
        if c.has_results:
            seen.append([wire(results.get(timeout=TIMEOUT)), wire(results.join(timeout=TIMEOUT)), results.successful()])
    return seen


@scenario(plain=2, cached=1, answered=1)
def ignoring_the_result(c):
    """Without a result."""
    seen = []
    for _ in range(2):
        result = c.echo.apply_async((c.x,), ignore_result=True)
        if result.id in c.fleet.sent:
            assert c.end_of(result)[0] == "SUCCESS"
        seen.append([result.ignored, c.has_results and [result.get(timeout=TIMEOUT), result.state]])
    return seen


@scenario(plain=0, cached=0)
def wrong_arguments(c):
    """With arguments that do not fit."""
    seen = []
    for args, kwargs in [((), {}), ((c.x, 1, 2), {}), ((c.x,), {"z": 1}), ("ab", {}), ((c.x,), [1])]:
        with pytest.raises((TypeError, ValueError)) as caught:
            c.echo.apply_async(args, kwargs)
        seen.append(wire(caught.value))
    return seen


@scenario(plain=6, cached=1)
def children(c):
    """By another task, whose children they are."""
    seen = []
    for number in (1, 2):
        result = c.family.delay(c.x)
        seen.append(c.see(result))
        if c.has_results:
            seen.append(len(result.children))
        if c.fleet.backend == "redis":
            seen.append([c.see(child) for child in result.children])
        wait_until(lambda n=number: c.runs == (3 * n if c.side == "plain" else 1), TIMEOUT)
    return seen


@pytest.mark.parametrize("side", SIDES[1:])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_caller_sees_no_difference(fleet, side, name):
    """Results, states, errors and callbacks are those of the uncached task; executions and messages are as stated."""
    expected = SCENARIOS[name]
    is_there = fleet.backend == "redis" or not expected.needs_chords
    plain, cached = fleet.outcome("plain", name), fleet.outcome(side, name)
    assert plain.seen == cached.seen
    assert [plain.runs, cached.runs] == ([expected.plain, expected.cached] if is_there else [0, 0])
    assert cached.answered == (expected.answered if side == "producer" else 0)
    assert cached.sent == plain.sent - cached.answered


# ---- what is no call of this process ------------------------------------------------------------------------------


def test_beat_sends_every_time(fleet, tmp_path):
    """What beat sends is a message each time, cached or not: what is cached is executed once."""
    schedule = {side: {"task": f"{side}.echo", "schedule": 0.1, "args": ["beat"]} for side in SIDES}
    settings = {**fleet.settings, "is_worker": True, "beat_schedule": schedule, "beat_uses_cache": True}
    command = [sys.executable, "-m", "celery", "-A", MODULE, "beat", "--max-interval", "1"]
    command += ["--schedule", str(tmp_path / "beat"), "--pidfile", ""]
    log = logs.new_log("beat", lambda: True)
    env = {**os.environ, "FLEET_SETTINGS": json.dumps(settings)}
    beat = processes.spawn(command, log=log, env=env, cwd=processes.ROOT)
    try:
        for side in SIDES:
            name = f"received:{side}.echo:beat"
            wait_until(lambda name=name: fleet.runs(name) > 2, TIMEOUT, f"{name} in {log.read_text()}")
    finally:
        processes.kill_group(beat)
    assert [fleet.runs("worker:beat"), fleet.runs("producer:beat")] == [1, 1]
    assert fleet.runs("plain:beat") > 2


def test_the_first_call_of_a_process_may_be_answered(fleet):
    """A process whose very first call is answered without a message can get the result."""
    Caller(fleet, "producer", "first").see(fleet.app.tasks["producer.echo"].delay("first"))
    code = """
        import json, sys
        from tests.fleet import matrix_app
        from tests.fleet.fleets import load_app
        home = load_app(json.loads(sys.argv[1]))
        matrix_app.define(home)
        result = home.app.tasks["producer.echo"].delay("first")
        value = result.get(timeout=20) if sys.argv[2] else None
        print(json.dumps([value, home.cache.stats()["producer_hits"]]))
        home.cache.close()
    """
    has_results = fleet.backend != "disabled"
    said = run_python(code, json.dumps(fleet.settings), "yes" if has_results else "")
    value = ["first", [0, 1.5, None], {"1": "é"}] if has_results else None
    assert json.loads(said) == [value, 1]
    assert fleet.runs("producer:first") == 1


# ---- calls that share one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", ["joint", "failing"])
def test_calls_share_one_that_is_under_way(fleet, x):
    """Where anybody can read results, the same call is sent once while it is under way, and anew when it has ended."""
    joint, caller = fleet.app.tasks["matrix.joint"], Caller(fleet, "matrix", x)
    is_shared = fleet.backend == "redis"
    before = len(fleet.sent)
    queued = [joint.delay(x) for _ in range(2)]
    wait_until(lambda: fleet.runs(f"joint:{x}"), TIMEOUT)
    results = [*queued, joint.delay(x)]
    assert len(fleet.sent) - before == len({result.id for result in results}) == (1 if is_shared else 3)
    fleet.counts.incr(f"runs:go:{x}")
    expected = ["SUCCESS", x] if x == "joint" else ["FAILURE", ["OopsError", [x]]]
    assert [caller.see(result) for result in results] == [expected] * 3
    later = joint.delay(x)
    assert later.id not in {result.id for result in results}
    assert caller.see(later) == expected
    if x == "joint":
        assert fleet.runs(f"joint:{x}") == 1


# ---- without L2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["freeze", "kill"])
def test_without_l2_calls_are_sent_and_executed(fault):
    """A producer whose L2 is frozen or gone sends its messages, and workers compute what they ask for."""
    with running_fleet(kind=MatrixFleet, more_modules=["tests.fleet.matrix_app"]) as fleet:
        fleet.boot()
        caller = Caller(fleet, "producer", "lost")
        first = caller.see(caller.echo.delay("lost"))
        getattr(fleet.l2, fault)()
        began = time.monotonic()
        results = [caller.echo.delay("lost") for _ in range(3)]
        assert time.monotonic() - began < FAST
        assert [caller.see(result) for result in results] == [first] * 3
        if fault == "freeze":
            fleet.l2.thaw()
