"""PMU registers: how many counters, what resets to what, what userspace and the guest can write.

After arch/arm64/kvm/pmu-emul.c and the PMU part of sys_regs.c. Counters hold what is written to them; the software KVM
counts no events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.abi import sysregs as sr
from kvm2.softkvm import features as feat

if TYPE_CHECKING:
    from kvm2.softkvm.sysregs_table import SysReg
    from kvm2.softkvm.vcpu import Vcpu

CYCLE: Final = 31
PMCR_E, PMCR_P, PMCR_C, PMCR_LC, PMCR_LP, PMCR_MASK = 1, 2, 4, 1 << 6, 1 << 7, 0xFF
PMCR_N = 0x1F << 11
USERENR_EN, USERENR_SW, USERENR_CR, USERENR_ER, USERENR_MASK = 1, 2, 4, 8, 15
SEL_MASK = 0x1F
EXCLUDE_EL1_EL0, INCLUDE_EL2, EL3_FILTERS = 3 << 30, 1 << 27, 1 << 28 | 1 << 29 | 1 << 26
OLD_EVTYPE_MASK = 0xC800FFFF  # ARMV8_PMU_EVTYPE_MASK of 6.1
OLD_PMCR_RESET = 0xDECAFBAD & PMCR_MASK & ~PMCR_E
CHAIN_EVENT = 0x1E
CHAIN, STALL_SLOTS = 1 << 0x1E, 1 << 0x3F - 32 | 1 << 0x3E - 32 | 1 << 0x3D - 32
_V3P5 = 6
_NARROW_EVENTS, _WIDE_EVENTS = 0x3FF, 0xFFFF


def old(vcpu: Vcpu) -> bool:
    """6.1's PMU: PMCR_EL0 is a plain register, counters are the host's."""
    return "fixed-id-registers" in vcpu.vm.profile.quirks


def _field(vcpu: Vcpu, enc: int, lsb: int) -> int:
    return vcpu.vm.arm.id_regs.get(enc, 0) >> lsb & 0xF


def counters(vcpu: Vcpu) -> int:
    """How many event counters the guest has."""
    return vcpu.vm.arm.host_counters() if old(vcpu) else vcpu.vm.arm.pmcr_n


def counter_mask(vcpu: Vcpu) -> int:
    """kvm_pmu_valid_counter_mask: the cycle counter and the event counters."""
    number = pmcr(vcpu) >> feat.PMCR_N_SHIFT & feat.PMCR_N_MASK
    return 1 << CYCLE | (1 << number) - 1


def event_mask(vcpu: Vcpu) -> int:
    """kvm_pmu_event_mask: event numbers have 10 bits in PMUv3, 16 from PMUv3p1 on; 0 without a PMU."""
    version = _field(vcpu, sr.ID_AA64DFR0_EL1, 8)
    return 0 if version in (0, 0xF) else _NARROW_EVENTS if version == 1 else _WIDE_EVENTS


def evtyper_mask(vcpu: Vcpu) -> int:
    """kvm_pmu_evtyper_mask: which bits of PMEVTYPER<n>_EL0 exist."""
    if old(vcpu):
        return OLD_EVTYPE_MASK
    mask = EXCLUDE_EL1_EL0 | event_mask(vcpu)
    if _field(vcpu, sr.ID_AA64PFR0_EL1, 8):
        mask |= INCLUDE_EL2
    if _field(vcpu, sr.ID_AA64PFR0_EL1, 12):
        mask |= EL3_FILTERS
    return mask


def pmcr(vcpu: Vcpu) -> int:
    """kvm_vcpu_read_pmcr: the register, with N of the VM."""
    value = vcpu.state.sys.get(sr.PMCR_EL0, 0)
    return value if old(vcpu) else value & ~PMCR_N | vcpu.vm.arm.pmcr_n << feat.PMCR_N_SHIFT


def pmcr_reset(vcpu: Vcpu) -> int:
    """reset_pmcr."""
    long_cycles = 0 if vcpu.vm.arm.has_aarch32_el0() else PMCR_LC
    if not old(vcpu):
        return long_cycles
    host = vcpu.vm.arm.host_register(sr.PMCR_EL0)
    return host & ~PMCR_MASK & 0xFFFFFFFF | OLD_PMCR_RESET | long_cycles if host else 0


def set_pmcr(vcpu: Vcpu, value: int) -> None:
    """set_pmcr: N is taken before the first run where the host has as many counters, ignored otherwise."""
    arm, wanted = vcpu.vm.arm, value >> feat.PMCR_N_SHIFT & feat.PMCR_N_MASK
    if not vcpu.vm.ran and wanted <= arm.host_counters():
        arm.pmcr_n = wanted
    value &= PMCR_MASK
    vcpu.state.sys[sr.PMCR_EL0] = value if arm.has_aarch32_el0() else value | PMCR_LC


def index(enc: int) -> int:
    """Which counter PMEVCNTR<n>, PMEVTYPER<n>, PMCCNTR or PMCCFILTR is about."""
    crn, crm, op2 = enc >> 7 & 15, enc >> 3 & 15, enc & 7
    return CYCLE if crn == 9 else (crm & 3) << 3 | op2


def counter(vcpu: Vcpu, number: int) -> int:
    """kvm_pmu_get_counter_value: event counters have 32 bits before PMUv3p5."""
    value = vcpu.state.sys.get(counter_register(number), 0)
    if number == CYCLE or (not old(vcpu) and _V3P5 <= _field(vcpu, sr.ID_AA64DFR0_EL1, 8) < 0xF):
        return value
    return value & 0xFFFFFFFF


def counter_register(number: int) -> int:
    """The encoding of a counter's register."""
    return sr.PMCCNTR_EL0 if number == CYCLE else sr.ARRAYS[f"PMEVCNTR{number}_EL0"]


def type_register(number: int) -> int:
    """The encoding of a counter's event type register."""
    return sr.PMCCFILTR_EL0 if number == CYCLE else sr.ARRAYS[f"PMEVTYPER{number}_EL0"]


def change_set(vcpu: Vcpu, reg: SysReg, value: int) -> None:
    """set_pmreg: SET registers set bits, CLR registers clear them; only those of counters that exist."""
    value &= counter_mask(vcpu)
    current = vcpu.state.sys.get(reg.store, 0)
    vcpu.state.sys[reg.store] = current | value if reg.user == "pmset" else current & ~value


def handle_pmcr(vcpu: Vcpu, value: int) -> None:
    """kvm_pmu_handle_pmcr: C and P reset the counters and are not kept."""
    state = vcpu.state.sys
    if old(vcpu) or not _V3P5 <= _field(vcpu, sr.ID_AA64DFR0_EL1, 8) < 0xF:
        value &= ~PMCR_LP
    state[sr.PMCR_EL0] = value & ~(PMCR_C | PMCR_P)
    if value & PMCR_C:
        state[sr.PMCCNTR_EL0] = 0
    if value & PMCR_P:
        for number in range(counters(vcpu)):
            state[counter_register(number)] = 0


def first_run(vcpu: Vcpu) -> None:
    """kvm_vcpu_reload_pmu, at a vCPU's first run: bits of counters that do not exist go."""
    if not vcpu.features & feat.PMU or old(vcpu):
        return
    mask = counter_mask(vcpu)
    handle_pmcr(vcpu, pmcr(vcpu))
    for enc in (sr.PMOVSSET_EL0, sr.PMINTENSET_EL1, sr.PMCNTENSET_EL0):
        vcpu.state.sys[enc] = vcpu.state.sys.get(enc, 0) & mask


def pmceid(vcpu: Vcpu, second: bool) -> int:
    """kvm_pmu_get_pmceid: the host's events, with CHAIN and without the STALL_SLOT events, as the filter allows."""
    host = vcpu.vm.arm.host_register(sr.PMCEID1_EL0 if second else sr.PMCEID0_EL0)
    value = host & ~STALL_SLOTS if second else host | CHAIN
    if vcpu.vm.arm.pmu_filter is None:
        return value
    base = 32 if second else 0
    mask = sum(1 << bit for bit in range(32) if allowed(vcpu, base + bit))
    if event_mask(vcpu) + 1 >= 0x4000 + base + 32:
        mask |= sum(1 << 32 + bit for bit in range(32) if allowed(vcpu, 0x4000 + base + bit))
    return value & mask


def allowed(vcpu: Vcpu, event: int) -> bool:
    """Whether the VM's filter lets the guest count an event."""
    arm = vcpu.vm.arm
    return arm.pmu_filter is None or arm.pmu_filter.get(event, arm.pmu_filter_default)


def software_increment(vcpu: Vcpu, mask: int, event: int = 0) -> None:
    """kvm_pmu_counter_increment: enabled counters of software increments (event 0) count; an overflow may chain."""
    state = vcpu.state.sys
    if not pmcr(vcpu) & PMCR_E:
        return
    mask &= state.get(sr.PMCNTENSET_EL0, 0)
    for number in range(CYCLE):
        if not mask >> number & 1 or state.get(type_register(number), 0) & event_mask(vcpu) != event:
            continue
        wide = not old(vcpu) and _V3P5 <= _field(vcpu, sr.ID_AA64DFR0_EL1, 8) < 0xF
        value = state.get(counter_register(number), 0) + 1 & ((1 << 64) - 1 if wide else 0xFFFFFFFF)
        state[counter_register(number)] = value
        long_overflow = bool(pmcr(vcpu) & PMCR_LP)
        if value if long_overflow else value & 0xFFFFFFFF:
            continue
        state[sr.PMOVSSET_EL0] = state.get(sr.PMOVSSET_EL0, 0) | 1 << number
        if not number & 1 and number + 1 < CYCLE and not long_overflow:
            software_increment(vcpu, 1 << number + 1, CHAIN_EVENT)
