"""Guest memory: anonymous memory of this process behind a memory slot."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from typing import TYPE_CHECKING

from kvm2.abi import ioctls
from kvm2.abi.structs import ClearDirtyLog, DirtyLog, UserspaceMemoryRegion
from kvm2.errors import UsageError
from kvm2.handle import Buffer, checked_word
from kvm2.softkvm import memory

if TYPE_CHECKING:
    from kvm2.vm import Vm

READONLY, LOG_DIRTY_PAGES = 2, 1
# The largest page of any arm64 host (64K): memory that starts at such a boundary suits every host's slot rules.
ALIGNMENT = 1 << 16
# The block of a 4K granule: where guest and host addresses agree in these bits, stage 2 can map blocks.
BLOCK = 1 << 21


class Allocation:
    """`size` bytes of zeroed anonymous memory whose address is `address`; it lives as long as somebody refers to it."""

    __slots__ = ("_mapping", "address", "view")

    def __init__(self, size: int, congruent: int) -> None:
        align = BLOCK if size >= BLOCK else ALIGNMENT
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if sys.platform == "linux":
            flags |= 0x4000  # MAP_NORESERVE: a guest may be given more than this machine has
        try:
            self._mapping = mmap.mmap(-1, size + align, flags=flags)
        except (OSError, OverflowError, ValueError) as error:
            raise UsageError(f"{size:#x} bytes of guest memory cannot be had from this machine: {error}") from error
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        offset = (congruent - base) % align
        self.address = base + offset
        self.view = memoryview(self._mapping)[offset : offset + size]
        memory.plain(self.address, size)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never had
            memory.not_plain(self.address)


def writable(data: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
    """The data, where it is bytes; UsageError otherwise."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UsageError(f"data = {data!r}: guest memory takes bytes")
    return data


class Ram:
    """What `Vm.map` returns: `size` bytes that the guest sees at `gpa`, in slot number `slot`.

    Positions in `read`, `write` and slices count from the memory's own start, like a bytearray's; `Vm.read` and
    `Vm.write` take guest physical addresses. The memory stays readable after the VM is closed.
    """

    def __init__(self, vm: Vm, slot: int, gpa: int, size: int, flags: int, allocation: Allocation) -> None:
        self._vm = vm
        self._allocation = allocation
        self.slot = slot
        self.gpa = gpa
        self.size = size
        self.flags = flags

    @property
    def hva(self) -> int:
        """The address of the first byte in this process."""
        return self._allocation.address

    @property
    def view(self) -> memoryview:
        """The memory itself, writable. Change instructions that the guest has executed with `write` or by index."""
        return self._allocation.view

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: int | slice) -> int | bytes:
        """One byte as a number, or a copy of a slice."""
        value = self._allocation.view[where]
        return value if isinstance(value, int) else bytes(value)

    def __setitem__(self, where: int | slice, data: int | bytes | bytearray | memoryview) -> None:
        self._allocation.view[where] = data  # type: ignore[index,assignment]
        if isinstance(where, slice):
            start, stop, _ = where.indices(self.size)
            self._changed(start, stop - start)
        else:
            self._changed(where % self.size, 1)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; UsageError where they are not all inside."""
        self._check(offset, size)
        return bytes(self._allocation.view[offset : offset + size])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`; UsageError where it does not fit."""
        self._check(offset, len(writable(data)))
        self._allocation.view[offset : offset + len(data)] = data
        self._changed(offset, len(data))

    def _changed(self, offset: int, size: int) -> None:
        if not self._vm.closed:
            self._vm.backend.memory_written(self._vm.fd, self.hva + offset, size)

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            hint = ""
            if self.gpa <= offset < self.gpa + self.size:
                hint = "; that is a guest physical address: vm.read and vm.write take those"
            raise UsageError(f"{size:#x} bytes at offset {offset:#x} of a memory of {self.size:#x} bytes{hint}")

    def set_flags(self, flags: int) -> None:
        """Change the slot's flags (LOG_DIRTY_PAGES, READONLY): KVM refuses to change READONLY with EINVAL."""
        self._set(self.gpa, self.size, flags)
        self.flags = flags

    def move(self, gpa: int) -> None:
        """Show the same memory at another guest physical address."""
        self._set(gpa, self.size, self.flags)
        self.gpa = gpa

    def unmap(self) -> None:
        """Delete the slot; the contents stay readable here."""
        self._set(self.gpa, 0, 0)
        self._vm._forget(self, self._allocation)

    def _set(self, gpa: int, size: int, flags: int) -> None:
        region = UserspaceMemoryRegion(self.slot, flags, gpa, size, self.hva)
        self._vm.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, region)

    def _bitmap_bytes(self, page_size: int) -> int:
        pages = -(-self.size // page_size)
        return -(-pages // 64) * 8

    def dirty_log(self) -> bytes:
        """KVM_GET_DIRTY_LOG: one bit a host page (bit 0 of byte 0 = first page), whole u64 words.

        Where the host's pages are larger than 4K, only the first part of the result is used by KVM; the rest is zero.
        """
        bitmap = Buffer(self._bitmap_bytes(4096))
        self._vm.ioctl(ioctls.KVM_GET_DIRTY_LOG, DirtyLog(slot=self.slot, dirty_bitmap=bitmap.address))
        return bitmap.bytes()

    def clear_dirty_log(self, first_page: int, num_pages: int, bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG (after KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): bit 0 of `bitmap` is `first_page`."""
        words = -(-num_pages // 64) * 8
        if len(bitmap) < words:
            raise UsageError(f"a bitmap of {len(bitmap)} bytes for {num_pages} pages: {words} bytes are needed")
        data = Buffer(bitmap)
        num_pages = checked_word("num_pages", num_pages, 32)
        self._vm.ioctl(
            ioctls.KVM_CLEAR_DIRTY_LOG,
            ClearDirtyLog(slot=self.slot, num_pages=num_pages, first_page=first_page, dirty_bitmap=data.address),
        )

    def __repr__(self) -> str:
        return f"<Ram slot {self.slot}: {self.size:#x} bytes at {self.gpa:#x}>"
