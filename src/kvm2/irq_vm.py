"""A VM's interrupts, and exits that need not be: lines, MSIs, routes, irqfd, ioeventfd, coalesced MMIO."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvm2.abi import ioctls
from kvm2.abi import structs_irq as abi
from kvm2.abi.structs import CoalescedMmio, CoalescedMmioRing, CoalescedMmioZone
from kvm2.errors import UsageError
from kvm2.handle import Buffer, DeviceAttributes, checked_word
from kvm2.names import capability

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm2.vcpu import Vcpu

KVM_CAP_COALESCED_MMIO = capability("COALESCED_MMIO")


def spi_line(intid: int) -> int:
    """The `irq` of `Vm.irq_line` for a shared interrupt of an arm64 GIC, by its number (32 and up).

    >>> hex(spi_line(40))
    '0x1000028'
    """
    return abi.KVM_ARM_IRQ_TYPE_SPI << abi.KVM_ARM_IRQ_TYPE_SHIFT | checked_word("intid", intid, 16)


def ppi_line(intid: int, vcpu: int) -> int:
    """The same for a private interrupt (16..31) of the vCPU with this id.

    >>> hex(ppi_line(27, 0x123))
    '0x1223001b'
    """
    return _of_vcpu(abi.KVM_ARM_IRQ_TYPE_PPI, vcpu) | checked_word("intid", intid, 16)


def cpu_line(vcpu: int, *, fiq: bool = False) -> int:
    """The same for the IRQ or FIQ input of a vCPU, where the VM has no interrupt controller."""
    return _of_vcpu(abi.KVM_ARM_IRQ_TYPE_CPU, vcpu) | (abi.KVM_ARM_IRQ_CPU_FIQ if fiq else abi.KVM_ARM_IRQ_CPU_IRQ)


def _of_vcpu(kind: int, vcpu: int) -> int:
    low_bits = abi.KVM_ARM_IRQ_VCPU_MASK.bit_length()
    high = checked_word("vcpu", vcpu, low_bits + abi.KVM_ARM_IRQ_VCPU2_MASK.bit_length()) >> low_bits
    low = vcpu & abi.KVM_ARM_IRQ_VCPU_MASK
    return (
        high << abi.KVM_ARM_IRQ_VCPU2_SHIFT
        | kind << abi.KVM_ARM_IRQ_TYPE_SHIFT
        | low << abi.KVM_ARM_IRQ_VCPU_SHIFT
    )  # fmt: skip


def pin_route(gsi: int, pin: int, *, irqchip: int = 0) -> abi.IrqRoutingEntry:
    """A route of `Vm.set_gsi_routing`: the GSI is a pin of an interrupt controller (arm64: SPI 32 + pin)."""
    return abi.IrqRoutingEntry(gsi, abi.KVM_IRQ_ROUTING_IRQCHIP, u=abi.IrqRoutingIrqchip(irqchip, pin).pack())


def msi_route(gsi: int, address: int, data: int, *, devid: int | None = None) -> abi.IrqRoutingEntry:
    """A route: the GSI is a message. `devid` is the device's id, which an ITS needs."""
    low, high = _address(address)
    message = abi.IrqRoutingMsi(low, high, data, devid or 0)
    return abi.IrqRoutingEntry(gsi, abi.KVM_IRQ_ROUTING_MSI, _devid_flag(devid), u=message.pack())


def _address(address: int) -> tuple[int, int]:
    return checked_word("address", address, 64) & 0xFFFF_FFFF, address >> 32


def _devid_flag(devid: int | None) -> int:
    return 0 if devid is None else abi.KVM_MSI_VALID_DEVID


class IrqVm(DeviceAttributes):
    """The part of `Vm` about interrupts, of every architecture. `fd` is always an eventfd of this process.

    The host keeps an eventfd that it was given; its descriptor may be closed.
    """

    def irq_line(self, irq: int, level: bool) -> None:
        """KVM_IRQ_LINE; `irq` is as api.rst has it.

        arm64: vcpu2 31:28 | irq type 27:24 | vcpu 23:16 | irq 15:0 (`spi_line`, `ppi_line`, `cpu_line` make it);
        x86-64: the number of the pin (GSI).
        """
        value = Buffer(struct.pack("=II", checked_word("irq", irq, 32), int(level)))
        self.ioctl(ioctls.KVM_IRQ_LINE, value)

    def signal_msi(self, address: int, data: int, *, devid: int | None = None) -> bool:
        """KVM_SIGNAL_MSI: whether it arrived (False: the guest has it blocked, or not mapped)."""
        low, high = _address(address)
        return self.ioctl(ioctls.KVM_SIGNAL_MSI, abi.Msi(low, high, data, _devid_flag(devid), devid or 0)) > 0

    def set_gsi_routing(self, routes: Iterable[abi.IrqRoutingEntry]) -> None:
        """KVM_SET_GSI_ROUTING: these routes (`pin_route`, `msi_route`), and no others any more."""
        entries = tuple(routes)
        head = abi.IrqRouting(nr=len(entries)).pack()
        try:
            table = Buffer(head + b"".join(entry.pack() for entry in entries))
        except struct.error as error:
            raise UsageError(f"a route's value does not fit its field ({error})") from error
        self.ioctl(ioctls.KVM_SET_GSI_ROUTING, table)

    def irqfd(self, fd: int, gsi: int, *, resample: int | None = None) -> None:
        """KVM_IRQFD: signalling `fd` raises the interrupt that `gsi` is routed to.

        With `resample`, another eventfd, a level-sensitive interrupt stays asserted until the guest has ended it;
        then the line goes down and `resample` is signalled.
        """
        flags = 0 if resample is None else abi.KVM_IRQFD_FLAG_RESAMPLE
        other = 0 if resample is None else checked_word("resample", resample, 31)
        asked = abi.Irqfd(checked_word("fd", fd, 31), checked_word("gsi", gsi, 32), flags, other)
        self.ioctl(ioctls.KVM_IRQFD, asked)

    def deassign_irqfd(self, fd: int, gsi: int) -> None:
        """KVM_IRQFD with DEASSIGN: nothing comes of `fd` any more; nothing where it was none."""
        asked = abi.Irqfd(checked_word("fd", fd, 31), checked_word("gsi", gsi, 32), abi.KVM_IRQFD_FLAG_DEASSIGN)
        self.ioctl(ioctls.KVM_IRQFD, asked)

    def ioeventfd(
        self, fd: int, address: int, size: int = 0, *, datamatch: int | None = None, port: bool = False
    ) -> None:
        """KVM_IOEVENTFD: a guest's write of `size` bytes (0: any) at `address` signals `fd`, without an exit.

        With `datamatch` only a write of this value; `port` is x86's I/O space.
        """
        self._ioeventfd(fd, address, size, datamatch, port, 0)

    def deassign_ioeventfd(
        self, fd: int, address: int, size: int = 0, *, datamatch: int | None = None, port: bool = False
    ) -> None:
        """KVM_IOEVENTFD with DEASSIGN: of what was assigned with exactly these words."""
        self._ioeventfd(fd, address, size, datamatch, port, abi.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _ioeventfd(self, fd: int, address: int, size: int, datamatch: int | None, port: bool, flags: int) -> None:
        match = 0 if datamatch is None else checked_word("datamatch", datamatch, 64)
        flags |= 0 if datamatch is None else abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        flags |= abi.KVM_IOEVENTFD_FLAG_PIO * port
        address, size = checked_word("address", address, 64), checked_word("size", size, 32)
        self.ioctl(ioctls.KVM_IOEVENTFD, abi.Ioeventfd(match, address, size, checked_word("fd", fd, 31), flags))

    def register_coalesced_mmio(self, address: int, size: int, *, port: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO: writes there wait in a ring until somebody looks (`coalesced_writes`)."""
        self.ioctl(ioctls.KVM_REGISTER_COALESCED_MMIO, _zone(address, size, port))

    def unregister_coalesced_mmio(self, address: int, size: int, *, port: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: every zone that holds all of this range is one no longer."""
        self.ioctl(ioctls.KVM_UNREGISTER_COALESCED_MMIO, _zone(address, size, port))

    def coalesced_writes(self, vcpu: Vcpu) -> list[CoalescedMmio]:
        """Takes the writes out of the VM's ring, oldest first, as seen through any of its vCPUs.

        They came before the exit that one handles: to keep the order, take them first.
        """
        area = vcpu.kvm_run
        page = self.ioctl(ioctls.KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO)
        if not page:
            return []
        # The ring is the last page of the area.
        size = len(area) // (page + 1)
        ring = page * size
        entries = (size - CoalescedMmioRing.SIZE) // CoalescedMmio.SIZE
        head = CoalescedMmioRing.unpack(area[ring : ring + CoalescedMmioRing.SIZE])
        found, at = [], head.first % entries
        while at != head.last % entries:
            start = ring + CoalescedMmioRing.SIZE + at * CoalescedMmio.SIZE
            found.append(CoalescedMmio.unpack(area[start : start + CoalescedMmio.SIZE]))
            at = (at + 1) % entries
        struct.pack_into("=I", area, ring + CoalescedMmioRing.LAYOUT.at("first").offset, at)
        return found


def _zone(address: int, size: int, port: bool) -> CoalescedMmioZone:
    return CoalescedMmioZone(checked_word("address", address, 64), checked_word("size", size, 32), int(port))
