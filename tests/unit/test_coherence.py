"""Coherence: each decision of the protocol alone, without I/O, clock or lock."""

from __future__ import annotations

from math import inf

import pytest

from celery_mlcache.coherence import Act, Coherence, Departure
from celery_mlcache.protocols import Pulse
from celery_mlcache.wire import MAX_STAMP, Message

DELTA = 1.0
TOMBSTONE_TTL = 60.0
START = 100  # the stamp that the first heartbeat proves


def make(*, is_proven=True, is_synced=True):
    """Return a state that has applied everything up to START, proven at time 0."""
    coherence = Coherence(delta=DELTA, tombstone_ttl=TOMBSTONE_TTL, synced=is_synced)
    if is_proven and is_synced:
        coherence.prove(pulse(START))
    return coherence


def pulse(stamp, *, sent_at=0.0, floor=1):
    """Return a heartbeat's answer."""
    return Pulse(stamp, floor, sent_at, sent_at + 0.5, 1.7e9)


def wrote(stamp, *keys):
    """Return the message of a write or delete."""
    return Message(stamp, keys or ("other",), is_flush=False)


def flushed(stamp):
    """Return the message of a clear or a seed."""
    return Message(stamp, (), is_flush=True)


def tagged(stamp, *tags):
    """Return the message of an invalidation of tags."""
    return Message(stamp, tags=tags)


def departure(coherence, *, token=START, tags=("tag",)):
    """Return what a flight for "k" has seen that read its miss at *token*."""
    return Departure(coherence.open("k"), 0.0, coherence.floors.newest, coherence.required, token, tags)


# ---- tickets ----------------------------------------------------------------------------------------------------


def test_overlapping_operations_share_a_ticket():
    """One key has one ticket while operations on it overlap."""
    coherence = make()
    ticket = coherence.open("k")
    assert coherence.open("k") is ticket
    assert coherence.open("other") is not ticket


def test_a_ticket_lives_as_long_as_its_last_operation():
    """The last close ends it; the next operation opens a clean one."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.open("k")
    coherence.close(ticket)
    assert coherence.open("k") is ticket
    coherence.close(ticket)
    coherence.close(ticket)
    assert coherence.open("k") is not ticket


def test_a_message_raises_the_ticket_of_its_key_only():
    """What a newer message has passed is not admitted; other keys are."""
    coherence = make()
    ticket, other = coherence.open("k"), coherence.open("other")
    coherence.observe(wrote(START + 1, "k"))
    assert not coherence.admits(ticket, START)
    assert coherence.admits(ticket, START + 1)
    assert coherence.admits(other, START)


def test_a_message_raises_tickets_even_while_nothing_is_proven():
    """What is heard between two proofs counts against a fill."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.lose()
    coherence.observe(wrote(START + 5, "k"))
    assert coherence.fence(ticket, START, 0.0, 0.0) is None


def test_a_commit_raises_the_ticket():
    """A slower operation with something older is not admitted after a newer commit."""
    coherence = make()
    ticket = coherence.open("k")
    assert coherence.commit(ticket, START + 2)
    assert not coherence.commit(ticket, START + 1)
    assert coherence.commit(ticket, START + 2)


def test_commits_out_of_order_are_known_by_the_newest():
    """Token and highest stamp are the newest seen, whatever order commits come in."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.commit(ticket, START + 7)
    coherence.commit(ticket, START + 3)
    assert (coherence.seen, coherence.highest) == (START + 7, START + 7)


def test_a_cancelled_ticket_admits_nothing():
    """After a write of unknown outcome nothing under that ticket enters L1, and nothing is filled."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.cancel(ticket)
    assert not coherence.admits(ticket, MAX_STAMP)
    assert coherence.fence(ticket, START, 0.0, 0.0) is None


def test_a_ticket_of_another_epoch_admits_nothing():
    """Whatever voids L1 kills the tickets that are open."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.void()
    assert not coherence.admits(ticket, START + 1)


def test_an_operation_in_a_new_epoch_gets_its_own_ticket():
    """A dead ticket is not shared, and closing it leaves the living one alone."""
    coherence = make()
    dead = coherence.open("k")
    coherence.void()
    living = coherence.open("k")
    assert living is not dead
    coherence.close(dead)
    assert coherence.open("k") is living


def test_a_commit_under_a_dead_ticket_raises_the_living_one():
    """What an operation of the old epoch has seen counts for those of the new one."""
    coherence = make()
    dead = coherence.open("k")
    coherence.void()
    living = coherence.open("k")
    assert not coherence.commit(dead, START + 2)
    assert not coherence.admits(living, START + 1)


def test_nothing_is_admitted_without_a_proof():
    """The next proof voids L1, so a copy would be for nothing."""
    coherence = make(is_proven=False)
    assert not coherence.admits(coherence.open("k"), START)


def test_nothing_below_the_floor_is_admitted():
    """What a clear has made dead does not enter L1."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.flushed(START + 1)
    assert not coherence.admits(ticket, START)
    assert coherence.admits(ticket, START + 1)


def test_without_sync_everything_newest_is_admitted():
    """Where no backplane is there is nothing to be proven."""
    coherence = make(is_synced=False)
    assert coherence.admits(coherence.open("k"), 1)


def test_own_flush_counts_as_seen():
    """A clear of this process moves floor, token and highest stamp, and never down."""
    coherence = make()
    coherence.flushed(START + 5)
    coherence.flushed(START + 3)
    assert (coherence.floors.everything, coherence.seen, coherence.highest) == (START + 5,) * 3


# ---- flights ----------------------------------------------------------------------------------------------------


def test_a_clean_flight_is_current():
    """A newcomer may share what nothing has passed."""
    coherence = make()
    assert coherence.is_current(departure(coherence), 0.0)


def test_a_flight_that_has_not_read_is_current_while_clean():
    """Before its read a flight is as young as its newcomers."""
    coherence = make()
    flight = departure(coherence, token=0)
    assert coherence.is_current(flight, 0.0)
    coherence.observe(wrote(START + 1, "k"))
    assert not coherence.is_current(flight, 0.0)


@pytest.mark.parametrize(
    "happen",
    [
        lambda c: c.observe(wrote(START + 1, "k")),
        lambda c: c.observe(flushed(START + 1)),
        lambda c: c.flushed(START + 1),
        lambda c: c.void(),
        lambda c: c.barrier(START + 1, 0.0),
        lambda c: c.observe(Message(START + 1, tags=("other", "tag"))),
        lambda c: c.invalidated(("tag",), (), START + 1),
        lambda c: c.observe(Message(START + 1, prefixes=("k",))),
        lambda c: c.invalidated((), ("k",), START + 1),
    ],
    ids=[
        *["message", "flush heard", "own flush", "void", "barrier"],
        *["tag heard", "own tag", "prefix heard", "own prefix"],
    ],
)
def test_a_flight_is_not_current_after(happen):
    """A newcomer after an invalidation, a flush, a gap or a barrier does not share an older read."""
    coherence = make()
    flight = departure(coherence)
    happen(coherence)
    assert not coherence.is_current(flight, 0.0)


def test_a_flight_that_has_not_read_is_not_current_after_any_tag():
    """It may be reading a value that carries the tag; once it has read, only its own tags count."""
    coherence = make()
    unread, read = departure(coherence, token=0, tags=()), departure(coherence)
    coherence.observe(tagged(START + 1, "other"))
    assert not coherence.is_current(unread, 0.0)
    assert coherence.is_current(read, 0.0)


def test_a_flight_is_shared_no_longer_than_the_bound_without_a_fresh_proof():
    """Proven once is not proven now: the message that would end it may be lost already."""
    coherence = make()
    flight = departure(coherence)
    assert coherence.is_current(flight, DELTA - 0.1)
    assert coherence.is_current(flight, DELTA)  # it is as young as the bound
    assert not coherence.is_current(flight, DELTA + 0.1)
    coherence.prove(pulse(START, sent_at=DELTA))
    assert coherence.is_current(flight, DELTA + 0.1)
    coherence.lose()
    assert not coherence.is_current(flight, DELTA + 0.1)


# ---- tags and prefixes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("happen", [lambda c, s: c.observe(tagged(s, "t")), lambda c, s: c.invalidated(("t",), (), s)])
def test_a_tag_that_was_invalidated_admits_nothing_older(happen):
    """Whether heard or own: an older copy is kept out whatever its ticket has seen, another tag's is not."""
    coherence = make()
    ticket = coherence.open("k")
    happen(coherence, START + 1)
    assert not coherence.admits(ticket, START, ("t",))
    assert not coherence.admits(ticket, START, ("u", "t"))
    assert coherence.admits(ticket, START, ("u",))
    assert coherence.admits(ticket, START + 1, ("t",))
    later = coherence.open("another")
    assert not coherence.admits(later, START, ("t",))


def test_a_fill_is_not_fenced_over_the_invalidation_of_its_tag():
    """What the loader read may be older than the invalidation, though its key was not touched."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.observe(tagged(START + 1, "t"))
    assert coherence.fence(ticket, START, 0.0, 0.0, ("t",)) is None
    assert coherence.fence(ticket, START, 0.0, 0.0, ("u",)) == START + 1


def test_a_prefix_raises_the_tickets_of_its_keys():
    """Neither a copy nor a fill passes it."""
    coherence = make()
    inside, outside = coherence.open("user:1"), coherence.open("shop:1")
    coherence.observe(Message(START + 1, prefixes=("user:",)))
    assert not coherence.admits(inside, START)
    assert coherence.fence(inside, START, 0.0, 0.0) is None
    assert coherence.admits(outside, START)
    assert coherence.fence(outside, START, 0.0, 0.0) == START + 1


def test_messages_about_tags_and_prefixes_are_in_order_too():
    """They are applied as any other, and a hole before one is a gap."""
    coherence = make()
    assert coherence.observe(tagged(START + 1, "t", "u")) == Act(tags=("t", "u"), stamp=START + 1)
    prefixed = Message(START + 2, prefixes=("p",))
    assert coherence.observe(prefixed) == Act(prefixes=("p",), stamp=START + 2)
    assert coherence.applied == START + 2
    assert coherence.observe(tagged(START + 4, "t")).void == "hole"


def test_what_starts_anew_forgets_the_tags():
    """Every ticket is dead and L1 is empty: garbage that was heard before the proof keeps nothing out after it."""
    coherence = make(is_proven=False)
    coherence.observe(tagged(MAX_STAMP, "t"))
    assert coherence.floors.of("k", ("t",)) == MAX_STAMP
    coherence.prove(pulse(START))
    assert coherence.admits(coherence.open("k"), START, ("t",))


# ---- fences -----------------------------------------------------------------------------------------------------


def test_there_is_no_fence_without_a_token():
    """A read that L2 did not answer fences nothing."""
    coherence = make()
    assert coherence.fence(coherence.open("k"), 0, 0.0, 0.0) is None


def test_the_fence_is_the_miss_where_nothing_else_happened():
    """Right after the miss its own token fences."""
    coherence = make()
    assert coherence.fence(coherence.open("k"), START, 0.0, 0.0) == START


def test_a_token_ahead_of_the_messages_stays_the_fence():
    """What is not applied yet does not move the fence back."""
    coherence = make()
    assert coherence.fence(coherence.open("k"), START + 9, 0.0, 0.5) == START + 9


def test_the_fence_moves_with_the_lease():
    """While the lease lives, everything applied has left a clean ticket alone."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.observe(wrote(START + 1))
    assert coherence.fence(ticket, START, 0.0, 0.5) == START + 1


def test_the_fence_of_a_quiet_system_stays_good():
    """Hours without a write: the proofs renew the fence though the stamp stays."""
    coherence = make()
    ticket = coherence.open("k")
    hours = 4 * 3600.0
    coherence.prove(pulse(START, sent_at=hours))
    assert coherence.fence(ticket, START, 0.0, hours + 0.5) == START


def test_without_a_lease_the_fence_is_good_for_half_a_tombstones_life():
    """Later a tombstone may have come and gone."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.lose()
    half = TOMBSTONE_TTL / 2
    assert coherence.fence(ticket, START, 0.0, half) == START
    assert coherence.fence(ticket, START, 0.0, half + 0.01) is None


def test_a_lapsed_lease_does_not_move_the_fence():
    """A proof that is overdue proves nothing about now."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.observe(wrote(START + 1))
    assert coherence.fence(ticket, START, 0.0, DELTA) == START


def test_a_dead_ticket_does_not_move_the_fence():
    """What happened while nothing was heard may be anything: only the token of the miss fences."""
    coherence = make()
    ticket = coherence.open("k")
    coherence.void()
    coherence.observe(wrote(START + 1))
    assert coherence.fence(ticket, START, 0.0, 0.5) == START


def test_without_sync_the_fence_never_moves():
    """Nobody tells what has happened since."""
    coherence = make(is_synced=False)
    ticket = coherence.open("k")
    assert coherence.fence(ticket, 5, 0.0, 10.0) == 5
    assert coherence.fence(ticket, 5, 0.0, TOMBSTONE_TTL) is None


@pytest.mark.parametrize("happen", [lambda c: c.observe(flushed(START + 1)), lambda c: c.flushed(START + 1)])
def test_no_fence_passes_a_floor(happen):
    """A flush after the miss refuses the fill: the fence does not move over it."""
    coherence = make()
    ticket = coherence.open("k")
    happen(coherence)
    fence = coherence.fence(ticket, START, 0.0, 0.5)
    assert fence is None or fence < START + 1


# ---- messages ---------------------------------------------------------------------------------------------------


def test_a_message_in_order_is_applied():
    """It moves everything known and names what is dead."""
    coherence = make()
    act = coherence.observe(wrote(START + 1, "a", "b"))
    assert act == Act(keys=("a", "b"), stamp=START + 1)
    assert (coherence.applied, coherence.seen, coherence.highest) == (START + 1,) * 3
    assert coherence.lease_until == DELTA


@pytest.mark.parametrize("stamp", [START + 2, START, START - 50], ids=["hole", "again", "regress"])
def test_a_message_out_of_order_is_a_gap(stamp):
    """It voids L1, ends the lease and asks for a heartbeat."""
    coherence = make()
    epoch = coherence.epoch
    assert coherence.observe(wrote(stamp, "k")) == Act(void="hole", ask=True)
    assert (coherence.epoch, coherence.is_proven, coherence.lease_until) == (epoch + 1, False, 0.0)


def test_a_seed_is_a_gap_of_its_own_name():
    """A flush far ahead is a counter that was lost."""
    assert make().observe(flushed(START + 10**6)) == Act(void="reseed", ask=True)


def test_garbage_is_a_gap():
    """An undecodable message may have been about anything."""
    assert make().observe(None) == Act(void="garbage", ask=True)


def test_garbage_does_not_raise_what_is_known_to_exist():
    """A stamp out of nowhere must not make this process seed the counter anew."""
    coherence = make()
    coherence.observe(wrote(MAX_STAMP, "k"))
    assert coherence.highest == START


def test_a_flush_in_order_raises_the_floor():
    """A clear is O(1) and no gap."""
    coherence = make()
    assert coherence.observe(flushed(START + 1)) == Act(stamp=START + 1, is_flush=True)
    assert coherence.floors.everything == START + 1
    assert coherence.is_proven


def test_the_message_of_an_own_flush_does_nothing_more():
    """The floor is there already."""
    coherence = make()
    coherence.flushed(START + 1)
    assert coherence.observe(flushed(START + 1)) == Act(stamp=START + 1)
    assert coherence.applied == START + 1


def test_messages_before_the_first_proof_invalidate_and_prove_nothing():
    """Between subscription and proof, what is heard still kills."""
    coherence = make(is_proven=False)
    assert coherence.observe(wrote(7, "k")) == Act(keys=("k",), stamp=7)
    assert (coherence.applied, coherence.highest, coherence.lease_until) == (0, 0, 0.0)


# ---- heartbeats -------------------------------------------------------------------------------------------------


def test_the_first_proof_of_a_subscription_voids_l1():
    """What was put before it may be about anything."""
    coherence = make(is_proven=False)
    epoch = coherence.epoch
    assert coherence.prove(pulse(START, floor=40)) == Act(void="subscription")
    assert (coherence.epoch, coherence.applied, coherence.floors.everything, coherence.highest) == (
        epoch + 1,
        START,
        40,
        START,
    )


def test_a_proof_of_what_was_applied_renews_the_lease():
    """Nothing is voided."""
    coherence = make()
    assert coherence.prove(pulse(START, sent_at=5.0)) == Act()
    assert coherence.lease_until == 5.0 + DELTA


def test_the_lease_runs_from_when_the_heartbeat_left():
    """Not from when the answer came: the counter is as old as the question."""
    coherence = make()
    coherence.prove(Pulse(START, 1, sent_at=3.0, received_at=3.9, server_time=0.0))
    assert coherence.lease_until == 3.0 + DELTA


def test_a_counter_ahead_of_what_was_applied_is_a_loss():
    """The messages in between will not come any more."""
    coherence = make()
    assert coherence.prove(pulse(START + 1)) == Act(void="lost")
    assert coherence.applied == START + 1


def test_a_counter_behind_what_was_applied_is_a_regress():
    """Another history: counter and floor are taken as they are."""
    coherence = make()
    coherence.flushed(START)
    assert coherence.prove(pulse(START - 10, floor=5)) == Act(void="regress")
    assert (coherence.applied, coherence.floors.everything) == (START - 10, 5)
    assert coherence.highest == START


def test_the_floor_of_a_proof_does_not_lower_ours():
    """This process may have raised it after the server was asked."""
    coherence = make()
    coherence.flushed(START + 3)
    coherence.prove(pulse(START, floor=2))
    assert coherence.floors.everything == START + 3


def test_losing_the_subscription_ends_the_lease():
    """Nothing is voided yet: the next proof does it."""
    coherence = make()
    epoch = coherence.epoch
    coherence.lose()
    assert (coherence.lease_until, coherence.is_proven, coherence.epoch) == (0.0, False, epoch)
    assert coherence.prove(pulse(START)) == Act(void="subscription")


def test_without_sync_the_lease_never_ends():
    """L1 answers until its entries' deadlines."""
    assert make(is_synced=False).lease_until == inf


def test_before_the_first_proof_there_is_no_lease():
    """L1 does not answer before anything is proven."""
    assert make(is_proven=False).lease_until == 0.0


# ---- barriers ---------------------------------------------------------------------------------------------------


def test_a_barrier_on_what_was_applied_is_nothing():
    """The lease stays."""
    coherence = make()
    assert coherence.barrier(START, 0.2) == Act()
    assert coherence.lease_until == DELTA


def test_a_barrier_withdraws_the_lease_until_the_stamp_is_applied():
    """The message itself gives it back, not the next heartbeat."""
    coherence = make()
    assert coherence.barrier(START + 2, 0.2) == Act(ask=True)
    coherence.observe(wrote(START + 1))
    assert coherence.lease_until == 0.0
    coherence.observe(wrote(START + 2))
    assert coherence.lease_until == DELTA


def test_a_heartbeat_below_the_barrier_renews_no_lease():
    """A question that left before the barrier says nothing about it."""
    coherence = make()
    coherence.barrier(START + 1, 1.0)
    coherence.prove(pulse(START, sent_at=0.9))
    assert coherence.lease_until == 0.0


def test_a_barrier_that_this_server_never_reached_is_lifted_by_a_later_heartbeat():
    """A bogus or outlived token costs L1 one heartbeat, no more."""
    coherence = make()
    coherence.barrier(MAX_STAMP, 1.0)
    coherence.prove(pulse(START, sent_at=1.1))
    assert coherence.lease_until == 1.1 + DELTA


def test_a_smaller_barrier_does_not_lower_a_greater_one():
    """The greatest stamp asked for counts."""
    coherence = make()
    coherence.barrier(START + 5, 0.1)
    coherence.barrier(START + 1, 0.2)
    coherence.observe(wrote(START + 1))
    assert coherence.lease_until == 0.0


def test_lifting_a_bogus_barrier_does_not_lift_a_real_one_that_came_later():
    """A heartbeat that left between the two says nothing about the second."""
    coherence = make()
    coherence.barrier(MAX_STAMP, 1.0)
    coherence.barrier(START + 1, 1.2)  # a real write, whose message is on its way
    coherence.prove(pulse(START, sent_at=1.1))
    assert coherence.lease_until == 0.0


def test_an_unsynced_barrier_starts_again():
    """Nobody will tell when the stamp has been applied."""
    coherence = make(is_synced=False)
    ticket = coherence.open("k")
    assert coherence.barrier(5, 0.0) == Act(void="barrier")
    assert not coherence.admits(ticket, 5)
    assert coherence.token() == 5  # handed on, as by a synced process
    assert coherence.lease_until == inf


def test_l1_may_serve_without_a_lease_for_its_bound():
    """The bound runs from the last proof."""
    coherence = make()
    coherence.lose()
    assert coherence.may_serve(29.9, 30.0)
    assert not coherence.may_serve(30.0, 30.0)


def test_l1_may_not_serve_past_a_barrier():
    """A causal promise outweighs availability."""
    coherence = make()
    coherence.lose()
    coherence.barrier(START + 1, 0.5)
    assert not coherence.may_serve(1.0, 30.0)
