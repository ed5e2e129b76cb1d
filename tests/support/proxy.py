"""A TCP proxy whose every fault is a verb, in force when the verb returns.

One thread runs a selector loop; a verb is executed by that loop, between two events, and its caller waits for it.
So no byte is handled half before and half after a fault. Replies are cut into RESP frames on the way (other
protocols pass as they come).
"""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from tests.support.ports import HOST, free_port
from tests.support.resp import Framer, is_push, push_kind

T = TypeVar("T")
Direction = Literal["request", "reply", "both"]

_CHUNK = 65_536
_MAX_QUEUED = 4 * 1024 * 1024  # per direction; above it the source is not read, as with a full network
_MESSAGES = frozenset({"message", "pmessage", "smessage", "invalidate"})
_CLOSE_WITH_RESET = struct.pack("ii", 1, 0)


class _Flow:
    """One direction of one connection: what was read from *source* and is not written to *sink* yet."""

    def __init__(self, source: socket.socket, sink: socket.socket, *, is_reply: bool) -> None:
        self.source, self.sink, self.is_reply = source, sink, is_reply
        self.framer = Framer()
        self.queue: deque[tuple[float, bytes]] = deque()  # (not before, bytes), in order
        self.queued = 0
        self.has_ended = False  # the source has said all
        self.is_shut = False  # the sink has been told so; nothing more goes there

    def put(self, data: bytes, due: float) -> None:
        if data:
            self.queue.append((due, data))
            self.queued += len(data)

    def write_due(self, now: float) -> None:
        """Write what is due, as far as the sink takes it; OSError if the sink is gone."""
        while self.queue and self.queue[0][0] <= now:
            due, data = self.queue.popleft()
            try:
                sent = len(data) if self.is_shut else self.sink.send(data)
            except BlockingIOError:
                sent = 0
            self.queued -= sent
            if sent < len(data):
                self.queue.appendleft((due, data[sent:]))
                return
        if self.has_ended and not self.queue and not self.is_shut:
            self.is_shut = True
            self.sink.shutdown(socket.SHUT_WR)


class _Link:
    """One client connection and its twin to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.request = _Flow(client, server, is_reply=False)
        self.reply = _Flow(server, client, is_reply=True)
        self.flows = (self.request, self.reply)
        self.is_ending = False  # to be closed as soon as the reply queue is written


class Proxy:
    """A proxy on 127.0.0.1:``port`` in front of ``upstream_port``; ``close()`` leaves no thread and no socket.

    Faults add up; :meth:`mend` ends them all. Thread-safe. A forked child shares the sockets: fork elsewhere.
    """

    def __init__(self, upstream_port: int, *, upstream_host: str = HOST) -> None:
        self.host = HOST
        self.port = free_port()
        self._upstream = (upstream_host, upstream_port)
        self._links: set[_Link] = set()
        self._held: list[socket.socket] = []  # accepted while deaf, not connected to the server yet
        self._orders: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._selector = selectors.DefaultSelector()
        self._accepted = self._dropped = 0
        self._is_running, self._is_deaf = True, False
        self._delays = {"request": 0.0, "reply": 0.0}
        self._jitters = {"request": 0.0, "reply": 0.0}
        self._rng = random.Random(0)
        self._flushed_at = 0.0
        self._pushes_to_drop = 0.0
        self._cut_next_reply_at: int | None = None
        self._garbage: bytes | None = None
        self._listener: socket.socket | None = self._listen()
        self._wake, waker = socket.socketpair()
        self._waker = waker
        waker.setblocking(False)
        self._selector.register(waker, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()

    # What a test asks.

    @property
    def url(self) -> str:
        """``redis://`` URL of database 0 through the proxy."""
        return f"redis://{self.host}:{self.port}/0"

    @property
    def connections(self) -> int:
        """How many client connections exist now."""
        return self._do(lambda: len(self._links) + len(self._held))

    @property
    def accepted(self) -> int:
        """How many client connections were ever accepted."""
        return self._do(lambda: self._accepted)

    @property
    def dropped(self) -> int:
        """How many pushes were swallowed."""
        return self._do(lambda: self._dropped)

    # The verbs.

    def cut(self) -> None:
        """Close every connection and refuse new ones."""
        self._do(self._cut)

    def drop(self) -> None:
        """Close every connection; new ones are welcome."""
        self._do(self._drop_all)

    def reset(self) -> None:
        """Close every connection with a TCP reset; new ones are welcome."""
        self._do(lambda: self._drop_all(with_reset=True))

    def half_close(self) -> None:
        """Say end-of-stream to every client, whose requests still reach the server; replies are lost."""
        self._do(self._half_close)

    def deaf(self) -> None:
        """Go silent both ways, like a network that loses all: connections are accepted, nothing passes."""
        self._do(self._deafen)

    def hear(self) -> None:
        """End :meth:`deaf`; what was sent meanwhile arrives now, late, as after TCP's retransmissions.

        That includes commands whose sender has given up. Use ``drop()`` or ``cut()`` first to lose them.
        """
        self._do(self._hear)

    def delay(self, seconds: float, direction: Direction = "both") -> None:
        """Hold everything read from now on for *seconds*, in one direction or in each; order is kept; 0 ends it."""
        self._do(lambda: self._delays.update(dict.fromkeys(_each(direction), seconds)))

    def jitter(self, seconds: float, direction: Direction = "both", *, seed: int = 0) -> None:
        """Hold each chunk read from now on for a random time up to *seconds*, besides :meth:`delay`; 0 ends it.

        Order is kept within a connection and lost between two of them, as in a network. *seed* gives the times.
        """

        def jitter() -> None:
            self._rng.seed(seed)
            self._jitters.update(dict.fromkeys(_each(direction), seconds))

        self._do(jitter)

    def drop_push(self, count: int | None = None) -> None:
        """Swallow the next *count* RESP3 messages, or all from now on (0 ends it); replies pass.

        Confirmations of (un)subscribing pass too: they are replies, only dressed as pushes.
        """
        self._do(lambda: setattr(self, "_pushes_to_drop", float("inf") if count is None else count))

    def truncate(self, size: int) -> None:
        """Pass only the first *size* bytes of the next reply (or push), then close that connection; happens once."""
        self._do(lambda: setattr(self, "_cut_next_reply_at", size))

    def garbage(self, data: bytes | None = None) -> None:
        """Replace each reply from now on by *data*, or by 64 bytes, always the same, that begin no protocol."""
        junk = b"\xff" + random.Random(7).randbytes(61) + b"\r\n" if data is None else data
        self._do(lambda: setattr(self, "_garbage", junk))

    def mend(self) -> None:
        """End every fault: accept, forward, at full speed. Connections that were closed stay closed."""
        self._do(self._mend)

    def close(self) -> None:
        """End everything; may be called twice."""
        if self._thread.is_alive():
            self._do(lambda: setattr(self, "_is_running", False))
            self._thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, order: Callable[[], T]) -> T:
        """Have the loop execute *order* and return what it returned."""
        done: Future[T] = Future()
        self._orders.append((order, done))
        with contextlib.suppress(OSError):
            self._wake.send(b"!")
        if not self._thread.is_alive() and not done.done():
            raise AssertionError("the proxy is closed")
        return done.result(10)

    # Everything below runs in the loop's thread (but for _listen, once, before it starts).

    def _run(self) -> None:
        try:
            while self._is_running:
                for key, mask in self._selector.select(self._time_to_next_due()):
                    self._on_event(key, mask)
                while self._orders:
                    self._obey(*self._orders.popleft())
                self._flush()
        finally:
            self._cut()
            self._selector.close()
            self._wake.close()
            self._waker.close()

    def _obey(self, order: Callable[[], Any], done: Future[Any]) -> None:
        try:
            done.set_result(order())
        except Exception as exc:  # the verb's caller gets it
            done.set_exception(exc)

    def _on_event(self, key: selectors.SelectorKey, mask: int) -> None:
        if key.fileobj is self._waker:
            with contextlib.suppress(BlockingIOError):
                self._waker.recv(_CHUNK)
        elif key.fileobj is self._listener:
            self._accept()
        elif key.data in self._links and mask & selectors.EVENT_READ:
            link: _Link = key.data
            self._read(link, link.request if key.fileobj is link.client else link.reply)

    def _time_to_next_due(self) -> float | None:
        if self._is_deaf:
            return None
        due = [flow.queue[0][0] for link in self._links for flow in link.flows if flow.queue]
        # What was due at the last flush and is still here waits for its sink, not for a time.
        next_due = min((each for each in due if each > self._flushed_at), default=None)
        return None if next_due is None else max(0.0, next_due - time.monotonic())

    def _listen(self) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(128)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        return listener

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:  # it went away again
            return
        self._accepted += 1
        if self._is_deaf:
            self._held.append(client)
        else:
            self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._upstream, timeout=2)
        except OSError:
            _close(client, with_reset=True)
            return
        link = _Link(client, server)
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setblocking(False)
            self._selector.register(each, selectors.EVENT_READ, link)
        self._links.add(link)

    def _read(self, link: _Link, flow: _Flow) -> None:
        try:
            data = flow.source.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self._drop(link, with_reset=True)  # the way the source ended is the way the sink sees it
            return
        if not data:
            flow.has_ended = True
            return
        way = "reply" if flow.is_reply else "request"
        seconds = self._delays[way] + (self._rng.random() * self._jitters[way] if self._jitters[way] else 0.0)
        due = time.monotonic() + seconds if seconds else 0.0
        if not flow.is_reply:
            flow.put(data, due)
            return
        for frame in flow.framer.feed(data):
            if link.is_ending:
                break
            flow.put(self._spoil(link, frame), due)

    def _spoil(self, link: _Link, frame: bytes) -> bytes:
        """Return what the client gets for one frame of the server."""
        if self._pushes_to_drop and is_push(frame) and push_kind(frame) in _MESSAGES:
            self._pushes_to_drop -= 1
            self._dropped += 1
            return b""
        if self._garbage is not None:
            return self._garbage
        if self._cut_next_reply_at is not None:
            size, self._cut_next_reply_at = self._cut_next_reply_at, None
            link.is_ending = True
            return frame[:size]
        return frame

    def _flush(self) -> None:
        """Write what is due on every connection, close those that are done, and say what to wait for next."""
        if self._is_deaf:
            return
        now = self._flushed_at = time.monotonic()
        for link in list(self._links):
            try:
                for flow in link.flows:
                    flow.write_due(now)
            except OSError:
                self._drop(link, with_reset=True)
                continue
            if (link.is_ending and not link.reply.queue) or all(flow.is_shut and flow.has_ended for flow in link.flows):
                self._drop(link)
            else:
                self._watch(link, now)

    def _watch(self, link: _Link, now: float) -> None:
        for into, out in ((link.request, link.reply), (link.reply, link.request)):
            wants_to_read = not self._is_deaf and not into.has_ended and into.queued < _MAX_QUEUED
            wants_to_write = not self._is_deaf and bool(out.queue) and out.queue[0][0] <= now
            mask = selectors.EVENT_READ * wants_to_read | selectors.EVENT_WRITE * wants_to_write
            known = self._selector.get_map().get(into.source)
            if known is not None and not mask:
                self._selector.unregister(into.source)
            elif known is None and mask:
                self._selector.register(into.source, mask, link)
            elif known is not None and known.events != mask:
                self._selector.modify(into.source, mask, link)

    def _drop(self, link: _Link, *, with_reset: bool = False) -> None:
        self._links.discard(link)
        for each in (link.client, link.server):
            if each in self._selector.get_map():
                self._selector.unregister(each)
            _close(each, with_reset=with_reset)

    def _drop_all(self, *, with_reset: bool = False) -> None:
        for link in list(self._links):
            self._drop(link, with_reset=with_reset)
        while self._held:
            _close(self._held.pop(), with_reset=with_reset)

    def _cut(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            _close(self._listener)
            self._listener = None
        self._drop_all()

    def _half_close(self) -> None:
        for link in self._links:
            link.reply.is_shut = True
            with contextlib.suppress(OSError):
                link.client.shutdown(socket.SHUT_WR)

    def _deafen(self) -> None:
        self._is_deaf = True
        for link in self._links:
            self._watch(link, 0.0)

    def _hear(self) -> None:
        self._is_deaf = False
        held, self._held = self._held, []
        for client in held:
            self._connect(client)

    def _mend(self) -> None:
        if self._listener is None:
            self._listener = self._listen()
        self._delays = {"request": 0.0, "reply": 0.0}
        self._jitters = {"request": 0.0, "reply": 0.0}
        self._pushes_to_drop = 0.0
        self._cut_next_reply_at = self._garbage = None
        self._hear()


def _each(direction: Direction) -> tuple[str, ...]:
    return ("request", "reply") if direction == "both" else (direction,)


def _close(sock: socket.socket, *, with_reset: bool = False) -> None:
    """Close for every holder of the socket, forked or not; unread bytes must not turn a plain end into a reset."""
    with contextlib.suppress(OSError):
        if with_reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RESET)
        else:
            sock.setblocking(False)
            sock.shutdown(socket.SHUT_RDWR)
            while sock.recv(_CHUNK):
                pass
    sock.close()
