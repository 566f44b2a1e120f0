"""What a described host announces and the emulated core does not execute.

The core is Unicorn's MAX model at most; the limits below are that model's ID registers, read from Unicorn 2.1.4. A
guest that uses more than the core has gets an UNDEF or the older behaviour: `kvm2 hosts NAME` lists it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvm2.softkvm import profile_registers as reg
from kvm2.softkvm import profile_rules as rules

if TYPE_CHECKING:
    from kvm2.softkvm.profile import Profile


class Beyond(NamedTuple):
    """A field of an ID register: above `executed`, the host announces `what`, which the core does not have."""

    register: str
    lsb: int
    executed: int
    what: str


_BEYOND = (
    Beyond(reg.PFR0, 28, 0, "RAS error records"),
    Beyond(reg.PFR0, 48, 0, "FEAT_DIT: data-independent timing"),
    Beyond(reg.PFR1, 4, 0, "FEAT_SSBS: speculative store bypass control"),
    Beyond(reg.PFR1, 8, 0, "FEAT_MTE: memory tagging"),
    Beyond(reg.PFR1, 24, 0, "FEAT_SME: the matrix extension"),
    Beyond(reg.ZFR0, 0, 0, "FEAT_SVE2"),
    Beyond(reg.ZFR0, 4, 0, "FEAT_SVE_AES"),
    Beyond(reg.ZFR0, 16, 0, "FEAT_SVE_BitPerm"),
    Beyond(reg.ZFR0, 20, 0, "FEAT_BF16 for SVE"),
    Beyond(reg.ZFR0, 32, 0, "FEAT_SVE_SHA3"),
    Beyond(reg.ZFR0, 40, 0, "FEAT_SVE_SM4"),
    Beyond(reg.ZFR0, 44, 0, "FEAT_I8MM for SVE"),
    Beyond(reg.ZFR0, 52, 0, "FEAT_F32MM"),
    Beyond(reg.ZFR0, 56, 0, "FEAT_F64MM"),
    Beyond(reg.ISAR0, 56, 0, "FEAT_TLBIOS, FEAT_TLBIRANGE: outer-shareable and range TLB invalidation"),
    Beyond(reg.ISAR1, 4, 1, "FEAT_PAuth2 and later: enhanced pointer authentication"),
    Beyond(reg.ISAR1, 44, 0, "FEAT_BF16: BFloat16 instructions"),
    Beyond(reg.ISAR1, 52, 0, "FEAT_I8MM: 8-bit matrix multiplication"),
    Beyond(reg.ISAR1, 56, 0, "FEAT_XS"),
    Beyond(reg.ISAR1, 60, 0, "FEAT_LS64: 64-byte loads and stores"),
    Beyond(reg.ISAR2, 0, 0, "FEAT_WFxT: waits with a timeout"),
    Beyond(reg.ISAR2, 16, 0, "FEAT_MOPS: memory copy and set"),
    Beyond(reg.MMFR0, 60, 0, "FEAT_ECV: enhanced counter virtualization"),
    Beyond(reg.MMFR1, 0, 0, "FEAT_HAFDBS: access flags and dirty state set by hardware"),
    Beyond(reg.MMFR1, 44, 0, "FEAT_AFP"),
    Beyond(reg.MMFR2, 16, 0, "FEAT_LVA: 52-bit virtual addresses"),
    Beyond(reg.MMFR2, 28, 0, "FEAT_TTST: small translation tables"),
    Beyond(reg.MMFR2, 32, 0, "FEAT_LSE2: single-copy atomicity of unaligned accesses"),
    Beyond(reg.MMFR2, 60, 0, "FEAT_E0PD"),
)


def not_executed(profile: Profile) -> list[str]:
    """What this host announces to a guest and the core does not execute, in the order of the ID registers."""
    if profile.arch != "arm64":
        return [f"guests: hosts of {profile.arch} answer KVM_CHECK_EXTENSION and creation only"]
    registers = profile.registers
    found = [entry.what for entry in _BEYOND if reg.field_of(registers, entry.register, entry.lsb) > entry.executed]
    if any(rules.lpa2_stage1(registers, granule) for granule in (12, 14)):
        found.append("FEAT_LPA2 at stage 1: 52-bit addresses with 4K and 16K granules")
    if profile.pa_bits > 48:
        found.append("guest memory above 2^48 at native speed (a walk in Python serves it)")
    if rules.EL1_32BIT in profile.features:
        found.append("KVM_ARM_VCPU_EL1_32BIT: a vCPU in AArch32 at EL1 is refused at KVM_RUN")
    if rules.PMU_V3 in profile.features:
        found.append("PMU counting: counters read as they were set")
    return found
