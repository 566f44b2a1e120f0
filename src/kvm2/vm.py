"""A VM: its memory, vCPUs, devices, capabilities, and what its creation decided."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, TypeVar, overload

from kvm2.abi import ioctls
from kvm2.abi.structs import CreateDevice, EnableCap, UserspaceMemoryRegion
from kvm2.abi.structs_arm64 import ArmCounterOffset, ArmDeviceAddr, RegMaskRange, VcpuInit
from kvm2.device import Device
from kvm2.errors import UsageError
from kvm2.handle import Buffer, Memories, checked_word
from kvm2.irq_vm import IrqVm
from kvm2.names import ATTRIBUTES, capability, capability_words, device_type, listed
from kvm2.ram import LOG_DIRTY_PAGES, READONLY, Allocation, Ram, writable
from kvm2.vcpu import Vcpu
from kvm2.x86_vm import X86Vm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.abi.findings import Finding
    from kvm2.abi.layout import Structure
    from kvm2.hosts.backend import Backend

FEATURE_ID_WORDS = 3 * 8 * 8  # KVM_ARM_FEATURE_ID_RANGE_SIZE: op1 of 0, 1 and 3, CRm 0..7, op2 0..7

A = TypeVar("A", bound="Structure")


class Vm(X86Vm, IrqVm):
    """One VM. `notes` has what creation said without refusing (attributes skipped, defaults used).

    Slots are numbered by `map` from 0 upwards, unless told; `rams` has what `map` made and `unmap` did not undo.
    """

    def __init__(self, backend: Backend, fd: int, notes: Sequence[Finding] = ()) -> None:
        memories = Memories()
        super().__init__(backend, fd, memories)
        self._memories = memories
        self.notes = tuple(notes)
        self.rams: dict[int, Ram] = {}

    # -- memory

    def map(
        self, gpa: int, size: int, *, slot: int | None = None, readonly: bool = False, log_dirty: bool = False
    ) -> Ram:
        """`size` bytes of zeroed memory at guest physical address `gpa`, by KVM_SET_USER_MEMORY_REGION.

        KvmError where KVM refuses: EINVAL misaligned, EEXIST overlap, EFAULT beyond the VM's IPA space.
        """
        if slot is None:
            slot = next(number for number in range(len(self.rams) + 1) if number not in self.rams)
        checked_word("gpa", gpa, 64)
        if not isinstance(size, int) or size <= 0:
            raise UsageError(f"size = {size!r}: allowed are whole numbers of bytes above 0 (Ram.unmap deletes a slot)")
        allocation = Allocation(size, gpa)
        flags = READONLY * readonly | LOG_DIRTY_PAGES * log_dirty
        # Held before the call, so that the memory is there as soon as the host knows of it.
        self._memories.append(allocation)
        try:
            self.set_memory_region(slot, gpa, size, allocation.address, flags)
        except BaseException:
            self._memories.remove(allocation)
            raise
        ram = self.rams[slot] = Ram(self, slot, gpa, size, flags, allocation)
        return ram

    def set_memory_region(self, slot: int, gpa: int, size: int, address: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION with memory of the caller's; size 0 deletes. `map` is the easy way."""
        region = UserspaceMemoryRegion(checked_word("slot", slot, 32), flags, gpa, size, address)
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, region)

    def _forget(self, ram: Ram, allocation: Allocation) -> None:
        if self.rams.get(ram.slot) is ram:
            del self.rams[ram.slot]
        if allocation in self._memories:
            self._memories.remove(allocation)

    def _pieces(self, gpa: int, size: int) -> list[tuple[Ram, int, int]]:
        """(memory, offset, bytes) of every part of a guest physical range; UsageError where none is mapped."""
        pieces, at = [], checked_word("gpa", gpa, 64)
        checked_word("size", size, 64)
        for whole in self.rams.values():  # nearly always it is all in one, and devices ask often
            if whole.gpa <= gpa and gpa + size <= whole.gpa + whole.size:
                return [(whole, gpa - whole.gpa, size)]
        while at < gpa + size:
            ram = next((r for r in self.rams.values() if r.gpa <= at < r.gpa + r.size), None)
            if ram is None:
                have = ", ".join(f"{r.gpa:#x}..{r.gpa + r.size:#x}" for r in self.rams.values()) or "nothing"
                raise UsageError(f"guest physical address {at:#x} has no memory behind it; mapped: {have}")
            take = min(gpa + size, ram.gpa + ram.size) - at
            pieces.append((ram, at - ram.gpa, take))
            at += take
        return pieces

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes at a guest physical address, across slots; UsageError where no `map`ped memory is."""
        pieces = self._pieces(gpa, size)
        if len(pieces) == 1:
            ram, offset, count = pieces[0]
            return ram.read(offset, count)
        return b"".join(ram.read(offset, count) for ram, offset, count in pieces)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at a guest physical address, across slots; nothing is written where a part is not mapped."""
        done, data = 0, writable(data)
        for ram, offset, count in self._pieces(gpa, len(data)):
            ram.write(offset, data[done : done + count])
            done += count

    # -- vCPUs and devices

    def create_vcpu(self, id: int = 0) -> Vcpu:
        """KVM_CREATE_VCPU."""
        return Vcpu(self, self.ioctl(ioctls.KVM_CREATE_VCPU, checked_word("vcpu id", id, 32)), id)

    def preferred_target(self) -> VcpuInit:
        """KVM_ARM_PREFERRED_TARGET: the target to initialise vCPUs with."""
        self._only_on("arm64", "KVM_ARM_PREFERRED_TARGET")
        return self.exchange(ioctls.KVM_ARM_PREFERRED_TARGET, VcpuInit(0))

    def create_device(self, kind: str | int, *, test: bool = False) -> Device | None:
        """KVM_CREATE_DEVICE by name ("vgic-v3", "vgic-v2", "vgic-its") or number; `test` only asks, and gives None."""
        asked = CreateDevice(type=device_type(kind), fd=0, flags=int(test))
        made = self.exchange(ioctls.KVM_CREATE_DEVICE, asked)
        return None if test else Device(self, made.fd, made.type)

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP, before vCPUs: on arm64 a GICv2, the old way; on x86-64 PICs, I/O APIC and local APICs."""
        self.ioctl(ioctls.KVM_CREATE_IRQCHIP)

    def set_device_addr(self, id: int, address: int) -> None:
        """KVM_ARM_SET_DEVICE_ADDR: where a GICv2 frame is, the old way."""
        self._only_on("arm64", "KVM_ARM_SET_DEVICE_ADDR")
        self.ioctl(ioctls.KVM_ARM_SET_DEVICE_ADDR, ArmDeviceAddr(id, address))

    def set_counter_offset(self, offset: int) -> None:
        """KVM_ARM_SET_COUNTER_OFFSET."""
        self._only_on("arm64", "KVM_ARM_SET_COUNTER_OFFSET", "x86-64 has set_clock and MSR 0x10")
        self.ioctl(ioctls.KVM_ARM_SET_COUNTER_OFFSET, ArmCounterOffset(counter_offset=offset))

    # -- capabilities and identification registers

    def check_extension(self, cap: str | int) -> int:
        """KVM_CHECK_EXTENSION on the VM: what holds for this one."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, capability(cap))

    def enable_cap(self, cap: str | int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP on the VM, with up to four words."""
        asked = EnableCap(cap=capability(cap), flags=flags, args=capability_words(args))
        return self.ioctl(ioctls.KVM_ENABLE_CAP, asked)

    def writable_masks(self) -> tuple[int, ...]:
        """KVM_ARM_GET_REG_WRITABLE_MASKS: which bits of each ID register userspace may change.

        192 words: index (op1 0, 1, 3 as 0, 1, 2) * 64 + CRm * 8 + op2 of op0 = 3, CRn = 0.
        """
        self._only_on("arm64", "KVM_ARM_GET_REG_WRITABLE_MASKS", "x86-64 has kvm.supported_cpuid()")
        words = Buffer(8 * FEATURE_ID_WORDS)
        self.ioctl(ioctls.KVM_ARM_GET_REG_WRITABLE_MASKS, RegMaskRange(addr=words.address, range=0))
        return struct.unpack(f"={FEATURE_ID_WORDS}Q", words.bytes())

    # -- KVM_CREATE_VM2

    @overload
    def get_attr(self, attribute: type[A]) -> A: ...
    @overload
    def get_attr(self, attribute: int) -> Any: ...
    def get_attr(self, attribute: type[A] | int) -> Any:
        """KVM_VM2_GET_ATTR: the value in force of an attribute, by class or type number.

        KvmError: ENOENT unknown here, EOPNOTSUPP an attribute that has no value (types 3 to 5).
        """
        from kvm2.negotiation import get_attr

        return get_attr(self, attribute)

    def set_attrs(self, attributes: Sequence[object] = (), *, dry_run: bool = False) -> tuple[Finding, ...]:
        """KVM_VM2_SET_ATTRS on a VM that is being configured; returns the notes. KvmError with every finding."""
        from kvm2.negotiation import send

        return send(self, ioctls.KVM_VM2_SET_ATTRS, listed(attributes, ATTRIBUTES), dry_run=dry_run)[1]

    def commit(self, attributes: Sequence[object] = (), *, dry_run: bool = False) -> tuple[Finding, ...]:
        """KVM_VM2_COMMIT: the end of the negotiation phase; returns the notes. KvmError with every finding."""
        from kvm2.negotiation import send

        return send(self, ioctls.KVM_VM2_COMMIT, listed(attributes, ATTRIBUTES), dry_run=dry_run)[1]
