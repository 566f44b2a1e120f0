"""The console device (virtio 1.2, section 5.3): one port."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from kvm2.board.virtio.device import Device
from kvm2.board.virtio.queue import MAX_ROUNDS, QueueFault, split, total
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.board.virtio.queue import Chain, Virtqueue

ID = 3
RECEIVE, TRANSMIT = 0, 1
F_SIZE, F_EMERG_WRITE = 0, 2
CONFIG = struct.Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr
EMERG_WRITE = 8
"""Where in the configuration space a driver without queues can write single characters."""
MAX_PENDING = 1 << 16
"""Bytes that wait for the guest to read, at most."""
PIECE = 1 << 16
"""What is transmitted goes to the sink in pieces of at most this many bytes."""


class Console(Device):
    """A terminal of `cols` by `rows`. `sink` gets what the guest writes, as bytes; `feed` is what somebody types.

    >>> console = Console(print)
    >>> console.feed(b"ls"), console.space
    (2, 65534)
    """

    name = "virtio-console"
    id = ID
    features = 1 << F_SIZE | 1 << F_EMERG_WRITE
    queue_sizes = (64, 64)

    def __init__(self, sink: Callable[[bytes], object], *, cols: int = 80, rows: int = 24) -> None:
        self._sink = sink
        self._pending = bytearray()
        self._size = (cols, rows)
        self.config()

    def config(self) -> bytes:
        """struct virtio_console_config; UsageError where the size does not fit in."""
        try:
            return CONFIG.pack(*self._size, 1, 0)
        except struct.error:
            raise UsageError(f"a terminal of {self._size} columns and rows: allowed are 0 to 65535 each") from None

    def write_config(self, offset: int, data: bytes) -> None:
        """The emergency write: a character, before there are queues (section 5.3.4)."""
        if offset == EMERG_WRITE:
            self._sink(data[:1])

    def resize(self, cols: int, rows: int) -> None:
        """The terminal has another size: the guest is told."""
        old, self._size = self._size, (cols, rows)
        try:
            self.config()
        except UsageError:
            self._size = old
            raise
        if self.transport is not None:
            self.transport.config_changed()

    @property
    def space(self) -> int:
        """Bytes that `feed` takes now."""
        return MAX_PENDING - len(self._pending)

    def feed(self, data: bytes) -> int:
        """Input for the guest, from any thread: how many bytes were taken. The rest is to be fed again later.

        What the guest does not read waits here, up to `MAX_PENDING` bytes, also before there is a driver.
        """
        taken = data[: max(self.space, 0)]
        self._pending += taken
        if self.transport is not None:
            self.transport.service(RECEIVE)
        return len(taken)

    def handle(self, number: int, queue: Virtqueue) -> None:
        """Give what waits to the guest's buffers, or take what the guest sends."""
        if number == RECEIVE:
            self._receive(queue)
        else:
            super().handle(number, queue)

    def _receive(self, queue: Virtqueue) -> None:
        queue.unfinished = False
        for _ in range(MAX_ROUNDS * queue.size):
            chain = queue.next() if self._pending else None
            if chain is None:
                return
            if chain.readable:
                raise QueueFault("virtio-console: a receive buffer that the device cannot write")
            room, _ = split(chain.writable, len(self._pending))
            size = total(room)
            self.bus.memory.scatter(room, bytes(self._pending[:size]))
            del self._pending[:size]
            queue.push(chain, size)
        queue.unfinished = True

    def request(self, number: int, chain: Chain) -> int:
        """The guest sends."""
        if chain.writable:
            raise QueueFault("virtio-console: a transmit buffer that the device cannot read")
        for piece in self.bus.memory.pieces(chain.readable, PIECE):
            self._sink(piece)
        return 0

    def state(self) -> dict[str, Any]:
        """The size, and what the guest has not read yet."""
        return {"size": list(self._size), "pending": self._pending.hex()}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave, but for the size: that is this terminal's own."""
        try:
            pending = bytes.fromhex(state["pending"])
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"state of a virtio-console: pending = {state.get('pending')!r}, where hex belongs"
            ) from None
        self._pending[:] = pending[:MAX_PENDING]
