"""Registers and fields that describe a host: names, encodings, and reading and changing one field.

>>> hex(encoding("ID_AA64MMFR0_EL1")), encoding("S3_0_C0_C7_0") == encoding("ID_AA64MMFR0_EL1")
('0xc038', True)
>>> field_of({encoding("ID_AA64MMFR0_EL1"): 0x1125}, "ID_AA64MMFR0_EL1", 0)
5
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.abi.sysregs import by_name

if TYPE_CHECKING:
    from collections.abc import Mapping

MIDR = "MIDR_EL1"
CTR = "CTR_EL0"
PFR0, PFR1 = "ID_AA64PFR0_EL1", "ID_AA64PFR1_EL1"
DFR0 = "ID_AA64DFR0_EL1"
ISAR0, ISAR1, ISAR2 = "ID_AA64ISAR0_EL1", "ID_AA64ISAR1_EL1", "ID_AA64ISAR2_EL1"
MMFR0, MMFR1, MMFR2 = "ID_AA64MMFR0_EL1", "ID_AA64MMFR1_EL1", "ID_AA64MMFR2_EL1"
ZFR0 = "ID_AA64ZFR0_EL1"
AA32_PFR1, AA32_DFR0 = "ID_PFR1_EL1", "ID_DFR0_EL1"

encoding = by_name


_OF_A_VCPU = frozenset(map(by_name, ("MPIDR_EL1", "CSSELR_EL1")))
# ACTLR_EL1 and AMAIR_EL1 reset to the machine's values (reset_actlr, reset_amair_el1).
_OTHERS = frozenset(map(by_name, ("PMCR_EL0", "PMCEID0_EL0", "PMCEID1_EL0", "CNTFRQ_EL0", "ACTLR_EL1", "AMAIR_EL1")))


def is_described(enc: int) -> bool:
    """Whether a host file may state this register: those with CRn = 0, without those of each vCPU, and a few.

    >>> is_described(encoding("CTR_EL0")), is_described(encoding("SCTLR_EL1")), is_described(encoding("MPIDR_EL1"))
    (True, False, False)
    """
    return (enc >> 14 == 3 and enc >> 7 & 15 == 0 and enc not in _OF_A_VCPU) or enc in _OTHERS


def field_of(registers: Mapping[int, int], name: str, lsb: int, width: int = 4) -> int:
    """One unsigned field of a register; a register that is not described reads as zero."""
    return registers.get(encoding(name), 0) >> lsb & (1 << width) - 1


def with_field(registers: dict[int, int], name: str, lsb: int, value: int, width: int = 4) -> None:
    """Sets one field in place."""
    enc = encoding(name)
    mask = (1 << width) - 1 << lsb
    registers[enc] = registers.get(enc, 0) & ~mask | value << lsb & mask
