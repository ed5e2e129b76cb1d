"""The composition root: settings in, a wired manager out. Nothing else in the package builds a part of another.

Importing this module imports redis but no celery; building does no I/O.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Final

from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry

from celery_mlcache.backplane import Backplane
from celery_mlcache.breaker import CircuitBreaker
from celery_mlcache.codec import Codec
from celery_mlcache.coherence import Coherence
from celery_mlcache.config import CacheConfig, RedisLocation, load_config
from celery_mlcache.errors import ConfigurationError
from celery_mlcache.keys import RedisNames
from celery_mlcache.leases import Leases
from celery_mlcache.local import Local
from celery_mlcache.manager import CacheManager
from celery_mlcache.parts import Parts, Policy
from celery_mlcache.protocols import Connector
from celery_mlcache.remote import RedisRemote, Script, abandon_socket
from celery_mlcache.route import Address, ClusterGuide, Fixed, Guided, Route, SentinelGuide
from celery_mlcache.singleflight import SingleFlight
from celery_mlcache.stats import Stats
from celery_mlcache.tier import Tier

COMMANDS: Final = 2  # RESP versions: commands need no HELLO,
PUSHES: Final = 3  # and the backplane needs pushes and replies on one connection
LOST_PROOF: Final = 1.0  # seconds: the least that an answer to a heartbeat is waited for

log = logging.getLogger("celery_mlcache")


def create_cache_manager(
    config: CacheConfig | None = None, *, env_prefix: str = "LIB_", **overrides: Any
) -> CacheManager:
    """Return a cache manager outside Celery; it connects on its first use, in each process anew.

    Args:
        config: Settings made elsewhere; without it they are read from *overrides* and the environment.
        env_prefix: What the environment variables start with.
        **overrides: Fields of :class:`~celery_mlcache.config.CacheConfig`, before the environment.

    Raises:
        ConfigurationError: Names every wrong setting, its value and what is allowed, all at once.
    """
    if config is None:
        config = load_config(overrides, env_prefix=env_prefix)
    elif overrides:
        raise ConfigurationError([f"give a config or single settings, not both: {', '.join(overrides)}"])
    settled = config
    return CacheManager(lambda: assemble(settled), name=settled.cache_namespace)


def assemble(config: CacheConfig, *, with_l1: bool = True, strict: bool = False) -> Parts:
    """Build one process's parts from settings, without I/O.

    Args:
        config: The settings.
        with_l1: False where no L1, no listener and no thread may live: the prefork MainProcess.
        strict: Raise L2's errors even if the settings say not to.
    """
    stats = Stats()
    clock = time.monotonic
    has_l1 = config.cache_enabled and config.l1_enabled and with_l1
    has_l2 = config.cache_enabled and config.l2_enabled
    is_synced = has_l1 and has_l2 and config.cache_sync_enabled
    breaker = remote = backplane = leases = abandon = None
    if has_l2:
        names = RedisNames(config.cache_namespace, config.redis_location().db)
        connect = connectors(config)
        breaker = CircuitBreaker(
            threshold=config.circuit_threshold,
            reset=config.circuit_reset,
            clock=clock,
            jitter=random.random,
            on_change=_breaker_logger(config.cache_namespace),
        )
        remote = RedisRemote(
            connect(COMMANDS),
            names,
            guard=breaker,
            counts=stats,
            clock=clock,
            max_idle=config.redis_max_connections,
            tombstone_ttl=config.tombstone_ttl,
        )
        if is_synced:
            backplane = Backplane(
                connect(PUSHES),
                names,
                seed=Script("seed").source,
                heartbeat=config.heartbeat,
                overdue=max(config.staleness_bound, LOST_PROOF),
            )
        leases = Leases(
            remote,
            owner=f"{socket.gethostname()}:{os.getpid()}/{uuid.uuid4().hex[:6]}",  # a process may have several caches
            seconds=config.single_flight_lease,
            clock=clock,
            counts=stats,
        )
        abandon = _abandoner(remote, backplane)
    coherence = Coherence(
        delta=config.staleness_bound if is_synced else inf, tombstone_ttl=config.tombstone_ttl, synced=is_synced
    )
    tier = Tier(
        coherence,
        Local(config.l1_backend, config.l1_max_size) if has_l1 else None,
        stats,
        namespace=config.cache_namespace,
        l1_ttl=config.l1_ttl,
        max_stale=config.max_stale if config.on_disconnect == "serve" else 0.0,
        clock=clock,
        on_alive=breaker.proof_of_life if breaker is not None else None,
        is_copy=has_l2,
    )
    return Parts(
        policy=_policy(config, strict=strict),
        codec=_codec(config),
        tier=tier,
        flights=SingleFlight(max_wait=config.single_flight_wait, clock=clock),
        stats=stats,
        remote=remote,
        backplane=backplane,
        breaker=breaker,
        leases=leases,
        abandon=abandon,
    )


def _codec(config: CacheConfig) -> Codec:
    return Codec(
        serializer=config.serializer,
        signing_keys=tuple(key.get_secret_value().encode() for key in config.signing_keys),
        compression=config.compression,
        compression_threshold=config.compression_threshold,
        max_value_size=config.max_value_size,
        copy_values=config.l1_copy,
    )


def _policy(config: CacheConfig, *, strict: bool) -> Policy:
    return Policy(
        namespace=config.cache_namespace,
        l2_ttl=config.l2_ttl,
        ttl_jitter=config.ttl_jitter,
        is_signed=bool(config.signing_keys),
        strict=strict or config.strict,
    )


def connector(config: CacheConfig, protocol: int) -> Connector:
    """Return a maker of connections of one RESP version, on a route of its own."""
    return connectors(config)(protocol)


def connectors(config: CacheConfig) -> Callable[[int], Connector]:
    """Return a maker of connectors by RESP version, which share what they learn of where the server is.

    Every default of redis-py's that matters is said here: its own would wait 59 s for a frozen server (8.1: 5 s
    socket timeout, 10 retries).
    """
    location = config.redis_location()
    options: dict[str, Any] = {
        "db": str(location.db) if location.db else 0,  # text: see remote._pack
        "username": location.username,
        "password": location.password,
        "client_name": f"{config.redis_client_name}:{socket.gethostname().partition('.')[0]}:{os.getpid()}",
        "decode_responses": False,
        "health_check_interval": 0,
        **_patience(config),
    }
    if location.socket_path is not None:
        path = location.socket_path
        del options["socket_connect_timeout"]  # only some releases of redis-py take it here; the other bounds it too
        return lambda protocol: Fixed(
            lambda: UnixDomainSocketConnection(path=path, protocol=protocol, **options)  # type: ignore[abstract]  # it is not
        )
    options["socket_keepalive"] = True
    kind: type[Connection] = Connection
    if location.tls is not None:
        kind = SSLConnection
        options |= {
            "ssl_ca_certs": location.tls.ca_certs,
            "ssl_certfile": location.tls.certfile,
            "ssl_keyfile": location.tls.keyfile,
            "ssl_cert_reqs": location.tls.cert_reqs,
            "ssl_check_hostname": location.tls.check_hostname and location.tls.cert_reqs != "none",
        }

    def dial(protocol: int, address: Address) -> AbstractConnection:
        return kind(host=address[0], port=address[1], protocol=protocol, **options)

    if not location.sentinels and not location.nodes:
        return lambda protocol: Fixed(partial(dial, protocol, (location.host, location.port)))
    route = _sentinel_route(config, location) if location.sentinels else _cluster_route(config, location, dial)
    return lambda protocol: Guided(partial(dial, protocol), route, may_part=bool(location.nodes))


def _sentinel_route(config: CacheConfig, location: RedisLocation) -> Route:
    """Ask the sentinels for the master for each new connection, and at least twice in a staleness bound."""

    def dial(address: Address) -> AbstractConnection:
        return Connection(
            host=address[0],
            port=address[1],
            username=location.sentinel_username,
            password=location.sentinel_password,
            protocol=COMMANDS,
            **_patience(config),
        )

    return Route(
        dial,
        SentinelGuide(str(location.sentinel_master)),
        random.sample(location.sentinels, len(location.sentinels)),  # a fleet should not ask one of them alone
        budget=config.redis_connect_timeout,
        clock=time.monotonic,
        recheck=config.staleness_bound / 2,
    )


def _cluster_route(
    config: CacheConfig, location: RedisLocation, dial: Callable[[int, Address], AbstractConnection]
) -> Route:
    """Ask the cluster's nodes for the master of the namespace's slot for each new connection."""
    return Route(
        partial(dial, COMMANDS),
        ClusterGuide(RedisNames(config.cache_namespace).counter),
        random.sample(location.nodes, len(location.nodes)),
        budget=config.redis_connect_timeout,
        clock=time.monotonic,
    )


def _patience(config: CacheConfig) -> dict[str, Any]:
    return {
        "socket_timeout": config.redis_socket_timeout,
        "socket_connect_timeout": config.redis_connect_timeout,
        "retry": Retry(NoBackoff(), 0),
    }


def _abandoner(remote: RedisRemote, backplane: Backplane | None) -> Callable[[], None]:
    def abandon() -> None:
        remote.abandon()
        connection = backplane.inherited_connection() if backplane is not None else None
        if connection is not None:
            abandon_socket(connection)

    return abandon


def _breaker_logger(namespace: str) -> Callable[[str, str], None]:
    def on_change(old: str, new: str) -> None:
        if new == "open" and old == "closed":
            log.warning("the cache's circuit is open: Redis fails (%s)", namespace, extra={"namespace": namespace})
        elif new == "closed":
            log.info("the cache's circuit is closed (%s)", namespace, extra={"namespace": namespace})

    return on_change
