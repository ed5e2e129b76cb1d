"""L1: a bounded map of keys to entries, and the two engines that may stand behind it.

What may live here: holding entries, and nothing about when they are right; this is the only module that knows
moka_py and cacheout, and it imports neither before it is asked to.

Theory of operation
-------------------
A *hot front*, a plain dict, stands before the engine: a dict look-up costs an eighth of moka's. The front is
emptied when it is full, and filled again by ``promote`` from the engine, which decides what is worth keeping. The
front takes at most half of the room and the engine the rest, so that the sum is what was configured.

The front never holds a dead entry: ``front_get`` is called without a lock and answers without a question. What
voids L1, or the entries of a tag or prefix, takes them out of the front and moves ``epoch`` or ``floors``, in O(1) for
the engine; what the engine still has from before is recognised by those two. That is needed beside ``clear``: moka's
compares times, and could leave an entry that was set in the same instant. Which keys of the front carry a tag stands
in an index beside it, which is emptied with it.

moka_py 0.5 hangs the process, with the GIL held, where Python code runs inside it while another thread writes.
Hence: get, set, remove, clear and count only, str keys, no listener, and no value whose type has ``__del__``. Its
allocator, mimalloc, belongs to the thread that has loaded it, and crashes the process some time after that has ended
(moka_py 0.5.0: a segmentation fault in ``Moka()`` or ``get``); so it is loaded by one that does not end.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, Literal

from celery_mlcache.entry import Entry
from celery_mlcache.errors import ConfigurationError
from celery_mlcache.floors import Floors
from celery_mlcache.protocols import LocalEngine

Backend = Literal["auto", "moka", "cacheout"]

FRONT_SHARE: Final = 2  # the front takes one part in so many: a hit behind it costs five times one in it
INDEX_SHARE: Final = 8  # additions of a tagged key to the front, for each place in it, before both start anew
FRONT_MAX: Final = 16_384  # emptying it lets go of all its entries at one go: some 0.8 ms
MIN_TTL: Final = 1e-6  # moka refuses 0 and below ...
MAX_TTL: Final = 1e9  # ... and above some 1e19 s; 31 years will do

logger = logging.getLogger(__name__)


def _load_moka() -> None:
    """See to it that moka_py is loaded by a thread that never ends: the main one, or one that does nothing else.

    Drop it when moka_py no longer crashes: tests/contract/test_local.py tells.
    """
    # By the kernel's number: under gevent every greenlet is a thread, and none of them the main one.
    if "moka_py" in sys.modules or threading.get_native_id() == os.getpid():
        return
    is_loaded = threading.Event()

    def load() -> None:
        try:
            import moka_py  # noqa: F401, PLC0415 - as below
        except ImportError:
            return  # whoever has asked will meet it
        finally:
            is_loaded.set()
        threading.Event().wait()

    threading.Thread(target=load, name="mlcache-moka", daemon=True).start()
    is_loaded.wait()


class MokaEngine:
    """moka_py's TinyLFU. Thread-safe; a forked child builds a new one and leaves the inherited one alone.

    Once full it may decline a new key in favour of keys asked for more often. It may hold some entries more than
    *max_size* for the moment between two writes.

    Raises:
        ImportError: moka_py is not there.
    """

    def __init__(self, max_size: int) -> None:
        _load_moka()
        from moka_py import Moka  # noqa: PLC0415 - only where it is chosen

        # No ttl here: a global one would cap the entries' own.
        self._moka: Moka[str, Entry] = Moka(max_size)

    def get(self, key: str) -> Entry | None:
        """Return the entry or None."""
        return self._moka.get(key)

    def put(self, key: str, entry: Entry, ttl: float) -> None:
        """Hold *entry* for at most *ttl* seconds."""
        self._moka.set(key, entry, ttl=min(max(ttl, MIN_TTL), MAX_TTL))

    def remove(self, key: str) -> None:
        """Forget the key."""
        self._moka.remove(key)

    def clear(self) -> None:
        """Forget everything; the memory is freed by later calls."""
        self._moka.clear()

    def count(self) -> int:
        """Return about how many entries are held, some writes behind."""
        held: int = self._moka.count()
        return held


class CacheoutEngine:
    """cacheout's LRU. Thread-safe by its own lock, so never touched after a fork.

    It is given no ttl (its own costs O(n) for each new key): entries past their deadline are answered until they
    are evicted, and the reader compares.

    Raises:
        ImportError: cacheout is not there.
    """

    def __init__(self, max_size: int) -> None:
        from cacheout import LRUCache  # noqa: PLC0415 - only where it is chosen

        self._cache = LRUCache(maxsize=max_size, ttl=0, timer=time.monotonic)

    def get(self, key: str) -> Entry | None:
        """Return the entry or None, even after its deadline."""
        found: Entry | None = self._cache.get(key)  # no default: cacheout would call one that is callable
        return found

    def put(self, key: str, entry: Entry, ttl: float) -> None:  # noqa: ARG002 - the entry has its deadline
        """Hold *entry* until it is evicted."""
        self._cache.set(key, entry)

    def remove(self, key: str) -> None:
        """Forget the key."""
        self._cache.delete(key)

    def clear(self) -> None:
        """Forget everything."""
        self._cache.clear()

    def count(self) -> int:
        """Return how many entries are held, dead ones included."""
        held: int = self._cache.size()
        return held


def make_engine(backend: Backend, max_size: int) -> LocalEngine:
    """Return an engine for *max_size* entries; "auto" is moka, or cacheout with a warning where moka is not there.

    Raises:
        ConfigurationError: *max_size* is below 1 (cacheout would take 0 for "unlimited"), or the engine asked for
            cannot be imported.
    """
    if max_size < 1:
        raise ConfigurationError([f"L1 needs room for at least 1 entry, not {max_size}"])
    try:
        if backend == "cacheout":
            return CacheoutEngine(max_size)
        try:
            return MokaEngine(max_size)
        except ImportError as exc:
            if backend == "moka":
                raise
            logger.warning("moka_py cannot be imported; L1 uses cacheout, which is slower", extra={"why": str(exc)})
            return CacheoutEngine(max_size)
    except ImportError as exc:
        raise ConfigurationError([f"the L1 engine {backend!r} cannot be imported: {exc}"]) from exc


class Local:
    """L1: the hot front and the engine behind it. A forked child builds a new one.

    Callers hold the tier's lock for everything but :attr:`front_get`. To check that no invalidation has passed
    and to put must be one step against the listener's discarding, or a copy could be put just after the message
    that should have killed it; no lock in here could join the two.

    Limits: ``__del__`` is looked for on the value itself, not inside it.

    Attributes:
        front_get: ``dict.get`` of the front, the same for the life of this object. What it returns is of the present
            epoch and not below the floor; the caller compares the deadline.
        epoch: Set by :meth:`void`; an entry of another one is void.
        floor: The smallest stamp alive whatever the key and its tags.
        floors: The stamps below which entries are dead; the tier has them shared with the coherence state.
    """

    def __init__(self, backend: Backend, max_size: int, *, epoch: int = 0) -> None:
        self.epoch = epoch
        self.floors = Floors()
        self.floor = 0
        self._tagged: dict[str, set[str]] = {}  # tag to keys of the front, and perhaps some that have left it
        self._tagged_count = 0
        self._front: dict[str, Entry] = {}
        self._front_size = min(FRONT_MAX, max_size // FRONT_SHARE)
        self._engine = make_engine(backend, max_size - self._front_size)
        self.front_get: Callable[[str], Entry | None] = self._front.get

    @property
    def engine(self) -> str:
        """Return the name of the engine's class, for people."""
        return type(self._engine).__name__

    def put(self, key: str, entry: Entry, ttl: float) -> bool:
        """Hold *entry* for at most *ttl* seconds in place of what the key had; return whether it is held.

        It is not if it is void already, or if its value's type defines ``__del__``; then the key holds nothing.
        """
        if not self._is_alive(key, entry):
            return False  # what is there now is younger than this
        if hasattr(type(entry.value), "__del__"):
            self.discard(key)
            return False
        self._engine.put(key, entry, ttl)
        self._hold_in_front(key, entry)
        return True

    def peek(self, key: str) -> Entry | None:
        """Return the entry, dead by its deadline or not, or None; the front stays as it is."""
        found = self._front.get(key)
        if found is not None:
            return found
        found = self._engine.get(key)
        return found if found is not None and self._is_alive(key, found) else None

    def promote(self, key: str) -> Entry | None:
        """Return what :meth:`peek` returns, and hold it in the front from now on."""
        found = self.peek(key)
        if found is not None:
            self._hold_in_front(key, found)
        return found

    def discard(self, key: str) -> None:
        """Forget the key."""
        self._front.pop(key, None)
        self._engine.remove(key)

    def discard_older(self, key: str, stamp: int) -> bool:
        """Forget the key if its entry is older than *stamp*; return whether there was such a one."""
        found = self.peek(key)
        if found is None or found.stamp >= stamp:
            return False
        self.discard(key)
        return True

    def void(self, epoch: int) -> None:
        """Forget everything that was put before now; *epoch* is greater than any before it."""
        # The front first: who reads the new epoch without the lock meets no older entry.
        self._clear_front()
        self.epoch = epoch
        self._engine.clear()

    def void_below(self, floor: int) -> None:
        """Let every entry with a stamp below *floor* be dead from now on, in O(1); a floor never falls."""
        if floor > self.floor:
            self._clear_front()
            self.floor = floor

    def void_tag(self, tag: str, stamp: int) -> None:
        """Let every entry that carries *tag* and is older than *stamp* be dead; ``floors`` says so already."""
        self._thin_front([key for key in self._tagged.get(tag, ()) if self._is_older(key, stamp)])

    def void_prefix(self, prefix: str, stamp: int) -> None:
        """Let every entry of a key with *prefix* and older than *stamp* be dead; ``floors`` says so already."""
        self._thin_front([key for key in self._front if key.startswith(prefix) and self._is_older(key, stamp)])

    def count(self) -> int:
        """Return about how many entries are held, dead ones included."""
        return max(len(self._front), self._engine.count())

    def _is_alive(self, key: str, entry: Entry) -> bool:
        floor = max(self.floor, self.floors.of(key, entry.tags))
        return entry.epoch == self.epoch and entry.stamp >= floor

    def _is_older(self, key: str, stamp: int) -> bool:
        found = self._front.get(key)
        return found is not None and found.stamp < stamp

    def _thin_front(self, keys: list[str]) -> None:
        for key in keys:
            self._front.pop(key, None)

    def _clear_front(self) -> None:
        self._front.clear()
        self._tagged.clear()
        self._tagged_count = 0

    def _hold_in_front(self, key: str, entry: Entry) -> None:
        if not self._front_size:
            return
        if len(self._front) >= self._front_size and key not in self._front:
            self._clear_front()
        if entry.tags:
            self._tagged_count += len(entry.tags)
            if self._tagged_count > INDEX_SHARE * self._front_size:
                self._clear_front()
                self._tagged_count = len(entry.tags)
            for tag in entry.tags:
                self._tagged.setdefault(tag, set()).add(key)
        self._front[key] = entry
