"""What a vCPU's registers are after a reset: KVM_ARM_VCPU_INIT, or PSCI CPU_ON (`kvm_reset_vcpu`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.abi import sysregs as sr
from kvm2.softkvm import features as feat
from kvm2.softkvm import sysregs_cache, sysregs_id, sysregs_pmu
from kvm2.softkvm.cpu.state import RESET_PSTATE, SPSR_EL1
from kvm2.softkvm.sysregs_table import UNKNOWN, SysReg, table

if TYPE_CHECKING:
    from kvm2.softkvm.vcpu import Vcpu

RESET_PSTATE_SVC = 0x1D3  # AArch32 supervisor mode with A, I and F masked
PSTATE_AA32, PSTATE_T, PSTATE_E = 1 << 4, 1 << 5, 1 << 9
SCTLR_EE = 1 << 25
MPIDR_RES1 = 1 << 31


def mpidr(vcpu_id: int) -> int:
    """reset_mpidr: 16 vCPUs to a cluster, as a GICv3 addresses them.

    >>> hex(mpidr(0x1234))
    '0x80012304'
    """
    return MPIDR_RES1 | vcpu_id & 0xF | (vcpu_id >> 4 & 0xFF) << 8 | (vcpu_id >> 12 & 0xFF) << 16


def reset_core(vcpu: Vcpu) -> None:
    """General and SIMD registers. SP_EL1, ELR_EL1 and SPSR_EL1 keep their values, as in the kernel."""
    state = vcpu.state
    state.x[:] = [0] * len(state.x)
    state.sp_el0 = state.pc = state.fpsr = state.fpcr = 0
    state.pstate = RESET_PSTATE_SVC if vcpu.features & feat.EL1_32BIT else RESET_PSTATE
    state.spsr[:] = [state.spsr[SPSR_EL1], 0, 0, 0, 0]
    state.v[:] = [bytes(len(state.v[0]))] * len(state.v)
    state.p[:] = [bytes(len(state.p[0]))] * len(state.p)
    state.ffr = bytes(len(state.ffr))


def _is_vcpu_id(enc: int) -> bool:
    """is_vcpu_ftr_id_reg: registers that describe the vCPU, reset only once."""
    op1, crn, crm = enc >> 11 & 7, enc >> 7 & 15, enc >> 3 & 15
    return enc >> 14 == 3 and op1 in (0, 1, 3) and crn == 0 and crm <= 7


def reset_sys(vcpu: Vcpu) -> None:
    """kvm_reset_sys_regs: ID registers once for the VM, identification registers once for the vCPU, the rest always."""
    vm, state = vcpu.vm, vcpu.state.sys
    fixed = sysregs_id.fixed(vm)
    first = not vm.arm.id_regs
    for reg in table(vm.profile.kernel).values():
        if reg.reset == "-" or reg.user == "-":
            continue
        if reg.reset == "id":
            if first and not fixed:
                vm.arm.id_regs[reg.enc] = sysregs_id.reset_value(vcpu, reg)
        elif fixed or not vcpu.initialized or not _is_vcpu_id(reg.enc):
            state[reg.store] = _value(vcpu, reg)
    vcpu.timers.reset()
    state.setdefault(sr.CNTV_CVAL_EL0, 0)
    state.setdefault(sr.CNTP_CVAL_EL0, 0)


def _value(vcpu: Vcpu, reg: SysReg) -> int:
    rule = reg.reset
    if rule == "unknown":
        return UNKNOWN
    if rule == "host":
        return vcpu.vm.arm.host_register(reg.enc)
    if rule == "mpidr":
        return mpidr(vcpu.vcpu_id)
    if rule == "clidr":
        return sysregs_cache.clidr(vcpu.vm.arm.host_register(sr.CTR_EL0), vcpu.vm.arm.mte)
    if rule == "pmu":
        return UNKNOWN & (1 << sysregs_pmu.CYCLE | (1 << sysregs_pmu.counters(vcpu)) - 1)
    if rule == "pmevcntr":
        return UNKNOWN & 0xFFFFFFFF
    if rule == "pmevtyper":
        return UNKNOWN & sysregs_pmu.evtyper_mask(vcpu) if vcpu.features & feat.PMU else 0
    if rule == "pmselr":
        return UNKNOWN & sysregs_pmu.SEL_MASK
    if rule == "pmcr":
        return sysregs_pmu.pmcr_reset(vcpu)
    return int(rule, 16)


def apply_power_on(vcpu: Vcpu, pc: int, x0: int, big_endian: bool) -> None:
    """What PSCI CPU_ON asked for, on top of the reset: entry point, context, byte order of the caller."""
    state = vcpu.state
    aarch32 = bool(state.pstate & PSTATE_AA32)
    if aarch32 and pc & 1:
        pc &= ~1
        state.pstate |= PSTATE_T
    if big_endian and aarch32:
        state.pstate |= PSTATE_E
    elif big_endian:
        state.sys[sr.SCTLR_EL1] = state.sys.get(sr.SCTLR_EL1, 0) | SCTLR_EE
    state.pc, state.x[0] = pc, x0
