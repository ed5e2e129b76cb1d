"""How the calls of one task are bound and named: options, labels, versions of sources, and what is refused."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import textwrap
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum, IntEnum
from zoneinfo import ZoneInfo

import pytest
from celery.exceptions import Retry, SoftTimeLimitExceeded

from celery_mlcache.calls import CallKeys, CallShape, source_version
from celery_mlcache.errors import CacheKeyError, ConfigurationError, SerializationError
from celery_mlcache.keys import MAX_KEY_BYTES, call_key, check_key


class Level(IntEnum):
    HIGH = 3


class Colour(Enum):
    RED = "red"


@dataclass
class User:
    id: int
    name: str = "n"


def price(sku, region="eu", *, trace_id=None):
    """Stand for a task."""


def shape_of(function=price, *, skips_self=False):
    """Return the shape of a function."""
    return CallShape(function, skips_self=skips_self)


def keys_of(function=price, **options):
    """Return the keys of a task."""
    return CallKeys("shop.price", shape_of(function), **options)


def key(keys, *args, **kwargs):
    """Return one call's key."""
    return keys.key(args, kwargs)


def digits(keys, *args, **kwargs):
    """Return one call's digest."""
    return key(keys, *args, **kwargs).rpartition(":")[2]


# ---- binding ----------------------------------------------------------------------------------------------------


def test_self_is_no_argument():
    """A bound task's request does not count."""
    shape = shape_of(lambda self, sku: ..., skips_self=True)
    assert shape.bind(("A",), {}) == {"sku": "A"}
    assert shape.names == ("sku",)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (price, (1,), {}),
        (price, (1, 2), {"trace_id": 3}),
        (price, (), {"region": "us", "sku": 1}),
        (lambda a, b, /, c=3: ..., (1, 2), {"c": 4}),
        (lambda a, *rest: ..., (1, 2, 3), {}),
        (lambda *rest: ..., (), {}),
        (lambda a, **extra: ..., (1,), {}),
        (lambda: ..., (), {}),
    ],
)
def test_a_call_by_position_is_bound_without_inspect(function, args, kwargs, monkeypatch):
    """The costly way is for calls that are wrong, and for names that only **kwargs takes."""
    shape = shape_of(function)
    expected = inspect.signature(function).bind(*args, **kwargs)
    expected.apply_defaults()
    monkeypatch.delattr(inspect.Signature, "bind")
    assert shape.bind(args, kwargs) == expected.arguments


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((), {}, "missing a required argument: 'sku'"),
        ((1, 2, 3), {}, "too many positional arguments"),
        ((1,), {"sku": 2}, "multiple values for argument 'sku'"),
        ((1,), {"colour": 2}, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_call_that_does_not_fit_raises_as_the_function_would(args, kwargs, why):
    """Keys are no reason for another error."""
    with pytest.raises(TypeError, match=why):
        keys_of().key(args, kwargs)


def test_two_calls_never_share_what_is_bound():
    """A call that changes what it got changes nothing for the next one."""
    shape = shape_of(lambda a=1, *rest, **extra: ...)
    shape.bind((), {})["extra"]["x"] = 1
    assert shape.bind((), {}) == {"a": 1, "rest": (), "extra": {}}


# ---- what counts ------------------------------------------------------------------------------------------------


def test_without_options_a_key_is_the_task_and_the_digest_of_its_arguments():
    """The form that results have been stored under ever since."""
    bound = {"sku": "A", "region": "eu", "trace_id": None}
    assert key(keys_of(), "A") == call_key("task:shop.price", bound)
    assert keys_of().name(bound) == call_key("task:shop.price", bound)


@pytest.mark.parametrize("ignore", [("trace_id",), ["trace_id"], {"trace_id"}, ("trace_id", "region")])
def test_an_ignored_argument_makes_no_difference(ignore):
    """And need not have a form."""
    keys = keys_of(ignore=ignore)
    assert key(keys, "A", trace_id=object()) == key(keys, "A", trace_id=2)
    assert key(keys, "A") != key(keys, "B")
    assert key(keys, "A") != key(keys_of(), "A")


def test_ignoring_all_leaves_one_key():
    """A task whose arguments make no difference has one result."""
    keys = keys_of(ignore=("sku", "region", "trace_id"))
    assert key(keys, "A") == key(keys, "B", "us")


@pytest.mark.parametrize("version", [2, "2026-01", "v 2", -1, 0])
def test_a_version_stands_behind_the_name_and_separates(version):
    """Results of another version are not found."""
    found = key(keys_of(version=version), "A")
    assert found.startswith(f"task:shop.price@{version}:")
    assert digits(keys_of(version=version), "A") != digits(keys_of(), "A")
    assert digits(keys_of(version=version), "A") != digits(keys_of(version="other"), "A")


def test_vary_is_read_for_each_call_and_counts_with_its_name():
    """A tenant's result is no other tenant's, and a tenant is no locale."""
    tenant = ["a"]
    keys = keys_of(vary={"tenant": lambda: tenant[0]})
    one = key(keys, "A")
    assert key(keys, "A") == one
    tenant[0] = "b"
    assert key(keys, "A") != one
    tenant[0] = "a"
    assert key(keys, "A") == one
    assert key(keys_of(vary={"locale": lambda: "a"}), "A") != one
    assert key(keys_of(), "A") != one


# ---- templates --------------------------------------------------------------------------------------------------


def test_a_template_is_the_label_and_says_what_counts():
    """People and prefixes see the text; what it does not name makes no difference."""
    keys = keys_of(key="price:{sku}")
    assert key(keys, "A").startswith("task:shop.price:price:A:")
    assert key(keys, "A") == key(keys, "A", "us", trace_id=object())
    assert key(keys_of(key="{sku}", version=3), "A").startswith("task:shop.price@3:A:")


@pytest.mark.parametrize(
    ("template", "one", "other"),
    [
        ("{sku}{region}", (1, 23), (12, 3)),
        ("{sku}", ("1",), (1,)),
        ("{sku}", (1,), (True,)),
        ("{sku:.0f}", (1.1,), (1.2,)),
    ],
)
def test_calls_with_one_label_keep_their_own_keys(template, one, other):
    """The digest tells apart what the text cannot."""
    keys = keys_of(key=template)
    assert key(keys, *one) != key(keys, *other)


def vienna(hour):
    """Return an instant with a zone that has a name."""
    return datetime(2026, 7, 2, hour, tzinfo=ZoneInfo("Europe/Vienna"))


@pytest.mark.parametrize(
    ("template", "value", "label"),
    [
        ("{sku}", Colour.RED, "red"),
        ("{sku}", Level.HIGH, "3"),
        ("{sku}", (1, "a"), "[1, 'a']"),
        ("{sku}", {2: (1,)}, "{'2': [1]}"),
        ("{sku}", {"b", "a"}, "['a', 'b']"),
        ("{sku:>4}", 7, "   7"),
        ("{sku!r}", "x", "'x'"),
        ("{sku:%H %Z}", vienna(5), "05 UTC+02:00"),
        ("{sku}", Decimal("1.50"), "1.50"),
        ("{{{sku}}}", 1, "{1}"),
        ("{sku[0]}", [Colour.RED], "red"),
        ("{sku[a][1]}", {"a": (0, (1,))}, "[1]"),
        ("{sku.id}", User(5), "5"),
        ("{sku.hour}", vienna(5), "5"),
        ("{sku:{region}}", 7, "     7"),
    ],
)
def test_a_label_is_made_of_wire_forms(template, value, label):
    """Producer and worker write the same text."""
    keys = keys_of(key=template)
    assert key(keys, value, ">6").startswith(f"task:shop.price:{label}:")
    assert keys.parts({"sku": value, "region": ">6", "trace_id": None})["label"] == label


def test_the_whole_argument_counts_where_a_template_names_a_part():
    """Two users with one id are two users."""
    keys = keys_of(key="{sku.id}")
    assert key(keys, User(5, "a")) != key(keys, User(5, "b"))


@pytest.mark.parametrize(
    ("template", "value", "cause"),
    [
        ("{sku.id}", {"id": 5}, AttributeError),
        ("{sku[id]}", {"no": 5}, KeyError),
        ("{sku:d}", "text", ValueError),
        ("{sku}", "a\nb", None),
        ("{sku}", "x" * MAX_KEY_BYTES, None),
        ("{sku.append}", [], SerializationError),
    ],
)
def test_a_label_that_cannot_be_made_bypasses_the_call(template, value, cause):
    """As a key that no level could hold."""
    with pytest.raises(CacheKeyError) as caught:
        key(keys_of(key=template), value)
    assert isinstance(caught.value.__cause__, cause or type(None))


@pytest.mark.parametrize("template", ["{sku}", "{sku.id}"])
def test_what_has_no_form_is_refused_before_it_is_shown(template):
    """No text with an address in it gets into a key."""
    with pytest.raises(SerializationError, match=r"^arguments\['sku'\]: builtins.object has no form"):
        key(keys_of(key=template), object())


def test_a_template_of_a_task_without_arguments_is_its_label():
    """There is nothing to name."""
    assert key(keys_of(lambda: ..., key="all prices")).startswith("task:shop.price:all prices:")


# ---- functions --------------------------------------------------------------------------------------------------


def test_a_function_says_what_counts():
    """Its result, with its type; a short text is the label too."""
    keys = keys_of(key=lambda sku, region, **_: sku.lower() if region else len(sku))
    assert key(keys, "ABC").startswith("task:shop.price:abc:")
    assert key(keys, "ABC") == key(keys, "abc", "us", trace_id=object())
    assert key(keys, "ABC") != key(keys, "ABD")
    assert key(keys, "ABC", "").count(":") == 2
    assert digits(keys, "3") != digits(keys, "ABC", "")


@pytest.mark.parametrize(
    ("chosen", "label"),
    [
        ("abc", "abc"),
        ("x" * 100, "x" * 100),
        ("x" * 101, None),
        ("", None),
        ("a\nb", None),
        (5, None),
        (["abc"], None),
        ({"sku": "A"}, None),
        (None, None),
        (Colour.RED, None),
    ],
)
def test_what_a_function_returns_counts_whether_or_not_it_can_be_shown(chosen, label):
    """What is no short printable text is in the digest only."""
    keys = keys_of(key=lambda *_, **__: chosen)
    assert keys.parts(shape_of().bind(("A",), {}))["label"] == label
    assert key(keys, "A").startswith("task:shop.price:" if label is None else f"task:shop.price:{label}:")
    assert check_key(key(keys, "A")) == key(keys, "A")
    assert digits(keys, "A") != digits(keys_of(key=lambda *_, **__: [chosen]), "A")


def test_a_label_that_the_key_has_no_room_for_is_left_out():
    """The digest is enough."""
    keys = CallKeys("n" * (MAX_KEY_BYTES - 60), shape_of(), key=lambda sku, *_, **__: sku)
    assert keys.key(("x" * 21,), {}).count("x") == 21
    assert keys.key(("x" * 22,), {}).count("x") == 0


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (price, ("A",), {"trace_id": 5}),
        (lambda a, /, b=2, *, c=3: ..., (1,), {"c": 4}),
        (lambda a, *rest, c=3: ..., (1, 2, 3), {}),
        (lambda a, *rest, **extra: ..., (1, 2), {"x": 5, "b": 6}),
        (lambda **extra: ..., (), {"x": 5}),
        (lambda: ..., (), {}),
    ],
)
def test_a_function_is_called_as_the_task_is(function, args, kwargs):
    """By position what goes by position, defaults included."""
    seen = []
    keys_of(function, key=lambda *args, **kwargs: seen.append((args, kwargs))).key(args, kwargs)
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    assert seen == [(bound.args, bound.kwargs)]


def fail(error):
    """Raise *error*, as a function of a user's would."""
    raise error


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"key": lambda *_, **__: fail(LookupError("secret"))}, "key= raised LookupError"),
        ({"vary": {"tenant": lambda: fail(LookupError("secret"))}}, r"vary\['tenant'\] raised LookupError"),
        ({"vary": {"tenant": lambda: fail(RecursionError("secret"))}}, r"vary\['tenant'\] raised RecursionError"),
    ],
)
def test_an_error_of_a_users_function_bypasses_the_call(options, what):
    """It is chained, and its message, which may hold arguments, is not told."""
    with pytest.raises(CacheKeyError, match=rf"key of the task 'shop.price' cannot be made: {what}$") as caught:
        key(keys_of(**options), "A")
    assert caught.value.__cause__.args == ("secret",)


@pytest.mark.parametrize("error", [SoftTimeLimitExceeded(), Retry()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("option", ["key", "vary"])
def test_what_celery_raises_in_a_task_passes(option, error):
    """A time limit that strikes in a user's function ends the task."""
    options = {"key": lambda *_, **__: fail(error)} if option == "key" else {"vary": {"t": lambda: fail(error)}}
    with pytest.raises(type(error)):
        key(keys_of(**options), "A")


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"key": lambda *_, **__: [object()]}, r"key\[0\]"),
        ({"vary": {"tenant": lambda: {"id": object()}}, "ignore": ("region",)}, r"vary\['tenant'\]\['id'\]"),
        ({"key": "{region}"}, r"arguments\['region'\]"),
        ({}, r"arguments\['region'\]"),
    ],
)
def test_what_has_no_form_is_named(options, path):
    """The message leads to the value, wherever it came from."""
    with pytest.raises(SerializationError, match=f"^{path}: builtins.object has no form"):
        key(keys_of(**options), "A", object())


# ---- what a key is made of --------------------------------------------------------------------------------------


def test_parts_explain_a_key():
    """Which arguments count, in the form that counts, and what else."""
    keys = keys_of(ignore=("trace_id",), version=2, vary={"tenant": lambda: Colour.RED})
    parts = keys.parts(shape_of().bind(((1, 2),), {"trace_id": object()}))
    assert parts == {
        "task": "shop.price",
        "version": 2,
        "arguments": {"sku": [1, 2], "region": "eu"},
        "ignored": ["trace_id"],
        "vary": {"tenant": "red"},
        "label": None,
        "digest": digits(keys, (1, 2)),
    }


def test_parts_explain_a_template_and_a_function():
    """What a template does not name is ignored; of a function its result is shown."""
    bound = shape_of().bind(("A",), {})
    template = keys_of(key="{sku}").parts(bound)
    assert (template["arguments"], template["ignored"]) == ({"sku": "A"}, ["region", "trace_id"])
    assert template["label"] == "A"
    function = keys_of(key=lambda sku, *_, **__: (sku,)).parts(bound)
    assert (function["arguments"], function["ignored"], function["key"]) == ({}, [], ["A"])


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ignore": ("traceid",)}, r"names 'traceid', which is no argument of the task \(region, sku, trace_id\)"),
        ({"ignore": "sku"}, "ignore='sku' must be names of arguments, as a list or tuple"),
        ({"ignore": [1]}, r"ignore=\[1\] must be names"),
        ({"ignore": None}, "ignore=None must be names"),
        ({"key": "{skuu}"}, r"key='{skuu}' names 'skuu', which is no argument of the task \(region"),
        ({"key": "{sku:{width}}"}, "names 'width', which is no argument"),
        ({"key": "{}"}, "names '', which is no argument"),
        ({"key": "{0}"}, "names '0', which is no argument"),
        ({"key": "{sku"}, "key='{sku' is no template: expected '}'"),
        ({"key": "{sku!z}"}, "is no template: Unknown conversion"),
        ({"key": "{sku.}"}, "is no template: Empty attribute"),
        ({"key": "price"}, "key='price' names no argument, so that all calls would share one result"),
        ({"key": ""}, "names no argument"),
        ({"key": "a\n{sku}"}, "cannot stand in a key: its text must not hold control characters"),
        ({"key": "{sku}", "ignore": ("sku",)}, "key='{sku}' names 'sku', which ignore= leaves out"),
        ({"key": 5}, "key=5 must be a template such as 'price:{sku}', or a function"),
        ({"key": lambda sku: sku}, "must take what the task takes: too many positional arguments"),
        ({"key": lambda *_, **__: 1, "ignore": ("sku",)}, "ignore= does nothing beside it"),
        ({"version": ""}, "version='' must be a whole number, or 1 to 64 printable characters"),
        ({"version": "a\n"}, "version='a.*' must be"),
        ({"version": "x" * 65}, "version='xxx.* must be"),
        ({"version": 1.5}, "version=1.5 must be"),
        ({"version": True}, "version=True must be"),
        ({"version": 10**64}, "version=1000.* must be"),
        ({"vary": ["tenant"]}, r"vary=\['tenant'\] must be a mapping"),
        ({"vary": {"tenant": "a"}}, r"vary\['tenant'\]='a' must be a function without arguments"),
        ({"vary": {"": str}}, r"vary\[''\]=.* under a name that is text"),
        ({"vary": {1: str}}, r"vary\[1\]=.* under a name that is text"),
    ],
)
def test_an_option_that_is_wrong_is_refused_at_decoration(options, problem):
    """With the task, the option, its value, and what is allowed."""
    with pytest.raises(ConfigurationError, match=f"^shop.price: .*{problem}"):
        keys_of(**options)


def test_all_problems_are_told_at_once():
    """Nobody starts a worker three times to learn of three mistakes."""
    with pytest.raises(ConfigurationError) as caught:
        keys_of(ignore=("a", "b"), key="{c}", version="", vary=5)
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize("name", ["a\nb", "x" * 1000], ids=len)
def test_a_task_whose_name_no_key_can_hold_is_refused(name):
    """Not at its first call."""
    with pytest.raises(ConfigurationError, match="the task's name cannot stand in a key"):
        CallKeys(name, shape_of())


@pytest.mark.parametrize(
    ("function", "chooser"),
    [
        (price, lambda *args, **kwargs: args),
        (price, lambda sku, region, trace_id: sku),
        (lambda sku: ..., str),
        (lambda *skus: ..., lambda first, second: first),
        (lambda **extra: ..., lambda *, sku: sku),
    ],
    ids=["anything", "the same names", "a class", "any number", "a keyword"],
)
def test_a_function_that_may_fit_is_taken(function, chooser):
    """A task with *args or **kwargs is called with more than its signature tells."""
    keys_of(function, key=chooser)


def test_tags_are_checked_as_templates_are():
    """All that are wrong, at decoration."""
    shape = shape_of()
    shape.check_templates(["sku:{sku}", "all", "{region.name!r:>{sku}}"], "shop.price")
    with pytest.raises(ConfigurationError) as caught:
        shape.check_templates(["{a}", "{sku", "{sku:{b}}", "{sku}"], "shop.price")
    assert caught.value.problems == (
        "shop.price: the tag '{a}' names 'a', which is no argument of the task (region, sku, trace_id)",
        "shop.price: the tag '{sku' is no template: expected '}' before end of string",
        "shop.price: the tag '{sku:{b}}' names 'b', which is no argument of the task (region, sku, trace_id)",
    )


# ---- versions of sources ----------------------------------------------------------------------------------------

SOURCE = """
    def task(sku, n=1):
        total = n * 2
        return f"{sku}:{total}"
"""


@pytest.fixture
def version_of(tmp_path):
    """Return a function that loads a module of that source and tells the version of ``task`` in it."""

    def load(source, pick="task"):
        path = tmp_path / f"module{len(list(tmp_path.iterdir()))}.py"
        path.write_text(textwrap.dedent(source), "utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return source_version(functools.reduce(getattr, pick.split("."), module))

    return load


WRAPPER = """
    import functools
    def around(**options):
        def decorate(function):
            @functools.wraps(function)
            def wrapped(*args, **kwargs):
                return function(*args, **kwargs)
            return wrapped
        return decorate
"""


@pytest.mark.parametrize(
    "source",
    [
        SOURCE.replace("\n        ", "\n\n        # why\n        "),
        "# comment\n" * 50 + textwrap.dedent(SOURCE),
        SOURCE.replace("n * 2", "(n*2)  # twice"),
        SOURCE.replace("total = ", '"""Return a text."""\n        total = '),
        SOURCE.replace("total = ", '"""Another\n\n        text."""\n        total = '),
        SOURCE.replace('f"{sku}:{total}"', "f'{sku}:{total}'"),
        WRAPPER + "    @around(ttl=5)" + SOURCE,
        WRAPPER + "    @around(\n        ttl=6,\n    )\n    @around()" + SOURCE,
    ],
)
def test_what_is_no_code_does_not_change_the_version(version_of, source):
    """Comments, blank lines, place, docstrings, quotes and decorators."""
    assert version_of(source) == version_of(SOURCE)


@pytest.mark.parametrize(
    "source",
    [
        SOURCE.replace("n * 2", "n * 3"),
        SOURCE.replace("n * 2", "n * 2.0"),
        SOURCE.replace("n=1", "n=2"),
        SOURCE.replace("sku, n=1", "sku, *, n=1"),
        SOURCE.replace("n=1", "n: int = 1"),
        SOURCE.replace("def", "async def"),
        SOURCE.replace("total = n * 2", 'total = n * 2\n        "text"'),
        SOURCE.replace("    total", "    def inner(): return 1\n        total"),
        SOURCE.replace("return", "yield"),
    ],
)
def test_other_code_changes_the_version(version_of, source):
    """A result of the code that was is not found by the code that is."""
    assert version_of(source) != version_of(SOURCE)


def test_a_docstring_alone_is_an_empty_body(version_of):
    """To document what does nothing changes nothing."""
    documented = 'def task():\n    """Do nothing."""\n'
    assert version_of(documented) == version_of("def task():\n    pass\n")


def test_decorators_of_inner_functions_are_code(version_of):
    """Only the task's own stand outside of it."""
    inner = "def task():\n    @one\n    def inner(): ...\n    return inner\n"
    assert version_of(inner) != version_of(inner.replace("@one", "@two"))


def test_methods_and_lambdas_have_a_source(version_of):
    """Whatever a task was made of."""
    method = "class A:\n    x = 1\n\n    def run(self, n):\n        text = '''\nleft\n'''\n        return text * n\n"
    assert version_of(method, "A.run") == version_of(method.replace("x = 1", "x = 2"), "A.run")
    assert version_of(method, "A.run") != version_of(method.replace("left", " left"), "A.run")
    assert version_of("task = lambda n: n") == version_of("# moved\ntask = (lambda n:  n)")
    assert version_of("task = lambda n: n") != version_of("task = lambda n: n + 1")


def test_a_version_is_one_for_keys():
    """It goes where one of the user's own would."""
    version = source_version(price)
    assert key(keys_of(version=version), "A").startswith(f"task:shop.price@{version}:")
    assert len(version) == 16


def made_by_exec():
    """Return a function without a source."""
    names = {"__name__": "prompt"}
    exec("def task(): ...", names)
    return names["task"]


def wraps_itself():
    """Do nothing."""


wraps_itself.__wrapped__ = wraps_itself


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (made_by_exec(), "prompt.task"),
        (len, "builtins.len"),
        (functools.partial(price, 1), "partial"),
        (wraps_itself, "wraps_itself"),
        ([lambda: 1, lambda: 2][0], "<lambda>"),
    ],
    ids=["exec", "builtin", "partial", "cycle", "two lambdas"],
)
def test_where_there_is_no_source_the_remedy_is_told(function, name):
    """The name of the function, the reason, and what to write in its place."""
    with pytest.raises(ConfigurationError, match=rf"{name}.*: version='source' needs .*; give version= a text"):
        source_version(function)
