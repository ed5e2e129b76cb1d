"""A master, a replica and three real sentinels, quick to judge."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support import logs, processes
from tests.support.ports import HOST, free_port
from tests.support.servers import RedisServer, ServerError, find_redis_binary
from tests.support.waiting import wait_until

NAME = "m"  # of the master


class Sentinels:
    """Three sentinels that watch a master with one replica; ready when all know each other and the replica.

    Args:
        binary: The server's file; sentinels are the same one in another mode.
        down_after_ms: Silence after which a server counts as down.
        publish_ms: How often sentinels tell each other what they know. A master that they have deposed, but that goes
            on as one, is put right after four times that.
    """

    def __init__(self, binary: str | None = None, *, down_after_ms: int = 300, publish_ms: int = 200) -> None:
        found = binary or find_redis_binary()
        if found is None:
            raise ServerError("no redis-server")
        self._binary = found
        self._directory = Path(tempfile.mkdtemp(prefix="mlcache-sentinel-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._clients: list[redis.Redis] = []
        self.ports: list[int] = []
        self._servers: list[RedisServer] = []
        try:
            self.master = self._server()
            self.replica = self._server("--replicaof", f"{HOST} {self.master.port}")
            wait_until(lambda: self.replica.client().info("replication")["master_link_status"] == "up", 15)
            # Not all at the same moment: three candidates with one vote each elect nobody, and try again much later.
            for number, patience in enumerate((1, 1.5, 5)):
                self._start(number, int(patience * down_after_ms))
            # Sentinels meet by what they publish, every two seconds as a rule.
            self.tune(PUBLISH=100, INFO=100, ASK=100)
            wait_until(lambda: all(self._is_ready(client) for client in self._clients), 15, "sentinels that meet")
            self.tune(PUBLISH=publish_ms)
        except BaseException:
            self.close()
            raise

    def _server(self, *args: str) -> RedisServer:
        quick = ("--repl-diskless-sync-delay", "0", "--repl-diskless-sync", "yes")
        server = RedisServer(*quick, *args, binary=self._binary)
        self._servers.append(server)
        return server

    def _start(self, number: int, down_after_ms: int) -> None:
        port = free_port()
        config = self._directory / f"{number}.conf"
        config.write_text(
            f"port {port}\nbind {HOST}\ndir {self._directory}\nsentinel monitor {NAME} {HOST} {self.master.port} 2\n"
            f"sentinel down-after-milliseconds {NAME} {down_after_ms}\nsentinel failover-timeout {NAME} 3000\n",
            "utf-8",
        )
        log = logs.new_log(f"sentinel {number}", lambda: any(each.poll() is None for each in self._processes))
        self._processes.append(processes.spawn([self._binary, str(config), "--sentinel"], log=log, cwd=self._directory))
        options: dict[str, Any] = {"protocol": 2, "decode_responses": True, "retry": Retry(NoBackoff(), 0)}
        self._clients.append(redis.Redis(HOST, port, socket_timeout=2, socket_connect_timeout=2, **options))
        self.ports.append(port)
        wait_until(lambda: self._answers(self._clients[-1]), 10, "a sentinel")

    @staticmethod
    def _answers(client: redis.Redis) -> bool:
        try:
            return bool(client.ping())
        except (redis.RedisError, OSError):
            return False

    @property
    def url(self) -> str:
        """``sentinel://`` URL of all three."""
        return ";".join(f"sentinel://{HOST}:{port}" for port in self.ports) + f"/0?master_name={NAME}"

    def tune(self, **milliseconds: int) -> None:
        """Set the sentinels' own clocks, such as PUBLISH and INFO (not PING: it says how fresh a replica must be)."""
        settings = [part for name, value in milliseconds.items() for part in (f"{name}-PERIOD", value)]
        for client in self._clients:
            client.execute_command("SENTINEL DEBUG", *settings)

    def named(self) -> set[int]:
        """Return the ports that the sentinels name as the master's."""
        return {int(self._facts(client)["port"]) for client in self._clients}

    @staticmethod
    def _facts(client: redis.Redis) -> dict[str, str]:
        # As one word: redis-py parses other replies of SENTINEL in ways that change between its releases.
        reply = client.execute_command("SENTINEL", "MASTER", NAME)
        return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))

    def _is_ready(self, client: redis.Redis) -> bool:
        facts = self._facts(client)
        return (int(facts["num-slaves"]), int(facts["num-other-sentinels"])) == (1, 2) and facts["flags"] == "master"

    def failover(self) -> None:
        """SENTINEL FAILOVER: promote the replica while the master lives; done when all sentinels say so."""
        self._clients[0].execute_command("SENTINEL", "FAILOVER", NAME)
        self.wait_for_promotion()

    def wait_for_promotion(self) -> None:
        """Wait until all sentinels name the replica, then swap the two names here."""
        wait_until(lambda: self.named() == {self.replica.port}, 20, "a promotion")
        wait_until(lambda: self.replica.client().info("replication")["role"] == "master", 5)
        self.master, self.replica = self.replica, self.master

    def part(self) -> None:
        """Cut the replica off from the master (it gives a password that the master does not know), and no one else."""
        self.replica.client().config_set("masterauth", "wrong")
        self.master.client().execute_command("CLIENT", "KILL", "TYPE", "replica")
        wait_until(lambda: self.replica.client().info("replication")["master_link_status"] == "down", 5)

    def kill(self, number: int) -> None:
        """SIGKILL one sentinel."""
        processes.kill_group(self._processes[number])

    def close(self) -> None:
        """Kill all."""
        for client in self._clients:
            client.close()
        for process in self._processes:
            processes.kill_group(process)
        for server in self._servers:
            server.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
