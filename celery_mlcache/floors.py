"""The stamps below which entries are dead, as one process has heard of them: for everything, tags and prefixes.

Pure, no lock: callers hold the tier's. An entry is alive if its stamp is not below :meth:`Floors.of` its key and tags.
What is kept is bounded, and forgetting is safe: a tag that is not known any more counts as invalidated when the newest
forgotten one was, a forgotten prefix as a floor under everything. Too high a floor costs a read from L2, no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

MAX_TAGS: Final = 8192  # in each of two generations: the younger one is never forgotten
MAX_PREFIXES: Final = 32


class Floors:
    """See the module. An invalidation is a stamp; stamps of one server's life only grow.

    Attributes:
        everything: The smallest stamp that is alive whatever the key and its tags.
        newest: The newest invalidation of any tag or prefix.
    """

    __slots__ = ("_forgotten", "_old_tags", "_prefixes", "_tags", "everything", "newest")

    def __init__(self) -> None:
        self.everything = 0
        self.forget()

    def forget(self) -> None:
        """Forget all tags and prefixes, because L1 is void and every ticket is dead."""
        self.newest = 0
        self._forgotten = 0  # the newest invalidation of a tag that is not in the two tables
        self._tags: dict[str, int] = {}
        self._old_tags: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}

    def raise_tags(self, tags: Iterable[str], stamp: int) -> None:
        """Entries older than *stamp* that carry one of *tags* are dead."""
        self.newest = max(self.newest, stamp)
        for tag in tags:
            if self._tags.get(tag, 0) < stamp:
                self._tags[tag] = stamp
        if len(self._tags) > MAX_TAGS:
            self._forgotten = max(self._forgotten, max(self._old_tags.values(), default=0))
            self._old_tags, self._tags = self._tags, {}

    def raise_prefix(self, prefix: str, stamp: int) -> None:
        """Entries older than *stamp* whose key begins with *prefix* are dead."""
        self.newest = max(self.newest, stamp)
        self._prefixes[prefix] = max(stamp, self._prefixes.get(prefix, 0))
        if len(self._prefixes) > MAX_PREFIXES:
            oldest = min(self._prefixes, key=self._prefixes.__getitem__)
            self.everything = max(self.everything, self._prefixes.pop(oldest))

    def of(self, key: str, tags: Iterable[str]) -> int:
        """Return the smallest stamp with which an entry of *key* that carries *tags* is alive."""
        floor = self.everything
        if tags:
            floor = max(floor, self.of_tags(tags))
        for prefix, stamp in self._prefixes.items():
            if stamp > floor and key.startswith(prefix):
                floor = stamp
        return floor

    def of_tags(self, tags: Iterable[str]) -> int:
        """Return the newest invalidation of any of *tags*; of those that are forgotten, the latest it can have been."""
        return max((max(self._tags.get(tag, 0), self._old_tags.get(tag, self._forgotten)) for tag in tags), default=0)
