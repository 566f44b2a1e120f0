"""The rules that turn the facts of a described arm64 host into what its KVM answers.

Each function names the kernel function whose rule it is (Linux 6.12 unless said otherwise).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi import caps as cap
from kvm2.softkvm import profile_registers as reg

if TYPE_CHECKING:
    from collections.abc import Mapping

PA_BITS = (32, 36, 40, 42, 44, 48, 52, 56)  # by ID_AA64MMFR0_EL1.PARange
LARGEST_PA_BITS = 52  # CONFIG_ARM64_PA_BITS: what an encoding that the kernel does not know counts as
GRANULES = (12, 14, 16)

_NO_GRANULE = 0xF  # TGRAN4, TGRAN64
# granule -> lsb of the stage-1 field, its value for "52 bits", lsb of the stage-2 field
_TGRAN = {12: (28, 1, 40), 14: (20, 2, 32), 16: (24, None, 36)}
_STAGE2_AS_STAGE1, _STAGE2_NONE, _STAGE2_LPA2 = 0, 1, 3

# Pointer authentication of addresses, and generic: the three algorithms.
APA = ((reg.ISAR1, 4), (reg.ISAR1, 8), (reg.ISAR2, 12))
GPA = ((reg.ISAR1, 24), (reg.ISAR1, 28), (reg.ISAR2, 8))

POWER_OFF, EL1_32BIT, PSCI_0_2, PMU_V3, SVE, PTRAUTH_ADDRESS, PTRAUTH_GENERIC = range(7)

TARGET_GENERIC_V8 = 5
# MIDR_EL1 implementer and part number -> KVM_ARM_TARGET_* (kvm_target_cpu)
_TARGETS = {(0x41, 0xD0F): 0, (0x41, 0xD00): 1, (0x41, 0xD07): 2, (0x50, 0x000): 3, (0x41, 0xD03): 4}


def stage1_granule(registers: Mapping[int, int], granule: int) -> bool:
    """Whether stage 1 has this granule: what decides whether a kernel with such pages boots."""
    value = reg.field_of(registers, reg.MMFR0, _TGRAN[granule][0])
    return value != 0 if granule == 14 else value != _NO_GRANULE


def stage2_granule(registers: Mapping[int, int], granule: int) -> bool:
    """Whether stage 2 has this granule (the TGRAN_2 check of kvm_set_ipa_limit)."""
    stage2 = reg.field_of(registers, reg.MMFR0, _TGRAN[granule][2])
    if stage2 == _STAGE2_AS_STAGE1:
        return stage1_granule(registers, granule)
    return stage2 != _STAGE2_NONE


def granules(registers: Mapping[int, int]) -> tuple[int, ...]:
    """Every stage-2 granule of the host's MMU."""
    return tuple(granule for granule in GRANULES if stage2_granule(registers, granule))


def lpa2(registers: Mapping[int, int], granule: int) -> bool:
    """52-bit addresses at both stages with 4K or 16K pages (has_lpa2)."""
    stage2 = _TGRAN[granule][2]
    return lpa2_stage1(registers, granule) and reg.field_of(registers, reg.MMFR0, stage2) == _STAGE2_LPA2


def lpa2_stage1(registers: Mapping[int, int], granule: int) -> bool:
    """52-bit addresses at stage 1 with 4K or 16K pages (has_lpa2_at_stage1)."""
    stage1, large, _ = _TGRAN[granule]
    return large is not None and reg.field_of(registers, reg.MMFR0, stage1) == large


def ipa_limit(parange: int, granule: int, has_lpa2: bool) -> int:
    """The largest IPA size (kvm_set_ipa_limit): PARange, capped at 48 without LPA2 or 64K pages.

    >>> ipa_limit(6, 12, False), ipa_limit(6, 16, False), ipa_limit(1, 14, False)
    (48, 52, 36)
    """
    bits = min(PA_BITS[parange] if parange < len(PA_BITS) else LARGEST_PA_BITS, LARGEST_PA_BITS)
    return bits if has_lpa2 or granule == 16 else min(bits, 48)


def max_vcpus(gic: tuple[str, ...]) -> int:
    """kvm_arm_default_max_vcpus: 8 where the host's GIC allows only a GICv2 for guests."""
    return 8 if gic == ("v2",) else 512


def features(registers: Mapping[int, int], sve_vqs: tuple[int, ...]) -> frozenset[int]:
    """The vCPU feature bits that the host offers (system_supported_vcpu_features); HAS_EL2 is off before 6.16."""
    found = {POWER_OFF, PSCI_0_2}
    if reg.field_of(registers, reg.PFR0, 4) == 2:
        found.add(EL1_32BIT)
    if reg.field_of(registers, reg.DFR0, 8) not in (0, 0xF):
        found.add(PMU_V3)
    if sve_vqs:
        found.add(SVE)
    if has_full_ptrauth(registers):
        found |= {PTRAUTH_ADDRESS, PTRAUTH_GENERIC}
    return frozenset(found)


def has_full_ptrauth(registers: Mapping[int, int]) -> bool:
    """Address and generic authentication, by any algorithm (kvm_has_full_ptr_auth)."""
    address = any(reg.field_of(registers, name, lsb) for name, lsb in ((reg.ISAR1, 4), (reg.ISAR1, 8), (reg.ISAR2, 12)))
    generic = any(
        reg.field_of(registers, name, lsb) for name, lsb in ((reg.ISAR1, 24), (reg.ISAR1, 28), (reg.ISAR2, 8))
    )
    return address and generic


def has_mte(registers: Mapping[int, int]) -> bool:
    """system_supports_mte: ID_AA64PFR1_EL1.MTE is 2 or more."""
    return reg.field_of(registers, reg.PFR1, 8) >= 2


def targets(midr: int, own_only: bool) -> tuple[tuple[int, ...], int]:
    """The targets that KVM_ARM_VCPU_INIT takes, and KVM_ARM_PREFERRED_TARGET, by the host's MIDR_EL1.

    Newer kernels take the generic target besides the host's own and prefer it; older ones take the own one only.

    >>> targets(0x411FD070, False), targets(0x411FD070, True)
    (((2, 5), 5), ((2,), 2))
    """
    own = _TARGETS.get((midr >> 24 & 0xFF, midr >> 4 & 0xFFF), TARGET_GENERIC_V8)
    if own_only:
        return (own,), own
    return tuple(sorted({own, TARGET_GENERIC_V8})), TARGET_GENERIC_V8


def supported_block_sizes(page_shift: int) -> int:
    """KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES: the leaf sizes from the smallest level that KVM uses for blocks.

    >>> hex(supported_block_sizes(12)), hex(supported_block_sizes(14))
    ('0x40201000', '0x2004000')
    """
    bits = page_shift - 3
    sizes = 1 << page_shift | 1 << page_shift + bits
    return sizes | 1 << page_shift + 2 * bits if page_shift == 12 else sizes


# The capabilities that `capabilities` computes: a host file cannot state them.
COMPUTED = frozenset(
    (
        cap.KVM_CAP_IRQCHIP,
        cap.KVM_CAP_NR_VCPUS,
        cap.KVM_CAP_NR_MEMSLOTS,
        cap.KVM_CAP_MAX_VCPUS,
        cap.KVM_CAP_MAX_VCPU_ID,
        cap.KVM_CAP_ARM_EL1_32BIT,
        cap.KVM_CAP_ARM_PMU_V3,
        cap.KVM_CAP_ARM_SVE,
        cap.KVM_CAP_ARM_PTRAUTH_ADDRESS,
        cap.KVM_CAP_ARM_PTRAUTH_GENERIC,
        cap.KVM_CAP_ARM_MTE,
        cap.KVM_CAP_GUEST_DEBUG_HW_BPS,
        cap.KVM_CAP_GUEST_DEBUG_HW_WPS,
        cap.KVM_CAP_ARM_INJECT_SERROR_ESR,
        cap.KVM_CAP_ARM_VM_IPA_SIZE,
        cap.KVM_CAP_MSI_DEVID,
        cap.KVM_CAP_CREATE_VM2,
        cap.KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES,
        cap.KVM_CAP_VM_TYPES,
    )
)

# The same for a host of another architecture.
COMPUTED_ELSEWHERE = frozenset(
    (
        cap.KVM_CAP_NR_VCPUS,
        cap.KVM_CAP_NR_MEMSLOTS,
        cap.KVM_CAP_MAX_VCPUS,
        cap.KVM_CAP_MAX_VCPU_ID,
        cap.KVM_CAP_CREATE_VM2,
        cap.KVM_CAP_VM_TYPES,
    )
)


def capabilities(constant: Mapping[int, int], facts: Mapping[str, int], registers: Mapping[int, int]) -> dict[int, int]:
    """KVM_CHECK_EXTENSION on /dev/kvm: the kernel's constant answers, and those that follow from the host.

    `facts`: page_shift, ipa_limit, cpus, max_vcpus, max_vcpu_id, nr_memslots, gic (how many), create_vm2, and
    features as a mask.
    """
    has = facts["features"]
    answers = dict(constant) | {
        cap.KVM_CAP_IRQCHIP: int(bool(facts["gic"])),
        cap.KVM_CAP_NR_VCPUS: min(facts["cpus"], facts["max_vcpus"]),
        cap.KVM_CAP_NR_MEMSLOTS: facts["nr_memslots"],
        cap.KVM_CAP_MAX_VCPUS: facts["max_vcpus"],
        cap.KVM_CAP_MAX_VCPU_ID: facts["max_vcpu_id"],
        cap.KVM_CAP_ARM_EL1_32BIT: has >> EL1_32BIT & 1,
        cap.KVM_CAP_ARM_PMU_V3: has >> PMU_V3 & 1,
        cap.KVM_CAP_ARM_SVE: has >> SVE & 1,
        cap.KVM_CAP_ARM_PTRAUTH_ADDRESS: has >> PTRAUTH_ADDRESS & 1,
        cap.KVM_CAP_ARM_PTRAUTH_GENERIC: has >> PTRAUTH_GENERIC & 1,
        cap.KVM_CAP_ARM_MTE: int(has_mte(registers)),
        cap.KVM_CAP_GUEST_DEBUG_HW_BPS: 1 + reg.field_of(registers, reg.DFR0, 12),
        cap.KVM_CAP_GUEST_DEBUG_HW_WPS: 1 + reg.field_of(registers, reg.DFR0, 20),
        cap.KVM_CAP_ARM_INJECT_SERROR_ESR: int(reg.field_of(registers, reg.PFR0, 28) > 0),
        cap.KVM_CAP_ARM_VM_IPA_SIZE: facts["ipa_limit"],
        cap.KVM_CAP_MSI_DEVID: -errno.EINVAL,  # a question about a VM
        cap.KVM_CAP_CREATE_VM2: facts["create_vm2"],
    }
    if cap.KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES in constant:
        answers[cap.KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES] = supported_block_sizes(facts["page_shift"])
    return {number: value for number, value in sorted(answers.items()) if value}


def writable_masks(of_kernel: Mapping[int, int], registers: Mapping[int, int]) -> dict[int, int]:
    """KVM_ARM_GET_REG_WRITABLE_MASKS: the kernel's, without the AArch32 ID registers on a core without AArch32."""
    if reg.field_of(registers, reg.PFR0, 0) == 2:
        return dict(of_kernel)
    return {enc: mask for enc, mask in of_kernel.items() if not is_aarch32_id(enc)}


def is_aarch32_id(enc: int) -> bool:
    """Whether a register is one of the AArch32 ID registers, S3_0_C0_C1_0 to S3_0_C0_C3_7."""
    return 0xC008 <= enc <= 0xC01F
