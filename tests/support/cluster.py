"""A real cluster of masters from one binary, whose slots move by the commands that resharding tools use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from tests.support.ports import free_port
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until


class Cluster:
    """Masters on 127.0.0.1, each with an equal share of the slots; no replicas. Takes about two seconds to be ready.

    Args:
        binary: The server's file.
        size: How many masters.
    """

    def __init__(self, binary: str | None = None, *, size: int = 3) -> None:
        self.nodes: list[RedisServer] = []
        try:
            for _ in range(size):
                bus = ("--cluster-port", str(free_port()))
                settings = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000")
                self.nodes.append(RedisServer(*settings, *bus, binary=binary))
            self._clients = {node: node.client(decode_responses=True) for node in self.nodes}
            self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        share = REDIS_CLUSTER_HASH_SLOTS // len(self.nodes)
        first = self.nodes[0]
        for number, node in enumerate(self.nodes):
            is_last = node is self.nodes[-1]
            end = REDIS_CLUSTER_HASH_SLOTS - 1 if is_last else (number + 1) * share - 1
            self._do(node, "SET-CONFIG-EPOCH", number + 1)
            self._do(node, "ADDSLOTSRANGE", number * share, end)
            if node is not first:
                bus = self._clients[node].config_get("cluster-port")["cluster-port"]
                self._do(first, "MEET", node.host, node.port, bus)
        self.wait_until_ok()

    def wait_until_ok(self, timeout: float = 15.0) -> None:
        """Wait until every node serves and knows all others."""
        wait_until(lambda: all(self._is_ok(node) for node in self.nodes), timeout, "the cluster's agreement")

    def _is_ok(self, node: RedisServer) -> bool:
        info = self._clients[node].cluster("INFO")
        size = str(len(self.nodes))
        return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == info["cluster_size"] == size

    def _do(self, node: RedisServer, *command: object) -> object:
        # As one word and its arguments: redis-py has its own ideas of some replies of CLUSTER.
        return self._clients[node].execute_command("CLUSTER", *command)

    def url(self, *nodes: RedisServer) -> str:
        """``redis://`` URL that names *nodes* (all, unless said) as where to ask."""
        hosts = ",".join(f"{node.host}:{node.port}" for node in nodes or self.nodes)
        return f"redis://{hosts}/0"

    def owner(self, slot: int) -> RedisServer:
        """Return the node that itself says that it serves *slot*."""
        for node in self.nodes:
            if not node.is_running:
                continue
            myself = str(self._do(node, "MYID"))
            for first, last, master, *_ in self._do(node, "SLOTS"):
                if first <= slot <= last and master[2] == myself:
                    return node
        raise AssertionError(f"nobody serves slot {slot}")

    def other_than(self, node: RedisServer) -> RedisServer:
        """Return another node."""
        return next(each for each in self.nodes if each is not node)

    def names_on_each_node(self, stem: str) -> list[str]:
        """Return for each node a name that begins with *stem*, and whose hash tag belongs to that node."""
        found: dict[RedisServer, str] = {}
        share = REDIS_CLUSTER_HASH_SLOTS // len(self.nodes)
        for number in range(1000):
            name = f"{stem}-{number}"
            owner = self.nodes[min(key_slot(name.encode()) // share, len(self.nodes) - 1)]
            found.setdefault(owner, name)
            if len(found) == len(self.nodes):
                return [found[node] for node in self.nodes]
        raise AssertionError("no such names")

    @contextlib.contextmanager
    def migration(self, slot: int, to: RedisServer) -> Iterator[Migration]:
        """Move *slot* key by key: the body moves what it likes, the rest follows, and then the slot itself."""
        source = self.owner(slot)
        migration = Migration(self._clients[source], to, slot)
        self._do(to, "SETSLOT", slot, "IMPORTING", self._do(source, "MYID"))
        self._do(source, "SETSLOT", slot, "MIGRATING", self._do(to, "MYID"))
        yield migration
        migration.move_all()
        self._assign(slot, to)

    def migrate_slot(self, slot: int, to: RedisServer) -> None:
        """Move *slot* with all its keys."""
        with self.migration(slot, to):
            pass

    @property
    def can_migrate_at_once(self) -> bool:
        """Whether the server can move a slot with all its keys in one step."""
        return any(line.startswith("MIGRATESLOTS") for line in self._do(self.nodes[0], "HELP"))

    def migrate_at_once(self, slot: int, to: RedisServer) -> None:
        """Begin to move *slot*: copied in the background, then handed over as a whole."""
        self._do(self.owner(slot), "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self._do(to, "MYID"))

    def lose_slot(self, slot: int, to: RedisServer) -> None:
        """Give *slot* to *to* by force, without its keys."""
        source = self._clients[self.owner(slot)]
        with source.pipeline(transaction=True) as pipe:  # or somebody stores a key in between
            for key in source.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10_000):
                pipe.delete(key)
            pipe.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self._do(to, "MYID"))
            pipe.execute()
        self._assign(slot, to)

    def _assign(self, slot: int, to: RedisServer) -> None:
        """Tell every node that *slot* is *to*'s, the new owner first."""
        new = self._do(to, "MYID")
        for node in sorted(self.nodes, key=lambda node: node is not to):
            self._do(node, "SETSLOT", slot, "NODE", new)

    def close(self) -> None:
        """Kill every node."""
        for node in self.nodes:
            node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Migration:
    """A slot on its way: keys are on either server, and the slot is still the source's."""

    def __init__(self, source: redis.Redis, to: RedisServer, slot: int) -> None:
        self._source = source
        self._to = to
        self._slot = slot

    def left(self) -> list[str]:
        """Return the keys that have not moved yet."""
        return list(self._source.execute_command("CLUSTER", "GETKEYSINSLOT", self._slot, 10_000))

    def move(self, keys: Iterable[str]) -> None:
        """Move these keys, in one step."""
        self._source.execute_command("MIGRATE", self._to.host, self._to.port, "", 0, 5000, "REPLACE", "KEYS", *keys)

    def move_all(self, batch: int = 10) -> None:
        """Move what is left, in steps of *batch* as redis-cli does."""
        while left := self.left():
            self.move(left[:batch])
