"""The product with one part of its protocol taken out, in the calling process only: what a checker must notice.

Each mutant names the rule it breaks and the mistake that a simpler design would make. ``plant`` patches classes and
script sources before a manager is built; nothing of it survives the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha1
from math import inf
from typing import Any

from celery_mlcache.coherence import Act, Coherence, Ticket
from celery_mlcache.floors import Floors
from celery_mlcache.local import Local
from celery_mlcache.remote import Script
from celery_mlcache.tier import Tickets, Tier
from celery_mlcache.wire import Message


class CannotPlantError(RuntimeError):
    """The product does not have what the mutant takes out; the text says what."""


def plant(name: str) -> None:
    """Break the product in this process.

    Raises:
        KeyError: There is no such mutant.
        CannotPlantError: The product does not have (any more) what it takes out.
    """
    MUTANTS[name]()


def _ticket() -> None:
    """Messages and commits do not raise a ticket: a read that an invalidation overtakes keeps its copy."""
    _replace(Coherence, "_raise", lambda self, ticket, stamp: None)
    observe = Coherence.observe

    def blind(self: Coherence, message: Message | None) -> Act:
        raised = {key: ticket.raised for key, ticket in self._tickets.items()}
        act = observe(self, message)
        for key, ticket in self._tickets.items():
            ticket.raised = raised[key]
        return act

    Coherence.observe = blind


def _stamps() -> None:
    """What is newer is not asked: L1 takes whatever comes last, and a message discards nothing that came by itself."""
    admits = Coherence.admits
    _replace(Coherence, "admits", lambda self, ticket, stamp, *tags: admits(self, ticket, inf, *tags))
    _replace(Local, "discard_older", lambda self, key, stamp: False)


def _sequence() -> None:
    """Nobody counts the messages: a hole between two of them, or before a proof, goes unnoticed."""
    observe, prove = Coherence.observe, Coherence.prove

    def uncounted(self: Coherence, message: Message | None) -> Act:
        if message is not None and self.is_proven:
            self.applied = message.stamp - 1
        return observe(self, message)

    def trusting(self: Coherence, pulse: Any) -> Act:
        if self.is_proven:
            self.applied = pulse.stamp
        return prove(self, pulse)

    Coherence.observe, Coherence.prove = uncounted, trusting


def _epoch() -> None:
    """A gap does not raise the epoch: L1 keeps what it had, and operations under way go on."""

    def same(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Coherence, *args: Any) -> Any:
            epoch = self.epoch
            try:
                return method(self, *args)
            finally:
                self.epoch = epoch

        return call

    for name in ("_gap", "prove", "void", "barrier"):
        _replace(Coherence, name, same(getattr(Coherence, name)))
    _replace(Local, "void", lambda self, epoch: None)


def _lease() -> None:
    """L1 answers without a proof: what the listener does not hear has not happened."""

    def grant(self: Coherence) -> None:
        self.lease_until = inf

    Coherence._grant = grant


def _tombstone() -> None:
    """A delete leaves nothing behind that would refuse a late fill."""
    _rewrite("delete", "bury(KEYS[i], stamp)", "redis.call('DEL', KEYS[i])")


def _own_write() -> None:
    """An own write enters L1 whatever was heard while it was under way."""
    enter = Tickets.__enter__

    def private(self: Tickets) -> list[Ticket]:
        tickets = enter(self)
        if not self._is_writing:
            return tickets
        for ticket in tickets:
            self._tier.coherence.close(ticket)
        self._tickets = [Ticket(ticket.key, ticket.epoch, users=1) for ticket in tickets]
        return self._tickets

    Tickets.__enter__ = private


def _fence() -> None:
    """A fill is a plain add: nothing that happened since its miss refuses it."""
    _replace(Coherence, "fence", lambda self, ticket, token, *rest: token)
    _rewrite("fill", "elseif stamp <= token then", "elseif true then")
    _rewrite("fill", "if invalidated(KEYS[i], tags) <= token then", "if true then")


def _barrier() -> None:
    """A token is taken and ignored."""
    _replace(Tier, "barrier", lambda self, stamp: False)


def _expiry() -> None:
    """L1 keeps its copies for its own time, however short their life in L2 is."""
    keep = Tier.keep
    _replace(
        Tier,
        "keep",
        lambda self, ticket, stamp, shelved, life: keep(self, ticket, stamp, shelved, (life[0], 3600.0)),
    )


def _tag_floor() -> None:
    """L1 does not know that a tag was invalidated: neither its copies nor what is under way is refused for it."""
    _replace(Floors, "of_tags", lambda self, tags: 0)
    _replace(Local, "void_tag", lambda self, tag, stamp: None)


def _tag_record() -> None:
    """L2 does not ask for the records of a value's tags."""
    _rewrite("read", "stamp < newest and tags_of(data, KIND_AT) or {}", "{}")


def _prefix_floor() -> None:
    """L1 does not know that a prefix was invalidated."""
    _replace(Floors, "raise_prefix", lambda self, prefix, stamp: None)
    _replace(Local, "void_prefix", lambda self, prefix, stamp: None)


def _flight() -> None:
    """Whoever comes while a loader runs shares its result, whatever has happened since it began."""
    _replace(Coherence, "is_current", lambda self, *flight: True)


def _miss() -> None:
    """A miss in L2 does not refuse what a slower read of the same process brings."""
    _replace(Tier, "missed", lambda self, ticket, snapshot: None)


def _regress() -> None:
    """Nobody tells the server what he has seen: that it came back with older data goes unnoticed."""
    _replace(Tier, "highest_stamp", lambda self: 0)


def _replace(owner: type, name: str, new: Callable[..., Any]) -> None:
    if not hasattr(owner, name):
        raise CannotPlantError(f"{owner.__name__} has no {name}")
    setattr(owner, name, new)


def _rewrite(script: str, old: str, new: str) -> None:
    """Have a script read otherwise from now on, by whoever loads it."""
    load = Script.__init__

    def init(self: Script, name: str) -> None:
        load(self, name)
        if name == script:
            if old not in self.source:
                raise CannotPlantError(f"{script}.lua has no {old}")
            self.source = self.source.replace(old, new)
            self.sha = _sha(self.source)

    Script.__init__ = init
    Script(script)


def _sha(source: str) -> str:
    return sha1(source.encode(), usedforsecurity=False).hexdigest()


MUTANTS: dict[str, Callable[[], None]] = {
    "ticket": _ticket,
    "stamps": _stamps,
    "sequence": _sequence,
    "epoch": _epoch,
    "lease": _lease,
    "tombstone": _tombstone,
    "own_write": _own_write,
    "fence": _fence,
    "barrier": _barrier,
    "expiry": _expiry,
    "tag_floor": _tag_floor,
    "tag_record": _tag_record,
    "prefix_floor": _prefix_floor,
    "flight": _flight,
    "miss": _miss,
    "regress": _regress,
}
NAMES: Sequence[str] = tuple(MUTANTS)
