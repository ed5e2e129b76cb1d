"""Causal tokens over real workers: no task reads older than its sender saw, no caller older than the task wrote.

The reader of each test sits behind a proxy that holds everything Redis says to it for a while: its L1 has the old
value, and the message that would end it is on its way. A *hand-off* is: see that the reader answers the old value
from its L1; write; have the reader read at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.result import ResultSet

from celery_mlcache.fleet.causal import HEADER
from celery_mlcache.keys import parse_token
from tests.fleet.fleets import MODULE, TIMEOUT, Fleet, load_app, running_fleet
from tests.support import logs, processes
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.redis]

DELAY = 0.02  # seconds
COUNT = 100
WITHOUT = {HEADER: None}  # what a call opts out with


class Pair(Fleet):
    """A worker "readers" whose link to L2 is slow; perhaps another, "writers"; the test is the producer.

    Each takes tasks from the queue of its name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.link = Proxy(self.l2.port)
        self.link.delay(DELAY, "reply")

    def boot_as(self, queue: str, pool: str = "solo", *, link: Proxy | None = None) -> None:
        """Start a worker for a queue, with a link of its own to L2."""
        settings = {**self.settings, "is_worker": True}
        if link is not None:
            settings["mlcache_redis_url"] = link.url
        self.boot(pool, 1, env={"FLEET_SETTINGS": json.dumps(settings)}, args=["-Q", queue])

    def of(self, queue: str, act: str, *args: Any, module: ModuleType | None = None) -> Any:
        """Return the signature of a probe in that worker."""
        return (module or self.module).probe.si(act, *args).set(queue=queue)

    def ask(self, act: str, *args: Any, module: ModuleType | None = None, **options: Any) -> Any:
        """Have the reader do something; return its answer."""
        return self.of("readers", act, *args, module=module).apply_async(**options).get(timeout=TIMEOUT)

    def settle(self, key: str, value: Any) -> None:
        """See that the reader answers *value* from its L1."""
        wait_until(lambda: (a := self.ask("get", key, headers=WITHOUT))["l1_hits"] and a["answer"] == value, 10)

    def stale(self, count: int, hand_off: Callable[[str, int], Any]) -> int:
        """Return how many of *count* hand-offs read something else than what was written last."""
        key = uuid.uuid4().hex
        self.cache.set(key, -1)
        misled = 0
        for number in range(count):
            self.settle(key, number - 1)
            misled += hand_off(key, number) != number
        return misled

    def set_and_ask(self, key: str, number: int, **options: Any) -> Any:
        """The plainest hand-off."""
        self.cache.set(key, number)
        return self.ask("get", key, **options)["answer"]

    @contextlib.contextmanager
    def caller(self, **conf: Any) -> Iterator[ModuleType]:
        """Another producer in this process, with a cache whose link to L2 is slow."""
        settings = {**self.settings, **conf, "mlcache_redis_url": self.link.url}
        module = load_app(settings)
        try:
            yield module
        finally:
            module.cache.close()
            module.app.close()

    def close(self) -> None:
        """Stop everything that was started here."""
        self.link.delay(0)
        super().close()
        self.link.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """One reader and one writer over Redis."""
    with running_fleet(kind=Pair) as pair:
        pair.boot_as("readers", "prefork", link=pair.link)
        pair.boot_as("writers")
        yield pair


@pytest.fixture(autouse=True)
def _slow(request) -> None:
    """Each test begins with a slow link."""
    if "pair" in request.fixturenames:
        request.getfixturevalue("pair").link.delay(DELAY, "reply")


class TestTheRace:
    @pytest.mark.parametrize("delay", [0.0, DELAY], ids=["0ms", "20ms"])
    def test_a_task_never_reads_older_than_its_sender_wrote(self, pair, delay):
        """A task that is sent right after a set finds the new value, however slow its process's link to Redis is."""
        pair.link.delay(delay, "reply")
        assert pair.stale(COUNT, pair.set_and_ask) == 0

    def test_without_a_token_it_does(self, pair):
        """The experiment shows the race where a call opts out of tokens."""
        assert pair.stale(20, lambda *args: pair.set_and_ask(*args, headers=WITHOUT)) > 0

    def test_opting_out_outlives_a_retry(self, pair):
        """A call that goes without a token is retried without one."""
        options = {"queue": "writers", "headers": {**WITHOUT, "mine": 1}}
        answer = pair.module.hand_on.apply_async(("out", 1, "readers"), **options).get(timeout=TIMEOUT)
        assert answer["headers"].items() >= {HEADER: None, "mine": 1}.items()

    def test_a_delete(self, pair):
        """A deleted value is as old as an overwritten one."""
        pair.cache.set("gone", 1)
        for _ in range(10):
            pair.cache.set("gone", 1)
            pair.settle("gone", 1)
            pair.cache.delete("gone")
            assert pair.ask("get", "gone")["answer"] is None

    def test_a_cached_task(self, pair):
        """The barrier is raised before a cached task looks for its result: what was invalidated is run again."""
        for number in range(10):
            double = pair.double.s(7).set(queue="readers")
            wait_until(lambda double=double: double.delay().get(timeout=TIMEOUT) == 14)
            wait_until(lambda: pair.ask("call", 7, headers=WITHOUT)["l1_hits"] == 1)
            before = pair.runs("double:7")
            assert pair.double.cache.invalidate(7)
            assert double.delay().get(timeout=TIMEOUT) == 14
            assert pair.runs("double:7") == before + 1, number


class TestCanvas:
    """What a worker sends carries the worker's own token, and what it was told."""

    def test_chain(self, pair):
        """A later member never reads older than an earlier one wrote, in another worker."""

        def hand_off(key: str, number: int) -> Any:
            flow = chain(pair.of("writers", "set", key, number), pair.of("readers", "get", key))
            return flow.apply_async().get(timeout=TIMEOUT)["answer"]

        assert pair.stale(20, hand_off) == 0

    def test_a_link_that_only_passes_by(self, pair):
        """What a process has heard is handed on by it: the middle of a chain need not touch the cache, nor be told."""
        pair.boot_as("distant", link=(distant := Proxy(pair.l2.port)))
        distant.delay(0.15, "reply")

        def hand_off(key: str, number: int) -> Any:
            pair.cache.set(key, number)
            flow = chain(pair.of("distant", "threads"), pair.of("readers", "get", key))
            return flow.apply_async().get(timeout=TIMEOUT)["answer"]

        with distant:
            assert pair.stale(20, hand_off) == 0
            pair.stop(pair.workers.pop())

    def test_group(self, pair):
        """Every member of a group."""

        def hand_off(key: str, number: int) -> Any:
            pair.cache.set(key, number)
            members = group(pair.of("readers", "get", key) for _ in range(3))
            (answer,) = {each["answer"] for each in members.apply_async().get(timeout=TIMEOUT)}
            return answer

        assert pair.stale(4, hand_off) == 0

    def test_chord(self, pair):
        """A chord's body never reads older than any member wrote, though the process that sends it has not heard."""

        def hand_off(key: str, number: int) -> Any:
            name = uuid.uuid4().hex
            header = [
                pair.of("writers", "set_and_count", key, number, name),
                pair.of("readers", "wait_for", name),  # ends last, and so sends the body, from behind the slow link
            ]
            return chord(header, pair.of("readers", "get", key)).apply_async().get(timeout=TIMEOUT)["answer"]

        assert pair.stale(20, hand_off) == 0

    def test_link(self, pair):
        """Callbacks."""

        def hand_off(key: str, number: int) -> Any:
            callback = pair.of("readers", "get", key)
            frozen = callback.freeze()
            pair.of("writers", "set", key, number).apply_async(link=callback)
            return frozen.get(timeout=TIMEOUT)["answer"]

        assert pair.stale(10, hand_off) == 0

    def test_retry(self, pair):
        """A retry carries the token of the process that retries, in place of the one that came with the message."""

        def hand_off(key: str, number: int) -> Any:
            options = {"queue": "writers", "headers": {"mine": number}}
            found = pair.module.hand_on.apply_async((key, number, "readers"), **options).get(timeout=TIMEOUT)
            assert found["headers"]["mine"] == number
            return found["answer"]

        assert pair.stale(20, hand_off) == 0


class TestEveryWayToSend:
    def stamp(self, pair: Pair, headers: dict[str, Any]) -> int:
        """Return the stamp that arrived for this fleet's namespace."""
        (token,) = [each for each in headers[HEADER].split() if each.startswith(f"{pair.namespace}@")]
        return parse_token(token, pair.namespace)

    def test_headers_of_the_users(self, pair):
        """They arrive beside the token."""
        pair.cache.set("any", 1)
        headers = pair.ask("headers", headers={"mine": 1})["answer"]
        assert headers["mine"] == 1
        assert self.stamp(pair, headers) > 0

    def test_by_name(self, pair):
        """``send_task`` by a name."""

        def hand_off(key: str, number: int) -> Any:
            pair.cache.set(key, number)
            sent = pair.app.send_task(f"{MODULE}.probe", ("get", key), queue="readers")
            return sent.get(timeout=TIMEOUT)["answer"]

        assert pair.stale(10, hand_off) == 0

    def test_protocol_1(self, pair):
        """Message protocol 1 brings headers in another place."""
        with pair.caller(task_protocol=1) as caller:
            assert caller.app.conf.task_protocol == 1

            def hand_off(key: str, number: int) -> Any:
                pair.cache.set(key, number)  # over a fast link: the race is to be won by the reader
                return pair.ask("get", key, module=caller)["answer"]

            assert pair.stale(10, hand_off) == 0

    def test_a_producer_that_never_used_its_cache(self, pair):
        """It sends no token of its own namespace, and its cache is not started by sending, nor by a result."""
        with pair.caller(mlcache_cache_namespace=f"{pair.namespace}-unused") as caller:
            answer = pair.ask("headers", module=caller)
            assert "unused" not in answer["answer"].get(HEADER, "")
            assert not caller.cache.is_running

    @pytest.mark.parametrize("token", ["", "garbage", "@", "x@1", 7, [1], {"a": 1}, "fleet@" + "9" * 99])
    def test_whatever_stands_in_the_header(self, pair, token):
        """A token that is none breaks no task."""
        stranger = Celery("stranger", broker=pair.control.url, backend=pair.control.url, set_as_current=False)
        with contextlib.closing(stranger):
            with stranger.connection_for_write() as connection, stranger.amqp.Producer(connection) as producer:
                message = stranger.amqp.as_task_v2(task_id := uuid.uuid4().hex, f"{MODULE}.probe", ("headers",), {})
                headers = {**message.headers, HEADER: token}
                producer.publish(
                    message.body, headers=headers, **message.properties, routing_key="readers", serializer="json"
                )
            assert stranger.AsyncResult(task_id).get(timeout=TIMEOUT)["answer"] == {HEADER: token}

    def test_beat(self, pair, tmp_path):
        """A real beat process whose cache is in use tells what it has seen; one whose cache is not tells nothing."""
        for is_used in (True, False):
            name = f"beat-{is_used}"
            schedule = {
                "tick": {"task": f"{MODULE}.report", "schedule": 0.2, "args": [name], "options": {"queue": "writers"}}
            }
            settings = {**pair.settings, "beat_schedule": schedule, "beat_uses_cache": is_used}
            command = [sys.executable, "-m", "celery", "-A", MODULE, "beat", "--max-interval", "1"]
            command += ["--schedule", str(tmp_path / name), "--pidfile", ""]
            env = {**processes.os.environ, "FLEET_SETTINGS": json.dumps(settings)}
            log = logs.new_log("beat", lambda: True)
            beat = processes.spawn(command, log=log, env=env, cwd=processes.ROOT)
            try:
                wait_until(lambda name=name: pair.counts.get(f"report:{name}"), 15, f"{name} in {log.read_text()}")
            finally:
                processes.kill_group(beat)
            headers = json.loads(pair.counts.get(f"report:{name}"))
            assert (HEADER in headers) is is_used
            assert not is_used or self.stamp(pair, headers) > 0


class TestTheWayBack:
    """The caller has the old value in its L1, and its link is slow."""

    def misled(self, pair: Pair, caller: ModuleType, count: int, get: Callable[[Any], Any]) -> int:
        """Return how often of *count* the caller read something else than what the task that it waited for wrote."""
        key, misled = uuid.uuid4().hex, 0
        pair.cache.set(key, -1)
        for number in range(count):
            settle(caller.cache, key, number - 1)
            get(pair.of("writers", "set", key, number, module=caller))
            misled += caller.cache.get(key) != number
        return misled

    def test_get(self, pair):
        """``AsyncResult.get``."""
        with pair.caller() as caller:
            assert self.misled(pair, caller, COUNT, lambda task: task.delay().get(timeout=TIMEOUT)) == 0

    def test_without_a_token(self, pair):
        """The experiment shows the race where the app has no tokens."""
        with pair.caller(mlcache_causal_tokens=False) as caller:
            assert self.misled(pair, caller, 20, lambda task: task.delay().get(timeout=TIMEOUT)) > 0

    @pytest.mark.parametrize("way", ["group", "join", "poll", "other object", "chain", "failure", "then"])
    def test_every_way_to_take_a_result(self, pair, way):
        """ResultSet, join, polling for the state, another AsyncResult, a chain's end, a failure, a callback."""

        def get(task: Any) -> None:
            quiet = pair.of("writers", "threads", module=caller)
            if way == "group":
                group(task, quiet).apply_async().get(timeout=TIMEOUT)
            elif way == "join":
                ResultSet([task.delay(), quiet.delay()]).join(timeout=TIMEOUT)
            elif way == "poll":
                wait_until(task.delay().ready, TIMEOUT)
            elif way == "other object":
                wait_until(lambda: caller.app.AsyncResult(sent.id).successful(), TIMEOUT) if (
                    sent := task.delay()
                ) else 0
            elif way == "chain":
                chain(task, quiet).apply_async().get(timeout=TIMEOUT)
            elif way == "failure":
                failing = pair.of("writers", "set_and_fail", *task.args[1:], module=caller).delay()
                with pytest.raises(KeyError):
                    failing.get(timeout=TIMEOUT)
            else:
                sent = task.delay()
                ready: list[Any] = []
                sent.then(ready.append)
                sent.get(timeout=TIMEOUT)
                assert ready

        with pair.caller() as caller:
            assert self.misled(pair, caller, 4 if way == "group" else 10, get) == 0

    def test_what_was_heard_is_handed_on(self, pair):
        """A caller that never used its cache hands on what came with a result to the next task that it sends."""
        with pair.caller() as caller:

            def hand_off(key: str, number: int) -> Any:
                pair.of("writers", "set", key, number, module=caller).delay().get(timeout=TIMEOUT)
                pair.cache.release()  # the producer's own, which has heard as well
                return pair.ask("get", key, module=caller)["answer"]

            assert pair.stale(10, hand_off) == 0
            assert not caller.cache.is_running


def settle(cache: Any, key: str, value: Any) -> None:
    """See that *cache* answers *value* from its L1."""

    def answers() -> bool:
        before = cache.stats()["l1_hits"]
        return cache.get(key) == value and cache.stats()["l1_hits"] > before

    wait_until(answers, 10, f"{key} = {value} in L1")


def last_meta(pair: Pair) -> str:
    """Return what is stored of the last result."""
    sent = pair.of("readers", "set", "written", 1).apply_async()
    sent.get(timeout=TIMEOUT)
    return str(pair.counts.get(pair.app.backend.get_key_for_task(sent.id)))


class TestPools:
    @pytest.mark.parametrize("pool", ["solo", "threads", "gevent", "eventlet", "spawn"])
    def test_every_pool(self, pool):
        """The process that runs a task raises the barrier and sends its token back, whatever its pool.

        Prefork that forks is in every other test; this one spawns.
        """
        if pool in {"gevent", "eventlet"} and importlib.util.find_spec(pool) is None:
            pytest.skip(f"{pool} is not installed")
        conf = {"worker_pool_start_method": "spawn"} if pool == "spawn" else {}
        with running_fleet(kind=Pair, **conf) as pair:
            pair.boot_as("readers", "prefork" if pool == "spawn" else pool, link=pair.link)
            assert pair.stale(10, pair.set_and_ask) == 0
            assert pair.stale(10, lambda *args: pair.set_and_ask(*args, headers=WITHOUT)) > 0
            assert HEADER in last_meta(pair)


@pytest.mark.rabbitmq
def test_rabbitmq_and_rpc(module_amqp_url):
    """Both ways over RabbitMQ, with results as messages."""
    with running_fleet(kind=Pair, amqp_url=module_amqp_url, result_backend="rpc://") as pair:
        queue = pair.settings["task_default_queue"]
        pair.boot_as(queue, "prefork", link=pair.link)
        pair.of = lambda _queue, act, *args, module=None: (module or pair.module).probe.si(act, *args)
        assert pair.stale(10, pair.set_and_ask) == 0
        assert pair.stale(5, lambda *args: pair.set_and_ask(*args, headers=WITHOUT)) > 0
        back = TestTheWayBack()
        with pair.caller() as caller:
            assert back.misled(pair, caller, 10, lambda task: task.delay().get(timeout=TIMEOUT)) == 0
            quiet = pair.of("", "threads", module=caller)
            assert back.misled(pair, caller, 5, lambda task: group(task, quiet)().get(timeout=TIMEOUT)) == 0
        with pair.caller() as caller:  # once it has consumed results, rpc:// gives none to who only polls
            assert back.misled(pair, caller, 5, lambda task: wait_until(task.delay().ready, TIMEOUT)) == 0


def test_an_app_without_tokens():
    """With the setting off nothing is sent and nothing heard: the race is back."""
    with running_fleet(kind=Pair, mlcache_causal_tokens=False) as pair:
        pair.boot_as("readers", "prefork", link=pair.link)
        assert pair.namespace not in pair.ask("headers")["answer"].get(HEADER, "")
        assert pair.stale(10, pair.set_and_ask) > 0
