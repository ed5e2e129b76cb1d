"""The laboratory's checker on histories written by hand: each law broken and seen, kept and not accused."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from celery_mlcache.keys import RedisNames
from celery_mlcache.wire import KIND_TOMBSTONE, KIND_VALUE, pack_head
from tests.support import laws
from tests.support.history import Note, Op, Outcome, Recorder, Verb, read_history
from tests.support.laws import Case, check, render
from tests.support.monitor import Seen
from tests.support.oracle import BlindError, Oracle, Reload, Stored, text_of, version_in

NAMES = RedisNames("t")
OFFSET = 1_000_000.0  # of the server's clock
DELTA = 0.5
FOREVER = 1e6


class Server:
    """Writes what the witness would have seen of a server that executes each command at a given time."""

    def __init__(self) -> None:
        self.seen: list[Seen] = [Seen(0.0, 0.0, ())]
        self.reloads: list[Reload] = []
        self.stamp = 100

    def _run(self, at: float, *args: str | bytes, late: float = 0.001) -> None:
        words = tuple(arg.encode() if isinstance(arg, str) else arg for arg in args)
        self.seen.append(Seen(at + late, at + OFFSET, words))

    def announce(self, at: float, op: str, *names: str) -> int:
        self.stamp += 1
        self._run(at, "PUBLISH", NAMES.channel, "\n".join(["1", op, str(self.stamp), "0", *names]))
        return self.stamp

    def put(self, at: float, key: str, version: int, stamp: int, ttl: float = FOREVER) -> None:
        head = pack_head(stamp, int((at + ttl + OFFSET) * 1000))
        data = head + bytes([KIND_VALUE]) + b"header" + text_of(key, version).encode()
        self._run(at, "SET", NAMES.value(key), data, "PXAT", "0")

    def set(self, at: float, key: str, version: int, ttl: float = FOREVER) -> int:
        stamp = self.announce(at, "W", key)
        self.put(at, key, version, stamp, ttl)
        return stamp

    def delete(self, at: float, key: str) -> int:
        stamp = self.announce(at, "D", key)
        self._run(at, "SET", NAMES.value(key), pack_head(stamp) + bytes([KIND_TOMBSTONE]), "PXAT", "0")
        return stamp

    def fill(self, at: float, key: str, version: int, ttl: float = FOREVER) -> None:
        self.put(at, key, version, self.stamp, ttl)

    def flushall(self, at: float) -> None:
        self._run(at, "FLUSHALL")

    def restart(self, at: float, counter: int, **values: Stored) -> None:
        self.seen.append(Seen(at + 0.1, 0.0, ()))
        self.reloads.append(Reload(at, at + 0.01, counter, values))

    def oracle(self) -> Oracle:
        return Oracle(NAMES, ("k", "m"), {"m": ("tag",)}, OFFSET).feed(self.seen, self.reloads)


class Story:
    """Collects operations; times are (start, end), an answer of None is a miss."""

    def __init__(self) -> None:
        self.server = Server()
        self.ops: list[Op] = []

    def op(self, who: str, verb: Verb, key: str, start: float, end: float | None = None, **fields) -> Op:
        fields = {"outcome": Outcome.DONE, "note": Note.CLEAN, "seq": len(self.ops), **fields}
        op = Op(who, 0, verb=verb, key=key, start=start, end=start + 0.001 if end is None else end, **fields)
        self.ops.append(op)
        return op

    def read(self, who: str, at: float, version: int | None, key: str = "k", verb: Verb = Verb.GET, **fields) -> Op:
        outcome = Outcome.MISS if version is None else Outcome.DONE
        return self.op(who, verb, key, at, outcome=outcome, version=version or 0, **fields)

    def write(self, who: str, at: float, version: int, key: str = "k", ttl: float = FOREVER) -> int:
        """Write, executed in the middle of the call."""
        stamp = self.server.set(at + 0.01, key, version, ttl)
        self.op(who, Verb.SET, key, at, at + 0.02, version=version)
        return stamp

    def delete(self, who: str, at: float, key: str = "k") -> int:
        stamp = self.server.delete(at + 0.01, key)
        self.op(who, Verb.DELETE, key, at, at + 0.02)
        return stamp

    def verdict(self, **fields) -> list[str]:
        case = Case(self.ops, self.server.oracle(), DELTA, patience=5.0, now=fields.pop("now", 100.0), **fields)
        self.found = check(case)
        return [violation.law for violation in self.found]


@pytest.fixture
def story() -> Story:
    """An empty story."""
    return Story()


class TestBoundedStaleness:
    def test_an_answer_after_the_bound(self, story):
        """A read that began more than delta after the overwriting write."""
        story.write("a", 1, 1)
        story.write("a", 2, 2)
        story.read("b", 2.6, 1)
        assert story.verdict() == [laws.STALE]

    def test_an_answer_within_the_bound(self, story):
        """Up to delta an overwritten value may be answered; the read may end later."""
        story.write("a", 1, 1)
        story.write("a", 2, 2)
        story.read("b", 2.45, 1)
        story.op("c", Verb.GET, "k", 2.45, 9.0, version=1)
        assert story.verdict(stops={"c": [(2.46, 8.9)]}) == []

    def test_a_value_that_came_back_is_not_stale(self, story):
        """The same version under a new stamp, as touch() makes it, is as good as new."""
        story.write("a", 1, 1)
        story.server.set(2, "k", 1)
        story.read("b", 9, 1)
        assert story.verdict() == []

    def test_a_write_that_failed_and_happened(self, story):
        """What the sender never learned the server's order tells: read too late, or not at all, it binds everybody."""
        story.write("a", 1, 1)
        story.op("a", Verb.SET, "k", 2, 2.25, version=2, outcome=Outcome.UNKNOWN)
        story.server.set(4, "k", 2)
        story.read("b", 3.9, 1)
        story.read("b", 4.1, 2)
        assert story.verdict() == []
        story.read("c", 4.6, 1)
        assert story.verdict() == [laws.STALE]

    def test_a_write_that_failed_and_never_happened(self, story):
        """It binds nobody."""
        story.write("a", 1, 1)
        story.op("a", Verb.SET, "k", 2, 2.25, version=2, outcome=Outcome.UNKNOWN)
        story.read("b", 9, 1)
        assert story.verdict() == []

    @pytest.mark.parametrize("op", ["tag", "prefix", "flush", "flushall"])
    def test_whatever_kills_it(self, story, op):
        """Tags, prefixes, floors and lost data end values as deletes do."""
        story.write("a", 1, 1, "m")
        kill = {
            "tag": lambda: story.server.announce(2, "T", "tag"),
            "prefix": lambda: story.server.announce(2, "P", "m"),
            "flush": lambda: story.server.announce(2, "F"),
            "flushall": lambda: story.server.flushall(2),
        }
        kill[op]()
        story.read("b", 2.4, 1, "m")
        assert story.verdict() == []
        story.read("b", 2.6, 1, "m")
        assert story.verdict() == [laws.STALE]

    def test_another_tag_kills_nothing(self, story):
        """Nor does a prefix of others."""
        story.write("a", 1, 1, "m")
        story.server.announce(2, "T", "other")
        story.server.announce(2, "P", "k")
        story.read("b", 9, 1, "m")
        assert story.verdict() == []


class TestReadYourWrites:
    def test_an_older_value_after_ones_own(self, story):
        """Even within delta."""
        story.write("a", 1, 1)
        story.write("b", 2, 2)
        story.read("b", 2.1, 1)
        assert story.verdict() == [laws.OWN]

    def test_a_later_write_of_another(self, story):
        """What Redis ordered after one's own write may be read in its place."""
        story.write("a", 1, 1)
        story.write("b", 2, 2)
        story.write("c", 2.03, 3)
        story.read("b", 2.1, 3)
        story.read("b", 2.2, None)
        assert story.verdict() == []

    def test_an_overlapping_read(self, story):
        """A read that began before the write had ended knows nothing of it."""
        story.write("a", 1, 1)
        story.op("b", Verb.GET, "k", 2.0, 2.3, version=1)
        story.write("b", 2.1, 2)
        assert story.verdict() == []

    def test_a_write_that_failed(self, story):
        """It teaches its process nothing."""
        story.write("a", 1, 1)
        story.op("b", Verb.SET, "k", 2, 2.02, version=2, outcome=Outcome.UNKNOWN)
        story.server.set(2.01, "k", 2)
        story.read("b", 2.1, 1)
        assert story.verdict() == []

    def test_a_deleted_value(self, story):
        """An acknowledged delete is a write too; one that was perhaps dropped is not."""
        story.write("a", 1, 1)
        story.delete("b", 2)
        story.read("b", 2.1, 1)
        assert story.verdict() == [laws.OWN]
        story.ops[1] = replace(story.ops[1], note=Note.NONE)
        assert story.verdict() == []

    def test_an_acknowledged_write_that_nobody_saw(self, story):
        """set() said True, and the server never executed it; in the last moment of a killed server it may have."""
        story.op("a", Verb.SET, "k", 2, 2.02, version=2)
        assert story.verdict() == [laws.LOST]
        story.server.restart(2.1, 0)
        assert story.verdict() == []

    def test_an_acknowledged_delete_that_nobody_saw(self, story):
        """The same for removals."""
        story.op("a", Verb.DELETE, "k", 2, 2.02)
        assert story.verdict() == [laws.LOST]


class TestMonotonicReads:
    def test_going_back(self, story):
        """Newer, then older, in one process: even within delta."""
        story.write("a", 1, 1)
        story.write("a", 2, 2)
        story.read("b", 2.1, 2)
        story.read("b", 2.2, 1)
        assert story.verdict() == [laws.MONOTONIC]

    def test_two_processes(self, story):
        """Two processes may differ for delta."""
        story.write("a", 1, 1)
        story.write("a", 2, 2)
        story.read("b", 2.1, 2)
        story.read("c", 2.2, 1)
        assert story.verdict() == []

    def test_two_threads_that_overlap(self, story):
        """Reads that overlap do not order one another."""
        story.write("a", 1, 1)
        story.write("a", 2, 2)
        story.op("b", Verb.GET, "k", 2.1, 2.3, version=2)
        story.op("b", Verb.GET, "k", 2.2, 2.4, version=1)
        assert story.verdict() == []

    def test_an_old_number_that_is_newer_in_redis(self, story):
        """What counts is the order in Redis, not the size of the number: a late write is the truth."""
        story.write("a", 1, 2)
        story.write("b", 2, 1)
        story.read("c", 2.1, 2)
        story.read("c", 2.2, 1)
        assert story.verdict() == []


class TestNoResurrection:
    def test_after_a_miss(self, story):
        """Who was told that the key was removed must not see the value again."""
        story.write("a", 1, 1)
        story.delete("a", 2)
        story.read("b", 2.1, None)
        story.read("b", 2.2, 1)
        assert story.verdict() == [laws.RESURRECTION]

    def test_after_a_miss_for_want_of_a_server(self, story):
        """A miss because L2 did not answer tells nothing."""
        story.write("a", 1, 1)
        story.delete("a", 2)
        story.read("b", 2.1, None, note=Note.NONE)
        story.read("b", 2.2, 1)
        assert story.verdict() == []

    def test_after_a_miss_while_it_lived(self, story):
        """Nor does a miss of a value that was there: L2 may evict, and a process may have no lease."""
        story.write("a", 1, 1)
        story.read("b", 1.5, None)
        story.delete("a", 2)
        story.read("b", 2.2, 1)
        assert story.verdict() == []

    def test_a_late_fill(self, story):
        """The row was replaced, the key removed, and then a filler stores what it had loaded before."""
        story.op("a", Verb.COMMIT, "k", 1, version=1)
        story.op("b", Verb.LOAD, "k", 1.1, version=1)
        story.op("a", Verb.COMMIT, "k", 1.2, version=2)
        story.delete("a", 1.3)
        story.server.fill(1.4, "k", 1)
        assert story.verdict() == [laws.RESURRECTION]
        assert [line.who for line in story.found[0].lines] == ["b", "a", "redis", "redis"]

    def test_a_fill_of_the_new_row(self, story):
        """A loader that began after the removal reads the new row; one that was faster than the removal is removed."""
        story.op("a", Verb.COMMIT, "k", 1, version=1)
        story.server.fill(1.1, "k", 1)
        story.op("a", Verb.COMMIT, "k", 1.2, version=2)
        story.delete("a", 1.3)
        story.server.fill(1.4, "k", 2)
        story.read("c", 5, 2)
        assert story.verdict() == []

    def test_a_fill_before_a_removal_that_never_came(self, story):
        """A commit without a removal binds nobody."""
        story.op("a", Verb.COMMIT, "k", 1.2, version=2)
        story.server.fill(1.4, "k", 1)
        story.read("c", 5, 1)
        assert story.verdict() == []

    def test_a_fill_under_the_stamp_of_a_delete(self, story):
        """It carries that stamp as its fence, and is still a fill."""
        story.op("a", Verb.COMMIT, "k", 1, version=2)
        stamp = story.delete("a", 1.3)
        story.server.put(1.4, "k", 1, stamp)
        assert story.verdict() == [laws.RESURRECTION]


class TestLoaders:
    def load(self, story, who, start, version, end=None):
        op = story.op(who, Verb.GET_OR_SET, "k", start, start + 0.3 if end is None else end, version=version)
        story.op(who, Verb.LOAD, "k", start + 0.01, version=version, seq=op.seq)
        return op

    def test_ones_own_row_is_always_right(self, story):
        """What a loader read during the call may be returned, stored or not."""
        self.load(story, "b", 2, 7)
        assert story.verdict() == []

    def test_a_follower(self, story):
        """Who comes while a loader runs may share its row ..."""
        self.load(story, "b", 2, 7)
        story.read("b", 2.2, 7, verb=Verb.GET_OR_SET)
        assert story.verdict() == []

    def test_a_follower_after_its_own_removal(self, story):
        """... but not after its process has removed the key since the loader read ..."""
        self.load(story, "b", 2, 7)
        story.delete("b", 2.1)
        story.read("b", 2.2, 7, verb=Verb.GET_OR_SET)
        assert story.verdict() == [laws.OWN]

    def test_a_follower_of_a_flight_that_is_too_old(self, story):
        """... nor more than delta after somebody else has."""
        self.load(story, "b", 2, 7, end=3.5)
        story.delete("a", 2.2)
        story.read("b", 2.6, 7, verb=Verb.GET_OR_SET)
        assert story.verdict() == []
        story.read("b", 2.8, 7, verb=Verb.GET_OR_SET)
        assert story.verdict() == [laws.STALE]

    def test_another_process_cannot_share_it(self, story):
        """A row that only another process has loaded comes from nowhere."""
        self.load(story, "b", 2, 7)
        story.read("c", 2.2, 7, verb=Verb.GET_OR_SET)
        assert story.verdict() == [laws.PHANTOM]

    def test_get_loads_nothing(self, story):
        """Nor may get() answer what no level ever held."""
        self.load(story, "b", 2, 7)
        story.read("b", 2.2, 7)
        assert story.verdict() == [laws.PHANTOM]


class TestCausalHandOff:
    def hand_off(self, story, stamp, at=2.05):
        story.op("a", Verb.TOKEN, "k", at, stamp=stamp)
        story.op("b", Verb.BARRIER, "k", at + 0.01, stamp=stamp)

    def test_older_than_the_sender_saw(self, story):
        """After barrier() nothing is older than the token, even within delta."""
        story.write("a", 1, 1)
        self.hand_off(story, story.write("a", 2, 2))
        story.read("b", 2.1, 1)
        assert story.verdict() == [laws.CAUSAL]
        assert {line.who for line in story.found[0].lines} == {"a", "b", "redis"}

    def test_any_key(self, story):
        """The token is of everything that its sender had seen."""
        story.write("a", 1, 1, "m")
        story.write("a", 1.8, 2, "m")
        self.hand_off(story, story.write("a", 2, 2))
        story.read("b", 2.1, 1, "m")
        assert story.verdict() == [laws.CAUSAL]

    def test_as_new_as_the_sender_saw(self, story):
        """And what came later."""
        story.write("a", 1, 1)
        self.hand_off(story, story.write("a", 2, 2))
        story.read("b", 2.1, 2)
        story.write("c", 2.2, 3)
        story.read("b", 2.3, 2)
        assert story.verdict() == []

    def test_a_read_that_had_begun(self, story):
        """A read that began before barrier() had ended may be older."""
        story.write("a", 1, 1)
        stamp = story.write("a", 2, 2)
        story.op("b", Verb.GET, "k", 2.055, 2.1, version=1)
        self.hand_off(story, stamp)
        assert story.verdict() == []

    def test_a_token_that_the_server_has_forgotten(self, story):
        """A restart from a snapshot may lose what the token stood for."""
        old = story.write("a", 1, 1)
        self.hand_off(story, story.write("a", 2, 2))
        story.server.restart(2.2, old, k=Stored(old, 1, inf))
        story.read("b", 2.6, 1)
        assert story.verdict() == []


class TestExpiry:
    def test_after_its_end_in_l2(self, story):
        """Not even within delta."""
        story.write("a", 1, 1, ttl=1.0)
        story.read("b", 2.1, 1)
        assert story.verdict() == [laws.OUTLIVED]

    def test_before_its_end(self, story):
        """Until then it is alive; the read may end later."""
        story.write("a", 1, 1, ttl=1.0)
        story.op("b", Verb.GET, "k", 1.9, 2.5, version=1)
        assert story.verdict() == []

    def test_a_fill_that_no_witness_saw(self, story):
        """A row that was loaded again in the last moment of a killed server may have been stored again, for delta."""
        story.server.fill(1, "k", 1, ttl=1.0)
        story.op("c", Verb.LOAD, "k", 0.9, 0.95, version=1)
        story.op("c", Verb.GET_OR_SET, "k", 0.8, 1.1, version=1)
        story.server.restart(2.3, 0)
        story.read("b", 2.4, 1)
        assert story.verdict() == [laws.OUTLIVED]
        story.op("b", Verb.LOAD, "k", 2.21, 2.22, version=1)
        story.op("b", Verb.GET_OR_SET, "k", 2.2, 2.3, version=1)
        assert story.verdict() == []
        story.read("b", 2.9, 1)
        assert story.verdict() == [laws.STALE]

    def test_a_row_that_was_filled_again_after_its_tags_record_was_lost(self, story):
        """A copy of it lasts as long as it was given, though what is in L2 now was given less; a new row ends both."""
        story.server.fill(1, "m", 1, ttl=50.0)
        story.read("b", 1.1, 1, "m")
        story.server._run(2, "DEL", NAMES.tag("tag"))  # nothing is announced
        story.server.fill(2.1, "m", 1, ttl=0.2)
        stamp = story.write("a", 2.2, 1)
        story.op("a", Verb.TOKEN, "k", 2.3, stamp=stamp)
        story.op("b", Verb.BARRIER, "k", 2.31, stamp=stamp)
        story.read("b", 2.5, 1, "m")
        assert story.verdict() == []
        story.write("a", 2.6, 2, "m")
        story.read("b", 3.5, 1, "m")
        assert len(story.verdict()) == 1

    def test_a_new_life(self, story):
        """A new life under a new stamp, longer or shorter: the old end holds for delta, the new one counts."""
        story.write("a", 1, 1, ttl=9.0)
        story.server.set(2, "k", 1, ttl=0.2)
        story.read("b", 2.4, 1)
        assert story.verdict() == []
        story.read("b", 2.6, 1)
        assert len(story.verdict()) == 1


class TestLostData:
    def test_a_snapshot_brings_an_older_value_back(self, story):
        """Whoever does not remember may read it, until somebody who does has it flushed; delta later, nobody."""
        old = story.write("a", 1, 1)
        story.write("a", 2, 2)
        story.server.restart(3, old, k=Stored(old, 1, inf))
        story.read("b", 3.3, 1)
        story.server.announce(4, "F")
        story.read("b", 4.3, 1)
        assert story.verdict() == []
        story.read("b", 4.6, 1)
        assert story.verdict() == [laws.STALE]

    def test_who_remembers_is_bound(self, story):
        """A process that has read the newer value must not read the older one again, whatever the server lost."""
        old = story.write("a", 1, 1)
        story.write("a", 2, 2)
        story.read("b", 2.5, 2)
        story.server.restart(3, old, k=Stored(old, 1, inf))
        story.read("b", 3.3, 1)
        assert story.verdict() == [laws.MONOTONIC]

    def test_the_newer_value_ends_with_the_server(self, story):
        """What the snapshot does not have may be answered for delta after the kill."""
        old = story.write("a", 1, 1)
        story.write("a", 2, 2)
        story.server.restart(3, old, k=Stored(old, 1, inf))
        story.read("b", 3.4, 2)
        assert story.verdict() == []
        story.read("b", 3.6, 2)
        assert story.verdict() == [laws.STALE]

    def test_a_restart_that_lost_nothing(self, story):
        """Everything goes on."""
        stamp = story.write("a", 1, 1)
        story.server.restart(3, stamp, k=Stored(stamp, 1, inf))
        story.read("b", 9, 1)
        assert story.verdict() == []

    def test_a_removal_that_was_lost(self, story):
        """A fill that a lost removal would have refused is excused, and no other."""
        story.op("a", Verb.COMMIT, "k", 1, version=2)
        kept = story.delete("a", 1.3)
        story.op("a", Verb.COMMIT, "k", 2, version=3)
        story.delete("a", 2.3)
        story.server.restart(3, kept, k=Stored(kept, 0, inf))
        story.server.fill(3.5, "k", 2)
        assert story.verdict() == []
        story.server.delete(3.6, "m")
        story.server.announce(3.7, "D", "k")
        story.server.fill(3.8, "k", 2)
        assert story.verdict() == [laws.RESURRECTION]

    def test_what_a_tag_killed_stays_dead(self, story):
        """It is still stored after a restart that lost nothing."""
        first = story.write("a", 1, 1, "m")
        stamp = story.server.announce(2, "T", "tag")
        story.server.restart(3, stamp, m=Stored(first, 1, inf))
        story.read("b", 3.5, 1, "m")
        assert story.verdict() == [laws.STALE]


class TestCalls:
    def test_an_exception(self, story):
        """None may come out."""
        story.op("a", Verb.GET, "k", 1, outcome=Outcome.ERROR)
        assert story.verdict() == [laws.EXCEPTION]

    def test_a_hang(self, story):
        """A call must end in time, if its process lives and runs."""
        story.op("a", Verb.GET, "k", 1, inf, outcome=Outcome.UNKNOWN)
        assert story.verdict(now=5) == []
        assert story.verdict(now=7) == [laws.HANG]
        assert story.verdict(now=7, stops={"a": [(2, 6)]}) == []
        assert story.verdict(now=7, killed=frozenset({"a"})) == []

    def test_a_slow_call(self, story):
        """Also if it does end."""
        story.op("a", Verb.GET, "k", 1, 6.5, outcome=Outcome.MISS)
        assert story.verdict() == [laws.HANG]

    def test_a_value_from_nowhere(self, story):
        """What nobody wrote nobody may read; nor before it was written."""
        story.read("a", 1, 7)
        assert story.verdict() == [laws.PHANTOM]
        story.write("a", 2, 7)
        assert story.verdict() == [laws.PHANTOM]

    def test_a_value_of_another_key(self, story):
        """It does not count as this key's."""
        assert version_in(text_of("m", 3).encode(), "k") == -1
        assert version_in(b"\x00\x01" + text_of("k", 3).encode(), "k") == 3

    def test_a_lease_that_does_not_come_back(self, story):
        """After the last fault everybody heals."""
        story.op("a", Verb.HEAL, "", 1, 11, outcome=Outcome.UNKNOWN)
        assert story.verdict() == [laws.HEALING]
        story.ops[:] = [replace(story.ops[0], outcome=Outcome.DONE)]
        assert story.verdict() == []


class TestAgreement:
    def test_stuck(self, story):
        """After quiescence an answer is what L2 holds, and a miss only where it holds nothing."""
        story.write("a", 1, 1)
        story.read("b", 1.3, 1, verb=Verb.FINAL)
        assert story.verdict(final={"k": 1}) == []
        assert story.verdict(final={}) == []
        assert story.verdict(final={"k": 0}) == [laws.AGREEMENT]
        assert story.verdict(final={"k": 2}) == [laws.AGREEMENT]

    def test_a_miss(self, story):
        """The value is there and somebody does not find it."""
        story.read("b", 1.3, None, verb=Verb.FINAL)
        assert story.verdict(final={"k": 0}) == []
        assert story.verdict(final={"k": 1}) == [laws.AGREEMENT]


class TestTheTelling:
    def test_the_shortest_history_comes_first(self, story):
        """With the parties in columns, the events in order, the faults near it, and how often each law was broken."""
        story.write("a", 1, 1)
        story.write("b", 2, 2)
        story.read("b", 2.1, 1)
        story.op("c", Verb.GET, "k", 1.5, outcome=Outcome.ERROR)
        story.verdict()
        text = render(story.found, 0.0, [(1.4, "freeze"), (50.0, "far away")])
        assert text.splitlines()[0].startswith("no exception: c: get k")
        assert "freeze" in text
        assert "far away" not in text
        assert "1 x no exception, 1 x read your writes" in text
        own = render(story.found[1:], 0.0).splitlines()
        assert [line.split()[1:3] for line in own[2:-1]] == [
            ["write", "v1"],
            ["set", "k"],
            ["write", "v2"],
            ["get", "k"],
        ]
        assert own[2].rstrip().endswith("by a")

    def test_what_the_oracle_cannot_follow(self, story):
        """A command on a value that it does not know ends the round: nothing can be concluded."""
        story.server._run(1, "APPEND", NAMES.value("k"), "x")
        with pytest.raises(BlindError, match="APPEND"):
            story.verdict()


class TestRecords:
    def test_a_history_is_read_back(self, tmp_path):
        """What began and ended, what never ended, several keys, a load, and half a record at the end."""
        path = tmp_path / "history"
        recorder = Recorder(path)
        with recorder.doing(1, Verb.GET_MANY, [0, 1]) as deed:
            deed.answers = {0: (Outcome.DONE, 7), 1: (Outcome.MISS, 0)}
            deed.note = Note.CLEAN
            recorder.load(1, deed.seq, 0, 7, start=1.0, end=2.0)
        with pytest.raises(ValueError, match="oops"), recorder.doing(0, Verb.SET, [1], [9]):
            raise ValueError("oops")
        hung = recorder.doing(0, Verb.DELETE, [0])
        hung.__enter__()
        path.write_bytes(path.read_bytes() + b"half")
        ops = read_history(path, "p1", ["k", "m"])
        told = [(op.verb, op.key, op.outcome, op.version, op.end < inf) for op in ops]
        assert told == [
            (Verb.GET_MANY, "k", Outcome.DONE, 7, True),
            (Verb.GET_MANY, "m", Outcome.MISS, 0, True),
            (Verb.LOAD, "k", Outcome.DONE, 7, True),
            (Verb.SET, "m", Outcome.ERROR, 9, True),
            (Verb.DELETE, "k", Outcome.UNKNOWN, 0, False),
        ]
        assert ops[0].who == "p1"
        assert ops[0].thread == 1
        assert ops[0].note is Note.CLEAN
        assert ops[0].seq == ops[1].seq == ops[2].seq
        del hung

    def test_a_process_that_never_began(self, tmp_path):
        """It has no history."""
        assert read_history(tmp_path / "none", "p1", []) == []
