"""SVE: vector lengths, sets with gaps, and guests without it."""

from __future__ import annotations

import random

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.state import CpuState

from .machine import Machine

ON = 0x330000  # CPACR_EL1: ZEN and FPEN
LENGTH = "msr s3_0_c1_c2_0, x1; isb; rdvl x2, #1; mrs x3, s3_0_c1_c2_0; hvc #1"


def sve_machine(vqs: tuple[int, ...] | None) -> Machine:
    machine = Machine("max")
    machine.core.set_sve(vqs)
    machine.state.sys[reg.CPACR_EL1] = ON
    return machine


@pytest.mark.parametrize("limit", range(1, 17))
def test_the_limit_is_the_hypervisors(limit: int) -> None:
    machine = sve_machine(tuple(range(1, limit + 1)))
    for wanted in (1, 2, limit, 16):
        machine.run(LENGTH, x1=wanted - 1)
        assert machine.core.x[2] == 16 * min(wanted, limit)
        assert machine.core.x[3] == wanted - 1
    machine.close()


@pytest.mark.parametrize("vqs", [(1, 2, 4), (1, 2, 4, 8, 16), (1, 4), (2, 4)])
def test_sets_with_gaps(vqs: tuple[int, ...]) -> None:
    machine = sve_machine(vqs)
    for wanted in range(1, 17):
        machine.run(LENGTH, x1=wanted - 1)
        lower = [vq for vq in vqs if vq <= wanted] or [min(vqs)]
        assert machine.core.x[2] == 16 * max(lower), wanted
        assert machine.core.x[3] == wanted - 1
        state = CpuState()
        machine.core.save_sys(state)
        assert state.sys[reg.ZCR_EL1] == wanted - 1
        other = sve_machine(vqs)
        other.state.sys[reg.ZCR_EL1] = wanted - 1
        other.run("rdvl x2, #1; hvc #1")
        assert other.core.x[2] == 16 * max(lower)
        other.close()
    machine.close()


@pytest.mark.parametrize("model", ["a72", "max"])
@pytest.mark.parametrize("cpacr", [ON, 0x300000])
def test_without_sve_it_is_undefined(model: str, cpacr: int) -> None:
    """On "max" with CPACR_EL1.ZEN set the hypervisor gets EC 0x19; all else is the guest's undefined instruction."""
    machine = Machine(model)
    machine.core.set_sve(None)
    machine.load("hvc #0xdead", at=0x8200)
    trap = machine.run("rdvl x2, #1; hvc #1", CPACR_EL1=cpacr, VBAR_EL1=machine.arena.base + 0x8000)
    if model == "max" and cpacr == ON:
        assert (trap.esr, trap.pc) == (0x19 << 26 | 1 << 25, machine.arena.base)
    else:
        assert trap.esr & 0xFFFF == 0xDEAD
        assert machine.core.read_sys(reg.ESR_EL1) == 1 << 25
    machine.close()


def test_the_guests_own_trap_with_sve() -> None:
    machine = sve_machine((1, 2))
    machine.load("hvc #0xdead", at=0x8200)
    machine.run("rdvl x2, #1; hvc #1", CPACR_EL1=0x300000, VBAR_EL1=machine.arena.base + 0x8000)
    assert machine.core.read_sys(reg.ESR_EL1) == 0x19 << 26 | 1 << 25
    machine.close()


@pytest.mark.parametrize("vq", [1, 3, 16])
def test_vectors_and_predicates_are_saved_and_loaded(vq: int) -> None:
    machine = sve_machine(tuple(range(1, vq + 1)))
    arena, rng = machine.arena, random.Random(vq)
    data = rng.randbytes(16 * vq)
    arena.write(arena.base + 0x20000, data)
    text = (
        "ptrue p1.b; setffr; ld1b {z31.b}, p1/z, [x4]; index z0.b, #0, #1; pfalse p2.b; hvc #1;"
        "st1b {z31.b}, p1, [x5]; hvc #2"
    )
    machine.run(text, ZCR_EL1=15, x4=arena.base + 0x20000, x5=arena.base + 0x30000)
    state = CpuState()
    machine.core.save(state)
    assert state.v[31] == data.ljust(256, b"\0")
    assert state.v[0] == bytes(range(16 * vq)).ljust(256, b"\0")
    ones = (b"\xff" * (2 * vq)).ljust(32, b"\0")
    assert (state.p[1], state.p[2], state.ffr) == (ones, bytes(32), ones)
    state.v[31] = bytes(reversed(data)).ljust(256, b"\0")
    machine.core.load(state)
    assert machine.go().esr & 0xFFFF == 2
    assert arena.read(arena.base + 0x30000, 16 * vq) == bytes(reversed(data))
    machine.close()


@pytest.mark.parametrize(("model", "vqs"), [("a72", (1,)), ("max", ()), ("max", (0, 1)), ("max", (1, 17))])
def test_impossible_lengths_are_refused(model: str, vqs: tuple[int, ...]) -> None:
    machine = Machine(model)
    with pytest.raises(EnvironmentFault, match="1 to 16 quadwords"):
        machine.core.set_sve(vqs)
    machine.close()
