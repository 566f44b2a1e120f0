"""virtio devices behind MMIO (virtio 1.2): a disk, a console, a source of entropy, a network card.

A device is made on its own and then put into a frame of registers with the guest's memory and an interrupt line:

    disk = VirtioMmio(Blk("root.img"), memory=vm, irq=lambda level: vm.irq_line(LINE, level))
    disk.read(offset, size); disk.write(offset, size, value)    # the board's MMIO exits
    disk.state(); disk.restore(state); disk.close()
"""

from kvm2.board.virtio.blk import Blk
from kvm2.board.virtio.console import Console
from kvm2.board.virtio.device import Device
from kvm2.board.virtio.link import parse_link
from kvm2.board.virtio.mmio import VirtioMmio
from kvm2.board.virtio.net import Net
from kvm2.board.virtio.rng import Rng

__all__ = ["Blk", "Console", "Device", "Net", "Rng", "VirtioMmio", "parse_link"]
