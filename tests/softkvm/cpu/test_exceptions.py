"""Exceptions that the guest takes at EL1: by the core itself, and delivered by the hypervisor."""

from __future__ import annotations

import pytest

from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.debug import IDLE, MDSCR_KDE, MDSCR_MDE, MDSCR_SS, Debugging
from kvm2.softkvm.cpu.state import CpuState

from .machine import EL0T, EL1H, EL1T, NO_EXEC, S1_PAGE, TG0, TG1, USER, Machine, Tables

VECTORS = 0x8000
CODE, STACK = 0x40_0000_0000, 0x7F_0000_0000
MODES = {EL1T: 0x000, EL1H: 0x200, EL0T: 0x400}
DATA = 0x30_0000


def hook_vectors(machine: Machine) -> None:
    for offset in range(0, 0x800, 0x80):
        machine.load(f"hvc #{offset:#x}", at=VECTORS + offset)
    machine.state.sys[reg.VBAR_EL1] = machine.arena.base + VECTORS


def saved(machine: Machine) -> CpuState:
    state = CpuState()
    machine.core.save(state)
    return state


@pytest.mark.parametrize("pstate", MODES)
@pytest.mark.parametrize("inside", [True, False])
def test_delivery(pstate: int, inside: bool) -> None:
    """From EL0t, EL1t and EL1h, within the handler and while stopped: one and the same architectural entry."""
    machine = Machine()
    hook_vectors(machine)
    flags = 0x6000_0000 | pstate & ~0x3C0 | 0x200  # Z and C, D masked only
    syndrome, address = 0x96000010, 0xDEAD_BEEF_0000

    def on_trap(trap: object) -> bool:
        if inside and len(machine.traps) == 1:
            machine.core.deliver_el1(syndrome, address)
            return True
        return False

    machine.answer = on_trap
    text = "smc #1" if pstate != EL0T else "mrs x3, ctr_el0"  # the SMC of EL0 is undefined
    machine.load(text, pstate=flags, sp_el0=0x1110, sp_el1=0x2220, SCTLR_EL1=1 << 15)
    outcome = machine.core.run()
    assert outcome == "trap"
    if not inside:
        machine.core.deliver_el1(syndrome, address)
        assert machine.core.pc == machine.arena.base + VECTORS + MODES[pstate]
        assert machine.core.run() == "trap"
    assert machine.traps[-1].esr & 0xFFFF == MODES[pstate]
    state = saved(machine)
    assert state.elr_el1 == machine.arena.base
    assert state.spsr[0] == flags
    assert (state.sys[reg.ESR_EL1], state.sys[reg.FAR_EL1]) == (syndrome, address)
    assert state.pstate & 0x3CF == 0x3C5
    assert (state.sp_el0, state.sp_el1) == (0x1110, 0x2220)
    machine.close()


def test_delivery_without_an_address_leaves_far_alone() -> None:
    machine = Machine()
    hook_vectors(machine)
    machine.load("ldr x1, [x2]", x2=1 << 50)
    machine.core.write_sys(reg.FAR_EL1, 0x77)
    machine.core.deliver_el1(1 << 25)
    assert machine.go().esr & 0xFFFF == 0x200
    assert saved(machine).sys[reg.FAR_EL1] == 0x77
    machine.close()


def test_delivery_after_a_hypercall_returns_behind_it() -> None:
    machine = Machine()
    hook_vectors(machine)
    machine.answer = lambda trap: len(machine.traps) == 1 and (machine.core.deliver_el1(1 << 25), True)[1]
    machine.run("hvc #1; nop")
    assert saved(machine).elr_el1 == machine.arena.base + 4
    machine.close()


@pytest.mark.parametrize("pstate", MODES)
def test_serror(pstate: int) -> None:
    machine = Machine()
    hook_vectors(machine)
    machine.load("nop", pstate=pstate)
    machine.core.deliver_serror(0xBE000011)
    assert machine.go().esr & 0xFFFF == MODES[pstate] + 0x180
    assert saved(machine).sys[reg.ESR_EL1] == 0xBE000011
    machine.close()


TAKEN = {  # text: ESR_EL1, ELR behind the instruction
    "svc #0x11": (0x56000011, True),
    "brk #9": (0xF2000009, False),
    ".inst 0": (0x02000000, False),
    "hlt #1": (0x02000000, False),
    "mrs x1, hcr_el2": (0x02000000, False),
}


@pytest.mark.parametrize("text", TAKEN)
@pytest.mark.parametrize("pstate", MODES)
def test_the_guests_own_exceptions(text: str, pstate: int) -> None:
    machine = Machine()
    hook_vectors(machine)
    assert machine.run(text, pstate=pstate).esr & 0xFFFF == MODES[pstate]
    state = saved(machine)
    esr, behind = TAKEN[text]
    assert (state.sys[reg.ESR_EL1], state.elr_el1) == (esr, machine.arena.base + 4 * behind)
    machine.close()


def stage1_machine(shift: int, model: str = "a72", **options: object) -> tuple[Machine, Tables, Tables]:
    """MMU on: code for EL1 and EL0 low (TTBR0), vectors and data high (TTBR1); 39 or 42 or 36 bits of address."""
    machine = Machine(model, **options)
    hook_vectors(machine)
    bits = {12: 39, 14: 47, 16: 42}[shift]
    low, high = Tables(machine.arena, shift, bits), Tables(machine.arena, shift, bits)
    base, page = machine.arena.base, 1 << 16
    low.pages(CODE % (1 << bits), base, page, S1_PAGE)
    low.pages(CODE % (1 << bits) + page, base + page, page, S1_PAGE | USER)
    high.pages(0, base, page, S1_PAGE)
    high.pages(page * 4, base + DATA, page, S1_PAGE | NO_EXEC)
    size = 64 - bits
    machine.state.sys.update(
        {
            reg.TCR_EL1: size | size << 16 | TG0[shift] << 14 | TG1[shift] << 30 | 5 << 32 | 0x3500_3500,
            reg.TTBR0_EL1: low.root,
            reg.TTBR1_EL1: high.root,
            reg.MAIR_EL1: 0xFF,
            reg.VBAR_EL1: -(1 << bits) % (1 << 64) + VECTORS,
            reg.SCTLR_EL1: 1 | 1 << 12 | 1 << 2,
        }
    )
    return machine, low, high


def high_address(shift: int) -> int:
    return -(1 << {12: 39, 14: 47, 16: 42}[shift]) % (1 << 64)


def code_address(shift: int) -> int:
    return CODE % (1 << {12: 39, 14: 47, 16: 42}[shift])


@pytest.mark.parametrize("shift", [12, 14, 16])
def test_a_guest_with_its_mmu_on(shift: int) -> None:
    """EL1 writes high memory, goes down to EL0, which faults, calls, and touches what only EL1 may."""
    machine, _, _ = stage1_machine(shift)
    data, user = high_address(shift) + (4 << 16), code_address(shift) + (1 << 16)
    machine.load("svc #5; ldr x1, [x9]; str x1, [x9]; br x9", at=1 << 16)
    machine.load("str x9, [x9]; msr elr_el1, x10; msr spsr_el1, x11; eret")
    machine.start(code_address(shift), x9=data, x10=user, x11=EL0T)
    assert machine.go().esr & 0xFFFF == 0x400
    state = saved(machine)
    assert (state.sys[reg.ESR_EL1], state.elr_el1) == (0x56000005, user + 4)
    assert machine.arena.word(machine.arena.base + DATA) == data
    assert state.pc == high_address(shift) + VECTORS + 0x404
    # From EL0: permission faults of a read, and of a branch to EL1's memory.
    for at, ec, status in ((4, 0x24, 0xF), (8, 0x24, 0x4F), (12, 0x20, 0xF)):
        machine.start(user + at, pstate=EL0T, x9=data)
        assert machine.go().esr & 0xFFFF == 0x400
        state = saved(machine)
        assert state.sys[reg.ESR_EL1] == ec << 26 | 1 << 25 | status
        assert state.sys[reg.FAR_EL1] == data
        assert state.elr_el1 == (data if ec == 0x20 else user + at)
    machine.close()


@pytest.mark.parametrize("shift", [12, 14, 16])
def test_a_guest_page_fault_at_el1(shift: int) -> None:
    machine, low, _ = stage1_machine(shift)
    bad = code_address(shift) + (1 << 20)
    machine.load("str x1, [x9]; hvc #0xee")
    machine.start(code_address(shift), x9=bad, x1=55)
    assert machine.go().esr & 0xFFFF == 0x200
    assert saved(machine).sys[reg.ESR_EL1] == 0x25 << 26 | 1 << 25 | 1 << 6 | 7
    assert saved(machine).sys[reg.FAR_EL1] == bad
    low.set(bad, machine.arena.base + DATA, S1_PAGE | NO_EXEC)  # a new entry needs no flush
    machine.start(code_address(shift))
    assert machine.go().esr & 0xFFFF == 0xEE
    assert machine.arena.word(machine.arena.base + DATA) == 55
    machine.close()


def test_loading_a_state_with_the_mmu_on_into_a_fresh_core() -> None:
    """What the core derives from PSTATE and the registers must be right at once: EL0, MMU, big-endian data."""
    machine, _, _ = stage1_machine(12)
    machine.load("ldr w1, [x9]; svc #1", at=1 << 16)
    user = code_address(12) + (1 << 16)
    machine.start(user, pstate=EL0T, x9=user)
    machine.go()
    little = machine.core.x[1]
    state = saved(machine)
    state.pc, state.pstate = user, EL0T
    state.sys[reg.SCTLR_EL1] |= 1 << 24  # E0E
    other = Machine("a72", machine.arena)
    other.core.load(state)
    assert other.core.big_endian()
    assert other.go().esr & 0xFFFF == 0x400
    assert other.core.x[1].to_bytes(4, "big") == little.to_bytes(4, "little")
    assert not other.core.big_endian()  # EL1's data is little-endian
    machine.close()
    other.close()


def test_single_step_and_breakpoints_of_the_guest() -> None:
    """MDSCR_EL1.SS for EL0 code, and a hardware breakpoint at EL1, as a guest debugger uses them."""
    machine = Machine()
    hook_vectors(machine)
    machine.load("nop; nop; svc #1", at=0x1000)
    machine.load("msr elr_el1, x2; msr spsr_el1, x3; isb; eret")
    machine.start(machine.arena.base, x2=machine.arena.base + 0x1000, x3=0x1C0 & ~0x200 | 1 << 21)
    machine.core.debug.set(Debugging(MDSCR_SS))
    assert machine.go().esr & 0xFFFF == 0x400
    state = saved(machine)
    assert (state.sys[reg.ESR_EL1] >> 26, state.elr_el1) == (0x32, machine.arena.base + 0x1004)
    machine.load("msr daifclr, #8; nop; nop; hvc #0xbb", pstate=EL1H)
    machine.core.debug.set(Debugging(MDSCR_MDE | MDSCR_KDE, breakpoints=((machine.arena.base + 8, 0x1E7),)))
    assert machine.go().esr & 0xFFFF == 0x200
    state = saved(machine)
    assert (state.sys[reg.ESR_EL1] >> 26, state.elr_el1) == (0x31, machine.arena.base + 8)
    machine.core.debug.set(IDLE)
    machine.start(machine.arena.base)
    assert machine.go().esr & 0xFFFF == 0xBB
    machine.close()
