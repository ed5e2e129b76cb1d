"""Where one RESP frame ends and the next begins: enough of the protocol for a proxy to work on whole replies."""

from __future__ import annotations

_SIMPLE = b"+-:_,#("
_BULK = b"$!="
_ARRAYS = b"*~>"
_MAPS = b"%|"


def is_push(frame: bytes) -> bool:
    """Whether a frame is a RESP3 push."""
    return frame[:1] == b">"


def push_kind(frame: bytes) -> str:
    """Return the first word of a push, such as ``message`` or ``subscribe``."""
    return frame.split(b"\r\n", 3)[2].decode("ascii", "replace").lower() if is_push(frame) else ""


class Framer:
    """Cuts a stream of server replies into top-level frames; gives up, and passes all on, if it is not RESP."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # everything before it has been read; the frame began at 0
        self._open: list[int] = []  # elements that are still to come, per open aggregate
        self._is_raw = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the frames that *data* completes; the rest is kept for the next call."""
        self._buffer += data
        frames = []
        try:
            while not self._is_raw and self._read_element():
                if not self._open:
                    frames.append(bytes(self._buffer[: self._at]))
                    del self._buffer[: self._at]
                    self._at = 0
        except ValueError:
            self._is_raw = True
        if self._is_raw and self._buffer:
            frames.append(bytes(self._buffer))
            self._buffer.clear()
        return frames

    def _read_element(self) -> bool:
        """Move past one element; False if more bytes are needed. ValueError if it cannot be RESP."""
        if len(self._buffer) > self._at and self._buffer[self._at] not in _SIMPLE + _BULK + _ARRAYS + _MAPS:
            raise ValueError(self._at)
        end = self._buffer.find(b"\r\n", self._at)
        if end < 0:
            return False
        kind, after = self._buffer[self._at], end + 2
        size = 0 if kind in _SIMPLE else int(self._buffer[self._at + 1 : end])
        if kind in _BULK and size >= 0:
            after += size + 2
            if len(self._buffer) < after:
                return False
        self._at = after
        if kind in _ARRAYS + _MAPS and size > 0:
            # An attribute ("|") is followed by the reply that it belongs to: one element more.
            self._open.append(size * (2 if kind in _MAPS else 1) + (kind == _MAPS[1]))
            return True
        while self._open:
            self._open[-1] -= 1
            if self._open[-1]:
                break
            self._open.pop()
        return True
