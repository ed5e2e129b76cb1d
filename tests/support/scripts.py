"""Python code in an interpreter of its own, under a watchdog that a hung GIL cannot stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

from tests.support import processes


class ScriptError(AssertionError):
    """The child failed or hung; the message holds its output, and after a hang the stacks of all its threads."""


def run_python(
    code: str, *args: str, env: Mapping[str, str] | None = None, timeout: float = 30.0, check: bool = True
) -> str:
    """Run *code* in a fresh interpreter from the repository's root and return its standard output.

    After *timeout* seconds the child gets SIGABRT, which makes faulthandler print every thread's stack, then its
    whole process group gets SIGKILL; that always raises, a non-zero exit code only with *check*.
    """
    paths = os.pathsep.join(filter(None, [str(processes.ROOT), os.environ.get("PYTHONPATH")]))
    full_env = {**os.environ, "PYTHONPATH": paths, **(env or {})}
    with tempfile.TemporaryDirectory(prefix="mlcache-script-") as directory:
        out, err = Path(directory, "stdout"), Path(directory, "stderr")
        command = [sys.executable, "-X", "faulthandler", "-c", dedent(code), *args]
        process = processes.spawn(command, log=out, error_log=err, env=full_env, cwd=processes.ROOT)
        is_hung = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            is_hung = True
            _abort(process)
        finally:
            returncode = processes.kill_group(process)
        stdout, stderr = (path.read_text("utf-8", "replace") for path in (out, err))
    if is_hung or (check and returncode != 0):
        what = f"hung for {timeout:g} s" if is_hung else f"ended with {returncode}"
        raise ScriptError(f"the script {what}\n--- stdout\n{stdout[-4000:]}\n--- stderr\n{stderr[-8000:]}")
    return stdout


def _abort(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
