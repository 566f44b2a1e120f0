"""ID registers: what a vCPU's features leave of the host's, what userspace may change, what a guest reads.

After `read_sanitised_id_*`, `set_id_*` and `arm64_check_features` of arch/arm64/kvm/sys_regs.c. In 6.12 a VM has one
value per register, lowered by userspace before the first run; with the quirk `fixed-id-registers` (6.1) the values
follow from the features and only CSV2 and CSV3 can be lowered.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import sysregs as sr
from kvm2.errors import KvmError
from kvm2.softkvm import features as feat
from kvm2.softkvm.sysregs_fields import first_unsafe, known_bits

if TYPE_CHECKING:
    from kvm2.softkvm.sysregs_table import SysReg
    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vm import Vm

PA_BITS = (32, 36, 40, 42, 44, 48, 52)  # by PARange
PARANGE, GIC = 0xF, 0xF << 24
SVE_FIELD, CSV2, CSV3 = 0xF << 32, 56, 60
MPAM, MPAM_FRAC, MTE_FIELD, SSBS = 0xF << 40, 0xF << 16, 0xF << 8, 4
PTRAUTH_ISAR1, PTRAUTH_ISAR2 = 0xFF000FF0, 0xFF00
PMUVER, PERFMON = 8, 24
AA32_GIC = 0xF << 28
_PMU_IMPDEF, _DEBUG_V8, _DEBUG_V8P8 = 0xF, 6, 0xA
_PMU_LIMIT, _OLDER_PMU_LIMIT = 6, 5  # PMUv3p5; PMUv3p4 in 6.1

# Fields of features that KVM does not give to guests, whatever the vCPU asked for.
AMU, SME, PMSVER = 0xF << 44, 0xF << 24, 0xF << 32
HIDDEN: Final = {
    sr.ID_AA64PFR0_EL1: AMU | MPAM,
    # PFAR, DF2, MTEX, THE, GCS, MTE_frac, NMI, SME, RNDR_trap, MPAM_frac
    sr.ID_AA64PFR1_EL1: 0xFFFFFFFF << 32 | SME | 0xF << 16 | 0xF << 28,
    sr.ID_AA64MMFR2_EL1: 0xF << 20,  # CCIDX
    sr.ID_MMFR4_EL1: 0xF << 24,  # CCIDX
    sr.ID_AA64DFR0_EL1: PMSVER,
}
HIDDEN_6_1: Final = {sr.ID_AA64PFR0_EL1: AMU, sr.ID_AA64PFR1_EL1: SME, sr.ID_AA64DFR0_EL1: PMSVER}


def fixed(vm: Vm) -> bool:
    """Whether ID registers follow from the vCPU's features and cannot be lowered (6.1)."""
    return "fixed-id-registers" in vm.profile.quirks


def parange_for(ipa_bits: int, host: int) -> int:
    """The largest PARange that is not above an IPA size, nor above the host's.

    >>> parange_for(39, 6), parange_for(52, 5), parange_for(32, 6)
    (1, 5, 0)
    """
    return min(host, max(code for code, bits in enumerate(PA_BITS) if bits <= ipa_bits))


def sanitised(vcpu: Vcpu, reg: SysReg) -> int:
    """The most that this vCPU may promise: the host's register without what its features do not include."""
    vm, bits, enc = vcpu.vm, vcpu.features, reg.enc
    if reads_as_zero(vcpu, reg):
        # KVM puts the PMU's version into this one register even where the host has no AArch32.
        return _perfmon(vm) << PERFMON if enc == sr.ID_DFR0_EL1 and bits & feat.PMU and not fixed(vm) else 0
    value = vm.arm.host_register(enc) & known_bits(enc) & ~_hidden_bits(vm, enc)
    if enc == sr.ID_AA64PFR0_EL1:
        return value if bits & feat.SVE else value & ~SVE_FIELD
    if enc == sr.ID_AA64PFR1_EL1:
        return value if vm.arm.mte else value & ~MTE_FIELD
    if enc in (sr.ID_AA64ISAR1_EL1, sr.ID_AA64ISAR2_EL1) and not bits & feat.PTRAUTH:
        return value & ~(PTRAUTH_ISAR1 if enc == sr.ID_AA64ISAR1_EL1 else PTRAUTH_ISAR2)
    if enc == sr.ID_AA64DFR0_EL1:
        return _limit_debug(value, PMUVER, bits, fixed(vm))
    if enc == sr.ID_DFR0_EL1:
        return _limit_debug(value, PERFMON, bits, fixed(vm), aarch32=True)
    return value


def _hidden_bits(vm: Vm, enc: int) -> int:
    return HIDDEN_6_1.get(enc, 0) if fixed(vm) else HIDDEN.get(enc, 0)


def _limit_debug(value: int, pmu_lsb: int, bits: int, old: bool, aarch32: bool = False) -> int:
    """Debug and PMU versions are capped at what KVM handles; a PMU that is not Arm's, or not asked for, is hidden."""
    version = value >> pmu_lsb & 0xF
    if not bits & feat.PMU or version == _PMU_IMPDEF:
        version = 0
    version = min(version, _OLDER_PMU_LIMIT if old else _PMU_LIMIT)
    debug = value & 0xF
    if not old:
        debug = min(debug, _DEBUG_V8P8)
    elif not aarch32:
        debug = _DEBUG_V8
    return value & ~(0xF << pmu_lsb | 0xF) | version << pmu_lsb | debug


def _perfmon(vm: Vm) -> int:
    """pmuver_to_perfmon: the PMU's version as ID_DFR0_EL1 has it."""
    version = vm.arm.host_register(sr.ID_AA64DFR0_EL1) >> PMUVER & 0xF
    return 3 if version == 1 else version


def reset_value(vcpu: Vcpu, reg: SysReg) -> int:
    """The register after the VM's first KVM_ARM_VCPU_INIT: PARange follows the IPA size where creation says so."""
    value, config = sanitised(vcpu, reg), vcpu.vm.config
    if reg.enc == sr.ID_AA64MMFR0_EL1 and config.parange_follows_ipa:
        return value & ~PARANGE | parange_for(config.ipa_bits, value & PARANGE)
    return value


def reads_as_zero(vcpu: Vcpu, reg: SysReg) -> bool:
    """sysreg_visible_as_raz."""
    if reg.visible == "aa32":
        return not vcpu.vm.arm.has_aarch32_el0()
    return reg.visible == "raz" or (reg.visible == "zfr0" and not vcpu.features & feat.SVE)


def read(vcpu: Vcpu, reg: SysReg) -> int:
    """What userspace and the guest read."""
    vm = vcpu.vm
    if not fixed(vm):
        return vm.arm.id_regs.get(reg.enc, 0)
    value = reset_value(vcpu, reg)
    if reg.enc == sr.ID_AA64PFR0_EL1 and reg.enc in vm.arm.id_regs:
        speculation = 0xF << CSV2 | 0xF << CSV3
        value = value & ~speculation | vm.arm.id_regs[reg.enc] & speculation
    return value


def write(vcpu: Vcpu, reg: SysReg, value: int) -> None:
    """KVM_SET_ONE_REG. EINVAL for a value that promises too much; EBUSY for another value after the VM ran."""
    if fixed(vcpu.vm):
        _write_fixed(vcpu, reg, value)
        return
    if reg.visible == "aa32" and reads_as_zero(vcpu, reg):
        return  # KVM ignores writes to AArch32 ID registers on a host without AArch32
    value = _adjusted(vcpu, reg, value)
    with vcpu.vm.lock:
        current = read(vcpu, reg)
        if vcpu.vm.ran:
            if value != current:
                raise KvmError(
                    errno.EBUSY,
                    f"{reg.name} = {value:#x}: it is {current:#x} for good since the VM ran for the first time",
                )
            return
        _check(vcpu, reg, value)
        vcpu.vm.arm.id_regs[reg.enc] = value


def _check(vcpu: Vcpu, reg: SysReg, value: int) -> None:
    if reads_as_zero(vcpu, reg):
        if value:
            raise KvmError(errno.EINVAL, f"{reg.name} = {value:#x}: it reads as zero here, so only 0 can be written")
        return
    limit = sanitised(vcpu, reg)
    field = first_unsafe(reg.enc, value, limit, vcpu.vm.profile.writable_masks.get(reg.enc, 0))
    if field is not None:
        high = field.lsb + field.width - 1
        raise KvmError(
            errno.EINVAL,
            f"{reg.name} = {value:#x}: bits {high}:{field.lsb} promise what this host has not; it has {limit:#x}, "
            "and only what KVM_ARM_GET_REG_WRITABLE_MASKS lists can be lowered",
        )


def _adjusted(vcpu: Vcpu, reg: SysReg, value: int) -> int:
    """set_id_aa64pfr0_el1 and its like: values that older kernels handed out are taken back."""
    host = vcpu.vm.arm.host_register(reg.enc)
    if reg.enc == sr.ID_AA64PFR0_EL1 and (host ^ value) & MPAM == 0:
        return value & ~MPAM
    if reg.enc == sr.ID_AA64PFR1_EL1 and (host ^ value) & MPAM_FRAC == 0:
        return value & ~MPAM_FRAC
    if reg.enc == sr.ID_AA64DFR0_EL1:
        if value >> PMUVER & 0xF == _PMU_IMPDEF:
            value &= ~(0xF << PMUVER)
        if value & 0xF < _DEBUG_V8:
            raise KvmError(errno.EINVAL, f"ID_AA64DFR0_EL1.DebugVer = {value & 0xF}: 6 (Armv8) is the least")
    if reg.enc == sr.ID_DFR0_EL1:
        if value >> PERFMON & 0xF == _PMU_IMPDEF:
            value &= ~(0xF << PERFMON)
        if 0 < value >> PERFMON & 0xF < 3:
            raise KvmError(errno.EINVAL, "ID_DFR0_EL1.PerfMon: 0 or at least 3 (PMUv3)")
        if value & 0xF < _DEBUG_V8:
            raise KvmError(errno.EINVAL, f"ID_DFR0_EL1.CopDbg = {value & 0xF}: 6 (Armv8) is the least")
    return value


def _write_fixed(vcpu: Vcpu, reg: SysReg, value: int) -> None:
    """6.1: only ID_AA64PFR0_EL1.CSV2 and CSV3 can differ, and only where the host is not affected."""
    if reg.visible == "aa32" and reads_as_zero(vcpu, reg):
        return
    difference = value ^ read(vcpu, reg)
    if reg.enc == sr.ID_AA64PFR0_EL1:
        host = vcpu.vm.arm.host_register(reg.enc)
        for lsb in (CSV2, CSV3):
            wanted, had = value >> lsb & 0xF, host >> lsb & 0xF
            if wanted > 1 or (wanted and not had):
                raise KvmError(errno.EINVAL, f"{reg.name} bits {lsb + 3}:{lsb} = {wanted}: this host has {had}")
        difference &= ~(0xF << CSV2 | 0xF << CSV3)
    if difference:
        raise KvmError(
            errno.EINVAL, f"{reg.name} = {value:#x}: this kernel lets nobody change it (it is {value ^ difference:#x})"
        )
    if reg.enc == sr.ID_AA64PFR0_EL1:
        vcpu.vm.arm.id_regs[reg.enc] = value


def finalise(vm: Vm) -> None:
    """kvm_finalize_sys_regs, at the first run: no GIC in the ID registers unless the VM has a vGICv3."""
    if fixed(vm) or vm.irqchip == "v3":
        return
    for enc, mask in ((sr.ID_AA64PFR0_EL1, GIC), (sr.ID_PFR1_EL1, AA32_GIC)):
        if enc in vm.arm.id_regs:
            vm.arm.id_regs[enc] &= ~mask
