"""Ioctls about interrupts, one after the other, and what a host answers: for the software KVM and a live kernel.

`tests/data/irq/calls.txt` has the answers of Linux 6.12 (the oracle's max-4k-6.12). A count of an eventfd is read only
after an ioctl on the VM: until then a kernel may have taken it, and the software KVM not yet.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable
from typing import Any

import kvm2
from kvm2.abi import ioctls
from kvm2.abi import structs_irq as abi
from kvm2.abi.structs import CoalescedMmioZone
from kvm2.errors import KvmError
from kvm2.handle import Buffer
from kvm2.irq_vm import msi_route, pin_route

CLOSED = 999  # a descriptor that is not open
DIST, REDIST = 0x0800_0000, 0x080A_0000
GRP_ADDR, GRP_DIST, GRP_NR_IRQS, GRP_CTRL, GRP_LEVEL = 0, 1, 3, 4, 7
ISPENDR, ICFGR = 0x200, 0xC00
SPI, PPI = 0x100_0000, 0x200_0000
SETTLE_SECONDS = 0.1  # a kernel injects from a work queue where an eventfd was signalled before it was assigned


class Recorder:
    """The lines so far, and the eventfds in use."""

    def __init__(self, host: str) -> None:
        self.lines: list[str] = []
        self.kvm = kvm2.open(host)
        self.one, self.two = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self.pipe = os.pipe()

    def ask(self, label: str, call: Callable[..., Any], *arguments: Any, **words: Any) -> None:
        """A line: the answer, or the errno's name."""
        try:
            answer = call(*arguments, **words)
        except KvmError as error:
            answer = error.name
        except BlockingIOError:
            answer = errno.errorcode[errno.EAGAIN]
        self.lines.append(f"{label}: {answer}")

    def close(self) -> None:
        self.kvm.close()
        for fd in (self.one, self.two, *self.pipe):
            os.close(fd)


class Gic:
    """A VM with a vCPU and a GICv3 of 64 SPIs."""

    def __init__(self, kvm: Any) -> None:
        self.vm = kvm.create_vm()
        self.vcpu = self.vm.create_vcpu(0)
        self.device = self.vm.create_device("vgic-v3")
        self.device.set_device_attr(GRP_NR_IRQS, 0, struct.pack("<I", 96))
        for kind, address in ((2, DIST), (3, REDIST)):
            self.device.set_device_attr(GRP_ADDR, kind, struct.pack("<Q", address))

    def init(self) -> None:
        self.device.set_device_attr(GRP_CTRL, 0)

    def state(self, intid: int) -> str:
        """The latch and the level of an interrupt."""
        pending = self._word(GRP_DIST, ISPENDR + intid // 32 * 4) >> intid % 32 & 1
        level = self._word(GRP_LEVEL, intid // 32 * 32) >> intid % 32 & 1
        return "pending" * pending + "asserted" * level or "-"

    def word(self, offset: int) -> str:
        return hex(self._word(GRP_DIST, offset))

    def _word(self, group: int, attr: int) -> int:
        return int(struct.unpack("<I", self.device.get_device_attr(group, attr, 4))[0])


def line(vm: Any, irq: int, level: int = 1, request: int = ioctls.KVM_IRQ_LINE) -> str:
    """KVM_IRQ_LINE or its sister: the result, and the structure afterwards."""
    buffer = Buffer(struct.pack("<II", irq, level))
    return f"{vm.ioctl(request, buffer)} {buffer.bytes().hex()}"


def without_gic(note: Recorder) -> None:
    """Lines, routes and irqfds of a VM without an interrupt controller."""
    ask, vm = note.ask, note.kvm.create_vm()
    vm.create_vcpu(0)
    for irq in (0, 1, 2, 0x10000, 0x1000_0000, SPI | 40, PPI | 27, 0x300_0000):
        ask(f"no GIC: line {irq:#x}", line, vm, irq)
    for level in (0xFF, 0):
        ask(f"no GIC: line status {level:#x}", line, vm, 0, level, ioctls.KVM_IRQ_LINE_STATUS)
    ask("no GIC: line EFAULT", vm.ioctl, ioctls.KVM_IRQ_LINE, 8)
    ask("no GIC: MSI", vm.signal_msi, 0, 0)
    for name, fd in (("", note.one), (" closed", CLOSED), (" pipe", note.pipe[0])):
        ask(f"no GIC: irqfd{name}", vm.irqfd, fd, 3)
        ask(f"no GIC: deassign{name}", vm.deassign_irqfd, fd, 3)


def routes(note: Recorder) -> None:
    """What a routing table may have."""
    entry = abi.IrqRoutingEntry
    tables = {
        "none": [],
        "pin 987": [pin_route(0, 987)],
        "pin 988": [pin_route(0, 988)],
        "chip 1": [pin_route(0, 0, irqchip=1)],
        "GSI twice": [pin_route(0, 0), pin_route(0, 1)],
        "pin and MSI": [pin_route(0, 0), msi_route(0, 0, 0)],
        "GSI 4095": [pin_route(4095, 1)],
        "GSI 4096": [pin_route(4096, 1)],
        "MSI": [msi_route(1, 0x8090040, 1)],
        "MSI of a device": [msi_route(1, 0x8090040, 1, devid=5)],
        "type 0": [entry(0, 0)],
        "type 3": [entry(0, 3)],
        "flags": [entry(0, 1, 1)],
        "MSI's flags": [entry(0, 2, 2)],
        "pad": [entry(0, 1, 0, 7)],
        "pin twice": [pin_route(0, 3), pin_route(1, 3)],
    }
    vm = note.kvm.create_vm()
    for name, table in tables.items():
        note.ask(f"routes: {name}", vm.set_gsi_routing, table)
    note.ask("routes: 4097", vm.ioctl, ioctls.KVM_SET_GSI_ROUTING, abi.IrqRouting(4097, 0))
    note.ask("routes: flags of the table", vm.ioctl, ioctls.KVM_SET_GSI_ROUTING, abi.IrqRouting(0, 1))


def ioeventfds(note: Recorder) -> None:
    """Lengths, collisions, what can be taken away."""
    ask, one, vm = note.ask, note.one, note.kvm.create_vm()
    top = 1 << 64
    for address, size in ((0x1000, 3), (0x1000, 16), (top - 4, 4), (top - 4, 2), (0x3000, 0), (0x3000, 1)):
        ask(f"ioeventfd: {size} at {address:#x}", vm.ioeventfd, one, address, size)
    ask("ioeventfd: any length, a value", vm.ioeventfd, one, 0x1000, 0, datamatch=1)
    for size, datamatch in ((4, None), (4, None), (4, 1), (2, None), (0, None), (8, 1), (8, 2), (8, 2), (8, None)):
        ask(f"ioeventfd: {size}, value {datamatch}", vm.ioeventfd, one, 0x2000, size, datamatch=datamatch)
    for _ in range(2):
        ask("ioeventfd: a port", vm.ioeventfd, one, 0x2000, 4, port=True)
    for name, fd in (("closed", CLOSED), ("pipe", note.pipe[0])):
        ask(f"ioeventfd: {name}", vm.ioeventfd, fd, 0x9000, 4)
        ask(f"ioeventfd: {name}, wrong length", vm.ioeventfd, fd, 0x9000, 3)
        ask(f"ioeventfd: take away {name}", vm.deassign_ioeventfd, fd, 0x9000, 4)
    for flags in (8, 16, 32, 10):
        asked = abi.Ioeventfd(0, 0x7000, 4, one, flags)
        ask(f"ioeventfd: flags {flags}", vm.ioctl, ioctls.KVM_IOEVENTFD, asked)
    for name, fd, size in (("another", note.two, 4), ("it", one, 4), ("it again", one, 4), ("no value", one, 8)):
        ask(f"ioeventfd: take away {name}", vm.deassign_ioeventfd, fd, 0x2000, size)
    ask("ioeventfd: take away a wrong length", vm.deassign_ioeventfd, one, 0x2000, 3)
    asked = abi.Ioeventfd(0, 0x3000, 0, one, abi.KVM_IOEVENTFD_FLAG_DEASSIGN | 32)
    ask("ioeventfd: take away with unknown flags", vm.ioctl, ioctls.KVM_IOEVENTFD, asked)


def zones(note: Recorder) -> None:
    """Coalesced MMIO, and how much fits on a bus."""
    ask, vm = note.ask, note.kvm.create_vm()
    for name, address, size in (("", 0x1000, 16), (" again", 0x1000, 16), (" empty", 0x1000, 0)):
        ask(f"zone{name}", vm.register_coalesced_mmio, address, size)
    ask("zone over the end", vm.register_coalesced_mmio, (1 << 64) - 1, 16)
    ask("zone of ports", vm.register_coalesced_mmio, 0x1000, 16, port=True)
    ask("zone of 2", vm.ioctl, ioctls.KVM_REGISTER_COALESCED_MMIO, CoalescedMmioZone(0, 8, 2))
    ask("no zone of 2", vm.ioctl, ioctls.KVM_UNREGISTER_COALESCED_MMIO, CoalescedMmioZone(0, 8, 2))
    ask("no zone there", vm.unregister_coalesced_mmio, 0x900000, 16)
    ask("no zone", vm.unregister_coalesced_mmio, 0x1000, 16)
    for number in range(996):  # with the two that are left of those above
        vm.register_coalesced_mmio(0x100000 + number * 16, 16)
    for number in range(996, 1000):
        ask(f"zone {number}", vm.register_coalesced_mmio, 0x100000 + number * 16, 16)
    ask("an ioeventfd on a full bus", vm.ioeventfd, note.one, 0xA000, 4)


def with_gic(note: Recorder) -> None:
    """Lines and messages before and after the GIC is initialised."""
    ask, gic = note.ask, Gic(note.kvm)
    vm = gic.vm
    ask("not initialised: irqfd", vm.irqfd, note.one, 3)
    for irq in (0, SPI | 40, SPI | 8, PPI | 8, PPI | 27):
        ask(f"not initialised: line {irq:#x}", line, vm, irq)
    ask("not initialised: MSI", vm.signal_msi, 0x8090040, 0)
    ask("MSI with flags", vm.ioctl, ioctls.KVM_SIGNAL_MSI, abi.Msi(0, 0, 0, 2))
    gic.init()
    for number in (8, 32, 95, 96, 1019, 1020, 8192):
        ask(f"SPI {number}", line, vm, SPI | number)
    for irq in (PPI | 15, PPI | 16, PPI | 31, PPI | 32, PPI | 0x10010, PPI | 0x1000_0010, 0, 0x400_0000):
        ask(f"line {irq:#x}", line, vm, irq)
    ask("MSI", vm.signal_msi, 0x8090040, 0)
    ask("configuration of SPIs", lambda: [gic.word(ICFGR + 8), gic.word(ICFGR + 12)])
    ask("SPI 32", gic.state, 32)
    vm.irq_line(SPI | 32, False)
    ask("SPI 32 low", gic.state, 32)


def irqfds(note: Recorder) -> None:
    """Edge-triggered SPIs: assigning, routes, what is injected, what is read away."""
    ask, one, two, gic = note.ask, note.one, note.two, Gic(note.kvm)
    vm = gic.vm
    gic.init()
    ask("irqfd: closed", vm.irqfd, CLOSED, 3)
    ask("irqfd: pipe", vm.irqfd, note.pipe[0], 3)
    ask("irqfd: flags", vm.ioctl, ioctls.KVM_IRQFD, abi.Irqfd(one, 3, 4))
    ask("irqfd: resample closed", vm.irqfd, one, 3, resample=CLOSED)
    ask("irqfd: resample pipe", vm.irqfd, one, 3, resample=note.pipe[0])
    ask("irqfd", vm.irqfd, one, 3)
    ask("irqfd: again", vm.irqfd, one, 3)
    other = os.dup(one)
    ask("irqfd: another descriptor of it", vm.irqfd, other, 4)
    os.close(other)

    def signal(fd: int, intid: int, times: int = 1) -> None:
        os.eventfd_write(fd, times)
        ask(f"signalled: {intid}", gic.state, intid)
        ask("count", os.eventfd_read, fd)
        gic.device.set_device_attr(GRP_DIST, ISPENDR + intid // 32 * 4, bytes(4))

    signal(one, 35)
    ask("take away another GSI", vm.deassign_irqfd, one, 9)
    signal(one, 35, 7)
    ask("take away", vm.deassign_irqfd, one, 3)
    signal(one, 35)
    os.eventfd_write(one, 5)
    ask("signalled before", vm.irqfd, one, 6)
    time.sleep(SETTLE_SECONDS)
    ask("state", gic.state, 38)
    ask("count", os.eventfd_read, one)
    signal(one, 38)
    vm.deassign_irqfd(one, 6)
    ask("GSI without a route", vm.irqfd, one, 0xFFFF_FFFF)
    signal(one, 35)
    vm.deassign_irqfd(one, 0xFFFF_FFFF)
    vm.set_gsi_routing([pin_route(100, 2)])
    ask("GSI of its own", vm.irqfd, one, 100)
    signal(one, 34)
    vm.set_gsi_routing([pin_route(100, 3)])
    signal(one, 35)
    vm.set_gsi_routing([pin_route(100, 500)])
    signal(one, 34)
    vm.set_gsi_routing([msi_route(100, 0x8090040, 1)])
    signal(one, 34)
    vm.set_gsi_routing([pin_route(11, 11)])
    semaphore = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    vm.irqfd(semaphore, 11)
    signal(semaphore, 43, 3)
    signal(two, 43)
    os.close(semaphore)
    vm.deassign_irqfd(one, 100)


def levels(note: Recorder) -> None:
    """Level-sensitive SPIs, with and without a resampler."""
    ask, one, two, gic = note.ask, note.one, note.two, Gic(note.kvm)
    vm = gic.vm
    gic.init()
    gic.device.set_device_attr(GRP_DIST, ICFGR + 8, bytes(4))
    ask("configuration of SPIs", gic.word, ICFGR + 8)

    def assign(label: str, intid: int, signalled: bool, fd: int = one, **words: int) -> None:
        if signalled:
            os.eventfd_write(fd, 1)
        ask(label, vm.irqfd, fd, intid - 32, **words)
        if signalled:
            time.sleep(SETTLE_SECONDS)
        else:
            os.eventfd_write(fd, 1)
        ask(f"state of {intid}", gic.state, intid)
        ask("count", os.eventfd_read, fd)

    assign("level", 35, False)
    vm.deassign_irqfd(one, 3)
    ask("taken away", gic.state, 35)
    assign("level, signalled before", 36, True)
    vm.deassign_irqfd(one, 4)
    assign("resampled, signalled before", 37, True, resample=two)
    third = os.eventfd(0, os.EFD_NONBLOCK)
    assign("resampled", 37, False, third, resample=two)
    vm.deassign_irqfd(one, 5)
    ask("one left", gic.state, 37)
    vm.deassign_irqfd(third, 5)
    ask("none left", gic.state, 37)
    vm.irqfd(third, 6)
    vm.irq_line(SPI | 39, True)
    ask("line", gic.state, 39)
    ask("irqfd already, to be resampled", vm.irqfd, third, 7, resample=two)
    ask("line", gic.state, 39)
    ask("level 2", line, vm, SPI | 36, 2)
    ask("line", gic.state, 36)
    os.close(third)


def answers(host: str) -> list[str]:
    """Every line, for one host."""
    note = Recorder(host)
    try:
        for part in (without_gic, routes, ioeventfds, zones, with_gic, irqfds, levels):
            part(note)
    finally:
        note.close()
    return note.lines
