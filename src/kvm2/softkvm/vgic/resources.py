"""What the first KVM_RUN of a VM with a vGIC checks and sets up (kvm_vgic_map_resources)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi.vgic_attrs import (
    KVM_VGIC_V2_CPU_SIZE,
    KVM_VGIC_V2_DIST_SIZE,
    KVM_VGIC_V3_DIST_SIZE,
    VGIC_ADDR_UNDEF,
)
from kvm2.errors import KvmError
from kvm2.softkvm.vgic import gicc, mmio_v2, mmio_v3, regions
from kvm2.softkvm.vgic.mmio import SharedFrame

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.state import Vgic


def map_resources(vgic: Vgic) -> None:
    """The vGIC's frames are complete and in the guest's address space from now on. Nothing where that was done.

    KvmError: ENXIO where a frame has no address, EINVAL where frames overlap or leave the IPA space, EBUSY for a GICv3
    that was not initialised. The caller then ends the VM, as the kernel does (`kvm_vm_dead`).
    """
    if vgic.ready:
        return
    if vgic.model == "v3":
        _check_v3(vgic)
        vgic.vm.bus.add(vgic.dist_base, KVM_VGIC_V3_DIST_SIZE, SharedFrame(mmio_v3.REGISTERS))
    else:
        _check_v2(vgic)
        vgic.init()
        vgic.vm.bus.add(vgic.cpu_base, KVM_VGIC_V2_CPU_SIZE, SharedFrame(gicc.GUEST))
        vgic.vm.bus.add(vgic.dist_base, KVM_VGIC_V2_DIST_SIZE, SharedFrame(mmio_v2.REGISTERS))
    vgic.ready = True


def _check_v3(vgic: Vgic) -> None:
    """vgic_v3_map_resources."""
    for cpu in vgic.cpus():
        if cpu.rd_base == VGIC_ADDR_UNDEF:
            raise KvmError(
                errno.ENXIO,
                f"vCPU {cpu.vcpu.vcpu_id} has no redistributor: set KVM_VGIC_V3_ADDR_TYPE_REDIST, or regions with room "
                "for all vCPUs",
            )
    if vgic.dist_base == VGIC_ADDR_UNDEF:
        raise KvmError(errno.ENXIO, "the distributor has no address: set KVM_VGIC_V3_ADDR_TYPE_DIST")
    if not regions.bases_fit(vgic):
        raise KvmError(errno.EINVAL, "the redistributors leave this VM's IPA space, or overlap the distributor")
    if not vgic.initialized:
        raise KvmError(errno.EBUSY, "the vGICv3 was not initialised: KVM_DEV_ARM_VGIC_CTRL_INIT comes first")


def _check_v2(vgic: Vgic) -> None:
    """vgic_v2_map_resources, vgic_v2_check_base."""
    dist, cpu = vgic.dist_base, vgic.cpu_base
    if VGIC_ADDR_UNDEF in (dist, cpu):
        what = "CPU interface" if dist != VGIC_ADDR_UNDEF else "distributor"
        raise KvmError(errno.ENXIO, f"the {what} has no address: set KVM_VGIC_V2_ADDR_TYPE_DIST and _CPU")
    if dist + KVM_VGIC_V2_DIST_SIZE > cpu and cpu + KVM_VGIC_V2_CPU_SIZE > dist:
        raise KvmError(errno.EINVAL, f"the distributor at {dist:#x} and the CPU interface at {cpu:#x} overlap")
