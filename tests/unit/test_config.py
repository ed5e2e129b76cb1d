"""Settings: layers, bounds, rules, secrets, and where Redis is."""

import pickle
import ssl
import traceback
import warnings

import pytest
from pydantic import SecretStr, ValidationError

from celery_mlcache.config import (
    CacheConfig,
    ConfigurationWarning,
    RedisLocation,
    TlsOptions,
    describe,
    load_config,
    location_from_celery,
    parse_redis_url,
    safe_url,
    sources_from_celery,
)
from celery_mlcache.errors import ConfigurationError

SECRET = "s3ntinel-pa55word"
KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """No variable of the machine reaches a test."""
    import os

    for name in os.environ:
        if name.upper().startswith("LIB_"):
            monkeypatch.delenv(name)


def load(overrides=None, *sources, **environ):
    """Build a configuration from nothing but what is given."""
    return load_config(overrides or {}, environ=environ, extra_sources=sources)


def problems(overrides=None, *sources, **environ):
    """Return the problems of a configuration that cannot be built."""
    with pytest.raises(ConfigurationError) as caught:
        load(overrides, *sources, **environ)
    return caught.value.problems


def notes(overrides=None, *sources, **environ):
    """Return the warnings of a configuration that can be built."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(overrides, *sources, **environ)
    assert all(one.category is ConfigurationWarning for one in caught)
    return [str(one.message) for one in caught]


class TestDefaults:
    def test_the_nine_given_defaults(self):
        """The nine given settings have exactly the given defaults."""
        config = CacheConfig()

        assert (
            config.cache_enabled,
            config.l1_enabled,
            config.l1_max_size,
            config.l1_ttl,
            config.l2_enabled,
            config.l2_ttl,
            config.redis_host,
            config.redis_port,
            config.cache_sync_enabled,
        ) == (True, True, 10000, 300, True, 3600, "localhost", 6379, True)

    def test_defaults_are_valid_and_name_a_local_redis(self):
        """Without any setting there is no problem and no warning, and Redis is localhost:6379/0 without TLS."""
        assert notes() == []
        assert RedisLocation() == load().redis_location()

    def test_heartbeat_follows_the_bound(self):
        """An unset heartbeat is a quarter of the staleness bound; a set one stands."""
        assert load({"staleness_bound": 2}).heartbeat == 0.5
        assert load({"heartbeat_interval": 0.3}).heartbeat == 0.3

    def test_frozen_and_hashable(self):
        """A configuration cannot be changed, and equal ones hash alike wherever their values came from."""
        config = load({"l1_ttl": 300})

        with pytest.raises(ValidationError):
            config.l1_ttl = 5
        assert load() == config
        assert hash(load()) == hash(config)

    def test_pickles(self):
        """A configuration survives pickling with its secrets, its sources and its Redis."""
        config = load(LIB_REDIS_PASSWORD=SECRET, LIB_L1_TTL="7")
        again = pickle.loads(pickle.dumps(config))

        assert (config, "environment") == (again, again.source_of("l1_ttl"))
        assert again.redis_location().password == SECRET


class TestLayers:
    def test_environment_is_read_at_construction(self, monkeypatch):
        """``CacheConfig()`` reads the process's environment each time, in any case."""
        monkeypatch.setenv("LIB_L1_TTL", "12.5")
        monkeypatch.setenv("lib_l1_enabled", "off")
        config = CacheConfig()

        assert (config.l1_ttl, config.l1_enabled) == (12.5, False)

    def test_arguments_beat_environment_beats_sources_beats_defaults(self):
        """The highest layer that gives a setting wins, and is remembered."""
        config = load(
            {"l1_ttl": 1},
            ("app.conf", {"l1_ttl": 3, "l2_ttl": 3, "l1_max_size": 3, "redis_db": None}),
            ("other", {"l1_max_size": 4, "redis_db": 4}),
            LIB_L1_TTL="2",
            LIB_L2_TTL="2",
        )

        assert (config.l1_ttl, config.l2_ttl, config.l1_max_size, config.redis_db) == (1, 2, 3, 4)
        names = ("l1_ttl", "l2_ttl", "l1_max_size", "redis_db", "strict")
        assert [config.source_of(name) for name in names] == ["argument", "environment", "app.conf", "other", "default"]

    def test_source_of_an_unknown_setting(self):
        """Asking for the source of what is not a setting raises KeyError."""
        with pytest.raises(KeyError):
            load().source_of("l1_tll")

    def test_empty_variables_do_not_count(self):
        """An empty variable is as good as none."""
        assert load(LIB_L1_TTL="", LIB_REDIS_PASSWORD="", LIB_CACHE_ENABLED="").source_of("l1_ttl") == "default"

    def test_another_prefix(self, monkeypatch):
        """Both ways of construction take another prefix, and messages use it."""
        monkeypatch.setenv("SHOP_L1_TTL", "9")
        assert CacheConfig(_env_prefix="SHOP_").l1_ttl == 9
        assert load_config({}, env_prefix="shop_", environ={"SHOP_L1_TTL": "8"}).l1_ttl == 8
        with pytest.raises(ConfigurationError, match="SHOP_L1_TTL=x: must be"):
            load_config({}, env_prefix="SHOP_", environ={"SHOP_L1_TTL": "x", "LIB_L1_TTL": "y"})

    def test_conf_keys_with_and_without_prefix(self):
        """Keys of app.conf are understood with and without ``mlcache_``, in any case, and ``backend_url`` too."""
        config = load(None, ("app.conf", {"mlcache_l1_ttl": 5, "MLCACHE_L2_TTL": 6, "redis_db": 7}))
        assert (config.l1_ttl, config.l2_ttl, config.redis_db) == (5, 6, 7)

        config = load(None, ("app.conf", {"mlcache_backend_url": f"redis://:{SECRET}@h/1"}))
        assert (config.redis_location().host, config.source_of("redis_url")) == ("h", "app.conf")

    def test_conf_says_one_thing_twice(self):
        """Two spellings of one setting in one source are a problem that names both."""
        found = problems(None, ("app.conf", {"mlcache_redis_url": "redis://a", "mlcache_backend_url": "redis://b"}))
        assert found == ("mlcache_backend_url: mlcache_redis_url says the same (from app.conf)",)

    def test_unset_by_argument(self):
        """None as an argument unsets what may be unset, and is a problem elsewhere."""
        assert RedisLocation() == load({"redis_url": None}, LIB_REDIS_URL="redis://h").redis_location()
        assert problems({"l1_ttl": None}) == (
            "l1_ttl=None: must be a finite number above 0 and at most 315360000 (argument)",
        )

    def test_model_validate_builds_as_arguments_do(self):
        """Pydantic's own door leads through the same checks, and shows no input."""
        assert CacheConfig.model_validate({"l1_ttl": 5}).l1_ttl == 5
        with pytest.raises(ConfigurationError) as caught:
            CacheConfig.model_validate({"redis_password": SECRET, "redis_port": 0})
        assert_silent(caught.value)


BAD = [
    ("redis_port", "99999", "must be between 1 and 65535"),
    ("redis_port", "0", "must be between 1 and 65535"),
    ("redis_port", "x", "must be a whole number between 1 and 65535"),
    ("l1_max_size", "0", "must be between 1 and 1000000000"),
    ("l1_max_size", "1.5", "must be a whole number between 1 and 1000000000"),
    ("l1_ttl", "0", "must be above 0 and at most 315360000"),
    ("l1_ttl", "-1", "must be above 0 and at most 315360000"),
    ("l1_ttl", "inf", "must be a finite number above 0 and at most 315360000"),
    ("l1_ttl", "nan", "must be a finite number above 0 and at most 315360000"),
    ("l2_ttl", "0", "must be between 0.001 and 315360000"),
    ("l2_ttl", "1e400", "must be a finite number between 0.001 and 315360000"),
    ("cache_enabled", "maybe", "must be true or false"),
    ("redis_db", "-1", "must be between 0 and 999999"),
    ("redis_host", "h:1", "must be a host name or an address, without port, user or scheme"),
    ("redis_host", "a b", "must be a host name or an address, without port, user or scheme"),
    ("redis_socket_path", "run/x", "must be an absolute path"),
    ("redis_ssl_cert_reqs", "maybe", "must be one of none, optional, required"),
    ("redis_sentinels", "h:0", "must be host:port pairs joined by commas, each port between 1 and 65535"),
    ("redis_sentinels", "a,b:x", "must be host:port pairs joined by commas, each port between 1 and 65535"),
    ("redis_client_name", "a b", "must be 1 to 64 printable ASCII characters without spaces"),
    ("redis_socket_timeout", "61", "must be above 0 and at most 60"),
    (
        "cache_namespace",
        "{x}",
        "must be 1 to 100 letters, digits, '_', '.', ':' or '-', and begin with a letter or digit",
    ),
    ("serializer", "json", "must be typed, pickle or kombu:<name>"),
    ("serializer", "kombu:", "must be typed, pickle or kombu:<name>"),
    ("compression", "gzip", "must be one of none, zlib, zstd"),
    ("compression_threshold", "4 lumps", "must be a number of bytes, such as 4096 or 4KiB"),
    ("max_value_size", "1GiB", "must be between 1 and 536870912"),
    ("ttl_jitter", "0.6", "must be between 0.0 and 0.5"),
    ("l1_backend", "dict", "must be one of auto, moka, cacheout"),
    ("staleness_bound", "0.01", "must be between 0.05 and 60"),
    ("on_disconnect", "panic", "must be one of bypass, serve"),
    ("heartbeat_interval", "0", "must be above 0 and at most 30"),
]


class TestProblems:
    @pytest.mark.parametrize(("name", "value", "text"), BAD)
    def test_each_bound_in_the_words_of_its_source(self, name, value, text):
        """A wrong value is told with its name as written, its value, what is allowed, and its source."""
        text = text.replace("0.0 and", "0 and") if name == "ttl_jitter" else text
        variable = f"LIB_{name.upper()}"

        assert (f"{variable}={value}: {text} (from environment)",) == problems(**{variable: value})
        assert (f"{name}={value}: {text} (argument)",) == problems({name: value})
        conf = ("app.conf", {f"mlcache_{name}": value})
        assert (f"mlcache_{name}={value}: {text} (from app.conf)",) == problems(None, conf)

    def test_all_problems_at_once(self):
        """Wrong fields, unknown arguments, unreadable files and broken rules come in one error."""
        found = problems(
            {"l1_tll": 5, "serializer": "pickle"},
            ("app.conf", {"mlcache_redis_port": 99999}),
            LIB_L1_TTL="0",
            LIB_TOMBSTONE_TTL="9",
            LIB_REDIS_PASSWORD_FILE="/nonexist",
        )

        assert {
            "l1_tll: is not a setting; did you mean l1_ttl? (argument)",
            "serializer=pickle: pickle runs code on reading, so it needs signing_keys (argument)",
            "mlcache_redis_port=99999: must be between 1 and 65535 (from app.conf)",
            "LIB_L1_TTL=0: must be above 0 and at most 315360000 (from environment)",
            "LIB_TOMBSTONE_TTL=9: tombstone_ttl (9) must be at least 10 times staleness_bound (1) (from environment)",
            "LIB_REDIS_PASSWORD_FILE=/nonexist: cannot be read: No such file or directory (from environment)",
        } == set(found)

    def test_an_unknown_argument_without_near_match(self):
        """An argument that resembles nothing is refused, and its value is not shown."""
        assert problems({"zzz": SECRET}) == ("zzz: is not a setting (argument)",)

    @pytest.mark.parametrize("name", ["l1_ttl", "l1_max_size", "redis_port", "max_value_size"])
    def test_true_is_not_a_number(self, name):
        """A bool where a number belongs is refused."""
        assert (f"{name}=True: must be a number, not true or false (argument)",) == problems({name: True})

    def test_odd_types(self):
        """Values of other types are told by type, long ones shortened, unprintable ones hidden."""
        assert problems({"redis_host": {}})[0] == "redis_host=<dict>: must be text that is not empty (argument)"
        assert problems({"serializer": "x" * 99})[0].startswith(f"serializer={'x' * 57}...: ")
        assert problems({"serializer": "a\nb"})[0].startswith("serializer=**: ")
        assert problems({"signing_keys": 5})[0].startswith("signing_keys=**: ")
        assert problems({"redis_sentinels": 5})[0].startswith("redis_sentinels=5: must be text or a list of texts")
        assert problems({"redis_password_file": 5})[0].startswith("redis_password_file=5: must be text")

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ({"serializer": "kombu:pickle"}, "serializer=kombu:pickle: pickle runs code"),
            ({"redis_ssl_certfile": "/c"}, "redis_ssl_certfile=/c: needs redis_ssl_keyfile as well"),
            ({"redis_ssl_keyfile": "/k"}, "redis_ssl_keyfile=/k: needs redis_ssl_certfile as well"),
            ({"heartbeat_interval": 2}, "heartbeat_interval=2: heartbeat_interval (2) must be at most half"),
            ({"staleness_bound": 7}, "staleness_bound=7: tombstone_ttl (60) must be at least 10 times"),
            ({"on_disconnect": "serve", "max_stale": 0.5}, "max_stale=0.5: max_stale (0.5) must be at least"),
            ({"redis_sentinels": "a,b"}, "redis_sentinels=<tuple>: sentinels need redis_sentinel_master"),
            ({"redis_url": "sentinel://a"}, "redis_url=**: sentinels need redis_sentinel_master"),
            ({"redis_sentinel_master": "m"}, "redis_sentinel_master=m: needs redis_sentinels or a sentinel:// URL"),
            (
                {"redis_url": "redis://a", "redis_sentinels": "b", "redis_sentinel_master": "m"},
                "redis_url=**: only one of redis_url and redis_sentinels may say where Redis is",
            ),
            ({"redis_cluster": True, "redis_db": 2}, "redis_db=2: a cluster has database 0 only, not 2"),
            ({"redis_url": "redis://a,b/3"}, "redis_url=**: a cluster has database 0 only, not 3"),
            (
                {"redis_cluster": True, "redis_socket_path": "/s"},
                "redis_cluster=True: a cluster is not reached through",
            ),
            (
                {"redis_cluster": True, "redis_sentinels": "a", "redis_sentinel_master": "m"},
                "redis_cluster=True: a cluster fails over by itself",
            ),
            (
                {"redis_url": "redis://a", "redis_socket_path": "/s"},
                "redis_url=**: only one of redis_url and redis_soc",
            ),
        ],
    )
    def test_rules_between_settings(self, given, text):
        """Settings that contradict one another are a problem under the name of one that was given."""
        (found,) = problems(given)
        assert found.startswith(text)
        assert found.endswith(" (argument)")

    @pytest.mark.parametrize(
        "given",
        [
            {"serializer": "pickle", "signing_keys": KEY},
            {"serializer": "kombu:json"},
            {"l1_ttl": 600, "l2_ttl": 60},
            {"staleness_bound": 60, "tombstone_ttl": 600, "heartbeat_interval": 30},
            {"on_disconnect": "bypass", "max_stale": 0.5},
        ],
    )
    def test_what_only_looks_wrong(self, given):
        """Settings that are odd but harmless pass without a word."""
        assert notes(given) == []

    def test_a_rule_waits_for_its_settings(self):
        """No rule speaks about a setting that is itself wrong."""
        assert len(problems({"staleness_bound": 99, "heartbeat_interval": 20})) == 1
        assert len(problems({"serializer": "pickle", "signing_keys": "short"})) == 1
        assert len(problems({"serializer": "pickle", "signing_keys_file": "/nonexistent"})) == 1
        assert len(problems({"redis_url": "x", "redis_sentinel_master": "m"})) == 1

    def test_the_error_survives_pickling(self):
        """Celery ships the error between processes."""
        with pytest.raises(ConfigurationError) as caught:
            load(LIB_L1_TTL="0", LIB_L2_TTL="0")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(caught.value), caught.value.problems) == (str(again), again.problems)
        assert "2 settings are wrong" in str(again)


class TestValues:
    def test_sizes(self):
        """Sizes are numbers of bytes or texts with a unit."""
        config = load({"compression_threshold": 512}, LIB_MAX_VALUE_SIZE="2 MiB")
        assert (config.compression_threshold, config.max_value_size) == (512, 2 * 1024 * 1024)
        assert load(LIB_COMPRESSION_THRESHOLD="4KiB").compression_threshold == 4096

    @pytest.mark.parametrize(
        "value", ["h1:1,[::1]:2, h3", ["h1:1", "[::1]:2", "h3"], [("h1", 1), ["::1", "2"], ("h3", 26379)]]
    )
    def test_sentinels(self, value):
        """Sentinels are text, a list of texts or of pairs; the port may be left out."""
        config = load({"redis_sentinels": value, "redis_sentinel_master": "m"})
        assert config.redis_sentinels == (("h1", 1), ("::1", 2), ("h3", 26379))

    def test_cert_reqs_spellings(self):
        """Celery's and ssl's names for certificate checks are understood."""
        for value in ("CERT_NONE", "none", "None", ssl.CERT_NONE):
            assert load({"redis_ssl": True, "redis_ssl_cert_reqs": value}).redis_ssl_cert_reqs == "none"

    def test_signing_keys(self, tmp_path):
        """Keys come from text, a list, or a file with one a line; short ones are told by number."""
        keys = [KEY, KEY[::-1]]
        file = tmp_path / "keys"
        file.write_bytes("\r\n \r\n".join(["", *keys, ""]).encode())
        for config in (
            load(LIB_SIGNING_KEYS=",".join(keys)),
            load({"signing_keys": keys}),
            load({"signing_keys": SecretStr(",".join(keys))}),
            load(LIB_SIGNING_KEYS_FILE=str(file)),
            load({"signing_keys_file": file}),
        ):
            assert keys == [key.get_secret_value() for key in config.signing_keys]
        assert problems(LIB_SIGNING_KEYS=f"{KEY},abc") == (
            "LIB_SIGNING_KEYS=**: key 2 of 2 has 3 bytes; at least 16 are needed (from environment)",
        )


class TestFiles:
    def test_a_file_holds_a_password(self, tmp_path):
        """A password file is read and stripped, for Redis and for the sentinels."""
        file = tmp_path / "password"
        file.write_text(f"  {SECRET}\r\n")
        config = load(LIB_REDIS_PASSWORD_FILE=str(file))
        assert (config.redis_location().password, config.source_of("redis_password")) == (SECRET, "environment")

        config = load(
            LIB_REDIS_SENTINEL_PASSWORD_FILE=str(file), LIB_REDIS_SENTINELS="h", LIB_REDIS_SENTINEL_MASTER="m"
        )
        assert config.redis_location().sentinel_password == SECRET

    def test_password_and_file_in_one_source(self, tmp_path):
        """Given twice in one source is a problem; a higher source just wins."""
        file = tmp_path / "password"
        file.write_text(SECRET)
        (found,) = problems(LIB_REDIS_PASSWORD="other", LIB_REDIS_PASSWORD_FILE=str(file))
        assert found.endswith("LIB_REDIS_PASSWORD is given as well; only one of the two may be (from environment)")

        assert load({"redis_password": "x"}, LIB_REDIS_PASSWORD_FILE="/nonexistent").redis_location().password == "x"
        higher = load({"redis_password_file": str(file)}, LIB_REDIS_PASSWORD="other")
        assert higher.redis_location().password == SECRET

    @pytest.mark.parametrize(("content", "why"), [(b" \n", "is empty"), (b"\xff\xfe", "does not hold UTF-8 text")])
    def test_useless_files(self, tmp_path, content, why):
        """An empty or undecodable file is a problem that names variable and path."""
        file = tmp_path / "p"
        file.write_bytes(content)
        (found,) = problems(LIB_REDIS_PASSWORD_FILE=str(file))
        assert found.startswith("LIB_REDIS_PASSWORD_FILE=")
        assert found.endswith(f": {why} (from environment)")

    def test_a_directory(self, tmp_path):
        """A path that cannot be read says why."""
        assert "cannot be read: Is a directory" in problems({"redis_password_file": str(tmp_path)})[0]


def assert_silent(error):
    """No view of *error* shows the secret: text, arguments, causes, traceback, pickle."""
    shown = [str(error), repr(error), repr(error.args), repr(error.problems), repr(vars(error))]
    shown += ["".join(traceback.format_exception(error)), repr(pickle.dumps(error))]
    assert error.__cause__ is None
    assert error.__context__ is None
    assert not [text for text in shown if SECRET in text]


LEAKS = [
    {"redis_password": SECRET},
    {"redis_sentinel_password": SECRET},
    {"signing_keys": f"{SECRET},{SECRET}"},
    {"redis_url": f"redis://user:{SECRET}@h:6379/0"},
    {"redis_url": f"redis://{SECRET}@h:6379/0"},
    {"redis_url": f"sentinel://:{SECRET}@h;sentinel://h2", "redis_sentinel_master": "m"},
    {"redis_url": f"unix://:{SECRET}@/run/x"},
]
WRONG_LEAKS = [
    {"signing_keys": SECRET[:15]},
    {"redis_url": f"http://:{SECRET}@h"},
    {"redis_url": SECRET},
    {"redis_url": f"redis://user:{SECRET}"},
    {"redis_url": f"redis://:{SECRET}@h:99999"},
    {"redis_url": f"redis://:a/{SECRET}@h:1"},
    {"redis_url": f"redis://:a#{SECRET}@h:1"},
    {"redis_url": f"redis://:a?{SECRET}@h:1"},
    {"redis_url": f"redis://:12?{SECRET}@h:1"},
    {"redis_url": f"redis://[{SECRET}"},
    {"redis_url": f"redis://:\u2100{SECRET}@h"},
    {"redis_url": f"redis://:{SECRET}@h/x"},
    {"redis_url": f"redis://:{SECRET} @h/0"},
    {"redis_url": f"redis://h/0?password={SECRET}"},
    {"redis_url": f"rediss://h/0?ssl_cert_reqs={SECRET}"},
    {"redis_url": f"redis://h/0?db={SECRET}"},
    {"redis_url": f"sentinel://h;{SECRET}"},
    {"redis_url": f"redis://h,i:{SECRET}"},
    {"redis_url": f"unix://{SECRET}/x"},
    {"redis_url": [SECRET]},
    {"redis_host": f"redis://:{SECRET}@h"},
    {"redis_host": f":{SECRET}@h"},
    {"redis_port": f"tcp://:{SECRET}@h:1"},
    {"redis_sentinels": f":{SECRET}@h:1,b"},
    {"redis_sentinels": [f":{SECRET}@h:1"]},
    {"redis_password": [SECRET]},
    {"redis_password": SECRET.encode(), "redis_db": {SECRET: 1}},
    {"redis_pasword": SECRET},
]


class TestSecrets:
    @pytest.mark.parametrize("given", [*LEAKS, *WRONG_LEAKS], ids=str)
    def test_no_secret_in_errors(self, given):
        """Whatever else is wrong, an error shows no secret, wherever the secret was put."""
        for extra in ({"l1_ttl": 0}, {"heartbeat_interval": 29}):
            with pytest.raises(ConfigurationError) as caught:
                load({**given, **extra})
            assert_silent(caught.value)
            with pytest.raises(ConfigurationError) as caught:
                load(extra, ("app.conf", {f"mlcache_{name}": value for name, value in given.items()}))
            assert_silent(caught.value)
            text = {f"LIB_{name.upper()}": value for name, value in given.items() if isinstance(value, str)}
            with pytest.raises(ConfigurationError) as caught:
                load(extra, **text)
            assert_silent(caught.value)

    @pytest.mark.parametrize("given", WRONG_LEAKS, ids=str)
    def test_each_is_wrong_by_itself(self, given):
        """What holds a secret in a wrong place is refused."""
        with pytest.raises(ConfigurationError) as caught:
            load(given)
        assert_silent(caught.value)

    @pytest.mark.parametrize("given", LEAKS, ids=str)
    @pytest.mark.filterwarnings("ignore::celery_mlcache.config.ConfigurationWarning")
    def test_no_secret_in_views(self, given):
        """A good configuration shows no secret in any printed view."""
        if "redis_sentinel_password" in given:
            given = given | {"redis_sentinels": "h", "redis_sentinel_master": "m"}
        config = load(given)
        location = config.redis_location()

        views = [repr(config), str(config), repr(config.model_dump()), config.model_dump_json(), repr(describe(config))]
        views += [repr(location), str(location), safe_url(location), repr(vars(config)), repr(config._origin)]
        assert not [view for view in views if SECRET in view]

    @pytest.mark.parametrize("given", [one for one in WRONG_LEAKS if "redis_url" in one], ids=str)
    def test_no_secret_from_parse_redis_url(self, given):
        """A URL that is not understood is not shown."""
        if isinstance(given["redis_url"], str):
            with pytest.raises(ConfigurationError, match=r"^the Redis URL ") as caught:
                parse_redis_url(given["redis_url"])
            assert_silent(caught.value)

    def test_unreadable_secret_files_do_not_leak_others(self):
        """A problem with one secret does not show another."""
        with pytest.raises(ConfigurationError) as caught:
            load({"redis_url": f"redis://:{SECRET}@h", "signing_keys_file": "/nonexistent"})
        assert_silent(caught.value)

    def test_warnings_show_no_value(self):
        """A misspelt variable is named, its value is not shown."""
        (note,) = notes(LIB_REDIS_PASSWRD=SECRET)
        assert note == "LIB_REDIS_PASSWRD is not a setting; did you mean LIB_REDIS_PASSWORD?"

    def test_describe_masks(self):
        """``describe`` gives field, variable, value and source, with secrets masked."""
        rows = {
            row[0]: row[1:] for row in describe(load(LIB_REDIS_URL=f"redis://u:{SECRET}@h/2", LIB_SIGNING_KEYS=KEY))
        }

        assert rows["redis_url"] == ("LIB_REDIS_URL", "redis://u:**@h:6379/2", "environment")
        assert rows["signing_keys"] == ("LIB_SIGNING_KEYS", "**", "environment")
        assert rows["l1_ttl"] == ("LIB_L1_TTL", "300", "default")
        assert rows["max_value_size"] == ("LIB_MAX_VALUE_SIZE", "16MiB", "default")
        assert rows["heartbeat_interval"] == ("LIB_HEARTBEAT_INTERVAL", "unset", "default")
        assert list(CacheConfig.model_fields) == list(rows)


class TestWarnings:
    @pytest.mark.parametrize(
        ("variable", "hint"),
        [
            ("LIB_L1_TLL", "; did you mean LIB_L1_TTL?"),
            ("lib_redis_prot", "; did you mean LIB_REDIS_PORT?"),
            ("LIB_COMPRESION", "; did you mean LIB_COMPRESSION?"),
            ("LIB_REDIS_PORT_6379_TCP_ADDR", ""),
        ],
    )
    def test_misspelt_variables(self, variable, hint):
        """A variable that looks like a setting but is none is told, once, with the near match."""
        (note,) = notes(**{variable: "1"})
        assert note.startswith(f"{variable} is not a setting{hint}")

    def test_foreign_variables(self):
        """A variable of somebody else with the same prefix is left alone."""
        assert notes(LIB_DIR="/lib", LIB_VERSION="1", LIBRARY="x", PATH="/bin") == []

    def test_misspelt_conf(self):
        """A misspelt key of app.conf is told with the spelling that works."""
        assert notes(None, ("app.conf", {"mlcache_l1_tll": 1})) == [
            "mlcache_l1_tll in app.conf is not a setting; did you mean mlcache_l1_ttl?"
        ]

    def test_sync_off(self):
        """Without sync the bound on staleness is L1's TTL, and is said."""
        (note,) = notes(LIB_CACHE_SYNC_ENABLED="false", LIB_L1_TTL="90")
        assert "LIB_CACHE_SYNC_ENABLED is off" in note
        assert "LIB_L1_TTL (90 seconds)" in note
        for level in ("l1_enabled", "l2_enabled", "cache_enabled"):
            assert notes({level: False}, LIB_CACHE_SYNC_ENABLED="false") == []

    def test_url_and_host_in_one_source(self):
        """A URL beside host or port in the same source is told; in different sources the higher one wins silently."""
        assert notes(LIB_REDIS_URL="redis://a", LIB_REDIS_HOST="b", LIB_REDIS_PORT="1") == [
            "LIB_REDIS_HOST and LIB_REDIS_PORT not used: LIB_REDIS_URL says where Redis is"
        ]
        assert notes({"redis_host": "b"}, LIB_REDIS_URL="redis://a") == []
        assert notes({"redis_url": "redis://a"}, LIB_REDIS_HOST="b") == []

    def test_a_wrong_configuration_does_not_warn(self):
        """Problems are raised without warnings beside them."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(problems(LIB_L1_TLL="1", LIB_L1_TTL="0")) == 1

    def test_tls_options_without_tls(self):
        """TLS options that protect nothing are told."""
        assert notes(LIB_REDIS_SSL_CA_CERTS="/ca") == ["LIB_REDIS_SSL_CA_CERTS not used: TLS is off"]
        assert notes(LIB_REDIS_SSL_CA_CERTS="/ca", LIB_REDIS_URL="rediss://h") == []

    @pytest.mark.parametrize(
        "build",
        [
            lambda: CacheConfig(),  # noqa: PLW0108 - a frame of this file
            lambda: load_config({}),
            lambda: CacheConfig.model_validate({}),
        ],
    )
    def test_warnings_point_at_the_caller(self, monkeypatch, build):
        """A warning is attributed to the first frame outside of the package."""
        monkeypatch.setenv("LIB_L1_TLL", "1")
        with pytest.warns(ConfigurationWarning) as caught:
            build()
        assert [__file__] == [one.filename for one in caught]


class TestLocation:
    def test_a_url_from_below_does_not_beat_a_host_from_above(self):
        """Where Redis is comes whole from the highest source that says any of it."""
        assert RedisLocation(host="b") == load({"redis_host": "b"}, LIB_REDIS_URL="redis://a:1/2").redis_location()
        url = load({"redis_url": "redis://a"}, LIB_REDIS_HOST="b", LIB_REDIS_PORT="7")
        assert RedisLocation(host="a") == url.redis_location()
        socket = load({"redis_socket_path": "/s"}, LIB_REDIS_URL="redis://a")
        assert RedisLocation(host="", port=0, socket_path="/s") == socket.redis_location()
        lower = load(None, ("app.conf", {"redis_host": "a", "redis_port": 7}), LIB_REDIS_HOST="b")
        assert RedisLocation(host="b") == lower.redis_location()
        assert lower.source_of("redis_port") == "default"

    def test_a_port_alone_keeps_the_host(self):
        """A port without a host changes the port of the next source's host, and replaces a URL by localhost."""
        config = load({"redis_port": 7}, ("app.conf", {"redis_host": "c"}), LIB_REDIS_HOST="b", LIB_REDIS_PORT="8")
        assert RedisLocation(host="b", port=7) == config.redis_location()
        config = load({"redis_port": 7}, ("app.conf", {"redis_host": "c"}), LIB_REDIS_URL="redis://b")
        assert RedisLocation(port=7).port == config.redis_location().port

    def test_sentinel_settings_from_below(self):
        """What a lower source says about sentinels does not disturb a host from above."""
        source = ("app.conf", {"redis_sentinels": "a", "redis_sentinel_master": "m", "redis_sentinel_password": "p"})
        assert RedisLocation(host="b") == load({"redis_host": "b"}, source).redis_location()
        completed = load({"redis_sentinel_master": "n"}, source).redis_location()
        assert (completed.sentinel_master, completed.sentinel_password) == ("n", "p")

    def test_separate_settings_complete_the_url(self):
        """The URL wins over settings of its own and of lower sources; they fill what it does not say."""
        rest = {"LIB_REDIS_DB": "5", "LIB_REDIS_USERNAME": "u", "LIB_REDIS_PASSWORD": "p", "LIB_REDIS_SSL": "1"}
        filled = load(LIB_REDIS_URL="redis://h", **rest).redis_location()
        assert (5, "u", "p", TlsOptions()) == (filled.db, filled.username, filled.password, filled.tls)
        said = load(LIB_REDIS_URL="redis://v:q@h/2", **rest).redis_location()
        assert (said.db, said.username, said.password) == (2, "v", "q")

    def test_a_higher_source_beats_parts_of_the_url(self):
        """A separate setting from above the URL's source wins over what the URL says."""
        config = load({"redis_db": 5, "redis_password": "p"}, LIB_REDIS_URL="redis://v:q@h/2")
        assert RedisLocation("h", db=5, username="v", password="p") == config.redis_location()

    def test_tls_is_resolved(self):
        """TLS options come from URL and settings; an unchecked certificate implies an unchecked host name."""
        config = load(LIB_REDIS_URL="rediss://h?ssl_cert_reqs=CERT_NONE", LIB_REDIS_SSL_CA_CERTS="/ca")
        assert TlsOptions(ca_certs="/ca", cert_reqs="none", check_hostname=False) == config.redis_location().tls
        config = load({"redis_ssl": True, "redis_ssl_certfile": "/c", "redis_ssl_keyfile": "/k"})
        assert TlsOptions(certfile="/c", keyfile="/k") == config.redis_location().tls
        assert load({"redis_ssl": True, "redis_socket_path": "/s"}).redis_location().tls is None

    def test_sentinels(self):
        """Sentinels, from settings or URL, come with their master and their own credentials."""
        config = load(
            LIB_REDIS_SENTINELS="a:1,b",
            LIB_REDIS_SENTINEL_MASTER="m",
            LIB_REDIS_SENTINEL_USERNAME="su",
            LIB_REDIS_SENTINEL_PASSWORD="sp",
            LIB_REDIS_PASSWORD="p",
            LIB_REDIS_DB="3",
        )
        expected = RedisLocation("", 0, 3, None, "p", None, None, (("a", 1), ("b", 26379)), "m", "su", "sp")
        assert expected == config.redis_location()
        config = load(LIB_REDIS_URL="sentinel://a:1;sentinel://b/3", LIB_REDIS_SENTINEL_MASTER="m")
        assert config.redis_location().sentinels == (("a", 1), ("b", 26379))
        assert (config.redis_location().sentinel_master, config.redis_location().db) == ("m", 3)

    def test_a_cluster(self):
        """One host with the setting, or several in the URL, are nodes of a cluster; the rest is as for any Redis."""
        config = load(LIB_REDIS_HOST="h", LIB_REDIS_CLUSTER="true", LIB_REDIS_PASSWORD="p")
        assert RedisLocation("", 0, password="p", nodes=(("h", 6379),)) == config.redis_location()
        config = load(LIB_REDIS_URL="rediss://u:p@h:1", LIB_REDIS_CLUSTER="1")
        expected = RedisLocation("", 0, username="u", password="p", tls=TLS, nodes=(("h", 1),))
        assert expected == config.redis_location()
        assert load(LIB_REDIS_URL="redis://h:1,i", LIB_REDIS_CLUSTER="0").redis_location().nodes == (
            ("h", 1),
            ("i", 6379),
        )
        with pytest.raises(ConfigurationError, match="several hosts are a cluster's"):
            load({"redis_cluster": False}, LIB_REDIS_URL="redis://h:1,i")


TLS = TlsOptions()
SOCKET = {"host": "", "port": 0, "socket_path": "/run/r.sock"}
URLS = [
    ("redis://", RedisLocation(), "redis://localhost:6379/0"),
    ("redis://h", RedisLocation("h"), "redis://h:6379/0"),
    ("REDIS://h:1/2", RedisLocation("h", 1, 2), "redis://h:1/2"),
    ("redis://h/2?db=3", RedisLocation("h", db=3), "redis://h:6379/3"),
    ("redis://h?virtual_host=4", RedisLocation("h", db=4), "redis://h:6379/4"),
    ("redis://:p@h", RedisLocation("h", password="p"), "redis://:**@h:6379/0"),
    ("redis://u:p%40s%2Fs@h", RedisLocation("h", username="u", password="p@s/s"), "redis://u:**@h:6379/0"),
    ("redis://u:p@s@h", RedisLocation("h", username="u", password="p@s"), "redis://u:**@h:6379/0"),
    ("redis://u@h", RedisLocation("h", username="u"), "redis://**@h:6379/0"),
    ("redis://[::1]:7/1", RedisLocation("::1", 7, 1), "redis://[::1]:7/1"),
    (
        "redis://u:p%2C,q@a:1,[::1]:7,b/0",
        RedisLocation("", 0, username="u", password="p,,q", nodes=(("a", 1), ("::1", 7), ("b", 6379))),
        "redis://u:**@a:1,[::1]:7,b:6379/0",
    ),
    (
        "valkeys://a,b:2?ssl_cert_reqs=none",
        RedisLocation("", 0, tls=TlsOptions(cert_reqs="none", check_hostname=False), nodes=(("a", 6379), ("b", 2))),
        "rediss://a:6379,b:2/0",
    ),
    ("valkey://h", RedisLocation("h"), "redis://h:6379/0"),
    ("valkeys://h", RedisLocation("h", tls=TLS), "rediss://h:6379/0"),
    ("rediss://h", RedisLocation("h", tls=TLS), "rediss://h:6379/0"),
    (
        "rediss://h?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs=%2Fca&ssl_certfile=/c&ssl_keyfile=/k",
        RedisLocation("h", tls=TlsOptions("/ca", "/c", "/k")),
        "rediss://h:6379/0",
    ),
    (
        "rediss://h?ssl_cert_reqs=none",
        RedisLocation("h", tls=TlsOptions(cert_reqs="none", check_hostname=False)),
        "rediss://h:6379/0",
    ),
    (
        "rediss://h?ssl_check_hostname=false",
        RedisLocation("h", tls=TlsOptions(check_hostname=False)),
        "rediss://h:6379/0",
    ),
    ("unix:///run/r.sock", RedisLocation(**SOCKET), "unix:///run/r.sock?db=0"),
    (
        "unix://u:p@/run/r.sock?db=2",
        RedisLocation(**SOCKET, db=2, username="u", password="p"),
        "unix://u:**@/run/r.sock?db=2",
    ),
    ("redis+socket:///run/r.sock?virtual_host=5", RedisLocation(**SOCKET, db=5), "unix:///run/r.sock?db=5"),
    ("socket:///run/r.sock?virtual_host=/5", RedisLocation(**SOCKET, db=5), "unix:///run/r.sock?db=5"),
    (
        "sentinel://:p@a:1;sentinel://[::1]/2?master_name=m",
        RedisLocation("", 0, 2, None, "p", sentinels=(("a", 1), ("::1", 26379)), sentinel_master="m"),
        "sentinel://:**@a:1;sentinel://[::1]:26379/2?master_name=m",
    ),
]


class TestUrls:
    @pytest.mark.parametrize(("url", "location", "shown"), URLS, ids=[url for url, _, _ in URLS])
    def test_each_spelling(self, url, location, shown):
        """Every scheme that redis-py, Celery and Valkey users write names the right Redis, and is shown safely."""
        assert location == parse_redis_url(url)
        assert shown == safe_url(location)
        assert f"<RedisLocation {shown}>" == repr(location)

    @pytest.mark.parametrize(
        ("url", "why"),
        [
            ("h:6379", "must begin with one of"),
            ("amqp://h", "must begin with one of"),
            ("redis://h:0", "needs a port between 1 and 65535"),
            ("redis://h:99999", "needs a port between 1 and 65535"),
            ("redis://h/one", "must end in a database number"),
            ("redis://h/-1", "must end in a database number"),
            ("redis://h/0?protocol=3", "may have only these options"),
            ("redis://h/0?master_name=m", "only after sentinel://"),
            ("redis://h?ssl_cert_reqs=none", "only after rediss://"),
            ("rediss://h?ssl_check_hostname=perhaps", "needs ssl_check_hostname to be true or false"),
            ("unix://run/r.sock", "three slashes"),
            ("redis+socket://", "three slashes"),
            ("sentinel://a;redis://b", "sentinel:// again"),
            ("sentinel://", "must have a host"),
            ("redis://a,,b", "a host before and after each comma"),
            ("redis://:pw@a:1,:pw@b:2", "user and password once, before the first host"),
            ("redis://a,b:x", "needs a port between 1 and 65535"),
            ("redis://h\n", "must not hold spaces"),
        ],
    )
    def test_what_is_not_understood(self, url, why):
        """A URL that means nothing is refused in words that help."""
        with pytest.raises(ConfigurationError, match=why):
            parse_redis_url(url)

    def test_locations_pickle(self):
        """A location is a plain record that survives pickling."""
        location = RedisLocation(password=SECRET, tls=TLS)
        assert location == pickle.loads(pickle.dumps(location))


class Settings(dict):
    """Like app.conf: a mapping whose properties know more than its items."""

    broker_url = "redis://from-the-environment"


def from_celery(**conf):
    """Build a configuration from Celery's settings alone."""
    return load(None, *sources_from_celery(conf))


class TestCelery:
    def test_backend_before_broker(self):
        """The result backend's Redis is taken before the broker's, and named as the source."""
        config = from_celery(result_backend="redis://a:1/2", broker_url="redis://b")
        assert RedisLocation("a", 1, 2) == config.redis_location()
        assert config.source_of("redis_url") == "Celery's result_backend"
        config = from_celery(result_backend="rpc://", broker_url="redis://b")
        assert (config.redis_location().host, config.source_of("redis_url")) == ("b", "Celery's broker_url")

    @pytest.mark.parametrize("url", [None, "", "amqp://", "db+sqlite://", "rpc", [], "myapp.backends:Mine", object()])
    def test_no_redis(self, url):
        """A fleet without Redis gives nothing."""
        assert location_from_celery({"result_backend": url, "broker_url": url}) is None
        assert location_from_celery({}) is None

    @pytest.mark.parametrize(
        "url",
        [["redis://a", "redis://b"], ("redis://a",), "redis://a;redis://b", "redis://a?socket_timeout=5&protocol=3"],
    )
    def test_failover_lists_and_foreign_options(self, url):
        """Of several servers the first is taken; options that only Celery's driver knows are dropped."""
        assert location_from_celery({"broker_url": url}) == {"redis_url": "redis://a"}

    def test_short_name(self):
        """``result_backend = "redis"`` is Celery's short name for a local Redis."""
        assert RedisLocation() == from_celery(result_backend="redis").redis_location()

    def test_tls(self):
        """TLS options of backend and broker are understood with the constants of ssl."""
        options = {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_ca_certs": "/ca", "ssl_keyfile": None}
        expected = TlsOptions(ca_certs="/ca", cert_reqs="none", check_hostname=False)
        assert expected == from_celery(result_backend="redis://a", redis_backend_use_ssl=options).redis_location().tls
        assert expected == from_celery(broker_url="rediss://a", broker_use_ssl=options).redis_location().tls
        assert from_celery(broker_url="redis://a", broker_use_ssl=True).redis_location().tls == TLS
        assert from_celery(result_backend="redis://a", broker_use_ssl=True).redis_location().tls is None

    @pytest.mark.parametrize("value", ["sentinel://:p@a:1;sentinel://b/3", ["sentinel://:p@a:1", "sentinel://b/3"]])
    def test_sentinels(self, value):
        """Sentinels come with master and credentials from the transport options."""
        options = {"master_name": "m", "sentinel_kwargs": {"password": "sp"}}
        location = from_celery(broker_url=value, broker_transport_options=options).redis_location()
        assert RedisLocation("", 0, 3, None, "p", None, None, (("a", 1), ("b", 26379)), "m", None, "sp") == location

    def test_transport_options_without_sentinels(self):
        """Transport options that concern something else are left alone."""
        options = {"master_name": "m", "visibility_timeout": 5}
        assert location_from_celery({"broker_url": "redis://a", "broker_transport_options": options}) == {
            "redis_url": "redis://a"
        }

    def test_properties_of_the_settings_object(self):
        """What only app.conf's properties know (Celery's own variables) is found."""
        assert location_from_celery(Settings()) == {"redis_url": "redis://from-the-environment"}

    def test_all_or_nothing(self):
        """TLS and passwords of Celery's Redis never go to another Redis; without another they may be completed."""
        sources = sources_from_celery(
            {"result_backend": f"rediss://:{SECRET}@a/1", "redis_backend_use_ssl": {"ssl_ca_certs": "/ca"}}
        )
        assert RedisLocation("b") == load(None, *sources, LIB_REDIS_HOST="b").redis_location()
        completed = load({"redis_db": 5}, *sources).redis_location()
        assert (completed.host, completed.db, completed.password) == ("a", 5, SECRET)

    def test_a_wrong_url_is_told_by_its_source(self):
        """A URL of Celery's that is wrong is told under its source, unseen."""
        (found,) = problems(None, *sources_from_celery({"broker_url": f"redis://:{SECRET}@a:99999"}))
        assert found.startswith("redis_url=**: needs a port")
        assert found.endswith("(from Celery's broker_url)")
