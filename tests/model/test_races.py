"""The named races, one by one: each forces its interleaving and states what must come out of it.

``a`` and ``b`` are two processes. An :class:`Actor` is an operation held at a seam; everything else runs at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from celery_mlcache import singleflight
from celery_mlcache.entry import MISS
from tests.support.scripted import (
    DELTA,
    GREEN_THREADING,
    TOMBSTONE_TTL,
    Actor,
    Clock,
    Process,
    load,
    make_fleet,
)

HOURS = 4 * 3600.0


@pytest.fixture(autouse=True)
def _green_flights(monkeypatch):
    monkeypatch.setattr(singleflight, "threading", GREEN_THREADING)


@pytest.fixture(params=["moka", "cacheout"])
def fleet(request):
    """A server, a clock and two proven processes."""
    return make_fleet(2, engine=request.param)


def loaded(value):
    """Return a loader that stops once and then returns *value*."""
    return load(lambda: value)


def keep_alive(clock, seconds, *processes):
    """Let time pass as it does for processes whose heartbeat works."""
    for _ in range(int(seconds / 600)):
        clock.advance(600)
        for process in processes:
            process.pulse()


# ---- reads ------------------------------------------------------------------------------------------------------


def test_an_invalidation_that_passes_a_read_in_flight_keeps_its_value_out_of_l1(fleet):
    """A value read before a delete, whose message overtakes the reply, is returned and not kept."""
    server, _, (a, b) = fleet
    b.cache.set("k", 1)
    a.backplane.drain()
    reader = Actor(lambda: a.cache.get("k"))
    reader.run_to("reply read")
    b.cache.delete("k")
    a.backplane.drain()
    assert reader.finish() == 1
    assert a.l1("k") is None
    assert a.cache.get("k", MISS) is MISS
    assert server.live("k") is None


def test_a_slow_reader_does_not_replace_what_a_newer_commit_has_put(fleet):
    """A read that began first and ends last leaves the newer copy in L1."""
    _, _, (a, b) = fleet
    b.cache.set("k", 1)
    reader = Actor(lambda: a.cache.get("k"))
    reader.run_to("reply read")
    a.cache.set("k", 2)
    reader.finish()
    assert a.l1("k").value == 2


def test_a_slow_reader_does_not_bring_back_what_another_reader_found_deleted(fleet):
    """Reads are monotonic when a slow read ends after another read of the process has met the tombstone."""
    _, _, (a, b) = fleet
    b.cache.set("k", 1)
    reader = Actor(lambda: a.cache.get("k"))
    reader.run_to("reply read")
    b.cache.delete("k")
    assert a.cache.get("k", MISS) is MISS
    reader.finish()
    assert a.cache.get("k", MISS) is MISS


def test_a_slow_reader_does_not_bring_back_what_another_reader_found_cleared(fleet):
    """Reads are monotonic when a slow read ends after another read of the process has met a raised floor."""
    _, _, (a, b) = fleet
    b.cache.set("k", 1)
    reader = Actor(lambda: a.cache.get("k"))
    reader.run_to("reply read")
    b.cache.clear()
    assert a.cache.get("k", MISS) is MISS
    reader.finish()
    assert a.cache.get("k", MISS) is MISS


def test_a_read_that_bypasses_l1_removes_an_older_copy(fleet):
    """What was read from L2 while the lease had lapsed is not contradicted by L1 when it returns."""
    _, clock, (a, b) = fleet
    b.cache.set("k", 1)
    a.pulse()
    assert a.cache.get("k") == 1
    clock.advance(2 * DELTA)
    a.backplane.ask()  # answered before the write, arrives after it
    b.cache.set("k", 2)
    assert a.cache.get("k") == 2
    a.backplane.deliver()
    assert clock.now < a.coherence.lease_until
    assert a.cache.get("k") == 2


@pytest.mark.parametrize("ask", [lambda cache: cache.exists("k"), lambda cache: cache.ttl("k")], ids=["exists", "ttl"])
def test_a_peek_that_bypasses_l1_removes_a_dead_copy(fleet, ask):
    """What exists() or ttl() found gone does not come back with the lease."""
    _, clock, (a, b) = fleet
    b.cache.set("k", 1)
    a.pulse()
    assert a.cache.get("k") == 1
    clock.advance(2 * DELTA)
    a.backplane.ask()
    b.cache.delete("k")
    assert not ask(a.cache)
    a.backplane.deliver()
    assert a.cache.get("k", MISS) is MISS


def test_a_pulse_sent_before_a_set_does_not_vouch_for_older_copies_for_longer(fleet):
    """A lease runs from when the heartbeat left: a set whose message is late is seen after delta at most."""
    _, clock, (a, b) = fleet
    b.cache.set("k", 1)
    a.pulse()
    assert a.cache.get("k") == 1
    a.backplane.ask()
    clock.advance(DELTA / 2)
    b.cache.set("k", 2)  # its message is late
    a.backplane.deliver()
    assert a.cache.get("k") == 1
    clock.advance(DELTA / 2)
    assert a.cache.get("k") == 2


# ---- writes -----------------------------------------------------------------------------------------------------


def test_two_writers_end_with_the_later_write_whatever_order_messages_come_in(fleet):
    """The writer whose write was overwritten before it could fill its L1 does not keep its own value."""
    _, _, (a, b) = fleet
    writer = Actor(lambda: a.cache.set("k", "a"))
    writer.run_to("reply write")
    b.cache.set("k", "b")
    a.backplane.drain()  # both messages, before the writer's own reply
    writer.finish()
    assert a.cache.get("k") == "b"
    b.backplane.drain()
    assert b.cache.get("k") == "b"


def test_own_messages_leave_own_writes_in_l1(fleet):
    """The message of a write of this process does not remove what it has put."""
    _, _, (a, _) = fleet
    a.cache.set("k", 1)
    a.backplane.drain()
    assert a.l1("k").value == 1


def test_two_threads_keep_the_write_that_redis_took_last(fleet):
    """Of two writes of one process, the one with the newer stamp stays, whichever thread comes back last."""
    _, _, (a, _) = fleet
    first = Actor(lambda: a.cache.set("k", "first"))
    first.run_to("reply write")
    a.cache.set("k", "second")
    first.finish()
    assert a.l1("k").value == "second"


def test_a_write_of_unknown_outcome_leaves_no_copy(fleet):
    """After a lost reply L1 holds neither the old nor the new value, and L2 is asked."""
    _, _, (a, _) = fleet
    a.cache.set("k", 1)
    a.remote.lost_replies = 1
    assert a.cache.set("k", 2) is False
    assert a.l1("k") is None
    assert a.cache.get("k") == 2


def test_a_read_under_way_during_a_write_of_unknown_outcome_is_not_kept(fleet):
    """What was read before a write whose reply is lost does not enter L1 after it."""
    _, _, (a, b) = fleet
    b.cache.set("k", 1)
    reader = Actor(lambda: a.cache.get("k"))
    reader.run_to("reply read")
    a.remote.lost_replies = 1
    a.cache.set("k", 2)
    assert reader.finish() == 1
    assert a.cache.get("k") == 2


def test_a_write_of_unknown_outcome_does_not_keep_a_busy_key_out_of_l1_for_ever(fleet):
    """Readers that overlap without a gap after a lost reply may keep copies again: a new ticket is a clean one."""
    _, _, (a, b) = fleet
    b.cache.set("k", 1)
    first = Actor(lambda: a.cache.get("k"))
    first.run_to("send read")
    a.remote.lost_replies = 1
    a.cache.set("k", 2)
    second = Actor(lambda: a.cache.get("k"))
    second.run_to("send read")
    first.finish()
    assert second.finish() == 2
    assert a.l1("k") is not None


def test_touch_kills_copies_with_the_longer_life(fleet):
    """After touch() shortened a life no process serves the value beyond it."""
    _, clock, (a, b) = fleet
    b.cache.set("k", 1, ttl=100)
    for process in (a, b):
        process.pulse()
        assert process.cache.get("k") == 1
    assert b.cache.touch("k", 5)
    clock.advance(6)
    for process in (a, b):
        process.pulse()
        assert process.cache.get("k", MISS) is MISS


def test_a_read_that_touch_overtakes_does_not_keep_the_longer_life(fleet):
    """A copy with the life before touch() does not enter L1 after it."""
    _, clock, (a, b) = fleet
    b.cache.set("k", 1, ttl=100)
    reader = Actor(lambda: a.cache.get("k"))
    reader.run_to("reply read")
    b.cache.touch("k", 5)
    a.backplane.drain()
    reader.finish()
    clock.advance(6)
    a.pulse()
    assert a.cache.get("k", MISS) is MISS


# ---- fills ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_heard", [True, False], ids=["heard", "not heard"])
def test_a_delete_while_the_loader_runs_refuses_the_fill(fleet, is_heard):
    """A loader's result from before a delete is returned and stored nowhere, heard of or not."""
    server, _, (a, b) = fleet
    loading = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
    loading.run_to("load")
    b.cache.delete("k")
    if is_heard:
        a.backplane.drain()
    assert loading.finish() == "old"
    assert server.live("k") is None
    assert a.l1("k") is None


@pytest.mark.parametrize("who", [0, 1], ids=["own process", "another process"])
@pytest.mark.parametrize("is_heard", [True, False], ids=["heard", "not heard"])
@pytest.mark.parametrize("how", ["get_or_set", "refresh", "get_or_set_many"])
def test_a_clear_while_the_loader_runs_refuses_the_fill(fleet, who, is_heard, how):
    """A loader's result from before clear() is stored nowhere after it: its floor is above what the loader saw."""
    server, _, processes = fleet
    a = processes[0]
    calls = {
        "get_or_set": lambda: a.cache.get_or_set("k", loaded("old")),
        "refresh": lambda: a.cache.refresh("k", loaded("old")),
        "get_or_set_many": lambda: a.cache.get_or_set_many(["k"], lambda keys: {"k": loaded("old")()}),
    }
    loading = Actor(calls[how])
    loading.run_to("load")
    processes[who].cache.clear()
    if is_heard:
        a.backplane.drain()
    loading.finish()
    assert server.live("k") is None
    assert a.l1("k") is None


def test_a_clear_while_the_store_of_a_refresh_is_on_its_way_refuses_it(fleet):
    """A refreshed value of a key that was absent is refused by the floor too, not only by what was heard."""
    server, _, (a, b) = fleet
    refreshing = Actor(lambda: a.cache.refresh("k", loaded("old")))
    refreshing.run_to("load")
    assert refreshing.step().startswith("send ")
    b.cache.clear()
    refreshing.finish()
    assert server.live("k") is None


def test_a_short_lived_write_while_the_loader_runs_refuses_the_fill(fleet):
    """A write that came and expired while the loader ran still is newer than the loader's result."""
    server, clock, (a, b) = fleet
    loading = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
    loading.run_to("load")
    b.cache.set("k", "new", ttl=0.1)  # its message is late
    clock.advance(0.2)
    loading.finish()
    assert server.live("k") is None


def test_a_tombstone_older_than_the_miss_allows_the_fill(fleet):
    """A loader that began after a delete stores its result over the tombstone."""
    _, _, (a, b) = fleet
    b.cache.set("k", "old")
    b.cache.delete("k")
    assert a.cache.get_or_set("k", loaded("new")) == "new"
    assert b.cache.get("k") == "new"


def test_a_flush_of_redis_while_the_loader_runs_refuses_the_fill(fleet):
    """A counter that was lost, or lost and seeded again, refuses every fence from before."""
    server, _, (a, b) = fleet
    for is_seeded in (False, True):
        loading = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
        loading.run_to("load")
        server.flushall()
        if is_seeded:
            b.cache.set("other", 1)
        assert loading.finish() == "old"
        assert server.live("k") is None
        a.pulse()
        b.pulse()


def test_a_failover_that_lost_writes_refuses_the_fill(fleet):
    """A counter that fell below the fence refuses it: what happened to the key since is unknown."""
    server, _, (a, b) = fleet
    saved = server.save()
    b.cache.set("other", 1)
    loading = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
    loading.run_to("load")
    server.restore(saved)
    loading.finish()
    assert server.live("k") is None


def test_of_two_fills_the_first_wins_and_both_callers_agree(fleet):
    """The second filler returns and keeps the first one's value."""
    _, _, (a, b) = fleet
    one = Actor(lambda: a.cache.get_or_set("k", loaded("one")))
    two = Actor(lambda: b.cache.get_or_set("k", loaded("two")))
    one.run_to("load")
    two.run_to("load")
    assert (one.finish(), two.finish()) == ("one", "one")
    assert a.l1("k").value == b.l1("k").value == "one"


def test_a_write_while_the_loader_runs_wins_and_is_returned(fleet):
    """The live value that a filler finds is what its caller gets."""
    _, _, (a, b) = fleet
    loading = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
    loading.run_to("load")
    b.cache.set("k", "new")
    assert loading.finish() == "new"
    assert a.cache.get("k") == "new"


def test_a_long_loader_with_a_lease_may_fill(fleet):
    """The fence moves with the lease: hours later the result is stored, if nothing happened to the key."""
    server, clock, (a, b) = fleet
    loading = Actor(lambda: a.cache.get_or_set("k", loaded("slow")))
    loading.run_to("load")
    b.cache.set("other", 1)
    keep_alive(clock, HOURS, a)
    assert loading.finish() == "slow"
    assert server.live("k") is not None


def test_a_long_loader_after_a_delete_may_not_fill_though_the_tombstone_is_gone(fleet):
    """A delete that was heard refuses the fill however long ago its tombstone expired."""
    server, clock, (a, b) = fleet
    loading = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
    loading.run_to("load")
    b.cache.delete("k")
    keep_alive(clock, HOURS, a)
    loading.finish()
    assert server.live("k") is None


def test_a_long_loader_without_a_lease_may_not_fill(fleet):
    """Without a proof the fence is good for half a tombstone's life: a delete may have come and gone unheard."""
    server, clock, (a, b) = fleet
    loading = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
    loading.run_to("load")
    a.backplane.disconnect()
    b.cache.delete("k")
    clock.advance(TOMBSTONE_TTL + 1)
    loading.finish()
    assert server.live("k") is None


def test_a_fill_of_unknown_outcome_leaves_no_copy(fleet):
    """After a lost reply of a fill the loaded value is returned; L1 waits for a read."""
    _, _, (a, _) = fleet
    loading = Actor(lambda: a.cache.get_or_set("k", loaded("v")))
    loading.run_to("send fill")
    a.remote.lost_replies = 1
    assert loading.finish() == "v"
    assert a.l1("k") is None
    assert a.cache.get("k") == "v"


def test_a_refused_refresh_leaves_no_older_copy(fleet):
    """Who was given a newer value by refresh() is not given the older copy by the next get()."""
    _, _, (a, b) = fleet
    b.cache.set("k", "oldest")
    a.pulse()
    assert a.cache.get("k") == "oldest"
    refreshing = Actor(lambda: a.cache.refresh("k", loaded("newer")))
    refreshing.run_to("load")
    b.cache.set("k", "newest")  # its message is late
    assert refreshing.finish() == "newer"
    assert a.cache.get("k") == "newest"


# ---- flights ----------------------------------------------------------------------------------------------------


def test_a_newcomer_joins_a_flight(fleet):
    """Two callers of one process share one loader run."""
    _, _, (a, _) = fleet
    leader = Actor(lambda: a.cache.get_or_set("k", loaded(1)))
    follower = Actor(lambda: a.cache.get_or_set("k", loaded(2)))
    leader.run_to("load")
    assert follower.step() == "wait"
    assert (leader.finish(), follower.finish()) == (1, 1)
    assert a.stats.loads == 1


@pytest.mark.parametrize("who", [0, 1], ids=["own process", "another process"])
@pytest.mark.parametrize("how", ["delete", "set", "clear"])
def test_a_flight_overtaken_by_an_invalidation_is_not_joined(fleet, who, how):
    """Who comes after an invalidation does not get the result of a loader that began before it."""
    _, _, processes = fleet
    a = processes[0]
    leader = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
    leader.run_to("load")
    acts = {"delete": lambda c: c.delete("k"), "set": lambda c: c.set("k", "new"), "clear": lambda c: c.clear()}
    acts[how](processes[who].cache)
    a.backplane.drain()
    newcomer = Actor(lambda: a.cache.get_or_set("k", loaded("new")))
    assert newcomer.step() != "wait"
    assert newcomer.finish() == "new"
    assert leader.finish() in {"old", "new"}
    assert a.cache.get("k") == "new"


def test_a_flight_is_not_joined_when_its_read_is_older_than_the_bound(fleet):
    """Without a lease nobody joins a loader that began more than delta ago: an invalidation may be unheard."""
    _, clock, (a, b) = fleet
    leader = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
    leader.run_to("load")
    a.backplane.disconnect()
    b.cache.set("k", "new")
    clock.advance(5 * DELTA)
    newcomer = Actor(lambda: a.cache.get_or_set("k", loaded("newer")))
    assert newcomer.step() != "wait"
    assert newcomer.finish() == "new"


def test_a_flight_from_before_a_barrier_is_not_joined(fleet):
    """After barrier(token) no caller shares a loader that began before it, heard of or not."""
    _, _, (a, b) = fleet
    leader = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
    leader.run_to("load")
    b.cache.set("k", "new")
    a.cache.barrier(b.cache.token())
    newcomer = Actor(lambda: a.cache.get_or_set("k", loaded("newer")))
    assert newcomer.step() != "wait"
    assert newcomer.finish() == "new"


# ---- causality --------------------------------------------------------------------------------------------------


def test_a_barrier_makes_the_senders_write_visible(fleet):
    """After barrier(token) the next read has what the sender had written, and L1 answers again once it is heard."""
    _, clock, (a, b) = fleet
    b.cache.set("k", 1)
    a.pulse()
    assert a.cache.get("k") == 1
    b.cache.set("k", 2)
    a.cache.barrier(b.cache.token())
    assert a.cache.get("k") == 2
    assert clock.now >= a.coherence.lease_until
    a.backplane.drain()
    assert clock.now < a.coherence.lease_until
    assert a.cache.get("k") == 2


@pytest.mark.parametrize("how", ["delete", "clear"])
def test_a_token_covers_what_its_sender_found_gone(fleet, how):
    """Who gets the token of a process that has seen a key gone does not see it afterwards."""
    server, clock, (a, b) = fleet
    third = Process(server, clock)
    third.cache.set("k", 1)
    a.pulse()
    b.pulse()
    assert a.cache.get("k") == 1
    getattr(third.cache, how)(*["k"] if how == "delete" else [])
    assert b.cache.get("k", MISS) is MISS  # from L2: b has not heard of it
    a.cache.barrier(b.cache.token())
    assert a.cache.get("k", MISS) is MISS


def test_a_token_is_handed_on(fleet):
    """A process that was told to wait for a stamp tells so those whom it calls, though it has read nothing itself."""
    server, clock, (a, b) = fleet
    third = Process(server, clock)
    b.cache.set("k", 1)
    a.pulse()
    assert a.cache.get("k") == 1
    b.cache.set("k", 2)
    third.cache.barrier(b.cache.token())
    a.cache.barrier(third.cache.token())
    assert a.cache.get("k") == 2


def test_a_read_from_before_a_barrier_is_not_served_after_it(fleet):
    """A copy that enters L1 after the barrier, but was read before the sender's write, does not answer."""
    _, _, (a, b) = fleet
    b.cache.set("k", 1)
    a.pulse()
    reader = Actor(lambda: a.cache.get("k"))
    reader.run_to("reply read")
    b.cache.set("k", 2)
    a.cache.barrier(b.cache.token())
    reader.finish()
    assert a.cache.get("k") == 2
    a.backplane.drain()
    assert a.cache.get("k") == 2


def test_without_sync_a_barrier_empties_l1():
    """Where nobody tells when a stamp has been applied, a barrier starts again with an empty L1."""
    _, _, (a, b) = make_fleet(2, is_synced=False)
    b.cache.set("k", 1)
    assert a.cache.get("k") == 1
    b.cache.set("k", 2)
    assert a.cache.get("k") == 1
    reader = Actor(lambda: a.cache.get("other"))
    reader.run_to("reply read")
    a.cache.barrier(b.cache.token())
    reader.finish()
    assert a.cache.get("k") == 2


# ---- losses -----------------------------------------------------------------------------------------------------


def test_a_lost_message_is_found_by_the_next_one(fleet):
    """A hole in the stamps voids L1 at once, and the next heartbeat heals it."""
    _, clock, (a, b) = fleet
    b.cache.set("k", 1)
    a.pulse()
    assert a.cache.get("k") == 1
    b.cache.set("k", 2)
    a.backplane.lose()
    b.cache.set("other", 1)
    a.backplane.drain()
    assert clock.now >= a.coherence.lease_until
    assert a.l1("k") is None
    a.pulse()
    assert a.cache.get("k") == 2


@pytest.mark.parametrize("is_proven_anew", [False, True], ids=["unproven", "proven anew"])
def test_a_read_in_flight_over_a_gap_is_not_kept(fleet, is_proven_anew):
    """A value read before a gap does not enter L1 after it: the lost message may have been its invalidation."""
    _, _, (a, b) = fleet
    b.cache.set("k", 1)
    a.pulse()
    reader = Actor(lambda: a.cache.get("k"))
    reader.run_to("reply read")
    b.cache.delete("k")
    a.backplane.lose()
    b.cache.set("other", 1)
    a.backplane.drain()
    if is_proven_anew:
        a.pulse()
    assert reader.finish() == 1
    a.pulse()
    assert a.cache.get("k", MISS) is MISS


def test_a_lost_message_is_found_by_a_heartbeat(fleet):
    """A heartbeat that names a stamp never heard of voids L1."""
    _, _, (a, b) = fleet
    b.cache.set("k", 1)
    a.pulse()
    assert a.cache.get("k") == 1
    b.cache.set("k", 2)
    a.backplane.lose()
    a.pulse()
    assert a.cache.get("k") == 2


def test_a_flush_of_redis_is_found_by_a_heartbeat(fleet):
    """After FLUSHALL nothing is served longer than until the next heartbeat, and stamps go on rising."""
    server, clock, (a, b) = fleet
    a.cache.set("k", 1)
    before = server.counter
    server.flushall()
    assert a.cache.get("k") == 1  # bounded by the lease
    a.pulse()
    assert a.cache.get("k", MISS) is MISS
    b.pulse()
    assert server.counter > before
    assert clock.now < min(a.coherence.lease_until, b.coherence.lease_until)


def test_stale_serving_ends_at_its_bound_and_never_passes_a_barrier():
    """With max_stale L1 goes on answering without a lease, until the bound or a barrier."""
    _, clock, (a, b) = make_fleet(2, max_stale=30.0)
    b.cache.set("k", 1)
    a.pulse()
    assert a.cache.get("k") == 1
    a.backplane.disconnect()
    b.cache.set("k", 2)
    clock.advance(10)
    assert a.cache.get("k") == 1
    assert a.stats.stale_served == 1
    clock.advance(20)
    assert a.cache.get("k") == 2
    a.backplane.connect()
    a.pulse()
    assert a.cache.get("k") == 2
    a.backplane.disconnect()
    b.cache.set("k", 3)
    a.cache.barrier(b.cache.token())
    assert a.cache.get("k") == 3


# ---- without L2 -------------------------------------------------------------------------------------------------


class NosyClock(Clock):
    """Lets another thread in at the n-th time that the first one asks for the time."""

    def __init__(self) -> None:
        super().__init__()
        self.countdown = -1
        self.other: threading.Thread | None = None
        self.first = threading.current_thread()

    def arm(self, position: int, act: Callable[[], object]) -> None:
        self.countdown = position
        self.other = threading.Thread(target=act)

    def __call__(self) -> float:
        if threading.current_thread() is self.first and self.other is not None:
            if self.countdown == 0:
                self.other.start()
                self.other.join(0.1)  # a second thread that has to wait for us may
            self.countdown -= 1
        return self.now

    def finish(self) -> None:
        assert self.other is not None
        if self.countdown >= 0:
            self.other.start()
        self.other.join()


@pytest.mark.parametrize("position", range(4))
def test_without_l2_two_increments_both_count(position):
    """incr() is atomic between the threads of a process that has L1 only."""
    clock = NosyClock()
    a = Process(None, clock)
    a.cache.set("k", 10)
    clock.arm(position, lambda: a.cache.incr("k"))
    a.cache.incr("k")
    clock.finish()
    assert a.cache.get("k") == 12


@pytest.mark.parametrize("position", range(4))
def test_without_l2_one_of_two_adds_wins(position):
    """add() is atomic between the threads of a process that has L1 only."""
    clock = NosyClock()
    a = Process(None, clock)
    a.cache.set("k", 0, ttl=1)
    clock.advance(2)  # a dead entry: the time is asked when it is looked at
    outcomes = []
    clock.arm(position, lambda: outcomes.append(a.cache.add("k", "two")))
    outcomes.append(a.cache.add("k", "one"))
    clock.finish()
    assert sorted(outcomes) == [False, True]


def test_without_l2_a_clear_while_the_loader_runs_refuses_the_fill():
    """The laws of the fence hold in L1 alone."""
    a = Process(None, Clock())
    for act in (a.cache.clear, lambda: a.cache.delete("k"), lambda: a.cache.set("k", "new")):
        loading = Actor(lambda: a.cache.get_or_set("k", loaded("old")))
        loading.run_to("load")
        act()
        loading.finish()
        assert a.cache.get("k", MISS) in {MISS, "new"}
        a.cache.delete("k")
