"""Moving a vCPU's state in and out of a core, and from one core to another in the middle of a program."""

from __future__ import annotations

import random
import threading

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.core import NATIVE
from kvm2.softkvm.cpu.state import CpuState

from .machine import EL0T, EL1H, EL1T, Arena, Machine

WRITABLE = {  # registers of which the core keeps only some bits (the Arm ARM's RES0 and the models' widths)
    reg.ZCR_EL1: 0xF,
    reg.VBAR_EL1: ~0x1F,
}
MASK = (1 << 64) - 1


def name(enc: int) -> str:
    return f"s{enc >> 14}_{enc >> 11 & 7}_c{enc >> 7 & 15}_c{enc >> 3 & 15}_{enc & 7}"


def random_state(model: str, rng: random.Random) -> CpuState:
    state = CpuState()
    state.x = [rng.getrandbits(64) for _ in range(31)]
    state.pc, state.sp_el0, state.sp_el1, state.elr_el1 = (rng.getrandbits(48) & ~3 for _ in range(4))
    state.spsr = [rng.getrandbits(32) for _ in range(5)]
    state.pstate = rng.choice((EL0T, EL1T, EL1H)) & ~0x3C0 | rng.choice((0, 0x80, 0x3C0)) | rng.getrandbits(4) << 28
    length = 256 if model == "max" else 16
    state.v = [rng.randbytes(length).ljust(256, b"\0") for _ in range(32)]
    state.p = [rng.randbytes(length // 8).ljust(32, b"\0") for _ in range(16)]
    state.ffr = rng.randbytes(length // 8).ljust(32, b"\0")
    state.fpsr, state.fpcr = rng.choice((0, 0x9F, 1 << 27)), rng.choice((0, 1 << 22, 3 << 24))
    return state


@pytest.mark.parametrize("model", ["a72", "max"])
def test_round_trip_of_everything(model: str) -> None:
    rng = random.Random(1)
    machine = Machine(model)
    if model == "max":
        machine.core.set_sve(tuple(range(1, 17)))
    for _ in range(20):
        want = random_state(model, rng)
        # Settings that keep their meaning with any bits: addresses and scratch registers.
        for enc in (
            reg.TPIDR_EL0,
            reg.TPIDRRO_EL0,
            reg.TPIDR_EL1,
            reg.FAR_EL1,
            reg.MAIR_EL1,
            reg.AMAIR_EL1,
            reg.AFSR1_EL1,
        ):
            want.sys[enc] = rng.getrandbits(64)
        if model == "max":
            want.sys[reg.ZCR_EL1] = 15
        machine.core.load(want)
        got = CpuState()
        machine.core.save(got)
        for field in ("x", "pc", "pstate", "sp_el0", "sp_el1", "elr_el1", "spsr", "v", "p", "ffr", "fpsr", "fpcr"):
            assert getattr(got, field) == getattr(want, field), field
        assert {enc: got.sys[enc] for enc in want.sys} == want.sys
        assert set(got.sys) == NATIVE[model]
    machine.close()


@pytest.mark.parametrize("model", ["a72", "max"])
def test_every_native_register_is_what_the_guest_reads_and_writes(model: str) -> None:
    machine = Machine(model, pauth=model == "max")
    if model == "max":
        machine.core.set_sve((1, 2, 3, 4))
    state = CpuState()
    machine.start(machine.arena.base, CPACR_EL1=0x330000)
    for enc in sorted(NATIVE[model]):
        before = machine.core.read_sys(enc)
        # Not the MMU, EE, debug or breakpoint enables: the test's own code must go on.
        value = 0x5A5A_1234_5678_9AB0 & WRITABLE.get(enc, MASK)
        if enc in (reg.SCTLR_EL1, reg.CPACR_EL1, reg.MDSCR_EL1, reg.CNTKCTL_EL1) or enc >> 14 == 2:
            value = before ^ (1 << 26 if enc == reg.SCTLR_EL1 else 1 << 12 if enc == reg.MDSCR_EL1 else 0)
            if enc >> 14 == 2 and enc & 7 in (4, 6) and enc >> 3 & 15 < 4:
                value = 0x0000_1234_5678_9AB0
        trap = machine.run(f"msr {name(enc)}, x1; isb; mrs x2, {name(enc)}; hvc #1", x1=value, x2=0)
        assert trap.ec == 0x16, name(enc)
        assert machine.core.x[2] == value, name(enc)
        machine.core.save_sys(state)
        assert state.sys[enc] == value, name(enc)
        machine.state.sys[enc] = before
        machine.core.load(machine.state)
        trap = machine.run(f"mrs x2, {name(enc)}; hvc #1", x2=1)
        assert machine.core.x[2] == before, name(enc)
    machine.close()


def test_saving_by_group_touches_only_the_group() -> None:
    machine = Machine()
    machine.load("hvc #0", x3=7, sp_el1=0x100)
    machine.core.write_sys(reg.TPIDR_EL1, 5)
    state = CpuState()
    machine.core.save_gpr(state)
    assert (state.x[3], state.sp_el1, state.sys, state.v[0]) == (7, 0x100, {}, bytes(256))
    state = CpuState()
    machine.core.save_sys(state)
    assert state.sys[reg.TPIDR_EL1] == 5
    assert state.x[3] == 0
    machine.core.save_fp(state)
    assert state.x[3] == 0
    machine.close()


@pytest.mark.parametrize("pstate", [0x1D3, 0x3C9, 0x3CD, 0x10])
def test_modes_that_the_core_does_not_execute_are_refused(pstate: int) -> None:
    machine = Machine()
    state = CpuState()
    state.pstate = pstate
    with pytest.raises(EnvironmentFault, match="EL0t, EL1t and EL1h"):
        machine.core.load(state)
    machine.close()


def test_writing_pstate_switches_the_stack_pointer() -> None:
    machine = Machine()
    machine.load("nop; hvc #0", pstate=EL1H, sp_el0=0x1000, sp_el1=0x2000)
    machine.core.pstate = EL1T
    assert machine.core.instance.sp.value == 0x1000
    machine.core.pstate = 0x600003C5
    assert machine.core.instance.sp.value == 0x2000
    assert machine.core.pstate == 0x600003C5
    state = CpuState()
    machine.core.save_gpr(state)
    assert (state.sp_el0, state.sp_el1) == (0x1000, 0x2000)
    machine.close()


PROGRAM = """
1: add x1, x1, #1
   madd x2, x2, x3, x1
   ucvtf d0, x1
   fadd d1, d1, d0
   eor v2.16b, v2.16b, v1.16b
   str x2, [x4]
   ldr x5, [x4]
   adds x6, x6, x5
   adc x7, x7, xzr
   tst x1, #0x3f
   b.ne 2f
   svc #3
2: cmp x1, x9
   b.ne 1b
   hvc #1
"""
# At the vector for exceptions from EL1 with its own stack: counts, and goes back.
VECTOR = "add x8, x8, #1; mrs x10, elr_el1; add x11, x11, x10; eret"
TURNS = 200_000


def run_program(arena: Arena, machines: list[Machine], hop: bool) -> tuple[CpuState, int]:
    state, at, hops, done = CpuState(), 0, 0, threading.Event()

    def disturb() -> None:
        rng = random.Random(3)
        while not done.wait(rng.random() * 0.0005):
            machines[at % len(machines)].core.stop()

    machines[0].load(VECTOR, at=0x10200)
    registers = {"x3": 0x9E3779B97F4A7C15, "x4": arena.base + 0x20000, "x9": TURNS}
    machines[0].load(PROGRAM, VBAR_EL1=arena.base + 0x10000, **registers)
    thread = threading.Thread(target=disturb)
    if hop:
        thread.start()
    try:
        while (outcome := machines[at % len(machines)].core.run()) != "trap":
            assert outcome == "stop"
            machines[at % len(machines)].core.save(state)
            machines[(at + 1) % len(machines)].core.load(state)
            at += 1
            hops += 1
    finally:
        done.set()
        if hop:
            thread.join()
    machine = machines[at % len(machines)]
    assert machine.traps[-1].esr == 0x5A000001
    machine.core.save(state)
    return state, hops


def test_a_running_program_moves_between_cores() -> None:
    """Stopped at arbitrary places and continued on another core, of another model too: the same end state."""
    arena = Arena()
    machines = [Machine("a72", arena), Machine("max", arena), Machine("a72", arena)]
    alone, _ = run_program(arena, machines[:1], hop=False)
    moved, hops = run_program(arena, machines, hop=True)
    assert hops > 3
    assert moved.x == alone.x
    assert (moved.v, moved.pstate, moved.pc) == (alone.v, alone.pstate, alone.pc)
    assert moved.x[8] == TURNS // 64
    for machine in machines:
        machine.close()
