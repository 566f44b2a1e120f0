"""Firmware pseudo-registers: the PSCI version, the speculation workarounds, the hypercall services.

After `kvm_arm_get_fw_reg` and `kvm_arm_set_fw_reg` of arch/arm64/kvm/hypercalls.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import onereg
from kvm2.abi.structs_arm64 import KVM_ARM_VCPU_PSCI_0_2
from kvm2.abi.sysregs import ID_AA64PFR1_EL1
from kvm2.errors import KvmError
from kvm2.softkvm import psci
from kvm2.softkvm.features import SMCCC_SERVICES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vcpu import Vcpu

W1, W2, W3 = (
    onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1,
    onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2,
    onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3,
)
BITMAPS: Final = (onereg.KVM_REG_ARM_STD_BMAP, onereg.KVM_REG_ARM_STD_HYP_BMAP, onereg.KVM_REG_ARM_VENDOR_HYP_BMAP)
IDS: Final = (onereg.KVM_REG_ARM_PSCI_VERSION, W1, W2, W3, *BITMAPS)
LEVEL_MASK: Final = 0xF
SSBS_LSB = 4
_W2_NOT_AVAIL = onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_NOT_AVAIL
_W2_NOT_REQUIRED = onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_NOT_REQUIRED


def workaround_level(vcpu: Vcpu, id_: int) -> int:
    """get_kernel_wa_level: what the host protects guests from, higher is better.

    Against Spectre v4 (workaround 2) a guest that sees SSBS is told of no firmware help; one from which the VMM hides
    SSBS gets a permanent mitigation, so none is required.
    """
    arm = vcpu.vm.arm
    level = vcpu.vm.profile.firmware.get(id_ & 0xFFFF, 0)
    if id_ == W2 and level == _W2_NOT_AVAIL and ID_AA64PFR1_EL1 in arm.id_regs:
        host, guest = (
            value >> SSBS_LSB & 0xF for value in (arm.host_register(ID_AA64PFR1_EL1), arm.id_regs[ID_AA64PFR1_EL1])
        )
        if host and not guest:
            return _W2_NOT_REQUIRED
    return level


def get(vcpu: Vcpu, id_: int) -> bytes:
    """The register's 8 bytes; ENOENT for an id that is none."""
    if id_ == onereg.KVM_REG_ARM_PSCI_VERSION:
        value = psci.version(vcpu)
    elif id_ in (W1, W2, W3):
        value = workaround_level(vcpu, id_)
    elif id_ in BITMAPS:
        value = vcpu.vm.arm.smccc_bmaps[BITMAPS.index(id_)]
    else:
        raise KvmError(
            errno.ENOENT, f"firmware register {id_:#x}: this kernel has {', '.join(hex(known) for known in IDS)}"
        )
    return value.to_bytes(8, "little")


def put(vcpu: Vcpu, id_: int, fetch: Callable[[int], bytes]) -> None:
    """ENOENT: no such register; EINVAL: a version, level or service that this host has not; EBUSY: after a run."""
    if id_ >> 52 & 0xF != 3:
        raise KvmError(errno.ENOENT, f"firmware register {id_:#x}: they have 8 bytes")
    value = int.from_bytes(fetch(8), "little")
    if id_ == onereg.KVM_REG_ARM_PSCI_VERSION:
        _set_psci(vcpu, value)
    elif id_ in (W1, W3):
        if value & ~LEVEL_MASK or workaround_level(vcpu, id_) < value:
            raise KvmError(errno.EINVAL, f"workaround level {value:#x}: this host has {workaround_level(vcpu, id_)}")
    elif id_ == W2:
        _check_workaround_2(vcpu, value)
    elif id_ in BITMAPS:
        _set_bitmap(vcpu, BITMAPS.index(id_), value)
    else:
        raise KvmError(
            errno.ENOENT, f"firmware register {id_:#x}: this kernel has {', '.join(hex(known) for known in IDS)}"
        )


def _set_psci(vcpu: Vcpu, value: int) -> None:
    modern = bool(vcpu.features >> KVM_ARM_VCPU_PSCI_0_2 & 1)
    allowed = (psci.PSCI_0_2, psci.PSCI_1_0, psci.PSCI_1_1) if modern else (psci.PSCI_0_1,)
    if value not in allowed:
        raise KvmError(
            errno.EINVAL, f"PSCI version {value:#x}: this vCPU takes {', '.join(hex(one) for one in allowed)}"
        )
    vcpu.vm.arm.psci_version = value


def _check_workaround_2(vcpu: Vcpu, value: int) -> None:
    level, enabled = value & LEVEL_MASK, onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_ENABLED
    available = onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_AVAIL
    # Of the four levels that were ever reported, KVM tells two apart.
    needed = _W2_NOT_AVAIL if level < available else _W2_NOT_REQUIRED
    wrong = value & ~(LEVEL_MASK | enabled) or (value & enabled and level != available) or level > _W2_NOT_REQUIRED
    if wrong or workaround_level(vcpu, W2) < needed:
        raise KvmError(errno.EINVAL, f"workaround 2 level {value:#x}: this host has {workaround_level(vcpu, W2)}")


def _set_bitmap(vcpu: Vcpu, index: int, value: int) -> None:
    arm = vcpu.vm.arm
    if value & ~SMCCC_SERVICES[index]:
        raise KvmError(errno.EINVAL, f"hypercall services {value:#x}: this kernel has {SMCCC_SERVICES[index]:#x}")
    with vcpu.vm.lock:
        if vcpu.vm.ran and value != arm.smccc_bmaps[index]:
            raise KvmError(
                errno.EBUSY, f"hypercall services stay {arm.smccc_bmaps[index]:#x} since the VM ran for the first time"
            )
        arm.smccc_bmaps[index] = value
