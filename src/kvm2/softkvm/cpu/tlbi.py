"""TLBI by address under stage 2, for translations that are larger than 4 KiB in stage 1.

The emulator caches a translation in pieces of 4 KiB and remembers stage 2's page size with it, not stage 1's: of a
block, or of a 16 KiB or 64 KiB page, TLBI by address forgets 4 KiB only, and the rest stays as it was (fixed in later
QEMU: the larger of both sizes counts). So each such instruction is looked at before it is executed: what stage 1 has at
the address now is a mapping or a hole of the granule's size, and then so many pages go; or it is a block, or nothing
tells how large the mapping was, and everything goes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Callable, Generator
from ctypes import c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Final

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import calibrate
from kvm2.softkvm.cpu import engine as uc
from kvm2.softkvm.cpu import instance as inst
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.defined import ACCESS_CALLBACK

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.instance import Instance

# TLBI VAE1, VAAE1, VALE1, VAALE1 and their inner-shareable forms.
BY_ADDRESS: Final = tuple(reg.enc(1, 0, 8, crm, op2) for crm in (3, 7) for op2 in (1, 3, 5, 7))
_PAGE: Final = 4096
_LAST_LEVEL: Final = 3
_FETCH, _LOAD = 2, 0
_STAGE1_EL1, _STAGE2 = 0x21, 0x1B  # of ARMMMUIdx
_LEVEL1_SHIFT, _LEVEL2_SHIFT, _STRIDE = 30, 21, 9  # of 4 KiB granules
_INDEX: Final = 511
_ADDRESS, _ROOT = 0xFFFF_FFFF_F000, 0xFFFF_FFFF_FFC0
_TABLE: Final = 3
_CORE_INDEX: Final = 0xF  # the part of an ARMMMUIdx that numbers the TLBs
_OK, _UNDEFINED = 0, 2
_SCTLR_M, _SCTLR_EE = 1, 1 << 25
_TG0: Final = {0: 4096, 1: 65536, 2: 16384}
_TG1: Final = {1: 16384, 2: 4096, 3: 65536}
_XZR: Final = 31
_VA_BITS: Final = 56


class _Fault(ctypes.Structure):
    """`ARMMMUFaultInfo`."""

    _fields_ = [
        ("type", c_uint32),
        ("s2addr", c_uint64),
        ("level", c_int32),
        ("domain", c_int32),
        ("stage2", c_uint8),
        ("s1ptw", c_uint8),
        ("ea", c_uint8),
    ]


class Stage1:
    """The emulator's own walk of stage 1, for what it says of a mapping's size."""

    def __init__(self, env: int) -> None:
        self._call = uc.engine().FAST.get_phys_addr_aarch64
        self._env, self._fault = env, _Fault()
        self._page_size = c_uint64()
        self._unused = (c_uint64 * 3)()
        at = ctypes.addressof(self._unused)
        self._arguments = (env, _LOAD, _STAGE1_EL1, at, at + 8, at + 16)
        self._results = (ctypes.byref(self._page_size), ctypes.byref(self._fault))

    def stage2(self, ipa: int) -> int | None:
        """The host address behind an IPA that is mapped; there the emulated physical address is one."""
        env, load, _, *out = self._arguments
        if self._call(env, ipa, load, _STAGE2, *out, *self._results, None):
            return None
        return self._unused[0]

    def size(self, address: int, granule: int) -> int:
        """The size of what maps `address`, the granule for a hole among pages, 0 where a larger one may be gone."""
        fault = self._fault
        fault.level, fault.stage2 = -1, 0
        env, load, index, *out = self._arguments
        if not self._call(env, address, load, index, *out, *self._results, None):
            return self._page_size.value
        return granule if fault.level == _LAST_LEVEL and not fault.stage2 else 0


class Tables:
    """Where a 4 KiB granule's level-2 tables lie, of the gigabytes that were asked about: a quick first look.

    A kernel says TLBI 90 000 times while it boots. What leads to the table is looked at each time, as it is in memory.
    """

    def __init__(self, instance: Instance, stage1: Stage1) -> None:
        self._stage1 = stage1
        self._ttbr = instance.cell(reg.TTBR0_EL1), instance.cell(reg.TTBR1_EL1)
        self._known: dict[int, tuple[int, int, list[tuple[c_uint64, int]], int]] = {}

    def forget(self) -> None:
        """Stage 2 changed: host addresses may be others."""
        self._known.clear()

    def has_pages(self, address: int, tcr: int) -> bool:
        """Whether a table of pages stands for the 2 MiB around `address`; False where that is not known at once."""
        upper = address >> _VA_BITS - 1 & 1
        root = self._ttbr[upper].value & _ROOT
        found = self._known.get(address >> _LEVEL1_SHIFT)
        if found is None or found[0] != tcr or found[1] != root:
            found = self._find(address, tcr, root)
            if found is None:
                return False
            self._known[address >> _LEVEL1_SHIFT] = found
        for cell, value in found[2]:
            if cell.value != value:
                del self._known[address >> _LEVEL1_SHIFT]
                return False
        descriptor = c_uint64.from_address(found[3] + 8 * (address >> _LEVEL2_SHIFT & _INDEX)).value
        return descriptor & _TABLE == _TABLE

    def _find(self, address: int, tcr: int, root: int) -> tuple[int, int, list[tuple[c_uint64, int]], int] | None:
        bits = 64 - (tcr >> (16 if address >> _VA_BITS - 1 & 1 else 0) & 63)
        if not _LEVEL1_SHIFT < bits <= _LEVEL1_SHIFT + 2 * _STRIDE:
            return None
        way, table, shift = [], root, _LEVEL1_SHIFT + (_STRIDE if bits > _LEVEL1_SHIFT + _STRIDE else 0)
        address &= (1 << bits) - 1
        while shift >= _LEVEL1_SHIFT:
            host = self._stage1.stage2(table | 8 * (address >> shift & _INDEX))
            if host is None:
                return None
            cell = c_uint64.from_address(host)
            value = cell.value
            if value & _TABLE != _TABLE:
                return None
            way.append((cell, value))
            table, shift = value & _ADDRESS, shift - _STRIDE
        host = self._stage1.stage2(table)
        if host is None:
            return None
        return tcr, root, way, host


class TlbMaintenance:
    """The instructions of one instance. `failed` takes what a signal handler raised, and makes the core leave."""

    def __init__(self, instance: Instance, failed: Callable[[BaseException], None]) -> None:
        check()
        self._instance, self._failed = instance, failed
        self.everything = False  # where Python translates, and the emulator knows no stage 2 to walk tables by
        self._fast = instance.engine.FAST
        self._stage1 = Stage1(instance.env)
        self._tables = Tables(instance, self._stage1)
        self._index = self._fast.arm_mmu_idx_aarch64(instance.env) & _CORE_INDEX
        # Where Python translates, the emulator's walk would take the guest's addresses for this process's.
        self.walk: Callable[[int, int], int] | None = None
        self._sctlr, self._tcr = instance.cell(reg.SCTLR_EL1), instance.cell(reg.TCR_EL1)
        self._handler = self._instructions()
        next(self._handler)
        self._callback = ACCESS_CALLBACK(self._handler.send)
        address = ctypes.cast(self._callback, c_void_p).value
        for enc in BY_ADDRESS:
            # In place of the check of HCR_EL2.TTLB, which is never set here.
            inst.register_info(instance, enc).accessfn = address

    def forget(self) -> None:
        """Stage 2 changed."""
        self._tables.forget()

    def close(self) -> None:
        """The core is about to be freed."""
        self._handler.close()

    def _instructions(self) -> Generator[int, int, None]:
        # As in Core._exceptions: a signal's exception is raised inside the `try`, and the instruction comes again.
        answer = _OK
        while True:
            try:
                while True:
                    yield answer
                    answer = _UNDEFINED
                    self._before()
                    answer = _OK
            except GeneratorExit:
                return
            except BaseException as failure:
                answer = _UNDEFINED
                self._failed(failure)

    def _before(self) -> None:
        """Forgets what the instruction itself would not; the page of its address it forgets afterwards."""
        instance, fast = self._instance, self._fast
        if self.everything:
            instance.engine.flush_tlb(instance.handle)
            return
        env = instance.env
        # Through the TLB that EL1 uses without PAN, which fetches disregard.
        where = fast.tlb_vaddr_to_host_aarch64(env, instance.pc_cell.value, _FETCH, self._index)
        sctlr, tcr = self._sctlr.value, self._tcr.value
        if not where or not sctlr & _SCTLR_M:
            instance.engine.flush_tlb(instance.handle)
            return
        target = c_uint8.from_address(where).value & _XZR
        page = (instance.x[target] if target != _XZR else 0) << 12 & (1 << _VA_BITS) - 1
        if page >> _VA_BITS - 1:
            page |= 0xFF << _VA_BITS
            granule = _TG1.get(tcr >> 30 & 3, _PAGE)
        else:
            granule = _TG0.get(tcr >> 14 & 3, _PAGE)
        if self.walk is not None:
            size = self.walk(page, granule)
        elif granule == _PAGE and not sctlr & _SCTLR_EE and self._tables.has_pages(page, tcr):
            return
        else:
            size = self._stage1.size(page, granule)
        if size == _PAGE:
            return
        if size != granule:
            instance.engine.flush_tlb(instance.handle)
            return
        page &= -granule
        for piece in range(page, page + granule, _PAGE):
            fast.tlb_flush_page_aarch64(instance.cpu, piece)


_BLOCK, _LEAF = 1 | 1 << 10, 3 | 1 << 10
_BASE: Final = 0x10000
_TCR_39_BITS: Final = 25 | 2 << 32
# address: size that is mapped, or granule, or 0
_KNOWN: Final = {
    0: 1 << 30,
    1 << 30: 2 << 20,
    (1 << 30) + (2 << 20): _PAGE,
    (1 << 30) + (2 << 20) + _PAGE: _PAGE,
    (1 << 30) + (4 << 20): 0,
    2 << 30: 0,
}


@functools.cache
def check() -> None:
    """The walk tells known mappings' sizes, or EnvironmentFault: once per process."""
    engine, layout = uc.engine(), calibrate.layout()
    tables = mmap.mmap(-1, 4 * _PAGE)
    for at, entries in enumerate(
        (
            (_BLOCK, _BASE + _PAGE | _TABLE),
            (_BLOCK, _BASE + 2 * _PAGE | _TABLE),
            (_BASE | _LEAF,),
        )
    ):
        tables[at * _PAGE : at * _PAGE + 8 * len(entries)] = struct.pack(f"<{len(entries)}Q", *entries)
    address = ctypes.addressof(ctypes.c_char.from_buffer(tables))
    handle = engine.open(uc.MODEL_MAX, 1 << 20)
    try:
        error = engine.LIB.uc_mem_map_ptr(handle, _BASE, len(tables), uc.PROT_ALL, c_void_p(address))
        engine.check(error, "mapping the probe's memory")
        calibrate.quiet(engine, handle)
        for enc, value in ((reg.TTBR0_EL1, _BASE), (reg.TCR_EL1, _TCR_39_BITS), (reg.SCTLR_EL1, _SCTLR_M)):
            engine.write_sys(handle, enc, value)
        walk = Stage1(calibrate.cpu_object(engine, handle) + layout.env_in_cpu)
        found = {known: walk.size(known, _PAGE) for known in _KNOWN}
    finally:
        engine.LIB.uc_close(handle)
    if found != _KNOWN:
        raise EnvironmentFault("the emulated core's check failed: Unicorn 2.1.4 tells the size of mappings differently")
