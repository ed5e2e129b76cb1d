"""``python -m example_worker.healthcheck``: exit 0 if the heartbeat file is young. Imports nothing but the stdlib.

``SHOP_HEARTBEAT`` names the file (see ``heartbeat.py``); ``SHOP_HEARTBEAT_MAX_AGE`` the seconds it may be old, 20
unless given: four missed touches.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path


def complaint(environ: Mapping[str, str], now: float) -> str | None:
    """Return what is wrong at *now* (seconds since 1970), or None if the worker is well."""
    name = environ.get("SHOP_HEARTBEAT")
    if not name:
        return "SHOP_HEARTBEAT is not set: there is no file to look at"
    limit = float(environ.get("SHOP_HEARTBEAT_MAX_AGE") or 20.0)
    try:
        age = now - Path(name).stat().st_mtime
    except OSError as exc:
        return f"no heartbeat: {exc}"
    return f"the last heartbeat is {age:.0f} s old; {limit:.0f} s are allowed" if age > limit else None


if __name__ == "__main__":
    sys.exit(complaint(os.environ, time.time()))
