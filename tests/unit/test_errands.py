"""Jobs that nobody waits for."""

from __future__ import annotations

import os
import threading

import pytest

from celery_mlcache.fleet import errands
from celery_mlcache.fleet.errands import Errands
from tests.support.scripts import run_python

TIMEOUT = 15.0


def test_jobs_are_done_in_order_behind_the_callers_back():
    """One thread does them, one after the other; who asks does not wait."""
    mine, done, gate = Errands(), [], threading.Event()
    assert mine.join(0)
    assert mine.ask(lambda: gate.wait(TIMEOUT))
    for number in range(5):
        assert mine.ask(lambda number=number: done.append((number, threading.current_thread().name)))
    assert done == []
    assert not mine.join(0.01)
    gate.set()
    assert mine.join(TIMEOUT)
    assert done == [(number, "mlcache-errands") for number in range(5)]


def test_a_job_that_fails_is_logged_and_the_next_is_done(caplog):
    """An error is nobody else's."""
    mine, done = Errands(), []
    mine.ask(lambda: 1 / 0)
    mine.ask(lambda: done.append(1))
    assert mine.join(TIMEOUT)
    assert done == [1]
    assert [record.message for record in caplog.records] == ["an errand failed"]


def test_too_many_are_refused(monkeypatch):
    """What waits is bounded."""
    monkeypatch.setattr(errands, "MAX_WAITING", 3)
    mine, gate, began = Errands(), threading.Event(), threading.Event()
    mine.ask(lambda: (began.set(), gate.wait(TIMEOUT)))
    assert began.wait(TIMEOUT)
    assert [mine.ask(print) for _ in range(4)] == [True, True, True, False]
    gate.set()
    assert mine.join(TIMEOUT)
    assert mine.ask(print)


def test_no_thread_no_job(monkeypatch):
    """Where no thread can be had, the caller is told, and nothing hangs."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    mine = Errands()
    assert not mine.ask(print)
    assert mine.join(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_none_of_its_parents_jobs():
    """It starts with an empty queue and a thread of its own, though the parent's were at work."""
    mine, gate, began = Errands(), threading.Event(), threading.Event()
    mine.ask(lambda: (began.set(), gate.wait(TIMEOUT)))
    assert began.wait(TIMEOUT)
    read, write = os.pipe()
    mine.ask(lambda: os.write(write, b"parent"))
    pid = os.fork()
    if not pid:  # pragma: no cover - another process
        done = threading.Event()
        mine.ask(done.set)
        os._exit(0 if done.wait(TIMEOUT) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    gate.set()
    assert mine.join(TIMEOUT)
    assert os.read(read, 100) == b"parent"
    os.close(read), os.close(write)


def test_what_waits_at_the_end_of_a_script_is_done_if_it_is_quick():
    """A script that ends right after it has asked does not lose the job."""
    code = """
        from celery_mlcache.fleet.errands import Errands
        mine = Errands()
        mine.ask(lambda: print("done", flush=True))
    """
    assert run_python(code) == "done\n"
