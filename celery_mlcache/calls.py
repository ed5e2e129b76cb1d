"""How a call becomes a cache key and tags. Pure; knows of no Celery.

What is bound here are the arguments of a task as its function gets them; what they are called in Redis, keys.py says.
"""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery_mlcache.errors import ConfigurationError


class CallShape:
    """Binds a call's arguments to names, with defaults applied; made once for each task.

    Plain signatures are bound by hand: ``inspect.Signature.bind`` costs 11 us a call.
    """

    __slots__ = ("_defaults", "_is_plain", "_names", "_positional", "_signature")

    def __init__(self, function: Callable[..., Any], *, skips_self: bool) -> None:
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1 if skips_self else 0 :]
        self._signature = signature.replace(parameters=parameters)
        self._is_plain = all(p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY} for p in parameters)
        self._positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._names = {p.name for p in parameters}
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def check_templates(self, tags: Sequence[str], task_name: str) -> None:
        """Refuse tags that name what is no argument; raises ConfigurationError."""
        names = {*self._names, *(p.name for p in self._signature.parameters.values())}
        for tag in tags:
            try:
                fields = [name for _, name, _, _ in string.Formatter().parse(tag) if name is not None]
            except ValueError as exc:
                raise ConfigurationError([f"{task_name}: the tag {tag!r} is no template: {exc}"]) from None
            for field in fields:
                name = re.split(r"[.\[]", field, maxsplit=1)[0]
                if name not in names:
                    known = ", ".join(sorted(names)) or "it has none"
                    problem = f"{task_name}: the tag {tag!r} names {name!r}, which is no argument of the task ({known})"
                    raise ConfigurationError([problem])

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return argument values by name; raises TypeError as the call itself would."""
        if self._is_plain and len(args) <= len(self._positional):
            bound = {**self._defaults, **dict(zip(self._positional, args, strict=False)), **kwargs}
            is_clean = not any(name in kwargs for name in self._positional[: len(args)])
            if is_clean and bound.keys() == self._names:
                return bound
        found = self._signature.bind(*args, **kwargs)
        found.apply_defaults()
        return found.arguments
