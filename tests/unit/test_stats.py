"""The counters."""

from __future__ import annotations

import pytest

from celery_mlcache.stats import Stats


def test_snapshot_names_every_counter():
    """A snapshot holds each counter once, all zero at the start."""
    snapshot = Stats().snapshot()

    assert set(Stats.__slots__) == set(snapshot)
    assert not any(snapshot.values())


def test_snapshot_is_detached():
    """What is counted later does not show in an earlier snapshot, nor the other way round."""
    stats = Stats()
    stats.add_gap("hole")
    before = stats.snapshot()

    stats.add_gap("hole")
    stats.l1_hits += 1
    before["gaps"]["reseed"] = 7

    assert before["l1_hits"] == 0
    assert stats.snapshot()["gaps"] == {"hole": 2}
    assert stats.snapshot()["l1_hits"] == 1


def test_reasons_are_counted_apart():
    """Gaps and unreadable values are counted by reason."""
    stats = Stats()
    for reason in ("hole", "reseed", "hole"):
        stats.add_gap(reason)
        stats.add_codec_miss(reason)

    assert stats.gaps == {"hole": 2, "reseed": 1}
    assert stats.codec_misses == {"hole": 2, "reseed": 1}


def test_lag_keeps_count_sum_and_worst():
    """Lags give a mean and a worst case, in seconds."""
    stats = Stats()
    for seconds in (0.25, 1.0, 0.5):
        stats.add_lag(seconds)

    snapshot = stats.snapshot()
    assert (snapshot["lag_count"], snapshot["lag_sum"], snapshot["lag_max"]) == (3, 1.75, 1.0)


def test_misspelt_counter_is_an_error():
    """Counting under a name that does not exist fails instead of being lost."""
    stats = Stats()

    with pytest.raises(AttributeError):
        stats.l1_hit = 1
