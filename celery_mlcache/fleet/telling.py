"""What one task tells of its cache: counters, signals, and a line in the log the first time that a thing goes wrong."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from celery_mlcache.errors import CacheClosedError
from celery_mlcache.fleet import signals
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.manager import CacheManager

if TYPE_CHECKING:
    from celery_mlcache.fleet.task import CachedTask

IN_OPTION: Final = "in the cached task's option "  # a note on what an option has raised

log = logging.getLogger("celery_mlcache")


class Telling:
    """Tells of one task. Thread- and fork-safe, as the manager is; never raises for a cache that is closed."""

    def __init__(self, task: CachedTask) -> None:
        self.task = task
        self._has_warned: set[str] = set()

    @cached_property
    def manager(self) -> CacheManager:
        """The app's cache manager."""
        return fleet_of(self.task.app).cache

    def count(self, name: str, number: float = 1) -> None:
        """Add to a counter."""
        with suppress(CacheClosedError):  # since this call has begun: it ends as any other
            self.manager.count(name, number)

    def unmark(self, name: str) -> None:
        """Take a mark away."""
        with suppress(CacheClosedError):
            self.manager.unmark(name)

    def send(self, signal: Any, key: str | None, **what: Any) -> None:
        """Send a signal, if anybody listens."""
        if signal.receivers:
            signal.send(sender=self.task, key=key, **what)

    def note_uncacheable(self, why: Exception) -> None:
        """Tell that a call has no key."""
        self.count("uncacheable_calls")
        self.warn_once("a call cannot be cached", why)
        self.send(signals.cache_error, None, what="key", error=why)

    def note_unstorable(self, key: str, why: Exception) -> None:
        """Tell that what a call has come to cannot be stored, so that it will be computed every time."""
        self.warn_once("an outcome cannot be cached", why)
        self.send(signals.cache_error, key, what="value", error=why)

    def note_error(self, key: str, what: str, why: Exception) -> None:
        """Tell that something about the cache went wrong, and the call goes on without."""
        self.warn_once(f"cache trouble: {what}", why)
        self.send(signals.cache_error, key, what=what, error=why)

    def note_hook(self, key: str, why: Exception) -> None:
        """Tell that an option that is a function has raised."""
        self.count("hook_failures")
        notes = getattr(why, "__notes__", None)  # the user's too, whatever they are
        ours = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
        option = next((note.removeprefix(IN_OPTION) for note in ours if note.startswith(IN_OPTION)), "?")
        self.warn_once(f"an option of a cached task has raised ({option})", why)
        self.send(signals.cache_error, key, what="hook", error=why)

    def warn_once(self, what: str, why: Exception) -> None:
        """Log what has happened, the first time."""
        if what not in self._has_warned:
            self._has_warned.add(what)
            log.warning("%s: %s: %s", what, self.task.name, why, extra={"task": self.task.name, "why": str(why)})
