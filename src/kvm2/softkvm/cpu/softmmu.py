"""Guests with addresses above 48 bits: Python translates for the emulator, both stages, one 4 KiB page at a time.

The emulator's walker ends at 48 bits of physical address. In its "virtual TLB" mode it asks a hook for each page that
its TLB misses (about 10 us); a refusal ends the run without a syndrome, which is built here, so that stage-2 faults
reach `on_trap` and stage-1 faults the guest exactly as they do natively.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Callable
from ctypes import c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import calibrate, decode, walk
from kvm2.softkvm.cpu import engine as uc
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.peek import peek_prefix
from kvm2.softkvm.cpu.undisturbed import undisturbed

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.core import Core
    from kvm2.softkvm.cpu.watch import Watch

# (IPA, walk.READ | WRITE | FETCH wanted) -> (host address of that byte, permissions), or the fault status of stage 2.
Stage2Walk = Callable[[int, int], tuple[int, int] | int]

_KINDS: Final = {uc.MEM_READ: walk.READ, uc.MEM_WRITE: walk.WRITE, uc.MEM_FETCH: walk.FETCH}
_IABT_LOW, _DABT_LOW, _EC_SHIFT = 0x20, 0x24, 26
_IL, _S1PTW, _WNR = 1 << 25, 1 << 7, 1 << 6
_PSTATE_PAN, _PSTATE_UAO = 1 << 22, 1 << 23
_PAR_RES1, _PAR_F, _PAR_S = 1 << 11, 1, 1 << 9
_LAST_LEVEL = 3
_FAULTS_AT_PAGES = frozenset(
    kind | _LAST_LEVEL for kind in (walk.ADDRESS_SIZE, walk.TRANSLATION, walk.ACCESS_FLAG, walk.PERMISSION)
)
_PERMISSION_LEVEL_3 = walk.PERMISSION | 3
# AT S1E1R, S1E1W, S1E0R, S1E0W, and with PAN S1E1RP, S1E1WP.
_AT: Final = (
    *((reg.enc(1, 0, 7, 8, op2), op2 & 1, op2 >> 1) for op2 in range(4)),
    (reg.enc(1, 0, 7, 9, 0), 0, 0),
    (reg.enc(1, 0, 7, 9, 1), 1, 0),
)


@dataclass(frozen=True)
class _Fault:
    status: int
    kind: int
    ipa: int | None  # None: stage 1
    s1ptw: bool = False
    write: bool = False
    watched: bool = False  # no fault at all


class SoftMmu:
    """The translation of one core."""

    def __init__(self, core: Core, stage2: Stage2Walk, pa_bits: int = 52, *, above_48_only: bool = False) -> None:
        self._core = core
        self._stage2 = stage2
        self._pa_bits = pa_bits
        self.watch: Watch | None = None
        self._fault: _Fault | None = None
        self._fault_pc = 0
        self._failure: BaseException | None = None
        instance = core.instance
        self._regime = reg.Batch(
            instance.handle, (uc.REG_PSTATE,), (reg.SCTLR_EL1, reg.TCR_EL1, reg.TTBR0_EL1, reg.TTBR1_EL1)
        )
        if above_48_only:
            return
        self._address = c_uint64.from_address(instance.base + fault_address_offset())
        instance.engine.virtual_tlb(instance.handle)
        self._callback = uc.FILL_CALLBACK(self._fill)
        instance.engine.hook(instance.handle, uc.HOOK_TLB_FILL, self._callback)
        for enc, write, el0 in _AT:
            # The core's own AT would take the guest's tables for host addresses.
            if core.knows(enc):
                core.override(enc, None, functools.partial(self._translate_instruction, write, el0))

    # ---- the hook

    def _fill(self, handle: int, address: int, kind: int, entry: int, user: object) -> int:
        try:
            hva, permissions = self._translate(address, _KINDS[kind])
            if self.watch is not None and (kinds := self.watch.kinds(address)):
                if kinds & _KINDS[kind]:
                    self._fault, self._fault_pc = _Fault(0, _KINDS[kind], None, watched=True), self._core.pc
                    return 0
                permissions &= ~kinds
            result = uc.TlbEntry.from_address(entry)
            result.paddr, result.perms = hva, permissions
            return 1
        except walk.WalkFault as fault:
            stage2 = fault.ipa is not None
            self._fault = _Fault(fault.status, _KINDS[kind], fault.ipa, stage2, fault.write)
        except _Stage2Fault as fault:
            self._fault = _Fault(fault.status, _KINDS[kind], fault.ipa)
        except BaseException as failure:
            self._failure = failure
        self._fault_pc = self._core.pc
        return 0

    def _translate(self, address: int, kind: int) -> tuple[int, int]:
        pstate, regime = self._state()
        el0 = not pstate & 0xC
        unprivileged = el0 or (kind != walk.FETCH and not pstate & _PSTATE_UAO and self._is_unprivileged())
        access = walk.Access(kind, unprivileged, not el0 and bool(pstate & _PSTATE_PAN))
        first = walk.translate(regime, address, access, self._descriptor(regime))
        answer = self._stage2(first.ipa, kind)
        if isinstance(answer, int):
            raise _Stage2Fault(answer, first.ipa)
        hva, permissions = answer
        if not permissions & kind:
            raise _Stage2Fault(_PERMISSION_LEVEL_3, first.ipa)
        permissions &= first.permissions
        if kind == walk.WRITE or not self._tracks_dirty(regime):
            return hva, permissions
        return hva, permissions & ~walk.WRITE  # the first write must come here

    def _state(self) -> tuple[int, walk.Regime]:
        pstate, sctlr, tcr, ttbr0, ttbr1 = self._regime.read()
        return pstate, walk.Regime(sctlr, tcr, ttbr0, ttbr1, self._pa_bits)

    @staticmethod
    def _tracks_dirty(regime: walk.Regime) -> bool:
        return bool(regime.tcr & walk.TCR_HD) and bool(regime.sctlr & walk.SCTLR_M)

    def _is_unprivileged(self) -> bool:
        word = self._core.insn()
        return word is not None and decode.is_unprivileged(word)

    def _descriptor(self, regime: walk.Regime) -> walk.Memory:
        order = ">Q" if regime.sctlr & walk.SCTLR_EE else "<Q"

        def access(ipa: int, value: int | None) -> int:
            kind = walk.READ if value is None else walk.WRITE
            answer = self._stage2(ipa, kind)
            if isinstance(answer, int):
                raise walk.WalkFault(answer, ipa, value is not None)
            hva, permissions = answer
            if not permissions & kind:
                raise walk.WalkFault(_PERMISSION_LEVEL_3, ipa, value is not None)
            if value is None:
                return int(struct.unpack(order, ctypes.string_at(hva, 8))[0])
            ctypes.memmove(hva, struct.pack(order, value), 8)
            return value

        return access

    def mapping_size(self, address: int, granule: int) -> int:
        """The size of what stage 1 maps at `address`, the granule for a hole among pages, 0 where nobody can tell."""
        _, regime = self._state()
        try:
            found = walk.translate(regime, address, walk.Access(walk.READ, False), self._descriptor(regime))
        except walk.WalkFault as fault:
            return granule if fault.ipa is None and fault.status in _FAULTS_AT_PAGES else 0
        return granule if found.level == _LAST_LEVEL else 0

    # ---- after a refusal

    def fault(self) -> bool:
        """Turns the refused translation into an exception. True: the guest goes on; False: `on_trap` wants to leave."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        fault, self._fault = self._fault, None
        if fault is None:
            # The hook was not entered: only a signal handler's exception can do that, and Python drops it there.
            raise KeyboardInterrupt
        if self._core.pc != self._fault_pc:
            return True  # on its way out the core took an interrupt instead: the access comes again after it
        if fault.watched:
            assert self.watch is not None
            return self.watch.access(self._address.value, fault.kind)
        return self._raise(fault, self._address.value)

    def beyond(self, esr: int, address: int) -> bool | None:
        """An address-size fault of the emulator's own walker, which ends at 48 bits: what the host makes of the access.

        None: the same; else it was a stage-2 fault, and the answer is that of `on_trap`.
        """
        fetch = esr >> _EC_SHIFT & ~1 == _IABT_LOW
        kind = walk.FETCH if fetch else walk.WRITE if esr & _WNR else walk.READ
        try:
            self._translate(address, kind)
        except walk.WalkFault as fault:
            if fault.ipa is None:
                return None
            return self._raise(_Fault(fault.status, kind, fault.ipa, True, fault.write), address)
        except _Stage2Fault as fault:
            return self._raise(_Fault(fault.status, kind, fault.ipa), address)
        return None

    def _raise(self, fault: _Fault, address: int) -> bool:
        core = self._core
        fetch = fault.kind == walk.FETCH
        esr = (_IABT_LOW if fetch else _DABT_LOW) << _EC_SHIFT | _IL | fault.status
        if not fetch and fault.kind == walk.WRITE:
            esr |= _WNR
        if fault.ipa is None:
            from_el0 = not core.pstate & 0xC
            core.deliver_el1(esr if from_el0 else esr + (1 << _EC_SHIFT), address)
            return True
        if fault.s1ptw:
            esr = esr & ~_WNR | _S1PTW | (_WNR if fault.write else 0)
        elif not fetch and (word := core.insn()) is not None:
            esr |= decode.access_iss(word)
        # The page of the hook's address, with the offset of the access in it.
        core.soft_fault(fault.ipa & ~0xFFF)
        exception = core.instance.exception
        exception.syndrome, exception.vaddress, exception.target_el = esr, address, 2
        return core.on_trap()

    # ---- AT

    def _translate_instruction(self, write: int, el0: int, address: int) -> None:
        pstate, regime = self._state()
        access = walk.Access(walk.WRITE if write else walk.READ, bool(el0), bool(pstate & _PSTATE_PAN) and not el0)
        try:
            result = walk.translate(regime, address, access, self._descriptor(regime))
            par = result.ipa & 0xF_FFFF_FFFF_F000 | _PAR_RES1 | 0xFF << 56
        except walk.WalkFault as fault:
            par = fault.status << 1 | _PAR_F | _PAR_RES1 | (_PAR_S if fault.ipa is not None else 0)
        self._core.write_sys(reg.PAR_EL1, par)


class _Stage2Fault(Exception):
    def __init__(self, status: int, ipa: int) -> None:
        super().__init__(f"stage 2 fault status {status:#x} at {ipa:#x}")
        self.status, self.ipa = status, ipa


@functools.cache
@undisturbed
def fault_address_offset() -> int:
    """Where an instance keeps the address of a refused translation: found by refusing a known one."""
    engine = uc.engine()
    handle = engine.open(uc.MODEL_MAX, 1 << 20)
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    known = 0x5A5A_1234_5678_9ABC
    engine.check(engine.LIB.uc_mem_map_ptr(handle, 0x10000, mmap.PAGESIZE, uc.PROT_ALL, c_void_p(address)), "mapping")
    calibrate.quiet(engine, handle)
    page[:4] = struct.pack("<I", 0xF9400022)  # ldr x2, [x1]
    engine.write_reg(handle, uc.REG_X0 + 1, known)

    def fill(instance: int, va: int, kind: int, entry: int, user: object) -> int:
        result = uc.TlbEntry.from_address(entry)
        result.paddr, result.perms = va, uc.PROT_ALL
        return int(va >> 48 == 0)

    callback = uc.FILL_CALLBACK(fill)
    engine.virtual_tlb(handle)
    engine.hook(handle, uc.HOOK_TLB_FILL, callback)
    error = engine.LIB.uc_emu_start(handle, 0x10000, 0, 0, c_size_t(0))
    blob = peek_prefix(handle.value or 0, 0x2000)
    engine.LIB.uc_close(handle)
    at = blob.find(struct.pack("<Q", known))
    if error != uc.ERR_EXCEPTION or at < 0 or blob.find(struct.pack("<Q", known), at + 1) >= 0:
        raise EnvironmentFault("the emulated core's check failed: the address of a refused translation was not found")
    return at
