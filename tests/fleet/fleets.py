"""A fleet under test: private Redis servers, a broker, one or more workers, and the producer's app."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

from celery_mlcache.keys import RedisNames
from tests.support.processes import ROOT
from tests.support.rabbit import rabbit_names
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

BOUND = 1.0  # seconds: staleness_bound's default
TIMEOUT = 20.0  # seconds for a task's result, on a slow machine
MODULE = "tests.fleet.worker_app"


def release_times(log: str) -> list[float]:
    """Return the seconds that each process of a worker needed to let its cache go."""
    return [float(found) for found in re.findall(r"cache released in ([0-9.]+) s", log)]


def celery(
    env: Mapping[str, str], *arguments: str, module: str = MODULE, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run ``celery -A module ...`` to its end."""
    command = [sys.executable, "-m", "celery", *(["-A", module] if module else []), *arguments]
    full_env = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **env}
    return subprocess.run(
        command, input=given, env=full_env, cwd=ROOT, capture_output=True, text=True, timeout=45, check=False
    )


def load_app(settings: dict[str, Any]) -> ModuleType:
    """Return a fresh copy of the app's module, with *settings*; each fleet has its own in the test process."""
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    os.environ["FLEET_SETTINGS"] = json.dumps(settings)
    try:
        spec.loader.exec_module(module)
    finally:
        del os.environ["FLEET_SETTINGS"]
    return module


class Fleet:
    """Servers and settings for workers, and the test process as a producer.

    Attributes:
        l2: The Redis of the cache, to break at will.
        control: The Redis of results, counts and meetings, and of messages unless there is *amqp_url*.
    """

    def __init__(
        self,
        *,
        amqp_settings: dict[str, Any] | None = None,
        l2_url: str | None = None,
        l2: RedisServer,
        control: RedisServer,
        **conf: Any,
    ) -> None:
        self.l2, self.control = l2, control
        self.namespace = f"fleet-{uuid.uuid4().hex[:8]}"
        self.settings: dict[str, Any] = {
            "control_url": control.url,
            "broker_url": control.url,
            "result_backend": control.url,
            "broker_connection_retry_on_startup": True,
            "worker_send_task_events": False,
            "mlcache_redis_url": l2_url or l2.url,
            "mlcache_cache_namespace": self.namespace,
            **(amqp_settings or {}),
            **conf,
        }
        self.module = load_app({**self.settings, "mlcache_redis_url": l2.url})
        self.app = self.module.app
        self.cache = self.module.cache
        self.double = self.module.double
        self.workers: list[WorkerProcess] = []
        self.counts = control.client(decode_responses=True)
        self.channel = RedisNames(self.namespace, 0).channel

    @property
    def env(self) -> dict[str, str]:
        """What a worker, or ``celery``, needs in its environment."""
        return {"FLEET_SETTINGS": json.dumps({**self.settings, "is_worker": True})}

    def boot(self, pool: str = "prefork", concurrency: int = 2, **options: Any) -> WorkerProcess:
        """Start one more worker."""
        env = {**self.env, **options.pop("env", {})}
        worker = WorkerProcess(MODULE, pool=pool, concurrency=concurrency, env=env, **options)
        self.workers.append(worker)
        return worker

    @property
    def worker(self) -> WorkerProcess:
        """The only worker."""
        (worker,) = self.workers
        return worker

    def probe(self, act: str, *args: Any) -> dict[str, Any]:
        """Do something in whatever process takes it."""
        return self.module.probe.delay(act, *args).get(timeout=TIMEOUT)

    def everywhere(self, act: str, *args: Any, size: int = 1) -> list[dict[str, Any]]:
        """Do something in each of *size* processes at the same time."""
        options = {"meeting": uuid.uuid4().hex, "size": size}
        results = [self.module.probe.delay(act, *args, **options) for _ in range(size)]
        answers = [result.get(timeout=TIMEOUT) for result in results]
        assert len({answer["pid"] for answer in answers}) == size
        return answers

    def runs(self, name: str) -> int:
        """Return how often it was executed, in all processes together."""
        return int(self.counts.get(f"runs:{name}") or 0)

    def clients(self) -> list[dict[str, Any]]:
        """Return the connections of this library to L2, with the pid of each."""
        with contextlib.closing(self.l2.client()) as client:
            found = [each for each in client.client_list() if each["name"].startswith("mlcache:")]
        return [{**each, "pid": int(each["name"].rpartition(":")[2])} for each in found]

    def subscribers(self) -> list[int]:
        """Return the pid behind each subscription, but for the test's own process."""
        return sorted(each["pid"] for each in self.clients() if int(each["sub"]) and each["pid"] != os.getpid())

    def wait_for_subscribers(self, pids: Sequence[int], timeout: float = 10.0) -> None:
        """Wait until exactly these processes are subscribed, each once."""
        wait_until(lambda: self.subscribers() == sorted(pids), timeout, f"subscriptions of {sorted(pids)}")

    def forget(self, x: Any, size: int) -> None:
        """Wait until every process knows that a call's result is gone."""
        wait_until(lambda: all(a["answer"] is None for a in self.everywhere("peek", x, size=size)), 5)

    def stop(self, worker: WorkerProcess) -> float:
        """Ask for a warm shutdown and return how many seconds it took; it must end by itself.

        Celery's event loop sees a signal at its next event only, 10 s later at worst, with or without a cache
        (5.7): commands that nobody answers are such events.
        """
        is_gone = threading.Event()

        def nudge() -> None:
            with self.app.connection_for_write() as connection:
                while not is_gone.wait(0.1):
                    with contextlib.suppress(Exception):  # its queue may be gone by now
                        self.app.control.broadcast("ping", connection=connection)

        nudger = threading.Thread(target=nudge)
        nudger.start()
        began = time.monotonic()
        try:
            assert worker.stop() == 0
            return time.monotonic() - began
        finally:
            is_gone.set()
            nudger.join()

    def close(self) -> None:
        """Stop everything that was started here."""
        for worker in self.workers:
            if worker.returncode is None and worker.is_running:
                self.stop(worker)
        self.cache.close()
        with contextlib.suppress(Exception):
            self.app.close()


F = TypeVar("F", bound=Fleet)


@contextlib.contextmanager
def running_fleet(
    *, amqp_url: str | None = None, l2_url: str | None = None, kind: type[F] = Fleet, **conf: Any
) -> Iterator[F]:
    """Give a fleet with servers of its own, and no worker yet."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(RedisServer()) for _ in range(2)]
        amqp_settings = None
        if amqp_url is not None:
            names = stack.enter_context(rabbit_names(amqp_url))
            amqp_settings = {"broker_url": amqp_url, **names.conf}
        fleet = kind(amqp_settings=amqp_settings, l2_url=l2_url, l2=servers[0], control=servers[1], **conf)
        stack.callback(fleet.close)
        yield fleet
