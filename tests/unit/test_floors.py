"""The house of DESIGN §3, held by reading the source: who may import whom, and who may start threads or read clocks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scripts import run_python

PACKAGE = Path(__file__).resolve().parents[2] / "celery_mlcache"
ROOF = ""  # celery_mlcache/__init__.py: names for users, imported by nothing of ours

# Floor 2 has steps: what speaks of bytes, then of names, then settings and seams. Equal numbers do not know each other.
FLOORS = {
    "errors": 0, "entry": 1, "floors": 1,
    "wire": 2.0, "plans": 2.0,
    "keys": 2.1, "calls": 2.15, "location": 2.1, "typed": 2.1, "config": 2.2, "protocols": 2.2,
    "codec": 3, "local": 3, "remote": 3, "backplane": 3, "route": 3, "coherence": 3, "singleflight": 3, "breaker": 3,
    "leases": 3, "stats": 3,
    "tier": 4.0, "parts": 4.02, "transfer": 4.04, "loading": 4.06, "manager": 4.1, "factory": 5, "fleet": 6, ROOF: 7,
}  # fmt: skip
_HOMES_BY_NAMES = {
    ("redis", "hiredis"): {"remote", "backplane", "route", "factory"},
    ("moka_py", "cacheout"): {"local"},
    ("celery", "kombu", "click", "billiard"): {"fleet"},
    ("threading.Thread", "threading.Timer", "_thread", "concurrent", "multiprocessing"): {
        "backplane",
        "leases",
        "local",
        "fleet.errands",
    },
}
HOMES = {name: homes for names, homes in _HOMES_BY_NAMES.items() for name in names}
CLOCKS = {f"time.{name}{ns}" for name in ("time", "monotonic", "perf_counter") for ns in ("", "_ns")} | {"time.sleep"}


def violations(module: str, source: str) -> list[str]:
    """Return what *source* may not do as ``celery_mlcache.<module>``, one sentence each."""
    top = module.partition(".")[0]
    if top not in FLOORS:
        return [f"{module}: has no floor; give it one in {Path(__file__).name}"]
    tree = ast.parse(source)
    if top == ROOF:
        tree.body = [node for node in tree.body if not _is_type_checking(node)]
    inside = {id(node) for each in ast.walk(tree) if isinstance(each, _FUNCTION) for node in ast.walk(each)}
    known: dict[str, str] = {}  # local name -> what it stands for
    found = []
    for node, name, local in _imports(tree, module):
        known[local] = name if local != name.partition(".")[0] else local
        own, _, rest = name.partition(".")
        if own == PACKAGE.name:
            other = rest.partition(".")[0]
            other = other if other in FLOORS else ROOF
            if FLOORS[other] >= FLOORS[top] and not top == other == "fleet":
                found.append(f"{module}:{node.lineno} imports {name}, which is not on a lower floor")
        lazy_kombu = top == "codec" and own == "kombu" and id(node) in inside
        if not {top, module} & _home(name, top) and not lazy_kombu:
            found.append(f"{module}:{node.lineno} imports {name}")
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if name := _dotted(node, known):
            if isinstance(node, ast.Attribute) and not {top, module} & _home(name, top):
                found.append(f"{module}:{node.lineno} uses {name}")
            if 3 <= FLOORS[top] < 5 and id(node) in calls and (name in CLOCKS or name.startswith("random.")):
                found.append(f"{module}:{node.lineno} calls {name}: it must come as a parameter")
    return found


_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _home(name: str, top: str) -> set[str]:
    return next((homes for key, homes in HOMES.items() if f"{name}.".startswith(f"{key}.")), {top})


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _imports(tree: ast.AST, module: str) -> Iterator[tuple[ast.stmt, str, str]]:
    """Yield each import wherever it stands: the statement, the absolute name, the local name."""
    here = [PACKAGE.name, *module.split(".")] if module else [PACKAGE.name, "__init__"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            for alias in node.names:
                yield node, ".".join(filter(None, [*base, node.module, alias.name])), alias.asname or alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node, str(argument.value), ""


def _dotted(node: ast.AST, known: dict[str, str]) -> str:
    """Return the absolute dotted name an expression stands for, or an empty string."""
    if isinstance(node, ast.Name):
        return known.get(node.id, "")
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value, known)):
        return f"{base}.{node.attr}"
    return ""


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: _module_name(path) or "__init__")
def test_module_keeps_to_its_floor(path):
    """A module imports only from lower floors, and foreign packages, threads and clocks stay where they belong."""
    assert violations(_module_name(path), path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attic", ""),
        ("errors", "from celery_mlcache.entry import Entry"),
        ("local", "from celery_mlcache.stats import Stats"),
        ("local", "from celery_mlcache import MISS"),
        ("local", "from . import manager"),
        ("local", "from .manager import CacheManager"),
        ("local", "def f():\n    import celery_mlcache.factory"),
        ("local", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from celery_mlcache.manager import M"),
        ("keys", "from celery_mlcache.config import CacheConfig"),
        ("manager", "from celery_mlcache.fleet.app import setup_cache"),
        ("fleet.app", "from celery_mlcache import CacheConfig"),
        ("fleet.app", "from ..factory import x\nfrom .. import setup_cache"),
        ("", "from celery_mlcache.manager import CacheManager\nimport redis"),
        ("manager", "import redis"),
        ("fleet.app", "from redis.client import Redis"),
        ("stats", "import hiredis as h"),
        ("manager", "from moka_py import Moka"),
        ("factory", "def f():\n    import cacheout"),
        ("factory", "import celery"),
        ("manager", "def f():\n    from kombu.serialization import dumps"),
        ("codec", "import kombu"),
        ("codec", "def f():\n    import celery"),
        ("remote", "import importlib\nimportlib.import_module('celery.app')"),
        ("manager", "import threading\nthreading.Thread(target=print)"),
        ("fleet.app", "import threading as t\nt.Timer(1, print)"),
        ("stats", "from threading import Thread as T"),
        ("stats", "import _thread\n_thread.start_new_thread(print, ())"),
        ("stats", "from concurrent.futures import ThreadPoolExecutor"),
        ("manager", "import time\nnow = time.monotonic()"),
        ("manager", "import time as t\nt.sleep(1)"),
        ("breaker", "from time import monotonic as now\nx = now()"),
        ("breaker", "import random\nrandom.Random(1)"),
        ("backplane", "from random import uniform\nuniform(1, 2)"),
    ],
)
def test_offences_are_seen(module, source):
    """The check can fail: each of these breaks one rule."""
    assert violations(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from celery_mlcache.fleet.app import setup_cache",
        ),
        ("keys", "from .wire import FORMAT_VERSION\nfrom celery_mlcache.errors import CacheKeyError"),
        ("codec", "def f():\n    from kombu.serialization import dumps"),
        (
            "backplane",
            "import threading, time\ndef f(clock=time.monotonic):\n    threading.Thread(target=clock).start()",
        ),
        (
            "breaker",
            "import random, time\nclass B:\n    jitter = random.random\n    now = time.time",
        ),
        ("manager", "class M:\n    def time(self): return self.time.monotonic()"),
        ("factory", "import time, redis\nstarted = time.time()"),
        ("fleet.errands", "import threading\nthreading.Thread(target=print).start()"),
        ("fleet.cli", "import celery, click\nfrom celery_mlcache.fleet.app import x\nfrom . import control"),
    ],
)
def test_what_is_allowed_passes(module, source):
    """The check is not stricter than the contract."""
    assert violations(module, source) == []


def test_core_imports_no_celery():
    """Asking the package for every name of the cache itself imports neither celery nor kombu."""
    code = """
        import sys, celery_mlcache
        assert "redis" not in sys.modules
        fleet = {"CachedTask", "cached_task", "setup_cache", "cache_error", "cache_hit", "cache_miss", "cache_stale"}
        for name in set(celery_mlcache.__all__) - fleet:
            getattr(celery_mlcache, name)
        celery_mlcache.create_cache_manager(l2_enabled=False).close()
        print(*sorted({"celery", "kombu", "click", "billiard"} & set(sys.modules)))
    """
    assert run_python(code) == "\n"


def test_every_floor_is_inhabited():
    """The table of floors names no module that is gone."""
    names = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert set(FLOORS) - {ROOF} <= names
