"""One process of the laboratory: random operations on a cache of its own, all of them recorded.

``python -m tests.faults.lab_process SPEC`` where SPEC is a file with :class:`Spec` as JSON. Values are versions of rows
in a database that all processes share (a mapped file, committed under a lock): a writer commits a new version, then
stores it or removes the key, as applications do; a loader reads the row and may dawdle before it returns.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from celery_mlcache import MISS, CacheManager, create_cache_manager
from celery_mlcache.plans import Loaded, Plan
from tests.support import mutants
from tests.support.history import Deed, Note, Outcome, Recorder, Verb
from tests.support.oracle import text_of, version_in

WAIT, RUN, QUIET, READ, END = range(5)  # what the laboratory wants
STARTED, PARKED, FINISHED = 1, 2, 3  # what a process says

HEAL_WITHIN = 10.0  # seconds
_ROWS_AT = 256
_LEAVE_AT, _STATE_AT = 64, 128
_ROW = struct.Struct("<q")
_ERRORS = ("l2_errors", "l2_rejected", "writes_dropped")


@dataclass(frozen=True)
class Habits:
    """How a process uses its cache.

    Attributes:
        weights: How often each verb, relative to the others.
        pause: Mean seconds between two operations of a thread.
        dawdle: Seconds that a loader takes at most after it has read the row.
        long_load: The chance of a loader that takes up to a second.
        ttls: Lives of values, drawn from these; None: the default.
        handoff: The chance that a token goes to another process after a write.
        threads: That use the cache.
    """

    weights: Mapping[str, float] = field(
        default_factory=lambda: {
            "GET": 30,
            "GET_MANY": 6,
            "GET_OR_SET": 25,
            "SET": 9,
            "SET_MANY": 3,
            "ADD": 2,
            "TOUCH": 2,
            "DELETE": 9,
            "DELETE_MANY": 3,
            "TAG": 3,
            "PREFIX": 0.5,
            "CLEAR": 0.3,
        }
    )
    pause: float = 0.012
    dawdle: float = 0.03
    long_load: float = 0.003
    ttls: Sequence[float | None] = (None, None, None, 30.0, 0.15, 0.6)
    handoff: float = 0.3
    threads: int = 2


@dataclass(frozen=True)
class Spec:
    """What one process is told."""

    who: str
    slot: int
    slots: int
    seed: int
    folder: str
    keys: Sequence[str]
    tags: Mapping[str, Sequence[str]]  # of each key
    prefixes: Sequence[str]
    settings: Mapping[str, Any]
    habits: Habits
    mutant: str = ""

    @property
    def names(self) -> list[str]:
        """Everything that a record may name, by number."""
        return [*self.keys, *sorted({tag for tags in self.tags.values() for tag in tags}), *self.prefixes]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Spec:
        """Read it back."""
        fields = json.loads(path.read_text())
        return cls(**{**fields, "habits": Habits(**fields["habits"])})


class Board:
    """The mapped file that all share: what is wanted, what each process says, and the rows of the database."""

    def __init__(self, path: Path, rows: int) -> None:
        if not path.exists():
            path.write_bytes(bytes(_ROWS_AT) + _ROW.pack(1) * rows)
        self._file = path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), 0)
        self._lock = threading.Lock()

    @property
    def phase(self) -> int:
        """What the laboratory wants."""
        return self._map[0]

    @phase.setter
    def phase(self, phase: int) -> None:
        self._map[0] = phase

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
        self._file.close()

    def ask_to_leave(self, slot: int, value: int = 1) -> None:
        """Have the process of *slot* end in good order (0: no more)."""
        self._map[_LEAVE_AT + slot] = value

    def must_leave(self, slot: int) -> bool:
        """Whether it was asked to."""
        return bool(self._map[_LEAVE_AT + slot])

    def state(self, slot: int) -> int:
        """What the process of *slot* says."""
        return self._map[_STATE_AT + slot]

    def say(self, slot: int, state: int) -> None:
        """Say it."""
        self._map[_STATE_AT + slot] = state

    def row(self, key: int) -> int:
        """Return the row's version."""
        return int(_ROW.unpack_from(self._map, _ROWS_AT + _ROW.size * key)[0])

    def commit(self, key: int) -> int:
        """Give the row its next version."""
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                version = self.row(key) + 1
                _ROW.pack_into(self._map, _ROWS_AT + _ROW.size * key, version)
                return version
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


class LabProcess:
    """The process."""

    def __init__(self, spec: Spec) -> None:
        folder = Path(spec.folder)
        self.spec, self.habits = spec, spec.habits
        self.board = Board(folder / "board", len(spec.keys))
        self.recorder = Recorder(folder / f"{spec.who}.history")
        self.cache: CacheManager = create_cache_manager(**spec.settings)
        self.numbers = {name: number for number, name in enumerate(spec.names)}
        self.mail = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.mail.setblocking(False)
        address = folder / f"mail-{spec.slot}"
        address.unlink(missing_ok=True)
        self.mail.bind(str(address))
        self.verbs, self.weights = list(self.habits.weights), list(self.habits.weights.values())

    def run(self) -> None:
        """Work until told to be quiet, then read everything once more."""
        self.cache.warm()
        self.board.say(self.spec.slot, STARTED)
        while self.board.phase == WAIT:
            time.sleep(0.01)
        threads = [threading.Thread(target=self._work, args=(n,)) for n in range(1, self.habits.threads)]
        for thread in threads:
            thread.start()
        self._work(0)
        for thread in threads:
            thread.join()
        if self.board.phase == RUN:  # asked to leave
            self.cache.close()
            return
        self.board.say(self.spec.slot, PARKED)
        while self.board.phase == QUIET:
            time.sleep(0.01)
        self._read_all()
        self.board.say(self.spec.slot, FINISHED)
        while self.board.phase == READ:
            time.sleep(0.01)
        self.cache.close()

    def _work(self, thread: int) -> None:
        rng = random.Random(f"{self.spec.seed} {self.spec.who} {thread}")
        worker = _Worker(self, thread, rng)
        while self.board.phase == RUN and not self.board.must_leave(self.spec.slot):
            try:
                if thread == 0:
                    worker.open_mail()
                worker.do(rng.choices(self.verbs, self.weights)[0])
            except Exception:
                traceback.print_exc()  # it is recorded as well
            time.sleep(rng.expovariate(1 / self.habits.pause))

    def _read_all(self) -> None:
        worker = _Worker(self, 0, random.Random(0))
        with self.recorder.doing(0, Verb.HEAL) as deed:
            deadline = time.monotonic() + HEAL_WITHIN
            while self.cache.stats()["lease"] != "held" and time.monotonic() < deadline:
                self.cache.get(self.spec.keys[0])
                time.sleep(0.01)
            held = self.cache.stats()["lease"] == "held"
            deed.outcome = Outcome.DONE if held else Outcome.UNKNOWN
        for _ in range(2):
            for key in range(len(self.spec.keys)):
                with suppress(Exception):
                    worker.get(key, Verb.FINAL)


class _Worker:
    """One thread of the process."""

    def __init__(self, process: LabProcess, thread: int, rng: random.Random) -> None:
        self.process, self.thread, self.rng = process, thread, rng
        self.cache, self.keys, self.board = process.cache, process.spec.keys, process.board
        self.habits = process.habits

    def do(self, verb: str) -> None:
        """Do one operation on random keys."""
        known: dict[str, Callable[[], None]] = {
            "GET": lambda: self.get(self._some()),
            "GET_MANY": self._get_many,
            "GET_OR_SET": self._get_or_set,
            "SET": lambda: self._set_many(1),
            "SET_MANY": lambda: self._set_many(3),
            "ADD": self._add,
            "TOUCH": self._touch,
            "DELETE": lambda: self._delete_many(1),
            "DELETE_MANY": lambda: self._delete_many(3),
            "TAG": self._invalidate_tag,
            "PREFIX": self._invalidate_prefix,
            "CLEAR": self._clear,
        }
        known[verb]()

    # ---- reading ------------------------------------------------------------------------------------------------

    def get(self, key: int, verb: Verb = Verb.GET) -> None:
        """Read one key."""
        with self._doing(verb, [key]) as deed:
            self._answered(deed, key, self.cache.get(self.keys[key], MISS))

    def _get_many(self) -> None:
        keys = self.rng.sample(range(len(self.keys)), min(4, len(self.keys)))
        with self._doing(Verb.GET_MANY, keys) as deed:
            found = self.cache.get_many([self.keys[key] for key in keys])
            for key in keys:
                self._answered(deed, key, found.get(self.keys[key], MISS))

    def _get_or_set(self) -> None:
        key = self._some()
        dawdle = self.rng.random() * (1.0 if self.rng.random() < self.habits.long_load else self.habits.dawdle)
        with self._doing(Verb.GET_OR_SET, [key]) as deed:

            def loader() -> str:
                start = time.monotonic()
                version = self.board.row(key)
                self.process.recorder.load(self.thread, deed.seq, key, version, start=start, end=time.monotonic())
                time.sleep(dawdle)
                return text_of(self.keys[key], version)

            self._answered(deed, key, self._load(self.keys[key], loader, self._ttl(), self._tags(key)))

    def _load(self, name: str, loader: Callable[[], str], ttl: float | None, tags: Sequence[str]) -> Any:
        """Load as users do, or as cached tasks do: under a lease of the whole fleet, or as a refresh."""
        choice = self.rng.random()
        if choice < 0.5:
            return self.cache.get_or_set(name, loader, ttl, tags=tags)
        plan = Plan(lambda: Loaded(loader(), ttl, tuple(tags)), tags=tuple(tags), is_shared=True, max_wait=1.0)
        if choice < 0.9:
            return (self.cache.front(name) or self.cache.resolve(name, plan)).value
        return self.cache.renew(name, plan).value

    def _answered(self, deed: Deed, key: int, answer: Any) -> None:
        if answer is MISS:
            deed.answers[key] = (Outcome.MISS, 0)
        else:
            deed.answers[key] = (Outcome.DONE, version_in(str(answer).encode(), self.keys[key]))

    # ---- writing ------------------------------------------------------------------------------------------------

    def _set_many(self, count: int) -> None:
        keys = self.rng.sample(range(len(self.keys)), min(count, len(self.keys)))
        # All keys of one call share their tags.
        keys = [each for each in keys if self._tags(each) == self._tags(keys[0])]
        rows = {key: self._commit(key) for key in keys}
        with self._doing(Verb.SET if count == 1 else Verb.SET_MANY, keys, list(rows.values())) as deed:
            values = {self.keys[key]: text_of(self.keys[key], version) for key, version in rows.items()}
            tags = self._tags(keys[0])
            if count == 1:
                ((name, value),) = values.items()
                is_done = self.cache.set(name, value, self._ttl(), tags=tags)
            else:
                is_done = self.cache.set_many(values, self._ttl(), tags=tags)
            deed.outcome = Outcome.DONE if is_done else Outcome.UNKNOWN
        self._hand_off(keys[0])

    def _add(self) -> None:
        untagged = [key for key in range(len(self.keys)) if not self._tags(key)]  # add() takes no tags
        if not untagged:
            return
        key = self.rng.choice(untagged)
        version = self._commit(key)
        with self._doing(Verb.ADD, [key], [version]) as deed:
            is_done = self.cache.add(self.keys[key], text_of(self.keys[key], version), self._ttl())
            deed.outcome = Outcome.DONE if is_done else Outcome.UNKNOWN

    def _touch(self) -> None:
        key = self._some()
        with self._doing(Verb.TOUCH, [key]) as deed:
            is_done = self.cache.touch(self.keys[key], self.rng.choice([30.0, 0.2]))
            deed.outcome = Outcome.DONE if is_done else Outcome.UNKNOWN

    def _delete_many(self, count: int) -> None:
        keys = self.rng.sample(range(len(self.keys)), min(count, len(self.keys)))
        if self.rng.random() < 0.9:
            for key in keys:
                self._commit(key)
        with self._doing(Verb.DELETE if count == 1 else Verb.DELETE_MANY, keys) as deed:
            if count == 1:
                self.cache.delete(self.keys[keys[0]])
            else:
                self.cache.delete_many([self.keys[key] for key in keys])
            deed.outcome = Outcome.DONE  # as far as the counters, which are noted, say nothing else
        self._hand_off(keys[0])

    def _invalidate_tag(self) -> None:
        tag = self.rng.choice(sorted({tag for tags in self.process.spec.tags.values() for tag in tags}))
        keys = [key for key, name in enumerate(self.keys) if tag in self.process.spec.tags.get(name, ())]
        for key in keys:
            self._commit(key)
        with self._doing(Verb.TAG, [self.process.numbers[tag]]) as deed:
            is_done = self.cache.invalidate_tags(tag)
            deed.outcome = Outcome.DONE if is_done else Outcome.UNKNOWN
        self._hand_off(keys[0])

    def _invalidate_prefix(self) -> None:
        prefix = self.rng.choice(list(self.process.spec.prefixes))
        with self._doing(Verb.PREFIX, [self.process.numbers[prefix]]) as deed:
            is_done = self.cache.invalidate_prefix(prefix)
            deed.outcome = Outcome.DONE if is_done else Outcome.UNKNOWN

    def _clear(self) -> None:
        with self._doing(Verb.CLEAR) as deed:
            is_done = self.cache.clear()
            deed.outcome = Outcome.DONE if is_done else Outcome.UNKNOWN

    # ---- causality ----------------------------------------------------------------------------------------------

    def _hand_off(self, key: int) -> None:
        spec = self.process.spec
        if spec.slots < 2 or self.rng.random() >= self.habits.handoff:
            return
        other = self.rng.choice([slot for slot in range(spec.slots) if slot != spec.slot])
        with self._doing(Verb.TOKEN, [key]) as deed:
            token = self.cache.token()
            deed.stamp, deed.outcome = int(token.rpartition("@")[2]), Outcome.DONE
        letter = json.dumps([token, key]).encode()
        with suppress(OSError):  # it is full, or the process is gone
            self.process.mail.sendto(letter, str(Path(spec.folder) / f"mail-{other}"))

    def open_mail(self) -> None:
        """Take the tokens that others have sent, and read at once what they wrote."""
        while True:
            try:
                token, key = json.loads(self.process.mail.recv(1000))
            except BlockingIOError:
                return
            with self._doing(Verb.BARRIER, [key], stamp=int(token.rpartition("@")[2])) as deed:
                self.cache.barrier(token)
                deed.outcome = Outcome.DONE
            self.get(key)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _some(self) -> int:
        return self.rng.randrange(len(self.keys))

    def _ttl(self) -> float | None:
        return self.rng.choice(list(self.habits.ttls))

    def _tags(self, key: int) -> Sequence[str]:
        return self.process.spec.tags.get(self.keys[key], ())

    def _commit(self, key: int) -> int:
        with self.process.recorder.doing(self.thread, Verb.COMMIT, [key]) as deed:
            version = self.board.commit(key)
            deed.answers[key] = (Outcome.DONE, version)
        return version

    @contextmanager
    def _doing(
        self, verb: Verb, keys: Sequence[int] | None = None, versions: Sequence[int] = (), stamp: int = 0
    ) -> Iterator[Deed]:
        more = {} if keys is None else {"keys": keys}
        before = self.cache.stats()
        with self.process.recorder.doing(self.thread, verb, versions=versions, stamp=stamp, **more) as deed:
            yield deed
            after = self.cache.stats()
            if all(before[name] == after[name] for name in _ERRORS):
                deed.note |= Note.CLEAN
            asked_l2 = any(before[name] != after[name] for name in ("l2_hits", "misses", "coalesced"))
            if after["l1_hits"] > before["l1_hits"] and not asked_l2:
                deed.note |= Note.LOCAL


if __name__ == "__main__":
    told = Spec.load(Path(sys.argv[1]))
    if told.mutant:
        mutants.plant(told.mutant)
    LabProcess(told).run()
    os._exit(0)
