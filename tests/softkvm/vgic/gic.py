"""A VM with a vGIC through the ioctl door, and the calls of KVM's selftests on it; a refusal is its errno's name."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import kvm2
from kvm2.abi import vgic_attrs as va
from kvm2.errors import KvmError
from kvm2.vcpu import Vcpu

V3_HOST, V2_HOST = "max-4k-6.12", "max-4k-gicv2"
RAM, RAM_SIZE = 0x4000_0000, 1 << 16
# movz x0, #0x8400, lsl #16; movk x0, #8; hvc #0: PSCI SYSTEM_OFF.
OFF = struct.pack("<3I", 0xD2B08000, 0xF2800100, 0xD4000002)
ADDR, DIST, CPU, NR_IRQS, CTRL = (
    va.KVM_DEV_ARM_VGIC_GRP_ADDR,
    va.KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
    va.KVM_DEV_ARM_VGIC_GRP_CPU_REGS,
    va.KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    va.KVM_DEV_ARM_VGIC_GRP_CTRL,
)
REDIST, SYSREGS, LEVELS = (
    va.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
    va.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    va.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
)
V2_DIST, V2_CPU, V3_DIST, V3_REDIST, REGION = (
    va.KVM_VGIC_V2_ADDR_TYPE_DIST,
    va.KVM_VGIC_V2_ADDR_TYPE_CPU,
    va.KVM_VGIC_V3_ADDR_TYPE_DIST,
    va.KVM_VGIC_V3_ADDR_TYPE_REDIST,
    va.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
)
DIST_AT, OTHER_AT = 0x0800_0000, 0x080A_0000  # the distributor; redistributors, or a GICv2's CPU interface


def region(count: int, base: int, flags: int, index: int) -> int:
    """REDIST_REGION_ATTR_ADDR."""
    return count << 52 | base | flags << 12 | index


def refused(call: Any, *arguments: Any) -> str:
    """The errno's name, "" where the call works."""
    try:
        call(*arguments)
    except KvmError as error:
        return error.name
    return ""


class Gic:
    """`vm` with vCPUs of `ids` and a device; nothing of it is set up."""

    def __init__(self, kvm: Any, vm: Any, model: str, ids: Iterable[int]) -> None:
        self.kvm, self.vm, self.model = kvm, vm, model
        self.soft = kvm.backend.inspect(vm.fd)
        self.ram = vm.map(RAM, RAM_SIZE)
        self.ram.write(0, OFF)
        self.vcpus: dict[int, Vcpu] = {}
        for number in ids:
            self.add(number)
        self.device = vm.create_device(f"vgic-{model}")

    def add(self, number: int) -> Vcpu:
        vcpu: Vcpu = self.vm.create_vcpu(number)
        vcpu.init()
        vcpu.regs.pc = RAM
        self.vcpus[number] = vcpu
        return vcpu

    def run(self, number: int) -> str:
        """KVM_RUN; the vCPU turns the VM off."""
        return refused(self.vcpus[number].run_once)

    # ---- attributes

    def has(self, group: int, attr: int) -> str:
        def ask() -> None:
            if not self.device.has_device_attr(group, attr):
                raise KvmError(6)

        return refused(ask)

    def set(self, group: int, attr: int, value: int = 0, size: int = 0) -> str:
        size = size or (8 if group in (ADDR, SYSREGS) else 4)
        return refused(self.device.set_device_attr, group, attr, value.to_bytes(size, "little"))

    def get(self, group: int, attr: int, value: int = 0) -> int | str:
        """The value, or why there is none. REDIST_REGION takes one too."""
        from kvm2.abi import ioctls, structs
        from kvm2.handle import Buffer

        size = 8 if group in (ADDR, SYSREGS) else 4
        buffer = Buffer(value.to_bytes(size, "little"))
        arg = structs.DeviceAttr(group=group, attr=attr, addr=buffer.address)
        why = refused(self.device.ioctl, ioctls.KVM_GET_DEVICE_ATTR, arg)
        return why or int.from_bytes(buffer.bytes(), "little")

    def redist(self, vcpu: int, offset: int) -> int | str:
        return self.get(REDIST, vcpu << 32 | offset)

    def init(self) -> str:
        return self.set(CTRL, va.KVM_DEV_ARM_VGIC_CTRL_INIT)

    def place(self, dist: int = DIST_AT, other: int = OTHER_AT) -> None:
        kinds = (V3_DIST, V3_REDIST) if self.model == "v3" else (V2_DIST, V2_CPU)
        assert [self.set(ADDR, kind, at) for kind, at in zip(kinds, (dist, other), strict=True)] == ["", ""]

    def start(self) -> None:
        """Placed, initialised, in the guest's address space."""
        from kvm2.softkvm.vgic.resources import map_resources

        self.place()
        assert self.init() == ""
        map_resources(self.soft.vgic)

    # ---- what a guest does

    def read(self, address: int, size: int = 4, vcpu: int = 0) -> int:
        value = self.soft.bus.read(self.soft.vcpus[vcpu], address, size)
        assert isinstance(value, int)
        return value

    def write(self, address: int, value: int, size: int = 4, vcpu: int = 0) -> None:
        assert self.soft.bus.write(self.soft.vcpus[vcpu], address, size, value)


@contextlib.contextmanager
def machine(model: str = "v3", ids: Iterable[int] = (0,), host: str = "", ipa_bits: int = 40) -> Iterator[Gic]:
    with (
        kvm2.open(host or (V3_HOST if model == "v3" else V2_HOST)) as kvm,
        kvm.create_vm2(physaddr_bits=ipa_bits) as vm,
    ):
        yield Gic(kvm, vm, model, ids)
