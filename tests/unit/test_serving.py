"""How one call of a cached task is answered, without L2: options at work, modes, signals, and what goes wrong."""

from __future__ import annotations

import enum
import itertools
import logging
import math
import re
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import pytest
from celery import Celery, _state, chain, group
from celery import signals as celery_signals
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from kombu.utils import json as wire

from celery_mlcache import CachedTask, cached_task, setup_cache
from celery_mlcache.entry import MISS
from celery_mlcache.errors import CacheClosedError, CallInProgressError, NotCachedError, SerializationError
from celery_mlcache.fleet import modes, refreshing, serving, signals
from celery_mlcache.fleet.record import Record, unpack


class NotFoundError(Exception):
    def __init__(self, sku):
        super().__init__(f"no {sku}")
        self.sku = sku


class GoneError(NotFoundError):
    pass


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class Size(str, enum.Enum):  # noqa: UP042 - its text is not its value, unlike a StrEnum's
    LARGE = "l"


@pytest.fixture(autouse=True)
def _no_shared_leftovers(monkeypatch):
    """What a test shares with every app is gone after it."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))


@pytest.fixture
def app():
    """An app with a cache in memory: no Redis, no broker outside of this process."""
    app = Celery(f"s{uuid.uuid4().hex[:8]}", broker="memory://", backend="cache+memory://", set_as_current=False)
    setup_cache(app, l2_enabled=False)
    app.conf.task_always_eager = True
    app.conf.task_eager_propagates = True
    yield app
    app.mlcache.close()
    app.close()


@pytest.fixture
def told():
    """What the cache's signals have told: (name, sender, arguments)."""
    told = []
    handlers = []
    for name in ("cache_hit", "cache_miss", "cache_stale", "cache_error"):

        def handler(sender, signal, name=name, **what):
            told.append((name, sender.name, what))

        getattr(signals, name).connect(handler, weak=False)
        handlers.append((name, handler))
    yield told
    for name, handler in handlers:
        getattr(signals, name).disconnect(handler)


def counting(app, answer=lambda n: n, **options):
    """Return a task that calls *answer* with the number of its run."""
    numbers = itertools.count(1)

    @cached_task(app=app, name=f"t.{uuid.uuid4().hex[:6]}", **options)
    def task(x=0, **more):
        return answer(next(numbers))

    return task


def stored(task, *args, **kwargs):
    """Return the record of a call as it is stored."""
    return unpack(task.cache.manager.get(task.cache.key(*args, **kwargs)))


class TestLife:
    @pytest.mark.parametrize(
        ("ttl", "life"),
        [
            (5, 5.0),
            (timedelta(minutes=2), 120.0),
            (lambda n: n * 10, 10.0),
            (lambda n: timedelta(hours=1), 3600.0),
            (lambda n: None, 3600.0),
            (None, 3600.0),
        ],
    )
    def test_ttl(self, app, ttl, life):
        """A time, or a function of the result; None is the cache's default."""
        task = counting(app, ttl=ttl)
        task()
        assert stored(task).life == life
        assert app.mlcache.ttl(task.cache.key()) <= life

    @pytest.mark.parametrize("ttl", [0, -1, 0.0, timedelta(0), timedelta(seconds=-5)])
    def test_a_result_that_is_not_to_live_is_not_cached(self, app, told, ttl):
        """A function that returns 0 or less says so, and it is no failure."""
        task = counting(app, ttl=lambda n: ttl)
        assert [task(), task()] == [1, 2]
        assert app.mlcache.stats()["hook_failures"] == 0
        assert [name for name, _, _ in told] == ["cache_miss"] * 2

    def test_jitter_takes_off(self, app, monkeypatch):
        """At most that part of a life is taken off, and nothing is added; the option wins over the setting."""
        for draw, life in ((0.0, 100.0), (0.5, 90.0), (math.nextafter(1.0, 0), 80.0)):
            monkeypatch.setattr(refreshing.random, "random", lambda draw=draw: draw)
            task = counting(app, ttl=100, jitter=0.2)
            task()
            assert stored(task).life == pytest.approx(life)
            assert app.mlcache.ttl(task.cache.key()) <= life

    def test_jitter_of_the_whole_life(self, app, monkeypatch):
        """Even then there is some life left."""
        monkeypatch.setattr(refreshing.random, "random", lambda: math.nextafter(1.0, 0))
        assert counting(app, ttl=1e-3, jitter=1)() == 1

    def test_errors_are_jittered_too(self, app, monkeypatch):
        """What ``negative`` caches ends at different times as well."""
        monkeypatch.setattr(refreshing.random, "random", lambda: 0.5)

        @cached_task(app=app, negative={NotFoundError: 10}, jitter=0.2)
        def find():
            raise NotFoundError("a")

        with pytest.raises(NotFoundError):
            find()
        assert stored(find).life == pytest.approx(9.0)


def boom(*_, **__):
    """Be a function that fails."""
    raise ZeroDivisionError("hook")


def boom_with(error):
    """Return a body that raises *error*."""

    def boom(*_):
        raise error

    return boom


class TestHooks:
    @pytest.mark.parametrize(
        "options",
        [
            {"ttl": boom},
            {"ttl": lambda n: "soon"},
            {"ttl": lambda n: float("nan")},
            {"ttl": lambda n: float("inf")},
            {"ttl": lambda n: True},
            {"cache_if": boom},
            {"tags": boom},
            {"tags": lambda args, result: "sku"},
            {"tags": lambda args, result: [7]},
            {"tags": lambda args, result: None},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_one_that_fails(self, app, told, caplog, options):
        """The result is returned and not cached; it is counted and told each time, and logged once for the task."""
        task = counting(app, **options)
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            assert [task(), task(), task(1)] == [1, 2, 3]
        assert app.mlcache.stats()["hook_failures"] == 3
        errors = [what for name, _, what in told if name == "cache_error"]
        assert [(what["what"], what["key"]) for what in errors[:2]] == [("hook", task.cache.key())] * 2
        assert all(isinstance(what["error"], Exception) for what in errors)
        assert [what["is_cached"] for name, _, what in told if name == "cache_miss"] == [False] * 3
        (logged,) = [
            each for each in caplog.records if each.message.startswith("an option of a cached task has raised")
        ]
        assert logged.task == task.name
        assert logged.message.startswith(f"an option of a cached task has raised ({next(iter(options))}): t.")

    def test_one_that_raises_the_same_each_time(self, app):
        """Nothing grows on it."""
        error = ZeroDivisionError()
        task = counting(app, cache_if=lambda n: boom_with(error)())
        assert [task(), task()] == [1, 2]
        assert error.__notes__ == ["in the cached task's option cache_if"]

    @pytest.mark.parametrize("notes", [[1], None, "text", ["for item %d"]], ids=repr)
    def test_one_whose_error_has_notes_already(self, app, caplog, notes):
        """Whatever they are: the result is returned, and it is logged once."""

        def hook(number):
            error = ZeroDivisionError()
            error.__notes__ = [note % number if isinstance(note, str) else note for note in notes] if notes else notes
            raise error

        task = counting(app, cache_if=hook)
        assert [task() for _ in range(5)] == [1, 2, 3, 4, 5]
        assert app.mlcache.stats()["hook_failures"] == 5
        assert len([record for record in caplog.records if "has raised" in record.getMessage()]) == 1

    def test_one_that_raises_what_takes_no_note(self, app):
        """It is told all the same, and ``set`` raises it as it is."""
        task = counting(app, cache_if=lambda n: boom_with(FrozenError(7))())
        assert task() == 1
        assert app.mlcache.stats()["hook_failures"] == 1
        with pytest.raises(FrozenError):
            task.cache.set(1)

    @pytest.mark.parametrize("error", [SoftTimeLimitExceeded(), Ignore(), KeyboardInterrupt(), SystemExit(3)])
    def test_interrupts_pass(self, app, error):
        """What is to end the task ends it also where it comes in a hook."""

        def hook(_):
            raise error

        with pytest.raises(type(error)):
            counting(app, cache_if=hook)()
        assert app.mlcache.stats()["hook_failures"] == 0

    def test_hooks_do_not_run_for_what_the_function_raises(self, app):
        """They are asked about results only, and never about a hit."""
        asked = []
        task = counting(app, cache_if=lambda n: asked.append(n) or True)
        assert [task(), task()] == [1, 1]
        assert asked == [1]

        failing = counting(app, boom, cache_if=asked.append)
        with pytest.raises(ZeroDivisionError):
            failing()
        assert asked == [1]


class TestWhatIsCached:
    def test_cache_if(self, app):
        """What it refuses is returned, and computed anew by the next call."""
        task = counting(app, cache_if=lambda n: n > 1)
        assert [task(), task(), task()] == [1, 2, 2]
        assert app.mlcache.stats()["hook_failures"] == 0

    @pytest.mark.parametrize(("cache_none", "runs"), [(True, 1), (False, 2)])
    def test_cache_none(self, app, cache_none, runs):
        """None is a result like any other, unless it is said not to be."""
        seen = []
        task = counting(app, seen.append, cache_none=cache_none)
        assert [task(), task()] == [None, None]
        assert len(seen) == runs

    def test_max_size(self, app, told):
        """A larger result is returned, not cached, and told."""
        task = counting(app, lambda n: "x" * 1000, max_size=500)
        assert [task(), task()] == ["x" * 1000] * 2
        errors = [(what["what"], str(what["error"])) for name, _, what in told if name == "cache_error"]
        assert len(errors) == app.mlcache.stats()["loads"] == 2
        assert errors[0] == errors[1]
        assert re.fullmatch(r"result: str takes 1\d\d\d bytes, max_size is 500", errors[0][1])

    def test_max_size_if_strict(self, app):
        """What is too large is no error of the task's, not even with ``strict``; what the codec refuses is one then."""
        setup_cache(app, l2_enabled=False, strict=True)
        task = counting(app, lambda n: "x" * 1000, max_size=500)
        assert [task(), task()] == ["x" * 1000] * 2
        assert app.mlcache.stats()["too_large"] == 2
        with pytest.raises(SerializationError):
            counting(app, lambda n: object(), max_size=500)()

    def test_max_size_is_no_obstacle_to_small_ones(self, app):
        """A result that is small enough is cached."""
        small = counting(app, lambda n: "x" * 10, max_size=500)
        assert small.cache.get() is MISS
        assert small() == small.cache.get() == "x" * 10

    def test_tags_from_the_result(self, app):
        """A function makes them of arguments and result; defaults are among the arguments."""
        seen = []

        @cached_task(app=app, tags=lambda args, result: seen.append(args) or [f"x:{args['x']}", f"r:{result}"])
        def task(x, y=2):
            return x + y

        assert task(1) == 3
        assert seen == [{"x": 1, "y": 2}]
        assert set(task.cache.explain(1).tags) == {f"task:{task.name}", "x:1", "r:3"}
        app.mlcache.invalidate_tags("r:3")
        assert task.cache.get(1) is MISS

    @pytest.mark.parametrize(
        "value",
        [(1, 2), [1, (2, (3,))], {1: 2}, {"a": {2: (1,)}}, Size.LARGE, [Size.LARGE], 1.0, True, None, "a b"],
        ids=repr,
    )
    def test_tags_are_those_of_the_message(self, app, value):
        """A direct call has the tags of the same call out of a message, so that both are invalidated by them."""
        task = counting(app, tags=["x:{x}"])
        (sent,) = wire.loads(wire.dumps([value]))
        assert task.cache.tags(value) == task.cache.tags(sent)
        assert task.cache.key(value) == task.cache.key(sent)
        assert task(value) == 1
        app.mlcache.invalidate_tags(task.cache.tags(sent)[1])
        assert task(sent) == 2

    def test_tags_take_what_is_inside_of_an_argument(self, app):
        """Items can be named, and they are those of the message."""
        task = counting(app, tags=["x:{x[0]}"])
        assert task.cache.tags(((1, 2), 3))[1:] == task.cache.tags([[1, 2], 3])[1:] == ("x:[1, 2]",)

    def test_key_ignore_version_vary(self, app):
        """They reach the key through the decorator."""
        tenant = ["eu"]

        def body(sku, trace=None):
            return sku

        def make(**options):
            return cached_task(app=app, name=f"t.{uuid.uuid4().hex[:6]}", **options)(body)

        ignoring = make(ignore=["trace"])
        assert ignoring.cache.key("a", trace=1) == ignoring.cache.key("a")
        named = make(key="price:{sku}")
        assert "price:a" in named.cache.key("a", trace=1)
        assert named.cache.key("a") == named.cache.key("a", trace=2) != named.cache.key("b")
        assert len({make(version=1).cache.key("a")[-20:], make(version=2).cache.key("a")[-20:]}) == 2
        assert make(version="source").cache.key("a")
        varying = make(vary={"tenant": lambda: tenant[0]})
        before = varying.cache.key("a")
        tenant[0] = "us"
        assert varying.cache.key("a") != before

    def test_a_hit_shares_nothing(self, app):
        """Who changes what a hit returned does not change the cache; a tuple stays a tuple."""
        task = counting(app, lambda n: ({"rows": [n]}, (1, (2,))))
        first = task()
        first[0]["rows"].append("mine")
        second = task()
        second[0]["rows"].append("mine too")
        assert task() == ({"rows": [1]}, (1, (2,)))
        assert second[1] is not None
        assert type(second) is type(second[1]) is tuple

    def test_what_the_codec_refuses(self, app, told):
        """It is returned each time, and told as trouble with a value."""
        task = counting(app, lambda n: {"rows": [n, object()]})
        assert task() != task()
        errors = [(what["what"], str(what["error"])) for name, _, what in told if name == "cache_error"]
        assert errors == [("value", "result['rows'][1]: object cannot be stored without altering it")] * 2

    @pytest.mark.parametrize(
        ("answer", "options", "why"),
        [
            (lambda n: {"rows": [object()]}, {}, "result['rows'][0]: object cannot be stored without altering it"),
            (lambda n: object(), {}, "result: object cannot be stored without altering it"),
            (lambda n: "x" * 1000, {"max_size": 500}, r"result: str takes \d+ bytes, max_size is 500"),
            (lambda n: "x" * 2000, {}, r"result: str takes \d+ bytes"),
            (
                boom_with(UnicodeDecodeError("utf-8", b"x", 0, 1, "y")),
                {},
                "exception: UnicodeDecodeError would come back",
            ),
            (boom_with(OSError(object())), {}, "exception.args[0]: object cannot be stored"),
            (boom_with(NotFoundError(object())), {}, "exception.__dict__['sku']: object cannot be stored"),
        ],
    )
    def test_what_cannot_be_stored_is_logged_once_for_each_task(self, app, caplog, answer, options, why):
        """Under the task's name, in words of its result: who is to repair it must find it."""
        setup_cache(app, l2_enabled=False, max_value_size=1500)
        tasks = [counting(app, answer, negative={Exception: 30}, **options) for _ in range(2)]
        for task in [*tasks, *tasks]:
            with suppress(Exception):
                task()
        texts = [record.getMessage() for record in caplog.records if record.name == "celery_mlcache"]
        assert len(texts) == 2
        for task, text in zip(tasks, texts, strict=True):
            pattern = why if "\\d" in why else re.escape(why)
            assert re.match(rf"an outcome cannot be cached: {re.escape(task.name)}: {pattern}", text), text

    def test_what_a_task_tells_leaves_the_rest_its_own_line(self, app, caplog):
        """A value of another's loader is logged too, after a task's."""
        counting(app, lambda n: object())()
        for _ in range(2):
            app.mlcache.get_or_set("k", object)
        texts = [record.getMessage() for record in caplog.records if "cannot be cached" in record.getMessage()]
        assert [text.partition(":")[0] for text in texts] == [
            "an outcome cannot be cached",
            "a loaded value cannot be cached",
        ]
        assert texts[1] == "a loaded value cannot be cached: k: value: object cannot be stored without altering it"

    def test_an_exception_is_told_once_and_not_where_nothing_is_kept(self, app, told):
        """Of the last attempt, and of no cache that is switched off."""
        error = UnicodeDecodeError("utf-8", b"x", 0, 1, "y")
        more = {"negative": {Exception: 30}, "autoretry_for": (ValueError,), "max_retries": 2, "default_retry_delay": 0}
        app.conf.task_eager_propagates = False
        assert counting(app, boom_with(error), **more).apply().state == "FAILURE"
        assert [what["what"] for name, _, what in told if name == "cache_error"] == ["value"]
        del told[:]
        with Celery(f"s{uuid.uuid4().hex[:8]}", set_as_current=False) as off:
            setup_cache(off, cache_enabled=False)
            with pytest.raises(UnicodeDecodeError):
                counting(off, boom_with(error), negative={Exception: 30})()
            off.mlcache.close()
        assert [name for name, _, _ in told] == ["cache_miss"]

    def test_set_says_it_too(self, app):
        """What is given to ``set`` is checked as a result is, and named as the caller knows it."""
        task = counting(app, lambda n: n)
        with pytest.raises(SerializationError, match=r"^result\['a'\]: object cannot be stored"):
            task.cache.set({"a": object()})

    def test_strict(self, app, told):
        """There it is an error of the task's, in the same words; one that the body raises is its own."""
        setup_cache(app, l2_enabled=False, strict=True)
        with pytest.raises(SerializationError, match=r"^result\['a'\]: object cannot be stored"):
            counting(app, lambda n: {"a": object()})()
        own = SerializationError("value[2]", "mine", "is my own")
        with pytest.raises(SerializationError) as info:
            counting(app, boom_with(own))()
        assert info.value is own
        assert [name for name, _, _ in told] == ["cache_miss"]

    def test_a_cache_that_is_switched_off_is_no_trouble(self, told):
        """Then every call runs, and nothing is complained about."""
        off = Celery("off", broker="memory://", set_as_current=False)
        setup_cache(off, cache_enabled=False)
        task = counting(off, early=True, stale_ttl=5)
        assert [task(), task()] == [1, 2]
        assert [name for name, _, _ in told] == ["cache_miss"] * 2
        assert task.cache.explain().why == "the cache is switched off"
        off.mlcache.close()
        off.close()


class TestNegative:
    def task(self, app, errors, **options):
        """Return a task that raises these, one after the other, and then returns "fine"."""
        left = iter(errors)

        def answer(n):
            for error in left:
                raise error
            return "fine"

        return counting(app, answer, **options)

    def test_raised_again(self, app, told):
        """The same type, args and attributes, in an object of its own, without running the function."""
        error = GoneError("a")
        task = self.task(app, [error], negative={NotFoundError: 30, GoneError: 20, Exception: 10})
        caught = []
        for _ in range(3):
            with pytest.raises(GoneError) as info:
                task()
            caught.append(info.value)
        assert caught[0] is error
        assert caught[1] is not caught[2]
        assert all((e.args, e.sku) == (error.args, "a") for e in caught)
        assert stored(task).life == 20
        assert app.mlcache.stats()["negative_hits"] == 2
        assert [name for name, _, _ in told] == ["cache_miss", "cache_hit", "cache_hit"]
        assert told[0][2]["is_cached"]
        with pytest.raises(GoneError):
            task.cache.get()
        with pytest.raises(GoneError):
            task.apply(mlcache="only")

    def test_other_errors_are_not(self, app):
        """What is not named is raised and forgotten."""
        task = self.task(app, [KeyError()], negative={NotFoundError: 30})
        with pytest.raises(KeyError):
            task()
        assert task() == "fine"

    @pytest.mark.parametrize(
        "error",
        [
            *(Retry(), Ignore(), Reject("no"), SoftTimeLimitExceeded(), SystemExit(3)),
            *(CallInProgressError("k", "somebody", 1.0), NotCachedError("t", "k", "no")),
        ],
        ids=lambda e: type(e).__name__,
    )
    def test_never_what_says_nothing_of_the_call(self, app, error):
        """What tells the worker what to do, and what the cache says of a call inside, though Exception is named."""
        task = self.task(app, [error], negative={Exception: 30})
        with pytest.raises(type(error)):
            task()
        assert task() == "fine"

    def test_one_that_would_come_back_different(self, app):
        """It is raised and not cached."""
        task = self.task(app, [ImportError("x", name="y")], negative={Exception: 30})
        with pytest.raises(ImportError):
            task()
        assert task() == "fine"

    def test_one_that_the_codec_refuses(self, app, told):
        """It is raised and not cached, and told."""
        error = NotFoundError(object())
        task = self.task(app, [error], negative={Exception: 30})
        with pytest.raises(NotFoundError) as info:
            task()
        assert info.value is error
        assert [(name, what.get("what")) for name, _, what in told] == [("cache_error", "value"), ("cache_miss", None)]
        assert task() == "fine"

    def test_a_retry_overcomes_it(self, app):
        """A retry computes, where a first execution finds the error; its result is what is cached then."""
        task = self.task(app, [NotFoundError("a")], negative={NotFoundError: 30})
        for _ in range(2):
            with pytest.raises(NotFoundError):
                task.apply()
        assert task.apply(retries=1).get() == "fine"
        assert task() == "fine"

    def test_autoretry_with_negative(self, app):
        """Celery's autoretry sees the error, and the retry runs the function."""
        app.conf.task_eager_propagates = False
        task = self.task(
            app,
            [NotFoundError("a"), NotFoundError("b")],
            negative={NotFoundError: 30},
            autoretry_for=(NotFoundError,),
            retry_backoff=False,
            max_retries=3,
            default_retry_delay=0,
        )
        assert task.apply(throw=False).get() == "fine"
        assert app.mlcache.stats()["loads"] == 3

    def test_a_refresh_replaces_it(self, app):
        """refresh() computes, and its result takes the error's place."""
        task = self.task(app, [NotFoundError("a")], negative={NotFoundError: 30})
        with pytest.raises(NotFoundError):
            task()
        assert task.cache.refresh() == "fine" == task()


class TestModes:
    def test_use(self, app):
        """The default: what is cached is returned."""
        task = counting(app)
        assert [task.apply(mlcache="use").get(), task.apply().get()] == [1, 1]

    @pytest.mark.parametrize(
        "way", ["apply", "apply_async", "set", "sig.apply", "sig.apply_async", "header", "stamp", "short"]
    )
    def test_ways_to_say_it(self, app, way):
        """A mode is said to apply(), apply_async(), in a signature, as a header or as a stamp."""
        task = counting(app)
        assert task() == 1
        stamped, short = task.s(), task.s()
        stamped.stamp(mlcache_mode="refresh")
        short.stamp(mlcache="refresh")
        result = {
            "apply": lambda: task.apply(mlcache="refresh"),
            "apply_async": lambda: task.apply_async(mlcache="refresh"),
            "set": lambda: task.s().set(mlcache="refresh").apply_async(),
            "sig.apply": lambda: task.s().apply(mlcache="refresh"),
            "sig.apply_async": lambda: task.s().apply_async(mlcache="refresh"),
            "header": lambda: task.apply_async(headers={"mlcache_mode": "refresh", "mine": 1}),
            "stamp": stamped.apply_async,
            "short": short.apply_async,
        }[way]()
        assert result.get() == 2
        assert [task(), task.apply().get()] == [2, 2]

    def test_canvas(self, app):
        """In groups and chains each signature has its own mode."""
        task = counting(app)
        task()
        assert group(task.s().set(mlcache="refresh"), task.s()).apply().get() == [2, 2]
        assert chain(task.si(), task.si().set(mlcache="refresh"), task.si()).apply().get() == 3
        assert chain(task.si().set(mlcache="bypass"), task.si()).apply_async().get() == 3

    def test_bypass(self, app, told):
        """The function runs; nothing is read, stored or told."""
        task = counting(app)
        assert [task.apply(mlcache="bypass").get(), task.cache.get(), task(), task.apply(mlcache="bypass").get()] == [
            1,
            MISS,
            2,
            3,
        ]
        assert task() == 2
        assert app.mlcache.stats()["bypassed_calls"] == 2
        assert [name for name, _, _ in told] == ["cache_miss", "cache_hit"]

    def test_only(self, app):
        """What is cached, or NotCachedError; the function never runs."""
        task = counting(app)
        with pytest.raises(NotCachedError, match=f"{task.name}: its result is not cached") as info:
            task.apply(mlcache="only")
        assert (info.value.key, isinstance(info.value, LookupError)) == (task.cache.key(), True)
        assert task() == 1
        assert task.apply(mlcache="only").get() == 1
        with pytest.raises(NotCachedError, match="the call has no key"):
            task.apply((object(),), mlcache="only")

    def test_a_stamp_of_that_name_may_be_somebody_elses(self, app):
        """What is no mode is no mistake where it is a stamp."""
        task = counting(app)
        sig = task.s()
        sig.stamp(mlcache="gold")
        assert [sig.apply_async().get(), task()] == [1, 1]

    def test_stale_ok(self, app):
        """Without anything stale it is as "use"."""
        task = counting(app, stale_ttl=5)
        assert [task.apply(mlcache="stale-ok").get(), task.apply(mlcache="stale-ok").get()] == [1, 1]

    @pytest.mark.parametrize("call", ["apply", "apply_async", "using", "sig"])
    def test_a_wrong_mode(self, app, call):
        """It is refused where it is said, and those that there are are named."""
        task = counting(app)
        act = {
            "apply": lambda: task.apply(mlcache="fresh"),
            "apply_async": lambda: task.apply_async(mlcache="fresh"),
            "using": lambda: task.cache.using("fresh"),
            "sig": lambda: task.s().set(mlcache=True).apply_async(),
        }[call]
        with pytest.raises(ValueError, match="mlcache must be one of use, refresh, bypass, only, stale-ok, not"):
            act()
        assert app.mlcache.stats()["loads"] == 0

    @pytest.mark.parametrize("mode", ["later", 5, ["refresh"], None])
    def test_an_unknown_mode_in_a_message(self, app, mode):
        """A later release's, perhaps: it is as "use"."""
        task = counting(app)
        assert [task.apply(headers={"mlcache_mode": mode}).get() for _ in range(2)] == [1, 1]

    def test_using_leaves_errors_as_they_are(self, app):
        """A frozen one too, and the mode ends with the block."""
        error = FrozenError(7)
        task = counting(app, boom_with(error))
        block = task.cache.using("refresh")
        for call in (task, task.cache.refresh):
            with pytest.raises(FrozenError) as info, block, block:
                call()
            assert info.value is error
        with pytest.raises(FrozenError):
            block(task)()  # as a decorator
        assert modes.ambient_mode(task) is None

    def test_using(self, app):
        """Every call in the block has the mode, direct or sent; another mode inside wins; after it all is as before."""
        task, other = counting(app), counting(app)
        with task.cache.using("refresh"):
            assert [task(), task.apply().get(), task.delay().get()] == [1, 2, 3]
            assert [other(), other()] == [1, 1]
            with task.cache.using("only"):
                assert task() == 3
            assert task.apply(mlcache="use").get() == 3
            assert task() == 4
        assert task() == 4

    @pytest.mark.parametrize("way", ["apply", "using", "refresh"])
    def test_a_mode_does_not_leak_into_nested_calls(self, app, way):
        """A call of the same task inside its body is a call of its own: each is computed once."""
        runs = Counter()

        @cached_task(app=app)
        def fib(n):
            runs[n] += 1
            return n if n < 2 else fib(n - 1) + fib(n - 2)

        assert fib(10) == 55
        if way == "apply":
            assert fib.apply((10,), mlcache="refresh").get() == 55
        elif way == "using":
            with fib.cache.using("refresh"):
                assert fib(10) == 55
        else:
            assert fib.cache.refresh(10) == 55
        assert runs == {**dict.fromkeys(range(10), 1), 10: 2}

    def test_a_block_inside_a_body(self, app):
        """A mode that a body gives holds for the calls inside of its block."""
        runs = []

        @cached_task(app=app)
        def task(n):
            runs.append(n)
            if n:
                with task.cache.using("refresh"):
                    return task(n - 1)
            return n

        assert [task(1), task(0)] == [0, 0]
        with task.cache.using("bypass"):
            assert task(1) == 0
        assert runs == [1, 0, 1, 0]

    def test_a_bypassed_body(self, app):
        """Nested calls of a bypassed call are cached."""
        runs = Counter()

        @cached_task(app=app)
        def down(n):
            runs[n] += 1
            return down(n - 1) if n else 0

        for _ in range(2):
            assert down.apply((2,), mlcache="bypass").get() == 0
        assert runs == {2: 2, 1: 1, 0: 1}

    def test_a_mode_survives_a_retry(self, app):
        """A retried call is retried with the mode that it had."""
        app.conf.task_eager_propagates = False
        seen = []

        @cached_task(app=app, bind=True, max_retries=2, default_retry_delay=0)
        def task(self):
            seen.append((self.request.retries, self.request.mlcache))
            if len(seen) < 3:
                raise self.retry()
            return len(seen)

        task.cache.set(0)
        assert task.apply(mlcache="refresh", throw=False).get() == 3
        assert seen == [(0, "refresh"), (1, "refresh"), (2, "refresh")]
        assert task() == 3


class TestWhatIsTold:
    def test_request(self, app):
        """``request.mlcache`` says in the body why it runs, and afterwards where the result was found."""
        inside, after = [], []

        @cached_task(app=app, bind=True)
        def task(self, x=0):
            inside.append(self.request.mlcache)
            if x == "fail":
                raise ValueError(x)
            return x

        def postrun(sender, task, **_):
            after.append(task.request.mlcache)

        with Connected(celery_signals.task_postrun, postrun):
            task.apply()
            task.apply()
            task.apply(mlcache="refresh")
            task.apply(mlcache="bypass")
            task.apply((object(),))
            task.apply(("fail",), throw=False)
            task.apply((7,), mlcache="only", throw=False)
            task.apply(mlcache="stale-ok")
        assert inside == ["miss", "refresh", "bypass", "uncacheable", "miss"]
        assert after == ["miss", "l1", "refresh", "bypass", "uncacheable", "miss", "miss", "l1"]

    def test_nested_calls_do_not_change_what_is_told(self, app):
        """A call inside of a body says what it is, and the outer one what it was."""
        seen = []

        @cached_task(app=app, bind=True)
        def task(self, n):
            if n:
                task(n - 1)
                seen.append(self.request.mlcache)
            return n

        task(0)
        task.apply((1,), mlcache="refresh")
        assert seen == ["refresh"]

    def test_hits_and_misses(self, app, told):
        """Each call is told once, with the documented arguments."""
        task = counting(app)
        task()
        task()
        task.cache.refresh()
        (miss, hit, refreshed) = told
        key = task.cache.key()
        assert miss[:2] == ("cache_miss", task.name)
        assert miss[2].keys() == {"key", "seconds", "is_cached"}
        assert (miss[2]["key"], miss[2]["is_cached"], miss[2]["seconds"] >= 0) == (key, True, True)
        assert hit == ("cache_hit", task.name, {"key": key, "level": "l1", "seconds_saved": stored_seconds(hit)})
        assert hit[2]["seconds_saved"] == miss[2]["seconds"]
        assert refreshed[0] == "cache_miss"

    def test_a_call_without_a_key(self, app, told):
        """It is told as an error about a key, and as nothing else."""
        counting(app)(object())
        ((name, _, what),) = told
        assert (name, what["key"], what["what"], type(what["error"]).__name__) == (
            "cache_error",
            None,
            "key",
            "SerializationError",
        )

    def test_handlers_that_raise_do_no_harm(self, app, caplog):
        """Celery logs them; calls go on."""

        def handler(**_):
            raise RuntimeError("handler")

        task = counting(app)
        with Connected(signals.cache_hit, handler), Connected(signals.cache_miss, handler):
            assert [task(), task()] == [1, 1]
        assert sum("handler" in each.getMessage() for each in caplog.records) >= 2

    def test_nobody_listens(self, app):
        """Without handlers nothing is sent, and seconds are saved all the same."""
        task = counting(app)
        task.cache.manager.set(task.cache.key(), Record(5, 1.5, 1e9, 60.0, "m").pack())
        assert [task(), task()] == [5, 5]
        assert app.mlcache.stats()["seconds_saved"] == 3.0


def stored_seconds(hit):
    """Return what a hit has saved."""
    return hit[2]["seconds_saved"]


class Connected:
    """Connect a handler for a block."""

    def __init__(self, signal, handler):
        self.signal, self.handler = signal, handler

    def __enter__(self):
        self.signal.connect(self.handler, weak=False)

    def __exit__(self, *_):
        self.signal.disconnect(self.handler)


class TestTaskCache:
    def test_level_of_a_result_that_no_backend_keeps(self):
        """It is None, and no error."""
        app = Celery("no-backend", broker="memory://", set_as_current=False)
        setup_cache(app, l2_enabled=False)
        task = counting(app)
        assert task.cache.level_of(task.AsyncResult("1")) is None
        app.mlcache.close()
        app.close()

    def test_get_set_invalidate(self, app):
        """They read, replace and drop one call's result; options decide what set() stores."""
        task = counting(app, cache_if=lambda value: value != "no", cache_none=False)
        assert task.cache.get(1) is MISS
        assert task.cache.set("v", 1)
        assert [task.cache.get(1), task(1)] == ["v", "v"]
        assert [task.cache.set("no", 1), task.cache.set(None, 1)] == [False, False]
        assert task.cache.get(1) == "v"
        assert [task.cache.invalidate(1), task.cache.invalidate(1)] == [True, False]
        assert task(1) == 1

    def test_set_raises_what_options_raise(self, app):
        """The caller of set() is told what a hook says, and nothing is stored."""
        task = counting(app, cache_if=boom)
        with pytest.raises(ZeroDivisionError):
            task.cache.set(1)
        assert task.cache.get() is MISS

    def test_set_takes_a_result_named_as_an_argument(self, app):
        """The result is positional, so that an argument may have its name."""

        @cached_task(app=app)
        def task(result):
            return result

        assert task.cache.set("v", result=5)
        assert task.cache.get(5) == "v"

    def test_invalidate_all(self, app):
        """All of this task's results are gone, and nobody else's."""
        task, other = counting(app), counting(app)
        task(1)
        task(2)
        other(1)
        assert task.cache.invalidate_all()
        assert [task.cache.get(1), task.cache.get(2), other.cache.get(1)] == [MISS, MISS, 1]

    def test_original(self, app):
        """The function without the cache; a bound one with its task."""
        task = counting(app)
        assert [task(), task.cache.original(), task()] == [1, 2, 1]

        @cached_task(app=app, bind=True)
        def bound(self, x):
            return self.name, x

        assert bound.cache.original(3) == (bound.name, 3)

    @pytest.mark.parametrize("name", ["key", "tags", "get", "invalidate", "refresh", "explain"])
    def test_arguments_that_do_not_fit(self, app, name):
        """They are a TypeError everywhere, and nothing runs."""
        task = counting(app)
        with pytest.raises(TypeError):
            getattr(task.cache, name)(1, 2, 3)
        with pytest.raises(TypeError):
            task.cache.set("v", 1, 2, 3)
        assert app.mlcache.stats()["loads"] == 0

    def test_refresh_runs_in_a_request_of_its_own(self, app):
        """The body sees a direct call, and outside nothing is left of it."""
        seen = []

        @cached_task(app=app, bind=True)
        def task(self, x):
            seen.append((self.request.called_directly, self.request.args, self.request.mlcache))
            return x

        before = task.request
        assert task.cache.refresh(5) == 5
        assert seen == [(True, (5,), "refresh")]
        assert task.request is before

    def test_refresh_of_a_call_without_a_key(self, app):
        """It runs."""
        assert counting(app).cache.refresh(object()) == 1

    def test_refresh_async(self, app):
        """It sends a task that computes, and returns its result."""
        task = counting(app)
        assert task() == 1
        assert task.cache.refresh_async().get() == 2
        assert task() == 2

    def test_warm(self, app):
        """What is not cached is computed, each once; tuples, mappings and signatures name calls."""
        runs = Counter()

        @cached_task(app=app, tags=["x:{x}"])
        def task(x, y=2):
            runs[x, y] += 1
            return x

        task(1)
        sent = task.cache.warm([(1,), [2], {"x": 2, "y": 2}, task.s(3), (object(),), ("a\nb",), {"x": 4, "y": 5}])
        assert sent == 3
        assert runs == dict.fromkeys([(1, 2), (2, 2), (3, 2), (4, 5)], 1)
        assert task.cache.warm(iter([(1,), (2,)])) == 0
        assert task.cache.warm([]) == 0

    def test_warm_what_is_garbage(self, app):
        """What is stored and is no result counts as nothing."""
        task = counting(app)
        app.mlcache.set(task.cache.key(1), "garbage")
        assert task.cache.warm([(1,)]) == 1
        assert task.cache.get(1) == 1

    def test_warm_refuses(self, app):
        """What names no call of this task, and a batch of nothing."""
        task, other = counting(app), counting(app)
        for wrong in (5, "ab", None):
            with pytest.raises(
                TypeError, match=r"warm\(\) takes the arguments of each call as a tuple, list or mapping"
            ):
                task.cache.warm([wrong])
        with pytest.raises(TypeError, match=f"signatures of that task, not of {other.name}"):
            task.cache.warm([other.s(1)])
        with pytest.raises(TypeError):
            task.cache.warm([(1, 2, 3)])
        for batch in (0, -1, 1.5, None):
            with pytest.raises(ValueError, match="batch must be a whole number > 0"):
                task.cache.warm([(1,)], batch=batch)
        assert app.mlcache.stats()["loads"] == 0

    def test_explain(self, app):
        """It tells a hit in L1, a call that was never made, garbage, a negative one, and one without a key."""
        task = counting(app, tags=["x:{x}"])
        never = task.cache.explain(1)
        assert (never.is_hit, never.level, never.key, never.age) == (False, None, task.cache.key(1), None)
        assert never.tags == (f"task:{task.name}", "x:1")
        task(1)
        hit = task.cache.explain(1)
        assert (hit.is_hit, hit.level, hit.why, hit.is_error) == (True, "l1", "its result is cached", False)
        assert 0 <= hit.age < 60
        assert 250 < hit.remaining <= 300  # L1's own bound
        assert hit.maker.startswith("a direct call@")
        assert f"{task.name}: hit: its result is cached" in str(hit)
        app.mlcache.set(task.cache.key(1), ("mlcache/0", 1))
        assert task.cache.explain(1).why == "what is stored under the key is not a result of this release"
        odd = task.cache.explain(object())
        assert (odd.key, odd.is_hit) == (None, False)
        assert odd.why.startswith("the call has no key, so it always runs: ")
        assert app.mlcache.stats()["loads"] == 1

    def test_explain_an_error(self, app):
        """A cached exception is a hit, and one that this process does not know is none."""
        task = counting(app, boom, negative={ArithmeticError: 30})
        with pytest.raises(ZeroDivisionError):
            task()
        known = task.cache.explain()
        assert (known.is_hit, known.is_error, known.why) == (True, True, "the exception that it has raised is cached")
        strange = Record(("elsewhere", "GoneError", (), {}), 0.1, 1e9, 30.0, "m", is_error=True)
        app.mlcache.set(task.cache.key(), strange.pack())
        unknown = task.cache.explain()
        assert (unknown.is_hit, unknown.is_error) == (False, True)
        assert unknown.why == "what is stored is an exception that this process does not know"
        assert task.cache.get() is MISS
        with pytest.raises(NotCachedError):
            task.apply(mlcache="only")
        with pytest.raises(ZeroDivisionError):
            task()
        assert task.cache.explain().is_hit


class TestTrouble:
    @pytest.mark.parametrize(
        "garbage",
        ["text", None, 7, [], ("mlcache/0",), ("mlcache/1", False, 1, "x", None, [], 7)],
        ids=repr,
    )
    def test_what_is_no_record_is_computed_anew(self, app, garbage):
        """Foreign values under a call's key are overwritten, and never returned or raised."""
        task = counting(app)
        app.mlcache.set(task.cache.key(), garbage)
        assert task.cache.get() is MISS
        assert [task(), task()] == [1, 1]

    def test_closed_meanwhile(self, app, caplog):
        """A call under way when the cache is closed is answered, whatever its hooks do; the next one runs without."""

        def closing(n):
            app.mlcache.close()
            return n

        assert counting(app, closing, cache_if=boom)() == 1
        after = counting(app)
        assert [after(), after.apply().get()] == [1, 2]
        with pytest.raises(NotCachedError, match="the cache is closed"):
            after.apply(mlcache="only")
        assert after() == 3
        with pytest.raises(CacheClosedError):
            after.cache.get()

    def test_a_body_that_uses_a_closed_cache(self, app):
        """The error of its own is raised, and the function runs once, whether its own cache is closed or not."""
        runs = []

        def body(n):
            runs.append(n)
            raise CacheClosedError("another")

        task = counting(app, body)
        for call in (task, task.apply):
            with pytest.raises(CacheClosedError, match="another"):
                call()
        app.mlcache.close()
        for call in (task, task.apply):
            with pytest.raises(CacheClosedError, match="another"):
                call()
        assert runs == [1, 2, 3, 4]

    def test_closed_before_a_hit_is_counted(self, app):
        """A found result is returned though the cache was closed since."""
        task = counting(app)
        task()
        with Connected(signals.cache_hit, lambda **_: None):
            manager = task.cache.manager
            found = manager.resolve(task.cache.key(), None)
            manager.close()
            call = serving.Call(None, (), {}, {}, task.cache.key(), ())
            assert task.cache.serving._finish_found(call, found, unpack(found.value), None, task.request) == 1

    def test_contention_of_a_call_inside(self, app):
        """A call inside of the body that would not wait is not its own contention: nothing is sent again."""
        inner = CallInProgressError("another key", "somebody", 1.0)
        task = counting(app, on_contention="retry", max_retries=0, answer=_raising(inner))
        for call in (task, task.apply):
            with pytest.raises(CallInProgressError) as info:
                call()
            assert info.value is inner
        assert app.mlcache.stats()["loads"] == 2

    def test_a_task_without_a_broker(self, app, caplog, monkeypatch):
        """A refresh that cannot be sent is counted, logged once, told, and does not reach the caller."""
        monkeypatch.setattr(refreshing, "ASK_AGAIN", 0.0)
        task = counting(app, early=100.0)
        manager = task.cache.manager
        manager.mark = lambda *args, **kwargs: True  # without L2 there are no marks
        told = []
        task.mlcache_publish = boom
        manager.set(task.cache.key(), Record(7, 1e6, time.time() - 1, 60.0, "m").pack())
        with Connected(signals.cache_error, lambda what, error, **_: told.append((what, type(error)))):
            assert [task(), task()] == [7, 7]
        assert told == [("refresh", ZeroDivisionError)] * 2
        assert app.mlcache.stats()["refreshes_failed"] == 2
        assert sum(each.message.startswith("a refresh could not be sent") for each in caplog.records) == 1


def _raising(error):
    def answer(n):
        raise error

    return answer


class TestEarly:
    @pytest.mark.parametrize("share", [0.5, 0.2, 0.9])
    def test_probability(self, app, monkeypatch, share):
        """So much before the end, a refresh is as likely as XFetch says: exp(-left / (beta * seconds))."""
        beta, took = 1.5, 2.0
        left = -math.log(share) * beta * took
        task = counting(app, early=beta)
        record = Record(1, took, 1000.0, 60.0, "m")
        monkeypatch.setattr(refreshing.time, "time", lambda: 1060.0 - left)
        rounds = 20_000
        found = sum(task.cache.serving.refreshing.is_early(record) for _ in range(rounds)) / rounds
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / rounds))

    def test_bounds(self, app, monkeypatch):
        """Never for a task that takes no time, and never by a clock that is wrong."""
        serve = counting(app, early=True).cache.serving.refreshing
        record = Record(1, 0.0, 1000.0, 60.0, "m")
        monkeypatch.setattr(refreshing.time, "time", lambda: 1060.0)
        assert not serve.is_early(record)  # what is still served then has another clock
        monkeypatch.setattr(refreshing.time, "time", lambda: 999.9)
        assert not serve.is_early(Record(1, 1e6, 1000.0, 60.0, "m"))
        monkeypatch.setattr(refreshing.time, "time", lambda: 1059.9)
        assert not any(serve.is_early(record) for _ in range(1000))
        monkeypatch.setattr(refreshing.random, "random", lambda: math.nextafter(1.0, 0))
        assert serve.is_early(Record(1, 1.0, 1000.0, 60.0, "m"))

    def test_off(self, app, monkeypatch):
        """Without the option nobody draws lots."""
        task = counting(app)
        task.cache.manager.set(task.cache.key(), Record(7, 1e6, 1e9, 60.0, "m").pack())
        monkeypatch.setattr(task.cache.serving.refreshing, "is_early", boom)
        assert task() == 7


class TestHelpers:
    def test_names_of_modes(self):
        """What is exported is what is checked."""
        assert [modes.check_mode(mode) for mode in modes.MODES] == ["use", "refresh", "bypass", "only", "stale-ok"]

    @pytest.mark.parametrize(
        ("url", "priority"),
        [
            ("amqp://", 0),
            ("amqps://", 0),
            ("pyamqp://", 0),
            ("redis://", 9),
            ("rediss://", 9),
            ("sentinel://", 9),
            ("memory://", None),
            ("filesystem://", None),
            ("redis://a;redis://b", 9),
        ],
    )
    def test_lowest_priority(self, url, priority):
        """It is 0 for RabbitMQ and 9 for Redis, and unknown elsewhere."""
        app = Celery("p", broker=url, set_as_current=False)
        setup_cache(app, l2_enabled=False)
        assert counting(app).cache.serving.refreshing._lowest_priority == priority
        app.close()


class TestFailures:
    def test_a_run_that_raises_is_told(self, app, told):
        """A miss whose function has raised is a miss; what tells the worker what to do is none."""
        task = counting(app, _raising(KeyError("k")))
        with pytest.raises(KeyError):
            task()
        ((name, sender, what),) = told
        assert (name, sender, what["key"], what["is_cached"]) == ("cache_miss", task.name, task.cache.key(), False)
        told.clear()
        with pytest.raises(Ignore):
            counting(app, _raising(Ignore()))()
        assert told == []

    def test_what_is_no_result_is_refused_in_a_class_too(self, app):
        """A coroutine or a generator is used up, or never run: a class-based task cannot return one."""
        with pytest.raises(TypeError, match="Price: run must return its result"):

            class Price(CachedTask):
                async def run(self, x):
                    return x


class TestWhatIsBroughtAlong:
    def test_set_keeps_to_max_size(self, app):
        """What would not have been cached as a result is not stored by hand either."""
        task = counting(app, max_size=500)
        assert not task.cache.set("v" * 1000)
        assert task.cache.get() is MISS
        assert task.cache.set("v")
        assert task.cache.get() == "v"

    def test_set_gives_the_life_that_a_result_would_have(self, app):
        """The task's own jitter, or its absence, decides; the cache's is not added to it."""
        setup_cache(app, l2_enabled=False, ttl_jitter=0.5)
        task = counting(app, ttl=100, jitter=0)
        task.cache.set("v")
        assert 99 < app.mlcache.ttl(task.cache.key()) <= 100

    def test_only_says_where_it_was_found(self, app, told):
        """With mlcache="only" a hit tells its level like any other."""
        task = counting(app)
        task()
        task.apply(mlcache="only")
        assert [(name, what["level"]) for name, _, what in told if name == "cache_hit"] == [("cache_hit", "l1")]

    def test_an_error_that_cannot_be_stored_is_raised_even_if_strict(self, app):
        """The task's own error comes first, whatever the codec says of it."""
        setup_cache(app, l2_enabled=False, strict=True)

        def fail(_):
            raise KeyError(object())

        task = counting(app, fail, negative={KeyError: 30})
        with pytest.raises(KeyError):
            task()

    def test_what_was_dropped_while_it_was_computed_is_not_told_as_cached(self, app, told):
        """cache_miss says is_cached=False where the result was refused, and that is no error of the cache's."""
        task = counting(app, lambda n: task.cache.invalidate_all() and n)
        task()
        assert [(name, what.get("is_cached")) for name, _, what in told] == [("cache_miss", False)]
