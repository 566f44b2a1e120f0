"""The device attributes of a vGICv3 (kvm_arm_vgic_v3_ops)."""

from __future__ import annotations

import errno
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvm2.abi import vgic_attrs as va
from kvm2.errors import KvmError
from kvm2.softkvm.vgic import lpi, mmio_v3, redist, regions, sysregs_user
from kvm2.softkvm.vgic.device import U32_SIZE, U64_SIZE, VgicDevice, none_such
from kvm2.softkvm.vgic.irq import NR_PRIVATE_IRQS, NR_SGIS, Irq

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm2.abi.structs import DeviceAttr
    from kvm2.softkvm.vgic.mmio import Registers
    from kvm2.softkvm.vgic.state import VgicCpu

LINES: Final = 32  # interrupts in one word of LEVEL_INFO
AFFINITY_LOW, AFF3_IN_VALUE, AFF3_IN_MPIDR = 0xFFFFFF, 24, 32

_DIST, _REDIST, _SYSREGS, _LEVELS = (
    va.KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
    va.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
    va.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    va.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
)
_REGISTERS: Final[dict[int, Registers]] = {_DIST: mmio_v3.REGISTERS, _REDIST: redist.REGISTERS}
_STATE: Final = (_DIST, _REDIST, _SYSREGS, _LEVELS)


class VgicV3Device(VgicDevice):
    """A GICv3: distributor, redistributors, the system registers of the CPU interfaces, line levels."""

    frames = MappingProxyType(
        {va.KVM_VGIC_V3_ADDR_TYPE_DIST: ("distributor", "dist_base", va.V3_ALIGNMENT, va.KVM_VGIC_V3_DIST_SIZE)}
    )
    known = frozenset(
        {
            (va.KVM_DEV_ARM_VGIC_GRP_ADDR, va.KVM_VGIC_V3_ADDR_TYPE_DIST),
            (va.KVM_DEV_ARM_VGIC_GRP_ADDR, va.KVM_VGIC_V3_ADDR_TYPE_REDIST),
            (va.KVM_DEV_ARM_VGIC_GRP_ADDR, va.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION),
            (va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_VGIC_CTRL_INIT),
            (va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES),
        }
    )

    # ---- the three calls

    def has(self, attr: DeviceAttr) -> None:
        """vgic_v3_has_attr."""
        if attr.group in _REGISTERS:
            self._cpu(attr)
            if _REGISTERS[attr.group].find(self.vgic, attr.attr & va.OFFSET_MASK, U32_SIZE) is None:
                raise none_such(attr)
        elif attr.group == _SYSREGS:
            self._cpu(attr)
            if attr.attr & va.SYSREG_MASK not in sysregs_user.REGISTERS:
                raise none_such(attr)
        elif attr.group == _LEVELS:
            if _level_kind(attr) != va.VGIC_LEVEL_INFO_LINE_LEVEL:
                raise none_such(attr)
        else:
            super().has(attr)

    def get(self, attr: DeviceAttr) -> None:
        """vgic_v3_get_attr."""
        if attr.group not in _STATE:
            super().get(attr)
            return
        cpu = self._cpu(attr)
        with self.vm.lock, self.vm.vcpus_held():
            self._check_initialized()
            if attr.group == _SYSREGS:
                value = sysregs_user.get(cpu, attr.attr & va.SYSREG_MASK)
                self.write_value(attr, U64_SIZE, value)
                return
            value = self._levels(cpu, attr) if attr.group == _LEVELS else self._read(cpu, attr)
        self.write_value(attr, U32_SIZE, value)

    def put(self, attr: DeviceAttr) -> None:
        """vgic_v3_set_attr."""
        if attr.group not in _STATE:
            super().put(attr)
            return
        cpu = self._cpu(attr)
        value = 0 if attr.group == _SYSREGS else self.read_value(attr, U32_SIZE)
        with self.vm.lock, self.vm.vcpus_held():
            self._check_initialized()
            if attr.group == _SYSREGS:
                sysregs_user.put(cpu, attr.attr & va.SYSREG_MASK, self.read_value(attr, U64_SIZE))
                cpu.vcpu.reload_gic()
            elif attr.group == _LEVELS:
                self._set_levels(cpu, attr, value)
            else:
                _REGISTERS[attr.group].write(cpu, attr.attr & va.OFFSET_MASK, value, user=True)

    def _read(self, cpu: VgicCpu, attr: DeviceAttr) -> int:
        return _REGISTERS[attr.group].read(cpu, attr.attr & va.OFFSET_MASK, user=True)

    def _cpu(self, attr: DeviceAttr) -> VgicCpu:
        """vgic_v3_parse_attr: the vCPU by its affinity; for the distributor the first one."""
        if attr.group == _DIST:
            cpus = self.vgic.cpus()
            if not cpus:
                raise KvmError(errno.EINVAL, "the distributor's registers need a vCPU: KVM_CREATE_VCPU comes first")
            return cpus[0]
        value = attr.attr >> va.VCPU_SHIFT & va.V3_MPIDR_MASK
        affinity = value & AFFINITY_LOW | value >> AFF3_IN_VALUE << AFF3_IN_MPIDR
        cpu = mmio_v3.find_cpu(self.vgic, affinity)
        if cpu is None:
            raise KvmError(
                errno.EINVAL, f"attribute {attr.attr:#x}: this VM has no vCPU with affinity {value:#x} (bits 63:32)"
            )
        return cpu

    def _check_initialized(self) -> None:
        if not self.vgic.initialized:
            raise KvmError(errno.EBUSY, "the vGICv3 was not initialised: KVM_DEV_ARM_VGIC_CTRL_INIT comes first")

    # ---- redistributors

    def _get_address(self, attr: DeviceAttr) -> None:
        if attr.attr == va.KVM_VGIC_V3_ADDR_TYPE_REDIST:
            found = self.vgic.redist_regions
            self.write_value(attr, U64_SIZE, found[0].base if found else va.VGIC_ADDR_UNDEF)
        elif attr.attr == va.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION:
            index = self.read_value(attr, U64_SIZE) & va.RDIST_INDEX_MASK
            for region in self.vgic.redist_regions:
                if region.index == index:
                    value = index | region.base | region.count << va.RDIST_COUNT_SHIFT
                    self.write_value(attr, U64_SIZE, value)
                    return
            raise KvmError(errno.ENOENT, f"redistributor region {index}: there is none with that index")
        else:
            super()._get_address(attr)

    def _set_address(self, attr: DeviceAttr) -> None:
        if attr.attr == va.KVM_VGIC_V3_ADDR_TYPE_REDIST:
            value = self.read_value(attr, U64_SIZE)
            with self.vm.lock:
                regions.add_region(self.vgic, 0, value, 0)
        elif attr.attr == va.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION:
            value = self.read_value(attr, U64_SIZE)
            count = value >> va.RDIST_COUNT_SHIFT & va.RDIST_COUNT_MASK
            flags = value >> va.RDIST_FLAGS_SHIFT & va.RDIST_FLAGS_MASK
            if not count or flags:
                raise KvmError(
                    errno.EINVAL, f"redistributor region {value:#x}: count (63:52) at least 1, flags (15:12) 0"
                )
            with self.vm.lock:
                regions.add_region(self.vgic, value & va.RDIST_INDEX_MASK, value & va.RDIST_BASE_MASK, count)
        else:
            super()._set_address(attr)

    def control(self, attr: DeviceAttr) -> None:
        """KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES: which LPIs are pending goes into the guest's memory."""
        if attr.attr != va.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES:
            raise none_such(attr)
        with self.vm.lock, self.vm.vcpus_held():
            if not self.vgic.initialized:
                raise KvmError(errno.ENXIO, "the vGICv3 was not initialised: KVM_DEV_ARM_VGIC_CTRL_INIT comes first")
            lpi.save_pending_tables(self.vgic)

    # ---- line levels

    def _lines(self, cpu: VgicCpu, attr: DeviceAttr) -> Iterator[tuple[int, Irq]]:
        """(bit, interrupt) of a word: SGIs have no line."""
        first = attr.attr & va.LINE_LEVEL_INTID_MASK
        if _level_kind(attr) != va.VGIC_LEVEL_INFO_LINE_LEVEL or first % LINES:
            raise KvmError(
                errno.EINVAL, f"attribute {attr.attr:#x}: kind 0 (bits 31:10), first interrupt a multiple of {LINES}"
            )
        for bit in range(LINES):
            if NR_SGIS <= first + bit < NR_PRIVATE_IRQS + self.vgic.nr_spis:
                irq = self.vgic.irq(cpu, first + bit)
                if irq is not None:
                    yield bit, irq

    def _levels(self, cpu: VgicCpu, attr: DeviceAttr) -> int:
        """vgic_read_irq_line_level_info."""
        return sum(1 << bit for bit, irq in self._lines(cpu, attr) if irq.line_level and not irq.edge)

    def _set_levels(self, cpu: VgicCpu, attr: DeviceAttr, value: int) -> None:
        """vgic_write_irq_line_level_info: whatever the configuration is, which may be restored afterwards."""
        with self.vgic.lock:
            for bit, irq in self._lines(cpu, attr):
                irq.line_level = bool(value >> bit & 1)
                self.vgic.update(irq)


def _level_kind(attr: DeviceAttr) -> int:
    return attr.attr >> va.LINE_LEVEL_INFO_SHIFT & va.LINE_LEVEL_INFO_MASK
