"""Child processes that cannot outlive the test run, and questions about processes (answered from /proc)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SESSION_MARK = "MLCACHE_TEST_SESSION"  # in the environment of everything a test run starts, however deep

# PR_SET_PDEATHSIG is set by an exec wrapper, not a preexec_fn: that would fork in Python, run the at-fork hooks of
# the code under test in the test process, and warn on 3.12 as soon as a thread runs.
_LEASH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone already")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def spawn(
    args: Sequence[str],
    *,
    log: Path,
    error_log: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start *args* in a session of its own; it is killed when the calling thread ends, at the latest.

    Both outputs go to *log*, or errors to *error_log*.

    The kernel sends the signal at the end of the *thread* that called: do not spawn from a short-lived one.
    """
    leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *args]
    with log.open("ab") as out, (error_log or log).open("ab") as err:
        return subprocess.Popen(
            leash, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=cwd, start_new_session=True
        )


def signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    """Send *signum* to the whole process group of a spawned process, gone or not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def kill_group(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL the whole group, reap the leader and return its exit code."""
    signal_group(process, signal.SIGKILL)
    return process.wait(10)


def is_alive(pid: int) -> bool:
    """Whether *pid* runs or could run (a zombie does not)."""
    return _state_and_parent(pid)[0] not in "ZX"


def children_of(pid: int) -> list[int]:
    """Return the pids of the direct children that are alive, oldest first."""
    found = []
    for each in _pids():
        state, parent = _state_and_parent(each)
        if parent == pid and state not in "ZX":
            found.append(each)
    return sorted(found)


def command_of(pid: int) -> str:
    """Return the command line, shortened, or an empty string."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()[:200]
    except OSError:
        return ""


def left_behind(mark: str) -> list[int]:
    """Return what is still alive of a test run: this process's children, and what carries *mark*, or one made of it."""
    marker = f"{SESSION_MARK}={mark}".encode()
    found = set(children_of(os.getpid()))
    for pid in _pids():
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if any(each.startswith(marker) for each in environ) and is_alive(pid):
                found.add(pid)
    return sorted(pid for pid in found - {os.getpid()} if "resource_tracker" not in command_of(pid))


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _state_and_parent(pid: int) -> tuple[str, int]:
    """Return the state letter and the parent; ("X", 0) for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0
    return fields[0], int(fields[1])
