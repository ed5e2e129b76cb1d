"""``celery mlcache`` and the remote-control command, against a running prefork fleet."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from celery_mlcache.entry import MISS
from tests.fleet.fleets import TIMEOUT, Fleet, celery, running_fleet
from tests.support.ports import free_port
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.redis]
CHILDREN = 2


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """A worker with two children."""
    with running_fleet() as fleet:
        fleet.boot("prefork", CHILDREN)
        fleet.wait_for_subscribers(fleet.worker.children())
        yield fleet


@pytest.fixture
def warm(fleet) -> tuple[int, str]:
    """A call whose result is in the L1 of every child and of the test; its argument and its key."""
    x = int(fleet.counts.incr("fresh"))
    fleet.double.delay(x).get(timeout=TIMEOUT)
    wait_until(lambda: all(a["l1_hits"] for a in fleet.everywhere("call", x, size=CHILDREN)), 10)
    assert fleet.double.cache.get(x) == 2 * x
    return x, fleet.double.cache.key(x)


def is_gone(fleet: Fleet, x: int) -> bool:
    """Wait until the result of a call is in no L1 any more."""
    fleet.forget(x, CHILDREN)
    wait_until(lambda: fleet.double.cache.get(x) is MISS)
    return True


def test_invalidate_keys(fleet, warm):
    """``celery mlcache invalidate KEY`` empties L2 and every L1, those of prefork children included."""
    x, key = warm
    done = celery(fleet.env, "mlcache", "invalidate", key, "not-there")
    assert (done.returncode, done.stdout) == (0, "1 of 2 keys were in L2; every L1 follows\n")
    assert is_gone(fleet, x)


@pytest.mark.parametrize("option", ["-t", "--tag", "-p", "--prefix"])
def test_invalidate_tags_and_prefixes(fleet, warm, option):
    """``--tag`` and ``--prefix`` reach what carries the one or begins with the other, in every process."""
    x, key = warm
    name, words = (f"x:{x}", "carries") if "t" in option[:3] else (key[:-1], "begins with")
    done = celery(fleet.env, "mlcache", "invalidate", option, name, option, "not-there")
    assert done.returncode == 0, done.stderr
    assert f"whatever {words} {name}" in done.stdout
    assert "not-there" in done.stdout
    assert is_gone(fleet, x)


def test_invalidate_everything(fleet, warm):
    """``--all -y`` asks nothing and invalidates the namespace everywhere."""
    x, _ = warm
    done = celery(fleet.env, "mlcache", "invalidate", "--all", "-y")
    assert done.returncode == 0
    assert fleet.namespace in done.stdout
    assert is_gone(fleet, x)


def test_invalidate_everything_asks_first(fleet, warm):
    """``--all`` without ``-y`` asks, and does nothing on a no."""
    x, _ = warm
    done = celery(fleet.env, "mlcache", "invalidate", "--all", given="n\n")
    assert done.returncode == 1
    assert fleet.namespace in done.stdout
    assert all(a["l1_hits"] for a in fleet.everywhere("call", x, size=CHILDREN))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param([], "give either keys, tags or prefixes to invalidate, or --all", id="nothing"),
        pytest.param(["--all", "-y", "k"], "give either keys, tags or prefixes to invalidate, or --all", id="both"),
        pytest.param(
            ["--all", "-y", "-t", "k"], "give either keys, tags or prefixes to invalidate, or --all", id="all"
        ),
        pytest.param(["k", "-t", "a\nb"], "tag 'a\\nb' must not hold control characters", id="no-tag"),
        pytest.param(["-p", ""], "prefix '' must not be empty", id="no-prefix"),
        pytest.param(["a\nb"], "control characters", id="no-key"),
        pytest.param(["--tagg", "k"], "--tagg", id="no-option"),
    ],
)
def test_wrong_usage(fleet, arguments, complaint):
    """Wrong arguments end with 2 and say what is wrong."""
    done = celery(fleet.env, "mlcache", "invalidate", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_redis_out_of_reach(fleet):
    """Where Redis does not answer, the exit status is 69 and nothing is claimed."""
    url = f"redis://127.0.0.1:{free_port()}/0"
    done = celery({**fleet.env, "LIB_REDIS_URL": url}, "mlcache", "invalidate", "k")
    assert done.returncode == 69
    assert "may or may not have happened" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_settings(fleet):
    """Wrong settings end with 2 and the name of the variable."""
    done = celery({**fleet.env, "LIB_L1_MAX_SIZE": "none"}, "mlcache", "invalidate", "k")
    assert done.returncode != 0
    assert "LIB_L1_MAX_SIZE" in done.stderr


def test_an_app_without_a_cache():
    """An app that never called setup_cache() is told to."""
    done = celery({}, "mlcache", "invalidate", "k", module="")
    assert done.returncode == 2
    assert "setup_cache(app)" in done.stderr


@pytest.mark.parametrize("others", [[], ["not-there"]], ids=["one", "two"])
def test_control_command(fleet, warm, others):
    """``celery control mlcache_invalidate`` removes each KEY from every L1, children's included, and says how many."""
    x, key = warm
    done = celery(fleet.env, "control", "mlcache_invalidate", key, *others)
    assert done.returncode == 0
    assert f"1 of {1 + len(others)} keys were in L2; every L1 follows" in done.stdout
    assert is_gone(fleet, x)


def test_control_command_for_tags(fleet, warm):
    """``celery control mlcache_invalidate_tags`` does the same for what carries one of them."""
    x, _ = warm
    done = celery(fleet.env, "control", "mlcache_invalidate_tags", "not-there", f"x:{x}")
    assert done.returncode == 0
    assert f"whatever carries not-there, x:{x} is invalid" in done.stdout
    assert is_gone(fleet, x)


def ask(fleet: Fleet, keys: list[str]) -> dict[str, str]:
    """Send the command and return the worker's answer."""
    options = {"reply": True, "timeout": 10, "limit": 1}
    ((answer,),) = [
        each.values() for each in fleet.app.control.broadcast("mlcache_invalidate", {"keys": keys}, **options)
    ]
    return answer


@pytest.mark.parametrize(("keys", "complaint"), [([""], "CacheKeyError"), ([], "give the keys")])
def test_control_command_refuses_what_is_no_key(fleet, keys, complaint):
    """A wrong key comes back as an error of the command, from a worker that lives on."""
    assert complaint in ask(fleet, keys)["error"]
    assert fleet.app.control.ping(timeout=5, limit=1)


def test_help_lists_us():
    """``celery --help`` lists mlcache, and ``celery control --list`` has the command with a line for operators."""
    assert "mlcache" in celery({}, "--help", module="").stdout
    listed = " ".join(celery({"FLEET_SETTINGS": "{}"}, "control", "--list").stdout.split())
    assert "mlcache_invalidate KEY [KEY ...]" in listed
    assert "Remove keys from the cache of every process of the fleet" in listed


def test_a_frozen_l2_does_not_hold_up_the_consumer(fleet):
    """With a frozen L2 the command answers with an error within about a second, and a ping behind it is answered."""
    fleet.l2.freeze()
    try:
        began = time.monotonic()
        fleet.app.control.broadcast("mlcache_invalidate", {"keys": ["k"]})
        assert fleet.app.control.ping(timeout=10, limit=1)
        assert time.monotonic() - began < 2
        began = time.monotonic()
        answer = ask(fleet, ["k"])
        assert time.monotonic() - began < 2
        assert "RemoteStoreError" in answer["error"]
    finally:
        fleet.l2.thaw()
