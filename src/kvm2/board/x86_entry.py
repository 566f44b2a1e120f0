"""How an x86-64 guest is entered: in real mode below 1 MiB, in long mode above. docs/guest.md has the contract.

Intel SDM volume 3: 9.1.4 (the first instruction), 10.8.5 (long mode), 4.5 (4-level paging).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvm2.abi.structs_x86 import Dtable, Regs, Segment
from kvm2.errors import GuestError

if TYPE_CHECKING:
    from kvm2.board.loader import Image
    from kvm2.spec import MemoryRange
    from kvm2.vcpu import Vcpu
    from kvm2.vm import Vm

REAL_MODE_END = 1 << 20
REAL_MODE_STACK = 0x7C00
PAGE = 4096
# PML4, page-directory pointers, four page directories for 4 GiB in 2 MiB pages, the GDT.
TABLE_PAGES = 7
_PRESENT, _WRITABLE, _USER, _LARGE = 1 << 0, 1 << 1, 1 << 2, 1 << 7
_ENTRY = _PRESENT | _WRITABLE | _USER
_GDT = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF)
CODE_SELECTOR, DATA_SELECTOR = 0x18, 0x10
CR0_LONG = 0x80000033  # PG, NE, ET, MP, PE
CR4_LONG = 0x620  # OSXMMEXCPT, OSFXSR, PAE
EFER_LONG = 0x500  # LMA, LME
RFLAGS_FIXED = 1 << 1


def enter(vm: Vm, vcpu: Vcpu, image: Image, memory: MemoryRange, params: int) -> None:
    """Put the vCPU at the image's entry, with RDI = `params`. GuestError where the tables of long mode have no room."""
    if image.entry < REAL_MODE_END:
        _real_mode(vcpu, image.entry, params)
    else:
        _long_mode(vm, vcpu, image, memory, params)


def _real_mode(vcpu: Vcpu, entry: int, params: int) -> None:
    base = entry & 0xF0000
    cs = Segment(base, 0xFFFF, base >> 4, type=11, present=1, s=1)
    vcpu.regs.update(cs=cs)
    vcpu.set_regs(Regs(rip=entry - base, rdi=params, rsp=REAL_MODE_STACK, rflags=RFLAGS_FIXED))


def _long_mode(vm: Vm, vcpu: Vcpu, image: Image, memory: MemoryRange, params: int) -> None:
    tables = tables_at(memory)
    end = tables + TABLE_PAGES * PAGE
    taken = next((one for one in image.segments if one.address < end and tables < one.end), None)
    if tables < memory.base or taken is not None:
        raise GuestError(
            f"{image.name}: a guest that is entered in long mode needs the {TABLE_PAGES} pages at {tables:#x} for its "
            "page tables and GDT: load less there, or give it more memory (--memory SIZE@0)"
        )
    vm.write(tables, page_tables(tables))
    gdt = tables + (TABLE_PAGES - 1) * PAGE
    vm.write(gdt, struct.pack("<4Q", *_GDT))
    data = Segment(0, 0xFFFFFFFF, DATA_SELECTOR, type=3, present=1, db=1, s=1, g=1)
    vcpu.regs.update(
        cs=Segment(0, 0xFFFFFFFF, CODE_SELECTOR, type=11, present=1, s=1, l=1, g=1),
        **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data),
        gdt=Dtable(gdt, 8 * len(_GDT) - 1),
        cr0=CR0_LONG,
        cr3=tables,
        cr4=CR4_LONG,
        efer=EFER_LONG,
    )
    # As after a call: the stack pointer is 8 below a multiple of 16, where a return address would lie.
    vcpu.set_regs(Regs(rip=image.entry, rdi=params, rsp=tables - 8, rflags=RFLAGS_FIXED))


def tables_at(memory: MemoryRange) -> int:
    """Where the tables of long mode lie: below the page of the parameter block, at the end of the first RAM range."""
    return min(memory.end, 1 << 32) - (TABLE_PAGES + 1) * PAGE


def page_tables(at: int) -> bytes:
    """Six pages for address `at` that map the first 4 GiB one to one, in 2 MiB pages."""
    pml4 = struct.pack("<Q", at + PAGE | _ENTRY).ljust(PAGE, b"\0")
    pointers = struct.pack("<4Q", *(at + (2 + i) * PAGE | _ENTRY for i in range(4))).ljust(PAGE, b"\0")
    directories = struct.pack("<2048Q", *(i << 21 | _ENTRY | _LARGE for i in range(2048)))
    return pml4 + pointers + directories
