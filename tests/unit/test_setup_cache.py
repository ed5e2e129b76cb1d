"""``setup_cache``: what it does to an app, what it does not do, and the processes that may have no L1."""

from __future__ import annotations

import logging
import pickle
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing

import pytest
from celery import Celery, _state
from celery.app import base as app_base

from celery_mlcache import CacheConfig, cached_task, setup_cache
from celery_mlcache.errors import CacheClosedError, ConfigurationError
from celery_mlcache.fleet import lifecycle
from celery_mlcache.fleet.app import find_fleet, fleet_of
from tests.support.scripts import run_python


@pytest.fixture(autouse=True)
def _unconfined(monkeypatch):
    """A process is confined for good; this one only for a test."""
    monkeypatch.setattr(lifecycle, "_confined_pid", None)


@pytest.fixture(autouse=True)
def _no_shared_leftovers(monkeypatch):
    """What a test shares with every app is gone after it."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app without a cache yet."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    yield app
    if find_fleet(app) is not None:
        app.mlcache.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that must see no connection."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.setblocking(False)
        yield server


class TestSetup:
    def test_it_is_the_apps(self, app):
        """The manager is returned and stored as ``app.mlcache``, not started, with the app's name."""
        cache = setup_cache(app)
        assert cache is app.mlcache is find_fleet(app).cache
        assert not cache.is_running
        assert "shop" in repr(cache)

    @pytest.mark.parametrize("wrong", ["x", None, Celery])
    def test_what_is_no_app(self, wrong):
        """Anything but an app is refused."""
        with pytest.raises(TypeError, match="setup_cache takes a Celery app, not "):
            setup_cache(wrong)

    def test_idempotent(self, app):
        """Called again, with nothing or with the same, it returns what is there, used or not."""
        cache = setup_cache(app, l2_enabled=False)
        assert setup_cache(app) is setup_cache(app, l2_enabled=False) is cache
        cache.set("k", 1)
        assert setup_cache(app) is setup_cache(app, l2_enabled=False) is cache
        assert cache.get("k") == 1

    def test_other_settings_before_use(self, app):
        """Other settings replace the first ones as long as nothing was used; the manager stays the same object."""
        cache = setup_cache(app, l1_ttl=5)
        assert find_fleet(app).config.l1_ttl == 5
        assert setup_cache(app, l1_ttl=6, l2_enabled=False) is cache
        assert find_fleet(app).config.l1_ttl == 6
        config = CacheConfig(l1_ttl=7, l2_enabled=False)
        assert setup_cache(app, config) is cache
        assert find_fleet(app).config is config

    def test_other_settings_after_use(self, app):
        """Other settings after the first use are refused, and change nothing."""
        cache = setup_cache(app, l2_enabled=False)
        cache.set("k", 1)
        with pytest.raises(ConfigurationError, match="after the cache had been used"):
            setup_cache(app, l2_enabled=False, l1_ttl=5)
        assert cache.get("k") == 1
        assert find_fleet(app).config.l1_ttl == 300

    def test_wrong_arguments(self, app):
        """Wrong arguments are refused at once, all together, and leave the app without a cache."""
        with pytest.raises(ConfigurationError) as caught:
            setup_cache(app, l1_ttl=-1, redis_port=0, nonsense=1)
        assert len(caught.value.problems) == 3
        with pytest.raises(ConfigurationError, match="not both"):
            setup_cache(app, CacheConfig(), l1_ttl=5)
        assert find_fleet(app) is None
        assert not hasattr(app, "mlcache")

    def test_the_configuration_is_not_read_too_early(self, app):
        """setup_cache() leaves the app unconfigured: config_from_object() and app.conf still count after it."""
        setup_cache(app)
        assert not app.configured
        app.config_from_object({"mlcache_l1_ttl": 7, "timezone": "Europe/Berlin"})
        app.conf.mlcache_l1_max_size = 70
        config = find_fleet(app).config
        assert (config.l1_ttl, config.l1_max_size, app.conf.timezone) == (7, 70, "Europe/Berlin")

    def test_two_apps(self):
        """Two apps in one process have two caches, with settings and contents of their own."""
        apps = [Celery(name, broker="memory://", set_as_current=False) for name in ("one", "two")]
        caches = [
            setup_cache(app, l2_enabled=False, l1_max_size=size) for app, size in zip(apps, (10, 20), strict=True)
        ]
        assert caches[0] is not caches[1]
        caches[0].set("k", 1)
        assert [cache.get("k") for cache in caches] == [1, None]
        assert [find_fleet(app).config.l1_max_size for app in apps] == [10, 20]
        for cache in caches:
            cache.close()

    def test_a_proxy_is_its_app(self, app, monkeypatch):
        """``current_app`` and the app itself have one fleet."""
        from celery import current_app

        monkeypatch.setattr(_state._tls, "current_app", app)
        assert setup_cache(current_app) is setup_cache(app)
        assert fleet_of(current_app) is fleet_of(app)

    def test_setup_after_a_task_has_set_it_up(self, app):
        """What a cached task set up on its own takes the settings of a later setup_cache(), until it is used."""

        @cached_task(app=app)
        def anything():
            return 1

        implicit = anything.cache.manager
        assert find_fleet(app).is_implicit
        assert setup_cache(app, l2_enabled=False) is implicit
        assert not find_fleet(app).is_implicit
        assert anything() == 1
        assert implicit.stats()["l1_entries"] == 1

    def test_the_switch(self, app):
        """``cache_enabled=False``: every call runs, nothing is kept, nothing is started."""
        setup_cache(app, cache_enabled=False)
        runs = []

        @cached_task(app=app)
        def anything():
            runs.append(1)

        anything()
        anything()
        assert len(runs) == 2
        assert app.mlcache.stats()["backplane"] == "off"

    def test_closed(self, app):
        """After close() the app's cache says so."""
        setup_cache(app, l2_enabled=False).close()
        with pytest.raises(CacheClosedError):
            app.mlcache.get("k")


class TestQuietImport:
    def test_import_and_setup_open_and_start_nothing(self, listener):
        """Importing, setting up, defining tasks and finalizing open no socket, start no thread and fork nothing."""
        script = """
            import os, sys, threading
            from celery import Celery
            before = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
            from celery_mlcache import cached_task, setup_cache
            app = Celery("quiet", broker="memory://")
            cache = setup_cache(app)

            @cached_task(ttl=5)
            def task(x):
                return x

            app.finalize()
            print(task.cache.key(1))
            print(cache, cache.stats()["backplane"], cache.is_running)
            from celery_mlcache.fleet.app import find_fleet
            print(find_fleet(app).config.redis_location().port)
            print(threading.active_count())
            links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(
                f"/proc/self/fd/{fd}")] if sys.platform == "linux" else []
            print([link for link in links if "socket" in link])
            print(sorted(name for name in ("celery.worker.control", "moka_py") if name in sys.modules))
        """
        port = listener.getsockname()[1]
        out = run_python(script, env={"LIB_REDIS_PORT": str(port), "LIB_REDIS_HOST": "127.0.0.1"}).splitlines()
        assert out[1:5] == ["<CacheManager 'quiet' idle> off False", str(port), "1", "[]"]
        assert "celery.worker.control" not in out[5]
        with pytest.raises(BlockingIOError):
            listener.accept()

    def test_the_package_imports_no_celery(self):
        """``import celery_mlcache`` and create_cache_manager need no Celery."""
        script = """
            import sys
            from celery_mlcache import create_cache_manager
            create_cache_manager(l2_enabled=False).set("k", 1)
            print([name for name in ("celery", "kombu", "click", "billiard") if name in sys.modules])
        """
        assert run_python(script).strip() == "[]"


class TestConfinement:
    def test_a_confined_process_has_no_l1_and_no_thread(self, app, listener):
        """A prefork MainProcess has L2 only: no L1, no listener, no thread, even when it is asked to warm up."""
        cache = setup_cache(
            app, redis_host="127.0.0.1", redis_port=listener.getsockname()[1], redis_socket_timeout=0.01
        )
        threads = threading.active_count()
        fleet = find_fleet(app)
        fleet.confine()
        assert fleet.is_confined
        lifecycle.on_worker_ready(sender=type("Consumer", (), {"app": app}))
        assert not cache.is_running
        cache.warm()
        assert threading.active_count() == threads
        stats = cache.stats()
        assert (stats["l1_engine"], stats["backplane"]) == (None, "off")
        with pytest.raises(BlockingIOError):
            listener.accept()

    def test_used_before_the_fork(self, app, caplog):
        """A cache that was used before the worker forks is released, with a warning; what it held is gone."""
        cache = setup_cache(app, l2_enabled=False)
        cache.set("k", 1)
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            find_fleet(app).confine()
        assert [record.message for record in caplog.records] == [
            "the cache was used before the worker forked; it starts again"
        ]
        assert not cache.is_running
        assert cache.get("k") is None
        assert cache.stats()["l1_engine"] is None

    def test_not_used_before_the_fork(self, app, caplog):
        """Without use there is nothing to warn of."""
        setup_cache(app)
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            find_fleet(app).confine()
        assert not caplog.records

    def test_the_children_of_a_confined_process_are_free(self):
        """A forked child of a confined process has an L1 of its own, and the parent goes on without."""
        script = """
            import os
            from celery import Celery
            from celery_mlcache import setup_cache
            from celery_mlcache.fleet import lifecycle
            from celery_mlcache.fleet.app import find_fleet
            app = Celery("forks", broker="memory://")
            cache = setup_cache(app, l2_enabled=False)
            fleet = find_fleet(app)
            fleet.confine()
            cache.set("k", 1)
            if os.fork() == 0:
                lifecycle.on_process_init()
                cache.set("k", 2)
                print("child", fleet.is_confined, cache.get("k"), cache.stats()["l1_entries"], flush=True)
                os._exit(0)
            os.wait()
            print("parent", fleet.is_confined, cache.get("k"), cache.stats()["l1_engine"])
        """
        assert run_python(script).splitlines() == ["child False 2 1", "parent True None None"]

    @pytest.mark.parametrize(
        ("pool", "expected"),
        [
            ("prefork", True),
            ("processes", True),
            ("celery.concurrency.prefork:TaskPool", True),
            ("solo", False),
            ("threads", False),
            ("gevent", False),
        ],
    )
    def test_what_forks(self, pool, expected):
        """Every name of the prefork pool, and its class, is known as one that has children."""
        pytest.importorskip("gevent")
        assert lifecycle.is_prefork(pool) is expected

    def test_a_pool_class_of_the_users(self):
        """A subclass of the prefork pool forks too."""
        from celery.concurrency.prefork import TaskPool

        assert lifecycle.is_prefork(type("Mine", (TaskPool,), {}))


class TestSpawn:
    def test_the_copy_that_celery_unpickles_shares_the_fleet(self, monkeypatch):
        """In a spawned child the app that tasks belong to has the cache, and the settings, of the app set up."""
        monkeypatch.setattr(app_base, "USING_EXECV", True)
        app = Celery("spawned-shop", broker="memory://", set_as_current=False)
        copy = pickle.loads(pickle.dumps(app))
        assert copy is not app
        assert find_fleet(copy) is None
        cache = setup_cache(app, l2_enabled=False, l1_max_size=77)
        assert find_fleet(copy) is find_fleet(app)
        assert copy.mlcache is cache
        assert fleet_of(copy).config.l1_max_size == 77

    def test_another_app_does_not(self, monkeypatch):
        """Apps with different names stay apart, in a spawned child too."""
        monkeypatch.setattr(app_base, "USING_EXECV", True)
        app = Celery("spawned-one", broker="memory://", set_as_current=False)
        other = Celery("spawned-two", broker="memory://", set_as_current=False)
        setup_cache(app, l2_enabled=False)
        assert find_fleet(other) is None

    def test_elsewhere_equal_names_stay_apart(self):
        """In every other process two apps with one name are two apps."""
        apps = [Celery("same-name", broker="memory://", set_as_current=False) for _ in range(2)]
        setup_cache(apps[0], l2_enabled=False)
        assert find_fleet(apps[1]) is None


class TestWorkerInit:
    def test_wrong_settings_end_the_worker(self, app):
        """A worker whose app.conf is wrong does not start; its last words name the setting."""
        setup_cache(app)
        app.conf.mlcache_l1_ttl = -1
        worker = type("Worker", (), {"app": app, "pool_cls": "prefork"})
        with pytest.raises(SystemExit, match="mlcache_l1_ttl=-1"):
            lifecycle.on_worker_init(sender=worker)

    def test_an_app_without_a_cache_is_left_alone(self, app):
        """The handlers are global to the process; an app that was not set up does not notice them."""
        setup_cache(Celery("another", broker="memory://", set_as_current=False))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lifecycle.on_worker_init(sender=type("Worker", (), {"app": app, "pool_cls": "prefork"}))
            lifecycle.on_worker_ready(sender=type("Consumer", (), {"app": app}))
            lifecycle.on_worker_shutdown(sender=type("Worker", (), {"app": app}))
        assert find_fleet(app) is None


def test_a_cached_task_gives_its_app_a_cache_when_it_is_bound():
    """A worker whose app was never set up checks the settings too, before it takes a task; nothing is opened."""
    app = Celery("bound", set_as_current=False)

    @cached_task(app=app, name="bound.task", shared=False)
    def task():
        return 1

    assert find_fleet(app) is None
    app.finalize()
    assert find_fleet(app).is_implicit
    assert not find_fleet(app).cache.is_running
