"""The outside end of the agent's port: frames, and one request at a time."""

from __future__ import annotations

import base64
import json
import os
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvm2.lab.oracle.agent import CHUNK, HEADER

Sink = Callable[[bytes], object]


class Gone(Exception):
    """The machine ended in the middle of a request."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a request ended: the exit code (-N: signal N), and the files that were asked for and exist."""

    code: int
    files: Mapping[str, bytes] = field(default_factory=dict)


class Link:
    """Speaks with the agent over a socket."""

    def __init__(self, port: socket.socket) -> None:
        self._port = port
        self._received = bytearray()

    def send(self, kind: bytes, data: bytes = b"") -> None:
        """One frame in. What comes out meanwhile is kept: the agent may have to get rid of it before it can read."""
        left = memoryview(HEADER.pack(kind, len(data)) + data)
        while left:
            ready, writable, _ = select.select([self._port], [self._port], [])
            if ready:
                self._read()
            if writable:
                try:
                    left = left[self._port.send(left, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise Gone(str(error)) from error

    def receive(self) -> tuple[bytes, bytes]:
        """The next frame; waits for it."""
        while (frame := self._frame()) is None:
            self._read()
        return frame

    def _read(self) -> None:
        try:
            data = self._port.recv(1 << 20)
        except OSError as error:
            raise Gone(str(error)) from error
        if not data:
            raise Gone("it closed the port")
        self._received += data

    def _frame(self) -> tuple[bytes, bytes] | None:
        if len(self._received) < HEADER.size:
            return None
        kind, length = HEADER.unpack_from(self._received)
        end = HEADER.size + length
        if len(self._received) < end:
            return None
        data = bytes(self._received[HEADER.size : end])
        del self._received[:end]
        return kind, data

    def ask(self, request: Mapping[str, Any], data: bytes | None = None) -> dict[str, Any]:
        """A request that has one answer; `data` goes along."""
        self.send(b"R", json.dumps(request).encode())
        if data is not None:
            self.send(b"I", data)
        while True:
            kind, reply = self.receive()
            if kind == b"X":
                found: dict[str, Any] = json.loads(reply)
                return found

    def start(
        self, entry: str, argv: Sequence[str], env: Mapping[str, str], files: Mapping[str, bytes], get: Sequence[str]
    ) -> None:
        """Starts a function `module:function` in a process of its own; `follow` goes on."""
        contents = {path: base64.b64encode(data).decode() for path, data in files.items()}
        request = {"do": "run", "entry": entry, "argv": list(argv), "env": dict(env)}
        self.send(b"R", json.dumps({**request, "files": contents, "get": list(get)}).encode())

    def follow(self, stdin: int | None, out: Sink, err: Sink, reader: int | None = None) -> Finished:
        """Passes on what the process writes until it ends, and to it what comes from descriptor `stdin`.

        BrokenPipeError as soon as nobody reads the pipe `reader` any more.
        """
        if stdin is None:
            self.send(b"I")
        port = self._port.fileno()
        while True:
            while (frame := self._frame()) is not None:
                kind, data = frame
                if kind == b"X":
                    return _finished(json.loads(data))
                (out if kind == b"O" else err)(data)
            ready = _wait(port, stdin, reader)
            if reader is not None and ready.get(reader, 0) & (select.POLLERR | select.POLLHUP):
                raise BrokenPipeError
            if stdin is not None and stdin in ready:
                data = os.read(stdin, CHUNK)
                self.send(b"I", data)
                stdin = stdin if data else None
            if port in ready:
                self._read()


def _wait(port: int, stdin: int | None, reader: int | None) -> dict[int, int]:
    poll = select.poll()
    poll.register(port, select.POLLIN)
    if reader is not None:
        poll.register(reader, 0)  # its end is reported all the same
    if stdin is not None:
        poll.register(stdin, select.POLLIN)
    return dict(poll.poll())


def _finished(reply: Mapping[str, Any]) -> Finished:
    if "error" in reply:
        raise Gone(f"its agent failed: {reply['error']}")
    return Finished(reply["exit"], {path: base64.b64decode(data) for path, data in reply["files"].items()})
