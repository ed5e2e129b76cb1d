"""``docker-compose.yml`` without an engine: whatever it names must be real. Each rule is also seen to fail."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from celery.bin.beat import beat
from celery.bin.worker import worker

from celery_mlcache.config import CacheConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
Compose = dict[str, Any]
Rule = Callable[[Compose], Iterator[str]]

# Asked in a fresh interpreter, with the service's own environment: what its application is made of.
DESCRIBE = """
import importlib, json, sys
app = importlib.import_module(sys.argv[1]).app
app.loader.import_default_modules()
print(json.dumps({
    "kind": type(app).__name__,
    "tasks": sorted(app.tasks),
    "queues": sorted(app.amqp.queues),
    "beat": sorted(entry["task"] for entry in app.conf.beat_schedule.values()),
    "steps": sorted(step.__name__ for step in app.steps["worker"]),
    "started": "redis" in sys.modules and bool(app.mlcache.is_running),
}))
"""


def environment(service: Compose) -> dict[str, str]:
    """The service's variables, with ``${NAME:-default}`` standing for the default."""
    given = service.get("environment", {})
    return {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for name, value in given.items()}


def is_shop(service: Compose) -> bool:
    """Whether the service runs this checkout."""
    return "build" in service


def commands(compose: Compose) -> Iterator[tuple[str, list[str]]]:
    """Every program of the shop that a service runs: its command, and its health check."""
    for name, service in compose["services"].items():
        if is_shop(service):
            yield name, [str(word) for word in service["command"]]
            if "healthcheck" in service:
                yield name, [str(word) for word in service["healthcheck"]["test"][1:]]


def waits_for_what_can_be_healthy(compose: Compose) -> Iterator[str]:
    """Whatever is depended on is a service, has a health check, and is waited for until that passes."""
    services = compose["services"]
    for name, service in services.items():
        for target, how in service.get("depends_on", {}).items():
            if target not in services:
                yield f"{name} depends on {target}, which is no service"
            elif how["condition"] != "service_healthy" or "healthcheck" not in services[target]:
                yield f"{name} does not wait until {target} is healthy"


def checks_health_cheaply(compose: Compose) -> Iterator[str]:
    """Health checks are programs with their times said; none of them asks over the broker."""
    for name, service in compose["services"].items():
        check = service.get("healthcheck")
        if check is not None:
            if check["test"][0] != "CMD" or not {"interval", "timeout", "retries"} <= check.keys():
                yield f"{name}: the health check is not a CMD with interval, timeout and retries"
            if "inspect" in check["test"]:
                yield f"{name}: celery inspect costs seconds of CPU a time"


def names_images_exactly(compose: Compose) -> Iterator[str]:
    """Images, also those built upon, carry at least a minor version."""
    for name, service in compose["services"].items():
        for image in dockerfile_words(service, "FROM") if is_shop(service) else [service["image"]]:
            if not re.search(r":\d+\.\d+[\w.-]*$", image):
                yield f"{name}: the image {image} is not pinned to a minor version"
        if service["image"].endswith(":latest"):
            yield f"{name}: latest is no version"


def builds_from_files_that_exist(compose: Compose) -> Iterator[str]:
    """The Dockerfile and all it copies are in the checkout."""
    for name, service in compose["services"].items():
        if is_shop(service):
            if not dockerfile(service).is_file():
                yield f"{name}: there is no {dockerfile(service)}"
                continue
            for source in dockerfile_words(service, "COPY"):
                if not (context(service) / source).exists():
                    yield f"{name}: the Dockerfile copies {source}, which does not exist"


def context(service: Compose) -> Path:
    """The folder that an image is built from."""
    return ROOT / service["build"]["context"]


def dockerfile(service: Compose) -> Path:
    """The path of a service's Dockerfile."""
    return context(service) / service["build"]["dockerfile"]


def dockerfile_words(service: Compose, instruction: str) -> list[str]:
    """What FROM, USER or COPY name; COPY's last word is its destination."""
    path = dockerfile(service)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [line.split()[1:] for line in lines if line.startswith(instruction + " ")]
    return [word for words in found for word in (words[:-1] if instruction == "COPY" else words)]


def runs_as_nobody_special(compose: Compose) -> Iterator[str]:
    """No service runs as root."""
    for name, service in compose["services"].items():
        users = (
            [service["user"]] if "user" in service else dockerfile_words(service, "USER") if is_shop(service) else []
        )
        if not users or str(users[-1]).partition(":")[0] in {"root", "0"}:
            yield f"{name} runs as root"


def publishes_on_loopback_only(compose: Compose) -> Iterator[str]:
    """Ports are published on 127.0.0.1."""
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port)):
                yield f"{name} publishes {port} to the world"


def mounts_what_exists(compose: Compose) -> Iterator[str]:
    """Volumes are declared, and mounted paths are there."""
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = str(volume).partition(":")[0]
            is_path = source.startswith((".", "/"))
            if not ((ROOT / source).exists() if is_path else source in compose["volumes"]):
                yield f"{name} mounts {source}, which does not exist"


def ends_tidily(compose: Compose) -> Iterator[str]:
    """Processes are reaped, have time to end, and logs are limited."""
    for name, service in compose["services"].items():
        if service.get("init") is not True or service.get("stop_grace_period") != "60s":
            yield f"{name} has no init, or no minute to end in"
        logging = service.get("logging", {})
        if logging.get("driver") != "json-file" or not {"max-size", "max-file"} <= logging.get("options", {}).keys():
            yield f"{name}: its log can fill the disk"


def sets_only_what_is_read(compose: Compose) -> Iterator[str]:
    """Each variable is a setting of the cache, whose value it takes without a word, or read by the shop."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "example_worker").glob("*.py"))
    known = {f"LIB_{field.upper()}" for field in CacheConfig.model_fields}
    for name, service in compose["services"].items():
        if is_shop(service):
            variables = environment(service)
            for variable in variables:
                is_known = variable in known if variable.startswith("LIB_") else f'"{variable}"' in sources
                if not is_known:
                    yield f"{name} sets {variable}, which nothing reads"
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                load_config({}, environ=variables)
            yield from (f"{name}: {warning.message}" for warning in told)


def speaks_to_servers_that_exist(compose: Compose) -> Iterator[str]:
    """The hosts in variables are services, and the broker's password is the one given to it."""
    services = compose["services"]
    for name, service in services.items():
        if is_shop(service):
            variables = environment(service)
            hosts = {variables["LIB_REDIS_HOST"]}
            hosts |= {urlsplit(variables[url]).hostname for url in ("SHOP_BROKER_URL", "SHOP_RESULT_BACKEND")} - {None}
            for host in hosts - services.keys():
                yield f"{name} speaks to {host}, which is no service"
    given = environment(services["broker"])
    login = urlsplit(environment(services["caller"])["SHOP_BROKER_URL"])
    if (login.username, login.password) != (given["RABBITMQ_DEFAULT_USER"], given["RABBITMQ_DEFAULT_PASS"]):
        yield "the caller does not know the broker's password"


def evicts_from_the_cache_and_nowhere_else(compose: Compose) -> Iterator[str]:
    """A Redis evicts if it is the cache, and never if it holds messages or results."""
    variables = environment(compose["services"]["caller"])
    keepers = {urlsplit(variables[url]).hostname for url in ("SHOP_BROKER_URL", "SHOP_RESULT_BACKEND")}
    for name, service in compose["services"].items():
        if not service["image"].startswith(("redis:", "valkey")):
            continue
        words = [str(word) for word in service["command"]]
        options = {word: words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}
        policy = options.get("--maxmemory-policy", "noeviction")
        if name in keepers and policy != "noeviction":
            yield f"{name} holds messages or results and may evict them ({policy})"
        if name == variables["LIB_REDIS_HOST"] and (policy != "allkeys-lfu" or "--maxmemory" not in options):
            yield f"{name} is the cache and must evict by use within a limit, not {policy}"


def runs_programs_that_exist(compose: Compose) -> Iterator[str]:
    """Modules can be found, and Celery's commands have the options they are given."""
    for name, words in commands(compose):
        match words:
            case ["python", "-m", module, *_] if importlib.util.find_spec(module):
                continue
            case ["celery", "-A", module, ("worker" | "beat") as kind, *rest] if importlib.util.find_spec(module):
                known = {option for param in {"worker": worker, "beat": beat}[kind].params for option in param.opts}
                given = {word.partition("=")[0] for word in rest if word.startswith("-")}
                for option in sorted(given - known):
                    yield f"{name}: celery {kind} has no option {option}"
            case _:
                yield f"{name}: cannot run {' '.join(words)}"


RULES: list[Rule] = [
    waits_for_what_can_be_healthy,
    checks_health_cheaply,
    names_images_exactly,
    builds_from_files_that_exist,
    runs_as_nobody_special,
    publishes_on_loopback_only,
    mounts_what_exists,
    ends_tidily,
    sets_only_what_is_read,
    speaks_to_servers_that_exist,
    evicts_from_the_cache_and_nowhere_else,
    runs_programs_that_exist,
]


@pytest.fixture(scope="module")
def shipped() -> Compose:
    """The file as it is shipped."""
    found: Compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_shipped_file_breaks_no_rule(shipped: Compose, rule: Rule) -> None:
    """Every service, path, variable and program in the file is real, and nothing in it is careless."""
    assert list(rule(shipped)) == []


def test_the_fleet_is_whole(shipped: Compose) -> None:
    """There are a cache, a broker of its own, two workers, beat and a caller, and workers are checked by file age."""
    services = shipped["services"]
    assert {"redis-cache", "broker", "worker-a", "worker-b", "beat", "caller"} <= services.keys()
    for name in ("worker-a", "worker-b"):
        assert services[name]["healthcheck"]["test"][1:] == ["python", "-m", "example_worker.healthcheck"]
        assert environment(services[name])["SHOP_HEARTBEAT"]


@pytest.mark.parametrize("name", ["worker-a", "worker-b", "beat"])
def test_the_named_application_is_one(shipped: Compose, name: str) -> None:
    """What ``-A`` names is a Celery app with the shop's tasks, queue and heartbeat, and importing it starts nothing."""
    service = shipped["services"][name]
    words = [str(word) for word in service["command"]]
    env = {**os.environ, **environment(service), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", DESCRIBE, words[words.index("-A") + 1]]
    found = json.loads(subprocess.run(argv, env=env, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    assert found["kind"] == "Celery"
    assert {"shop.quote", "shop.exchange_rate", "shop.price_cart", "shop.change_price"} <= set(found["tasks"])
    assert found["beat"]
    assert set(found["beat"]) <= set(found["tasks"])
    wanted = words[words.index("-Q") + 1].split(",") if "-Q" in words else ["shop"]
    assert set(wanted) <= set(found["queues"])
    assert "HeartbeatFile" in found["steps"]
    assert found["started"] is False


def _changed(path: str, value: object) -> Callable[[Compose], None]:
    """Set what *path* names, its parts joined by ``/``; None removes it."""

    def change(compose: Compose) -> None:
        *parents, last = path.split("/")
        place: Any = compose
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return change


BROKEN = [
    (waits_for_what_can_be_healthy, _changed("services/redis-cache/healthcheck", None)),
    (waits_for_what_can_be_healthy, _changed("services/worker-a/depends_on/nobody", {"condition": "service_healthy"})),
    (waits_for_what_can_be_healthy, _changed("services/caller/depends_on/worker-a/condition", "service_started")),
    (checks_health_cheaply, _changed("services/worker-a/healthcheck/test", ["CMD", "celery", "inspect", "ping"])),
    (checks_health_cheaply, _changed("services/broker/healthcheck/interval", None)),
    (names_images_exactly, _changed("services/redis-cache/image", "redis:latest")),
    (names_images_exactly, _changed("services/redis-cache/image", "redis:8-alpine")),
    (names_images_exactly, _changed("services/caller/image", "mlcache-shop:latest")),
    (builds_from_files_that_exist, _changed("services/beat/build/dockerfile", "Dockerfile")),
    (builds_from_files_that_exist, _changed("services/beat/build/context", "example_worker")),
    (runs_as_nobody_special, _changed("services/broker/user", None)),
    (runs_as_nobody_special, _changed("services/worker-a/user", "root")),
    (publishes_on_loopback_only, _changed("services/broker/ports/0", "15672:15672")),
    (publishes_on_loopback_only, _changed("services/redis-cache/ports/0", "0.0.0.0:6390:6379")),
    (mounts_what_exists, _changed("volumes", {})),
    (mounts_what_exists, _changed("services/caller/volumes", ["./no-such-folder:/data"])),
    (ends_tidily, _changed("services/beat/init", None)),
    (ends_tidily, _changed("services/caller/logging/options", {})),
    (sets_only_what_is_read, _changed("services/worker-a/environment/LIB_L1_TLL", "5")),
    (sets_only_what_is_read, _changed("services/worker-a/environment/SHOP_COLOUR", "blue")),
    (speaks_to_servers_that_exist, _changed("services/worker-b/environment/LIB_REDIS_HOST", "redis")),
    (speaks_to_servers_that_exist, _changed("services/caller/environment/SHOP_BROKER_URL", "amqp://a:b@rabbit//")),
    (speaks_to_servers_that_exist, _changed("services/broker/environment/RABBITMQ_DEFAULT_PASS", "other")),
    (
        evicts_from_the_cache_and_nowhere_else,
        _changed("services/caller/environment/SHOP_BROKER_URL", "redis://redis-cache:6379/0"),
    ),
    (evicts_from_the_cache_and_nowhere_else, _changed("services/redis-cache/command", ["redis-server"])),
    (runs_programs_that_exist, _changed("services/caller/command", ["python", "-m", "example_worker.nobody"])),
    (runs_programs_that_exist, _changed("services/beat/command", ["celery", "-A", "example_worker.nobody", "beat"])),
    (runs_programs_that_exist, _changed("services/worker-a/command/6", "--colour")),
]


@pytest.mark.parametrize(("rule", "spoil"), BROKEN)
def test_a_broken_file_is_found_out(shipped: Compose, rule: Rule, spoil: Callable[[Compose], None]) -> None:
    """A file spoilt in one place breaks the rule that guards that place."""
    # Through JSON, since YAML's anchors make services share their parts.
    spoilt = json.loads(json.dumps(shipped))
    spoil(spoilt)
    assert list(rule(spoilt))


def test_every_rule_was_seen_to_fail() -> None:
    """No rule is trusted that no broken file has tried."""
    assert {rule for rule, _ in BROKEN} == set(RULES)
