"""The RabbitMQ that may be there, and names on it that nobody else uses."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator

from kombu import Connection

_LOCAL = "amqp://guest:guest@127.0.0.1:5672//"


@functools.cache
def rabbitmq_url() -> str | None:
    """Return ``MLCACHE_TEST_AMQP_URL``, else the local broker's URL if it takes guest/guest, else None."""
    if given := os.environ.get("MLCACHE_TEST_AMQP_URL"):
        return given
    connection = Connection(_LOCAL, connect_timeout=2)
    try:
        connection.connect()
    except Exception:  # refused, another protocol, no guest: whatever it says, it is no broker for us
        return None
    else:
        return _LOCAL
    finally:
        connection.release()


class RabbitNames:
    """Names of one test on a shared RabbitMQ.

    Attributes:
        conf: Celery settings that keep the test's queues, control messages and events to itself.
        prefix: What every name begins with; use it for names of the test's own and add those to ``extra``.
        extra: More queues (and exchanges) to delete.
    """

    def __init__(self) -> None:
        self.prefix = f"mlcache-test-{uuid.uuid4().hex[:12]}"
        self.extra: list[str] = []
        self.conf = {
            "task_default_queue": self.prefix,
            "task_default_exchange": self.prefix,
            "task_default_routing_key": self.prefix,
            "control_exchange": f"{self.prefix}.control",
            "event_exchange": f"{self.prefix}.event",
            "event_queue_prefix": f"{self.prefix}.event",
        }

    def delete(self, url: str) -> None:
        """Delete every queue and exchange that carries one of the names; missing ones are fine.

        Workers' control and event queues delete themselves once their worker is gone.
        """
        control = self.conf["control_exchange"]
        exchanges = [self.prefix, self.conf["event_exchange"], f"{control}.pidbox", f"reply.{control}.pidbox"]
        with Connection(url, connect_timeout=2) as connection:
            for name in [self.prefix, *self.extra]:
                with contextlib.suppress(*connection.channel_errors), connection.channel() as channel:
                    channel.queue_delete(name)
            for name in [*exchanges, *self.extra]:
                with contextlib.suppress(*connection.channel_errors), connection.channel() as channel:
                    channel.exchange_delete(name)


@contextlib.contextmanager
def rabbit_names(url: str) -> Iterator[RabbitNames]:
    """Names for the duration of a block; what was made with them on *url* is deleted after."""
    names = RabbitNames()
    try:
        yield names
    finally:
        names.delete(url)
