"""The error tree. Every error survives pickling: Celery ships exceptions between processes.

What may live here: exception classes and a question about foreign ones. ``args`` always holds exactly what
``__init__`` takes, so that ``pickle.loads(pickle.dumps(e))`` builds the same error again.

::

    MLCacheError
    ├── ConfigurationError (ValueError)     settings; all problems in one message
    ├── CacheKeyError (ValueError)          a key, tag or prefix that no cache will take
    ├── SerializationError (TypeError)      a value that the codec will not alter silently
    ├── NotAnIntegerError (TypeError)       incr/decr on something that is not a counter
    ├── CodecError                          stored bytes that are not what they should be
    ├── RemoteStoreError                    Redis failed (raised to users in strict mode only)
    ├── CallInProgressError                 another one computes it, and the caller would rather not wait
    ├── NotCachedError (LookupError)        a call that was to be answered from the cache only
    └── CacheClosedError (RuntimeError)     use after close()
"""

from __future__ import annotations

from collections.abc import Sequence


def is_interrupt(exc: BaseException) -> bool:
    """Return whether *exc* is Celery's or billiard's: a soft time limit, Retry, Ignore. Nobody may swallow those."""
    return type(exc).__module__.partition(".")[0] in {"billiard", "celery"}


class MLCacheError(Exception):
    """Root of every error that celery_mlcache raises."""


class ConfigurationError(MLCacheError, ValueError):
    """Settings are wrong; the message lists every problem, one a line, secrets hidden."""

    def __init__(self, problems: Sequence[str]) -> None:
        problems = tuple(problems)
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        """Return all problems, one a line."""
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} settings are wrong:\n" + "\n".join(f"  {p}" for p in self.problems)


class CacheKeyError(MLCacheError, ValueError):
    """A key, tag or prefix is not a ``str`` of 1 to 1024 bytes of UTF-8 without control characters."""

    def __init__(self, key: object, why: str, what: str = "cache key") -> None:
        super().__init__(key if isinstance(key, str) else repr(key)[:200], why, what)
        self.why, self.what = why, what

    def __str__(self) -> str:
        """Name the key, shortened, and the rule it breaks."""
        shown = repr(self.args[0])
        return f"{self.what} {shown if len(shown) <= 80 else shown[:77] + '...'} {self.why}"  # noqa: PLR2004


class SerializationError(MLCacheError, TypeError):
    """A value cannot be stored without altering it; names the path inside it and the type."""

    def __init__(self, path: str, type_name: str, why: str) -> None:
        super().__init__(path, type_name, why)
        self.path, self.type_name, self.why = path, type_name, why

    def __str__(self) -> str:
        """Name path, type and reason."""
        return f"{self.path}: {self.type_name} {self.why}"


class NotAnIntegerError(MLCacheError, TypeError):
    """``incr`` or ``decr`` met a value that is not an integer (or would pass ±2**53)."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(key, why)
        self.key, self.why = key, why

    def __str__(self) -> str:
        """Name the key and the reason."""
        return f"{self.key!r}: {self.why}"


class CodecError(MLCacheError):
    """Stored bytes are truncated, corrupted, unsigned, of another version or for another key.

    The cache turns it into a counted miss; users never see it. ``reason`` is one word, used as a counter's name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RemoteStoreError(MLCacheError):
    """Redis failed; the driver's error is the ``__cause__``.

    ``outcome_unknown`` is True where the command may have been executed all the same.
    """

    def __init__(self, op: str, why: str, *, outcome_unknown: bool = False) -> None:
        super().__init__(op, why)
        self.op, self.why = op, why
        self.outcome_unknown = outcome_unknown

    def __str__(self) -> str:
        """Name the operation and what went wrong."""
        return f"L2 {self.op} failed: {self.why}"


class CallInProgressError(MLCacheError):
    """Somebody computes this value right now, and the caller has said not to wait for it.

    ``owner`` says who, ``remaining`` for how many seconds at least nobody else may, as far as is known.
    """

    def __init__(self, key: str, owner: str, remaining: float) -> None:
        super().__init__(key, owner, remaining)
        self.key, self.owner, self.remaining = key, owner, remaining

    def __str__(self) -> str:
        """Name the key and who computes it."""
        return f"{self.key!r} is being computed by {self.owner}"


class NotCachedError(MLCacheError, LookupError):
    """A call with ``mlcache="only"`` met a result that is not cached."""

    def __init__(self, task: str, key: str, why: str) -> None:
        super().__init__(task, key, why)
        self.task, self.key, self.why = task, key, why

    def __str__(self) -> str:
        """Name the task and why nothing was found."""
        return f"{self.task}: {self.why}"


class CacheClosedError(MLCacheError, RuntimeError):
    """The manager was closed and is used again."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace)

    def __str__(self) -> str:
        """Name the namespace."""
        return f"the cache {self.args[0]!r} is closed"
