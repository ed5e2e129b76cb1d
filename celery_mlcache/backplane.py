"""The backplane: one daemon thread with one connection that hears every invalidation and proves that it does.

Theory of operation. One RESP3 connection carries both the subscription and the heartbeat's question, "what are the
counter and the floor?". Redis writes pushes and replies to a connection in the order of execution, and the scripts
raise the counter and publish in one step, so when the answer S arrives every message up to S has arrived before it:
the answer is the proof, exact, with nothing pending in another socket. A proxy that drops pushes, a frozen server, a
silent connection or a starved thread all show in the same way: the answer is late, or it names a stamp that was never
heard. Redis below 6, or a proxy without RESP3, never gives a proof; the cache then works without L1.

The socket is read directly with hiredis (five times less CPU than redis-py's ``get_message`` at 10,000 messages a
second). redis-py makes the connection (authentication, TLS, Sentinel) and must not read from it: its PubSub would
subscribe anew behind our back, and hide that messages were lost.

The thread holds only a weak reference to its listener: an abandoned manager is collected, and the thread ends. It is
a daemon, it is never joined for longer than asked, and nothing depends on its being stopped.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable
from math import inf
from typing import Any, Final, NamedTuple

import hiredis
from redis.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_mlcache.keys import RedisNames
from celery_mlcache.protocols import BackplaneListener, Pulse
from celery_mlcache.wire import parse_message, parse_order

THREAD_ERRORS: Final = Exception  # the thread's top: whatever goes wrong, L1 stays without a lease and we try again
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0
RECEIVE_BYTES: Final = 262_144
_NOT_YET: Final = object()


class _Question(NamedTuple):
    sent_at: float
    highest: int  # what this process knew when it asked: a counter below that has lost writes
    is_seed: bool


class Backplane:
    """Hears the channel on a daemon thread and tells a :class:`~celery_mlcache.protocols.BackplaneListener`.

    Thread-safe. Not for use after a fork: the child builds a new one (:meth:`abandon` closes the inherited socket).

    Args:
        connect: Makes an unconnected RESP3 connection with explicit timeouts and no retry.
        names: Every Redis name of the namespace.
        seed: The source of the script that seeds a lost counter.
        heartbeat: Seconds between questions.
        overdue: Seconds after which an unanswered question ends the connection.
        clock: Monotonic seconds.
        rng: 0 to 1; spreads reconnects of a fleet.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractConnection],
        names: RedisNames,
        *,
        seed: str,
        heartbeat: float,
        overdue: float,
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._connect = connect
        self.names = names
        self.seed = seed
        self.heartbeat = heartbeat
        self.overdue = overdue
        self.clock = clock
        self._rng = rng
        self.stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._connection: AbstractConnection | None = None
        self.wake_at = inf

    def start(self, listener: BackplaneListener) -> None:
        """Start the thread; no I/O here, so it returns at once whatever Redis does."""
        reference = weakref.ref(listener)
        name = f"mlcache-backplane-{self.names.namespace}"
        self._thread = threading.Thread(target=self._run, args=(reference,), name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:  # no more threads: L2 goes on serving, and there is no lease
            self._thread = None
            listener.on_lost(str(exc))

    def stop(self, timeout: float) -> bool:
        """Ask the thread to end and wait at most *timeout* seconds; return whether it has."""
        self.stopped.set()
        sock = socket_of(self._connection)
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes a blocked recv
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def ask_soon(self) -> None:
        """Ask for a heartbeat before its time; safe from any thread, no I/O."""
        self.wake_at = self.clock()

    def inherited_connection(self) -> AbstractConnection | None:
        """The connection that a forked child must let go of."""
        return self._connection

    # ---- the thread -----------------------------------------------------------------------------------------

    def _run(self, reference: weakref.ref[BackplaneListener]) -> None:
        attempt = 0
        while not self.stopped.is_set():
            session: _Session | None = None
            why = ""
            try:
                connection = self._connection = self._connect()
                connection.connect()
                refuse_replica(connection)
                session = _Session(self, connection, reference)
                session.run()
            except THREAD_ERRORS as exc:
                why = f"{type(exc).__name__}: {exc}"
            finally:
                self._drop()
            if not self._report(reference, why):
                return
            attempt = 0 if session is not None and session.was_proven else attempt + 1
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt, 10))
            self.stopped.wait(pause * (0.5 + self._rng() / 2))

    def _report(self, reference: weakref.ref[BackplaneListener], why: str) -> bool:
        """Tell that the subscription is lost; return whether there is anybody left to tell."""
        listener = reference()
        if listener is None or self.stopped.is_set():
            return False
        # What a logging filter raises must not end the thread.
        with contextlib.suppress(THREAD_ERRORS):
            listener.on_lost(why)
        return True

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(THREAD_ERRORS):
                connection.disconnect()


class _Session:
    """One connection from its subscription to its end; runs on the backplane's thread only."""

    def __init__(
        self, plane: Backplane, connection: AbstractConnection, reference: weakref.ref[BackplaneListener]
    ) -> None:
        sock = socket_of(connection)
        if sock is None:
            raise RedisConnectionError("the connection has no socket")
        self._plane = plane
        self._sock = sock
        self._reference = reference
        self._reader = hiredis.Reader(notEnoughData=_NOT_YET)
        self._question: _Question | None = None
        self._answers: list[Any] = []
        self._next_at = 0.0
        self.was_proven = False

    def run(self) -> None:
        """Subscribe, ask at once, then hear until the connection ends or the manager is gone."""
        plane = self._plane
        self._sock.settimeout(plane.overdue)
        self._sock.sendall(_pack("SUBSCRIBE", plane.names.channel))
        while not plane.stopped.is_set() and self._reference() is not None:
            now = plane.clock()
            if self._question is None and now >= min(self._next_at, plane.wake_at):
                self._ask(now)
            self._sock.settimeout(self._patience(now))
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except TimeoutError:
                # Only now: after a starved spell the answer may have been in the socket all the time.
                self._check_overdue(plane.overdue)
                continue
            if not data:
                raise RedisConnectionError("the server closed the connection")
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOT_YET:
                self._handle(reply)
            self._check_overdue(10 * plane.overdue)  # messages without end, and never an answer

    def _patience(self, now: float) -> float:
        plane = self._plane
        until = self._next_at if self._question is None else self._question.sent_at + plane.overdue
        return min(max(until - now, 0.001), plane.heartbeat)

    def _check_overdue(self, limit: float) -> None:
        question = self._question
        if question is not None and self._plane.clock() - question.sent_at > limit:
            raise RedisConnectionError(f"no answer to a heartbeat for {limit:g} s")

    def _ask(self, now: float, *, seed_above: int | None = None) -> None:
        listener = self._reference()
        if listener is None:
            return
        names, plane = self._plane.names, self._plane
        highest = listener.highest_stamp()
        if seed_above is None:
            packed = _pack("MGET", names.counter, names.floors) + _pack("TIME")
        else:
            # None of the other arguments of a script matters for this one.
            seed = ("EVAL", plane.seed, 2, names.counter, names.floors, names.channel, seed_above)
            packed = _pack(*seed) + _pack("TIME")
        self._question = _Question(now, highest, is_seed=seed_above is not None)
        self._answers = []
        self._next_at = now + plane.heartbeat
        plane.wake_at = inf
        self._sock.sendall(packed)

    def _handle(self, reply: Any) -> None:
        if isinstance(reply, hiredis.PushNotification):
            self._handle_push(reply)
        elif isinstance(reply, hiredis.ReplyError):
            raise RedisConnectionError(str(reply))
        elif self._question is None:
            raise RedisConnectionError("an answer that nobody asked for")
        else:
            self._answers.append(reply)
            if len(self._answers) == 2:  # noqa: PLR2004 - MGET (or EVAL) and TIME
                self._answered(self._question, *self._answers)

    def _handle_push(self, push: Any) -> None:
        listener = self._reference()
        if listener is None:
            return
        if push[0] == b"message":
            data = push[2]
            if not listener.on_message(parse_message(data) if isinstance(data, bytes) else None):
                self._plane.ask_soon()
        elif push[0] == b"subscribe":
            listener.on_subscribed()

    def _answered(self, question: _Question, order: Any, server_clock: Any) -> None:
        plane = self._plane
        now = plane.clock()
        self._question = None
        counter, floor = parse_order(*order)
        if not question.is_seed and (not counter or not floor or counter < question.highest):
            self._ask(now, seed_above=question.highest)
            return
        listener = self._reference()
        if listener is None:
            return
        seconds, microseconds = (int(part) for part in server_clock)
        listener.on_pulse(Pulse(counter, floor, question.sent_at, now, seconds + microseconds / 1e6))
        self.was_proven = True


def _pack(*command: Any) -> bytes:
    # Numbers as bytes: see remote.py.
    parts: Any = tuple([b"%d" % part if isinstance(part, int) else part for part in command])
    packed: bytes = hiredis.pack_command(parts)
    return packed


def refuse_replica(connection: AbstractConnection) -> None:
    """Refuse a server that says it is a replica: its counter may be behind, so its answers prove nothing.

    redis-py keeps HELLO's reply from some 8.x on; Sentinel closes the connections of a master that it demotes.
    """
    if (getattr(connection, "handshake_metadata", None) or {}).get(b"role", b"master") != b"master":
        raise RedisConnectionError("the server is a replica")


def socket_of(connection: AbstractConnection | None) -> socket.socket | None:
    """Return redis-py's socket; it has no public way to it."""
    return getattr(connection, "_sock", None)
