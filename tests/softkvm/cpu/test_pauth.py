"""Pointer authentication: works where the guest has it, and does not exist where it has not."""

from __future__ import annotations

import pytest

from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.state import CpuState

from .machine import Machine

ENABLE = 1 << 31  # SCTLR_EL1.EnIA
TCR = 25 | 25 << 16  # 39-bit addresses: the bits above hold the code


def test_signing_and_authenticating() -> None:
    machine = Machine("max", pauth=True)
    keys = dict.fromkeys(("APIAKEYLO_EL1",), 0x1111_2222_3333_4444)
    text = (
        "mov x1, x3; pacia x1, x2; mov x4, x1; autia x4, x2; mov x5, x1; add x6, x2, #1; autia x5, x6;"
        "pacga x7, x3, x2; hvc #1"
    )
    trap = machine.run(text, x3=0x12_3456_7890, x2=99, SCTLR_EL1=ENABLE, TCR_EL1=TCR, **keys)
    assert trap.ec == 0x16
    x = machine.core.x
    assert x[1] != x[3]
    assert x[1] & (1 << 39) - 1 == x[3]
    assert x[4] == x[3]
    assert x[5] != x[3]  # the wrong modifier
    assert x[7] & 0xFFFF_FFFF == 0
    assert x[7] >> 32
    signed = x[1]
    state = CpuState()
    machine.core.save(state)
    assert state.sys[reg.APIAKEYLO_EL1] == 0x1111_2222_3333_4444
    # The same key on another core gives the same signature, another key does not.
    other = Machine("max", pauth=True)
    state.pc = machine.arena.base
    other.core.load(state)
    other.go()
    assert other.core.x[1] == signed
    state.sys[reg.APIAKEYLO_EL1] = 5
    other.core.load(state)
    other.go()
    assert other.core.x[1] != signed
    machine.close()
    other.close()


@pytest.mark.parametrize("text", ["pacga x1, x2, x3", "pacia x1, x2", "autia x1, x2", "paciasp", "retaa"])
def test_without_it_instructions_trap_where_enabled(text: str) -> None:
    """EC 9 to EL2 (HCR_EL2.API = 0), which the run loop turns into an undefined instruction."""
    machine = Machine("max")
    trap = machine.run(text + "; hvc #1", SCTLR_EL1=ENABLE, TCR_EL1=TCR)
    assert (trap.ec, trap.pc) == (9, machine.arena.base)
    machine.close()


@pytest.mark.parametrize("model", ["a72", "max"])
def test_hints_are_nothing_where_it_is_not_enabled(model: str) -> None:
    machine = Machine(model)
    assert machine.run("paciasp; autiasp; hvc #3", x30=5).esr & 0xFFFF == 3
    assert machine.core.x[30] == 5
    machine.close()
