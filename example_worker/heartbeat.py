"""A file that a living worker touches: its age says how long ago the worker's main loop last turned.

``celery inspect ping`` starts an interpreter and asks over the broker, seconds of CPU each time; reading the age of a
file costs nothing, and a worker that hangs lets it grow old. The file is named by ``SHOP_HEARTBEAT``; no name, no file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from celery import Celery, bootsteps

INTERVAL: Final = 5.0  # seconds between two touches


class HeartbeatFile(bootsteps.StartStopStep):
    """Touches the file from the worker's own timer, in the main process; removes it when the worker stops."""

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.path = heartbeat_path()
        self.enabled = self.path is not None
        self._timer: Any = None

    def start(self, worker: Any) -> None:
        """Begin to touch the file."""
        touch()
        self._timer = worker.timer.call_repeatedly(INTERVAL, touch)

    def stop(self, worker: Any) -> None:  # noqa: ARG002 - celery's signature
        """End it: a stopped worker is not healthy."""
        if self._timer is not None:
            self._timer.cancel()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def heartbeat_path() -> Path | None:
    """Return the file's path, or None if ``SHOP_HEARTBEAT`` names none."""
    name = os.environ.get("SHOP_HEARTBEAT")
    return Path(name) if name else None


def touch() -> None:
    """Make the file new; does nothing if it has no name."""
    path = heartbeat_path()
    if path is not None:
        path.touch()


def install_heartbeat(app: Celery) -> None:
    """Give every worker of *app* a heartbeat file."""
    app.steps["worker"].add(HeartbeatFile)
