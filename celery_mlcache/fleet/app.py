"""``setup_cache(app)``: one fleet per Celery app. Opens no socket, starts no thread, reads no configuration too early.

A fleet is what outlives processes: the app, the settings' sources, and the manager object that user code holds. The
manager builds itself anew in each process; this module decides with which settings, and where it must have no L1.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit
from weakref import WeakSet

from celery import Celery, _state
from celery.app import base as app_base

from celery_mlcache.config import CacheConfig, ConfigurationWarning, load_config, sources_from_celery
from celery_mlcache.errors import ConfigurationError
from celery_mlcache.factory import assemble
from celery_mlcache.fleet import causal, lifecycle, lineage, modes
from celery_mlcache.fleet.errands import Errands
from celery_mlcache.manager import CacheManager
from celery_mlcache.parts import Parts

PREFIX: Final = "mlcache_"
URL_SETTINGS: Final = ("mlcache_redis_url", "mlcache_backend_url")
MASK: Final = "********"
_ATTRIBUTE: Final = "_mlcache_fleet"
PASSWORD_SETTING: Final = "mlcache_redis_password"  # noqa: S105 - the name of a setting

log = logging.getLogger("celery_mlcache")


class Fleet:
    """The cache of one Celery app.

    Thread-safe where its manager is. A fork inherits settings, which never change, and a manager that starts anew.
    """

    def __init__(self, app: Celery, config: CacheConfig | None, overrides: Mapping[str, Any]) -> None:
        self.app = app
        self.given = config
        self.overrides = dict(overrides)
        self.is_implicit = False  # made by a cached task, not by setup_cache
        self._settled: CacheConfig | None = None
        self._hidden: dict[str, str] = {}  # settings as they were given, by their names in app.conf
        self.cache = CacheManager(self._assemble, name=app.main or "celery")
        self.bearer = causal.Bearer(self)
        self.errands = Errands()
        _FLEETS.add(self)

    @property
    def config(self) -> CacheConfig:
        """Return the settings: arguments, environment, ``app.conf``, the Redis that Celery uses, defaults.

        Raises:
            ConfigurationError: Names every wrong setting.
        """
        if self._settled is None:
            self._settled = self.given if self.given is not None else self._load()
        return self._settled

    @property
    def settled(self) -> CacheConfig | None:
        """Return the settings if they have been read."""
        return self._settled

    @property
    def is_confined(self) -> bool:
        """Return whether this process is a prefork MainProcess."""
        return lifecycle.is_confined()

    def reconfigure(self, config: CacheConfig | None, overrides: Mapping[str, Any]) -> None:
        """Take other settings, before anything was built with the old ones."""
        self.given, self.overrides, self._settled = config, dict(overrides), None

    def confine(self) -> None:
        """Let this process, a prefork MainProcess, have no L1, no listener and no thread; its children may."""
        lifecycle.confine_process()
        if self.cache.is_running:
            log.warning("the cache was used before the worker forked; it starts again", extra={"pid": os.getpid()})
            self.cache.release(0.5)

    def operator(self) -> CacheManager:
        """Return a manager for one administrative act: no L1, no thread, and L2's errors are raised."""
        return CacheManager(lambda: assemble(self.config, with_l1=False, strict=True), name=self.config.cache_namespace)

    def hide_passwords(self) -> None:
        """See to it that no report of ``app.conf`` shows one."""
        hide_passwords(self.app.conf, self._hidden)

    def _assemble(self) -> Parts:
        return assemble(self.config, with_l1=not lifecycle.is_confined())

    def _load(self) -> CacheConfig:
        len(self.app.conf)  # read now: what stands here until the first look-up is another object
        conf = self.app.conf
        self.hide_passwords()
        own = {name: self._hidden.get(raw, conf[raw]) for raw, name in _own_settings(conf).items()}
        sources = [("app.conf", own), *sources_from_celery(conf)]
        namespace = re.sub(r"[^A-Za-z0-9_.:-]", "-", self.app.main or "").strip("_.:-")
        if namespace:
            sources.append(("the app's name", {"cache_namespace": namespace[:100]}))
        return load_config(self.overrides, extra_sources=sources)


def setup_cache(app: Celery, config: CacheConfig | None = None, **overrides: Any) -> CacheManager:
    """Give *app* its cache, stored as ``app.mlcache``, and return it; every worker process gets its own.

    Idempotent: called again without settings it returns what is there; with settings, it replaces them as long as
    nothing in this process has used the cache. Opens nothing and starts nothing: prefork children and solo start at
    ``worker_process_init``, the other pools at ``worker_ready``, everything else (producers, beat, shells, eager
    tasks) at its first use.

    Args:
        app: The Celery app.
        config: Finished settings; nothing else is read then.
        **overrides: Fields of CacheConfig, before the environment, ``app.conf.mlcache_*`` and Celery's own Redis.

    Raises:
        TypeError: *app* is none.
        ConfigurationError: Arguments or environment are wrong. ``app.conf`` is read when the worker starts (or at
            the first use), and a worker whose settings are wrong does not start.
    """
    if not isinstance(_real(app), Celery):
        msg = f"setup_cache takes a Celery app, not {app!r:.80}"
        raise TypeError(msg)
    if config is not None and overrides:
        raise ConfigurationError([f"setup_cache() takes a config or single settings, not both: {', '.join(overrides)}"])
    if config is None:
        with warnings.catch_warnings():
            # Only for what raises: the final reading, with app.conf, is the one that warns.
            warnings.simplefilter("ignore", ConfigurationWarning)
            load_config(overrides)
    return _enrol(app, config, overrides, is_implicit=False).cache


def fleet_of(app: Any) -> Fleet:
    """Return the app's fleet; a cached task whose app was never set up sets it up, from environment and app.conf."""
    return find_fleet(app) or _enrol(app, None, {}, is_implicit=True)


def all_fleets() -> list[Fleet]:
    """Return every fleet of this process."""
    return list(_FLEETS)


def find_fleet(app: Any) -> Fleet | None:
    """Return the app's fleet if it has one."""
    real = _real(app)
    fleet: Fleet | None = getattr(real, _ATTRIBUTE, None)
    return _adopt(real) if fleet is None and getattr(app_base, "USING_EXECV", False) else fleet


def _adopt(app: Any) -> Fleet | None:
    """In a spawned child, give the app that tasks belong to the fleet of its twin.

    Celery unpickles the worker's app there, without its attributes, and binds the tasks to that copy; the app that
    ``setup_cache`` was called with is the one that importing the user's module made anew.
    """
    for twin in _state._get_active_apps():  # type: ignore[attr-defined]  # noqa: SLF001 - it has no public way
        fleet: Fleet | None = getattr(twin, _ATTRIBUTE, None)
        if fleet is not None and twin is not app and twin.main == app.main and not fleet.is_implicit:
            setattr(app, _ATTRIBUTE, fleet)
            app.mlcache = fleet.cache
            causal.carry_results(app)
            return fleet
    return None


def _enrol(app: Any, config: CacheConfig | None, overrides: Mapping[str, Any], *, is_implicit: bool) -> Fleet:
    app = _real(app)
    fleet = find_fleet(app)
    if fleet is None:
        fleet = Fleet(app, config, overrides)
        fleet.is_implicit = True
        setattr(app, _ATTRIBUTE, fleet)
        app.mlcache = fleet.cache  # where users of a Celery extension look for it
        app.on_after_configure.connect(_hide_when_configured, weak=False, dispatch_uid="mlcache.hide")
        if getattr(app, "configured", False):
            fleet.hide_passwords()
        lifecycle.connect(find_fleet, all_fleets)
        causal.connect()
        lineage.connect()
        modes.connect()
        causal.carry_results(app)
    elif (config is not None or overrides) and (config, dict(overrides)) != (fleet.given, fleet.overrides):
        if fleet.cache.is_running:
            raise ConfigurationError(["setup_cache() was called with other settings after the cache had been used"])
        fleet.reconfigure(config, overrides)
    fleet.is_implicit = fleet.is_implicit and is_implicit
    return fleet


def _real(app: Any) -> Celery:
    """Look through ``current_app`` and other proxies: each app has one fleet."""
    unwrap = getattr(app, "_get_current_object", None)
    real: Celery = unwrap() if unwrap is not None else app
    return real


def _hide_when_configured(sender: Celery, **_: Any) -> None:
    fleet = find_fleet(sender)
    if fleet is not None:
        fleet.hide_passwords()


def _own_settings(conf: Any) -> dict[str, str]:
    """Return the ``mlcache_*`` names in *conf* by their spelling there: Django's carry ``CELERY_`` before them."""
    namespace = getattr(conf, "prefix", None) or ""
    names = {raw: raw.removeprefix(namespace) for raw in list(conf) if isinstance(raw, str)}
    # The tasks' options are no settings of the cache.
    return {
        raw: name for raw, name in names.items() if name.lower().startswith(PREFIX) and name.lower() != lifecycle.TASKS
    }


def hide_passwords(conf: Any, hidden: dict[str, str]) -> None:
    """Move passwords out of ``mlcache_*_url`` into ``mlcache_redis_password``, which Celery masks.

    ``celery report``, ``inspect conf`` and Flower print every other setting as it is. Where a URL holds more than one
    (sentinels) or in another place (``?password=``), it is masked whole, and *hidden* keeps what it was.
    """
    for raw, name in _own_settings(conf).items():
        url = conf[raw]
        if name.lower() not in URL_SETTINGS or not isinstance(url, str) or url == MASK:
            continue
        if ";" in url or "password" in url.partition("?")[2]:
            hidden[raw], conf[raw] = url, MASK
            continue
        parts = urlsplit(url)
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        if password:
            host = parts.netloc.rpartition("@")[2]
            conf[raw] = urlunsplit(parts._replace(netloc=f"{user}@{host}" if user else host))
            if not conf.get(PASSWORD_SETTING):
                conf[PASSWORD_SETTING] = unquote(password)


_FLEETS: WeakSet[Fleet] = WeakSet()
