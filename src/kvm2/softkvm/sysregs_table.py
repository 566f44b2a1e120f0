"""KVM's table of system registers, as data: `sys_reg_descs` of arch/arm64/kvm/sys_regs.c (6.12), and what 6.1 has else.

One line a register: name, what a trapped guest access does, what userspace can do with it (KVM_GET/SET_ONE_REG), the
value it resets to, when it is there at all. `NAME<n>` stands for n registers. Registers of EL2 are left out: they are
hidden unless the vCPU has HAS_EL2, which these kernels do not offer.

>>> sctlr = table("6.12")[0xC080]
>>> sctlr.name, sctlr.user, hex(int(sctlr.reset, 16))
('SCTLR_EL1', 'plain', '0xc50078')
>>> len(table("6.12")) > len(table("6.1"))
True
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi import sysregs
from kvm2.abi.sysregs import SYSREGS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

UNKNOWN = 0x1DE7EC7EDBADC0DE  # what KVM resets registers to whose architectural reset value is UNKNOWN


class SysReg(NamedTuple):
    """One register. `store` is the encoding under which its value is kept: SET and CLR registers share one.

    access: rw, raz (reads zero, ignores writes), undef, id, or the name of a handler in `sysregs_guest`.
    user: plain, id, "-" (not accessible), or the name of a rule in `registers_sys`.
    reset: hexadecimal, unknown, host (the host's value), "-" (not reset), or the name of a rule in `sysregs_reset`.
    visible: "-" (always), raz, or the feature without which it is hidden (or, for aa32 and zfr0, reads as zero).
    """

    enc: int
    name: str
    access: str
    user: str
    reset: str
    visible: str
    store: int


_TABLE = """
DBGBVR<16>_EL1       rw        plain  0
DBGBCR<16>_EL1       rw        plain  0
DBGWVR<16>_EL1       rw        plain  0
DBGWCR<16>_EL1       rw        plain  0
MDCCINT_EL1          rw        plain  0
MDSCR_EL1            rw        plain  0
MDRAR_EL1            raz
OSLAR_EL1            oslar
OSLSR_EL1            oslsr     oslsr  8
OSDLR_EL1            raz
DBGPRCR_EL1          raz
DBGCLAIMSET_EL1      raz
DBGCLAIMCLR_EL1      raz
DBGAUTHSTATUS_EL1    hostro
MDCCSR_EL0           raz
DBGDTR_EL0           raz
DBGDTRTX_EL0         raz
DBGVCR32_EL2         undef     plain  0
MPIDR_EL1            rw        plain  mpidr
SCTLR_EL1            rw        plain  C50078
ACTLR_EL1            actlr     plain  host
CPACR_EL1            rw        plain  0
RGSR_EL1             undef     plain  unknown    mte
GCR_EL1              undef     plain  unknown    mte
ZCR_EL1              rw        plain  0          sve
TRFCR_EL1            undef
SMPRI_EL1            undef
SMCR_EL1             undef
TTBR0_EL1            rw        plain  unknown
TTBR1_EL1            rw        plain  unknown
TCR_EL1              rw        plain  0
TCR2_EL1             tcr2      plain  0
APIAKEYLO_EL1        undef     plain  unknown    ptrauth
APIAKEYHI_EL1        undef     plain  unknown    ptrauth
APIBKEYLO_EL1        undef     plain  unknown    ptrauth
APIBKEYHI_EL1        undef     plain  unknown    ptrauth
APDAKEYLO_EL1        undef     plain  unknown    ptrauth
APDAKEYHI_EL1        undef     plain  unknown    ptrauth
APDBKEYLO_EL1        undef     plain  unknown    ptrauth
APDBKEYHI_EL1        undef     plain  unknown    ptrauth
APGAKEYLO_EL1        undef     plain  unknown    ptrauth
APGAKEYHI_EL1        undef     plain  unknown    ptrauth
ICC_PMR_EL1          undef
AFSR0_EL1            rw        plain  unknown
AFSR1_EL1            rw        plain  unknown
ESR_EL1              rw        plain  unknown
ERRIDR_EL1           raz
ERRSELR_EL1          raz
ERXFR_EL1            raz
ERXCTLR_EL1          raz
ERXSTATUS_EL1        raz
ERXADDR_EL1          raz
ERXMISC0_EL1         raz
ERXMISC1_EL1         raz
TFSR_EL1             undef     plain  unknown    mte
TFSRE0_EL1           undef     plain  unknown    mte
FAR_EL1              rw        plain  unknown
PAR_EL1              rw        plain  unknown
PMSCR_EL1            undef
PMSNEVFR_EL1         undef
PMSICR_EL1           undef
PMSIRR_EL1           undef
PMSFCR_EL1           undef
PMSEVFR_EL1          undef
PMSLATFR_EL1         undef
PMSIDR_EL1           undef
PMBLIMITR_EL1        undef
PMBPTR_EL1           undef
PMBSR_EL1            undef
PMINTENSET_EL1       pminten   pmset  pmu        pmu
PMINTENCLR_EL1       pminten   pmclr  pmu        pmu  PMINTENSET_EL1
PMMIR_EL1            raz
MAIR_EL1             rw        plain  unknown
PIRE0_EL1            rw        plain  unknown
PIR_EL1              rw        plain  unknown
POR_EL1              rw        plain  unknown    s1poe
AMAIR_EL1            rw        plain  host
LORSA_EL1            lor
LOREA_EL1            lor
LORN_EL1             lor
LORC_EL1             lor
LORID_EL1            lor
VBAR_EL1             rw        plain  0
DISR_EL1             rw        plain  0
ICC_IAR0_EL1         undef
ICC_EOIR0_EL1        undef
ICC_HPPIR0_EL1       undef
ICC_BPR0_EL1         undef
ICC_AP0R<4>_EL1      undef
ICC_AP1R<4>_EL1      undef
ICC_DIR_EL1          undef
ICC_RPR_EL1          undef
ICC_SGI1R_EL1        sgi
ICC_ASGI1R_EL1       sgi
ICC_SGI0R_EL1        sgi
ICC_IAR1_EL1         undef
ICC_EOIR1_EL1        undef
ICC_HPPIR1_EL1       undef
ICC_BPR1_EL1         undef
ICC_CTLR_EL1         undef
ICC_SRE_EL1          sre
ICC_IGRPEN0_EL1      undef
ICC_IGRPEN1_EL1      undef
CONTEXTIDR_EL1       rw        plain  0
TPIDR_EL1            rw        plain  unknown
ACCDATA_EL1          undef
SCXTNUM_EL1          undef
CNTKCTL_EL1          rw        plain  0
CCSIDR_EL1           ccsidr
CLIDR_EL1            clidr     clidr  clidr
CCSIDR2_EL1          undef
SMIDR_EL1            undef
CSSELR_EL1           rw        plain  unknown
CTR_EL0              id        id     id
SVCR                 undef     plain  0          sme
FPMR                 undef     plain  0          fpmr
PMCR_EL0             pmcr      pmcr   pmcr       pmu
PMCNTENSET_EL0       pmcnten   pmset  pmu        pmu
PMCNTENCLR_EL0       pmcnten   pmclr  pmu        pmu  PMCNTENSET_EL0
PMOVSCLR_EL0         pmovs     pmclr  pmu        pmu  PMOVSSET_EL0
PMSWINC_EL0          pmswinc   razwi  -          pmu
PMSELR_EL0           pmselr    plain  pmselr     pmu
PMCEID0_EL0          pmceid    -      -          pmu
PMCEID1_EL0          pmceid    -      -          pmu
PMCCNTR_EL0          pmevcntr  count  unknown    pmu
PMXEVTYPER_EL0       pmevtyper -      -          pmu
PMXEVCNTR_EL0        pmevcntr  -      -          pmu
PMUSERENR_EL0        pmuserenr plain  0          pmu
PMOVSSET_EL0         pmovs     pmset  pmu        pmu
POR_EL0              rw        plain  unknown    s1poe
TPIDR_EL0            rw        plain  unknown
TPIDRRO_EL0          rw        plain  unknown
TPIDR2_EL0           undef
SCXTNUM_EL0          undef
AMCR_EL0             undef
AMCFGR_EL0           undef
AMCGCR_EL0           undef
AMUSERENR_EL0        undef
AMCNTENCLR0_EL0      undef
AMCNTENSET0_EL0      undef
AMCNTENCLR1_EL0      undef
AMCNTENSET1_EL0      undef
AMEVCNTR0<16>_EL0    undef
AMEVTYPER0<16>_EL0   undef
AMEVCNTR1<16>_EL0    undef
AMEVTYPER1<16>_EL0   undef
CNTPCT_EL0           timer
CNTPCTSS_EL0         timer
CNTP_TVAL_EL0        timer
CNTP_CTL_EL0         timer
CNTP_CVAL_EL0        timer
PMEVCNTR<31>_EL0     pmevcntr  count  pmevcntr   pmu
PMEVTYPER<31>_EL0    pmevtyper plain  pmevtyper  pmu
PMCCFILTR_EL0        pmevtyper plain  0          pmu
DACR32_EL2           undef     plain  unknown
IFSR32_EL2           undef     plain  unknown
FPEXC32_EL2          undef     plain  700
"""

# ID registers that KVM keeps from guests: they read as zero, like those that are not allocated.
_HIDDEN_IDS = frozenset(
    SYSREGS[name] for name in ("ID_AFR0_EL1", "ID_DFR1_EL1", "ID_AA64SMFR0_EL1", "ID_AA64AFR0_EL1", "ID_AA64AFR1_EL1")
)
_ALLOCATED = frozenset(SYSREGS.values())

# Linux 6.1: these do not exist yet, and these have other rules for userspace.
_ABSENT = {
    "6.1": {
        "TCR2_EL1",
        "PIRE0_EL1",
        "PIR_EL1",
        "POR_EL1",
        "POR_EL0",
        "FPMR",
        "ACCDATA_EL1",
        "CNTPCT_EL0",
        "CNTPCTSS_EL0",
    }
}
_USER = {
    "6.1": {
        "CLIDR_EL1": "-",
        "CTR_EL0": "-",
        "SVCR": "-",
        "PMCR_EL0": "plain",
        "PMINTENSET_EL1": "plain",
        "PMINTENCLR_EL1": "plain",
        "PMCNTENSET_EL0": "plain",
        "PMCNTENCLR_EL0": "plain",
        "PMOVSSET_EL0": "plain",
        "PMOVSCLR_EL0": "plain",
    }
}

# Registers whose value is the machine's and cannot be changed, in the order in which KVM_GET_REG_LIST has them.
_INVARIANT = {"6.1": ("MIDR_EL1", "REVIDR_EL1", "CLIDR_EL1", "AIDR_EL1", "CTR_EL0")}
_INVARIANT_NOW = ("MIDR_EL1", "REVIDR_EL1", "AIDR_EL1")


def _expand(name: str) -> Iterator[str]:
    head, bracket, tail = name.partition("<")
    if not bracket:
        yield name
        return
    count, _, rest = tail.partition(">")
    for number in range(int(count)):
        yield f"{head}{number}{rest}"


def _rows() -> Iterator[SysReg]:
    for line in _TABLE.strip().splitlines():
        words = line.split()
        access, user, reset, visible, store = (words[1:] + ["-"] * 5)[:5]
        for name in _expand(words[0]):
            enc = SYSREGS[name]
            yield SysReg(enc, name, access, user, reset, visible, enc if store == "-" else SYSREGS[store])
    for enc in sysregs.ID_SPACE:
        crm = enc >> 3 & 15
        if enc in _HIDDEN_IDS or enc not in _ALLOCATED:
            visible = "raz"
        elif crm <= 3:
            visible = "aa32"
        else:
            visible = "zfr0" if enc == sysregs.ID_AA64ZFR0_EL1 else "-"
        yield SysReg(enc, sysregs.name_of(enc), "id", "id", "id", visible, enc)


@cache
def table(kernel: str) -> Mapping[int, SysReg]:
    """Encoding -> register of that kernel's KVM, in ascending order, as KVM_GET_REG_LIST has them."""
    absent, user = _ABSENT.get(kernel, set()), _USER.get(kernel, {})
    rows = [row._replace(user=user.get(row.name, row.user)) for row in _rows() if row.name not in absent]
    return {row.enc: row for row in sorted(rows, key=lambda row: row.enc)}


@cache
def invariants(kernel: str) -> tuple[int, ...]:
    """Encodings of the registers that userspace can only write back as they are."""
    return tuple(SYSREGS[name] for name in _INVARIANT.get(kernel, _INVARIANT_NOW))
