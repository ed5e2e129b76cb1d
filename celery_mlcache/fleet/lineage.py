"""Messages say which leases their sender acts under, so that what runs on its behalf never waits for it.

A task that holds the lease of a call, sends another task and waits for it, which makes the same call: without this, the
one waits for the other until ``max_wait`` is over (PrefectHQ/prefect#18600). What is sent along is a list of fencing
tokens; each is one lease's and no other's, so that two calls that merely have the same root still share one execution.
"""

from __future__ import annotations

from typing import Any, Final

from celery import _state, signals

from celery_mlcache.fleet.modes import HELD, header_of
from celery_mlcache.leases import held

MAX_HELD: Final = 64  # of the nearest ancestors


def connect() -> None:
    """Connect the handler; calling it again changes nothing."""
    signals.before_task_publish.connect(on_publish, weak=False, dispatch_uid="mlcache.lineage")


def ancestry() -> tuple[int, ...]:
    """Return the fences that the sender of the message which this process executes has acted under."""
    task = _state.get_current_worker_task()
    found = header_of(task.request, HELD) if task is not None else None
    if not isinstance(found, list | tuple):
        return ()
    return tuple([fence for fence in found[-MAX_HELD:] if isinstance(fence, int)])


def on_publish(headers: Any = None, **_: Any) -> None:
    """Put the fences of this code and of its ancestors into a message's headers."""
    fences = (*ancestry(), *held())
    if isinstance(headers, dict):
        if fences:
            headers[HELD] = list(dict.fromkeys(fences))[-MAX_HELD:]
        else:
            headers.pop(HELD, None)  # a retry carries those of its first sender
