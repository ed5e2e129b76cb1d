"""A witness of all that a Redis server executes, in its order: ``MONITOR``, in a process of its own.

As a program (``python -m tests.support.monitor PORT FILE``) it appends one line for each command that changes or
announces something, with the CLOCK_MONOTONIC of its arrival, and attaches again whenever the server comes back.
MONITOR shows what scripts do command by command, scripts are never mixed with others, and the order of the lines is
the order of execution. Nothing here passes through a proxy.

The time of arrival is an upper bound for the time of execution that needs no clock of another machine; the server's
own time in the line, less a margin, is a lower one.
"""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import logs, processes
from tests.support.ports import HOST
from tests.support.waiting import wait_until

ATTACHED = "attached"
_NOISE = frozenset(
    b"GET MGET TIME EVAL EVALSHA INCR PING HELLO CLIENT SUBSCRIBE INFO SCAN TTL PTTL PEXPIRETIME SELECT PUBSUB "
    b"SCRIPT EXISTS DBSIZE GETRANGE STRLEN TYPE COMMAND".split()
)
_COMMAND = re.compile(rb'^(\d+\.\d+) \[\d+ [^\]]*\] "([^"]*)"')
_ARGUMENT = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(rb"\\(x[0-9a-f]{2}|.)", re.DOTALL)
_PLAIN = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One command as the witness saw it; ``args`` is empty where it attached (anew).

    Attributes:
        at: When it arrived here, CLOCK_MONOTONIC: not before it was executed.
        server_time: The server's clock, seconds since 1970.
    """

    at: float
    server_time: float
    args: tuple[bytes, ...]


class Monitor:
    """The witness of one server; attached when the constructor returns."""

    def __init__(self, port: int, path: Path) -> None:
        self._path = path
        path.touch()
        args = [sys.executable, "-m", "tests.support.monitor", str(port), str(path)]
        self._process = processes.spawn(
            args, log=logs.new_log("monitor", lambda: self._process.poll() is None), cwd=processes.ROOT
        )
        self.wait_attached(1)

    def wait_attached(self, count: int) -> None:
        """Wait until it has attached *count* times in all."""
        mark = f" {ATTACHED}\n".encode()
        wait_until(lambda: self._path.read_bytes().count(mark) >= count, 15, "the witness to attach", pause=0.02)

    def close(self) -> None:
        """End it."""
        processes.kill_group(self._process)

    def read(self) -> Iterator[Seen]:
        """Yield what it saw."""
        for line in self._path.read_bytes().splitlines():
            at, _, text = line.partition(b" ")
            if text == ATTACHED.encode():
                yield Seen(float(at), 0.0, ())
                continue
            head = _COMMAND.match(text)
            if head is None:
                continue  # half a line: the server was killed
            rest = text[head.start(2) - 1 :]
            args = tuple(_ESCAPE.sub(_plain, each) for each in _ARGUMENT.findall(rest))
            yield Seen(float(at), float(head[1]), args)


def _plain(match: re.Match[bytes]) -> bytes:
    code = match[1]
    return bytes([int(code[1:], 16)]) if code.startswith(b"x") and len(code) == 3 else _PLAIN.get(code, code)


def _watch(port: int, path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        while True:
            try:
                with socket.create_connection((HOST, port), timeout=2) as sock:
                    sock.settimeout(None)
                    sock.sendall(b"MONITOR\r\n")
                    _copy(sock, file)
            except OSError:
                pass
            time.sleep(0.005)


def _copy(sock, file) -> None:
    rest = b""
    while data := sock.recv(262_144):
        at = b"%.6f " % time.monotonic()
        *lines, rest = (rest + data).split(b"\r\n")
        out = []
        for line in lines:
            if line == b"+OK":
                out.append(at + ATTACHED.encode() + b"\n")
                continue
            head = _COMMAND.match(line[1:])
            if head is not None and head[2].upper() not in _NOISE:
                out.append(at + line[1:] + b"\n")
        if out:
            file.write(b"".join(out))


if __name__ == "__main__":
    _watch(int(sys.argv[1]), Path(sys.argv[2]))
