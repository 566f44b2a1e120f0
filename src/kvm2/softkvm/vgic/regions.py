"""Where the redistributors are: regions of them, and which vCPU has which (vgic-mmio-v3.c, vgic-v3.c).

A region that was set by KVM_VGIC_V3_ADDR_TYPE_REDIST has no count: it is as long as there are vCPUs. Those of
REDIST_REGION have one, and are filled in the order of their index.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvm2.abi.vgic_attrs import KVM_VGIC_V3_DIST_SIZE, KVM_VGIC_V3_REDIST_SIZE, V3_ALIGNMENT, VGIC_ADDR_UNDEF
from kvm2.errors import KvmError
from kvm2.softkvm.vgic.mmio import OwnedFrame
from kvm2.softkvm.vgic.redist import REGISTERS

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.state import Vgic, VgicCpu
    from kvm2.softkvm.vm import Vm

END: int = 1 << 64


@dataclass
class Region:
    """`struct vgic_redist_region`. `free_index` is the place of the next vCPU."""

    index: int
    base: int
    count: int
    free_index: int = 0

    def size(self, vgic: Vgic) -> int:
        """vgic_v3_rd_region_size, in bytes."""
        return (self.count or len(vgic.vm.vcpus)) * KVM_VGIC_V3_REDIST_SIZE

    def is_full(self) -> bool:
        """vgic_v3_redist_region_full: one without a count never is."""
        return bool(self.count) and self.free_index >= self.count

    def is_last(self, vgic: Vgic, index: int) -> bool:
        """vgic_mmio_vcpu_rdist_is_last: whether no redistributor follows the one at `index`."""
        if index < self.free_index - 1:
            return False
        if self.count and index == self.count - 1:
            end = self.base + self.count * KVM_VGIC_V3_REDIST_SIZE
            return not any(other.base == end and other.free_index for other in vgic.redist_regions)
        return True


def check_range(vm: Vm, what: str, present: int, address: int, alignment: int, size: int) -> None:
    """vgic_check_iorange: EEXIST where the frame has an address, EINVAL for alignment, E2BIG beyond the IPA limit."""
    if present != VGIC_ADDR_UNDEF:
        raise KvmError(errno.EEXIST, f"the {what} is at {present:#x} already: its address is set once")
    if address % alignment or size % alignment:
        raise KvmError(errno.EINVAL, f"{what} at {address:#x}: must be aligned to {alignment:#x}")
    if address + size >= END:
        raise KvmError(errno.EINVAL, f"{what} at {address:#x}: {size:#x} bytes do not fit into 64 bits")
    limit = 1 << vm.config.ipa_bits
    if address >= limit or address + size > limit:
        raise KvmError(
            errno.E2BIG,
            f"{what} at {address:#x}, {size:#x} bytes: this VM's IPA space of {vm.config.ipa_bits} bits ends at "
            f"{limit:#x}; put it lower, or make the VM with a larger IPA size",
        )


def overlapping(vgic: Vgic, base: int, size: int) -> Region | None:
    """vgic_v3_rdist_overlap: a region that the range touches."""
    for region in vgic.redist_regions:
        if base + size > region.base and base < region.base + region.size(vgic):
            return region
    return None


def bases_fit(vgic: Vgic) -> bool:
    """vgic_v3_check_base: all frames with an address are within the IPA limit and apart from each other."""
    for region in vgic.redist_regions:
        try:
            check_range(vgic.vm, "region", VGIC_ADDR_UNDEF, region.base, V3_ALIGNMENT, region.size(vgic))
        except KvmError:
            return False
    return vgic.dist_base == VGIC_ADDR_UNDEF or overlapping(vgic, vgic.dist_base, KVM_VGIC_V3_DIST_SIZE) is None


def _check_place(vgic: Vgic, index: int, count: int) -> None:
    """The order of regions: index 0 first, each one more, and both kinds not mixed."""
    last = vgic.redist_regions[-1] if vgic.redist_regions else None
    if last is None:
        if index:
            raise KvmError(errno.EINVAL, f"redistributor region {index}: region 0 comes first")
        return
    if not count and last.count:
        raise KvmError(errno.EINVAL, "REDIST: this VM's redistributors are set by REDIST_REGION, which excludes it")
    if not count:
        raise KvmError(errno.EEXIST, f"the redistributors are at {last.base:#x} already: their address is set once")
    if index != last.index + 1:
        raise KvmError(errno.EINVAL, f"redistributor region {index}: the next one is {last.index + 1}")


def _allocate(vgic: Vgic, index: int, base: int, count: int) -> Region:
    """vgic_v3_alloc_redist_region."""
    region = Region(index, base, count)
    size = region.size(vgic)
    if base + size >= END:
        raise KvmError(errno.EINVAL, f"redistributors at {base:#x}: {size:#x} bytes do not fit into 64 bits")
    _check_place(vgic, index, count)
    dist = vgic.dist_base
    if not count and dist != VGIC_ADDR_UNDEF and base + size > dist and base < dist + KVM_VGIC_V3_DIST_SIZE:
        raise KvmError(errno.EINVAL, f"redistributors at {base:#x}, {size:#x} bytes: the distributor is at {dist:#x}")
    other = overlapping(vgic, base, size)
    if other is not None:
        raise KvmError(
            errno.EINVAL, f"redistributors at {base:#x}, {size:#x} bytes: region {other.index} is at {other.base:#x}"
        )
    check_range(vgic.vm, "redistributor region", VGIC_ADDR_UNDEF, base, V3_ALIGNMENT, size)
    return region


def add_region(vgic: Vgic, index: int, base: int, count: int) -> None:
    """vgic_v3_set_redist_base: a region, and in it the redistributors of vCPUs that have none yet.

    KvmError: EINVAL for order, alignment and overlaps, EEXIST, E2BIG beyond the IPA limit; nothing has changed then.
    """
    region = _allocate(vgic, index, base, count)
    vgic.redist_regions.append(region)
    try:
        for cpu in vgic.cpus():
            register(vgic, cpu)
    except KvmError:
        for cpu in vgic.cpus():
            if cpu.rd_region is region:
                _unregister(vgic, cpu)
        vgic.redist_regions.remove(region)
        raise


def register(vgic: Vgic, cpu: VgicCpu) -> None:
    """vgic_register_redist_iodev: the vCPU gets the next free redistributor, where there is one and it has none."""
    if cpu.rd_base != VGIC_ADDR_UNDEF:
        return
    region = next((region for region in vgic.redist_regions if not region.is_full()), None)
    if region is None:
        return
    if not bases_fit(vgic):
        raise KvmError(
            errno.EINVAL,
            f"the redistributors at {region.base:#x}, {region.size(vgic):#x} bytes, do not fit below "
            f"{1 << vgic.vm.config.ipa_bits:#x} and beside the distributor",
        )
    cpu.rd_region, cpu.rd_index = region, region.free_index
    cpu.rd_base = region.base + region.free_index * KVM_VGIC_V3_REDIST_SIZE
    region.free_index += 1
    cpu.rd_frame = OwnedFrame(REGISTERS, cpu)
    try:
        vgic.vm.bus.add(cpu.rd_base, KVM_VGIC_V3_REDIST_SIZE, cpu.rd_frame)
    except KvmError:
        region.free_index -= 1
        cpu.rd_region = cpu.rd_frame = None
        cpu.rd_base = VGIC_ADDR_UNDEF
        raise


def _unregister(vgic: Vgic, cpu: VgicCpu) -> None:
    assert cpu.rd_frame is not None
    vgic.vm.bus.remove(cpu.rd_frame)
    cpu.rd_region = cpu.rd_frame = None
    cpu.rd_base = VGIC_ADDR_UNDEF
