"""Cached tasks without a worker: keys, classes, options, and what the producer sees."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum, IntEnum

import celery
import pytest
from celery import Celery, Task, _state, shared_task
from celery.app import base as app_base
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from kombu.serialization import dumps, loads
from pydantic import BaseModel

from celery_mlcache import CachedTask, cached_task, setup_cache
from celery_mlcache.entry import MISS
from celery_mlcache.errors import CacheKeyError, ConfigurationError, SerializationError
from celery_mlcache.fleet.app import find_fleet
from celery_mlcache.fleet.options import Options
from tests.support.annotated import annotated


@pytest.fixture(autouse=True)
def _no_shared_leftovers(monkeypatch):
    """What a test shares with every app is gone after it."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))


@pytest.fixture
def app():
    """An app with a cache in memory: no Redis, no broker outside of this process."""
    app = Celery(f"u{uuid.uuid4().hex[:8]}", broker="memory://", backend="cache+memory://", set_as_current=False)
    setup_cache(app, l2_enabled=False)
    yield app
    app.mlcache.close()
    app.close()


@pytest.fixture
def runs():
    """Count executions by name."""
    return Counter()


@pytest.fixture
def add(app, runs):
    """A plain cached task."""

    @cached_task(app=app)
    def add(x, y=2):
        runs["add"] += 1
        return x + y

    return add


def over_the_wire(*args, **kwargs):
    """Return arguments as a worker gets them: through Celery's JSON."""
    content_type, encoding, data = dumps((args, kwargs), "json")
    return loads(data, content_type, encoding, accept={"application/json"})


class Colour(IntEnum):
    RED = 1


@dataclass
class Point:
    x: int
    y: int


class Order(BaseModel):
    sku: str
    amount: int = 1


class TestKeys:
    def test_spellings_of_one_call_agree(self, add):
        """However a call is written, with or without its defaults, it has one key."""
        keys = {
            add.cache.key(1),
            add.cache.key(1, 2),
            add.cache.key(1, y=2),
            add.cache.key(x=1),
            add.cache.key(y=2, x=1),
        }
        assert len(keys) == 1
        assert keys.pop().startswith(f"task:{add.name}:")

    def test_other_arguments_have_other_keys(self, add):
        """Calls that differ in a value, its type or its place have different keys."""
        keys = [add.cache.key(1), add.cache.key(2), add.cache.key(2, 1), add.cache.key("1"), add.cache.key(1.5)]
        keys += [add.cache.key([1, 2]), add.cache.key([[1], 2]), add.cache.key({"a": 1}), add.cache.key(None)]
        assert len(set(keys)) == len(keys)

    @pytest.mark.parametrize(
        "value",
        [
            (1, (2, 3)),
            {1: "a", 2: {3: "b"}},
            Colour.RED,
            [Decimal("1.10"), datetime(2026, 1, 2, 3, tzinfo=UTC)],
            uuid.UUID(int=7),
            b"\x00\xff",
            {"nested": [{"t": (1, 2)}]},
            float("inf"),
            "ü",
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_producer_and_worker_agree(self, add, value):
        """The key of a call is the same before and after Celery's JSON."""
        args, kwargs = over_the_wire(value, y=value)
        assert add.cache.key(*args, **kwargs) == add.cache.key(value, y=value)

    def test_models_and_dataclasses_are_keyed_by_their_content(self, add):
        """A model or dataclass has the key of the mapping that stands for it on the wire."""
        assert add.cache.key(Order(sku="a")) == add.cache.key({"sku": "a", "amount": 1})
        assert add.cache.key(Point(1, 2)) == add.cache.key({"x": 1, "y": 2})

    def test_tasks_do_not_share_keys(self, app, add):
        """Two tasks that are called alike have different keys."""

        @cached_task(app=app)
        def other(x, y=2):
            return x

        assert other.cache.key(1) != add.cache.key(1)

    def test_star_arguments(self, app):
        """Positional-only, variadic and keyword-only arguments are part of the key as Python binds them."""

        @cached_task(app=app)
        def odd(a, /, b=1, *rest, c=3, **more):
            return None

        key = odd.cache.key
        assert key(1) == key(1, b=1) == key(1, 1, c=3)
        assert len({key(1), key(1, 1, 2), key(1, c=2), key(1, d=4), key(1, a=5)}) == 5

    def test_arguments_that_do_not_fit(self, add, runs):
        """Where arguments do not fit, key() raises TypeError, and so does the call, from the function itself."""
        for arguments in [(), (1, 2, 3)]:
            with pytest.raises(TypeError):
                add.cache.key(*arguments)
            with pytest.raises(TypeError, match=r"add\(\)"):
                add(*arguments)
        with pytest.raises(TypeError):
            add.cache.key(1, x=1)
        with pytest.raises(TypeError):
            add.cache.key(1, z=1)
        assert not runs

    def test_an_argument_without_a_form_is_a_bypass(self, app, caplog):
        """A call that has no key runs each time, is counted, and is logged once for the task."""

        @cached_task(app=app)
        def echo(x):
            return x

        thing = object()
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            assert [echo(thing), echo(thing)] == [thing, thing]
        assert app.mlcache.stats()["uncacheable_calls"] == 2
        (record,) = [each for each in caplog.records if each.message.startswith("a call cannot be cached")]
        assert record.task == echo.name
        assert "object" in record.why
        with pytest.raises(SerializationError):
            echo.cache.key(thing)


class TestCalls:
    def test_a_direct_call_is_executed_once(self, app, add, runs):
        """The second of two equal calls is served by the cache."""
        assert [add(1), add(1, 2), add(x=1), add(2)] == [3, 3, 3, 4]
        assert runs["add"] == 2
        assert (app.mlcache.stats()["loads"], app.mlcache.stats()["l1_hits"]) == (2, 2)

    def test_apply_and_eager_share_the_entry(self, app, add, runs):
        """``.apply()``, eager ``.delay()``, ``.map()`` and direct calls are the same call."""
        assert add.apply((1,)).get() == 3
        app.conf.task_always_eager = True
        assert add.delay(1).get() == 3
        assert add.map([1, 1])() == [3, 3]
        assert (add.s(1) | add.s()).apply().get() == 5  # add(2, 3): a chain passes the result on
        assert add(1) == 3
        assert runs["add"] == 2

    def test_a_wrong_call_is_refused_where_it_is_made(self, add):
        """``typing=True``: ``delay()`` with arguments that do not fit raises TypeError at the producer."""
        with pytest.raises(TypeError):
            add.delay()
        with pytest.raises(TypeError):
            add.delay(1, 2, 3)

    def test_a_bound_task(self, app):
        """A bound task gets itself; only the other arguments make the key."""

        @cached_task(app=app, bind=True)
        def bound(self, x):
            return [self.name, x]

        assert bound(1) == bound.apply((1,)).get() == bound.cache.get(1) == [bound.name, 1]
        assert app.mlcache.stats()["loads"] == 1

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("mine"),
            Retry(),
            Ignore(),
            Reject("no"),
            SoftTimeLimitExceeded(),
            SystemExit(3),
            KeyboardInterrupt(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_what_is_raised_passes_and_is_not_cached(self, app, runs, error):
        """Whatever the function raises reaches the caller as it is, and the next call is executed."""

        @cached_task(app=app)
        def moody():
            runs["moody"] += 1
            if runs["moody"] == 1:
                raise error
            return "fine"

        with pytest.raises(type(error)) as caught:
            moody()
        assert caught.value is error
        assert moody.cache.get() is MISS
        assert [moody(), moody()] == ["fine", "fine"]
        assert runs["moody"] == 2

    def test_none_is_a_result(self, app, runs):
        """A task that returns None is cached as well."""

        @cached_task(app=app)
        def nothing():
            runs["nothing"] += 1

        assert [nothing(), nothing(), nothing.cache.get()] == [None, None, None]
        assert runs["nothing"] == 1

    def test_pydantic(self, app, runs):
        """``pydantic=True`` works: models inside, plain data in the cache, one key for both spellings."""

        @cached_task(app=app, pydantic=True)
        @annotated
        def more(order: Order) -> Order:
            runs["total"] += 1
            return Order(sku=order.sku, amount=order.amount + 1)

        assert more({"sku": "a", "amount": 1}) == {"sku": "a", "amount": 2}
        assert more(Order(sku="a")) == {"sku": "a", "amount": 2}
        assert runs["total"] == 1

    def test_an_uncacheable_result_is_returned(self, app, runs):
        """A result that the codec refuses is returned, each time anew."""

        @cached_task(app=app)
        def strange():
            runs["strange"] += 1
            return object()

        assert type(strange()) is type(strange()) is object
        assert runs["strange"] == 2
        assert app.mlcache.stats()["unserializable"] == 2

    def test_a_result_is_the_callers_own(self, app):
        """A caller that changes what it got does not change what the next one gets."""

        @cached_task(app=app)
        def rows():
            return [1]

        rows().append(2)
        rows().append(3)
        assert rows() == [1]


class TestCache:
    def test_get_runs_nothing(self, add, runs):
        """get() returns MISS before and the result after the first call."""
        assert add.cache.get(1) is MISS
        assert not runs
        add(1)
        assert add.cache.get(1, 2) == 3

    def test_invalidate(self, add, runs):
        """invalidate() removes one call's result and says whether there was one."""
        add(1)
        add(5)
        assert [add.cache.invalidate(1), add.cache.invalidate(x=1)] == [True, False]
        assert [add(1), add(5)] == [3, 7]
        assert runs["add"] == 3

    def test_refresh(self, add, runs):
        """refresh() runs the function, stores over what is there, and returns the result."""
        assert [add(1), add.cache.refresh(1), add(1)] == [3, 3, 3]
        assert runs["add"] == 2

    def test_refresh_of_a_bound_task(self, app, runs):
        """refresh() of a bound task and of a method passes the task."""

        @cached_task(app=app, bind=True)
        def bound(self, x):
            runs["bound"] += 1
            return [self.name, runs["bound"]]

        assert bound(1) == [bound.name, 1]
        assert bound.cache.refresh(1) == bound(1) == [bound.name, 2]

    def test_refresh_loses_to_an_invalidation(self, app, runs):
        """A refresh during which the call was invalidated is returned and not stored."""

        @cached_task(app=app)
        def racy(x):
            runs["racy"] += 1
            if runs["racy"] == 2:
                racy.cache.invalidate(x)
            return runs["racy"]

        assert racy(7) == 1
        assert racy.cache.refresh(7) == 2
        assert racy.cache.get(7) is MISS
        assert racy(7) == 3

    def test_a_call_loses_to_an_invalidation(self, app, runs):
        """A call during which its result was invalidated is returned and not stored."""

        @cached_task(app=app)
        def racy(x):
            runs["racy"] += 1
            if runs["racy"] == 1:
                racy.cache.invalidate(x)
            return runs["racy"]

        assert [racy(7), racy(7), racy(7)] == [1, 2, 2]

    def test_ttl(self, app):
        """The task's ttl is the life of its results; without one it is the cache's default."""

        @cached_task(app=app, ttl=50)
        def brief():
            return 1

        @cached_task(app=app)
        def default():
            return 1

        brief()
        default()
        assert 49 < app.mlcache.ttl(brief.cache.key()) <= 50
        assert 50 < app.mlcache.ttl(default.cache.key()) <= 3600

    def test_the_manager_is_the_apps(self, app, add):
        """A task's results are in its app's cache, under its keys."""
        add(1)
        assert add.cache.manager is app.mlcache
        assert app.mlcache.exists(add.cache.key(1))


class Cached(CachedTask):
    """A class-based task, under a name of its own in each test."""

    def __init__(self, runs):
        self.runs = runs

    def run(self, x, y=2):
        self.runs[type(self).__name__] += 1
        return x * y


class TestClasses:
    def registered(self, app, task):
        return app.register_task(task)

    def test_class_based(self, app, runs):
        """A class with ``run`` as a method is cached; its key has no self in it."""

        class Times(Cached):
            name = "times"

        task = self.registered(app, Times(runs))
        assert [task(2), task(2, y=2), task.run(2), task.apply((2,)).get()] == [4, 4, 4, 4]
        assert task.cache.refresh(2) == 4
        assert runs == {"Times": 2}

    def test_static_run(self, app, runs):
        """A class with ``run`` as a staticmethod is cached."""

        class Static(CachedTask):
            name = "static"

            @staticmethod
            def run(x):
                runs["static"] += 1
                return x

        task = self.registered(app, Static())
        assert [task(1), task(x=1), task.cache.refresh(1)] == [1, 1, 1]
        assert runs["static"] == 2

    def test_an_overriding_run_may_call_super(self, app, runs):
        """With ``super().run()`` the outermost run alone is cached: the inner one runs as plain code."""

        class Plus(Cached):
            name = "plus"

            def run(self, x, y=2):
                runs["outer"] += 1
                return super().run(x, y) + 1

        task = self.registered(app, Plus(runs))
        assert [task(2), task(2)] == [5, 5]
        assert runs == {"outer": 1, "Plus": 1}
        assert task.cache.get(2) == 5

    def test_a_mixed_in_run_is_cached(self, app, runs):
        """``run`` inherited from a base that knows nothing of the cache is cached too."""

        class Users(Task):
            abstract = True

            def run(self, x):
                runs["users"] += 1
                return x

        class Mixed(CachedTask, Users):
            name = "mixed"

        task = self.registered(app, Mixed())
        assert [task(1), task(1)] == [1, 1]
        assert runs["users"] == 1
        assert Users.run is Users.__dict__["run"]  # and the user's own class is as it was

    def test_a_base_of_the_users(self, app, runs):
        """``base=`` adds the user's class under the cache; its hooks and attributes work."""

        class Users(Task):
            abstract = True
            colour = "red"

            def on_success(self, retval, task_id, args, kwargs):
                runs["on_success"] += 1

        @cached_task(app=app, base=Users, bind=True)
        def mine(self, x):
            runs["mine"] += 1
            return self.colour

        assert isinstance(mine._get_current_object(), Users)
        assert [mine.apply((1,)).get(), mine.apply((1,)).get()] == ["red", "red"]
        assert runs == {"mine": 1, "on_success": 2}

    def test_a_base_that_is_cached(self, app):
        """``base=`` takes a subclass of CachedTask as it is."""

        class Mine(CachedTask):
            abstract = True

        @cached_task(app=app, base=Mine)
        def mine(x):
            return x

        assert type(mine._get_current_object()).__mro__[1] is Mine

    def test_base_of_an_app_task(self, app, runs):
        """``@app.task(base=CachedTask, mlcache={...})`` is the long way to write it."""

        @app.task(base=CachedTask, mlcache={"ttl": 50})
        def long_way(x):
            runs["long_way"] += 1
            return x

        assert [long_way(1), long_way(1)] == [1, 1]
        assert runs["long_way"] == 1
        assert 49 < app.mlcache.ttl(long_way.cache.key(1)) <= 50

    def test_an_app_whose_every_task_is_cached(self, runs):
        """``task_cls=CachedTask`` makes every task of an app a cached one."""
        app = Celery("all", task_cls=CachedTask, broker="memory://", set_as_current=False)
        setup_cache(app, l2_enabled=False)

        @app.task
        def plain(x):
            runs["plain"] += 1
            return x

        assert [plain(1), plain(1)] == [1, 1]
        assert runs["plain"] == 1


class TestTags:
    @pytest.fixture
    def price(self, app, runs):
        """A task whose results carry tags made from its arguments."""

        @cached_task(app=app, tags=["prices", "sku:{sku}", "{currency}-{order[id]}"])
        def price(sku, currency="EUR", *, order=None):
            runs[sku] += 1
            return runs[sku]

        return price

    def test_tags_are_made_from_the_bound_arguments(self, price):
        """Defaults and keywords are arguments too; braces work as in ``str.format``."""
        own = f"task:{price.name}"
        assert price.cache.tags("a", order={"id": 7}) == (own, "prices", "sku:a", "EUR-7")
        assert price.cache.tags(order={"id": 8}, currency="USD", sku=5) == (own, "prices", "sku:5", "USD-8")
        with pytest.raises(TypeError):
            price.cache.tags()

    def test_a_tag_invalidates_the_calls_that_carry_it(self, app, price):
        """And no others."""
        order = {"id": 7}
        for sku in ("a", "b"):
            assert [price(sku, order=order), price(sku, order=order)] == [1, 1]
        app.mlcache.invalidate_tags("sku:a")
        assert [price("a", order=order), price("b", order=order)] == [2, 1]
        app.mlcache.invalidate_tags("prices")
        assert [price("a", order=order), price("b", order=order)] == [3, 2]

    def test_a_refreshed_result_carries_them_too(self, app, price):
        """It is stored as the first one was."""
        order = {"id": 7}
        assert price.cache.refresh("a", order=order) == 1
        assert price("a", order=order) == 1
        app.mlcache.invalidate_tags("EUR-7")
        assert price("a", order=order) == 2

    @pytest.mark.parametrize("odd", ["a\nb", "x" * 1024, "\ud800"])
    def test_arguments_that_make_no_tag_are_a_bypass(self, app, price, runs, odd):
        """The call runs, nothing is cached that could not be invalidated, and it is counted."""
        assert [price(odd, order={"id": 7}), price(odd, order={"id": 7})] == [1, 2]
        assert [price("a"), price("a")] == [1, 2]  # None has no ["id"]
        assert app.mlcache.stats()["uncacheable_calls"] == 4
        with pytest.raises(CacheKeyError, match="tag"):
            price.cache.tags("a")

    def test_an_enum_is_what_it_becomes_on_the_wire(self, app):
        """As in the key: a direct call and one through the broker carry the same tag; braces are those of a format."""

        class Color(str, Enum):  # noqa: UP042 - the older spelling formats as "Color.RED"
            RED = "red"

        @cached_task(app=app, tags=["c:{color}", "{{x}}", "y}}"])
        def paint(color):
            return 1

        assert paint.cache.tags(Color.RED) == paint.cache.tags("red") == (f"task:{paint.name}", "c:red", "{x}", "y}")

    def test_each_element_of_a_bound_task(self, app, runs):
        """``self`` is no argument."""

        @cached_task(app=app, bind=True, tags=["x:{x}"])
        def bound(self, x):
            runs[x] += 1
            return x

        assert [bound(1), bound(1)] == [1, 1]
        app.mlcache.invalidate_tags("x:1")
        bound(1)
        assert runs[1] == 2
        with pytest.raises(ConfigurationError, match="names 'self'"):
            cached_task(app=app, bind=True, tags=["{self}"])(lambda self, x: x)


class TestDecorator:
    def test_bare_and_shared(self, app, runs):
        """``@cached_task`` without brackets is a shared task: each app has its own, in its own cache."""

        @cached_task
        def shared(x):
            runs["shared"] += 1
            return x

        other = Celery("other", broker="memory://", set_as_current=False)
        setup_cache(other, l2_enabled=False)
        name = next(name for name in app.tasks if name.endswith(".shared"))
        ours, theirs = app.tasks[name], next(task for key, task in other.tasks.items() if key.endswith(".shared"))
        assert [ours(1), ours(1), theirs(1)] == [1, 1, 1]
        assert runs["shared"] == 2
        assert (ours.cache.manager, theirs.cache.manager) == (app.mlcache, other.mlcache)

    def test_options_reach_the_task(self, app):
        """``ttl`` is ours; every other option is an option of ``@app.task``."""

        @cached_task(app=app, ttl=5, name="named", rate_limit="1/s", acks_late=True)
        def anything():
            return 1

        assert (anything.name, anything.rate_limit, anything.acks_late) == ("named", "1/s", True)
        assert anything.mlcache == {"ttl": 5}
        assert anything.cache.options == Options(ttl=5)
        assert not hasattr(anything, "ttl")

    @pytest.mark.parametrize("ttl", [0, -1, float("inf"), float("nan"), True, "5"])
    def test_a_wrong_ttl_is_refused_at_once(self, app, ttl):
        """A ttl that no call could use is refused where it is written, also in ``mlcache={...}``."""
        with pytest.raises(ConfigurationError, match="ttl must be"):

            @cached_task(app=app, ttl=ttl)
            def anything():
                return 1

        with pytest.raises(ConfigurationError, match="ttl must be"):
            Options().changed({"ttl": ttl}, "anything")

    @pytest.mark.parametrize(
        ("tags", "complaint"),
        [
            ("sku:{sku}", "tags must be a list, tuple or set of str"),
            (
                ["sku:{skuu}"],
                r"function: the tag 'sku:{skuu}' names 'skuu', which is no argument of the task \(sku, x\)",
            ),
            (["{0}"], "names '0', which is no argument"),
            (["{}"], "names '', which is no argument"),
            (["sku:{sku"], "the tag 'sku:{sku' is no template"),
            ([""], "must not be empty"),
            ([5], "must be a str"),
            (["a\nb"], "control characters"),
        ],
    )
    def test_wrong_tags_are_refused_at_once(self, app, tags, complaint):
        """Where they are written, with what is allowed; also in ``mlcache={...}``."""

        def function(sku, x=1):
            return sku

        with pytest.raises(ConfigurationError, match=complaint):
            cached_task(app=app, tags=tags)(function)
        task = app.task(base=CachedTask, mlcache={"tags": tags}, name="function")(function)
        with pytest.raises(ConfigurationError, match=complaint):
            _ = task.cache

    def test_an_unknown_option_is_named(self, app):
        """An option of ``mlcache={...}`` that does not exist is named, with those that do."""

        @app.task(base=CachedTask, mlcache={"tll": 5})
        def anything():
            return 1

        with pytest.raises(
            ConfigurationError, match=r"anything: mlcache option tll is unknown; did you mean ttl\?; there "
        ):
            _ = anything.cache

    @pytest.mark.parametrize("kind", ["app.task", "shared_task", "instance", "number", "name"])
    def test_what_is_a_task_already_is_refused(self, app, kind):
        """Over ``@app.task`` or anything else that is no function, the message says how to write it."""

        def function():
            return 1

        things = {
            "app.task": lambda: app.task(function),
            "shared_task": lambda: shared_task(function),
            "instance": lambda: app._task_from_fun(function),
            "number": lambda: 5,
            "name": lambda: "name",
        }
        with pytest.raises(TypeError, match=r"write @cached_task\(ttl=\.\.\.\) alone, in the place of @app\.task"):
            cached_task(ttl=5)(things[kind]())

    def test_app_task_over_a_cached_task(self, app, runs, monkeypatch):
        """Written the other way round it is one cached task, and Celery warns that the name is taken."""
        monkeypatch.setattr(_state._tls, "current_app", app)
        app.finalize()

        @cached_task(name="twice")
        def function(x):
            runs["function"] += 1
            return x

        warned = nullcontext()
        if celery.VERSION >= (5, 7):  # before, Celery said nothing
            warned = pytest.warns(app_base.DuplicateTaskNameWarning, match="already registered")
        with warned:
            task = app.task(name="twice")(function)
        assert [task(1), task(1)] == [1, 1]
        assert runs["function"] == 1
        assert isinstance(app.tasks["twice"], CachedTask)

    def test_a_task_without_setup(self, runs):
        """A cached task of an app that was never set up sets it up, from the environment and ``app.conf``."""
        app = Celery("unset", broker="memory://", set_as_current=False)
        app.conf.mlcache_l2_enabled = False

        @cached_task(app=app)
        def anything():
            runs["anything"] += 1
            return 1

        assert find_fleet(app) is None
        assert [anything(), anything()] == [1, 1]
        assert runs["anything"] == 1
        assert app.mlcache is anything.cache.manager
        app.mlcache.close()
