"""KVM_GET_ONE_REG, KVM_SET_ONE_REG and KVM_GET_REG_LIST: which register an id names.

After `kvm_arm_get_reg`, `kvm_arm_set_reg` and `kvm_arm_copy_reg_indices` of arch/arm64/kvm/guest.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi import onereg
from kvm2.errors import KvmError
from kvm2.softkvm import registers_core, registers_fw, registers_sys, registers_timer, sve

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vcpu import Vcpu

_ARCH = onereg.KVM_REG_ARM64 >> 32


def _class(id_: int) -> int:
    if (id_ & ~onereg.KVM_REG_SIZE_MASK) >> 32 != _ARCH:
        raise KvmError(errno.EINVAL, f"register {id_:#x} is not an arm64 one: bits 63:56 are 0x60, 51:32 zero")
    return id_ & onereg.KVM_REG_ARM_COPROC_MASK


def get(vcpu: Vcpu, id_: int) -> bytes:
    """The bytes of a register, as many as its id says.

    Raises KvmError: EINVAL, ENOENT, EPERM as the kernel does for an id that the vCPU does not have (now).
    """
    kind = _class(id_)
    if kind == onereg.KVM_REG_ARM_CORE:
        return registers_core.get(vcpu, id_)
    if kind in (onereg.KVM_REG_ARM_FW, onereg.KVM_REG_ARM_FW_FEAT_BMAP):
        return registers_fw.get(vcpu, id_)
    if kind == onereg.KVM_REG_ARM64_SVE:
        return sve.get(vcpu, id_)
    if id_ in registers_timer.ids(vcpu.vm.profile.kernel):
        return registers_timer.get(vcpu, id_)
    return registers_sys.get(vcpu, id_)


def put(vcpu: Vcpu, id_: int, fetch: Callable[[int], bytes]) -> None:
    """Writes a register; `fetch(size)` reads the new value from the client (EFAULT) when the kernel would read it."""
    kind = _class(id_)
    if kind == onereg.KVM_REG_ARM_CORE:
        registers_core.put(vcpu, id_, fetch)
    elif kind in (onereg.KVM_REG_ARM_FW, onereg.KVM_REG_ARM_FW_FEAT_BMAP):
        registers_fw.put(vcpu, id_, fetch)
    elif kind == onereg.KVM_REG_ARM64_SVE:
        sve.put(vcpu, id_, fetch)
    elif id_ in registers_timer.ids(vcpu.vm.profile.kernel):
        registers_timer.put(vcpu, id_, fetch)
    else:
        registers_sys.put(vcpu, id_, fetch)


def ids(vcpu: Vcpu) -> list[int]:
    """Every register of a vCPU, in the kernel's order."""
    return [
        *registers_core.ids(vcpu),
        *sve.ids(vcpu),
        *registers_fw.IDS,
        *registers_timer.ids(vcpu.vm.profile.kernel),
        *registers_sys.ids(vcpu),
    ]
