"""What mypy --strict and pyright say of cached tasks, with celery-types and without; the files are in tests/typing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import get_overloads

import pytest

from celery_mlcache import cached_task
from celery_mlcache.fleet.options import OPTION_NAMES
from celery_mlcache.fleet.results import TaskCache
from celery_mlcache.fleet.typing import TaskCacheOf

FILES = Path(__file__).resolve().parents[1] / "typing"
STUBS = "celery-stubs"

pytestmark = pytest.mark.timeout(180)

Errors = dict[str, set[int]]  # by file name, the lines


def run(*command: str, cwd: Path) -> str:
    """Return what a checker prints; files with errors in them are no failure."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    return done.stdout


def mypy(directory: Path, *, has_stubs: bool) -> Errors:
    """Ask mypy --strict about every file: away from the checkout, so that it reads the installed package."""
    hidden = (
        ""
        if has_stubs
        else "[mypy-celery.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\nignore_missing_imports = True\n"
    )
    (directory / "mypy.ini").write_text(f"[mypy]\ncache_dir = {directory}/cache\n{hidden}")
    out = run("mypy", "--strict", "--config-file", "mypy.ini", *map(str, FILES.glob("*.py")), cwd=directory)
    found: Errors = {}
    for line in out.splitlines():
        if match := re.match(r"(.+?):(\d+): error: ", line):
            found.setdefault(Path(match[1]).name, set()).add(int(match[2]))
    assert found or out.startswith("Success"), out
    return found


def pyright(directory: Path, *, has_stubs: bool) -> Errors:
    """Ask pyright about every file."""
    libraries = Path(sysconfig.get_path("purelib"))
    seen = directory / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    seen.mkdir(parents=True)
    for each in libraries.iterdir():
        if has_stubs or each.name != STUBS:
            (seen / each.name).symlink_to(each)
    settings = {
        "include": [str(FILES)],
        # Without stubs, strict mode calls everything of Celery unknown, in whatever file.
        "typeCheckingMode": "strict" if has_stubs else "standard",
        "pythonVersion": sysconfig.get_python_version(),
        "venvPath": str(directory),
        "venv": "venv",
    }
    (directory / "pyrightconfig.json").write_text(json.dumps(settings))
    report = json.loads(run("basedpyright", "--outputjson", "--project", str(directory), cwd=directory))
    assert report["summary"]["filesAnalyzed"] == len(list(FILES.glob("*.py"))), report
    found: Errors = {}
    for each in report["generalDiagnostics"]:
        if each["severity"] == "error":
            found.setdefault(Path(each["file"]).name, set()).add(each["range"]["start"]["line"] + 1)
    return found


@dataclass(frozen=True)
class Report:
    """What one checker has found."""

    errors: Errors
    has_stubs: bool


@pytest.fixture(scope="module", params=["mypy", "pyright", "mypy without stubs", "pyright without stubs"])
def report(request, tmp_path_factory) -> Report:
    """Each checker, where celery-types is installed and where it is not."""
    name, _, hidden = request.param.partition(" ")
    assert (Path(sysconfig.get_path("purelib")) / STUBS).is_dir()
    check = {"mypy": mypy, "pyright": pyright}[name]
    return Report(check(tmp_path_factory.mktemp(name), has_stubs=not hidden), has_stubs=not hidden)


def marked(name: str) -> set[int]:
    """Return the lines of a file that say of themselves that they are errors."""
    lines = (FILES / name).read_text("utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if "# E: " in line}


def test_right_calls_are_not_errors(report):
    """Every form of the decorator keeps the function's parameters and its result."""
    assert report.errors.get("plain.py") is None


def test_wrong_calls_are_errors(report):
    """Each wrong call, wrong value and wrong option of bad.py is one, and no other line of it is."""
    assert report.errors["bad.py"] == marked("bad.py")
    assert len(marked("bad.py")) > 40


def test_a_cached_task_is_a_task_of_celery_types(report):
    """With them it goes where a task goes, and its AsyncResult knows the result; without, that much is not known."""
    is_as_marked = report.errors["with_stubs.py"] == marked("with_stubs.py")
    assert is_as_marked is report.has_stubs


def test_every_option_is_spelled_out():
    """What checkers are told of the decorator's options is what there is."""
    celerys = {"app", "base", "bind", "pydantic", "options"}
    for overload in get_overloads(cached_task)[1:]:
        assert set(signature(overload).parameters) - celerys == set(OPTION_NAMES)


def test_every_method_of_the_cache_is_typed():
    """What checkers are told of ``task.cache`` is there, and what is there for users they are told of."""
    names = {name for name in vars(TaskCacheOf) if not name.startswith("_")}
    assert names == {name for name in vars(TaskCache) if not name.startswith("_")}
