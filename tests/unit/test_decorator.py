"""Every form of ``@cached_task``, and what those read who write it wrongly."""

from __future__ import annotations

import functools
import inspect
import uuid
import warnings
from collections import Counter
from datetime import timedelta
from typing import ClassVar
from weakref import WeakSet

import celery
import pytest
from celery import Celery, Task, _state, shared_task
from celery.utils.functional import head_from_fun
from pydantic import BaseModel

from celery_mlcache import CachedTask, cached_task, setup_cache
from celery_mlcache.errors import ConfigurationError
from celery_mlcache.fleet.options import OPTION_NAMES, Options
from tests.support.annotated import annotated

ALONE = r"write @cached_task\(ttl=\.\.\.\) alone, in the place of @app\.task or @shared_task"


@pytest.fixture(autouse=True)
def _no_shared_leftovers(monkeypatch):
    """What a test shares with every app is gone after it, other tests' apps take no part, and none stays current."""
    monkeypatch.setattr(_state, "_apps", WeakSet())
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))
    monkeypatch.setattr(_state._tls, "current_app", None)


def make_app(**options):
    """Return an app with a cache in memory."""
    made = Celery(
        f"d{uuid.uuid4().hex[:8]}", broker="memory://", backend="cache+memory://", set_as_current=False, **options
    )
    setup_cache(made, l2_enabled=False)
    return made


@pytest.fixture
def app(monkeypatch):
    """The current app: no Redis, no broker outside of this process."""
    app = make_app()
    monkeypatch.setattr(_state._tls, "current_app", app)
    yield app
    app.mlcache.close()
    app.close()


@pytest.fixture
def runs():
    """Count executions."""
    return Counter()


class Users(Task):
    """A base class that knows nothing of the cache."""

    abstract = True
    colour = "red"
    calls: ClassVar = Counter()

    def __call__(self, *args, **kwargs):
        self.calls[self.name] += 1
        return super().__call__(*args, **kwargs)


class Mine(CachedTask):
    """A base class that is cached already."""

    abstract = True


class Item(BaseModel):
    sku: str


class TestForms:
    """Each form gives a Celery task whose equal calls run its function once."""

    def price(self, runs):
        def price(sku, qty=1):
            runs[sku] += 1
            return [sku, qty]

        return price

    @pytest.mark.parametrize(
        "form",
        [
            lambda app, price: cached_task(price),
            lambda app, price: cached_task()(price),
            lambda app, price: cached_task(ttl=60)(price),
            lambda app, price: cached_task(price, ttl=60, app=app),
            lambda app, price: cached_task(app=app)(price),
            lambda app, price: cached_task(app=celery.current_app)(price),
            lambda app, price: cached_task(app=app, lazy=False)(price),
            lambda app, price: cached_task(app=app, shared=False)(price),
            lambda app, price: cached_task(app=app, mlcache={"ttl": 60})(price),
            lambda app, price: cached_task(app=app, mlcache=Options(ttl=60))(price),
            lambda app, price: cached_task(app=app, base=CachedTask)(price),
            lambda app, price: cached_task(app=app, base=Task)(price),
            lambda app, price: cached_task(app=app, base=app.Task)(price),
            lambda app, price: cached_task(app=app, base=Users)(price),
            lambda app, price: cached_task(app=app, base=Mine)(price),
            lambda app, price: cached_task(base=Users)(price),
            lambda app, price: app.task(base=CachedTask, mlcache={"ttl": 60})(price),
            lambda app, price: shared_task(base=CachedTask, mlcache={"ttl": 60})(price),
        ],
        ids=inspect.getsource,
    )
    @pytest.mark.parametrize("is_finalized", [False, True])
    def test_a_function(self, app, runs, form, is_finalized):
        """Before and after the app is finalized."""
        if is_finalized:
            app.finalize()
        task = form(app, self.price(runs))
        assert [task("a", 1), task("a"), task.apply(("a",)).get(), task.cache.get("a")] == [["a", 1]] * 4
        assert runs == {"a": 1}
        assert app.tasks[task.name] == task
        with pytest.raises(TypeError, match=r"price\(\)"):
            task.delay()

    def test_bound(self, app):
        """``bind=True`` passes the task."""

        @cached_task(bind=True)
        def bound(self, x):
            return [self.name, x]

        assert bound(1) == bound.cache.get(1) == [bound.name, 1]

    def test_pydantic(self, app, runs):
        """``pydantic=True`` makes models of plain data, and plain data of models."""

        @cached_task(pydantic=True)
        @annotated
        def priced(item: Item) -> Item:
            runs[item.sku] += 1
            return item

        assert [priced({"sku": "a"}), priced(Item(sku="a"))] == [{"sku": "a"}] * 2
        assert runs == {"a": 1}

    def test_a_base_with_a_call_of_its_own(self, app, runs):
        """It runs around every call, also around one that is served by the cache."""
        Users.calls.clear()
        task = cached_task(app=app, base=Users)(self.price(runs))
        assert [task("a"), task.apply(("a",)).get()] == [["a", 1]] * 2
        assert (Users.calls[task.name], runs["a"], task.colour) == (2, 1, "red")

    def test_the_apps_own_task_class(self, app, runs, monkeypatch):
        """Without ``base`` a task is of each app's own class, as with Celery's decorators."""
        blue = make_app(task_cls=Users)
        shared = cached_task(self.price(runs))
        for each, colour in [(app, None), (blue, "red")]:
            monkeypatch.setattr(_state._tls, "current_app", each)
            assert getattr(shared, "colour", None) == colour
            assert isinstance(each.tasks[shared.name], CachedTask)
            assert [shared("a"), shared("a")] == [["a", 1]] * 2
        assert runs["a"] == 2

        @cached_task(app=blue, name="given")
        def given():
            return 1

        assert (given.colour, given.app, given(), given.cache.get()) == ("red", blue, 1, 1)
        assert getattr(make_app().tasks["given"], "colour", None) is None

    def test_every_app_gets_a_shared_task(self, app, runs):
        """Those that are finalized, and those to come; ``shared=False`` keeps it to one."""
        app.finalize()
        cached_task(self.price(runs), name="everyones")
        cached_task(self.price(runs), name="everyones too", app=app)
        cached_task(self.price(runs), name="ours", app=app, shared=False)
        later = make_app()
        for name in ("everyones", "everyones too"):
            assert app.tasks[name] is not later.tasks[name]
            assert later.tasks[name].app is later
        assert app.tasks["ours"].app is app
        assert "ours" not in later.tasks

    def test_options_of_celery_pass(self, app):
        """Every option of ``@app.task`` and every attribute for one's own use reaches the task."""
        given = {
            "name": "named",
            "rate_limit": "1/s",
            "max_retries": 7,
            "serializer": "yaml",
            "autoretry_for": (OSError,),
            "retry_backoff": 2,
            "retry_jitter": False,
            "expires": 60,
            "typing": False,
            "colour": "green",
            "owner": "me",
        }
        task = cached_task(app=app, ttl=5, **given)(lambda_free)
        assert {name: getattr(task, name) for name in given} == given
        assert task.mlcache == {"ttl": 5}
        assert task._get_exec_options()["serializer"] == "yaml"
        assert not hasattr(task, "ttl")

    def test_what_is_not_given_is_the_apps_to_say(self, app):
        """The app's settings for every task stand below the decorator's options."""
        app.conf.mlcache_tasks = {"*": {"ttl": 50, "jitter": 0.5}}
        task = cached_task(app=app, ttl=5)(lambda_free)
        assert (task.cache.options.ttl, task.cache.options.jitter) == (5, 0.5)

    @pytest.mark.parametrize("kind", [CachedTask, Task])
    def test_what_is_not_given_is_the_bases_to_say(self, app, kind):
        """The options of base classes stand below those of what is built on them, however that is spelled."""

        class Root(kind):
            abstract = True
            mlcache: ClassVar = {"ttl": 11, "jitter": 0.1, "tags": ["t"], "early": 2}

        class Base(Root):
            abstract = True
            mlcache: ClassVar = {"jitter": 0.2, "early": 3}

        app.conf.mlcache_tasks = {"*": {"ttl": 50, "max_size": 7}, "ours": {"early": 4}}
        app.conf.task_annotations = {"noted": {"mlcache": {"tags": ["u"]}}}
        expected = {"ttl": 11, "jitter": 0.5, "tags": ("t",), "early": 3, "max_size": 7}
        ours = cached_task(app=app, base=Base, jitter=0.5, name="ours")(lambda_free)
        assert ours.cache.options == Options(**{**expected, "early": 4})
        noted = cached_task(app=app, base=Base, mlcache={"jitter": 0.5}, name="noted")(lambda_free)
        assert noted.cache.options == Options(**{**expected, "tags": ("u",)})
        bare = cached_task(app=app, base=Base, name="bare")(lambda_free)
        assert bare.cache.options == Options(**{**expected, "jitter": 0.2})
        if kind is CachedTask:
            spelled = app.task(base=Base, mlcache={"jitter": 0.5}, name="spelled")(lambda_free)
            assert spelled.cache.options == Options(**expected)

            class Times(Base):
                name = "times"
                mlcache: ClassVar = {"jitter": 0.5}

                def run(self):
                    return 1

            assert app.register_task(Times()).cache.options == Options(**expected)

    def test_a_base_that_is_a_task_itself(self, app):
        """What annotations say of it is not for the tasks that are built on it; what it declares is."""
        app.conf.task_annotations = {"base": {"mlcache": {"producer": True, "ttl": 99}}}

        class Base(CachedTask):
            name = "base"
            mlcache: ClassVar = {"ttl": 5, "tags": ["t"]}

            def run(self):
                return 1

        class Above(Base):
            name = "above"
            mlcache: ClassVar = {"jitter": 0.5}

        base, above = app.register_task(Base()), app.register_task(Above())
        assert above.cache.options == Options(ttl=5, tags=["t"], jitter=0.5)
        assert base.cache.options == Options(ttl=99, tags=["t"], producer=True)

    def test_options_that_go_together_from_several_places(self, app):
        """Whether they do is asked of all of them, and not of each place."""

        class Base(CachedTask):
            abstract = True
            mlcache: ClassVar = {"on_contention": "stale"}

        task = cached_task(app=app, base=Base, stale_ttl=30)(lambda_free)
        assert task.cache.options == Options(on_contention="stale", stale_ttl=30)
        with pytest.raises(ConfigurationError, match="lambda_free: on_contention='stale' needs a stale_ttl"):
            cached_task(app=app, base=Base)(lambda_free)
        app.conf.mlcache_tasks = {"late": {"on_contention": "stale"}}
        late = cached_task(app=app, name="late")(lambda_free)
        with pytest.raises(ConfigurationError, match="late: on_contention='stale' needs a stale_ttl"):
            _ = late.cache

    @pytest.mark.parametrize("given", [dict, Options], ids=["mapping", "Options"])
    def test_a_default_can_be_given_back(self, app, given):
        """An option that is given its default is given."""

        class Base(CachedTask):
            abstract = True
            mlcache: ClassVar = {"producer": True, "cache_none": False, "ttl": 7, "early": 2}

        own = given(producer=False, cache_none=True, ttl=None)
        assert app.task(base=Base, mlcache=own)(lambda_free).cache.options == Options(early=2)

    def test_options_of_the_app_s_own_task_class(self, runs):
        """``Celery(task_cls=...)`` is a base class too."""

        class Base(Task):
            mlcache: ClassVar = {"ttl": 11}

        with Celery("classy", task_cls=Base, set_as_current=False) as app:
            assert cached_task(app=app, jitter=0)(lambda_free).cache.options == Options(ttl=11, jitter=0)

    def test_what_a_base_says_must_fit_the_function(self, app):
        """It is refused where the function stands, and not in the worker."""

        class Base(Task):
            mlcache: ClassVar = {"tags": ["{nobody}"]}

        with pytest.raises(ConfigurationError, match="nobody"):
            cached_task(app=app, base=Base)(lambda_free)

    def test_a_hook_of_the_users_base_runs(self, app):
        """Ours takes the place of no ``on_bound`` that a base class has."""
        seen = []

        class Hooked(CachedTask):
            abstract = True

            @classmethod
            def on_bound(cls, app):
                seen.append(cls.name)

        task = cached_task(app=app, base=Hooked)(lambda_free)
        assert task.name in seen

    def test_a_method_of_an_object(self, app, runs):
        """A method that is bound to its object is a function like any other."""

        class Shop:
            def price(self, sku):
                runs[sku] += 1
                return sku

        task = cached_task(app=app)(Shop().price)
        assert [task("a"), task("a")] == ["a", "a"]
        assert runs["a"] == 1

    def test_a_wrapped_function(self, app, runs):
        """What another decorator has made with functools.wraps is a function; its arguments are those it shows."""
        price = self.price(runs)

        @functools.wraps(price)
        def wrapper(*args, **kwargs):
            return price(*args, **kwargs)

        task = cached_task(app=app)(wrapper)
        assert [task("a"), task("a", qty=1)] == [["a", 1]] * 2
        assert runs["a"] == 1

    def test_without_the_base_mlcache_is_inert(self, app, runs):
        """``@app.task(mlcache={...})`` is an attribute of a task of Celery's, which we never see."""
        task = app.task(mlcache={"ttl": 60})(self.price(runs))
        assert [task("a"), task("a")] == [["a", 1]] * 2
        assert runs["a"] == 2
        assert not hasattr(task, "cache")


def lambda_free():
    """Stand for any function."""
    return 1


class TestSpellings:
    """What is written wrongly raises TypeError, which says how to write it."""

    def refused(self, match, made, *args, **options):
        """Try both ``@cached_task(...)`` and, without options, the bare form."""
        with pytest.raises(TypeError, match=match):
            cached_task(*args, **options)(made)
        if not args and not options:
            with pytest.raises(TypeError, match=match):
                cached_task(made)

    @pytest.mark.parametrize(
        "below",
        [
            lambda app: app.task(lambda_free),
            lambda app: app.task(lambda_free, lazy=False),
            lambda app: app.task(rate_limit="1/s")(lambda_free),
            lambda app: shared_task(lambda_free),
            lambda app: cached_task(lambda_free),
            lambda app: cached_task(app=app)(lambda_free),
            lambda app: app.register_task(type("Times", (CachedTask,), {"run": lambda self: 1, "name": "times"})()),
        ],
        ids=inspect.getsource,
    )
    def test_above_a_task(self, app, below):
        """Above ``@app.task``, ``@shared_task``, itself, or a task: alone, it says."""
        self.refused(ALONE, below(app))

    def test_above_a_task_nothing_is_made(self, app):
        """To ask a proxy what it is would make the task, and finalize the app before it is configured."""
        for lazy in (app.task(lambda_free), shared_task(lambda_free)):
            self.refused(ALONE, lazy)
        assert not app.finalized
        assert not app._tasks

    @pytest.mark.parametrize(
        "above", [lambda app: app.task, lambda app: app.task(rate_limit="1/s"), lambda app: shared_task]
    )
    def test_below_another_decorator(self, app, above):
        """Below one, the task that Celery would make of a task is refused when the app is finalized."""
        task = above(app)(cached_task(app=app)(lambda_free))
        with pytest.raises(TypeError, match=ALONE):
            app.finalize()
        assert task is not None

    @pytest.mark.skipif(celery.VERSION < (5, 7), reason="5.7 is the first that says so; others may find the one task")
    def test_below_shared_task(self, app):
        """Where it has no app, Celery says so itself."""
        with pytest.raises(TypeError, match="Remove the extra @shared_task decorator"):
            shared_task(cached_task(lambda_free))

    @pytest.mark.parametrize("form", [lambda app: cached_task(app=app), lambda app: cached_task])
    def test_below_another_decorator_of_a_finalized_app(self, app, runs, form):
        """Celery gives back the task that has the name: one task, cached once."""
        app.finalize()

        def price(sku):
            runs[sku] += 1
            return sku

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Celery 5.7 warns that the name is taken
            task = app.task(form(app)(price))
        assert [task("a"), task("a"), task.cache.get("a")] == ["a", "a", "a"]
        assert runs["a"] == 1
        assert isinstance(app.tasks[task.name], CachedTask)

    def test_a_name_that_another_task_took(self, app):
        """A shared task whose name belongs to a task that is not cached says so, and does not run that one."""
        app.task(name="taken")(lambda_free)
        app.finalize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = cached_task(name="taken")(lambda_free)
        with pytest.raises(TypeError, match=rf"has taken the name taken .* {ALONE}"):
            ours()

    class Body:
        """What stands in a class body."""

        def method(self, sku):
            return sku

        def plain(sku):  # noqa: N805 - to be called on the class
            return sku

        static = staticmethod(lambda_free)
        klass = classmethod(lambda cls: cls)
        prop = property(lambda self: 1)
        lazy = functools.cached_property(lambda self: 1)

    @pytest.mark.parametrize("name", ["method", "static", "klass", "prop", "lazy"])
    def test_in_a_class(self, app, name):
        """A method, staticmethod, classmethod or property: Celery would pass no object."""
        thing = inspect.getattr_static(self.Body, name)
        self.refused(r"class Price\(CachedTask\) with a method run, .* app\.register_task\(Price\(\)\)", thing)

    def test_a_function_in_a_class_without_self(self, app):
        """What needs no object is a function, wherever it stands; and bind=True passes the task for self."""
        assert cached_task(app=app)(self.Body.plain)(1) == 1
        assert cached_task(app=app, bind=True)(self.Body.method)(1) == 1

    @pytest.mark.parametrize("kind", [CachedTask, Users, type("Times", (Mine,), {}), dict])
    def test_a_class(self, app, kind):
        """A class is registered, not decorated."""
        self.refused(rf"not the class {kind.__name__}: .*app\.register_task\(Price\(\)\)", kind)

    async def coroutine(self):
        """Return a coroutine."""

    async def stream(self):
        yield 1

    def generator(self):
        yield 1

    @pytest.mark.parametrize(
        ("name", "spelling"),
        [
            ("coroutine", r"a coroutine is no result, .* return asyncio\.run\(\.\.\.\)"),
            ("stream", "write a function that returns a list"),
            ("generator", "write a function that returns a list"),
        ],
    )
    def test_what_returns_no_result(self, app, name, spelling):
        """An async function or a generator function, bound to an object or not."""
        self.refused(spelling, getattr(self, name))
        self.refused(rf"function TestSpellings\.{name}: .*{spelling}", getattr(type(self), name))

    class Callable:
        """An object that can be called."""

        def __call__(self):
            return 1

    @pytest.mark.parametrize(
        "made",
        [functools.partial(print, 1), functools.partialmethod(print, 1), len, Callable()],
        ids=["partial", "partialmethod", "built-in", "object"],
    )
    def test_what_has_no_name(self, app, made):
        """A partial, a builtin, an object that can be called."""
        self.refused(r"write a function \(def\) that calls it", made)

    def test_a_lambda(self, app):
        """Celery compiles a def of its name, which a lambda has not, whatever name the task has."""
        with pytest.raises(SyntaxError):
            head_from_fun(lambda: 1)
        self.refused(r"not <lambda>: write a function \(def\)", lambda: 1)
        self.refused(r"not <lambda>: write a function \(def\)", lambda: 1, app=app, name="named")

    @pytest.mark.parametrize(
        ("given", "spelling"),
        [
            ("shop.price", r"write @cached_task\(name='shop\.price', \.\.\.\)"),
            (300, r"write @cached_task\(ttl=300, \.\.\.\)"),
            (timedelta(1), r"write @cached_task\(ttl=datetime\.timedelta\(days=1\), \.\.\.\)"),
            ({"ttl": 5}, r"write @cached_task\(\*\*options\)"),
            (celery.current_app, r"write @cached_task\(app=app, \.\.\.\)"),
            (["prices"], ALONE),
        ],
    )
    def test_without_a_name(self, app, given, spelling):
        """Options are given by name."""
        with pytest.raises(TypeError, match=spelling):
            cached_task(given, rate_limit="1/s")

    def test_an_app_without_a_name(self, app):
        """The app too."""
        with pytest.raises(TypeError, match=r"write @cached_task\(app=app, \.\.\.\)"):
            cached_task(app)

    @pytest.mark.parametrize("wrong", ["shop", 5, Celery])
    def test_what_is_no_app(self, wrong):
        """Neither a name nor the class is an app."""
        with pytest.raises(TypeError, match=r"app must be a Celery app, .*write @cached_task\(app=app, \.\.\.\)"):
            cached_task(app=wrong)

    @pytest.mark.parametrize("wrong", ["base.Task", int, 5, Users()])
    def test_what_is_no_base(self, wrong):
        """A base is a task class."""
        with pytest.raises(TypeError, match=r"base must be a task class, .*@cached_task\(base=Base, \.\.\.\)"):
            cached_task(base=wrong)

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"tags": ["sku:{skuu}"]}, "'skuu'"),
            ({"ignore": ["skuu"]}, "skuu"),
            ({"key": "price:{skuu}"}, "skuu"),
            ({"key": lambda shop: shop}, "key"),
            ({"ttl": -1, "jitter": 2}, "ttl .*jitter"),
        ],
        ids=["tags", "ignore", "key", "key function", "two at once"],
    )
    def test_options_that_do_not_fit_the_function(self, app, options, complaint):
        """They are refused where they are written, before the task is made."""

        def price(sku, qty=1):
            return sku

        for given in (options, {"mlcache": options}):
            with pytest.raises(ConfigurationError, match=f"(?s)price: .*{complaint}"):
                cached_task(app=app, **given)(price)
        assert not app._pending

    def test_options_twice(self):
        """Keywords or ``mlcache``, not both."""
        with pytest.raises(TypeError, match=r"write @cached_task\(tags=\.\.\., \.\.\.\) only"):
            cached_task(tags=["a"], mlcache={"ttl": 60})

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("tll", "ttl"),
            ("tag", "tags"),
            ("stale", "stale_ttl"),
            ("ignores", "ignore"),
            ("cacheif", "cache_if"),
            ("maxsize", "max_size"),
            ("on_contentoin", "on_contention"),
            *((name[:-1] + "_", name) for name in OPTION_NAMES if len(name) > 3),
        ],
    )
    def test_a_misspelled_option(self, name, meant):
        """Celery would make an attribute of it, and nothing would come of it."""
        with pytest.raises(TypeError, match=f"no option {name!r}: did you mean {meant!r}"):
            cached_task(**{name: 5})

    def test_an_attribute_that_looks_like_an_option(self, app):
        """Declared on a base class, it is meant."""

        class Tagged(Task):
            abstract = True
            tag = None

        assert cached_task(app=app, base=Tagged, tag="mine")(lambda_free).tag == "mine"

    def test_no_option_of_celery_looks_like_one_of_ours(self):
        """And every attribute of Task, every option of ``@app.task`` passes."""
        names = [*vars(Task), *inspect.signature(Celery._task_from_fun).parameters, "retry_jitter", "queue", "filter"]
        for name in set(names) - {"self", "fun", "base", *OPTION_NAMES}:
            cached_task(**{name: None})

    def test_the_name_of_the_cache(self):
        """``cache=`` would hide what every cached task has."""
        with pytest.raises(TypeError, match=r"would hide .* as in @cached_task\(ttl=\.\.\.\)"):
            cached_task(cache=True)
