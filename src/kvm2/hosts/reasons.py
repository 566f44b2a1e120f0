"""Why a kernel refused: its bare errno in words, worked out from what was asked and from what it offers.

Advisory only: the errno is the kernel's, and where nothing certain can be said, nothing is. The order of checks is the
kernel's (virt/kvm/kvm_main.c, arch/arm64/kvm, arch/x86/kvm of 6.12).
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING

from kvm2.abi import ioctls as io
from kvm2.abi import vm2
from kvm2.abi.structs import CreateDevice, UserspaceMemoryRegion
from kvm2.errors import KvmError
from kvm2.hosts.why import ANYWHERE, WHY, of_machine_type
from kvm2.softkvm.memslots import MemSlots

if TYPE_CHECKING:
    from kvm2.hosts.lowering import Lowered

KINDS = {"system": "/dev/kvm", "vm": "a VM", "vcpu": "a vCPU", "device": "a device"}
# The address space of VMs whose kernel says EINVAL, not EFAULT, beyond it: no slot is beyond in this check.
NO_LIMIT = 64
SLOT_CALLS = (io.KVM_SET_USER_MEMORY_REGION, io.KVM_SET_USER_MEMORY_REGION2)
# The calls whose success tells something that explains a later failure.
WATCHED = frozenset({*SLOT_CALLS, io.KVM_CREATE_VCPU, io.KVM_CREATE_DEVICE})


class Known:
    """A descriptor: its kind, and of a VM the slots in force and the ids of its vCPUs."""

    __slots__ = ("ids", "kind", "slots")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.slots: MemSlots | None = None
        self.ids: set[int] = set()


class Reasons:
    """Watches what succeeds on one kernel, to explain what does not."""

    def __init__(self, host: Lowered) -> None:
        self._host = host
        self._known: dict[int, Known] = {}

    # ---- watching

    def opened(self, fd: int, kind: str = "system") -> None:
        """A new descriptor."""
        self._known[fd] = Known(kind)

    def closed(self, fd: int) -> None:
        """A descriptor is about to be closed."""
        self._known.pop(fd, None)

    def done(self, fd: int, request: int, arg: int, result: int) -> None:
        """One of the WATCHED calls succeeded."""
        if request == io.KVM_CREATE_VCPU:
            self.opened(result, "vcpu")
            known = self._known.get(fd)
            if known is not None:
                known.ids.add(arg)
        elif request in SLOT_CALLS:
            slots = self._slots(fd)
            region = self._region(arg)
            if slots is not None and region is not None:
                with suppress(KvmError):  # a kernel may allow more than is known here
                    slots.set(region)
        elif request == io.KVM_CREATE_DEVICE:
            data = self._read(arg, CreateDevice.SIZE)
            made = CreateDevice.unpack(data) if data else None
            if made is not None and not made.flags:
                self.opened(made.fd, "device")

    def _read(self, address: int, size: int) -> bytes | None:
        try:
            return self._host.memory.read(address, size)
        except KvmError:
            return None

    def _region(self, address: int) -> UserspaceMemoryRegion | None:
        data = self._read(address, UserspaceMemoryRegion.SIZE)
        return UserspaceMemoryRegion.unpack(data) if data else None

    def _slots(self, fd: int) -> MemSlots | None:
        known = self._known.get(fd)
        if known is None or known.kind != "vm":
            return None
        if known.slots is None:
            bits = self._host.ipa_bits_of(fd) or NO_LIMIT
            known.slots = MemSlots(self._host.kernel, bits)
        return known.slots

    # ---- explaining

    def explained(self, error: KvmError, fd: int, request: int, arg: int) -> KvmError:
        """The same refusal, with the reason where one is known."""
        number = error.errno or 0
        if error.reason or error.findings or number == errno.EINTR:
            return error
        why = self._why(number, fd, request, arg) or ANYWHERE.get(number, "")
        return KvmError(number, why) if why else error

    def _why(self, number: int, fd: int, request: int, arg: int) -> str:
        known = self._known.get(fd)
        if number == errno.EBADF:
            return f"descriptor {fd} is not open"
        if known is not None and number in (errno.EINVAL, errno.ENOTTY):
            wrong = self._wrong_call(known.kind, request)
            if wrong:
                return wrong
        if request == io.KVM_CREATE_VM:
            return self.of_type(arg, number)
        if request in SLOT_CALLS:
            return self._of_slot(number, fd, arg)
        if request == io.KVM_CREATE_VCPU:
            return self._of_vcpu(number, fd, arg)
        row = io.by_number(request, known.kind if known else "vm", self._host.arch)
        return WHY.get((row.name, number), "") if row is not None else ""

    def _wrong_call(self, kind: str, request: int) -> str:
        """An ioctl that this kind of descriptor does not have here."""
        arch = self._host.arch
        if io.by_number(request, kind, arch) is not None:
            return ""
        rows = [row for row in io.ioctls(None) if row.number == request]
        here = [row for row in rows if arch in row.arches]
        if here:
            on = " or ".join(KINDS[one] for one in here[0].on)
            return f"{here[0].name} is a call on {on}; this descriptor is {KINDS[kind]}"
        if rows:
            return f"{rows[0].name} is a call of {', '.join(rows[0].arches)} kernels; this one is {arch}"
        return f"{request:#x} is no ioctl of KVM that is known here"

    def of_type(self, word: int, number: int) -> str:
        """Why KVM_CREATE_VM refused its `type` word."""
        host = self._host
        if number != errno.EINVAL:
            return WHY.get(("KVM_CREATE_VM", number), ANYWHERE.get(number, ""))
        if host.arch == "arm64":
            return _of_size(word, host.kernel.ipa_limit, host.kernel.type_word)
        return of_machine_type(host.arch, word, host.kernel.vm_types)

    def _of_slot(self, number: int, fd: int, arg: int) -> str:
        region, slots = self._region(arg), self._slots(fd)
        if region is None:
            return f"the structure at {arg:#x} cannot be read"
        if slots is None:
            return ""
        try:
            slots.plan(region)
        except KvmError as error:
            return error.reason if error.errno == number else ""
        if self._host.arch == "x86_64" and number == errno.EINVAL:
            end = region.guest_phys_addr + region.memory_size
            return f"slot {region.slot} ends at {end:#x}: beyond the guest addresses that this CPU's page tables reach"
        return ""

    def _of_vcpu(self, number: int, fd: int, vcpu: int) -> str:
        known, kernel = self._known.get(fd), self._host.kernel
        if number == errno.EEXIST:
            return f"vCPU {vcpu} exists already in this VM"
        if number == errno.EINVAL and vcpu >= kernel.max_vcpu_id:
            return f"vCPU id {vcpu}: this kernel takes 0..{kernel.max_vcpu_id - 1}"
        if number == errno.EINVAL and known is not None and len(known.ids) >= kernel.max_vcpus:
            return f"this VM has {len(known.ids)} vCPUs, as many as this kernel allows"
        return WHY.get(("KVM_CREATE_VCPU", number), "")


def _of_size(word: int, limit: int, type_word: str) -> str:
    """Why arm64 refused a `type` word (kvm_init_ipa_range)."""
    if type_word == "none":
        return "this kernel is older than 4.20: its VMs have 40 bits, and `type` must be 0"
    if word & ~0xFF:
        return f"type {word:#x}: only bits [7:0] have a meaning here, the IPA size in bits"
    default = vm2.ARM64_DEFAULT_IPA_BITS
    if not word:
        return (
            f"type 0 asks for the default of {default} IPA bits, this host has {limit} at most: ask for {limit} or "
            f"fewer (create_vm({limit}), or create_vm2 with physaddr_bits='max' or 'auto')"
        )
    return f"{word} IPA bits: this host allows 32..{limit} (KVM_CAP_ARM_VM_IPA_SIZE)"
