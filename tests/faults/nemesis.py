"""What goes wrong, and when: a schedule drawn from a seed, and the hands that carry it out.

The schedule is data, made before anything runs: the same seed gives the same faults at the same times on the same
parties. What the processes make of them depends on the machine too, so a seed makes a finding likely to come again,
not certain.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

ALL = -1  # every proxy, or the server

PROXY_VERBS = {  # relative frequency
    "drop": 2,
    "reset": 2,
    "half_close": 1,
    "cut": 2,
    "deaf": 4,
    "deaf_drop": 2,
    "delay": 3,
    "delay_reply": 3,
    "jitter": 4,
    "drop_push": 4,
    "drop_pushes": 2,
    "truncate": 2,
    "garbage": 1,
}
SERVER_VERBS = {
    "freeze": 4,
    "restart": 2,
    "restart_lossy": 3,
    "restart_empty": 2,
    "flushall": 2,
    "kill_pubsub": 2,
    "lose_counter": 1,
    "lose_floors": 1,
    "lose_tags": 1,
}
PROCESS_VERBS = {"sigkill": 3, "sigstop": 4, "recycle": 2}
MENDED_LATER = frozenset(
    {"cut", "deaf", "deaf_drop", "delay", "delay_reply", "jitter", "drop_pushes", "garbage", "freeze", "sigstop"}
    | {"drop_push", "truncate"}  # which may still be waiting for their chance
)
END_OF = {"freeze": "thaw", "sigstop": "sigcont"}
ENDS = frozenset({"mend", *END_OF.values()})


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One act.

    Attributes:
        at: Seconds from the start.
        verb: What.
        target: A slot, or ALL.
        amount: Seconds of delay, bytes, or pushes.
    """

    at: float
    verb: str
    target: int = ALL
    amount: float = 0.0

    def __str__(self) -> str:
        """Say it shortly."""
        where = "" if self.target == ALL else f" p{self.target}"
        return f"{self.verb}{where}" + (f" {self.amount:g}" if self.amount else "")


@dataclass(frozen=True, slots=True)
class Mood:
    """What kinds of faults a round has.

    Attributes:
        gap: Mean seconds between two faults; 0: none at all.
        kinds: Relative frequency of "proxy", "server" and "process" faults.
        verbs: Only these, where given.
        lasts: Seconds that a fault lasts at most, drawn from these.
    """

    gap: float = 0.5
    kinds: tuple[float, float, float] = (6, 2, 2)
    verbs: tuple[str, ...] = ()
    lasts: tuple[float, ...] = (0.05, 0.2, 0.5, 1.0, 2.0)


def schedule(seed: int, seconds: float, slots: int, mood: Mood) -> list[Fault]:
    """Return the faults of one round, in order; each that lasts is ended within it."""
    if not mood.gap:
        return []
    rng = random.Random(f"nemesis {seed}")
    faults: list[Fault] = []
    busy_until: dict[tuple[str, int], float] = {}  # a proxy, a process or the server
    at = rng.uniform(0.1, 0.5)
    while at < seconds - 0.5:
        verb, target = _draw(rng, mood, slots)
        lasts = rng.choice(mood.lasts) * rng.uniform(0.5, 1.0)
        amount = _amount(rng, verb)
        at = round(at + rng.expovariate(1 / mood.gap), 3)
        hit = parties(verb, target, slots)
        # A mending ends all that is wrong with a proxy: what is under way there is not cut short by another fault.
        if at >= seconds - 0.5 or any(busy_until.get(party, 0.0) >= at for party in hit):
            continue
        faults.append(Fault(at, verb, target, amount))
        if verb in MENDED_LATER:
            end = round(min(at + lasts, seconds - 0.2), 3)
            faults.append(Fault(end, END_OF.get(verb, "mend"), target, float(verb == "deaf_drop")))
            busy_until.update(dict.fromkeys(hit, end))
    return sorted(faults)


def parties(verb: str, target: int, slots: int) -> list[tuple[str, int]]:
    """Return whom a verb is about: the server, or proxies or processes by slot."""
    if verb in SERVER_VERBS or verb == "thaw":
        return [("server", ALL)]
    kind = "process" if verb in PROCESS_VERBS or verb == "sigcont" else "proxy"
    return [(kind, slot) for slot in range(slots) if target in {ALL, slot}]


def _draw(rng: random.Random, mood: Mood, slots: int) -> tuple[str, int]:
    shelves = [PROXY_VERBS, SERVER_VERBS, PROCESS_VERBS]
    if mood.verbs:
        shelves = [{verb: n for verb, n in shelf.items() if verb in mood.verbs} for shelf in shelves]
    kinds = [kind if shelf else 0 for kind, shelf in zip(mood.kinds, shelves, strict=True)]
    shelf = rng.choices(shelves, kinds)[0]
    verb = rng.choices(list(shelf), list(shelf.values()))[0]
    if shelf == shelves[1]:
        return verb, ALL
    is_for_all = shelf == shelves[0] and rng.random() < 0.3
    return verb, ALL if is_for_all else rng.randrange(slots)


def _amount(rng: random.Random, verb: str) -> float:
    if verb in {"delay", "delay_reply", "jitter"}:
        return round(rng.choice([0.005, 0.02, 0.08]) * rng.uniform(0.5, 1), 4)
    if verb == "drop_push":
        return rng.randint(1, 3)
    if verb == "truncate":
        return rng.randint(0, 40)
    return 0.0
