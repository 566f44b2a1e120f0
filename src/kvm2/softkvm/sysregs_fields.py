"""The fields of the ID registers, and which values of a field are safe to promise to a guest.

The table is `arm64_ftr_regs` of arch/arm64/kernel/cpufeature.c in 6.12; where KVM judges a field otherwise than the
host's kernel does (`kvm_arm64_ftr_safe_value`), KVM's rule stands here.

>>> host = 0x1122                                   # ID_AA64MMFR0_EL1 of a Cortex-A53: PARange 2, TGRAN4 0
>>> mmfr0 = 0xC038
>>> first_unsafe(mmfr0, host & ~0xF, host, ~0)      # a smaller PARange is fine
>>> first_unsafe(mmfr0, host | 0xF, host, ~0)
Field(lsb=0, width=4, signed=False, rule='lower', safe=0)
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from kvm2.abi.sysregs import SYSREGS


class Field(NamedTuple):
    """One field. rule: lower, higher, nonzero-higher or exact (only `safe` when it differs from the host's)."""

    lsb: int
    width: int
    signed: bool
    rule: str
    safe: int

    @property
    def mask(self) -> int:
        """The field's bits in the register."""
        return ((1 << self.width) - 1) << self.lsb

    def value(self, register: int) -> int:
        """The field's value in a register, sign-extended where the field is signed."""
        value = register >> self.lsb & ((1 << self.width) - 1)
        return value - (1 << self.width) if self.signed and value >> (self.width - 1) else value

    def safe_value(self, new: int, limit: int) -> int:
        """`arm64_ftr_safe_value`: what two differing values have in common."""
        if self.rule == "lower":
            return min(new, limit)
        if self.rule == "exact":
            return self.safe
        if self.rule == "nonzero-higher" and not (new and limit):
            return 0
        return max(new, limit)


# The lsb of each field; suffixes: /w its width (4 where not given), s signed, eN exact with safe value N,
# h higher is safe, z higher or zero is safe. Lower is safe where nothing is said.
_FIELDS = {
    "ID_PFR0_EL1": "24 16 12 8 4 0",
    "ID_PFR1_EL1": "28 24 20 16 12 8 4 0",
    "ID_DFR0_EL1": "24 20 16 12 8 4 0",  # PerfMon: exact for the host, lower for KVM
    "ID_MMFR0_EL1": "28s 24 20 16 12 8s 4 0",
    "ID_MMFR1_EL1": "28 24 20 16 12 8 4 0",
    "ID_MMFR2_EL1": "28 24 20 16 12 8 4 0",
    "ID_MMFR3_EL1": "28 24 20 16 12 8 4 0",
    "ID_ISAR0_EL1": "24 20 16 12 8 4 0",
    "ID_ISAR1_EL1": "28 24 20 16 12 8 4 0",
    "ID_ISAR2_EL1": "28 24 20 16 12 8 4 0",
    "ID_ISAR3_EL1": "28 24 20 16 12 8 4 0",
    "ID_ISAR4_EL1": "28 24 20 16 12 8 4 0",
    "ID_ISAR5_EL1": "24 16 12 8 4 0",
    "ID_MMFR4_EL1": "28 24 20 16 12 8 4 0h",
    "ID_ISAR6_EL1": "24 20 16 12 8 4 0",
    "MVFR0_EL1": "28 24 20 16 12 8 4 0",
    "MVFR1_EL1": "28 24 20 16 12 8 4 0",
    "MVFR2_EL1": "4 0",
    "ID_PFR2_EL1": "4 0",
    "ID_DFR1_EL1": "0s",
    "ID_MMFR5_EL1": "0",
    "ID_AA64PFR0_EL1": "60 56 48 44 40 36 32 28 24 20s 16s 12 8 4 0",
    "ID_AA64PFR1_EL1": "24 16 12 8 4 0",
    "ID_AA64PFR2_EL1": "32",
    "ID_AA64ZFR0_EL1": "56 52 44 40 32 24 20 16 4 0",
    "ID_AA64FPFR0_EL1": "31/1e0 30/1e0 29/1e0 28/1e0 1/1e0 0/1e0",
    "ID_AA64DFR0_EL1": "36s 32 28 20 12 8 0",  # PMUVer, DebugVer: exact for the host, lower for KVM
    "ID_AA64DFR1_EL1": "",
    "ID_AA64ISAR0_EL1": "60 56 52 48 44 40 36 32 28 20 16 12 8 4",
    "ID_AA64ISAR1_EL1": "56 52 48 44 40 36 32 28 24 20 16 12 8e0 4e0 0",
    "ID_AA64ISAR2_EL1": "56 52 48 28 20 16 12e0 8 4 0",
    "ID_AA64MMFR0_EL1": "60 56 44 40e1 36e1 32e1 28s 24s 20 16 12 8 4 0",
    "ID_AA64MMFR1_EL1": "60 52 44 40 36 32 28 24h 20 16 12 8 4 0",
    "ID_AA64MMFR2_EL1": "60 56 52 48 40 36 32 28 24 20 16 12 8 4 0",
    "ID_AA64MMFR3_EL1": "16 8 0",
    "ID_AA64MMFR4_EL1": "24s",
    "CTR_EL0": "31/1e1 29/1 28/1 24z 20z 16 14/2e2 0",
}

_RULES = {"h": "higher", "z": "nonzero-higher"}


def _field(text: str) -> Field:
    body, exact, safe = text.partition("e")
    signed = body.endswith("s")
    rule = "exact" if exact else _RULES.get(body[-1], "lower")
    lsb, _, width = body.rstrip("shz").partition("/")
    return Field(int(lsb), int(width or 4), signed, rule, int(safe or 0))


@cache
def fields(enc: int) -> tuple[Field, ...] | None:
    """The fields of an ID register; None for a register that the kernel does not describe."""
    for name, text in _FIELDS.items():
        if SYSREGS[name] == enc:
            return tuple(_field(word) for word in text.split())
    return None


@cache
def known_bits(enc: int) -> int:
    """The bits of all fields that the kernel knows: the others read as zero."""
    return sum(field.mask for field in fields(enc) or ())


def first_unsafe(enc: int, value: int, limit: int, writable: int) -> Field | None:
    """The first field whose `value` promises more than `limit` (`arm64_check_features`); None: the value is safe.

    Fields outside `writable` and bits of no field must equal the limit; those are reported as one 64-bit field.
    """
    covered = 0
    for field in fields(enc) or ():
        if field.mask & ~writable:
            continue
        covered |= field.mask
        new, allowed = field.value(value), field.value(limit)
        if new != allowed and field.safe_value(new, allowed) != new:
            return field
    if (value ^ limit) & ~covered & (1 << 64) - 1:
        return Field(0, 64, False, "exact", limit)
    return None
