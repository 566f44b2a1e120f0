"""The device attributes of a vGICv2 (kvm_arm_vgic_v2_ops), and KVM_ARM_SET_DEVICE_ADDR."""

from __future__ import annotations

import errno
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvm2.abi import vgic_attrs as va
from kvm2.abi.structs_arm64 import (
    KVM_ARM_DEVICE_ID_MASK,
    KVM_ARM_DEVICE_ID_SHIFT,
    KVM_ARM_DEVICE_TYPE_MASK,
    KVM_ARM_DEVICE_VGIC_V2,
    ArmDeviceAddr,
)
from kvm2.errors import KvmError
from kvm2.softkvm.vgic import gicc, mmio_v2
from kvm2.softkvm.vgic.device import U32_SIZE, VgicDevice, none_such

if TYPE_CHECKING:
    from kvm2.abi.structs import DeviceAttr
    from kvm2.softkvm.vgic.mmio import Registers
    from kvm2.softkvm.vgic.state import VgicCpu
    from kvm2.softkvm.vm import Vm

_REGISTERS: Final[dict[int, Registers]] = {
    va.KVM_DEV_ARM_VGIC_GRP_DIST_REGS: mmio_v2.REGISTERS,
    va.KVM_DEV_ARM_VGIC_GRP_CPU_REGS: gicc.USER,
}


class VgicV2Device(VgicDevice):
    """A GICv2: distributor and CPU interface; it initialises itself when it is first used."""

    frames = MappingProxyType(
        {
            va.KVM_VGIC_V2_ADDR_TYPE_DIST: ("distributor", "dist_base", va.V2_ALIGNMENT, va.KVM_VGIC_V2_DIST_SIZE),
            va.KVM_VGIC_V2_ADDR_TYPE_CPU: ("CPU interface", "cpu_base", va.V2_ALIGNMENT, va.KVM_VGIC_V2_CPU_SIZE),
        }
    )
    known = frozenset(
        {
            (va.KVM_DEV_ARM_VGIC_GRP_ADDR, va.KVM_VGIC_V2_ADDR_TYPE_DIST),
            (va.KVM_DEV_ARM_VGIC_GRP_ADDR, va.KVM_VGIC_V2_ADDR_TYPE_CPU),
            (va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_VGIC_CTRL_INIT),
        }
    )

    def has(self, attr: DeviceAttr) -> None:
        """vgic_v2_has_attr."""
        registers = _REGISTERS.get(attr.group)
        if registers is None:
            super().has(attr)
            return
        self._cpu(attr)
        offset = attr.attr & va.OFFSET_MASK
        if registers.find(self.vgic, offset, U32_SIZE) is None:
            raise none_such(attr)

    def get(self, attr: DeviceAttr) -> None:
        """vgic_v2_get_attr."""
        registers = _REGISTERS.get(attr.group)
        if registers is None:
            super().get(attr)
            return
        cpu = self._cpu(attr)
        with self.vm.lock, self.vm.vcpus_held():
            self.vgic.init()
            value = registers.read(cpu, attr.attr & va.OFFSET_MASK, user=True)
        self.write_value(attr, U32_SIZE, value)

    def put(self, attr: DeviceAttr) -> None:
        """vgic_v2_set_attr."""
        registers = _REGISTERS.get(attr.group)
        if registers is None:
            super().put(attr)
            return
        cpu = self._cpu(attr)
        value = self.read_value(attr, U32_SIZE)
        with self.vm.lock, self.vm.vcpus_held():
            self.vgic.init()
            registers.write(cpu, attr.attr & va.OFFSET_MASK, value, user=True)
            cpu.vcpu.reload_gic()

    def _cpu(self, attr: DeviceAttr) -> VgicCpu:
        """vgic_v2_parse_attr: the vCPU by its id."""
        number = attr.attr >> va.VCPU_SHIFT & va.V2_CPUID_MASK
        vcpu = self.vm.vcpus.get(number)
        if vcpu is None:
            raise KvmError(errno.EINVAL, f"attribute {attr.attr:#x}: this VM has no vCPU with id {number} (bits 39:32)")
        return vcpu.gic


def set_device_addr(vm: Vm, arg: int) -> int:
    """KVM_ARM_SET_DEVICE_ADDR: the older way to place a GICv2. ENODEV for another device, or without a GICv2."""
    wanted = ArmDeviceAddr.unpack(vm.memory.read(arg, ArmDeviceAddr.SIZE))
    device = (wanted.id & KVM_ARM_DEVICE_ID_MASK) >> KVM_ARM_DEVICE_ID_SHIFT
    kind = wanted.id & KVM_ARM_DEVICE_TYPE_MASK
    if device != KVM_ARM_DEVICE_VGIC_V2 or kind not in VgicV2Device.frames:
        raise KvmError(errno.ENODEV, f"id {wanted.id:#x}: device 0 (vGICv2) has addresses 0 (distributor) and 1 (CPU)")
    with vm.lock:
        if vm.vgic is None or vm.vgic.model != "v2":
            raise KvmError(errno.ENODEV, "this VM has no vGICv2: KVM_CREATE_IRQCHIP or KVM_CREATE_DEVICE comes first")
        VgicV2Device(vm.vgic).set_base(kind, wanted.addr)
    return 0
