"""Stage-2 aborts: precise, with the syndrome that hardware gives, for every form of load and store."""

from __future__ import annotations

import pytest

from kvm2.softkvm.cpu import registers as reg

from .machine import S2_PAGE, S2_READ, S2_WRITE, S2_XN, Machine, Tables, stage2_vtcr

RAM = 0x4000_0000
MMIO = 0x5000_0000
DABT, IABT = 0x24, 0x20

# form: (ISV, SAS, SSE, SRT, SF, AR) or None for ISV = 0; whether it writes; FAR - [x9]
FORMS = {
    "ldr w2, [x9, #0x18]": ((2, 0, 2, 0, 0), False, 0x18),
    "ldr x2, [x9]": ((3, 0, 2, 1, 0), False, 0),
    "ldrb w30, [x9, #1]": ((0, 0, 30, 0, 0), False, 1),
    "ldrh wzr, [x9, x10]": ((1, 0, 31, 0, 0), False, 16),
    "str w3, [x9]": ((2, 0, 3, 0, 0), True, 0),
    "str xzr, [x9, #8]": ((3, 0, 31, 1, 0), True, 8),
    "strb w4, [x9, #-1]": ((0, 0, 4, 0, 0), True, -1),
    "strh w5, [x9, x10, lsl #1]": ((1, 0, 5, 0, 0), True, 32),
    "ldrsb x4, [x9, #1]": ((0, 1, 4, 1, 0), False, 1),
    "ldrsb w4, [x9, #1]": ((0, 1, 4, 0, 0), False, 1),
    "ldrsh x4, [x9]": ((1, 1, 4, 1, 0), False, 0),
    "ldrsw x4, [x9]": ((2, 1, 4, 1, 0), False, 0),
    "ldr x9, [x9]": ((3, 0, 9, 1, 0), False, 0),
    "ldur w6, [x9, #-4]": ((2, 0, 6, 0, 0), False, -4),
    "ldtr x6, [x9]": ((3, 0, 6, 1, 0), False, 0),
    "sttrb w6, [x9]": ((0, 0, 6, 0, 0), True, 0),
    "ldar w6, [x9]": ((2, 0, 6, 0, 1), False, 0),
    "stlr x6, [x9]": ((3, 0, 6, 1, 1), True, 0),
    "ldr x5, [x9], #8": (None, False, 0),
    "str x5, [x9, #16]!": (None, True, 16),
    "ldrb w5, [x9, #1]!": (None, False, 1),
    "str w5, [x9], #-4": (None, True, 0),
    "ldp x6, x7, [x9]": (None, False, 0),
    "ldp x9, x7, [x9]": (None, False, 0),
    "stp w6, w7, [x9]": (None, True, 0),
    "ldp x6, x7, [x9, #-8]": (None, False, 0),
    "stp x6, x7, [x9, #-16]!": (None, True, -16),
    "ldr q1, [x9]": (None, False, 0),
    "str d1, [x9]": (None, True, 0),
    "ld1 {v0.16b}, [x9]": (None, False, 0),
    "ldxr x6, [x9]": (None, False, 0),
    "ldaxr w6, [x9]": (None, False, 0),
    "dc zva, x9": (None, True, 0),
}
LATER_FORMS = {
    "ldapr w6, [x9]": ((2, 0, 6, 0, 1), False, 0),
    "ldapur x6, [x9, #8]": ((3, 0, 6, 1, 1), False, 8),
    "stlurb w6, [x9]": ((0, 0, 6, 0, 1), True, 0),
    "ldapursh w6, [x9]": ((1, 1, 6, 0, 1), False, 0),
    "swp x6, x7, [x9]": (None, None, 0),
    "ldadd w6, w7, [x9]": (None, None, 0),
    "cas x6, x7, [x9]": (None, None, 0),
}


def stage2_machine(model: str = "a72", shift: int = 12, bits: int = 40) -> tuple[Machine, Tables]:
    """RAM at 1 GiB is the start of the arena (whole pages), nothing else is mapped."""
    machine = Machine(model)
    tables = Tables(machine.arena, shift, bits, start=1 if (shift, bits) == (12, 40) else None)
    tables.pages(RAM, machine.arena.base, 0x40000, S2_PAGE | S2_READ | S2_WRITE)
    machine.core.set_stage2(stage2_vtcr(shift, bits, tables.start), tables.root)
    return machine, tables


def start(machine: Machine, text: str, **registers: int) -> None:
    machine.load(text)
    machine.start(RAM, **registers)


def iss(fields: tuple[int, int, int, int, int] | None) -> int:
    if fields is None:
        return 0
    sas, sse, srt, sf, ar = fields
    return 1 << 24 | sas << 22 | sse << 21 | srt << 16 | sf << 15 | ar << 14


@pytest.mark.parametrize("form", [*FORMS, *LATER_FORMS])
def test_form(form: str) -> None:
    fields, write, offset = {**FORMS, **LATER_FORMS}[form]
    machine, _ = stage2_machine("max" if form in LATER_FORMS else "a72")
    start(machine, form + "; add x20, x20, #1; hvc #0", x9=MMIO, x10=16, **{f"x{n}": 0x1000 + n for n in range(9)})
    before = list(machine.core.x)
    trap = machine.go()
    # An access that crosses into the page may name either of its bytes there.
    assert trap.far in ((MMIO + offset,) if form != "ldp x6, x7, [x9, #-8]" else (MMIO, MMIO - 8))
    assert trap.hpfar == trap.far & ~0xFFF
    assert trap.pc == RAM
    wnr = bool(trap.esr & 1 << 6)
    # Level 3 or 1: the tables have nothing at all there but the block's first gigabyte.
    assert trap.esr & ~(1 << 6) == DABT << 26 | 1 << 25 | iss(fields) | trap.esr & 0x3F
    assert trap.esr & 0x3C == 4
    if write is not None:
        assert wnr is write
    assert list(machine.core.x) == before  # no write-back, no half of a pair
    machine.close()


def test_completing_an_access() -> None:
    machine, _ = stage2_machine()
    start(machine, "ldr w2, [x9]; add x3, x2, #1; str w3, [x9, #4]; hvc #7", x9=MMIO)
    machine.go()
    machine.core.x[2] = 0x1234
    machine.core.pc += 4
    trap = machine.go()
    assert (trap.far, machine.core.x[trap.esr >> 16 & 31]) == (MMIO + 4, 0x1235)
    machine.core.pc += 4
    assert machine.go().esr == 0x5A000007
    machine.close()


@pytest.mark.parametrize("handled", [True, False])
def test_mapping_lazily(handled: bool) -> None:
    """A fault answered by a mapping is invisible to the guest, whether inside the handler or by a new run."""
    machine, tables = stage2_machine()
    faults = []

    def on_trap(trap: object) -> bool:
        esr, far = machine.core.syndrome, machine.core.far
        if esr >> 26 != DABT:
            return False
        faults.append(far & ~0xFFF)
        tables.set(far & ~0xFFF, machine.arena.base + 0x100000 + (far & 0xFF000), S2_PAGE | S2_READ | S2_WRITE | S2_XN)
        return handled

    machine.answer = on_trap
    start(machine, "1: str x1, [x9]; add x9, x9, #0x800; add x1, x1, #1; cmp x1, #16; b.ne 1b; hvc #0", x9=MMIO)
    while machine.go().ec == DABT:
        pass
    assert faults == [MMIO + page * 0x1000 for page in range(8)]
    assert [machine.arena.word(machine.arena.base + 0x100000 + n * 0x800) for n in range(16)] == list(range(16))
    machine.close()


def test_permissions_and_flushing() -> None:
    machine, tables = stage2_machine()
    page = machine.arena.base + 0x100000
    machine.arena.put(page, 77)
    tables.set(MMIO, page, S2_PAGE | S2_READ | S2_XN)
    start(machine, "ldr x1, [x9]; str x9, [x9]; ldr x2, [x9]; blr x9", x9=MMIO)
    trap = machine.go()
    assert trap.esr & 0x7F == 0x40 | 0xF  # a write, permission fault at level 3
    assert (trap.pc, trap.far, trap.hpfar) == (RAM + 4, MMIO, MMIO)
    assert machine.core.x[1] == 77
    tables.set(MMIO, page, S2_PAGE | S2_READ | S2_WRITE | S2_XN)
    machine.core.flush_tlb()
    trap = machine.go()
    assert machine.core.x[2] == MMIO
    assert (trap.ec, trap.esr & 0x3F, trap.far) == (IABT, 0xF, MMIO)  # execute-never
    tables.clear(MMIO)  # invalid: the cached translation lives until the flush
    machine.core.flush_tlb()
    assert machine.go().esr & 0x3F == 7
    machine.close()


def test_access_flag_and_address_size() -> None:
    machine, tables = stage2_machine()
    tables.set(MMIO, machine.arena.base, (S2_PAGE | S2_READ) & ~(1 << 10))
    start(machine, "ldr x1, [x9]", x9=MMIO)
    assert machine.go().esr & 0x3F == 0xB
    start(machine, "ldr x1, [x9]", x9=1 << 40)
    trap = machine.go()
    assert (trap.ec, trap.esr & 0x3C, trap.hpfar) == (DABT, 4, 1 << 40)
    machine.close()


def test_a_stage1_walk_that_faults_in_stage2_says_so() -> None:
    machine, _ = stage2_machine()
    start(
        machine, "ldr x1, [x9]", x9=MMIO, TCR_EL1=25 | 25 << 16 | 2 << 30 | 2 << 32, TTBR0_EL1=0x6000_0000, SCTLR_EL1=1
    )
    trap = machine.go()
    assert trap.ec == IABT  # the first fetch already
    assert trap.esr & 1 << 7
    assert trap.hpfar == 0x6000_0000
    machine.close()


@pytest.mark.parametrize("shift", [12, 14, 16])
@pytest.mark.parametrize("bits", [32, 36, 40, 42, 44, 48])
def test_every_granule_and_size(shift: int, bits: int) -> None:
    """RAM and MMIO in the highest gigabyte of the IPA space, addresses up to 2^48 - 1 with the patched limit."""
    machine = Machine()
    levels = max(2, (bits - 8) // (shift - 3))
    tables = Tables(machine.arena, shift, bits, start=4 - levels)
    ram = (1 << bits) - (1 << 30)
    tables.pages(ram, machine.arena.base, 0x40000, S2_PAGE | S2_READ | S2_WRITE)
    machine.core.set_stage2(stage2_vtcr(shift, bits, tables.start), tables.root)
    machine.load("str x9, [x1]; ldr x2, [x1]; ldr w3, [x9, #4]")
    machine.start(ram, x1=ram + 0x20000, x9=(1 << bits) - 0x1000)
    trap = machine.go()
    assert (trap.far, trap.hpfar, trap.pc) == ((1 << bits) - 0xFFC, (1 << bits) - 0x1000, ram + 8)
    assert machine.core.x[2] == machine.arena.word(machine.arena.base + 0x20000) == (1 << bits) - 0x1000
    assert machine.core.read_sys(reg.HPFAR_EL2) >> 4 << 12 == trap.hpfar
    machine.close()
