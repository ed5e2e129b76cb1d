"""What L1 promises, whatever engine stands behind it."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest

from celery_mlcache.entry import Entry
from celery_mlcache.errors import ConfigurationError
from celery_mlcache.local import CacheoutEngine, Local, MokaEngine, make_engine
from tests.support.waiting import wait_until

FAR = 1e9  # a deadline that no test reaches


def entry(value="v", *, stamp=1, epoch=0, deadline=FAR):
    """Return an entry that is alive."""
    return Entry(value, stamp, deadline, epoch)


@pytest.fixture(params=["moka", "cacheout", "auto", "fallback"])
def backend(request, monkeypatch):
    """Return each way to name an engine; "fallback" is "auto" where moka_py cannot be imported."""
    if request.param != "fallback":
        return request.param
    monkeypatch.setitem(sys.modules, "moka_py", None)
    return "auto"


@pytest.fixture
def engine(backend):
    """An engine with room for all that a test puts."""
    return make_engine(backend, 1000)


@pytest.fixture
def local(backend):
    """An L1 with room for all that a test puts."""
    return Local(backend, 1000)


class TestEngine:
    def test_holds_the_very_entry(self, engine):
        """What was put is what is answered; None inside is a value, no entry is None."""
        held = entry(None)
        engine.put("k", held, 60.0)

        assert engine.get("k") is held
        assert engine.get("other") is None

    def test_last_put_wins(self, engine):
        """A key holds one entry."""
        engine.put("k", entry("old"), 60.0)
        engine.put("k", entry("new"), 60.0)

        assert engine.get("k").value == "new"

    def test_remove_and_clear(self, engine):
        """What was removed or cleared is gone, and can be put again at once."""
        for forget in (lambda: engine.remove("k"), engine.clear):
            engine.put("k", entry(), 60.0)
            forget()
            assert engine.get("k") is None
            engine.put("k", entry("again"), 60.0)
            assert engine.get("k").value == "again"
        engine.remove("never put")

    def test_each_entry_has_its_own_life(self, engine):
        """After its ttl an entry is gone or past its deadline, and its neighbour is neither."""
        engine.put("short", entry(deadline=time.monotonic() + 0.05), 0.05)
        engine.put("long", entry(), 600.0)

        def is_dead():
            found = engine.get("short")
            return found is None or found.deadline <= time.monotonic()

        wait_until(is_dead)
        assert engine.get("long") is not None

    def test_new_ttl_replaces_the_old_one(self, engine):
        """A key that is put again lives as long as its new entry."""
        engine.put("k", entry("short"), 0.02)
        engine.put("k", entry("long"), 600.0)
        engine.put("clock", entry(), 600.0)
        passed = time.monotonic() + 0.05
        wait_until(lambda: time.monotonic() > passed)

        assert engine.get("k").value == "long"

    @pytest.mark.parametrize("ttl", [5e-324, 1e-9, 1e18, 1e300, float("inf"), 0.0, -1.0])
    def test_every_ttl_is_taken(self, engine, ttl):
        """No ttl makes an engine raise, however short or long it is."""
        engine.put("k", entry(), ttl)

    def test_count(self, engine):
        """The count follows the entries, some time behind."""
        for i in range(100):
            engine.put(f"k{i}", entry(), 60.0)

        def is_counted():
            engine.put("last", entry(), 60.0)
            return engine.count() == 101

        wait_until(is_counted)

    def test_size_is_bounded(self, backend):
        """However much is put, about max_size entries can be answered."""
        engine = make_engine(backend, 100)
        keys = [f"k{i}" for i in range(3000)]
        for key in keys:
            engine.put(key, entry(), 60.0)

        def answered():
            return sum(engine.get(key) is not None for key in keys)

        if isinstance(engine, CacheoutEngine):
            assert answered() == engine.count() == 100
        wait_until(lambda: answered() <= 100)

    def test_room_for_one(self, backend):
        """The smallest engine holds an entry; it is neither empty nor unlimited."""
        engine = make_engine(backend, 1)
        engine.put("k", entry(), 60.0)
        assert engine.get("k") is not None

    @pytest.mark.parametrize("size", [0, -1])
    def test_no_room_is_refused(self, backend, size):
        """An engine without room is a mistake: cacheout would take 0 for unlimited."""
        with pytest.raises(ConfigurationError):
            make_engine(backend, size)


class TestChoice:
    def test_auto_is_moka(self, caplog):
        """With moka_py there, "auto" takes it and says nothing."""
        assert isinstance(make_engine("auto", 10), MokaEngine)
        assert not caplog.records

    def test_auto_falls_back(self, monkeypatch, caplog):
        """Without moka_py, "auto" takes cacheout and says so once."""
        monkeypatch.setitem(sys.modules, "moka_py", None)
        with caplog.at_level(logging.WARNING):
            local = Local("auto", 100)

        assert local.engine == "CacheoutEngine"
        assert [(r.levelname, r.name) for r in caplog.records] == [("WARNING", "celery_mlcache.local")]

    @pytest.mark.parametrize(
        ("backend", "missing"), [("moka", ["moka_py"]), ("cacheout", ["cacheout"]), ("auto", ["moka_py", "cacheout"])]
    )
    def test_missing_engine_is_a_configuration_error(self, monkeypatch, backend, missing):
        """An engine that was asked for by name is not replaced by another."""
        for name in missing:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigurationError, match=backend):
            make_engine(backend, 10)

    def test_nothing_is_imported_before_it_is_chosen(self):
        """Importing the module imports neither engine, and choosing one not the other."""
        code = """
            import sys
            from celery_mlcache.local import Local
            assert not {"moka_py", "cacheout"} & set(sys.modules)
            Local("cacheout", 10)
            assert "moka_py" not in sys.modules
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=30, check=True)

    @pytest.mark.parametrize("is_used_first", [True, False], ids=["in a thread that ends", "in the main thread"])
    def test_the_thread_that_uses_it_first_may_end(self, is_used_first):
        """Wherever the cache is first used, threads may come and go: moka_py 0.5.0 by itself crashes the process."""
        code = f"""
            import threading
            from celery_mlcache.entry import Entry
            from celery_mlcache.local import Local

            def use():
                local = Local("moka", 1000)
                local.put("k", Entry(1, 1, 1e9, 0), 60)
                assert local.promote("k").value == 1

            def crowd(count):
                threads = [threading.Thread(target=use) for _ in range(count)]
                [thread.start() for thread in threads]
                [thread.join() for thread in threads]

            crowd(1) if {is_used_first} else use()
            for _ in range(200):
                crowd(4)
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=50, check=True)


class TestLocal:
    def test_put_is_in_front(self, local):
        """What was put is answered by the front, by peek and by promote."""
        held = entry(None)

        assert local.put("k", held, 60.0)
        assert local.front_get("k") is local.peek("k") is local.promote("k") is held
        assert local.front_get("other") is local.peek("other") is local.promote("other") is None

    def test_front_is_the_same_for_life(self, local):
        """A bound front_get sees everything that comes after it was bound."""
        bound = local.front_get
        for epoch in range(1, 4):
            local.void(epoch)
            local.void_below(epoch)
            local.put("k", entry(stamp=9, epoch=epoch), 60.0)
            assert bound("k").epoch == epoch
        local.discard("k")
        assert bound("k") is None

    def test_full_front_is_emptied_and_promoted_again(self, backend):
        """What fell out of the front is still behind it; peek leaves it there, promote brings it back."""
        local = Local(backend, 21)
        for i in range(11):
            local.put(f"k{i}", entry(i), 60.0)

        assert local.front_get("k0") is None
        assert local.peek("k0").value == 0
        assert local.front_get("k0") is None
        assert local.promote("k0").value == 0
        assert local.front_get("k0").value == 0

    def test_replacing_does_not_empty_the_front(self, backend):
        """A key that is in a full front already needs no room."""
        local = Local(backend, 20)
        for i in range(10):
            local.put(f"k{i}", entry("old"), 60.0)
        local.put("k0", entry("new"), 60.0)

        assert [local.front_get(f"k{i}").value for i in range(10)] == ["new"] + ["old"] * 9

    @pytest.mark.parametrize("size", [1, 3, 4, 5, 100])
    def test_sum_is_bounded(self, backend, size):
        """Front and engine together answer about max_size keys, and at least the last one put."""
        local = Local(backend, size)
        keys = [f"k{i}" for i in range(1000)]
        for key in keys:
            local.put(key, entry(), 60.0)
        if size >= 4:
            assert local.front_get(keys[-1]) is not None

        wait_until(lambda: sum(local.peek(key) is not None for key in keys) <= size)

    def test_discard(self, local):
        """A discarded key is gone from front and engine."""
        local.put("k", entry(), 60.0)
        local.discard("k")
        local.discard("never put")

        assert local.front_get("k") is local.peek("k") is None

    @pytest.mark.parametrize("is_in_front", [True, False])
    def test_discard_older_keeps_the_newer(self, local, is_in_front):
        """Only an entry older than the stamp is discarded, and not one as old."""
        local.put("k", entry(stamp=5), 60.0)
        if not is_in_front:
            local._front.clear()

        assert not local.discard_older("k", 4)
        assert not local.discard_older("k", 5)
        assert local.peek("k") is not None
        assert local.discard_older("k", 6)
        assert local.peek("k") is local.front_get("k") is None
        assert not local.discard_older("k", 7)

    def test_void_forgets_everything(self, local):
        """After a void nothing from before is answered, and new entries are."""
        for i in range(50):
            local.put(f"k{i}", entry(), 60.0)
        local.void(1)

        assert all(local.peek(f"k{i}") is local.front_get(f"k{i}") is None for i in range(50))
        assert local.put("k0", entry(epoch=1), 60.0)
        assert local.peek("k0") is not None

    def test_front_is_empty_before_the_new_epoch_shows(self, local):
        """Who reads epoch or floor without the lock, and then asks the front, meets nothing older than that."""

        class Front(dict):
            def clear(self):
                seen.append((local.epoch, local.floor))
                super().clear()

        seen = []
        local._front = Front()
        local.void(1)
        local.void_below(5)

        assert seen == [(0, 0), (1, 0)]

    def test_entry_that_a_clear_missed_is_void(self, local, monkeypatch):
        """An entry that the engine's clear did not see is known by its epoch, and never comes back to the front."""
        monkeypatch.setattr(local._engine, "clear", lambda: None)
        local.put("k", entry(), 60.0)
        local.void(1)

        assert local.peek("k") is local.promote("k") is local.front_get("k") is None

    def test_late_put_of_a_void_entry_is_refused(self, local):
        """An entry of an older epoch or below the floor is not held, and does not harm what is."""
        local.void(1)
        local.void_below(5)
        local.put("k", entry("held", stamp=5, epoch=1), 60.0)

        assert not local.put("k", entry("late", stamp=9, epoch=0), 60.0)
        assert not local.put("k", entry("late", stamp=4, epoch=1), 60.0)
        assert local.peek("k").value == local.front_get("k").value == "held"

    def test_void_tag(self, local):
        """What carries the tag and is older is dead, in the front and behind it; nothing else is."""
        for key, stamp, tags in (("old", 4, ("t", "u")), ("new", 5, ("t",)), ("other", 4, ("u",)), ("plain", 4, ())):
            local.put(key, replace(entry(stamp=stamp), tags=tags), 60.0)
        local.put("behind", replace(entry(stamp=4), tags=("t",)), 60.0)
        local._front.pop("behind")
        local.floors.raise_tags(("t",), 5)
        local.void_tag("t", 5)

        assert local.peek("old") is local.peek("behind") is local.promote("behind") is local.front_get("old") is None
        assert all(local.front_get(key) is not None for key in ("new", "other", "plain"))
        assert not local.put("late", replace(entry(stamp=4), tags=("t",)), 60.0)
        assert local.put("late", replace(entry(stamp=5), tags=("t",)), 60.0)

    def test_void_prefix(self, local):
        """What begins with the prefix and is older is dead, in the front and behind it; nothing else is."""
        for key, stamp in (("user:1", 4), ("user:2", 5), ("use", 4), ("user:3", 4)):
            local.put(key, entry(stamp=stamp), 60.0)
        local._front.pop("user:3")
        local.floors.raise_prefix("user:", 5)
        local.void_prefix("user:", 5)

        assert local.peek("user:1") is local.promote("user:3") is local.front_get("user:1") is None
        assert local.front_get("user:2") is not None
        assert local.front_get("use") is not None

    def test_tag_index_is_bounded(self, backend):
        """Keys that come and go with tags that are never used again leave no trace, and none is missed."""
        local = Local(backend, 40)
        for number in range(2000):
            local.put(f"k{number}", replace(entry(stamp=4), tags=(f"t{number}", "all")), 60.0)
            local.discard(f"k{number}")
            assert sum(map(len, local._tagged.values())) <= 8 * 20 + 2
        local.put("kept", replace(entry(stamp=4), tags=("last",)), 60.0)
        local.floors.raise_tags(("last",), 5)
        local.void_tag("last", 5)
        assert local.front_get("kept") is local.peek("kept") is None

    def test_floor(self, local):
        """What is below the floor is dead, what is at it lives, and a floor never falls."""
        local.put("old", entry(stamp=4), 60.0)
        local.put("new", entry(stamp=5), 60.0)
        local.void_below(5)
        local.void_below(3)

        assert local.floor == 5
        assert local.front_get("old") is local.peek("old") is local.promote("old") is None
        assert local.promote("new").stamp == 5

    def test_passed_deadline_is_the_callers_business(self, local):
        """An entry past its deadline may be answered: whoever asks compares."""
        held = entry(deadline=0.0)
        local.put("k", held, 60.0)

        assert local.peek("k") is held

    def test_value_with_a_finalizer_is_refused(self, local):
        """A value whose type defines __del__ is not held, nor is what it was to replace."""

        class Finalized:
            def __del__(self):
                pass

        local.put("k", entry("old"), 60.0)

        assert not local.put("k", entry(Finalized()), 60.0)
        assert local.peek("k") is local.front_get("k") is None

    def test_count(self, local):
        """The count is never behind what the front holds."""
        for i in range(100):
            local.put(f"k{i}", entry(), 60.0)

        assert local.count() == 100
        local.void(1)
        # moka frees when it is used: so keep using it.
        wait_until(lambda: local.put("k", entry(epoch=1), 60.0) and local.count() <= 1)

    def test_hammer(self, backend):
        """Eight threads under one lock, and readers without it, neither hang nor meet a dead entry."""
        # In a process of its own: what hangs in moka holds the GIL, and no watchdog inside would ever run.
        is_fallback = backend == "auto" and sys.modules.get("moka_py", ...) is None
        code = f"import sys; sys.modules.update({{'moka_py': None}} if {is_fallback} else {{}})\n"
        code += f"sys.path[:] = {sys.path!r}\nfrom {__name__} import hammer; hammer({backend!r})\n"
        done = subprocess.run([sys.executable, "-c", code], check=False, timeout=20, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def hammer(backend, seconds=0.7):
    """Use a Local as the manager does, and check what readers without the lock see."""
    sys.setswitchinterval(1e-5)
    local = Local(backend, 200)
    lock = threading.Lock()
    stop = time.monotonic() + seconds
    problems = []

    def act(dice, key):
        stamp = local.floor + dice.randrange(50)
        match dice.randrange(100):
            case 0:
                local.void(local.epoch + 1)
            case 1:
                local.void_below(local.floor + 10)
            case n if n < 40:
                local.put(key, Entry(key, stamp, FAR, local.epoch - (n == 2)), dice.choice([0.001, 60.0]))
            case n if n < 50:
                local.discard_older(key, stamp)
            case n if n < 55:
                local.discard(key)
            case n if n < 60:
                local.count()
            case _:
                local.promote(key)

    def run(seed):
        dice = random.Random(seed)
        get = local.front_get
        try:
            while time.monotonic() < stop:
                key = f"k{dice.randrange(500)}"
                with lock:
                    act(dice, key)
                for _ in range(5):
                    epoch, floor = local.epoch, local.floor
                    found = get(key)
                    assert found is None or (found.value == key and found.epoch >= epoch and found.stamp >= floor)
        except BaseException as exc:
            problems.append(exc)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
