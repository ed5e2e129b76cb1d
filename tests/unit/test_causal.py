"""Causal tokens: what goes into a message and a stored result, what is heard, and what is never touched."""

from __future__ import annotations

import logging
import pickle
import uuid
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from celery import Celery, signals
from celery.app.task import Context
from celery.backends.base import DisabledBackend

from celery_mlcache import setup_cache
from celery_mlcache.errors import CacheClosedError, RemoteStoreError
from celery_mlcache.fleet import causal
from celery_mlcache.fleet.app import find_fleet

HEADER = causal.HEADER


class FakeCache:
    """Stands for a manager: its tokens are given, its barriers are noted, and nothing may be built."""

    def __init__(self, namespace, stamp=0, *, is_running=True):
        self.told = 0
        self.namespace, self.stamp, self.is_running = namespace, stamp, is_running
        self.latest = 900
        self.barriers = []
        self.fails = None

    def token(self):
        return self._token(self.stamp)

    def latest_token(self):
        return self._token(self.latest)

    def barrier(self, token):
        self.barriers.append(token)
        if self.fails:
            raise self.fails

    def release(self, timeout):
        self.is_running = False

    def _token(self, stamp):
        assert self.is_running, "asking a cache that was not used would start it"
        if self.fails:
            raise self.fails
        return f"{self.namespace}@{stamp}"


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No other test's apps, nor ours in theirs, and no warning given before."""
    monkeypatch.setattr(causal, "_warned", set())
    monkeypatch.setattr(causal, "_bearers", ())


def noop():
    """Do nothing."""


def make(namespace="shop", stamp=0, *, is_running=True, **conf):
    """Return an app whose cache is a fake one."""
    app = Celery(namespace, broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(conf)
    setup_cache(app, l2_enabled=False)
    find_fleet(app).cache = FakeCache(namespace, stamp, is_running=is_running)
    app.task(noop, name="noop", shared=False)
    return app


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app whose cache has seen stamp 7."""
    app = make(stamp=7)
    yield app
    app.close()


@pytest.fixture
def task_id() -> str:
    """An id that no other test has: Celery's memory backend is one for the process."""
    return uuid.uuid4().hex


def cache_of(app) -> FakeCache:
    """Return what stands in the place of the app's cache."""
    return find_fleet(app).cache


def sent(app, **options):
    """Return the headers of one published message."""
    seen = []

    def last(headers, **_):
        seen.append(dict(headers))

    signals.before_task_publish.connect(last)  # after the library's own
    try:
        app.send_task("noop", **options)
    finally:
        signals.before_task_publish.disconnect(last)
    return seen[0]


def arrive(app, headers, **request):
    """Run what a worker does before a task's code."""
    task = app.tasks["noop"]
    task.push_request(headers=headers, called_directly=False, **request)
    try:
        signals.task_prerun.send(sender=task, task_id="1", task=task, args=(), kwargs={})
    finally:
        task.pop_request()


class TestPublishing:
    def test_apps_of_one_namespace_tell_once(self, app, monkeypatch):
        """The newest of them; and no more than a reader takes, whatever the number of apps."""

        class Known:
            def __init__(self, token):
                self.token = lambda **_: token

        def told(tokens):
            bearers = [Known(token) for token in tokens]
            monkeypatch.setattr(causal, "_bearers", tuple(weakref.ref(each) for each in bearers))
            return causal.tell()

        assert sorted(told(["shop@7", "other@3", "shop@9", "shop@8", "", "empty@0"]).split()) == ["other@3", "shop@9"]
        many = told([f"{'n' * 90}{number}@{number + 1}" for number in range(60)])
        assert 1800 < len(many) <= causal.MAX_TEXT
        assert many.startswith(f"{'n' * 90}59@60 ")

    def test_a_running_cache_tells(self, app):
        """A message carries the newest stamp that its sender's cache has seen."""
        assert sent(app)[HEADER] == "shop@7"

    def test_by_name_and_by_task(self, app):
        """Whichever way a task is sent."""
        seen = []

        def last(headers, **_):
            seen.append(headers[HEADER])

        signals.before_task_publish.connect(last)
        task = app.tasks["noop"]
        task.delay()
        task.apply_async(headers={"mine": 1})
        task.s().apply_async()
        signals.before_task_publish.disconnect(last)
        assert seen == ["shop@7"] * 3

    @pytest.mark.parametrize("protocol", [1, 2])
    def test_the_users_headers_stay(self, app, protocol):
        """The token is added to headers of the user's, in both message protocols."""
        app.conf.task_protocol = protocol
        assert sent(app, headers={"mine": 1}).items() >= {"mine": 1, HEADER: "shop@7"}.items()

    def test_a_retry_carries_the_newer_token(self, app):
        """What came with the old message is replaced by what is newer, never by what is older."""
        assert sent(app, headers={HEADER: "shop@5"})[HEADER] == "shop@7"
        assert sent(app, headers={HEADER: "shop@8"})[HEADER] == "shop@8"

    def test_a_forwarded_message_keeps_the_tokens_of_others(self, app):
        """A namespace that is not ours is handed on."""
        assert set(sent(app, headers={HEADER: "other@5 shop@5"})[HEADER].split()) == {"other@5", "shop@7"}

    @pytest.mark.parametrize("given", ["", "garbage", "shop@", "@5", "x" * 5000, 5, b"shop@5", ["shop@9"], {}])
    def test_what_is_no_token_is_replaced(self, app, given):
        """A header that is no token does not survive."""
        assert sent(app, headers={HEADER: given})[HEADER] == "shop@7"

    def test_a_header_does_not_grow_without_end(self, app):
        """More namespaces than a header may hold are not handed on."""
        many = " ".join(f"namespace-{i}@{i}" for i in range(1000))[: causal.MAX_TEXT]
        assert len(sent(app, headers={HEADER: many})[HEADER]) <= causal.MAX_TEXT
        assert sent(app, headers={HEADER: many + " "})[HEADER] == "shop@7"

    def test_opting_out_of_a_call(self, app):
        """None in the headers keeps the token out of this message, and of its retries, whose headers they become."""
        assert sent(app, headers={HEADER: None, "mine": 1})[HEADER] is None

    def test_opting_out_of_an_app(self):
        """With the setting off nothing is sent, heard, or stored."""
        app = make(stamp=7, mlcache_causal_tokens=False)
        arrive(app, {HEADER: "shop@9"})
        assert HEADER not in sent(app)
        assert HEADER not in app.backend._get_result_meta(1, "SUCCESS", None, None)
        assert cache_of(app).barriers == []

    def test_without_invalidations_there_are_no_tokens(self):
        """Who has chosen an L1 without invalidations does not lose it to every message."""
        app = make(stamp=7, mlcache_cache_sync_enabled=False)
        arrive(app, {HEADER: "shop@9"})
        assert HEADER not in sent(app)
        assert cache_of(app).barriers == []

    def test_a_cache_that_was_not_used_is_not_asked(self):
        """A producer that never used its cache has nothing to tell, and asking does not start it."""
        assert HEADER not in sent(make(stamp=7, is_running=False))

    def test_a_cache_that_has_seen_nothing(self):
        """Stamp 0 is nothing to tell."""
        assert HEADER not in sent(make(stamp=0))

    def test_two_apps(self):
        """Celery names no app when it publishes: the tokens of all in the process travel, and each hears its own."""
        one, two = make("one", 7), make("two", 9)
        assert set(sent(one)[HEADER].split()) == set(sent(two)[HEADER].split()) == {"one@7", "two@9"}
        arrive(one, {HEADER: "one@3 two@4"})
        assert (cache_of(one).barriers, cache_of(two).barriers) == (["one@3"], ["two@4"])

    @pytest.mark.parametrize("error", [CacheClosedError("shop"), RemoteStoreError("get", "k")])
    def test_trouble_of_the_cache_does_not_stop_a_message(self, app, caplog, error):
        """A cache that cannot answer sends no token, says so once, and the message goes out."""
        cache_of(app).fails = error
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            assert HEADER not in sent(app)
            assert HEADER not in sent(app)
        # kombu 5.6 has something to say of memory:// too.
        assert [record.name for record in caplog.records].count("celery_mlcache") == 1


class TestHearing:
    def test_a_barrier_is_raised(self, app):
        """A task's token becomes a barrier before its code runs."""
        arrive(app, {HEADER: "shop@9", "mine": 1})
        assert cache_of(app).barriers == ["shop@9"]

    def test_as_an_attribute_of_the_request(self, app):
        """Message protocol 2 turns headers into attributes, whatever the user's header named "headers" holds."""
        arrive(app, "mine", **{HEADER: "shop@9"})
        assert cache_of(app).barriers == ["shop@9"]

    def test_eager_tasks_come_from_nowhere(self, app):
        """A task that is run in place hears nothing and tells nothing."""
        seen = []

        def eager():
            seen.append(1)

        app.task(eager, name="eager", shared=False)
        app.tasks["eager"].apply(headers={HEADER: "shop@9"})
        app.conf.task_always_eager = True
        app.tasks["eager"].apply_async(headers={HEADER: "shop@9"})
        assert seen == [1, 1]
        assert cache_of(app).barriers == []

    @pytest.mark.parametrize(
        "text",
        ["", " ", "garbage", "shop@", "@", "shop@-1", "shop@1e9", "shop@" + "9" * 40, "x" * 10**6, 5, b"", [], {}],
    )
    def test_malformed_tokens_are_ignored(self, app, caplog, text):
        """Whatever stands in the header, the task runs; it is said once."""
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            arrive(app, {HEADER: text})
            arrive(app, {HEADER: text})
        assert cache_of(app).barriers == []
        assert [record.message.partition(":")[0] for record in caplog.records] == ["a malformed token was ignored"]

    def test_foreign_tokens_are_ignored(self, app, caplog):
        """A token of another namespace is nobody's business here, and no trouble."""
        with caplog.at_level(logging.INFO, "celery_mlcache"):
            arrive(app, {HEADER: "shopping@9"})
        assert cache_of(app).barriers == []
        assert not caplog.records

    def test_trouble_of_the_cache_does_not_stop_a_task(self, app, caplog):
        """What a barrier raises is logged once."""
        cache_of(app).fails = CacheClosedError("shop")
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            arrive(app, {HEADER: "shop@9"})
        assert len(caplog.records) == 1

    @pytest.mark.parametrize("conf", [{"mlcache_l1_ttl": -1}, {"mlcache_redis_ssl_cert_reqs": "none"}])
    def test_settings_that_cannot_be_read(self, caplog, monkeypatch, conf):
        """Wrong settings of an app whose cache was not used stop no task and no result, and are read once.

        The same goes for settings with a warning, where warnings are errors, as they are in these tests.
        """
        app = make(is_running=False, **conf)
        assert app.conf.broker_url  # it is configured
        fleet, reads = find_fleet(app), []
        load = fleet._load
        monkeypatch.setattr(fleet, "_load", lambda: reads.append(1) or load())
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            for _ in range(3):
                causal.hear("shop@9")
        assert len(reads) == len(caplog.records) == 1
        setup_cache(app, l1_ttl=5, redis_ssl=True)  # mended, before it was used
        causal.hear("shop@9")
        assert sent(app)[HEADER] == "shop@9"

    def test_another_apps_token_settles_nothing(self):
        """Hearing a token does not read the settings of an app that is not configured yet, which may change or fail."""
        app = Celery("late", set_as_current=False)
        setup_cache(app)
        broken = Celery("broken", set_as_current=False)
        broken.config_from_object("no_such_module")
        setup_cache(broken)
        causal.hear("shop@9")
        app.conf.update(mlcache_cache_namespace="mine")
        assert find_fleet(app).config.cache_namespace == "mine"

    def test_nested_without_end(self):
        """What has no repr either is ignored."""
        text: list = []
        for _ in range(10**5):
            text = [text]
        causal.hear(text)

    def test_what_was_seen_before_a_fork_or_release_is_told(self):
        """A cache that is not in use any more, or not yet in this child, has seen what it saw."""
        app = make(is_running=False)
        cache_of(app).told = 5
        assert sent(app)[HEADER] == "shop@5"
        arrive(app, {HEADER: "shop@9"})
        assert sent(app)[HEADER] == "shop@9"

    def test_what_was_heard_before_the_first_use_is_told(self):
        """A process that has not used its cache hands on what it heard, without starting it, and tells it later."""
        app = make(is_running=False)
        for token in ("shop@9", "shop@8"):
            arrive(app, {HEADER: token})
        assert sent(app)[HEADER] == "shop@9"
        assert cache_of(app).barriers == []
        cache_of(app).is_running, cache_of(app).stamp = True, 12
        assert sent(app)[HEADER] == "shop@12"
        assert cache_of(app).barriers == ["shop@9"]


class TestResults:
    def test_there_and_back(self, app, task_id):
        """A stored result brings its writer's token, the caller hears it before it has the value, and never sees it."""
        app.backend.store_result(task_id, {"x": 1}, "SUCCESS")
        assert f'"{HEADER}": "shop@7"' in app.backend.get(app.backend.get_key_for_task(task_id))
        result = app.AsyncResult(task_id)
        assert result.get() == {"x": 1}
        assert cache_of(app).barriers == ["shop@7"]
        assert HEADER not in result._get_task_meta()

    @pytest.mark.parametrize("state", ["FAILURE", "RETRY", "STARTED", "PROGRESS"])
    def test_every_state(self, app, state, task_id):
        """Failures and progress too."""
        failure = ValueError("no") if state in {"FAILURE", "RETRY"} else {"done": 3}
        app.backend.store_result(task_id, failure, state)
        assert app.AsyncResult(task_id).state == state
        assert cache_of(app).barriers == ["shop@7"]

    def test_readers_without_the_library(self, app, task_id):
        """Whoever knows nothing of tokens reads the same result."""
        app.backend.store_result(task_id, [1, 2], "SUCCESS")
        raw = app.backend.get(app.backend.get_key_for_task(task_id))
        other = Celery("plain", backend="cache+memory://", set_as_current=False)
        assert other.backend.decode_result(raw)["result"] == [1, 2]
        assert cache_of(app).barriers == []

    def test_results_without_a_token(self, app, task_id):
        """A result of a worker without the library is a result."""
        other = Celery("plain", backend="cache+memory://", set_as_current=False)
        other.backend.store_result("plain-id", 5, "SUCCESS")
        app.backend.set(
            app.backend.get_key_for_task(task_id), other.backend.get(other.backend.get_key_for_task("plain-id"))
        )
        assert app.AsyncResult(task_id).get() == 5
        assert cache_of(app).barriers == []

    def test_a_file(self, app, tmp_path, task_id):
        """Any key-value backend will do."""
        app.conf.result_backend = f"file://{tmp_path}"
        app.backend.store_result(task_id, 1, "SUCCESS")
        assert app.AsyncResult(task_id).get() == 1
        assert cache_of(app).barriers == ["shop@7"]

    def test_every_thread_has_its_backend(self, app):
        """Celery makes a backend for each thread: each carries tokens, and only once."""
        import threading

        found = []
        thread = threading.Thread(target=lambda: found.append(app.backend))
        thread.start()
        thread.join()
        assert found[0] is not app.backend
        for backend in (found[0], app.backend, causal.carry(app.backend)):
            assert backend._get_result_meta(1, "SUCCESS", None, None)[HEADER] == "shop@7"

    def test_a_backend_made_before(self):
        """setup_cache() after the backend was first asked for."""
        app = Celery("early", backend="cache+memory://", set_as_current=False)
        early = app.backend
        setup_cache(app, l2_enabled=False)
        assert app.backend is early
        assert hasattr(early, causal._CARRIER)

    def test_pickles(self, app):
        """Apps and results that travel in pickles still do."""
        assert pickle.loads(pickle.dumps(app)).main == "shop"
        assert pickle.loads(pickle.dumps(app.backend)) is not None

    @pytest.mark.parametrize("kind", ["disabled", "foreign"])
    def test_backends_that_cannot_carry_are_left_alone(self, app, kind):
        """Fixed columns would lose the token: such a backend stores what it always did."""
        if kind == "disabled":
            backend = causal.carry(DisabledBackend(app))
        else:
            from celery.backends.base import BaseBackend

            backend = causal.carry(BaseBackend(app))
        assert HEADER not in backend._get_result_meta(1, "SUCCESS", None, None)
        assert backend.on_chord_part_return(SimpleNamespace(), "SUCCESS", 1) is None

    def test_rpc(self, app):
        """What ``rpc://`` sends tells both, whichever of its methods makes it: another one from Celery 5.7 on."""
        from celery.backends.rpc import RPCBackend

        meta = causal.carry(RPCBackend(app))._to_result("id", "SUCCESS", 1, None, Context(mlcache="l2"))
        assert (meta["task_id"], meta[HEADER], meta["mlcache"]) == ("id", "shop@7", "l2")

    @pytest.mark.parametrize("names", [(), ("on_chord_part_return",)])
    def test_a_backend_without_the_names_or_a_place_for_others_is_left_alone(self, names):
        """Such a backend works as before: nobody's task is lost for want of a token."""
        kind = type("Foreign", (), {"__slots__": (), **dict.fromkeys(names, len)})
        backend = kind()
        assert causal.carry(backend) is backend

    def test_celery_still_has_the_names_that_are_wrapped(self):
        """Results carry tokens by private names of Celery's: this fails with the release that drops one."""
        from celery.backends.base import Backend
        from celery.backends.redis import RedisBackend
        from celery.backends.rpc import RPCBackend

        for kind in (Backend, RedisBackend, RPCBackend):
            for name in ("_get_result_meta", "meta_from_decoded", "on_chord_part_return"):
                assert callable(getattr(kind, name))
        assert callable(Celery._get_backend)


class TestChords:
    def test_the_body_carries_the_counter_itself(self, app):
        """Whoever sends a chord's body asks what has been written by now, once for all of its messages."""
        found = []

        def last_member(*_, **__):
            found.extend(sent(app)[HEADER] for _ in range(2))
            cache_of(app).latest += 1
            found.append(sent(app)[HEADER])

        backend = app._get_backend()
        backend.__dict__.pop("on_chord_part_return")
        delattr(backend, causal._CARRIER)
        backend.on_chord_part_return = last_member
        causal.carry(backend).on_chord_part_return(None, "SUCCESS", 1)
        assert found == ["shop@900"] * 3
        assert sent(app)[HEADER] == "shop@7"

    def test_without_an_answer_the_body_carries_what_its_sender_knows(self, app, monkeypatch):
        """With ``strict`` and no answer from L2, the members' writes are not told of, but the sender's own are."""

        def latest_token():
            raise RemoteStoreError("read", "no answer")

        monkeypatch.setattr(cache_of(app), "latest_token", latest_token)
        with causal._joining():
            assert sent(app)[HEADER] == "shop@7"

    def test_a_polled_chord(self, app):
        """Where a task polls for the members' ends, its message to the body, but not to itself, does the same."""
        unlock = app.tasks["celery.chord_unlock"]
        from celery._state import _task_stack

        _task_stack.push(unlock)
        try:
            assert sent(app)[HEADER] == "shop@900"
            seen = []

            def last(headers, **_):
                seen.append(headers[HEADER])

            signals.before_task_publish.connect(last)
            unlock.delay("group", None)
            signals.before_task_publish.disconnect(last)
            assert seen == ["shop@7"]
        finally:
            _task_stack.pop()
