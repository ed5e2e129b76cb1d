"""The laws of the contract, checked over the histories of all processes against what the server really did.

Theory of operation. Jepsen's checkers (Knossos, Elle) infer an order of operations from what clients saw; that is
hard, and blind where operations overlap. Here the order is known: a cache's truth is one server, and a witness saw
everything that it executed, in order (`tests.support.monitor`), with the outcome of each write whose sender never
learned it. What remains is to ask of each answer *which state of the server it can be*, and whether its reader was
still allowed to see that state:

- An answer must have a *source*: a span of time for which L2 held that version, or, for ``get_or_set``, a row that a
  loader of the same process read meanwhile.
- A reader has a *floor* for each key, a position in the server's order. Its sources must not have ended before it.
  The floor rises by what its process knows, in happened-before order (Lamport): its own acknowledged writes and
  removals (read your writes), what it has read (monotonic reads; a miss after a removal counts), and the stamp of a
  token it got (causal hand-off). Operations that overlap do not order one another.
- A source must not have ended more than delta before the read *began* (bounded staleness). No slack is needed for
  scheduling: the product compares its clock with the lease inside the call, so after the read began, and an answer
  from L2 was true after that. The server's side is judged by when the witness had heard of the end, which is later.
- A source must not have expired when the read began (L1 never outlives L2).
- A fill must not bring back into L2 a row that was older, when it was stored, than the last break of its key: the
  rows are a database that is always committed before the removal, so that a late fill is a visible lie.

What failures excuse: an operation that failed binds nobody (but if the server executed it, it is a fact like any
other); breaks that a restart from a snapshot has lost bind nobody but those who remember them; in the last moment
before a SIGKILL the server may have done what no witness saw. A miss is never a lie.

Nothing may be an exception, nothing may take longer than ``patience``, and after quiescence everybody must agree
with L2.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

from tests.support.history import READS, REMOVALS, STORES, Note, Op, Outcome, Verb
from tests.support.oracle import MARGIN, Event, Oracle, Span

STALE = "bounded staleness"
OWN = "read your writes"
MONOTONIC = "monotonic reads"
RESURRECTION = "no resurrection"
CAUSAL = "causal hand-off"
OUTLIVED = "L1 past L2"
AGREEMENT = "agreement after quiescence"
PHANTOM = "no value from nowhere"
LOST = "acknowledged writes happen"
EXCEPTION = "no exception"
HANG = "no hang"
HEALING = "healing"

_BREAKS_OF = {
    Verb.DELETE: {"delete"},
    Verb.DELETE_MANY: {"delete"},
    Verb.TAG: {"tag"},
    Verb.PREFIX: {"prefix", "delete", "flush"},
    Verb.CLEAR: {"flush"},
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an offending history."""

    at: float
    who: str
    text: str


@dataclass(slots=True)
class Violation:
    """A law that was broken, and the fewest events that prove it."""

    law: str
    why: str
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class Known:
    """From which position on a process may see a key, and why."""

    pos: int
    law: str
    op: Op
    stamp: int = 0  # of what it knows; 0 where nothing can be said


@dataclass(slots=True)
class Case:
    """All that is known of one run.

    Attributes:
        ops: Of all processes.
        oracle: What the server did.
        delta: The bound on staleness, seconds.
        patience: Seconds that a call may take at most, time in which its process was stopped apart.
        final: What L2 held at the end, by key, where it stayed the same during the last reads; 0: nothing.
        killed: Processes that were killed: what they had begun never had to end.
        stops: When each process was stopped by a signal.
        now: When the last history was read.
    """

    ops: Sequence[Op]
    oracle: Oracle
    delta: float
    patience: float = 5.0
    final: Mapping[str, int] = field(default_factory=dict)
    killed: frozenset[str] = frozenset()
    stops: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    now: float = 0.0


def check(case: Case) -> list[Violation]:
    """Return every violation, those with the shortest histories first."""
    found: list[Violation] = []
    by_process: dict[str, list[Op]] = defaultdict(list)
    for op in case.ops:
        by_process[op.who].append(op)
    for ops in by_process.values():
        found += _Process(case, ops).check()
    found += _check_fills(case)
    found.sort(key=lambda violation: (len(violation.lines), violation.lines[-1].at))
    return found


class _Process:
    """The session of one process: its operations in the order of its own time."""

    def __init__(self, case: Case, ops: Sequence[Op]) -> None:
        self.case, self.oracle = case, case.oracle
        self.ops = ops
        self.floors: dict[str, Known] = {}
        self.barrier: Known | None = None
        self.found: list[Violation] = []
        self.loads: dict[tuple[str, int], list[tuple[Op, Op]]] = defaultdict(list)  # the load and its leader
        self.flights: dict[str, list[Op]] = defaultdict(list)  # get_or_set of each key
        leaders = {op.seq: op for op in ops if op.verb is Verb.GET_OR_SET}
        for op in ops:
            if op.verb is Verb.LOAD and op.seq in leaders:
                self.loads[op.key, op.version].append((op, leaders[op.seq]))
        for op in leaders.values():
            self.flights[op.key].append(op)

    def check(self) -> list[Violation]:
        # At equal times the beginning comes first: such operations overlap.
        times = [(op.start, 0, i, op) for i, op in enumerate(self.ops)]
        times += [(op.end, 1, i, op) for i, op in enumerate(self.ops) if op.end < inf]
        times.sort(key=lambda each: each[:3])
        allowed: dict[int, list[Known]] = {}
        for _, is_end, i, op in times:
            if not is_end:
                if op.verb in READS:
                    known = [self.floors.get(op.key), self.barrier]
                    allowed[i] = [each for each in known if each is not None]
            else:
                self._ended(op, allowed.get(i, []))
        for op in self.ops:
            self._check_call(op)
        return self.found

    # ---- what an operation that ended teaches its process -----------------------------------------------------

    def _ended(self, op: Op, allowed: list[Known]) -> None:
        if op.verb in READS:
            self._read(op, allowed)
        elif op.outcome is not Outcome.DONE:
            return
        elif op.verb in STORES:
            self._stored(op)
        elif op.verb in REMOVALS and op.note & Note.CLEAN:
            self._removed(op)
        elif op.verb is Verb.BARRIER:
            event = self.oracle.at_stamp(op.stamp)
            if event is not None and (self.barrier is None or event.pos > self.barrier.pos):
                self.barrier = Known(event.pos, CAUSAL, op, op.stamp)

    def _stored(self, op: Op) -> None:
        # Not a fill of the same row by somebody who was faster.
        spans = self.oracle.spans.get((op.key, op.version), ())
        mine = [span.began for span in spans if span.began.kind == "write" and span.began.high >= op.start]
        if mine:
            self._raise(op.key, Known(mine[0].pos, OWN, op, mine[0].stamp))
        elif not self.oracle.was_killed_near(op.start, op.end):
            self._report(LOST, "the server never executed it", op, [op])

    def _removed(self, op: Op) -> None:
        keys = [op.key] if op.key in self.oracle.keys else self._hit_by(op)
        for key in keys:
            events = self.oracle.breaks_between(key, op.start, op.end, _BREAKS_OF[op.verb])
            if events:
                self._raise(key, Known(events[0].pos, OWN, op, events[0].stamp))
            elif op.verb is not Verb.PREFIX and not self.oracle.was_killed_near(op.start, op.end):
                self._report(LOST, f"the server never announced it for {key}", op, [op])

    def _hit_by(self, op: Op) -> list[str]:
        if op.verb is Verb.TAG:
            return [key for key, tags in self.oracle.tags.items() if op.key in tags]
        return [key for key in self.oracle.keys if op.verb is Verb.CLEAR or key.startswith(op.key)]

    def _raise(self, key: str, known: Known) -> None:
        if key not in self.floors or known.pos > self.floors[key].pos:
            self.floors[key] = known

    # ---- what an answer may be ----------------------------------------------------------------------------------

    def _read(self, op: Op, allowed: list[Known]) -> None:
        if op.outcome is Outcome.MISS:
            if op.note & Note.CLEAN and op.verb is not Verb.GET_OR_SET:
                event = self.oracle.earliest_death(op.key, op.start, op.end)
                if event is not None:
                    self._raise(op.key, Known(event.pos, RESURRECTION, op, event.stamp))
        elif op.outcome is Outcome.DONE:
            spans = [
                span for span in self.oracle.spans.get((op.key, op.version), ()) if span.began.low - MARGIN <= op.end
            ]
            loads = self._loads_of(op)
            problems = [self._problem_of_span(op, span, allowed) for span in spans]
            is_loaded = any(self._problem_of_load(op, load, allowed) is None for load in loads)
            if None in problems and not is_loaded:
                span = spans[problems.index(None)]
                self._raise(op.key, Known(span.began.pos, MONOTONIC, op, span.stamp))
            elif not is_loaded and None not in problems:
                self._illegal(op, spans, loads, allowed)

    def _loads_of(self, op: Op) -> list[Op]:
        if op.verb is not Verb.GET_OR_SET:
            return []
        loads = self.loads.get((op.key, op.version), ())
        return [load for load, leader in loads if load.start <= op.end and leader.end >= op.start]

    def _problem_of_span(self, op: Op, span: Span, allowed: list[Known]) -> tuple[str, Known | None] | None:
        """Return the law by which *op* must not be answered from *span*, or None."""
        ended = self.oracle.really_ended(span)
        for known in allowed:
            if known.law is CAUSAL and self._is_forgotten(known):
                continue
            is_over = ended is not None and ended.pos <= known.pos
            is_undone = known.law is not CAUSAL and span.began.kind == "revived" and span.stamp < known.stamp
            if is_over or is_undone:
                return known.law, known
        if ended is not None and op.start > ended.high + self.case.delta:
            return STALE, None
        if self._asked_at(op) > span.expires:
            return OUTLIVED, None
        return None

    def _problem_of_load(self, op: Op, load: Op, allowed: list[Known]) -> tuple[str, Known | None] | None:
        for known in allowed:
            if known.law is CAUSAL and self._is_forgotten(known):
                continue
            event = self.oracle.last_break(op.key, pos=known.pos)
            if event is not None and load.end < event.low - MARGIN:
                return known.law, known
        event = self.oracle.last_break(op.key, before=op.start - self.case.delta)
        if event is not None and load.end < event.low - MARGIN:
            return STALE, None
        return None

    def _is_forgotten(self, known: Known) -> bool:
        """A token of a life of the server that a snapshot has undone binds nobody any more."""
        event = self.oracle.at_stamp(known.stamp)
        return event is None or event.is_lost

    def _asked_at(self, op: Op) -> float:
        """When the answer was read: a follower shares what its flight's leader read before."""
        if op.verb is not Verb.GET_OR_SET:
            return op.start
        return min(
            (each.start for each in self.flights[op.key] if each.start <= op.start <= each.end), default=op.start
        )

    def _illegal(self, op: Op, spans: list[Span], loads: list[Op], allowed: list[Known]) -> None:
        if not spans and not loads:
            killed = self._kill_that_hid(op)
            if killed is None:
                self._report(PHANTOM, "nobody ever stored that", op, [op])
            elif op.start > killed[1] + self.case.delta:
                self._report(STALE, "it was gone with the server", op, [op])
            return
        if spans:
            span = spans[-1]
            law, known = self._problem_of_span(op, span, allowed) or (STALE, None)
            if known is None and self._may_be_stored_again(op):
                return
            lines = [_line_of(self.case, span.began, op.key)]
            if law is OUTLIVED:
                lines.append(Line(span.expires, "redis", f"v{span.version} of {op.key} expires"))
            elif span.ended is not None:
                lines.append(_line_of(self.case, span.ended, op.key))
            ended = span.expires if law is OUTLIVED or span.ended is None else span.ended.high
            why = f"{op.start - ended:.3f} s after it had ended" if known is None else "though it knew better"
        else:
            load = loads[-1]
            law, known = self._problem_of_load(op, load, allowed) or (STALE, None)
            pos = known.pos if known is not None else inf
            event = self.oracle.last_break(op.key, pos=pos, before=inf if known else op.start - self.case.delta)
            lines = [Line(load.start, load.who, str(load))]
            lines += [_line_of(self.case, event, op.key)] if event is not None else []
            why = "it was loaded before that"
        if known is not None:
            lines += _lines_of_known(self.case, known)
        if op.start not in {line.at for line in lines}:
            lines.append(Line(op.start, op.who, str(op)))
        self.found.append(Violation(law, f"{op.who} reads v{op.version} of {op.key} {why}", _in_order(lines)))

    def _may_be_stored_again(self, op: Op) -> bool:
        """Whether the same version may have been stored anew in the last moment of a server, seen by no witness."""
        killed = self._kill_that_hid(op)
        return killed is not None and killed[0] <= op.end and op.start <= killed[1] + self.case.delta

    def _kill_that_hid(self, op: Op) -> tuple[float, float] | None:
        for each in self.case.ops:
            if each.key == op.key and each.version == op.version and each.verb in STORES | {Verb.LOAD}:
                killed = self.oracle.was_killed_near(each.start, min(each.end, each.start + self.case.patience))
                if killed is not None:
                    return killed
        return None

    # ---- exceptions, hangs, the end -----------------------------------------------------------------------------

    def _check_call(self, op: Op) -> None:
        if op.outcome is Outcome.ERROR:
            self._report(EXCEPTION, "an exception came out", op, [op])
        if op.verb in {Verb.COMMIT, Verb.LOAD}:
            return  # the database's, not the cache's
        end = op.end
        if end == inf:
            if op.who in self.case.killed:
                return
            end = self.case.now
        stopped = sum(max(0.0, min(end, b) - max(op.start, a)) for a, b in self.case.stops.get(op.who, ()))
        if op.verb is Verb.HEAL:
            if op.outcome is not Outcome.DONE:
                self._report(HEALING, "the lease did not come back", op, [op])
        elif end - op.start - stopped > self.case.patience:
            self._report(HANG, f"{end - op.start - stopped:.1f} s", op, [op])
        if op.verb is Verb.FINAL and op.key in self.case.final:
            answer = op.version if op.outcome is Outcome.DONE else 0
            truth = self.case.final[op.key]
            if answer != truth:
                self._report(AGREEMENT, f"L2 says {f'v{truth}' if truth else 'a miss'}", op, self._last_writes(op))

    def _last_writes(self, op: Op) -> list[Op]:
        wanted = {op.version, self.case.final[op.key]} - {0}
        last = {e.version: e for e in self.case.ops if e.key == op.key and e.version in wanted and e.verb in STORES}
        return [*last.values(), op]

    def _report(self, law: str, why: str, op: Op, ops: Iterable[Op]) -> None:
        lines = [Line(each.start, each.who, str(each)) for each in ops]
        self.found.append(Violation(law, f"{op.who}: {op}: {why}", _in_order(lines)))


def _check_fills(case: Case) -> list[Violation]:
    """No fill may store a row that had been replaced when the last break of its key happened."""
    commits: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for op in case.ops:
        if op.verb is Verb.COMMIT and op.outcome is Outcome.DONE:
            commits[op.key].append((op.end, op.version))
    newest: dict[str, list[int]] = {}
    for key, each in commits.items():
        each.sort()
        newest[key] = list(accumulate((version for _, version in each), max))
    found = []
    for fill, key, version, event in case.oracle.fills:
        if event is None or key not in commits:
            continue
        at = bisect_right(commits[key], (event.low - MARGIN, 0))
        row = newest[key][at - 1] if at else 0
        if 0 <= version < row:
            commit = next(op for op in case.ops if op.verb is Verb.COMMIT and op.key == key and op.version == row)
            loads = [op for op in case.ops if op.verb is Verb.LOAD and op.key == key and op.version == version]
            load = max((op for op in loads if op.start <= fill.high), key=lambda op: op.start, default=None)
            lines = [Line(commit.start, commit.who, str(commit)), _line_of(case, event, key)]
            lines += [Line(load.start, load.who, str(load))] if load is not None else []
            lines.append(_line_of(case, fill, key))
            why = f"L2 is filled with v{version} of {key}, which was v{row} before it was last removed"
            found.append(Violation(RESURRECTION, why, _in_order(lines)))
    return found


# ---- saying it ----------------------------------------------------------------------------------------------------


def _line_of(case: Case, event: Event, key: str) -> Line:
    by = _author(case, event, key)
    version = event.versions.get(key)
    what = f"v{version} of {key}" if version else key if event.what == key else f"{event.what} ({key})".strip()
    text = f"{event.kind} {what}" + (f" stamp {event.stamp}" if event.stamp else "") + (f", by {by}" if by else "")
    return Line(event.low + MARGIN, "redis", text)


def _author(case: Case, event: Event, key: str) -> str:
    """Return who may have done it, "" if several may."""
    version = event.versions.get(key)
    kinds = {"write": STORES | {Verb.TOUCH}, "fill": {Verb.GET_OR_SET}}
    verbs = kinds.get(event.kind, {verb for verb, made in _BREAKS_OF.items() if event.kind in made})
    what = {key, *event.what.split()}
    candidates = [
        op
        for op in case.ops
        if op.verb in verbs and op.start <= event.high and op.end >= event.low and (not op.key or op.key in what)
    ]
    exact = [op for op in candidates if version and op.version == version and op.verb is not Verb.TOUCH]
    people = {op.who for op in exact or candidates}
    return people.pop() if len(people) == 1 else ""


def _lines_of_known(case: Case, known: Known) -> list[Line]:
    lines = [Line(known.op.start, known.op.who, str(known.op))]
    if known.law is CAUSAL:
        sent = [op for op in case.ops if op.verb is Verb.TOKEN and op.stamp == known.stamp and op.end <= known.op.start]
        lines += [Line(op.start, op.who, str(op)) for op in sent[-1:]]
    return lines


def _in_order(lines: Iterable[Line]) -> list[Line]:
    return sorted(set(lines), key=lambda line: line.at)


def render(violations: Sequence[Violation], zero: float, faults: Sequence[tuple[float, str]] = ()) -> str:
    """Return the shortest offending history, a column for each party, and how often each law was broken."""
    shown = violations[0]
    counts: dict[str, int] = defaultdict(int)
    for violation in violations:
        counts[violation.law] += 1
    people = list(dict.fromkeys(line.who for line in shown.lines))
    rows = [(line.at, line.who, line.text) for line in shown.lines]
    first, last = rows[0][0] - 1.5, rows[-1][0]
    rows += [(at, "faults", text) for at, text in faults if first <= at <= last]
    if len(rows) > len(shown.lines):
        people.append("faults")
    rows.sort()
    widths = {who: max(len(who), *(len(text) for _, name, text in rows if name == who)) for who in people}
    head = "     time  " + "  ".join(who.ljust(widths[who]) for who in people)
    body = [
        f"{at - zero:9.4f}  " + "  ".join((text if who == name else "").ljust(widths[who]) for who in people)
        for at, name, text in rows
    ]
    summary = ", ".join(f"{count} x {law}" for law, count in sorted(counts.items()))
    return "\n".join(
        [f"{shown.law}: {shown.why}", head.rstrip(), *(each.rstrip() for each in body), f"in all: {summary}"]
    )
