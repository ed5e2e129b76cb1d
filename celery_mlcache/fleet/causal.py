"""Causal tokens: messages and results carry what their sender has seen, and whoever takes them catches up first.

Theory of operation. A token names the newest stamp that a process has written, applied or read. ``before_task_publish``
puts it into the headers of every message that leaves a process whose cache runs; ``task_prerun`` raises a barrier to it
before any code of the task, and before a cached task looks for its result. A barrier waits for nothing: until the stamp
has been applied, reads go to L2, which has it. What was heard is part of what is told later, so a chain is covered by
its links. The way back is the result's: the worker's result backend adds the token to the metadata that it stores, and
the caller's takes it out again before anybody sees the value. Chords join many processes in one: whoever sends the body
asks Redis for the counter, for its own stamps say nothing of the other members' writes.

Celery names no app when it publishes, so the tokens of every app of the process travel together; each reader takes
those of its own namespaces. Nothing is started here: a process whose cache has not been used has nothing to tell but
what it was told itself, and an L1 that is yet to be built needs no barrier.

Limits. Celery has no public place for the way back, so the app's ``_get_backend`` is wrapped, and three methods of each
backend that it makes. A backend made before ``setup_cache`` in another thread, one that a task names for itself, and
one that travelled inside a pickled AsyncResult are not ours. Handlers of ``task_prerun`` that were connected before
``setup_cache`` run before the barrier is raised. What only a private name can give is given up in silence
where the name is gone; the tests tell.
"""

from __future__ import annotations

import logging
import sys
import weakref
from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from celery import _state, signals
from celery.backends.base import BaseKeyValueStoreBackend

from celery_mlcache.config import ConfigurationWarning
from celery_mlcache.errors import ConfigurationError, MLCacheError, RemoteStoreError
from celery_mlcache.fleet.modes import LEVEL
from celery_mlcache.keys import format_token, parse_token

if TYPE_CHECKING:
    from celery_mlcache.fleet.app import Fleet

HEADER: Final = "mlcache_token"  # of messages; in a result's metadata it is called the same
MAX_TEXT: Final = 2048  # characters of a header that are looked at
UNLOCK: Final = "celery.chord_unlock"
_CARRIER: Final = "_mlcache_carrier"

log = logging.getLogger("celery_mlcache")
_bearers: tuple[weakref.ref[Bearer], ...] = ()  # of every app; a WeakSet takes 3 us to look through
_warned: set[str] = set()


class Bearer:
    """What one fleet tells and hears in this process.

    Thread-safe. A forked child inherits what was heard, which is true for it too.
    """

    def __init__(self, fleet: Fleet) -> None:
        global _bearers  # noqa: PLW0603 - as the signals, one for the process
        self._fleet = fleet
        self._tried: object = None  # the settings that were read last
        self._heard: list[int] = []  # stamps heard before the cache was used; in order, and most often one
        _bearers = (*(each for each in _bearers if each() is not None), weakref.ref(self))

    def token(self, *, is_latest: bool = False) -> str:
        """Return the token to send, or "" where there is nothing to tell; *is_latest* costs a round trip to L2."""
        cache, heard = self._fleet.cache, self._heard
        if not (cache.is_running or heard or cache.told):
            return ""
        namespace = self._namespace()
        if not namespace:
            return ""
        if not cache.is_running:
            return format_token(namespace, max([cache.told, *heard]))
        for stamp in tuple(heard):
            cache.barrier(format_token(namespace, stamp))
            with suppress(ValueError):  # another thread was faster
                heard.remove(stamp)
        if is_latest:
            with suppress(RemoteStoreError):  # ``strict`` and no answer: what we know ourselves is better than nothing
                return cache.latest_token()
        return cache.token()

    def hear(self, stamps: dict[str, int]) -> bool:
        """Raise a barrier to the stamp of this fleet's namespace; return whether there was one."""
        namespace = self._namespace()
        stamp = stamps.get(namespace)
        if stamp is None:
            return False
        if self._fleet.cache.is_running:
            self._fleet.cache.barrier(format_token(namespace, stamp))
        else:
            insort(self._heard, stamp)  # no lock, for a fork might find it held: each of the two is one step
            del self._heard[:-1]
        return True

    def _namespace(self) -> str:
        """Return the namespace, or "" where this app's settings want no tokens, or are wrong."""
        fleet = self._fleet
        config = fleet.settled
        if config is None:
            if self._tried is fleet.overrides:
                return ""
            if fleet.given is None and not (fleet.cache.is_running or getattr(fleet.app, "configured", True)):
                return ""  # another app's token must not have this one's settings read before they are complete
            self._tried = fleet.overrides  # once, for reading wrong settings again with every message would be dear
            try:
                config = fleet.config
            except (ConfigurationError, ConfigurationWarning) as exc:  # a warning may be an error here
                _warn("no tokens", exc)
                return ""
        # Whoever does without invalidations has chosen stale reads, and would lose all of L1 to every barrier.
        is_on = config.cache_enabled and config.causal_tokens and config.cache_sync_enabled
        return config.cache_namespace if is_on else ""


def connect() -> None:
    """Connect the handlers; calling it again changes nothing."""
    signals.before_task_publish.connect(on_publish, weak=False, dispatch_uid="mlcache.on_publish")
    signals.task_prerun.connect(on_prerun, weak=False, dispatch_uid="mlcache.on_prerun")


def on_publish(sender: Any = None, headers: Any = None, **_: Any) -> None:
    """Put this process's tokens into a message's headers; None there says that this call must go without."""
    if not isinstance(headers, dict):
        return
    given = headers.get(HEADER, "")
    if given is None:
        return
    text = _text_for(sender)
    if text:
        # A retry, or a forwarded message, has the old one: that of a namespace which is not ours goes on.
        headers[HEADER] = _merged(given, text) if given else text


def on_prerun(task: Any = None, **_: Any) -> None:
    """Hear a message's tokens before its task runs. An eager task has come from nowhere."""
    request = task.request
    if request.is_eager:
        return
    token = getattr(request, HEADER, None)
    if token is None and isinstance(request.headers, dict):
        token = request.headers.get(HEADER)  # where a release does not make it an attribute
    if token is not None:
        hear(token)


def tell(*, is_latest: bool = False) -> str:
    """Return the tokens of this process, or ""; never raises an error of the cache's."""
    stamps: dict[str, int] = {}
    for each in reversed(_bearers):  # what was made last is most likely in use, should they be too many
        try:
            bearer = each()
            token = "" if bearer is None else bearer.token(is_latest=is_latest)
        except (MLCacheError, ValueError) as exc:  # closed meanwhile
            _warn("no token to send", exc)
        else:
            for namespace, stamp in _parse(token).items():
                stamps[namespace] = max(stamp, stamps.get(namespace, 0))
    return _joined(stamps)


def hear(text: object) -> None:
    """Raise the barriers that *text* asks for; what is malformed or of other namespaces is ignored. Never raises."""
    stamps = _parse(text)
    is_ours = False
    for each in _bearers:
        try:
            bearer = each()
            is_ours = (bearer is not None and bearer.hear(stamps)) or is_ours
        except (MLCacheError, ValueError) as exc:
            _warn("a token was not heard", exc)
    if not stamps:
        _warn("a malformed token was ignored", repr(text)[:80] if isinstance(text, str) else type(text).__name__)
    elif not is_ours:
        log.debug("a token of another namespace was ignored", extra={"token": repr(text)[:80]})


# ---- results ----------------------------------------------------------------------------------------------------


def carry_results(app: Any) -> None:
    """See to it that every result backend that *app* makes from now on carries tokens."""
    make = getattr(app, "_get_backend", None)
    if make is None:
        return

    def get_backend() -> Any:
        return carry(make())

    app._get_backend = get_backend  # noqa: SLF001 - one thread, one backend: there is no other place to meet them all
    made_already = getattr(app, "_backend", None)
    if made_already is not None:
        carry(made_already)


def carry(backend: Any) -> Any:
    """Have one result backend carry tokens as far as it can, and return it."""
    if not hasattr(backend, _CARRIER):
        with suppress(AttributeError):  # no such method, or no place for another
            setattr(backend, _CARRIER, _Carrier(backend))
    return backend


class _Carrier:
    """Stands between a result backend and three of its methods; Celery's own, looked up by name, still do the work."""

    def __init__(self, backend: Any) -> None:
        if _stores_metadata_whole(backend):
            # rpc:// has its own, and before 5.7 that one asks nobody.
            maker = "_to_result" if hasattr(backend, "_to_result") else "_get_result_meta"
            self._make = self._replace(backend, maker, self.make)
            self._take = self._replace(backend, "meta_from_decoded", self.take)
        self._join = self._replace(backend, "on_chord_part_return", self.join)

    @staticmethod
    def _replace(backend: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(backend, name)
        setattr(backend, name, method)
        return original

    def make(self, *args: Any, **kwargs: Any) -> Any:
        """The worker: what is stored of a task's state, and where a cached task's result was found."""
        meta = self._make(*args, **kwargs)
        level = getattr(kwargs.get("request", args[-1] if args else None), LEVEL, None)
        if level is not None:
            meta[LEVEL] = level
        if text := tell():
            meta[HEADER] = text
        return meta

    def take(self, meta: Any) -> Any:
        """The caller: what was stored, before anybody has seen it."""
        text = meta.pop(HEADER, None)
        if text is not None:
            hear(text)
        return self._take(meta)

    def join(self, *args: Any, **kwargs: Any) -> Any:
        """The worker: one member of a chord has ended; the last one sends the body."""
        with _joining():
            return self._join(*args, **kwargs)


def _stores_metadata_whole(backend: Any) -> bool:
    """Tables and documents with fixed columns would lose the token, and might refuse it."""
    rpc = sys.modules.get("celery.backends.rpc")
    kinds = (BaseKeyValueStoreBackend,) if rpc is None else (BaseKeyValueStoreBackend, rpc.RPCBackend)
    return isinstance(backend, kinds)


@contextmanager
def _joining() -> Iterator[None]:
    mark = _JOINED.set([])
    try:
        yield
    finally:
        _JOINED.reset(mark)


def _text_for(name: Any) -> str:
    joined = _JOINED.get()
    if joined is not None:
        if not joined:
            joined.append(tell(is_latest=True))  # once, however many messages the body is
        return joined[0]
    task = _state.get_current_task()
    # Where the backend cannot count a chord's members, this task polls, and sends the body.
    is_body = task is not None and task.name == UNLOCK != name
    return tell(is_latest=is_body)


# ---- text -------------------------------------------------------------------------------------------------------


def _parse(text: object) -> dict[str, int]:
    """Return the newest stamp of each namespace in *text*; empty if it is none of ours."""
    stamps: dict[str, int] = {}
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        return stamps
    for token in text.split():
        namespace = token.rpartition("@")[0]
        try:
            stamp = parse_token(token, namespace)
        except ValueError:
            continue
        if namespace:
            stamps[namespace] = max(stamp, stamps.get(namespace, 0))
    return stamps


def _joined(stamps: dict[str, int]) -> str:
    """Return the tokens of as many namespaces as a reader takes; a process has one or two apps, as a rule."""
    text = ""
    for namespace, stamp in stamps.items():
        longer = f"{text} {format_token(namespace, stamp)}" if text else format_token(namespace, stamp)
        if stamp and len(longer) <= MAX_TEXT:
            text = longer
    return text


def _merged(given: object, text: str) -> str:
    stamps = _parse(text)  # ours first
    for namespace, stamp in _parse(given).items():
        stamps[namespace] = max(stamp, stamps.get(namespace, 0))
    return _joined(stamps)


def _warn(what: str, why: object) -> None:
    if what not in _warned:
        _warned.add(what)
        log.warning("%s: %s", what, why, extra={"why": str(why)})


_JOINED: ContextVar[list[str] | None] = ContextVar("mlcache_joined", default=None)
