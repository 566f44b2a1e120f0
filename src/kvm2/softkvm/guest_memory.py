"""What devices inside the VM read and write in the guest's memory (kvm_read_guest, kvm_write_guest).

Addresses are guest physical. Callers run in a vCPU's own thread inside KVM_RUN, or hold the VM's lock: the memory slots
do not change meanwhile.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm2.softkvm.memslots import Slot
    from kvm2.softkvm.vm import Vm


def _pages(vm: Vm, gpa: int, size: int) -> Iterator[tuple[int, int, Slot]]:
    """(address, bytes, slot) of each part of [gpa, gpa + size) that lies in one page of the host."""
    slots = vm.slots
    page = 1 << slots.page_shift
    end = gpa + size
    while gpa < end:
        part = min(end, (gpa & -page) + page) - gpa
        slot = slots.find(gpa >> slots.page_shift)
        if slot is None:
            raise KvmError(errno.EFAULT, f"guest physical {gpa:#x} lies in no memory slot")
        yield gpa, part, slot
        gpa += part


def read(vm: Vm, gpa: int, size: int) -> bytes:
    """`size` bytes at `gpa`. KvmError(EFAULT) where any of them is in no slot, or not there in the client."""
    parts = [
        vm.memory.read(at - slot.guest_phys_addr + slot.userspace_addr, part)
        for at, part, slot in _pages(vm, gpa, size)
    ]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write(vm: Vm, gpa: int, data: bytes) -> None:
    """Writes `data` at `gpa`, page by page, and marks the pages dirty. KvmError(EFAULT) at the first page that is in no
    slot or in a read-only one, or not there in the client: those before it are written."""
    done = 0
    for at, part, slot in _pages(vm, gpa, len(data)):
        if slot.readonly:
            raise KvmError(errno.EFAULT, f"guest physical {at:#x} lies in slot {slot.slot}, which is read-only")
        vm.memory.write(at - slot.guest_phys_addr + slot.userspace_addr, data[done : done + part])
        vm.slots.mark_dirty_range(at, part)
        done += part


def visible(vm: Vm, gpa: int) -> bool:
    """kvm_is_visible_gfn: whether a slot has the page of `gpa`."""
    return vm.slots.find(gpa >> vm.slots.page_shift) is not None


class PageReader:
    """Reads tables of the guest a page of 4 KiB at a time: for loops over many small entries that lie close together.

    A page that was read is kept for a while, so changes made meanwhile are not seen.
    """

    SIZE = 4096
    KEPT = 64  # pages

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._pages: dict[int, bytes | None] = {}

    def page(self, gpa: int) -> bytes | None:
        """The page that `gpa` lies in; None where it cannot be read."""
        number = gpa // self.SIZE
        if number not in self._pages:
            if len(self._pages) == self.KEPT:
                self._pages.clear()
            try:
                self._pages[number] = read(self._vm, number * self.SIZE, self.SIZE)
            except KvmError:
                self._pages[number] = None
        return self._pages[number]

    def byte(self, gpa: int) -> int:
        """The byte at `gpa`; KvmError(EFAULT) where it cannot be read."""
        page = self.page(gpa)
        if page is None:
            raise KvmError(errno.EFAULT, f"guest physical {gpa:#x} cannot be read")
        return page[gpa % self.SIZE]
