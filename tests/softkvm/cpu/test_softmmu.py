"""Translation in Python: the same exceptions as natively, and addresses up to 52 bits."""

from __future__ import annotations

import pytest

from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu import walk

from . import test_exceptions as native
from .machine import (
    EL0T,
    EL1H,
    NO_EXEC,
    S1_PAGE,
    S2_PAGE,
    S2_READ,
    S2_WRITE,
    USER,
    Arena,
    Machine,
    Tables,
    stage2_vtcr,
)

RAM = (1 << 52) - (1 << 30)
MMIO = 1 << 51
ALL = walk.READ | walk.WRITE | walk.FETCH


class Stage2:
    """Stage 2 as a function: the arena appears at `ram`, the rest faults at level 3."""

    def __init__(self, arena: Arena, ram: int, permissions: int = ALL) -> None:
        self.arena, self.ram, self.permissions = arena, ram, permissions
        self.asked: list[tuple[int, int]] = []

    def __call__(self, ipa: int, access: int) -> tuple[int, int] | int:
        self.asked.append((ipa, access))
        offset = ipa - self.ram
        if 0 <= offset < self.arena.size:
            return self.arena.base + offset, self.permissions
        return walk.TRANSLATION | 3


def soft_machine(ram: int = RAM, model: str = "a72", **options: object) -> tuple[Machine, Stage2]:
    arena = Arena()
    stage2 = Stage2(arena, ram)
    return Machine(model, arena, soft_mmu=stage2, **options), stage2


def test_ram_and_mmio_above_48_bits_with_the_mmu_off() -> None:
    machine, stage2 = soft_machine()
    machine.load("str x2, [x1]; ldr x3, [x1]; add x3, x3, #1; ldrh w4, [x9, #6]; add x4, x4, #1; hvc #1")
    machine.start(RAM, x1=RAM + 0x20008, x2=41, x9=MMIO)
    trap = machine.go()
    assert trap.esr == 0x24 << 26 | 1 << 25 | 1 << 24 | 1 << 22 | 4 << 16 | 7
    assert (trap.far, trap.hpfar, trap.pc) == (MMIO + 6, MMIO, RAM + 12)
    assert machine.core.x[3] == 42
    assert machine.arena.word(machine.arena.base + 0x20008) == 41
    machine.core.x[4] = 9
    machine.core.pc += 4
    assert machine.go().esr & 0xFFFF == 1
    assert machine.core.x[4] == 10
    # One fill a page and kind of access at most: the TLB works.
    assert len(stage2.asked) < 10
    machine.close()


def test_a_stage2_fault_answered_by_the_handler() -> None:
    machine, stage2 = soft_machine()
    stage2.permissions = walk.READ | walk.FETCH

    def on_trap(trap: object) -> bool:
        if machine.core.syndrome >> 26 != 0x24:
            return False
        assert machine.core.syndrome & 0x7F == 0x40 | walk.PERMISSION | 3
        stage2.permissions = ALL
        machine.core.flush_tlb()
        return True

    machine.answer = on_trap
    machine.load("str x2, [x1]; str x2, [x1, #8]; hvc #3")
    machine.start(RAM, x1=RAM + 0x20000, x2=41)
    assert machine.go().esr & 0xFFFF == 3
    assert len(machine.traps) == 2
    assert machine.arena.word(machine.arena.base + 0x20008) == 41
    machine.close()


def test_beyond_the_physical_address_size() -> None:
    machine, _ = soft_machine(ram=1 << 40, soft_pa_bits=50)
    machine.load("hvc #0xdead", at=0x8200)
    machine.load("ldr x1, [x9]")
    machine.start(1 << 40, x9=1 << 50, VBAR_EL1=(1 << 40) + 0x8000)
    assert machine.go().esr & 0xFFFF == 0xDEAD
    assert machine.core.read_sys(reg.ESR_EL1) == 0x25 << 26 | 1 << 25
    assert machine.core.read_sys(reg.FAR_EL1) == 1 << 50
    machine.close()


@pytest.fixture
def everything_soft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of native translation, on Python's."""

    class Softened(Machine):
        def __init__(self, model: str = "a72", arena: Arena | None = None, **options: object) -> None:
            arena = arena or Arena()
            super().__init__(model, arena, soft_mmu=Stage2(arena, arena.base), **options)

    monkeypatch.setattr(native, "Machine", Softened)


@pytest.mark.usefixtures("everything_soft")
@pytest.mark.parametrize("shift", [12, 14, 16])
def test_as_natively(shift: int) -> None:
    native.test_a_guest_with_its_mmu_on(shift)
    native.test_a_guest_page_fault_at_el1(shift)


@pytest.mark.usefixtures("everything_soft")
def test_as_natively_after_loading_a_state() -> None:
    native.test_loading_a_state_with_the_mmu_on_into_a_fresh_core()


def wide_tables(machine: Machine, stage2: Stage2, shift: int, va_bits: int) -> tuple[int, int]:
    """Stage-1 tables whose outputs lie at `RAM`: code executable at `va`, data at `va + 1 MiB`; (va, TTBR0)."""
    arena = machine.arena
    va = (1 << va_bits) - (1 << 31)
    tables = Tables(arena, shift, va_bits)
    if shift == 16:
        encode = lambda ipa: ipa & 0xFFFF_FFFF_0000 | (ipa >> 48) << 12  # noqa: E731
    else:
        encode = lambda ipa: ipa & 0x3_FFFF_FFFF_F000 | (ipa >> 50) << 8  # noqa: E731
    # With 52-bit outputs bits 9 and 8 are the address's; shareability comes from TCR_EL1.
    attributes = S1_PAGE if shift == 16 else 1 << 10
    for offset in range(0, 0x20000, 1 << shift):
        tables.set(va + offset, encode(RAM + offset), attributes)
        tables.set(va + (1 << 20) + offset, encode(RAM + (2 << 20) + offset), attributes | NO_EXEC | USER)
    _relocate(tables, encode, RAM - arena.base)
    root = tables.root + RAM - arena.base
    return va, root & 0xFFFF_FFFF_FFC0 | (root >> 48) << 2


def _relocate(tables: Tables, encode: object, distance: int) -> None:
    """Turns the tables' own links, written as host addresses, into IPAs."""

    def descend(table: int, level: int) -> None:
        width = tables.top if level == tables.start else tables.stride
        for index in range(1 << width):
            entry = tables.arena.word(table + 8 * index)
            if level < 3 and entry & 3 == 3:
                following = entry & 0xFFFFFFFFF000 & -(1 << tables.shift)
                descend(following, level + 1)
                tables.arena.put(table + 8 * index, encode(following + distance) | 3)  # type: ignore[operator]

    descend(tables.root, tables.start)


@pytest.mark.parametrize(("shift", "va_bits", "ds"), [(16, 48, 0), (16, 52, 0), (12, 48, 1), (12, 52, 1), (14, 48, 1)])
def test_52_bit_outputs(shift: int, va_bits: int, ds: int) -> None:
    """64K granules with 52-bit output, and LPA2's 4K and 16K, with 48 and 52 bits of input."""
    machine, stage2 = soft_machine()
    va, ttbr = wide_tables(machine, stage2, shift, va_bits)
    size = 64 - va_bits
    tcr = size | {12: 0, 14: 2, 16: 1}[shift] << 14 | 1 << 23 | 6 << 32 | ds << 59
    machine.load("str x2, [x9]; ldr x3, [x9]; at s1e1w, x9; mrs x4, par_el1; at s1e0r, x10; mrs x5, par_el1; hvc #1")
    machine.start(va, x2=77, x9=va + (1 << 20) + 8, x10=va, TCR_EL1=tcr, TTBR0_EL1=ttbr, SCTLR_EL1=1, MAIR_EL1=0xFF)
    assert machine.go().esr & 0xFFFF == 1, hex(machine.traps[-1].esr)
    assert machine.core.x[3] == machine.arena.word(machine.arena.base + (2 << 20) + 8) == 77
    assert machine.core.x[4] & ~0xFFF & (1 << 52) - 1 == RAM + (2 << 20)
    assert machine.core.x[5] & 0x7F == (walk.PERMISSION | 3) << 1 | 1
    machine.close()


def test_a_descriptor_that_stage2_does_not_map() -> None:
    machine, _ = soft_machine()
    machine.load("nop")
    machine.start(0x1000, TCR_EL1=16 | 1 << 23 | 5 << 32, TTBR0_EL1=0x7000, SCTLR_EL1=1)
    trap = machine.go()
    assert trap.esr == 0x20 << 26 | 1 << 25 | 1 << 7 | 7
    assert (trap.hpfar, trap.far) == (0x7000, 0x1000)
    machine.close()


def test_unprivileged_accesses_at_el1() -> None:
    machine, _ = soft_machine(ram=1 << 40)
    arena = machine.arena
    machine.load("hvc #0xdead", at=0x8200)
    tables = Tables(arena, 12, 39)
    tables.set(0x1000, (1 << 40), S1_PAGE)
    tables.set(0x2000, (1 << 40) + 0x20000, S1_PAGE | NO_EXEC)
    tables.set(0x3000, (1 << 40) + 0x20000, S1_PAGE | NO_EXEC | USER)
    tables.set(0x8000, (1 << 40) + 0x8000, S1_PAGE)
    _relocate(tables, lambda ipa: ipa, (1 << 40) - arena.base)
    machine.load("ldr x1, [x9]; ldtr x2, [x10]; ldtr x3, [x9]")
    machine.start(
        0x1000,
        pstate=EL1H,
        x9=0x2000,
        x10=0x3000,
        TCR_EL1=25 | 1 << 23 | 5 << 32,
        TTBR0_EL1=tables.root - arena.base + (1 << 40),
        SCTLR_EL1=1,
        VBAR_EL1=0x8000,
    )
    assert machine.go().esr & 0xFFFF == 0xDEAD
    state_esr = machine.core.read_sys(reg.ESR_EL1)
    assert state_esr == 0x25 << 26 | 1 << 25 | walk.PERMISSION | 3
    machine.core.save(machine.state)
    assert machine.state.elr_el1 == 0x1008
    assert EL0T == 0x3C0
    machine.close()


def test_an_interrupt_at_the_moment_of_a_fault_is_taken_first() -> None:
    machine, stage2 = soft_machine()
    machine.load("mrs x6, elr_el1; hvc #2; eret", at=0x8280)

    def on_trap(trap: object) -> bool:
        machine.core.set_irq(False)
        return machine.core.syndrome & 0xFFFF == 2 and machine.core.syndrome >> 26 == 0x16

    def pend(ipa: int, access: int) -> tuple[int, int] | int:
        if ipa & ~0xFFF == MMIO and len(machine.traps) == 0:
            machine.core.set_irq(True)
        return stage2(ipa, access)

    machine.core._soft._stage2 = pend
    machine.answer = on_trap
    machine.load("ldr x1, [x9]; hvc #1")
    machine.start(RAM, pstate=EL1H & ~0x80, x9=MMIO, VBAR_EL1=RAM + 0x8000)
    assert machine.go().far == MMIO
    assert machine.traps[0].esr & 0xFFFF == 2
    assert machine.core.x[6] == RAM
    assert machine.core.pc == RAM
    machine.close()


@pytest.mark.parametrize("mapped", [False, True])
def test_only_what_lies_above_48_bits(mapped: bool) -> None:
    """The emulator translates; its address-size fault at 2^50 becomes the stage-2 fault that this host would report."""
    arena = Arena()
    asked = []

    def stage2(ipa: int, access: int) -> tuple[int, int] | int:
        asked.append((ipa, access))
        return walk.TRANSLATION | 3

    machine = Machine("a72", arena, soft_mmu=stage2, above_48_only=True, soft_pa_bits=52 if mapped else 50)
    tables = Tables(arena, 12, 40, start=1)
    tables.pages(0x4000_0000, arena.base, 0x40000, S2_PAGE | S2_READ | S2_WRITE)
    machine.core.set_stage2(stage2_vtcr(12, 40, 1), tables.root)
    machine.load("hvc #0xdead", at=0x8200)
    machine.load("ldr w1, [x9, #4]; str x1, [x10]; hvc #1")
    machine.start(0x4000_0000, x9=1 << 50, x10=0x5000_0000, VBAR_EL1=0x4000_8000)
    trap = machine.go()
    if not mapped:  # beyond this host's physical addresses: the guest's own fault
        assert trap.esr & 0xFFFF == 0xDEAD
        assert machine.core.read_sys(reg.ESR_EL1) & 0x3C == 0
    else:
        assert asked == [(1 << 50 | 0, walk.READ)] or asked == [(1 << 50 | 4, walk.READ)]
        assert trap.esr == 0x24 << 26 | 1 << 25 | 1 << 24 | 2 << 22 | 1 << 16 | 7
        assert (trap.far, trap.hpfar, trap.pc) == (1 << 50 | 4, 1 << 50, 0x4000_0000)
        machine.core.pc += 4
        assert machine.go().hpfar == 0x5000_0000  # and below, the emulator's own
    machine.close()


def pages(**overrides: int) -> tuple[walk.Regime, dict[int, int]]:
    """A 4K regime with one page: 0x1000 -> 0x5000, table addresses 0x10000 + level * 0x1000."""
    leaf = overrides.pop("leaf", 0x5000 | 1 << 10 | 3)
    links = overrides.pop("links", 0)
    memory = {0x10000: 0x11000 | 3 | links, 0x11000: 0x12000 | 3, 0x12000: 0x13000 | 3, 0x13008: leaf}
    regime = {"sctlr": 1, "tcr": 16 | 5 << 32, "ttbr0": 0x10000, "ttbr1": 0} | overrides
    return walk.Regime(**regime), memory


def run_walk(regime: walk.Regime, memory: dict[int, int], access: walk.Access, va: int = 0x1234) -> walk.Translation:
    def descriptor(ipa: int, value: int | None) -> int:
        if value is not None:
            memory[ipa] = value
        return memory.get(ipa, 0)

    return walk.translate(regime, va, access, descriptor)


@pytest.mark.parametrize(
    ("leaf", "unprivileged", "expected"),
    [
        (0, False, ALL),
        (USER, False, walk.READ | walk.WRITE),  # EL0 can write it, so EL1 does not execute it
        (USER, True, ALL),
        (0, True, walk.FETCH),
        (1 << 7, False, walk.READ | walk.FETCH),
        (USER | 1 << 7, True, walk.READ | walk.FETCH),
        (USER | 1 << 54, True, walk.READ | walk.WRITE),
        (1 << 53, False, walk.READ | walk.WRITE),
    ],
)
def test_permissions(leaf: int, unprivileged: bool, expected: int) -> None:
    regime, memory = pages(leaf=0x5000 | 1 << 10 | 3 | leaf)
    for kind in (walk.READ, walk.WRITE, walk.FETCH):
        access = walk.Access(kind, unprivileged)
        if kind & expected:
            assert run_walk(regime, memory, access) == walk.Translation(0x5234, expected, 3)
        else:
            with pytest.raises(walk.WalkFault) as caught:
                run_walk(regime, memory, access)
            assert caught.value.status == 0xF


@pytest.mark.parametrize(
    ("links", "denied", "unprivileged"),
    [
        (1 << 62, walk.WRITE, False),
        (1 << 61, walk.READ, True),
        (1 << 59, walk.FETCH, False),
        (1 << 60, walk.FETCH, True),
    ],
)
def test_hierarchical_permissions(links: int, denied: int, unprivileged: bool) -> None:
    regime, memory = pages(leaf=0x5000 | 1 << 10 | 3 | USER * unprivileged, links=links)
    with pytest.raises(walk.WalkFault):
        run_walk(regime, memory, walk.Access(denied, unprivileged))
    regime, memory = pages(leaf=0x5000 | 1 << 10 | 3 | USER * unprivileged, links=links, tcr=16 | 5 << 32 | 1 << 41)
    run_walk(regime, memory, walk.Access(denied, unprivileged))


@pytest.mark.parametrize(
    ("change", "va", "status"),
    [
        ({}, 0x2000, 7),
        ({}, 1 << 47, 4),  # level 0 has no entry there
        ({}, 1 << 48, 4),  # out of range
        ({"tcr": 16 | 5 << 32 | 1 << 7}, 0x1000, 4),  # EPD0
        ({"leaf": 0x5000 | 3}, 0x1000, 0xB),
        ({"leaf": 0x5000 | 1 << 10 | 1}, 0x1000, 7),  # no blocks at level 3
        ({"leaf": 1 << 44 | 1 << 10 | 3, "tcr": 16 | 3 << 32}, 0x1000, 3),  # beyond IPS
        ({"ttbr0": 1 << 44, "tcr": 16 | 3 << 32}, 0x1000, 0),
        ({"tcr": 12 | 5 << 32 | 1 << 59, "ttbr0": 0x20000}, 0x1000, 0x2B),  # level -1
    ],
)
def test_faults(change: dict[str, int], va: int, status: int) -> None:
    regime, memory = pages(**change)
    with pytest.raises(walk.WalkFault) as caught:
        run_walk(regime, memory, walk.Access(walk.READ, False), va)
    assert (caught.value.status, caught.value.ipa) == (status, None)


def test_tags_pan_and_wxn() -> None:
    regime, memory = pages(tcr=16 | 5 << 32 | 1 << 37)
    assert run_walk(regime, memory, walk.Access(walk.READ, False), 0xAB << 56 | 0x1234).ipa == 0x5234
    regime, memory = pages(leaf=0x5000 | 1 << 10 | 3 | USER)
    with pytest.raises(walk.WalkFault):
        run_walk(regime, memory, walk.Access(walk.READ, False, pan=True))
    assert run_walk(regime, memory, walk.Access(walk.READ, True, pan=True)).ipa == 0x5234
    regime, memory = pages(sctlr=1 | 1 << 19)
    with pytest.raises(walk.WalkFault):
        run_walk(regime, memory, walk.Access(walk.FETCH, False))


def test_hardware_flags() -> None:
    leaf = 0x5000 | 3 | 1 << 51 | 1 << 7
    regime, memory = pages(leaf=leaf, tcr=16 | 5 << 32 | 3 << 39)
    assert run_walk(regime, memory, walk.Access(walk.READ, False)).permissions == walk.READ | walk.FETCH
    assert memory[0x13008] == leaf | 1 << 10
    assert run_walk(regime, memory, walk.Access(walk.WRITE, False)).permissions == ALL
    assert memory[0x13008] == (leaf | 1 << 10) & ~(1 << 7)


@pytest.mark.parametrize(
    ("tcr", "level", "span"),
    [(16, 1, 30), (16, 2, 21), (16 | 2 << 14, 2, 25), (22 | 1 << 14, 2, 29)],
)
def test_blocks(tcr: int, level: int, span: int) -> None:
    shift = {0: 12, 2: 14, 1: 16}[tcr >> 14 & 3]
    start = 4 - -(-(64 - (tcr & 63) - shift) // (shift - 3))
    memory: dict[int, int] = {}
    va = (3 << span) + 0x1234567
    table = 0x100000
    for at in range(start, level + 1):
        low = shift + (shift - 3) * (3 - at)
        width = min(64 - (tcr & 63) - low, shift - 3)
        following = table + 0x100000
        memory[table + 8 * (va >> low & (1 << width) - 1)] = (1 << 40 | 1 << 10 | 1) if at == level else following | 3
        table = following
    regime = walk.Regime(1, tcr | 5 << 32, 0x100000, 0)
    result = run_walk(regime, memory, walk.Access(walk.READ, False), va)
    assert (result.ipa, result.level) == (1 << 40 | 0x1234567 % (1 << span), level)
