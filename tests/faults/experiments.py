"""The experiments of the usual cache's faults, each the same for any protocol: real processes on a real Redis.

An experiment takes a fleet and returns how often something was wrong. It knows nothing of the protocol; the pauses
that make a race likely are delays of the network, which every protocol has to live with. Run against ours it must
find 0; run against :mod:`tests.support.naive` it must not, or it could not have seen anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tests.faults.actors import Actor, Line
from tests.faults.players import LOADER, NEW, OLD, OTHER, PATIENCE, Fleet, Protocol, new_keys
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

Span = tuple[float, float]  # seconds after two processes have met, at least and at most
AT_ONCE: Span = (0.0, 0.0)
NEARLY: Span = (0.0, 0.0003)


@dataclass(frozen=True, slots=True)
class Result:
    """What an experiment found.

    Attributes:
        of: How many times it could have gone wrong.
        wrong: How many times it did, by what went wrong.
    """

    of: int
    wrong: dict[str, int]


@dataclass(frozen=True, slots=True)
class Experiment:
    """One line of the table.

    Attributes:
        name: Its identifier.
        title: What happens, for the table.
        run: Does it.
        is_rough: It breaks what others need: it gets a fleet of its own.
        patience: Seconds that its processes wait for a reply.
        is_luck: Even the naive protocol gets away with it, most times: how threads are scheduled decides. Another
            form of the same experiment, with the window held open, is there to show what it can see.
    """

    name: str
    title: str
    run: Callable[[Fleet], Result]
    is_rough: bool = False
    patience: float = PATIENCE
    is_luck: bool = False

    def on(self, protocol: Protocol, control: RedisServer, bound: float) -> Result:
        """Run it on a fleet of its own."""
        with Fleet(protocol, control, bound=bound, patience=self.patience) as fleet:
            return self.run(fleet)


# ---- races: two processes meet on every key -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """What one process does to every key of a race, and when; *after* is drawn from a seeded generator."""

    actor: Actor
    move: str
    value: int = NEW
    after: Span = AT_ONCE


def race(fleet: Fleet, keys: Sequence[str], one: Part, two: Part) -> None:
    """Have both meet on key after key; return when all is done and delivered."""
    rng = random.Random(7)
    fleet.hold(one.actor, new_keys(1), two.actor)  # their L1s do answer, or nothing would be tested
    fleet.hold(two.actor, new_keys(1), one.actor)
    places = new_keys(2)
    for part, where in ((one, places), (two, places[::-1])):
        part.actor.order("meet", part.move, keys, [rng.uniform(*part.after) for _ in keys], part.value, where)
    for part in (one, two):
        part.actor.answer(50)  # hundreds of rounds, on a machine that others keep busy
    fleet.settle(one.actor, two.actor)


def stuck(fleet: Fleet, keys: Sequence[str], *actors: Actor) -> Result:
    """Count the keys for which some process answers anything but what L2 has, now that all has been delivered."""
    answers = list(zip(*(actor.call("read", keys)["values"] for actor in actors), strict=True))
    truth = fleet.truth(keys)  # only now: asking L2 may repair it
    wrong = sum(any(got != there for got in given) for there, given in zip(truth, answers, strict=True))
    return Result(len(keys), {"stuck": wrong})


def write_against(fleet: Fleet, *, near: str, is_far: bool = False) -> Result:
    """A sets, and B, near Redis, does *near*."""
    if not is_far:
        a, b, keys = fleet.other, fleet.near, new_keys(300)
        race(fleet, keys, Part(a, "set", NEW, NEARLY), Part(b, near, OTHER, NEARLY))
        return stuck(fleet, keys, a, b)
    a, b, keys = fleet.far, fleet.near, new_keys(200)
    with fleet.distance(commands=0.002):
        race(fleet, keys, Part(a, "set", NEW), Part(b, near, OTHER, (0.0, 0.008)))
    return stuck(fleet, keys, a, b)


def read_against(fleet: Fleet, *, near: str) -> Result:
    """One reads, and so fills its L1, while the other, near Redis, does *near*."""
    return _read_against(fleet, near, fleet.other, 1000, NEARLY, NEARLY)


def busy_read_against(fleet: Fleet, *, near: str) -> Result:
    """The same, with a CPU-bound thread in the reader."""
    fleet.other.call("busy", True)
    try:
        return _read_against(fleet, near, fleet.other, 200, AT_ONCE, (0.0, 0.02))
    finally:
        fleet.other.call("busy", False)


def slow_read_against(fleet: Fleet, *, near: str) -> Result:
    """The same, with 2 ms between Redis's answer and the reader's fill."""
    with fleet.distance(commands=0.002, replies_only=True):
        return _read_against(fleet, near, fleet.far, 300, AT_ONCE, (0.0, 0.002))


def _read_against(fleet: Fleet, move: str, reader: Actor, rounds: int, *after: Span) -> Result:
    writer, keys = fleet.near, new_keys(rounds)
    writer.call("fill", keys, OLD)
    race(fleet, keys, Part(reader, "get", after=after[0]), Part(writer, move, after=after[1]))
    return stuck(fleet, keys, reader, writer)


def load_against_commit(fleet: Fleet) -> Result:
    """The loader reads the database, the other commits and deletes, and only then the loader's result is stored."""
    reader, writer, keys = fleet.other, fleet.near, new_keys(200)
    fleet.database.mset(dict.fromkeys(keys, OLD))
    race(fleet, keys, Part(reader, "load"), Part(writer, "commit", after=(0.0, 2 * LOADER)))
    answers, truth = reader.call("read", keys)["values"], fleet.truth(keys)
    fleet.database.delete(*keys)
    return Result(len(keys), {"reader stuck": answers.count(OLD), "L2 poisoned": truth.count(OLD)})


# ---- faults: a process holds copies, and then -----------------------------------------------------------------------


def stale(fleet: Fleet, reader: Actor, keys: Sequence[str]) -> int:
    """Count the keys for which *reader* answers anything but what L2 has."""
    return stuck(fleet, keys, reader).wrong["stuck"]


def lost_messages(fleet: Fleet, fault: Callable[[Fleet], object], *, step: float = 0.002, away: float = 0.0) -> Result:
    """Break the far process's subscription, and overwrite all that it holds, one key every *step*."""
    writer, reader, keys = fleet.near, fleet.far, new_keys(200)
    with fleet.distance(pushes=away):
        fleet.hold(reader, keys, writer)
        fault(fleet)
        stored = writer.call("fill", keys, NEW, None, step)
        assert stored == len(keys), f"only {stored} writes were taken"
        fleet.pushes.drop_push(0)
        fleet.pass_bound()
        return Result(len(keys), {"stale": stale(fleet, reader, keys)})


def half_open(fleet: Fleet) -> Result:
    """The subscription goes silent both ways and nobody is told; later TCP gives it up."""
    writer, reader, meanwhile, later = fleet.near, fleet.far, new_keys(100), new_keys(100)
    keys = [*meanwhile, *later]
    fleet.hold(reader, keys, writer)
    fleet.pushes.deaf()
    writer.call("fill", keys, NEW)
    fleet.pass_bound()
    wrong = {"stale": stale(fleet, reader, meanwhile)}
    fleet.pushes.drop()
    fleet.pushes.mend()
    reader.call("settle", [])
    return Result(100, wrong | {"stale when it is back": stale(fleet, reader, later)})


def with_connections(fleet: Fleet, writer: Actor, count: int) -> None:
    """Have the far *writer* open as many connections as it will write with at once."""
    with fleet.distance(commands=0.02):
        wait_until(lambda: writer.call("storm", new_keys(count), OLD) or fleet.commands.connections >= count, 15)


def frozen_server(fleet: Fleet) -> Result:
    """Writes into a server that is stopped time out; what it was sent is executed when it goes on."""
    writer, reader, keys = fleet.far, fleet.near, new_keys(50)
    with_connections(fleet, writer, len(keys))
    fleet.hold(reader, keys, writer)
    fleet.redis.freeze()
    try:
        writer.call("storm", keys, NEW)
    finally:
        fleet.redis.thaw()
    fleet.pass_bound()
    return Result(len(keys), {"stale": stale(fleet, reader, keys)})


def killed_writer(fleet: Fleet) -> Result:
    """SIGKILL of a writer whose writes L2 has taken, before it hears of that."""
    writer, reader, keys = fleet.far, fleet.near, new_keys(50)
    with_connections(fleet, writer, len(keys))
    fleet.hold(reader, keys, writer)
    fleet.commands.delay(PATIENCE, "reply")
    writer.order("storm", keys, NEW)
    wait_until(lambda: fleet.truth(keys) == [NEW] * len(keys), what="every write in L2")
    writer.kill()
    fleet.pass_bound()
    return Result(len(keys), {"stale": stale(fleet, reader, keys)})


def flushall(fleet: Fleet) -> Result:
    """FLUSHALL, by somebody who tells nobody."""
    writer, reader, keys = fleet.near, fleet.other, new_keys(50)
    fleet.hold(reader, keys, writer)
    fleet.redis.flushall()
    fleet.pass_bound()
    return Result(len(keys), {"still served": stale(fleet, reader, keys)})


def short_life(fleet: Fleet) -> Result:
    """L1's TTL is minutes, the value's a second or two: nobody answers it when L2 has let it go."""
    writer, reader, keys = fleet.near, fleet.other, new_keys(50)
    fleet.hold(reader, keys, writer, ttl=1.5)
    wait_until(lambda: fleet.truth(keys) == [None] * len(keys), what="the end of their lives")
    return Result(len(keys), {"served after it": stuck(fleet, keys, reader, writer).wrong["stuck"]})


def forked(fleet: Fleet) -> Result:
    """A process that has used its cache forks two children; one of them writes."""
    parent, keys = fleet.near, new_keys(200)
    fleet.hold(parent, keys, parent)
    writer, sibling = Line(fleet.control), Line(fleet.control)
    for child in (writer, sibling):
        parent.call("fork", child.name)
    sibling.call("read", keys)
    writer.call("fill", keys, NEW)
    fleet.pass_bound()
    family = (("sibling stale", sibling), ("parent stale", parent))
    return Result(
        len(keys), {name: sum(got != NEW for got in each.call("read", keys)["values"]) for name, each in family}
    )


# ---- causality ------------------------------------------------------------------------------------------------------


def hand_off(fleet: Fleet, *, with_token: bool = True, late: float = 0.0) -> Result:
    """One sets and hands the key over by another channel; the other, whom Redis tells everything *late*, reads it."""
    sender, receiver = fleet.near, fleet.far if late else fleet.other
    keys, channel = new_keys(200 if late else 300), new_keys(1)[0]
    fleet.hold(receiver, keys, sender)
    with fleet.distance(commands=late, pushes=late, replies_only=True):
        receiver.order("receive", channel, len(keys), with_token)
        sender.call("send", channel, keys, NEW)
        return Result(len(keys), {"stale": sum(got != NEW for got in receiver.answer())})


_KILL = partial(lost_messages, fault=lambda fleet: fleet.redis.kill_pubsub(), away=0.01)
_RESTART = partial(lost_messages, fault=lambda fleet: fleet.redis.restart(), away=0.01)
_DROP = partial(lost_messages, fault=lambda fleet: fleet.pushes.drop_push(), step=0.005)

EXPERIMENTS = (
    Experiment("set_set", "two writers, same key: both near", partial(write_against, near="set")),
    Experiment("set_set_far", "two writers, same key: one 4 ms away", partial(write_against, near="set", is_far=True)),
    Experiment("get_set", "read against set: idle", partial(read_against, near="set"), is_luck=True),
    Experiment(
        "get_set_busy", "read against set: CPU-bound thread", partial(busy_read_against, near="set"), is_luck=True
    ),
    Experiment("get_set_slow", "read against set: 2 ms before the fill", partial(slow_read_against, near="set")),
    Experiment("get_delete", "read against delete: idle", partial(read_against, near="delete"), is_luck=True),
    Experiment(
        "get_delete_slow", "read against delete: 2 ms before the fill", partial(slow_read_against, near="delete")
    ),
    Experiment("set_delete", "set against delete: both near", partial(write_against, near="delete")),
    Experiment("set_delete_far", "set, 4 ms away, against delete", partial(write_against, near="delete", is_far=True)),
    Experiment("load_commit", "get_or_set (5 ms loader) against commit + delete", load_against_commit),
    Experiment("killed_subscription", "CLIENT KILL TYPE pubsub, then writes", _KILL, is_rough=True),
    Experiment("restarted_server", "Redis restarted with its data, then writes", _RESTART, is_rough=True),
    Experiment("silent_drop", "subscription drops all for 1 s of writes", _DROP, is_rough=True),
    Experiment("half_open", "subscription half open, then writes", half_open, is_rough=True),
    Experiment("frozen_server", "writes into a frozen Redis, then thawed", frozen_server, is_rough=True, patience=1.0),
    Experiment("killed_writer", "writer killed before its writes' replies", killed_writer, is_rough=True),
    Experiment("flushall", "FLUSHALL", flushall),
    Experiment("short_life", "L1's TTL over L2's: after L2's expiry", short_life),
    Experiment("forked", "fork of a used cache", forked, is_rough=True),
    Experiment("hand_off", "hand-off, read at once: 0 ms", hand_off, is_luck=True),
    Experiment("hand_off_late", "hand-off, read at once: replies 20 ms late", partial(hand_off, late=0.02)),
)

# The same caches without the token: shows that it is the token that helps.
NO_TOKEN_LATE = Experiment(
    "no_token_late", "... without token: replies 20 ms late", partial(hand_off, late=0.02, with_token=False)
)
WITHOUT_TOKEN = (
    Experiment("no_token", "... without token: 0 ms", partial(hand_off, with_token=False), is_luck=True),
    NO_TOKEN_LATE,
)
