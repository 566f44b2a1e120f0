"""The wire of the GDB remote protocol: packets, checksums, acknowledgements, and Ctrl-C between them.

After "Overview" and "Interrupts" of appendix E of the GDB manual.

>>> framed(b"OK"), framed(b"a#}")
(b'$OK#9a', b'$a}\\x03}]#bb')
"""

from __future__ import annotations

import select
import socket
from typing import Final

INTERRUPT: Final = b"\x03"
_ESCAPE, _FLIP = 0x7D, 0x20
_SPECIAL: Final = frozenset(b"#$}*")
MAX_PACKET: Final = 1 << 16


def escaped(data: bytes) -> bytes:
    """Binary data as it may be inside a packet."""
    if not _SPECIAL.intersection(data):
        return data
    return b"".join(bytes((_ESCAPE, byte ^ _FLIP)) if byte in _SPECIAL else bytes((byte,)) for byte in data)


def unescaped(data: bytes) -> bytes:
    """The data of `escaped`.

    >>> unescaped(escaped(bytes(range(256)))) == bytes(range(256))
    True
    """
    out = bytearray()
    flip = 0
    for byte in data:
        if byte == _ESCAPE and not flip:
            flip = _FLIP
        else:
            out.append(byte ^ flip)
            flip = 0
    return bytes(out)


def framed(payload: bytes) -> bytes:
    """A packet, with its payload escaped."""
    body = escaped(payload)
    return b"$%s#%02x" % (body, sum(body) & 0xFF)


class Wire:
    """One connection. `wait` gives what came in: a packet's payload (still escaped), INTERRUPT, or None for nothing."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._in = bytearray()
        self._last = b""
        self.acknowledges = True  # until QStartNoAckMode

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, payload: bytes) -> None:
        """A packet; OSError where gdb is gone."""
        self._last = framed(payload)
        self._socket.sendall(self._last)

    def wait(self, wake: socket.socket | None = None) -> bytes | None:
        """The next packet or INTERRUPT; None as soon as there is something to read at `wake`. EOFError at the end."""
        while True:
            found = self._next()
            if found is not None:
                return found
            watched = [self._socket] if wake is None else [self._socket, wake]
            ready, _, _ = select.select(watched, (), ())
            if wake is not None and wake in ready:
                return None
            data = self._socket.recv(MAX_PACKET)
            if not data:
                raise EOFError("gdb closed the connection")
            self._in += data

    def _next(self) -> bytes | None:
        while self._in:
            head = self._in[0]
            if head == ord("$"):
                return self._packet()
            del self._in[0]
            if head == INTERRUPT[0]:
                return INTERRUPT
            if head == ord("-"):
                self._socket.sendall(self._last)
        return None

    def _packet(self) -> bytes | None:
        end = self._in.find(b"#")
        if end < 0 or len(self._in) < end + 3:
            if len(self._in) > 4 * MAX_PACKET:
                raise EOFError(f"a packet of more than {MAX_PACKET} bytes")
            return None
        body, sent = bytes(self._in[1:end]), bytes(self._in[end + 1 : end + 3])
        del self._in[: end + 3]
        if self.acknowledges:
            good = sent.lower() == b"%02x" % (sum(body) & 0xFF)
            self._socket.sendall(b"+" if good else b"-")
            if not good:
                return self._next()
        return body
