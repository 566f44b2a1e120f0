"""Coalesced MMIO: writes that wait in a ring for userspace instead of leaving the guest (virt/kvm/coalesced_mmio.c).

The ring is a page of the VM that lies in the mapping of each of its vCPUs.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
from typing import TYPE_CHECKING, Final, cast

from kvm2.abi.structs import CoalescedMmio, CoalescedMmioRing, CoalescedMmioZone
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.run import Execution
    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vm import Vm

KVM_COALESCED_MMIO_PAGE_OFFSET: Final = 1  # of arm64, in its pages
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2

_HEAD = struct.Struct("=II")  # first, last: `CoalescedMmioRing`
_LAST = struct.Struct("=I")
_LAST_OFFSET: Final = CoalescedMmioRing.LAYOUT.at("last").offset
_ENTRY = struct.Struct("=QII")  # phys_addr, len, pio of a `CoalescedMmio`
_DATA_OFFSET: Final = CoalescedMmio.LAYOUT.at("data").offset


def entries(page_size: int) -> int:
    """KVM_COALESCED_MMIO_MAX: how many entries a page has; one of them is always free.

    >>> entries(4096), entries(16384)
    (170, 682)
    """
    return (page_size - CoalescedMmioRing.SIZE) // CoalescedMmio.SIZE


class Zone:
    """A range whose writes are collected: an `IoDevice` at `address`."""

    def __init__(self, vm: Vm, zone: CoalescedMmioZone) -> None:
        self.address, self.size, self.pio = zone.addr, zone.size, zone.pio
        self._ring = KVM_COALESCED_MMIO_PAGE_OFFSET << vm.page_shift
        self._entries = entries(1 << vm.page_shift)

    def read(self, vcpu: Vcpu, offset: int, size: int) -> int | None:
        """Reads leave the guest."""
        return None

    def write(self, vcpu: Vcpu, offset: int, size: int, value: int) -> bool:
        """coalesced_mmio_write: False where the ring is full, or userspace broke it. One vCPU of a VM is in the guest
        at a time, so that nobody else writes here."""
        if offset + size > self.size:
            return False
        area, ring = cast("Execution", vcpu.execution).run_area, self._ring
        first, insert = _HEAD.unpack_from(area, ring)
        following = (insert + 1) % self._entries
        if insert >= self._entries or following == first:
            return False
        at = ring + CoalescedMmioRing.SIZE + insert * CoalescedMmio.SIZE
        _ENTRY.pack_into(area, at, self.address + offset, size, self.pio)
        data = at + _DATA_OFFSET
        area[data : data + size] = value.to_bytes(size, "little")
        _LAST.pack_into(area, ring + _LAST_OFFSET, following)
        return True

    def holds(self, zone: CoalescedMmioZone) -> bool:
        """coalesced_mmio_in_range: whether all of `zone` lies in this one."""
        if zone.size >> 31 or zone.addr + zone.size >> 64:  # an int in the kernel, and a sum of 64 bits
            return False
        return self.address <= zone.addr and zone.addr + zone.size <= self.address + self.size


def _asked(vm: Vm, arg: int) -> CoalescedMmioZone:
    zone = CoalescedMmioZone.unpack(vm.memory.read(arg, CoalescedMmioZone.SIZE))
    if zone.pio not in (0, 1):
        raise KvmError(errno.EINVAL, f"pio = {zone.pio}: 0 is memory, 1 a port")
    return zone


def register(vm: Vm, arg: int) -> int:
    """KVM_REGISTER_COALESCED_MMIO. Ports are taken, as by the kernel, and no arm64 guest has any."""
    asked = _asked(vm, arg)
    if not shareable(vm):
        raise KvmError(
            errno.ENOSYS,
            "the ring is one page in several vCPUs' mappings, which this operating system cannot make: it takes "
            f"Linux, and pages of at most {1 << vm.page_shift} bytes",
        )
    made = Zone(vm, asked)
    with vm.lock:
        if not asked.pio:
            # A zone over the end of 64 bits is accepted, counts, and is never hit.
            vm.bus.add(made.address, 0 if made.address + made.size >> 64 else made.size, made)
        vm.eventfds.zones.append(made)
    return 0


def unregister(vm: Vm, arg: int) -> int:
    """KVM_UNREGISTER_COALESCED_MMIO: every zone that holds the whole range goes; 0 also where there is none."""
    asked = _asked(vm, arg)
    with vm.lock:
        zones = vm.eventfds.zones
        for zone in [zone for zone in zones if zone.pio == asked.pio and zone.holds(asked)]:
            zones.remove(zone)
            vm.bus.remove(zone)
    return 0


# ---- one page in several mappings


def _mremap() -> Callable[..., int | None] | None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "mremap", None)
    if call is None:
        return None
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return cast("Callable[..., int | None]", call)


_MREMAP: Final = _mremap()
_FAILED: Final = ctypes.c_void_p(-1).value


def shareable(vm: Vm) -> bool:
    """Whether the vCPUs of this VM can have the ring in common."""
    return _MREMAP is not None and 1 << vm.page_shift >= mmap.PAGESIZE


def share_ring(vm: Vm, area: memoryview) -> None:
    """`area`, the mapping of a new vCPU, gets the ring that those before it have."""
    if not vm.executions or not shareable(vm) or _MREMAP is None:
        return
    size, offset = 1 << vm.page_shift, KVM_COALESCED_MMIO_PAGE_OFFSET << vm.page_shift
    old, new = (_address(view) + offset for view in (vm.executions[0].run_area, area))
    # An old size of 0 asks for a second mapping of the same pages, which are shared memory (mremap(2)).
    if _MREMAP(old, 0, size, MREMAP_MAYMOVE | MREMAP_FIXED, new) == _FAILED:
        number = ctypes.get_errno()
        raise KvmError(number, "the ring of coalesced MMIO cannot be mapped into another vCPU's area")


def _address(area: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))
