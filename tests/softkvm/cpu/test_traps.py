"""What reaches the hypervisor, with which syndrome, and what the guest takes itself."""

from __future__ import annotations

import pytest

from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.decode import sysreg_trap_iss

from .asm import asm
from .machine import EL0T, EL1H, Machine

SYS64 = 0x18
VECTORS = 0x8000
UNDEF_AT_EL1 = "hvc #0xdead"

# text -> (EC, ISS or None: as decoded from the word, PC after the trap minus the instruction)
TRAPS = {
    "hvc #0": (0x16, 0, 4),
    "hvc #0xffff": (0x16, 0xFFFF, 4),
    "smc #3": (0x17, 3, 0),
    "mrs x5, id_aa64pfr0_el1": (SYS64, None, 0),
    "mrs xzr, id_aa64mmfr0_el1": (SYS64, None, 0),
    "mrs x3, s3_0_c0_c7_7": (SYS64, None, 0),  # an ID register that no architecture version has yet
    "mrs x3, mvfr0_el1": (SYS64, None, 0),
    "mrs x3, ctr_el0": (SYS64, None, 0),
    "mrs x3, clidr_el1": (SYS64, None, 0),
    "mrs x3, ccsidr_el1": (SYS64, None, 0),
    "msr csselr_el1, x3": (SYS64, None, 0),
    "mrs x3, aidr_el1": (SYS64, None, 0),
    "mrs x3, revidr_el1": (SYS64, None, 0),
    "mrs x3, actlr_el1": (SYS64, None, 0),
    "mrs x3, pmcr_el0": (SYS64, None, 0),
    "msr pmccntr_el0, x7": (SYS64, None, 0),
    "mrs x3, pmevtyper0_el0": (SYS64, None, 0),
    "msr cntp_ctl_el0, x3": (SYS64, None, 0),
    "mrs x9, cntp_cval_el0": (SYS64, None, 0),
}


@pytest.fixture(params=["a72", "max"])
def machine(request: pytest.FixtureRequest):
    machine = Machine(request.param)
    machine.load(UNDEF_AT_EL1, at=VECTORS + 0x200)
    machine.load(UNDEF_AT_EL1, at=VECTORS + 0x400)
    machine.state.sys[reg.VBAR_EL1] = machine.arena.base + VECTORS
    yield machine
    machine.close()


@pytest.mark.parametrize("text", TRAPS)
def test_trap(machine: Machine, text: str) -> None:
    ec, iss, step = TRAPS[text]
    if iss is None:
        iss = sysreg_trap_iss(int.from_bytes(asm(text), "little"))
    trap = machine.run(text)
    assert (trap.esr, trap.pc - machine.arena.base) == (ec << 26 | 1 << 25 | iss, step)


def test_system_registers_from_el0_go_where_the_architecture_says(machine: Machine) -> None:
    # CTR_EL0 with SCTLR_EL1.UCT: allowed by EL1, trapped by HCR_EL2.TID2. Without UCT: the guest kernel's trap.
    trap = machine.run("mrs x3, ctr_el0", pstate=EL0T, SCTLR_EL1=1 << 15)
    assert trap.ec == SYS64
    trap = machine.run("mrs x3, ctr_el0", pstate=EL0T, SCTLR_EL1=0)
    assert trap.esr & 0xFFFF == 0xDEAD
    assert machine.core.read_sys(reg.ESR_EL1) == SYS64 << 26 | 1 << 25 | sysreg_trap_iss(0xD53B0023)
    # ID registers are undefined at EL0, which the guest kernel emulates: not the hypervisor's.
    assert machine.run("mrs x3, id_aa64pfr0_el1", pstate=EL0T).esr & 0xFFFF == 0xDEAD
    assert machine.core.read_sys(reg.ESR_EL1) == 1 << 25


@pytest.mark.parametrize("text", ["msr daifset, #2", "msr daifclr, #15"])
def test_interrupt_masks_from_el0(machine: Machine, text: str) -> None:
    word = int.from_bytes(asm(text), "little")
    machine.run(text, pstate=EL0T, SCTLR_EL1=0)
    assert machine.core.read_sys(reg.ESR_EL1) == SYS64 << 26 | 1 << 25 | sysreg_trap_iss(word)
    assert machine.core.x[0] == 0
    trap = machine.run(text + "; svc #1", pstate=EL0T, SCTLR_EL1=1 << 9)
    assert machine.core.read_sys(reg.ESR_EL1) == 0x56000001
    assert trap.esr & 0xFFFF == 0xDEAD


def test_cache_maintenance_traps_only_with_several_vcpus(machine: Machine) -> None:
    for text in ("ic ivau, x1", "ic iallu", "ic ialluis", "dc cvau, x1"):
        assert machine.run(text + "; hvc #1", x1=machine.arena.base).ec == 0x16
        machine.core.set_traps(smp=True)
        trap = machine.run(text + "; hvc #1")
        assert trap.esr == SYS64 << 26 | 1 << 25 | sysreg_trap_iss(int.from_bytes(asm(text), "little"))
        machine.core.set_traps(smp=False)


def test_identity(machine: Machine) -> None:
    machine.core.set_id(0x413FD0C1, 0x80000102)
    machine.run("mrs x1, midr_el1; mrs x2, mpidr_el1; mrs x3, currentel; hvc #1")
    assert list(machine.core.x[1:4]) == [0x413FD0C1, 0x80000102, 4]


def test_undefined_instructions_can_be_emulated(machine: Machine) -> None:
    seen = []

    def emulate(word: int) -> bool:
        seen.append(word)
        if word == 0xD538CC03:  # mrs x3, icc_iar1_el1
            machine.core.x[3] = 27
            machine.core.pc += 4
            return True
        return False

    machine.core.on_undef = emulate
    assert machine.run("mrs x3, s3_0_c12_c12_0; add x3, x3, #1; hvc #1").esr & 0xFFFF == 1
    assert machine.core.x[3] == 28
    assert machine.run("msr s3_0_c12_c12_1, x3; hvc #1").esr & 0xFFFF == 0xDEAD
    assert seen == [0xD538CC03, 0xD518CC23]
    assert machine.core.read_sys(reg.ESR_EL1) == 1 << 25
    assert machine.core.instance.engine.read_reg(machine.core.instance.handle, 267) == machine.arena.base


def test_handled_traps_go_on_in_the_guest(machine: Machine) -> None:
    machine.answer = lambda trap: trap.esr & 0xFFFF != 9
    assert machine.run("hvc #1; hvc #2; add x1, x1, #5; hvc #9; nop", x1=1).esr & 0xFFFF == 9
    assert [trap.esr & 0xFFFF for trap in machine.traps] == [1, 2, 9]
    assert machine.core.x[1] == 6
    assert machine.core.pc == machine.arena.base + 16


def test_an_error_of_the_handler_is_raised_by_run(machine: Machine) -> None:
    def fail(trap: object) -> bool:
        raise LookupError("from the handler")

    machine.answer = fail
    machine.load("hvc #1; hvc #2")
    with pytest.raises(LookupError, match="from the handler"):
        machine.core.run()
    machine.answer = lambda trap: False
    assert machine.go().esr & 0xFFFF == 1  # it comes again, as it was not answered
    assert machine.go().esr & 0xFFFF == 2


def test_an_error_behind_the_answer_to_a_hypercall(machine: Machine) -> None:
    def fail(trap: object) -> bool:
        machine.core.answered = True
        raise LookupError("from the handler")

    machine.answer = fail
    machine.load("hvc #1; hvc #2")
    with pytest.raises(LookupError, match="from the handler"):
        machine.core.run()
    machine.answer = lambda trap: False
    assert machine.go().esr & 0xFFFF == 2


def test_waiting_for_an_interrupt(machine: Machine) -> None:
    machine.load("wfi; hvc #1")
    assert machine.core.run() == "wfi"
    assert machine.core.pc == machine.arena.base + 4
    assert machine.go().esr & 0xFFFF == 1
    assert machine.run("wfe; yield; hvc #2").esr & 0xFFFF == 2
    # A pending interrupt, even a masked one, is no reason to wait.
    machine.core.set_irq(True)
    assert machine.run("wfi; hvc #3").esr & 0xFFFF == 3
    machine.core.set_irq(False)
    machine.load("wfi; hvc #4", pstate=EL0T, SCTLR_EL1=1 << 16)
    assert machine.core.run() == "wfi"
    assert machine.run("wfi", pstate=EL0T, SCTLR_EL1=0).esr & 0xFFFF == 0xDEAD  # nTWI clear: EL1's trap
    assert machine.core.read_sys(reg.ESR_EL1) >> 26 == 1


def test_interrupt_lines(machine: Machine) -> None:
    machine.load("hvc #0x80", at=VECTORS + 0x280)
    machine.load("hvc #0x100", at=VECTORS + 0x300)
    spin = "1: add x1, x1, #1; cmp x1, #100; b.ne 1b; hvc #1"
    machine.core.set_irq(True)
    assert machine.run(spin, pstate=EL1H).esr & 0xFFFF == 1  # masked
    trap = machine.run("msr daifclr, #2; nop; nop; hvc #2", pstate=EL1H)
    assert trap.esr & 0xFFFF == 0x80
    machine.core.set_irq(False)
    assert machine.run("msr daifclr, #3; nop; hvc #3").esr & 0xFFFF == 3
    machine.core.set_fiq(True)
    assert machine.run("msr daifclr, #3; nop; hvc #4").esr & 0xFFFF == 0x100
    machine.core.set_fiq(False)


def test_an_exit_does_not_take_the_pending_interrupt_on_the_way_out(machine: Machine) -> None:
    """The guest of an MMIO exit must be found at the instruction, or its completion would skip another one."""
    machine.load("hvc #0x80", at=VECTORS + 0x280)

    def raise_line(trap: object) -> bool:
        machine.core.set_irq(True)
        return False

    machine.answer = raise_line
    machine.load("smc #1; nop; hvc #2", pstate=EL1H & ~0x80)
    assert machine.go().ec == 0x17
    assert machine.core.pc == machine.arena.base
    machine.core.pc += 4
    machine.answer = lambda trap: False
    assert machine.go().esr & 0xFFFF == 0x80
    assert machine.core.instance.engine.read_reg(machine.core.instance.handle, 267) == machine.arena.base + 4


def test_a_register_answered_by_python(machine: Machine) -> None:
    written = []
    machine.core.override(reg.CNTV_CTL_EL0, lambda: 5, written.append)
    machine.core.override(reg.CNTV_CVAL_EL0, None, written.append)
    machine.run("msr cntv_ctl_el0, x1; msr cntv_cval_el0, x2; mrs x3, cntv_ctl_el0; hvc #1", x1=1, x2=1 << 63)
    assert written == [1, 1 << 63]
    assert machine.core.x[3] == 5


def test_counters(machine: Machine) -> None:
    machine.core.set_counter_offset(machine.core.counter())
    machine.run("mrs x1, cntfrq_el0; mrs x2, cntvct_el0; mrs x3, cntpct_el0; hvc #1")
    assert machine.core.x[1] == 62_500_000
    assert machine.core.x[2] < 62_500_000 < 10 * machine.core.x[3]
