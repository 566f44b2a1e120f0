"""What a VM's vCPUs have in common: features, ID registers, firmware, timers; and what KVM_ARM_VCPU_INIT checks.

After `kvm_vcpu_set_target` and what it calls in arch/arm64/kvm/arm.c: 6.12 keeps one feature set for the VM; with the
quirk `per-vcpu-features` (6.1) each vCPU has its own, and the checks come in another order.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi.structs_arm64 import (
    KVM_ARM_VCPU_EL1_32BIT,
    KVM_ARM_VCPU_PMU_V3,
    KVM_ARM_VCPU_POWER_OFF,
    KVM_ARM_VCPU_PTRAUTH_ADDRESS,
    KVM_ARM_VCPU_PTRAUTH_GENERIC,
    KVM_ARM_VCPU_SVE,
    VcpuInit,
)
from kvm2.abi.sysregs import ID_AA64PFR0_EL1, PMCR_EL0
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.softkvm.profile import Profile
    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vm import Vm

KVM_VCPU_MAX_FEATURES: Final = 7
VALID_FEATURES: Final = (1 << KVM_VCPU_MAX_FEATURES) - 1
POWER_OFF, EL1_32BIT, SVE, PMU = (
    1 << bit for bit in (KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_EL1_32BIT, KVM_ARM_VCPU_SVE, KVM_ARM_VCPU_PMU_V3)
)
PTRAUTH: Final = 1 << KVM_ARM_VCPU_PTRAUTH_ADDRESS | 1 << KVM_ARM_VCPU_PTRAUTH_GENERIC
PMCR_N_SHIFT, PMCR_N_MASK = 11, 0x1F

# Timer interrupts of a new VM: virtual, physical, and the two of EL2 (default_ppi of arch_timer.c).
DEFAULT_PPI: Final = (27, 30, 28, 26)

# KVM_REG_ARM_{STD,STD_HYP,VENDOR_HYP}_BMAP of a new VM: every service that the kernel has.
SMCCC_SERVICES: Final = (0b1, 0b1, 0b11)


class VmArm:
    """The arm64 state of a VM that its vCPUs share (`struct kvm_arch` without memory and interrupts)."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.features = 0  # the VM-wide feature set, which the first vCPU that was initialised fixed
        self.features_fixed = False
        self.width_32bit: bool | None = None  # register width, with per-vCPU features
        self.id_regs: dict[int, int] = {}  # what guests read, from the first vCPU's reset on
        self.psci_version = 0  # 0: the newest
        self.smccc_bmaps = list(SMCCC_SERVICES)
        self.smccc_filter: list[tuple[int, int, int]] = []  # (first, last, action)
        self.has_pmu = False
        self.pmcr_n = 0  # event counters of the VM's PMU
        self.pmu_filter: dict[int, bool] | None = None  # event -> allowed
        self.pmu_filter_default = True
        self.mte = False
        self.system_suspend = False
        self.split_page_chunk_size = 0
        self.counter_offset_set = False
        self.voffset = 0
        self.poffset = 0
        self.timer_ppi = list(DEFAULT_PPI)

    def give_pmu(self, features: int) -> None:
        """kvm_arm_set_default_pmu: the first vCPU with a PMU gives the VM the host's, with all its counters."""
        if features & PMU and not self.has_pmu:
            self.has_pmu, self.pmcr_n = True, self.host_counters()

    def has_aarch32_el0(self) -> bool:
        """kvm_supports_32bit_el0: ID_AA64PFR0_EL1.EL0 of the host says AArch32 too."""
        return self.profile.registers.get(ID_AA64PFR0_EL1, 0) & 0xF == 2

    def host_counters(self) -> int:
        """How many event counters the host's PMU has: PMCR_EL0.N."""
        return self.profile.registers.get(PMCR_EL0, 0) >> PMCR_N_SHIFT & PMCR_N_MASK

    def host_register(self, enc: int) -> int:
        """A register's value on the host (CLIDR_EL1 and the like); 0 where the description has none."""
        return self.profile.registers.get(enc, 0)


def supported(vm: Vm) -> int:
    """The feature bits that a vCPU of this VM may ask for (`system_supported_vcpu_features`), as creation allows."""
    bits = sum(1 << feature for feature in vm.profile.features if feature < KVM_VCPU_MAX_FEATURES)
    return bits if vm.config.sve_allowed else bits & ~SVE


def _names(bits: int) -> str:
    texts = ("POWER_OFF", "EL1_32BIT", "PSCI_0_2", "PMU_V3", "SVE", "PTRAUTH_ADDRESS", "PTRAUTH_GENERIC")
    return ", ".join(text for bit, text in enumerate(texts) if bits >> bit & 1) or "none"


def _check_target(vm: Vm, target: int) -> None:
    if target not in vm.profile.targets:
        accepted = ", ".join(str(number) for number in vm.profile.targets)
        raise KvmError(errno.EINVAL, f"target {target}: this host takes {accepted} (KVM_ARM_PREFERRED_TARGET)")


def _check_pair(bits: int) -> None:
    if bits & PTRAUTH not in (0, PTRAUTH):
        raise KvmError(errno.EINVAL, "PTRAUTH_ADDRESS and PTRAUTH_GENERIC can only be asked for together")


def _check_supported(vm: Vm, bits: int) -> None:
    missing = bits & ~supported(vm)
    if not missing:
        return
    if missing == SVE and KVM_ARM_VCPU_SVE in vm.profile.features:
        reason = (
            "a VM made by KVM_CREATE_VM2 has SVE only if creation allowed it: give attribute ARCH_CAPABILITIES bit 0 "
            "(VCPU_NEEDS_SET_SVE_VLS) or attribute ARM64_SVE_VLS"
        )
    else:
        reason = f"vCPU features {_names(missing)}: this host has {_names(supported(vm))}"
    raise KvmError(errno.EINVAL, reason)


def vm_wide_features(vm: Vm) -> bool:
    """Whether all vCPUs of a VM have the same features (6.12); else each has its own (6.1)."""
    return "per-vcpu-features" not in vm.profile.quirks


def set_target(vcpu: Vcpu, init: VcpuInit) -> bool:
    """The checks of KVM_ARM_VCPU_INIT, and the reset. Returns whether the vCPU starts powered off.

    Raises KvmError: ENOENT for a feature bit that the kernel does not know, EINVAL for a target or feature that this
    host does not have and for other features than the VM (or this vCPU, in 6.1) was initialised with.
    """
    if vm_wide_features(vcpu.vm):
        return _set_target_vm_wide(vcpu, init)
    return _set_target_per_vcpu(vcpu, init)


def _set_target_vm_wide(vcpu: Vcpu, init: VcpuInit) -> bool:
    vm, arm = vcpu.vm, vcpu.vm.arm
    power_off, bits = bool(init.features[0] & POWER_OFF), init.features[0] & ~POWER_OFF
    _check_target(vm, init.target)
    if bits & ~VALID_FEATURES or any(init.features[1:]):
        raise KvmError(
            errno.ENOENT, f"feature bits {bits & ~VALID_FEATURES:#x}: this kernel knows bits 0 to 6 of word 0"
        )
    _check_supported(vm, bits)
    _check_pair(bits)
    if bits & EL1_32BIT and arm.mte:
        raise KvmError(errno.EINVAL, "EL1_32BIT: a VM with memory tagging (KVM_CAP_ARM_MTE) has no AArch32 vCPUs")
    with vm.lock:
        if arm.features_fixed and bits != arm.features:
            raise KvmError(
                errno.EINVAL,
                f"features {_names(bits)}: the vCPUs of this VM were initialised with {_names(arm.features)}",
            )
        arm.features = bits
        arm.give_pmu(bits)
        vcpu.reset()
        arm.features_fixed = vcpu.initialized = True
    return power_off


def _set_target_per_vcpu(vcpu: Vcpu, init: VcpuInit) -> bool:
    """6.1: bits are taken one by one, so those before an unknown one stay with the vCPU (as in the kernel)."""
    vm = vcpu.vm
    _check_target(vm, init.target)
    for number in range(32 * len(init.features)):
        wanted = bool(init.features[number // 32] >> number % 32 & 1)
        if wanted and number >= KVM_VCPU_MAX_FEATURES:
            raise KvmError(errno.ENOENT, f"feature bit {number}: this kernel knows bits 0 to 6")
        if number < KVM_VCPU_MAX_FEATURES:
            if vcpu.initialized and bool(vcpu.features >> number & 1) != wanted:
                raise KvmError(errno.EINVAL, f"this vCPU was initialised with features {_names(vcpu.features)}")
            vcpu.own_features |= int(wanted) << number
    try:
        _check_width(vm, vcpu.features)
        _check_supported(vm, vcpu.features & ~EL1_32BIT)
        _check_pair(vcpu.features)
    except KvmError:
        vcpu.own_features, vcpu.initialized = 0, False
        raise
    vm.arm.give_pmu(vcpu.features)
    vcpu.reset()
    vcpu.initialized = True
    return bool(vcpu.features & POWER_OFF)


def _check_width(vm: Vm, bits: int) -> None:
    """kvm_set_vm_width: the first vCPU decides between AArch32 and AArch64 at EL1."""
    arm, wide = vm.arm, bool(bits & EL1_32BIT)
    if arm.width_32bit is None:
        if wide and not supported(vm) & EL1_32BIT:
            raise KvmError(errno.EINVAL, "EL1_32BIT: this host has no AArch32 at EL1")
        if wide and arm.mte:
            raise KvmError(errno.EINVAL, "EL1_32BIT: a VM with memory tagging has no AArch32 vCPUs")
        arm.width_32bit = wide
    elif arm.width_32bit != wide:
        raise KvmError(errno.EINVAL, "EL1_32BIT: all vCPUs of a VM have the same register width")
