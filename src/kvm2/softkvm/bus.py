"""What answers a guest's access inside the VM, before userspace is asked (KVM_MMIO_BUS, virt/kvm/kvm_main.c)."""

from __future__ import annotations

import errno
from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Protocol

from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.softkvm.vcpu import Vcpu

NR_IOBUS_DEVS: Final = 1000


class IoDevice(Protocol):
    """Registers in the guest physical address space. `offset` is from the start of what was registered.

    A device that does not answer an access (None, False) leaves it to the next one there, and at last to userspace.
    Both are called by a vCPU's own thread, inside its KVM_RUN, with the vCPU in `core`'s hook.
    """

    def read(self, vcpu: Vcpu, offset: int, size: int) -> int | None:
        """The value of `size` bytes, or None."""

    def write(self, vcpu: Vcpu, offset: int, size: int, value: int) -> bool:
        """Takes the value; False where it is for somebody else."""


class Bus:
    """Devices by address. Changed under the VM's lock, by making a new table: readers need none.

    >>> class Ram:
    ...     def read(self, vcpu, offset, size): return offset
    ...     def write(self, vcpu, offset, size, value): return True
    >>> bus = Bus()
    >>> bus.add(0x1000, 0x100, Ram())
    >>> bus.read(None, 0x1010, 4), bus.read(None, 0x2000, 4)
    (16, None)
    """

    def __init__(self) -> None:
        # (start, end, device) in the kernel's order, in which those that share addresses are asked.
        self._ranges: list[tuple[int, int, IoDevice]] = []
        # The starts, (start, end, place in `_ranges`, device) in their order, the longest range, or 0 where none
        # shares an address with another. One tuple: readers take no lock.
        self._table: tuple[list[int], list[tuple[int, int, int, IoDevice]], int] = ([], [], 0)
        self._counted = 0  # against the limit
        self.devices = 0  # how many ranges there are: whoever is in a hurry looks here first

    def add(self, base: int, size: int, device: IoDevice) -> None:
        """Puts `device` at [base, base + size); with size 0 it has accesses of any size at exactly this address.

        Several may share addresses: they are asked in the order that kvm_io_bus_register_dev puts them in. ENOSPC: the
        bus is full, where only ioeventfds are not counted.
        """
        end, ranges = base + size, self._ranges
        if size < 0 or end > 1 << 64:
            raise KvmError(errno.EINVAL, f"{size:#x} bytes at {base:#x} do not fit into 64 bits")
        if self._counted >= NR_IOBUS_DEVS:
            raise KvmError(errno.ENOSPC, f"the bus has its {NR_IOBUS_DEVS} devices")
        place = 0
        for start, stop, _ in ranges:
            if (start >= base and stop > end) if size else start > base:
                break
            place += 1
        self._set([*ranges[:place], (base, end, device), *ranges[place:]])

    def remove(self, device: IoDevice) -> None:
        """Takes every range of `device` away."""
        self._set([entry for entry in self._ranges if entry[2] is not device])

    def _set(self, ranges: list[tuple[int, int, IoDevice]]) -> None:
        by_start = sorted(
            ((start, end, place, device) for place, (start, end, device) in enumerate(ranges)),
            key=lambda entry: entry[0],
        )
        shared = any(one[0] == other[0] or one[1] > other[0] for one, other in pairwise(by_start))
        longest = max(1, *(end - start for start, end, _ in ranges)) if shared else 0
        self._ranges, self._table = ranges, ([entry[0] for entry in by_start], by_start, longest)
        self.devices = len(ranges)
        self._counted = sum(not getattr(device, "is_ioeventfd", False) for *_, device in ranges)

    def at(self, address: int, size: int) -> list[tuple[int, IoDevice]]:
        """(start, device) of everything that holds the whole access, in the order in which they are asked."""
        starts, ranges, longest = self._table
        at = bisect_right(starts, address) - 1
        if at < 0:
            return []
        if not longest:
            start, end, _, device = ranges[at]
            return [(start, device)] if address + size <= end or start == end == address else []
        found: list[tuple[int, int, IoDevice]] = []
        while at >= 0 and address - starts[at] <= longest:
            start, end, place, device = ranges[at]
            if address + size <= end or (start == end == address):
                found.append((place, start, device))
            at -= 1
        if len(found) > 1:
            found.sort(key=lambda entry: entry[0])
        return [(start, device) for _, start, device in found]

    def read(self, vcpu: Vcpu, address: int, size: int) -> int | None:
        """kvm_io_bus_read: the first answer; None: nobody here."""
        for start, device in self.at(address, size):
            value = device.read(vcpu, address - start, size)
            if value is not None:
                return value
        return None

    def write(self, vcpu: Vcpu, address: int, size: int, value: int) -> bool:
        """kvm_io_bus_write: whether somebody took it."""
        for start, device in self.at(address, size):  # noqa: SIM110 - a generator takes as long as the rest
            if device.write(vcpu, address - start, size, value):
                return True
        return False
