"""Watchpoints, which the emulated core has not: made from translation in Python (`SoftMmu`) and software steps.

A page with a watched byte in it is never in the core's TLB for the watched kinds of access, so each of those comes here
before anything happened. Where it touches a watched byte, that is a watchpoint exception (Arm ARM, "Watchpoint
exceptions"); otherwise the core makes one step with the page in place, and forgets it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from kvm2.softkvm.cpu import decode, walk
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.debug import (
    BCR_BT_SHIFT,
    BCR_E,
    BCR_LBN_SHIFT,
    FIELD,
    MDSCR_KDE,
    MDSCR_SS,
    PSTATE_SS,
    Debugging,
    Pair,
    context_of,
)

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.core import Core
    from kvm2.softkvm.cpu.softmmu import SoftMmu

EC_STEP_LOW, EC_WATCHPOINT_LOW, EC_SHIFT = 0x32, 0x34, 26
IL, WNR, DEBUG_FAULT = 1 << 25, 1 << 6, 0x22
PSTATE_D: Final = 1 << 9
NOT_EL0: Final = 0xC
PAGE: Final = 4096  # of the core's TLB
_LSC = {1: walk.READ, 2: walk.WRITE, 3: walk.READ | walk.WRITE, 0: 0}
_ALL_BYTES: Final = 0xFF
_TOP_56: Final = (1 << 56) - 1


@dataclass(frozen=True)
class Watched:
    """One comparator: bytes [start, end), kinds of access (bits of `walk`), whether at EL1, at EL0, the context."""

    start: int
    end: int
    kinds: int
    el1: bool
    el0: bool
    context: int | None


def watched(watchpoints: tuple[Pair, ...], breakpoints: tuple[Pair, ...]) -> list[Watched]:
    """What DBGWVR and DBGWCR pairs watch; those that link to no context match nothing.

    >>> [(hex(w.start), hex(w.end), w.kinds) for w in watched(((0x1000, 0x17 | 0x30 << 5), (0x2000, 0x6001FFF)), ())]
    [('0x1004', '0x1006', 2), ('0x2000', '0x2040', 3)]
    """
    found = []
    for value, control in watchpoints:
        if not control & BCR_E:
            continue
        context = None
        if control >> BCR_BT_SHIFT & 1:
            context = context_of(breakpoints, control >> BCR_LBN_SHIFT & FIELD)
            if context is None:
                continue
        how = _LSC[control >> 3 & 3], bool(control & 2), bool(control & 4), context
        found += [Watched(start, end, *how) for start, end in _ranges(value & _TOP_56, control)]
    return found


def _ranges(value: int, control: int) -> list[tuple[int, int]]:
    mask, select = control >> 24 & 0x1F, control >> 5 & _ALL_BYTES
    if mask:
        start = value & -(1 << mask)
        return [(start, start + (1 << mask))]
    base = value & ~7
    if value & 4:  # a word's address: four bytes
        base, select = value & ~3, select & 0xF
    ranges: list[tuple[int, int]] = []
    for byte in range(8):
        if select >> byte & 1:
            if ranges and ranges[-1][1] == base + byte:
                ranges[-1] = ranges[-1][0], base + byte + 1
            else:
                ranges.append((base + byte, base + byte + 1))
    return ranges


class Watch:
    """The watchpoints of one core, which translates in Python."""

    def __init__(self, core: Core, mmu: SoftMmu) -> None:
        self._core = core
        self._watched: list[Watched] = []
        self._before: Debugging | None = None  # while the core steps over an access: what holds otherwise
        self._ss = 0
        self._shown: list[int] = []  # the pages that came into the TLB meanwhile
        self._on_trap = core.on_trap
        core.on_trap = self._trap
        mmu.watch = self

    def set(self, watchpoints: tuple[Pair, ...], breakpoints: tuple[Pair, ...]) -> None:
        """What is watched from now on."""
        wanted = watched(watchpoints, breakpoints)
        if wanted != self._watched:
            self._watched = wanted
            self._core.flush_tlb()

    def kinds(self, address: int) -> int:
        """The kinds of access that must not be in the TLB for the page of an address (bits of `walk`)."""
        if not self._watched:
            return 0
        if self._before is not None:
            self._shown.append(address & -PAGE)
            return 0
        page = address & _TOP_56 & -PAGE
        found = 0
        for one in self._watched:
            if one.start < page + PAGE and page < one.end:
                found |= one.kinds
        return found

    def access(self, address: int, kind: int) -> bool:
        """The access that the core was about to make. True: the guest goes on; False: `on_trap` wants to leave."""
        core = self._core
        word = core.insn() or 0
        pstate = core.pstate
        el0 = not pstate & NOT_EL0
        hit = self._hit(address, word, kind, el0 or decode.is_unprivileged(word))
        debugging = core.debug.now
        # At EL1 for itself, the guest must want it (KDE) and not mask it.
        heard = debugging.to_el2 or el0 or bool(debugging.mdscr & MDSCR_KDE and not pstate & PSTATE_D)
        if hit is None or not heard:
            self._step(pstate)
            return True
        far = address & ~_TOP_56 | max(address & _TOP_56, hit.start)
        esr = EC_WATCHPOINT_LOW << EC_SHIFT | IL | DEBUG_FAULT | (WNR if kind == walk.WRITE else 0)
        if not debugging.to_el2:
            core.deliver_el1(esr if el0 else esr + (1 << EC_SHIFT), far)
            return True
        exception = core.instance.exception
        exception.syndrome, exception.vaddress, exception.target_el = esr, far, 2
        return self._on_trap()

    def _hit(self, address: int, word: int, kind: int, el0: bool) -> Watched | None:
        size = access_size(word)
        start = address & _TOP_56
        if word & DC_ZVA_MASK == DC_ZVA:
            start &= -size
        context = self._core.read_sys(reg.CONTEXTIDR_EL1) & 0xFFFF_FFFF
        for one in self._watched:
            touched = one.start < start + size and start < one.end and one.kinds & kind
            if touched and (one.el0 if el0 else one.el1) and one.context in (None, context):
                return one
        return None

    # ---- one step with the page in place

    def _step(self, pstate: int) -> None:
        core = self._core
        self._before, self._ss = core.debug.now, pstate & PSTATE_SS
        core.debug.set(replace(core.debug.now, mdscr=core.debug.now.mdscr | MDSCR_SS, to_el2=True))
        if not self._ss:
            core.pstate = pstate | PSTATE_SS
        core.hold_lines(True)

    def _trap(self) -> bool:
        if self._before is None:
            return self._on_trap()
        stepped = self._core.syndrome >> EC_SHIFT == EC_STEP_LOW
        hypervisors = bool(self._before.mdscr & MDSCR_SS and self._before.to_el2)
        self.settle()
        return True if stepped and not hypervisors else self._on_trap()

    def settle(self) -> None:
        """The step is over, or is given up."""
        if self._before is None:
            return
        core, before = self._core, self._before
        self._before = None
        core.debug.set(before)
        if not before.mdscr & MDSCR_SS:
            pstate = core.pstate
            if pstate & PSTATE_SS != self._ss:
                core.pstate = pstate ^ PSTATE_SS
        core.hold_lines(False)
        instance = core.instance
        for page in self._shown:
            instance.engine.FAST.tlb_flush_page_aarch64(instance.cpu, page)
        self._shown.clear()


# ---- how many bytes an instruction touches

DC_ZVA, DC_ZVA_MASK = 0xD50B_7420, 0xFFFF_FFE0
ZVA_BYTES: Final = 64
UNKNOWN_BYTES: Final = 64  # SVE, and whatever comes
_STRUCTURES: Final = {0: 4, 2: 4, 4: 3, 6: 3, 7: 1, 8: 2, 10: 2}  # registers, by the opcode of LD1 to LD4


def access_size(word: int) -> int:
    """How many bytes a load or store touches from its first one on.

    >>> ldr_x, ldp_x, ldr_q, ld1_4_16b = 0xF9400021, 0xA9400420, 0x3DC00020, 0x4C402020
    >>> [access_size(word) for word in (ldr_x, ldp_x, ldr_q, ld1_4_16b, 0x39400021, 0xC87F0440, 0x7C400021)]
    [8, 16, 16, 64, 1, 16, 2]
    """
    size, simd = word >> 30, word >> 26 & 1
    if word & DC_ZVA_MASK == DC_ZVA:
        return ZVA_BYTES
    if word & 0x3B00_0000 == 0x1800_0000:  # literal
        return 4 << size if simd else 8 if size == 1 else 4
    if word & 0x3A00_0000 == 0x2800_0000:  # pair
        return 2 * (4 << size) if simd else 16 if size == 2 else 8
    if word & 0x3A00_0000 == 0x3800_0000:  # one register: immediate, register offset, atomic
        return 16 if simd and not size and word >> 23 & 1 else 1 << size
    if word & 0x3F00_0000 == 0x0800_0000:  # exclusive, ordered, compare and swap
        pair = word >> 21 & 1 and not word >> 23 & 1
        return 2 * (4 << (size & 1)) if pair else 1 << size
    if word & 0x3F20_0C00 == 0x1900_0000:  # LDAPUR and the like
        return 1 << size
    if word & 0xBF00_0000 == 0x0C00_0000:  # whole SIMD structures
        return _STRUCTURES.get(word >> 12 & 0xF, 4) * (16 if word >> 30 & 1 else 8)
    if word & 0xBF00_0000 == 0x0D00_0000:  # one lane of each
        return _lane(word)
    return UNKNOWN_BYTES


def _lane(word: int) -> int:
    opcode, count = word >> 13 & 7, (word >> 13 & 1) << 1 | word >> 21 & 1
    scale = opcode >> 1
    if scale == 3:
        scale = word >> 10 & 3  # replicated
    elif scale == 2 and word >> 10 & 1:
        scale = 3
    return (count + 1) << scale
