"""How one task is cached: its options, checked when the task is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from celery_mlcache.errors import ConfigurationError
from celery_mlcache.keys import check_tags
from celery_mlcache.manager import check_ttl


@dataclass(frozen=True, slots=True)
class Options:
    """How one task is cached: the ``mlcache={...}`` of a task, or the keywords of ``@cached_task``.

    Attributes:
        ttl: Seconds a result lives; None for the cache's default.
        tags: What a result can be invalidated by; ``{name}`` stands for that argument, as in ``str.format``.
    """

    ttl: float | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse at decoration what would be refused at the first call."""
        try:
            if self.ttl is not None:
                check_ttl(self.ttl)
            object.__setattr__(self, "tags", check_tags(self.tags))
        except (ValueError, TypeError) as exc:
            raise ConfigurationError([str(exc)]) from None

    @classmethod
    def of(cls, given: Mapping[str, Any] | Options | None, task_name: str) -> Options:
        """Return checked options; raises ConfigurationError for a wrong one."""
        if isinstance(given, Options):
            return given
        given = dict(given or {})
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            problem = f"{task_name}: mlcache option {', '.join(unknown)} is unknown; there are {', '.join(known)}"
            raise ConfigurationError([problem])
        return cls(**given)
