"""When a result is computed anew behind its readers' backs, and the message that has it done.

One message in the whole fleet for each result: whoever sends it sets a mark in L2 first, which a worker takes away when
it is done. A process that dies in between holds the others up for seconds only, a lost message for a minute.

Early refresh is XFetch: A. Vattani, F. Chierichetti, K. Lowenstein, "Optimal Probabilistic Cache Stampede Prevention",
VLDB 2015. Times of day are the clocks of workers, so a skew between them moves early refreshes, and nothing else.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, partial
from math import log as ln
from typing import Any, Final

from kombu.exceptions import EncodeError, OperationalError

from celery_mlcache.errors import CacheClosedError, RemoteStoreError, is_interrupt
from celery_mlcache.fleet import modes, signals
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.fleet.options import INTERRUPTS, Options
from celery_mlcache.fleet.record import Record
from celery_mlcache.fleet.telling import Telling

MARK_SENDING: Final = 5.0  # seconds after which another process sends a refresh, where one has died sending it
MARK_LIFE: Final = 60.0  # seconds after which a refresh that was sent, and has not been heard of since, is sent again
UNSENDABLE: Final = 300.0  # seconds for which no refresh of a call is sent whose arguments could not be
ASK_AGAIN: Final = 1.0  # seconds after which this process asks again for a refresh that it has asked for
MAX_ASKED: Final = 4096  # keys that it remembers so
NO_BROKER: Final = 5.0  # seconds for which no refresh is sent after the broker was not there
FAILED: Final = 5.0  # seconds for which no refresh is sent after one has failed, or its result was not to be kept


class Refreshing:
    """Has the results of one task refreshed. Thread- and fork-safe, as the manager is."""

    def __init__(self, told: Telling, options: Options) -> None:
        self.task, self.told, self.options = told.task, told, options
        self._asked: dict[str, float] = {}  # until when a refresh need not be asked for again, by key
        self._unsendable: dict[str, float] = {}  # until when none is sent of a call whose arguments could not be
        self._no_broker_until = 0.0

    def is_possible(self, key: str) -> bool:
        """Return whether a message can have a call refreshed, as far as is known."""
        return not self._remembers(self._unsendable, key)

    def has_failed(self, key: str) -> None:
        """Let nobody try again for a while."""
        with suppress(CacheClosedError, RemoteStoreError):
            self.told.manager.mark(self.mark_name(key), FAILED, is_new=False)

    def soon(self, key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], record: Record) -> None:
        """See to it that one task, in the whole fleet, computes a call anew. Waits for nothing, and never raises."""
        if self._remembers(self._asked, key) or self._remembers(self._unsendable, key):
            return  # a hot key has thousands of readers
        self._remember(self._asked, key, ASK_AGAIN)
        job = partial(self._send_unless_sent, key, args, kwargs, record.made_at)
        if self.task.app.conf.task_always_eager:
            job()
        elif not fleet_of(self.task.app).errands.ask(job):
            self.told.count("refreshes_failed")

    def _send_unless_sent(self, key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], since: float) -> None:
        """Send the task that refreshes a call, unless somebody in the fleet has; in the thread for errands."""
        mark = self.mark_name(key)
        is_first = False
        with suppress(CacheClosedError, RemoteStoreError):
            is_first = self.told.manager.mark(mark, MARK_SENDING)
        if not is_first:
            return
        if time.monotonic() < self._no_broker_until:
            self._note_unsent(key, None)
            return
        try:
            self.send(args, kwargs, since=since)
        except Exception as exc:
            if isinstance(exc, INTERRUPTS) or is_interrupt(exc):
                self.told.unmark(mark)
                raise  # an eager task's own
            self._note_unsent(key, exc)
        else:
            self.told.count("refreshes_sent")
            with suppress(CacheClosedError):  # a worker that was faster has taken it away, and it stays so
                self.told.manager.prolong(mark, MARK_LIFE)

    def _note_unsent(self, key: str, error: Exception | None) -> None:
        """Let somebody else try; *error* is None where it was not even tried."""
        self.told.unmark(self.mark_name(key))
        self.told.count("refreshes_failed")
        if error is None:
            return
        if isinstance(error, EncodeError):  # of its arguments; computed where it is called
            self._remember(self._unsendable, key, UNSENDABLE)
        if isinstance(error, OperationalError | OSError):
            self._no_broker_until = time.monotonic() + NO_BROKER
        self.told.warn_once("a refresh could not be sent", error)
        self.told.send(signals.cache_error, key, what="refresh", error=error)

    def send(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, since: float | None = None) -> Any:
        """Send the task that refreshes a call, and return its AsyncResult."""
        options: dict[str, Any] = {"headers": {modes.HEADER: "refresh"}}
        if since is not None:  # nobody waits for it, and a dead broker must not hold up who was just answered
            options["headers"][modes.SINCE] = since
            options |= {"ignore_result": True, "retry": False, "add_to_parent": False}
        if self.options.refresh_queue is not None:
            options["queue"] = self.options.refresh_queue
        priority = self._lowest_priority if self.options.refresh_priority is None else self.options.refresh_priority
        if priority is not None:
            options["priority"] = priority
        return self.task.mlcache_publish(tuple(args), dict(kwargs), **options)

    @cached_property
    def _lowest_priority(self) -> int | None:
        """The lowest priority, which is 0 for RabbitMQ and 9 for Redis."""
        transport = self.task.app.connection_for_write().transport_cls
        return {"amqp": 0, "amqps": 0, "pyamqp": 0, "librabbitmq": 0, "redis": 9, "rediss": 9, "sentinel": 9}.get(
            str(transport)
        )

    def is_early(self, record: Record) -> bool:
        """Return whether to refresh now, by XFetch: the likelier, the sooner it ends and the longer it takes."""
        ends, now = record.made_at + record.life, time.time()
        if not record.made_at <= now < ends:
            return False  # it is fresh, so a clock is wrong; there is no telling how long it lasts
        ahead = -record.seconds * self.options.early * ln(1.0 - random.random())  # noqa: S311 - a sample
        return now + ahead >= ends

    @staticmethod
    def mark_name(key: str) -> str:
        """Return the name of the mark of a call that is being refreshed."""
        return f"refresh:{key}"

    @staticmethod
    def _remember(table: dict[str, float], key: str, seconds: float) -> None:
        if len(table) >= MAX_ASKED:
            table.clear()
        table[key] = time.monotonic() + seconds

    @staticmethod
    def _remembers(table: Mapping[str, float], key: str) -> bool:
        return time.monotonic() < table.get(key, 0.0)
