"""Two cores on one memory, taking turns: atomics, exclusive monitors, code changed by the other."""

from __future__ import annotations

import threading

import pytest

from .machine import Arena, Machine

TURNS = 3000
LSE = "1: ldadd x3, x5, [x4]; add x1, x1, #1; cmp x1, x9; b.ne 1b; hvc #1"
EXCLUSIVE = (
    "1: ldaxr x5, [x4]; add x5, x5, #1; stlxr w6, x5, [x4]; cbnz w6, 1b; add x1, x1, #1; cmp x1, x9; b.ne 1b; hvc #1"
)


@pytest.mark.parametrize("text", [LSE, EXCLUSIVE])
def test_two_cores_share_a_counter(text: str) -> None:
    arena = Arena()
    machines = [Machine("max", arena), Machine("max", arena)]
    for number, machine in enumerate(machines):
        machine.load(text, at=0x1000 * number, x3=1, x4=arena.base + 0x20000, x9=TURNS)
    running = list(machines)
    slices = 0
    while running:
        for machine in list(running):
            machine.core.flush_tlb()
            # A stop that is already asked for when the block starts: one slice is a few blocks at most.
            machine.answer = lambda trap: False
            stopper = _soon(machine)
            outcome = machine.core.run()
            stopper.join()
            slices += 1
            if outcome == "trap":
                running.remove(machine)
    assert arena.word(arena.base + 0x20000) == 2 * TURNS
    for machine in machines:
        machine.close()


def _soon(machine: Machine) -> threading.Timer:
    thread = threading.Timer(0.0001, machine.core.stop)
    thread.start()
    return thread


def test_the_exclusive_monitor_does_not_survive_an_exit() -> None:
    """The other vCPU may have written the same value back in between: the store must fail."""
    machine = Machine()
    machine.arena.put(machine.arena.base + 0x20000, 7)
    machine.load("ldxr x5, [x4]; hvc #1; stxr w6, x5, [x4]; hvc #2", x4=machine.arena.base + 0x20000)
    machine.go()
    assert machine.go().esr & 0xFFFF == 2
    assert machine.core.x[6] == 1
    machine.close()


def test_code_changed_by_another_core_needs_a_flush() -> None:
    arena = Arena()
    one, two = Machine("a72", arena), Machine("a72", arena)
    one.run("mov x1, #1; hvc #1", at=0x1000)
    word = arena.read(arena.base + 0x2000, 4)
    two.load(
        "str w2, [x4]; dc cvau, x4; dsb ish; ic ivau, x4; dsb ish; isb; hvc #2", x2=0xD2800041, x4=arena.base + 0x1000
    )
    assert two.go().esr & 0xFFFF == 2  # mov x1, #2 over mov x1, #1
    assert word == bytes(4)
    one.core.pc = arena.base + 0x1000
    one.core.flush_code()
    one.go()
    assert one.core.x[1] == 2
    one.close()
    two.close()


@pytest.mark.parametrize("how", ["nothing", "flush", "drop", "drop the next line"])
def test_code_changed_by_the_host(how: str) -> None:
    """Written from outside the core, old code is executed until it is dropped: as on hardware without IC IVAU."""
    machine = Machine()
    target = machine.arena.base + 0x1040
    machine.load("mov x1, #1; ret", at=0x1040)
    machine.load("1: blr x4; hvc #1; b 1b", x4=target)
    machine.go()
    machine.arena.write(target, bytes.fromhex("410080d2"))  # mov x1, #2
    assert machine.core.host_address(target) == target
    if how == "flush":
        machine.core.flush_code()
    elif how.startswith("drop"):
        machine.core.drop_code(target + (64 if "next" in how else 0), 64)
    machine.go()
    assert machine.core.x[1] == (2 if how in ("flush", "drop") else 1)
    machine.close()


def test_dropping_code_within_the_handler() -> None:
    """The run loop's IC IVAU: the core goes on in the block that was dropped."""
    machine = Machine()
    machine.core.set_traps(smp=True)
    machine.load("mov x1, #1; ret", at=0x1040)

    def on_trap(trap: object) -> bool:
        core = machine.core
        if core.syndrome >> 26 != 0x18:
            return False
        host = core.host_address(core.x[4])
        machine.arena.write(core.x[4], bytes.fromhex("410080d2"))
        core.drop_code(host & -64, 64)
        core.drop_code(machine.arena.base, 64)
        core.pc += 4
        return True

    machine.answer = on_trap
    machine.load("blr x4; mov x3, x1; ic ivau, x4; isb; blr x4; hvc #1", x4=machine.arena.base + 0x1040)
    machine.go()
    assert (machine.core.x[3], machine.core.x[1]) == (1, 2)
    machine.close()


def test_code_changed_by_the_same_core_is_seen_at_once() -> None:
    machine = Machine()
    target = machine.arena.base + 0x1000
    machine.load("mov x1, #1; ret", at=0x1000)
    machine.load("blr x4; mov x3, x1; str w2, [x4]; blr x4; hvc #1", x2=0xD2800041, x4=target)
    machine.go()
    assert (machine.core.x[3], machine.core.x[1]) == (1, 2)
    machine.close()
