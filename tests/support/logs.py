"""The logs of the processes a test starts: shown when it fails, deleted when it is over."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

_watched: dict[Path, tuple[str, Callable[[], bool]]] = {}


def new_log(label: str, is_running: Callable[[], bool]) -> Path:
    """Return a new, empty file whose tail is shown with every failure while its process runs, and in its last test."""
    with tempfile.NamedTemporaryFile(prefix="mlcache-log-", suffix=".txt", delete=False) as file:
        path = Path(file.name)
    _watched[path] = (label, is_running)
    return path


def delete_finished() -> None:
    """Delete the logs of processes that have ended; called after each test."""
    for path, (_, is_running) in list(_watched.items()):
        if not is_running():
            del _watched[path]
            path.unlink(missing_ok=True)


def tail(path: Path, lines: int = 25) -> str:
    """Return the last *lines* of a file."""
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:])


def tails() -> list[tuple[str, str]]:
    """Return ``(label, tail)`` of each log that holds anything."""
    return [(label, text) for path, (label, _) in _watched.items() if (text := tail(path))]
