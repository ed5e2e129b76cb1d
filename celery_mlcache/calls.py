"""How a call becomes a cache key and tags. Pure; knows of no Celery.

What is bound here are the arguments of a task as its function gets them; what they are called in Redis, keys.py says.
All that can be settled about a task is settled when it is made: a call of plain arguments pays for their forms only.
"""

from __future__ import annotations

import ast
import inspect
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from celery_mlcache.errors import CacheKeyError, ConfigurationError, is_interrupt
from celery_mlcache.keys import MAX_KEY_BYTES, KnownNames, canonical, check_key, digest, wire

MAX_VERSION: Final = 64  # characters
MAX_LABEL: Final = 100  # characters of what a key= function returns; a template's text may fill the key
_DIGITS: Final = 32


class CallShape:
    """Binds a call's arguments to names, with defaults applied; made once for each task. Thread-safe.

    Calls are bound by hand (``inspect.Signature.bind`` costs 11 us), all but those that are wrong, and those by name
    of a function with ``**kwargs``.

    Attributes:
        names: The names of the parameters, in their order, with those of ``*args`` and ``**kwargs``.
        is_closed: Whether it has neither of these.
    """

    __slots__ = (
        "_defaults", "_known", "_only", "_positional", "_signature", "_var_keyword", "_var_positional",
        "is_closed", "names",
    )  # fmt: skip

    def __init__(self, function: Callable[..., Any], *, skips_self: bool) -> None:
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1 if skips_self else 0 :]
        kinds = {p.kind: p.name for p in parameters}
        self._signature = signature.replace(parameters=parameters)
        self._positional = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
        self._only = sum(p.kind is p.POSITIONAL_ONLY for p in parameters)
        self._var_positional = kinds.get(inspect.Parameter.VAR_POSITIONAL)
        self._var_keyword = kinds.get(inspect.Parameter.VAR_KEYWORD)
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        if self._var_positional is not None:
            self._defaults[self._var_positional] = ()
        self.is_closed = self._var_positional is None and self._var_keyword is None
        self.names = tuple(p.name for p in parameters)
        self._known = {name for name in self.names if name != self._var_keyword}

    def check_templates(self, tags: Sequence[str], task_name: str) -> None:
        """Refuse tags that name what is no argument; raises ConfigurationError."""
        problems = [problem for tag in tags for problem in _template_problems(f"the tag {tag!r}", tag, self)]
        if problems:
            raise ConfigurationError([f"{task_name}: {problem}" for problem in problems])

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return argument values by name; raises TypeError as the call itself would."""
        bound = self._defaults.copy()
        bound.update(zip(self._positional, args, strict=False))
        by_hand = True
        if len(args) > len(self._positional):
            if self._var_positional is None:
                by_hand = False
            else:
                bound[self._var_positional] = args[len(self._positional) :]
        if kwargs:
            by_position = self._positional[: max(len(args), self._only)]
            by_hand = by_hand and self._takes_by_name(kwargs, by_position)
            bound.update(kwargs)
        if by_hand and bound.keys() == self._known:
            if self._var_keyword is not None:
                bound[self._var_keyword] = {}
            return bound
        found = self._signature.bind(*args, **kwargs)
        found.apply_defaults()
        return found.arguments

    def spread(self, bound: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return bound arguments as the function gets them: those by position, and those by name."""
        args = [bound[name] for name in self._positional]
        if self._var_positional is not None:
            args += bound[self._var_positional]
        apart = {*self._positional, self._var_positional, self._var_keyword}
        kwargs = {name: bound[name] for name in self.names if name not in apart}
        return args, kwargs if self._var_keyword is None else {**kwargs, **bound[self._var_keyword]}

    def _takes_by_name(self, kwargs: Mapping[str, Any], by_position: list[str]) -> bool:
        is_open = self._var_keyword is not None or self._var_positional in kwargs
        return not is_open and not any(name in kwargs for name in by_position)


class CallKeys:
    """Names the calls of one task; made once for each task. Thread-safe.

    A key is ``task:{name}:{digest}``. A version stands behind the name, as ``task:{name}@{version}:{digest}``; what
    ``key`` makes stands before the digest, for people and for prefixes: ``task:{name}:{label}:{digest}``. The digest
    alone tells calls apart: it covers, with their types, the arguments that count, and with them the task's name, the
    version and ``vary``, where there are such; so neither ``"{a}{b}"`` with (1, 23) and (12, 3) nor another task whose
    name looks like a version or a label ever shares a key.

    Args:
        name: The task's name.
        shape: Binds its arguments.
        ignore: Names of arguments that do not count.
        key: What counts. A template, ``"price:{sku}"``: the arguments that it names; its text, made of their wire
            forms, is the label. Or a function, called as the task's own is, whose result counts; a short printable
            text is the label too.
        version: Text or a number: another one makes other keys.
        vary: What counts besides the arguments, such as a tenant or a locale: functions without arguments, by name,
            called for each key.

    Raises:
        ConfigurationError: An option is wrong; lists every problem.
    """

    __slots__ = (
        "_counted", "_function", "_ignored", "_is_plain", "_is_simple", "_name", "_named", "_salt", "_shape", "_start",
        "_template", "_vary", "_version",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        shape: CallShape,
        *,
        ignore: Sequence[str] = (),
        key: str | Callable[..., object] | None = None,
        version: str | int | None = None,
        vary: Mapping[str, Callable[[], object]] | None = None,
    ) -> None:
        problems = [
            *_ignore_problems(ignore, shape),
            *_key_problems(key, ignore, shape),
            *_version_problems(version),
            *_vary_problems(vary),
        ]
        start = f"task:{name}" if version is None else f"task:{name}@{version}"
        problems += [] if problems else _name_problems(f"{start}:{'0' * _DIGITS}")
        if problems:
            raise ConfigurationError([f"{name}: {problem}" for problem in problems])
        self._name, self._shape, self._version, self._start = name, shape, version, start
        self._template = key if isinstance(key, str) else None
        self._function = None if key is None or isinstance(key, str) else key
        self._vary = dict(vary or {})
        self._named = names_in(self._template) if self._template is not None else ()
        self._is_simple = set(_fields_in(self._template or "")) == set(self._named)
        counted = [each for each in shape.names if each not in ignore] if key is None else self._named
        self._counted = KnownNames(counted)
        self._ignored = [each for each in shape.names if each not in counted] if self._function is None else []
        self._is_plain = key is None and version is None and not self._vary
        kind = "arguments" if self._function is None else "key"
        self._salt = b"" if self._is_plain else canonical([name, None if version is None else str(version), kind])

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return the key of a call; raises TypeError as the call itself would, and as :meth:`name`."""
        return self.name(self._shape.bind(args, kwargs))

    def name(self, bound: Mapping[str, Any]) -> str:
        """Return the key of a call by its bound arguments.

        Raises:
            SerializationError: What counts has no form in a key.
            CacheKeyError: A label cannot stand in a key, or a function of yours failed, which is the ``__cause__``.
        """
        if self._is_plain:
            return f"{self._start}:{digest(self._counted.form(bound))}"
        chosen, vary = self._chosen(bound), self._read_vary()
        label, digits = self._label(bound, chosen), self._digest(bound, chosen, vary)
        return f"{self._start}:{digits}" if label is None else check_key(f"{self._start}:{label}:{digits}")

    def parts(self, bound: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a call's key is made of, in wire form; raises as :meth:`name`.

        ``arguments`` holds those that count. Where a function chooses, they are empty, and ``key`` is what it returned.
        """
        chosen, vary = self._chosen(bound), self._read_vary()
        found = {
            "task": self._name,
            "version": self._version,
            "arguments": {name: wire(bound[name], f"arguments[{name!r}]") for name in self._counted.names},
            "ignored": list(self._ignored),
            "vary": wire(vary, "vary"),
            "label": self._label(bound, chosen),
            "digest": self._digest(bound, chosen, vary),
        }
        return found if self._function is None else {**found, "key": wire(chosen, "key")}

    def _chosen(self, bound: Mapping[str, Any]) -> object:
        """Return what a key= function makes of the call."""
        if self._function is None:
            return None
        args, kwargs = self._shape.spread(bound)
        return self._ask("key=", self._function, *args, **kwargs)

    def _read_vary(self) -> dict[str, object]:
        return {name: self._ask(f"vary[{name!r}]", read) for name, read in self._vary.items()}

    def _ask(self, what: str, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> Any:
        """Run what may be a user's code; what it raises becomes ours, except for what Celery raises in a task."""
        try:
            return function(*args, **kwargs)
        except Exception as exc:
            if is_interrupt(exc):
                raise
            # Only the type: the message may hold arguments, and this one is logged.
            why = f"cannot be made: {what} raised {type(exc).__name__}"
            raise CacheKeyError(self._name, why, "key of the task") from exc

    def _digest(self, bound: Mapping[str, Any], chosen: object, vary: Mapping[str, object]) -> str:
        form = self._counted.form(bound) if self._function is None else canonical(chosen, "key")
        # Each of the three pieces says how long it is; and the first is no dict's, as a plain call's only one is.
        return digest(form if self._is_plain else self._salt + form + canonical(vary, "vary"))

    def _label(self, bound: Mapping[str, Any], chosen: object) -> str | None:
        if self._template is None:
            return self._shown(chosen) if isinstance(chosen, str) else None
        # Forms come first: what has none is told with its path, and no repr of it gets into a label.
        values = {name: wire(bound[name], f"arguments[{name!r}]") for name in self._named}
        what = f"key={self._template!r:.80}"
        if self._is_simple:
            return str(self._ask(what, self._template.format_map, values))
        return str(self._ask(what, _WIRE_FORMAT.vformat, self._template, (), bound))

    def _shown(self, chosen: str) -> str | None:
        text = str.__str__(chosen)
        is_short = 0 < len(text) <= MAX_LABEL and text.isprintable()
        fits = is_short and len(f"{self._start}:{text}:".encode()) + _DIGITS <= MAX_KEY_BYTES
        return text if fits else None


def source_version(function: Callable[..., Any]) -> str:
    """Return 16 digits that change when the code of *function* does.

    Comments, layout, docstrings, the place in the file and the decorators do not count; nor do other functions that
    it calls. What a decorator wrapped is found if it used ``functools.wraps``, and only then.

    Raises:
        ConfigurationError: There is no source to read (a prompt, exec), or no way to tell which function it is.
    """
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"
    try:
        inner = inspect.unwrap(function)
        node = _definition(getattr(inner, "__func__", inner))
        text = _code_text(node)
    except (OSError, TypeError, ValueError, SyntaxError, RecursionError) as exc:
        problem = (
            f"{name}: version='source' needs the function's source, which cannot be had ({exc}); "
            "give version= a text or a number of your own, and change it with the code"
        )
        raise ConfigurationError([problem]) from None
    return digest(text.encode("utf-8", "surrogatepass"))[:16]


# ---- sources ----------------------------------------------------------------------------------------------------


def _definition(function: Callable[..., Any]) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda:
    """Return the tree of a function, without decorators."""
    if not inspect.isfunction(function):
        msg = f"{type(function).__name__} is no function"
        raise TypeError(msg)
    text = "".join(inspect.getsourcelines(function)[0])
    # A block keeps its indentation: dedent() would cut into texts of several lines.
    tree = ast.parse(f"if True:\n{text}" if text[0].isspace() else text)
    wanted = function.__code__.co_name
    found = [node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS) and _name_of(node) == wanted]
    # Breadth first: what is nested comes behind what holds it.
    if not found or (wanted == _LAMBDA and len(found) > 1):
        msg = f"there are {len(found)} functions {wanted} in its lines"
        raise ValueError(msg)
    node = found[0]
    if not isinstance(node, ast.Lambda):
        node.decorator_list = []
    return node


def _name_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> str:
    return _LAMBDA if isinstance(node, ast.Lambda) else node.name


def _code_text(node: object) -> str:
    """Return what ``ast.dump`` would, without docstrings, and without the empty fields that new Pythons add."""
    if isinstance(node, list):
        return f"[{','.join([_code_text(item) for item in node])}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    found = []
    for name, value in ast.iter_fields(node):
        if value is None or value == [] or name in {"kind", "type_comment"}:
            continue
        is_documented = (
            name == "body" and isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None
        )
        found.append(f"{name}={_code_text((value[1:] or [ast.Pass()]) if is_documented else value)}")
    return f"{type(node).__name__}({','.join(found)})"


_LAMBDA: Final = "<lambda>"
_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_DOCUMENTED: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


# ---- templates --------------------------------------------------------------------------------------------------


def _fields_in(template: str) -> Iterator[str]:
    """Yield what stands in a template's braces, and in those of its format specifications."""
    for _, field, spec, _ in string.Formatter().parse(template):
        if field is not None:
            yield field
            yield from _fields_in(spec or "")


def names_in(template: str) -> tuple[str, ...]:
    """Return the arguments that a template names, each once."""
    return tuple(dict.fromkeys([re.split(r"[.\[]", field, maxsplit=1)[0] for field in _fields_in(template)]))


def _template_problems(what: str, template: str, shape: CallShape) -> list[str]:
    try:
        names = names_in(template)
        known = ", ".join(sorted(shape.names)) or "it has none"
        unknown = [name for name in names if name not in shape.names]
        if unknown:
            return [f"{what} names {name!r}, which is no argument of the task ({known})" for name in unknown]
        template.format_map(dict.fromkeys(names, _Anything()))
    except ValueError as exc:
        return [f"{what} is no template: {exc}"]
    return []


class _Anything:
    """Stands for every argument when a template is tried; shows as nothing."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __getitem__(self, key: object) -> _Anything:
        return self

    def __format__(self, spec: str) -> str:
        return ""


class _WireFormat(string.Formatter):
    """Formats what a field leads to, an attribute or an item, as it is on the wire."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, int | str]:
        found, name = super().get_field(field_name, args, kwargs)
        return wire(found, field_name), name


_WIRE_FORMAT: Final = _WireFormat()


# ---- options that are wrong -------------------------------------------------------------------------------------


def _ignore_problems(ignore: object, shape: CallShape) -> list[str]:
    if not isinstance(ignore, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in ignore):
        return [f"ignore={ignore!r:.80} must be names of arguments, as a list or tuple of str"]
    known = ", ".join(sorted(shape.names)) or "it has none"
    unknown = sorted(set(ignore) - set(shape.names))
    return [f"ignore={ignore!r:.80} names {name!r}, which is no argument of the task ({known})" for name in unknown]


def _key_problems(key: object, ignore: object, shape: CallShape) -> list[str]:
    if key is None:
        return []
    what = f"key={key!r:.80}"
    if not isinstance(key, str):
        if not callable(key):
            return [f"{what} must be a template such as 'price:{{sku}}', or a function of the task's arguments"]
        clash = (
            [f"{what} is a function, and decides alone what counts; ignore= does nothing beside it"] if ignore else []
        )
        return [*clash, *_function_problems(what, key, shape)]
    if problems := _template_problems(what, key, shape):
        return problems
    names = names_in(key)
    if not names and shape.names:
        return [f"{what} names no argument, so that all calls would share one result; name those that count"]
    ignored = ignore if isinstance(ignore, (list, tuple, set, frozenset)) else ()
    problems = [f"{what} names {name!r}, which ignore= leaves out" for name in names if name in ignored]
    literal = "".join([text for text, _, _, _ in string.Formatter().parse(key)])
    try:
        check_key(f"task:{literal}")
    except CacheKeyError as exc:
        problems.append(f"{what} cannot stand in a key: its text {exc.why}")
    return problems


def _function_problems(what: str, function: Callable[..., object], shape: CallShape) -> list[str]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []  # some builtins have none
    args, kwargs = shape.spread({name: {} for name in shape.names})
    try:
        # A task with *args or **kwargs may be called with more than is known here.
        (signature.bind if shape.is_closed else signature.bind_partial)(*args, **kwargs)
    except TypeError as exc:
        return [f"{what} must take what the task takes: {exc}"]
    return []


def _version_problems(version: object) -> list[str]:
    is_number = isinstance(version, int) and not isinstance(version, bool) and abs(version) < 10 ** (MAX_VERSION - 1)
    is_text = isinstance(version, str) and 0 < len(version) <= MAX_VERSION and version.isprintable()
    if version is None or is_number or is_text:
        return []
    return [f"version={version!r:.80} must be a whole number, or 1 to {MAX_VERSION} printable characters"]


def _vary_problems(vary: object) -> list[str]:
    if vary is None:
        return []
    if not isinstance(vary, Mapping):
        return [f"vary={vary!r:.80} must be a mapping of names to functions without arguments"]
    return [
        f"vary[{name!r:.40}]={read!r:.80} must be a function without arguments, under a name that is text"
        for name, read in vary.items()
        if not (isinstance(name, str) and name and callable(read))
    ]


def _name_problems(key: str) -> list[str]:
    try:
        check_key(key)
    except CacheKeyError as exc:
        return [f"the task's name cannot stand in a key, which {exc.why}"]
    return []
