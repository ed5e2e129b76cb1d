"""The settings table in README.md is generated from the model."""

import subprocess
import sys
from pathlib import Path

from celery_mlcache.config import CacheConfig, settings_table

README = Path(__file__).parents[2] / "README.md"
GIVEN = [
    ("LIB_CACHE_ENABLED", "True"),
    ("LIB_L1_ENABLED", "True"),
    ("LIB_L1_MAX_SIZE", "10000"),
    ("LIB_L1_TTL", "300"),
    ("LIB_L2_ENABLED", "True"),
    ("LIB_L2_TTL", "3600"),
    ("LIB_REDIS_HOST", "localhost"),
    ("LIB_REDIS_PORT", "6379"),
    ("LIB_CACHE_SYNC_ENABLED", "True"),
]


def _rows():
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in settings_table().splitlines()]


def test_readme_holds_the_table():
    """README.md shows exactly the table that the model makes, between its two marks."""
    begin, end = "<!-- settings:begin -->", "<!-- settings:end -->"
    text = README.read_text(encoding="utf-8")

    assert text.count(begin) == text.count(end) == 1, f"README.md needs {begin} and {end} once each"
    shown = text.partition(begin)[2].partition(end)[0].strip()

    assert settings_table() == shown, "run: python -m celery_mlcache.config"


def test_the_nine_given_settings_come_first_with_their_defaults():
    """The table opens with the nine given variables, in order, at their given defaults."""
    assert [(f"`{name}`", f"`{default}`") for name, default in GIVEN] == [tuple(row[:2]) for row in _rows()[2:11]]


def test_every_setting_has_a_row_and_a_meaning():
    """Each field has one row of three filled cells."""
    rows = _rows()[2:]

    assert [f"`LIB_{name.upper()}`" for name in CacheConfig.model_fields] == [row[0] for row in rows]
    assert all(len(row) == 3 and all(row) for row in rows)


def test_durations_and_sizes_say_their_unit():
    """A number of seconds or bytes says so in its meaning."""
    names = ("_TTL", "_TIMEOUT", "_WAIT", "_RESET", "_BOUND", "_INTERVAL", "_STALE")
    for variable, _default, meaning in _rows()[2:]:
        if variable.strip("`").endswith(names):
            assert "seconds" in meaning.lower(), variable
        if variable.strip("`").endswith(("_VALUE_SIZE", "_THRESHOLD")) and "CIRCUIT" not in variable:
            assert "bytes" in meaning.lower(), variable


def test_the_module_prints_the_table():
    """``python -m celery_mlcache.config`` prints the table and nothing else, and loads neither celery nor redis."""
    script = (
        "import runpy, sys; runpy.run_module('celery_mlcache.config', run_name='__main__'); "
        "assert not {'celery', 'kombu', 'redis'} & set(sys.modules), 'imports too much'"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False, cwd=README.parent
    )

    assert (0, "", settings_table() + "\n") == (done.returncode, done.stderr, done.stdout)
