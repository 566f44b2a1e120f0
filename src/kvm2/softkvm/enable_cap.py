"""KVM_ENABLE_CAP on a VM (`kvm_vm_ioctl_enable_cap_generic` and `kvm_vm_ioctl_enable_cap`)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi import caps
from kvm2.abi.structs import EnableCap
from kvm2.errors import KvmError
from kvm2.softkvm.profile_rules import supported_block_sizes

if TYPE_CHECKING:
    from kvm2.softkvm.vm import Vm

U32 = 0xFFFFFFFF
PROTECTED = 1
ARCHITECTURE = (
    caps.KVM_CAP_ARM_NISV_TO_USER,
    caps.KVM_CAP_ARM_MTE,
    caps.KVM_CAP_ARM_SYSTEM_SUSPEND,
    caps.KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE,
)


def enable(vm: Vm, arg: int) -> int:
    """KVM_ENABLE_CAP: EINVAL for a capability that this host cannot enable, for flags, for arguments not taken."""
    request = EnableCap.unpack(vm.memory.read(arg, EnableCap.SIZE))
    cap, value = request.cap, request.args[0]
    if cap == caps.KVM_CAP_DIRTY_LOG_RING_ACQ_REL and vm.profile.caps.get(cap, 0) > 0:
        _dirty_ring(vm, value & U32)
    offered = cap in vm.profile.enable_caps or (cap == caps.KVM_CAP_ARM_MTE and vm.profile.caps.get(cap, 0) > 0)
    if not offered:
        raise KvmError(errno.EINVAL, f"capability {cap}: this host enables {sorted(vm.profile.enable_caps)} on a VM")
    if request.flags or (vm.config.machine_type == PROTECTED and cap in ARCHITECTURE):
        raise KvmError(
            errno.EINVAL, f"flags {request.flags:#x}: none is defined; a protected VM enables nothing of arm64"
        )
    if cap == caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
        vm.slots.enable_manual_protect(request.flags, value)
    elif cap == caps.KVM_CAP_HALT_POLL:
        if value > U32:
            raise KvmError(errno.EINVAL, f"halt polling for {value:#x} ns: at most 32 bits")
    elif cap == caps.KVM_CAP_ARM_NISV_TO_USER:
        vm.return_nisv_to_user = True
    elif cap == caps.KVM_CAP_ARM_MTE:
        _memory_tagging(vm)
    elif cap == caps.KVM_CAP_ARM_SYSTEM_SUSPEND:
        vm.arm.system_suspend = True
    elif cap == caps.KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE:
        _eager_split(vm, value)
    else:
        raise KvmError(errno.EINVAL, f"capability {cap} cannot be enabled on an arm64 VM")
    return 0


def _dirty_ring(vm: Vm, size: int) -> None:
    """kvm_vm_ioctl_enable_dirty_log_ring: EINVAL for a size that is none, E2BIG for one that is too big."""
    page, largest = 1 << vm.profile.page_shift, vm.profile.caps[caps.KVM_CAP_DIRTY_LOG_RING_ACQ_REL]
    if not size or size & size - 1 or size < page:
        raise KvmError(errno.EINVAL, f"a dirty ring of {size:#x} bytes: a power of two, at least a page ({page:#x})")
    if size > largest:
        raise KvmError(errno.E2BIG, f"a dirty ring of {size:#x} bytes: at most {largest:#x}")
    if vm.vcpus:
        raise KvmError(errno.EINVAL, "dirty rings are enabled before the first vCPU is made")
    raise KvmError(errno.EOPNOTSUPP, "the software KVM executes no dirty rings: use KVM_GET_DIRTY_LOG")


def _memory_tagging(vm: Vm) -> None:
    with vm.lock:
        if vm.vcpus:
            raise KvmError(errno.EINVAL, "memory tagging is enabled before the first vCPU is made")
        vm.arm.mte = True


def _eager_split(vm: Vm, value: int) -> None:
    """The chunk by which huge pages are split when dirty logging starts; 0: not ahead of time."""
    sizes = supported_block_sizes(vm.profile.page_shift)
    with vm.lock:
        if len(vm.slots):
            raise KvmError(errno.EINVAL, "the split chunk size is set before the first memory slot")
        if value and (value & value - 1 or not value & sizes):
            texts = ", ".join(f"{1 << bit:#x}" for bit in range(64) if sizes >> bit & 1)
            raise KvmError(errno.EINVAL, f"chunk size {value:#x}: 0 or one of {texts}")
        vm.arm.split_page_chunk_size = value
