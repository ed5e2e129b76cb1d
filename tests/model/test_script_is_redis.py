"""The script of the model tests is Redis: the same operations through both have the same outcomes and messages."""

from __future__ import annotations

import itertools
import random
import time
from functools import cache

import pytest
import redis
from redis.backoff import NoBackoff
from redis.connection import Connection
from redis.retry import Retry

from celery_mlcache.errors import NotAnIntegerError
from celery_mlcache.keys import RedisNames
from celery_mlcache.protocols import Fence
from celery_mlcache.remote import RedisRemote
from celery_mlcache.route import Fixed
from celery_mlcache.stats import Stats
from celery_mlcache.wire import HEAD_SIZE, parse_message, split_value
from tests.support.scripted import CODEC, Clock, ScriptedRemote, Server

KEYS = ("a", "b", "ключ")
TAGS = ((), (), ("t",), ("u", "тег"), ("t", "u"))
PREFIXES = ("a", "к", "b", "bo")
LIVES = (60.0, 3600.0)


@cache
def tail_of(key, value, tags=()):
    """Return the same bytes for both stores: a tail says when it was made."""
    return CODEC.encode(key, value, tags=tags)


class Open:
    """A breaker that never opens."""

    def allow(self):
        return True

    def success(self):
        pass

    def failure(self):
        pass


class Relative:
    """One of the two stores, its stamps told as distances from the last seed: absolute ones depend on the time.

    So do the fences of leases: they are told as the how manieth of their key.
    """

    def __init__(self, remote, counter, tamper):
        self.remote = remote
        self.counter = counter
        self.tamper = tamper
        self.base = 0
        self.fences = {}

    def rebase(self):
        """Count from the present counter."""
        self.base = self.counter()

    def rel(self, stamp):
        """Return a stamp as both stores would tell it."""
        return stamp - self.base if stamp else stamp

    def snapshot(self, found):
        split = split_value(found.data) if found.data is not None else None
        tail = None if found.data is None else found.data[HEAD_SIZE:]
        life = None if found.remaining is None else round(found.remaining / 30)
        assert split is None or split[0] == found.stamp
        return tail, self.rel(found.stamp), self.rel(found.token), self.rel(found.floor), life

    def grant(self, key, found):
        fences = self.fences.setdefault(key, [])
        if found.fence not in {0, *fences}:
            assert not fences or found.fence > fences[-1]
            fences.append(found.fence)
        place = fences.index(found.fence) if found.fence else None
        return place, found.is_mine, found.has_value, round(found.remaining / 30), found.owner, found.is_takeover

    def fence(self, key, number):
        """Return a fence of the key's: the newest, the one before, or one that nobody has had."""
        fences = [1, 1, *self.fences.get(key, ())]
        return fences[-1 - number % 2]

    def words(self, key, fence):
        """Yield what a release has left for those who wait."""
        while word := self.remote.await_release(key, fence, 0.01):
            yield word

    def filled(self, found):
        winner = None if found.winner is None else self.snapshot(found.winner)
        return found.is_stored, found.refused, winner

    def do(self, op, key, number, token, ttl, tags=()):  # noqa: PLR0911, PLR0917 - one for each operation
        """Run one operation and return what came of it."""
        remote, seen = self.remote, self.base
        tail = tail_of(key, number, tags)
        try:
            match op:
                case "read":
                    return [self.snapshot(found) for found in remote.read(KEYS, seen=seen)]
                case "read stale":
                    return [self.snapshot(found) for found in remote.read(KEYS, seen=seen, is_lenient=True)]
                case "write":
                    stale = 9000.0 if number % 2 else 0.0
                    return self.rel(remote.write([(key, tail, ttl), ("both", tail, ttl)], seen=seen, stale_ttl=stale))
                case "expire":
                    stamp, was_live = remote.expire(key, seen=seen)
                    return self.rel(stamp), was_live
                case "expire tags":
                    return self.rel(remote.invalidate_tags(tags or ("other",), seen=seen, is_soft=True))
                case "write text":
                    return self.rel(remote.write([(key, tail_of(key, "text", tags), ttl)], seen=seen))
                case "add":
                    return self.rel(remote.add(key, tail, ttl, seen=seen))
                case "replace":
                    found = remote.read([key], seen=seen)[0]
                    expected = found.stamp + (number % 3 == 0)
                    life = None if number % 2 and found.data is not None else ttl
                    fence = self.base + token if number % 5 == 0 else None
                    return self.rel(
                        remote.replace(
                            key,
                            tail,
                            expected=expected,
                            ttl=life,
                            seen=seen,
                            fence=fence,
                            stale_ttl=number % 3 * 3000.0,
                        )
                    )
                case "delete":
                    stamp, removed = remote.delete([key, "both"], seen=seen)
                    return self.rel(stamp), removed
                case "fill":
                    fence = Fence(self.base + token, 1e11, self.fence(key, number // 2) if number % 2 else 0)
                    filled = remote.fill([("other", tail, ttl, fence), (key, tail, ttl, fence)])
                    return [self.filled(found) for found in filled]
                case "fill stale":
                    fence = Fence(self.base + token, 1e11)
                    filled = remote.fill([(key, tail, ttl, fence)], stale_ttl=number % 3 * 3000.0)
                    return [self.filled(found) for found in filled]
                case "acquire":
                    known = (lambda: remote.read([key], seen=seen)[0].stamp, lambda: None, lambda: 0)[number % 3]()
                    owner, is_waiting = f"owner {number % 4}", number % 2 == 0
                    found = remote.acquire(key, owner=owner, lease=ttl, seen=known, is_waiting=is_waiting)
                    return self.grant(key, found)
                case "renew":
                    held = [(each, self.fence(each, number)) for each in (key, "a", "nobody's")]
                    return remote.renew(held, lease=ttl)
                case "release":
                    fence = self.fence(key, number)
                    was_held = remote.release(key, fence, word=("again", "alone")[number % 2])
                    return was_held, list(self.words(key, fence))
                case "lapse" | "forget" | "spoil":
                    self.tamper(op, key)
                    return None
                case "mark":
                    return remote.mark(key, ttl)
                case "unmark":
                    return remote.unmark(key)
                case "increment":
                    stamp, total, life, kept = remote.increment(key, number, initial=(number, tail, ttl), seen=seen)
                    return self.rel(stamp), total, round(life / 30), kept
                case "touch":
                    return self.rel(remote.touch(key, ttl, seen=seen))
                case "clear":
                    return self.rel(remote.clear(seen=seen))
                case "invalidate":
                    return self.rel(remote.invalidate_tags(tags or ("other",), seen=seen))
                case "prefix":
                    stamp, unswept = remote.invalidate_prefix(PREFIXES[number % len(PREFIXES)], seen=seen)
                    return self.rel(stamp), sorted(unswept)
                case "sweep":
                    return remote.sweep(PREFIXES[number % len(PREFIXES)], self.base + token, seen=seen)
        except NotAnIntegerError:
            return "not an integer"
        raise AssertionError(op)


OPERATIONS = [
    *["read", "read", "write", "write", "write text", "add", "replace", "delete", "fill", "fill", "fill", "increment"],
    *["touch", "clear", "invalidate", "invalidate", "prefix", "sweep", "read stale", "read stale", "write", "expire"],
    *["expire tags", "fill stale"],
]
LEASE_OPERATIONS = [
    *["acquire", "acquire", "acquire", "acquire", "renew", "release", "release", "lapse", "forget", "spoil"],
    *["mark", "unmark", "fill", "fill", "delete", "read", "write", "clear", "invalidate", "prefix"],
]


@pytest.fixture
def client(shared_redis):
    """Look at the server from beside."""
    with redis.Redis(port=shared_redis.port, retry=Retry(NoBackoff(), 0)) as client:
        yield client


@pytest.fixture
def pair(shared_redis, namespace, client):
    """Return the real store and the scripted one, both seeded."""
    names = RedisNames(namespace)

    @Fixed
    def connect():
        retry = Retry(NoBackoff(), 0)
        return Connection(port=shared_redis.port, socket_timeout=5, socket_connect_timeout=5, retry=retry, protocol=2)

    real = RedisRemote(
        connect, names, guard=Open(), counts=Stats(), clock=time.monotonic, max_idle=2, tombstone_ttl=60.0
    )
    server = Server(Clock())
    both = (
        Relative(real, lambda: int(client.get(names.counter)), lambda *what: tamper_with_redis(client, names, *what)),
        Relative(ScriptedRemote(server), lambda: server.counter, lambda *what: tamper_with_script(server, *what)),
    )
    for store in both:
        store.remote.read(["a"], seen=0)
        store.rebase()
    yield names, server, both
    real.close()


def tamper_with_redis(client, names, what, key):
    """Let a lease have lapsed, or its record be lost or foreign."""
    name = names.lease(key)
    if what == "lapse":
        if client.type(name) == b"hash" and client.hexists(name, "until"):
            client.hset(name, "until", 1)
        return
    client.delete(name)
    if what == "spoil":
        client.set(name, "a string", ex=3600)


def tamper_with_script(server, what, key):
    """Do the same to the script, whose time stands still: no fence may come twice."""
    server.clock.advance(0.01)
    if what == "lapse":
        if key in server.leases and server.leases[key].ends_ms:
            server.leases[key].ends_ms = 1
        return
    server.leases.pop(key, None)


@pytest.mark.redis
@pytest.mark.parametrize("operations", [OPERATIONS, LEASE_OPERATIONS], ids=["values", "leases"])
@pytest.mark.parametrize("seed", range(6))
def test_the_script_does_what_the_lua_does(pair, client, seed, operations):
    """Every outcome and every announcement is the same, stamps told from the last seed."""
    names, server, both = pair
    rng = random.Random(seed)
    server.announced.clear()
    with client.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(names.channel)
        listener.get_message(timeout=5)
        for number in range(1, 250):
            step = (
                *(rng.choice(operations), rng.choice(KEYS), number),
                *(rng.randint(-3, number), rng.choice(LIVES), rng.choice(TAGS)),
            )
            outcomes = [store.do(*step) for store in both]
            assert outcomes[0] == outcomes[1], step
        heard = [heard_by(both[0], item) for item in itertools.islice(messages(listener), len(server.announced))]
    assert heard == [heard_by(both[1], item) for item in server.announced]
    for key in KEYS:
        kept = client.pttl(names.lease(key)) if client.type(names.lease(key)) == b"hash" else -2
        lease, now_ms = server.leases.get(key), server.now_us() / 1000
        assert round(kept / 30_000) == (0 if lease is None else round((lease.until_ms - now_ms) / 30_000))


@pytest.mark.redis
@pytest.mark.parametrize("loss", ["counter", "floor", "both", "behind"])
@pytest.mark.parametrize(
    "op",
    [
        "read",
        "write",
        "delete",
        "increment",
        "touch",
        "clear",
        "fill",
        "add",
        "invalidate",
        "prefix",
        "sweep",
        "expire",
        "acquire",
    ],
)
def test_the_script_loses_its_counter_as_the_lua_does(pair, client, loss, op):
    """A lost or outrun counter is seeded anew, its old values are dead; neither a fill nor a lease ever seeds."""
    names, server, both = pair
    for store in both:
        store.do("write", "a", 1, 0, 60.0)
    if loss == "behind":
        for store in both:
            store.base += 500  # the caller knows of stamps that this server has never handed out
    else:
        gone = {"counter": [names.counter], "floor": [names.floors], "both": [names.counter, names.floors]}[loss]
        client.delete(*gone)
        server.counter = None if names.counter in gone else server.counter
        server.floor = None if names.floors in gone else server.floor
    answers = [store.do(op, "a", 2, 0, 60.0) for store in both]
    if op in {"fill", "acquire"}:
        refused = [(False, "fence", None)] * 2
        # Of what the counter is behind, its leases know nothing: a value is read by who can tell.
        granted = (None, False, True, 0, "", False) if loss == "behind" else (0, True, False, 2, "owner 2", False)
        assert answers[0] == answers[1] == (refused if op == "fill" else granted)
        assert (client.get(names.counter) is None) == (server.counter is None)
        return
    shapes = [(type(answer), answer is None or answer == 0) for answer in answers]
    assert shapes[0] == shapes[1]
    for store in both:
        assert store.counter() > store.base
        store.rebase()
    assert both[0].do("read", "a", 0, 0, 0) == both[1].do("read", "a", 0, 0, 0)


def messages(listener):
    """Yield what the channel carries."""
    while True:
        item = listener.get_message(timeout=5)
        assert item is not None, "Redis has announced less than the script"
        yield item["data"]


def heard_by(store, data):
    """Return an announcement as both stores would make it."""
    message = parse_message(data)
    assert message is not None
    return store.rel(message.stamp), message.keys, message.tags, message.prefixes, message.is_flush
