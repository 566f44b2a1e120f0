"""Stage-1 translation of VMSAv8-64 in Python, for guests whose addresses the emulator's own walker does not reach.

The Arm ARM's `AArch64.S1Walk`: 4K, 16K and 64K granules, both halves, 52-bit output with 64K granules and with
TCR_EL1.DS (LPA2), hierarchical permissions, PAN, WXN, hardware updates of the access flag and the dirty state. Physical
addresses here are IPAs; reading a descriptor goes through stage 2 and may fault there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

READ, WRITE, FETCH = 1, 2, 4  # as bits: also the permissions of a translation

ADDRESS_SIZE, TRANSLATION, ACCESS_FLAG, PERMISSION = 0x00, 0x04, 0x08, 0x0C  # fault status, to be or-ed with the level
_LEVEL_MINUS_1: Final = {ADDRESS_SIZE: 0x29, TRANSLATION: 0x2B}

SCTLR_M, SCTLR_WXN, SCTLR_EE = 1 << 0, 1 << 19, 1 << 25
TCR_HA, TCR_HD, TCR_DS = 1 << 39, 1 << 40, 1 << 59
_TG0: Final = {0: 12, 1: 16, 2: 14}
_TG1: Final = {1: 14, 2: 12, 3: 16}
_IPS: Final = (32, 36, 40, 42, 44, 48, 52, 56)
_AF, _DBM, _AP_READ_ONLY, _AP_EL0, _PXN, _UXN = 1 << 10, 1 << 51, 1 << 7, 1 << 6, 1 << 53, 1 << 54
_TABLE_PXN, _TABLE_UXN, _TABLE_AP_EL0, _TABLE_READ_ONLY = 1 << 59, 1 << 60, 1 << 61, 1 << 62
_FIRST_BLOCK: Final = {12: 1, 14: 2, 16: 2}  # the level of the largest blocks; one less where outputs have 52 bits


@dataclass(frozen=True)
class Regime:
    """The registers that a walk depends on."""

    sctlr: int
    tcr: int
    ttbr0: int
    ttbr1: int
    pa_bits: int = 52


@dataclass(frozen=True)
class Access:
    """One access: kind, and whether EL0's permissions count (EL0 itself, or LDTR and STTR)."""

    kind: int
    unprivileged: bool
    pan: bool = False


@dataclass(frozen=True)
class Translation:
    """The IPA of the address itself, and what may be done there."""

    ipa: int
    permissions: int
    level: int


class WalkFault(Exception):
    """A fault of stage 1 (`ipa` None), or of stage 2 while reading a descriptor at `ipa` (S1PTW)."""

    def __init__(self, status: int, ipa: int | None = None, write: bool = False) -> None:
        super().__init__(f"fault status {status:#x}")
        self.status, self.ipa, self.write = status, ipa, write


# (ipa, write) -> the descriptor there; with `value` set, writes it and returns it. May raise WalkFault with an ipa.
Memory = Callable[[int, int | None], int]


def fault(kind: int, level: int) -> WalkFault:
    """A stage-1 fault at a level (-1 to 3)."""
    return WalkFault(_LEVEL_MINUS_1.get(kind, kind) if level < 0 else kind | level)


@dataclass(frozen=True)
class _Half:
    """One half of the address space: TTBR0's or TTBR1's."""

    shift: int
    size_bits: int
    root: int
    enabled: bool
    hierarchical: bool


def _half(regime: Regime, va: int) -> _Half:
    tcr, upper = regime.tcr, bool(va >> 55 & 1)
    if upper:
        shift, tsz, disabled, hpd = _TG1.get(tcr >> 30 & 3, 12), tcr >> 16 & 63, tcr >> 23 & 1, tcr >> 42 & 1
    else:
        shift, tsz, disabled, hpd = _TG0.get(tcr >> 14 & 3, 12), tcr & 63, tcr >> 7 & 1, tcr >> 41 & 1
    ttbr = regime.ttbr1 if upper else regime.ttbr0
    tbi = tcr >> (38 if upper else 37) & 1
    large = shift == 16 or bool(tcr & TCR_DS)
    # Outside the implemented range the size is treated as the nearest one.
    bits = 64 - min(max(tsz, 12 if large else 16), 39)
    top = va & ((1 << (56 if tbi else 64)) - 1)
    expected = ((1 << (56 if tbi else 64)) - 1) >> bits if upper else 0
    in_range = top >> bits == expected
    if output_bits(regime, shift) > 48:
        root = ttbr & 0xFFFF_FFFF_FFC0 | (ttbr >> 2 & 0xF) << 48
    else:
        root = ttbr & 0xFFFF_FFFF_FFFE
    return _Half(shift, bits, root, in_range and not disabled, not hpd)


def output_bits(regime: Regime, shift: int) -> int:
    """The size of output addresses: TCR_EL1.IPS, within the machine's, 48 bits without 64K granules or DS."""
    bits = min(_IPS[regime.tcr >> 32 & 7], regime.pa_bits)
    return bits if shift == 16 or regime.tcr & TCR_DS else min(bits, 48)


def _output(descriptor: int, shift: int, ds: bool, low: int, wide: bool) -> int:
    """The output address of a descriptor with `low` offset bits (the page's or block's, or a table's)."""
    if shift == 16:
        address = descriptor & 0xFFFF_FFFF_0000
        high = (descriptor >> 12 & 0xF) << 48 if wide else 0
    elif ds:
        address = descriptor & 0x3_FFFF_FFFF_F000
        high = (descriptor >> 8 & 3) << 50
    else:
        address, high = descriptor & 0xFFFF_FFFF_F000, 0
    return (address | high) & -(1 << low)


def translate(regime: Regime, va: int, access: Access, memory: Memory) -> Translation:
    """The IPA and permissions of `va`, or WalkFault.

    >>> translate(Regime(0, 0, 0, 0), 1 << 50, Access(READ, False), lambda ipa, value: 0).ipa == 1 << 50
    True
    """
    if not regime.sctlr & SCTLR_M:
        address = va & (1 << 56) - 1 if regime.tcr >> 37 & 1 else va
        if address >> regime.pa_bits:
            raise fault(ADDRESS_SIZE, 0)
        return Translation(address, READ | WRITE | FETCH, 0)
    half = _half(regime, va)
    stride = half.shift - 3
    level = 4 - -(-(half.size_bits - half.shift) // stride)
    if not half.enabled:
        raise fault(TRANSLATION, 0)
    if half.root >> output_bits(regime, half.shift):
        raise fault(ADDRESS_SIZE, 0)
    return _descend(regime, va, access, memory, half, level)


def _descend(regime: Regime, va: int, access: Access, memory: Memory, half: _Half, level: int) -> Translation:
    shift, stride, ds = half.shift, half.shift - 3, bool(regime.tcr & TCR_DS)
    limit = output_bits(regime, shift)
    wide = limit > 48
    first = _FIRST_BLOCK[shift] - (1 if (wide if shift == 16 else ds) else 0)
    table, inherited, top = half.root, 0, half.size_bits
    while True:
        low = shift + stride * (3 - level)
        entry = table + 8 * (va >> low & (1 << top - low) - 1)
        descriptor = memory(entry, None)
        kind = descriptor & 3
        if not kind & 1 or (kind == 1 and (level == 3 or level < first)):
            raise fault(TRANSLATION, level)
        leaf = kind == 1 or level == 3
        address = _output(descriptor, shift, ds, low if leaf else shift, wide)
        if address >> limit:
            raise fault(ADDRESS_SIZE, level)
        if leaf:
            descriptor = _hardware_update(regime, access, memory, entry, descriptor, level)
            permissions = _permissions(regime, descriptor, inherited, access)
            if not permissions & access.kind:
                raise fault(PERMISSION, level)
            return Translation(address | va & (1 << low) - 1, permissions, level)
        inherited |= descriptor if half.hierarchical else 0
        table, top, level = address, low, level + 1


def _hardware_update(regime: Regime, access: Access, memory: Memory, entry: int, descriptor: int, level: int) -> int:
    """FEAT_HAFDBS where the guest turned it on; otherwise a clear access flag faults."""
    new = descriptor
    if not descriptor & _AF:
        if not regime.tcr & TCR_HA:
            raise fault(ACCESS_FLAG, level)
        new |= _AF
    if regime.tcr & TCR_HD and regime.tcr & TCR_HA and access.kind == WRITE and descriptor & _DBM:
        new &= ~_AP_READ_ONLY
    return memory(entry, new) if new != descriptor else descriptor


def _permissions(regime: Regime, descriptor: int, inherited: int, access: Access) -> int:
    read_only = descriptor & _AP_READ_ONLY or inherited & _TABLE_READ_ONLY
    user = bool(descriptor & _AP_EL0) and not inherited & _TABLE_AP_EL0
    writable = not read_only
    if access.unprivileged:
        data = (READ | (WRITE if writable else 0)) if user else 0
        executable = not descriptor & _UXN and not inherited & _TABLE_UXN
    else:
        data = READ | (WRITE if writable else 0)
        # What EL0 can write EL1 never executes.
        executable = not descriptor & _PXN and not inherited & _TABLE_PXN and not (user and writable)
        if access.pan and user and access.kind != FETCH:
            data = 0
    if regime.sctlr & SCTLR_WXN and data & WRITE:
        executable = False
    return data | (FETCH if executable else 0)
