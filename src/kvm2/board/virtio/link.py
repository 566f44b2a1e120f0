"""Sockets that carry Ethernet frames: the other end of a network device's cable.

They speak what QEMU's `-netdev stream` and `-netdev dgram` speak, so a machine can be joined to another one, or to a
QEMU that only forwards (docs: "Invocation" of QEMU's manual). In a stream each frame has its length in front, four
bytes, big-endian; a datagram is a frame.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH_BYTES = 4
MAX_FRAME = 65535 + 18
"""Bytes of a frame, at most: the largest MTU, the Ethernet header, one VLAN tag."""
MAX_QUEUED = 1 << 20
"""Bytes that wait for the other end to read them, at most; further frames are lost, as on a real cable."""
RECEIVE_BYTES = 1 << 18
JOIN_SECONDS = 5.0
FORMS = "unix:PATH, tcp:HOST:PORT, either with ,server, or dgram:LOCAL_PATH,REMOTE_PATH"


class Link:
    """A socket and the thread that reads it. `up` is whether there is somebody at the other end.

    `start` names who gets the frames (a list at a time), who says whether more can be taken (until `wake`), and who
    hears of a change of `up`; all three are called by the link's own thread.
    """

    def __init__(self) -> None:
        self.up = False
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._hear, self._say = socket.socketpair()
        for end in (self._hear, self._say):
            end.setblocking(False)
        self._selector.register(self._hear, selectors.EVENT_READ)
        self._thread: threading.Thread | None = None

    def start(
        self, deliver: Callable[[list[bytes]], object], ready: Callable[[], bool], changed: Callable[[], object]
    ) -> None:
        """Begin to read."""
        self._deliver, self._ready, self._changed = deliver, ready, changed
        self._thread = threading.Thread(target=self._loop, name=f"virtio-net {self}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """The thread looks again whether more can be taken, or sent; from any thread."""
        with suppress(BlockingIOError, OSError):
            self._say.send(b"\0")

    def send(self, frame: bytes) -> bool:
        """Send one frame, from any thread, without waiting; False where it was lost."""
        raise NotImplementedError

    def _loop(self) -> None:
        while not self._closed:
            self._watch()
            for key, events in self._selector.select():
                if key.fileobj is self._hear:
                    with suppress(BlockingIOError):
                        self._hear.recv(RECEIVE_BYTES)
                elif not self._closed:
                    self._event(key.fileobj, events)

    def _watch(self) -> None:
        """Set what the selector waits for."""
        raise NotImplementedError

    def _event(self, source: object, events: int) -> None:
        """A socket can be read or written."""
        raise NotImplementedError

    def _listen_to(self, sock: socket.socket, events: int) -> None:
        # A selector takes no socket without events.
        known = sock in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(sock)
        elif known:
            self._selector.modify(sock, events)
        else:
            self._selector.register(sock, events)

    def _set_up(self, up: bool) -> None:
        self.up = up
        self._changed()

    def close(self) -> None:
        """Ends the thread and closes the sockets; may be called again."""
        if self._closed:
            return
        self._closed = True
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)
        self._selector.close()
        for end in (self._hear, self._say, *self._sockets()):
            end.close()
        self.up = False

    def _sockets(self) -> list[socket.socket]:
        raise NotImplementedError


class StreamLink(Link):
    """A stream socket, as QEMU's `-netdev stream`: `address` is a path or (host, port); a server waits for one peer.

    UsageError where nobody listens at a client's address, or a server cannot have its own.
    """

    def __init__(self, address: str | tuple[str, int], *, server: bool = False) -> None:
        self._address = address
        self._peer: socket.socket | None = None
        self._listener: socket.socket | None = None
        try:
            if server:
                self._listener = _server(address)
                self._listener.setblocking(False)
            else:
                self._peer = _client(address)
        except OSError as error:
            what = "cannot be listened at" if server else "has nobody that listens: start the other end first"
            raise UsageError(f"network socket {_shown(address)} {what} ({error.strerror or error})") from error
        super().__init__()
        self._received = bytearray()
        self._queued = bytearray()
        self._send_lock = threading.Lock()
        if self._peer is not None:
            self._prepare(self._peer)
            self.up = True

    @property
    def address(self) -> str | tuple[str, int]:
        """A server's address, with the port that it was given where it asked for 0."""
        if self._listener is not None and isinstance(self._address, tuple):
            return self._address[0], int(self._listener.getsockname()[1])
        return self._address

    def __str__(self) -> str:
        return _shown(self._address)

    def _prepare(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        if peer.family != socket.AF_UNIX:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, frame: bytes) -> bool:
        """Send one frame; what the socket does not take at once is sent by the thread."""
        data = len(frame).to_bytes(LENGTH_BYTES, "big") + frame
        with self._send_lock:
            peer = self._peer
            if peer is None or len(self._queued) + len(data) > MAX_QUEUED:
                return False
            waiting = bool(self._queued)
            self._queued += data
            if not waiting:
                self._push(peer)
            waits = bool(self._queued)
        if waits and not waiting:
            self.wake()
        return True

    def _push(self, peer: socket.socket) -> None:
        # With the lock held. That the peer has gone is found by the thread, when it reads.
        try:
            del self._queued[: peer.send(self._queued)]
        except BlockingIOError:
            pass
        except OSError:
            self._queued.clear()

    def _watch(self) -> None:
        if self._listener is not None:
            self._listen_to(self._listener, selectors.EVENT_READ if self._peer is None else 0)
        if self._peer is not None:
            reading = selectors.EVENT_READ if self._ready() else 0
            self._listen_to(self._peer, reading | (selectors.EVENT_WRITE if self._queued else 0))

    def _event(self, source: object, events: int) -> None:
        if source is self._listener and self._listener is not None:
            with suppress(OSError):
                peer, _ = self._listener.accept()
                self._prepare(peer)
                self._peer = peer
                self._set_up(True)
            return
        if self._peer is None:
            return
        if events & selectors.EVENT_WRITE:
            with self._send_lock:
                self._push(self._peer)
        if events & selectors.EVENT_READ:
            self._read(self._peer)

    def _read(self, peer: socket.socket) -> None:
        try:
            data = peer.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._received += data
        frames = self._frames()
        if frames:
            self._deliver(frames)
        if not data:
            self._hang_up(peer)

    def _frames(self) -> list[bytes]:
        """The whole frames that have come; a length that cannot be is the end of the peer."""
        frames: list[bytes] = []
        at = 0
        while len(self._received) - at >= LENGTH_BYTES:
            size = int.from_bytes(self._received[at : at + LENGTH_BYTES], "big")
            start = at + LENGTH_BYTES
            if size > MAX_FRAME:
                self._received.clear()
                assert self._peer is not None
                self._hang_up(self._peer)
                return frames
            if len(self._received) < start + size:
                break
            if size:
                frames.append(bytes(self._received[start : start + size]))
            at = start + size
        del self._received[:at]
        return frames

    def _hang_up(self, peer: socket.socket) -> None:
        if self._peer is not peer:
            return
        self._listen_to(peer, 0)
        with self._send_lock:
            self._peer = None
            self._queued.clear()
        self._received.clear()
        peer.close()
        self._set_up(False)

    def _sockets(self) -> list[socket.socket]:
        return [sock for sock in (self._peer, self._listener) if sock is not None]

    def close(self) -> None:
        """As `Link.close`; a server's path is removed."""
        gone = self._closed
        super().close()
        if not gone and self._listener is not None and isinstance(self._address, str):
            Path(self._address).unlink(missing_ok=True)


class DatagramLink(Link):
    """Unix datagrams, as QEMU's `-netdev dgram`: `local` is made here, `remote` is the other end's path.

    There is no telling whether somebody is at the other end: the link is always up, and frames may be lost.
    """

    def __init__(self, local: str, remote: str) -> None:
        self._local, self._remote = local, remote
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(local)
        except OSError as error:
            self._socket.close()
            raise UsageError(f"network socket {local} cannot be made ({error.strerror or error})") from error
        super().__init__()
        self._socket.setblocking(False)
        self.up = True

    def __str__(self) -> str:
        return self._local

    def send(self, frame: bytes) -> bool:
        """Send one frame; it is lost where nobody is there, or nobody reads."""
        try:
            self._socket.sendto(frame, self._remote)
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        self._listen_to(self._socket, selectors.EVENT_READ if self._ready() else 0)

    def _event(self, source: object, events: int) -> None:
        with suppress(OSError):
            frame = self._socket.recv(MAX_FRAME + 1)
            if 0 < len(frame) <= MAX_FRAME:
                self._deliver([frame])

    def _sockets(self) -> list[socket.socket]:
        return [self._socket]

    def close(self) -> None:
        """As `Link.close`; the path is removed."""
        gone = self._closed
        super().close()
        if not gone:
            Path(self._local).unlink(missing_ok=True)


def _client(address: str | tuple[str, int]) -> socket.socket:
    if isinstance(address, tuple):
        return socket.create_connection(address)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.connect(address)
    except OSError:
        made.close()
        raise
    return made


def _server(address: str | tuple[str, int]) -> socket.socket:
    if isinstance(address, tuple):
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(address, family=family, backlog=1)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(address)
        made.listen(1)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(error.errno, f"{os.strerror(error.errno)}; remove {address} if no machine uses it") from None
        raise
    return made


def _shown(address: str | tuple[str, int]) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def parse_link(text: str) -> Link:
    """The link that a command line names; UsageError where it is none, or cannot be had.

    >>> parse_link("tap0")
    Traceback (most recent call last):
    kvm2.errors.UsageError: network 'tap0': allowed are unix:PATH, tcp:HOST:PORT, either with ,server, or ...
    """
    kind, _, rest = text.partition(":")
    if kind == "dgram":
        local, comma, remote = rest.partition(",")
        if local and comma and remote:
            return DatagramLink(local, remote)
    where = rest.removesuffix(",server")
    server = where != rest
    if kind == "unix" and where:
        return StreamLink(where, server=server)
    if kind == "tcp":
        host, colon, port = where.rpartition(":")
        if host and colon and port.isdecimal() and int(port) < 1 << 16:
            return StreamLink((host.strip("[]"), int(port)), server=server)
    raise UsageError(f"network {text!r}: allowed are {FORMS}")
