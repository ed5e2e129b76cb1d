"""The way to the one server that holds a namespace: a fixed address, or one that sentinels or a cluster's nodes know.

Theory of operation. A namespace lives on one server: its Redis names share a hash tag, so in a cluster they share a
slot, and a slot has one master. L2 and the backplane of a process share a :class:`Route`. For each new connection it
asks a *guide* (a sentinel, or any node of the cluster) where that server is now; after a failover that is all it
takes. What it was told last is *current*, and connections that lead elsewhere are not used again, so L1's proofs and
L2's answers never come from two servers for longer than a heartbeat.

A cluster's node tells by itself that it has lost a slot (MOVED). A master that sentinels have deposed does not: it
takes writes for ten seconds more, from whoever is still connected, and they are lost. So the backplane asks the
sentinels anew from time to time, one after the other. Sentinels disagree while the news spreads: an answer of an
older configuration epoch than one seen before counts only where all of them give no newer one.

Asking never takes longer than its budget and one reply; a guide that does not answer is asked last from then on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from typing import Any, Final, NamedTuple

from redis.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

Address = tuple[str, int]
GUIDE_ERRORS: Final = (
    RedisError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)  # broken, or no Redis at all
_REDIRECTION: Final = re.compile(r"(?:(?:MOVED|ASK) )?[0-9]+ (.*):([0-9]+)")


class Told(NamedTuple):
    """What a guide says."""

    address: Address
    epoch: int = 0  # of two answers the one with the lower epoch is out of date
    guides: Sequence[Address] = ()  # who else may be asked


class SentinelGuide:
    """Asks a sentinel for the master of that name."""

    def __init__(self, master: str) -> None:
        self._master = master

    def __call__(self, connection: AbstractConnection, guide: Address) -> Told:
        """Ask over a connection to *guide*; raises where it knows no master that lives."""
        reply = _ask(connection, "SENTINEL", "MASTER", self._master)
        facts = dict(zip(reply[::2], reply[1::2], strict=True))
        flags = set(facts[b"flags"].split(b","))
        if b"master" not in flags or flags & {b"s_down", b"o_down"}:
            raise RedisConnectionError(f"the sentinel at {guide[0]}:{guide[1]} sees the master down")
        return Told((facts[b"ip"].decode(), int(facts[b"port"])), int(facts[b"config-epoch"]))


class ClusterGuide:
    """Asks a node of a cluster for the master of the slot of *key*."""

    def __init__(self, key: str) -> None:
        self._slot = key_slot(key.encode())

    def __call__(self, connection: AbstractConnection, guide: Address) -> Told:
        """Ask over a connection to *guide*; raises where it knows no master of the slot."""
        ranges = _ask(connection, "CLUSTER", "SLOTS")
        nodes = [_node(each, guide) for _, _, *members in ranges for each in members]
        for first, last, master, *_ in ranges:
            if first <= self._slot <= last and (address := _node(master, guide)):
                return Told(address, guides=[node for node in nodes if node])
        raise RedisConnectionError(f"nobody serves slot {self._slot}, says {guide[0]}:{guide[1]}")


def _ask(connection: AbstractConnection, *command: str) -> Any:
    try:
        connection.connect()
        connection.send_command(*command, check_health=False)
        return connection.read_response()
    finally:
        connection.disconnect()


def _node(described: Sequence[Any], guide: Address) -> Address | None:
    """Return a node's address; a node that does not know its own host is reached as the guide was."""
    host, port = described[0], described[1]
    if host == b"?":
        return None
    return (host.decode() if host else guide[0]), int(port)


class Route:
    """Where the server is, by what guides say. Thread-safe: what threads share is replaced, never changed.

    Args:
        dial: Makes an unconnected connection to a guide.
        ask: What to ask it.
        guides: The first to ask.
        budget: Seconds after which no other guide is asked.
        clock: Monotonic seconds.
        recheck: Seconds after which :meth:`refresh` asks anew; infinite where the server tells by itself.
    """

    def __init__(
        self,
        dial: Callable[[Address], AbstractConnection],
        ask: Callable[[AbstractConnection, Address], Told],
        guides: Sequence[Address],
        *,
        budget: float,
        clock: Callable[[], float],
        recheck: float = inf,
    ) -> None:
        self._dial = dial
        self._ask = ask
        self._seeds = tuple(guides)
        self._guides = self._seeds
        self._budget = budget
        self._clock = clock
        self._recheck = recheck
        self._asked_at = 0.0
        self._turn = 0
        self._epoch = 0
        self._hint: tuple[Address | None, float] = (None, 0.0)  # and until when
        self.current: Address | None = None

    def find(self) -> Address:
        """Return the address for a new connection: where a redirection has sent us, or what a guide says."""
        hint, until = self._hint
        self.current = hint if hint is not None and self._clock() < until else self._asked()
        return self.current

    def refresh(self) -> None:
        """Ask one guide anew if the last answer is too old; whoever does not answer changes nothing."""
        now = self._clock()
        if now - self._asked_at < self._recheck:
            return
        self._asked_at = now
        self._turn += 1  # each in turn: one that is cut off from the others must not be the only one that is heard
        guide = self._guides[self._turn % len(self._guides)]
        with suppress(*GUIDE_ERRORS):
            told = self._ask(self._dial(guide), guide)
            if told.epoch >= self._epoch:
                self._epoch, self.current = told.epoch, told.address

    def follow(self, address: Address) -> None:
        """Take connections to *address* for a while: the server that was asked says that it is there.

        For as long as guides may be asked: all threads that were sent away want to go there, and a guide that has not
        heard of it would lead them back. From now on, so that none takes an idle connection to where it was sent away.
        """
        self._hint = (address, self._clock() + self._budget)
        self.current = address

    def _asked(self) -> Address:
        guides, until = self._guides, self._clock() + self._budget
        outdated: list[Told] = []
        silent: list[Address] = []
        useless: list[Address] = []  # with those that know only old news
        why: Exception | None = None
        for guide in guides:
            try:
                told = self._ask(self._dial(guide), guide)
            except GUIDE_ERRORS as exc:
                silent.append(guide)
                why = exc
            else:
                if told.epoch >= self._epoch:
                    return self._believe(told, silent)
                outdated.append(told)
            useless.append(guide)
            if self._clock() > until:
                break
        if len(outdated) == len(guides):  # all, not only those that there was time for
            return self._believe(max(outdated, key=lambda told: told.epoch), [])  # sentinels that were set up anew
        self._guides = (*[guide for guide in guides if guide not in useless], *useless)
        raise RedisConnectionError(f"no guide knows the way, the last because of: {why or 'old news'}") from why

    def _believe(self, told: Told, silent: Sequence[Address]) -> Address:
        known = dict.fromkeys((*self._guides, *self._seeds))
        if told.guides:  # nodes come and go
            known = dict.fromkeys((*[guide for guide in known if guide in told.guides], *self._seeds, *told.guides))
        self._guides = (*[guide for guide in known if guide not in silent], *silent)
        self._epoch = told.epoch
        self._asked_at = self._clock()
        return told.address


class Guided:
    """Connections to where a route leads; see :class:`celery_mlcache.protocols.Connector`. Thread-safe.

    Args:
        dial: Makes an unconnected connection of the protocol that is wanted.
        route: Shared by all that must speak to one server.
        may_part: Whether keys move one by one, as in a cluster.
    """

    def __init__(self, dial: Callable[[Address], AbstractConnection], route: Route, *, may_part: bool = False) -> None:
        self.may_part = may_part
        self._dial = dial
        self._route = route

    def __call__(self) -> AbstractConnection:
        """Return an unconnected connection, after asking."""
        return self._dial(self._route.find())

    def is_current(self, connection: Any) -> bool:
        """Whether it leads to where the server was said to be last."""
        return bool((connection.host, connection.port) == self._route.current)

    def verify(self, connection: Any) -> None:
        """Ask anew from time to time; raise where the server is not at the end of *connection* any more."""
        self._route.refresh()
        if not self.is_current(connection):
            raise RedisConnectionError("the namespace has another server now")

    def is_moved(self, refusal: Exception) -> bool:
        """Whether *refusal* says that the slot has another master; the next connection leads there."""
        if not _is(refusal, "MOVED"):
            return False
        self._route.follow(self._target(refusal))
        return True

    def detour(self, refusal: Exception) -> AbstractConnection | None:
        """Return a connection for this one command where *refusal* says that its keys have gone ahead."""
        return self._dial(self._target(refusal)) if _is(refusal, "ASK") else None

    def _target(self, refusal: Exception) -> Address:
        match = _REDIRECTION.fullmatch(str(refusal))
        if match is None:
            raise RedisConnectionError("a redirection to nowhere")
        here = self._route.current or ("", 0)
        return match[1] or here[0], int(match[2])


class Fixed:
    """Connections to an address that never changes; see :class:`celery_mlcache.protocols.Connector`. Thread-safe."""

    may_part = False

    def __init__(self, dial: Callable[[], AbstractConnection]) -> None:
        self._dial = dial

    def __call__(self) -> AbstractConnection:
        """Return an unconnected connection."""
        return self._dial()

    def is_current(self, connection: Any) -> bool:  # noqa: ARG002 - the seam's
        """Every one is."""
        return True

    def verify(self, connection: Any) -> None:
        """Nobody is to be asked."""

    def is_moved(self, refusal: Exception) -> bool:  # noqa: ARG002
        """A redirection without a cluster is an error as any other."""
        return False

    def detour(self, refusal: Exception) -> None:
        """None."""


def _is(refusal: Exception, code: str) -> bool:
    """redis-py has a class for each from some 6.x on; before, the code stands in the text."""
    kind = MovedError if code == "MOVED" else AskError
    return type(refusal) is kind or str(refusal).startswith(f"{code} ")
