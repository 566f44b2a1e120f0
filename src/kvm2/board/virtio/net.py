"""The network device (virtio 1.2, section 5.1): one pair of queues, no offloads, a socket for a cable.

To be on this machine's network, QEMU can do the translation, with no machine of its own:

    qemu-system-aarch64 -M none -nographic -netdev user,id=u -netdev stream,id=s,addr.type=unix,addr.path=P,server=on
        -netdev hubport,id=a,hubid=0,netdev=u -netdev hubport,id=b,hubid=0,netdev=s
"""

from __future__ import annotations

import os
import re
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from kvm2.board.virtio.device import QUEUE_SIZE, Device
from kvm2.board.virtio.link import MAX_FRAME, Link
from kvm2.board.virtio.queue import MAX_ROUNDS, QueueFault, split, total
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from kvm2.board.virtio.device import Transport
    from kvm2.board.virtio.queue import Chain, Virtqueue

ID = 1
RECEIVE, TRANSMIT = 0, 1
F_MAC, F_STATUS = 5, 16
S_LINK_UP = 1
CONFIG = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
# struct virtio_net_hdr_v1: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers.
HEADER = struct.Struct("<BBHHHHH")
RECEIVED = HEADER.pack(0, 0, 0, 0, 0, 0, 1)
HDR_F_NEEDS_CSUM = 1
MAX_BACKLOG = 256
"""Frames that wait for the guest's buffers; while there are so many the socket is not read."""


class Net(Device):
    """A network card at the end of `link` (`parse_link`); `mac` is "52:54:00:..." or None for a random one.

    `dropped` counts frames that were lost on either way. UsageError where the MAC address cannot be a card's.
    """

    name = "virtio-net"
    id = ID
    features = 1 << F_MAC | 1 << F_STATUS
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)

    def __init__(self, link: Link, *, mac: str | None = None) -> None:
        self.mac = mac_address(mac) if mac is not None else b"\x52\x54\x00" + os.urandom(3)
        self.link = link
        self.dropped = 0
        self._backlog: deque[bytes] = deque()

    def config(self) -> bytes:
        """struct virtio_net_config."""
        return CONFIG.pack(self.mac, S_LINK_UP if self.link.up else 0, 1, 0)

    def attach(self, transport: Transport) -> None:
        """Also begins to read the socket: until there is a driver, frames are lost, and hold up nobody else."""
        super().attach(transport)
        self.link.start(self._deliver, lambda: len(self._backlog) < MAX_BACKLOG, transport.config_changed)

    def _deliver(self, frames: list[bytes]) -> None:
        # The link's thread.
        if not self.bus.running:
            self.dropped += len(frames)
            return
        self._backlog.extend(frames)
        self.bus.service(RECEIVE)

    def handle(self, number: int, queue: Virtqueue) -> None:
        """Give frames to the guest's buffers, or take what the guest sends."""
        if number == TRANSMIT:
            super().handle(number, queue)
            return
        full = len(self._backlog) >= MAX_BACKLOG
        queue.unfinished = False
        self._receive(queue)
        if full and len(self._backlog) < MAX_BACKLOG:
            self.link.wake()

    def _receive(self, queue: Virtqueue) -> None:
        for _ in range(MAX_ROUNDS * queue.size):
            chain = queue.next() if self._backlog else None
            if chain is None:
                return
            if chain.readable:
                raise QueueFault("virtio-net: a receive buffer that the device cannot write")
            data = RECEIVED + self._backlog.popleft()
            room, _ = split(chain.writable, len(data))
            if total(room) < len(data):
                # A frame that the guest's MTU does not allow is lost, the buffer is not.
                queue.unpop()
                self.dropped += 1
                continue
            self.bus.memory.scatter(room, data)
            queue.push(chain, len(data))
        queue.unfinished = True

    def request(self, number: int, chain: Chain) -> int:
        """The guest sends a frame: lost where it is none, wants an offload that was not offered, or cannot go out."""
        if chain.writable:
            raise QueueFault("virtio-net: a transmit buffer that the device cannot read")
        size = total(chain.readable) - HEADER.size
        if size < 0:
            raise QueueFault(f"virtio-net: a frame without its header of {HEADER.size} bytes")
        if not 0 < size <= MAX_FRAME:
            self.dropped += 1
            return 0
        data = self.bus.memory.gather(chain.readable)
        flags, gso_type, *_ = HEADER.unpack_from(data)
        if flags & HDR_F_NEEDS_CSUM or gso_type or not self.link.send(data[HEADER.size :]):
            self.dropped += 1
        return 0

    def reset(self) -> None:
        """What waits is lost."""
        self._backlog.clear()
        self.link.wake()

    def state(self) -> dict[str, Any]:
        """The address. Frames on their way are lost, as networks may lose them."""
        return {"mac": self.mac.hex(":")}

    def restore(self, state: dict[str, Any]) -> None:
        """The address becomes the one that the guest's driver knows."""
        self.mac = mac_address(str(state.get("mac")))

    def close(self) -> None:
        """Closes the link."""
        self.link.close()


def mac_address(text: str) -> bytes:
    """The six bytes of a network card's address; UsageError where it is none, or a group's.

    >>> mac_address("52:54:00:00:00:01").hex()
    '525400000001'
    """
    if not re.fullmatch("[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text):
        raise UsageError(f"MAC address {text!r}: allowed are six bytes, as in 52:54:00:12:34:56")
    address = bytes.fromhex(text.replace(":", ""))
    if address[0] & 1 or not any(address):
        raise UsageError(
            f"MAC address {text}: a card's first byte is even (an odd one is a group's), and not all are 0"
        )
    return address
