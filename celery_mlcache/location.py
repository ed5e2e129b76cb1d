"""Where a Redis is: one record, and the URLs that redis-py, Celery and Valkey users write.

Pure functions; no setting is known here. WARNING for maintainers: no message shows any part of a URL, and no error of
urllib, whose messages do, may become the ``__context__`` of what is raised here: raise outside of ``except`` blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from celery_mlcache.errors import ConfigurationError

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379
MAX_PORT: Final = 65535
MASK: Final = "**"


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """How to speak TLS; file names are paths of PEM files, None takes the system's authorities or no certificate."""

    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    cert_reqs: str = "required"
    check_hostname: bool = True


@dataclass(frozen=True, slots=True, repr=False)
class RedisLocation:
    """One Redis, fully resolved: exactly one of nodes, sentinels, ``socket_path`` and ``host`` with ``port`` applies.

    ``nodes`` are some of a cluster's, enough to ask for the rest.

    Immutable, hence safe to share; ``repr`` hides secrets, the attributes do not.
    """

    host: str = "localhost"
    port: int = REDIS_PORT
    db: int = 0
    username: str | None = None
    password: str | None = None
    socket_path: str | None = None
    tls: TlsOptions | None = None
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_master: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    nodes: tuple[tuple[str, int], ...] = ()

    def __repr__(self) -> str:
        return f"<RedisLocation {safe_url(self)}>"


def safe_url(location: RedisLocation) -> str:
    """Return *location* as a URL without secrets, for logs and reports."""
    user = ""
    if location.password:
        user = f"{quote(location.username or '', safe='')}:{MASK}@"
    elif location.username:
        user = f"{MASK}@"  # "redis://secret@host" is a common slip: a user alone may be the password
    if location.sentinels:
        hosts = ";".join(f"sentinel://{netloc(host, port)}" for host, port in location.sentinels)
        master = quote(location.sentinel_master or "", safe="")
        return f"{hosts.replace('://', '://' + user, 1)}/{location.db}?master_name={master}"
    if location.socket_path:
        return f"unix://{user}{quote(location.socket_path)}?db={location.db}"
    scheme = "rediss" if location.tls else "redis"
    hosts = ",".join(netloc(host, port) for host, port in location.nodes or [(location.host, location.port)])
    return f"{scheme}://{user}{hosts}/{location.db}"


def netloc(host: str, port: int) -> str:
    """Join host and port as URLs do."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_redis_url(url: str) -> RedisLocation:
    """Return the location that *url* names.

    Understands ``redis``, ``rediss``, ``valkey``, ``valkeys``, ``unix``, and Celery's ``redis+socket``, ``socket`` and
    ``sentinel`` (several, joined by ``;``). Several hosts, as in ``redis://a:1,b:2``, are nodes of a cluster. What the
    URL does not say takes the default.

    Raises:
        ConfigurationError: The URL is not understood; the message shows nothing of it.
    """
    try:
        parts, problem = split_redis_url(url), ""
    except BadUrlError as error:
        parts, problem = UrlParts(), str(error)
    if problem:
        raise ConfigurationError([f"the Redis URL {problem}"])
    return locate(parts, lambda _name, said, default: default if said is None else said)


_TCP_SCHEMES: Final = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}  # to: is it TLS
_SOCKET_SCHEMES: Final = frozenset({"unix", "socket", "redis+socket"})
SCHEMES: Final = frozenset({*_TCP_SCHEMES, *_SOCKET_SCHEMES, "sentinel"})
TLS_OPTIONS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
URL_OPTIONS: Final = ("db", "virtual_host", "master_name", *TLS_OPTIONS)
_CERT_REQS: Final = ("none", "optional", "required")


class BadUrlError(ValueError):
    """Why a URL is not understood, in words that show nothing of it."""


@dataclass(frozen=True, slots=True)
class UrlParts:
    """What a URL says; None where it says nothing."""

    host: str = "localhost"
    port: int | None = None
    db: int | None = None
    username: str | None = None
    password: str | None = None
    socket_path: str | None = None
    is_tls: bool = False
    tls: Mapping[str, str | bool] = field(default_factory=dict)
    sentinels: tuple[tuple[str, int], ...] = ()
    master: str | None = None
    nodes: tuple[tuple[str, int], ...] = ()  # where there are several hosts: all of them


def split_redis_url(url: str) -> UrlParts:
    """Return what *url* says; raises BadUrlError."""
    if not url.isprintable() or " " in url:
        raise BadUrlError("must not hold spaces or control characters")
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    if scheme not in SCHEMES:
        raise BadUrlError(f"must begin with one of {', '.join(f'{known}://' for known in sorted(SCHEMES))}")
    if scheme == "sentinel":
        return _parse_sentinel_url(url)
    url, others = _split_hosts(url) if scheme in _TCP_SCHEMES else (url, [])
    parts = _split_url(url)
    options = _url_options(parts)
    if "master_name" in options:
        raise BadUrlError("may say master_name only after sentinel://")
    said = UrlParts(username=_decoded(parts.username), password=_decoded(parts.password))
    if scheme in _SOCKET_SCHEMES:
        if parts.hostname or not parts.path.strip("/"):
            raise BadUrlError("must name the socket's absolute path, after three slashes")
        return replace(said, db=_url_db("", options), socket_path=unquote(parts.path))
    is_tls = _TCP_SCHEMES[scheme]
    tls = _url_tls(options)
    if tls and not is_tls:
        raise BadUrlError("may have ssl_ options only after rediss:// or valkeys://")
    db = _url_db(parts.path, options)
    host = _decoded(parts.hostname) or "localhost"
    nodes = tuple((node.hostname or "", node.port or REDIS_PORT) for node in [parts, *map(_split_url, others)])
    if others and not all(host for host, _ in nodes):
        raise BadUrlError("needs a host before and after each comma")
    return replace(said, host=host, port=parts.port, db=db, is_tls=is_tls, tls=tls, nodes=nodes if others else ())


def _split_hosts(url: str) -> tuple[str, list[str]]:
    """Return *url* with the first of its hosts alone, and a URL for each of the others."""
    scheme, _, rest = url.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, hosts = authority.rpartition("@")
    if "@" in user and "," in user:
        raise BadUrlError("must say user and password once, before the first host, and percent-encode them")
    first, *others = hosts.split(",")
    return f"{scheme}://{user}{at}{first}{rest[len(authority) :]}", [f"{scheme}://{host}" for host in others]


def _parse_sentinel_url(url: str) -> UrlParts:
    """Parse ``sentinel://a;sentinel://b/0``: like Celery, take from the first part that says it."""
    found = UrlParts()
    for chunk in url.split(";"):
        if not chunk.lower().startswith("sentinel://"):
            raise BadUrlError("must begin with sentinel:// again after each ;")
        parts = _split_url(chunk)
        options = _url_options(parts)
        if not parts.hostname or any(name.startswith("ssl_") for name in options):
            raise BadUrlError("must have a host and no ssl_ options in each sentinel:// part")
        db = _url_db(parts.path, options)
        found = replace(
            found,
            sentinels=(*found.sentinels, (unquote(parts.hostname), parts.port or SENTINEL_PORT)),
            db=db if found.db is None else found.db,
            username=found.username or _decoded(parts.username),
            password=found.password or _decoded(parts.password),
            master=found.master or options.get("master_name") or None,
        )
    return found


def _split_url(url: str) -> SplitResult:
    parts = _try_split(url)
    if parts is None or parts.fragment or parts.port == 0:
        # A "/", "?", "#" or "@" in a password moves the rest of it into port, path or fragment.
        raise BadUrlError(f"needs a port between 1 and {MAX_PORT}, and percent-encoding in user and password")
    return parts


def _try_split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # checked by urllib when asked for
    except ValueError:
        return None  # and not "raise": urllib's message shows what it could not parse
    return parts


def _decoded(text: str | None) -> str | None:
    return unquote(text) if text else None


def _url_options(parts: SplitResult) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if set(options) - set(URL_OPTIONS):
        raise BadUrlError(f"may have only these options after the question mark: {', '.join(URL_OPTIONS)}")
    return options


def _url_db(path: str, options: Mapping[str, str]) -> int | None:
    text = options.get("db") or options.get("virtual_host", "").strip("/") or path.strip("/")
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,6}", text):
        raise BadUrlError("must end in a database number, as in redis://host:6379/0")
    return int(text)


def _url_tls(options: Mapping[str, str]) -> dict[str, str | bool]:
    found: dict[str, str | bool] = {name: options[name] for name in TLS_OPTIONS if options.get(name)}
    if "ssl_cert_reqs" in found:
        found["ssl_cert_reqs"] = cert_reqs(found["ssl_cert_reqs"])
        if found["ssl_cert_reqs"] not in _CERT_REQS:
            raise BadUrlError("needs ssl_cert_reqs to be none, optional or required")
    if "ssl_check_hostname" in found:
        word = str(found["ssl_check_hostname"]).lower()
        if word not in {"true", "yes", "1", "false", "no", "0"}:
            raise BadUrlError("needs ssl_check_hostname to be true or false")
        found["ssl_check_hostname"] = word in {"true", "yes", "1"}
    return found


def cert_reqs(value: object) -> Any:
    """Reduce Celery's and ssl's spellings (``CERT_NONE``, ``ssl.CERT_NONE``) to ours."""
    name = getattr(value, "name", value)
    return name.lower().removeprefix("cert_") if isinstance(name, str) else value


def locate(url: UrlParts, pick: Callable[[str, Any, Any], Any]) -> RedisLocation:
    """Build the location; ``pick(field, what the URL says or None, default)`` settles each part."""
    tls = None
    if url.socket_path is None and pick("redis_ssl", url.is_tls or None, False):
        options = {
            name.removeprefix("ssl_"): pick(f"redis_{name}", url.tls.get(name), default)
            for name, default in zip(TLS_OPTIONS, (None, None, None, "required", True), strict=True)
        }
        # A certificate that is not asked for cannot be compared with a host name: ssl refuses the pair.
        options["check_hostname"] = options["check_hostname"] and options["cert_reqs"] != "none"
        tls = TlsOptions(**options)
    is_elsewhere = url.sentinels or url.socket_path
    nodes: tuple[tuple[str, int], ...] = ()
    if not is_elsewhere and pick("redis_cluster", bool(url.nodes) or None, False):
        nodes = url.nodes or ((url.host, url.port or REDIS_PORT),)
    return RedisLocation(
        host="" if is_elsewhere or nodes else url.host,
        port=0 if is_elsewhere or nodes else url.port or REDIS_PORT,
        db=pick("redis_db", url.db, 0),
        username=pick("redis_username", url.username, None),
        password=pick("redis_password", url.password, None),
        socket_path=url.socket_path,
        tls=tls,
        sentinels=url.sentinels,
        sentinel_master=pick("redis_sentinel_master", url.master, None) if url.sentinels else None,
        sentinel_username=pick("redis_sentinel_username", None, None) if url.sentinels else None,
        sentinel_password=pick("redis_sentinel_password", None, None) if url.sentinels else None,
        nodes=nodes,
    )
