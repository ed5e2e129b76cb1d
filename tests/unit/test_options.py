"""Options of cached tasks: what is allowed, what a wrong one is told, and which place wins."""

from __future__ import annotations

import uuid
from datetime import timedelta
from types import SimpleNamespace

import pytest
from celery import Celery, _state
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from celery_mlcache import CachedTask, cached_task, setup_cache
from celery_mlcache.errors import CallInProgressError, ConfigurationError, NotCachedError, RemoteStoreError
from celery_mlcache.fleet import lifecycle
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.fleet.options import CONTENTIONS, OPTION_NAMES, Options

MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def _no_shared_leftovers(monkeypatch):
    """What a test shares with every app is gone after it."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))


@pytest.fixture
def app():
    """An app with a cache in memory: no Redis, no broker outside of this process."""
    app = Celery(f"o{uuid.uuid4().hex[:8]}", broker="memory://", set_as_current=False)
    setup_cache(app, l2_enabled=False)
    yield app
    app.mlcache.close()
    app.close()


def of(**options):
    """Return the options of a task that gives these."""
    return Options().changed(options, "shop.price").whole("shop.price")


GOOD = [
    ("ttl", 5, 5.0),
    ("ttl", MINUTE, 60.0),
    ("ttl", None, None),
    ("ttl", len, len),
    ("jitter", 0, 0),
    ("jitter", 1, 1),
    ("cache_if", bool, bool),
    ("cache_none", False, False),
    ("negative", {KeyError: MINUTE, OSError: 1}, {KeyError: 60.0, OSError: 1.0}),
    ("max_size", 1, 1),
    ("tags", ["a", "a", "b"], ("a", "b")),
    ("ignore", {"x"}, ("x",)),
    ("key", "p:{sku}", "p:{sku}"),
    ("version", 0, 0),
    ("version", "source", "source"),
    ("vary", {"tenant": int}, {"tenant": int}),
    ("vary", int, {"0:int": int}),
    ("stale_ttl", MINUTE, 60.0),
    ("stale_if_error", KeyError, (KeyError,)),
    ("stale_if_error", [KeyError, OSError], (KeyError, OSError)),
    ("stale_if_error", False, False),
    ("early", True, 1.0),
    ("early", 0.5, 0.5),
    ("refresh_queue", "slow", "slow"),
    ("refresh_priority", 0, 0),
    ("on_contention", "raise", "raise"),
    ("max_wait", MINUTE, 60.0),
    ("max_wait", 0, 0),
    ("producer", True, True),
    ("coalesce", True, True),
]

# Option, wrong value, what is told: the option, what is allowed, and the value.
BAD = [
    ("ttl", 0, "ttl must be a number of seconds > 0.* not 0"),
    ("ttl", -MINUTE, r"ttl must be .* not -60\.0"),
    ("ttl", "5", "ttl must be .* not '5'"),
    ("ttl", True, "ttl must be .* not True"),
    ("jitter", 1.1, r"jitter must be a number between 0 and 1.* not 1\.1"),
    ("jitter", False, "jitter must be .* not False"),
    ("jitter", float("nan"), "jitter must be .* not nan"),
    ("cache_if", 5, "cache_if.* must be a function of the result, not 5"),
    ("cache_none", 1, "cache_none must be True or False, not 1"),
    ("negative", [KeyError], r"negative must be a mapping of exception classes to seconds, not \[<class 'KeyError'>\]"),
    ("negative", {"KeyError": 5}, "negative takes classes of Exception, not 'KeyError'"),
    ("negative", {KeyboardInterrupt: 5}, "negative takes classes of Exception, not <class 'KeyboardInterrupt'>"),
    ("negative", {KeyError: 0}, "negative: KeyError must live a number of seconds > 0 and <= 3.1536e\\+08, not 0"),
    ("negative", {KeyError: None}, "negative: KeyError must live a number of seconds > 0 .*, not None"),
    *(
        ("negative", {k: 5}, f"negative cannot take {k.__name__}")
        for k in (Retry, Ignore, Reject, SoftTimeLimitExceeded)
    ),
    ("max_size", 0, "max_size must be a number of bytes > 0, or None, not 0"),
    ("max_size", 1.5, r"max_size must be .* not 1\.5"),
    ("tags", "sku", "tags must be a list, tuple or set of str, not 'sku'"),
    ("tags", [""], "tag '' must not be empty"),
    ("tags", ["x"] * 3 + [7], "tag '7' must be a str"),
    ("ignore", "x", "ignore must be a list or tuple of argument names, not 'x'"),
    ("ignore", [1], r"ignore takes names of arguments, not \[1\]"),
    ("key", "", "key must be a template such as 'price:{sku}' or a function, not ''"),
    ("key", 5, "key must be .* not 5"),
    ("version", 1.5, r"version must be a text, a whole number or 'source', not 1\.5"),
    ("version", True, "version must be .* not True"),
    ("version", "", "version must be .* not ''"),
    ("vary", "tenant", "vary must be functions without arguments, by name, not 'tenant'"),
    ("vary", {"tenant": "eu"}, "vary takes functions without arguments, by name, not 'tenant': 'eu'"),
    ("stale_ttl", -1, "stale_ttl must be a number of seconds >= 0.* not -1"),
    ("stale_if_error", None, "stale_if_error must be True, False or classes of Exception, not None"),
    ("stale_if_error", [KeyError, BaseException], "stale_if_error must be .* not .*BaseException"),
    ("early", -1, "early must be True, False or a factor between 0 and 100, not -1"),
    ("early", "yes", "early must be .* not 'yes'"),
    ("refresh_queue", "", "refresh_queue must be the name of a queue, or None, not ''"),
    ("refresh_priority", 256, "refresh_priority must be a whole number between 0 and 255, or None, not 256"),
    ("refresh_priority", True, "refresh_priority must be .* not True"),
    ("on_contention", "queue", f"on_contention must be one of {', '.join(CONTENTIONS)}, not 'queue'"),
    ("on_contention", ["wait"], r"on_contention must be .* not \['wait'\]"),
    ("on_contention", "stale", "on_contention='stale' needs a stale_ttl"),
    ("max_wait", -1, "max_wait must be a number of seconds between 0 and 86400, or None, not -1"),
    ("max_wait", float("nan"), "max_wait must be .* not nan"),
    ("producer", "yes", "producer must be True or False, not 'yes'"),
    ("coalesce", None, "coalesce must be True or False, not None"),
]


class TestValues:
    @pytest.mark.parametrize(("name", "value", "kept"), GOOD)
    def test_what_is_allowed(self, name, value, kept):
        """A right value is taken, times as seconds, and taken again when the options are changed."""
        options = of(**{name: value})
        assert getattr(options, name) == kept
        assert getattr(options.changed({"max_size": 9}, "t"), name) == (9 if name == "max_size" else kept)

    @pytest.mark.parametrize(("name", "value", "told"), BAD)
    def test_what_is_not(self, name, value, told):
        """A wrong value is refused, with the task, the option, what is allowed and what was given."""
        with pytest.raises(ConfigurationError, match=f"shop.price: .*{told}"):
            of(**{name: value})

    def test_every_option_has_been_tried(self):
        """No option is without a right and a wrong value above."""
        assert {name for name, _, _ in GOOD} == {name for name, _, _ in BAD} == set(OPTION_NAMES)

    def test_all_at_once(self):
        """Several wrong options are told together."""
        with pytest.raises(ConfigurationError) as caught:
            of(ttl=0, jitter=2, producer=1)
        assert len(caught.value.problems) == 3
        assert all(problem.startswith("shop.price: ") for problem in caught.value.problems)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [("tll", "did you mean ttl"), ("stale", "did you mean stale_ttl"), ("negativ", "did you mean negative")],
    )
    def test_an_unknown_one_is_hinted_at(self, name, hint):
        """A misspelled option is named with the nearest one, and all that there are."""
        with pytest.raises(
            ConfigurationError, match=rf"shop\.price: mlcache option {name} is unknown; {hint}.*coalesce"
        ):
            of(**{name: 1})

    def test_an_unknown_one_without_a_neighbour(self):
        """What resembles nothing gets the list only; the names of the class's own parts are no options."""
        for name in ("zzz", "stated"):
            with pytest.raises(ConfigurationError, match=f"{name} is unknown; there are ttl, "):
                of(**{name: 1})

    @pytest.mark.parametrize("given", [5, "ttl", [("ttl", 5)]])
    def test_no_mapping(self, given):
        """Options that are no mapping are refused."""
        with pytest.raises(ConfigurationError, match=r"shop\.price: mlcache must be a mapping of options, not"):
            Options().changed(given, "shop.price")


class TestJudgements:
    def test_the_nearest_class_decides(self):
        """An exception lives as long as the nearest class of its MRO says, in whatever order they were given."""

        class GoneError(FileNotFoundError):
            pass

        options = of(negative={Exception: 1, FileNotFoundError: 3, OSError: 2})
        lives = [
            options.negative_life(error) for error in (GoneError(), FileNotFoundError(), TimeoutError(), KeyError())
        ]
        assert lives == [3.0, 3.0, 2.0, 1.0]
        assert of(negative={OSError: 2}).negative_life(KeyError()) is None

    @pytest.mark.parametrize("error", [Retry(), Ignore(), Reject(), SoftTimeLimitExceeded()])
    def test_what_tells_the_worker_what_to_do_is_no_result(self, error):
        """It is neither cached nor covered by a stale result, though ``Exception`` was named."""
        options = of(negative={Exception: 30}, stale_ttl=5, stale_if_error=True)
        assert options.negative_life(error) is None
        assert not options.forgives(error)
        assert not of(stale_ttl=5, stale_if_error=Exception).forgives(error)

    @pytest.mark.parametrize(
        ("error", "is_forgiven"),
        [
            (CallInProgressError("k", "somebody", 1.0), False),
            (NotCachedError("shop.price", "k", "it is not"), False),
            (RemoteStoreError("read", "down"), True),
        ],
        ids=["in-progress", "not-cached", "l2"],
    )
    def test_what_the_cache_says_is_no_result(self, error, is_forgiven):
        """It is of this moment, so it is never cached; what says how a call wants the cache no stale result covers."""
        options = of(negative={Exception: 30}, stale_ttl=5, stale_if_error=True)
        assert options.negative_life(error) is None
        assert options.forgives(error) is is_forgiven
        assert of(stale_ttl=5, stale_if_error=Exception).forgives(error) is is_forgiven

    def test_which_errors_are_forgiven(self):
        """Every one, none, or those of the classes and what is derived from them."""
        assert of().forgives(KeyError())
        assert not of(stale_if_error=False).forgives(KeyError())
        assert not of(stale_if_error=()).forgives(KeyError())
        assert of(stale_if_error=LookupError).forgives(KeyError())
        assert not of(stale_if_error=LookupError).forgives(OSError())


class TestPrecedence:
    def task(self, app, **options):
        """Return a task that was decorated with these."""

        @cached_task(app=app, name="shop.price", **options)
        def price(sku):
            return sku

        return price

    def test_all_places(self, app):
        """``"*"``, the decorator, the task's own entry, Celery's annotations: the later one wins, for each option."""
        app.conf.mlcache_tasks = {
            "*": {"ttl": 1, "jitter": 0.1, "max_size": 1, "max_wait": 1},
            "shop.price": {"max_size": 3, "max_wait": 3},
            "shop.other": {"cache_none": False},
        }
        app.conf.task_annotations = {"shop.price": {"mlcache": {"max_wait": 4}}}
        found = self.task(app, jitter=0.2, max_size=2, max_wait=2).cache.options
        assert (found.ttl, found.jitter, found.max_size, found.max_wait) == (1.0, 0.2, 3, 4)
        assert found.cache_none

    def test_an_option_that_says_the_default_is_said(self, app):
        """A decorator that spells out a default overrides ``"*"``."""
        app.conf.mlcache_tasks = {"*": {"early": True, "cache_none": False, "ttl": 7, "negative": {KeyError: 1}}}
        found = self.task(app, early=False, cache_none=True, negative={}).cache.options
        assert (found.early, found.cache_none, found.ttl, dict(found.negative)) == (0.0, True, 7.0, {})

    @pytest.mark.parametrize("way", ["base", "class", "options"])
    def test_other_spellings(self, app, way):
        """``"*"`` reaches ``base=CachedTask``, class-based tasks and finished Options too."""
        app.conf.mlcache_tasks = {"*": {"ttl": 1, "jitter": 0.1}}
        if way == "class":

            class Price(CachedTask):
                name = "shop.price"
                mlcache = {"ttl": 2}  # noqa: RUF012 - as users write it

                def run(self, sku):
                    return sku

            task = app.register_task(Price())
        else:

            def price(sku):
                return sku

            own = {"ttl": 2} if way == "base" else Options(ttl=2)
            task = app.task(base=CachedTask, name="shop.price", mlcache=own)(price)
        assert (task.cache.options.ttl, task.cache.options.jitter) == (2.0, 0.1)

    def test_annotations_for_all(self, app):
        """``task_annotations["*"]`` counts as an annotation: it wins over the decorator."""
        app.conf.task_annotations = {"*": {"mlcache": {"ttl": 9}}}
        found = self.task(app, ttl=2, jitter=0.2).cache.options
        assert (found.ttl, found.jitter) == (9.0, 0.2)

    @pytest.mark.parametrize(
        ("tasks", "told"),
        [
            ({"*": {"tll": 1}}, r"mlcache_tasks\['\*'\]: mlcache option tll is unknown; did you mean ttl\?"),
            ({"*": {"ttl": 0}}, r"mlcache_tasks\['\*'\]: ttl must be"),
            ({"shop.price": {"jitter": 2}}, r"mlcache_tasks\['shop\.price'\]: jitter must be"),
            ({"shop.price": 5}, r"mlcache_tasks\['shop\.price'\]: mlcache must be a mapping of options, not 5"),
            ({"shop.price": {"tags": ["{nope}"]}}, r"shop\.price: the tag '{nope}' names 'nope'"),
            ([1], r"mlcache_tasks must be a mapping of task names to options, not \[1\]"),
        ],
    )
    def test_wrong_ones_in_the_configuration(self, app, tasks, told):
        """They are named with their place, before the task does anything, and when a worker checks."""
        app.conf.mlcache_tasks = tasks
        task = self.task(app)
        for check in (lambda: task.cache, task.mlcache_check, lambda: task("a"), lambda: task.delay("a")):
            with pytest.raises(ConfigurationError, match=told):
                check()

    @pytest.mark.parametrize("name", ["pirce", "*", "shop.price"])
    def test_options_of_a_task_that_a_worker_does_not_have(self, app, caplog, name):
        """A name in ``mlcache_tasks`` that no task has is logged where a worker starts; it may be another worker's."""
        self.task(app)
        app.conf.mlcache_tasks = {name: {"ttl": 1}}
        app.finalize()
        lifecycle.on_worker_init(sender=type("Worker", (), {"app": app, "pool_cls": "solo"}))
        logged = [each.tasks for each in caplog.records if each.message.startswith("mlcache_tasks names tasks that")]
        assert logged == ([["pirce"]] if name == "pirce" else [])

    def test_a_wrong_annotation(self, app):
        """It names the task."""
        app.conf.task_annotations = {"shop.price": {"mlcache": {"ttl": "x"}}}
        with pytest.raises(ConfigurationError, match=r"shop\.price: ttl must be"):
            self.task(app).mlcache_check()

    def test_django(self, app):
        """With Celery's namespaced settings the options are found under ``CELERY_MLCACHE_TASKS``."""
        settings = SimpleNamespace(
            CELERY_MLCACHE_TASKS={"*": {"ttl": 3}, "shop.price": {"jitter": 0.3}},
            CELERY_MLCACHE_L2_ENABLED=False,
            CELERY_BROKER_URL="memory://",
        )
        other = Celery("django", set_as_current=False)
        other.config_from_object(settings, namespace="CELERY")
        setup_cache(other)
        found = self.task(other).cache.options
        assert (found.ttl, found.jitter) == (3.0, 0.3)
        assert not fleet_of(other).config.l2_enabled
        other.close()

    def test_options_are_no_settings_of_the_cache(self, app):
        """``mlcache_tasks`` is read by tasks, and no complaint of the cache's settings."""
        app.conf.mlcache_tasks = {"*": {"ttl": 3}}
        assert not fleet_of(app).config.l2_enabled
        assert self.task(app)("a") == "a"


def test_negative_takes_no_error_of_the_cache_itself():
    """Such an error says something of a moment, and nothing of the call."""
    with pytest.raises(ConfigurationError, match="negative cannot take CallInProgressError"):
        Options(negative={CallInProgressError: 5})
