"""Floors: what was invalidated is remembered, and forgetting never brings anything back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from celery_mlcache import floors as module
from celery_mlcache.floors import Floors

TAGS = st.sampled_from([f"t{number}" for number in range(12)])
KEYS = st.sampled_from(["a", "ab", "b", "ba", "abc"])
PREFIXES = st.text("ab", min_size=1, max_size=2)


def test_nothing_is_dead_at_first():
    """No floor stands under anything."""
    floors = Floors()
    assert floors.of("k", ("t",)) == floors.newest == 0


def test_each_kind_kills_its_own():
    """Everything, a tag, a prefix; the highest counts, and an older invalidation lowers none."""
    floors = Floors()
    floors.everything = 3
    floors.raise_tags(("t", "u"), 5)
    floors.raise_tags(("t",), 4)
    floors.raise_prefix("ab", 7)
    floors.raise_prefix("ab", 6)
    assert floors.of("x", ()) == 3
    assert floors.of("x", ("t",)) == floors.of("x", ("v", "u")) == floors.of_tags(("t",)) == 5
    assert floors.of("abc", ("t",)) == 7
    assert floors.of("ba", ()) == 3
    assert floors.newest == 7


def test_forget_leaves_only_the_floor_under_everything():
    """It is for when L1 is void."""
    floors = Floors()
    floors.everything = 3
    floors.raise_tags(("t",), 5)
    floors.raise_prefix("p", 6)
    floors.forget()
    assert (floors.of("p", ("t",)), floors.newest) == (3, 0)


@given(
    events=st.lists(st.one_of(st.tuples(st.just("tag"), TAGS), st.tuples(st.just("prefix"), PREFIXES)), max_size=60),
    key=KEYS,
    tags=st.lists(TAGS, max_size=3),
)
def test_a_bounded_memory_errs_on_the_safe_side_only(events, key, tags):
    """With room for few, an entry that is dead is never taken for alive, and nothing newer than all is dead."""
    limits = module.MAX_TAGS, module.MAX_PREFIXES
    module.MAX_TAGS, module.MAX_PREFIXES = 3, 2
    try:
        floors = Floors()
        truth = 0
        for stamp, (kind, name) in enumerate(events, start=1):
            if kind == "tag":
                floors.raise_tags((name,), stamp)
                truth = stamp if name in tags else truth
            else:
                floors.raise_prefix(name, stamp)
                truth = stamp if key.startswith(name) else truth
            assert truth <= floors.of(key, tuple(tags)) <= stamp
            assert len(floors._tags) + len(floors._old_tags) <= 3 + 4
            assert len(floors._prefixes) <= 2
    finally:
        module.MAX_TAGS, module.MAX_PREFIXES = limits
