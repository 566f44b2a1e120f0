"""The entropy device (virtio 1.2, section 5.4): random bytes from this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvm2.board.virtio.device import Device
from kvm2.board.virtio.queue import QueueFault, split, total

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.board.virtio.queue import Chain

ID = 4
MAX_BYTES = 1 << 16
"""A buffer gets at most this many at once: the device may give fewer than there is room for (section 5.4.6.2)."""


class Rng(Device):
    """A source of entropy; `source` gives so many random bytes as it is asked for.

    >>> Rng().id, Rng().queue_sizes
    (4, (256,))
    """

    name = "virtio-rng"
    id = ID

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        self._source = source

    def request(self, number: int, chain: Chain) -> int:
        """Fill the buffer."""
        if chain.readable:
            raise QueueFault("virtio-rng: a buffer that the device cannot write")
        room, _ = split(chain.writable, MAX_BYTES)
        size = total(room)
        self.bus.memory.scatter(room, self._source(size))
        return size
