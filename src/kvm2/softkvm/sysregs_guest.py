"""Trapped accesses of the guest to system registers: what it reads, what a write does, what is undefined.

After the `access` handlers of arch/arm64/kvm/sys_regs.c. A register that is not in the table, or that the vCPU has not,
is an undefined instruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.abi import sysregs as sr
from kvm2.softkvm import guest_ids, registers_sys, sysregs_cache, sysregs_id, sysregs_pmu
from kvm2.softkvm.sysregs_table import SysReg, invariants, table
from kvm2.softkvm.timers import PHYSICAL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvm2.softkvm.vcpu import Vcpu

U32 = 0xFFFFFFFF
OSLAR_OSLK, OSLSR_OSLK = 1, 2
LO_LSB, MODE_MASK, TCRX = 16, 0xF, 0xF
DATA_CACHE_GEOMETRY = ((1 << 28) - 1) & ~7

# DC ISW, CSW, CISW (and their tag variants with MTE): set/way maintenance is accepted and does nothing.
_SET_WAY: Final = {1 << 14 | 7 << 7 | crm << 3 | op2: op2 != 2 for crm in (6, 10, 14) for op2 in (2, 4, 6)}


def access(vcpu: Vcpu, enc: int, write: bool, value: int) -> int | None:
    """A trapped MRS, MSR or system instruction. The value read; 0 after a write; None where it is undefined."""
    if enc in _SET_WAY:
        return 0 if write and (not _SET_WAY[enc] or vcpu.vm.arm.mte) else None
    kernel = vcpu.vm.profile.kernel
    reg = table(kernel).get(enc)
    if reg is None:
        return None if write or enc not in invariants(kernel) else vcpu.vm.arm.host_register(enc)
    if registers_sys.hidden(vcpu, reg):
        return None
    return HANDLERS[reg.access](vcpu, reg, write, value)


def _undefined(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    return None


def _raz_wi(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    return 0


def _plain(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if write:
        vcpu.state.sys[reg.store] = value
        return 0
    return vcpu.state.sys.get(reg.store, 0)


def _id(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if write:
        return None
    vm = vcpu.vm
    found = sysregs_cache.hardware_ctr(vcpu) if reg.enc == sr.CTR_EL0 and sysregs_id.fixed(vm) else None
    if found is None:
        found = sysregs_id.read(vcpu, reg)
    return found if vm.guest_ids == guest_ids.PROFILE else guest_ids.lower(reg.enc, found, vm.core_model(vcpu))


def _host_read_only(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    return 0 if write else vcpu.vm.arm.host_register(reg.enc)


def _actlr(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    return 0 if write else vcpu.state.sys.get(reg.store, 0)


def _oslar(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if not write:
        return None
    state = vcpu.state.sys
    lock = OSLSR_OSLK if value & OSLAR_OSLK else 0
    state[sr.OSLSR_EL1] = state.get(sr.OSLSR_EL1, 0) & ~OSLSR_OSLK | lock
    return 0


def _read_only(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    return None if write else vcpu.state.sys.get(reg.store, 0)


def _clidr(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if write:
        return None
    return vcpu.state.sys.get(reg.enc, 0) if sysregs_cache.fabricated(vcpu) else vcpu.vm.arm.host_register(reg.enc)


def _ccsidr(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if write:
        return None
    csselr = vcpu.state.sys.get(sr.CSSELR_EL1, 0) & 0xF
    if csselr >= sysregs_cache.CSSELR_MAX:
        return 0
    found = sysregs_cache.ccsidr(vcpu, csselr)
    hide = not sysregs_cache.fabricated(vcpu) and not csselr & sysregs_cache.IND
    return found & ~DATA_CACHE_GEOMETRY if hide else found


def _tcr2(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    has_tcr2 = vcpu.vm.arm.id_regs.get(sr.ID_AA64MMFR3_EL1, 0) & TCRX
    return _plain(vcpu, reg, write, value) if has_tcr2 else None


def _limited_ordering(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    mmfr1 = sysregs_id.read(vcpu, table(vcpu.vm.profile.kernel)[sr.ID_AA64MMFR1_EL1])
    if not mmfr1 >> LO_LSB & 0xF or (write and reg.enc == sr.LORID_EL1):
        return None
    return 0


def _sgi(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    return 0 if write and vcpu.vm.irqchip == "v3" else None


def _sre(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    """Without a vGIC the host's own register shows, where it has a GICv3: nothing traps it."""
    if vcpu.vm.irqchip == "v2" or "v3" not in vcpu.vm.profile.gic:
        return None
    return 0 if write else 7  # SRE, DFB, DIB: system registers only, no bypass


def _timer(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    """The physical timer; CNTPCT_EL0 cannot be written."""
    timer = vcpu.timers[PHYSICAL]
    if reg.enc in (sr.CNTPCT_EL0, sr.CNTPCTSS_EL0):
        return None if write else timer.count()
    name = _TIMER_REGISTERS[reg.enc]
    if not write:
        return int(getattr(timer, name))
    setattr(timer, name, value)
    return 0


_TIMER_REGISTERS: Final = {sr.CNTP_TVAL_EL0: "value", sr.CNTP_CTL_EL0: "control", sr.CNTP_CVAL_EL0: "compare"}


def _pmu_closed(vcpu: Vcpu, flags: int) -> bool:
    """check_pmu_access_disabled: EL0 has what PMUSERENR_EL0 opens."""
    privileged = bool(vcpu.state.pstate & MODE_MASK)
    return not privileged and not vcpu.state.sys.get(sr.PMUSERENR_EL0, 0) & flags


def _pmcr(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if _pmu_closed(vcpu, sysregs_pmu.USERENR_EN):
        return None
    current = sysregs_pmu.pmcr(vcpu)
    if not write:
        return current & ~(sysregs_pmu.PMCR_P | sysregs_pmu.PMCR_C)
    new = current & ~sysregs_pmu.PMCR_MASK | value & sysregs_pmu.PMCR_MASK
    if not vcpu.vm.arm.has_aarch32_el0():
        new |= sysregs_pmu.PMCR_LC
    sysregs_pmu.handle_pmcr(vcpu, new)
    return 0


def _pm_set_clear(flags: int, set_bit: Callable[[int], int]) -> Callable[[Vcpu, SysReg, bool, int], int | None]:
    """PMCNTEN, PMINTEN, PMOVS: a SET and a CLR register over one value."""

    def handler(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
        if _pmu_closed(vcpu, flags):
            return None
        current = vcpu.state.sys.get(reg.store, 0)
        if not write:
            return current
        value &= sysregs_pmu.counter_mask(vcpu)
        vcpu.state.sys[reg.store] = current | value if set_bit(reg.enc) else current & ~value
        return 0

    return handler


def _pmswinc(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if not write or _pmu_closed(vcpu, sysregs_pmu.USERENR_SW | sysregs_pmu.USERENR_EN):
        return None
    sysregs_pmu.software_increment(vcpu, value & sysregs_pmu.counter_mask(vcpu))
    return 0


def _pmselr(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if _pmu_closed(vcpu, sysregs_pmu.USERENR_ER | sysregs_pmu.USERENR_EN):
        return None
    found = _plain(vcpu, reg, write, value)
    return found if found is None else found & sysregs_pmu.SEL_MASK


def _pmceid(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if write or _pmu_closed(vcpu, sysregs_pmu.USERENR_EN):
        return None
    return sysregs_pmu.pmceid(vcpu, second=reg.enc == sr.PMCEID1_EL0)


def _selected(vcpu: Vcpu, reg: SysReg) -> int | None:
    """The counter that a register is about; None for one that the guest has not."""
    if reg.enc in (sr.PMXEVCNTR_EL0, sr.PMXEVTYPER_EL0):
        number = vcpu.state.sys.get(sr.PMSELR_EL0, 0) & sysregs_pmu.SEL_MASK
    else:
        number = sysregs_pmu.index(reg.enc)
    return number if sysregs_pmu.counter_mask(vcpu) >> number & 1 else None


def _pmevcntr(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    own = sysregs_pmu.USERENR_CR if reg.enc == sr.PMCCNTR_EL0 else sysregs_pmu.USERENR_ER
    number = _selected(vcpu, reg)
    if number is None or _pmu_closed(vcpu, own | sysregs_pmu.USERENR_EN):
        return None
    if not write:
        return sysregs_pmu.counter(vcpu, number)
    if _pmu_closed(vcpu, sysregs_pmu.USERENR_EN):
        return None
    vcpu.state.sys[sysregs_pmu.counter_register(number)] = value
    return 0


def _pmevtyper(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    number = _selected(vcpu, reg)
    if number is None or _pmu_closed(vcpu, sysregs_pmu.USERENR_EN):
        return None
    enc = sysregs_pmu.type_register(number)
    if not write:
        return vcpu.state.sys.get(enc, 0)
    vcpu.state.sys[enc] = value & sysregs_pmu.evtyper_mask(vcpu)
    return 0


def _pmuserenr(vcpu: Vcpu, reg: SysReg, write: bool, value: int) -> int | None:
    if not write:
        return vcpu.state.sys.get(reg.enc, 0) & sysregs_pmu.USERENR_MASK
    if not vcpu.state.pstate & MODE_MASK:
        return None
    vcpu.state.sys[reg.enc] = value & sysregs_pmu.USERENR_MASK
    return 0


HANDLERS: Final[Mapping[str, Callable[[Vcpu, SysReg, bool, int], int | None]]] = {
    "rw": _plain,
    "raz": _raz_wi,
    "undef": _undefined,
    "id": _id,
    "hostro": _host_read_only,
    "actlr": _actlr,
    "oslar": _oslar,
    "oslsr": _read_only,
    "clidr": _clidr,
    "ccsidr": _ccsidr,
    "tcr2": _tcr2,
    "lor": _limited_ordering,
    "sgi": _sgi,
    "sre": _sre,
    "timer": _timer,
    "pmcr": _pmcr,
    "pmcnten": _pm_set_clear(sysregs_pmu.USERENR_EN, lambda enc: enc & 1),
    "pminten": _pm_set_clear(0, lambda enc: enc & 1),
    "pmovs": _pm_set_clear(sysregs_pmu.USERENR_EN, lambda enc: enc >> 3 & 2),
    "pmswinc": _pmswinc,
    "pmselr": _pmselr,
    "pmceid": _pmceid,
    "pmevcntr": _pmevcntr,
    "pmevtyper": _pmevtyper,
    "pmuserenr": _pmuserenr,
}
