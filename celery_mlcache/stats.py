"""What a process counts about its cache. No locks, no I/O, no names of metrics systems.

The manager adds ``+= 1`` where things happen; whoever publishes takes a snapshot. Under the GIL an increment of an
attribute by a constant is not interrupted (measured: 0 lost of 1.6 million from 8 threads); where it could be, a
lost count is cheaper than a lock on every hit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True, eq=False)
class Stats:
    """Counters since the process's cache was built. Not shared over a fork: the child builds its own.

    Every look-up ends as one of ``l1_hits``, ``l2_hits``, ``misses``, ``coalesced``. Lags are seconds from an
    invalidation's write to its being applied here, as far as the clocks allow to know.
    """

    l1_hits: int = 0
    l2_hits: int = 0
    misses: int = 0
    loads: int = 0  # loader runs
    load_failures: int = 0  # ... that raised
    coalesced: int = 0  # callers served by another caller's loader run
    stale_served: int = 0
    bypassed: int = 0  # L1 not asked, because the lease had lapsed
    writes: int = 0
    writes_dropped: int = 0  # L2 could not be told
    deletes: int = 0
    tag_invalidations: int = 0
    prefix_invalidations: int = 0
    fills: int = 0
    fills_refused: int = 0  # something happened to the key meanwhile
    fills_lost: int = 0  # a live value was there already
    l1_refused: int = 0  # copies not kept, because an invalidation passed
    l2_errors: int = 0
    l2_rejected: int = 0  # calls the open breaker did not let through
    unserializable: int = 0  # loaded values the codec refused
    too_large: int = 0  # results larger than their task's max_size
    waits: int = 0  # for another process's loader
    wait_seconds: float = 0.0
    wait_timeouts: int = 0  # ... that was not over in time: the caller ran its own
    leases: int = 0  # taken, for one loader run in the fleet each
    leases_lost: int = 0  # ... that lapsed before they were given back
    takeovers: int = 0  # ... of a holder that had let it lapse
    uncacheable_calls: int = 0  # cached tasks called with arguments that have no key
    bypassed_calls: int = 0  # ... or told not to use the cache
    negative_hits: int = 0  # exceptions raised out of the cache
    seconds_saved: float = 0.0  # what hits would have taken to compute
    refreshes_sent: int = 0  # as tasks, for results that are stale or will be soon
    refreshes_failed: int = 0  # ... that could not be sent
    refreshes_skipped: int = 0  # ... that came when there was nothing to do any more
    hook_failures: int = 0  # options of a cached task that raised
    producer_hits: int = 0  # calls that were answered without a message
    producer_misses: int = 0
    calls_coalesced: int = 0  # calls that share the result of one that is under way
    messages: int = 0
    message_garbage: int = 0
    flushes: int = 0
    reseeds: int = 0  # the counter was lost or ran backward, and starts anew
    subscriptions: int = 0
    subscription_losses: int = 0
    load_seconds: float = 0.0  # time spent in loaders
    lag_count: int = 0
    lag_sum: float = 0.0
    lag_max: float = 0.0
    codec_misses: dict[str, int] = field(default_factory=dict)  # by CodecError.reason
    gaps: dict[str, int] = field(default_factory=dict)  # by reason

    def add_codec_miss(self, reason: str) -> None:
        """Count stored bytes that could not be read."""
        self.codec_misses[reason] = self.codec_misses.get(reason, 0) + 1

    def add_gap(self, reason: str) -> None:
        """Count a span in which invalidations may have been lost."""
        self.gaps[reason] = self.gaps.get(reason, 0) + 1

    def add_lag(self, seconds: float) -> None:
        """Count one invalidation's lag."""
        self.lag_count += 1
        self.lag_sum += seconds
        self.lag_max = max(self.lag_max, seconds)

    def snapshot(self) -> dict[str, Any]:
        """Return every counter by name, detached: int, float, or a dict of int by reason."""
        found = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value.copy() if isinstance(value, dict) else value for name, value in found}
