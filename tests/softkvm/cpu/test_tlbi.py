"""TLB maintenance by address under stage 2: what stage 1 maps goes as a whole, however small stage 2's pages are."""

from __future__ import annotations

import pytest

from .machine import (
    EL1H,
    S1_PAGE,
    S2_PAGE,
    S2_READ,
    S2_WRITE,
    SIZE,
    TG0,
    TG1,
    Arena,
    Machine,
    Tables,
    stage2_vtcr,
)

BLOCK = 2 << 20
WINDOW = 1 << 46  # a virtual address that nothing else uses
CHANGE = """
ldr x3, [x1]; ldr x4, [x2]
str xzr, [x10]; dsb sy; {tlbi}, x11; dsb sy; isb
str x12, [x10]; dsb sy; isb
ldr x5, [x1]; ldr x6, [x2]; hvc #1
"""
OPS = [f"tlbi v{kind}e1{scope}" for kind in ("a", "aa", "al", "aal") for scope in ("", "is")]
# granule, level of the mapping, distance of the second address
MAPPINGS = {
    "4K page": (12, 3, 8),
    "4K block": (12, 2, 0x5000),
    "16K page": (14, 3, 0x3000),
    "64K page": (16, 3, 0xF000),
}


class Guest:
    """A machine under 4 KiB stage-2 pages whose stage 1 is the identity, and a window of its own."""

    def __init__(self, model: str, shift: int, soft: bool = False) -> None:
        self.arena = arena = Arena(SIZE + 4 * BLOCK)
        self.soft = soft
        options = {"soft_mmu": lambda ipa, access: (ipa, 7)} if soft else {}
        self.machine = Machine(model, arena, **options)
        self.code = arena.base
        first = -arena.base % BLOCK + arena.base + BLOCK  # two blocks of data, aligned as blocks
        self.old, self.new = first, first + BLOCK
        self.stage1 = Tables(arena, shift, 48)
        for address in range(arena.base, arena.base + SIZE + 4 * BLOCK, 1 << shift):
            self.stage1.set(address, address, S1_PAGE)
        self.stage2 = Tables(arena, 12, 48, 0)

    def identity(self, address: int, size: int) -> None:
        for page in range(address & -4096, address + size, 4096):
            self.stage2.set(page, page, S2_PAGE | S2_READ | S2_WRITE)

    def start(self, shift: int, text: str, **registers: int) -> None:
        arena, machine = self.arena, self.machine
        if not self.soft:
            self.identity(arena.base, SIZE + 4 * BLOCK + (1 << 16))
            machine.core.set_stage2(stage2_vtcr(12, 48, 0), self.stage2.root)
        tcr = 16 | 16 << 16 | TG0[shift] << 14 | TG1[shift] << 30 | 1 << 8 | 1 << 10 | 3 << 12 | 5 << 32
        machine.load(
            text,
            pstate=EL1H,
            SCTLR_EL1=1,
            TCR_EL1=tcr,
            TTBR0_EL1=self.stage1.root,
            MAIR_EL1=0xFF,
            **registers,
        )


def entry(tables: Tables, address: int, level: int) -> int:
    """The address of a descriptor."""
    table = tables.root
    for at in range(tables.start, level + 1):
        low = tables.shift + tables.stride * (3 - at)
        width = tables.top if at == tables.start else tables.stride
        where = table + 8 * (address >> low & (1 << width) - 1)
        table = tables.arena.word(where) & 0xFFFFFFFFF000
    return where


@pytest.mark.parametrize(
    ("model", "mapping", "tlbi", "soft"),
    [
        *(("a72", "16K page", tlbi, False) for tlbi in OPS),
        *((model, mapping, OPS[at], False) for model in ("a72", "max") for at, mapping in enumerate(MAPPINGS)),
        *(("a72", mapping, "tlbi vae1is", True) for mapping in MAPPINGS),
    ],
)
def test_by_address(model: str, mapping: str, tlbi: str, soft: bool) -> None:
    shift, level, distance = MAPPINGS[mapping]
    guest = Guest(model, shift, soft)
    arena, machine = guest.arena, guest.machine
    for at, base in enumerate((guest.old, guest.new)):
        for offset in (0, distance):
            arena.put(base + offset, 0x1000 * (at + 1) + offset)
    guest.stage1.set(WINDOW, guest.old, S1_PAGE, level)
    kind = 3 if level == 3 else 1
    guest.start(
        shift,
        CHANGE.format(tlbi=tlbi),
        x1=WINDOW,
        x2=WINDOW + distance,
        x10=entry(guest.stage1, WINDOW, level),
        x11=WINDOW >> 12,
        x12=guest.new | S1_PAGE | kind,
    )
    assert machine.go().esr & 0xFFFF == 1
    core = machine.core
    assert [core.x[at] for at in (3, 4, 5, 6)] == [0x1000, 0x1000 + distance, 0x2000, 0x2000 + distance]
    machine.close()


def test_the_tables_that_were_found_may_move() -> None:
    """Another TTBR0, and another table behind the same TTBR0: each time the new mapping's size counts."""
    guest = Guest("a72", 12)
    arena, machine, core = guest.arena, guest.machine, guest.machine.core
    for at, base in enumerate((guest.old, guest.new)):
        arena.put(base + 0x5000, 1 + at)
    guest.stage1.set(WINDOW, guest.old, S1_PAGE)  # pages first: level 2 is a table
    registers = {"x1": WINDOW, "x2": WINDOW + 0x5000, "x11": WINDOW >> 12, "x12": guest.new | S1_PAGE | 1}
    guest.start(12, "ldr x3, [x1]; tlbi vae1is, x11; dsb sy; isb; hvc #2", **registers)
    assert machine.go().esr & 0xFFFF == 2
    level2, level1 = (entry(guest.stage1, WINDOW, level) for level in (2, 1))
    moved = arena.table(4096)
    offset = level2 & 0xFFF
    for where, link in ((level2, None), (moved + offset, level1)):
        arena.put(where, guest.old | S1_PAGE | 1)  # a block now
        if link is not None:
            arena.put(link, moved | 3)
        machine.load(CHANGE.format(tlbi="tlbi vae1is"), x10=where, **registers)
        assert machine.go().esr & 0xFFFF == 1
        assert (core.x[4], core.x[6]) == (1, 2)
    machine.close()
