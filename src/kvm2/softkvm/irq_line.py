"""KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS (arch/arm64/kvm/arm.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi import structs_irq as abi
from kvm2.errors import KvmError
from kvm2.softkvm.vgic.irq import NR_PRIVATE_IRQS, NR_SGIS

if TYPE_CHECKING:
    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vm import Vm


def irq_line(vm: Vm, arg: int, *, status: bool = False) -> int:
    """Sets the level of an interrupt line; with `status` the structure is written back, as it came (arm64 has none).

    ENXIO: the type is not for a VM with (CPU) or without (PPI, SPI) an interrupt controller in the kernel. EINVAL: no
    such type, vCPU or number. EBUSY: a GICv3 that is not initialised.
    """
    event = abi.IrqLevel.unpack(vm.memory.read(arg, abi.IrqLevel.SIZE))
    kind = event.irq >> abi.KVM_ARM_IRQ_TYPE_SHIFT & abi.KVM_ARM_IRQ_TYPE_MASK
    number = event.irq >> abi.KVM_ARM_IRQ_NUM_SHIFT & abi.KVM_ARM_IRQ_NUM_MASK
    level = bool(event.level)
    if kind == abi.KVM_ARM_IRQ_TYPE_CPU:
        if vm.irqchip:
            raise KvmError(errno.ENXIO, "with an interrupt controller in the kernel lines are SPIs (1) and PPIs (2)")
        _cpu_line(_vcpu(vm, event.irq), number, level)
    elif kind in (abi.KVM_ARM_IRQ_TYPE_PPI, abi.KVM_ARM_IRQ_TYPE_SPI):
        if vm.vgic is None:
            raise KvmError(errno.ENXIO, "PPIs and SPIs need an interrupt controller in the kernel: KVM_CREATE_DEVICE")
        vcpu = _vcpu(vm, event.irq) if kind == abi.KVM_ARM_IRQ_TYPE_PPI else None
        if vcpu is not None and not NR_SGIS <= number < NR_PRIVATE_IRQS:
            raise KvmError(errno.EINVAL, f"PPI {number}: allowed are {NR_SGIS}..{NR_PRIVATE_IRQS - 1}")
        if vcpu is None and number < NR_PRIVATE_IRQS:
            raise KvmError(errno.EINVAL, f"SPI {number}: they start at {NR_PRIVATE_IRQS}")
        vm.vgic.inject(vcpu.gic if vcpu is not None else None, number, level)
    else:
        raise KvmError(errno.EINVAL, f"irq type {kind}: allowed are CPU (0), SPI (1) and PPI (2)")
    if status:
        vm.memory.write(arg, event.pack())
    return 0


def _vcpu(vm: Vm, irq: int) -> Vcpu:
    low = irq >> abi.KVM_ARM_IRQ_VCPU_SHIFT & abi.KVM_ARM_IRQ_VCPU_MASK
    high = irq >> abi.KVM_ARM_IRQ_VCPU2_SHIFT & abi.KVM_ARM_IRQ_VCPU2_MASK
    vcpu_id = high * (abi.KVM_ARM_IRQ_VCPU_MASK + 1) + low
    vcpu = vm.vcpus.get(vcpu_id)
    if vcpu is None:
        raise KvmError(errno.EINVAL, f"there is no vCPU {vcpu_id}")
    return vcpu


def _cpu_line(vcpu: Vcpu, number: int, level: bool) -> None:
    """vcpu_interrupt_line: HCR_EL2.VI or VF."""
    if number == abi.KVM_ARM_IRQ_CPU_IRQ:
        changed, vcpu.irq_input = vcpu.irq_input != level, level
    elif number == abi.KVM_ARM_IRQ_CPU_FIQ:
        changed, vcpu.fiq_input = vcpu.fiq_input != level, level
    else:
        raise KvmError(errno.EINVAL, f"input {number} of a vCPU: it has IRQ (0) and FIQ (1)")
    if changed:
        vcpu.interrupt_lines_changed()
