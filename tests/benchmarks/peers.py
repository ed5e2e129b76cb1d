"""``make bench ARGS=peers``: what celery_mlcache, plain Celery and the peers do in the same scenarios, as a table.

How. Each peer is installed into a throw-away environment (the project depends on none of them) with the Celery and
redis-py that are installed here, and gets a Redis and two worker nodes of two prefork children of its own. Its callers
(``peers/driver.py``) and tasks (``peers/fleet.py``) run in that environment. Of a peer that does not install or import
beside this Celery the table has the error; jobtastic, which needs Celery < 5, then runs on that, where a Python is
found that can (``PEERS_OLD_PYTHON`` names one).

Without names all are run and ``PEERS.md`` is written; ``ARGS="peers singleton mlcache"`` runs some and prints only.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.crew import load
from tests.support import logs, processes
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "peers"
TABLE = HERE / "PEERS.md"
AT_ONCE = 3  # peers, each with a Redis and two nodes
NODES = CHILDREN = 2
PATIENCE = 600.0  # seconds for all scenarios of one peer
OLD_PYTHONS = ("python3.10", "python3.9")

TITLES = {
    "twice": "the same call, half a second after the first was answered",
    "right_away": "20 times: a call, and the same call as soon as that was answered",
    "crowd": "20 identical calls at once (1 s each; 4 calling and 4 working processes)",
    "spelling": "executions of `f(1)`, `f(x=1)`, `f(1, y=2)` with 2 the default",
    "sequence": "executions of `f((1, 2))`, `f([1, 2])`",
    "ignored": "executions of two calls that differ in an argument to be ignored",
    "in_group": "a group with two equal members",
    "in_chord": "a chord with two equal members in its header",
    "bind": "executions of a `bind=True` task called twice",
    "direct": "`f(x)` called directly after `f.delay(x)` was answered",
    "raised": "the task raised; the same call again",
    "expired": "the same call again within the result's life, and after it",
    "lost": "the result backend has lost the first call's result; the same call again",
    "forgotten": "make one call's result anew",
    "overlong": "an execution of 12 s; the same call after 11 s",
    "killed": "SIGKILL of the child during the execution; the same call again",
    "limit": "hard time limit during the execution; the same call again",
    "revoked": "`revoke(terminate=True)` during the execution; the same call again",
    "node_killed": "SIGKILL of the whole node during the execution; the same call again a second later",
}


INTRODUCTION = """\
# Peers, side by side

Written by `make bench ARGS=peers` on {date}; do not edit. Every cell is what one run of real workers did. Each column
has a Redis of its own as broker, result backend and store, and two nodes of two prefork children, prefetch 1.
Executions are counted in Redis by the task itself; *value of run 2* is what the second execution of that call returned.
Every wait is bounded: a caller waits 10 s for a result, a call whose execution died is repeated for 30 s.

celery-once and celery-singleton are locks, not caches: they promise that a call is not queued twice at one time. To
store nothing is no fault of theirs. Plain Celery is the baseline.
"""


REASONS = """\
## Why (from their sources, not measured)

- celery-once and celery-singleton give their lock back after the result is stored (`after_return`, `on_success`): a
  call that comes between meets the lock of a call that is over. Nothing gives it back where the process died, or where
  `revoke` ended it.
- Groups and chords wait for the task ids they have chosen themselves. Who answers a member with another task's id
  leaves them waiting for one that nobody will ever store.
- jobtastic looks whether the call is under way, then locks, and does not look again: callers that lock one after the
  other all send. Its key is made of keyword arguments only. What it keeps is the id of a task, not the value.
- The first caller of a node that was killed hangs in every column: that is Celery's own, without `acks_late`.
- celery_mlcache sends a message for each call and lets those that came later wait in their workers, so that groups,
  chords and callbacks get results of their own; the price is the messages, and workers that wait. After a death it
  waits until the lease has lapsed (`single_flight_lease`, 5 s), which plain Celery, where nobody waits for anybody,
  does not. `coalesce=True` joins a call only once its message is out, so calls of several processes at the same moment
  are not all joined; and a message that was lost before a worker began with it is joined for up to a minute.
"""


@dataclass(frozen=True)
class Peer:
    """One column of the table, or a variant that shows where it differs from its column."""

    name: str
    title: str
    options: str
    packages: Sequence[str] = ()  # none: this project's own environment
    forced: Sequence[str] = ()  # what it needs beside itself when its requirements are ignored
    old: Sequence[str] = ()  # what it needs on an old Python
    column: str = ""  # of which it is a variant


PEERS = (
    Peer("plain", "plain Celery", "no options"),
    Peer("mlcache", "celery_mlcache", "`@cached_task(ttl=60)`, 2 s where the life is to end; `ignore=[...]` to ignore"),
    Peer(
        "mlcache-coalesce",
        "producer, coalesce",
        "the same with `producer=True, coalesce=True`, which spare messages",
        column="mlcache",
    ),
    Peer(
        "once",
        "celery-once",
        "`QueueOnce` with `default_timeout` 3600 s, as its README sets it up; `once={'keys': [...]}` to ignore",
        ["celery-once==3.0.1"],
    ),
    Peer("once-graceful", "graceful", "the same with `graceful: True`", ["celery-once==3.0.1"], column="once"),
    Peer(
        "singleton",
        "celery-singleton",
        "`Singleton`, and `clear_locks` at `worker_ready`, as its README has it; `unique_on` to ignore",
        ["celery-singleton==0.3.1"],
    ),
    Peer(
        "singleton-expiry",
        "lock_expiry",
        "the same with `singleton_lock_expiry` 10 s: its README wants slightly more than the task takes, here 1 s",
        ["celery-singleton==0.3.1"],
        column="singleton",
    ),
    Peer(
        "jobtastic",
        "jobtastic",
        "`herd_avoidance_timeout` 60 s, `cache_duration` 60 s (2 s where the life is to end), `significant_kwargs` x",
        ["jobtastic==2.1.1"],
        forced=["psutil"],
        old=["celery<5", "redis<4", "setuptools<70", "wheel"],
    ),
)


@dataclass
class Findings:
    """What became of one peer."""

    peer: Peer
    versions: str = ""
    trouble: list[str] = field(default_factory=list)  # why it did not run, or not as it should
    cells: dict[str, str] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


# --- environments ---------------------------------------------------------------------------------------------------


class Environment:
    """A virtual environment in a directory that the caller deletes."""

    def __init__(self, directory: Path, base: str = sys.executable) -> None:
        subprocess.run([base, "-m", "venv", str(directory)], check=True, capture_output=True, timeout=120)
        self.python = str(directory / "bin" / "python")

    def install(self, *arguments: str) -> str:
        """Install with pip; return what is wrong in a line, or an empty string."""
        command = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        return "" if done.returncode == 0 else _pip_trouble(done.stdout + done.stderr)

    def trouble_importing(self, module: str) -> str:
        """Import a module; return the last line of the traceback, or an empty string."""
        command = [self.python, "-W", "ignore", "-c", f"import {module}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        return "" if done.returncode == 0 else _without_paths(done.stderr.strip().splitlines()[-1])

    def versions(self, names: Sequence[str]) -> str:
        """Return ``name version`` of each distribution that is there, and the Python."""
        return versions_in(self.python, names)


def versions_in(python: str, names: Sequence[str]) -> str:
    """Return ``name version`` of each distribution that *python* has, and its own."""
    code = (
        "import sys, platform\nfrom importlib.metadata import version\n"
        "print('Python', platform.python_version(), end='')\n"
        "for name in sys.argv[1:]: print(',', name, version(name), end='')"
    )
    done = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


def _pip_trouble(output: str) -> str:
    lines = output.splitlines()
    if "The conflict is caused by:" in lines:
        found = [line.strip() for line in lines if " depends on " in line and not line.startswith("Collecting")]
    else:
        found = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return _without_paths("; ".join(found) or "pip failed without a message")


def _without_paths(text: str) -> str:
    """Say the same on every machine."""
    return re.sub(r"\s*\(?(?:file://)?/[^\s()]+\)?", "", text)


def old_python() -> str | None:
    """Return a Python before 3.11 that works, or None."""
    beside = sorted(Path(sys.base_prefix).parent.glob("3.10*/bin/python3.10"))
    found = [os.environ.get("PEERS_OLD_PYTHON"), *map(shutil.which, OLD_PYTHONS), *map(str, beside)]
    for candidate in filter(None, found):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([candidate, "-c", "import venv"], check=True, capture_output=True, timeout=20)
            return candidate
    return None


def prepare(peer: Peer, directory: Path, findings: Findings) -> str | None:
    """Return the Python to run the peer with; None, with the reasons in *findings*, if there is none."""
    if not peer.packages:
        names = ["celery", "redis"] + ["celery-mlcache"] * peer.name.startswith("mlcache")
        findings.versions = versions_in(sys.executable, names)
        return sys.executable
    name = peer.packages[0].partition("==")[0]
    module = name.replace("-", "_")
    ours = [f"celery=={version('celery')}", f"redis=={version('redis')}", "packaging"]
    environment = Environment(directory / "new")
    wrong = environment.install(*ours, *peer.packages)
    if wrong:
        findings.trouble.append(f"does not install beside celery {version('celery')}: {wrong}")
        wrong = environment.install(*ours, *peer.forced) or environment.install("--no-deps", *peer.packages)
        wrong = wrong or environment.trouble_importing(module)
        findings.trouble.append(f"installed all the same, `import {module}`: {wrong or 'works'}")
    else:
        wrong = environment.trouble_importing(module)
        if wrong:
            findings.trouble.append(f"does not import with celery {version('celery')}: {wrong}")
    if wrong and peer.old:
        environment, wrong = _with_old_python(peer, directory, module, findings)
    if wrong:
        return None
    findings.versions = environment.versions([name, "celery", "redis"])
    return environment.python


def _with_old_python(peer: Peer, directory: Path, module: str, findings: Findings) -> tuple[Environment, str]:
    base = old_python()
    environment = Environment(directory / "old", base or sys.executable)
    wrong = environment.install(*peer.old) or environment.install("--no-build-isolation", *peer.old, *peer.packages)
    wrong = wrong or environment.trouble_importing(module)
    wanted = ", ".join(peer.old[:1])
    if wrong:
        where = "" if base else f" on Python {platform.python_version()} (no older one found)"
        findings.trouble.append(f"with {wanted}{where}: {wrong}")
    else:
        findings.trouble.append(f"what the table shows of it was run with {wanted} on an older Python")
    return environment, wrong


# --- running --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def node(python: str, name: str, env: Mapping[str, str]) -> Iterator[None]:
    """Run one worker node until the block ends."""
    command = [python, "-W", "ignore", "-m", "celery", "-A", "fleet", "worker", "-l", "INFO", "-n", f"{name}@%h"]
    command += ["--pool", "prefork", "--concurrency", str(CHILDREN)]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    is_over = False
    log = logs.new_log(f"worker {name}", lambda: not is_over)
    process = processes.spawn(command, log=log, env=env, cwd=SCRIPTS)

    def is_ready() -> bool:
        assert process.poll() is None, f"worker {name} ended:\n{logs.tail(log)}"
        return f"{name}@" in (text := log.read_text("utf-8", "replace")) and " ready." in text

    try:
        wait_until(is_ready, 60, f"worker {name}", pause=0.1)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        processes.kill_group(process)
        is_over = True


def play(findings: Findings, python: str, scenarios: Sequence[str] = ()) -> None:
    """Run a peer's scenarios; what they found, or how far they came, is in *findings*."""
    with RedisServer() as server, contextlib.ExitStack() as stack:
        env = {
            **os.environ,
            "PEER": findings.peer.name,
            "PEER_REDIS": f"redis://{server.host}:{server.port}",
            "PYTHONPATH": str(SCRIPTS),
            "PYTHONDONTWRITEBYTECODE": "1",
            "C_FORCE_ROOT": "1",
            "NO_COLOR": "1",
        }
        for number in range(NODES):
            stack.enter_context(node(python, f"{findings.peer.name}-{number}", env))
        command = [python, "-W", "ignore", str(SCRIPTS / "driver.py"), *scenarios]
        output = logs.new_log(f"callers of {findings.peer.name}", lambda: callers.poll() is None)
        errors = logs.new_log(f"errors of {findings.peer.name}", lambda: callers.poll() is None)
        callers = processes.spawn(command, log=output, error_log=errors, env=env, cwd=SCRIPTS)
        try:
            callers.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            findings.trouble.append(f"its callers had not come to an end after {PATIENCE:g} s")
        finally:
            processes.kill_group(callers)
        for line in output.read_text("utf-8").splitlines():
            found = json.loads(line)
            findings.cells[found["scenario"]] = found["cell"]
            findings.figures[found["scenario"]] = found["figures"]
        if callers.returncode:
            last = _without_paths(logs.tail(errors, 1)) or f"exit code {callers.returncode}"
            findings.trouble.append(f"its callers ended early: {last}")


def examine(peer: Peer, scenarios: Sequence[str]) -> Findings:
    """Install and run one peer; whatever goes wrong is part of what is found."""
    findings, began = Findings(peer), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mlcache-peer-") as directory:
        try:
            python = prepare(peer, Path(directory), findings)
            if python is not None:
                play(findings, python, scenarios)
        except Exception as exc:
            findings.trouble.append(_without_paths(f"{type(exc).__name__}: {exc}"))
    print(f"{peer.name}: {len(findings.cells)} scenarios in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return findings


# --- the table ------------------------------------------------------------------------------------------------------


def render(found: Sequence[Findings]) -> str:
    """Return the whole of PEERS.md."""
    columns = [each for each in found if not each.peer.column and each.cells]
    variants = [each for each in found if each.peer.column and each.cells]
    lines = [
        INTRODUCTION.format(date=time.strftime("%Y-%m-%d")),
        "## Who ran, and how",
        "",
        "| | versions | options | trouble |",
        "|---|---|---|---|",
        *map(_who, found),
        "",
        "## What they did",
        "",
        "| | " + " | ".join(each.peer.title for each in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(_row(key, columns, variants) for key in TITLES if any(key in each.cells for each in columns)),
        "",
        REASONS,
        "## Where a peer, or plain Celery, did better than celery_mlcache",
        "",
        "Computed from the figures of this run: less is better in all of them; a difference under a fifth of a second",
        "or a fifth of the figure is left out.",
        "",
        *_losses(found),
        "",
        "And by its kind, not by a figure: a lock at the caller tells the caller at once that it is not alone",
        "(`AlreadyQueued`, the same task id); what must not run twice *for its side effects* wants that, not a cache.",
    ]
    return "\n".join(lines) + "\n"


def _who(findings: Findings) -> str:
    trouble = "; ".join(findings.trouble) or "none"
    cells = [_full_title(findings.peer), findings.versions or "not run", findings.peer.options, trouble]
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _row(key: str, columns: Sequence[Findings], variants: Sequence[Findings]) -> str:
    cells = []
    for column in columns:
        cell = column.cells.get(key, "not reached")
        for variant in variants:
            other = variant.cells.get(key, "not reached")
            if variant.peer.column == column.peer.name and not _is_alike(cell, other):
                cell += f"<br>*{variant.peer.title}*: {other}"
        cells.append(_cell(cell))
    return f"| {TITLES[key]} | " + " | ".join(cells) + " |"


def _is_alike(one: str, other: str) -> bool:
    """Whether two cells say the same but for numbers of attempts, and times that are less than a second apart."""
    time_of = re.compile(r"(\d+\.\d+) s")
    blur = re.compile(r"\d+\.\d+ s|of \d+ calls")
    times = zip(time_of.findall(one), time_of.findall(other), strict=False)
    return blur.sub("", one) == blur.sub("", other) and all(abs(float(a) - float(b)) < 1 for a, b in times)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _column_title(peer: Peer) -> str:
    return next(each.title for each in PEERS if each.name == peer.column)


def _losses(found: Sequence[Findings]) -> list[str]:
    lines = []
    for ours in found:
        if not ours.peer.name.startswith("mlcache"):
            continue
        for key, figures in ours.figures.items():
            for name, own in figures.items():
                better = [
                    f"{_full_title(other.peer)} {figure:g}"
                    for other in found
                    if not other.peer.name.startswith("mlcache")
                    and (figure := other.figures.get(key, {}).get(name)) is not None
                    and own - figure > max(0.2, 0.2 * figure)
                ]
                if better:
                    who = _full_title(ours.peer)
                    lines.append(f"- {TITLES[key]}: {name}: {who} {own:g}; {', '.join(better)}")
    return lines or ["- nowhere, in this run"]


def _full_title(peer: Peer) -> str:
    return f"{_column_title(peer)} *{peer.title}*" if peer.column else peer.title


def main() -> int:
    """Run the peers; print the table, and write it if all were asked for; exit 0."""
    names = [name for name in sys.argv[1:] if name in {peer.name for peer in PEERS}]
    scenarios = [name for name in sys.argv[1:] if name in TITLES]
    unknown = set(sys.argv[1:]) - {*names, *scenarios}
    if unknown:
        known = ", ".join([*(peer.name for peer in PEERS), *TITLES])
        print(f"unknown: {', '.join(sorted(unknown))}; there are {known}")
        return 2
    chosen = [peer for peer in PEERS if not names or peer.name in names]
    print(load(), file=sys.stderr)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda peer: examine(peer, scenarios), chosen))
    logs.delete_finished()  # here, because it is not for several threads
    text = render(found)
    print(text)
    if not sys.argv[1:]:
        TABLE.write_text(text, "utf-8")
        print(f"written: {TABLE.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
