"""A VM with a GICv3 and an ITS through the ioctl door, and what its guest would do: registers, commands, tables."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

import kvm2
from kvm2.abi import its as abi
from kvm2.abi import vgic_attrs as va
from kvm2.abi.structs_irq import KVM_MSI_VALID_DEVID, Msi
from kvm2.errors import KvmError
from kvm2.softkvm.vgic.its import Its, inject_msi
from kvm2.softkvm.vgic.lpi import Lpi
from kvm2.softkvm.vgic.state import Vgic

RAM, RAM_SIZE = 0x4000_0000, 16 << 20
QUEUE, DEVICES, COLLECTIONS, PROPERTIES, PENDING, ITT = (RAM + (n << 20) for n in range(1, 7))
DIST, ITS, REDIST = 0x0800_0000, 0x0808_0000, 0x080A_0000
REDIST_STRIDE = 0x20000
QUEUE_SIZE = 0x10000
GICR_CTLR, GICR_PROPBASER, GICR_PENDBASER, GICR_INVLPIR, GICR_INVALLR = 0x00, 0x70, 0x78, 0xA0, 0xB0
ENABLED, PRIORITY = 1, 0xA0
FIRST = 8192


def words(opcode: int, device: int = 0, event: int = 0, high: int = 0, two: int = 0, three: int = 0) -> bytes:
    """A command."""
    return struct.pack("<4Q", opcode | device << 32, event | high << 32, two, three)


def mapd(device: int, itt: int = ITT, bits: int = 8, valid: bool = True) -> bytes:
    return words(abi.MAPD, device, bits - 1, two=itt | valid << 63)


def mapc(collection: int, vcpu: int = 0, valid: bool = True) -> bytes:
    return words(abi.MAPC, two=collection | vcpu << 16 | valid << 63)


def mapti(device: int, event: int, intid: int, collection: int = 0) -> bytes:
    return words(abi.MAPTI, device, event, intid, collection)


class Guest:
    """Its tables are empty and its ITS is off until `start`."""

    def __init__(self, kvm: Any, vm: Any, vcpus: int) -> None:
        self.kvm, self.vm = kvm, vm
        self.soft = kvm.backend.inspect(vm.fd)
        self.ram = vm.map(RAM, RAM_SIZE)
        self.vcpus = [vm.create_vcpu(number) for number in range(vcpus)]
        for vcpu in self.vcpus:
            vcpu.init()
        self.gic = vm.create_device("vgic-v3")
        self.its = vm.create_device("vgic-its")
        for kind, address in ((va.KVM_VGIC_V3_ADDR_TYPE_DIST, DIST), (va.KVM_VGIC_V3_ADDR_TYPE_REDIST, REDIST)):
            self.gic.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_ADDR, kind, address.to_bytes(8, "little"))
        self.gic.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_VGIC_CTRL_INIT)
        self.place(ITS)
        from kvm2.softkvm.vgic import resources

        resources.map_resources(self.vgic)

    @property
    def vgic(self) -> Vgic:
        vgic: Vgic = self.soft.vgic
        return vgic

    @property
    def model(self) -> Its:
        its: Its = self.soft.itses[0]
        return its

    # ---- userspace

    def place(self, address: int, its: Any = None) -> None:
        (its or self.its).set_device_attr(
            va.KVM_DEV_ARM_VGIC_GRP_ADDR, va.KVM_VGIC_ITS_ADDR_TYPE, address.to_bytes(8, "little")
        )

    def control(self, attribute: int) -> None:
        self.its.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_CTRL, attribute)

    def get(self, offset: int) -> int:
        return int.from_bytes(self.its.get_device_attr(va.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, 8), "little")

    def put(self, offset: int, value: int) -> None:
        self.its.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, value.to_bytes(8, "little"))

    def save_pending(self) -> None:
        self.gic.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)

    def message(self, device: int, event: int, address: int = ITS + abi.GITS_TRANSLATER, flags: int = 1) -> int:
        """KVM_SIGNAL_MSI's middle."""
        assert flags in (0, KVM_MSI_VALID_DEVID)
        return inject_msi(self.soft, Msi(address & 0xFFFFFFFF, address >> 32, event, flags, device))

    # ---- the guest's accesses

    def read(self, address: int, size: int = 8) -> int | None:
        value: int | None = self.soft.bus.read(self.soft.vcpus[0], address, size)
        return value

    def write(self, address: int, value: int, size: int = 8) -> bool:
        taken: bool = self.soft.bus.write(self.soft.vcpus[0], address, size, value)
        return taken

    def reg(self, offset: int, size: int = 8) -> int | None:
        return self.read(ITS + offset, size)

    def set_reg(self, offset: int, value: int, size: int = 8) -> None:
        assert self.write(ITS + offset, value, size)

    def redist(self, vcpu: int, offset: int, value: int, size: int = 8) -> None:
        assert self.write(REDIST + vcpu * REDIST_STRIDE + offset, value, size)

    def start(self, indirect: bool = False, table_pages: int = 1) -> None:
        """What Linux does: tables, LPIs on at every vCPU, distributor and CPU interfaces open."""
        for number in range(len(self.vcpus)):
            self.redist(number, GICR_PROPBASER, PROPERTIES | 15)
            self.redist(number, GICR_PENDBASER, PENDING + number * 0x10000)
            self.redist(number, GICR_CTLR, 1, 4)
        self.set_reg(abi.GITS_BASER, DEVICES | abi.VALID | indirect * abi.BASER_INDIRECT | table_pages - 1)
        self.set_reg(abi.GITS_BASER + 8, COLLECTIONS | abi.VALID | table_pages - 1)
        self.set_reg(abi.GITS_CBASER, QUEUE | abi.VALID | QUEUE_SIZE // 4096 - 1)
        self.set_reg(abi.GITS_CTLR, 1, 4)
        self.vgic.enabled = True
        for cpu in self.vgic.cpus():
            cpu.interface.set_pmr(0xF8)
            cpu.interface.set_groups(True, True)

    def send(self, *commands: bytes) -> None:
        """Commands go into the queue, and CWRITER tells the ITS of them."""
        for command in commands:
            at = self.reg(abi.GITS_CWRITER)
            assert at is not None
            self.vm.write(QUEUE + at, command)
            self.set_reg(abi.GITS_CWRITER, (at + abi.COMMAND_SIZE) % QUEUE_SIZE)

    def configure(self, *intids: int, byte: int = PRIORITY | ENABLED) -> None:
        for intid in intids:
            self.vm.write(PROPERTIES + intid - FIRST, bytes([byte]))

    # ---- what became of it

    def lpi(self, intid: int) -> Lpi | None:
        from kvm2.softkvm.vgic import lpi

        return lpi.find(self.vgic, intid)

    def acknowledge(self, vcpu: int = 0) -> int:
        """What the guest reads from ICC_IAR1_EL1, ended at once."""
        interface = self.vgic.cpus()[vcpu].interface
        intid = interface.acknowledge(1)[0]
        if intid != 1023:
            interface.end(1, intid)
        return intid

    def entry(self, address: int) -> int:
        return int.from_bytes(self.vm.read(address, 8), "little")

    def set_entry(self, address: int, value: int) -> None:
        self.vm.write(address, value.to_bytes(8, "little"))


@contextlib.contextmanager
def guest(host: str = "max-4k-6.12", vcpus: int = 2, **create: int) -> Iterator[Guest]:
    """A VM on `host`."""
    with kvm2.open(host) as kvm, kvm.create_vm2(**create) as vm:
        made = Guest(kvm, vm, vcpus)
        yield made
        for vcpu in made.vcpus:
            vcpu.close()


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    """The errno's name that a call is refused with; "" where it works."""
    try:
        call(*args, **kwargs)
    except KvmError as refusal:
        return refusal.name
    return ""
