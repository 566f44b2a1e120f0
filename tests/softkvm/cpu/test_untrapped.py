"""CTR_EL0, IC IVAU and DC CVAU without traps."""

from __future__ import annotations

import pytest

from kvm2.softkvm.cpu import registers as reg

from .machine import EL0T, Machine

VECTORS = 0x8000
UCT, UCI = 1 << 15, 1 << 26
SYS64 = 0x18


@pytest.fixture(params=["a72", "max"])
def machine(request: pytest.FixtureRequest):
    machine = Machine(request.param)
    machine.load("hvc #0xdead", at=VECTORS + 0x200)
    machine.load("hvc #0xdea0", at=VECTORS + 0x400)
    machine.state.sys[reg.VBAR_EL1] = machine.arena.base + VECTORS
    yield machine
    machine.close()


def test_the_cache_type(machine: Machine) -> None:
    machine.core.set_cache_type(0x9444_C004)
    assert machine.run("mrs x5, ctr_el0; hvc #1").esr & 0xFFFF == 1
    assert machine.core.x[5] == 0x9444_C004
    # EL0 as EL1 lets it; the EL1 handler's HVC ends the test.
    trap = machine.run("mrs x6, ctr_el0; svc #0", pstate=EL0T, SCTLR_EL1=UCT)
    assert (trap.esr & 0xFFFF, machine.core.x[6]) == (0xDEA0, 0x9444_C004)
    assert machine.core.read_sys(reg.ESR_EL1) == 0x56000000
    trap = machine.run("mrs x7, ctr_el0; svc #0", pstate=EL0T, SCTLR_EL1=0)
    assert machine.core.read_sys(reg.ESR_EL1) >> 26 == SYS64


@pytest.mark.parametrize(
    "text", ["msr csselr_el1, x3", "mrs x3, csselr_el1", "mrs x3, ccsidr_el1", "mrs x3, clidr_el1", "mrs x3, aidr_el1"]
)
def test_the_other_registers_of_caches_still_trap(machine: Machine, text: str) -> None:
    machine.core.set_cache_type(1)
    trap = machine.run(text)
    assert (trap.ec, trap.pc - machine.arena.base) == (SYS64, 0)


def test_the_code_that_changed(machine: Machine) -> None:
    seen: list[int | None] = []
    machine.core.watch_code(seen.append)
    line = machine.arena.base + 0x1040
    assert machine.run("dc cvau, x4; ic ivau, x4; ic ivau, x5; hvc #1", x4=line, x5=1 << 50).esr & 0xFFFF == 1
    assert seen == [line, None]
    for text in ("ic iallu", "ic ialluis"):
        trap = machine.run(text)
        assert (trap.ec, trap.pc - machine.arena.base) == (SYS64, 0)


def test_el0_needs_permission(machine: Machine) -> None:
    seen: list[int | None] = []
    machine.core.watch_code(seen.append)
    for text in ("ic ivau, x4", "dc cvau, x4"):
        machine.run(text + "; svc #0", pstate=EL0T, SCTLR_EL1=0)
        assert (machine.core.read_sys(reg.ESR_EL1) >> 26, seen) == (SYS64, [])
    for text, count in (("dc cvau, x4", 0), ("ic ivau, x4", 1)):
        machine.run(text + "; svc #0", pstate=EL0T, SCTLR_EL1=UCI)
        assert (machine.core.read_sys(reg.ESR_EL1), len(seen)) == (0x56000000, count)


def test_code_behind_the_instruction_is_the_new_one(machine: Machine) -> None:
    """It drops its own block, and the one behind it, which was executed before."""
    core, base = machine.core, machine.arena.base
    core.watch_code(lambda host: core.drop_code(base, 256))
    text = "1: ic ivau, x4; isb; mov x1, #1; b 2f; 2: cbnz x2, 3f; mov x2, #1; str w9, [x10]; b 1b; 3: hvc #1"
    code = machine.load(text, x1=0, x2=0, x9=0xD2800041, x10=base + 8)  # mov x1, #2
    core.host_address(code)
    assert machine.go().esr & 0xFFFF == 1
    assert core.x[1] == 2


def test_a_failure_is_raised_and_the_instruction_comes_again(machine: Machine) -> None:
    core, broken = machine.core, True

    def changed(host: int | None) -> None:
        if broken:
            raise ZeroDivisionError

    core.watch_code(changed)
    machine.load("add x7, x7, #1; ic ivau, x4; hvc #1", x7=0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            core.run()
        assert (core.pc - machine.arena.base, core.x[7]) == (4, 1)
    broken = False
    assert machine.go().esr & 0xFFFF == 1
