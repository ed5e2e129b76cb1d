"""What is asked of a look-up and what it has come to: the words between the manager and cached tasks. Pure records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from celery_mlcache.entry import MISS
from celery_mlcache.errors import SerializationError

Contention = Literal["wait", "stale", "retry", "compute", "raise"]
Level = Literal["l1", "l2", "shared", "miss", "stale"]

MAX_TTL: Final = 10 * 365 * 86400.0  # seconds; far above it Redis refuses the command


class Loaded(NamedTuple):
    """What a loader made, and how it is to be kept.

    Attributes:
        value: The value.
        life: Seconds that it lives; None for the default.
        tags: What it can be invalidated by, beside its key.
        stale_life: Seconds beyond its life for which it is kept in L2, to be served stale.
        is_kept: Whether it is to be stored at all.
        is_jittered: Whether the cache's jitter shortens its life.
        max_size: Bytes that it may take in Redis; None for any.
        is_optional: Where it cannot be stored, that is no error even if ``strict``.
        is_told: Whoever loads tells of it where it cannot be stored.
    """

    value: Any
    life: float | None = None
    tags: tuple[str, ...] = ()
    stale_life: float = 0.0
    is_kept: bool = True
    is_jittered: bool = True
    max_size: int | None = None
    is_optional: bool = False
    is_told: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """How a look-up goes on where no level has a value; for :meth:`CacheManager.resolve`.

    Attributes:
        load: Makes the value.
        tags: Those of its tags that are known before.
        wants_stale: A stale value will do, and nobody loads then.
        forgives: Says of an Exception that *load* has raised whether a stale value may stand in for it.
        is_shared: One load at a time in the whole fleet, by a lease; else in this process.
        contention: What to do while another one loads.
        max_wait: Seconds to wait for others in all; None for the cache's setting.
        ancestry: Returns fences of leases that this call must not wait for, beside those of :func:`leases.held`.
    """

    load: Callable[[], Loaded]
    tags: tuple[str, ...] = ()
    wants_stale: bool = False
    forgives: Callable[[Exception], bool] | None = None
    is_shared: bool = False
    contention: Contention = "wait"
    max_wait: float | None = None
    ancestry: Callable[[], Sequence[int]] = tuple


class Answer(NamedTuple):
    """What a look-up has come to.

    Attributes:
        value: The value.
        level: Where it was found. "shared": another caller in this process was just loading it; "miss": nowhere.
        is_loaded: This caller's own loader made it. Where it ran and another's value won, this is that value.
        error: What the loader raised, where a stale value stands in for it.
        is_degraded: L2 did not answer.
        is_kept: What was loaded could be stored, and was not told not to be.
        is_stored: It was; else something has happened to the key meanwhile, or L2 did not take it.
        refused: Why it could not be stored, if it was to be.
    """

    value: Any
    level: Level
    is_loaded: bool = False
    error: Exception | None = None
    is_degraded: bool = False
    is_kept: bool = True
    is_stored: bool = False
    refused: SerializationError | None = None


class Glance(NamedTuple):
    """What a look-up of limited time has come to.

    Attributes:
        value: The value, or MISS.
        is_answered: Whether that was said in time.
        stamp: Where L2 has no value: when that was last removed, in the order of writes; 0: never, as far as is known.
        is_remote: L2 was asked.
    """

    value: Any
    is_answered: bool
    stamp: int = 0
    is_remote: bool = False


class Inspection(NamedTuple):
    """What there is of a key, found without changing anything.

    Attributes:
        value: The value, or MISS.
        level: Where it is: "stale" where its life has ended, None where it is nowhere.
        remaining: Seconds of life that it has left.
        tags: What it can be invalidated by.
        why: Why it is nowhere, in a sentence.
    """

    value: Any = MISS
    level: Literal["l1", "l2", "stale"] | None = None
    remaining: float | None = None
    tags: tuple[str, ...] = ()
    why: str = ""


def check_ttl(ttl: object) -> float:
    """Return *ttl* if it is a number of seconds > 0, finite and storable.

    Raises:
        ValueError: It is not.
    """
    if isinstance(ttl, (int, float)) and not isinstance(ttl, bool) and 0 < ttl <= MAX_TTL:  # nan is neither
        return float(ttl)
    msg = f"ttl must be a number of seconds > 0 and <= {MAX_TTL:g}, or None for the default, not {ttl!r:.80}"
    raise ValueError(msg)


def check_stale_ttl(stale_ttl: object) -> float:
    """Return *stale_ttl* if it is 0 or could be a ttl; raises ValueError if not."""
    if isinstance(stale_ttl, (int, float)) and not isinstance(stale_ttl, bool) and 0 <= stale_ttl <= MAX_TTL:
        return float(stale_ttl)
    msg = f"stale_ttl must be a number of seconds >= 0 and <= {MAX_TTL:g}, not {stale_ttl!r:.80}"
    raise ValueError(msg)
