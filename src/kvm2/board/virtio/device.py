"""What every virtio device is to its transport, and the transport to it.

A device is made without a machine (`Blk("root.img")`, `Console(sink)`), and works once `mmio.VirtioMmio` has attached
it: the transport has the registers, queues, features and the interrupt; the device has its configuration space and what
it does with a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kvm2.errors import UsageError

if TYPE_CHECKING:
    from kvm2.board.virtio.queue import Chain, GuestMemory, Virtqueue

QUEUE_SIZE = 256
"""Descriptors of a queue, at most, where a device does not say otherwise."""


class Transport(Protocol):
    """What a device may ask of the transport that it is attached to."""

    @property
    def memory(self) -> GuestMemory: ...
    @property
    def running(self) -> bool:
        """Whether a driver is there, and nothing is broken."""
        ...

    def negotiated(self, feature: int) -> bool:
        """Whether the driver has accepted the feature with this number."""
        ...

    def service(self, queue: int) -> None:
        """Let the device work on a queue (`Device.handle`), as if the driver had notified it; from any thread."""
        ...

    def config_changed(self) -> None:
        """The configuration space has changed: tell the driver; from any thread."""
        ...


class Device:
    """A virtio device without its transport. `name` is for people; `id` and the features are the specification's.

    The transport calls `handle`, `write_config` and `reset` with its lock held: one at a time.
    """

    name = "virtio device"
    id = 0
    features = 0
    """What it offers besides the transport's own, as a bit mask."""
    queue_sizes: tuple[int, ...] = (QUEUE_SIZE,)
    """The largest size of each queue."""

    transport: Transport | None = None

    def attach(self, transport: Transport) -> None:
        """The transport introduces itself; UsageError where there is one already."""
        if self.transport is not None:
            raise UsageError(f"this {self.name} is in a machine already: make another one")
        self.transport = transport

    @property
    def bus(self) -> Transport:
        """The transport, for what only happens once there is one."""
        assert self.transport is not None
        return self.transport

    def config(self) -> bytes:
        """The configuration space as it is now."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes its configuration space: ignored, unless a device has something writable there."""

    def handle(self, number: int, queue: Virtqueue) -> None:
        """The driver has made buffers available in a queue: by default each chain is a `request`."""
        for chain in queue.requests():
            queue.push(chain, self.request(number, chain))

    def request(self, number: int, chain: Chain) -> int:
        """Do one request of queue `number`; the bytes written into its writable part."""
        raise NotImplementedError

    def reset(self) -> None:
        """The driver resets the device."""

    def state(self) -> dict[str, Any]:
        """What a snapshot needs besides the transport's: JSON values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; UsageError where this device cannot go on from there."""

    def close(self) -> None:
        """Give back threads and files; may be called again."""
