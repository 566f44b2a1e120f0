"""Stage-2 aborts: what an access that the tables do not allow turns into.

After `kvm_handle_guest_abort` and `user_mem_abort` of arch/arm64/kvm/mmu.c: a page of a slot is mapped, an access
outside every slot leaves the guest as MMIO, and what lies beyond the VM's or the host's address size goes back into
the guest as an exception.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi.sysregs import ESR_EL1
from kvm2.errors import KvmError
from kvm2.softkvm import mmio
from kvm2.softkvm.memory import is_plain

if TYPE_CHECKING:
    from kvm2.softkvm.memslots import Slot
    from kvm2.softkvm.run import Execution
    from kvm2.softkvm.vm import Vm

FAULT_AROUND = 64  # granules
EC_SHIFT = 26
EC_IABT_LOW, EC_IABT_CUR, EC_DABT_LOW, EC_DABT_CUR = 0x20, 0x21, 0x24, 0x25
IL = 1 << 25
S1PTW = 1 << 7
FSC_EXTABT = 0x10
FSC_TYPE, FSC_ADDRESS_SIZE, FSC_TRANSLATION, FSC_PERMISSION = 0x3C, 0x00, 0x04, 0x0C
EL0T = 0
ESR_HIGH_WORD = 0xFFFF_FFFF << 32


def inject_abort(ex: Execution, iabt: bool, address: int, fsc: int = FSC_EXTABT) -> None:
    """A synchronous external abort (or another fault status) at EL1, as `inject_abt64` builds its syndrome."""
    from_el0 = ex.core.pstate & 0xF == EL0T
    if iabt:
        ec = EC_IABT_LOW if from_el0 else EC_IABT_CUR
    else:
        ec = EC_DABT_LOW if from_el0 else EC_DABT_CUR
    esr = ec << EC_SHIFT | ex.core.syndrome & IL | fsc
    ex.core.deliver_el1(esr, address)
    if "esr-high-word" in ex.vm.profile.quirks:
        ex.core.write_sys(ESR_EL1, ESR_HIGH_WORD | esr)


def handle(ex: Execution) -> bool:
    """Handles the abort that the core reports. True: the guest goes on; False: an exit is prepared."""
    core, vm = ex.core, ex.vm
    esr = core.exception.syndrome
    iabt = esr >> EC_SHIFT == EC_IABT_LOW
    fault = esr & FSC_TYPE
    page_ipa = core.hpfar()
    ipa = page_ipa | core.exception.vaddress & 0xFFF
    if page_ipa >> vm.format.ipa_bits and fault in (FSC_TRANSLATION, FSC_ADDRESS_SIZE):
        beyond_host = page_ipa >> vm.ipa_limit
        inject_abort(ex, iabt, ipa, fsc=FSC_ADDRESS_SIZE if beyond_host else FSC_EXTABT)
        return True
    slot = vm.slots.find(page_ipa >> vm.page_shift)
    write = (fault == FSC_PERMISSION) if esr & S1PTW else (not iabt and bool(esr & mmio.WNR))
    if slot is None or (write and slot.readonly):
        esr = core.abort_syndrome()  # only here, as it costs a look at the instruction
        vcpu = ex.vcpu
        vcpu.fault_esr, vcpu.fault_address = esr, core.exception.vaddress
        if iabt or esr & (S1PTW | mmio.CM):
            return _not_emulated(ex, esr, slot)
        return mmio.abort(ex, esr, ipa)
    populate(ex, slot, page_ipa, write=write, execute=iabt)
    if fault == FSC_PERMISSION:
        core.flush_tlb()
    return True


def _not_emulated(ex: Execution, esr: int, slot: Slot | None) -> bool:
    """Instructions, page tables and cache maintenance outside every slot: nothing for userspace."""
    core = ex.core
    if esr >> EC_SHIFT == EC_IABT_LOW:
        inject_abort(ex, True, core.far)
    elif esr & S1PTW:
        inject_abort(ex, False, core.far)
    elif slot is None:
        core.advance()
    else:
        return mmio.abort(ex, esr, core.hpfar() | core.far & 0xFFF)
    return True


def populate(ex: Execution, slot: Slot, ipa: int, *, write: bool, execute: bool) -> None:
    """Maps the granule around `ipa` of `slot` as the client's memory allows; KvmError(EFAULT) where it does not."""
    vm = ex.vm
    size = 1 << vm.format.page_shift
    base = ipa & -size
    hva = slot.userspace_addr + base - slot.guest_phys_addr
    memory = vm.memory
    logging = slot.logging
    # As the kernel: writable at once where the client may write, except when writes are to be logged.
    writable = not slot.readonly and (write or not logging) and memory.accessible(hva, size, True)
    if not writable and (write or not memory.accessible(hva, size, False)):
        need = "written" if write else "read"
        raise KvmError(
            errno.EFAULT,
            f"the guest touched IPA {ipa:#x} of slot {slot.slot}, whose memory at {hva:#x} cannot be {need} by this "
            "process: map it there, or delete the slot",
        )
    old = vm.stage2.translate(base)
    execute = execute or (old is not None and old.executable)
    vm.stage2.map(base, hva, size, writable=writable, executable=execute)
    if execute:
        vm.code_pages.add(hva >> vm.format.page_shift)
    if writable and logging:
        vm.slots.mark_dirty_range(base, size)
    elif writable and old is None and not execute:
        _around(vm, slot, base, size)


def _around(vm: Vm, slot: Slot, base: int, size: int) -> None:
    """The pages around one that was just mapped, where nobody can tell: a guest touches the next one soon, and each
    fault costs as much as mapping all of them. Only in memory of this library's own, whose pages are there at once."""
    span = size * FAULT_AROUND
    start = max(base & -span, slot.guest_phys_addr)
    end = min((base & -span) + span, slot.guest_phys_addr + slot.memory_size)
    hva = slot.userspace_addr + start - slot.guest_phys_addr
    if is_plain(hva, end - start) and vm.memory.accessible(hva, end - start, True):
        vm.stage2.map_missing(start, hva, end - start)
