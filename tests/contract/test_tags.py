"""What a user may rely on from tags and prefixes, on every wiring; real Redis."""

from __future__ import annotations

import pytest
from celery.exceptions import Retry, SoftTimeLimitExceeded

from celery_mlcache import MISS, create_cache_manager
from celery_mlcache.errors import CacheKeyError, RemoteStoreError
from celery_mlcache.floors import MAX_PREFIXES
from celery_mlcache.keys import RedisNames
from celery_mlcache.wire import HEAD_SIZE, MAX_STAMP, pack_head, parse_message, split_value
from tests.contract.test_manager import (
    WITH_L2,
    Background,
    BlockedLoader,
    cache,
    forbid_l2,
    make,
    never,
    wiring,
)
from tests.support.ports import free_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis
__all__ = ["cache", "make", "wiring"]  # fixtures


@pytest.fixture
def pair(make, wiring):
    """Two managers of each wiring that has an L2: two processes, as far as the cache can tell."""
    if wiring not in WITH_L2:
        pytest.skip("there is one process only")
    return make(wiring), make(wiring)


def follows(manager, key, expected):
    """Wait until *manager* answers so: its backplane needs a moment."""
    wait_until(lambda: manager.get(key, MISS) == expected, what=f"{key} to be {expected!r}")


class TestTags:
    def test_a_tag_invalidates_what_carries_it(self, cache):
        """One of its tags is enough; what does not carry it stays."""
        cache.set("both", 1, tags=["t", "u"])
        cache.set("one", [2], tags=("t",))
        cache.set("other", 3, tags={"u"})
        cache.set("none", 4)
        assert cache.invalidate_tags("t") is True
        assert cache.get_many(["both", "one", "other", "none"]) == {"other": 3, "none": 4}
        assert not cache.exists("one")
        assert cache.ttl("both") is None

    def test_several_tags_at_once(self, cache):
        """Each of them counts; none at all is nothing to do."""
        cache.set_many({"a": 1, "b": 2}, tags=["t"])
        cache.set("c", 3, tags=["u"])
        cache.set("d", 4, tags=["v"])
        assert cache.invalidate_tags() is True
        assert cache.get("a") == 1
        cache.invalidate_tags("t", "u", "t")
        assert cache.get_many(["a", "b", "c", "d"]) == {"d": 4}
        assert cache.stats()["tag_invalidations"] == 2

    def test_what_is_written_afterwards_lives(self, cache):
        """With the same tag and the same key."""
        cache.set("k", "old", tags=["t"])
        cache.invalidate_tags("t")
        cache.set("k", "new", tags=["t"])
        assert cache.get("k") == "new"
        cache.invalidate_tags("t")
        assert cache.get_or_set("k", lambda: "loaded", tags=["t"]) == "loaded"
        assert cache.get("k") == "loaded"

    @pytest.mark.parametrize("how", ["set", "add", "get_or_set", "get_or_set_many", "refresh", "set_many"])
    def test_every_way_to_store_takes_tags(self, cache, how):
        """What it has stored goes with its tag."""
        {
            "set": lambda: cache.set("k", 1, tags=["t"]),
            "add": lambda: cache.add("k", 1, tags=["t"]),
            "get_or_set": lambda: cache.get_or_set("k", lambda: 1, tags=["t"]),
            "get_or_set_many": lambda: cache.get_or_set_many(["k"], lambda keys: {"k": 1}, tags=["t"]),
            "refresh": lambda: cache.refresh("k", lambda: 1, tags=["t"]),
            "set_many": lambda: cache.set_many({"k": 1}, tags=["t"]),
        }[how]()
        assert cache.get("k") == 1
        cache.invalidate_tags("t")
        assert cache.get("k", MISS) is MISS

    def test_the_last_write_says_which_tags(self, cache):
        """A set without tags, or with others, takes them off."""
        cache.set("k", 1, tags=["t"])
        cache.set("k", 2, tags=["u"])
        cache.invalidate_tags("t")
        assert cache.get("k") == 2
        cache.set("k", 3)
        cache.invalidate_tags("u")
        assert cache.get("k") == 3

    @pytest.mark.parametrize("change", ["incr", "touch"])
    def test_a_changed_entry_keeps_its_tags(self, cache, change):
        """A counter and a prolonged entry go with the tags that they were stored with."""
        cache.set("k", 5, tags=["t"])
        assert cache.get("k") == 5
        assert cache.incr("k") == 6 if change == "incr" else cache.touch("k", 60)
        assert cache.get("k") == (6 if change == "incr" else 5)
        cache.invalidate_tags("t")
        assert cache.get("k", MISS) is MISS
        assert cache.incr("k") == 1

    def test_a_signed_counter_keeps_its_tags(self, make):
        """Its increment is a compare and set of ours."""
        cache = make("both", signing_keys=("k" * 32,))
        cache.set("k", 5, tags=["t"])
        assert cache.incr("k") == 6
        cache.invalidate_tags("t")
        assert cache.get("k", MISS) is MISS

    def test_an_invalidated_entry_is_absent_to_every_operation(self, cache):
        """Nobody counts it, prolongs it or finds it."""
        for key in "abcd":
            cache.set(key, 5, tags=["t"])
        cache.invalidate_tags("t")
        assert cache.delete("a") is False
        assert cache.touch("b", 60) is False
        assert cache.add("c", 6) is True
        assert cache.incr("d", 2) == 2

    def test_a_loader_that_began_before_does_not_bring_it_back(self, cache):
        """Its result is returned, and not stored: it may be older than the invalidation."""
        loader = BlockedLoader("old")
        call = Background(lambda: cache.get_or_set("k", loader, tags=["t", "u"]))
        assert loader.has_begun.wait(10)
        cache.invalidate_tags("u")
        loader.may_end.set()
        assert call.result() == "old"
        assert cache.get("k", MISS) is MISS
        assert cache.stats()["fills_refused"] == 1

    def test_a_refresh_that_began_before_does_not_bring_it_back(self, cache):
        """Though the entry that it would replace does not carry the tag."""
        cache.set("k", "first")
        loader = BlockedLoader("old")
        call = Background(lambda: cache.refresh("k", loader, tags=["t"]))
        assert loader.has_begun.wait(10)
        cache.invalidate_tags("t")
        loader.may_end.set()
        assert call.result() == "old"
        assert cache.get("k", MISS) in ("first", MISS)

    def test_who_comes_after_does_not_share_the_loader_of_before(self, cache):
        """Read your writes: the invalidation of one thread counts for whoever calls later."""
        loader = BlockedLoader("old")
        call = Background(lambda: cache.get_or_set("k", loader, tags=["t"]))
        assert loader.has_begun.wait(10)
        cache.invalidate_tags("t")
        assert cache.get_or_set("k", lambda: "new", tags=["t"]) == "new"
        loader.may_end.set()
        assert call.result() in ("old", "new")
        assert cache.get("k") == "new"

    def test_a_newcomers_own_tags_count(self, cache):
        """It would store its result under them, and knows that they were invalidated after the other had begun."""
        loader = BlockedLoader("old")
        call = Background(lambda: cache.get_or_set("k", loader, tags=["t"]))
        assert loader.has_begun.wait(10)
        cache.invalidate_tags("u")
        assert cache.get_or_set("k", lambda: "new", tags=["u"]) == "new"
        loader.may_end.set()
        assert call.result() in ("old", "new")

    def test_another_tag_does_not_disturb_a_loader(self, cache, wiring):
        """Its result is stored; only a process that hears nothing has to take it for possible, once for each tag."""
        loader = BlockedLoader("value")
        call = Background(lambda: cache.get_or_set("k", loader, tags=["t"]))
        assert loader.has_begun.wait(10)
        cache.invalidate_tags("other")
        coherence = cache._parts.tier.coherence
        wait_until(lambda: wiring != "both" or coherence.applied == coherence.seen, what="the message")
        loader.may_end.set()
        assert call.result() == "value"
        assert cache.stats()["fills_refused"] == (wiring == "l2")
        assert cache.get_or_set("k", lambda: "value" if wiring == "l2" else never(), tags=["t"]) == "value"
        assert cache.get("k") == "value"

    def test_every_process_follows(self, pair):
        """Copies of the other process die at once, behind the front too."""
        one, other = pair
        for key in ("a", "b", "c"):
            one.set(key, key, tags=["t"])
            assert other.get(key) == key
        if other._parts.tier.local is not None:
            other._parts.tier.local._front.pop("b")
        one.invalidate_tags("t")
        for key in ("a", "b", "c"):
            follows(other, key, MISS)
        one.set("a", "new", tags=["t"])
        follows(other, "a", "new")

    def test_a_hit_in_l1_asks_nobody(self, make):
        """Reading a tagged entry from L1 costs no round trip."""
        cache = make("both")
        cache.set("k", 1, tags=["t"])
        cache.invalidate_tags("u")
        assert cache.get("k") == 1
        forbid_l2(cache)
        assert cache.get("k") == cache.get_or_set("k", never, tags=["t"]) == 1

    @pytest.mark.parametrize("bad", [("",), ("a\n",), ("x" * 1025,), (5,), tuple(f"t{number}" for number in range(65))])
    def test_bad_tags_raise_and_change_nothing(self, cache, bad):
        """Before anything is sent."""
        cache.set("k", 1, tags=["t"])
        with pytest.raises(CacheKeyError, match="tag"):
            cache.invalidate_tags("t", *bad)
        for store in (cache.set, cache.add, lambda key, value, tags: cache.get_or_set(key, lambda: value, tags=tags)):
            with pytest.raises(CacheKeyError, match="tag"):
                store("k", 2, tags=bad)
        assert cache.get("k") == 1

    @pytest.mark.parametrize("bad", ["tag", b"tag", 5, {"t": 1}])
    def test_tags_are_a_collection(self, cache, bad):
        """A str would be taken for its letters."""
        for store in (cache.set, cache.add, lambda key, value, tags: cache.get_or_set(key, lambda: value, tags=tags)):
            with pytest.raises(TypeError, match="tags must be a list, tuple or set of str"):
                store("k", 2, tags=bad)


class TestPrefixes:
    def test_a_prefix_invalidates_what_begins_with_it(self, cache):
        """To the letter: patterns mean nothing."""
        keys = ["user:1", "user:2", "use", "users", "User:1", "user*:3", "u*er:1", "xuser:1"]
        cache.set_many(dict.fromkeys(keys, 1))
        assert cache.invalidate_prefix("user:") is True
        assert set(cache.get_many(keys)) == {"use", "users", "User:1", "user*:3", "u*er:1", "xuser:1"}
        cache.invalidate_prefix("u*")
        assert set(cache.get_many(keys)) == {"use", "users", "User:1", "user*:3", "xuser:1"}
        assert cache.stats()["prefix_invalidations"] == 2

    def test_what_is_written_afterwards_lives(self, cache):
        """The prefix does not haunt its keys."""
        cache.set("user:1", "old")
        cache.invalidate_prefix("user:")
        cache.set("user:1", "new")
        assert cache.get("user:1") == "new"
        assert cache.get_or_set("user:2", lambda: 2) == cache.get("user:2") == 2

    def test_a_loader_that_began_before_does_not_bring_it_back(self, cache):
        """Though L2 held nothing that a scan could find."""
        loader = BlockedLoader("old")
        call = Background(lambda: cache.get_or_set("user:1", loader))
        assert loader.has_begun.wait(10)
        cache.invalidate_prefix("user:")
        assert cache.get_or_set("user:1", lambda: "new") == "new"
        loader.may_end.set()
        assert call.result() in ("old", "new")
        assert cache.get("user:1") == "new"

    def test_every_process_follows(self, pair):
        """Copies of the other process die at once, behind the front too."""
        one, other = pair
        one.set_many({"user:1": 1, "user:2": 2, "shop:1": 3})
        assert other.get_many(["user:1", "user:2", "shop:1"]) == {"user:1": 1, "user:2": 2, "shop:1": 3}
        if other._parts.tier.local is not None:
            other._parts.tier.local._front.pop("user:2")
        one.invalidate_prefix("user:")
        follows(other, "user:1", MISS)
        follows(other, "user:2", MISS)
        assert other.get("shop:1") == 3

    @pytest.mark.parametrize("bad", ["", "a\n", "x" * 1025, 5, None])
    def test_bad_prefixes_raise(self, cache, bad):
        """An empty one would be clear()."""
        with pytest.raises(CacheKeyError, match="prefix"):
            cache.invalidate_prefix(bad)


class TestExpiry:
    """Soft against hard: what has expired may be served stale, what was removed may not."""

    @pytest.fixture
    def cache(self, make):
        """Both levels: only L2 keeps what has expired."""
        return make("both")

    @staticmethod
    def fails():
        """A loader whose source is down."""
        raise ConnectionError("the source is down")

    def failing(self, cache, **options):
        """Load with a source that is down."""
        return cache.get_or_set("k", self.fails, stale_ttl=60, **options)

    @pytest.mark.parametrize("store", ["set", "get_or_set", "set_many", "refresh"])
    def test_an_expired_value_is_absent_and_found_stale(self, cache, store):
        """By whoever asks for it stale, and by a caller whose loader fails; nobody else sees it."""
        {
            "set": lambda: cache.set("k", ["v"], 60, stale_ttl=60),
            "get_or_set": lambda: cache.get_or_set("k", lambda: ["v"], 60, stale_ttl=60),
            "set_many": lambda: cache.set_many({"k": ["v"]}, 60, stale_ttl=60),
            "refresh": lambda: cache.refresh("k", lambda: ["v"], 60, stale_ttl=60),
        }[store]()
        assert cache.get("k") == ["v"]
        assert cache.expire("k") is True
        assert cache.get("k", MISS) is MISS
        assert not cache.exists("k")
        assert cache.ttl("k") is None
        assert cache.get_many(["k"]) == {}
        assert cache.delete("other") is False
        before = cache.stats()["stale_served"]
        assert cache.get("k", stale=True) == self.failing(cache) == ["v"]
        assert cache.stats()["stale_served"] == before + 2
        assert cache.stats()["l1_entries"] == 0
        with pytest.raises(ConnectionError, match="the source is down"):
            cache.get_or_set("k", self.fails)  # this caller does not take it stale

    def test_a_life_that_ends_is_an_expiry_too(self, cache, redis_clock):
        """The value is there for stale_ttl seconds more, and not one longer."""
        cache.set("k", "v", 60, stale_ttl=30)
        redis_clock(60.5)
        assert cache.get("k", MISS) is MISS
        assert self.failing(cache) == "v"
        redis_clock(30)
        assert cache.get("k", MISS, stale=True) is MISS
        with pytest.raises(ConnectionError):
            self.failing(cache)

    @pytest.fixture
    def redis_clock(self, cache, shared_redis, monkeypatch):
        """A function that lets so many seconds pass in the head of "k": both ends come nearer."""
        client = shared_redis.client()
        name = RedisNames(cache.stats()["namespace"]).value("k")

        def advance(seconds):
            data = client.get(name)
            stamp, expires, stale, _ = split_value(data)
            earlier = int(seconds * 1000)
            client.set(name, pack_head(stamp, expires - earlier, stale - earlier) + data[HEAD_SIZE:], keepttl=True)
            cache._parts.tier.void()

        return advance

    def test_removal_leaves_nothing_stale(self, cache):
        """By key, tag, prefix and all at once."""
        for remove in (
            lambda: cache.delete("k"),
            lambda: cache.invalidate_tags("t"),
            lambda: cache.invalidate_prefix("k"),
            cache.clear,
        ):
            for is_expired in (False, True):
                cache.set("k", "v", 60, tags=["t"], stale_ttl=60)
                assert not is_expired or cache.expire("k")
                assert cache.get("k", stale=True) == "v"
                remove()
                assert cache.get("k", MISS, stale=True) is MISS
                with pytest.raises(ConnectionError):
                    self.failing(cache)

    def test_tags_expire_softly(self, cache):
        """What carries one is absent and found stale, in L1 too; a removal after it leaves nothing."""
        cache.set("k", "v", 60, tags=["t"], stale_ttl=60)
        cache.set("without", "v", 60, tags=["t"])
        assert cache.expire_tags("t") is True
        assert cache.get_many(["k", "without"]) == {}
        assert cache.get("k", stale=True) == self.failing(cache) == "v"
        assert cache.get("without", MISS, stale=True) is MISS
        cache.set("new", "v", tags=["t"])
        assert cache.get("new") == "v"
        cache.invalidate_tags("t")
        assert cache.get("k", MISS, stale=True) is MISS

    def test_an_expiry_refuses_the_loader_of_before(self, cache):
        """It may have read what the expiry was about; the stale value stays."""
        cache.set("k", "v", 60, stale_ttl=60)
        cache.expire("k")
        loader = BlockedLoader("old")
        call = Background(lambda: cache.get_or_set("k", loader, stale_ttl=60))
        assert loader.has_begun.wait(10)
        cache.expire("k")
        loader.may_end.set()
        assert call.result() == "old"
        assert cache.get("k", MISS) is MISS

    @pytest.mark.parametrize("first", [lambda c: c.expire("k"), lambda c: c.expire_tags("t")])
    def test_what_has_expired_is_not_removed_by_another_expiry(self, cache, first):
        """It ends a life; what is kept beyond it stays, and a removal still takes it."""
        cache.set("k", "v", 60, stale_ttl=60, tags=["t"])
        first(cache)
        assert cache.expire("k") is False
        assert cache.get("k", MISS) is MISS
        assert cache.get("k", stale=True) == "v"
        cache.invalidate_tags("t")
        assert cache.expire("k") is False
        assert cache.get("k", MISS, stale=True) is MISS

    def test_a_new_value_takes_the_place_of_a_stale_one(self, cache):
        """A loader that does not fail is what everybody waits for."""
        cache.set("k", "v", 60, stale_ttl=60)
        cache.expire("k")
        assert cache.get_or_set("k", lambda: "new") == cache.get("k") == cache.get("k", stale=True) == "new"

    @pytest.mark.parametrize("change", [lambda c: c.incr("k"), lambda c: c.touch("k", 90)])
    def test_a_changed_value_keeps_its_stale_life(self, cache, change):
        """It still is what it was, and older or longer."""
        cache.set("k", 5, 60, stale_ttl=60)
        change(cache)
        value = cache.get("k")
        cache.expire("k")
        assert cache.get("k", stale=True) == value

    def test_what_stops_a_task_is_not_swallowed(self, cache):
        """A soft time limit or a retry goes its way, whatever there is to serve."""
        cache.set("k", "v", 60, stale_ttl=60)
        cache.expire("k")
        for error in (SoftTimeLimitExceeded(), Retry(), KeyboardInterrupt()):

            def loader(error=error):
                raise error

            with pytest.raises(type(error)):
                cache.get_or_set("k", loader, stale_ttl=60)

    def test_followers_are_not_given_what_they_did_not_ask_for(self, cache):
        """Whoever waits for a loader that fails asks for itself: stale or not is each caller's own choice."""
        cache.set("k", "v", 60, stale_ttl=60)
        cache.expire("k")
        loader = BlockedLoader(ConnectionError("down"))
        leader = Background(lambda: cache.get_or_set("k", loader, stale_ttl=60))
        assert loader.has_begun.wait(10)
        follower = Background(lambda: cache.get_or_set("k", lambda: "new"))
        flights = cache._parts.flights
        wait_until(lambda: flights._table["k"]._event is not None, what="the follower to wait")
        loader.may_end.set()
        assert leader.result() == "v"
        assert follower.result() == "new"

    def test_a_failing_redis_does_not_hide_why_the_loader_failed(self, make):
        """Strict callers too get the error of their own source."""
        cache = make("both", strict=True)

        def loader():
            cache._parts.remote._connect, cache._parts.remote._idle = refuse, type(cache._parts.remote._idle)()
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            cache.get_or_set("k", loader, stale_ttl=60)

    def test_without_l2_nothing_is_kept_stale(self, make):
        """An expiry is a removal there."""
        cache = make("moka")
        cache.set("k", "v", 60, stale_ttl=60)
        assert cache.expire("k") is True
        assert cache.get("k", MISS, stale=True) is MISS
        assert cache.expire("k") is False

    @pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), True, "5", None, "", []])
    def test_bad_stale_ttls_raise(self, cache, bad):
        """With what is allowed, and before anything is loaded."""
        for store in (lambda: cache.set("k", 1, stale_ttl=bad), lambda: cache.get_or_set("k", never, stale_ttl=bad)):
            with pytest.raises(ValueError, match="stale_ttl must be a number of seconds >= 0"):
                store()


class TestGarbage:
    def test_prefixes_that_nobody_invalidated_void_l1_for_a_moment_only(self, make):
        """More than are remembered, with a stamp that no counter reaches: the next proof forgets them."""
        cache = make("both")
        cache.warm()
        wait_until(lambda: cache.stats()["lease"] == "held", what="the lease")
        text = "\n".join(["1", "P", str(MAX_STAMP), "0", *[f"p{i}" for i in range(MAX_PREFIXES + 1)]])
        cache._parts.tier.on_message(parse_message(text.encode()))
        assert cache.get("absent", MISS) is MISS

        def is_kept():
            cache.set("k", 1)
            return cache.stats()["l1_entries"] > 0

        wait_until(is_kept, what="L1 to hold something again")


class TestL1Alone:
    @pytest.mark.parametrize(
        ("step", "call"),
        [
            ("invalidate", lambda c: c.invalidate_tags("t")),
            ("invalidate", lambda c: c.invalidate_prefix("k")),
            ("flush", lambda c: c.clear()),
        ],
    )
    def test_nothing_comes_between_an_invalidations_stamp_and_its_effect(self, make, monkeypatch, step, call):
        """A touch or an increment there would give what is to die a younger stamp, and it would live on."""
        cache = make("moka")
        cache.set("k", "old", tags=["t"])
        tier = cache._parts.tier
        take_effect, tried = getattr(tier, step), []

        def try_lock():
            is_free = tier.alone.acquire(blocking=False)
            if is_free:
                tier.alone.release()
            return is_free

        def look(*arguments):
            tried.append(Background(try_lock).result())
            return take_effect(*arguments)

        monkeypatch.setattr(tier, step, look)
        assert call(cache) is True
        assert tried == [False]
        assert cache.get("k", MISS) is MISS


class TestWithoutAnAnswer:
    CALLS = pytest.mark.parametrize(
        "call",
        [
            lambda c: c.invalidate_tags("t"),
            lambda c: c.expire_tags("t"),
            lambda c: c.invalidate_prefix("k"),
            lambda c: c.clear(),
            lambda c: c.expire("k"),
        ],
    )

    @CALLS
    def test_an_invalidation_that_may_have_happened_empties_l1(self, make, call):
        """Nothing is served here that it was meant to kill, and the caller is told that L2 was not."""
        cache = make("both")
        cache.set("k", 1, tags=["t"])
        assert cache.get("k") == 1
        cache._parts.remote._connect, cache._parts.remote._idle = refuse, type(cache._parts.remote._idle)()
        assert call(cache) is False
        assert cache._parts.tier.local.peek("k") is None
        assert cache.stats()["writes_dropped"] == 1

    @CALLS
    def test_strict_raises(self, call):
        """Whoever asks for errors gets them."""
        with create_cache_manager(redis_port=free_port(), strict=True) as cache, pytest.raises(RemoteStoreError):
            call(cache)


def refuse():
    """Make no connection."""
    raise ConnectionRefusedError
