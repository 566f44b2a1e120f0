"""Where things are in the guest physical address space of a Linux machine, and where a kernel, its initrd and its
device tree go in the RAM (Documentation/arch/arm64/booting.rst).

>>> placed = place_linux((MemoryRange(1 << 30, 512 << 20),), kernel=36 << 20, text_offset=0, initrd=3 << 20)
>>> hex(placed.kernel), hex(placed.dtb), hex(placed.initrd)
('0x40000000', '0x42400000', '0x42600000')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvm2.errors import UsageError
from kvm2.spec import MemoryRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DEFAULT_MEMORY = (MemoryRange(1 << 30, 512 << 20),)

GIC_DIST, GIC_DIST_SIZE = 0x0800_0000, 0x1_0000
GICV2_CPU, GICV2_CPU_SIZE = 0x0801_0000, 0x2000
GICV2_DIST_SIZE = 0x1000
GIC_ITS, GIC_ITS_SIZE = 0x0808_0000, 0x2_0000
GIC_REDIST, REDIST_SIZE = 0x080A_0000, 0x2_0000  # two 64K frames a vCPU
# What lies between the redistributors and the UART is room for this many; more go to a second region.
FIRST_REDISTS = 123
GIC_REDIST_MORE = 0x1000_0000

UART_BASE, UART_SPI = 0x0900_0000, 1
RTC_BASE, RTC_SPI = 0x0901_0000, 2
VIRTIO_BASE, VIRTIO_STRIDE, VIRTIO_SPI = 0x0A00_0000, 0x200, 16
MOST_VIRTIO = 32

FIRST_SPI = 32  # the INTID of SPI 0
_IRQ_GRANULE, _LEAST_IRQS = 32, 64  # KVM_DEV_ARM_VGIC_GRP_NR_IRQS: multiples of 32 from 64

BLOCK = 2 << 20  # the boot protocol's unit: the Image's alignment, and the most that a device tree may have
DTB_ROOM = BLOCK
PAGE = 1 << 16  # of the largest granule
HIGHEST_KERNEL = 1 << 48


class Room(NamedTuple):
    """Addresses that belong to a device, so that no RAM can be there."""

    name: str
    base: int
    size: int

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.base + self.size


def irqs_for(virtio: int) -> int:
    """How many interrupts the GIC needs for this many virtio devices: KVM's NR_IRQS, those below FIRST_SPI included.

    >>> irqs_for(0), irqs_for(16), irqs_for(17)
    (64, 64, 96)
    """
    needed = FIRST_SPI + VIRTIO_SPI + virtio
    return max(_LEAST_IRQS, -(-needed // _IRQ_GRANULE) * _IRQ_GRANULE)


def redistributors(cpus: int) -> tuple[Room, ...]:
    """The regions of a GICv3's redistributors.

    >>> [hex(room.base) for room in redistributors(124)]
    ['0x80a0000', '0x10000000']
    """
    first = min(cpus, FIRST_REDISTS)
    rooms = [Room("redistributors", GIC_REDIST, first * REDIST_SIZE)]
    if cpus > first:
        rooms.append(Room("redistributors", GIC_REDIST_MORE, (cpus - first) * REDIST_SIZE))
    return tuple(rooms)


def rooms_of(cpus: int) -> tuple[Room, ...]:
    """Everything that RAM must leave free, with either GIC and any number of virtio devices."""
    low_end = VIRTIO_BASE + MOST_VIRTIO * VIRTIO_STRIDE
    low = Room("the interrupt controller, UART, clock and virtio devices", GIC_DIST, low_end - GIC_DIST)
    return (low, *redistributors(cpus)[1:])


def check_rooms(memory: Iterable[MemoryRange], rooms: Iterable[Room]) -> None:
    """UsageError where RAM covers a device's addresses."""
    for piece in memory:
        for room in rooms:
            if piece.base < room.end and room.base < piece.end:
                raise UsageError(
                    f"memory {piece} covers {room.name} at {room.base:#x}..{room.end:#x}: leave that free "
                    f"(from {1 << 30:#x} upwards nothing is)"
                )


@dataclass(frozen=True)
class Placed:
    """Guest physical addresses of the kernel (its entry too), the device tree and the initrd."""

    kernel: int
    dtb: int
    initrd: int


def place_linux(memory: Sequence[MemoryRange], kernel: int, text_offset: int, initrd: int) -> Placed:
    """Where a kernel that needs `kernel` bytes goes, with an initrd of `initrd` bytes: the lowest range with room.

    The Image is at a 2 MiB boundary plus `text_offset`, as low as can be; the device tree has 2 MiB of its own behind
    it, then comes the initrd. UsageError where no range has room.
    """
    needed = 0
    for piece in sorted(memory, key=lambda one: one.base):
        at = _aligned(piece.base, BLOCK) + text_offset
        dtb = _aligned(at + kernel, BLOCK)
        initrd_at = dtb + DTB_ROOM
        end = initrd_at + _aligned(initrd, PAGE)
        if end <= piece.end:
            if at + kernel > HIGHEST_KERNEL:
                raise UsageError(f"memory {piece}: Linux boots from the lowest 2^48 bytes only: give it a range there")
            return Placed(at, dtb, initrd_at)
        needed = end - piece.base
    have = ", ".join(str(piece) for piece in memory)
    raise UsageError(
        f"the kernel ({kernel:#x} bytes), its device tree ({DTB_ROOM:#x}) and the initrd ({initrd:#x}) need a range of "
        f"{needed:#x} bytes, and some to work in; memory is {have}: give more (--memory SIZE@ADDRESS)"
    )


def _aligned(value: int, unit: int) -> int:
    return -(-value // unit) * unit
