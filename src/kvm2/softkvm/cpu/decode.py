"""What a load or store instruction tells a data abort's syndrome: the ISS fields ISV to AR.

After the Arm ARM's description of ISS for a data abort (ESR_ELx, ISV): valid for loads and stores of one
general-purpose register, also acquire and release, but not with write-back, not exclusive, not atomic, not a pair and
not SIMD. The emulated core reports write-back forms as valid; a VMM tested here must see what hardware says.
"""

from __future__ import annotations

ISV = 1 << 24
_SAS_SHIFT, _SSE, _SRT_SHIFT, _SF, _AR = 22, 1 << 21, 16, 1 << 15, 1 << 14
ISS_FIELDS = 0x1FFC000  # bits 24 to 14

_SIMD = 1 << 26


def access_iss(word: int) -> int:
    """ISS bits 24 to 14 for the access of instruction `word`; 0 where hardware reports ISV = 0.

    >>> hex(access_iss(0xB9401922))  # ldr w2, [x9, #0x18]
    '0x1820000'
    >>> access_iss(0xF8408525)  # ldr x5, [x9], #8
    0
    """
    if word & _SIMD:
        return 0
    if word & 0x3B000000 == 0x18000000:
        return _literal(word)
    if word & 0x3F000000 == 0x08000000:
        return _ordered(word)
    if word & 0x3F200C00 == 0x19000000:  # LDAPUR, STLUR and their signed forms
        return _single(word, _AR)
    if word & 0x3B000000 == 0x39000000:  # unsigned immediate
        return _single(word, 0)
    if word & 0x3B000000 == 0x38000000:
        return _register_forms(word)
    return 0


def _literal(word: int) -> int:
    size = word >> 30
    if size == 3:  # PRFM
        return 0
    # LDR Wt, LDR Xt, LDRSW: the access is 4, 8, 4 bytes wide.
    sas = 3 if size == 1 else 2
    return ISV | sas << _SAS_SHIFT | (_SSE if size == 2 else 0) | (word & 31) << _SRT_SHIFT | (_SF if size else 0)


def _ordered(word: int) -> int:
    """LDAR, STLR, LDLAR, STLLR (bit 23 set, bit 21 clear); the others are exclusive or compare-and-swap."""
    if word & 0xA00000 != 0x800000:
        return 0
    size = word >> 30
    release = _AR if word & 0x8000 else 0
    return ISV | size << _SAS_SHIFT | (word & 31) << _SRT_SHIFT | (_SF if size == 3 else 0) | release


def _register_forms(word: int) -> int:
    mode = word >> 10 & 3
    if not word & 1 << 21:
        # 0 unscaled, 1 post-index, 2 unprivileged, 3 pre-index
        return _single(word, 0) if mode in (0, 2) else 0
    if mode == 2:  # register offset
        return _single(word, 0)
    if mode & 1:  # LDRAA, LDRAB: bit 11 is write-back
        pac_load = word >> 30 == 3 and mode == 1
        return ISV | 3 << _SAS_SHIFT | (word & 31) << _SRT_SHIFT | _SF if pac_load else 0
    if word & 0xE0FC00 == 0xA0C000 and word >> 16 & 31 == 31:  # LDAPR, among the atomics
        size = word >> 30
        return ISV | size << _SAS_SHIFT | (word & 31) << _SRT_SHIFT | (_SF if size == 3 else 0) | _AR
    return 0


def _single(word: int, release: int) -> int:
    size, opc = word >> 30, word >> 22 & 3
    if opc >= 2 and (size == 3 or (size == 2 and opc == 3)):
        return 0  # PRFM, or unallocated
    signed = _SSE if opc >= 2 else 0
    wide = opc == 2 or (opc < 2 and size == 3)
    return ISV | size << _SAS_SHIFT | signed | (word & 31) << _SRT_SHIFT | (_SF if wide else 0) | release


def is_unprivileged(word: int) -> bool:
    """LDTR, STTR and their kin: accesses with EL0's permissions.

    >>> is_unprivileged(0xF8400926), is_unprivileged(0xF8400126)  # ldtr, ldur
    (True, False)
    """
    return word & 0x3F200C00 == 0x38000800


def sysreg_trap_iss(word: int) -> int:
    """ISS of EC 0x18 for an MSR, MRS or system instruction.

    >>> hex(sysreg_trap_iss(0xD5380705))  # mrs x5, id_aa64mmfr0_el1
    '0x3000af'
    """
    op0, op1, crn, crm, op2 = word >> 19 & 3, word >> 16 & 7, word >> 12 & 15, word >> 8 & 15, word >> 5 & 7
    return op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | (word & 31) << 5 | crm << 1 | word >> 21 & 1


def is_system(word: int) -> bool:
    """Whether the instruction is MSR, MRS, SYS or SYSL (not the immediate forms and hints)."""
    return word & 0xFFC00000 == 0xD5000000 and word >> 19 & 3 != 0


def is_daif_immediate(word: int) -> bool:
    """MSR DAIFSet or DAIFClr, which EL0 may use only where SCTLR_EL1.UMA allows it."""
    return word & 0xFFFFF0DF == 0xD50340DF
