"""KVM_SET_GUEST_DEBUG and KVM_SET_SIGNAL_MASK: checked and kept as the kernel does."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi.structs import SignalMask
from kvm2.abi.structs_arm64 import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW,
    KVM_GUESTDBG_USE_SW_BP,
    GuestDebug,
)
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.softkvm.vcpu import Vcpu

VALID: Final = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_USE_HW
SIGSET_BYTES: Final = 8


def set_guest_debug(vcpu: Vcpu, arg: int) -> int:
    """EINVAL for an unknown control bit; without ENABLE debugging ends (kvm_arch_vcpu_ioctl_set_guest_debug)."""
    debug = GuestDebug.unpack(vcpu.vm.memory.read(arg, GuestDebug.SIZE))
    if debug.control & ~VALID:
        raise KvmError(errno.EINVAL, f"guest debug control {debug.control:#x}: arm64 knows {VALID:#x}")
    if not debug.control & KVM_GUESTDBG_ENABLE:
        vcpu.guest_debug = None
        vcpu.step_pending = False
    elif debug.control & KVM_GUESTDBG_USE_HW or vcpu.guest_debug is None:
        vcpu.guest_debug = debug
    else:
        vcpu.guest_debug = GuestDebug(control=debug.control, arch=vcpu.guest_debug.arch)
    return 0


def set_signal_mask(vcpu: Vcpu, arg: int) -> int:
    """The signals blocked while KVM_RUN is under way; EINVAL for a set that has not the kernel's 8 bytes."""
    if not arg:
        vcpu.signal_mask = None
        return 0
    header = SignalMask.unpack(vcpu.vm.memory.read(arg, 4) + bytes(SignalMask.SIZE - 4))
    if header.len != SIGSET_BYTES:
        raise KvmError(errno.EINVAL, f"a signal mask of {header.len} bytes: the kernel's sigset_t has {SIGSET_BYTES}")
    vcpu.signal_mask = vcpu.vm.memory.read(arg + 4, SIGSET_BYTES)
    return 0
