"""Hypercalls of the SMC calling convention: which are handled, denied or handed to the VMM, and their answers.

After `kvm_smccc_call_handler` of arch/arm64/kvm/hypercalls.c and trng.c. `call` changes no guest register: it returns
what the caller is to write, and the exit to prepare.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

from kvm2.abi import onereg
from kvm2.abi.structs_arm64 import KVM_SMCCC_FILTER_DENY, KVM_SMCCC_FILTER_FWD_TO_USER, KVM_SMCCC_FILTER_HANDLE
from kvm2.softkvm import psci
from kvm2.softkvm.hypercall_result import PSCI_0_1_BASE, SMCCC_VERSION, U32, U64, Hypercall, Result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.softkvm.vcpu import Vcpu

VERSION, ARCH_FEATURES = SMCCC_VERSION, 0x80000001
WORKAROUND_1, WORKAROUND_2, WORKAROUND_3 = 0x80008000, 0x80007FFF, 0x80003FFF
PV_TIME_FEATURES, PV_TIME_ST = 0xC5000020, 0xC5000021
VENDOR_UID, VENDOR_FEATURES, VENDOR_PTP = 0x8600FF01, 0x86000000, 0x86000001
TRNG_VERSION, TRNG_FEATURES, TRNG_UUID, TRNG_RND32, TRNG_RND64 = (
    0x84000050,
    0x84000051,
    0x84000052,
    0x84000053,
    0xC4000053,
)
TRNG: Final = (TRNG_VERSION, TRNG_FEATURES, TRNG_UUID, TRNG_RND32, TRNG_RND64)

NOT_SUPPORTED, NOT_REQUIRED, UNAFFECTED = -1, -2, 1
KVM_UID: Final = (0xB66FB428, 0xE911C52E, 0x564BCAA9, 0x743A004D)
TRNG_UUID_WORDS: Final = (0x00E0210D, 0xEB118443, 0x44527080, 0x4C5A4E55)
INVALID_GPA: Final = U64
HYPERCALL_SMC = 1

STANDARD_OWNER, LAST_PSCI_FUNCTION = 4, 0x1F
# Which bit of which service bitmap (KVM_REG_ARM_STD_BMAP, _STD_HYP_, _VENDOR_HYP_) lets a call through.
GATES: Final = dict.fromkeys(TRNG, (0, 0)) | {
    PV_TIME_FEATURES: (1, 0),
    PV_TIME_ST: (1, 0),
    VENDOR_FEATURES: (2, 0),
    VENDOR_UID: (2, 0),
    VENDOR_PTP: (2, 1),
}
# Calls of the Arm architecture owner, 32 and 64 bit: the VMM cannot take them over.
RESERVED: Final = ((VERSION, VERSION | 0xFFFF), (0xC0000000, 0xC000FFFF))


def call(vcpu: Vcpu, function_id: int, args: Sequence[int], *, smc: bool = False, big_endian: bool = False) -> Result:
    """An HVC, or an SMC with immediate 0. `function_id` is W0; `args` are X1, X2, X3; `big_endian` is the caller's data
    byte order, which a vCPU that it switches on inherits.

    An unknown function is answered with -1 (NOT_SUPPORTED).
    """
    function_id &= U32
    action = _action(vcpu, function_id)
    if action == KVM_SMCCC_FILTER_FWD_TO_USER:
        return Result(exit=Hypercall(function_id, HYPERCALL_SMC if smc else 0))
    if action == KVM_SMCCC_FILTER_DENY:
        return Result.of(NOT_SUPPORTED)
    first = args[0]
    if function_id == VERSION:
        return Result.of(0x10001)
    if function_id == ARCH_FEATURES:
        return Result.of(_arch_feature(vcpu, first & U32))
    if function_id == PV_TIME_FEATURES:
        known = first & U32 in (PV_TIME_FEATURES, PV_TIME_ST) and vcpu.steal_base != INVALID_GPA
        return Result.of(0 if known else NOT_SUPPORTED)
    if function_id == PV_TIME_ST:
        return Result.of(vcpu.start_stolen_time())
    if function_id == VENDOR_UID:
        return Result.of(*KVM_UID)
    if function_id == VENDOR_FEATURES:
        return Result.of(vcpu.vm.arm.smccc_bmaps[2])
    if function_id == VENDOR_PTP:
        return _ptp(vcpu, first & U32)
    if function_id in TRNG:
        return _trng(function_id, first)
    return psci.call(vcpu, function_id, args, big_endian)


def smc(vcpu: Vcpu, immediate: int, function_id: int, args: Sequence[int], *, big_endian: bool = False) -> Result:
    """An SMC (`handle_smc`). With an immediate, and on kernels that handle no SMC (6.1), only X0 becomes -1."""
    if immediate or "smc-not-handled" in vcpu.vm.profile.quirks:
        return Result((U64,))
    return call(vcpu, function_id, args, smc=True, big_endian=big_endian)


def _action(vcpu: Vcpu, function_id: int) -> int:
    arm = vcpu.vm.arm
    for first, last, action in arm.smccc_filter:
        if first <= function_id <= last:
            if action != KVM_SMCCC_FILTER_HANDLE:
                return action
            break
    gate = GATES.get(function_id)
    if gate is not None:
        allowed = bool(arm.smccc_bmaps[gate[0]] >> gate[1] & 1)
    else:
        psci_call = function_id >> 24 & 0x3F == STANDARD_OWNER and function_id & 0xFFFF <= LAST_PSCI_FUNCTION
        old = PSCI_0_1_BASE <= function_id <= PSCI_0_1_BASE + 3
        allowed = psci_call or old or function_id in (VERSION, ARCH_FEATURES)
    return KVM_SMCCC_FILTER_HANDLE if allowed else KVM_SMCCC_FILTER_DENY


def _arch_feature(vcpu: Vcpu, feature: int) -> int:
    from kvm2.softkvm.registers_fw import workaround_level

    if feature in (WORKAROUND_1, WORKAROUND_3):
        which = (
            onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1
            if feature == WORKAROUND_1
            else onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3
        )
        return (NOT_SUPPORTED, 0, UNAFFECTED)[workaround_level(vcpu, which)]
    if feature == WORKAROUND_2:
        level = workaround_level(vcpu, onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2)
        return NOT_REQUIRED if level == onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_NOT_REQUIRED else NOT_SUPPORTED
    if feature == PV_TIME_FEATURES and vcpu.vm.arm.smccc_bmaps[1] & 1:
        return 0
    return NOT_SUPPORTED


def _ptp(vcpu: Vcpu, counter: int) -> Result:
    """kvm_ptp_get_time: the host's wall clock, and one of the guest's counters at the same time."""
    if counter not in (0, 1):
        return Result.of(NOT_SUPPORTED)
    now, cycles = time.time_ns(), vcpu.timers[counter].count()
    return Result.of(now >> 32, now & U32, cycles >> 32, cycles & U32)


def _trng(function_id: int, first: int) -> Result:
    if function_id == TRNG_VERSION:
        return Result.of(0x10000)
    if function_id == TRNG_FEATURES:
        return Result.of(0 if first in TRNG else NOT_SUPPORTED)
    if function_id == TRNG_UUID:
        return Result.of(*TRNG_UUID_WORDS)
    width = 32 if function_id == TRNG_RND32 else 64
    bits = first & U32
    if bits > 3 * width:
        return Result.of(-2)
    entropy = int.from_bytes(os.urandom(24), "little") & (1 << bits) - 1
    mask = (1 << width) - 1
    return Result.of(0, entropy >> 2 * width & mask, entropy >> width & mask, entropy & mask)
