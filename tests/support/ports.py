"""Free ports of 127.0.0.1, to be used by a server that may go and come back."""

from __future__ import annotations

import random
import socket

HOST = "127.0.0.1"
_RANGE = range(20_000, 32_000)
_random = random.SystemRandom()  # pytest-randomly seeds the module's generator: parallel runs would pick alike


def free_port() -> int:
    """Return a port nobody listens on now; the caller retries when it loses the race for it.

    Not from bind(0): that gives a port of the ephemeral range, where a client that keeps calling a stopped server
    can end up connected to itself, and then the server cannot come back on its port.
    """
    for port in _random.sample(_RANGE, 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port among 200 tried")
