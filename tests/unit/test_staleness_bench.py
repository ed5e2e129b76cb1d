"""The staleness bench's arithmetic: what counts as an older answer, and from when."""

from __future__ import annotations

from tests.benchmarks.crew import percentile
from tests.benchmarks.staleness import Spell, Write, delays


def test_the_delay_is_to_the_last_older_answer():
    """Whatever fresh answers come in between, the last older one counts."""
    spells = [Spell(1, 9.0), Spell(2, 10.0), Spell(1, 10.5), Spell(2, 20.0)]
    assert delays([Write(2, 10.0)], spells) == [0.5]


def test_answers_that_started_before_the_write_returned_are_not_older():
    """A read that overlaps the write may answer with either value."""
    assert delays([Write(2, 10.0)], [Spell(1, 10.0), Spell(2, 20.0)]) == [0.0]


def test_a_miss_is_no_older_value():
    """A miss sends the caller to the source."""
    assert delays([Write(2, 10.0)], [Spell(1, 9.0), Spell(None, 12.0)]) == [0.0]


def test_every_write_is_judged_by_itself():
    """A value that two writes have replaced is too old for both."""
    assert delays([Write(2, 10.0), Write(3, 11.0)], [Spell(1, 11.5), Spell(2, 11.7)]) == [1.5, 0.6999999999999993]


def test_answers_after_the_end_of_a_fault_do_not_count():
    """``until`` ends what a fault is held responsible for."""
    assert delays([Write(2, 10.0, until=11.0)], [Spell(1, 12.0)]) == [0.0]


def test_percentiles_are_values_that_were_measured():
    """Nearest rank: the worst of 100 is beyond p99, the worst of 10 is not."""
    hundred = list(range(1, 101))
    assert (percentile(hundred, 0.5), percentile(hundred, 0.99), percentile([3, 1, 2], 0.99)) == (50, 99, 3)
