"""WFE and YIELD as ends of `run`."""

from __future__ import annotations

import pytest

from kvm2.softkvm.cpu import registers as reg

from .machine import EL0T, EL1H, Machine

VECTORS = 0x8000
NTWE, NTWI = 1 << 18, 1 << 16


@pytest.fixture(params=["a72", "max"])
def machine(request: pytest.FixtureRequest):
    machine = Machine(request.param)
    machine.load("hvc #0xdead", at=VECTORS + 0x280)
    machine.state.sys[reg.VBAR_EL1] = machine.arena.base + VECTORS
    yield machine
    machine.close()


@pytest.mark.parametrize("hint", ["wfe", "yield"])
@pytest.mark.parametrize("pstate", [EL1H, EL0T])
def test_hints_end_the_run_behind_them(machine: Machine, hint: str, pstate: int) -> None:
    core, base = machine.core, machine.arena.base
    machine.load(f"add x7, x7, #1; {hint}; add x8, x8, #1; {hint}; svc #0", pstate=pstate, x7=0, x8=0)
    core.set_wfe_trap(True)
    assert (core.run(), core.pc - base, core.x[7], core.x[8]) == ("wfe", 8, 1, 0)
    assert (core.run(), core.pc - base, core.x[7], core.x[8]) == ("wfe", 16, 1, 1)


def test_without_it_they_do_nothing(machine: Machine) -> None:
    for wanted in (False, True, False):
        machine.core.set_wfe_trap(wanted)
        machine.load("wfe; yield; hvc #3")
        if wanted:
            assert [machine.core.run(), machine.core.run()] == ["wfe", "wfe"]
        assert machine.go().esr & 0xFFFF == 3


def test_nothing_else_is_taken_for_one(machine: Machine) -> None:
    core = machine.core
    machine.answer = lambda trap: trap.esr & 0xFFFF != 9
    core.set_wfe_trap(True)
    # A block that was left by a stop begins behind a YIELD that was not executed just now.
    machine.load("yield; 1: hvc #1; nop; sev; sevl; hvc #9")
    assert core.run() == "wfe"
    assert core.run() == "trap"
    assert (len(machine.traps), core.pc - machine.arena.base) == (2, 24)


def test_a_pending_interrupt_is_not_taken_on_the_way_out(machine: Machine) -> None:
    core, base = machine.core, machine.arena.base
    core.set_wfe_trap(True)
    machine.load("add x7, x7, #1; wfe; add x8, x8, #1; b .", pstate=0x3C5)
    assert core.run() == "wfe"
    core.pstate = 5
    core.set_irq(True)
    assert machine.go().esr & 0xFFFF == 0xDEAD
    core.save_gpr(machine.state)
    assert machine.state.elr_el1 == base + 8
    core.set_irq(False)


def test_wfi_is_still_wfi(machine: Machine) -> None:
    machine.core.set_wfe_trap(True)
    machine.load("wfi; hvc #3")
    assert (machine.core.run(), machine.core.pc - machine.arena.base) == ("wfi", 4)
