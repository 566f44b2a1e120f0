"""PSCI: power states of vCPUs and of the machine, versions 0.1 to 1.1 (arch/arm64/kvm/psci.c).

A vCPU without KVM_ARM_VCPU_PSCI_0_2 has version 0.1, whose functions have numbers of KVM's own; with it the version is
KVM_REG_ARM_PSCI_VERSION, 1.1 unless it is lowered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.abi.exits import (
    KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2,
    KVM_SYSTEM_EVENT_SHUTDOWN,
    KVM_SYSTEM_EVENT_SUSPEND,
)
from kvm2.abi.structs import KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED
from kvm2.abi.structs_arm64 import KVM_ARM_VCPU_PSCI_0_2
from kvm2.abi.sysregs import MPIDR_EL1
from kvm2.softkvm.hypercall_result import PSCI_0_1_BASE, SMCCC_VERSION, U32, U64, Result, SystemEvent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.softkvm.vcpu import Vcpu

PSCI_0_1, PSCI_0_2, PSCI_1_0, PSCI_1_1 = 1, 2, 0x10000, 0x10001

BASE, BIT_64 = 0x84000000, 0x40000000
(VERSION, CPU_SUSPEND, CPU_OFF, CPU_ON, AFFINITY_INFO) = range(BASE, BASE + 5)
MIGRATE_INFO_TYPE, SYSTEM_OFF, SYSTEM_RESET, FEATURES, SYSTEM_SUSPEND, SYSTEM_RESET2 = (
    BASE + number for number in (6, 8, 9, 10, 14, 18)
)
CPU_OFF_0_1, CPU_ON_0_1 = PSCI_0_1_BASE + 1, PSCI_0_1_BASE + 2

SUCCESS, UNSUPPORTED, INVALID_PARAMS, ALREADY_ON, INTERNAL_FAILURE = 0, -1, -2, -4, -6
AFFINITY_ON, AFFINITY_OFF = 0, 1
TRUSTED_OS_MP = 2
WARM_RESET, FIRST_VENDOR_RESET = 0, 0x80000000

MPIDR_HWID: Final = 0xFF00FFFFFF
PSTATE_AA32 = 0x10

# Functions that PSCI_FEATURES reports in every version from 1.0 on.
KNOWN: Final = frozenset(
    {
        VERSION,
        CPU_SUSPEND,
        CPU_SUSPEND | BIT_64,
        CPU_OFF,
        CPU_ON,
        CPU_ON | BIT_64,
        AFFINITY_INFO,
        AFFINITY_INFO | BIT_64,
    }
    | {MIGRATE_INFO_TYPE, SYSTEM_OFF, SYSTEM_RESET, FEATURES, SMCCC_VERSION}
)


def version(vcpu: Vcpu) -> int:
    """kvm_psci_version."""
    if not vcpu.features >> KVM_ARM_VCPU_PSCI_0_2 & 1:
        return PSCI_0_1
    return vcpu.vm.arm.psci_version or PSCI_1_1


def call(vcpu: Vcpu, function_id: int, args: Sequence[int], big_endian: bool) -> Result:
    """kvm_psci_call. -1 for what the version does not have, and for 64-bit functions from AArch32."""
    if _from_aarch32(vcpu, function_id):
        return Result.of(UNSUPPORTED)
    current = version(vcpu)
    if current == PSCI_0_1:
        return _call_0_1(vcpu, function_id, args, big_endian)
    if current == PSCI_0_2:
        return _call_0_2(vcpu, function_id, args, big_endian)
    return _call_1_x(vcpu, function_id, args, big_endian, minor=current & 0xFFFF)


def _from_aarch32(vcpu: Vcpu, function_id: int) -> bool:
    return bool(function_id & BIT_64 and vcpu.state.pstate & PSTATE_AA32)


def _call_0_1(vcpu: Vcpu, function_id: int, args: Sequence[int], big_endian: bool) -> Result:
    if function_id == CPU_OFF_0_1:
        vcpu.set_power(KVM_MP_STATE_STOPPED)
        return Result.of(SUCCESS)
    if function_id == CPU_ON_0_1:
        return Result.of(_cpu_on(vcpu, args, big_endian))
    return Result.of(UNSUPPORTED)


def _call_0_2(vcpu: Vcpu, function_id: int, args: Sequence[int], big_endian: bool) -> Result:
    function, narrow = function_id & ~BIT_64, not function_id & BIT_64
    if narrow:
        args = [value & U32 for value in args]
    if function_id == VERSION:
        return Result.of(PSCI_0_2)
    if function == CPU_SUSPEND:
        return Result(Result.of(SUCCESS).values, wait=True)
    if function_id == CPU_OFF:
        vcpu.set_power(KVM_MP_STATE_STOPPED)
        return Result.of(SUCCESS)
    if function == CPU_ON:
        return Result.of(_cpu_on(vcpu, args, big_endian))
    if function == AFFINITY_INFO:
        return Result.of(_affinity_info(vcpu, args))
    if function_id == MIGRATE_INFO_TYPE:
        return Result.of(TRUSTED_OS_MP)
    if function_id in (SYSTEM_OFF, SYSTEM_RESET):
        event = KVM_SYSTEM_EVENT_SHUTDOWN if function_id == SYSTEM_OFF else KVM_SYSTEM_EVENT_RESET
        return Result(Result.of(INTERNAL_FAILURE).values, exit=_stop_everything(vcpu, event, 0))
    return Result.of(UNSUPPORTED)


def _call_1_x(vcpu: Vcpu, function_id: int, args: Sequence[int], big_endian: bool, minor: int) -> Result:
    function, narrow = function_id & ~BIT_64, not function_id & BIT_64
    if function_id == VERSION:
        return Result.of(PSCI_1_0 if minor == 0 else PSCI_1_1)
    if function_id == FEATURES:
        return Result.of(_feature(vcpu, args[0] & U32, minor))
    if function == SYSTEM_SUSPEND:
        if vcpu.vm.arm.system_suspend:
            return Result(exit=SystemEvent(KVM_SYSTEM_EVENT_SUSPEND), narrow=narrow)
        return Result.of(UNSUPPORTED)
    if function == SYSTEM_RESET2:
        kind = args[0] & U32
        if minor < 1:
            return Result.of(UNSUPPORTED)
        if WARM_RESET < kind < FIRST_VENDOR_RESET:
            return Result.of(INVALID_PARAMS)
        event = _stop_everything(vcpu, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2)
        return Result((INTERNAL_FAILURE & U64,), exit=event, narrow=narrow)
    return _call_0_2(vcpu, function_id, args, big_endian)


def _feature(vcpu: Vcpu, function_id: int, minor: int) -> int:
    function = function_id & ~BIT_64
    if _from_aarch32(vcpu, function_id):
        return UNSUPPORTED
    if function == SYSTEM_SUSPEND:
        return SUCCESS if vcpu.vm.arm.system_suspend else UNSUPPORTED
    if function == SYSTEM_RESET2:
        return SUCCESS if minor >= 1 else UNSUPPORTED
    return SUCCESS if function_id in KNOWN else UNSUPPORTED


def affinity(vcpu: Vcpu) -> int:
    """The affinity levels of a vCPU's MPIDR_EL1."""
    return vcpu.state.sys.get(MPIDR_EL1, 0) & MPIDR_HWID


def _cpu_on(source: Vcpu, args: Sequence[int], big_endian: bool) -> int:
    """kvm_psci_vcpu_on: the target is reset when it next looks, with entry point, context and byte order."""
    wanted, entry, context = args[:3]
    target = next((vcpu for vcpu in list(source.vm.vcpus.values()) if affinity(vcpu) == wanted), None)
    if wanted & ~MPIDR_HWID or target is None:
        return INVALID_PARAMS
    with source.vm.lock:
        if target.mp_state != KVM_MP_STATE_STOPPED:
            return INVALID_PARAMS if version(source) == PSCI_0_1 else ALREADY_ON
        target.request_reset(entry, context, big_endian)
        target.set_power(KVM_MP_STATE_RUNNABLE)
    return SUCCESS


def _affinity_info(vcpu: Vcpu, args: Sequence[int]) -> int:
    wanted, level = args[:2]
    if wanted & ~MPIDR_HWID or level > 3:
        return INVALID_PARAMS
    mask = MPIDR_HWID & ~((1 << 8 * level) - 1)
    matching = [other for other in list(vcpu.vm.vcpus.values()) if affinity(other) & mask == wanted & mask]
    if not matching:
        return INVALID_PARAMS
    on = any(other.mp_state != KVM_MP_STATE_STOPPED for other in matching)
    return AFFINITY_ON if on else AFFINITY_OFF


def _stop_everything(vcpu: Vcpu, event: int, flags: int) -> SystemEvent:
    """kvm_prepare_system_event: no vCPU runs again until userspace makes it runnable."""
    for other in list(vcpu.vm.vcpus.values()):
        other.set_power(KVM_MP_STATE_STOPPED)
    return SystemEvent(event, ndata=1, flags=flags)
