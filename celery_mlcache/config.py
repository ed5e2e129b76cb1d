"""Settings: what each is called, where its value comes from, and which Redis they mean together.

What may live here: parsing, bounds, rules between settings, the generated table. No socket is opened, no Redis or
Celery is imported; the only files read are those named by a ``*_FILE`` setting.

Theory of operation. A setting is looked up in *layers*: arguments, environment, then named extra sources
(``app.conf``, the Redis that Celery itself uses), then the default. ``_gather`` flattens the layers, pydantic
checks each field, ``_rules`` checks what fields mean together, and everything found wrong is raised at once as
lines of plain text.

WARNING for maintainers: a message may name a setting and show a harmless value, never a secret. Pydantic's errors
carry their input, and so do the ``ValueError``s of urllib: neither may become the ``__context__`` of what is raised
here, so raise outside of ``except`` blocks.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args
from urllib.parse import parse_qsl, urlencode

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    PrivateAttr,
    SecretStr,
    TypeAdapter,
    ValidationError,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from celery_mlcache.errors import ConfigurationError
from celery_mlcache.keys import NAMESPACE_PATTERN
from celery_mlcache.location import (
    MASK,
    MAX_PORT,
    REDIS_PORT,
    SCHEMES,
    SENTINEL_PORT,
    TLS_OPTIONS,
    URL_OPTIONS,
    RedisLocation,
    TlsOptions,
    UrlParts,
    cert_reqs,
    locate,
    netloc,
    parse_redis_url,
    safe_url,
    split_redis_url,
)

__all__ = [
    "CacheConfig",
    "ConfigurationWarning",
    "RedisLocation",
    "TlsOptions",
    "describe",
    "load_config",
    "location_from_celery",
    "parse_redis_url",
    "safe_url",
    "settings_table",
    "sources_from_celery",
]

ENV_PREFIX: Final = "LIB_"
MIN_SIGNING_KEY_BYTES: Final = 16

_MAX_SHOWN: Final = 60
_MAX_SECRET_FILE: Final = 65536
_DECADE: Final = 315_360_000  # seconds; whatever lives longer is not a cache
_HOUR: Final = 3600
_DAY: Final = 86_400


class ConfigurationWarning(UserWarning):
    """A setting was given but has no effect, or has one that is easily overlooked."""


# --- what a value may look like -------------------------------------------------------------------------------------

_SIZE: Final = TypeAdapter(ByteSize)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        msg = "must be a number, not true or false"
        raise ValueError(msg)  # noqa: TRY004 - pydantic collects ValueError only
    return value


def _size(value: object) -> object:
    """Read ``"4KiB"``; numbers pass."""
    if not isinstance(value, str):
        return _no_bool(value)
    try:
        return int(_SIZE.validate_python(value.strip()))
    except ValidationError:
        pass
    msg = "must be a number of bytes, such as 4096 or 4KiB"
    raise ValueError(msg)


def _host(value: str) -> str:
    if not re.fullmatch(r"[^\s/@?#\[\],;\x00-\x1f]{1,255}", value) or value.count(":") == 1:
        msg = "must be a host name or an address, without port, user or scheme"
        raise ValueError(msg)
    return value


def _url(value: SecretStr) -> SecretStr:
    split_redis_url(value.get_secret_value())
    return value


def _namespace(value: str) -> str:
    if not re.fullmatch(NAMESPACE_PATTERN, value):
        msg = "must be 1 to 100 letters, digits, '_', '.', ':' or '-', and begin with a letter or digit"
        raise ValueError(msg)
    return value


def _serializer(value: str) -> str:
    if value not in {"typed", "pickle"} and not re.fullmatch(r"kombu:[A-Za-z0-9_.+-]{1,64}", value):
        msg = "must be typed, pickle or kombu:<name>"
        raise ValueError(msg)
    return value


def _client_name(value: str) -> str:
    if not re.fullmatch(r"[!-~]{1,64}", value):
        msg = "must be 1 to 64 printable ASCII characters without spaces"
        raise ValueError(msg)
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        msg = "must be an absolute path"
        raise ValueError(msg)
    return value


def _comma_list(value: object) -> object:
    """Split text; sequences pass."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _sentinel_list(value: object) -> object:
    """Read ``"host:port,[::1]:port"``, or a sequence of such texts and of pairs."""
    parts = _comma_list(value)
    return [_sentinel(part) for part in parts] if isinstance(parts, list | tuple) else parts


def _sentinel(part: object) -> tuple[str, int]:
    host, port = "", ""
    if isinstance(part, str):
        match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?", part.strip())
        host, port = (match[1] or match[2], match[3] or str(SENTINEL_PORT)) if match else ("", "")
    elif isinstance(part, list | tuple) and len(part) == 2:  # noqa: PLR2004 - a pair
        host, port = str(part[0]), str(part[1])
    if not re.fullmatch(r"[^\s/@?#\[\],;]+", host) or not port.isdecimal() or not 1 <= int(port) <= MAX_PORT:
        msg = f"must be host:port pairs joined by commas, each port between 1 and {MAX_PORT}"
        raise ValueError(msg)
    return host, int(port)


def _key_list(value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    for number, key in enumerate(value, start=1):
        size = len(key.get_secret_value().encode("utf-8", "surrogateescape"))
        if size < MIN_SIGNING_KEY_BYTES:
            msg = f"key {number} of {len(value)} has {size} bytes; at least {MIN_SIGNING_KEY_BYTES} are needed"
            raise ValueError(msg)
    return value


_Count = Annotated[int, BeforeValidator(_no_bool)]
_Number = Annotated[float, BeforeValidator(_no_bool)]
_Size = Annotated[int, BeforeValidator(_size)]
_Text = Annotated[str, Field(min_length=1)]


# --- the settings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as one layer gave it; rank 0 is the highest layer."""

    value: Any = field(repr=False)
    name: str
    source: str
    rank: int

    @property
    def where(self) -> str:
        return self.source if self.source in {"argument", "default"} else f"from {self.source}"


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a configuration's values came from; never makes two configurations differ."""

    prefix: str = field(default=ENV_PREFIX, compare=False)
    given: Mapping[str, _Given] = field(default_factory=dict, compare=False)

    def of(self, name: str, value: object = None) -> _Given:
        return self.given.get(name) or _Given(value, self.prefix + name.upper(), "default", sys.maxsize)


class CacheConfig(BaseSettings):
    """All settings, checked. Immutable, hence safe to share between threads and over a fork.

    ``CacheConfig(l1_ttl=60)`` takes arguments before ``LIB_*`` variables before defaults; durations are seconds.
    None as an argument for a setting that may be unset means "unset". See :func:`load_config` for further sources.

    Raises:
        ConfigurationError: Some settings are wrong, or an argument is not a setting; lists every problem at once
            and shows no secret.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    cache_enabled: bool = Field(
        True, description="Master switch; off: every get misses, every loader runs, nothing connects"
    )
    l1_enabled: bool = Field(True, description="L1, the memory of each process")
    l1_max_size: _Count = Field(10000, ge=1, le=10**9, description="Entries in L1, per process")
    l1_ttl: _Number = Field(300, gt=0, le=_DECADE, description="Seconds an entry lives in L1 at most")
    l2_enabled: bool = Field(True, description="L2, Redis")
    l2_ttl: _Number = Field(3600, ge=0.001, le=_DECADE, description="Seconds a value lives in L2 unless a call says so")
    redis_host: Annotated[str, AfterValidator(_host)] = Field("localhost", description="Redis host")
    redis_port: _Count = Field(REDIS_PORT, ge=1, le=MAX_PORT, description="Redis port")
    cache_sync_enabled: bool = Field(True, description="Invalidations reach every process through the backplane")

    redis_url: Annotated[SecretStr, AfterValidator(_url)] | None = Field(
        None,
        description="URL, in place of host and port: redis, rediss, unix, valkey, valkeys, redis+socket, sentinel",
    )
    redis_db: _Count = Field(0, ge=0, le=999_999, description="Database number, unless the URL has one")
    redis_username: _Text | None = Field(None, description="ACL user, unless the URL has one")
    redis_password: SecretStr | None = Field(None, description="Password, unless the URL has one")
    redis_password_file: _Text | None = Field(None, description="File that holds the password")
    redis_socket_path: Annotated[str, AfterValidator(_absolute)] | None = Field(
        None, description="Path of a Unix socket, in place of host and port"
    )
    redis_ssl: bool = Field(False, description="Speak TLS; rediss:// says the same")
    redis_ssl_ca_certs: _Text | None = Field(
        None, description="PEM file of the authorities to trust; unset: the system's"
    )
    redis_ssl_certfile: _Text | None = Field(None, description="PEM file of the client certificate")
    redis_ssl_keyfile: _Text | None = Field(None, description="PEM file of the client certificate's key")
    redis_ssl_cert_reqs: Annotated[Literal["none", "optional", "required"], BeforeValidator(cert_reqs)] = Field(
        "required", description="Whether the server's certificate is checked: none, optional, required"
    )
    redis_ssl_check_hostname: bool = Field(True, description="The server's certificate must carry its host name")
    redis_sentinels: Annotated[tuple[tuple[str, int], ...], BeforeValidator(_sentinel_list)] = Field(
        (), description="Sentinels as host:port,host:port, in place of host and port"
    )
    redis_sentinel_master: _Text | None = Field(None, description="Name of the master that the sentinels watch")
    redis_sentinel_username: _Text | None = Field(None, description="ACL user of the sentinels themselves")
    redis_sentinel_password: SecretStr | None = Field(None, description="Password of the sentinels themselves")
    redis_sentinel_password_file: _Text | None = Field(None, description="File that holds the sentinels' password")
    redis_cluster: bool = Field(
        False, description="The host is a node of a cluster; a URL with several hosts, redis://a:1,b:2, says the same"
    )
    redis_socket_timeout: _Number = Field(0.25, gt=0, le=60, description="Seconds a command may take at most")
    redis_connect_timeout: _Number = Field(0.25, gt=0, le=60, description="Seconds a connection may take at most")
    redis_max_connections: _Count = Field(32, ge=1, le=10_000, description="Idle connections kept, per process")
    redis_client_name: Annotated[str, AfterValidator(_client_name)] = Field(
        "mlcache", description="How CLIENT LIST names the connections"
    )

    cache_namespace: Annotated[str, AfterValidator(_namespace)] = Field(
        "default", description="Isolates keys, channel and counters; processes that share a cache share it"
    )
    serializer: Annotated[str, AfterValidator(_serializer)] = Field(
        "typed", description="How values become bytes: typed, pickle (signed only), kombu:<name>"
    )
    signing_keys: Annotated[tuple[SecretStr, ...], BeforeValidator(_comma_list), AfterValidator(_key_list)] = Field(
        (),
        description="Keys that sign values, joined by commas, 16 bytes or more each; the first signs, all are accepted",
    )
    signing_keys_file: _Text | None = Field(None, description="File that holds the signing keys, one a line")
    compression: Literal["none", "zlib", "zstd"] = Field("none", description="Compression: none, zlib, zstd")
    compression_threshold: _Size = Field(
        4 * 1024, ge=0, le=2**29, description="Bytes from which a value is compressed; 4KiB and the like are understood"
    )
    max_value_size: _Size = Field(
        16 * 1024 * 1024, ge=1, le=2**29, description="Bytes a stored value may have, before and after compression"
    )
    ttl_jitter: _Number = Field(
        0.0, ge=0, le=0.5, description="TTLs in L2 are shortened by up to this share, so that they do not end together"
    )
    l1_backend: Literal["auto", "moka", "cacheout"] = Field("auto", description="L1 engine: auto, moka, cacheout")
    l1_copy: bool = Field(True, description="Readers get their own copy of what they could change")

    staleness_bound: _Number = Field(
        1.0, ge=0.05, le=60, description="Seconds an overwritten value may still be read from L1 at most"
    )
    heartbeat_interval: _Number | None = Field(
        None, gt=0, le=30, description="Seconds between two proofs of being up to date; unset: staleness_bound / 4"
    )
    on_disconnect: Literal["bypass", "serve"] = Field(
        "bypass", description="Without proof: bypass L1, or serve from it for max_stale seconds"
    )
    max_stale: _Number = Field(30.0, gt=0, le=_DAY, description="Seconds L1 may serve without proof (on_disconnect)")
    tombstone_ttl: _Number = Field(
        60.0, ge=0.5, le=_DAY, description="Seconds a delete refuses late fills; 10 times staleness_bound at least"
    )
    causal_tokens: bool = Field(
        True, description="Celery messages and results carry tokens: nobody reads older than their sender had"
    )
    circuit_threshold: _Count = Field(3, ge=1, le=1000, description="Failures in a row that open the circuit breaker")
    circuit_reset: _Number = Field(1.0, gt=0, le=_HOUR, description="Seconds until an open breaker lets one call try")
    single_flight_wait: _Number = Field(
        10.0, ge=0, le=_HOUR, description="Seconds a caller waits for another's loader before it runs its own"
    )
    single_flight_lease: _Number = Field(
        5.0, ge=0.1, le=_HOUR, description="Seconds after which another process takes over from one that died computing"
    )
    producer_budget: _Number = Field(
        0.02, gt=0, le=10, description="Seconds that a call may look for its result before it is sent to a worker"
    )
    strict: bool = Field(
        False, description="Raise when Redis fails, in place of a miss, and when a loaded value cannot be stored"
    )

    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    def __init__(
        self,
        /,
        *,
        _env_prefix: str = ENV_PREFIX,
        _environ: Mapping[str, str] | None = None,
        _extra_sources: Sequence[tuple[str, Mapping[str, object]]] = (),
        **overrides: Any,
    ) -> None:
        layers = _Layers(_env_prefix, overrides, os.environ if _environ is None else _environ, _extra_sources)
        given = layers.merged()
        values = {name: entry.value for name, entry in given.items()}
        wrong = _attempt(super().__init__, values)
        if wrong:  # build with the rest, so that the rules between settings are checked in the same go
            super().__init__(**{name: value for name, value in values.items() if name not in wrong})
        self._origin = _Origin(_env_prefix, {name: replace(entry, value=None) for name, entry in given.items()})
        problems = [*layers.problems]
        problems += [_line(name, given[name], text) for name, text in wrong.items()]
        problems += self._broken_rules(wrong.keys() | layers.unusable)
        if problems:
            raise ConfigurationError(problems)
        _warn([*layers.notes, *_notes(self, self._origin)])

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings' signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keep only what ``__init__`` has gathered: the layers must know of each value where it came from."""
        return (init_settings,)

    @classmethod
    def model_validate(cls, obj: Any, **_options: Any) -> Self:
        """Build from a mapping as from arguments: pydantic's own way would put the input into the error."""
        return obj if isinstance(obj, cls) else cls(**obj)

    @property
    def heartbeat(self) -> float:
        """Seconds between two proofs of being up to date, resolved."""
        return self.staleness_bound / 4 if self.heartbeat_interval is None else self.heartbeat_interval

    def source_of(self, name: str) -> str:
        """Return ``"argument"``, ``"environment"``, ``"default"``, or the name of the extra source of setting *name*.

        Raises:
            KeyError: There is no such setting.
        """
        if name not in type(self).model_fields:
            raise KeyError(name)
        return self._origin.of(name).source

    def env_name_of(self, name: str) -> str:
        """Return the environment variable of setting *name*."""
        return self._origin.prefix + name.upper()

    def redis_location(self) -> RedisLocation:
        """Return the Redis to use: what the URL says, completed by the separate settings.

        A separate setting wins over the URL only if it comes from a higher source than the URL (an argument
        ``redis_db=5`` over ``/0`` in ``LIB_REDIS_URL``).
        """
        if self.redis_url is not None:
            url = split_redis_url(self.redis_url.get_secret_value())
        elif self.redis_sentinels:
            url = UrlParts(sentinels=self.redis_sentinels)
        else:
            url = UrlParts(host=self.redis_host, port=self.redis_port, socket_path=self.redis_socket_path)
        return locate(url, self._pick)

    def _pick(self, name: str, said: Any, _default: Any) -> Any:
        if said is not None and self._origin.of(name).rank >= self._origin.of("redis_url").rank:
            return said
        value = getattr(self, name)
        return value.get_secret_value() or None if isinstance(value, SecretStr) else value

    def _broken_rules(self, skip: set[str]) -> Iterator[str]:
        """Yield a line for each broken rule, under the name of the first setting in it that somebody gave."""
        for names, text in _rules(self):
            if skip.isdisjoint(names):
                name = min(names, key=lambda one: self._origin.of(one).rank)
                yield _line(name, replace(self._origin.of(name), value=getattr(self, name)), text)


def load_config(
    overrides: Mapping[str, object],
    *,
    env_prefix: str = ENV_PREFIX,
    extra_sources: Sequence[tuple[str, Mapping[str, object]]] = (),
    environ: Mapping[str, str] | None = None,
) -> CacheConfig:
    """Return the configuration from *overrides*, environment, *extra_sources* in order, and defaults, in that order.

    Where Redis is (URL, socket, sentinels, or host with port) comes whole from the highest source that says any of
    it; a port alone keeps the host of the next source.

    Args:
        overrides: Settings by field name.
        env_prefix: What the environment variables begin with.
        extra_sources: Named mappings. Keys are field names, with or without ``mlcache_`` before them;
            ``backend_url`` means ``redis_url``; None and ``""`` mean "not given". A source named "Celery's ..."
            describes one Redis: it is taken whole, or, where a higher source names another Redis, not at all.
        environ: In place of ``os.environ``.

    Raises:
        ConfigurationError: Lists every problem, secrets hidden.
    """
    return CacheConfig(_env_prefix=env_prefix, _environ=environ, _extra_sources=extra_sources, **overrides)


# --- the layers -----------------------------------------------------------------------------------------------------

_SECRETS: Final = frozenset({"redis_url", "redis_password", "redis_sentinel_password", "signing_keys"})
_FILES: Final = {name: f"{name}_file" for name in ("redis_password", "redis_sentinel_password", "signing_keys")}
_SIZES: Final = frozenset({"compression_threshold", "max_value_size"})
_PLACES: Final = ("redis_url", "redis_socket_path", "redis_sentinels")  # each in place of host and port
_ADDRESS: Final = ("redis_host", "redis_port")
_CELERYS: Final = "Celery's "
_CONF: Final = "app.conf"
_CONF_PREFIX: Final = "mlcache_"
_CONF_ALIASES: Final = {"backend_url": "redis_url"}  # Celery masks what it shows of keys with "backend" in them

_Layer = dict[str, _Given]


class _Layers:
    """Every source's values, highest first; used once, by one thread."""

    def __init__(
        self,
        prefix: str,
        overrides: Mapping[str, object],
        environ: Mapping[str, str],
        extra_sources: Sequence[tuple[str, Mapping[str, object]]],
    ) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.unusable: set[str] = set()  # fields whose file cannot be used
        self._layers = [self._arguments(overrides), self._environment(prefix, environ)]
        for rank, (source, values) in enumerate(extra_sources, start=len(self._layers)):
            self._layers.append(self._extra(source, values, rank))

    def merged(self) -> _Layer:
        """Return the winner of each setting, files read."""
        self._choose_location()
        found: _Layer = {}
        for layer in reversed(self._layers):
            for name, file_name in _FILES.items():
                if name in layer or file_name in layer:  # the two are one setting
                    found.pop(name, None)
                    found.pop(file_name, None)
            found |= layer
        for name, file_name in _FILES.items():
            if found.get(file_name) and found[file_name].value is not None:
                self._read_file(found, name, file_name)
        return found

    def _arguments(self, overrides: Mapping[str, object]) -> _Layer:
        for name in overrides.keys() - CacheConfig.model_fields.keys():
            self.problems.append(f"{name}: is not a setting{_near(name, CacheConfig.model_fields)} (argument)")
        known = {name: value for name, value in overrides.items() if name in CacheConfig.model_fields}
        return {name: _Given(value, name, "argument", 0) for name, value in known.items()}

    def _environment(self, prefix: str, environ: Mapping[str, str]) -> _Layer:
        layer: _Layer = {}
        prefix = prefix.upper()
        fields = {prefix + name.upper(): name for name in CacheConfig.model_fields}
        groups = tuple(prefix + group for group in ("L1_", "L2_", "CACHE_", "REDIS_"))
        for variable in sorted(environ, reverse=True):  # so that the upper-case spelling is the last, and wins
            upper = variable.upper()
            if upper in fields:
                if environ[variable]:
                    layer[fields[upper]] = _Given(environ[variable], variable, "environment", 1)
            elif upper.startswith(prefix):
                near = _near(upper, fields, cutoff=0.6 if upper.startswith(groups) else 0.85)
                if near or upper.startswith(groups):
                    self.notes.append(f"{variable} is not a setting{near}")
        return layer

    def _extra(self, source: str, values: Mapping[str, object], rank: int) -> _Layer:
        layer: _Layer = {}
        for key, value in values.items():
            bare = key.lower().removeprefix(_CONF_PREFIX)
            shown = key if bare != key.lower() or source != _CONF else _CONF_PREFIX + key
            name = _CONF_ALIASES.get(bare, bare)
            if name not in CacheConfig.model_fields:
                near = _near(bare, CacheConfig.model_fields, add=_CONF_PREFIX if source == _CONF else "")
                self.notes.append(f"{shown} in {source} is not a setting{near}")
            elif value is None or value == "":
                continue
            elif name in layer:
                self.problems.append(f"{shown}: {layer[name].name} says the same (from {source})")
            else:
                layer[name] = _Given(value, shown, source, rank)
        return layer

    def _choose_location(self) -> None:
        """Drop what lower layers say about where Redis is; a URL from below must not beat a host from above."""
        is_port_alone = is_claimed = is_sentinel = False
        for layer in self._layers:
            claims = [name for name in (*_PLACES, *_ADDRESS) if name in layer and layer[name].value not in (None, ())]
            if is_claimed and claims:
                is_host_wanted = is_port_alone and not any(name in claims for name in _PLACES)
                self._drop_claims(layer, claims, keep="redis_host" if is_host_wanted else "")
                is_port_alone = is_port_alone and "redis_host" not in layer
            elif claims:
                is_claimed, is_port_alone = True, claims == ["redis_port"]
                is_sentinel = "redis_sentinels" in claims or _is_sentinel_url(layer.get("redis_url"))
                self._note_unused_address(layer, claims)
                continue
            if is_claimed and not is_sentinel:
                for name in [name for name in layer if name.startswith("redis_sentinel_")]:
                    del layer[name]

    @staticmethod
    def _drop_claims(layer: _Layer, claims: Sequence[str], *, keep: str) -> None:
        if layer[claims[0]].source.startswith(_CELERYS):
            layer.clear()  # its TLS options and passwords are those of its own Redis
        for name in claims:
            if name != keep:
                layer.pop(name, None)

    def _note_unused_address(self, layer: _Layer, claims: Sequence[str]) -> None:
        unused = [layer[name].name for name in claims if name in _ADDRESS]
        if unused and claims[0] in _PLACES:
            self.notes.append(f"{' and '.join(unused)} not used: {layer[claims[0]].name} says where Redis is")

    def _read_file(self, found: _Layer, name: str, file_name: str) -> None:
        """Put the file's content in the place of the setting it stands for."""
        file = found[file_name]
        content = None
        if name in found and found[name].value not in (None, ()):
            why = f"{found[name].name} is given as well; only one of the two may be"
        elif not isinstance(file.value, str | os.PathLike):
            return  # the field's own check will say so
        else:
            content, why = _file_content(file.value)
        if content is None:
            self.problems.append(_line(file_name, file, why))
            self.unusable.add(name)
            return
        found[file_name] = replace(file, value=os.fspath(file.value))
        lines = [line.strip() for line in content.splitlines() if line.strip()]
        found[name] = replace(file, value=lines if name == "signing_keys" else content)


def _file_content(path: str | os.PathLike[str]) -> tuple[str | None, str]:
    """Return ``(content, "")``, or ``(None, why not)``."""
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(_MAX_SECRET_FILE)
        text = data.decode("utf-8").strip()
    except OSError as error:
        return None, f"cannot be read: {error.strerror or type(error).__name__}"
    except ValueError:  # undecodable, or a path with a NUL
        return None, "does not hold UTF-8 text"
    return (text, "") if text else (None, "is empty")


def _is_sentinel_url(given: _Given | None) -> bool:
    value = given.value if given else ""
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    return isinstance(text, str) and text.lower().startswith("sentinel://")


def _near(name: str, known: Collection[str], *, cutoff: float = 0.6, add: str = "") -> str:
    close = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {add}{close[0]}?" if close else ""


# --- what is wrong, in words ----------------------------------------------------------------------------------------


def _attempt(init: Callable[..., None], values: Mapping[str, Any]) -> dict[str, str]:
    """Call pydantic's *init*; return what is wrong with each field. Its own error, with all inputs, dies here."""
    try:
        init(**values)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        return {str(one["loc"][0]): _explain(str(one["loc"][0]), one["type"], one.get("ctx", {})) for one in details}
    return {}


def _explain(name: str, kind: str, context: Mapping[str, Any]) -> str:
    annotation = CacheConfig.model_fields[name].annotation
    if kind == "value_error":
        return str(context["error"])
    if kind.startswith("bool"):
        return "must be true or false"
    if kind == "literal_error":
        return f"must be one of {', '.join(get_args(annotation))}"
    bounds = _bounds(name)
    if bounds:
        whole = "a whole number " if kind.startswith("int") else ""
        number = "a finite number " if kind.startswith(("float", "finite")) else whole
        return f"must be {number}{bounds}"
    return "must be text that is not empty" if kind != "tuple_type" else "must be text or a list of texts"


def _bounds(name: str) -> str:
    """Say a number's bounds, as the field declares them; empty for what is not a number."""
    found: dict[str, Any] = {}
    for constraint in CacheConfig.model_fields[name].metadata:
        found |= {key: getattr(constraint, key) for key in ("ge", "gt", "le") if hasattr(constraint, key)}
    if "ge" in found:
        return f"between {found['ge']} and {found['le']}"
    return f"above {found['gt']} and at most {found['le']}" if "gt" in found else ""


def _line(name: str, given: _Given, text: str) -> str:
    return f"{given.name}={_shown(name, given.value)}: {text} ({given.where})"


def _shown(name: str, value: object) -> str:
    """Return a harmless form of a raw value, which may be anything: a URL with a password put into the port, too."""
    if name in _SECRETS or isinstance(value, SecretStr | bytes):
        return MASK
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool | int):
        return str(value)
    if not isinstance(value, str | os.PathLike):
        return f"<{type(value).__name__}>"
    text = str(value)
    if "@" in text or "://" in text or not text.isprintable():
        return MASK
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _rules(config: CacheConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield ``(settings concerned, what is wrong)`` for each rule between settings that is broken."""
    if config.serializer in {"pickle", "kombu:pickle"} and not config.signing_keys:
        yield ("serializer", "signing_keys"), "pickle runs code on reading, so it needs signing_keys"
    for one, other in (("redis_ssl_certfile", "redis_ssl_keyfile"), ("redis_ssl_keyfile", "redis_ssl_certfile")):
        if getattr(config, one) and not getattr(config, other):
            yield (one, other), f"needs {other} as well"
    if config.heartbeat > config.staleness_bound / 2:
        text = f"heartbeat_interval ({config.heartbeat:g}) must be at most half of staleness_bound"
        yield ("heartbeat_interval", "staleness_bound"), f"{text} ({config.staleness_bound:g})"
    if config.tombstone_ttl < 10 * config.staleness_bound:
        text = f"tombstone_ttl ({config.tombstone_ttl:g}) must be at least 10 times staleness_bound"
        yield ("tombstone_ttl", "staleness_bound"), f"{text} ({config.staleness_bound:g})"
    if config.on_disconnect == "serve" and config.max_stale < config.staleness_bound:
        text = f"max_stale ({config.max_stale:g}) must be at least staleness_bound ({config.staleness_bound:g})"
        yield ("max_stale", "staleness_bound", "on_disconnect"), text
    yield from _place_rules(config)


def _place_rules(config: CacheConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    places = [name for name in _PLACES if getattr(config, name)]
    if len(places) > 1:
        yield tuple(places), f"only one of {' and '.join(places)} may say where Redis is"
        return
    location = config.redis_location()
    names = ("redis_sentinel_master", "redis_sentinels", "redis_url")
    if location.sentinels and not location.sentinel_master:
        yield (*places, *names), "sentinels need redis_sentinel_master"
    elif config.redis_sentinel_master and not location.sentinels:
        yield names, "needs redis_sentinels or a sentinel:// URL"
    yield from _cluster_rules(config, location)


def _cluster_rules(config: CacheConfig, location: RedisLocation) -> Iterator[tuple[tuple[str, ...], str]]:
    if config.redis_cluster and location.sentinels:
        yield ("redis_cluster", "redis_sentinels", "redis_url"), "a cluster fails over by itself, without sentinels"
    elif config.redis_cluster and location.socket_path:
        yield ("redis_cluster", "redis_socket_path", "redis_url"), "a cluster is not reached through a Unix socket"
    elif location.nodes and location.db:
        yield ("redis_db", "redis_url", "redis_cluster"), f"a cluster has database 0 only, not {location.db}"
    url = split_redis_url(config.redis_url.get_secret_value() if config.redis_url else "redis://")
    if url.nodes and not location.nodes:
        yield ("redis_cluster", "redis_url"), "several hosts are a cluster's: redis_cluster must not be false"


def _notes(config: CacheConfig, origin: _Origin) -> Iterator[str]:
    """Yield what is allowed but easily overlooked."""
    is_two_level = config.cache_enabled and config.l1_enabled and config.l2_enabled
    if is_two_level and not config.cache_sync_enabled:
        ttl = f"{config.env_name_of('l1_ttl')} ({config.l1_ttl:g} seconds)"
        name = config.env_name_of("cache_sync_enabled")
        yield f"{name} is off: what other processes write is seen only once the own copy ends, after {ttl} at most"
    unused = [given.name for name, given in origin.given.items() if name.startswith("redis_ssl_")]
    if unused and config.redis_location().tls is None:
        yield f"{' and '.join(unused)} not used: TLS is off"


def _warn(notes: Sequence[str]) -> None:
    """Warn in the name of the first caller outside of this package."""
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    for note in notes:
        warnings.warn(note, ConfigurationWarning, stacklevel=level)


# --- the Redis that Celery itself uses ------------------------------------------------------------------------------


def sources_from_celery(conf: Any) -> list[tuple[str, dict[str, object]]]:
    """Return Celery's own Redis as the last of :func:`load_config`'s ``extra_sources``; empty if it uses none.

    Args:
        conf: ``app.conf``, or a mapping of Celery's plain values. The result backend comes before the broker.
    """
    for setting, tls, options in (
        ("result_backend", "redis_backend_use_ssl", "result_backend_transport_options"),
        ("broker_url", "broker_use_ssl", "broker_transport_options"),
    ):
        url = _celery_url(_conf_value(conf, setting))
        if url is not None:
            found = {"redis_url": url, **_celery_tls(_conf_value(conf, tls))}
            if url.startswith("sentinel://"):
                found |= _celery_sentinel(_conf_value(conf, options))
            return [(_CELERYS + setting, found)]
    return []


def location_from_celery(conf: Any) -> dict[str, object] | None:
    """Return the settings that describe Celery's own Redis, or None; see :func:`sources_from_celery`."""
    sources = sources_from_celery(conf)
    return sources[0][1] if sources else None


def _conf_value(conf: Any, name: str) -> Any:
    # Attribute first: Celery's own variables (CELERY_BROKER_URL) show in app.conf's properties only.
    value = getattr(conf, name, None)
    return conf.get(name) if value is None else value


def _celery_url(value: object) -> str | None:
    """Return the first server's URL, all of them for sentinels, None for what is not Redis."""
    if isinstance(value, list | tuple):
        value = ";".join(map(str, value))
    if not isinstance(value, str):
        return None
    urls = [url for url in value.split(";") if url]
    if value == "redis":
        return "redis://localhost"
    if not urls or "://" not in urls[0] or urls[0].partition("://")[0].lower() not in SCHEMES:
        return None
    if not urls[0].lower().startswith("sentinel://"):
        urls = urls[:1]
    return ";".join(map(_known_options, urls))


def _known_options(url: str) -> str:
    """Drop the options that only Celery and its driver understand; a mistake in one of ours should be told."""
    base, mark, query = url.partition("?")
    kept = [(name, value) for name, value in parse_qsl(query) if name in URL_OPTIONS]
    return f"{base}?{urlencode(kept)}" if mark and kept else base


def _celery_tls(value: object) -> dict[str, object]:
    options = value if isinstance(value, Mapping) else {}
    found = {f"redis_{name}": options[name] for name in TLS_OPTIONS if options.get(name) is not None}
    return {"redis_ssl": True, **found} if value else {}


def _celery_sentinel(value: object) -> dict[str, object]:
    options = value if isinstance(value, Mapping) else {}
    inner = options.get("sentinel_kwargs") or {}
    found = {
        "redis_sentinel_master": options.get("master_name"),
        "redis_sentinel_username": inner.get("username"),
        "redis_sentinel_password": inner.get("password"),
    }
    return {name: given for name, given in found.items() if given}


# --- for people -----------------------------------------------------------------------------------------------------


def describe(config: CacheConfig) -> list[tuple[str, str, str, str]]:
    """Return ``(field, environment variable, value, source)`` of every setting, secrets masked."""
    return [
        (name, config.env_name_of(name), _plain(name, getattr(config, name)), config.source_of(name))
        for name in CacheConfig.model_fields
    ]


def settings_table() -> str:
    """Return the settings as a Markdown table."""
    rows = [
        f"| `{ENV_PREFIX}{name.upper()}` | {_code(_plain(name, info.default))} | {info.description} |"
        for name, info in CacheConfig.model_fields.items()
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def _code(text: str) -> str:
    return text if text == "unset" else f"`{text}`"


def _plain(name: str, value: Any) -> str:
    """Return a checked value as people write it."""
    if value is None or value == ():
        return "unset"
    if name == "redis_url":
        return safe_url(parse_redis_url(value.get_secret_value()))
    if name in _SECRETS:
        return MASK
    if name == "redis_sentinels":
        return ",".join(netloc(host, port) for host, port in value)
    if name in _SIZES and value:
        for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
            if value % size == 0:
                return f"{value // size}{unit}"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.stdout.write(settings_table() + "\n")
