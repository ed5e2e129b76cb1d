"""What one call wants of the cache, and how that travels: ``apply_async(..., mlcache="refresh")``.

A mode is a header of the message, for unknown options of a call are lost on the way. It survives retries and stands in
signatures, so canvas carries it. Where headers do not get (the later links of a chain), a stamp of the same name does.
A call by name (``send_task``, a signature of a task that is not registered here) passes by the task's own
``apply_async``: there the option is turned into the header when the message is published.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from typing import Any, Final, Literal, get_args

from celery import signals

Mode = Literal["use", "refresh", "bypass", "only", "stale-ok"]

MODES: Final[tuple[str, ...]] = get_args(Mode)
HEADER: Final = "mlcache_mode"
SINCE: Final = "mlcache_since"  # of a task that refreshes: when what it should replace was made
CALL: Final = "mlcache_call"  # of a call that others may share
LEVEL: Final = "mlcache"  # of a request: where its result was found, so far as it is known
BEGUN: Final = "_mlcache_begun"  # of a request: its own look-up has begun, so that a copy of it is a nested call's
FOUND: Final = "_mlcache_found"  # of a request: the id() of the exception out of the cache that it ends with
HELD: Final = "mlcache_held"  # fences of the leases that the sender acts under
MAX_TOLD: Final = 100  # unknown modes that are told of

log = logging.getLogger("celery_mlcache")
_told: set[str] = set()


def connect() -> None:
    """Connect the handler; calling it again changes nothing."""
    signals.before_task_publish.connect(on_publish, weak=False, dispatch_uid="mlcache.modes")


def on_publish(headers: Any = None, properties: Any = None, **_: Any) -> None:
    """Turn the option of a call by name, which would be a property that nobody reads, into the header."""
    if not (isinstance(headers, dict) and isinstance(properties, dict)) or LEVEL not in properties:
        return
    if LEVEL in (headers.get("stamped_headers") or ()):
        return  # the stamp of this name, which may be somebody else's
    mode = properties.pop(LEVEL)
    if mode is not None and _known(mode) is not None:
        headers.setdefault(HEADER, mode)


def check_mode(mode: object) -> str:
    """Return *mode* if it is one; raises ValueError if not."""
    if mode in MODES:
        return str(mode)
    msg = f"mlcache must be one of {', '.join(MODES)}, not {mode!r:.80}"
    raise ValueError(msg)


def mode_of(task: Any, request: Any) -> str:
    """Return the mode of a call that *task* executes: its message's, or that of the block around it, or "use"."""
    given = None
    if not is_nested(request):
        given = header_of(request, HEADER)
        stamps = getattr(request, "stamps", None)
        if given is None and isinstance(stamps, dict):
            given = stamps.get(HEADER) or stamps.get(LEVEL)
            given = given[0] if isinstance(given, list | tuple) and given else given
    if given is None:
        given = ambient_mode(task)
    return "use" if given is None else _known(given) or "use"  # perhaps of a later release: nothing that we could do


def _known(mode: object) -> str | None:
    """Return *mode* if it is one; else say so, the first time: here it is too late to raise."""
    if isinstance(mode, str) and mode in MODES:
        return mode
    shown = f"{mode!r:.80}"
    if shown not in _told and len(_told) < MAX_TOLD:
        _told.add(shown)
        log.warning("an unknown mode was taken for 'use': mlcache must be one of %s, not %s", ", ".join(MODES), shown)
    return None


def is_nested(request: Any) -> bool:
    """Return whether this is a direct call out of the same task's body: Celery gives it a copy of the request."""
    return BEGUN in request.__dict__


def ambient_mode(task: Any) -> str | None:
    """Return the mode of the block around this call, if there is one."""
    return _AMBIENT.get().get(task.name)


class Using(ContextDecorator):
    """Gives every call of *task* in a block, in this thread or greenlet, the mode; not those inside of them.

    A class, for contextlib's generators assign to what is raised in the block, which a frozen exception refuses.
    """

    def __init__(self, task: Any, mode: str) -> None:
        self._task_name, self._mode = task.name, check_mode(mode)
        self._tokens: list[Token[dict[str, str]]] = []  # it may be entered again, by itself too

    def __enter__(self) -> None:
        self._tokens.append(_AMBIENT.set({**_AMBIENT.get(), self._task_name: self._mode}))

    def __exit__(self, *_: object) -> None:
        _AMBIENT.reset(self._tokens.pop())


def run_apart(task: Any, run: Callable[[], Any]) -> Any:
    """Call *run*, a body of *task*, without the mode of the block around it: that is not for calls inside of it."""
    around = _AMBIENT.get()
    if task.name not in around:
        return run()
    token = _AMBIENT.set({name: mode for name, mode in around.items() if name != task.name})
    try:
        return run()
    finally:
        _AMBIENT.reset(token)


def header_of(request: Any, name: str) -> Any:
    """Return a header of the message that a request stands for, or None; a direct call has none."""
    headers = request.headers
    found = headers.get(name) if isinstance(headers, dict) else None
    return getattr(request, name, None) if found is None else found


_AMBIENT: ContextVar[dict[str, str]] = ContextVar("mlcache_modes", default={})  # noqa: B039 - never changed, replaced
