"""What each process of the laboratory did: records of a fixed size, written before and after each operation.

A process may be killed at any instant. So an operation is recorded when it begins and when it ends, each time by one
``write`` of one record to a file that only this process appends to; what had begun and never ended may have happened.
Times are CLOCK_MONOTONIC, which on Linux all processes of a machine share.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, IntFlag, auto
from math import inf
from pathlib import Path
from struct import Struct

_RECORD = Struct("<BBBBHHIddqq")
_NO_KEY = 0xFFFF
_BEGUN, _ENDED = 0, 1


class Verb(IntEnum):
    """What was done."""

    GET = auto()
    GET_MANY = auto()
    GET_OR_SET = auto()
    FINAL = auto()  # a read after quiescence
    SET = auto()
    SET_MANY = auto()
    ADD = auto()
    TOUCH = auto()
    DELETE = auto()
    DELETE_MANY = auto()
    TAG = auto()
    PREFIX = auto()
    CLEAR = auto()
    COMMIT = auto()  # the row in the database has a new version
    LOAD = auto()  # a loader read the row; part of the get_or_set with the same sequence number
    TOKEN = auto()  # a token was taken and sent to another process
    BARRIER = auto()
    HEAL = auto()  # after the last fault: until the lease was held again


READS = frozenset({Verb.GET, Verb.GET_MANY, Verb.GET_OR_SET, Verb.FINAL})
STORES = frozenset({Verb.SET, Verb.SET_MANY, Verb.ADD})
REMOVALS = frozenset({Verb.DELETE, Verb.DELETE_MANY, Verb.TAG, Verb.PREFIX, Verb.CLEAR})


class Outcome(IntEnum):
    """How it ended, as far as its process was told."""

    UNKNOWN = 0  # it never ended, or it failed: it may have happened, or happen yet
    DONE = auto()
    MISS = auto()
    ERROR = auto()  # an exception came out


class Note(IntFlag):
    """What the process's counters say of an operation."""

    NONE = 0
    CLEAN = 1  # no error, nothing rejected, nothing dropped meanwhile in the whole process
    LOCAL = 2  # L1 alone was asked


@dataclass(slots=True)
class Op:
    """One operation on one key (many keys: one record for each, with one sequence number).

    Attributes:
        who: The process: "p3", its successors "p3'2", "p3'3".
        version: Of the row that was read, written, or committed; 0: none.
        stamp: Of the token, for TOKEN and BARRIER.
        end: inf if it never ended.
    """

    who: str
    thread: int
    seq: int
    verb: Verb
    key: str
    start: float
    end: float = inf
    outcome: Outcome = Outcome.UNKNOWN
    version: int = 0
    stamp: int = 0
    note: Note = Note.NONE

    def __str__(self) -> str:
        """Say it as a person would."""
        what = f"{self.verb.name.lower()} {self.key}".strip()
        if self.verb in {Verb.TOKEN, Verb.BARRIER}:
            return f"{what} stamp {self.stamp}"
        if self.verb is Verb.HEAL:
            return "waits for the lease"
        if self.verb in READS:
            answer = {Outcome.MISS: "a miss", Outcome.ERROR: "an exception", Outcome.UNKNOWN: "never ended"}
            local = " from L1" if self.note & Note.LOCAL else ""
            return f"{what} -> {answer.get(self.outcome, f'v{self.version}')}{local}"
        version = f" v{self.version}" if self.version else ""
        ended = {Outcome.DONE: "", Outcome.MISS: " (nothing there)", Outcome.ERROR: " raises"}
        return f"{what}{version}{ended.get(self.outcome, ' (outcome unknown)')}"


class Deed:
    """An operation under way: who records it fills in how it ended."""

    def __init__(self, verb: Verb, seq: int) -> None:
        self.verb, self.seq = verb, seq
        self.outcome = Outcome.UNKNOWN
        self.note = Note.NONE
        self.answers: dict[int, tuple[Outcome, int]] = {}  # by key, where keys differ: outcome and version
        self.stamp = 0


class Recorder:
    """Appends one process's records. Thread-safe: a record is one write to a file opened for appending."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._seq = 0
        self._lock = threading.Lock()

    @contextmanager
    def doing(
        self, thread: int, verb: Verb, keys: Sequence[int] = (_NO_KEY,), versions: Sequence[int] = (), stamp: int = 0
    ) -> Iterator[Deed]:
        """Record the beginning, then, if the process lives so long, the end, of an operation on *keys*."""
        with self._lock:
            self._seq += 1
            deed = Deed(verb, self._seq)
        deed.stamp = stamp
        told = dict(zip(keys, versions, strict=False))
        begun = b""
        start = time.monotonic()
        for key in keys:
            begun += _RECORD.pack(verb, _BEGUN, thread, 0, key, 0, deed.seq, start, 0.0, told.get(key, 0), stamp)
        os.write(self._file, begun)
        try:
            start = time.monotonic()
            yield deed
        except BaseException:
            deed.outcome = Outcome.ERROR
            deed.answers.clear()
            raise
        finally:
            end = time.monotonic()
            ended = b""
            for key in keys:
                outcome, version = deed.answers.get(key, (deed.outcome, told.get(key, 0)))
                ended += _RECORD.pack(
                    verb, _ENDED, thread, outcome, key, deed.note, deed.seq, start, end, version, deed.stamp
                )
            os.write(self._file, ended)

    def load(self, thread: int, seq: int, key: int, version: int, *, start: float, end: float) -> None:
        """Record that a loader of operation *seq* read *version* between *start* and *end*."""
        os.write(
            self._file,
            _RECORD.pack(Verb.LOAD, _ENDED, thread, Outcome.DONE, key, 0, seq, start, end, version, 0),
        )


def read_history(path: Path, who: str, keys: Sequence[str]) -> list[Op]:
    """Return what the file holds, half a record at its end apart."""
    ops: list[Op] = []
    begun: dict[tuple[int, int], Op] = {}
    data = path.read_bytes() if path.exists() else b""
    for fields in _RECORD.iter_unpack(data[: len(data) // _RECORD.size * _RECORD.size]):
        verb, phase, thread, outcome, key, note, seq, start, end, version, stamp = fields
        name = "" if key == _NO_KEY else keys[key]
        if phase == _BEGUN:
            op = Op(who, thread, seq, Verb(verb), name, start, version=version, stamp=stamp)
            begun[seq, key] = op
            ops.append(op)
            continue
        op_or_none = None if verb == Verb.LOAD else begun.pop((seq, key), None)
        if op_or_none is None:
            op_or_none = Op(who, thread, seq, Verb(verb), name, start)
            ops.append(op_or_none)
        op = op_or_none
        op.start, op.end, op.outcome, op.note = start, end, Outcome(outcome), Note(note)
        op.version, op.stamp = version, stamp
    return ops
