"""KVM_IOEVENTFD: a guest's write that signals an eventfd without an exit (virt/kvm/eventfd.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import structs_irq as abi
from kvm2.errors import KvmError
from kvm2.softkvm.eventfd import EventFd

if TYPE_CHECKING:
    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vm import Vm

LENGTHS: Final = (0, 1, 2, 4, 8)
MMIO, PIO, CCW_NOTIFY = "MMIO", "PIO", "VIRTIO_CCW_NOTIFY"  # enum kvm_bus; no arm64 guest reaches the last two


class IoEventFd:
    """One registration (`struct _ioeventfd`): an `IoDevice` at `address`. `datamatch` None takes every value."""

    is_ioeventfd = True  # does not count against the bus's limit

    def __init__(self, bus: str, address: int, length: int, datamatch: int | None, eventfd: EventFd) -> None:
        self.bus, self.address, self.length, self.datamatch, self.eventfd = bus, address, length, datamatch, eventfd

    def read(self, vcpu: Vcpu, offset: int, size: int) -> int | None:
        """Reads are not its business."""
        return None

    def write(self, vcpu: Vcpu, offset: int, size: int, value: int) -> bool:
        """ioeventfd_write: signals where length and value match; the address does already."""
        if self.length and (size != self.length or (self.datamatch is not None and value != self.datamatch)):
            return False
        self.eventfd.signal()
        return True

    def collides(self, other: IoEventFd) -> bool:
        """ioeventfd_check_collision: whether one write could be meant for both."""
        if (self.bus, self.address) != (other.bus, other.address):
            return False
        if not self.length or not other.length:
            return True
        return self.length == other.length and (
            self.datamatch is None or other.datamatch is None or self.datamatch == other.datamatch
        )


def ioeventfd(vm: Vm, arg: int) -> int:
    """KVM_IOEVENTFD: EINVAL, EBADF, EEXIST, and ENOENT for one to be taken away that is not there."""
    asked = abi.Ioeventfd.unpack(vm.memory.read(arg, abi.Ioeventfd.SIZE))
    bus = MMIO
    if asked.flags & abi.KVM_IOEVENTFD_FLAG_PIO:
        bus = PIO
    elif asked.flags & abi.KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY:
        bus = CCW_NOTIFY
    if asked.flags & abi.KVM_IOEVENTFD_FLAG_DEASSIGN:
        _deassign(vm, bus, asked)
    else:
        _check(asked)
        _assign(vm, bus, asked)
    return 0


def _check(asked: abi.Ioeventfd) -> None:
    """kvm_assign_ioeventfd."""
    if asked.len not in LENGTHS:
        raise KvmError(errno.EINVAL, f"len = {asked.len}: allowed are 0 (any length), 1, 2, 4 and 8")
    if asked.addr + asked.len >> 64:
        raise KvmError(errno.EINVAL, f"{asked.len} bytes at {asked.addr:#x} reach beyond 64 bits")
    if asked.flags & ~abi.KVM_IOEVENTFD_VALID_FLAG_MASK:
        raise KvmError(errno.EINVAL, f"flags = {asked.flags:#x}: known are {abi.KVM_IOEVENTFD_VALID_FLAG_MASK:#x}")
    if not asked.len and asked.flags & abi.KVM_IOEVENTFD_FLAG_DATAMATCH:
        raise KvmError(errno.EINVAL, "DATAMATCH compares a value of some length: len = 0 has none")


def _datamatch(asked: abi.Ioeventfd) -> int | None:
    return asked.datamatch if asked.flags & abi.KVM_IOEVENTFD_FLAG_DATAMATCH else None


def _assign(vm: Vm, bus: str, asked: abi.Ioeventfd) -> None:
    made = IoEventFd(bus, asked.addr, asked.len, _datamatch(asked), EventFd(asked.fd))
    try:
        with vm.lock:
            there = vm.eventfds.ioeventfds
            if any(made.collides(other) for other in there):
                raise KvmError(errno.EEXIST, f"an ioeventfd at {asked.addr:#x} takes such writes already")
            if bus == MMIO:
                vm.bus.add(asked.addr, asked.len, made)
            there.append(made)
    except BaseException:
        made.eventfd.close()
        raise


def _deassign(vm: Vm, bus: str, asked: abi.Ioeventfd) -> None:
    eventfd = EventFd(asked.fd)
    try:
        wanted = (bus, asked.addr, asked.len, _datamatch(asked), eventfd.id)
        with vm.lock:
            for found in vm.eventfds.ioeventfds:
                if (found.bus, found.address, found.length, found.datamatch, found.eventfd.id) == wanted:
                    break
            else:
                raise KvmError(errno.ENOENT, f"no ioeventfd at {asked.addr:#x} has this length, value and eventfd")
            vm.bus.remove(found)
            vm.eventfds.ioeventfds.remove(found)
            found.eventfd.close()
    finally:
        eventfd.close()
