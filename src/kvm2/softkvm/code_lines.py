"""IC IVAU where the emulator has no translation: the guest's own tables say which line is meant.

It has none where stage 2 has not mapped the page yet (a kernel readies a program's pages that nobody has touched since
a snapshot was restored), and where privileged data accesses are forbidden (PAN), which maintenance does not mind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.abi.sysregs import SCTLR_EL1, TCR_EL1, TTBR0_EL1, TTBR1_EL1
from kvm2.errors import KvmError
from kvm2.softkvm import faults, guest_memory
from kvm2.softkvm.cpu import walk

if TYPE_CHECKING:
    from kvm2.softkvm.run import Execution
    from kvm2.softkvm.vm import Vm

_XZR: Final = 31
_BIG_ENDIAN: Final = walk.SCTLR_EE


def line_at_pc(ex: Execution) -> int | None:
    """Where the line of the IC IVAU at PC lies in this process; None where the guest's address leads to no memory, and
    so to nothing that was translated. Its page is mapped then: the other lines of it are found at once."""
    core, vm = ex.core, ex.vm
    word = core.insn()
    if word is None:
        return None
    target = word & _XZR
    sctlr, tcr, ttbr0, ttbr1 = (core.read_sys(enc) for enc in (SCTLR_EL1, TCR_EL1, TTBR0_EL1, TTBR1_EL1))
    regime = walk.Regime(sctlr, tcr, ttbr0, ttbr1, vm.profile.pa_bits)
    order = "big" if regime.sctlr & _BIG_ENDIAN else "little"
    try:
        found = walk.translate(
            regime,
            core.x[target] if target != _XZR else 0,
            walk.Access(walk.READ, False),
            lambda ipa, value: _descriptor(vm, ipa, value, order),
        )
        slot = vm.slots.find(found.ipa >> vm.page_shift)
        if slot is None:
            return None
        if vm.stage2.translate(found.ipa & -(1 << vm.format.page_shift)) is None:
            faults.populate(ex, slot, found.ipa, write=False, execute=False)
    except (walk.WalkFault, KvmError):
        return None
    return slot.userspace_addr + found.ipa - slot.guest_phys_addr


def _descriptor(vm: Vm, ipa: int, value: int | None, order: str) -> int:
    """Reads a descriptor, or writes the one that the hardware has updated."""
    if value is None:
        return int.from_bytes(guest_memory.read(vm, ipa, 8), order)  # type: ignore[arg-type]
    guest_memory.write(vm, ipa, value.to_bytes(8, order))  # type: ignore[arg-type]
    return value
