"""System registers that the core does not have, answered by functions."""

from __future__ import annotations

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.registers import enc

from .machine import EL0T, EL1H, Machine

ICC_IAR1, ICC_EOIR1, ICC_PMR = enc(3, 0, 12, 12, 0), enc(3, 0, 12, 12, 1), enc(3, 0, 4, 6, 0)
VECTORS = 0x8000
UNDEF_HERE, UNDEF_EL0, IRQ_HERE = 0xDEAD, 0xDEA0, 0x1247


@pytest.fixture(params=["a72", "max"])
def machine(request: pytest.FixtureRequest):
    machine = Machine(request.param)
    machine.load(f"hvc #{UNDEF_HERE}", at=VECTORS + 0x200)
    machine.load(f"hvc #{IRQ_HERE}", at=VECTORS + 0x280)
    machine.load(f"hvc #{UNDEF_EL0}", at=VECTORS + 0x400)
    machine.state.sys[reg.VBAR_EL1] = machine.arena.base + VECTORS
    yield machine
    machine.close()


def ended(machine: Machine, text: str, **options: int) -> int:
    return machine.run(text, **options).esr & 0xFFFF


def test_reads_and_writes(machine: Machine) -> None:
    written: list[int] = []
    machine.core.define(ICC_PMR, lambda: 0xFEDC_BA98_7654_3210, written.append)
    assert machine.core.knows(ICC_PMR)
    text = "mrs x5, s3_0_c4_c6_0; msr s3_0_c4_c6_0, x6; mrs xzr, s3_0_c4_c6_0; msr s3_0_c4_c6_0, xzr; hvc #0"
    assert ended(machine, text, x6=(1 << 64) - 2) == 0
    assert machine.core.x[5] == 0xFEDC_BA98_7654_3210
    assert written == [(1 << 64) - 2, 0]


def test_one_way_registers_and_el0(machine: Machine) -> None:
    machine.core.define(ICC_IAR1, lambda: 27, None)
    machine.core.define(ICC_EOIR1, None, lambda value: None)
    for text in ("msr icc_iar1_el1, x5", "mrs x5, icc_eoir1_el1"):
        assert ended(machine, text) == UNDEF_HERE
        assert machine.core.read_sys(reg.ESR_EL1) == 1 << 25
    for text in ("mrs x5, icc_iar1_el1", "msr icc_eoir1_el1, x5"):
        assert ended(machine, text, pstate=EL0T) == UNDEF_EL0
        assert ended(machine, f"{text}; hvc #3") == 3


def test_undefined_at_run_time(machine: Machine) -> None:
    open_now = False
    machine.core.define(ICC_PMR, lambda: 1 if open_now else None, lambda value: open_now)
    for text in ("mrs x5, s3_0_c4_c6_0; hvc #3", "msr s3_0_c4_c6_0, x6; hvc #4"):
        machine.state.x[5] = 99
        open_now = False
        assert ended(machine, text) == UNDEF_HERE
        assert (machine.core.instance.pc - 4, machine.core.x[5]) == (machine.arena.base + VECTORS + 0x200, 99)
        open_now = True
        assert ended(machine, text) in (3, 4)


def test_an_interrupt_line_that_a_write_raises_counts_behind_it(machine: Machine) -> None:
    core = machine.core
    core.define(ICC_PMR, lambda: 0, lambda value: core.set_irq(bool(value)))
    base = machine.arena.base
    assert ended(machine, "msr s3_0_c4_c6_0, x6; add x7, x7, #1; hvc #3", pstate=5, x6=1, x7=0) == IRQ_HERE
    save = machine.core
    save.save_gpr(machine.state)
    assert (machine.state.elr_el1, machine.state.x[7]) == (base + 4, 0)
    core.set_irq(False)


def test_stop_in_a_write_is_exact(machine: Machine) -> None:
    core, base = machine.core, machine.arena.base
    core.define(ICC_PMR, lambda: 0, lambda value: core.stop())
    machine.load("1: add x7, x7, #1; msr s3_0_c4_c6_0, x6; add x8, x8, #1; b 1b", x7=0, x8=0)
    for turn in range(1, 200):
        assert core.run() == "stop"
        assert (core.pc - base, core.x[7], core.x[8]) == (8, turn, turn - 1)


def test_stop_in_a_read_ends_its_block(machine: Machine) -> None:
    core, base = machine.core, machine.arena.base

    def read() -> int:
        core.stop()
        return core.x[7]

    core.define(ICC_IAR1, read, None)
    machine.load("1: add x7, x7, #1; mrs x6, icc_iar1_el1; add x8, x8, #1; b 1b", x7=0, x8=0)
    for turn in range(1, 200):
        assert core.run() == "stop"
        assert (core.pc - base, core.x[6], core.x[7], core.x[8]) == (0, turn, turn, turn)


def test_a_failure_is_raised_by_run_and_the_access_comes_again(machine: Machine) -> None:
    core, base, broken = machine.core, machine.arena.base, True

    def write(value: int) -> None:
        if broken:
            raise ZeroDivisionError("for the test")

    core.define(ICC_PMR, lambda: 1 // 0, write)
    machine.load("add x7, x7, #1; msr s3_0_c4_c6_0, x6; hvc #3", x7=0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            core.run()
        assert (core.pc - base, core.x[7]) == (4, 1)
    broken = False
    assert machine.go().esr & 0xFFFF == 3
    machine.load("mrs x6, s3_0_c4_c6_0")
    with pytest.raises(ZeroDivisionError):
        core.run()


def test_what_cannot_be_defined(machine: Machine) -> None:
    core = machine.core
    with pytest.raises(EnvironmentFault, match="override"):
        core.define(reg.SCTLR_EL1, None, None)
    for wrong in (enc(1, 0, 7, 8, 0), enc(3, 4, 12, 8, 0), 1 << 16):
        with pytest.raises(EnvironmentFault, match="encoding"):
            core.define(wrong, None, None)
    core.define(ICC_PMR, None, None)
    assert ended(machine, "mrs x5, s3_0_c4_c6_0") == UNDEF_HERE


def test_the_state_of_other_registers_is_not_touched(machine: Machine) -> None:
    machine.core.define(ICC_PMR, lambda: 7, lambda value: None)
    values = {enc: 0x1111 * (at + 1) for at, enc in enumerate(reg.STORED)}
    machine.state.sys.update(values)
    assert ended(machine, "msr s3_0_c4_c6_0, x6; mrs x5, s3_0_c4_c6_0; hvc #3", pstate=EL1H) == 3
    machine.core.save_sys(machine.state)
    assert {enc: machine.state.sys[enc] for enc in values} == values
