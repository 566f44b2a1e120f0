"""The arm64 calls on a VM that are about its vCPUs: target, writable masks, counter offset, the hypercall filter.

After `kvm_arch_vm_ioctl` of arch/arm64/kvm/arm.c and what it calls.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi.structs import DeviceAttr
from kvm2.abi.structs_arm64 import ArmCounterOffset, RegMaskRange, SmcccFilter, VcpuInit
from kvm2.errors import KvmError
from kvm2.softkvm.hypercall_result import U32
from kvm2.softkvm.smccc import RESERVED

if TYPE_CHECKING:
    from kvm2.softkvm.vm import Vm

FEATURE_ID_RANGE_SIZE: Final = 3 * 8 * 8
SMCCC_GROUP, SMCCC_FILTER = 0, 0
ACTIONS = 3


def preferred_target(vm: Vm, arg: int) -> int:
    """KVM_ARM_PREFERRED_TARGET."""
    vm.memory.write(arg, VcpuInit(target=vm.profile.preferred_target).pack())
    return 0


def _index(enc: int) -> int:
    """KVM_ARM_FEATURE_ID_RANGE_IDX: op1 is 0, 1 or 3."""
    op1, crm, op2 = enc >> 11 & 7, enc >> 3 & 15, enc & 7
    return (2 if op1 == 3 else op1) << 6 | crm << 3 | op2


def writable_masks(vm: Vm, arg: int) -> int:
    """KVM_ARM_GET_REG_WRITABLE_MASKS: 192 masks of 8 bytes, one per feature ID register; EINVAL without the call."""
    if not vm.profile.writable_masks:
        raise KvmError(errno.EINVAL, "this kernel has no writable ID registers, nor this call")
    wanted = RegMaskRange.unpack(vm.memory.read(arg, RegMaskRange.SIZE))
    if wanted.range or any(wanted.reserved):
        raise KvmError(errno.EINVAL, f"range {wanted.range}: only 0 (feature ID registers), reserved words zero")
    masks = [0] * FEATURE_ID_RANGE_SIZE
    for enc, mask in vm.profile.writable_masks.items():
        masks[_index(enc)] = mask
    vm.memory.write(wanted.addr, b"".join(mask.to_bytes(8, "little") for mask in masks))
    return 0


def _modern(vm: Vm) -> bool:
    return "fixed-id-registers" not in vm.profile.quirks


def set_counter_offset(vm: Vm, arg: int) -> int:
    """KVM_ARM_SET_COUNTER_OFFSET: from now on both counters are the host's minus this, and counts are not writable."""
    if not _modern(vm):
        raise KvmError(errno.EINVAL, "this kernel has no KVM_ARM_SET_COUNTER_OFFSET")
    offset = ArmCounterOffset.unpack(vm.memory.read(arg, ArmCounterOffset.SIZE))
    if offset.reserved:
        raise KvmError(errno.EINVAL, "kvm_arm_counter_offset.reserved must be zero")
    with vm.lock:
        vm.arm.counter_offset_set = True
        vm.set_counter_offsets(offset.counter_offset, offset.counter_offset)
    return 0


def has_device_attr(vm: Vm, arg: int) -> int:
    """KVM_HAS_DEVICE_ATTR on a VM: the hypercall filter."""
    attr = _attribute(vm, arg)
    if (attr.group, attr.attr) != (SMCCC_GROUP, SMCCC_FILTER):
        raise _none(attr)
    return 0


def set_device_attr(vm: Vm, arg: int) -> int:
    """KVM_SET_DEVICE_ATTR on a VM: one more range of the hypercall filter."""
    attr = _attribute(vm, arg)
    if (attr.group, attr.attr) != (SMCCC_GROUP, SMCCC_FILTER):
        raise _none(attr)
    _add_filter(vm, attr.addr)
    return 0


def _attribute(vm: Vm, arg: int) -> DeviceAttr:
    if not _modern(vm):
        raise KvmError(errno.EINVAL, "this kernel's VMs have no device attributes")
    return DeviceAttr.unpack(vm.memory.read(arg, DeviceAttr.SIZE))


def _none(attr: DeviceAttr) -> KvmError:
    return KvmError(
        errno.ENXIO, f"attribute {attr.attr} of group {attr.group}: a VM has only the hypercall filter (0, 0)"
    )


def _add_filter(vm: Vm, address: int) -> None:
    """kvm_smccc_set_filter. EINVAL: malformed; EBUSY: the VM ran; EEXIST: overlaps a range, or the architecture's."""
    wanted = SmcccFilter.unpack(vm.memory.read(address, SmcccFilter.SIZE))
    last = wanted.base + wanted.nr_functions - 1
    if any(wanted.pad) or not wanted.nr_functions or last > U32 or wanted.action >= ACTIONS:
        raise KvmError(
            errno.EINVAL,
            f"filter of {wanted.nr_functions} functions from {wanted.base:#x}, action {wanted.action}: at least one, "
            "none above 0xffffffff, action 0 to 2, pad zero",
        )
    with vm.lock:
        if vm.ran:
            raise KvmError(errno.EBUSY, "the hypercall filter is final since the VM ran for the first time")
        arm = vm.arm
        if not arm.smccc_filter:
            arm.smccc_filter = [(first, end, 0) for first, end in RESERVED]
        for first, end, _ in arm.smccc_filter:
            if wanted.base <= end and first <= last:
                raise KvmError(errno.EEXIST, f"functions {first:#x} to {end:#x} are in the filter already")
        arm.smccc_filter.append((wanted.base, last, wanted.action))
