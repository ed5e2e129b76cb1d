"""How a fleet reads its settings from a Celery app, and what Celery may show of them."""

from __future__ import annotations

import warnings

import pytest
from celery import Celery

from celery_mlcache import CacheConfig, setup_cache
from celery_mlcache.config import ConfigurationWarning
from celery_mlcache.errors import ConfigurationError
from celery_mlcache.fleet.app import find_fleet

SECRET = "s3ntinel-pa55word"


def make(main="shop", **conf):
    """Return an app that was never looked at, with *conf* set on it."""
    app = Celery(main, broker="memory://", set_as_current=False)
    app.conf.update(conf)
    return app


def settled(app, **overrides):
    """Return the settings that a worker of *app* would use."""
    setup_cache(app, **overrides)
    return find_fleet(app).config


class DjangoSettings:
    CELERY_BROKER_URL = "redis://broker:1/2"
    CELERY_MLCACHE_L1_TTL = 7
    CELERY_MLCACHE_REDIS_URL = f"redis://:{SECRET}@cache:3/4"


class TestSources:
    def test_the_order(self, monkeypatch):
        """Arguments beat environment beats app.conf beats the Redis that Celery uses beats defaults."""
        monkeypatch.setenv("LIB_L1_TTL", "2")
        monkeypatch.setenv("LIB_L2_TTL", "2")
        conf = {f"mlcache_{name}": 3 for name in ("l1_ttl", "l2_ttl", "l1_max_size")}
        config = settled(make(result_backend="redis://results:4/4", **conf), l1_ttl=1)
        assert (config.l1_ttl, config.l2_ttl, config.l1_max_size, config.max_stale) == (1, 2, 3, 30)
        assert (config.redis_location().host, config.redis_location().port, config.redis_location().db) == (
            "results",
            4,
            4,
        )
        sources = [config.source_of(name) for name in ("l1_ttl", "l2_ttl", "l1_max_size", "redis_url", "max_stale")]
        assert sources == ["argument", "environment", "app.conf", "Celery's result_backend", "default"]

    @pytest.mark.parametrize(
        ("conf", "variable", "argument", "host"),
        [
            ({}, None, None, "localhost"),
            ({"broker_url": "redis://broker"}, None, None, "broker"),
            ({"broker_url": "redis://broker", "result_backend": "redis://results"}, None, None, "results"),
            ({"result_backend": "redis://results", "mlcache_redis_url": "redis://conf"}, None, None, "conf"),
            ({"result_backend": "redis://results", "mlcache_redis_host": "conf"}, None, None, "conf"),
            ({"mlcache_backend_url": "redis://conf"}, "redis://variable", None, "variable"),
            ({"mlcache_backend_url": "redis://conf"}, "redis://variable", "redis://argument", "argument"),
        ],
        ids=["default", "broker", "results", "conf-url", "conf-host", "environment", "argument"],
    )
    def test_where_redis_is(self, monkeypatch, conf, variable, argument, host):
        """Where L2 is comes from the highest source that says it."""
        if variable:
            monkeypatch.setenv("LIB_REDIS_URL", variable)
        overrides = {"redis_url": argument} if argument else {}
        assert settled(make(**conf), **overrides).redis_location().host == host

    def test_a_finished_config_is_all(self, monkeypatch):
        """With a CacheConfig nothing else is read."""
        monkeypatch.setenv("LIB_L1_TTL", "5")
        config = CacheConfig(l1_ttl=6, cache_namespace="own")
        app = make(mlcache_l1_ttl=4, mlcache_l1_max_size=4)
        setup_cache(app, config)
        assert find_fleet(app).config is config
        assert config.l1_max_size == 10000

    @pytest.mark.parametrize(
        ("main", "namespace"),
        [
            ("shop", "shop"),
            ("my.shop-1", "my.shop-1"),
            ("a shop {x}", "a-shop--x"),
            ("__main__", "main"),
            ("x" * 300, "x" * 100),
            (None, "default"),
            ("", "default"),
            ("{}", "default"),
        ],
    )
    def test_the_namespace_is_the_apps_name(self, main, namespace):
        """Without a namespace it is made from the app's name; an app without one has the default's."""
        assert settled(make(main)).cache_namespace == namespace
        assert settled(make(main, mlcache_cache_namespace="said")).cache_namespace == "said"

    def test_two_names_do_not_collide(self):
        """Two apps have two namespaces, hence nothing in common in one Redis."""
        assert settled(make("shop")).cache_namespace != settled(make("warehouse")).cache_namespace

    def test_upper_case(self):
        """``MLCACHE_L1_TTL`` is the same setting; both spellings at once are refused."""
        assert settled(make(MLCACHE_L1_TTL=9)).l1_ttl == 9
        with pytest.raises(ConfigurationError, match="says the same"):
            settled(make(MLCACHE_L1_TTL=9, mlcache_l1_ttl=8))

    def test_django(self):
        """With ``namespace="CELERY"`` the settings are called ``CELERY_MLCACHE_...``."""
        app = Celery("shop", set_as_current=False)
        cache = setup_cache(app)
        app.config_from_object(DjangoSettings, namespace="CELERY")
        config = find_fleet(app).config
        assert (config.l1_ttl, config.source_of("l1_ttl")) == (7, "app.conf")
        location = config.redis_location()
        assert (location.host, location.port, location.db, location.password) == ("cache", 3, 4, SECRET)
        assert SECRET not in app.bugreport()
        assert app.mlcache is cache

    def test_django_without_a_cache_of_its_own(self):
        """With a namespace the Redis that Celery uses is found as well."""
        app = Celery("shop", set_as_current=False)
        setup_cache(app)
        app.config_from_object({"CELERY_BROKER_URL": "redis://broker:1/2"}, namespace="CELERY")
        assert find_fleet(app).config.redis_location().host == "broker"

    @pytest.mark.parametrize(
        ("key", "meant"), [("mlcache_l1_tll", "mlcache_l1_ttl"), ("mlcache_redis_hots", "mlcache_redis_host")]
    )
    def test_a_misspelt_key_warns(self, key, meant):
        """A ``mlcache_*`` key that is no setting warns, and names the one that was meant."""
        with pytest.warns(ConfigurationWarning, match=f"{key} in app.conf is not a setting; did you mean {meant}"):
            settled(make(**{key: 5}))

    def test_a_warning_comes_once(self):
        """setup_cache() and the final reading do not both warn of the same variable."""
        app = make(mlcache_l1_tll=5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settled(app)
        assert len(caught) == 1

    def test_every_problem_at_once(self, monkeypatch):
        """All wrong settings of app.conf and the environment are named in one error."""
        app = make(mlcache_l1_ttl=-1, mlcache_l2_ttl="x")
        setup_cache(app)
        with pytest.raises(ConfigurationError) as caught:
            _ = find_fleet(app).config
        assert [problem.partition("=")[0] for problem in sorted(caught.value.problems)] == [
            "mlcache_l1_ttl",
            "mlcache_l2_ttl",
        ]
        monkeypatch.setenv("LIB_REDIS_PORT", "99999")
        with pytest.raises(ConfigurationError, match="LIB_REDIS_PORT=99999"):
            setup_cache(make())


class TestPasswords:
    @pytest.mark.parametrize("key", ["mlcache_redis_url", "mlcache_backend_url", "MLCACHE_REDIS_URL"])
    @pytest.mark.parametrize("when", ["before", "between", "source"])
    def test_a_password_moves_to_where_celery_masks_it(self, key, when):
        """Wherever app.conf gets the URL from, and whenever, reports do not show its password, and L2 gets it."""
        url = f"redis://:{SECRET}%21@cache:3/4"
        app = make(**({key: url} if when == "before" else {}))
        setup_cache(app)
        if when == "between":
            app.conf[key] = url
        elif when == "source":
            app.config_from_object({key: url, "broker_url": "memory://"})
        assert SECRET not in app.bugreport()
        assert SECRET not in str(app.conf.table(with_defaults=True, censored=True))
        location = find_fleet(app).config.redis_location()
        assert (location.password, location.host, location.port, location.db) == (SECRET + "!", "cache", 3, 4)
        assert SECRET not in app.bugreport()

    @pytest.mark.parametrize("userinfo", ["user", f"user:{SECRET}"])
    def test_a_user_in_the_url_is_no_reason_to_warn(self, userinfo):
        """A URL with a user warns of no password: there was none, or it has been moved."""
        config = settled(make(mlcache_redis_url=f"redis://{userinfo}@cache:3/4"))
        assert config.redis_location().username == "user"

    def test_an_app_that_is_configured_already(self):
        """An app whose settings were read before setup_cache() is cleaned as well."""
        app = make(mlcache_redis_url=f"redis://:{SECRET}@cache:3/4")
        assert app.conf.task_default_queue == "celery"
        setup_cache(app)
        assert SECRET not in app.bugreport()
        assert find_fleet(app).config.redis_location().password == SECRET

    def test_a_late_setting_is_cleaned_when_the_worker_reads_it(self):
        """A URL that is set after the settings were read is cleaned at a worker's start."""
        app = make()
        setup_cache(app)
        assert app.conf.task_default_queue == "celery"
        app.conf.mlcache_redis_url = f"redis://:{SECRET}@cache:3/4"
        assert find_fleet(app).config.redis_location().password == SECRET
        assert SECRET not in app.bugreport()

    def test_a_password_of_its_own_stays(self):
        """A password in ``mlcache_redis_password`` is masked by Celery, and not replaced by the URL's."""
        app = make(mlcache_redis_password=SECRET, mlcache_redis_url="redis://cache")
        config = settled(app)
        assert config.redis_location().password == SECRET
        assert SECRET not in app.bugreport()
        assert SECRET not in repr(config)

    def test_an_unset_password_changes_nothing(self):
        """URLs without a password stay as they are."""
        app = make(mlcache_redis_url="redis://user@cache:3/4?client_name=x")
        setup_cache(app)
        assert app.conf.mlcache_redis_url == "redis://user@cache:3/4?client_name=x"
