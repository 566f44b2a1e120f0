"""Pages that are mapped before the guest touches them: only in plain memory of this library's own."""

from __future__ import annotations

from kvm2.softkvm import memory
from kvm2.softkvm.faults import FAULT_AROUND

from .rig import RAM, Bench, bench

PAGE = 4096
STORE = "str x1, [x2]\n mov x0, #0x84000000\n add x0, x0, #8\n hvc #0"  # and PSCI SYSTEM_OFF
TOUCHED = 40  # the page that is stored to; code lies in page 0


def mapped(b: Bench) -> set[int]:
    stage2 = b.kvm.backend.inspect(b.vm.fd).stage2
    return {(leaf.ipa - RAM) // PAGE for leaf in stage2.leaves()}


def test_the_neighbours_are_mapped_too():
    with bench() as b:
        b.run(STORE, x1=7, x2=RAM + TOUCHED * PAGE)
        first = TOUCHED & -FAULT_AROUND
        assert mapped(b) == {0} | set(range(first, first + FAULT_AROUND))
        assert b.ram.read(TOUCHED * PAGE, 8) == (7).to_bytes(8, "little")


def test_not_while_writes_are_logged():
    with bench(log_dirty=True) as b:
        b.run(STORE, x1=7, x2=RAM + TOUCHED * PAGE)
        assert mapped(b) == {0, TOUCHED}
        assert int.from_bytes(b.ram.dirty_log(), "little") & ~1 == 1 << TOUCHED


def test_not_in_memory_of_somebody_else():
    with bench() as b:
        memory.not_plain(b.ram.hva)  # as if a VMM had made it, who may serve its pages one by one
        b.run(STORE, x1=7, x2=RAM + TOUCHED * PAGE)
        assert mapped(b) == {0, TOUCHED}


def test_not_beyond_the_slot():
    with bench(size=(TOUCHED + 2) * PAGE) as b:
        b.run(STORE, x1=7, x2=RAM + TOUCHED * PAGE)
        assert mapped(b) == {0} | set(range(TOUCHED & -FAULT_AROUND, TOUCHED + 2))
